// state[b, k] = state[b, ancestors[b, k]] in place, for particles of any number of bytes.
//
// If every survivor keeps its place (a[a[k]] == a[k]), no particle is both read and written. Then the dead particles are
// overwritten in any order, by any thread, without scratch memory.
//
// If the ancestors of a row ascend, first the particles whose ancestor is below them are copied, from the last one down.
// Then those whose ancestor is above them are copied, from the first one up. So each is read before it is overwritten.
//
// For any other row an order is found first. A particle that nobody reads is overwritten; then its ancestor may have no
// reader left, and so on. What remains are cycles; each cycle puts one particle aside. The order takes two indices for
// each particle of such a row. The particles themselves are not stored twice.
//
// Another thread may write to the ancestors meanwhile. So each address comes from one read of an ancestor, which is checked
// after that read (`read_held`), whatever an earlier check found. No loop relies on ancestors alone to end.
#include "../../common/particles.h"
#include "../../cpu/scratch.h"
#include "../../cpu/tiles.h"

namespace fastguide::cpu {
namespace {

// The place of the first ancestor out of range, or -1, and the bytes of scratch memory that the call took.
struct Gathered {
    int64_t bad;
    uint64_t scratch;
};

constexpr uint64_t kBlock = 1024;          // ancestors that are checked at a time
constexpr uint64_t kScanGrain = 256;       // blocks worth a thread if they are only checked
constexpr uint64_t kTurnBytes = 1 << 16;   // bytes of particles that are copied in one turn
constexpr uint64_t kCopyGrain = 4;         // turns worth a thread
constexpr uint64_t kPieceBytes = 1 << 12;  // bytes of one particle that are put aside at a time

template <class Index>
struct Map {
    const Index* ancestors;
    uint64_t rows, particles;

    Map(const Index* a, uint64_t b, uint64_t k) : ancestors(a), rows(b), particles(k) {}
    const Index* row(uint64_t b) const { return ancestors + b * particles; }
};

// Calls f(row, begin, end) for blocks of `size` particles.
template <class Index, class F>
FG_INLINE void in_blocks(const Map<Index>& map, uint64_t size, uint64_t grain, int threads, const F& f) {
    const uint64_t blocks = (map.particles + size - 1) / size;
    share_out(map.rows * blocks, grain, threads, [&](uint64_t index) {
        const uint64_t row = index / blocks, begin = (index - row * blocks) * size;
        const uint64_t end = begin + size < map.particles ? begin + size : map.particles;
        f(row, static_cast<Index>(begin), static_cast<Index>(end));
    });
}

FG_INLINE bool raised(const int* flag) { return __atomic_load_n(flag, __ATOMIC_RELAXED) != 0; }
FG_INLINE void raise_flag(int* flag) {
    if (!raised(flag)) __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
}

// Reads an ancestor once: the compiler may not read it twice.
template <class Index>
FG_INLINE Index read_once(const Index* a) {
    return __atomic_load_n(a, __ATOMIC_RELAXED);
}

// The same, but returns `last` if the ancestor is out of range. A branch is predicted; a conditional move would make the
// next loads wait.
template <class Index>
FG_INLINE Index read_held(const Index* a, Index last) {
    using Word = std::make_unsigned_t<Index>;
    const Index ancestor = read_once(a);
    if (static_cast<Word>(ancestor) <= static_cast<Word>(last)) return ancestor;  // a negative one is larger than any
    // Otherwise GCC makes it a conditional move. 10^6 particles of two floats with ancestors anywhere: 1.3 times as fast.
    __asm__ volatile("");
    return last;
}

// --- what kind of map it is ---------------------------------------------------------------------------------

template <class Index>
struct Look {
    std::make_unsigned_t<Index> largest;  // a negative ancestor is larger than any
    bool moves;
};

// This loop and the one in `ascends` use one integer type and have no early exit, so that they vectorise.
template <class Index>
FG_INLINE Look<Index> look(const Index* a, Index begin, Index end) {
    using Word = std::make_unsigned_t<Index>;
    Word largest = 0, difference = 0;
    for (Index k = begin; k < end; ++k) {
        const Word ancestor = static_cast<Word>(a[k]);
        largest = ancestor > largest ? ancestor : largest;
        difference |= ancestor ^ static_cast<Word>(k);
    }
    return {largest, difference != 0};
}

// Whether any ancestor is itself overwritten.
template <class Index>
FG_INLINE bool ancestors_move(const Index* a, Index begin, Index end, Index last) {
    Index difference = 0;
    for (Index k = begin; k < end; ++k) {
        const Index ancestor = read_held(a + k, last);
        difference |= a[ancestor] ^ ancestor;
    }
    return difference != 0;
}

template <class Index>
FG_INLINE bool ascends(const Index* a, Index particles) {
    Index falls = 0;
    for (Index k = 1; k < particles; ++k) falls |= a[k] < a[k - 1];
    return falls == 0;
}

// Returns -1 if there is none: another thread may have corrected it meanwhile.
template <class Index>
int64_t first_out_of_range(const Map<Index>& map) {
    for (uint64_t at = 0; at < map.rows * map.particles; ++at)
        if (map.ancestors[at] < 0 || static_cast<uint64_t>(map.ancestors[at]) >= map.particles)
            return static_cast<int64_t>(at);
    return -1;
}

// Lists the particles that move, in an order in which each is read before it is overwritten. ~k marks the first of a
// cycle: it is put aside for the last of the cycle. Returns the length of the list.
template <class Index>
uint64_t put_in_order(const Index* a, Index particles, Index* order, Index* readers) {
    const Index done = -1;  // less if ancestors were changed meanwhile; no particle is listed twice
    const auto ancestor_of = [=](Index k) { return read_held(a + k, static_cast<Index>(particles - 1)); };
    uint64_t count = 0;
    for (Index k = 0; k < particles; ++k) readers[k] = 0;
    for (Index k = 0; k < particles; ++k) {
        const Index ancestor = ancestor_of(k);
        readers[ancestor] += ancestor != k;
    }
    for (Index k = 0; k < particles; ++k)
        for (Index j = k; readers[j] == 0;) {
            const Index ancestor = ancestor_of(j);
            if (ancestor == j) break;
            order[count++] = j;
            readers[j] = done;
            --readers[ancestor];
            j = ancestor;
        }
    for (Index first = 0; first < particles; ++first) {
        if (readers[first] < 0 || ancestor_of(first) == first) continue;
        Index j = first, sign = ~Index{0};
        do {
            order[count++] = j ^ sign;
            readers[j] = done;
            j = ancestor_of(j);
            sign = 0;
        } while (readers[j] >= 0);
    }
    return count;
}

// --- copies -------------------------------------------------------------------------------------------------

// `width` bytes at the same place in each particle of a row. Particles are `stride` bytes apart. For common small particles
// (kBytes > 0) both are constants, and a copy is one instruction.
template <uint64_t kBytes, class Index>
struct Column {
    char* data;
    uint64_t stride, width;
    const Index* a;
    Index last;

    FG_INLINE Index ancestor_of(Index k) const { return read_held(a + k, last); }
    FG_INLINE char* at(Index k) const { return data + static_cast<uint64_t>(k) * (kBytes > 0 ? kBytes : stride); }
    FG_INLINE void move(char* to, const char* from) const {
        if constexpr (kBytes > 0)
            __builtin_memcpy(to, from, kBytes);
        else
            __builtin_memcpy(to, from, width);
    }

    // Copies in any order. First lists the particles that move, so that no branch for each must be predicted.
    void copy(Index begin, Index end) const {
        uint16_t moved[kBlock];  // k - begin
        uint64_t count = 0;
        for (Index k = begin; k < end; ++k) {
            moved[count] = static_cast<uint16_t>(k - begin);
            count += a[k] != k;
        }
        for (uint64_t i = 0; i < count; ++i) {
            const Index k = begin + static_cast<Index>(moved[i]);
            move(at(k), at(ancestor_of(k)));
        }
    }

    void copy_ascending(Index particles) const {
        using Word = std::make_unsigned_t<Index>;
        for (Index k = particles; k-- > 0;) {
            const Index ancestor = read_once(a + k);
            if (static_cast<Word>(ancestor) < static_cast<Word>(k)) move(at(k), at(ancestor));
        }
        for (Index k = 0; k < particles; ++k) {
            const Index ancestor = read_once(a + k);
            if (ancestor > k && ancestor < particles) move(at(k), at(ancestor));
        }
    }

    void copy_ordered(const Index* order, uint64_t count) const {
        char aside[kBytes > 0 ? kBytes : kPieceBytes] = {};
        Index kept = -1;
        for (uint64_t i = 0; i < count; ++i) {
            const Index to = order[i] < 0 ? ~order[i] : order[i];
            if (order[i] < 0) {
                kept = to;
                move(aside, at(to));
            }
            const Index ancestor = ancestor_of(to);
            move(at(to), ancestor == kept ? aside : at(ancestor));
        }
    }
};

template <uint64_t kValue>
struct Bytes {
    constexpr uint64_t operator()() const { return kValue; }
};

// Calls f(n). n() is the number of bytes of a particle if that is a common small number, otherwise 0.
template <class F>
FG_INLINE void with_bytes(uint64_t bytes, const F& f) {
    switch (bytes) {
        case 1: return f(Bytes<1>{});
        case 2: return f(Bytes<2>{});
        case 4: return f(Bytes<4>{});
        case 8: return f(Bytes<8>{});
        case 12: return f(Bytes<12>{});
        case 16: return f(Bytes<16>{});
        case 24: return f(Bytes<24>{});
        case 32: return f(Bytes<32>{});
        case 64: return f(Bytes<64>{});
        default: return f(Bytes<0>{});
    }
}

// A row whose copies need an order.
template <class Index>
struct OrderedRow {
    uint64_t row;
    const Index* order;  // null if the ancestors ascend
    uint64_t count;
};

template <class Index>
Gathered gather(const Map<Index>& map, const ParticleArray* states, std::size_t count, int threads) {
    const uint64_t particles = map.particles;
    const Index end_of_row = static_cast<Index>(particles), last = end_of_row - 1;
    int bad = 0, moving = 0, entangled = 0;
    in_blocks(map, kBlock, kScanGrain, threads, [&](uint64_t row, Index begin, Index end) {
        const Look<Index> seen = look(map.row(row), begin, end);
        if (!seen.moves) return;
        raise_flag(&moving);
        if (seen.largest >= particles) raise_flag(&bad);
        else if (!raised(&entangled) && ancestors_move(map.row(row), begin, end, last)) raise_flag(&entangled);
    });
    if (bad) {
        const int64_t at = first_out_of_range(map);
        if (at >= 0) return {at, 0};
    }
    if (!moving) return {-1, 0};

    uint64_t scratch = 0, ordered = 0, tangled = 0;
    Scratch<OrderedRow<Index>> rows;
    Scratch<bool> is_ordered;
    Scratch<Index> indices;  // for each tangled row: its order, and how often each particle is read
    if (entangled) {
        scratch += is_ordered.allocate(map.rows);
        share_out(map.rows, kScanGrain * kBlock / particles + 1, threads, [&](uint64_t b) {
            is_ordered.data[b] = map.rows == 1 || ancestors_move(map.row(b), Index{0}, end_of_row, last);
        });
        for (uint64_t b = 0; b < map.rows; ++b) ordered += is_ordered.data[b];
        scratch += rows.allocate(ordered);
        for (uint64_t b = 0, i = 0; b < map.rows; ++b)
            if (is_ordered.data[b]) {
                const bool ascending = ascends(map.row(b), end_of_row);
                rows.data[i++] = {b, nullptr, ascending ? 0 : ++tangled};
            }
    }
    if (tangled > 0) {
        scratch += indices.allocate(2 * tangled * particles);
        share_out(ordered, kScanGrain * kBlock / (16 * particles) + 1, threads, [&](uint64_t i) {
            OrderedRow<Index>& it = rows.data[i];
            if (it.count == 0) return;
            Index* order = indices.data + 2 * (it.count - 1) * particles;
            it = {it.row, order, put_in_order(map.row(it.row), end_of_row, order, order + particles)};
        });
    }

    for (std::size_t s = 0; s < count; ++s) {  // one after the other, so that a state given twice is moved twice
        const uint64_t bytes = states[s].bytes, a_turn = kTurnBytes / (bytes + 1) + 1;
        if (bytes == 0) continue;
        with_bytes(bytes, [&](auto fixed) {
            const auto column = [&](uint64_t row, uint64_t from, uint64_t width) {
                char* const data = static_cast<char*>(states[s].data) + row * particles * bytes + from;
                return Column<fixed(), Index>{data, bytes, width, map.row(row), last};
            };
            if (ordered < map.rows)
                in_blocks(map, a_turn < kBlock ? a_turn : kBlock, kCopyGrain, threads,
                          [&](uint64_t row, Index begin, Index end) {
                              if (!entangled || !is_ordered.data[row]) column(row, 0, bytes).copy(begin, end);
                          });
            const uint64_t pieces = (bytes + kPieceBytes - 1) / kPieceBytes;
            const uint64_t grain = kCopyGrain * kTurnBytes / (particles * bytes) + 1;
            share_out(ordered * pieces, grain, threads, [&](uint64_t index) {
                const OrderedRow<Index>& it = rows.data[index / pieces];
                const uint64_t from = index % pieces * kPieceBytes, left = bytes - from;
                const auto piece = column(it.row, from, left < kPieceBytes ? left : kPieceBytes);
                if (it.order)
                    piece.copy_ordered(it.order, it.count);
                else
                    piece.copy_ascending(end_of_row);
            });
        });
    }
    return {-1, scratch};
}

// ancestors, whether they are int64 (otherwise int32), rows, particles, states (a list of pairs: data, bytes of one
// particle), threads. Returns the place of the first ancestor out of range or -1, and the bytes of scratch memory.
PyObject* gather_particles(Arguments& in) {
    const void* const ancestors = in.pointer("ancestors");
    const bool wide = in.flag();
    const uint64_t rows = in.integer(), particles = in.integer();
    if (!wide) check_below("particles", particles, uint64_t{1} << 31);
    in.expect_memory(rows * (particles > 0));
    const std::vector<ParticleArray> states = read_states(in);
    expect_memory(states, rows, particles);
    const int threads = in.threads();
    const auto with = [&](auto* a) { return gather(Map{a, rows, particles}, states.data(), states.size(), threads); };
    const Gathered done = without_gil([&] {
        if (rows == 0 || particles == 0) return Gathered{-1, 0};
        return wide ? with(static_cast<const int64_t*>(ancestors)) : with(static_cast<const int32_t*>(ancestors));
    });
    return Py_BuildValue("(LK)", static_cast<long long>(done.bad), static_cast<unsigned long long>(done.scratch));
}

Binding binding{"gather_particles", fastcall<gather_particles, 6>,
                "Move the particles of states to where ancestors say, or none where one is out of range."};

}  // namespace
}  // namespace fastguide::cpu

// Resampling in a few passes over the log-weights of a row, one block of particles at a time. The passes find the
// largest log-weight, the sums of the integer weights, and for each particle the number of slots of all particles up to
// it, which gives the ancestors. Each pass computes the integer weights again: reading them back would take as long, and
// 8 bytes a particle.
//
// From the blocks before its own, a pass needs only prefix sums of integers. So no result depends on the number of threads.
//
// Another thread may write to the log-weights meanwhile. So before a pass counts slots from the weights of a block, it
// checks that they are in range and have the sum that the first pass found: see Row::weights_of.
#include "../../common/binding.h"
#include "../../common/log.h"
#include "../../common/weights.h"
#include "../../cpu/max.h"
#include "../../cpu/scratch.h"
#include "../../cpu/tiles.h"
#include "../../cpu/twin.h"
#include "../../cpu/types.h"

namespace fastguide::cpu {
namespace {

// Log-weights are float32 or float64.
struct Resampling : fastguide::Resampling {
    Input log_weights;
    int threads;
};

constexpr int64_t kBlock = 1024;         // particles or slots; their buffers fit the first-level cache
constexpr int64_t kKept = 4 * kBlock;    // rows up to this size keep their integer weights between passes
constexpr int64_t kShort = 256 * kBlock;  // rows up to this size may be given to one thread each
constexpr int64_t kLong = 32 * kBlock;   // rows from this size on are worth several threads
constexpr uint64_t kBlockGrain = 16;
constexpr int kGroup = 16;  // particles whose slots are filled together
constexpr int kFour = 4 * kLanes64, kEight = 2 * kFour;

FG_INLINE int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }
FG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
// `count` rounded up, so that stores of whole vectors and groups stay inside a buffer of this size.
constexpr uint64_t padded_to_vectors(int64_t count) {
    static_assert(64 % kEight == 0 && 64 % kGroup == 0);
    return static_cast<uint64_t>((count + 63) / 64 * 64);
}

// --- log-weights to integer weights -------------------------------------------------------------------------

FG_INLINE I64 load_wide(const int64_t* from) { return load<I64>(from); }
using cpu::load_wide;

template <class T>
FG_INLINE auto load_two(const T* from) {
    return Twin<decltype(load_wide(from))>{load_wide(from), load_wide(from + kLanes64)};
}
template <class T>
FG_INLINE auto load_four(const T* from) {
    return Twin<decltype(load_two(from))>{load_two(from), load_two(from + 2 * kLanes64)};
}
template <class T>
FG_INLINE auto load_eight(const T* from) {
    return Twin<decltype(load_four(from))>{load_four(from), load_four(from + 4 * kLanes64)};
}
template <class V>
FG_INLINE uint64_t sum_of_lanes(V v) {
    uint64_t sum = 0;
    for (int lane = 0; lane < kLanes64; ++lane) sum += static_cast<uint64_t>(v[lane]);
    return sum;
}

// Running sums, each with its own element, that start from `sum`. Adds all elements to `sum`.
FG_INLINE I64 running_sums(I64& sum, I64 v) {
    const I64 within = prefix_sums(v), sums = sum + within;
    sum += last_lane(within);
    return sums;
}
template <class V>
FG_INLINE Twin<V> running_sums(I64& sum, const Twin<V>& v) {
    const V first = running_sums(sum, v.a);
    return {first, running_sums(sum, v.b)};
}

FG_INLINE void store_narrow(int32_t* to, I64 v) { store(to, narrow(v)); }
template <class V>
FG_INLINE void store_narrow(int32_t* to, const Twin<V>& v) {
    store_narrow(to, v.a);
    store_narrow(to + sizeof(V) / sizeof(int64_t), v.b);
}

// Sums over integer weights: the weights, their squares (or 0), and the bitwise OR of the weights.
struct Sums {
    uint64_t weights, squares, bits;

    // Whether no weight is negative, and the sum is at most `count` times the largest possible weight.
    bool in_range(int64_t count, int scale) const {
        return bits >> (scale + 1) == 0 && weights <= static_cast<uint64_t>(count) << scale;
    }
};

// The integer weights of `count` particles, a multiple of kEight, and their sums modulo 2^64 (if weights change meanwhile,
// a sum may be any number).
template <bool kSquares, class T>
Sums weigh_whole(int64_t* q, const T* log_weights, int64_t count, double top, int scale) {
    U64 weights{}, squares{}, bits{};
    for (int64_t i = 0; i < count; i += kEight) {
        auto x = exponential<EightLanes>(load_eight(log_weights + i) - top);  // not const: GCC would then copy it in halves
        const Eight<I64> weight = integer_weight(x, scale);
        store(q + i, weight);
        weights += sum_of(EightLanes::to_unsigned(weight));
        bits |= any_of(EightLanes::to_unsigned(weight));
        if constexpr (kSquares) squares += sum_of(EightLanes::to_unsigned(integer_square(x, scale)));
    }
    uint64_t any = 0;
    for (int lane = 0; lane < kLanes64; ++lane) any |= bits[lane];
    return {sum_of_lanes(weights), sum_of_lanes(squares), any};
}

// The same for any `count` up to kBlock. The weights are padded with zeros to the next multiple of kEight.
template <bool kSquares, class T>
FG_INLINE Sums weigh(int64_t* q, const T* log_weights, int64_t count, double top, int scale) {
    const int64_t whole = count / kEight * kEight;
    Sums sums = weigh_whole<kSquares>(q, log_weights, whole, top, scale);
    if (whole < count) {
        T last[kEight];
        for (int64_t i = 0; i < kEight; ++i)
            last[i] = whole + i < count ? log_weights[whole + i] : -static_cast<T>(__builtin_inf());
        const Sums more = weigh_whole<kSquares>(q + whole, last, kEight, top, scale);
        sums = {sums.weights + more.weights, sums.squares + more.squares, sums.bits | more.bits};
    }
    return sums;
}

// --- sorted uniforms ----------------------------------------------------------------------------------------

// The Philox words that a row draws.
struct RandomWords {
    uint64_t row, seed;
    uint32_t step, stream;

    template <class V>
    FG_INLINE WordsOf<V> words(const V& group) const {
        const uint64_t high = ((row >> 32) & 0xFFFFu) | (uint64_t{stream} << 16);
        return philox(WordsOf<V>{group, V{} + row, V{} + high, V{} + uint64_t{step}}, static_cast<uint32_t>(seed),
                      static_cast<uint32_t>(seed >> 32));
    }
};

// Draws one block of the uniforms + 1 exponentials of a row and returns their sum. The last of the row is not stored.
FG_INLINE int64_t draw_exponentials(uint32_t* out, const RandomWords& random, int64_t block, int64_t uniforms) {
    constexpr int kHalf = 4 * kLanes64, kDrawn = 2 * kHalf;
    const int64_t end = smaller(uniforms, (block + 1) * kBlock);
    const int64_t summed = smaller(uniforms + 1, (block + 1) * kBlock);
    const U64 lanes = group_lanes() + static_cast<uint64_t>(block * kBlock / 4);
    Twin<U64> groups = {lanes, lanes + uint64_t{kLanes64}};
    const auto draw = [&](uint32_t* to) __attribute__((always_inline)) {
        const auto words = random.words(groups);
        groups = groups + uint64_t{2 * kLanes64};
        I64 sum{};
        const auto finish = [&](uint32_t* half, U64 w0, U64 w1, U64 w2, U64 w3) __attribute__((always_inline)) {
            const auto four = integer_exponential<FourLanes>({{w0, w1}, {w2, w3}});
            const F32 even = as<F32>(join_low_words(four.a.a, four.b.a)), odd = as<F32>(join_low_words(four.a.b, four.b.b));
            store(half, interleave_low(even, odd));
            store(half + kLanes32, interleave_high(even, odd));
            sum += as<I64>(sum_of(four));
        };
        finish(to, words.w0.a, words.w1.a, words.w2.a, words.w3.a);
        finish(to + kHalf, words.w0.b, words.w1.b, words.w2.b, words.w3.b);
        return sum;
    };
    I64 sums{};
    int64_t i = block * kBlock, sum = 0;
    for (; i + kDrawn <= end; i += kDrawn) sums += draw(out + i);
    for (; i < summed; i += kDrawn) {
        uint32_t last[kDrawn];
        draw(last);
        if (i < end) __builtin_memcpy(out + i, last, static_cast<std::size_t>(smaller(end - i, kDrawn)) * sizeof *last);
        for (int64_t k = 0; k < smaller(summed - i, kDrawn); ++k) sum += last[k];
    }
    return sum + static_cast<int64_t>(sum_of_lanes(sums));
}

// The sorted uniforms of a row, computed from its exponentials in a moving window.
class Uniforms {
public:
    Uniforms(const uint32_t* exponentials, const int64_t* sums, int64_t count, const Spacing& spacing, double* window)
        : exponentials_(exponentials), sums_(sums), count_(count), spacing_(spacing), window_(window) {}

    static uint64_t window(int64_t count) { return static_cast<uint64_t>(smaller(count, 2 * kBlock) + 2 * kAhead); }

    // Moves to the first uniform that is not below `bound`, and returns how many are below.
    int64_t seek(double bound) {
        int64_t low = 0, high = blocks_of(count_) - 1;  // find the first block whose last uniform is not below
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (sorted_uniform<OneWideLane>(sums_[middle + 1], spacing_) < bound) low = middle + 1;
            else high = middle;
        }
        next_block_ = low;
        begin_ = end_ = 0;
        origin_ = low * kBlock;
        refill();
        begin_ = first_not_below(bound);
        return origin_ + begin_;
    }

    bool any_below(double bound) {
        refill();
        return window_[begin_] < bound;
    }

    // counts[k]: how many uniforms are below bounds[k]. The bounds are the bits of ascending doubles; their number is a
    // multiple of kFour. Moves to the first uniform that is not below the last bound. The bounds are handled in four
    // quarters, four independent chains of instructions: multinomial resampling of 10^6 particles is 1.1 times as fast.
    void count(int32_t* counts, const int64_t* bounds, int64_t number) {
        const int64_t quarter = number / 4;
        for (bool first = true;; first = false) {
            refill();
            int64_t at[4] = {begin_, 0, 0, 0};
            for (int i = 1; i < 4; ++i) at[i] = first_not_below(OneWideLane::of_bits(bounds[i * quarter - 1]));
            const int64_t known = first ? -origin_ : begin_;
            for (int64_t k = 0; k < quarter; k += kBounds) {
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const int64_t* const some = bounds + i * quarter + k;
                    int32_t* const out = counts + i * quarter + k;
                    const double last = OneWideLane::of_bits(some[kBounds - 1]);
                    const Counts below = count_from(at[i], load<Bounds>(some), last) + at[i];
                    at[i] = below[kBounds - 1];
                    const NarrowCounts more = __builtin_convertvector(below - known, NarrowCounts);
                    store(out, first ? more : load<NarrowCounts>(out) + more);
                }
            }
            const bool passed = at[3] < end_ || next_block_ * kBlock >= count_;
            begin_ = at[3];
            if (passed) return;
        }
    }

private:
    static constexpr int kAhead = 2 * kBounds;  // uniforms compared at a time; about half are below the last bound

    // The place in the window of the first uniform that is not below the bound.
    FG_INLINE int64_t first_not_below(double bound) const {
        const double* at = window_ + begin_;
        for (int64_t left = end_ - begin_; left > 0;) {
            const int64_t half = (left + 1) / 2;
            at += at[half - 1] < bound ? half : 0;
            left -= half;
        }
        return at - window_;
    }

    FG_INLINE Counts count_from(int64_t at, Bounds bounds, double last) const {
        Counts counts[2] = {};
        for (;; at += kAhead) {
#pragma GCC unroll 16
            for (int i = 0; i < kAhead; ++i) count_below(counts[i % 2], window_[at + i], bounds);
            if (!(window_[at + kAhead - 1] < last)) break;
        }
        return counts[0] + counts[1];
    }

    // Moves the rest of the window to its front and adds the next block. Infinity follows the last uniform.
    void refill() {
        const int64_t begin = next_block_ * kBlock, size = smaller(count_ - begin, kBlock), left = end_ - begin_;
        if (left > kBlock || (size <= 0 && left > 0)) return;
        for (int64_t i = 0; i < left; ++i) window_[i] = window_[begin_ + i];
        origin_ += begin_;
        begin_ = 0;
        end_ = left;
        if (size > 0) {
            I64 sum = splat(sums_[next_block_]);
            for (int64_t i = 0; i < size; i += kLanes64) {
                const int given = static_cast<int>(smaller(size - i, kLanes64));
                const auto words = given == kLanes64 ? load<HalfU32>(exponentials_ + begin + i)
                                                     : load_some<HalfU32>(exponentials_ + begin + i, given);
                const I64 within = prefix_sums(widen(words));
                store(window_ + end_ + i, sorted_uniform<WideLanes>(sum + within, spacing_));
                sum += last_lane(within);
            }
            end_ += size;
            ++next_block_;
        }
        for (int i = 0; i < kAhead; ++i) window_[end_ + i] = __builtin_inf();
    }

    const uint32_t* exponentials_;
    const int64_t* sums_;  // the sum of the exponentials before each block
    int64_t count_;
    Spacing spacing_;
    double* const window_;
    int64_t origin_ = 0, begin_ = 0, end_ = 0, next_block_ = 0;  // window_[begin_] is uniform origin_ + begin_
};

// --- slots to ancestors -------------------------------------------------------------------------------------

// Copies of one particle's index, stored at once.
using Copies = std::conditional_t<kBytes == 64, HalfI32, I32>;
constexpr int kStored = sizeof(Copies) / sizeof(int32_t), kCopies = 8;

FG_INLINE void store_copies(int32_t* to, Copies copies) {
    for (int i = 0; i < kCopies; i += kStored) store(to + i, copies);
}

// Fills at least kCopies slots. The last store overlaps the one before.
FG_INLINE void fill_many(int32_t* from, int32_t* to, int32_t value) {
    const Copies copies = value - Copies{};
    for (; from < to - kCopies; from += kCopies) store_copies(from, copies);
    store_copies(to - kCopies, copies);
}

FG_INLINE void fill_exactly(int32_t* from, int32_t* to, int32_t value) {
    if (to - from >= kCopies) return fill_many(from, to, value);
    for (; from < to; ++from) *from = value;
}

// For a group of 16 particles, bit i says whether particle i has more slots than `count`.
FG_INLINE uint32_t more_slots(const int32_t* ends, int32_t count) {
    uint32_t mask = 0;
    for (int i = 0; i < kGroup; i += kLanes32)
        mask |= lanes_above(load<I32>(ends + i) - load<I32>(ends + i - 1), splat(count)) << i;
    return mask;
}

// Writes particle `first` + k into slots ends[k - 1] to ends[k], for whole groups of particles. kCopies copies of each are
// stored without a branch; the next particle overwrites the surplus. Nothing is written at `limit` or after it.
FG_INLINE void fill_slots(int32_t* out, const int32_t* ends, int64_t count, int64_t first, int64_t limit) {
    for (int64_t k = 0; k < count; k += kGroup) {
        const int32_t* end = ends + k;
        if (end[kGroup - 1] == end[-1]) continue;
        const int32_t particle = static_cast<int32_t>(first + k);
        if (end[kGroup - 1] > limit - kCopies) {
            for (int i = 0; i < kGroup; ++i) fill_exactly(out + end[i - 1], out + end[i], particle + i);
            continue;
        }
        Copies copies = particle - Copies{};
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i, copies += 1) store_copies(out + end[i - 1], copies);
        for (uint32_t many = more_slots(end, kCopies); many != 0; many &= many - 1) {
            const int i = __builtin_ctz(many);
            fill_many(out + end[i - 1] + 1, out + end[i], particle + i);
        }
    }
}

// The same for the spares, the slots that a particle has beyond its first. They are written one after the other from `out`
// on; `out` has `room` slots. Sets the bits of the particles that have any slot. Returns the number of spares.
FG_INLINE int64_t fill_spares(int32_t* out, uint16_t* alive, const int32_t* ends, int64_t count, int64_t first,
                              int64_t room) {
    int64_t at = 0;
    for (int64_t k = 0; k < count; k += kGroup) {
        const int32_t* end = ends + k;
        alive[k / kGroup] = static_cast<uint16_t>(more_slots(end, 0));
        if (end[kGroup - 1] == end[-1]) continue;
        const int32_t particle = static_cast<int32_t>(first + k);
        const bool roomy = at + (end[kGroup - 1] - end[-1]) + kCopies <= room;
        if (!roomy) {
            for (int i = 0; i < kGroup; ++i) {
                const int64_t slots = end[i] - end[i - 1], spare = slots - (slots > 0);
                fill_exactly(out + at, out + at + spare, particle + i);
                at += spare;
            }
            continue;
        }
        const int64_t begin = at;
        Copies copies = particle - Copies{};
#pragma GCC unroll 4
        for (int i = 0; i < kGroup; ++i, copies += 1) {
            const int64_t slots = end[i] - end[i - 1];
            store_copies(out + at, copies);
            at += slots - (slots > 0);
        }
        for (uint32_t many = more_slots(end, kCopies + 1); many != 0; many &= many - 1) {
            const int i = __builtin_ctz(many);
            const int64_t before = end[i - 1] - end[-1] - __builtin_popcount(alive[k / kGroup] & ((1u << i) - 1));
            int32_t* const from = out + begin + before;
            fill_many(from + 1, from + (end[i] - end[i - 1] - 1), particle + i);
        }
    }
    return at;
}

// Writes the ancestors of `size` slots from `first` on. A living particle keeps its own slot; the slots of the dead take
// the spares in order.
FG_INLINE void place(int32_t* out, const uint16_t* alive, const int32_t* spares, int64_t first, int64_t size) {
    int64_t k = 0;
#if defined(__AVX512F__)
    I32 own{};
    for (int i = 0; i < kGroup; ++i) own[i] = static_cast<int32_t>(first) + i;
    for (; k + kGroup <= size; k += kGroup, own += kGroup) {
        const uint16_t dead = static_cast<uint16_t>(~alive[k / kGroup]);
        store(out + k, as<I32>(_mm512_mask_expandloadu_epi32((__m512i)own, dead, spares)));
        spares += __builtin_popcount(dead);
    }
#endif
    for (; k < size; ++k) {
        const int32_t dead = (alive[k / kGroup] >> (k % kGroup) & 1) - 1, name = static_cast<int32_t>(first + k);
        out[k] = name ^ ((name ^ *spares) & dead);  // no branch: the processor could not predict who lives
        spares -= dead;
    }
}

// --- a row --------------------------------------------------------------------------------------------------

// Tables with an entry for each block of a row, and one more. A pass first writes the sums over each block. These then
// become the sums over all blocks before. `kept`: the integer weights of a short row.
struct Tables {
    int64_t *weights, *squares, *copies, *slots, *spares, *exponentials;
    uint16_t* alive;
    int64_t* kept;

    Tables(const Resampling& call, Memory& memory) {
        const int64_t particles = static_cast<int64_t>(call.particles), number = static_cast<int64_t>(call.number);
        int64_t** const tables[] = {&weights, &squares, &copies, &slots, &spares, &exponentials};
        for (int64_t** table : tables) {
            const int64_t blocks = blocks_of(table == &exponentials ? number + 1 : particles);
            *table = memory.take<int64_t>(static_cast<uint64_t>(blocks + 1));
        }
        alive = memory.take<uint16_t>(call.sorted ? 0 : static_cast<uint64_t>(blocks_of(particles) * (kBlock / kGroup)));
        kept = memory.take<int64_t>(particles <= kKept ? padded_to_vectors(particles) : 0);
    }
};

// The buffers of a thread for one block: the weights unless the row keeps them, the slots (with kGroup entries before
// them), and what the scheme needs.
struct BlockBuffers {
    int64_t* weights;
    int32_t *slots, *copies;
    double* window;

    BlockBuffers(const Resampling& call, Memory& memory) {
        const int64_t particles = static_cast<int64_t>(call.particles), number = static_cast<int64_t>(call.number);
        const uint64_t size = padded_to_vectors(smaller(particles, kBlock));
        const bool residual = call.scheme == Scheme::residual, draws = residual || call.scheme == Scheme::multinomial;
        weights = memory.take<int64_t>(particles <= kKept ? 0 : size);
        slots = memory.take<int32_t>(kGroup + size);
        copies = memory.take<int32_t>(residual ? size : 0);
        window = memory.take<double>(draws ? Uniforms::window(number) : 0);
    }
};

FG_INLINE int64_t sum_before(int64_t* sums, int64_t count) {
    uint64_t sum = 0;  // modulo 2^64: if weights change meanwhile, their squares may be any number
    for (int64_t i = 0; i < count; ++i) {
        const auto own = static_cast<uint64_t>(sums[i]);
        sums[i] = static_cast<int64_t>(sum);
        sum += own;
    }
    return sums[count] = static_cast<int64_t>(sum);
}

template <class T>
class Row {
public:
    Row(const Resampling& call, uint64_t index, const Tables& tables, const Workspace& workspace, int threads)
        : call_(call),
          tables_(tables),
          workspace_(workspace),
          index_(index),
          random_{call.first_row + index, call.seed, call.step, call.stream},
          particles_(static_cast<int64_t>(call.particles)),
          number_(static_cast<int64_t>(call.number)),
          blocks_(blocks_of(particles_)),
          threads_(threads),
          log_weights_(static_cast<const T*>(call.log_weights.data) + index * call.particles),
          after_(static_cast<T*>(call.log_weights_after) + index * call.number),
          ancestors_(call.ancestors + index * call.number),
          scale_(weight_scale(call.particles)) {}

    void resample() {
        find_top();
        if (top_ - top_ == 0.0) sum_weights();
        const bool usable = total_ > 0;
        double log_mean_weight = __builtin_nan(""), ess = log_mean_weight;
        if (usable) {
            const double unit = OneWideLane::of_bits(static_cast<int64_t>(1023 - scale_) << 52);
            const double w = static_cast<double>(total_) * unit, v = static_cast<double>(squares_) * unit;
            ess = w * w / v;
            log_mean_weight = top_ + log_of_normal<OneWideLane>(w / static_cast<double>(particles_));
        }
        call_.log_mean_weight[index_] = log_mean_weight;
        call_.ess[index_] = ess;
        if (number_ == particles_ && !(ess < call_.keep_from)) {
            keep();
            return;
        }
        if (usable) draw();
        const T weight = static_cast<T>(log_mean_weight);
        share_blocks(number_, [&](int64_t begin, int64_t end, const BlockBuffers&) {
            for (int64_t i = begin; i < end; ++i) after_[i] = weight;
            if (!usable)
                for (int64_t i = begin; i < end; ++i) ancestors_[i] = 0;
        });
    }

private:
    // Calls f(begin, end, buffers) for ranges of [0, count).
    template <class F>
    FG_INLINE void share_blocks(int64_t count, const F& f) {
        const Sharing sharing(static_cast<uint64_t>(blocks_of(count)), kBlockGrain, threads_);
        share_ranges(sharing, workspace_, [&](uint64_t begin, uint64_t end, Memory memory) {
            const BlockBuffers buffers(call_, memory);
            f(static_cast<int64_t>(begin) * kBlock, smaller(static_cast<int64_t>(end) * kBlock, count), buffers);
        });
    }

    template <class F>
    FG_INLINE void for_each_block(int64_t count, const F& f) {
        share_blocks(count, [&](int64_t begin, int64_t end, const BlockBuffers& buffers) {
            for (int64_t block = begin / kBlock; block * kBlock < end; ++block)
                f(block, smaller(kBlock, end - block * kBlock), buffers);
        });
    }

    void find_top() {
        for_each_block(particles_, [&](int64_t block, int64_t size, const BlockBuffers&) {
            tables_.weights[block] = OneWideLane::bits(largest(log_weights_ + block * kBlock, size));
        });
        top_ = OneWideLane::of_bits(tables_.weights[0]);
        for (int64_t block = 1; block < blocks_; ++block) {
            const double top = OneWideLane::of_bits(tables_.weights[block]);
            if (!(top <= top_) && top_ == top_) top_ = top;
        }
    }

    // The integer weights of a block: in `buffer`, or where the first pass left them. Null if they are out of range or
    // their sum is no longer the one in the tables. Otherwise their running sums ascend from the table's entry for this
    // block to the next entry, and so do the slots that are counted from them.
    FG_INLINE int64_t* weights_of(int64_t block, int64_t size, int64_t* buffer) {
        if (particles_ <= kKept) return tables_.kept + block * kBlock;
        const Sums sums = weigh<false>(buffer, log_weights_ + block * kBlock, size, top_, scale_);
        const int64_t known = tables_.weights[block + 1] - tables_.weights[block];
        return sums.in_range(size, scale_) && sums.weights == static_cast<uint64_t>(known) ? buffer : nullptr;
    }

    void sum_weights() {
        for_each_block(particles_, [&](int64_t block, int64_t size, const BlockBuffers& buffers) {
            int64_t* const q = particles_ <= kKept ? tables_.kept + block * kBlock : buffers.weights;
            Sums sums = weigh<true>(q, log_weights_ + block * kBlock, size, top_, scale_);
            if (!sums.in_range(size, scale_)) {  // they changed after the largest was found: set them all to 0
                sums = {};
                for (int64_t i = 0; i < (size + kEight - 1) / kEight * kEight; ++i) q[i] = 0;
            }
            tables_.weights[block] = static_cast<int64_t>(sums.weights);
            tables_.squares[block] = static_cast<int64_t>(sums.squares);
        });
        total_ = sum_before(tables_.weights, blocks_);
        squares_ = sum_before(tables_.squares, blocks_);
        slots_ = slots_of(call_.number, static_cast<uint64_t>(total_));
    }

    void keep() {
        share_blocks(number_, [&](int64_t begin, int64_t end, const BlockBuffers&) {
            for (int64_t i = begin; i < end; ++i) {
                ancestors_[i] = static_cast<int32_t>(i);
                after_[i] = log_weights_[i];
            }
        });
    }

    void draw() {
        switch (call_.scheme) {
            case Scheme::systematic: return draw_as<Scheme::systematic>();
            case Scheme::stratified: return draw_as<Scheme::stratified>();
            case Scheme::multinomial: return draw_as<Scheme::multinomial>();
            case Scheme::residual: return draw_as<Scheme::residual>();
        }
    }

    template <Scheme kScheme>
    void draw_as() {
        if constexpr (kScheme == Scheme::systematic) {
            const Words words = random_.words(U64{});
            first_ = uniform_below<OneWideLane>(slots_.total, words.w0[0], words.w1[0]);
        }
        int64_t uniforms = 0;
        if constexpr (kScheme == Scheme::multinomial) {
            uniforms = number_;
            draw_uniforms(uniforms, static_cast<double>(total_));
        }
        if constexpr (kScheme == Scheme::residual) {
            uniforms = number_ - sum_copies();
            draw_uniforms(uniforms, static_cast<double>(uniforms));
        }
        share_blocks(particles_, [&](int64_t begin, int64_t end, const BlockBuffers& buffers) {
            draw_blocks<kScheme>(begin / kBlock, blocks_of(end), uniforms, buffers);
        });
        if (!call_.sorted) settle();
    }

    int64_t sum_copies() {
        for_each_block(particles_, [&](int64_t block, int64_t size, const BlockBuffers& buffers) {
            const int64_t* q = weights_of(block, size, buffers.weights);
            I64 copies{};
            for (int64_t i = 0; q && i < size; i += kFour) {
                const Share<FourLanes> share = floor_share<FourLanes>(load_four(q + i), slots_);
                copies += sum_of(share.whole);
            }
            tables_.copies[block] = static_cast<int64_t>(sum_of_lanes(copies));
        });
        return sum_before(tables_.copies, blocks_);
    }

    // The scratch buffer for the exponentials: the output that is written last.
    uint32_t* exponentials() const {
        return call_.sorted ? reinterpret_cast<uint32_t*>(after_) : reinterpret_cast<uint32_t*>(ancestors_);
    }

    void draw_uniforms(int64_t uniforms, double total) {
        for_each_block(uniforms + 1, [&](int64_t block, int64_t, const BlockBuffers&) {
            tables_.exponentials[block] = draw_exponentials(exponentials(), random_, block, uniforms);
        });
        spacing_ = spacing_of(total, sum_before(tables_.exponentials, blocks_of(uniforms + 1)));
    }

    // Uniforms below this bound belong to the blocks before this one.
    template <Scheme kScheme>
    double bound_before(int64_t block) const {
        const int64_t q = tables_.weights[block];
        if constexpr (kScheme == Scheme::multinomial) return static_cast<double>(q);
        return remainder_of<OneWideLane>(floor_share<OneWideLane>(q, slots_), tables_.copies[block],
                                         1.0 / static_cast<double>(total_));
    }

    // Stratum j's position is floor((j Q + r_j) / N).
    template <class Lanes>
    FG_INLINE typename Lanes::I64 stratified_slots(const typename Lanes::I64& q) const {
        using U64 = typename Lanes::U64;
        const Share<Lanes> share = floor_share<Lanes>(q, slots_);
        const U64 j = Lanes::to_unsigned(share.whole);
        const auto words = random_.words(j >> 1);
        const U64 odd = -(j & 1);
        const U64 w0 = words.w0 ^ ((words.w0 ^ words.w2) & odd), w1 = words.w1 ^ ((words.w1 ^ words.w3) & odd);
        return share.whole + Lanes::one_if(share.rest > uniform_below<Lanes>(slots_.total, w0, w1));
    }

    template <Scheme kScheme>
    int64_t slots_before(int64_t block, Uniforms& uniforms) const {
        if (block == blocks_) return number_;
        const int64_t q = tables_.weights[block];
        if constexpr (kScheme == Scheme::systematic) return systematic_slots<OneWideLane>(q, slots_, first_);
        if constexpr (kScheme == Scheme::stratified) return stratified_slots<WideLanes>(splat(q))[0];
        const int64_t drawn = uniforms.seek(bound_before<kScheme>(block));
        return kScheme == Scheme::residual ? tables_.copies[block] + drawn : drawn;
    }

    // Finds the ancestors of the slots that belong to the particles of blocks [begin, end).
    template <Scheme kScheme>
    void draw_blocks(int64_t begin, int64_t end, int64_t drawn, const BlockBuffers& buffers) {
        constexpr bool kDraws = kScheme == Scheme::multinomial || kScheme == Scheme::residual;
        int32_t* const ends = buffers.slots + kGroup;
        Uniforms uniforms(exponentials(), tables_.exponentials, drawn, spacing_, buffers.window);
        const int64_t limit = slots_before<kScheme>(end, uniforms);
        int64_t filled = slots_before<kScheme>(begin, uniforms);
        for (int64_t block = begin; block < end; ++block) {
            bool empty = filled == limit;
            if constexpr (!kDraws) empty = empty || slots_before<kScheme>(block + 1, uniforms) == filled;
            if constexpr (kScheme == Scheme::multinomial) empty = empty || !uniforms.any_below(bound_before<kScheme>(block + 1));
            ends[-1] = static_cast<int32_t>(filled);
            const int64_t size = smaller(kBlock, particles_ - block * kBlock);
            const int64_t padded = (size + kGroup - 1) / kGroup * kGroup;
            static_assert(kFour % kGroup == 0 || kGroup % kFour == 0);
            if (empty) {
                if (call_.sorted) continue;
                for (int64_t i = 0; i < padded; ++i) ends[i] = ends[-1];
            } else if (count_slots<kScheme>(ends, block, size, uniforms, buffers)) {
                for (int64_t i = (size + kFour - 1) / kFour * kFour; i < padded; ++i) ends[i] = ends[i - 1];
            } else {
                give_to_first<kScheme>(ends, padded, block, uniforms);
            }
            if (call_.sorted) {
                fill_slots(ancestors_, ends, padded, block * kBlock, limit);
            } else {
                tables_.slots[block] = filled;
                int32_t* const spares = reinterpret_cast<int32_t*>(after_) + filled;
                tables_.spares[block] = fill_spares(spares, tables_.alive + block * (kBlock / kGroup), ends, padded,
                                                    block * kBlock, limit - filled);
            }
            filled = ends[padded - 1];
        }
    }

    // ends[k]: the number of slots of all particles of the row up to the k-th of this block. Overwrites the weights.
    // Returns false if the weights no longer agree with the tables.
    template <Scheme kScheme>
    FG_INLINE bool count_slots(int32_t* ends, int64_t block, int64_t size, Uniforms& uniforms, const BlockBuffers& buffers) {
        int64_t* const q = weights_of(block, size, buffers.weights);
        if (!q) return false;
        const int64_t padded = (size + kFour - 1) / kFour * kFour;
        I64 sum = splat(tables_.weights[block]);
        if constexpr (kScheme == Scheme::systematic || kScheme == Scheme::stratified) {
            for (int64_t k = 0; k < padded; k += kFour) {
                const Four<I64> up_to = running_sums(sum, load_four(q + k));
                if constexpr (kScheme == Scheme::systematic) {
                    store_narrow(ends + k, systematic_slots<FourLanes>(up_to, slots_, first_));
                } else {
                    store_narrow(ends + k, stratified_slots<FourLanes>(up_to));
                }
            }
        } else if constexpr (kScheme == Scheme::multinomial) {
            for (int64_t k = 0; k < padded; k += kFour)
                store(q + k, FourLanes::to_double(running_sums(sum, load_four(q + k))));
            uniforms.count(ends, q, padded);
        } else {
            int32_t* const copies = buffers.copies;
            I64 copied = splat(tables_.copies[block]);
            const double reciprocal = 1.0 / static_cast<double>(total_);
            for (int64_t k = 0; k < padded; k += kFour) {
                const Four<I64> weights = load_four(q + k), up_to = running_sums(sum, weights);
                const Four<I64> own = running_sums(copied, floor_share<FourLanes>(weights, slots_).whole);
                store_narrow(copies + k, own);
                store(q + k, remainder_of(floor_share<FourLanes>(up_to, slots_), own, reciprocal));
            }
            if (copied[0] != tables_.copies[block + 1]) return false;
            uniforms.count(ends, q, padded);
            for (int64_t k = 0; k < padded; ++k) ends[k] += copies[k];
        }
        return true;
    }

    // Gives all slots of a block to its first particle.
    template <Scheme kScheme>
    __attribute__((noinline, cold)) void give_to_first(int32_t* ends, int64_t padded, int64_t block, Uniforms& uniforms) const {
        const int64_t all = slots_before<kScheme>(block + 1, uniforms);
        for (int64_t i = 0; i < padded; ++i) ends[i] = static_cast<int32_t>(all);
    }

    // Survivors keep their places. The spares, block after block, fill the slots of the dead.
    void settle() {
        sum_before(tables_.spares, blocks_);
        tables_.slots[blocks_] = number_;
        const auto dead_before = [&](int64_t block) {  // particles before the block minus survivors (slots minus spares)
            return smaller(block * kBlock, particles_) - (tables_.slots[block] - tables_.spares[block]);
        };
        const int32_t* const filled = reinterpret_cast<const int32_t*>(after_);
        for_each_block(particles_, [&](int64_t block, int64_t size, const BlockBuffers& buffers) {
            int32_t* const spares = buffers.slots;
            const int64_t rank = dead_before(block), wanted = dead_before(block + 1) - rank;
            int64_t from = 0, above = blocks_;  // find the block that has the spare of this rank
            while (above - from > 1) {
                const int64_t middle = (from + above) / 2;
                if (tables_.spares[middle] <= rank) from = middle;
                else above = middle;
            }
            for (int64_t have = 0; have < wanted; ++from) {
                const int64_t skipped = rank + have - tables_.spares[from];
                const int64_t left = tables_.spares[from + 1] - tables_.spares[from] - skipped;
                const int64_t taken = smaller(left, wanted - have);
                __builtin_memcpy(spares + have, filled + tables_.slots[from] + skipped,
                                 static_cast<std::size_t>(taken) * sizeof *spares);
                have += taken;
            }
            place(ancestors_ + block * kBlock, tables_.alive + block * (kBlock / kGroup), spares, block * kBlock, size);
        });
    }

    const Resampling& call_;
    const Tables tables_;
    const Workspace& workspace_;  // for BlockBuffers
    const uint64_t index_;
    const RandomWords random_;
    const int64_t particles_, number_, blocks_;
    const int threads_;
    const T* const log_weights_;
    T* const after_;
    int32_t* const ancestors_;
    const int scale_;
    double top_ = 0.0;
    int64_t total_ = 0, squares_ = 0, first_ = 0;  // first_: the uniform integer below Q for systematic resampling
    Slots slots_{};
    Spacing spacing_{};
};

template <class T>
void resample_rows(const Resampling& call) {
    const int64_t particles = static_cast<int64_t>(call.particles), number = static_cast<int64_t>(call.number);
    const int64_t size = particles > number ? particles : number;
    Memory tables, blocks;  // these only count
    Tables(call, tables);
    BlockBuffers(call, blocks);
    if (size > kShort || (size >= kLong && call.rows < 2 * static_cast<uint64_t>(call.threads))) {
        const Sharing most(static_cast<uint64_t>(blocks_of(size + 1)), kBlockGrain, call.threads);
        const Workspace own(tables, 1), workspace(blocks, most.team);
        for (uint64_t row = 0; row < call.rows; ++row) {
            Memory memory = own.of(0);
            Row<T>(call, row, Tables(call, memory), workspace, call.threads).resample();
        }
        return;
    }
    const uint64_t grain = kBlockGrain * kBlock / static_cast<uint64_t>(size);
    BlockBuffers(call, tables);
    share_out(call.rows, grain > 0 ? grain : 1, call.threads, tables, [&](uint64_t row, Memory memory) {
        const Tables own(call, memory);
        Row<T>(call, row, own, Workspace(memory), 1).resample();
    });
}

// Returns the first row without a usable weight, or -1.
int64_t resample(const Resampling& call) {
    if (call.rows == 0) return -1;
    if (call.log_weights.dtype == Dtype::float64) resample_rows<double>(call);
    else resample_rows<float>(call);
    for (uint64_t row = 0; row < call.rows; ++row)
        if (call.ess[row] != call.ess[row]) return static_cast<int64_t>(row);
    return -1;
}

// log_weights, their dtype, rows, particles, number, scheme, sorted, keep_from, seed, step, stream, first_row,
// ancestors, log_weights after, log_mean_weight, ess, threads
PyObject* call_resample(Arguments& in) {
    Resampling call{};
    call.log_weights = {in.pointer_or_none("log_weights"), in.dtype()};
    if (call.log_weights.dtype != Dtype::float32 && call.log_weights.dtype != Dtype::float64)
        throw std::invalid_argument("log_weights must be float32 or float64");
    call.rows = in.integer(), call.particles = in.integer(), call.number = in.integer();
    check_below("rows", call.rows, kMaxParticles + 1);
    check_counts(call.particles, call.number);
    in.expect_memory(call.rows);
    call.scheme = in.code("scheme", Scheme::residual), call.sorted = in.flag(), call.keep_from = in.number();
    const RandnShape counter = in.counter(call.rows, 1);
    call.seed = counter.seed, call.step = counter.step, call.stream = counter.stream;
    call.first_row = counter.first_particle;
    call.ancestors = in.pointer<int32_t>("ancestors");
    call.log_weights_after = in.pointer("log_weights");
    call.log_mean_weight = in.pointer<double>("log_mean_weight");
    call.ess = in.pointer<double>("ess");
    in.expect_memory(call.rows);
    call.threads = in.threads();
    return PyLong_FromLongLong(without_gil([&] { return resample(call); }));
}

Binding binding{"resample", fastcall<call_resample, 17>, "Ancestors; returns the first row without a usable weight, or -1."};

}  // namespace
}  // namespace fastguide::cpu

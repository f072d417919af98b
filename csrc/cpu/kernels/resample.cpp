// Resampling in a few passes over the log-weights of a row, a block of particles at a time: the largest, the sums of
// the integer weights, then for each particle the number of slots before its end, from which ancestors follow. The
// integer weights are computed anew in each pass: reading them back would cost as much, and 8 bytes a particle.
//
// What a pass needs of the blocks before its own are prefix sums of integers, so no result depends on the sharing.
#include "../../common/weights.h"
#include "../kernels.h"
#include "../tiles.h"

namespace fastguide::cpu::FG_ISA {
namespace {

constexpr int64_t kBlock = 1024;         // particles or slots: the buffers for them stay in the first-level cache
constexpr int64_t kKept = 4 * kBlock;    // rows this short keep their integer weights from one pass to the next
constexpr int64_t kShort = 256 * kBlock;  // and these have their tables on the stack
constexpr int64_t kLong = 32 * kBlock;   // rows worth more than one thread
constexpr uint64_t kBlockGrain = 16;
constexpr int kGroup = 16;  // particles whose slots are filled together

FG_INLINE int64_t blocks_of(int64_t count) { return (count + kBlock - 1) / kBlock; }
FG_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// --- log-weights to integer weights -------------------------------------------------------------------------

FG_INLINE F64 load_wide(const float* from) { return widen(load<HalfF32>(from)); }
FG_INLINE F64 load_wide(const double* from) { return load<F64>(from); }

FG_INLINE auto load_lanes(const float* from) { return load<F32>(from); }
FG_INLINE auto load_lanes(const double* from) { return load<F64>(from); }

// NaN if there is one.
template <class T>
FG_INLINE double largest(const T* values, int64_t count) {
    constexpr int kLanes = kBytes / static_cast<int>(sizeof(T));
    T top = values[0];
    bool nan = false;
    int64_t i = 0;
    if (count >= 4 * kLanes) {
        auto tops = load_lanes(values);
        auto nans = tops != tops;
        for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
            const auto a = load_lanes(values + i), b = load_lanes(values + i + kLanes);
            const auto c = load_lanes(values + i + 2 * kLanes), d = load_lanes(values + i + 3 * kLanes);
            nans |= (a != a) | (b != b) | (c != c) | (d != d);
            const auto e = a > b ? a : b, f = c > d ? c : d;
            const auto g = e > f ? e : f;
            tops = g > tops ? g : tops;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            top = tops[lane] > top ? tops[lane] : top;
            nan |= nans[lane] != 0;
        }
    }
    for (; i < count; ++i) {
        top = values[i] > top ? values[i] : top;
        nan |= values[i] != values[i];
    }
    return nan || top != top ? __builtin_nan("") : static_cast<double>(top);
}

struct Sums {
    int64_t weights, squares;
};

// The integer weights of up to kBlock particles, zeros to the end of the last vector, and their sums.
template <class T>
FG_INLINE Sums weigh(int64_t* q, const T* log_weights, int64_t count, double top, int scale) {
    I64 weights{}, squares{};
    const auto add = [&](int64_t i, F64 log_weight) __attribute__((always_inline)) {
        const F64 d = log_weight - top;
        const auto x = exponential<WideLanes>(d > kLeastLogWeight ? d : splat(kLeastLogWeight));
        const I64 weight = integer_weight(x, scale);
        store(q + i, weight);
        weights += weight;
        squares += integer_square(x, scale);
    };
    int64_t i = 0;
    for (; i + kLanes64 <= count; i += kLanes64) add(i, load_wide(log_weights + i));
    if (i < count) {
        T last[kLanes64];
        for (int lane = 0; lane < kLanes64; ++lane)
            last[lane] = i + lane < count ? log_weights[i + lane] : -static_cast<T>(__builtin_inf());
        add(i, load_wide(last));
    }
    Sums sums{};
    for (int lane = 0; lane < kLanes64; ++lane) sums.weights += weights[lane], sums.squares += squares[lane];
    return sums;
}

// --- sorted uniforms ----------------------------------------------------------------------------------------

struct Counter {
    uint64_t row, seed;
    uint32_t step, stream;

    FG_INLINE Words words(U64 group) const {
        const U64 high = splat(((row >> 32) & 0xFFFFu) | (uint64_t{stream} << 16));
        return philox({group, splat(row), high, splat(uint64_t{step})}, static_cast<uint32_t>(seed),
                      static_cast<uint32_t>(seed >> 32));
    }
};

// Exponentials of one block of [0, uniforms], all but the very last of which are stored; returns their sum.
FG_INLINE int64_t draw_exponentials(uint32_t* out, const Counter& counter, int64_t block, int64_t uniforms) {
    constexpr int kDrawn = 4 * kLanes64;
    const int64_t end = smaller(uniforms, (block + 1) * kBlock);
    const int64_t summed = smaller(uniforms + 1, (block + 1) * kBlock);
    U64 groups = group_lanes() + static_cast<uint64_t>(block * kBlock / 4);
    const auto draw = [&](uint32_t* to) __attribute__((always_inline)) {
        const Words words = counter.words(groups);
        groups += uint64_t{kLanes64};
        const U64 w0 = integer_exponential<WideLanes>(words.w0), w1 = integer_exponential<WideLanes>(words.w1);
        const U64 w2 = integer_exponential<WideLanes>(words.w2), w3 = integer_exponential<WideLanes>(words.w3);
        const F32 even = as<F32>(join_low_words(w0, w2)), odd = as<F32>(join_low_words(w1, w3));
        store(to, interleave_low(even, odd));
        store(to + kLanes32, interleave_high(even, odd));
        return as<I64>((w0 + w1) + (w2 + w3));
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
    for (int lane = 0; lane < kLanes64; ++lane) sum += sums[lane];
    return sum;
}

// The sorted uniforms of a row, made of its exponentials in a window that moves on.
class Uniforms {
public:
    Uniforms(const uint32_t* exponentials, const int64_t* sums, int64_t count, const Spacing& spacing)
        : exponentials_(exponentials), sums_(sums), count_(count), spacing_(spacing) {}

    // Moves to the first that is not below `bound`, and returns how many are.
    int64_t seek(double bound) {
        int64_t low = 0, high = blocks_of(count_) - 1;  // its block is the first whose sum at the end is not below
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (sorted_uniform<OneWideLane>(sums_[middle + 1], spacing_) < bound) low = middle + 1;
            else high = middle;
        }
        next_block_ = low;
        origin_ = next_block_ * kBlock;
        at_ = have_ = 0;
        refill();
        while (window_[at_] < bound) ++at_;
        return origin_ + at_;
    }

    double front() {
        if (at_ == have_ && next_block_ * kBlock < count_) refill();
        return window_[at_];
    }

    // For each of kLanes64 ascending bounds, how many lie below it; moves to the first that is not below the last.
    FG_INLINE I64 below(F64 bounds) {
        const double last = bounds[kLanes64 - 1];
        const int64_t before = origin_ + at_;
        I64 counts[4] = {};
        for (;;) {
            if (at_ + kAhead > have_ && next_block_ * kBlock < count_) refill();
            const double* window = window_ + at_;
#pragma GCC unroll 16
            for (int i = 0; i < kAhead; ++i) counts[i % 4] += splat(window[i]) < bounds ? splat(int64_t{1}) : I64{};
            if (!(window[kAhead - 1] < last)) break;
            at_ += kAhead;
        }
        const I64 counted = ((counts[0] + counts[1]) + (counts[2] + counts[3])) + before;
        at_ = counted[kLanes64 - 1] - origin_;
        return counted;
    }

private:
    static constexpr int kAhead = 2 * kLanes64;  // compared at a time: about half of it lies below the last bound

    // What is still ahead to the front, then the next block; infinity after the last.
    void refill() {
        const int64_t left = have_ - at_;
        for (int64_t i = 0; i < left; ++i) window_[i] = window_[at_ + i];
        origin_ += at_;
        at_ = 0;
        have_ = left;
        const int64_t begin = next_block_ * kBlock, size = smaller(count_ - begin, kBlock);
        I64 sum = splat(sums_[next_block_]);
        for (int64_t i = 0; i < size; i += kLanes64) {
            const int given = static_cast<int>(smaller(size - i, kLanes64));
            const auto words = given == kLanes64 ? load<HalfU32>(exponentials_ + begin + i)
                                                 : load_some<HalfU32>(exponentials_ + begin + i, given);
            const I64 within = prefix_sums(__builtin_convertvector(words, I64));
            store(window_ + have_ + i, sorted_uniform<WideLanes>(sum + within, spacing_));
            sum += last_lane(within);
        }
        ++next_block_;
        if (size > 0) have_ += size;
        if (next_block_ * kBlock >= count_)
            for (int i = 0; i <= kAhead; ++i) window_[have_ + i] = __builtin_inf();
    }

    const uint32_t* exponentials_;
    const int64_t* sums_;  // before each block
    int64_t count_;
    Spacing spacing_;
    int64_t origin_ = 0, at_ = 0, have_ = 0, next_block_ = 0;  // window_[at_] is uniform origin_ + at_
    alignas(64) double window_[kBlock + 4 * kAhead];
};

// --- slots to ancestors -------------------------------------------------------------------------------------

typedef int32_t Copies __attribute__((vector_size(16)));
constexpr int kCopies = 4;

FG_INLINE void store_copies(int32_t* to, int32_t value) { store(to, value - Copies{}); }

// `count` copies and not one more.
FG_INLINE void fill_exactly(int32_t* to, int64_t count, int32_t value) {
    int64_t i = 0;
    for (; i + kCopies <= count; i += kCopies) store_copies(to + i, value);
    for (; i < count; ++i) to[i] = value;
}

// Of 16 particles, bit i says whether particle i has more slots than `count`.
FG_INLINE uint32_t more_slots(const int32_t* ends, int32_t count) {
    uint32_t mask = 0;
    for (int i = 0; i < kGroup; i += kLanes32)
        mask |= lanes_above(load<I32>(ends + i) - load<I32>(ends + i - 1), splat(count)) << i;
    return mask;
}

// Particle `first` + k into slots ends[k - 1] to ends[k], for whole groups of particles. Four copies of each are stored,
// those too many under what is stored next; nothing at `limit` or after it.
FG_INLINE void fill_slots(int32_t* out, const int32_t* ends, int64_t count, int64_t first, int64_t limit) {
    for (int64_t k = 0; k < count; k += kGroup) {
        const int32_t* end = ends + k;
        if (end[kGroup - 1] == end[-1]) continue;
        const int32_t particle = static_cast<int32_t>(first + k);
        if (end[kGroup - 1] > limit - kCopies) {
            for (int i = 0; i < kGroup; ++i) fill_exactly(out + end[i - 1], end[i] - end[i - 1], particle + i);
            continue;
        }
        for (int i = 0; i < kGroup; ++i) store_copies(out + end[i - 1], particle + i);
        for (uint32_t many = more_slots(end, kCopies); many != 0; many &= many - 1) {
            const int i = __builtin_ctz(many);
            fill_exactly(out + end[i - 1] + kCopies, end[i] - end[i - 1] - kCopies, particle + i);
        }
    }
}

// The same for the slots that a particle has beyond its first, one particle's after the other's from `out` on; notes
// who has any slot. Returns how many slots it filled, with `room` for them.
FG_INLINE int64_t fill_spares(int32_t* out, uint16_t* alive, const int32_t* ends, int64_t count, int64_t first,
                              int64_t room) {
    int64_t at = 0;
    for (int64_t k = 0; k < count; k += kGroup) {
        const int32_t* end = ends + k;
        alive[k / kGroup] = static_cast<uint16_t>(more_slots(end, 0));
        if (end[kGroup - 1] == end[-1]) continue;
        const int32_t particle = static_cast<int32_t>(first + k);
        const bool roomy = at + (end[kGroup - 1] - end[-1]) + kCopies <= room;
        for (int i = 0; i < kGroup; ++i) {
            const int64_t slots = end[i] - end[i - 1], spare = slots - (slots > 0);
            if (roomy && spare <= kCopies) store_copies(out + at, particle + i);
            else fill_exactly(out + at, spare, particle + i);
            at += spare;
        }
    }
    return at;
}

// The living of particles `first`.. to their own places, spares in the order in which they stand to the others.
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
        const bool lives = (alive[k / kGroup] >> (k % kGroup) & 1) != 0;
        out[k] = lives ? static_cast<int32_t>(first + k) : *spares;
        spares += !lives;
    }
}

// --- a row --------------------------------------------------------------------------------------------------

// Of each block of a row, and one entry more: first what a pass sums over the block, then the sums over all before.
struct Tables {
    int64_t *weights, *squares, *copies, *slots, *spares, *exponentials;
    uint16_t* alive;

    static int64_t entries(int64_t particles, int64_t number) {
        return 5 * (blocks_of(particles) + 1) + blocks_of(number + 1) + 1;
    }
    static int64_t groups(int64_t particles) { return blocks_of(particles) * (kBlock / kGroup); }

    Tables(int64_t* memory, uint16_t* groups, int64_t particles) : alive(groups) {
        int64_t** const tables[] = {&weights, &squares, &copies, &slots, &spares, &exponentials};
        for (int64_t** table : tables) {
            *table = memory;
            memory += blocks_of(particles) + 1;
        }
    }
};

FG_INLINE int64_t sum_before(int64_t* sums, int64_t count) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t own = sums[i];
        sums[i] = sum;
        sum += own;
    }
    return sums[count] = sum;
}

template <class T>
class Row {
public:
    Row(const Resampling& call, uint64_t index, const Tables& tables, int threads)
        : call_(call),
          tables_(tables),
          counter_{index, call.seed, call.step, call.stream},
          particles_(static_cast<int64_t>(call.particles)),
          number_(static_cast<int64_t>(call.number)),
          blocks_(blocks_of(particles_)),
          threads_(threads),
          log_weights_(static_cast<const T*>(call.log_weights) + index * call.particles),
          after_(static_cast<T*>(call.log_weights_after) + index * call.number),
          ancestors_(call.ancestors + index * call.number),
          scale_(weight_scale(call.particles)) {}

    void resample() {
        find_top();
        const bool usable = top_ - top_ == 0.0;
        double log_mean_weight = __builtin_nan(""), ess = log_mean_weight;
        if (usable) {
            sum_weights();
            const double unit = OneWideLane::of_bits(static_cast<int64_t>(1023 - scale_) << 52);
            const double w = static_cast<double>(total_) * unit, v = static_cast<double>(squares_) * unit;
            ess = w * w / v;
            log_mean_weight = top_ + __builtin_log(w / static_cast<double>(particles_));
        }
        call_.log_mean_weight[counter_.row] = log_mean_weight;
        call_.ess[counter_.row] = ess;
        if (number_ == particles_ && !(ess < call_.keep_from)) {
            keep();
            return;
        }
        if (usable) draw();
        const T weight = static_cast<T>(log_mean_weight);
        share_blocks(number_, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) after_[i] = weight;
            if (!usable)
                for (int64_t i = begin; i < end; ++i) ancestors_[i] = 0;
        });
    }

private:
    // f(begin, end) for ranges of [0, count)
    template <class F>
    FG_INLINE void share_blocks(int64_t count, const F& f) {
        share_ranges(static_cast<uint64_t>(blocks_of(count)), kBlockGrain, threads_, [&](uint64_t begin, uint64_t end) {
            f(static_cast<int64_t>(begin) * kBlock, smaller(static_cast<int64_t>(end) * kBlock, count));
        });
    }

    template <class F>
    FG_INLINE void for_each_block(int64_t count, const F& f) {
        share_blocks(count, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin / kBlock; block * kBlock < end; ++block)
                f(block, smaller(kBlock, end - block * kBlock));
        });
    }

    void find_top() {
        for_each_block(particles_, [&](int64_t block, int64_t size) {
            tables_.weights[block] = OneWideLane::bits(largest(log_weights_ + block * kBlock, size));
        });
        top_ = OneWideLane::of_bits(tables_.weights[0]);
        for (int64_t block = 1; block < blocks_; ++block) {
            const double top = OneWideLane::of_bits(tables_.weights[block]);
            if (!(top <= top_) && top_ == top_) top_ = top;
        }
    }

    // The integer weights of a block: in `buffer`, or where the first pass left them.
    FG_INLINE int64_t* weights_of(int64_t block, int64_t size, int64_t* buffer) {
        if (particles_ <= kKept) return kept_ + block * kBlock;
        weigh(buffer, log_weights_ + block * kBlock, size, top_, scale_);
        return buffer;
    }

    void sum_weights() {
        for_each_block(particles_, [&](int64_t block, int64_t size) {
            int64_t buffer[kBlock];
            int64_t* const q = particles_ <= kKept ? kept_ + block * kBlock : buffer;
            const Sums sums = weigh(q, log_weights_ + block * kBlock, size, top_, scale_);
            tables_.weights[block] = sums.weights;
            tables_.squares[block] = sums.squares;
        });
        total_ = sum_before(tables_.weights, blocks_);
        squares_ = sum_before(tables_.squares, blocks_);
        slots_ = slots_of(call_.number, static_cast<uint64_t>(total_));
    }

    void keep() {
        share_blocks(number_, [&](int64_t begin, int64_t end) {
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
            const Words words = counter_.words(U64{});
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
        share_ranges(static_cast<uint64_t>(blocks_), kBlockGrain, threads_, [&](uint64_t begin, uint64_t end) {
            draw_blocks<kScheme>(static_cast<int64_t>(begin), static_cast<int64_t>(end), uniforms);
        });
        if (!call_.sorted) settle();
    }

    int64_t sum_copies() {
        for_each_block(particles_, [&](int64_t block, int64_t size) {
            int64_t buffer[kBlock];
            const int64_t* q = weights_of(block, size, buffer);
            I64 copies{};
            for (int64_t i = 0; i < size; i += kLanes64) {
                const Share<WideLanes> share = floor_share<WideLanes>(load<I64>(q + i), slots_);
                copies += share.whole;
            }
            int64_t sum = 0;
            for (int lane = 0; lane < kLanes64; ++lane) sum += copies[lane];
            tables_.copies[block] = sum;
        });
        return sum_before(tables_.copies, blocks_);
    }

    // Into the output that is written last.
    uint32_t* exponentials() const {
        return call_.sorted ? reinterpret_cast<uint32_t*>(after_) : reinterpret_cast<uint32_t*>(ancestors_);
    }

    void draw_uniforms(int64_t uniforms, double total) {
        for_each_block(uniforms + 1, [&](int64_t block, int64_t) {
            tables_.exponentials[block] = draw_exponentials(exponentials(), counter_, block, uniforms);
        });
        spacing_ = spacing_of(total, sum_before(tables_.exponentials, blocks_of(uniforms + 1)));
    }

    // The bound below which uniforms belong to the blocks before this one.
    template <Scheme kScheme>
    double bound_before(int64_t block) const {
        const int64_t q = tables_.weights[block];
        if constexpr (kScheme == Scheme::multinomial) return static_cast<double>(q);
        return remainder_of<OneWideLane>(floor_share<OneWideLane>(q, slots_), tables_.copies[block],
                                         1.0 / static_cast<double>(total_));
    }

    // Stratum j's position lies floor((j Q + r_j) / N) in.
    FG_INLINE I64 stratified_slots(I64 q) const {
        const Share<WideLanes> share = floor_share<WideLanes>(q, slots_);
        const U64 j = as<U64>(share.whole);
        const Words words = counter_.words(j >> 1);
        const U64 odd = -(j & 1), w0 = words.w0 ^ ((words.w0 ^ words.w2) & odd), w1 = words.w1 ^ ((words.w1 ^ words.w3) & odd);
        const I64 r = uniform_below<WideLanes>(slots_.total, w0, w1);
        return share.whole + WideLanes::one_if(share.rest > r);
    }

    template <Scheme kScheme>
    int64_t slots_before(int64_t block, Uniforms& uniforms) const {
        if (block == blocks_) return number_;
        const int64_t q = tables_.weights[block];
        if constexpr (kScheme == Scheme::systematic) return systematic_slots<OneWideLane>(q, slots_, first_);
        if constexpr (kScheme == Scheme::stratified) return stratified_slots(splat(q))[0];
        const int64_t drawn = uniforms.seek(bound_before<kScheme>(block));
        return kScheme == Scheme::residual ? tables_.copies[block] + drawn : drawn;
    }

    // Ancestors of the slots that belong to the particles of blocks [begin, end).
    template <Scheme kScheme>
    void draw_blocks(int64_t begin, int64_t end, int64_t drawn) {
        constexpr bool kDraws = kScheme == Scheme::multinomial || kScheme == Scheme::residual;
        int64_t buffer[kBlock];
        int32_t slots[kGroup + kBlock];
        int32_t* const ends = slots + kGroup;
        Uniforms uniforms(exponentials(), tables_.exponentials, drawn, spacing_);
        const int64_t limit = slots_before<kScheme>(end, uniforms);
        int64_t filled = slots_before<kScheme>(begin, uniforms);
        for (int64_t block = begin; block < end; ++block) {
            bool empty = filled == limit;
            if constexpr (!kDraws) empty = empty || slots_before<kScheme>(block + 1, uniforms) == filled;
            if constexpr (kScheme == Scheme::multinomial) empty = empty || uniforms.front() >= bound_before<kScheme>(block + 1);
            ends[-1] = static_cast<int32_t>(filled);
            const int64_t size = smaller(kBlock, particles_ - block * kBlock);
            const int64_t padded = (size + kGroup - 1) / kGroup * kGroup;
            if (empty) {
                if (call_.sorted) continue;
                for (int64_t i = 0; i < padded; ++i) ends[i] = ends[-1];
            } else {
                count_slots<kScheme>(ends, weights_of(block, size, buffer), block, size, uniforms);
                for (int64_t i = (size + kLanes64 - 1) / kLanes64 * kLanes64; i < padded; ++i) ends[i] = ends[i - 1];
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

    // ends[k]: the slots of all particles of the row up to this one.
    template <Scheme kScheme>
    FG_INLINE void count_slots(int32_t* ends, const int64_t* q, int64_t block, int64_t size, Uniforms& uniforms) {
        I64 sum = splat(tables_.weights[block]), copies{};
        const double reciprocal = 1.0 / static_cast<double>(total_);
        if constexpr (kScheme == Scheme::residual) copies = splat(tables_.copies[block]);
        for (int64_t i = 0; i < size; i += kLanes64) {
            const I64 weights = load<I64>(q + i), within = prefix_sums(weights), up_to = sum + within;
            sum += last_lane(within);
            I64 slots;
            if constexpr (kScheme == Scheme::systematic) slots = systematic_slots<WideLanes>(up_to, slots_, first_);
            if constexpr (kScheme == Scheme::stratified) slots = stratified_slots(up_to);
            if constexpr (kScheme == Scheme::multinomial) slots = uniforms.below(to_double(up_to));
            if constexpr (kScheme == Scheme::residual) {
                const Share<WideLanes> share = floor_share<WideLanes>(weights, slots_);
                const I64 own = prefix_sums(share.whole) + copies;
                copies = last_lane(own);
                slots = own + uniforms.below(remainder_of(floor_share<WideLanes>(up_to, slots_), own, reciprocal));
            }
            store(ends + i, __builtin_convertvector(slots, HalfI32));
        }
    }

    // Survivors stay in place, and the spares of one block after the other fill the dead slots.
    void settle() {
        sum_before(tables_.spares, blocks_);
        tables_.slots[blocks_] = number_;
        const auto dead_before = [&](int64_t block) {  // as many as there are slots that are not the survivors'
            return smaller(block * kBlock, particles_) - (tables_.slots[block] - tables_.spares[block]);
        };
        const int32_t* const filled = reinterpret_cast<const int32_t*>(after_);
        for_each_block(particles_, [&](int64_t block, int64_t size) {
            int32_t spares[kBlock + kGroup];
            const int64_t rank = dead_before(block), wanted = dead_before(block + 1) - rank;
            int64_t from = 0, above = blocks_;  // the block that has the spare of this rank
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
    const Counter counter_;
    const int64_t particles_, number_, blocks_;
    const int threads_;
    const T* const log_weights_;
    T* const after_;
    int32_t* const ancestors_;
    const int scale_;
    double top_ = 0.0;
    int64_t total_ = 0, squares_ = 0, first_ = 0;  // first_: the uniform below Q of systematic resampling
    Slots slots_{};
    Spacing spacing_{};
    alignas(64) int64_t kept_[kKept];
};

template <class T>
struct Memory {
    explicit Memory(int64_t count) : data(new T[static_cast<std::size_t>(count)]) {}
    ~Memory() { delete[] data; }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    T* const data;
};

template <class T>
void resample_rows(const Resampling& call) {
    const int64_t particles = static_cast<int64_t>(call.particles), number = static_cast<int64_t>(call.number);
    const int64_t size = particles > number ? particles : number;
    if (size > kShort || (size >= kLong && call.rows < 2 * static_cast<uint64_t>(call.threads))) {
        const Memory<int64_t> entries(Tables::entries(particles, number));
        const Memory<uint16_t> groups(call.sorted ? 0 : Tables::groups(particles));
        for (uint64_t row = 0; row < call.rows; ++row)
            Row<T>(call, row, Tables(entries.data, groups.data, particles), call.threads).resample();
        return;
    }
    const uint64_t grain = kBlockGrain * kBlock / static_cast<uint64_t>(size);
    share_out(call.rows, grain > 0 ? grain : 1, call.threads, [&](uint64_t row) {
        int64_t entries[6 * (kShort / kBlock + 2)];
        uint16_t groups[kShort / kGroup];
        Row<T>(call, row, Tables(entries, groups, particles), 1).resample();
    });
}

}  // namespace

int64_t resample(const Resampling& call) {
    if (call.rows == 0) return -1;
    if (call.dtype == Dtype::float64) resample_rows<double>(call);
    else resample_rows<float>(call);
    for (uint64_t row = 0; row < call.rows; ++row)
        if (call.ess[row] != call.ess[row]) return static_cast<int64_t>(row);
    return -1;
}

}  // namespace fastguide::cpu::FG_ISA

// Resampling. Rows of up to 4096 particles and slots (2048 in residual resampling) take one launch, with one block for
// each row. Longer rows are cut into tiles, with one block for each tile. They take a fixed sequence of launches: the
// largest log-weight, the sums of the integer weights, the slots before each tile, and the ancestors. Every decision
// that depends on values is made on the device.
//
// Each pass computes the integer weights again, as in cpu.cpp. It reads 4 bytes a particle; otherwise 8 bytes would be
// written and read. Prefix sums are sums of integers, so no result depends on how a row is cut.
//
// Another stream may write to the log-weights meanwhile, and to a seed on the device. A short row reads its log-weights
// once. A long row reads its counter once. If the weights of a tile no longer have the sum in the tables, the tile's first
// particle takes all its slots.
#include "../../common/binding.h"

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include <cmath>

#include "../../common/log.h"
#include "../../common/weights.h"
#include "../../cuda/check.cuh"
#include "../../cuda/counter.cuh"

namespace fastguide::cuda {
namespace resampling {

// Log-weights are float64 if `doubles`, else float32.
struct Resampling : fastguide::Resampling {
    const void* log_weights;
    bool doubles;
    CounterOnDevice counter;
};

constexpr int kItems = 8;      // consecutive particles or slots of a thread
constexpr int kThreads = 256;  // threads of a tile's block
constexpr int64_t kTile = kThreads * kItems;
constexpr int64_t kMany = 8 * kTile;  // slots that a tile's own block fills at most; other blocks fill the rest
constexpr int kAbreast = 4;           // tiles that a block of find_tops reads, so that their loads overlap
constexpr int kFewThreads = 128;      // threads of the block for the shortest rows
constexpr int kScanThreads = 1024, kScanItems = 4, kSearchThreads = 256;

// Threads of the block for the other short rows. With 512, residual resampling would spill registers.
FG_HD constexpr int short_threads(Scheme scheme) { return scheme == Scheme::residual ? 256 : 512; }

enum class Verdict : int { draw, keep, zero };  // zero: all ancestors are 0

// What is known about a row once its weights are summed.
struct Row {
    double top, log_mean_weight;
    uint64_t seed;
    uint32_t step;
    double reciprocal;  // 1 / the sum of the weights
    Slots slots;
    int64_t first;     // systematic resampling: the uniform integer below the sum
    int64_t uniforms;  // multinomial and residual resampling: how many sorted uniforms
    Spacing spacing;
    Verdict verdict;
};

FG_HD int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

// A call, and its workspace. Tables have an entry for each tile of a row and one more. A pass first writes the sum over
// each tile. These then become the sums over all tiles before.
struct Job {
    Resampling call;
    int scale;
    int64_t particles, number, tiles, slot_tiles;  // slot_tiles: the tiles of number + 1 exponentials
    uint64_t bytes = 0;
    uint64_t* tops = nullptr;  // [rows + 1]: keys of the largest; last, whether any tile has more than kMany slots
    Row* rows = nullptr;
    uint64_t *weights = nullptr, *squares = nullptr, *copies = nullptr, *slots = nullptr, *spares = nullptr;
    uint64_t* exponentials = nullptr;
    double* uniforms = nullptr;  // [rows, number]
    int32_t* spare = nullptr;    // [rows, number]: the particles of a tile's spares, from the tile's first slot on
    uint8_t* alive = nullptr;    // [rows, tiles + 1, kThreads]: a bit for each particle

    Job(const Resampling& of, void* memory)
        : call(of),
          scale(weight_scale(of.particles)),
          particles(static_cast<int64_t>(of.particles)),
          number(static_cast<int64_t>(of.number)),
          tiles(tiles_of(particles)),
          slot_tiles(tiles_of(number + 1)) {
        if (is_short()) return;
        const uint64_t entries = of.rows * static_cast<uint64_t>(tiles + 1);
        take(memory, tops, of.rows + 1);
        take(memory, rows, of.rows);
        for (uint64_t** table : {&weights, &squares, &slots}) take(memory, *table, entries);
        if (of.scheme == Scheme::residual) take(memory, copies, entries);
        if (draws_uniforms()) {
            take(memory, exponentials, of.rows * static_cast<uint64_t>(slot_tiles + 1));
            take(memory, uniforms, of.rows * of.number);
        }
        if (!of.sorted) {
            take(memory, spares, entries);
            take(memory, spare, of.rows * of.number);
            take(memory, alive, entries * kThreads);
        }
    }

    bool is_short() const { return most() <= short_threads(call.scheme) * kItems; }
    int64_t most() const { return particles > number ? particles : number; }
    bool draws_uniforms() const { return call.scheme == Scheme::multinomial || call.scheme == Scheme::residual; }

private:
    template <class T>
    void take(void* memory, T*& place, uint64_t count) {
        place = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + bytes);
        bytes += (count * sizeof(T) + 255) / 256 * 256;
    }
};

// --- memory -------------------------------------------------------------------------------------------------

template <class T>
struct alignas(16) Line {
    T items[kItems];
};

template <class T>
__device__ __forceinline__ bool is_whole_line(const T* items, int64_t left) {
    return left >= kItems && reinterpret_cast<uintptr_t>(items) % alignof(Line<T>) == 0;
}

// Loads items[first...]; items from `count` on are -infinity.
template <class T>
__device__ __forceinline__ void load_items(double (&to)[kItems], const T* items, int64_t first, int64_t count) {
    Line<T> line;
    if (is_whole_line(items + first, count - first)) {
        line = *reinterpret_cast<const Line<T>*>(items + first);
    } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i)
            line.items[i] = first + i < count ? items[first + i] : -static_cast<T>(INFINITY);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = static_cast<double>(line.items[i]);
}

template <class T, class From>
__device__ __forceinline__ void store_items(T* items, int64_t first, int64_t count, const From (&from)[kItems]) {
    Line<T> line;
#pragma unroll
    for (int i = 0; i < kItems; ++i) line.items[i] = static_cast<T>(from[i]);
    if (is_whole_line(items + first, count - first)) {
        *reinterpret_cast<Line<T>*>(items + first) = line;
    } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i)
            if (first + i < count) items[first + i] = line.items[i];
    }
}

__device__ __forceinline__ void load_log_weights(double (&to)[kItems], const Job& job, int64_t row, int64_t first) {
    const int64_t start = row * job.particles;
    const void* const from = job.call.log_weights;
    if (job.call.doubles) load_items(to, static_cast<const double*>(from) + start, first, job.particles);
    else load_items(to, static_cast<const float*>(from) + start, first, job.particles);
}

// Stores ancestors and log-weights of the slots from `first` on.
__device__ __forceinline__ void store_slots(const Job& job, int64_t row, int64_t first,
                                            const int32_t (&ancestors)[kItems], const double (&after)[kItems]) {
    const int64_t start = row * job.number;
    void* const to = job.call.log_weights_after;
    store_items(job.call.ancestors + start, first, job.number, ancestors);
    if (job.call.doubles) store_items(static_cast<double*>(to) + start, first, job.number, after);
    else store_items(static_cast<float*>(to) + start, first, job.number, after);
}

// The block's threads store `count` slots from `first` on. The ancestor of the k-th is ancestor(k).
template <class Ancestor>
__device__ __forceinline__ void store_slots(const Job& job, int64_t row, int64_t first, int64_t count, double after,
                                            const Ancestor& ancestor) {
    const int64_t start = row * job.number + first;
    const uint32_t slots = static_cast<uint32_t>(count);
    int32_t* const ancestors = job.call.ancestors + start;
    for (uint32_t k = threadIdx.x; k < slots; k += blockDim.x) ancestors[k] = ancestor(k);
    if (job.call.doubles) {
        double* const to = static_cast<double*>(job.call.log_weights_after) + start;
        for (uint32_t k = threadIdx.x; k < slots; k += blockDim.x) to[k] = after;
    } else {
        float* const to = static_cast<float*>(job.call.log_weights_after) + start;
        for (uint32_t k = threadIdx.x; k < slots; k += blockDim.x) to[k] = static_cast<float>(after);
    }
}

__device__ __forceinline__ void keep_items(const Job& job, int64_t row, int64_t first) {
    double log_weights[kItems];
    int32_t ancestors[kItems];
    load_log_weights(log_weights, job, row, first);
#pragma unroll
    for (int i = 0; i < kItems; ++i) ancestors[i] = static_cast<int32_t>(first + i);
    store_slots(job, row, first, ancestors, log_weights);
}

// --- results of a whole block -------------------------------------------------------------------------------

template <int kBlock>
using SumScan = cub::BlockScan<uint64_t, kBlock, cub::BLOCK_SCAN_WARP_SCANS>;
template <int kBlock>
using MaxScan = cub::BlockScan<int32_t, kBlock, cub::BLOCK_SCAN_WARP_SCANS>;
template <int kBlock>
using Reduce = cub::BlockReduce<uint64_t, kBlock>;

template <int kBlock>
union Storage {
    typename SumScan<kBlock>::TempStorage sum;
    typename MaxScan<kBlock>::TempStorage max;
    typename Reduce<kBlock>::TempStorage reduce;
    int32_t last[kBlock];
};

// Returns the sum over the threads before this one; `total` is the sum over all.
template <int kBlock>
__device__ __forceinline__ uint64_t sum_before(Storage<kBlock>& storage, uint64_t value, uint64_t& total) {
    uint64_t before;
    __syncthreads();  // the storage may still be in use
    SumScan<kBlock>(storage.sum).ExclusiveSum(value, before, total);
    return before;
}

// The largest value of the threads before this one, or 1 if that is larger. Must follow a barrier.
template <int kBlock>
__device__ __forceinline__ int32_t largest_before(Storage<kBlock>& storage, int32_t value) {
    int32_t before;
    MaxScan<kBlock>(storage.max).ExclusiveScan(value, before, 1, [](int32_t a, int32_t b) { return a > b ? a : b; });
    return before;
}

// The next two functions return their result in the first thread only.
template <int kBlock>
__device__ __forceinline__ uint64_t largest_of_all(Storage<kBlock>& storage, uint64_t value) {
    __syncthreads();
    return Reduce<kBlock>(storage.reduce).Reduce(value, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}
template <int kBlock>
__device__ __forceinline__ uint64_t sum_of_all(Storage<kBlock>& storage, uint64_t value) {
    __syncthreads();
    return Reduce<kBlock>(storage.reduce).Sum(value);
}

// The first i in [low, high) for which before(i) is false, or `high`, which is below 2^31. The search starts near `low`.
template <class Before>
__device__ __forceinline__ uint32_t first_not(uint32_t low, uint32_t high, const Before& before) {
    uint32_t stride = 1;
    for (; low + stride <= high && before(low + stride - 1); stride *= 2) low += stride;
    if (low + stride <= high) high = low + stride - 1;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (before(middle)) low = middle + 1;
        else high = middle;
    }
    return low;
}

// --- weights ------------------------------------------------------------------------------------------------

// Keys have the order of the numbers. The key of NaN is above all, and key 0 is below all.
__device__ __forceinline__ uint64_t key_of(double v) {
    const uint64_t bits = static_cast<uint64_t>(OneWideLane::bits(v)), sign = uint64_t{1} << 63;
    return v != v ? ~uint64_t{0} : bits & sign ? ~bits : bits | sign;
}

__device__ __forceinline__ double number_of(uint64_t key) {
    const uint64_t sign = uint64_t{1} << 63;
    return OneWideLane::of_bits(static_cast<int64_t>(key & sign ? key ^ sign : ~key));
}

struct Sums {
    uint64_t weights, squares;
};

// Computes integer weights, and returns this thread's sums. If an earlier kernel found the largest log-weight (`kEarlier`),
// it may have changed since. So all weights become 0 if one is negative, or twice the largest possible weight or more.
template <bool kEarlier = true>
__device__ __forceinline__ Sums weigh(int64_t (&q)[kItems], const double (&log_weights)[kItems], double top,
                                      int scale) {
    Sums sums{};
    uint64_t bits = 0;  // the bitwise OR of the weights
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const auto x = exponential<OneWideLane>(log_weights[i] - top);
        q[i] = integer_weight<OneWideLane>(x, scale);
        bits |= static_cast<uint64_t>(q[i]);
        sums.weights += static_cast<uint64_t>(q[i]);
        sums.squares += static_cast<uint64_t>(integer_square<OneWideLane>(x, scale));
    }
    if constexpr (kEarlier) {
        if (bits >> (scale + 1) != 0) {
#pragma unroll
            for (int i = 0; i < kItems; ++i) q[i] = 0;
            return {};
        }
    }
    return sums;
}

// The whole copies that residual resampling makes of each particle. Returns their sum.
__device__ __forceinline__ uint64_t copy_whole(uint32_t (&copies)[kItems], const int64_t (&q)[kItems],
                                               const Slots& slots) {
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        copies[i] = static_cast<uint32_t>(floor_share<OneWideLane>(q[i], slots).whole);
        sum += copies[i];
    }
    return sum;
}

// --- random numbers -----------------------------------------------------------------------------------------

// The Philox words that a row draws.
struct RandomWords {
    uint64_t row, seed;
    uint32_t step, stream;

    __device__ RandomWords(const Resampling& call, int64_t of)
        : row(call.first_row + static_cast<uint64_t>(of)), stream(call.stream) {
        const Resampling now = with_counter(call, call.counter);
        seed = now.seed;
        step = now.step;
    }
    // With the seed and the step that `judge` read.
    __device__ RandomWords(const Resampling& call, int64_t of, const Row& known)
        : row(call.first_row + static_cast<uint64_t>(of)), seed(known.seed), step(known.step), stream(call.stream) {}

    __device__ __forceinline__ Words4 words(int64_t group) const {
        return philox(philox_counter(row, static_cast<uint32_t>(group), stream, step), static_cast<uint32_t>(seed),
                      static_cast<uint32_t>(seed >> 32));
    }
};

// The exponentials from `first` on of a row that has uniforms + 1 of them, then 0. Returns their sum.
__device__ __forceinline__ uint64_t draw_exponentials(uint32_t (&to)[kItems], const RandomWords& random, int64_t first,
                                                      int64_t uniforms) {
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; i += 4) {
        const Words4 w = random.words((first + i) / 4);
        const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint64_t drawn = integer_exponential<OneWideLane>(words[j]);
            to[i + j] = first + i + j <= uniforms ? static_cast<uint32_t>(drawn) : 0;
            sum += to[i + j];
        }
    }
    return sum;
}

// For uniforms below their number, or in multinomial resampling below the sum of the weights.
__device__ __forceinline__ Spacing spacing_of(const Row& row, Scheme scheme, int64_t uniforms, uint64_t exponentials) {
    const uint64_t bound = scheme == Scheme::residual ? static_cast<uint64_t>(uniforms) : row.slots.total;
    return fastguide::spacing_of(static_cast<double>(bound), static_cast<int64_t>(exponentials));
}

// --- a row --------------------------------------------------------------------------------------------------

// Decides what is done with a row. Writes its mean weight and effective sample size.
__device__ __forceinline__ Row judge(const Job& job, int64_t index, double top, uint64_t total, uint64_t squares) {
    const Resampling& call = job.call;
    const bool usable = top - top == 0.0 && total > 0;
    double ess = OneWideLane::of_bits(0x7FF8000000000000), log_mean_weight = ess;
    if (usable) {
        const double unit = OneWideLane::of_bits(static_cast<int64_t>(1023 - job.scale) << 52);
        const double w = static_cast<double>(total) * unit, v = static_cast<double>(squares) * unit;
        ess = w * w / v;
        log_mean_weight = top + log_of_normal<OneWideLane>(w / static_cast<double>(call.particles));
    }
    call.log_mean_weight[index] = log_mean_weight;
    call.ess[index] = ess;

    const RandomWords random(call, index);
    Row row{};
    row.seed = random.seed;
    row.step = random.step;
    row.top = top;
    row.log_mean_weight = log_mean_weight;
    row.verdict = usable ? Verdict::draw : Verdict::zero;
    if (call.number == call.particles && !(ess < call.keep_from)) row.verdict = Verdict::keep;
    row.reciprocal = 1.0 / static_cast<double>(total);
    row.slots = slots_of(call.number, total);
    const Words4 words = random.words(0);
    row.first = uniform_below<OneWideLane>(total, words.w0, words.w1);
    row.uniforms = job.number;
    return row;
}

// Sorted uniforms. Those before `next` are below the next bound, and those from `end` on are not.
struct Uniforms {
    const double* values;
    uint32_t next, end;
};

// The number of slots of all particles up to one. `q` and `copies` are the sums of their weights and whole copies.
template <Scheme kScheme>
__device__ __forceinline__ uint32_t slots_up_to(const Row& row, const RandomWords& random, int64_t q, uint32_t copies,
                                                Uniforms& uniforms) {
    if constexpr (kScheme == Scheme::systematic)
        return static_cast<uint32_t>(systematic_slots<OneWideLane>(q, row.slots, row.first));
    const Share<OneWideLane> share = floor_share<OneWideLane>(q, row.slots);
    if constexpr (kScheme == Scheme::stratified) {  // stratum j's position is floor((j Q + r_j) / N)
        const Words4 w = random.words(share.whole / 2);
        const bool odd = share.whole % 2 != 0;
        const uint64_t low = odd ? w.w2 : w.w0, high = odd ? w.w3 : w.w1;
        const bool more = share.rest > uniform_below<OneWideLane>(row.slots.total, low, high);
        return static_cast<uint32_t>(share.whole) + more;
    }
    const double bound = kScheme == Scheme::residual ? remainder_of<OneWideLane>(share, copies, row.reciprocal)
                                                     : static_cast<double>(q);
    const double* const values = uniforms.values;
    uniforms.next = first_not(uniforms.next, uniforms.end, [=](uint32_t i) { return values[i] < bound; });
    return copies + uniforms.next;
}

// ends[i]: the number of slots of all particles up to this thread's i-th. `start`: those of all particles before this
// thread's.
struct Ends {
    int32_t start;
    int32_t ends[kItems];
};

// Computes Ends from the weights, the whole copies, and the sums of both before this thread. `from`: the slots before the
// block.
template <Scheme kScheme, int kBlock>
__device__ __forceinline__ Ends count_slots(Storage<kBlock>& storage, const Row& row, const RandomWords& random,
                                            const int64_t (&q)[kItems], uint64_t weight,
                                            const uint32_t (&copies)[kItems], uint32_t copied, Uniforms& uniforms,
                                            uint32_t from) {
    Ends found;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        weight += static_cast<uint64_t>(q[i]);
        copied += copies[i];
        const auto up_to = static_cast<int64_t>(weight);
        found.ends[i] = static_cast<int32_t>(slots_up_to<kScheme>(row, random, up_to, copied, uniforms));
    }
    __syncthreads();
    storage.last[threadIdx.x] = found.ends[kItems - 1];
    __syncthreads();
    found.start = threadIdx.x == 0 ? static_cast<int32_t>(from) : storage.last[threadIdx.x - 1];
    return found;
}

// Removes one slot, the survivor's own, from each particle that has any. What is left are the spares. Returns the
// survivors: bit i is this thread's i-th particle. `total` is the number of survivors in the block.
template <int kBlock>
__device__ __forceinline__ unsigned leave_spares(Storage<kBlock>& storage, Ends& slots, uint64_t& total) {
    unsigned alive = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) alive |= (slots.ends[i] > (i ? slots.ends[i - 1] : slots.start) ? 1u : 0u) << i;
    int32_t taken = static_cast<int32_t>(sum_before<kBlock>(storage, static_cast<uint64_t>(__popc(alive)), total));
    slots.start -= taken;
#pragma unroll
    for (int i = 0; i < kItems; ++i) slots.ends[i] -= taken += static_cast<int32_t>(alive >> i & 1u);
    return alive;
}

// owners[j]: the particle that has slot `from` + j, counted from 1 within the block. `owners` has as many entries as the
// block has particles. Slots before the first one that a particle has are given to the first particle.
template <int kBlock>
__device__ __forceinline__ void fill_owners(Storage<kBlock>& storage, uint16_t* owners, const Ends& slots,
                                            uint32_t from) {
    constexpr int32_t kSlots = kBlock * kItems;
    const int32_t mine = static_cast<int32_t>(threadIdx.x) * kItems, begin = static_cast<int32_t>(from);
    auto* const line = reinterpret_cast<Line<uint16_t>*>(owners + mine);
    __syncthreads();  // `owners` may still be in use
    *line = Line<uint16_t>{};
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const int32_t start = i ? slots.ends[i - 1] : slots.start, end = slots.ends[i];
        if (start < end && begin < end && start - begin < kSlots)
            owners[start > begin ? start - begin : 0] = static_cast<uint16_t>(mine + i + 1);
    }
    __syncthreads();
    Line<uint16_t> own = *line;  // the owner of a particle's first slot, else 0
#pragma unroll
    for (int i = 1; i < kItems; ++i) own.items[i] = own.items[i] > own.items[i - 1] ? own.items[i] : own.items[i - 1];
    const auto before = static_cast<uint16_t>(largest_before<kBlock>(storage, own.items[kItems - 1]));
#pragma unroll
    for (int i = 0; i < kItems; ++i) own.items[i] = own.items[i] > before ? own.items[i] : before;
    *line = own;
    __syncthreads();
}

// --- short rows ---------------------------------------------------------------------------------------------

template <int kBlock, Scheme kScheme>
__global__ void __launch_bounds__(kBlock, 1) resample_short(const Job job) {
    constexpr bool kDraws = kScheme == Scheme::multinomial || kScheme == Scheme::residual;
    constexpr int64_t kSlots = kBlock * kItems;
    __shared__ Storage<kBlock> storage;
    __shared__ Row shared_row;
    __shared__ double top;
    __shared__ union {
        Line<uint16_t> owners[kBlock];
        double uniforms[kDraws ? kSlots : 1];
    } slots;
    const int64_t index = blockIdx.x, first = static_cast<int64_t>(threadIdx.x) * kItems;

    double log_weights[kItems];
    load_log_weights(log_weights, job, index, first);
    uint64_t key = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) key = key_of(log_weights[i]) > key ? key_of(log_weights[i]) : key;
    key = largest_of_all<kBlock>(storage, key);
    if (threadIdx.x == 0) top = number_of(key);
    __syncthreads();

    int64_t q[kItems];
    uint64_t total;
    const Sums sums = weigh<false>(q, log_weights, top, job.scale);
    const uint64_t weight = sum_before<kBlock>(storage, sums.weights, total);
    const uint64_t squares = sum_of_all<kBlock>(storage, sums.squares);
    if (threadIdx.x == 0) shared_row = judge(job, index, top, total, squares);
    __syncthreads();
    const Row& row = shared_row;
    if (row.verdict == Verdict::keep) return keep_items(job, index, first);
    if (row.verdict == Verdict::zero)
        return store_slots(job, index, 0, job.number, row.log_mean_weight, [](uint32_t) { return 0; });

    const RandomWords random(job.call, index);
    uint32_t copies[kItems] = {};
    uint32_t copied = 0;
    Uniforms uniforms{slots.uniforms, 0, static_cast<uint32_t>(job.number)};
    if constexpr (kScheme == Scheme::residual) {
        const uint64_t own = copy_whole(copies, q, row.slots);
        copied = static_cast<uint32_t>(sum_before<kBlock>(storage, own, total));
        uniforms.end -= static_cast<uint32_t>(total);
    }
    if constexpr (kDraws) {
        uint32_t exponentials[kItems];
        const uint64_t own = draw_exponentials(exponentials, random, first, uniforms.end);
        uint64_t sum = sum_before<kBlock>(storage, own, total);
        if (uniforms.end == kSlots) total += integer_exponential<OneWideLane>(random.words(kSlots / 4).w0);
        const Spacing spacing = spacing_of(row, kScheme, uniforms.end, total);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            sum += exponentials[i];
            slots.uniforms[first + i] = sorted_uniform<OneWideLane>(static_cast<int64_t>(sum), spacing);
        }
        __syncthreads();
    }
    Ends ends = count_slots<kScheme, kBlock>(storage, row, random, q, weight, copies, copied, uniforms, 0);
    uint16_t* const owners = slots.owners->items;
    if (job.call.sorted) {
        fill_owners<kBlock>(storage, owners, ends, 0);
        return store_slots(job, index, 0, job.number, row.log_mean_weight, [=](uint32_t k) { return owners[k] - 1; });
    }
    const unsigned alive = leave_spares<kBlock>(storage, ends, total);
    fill_owners<kBlock>(storage, owners, ends, 0);
    const uint64_t alive_before = sum_before<kBlock>(storage, static_cast<uint64_t>(__popc(alive)), total);
    int64_t rank = first - static_cast<int64_t>(alive_before);  // how many dead particles are before this thread's
    int32_t ancestors[kItems];
    double after[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const bool lives = (alive >> i & 1u) || first + i >= job.number;
        ancestors[i] = static_cast<int32_t>(lives ? first + i : owners[rank] - 1);
        after[i] = row.log_mean_weight;
        rank += !lives;
    }
    store_slots(job, index, first, ancestors, after);
}

// --- long rows ----------------------------------------------------------------------------------------------

struct Place {
    int64_t row, tile, first;  // first: this thread's first particle or slot

    __device__ Place(unsigned block, int64_t tiles)
        : row(block / static_cast<unsigned>(tiles)),
          tile(block % static_cast<unsigned>(tiles)),
          first(tile * kTile + threadIdx.x * kItems) {}
};

__global__ void __launch_bounds__(kThreads) find_tops(const Job job) {
    __shared__ Storage<kThreads> storage;
    const Place at(blockIdx.x, (job.tiles + kAbreast - 1) / kAbreast);
    double tops[kAbreast];
#pragma unroll
    for (int j = 0; j < kAbreast; ++j) {
        double log_weights[kItems];
        load_log_weights(log_weights, job, at.row, (at.tile * kAbreast + j) * kTile + threadIdx.x * kItems);
        tops[j] = log_weights[0];
#pragma unroll
        for (int i = 1; i < kItems; ++i)
            tops[j] = log_weights[i] > tops[j] || log_weights[i] != log_weights[i] ? log_weights[i] : tops[j];
    }
    uint64_t key = 0;
#pragma unroll
    for (int j = 0; j < kAbreast; ++j) key = key_of(tops[j]) > key ? key_of(tops[j]) : key;
    key = largest_of_all<kThreads>(storage, key);
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<unsigned long long*>(job.tops + at.row), key);
}

// From the last tile to the first, because what the previous pass read last may still be in the cache.
__global__ void __launch_bounds__(kThreads) sum_weights(const Job job) {
    __shared__ Storage<kThreads> storage;
    const Place at(gridDim.x - 1 - blockIdx.x, job.tiles);
    const double top = number_of(job.tops[at.row]);
    double log_weights[kItems];
    int64_t q[kItems];
    load_log_weights(log_weights, job, at.row, at.first);
    const Sums sums = weigh(q, log_weights, top, job.scale);
    const uint64_t weight = sum_of_all<kThreads>(storage, sums.weights);
    const uint64_t square = sum_of_all<kThreads>(storage, sums.squares);
    if (threadIdx.x == 0) {
        const int64_t left = job.particles - at.tile * kTile, entry = at.row * (job.tiles + 1) + at.tile;
        const bool in_range = weight <= static_cast<uint64_t>(left < kTile ? left : kTile) << job.scale;
        job.weights[entry] = in_range ? weight : 0;
        job.squares[entry] = in_range ? square : 0;
    }
}

__global__ void __launch_bounds__(kThreads) sum_copies(const Job job) {
    __shared__ Storage<kThreads> storage;
    const Place at(blockIdx.x, job.tiles);
    const Row& row = job.rows[at.row];
    if (row.verdict != Verdict::draw) return;
    double log_weights[kItems];
    int64_t q[kItems];
    load_log_weights(log_weights, job, at.row, at.first);
    weigh(q, log_weights, row.top, job.scale);
    uint32_t copies[kItems];
    const uint64_t total = sum_of_all<kThreads>(storage, copy_whole(copies, q, row.slots));
    if (threadIdx.x != 0) return;
    const int64_t entry = at.row * (job.tiles + 1) + at.tile;
    const auto weight = static_cast<int64_t>(job.weights[entry + 1] - job.weights[entry]);
    const auto most = static_cast<uint64_t>(floor_share<OneWideLane>(weight, row.slots).whole);
    job.copies[entry] = total < most ? total : most;
}

__global__ void __launch_bounds__(kThreads) sum_exponentials(const Job job) {
    __shared__ Storage<kThreads> storage;
    const Place at(blockIdx.x, job.slot_tiles);
    const Row& row = job.rows[at.row];
    if (row.verdict != Verdict::draw) return;
    uint32_t drawn[kItems];
    const uint64_t own = draw_exponentials(drawn, RandomWords(job.call, at.row, row), at.first, row.uniforms);
    const uint64_t sum = sum_of_all<kThreads>(storage, own);
    if (threadIdx.x == 0) job.exponentials[at.row * (job.slot_tiles + 1) + at.tile] = sum;
}

enum class Table : int { weights, copies, exponentials, spares };

// Turns one table from sums over tiles into sums before each tile, and computes what depends on the total. One block for
// each row.
__global__ void __launch_bounds__(kScanThreads) scan_tiles(const Job job, Table which) {
    __shared__ Storage<kScanThreads> storage;
    const int64_t index = blockIdx.x;
    Row& row = job.rows[index];
    if (which != Table::weights && row.verdict != Verdict::draw) return;
    const int64_t tiles = which == Table::exponentials ? job.slot_tiles : job.tiles;
    uint64_t* const table = index * (tiles + 1) + (which == Table::weights        ? job.weights
                                                   : which == Table::copies       ? job.copies
                                                   : which == Table::exponentials ? job.exponentials
                                                                                  : job.spares);
    const uint64_t* const other = job.squares + index * (tiles + 1);

    uint64_t total = 0, squares = 0;
    for (int64_t from = 0; from < tiles; from += kScanThreads * kScanItems) {  // neighbours read neighbouring tiles
        const int64_t first = from + threadIdx.x * kScanItems;
        uint64_t own[kScanItems], sum = 0, sum_of_some;
#pragma unroll
        for (int i = 0; i < kScanItems; ++i) {
            own[i] = first + i < tiles ? table[first + i] : 0;
            sum += own[i];
            if (which == Table::weights && first + i < tiles) squares += other[first + i];
        }
        sum = total + sum_before<kScanThreads>(storage, sum, sum_of_some);
#pragma unroll
        for (int i = 0; i < kScanItems; ++i) {
            if (first + i < tiles) table[first + i] = sum;
            sum += own[i];
        }
        total += sum_of_some;
    }
    if (which == Table::weights) squares = sum_of_all<kScanThreads>(storage, squares);
    if (threadIdx.x != 0) return;
    table[tiles] = total;
    if (which == Table::weights) row = judge(job, index, number_of(job.tops[index]), total, squares);
    if (which == Table::copies) row.uniforms = job.number - static_cast<int64_t>(total);
    if (which == Table::exponentials) row.spacing = spacing_of(row, job.call.scheme, row.uniforms, total);
}

__global__ void __launch_bounds__(kThreads) draw_uniforms(const Job job) {
    __shared__ Storage<kThreads> storage;
    const Place at(blockIdx.x, job.slot_tiles);
    const Row& row = job.rows[at.row];
    if (row.verdict != Verdict::draw || at.tile * kTile >= row.uniforms) return;
    uint32_t drawn[kItems];
    uint64_t total;
    const uint64_t own = draw_exponentials(drawn, RandomWords(job.call, at.row, row), at.first, row.uniforms);
    uint64_t sum = sum_before<kThreads>(storage, own, total);
    sum += job.exponentials[at.row * (job.slot_tiles + 1) + at.tile];
    double uniforms[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        sum += drawn[i];
        uniforms[i] = sorted_uniform<OneWideLane>(static_cast<int64_t>(sum), row.spacing);
    }
    store_items(job.uniforms + at.row * job.number, at.first, row.uniforms, uniforms);
}

// The number of slots before each tile, with one thread for each tile.
template <Scheme kScheme>
__global__ void __launch_bounds__(kSearchThreads) find_slots(const Job job) {
    const int64_t entry = static_cast<int64_t>(blockIdx.x) * kSearchThreads + threadIdx.x;
    const int64_t index = entry / (job.tiles + 1);
    if (index >= static_cast<int64_t>(job.call.rows)) return;
    const Row& row = job.rows[index];
    if (row.verdict != Verdict::draw) return;
    const RandomWords random(job.call, index, row);
    const uint32_t copies = kScheme == Scheme::residual ? static_cast<uint32_t>(job.copies[entry]) : 0;
    Uniforms uniforms{job.uniforms + index * job.number, 0, static_cast<uint32_t>(row.uniforms)};
    const int64_t weight = static_cast<int64_t>(job.weights[entry]);
    job.slots[entry] = slots_up_to<kScheme>(row, random, weight, copies, uniforms);
}

// Writes the ancestors, or the list of spares if they are not sorted. Without `rest`, a block takes a tile of particles and
// fills the first kMany of its slots. With `rest`, a block takes a stretch of kMany slots and the tile that has the first
// slot of the stretch. It fills the slots of that tile in the stretch, except the tile's first kMany. A tile that starts
// later in the stretch has only some of its first kMany slots here.
template <Scheme kScheme>
__global__ void __launch_bounds__(kThreads, kScheme == Scheme::systematic ? 3 : 1)
    fill_slots(const Job job, bool rest) {
    __shared__ Storage<kThreads> storage;
    __shared__ Line<uint16_t> owners[kThreads];
    constexpr uint32_t many = kMany;
    Place at(blockIdx.x, rest ? (job.number + kMany - 1) / kMany : job.tiles);
    const Row& row = job.rows[at.row];
    const bool sorted = job.call.sorted;
    if (rest && (job.tops[job.call.rows] == 0 || row.verdict != Verdict::draw)) return;
    if (row.verdict == Verdict::keep) {
        if (sorted) keep_items(job, at.row, at.first);
        return;
    }
    if (row.verdict == Verdict::zero) {
        const int64_t from = at.tile * job.number / job.tiles, to = (at.tile + 1) * job.number / job.tiles;
        return store_slots(job, at.row, from, to - from, row.log_mean_weight, [](uint32_t) { return 0; });
    }

    const uint64_t* const slots = job.slots + at.row * (job.tiles + 1);
    const uint32_t begin = static_cast<uint32_t>(at.tile) * many;  // the start of the stretch
    if (rest) {
        const uint32_t tiles = static_cast<uint32_t>(job.tiles);
        at.tile = first_not(0, tiles, [=](uint32_t i) { return slots[i] <= begin; }) - 1;
    }
    const uint32_t all_from = static_cast<uint32_t>(slots[at.tile]);
    const uint32_t all_to = static_cast<uint32_t>(slots[at.tile + 1]);
    uint32_t from = all_from, to = all_to;
    if (rest) {
        if (begin - from < many) from += many;
        else from = begin;
        if (from >= to) return;
        if (to - begin > many) to = begin + many;
    } else if (to - from > many) {
        if (threadIdx.x == 0) job.tops[job.call.rows] = 1;
        to = from + many;
    } else if (sorted && to == from) {
        return;
    }

    const int64_t entry = at.row * (job.tiles + 1) + at.tile;
    double log_weights[kItems];
    int64_t q[kItems];
    load_log_weights(log_weights, job, at.row, at.tile * kTile + threadIdx.x * kItems);
    uint32_t copies[kItems] = {};
    uint32_t copied = 0;
    uint64_t total;
    const uint64_t own = weigh(q, log_weights, row.top, job.scale).weights;
    const uint64_t weight = job.weights[entry] + sum_before<kThreads>(storage, own, total);
    bool same = total == job.weights[entry + 1] - job.weights[entry];  // false if the weights changed after the tables
    Uniforms uniforms{job.uniforms + at.row * job.number, all_from, all_to};
    if constexpr (kScheme == Scheme::residual) {
        const uint64_t before = sum_before<kThreads>(storage, copy_whole(copies, q, row.slots), total);
        same = same && total == job.copies[entry + 1] - job.copies[entry];
        copied = static_cast<uint32_t>(job.copies[entry] + before);
        uniforms.next -= static_cast<uint32_t>(job.copies[entry]);
        uniforms.end -= static_cast<uint32_t>(job.copies[entry + 1]);
    }
    const RandomWords random(job.call, at.row, row);
    Ends ends;
    if (same) {
        ends = count_slots<kScheme, kThreads>(storage, row, random, q, weight, copies, copied, uniforms, all_from);
    } else {
        ends.start = static_cast<int32_t>(threadIdx.x == 0 ? all_from : all_to);
#pragma unroll
        for (int i = 0; i < kItems; ++i) ends.ends[i] = static_cast<int32_t>(all_to);
    }
    if (!sorted) {
        const unsigned alive = leave_spares<kThreads>(storage, ends, total);
        uint32_t spares = all_to - all_from - static_cast<uint32_t>(total);
        if (rest) spares = static_cast<uint32_t>(job.spares[entry]);  // as counted by the launch without `rest`
        if (all_from + spares < to) to = all_from + spares;
        if (!rest) {
            job.alive[entry * kThreads + threadIdx.x] = static_cast<uint8_t>(alive);
            if (threadIdx.x == 0) job.spares[entry] = spares;
        }
    }
    const int32_t before = static_cast<int32_t>(at.tile * kTile) - 1;
    for (; from < to; from += static_cast<uint32_t>(kTile)) {
        fill_owners<kThreads>(storage, owners->items, ends, from);
        const uint32_t filled = to - from < kTile ? to - from : static_cast<uint32_t>(kTile);
        const auto particle = [=](uint32_t k) { return before + owners->items[k]; };
        if (sorted) {
            store_slots(job, at.row, from, filled, row.log_mean_weight, particle);
        } else {
            int32_t* const spare = job.spare + at.row * job.number + from;
            for (uint32_t k = threadIdx.x; k < filled; k += kThreads) spare[k] = particle(k);
        }
    }
}

// Survivors keep their places. The spares, tile after tile, fill the slots of the dead.
__global__ void __launch_bounds__(kThreads) settle(const Job job) {
    __shared__ Storage<kThreads> storage;
    const Place at(blockIdx.x, job.tiles);
    const Row& row = job.rows[at.row];
    if (row.verdict == Verdict::keep) return keep_items(job, at.row, at.first);
    const uint64_t* const slots = job.slots + at.row * (job.tiles + 1);
    const uint64_t* const spares = job.spares + at.row * (job.tiles + 1);
    const int32_t* const spare = job.spare + at.row * job.number;
    const unsigned alive = job.alive[(at.row * (job.tiles + 1) + at.tile) * kThreads + threadIdx.x];
    uint64_t total;
    // The number of dead particles before this thread's: particles minus survivors (slots minus spares).
    uint64_t rank = static_cast<uint64_t>(at.first) - (slots[at.tile] - spares[at.tile]) -
                    sum_before<kThreads>(storage, static_cast<uint64_t>(__popc(alive)), total);
    uint32_t from = spares[at.tile] <= rank ? static_cast<uint32_t>(at.tile) : 0;  // start of the search for the tile
    const uint32_t tiles = static_cast<uint32_t>(job.tiles);
    int32_t ancestors[kItems];
    double after[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        after[i] = row.log_mean_weight;
        ancestors[i] = static_cast<int32_t>(at.first + i);
        if ((alive >> i & 1u) || at.first + i >= job.particles) continue;
        from = first_not(from + 1, tiles, [=](uint32_t tile) { return spares[tile] <= rank; }) - 1;
        ancestors[i] = spare[slots[from] + (rank - spares[from])];
        ++rank;
    }
    store_slots(job, at.row, at.first, ancestors, after);
}

// --- launches -----------------------------------------------------------------------------------------------

template <Scheme kScheme>
void resample_as(const Job& job, cudaStream_t queue) {
    const int64_t rows = static_cast<int64_t>(job.call.rows);
    const auto start = [&](auto kernel, int64_t blocks, int threads, auto... more) {
        launch("resample", kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), queue, job, more...);
    };
    if (job.is_short()) {
        if (job.most() <= kFewThreads * kItems) start(resample_short<kFewThreads, kScheme>, rows, kFewThreads);
        else start(resample_short<short_threads(kScheme), kScheme>, rows, short_threads(kScheme));
        return;
    }
    check(cudaMemsetAsync(job.tops, 0, (job.call.rows + 1) * sizeof *job.tops, queue), "resample");
    start(find_tops, rows * ((job.tiles + kAbreast - 1) / kAbreast), kThreads);
    start(sum_weights, rows * job.tiles, kThreads);
    start(scan_tiles, rows, kScanThreads, Table::weights);
    if constexpr (kScheme == Scheme::residual) {
        start(sum_copies, rows * job.tiles, kThreads);
        start(scan_tiles, rows, kScanThreads, Table::copies);
    }
    if (job.draws_uniforms()) {
        start(sum_exponentials, rows * job.slot_tiles, kThreads);
        start(scan_tiles, rows, kScanThreads, Table::exponentials);
        start(draw_uniforms, rows * job.slot_tiles, kThreads);
    }
    start(find_slots<kScheme>, (rows * (job.tiles + 1) + kSearchThreads - 1) / kSearchThreads, kSearchThreads);
    start(fill_slots<kScheme>, rows * job.tiles, kThreads, false);
    if (job.number > kMany) start(fill_slots<kScheme>, rows * ((job.number + kMany - 1) / kMany), kThreads, true);
    if (!job.call.sorted) {
        start(scan_tiles, rows, kScanThreads, Table::spares);
        start(settle, rows * job.tiles, kThreads);
    }
}

// rows, particles, number, scheme, sorted
Resampling read_sizes(Arguments& in) {
    Resampling call{};
    call.rows = in.integer(), call.particles = in.integer(), call.number = in.integer();
    check_below("rows", call.rows, uint64_t{1} << 31);
    check_counts(call.particles, call.number);
    call.scheme = in.code("scheme", Scheme::residual), call.sorted = in.flag();
    return call;
}

// The same arguments. Returns the bytes of workspace that the launches need, in device memory aligned to 256 bytes.
PyObject* call_workspace(Arguments& in) { return PyLong_FromUnsignedLongLong(Job(read_sizes(in), nullptr).bytes); }

// log_weights, whether they are float64, rows, particles, number, scheme, sorted, keep_from, seed, step, stream, first_row,
// addresses of a seed and a step on the device (or 0), ancestors, log_weights after, log_mean_weight, ess, workspace,
// CUDA stream. Returns at once. A row without a usable weight keeps its particles, or gets ancestors 0 if `number` differs
// from `particles`. Its mean weight and its effective sample size are NaN.
PyObject* call_resample(Arguments& in) {
    const void* const log_weights = in.pointer("log_weights");
    const bool doubles = in.flag();
    Resampling call = read_sizes(in);
    in.expect_memory(call.rows);
    call.log_weights = log_weights, call.doubles = doubles, call.keep_from = in.number();
    const RandnShape counter = in.counter(call.rows, 1);
    call.seed = counter.seed, call.step = counter.step, call.stream = counter.stream;
    call.first_row = counter.first_particle, call.counter = read_counter(in);
    call.ancestors = in.pointer<int32_t>("ancestors"), call.log_weights_after = in.pointer("log_weights");
    call.log_mean_weight = in.pointer<double>("log_mean_weight"), call.ess = in.pointer<double>("ess");
    void* const workspace = in.pointer("workspace");
    const auto queue = in.pointer<CUstream_st>("cuda_stream");
    without_gil([&] {
        if (call.rows == 0) return;
        const Job job(call, workspace);
        switch (call.scheme) {
            case Scheme::systematic: return resample_as<Scheme::systematic>(job, queue);
            case Scheme::stratified: return resample_as<Scheme::stratified>(job, queue);
            case Scheme::multinomial: return resample_as<Scheme::multinomial>(job, queue);
            case Scheme::residual: return resample_as<Scheme::residual>(job, queue);
        }
    });
    return none();
}

static Binding bindings[] = {
    {"resample_workspace", fastcall<call_workspace, 5>, "Bytes of device memory that resample needs for itself."},
    {"resample", fastcall<call_resample, 20>, "Ancestors, and the log-weights after them."},
};

}  // namespace resampling
}  // namespace fastguide::cuda

// exp(log-weight - the largest) and its sums, one block at a time. No result depends on the number of threads.
#include "../../common/binding.h"
#include "../../common/weights.h"
#include "../../cpu/max.h"
#include "../../cpu/scratch.h"
#include "../../cpu/sums.h"
#include "../../cpu/tiles.h"

namespace fastguide::cpu {
namespace {

// w[count] = exp(log_weight - the largest). `out`, unless null, receives w divided by its sum. `sums`: the largest
// log-weight, the sum of w, and the sum of its products with `weights`, or of its squares if `weights` is null.
struct Exponentials {
    const double *log_weights, *weights;
    double* out;
    uint64_t count;
    double sums[3];
    int threads;
};

constexpr uint64_t kBlock = 1024, kGrain = 16;  // elements of a block, and blocks worth a thread

// exp(d) for d <= 0. The relative error is at most 1e-15 + |d| 2^-53. Below 2^-1022 the result is subnormal or 0.
FG_INLINE F64 exp_double(F64 d) {
    const auto x = exponential<WideLanes>(d, -746.0);
    return as<F64>(as<U64>(x.e) + ((x.n + 1000) << 52)) * 0x1p-1000;  // in range first; the product may be subnormal
}

struct BlockSums {
    double weights, others;
};

// The sums of one block of up to kBlock elements. `out` and `weights` are as in Exponentials.
BlockSums exponentiate_block(const double* log_weights, const double* weights, double* out, uint64_t count, double top,
                             Memory memory) {
    double *const w = memory.take<double>(count + kLanes64), *const others = memory.take<double>(count + kLanes64);
    const auto put = [&](uint64_t i, F64 log_weight, F64 weight) __attribute__((always_inline)) {
        const F64 e = exp_double(log_weight - top);
        store(w + i, e);
        store(others + i, e * (weights ? weight : e));
    };
    uint64_t i = 0;
    for (; i + kLanes64 <= count; i += kLanes64)
        put(i, load<F64>(log_weights + i), weights ? load<F64>(weights + i) : F64{});
    if (i < count) {
        const int left = static_cast<int>(count - i);
        put(i, load_some<F64>(log_weights + i, left), weights ? load_some<F64>(weights + i, left) : F64{});
    }
    if (out) __builtin_memcpy(out, w, count * sizeof(double));
    return {sum_in_fours(w, count), sum_in_fours(others, count)};
}

void exponentiate(Exponentials& call) {
    const uint64_t blocks = (call.count + kBlock - 1) / kBlock;
    const auto size = [&](uint64_t block) { return block + 1 < blocks ? kBlock : call.count - block * kBlock; };
    const Scratch<double> tops(blocks);
    share_out(blocks, kGrain, call.threads, [&](uint64_t block) {
        tops.data[block] = largest(call.log_weights + block * kBlock, static_cast<int64_t>(size(block)));
    });
    const double top = largest(tops.data, static_cast<int64_t>(blocks));
    const Scratch<BlockSums> sums(blocks);
    Memory counted;
    for (int i = 0; i < 2; ++i) counted.take<double>((blocks > 1 ? kBlock : call.count) + kLanes64);
    share_out(blocks, kGrain, call.threads, counted, [&](uint64_t block, const Memory& memory) {
        const uint64_t at = block * kBlock;
        sums.data[block] = exponentiate_block(call.log_weights + at, call.weights ? call.weights + at : nullptr,
                                              call.out ? call.out + at : nullptr, size(block), top, memory);
    });
    call.sums[0] = top, call.sums[1] = call.sums[2] = top - top;  // 0, or NaN if `top` is not finite
    for (uint64_t block = 0; block < blocks; ++block) {
        call.sums[1] += sums.data[block].weights;
        call.sums[2] += sums.data[block].others;
    }
    if (!call.out) return;
    const double inverse = 1.0 / call.sums[1];
    share_ranges(call.count, kGrain * kBlock, call.threads, [&](uint64_t begin, uint64_t end) {
        for (uint64_t i = begin; i < end; ++i) call.out[i] *= inverse;
    });
}

// log_weights, count, weights (or 0), out (or 0), threads
PyObject* call_exponentiate(Arguments& in) {
    Exponentials of{};
    of.log_weights = in.pointer<const double>("log_weights"), of.count = in.integer();
    check_below("count, less one,", of.count - 1, kMaxParticles);
    of.weights = in.pointer<const double>("weights"), of.out = in.pointer<double>("out"), of.threads = in.threads();
    without_gil([&] { exponentiate(of); });
    return Py_BuildValue("(ddd)", of.sums[0], of.sums[1], of.sums[2]);
}

Binding binding{"exponentiate", fastcall<call_exponentiate, 5>,
                "w = exp(log_weight - largest), normalised to `out` unless 0. Returns the largest, the sum of w, and that "
                "of its squares, or of its products with `weights` unless 0."};

}  // namespace
}  // namespace fastguide::cpu

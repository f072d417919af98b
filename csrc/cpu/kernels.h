// The CPU kernels. Each source in kernels/ is compiled once for each instruction set, into a namespace of that
// name; `kernels()` is the table of the best one that this processor has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"

namespace fastguide::cpu {

enum class Scheme : int { systematic = 0, stratified = 1, multinomial = 2, residual = 3 };

// One call of resample: float32 or float64 log-weights [rows, particles] to ancestors [rows, number].
struct Resampling {
    const void* log_weights;
    Dtype dtype;
    uint64_t rows, particles, number;  // both below 2^31
    Scheme scheme;
    bool sorted;
    double keep_from;  // a row whose effective sample size is at least this keeps its particles
    uint64_t seed;
    uint32_t step, stream;
    int32_t* ancestors;
    void* log_weights_after;  // [rows, number]
    double *log_mean_weight, *ess;  // [rows]
    int threads;
};

struct Kernels {
    const char* name;
    // Fills out[particles, elements] with standard normals on at most `threads` threads.
    void (*randn)(void* out, Dtype dtype, const RandnShape& shape, int threads);
    // The normals of `pairs` pairs of words (radius, angle), as randn computes them in float32.
    void (*normals)(const uint32_t* words, float* out, std::size_t pairs);
    // Returns the first row without a usable weight, or -1.
    int64_t (*resample)(const Resampling& call);
};

#define FG_DECLARE_KERNELS(isa)                                                         \
    namespace isa {                                                                     \
    void randn(void* out, Dtype dtype, const RandnShape& shape, int threads);           \
    void normals(const uint32_t* words, float* out, std::size_t pairs);                 \
    int64_t resample(const Resampling& call);                                           \
    constexpr Kernels kKernels{#isa, randn, normals, resample};                         \
    }

#if defined(__x86_64__)
FG_DECLARE_KERNELS(avx512)
FG_DECLARE_KERNELS(avx2)
#endif
FG_DECLARE_KERNELS(portable)
#undef FG_DECLARE_KERNELS

const Kernels& kernels();

// The instruction sets that this processor has, the best first; and the use of another than the best, for tests
// and benchmarks.
const Kernels* const* available(int* count);
void use(const Kernels& kernels);

}  // namespace fastguide::cpu

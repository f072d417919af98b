// The CPU kernels. Each source in kernels/ is compiled once for each instruction set, into a namespace of that
// name; `kernels()` is the table of the best one that this processor has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"
#include "../common/step.h"

namespace fastguide::cpu {

// A contiguous tensor that a kernel reads.
struct Input {
    const void* data;
    Dtype dtype;
};

// One call of reverse_step, all tensors [particles, elements]. The arithmetic is in float, or in double where x is.
struct Step {
    Input x, output, displacement;  // displacement.data may be null
    void *x_s, *x0;                 // in x's dtype; x0 may be null
    const double* levels;           // five numbers, or for each of the five a column [particles]
    bool per_particle;
    Prediction prediction;
    Clip clip;
    RandnShape shape;
    int threads;
};

// [particles], in double or float.
struct Weights {
    const void* before;
    void* after;
    bool doubles;
};

struct Kernels {
    const char* name;
    // Fills out[particles, elements] with standard normals on at most `threads` threads.
    void (*randn)(void* out, Dtype dtype, const RandnShape& shape, int threads);
    // The normals of `pairs` pairs of words (radius, angle), as randn computes them in float32.
    void (*normals)(const uint32_t* words, float* out, std::size_t pairs);
    void (*reverse_step)(const Step& step);
    // The step from x0_hat = step.output, and each particle's log-weight with the log-density ratio added.
    void (*propose_and_weigh)(const Step& step, const Weights& weights);
};

#define FG_DECLARE_KERNELS(isa)                                                         \
    namespace isa {                                                                     \
    void randn(void* out, Dtype dtype, const RandnShape& shape, int threads);           \
    void normals(const uint32_t* words, float* out, std::size_t pairs);                 \
    void reverse_step(const Step& step);                                                \
    void propose_and_weigh(const Step& step, const Weights& weights);                   \
    constexpr Kernels kKernels{#isa, randn, normals, reverse_step, propose_and_weigh};  \
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

// The CPU kernels. Each source in kernels/ is compiled once for each instruction set, into a namespace of that
// name; `kernels()` is the table of the best one that this processor has.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"

namespace fastguide::cpu {

// [rows, particles] of so many bytes each.
struct ParticleArray {
    void* data;
    uint64_t bytes;
};

// The place of the first ancestor out of range, or -1, and the memory that the call took for itself.
struct Gathered {
    int64_t bad;
    uint64_t scratch;
};

struct Kernels {
    const char* name;
    // Fills out[particles, elements] with standard normals on at most `threads` threads.
    void (*randn)(void* out, Dtype dtype, const RandnShape& shape, int threads);
    // The normals of `pairs` pairs of words (radius, angle), as randn computes them in float32.
    void (*normals)(const uint32_t* words, float* out, std::size_t pairs);
    // Moves the particles of each of `count` states to where ancestors[rows, particles] say, int64 if `wide`, else
    // int32; none if an ancestor is out of range.
    Gathered (*gather_particles)(const void* ancestors, bool wide, uint64_t rows, uint64_t particles,
                                 const ParticleArray* states, std::size_t count, int threads);
};

#define FG_DECLARE_KERNELS(isa)                                                         \
    namespace isa {                                                                     \
    void randn(void* out, Dtype dtype, const RandnShape& shape, int threads);           \
    void normals(const uint32_t* words, float* out, std::size_t pairs);                 \
    Gathered gather_particles(const void* ancestors, bool wide, uint64_t rows,          \
                              uint64_t particles, const ParticleArray* states,          \
                              std::size_t count, int threads);                          \
    constexpr Kernels kKernels{#isa, randn, normals, gather_particles};                 \
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

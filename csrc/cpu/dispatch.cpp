#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastguide::cpu {
namespace {

#if defined(__x86_64__)
// Whether the processor has all of x86-64-v3 or v4. Clang before 18 compiles for them but does not know them by these
// names here, nor MOVBE, F16C and LZCNT. The compiler's answers include whether the system saves the registers.
bool has_v3() {
    unsigned a, b, basic, extended, d;
    if (!__get_cpuid(1, &a, &b, &basic, &d) || !__get_cpuid(0x80000001, &a, &b, &extended, &d)) return false;
    return (basic & bit_MOVBE) && (basic & bit_F16C) && (extended & bit_LZCNT) && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_v4() {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Available {
    const Kernels* best_first[3];
    int count = 0;

    Available() {
#if defined(__x86_64__)
        if (has_v4()) best_first[count++] = &avx512::kKernels;
        if (has_v3()) best_first[count++] = &avx2::kKernels;
#endif
        best_first[count++] = &portable::kKernels;
    }
};

const Available& found() {
    static const Available available;
    return available;
}

const Kernels* current = found().best_first[0];

}  // namespace

const Kernels& kernels() { return *current; }

const Kernels* const* available(int* count) {
    *count = found().count;
    return found().best_first;
}

void use(const Kernels& chosen) { current = &chosen; }

}  // namespace fastguide::cpu

#include "kernels.h"

namespace fastguide::cpu {
namespace {

struct Available {
    const Kernels* best_first[3];
    int count = 0;

    Available() {
#if defined(__x86_64__)
        if (__builtin_cpu_supports("x86-64-v4")) best_first[count++] = &avx512::kKernels;
        if (__builtin_cpu_supports("x86-64-v3")) best_first[count++] = &avx2::kKernels;
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

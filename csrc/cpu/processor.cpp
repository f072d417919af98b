// The instruction set of this module, those of this processor, and Philox for tests.
#include "../common/binding.h"
#include "../common/philox.h"
#include "simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastguide::cpu {
namespace {

#if defined(__x86_64__)
// Whether the processor has all of x86-64-v3 or v4. Clang before 18 can compile for them, but its __builtin_cpu_supports
// does not know these names, nor MOVBE, F16C and LZCNT. The builtin also checks that the system saves the registers.
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
#else
bool has_v3() { return false; }
bool has_v4() { return false; }
#endif

PyObject* instruction_set(Arguments&) { return PyUnicode_FromString(kInstructionSet); }

PyObject* instruction_sets(Arguments&) {
    if (has_v4()) return Py_BuildValue("[sss]", "avx512", "avx2", "portable");
    if (has_v3()) return Py_BuildValue("[ss]", "avx2", "portable");
    return Py_BuildValue("[s]", "portable");
}

PyObject* call_philox(Arguments& in) {
    const auto [counter, key0, key1] = read_philox(in);
    const Words4 w = philox(counter, key0, key1);
    return Py_BuildValue("(IIII)", w.w0, w.w1, w.w2, w.w3);
}

Binding bindings[] = {
    {"instruction_set", fastcall<instruction_set, 0>, "What this module was compiled for."},
    {"instruction_sets", fastcall<instruction_sets, 0>, "What this processor has of them, the best first."},
    {"philox", fastcall<call_philox, 2>, "The four words of Philox4x32-10 of a counter and a key."},
};

}  // namespace
}  // namespace fastguide::cpu

#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"
#include "../common/philox.h"

namespace fastguide::cpu {

// Fills out[particles, elements] with standard normals, on at most `threads` threads: the same bits for any
// number.
void randn(void* out, Dtype dtype, const RandnShape& shape, int threads);

// The normals of `pairs` pairs of words (radius, angle), as randn computes them in float32.
void normals(const uint32_t* words, float* out, std::size_t pairs);

// The instruction set that the hot loop runs with on this machine.
const char* instruction_set();

}  // namespace fastguide::cpu

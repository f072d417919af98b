// What CUB's block-wide operations share.
#pragma once

#include "../cuda_runtime_api.h"

namespace emulated {

// The temporary storage may be written from the first to the last thread of an operation: before it is used again
// there must be a barrier.
inline void use_storage(const void* storage) {
    if (threadIdx.x != 0) return;
    Block& block = *this_thread().block;
    const auto [found, first] = block.used.emplace(storage, block.barriers);
    if (!first && found->second == block.barriers)
        fail("the temporary storage of a CUB operation is used again without __syncthreads() between");
    found->second = block.barriers;
}

// What other threads than the first get where CUB promises them nothing.
template <class T>
T garbage() {
    T value;
    std::memset(&value, kPoison, sizeof(T));
    return value;
}

}  // namespace emulated

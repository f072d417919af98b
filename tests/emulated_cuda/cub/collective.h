// The common part of CUB's block-wide operations.
#pragma once

#include "../cuda_runtime_api.h"

namespace emulated {

// An operation may write the temporary storage until its last thread has finished. So there must be a barrier before the
// storage is used again.
inline void use_storage(const void* storage) {
    if (threadIdx.x != 0) return;
    Block& block = *this_thread().block;
    const auto [found, first] = block.used.emplace(storage, block.barriers);
    if (!first && found->second == block.barriers)
        fail("the temporary storage of a CUB operation is used again without __syncthreads() between");
    found->second = block.barriers;
}

template <class T>
struct Results {
    T own, all;
};

// Calls `compute` once with the values of all threads of the block, in order. `compute` works in place and returns one
// value for all threads. Every thread must call this.
template <class T, class Compute>
Results<T> collect(const T& value, Line line, const Compute& compute) {
    static_assert(std::is_trivially_copyable_v<T>);
    auto& shown = this_thread().block->exchange;
    const std::size_t places = (blockDim.x + 1) * sizeof(T) / sizeof(std::max_align_t) + 1;
    if (shown.size() < places + 1) shown.resize(places + 1);
    T* const values = reinterpret_cast<T*>(shown.data());
    char* const computed = reinterpret_cast<char*>(&shown[places]);
    values[threadIdx.x] = value;
    *computed = 0;
    wait(false, line);
    if (!*computed) values[blockDim.x] = compute(values, blockDim.x);
    *computed = 1;
    const Results<T> results{values[threadIdx.x], values[blockDim.x]};
    wait(false, line);
    return results;
}

// The result of the other threads, where CUB defines only that of the first thread.
template <class T>
T garbage() {
    T value;
    std::memset(&value, kPoison, sizeof(T));
    return value;
}

}  // namespace emulated

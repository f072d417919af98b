#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace fastguide::cuda {

// The error of a launch, by its CUDA name. Errors inside a kernel show at the caller's next synchronisation.
inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error));
}

// kernel<<<blocks, threads, 0, queue>>>(arguments...), checked, and in C++ that every compiler reads.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 blocks, unsigned threads, cudaStream_t queue,
            Arguments&&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.stream = queue;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace fastguide::cuda

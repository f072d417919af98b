#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastguide::cuda {

// Throws if a launch failed, with the CUDA name of the error. Errors inside a kernel show at the caller's next
// synchronisation.
inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error));
}

// kernel<<<blocks, threads, 0, queue>>>(arguments...) in plain C++, with a check for errors.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 blocks, unsigned threads, cudaStream_t queue,
            Arguments&&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.stream = queue;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

// One cooperative launch with as many blocks as run at once on the current device, but no more than `most`.
template <class... Parameters, class... Arguments>
void launch_together(const char* what, void (*kernel)(Parameters...), uint64_t most, unsigned threads,
                     cudaStream_t queue, Arguments&&... arguments) {
    int device, processors, on_each;
    check(cudaGetDevice(&device), what);
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), what);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, kernel, static_cast<int>(threads), 0), what);
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min<uint64_t>(most, processors * on_each)));
    config.blockDim = dim3(threads);
    config.stream = queue;
    config.attrs = &cooperative;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace fastguide::cuda

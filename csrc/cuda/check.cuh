#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fastguide::cuda {

// The error of a launch, by its CUDA name. Errors inside a kernel show at the caller's next synchronisation.
inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error));
}

}  // namespace fastguide::cuda

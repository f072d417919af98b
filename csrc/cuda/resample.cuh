#pragma once

#include <cuda_runtime.h>

#include "../common/weights.h"
#include "counter.cuh"

namespace fastguide::cuda {

// Log-weights are float64 if `doubles`, else float32.
struct Resampling : fastguide::Resampling {
    const void* log_weights;
    bool doubles;
    CounterOnDevice counter;
};

// Bytes of device memory, aligned to 256, that the launches of this call need for themselves; of the pointers none is
// looked at.
uint64_t resample_workspace(const Resampling& call);

// Launches on `queue` and returns; throws where a launch failed. A row without a usable weight keeps its particles, or
// has zeros for ancestors where `number` is another; its mean weight and its effective sample size are NaN.
void resample(const Resampling& call, void* workspace, cudaStream_t queue);

}  // namespace fastguide::cuda

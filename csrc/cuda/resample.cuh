#pragma once

#include <cuda_runtime.h>

#include "../common/weights.h"
#include "counter.cuh"

namespace fastguide::cuda {

// One call of resample: log-weights [rows, particles], float64 if `doubles`, else float32, to ancestors [rows, number].
struct Resampling {
    const void* log_weights;
    bool doubles;
    uint64_t rows, particles, number;  // the last two below 2^31
    Scheme scheme;
    bool sorted;
    double keep_from;  // a row whose effective sample size is at least this keeps its particles
    uint64_t seed;
    uint32_t step, stream;
    CounterOnDevice counter;
    int32_t* ancestors;
    void* log_weights_after;        // [rows, number]
    double *log_mean_weight, *ess;  // [rows]
};

// Bytes of device memory, aligned to 256, that the launches of this call need for themselves; of the pointers none is
// looked at.
uint64_t resample_workspace(const Resampling& call);

// Launches on `queue` and returns; throws where a launch failed. A row without a usable weight keeps its particles, or
// has zeros for ancestors where `number` is another; its mean weight and its effective sample size are NaN.
void resample(const Resampling& call, void* workspace, cudaStream_t queue);

}  // namespace fastguide::cuda

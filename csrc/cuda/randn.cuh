#pragma once

#include <cuda_runtime_api.h>

#include "../common/dtype.h"
#include "../common/philox.h"
#include "counter.cuh"

namespace fastguide::cuda {

// Fills out[particles, elements], on the device that is current, with standard normals. Launches on `queue`
// and returns; throws where the launch failed. float64 is not among the dtypes. A seed or a step that stands on the
// device takes the place of the shape's.
void randn(void* out, Dtype dtype, const RandnShape& shape, const CounterOnDevice& counter, cudaStream_t queue);

// Philox4x32-10 of one counter into four words on the device: the known answers, asked of the hardware
// itself.
void philox_words(uint32_t* out, Words4 counter, uint32_t key0, uint32_t key1, cudaStream_t queue);

}  // namespace fastguide::cuda

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/binding.h"

namespace fastguide::cuda {

// The device addresses of a seed and a step. Null means that the number in the call is used.
struct CounterOnDevice {
    const int64_t *seed, *step;
};

// Reads the two addresses; 0 means none.
inline CounterOnDevice read_counter(Arguments& in) {
    const auto seed = in.pointer<const int64_t>("seed");
    return {seed, in.pointer<const int64_t>("step")};
}

// Returns `call` with the seed and the step read from the device. So a launch that a graph replays uses the current ones.
template <class Call>
__device__ __forceinline__ Call with_counter(Call call, const CounterOnDevice& at) {
    if (at.seed) call.seed = static_cast<uint64_t>(*at.seed);
    if (at.step) call.step = static_cast<uint32_t>(*at.step);
    return call;
}

}  // namespace fastguide::cuda

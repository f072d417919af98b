#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/binding.h"

namespace fastguide::cuda {

// Where a seed and a step stand on the device, or null where they are numbers.
struct CounterOnDevice {
    const int64_t *seed, *step;
};

// Their addresses, each 0 where there is none.
inline CounterOnDevice read_counter(Arguments& in) {
    const auto seed = in.pointer<const int64_t>("seed");
    return {seed, in.pointer<const int64_t>("step")};
}

// `call` with the seed and the step that stand there now: a launch that a graph replays reads them anew.
template <class Call>
__device__ __forceinline__ Call with_counter(Call call, const CounterOnDevice& at) {
    if (at.seed) call.seed = static_cast<uint64_t>(*at.seed);
    if (at.step) call.step = static_cast<uint32_t>(*at.step);
    return call;
}

}  // namespace fastguide::cuda

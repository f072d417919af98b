// Element types in vectors: a kernel works on float or double, and what is narrower is widened and narrowed a
// tile at a time.
#pragma once

#include <type_traits>

#include "../common/dtype.h"
#include "simd.h"

namespace fastguide::cpu {

// A contiguous tensor that a kernel reads.
struct Input {
    const void* data;
    Dtype dtype;
};

FG_INLINE F32 widen_lanes(const Half* from) { return from_half(load<U16>(from)); }
FG_INLINE F32 widen_lanes(const BFloat16* from) { return from_bfloat16(load<U16>(from)); }
FG_INLINE void narrow_lanes(Half* to, F32 v) { store(to, to_half(v)); }
FG_INLINE void narrow_lanes(BFloat16* to, F32 v) { store(to, to_bfloat16(v)); }

// float16 or bfloat16 to float, `count` elements.
template <class T>
FG_INLINE void widen(float* to, const T* from, uint64_t count) {
    uint64_t i = 0;
    for (; i + kLanes32 <= count; i += kLanes32) store(to + i, widen_lanes(from + i));
    if (i < count) {
        T last[kLanes32] = {};
        __builtin_memcpy(last, from + i, (count - i) * sizeof(T));
        store_some(to + i, widen_lanes(last), static_cast<int>(count - i));
    }
}

// float to float16 or bfloat16, to nearest even.
template <class T>
FG_INLINE void narrow(T* to, const float* from, uint64_t count) {
    uint64_t i = 0;
    for (; i + kLanes32 <= count; i += kLanes32) narrow_lanes(to + i, load<F32>(from + i));
    if (i < count) {
        T last[kLanes32];
        narrow_lanes(last, load_some<F32>(from + i, static_cast<int>(count - i)));
        __builtin_memcpy(to + i, last, (count - i) * sizeof(T));
    }
}

// f(T{}) for the element type that `dtype` names.
template <class F>
FG_INLINE void with_type(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::float32: return f(float{});
        case Dtype::float16: return f(Half{});
        case Dtype::bfloat16: return f(BFloat16{});
        case Dtype::float64: return f(double{});
    }
}

}  // namespace fastguide::cpu

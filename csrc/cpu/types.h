// Element types in vectors. A kernel works on float or double. Narrower types are widened and narrowed one tile at a
// time.
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

// A contiguous tensor that a kernel writes.
struct Result {
    void* data;
    Dtype dtype;
};

FG_INLINE F32 widen_lanes(const Half* from) { return from_half(load<U16>(from)); }
FG_INLINE F32 widen_lanes(const BFloat16* from) { return from_bfloat16(load<U16>(from)); }
FG_INLINE void narrow_lanes(Half* to, F32 v) { store(to, to_half(v)); }
FG_INLINE void narrow_lanes(BFloat16* to, F32 v) { store(to, to_bfloat16(v)); }

// Converts `count` elements from float16 or bfloat16 to float.
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

// Converts `count` elements from float to float16 or bfloat16, to nearest even.
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

// Calls f(T{}) with the element type T that `dtype` names.
template <class F>
FG_INLINE void with_type(Dtype dtype, const F& f) {
    switch (dtype) {
        case Dtype::float32: return f(float{});
        case Dtype::float16: return f(Half{});
        case Dtype::bfloat16: return f(BFloat16{});
        case Dtype::float64: return f(double{});
    }
}

// Converts between any two types. Between float64 and a 16-bit type it goes through float, as torch does.
template <class To, class From>
FG_INLINE void convert(To* to, const From* from, uint64_t count) {
    if constexpr (sizeof(To) > 2 && sizeof(From) > 2) {
        for (uint64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
    } else if constexpr (std::is_same_v<To, float>) {
        widen(to, from, count);
    } else if constexpr (std::is_same_v<From, float>) {
        narrow(to, from, count);
    } else {
        constexpr uint64_t kMiddle = 256;
        float middle[kMiddle];
        for (uint64_t at = 0; at < count; at += kMiddle) {
            const uint64_t some = count - at < kMiddle ? count - at : kMiddle;
            convert(middle, from + at, some);
            convert(to + at, middle, some);
        }
    }
}

// Elements [begin, begin + count) as R: in place if they are R already, otherwise converted into `buffer`.
template <class R>
FG_INLINE const R* staged(R* buffer, const Input& from, uint64_t begin, uint64_t count) {
    const R* at = buffer;
    with_type(from.dtype, [&](auto type) __attribute__((always_inline)) {
        using T = decltype(type);
        const T* data = static_cast<const T*>(from.data) + begin;
        if constexpr (std::is_same_v<T, R>) at = data;
        else convert(buffer, data, count);
    });
    return at;
}

// Converts buffer[count] to elements [begin, begin + count) of `to`.
template <class R>
FG_INLINE void put(const Result& to, uint64_t begin, const R* buffer, uint64_t count) {
    with_type(to.dtype, [&](auto type) __attribute__((always_inline)) {
        convert(static_cast<decltype(type)*>(to.data) + begin, buffer, count);
    });
}

// Prefetches elements into the first-level cache while other work runs.
FG_INLINE void prefetch(const Input& from, uint64_t begin, uint64_t count) {
    if (!from.data) return;
    const uint64_t size = size_of(from.dtype);
    const char* data = static_cast<const char*>(from.data) + begin * size;
    for (uint64_t at = 0; at < count * size; at += 64) __builtin_prefetch(data + at);
}

}  // namespace fastguide::cpu

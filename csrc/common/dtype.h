// Element types, by the code that Python passes (fastguide/ops/_native.py), and rounding to the 16-bit ones.
#pragma once

#include <cstdint>

#include "math.h"

namespace fastguide {

enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2, float64 = 3 };

FG_HD uint64_t size_of(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

// Round to nearest even. No branch, so that loops over it vectorise.
FG_HD Half to_half(float x) {
    const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
    const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
    // Drop 13 bits of the mantissa; move the exponent from bias 127 to bias 15.
    const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23)) >> 13;
    // Below 2^-14 the spacing is 2^-24, as in float32 next to 1/2: let the addition round.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return {static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? special : finite))};
}

FG_HD BFloat16 to_bfloat16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded)};
}

template <class T>
FG_HD T round_to(float x);

template <>
FG_HD float round_to<float>(float x) {
    return x;
}

template <>
FG_HD Half round_to<Half>(float x) {
    return to_half(x);
}

template <>
FG_HD BFloat16 round_to<BFloat16>(float x) {
    return to_bfloat16(x);
}

}  // namespace fastguide

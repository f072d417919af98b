// float32 functions made of IEEE additions, multiplications and one correctly rounded square root, so that
// every machine computes the same bits. Contraction to FMA is off in the build (-ffp-contract=off,
// -fmad=false). The polynomials are minimax fits with the leading coefficients rounded to float32 before the
// rest is fitted.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "config.h"

namespace fastguide {

FG_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

FG_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

FG_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
}

// -2 ln((w + 1) / 2^32). With u = 2^-k (1 - s), s in [0, 1/2], it is 2k ln 2 - 2 ln(1 - s): all terms
// positive, so nothing cancels. Beside u = 1 s is the exact integer ~w over 2^32, so that the relative
// accuracy holds down to 2^-32. Integers enter in two halves, each exact as a float: s = s_high + s_low has
// no rounding. (-2 ln(1 - s) - 2s) / s^2 is fitted to 2^-27.9 of the whole.
FG_HD float minus_two_log(uint32_t w) {
    // One signed integer serves both branches: ~w where the top bit of w is set, -(w + 1) where it is not.
    const int32_t c = static_cast<int32_t>(~w);
    const bool above_half = (w >> 31) != 0;
    const int32_t high = c & ~0xFF;
    const int32_t exponent = static_cast<int32_t>((bits_of(static_cast<float>(c)) >> 23) & 0xFFu) - 127;
    const int32_t halvings = above_half ? 0 : 31 - exponent;
    const float scale = float_of(static_cast<uint32_t>(127 - 32 + halvings) << 23);
    const float s_high = (above_half ? 0.0f : 1.0f) + static_cast<float>(high) * scale;
    const float s_low = static_cast<float>(c - high) * scale;
    const float s = s_high + s_low;
    float q = 0x1.be525ap+1f;
    q = q * s + -0x1.3cfc7cp+2f;
    q = q * s + 0x1.f88f3p+1f;
    q = q * s + -0x1.2f3e04p+0f;
    q = q * s + 0x1.5c3ae6p-1f;
    q = q * s + 0x1.6830e8p-2f;
    q = q * s + 0x1.01e9dap-1f;
    q = q * s + 0x1.5542f6p-1f;
    q = q * s + 0x1.00001ep+0f;
    return static_cast<float>(halvings) * 0x1.62e43p+0f + (2.0f * s_high + (2.0f * s_low + (s * s) * q));
}

struct SinCos {
    float sin, cos;
};

// Sine and cosine of 2 pi w / 2^32. The nearest multiple of pi/2 is taken off in integers, so that both keep
// their relative accuracy beside their zeros, and are exactly zero there. The residue enters in two halves
// whose products with the leading coefficient, 201/128, are exact. Of sin(pi/2 y) / y and cos(pi/2 y) on |y|
// <= 1/2 the fits are good to 2^-28 and 2^-31.
FG_HD SinCos sincos_of_turn(uint32_t w) {
    const uint32_t quadrant = (w + 0x20000000u) >> 30;
    const int32_t residue = static_cast<int32_t>(w - (quadrant << 30));
    const int32_t high_part = (residue + 0x1000) & ~0x1FFF;  // the nearest: the low part has either sign
    const float high = static_cast<float>(high_part) * 0x1p-30f;
    const float low = static_cast<float>(residue - high_part) * 0x1p-30f;
    const float y = high + low;
    const float z = y * y;
    const float tail = ((-0x1.2d7928p-8f * z + 0x1.465e16p-4f) * z + -0x1.4abbb8p-1f) * z + 0x1.fb52e6p-12f;
    const float s = high * 1.5703125f + (low * 1.5703125f + y * tail);
    const float bend = ((0x1.d4f7eep-11f * z + -0x1.55b2b6p-6f) * z + 0x1.03c1bp-2f) * z + -0x1.3bd3ccp+0f;
    const float c = 1.0f + bend * z;
    const bool odd = (quadrant & 1u) != 0;
    const uint32_t sin_sign = (quadrant & 2u) << 30;
    const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30;
    return {float_of(bits_of(odd ? c : s) ^ sin_sign), float_of(bits_of(odd ? s : c) ^ cos_sign)};
}

}  // namespace fastguide

// float32 functions from IEEE operations alone (additions, multiplications, explicit fused multiply-adds, one
// correctly rounded square root), so that every machine computes the same bits. The compiler fuses nothing by
// itself (-ffp-contract=off, -fmad=false). The polynomials are minimax fits. Their leading coefficients were rounded
// to float32 before the rest was fitted.
//
// Each function is written once, for one lane or many. `Lanes` names the types of a float and a word, and has the
// operations that differ between scalars and vectors.
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

// One lane: a GPU thread, or plain C++.
struct OneLane {
    using F32 = float;
    using I32 = int32_t;
    using U32 = uint32_t;

    template <class T>
    static FG_HD T select(bool condition, T a, T b) {
        return condition ? a : b;
    }
    static FG_HD float to_float(int32_t i) { return static_cast<float>(i); }
    static FG_HD int32_t to_signed(uint32_t w) { return static_cast<int32_t>(w); }
    static FG_HD uint32_t to_unsigned(int32_t i) { return static_cast<uint32_t>(i); }
    static FG_HD uint32_t bits(float x) { return bits_of(x); }
    static FG_HD float of_bits(uint32_t w) { return float_of(w); }
    static FG_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
        return __fmaf_rn(a, b, c);
#else
        return std::fma(a, b, c);
#endif
    }
    static FG_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
        return __fsqrt_rn(x);
#else
        return std::sqrt(x);
#endif
    }
};

// -2 ln u for u = (w + 1) / 2^32. With u = 2^-k (1 - s/2), s in [0, 1], it is 2k ln 2 - 2 ln(1 - s/2). All terms are
// positive, so nothing cancels. Near u = 1, s is the exact integer ~w over 2^31, so the relative accuracy holds down
// to 2^-32. The integer is split into two halves, each exact as a float: s = s_high + s_low has no rounding.
// (-2 ln(1 - s/2) - s) / s^2 is fitted to 2^-27.9 of the result.
template <class Lanes>
FG_HD typename Lanes::F32 minus_two_log(typename Lanes::U32 w) {
    using F32 = typename Lanes::F32;
    using I32 = typename Lanes::I32;
    // One signed integer serves both branches: ~w if the top bit of w is set, -(w + 1) if it is not.
    const I32 c = Lanes::to_signed(~w);
    const auto above_half = c >= 0;
    const I32 high = c & ~0xFF;
    // 31 minus the exponent of w + 1: the float's sign and exponent bits are 256 + 127 + exponent.
    const I32 leading = 414 - Lanes::to_signed(Lanes::bits(Lanes::to_float(c)) >> 23);
    const I32 halvings = Lanes::select(above_half, I32{}, leading);
    const F32 scale = Lanes::of_bits(Lanes::to_unsigned(halvings + (127 - 31)) << 23);
    const F32 offset = Lanes::select(above_half, F32{}, F32{} + 2.0f);
    const F32 s_high = Lanes::fused(Lanes::to_float(high), scale, offset);
    const F32 s_low = Lanes::to_float(c - high) * scale;
    const F32 s = s_high + s_low;
    F32 q = F32{} + 0x1.be525ap-9f;
    q = Lanes::fused(q, s, F32{} + -0x1.3cfc7cp-7f);
    q = Lanes::fused(q, s, F32{} + 0x1.f88f3p-7f);
    q = Lanes::fused(q, s, F32{} + -0x1.2f3e04p-7f);
    q = Lanes::fused(q, s, F32{} + 0x1.5c3ae6p-7f);
    q = Lanes::fused(q, s, F32{} + 0x1.6830e8p-7f);
    q = Lanes::fused(q, s, F32{} + 0x1.01e9dap-5f);
    q = Lanes::fused(q, s, F32{} + 0x1.5542f6p-4f);
    q = Lanes::fused(q, s, F32{} + 0x1.00001ep-2f);
    const F32 rest = s_high + Lanes::fused(s * s, q, s_low);
    return Lanes::fused(Lanes::to_float(halvings), F32{} + 0x1.62e43p+0f, rest);
}

template <class F32>
struct SinCos {
    F32 sin, cos;
};

// Sine and cosine of 2 pi w / 2^32. The nearest multiple of pi/2 is subtracted in integers, so both keep their
// relative accuracy near their zeros, and are exactly zero there. On |y| <= 1/2 the fit of sin(pi/2 y) / y is good to
// 2^-28, and that of cos(pi/2 y) to 2^-31.
template <class Lanes>
FG_HD SinCos<typename Lanes::F32> sincos_of_turn(typename Lanes::U32 w) {
    using F32 = typename Lanes::F32;
    using U32 = typename Lanes::U32;
    const F32 y = Lanes::to_float(Lanes::to_signed(w << 2)) * 0x1p-32f;
    const F32 z = y * y;
    F32 tail = Lanes::fused(F32{} + -0x1.2d7928p-8f, z, F32{} + 0x1.465e16p-4f);
    tail = Lanes::fused(tail, z, F32{} + -0x1.4abbb8p-1f);
    tail = Lanes::fused(tail, z, F32{} + -0x1.a34p-25f);
    const F32 s = Lanes::fused(y, F32{} + 0x1.921fb6p+0f, y * tail);
    F32 bend = Lanes::fused(F32{} + 0x1.d4f7eep-11f, z, F32{} + -0x1.55b2b6p-6f);
    bend = Lanes::fused(bend, z, F32{} + 0x1.03c1bp-2f);
    bend = Lanes::fused(bend, z, F32{} + -0x1.3bd3ccp+0f);
    const F32 c = Lanes::fused(bend, z, F32{} + 1.0f);
    const U32 turned = w + 0x20000000u;  // its two top bits are the quadrant
    const auto odd = (turned & 0x40000000u) != 0;
    const U32 sin_sign = turned & 0x80000000u;
    const U32 cos_sign = (turned + 0x40000000u) & 0x80000000u;
    return {Lanes::of_bits(Lanes::bits(Lanes::select(odd, c, s)) ^ sin_sign),
            Lanes::of_bits(Lanes::bits(Lanes::select(odd, s, c)) ^ cos_sign)};
}

}  // namespace fastguide

// float64 logarithms from IEEE operations alone, one rounding each, so that every machine computes the same bits.
// `Lanes` is used as in common/math.h. It must provide F64, U64, `select`, `bits` and `of_bits`.
#pragma once

#include <cstdint>
#include <limits>

#include "config.h"

namespace fastguide {

// ln((x + tail) 2^shift) for a normal x > 0, a tail smaller than x's rounding unit, and a shift for each lane.
//
// x = 2^k m, sqrt(1/2) <= m < sqrt(2). With f = m - 1 and s = f / (2 + f), ln m = 2 artanh s
// = f - f^2/2 + s (f^2/2 + R), R = 2 artanh(s) / s - 2 = s^2 (2/3 + 2/5 s^2 + ...), fitted to 2^-59 of the whole.
template <class Lanes, bool kTail = false, bool kShift = false>
FG_HD typename Lanes::F64 log_of_normal(typename Lanes::F64 x, typename Lanes::F64 tail = typename Lanes::F64{},
                                        typename Lanes::F64 shift = typename Lanes::F64{}) {
    using F64 = typename Lanes::F64;
    using U64 = typename Lanes::U64;
    constexpr uint64_t one = 0x3FF0000000000000u, root_half = 0x3FE6A09E667F3BCDu, mantissa = 0x000FFFFFFFFFFFFFu;
    const U64 shifted = Lanes::bits(x) + (one - root_half), exponent = shifted >> 52;
    const F64 m = Lanes::of_bits((shifted & mantissa) + root_half);
    F64 k = Lanes::of_bits(exponent | 0x4330000000000000u) - (0x1p52 + 1023.0);
    if constexpr (kShift) k = k + shift;
    F64 f = m - 1.0;
    if constexpr (kTail) f = f + tail * Lanes::of_bits((2047u - exponent) << 52) * 0.5;  // 2^(1-k) / 2: 2^-k may be subnormal
    const F64 s = f / (f + 2.0);
    const F64 z = s * s, w = z * z;
    const F64 even = ((w * 0x1.2efe21343f314p-3 + 0x1.746636708573cp-3) * w + 0x1.24924941afef6p-2) * w +
                     0x1.5555555555591p-1;
    const F64 odd = (w * 0x1.39a2821356e76p-3 + 0x1.c71c52377b059p-3) * w + 0x1.9999999980340p-2;
    const F64 half_square = 0.5 * f * f;
    const F64 rest = s * (half_square + z * (even + z * odd)) + k * 0x1.ef35793c76730p-45;
    return k * 0x1.62e42fefa3800p-1 - ((half_square - rest) - f);  // k ln 2 in two parts, the large one exact
}

// ln x, within 0.8 ulp. Like std::log for 0, negative values, infinity and NaN.
template <class Lanes>
FG_HD typename Lanes::F64 log_double(typename Lanes::F64 x) {
    using F64 = typename Lanes::F64;
    constexpr double infinity = std::numeric_limits<double>::infinity();
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const auto subnormal = x < 0x1p-1022;
    const F64 finite = log_of_normal<Lanes, false, true>(Lanes::select(subnormal, x * 0x1p54, x), F64{},
                                                         Lanes::select(subnormal, F64{} - 54.0, F64{}));
    const F64 outside = Lanes::select(x == 0.0, F64{} - infinity, F64{} + nan);
    return Lanes::select(x > 0.0, Lanes::select(x < infinity, finite, x), outside);
}

// ln(1 + x) for x >= 0, infinity and NaN, within 1.2 ulp.
template <class Lanes>
FG_HD typename Lanes::F64 log1p_double(typename Lanes::F64 x) {
    using F64 = typename Lanes::F64;
    const F64 sum = 1.0 + x;
    const F64 tail = Lanes::select(x < 1.0, x - (sum - 1.0), 1.0 - (sum - x));
    const auto finite = sum < std::numeric_limits<double>::infinity();
    return Lanes::select(finite, log_of_normal<Lanes, true>(sum, tail), sum);
}

// ln Gamma(x) for x > 0, within 2^-46 below 8 and within 2 ulp above; exactly 0 at 1 and 2. Stirling's series;
// arguments below 8 are first moved up by 8.
template <class Lanes>
FG_HD typename Lanes::F64 log_gamma_double(typename Lanes::F64 x) {
    using F64 = typename Lanes::F64;
    const auto small = x < 8.0;
    const F64 pair0 = x * (x + 7.0);  // x (x + 1) ... (x + 7) from its outermost factors
    const F64 product = (pair0 * (pair0 + 6.0)) * ((pair0 + 10.0) * (pair0 + 12.0));
    const F64 moved = Lanes::select(small, x + 8.0, x);
    const F64 inverse = 1.0 / moved, z = inverse * inverse;
    F64 series = z * -0x1.e4286cb0f5398p-6 + 0x1.a41a41a41a41ap-8;
    series = series * z - 0x1.f6ab0d9993c7dp-10;
    series = series * z + 0x1.b951e2b18ff23p-11;
    series = series * z - 0x1.3813813813814p-11;
    series = series * z + 0x1.a01a01a01a01ap-11;
    series = series * z - 0x1.6c16c16c16c17p-9;
    series = series * z + 0x1.5555555555555p-4;
    const F64 far = ((moved - 0.5) * log_double<Lanes>(moved) - moved) + (series * inverse + 0x1.d67f1c864beb5p-1);
    const F64 near = far - log_double<Lanes>(Lanes::select(small, product, F64{} + 1.0));
    return Lanes::select((x == 1.0) | (x == 2.0), F64{}, Lanes::select(small, near, far));
}

}  // namespace fastguide

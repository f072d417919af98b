// Box-Muller: two standard normals from two words.
//
//   u = (w_even + 1) / 2^32 exactly, r = sqrt(-2 ln u), angle = 2 pi w_odd / 2^32
//   (w0, w1) -> z0 = r cos(angle), z1 = r sin(angle);  (w2, w3) -> z2, z3
//
// The radius uses all 32 bits, so |z| reaches sqrt(64 ln 2) = 6.66. A float32 result is within 4 ulp of the exact
// value for every pair of words: the relative error of r is at most 1.86 * 2^-24 over all 2^32 radius words, and that
// of sine and cosine at most 1.84 * 2^-24 over all 2^32 angle words. With the rounding of the product, the bound over
// all mantissas is 3.74 ulp.
#pragma once

#include "math.h"
#include "philox.h"

namespace fastguide {

template <class Real>
struct Pair {
    Real z0, z1;
};

template <class Lanes>
FG_HD Pair<typename Lanes::F32> normal_pair(typename Lanes::U32 radius_word, typename Lanes::U32 angle_word) {
    const typename Lanes::F32 r = Lanes::square_root(minus_two_log<Lanes>(radius_word));
    const SinCos<typename Lanes::F32> turn = sincos_of_turn<Lanes>(angle_word);
    return {r * turn.cos, r * turn.sin};
}

// In double, with the C library. Its arguments are exact up to here: u, and the angle modulo pi/2.
inline Pair<double> normal_pair_double(uint32_t radius_word, uint32_t angle_word) {
    const double r = std::sqrt(-2.0 * std::log((static_cast<double>(radius_word) + 1.0) * 0x1p-32));
    const uint32_t quadrant = (angle_word + 0x20000000u) >> 30;
    const auto residue = static_cast<int32_t>(angle_word - (quadrant << 30));
    const double angle = static_cast<double>(residue) * (0x1.921fb54442d18p+0 * 0x1p-30);
    const double s = std::sin(angle), c = std::cos(angle);
    const bool odd = (quadrant & 1u) != 0;
    const double sin_sign = (quadrant & 2u) != 0 ? -1.0 : 1.0;
    const double cos_sign = ((quadrant + 1u) & 2u) != 0 ? -1.0 : 1.0;
    return {r * (cos_sign * (odd ? s : c)), r * (sin_sign * (odd ? c : s))};
}

}  // namespace fastguide

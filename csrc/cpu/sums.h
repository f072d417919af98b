// Sums in an order that depends only on the number of terms, not on the width of vectors. Term i is added to place
// i modulo kPlaces. Then the second half of the places is added to the first, until one place is left.
#pragma once

#include "simd.h"

namespace fastguide::cpu {

constexpr int kPlaces = 16;
constexpr int kPlaceVectors = kPlaces / kLanes64;

constexpr auto added_up = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };

// Combines all places by op, halving their number each time.
template <class T, class V, class Op>
FG_INLINE T over_places(const V (&places)[kPlaceVectors], const Op& op) {
    V all[kPlaceVectors];
    for (int v = 0; v < kPlaceVectors; ++v) all[v] = places[v];
    for (int half = kPlaceVectors / 2; half > 0; half /= 2)
        for (int v = 0; v < half; ++v) all[v] = op(all[v], all[v + half]);
    T lane[kLanes64];
    store(lane, all[0]);
    for (int half = kLanes64 / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = op(lane[i], lane[i + half]);
    return lane[0];
}

// The sum of fewer than kPlaces terms.
template <int kCount, class R>
FG_INLINE double sum_of_few(const R* terms) {
    double place[kCount];
    for (int k = 0; k < kCount; ++k) place[k] = terms[k];
#pragma GCC unroll 4
    for (int half = kPlaces / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int k = 0; k < half; ++k)
            if (k + half < kCount) place[k] += place[k + half];
    return place[0];
}

// sums[rows] of terms[rows, elements], with fewer than kPlaces elements. Both arrays may start at the same address.
template <class R>
__attribute__((noinline)) void sum_short_rows(double* sums, const R* terms, uint64_t rows, uint64_t elements) {
    switch (elements) {
#define FG_CASE(n)                                                                           \
    case n:                                                                                  \
        for (uint64_t row = 0; row < rows; ++row) sums[row] = sum_of_few<n>(terms + row * n); \
        return;
        FG_CASE(1) FG_CASE(2) FG_CASE(3) FG_CASE(4) FG_CASE(5) FG_CASE(6) FG_CASE(7) FG_CASE(8)
        FG_CASE(9) FG_CASE(10) FG_CASE(11) FG_CASE(12) FG_CASE(13) FG_CASE(14) FG_CASE(15)
#undef FG_CASE
        default: __builtin_unreachable();
    }
}

// The sum of terms[count]. In each place, four terms at a time are added in their own type, and the fours are added in
// double. Reads whole vectors, also past the end.
template <class R>
FG_INLINE double sum_in_fours(const R* terms, uint64_t count) {
    constexpr bool kFloat = std::is_same_v<R, float>;
    constexpr uint64_t kAtOnce = 4 * kPlaces;
    using V = std::conditional_t<kFloat, HalfF32, F64>;
    F64 places[kPlaceVectors] = {};
    // at(k): the vector of terms from k * kLanes64 on
    const auto add_four = [&](const auto& at) __attribute__((always_inline)) {
        for (int k = 0; k < kPlaceVectors; ++k) {
            const V four = (at(k) + at(k + kPlaceVectors)) + (at(k + 2 * kPlaceVectors) + at(k + 3 * kPlaceVectors));
            if constexpr (kFloat) places[k] += widen(four);
            else places[k] += four;
        }
    };
    uint64_t i = 0;
    for (; i + kAtOnce <= count; i += kAtOnce)
        add_four([&](int k) __attribute__((always_inline)) { return load<V>(terms + i + k * kLanes64); });
    if (i < count) {
        add_four([&](int k) __attribute__((always_inline)) {
            const int left = static_cast<int>(count - i) - k * kLanes64;
            if (left <= 0) return V{};
            const V v = load<V>(terms + i + k * kLanes64);
            return left < kLanes64 ? first_lanes(v, left) : v;
        });
    }
    return over_places<double>(places, added_up);
}

}  // namespace fastguide::cpu

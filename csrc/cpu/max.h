// The largest of float32 or float64 values.
#pragma once

#include "simd.h"

namespace fastguide::cpu {

// Returns NaN if any value is NaN.
template <class T>
FG_INLINE double largest(const T* values, int64_t count) {
    constexpr int kLanes = kLanesOf<T>;
    T top = values[0];
    bool nan = false;
    int64_t i = 0;
    if (count >= 4 * kLanes) {
        auto tops = load<Vector<T>>(values);
        auto nans = tops != tops;
        for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
            const auto a = load<Vector<T>>(values + i), b = load<Vector<T>>(values + i + kLanes);
            const auto c = load<Vector<T>>(values + i + 2 * kLanes), d = load<Vector<T>>(values + i + 3 * kLanes);
            nans |= (a != a) | (b != b) | (c != c) | (d != d);
            tops = larger(tops, larger(larger(a, b), larger(c, d)));
        }
        for (int lane = 0; lane < kLanes; ++lane) {
            top = tops[lane] > top ? tops[lane] : top;
            nan |= nans[lane] != 0;
        }
    }
    for (; i < count; ++i) {
        top = values[i] > top ? values[i] : top;
        nan |= values[i] != values[i];
    }
    return nan || top != top ? __builtin_nan("") : static_cast<double>(top);
}

}  // namespace fastguide::cpu

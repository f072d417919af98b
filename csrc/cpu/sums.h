// Sums of a particle's terms, in an order that nothing but their number decides: four terms, kPlaces apart, in their own
// type; each such sum in double in the lane of its place; and the lanes to each other in halves.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace fastguide::cpu {

template <class R>
struct Sum {
    static constexpr bool kFloat = std::is_same_v<R, float>;
    using V = std::conditional_t<kFloat, HalfF32, F64>;
    static constexpr uint64_t kPlaces = 16;
    static constexpr uint64_t kAtOnce = 4 * kPlaces;
    static constexpr int kVectors = static_cast<int>(kPlaces) / kLanes64;
    F64 lanes[kVectors] = {};

    static FG_INLINE V first_lanes(V v, int count) {
        std::conditional_t<kFloat, HalfI32, I64> left{};
        for (int lane = 0; lane < kLanes64; ++lane) left[lane] = count - lane;
        return left > 0 ? v : V{};
    }
    // What four terms of each place come to, kLanes64 places from k * kLanes64 on.
    FG_INLINE void add(int k, F64 four) { lanes[k] += four; }
    // `at(k)`: the terms from k * kLanes64 on.
    template <class At>
    FG_INLINE void add_four(const At& at) {
        for (int k = 0; k < kVectors; ++k) {
            const V four = (at(k) + at(k + kVectors)) + (at(k + 2 * kVectors) + at(k + 3 * kVectors));
            if constexpr (kFloat) add(k, widen(four));
            else add(k, four);
        }
    }
    // With these, before which whole kAtOnce came. Reads a vector at a time, past the end too.
    FG_INLINE double with(const R* terms, uint64_t count) {
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
        for (int half = kVectors / 2; half > 0; half /= 2)
            for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
        double each[kLanes64];
        store(each, lanes[0]);
        for (int half = kLanes64 / 2; half > 0; half /= 2)
            for (int k = 0; k < half; ++k) each[k] += each[k + half];
        return each[0];
    }
};

// The terms of a tile that has one particle's, or of all of its particles one after the other, with room for a vector
// more. Of one particle's some may have been added where they were made.
template <class R>
struct Terms {
    R* at;
    uint64_t summed = 0;
    Sum<R> sum{};
};

}  // namespace fastguide::cpu

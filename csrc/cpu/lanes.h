// Elements a vector at a time, and those that fill none.
#pragma once

#include "simd.h"

namespace fastguide::cpu {

// How lanes are read and written: all of them,
template <class R, bool kStreamed = false>
struct AllLanes {
    static FG_INLINE Vector<R> read(const R* from) { return load<Vector<R>>(from); }
    static FG_INLINE void write(R* to, Vector<R> v) { store(to, v); }
    static FG_INLINE void write_result(R* to, Vector<R> v) {
        if constexpr (kStreamed) stream(to, v);
        else store(to, v);
    }
};

// or the first of them.
template <class R>
struct SomeLanes {
    int count;

    FG_INLINE Vector<R> read(const R* from) const { return load_some<Vector<R>>(from, count); }
    FG_INLINE void write(R* to, Vector<R> v) const { store_some(to, v, count); }
    FG_INLINE void write_result(R* to, Vector<R> v) const { store_some(to, v, count); }
};

// f(i, lanes) for the elements [begin, end), from i on as many as there are lanes. Results that are written past the caches,
// from `result` on, are aligned.
template <class R, class F>
FG_INLINE void each_vector(const R* result, bool past_caches, uint64_t begin, uint64_t end, const F& f) {
    constexpr uint64_t kLanes = kLanesOf<R>;
    uint64_t i = begin;
    if constexpr (std::is_same_v<R, float>) {
        if (past_caches) {
            const uint64_t ahead = -(reinterpret_cast<uintptr_t>(result + i) / sizeof(R)) % kLanes;
            const uint64_t some = ahead < end - i ? ahead : end - i;
            if (some > 0) f(i, SomeLanes<R>{static_cast<int>(some)});
            for (i += some; i + kLanes <= end; i += kLanes) f(i, AllLanes<R, true>{});
        }
    }
    for (; i + kLanes <= end; i += kLanes) f(i, AllLanes<R>{});
    if (i < end) f(i, SomeLanes<R>{static_cast<int>(end - i)});
}

// Whether none of from[count] is NaN or infinite.
template <class R>
FG_INLINE bool all_finite(const R* from, uint64_t count) {
    constexpr uint64_t kLanes = kLanesOf<R>;
    Vector<R> zeros[4] = {};  // 0 times a finite value is 0, and times any other NaN; independent chains
    uint64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
        for (int k = 0; k < 4; ++k) zeros[k] += load<Vector<R>>(from + i + k * kLanes) * R{0};
    const Vector<R> zero = (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]);
    R rest = 0;
    for (uint64_t lane = 0; lane < kLanes; ++lane) rest += zero[lane];
    for (; i < count; ++i) rest += from[i] * R{0};
    return rest == R{0};
}

// A flag that many threads may set at once.
FG_INLINE void set(int32_t* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

}  // namespace fastguide::cpu

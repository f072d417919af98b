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

// Whether a value that a loop has read is NaN or infinite. The loop itself looks: a pass over each tile before it takes a
// fifth of a large step without noise.
template <class R>
struct Watch {
    Vector<R> zeros{};  // 0 times a finite value is 0, and times any other NaN

    FG_INLINE void see(Vector<R> v) { zeros += v * R{0}; }
    // Sets the flag, as many threads may at once.
    FG_INLINE void report(int32_t* not_finite) const {
        const Vector<R> each = zeros;  // a vector whose lanes are indexed stays in memory: not the one of the loop
        R sum = 0;
        for (int lane = 0; lane < kLanesOf<R>; ++lane) sum += each[lane];
        if (sum != R{0}) __atomic_store_n(not_finite, 1, __ATOMIC_RELAXED);
    }
};

// from[count], in a pass of its own.
template <class R>
void watch(const R* from, uint64_t count, int32_t* not_finite) {
    Watch<R> watched;
    each_vector(from, false, 0, count, [&](uint64_t i, const auto& lanes) __attribute__((always_inline)) {
        watched.see(lanes.read(from + i));
    });
    watched.report(not_finite);
}

}  // namespace fastguide::cpu

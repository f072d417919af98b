// Loops over elements, one vector at a time, with the last partial vector.
#pragma once

#include "simd.h"

namespace fastguide::cpu {

// Reads and writes all lanes of a vector.
template <class R, bool kStreamed = false>
struct AllLanes {
    static FG_INLINE Vector<R> read(const R* from) { return load<Vector<R>>(from); }
    static FG_INLINE void write(R* to, Vector<R> v) { store(to, v); }
    static FG_INLINE void write_result(R* to, Vector<R> v) {
        if constexpr (kStreamed) stream(to, v);
        else store(to, v);
    }
};

// Reads and writes only the first `count` lanes.
template <class R>
struct SomeLanes {
    int count;

    FG_INLINE Vector<R> read(const R* from) const { return load_some<Vector<R>>(from, count); }
    FG_INLINE void write(R* to, Vector<R> v) const { store_some(to, v, count); }
    FG_INLINE void write_result(R* to, Vector<R> v) const { store_some(to, v, count); }
};

// Calls f(i, lanes) for the elements [begin, end): elements i, i + 1, ... as many as `lanes` has. `result` is the address
// of element 0 of the result. With `past_caches`, full vectors are written past the caches, at aligned addresses.
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

// Finds out whether a loop has read a NaN or an infinite value. The loop itself checks: a separate pass over each tile
// would take a fifth of a large step without noise.
template <class R>
struct Watch {
    Vector<R> zeros{};  // 0 times a finite value is 0; 0 times any other value is NaN

    FG_INLINE void see(Vector<R> v) { zeros += v * R{0}; }
    // Sets the flag. Many threads may do so at once.
    FG_INLINE void report(int32_t* not_finite) const {
        const Vector<R> each = zeros;  // a copy: indexing lanes puts a vector into memory, and the loop's must not go there
        R sum = 0;
        for (int lane = 0; lane < kLanesOf<R>; ++lane) sum += each[lane];
        if (sum != R{0}) __atomic_store_n(not_finite, 1, __ATOMIC_RELAXED);
    }
};

// Checks from[count] in a separate pass.
template <class R>
void watch(const R* from, uint64_t count, int32_t* not_finite) {
    Watch<R> watched;
    each_vector(from, false, 0, count, [&](uint64_t i, const auto& lanes) __attribute__((always_inline)) {
        watched.see(lanes.read(from + i));
    });
    watched.report(not_finite);
}

}  // namespace fastguide::cpu

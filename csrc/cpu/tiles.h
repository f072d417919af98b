// How the element-wise kernels walk a row-major [rows, elements] array: in tiles that stay in the first-level
// cache, shared out to threads. No result depends on the sharing.
#pragma once

#include "noise.h"

#if defined(FG_THREAD_SANITIZER)
#include <thread>
#endif

// What GCC makes of "omp parallel". Clang would call a library of its own, with threads of its own, beside the libgomp
// that torch has loaded.
extern "C" void GOMP_parallel(void (*member)(void*), void* data, unsigned threads, unsigned flags);

namespace fastguide::cpu::FG_ISA {

constexpr uint64_t kTile = 2048;  // elements
constexpr uint64_t kPastCaches = uint64_t{8} << 20;  // bytes from which results are written past the caches

struct Tiling {
    uint64_t rows, elements;

    uint64_t rows_per_tile() const { return elements < kTile ? kTile / elements : 1; }
    uint64_t tiles_per_row() const { return (elements + kTile - 1) / kTile; }
    uint64_t tiles() const {
        const uint64_t per_tile = rows_per_tile();
        return per_tile > 1 ? (rows + per_tile - 1) / per_tile : rows * tiles_per_row();
    }
    Tile at(uint64_t index) const {
        const uint64_t per_tile = rows_per_tile();
        if (per_tile > 1) {
            const uint64_t row = index * per_tile, left = rows - row;
            const uint64_t taken = left < per_tile ? left : per_tile;
            return {row, taken, 0, taken * elements};
        }
        const uint64_t row = index / tiles_per_row(), begin = (index - row * tiles_per_row()) * kTile;
        const uint64_t left = elements - begin;
        return {row, 1, begin, left < kTile ? left : kTile};
    }
};

// f(begin, end) for pieces of [0, count), on at most `threads` threads. `grain` indices are the least worth a thread.
// Several pieces for each thread, so that one that the machine has put aside holds up nobody for long.
template <class F>
FG_INLINE void share_ranges(uint64_t count, uint64_t grain, int threads, const F& f) {
    const uint64_t most = 8 * static_cast<uint64_t>(threads);
    const uint64_t pieces = count / grain < most ? count / grain : most;
    if (threads <= 1 || pieces <= 1) return f(uint64_t{0}, count);
    const int team = pieces < static_cast<uint64_t>(threads) ? static_cast<int>(pieces) : threads;
    uint64_t next = 0;
    auto work = [&] {
        for (uint64_t piece; (piece = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < pieces;)
            f(count * piece / pieces, count * (piece + 1) / pieces);
    };
#if defined(FG_THREAD_SANITIZER)  // which knows nothing of OpenMP's threads
    std::thread others[8];
    const int helpers = team - 1 < 8 ? team - 1 : 8;
    for (int i = 0; i < helpers; ++i) others[i] = std::thread(work);
    work();
    for (int i = 0; i < helpers; ++i) others[i].join();
#else
    const auto member = [](void* data) noexcept { (*static_cast<decltype(work)*>(data))(); };
    GOMP_parallel(member, &work, static_cast<unsigned>(team), 0);
#endif
}

// f(index) for each of [0, count), shared out in the same way.
template <class F>
FG_INLINE void share_out(uint64_t count, uint64_t grain, int threads, const F& f) {
    share_ranges(count, grain, threads, [&](uint64_t begin, uint64_t end) {
        for (uint64_t i = begin; i < end; ++i) f(i);
        stream_fence();  // what f wrote past the caches
    });
}

constexpr uint64_t kTileGrain = 8;  // 16,384 elements, tens of microseconds

}  // namespace fastguide::cpu::FG_ISA

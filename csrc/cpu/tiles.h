// How the element-wise kernels go through a row-major [rows, elements] array: in tiles that fit the first-level cache,
// divided among threads. No result depends on the number of threads.
#pragma once

#include "noise.h"
#include "scratch.h"

#if defined(FG_THREAD_SANITIZER)
#include <thread>
#endif

// GCC compiles "omp parallel" to this call. Clang would call another library, with another set of threads beside those of
// the libgomp that torch has loaded.
extern "C" void GOMP_parallel(void (*member)(void*), void* data, unsigned threads, unsigned flags);

namespace fastguide::cpu {

constexpr uint64_t kTile = 2048;  // elements
// Results of at least so many bytes are written past the caches, by steps and predict_x0. With 50 MB, steps are 1.1 to 1.3
// times as fast, and predict_x0 into given memory 1.2 to 1.4 times. randn gains nothing.
constexpr uint64_t kPastCaches = uint64_t{8} << 20;

// The tiles of a [rows, elements] array; noise.h defines Tile. `elements` must not be 0.
struct Tiling {
    uint64_t rows, elements;

    uint64_t rows_per_tile() const { return elements < kTile ? kTile / elements : 1; }
    uint64_t tiles_per_row() const { return (elements + kTile - 1) / kTile; }
    uint64_t tiles() const {
        const uint64_t per_tile = rows_per_tile();
        return per_tile > 1 ? (rows + per_tile - 1) / per_tile : rows * tiles_per_row();
    }
    // The number of elements of the largest tile.
    uint64_t largest() const {
        const uint64_t per_tile = rows_per_tile() < rows ? rows_per_tile() : rows;
        return elements < kTile ? per_tile * elements : kTile;
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

// How [0, count) is divided among at most `threads` threads. A thread gets at least `grain` indices. There are several
// pieces for each thread, so that a thread that the system has paused delays the others only little.
struct Sharing {
    uint64_t count, pieces;
    int team;

    Sharing(uint64_t number, uint64_t grain, int threads) : count(number), pieces(1), team(1) {
        if (threads <= 1 || count / grain <= 1) return;
        const uint64_t most = static_cast<uint64_t>(threads);
        pieces = count / grain < 8 * most ? count / grain : 8 * most;
        team = pieces < most ? static_cast<int>(pieces) : threads;
    }
};

// Calls f(begin, end, memory) for each piece. `memory` is the thread's part of the workspace.
template <class F>
FG_INLINE void share_ranges(const Sharing& sharing, const Workspace& workspace, const F& f) {
    const uint64_t count = sharing.count, pieces = sharing.pieces;
    if (pieces == 1) return f(uint64_t{0}, count, workspace.of(0));
    uint64_t next = 0;
    int members = 0;
    auto work = [&] {
        const Memory memory = workspace.of(__atomic_fetch_add(&members, 1, __ATOMIC_RELAXED));
        for (uint64_t piece; (piece = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < pieces;)
            f(count * piece / pieces, count * (piece + 1) / pieces, memory);
    };
#if defined(FG_THREAD_SANITIZER)  // the sanitizer does not understand the threads of OpenMP
    std::thread others[8];
    const int helpers = sharing.team - 1 < 8 ? sharing.team - 1 : 8;
    for (int i = 0; i < helpers; ++i) others[i] = std::thread(work);
    work();
    for (int i = 0; i < helpers; ++i) others[i].join();
#else
    const auto member = [](void* data) noexcept { (*static_cast<decltype(work)*>(data))(); };
    GOMP_parallel(member, &work, static_cast<unsigned>(sharing.team), 0);
#endif
}

// Calls f(begin, end), without scratch memory.
template <class F>
FG_INLINE void share_ranges(uint64_t count, uint64_t grain, int threads, const F& f) {
    const Workspace none({}, 0);
    const auto forget = [&](uint64_t begin, uint64_t end, const Memory&) { f(begin, end); };
    share_ranges(Sharing(count, grain, threads), none, forget);
}

// Calls f(index, memory) for each index in [0, count). Each thread has as much scratch memory as `counted` has counted.
// Before the call, take from `counted` the most that f takes for any index.
template <class F>
FG_INLINE void share_out(uint64_t count, uint64_t grain, int threads, const Memory& counted, const F& f) {
    const Sharing sharing(count, grain, threads);
    const Workspace workspace(counted, sharing.team);
    share_ranges(sharing, workspace, [&](uint64_t begin, uint64_t end, const Memory& memory) {
        for (uint64_t i = begin; i < end; ++i) f(i, memory);
        stream_fence();  // completes the writes past the caches
    });
}

template <class F>
FG_INLINE void share_out(uint64_t count, uint64_t grain, int threads, const F& f) {
    share_out(count, grain, threads, Memory{}, [&](uint64_t i, const Memory&) { f(i); });
}

constexpr uint64_t kTileGrain = 8;  // 16,384 elements, tens of microseconds

}  // namespace fastguide::cpu

// How the element-wise kernels walk a row-major [rows, elements] array: in tiles that stay in the first-level
// cache, shared out to threads. No result depends on the sharing.
#pragma once

#include "noise.h"
#include "scratch.h"

#if defined(FG_THREAD_SANITIZER)
#include <thread>
#endif

// What GCC makes of "omp parallel". Clang would call a library of its own, with threads of its own, beside the libgomp
// that torch has loaded.
extern "C" void GOMP_parallel(void (*member)(void*), void* data, unsigned threads, unsigned flags);

namespace fastguide::cpu {

constexpr uint64_t kTile = 2048;  // elements
// Bytes from which steps and predict_x0 write results past the caches. Of 50 MB, steps are 1.1 to 1.3 times as fast, and
// predict_x0 into memory that is given 1.2 to 1.4 times. randn gained nothing.
constexpr uint64_t kPastCaches = uint64_t{8} << 20;

// The tiles (noise.h has what one is) of such an array that has elements.
struct Tiling {
    uint64_t rows, elements;

    uint64_t rows_per_tile() const { return elements < kTile ? kTile / elements : 1; }
    uint64_t tiles_per_row() const { return (elements + kTile - 1) / kTile; }
    uint64_t tiles() const {
        const uint64_t per_tile = rows_per_tile();
        return per_tile > 1 ? (rows + per_tile - 1) / per_tile : rows * tiles_per_row();
    }
    // The elements of the largest tile.
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

// How [0, count) is shared out to at most `threads` threads. `grain` indices are the least worth a thread. Several
// pieces for each thread, so that one that the machine has put aside holds up nobody for long.
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

// f(begin, end, memory) for the pieces, with each thread's part of the workspace.
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
#if defined(FG_THREAD_SANITIZER)  // which knows nothing of OpenMP's threads
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

// f(begin, end) without memory.
template <class F>
FG_INLINE void share_ranges(uint64_t count, uint64_t grain, int threads, const F& f) {
    const Workspace none({}, 0);
    const auto forget = [&](uint64_t begin, uint64_t end, const Memory&) { f(begin, end); };
    share_ranges(Sharing(count, grain, threads), none, forget);
}

// f(index, memory) for each of [0, count): each thread has as much memory as `counted` counted. What f takes of it,
// take from `counted` before, at the most that any index needs.
template <class F>
FG_INLINE void share_out(uint64_t count, uint64_t grain, int threads, const Memory& counted, const F& f) {
    const Sharing sharing(count, grain, threads);
    const Workspace workspace(counted, sharing.team);
    share_ranges(sharing, workspace, [&](uint64_t begin, uint64_t end, const Memory& memory) {
        for (uint64_t i = begin; i < end; ++i) f(i, memory);
        stream_fence();  // what f wrote past the caches
    });
}

template <class F>
FG_INLINE void share_out(uint64_t count, uint64_t grain, int threads, const F& f) {
    share_out(count, grain, threads, Memory{}, [&](uint64_t i, const Memory&) { f(i); });
}

constexpr uint64_t kTileGrain = 8;  // 16,384 elements, tens of microseconds

}  // namespace fastguide::cpu

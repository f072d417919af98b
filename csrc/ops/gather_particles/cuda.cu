// state[b, k] = state[b, ancestors[b, k]] in place, for particles of any number of bytes.
//
// The host does not read the ancestors. Every call makes the same launches, so a graph can capture them:
//
//   look      finds what each row needs: nothing, copies in any order, or an exchange; and whether an ancestor is out of
//             range
//   move      handles rows in which every survivor keeps its place (a[a[k]] == a[k]), as in those that
//             resample(sorted=False) returns. No particle is both read and written, so all copies run at once
//   exchange  handles the other rows, through a workspace much smaller than the state. As many columns as fit are packed
//             in their new order; once all blocks have read theirs, the columns are written back. It returns at once if
//             there is no such row. It is one cooperative launch: a pair of launches for each part of the columns would
//             cost several microseconds even with nothing to do
//
// Another stream may write to the ancestors meanwhile. So `move` and `exchange` check again: a particle whose ancestor is
// out of range stays, whatever `look` found.
#include "../../common/binding.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../../common/particles.h"
#include "../../cuda/check.cuh"

namespace fastguide::cuda {
namespace detail {

// The arguments of a call. All memory is on the current device.
struct Gathering {
    const void* ancestors;  // [rows, particles], int64 if `wide`, else int32
    bool wide;
    uint64_t rows, particles;
    uint32_t* flags;  // [rows + 2]; afterwards the last is 0 unless an ancestor is out of range
    void* workspace;  // aligned to 16 bytes
    uint64_t workspace_bytes;
};

constexpr unsigned kThreads = 256;
constexpr unsigned kExchangeThreads = 512;
constexpr uint64_t kMaxBlocks = 1 << 11;  // a few times what a GPU runs at once; more would cost time if nothing moves
constexpr unsigned kLooks = 4;            // ancestors that a thread reads before its block combines the results
constexpr unsigned kInFlight = 4;         // units that a thread loads before it stores the first
constexpr unsigned kMaxStates = 8;        // states that one launch moves
constexpr uint64_t kMaxUnit = 16, kMaxLanes = 32;

enum : uint32_t { kMoves = 1, kEntangled = 2 };

template <class Index>
struct Map {
    const Index* ancestors;
    uint64_t rows, particles;
    uint32_t* flags;  // one for each row, one for all rows, and whether an ancestor is out of range

    __device__ uint32_t of_all() const { return flags[rows]; }
    __device__ bool outside() const { return flags[rows + 1] != 0; }
};

template <class Index>
__global__ void __launch_bounds__(kThreads) look_kernel(const Map<Index> map, uint64_t tiles_of_row) {
    for (uint64_t tile = blockIdx.x; tile < map.rows * tiles_of_row; tile += gridDim.x) {
        const uint64_t row = tile / tiles_of_row, begin = tile % tiles_of_row * (kLooks * blockDim.x) + threadIdx.x;
        const Index* const a = map.ancestors + row * map.particles;
        bool moves = false, entangled = false, outside = false;
#pragma unroll
        for (unsigned j = 0; j < kLooks; ++j) {
            const uint64_t k = begin + j * blockDim.x;
            if (k >= map.particles) continue;
            const auto ancestor = static_cast<uint64_t>(a[k]);  // a negative one is larger than any
            if (ancestor == k) continue;
            moves = true;
            if (ancestor >= map.particles)
                outside = true;
            else
                entangled = entangled || static_cast<uint64_t>(a[ancestor]) != ancestor;
        }
        if (!__syncthreads_or(moves)) continue;
        const uint32_t found = __syncthreads_or(entangled) ? kMoves | kEntangled : kMoves;
        const int any_outside = __syncthreads_or(outside);
        if (threadIdx.x == 0) {
            atomicOr(map.flags + row, found);
            atomicOr(map.flags + map.rows, found);
            if (any_outside) map.flags[map.rows + 1] = 1;
        }
    }
}

// --- states -------------------------------------------------------------------------------------------------

struct Stride {
    uint64_t places, particle;  // places: among the particles of all rows; particle: within a row
    uint32_t row, column;
};

// Particles consist of units, as wide as their size and address allow. A group of lanes of a warp moves a column: one unit
// for each lane. The group takes every `stride`-th column of the flat index (row, particle, column).
struct State {
    void* data;
    uint64_t units;  // in a particle
    Stride stride;
    uint32_t columns;
    unsigned unit_bytes, log2_lanes;
};

struct Batch {
    State states[kMaxStates];
    unsigned count;
};

// Calls f(Unit{}) with the unsigned type of `bytes` bytes.
template <class F>
__device__ void with_unit(unsigned bytes, const F& f) {
    switch (bytes) {
        case 1: return f(uint8_t{});
        case 2: return f(uint16_t{});
        case 4: return f(uint32_t{});
        case 8: return f(uint2{});
        default: return f(uint4{});
    }
}

template <class Unit, class Index>
__device__ void move_units(const Map<Index>& map, const State& state) {
    using Word = std::make_unsigned_t<Index>;
    Unit* const data = static_cast<Unit*>(state.data);
    const unsigned lane = threadIdx.x & ((1u << state.log2_lanes) - 1);
    const uint64_t end = map.rows * map.particles;
    const uint64_t group = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) >> state.log2_lanes;
    uint64_t place = group / state.columns, particle = place % map.particles;
    auto row = static_cast<uint32_t>(place / map.particles), column = static_cast<uint32_t>(group % state.columns);
    while (place < end) {
        uint64_t to[kInFlight];
        Index back[kInFlight];  // the particle's index minus its ancestor's; 0 if there is nothing to do
#pragma unroll
        for (unsigned j = 0; j < kInFlight; ++j) {
            const bool live = place < end;
            const uint32_t flags = live ? map.flags[row] : 0;
            const Index ancestor = live ? map.ancestors[place] : 0;
            const uint64_t unit = (static_cast<uint64_t>(column) << state.log2_lanes) + lane;
            const bool inside = static_cast<Word>(ancestor) < static_cast<Word>(map.particles);
            const bool wanted = (flags == kMoves) & (unit < state.units) & inside;  // no branch between the loads
            to[j] = place * state.units + unit;
            back[j] = (static_cast<Index>(particle) - ancestor) * static_cast<Index>(wanted);

            place += state.stride.places;
            particle += state.stride.particle;
            row += state.stride.row;
            column += state.stride.column;
            if (column >= state.columns) {
                column -= state.columns;
                ++place;
                ++particle;
            }
            if (particle >= map.particles) {
                particle -= map.particles;
                ++row;
            }
        }
        Unit units[kInFlight];
#pragma unroll
        for (unsigned j = 0; j < kInFlight; ++j)
            if (back[j] != 0) units[j] = data[to[j] - static_cast<uint64_t>(back[j]) * state.units];
#pragma unroll
        for (unsigned j = 0; j < kInFlight; ++j)
            if (back[j] != 0) data[to[j]] = units[j];
    }
}

template <class Index>  // 64 registers: only half of the possible threads run, but each has several loads in flight
__global__ void __launch_bounds__(kThreads, 4) move_kernel(const Map<Index> map, const __grid_constant__ Batch batch) {
    if (map.of_all() == 0 || map.outside()) return;
    const State& state = batch.states[blockIdx.y];
    with_unit(state.unit_bytes, [&](auto unit) { move_units<decltype(unit)>(map, state); });
}

// --- rows that need an order --------------------------------------------------------------------------------

__device__ inline bool any_entangled(const uint32_t* flags, uint64_t rows) {
    bool found = false;
    for (uint64_t b = threadIdx.x; b < rows; b += kExchangeThreads) found = found || (flags[b] & kEntangled) != 0;
    return __syncthreads_or(found) != 0;
}

// Takes as many rows at a time as fit the workspace. If not even one row fits, takes as many units of each particle as fit.
// The whole grid waits between pack and unpack. The next pack need not wait: it does not read what this unpack writes, and
// each cell of the workspace belongs to one thread.
template <class Unit, class Index>
__device__ void exchange_units(const Map<Index>& map, const State& state, Unit* __restrict__ workspace, uint64_t room) {
    Unit* const data = static_cast<Unit*>(state.data);
    const uint64_t most_width = min(state.units, room / map.particles);
    const uint64_t most_rows = max(uint64_t{1}, room / map.particles / state.units);
    for (uint64_t first_row = 0; first_row < map.rows; first_row += most_rows) {
        const uint64_t rows = min(most_rows, map.rows - first_row);
        if (!any_entangled(map.flags + first_row, rows)) continue;
        for (uint64_t first = 0; first < state.units; first += most_width) {
            const uint64_t width = min(most_width, state.units - first);
            // Calls f(its cell, the unit, its ancestor's unit) for every unit that moves.
            const auto each = [&](const auto& f) {
                const uint64_t threads = static_cast<uint64_t>(gridDim.x) * kExchangeThreads;
                uint64_t cell = static_cast<uint64_t>(blockIdx.x) * kExchangeThreads + threadIdx.x;
                for (; cell < rows * map.particles * width; cell += threads) {
                    const uint64_t place = first_row * map.particles + cell / width;
                    const uint64_t row = place / map.particles, particle = place % map.particles;
                    if ((map.flags[row] & kEntangled) == 0) continue;
                    const auto ancestor = static_cast<uint64_t>(map.ancestors[place]);
                    if (ancestor == particle || ancestor >= map.particles) continue;
                    Unit* const units = data + first + cell % width;
                    f(workspace[cell], units[place * state.units], units[(place - particle + ancestor) * state.units]);
                }
            };
            each([](Unit& packed, const Unit&, const Unit& from) { packed = from; });
            cooperative_groups::this_grid().sync();
            each([](const Unit& packed, Unit& to, const Unit&) { to = packed; });
        }
    }
}

template <class Index>
__global__ void __launch_bounds__(kExchangeThreads, 2)
    exchange_kernel(const Map<Index> map, const __grid_constant__ Batch batch, void* workspace, uint64_t bytes) {
    if ((map.of_all() & kEntangled) == 0 || map.outside()) return;
    for (unsigned s = 0; s < batch.count; ++s) {
        const State& state = batch.states[s];
        with_unit(state.unit_bytes, [&](auto unit) {
            exchange_units(map, state, static_cast<decltype(unit)*>(workspace), bytes / sizeof(unit));
        });
        if (s + 1 < batch.count) cooperative_groups::this_grid().sync();  // with other units, cells have other threads
    }
}

// --- on the host --------------------------------------------------------------------------------------------

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

State layout(const ParticleArray& array) {
    State state{};
    state.data = array.data;
    uint64_t unit = kMaxUnit;
    while ((reinterpret_cast<uintptr_t>(array.data) | array.bytes) % unit != 0) unit /= 2;
    state.unit_bytes = static_cast<unsigned>(unit);
    state.units = array.bytes / unit;
    while (uint64_t{1} << state.log2_lanes < std::min(state.units, kMaxLanes)) ++state.log2_lanes;
    state.columns = static_cast<uint32_t>(ceil_div(state.units, uint64_t{1} << state.log2_lanes));
    return state;
}

template <class Index>
void move_batch(const Map<Index>& map, Batch& batch, const Gathering& call, cudaStream_t queue) {
    uint64_t blocks = 1, cells = 1;
    for (unsigned s = 0; s < batch.count; ++s) {
        const State& state = batch.states[s];
        const uint64_t threads = map.rows * map.particles * (uint64_t{state.columns} << state.log2_lanes);
        blocks = std::max(blocks, ceil_div(threads, kThreads * kInFlight));
        cells = std::max(cells, map.rows * map.particles * state.units);
        if (call.workspace_bytes < map.particles * state.unit_bytes)
            throw std::invalid_argument("workspace must hold " + std::to_string(map.particles * state.unit_bytes) +
                                        " bytes, got " + std::to_string(call.workspace_bytes));
    }
    blocks = std::min(blocks, kMaxBlocks);
    for (unsigned s = 0; s < batch.count; ++s) {
        State& state = batch.states[s];
        const uint64_t groups = blocks * kThreads >> state.log2_lanes, places = groups / state.columns;
        state.stride = {places, places % map.particles, static_cast<uint32_t>(places / map.particles),
                        static_cast<uint32_t>(groups % state.columns)};
    }
    launch("gather_particles: move", move_kernel<Index>, dim3(static_cast<unsigned>(blocks), batch.count), kThreads,
           queue, map, batch);
    launch_together("gather_particles: exchange", exchange_kernel<Index>, ceil_div(cells, kExchangeThreads),
                    kExchangeThreads, queue, map, batch, call.workspace, call.workspace_bytes);
}

// One launch moves its states at the same time, so they may not overlap. Overlapping states go into separate launches, in
// order. So a state given twice is moved twice.
bool overlaps(const Batch& batch, const State& state, uint64_t particles) {
    const auto end = [&](const State& s) {
        return static_cast<const char*>(s.data) + particles * s.units * s.unit_bytes;
    };
    return std::any_of(batch.states, batch.states + batch.count,
                       [&](const State& other) { return state.data < end(other) && other.data < end(state); });
}

template <class Index>
void gather(const Gathering& call, const std::vector<ParticleArray>& states, cudaStream_t queue) {
    const Map<Index> map{static_cast<const Index*>(call.ancestors), call.rows, call.particles, call.flags};
    unsigned threads = 32;
    while (threads < kThreads && threads * kLooks < map.particles) threads *= 2;
    const uint64_t tiles = ceil_div(map.particles, threads * kLooks);
    const uint64_t blocks = std::min(map.rows * tiles, kMaxBlocks);
    launch("gather_particles: look", look_kernel<Index>, static_cast<unsigned>(blocks), threads, queue, map, tiles);

    Batch batch{};
    for (const ParticleArray& array : states) {
        if (array.bytes == 0) continue;
        const State state = layout(array);
        if (batch.count == kMaxStates || overlaps(batch, state, map.rows * map.particles)) {
            move_batch(map, batch, call, queue);
            batch.count = 0;
        }
        batch.states[batch.count++] = state;
    }
    if (batch.count > 0) move_batch(map, batch, call, queue);
}

// rows, particles, states. Returns the bytes of workspace for gather_particles: the largest of 1/64 of a state, 2 MiB, and
// 16 bytes for each particle of a row; but not more than the state.
PyObject* call_workspace(Arguments& in) {
    const uint64_t rows = in.integer(), particles = in.integer();
    uint64_t most = 0;
    for (const ParticleArray& state : read_states(in)) {
        const uint64_t all = rows * particles * state.bytes;
        const uint64_t column = particles * std::min(state.bytes, kMaxUnit);
        most = std::max(most, std::min(all, std::max({all / 64, column, uint64_t{1} << 21})));
    }
    return PyLong_FromUnsignedLongLong(most);
}

// ancestors, whether they are int64, rows, particles, states, flags, workspace, its bytes, CUDA stream. Returns at once.
// Throws if a launch failed, or if the workspace cannot hold one unit of each particle of a row.
PyObject* call_gather_particles(Arguments& in) {
    Gathering call{};
    call.ancestors = in.pointer("ancestors"), call.wide = in.flag();
    call.rows = in.integer(), call.particles = in.integer();
    if (!call.wide) check_below("particles", call.particles, uint64_t{1} << 31);
    check_below("rows", call.rows, uint64_t{1} << 32);
    in.expect_memory(call.rows * (call.particles > 0));
    const std::vector<ParticleArray> states = read_states(in);
    expect_memory(states, call.rows, call.particles);
    call.flags = in.pointer<uint32_t>("flags"), call.workspace = in.pointer("workspace");
    call.workspace_bytes = in.integer();
    const auto queue = in.pointer<CUstream_st>("cuda_stream");
    without_gil([&] {
        check(cudaMemsetAsync(call.flags, 0, (call.rows + 2) * sizeof(uint32_t), queue), "gather_particles");
        if (call.rows == 0 || call.particles == 0) return;
        call.wide ? gather<int64_t>(call, states, queue) : gather<int32_t>(call, states, queue);
    });
    return none();
}

static Binding bindings[] = {
    {"gather_workspace", fastcall<call_workspace, 3>, "The bytes of workspace for gather_particles of these states."},
    {"gather_particles", fastcall<call_gather_particles, 9>,
     "Move the particles of states to where ancestors say. The last of flags (uint32 [rows + 2]) is 0 afterwards, or else "
     "an ancestor is out of range and nothing moved."},
};

}  // namespace detail
}  // namespace fastguide::cuda

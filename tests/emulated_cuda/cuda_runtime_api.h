// Replaces CUDA's headers, so that the CUDA sources of csrc compile as plain C++ and run on the host: for tests without a
// GPU. It has only what these sources use.
//
// A launch has finished when it returns. Blocks run one after the other, in a shuffled order. The blocks of a cooperative
// launch exist at the same time, and each runs to the next barrier of the grid. The threads of a block are coroutines of
// one system thread. Each runs to the next barrier. The order alternates between first thread first and last thread
// first, so a read that relies on an earlier write without a barrier fails in one of them. Every run has the same orders.
//
// A launch fails if some threads do not reach a barrier, or wait at different barriers; if a launch that is not
// cooperative has a barrier of the grid; or if CUB's temporary storage is used again without a barrier in between. Not
// found: races between two barriers that have no effect in either order, and mistakes that need warps to run in step.
//
// Shared memory is the thread-local memory of the library. It is poisoned for each block, and saved and restored for
// blocks that exist at the same time.
#pragma once

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719,
    cudaErrorCooperativeLaunchTooLarge = 720,
};
using cudaStream_t = struct CUstream_st*;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulated {

constexpr std::size_t kStackBytes = 1 << 16;
constexpr unsigned kMaxThreads = 1024;
constexpr char kPoison = 0x5A;  // fills memory that nobody has written
constexpr int kProcessors = 3, kBlocksOnEach = 2;  // a small device, so that loops over the grid repeat

struct Line {  // the source line where a thread waits
    int number;
};

struct Block;
struct Coroutine;

struct Thread {
    Block* block;
    unsigned index;
    Coroutine* waiting = nullptr;  // set while it waits at a barrier
    bool whole_grid = false;
    int line = 0;
};

struct Block {
    uint3 index;
    std::vector<Thread> threads{};
    bool begun = false;
    unsigned barriers = 0;                     // barriers of the kernel so far
    std::map<const void*, unsigned> used{};    // CUB's temporary storage: `barriers` when it was used last
    std::vector<std::max_align_t> exchange{};  // values that threads exchange in a collective operation
    std::vector<char> shared{};                // saved shared memory, while another block runs
};

struct Coroutine {
    ucontext_t begin;
    jmp_buf at;  // where it continues; swapcontext would make a system call at each switch
    bool has_begun = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Thread* thread = nullptr;
};

struct SharedMemory {
    char* at;
    std::size_t bytes;
};

// The thread-local memory of this library, for this thread.
inline SharedMemory find_shared_memory() {
    static thread_local char one_of_it;
    SharedMemory found{&one_of_it, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* library, std::size_t, void* result) {
            auto& memory = *static_cast<SharedMemory*>(result);
            char* const begin = static_cast<char*>(library->dlpi_tls_data);
            for (int i = 0; i < library->dlpi_phnum; ++i) {
                const auto& segment = library->dlpi_phdr[i];
                if (segment.p_type != PT_TLS || memory.at < begin || memory.at >= begin + segment.p_memsz) continue;
                memory = {begin, segment.p_memsz};
                return 1;
            }
            return 0;
        },
        &found);
    return found;
}

struct Machine {
    jmp_buf scheduler;
    std::vector<std::unique_ptr<Coroutine>> pool;
    std::vector<Coroutine*> idle;
    Coroutine* running = nullptr;
    const std::function<void()>* kernel = nullptr;
    bool cooperative = false;
    std::vector<Thread*> order;  // from `next` on, threads that have not started
    std::size_t next = 0;
    SharedMemory shared{};
    Block* inside = nullptr;  // the block that shared memory belongs to now
    std::string failure;
};

inline Machine machine;

inline Thread& this_thread() { return *machine.running->thread; }

inline void enter(Thread& thread) {
    machine.running->thread = &thread;
    if (machine.inside != thread.block) {
        if (machine.inside) std::memcpy(machine.inside->shared.data(), machine.shared.at, machine.shared.bytes);
        std::memcpy(machine.shared.at, thread.block->shared.data(), machine.shared.bytes);
        machine.inside = thread.block;
    }
    threadIdx = {thread.index, 0, 0};
    blockIdx = thread.block->index;
}

inline void leave() {
    if (_setjmp(machine.running->at) == 0) _longjmp(machine.scheduler, 1);
}

inline void fail(const std::string& what) {
    machine.failure = what;
    leave();  // does not return
}

// The body of a coroutine: runs threads that have not started, until one waits at a barrier.
inline void work() {
    for (;;) {
        while (machine.next < machine.order.size()) {
            enter(*machine.order[machine.next++]);
            (*machine.kernel)();
        }
        machine.idle.push_back(machine.running);
        leave();
    }
}

inline void resume(Coroutine* coroutine) {
    machine.running = coroutine;
    if (_setjmp(machine.scheduler) != 0) return;
    if (coroutine->has_begun) _longjmp(coroutine->at, 1);
    coroutine->has_begun = true;
    setcontext(&coroutine->begin);
}

inline Coroutine* a_coroutine() {
    if (machine.idle.empty()) {
        machine.pool.push_back(std::make_unique<Coroutine>());
        Coroutine* const made = machine.pool.back().get();
        getcontext(&made->begin);
        made->begin.uc_stack.ss_sp = made->stack.get();
        made->begin.uc_stack.ss_size = kStackBytes;
        makecontext(&made->begin, work, 0);
        return made;
    }
    Coroutine* const found = machine.idle.back();
    machine.idle.pop_back();
    return found;
}

inline void wait(bool whole_grid, Line line) {
    if (whole_grid && !machine.cooperative) fail("a barrier of the grid in a launch that is not cooperative");
    Thread& thread = this_thread();
    thread.waiting = machine.running;
    thread.whole_grid = whole_grid;
    thread.line = line.number;
    leave();
    thread.waiting = nullptr;
    enter(thread);
}

// Whether all of these threads wait at the same barrier: none has ended, and none waits elsewhere.
inline bool together(const std::vector<Thread>& threads) {
    return std::all_of(threads.begin(), threads.end(), [&](const Thread& t) {
        return t.waiting && t.whole_grid == threads[0].whole_grid && t.line == threads[0].line;
    });
}

inline std::vector<Thread*> in_order(Block& block, bool descending) {
    std::vector<Thread*> found;
    for (Thread& thread : block.threads) found.push_back(&thread);
    if (descending) std::reverse(found.begin(), found.end());
    return found;
}

// Runs a block, from its beginning or from a barrier of the grid, until it has ended or waits for the grid.
inline void advance(Block& block, bool& descending) {
    if (!block.begun) {
        block.begun = true;
        machine.order = in_order(block, descending);
        machine.next = 0;
        while (machine.next < machine.order.size() && machine.failure.empty()) resume(a_coroutine());
    } else {
        for (Thread* thread : in_order(block, descending))
            if (machine.failure.empty()) resume(thread->waiting);
    }
    while (machine.failure.empty()) {
        const auto waiting =
            std::find_if(block.threads.begin(), block.threads.end(), [](const Thread& t) { return t.waiting; });
        if (waiting == block.threads.end()) return;
        if (!together(block.threads)) {
            machine.failure =
                "the barrier of line " + std::to_string(waiting->line) + " is not reached by every thread of its block";
            return;
        }
        if (waiting->whole_grid) return;
        descending = !descending;
        for (Thread* thread : in_order(block, descending))
            if (machine.failure.empty()) resume(thread->waiting);
    }
}

// Runs blocks that exist at the same time until they end or one fails. Each runs as far as it can without the others.
inline void run(std::vector<Block*> blocks, unsigned threads, bool descending) {
    for (Block* block : blocks) {
        for (unsigned i = 0; i < threads; ++i) block->threads.push_back({block, i});
        block->shared.assign(machine.shared.bytes, kPoison);
    }
    machine.inside = nullptr;
    while (machine.failure.empty()) {
        for (Block* block : blocks)
            if (machine.failure.empty()) advance(*block, descending);
        const auto waiting =
            std::count_if(blocks.begin(), blocks.end(), [](const Block* b) { return b->threads[0].waiting; });
        if (waiting == 0) return;
        if (waiting != static_cast<std::ptrdiff_t>(blocks.size()))
            machine.failure = "a barrier of the grid is not reached by every block";
        descending = !descending;
        std::reverse(blocks.begin(), blocks.end());
    }
}

inline cudaError_t launch(dim3 grid, dim3 block, bool cooperative, const std::function<void()>& kernel) {
    const auto empty = [](dim3 d) { return d.x == 0 || d.y == 0 || d.z == 0; };
    if (empty(grid) || empty(block) || block.x > kMaxThreads || block.y > 1 || block.z > 1 || grid.x >= 1u << 31 ||
        grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    std::vector<Block> blocks;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({{x, y, z}});
    if (cooperative && blocks.size() > kProcessors * kBlocksOnEach) return cudaErrorCooperativeLaunchTooLarge;

    std::mt19937 random(static_cast<unsigned>(blocks.size()));
    std::shuffle(blocks.begin(), blocks.end(), random);
    gridDim = grid;
    blockDim = block;
    machine.kernel = &kernel;
    machine.cooperative = cooperative;
    machine.failure.clear();
    machine.shared = find_shared_memory();
    const std::vector<char> before(machine.shared.at, machine.shared.at + machine.shared.bytes);
    std::vector<Block*> all;
    for (Block& each : blocks) all.push_back(&each);
    if (cooperative) {
        run(all, block.x, random() & 1);
    } else {
        for (Block* each : all)
            if (machine.failure.empty()) {
                run({each}, block.x, random() & 1);
                *each = {};  // frees its memory: there may be many blocks
            }
    }
    std::copy(before.begin(), before.end(), machine.shared.at);  // restores other thread-local variables too
    if (machine.failure.empty()) return cudaSuccess;
    machine.pool.clear();  // some stopped in the middle of a kernel
    machine.idle.clear();
    return cudaErrorLaunchFailure;
}

// The values of all threads of the block, in order. Every thread must call this.
template <class T>
std::vector<T> exchange(const T& value, Line line) {
    static_assert(std::is_trivially_copyable_v<T>);
    auto& shown = this_thread().block->exchange;
    const std::size_t bytes = blockDim.x * sizeof(T);
    if (shown.size() * sizeof(std::max_align_t) < bytes) shown.resize(bytes / sizeof(std::max_align_t) + 1);
    std::memcpy(reinterpret_cast<char*>(shown.data()) + threadIdx.x * sizeof(T), &value, sizeof(T));
    wait(false, line);
    std::vector<T> values(blockDim.x);
    std::memcpy(values.data(), shown.data(), bytes);
    wait(false, line);
    return values;
}

// A barrier of the kernel itself. After it, CUB's temporary storage may be used again.
inline void count_barrier() {
    if (threadIdx.x == 0) ++this_thread().block->barriers;
}

}  // namespace emulated

// --- in kernels ---------------------------------------------------------------------------------------------

inline void __syncthreads(emulated::Line line = {__builtin_LINE()}) {
    emulated::count_barrier();
    emulated::wait(false, line);
}

inline int __syncthreads_count(int predicate, emulated::Line line = {__builtin_LINE()}) {
    emulated::count_barrier();
    const auto all = emulated::exchange<int>(predicate != 0, line);
    return std::accumulate(all.begin(), all.end(), 0);
}

inline int __syncthreads_or(int predicate, emulated::Line line = {__builtin_LINE()}) {
    return __syncthreads_count(predicate, line) > 0;
}

inline int __syncthreads_and(int predicate, emulated::Line line = {__builtin_LINE()}) {
    return __syncthreads_count(predicate, line) == static_cast<int>(blockDim.x);
}

using std::max;
using std::min;

template <class T>
T __ldg(const T* at) {
    return *at;
}

inline void __threadfence() {}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T atomicAdd(T* at, std::common_type_t<T> value) {
    return std::exchange(*at, static_cast<T>(*at + value));
}

template <class T>
T atomicMax(T* at, std::common_type_t<T> value) {
    return std::exchange(*at, std::max(*at, value));
}

template <class T>
T atomicOr(T* at, std::common_type_t<T> value) {
    return std::exchange(*at, static_cast<T>(*at | value));
}

// --- on the host --------------------------------------------------------------------------------------------

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
union cudaLaunchAttributeValue {
    int cooperative;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    bool cooperative = false;
    for (unsigned i = 0; i < config->numAttrs; ++i) cooperative = cooperative || config->attrs[i].val.cooperative;
    const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    const auto call = [&] { std::apply(kernel, values); };
    if (config->dynamicSmemBytes > 0) return cudaErrorInvalidValue;
    return emulated::launch(config->gridDim, config->blockDim, cooperative, call);
}

inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
        case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    }
    return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? emulated::machine.failure.c_str() : cudaGetErrorName(error);
}

inline cudaError_t cudaMemsetAsync(void* at, int value, std::size_t bytes, cudaStream_t) {
    std::memset(at, value, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = emulated::kProcessors;
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
    *blocks = emulated::kBlocksOnEach;
    return cudaSuccess;
}

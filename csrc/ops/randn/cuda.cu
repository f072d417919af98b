#include "../../common/binding.h"

#include <algorithm>

#include "../../common/normal.h"
#include "../../cuda/check.cuh"
#include "../../cuda/counter.cuh"

namespace fastguide::cuda {
namespace detail {  // not anonymous: nvcc would put a hash of the command line into its names

constexpr unsigned kThreads = 256;
constexpr uint64_t kMaxBlocks = 1u << 14;  // for larger arrays a thread takes several units, with one division in all

// A thread's unit of work: as many groups of four normals as 16 bytes hold.
template <class T>
struct alignas(16) Unit {
    static constexpr int groups = 4 / static_cast<int>(sizeof(T));
    T z[4 * groups];
};

struct Position {
    uint64_t row, group;
};

template <class T>
__device__ void four_normals(const RandnShape& shape, Position at, T* z) {
    const Words4 w = philox(philox_counter(shape.first_particle + at.row, static_cast<uint32_t>(at.group),
                                           shape.stream, shape.step),
                            static_cast<uint32_t>(shape.seed), static_cast<uint32_t>(shape.seed >> 32));
    const Pair<float> first = normal_pair<OneLane>(w.w0, w.w1);
    const Pair<float> second = normal_pair<OneLane>(w.w2, w.w3);
    z[0] = round_to<T>(first.z0);
    z[1] = round_to<T>(first.z1);
    z[2] = round_to<T>(second.z0);
    z[3] = round_to<T>(second.z1);
}

// Units of the flat index row * groups + group. kWide: elements % 4 == 0 and `out` is aligned to 16 bytes. Then unit u is
// at element 4 * Unit::groups * u, even if it spans two rows.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    randn_kernel(T* __restrict__ out, const RandnShape given, const CounterOnDevice counter, uint64_t groups,
                 Position stride) {
    constexpr int kGroups = Unit<T>::groups;
    const RandnShape shape = with_counter(given, counter);
    const uint64_t total = shape.particles * groups;
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * kThreads * kGroups;
    uint64_t index = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) * kGroups;
    Position at{index / groups, index % groups};
    for (; index < total; index += step) {
        Unit<T> unit;
        Position each = at;
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
            const bool live = index + j < total;
            if (live) four_normals(shape, each, unit.z + 4 * j);
            if (live && (!kWide || index + kGroups > total)) {
                T* to = out + each.row * shape.elements + 4 * each.group;
                const uint64_t left = shape.elements - 4 * each.group;
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (static_cast<uint64_t>(i) < left) to[i] = unit.z[4 * j + i];
            }
            if (++each.group == groups) {
                each.group = 0;
                ++each.row;
            }
        }
        if (kWide && index + kGroups <= total)
            *reinterpret_cast<uint4*>(out + 4 * index) = *reinterpret_cast<const uint4*>(&unit);
        at.row += stride.row;
        at.group += stride.group;
        if (at.group >= groups) {
            at.group -= groups;
            ++at.row;
        }
    }
}

template <class T>
void randn_as(void* data, const RandnShape& shape, const CounterOnDevice& counter, cudaStream_t queue) {
    T* out = static_cast<T*>(data);
    const uint64_t groups = shape.groups_per_particle();
    const uint64_t per_block = static_cast<uint64_t>(kThreads) * Unit<T>::groups;
    const uint64_t blocks = std::min((shape.particles * groups + per_block - 1) / per_block, kMaxBlocks);
    const Position stride{blocks * per_block / groups, blocks * per_block % groups};
    const bool wide = shape.elements % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    const auto kernel = wide ? randn_kernel<T, true> : randn_kernel<T, false>;
    launch("randn", kernel, static_cast<unsigned>(blocks), kThreads, queue, out, shape, counter, groups, stride);
}

__global__ void philox_kernel(uint32_t* out, Words4 counter, uint32_t key0, uint32_t key1) {
    const Words4 w = philox(counter, key0, key1);
    out[0] = w.w0;
    out[1] = w.w1;
    out[2] = w.w2;
    out[3] = w.w3;
}

// out, its dtype, particles, elements, seed, step, stream, first_particle, addresses of a seed and of a step on the device
// (or 0) that replace the numbers, CUDA stream. Returns at once.
PyObject* call_randn(Arguments& in) {
    void* const out = in.pointer("out");
    const Dtype dtype = in.dtype(Dtype::bfloat16);
    const uint64_t particles = in.integer(), elements = in.integer();
    const RandnShape shape = in.counter(particles, elements);
    const bool some = particles > 0 && elements > 0;
    in.expect_memory(some);
    const CounterOnDevice counter = read_counter(in);
    const auto queue = in.pointer<CUstream_st>("cuda_stream");
    without_gil([&] {
        if (!some) return;
        if (dtype == Dtype::float32) randn_as<float>(out, shape, counter, queue);
        else if (dtype == Dtype::float16) randn_as<Half>(out, shape, counter, queue);
        else randn_as<BFloat16>(out, shape, counter, queue);
    });
    return none();
}

// four words on the device, counter, key, CUDA stream. For tests of the known answers on the hardware.
PyObject* call_philox(Arguments& in) {
    const auto out = in.pointer<uint32_t>("out");
    const auto [counter, key0, key1] = read_philox(in);
    launch("philox", philox_kernel, 1, 1, in.pointer<CUstream_st>("cuda_stream"), out, counter, key0, key1);
    return none();
}

static Binding bindings[] = {
    {"randn", fastcall<call_randn, 11>, "Fill [particles, elements] with standard normals."},
    {"philox", fastcall<call_philox, 4>, "The four words of Philox4x32-10, into device memory."},
};

}  // namespace detail
}  // namespace fastguide::cuda

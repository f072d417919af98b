#include "../../common/binding.h"
#include "../../cpu/memory.h"
#include "../../cpu/tiles.h"
#include "../../cpu/types.h"

namespace fastguide::cpu {
namespace {

template <class T>
void randn_as(void* data, const RandnShape& shape, int threads) {
    const Tiling tiling{shape.particles, shape.elements};
    Memory counted;
    if constexpr (sizeof(T) == 2) counted.take<float>(tiling.largest());
    share_out(tiling.tiles(), kTileGrain, threads, counted, [&](uint64_t index, Memory memory) {
        const Tile tile = tiling.at(index);
        T* out = static_cast<T*>(data) + tile.row * shape.elements + tile.begin;
        if constexpr (sizeof(T) == 2) {
            float* const z = memory.take<float>(tile.count);
            noise_tile(z, shape, tile);
            narrow(out, z, tile.count);
        } else {
            noise_tile(out, shape, tile);
        }
    });
}

// The normals of `pairs` pairs of words (radius, angle), as randn computes them in float32.
void normals(const uint32_t* words, float* out, std::size_t pairs) {
    for (std::size_t at = 0; at < pairs; at += kLanes32) {
        const int count = static_cast<int>(pairs - at < kLanes32 ? pairs - at : kLanes32);
        uint32_t radius[kLanes32] = {}, angle[kLanes32] = {};
        for (int i = 0; i < count; ++i) {
            radius[i] = words[2 * (at + static_cast<std::size_t>(i))];
            angle[i] = words[2 * (at + static_cast<std::size_t>(i)) + 1];
        }
        const Pair<F32> z = normal_pair<VectorLanes>(load<U32>(radius), load<U32>(angle));
        for (int i = 0; i < count; ++i) {
            out[2 * (at + static_cast<std::size_t>(i))] = z.z0[i];
            out[2 * (at + static_cast<std::size_t>(i)) + 1] = z.z1[i];
        }
    }
}

// out, its dtype, particles, elements, seed, step, stream, first_particle, threads
PyObject* randn(Arguments& in) {
    void* const out = in.pointer("out");
    const Dtype dtype = in.dtype();
    const uint64_t particles = in.integer(), elements = in.integer();
    const RandnShape shape = in.counter(particles, elements);
    const int threads = in.threads();
    const bool some = particles > 0 && elements > 0;
    in.expect_memory(some);
    without_gil([&] {
        large_pages(out, particles * elements * size_of(dtype));
        if (some) with_type(dtype, [&](auto type) { randn_as<decltype(type)>(out, shape, threads); });
    });
    return none();
}

// words, out, pairs
PyObject* call_normals(Arguments& in) {
    const auto words = in.pointer<const uint32_t>("words");
    const auto out = in.pointer<float>("out");
    normals(words, out, in.integer());
    return none();
}

Binding bindings[] = {
    {"randn", fastcall<randn, 9>, "Fill [particles, elements] with standard normals."},
    {"normals", fastcall<call_normals, 3>, "The float32 normals of pairs of words (radius, angle): what randn does with them."},
};

}  // namespace
}  // namespace fastguide::cpu

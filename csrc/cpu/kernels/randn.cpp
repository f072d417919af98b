#include "../kernels.h"
#include "../tiles.h"
#include "../types.h"

namespace fastguide::cpu::FG_ISA {
namespace {

template <class T>
void randn_as(void* data, const RandnShape& shape, int threads) {
    const Tiling tiling{shape.particles, shape.elements};
    const bool large = shape.particles * shape.elements * sizeof(T) >= kPastCaches;
    Memory counted;
    if constexpr (sizeof(T) == 2) counted.take<float>(tiling.largest());
    share_out(tiling.tiles(), kTileGrain, threads, counted, [&](uint64_t index, Memory memory) {
        const Tile tile = tiling.at(index);
        T* out = static_cast<T*>(data) + tile.row * shape.elements + tile.begin;
        if constexpr (std::is_same_v<T, float>) {
            if (large && reinterpret_cast<uintptr_t>(out) % kBytes == 0) noise_tile<true>(out, shape, tile);
            else noise_tile(out, shape, tile);
        } else if constexpr (std::is_same_v<T, double>) {
            noise_tile(out, shape, tile);
        } else {
            float* const z = memory.take<float>(tile.count);
            noise_tile(z, shape, tile);
            narrow(out, z, tile.count);
        }
    });
}

}  // namespace

void randn(void* out, Dtype dtype, const RandnShape& shape, int threads) {
    if (shape.particles == 0 || shape.elements == 0) return;
    with_type(dtype, [&](auto type) { randn_as<decltype(type)>(out, shape, threads); });
}

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

}  // namespace fastguide::cpu::FG_ISA

// The normals of common/philox.h and common/normal.h in vectors, one tile at a time. randn writes them; a step adds
// them while they are still in the first-level cache.
#pragma once

#include "../common/normal.h"
#include "simd.h"

namespace fastguide::cpu {

// Four words of Philox in 64-bit lanes. Only the low 32 bits count. The high bits may hold the rest of a product; the
// next multiplication ignores them.
template <class V>
struct WordsOf {
    V w0, w1, w2, w3;
};
using Words = WordsOf<U64>;

template <int kFirst = 0, class V = U64>
FG_INLINE WordsOf<V> philox(WordsOf<V> c, uint32_t key0, uint32_t key1) {
    const U64 multiplier0 = splat(uint64_t{kPhiloxMultiplier0}), multiplier1 = splat(uint64_t{kPhiloxMultiplier1});
#pragma GCC unroll 10
    for (uint32_t round = kFirst; round < kPhiloxRounds; ++round) {
        const V product0 = multiply_low_words(multiplier0, c.w0), product1 = multiply_low_words(multiplier1, c.w2);
        c = {(product1 >> 32) ^ c.w1 ^ uint64_t{key0 + round * kPhiloxWeyl0}, product1,
             (product0 >> 32) ^ c.w3 ^ uint64_t{key1 + round * kPhiloxWeyl1}, product0};
    }
    return c;
}

struct Two {
    F32 first, second;
};

// The words of 4 * kLanes64 normals. normals_of returns these in memory order if counter i was in lane
// lane_of_group(i).
struct WordPairs {
    U32 radius, angle;
};

FG_INLINE WordPairs pairs_of(const Words& w) { return {join_low_words(w.w0, w.w2), join_low_words(w.w1, w.w3)}; }

FG_INLINE Two normals_of(const WordPairs& w) {
    const Pair<F32> z = normal_pair<VectorLanes>(w.radius, w.angle);
    return {interleave_low(z.z0, z.z1), interleave_high(z.z0, z.z1)};
}

FG_INLINE void store(float* to, const Two& z) {
    store(to, z.first);
    store(to + kLanes32, z.second);
}

constexpr int lane_of_group(int group) { return group < kLanes64 / 2 ? 2 * group : 2 * group - kLanes64 + 1; }
constexpr int group_of_lane(int lane) { return lane / 2 + (lane % 2) * (kLanes64 / 2); }

FG_INLINE U64 group_lanes() {
    U64 v{};
    for (int lane = 0; lane < kLanes64; ++lane) v[lane] = static_cast<uint64_t>(group_of_lane(lane));
    return v;
}

constexpr int kNormals = 4 * kLanes64;  // from one call of normals_of
constexpr int kAbreast = 2;             // calls that are interleaved, so that each hides the latency of the other

// Making normals does not use the memory bus, so other work can: `meanwhile(i, n)` is called when a tile's elements
// [i, i + n) are made. This one does nothing.
struct Nothing {
    FG_INLINE void operator()(uint64_t, uint64_t) const {}
};

// Elements [4 * group, 4 * group + count) of one particle. Three of the four counter words are the same in all lanes, so
// in each of the first two rounds one product is computed once for all lanes.
template <class Meanwhile>
FG_INLINE void normals_of_particle(float* out, const RandnShape& shape, uint64_t row, uint64_t group, uint64_t count,
                                   const Meanwhile& meanwhile) {
    const Words4 c = philox_counter(shape.first_particle + row, 0, shape.stream, shape.step);
    const uint32_t key0 = static_cast<uint32_t>(shape.seed), key1 = static_cast<uint32_t>(shape.seed >> 32);
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * c.w2;
    const uint32_t first_w0 = static_cast<uint32_t>(product1 >> 32) ^ c.w1 ^ key0;
    const uint64_t second = uint64_t{kPhiloxMultiplier0} * first_w0;
    const uint32_t key1_next = key1 + kPhiloxWeyl1;
    const U64 multiplier0 = splat(uint64_t{kPhiloxMultiplier0}), multiplier1 = splat(uint64_t{kPhiloxMultiplier1});
    const U64 low1 = splat(product1), key0_next = splat(uint64_t{key0 + kPhiloxWeyl0});
    const U64 w3_key = splat(uint64_t{c.w3 ^ key1}), second_high = splat((second >> 32) ^ key1_next), second_low = splat(second);
    U64 groups = group_lanes() + group;
    const auto next = [&]() __attribute__((always_inline)) {
        const U64 p0 = multiply_low_words(multiplier0, groups);
        const U64 w2 = (p0 >> 32) ^ w3_key;
        const U64 p1 = multiply_low_words(multiplier1, w2);
        groups += uint64_t{kLanes64};
        return pairs_of(philox<2>({(p1 >> 32) ^ low1 ^ key0_next, p1, second_high ^ p0, second_low}, key0, key1));
    };
    // The next words are computed beside the current normals: integer units work while floating-point units do.
    WordPairs words[kAbreast];
    for (int i = 0; i < kAbreast; ++i) words[i] = next();
    constexpr uint64_t kAtOnce = kAbreast * kNormals;
    uint64_t done = 0;
    for (; done + kAtOnce <= count; done += kAtOnce) {
        meanwhile(done, kAtOnce);
#pragma GCC unroll 4
        for (int i = 0; i < kAbreast; ++i) {
            const WordPairs now = words[i];
            words[i] = next();
            store(out + done + i * kNormals, normals_of(now));
        }
    }
    if (done < count) meanwhile(done, count - done);
    for (int i = 0; done < count; ++i, done += kNormals) {
        const Two z = normals_of(words[i]);
        __builtin_memcpy(out + done, &z, (count - done < kNormals ? count - done : kNormals) * sizeof(float));
    }
}

// All elements of particles [row, row + count) that have one or two elements each. Computes only the pairs they need.
template <int kElements, class Meanwhile>
FG_INLINE void normals_of_points(float* out, const RandnShape& shape, uint64_t row, uint64_t count,
                                 const Meanwhile& meanwhile) {
    static_assert(kElements == 1 || kElements == 2);
    const uint32_t key0 = static_cast<uint32_t>(shape.seed), key1 = static_cast<uint32_t>(shape.seed >> 32);
    U64 lanes{};
    for (int i = 0; i < kLanes64; ++i)
        lanes[i] = static_cast<uint64_t>(kElements == 1 ? 2 * i : i / 2 * 2 + i % 2 * kLanes64);
    const auto words = [&](U64 particle) __attribute__((always_inline)) {
        const U64 high = ((particle >> 32) & 0xFFFFu) | (uint64_t{shape.stream} << 16);
        return philox({U64{}, particle, high, splat(uint64_t{shape.step})}, key0, key1);
    };
    const auto next = [&](uint64_t done) __attribute__((always_inline)) {
        const U64 particle = lanes + (shape.first_particle + row + done);
        const Words even = words(particle), odd = words(particle + 1);
        const Pair<F32> z =
            normal_pair<VectorLanes>(join_low_words(even.w0, odd.w0), join_low_words(even.w1, odd.w1));
        if constexpr (kElements == 1) return z.z0;
        else return Two{interleave_low(z.z0, z.z1), interleave_high(z.z0, z.z1)};
    };
    uint64_t done = 0;
    for (; done + 2 * kLanes32 <= count; done += 2 * kLanes32) {
        meanwhile(done * kElements, 2 * kLanes32 * kElements);
        const auto first = next(done), second = next(done + kLanes32);
        store(out + done * kElements, first);
        store(out + (done + kLanes32) * kElements, second);
    }
    for (; done < count; done += kLanes32) {
        const auto z = next(done);
        const uint64_t left = (count - done) * sizeof(float) * kElements;
        __builtin_memcpy(out + done * kElements, &z, left < sizeof z ? left : sizeof z);
    }
}

// All elements of particles [row, row + rows) that have few groups each. The lanes of one vector span several particles.
template <class Meanwhile>
FG_INLINE void normals_of_short_particles(float* out, const RandnShape& shape, uint64_t row, uint64_t rows,
                                          const Meanwhile& meanwhile) {
    const float* const start = out;
    const uint64_t elements = shape.elements, groups = shape.groups_per_particle();
    const uint64_t last = elements - 4 * (groups - 1);  // elements of a particle's last group
    const uint32_t key0 = static_cast<uint32_t>(shape.seed), key1 = static_cast<uint32_t>(shape.seed >> 32);
    U64 group{}, particle{};
    for (int lane = 0; lane < kLanes64; ++lane) {
        const uint64_t index = static_cast<uint64_t>(group_of_lane(lane));
        group[lane] = index % groups;
        particle[lane] = shape.first_particle + row + index / groups;
    }
    const uint64_t particles_ahead = kLanes64 / groups, groups_ahead = kLanes64 % groups;
    uint64_t at = 0;  // the group of the next four normals within its particle
    for (uint64_t left = rows * groups; left > 0;) {
        const U64 high = ((particle >> 32) & 0xFFFFu) | (uint64_t{shape.stream} << 16);
        meanwhile(static_cast<uint64_t>(out - start), kNormals);
        const Two z = normals_of(pairs_of(philox({group, particle, high, splat(uint64_t{shape.step})}, key0, key1)));
        group += groups_ahead;
        const U64 past = as<U64>(group >= groups);
        group -= past & groups;
        particle += particles_ahead - past;
        const uint64_t taken = left < kLanes64 ? left : kLanes64;
        left -= taken;
        if (last == 4 && taken == kLanes64) {
            store(out, z);
            out += kNormals;
            continue;
        }
        float four[kNormals];
        store(four, z);
        for (uint64_t i = 0; i < taken; ++i) {
            at = at + 1 == groups ? 0 : at + 1;
            const uint64_t kept = at == 0 ? last : 4;
            // The next four overwrite the surplus. The last four of the tile have no next: they write no surplus.
            __builtin_memcpy(out, four + 4 * i, left > 0 ? 4 * sizeof(float) : kept * sizeof(float));
            out += kept;
        }
    }
}

// The unit of work of a kernel: whole rows [row, row + rows), or elements [begin, begin + count) of one row. `begin` is a
// multiple of four.
struct Tile {
    uint64_t row, rows, begin, count;
};

constexpr uint64_t kLeastAlone = 4 * kNormals;  // particles with at least so many elements are made one by one

template <class Meanwhile = Nothing>
void noise_tile(float* out, const RandnShape& shape, const Tile& tile, const Meanwhile& meanwhile = {}) {
    const uint64_t elements = shape.elements;
    if (tile.rows == 1)
        return normals_of_particle(out, shape, tile.row, tile.begin / 4, tile.count, meanwhile);
    if (elements == 1) return normals_of_points<1>(out, shape, tile.row, tile.rows, meanwhile);
    if (elements == 2) return normals_of_points<2>(out, shape, tile.row, tile.rows, meanwhile);
    if (elements < kLeastAlone) return normals_of_short_particles(out, shape, tile.row, tile.rows, meanwhile);
    for (uint64_t i = 0; i < tile.rows; ++i) {
        const auto there = [&](uint64_t at, uint64_t n) __attribute__((always_inline)) { meanwhile(i * elements + at, n); };
        normals_of_particle(out + i * elements, shape, tile.row + i, 0, elements, there);
    }
}

template <class Meanwhile = Nothing>
void noise_tile(double* out, const RandnShape& shape, const Tile& tile, const Meanwhile& = {}) {
    const uint64_t count = tile.rows == 1 ? tile.count : shape.elements;
    for (uint64_t i = 0; i < tile.rows; ++i)
        for (uint64_t at = 0; at < count; at += 4) {
            const Words4 counter =
                philox_counter(shape.first_particle + tile.row + i, static_cast<uint32_t>((tile.begin + at) / 4),
                               shape.stream, shape.step);
            const Words4 w = fastguide::philox(counter, static_cast<uint32_t>(shape.seed),
                                               static_cast<uint32_t>(shape.seed >> 32));
            const Pair<double> a = normal_pair_double(w.w0, w.w1), b = normal_pair_double(w.w2, w.w3);
            const double four[4] = {a.z0, a.z1, b.z0, b.z1};
            const uint64_t kept = count - at < 4 ? count - at : 4;
            for (uint64_t k = 0; k < kept; ++k) *out++ = four[k];
        }
}

}  // namespace fastguide::cpu

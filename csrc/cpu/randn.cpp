#include "randn.h"

#include <algorithm>
#include <type_traits>

#include "../common/normal.h"

// One source, compiled for three instruction sets; the loader picks. None contracts to FMA: the bits agree.
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FG_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FG_CLONES
#endif

namespace fastguide::cpu {
namespace {

constexpr int kLanes = 64;             // groups in a block; its 256 normals stay in the first-level cache
constexpr uint64_t kPieceBlocks = 64;  // 16,384 normals, tens of microseconds: less is not worth a thread

struct Counters {
    uint32_t group[kLanes], low[kLanes], high[kLanes];
    uint32_t step, key0, key1;
};

FG_CLONES void normals_of_block(const Counters& in, float* out) {
    float z[4][kLanes];
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
        const Words4 w = philox({in.group[j], in.low[j], in.high[j], in.step}, in.key0, in.key1);
        const Pair<float> first = normal_pair(w.w0, w.w1), second = normal_pair(w.w2, w.w3);
        z[0][j] = first.z0;
        z[1][j] = first.z1;
        z[2][j] = second.z0;
        z[3][j] = second.z1;
    }
    for (int j = 0; j < kLanes; ++j)
        for (int i = 0; i < 4; ++i) out[4 * j + i] = z[i][j];
}

// The C library's log, sin and cos do not vectorise; there is nothing to clone.
void normals_of_block(const Counters& in, double* out) {
    for (int j = 0; j < kLanes; ++j) {
        const Words4 w = philox({in.group[j], in.low[j], in.high[j], in.step}, in.key0, in.key1);
        const Pair<double> first = normal_pair_double(w.w0, w.w1), second = normal_pair_double(w.w2, w.w3);
        out[4 * j] = first.z0;
        out[4 * j + 1] = first.z1;
        out[4 * j + 2] = second.z0;
        out[4 * j + 3] = second.z1;
    }
}

FG_CLONES void round_block(const float* in, Half* out) {
    for (int i = 0; i < 4 * kLanes; ++i) out[i] = to_half(in[i]);
}

FG_CLONES void round_block(const float* in, BFloat16* out) {
    for (int i = 0; i < 4 * kLanes; ++i) out[i] = to_bfloat16(in[i]);
}

template <class T>
void make_block(const Counters& counters, T* out) {
    if constexpr (std::is_floating_point_v<T>) {
        normals_of_block(counters, out);
    } else {
        alignas(64) float z[4 * kLanes];
        normals_of_block(counters, z);
        round_block(z, out);
    }
}

// Groups [begin, end) of the flat index row * groups_per_particle + group.
template <class T>
void fill(T* out, const RandnShape& shape, uint64_t begin, uint64_t end) {
    const uint64_t groups = shape.groups_per_particle(), elements = shape.elements;
    uint64_t row = begin / groups, group = begin % groups;
    Counters counters;
    counters.step = shape.step;
    counters.key0 = static_cast<uint32_t>(shape.seed);
    counters.key1 = static_cast<uint32_t>(shape.seed >> 32);
    alignas(64) T block[4 * kLanes];
    T* next = out + row * elements + 4 * group;
    for (uint64_t at = begin; at < end; at += kLanes) {
        const int lanes = static_cast<int>(std::min<uint64_t>(kLanes, end - at));
        uint64_t first_group = group;
        for (int j = 0; j < kLanes; ++j) {  // past `lanes` the normals are made and left unused
            const uint64_t particle = shape.first_particle + row;
            const Words4 c = philox_counter(particle, static_cast<uint32_t>(group), shape.stream, shape.step);
            counters.group[j] = c.w0;
            counters.low[j] = c.w1;
            counters.high[j] = c.w2;
            if (++group == groups) {
                group = 0;
                ++row;
            }
        }
        make_block(counters, block);
        if (elements % 4 == 0) {
            next = std::copy_n(block, 4 * lanes, next);
            continue;
        }
        for (int j = 0; j < lanes;) {  // row by row: the last group of each is cut short
            const uint64_t run = std::min(static_cast<uint64_t>(lanes - j), groups - first_group);
            const uint64_t count = std::min(4 * run, elements - 4 * first_group);
            const T* from = block + 4 * j;
            if (count < 16) {  // a call to memmove would cost more than the copy
                for (uint64_t i = 0; i < count; ++i) *next++ = from[i];
            } else {
                next = std::copy_n(from, count, next);
            }
            j += static_cast<int>(run);
            first_group = 0;
        }
    }
}

template <class T>
void randn_as(void* data, const RandnShape& shape, int threads) {
    T* out = static_cast<T*>(data);
    const uint64_t total = shape.particles * shape.groups_per_particle();
    const uint64_t blocks = (total + kLanes - 1) / kLanes;
    // Several pieces for each thread, so that one that the machine has put aside holds up nobody for long.
    const uint64_t most = 8 * static_cast<uint64_t>(std::max(1, threads));
    const auto pieces = static_cast<int>(std::clamp<uint64_t>(blocks / kPieceBlocks, 1, most));
    const int team = std::max(1, std::min(threads, pieces));
    if (team == 1) {
        fill<T>(out, shape, 0, total);
        return;
    }
    const auto count = static_cast<uint64_t>(pieces);
    const uint64_t share = (blocks + count - 1) / count * kLanes;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int piece = 0; piece < pieces; ++piece) {
        const uint64_t begin = std::min(total, static_cast<uint64_t>(piece) * share);
        fill<T>(out, shape, begin, std::min(total, begin + share));
    }
}

}  // namespace

void randn(void* out, Dtype dtype, const RandnShape& shape, int threads) {
    if (shape.particles == 0 || shape.elements == 0) return;
    switch (dtype) {
        case Dtype::float32: return randn_as<float>(out, shape, threads);
        case Dtype::float16: return randn_as<Half>(out, shape, threads);
        case Dtype::bfloat16: return randn_as<BFloat16>(out, shape, threads);
        case Dtype::float64: return randn_as<double>(out, shape, threads);
    }
}

FG_CLONES void normals(const uint32_t* words, float* out, std::size_t pairs) {
    for (std::size_t i = 0; i < pairs; ++i) {
        const Pair<float> z = normal_pair(words[2 * i], words[2 * i + 1]);
        out[2 * i] = z.z0;
        out[2 * i + 1] = z.z1;
    }
}

const char* instruction_set() {
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
#endif
    return "the compiler's default";
}

}  // namespace fastguide::cpu

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), and the counters that fastguide gives to it.
//
// The contract of randn, the same for every backend:
//
//   particle  p = first_particle + row          p < 2^48
//   element   e in 0 .. D-1, group g = e / 4     D < 2^34
//   counter   { g, low 32 bits of p, bits 32..47 of p | stream << 16, step }     stream < 2^16, step < 2^32
//   key       { low 32 bits of seed, high 32 bits of seed }
//
// The four output words of a counter give elements 4g .. 4g+3 (normal.h). Every particle starts a new group. If D is
// not a multiple of four, the rest of the last group is discarded. So a value depends on the seed, the stream, the
// step, the global particle and the element, and on nothing else.
#pragma once

#include <cstdint>

#include "config.h"

namespace fastguide {

struct Words4 {
    uint32_t w0, w1, w2, w3;
};

FG_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return __umulhi(a, b);
#else
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

FG_HD Words4 philox(Words4 counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint32_t high0 = multiply_high(kPhiloxMultiplier0, counter.w0), low0 = kPhiloxMultiplier0 * counter.w0;
        const uint32_t high1 = multiply_high(kPhiloxMultiplier1, counter.w2), low1 = kPhiloxMultiplier1 * counter.w2;
        counter = {high1 ^ counter.w1 ^ key0, low1, high0 ^ counter.w3 ^ key1, low0};
        key0 += kPhiloxWeyl0;
        key1 += kPhiloxWeyl1;
    }
    return counter;
}

FG_HD Words4 philox_counter(uint64_t particle, uint32_t group, uint32_t stream, uint32_t step) {
    return {group, static_cast<uint32_t>(particle),
            (static_cast<uint32_t>(particle >> 32) & 0xFFFFu) | (stream << 16), step};
}

constexpr uint64_t kMaxParticles = uint64_t{1} << 48;
constexpr uint64_t kMaxElements = uint64_t{1} << 34;
constexpr uint64_t kMaxStreams = uint64_t{1} << 16;

// What a call of randn fills: a row-major [particles, elements] array.
struct RandnShape {
    uint64_t particles;
    uint64_t elements;
    uint64_t first_particle;
    uint64_t seed;
    uint32_t step;
    uint32_t stream;

    uint64_t groups_per_particle() const { return (elements + 3) / 4; }
};

}  // namespace fastguide

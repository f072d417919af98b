#pragma once

#include <cstdint>

namespace fastguide {

// [rows, particles] of so many bytes each.
struct ParticleArray {
    void* data;
    uint64_t bytes;
};

}  // namespace fastguide

// Checks of the arguments that Python passes.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "philox.h"

namespace fastguide {

inline void check_below(const char* name, uint64_t value, uint64_t bound) {
    if (value >= bound)
        throw std::invalid_argument(std::string(name) + " must be below " + std::to_string(bound) + ", got " +
                                    std::to_string(value));
}

// A tensor whose memory was freed or never allocated has elements but no address.
inline void expect_memory(const char* name, const void* data, uint64_t elements) {
    if (!data && elements) throw std::invalid_argument(std::string(name) + " must be in memory, got a null pointer");
}

// Checks the particles and slots of one call of resample.
inline void check_counts(uint64_t particles, uint64_t number) {
    for (const uint64_t count : {particles, number})
        check_below("particles and number, less one,", count - 1, (uint64_t{1} << 31) - 1);
}

inline RandnShape checked_shape(uint64_t particles, uint64_t elements, uint64_t seed, uint64_t step,
                                uint64_t stream, uint64_t first_particle) {
    check_below("elements", elements, kMaxElements + 1);
    check_below("step", step, uint64_t{1} << 32);
    check_below("stream", stream, kMaxStreams);
    check_below("particles", particles, kMaxParticles + 1);
    check_below("first_particle", first_particle, kMaxParticles + 1 - particles);
    return {particles, elements, first_particle, seed, static_cast<uint32_t>(step),
            static_cast<uint32_t>(stream)};
}

}  // namespace fastguide

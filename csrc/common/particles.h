// The states whose particles gather_particles moves.
#pragma once

#include <cstdint>
#include <vector>

#include "binding.h"

namespace fastguide {

// An array [rows, particles]; each particle has `bytes` bytes.
struct ParticleArray {
    void* data;
    uint64_t bytes;
};

// Reads a list of pairs (data, bytes of one particle).
inline std::vector<ParticleArray> read_states(Arguments& in) {
    Arguments items = in.items();
    std::vector<ParticleArray> states;
    for (Py_ssize_t i = 0; i < items.count(); ++i) {
        Arguments state = items.items();
        state.expect(2);
        void* const data = state.pointer("states");
        states.push_back({data, state.integer()});
    }
    return states;
}

inline void expect_memory(const std::vector<ParticleArray>& states, uint64_t rows, uint64_t particles) {
    for (const ParticleArray& state : states)
        expect_memory("states", state.data, rows * (particles > 0 && state.bytes > 0));
}

}  // namespace fastguide

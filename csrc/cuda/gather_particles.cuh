#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "../common/particles.h"

namespace fastguide::cuda {

// What a call reads and needs, all of it on the device that is current.
struct Gathering {
    const void* ancestors;  // [rows, particles], int64 if `wide`, else int32
    bool wide;
    uint64_t rows, particles;
    uint32_t* flags;  // [rows + 2]; the last is 0 afterwards unless an ancestor is out of range
    void* workspace;  // aligned to 16 bytes
    uint64_t workspace_bytes;
};

// The bytes of workspace that gather_particles wants for these states: a 64th of the largest, but 2 MiB where that is
// more, and room for 16 bytes of each particle of a row; never more than the state.
uint64_t gather_workspace(uint64_t rows, uint64_t particles, const std::vector<ParticleArray>& states);

// Moves the particles of each state to where the ancestors say; none if an ancestor is out of range. Launches on
// `queue` and returns; throws where a launch failed, or the workspace holds less than a unit of each particle.
void gather_particles(const Gathering& call, const std::vector<ParticleArray>& states, cudaStream_t queue);

}  // namespace fastguide::cuda

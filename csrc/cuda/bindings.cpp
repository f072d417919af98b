// fastguide._cuda. Device pointers and the stream arrive as integers. The caller makes the device current.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "../common/arguments.h"
#include "gather_particles.cuh"
#include "randn.cuh"

namespace py = pybind11;
using namespace fastguide;

namespace {

void randn(uintptr_t data, int dtype, uint64_t particles, uint64_t elements, uint64_t seed, uint64_t step,
           uint64_t stream, uint64_t first_particle, uintptr_t cuda_stream) {
    const RandnShape shape = checked_shape(particles, elements, seed, step, stream, first_particle);
    const Dtype type = checked_dtype(dtype, Dtype::bfloat16);
    const py::gil_scoped_release release;
    cuda::randn(reinterpret_cast<void*>(data), type, shape, reinterpret_cast<cudaStream_t>(cuda_stream));
}

void philox_words(uintptr_t out, const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key,
                  uintptr_t cuda_stream) {
    const py::gil_scoped_release release;
    const Words4 words{counter[0], counter[1], counter[2], counter[3]};
    cuda::philox_words(reinterpret_cast<uint32_t*>(out), words, key[0], key[1],
                       reinterpret_cast<cudaStream_t>(cuda_stream));
}

using States = std::vector<std::pair<uintptr_t, uint64_t>>;  // data, bytes of each particle

std::vector<ParticleArray> arrays(const States& states) {
    std::vector<ParticleArray> found;
    for (const auto& [data, bytes] : states) found.push_back({reinterpret_cast<void*>(data), bytes});
    return found;
}

uint64_t gather_workspace(uint64_t rows, uint64_t particles, const States& states) {
    return cuda::gather_workspace(rows, particles, arrays(states));
}

void gather_particles(uintptr_t ancestors, bool wide, uint64_t rows, uint64_t particles, const States& states,
                      uintptr_t flags, uintptr_t workspace, uint64_t workspace_bytes, uintptr_t cuda_stream) {
    if (!wide) check_below("particles", particles, uint64_t{1} << 31);
    check_below("rows", rows, uint64_t{1} << 32);
    const cuda::Gathering call{reinterpret_cast<const void*>(ancestors), wide,           rows, particles,
                               reinterpret_cast<uint32_t*>(flags),       reinterpret_cast<void*>(workspace),
                               workspace_bytes};
    const std::vector<ParticleArray> all = arrays(states);
    const py::gil_scoped_release release;
    cuda::gather_particles(call, all, reinterpret_cast<cudaStream_t>(cuda_stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastguide's CUDA kernels";
    m.def("randn", &randn, py::arg("data"), py::arg("dtype"), py::arg("particles"), py::arg("elements"),
          py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first_particle"),
          py::arg("cuda_stream"),
          "Fill [particles, elements] at `data` with standard normals.");
    m.def("philox", &philox_words, py::arg("out"), py::arg("counter"), py::arg("key"), py::arg("cuda_stream"),
          "The four words of Philox4x32-10, into device memory at `out`.");
    m.def("gather_workspace", &gather_workspace, py::arg("rows"), py::arg("particles"), py::arg("states"),
          "The bytes of workspace for gather_particles of these states.");
    m.def("gather_particles", &gather_particles, py::arg("ancestors"), py::arg("wide"), py::arg("rows"),
          py::arg("particles"), py::arg("states"), py::arg("flags"), py::arg("workspace"), py::arg("workspace_bytes"),
          py::arg("cuda_stream"),
          "Move the particles of states (data, bytes of each) to where ancestors say. The last of flags (uint32 "
          "[rows + 2]) is 0 afterwards, or else an ancestor is out of range and nothing moved.");
}

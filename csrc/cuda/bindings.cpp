// fastguide._cuda. Device pointers and the stream arrive as integers. The caller makes the device current.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "../common/arguments.h"
#include "gather_particles.cuh"
#include "randn.cuh"
#include "resample.cuh"

namespace py = pybind11;
using namespace fastguide;

namespace {

cuda::CounterOnDevice on_device(uintptr_t seed, uintptr_t step) {
    return {reinterpret_cast<const int64_t*>(seed), reinterpret_cast<const int64_t*>(step)};
}

void randn(uintptr_t data, int dtype, uint64_t particles, uint64_t elements, uint64_t seed, uint64_t step,
           uint64_t stream, uint64_t first_particle, uintptr_t seed_at, uintptr_t step_at, uintptr_t cuda_stream) {
    const RandnShape shape = checked_shape(particles, elements, seed, step, stream, first_particle);
    const Dtype type = checked_dtype(dtype, Dtype::bfloat16);
    expect_memory("out", reinterpret_cast<void*>(data), shape.particles * (shape.elements > 0));
    const py::gil_scoped_release release;
    cuda::randn(reinterpret_cast<void*>(data), type, shape, on_device(seed_at, step_at),
                reinterpret_cast<cudaStream_t>(cuda_stream));
}

void philox_words(uintptr_t out, const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key,
                  uintptr_t cuda_stream) {
    const py::gil_scoped_release release;
    const Words4 words{counter[0], counter[1], counter[2], counter[3]};
    cuda::philox_words(reinterpret_cast<uint32_t*>(out), words, key[0], key[1],
                       reinterpret_cast<cudaStream_t>(cuda_stream));
}

cuda::Resampling resampling_of(uint64_t rows, uint64_t particles, uint64_t number, int scheme, bool sorted) {
    check_below("rows", rows, uint64_t{1} << 31);
    for (const uint64_t count : {particles, number})
        check_below("particles and number, less one,", count - 1, (uint64_t{1} << 31) - 1);
    check_below("scheme", static_cast<uint64_t>(scheme), 4);
    cuda::Resampling call{};
    call.rows = rows, call.particles = particles, call.number = number;
    call.scheme = static_cast<Scheme>(scheme), call.sorted = sorted;
    return call;
}

uint64_t resample_workspace(uint64_t rows, uint64_t particles, uint64_t number, int scheme, bool sorted) {
    return cuda::resample_workspace(resampling_of(rows, particles, number, scheme, sorted));
}

void resample(uintptr_t log_weights, bool doubles, uint64_t rows, uint64_t particles, uint64_t number, int scheme,
              bool sorted, double keep_from, uint64_t seed, uint64_t step, uint64_t stream, uint64_t first_row,
              uintptr_t seed_at, uintptr_t step_at, uintptr_t ancestors, uintptr_t log_weights_after,
              uintptr_t log_mean_weight, uintptr_t ess, uintptr_t workspace, uintptr_t cuda_stream) {
    cuda::Resampling call = resampling_of(rows, particles, number, scheme, sorted);
    const RandnShape counter = checked_shape(rows, 1, seed, step, stream, first_row);
    call.log_weights = reinterpret_cast<const void*>(log_weights), call.doubles = doubles;
    expect_memory("log_weights", call.log_weights, rows);
    call.keep_from = keep_from;
    call.seed = counter.seed, call.step = counter.step, call.stream = counter.stream, call.first_row = first_row;
    call.counter = on_device(seed_at, step_at);
    call.ancestors = reinterpret_cast<int32_t*>(ancestors);
    call.log_weights_after = reinterpret_cast<void*>(log_weights_after);
    call.log_mean_weight = reinterpret_cast<double*>(log_mean_weight), call.ess = reinterpret_cast<double*>(ess);
    const py::gil_scoped_release release;
    cuda::resample(call, reinterpret_cast<void*>(workspace), reinterpret_cast<cudaStream_t>(cuda_stream));
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
    expect_memory("ancestors", call.ancestors, rows * (particles > 0));
    const std::vector<ParticleArray> all = arrays(states);
    for (const ParticleArray& state : all) expect_memory("states", state.data, rows * (particles > 0 && state.bytes > 0));
    const py::gil_scoped_release release;
    cuda::gather_particles(call, all, reinterpret_cast<cudaStream_t>(cuda_stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastguide's CUDA kernels";
    m.def("randn", &randn, py::arg("data"), py::arg("dtype"), py::arg("particles"), py::arg("elements"),
          py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first_particle"), py::arg("seed_at"),
          py::arg("step_at"), py::arg("cuda_stream"),
          "Fill [particles, elements] at `data` with standard normals. A seed or a step that stands on the device, at "
          "`seed_at` or `step_at`, takes the place of the number.");
    m.def("resample_workspace", &resample_workspace, py::arg("rows"), py::arg("particles"), py::arg("number"),
          py::arg("scheme"), py::arg("sorted"), "Bytes of device memory that resample needs for itself.");
    m.def("resample", &resample, py::arg("log_weights"), py::arg("doubles"), py::arg("rows"), py::arg("particles"),
          py::arg("number"), py::arg("scheme"), py::arg("sorted"), py::arg("keep_from"), py::arg("seed"),
          py::arg("step"), py::arg("stream"), py::arg("first_row"), py::arg("seed_at"), py::arg("step_at"),
          py::arg("ancestors"), py::arg("log_weights_after"), py::arg("log_mean_weight"), py::arg("ess"),
          py::arg("workspace"), py::arg("cuda_stream"), "Ancestors, and the log-weights after them.");
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

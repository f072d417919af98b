// fastguide._cuda. Device pointers and the stream arrive as integers. The caller makes the device current.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../common/arguments.h"
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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastguide's CUDA kernels";
    m.def("randn", &randn, py::arg("data"), py::arg("dtype"), py::arg("particles"), py::arg("elements"),
          py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first_particle"),
          py::arg("cuda_stream"),
          "Fill [particles, elements] at `data` with standard normals.");
    m.def("philox", &philox_words, py::arg("out"), py::arg("counter"), py::arg("key"), py::arg("cuda_stream"),
          "The four words of Philox4x32-10, into device memory at `out`.");
}

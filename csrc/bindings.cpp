// fastguide._cpu. Pointers arrive as integers: csrc knows no tensor library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/arguments.h"
#include "cpu/randn.h"

namespace py = pybind11;
using namespace fastguide;

namespace {

void randn(uintptr_t data, int dtype, uint64_t particles, uint64_t elements, uint64_t seed, uint64_t step,
           uint64_t stream, uint64_t first_particle, int threads) {
    const RandnShape shape = checked_shape(particles, elements, seed, step, stream, first_particle);
    const Dtype type = checked_dtype(dtype, Dtype::float64);
    const py::gil_scoped_release release;
    cpu::randn(reinterpret_cast<void*>(data), type, shape, threads);
}

void normals(uintptr_t words, uintptr_t out, std::size_t pairs) {
    const py::gil_scoped_release release;
    cpu::normals(reinterpret_cast<const uint32_t*>(words), reinterpret_cast<float*>(out), pairs);
}

py::tuple philox_words(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const Words4 w = philox({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastguide's CPU kernels";
    m.def("randn", &randn, py::arg("data"), py::arg("dtype"), py::arg("particles"), py::arg("elements"),
          py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first_particle"), py::arg("threads"),
          "Fill [particles, elements] at `data` with standard normals.");
    m.def("normals", &normals, py::arg("words"), py::arg("out"), py::arg("pairs"),
          "The float32 normals of pairs of uint32 words (radius, angle): what randn does with them.");
    m.def("philox", &philox_words, py::arg("counter"), py::arg("key"), "The four words of Philox4x32-10.");
    m.def("instruction_set", &cpu::instruction_set, "What the hot loops run with on this machine.");
}

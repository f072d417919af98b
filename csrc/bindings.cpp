// fastguide._cpu. Pointers arrive as integers: csrc knows no tensor library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace fastguide;

namespace {

void randn(uintptr_t data, int dtype, uint64_t particles, uint64_t elements, uint64_t seed, uint64_t step,
           uint64_t stream, uint64_t first_particle, int threads) {
    const RandnShape shape = checked_shape(particles, elements, seed, step, stream, first_particle);
    const Dtype type = checked_dtype(dtype, Dtype::float64);
    const py::gil_scoped_release release;
    cpu::kernels().randn(reinterpret_cast<void*>(data), type, shape, threads);
}

void normals(uintptr_t words, uintptr_t out, std::size_t pairs) {
    const py::gil_scoped_release release;
    cpu::kernels().normals(reinterpret_cast<const uint32_t*>(words), reinterpret_cast<float*>(out), pairs);
}

int64_t resample(uintptr_t log_weights, int dtype, uint64_t rows, uint64_t particles, uint64_t number, int scheme,
                 bool sorted, double keep_from, uint64_t seed, uint64_t step, uint64_t stream, uintptr_t ancestors,
                 uintptr_t log_weights_after, uintptr_t log_mean_weight, uintptr_t ess, int threads) {
    if (checked_dtype(dtype, Dtype::float64) != Dtype::float32 && dtype != static_cast<int>(Dtype::float64))
        throw std::invalid_argument("dtype must be the code of float32 or float64, got " + std::to_string(dtype));
    check_below("rows", rows, kMaxParticles + 1);
    check_below("particles - 1", particles - 1, (uint64_t{1} << 31) - 1);
    check_below("number - 1", number - 1, (uint64_t{1} << 31) - 1);
    check_below("scheme", static_cast<uint64_t>(scheme), 4);
    check_below("step", step, uint64_t{1} << 32);
    check_below("stream", stream, kMaxStreams);
    const cpu::Resampling call{reinterpret_cast<const void*>(log_weights),
                               static_cast<Dtype>(dtype),
                               rows,
                               particles,
                               number,
                               static_cast<cpu::Scheme>(scheme),
                               sorted,
                               keep_from,
                               seed,
                               static_cast<uint32_t>(step),
                               static_cast<uint32_t>(stream),
                               reinterpret_cast<int32_t*>(ancestors),
                               reinterpret_cast<void*>(log_weights_after),
                               reinterpret_cast<double*>(log_mean_weight),
                               reinterpret_cast<double*>(ess),
                               threads};
    const py::gil_scoped_release release;
    return cpu::kernels().resample(call);
}

py::tuple philox_words(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const Words4 w = philox({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
}

std::vector<std::string> instruction_sets() {
    int count;
    const cpu::Kernels* const* sets = cpu::available(&count);
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(sets[i]->name);
    return names;
}

void use_instruction_set(const std::string& name) {
    int count;
    const cpu::Kernels* const* sets = cpu::available(&count);
    for (int i = 0; i < count; ++i)
        if (name == sets[i]->name) return cpu::use(*sets[i]);
    throw std::invalid_argument("instruction set: this processor has no " + name);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastguide's CPU kernels";
    m.def("randn", &randn, py::arg("data"), py::arg("dtype"), py::arg("particles"), py::arg("elements"),
          py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first_particle"), py::arg("threads"),
          "Fill [particles, elements] at `data` with standard normals.");
    m.def("normals", &normals, py::arg("words"), py::arg("out"), py::arg("pairs"),
          "The float32 normals of pairs of uint32 words (radius, angle): what randn does with them.");
    m.def("resample", &resample, py::arg("log_weights"), py::arg("dtype"), py::arg("rows"), py::arg("particles"),
          py::arg("number"), py::arg("scheme"), py::arg("sorted"), py::arg("keep_from"), py::arg("seed"),
          py::arg("step"), py::arg("stream"), py::arg("ancestors"), py::arg("log_weights_after"),
          py::arg("log_mean_weight"), py::arg("ess"), py::arg("threads"),
          "Draw [rows, number] ancestors from [rows, particles] log-weights; returns the first row without a usable "
          "weight, or -1.");
    m.def("philox", &philox_words, py::arg("counter"), py::arg("key"), "The four words of Philox4x32-10.");
    m.def("instruction_set", [] { return cpu::kernels().name; }, "What the kernels run with.");
    m.def("instruction_sets", &instruction_sets, "What they can run with on this processor, the best first.");
    m.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Run with another one: the same bits.");
}

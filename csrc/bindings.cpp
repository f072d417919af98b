// fastguide._cpu. Pointers arrive as integers: csrc knows no tensor library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/arguments.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "fastcall.h"

namespace py = pybind11;
using namespace fastguide;

namespace {

void prepare(const void* result, Dtype dtype, const RandnShape& shape) {
    cpu::large_pages(result, shape.particles * shape.elements * size_of(dtype));
}

void randn(uintptr_t data, int dtype, uint64_t particles, uint64_t elements, uint64_t seed, uint64_t step,
           uint64_t stream, uint64_t first_particle, int threads) {
    const RandnShape shape = checked_shape(particles, elements, seed, step, stream, first_particle);
    const Dtype type = checked_dtype(dtype, Dtype::float64);
    const py::gil_scoped_release release;
    prepare(reinterpret_cast<void*>(data), type, shape);
    cpu::kernels().randn(reinterpret_cast<void*>(data), type, shape, threads);
}

void normals(uintptr_t words, uintptr_t out, std::size_t pairs) {
    const py::gil_scoped_release release;
    cpu::kernels().normals(reinterpret_cast<const uint32_t*>(words), reinterpret_cast<float*>(out), pairs);
}

// x, x's dtype, model_output, its dtype, displacement (0: none), its dtype, x_s, x0 (0: none), prediction, clip (kind,
// low, high), levels, shape (six), threads
PyObject* reverse_step(PyObject*, PyObject* const* values, Py_ssize_t given) {
    return none_or_error([&] {
        Arguments in(values, given, 20);
        cpu::Step step{};
        double five[5];
        step.x = in.input(), step.output = in.input(), step.displacement = in.input();
        step.x_s = in.pointer(), step.x0 = in.pointer();
        step.prediction = in.prediction(), step.clip = in.clip();
        in.levels(step, five);
        step.shape = in.shape(), step.threads = static_cast<int>(in.integer());
        const py::gil_scoped_release release;
        prepare(step.x_s, step.x.dtype, step.shape);
        if (step.x0) prepare(step.x0, step.x.dtype, step.shape);
        cpu::kernels().reverse_step(step);
    });
}

// x, x's dtype, x0_hat, its dtype, displacement, its dtype, x_s, log-weights before, after, whether they are doubles,
// levels, shape (six), threads
PyObject* propose_and_weigh(PyObject*, PyObject* const* values, Py_ssize_t given) {
    return none_or_error([&] {
        Arguments in(values, given, 18);
        cpu::Step step{};
        cpu::Weights weights;
        double five[5];
        step.x = in.input(), step.output = in.input(), step.displacement = in.input();
        step.x_s = in.pointer(), step.prediction = Prediction::sample;
        weights.before = in.pointer(), weights.after = in.pointer(), weights.doubles = in.integer() != 0;
        in.levels(step, five);
        step.shape = in.shape(), step.threads = static_cast<int>(in.integer());
        const py::gil_scoped_release release;
        prepare(step.x_s, step.x.dtype, step.shape);
        cpu::kernels().propose_and_weigh(step, weights);
    });
}

PyMethodDef fast(const char* name, PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t), const char* doc) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL, doc};
}

PyMethodDef fast_methods[] = {
    fast("reverse_step", reverse_step, "One reverse step."),
    fast("propose_and_weigh", propose_and_weigh, "The guided step, and the log-weights after it."),
    {nullptr, nullptr, 0, nullptr},
};

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
    if (PyModule_AddFunctions(m.ptr(), fast_methods) != 0) throw py::error_already_set();
    m.def("philox", &philox_words, py::arg("counter"), py::arg("key"), "The four words of Philox4x32-10.");
    m.def("instruction_set", [] { return cpu::kernels().name; }, "What the kernels run with.");
    m.def("instruction_sets", &instruction_sets, "What they can run with on this processor, the best first.");
    m.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Run with another one: the same bits.");
}

// fastguide._cpu. Pointers arrive as integers: csrc knows no tensor library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
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
    expect_memory("out", reinterpret_cast<void*>(data), shape.particles * (shape.elements > 0));
    prepare(reinterpret_cast<void*>(data), type, shape);
    cpu::kernels().randn(reinterpret_cast<void*>(data), type, shape, threads);
}

void normals(uintptr_t words, uintptr_t out, std::size_t pairs) {
    const py::gil_scoped_release release;
    cpu::kernels().normals(reinterpret_cast<const uint32_t*>(words), reinterpret_cast<float*>(out), pairs);
}

// x, x's dtype, model_output, its dtype, displacement (or None), its dtype, x_s, x0 (or None), return_x0,
// prediction, clip (kind, low, high), clip_noise, levels, shape of x, seed, step, stream, first_particle, threads
PyObject* reverse_step(PyObject*, PyObject* const* values, Py_ssize_t given) {
    return none_or_error([&] {
        Arguments in(values, given, 21);
        cpu::Step step{};
        double five[5];
        step.x = in.input("x"), step.output = in.input("model_output"), step.displacement = in.input("displacement");
        step.x_s = in.pointer("x_s"), step.x0 = in.pointer_or_none("x0");
        in.flag();
        step.prediction = in.prediction(), step.clip = in.clip();
        step.clip_noise = in.flag();
        in.levels(step, five);
        step.shape = in.shape(), step.threads = static_cast<int>(in.integer());
        const py::gil_scoped_release release;
        prepare(step.x_s, step.x.dtype, step.shape);
        if (step.x0) prepare(step.x0, step.x.dtype, step.shape);
        cpu::kernels().reverse_step(step);
    });
}

// x, x's dtype, x0_hat, its dtype, displacement, its dtype, x_s, log-weights before, after, whether they are doubles,
// levels, shape of x, seed, step, stream, first_particle, threads
PyObject* propose_and_weigh(PyObject*, PyObject* const* values, Py_ssize_t given) {
    return none_or_error([&] {
        Arguments in(values, given, 17);
        cpu::Step step{};
        cpu::Weights weights;
        double five[5];
        step.x = in.input("x"), step.output = in.input("x0_hat"), step.displacement = in.input("displacement");
        step.x_s = in.pointer("x_s"), step.prediction = Prediction::sample, step.clip_noise = true;
        weights.before = in.pointer("log_weights"), weights.after = in.pointer("log_weights");
        weights.doubles = in.flag();
        in.levels(step, five);
        step.shape = in.shape(), step.threads = static_cast<int>(in.integer());
        expect_memory("log_weights", weights.before, step.shape.particles);  // which may have no other elements
        const py::gil_scoped_release release;
        prepare(step.x_s, step.x.dtype, step.shape);
        cpu::kernels().propose_and_weigh(step, weights);
    });
}

// log_weights, their dtype, rows, particles, number, scheme, sorted, keep_from, seed, step, stream, first_row,
// ancestors, log_weights after, log_mean_weight, ess, threads
PyObject* resample(PyObject*, PyObject* const* values, Py_ssize_t given) {
    return object_or_error([&] {
        Arguments in(values, given, 17);
        cpu::Resampling call{};
        call.log_weights = in.input("log_weights");
        if (call.log_weights.dtype != Dtype::float32 && call.log_weights.dtype != Dtype::float64)
            throw std::invalid_argument("log_weights must be float32 or float64");
        call.rows = in.integer(), call.particles = in.integer(), call.number = in.integer();
        check_below("rows", call.rows, kMaxParticles + 1);
        for (const uint64_t count : {call.particles, call.number})
            check_below("particles and number, less one,", count - 1, (uint64_t{1} << 31) - 1);
        in.expect_memory(call.rows);
        call.scheme = in.scheme(), call.sorted = in.flag(), call.keep_from = in.number();
        const uint64_t seed = in.integer(), step = in.integer(), stream = in.integer(), first_row = in.integer();
        const RandnShape counter = checked_shape(call.rows, 1, seed, step, stream, first_row);
        call.seed = counter.seed, call.step = counter.step, call.stream = counter.stream, call.first_row = first_row;
        call.ancestors = static_cast<int32_t*>(in.pointer("ancestors"));
        call.log_weights_after = in.pointer("log_weights");
        call.log_mean_weight = static_cast<double*>(in.pointer("log_mean_weight"));
        call.ess = static_cast<double*>(in.pointer("ess"));
        in.expect_memory(call.rows);
        call.threads = static_cast<int>(in.integer());
        int64_t bad;
        {
            const py::gil_scoped_release release;
            bad = cpu::kernels().resample(call);
        }
        return PyLong_FromLongLong(bad);
    });
}

PyMethodDef fast(const char* name, PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t), const char* doc) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL, doc};
}

PyMethodDef fast_methods[] = {
    fast("reverse_step", reverse_step, "One reverse step."),
    fast("propose_and_weigh", propose_and_weigh, "The guided step, and the log-weights after it."),
    fast("resample", resample, "Ancestors; returns the first row without a usable weight, or -1."),
    {nullptr, nullptr, 0, nullptr},
};

py::tuple gather_particles(uintptr_t ancestors, bool wide, uint64_t rows, uint64_t particles,
                           const std::vector<std::pair<uintptr_t, uint64_t>>& states, int threads) {
    if (!wide) check_below("particles", particles, uint64_t{1} << 31);
    expect_memory("ancestors", reinterpret_cast<const void*>(ancestors), rows * (particles > 0));
    std::vector<ParticleArray> arrays;
    for (const auto& [data, bytes] : states) {
        arrays.push_back({reinterpret_cast<void*>(data), bytes});
        expect_memory("states", arrays.back().data, rows * (particles > 0 && bytes > 0));
    }
    cpu::Gathered done;
    {
        const py::gil_scoped_release release;
        done = cpu::kernels().gather_particles(reinterpret_cast<const void*>(ancestors), wide, rows, particles,
                                               arrays.data(), arrays.size(), threads);
    }
    return py::make_tuple(done.bad, done.scratch);
}

using MaybeAddress = std::optional<uintptr_t>;  // None: absent

void* pointer(const char* name, MaybeAddress address, uint64_t elements) {
    if (!address) return nullptr;
    void* data = reinterpret_cast<void*>(*address);
    expect_memory(name, data, elements);
    return data;
}

int64_t log_prob_and_gradient(int family, double scale, double df, double background, double constant, int dtype,
                              uint64_t samples, uint64_t elements, uintptr_t z, uintptr_t y, uint64_t y_rows,
                              MaybeAddress rows, MaybeAddress added, uint64_t added_rows, uintptr_t log_prob,
                              MaybeAddress gradient, int threads) {
    check_below("family", static_cast<uint64_t>(family), 4);
    const cpu::LogDensity density{static_cast<cpu::Family>(family), scale, df, background, constant};
    const cpu::DensityArrays arrays{reinterpret_cast<const void*>(z),
                                    reinterpret_cast<const void*>(y),
                                    static_cast<const int64_t*>(pointer("rows", rows, samples)),
                                    pointer("added", added, added_rows * (elements > 0)),
                                    reinterpret_cast<double*>(log_prob),
                                    pointer("gradient", gradient, samples * (elements > 0)),
                                    checked_dtype(dtype, Dtype::float64),
                                    samples,
                                    elements,
                                    y_rows,
                                    added_rows};
    expect_memory("z", arrays.z, samples * (elements > 0));
    expect_memory("y", arrays.y, y_rows * (elements > 0));
    expect_memory("log_prob", arrays.log_prob, samples);
    const py::gil_scoped_release release;
    return cpu::kernels().log_prob_and_gradient(density, arrays, threads);
}

void log_functions(uintptr_t x, uintptr_t log, uintptr_t log1p, uintptr_t log_gamma, std::size_t count) {
    const py::gil_scoped_release release;
    cpu::kernels().log_functions(reinterpret_cast<const double*>(x), reinterpret_cast<double*>(log),
                                 reinterpret_cast<double*>(log1p), reinterpret_cast<double*>(log_gamma), count);
}

void mersenne_doubles(uintptr_t key, uintptr_t position, uintptr_t out, uint64_t count) {
    const py::gil_scoped_release release;
    cpu::kernels().mersenne_doubles(reinterpret_cast<uint32_t*>(key), reinterpret_cast<int32_t*>(position),
                                    reinterpret_cast<double*>(out), count);
}

void invert(uintptr_t weights, uint64_t particles, double scale, int draws, uintptr_t positions, uint64_t number,
            uintptr_t ancestors, int threads) {
    check_below("particles, less one,", particles - 1, kMaxParticles);
    check_below("draws", static_cast<uint64_t>(draws), 3);
    const py::gil_scoped_release release;
    cpu::kernels().invert({reinterpret_cast<const double*>(weights), particles, scale, static_cast<cpu::Draws>(draws),
                           reinterpret_cast<double*>(positions), number, reinterpret_cast<int64_t*>(ancestors),
                           threads});
}

cpu::Shares shares(uintptr_t weights, uint64_t particles, int64_t number, uintptr_t ancestors, int threads) {
    check_below("particles, less one,", particles - 1, kMaxParticles);
    return {reinterpret_cast<const double*>(weights), particles, number, reinterpret_cast<int64_t*>(ancestors), threads};
}

int64_t whole_copies(uintptr_t weights, uint64_t particles, int64_t number, uintptr_t ancestors, uintptr_t rest,
                     int threads) {
    const cpu::Shares call = shares(weights, particles, number, ancestors, threads);
    const py::gil_scoped_release release;
    return cpu::kernels().whole_copies(call, reinterpret_cast<double*>(rest));
}

bool round_in_pairs(uintptr_t weights, uint64_t particles, int64_t number, uintptr_t ancestors, uintptr_t uniforms,
                    int threads) {
    const cpu::Shares call = shares(weights, particles, number, ancestors, threads);
    const py::gil_scoped_release release;
    return cpu::kernels().round_in_pairs(call, reinterpret_cast<const double*>(uniforms));
}

void replace_killed(uintptr_t killed, uintptr_t drawn, uintptr_t ancestors, uint64_t particles) {
    const py::gil_scoped_release release;
    cpu::kernels().replace_killed(reinterpret_cast<const bool*>(killed), reinterpret_cast<const int64_t*>(drawn),
                                  reinterpret_cast<int64_t*>(ancestors), particles);
}

py::tuple exponentiate(uintptr_t log_weights, uint64_t count, uintptr_t weights, uintptr_t out, int threads) {
    check_below("count, less one,", count - 1, kMaxParticles);
    cpu::Exponentials call{reinterpret_cast<const double*>(log_weights),
                           reinterpret_cast<const double*>(weights),
                           reinterpret_cast<double*>(out),
                           count,
                           {},
                           threads};
    {
        const py::gil_scoped_release release;
        cpu::kernels().exponentiate(call);
    }
    return py::make_tuple(call.sums[0], call.sums[1], call.sums[2]);
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
    if (PyModule_AddFunctions(m.ptr(), fast_methods) != 0) throw py::error_already_set();
    m.def("gather_particles", &gather_particles, py::arg("ancestors"), py::arg("wide"), py::arg("rows"),
          py::arg("particles"), py::arg("states"), py::arg("threads"),
          "Move the particles of states (data, bytes of each) to where ancestors say. Returns the place of the "
          "first ancestor out of range (then nothing moved) or -1, and the bytes of memory that it took.");
    m.def("log_prob_and_gradient", &log_prob_and_gradient, py::arg("family"), py::arg("scale"), py::arg("df"),
          py::arg("background"), py::arg("constant"), py::arg("dtype"), py::arg("samples"), py::arg("elements"),
          py::arg("z"), py::arg("y"), py::arg("y_rows"), py::arg("rows"), py::arg("added"), py::arg("added_rows"),
          py::arg("log_prob"), py::arg("gradient"), py::arg("threads"),
          "Log-densities [samples] and their gradients [samples, elements] in z. Returns the place of the first "
          "row out of range (then nothing is written) or -1.");
    m.def("log_functions", &log_functions, py::arg("x"), py::arg("log"), py::arg("log1p"),
          py::arg("log_gamma"), py::arg("count"),
          "ln x, ln(1 + x) and ln Gamma(x), as log_prob_and_gradient has them.");
    m.def("mersenne_doubles", &mersenne_doubles, py::arg("key"), py::arg("position"), py::arg("out"),
          py::arg("count"), "Uniforms of the MT19937 whose key [624] and position stand there, and move on.");
    m.def("invert", &invert, py::arg("weights"), py::arg("particles"), py::arg("scale"), py::arg("draws"),
          py::arg("positions"), py::arg("number"), py::arg("ancestors"), py::arg("threads"),
          "Ancestors [number] (int64) of float64 weights [particles] over `scale`. Positions, overwritten, hold one "
          "uniform (draws 0), one for each stratum (1), or logarithms of number + 1 of them (2).");
    m.def("whole_copies", &whole_copies, py::arg("weights"), py::arg("particles"), py::arg("number"),
          py::arg("ancestors"), py::arg("rest"), py::arg("threads"),
          "The whole parts of the shares as ancestors, and what remains of each. Returns how many, or -1.");
    m.def("round_in_pairs", &round_in_pairs, py::arg("weights"), py::arg("particles"), py::arg("number"),
          py::arg("ancestors"), py::arg("uniforms"), py::arg("threads"),
          "Ancestors by Srinivasan's sampling process. Returns whether they were `number`.");
    m.def("replace_killed", &replace_killed, py::arg("killed"), py::arg("drawn"), py::arg("ancestors"),
          py::arg("particles"), "Each particle's own index, or where it is killed the next that is drawn.");
    m.def("exponentiate", &exponentiate, py::arg("log_weights"), py::arg("count"), py::arg("weights"),
          py::arg("out"), py::arg("threads"),
          "w = exp(log_weight - largest), normalised to `out` unless 0. Returns the largest, the sum of w, and that of "
          "its squares, or of its products with `weights` unless 0.");
    m.def("philox", &philox_words, py::arg("counter"), py::arg("key"), "The four words of Philox4x32-10.");
    m.def("instruction_set", [] { return cpu::kernels().name; }, "What the kernels run with.");
    m.def("instruction_sets", &instruction_sets, "What they can run with on this processor, the best first.");
    m.def("use_instruction_set", &use_instruction_set, py::arg("name"), "Run with another one: the same bits.");
}

// Classifier-free guidance and the predicted clean sample in one pass, and their gradients in another:
//
//   guided = unconditional + scale (output - unconditional)        if there is an unconditional output, else the output
//   x0_hat = p x + q guided
//
// The gradients are multiples of the incoming gradient: p, q scale and q (1 - scale) times it.
#include <cmath>

#include "../../common/binding.h"
#include "../../common/step.h"
#include "../../cpu/lanes.h"
#include "../../cpu/memory.h"
#include "../../cpu/tiles.h"
#include "../../cpu/types.h"

namespace fastguide::cpu {
namespace {

// One number for all samples, or one for each.
struct Numbers {
    double common;
    const double* each;

    double of(uint64_t row) const { return each ? each[row] : common; }
};

// What the forward and the backward pass both need. Tensors are [samples, elements].
struct Conversion {
    Prediction prediction;
    Numbers alpha, sigma, scale;
    uint64_t samples, elements;
    int threads;

    bool per_sample() const { return alpha.each || scale.each; }
};

// Writes value(i, lanes) for `count` elements to `to`, one vector at a time.
template <class R, class Value>
FG_INLINE void fill(R* to, uint64_t count, bool past_caches, const Value& value) {
    each_vector(to, past_caches, 0, count, [&](uint64_t i, const auto& lanes) __attribute__((always_inline)) {
        lanes.write_result(to + i, value(i, lanes));
    });
}

// The same into a result of any type. If the type is not R, the values go through `buffer`.
template <class R, class Value>
FG_INLINE void write(const Result& result, uint64_t begin, uint64_t count, bool past_caches, R* buffer, const Value& value) {
    with_type(result.dtype, [&](auto type) __attribute__((always_inline)) {
        using T = decltype(type);
        T* const to = static_cast<T*>(result.data) + begin;
        if constexpr (std::is_same_v<T, R>) {
            fill(to, count, past_caches, value);
        } else {
            fill(buffer, count, false, value);
            convert(to, buffer, count);
        }
    });
}

// Calls f(row, begin, count, memory) for `count` elements from `begin` on. The numbers of sample `row` hold for all of
// them.
template <class R, class F>
void over_samples(const Conversion& c, int buffers, const F& f) {
    // If all samples have the same numbers, the ends of samples do not matter.
    const Tiling tiling = c.per_sample() ? Tiling{c.samples, c.elements} : Tiling{1, c.samples * c.elements};
    Memory counted;
    for (int i = 0; i < buffers; ++i) counted.take<R>(kTile);
    share_out(tiling.tiles(), kTileGrain, c.threads, counted, [&](uint64_t index, const Memory& memory) {
        const Tile tile = tiling.at(index);
        const uint64_t in_row = tile.count / tile.rows;
        for (uint64_t i = 0; i < tile.rows; ++i)
            f(tile.row + i, (tile.row + i) * tiling.elements + tile.begin, in_row, memory);
    });
}

bool past_caches(const Conversion& c) { return c.samples * c.elements * sizeof(float) >= kPastCaches; }

// `not_finite`: flags of output and unconditional; used only if `kWatched`.
template <class R, bool kWatched>
void predict(const Conversion& c, const Input& x, const Input& output, const Input& unconditional, const Result& x0,
             int32_t* not_finite) {
    const bool sample = c.prediction == Prediction::sample, streams = past_caches(c);
    over_samples<R>(c, 4, [&](uint64_t row, uint64_t begin, uint64_t count, Memory memory) {
        const auto stage = [&](const Input& input) __attribute__((always_inline)) {
            return staged(memory.take<R>(kTile), input, begin, count);
        };
        const auto [p, q] = x0_multipliers(c.alpha.of(row), c.sigma.of(row), c.prediction);
        const Vector<R> ps = splat(static_cast<R>(p)), qs = splat(static_cast<R>(q));
        const Vector<R> scale = splat(static_cast<R>(c.scale.of(row)));
        const R *const given = stage(output), *const state = sample ? given : stage(x);
        R* const buffer = memory.take<R>(kTile);
        struct {
            Watch<R> output, unconditional;
        } seen;
        const auto read = [](const R* from, Watch<R>& watch, const auto& lanes) __attribute__((always_inline)) {
            const Vector<R> v = lanes.read(from);
            if (kWatched) watch.see(v);
            return v;
        };
        const auto converted = [=](uint64_t i, Vector<R> v, const auto& lanes) __attribute__((always_inline)) {
            return fused(qs, v, ps * lanes.read(state + i));
        };
        const auto guide = [&](const auto& convert_guided) __attribute__((always_inline)) {
            if (!unconditional.data)
                return write(x0, begin, count, streams, buffer, [=, &seen](uint64_t i, const auto& lanes) __attribute__((always_inline)) {
                    return convert_guided(i, read(given + i, seen.output, lanes), lanes);
                });
            const R* const base = stage(unconditional);
            write(x0, begin, count, streams, buffer, [=, &seen](uint64_t i, const auto& lanes) __attribute__((always_inline)) {
                const Vector<R> b = read(base + i, seen.unconditional, lanes);
                return convert_guided(i, fused(scale, read(given + i, seen.output, lanes) - b, b), lanes);
            });
        };
        if (sample) guide([](uint64_t, Vector<R> v, const auto&) __attribute__((always_inline)) { return v; });
        else guide(converted);
        if (kWatched) seen.output.report(not_finite), seen.unconditional.report(not_finite + 1);
    });
}

template <class R>
void pull_back(const Conversion& c, const Input& grad, const Result (&results)[3]) {
    const bool streams = past_caches(c);
    over_samples<R>(c, 2, [&](uint64_t row, uint64_t begin, uint64_t count, Memory memory) {
        const R* const from = staged(memory.take<R>(kTile), grad, begin, count);
        R* const buffer = memory.take<R>(kTile);
        const auto [p, q] = x0_multipliers(c.alpha.of(row), c.sigma.of(row), c.prediction);
        const double scale = c.scale.of(row), factors[] = {p, q * scale, q * (1.0 - scale)};
        for (int k = 0; k < 3; ++k) {
            if (!results[k].data) continue;
            const Vector<R> factor = splat(static_cast<R>(factors[k]));
            write(results[k], begin, count, streams, buffer, [=](uint64_t i, const auto& lanes) __attribute__((always_inline)) {
                return factor * lanes.read(from + i);
            });
        }
    });
}

// --- what Python passes -------------------------------------------------------------------------------------

Result read_result(Arguments& in, const char* name) {
    void* data = in.pointer_or_none(name);
    return {data, in.dtype()};
}

// prediction, levels (a tuple of two floats, or the address of two columns), scale (a float, or the address of a
// column), samples, elements, threads
Conversion read_conversion(Arguments& in) {
    Conversion c{};
    c.prediction = in.code("prediction", Prediction::flow);
    const double* columns = nullptr;
    if (in.is_tuple()) {
        Arguments each = in.items();
        each.expect(2);
        const double alpha = each.number(), sigma = each.number();
        const bool divides = c.prediction == Prediction::epsilon || c.prediction == Prediction::score;
        const double divisor = divides ? alpha : c.prediction == Prediction::sample ? 1.0 : alpha + sigma;
        if (!(alpha >= 0.0 && sigma >= 0.0 && std::isfinite(alpha + sigma) && divisor > 0.0))
            throw std::invalid_argument("levels: expected finite ones that determine x0");
        c.alpha.common = alpha, c.sigma.common = sigma;
    } else {
        columns = in.pointer<const double>("levels");
    }
    if (in.is_float()) c.scale.common = in.number();
    else c.scale.each = in.pointer<const double>("guidance_scale");
    if (!std::isfinite(c.scale.common)) throw std::invalid_argument("guidance_scale: expected a finite one");
    c.samples = in.integer(), c.elements = in.integer();
    in.expect_memory(c.samples * (c.elements > 0));
    c.alpha.each = columns, c.sigma.each = columns ? columns + c.samples : nullptr;
    c.threads = in.threads();
    return c;
}

void expect_large_pages(const Conversion& c, const Result& result) {
    if (result.data) large_pages(result.data, c.samples * c.elements * size_of(result.dtype));
}

// x, x's dtype, model_output, its dtype, unconditional (or None), its dtype, x0_hat, its dtype, not_finite (or None),
// a conversion
PyObject* predict_x0(Arguments& in) {
    Input inputs[3];
    const char* const names[] = {"x", "model_output", "unconditional"};
    for (int k = 0; k < 3; ++k) {
        const void* data = in.pointer_or_none(names[k]);
        inputs[k] = {data, in.dtype()};
    }
    const Result x0 = read_result(in, "x0_hat");
    int32_t* const not_finite = in.pointer_or_none<int32_t>("not_finite");
    const Conversion c = read_conversion(in);
    without_gil([&] {
        if (c.samples == 0 || c.elements == 0) return;
        expect_large_pages(c, x0);
        const auto as = [&](auto type) __attribute__((always_inline)) {
            using R = decltype(type);
            if (not_finite) predict<R, true>(c, inputs[0], inputs[1], inputs[2], x0, not_finite);
            else predict<R, false>(c, inputs[0], inputs[1], inputs[2], x0, nullptr);
        };
        if (inputs[0].dtype == Dtype::float64) as(double{});
        else as(float{});
    });
    return none();
}

// gradient in x0_hat, its dtype, the gradients in x, model_output and unconditional (each may be None), each followed by
// its dtype, a conversion
PyObject* predict_x0_backward(Arguments& in) {
    const void* data = in.pointer("grad");
    const Input grad{data, in.dtype()};
    const Result x = read_result(in, "x"), output = read_result(in, "model_output");
    const Result results[] = {x, output, read_result(in, "unconditional")};
    const Conversion c = read_conversion(in);
    without_gil([&] {
        if (c.samples == 0 || c.elements == 0) return;
        for (const Result& result : results) expect_large_pages(c, result);
        if (grad.dtype == Dtype::float64) pull_back<double>(c, grad, results);
        else pull_back<float>(c, grad, results);
    });
    return none();
}

Binding binding{"predict_x0", fastcall<predict_x0, 15>, "The predicted clean sample."};
Binding backward{"predict_x0_backward", fastcall<predict_x0_backward, 14>, "The gradients of predict_x0."};

}  // namespace
}  // namespace fastguide::cpu

// Arguments that the bindings of reverse_step and propose_and_weigh both read.
#pragma once

#include <cmath>

#include "../common/binding.h"
#include "memory.h"
#include "step.h"

namespace fastguide::cpu {

inline void read_inputs(Arguments& in, ReverseStep& step, const char* output) {
    step.x = {in.pointer_or_none("x"), in.dtype()};
    step.output = {in.pointer_or_none(output), in.dtype()};
    step.displacement = {in.pointer_or_none("displacement"), in.dtype()};
}

// Either a tuple of five floats, which are kept in `five`, or the address of five columns.
inline void read_coefficients(Arguments& in, ReverseStep& step, double (&five)[5]) {
    step.in_columns = !in.is_tuple();
    if (step.in_columns) {
        step.coefficients = in.pointer<const double>("coefficients");
        return;
    }
    Arguments each = in.items();
    if (each.count() != 5) throw std::invalid_argument("coefficients: expected five");
    for (double& value : five) {
        value = each.number();
        if (!(value >= 0.0 && std::isfinite(value))) throw std::invalid_argument("coefficients: expected finite");
    }
    const bool divides = step.prediction == Prediction::epsilon || step.prediction == Prediction::score;
    if (five[1] == 0.0 || five[4] > five[3] * (1 + 1e-6) || (divides && five[0] == 0.0))
        throw std::invalid_argument("coefficients: expected sigma_t > 0, tau <= sigma_s, and alpha_t > 0 to divide by");
    step.coefficients = five;
}

// The scale of the displacement: a float or the address of a column. Call it after read_coefficients.
inline void read_scale(Arguments& in, ReverseStep& step) {
    step.displacement_scale = 1.0;
    if (in.is_float()) step.displacement_scale = in.number();
    else step.displacement_scales = in.pointer<const double>("displacement_scale");
    if (!std::isfinite(step.displacement_scale)) throw std::invalid_argument("displacement_scale: expected a finite one");
    step.per_particle = step.in_columns || step.displacement_scales;
}

// The unconditional output and the guidance scale: a float or the address of a column.
inline void read_guidance(Arguments& in, ReverseStep& step) {
    step.unconditional = {in.pointer_or_none("unconditional"), in.dtype()};
    if (in.is_float()) step.guidance_scale = in.number();
    else step.guidance_scales = in.pointer<const double>("guidance_scale");
    if (!std::isfinite(step.guidance_scale)) throw std::invalid_argument("guidance_scale: expected a finite one");
}

// The code of a ClipKind and two numbers.
inline void read_clip(Arguments& in, ReverseStep& step) {
    const ClipKind kind = in.code("clip", ClipKind::dynamic);
    const double low = in.number();
    step.clip = {kind, low, in.number()};
}

// The shape [N, *event], the counter and the number of threads. Checks that the pointers read before are not null.
inline void read_shape(Arguments& in, ReverseStep& step) {
    if (!in.is_tuple()) throw TypeError("expected [N, *event]");
    Arguments sizes = in.items();
    if (sizes.count() == 0) throw TypeError("expected [N, *event]");
    const uint64_t particles = sizes.integer();
    uint64_t elements = 1;
    for (Py_ssize_t i = 1; i < sizes.count(); ++i) {
        const uint64_t size = sizes.integer();
        check_below("elements", size, kMaxElements / (elements ? elements : 1) + 1);
        elements *= size;
    }
    in.expect_memory(particles * (elements > 0));
    step.shape = in.counter(particles, elements);
    step.threads = in.threads();
}

inline void prepare_results(const ReverseStep& step) {
    const uint64_t bytes = step.shape.particles * step.shape.elements * size_of(step.x.dtype);
    large_pages(step.x_s, bytes);
    if (step.x0) large_pages(step.x0, bytes);
}

}  // namespace fastguide::cpu

#include "../../cpu/step.h"
#include "../../cpu/step_arguments.h"

namespace fastguide::cpu {
namespace {

template <class R>
void reverse_step_as(const ReverseStep& step) {
    const Prepared<R> call(step);
    const Tiling tiling{step.shape.particles, step.shape.elements};
    const Memory counted = TileBuffers<R>::counted(call);
    share_out(tiling.tiles(), kTileGrain, step.threads, counted, [&](uint64_t index, const Memory& memory) {
        step_tile<R>(call, tiling.at(index), nullptr, memory);
    });
}

// x, x's dtype, model_output, its dtype, displacement (or None), its dtype, x_s, x0 (or None), return_x0, not_finite (or None),
// prediction, unconditional (or None), its dtype, guidance_scale, clip (kind, low, high), clip_noise, coefficients,
// displacement_scale, shape of x, seed, step, stream, first_particle, threads
PyObject* reverse_step(Arguments& in) {
    ReverseStep step{};
    double five[5];
    read_inputs(in, step, "model_output");
    step.x_s = in.pointer("x_s"), step.x0 = in.pointer_or_none("x0");
    in.flag();
    step.not_finite = in.pointer_or_none<int32_t>("not_finite");
    step.prediction = in.code("prediction", Prediction::flow);
    read_guidance(in, step);
    read_clip(in, step);
    step.clip_noise = in.flag();
    read_coefficients(in, step, five);
    read_scale(in, step);
    read_shape(in, step);
    without_gil([&] {
        prepare_results(step);
        if (step.shape.particles == 0 || step.shape.elements == 0) return;
        if (step.x.dtype == Dtype::float64) reverse_step_as<double>(step);
        else reverse_step_as<float>(step);
    });
    return none();
}

Binding binding{"reverse_step", fastcall<reverse_step, 26>, "One reverse step."};

}  // namespace
}  // namespace fastguide::cpu

#include "../step.h"

namespace fastguide::cpu::FG_ISA {
namespace {

template <class R>
void reverse_step_as(const Step& step) {
    const Run<R> run(step);
    const Tiling tiling{step.shape.particles, step.shape.elements};
    const Memory counted = TileBuffers<R>::counted(run);
    share_out(tiling.tiles(), kTileGrain, step.threads, counted, [&](uint64_t index, const Memory& memory) {
        step_tile<false, R>(run, tiling.at(index), nullptr, memory);
    });
}

}  // namespace

void reverse_step(const Step& step) {
    if (step.shape.particles == 0 || step.shape.elements == 0) return;
    if (step.x.dtype == Dtype::float64) reverse_step_as<double>(step);
    else reverse_step_as<float>(step);
}

}  // namespace fastguide::cpu::FG_ISA

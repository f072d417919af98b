#include "../step.h"

namespace fastguide::cpu::FG_ISA {
namespace {

template <class R>
void reverse_step_as(const Step& step) {
    const Run<R> run(step);
    const uint64_t particles = step.shape.particles, elements = step.shape.elements;
    if (step.clip.kind != ClipKind::dynamic) {
        const Tiling tiling{particles, elements};
        share_out(tiling.tiles(), kTileGrain, step.threads,
                  [&](uint64_t index) { step_tile<false, R>(run, tiling.at(index), nullptr, nullptr); });
        return;
    }
    share_out(particles, kTileGrain * kTile / elements + 1, step.threads, [&](uint64_t row) {
        const R bound = threshold_of(run, row);
        const Tiling tiling{1, elements};
        for (uint64_t index = 0; index < tiling.tiles(); ++index) {
            Tile tile = tiling.at(index);
            tile.row = row;
            step_tile<false, R>(run, tile, &bound, nullptr);
        }
    });
}

}  // namespace

void reverse_step(const Step& step) {
    if (step.shape.particles == 0 || step.shape.elements == 0) return;
    if (step.x.dtype == Dtype::float64) reverse_step_as<double>(step);
    else reverse_step_as<float>(step);
}

}  // namespace fastguide::cpu::FG_ISA

#include "../../cpu/step.h"
#include "../../cpu/step_arguments.h"
#include "../../cpu/sums.h"

namespace fastguide::cpu {
namespace {

// Log-weights [particles], in double or float.
struct Weights {
    const void* before;
    void* after;
    bool doubles;
};

template <class R, class W>
void propose_and_weigh_as(const ReverseStep& step, const Weights& weights) {
    const Prepared<R> call(step);
    const uint64_t particles = step.shape.particles, elements = step.shape.elements;
    const Tiling tiling{particles, elements};
    const auto before = static_cast<const W*>(weights.before);
    const auto after = static_cast<W*>(weights.after);
    const double inverse = 1.0 / static_cast<double>(call.common.value[kTau]);
    // `sum`: tau times the particle's log-density ratio. A weight without noise keeps its bits.
    const auto weigh = [&](uint64_t row, double sum) __attribute__((always_inline)) {
        const double tau = static_cast<double>(call.tau_of(row)), weight = static_cast<double>(before[row]);
        const double over = step.per_particle ? 1.0 / tau : inverse;
        after[row] = tau == 0.0 ? before[row] : static_cast<W>(weight - sum * over);
    };
    const uint64_t parts = tiling.rows_per_tile() > 1 ? 1 : tiling.tiles_per_row();
    const Scratch<double> sums(parts > 1 ? tiling.tiles() : 0);  // different threads may take the tiles of one particle
    const uint64_t most = tiling.largest() + kLanes64, most_rows = elements < kPlaces ? most : 0;
    Memory counted = TileBuffers<R>::counted(call);
    counted.take<R>(most), counted.take<double>(most_rows);
    share_out(tiling.tiles(), kTileGrain, step.threads, counted, [&](uint64_t index, Memory memory) {
        R* const terms = memory.take<R>(most);
        double* const of_rows = memory.take<double>(most_rows);
        const Tile tile = tiling.at(index);
        step_tile<R>(call, tile, terms, memory);
        if (parts > 1) {
            sums.data[index] = sum_in_fours(terms, tile.count);
        } else if (elements < kPlaces) {
            sum_short_rows(of_rows, terms, tile.rows, elements);
            for (uint64_t i = 0; i < tile.rows; ++i) weigh(tile.row + i, of_rows[i]);
        } else {
            for (uint64_t i = 0; i < tile.rows; ++i)
                weigh(tile.row + i, sum_in_fours(terms + i * elements, elements));
        }
    });
    for (uint64_t row = 0; parts > 1 && row < particles; ++row) {
        double sum = 0.0;
        for (uint64_t k = 0; k < parts; ++k) sum += sums.data[row * parts + k];
        weigh(row, sum);
    }
}

// x, x's dtype, x0_hat, its dtype, displacement, its dtype, x_s, log-weights before, after, whether they are doubles,
// not_finite (or None), clip (kind, low, high), coefficients, displacement_scale, shape of x, seed, step, stream,
// first_particle, threads
PyObject* propose_and_weigh(Arguments& in) {
    ReverseStep step{};
    Weights weights;
    double five[5];
    read_inputs(in, step, "x0_hat");
    step.x_s = in.pointer("x_s"), step.prediction = Prediction::sample, step.clip_noise = true;
    weights.before = in.pointer("log_weights"), weights.after = in.pointer("log_weights");
    weights.doubles = in.flag();
    step.not_finite = in.pointer_or_none<int32_t>("not_finite");
    read_clip(in, step);
    read_coefficients(in, step, five);
    read_scale(in, step);
    read_shape(in, step);
    expect_memory("log_weights", weights.before, step.shape.particles);  // particles have weights even without elements
    without_gil([&] {
        prepare_results(step);
        if (step.shape.particles == 0) return;
        if (step.shape.elements == 0) {  // nothing moves
            const std::size_t size = weights.doubles ? sizeof(double) : sizeof(float);
            __builtin_memcpy(weights.after, weights.before, step.shape.particles * size);
            return;
        }
        const auto with_weights = [&](auto weight) __attribute__((always_inline)) {
            using W = decltype(weight);
            if (step.x.dtype == Dtype::float64) propose_and_weigh_as<double, W>(step, weights);
            else propose_and_weigh_as<float, W>(step, weights);
        };
        if (weights.doubles) with_weights(double{});
        else with_weights(float{});
    });
    return none();
}

Binding binding{"propose_and_weigh", fastcall<propose_and_weigh, 22>, "The guided step, and the log-weights after it."};

}  // namespace
}  // namespace fastguide::cpu

#include "../../cpu/step.h"
#include "../../cpu/step_arguments.h"

namespace fastguide::cpu {
namespace {

// [particles], in double or float.
struct Weights {
    const void* before;
    void* after;
    bool doubles;
};

constexpr uint64_t kShort = 8;  // terms up to which adding one by one is faster

// The sum of sums.h.
template <class R>
FG_INLINE double short_sum(const R* terms, uint64_t count) {
    double lanes[2 * kShort];
    for (uint64_t k = 0; k < count; ++k) lanes[k] = terms[k];
    for (uint64_t half = kShort; half > 0; half /= 2)
        for (uint64_t k = 0; k < half && k + half < count; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
}

template <class R, class W>
void propose_and_weigh_as(const Step& step, const Weights& weights) {
    const Run<R> run(step);
    const uint64_t particles = step.shape.particles, elements = step.shape.elements;
    const Tiling tiling{particles, elements};
    const auto before = static_cast<const W*>(weights.before);
    const auto after = static_cast<W*>(weights.after);
    const double inverse = 1.0 / static_cast<double>(run.common.tau);
    // `sum` of tau times the terms of its log-density ratio; a weight without noise keeps its bits
    const auto weigh = [=](uint64_t row, double sum, double one_over_tau) __attribute__((always_inline)) {
        after[row] = static_cast<W>(static_cast<double>(before[row]) - sum * one_over_tau);
    };
    const auto weigh_row = [&](uint64_t row, const auto& sum) __attribute__((always_inline)) {
        const double tau = static_cast<double>(run.tau_of(row));
        if (tau == 0.0) after[row] = before[row];
        else weigh(row, sum(), 1.0 / tau);
    };
    const uint64_t parts = tiling.rows_per_tile() > 1 ? 1 : tiling.tiles_per_row();
    const Scratch<double> sums(parts > 1 ? tiling.tiles() : 0);  // one particle's tiles may be many threads'
    Memory counted = TileBuffers<R>::counted(run);
    const uint64_t most = tiling.largest() + kLanes64;
    counted.take<R>(most);
    share_out(tiling.tiles(), kTileGrain, step.threads, counted, [&](uint64_t index, Memory memory) {
        Terms<R> terms{memory.take<R>(most)};
        const Tile tile = tiling.at(index);
        step_tile<true, R>(run, tile, &terms, memory);
        const auto each = [&](uint64_t count, const auto& sum) __attribute__((always_inline)) {
            if (step.per_particle || run.common.tau == R{0}) {
                for (uint64_t i = 0; i < tile.rows; ++i)
                    weigh_row(tile.row + i, [&] { return sum(terms.at + i * count, count); });
            } else {
                for (uint64_t i = 0; i < tile.rows; ++i)
                    weigh(tile.row + i, sum(terms.at + i * count, count), inverse);
            }
        };
        const auto small = [](const R* at, uint64_t count) __attribute__((always_inline)) { return short_sum(at, count); };
        const auto large = [](const R* at, uint64_t count) __attribute__((always_inline)) { return Sum<R>{}.with(at, count); };
        const auto alone = [&] { return terms.sum.with(terms.at + terms.summed, tile.count - terms.summed); };
        if (parts > 1) sums.data[index] = alone();
        else if (tile.rows == 1) weigh_row(tile.row, alone);
        else if (elements == 1) each(1, small);
        else if (elements == 2) each(2, small);
        else if (elements == 3) each(3, small);
        else if (elements == 4) each(4, small);
        else if (elements <= kShort) each(elements, small);
        else each(elements, large);
    });
    for (uint64_t row = 0; parts > 1 && row < particles; ++row) {
        weigh_row(row, [&] {
            double sum = 0.0;
            for (uint64_t k = 0; k < parts; ++k) sum += sums.data[row * parts + k];
            return sum;
        });
    }
}

// x, x's dtype, x0_hat, its dtype, displacement, its dtype, x_s, log-weights before, after, whether they are doubles,
// levels, shape of x, seed, step, stream, first_particle, threads
PyObject* propose_and_weigh(Arguments& in) {
    Step step{};
    Weights weights;
    double five[5];
    read_inputs(in, step, "x0_hat");
    step.x_s = in.pointer("x_s"), step.prediction = Prediction::sample, step.clip_noise = true;
    weights.before = in.pointer("log_weights"), weights.after = in.pointer("log_weights");
    weights.doubles = in.flag();
    read_levels(in, step, five);
    read_shape(in, step);
    expect_memory("log_weights", weights.before, step.shape.particles);  // which may have no other elements
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

Binding binding{"propose_and_weigh", fastcall<propose_and_weigh, 17>, "The guided step, and the log-weights after it."};

}  // namespace
}  // namespace fastguide::cpu

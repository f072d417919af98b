#include "../step.h"

namespace fastguide::cpu::FG_ISA {
namespace {

// The sum of `count` terms in double, in an order that nothing but `count` decides: term i in lane i mod 32, in order,
// and the lanes added to each other in halves. Reads kLanes terms at a time, past the end too.
constexpr uint64_t kLanes = 32;
constexpr uint64_t kShort = 8;  // where adding one by one is faster

template <class R>
FG_INLINE double tree_sum(const R* terms, uint64_t count) {
    constexpr int kSums = static_cast<int>(kLanes) / kLanes64;
    F64 sums[kSums] = {};
    const auto lanes_at = [&](uint64_t i, int k) __attribute__((always_inline)) {
        const R* at = terms + i + k * kLanes64;
        if constexpr (std::is_same_v<R, float>) return widen(load<HalfF32>(at));
        else return load<F64>(at);
    };
    uint64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int k = 0; k < kSums; ++k) sums[k] += lanes_at(i, k);
    if (i < count) {
        I64 place{};
        for (int lane = 0; lane < kLanes64; ++lane) place[lane] = lane;
        for (int k = 0; k < kSums; ++k) {
            const F64 v = lanes_at(i, k);
            sums[k] += place + k * kLanes64 < static_cast<int64_t>(count - i) ? v : F64{};
        }
    }
    for (int half = kSums / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    double lanes[kLanes64];
    store(lanes, sums[0]);
    for (int half = kLanes64 / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
}

// The same sum of up to kLanes terms.
template <class R>
FG_INLINE double short_sum(const R* terms, uint64_t count) {
    double lanes[kLanes];
    for (uint64_t k = 0; k < count; ++k) lanes[k] = terms[k];
    for (uint64_t half = kLanes / 2; half > 0; half /= 2)
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
    const auto weigh = [&](uint64_t row, double sum) __attribute__((always_inline)) {
        after[row] = static_cast<W>(static_cast<double>(before[row]) - sum);
    };
    const auto unweighed = [&](uint64_t row) __attribute__((always_inline)) {
        if (run.tau_of(row) == R{0}) after[row] = before[row];
        return run.tau_of(row) == R{0};
    };
    const uint64_t parts = tiling.rows_per_tile() > 1 ? 1 : tiling.tiles_per_row();
    double* sums = parts > 1 ? new double[tiling.tiles()] : nullptr;  // one particle's tiles may be many threads'
    share_out(tiling.tiles(), kTileGrain, step.threads, [&](uint64_t index) {
        alignas(64) R terms[kTile + kLanes];
        const Tile tile = tiling.at(index);
        step_tile<true, R>(run, tile, terms);
        const auto each = [&](uint64_t count, const auto& sum) __attribute__((always_inline)) {
            for (uint64_t i = 0; i < tile.rows; ++i)
                if (!unweighed(tile.row + i)) weigh(tile.row + i, sum(terms + i * count, count));
        };
        const auto small = [](const R* at, uint64_t count) __attribute__((always_inline)) { return short_sum(at, count); };
        const auto large = [](const R* at, uint64_t count) __attribute__((always_inline)) { return tree_sum(at, count); };
        if (parts > 1) sums[index] = tree_sum(terms, tile.count);
        else if (elements == 1) each(1, small);
        else if (elements == 2) each(2, small);
        else if (elements == 3) each(3, small);
        else if (elements == 4) each(4, small);
        else if (elements <= kShort) each(elements, small);
        else each(elements, large);
    });
    for (uint64_t row = 0; parts > 1 && row < particles; ++row) {
        if (unweighed(row)) continue;
        double sum = 0.0;
        for (uint64_t k = 0; k < parts; ++k) sum += sums[row * parts + k];
        weigh(row, sum);
    }
    delete[] sums;
}

}  // namespace

void propose_and_weigh(const Step& step, const Weights& weights) {
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
}

}  // namespace fastguide::cpu::FG_ISA

#include "../step.h"

namespace fastguide::cpu::FG_ISA {
namespace {

// The sum of `count` terms in double, in an order that nothing but `count` decides: 16 lanes, term i in lane i mod 16,
// added to each other in halves.
template <class R>
FG_INLINE double tree_sum(const R* terms, uint64_t count) {
    constexpr uint64_t kWide = 16;
    constexpr int kSums = static_cast<int>(kWide) / kLanes64;
    F64 sums[kSums] = {};
    const auto add = [&](const R* at) __attribute__((always_inline)) {
        for (int i = 0; i < kSums; ++i) {
            if constexpr (std::is_same_v<R, float>) sums[i] += widen(load<HalfF32>(at + i * kLanes64));
            else sums[i] += load<F64>(at + i * kLanes64);
        }
    };
    uint64_t i = 0;
    for (; i + kWide <= count; i += kWide) add(terms + i);
    if (i < count) {
        R last[kWide] = {};
        __builtin_memcpy(last, terms + i, (count - i) * sizeof(R));
        add(last);
    }
    for (int half = kSums / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    double lanes[kLanes64];
    store(lanes, sums[0]);
    for (int half = kLanes64 / 2; half > 0; half /= 2)
        for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
}

// The same sum of up to 16 terms.
template <class R>
FG_INLINE double short_sum(const R* terms, uint64_t count) {
    double lanes[16];
    for (uint64_t k = 0; k < count; ++k) lanes[k] = terms[k];
    for (uint64_t half = 8; half > 0; half /= 2)
        for (uint64_t k = 0; k < half && k + half < count; ++k) lanes[k] += lanes[k + half];
    return lanes[0];
}

template <class R>
FG_INLINE double sum_of(const R* terms, uint64_t count) {
    if (count == 1) return short_sum(terms, 1);
    if (count == 2) return short_sum(terms, 2);
    if (count == 3) return short_sum(terms, 3);
    if (count <= 16) return short_sum(terms, count);
    return tree_sum(terms, count);
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
    const uint64_t parts = tiling.rows_per_tile() > 1 ? 1 : tiling.tiles_per_row();
    double* sums = parts > 1 ? new double[tiling.tiles()] : nullptr;  // one particle's tiles may be many threads'
    share_out(tiling.tiles(), kTileGrain, step.threads, [&](uint64_t index) {
        alignas(64) R terms[kTile];
        const Tile tile = tiling.at(index);
        step_tile<true, R>(run, tile, nullptr, terms);
        for (uint64_t i = 0; i < tile.rows; ++i) {
            const uint64_t row = tile.row + i;
            if (run.tau_of(row) == R{0}) after[row] = before[row];
            else if (parts > 1) sums[index] = tree_sum(terms, tile.count);
            else weigh(row, sum_of(terms + i * elements, elements));
        }
    });
    for (uint64_t row = 0; parts > 1 && row < particles; ++row) {
        if (run.tau_of(row) == R{0}) continue;
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

// The reverse step, one tile at a time. reverse_step and propose_and_weigh share it.
//
// Inputs of another dtype are converted, tile by tile, into buffers in the first-level cache, and results are converted
// from there. So there is one kernel for float and one for double. The multiply-adds of float are fused (one rounding).
// Those of double are not, and the results are those of fastguide.reference.
#pragma once

#include "../common/step.h"
#include "lanes.h"
#include "threshold.h"
#include "tiles.h"
#include "types.h"

namespace fastguide::cpu {

// One call. All tensors are [particles, elements]. The arithmetic is in double if x is double, otherwise in float.
struct ReverseStep {
    Input x, output, displacement, unconditional;  // the last two may have no data
    void *x_s, *x0;                 // in x's dtype; x0 may be null
    int32_t* not_finite;            // flags of x, output, displacement and unconditional; may be null
    const double* coefficients;     // five numbers, or five columns [particles]
    bool in_columns;                // whether they are columns
    double displacement_scale;
    const double* displacement_scales;  // [particles]; null if all have displacement_scale
    bool per_particle;                  // whether coefficients or displacement scales differ between particles
    double guidance_scale;
    const double* guidance_scales;  // [particles]; null if all have guidance_scale
    Prediction prediction;
    Clip clip;
    bool clip_noise;  // whether the predicted noise is computed from the clipped x0 too
    RandnShape shape;
    int threads;
};

// --- a particle's multipliers -------------------------------------------------------------------------------

// The multipliers of common/step.h, the displacement's scale, and 1 / (2 tau), which is 0 if tau is 0.
enum Factor : int { kP, kQ, kA, kB, kTau, kC, kScale, kHalfInverse, kFactors };

// The multipliers of one particle, the same for all its elements.
template <class R>
struct OneParticle {
    static constexpr bool kMixed = false;
    R value[kFactors];

    FG_INLINE OneParticle(const Multipliers& m, double scale)
        : value{static_cast<R>(m.p),   static_cast<R>(m.q), static_cast<R>(m.a),   static_cast<R>(m.b),
                static_cast<R>(m.tau), static_cast<R>(m.c), static_cast<R>(scale), R{0}} {
        const R half_over = R{0.5} / value[kTau], most = std::numeric_limits<R>::max();
        value[kHalfInverse] = value[kTau] == R{0} ? R{0} : half_over > most ? most : half_over;
    }
    template <class Lanes>
    FG_INLINE Vector<R> get(Factor factor, uint64_t, const Lanes&) const {
        return splat(value[factor]);
    }
};

// The multipliers of each element, for tiles of short particles.
template <class R>
struct EachElement {
    static constexpr bool kMixed = true;
    R* values[kFactors];

    template <class Lanes>
    FG_INLINE Vector<R> get(Factor factor, uint64_t i, const Lanes& lanes) const {
        return lanes.read(values[factor] + i);
    }
};

// --- the arithmetic -----------------------------------------------------------------------------------------

// Some elements of a call. A null pointer means that the call does not have that part. The compiler moves the tests of
// these fields out of the loops.
template <class R>
struct Span {
    const R *x, *output, *displacement, *z;  // the last two may be null
    R *x_s, *x0, *terms;                     // the last two may be null
    R low, high;                             // x0 is clipped to this range
    bool sample;                             // whether the output is x0_hat
    bool keeps_noise;                        // the predicted noise comes from x0_hat before clipping
    bool scaled;                             // the displacement is already multiplied by its scale
    bool guided;                             // the output is already guided, and its parts were checked then
    bool past_caches;                        // x_s and x0 are written past the caches; both have the same alignment
    int32_t* not_finite;                     // flags of x, output and displacement; may be null

    // The same without noise. Weighted particles without noise are not displaced either.
    FG_INLINE Span without_noise() const {
        Span s = *this;
        s.z = nullptr;
        if (terms) s.displacement = s.terms = nullptr;
        return s;
    }
};

// Checks the values that a loop reads.
template <class R>
struct Seen {
    Watch<R> x, output, displacement;
};

// x0_hat before it is clipped.
template <class R, class Source, class Lanes>
FG_INLINE Vector<R> x0_lanes(bool sample, const Source& m, const R* x, const R* output, uint64_t i, const Lanes& lanes) {
    const Vector<R> out = lanes.read(output + i);
    return sample ? out : fused(m.get(kQ, i, lanes), out, m.get(kP, i, lanes) * lanes.read(x + i));
}

// `kPlain`: the noise is the only optional part. The tests that this saves take 5 % of a step whose data is in the caches.
// `kWatched`: `seen` checks the inputs.
template <bool kPlain, bool kWatched, class R, class Source, class Lanes>
FG_INLINE void step_lanes(const Span<R>& s, const Source& m, uint64_t i, const Lanes& lanes, Seen<R>& seen) {
    using V = Vector<R>;
    const auto get = [&](Factor factor) __attribute__((always_inline)) { return m.get(factor, i, lanes); };
    if (kWatched) seen.x.see(lanes.read(s.x + i)), seen.output.see(lanes.read(s.output + i));
    const V unclipped = x0_lanes(s.sample, m, s.x, s.output, i, lanes);
    const V x0 = smaller(splat(s.high), larger(splat(s.low), unclipped));  // a NaN stays
    V x_s = fused(get(kB), x0, get(kA) * lanes.read(s.x + i));
    if (!kPlain && s.keeps_noise) x_s = fused(get(kC), unclipped, x_s);
    V displacement{}, z{};
    if (!kPlain && s.displacement) {
        displacement = lanes.read(s.displacement + i);
        if constexpr (Source::kMixed)  // a weighted particle with tau = 0 takes no displacement, not even a NaN
            if (s.terms) displacement = get(kTau) != R{0} ? displacement : V{};
        if (kWatched) seen.displacement.see(displacement);
        if (!s.scaled) displacement = get(kScale) * displacement;
        x_s = x_s + displacement;
    }
    if (s.z) {
        z = lanes.read(s.z + i);
        x_s = fused(get(kTau), z, x_s);
    }
    lanes.write_result(s.x_s + i, x_s);
    if (!kPlain && s.x0) lanes.write_result(s.x0 + i, x0);
    if (!kPlain && s.terms)  // tau times a term of the log-ratio delta (z + delta / 2), delta = displacement / tau
        lanes.write(s.terms + i, displacement * fused(get(kHalfInverse), displacement, z));
}

template <bool kPlain, bool kWatched, class R, class Source>
void step_span_as(const Span<R>& span, const Source& source, uint64_t begin, uint64_t end) {
    const Span<R> s = span;  // a copy: the compiler knows that no store changes it
    const Source m = source;
    Seen<R> seen;
    each_vector(s.x_s, s.past_caches, begin, end, [&](uint64_t i, const auto& lanes) __attribute__((always_inline)) {
        step_lanes<kPlain, kWatched>(s, m, i, lanes, seen);
    });
    if (!kWatched) return;
    seen.x.report(s.not_finite), seen.displacement.report(s.not_finite + 2);
    if (!s.guided) seen.output.report(s.not_finite + 1);
}

// Elements [begin, end).
template <class R, class Source>
FG_INLINE void step_span(const Span<R>& s, const Source& source, uint64_t begin, uint64_t end) {
    const bool plain = !s.displacement && !s.x0 && !s.keeps_noise && !s.terms;
    const auto as = [&](auto is_plain) __attribute__((always_inline)) {
        if (s.not_finite) step_span_as<decltype(is_plain)::value, true>(s, source, begin, end);
        else step_span_as<decltype(is_plain)::value, false>(s, source, begin, end);
    };
    if (plain) as(std::true_type{});
    else as(std::false_type{});
}

// --- classifier-free guidance -------------------------------------------------------------------------------

// to = unconditional + scale (output - unconditional). `to` may be one of the inputs.
template <bool kWatched, class R>
void guide(R* to, const R* output, const R* unconditional, R scale, uint64_t count, int32_t* not_finite) {
    Watch<R> outputs, bases;
    each_vector(to, false, 0, count, [&](uint64_t i, const auto& lanes) __attribute__((always_inline)) {
        const Vector<R> given = lanes.read(output + i), base = lanes.read(unconditional + i);
        if (kWatched) outputs.see(given), bases.see(base);
        lanes.write(to + i, fused(splat(scale), given - base, base));
    });
    if (kWatched) outputs.report(not_finite + 1), bases.report(not_finite + 3);
}

// Returns the output of `count` elements from `begin` on, guided if the call has an unconditional output. The elements
// are those of particle `row`, or of several particles if all have one scale. The result is in `buffer`, or in place.
template <class R>
const R* output_of(const ReverseStep& s, R* buffer, R* base, uint64_t row, uint64_t begin, uint64_t count, int32_t* not_finite) {
    const R* const output = staged(buffer, s.output, begin, count);
    if (!s.unconditional.data) return output;
    const R* const unconditional = staged(base, s.unconditional, begin, count);
    const R scale = static_cast<R>(s.guidance_scales ? s.guidance_scales[row] : s.guidance_scale);
    if (not_finite) guide<true>(buffer, output, unconditional, scale, count, not_finite);
    else guide<false>(buffer, output, unconditional, scale, count, nullptr);
    return buffer;
}

// --- tiles --------------------------------------------------------------------------------------------------

constexpr uint64_t kLongParticle = 16;  // a particle with at least so many elements has its own loop

// A call, and the values that all its tiles share.
template <class R>
struct Prepared {
    const ReverseStep& step;
    OneParticle<R> common;  // the multipliers, if all particles have the same
    R low, high;
    bool past_caches;
    Scratch<R> bounds;  // each particle's dynamic threshold

    explicit Prepared(const ReverseStep& s)
        : step(s),
          common(s.per_particle ? Multipliers{} : multipliers(coefficients_of(0), s.prediction, s.clip_noise),
                 s.displacement_scale) {
        const bool range = s.clip.kind == ClipKind::range;
        low = range ? static_cast<R>(s.clip.low) : -static_cast<R>(__builtin_inf());
        high = range ? static_cast<R>(s.clip.high) : static_cast<R>(__builtin_inf());
        const auto x_s = reinterpret_cast<uintptr_t>(s.x_s), x0 = reinterpret_cast<uintptr_t>(s.x0);
        past_caches = s.x.dtype == Dtype::float32 && s.shape.particles * s.shape.elements * 4 >= kPastCaches &&
                      (!s.x0 || (x_s - x0) % kBytes == 0);
        if (s.clip.kind == ClipKind::dynamic) find_bounds();
    }

    FG_INLINE Coefficients coefficients_of(uint64_t row) const {
        const uint64_t stride = step.in_columns ? step.shape.particles : 1;
        const double* l = step.coefficients + (step.in_columns ? row : 0);
        return {l[0], l[stride], l[2 * stride], l[3 * stride], l[4 * stride]};
    }
    FG_INLINE R tau_of(uint64_t row) const {
        return step.per_particle ? static_cast<R>(coefficients_of(row).tau) : common.value[kTau];
    }
    FG_INLINE OneParticle<R> of(uint64_t row) const {
        if (!step.per_particle) return common;
        const double scale = step.displacement_scales ? step.displacement_scales[row] : step.displacement_scale;
        return {multipliers(coefficients_of(row), step.prediction, step.clip_noise), scale};
    }

private:
    void find_bounds();
};

// x0_hat before it is clipped, for `count` elements of particle `row`.
template <class R>
FG_INLINE void x0_of(R* x0, const R* x, const R* output, const Prepared<R>& call, uint64_t row, uint64_t count) {
    const OneParticle<R> m = call.of(row);
    for (uint64_t i = 0; i < count; i += kLanesOf<R>) {
        const SomeLanes<R> lanes{count - i < kLanesOf<R> ? static_cast<int>(count - i) : kLanesOf<R>};
        lanes.write(x0 + i, x0_lanes(call.step.prediction == Prediction::sample, m, x, output, i, lanes));
    }
}

template <class R>
constexpr Dtype kDtype = sizeof(R) == 4 ? Dtype::float32 : Dtype::float64;

// x0_hat is computed again in each pass; it is not stored.
template <class R>
void Prepared<R>::find_bounds() {
    const uint64_t particles = step.shape.particles, elements = step.shape.elements;
    const uint64_t most = elements < kTile ? elements : kTile;
    struct Buffers {
        R *x, *output, *unconditional, *x0;
        uint64_t* counts;
    };
    const auto buffers_in = [&](Memory& memory) -> Buffers {
        const auto staging = [&](const Input& input) { return memory.take<R>(input.dtype == kDtype<R> ? 0 : most); };
        const bool guided = step.unconditional.data;
        return {staging(step.x), guided ? memory.take<R>(most) : staging(step.output),
                guided ? staging(step.unconditional) : nullptr, memory.take<R>(most),
                memory.take<uint64_t>(counts_of_threshold(elements))};
    };
    Memory counted;
    buffers_in(counted);
    bounds.allocate(particles);
    share_out(particles, kTileGrain * kTile / elements + 1, step.threads, counted, [&](uint64_t row, Memory memory) {
        const Buffers in = buffers_in(memory);
        const auto each = [&](const auto& f) __attribute__((always_inline)) {
            for (uint64_t at = 0; at < elements; at += kTile) {
                const uint64_t count = elements - at < kTile ? elements - at : kTile, begin = row * elements + at;
                const R* const x = staged(in.x, step.x, begin, count);
                const R* const output = output_of(step, in.output, in.unconditional, row, begin, count, nullptr);
                x0_of(in.x0, x, output, *this, row, count);
                for (uint64_t i = 0; i < count; ++i) f(in.x0[i]);
            }
        };
        bounds.data[row] = threshold<R>(in.counts, elements, step.clip.low, step.clip.high, each);
    });
}

// The scratch buffers of a tile. A buffer that the call does not need is null.
template <class R>
struct TileBuffers {
    R *x, *output, *unconditional, *displacement, *z, *x_s, *x0;
    EachElement<R> multipliers;

    TileBuffers(const Prepared<R>& call, Memory& memory) {
        const ReverseStep& s = call.step;
        const uint64_t most = Tiling{s.shape.particles, s.shape.elements}.largest();
        const auto if_needed = [&](bool needed) { return needed ? memory.take<R>(most) : nullptr; };
        const bool direct = s.x.dtype == kDtype<R>, clips = call.bounds.data;
        x = if_needed(!direct);
        output = if_needed(clips || s.unconditional.data || s.output.dtype != kDtype<R>);
        unconditional = if_needed(s.unconditional.data);
        displacement = if_needed((clips && !s.clip_noise) || (s.displacement.data && s.displacement.dtype != kDtype<R>));
        z = if_needed(s.per_particle || call.common.value[kTau] != R{0});
        x_s = if_needed(!direct);
        x0 = if_needed(!direct && s.x0);
        for (R*& each : multipliers.values) each = if_needed(s.per_particle && s.shape.elements < kLongParticle);
    }
    static Memory counted(const Prepared<R>& call) {
        Memory memory;
        TileBuffers(call, memory);
        return memory;
    }
};

// Replaces the output of a tile by x0_hat, clipped to the dynamic threshold. If the noise comes from the unclipped x0_hat,
// its part c x0_hat is added to the displacement before clipping. The inputs are checked here: later loops do not see
// them.
template <class R>
void clip_tile(const Prepared<R>& call, const Tile& tile, const TileBuffers<R>& buffers, Span<R>& span) {
    const uint64_t in_row = tile.rows == 1 ? tile.count : call.step.shape.elements;
    for (uint64_t i = 0; i < tile.rows; ++i) {
        const uint64_t at = i * in_row;
        const R bound = call.bounds.data[tile.row + i];
        R* const row = buffers.output + at;
        if (span.not_finite) {
            watch(span.x + at, in_row, span.not_finite);
            if (!span.guided) watch(span.output + at, in_row, span.not_finite + 1);
            const bool used = span.displacement && (!span.terms || call.tau_of(tile.row + i) != R{0});
            if (used) watch(span.displacement + at, in_row, span.not_finite + 2);
        }
        x0_of(row, span.x + at, span.output + at, call, tile.row + i, in_row);
        if (span.keeps_noise) {
            const OneParticle<R> m = call.of(tile.row + i);
            for (uint64_t k = 0; k < in_row; ++k) {
                const R moved = span.displacement ? m.value[kScale] * span.displacement[at + k] : R{0};
                buffers.displacement[at + k] = moved + m.value[kC] * row[k];
            }
        }
        for (uint64_t k = 0; k < in_row; ++k) {
            const R v = row[k] < -bound ? -bound : row[k];
            row[k] = (v > bound ? bound : v) / bound;
        }
    }
    span.output = buffers.output, span.sample = true, span.not_finite = nullptr;
    if (span.keeps_noise) span.displacement = buffers.displacement, span.scaled = true, span.keeps_noise = false;
}

// Computes x_s of one tile, and x0 if the call wants it. `terms`, unless null, receives the terms of tau times the
// log-density ratio; particles with tau = 0 are then not displaced.
template <class R>
void step_tile(const Prepared<R>& call, const Tile& tile, R* terms, Memory memory) {
    const ReverseStep& s = call.step;
    const uint64_t elements = s.shape.elements, begin = tile.row * elements + tile.begin, count = tile.count;
    const bool direct = s.x.dtype == kDtype<R>;
    const TileBuffers<R> buffers(call, memory);
    bool noisy = call.common.value[kTau] != R{0};
    for (uint64_t i = 0; s.per_particle && !noisy && i < tile.rows; ++i) noisy = call.tau_of(tile.row + i) != R{0};
    if (noisy) {  // making noise does not use the memory bus: without these prefetches a large step takes a fifth longer
        noise_tile(buffers.z, s.shape, tile, [&](uint64_t at, uint64_t n) __attribute__((always_inline)) {
            prefetch(s.x, begin + at, n), prefetch(s.output, begin + at, n);
            prefetch(s.displacement, begin + at, n), prefetch(s.unconditional, begin + at, n);
        });
    }
    Span<R> span{};
    span.x = staged(buffers.x, s.x, begin, count);
    const uint64_t in_row = tile.rows == 1 ? count : elements, rows_with_a_scale = s.guidance_scales ? tile.rows : 1;
    for (uint64_t i = 0; i < rows_with_a_scale; ++i) {
        const uint64_t at = i * in_row, some = s.guidance_scales ? in_row : count;
        const R* const output = output_of(
            s, buffers.output + at, buffers.unconditional + at, tile.row + i, begin + at, some, s.not_finite);
        if (i == 0) span.output = output;
    }
    span.guided = s.unconditional.data;
    if (s.displacement.data) span.displacement = staged(buffers.displacement, s.displacement, begin, count);
    span.x_s = direct ? static_cast<R*>(s.x_s) + begin : buffers.x_s;
    span.x0 = !s.x0 || !direct ? buffers.x0 : static_cast<R*>(s.x0) + begin;
    span.z = buffers.z, span.terms = terms;
    span.low = call.low, span.high = call.high;
    span.sample = s.prediction == Prediction::sample, span.keeps_noise = !s.clip_noise;
    span.past_caches = call.past_caches, span.not_finite = s.not_finite;
    if (call.bounds.data) clip_tile(call, tile, buffers, span);
    const Span<R> still = span.without_noise();
    if (!s.per_particle) {
        step_span(noisy ? span : still, call.common, 0, count);
    } else if (elements >= kLongParticle) {
        for (uint64_t i = 0; i < tile.rows; ++i) {
            const OneParticle<R> m = call.of(tile.row + i);
            step_span(m.value[kTau] != R{0} ? span : still, m, i * in_row, (i + 1) * in_row);
        }
    } else {
        const EachElement<R> each = buffers.multipliers;
        for (uint64_t i = 0; i < tile.rows; ++i) {
            const OneParticle<R> m = call.of(tile.row + i);
            for (uint64_t at = i * elements; at < (i + 1) * elements; ++at)
                for (int factor = 0; factor < kFactors; ++factor) each.values[factor][at] = m.value[factor];
        }
        step_span(noisy ? span : still, each, 0, count);
    }
    if (direct) return;
    put({s.x_s, s.x.dtype}, begin, buffers.x_s, count);
    if (s.x0) put({s.x0, s.x.dtype}, begin, buffers.x0, count);
}

}  // namespace fastguide::cpu

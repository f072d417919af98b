// The reverse step a tile at a time: what reverse_step and propose_and_weigh share.
//
// A tile's inputs that are not in the type of the arithmetic are widened into buffers in the first-level cache, and
// its results narrowed from there, so that there is one kernel for float and one for double. The multiply-adds of float
// are fused, one rounding for two; those of double are not, and its results are those of fastguide.reference.
#pragma once

#include "../common/step.h"
#include "sums.h"
#include "threshold.h"
#include "tiles.h"
#include "types.h"

namespace fastguide::cpu {

// One call, all tensors [particles, elements]. The arithmetic is in float, or in double where x is.
struct Step {
    Input x, output, displacement;  // displacement.data may be null
    void *x_s, *x0;                 // in x's dtype; x0 may be null
    const double* levels;           // five numbers, or for each of the five a column [particles]
    bool per_particle;
    Prediction prediction;
    Clip clip;
    bool clip_noise;  // whether the noise, too, is that of the clipped x0
    RandnShape shape;
    int threads;
};

template <class R>
struct VectorOf;
template <>
struct VectorOf<float> {
    using type = F32;
};
template <>
struct VectorOf<double> {
    using type = F64;
};
template <class R>
using Vector = typename VectorOf<R>::type;
template <class R>
constexpr int kLanesOf = kBytes / static_cast<int>(sizeof(R));

// --- staging ------------------------------------------------------------------------------------------------

template <class R, class T>
FG_INLINE void convert(R* to, const T* from, uint64_t count) {
    if constexpr (sizeof(T) == 2) {
        if constexpr (std::is_same_v<R, float>) {
            widen(to, from, count);
        } else {
            constexpr uint64_t kMiddle = 256;
            float middle[kMiddle];
            for (uint64_t at = 0; at < count; at += kMiddle) {
                const uint64_t some = count - at < kMiddle ? count - at : kMiddle;
                widen(middle, from + at, some);
                for (uint64_t i = 0; i < some; ++i) to[at + i] = middle[i];
            }
        }
    } else {
        for (uint64_t i = 0; i < count; ++i) to[i] = static_cast<R>(from[i]);
    }
}

// Into the first-level cache, while somebody computes something else.
FG_INLINE void prefetch(const Input& from, uint64_t begin, uint64_t count) {
    const uint64_t size = size_of(from.dtype);
    const char* data = static_cast<const char*>(from.data) + begin * size;
    for (uint64_t at = 0; from.data && at < count * size; at += 64) __builtin_prefetch(data + at);
}

// Elements [begin, begin + count) as R: where they are, or converted into `buffer`.
template <class R>
FG_INLINE const R* staged(R* buffer, const Input& from, uint64_t begin, uint64_t count) {
    const R* at = buffer;
    with_type(from.dtype, [&](auto type) __attribute__((always_inline)) {
        using T = decltype(type);
        const T* data = static_cast<const T*>(from.data) + begin;
        if constexpr (std::is_same_v<T, R>) at = data;
        else convert(buffer, data, count);
    });
    return at;
}

// --- a particle's multipliers -------------------------------------------------------------------------------

template <class R>
struct Rounded {
    R p, q, a, b, tau, c, half_inverse;  // 1 / (2 tau); 0 where tau is

    explicit FG_INLINE Rounded(const Multipliers& m)
        : p(static_cast<R>(m.p)), q(static_cast<R>(m.q)), a(static_cast<R>(m.a)), b(static_cast<R>(m.b)),
          tau(static_cast<R>(m.tau)), c(static_cast<R>(m.c)) {
        constexpr R kMost = sizeof(R) == 4 ? static_cast<R>(0x1.fffffep127) : static_cast<R>(0x1.fffffffffffffp1023);
        const R half_over = R{0.5} / tau;
        half_inverse = tau == R{0} ? R{0} : half_over > kMost ? kMost : half_over;
    }
};

// Where a span's multipliers come from: one particle's, the same for all elements,
template <class R>
struct OneParticle {
    using V = Vector<R>;
    static constexpr bool kMixed = false;
    Rounded<R> m;

    template <class Read> FG_INLINE V p(uint64_t, const Read&) const { return splat(m.p); }
    template <class Read> FG_INLINE V q(uint64_t, const Read&) const { return splat(m.q); }
    template <class Read> FG_INLINE V a(uint64_t, const Read&) const { return splat(m.a); }
    template <class Read> FG_INLINE V b(uint64_t, const Read&) const { return splat(m.b); }
    template <class Read> FG_INLINE V tau(uint64_t, const Read&) const { return splat(m.tau); }
    template <class Read> FG_INLINE V c(uint64_t, const Read&) const { return splat(m.c); }
    template <class Read> FG_INLINE V half_inverse(uint64_t, const Read&) const { return splat(m.half_inverse); }
};

// or, for short particles, each element's.
template <class R>
struct EachElement {
    using V = Vector<R>;
    static constexpr bool kMixed = true;
    const R *p_, *q_, *a_, *b_, *tau_, *c_, *half_inverse_;

    template <class Read> FG_INLINE V p(uint64_t i, const Read& read) const { return read(p_ + i); }
    template <class Read> FG_INLINE V q(uint64_t i, const Read& read) const { return read(q_ + i); }
    template <class Read> FG_INLINE V a(uint64_t i, const Read& read) const { return read(a_ + i); }
    template <class Read> FG_INLINE V b(uint64_t i, const Read& read) const { return read(b_ + i); }
    template <class Read> FG_INLINE V tau(uint64_t i, const Read& read) const { return read(tau_ + i); }
    template <class Read> FG_INLINE V c(uint64_t i, const Read& read) const { return read(c_ + i); }
    template <class Read> FG_INLINE V half_inverse(uint64_t i, const Read& read) const { return read(half_inverse_ + i); }
};

// --- the arithmetic -----------------------------------------------------------------------------------------

enum Flags : int { kSample = 1, kNoise = 2, kMoved = 4, kX0 = 8, kWeigh = 16 };

template <class R>
struct Span {
    const R *x, *output, *displacement, *z;
    R *x_s, *x0, *terms;
    R low, high;       // x0 is clipped to
    bool past_caches;  // x_s and x0, which are equally aligned
    bool keeps_noise;  // that of x0 before it is clipped

    FG_INLINE Span from(uint64_t i) const {
        return {x + i, output + i, displacement + (displacement ? i : 0), z + (z ? i : 0), x_s + i, x0 + (x0 ? i : 0),
                terms + (terms ? i : 0), low, high, past_caches, keeps_noise};
    }
};

// One vector of elements, at i; `keep` writes what is read again soon.
template <class R, int kFlags, class Source, class Read, class Write, class Keep>
FG_INLINE void step_lanes(const Span<R>& s, const Source& m, uint64_t i, const Vector<R>& z, const Read& read,
                          const Write& write, const Keep& keep) {
    using V = Vector<R>;
    const V x = read(s.x + i);
    V x0 = read(s.output + i);
    if constexpr (!(kFlags & kSample)) x0 = fused(m.q(i, read), x0, m.p(i, read) * x);
    const V unclipped = x0;
    if constexpr (!(kFlags & kWeigh)) x0 = smaller(splat(s.high), larger(splat(s.low), x0));  // a NaN stays
    V x_s = fused(m.b(i, read), x0, m.a(i, read) * x);
    if constexpr (!(kFlags & kWeigh)) {
        if (s.keeps_noise) x_s = fused(m.c(i, read), unclipped, x_s);
    }
    V displacement{};
    if constexpr (kFlags & kMoved) {
        displacement = read(s.displacement + i);
        if constexpr ((kFlags & kWeigh) && Source::kMixed)  // none where tau = 0, not even a NaN
            displacement = m.tau(i, read) != R{0} ? displacement : V{};
        x_s = x_s + displacement;
    }
    if constexpr (kFlags & kNoise) x_s = fused(m.tau(i, read), z, x_s);
    write(s.x_s + i, x_s);
    if constexpr (kFlags & kX0) write(s.x0 + i, x0);
    if constexpr (kFlags & kWeigh)  // of tau times the ratio: delta (z + delta / 2) with delta = displacement / tau
        keep(s.terms + i, displacement * fused(m.half_inverse(i, read), displacement, z));
}

template <class R>
struct Whole {
    using V = Vector<R>;
    static FG_INLINE V read(const R* from) { return load<V>(from); }
    static FG_INLINE void write(R* to, V v) { store(to, v); }
};

template <class R, int kFlags, class Source>
void step_span(const Span<R>& span, const Source& source, uint64_t count) {
    using V = Vector<R>;
    constexpr uint64_t kLanes = kLanesOf<R>;
    const Span<R> s = span;  // no store can change copies
    const Source m = source;
    const auto whole = [&](uint64_t i, const auto& write) __attribute__((always_inline)) {
        V z{};
        if constexpr (kFlags & kNoise) z = load<V>(s.z + i);
        step_lanes<R, kFlags>(s, m, i, z, Whole<R>::read, write, Whole<R>::write);
    };
    const auto some = [&](uint64_t i, uint64_t n) __attribute__((always_inline)) {
        const int lanes = static_cast<int>(n);
        const auto read = [lanes](const R* from) __attribute__((always_inline)) { return load_some<V>(from, lanes); };
        const auto write = [lanes](R* to, V v) __attribute__((always_inline)) { store_some(to, v, lanes); };
        V z{};
        if constexpr (kFlags & kNoise) z = read(s.z + i);
        step_lanes<R, kFlags>(s, m, i, z, read, write, write);
    };
    uint64_t i = 0;
    if constexpr (std::is_same_v<R, float>) {
        if (s.past_caches) {
            const uint64_t ahead = -(reinterpret_cast<uintptr_t>(s.x_s) / sizeof(R)) % kLanes;
            i = ahead < count ? ahead : count;
            if (i > 0) some(0, i);
            const auto write = [](R* to, V v) __attribute__((always_inline)) { stream(to, v); };
            for (; i + kLanes <= count; i += kLanes) whole(i, write);
        }
    }
    for (; i + kLanes <= count; i += kLanes) whole(i, Whole<R>::write);
    if (i < count) some(i, count - i);
}

// Takes the normals of a particle as they are made, and writes past the caches. Where four terms of a sum are made at
// a time, they are added at once, and nowhere else.
template <int kFlags>
struct Stepping {
    static constexpr bool kAdds = (kFlags & kWeigh) && kAbreast * kNormals == Sum<float>::kAtOnce;
    Span<float> s;
    OneParticle<float> m;
    F32* pair;  // the terms of those made last
    Sum<float>* sum;

    FG_INLINE F32 lanes(uint64_t i, F32 z) const {
        F32 term{};
        const auto write = [](float* to, F32 v) __attribute__((always_inline)) { stream(to, v); };
        const auto keep = [&](float* to, F32 v) __attribute__((always_inline)) {
            if constexpr (kAdds) term = v;
            else store(to, v);
        };
        step_lanes<float, kFlags>(s, m, i, z, Whole<float>::read, write, keep);
        return term;
    }
    FG_INLINE void whole(uint64_t i, int turn, const Two& z) const {
        const F32 first = lanes(i, z.first), second = lanes(i + kLanes32, z.second);
        if constexpr (kAdds) {
            if (turn == 0) {
                *pair = first + second;
            } else {
                const F32 four = *pair + (first + second);
                sum->add(0, low_half(four));
                sum->add(1, high_half(four));
            }
        }
    }
    FG_INLINE void some(uint64_t i, const Two& z, uint64_t count) const {
        alignas(64) float last[kNormals];
        store(last, z);
        Span<float> span = s.from(i);
        span.z = last;
        step_span<float, kFlags>(span, OneParticle<float>{m.m}, count);
    }
};

// f(flags) with the flags as a constant, of those that a call can have.
template <int kBit, int kFlags, class F>
FG_INLINE void with_flags_from(int flags, const F& f) {
    if constexpr (kBit > kX0) f(std::integral_constant<int, kFlags>{});
    else if (flags & kBit) with_flags_from<2 * kBit, kFlags | kBit>(flags, f);
    else with_flags_from<2 * kBit, kFlags>(flags, f);
}

// With `kWeighed`, `flags` have noise, displacement and weights, or none of them.
template <bool kWeighed, class F>
FG_INLINE void with_flags(int flags, const F& f) {
    if constexpr (!kWeighed) with_flags_from<kSample, 0>(flags, f);
    else if (flags & kNoise) f(std::integral_constant<int, kSample | kNoise | kMoved | kWeigh>{});
    else f(std::integral_constant<int, kSample>{});
}

template <bool kWeighed, class R, class Source>
FG_INLINE void step_span_of(int flags, const Span<R>& span, const Source& source, uint64_t count) {
    with_flags<kWeighed>(flags, [&](auto constant) __attribute__((always_inline)) {
        step_span<R, decltype(constant)::value>(span, source, count);
    });
}

// --- tiles --------------------------------------------------------------------------------------------------

constexpr uint64_t kLongParticle = 64;  // elements from which a particle has its own loop

template <class R>
struct Run {
    const Step& step;
    Rounded<R> common;  // where all particles have the same
    R low, high;
    bool past_caches;
    Scratch<R> bounds;  // each particle's dynamic threshold

    explicit Run(const Step& s)
        : step(s), common(s.per_particle ? Multipliers{} : multipliers(levels_of(s, 0), s.prediction, s.clip_noise)) {
        const bool range = s.clip.kind == ClipKind::range;
        low = range ? static_cast<R>(s.clip.low) : -static_cast<R>(__builtin_inf());
        high = range ? static_cast<R>(s.clip.high) : static_cast<R>(__builtin_inf());
        const auto x_s = reinterpret_cast<uintptr_t>(s.x_s), x0 = reinterpret_cast<uintptr_t>(s.x0);
        past_caches = s.x.dtype == Dtype::float32 && s.shape.particles * s.shape.elements * 4 >= kPastCaches &&
                      (!s.x0 || (x_s - x0) % kBytes == 0);
        if (s.clip.kind == ClipKind::dynamic) find_bounds();
    }

    static FG_INLINE Levels levels_of(const Step& s, uint64_t row) {
        const uint64_t stride = s.per_particle ? s.shape.particles : 1;
        const double* l = s.levels + (s.per_particle ? row : 0);
        return {l[0], l[stride], l[2 * stride], l[3 * stride], l[4 * stride]};
    }

    FG_INLINE R tau_of(uint64_t row) const {
        return step.per_particle ? static_cast<R>(levels_of(step, row).tau) : common.tau;
    }
    FG_INLINE Rounded<R> of(uint64_t row) const {
        return step.per_particle ? Rounded<R>(multipliers(levels_of(step, row), step.prediction, step.clip_noise)) : common;
    }

private:
    void find_bounds();
};

// x0_hat before it is clipped, of one particle's elements.
template <class R>
FG_INLINE void x0_of(R* x0, const R* x, const R* output, const Run<R>& run, uint64_t row, uint64_t count) {
    const Rounded<R> m = run.of(row);
    const bool sample = run.step.prediction == Prediction::sample;
    for (uint64_t i = 0; i < count; i += kLanesOf<R>) {
        const int lanes = count - i < kLanesOf<R> ? static_cast<int>(count - i) : kLanesOf<R>;
        const auto read = [=](const R* from) __attribute__((always_inline)) { return load_some<Vector<R>>(from + i, lanes); };
        store_some(x0 + i, sample ? read(output) : fused(splat(m.q), read(output), splat(m.p) * read(x)), lanes);
    }
}

template <class R>
constexpr Dtype kDtype = sizeof(R) == 4 ? Dtype::float32 : Dtype::float64;

// x0_hat is made anew for each look at it, and kept nowhere.
template <class R>
void Run<R>::find_bounds() {
    const uint64_t particles = step.shape.particles, elements = step.shape.elements;
    const uint64_t most = elements < kTile ? elements : kTile;
    struct Buffers {
        R *x, *output, *x0;
        uint64_t* counts;
    };
    const auto buffers_in = [&](Memory& memory) -> Buffers {
        const auto staging = [&](const Input& input) { return memory.take<R>(input.dtype == kDtype<R> ? 0 : most); };
        return {staging(step.x), staging(step.output), memory.take<R>(most),
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
                const R *x = staged(in.x, step.x, begin, count), *output = staged(in.output, step.output, begin, count);
                x0_of(in.x0, x, output, *this, row, count);
                for (uint64_t i = 0; i < count; ++i) f(in.x0[i]);
            }
        };
        bounds.data[row] = threshold<R>(in.counts, elements, step.clip.low, step.clip.high, each);
    });
}

// What the tiles of a call need beside its arrays; null where there is no need.
template <class R>
struct TileBuffers {
    R *x, *output, *displacement, *z, *x_s, *x0, *multipliers[7];

    TileBuffers(const Run<R>& run, Memory& memory) {
        const Step& s = run.step;
        const uint64_t most = Tiling{s.shape.particles, s.shape.elements}.largest();
        const auto if_needed = [&](bool needed) { return needed ? memory.take<R>(most) : nullptr; };
        const bool direct = s.x.dtype == kDtype<R>, clips = run.bounds.data;
        x = if_needed(!direct);
        output = if_needed(clips || s.output.dtype != kDtype<R>);
        displacement = if_needed((clips && !s.clip_noise) || (s.displacement.data && s.displacement.dtype != kDtype<R>));
        z = if_needed(s.per_particle || run.common.tau != R{0});
        x_s = if_needed(!direct);
        x0 = if_needed(!direct && s.x0);
        for (R*& each : multipliers) each = if_needed(s.per_particle && s.shape.elements < kLongParticle);
    }
    static Memory counted(const Run<R>& run) {
        Memory memory;
        TileBuffers(run, memory);
        return memory;
    }
};

// x_s, and x0 if it is asked for, of one tile; with `kWeighed` the terms of tau times the log-density ratio.
template <bool kWeighed, class R>
void step_tile(const Run<R>& run, const Tile& tile, Terms<R>* terms, Memory memory) {
    const Step& s = run.step;
    const uint64_t elements = s.shape.elements, begin = tile.row * elements + tile.begin, count = tile.count;
    const uint64_t in_row = tile.rows == 1 ? count : elements;
    const bool direct = s.x.dtype == kDtype<R>;
    const TileBuffers<R> buffers(run, memory);
    R *const output = buffers.output, *const displacement = buffers.displacement, *const z = buffers.z;
    bool noisy = run.common.tau != R{0};
    for (uint64_t i = 0; s.per_particle && !noisy && i < tile.rows; ++i) noisy = run.tau_of(tile.row + i) != R{0};
    // Large float32 states: each normal is used where it is made, while the memory brings the inputs of the next.
    const bool flows = noisy && run.past_caches && tile.rows == 1 && !run.bounds.data &&
                       s.output.dtype == Dtype::float32 &&
                       (!s.displacement.data || s.displacement.dtype == Dtype::float32) &&
                       reinterpret_cast<uintptr_t>(static_cast<R*>(s.x_s) + begin) % kBytes == 0;
    if (noisy && !flows) {
        noise_tile(z, s.shape, tile, [&](uint64_t at, uint64_t n) __attribute__((always_inline)) {
            prefetch(s.x, begin + at, n), prefetch(s.output, begin + at, n), prefetch(s.displacement, begin + at, n);
        });
    }
    Span<R> span{staged(buffers.x, s.x, begin, count), staged(output, s.output, begin, count), nullptr, z, buffers.x_s,
                 buffers.x0, terms ? terms->at : nullptr, run.low, run.high, run.past_caches, !s.clip_noise};
    int flags = (s.prediction == Prediction::sample ? kSample : 0) | (s.x0 ? kX0 : 0);
    if (direct) span.x_s = static_cast<R*>(s.x_s) + begin, span.x0 = static_cast<R*>(s.x0) + (s.x0 ? begin : 0);
    if (s.displacement.data) span.displacement = staged(displacement, s.displacement, begin, count), flags |= kMoved;
    if (run.bounds.data) {
        for (uint64_t i = 0; i < tile.rows; ++i) {
            const R bound = run.bounds.data[tile.row + i];
            R* row = output + i * elements;
            x0_of(row, span.x + i * elements, span.output + i * elements, run, tile.row + i, in_row);
            if (!s.clip_noise) {  // what it adds is known before the threshold
                const R c = run.of(tile.row + i).c;
                const R* given = span.displacement ? span.displacement + i * elements : nullptr;
                for (uint64_t k = 0; k < in_row; ++k) displacement[i * elements + k] = (given ? given[k] : R{0}) + c * row[k];
            }
            for (uint64_t k = 0; k < in_row; ++k) {
                const R v = row[k] < -bound ? -bound : row[k];
                row[k] = (v > bound ? bound : v) / bound;
            }
        }
        span.output = output;
        flags |= kSample;
        if (!s.clip_noise) span.displacement = displacement, span.keeps_noise = false, flags |= kMoved;
    }
    if constexpr (std::is_same_v<R, float>) {
        if (flows) {
            with_flags<kWeighed>(flags | kNoise, [&](auto constant) __attribute__((always_inline)) {
                using Sink = Stepping<decltype(constant)::value>;
                F32 pair;
                Sum<float> sum;
                normals_of_particle(Sink{span, {run.of(tile.row)}, &pair, &sum}, s.shape, tile.row, tile.begin / 4, count,
                                    Nothing{});
                if constexpr (Sink::kAdds) terms->summed = count / sum.kAtOnce * sum.kAtOnce, terms->sum = sum;
            });
            return;
        }
    }
    if (!s.per_particle) {
        if (noisy) flags |= kNoise;
        step_span_of<kWeighed>(flags, span, OneParticle<R>{run.common}, count);
    } else if (elements < kLongParticle) {
        const auto [p, q, a, b, tau, c, half_inverse] = buffers.multipliers;
        for (uint64_t i = 0; i < tile.rows; ++i) {
            const Rounded<R> m = run.of(tile.row + i);
            for (uint64_t at = i * elements; at < (i + 1) * elements; ++at) {
                p[at] = m.p, q[at] = m.q, a[at] = m.a, b[at] = m.b;
                tau[at] = m.tau, c[at] = m.c, half_inverse[at] = m.half_inverse;
            }
        }
        if (noisy) flags |= kNoise;
        step_span_of<kWeighed>(flags, span, EachElement<R>{p, q, a, b, tau, c, half_inverse}, count);
    } else {
        for (uint64_t i = 0; i < tile.rows; ++i) {
            const Rounded<R> m = run.of(tile.row + i);
            step_span_of<kWeighed>(m.tau != R{0} ? flags | kNoise : flags, span.from(i * elements), OneParticle<R>{m},
                                   in_row);
        }
    }
    if constexpr (std::is_same_v<R, float>) {
        if (direct) return;
        with_type(s.x.dtype, [&](auto type) __attribute__((always_inline)) {
            using T = decltype(type);
            if constexpr (sizeof(T) == 2) {
                narrow(static_cast<T*>(s.x_s) + begin, buffers.x_s, count);
                if (s.x0) narrow(static_cast<T*>(s.x0) + begin, buffers.x0, count);
            }
        });
    }
}

}  // namespace fastguide::cpu

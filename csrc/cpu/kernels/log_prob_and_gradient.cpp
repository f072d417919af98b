// Log-densities of the error models and their gradients, in one pass over z and y.
//
// Each term is computed in double whatever the arrays' type: what has to come from memory takes longer. The terms
// of a tile of 2,048 elements are added in one tree, whatever the instruction set: 16 lanes, element i of the tile
// in lane i mod 16, then lanes i and i + 8, i + 4, i + 2, i + 1; the tiles of a sample in their order.
#include "../../common/log.h"
#include "../kernels.h"
#include "../scratch.h"
#include "../tiles.h"
#include "../types.h"

namespace fastguide::cpu::FG_ISA {
namespace {

constexpr int kSumLanes = 16;
constexpr uint64_t kRowGrain = 4096;  // sums of a few numbers that are worth a thread

FG_INLINE F64 load_double(const float* from) { return widen(load<HalfF32>(from)); }
FG_INLINE F64 load_double(const double* from) { return load<F64>(from); }
FG_INLINE F64 load_double_some(const float* from, int n) { return widen(load_some<HalfF32>(from, n)); }
FG_INLINE F64 load_double_some(const double* from, int n) { return load_some<F64>(from, n); }
FG_INLINE HalfF32 narrow_to(float, F64 v) { return __builtin_convertvector(v, HalfF32); }
FG_INLINE F64 narrow_to(double, F64 v) { return v; }

// --- sums ---------------------------------------------------------------------------------------------------

template <int kCount>
FG_INLINE double sum_of_few(const double* terms) {
    double lane[kCount];
    for (int i = 0; i < kCount; ++i) lane[i] = terms[i];
#pragma GCC unroll 4
    for (int half = kSumLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            if (i + half < kCount) lane[i] += lane[i + half];
    return lane[0];
}

FG_INLINE double sum_of_many(const double* terms, uint64_t count) {
    constexpr int vectors = kSumLanes / kLanes64;
    F64 sum[vectors] = {};
    const uint64_t whole = count - count % kSumLanes;
    for (uint64_t i = 0; i < whole; i += kSumLanes)
        for (int v = 0; v < vectors; ++v) sum[v] += load<F64>(terms + i + v * kLanes64);
    if (whole < count) {
        double last[kSumLanes] = {};
        __builtin_memcpy(last, terms + whole, (count - whole) * sizeof(double));
        for (int v = 0; v < vectors; ++v) sum[v] += load<F64>(last + v * kLanes64);
    }
    for (int half = vectors / 2; half > 0; half /= 2)
        for (int v = 0; v < half; ++v) sum[v] += sum[v + half];
    double lane[kLanes64];
    store(lane, sum[0]);
    for (int half = kLanes64 / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

// Of terms[rows, elements], elements at most kTile, the sums of the rows, at the front of the terms.
__attribute__((noinline)) void sum_rows(double* terms, uint64_t rows, uint64_t elements) {
    switch (elements) {
#define FG_FEW(n)                                                                              \
    case n:                                                                                    \
        for (uint64_t row = 0; row < rows; ++row) terms[row] = sum_of_few<n>(terms + row * n); \
        return;
        FG_FEW(1) FG_FEW(2) FG_FEW(3) FG_FEW(4) FG_FEW(5) FG_FEW(6) FG_FEW(7) FG_FEW(8)
        FG_FEW(9) FG_FEW(10) FG_FEW(11) FG_FEW(12) FG_FEW(13) FG_FEW(14) FG_FEW(15)
#undef FG_FEW
        default:
            for (uint64_t row = 0; row < rows; ++row) terms[row] = sum_of_many(terms + row * elements, elements);
    }
}

// finish(row, sum) for each row of [rows, elements], of the terms that fill(tile, terms) writes.
template <class Fill, class Finish>
FG_INLINE void sum_terms(uint64_t rows, uint64_t elements, int threads, const Fill& fill, const Finish& finish) {
    if (elements == 0) {
        for (uint64_t row = 0; row < rows; ++row) finish(row, 0.0);
        return;
    }
    const Tiling tiling{rows, elements};
    const uint64_t tiles_per_row = tiling.tiles_per_row();
    Scratch<double> parts(tiles_per_row > 1 ? rows * tiles_per_row : 0);
    share_out(tiling.tiles(), kTileGrain, threads, [&](uint64_t index) {
        const Tile tile = tiling.at(index);
        alignas(kBytes) double terms[kTile + kLanes64];
        fill(tile, terms);
        sum_rows(terms, tile.rows, tile.count / tile.rows);
        if (tiles_per_row > 1)
            parts.data[index] = terms[0];
        else
            for (uint64_t i = 0; i < tile.rows; ++i) finish(tile.row + i, terms[i]);
    });
    if (tiles_per_row == 1) return;
    share_out(rows, kRowGrain / tiles_per_row + 1, threads, [&](uint64_t row) {
        const double* part = parts.data + row * tiles_per_row;
        double sum = part[0];
        for (uint64_t i = 1; i < tiles_per_row; ++i) sum += part[i];
        finish(row, sum);
    });
}

// --- rows of y and of what is added -------------------------------------------------------------------------

// The values of each sample: one row for all, a row each, or the row that `index` says.
template <class Real>
struct Values {
    const Real* data;
    uint64_t rows, elements;
    const int64_t* index;

    uint64_t row_of(uint64_t sample) const {
        return rows == 1 ? 0 : index ? static_cast<uint64_t>(index[sample]) : sample;
    }
    const Real* of(uint64_t sample) const { return data + row_of(sample) * elements; }
};

// `row` again and again, `times` times.
template <class Real>
FG_INLINE void repeat(Real* to, const Real* row, uint64_t elements, uint64_t times) {
    const uint64_t whole = elements * times;
    __builtin_memcpy(to, row, elements * sizeof(Real));
    for (uint64_t done = elements; done < whole; done *= 2) {
        const uint64_t more = whole - done < done ? whole - done : done;
        __builtin_memcpy(to + done, to, more * sizeof(Real));
    }
}

// The values of a tile as they lie beside its z. What all tiles share is laid out once.
template <class Real>
struct Laid {
    Values<Real> values;
    alignas(kBytes) Real common[kTile];

    Laid(const Values<Real>& v, uint64_t samples) : values(v) {
        if (!values.data || values.rows > 1 || values.elements == 0) return;
        const uint64_t most = Tiling{samples, values.elements}.rows_per_tile();
        if (most > 1) repeat(common, values.data, values.elements, most);
    }
    const Real* of(const Tile& tile, Real* buffer) const {
        if (!values.data) return nullptr;
        if (tile.rows == 1) return values.of(tile.row) + tile.begin;
        if (values.rows == 1) return common;
        if (!values.index) return values.of(tile.row);
        for (uint64_t i = 0, end; i < tile.rows; i = end) {  // samples of one observation follow each other
            for (end = i + 1; end < tile.rows && values.index[tile.row + end] == values.index[tile.row + i];) ++end;
            repeat(buffer + i * values.elements, values.of(tile.row + i), values.elements, end - i);
        }
        return buffer;
    }
};

// --- densities ----------------------------------------------------------------------------------------------

// A density has at(z, y, added) -> {term, gradient}; the log-density is factor * sum of terms + constants.
struct Point {
    F64 term, gradient;
};

template <bool kAdded>
struct Gaussian {
    F64 variance, precision;
    double factor;

    explicit Gaussian(const LogDensity& d)
        : variance(splat(d.scale * d.scale)),
          precision(1.0 / variance),
          factor(kAdded ? -0.5 : -0.5 / (d.scale * d.scale)) {}
    FG_INLINE Point at(F64 z, F64 y, F64 added) const {
        const F64 residual = y - z;
        if constexpr (!kAdded) return {residual * residual, residual * precision};
        const F64 gradient = residual / (variance + added);
        return {residual * gradient, gradient};
    }
};

template <bool kAdded>
struct StudentT {
    F64 variance, df, inverse_width, slope;
    double factor;

    explicit StudentT(const LogDensity& d)
        : variance(splat(d.scale * d.scale)),
          df(splat(d.df)),
          inverse_width(splat(1.0 / (d.df * (d.scale * d.scale)))),
          slope(splat((d.df + 1.0) / (d.df * (d.scale * d.scale)))),
          factor(-0.5 * (d.df + 1.0)) {}
    FG_INLINE Point at(F64 z, F64 y, F64 added) const {
        const F64 residual = y - z, square = residual * residual;
        if constexpr (!kAdded) {
            const F64 ratio = square * inverse_width;
            return {log1p_double<VectorLanes64>(ratio), slope * residual / (1.0 + ratio)};
        }
        const F64 width = df * (variance + added);
        return {log1p_double<VectorLanes64>(square / width), (df + 1.0) * residual / (width + square)};
    }
};

template <bool kAdded>
struct Laplace {
    F64 variance, inverse;
    double factor;

    explicit Laplace(const LogDensity& d)
        : variance(splat(d.scale * d.scale)), inverse(splat(1.0 / d.scale)), factor(kAdded ? -1.0 : -1.0 / d.scale) {}
    FG_INLINE Point at(F64 z, F64 y, F64 added) const {
        const F64 residual = y - z, size = residual < 0.0 ? -residual : residual;
        const F64 slope = kAdded ? 1.0 / square_root(variance + added) : inverse;
        const F64 gradient = residual > 0.0 ? slope : residual < 0.0 ? -slope : residual;  // 0 or NaN
        return {kAdded ? size * slope : size, gradient};
    }
};

constexpr double kLeastRate = 1e-6;  // counts

struct Poisson {
    F64 per_gain, background;
    double factor = 1.0;

    explicit Poisson(const LogDensity& d) : per_gain(splat(1.0 / d.scale)), background(splat(d.background)) {}
    FG_INLINE Point at(F64 z, F64 y, F64) const {
        const F64 counts = y * per_gain, rate = (z + background) * per_gain;
        const F64 held = rate < kLeastRate ? splat(kLeastRate) : rate;
        const F64 seen = counts * log_double<VectorLanes64>(held);
        // The gradient does not stop at the least rate, so that a negative one is still driven back.
        return {(counts == 0.0 ? F64{} : seen) - held, (counts / held - 1.0) * per_gain};
    }
};

template <class Density, class Real>
FG_INLINE void density_tile(const Density& density, const Real* z, const Real* y, const Real* added, Real* gradient,
                            double* terms, uint64_t count) {
    uint64_t i = 0;
    for (; i + kLanes64 <= count; i += kLanes64) {
        const Point p =
            density.at(load_double(z + i), load_double(y + i), added ? load_double(added + i) : F64{});
        store(terms + i, p.term);
        if (gradient) store(gradient + i, narrow_to(Real{}, p.gradient));
    }
    if (i == count) return;
    const int left = static_cast<int>(count - i);
    const Point p = density.at(load_double_some(z + i, left), load_double_some(y + i, left),
                               added ? load_double_some(added + i, left) : F64{});
    store(terms + i, p.term);
    if (gradient) store_some(gradient + i, narrow_to(Real{}, p.gradient), left);
}

template <class F, class Real>
FG_INLINE void map_tile(const F& f, const Real* from, double* terms, uint64_t count) {
    uint64_t i = 0;
    for (; i + kLanes64 <= count; i += kLanes64) store(terms + i, f(load_double(from + i)));
    if (i < count) store(terms + i, f(load_double_some(from + i, static_cast<int>(count - i))));
}

// --- parts that do not depend on z --------------------------------------------------------------------------

// What each row of `added` takes off: half the sum of the logarithms of the variances.
template <class Real>
void variances(double* constants, const LogDensity& d, const Values<Real>& added, int threads) {
    const F64 variance = splat(d.scale * d.scale);
    const auto logarithm = [&](F64 v) { return log_double<VectorLanes64>(variance + v); };
    sum_terms(
        added.rows, added.elements, threads,
        [&](const Tile& tile, double* terms) {
            map_tile(logarithm, added.of(tile.row) + tile.begin, terms, tile.count);
        },
        [&](uint64_t row, double sum) { constants[row] = -0.5 * sum; });
}

// What each row of y that a sample has takes off: the sum of ln(counts!).
template <class Real>
void factorials(double* constants, const LogDensity& d, const Values<Real>& y, uint64_t samples, int threads) {
    const F64 per_gain = splat(1.0 / d.scale);
    const auto logarithm = [&](F64 v) { return log_gamma_double<VectorLanes64>(v * per_gain + 1.0); };
    Values<Real> used = y;
    uint64_t number = y.rows;
    Scratch<int64_t> index(y.index ? y.rows : 0);
    if (y.index) {
        for (uint64_t row = 0; row < y.rows; ++row) constants[row] = 0.0;
        for (uint64_t i = 0; i < samples; ++i) constants[y.index[i]] = 1.0;
        number = 0;
        for (uint64_t row = 0; row < y.rows; ++row)
            if (constants[row] > 0.0) index.data[number++] = static_cast<int64_t>(row);
        used.index = index.data;
    }
    sum_terms(
        number, y.elements, threads,
        [&](const Tile& tile, double* terms) {
            if (tile.rows == 1 || !used.index)
                return map_tile(logarithm, used.of(tile.row) + tile.begin, terms, tile.count);
            for (uint64_t i = 0; i < tile.rows; ++i)  // what each writes past its end the next one mends
                map_tile(logarithm, used.of(tile.row + i), terms + i * y.elements, y.elements);
        },
        [&](uint64_t i, double sum) { constants[used.row_of(i)] = -sum; });
}

// --- the whole ----------------------------------------------------------------------------------------------

// z in `Real`s: where it is, or widened into `buffer`.
FG_INLINE const double* widened(const void* z, Dtype, uint64_t at, uint64_t, double*) {
    return static_cast<const double*>(z) + at;
}

FG_INLINE const float* widened(const void* z, Dtype dtype, uint64_t at, uint64_t count, float* buffer) {
    if (dtype == Dtype::float32) return static_cast<const float*>(z) + at;
    if (dtype == Dtype::float16)
        widen(buffer, static_cast<const Half*>(z) + at, count);
    else
        widen(buffer, static_cast<const BFloat16*>(z) + at, count);
    return buffer;
}

template <class Real, class Density>
void evaluate(const Density& density, const DensityArrays& a, const Values<Real>& y, const Values<Real>& added,
              const double* known, const Values<Real>& known_of, double constant, int threads) {
    const Laid<Real> laid_y(y, a.samples), laid_added(added, a.samples);
    const bool narrow_z = a.dtype == Dtype::float16 || a.dtype == Dtype::bfloat16;
    sum_terms(
        a.samples, a.elements, threads,
        [&](const Tile& tile, double* terms) {
            alignas(kBytes) Real z_buffer[kTile], y_buffer[kTile];
            const uint64_t at = tile.row * a.elements + tile.begin;
            const Real* z = widened(a.z, a.dtype, at, tile.count, z_buffer);
            Real* gradient = !a.gradient ? nullptr : narrow_z ? z_buffer : static_cast<Real*>(a.gradient) + at;
            density_tile(density, z, laid_y.of(tile, y_buffer), laid_added.of(tile, y_buffer), gradient, terms,
                         tile.count);
            if constexpr (std::is_same_v<Real, float>) {
                if (gradient && a.dtype == Dtype::float16) narrow(static_cast<Half*>(a.gradient) + at, gradient, tile.count);
                if (gradient && a.dtype == Dtype::bfloat16)
                    narrow(static_cast<BFloat16*>(a.gradient) + at, gradient, tile.count);
            }
        },
        [&](uint64_t sample, double sum) {
            const double rest = known ? constant + known[known_of.row_of(sample)] : constant;
            a.log_prob[sample] = density.factor * sum + rest;
        });
}

template <class Real>
void log_prob_and_gradient_in(const LogDensity& d, const DensityArrays& a, int threads) {
    const Values<Real> y{static_cast<const Real*>(a.y), a.y_rows, a.elements, a.rows};
    const Values<Real> added{static_cast<const Real*>(a.added), a.added_rows, a.elements, nullptr};
    const Values<Real>& known_of = d.family == Family::poisson ? y : added;
    Scratch<double> known(known_of.rows);  // a part for each row, whatever the sample
    if (d.family == Family::poisson)
        factorials(known.data, d, y, a.samples, threads);
    else if (a.added)
        variances(known.data, d, added, threads);
    const auto with = [&](const auto& density) {
        const double constant = d.constant * static_cast<double>(a.elements);
        evaluate(density, a, y, added, known_of.rows > 0 ? known.data : nullptr, known_of, constant, threads);
    };
    switch (d.family) {
        case Family::gaussian: return a.added ? with(Gaussian<true>(d)) : with(Gaussian<false>(d));
        case Family::student_t: return a.added ? with(StudentT<true>(d)) : with(StudentT<false>(d));
        case Family::laplace: return a.added ? with(Laplace<true>(d)) : with(Laplace<false>(d));
        case Family::poisson: return with(Poisson(d));
    }
}

}  // namespace

int64_t log_prob_and_gradient(const LogDensity& density, const DensityArrays& arrays, int threads) {
    if (arrays.rows)
        for (uint64_t i = 0; i < arrays.samples; ++i)
            if (arrays.rows[i] < 0 || static_cast<uint64_t>(arrays.rows[i]) >= arrays.y_rows)
                return static_cast<int64_t>(i);
    if (arrays.dtype == Dtype::float64)
        log_prob_and_gradient_in<double>(density, arrays, threads);
    else
        log_prob_and_gradient_in<float>(density, arrays, threads);
    return -1;
}

void log_functions(const double* x, double* log, double* log1p, double* log_gamma, std::size_t count) {
    for (std::size_t i = 0; i < count; i += kLanes64) {
        const int n = static_cast<int>(count - i < kLanes64 ? count - i : kLanes64);
        const F64 v = load_some<F64>(x + i, n);
        store_some(log + i, log_double<VectorLanes64>(v), n);
        store_some(log1p + i, log1p_double<VectorLanes64>(v), n);
        store_some(log_gamma + i, log_gamma_double<VectorLanes64>(v), n);
    }
}

}  // namespace fastguide::cpu::FG_ISA

// Log-densities of the error models and their gradients, in one pass over z and y.
//
// Terms are doubles, whatever the type of the arrays. The order of their sum is the same on every machine: that of
// cpu/sums.h within a tile of 2,048 elements, and then the tiles of a sample one after the other.
#include "../../common/binding.h"
#include "../../common/log.h"
#include "../../cpu/memory.h"
#include "../../cpu/scratch.h"
#include "../../cpu/sums.h"
#include "../../cpu/tiles.h"
#include "../../cpu/types.h"

namespace fastguide::cpu {
namespace {

// The codes that Python passes, in the order of fastguide.reference.FAMILIES.
enum class Family : int { gaussian = 0, student_t = 1, laplace = 2, poisson = 3 };

// log p(y | z) of one measurement. For Poisson, `scale` is the gain. `constant`: the part of log p that does not depend on
// z, y or an extra variance.
struct LogDensity {
    Family family;
    double scale, df, background, constant;
};

// The arrays of a call. z has any dtype. y and extra are float64 if z is float64, otherwise float32.
struct DensityArrays {
    const void* z;                 // [samples, elements]
    const void* y;                 // [y_rows, elements]
    const int64_t* rows;           // [samples]: the row of y for each; null if y has one row, or one for each sample
    const void* extra;             // variances [extra_rows, elements], one row or one for each sample; or null
    const double* log_factorials;  // [y_rows]: the sum of ln(counts!) of each row of y, if known; or null
    double* log_prob;              // [samples]
    void* gradient;                // like z, or null
    Dtype dtype;                   // the dtype of z
    uint64_t samples, elements, y_rows, extra_rows;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint64_t kRowGrain = 4096;  // partial sums worth a thread

using Lanes = VectorLanes64;

FG_INLINE HalfF32 narrowed(float, F64 v) { return __builtin_convertvector(v, HalfF32); }
FG_INLINE F64 narrowed(double, F64 v) { return v; }

// --- sums ---------------------------------------------------------------------------------------------------

// A Total takes the terms of a part of a row, at most kTile of them, one vector at a time. v is the number of the vector
// modulo kPlaceVectors.

// The sum of the terms, or with kLog of ln(1 + term).
template <bool kLog>
struct PlainTotal {
    F64 places[kPlaceVectors] = {};

    static FG_INLINE F64 summand(F64 term) {
        if constexpr (kLog) return log1p_double<Lanes>(term);
        else return term;
    }
    FG_INLINE void add(int v, F64 term) { places[v] += summand(term); }
    FG_INLINE bool valid() const { return true; }
    FG_INLINE double total() const { return over_places<double>(places, added_up); }
};

// The sum of ln(1 + term), term >= 0, as the logarithm of a product. Each factor adds a relative error of at most 2^-53.
// Mantissas and exponents are kept apart, so nothing overflows: a place takes at most 128 mantissas below 2. Student's t is
// up to 4 times as fast as with a logarithm for each term.
struct LogProduct {
    F64 mantissas[kPlaceVectors];
    U64 exponents[kPlaceVectors] = {};
    I64 finite[kPlaceVectors];

    FG_INLINE LogProduct() {
        for (int v = 0; v < kPlaceVectors; ++v) mantissas[v] = splat(1.0), finite[v] = splat(int64_t{-1});
    }
    FG_INLINE void add(int v, F64 term) {
        const F64 factor = term + 1.0;
        const U64 bits = as<U64>(factor);
        mantissas[v] *= as<F64>((bits & 0x000FFFFFFFFFFFFFu) | 0x3FF0000000000000u);
        exponents[v] += (bits >> 52) - 1023u;
        finite[v] &= factor < kInfinity;
    }
    // False if a factor was infinite or NaN: those have no mantissa.
    FG_INLINE bool valid() const {
        return over_places<int64_t>(finite, [](auto a, auto b) { return a & b; }) != 0;
    }
    FG_INLINE double total() const {
        F64 logs[kPlaceVectors];
        for (int v = 0; v < kPlaceVectors; ++v) {
            const F64 exponent = as<F64>(exponents[v] | 0x4330000000000000u) - 0x1p52;
            logs[v] = log_of_normal<Lanes>(mantissas[v]) + exponent * 0x1.62e42fefa39efp-1;
        }
        return over_places<double>(logs, added_up);
    }
};

// Calls finish(row, sum) for each row of [rows, elements]. For short rows, with fewer than kPlaces elements,
// fill(tile, terms, memory) writes the terms of a tile, row after row. For other rows, sum_part(row, begin, count, memory)
// returns the sum of a part. With sum_part, short rows would take 4 times as long with 7 elements, and 100 times with one.
// `counted`: the scratch memory that the two functions take.
template <class Fill, class SumPart, class Finish>
FG_INLINE void sum_rows(uint64_t rows, uint64_t elements, int threads, Memory counted, const Fill& fill,
                        const SumPart& sum_part, const Finish& finish) {
    if (elements == 0) {
        for (uint64_t row = 0; row < rows; ++row) finish(row, 0.0);
        return;
    }
    const Tiling tiling{rows, elements};
    const uint64_t tiles_per_row = tiling.tiles_per_row();
    if (elements < kPlaces) {
        const uint64_t most = tiling.largest() + kLanes64;
        counted.take<double>(most);
        share_out(tiling.tiles(), kTileGrain, threads, counted, [&](uint64_t index, Memory memory) {
            const Tile tile = tiling.at(index);
            double* const terms = memory.take<double>(most);
            fill(tile, terms, memory);
            sum_short_rows(terms, terms, tile.rows, elements);
            for (uint64_t i = 0; i < tile.rows; ++i) finish(tile.row + i, terms[i]);
        });
        return;
    }
    Scratch<double> parts(tiles_per_row > 1 ? rows * tiles_per_row : 0);
    share_out(tiling.tiles(), kTileGrain, threads, counted, [&](uint64_t index, const Memory& memory) {
        const Tile tile = tiling.at(index);
        if (tiles_per_row > 1)
            parts.data[index] = sum_part(tile.row, tile.begin, tile.count, memory);
        else
            for (uint64_t row = tile.row; row < tile.row + tile.rows; ++row)
                finish(row, sum_part(row, 0, elements, memory));
    });
    if (tiles_per_row == 1) return;
    share_out(rows, kRowGrain / tiles_per_row + 1, threads, [&](uint64_t row) {
        const double* part = parts.data + row * tiles_per_row;
        double sum = part[0];
        for (uint64_t i = 1; i < tiles_per_row; ++i) sum += part[i];
        finish(row, sum);
    });
}

// --- rows of y and of extra variances -----------------------------------------------------------------------

// A row of values for each sample: the only row, the row `index[sample]`, or the row of the sample's own number.
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

// Writes `times` copies of `row`.
template <class Real>
FG_INLINE void repeat(Real* to, const Real* row, uint64_t elements, uint64_t times) {
    const uint64_t whole = elements * times;
    __builtin_memcpy(to, row, elements * sizeof(Real));
    for (uint64_t done = elements; done < whole; done *= 2) {
        const uint64_t more = whole - done < done ? whole - done : done;
        __builtin_memcpy(to + done, to, more * sizeof(Real));
    }
}

// The values for the z of a tile of short rows, row after row. If all rows have the same values, these are laid out once
// for all tiles, which saves up to a sixth of the time.
template <class Real>
struct ShortRows {
    Values<Real> values;
    Scratch<Real> common;

    ShortRows(const Values<Real>& v, uint64_t samples) : values(v) {
        if (!values.data || values.rows > 1 || values.elements == 0 || values.elements >= kPlaces) return;
        const uint64_t most = Tiling{samples, values.elements}.largest();
        common.allocate(most);
        if (most > 0) repeat(common.data, values.data, values.elements, most / values.elements);
    }
    const Real* of(const Tile& tile, Memory& memory) const {
        if (!values.data) return nullptr;
        if (values.rows == 1) return common.data;
        if (!values.index) return values.of(tile.row);
        Real* const buffer = memory.take<Real>(tile.count);
        const int64_t* index = values.index + tile.row;
        for (uint64_t i = 0, end; i < tile.rows; i = end) {  // neighbours mostly have the same row
            const int64_t row = index[i];
            for (end = i + 1; end < tile.rows && index[end] == row;) ++end;
            repeat(buffer + i * values.elements, values.of(tile.row + i), values.elements, end - i);
        }
        return buffer;
    }
};

// --- densities ----------------------------------------------------------------------------------------------

// A density has at(z, y, extra), which returns the term of a measurement and its derivative in z. The log-density of a
// sample is factor * total + constants. Total is PlainTotal, or a faster one that may turn out not to be valid.
struct Point {
    F64 term, gradient;
};

template <bool kExtra>
struct Gaussian {
    using Plain = PlainTotal<false>;
    using Total = Plain;
    static constexpr bool has_extra = kExtra;
    F64 variance, precision;
    double factor;

    explicit Gaussian(const LogDensity& d)
        : variance(splat(d.scale * d.scale)),
          precision(1.0 / variance),
          factor(kExtra ? -0.5 : -0.5 / (d.scale * d.scale)) {}
    FG_INLINE Point at(F64 z, F64 y, F64 extra) const {
        const F64 residual = y - z;
        if constexpr (!kExtra) return {residual * residual, residual * precision};
        const F64 gradient = residual / (variance + extra);
        return {residual * gradient, gradient};
    }
};

// The term is r^2 / (df v). The total is the sum of ln(1 + term).
template <bool kExtra>
struct StudentT {
    using Plain = PlainTotal<true>;
    using Total = LogProduct;
    static constexpr bool has_extra = kExtra;
    F64 variance, df, inverse_width, slope;
    double factor;

    explicit StudentT(const LogDensity& d)
        : variance(splat(d.scale * d.scale)),
          df(splat(d.df)),
          inverse_width(splat(1.0 / (d.df * (d.scale * d.scale)))),
          slope(splat((d.df + 1.0) / (d.df * (d.scale * d.scale)))),
          factor(-0.5 * (d.df + 1.0)) {}
    FG_INLINE Point at(F64 z, F64 y, F64 extra) const {
        const F64 residual = y - z, square = residual * residual;
        if constexpr (!kExtra) {
            const F64 ratio = square * inverse_width;
            return {ratio, slope * residual / (1.0 + ratio)};
        }
        const F64 width = df * (variance + extra);
        return {square / width, (df + 1.0) * residual / (width + square)};
    }
};

template <bool kExtra>
struct Laplace {
    using Plain = PlainTotal<false>;
    using Total = Plain;
    static constexpr bool has_extra = kExtra;
    F64 variance, inverse;
    double factor;

    explicit Laplace(const LogDensity& d)
        : variance(splat(d.scale * d.scale)),
          inverse(splat(1.0 / d.scale)),
          factor(kExtra ? -1.0 : -1.0 / d.scale) {}
    FG_INLINE Point at(F64 z, F64 y, F64 extra) const {
        const F64 residual = y - z, size = residual < 0.0 ? -residual : residual;
        const F64 slope = kExtra ? 1.0 / square_root(variance + extra) : inverse;
        const F64 gradient = residual > 0.0 ? slope : residual < 0.0 ? -slope : residual;  // 0 or NaN
        return {kExtra ? size * slope : size, gradient};
    }
};

// Below the rate kShare max(counts, kLeast) the log-density is a parabola; the reference says why.
constexpr double kShare = 0.5, kLeast = 0.2;

struct Poisson {
    using Plain = PlainTotal<false>;
    using Total = Plain;
    static constexpr bool has_extra = false;
    F64 per_gain, background;
    double factor = 1.0;

    explicit Poisson(const LogDensity& d) : per_gain(splat(1.0 / d.scale)), background(splat(d.background)) {}
    FG_INLINE Point at(F64 z, F64 y, F64) const {
        const F64 counts = y * per_gain, rate = (z + background) * per_gain;
        const F64 floor = kShare * (counts < kLeast ? splat(kLeast) : counts);
        const F64 held = rate < floor ? floor : rate, below = rate < floor ? floor - rate : F64{};
        const F64 bend = below / (counts < 1.0 ? splat(1.0) : counts);
        const F64 seen = counts * (held < kInfinity ? log_of_normal<Lanes>(held) : held);
        const F64 slope = counts / held - 1.0;
        return {(counts == 0.0 ? F64{} : seen) - held - below * (slope + 0.5 * bend), (slope + bend) * per_gain};
    }
};

// Calls take(v, at, terms) for each vector of `count` elements. v is the number of the vector modulo kPlaceVectors. The
// terms are those of the elements from `at` on, and zeros beyond the end. Writes the gradient unless null.
template <class Density, class Real, class Take>
FG_INLINE void each(const Density& density, const Real* z, const Real* y, const Real* extra, Real* gradient,
                    uint64_t count, const Take& take) {
    const uint64_t whole = count - count % kPlaces;
    for (uint64_t i = 0; i < whole; i += kPlaces)
        for (int v = 0; v < kPlaceVectors; ++v) {
            const uint64_t at = i + static_cast<uint64_t>(v) * kLanes64;
            const F64 more = Density::has_extra ? load_wide(extra + at) : F64{};
            const Point p = density.at(load_wide(z + at), load_wide(y + at), more);
            take(v, at, p.term);
            if (gradient) store(gradient + at, narrowed(Real{}, p.gradient));
        }
    int v = 0;
    for (uint64_t at = whole; at < count; at += kLanes64) {
        const int n = count - at < kLanes64 ? static_cast<int>(count - at) : kLanes64;
        const F64 more = Density::has_extra ? load_wide_some(extra + at, n) : F64{};
        const Point p = density.at(load_wide_some(z + at, n), load_wide_some(y + at, n), more);
        take(v++, at, first_lanes(p.term, n));
        if (gradient) store_some(gradient + at, narrowed(Real{}, p.gradient), n);
    }
}

// Sets `valid` to whether the total is.
template <class Total, class Density, class Real>
FG_INLINE double total_of(const Density& density, const Real* z, const Real* y, const Real* extra, Real* gradient,
                          uint64_t count, bool& valid) {
    Total total;
    each(density, z, y, extra, gradient, count, [&](int v, uint64_t, F64 term) { total.add(v, term); });
    valid = total.valid();
    return total.total();
}

// --- parts that do not depend on z --------------------------------------------------------------------------

struct LogVariance {
    static constexpr bool has_extra = false;
    F64 variance;

    explicit LogVariance(const LogDensity& d) : variance(splat(d.scale * d.scale)) {}
    FG_INLINE Point at(F64 extra, F64, F64) const { return {log_double<Lanes>(variance + extra), F64{}}; }
};

struct LogFactorial {
    static constexpr bool has_extra = false;
    F64 per_gain;

    explicit LogFactorial(const LogDensity& d) : per_gain(splat(1.0 / d.scale)) {}
    FG_INLINE Point at(F64 y, F64, F64) const { return {log_gamma_double<Lanes>(y * per_gain + 1.0), F64{}}; }
};

// to[row] = factor * the sum of the row's terms, for `number` rows of `values`: the first ones, or those that its index
// names.
template <class Term, class Real>
void sum_of_rows(double* to, double factor, const Term& term_of, const Values<Real>& values, uint64_t number,
                 int threads) {
    const auto store_terms = [&](const Real* from, double* terms, uint64_t count) {
        each(term_of, from, from, from, static_cast<Real*>(nullptr), count,
             [&](int, uint64_t at, F64 term) { store(terms + at, term); });
    };
    sum_rows(
        number, values.elements, threads, Memory{},
        [&](const Tile& tile, double* terms, const Memory&) {
            if (!values.index) return store_terms(values.of(tile.row), terms, tile.count);
            for (uint64_t i = 0; i < tile.rows; ++i)  // a row writes past its end; the next row overwrites that
                store_terms(values.of(tile.row + i), terms + i * values.elements, values.elements);
        },
        [&](uint64_t row, uint64_t begin, uint64_t count, const Memory&) {
            const Real* from = values.of(row) + begin;
            bool valid = true;
            return total_of<PlainTotal<false>>(term_of, from, from, from, static_cast<Real*>(nullptr), count, valid);
        },
        [&](uint64_t row, double sum) { to[values.row_of(row)] = factor * sum; });
}

// The sum of ln(counts!) of each row of y that a sample uses.
template <class Real>
void sum_log_factorials(double* to, const LogDensity& d, const Values<Real>& y, uint64_t samples, int threads) {
    if (!y.index) return sum_of_rows(to, 1.0, LogFactorial(d), y, y.rows, threads);
    Scratch<int64_t> used(y.rows);
    uint64_t number = 0;
    for (uint64_t row = 0; row < y.rows; ++row) to[row] = 0.0;
    for (uint64_t i = 0; i < samples; ++i) to[y.index[i]] = 1.0;
    for (uint64_t row = 0; row < y.rows; ++row)
        if (to[row] > 0.0) used.data[number++] = static_cast<int64_t>(row);
    sum_of_rows(to, 1.0, LogFactorial(d), Values<Real>{y.data, y.rows, y.elements, used.data}, number, threads);
}

// --- the whole ----------------------------------------------------------------------------------------------

// `subtracted`: for each row of y, or of extra variances, a number to subtract that does not depend on z; or no data.
template <class Total, class Real, class Density>
void evaluate_with(const Density& density, const DensityArrays& a, const Values<Real>& y, const Values<Real>& extra,
                   double constant, const Values<double>& subtracted, int threads) {
    using Plain = typename Density::Plain;
    const ShortRows<Real> short_y(y, a.samples), short_extra(extra, a.samples);
    const bool narrow_z = a.dtype == Dtype::float16 || a.dtype == Dtype::bfloat16;
    const uint64_t most = Tiling{a.samples, a.elements > 0 ? a.elements : 1}.largest();
    Memory counted;
    if (narrow_z) counted.take<Real>(most);
    if (y.index && a.elements < kPlaces) counted.take<Real>(most);
    // Calls use(z, gradient) with the `count` elements from `at` on, as Real.
    const auto in_reals = [&](uint64_t at, uint64_t count, Memory memory, const auto& use)
                              __attribute__((always_inline)) {
        Real* const buffer = narrow_z ? memory.take<Real>(count) : nullptr;
        const Real* z = staged(buffer, {a.z, a.dtype}, at, count);
        Real* gradient = !a.gradient ? nullptr : narrow_z ? buffer : static_cast<Real*>(a.gradient) + at;
        use(z, gradient);
        if (gradient && narrow_z) put({a.gradient, a.dtype}, at, buffer, count);
    };
    sum_rows(
        a.samples, a.elements, threads, counted,
        [&](const Tile& tile, double* terms, Memory memory) {
            const Real *of_y = short_y.of(tile, memory), *of_extra = short_extra.of(tile, memory);
            in_reals(tile.row * a.elements, tile.count, memory, [&](const Real* z, Real* gradient) {
                each(density, z, of_y, of_extra, gradient, tile.count,
                     [&](int, uint64_t at, F64 term) { store(terms + at, Plain::summand(term)); });
            });
        },
        [&](uint64_t row, uint64_t begin, uint64_t count, Memory memory) {
            const Real *of_y = y.of(row) + begin, *of_extra = Density::has_extra ? extra.of(row) + begin : nullptr;
            const uint64_t at = row * a.elements + begin;
            double total = 0.0;
            bool valid = true;
            in_reals(at, count, memory, [&](const Real* z, Real* gradient) {
                total = total_of<Total>(density, z, of_y, of_extra, gradient, count, valid);
            });
            if (valid) return total;
            // z is converted again: the gradient may have overwritten the buffer.
            Real* const buffer = narrow_z ? memory.take<Real>(count) : nullptr;
            return total_of<Plain>(density, staged(buffer, {a.z, a.dtype}, at, count), of_y, of_extra,
                                   static_cast<Real*>(nullptr), count, valid);
        },
        [&](uint64_t sample, double total) {
            const double of_rows = subtracted.data ? subtracted.data[subtracted.row_of(sample)] : 0.0;
            a.log_prob[sample] = density.factor * total + (constant - of_rows);
        });
}

// Copies `count` row indices and returns the largest. A negative one counts as larger than any other.
uint64_t largest_of_copy(int64_t* __restrict__ to, const int64_t* __restrict__ from, uint64_t count) {
    uint64_t largest = 0;
    for (uint64_t i = 0; i < count; ++i) {
        const int64_t row = from[i];
        to[i] = row;
        largest = static_cast<uint64_t>(row) > largest ? static_cast<uint64_t>(row) : largest;
    }
    return largest;
}

constexpr double kManyDegrees = 1e4;  // degrees of freedom; from here on the factor makes LogProduct's errors too large

template <class Real>
void log_prob_and_gradient_in(const LogDensity& d, const DensityArrays& a, int threads) {
    const Values<Real> y{static_cast<const Real*>(a.y), a.y_rows, a.elements, a.y_rows > 1 ? a.rows : nullptr};
    const Values<Real> extra{static_cast<const Real*>(a.extra), a.extra_rows, a.elements, nullptr};
    const bool counts = d.family == Family::poisson, sums_factorials = counts && !a.log_factorials;
    Scratch<double> sums(sums_factorials ? y.rows : extra.rows);
    Values<double> subtracted{};
    if (counts) {
        if (sums_factorials) sum_log_factorials(sums.data, d, y, a.samples, threads);
        subtracted = {sums_factorials ? sums.data : a.log_factorials, y.rows, 1, y.index};
    } else if (a.extra) {
        sum_of_rows(sums.data, 0.5, LogVariance(d), extra, extra.rows, threads);
        subtracted = {sums.data, extra.rows, 1, nullptr};
    }
    const auto evaluate = [&](const auto& density, auto total) {
        const double constant = d.constant * static_cast<double>(a.elements);
        evaluate_with<decltype(total)>(density, a, y, extra, constant, subtracted, threads);
    };
    const auto with = [&](const auto& density) {
        using Density = std::decay_t<decltype(density)>;
        if (d.df < kManyDegrees) evaluate(density, typename Density::Total{});
        else evaluate(density, typename Density::Plain{});
    };
    switch (d.family) {
        case Family::gaussian: return a.extra ? with(Gaussian<true>(d)) : with(Gaussian<false>(d));
        case Family::student_t: return a.extra ? with(StudentT<true>(d)) : with(StudentT<false>(d));
        case Family::laplace: return a.extra ? with(Laplace<true>(d)) : with(Laplace<false>(d));
        case Family::poisson: return with(Poisson(d));
    }
}

// Returns -1, or the place of the first row index out of range; nothing is written then.
int64_t log_prob_and_gradient(const LogDensity& density, const DensityArrays& arrays, int threads) {
    DensityArrays own = arrays;
    Scratch<int64_t> rows;  // a copy is checked and used, because another thread may write to the call's own meanwhile
    if (arrays.rows) {
        rows.allocate(arrays.samples);
        own.rows = rows.data;
        if (largest_of_copy(rows.data, arrays.rows, arrays.samples) >= arrays.y_rows)
            for (uint64_t i = 0; i < arrays.samples; ++i)
                if (static_cast<uint64_t>(rows.data[i]) >= arrays.y_rows) return static_cast<int64_t>(i);
    }
    if (own.gradient) large_pages(own.gradient, own.samples * own.elements * size_of(own.dtype));
    if (own.dtype == Dtype::float64) log_prob_and_gradient_in<double>(density, own, threads);
    else log_prob_and_gradient_in<float>(density, own, threads);
    return -1;
}

// ln x, ln(1 + x) and ln Gamma(x), as log_prob_and_gradient computes them.
void log_functions(const double* x, double* log, double* log1p, double* log_gamma, std::size_t count) {
    for (std::size_t i = 0; i < count; i += kLanes64) {
        const int n = static_cast<int>(count - i < kLanes64 ? count - i : kLanes64);
        const F64 v = load_some<F64>(x + i, n);
        store_some(log + i, log_double<Lanes>(v), n);
        store_some(log1p + i, log1p_double<Lanes>(v), n);
        store_some(log_gamma + i, log_gamma_double<Lanes>(v), n);
    }
}

// family, scale, df, background, constant, dtype of z, samples, elements, z, y, y_rows, rows (or None), extra (or None),
// extra_rows, log_factorials (or None), log_prob, gradient (or None), threads
PyObject* call_log_prob_and_gradient(Arguments& in) {
    const Family family = in.code("family", Family::poisson);
    const double scale = in.number(), df = in.number(), background = in.number(), constant = in.number();
    DensityArrays arrays{};
    arrays.dtype = in.dtype();
    arrays.samples = in.integer(), arrays.elements = in.integer();
    const uint64_t some = arrays.elements > 0;
    arrays.z = in.pointer("z"), in.expect_memory(arrays.samples * some);
    arrays.y = in.pointer("y"), arrays.y_rows = in.integer(), in.expect_memory(arrays.y_rows * some);
    arrays.rows = in.pointer_or_none<const int64_t>("rows"), in.expect_memory(arrays.samples);
    arrays.extra = in.pointer_or_none("extra_variance"), arrays.extra_rows = in.integer();
    in.expect_memory(arrays.extra_rows * some);
    arrays.log_factorials = in.pointer_or_none<const double>("log_factorials"), in.expect_memory(arrays.y_rows);
    arrays.log_prob = in.pointer<double>("log_prob"), in.expect_memory(arrays.samples);
    arrays.gradient = in.pointer_or_none("gradient"), in.expect_memory(arrays.samples * some);
    const int threads = in.threads();
    const LogDensity density{family, scale, df, background, constant};
    return PyLong_FromLongLong(without_gil([&] { return log_prob_and_gradient(density, arrays, threads); }));
}

// x, ln x, ln(1 + x), ln Gamma(x), count
PyObject* call_log_functions(Arguments& in) {
    const auto x = in.pointer<const double>("x");
    const auto log = in.pointer<double>("log"), log1p = in.pointer<double>("log1p");
    const auto log_gamma = in.pointer<double>("log_gamma");
    log_functions(x, log, log1p, log_gamma, in.integer());
    return none();
}

Binding bindings[] = {
    {"log_prob_and_gradient", fastcall<call_log_prob_and_gradient, 18>,
     "Log-densities and their gradients in z. Returns the place of the first row out of range, or -1."},
    {"log_functions", fastcall<call_log_functions, 5>,
     "ln x, ln(1 + x) and ln Gamma(x), as log_prob_and_gradient has them."},
};

}  // namespace
}  // namespace fastguide::cpu

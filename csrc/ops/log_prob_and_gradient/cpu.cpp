// Log-densities of the error models and their gradients, in one pass over z and y.
//
// Each term is computed in double whatever the type of the arrays. The terms of a tile of 2,048 elements are put
// together in one tree, whatever the instruction set: 16 lanes, element i of the tile in lane i mod 16, then lanes i
// and i + 8, i + 4, i + 2, i + 1; the tiles of a sample in their order.
#include "../../common/binding.h"
#include "../../common/log.h"
#include "../../cpu/scratch.h"
#include "../../cpu/sums.h"
#include "../../cpu/tiles.h"
#include "../../cpu/types.h"

namespace fastguide::cpu {
namespace {

// By the code that Python passes: the order of fastguide.reference.FAMILIES.
enum class Family : int { gaussian = 0, student_t = 1, laplace = 2, poisson = 3 };

// log p(y | z) of each measurement; of Poisson the scale is the gain. `constant` is the part of it that depends on
// neither z, y nor variances that are added.
struct LogDensity {
    Family family;
    double scale, df, background, constant;
};

// z[samples, elements] of any type, and a gradient like it unless null; y[y_rows, elements], of which sample i has
// row rows[i], or where `rows` is null row i or the only one; variances added[added_rows, elements] with a row for
// each sample or one for all, null if there are none. y and added are float64 where z is, else float32.
struct DensityArrays {
    const void* z;
    const void* y;
    const int64_t* rows;
    const void* added;
    double* log_prob;
    void* gradient;
    Dtype dtype;
    uint64_t samples, elements, y_rows, added_rows;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint64_t kRowGrain = 4096;  // sums of a few numbers that are worth a thread

using Lanes = VectorLanes64;

FG_INLINE HalfF32 narrowed(float, F64 v) { return __builtin_convertvector(v, HalfF32); }
FG_INLINE F64 narrowed(double, F64 v) { return v; }

// --- sums ---------------------------------------------------------------------------------------------------

// What takes the terms of a part of a row, at most kTile of them, a vector at a time: vector v of every kPlaceVectors.
struct Sum {
    F64 lanes[kPlaceVectors] = {};

    FG_INLINE void add(int v, F64 term) { lanes[v] += term; }
    FG_INLINE double total(uint64_t) const { return over_places<double>(lanes, added_up); }
};

// The sum of ln(1 + term), as the logarithm of a product: a term costs a multiplication. Good to 2^-53 of each
// factor. Mantissas and exponents go apart, so that nothing overflows: 128 mantissas below 2 in each lane.
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
    FG_INLINE bool all_finite() const {
        return over_places<int64_t>(finite, [](auto a, auto b) { return a & b; }) != 0;
    }
    FG_INLINE double total(uint64_t count) const {
        const auto log_of = [](F64 mantissa, U64 exponent) __attribute__((always_inline)) {
            const F64 k = as<F64>(exponent | 0x4330000000000000u) - 0x1p52;
            return log_of_normal<Lanes>(mantissa) + k * 0x1.62e42fefa39efp-1;
        };
        if (count <= 512) {  // all mantissas together stay below 2^512
            const double mantissa = over_places<double>(mantissas, multiplied);
            return log_of(splat(mantissa), splat(over_places<uint64_t>(exponents, added_up)))[0];
        }
        F64 lanes[kPlaceVectors];
        for (int v = 0; v < kPlaceVectors; ++v) lanes[v] = log_of(mantissas[v], exponents[v]);
        return over_places<double>(lanes, added_up);
    }
};

// finish(row, sum) for each row of [rows, elements]. Rows of few elements are summed up from the terms that
// fill(tile, terms, memory) writes, row after row; of others run(row, begin, count, memory) returns the sum of a part.
// `counted`: the memory that these take.
template <class Fill, class Run, class Finish>
FG_INLINE void sum_terms(uint64_t rows, uint64_t elements, int threads, Memory counted, const Fill& fill,
                         const Run& run, const Finish& finish) {
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
            parts.data[index] = run(tile.row, tile.begin, tile.count, memory);
        else
            for (uint64_t row = tile.row; row < tile.row + tile.rows; ++row) finish(row, run(row, 0, elements, memory));
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

// The values beside the z of a tile of short rows, row after row. What all tiles share is laid out once.
template <class Real>
struct Laid {
    Values<Real> values;
    Scratch<Real> common;

    Laid(const Values<Real>& v, uint64_t samples) : values(v) {
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
        for (uint64_t i = 0, end; i < tile.rows; i = end) {  // samples of one observation follow each other
            const int64_t row = index[i];
            for (end = i + 1; end < tile.rows && index[end] == row;) ++end;
            repeat(buffer + i * values.elements, values.of(tile.row + i), values.elements, end - i);
        }
        return buffer;
    }
};

// --- densities ----------------------------------------------------------------------------------------------

// A density has at(z, y, added) -> {term, gradient} and a Total of terms, and the log-density is factor * total of
// terms + constants.
struct Point {
    F64 term, gradient;
};

template <bool kAdded>
struct Gaussian {
    using Total = Sum;
    static constexpr bool added = kAdded;
    F64 variance, precision;
    double factor;

    explicit Gaussian(const LogDensity& d)
        : variance(splat(d.scale * d.scale)),
          precision(1.0 / variance),
          factor(kAdded ? -0.5 : -0.5 / (d.scale * d.scale)) {}
    FG_INLINE Point at(F64 z, F64 y, F64 more) const {
        const F64 residual = y - z;
        if constexpr (!kAdded) return {residual * residual, residual * precision};
        const F64 gradient = residual / (variance + more);
        return {residual * gradient, gradient};
    }
};

template <bool kAdded, bool kProduct>
struct StudentT;

template <bool kAdded>
struct StudentT<kAdded, false> {
    using Total = Sum;
    static constexpr bool added = kAdded;
    F64 variance, df, inverse_width, slope;
    double factor;

    explicit StudentT(const LogDensity& d)
        : variance(splat(d.scale * d.scale)),
          df(splat(d.df)),
          inverse_width(splat(1.0 / (d.df * (d.scale * d.scale)))),
          slope(splat((d.df + 1.0) / (d.df * (d.scale * d.scale)))),
          factor(-0.5 * (d.df + 1.0)) {}
    FG_INLINE Point ratio_at(F64 z, F64 y, F64 more) const {
        const F64 residual = y - z, square = residual * residual;
        if constexpr (!kAdded) {
            const F64 ratio = square * inverse_width;
            return {ratio, slope * residual / (1.0 + ratio)};
        }
        const F64 width = df * (variance + more);
        return {square / width, (df + 1.0) * residual / (width + square)};
    }
    FG_INLINE Point at(F64 z, F64 y, F64 more) const {
        const Point p = ratio_at(z, y, more);
        return {log1p_double<Lanes>(p.term), p.gradient};
    }
};

// Its logarithms as that of a product.
template <bool kAdded>
struct StudentT<kAdded, true> {
    using Total = LogProduct;
    static constexpr bool added = kAdded;
    StudentT<kAdded, false> plain;
    double factor;

    explicit StudentT(const LogDensity& d) : plain(d), factor(plain.factor) {}
    FG_INLINE Point at(F64 z, F64 y, F64 more) const { return plain.ratio_at(z, y, more); }
};

template <bool kAdded>
struct Laplace {
    using Total = Sum;
    static constexpr bool added = kAdded;
    F64 variance, inverse;
    double factor;

    explicit Laplace(const LogDensity& d)
        : variance(splat(d.scale * d.scale)),
          inverse(splat(1.0 / d.scale)),
          factor(kAdded ? -1.0 : -1.0 / d.scale) {}
    FG_INLINE Point at(F64 z, F64 y, F64 more) const {
        const F64 residual = y - z, size = residual < 0.0 ? -residual : residual;
        const F64 slope = kAdded ? 1.0 / square_root(variance + more) : inverse;
        const F64 gradient = residual > 0.0 ? slope : residual < 0.0 ? -slope : residual;  // 0 or NaN
        return {kAdded ? size * slope : size, gradient};
    }
};

// Below the rate kShare max(counts, kLeast) the log-density is a parabola: see the reference.
constexpr double kShare = 0.5, kLeast = 0.2;

struct Poisson {
    using Total = Sum;
    static constexpr bool added = false;
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

// take(index of the vector, its term) for each vector of `count` elements, and the gradient unless null.
template <class Density, class Real, class Take>
FG_INLINE void each(const Density& density, const Real* z, const Real* y, const Real* added, Real* gradient,
                    uint64_t count, const Take& take) {
    const uint64_t whole = count - count % kPlaces;
    for (uint64_t i = 0; i < whole; i += kPlaces)
        for (int v = 0; v < kPlaceVectors; ++v) {
            const uint64_t at = i + static_cast<uint64_t>(v) * kLanes64;
            const F64 more = Density::added ? load_wide(added + at) : F64{};
            const Point p = density.at(load_wide(z + at), load_wide(y + at), more);
            take(v, at, p.term);
            if (gradient) store(gradient + at, narrowed(Real{}, p.gradient));
        }
    int v = 0;
    for (uint64_t at = whole; at < count; at += kLanes64) {
        const int n = count - at < kLanes64 ? static_cast<int>(count - at) : kLanes64;
        const F64 more = Density::added ? load_wide_some(added + at, n) : F64{};
        const Point p = density.at(load_wide_some(z + at, n), load_wide_some(y + at, n), more);
        take(v++, at, first_lanes(p.term, n));
        if (gradient) store_some(gradient + at, narrowed(Real{}, p.gradient), n);
    }
}

// The same density with a Total that takes any number.
template <class Density>
FG_INLINE const Density& plain(const Density& density) {
    return density;
}
template <bool kAdded>
FG_INLINE const StudentT<kAdded, false>& plain(const StudentT<kAdded, true>& density) {
    return density.plain;
}

// `finite` becomes false where a product holds a factor that is not, and the total then means nothing.
template <class Density, class Real>
FG_INLINE double total_of(const Density& density, const Real* z, const Real* y, const Real* added, Real* gradient,
                          uint64_t count, bool& finite) {
    typename Density::Total total;
    each(density, z, y, added, gradient, count, [&](int v, uint64_t, F64 term) { total.add(v, term); });
    if constexpr (std::is_same_v<typename Density::Total, LogProduct>) finite = total.all_finite();
    return total.total(count);
}

// --- parts that do not depend on z --------------------------------------------------------------------------

struct LogVariance {
    using Total = Sum;
    static constexpr bool added = false;
    F64 variance;

    explicit LogVariance(const LogDensity& d) : variance(splat(d.scale * d.scale)) {}
    FG_INLINE Point at(F64 more, F64, F64) const { return {log_double<Lanes>(variance + more), F64{}}; }
};

struct LogFactorial {
    using Total = Sum;
    static constexpr bool added = false;
    F64 per_gain;

    explicit LogFactorial(const LogDensity& d) : per_gain(splat(1.0 / d.scale)) {}
    FG_INLINE Point at(F64 y, F64, F64) const { return {log_gamma_double<Lanes>(y * per_gain + 1.0), F64{}}; }
};

// to[row] = factor * the sum of the row's terms, for the rows of `values`, or the `number` that its index names.
template <class Part, class Real>
void sum_part(double* to, double factor, const Part& part, const Values<Real>& values, uint64_t number,
              int threads) {
    const auto store_terms = [&](const Real* from, double* terms, uint64_t count) {
        each(part, from, from, from, static_cast<Real*>(nullptr), count,
             [&](int, uint64_t at, F64 term) { store(terms + at, term); });
    };
    sum_terms(
        number, values.elements, threads, Memory{},
        [&](const Tile& tile, double* terms, const Memory&) {
            if (!values.index) return store_terms(values.of(tile.row), terms, tile.count);
            for (uint64_t i = 0; i < tile.rows; ++i)  // what one writes past its end the next one mends
                store_terms(values.of(tile.row + i), terms + i * values.elements, values.elements);
        },
        [&](uint64_t row, uint64_t begin, uint64_t count, const Memory&) {
            const Real* from = values.of(row) + begin;
            bool finite = true;
            return total_of(part, from, from, from, static_cast<Real*>(nullptr), count, finite);
        },
        [&](uint64_t row, double sum) { to[values.row_of(row)] = factor * sum; });
}

// ln(counts!) of each row of y that a sample has.
template <class Real>
void sum_factorials(double* to, const LogDensity& d, const Values<Real>& y, uint64_t samples, int threads) {
    if (!y.index) return sum_part(to, -1.0, LogFactorial(d), y, y.rows, threads);
    Scratch<int64_t> used(y.rows);
    uint64_t number = 0;
    for (uint64_t row = 0; row < y.rows; ++row) to[row] = 0.0;
    for (uint64_t i = 0; i < samples; ++i) to[y.index[i]] = 1.0;
    for (uint64_t row = 0; row < y.rows; ++row)
        if (to[row] > 0.0) used.data[number++] = static_cast<int64_t>(row);
    sum_part(to, -1.0, LogFactorial(d), Values<Real>{y.data, y.rows, y.elements, used.data}, number, threads);
}

// --- the whole ----------------------------------------------------------------------------------------------

// What rows of y or of `added` say of a sample's log-density on their own.
struct Known {
    const double* of_row;  // or null
    uint64_t rows;
    const int64_t* index;

    double of(uint64_t sample) const {
        if (!of_row) return 0.0;
        return of_row[rows == 1 ? 0 : index ? static_cast<uint64_t>(index[sample]) : sample];
    }
};

template <class Real, class Density>
void evaluate(const Density& density, const DensityArrays& a, const Values<Real>& y, const Values<Real>& added,
              double constant, const Known& known, int threads) {
    const Laid<Real> laid_y(y, a.samples), laid_added(added, a.samples);
    const bool narrow_z = a.dtype == Dtype::float16 || a.dtype == Dtype::bfloat16;
    const uint64_t most = Tiling{a.samples, a.elements > 0 ? a.elements : 1}.largest();
    Memory counted;
    if (narrow_z) counted.take<Real>(most);
    if (y.index && a.elements < kPlaces) counted.take<Real>(most);
    // use(z, gradient) with `count` elements of them from `at`.
    const auto in_reals = [&](uint64_t at, uint64_t count, Memory memory, const auto& use)
                              __attribute__((always_inline)) {
        Real* const buffer = narrow_z ? memory.take<Real>(count) : nullptr;
        const Real* z = staged(buffer, {a.z, a.dtype}, at, count);
        Real* gradient = !a.gradient ? nullptr : narrow_z ? buffer : static_cast<Real*>(a.gradient) + at;
        use(z, gradient);
        if (gradient && narrow_z) put({a.gradient, a.dtype}, at, buffer, count);
    };
    sum_terms(
        a.samples, a.elements, threads, counted,
        [&](const Tile& tile, double* terms, Memory memory) {
            const Real *beside = laid_y.of(tile, memory), *more = laid_added.of(tile, memory);
            in_reals(tile.row * a.elements, tile.count, memory, [&](const Real* z, Real* gradient) {
                each(plain(density), z, beside, more, gradient, tile.count,
                     [&](int, uint64_t at, F64 term) { store(terms + at, term); });
            });
        },
        [&](uint64_t row, uint64_t begin, uint64_t count, Memory memory) {
            const Real *beside = y.of(row) + begin, *more = Density::added ? added.of(row) + begin : nullptr;
            const uint64_t at = row * a.elements + begin;
            double total = 0.0;
            bool finite = true;
            in_reals(at, count, memory, [&](const Real* z, Real* gradient) {
                total = total_of(density, z, beside, more, gradient, count, finite);
            });
            if (finite) return total;
            // Again, as a sum. z is read anew: the gradient may stand where it was widened.
            Real* const buffer = narrow_z ? memory.take<Real>(count) : nullptr;
            return total_of(plain(density), staged(buffer, {a.z, a.dtype}, at, count), beside, more,
                            static_cast<Real*>(nullptr), count, finite);
        },
        [&](uint64_t sample, double total) {
            a.log_prob[sample] = density.factor * total + (constant + known.of(sample));
        });
}

// Copies `count` rows; the largest, where one below 0 is larger than any.
uint64_t largest_of_copy(int64_t* __restrict__ to, const int64_t* __restrict__ from, uint64_t count) {
    uint64_t largest = 0;
    for (uint64_t i = 0; i < count; ++i) {
        const int64_t row = from[i];
        to[i] = row;
        largest = static_cast<uint64_t>(row) > largest ? static_cast<uint64_t>(row) : largest;
    }
    return largest;
}

constexpr double kManyDegrees = 1e4;  // from which on ln(1 + ratio) is multiplied by too much for a product

template <class Real>
void log_prob_and_gradient_in(const LogDensity& d, const DensityArrays& a, int threads) {
    const Values<Real> y{static_cast<const Real*>(a.y), a.y_rows, a.elements, a.y_rows > 1 ? a.rows : nullptr};
    const Values<Real> added{static_cast<const Real*>(a.added), a.added_rows, a.elements, nullptr};
    Scratch<double> of_row(d.family == Family::poisson ? y.rows : added.rows);
    Known known{nullptr, 0, nullptr};
    if (d.family == Family::poisson) {
        known = {of_row.data, y.rows, y.index};
        sum_factorials(of_row.data, d, y, a.samples, threads);
    } else if (a.added) {
        known = {of_row.data, added.rows, nullptr};
        sum_part(of_row.data, -0.5, LogVariance(d), added, added.rows, threads);
    }
    const auto with = [&](const auto& density) {
        evaluate(density, a, y, added, d.constant * static_cast<double>(a.elements), known, threads);
    };
    const bool product = d.df < kManyDegrees && a.elements >= kPlaces;
    switch (d.family) {
        case Family::gaussian: return a.added ? with(Gaussian<true>(d)) : with(Gaussian<false>(d));
        case Family::student_t:
            if (product) return a.added ? with(StudentT<true, true>(d)) : with(StudentT<false, true>(d));
            return a.added ? with(StudentT<true, false>(d)) : with(StudentT<false, false>(d));
        case Family::laplace: return a.added ? with(Laplace<true>(d)) : with(Laplace<false>(d));
        case Family::poisson: return with(Poisson(d));
    }
}

// The place of the first row out of range, and then nothing is written, or -1.
int64_t log_prob_and_gradient(const LogDensity& density, const DensityArrays& arrays, int threads) {
    DensityArrays own = arrays;
    Scratch<int64_t> rows;  // checked and used, as another thread may write to those of the call meanwhile
    if (arrays.rows) {
        rows.allocate(arrays.samples);
        own.rows = rows.data;
        if (largest_of_copy(rows.data, arrays.rows, arrays.samples) >= arrays.y_rows)
            for (uint64_t i = 0; i < arrays.samples; ++i)
                if (static_cast<uint64_t>(rows.data[i]) >= arrays.y_rows) return static_cast<int64_t>(i);
    }
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

// family, scale, df, background, constant, dtype of z, samples, elements, z, y, y_rows, rows (or None), added (or None),
// added_rows, log_prob, gradient (or None), threads
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
    arrays.added = in.pointer_or_none("added"), arrays.added_rows = in.integer();
    in.expect_memory(arrays.added_rows * some);
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
    {"log_prob_and_gradient", fastcall<call_log_prob_and_gradient, 17>,
     "Log-densities and their gradients in z. Returns the place of the first row out of range, or -1."},
    {"log_functions", fastcall<call_log_functions, 5>,
     "ln x, ln(1 + x) and ln Gamma(x), as log_prob_and_gradient has them."},
};

}  // namespace
}  // namespace fastguide::cpu

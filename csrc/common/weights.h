// The parts of resampling: weights, shares and random numbers as integers. They come from IEEE operations on float64
// alone, none of them fused, so that every machine draws the same ancestors. fastguide/reference.py does the same in
// PyTorch.
//
// Each function is written once, for one lane or many, as in math.h.
#pragma once

#include "math.h"
#include "philox.h"

namespace fastguide {

enum class Scheme : int { systematic = 0, stratified = 1, multinomial = 2, residual = 3 };

// The arguments and results of one call of resample, apart from its log-weights [rows, particles].
struct Resampling {
    uint64_t rows, particles, number;  // the last two below 2^31
    Scheme scheme;
    bool sorted;
    double keep_from;  // a row whose effective sample size is at least this keeps its particles
    uint64_t seed;
    uint32_t step, stream;
    uint64_t first_row;             // row b draws as row first_row + b of a larger call
    int32_t* ancestors;             // [rows, number]
    void* log_weights_after;        // [rows, number]
    double *log_mean_weight, *ess;  // [rows]
};

// One lane: a GPU thread, or plain C++.
struct OneWideLane {
    using F64 = double;
    using I64 = int64_t;
    using U64 = uint64_t;

    static FG_HD int64_t bits(double v) {
#if defined(__CUDA_ARCH__)
        return __double_as_longlong(v);
#else
        int64_t bits;
        std::memcpy(&bits, &v, sizeof bits);
        return bits;
#endif
    }
    static FG_HD double of_bits(int64_t bits) {
#if defined(__CUDA_ARCH__)
        return __longlong_as_double(bits);
#else
        double v;
        std::memcpy(&v, &bits, sizeof v);
        return v;
#endif
    }
    static FG_HD uint64_t to_unsigned(int64_t v) { return static_cast<uint64_t>(v); }
    static FG_HD int64_t to_signed(uint64_t v) { return static_cast<int64_t>(v); }
    static FG_HD double to_double(int64_t v) { return static_cast<double>(v); }
    static FG_HD int64_t nearest(double v) {
#if defined(__CUDA_ARCH__)
        return __double2ll_rn(v);
#else
        return std::llrint(v);
#endif
    }
    static FG_HD uint64_t multiply_low_words(uint64_t a, uint64_t b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
    static FG_HD uint64_t multiply_by_word(uint64_t a, uint64_t b) { return a * static_cast<uint32_t>(b); }
    static FG_HD int64_t one_if(bool condition) { return condition; }
    static FG_HD double smaller(double a, double b) { return a < b ? a : b; }
    static FG_HD double larger(double a, double b) { return a > b ? a : b; }
};

// --- weights ------------------------------------------------------------------------------------------------

// e 2^n with e in [1/2^0.5, 2^0.5]. The integer n is the last 12 bits of the field.
template <class Lanes>
struct Exponential {
    typename Lanes::F64 e;
    typename Lanes::U64 n;
};

// exp(max(d, least)) for d <= 0. The default is low enough: exp(-64) 2^62 rounds to 0. With d / ln 2 = n + f, 2^f on
// |f| <= 1/2 is a minimax fit good to 2^-57.
template <class Lanes>
FG_HD Exponential<Lanes> exponential(typename Lanes::F64 d, double least = -64.0) {
    using F64 = typename Lanes::F64;
    const F64 t = Lanes::larger(d, F64{} + least) * 0x1.71547652b82fep+0;
    const F64 shifted = t + 0x1.8p52;  // rounds t to an integer: the sum has no bits for a fraction
    const F64 f = t - (shifted - 0x1.8p52);
    const F64 y = f * f;  // even and odd powers apart: two independent chains of half the length
    F64 even = y * 0x1.e611d959ea80ap-28 + 0x1.62bfcdd1c88bcp-20;
    F64 odd = y * 0x1.e7ac1c9b857e2p-32 + 0x1.b526488a246c8p-24;
    even = even * y + 0x1.4309130bff348p-13;
    odd = odd * y + 0x1.ffcbfbe079d4ap-17;
    even = even * y + 0x1.3b2ab6fba1212p-7;
    odd = odd * y + 0x1.5d87fe78b7b0cp-10;
    even = even * y + 0x1.ebfbdff82c59cp-3;
    odd = odd * y + 0x1.c6b08d704a0c7p-5;
    even = even * y + 1.0;
    odd = odd * y + 0x1.62e42fefa39efp-1;
    const F64 e = odd * f + even;
    return {e, Lanes::to_unsigned(Lanes::bits(shifted))};
}

// round(e 2^(n + scale)): n + scale is added to the exponent bits of e. integer_square does the same for the square.
template <class Lanes>
FG_HD typename Lanes::I64 integer_weight(const Exponential<Lanes>& x, int scale) {
    const auto moved = Lanes::to_unsigned(Lanes::bits(x.e)) + ((x.n + static_cast<uint64_t>(scale)) << 52);
    return Lanes::nearest(Lanes::of_bits(Lanes::to_signed(moved)));
}

template <class Lanes>
FG_HD typename Lanes::I64 integer_square(const Exponential<Lanes>& x, int scale) {
    const auto moved = Lanes::to_unsigned(Lanes::bits(x.e * x.e)) + ((x.n + x.n + static_cast<uint64_t>(scale)) << 52);
    return Lanes::nearest(Lanes::of_bits(Lanes::to_signed(moved)));
}

// The S of the integer weights round(exp(log_w - max) 2^S). With it, the sum over the particles stays below 2^62.
inline int weight_scale(uint64_t particles) {
    int scale = 62;
    while (particles > uint64_t{1} << (62 - scale)) --scale;
    return scale;
}

// --- shares -------------------------------------------------------------------------------------------------

// N < 2^32 slots to be shared by the weight. Particles with weight q out of Q get N q / Q = whole + rest / Q slots.
struct Slots {
    uint64_t number, total;
    double ratio;  // N / Q
};

FG_HD Slots slots_of(uint64_t number, uint64_t total) {
    return {number, total, static_cast<double>(number) / static_cast<double>(total)};
}

template <class Lanes>
struct Share {
    typename Lanes::I64 whole, rest;
};

// `whole` is the nearest integer up to the rounding of the float64 product. `rest` is exact modulo 2^64, and its size
// is at most a little more than Q / 2.
template <class Lanes>
FG_HD Share<Lanes> nearest_share(typename Lanes::I64 q, const Slots& slots) {
    using U64 = typename Lanes::U64;
    const auto shifted = Lanes::to_double(q) * slots.ratio + 0x1.8p52;
    const U64 whole = Lanes::to_unsigned(Lanes::bits(shifted)) - 0x4338000000000000u;
    const U64 product = Lanes::multiply_by_word(Lanes::to_unsigned(q), U64{} + slots.number);
    return {Lanes::to_signed(whole), Lanes::to_signed(product - Lanes::multiply_by_word(U64{} + slots.total, whole))};
}

template <class Lanes>
FG_HD Share<Lanes> floor_share(typename Lanes::I64 q, const Slots& slots) {
    const Share<Lanes> share = nearest_share<Lanes>(q, slots);
    const auto below = Lanes::one_if(share.rest < 0);
    return {share.whole - below, share.rest + (-below & static_cast<int64_t>(slots.total))};
}

// How many of the positions floor((i Q + r) / N) lie below the prefix sum q: systematic resampling.
template <class Lanes>
FG_HD typename Lanes::I64 systematic_slots(typename Lanes::I64 q, const Slots& slots, int64_t r) {
    const Share<Lanes> share = nearest_share<Lanes>(q, slots);
    return share.whole + Lanes::one_if(share.rest > r) -
           Lanes::one_if(share.rest <= r - static_cast<int64_t>(slots.total));
}

// --- random numbers -----------------------------------------------------------------------------------------

// floor(u q / 2^64) for 0 <= q <= 2^62, in 32-bit limbs. u is made of the low words of w0 and w1.
template <class Lanes>
FG_HD typename Lanes::I64 uniform_below(uint64_t q, typename Lanes::U64 w0, typename Lanes::U64 w1) {
    using U64 = typename Lanes::U64;
    const U64 q0 = U64{} + (q & 0xFFFFFFFFu), q1 = U64{} + (q >> 32);
    const U64 low = Lanes::multiply_low_words(w0, q0), cross = Lanes::multiply_low_words(w1, q0);
    const U64 other = Lanes::multiply_low_words(w0, q1), high = Lanes::multiply_low_words(w1, q1);
    const U64 middle = (low >> 32) + (cross & 0xFFFFFFFFu) + (other & 0xFFFFFFFFu);
    return Lanes::to_signed(high + (cross >> 32) + (other >> 32) + (middle >> 32));
}

// round(-ln((w + 1) / 2^32) 2^26) for the low word w: ln(3/2 + f) on |f| <= 1/2 is a minimax fit good to 7e-10.
template <class Lanes>
FG_HD typename Lanes::U64 integer_exponential(typename Lanes::U64 word) {
    using F64 = typename Lanes::F64;
    using U64 = typename Lanes::U64;
    constexpr uint64_t kOne = 0x3FF0000000000000u, k2To52 = 0x4330000000000000u;  // the bits of 1 and 2^52
    const F64 u = Lanes::of_bits(Lanes::to_signed((word & 0xFFFFFFFFu) | k2To52)) - (0x1p52 - 1.0);
    const U64 bits = Lanes::to_unsigned(Lanes::bits(u));
    const F64 halvings = (0x1p52 + 1055.0) - Lanes::of_bits(Lanes::to_signed((bits >> 52) | k2To52));
    const F64 f = Lanes::of_bits(Lanes::to_signed((bits & 0xFFFFFFFFFFFFFu) | kOne)) - 1.5;
    const F64 y = f * f;
    F64 even = y * -0x1.3772cc8479d8dp-9 + -0x1.31d0b98853066p-8;
    F64 odd = y * 0x1.ebde13c991a78p-9 + 0x1.0a803b827fca9p-7;
    even = even * y + -0x1.e07be4ad932bbp-7;
    odd = odd * y + 0x1.afeeed4d7de73p-6;
    even = even * y + -0x1.9486a68fb42cfp-5;
    odd = odd * y + 0x1.9489d6e3046d5p-4;
    even = even * y + -0x1.c71c78d071d95p-3;
    odd = odd * y + 0x1.555555d3f3670p-1;
    even = even * y + 0x1.9f323ecfb3586p-2;
    const F64 ln = odd * f + even;
    const F64 shifted = (halvings * 0x1.62e42fefa39efp-1 - ln) * 0x1p26 + 0x1p52;
    return Lanes::to_unsigned(Lanes::bits(shifted)) - k2To52;
}

// Sorted uniforms are running sums of exponentials times `ratio`, at most `bound`.
struct Spacing {
    double ratio, bound;
};

// For uniforms below `total`. `exponentials` is the sum of one exponential more than there are uniforms.
FG_HD Spacing spacing_of(double total, int64_t exponentials) {
    return {total / static_cast<double>(exponentials > 1 ? exponentials : 1), total * (1.0 - 0x1p-53)};
}

template <class Lanes>
FG_HD typename Lanes::F64 sorted_uniform(typename Lanes::I64 sum, const Spacing& spacing) {
    return Lanes::smaller(Lanes::to_double(sum) * spacing.ratio, typename Lanes::F64{} + spacing.bound);
}

// The share of a prefix minus its whole copies: the bound that is compared with sorted uniforms below the number of
// remaining slots.
template <class Lanes>
FG_HD typename Lanes::F64 remainder_of(const Share<Lanes>& share, typename Lanes::I64 copies, double reciprocal) {
    using F64 = typename Lanes::F64;
    return Lanes::to_double(share.whole - copies) + Lanes::smaller(Lanes::to_double(share.rest) * reciprocal, F64{} + 1.0);
}

}  // namespace fastguide

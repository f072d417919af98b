// The dynamic threshold of a particle: exact order statistics of |x0|, without sorting.
#pragma once

#include "simd.h"

namespace fastguide::cpu {

// The bits of |v| as an integer. They have the same order as |v|. NaN is above all others, as in a sort.
FG_INLINE uint32_t magnitude(float v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    return bits & 0x7FFFFFFFu;
}
FG_INLINE uint64_t magnitude(double v) {
    uint64_t bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    return bits & 0x7FFFFFFFFFFFFFFFu;
}

constexpr int threshold_bits(uint64_t count) { return count < 1024 ? 5 : 11; }
// The number of counts that the threshold of `count` elements needs.
constexpr uint64_t counts_of_threshold(uint64_t count) { return uint64_t{1} << threshold_bits(count); }

// The `ratio` quantile of |x0|, interpolated between two order statistics and kept within [1, most]. `each(f)` calls
// f(x0) for each of the `count` elements. The lower order statistic is found digit by digit: each pass counts the next
// digit of the elements that have the digits found so far. Another thread may change x0 between two passes, so the
// search for a digit stops at the largest digit, whatever the counts are.
template <class R, class Each>
FG_INLINE R threshold(uint64_t* counts, uint64_t count, double ratio, double most, const Each& each) {
    using U = decltype(magnitude(R{}));
    const int bits = threshold_bits(count);
    const double rank = ratio * static_cast<double>(count - 1);
    const uint64_t low_rank = static_cast<uint64_t>(rank), high_rank = low_rank + 1 < count ? low_rank + 1 : low_rank;
    const double between = rank - static_cast<double>(low_rank);
    U low = 0;
    uint64_t below = 0, through = 0;
    for (int shift = (static_cast<int>(sizeof(U)) * 8 - 1) / bits * bits; shift >= 0; shift -= bits) {
        const U mask = (U{1} << bits) - 1;
        for (U i = 0; i <= mask; ++i) counts[i] = 0;
        each([&](R v) __attribute__((always_inline)) {
            const U digits = magnitude(v) >> shift;
            if (digits >> bits == low) ++counts[digits & mask];
        });
        U digit = 0;
        while (digit < mask && below + counts[digit] <= low_rank) below += counts[digit++];
        low = (low << bits) | digit;
        through = below + counts[digit];
    }
    U high = low;
    if (high_rank >= through) {
        high = ~U{0};
        each([&](R v) __attribute__((always_inline)) {
            const U key = magnitude(v);
            high = key > low && key < high ? key : high;
        });
    }
    R ends[2];
    __builtin_memcpy(&ends[0], &low, sizeof low);
    __builtin_memcpy(&ends[1], &high, sizeof high);
    const double from = static_cast<double>(ends[0]), to = static_cast<double>(ends[1]);
    // the formula of torch.lerp, in double
    const double quantile = between < 0.5 ? from + between * (to - from) : to - (to - from) * (1.0 - between);
    const double bound = quantile < 1.0 ? 1.0 : quantile;  // a NaN stays
    return static_cast<R>(bound > most ? most : bound);
}

}  // namespace fastguide::cpu

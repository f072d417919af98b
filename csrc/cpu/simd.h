// Vectors of one width for each instruction set, by the compiler's vector extensions. Intrinsics are used only for
// instructions that the extensions cannot express. Every operation is one IEEE operation in each lane, so all
// instruction sets give the same bits.
//
// All sources are compiled once for each instruction set, into one module each.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/config.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FG_INLINE inline __attribute__((always_inline))

namespace fastguide::cpu {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr const char* kInstructionSet = "avx512";
#elif defined(__AVX2__)
constexpr int kBytes = 32;
constexpr const char* kInstructionSet = "avx2";
#else
constexpr int kBytes = 16;
constexpr const char* kInstructionSet = "portable";
#endif
constexpr int kLanes32 = kBytes / 4;
constexpr int kLanes64 = kBytes / 8;

#define FG_VECTOR __attribute__((vector_size(kBytes)))
typedef float F32 FG_VECTOR;
typedef int32_t I32 FG_VECTOR;
typedef uint32_t U32 FG_VECTOR;
typedef double F64 FG_VECTOR;
typedef int64_t I64 FG_VECTOR;
typedef uint64_t U64 FG_VECTOR;
#undef FG_VECTOR
typedef float HalfF32 __attribute__((vector_size(kBytes / 2)));  // as many lanes as F64
typedef int32_t HalfI32 __attribute__((vector_size(kBytes / 2)));  // and as I64
typedef uint32_t HalfU32 __attribute__((vector_size(kBytes / 2)));
typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));  // as many lanes as F32

template <class T>
using Vector = std::conditional_t<std::is_same_v<T, float>, F32, F64>;
template <class T>
constexpr int kLanesOf = kBytes / static_cast<int>(sizeof(T));

template <class V, class T>
FG_INLINE V load(const T* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class T>
FG_INLINE void store(T* to, V v) {
    __builtin_memcpy(to, &v, sizeof v);
}

// Loads n lanes; the others are zero.
template <class V, class T>
FG_INLINE V load_some(const T* from, int n) {
    V v{};
    __builtin_memcpy(&v, from, static_cast<std::size_t>(n) * sizeof(T));
    return v;
}

template <class V, class T>
FG_INLINE void store_some(T* to, V v, int n) {
    __builtin_memcpy(to, &v, static_cast<std::size_t>(n) * sizeof(T));
}

// Keeps the first n lanes of v; the others become zero.
template <class V>
FG_INLINE V first_lanes(V v, int n) {
    decltype(v < v) left{};
    for (int lane = 0; lane < static_cast<int>(sizeof v / sizeof v[0]); ++lane) left[lane] = n - lane;
    return left > 0 ? v : V{};
}

FG_INLINE F32 splat(float x) { return x - F32{}; }
FG_INLINE F64 splat(double x) { return x - F64{}; }
FG_INLINE U32 splat(uint32_t x) { return x - U32{}; }
FG_INLINE I32 splat(int32_t x) { return x - I32{}; }
FG_INLINE U64 splat(uint64_t x) { return x - U64{}; }
FG_INLINE I64 splat(int64_t x) { return x - I64{}; }

template <class To, class From>
FG_INLINE To as(From v) {
    static_assert(sizeof(To) == sizeof(From), "a vector's bits as another");
    return (To)v;
}

// --- float32 ------------------------------------------------------------------------------------------------

// a * b + c rounded once. Without an FMA instruction the product is exact in double and the sum is rounded to odd in
// double; rounding that to float gives the correct result (Boldo and Melquiond 2008).
#if defined(__AVX512F__)
FG_INLINE F32 fused(F32 a, F32 b, F32 c) { return as<F32>(_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c)); }
#elif defined(__FMA__)
FG_INLINE F32 fused(F32 a, F32 b, F32 c) { return as<F32>(_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c)); }
#elif defined(__aarch64__)
FG_INLINE F32 fused(F32 a, F32 b, F32 c) { return as<F32>(vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b)); }
#else
FG_INLINE F64 sum_to_odd(F64 p, F64 c) {
    const F64 s = p + c;
    const F64 t = s - p;
    const F64 error = (p - (s - t)) + (c - t);
    const I64 negative = error < 0.0, positive = error > 0.0;
    // Round towards zero; then set the last bit if the sum was not exact.
    const I64 opposite = s < 0.0 ? positive : negative;
    return as<F64>((as<I64>(s) + opposite) | ((negative | positive) & 1));
}

FG_INLINE F32 fused(F32 a, F32 b, F32 c) {
#if defined(__x86_64__)
    const auto low = [](F32 v) { return (F64)_mm_cvtps_pd((__m128)v); };
    const auto high = [](F32 v) { return (F64)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v)); };
    return (F32)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)sum_to_odd(low(a) * low(b), low(c))),
                              _mm_cvtpd_ps((__m128d)sum_to_odd(high(a) * high(b), high(c))));
#else
    for (int i = 0; i < kLanes32; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
#endif
}
#endif

FG_INLINE F64 fused(F64 a, F64 b, F64 c) { return a * b + c; }  // two roundings, the same everywhere

FG_INLINE F32 square_root(F32 v) {
#if defined(__AVX512F__)
    return as<F32>(_mm512_sqrt_ps((__m512)v));
#elif defined(__AVX2__)
    return as<F32>(_mm256_sqrt_ps((__m256)v));
#elif defined(__x86_64__)
    return as<F32>(_mm_sqrt_ps((__m128)v));
#else
    for (int i = 0; i < kLanes32; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
#endif
}

// --- integers -----------------------------------------------------------------------------------------------

// The 64-bit product of the low words of each lane.
FG_INLINE U64 multiply_low_words(U64 a, U64 b) {
#if defined(__AVX512F__)
    return as<U64>(_mm512_mul_epu32((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
    return as<U64>(_mm256_mul_epu32((__m256i)a, (__m256i)b));
#elif defined(__x86_64__)
    return as<U64>(_mm_mul_epu32((__m128i)a, (__m128i)b));
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Words 2i of the result are those of `even`, words 2i + 1 the low words of `odd`.
FG_INLINE U32 join_low_words(U64 even, U64 odd) {
#if defined(__AVX512F__)
    return as<U32>(_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA));
#elif defined(__AVX2__)
    return as<U32>(_mm256_blend_epi32((__m256i)even, _mm256_shuffle_epi32((__m256i)odd, 0xA0), 0xAA));
#else
    return as<U32>((even & 0xFFFFFFFFu) | (odd << 32));
#endif
}

// In each 16 bytes, a0 a1 a2 a3 and b0 b1 b2 b3 become a0 b0 a1 b1 (low) and a2 b2 a3 b3 (high).
FG_INLINE F32 interleave_low(F32 a, F32 b) {
#if defined(__AVX512F__)
    return as<F32>(_mm512_unpacklo_ps((__m512)a, (__m512)b));
#elif defined(__AVX2__)
    return as<F32>(_mm256_unpacklo_ps((__m256)a, (__m256)b));
#else
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

FG_INLINE F32 interleave_high(F32 a, F32 b) {
#if defined(__AVX512F__)
    return as<F32>(_mm512_unpackhi_ps((__m512)a, (__m512)b));
#elif defined(__AVX2__)
    return as<F32>(_mm256_unpackhi_ps((__m256)a, (__m256)b));
#else
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Bit i says whether a > b in lane i.
FG_INLINE uint32_t lanes_above(I32 a, I32 b) {
#if defined(__AVX512F__)
    uint32_t mask;
    // In assembly, because GCC 12, when short of registers, stores the 16 bits and reads back 32. The read then waits for
    // the store.
    __asm__("kmovw %1, %0" : "=r"(mask) : "k"(_mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b)));
    return mask;
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(a > b)));
#elif defined(__x86_64__)
    return static_cast<uint32_t>(_mm_movemask_ps((__m128)(a > b)));
#else
    uint32_t mask = 0;
    for (int i = 0; i < kLanes32; ++i) mask |= static_cast<uint32_t>(a[i] > b[i]) << i;
    return mask;
#endif
}

// a * b modulo 2^64 for b below 2^32.
FG_INLINE U64 multiply_by_word(U64 a, U64 b) {
#if defined(__AVX512DQ__)
    return a * b;
#else
    return multiply_low_words(a, b) + (multiply_low_words(a >> 32, b) << 32);
#endif
}

// prefix_sums: inclusive prefix sums of the lanes. last_lane: the last lane copied to all lanes.
#if defined(__AVX512F__)
FG_INLINE I64 prefix_sums(I64 v) {
    const __m512i zero{};
    v += as<I64>(_mm512_alignr_epi64((__m512i)v, zero, 7));
    v += as<I64>(_mm512_alignr_epi64((__m512i)v, zero, 6));
    return v + as<I64>(_mm512_alignr_epi64((__m512i)v, zero, 4));
}
FG_INLINE I64 last_lane(I64 v) { return as<I64>(_mm512_permutexvar_epi64(_mm512_set1_epi64(7), (__m512i)v)); }
#elif defined(__AVX2__)
FG_INLINE I64 prefix_sums(I64 v) {
    v += as<I64>(_mm256_slli_si256((__m256i)v, 8));  // in each half
    const __m256i low = _mm256_permute4x64_epi64((__m256i)v, 0x50);
    return v + as<I64>(_mm256_blend_epi32(__m256i{}, low, 0xF0));
}
FG_INLINE I64 last_lane(I64 v) { return as<I64>(_mm256_permute4x64_epi64((__m256i)v, 0xFF)); }
#else
FG_INLINE I64 prefix_sums(I64 v) { return v + __builtin_shufflevector(I64{}, v, 1, 2); }
FG_INLINE I64 last_lane(I64 v) { return __builtin_shufflevector(v, v, 1, 1); }
#endif

// The operations that common/math.h needs, in all lanes.
struct VectorLanes {
    using F32 = cpu::F32;
    using I32 = cpu::I32;
    using U32 = cpu::U32;

    template <class V>
    static FG_INLINE V select(I32 condition, V a, V b) {
        return condition ? a : b;
    }
    static FG_INLINE F32 to_float(I32 i) { return __builtin_convertvector(i, F32); }
    static FG_INLINE I32 to_signed(U32 w) { return as<I32>(w); }
    static FG_INLINE U32 to_unsigned(I32 i) { return as<U32>(i); }
    static FG_INLINE U32 bits(F32 x) { return as<U32>(x); }
    static FG_INLINE F32 of_bits(U32 w) { return as<F32>(w); }
    static FG_INLINE F32 fused(F32 a, F32 b, F32 c) { return cpu::fused(a, b, c); }
    static FG_INLINE F32 square_root(F32 x) { return cpu::square_root(x); }
};

// --- float64 ------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)  // GCC would convert the two halves separately
FG_INLINE F64 widen(HalfF32 v) { return as<F64>(_mm512_cvtps_pd((__m256)v)); }
FG_INLINE I64 widen(HalfU32 v) { return as<I64>(_mm512_cvtepu32_epi64((__m256i)v)); }
FG_INLINE HalfI32 narrow(I64 v) { return as<HalfI32>(_mm512_cvtepi64_epi32((__m512i)v)); }
#elif defined(__AVX2__)
FG_INLINE F64 widen(HalfF32 v) { return as<F64>(_mm256_cvtps_pd((__m128)v)); }
FG_INLINE I64 widen(HalfU32 v) { return as<I64>(_mm256_cvtepu32_epi64((__m128i)v)); }
FG_INLINE HalfI32 narrow(I64 v) {
    const __m256i even = _mm256_permutevar8x32_epi32((__m256i)v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    return as<HalfI32>(_mm256_castsi256_si128(even));
}
#elif defined(__x86_64__)
FG_INLINE F64 widen(HalfF32 v) { return (F64)_mm_cvtps_pd((__m128)_mm_cvtsi64_si128((long long)v)); }
FG_INLINE I64 widen(HalfU32 v) { return (I64)_mm_unpacklo_epi32(_mm_cvtsi64_si128((long long)v), __m128i{}); }
FG_INLINE HalfI32 narrow(I64 v) { return (HalfI32)_mm_cvtsi128_si64(_mm_shuffle_epi32((__m128i)v, 0x88)); }
#else
FG_INLINE F64 widen(HalfF32 v) { return __builtin_convertvector(v, F64); }
FG_INLINE I64 widen(HalfU32 v) { return __builtin_convertvector(v, I64); }
FG_INLINE HalfI32 narrow(I64 v) { return __builtin_convertvector(v, HalfI32); }
#endif

// Loads values as doubles.
FG_INLINE F64 load_wide(const float* from) { return widen(load<HalfF32>(from)); }
FG_INLINE F64 load_wide(const double* from) { return load<F64>(from); }
FG_INLINE F64 load_wide_some(const float* from, int n) { return widen(load_some<HalfF32>(from, n)); }
FG_INLINE F64 load_wide_some(const double* from, int n) { return load_some<F64>(from, n); }

// The smaller and the larger value in each lane. The result is b if a or b is NaN.
#if defined(__AVX512F__)
FG_INLINE F64 smaller(F64 a, F64 b) { return as<F64>(_mm512_min_pd((__m512d)a, (__m512d)b)); }
FG_INLINE F64 larger(F64 a, F64 b) { return as<F64>(_mm512_max_pd((__m512d)a, (__m512d)b)); }
FG_INLINE F32 smaller(F32 a, F32 b) { return as<F32>(_mm512_min_ps((__m512)a, (__m512)b)); }
FG_INLINE F32 larger(F32 a, F32 b) { return as<F32>(_mm512_max_ps((__m512)a, (__m512)b)); }
#elif defined(__AVX2__)
FG_INLINE F64 smaller(F64 a, F64 b) { return as<F64>(_mm256_min_pd((__m256d)a, (__m256d)b)); }
FG_INLINE F64 larger(F64 a, F64 b) { return as<F64>(_mm256_max_pd((__m256d)a, (__m256d)b)); }
FG_INLINE F32 smaller(F32 a, F32 b) { return as<F32>(_mm256_min_ps((__m256)a, (__m256)b)); }
FG_INLINE F32 larger(F32 a, F32 b) { return as<F32>(_mm256_max_ps((__m256)a, (__m256)b)); }
#elif defined(__x86_64__)
FG_INLINE F64 smaller(F64 a, F64 b) { return as<F64>(_mm_min_pd((__m128d)a, (__m128d)b)); }
FG_INLINE F64 larger(F64 a, F64 b) { return as<F64>(_mm_max_pd((__m128d)a, (__m128d)b)); }
FG_INLINE F32 smaller(F32 a, F32 b) { return as<F32>(_mm_min_ps((__m128)a, (__m128)b)); }
FG_INLINE F32 larger(F32 a, F32 b) { return as<F32>(_mm_max_ps((__m128)a, (__m128)b)); }
#else
FG_INLINE F64 smaller(F64 a, F64 b) { return a < b ? a : b; }
FG_INLINE F64 larger(F64 a, F64 b) { return a > b ? a : b; }
FG_INLINE F32 smaller(F32 a, F32 b) { return a < b ? a : b; }
FG_INLINE F32 larger(F32 a, F32 b) { return a > b ? a : b; }
#endif

// How many bounds are compared with a value at a time: at most four.
constexpr int kBounds = kLanes64 < 4 ? kLanes64 : 4;
typedef double Bounds __attribute__((vector_size(8 * kBounds)));
typedef int64_t Counts __attribute__((vector_size(8 * kBounds)));
typedef int32_t NarrowCounts __attribute__((vector_size(4 * kBounds)));

// Adds one to the lanes where value < bounds.
FG_INLINE void count_below(Counts& counts, double value, Bounds bounds) {
#if defined(__AVX2__)  // with AVX-512 GCC would compare into a mask register
    counts -= (Counts)_mm256_cmp_pd(_mm256_set1_pd(value), (__m256d)bounds, _CMP_LT_OQ);
#else
    counts -= (value - Bounds{}) < bounds;
#endif
}

// Rounds to nearest. v must be in [0, 2^63).
FG_INLINE F64 to_double(I64 v) {
#if defined(__AVX512DQ__) || !defined(__x86_64__)
    return __builtin_convertvector(v, F64);
#else  // high * 2^32 is exact; adding the low word rounds once
    const F64 low = as<F64>((v & 0xFFFFFFFF) | 0x4330000000000000) - 0x1p52;
    const F64 high = as<F64>((v >> 32) | 0x4530000000000000) - 0x1p84;
    return high + low;
#endif
}

// The nearest integers, ties to even, for 0 <= v <= 2^62. For other v the result may be any integer.
FG_INLINE I64 nearest(F64 v) {
#if defined(__AVX512DQ__)
    return as<I64>(_mm512_cvtpd_epi64((__m512d)v));
#else  // v = multiples of 2^32 + an exact rest; adding 1.5 2^52 rounds the rest, as the sum has no bits for a fraction
    const F64 high = v * 0x1p-32 + 0x1p52;
    const F64 rest = (v - (high - 0x1p52) * 0x1p32) + 0x1.8p52;
    return as<I64>((as<U64>(high) << 32) + (as<U64>(rest) - as<U64>(splat(0x1.8p52))));
#endif
}

// The operations that common/weights.h needs, in all lanes.
struct WideLanes {
    using F64 = cpu::F64;
    using I64 = cpu::I64;
    using U64 = cpu::U64;

    static FG_INLINE I64 bits(F64 v) { return as<I64>(v); }
    static FG_INLINE F64 of_bits(I64 v) { return as<F64>(v); }
    static FG_INLINE U64 to_unsigned(I64 v) { return as<U64>(v); }
    static FG_INLINE I64 to_signed(U64 v) { return as<I64>(v); }
    static FG_INLINE F64 to_double(I64 v) { return cpu::to_double(v); }
    static FG_INLINE I64 nearest(F64 v) { return cpu::nearest(v); }
    static FG_INLINE U64 multiply_low_words(U64 a, U64 b) { return cpu::multiply_low_words(a, b); }
    static FG_INLINE U64 multiply_by_word(U64 a, U64 b) { return cpu::multiply_by_word(a, b); }
    static FG_INLINE I64 one_if(I64 condition) { return -condition; }
    static FG_INLINE F64 smaller(F64 a, F64 b) { return cpu::smaller(a, b); }
    static FG_INLINE F64 larger(F64 a, F64 b) { return cpu::larger(a, b); }
};

FG_INLINE F64 square_root(F64 v) {
#if defined(__AVX512F__)
    return as<F64>(_mm512_sqrt_pd((__m512d)v));
#elif defined(__AVX2__)
    return as<F64>(_mm256_sqrt_pd((__m256d)v));
#elif defined(__x86_64__)
    return as<F64>(_mm_sqrt_pd((__m128d)v));
#else
    for (int i = 0; i < kLanes64; ++i) v[i] = __builtin_sqrt(v[i]);
    return v;
#endif
}

// The operations that common/log.h needs, in all lanes.
struct VectorLanes64 {
    using F64 = cpu::F64;
    using U64 = cpu::U64;

    template <class V>
    static FG_INLINE V select(I64 condition, V a, V b) {
        return condition ? a : b;
    }
    static FG_INLINE U64 bits(F64 x) { return as<U64>(x); }
    static FG_INLINE F64 of_bits(U64 w) { return as<F64>(w); }
};

// --- float16 and bfloat16 -----------------------------------------------------------------------------------

#if defined(__AVX512F__)
FG_INLINE F32 from_half(U16 h) { return as<F32>(_mm512_cvtph_ps((__m256i)h)); }
FG_INLINE U16 to_half(F32 v) { return as<U16>(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
#elif defined(__F16C__)
FG_INLINE F32 from_half(U16 h) { return as<F32>(_mm256_cvtph_ps((__m128i)h)); }
FG_INLINE U16 to_half(F32 v) { return as<U16>(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
FG_INLINE F32 from_half(U16 h) {
    const U32 bits = __builtin_convertvector(h, U32);
    const U32 sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7FFFu) << 13;
    // As a float32 (bias 127 instead of 15) the bits mean 2^-112 times the value. The product is right for subnormals too.
    const F32 finite = as<F32>(magnitude) * 0x1p112f;
    const U32 special = magnitude | 0x7F800000u;
    return as<F32>(((magnitude >= 0x0F800000u) ? special : as<U32>(finite)) | sign);
}
FG_INLINE U16 to_half(F32 v) {  // as in common/dtype.h
    const U32 bits = as<U32>(v);
    const U32 sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const U32 normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - ((127u - 15u) << 23)) >> 13;
    const U32 subnormal = as<U32>(as<F32>(magnitude) + 0.5f) - 0x3F000000u;
    const U32 finite = magnitude < 0x38800000u ? subnormal : normal;
    const U32 special = magnitude > 0x7F800000u ? splat(0x7E00u) : splat(0x7C00u);
    return __builtin_convertvector(sign | (magnitude >= 0x477FF000u ? special : finite), U16);
}
#endif

FG_INLINE F32 from_bfloat16(U16 h) { return as<F32>(__builtin_convertvector(h, U32) << 16); }
FG_INLINE U16 to_bfloat16(F32 v) {
    const U32 bits = as<U32>(v);
    const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded, U16);
}

// --- past the caches ----------------------------------------------------------------------------------------

// Writes past the caches; `to` must be aligned to kBytes. An ordinary store first reads the line into the cache, which is
// wasted for a large result that nobody reads soon.
FG_INLINE void stream(float* to, F32 v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)v);
#elif defined(__x86_64__)
    _mm_stream_ps(to, (__m128)v);
#else
    store(to, v);
#endif
}

FG_INLINE void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace fastguide::cpu

// Two vectors that go through the same operations, or two such pairs. These are independent chains of instructions, so
// each hides the latency of the other. With one vector at a time, resampling 1e6 particles takes 1.9 times as long.
#pragma once

#include "simd.h"

namespace fastguide::cpu {

template <class V>
struct ScalarOf {
    using Type = std::remove_reference_t<decltype(V{}[0])>;
};

template <class V>
struct Twin {
    V a, b;
};

template <class V>
struct ScalarOf<Twin<V>> : ScalarOf<V> {};

template <class V>
using Four = Twin<Twin<V>>;
template <class V>
using Eight = Twin<Four<V>>;

#define FG_TWIN(op)                                                                                                 \
    template <class V>                                                                                              \
    FG_INLINE Twin<V> operator op(const Twin<V>& x, const Twin<V>& y) {                                             \
        return {x.a op y.a, x.b op y.b};                                                                            \
    }                                                                                                               \
    template <class V>                                                                                              \
    FG_INLINE Twin<V> operator op(const Twin<V>& x, typename ScalarOf<V>::Type y) {                                 \
        return {x.a op y, x.b op y};                                                                                \
    }                                                                                                               \
    template <class V>                                                                                              \
    FG_INLINE Twin<V> operator op(typename ScalarOf<V>::Type x, const Twin<V>& y) {                                 \
        return {x op y.a, x op y.b};                                                                                \
    }
FG_TWIN(+)
FG_TWIN(-)
FG_TWIN(*)
FG_TWIN(&)
FG_TWIN(|)
FG_TWIN(^)
FG_TWIN(<<)
FG_TWIN(>>)
FG_TWIN(<)  // the comparisons are for integers only
FG_TWIN(<=)
FG_TWIN(>)
#undef FG_TWIN

template <class V>
FG_INLINE Twin<V> operator-(const Twin<V>& x) {
    return {-x.a, -x.b};
}

template <class V>
FG_INLINE Twin<V> multiply_low_words(U64 x, const Twin<V>& y) {
    return {multiply_low_words(x, y.a), multiply_low_words(x, y.b)};
}

// The operations that common/weights.h needs, for twins of the types of `Lanes`.
template <class Lanes>
struct TwinLanes {
    using F64 = Twin<typename Lanes::F64>;
    using I64 = Twin<typename Lanes::I64>;
    using U64 = Twin<typename Lanes::U64>;

    static FG_INLINE I64 bits(const F64& v) { return {Lanes::bits(v.a), Lanes::bits(v.b)}; }
    static FG_INLINE F64 of_bits(const I64& v) { return {Lanes::of_bits(v.a), Lanes::of_bits(v.b)}; }
    static FG_INLINE U64 to_unsigned(const I64& v) { return {Lanes::to_unsigned(v.a), Lanes::to_unsigned(v.b)}; }
    static FG_INLINE I64 to_signed(const U64& v) { return {Lanes::to_signed(v.a), Lanes::to_signed(v.b)}; }
    static FG_INLINE F64 to_double(const I64& v) { return {Lanes::to_double(v.a), Lanes::to_double(v.b)}; }
    static FG_INLINE I64 nearest(const F64& v) { return {Lanes::nearest(v.a), Lanes::nearest(v.b)}; }
    static FG_INLINE U64 multiply_low_words(const U64& x, const U64& y) {
        return {Lanes::multiply_low_words(x.a, y.a), Lanes::multiply_low_words(x.b, y.b)};
    }
    static FG_INLINE U64 multiply_by_word(const U64& x, const U64& y) {
        return {Lanes::multiply_by_word(x.a, y.a), Lanes::multiply_by_word(x.b, y.b)};
    }
    static FG_INLINE I64 one_if(const I64& condition) { return -condition; }
    static FG_INLINE F64 smaller(const F64& x, const F64& y) {
        return {Lanes::smaller(x.a, y.a), Lanes::smaller(x.b, y.b)};
    }
    static FG_INLINE F64 larger(const F64& x, const F64& y) { return {Lanes::larger(x.a, y.a), Lanes::larger(x.b, y.b)}; }
};

using FourLanes = TwinLanes<TwinLanes<WideLanes>>;
using EightLanes = TwinLanes<FourLanes>;

template <class T, class V>
FG_INLINE void store(T* to, const Twin<V>& v) {
    store(to, v.a);
    store(to + sizeof(V) / sizeof(T), v.b);
}

// The sum of all the vectors.
template <class V>
FG_INLINE V sum_of(V v) {
    return v;
}
template <class V>
FG_INLINE auto sum_of(const Twin<V>& v) {
    return sum_of(v.a) + sum_of(v.b);
}

// The bitwise OR of all the vectors.
template <class V>
FG_INLINE V any_of(V v) {
    return v;
}
template <class V>
FG_INLINE auto any_of(const Twin<V>& v) {
    return any_of(v.a) | any_of(v.b);
}

}  // namespace fastguide::cpu

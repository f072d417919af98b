// The 32-bit Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), many words at a time, on the state of numpy's or
// numba's generator.
#include "../../common/binding.h"
#include "../../cpu/simd.h"

namespace fastguide::cpu {
namespace {

constexpr int kWords = 624, kMiddle = 397;

FG_INLINE uint32_t twisted(uint32_t first, uint32_t next, uint32_t middle) {
    const uint32_t joined = (first & 0x80000000u) | (next & 0x7FFFFFFFu);
    return middle ^ (joined >> 1) ^ (-(joined & 1u) & 0x9908B0DFu);
}

// Each new word depends on words that are still old, or were replaced at least a vector's length before. So the compiler
// may vectorise.
void twist(uint32_t* key) {
    for (int i = 0; i < kWords - kMiddle; ++i) key[i] = twisted(key[i], key[i + 1], key[i + kMiddle]);
    for (int i = kWords - kMiddle; i < kWords - 1; ++i) key[i] = twisted(key[i], key[i + 1], key[i + kMiddle - kWords]);
    key[kWords - 1] = twisted(key[kWords - 1], key[0], key[kMiddle - 1]);
}

template <class Word>
FG_INLINE Word tempered(Word word) {
    word ^= word >> 11;
    word ^= (word << 7) & 0x9D2C5680u;
    word ^= (word << 15) & 0xEFC60000u;
    return word ^ (word >> 18);
}

// Doubles of 53 bits: 27 from the low word of each pair, 26 from the high word, times 2^-53.
FG_INLINE F64 doubles(const uint32_t* words) {
    const U64 pair = as<U64>(tempered(load<U32>(words)));
    return to_double(as<I64>((((pair & 0xFFFFFFFFu) >> 5) << 26) | (pair >> 38))) * 0x1p-53;
}

// Uniforms in [0, 1), made from the words of MT19937 as numpy makes them. Advances key[624] and the position.
void mersenne_doubles(uint32_t* key, int32_t* position, double* out, uint64_t count) {
    int32_t at = __atomic_load_n(position, __ATOMIC_RELAXED);  // read once: another thread may set it meanwhile
    at = at < 0 || at > kWords ? kWords : at;
    uint32_t halves[2 * kLanes64] = {};
    uint64_t half = 0;  // how many words of a pair were kept from before the last twist
    for (uint64_t done = 0; done < count;) {
        if (at == kWords) {
            twist(key);
            at = 0;
        }
        if (half || at + 1 == kWords) {
            halves[half++] = key[at++];
            if (half == 2) {
                out[done++] = doubles(halves)[0];
                half = 0;
            }
            continue;
        }
        const uint64_t whole = static_cast<uint64_t>(kWords - at) / 2, left = count - done;
        const uint64_t pairs = whole < left ? whole : left;
        const uint32_t* words = key + at;
        uint64_t i = 0;
        for (; i + kLanes64 <= pairs; i += kLanes64) store(out + done + i, doubles(words + 2 * i));
        if (i < pairs) {
            const int rest = static_cast<int>(pairs - i);
            uint32_t last[2 * kLanes64] = {};
            __builtin_memcpy(last, words + 2 * i, 8 * static_cast<std::size_t>(rest));
            store_some(out + done + i, doubles(last), rest);
        }
        done += pairs;
        at += static_cast<int32_t>(2 * pairs);
    }
    *position = at;
}

// key, position, out, count
PyObject* call_mersenne_doubles(Arguments& in) {
    const auto key = in.pointer<uint32_t>("key");
    const auto position = in.pointer<int32_t>("position");
    const auto out = in.pointer<double>("out");
    const uint64_t count = in.integer();
    without_gil([&] { mersenne_doubles(key, position, out, count); });
    return none();
}

Binding binding{"mersenne_doubles", fastcall<call_mersenne_doubles, 4>,
                "Uniforms of the MT19937 whose key [624] and position stand there, and move on."};

}  // namespace
}  // namespace fastguide::cpu

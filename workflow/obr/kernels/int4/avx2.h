// AVX2: sixteen columns at a time are put in their places by a shuffle that their mask looks up.

#pragma once
#include <immintrin.h>

#include <array>

#include "layout.h"

constexpr int TOKENS_AT_ONCE = 2, ROWS_AT_ONCE = 2, FUSED_TOKENS = 1;

struct Vector {
    __m256i a, b;
};
using Inputs = Vector;
struct Sum {
    __m256i v;
};
inline Sum nothing() { return {_mm256_setzero_si256()}; }

inline Vector load(const int8_t* from) {
    return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 32))};
}
inline Inputs load_inputs(const uint8_t* from) { return load((const int8_t*)from); }
inline void store(int8_t* to, const Vector& w) {
    _mm256_storeu_si256((__m256i*)to, w.a);
    _mm256_storeu_si256((__m256i*)(to + 32), w.b);
}

// Of codes in [-8, 7] and inputs in [0, 255] two products fit into 16 bits, and so do their sums of four.
inline void add_products(Sum& sum, const Inputs& x, const Vector& w) {
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(x.a, w.a), _mm256_maddubs_epi16(x.b, w.b));
    sum.v = _mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline int32_t total(const Sum& sum) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum.v), _mm256_extracti128_si256(sum.v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <Format F>
struct Masks {
    const uint16_t* table;
    explicit Masks(const uint16_t* of_numbers) : table(of_numbers) {}

    void read(const uint8_t* head, uint64_t* masks) const {
        if constexpr (F == BITMASK)
            std::memcpy(masks, head, ROWS * 8);
        else if constexpr (F != DENSE)
            look_up_masks<F>(head, table, masks);
    }
};

// Eight columns' mask -> where each takes its code from; 0x80, which shuffles in a zero, where it is pruned.
constexpr std::array<uint64_t, 256> PLACES = [] {
    std::array<uint64_t, 256> places{};
    for (int mask = 0; mask < 256; ++mask)
        for (int i = 0, next = 0; i < 8; ++i) places[mask] |= uint64_t(mask >> i & 1 ? next++ : 0x80) << (8 * i);
    return places;
}();

template <int SHIFT>
inline __m128i nibbles(__m128i bytes) {
    const __m128i eight = _mm_set1_epi8(8);
    const __m128i codes = _mm_and_si128(_mm_srli_epi16(bytes, SHIFT), _mm_set1_epi8(15));
    return _mm_sub_epi8(_mm_xor_si128(codes, eight), eight);
}

template <int SHIFT>
inline __m128i read_sixteen(const uint8_t*& codes, uint32_t mask) {
    const uint32_t low = mask & 255, high = mask >> 8 & 255;
    const uint64_t before = uint64_t(__builtin_popcount(low)) * 0x0101010101010101ull;
    const __m128i places = _mm_set_epi64x(int64_t(PLACES[high] + before), int64_t(PLACES[low]));
    const __m128i found = nibbles<SHIFT>(_mm_loadu_si128((const __m128i*)codes));
    codes += __builtin_popcount(mask & 0xffff);
    return _mm_shuffle_epi8(found, places);
}

template <int SHIFT>
inline Vector read_row(const uint8_t*& codes, uint64_t mask) {
    const __m128i a = read_sixteen<SHIFT>(codes, uint32_t(mask));
    const __m128i b = read_sixteen<SHIFT>(codes, uint32_t(mask >> 16));
    const __m128i c = read_sixteen<SHIFT>(codes, uint32_t(mask >> 32));
    const __m128i d = read_sixteen<SHIFT>(codes, uint32_t(mask >> 48));
    return {_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
}

template <int SHIFT>
inline __m256i nibbles(__m256i bytes) {
    const __m256i eight = _mm256_set1_epi8(8);
    const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(bytes, SHIFT), _mm256_set1_epi8(15));
    return _mm256_sub_epi8(_mm256_xor_si256(codes, eight), eight);
}

template <Format F>
inline void read_pair(const uint8_t*& low, const uint8_t*& high, const uint64_t* masks, Vector& a, Vector& b) {
    if constexpr (F == DENSE) {
        const Vector both = load((const int8_t*)low);
        a = {nibbles<0>(both.a), nibbles<0>(both.b)};
        b = {nibbles<4>(both.a), nibbles<4>(both.b)};
        low += WIDTH;
        high += WIDTH;
    } else {
        a = read_row<0>(low, masks[0]);
        b = read_row<4>(high, masks[1]);
    }
}

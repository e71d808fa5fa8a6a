// AVX-512 with VBMI2 and VNNI: one instruction puts the codes of 64 columns in their places, one multiplies and adds.
// A code stays in the upper half of its byte, sixteen times too large: what is left to do on the way is a mask.

#pragma once
#include <immintrin.h>

#include "layout.h"

constexpr int TOKENS_AT_ONCE = 4, ROWS_AT_ONCE = 4, FUSED_TOKENS = 3;

using Vector = __m512i;
using Inputs = __m512i;
struct Sum {
    __m512i v;
};
inline Sum nothing() { return {_mm512_setzero_si512()}; }

inline Vector load(const int8_t* from) { return _mm512_loadu_si512(from); }
inline Inputs load_inputs(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline void store(int8_t* to, Vector w) { _mm512_storeu_si512(to, w); }
// As _mm512_dpbusd_epi32, around which GCC 12 copies the sum twice.
inline void add_products(Sum& sum, Inputs x, Vector w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(x), "v"(w));
}
inline int32_t total(const Sum& sum) { return _mm512_reduce_add_epi32(_mm512_srai_epi32(sum.v, 4)); }

// Shift and mask, not one product of bits (gf2p8affineqb): expanding and multiplying need the unit that would do it.
inline Vector low_codes(__m512i bytes) {
    return _mm512_and_si512(_mm512_slli_epi16(bytes, 4), _mm512_set1_epi8(char(0xf0)));
}
inline Vector high_codes(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(char(0xf0))); }

// A mask that is also counted is loaded once, as a number: out of a mask register it comes slowly.
inline uint64_t in_register(uint64_t mask) {
    __asm__("" : "+r"(mask));
    return mask;
}

// Masks of a group from the numbers of eight columns each: spread to a number a byte, looked up in registers.
template <Format F>
struct Masks {
    static constexpr int BITS = field_bits(F);
    __m512i places, shifts, words[2];

    explicit Masks(const uint16_t* table) {
        if constexpr (BITS == 0) return;
        alignas(64) uint8_t place[64], shift[64], word[128];
        for (int i = 0; i < 64; ++i) {
            place[i] = uint8_t(i / 8 * BITS + i % 8);  // a row's numbers take BITS bytes
            shift[i] = uint8_t(i % 8 * BITS);
        }
        for (int i = 0; i < 128; ++i) word[i] = uint8_t(table[i & ((1 << BITS) - 1)]);
        places = _mm512_load_si512(place);
        shifts = _mm512_load_si512(shift);
        words[0] = _mm512_load_si512(word);
        words[1] = _mm512_load_si512(word + 64);
    }

    void read(const uint8_t* head, uint64_t* masks) const {
        if constexpr (F == BITMASK)
            std::memcpy(masks, head, ROWS * 8);
        else if constexpr (F != DENSE) {
            const __m512i rows = _mm512_permutexvar_epi8(places, _mm512_loadu_si512(head));
            const __m512i numbers = _mm512_multishift_epi64_epi8(shifts, rows);
            const __m512i found = BITS == 7 ? _mm512_permutex2var_epi8(words[0], numbers, words[1])
                                            : _mm512_permutexvar_epi8(numbers, words[0]);
            _mm512_storeu_si512(masks, found);
        }
    }
};

template <Format F>
inline void read_pair(const uint8_t*& low, const uint8_t*& high, const uint64_t* masks, Vector& a, Vector& b) {
    if constexpr (F == BITMASK) {
        const uint64_t first = in_register(masks[0]), second = in_register(masks[1]);
        a = _mm512_maskz_expand_epi8(first, low_codes(_mm512_loadu_si512(low)));
        b = _mm512_maskz_expand_epi8(second, high_codes(_mm512_loadu_si512(high)));
        low += _mm_popcnt_u64(first);
        high += _mm_popcnt_u64(second);
    } else if constexpr (F == DENSE) {
        const __m512i both = _mm512_loadu_si512(low);
        a = low_codes(both);
        b = high_codes(both);
        low += WIDTH;
    } else {
        const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)low));
        a = _mm512_maskz_expand_epi8(masks[0], low_codes(both));
        b = _mm512_maskz_expand_epi8(masks[1], high_codes(both));
        low += WIDTH / 2;
    }
}

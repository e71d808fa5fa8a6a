// Any processor: plain loops over the 64 columns of a group.

#pragma once
#include "layout.h"

constexpr int TOKENS_AT_ONCE = 2, ROWS_AT_ONCE = 2, FUSED_TOKENS = 1;

struct Vector {
    int8_t v[WIDTH];
};
struct Inputs {
    const uint8_t* v;
};
struct Sum {
    int32_t v;
};
inline Sum nothing() { return {0}; }

inline Inputs load_inputs(const uint8_t* from) { return {from}; }

inline void add_products(Sum& sum, const Inputs& x, const Vector& w) {
    int32_t s = 0;
    for (int i = 0; i < WIDTH; ++i) s += int32_t(x.v[i]) * w.v[i];
    sum.v += s;
}

inline int32_t total(const Sum& sum) { return sum.v; }
inline void store(int8_t* to, const Vector& w) { std::memcpy(to, w.v, WIDTH); }
inline Vector load(const int8_t* from) {
    Vector w;
    std::memcpy(w.v, from, WIDTH);
    return w;
}

template <Format F>
struct Masks {
    const uint16_t* table;
    explicit Masks(const uint16_t* of_numbers) : table(of_numbers) {}

    void read(const uint8_t* head, uint64_t* masks) const {
        if constexpr (F == DENSE)
            std::memset(masks, 255, ROWS * 8);
        else if constexpr (F == BITMASK)
            std::memcpy(masks, head, ROWS * 8);
        else
            look_up_masks<F>(head, table, masks);
    }
};

inline const uint8_t* read_row(const uint8_t* codes, int shift, uint64_t mask, Vector& w) {
    for (int i = 0; i < WIDTH; ++i) {
        const bool kept = mask >> i & 1;
        w.v[i] = kept ? int8_t(((*codes >> shift & 15) ^ 8) - 8) : 0;
        codes += kept;
    }
    return codes;
}

template <Format F>
inline void read_pair(const uint8_t*& low, const uint8_t*& high, const uint64_t* masks, Vector& a, Vector& b) {
    low = read_row(low, 0, masks[0], a);
    high = read_row(high, 4, masks[1], b);
}

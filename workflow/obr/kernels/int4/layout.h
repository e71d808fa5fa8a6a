// How a matrix of 4-bit codes lies in memory, dense or pruned; int4/__init__.py sizes it, pack() fills it.
//
// Eight rows make a block, 64 columns a group; with zeros, widths are filled up to whole groups, rows to whole blocks.
// A block is the masks of its groups, one group after the other, and behind them four streams of codes, one for every
// two rows: the kept codes of the first row are the low halves of the bytes, those of the second the high halves,
// each in the order of the columns. What the two rows are ahead of each other is the only waste.

#pragma once
#include <cstdint>
#include <cstring>

constexpr int ROWS = 8, PAIRS = ROWS / 2, WIDTH = 64;

enum Format : int32_t { DENSE, BITMASK, TWO_FOUR, FOUR_EIGHT, PAIRED };

// Bits of the number that stands for the mask of eight columns; sixteen columns have a number of twice as many.
constexpr int field_bits(Format f) {
    return f == TWO_FOUR ? 6 : f == FOUR_EIGHT ? 7 : f == PAIRED ? 3 : 0;
}

// Bytes of the masks of one group, eight rows.
constexpr int64_t head_bytes(Format f) { return f == BITMASK ? ROWS * 8 : ROWS * field_bits(f); }

// Bytes of the codes of two rows in one group, where that does not depend on the mask.
constexpr int64_t code_bytes(Format f) { return f == DENSE ? WIDTH : f == BITMASK ? 0 : WIDTH / 2; }

struct Weight {
    int64_t format, rows, groups;  // rows: as many as the output has
    const uint8_t* data;
    const int64_t* starts;   // (blocks, 1 + PAIRS): of each block its masks and its four streams, in bytes
    const int32_t* order;    // (blocks * ROWS): the row of the output that this one is; -1 for filling
    const int32_t* sums;     // (blocks * ROWS): of a row's codes
    const float* scales;     // (blocks * ROWS)
    const uint16_t* masks;   // number -> mask of sixteen columns, for formats with numbers
};

inline uint64_t load64(const uint8_t* from) {
    uint64_t word;
    std::memcpy(&word, from, 8);
    return word;
}

// The masks of a group by looking up sixteen columns at a time.
template <Format F>
inline void look_up_masks(const uint8_t* head, const uint16_t* table, uint64_t* masks) {
    constexpr int bits = 2 * field_bits(F);
    for (int row = 0; row < ROWS; ++row) {
        const uint64_t word = load64(head + row * field_bits(F));
        uint64_t mask = 0;
        for (int i = 0; i < 4; ++i) mask |= uint64_t(table[word >> (i * bits) & ((1u << bits) - 1)]) << (16 * i);
        masks[row] = mask;
    }
}

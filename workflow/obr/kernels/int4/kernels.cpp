// Products of 4-bit weights, dense or pruned, with 8-bit inputs: exact integers, then scales. Plain C ABI.
// Compiled once for each level of vector instructions; int4/__init__.py builds, chooses and calls it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "layout.h"
#include "pool.h"
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#include "portable.h"
#endif

namespace {

// tokens inputs of 8 bits: value (q - zero) * scale. Each row is `stride` long, a whole number of groups.
struct Tokens {
    int64_t count, stride;
    const uint8_t* q;
    const int32_t* zero;
    const float* scale;
};

// (tokens, rows): whole numbers if there is a place for them, else floats.
struct Output {
    int32_t* whole;
    float* real;
    const float* bias;
};

// f(0), ..., f(N - 1) with constants. Loops are unrolled too late for the compiler to keep sums in registers.
template <int... I, class Function>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, I...>, Function f) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int N>
constexpr auto COUNT = std::make_integer_sequence<int, N>();

template <Format F>
struct Block {
    const uint8_t *head, *low[PAIRS], *high[PAIRS];

    Block(const Weight& w, int64_t index) {
        const int64_t* starts = w.starts + index * (1 + PAIRS);
        head = w.data + starts[0];
        for (int pair = 0; pair < PAIRS; ++pair) low[pair] = high[pair] = w.data + starts[1 + pair];
    }
};

void write(const Weight& w, int64_t block, int64_t token, const int32_t* sums, const Tokens& x, const Output& out) {
    for (int i = 0; i < ROWS; ++i) {
        const int64_t from = block * ROWS + i, to = w.order[from];
        if (to < 0) continue;
        const int32_t sum = sums[i] - x.zero[token] * w.sums[from];
        if (out.whole != nullptr)
            out.whole[token * w.rows + to] = sum;
        else
            out.real[token * w.rows + to] =
                float(sum) * (x.scale[token] * w.scales[from]) + (out.bias != nullptr ? out.bias[to] : 0.0f);
    }
}

constexpr int64_t GROUPS_AHEAD = 16;

// One pass over a block, for few tokens: no weight is written anywhere.
template <Format F, int T>
void multiply_fused(const Weight& w, const Masks<F>& reader, int64_t index, const Tokens& x, const Output& out) {
    constexpr int64_t HEAD = head_bytes(F), STEP = HEAD + PAIRS * (F == BITMASK ? WIDTH / 2 : code_bytes(F));
    Block<F> block(w, index);
    // The next block is fetched meanwhile, in the order in which it lies: the processor sees one stream, not five.
    const uint8_t* ahead = block.head + std::max<int64_t>(w.groups * STEP, 8192);
    Sum sums[T][ROWS];
    unrolled(COUNT<T * ROWS>, [&](auto i) __attribute__((always_inline)) { sums[i / ROWS][i % ROWS] = nothing(); });
    // Masks with numbers are looked up some groups ahead: what was just written is slow to read back.
    alignas(64) uint64_t looked_up[GROUPS_AHEAD][ROWS];
    for (int64_t first = 0; first < w.groups; first += GROUPS_AHEAD) {
        const int64_t groups = std::min(GROUPS_AHEAD, w.groups - first);
        if constexpr (field_bits(F) > 0)
            for (int64_t i = 0; i < groups; ++i) reader.read(block.head + i * HEAD, looked_up[i]);
        for (int64_t i = 0; i < groups; ++i) {
            for (int64_t line = 0; line < STEP; line += 64) __builtin_prefetch(ahead + line, 0, 2);
            ahead += STEP;
            uint64_t bitmasks[ROWS];
            if constexpr (field_bits(F) == 0) reader.read(block.head + i * HEAD, bitmasks);
            const uint64_t* masks = field_bits(F) == 0 ? bitmasks : looked_up[i];
            Inputs inputs[T];
            for (int t = 0; t < T; ++t) inputs[t] = load_inputs(x.q + t * x.stride + (first + i) * WIDTH);
            unrolled(COUNT<PAIRS>, [&](auto pair) __attribute__((always_inline)) {
                Vector a, b;
                read_pair<F>(block.low[pair], block.high[pair], masks + 2 * pair, a, b);
                unrolled(COUNT<T>, [&](auto t) __attribute__((always_inline)) {
                    add_products(sums[t][2 * pair], inputs[t], a);
                    add_products(sums[t][2 * pair + 1], inputs[t], b);
                });
            });
        }
        block.head += groups * HEAD;
    }
    unrolled(COUNT<T>, [&](auto t) __attribute__((always_inline)) {
        int32_t totals[ROWS];
        unrolled(COUNT<ROWS>, [&](auto i) __attribute__((always_inline)) { totals[i] = total(sums[t][i]); });
        write(w, index, t, totals, x, out);
    });
}

constexpr int64_t TILE_GROUPS = 64;  // 8 rows x 4,096 columns, unpacked

template <int R, int T>
void multiply_tile(const int8_t* tile, int64_t groups, const uint8_t* q, int64_t stride, int32_t* sums) {
    Sum partial[R][T];
    unrolled(COUNT<R * T>, [&](auto i) __attribute__((always_inline)) { partial[i / T][i % T] = nothing(); });
    for (int64_t group = 0; group < groups; ++group) {
        Vector weights[R];
        unrolled(COUNT<R>, [&](auto r) __attribute__((always_inline)) {
            weights[r] = load(tile + (group * ROWS + r) * WIDTH);
        });
        unrolled(COUNT<T>, [&](auto t) __attribute__((always_inline)) {
            const Inputs inputs = load_inputs(q + t * stride + group * WIDTH);
            unrolled(COUNT<R>, [&](auto r) __attribute__((always_inline)) {
                add_products(partial[r][t], inputs, weights[r]);
            });
        });
    }
    unrolled(COUNT<R * T>, [&](auto i) __attribute__((always_inline)) {
        sums[i % T * ROWS + i / T] += total(partial[i / T][i % T]);
    });
}

// For more tokens: a block is unpacked to whole bytes, a part of its columns at a time, and read from the cache.
template <Format F>
void multiply_unpacked(const Weight& w, const Masks<F>& reader, int64_t index, const Tokens& x, const Output& out,
                       std::vector<int32_t>& sums) {
    alignas(64) thread_local int8_t tile[ROWS * TILE_GROUPS * WIDTH];
    Block<F> block(w, index);
    sums.assign(x.count * ROWS, 0);
    uint64_t masks[ROWS];
    for (int64_t first = 0; first < w.groups; first += TILE_GROUPS) {
        const int64_t groups = std::min(TILE_GROUPS, w.groups - first);
        for (int64_t group = 0; group < groups; ++group) {
            reader.read(block.head, masks);
            block.head += head_bytes(F);
            unrolled(COUNT<PAIRS>, [&](auto pair) __attribute__((always_inline)) {
                Vector a, b;
                read_pair<F>(block.low[pair], block.high[pair], masks + 2 * pair, a, b);
                store(tile + (group * ROWS + 2 * pair) * WIDTH, a);
                store(tile + (group * ROWS + 2 * pair + 1) * WIDTH, b);
            });
        }
        const uint8_t* q = x.q + first * WIDTH;
        for (int row = 0; row < ROWS; row += ROWS_AT_ONCE) {
            const int8_t* from = tile + row * WIDTH;
            int64_t t = 0;
            for (; t + TOKENS_AT_ONCE <= x.count; t += TOKENS_AT_ONCE)
                multiply_tile<ROWS_AT_ONCE, TOKENS_AT_ONCE>(from, groups, q + t * x.stride, x.stride,
                                                            &sums[t * ROWS + row]);
            for (; t < x.count; ++t)
                multiply_tile<ROWS_AT_ONCE, 1>(from, groups, q + t * x.stride, x.stride, &sums[t * ROWS + row]);
        }
    }
    for (int64_t t = 0; t < x.count; ++t) write(w, index, t, &sums[t * ROWS], x, out);
}

template <Format F>
void multiply_format(const Weight& w, const Tokens& x, const Output& out, int threads) {
    const int64_t blocks = (w.rows + ROWS - 1) / ROWS;
    const int64_t share = std::max<int64_t>(1, blocks / (8 * threads));  // taken at a time
    std::atomic<int64_t> next{0};
    Pool::run(int(std::min<int64_t>(threads, blocks)), [&] {
        const Masks<F> reader(w.masks);
        std::vector<int32_t> sums;
        for (int64_t first; (first = next.fetch_add(share)) < blocks;)
            for (int64_t index = first; index < std::min(blocks, first + share); ++index) {
                if (x.count == 1)
                    multiply_fused<F, 1>(w, reader, index, x, out);
                else if (x.count == 2 && FUSED_TOKENS >= 2)
                    multiply_fused<F, std::min(2, FUSED_TOKENS)>(w, reader, index, x, out);
                else if (x.count == 3 && FUSED_TOKENS >= 3)
                    multiply_fused<F, std::min(3, FUSED_TOKENS)>(w, reader, index, x, out);
                else
                    multiply_unpacked<F>(w, reader, index, x, out, sums);
            }
    });
}

// Bits of x whose order as whole numbers is that of floats, so that extremes are found, and NaN with them, quickly.
inline int32_t ordered(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float from_ordered(int32_t bits) {
    bits ^= (bits >> 31) & 0x7fffffff;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint64_t sum_of(const uint8_t* from, int64_t bytes) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (int64_t i = 0; i + 256 <= bytes; i += 256)
        for (int64_t j = 0; j < 64; j += 8) {
            a += load64(from + i + j);
            b += load64(from + i + 64 + j);
            c += load64(from + i + 128 + j);
            d += load64(from + i + 192 + j);
        }
    return a + b + c + d;
}

}  // namespace

extern "C" {

// Round tokens (tokens, columns) to whole numbers q (tokens, stride), each with zero and scale, as quantize.py does.
// low, high: factors of a token's least and largest value. A token that is not finite gets the scale NaN.
void quantize_tokens(const float* x, int64_t tokens, int64_t columns, int64_t stride, int bits, int symmetric,
                     float low, float high, uint8_t* q, int32_t* zeros, float* scales) {
    for (int64_t t = 0; t < tokens; ++t) {
        const float* from = x + t * columns;
        uint8_t* to = q + t * stride;
        int32_t least = std::numeric_limits<int32_t>::max(), most = std::numeric_limits<int32_t>::min();
        for (int64_t i = 0; i < columns; ++i) {
            least = std::min(least, ordered(from[i]));
            most = std::max(most, ordered(from[i]));
        }
        constexpr int32_t infinite = 0x7f800000;
        float bottom = from_ordered(least) * low, top = from_ordered(most) * high, scale, shift;
        float lowest, highest;
        int32_t zero;
        if (symmetric) {
            highest = float((1 << (bits - 1)) - 1);
            lowest = -highest - 1.0f;
            scale = std::max(std::max(std::fabs(bottom), std::fabs(top)) / highest, 1e-12f);
            shift = 0.0f;
            zero = 128;
        } else {
            lowest = 0.0f;
            highest = float((1 << bits) - 1);
            bottom = std::min(bottom, 0.0f);
            top = std::max(top, 0.0f);
            scale = std::max((top - bottom) / highest, 1e-12f);
            shift = std::nearbyint(-bottom / scale);
            zero = int32_t(shift);
        }
        const int32_t bias = symmetric ? 128 : 0;
        std::memset(to + columns, 0, stride - columns);
        if (most >= infinite || least <= ~infinite) {
            scales[t] = std::numeric_limits<float>::quiet_NaN();
            zeros[t] = 0;
            std::memset(to, 0, columns);
            continue;
        }
        for (int64_t i = 0; i < columns; ++i) {
            const float code = std::min(std::max(std::nearbyint(from[i] / scale) + shift, lowest), highest);
            to[i] = uint8_t(int32_t(code) + bias);
        }
        scales[t] = scale;
        zeros[t] = zero;
    }
}

// Fill the data of a matrix whose starts and order are known. codes, kept: (rows, columns). numbers: mask of sixteen
// columns -> number.
void pack(int64_t format, int64_t rows, int64_t columns, int64_t groups, const int8_t* codes, const uint8_t* kept,
          const int32_t* order, const int64_t* starts, const uint16_t* numbers, uint8_t* data) {
    const Format f = Format(format);
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    for (int64_t row = 0; row < blocks * ROWS; ++row) {
        const int64_t block = row / ROWS, i = row % ROWS, source = order[row];
        uint8_t* head = data + starts[block * (1 + PAIRS)];
        uint8_t* stream = data + starts[block * (1 + PAIRS) + 1 + i / 2];
        for (int64_t group = 0; group < groups; ++group) {
            uint64_t mask = 0;
            for (int64_t j = 0; j < WIDTH; ++j) {
                const int64_t column = group * WIDTH + j;
                const bool inside = source >= 0 && column < columns;
                const bool one = inside && kept[source * columns + column];
                mask |= uint64_t(one) << j;
                const int code = one ? codes[source * columns + column] & 15 : 0;
                if (one || f == DENSE) *stream++ |= uint8_t(code << (4 * (i & 1)));
            }
            if (f == BITMASK) {
                std::memcpy(head + group * ROWS * 8 + i * 8, &mask, 8);
            } else if (f != DENSE) {
                // What lies outside has no codes, but must have masks of the pattern: those of number 0 read zeros.
                const int bits = field_bits(f);
                uint64_t word = 0;
                for (int part = 0; part < 4; ++part)
                    word |= uint64_t(numbers[mask >> (16 * part) & 0xffff]) << (2 * bits * part);
                std::memcpy(head + (group * ROWS + i) * bits, &word, bits);
                stream = data + starts[block * (1 + PAIRS) + 1 + i / 2] + (group + 1) * (WIDTH / 2);
            }
        }
    }
}

// whole or real (tokens, rows): the product, in whole numbers or with scales and, unless null, bias (rows).
void multiply(const Weight* w, int64_t tokens, int64_t stride, const uint8_t* q, const int32_t* zeros,
              const float* scales, const float* bias, int threads, int32_t* whole, float* real) {
    const Tokens x{tokens, stride, q, zeros, scales};
    const Output out{whole, real, bias};
    switch (w->format) {
        case DENSE: return multiply_format<DENSE>(*w, x, out, threads);
        case BITMASK: return multiply_format<BITMASK>(*w, x, out, threads);
        case TWO_FOUR: return multiply_format<TWO_FOUR>(*w, x, out, threads);
        case FOUR_EIGHT: return multiply_format<FOUR_EIGHT>(*w, x, out, threads);
        case PAIRED: return multiply_format<PAIRED>(*w, x, out, threads);
    }
}

// Read memory once, as fast as these threads can; the sum keeps the compiler from leaving it out.
uint64_t read_memory(const uint8_t* from, int64_t bytes, int threads) {
    const int64_t share = 1 << 20;
    std::atomic<int64_t> next{0};
    std::atomic<uint64_t> sum{0};
    Pool::run(threads, [&] {
        uint64_t own = 0;
        for (int64_t first; (first = next.fetch_add(share)) < bytes;)
            own += sum_of(from + first, std::min(share, bytes - first));
        sum += own;
    });
    return sum;
}

}  // extern "C"

// Loops that PyTorch can only run as many passes over memory. Plain C ABI; built on first use by native.py.
//
// annealing.py and joint.py have the same loops in PyTorch, with the same results to the last bit. So the compiler may
// neither contract nor reorder sums (see the flags in native.py), and a change here has to be made there too.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

namespace {

constexpr int kLanes = 16;

template <typename Body>
void by_rows(int64_t rows, int threads, const Body& body) {
    const int64_t share = (rows + threads - 1) / threads;
    std::vector<std::thread> workers;
    for (int64_t first = share; first < rows; first += share)
        workers.emplace_back(body, first, std::min(rows, first + share));
    body(0, std::min(rows, share));
    for (auto& worker : workers) worker.join();
}

// x^p for x >= 0 as 2^(p log2 x), with polynomials good to about 1e-5; the compiler vectorises it. 0 gives ~0.
inline float power(float x, float p) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
    bits = (bits & 0x007fffffu) | 0x3f800000u;
    float m;
    std::memcpy(&m, &bits, 4);
    // log2(m) on [1, 2) by the series of atanh: m = (1 + t) / (1 - t), t <= 1/3.
    const float t = (m - 1.0f) / (m + 1.0f), s = t * t;
    const float log2 =
        exponent + 2.88539008f * t * (1.0f + s * (0.33333333f + s * (0.2f + s * (0.14285714f + s * 0.11111111f))));
    const float y = std::max(p * log2, -126.0f);
    const float whole = std::floor(y), f = y - whole;
    const float fraction =
        1.0f + f * (0.69314718f + f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * 0.00133336f + f * f * 0.00015404f))));
    const uint32_t scale = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    float factor;
    std::memcpy(&factor, &scale, 4);
    return fraction * factor;
}

float error_of(const float* w, int64_t count, float trial, float low, float high, float exponent) {
    const float inverse = 1.0f / trial;
    const auto error = [&](float x) {
        const float code = std::min(std::max(std::nearbyint(x * inverse), low), high);
        return power(std::fabs(code * trial - x), exponent);
    };
    float sums[kLanes] = {};
    int64_t first = 0;
    for (; first + kLanes <= count; first += kLanes)
        for (int k = 0; k < kLanes; ++k) sums[k] += error(w[first + k]);
    for (; first < count; ++first) sums[0] += error(w[first]);
    return std::accumulate(sums, sums + kLanes, 0.0f);
}

// The same with squares, each counted as its column is.
float squares_of(const float* w, const float* importance, int64_t count, float trial, float low, float high) {
    const float inverse = 1.0f / trial;
    const auto square = [&](int64_t j) {
        const float error = std::min(std::max(std::nearbyint(w[j] * inverse), low), high) * trial - w[j];
        return error * error * importance[j];
    };
    float sums[kLanes] = {};
    int64_t first = 0;
    for (; first + kLanes <= count; first += kLanes)
        for (int k = 0; k < kLanes; ++k) sums[k] += square(first + k);
    for (; first < count; ++first) sums[0] += square(first);
    return std::accumulate(sums, sums + kLanes, 0.0f);
}

void errors_of_rows(const float* weight, const float* importance, const float* scale, int64_t first, int64_t last,
                    int64_t columns, int steps, float low, float high, float exponent, float* errors) {
    const int64_t part = 256;
    for (int64_t row = first; importance && row < last; ++row)
        for (int step = 0; step < steps; ++step)
            errors[row * steps + step] = squares_of(weight + row * columns, importance, columns,
                                                    scale[row] * (1.0f - static_cast<float>(step) / 100.0f), low, high);
    if (importance) return;
    std::vector<float> w(columns);
    for (int64_t row = first; row < last; ++row) {
        std::copy_n(weight + row * columns, columns, w.begin());
        // The largest first: they are what a small scale clips, so that it is soon seen to be worse.
        if (columns > part)
            std::nth_element(w.begin(), w.begin() + part / 4, w.end(),
                             [](float a, float b) { return std::fabs(a) > std::fabs(b); });
        float best = INFINITY;
        for (int step = 0; step < steps; ++step) {
            const float trial = scale[row] * (1.0f - static_cast<float>(step) / 100.0f);
            float sum = 0.0f;
            for (int64_t start = 0, count = part / 4; start < columns && sum <= 1.01f * best; start += count, count = part)
                sum += error_of(w.data() + start, std::min(count, columns - start), trial, low, high, exponent);
            best = std::min(best, sum);
            errors[row * steps + step] = sum;
        }
    }
}

}  // namespace

// errors (rows, steps): the sum over a row's columns of |Q(w) - w|^exponent for scales shrunk by 0, 1, 2 ... per cent.
// With an importance (columns) of the columns, or null, the sum of importance * |Q(w) - w|^2 instead.
// weight (rows, columns), scale (rows). Good to 1e-5: for choosing what needs an exact look. A sum that has grown
// past the best of its row is left unfinished.
extern "C" void clip_errors(const float* weight, const float* importance, const float* scale, int64_t rows,
                            int64_t columns, int steps, float low, float high, float exponent, int threads, float* errors) {
    by_rows(rows, threads, [&](int64_t first, int64_t last) {
        errors_of_rows(weight, importance, scale, first, last, columns, steps, low, high, exponent, errors);
    });
}

namespace {

constexpr float kNever = 1e30f;  // a price that no gain reaches

inline float widen(float x) { return x; }
inline float widen(uint16_t bfloat) {
    const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, uint16_t& bfloat) {  // to the nearest, of two the even one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bfloat = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename T>  // float or bfloat16
struct Layer {
    const T* hessian;      // (columns, columns)
    const float* inverse;  // one over its diagonal, padded, 0 for dead columns
    const float* ones;     // padded
    int64_t columns;
    int group, unit;  // of a pattern, 0 without one; 2 if it is paired, else 1
    float low, high;
};

// One row while it is swept; all arrays are padded to whole lanes.
template <typename T>
struct Row {
    const Layer<T>& layer;
    float *codes, *gradient;
    const float *ratio, *inverse;  // a column's scale in units of the row's, and the layer's inverse over it
    std::vector<float> price, z, own;
    int64_t changes = 0;

    // scales: of the row's columns in units of its first, padded; null where a row has one scale.
    Row(const Layer<T>& of, float* row_codes, float* row_gradient, const float* scales, int64_t padded)
        : layer(of), codes(row_codes), gradient(row_gradient), ratio(scales ? scales : of.ones), inverse(of.inverse),
          price(padded, kNever), z(padded) {
        if (!scales) return;
        own.assign(of.inverse, of.inverse + padded);
        for (int64_t k = 0; k < padded; ++k) own[k] /= scales[k];
        inverse = own.data();
    }

    void set(int64_t column, float to) {
        if (to == codes[column]) return;
        const float by = (to - codes[column]) * ratio[column];
        const T* __restrict h = layer.hessian + column * layer.columns;
        float* __restrict g = gradient;
        for (int64_t k = 0; k < layer.columns; ++k) g[k] += by * widen(h[k]);
        codes[column] = to;
        ++changes;
    }

    float optimum(int64_t column) const { return codes[column] - gradient[column] * inverse[column]; }

    // The code nearest to t, or 0 where that gains less than the price of a kept weight.
    float choice(float t, float price) const {
        const float code = std::min(std::max(std::nearbyint(t), layer.low), layer.high);
        return code * (code - 2.0f * t) + price < 0.0f ? code : 0.0f;
    }

    // noise: of every column, padded, in multiples of `unit`.
    void sweep(const float* noise, float unit) {
        draw(noise, unit);
        for (int64_t first = 0; first < layer.columns; first += kLanes) {
            uint32_t moved = 0;
            for (int k = 0; k < kLanes; ++k)
                moved |= static_cast<uint32_t>(choice(optimum(first + k) + z[first + k], price[first + k]) != codes[first + k]) << k;
            if (!moved) continue;
            const int count = static_cast<int>(std::min<int64_t>(kLanes, layer.columns - first));
            for (int k = __builtin_ctz(moved); k < count; ++k)  // once more, as the gradient changes with every change
                set(first + k, choice(optimum(first + k) + z[first + k], price[first + k]));
        }
    }

    void draw(const float* noise, float unit) {
        for (size_t k = 0; k < z.size(); ++k) z[k] = noise[k] * unit;
    }

    // Every unit that is kept is taken out in turn and goes to the place in its group where it gains most, its own
    // or one that is free.
    void sweep_groups(const float* noise, float scale, uint8_t* mask) {
        const int group = layer.group, unit = layer.unit;
        std::vector<float> g(group), code(group), best(unit);
        draw(noise, scale);
        for (int64_t first = 0; first < layer.columns; first += group) {
            for (int from = 0; from < group; from += unit) {
                if (!mask[first + from]) continue;
                std::copy_n(gradient + first, group, g.begin());
                for (int i = from; i < from + unit; ++i) add(g.data(), first, -codes[first + i] * ratio[first + i], first + i);
                float most = -kNever;
                int to = from;
                for (int u = 0; u < group; u += unit) {
                    if (u != from && mask[first + u]) continue;
                    const float gain = place(g.data(), first, u, z.data() + first, code.data());
                    if (gain > most) {
                        most = gain;
                        to = u;
                        std::copy_n(code.begin() + u, unit, best.begin());
                    }
                }
                for (int i = 0; i < unit; ++i) {
                    if (to != from) set(first + from + i, 0.0f);
                    set(first + to + i, best[i]);
                    mask[first + from + i] = 0;
                    mask[first + to + i] = 1;
                }
            }
        }
    }

    // The gain of the best codes of the unit u of a group, which are written to `code`; g is the group's gradient.
    // The first of a pair goes to its optimum beside a free second, the second to its own beside that.
    float place(const float* g, int64_t first, int u, const float* z, float* code) const {
        const float *whole = layer.inverse + first, *part = inverse + first, *scale = ratio + first;
        const float cross = layer.unit == 1 ? 0.0f : widen(layer.hessian[(first + u) * layer.columns + first + u + 1]);
        float gain = 0.0f;
        for (int k = u; k < u + layer.unit; ++k) {
            code[k] = 0.0f;
            if (whole[k] == 0.0f) continue;
            const float t = z[k] - (k > u ? g[k] + code[u] * scale[u] * cross : g[k]) * part[k];
            float aim = t;
            if (k == u && layer.unit == 2)
                aim = (t + g[u + 1] * whole[u + 1] * cross * part[u]) / (1.0f - cross * whole[u] * cross * whole[u + 1]);
            code[k] = std::min(std::max(std::nearbyint(aim), layer.low), layer.high);
            gain += code[k] * (2.0f * t - code[k]) * (scale[k] * scale[k]) / whole[k];
        }
        return gain;
    }

    void add(float* g, int64_t first, float by, int64_t column) const {
        const T* h = layer.hessian + column * layer.columns + first;
        for (int k = 0; k < layer.group; ++k) g[k] += by * widen(h[k]);
    }
};

template <typename T>
int64_t anneal_rows(const T* hessian, const float* inverse, const float* ratios, float* codes, float* gradient, uint8_t* support,
                    const float* prices, int64_t rows, int64_t columns, int64_t padded, int group, int unit, float low,
                    float high, const float* noise, const float* deviations, int sweeps, int threads) {
    const std::vector<float> ones(padded, 1.0f);
    const Layer<T> layer{hessian, inverse, ones.data(), columns, group, unit, low, high};
    std::atomic<int64_t> changes{0};
    by_rows(rows, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            Row<T> row(layer, codes + r * padded, gradient + r * padded, ratios ? ratios + r * padded : nullptr, padded);
            for (int64_t j = 0; j < columns && group == 0; ++j)
                if (inverse[j] > 0.0f)
                    row.price[j] = !support ? prices[r] * inverse[j] / (row.ratio[j] * row.ratio[j]) : support[r * columns + j] ? -kNever : kNever;
            for (int s = 0; s < sweeps; ++s) {
                const float scale = deviations[s * rows + r];
                group ? row.sweep_groups(noise + s * padded, scale, support + r * columns)
                      : row.sweep(noise + s * padded, scale);
            }
            changes += row.changes;
        }
    });
    return changes;
}

}  // namespace

// Sweeps of coordinate descent over rows of codes, each coordinate set to its optimum, moved by noise, and projected:
// rounded to a code, and kept if that gains more than its row's price; or if it is on the row's support, where one is
// given; or, where there is a pattern, moved within its group, and the support with it.
//
// ratios (rows, padded) or null: each column's scale in units of the row's, in which gradients and prices are.
// hessian (columns, columns), float or bfloat16, inverse (padded), codes and gradient (rows, padded), support (rows,
// columns) or null, prices (rows), noise (sweeps, padded) in multiples of deviations (sweeps, rows), in codes. Returns
// the number of changes.
extern "C" int64_t anneal(const void* hessian, int bfloat, const float* inverse, const float* ratios, float* codes, float* gradient,
                          uint8_t* support, const float* prices, int64_t rows, int64_t columns, int64_t padded,
                          int group, int unit, float low, float high, const float* noise, const float* deviations,
                          int sweeps, int threads) {
    if (bfloat)
        return anneal_rows(static_cast<const uint16_t*>(hessian), inverse, ratios, codes, gradient, support, prices, rows, columns,
                           padded, group, unit, low, high, noise, deviations, sweeps, threads);
    return anneal_rows(static_cast<const float*>(hessian), inverse, ratios, codes, gradient, support, prices, rows, columns,
                       padded, group, unit, low, high, noise, deviations, sweeps, threads);
}

namespace {

// What of `count` numbers >= 0 are the `kept` largest: all above `value`, and the last `ties` equal to it.
struct Threshold {
    float value;
    int64_t ties;
};

// Bit by bit from the top: as whole numbers, floats >= 0 are in the order of their values. Counting is done many at a
// time, so that 31 passes are faster than one that sorts; most rows need half of them.
Threshold largest(const float* x, int64_t count, int64_t kept) {
    if (kept >= count) return {-1.0f, 0};
    if (kept <= 0) return {std::numeric_limits<float>::max(), 0};
    const auto number = [](int32_t bits) {
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    };
    const auto at_least = [&](float value) {
        int64_t reached = 0;
        for (int64_t first = 0; first < count; first += 4096) {
            const float* some = x + first;
            const int length = static_cast<int>(std::min<int64_t>(count - first, 4096));
            int sum = 0;
            for (int i = 0; i < length; ++i) sum += some[i] >= value ? 1 : 0;
            reached += sum;
        }
        return reached;
    };
    int32_t edge = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const int32_t higher = edge | 1 << bit;
        if (higher >= 0x7f800000) continue;  // infinite
        const int64_t reached = at_least(number(higher));
        if (reached == kept) return {number(higher - 1), 0};
        if (reached > kept) edge = higher;
    }
    return {number(edge), kept - at_least(number(edge + 1))};
}

void keep_largest(const float* gains, int64_t count, Threshold threshold, uint8_t* support) {
    for (int64_t j = 0; j < count; ++j) support[j] = gains[j] > threshold.value;
    for (int64_t j = count - 1; threshold.ties > 0 && j >= 0; --j)
        if (gains[j] == threshold.value) {
            support[j] = 1;
            --threshold.ties;
        }
}

void keep_largest_units(const float* gains, int group, int unit, int kept, uint8_t* support) {
    for (int i = 0; i < group; ++i) support[i] = 0;
    for (int n = 0; n < kept; n += unit) {
        float most = -1.0f;
        int best = 0;
        for (int u = 0; u < group; u += unit) {
            const float gain = unit == 2 ? gains[u] + gains[u + 1] : gains[u];
            if (!support[u] && gain >= most) {  // of equal ones the last
                most = gain;
                best = u;
            }
        }
        for (int i = 0; i < unit; ++i) support[best + i] = 1;
    }
}

inline float rounded(float value, float unit, float low, float high) {
    return std::min(std::max(std::nearbyint(value / unit), low), high) * unit;
}

// The second half of a step, of one row. Not inlined: there the compiler forgets that nothing overlaps, and does one
// column at a time.
template <typename T>
__attribute__((noinline)) void alternated(float* __restrict b, const uint8_t* __restrict support,
                                          const float* __restrict target, const float* __restrict root, float unit,
                                          float low, float high, int64_t columns, float* __restrict projected,
                                          T* __restrict moved) {
    for (int64_t j = 0; j < columns; ++j) {
        const float value = static_cast<float>(support[j]) * rounded(b[j] / root[j], unit, low, high) * root[j];
        const float dual = b[j] - value;
        b[j] = dual;
        projected[j] = value;
        narrow(value - dual - target[j], moved[j]);
    }
}

template <typename T>
struct Alternation {
    float* dual;
    const T* product;
    const float *target, *root, *scale, *row_weights;
    int64_t columns;
    float low, high;

    // dual += product + target, and what each weight gains if it is kept.
    void gains(int64_t row, float* __restrict out) const {
        float* __restrict b = dual + row * columns;
        const T* __restrict p = product + row * columns;
        const float *__restrict t = target + row * columns, *__restrict h = root;
        const float unit = scale[row], weight = row_weights[row];
        for (int64_t j = 0; j < columns; ++j) {
            b[j] += widen(p[j]) + t[j];
            const float v = b[j] / h[j], q = rounded(v, unit, low, high);
            out[j] = std::max(q * (2.0f * v - q) * (h[j] * h[j]) * weight, 0.0f);
        }
    }

    void project(int64_t row, const uint8_t* support, float* projected, T* moved) const {
        const int64_t first = row * columns;
        alternated(dual + first, support + first, target + first, root, scale[row], low, high, columns,
                   projected + first, moved + first);
    }
};

template <typename T>
void alternate_rows(const Alternation<T>& step, T* moved, float* projected, uint8_t* support, int64_t rows,
                    const int64_t* parts, int count, int64_t kept, int group, int unit, int threads) {
    const int64_t columns = step.columns;
    by_rows(rows, threads, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
            float* gains = projected + r * columns;
            step.gains(r, gains);
            if (count > 0) continue;  // they compete with those of other rows
            if (group == 0) {
                keep_largest(gains, columns, largest(gains, columns, kept), support + r * columns);
            }
            for (int64_t j = 0; group > 0 && j < columns; j += group)
                keep_largest_units(gains + j, group, unit, static_cast<int>(kept * group / columns), support + r * columns + j);
            step.project(r, support, projected, moved);
        }
    });
    for (int p = 0; p < count; ++p) {
        const int64_t first = parts[p], size = (parts[p + 1] - first) * columns;
        const float* gains = projected + first * columns;
        keep_largest(gains, size, largest(gains, size, (parts[p + 1] - first) * kept), support + first * columns);
    }
    if (count > 0)
        by_rows(rows, threads, [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; ++r) step.project(r, support, projected, moved);
        });
}

}  // namespace

// One step of the alternating projections, in units of the Hessian's root: `b = dual + product + target`, where
// product is `moved @ ρ(H + ρ)⁻¹`; projected is Π(b), dual becomes `b - projected`, moved `projected - dual - target`.
//
// All (rows, columns); product and moved are float or bfloat16. root (columns), scale and row_weights (rows). Kept are the
// `kept` largest gains of a row; or of a group, so many in the whole row; or as many on average in the rows of each
// of `count` parts, which end where the next of `parts` (count + 1) begins.
extern "C" void alternate(float* dual, const void* product, void* moved, int bfloat, const float* target,
                          const float* root, const float* scale, const float* row_weights, float* projected, uint8_t* support,
                          int64_t rows, int64_t columns, const int64_t* parts, int count, int64_t kept, int group,
                          int unit, float low, float high, int threads) {
    if (bfloat)
        alternate_rows(Alternation<uint16_t>{dual, static_cast<const uint16_t*>(product), target, root, scale, row_weights,
                                             columns, low, high},
                       static_cast<uint16_t*>(moved), projected, support, rows, parts, count, kept, group, unit, threads);
    else
        alternate_rows(Alternation<float>{dual, static_cast<const float*>(product), target, root, scale, row_weights, columns,
                                          low, high},
                       static_cast<float*>(moved), projected, support, rows, parts, count, kept, group, unit, threads);
}

// Loops that PyTorch can only run as many passes over memory. Plain C ABI; built on first use by native.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

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
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
        const float code = std::min(std::max(std::nearbyint(w[i] * inverse), low), high);
        sum += power(std::fabs(code * trial - w[i]), exponent);
    }
    return sum;
}

void errors_of_rows(const float* weight, const float* scale, int64_t first, int64_t last, int64_t columns, int steps,
                    float low, float high, float exponent, float* errors) {
    const int64_t part = 256;
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
// weight (rows, columns), scale (rows). Good to 1e-5: for choosing what is worth an exact look. A sum that has grown
// past the best of its row is left unfinished.
extern "C" void clip_errors(const float* weight, const float* scale, int64_t rows, int64_t columns, int steps,
                            float low, float high, float exponent, int threads, float* errors) {
    std::vector<std::thread> workers;
    const int64_t share = (rows + threads - 1) / threads;
    for (int64_t first = 0; first < rows; first += share)
        workers.emplace_back(errors_of_rows, weight, scale, first, std::min(rows, first + share), columns, steps, low,
                             high, exponent, errors);
    for (auto& worker : workers) worker.join();
}

namespace {

constexpr int kLanes = 16;
constexpr float kNever = 1e30f;  // a price that no gain reaches

struct Layer {
    const float *hessian, *inverse;  // (columns, columns); one over its diagonal, padded, 0 for dead columns
    int64_t columns;
    int group, unit;  // of a pattern, 0 without one; 2 if it is paired, else 1
    float low, high;
};

// Triangular noise of unit deviation times what is asked for, kLanes streams of xorshift side by side.
struct Noise {
    uint32_t state[kLanes];

    explicit Noise(uint64_t seed) {
        for (auto& s : state) {  // splitmix64
            uint64_t z = (seed += 0x9e3779b97f4a7c15ull);
            z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
            z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
            s = static_cast<uint32_t>(z >> 32) | 1u;
        }
    }

    void draw(float* out, float deviation) {
        const float unit = deviation * 2.4494897f / 65536.0f;
        for (int k = 0; k < kLanes; ++k) {
            uint32_t s = state[k];
            s ^= s << 13;
            s ^= s >> 17;
            s ^= s << 5;
            state[k] = s;
            out[k] = static_cast<float>(static_cast<int32_t>((s & 0xffffu) + (s >> 16)) - 65535) * unit;
        }
    }
};

// One row while it is swept; all arrays are padded to whole lanes.
struct Row {
    const Layer& layer;
    float *codes, *gradient;
    Noise noise;
    std::vector<float> price;
    int64_t changes = 0;

    void set(int64_t column, float to) {
        const float by = to - codes[column];
        if (by == 0.0f) return;
        const float* __restrict h = layer.hessian + column * layer.columns;
        float* __restrict g = gradient;
        for (int64_t k = 0; k < layer.columns; ++k) g[k] += by * h[k];
        codes[column] = to;
        ++changes;
    }

    float optimum(int64_t column) const { return codes[column] - gradient[column] * layer.inverse[column]; }

    // The code nearest to t, or 0 where that gains less than the price of a kept weight.
    float choice(float t, float price) const {
        const float code = std::min(std::max(std::nearbyint(t), layer.low), layer.high);
        return code * (code - 2.0f * t) + price < 0.0f ? code : 0.0f;
    }

    void sweep(float deviation) {
        float z[kLanes];
        for (int64_t first = 0; first < layer.columns; first += kLanes) {
            noise.draw(z, deviation);
            int moved = 0;
            for (int k = 0; k < kLanes; ++k)
                moved |= choice(optimum(first + k) + z[k], price[first + k]) != codes[first + k];
            if (!moved) continue;
            const int count = static_cast<int>(std::min<int64_t>(kLanes, layer.columns - first));
            for (int k = 0; k < count; ++k)  // once more, as the gradient changes with every change
                set(first + k, choice(optimum(first + k) + z[k], price[first + k]));
        }
    }

    // Every unit that is kept is taken out in turn and goes to the place in its group where it gains most, its own
    // or one that is free.
    void sweep_groups(float deviation, uint8_t* mask) {
        const int group = layer.group, unit = layer.unit;
        std::vector<float> z((group + kLanes - 1) / kLanes * kLanes), g(group), code(group), best(unit);
        for (int64_t first = 0; first < layer.columns; first += group) {
            for (int k = 0; k < group; k += kLanes) noise.draw(z.data() + k, deviation);
            for (int from = 0; from < group; from += unit) {
                if (!mask[first + from]) continue;
                std::copy_n(gradient + first, group, g.begin());
                for (int i = from; i < from + unit; ++i) add(g.data(), first, -codes[first + i], first + i);
                float most = -kNever;
                int to = from;
                for (int u = 0; u < group; u += unit) {
                    if (u != from && mask[first + u]) continue;
                    const float gain = place(g.data(), first, u, z.data(), code.data());
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
        const float* inverse = layer.inverse + first;
        const float cross = layer.unit == 1 ? 0.0f : layer.hessian[(first + u) * layer.columns + first + u + 1];
        float gain = 0.0f;
        for (int k = u; k < u + layer.unit; ++k) {
            code[k] = 0.0f;
            if (inverse[k] == 0.0f) continue;
            const float t = z[k] - (k > u ? g[k] + code[u] * cross : g[k]) * inverse[k];
            float aim = t;
            if (k == u && layer.unit == 2)
                aim = (t + g[u + 1] * inverse[u + 1] * cross * inverse[u]) / (1.0f - cross * inverse[u] * cross * inverse[u + 1]);
            code[k] = std::min(std::max(std::nearbyint(aim), layer.low), layer.high);
            gain += code[k] * (2.0f * t - code[k]) / inverse[k];
        }
        return gain;
    }

    void add(float* g, int64_t first, float by, int64_t column) const {
        const float* h = layer.hessian + column * layer.columns + first;
        for (int k = 0; k < layer.group; ++k) g[k] += by * h[k];
    }
};

}  // namespace

// Sweeps of coordinate descent over rows of codes, each coordinate set to its optimum, moved by noise, and projected:
// rounded to a code, and kept if that gains more than its row's price; or if it is on the row's support, where one is
// given; or, where there is a pattern, moved within its group, and the support with it.
//
// hessian (columns, columns), inverse (padded), codes and gradient (rows, padded), support (rows, columns) or null,
// prices (rows), deviations (sweeps) of the noise, in codes, times spread (rows). Returns the number of changes.
extern "C" int64_t anneal(const float* hessian, const float* inverse, float* codes, float* gradient, uint8_t* support,
                          const float* prices, const float* spread, int64_t rows, int64_t columns, int64_t padded,
                          int group, int unit, float low, float high, const float* deviations, int sweeps,
                          uint64_t seed, int threads) {
    const Layer layer{hessian, inverse, columns, group, unit, low, high};
    const int64_t share = (rows + threads - 1) / threads;
    std::vector<int64_t> changes(threads, 0);
    const auto work = [&](int worker) {
        for (int64_t r = worker * share; r < std::min(rows, (worker + 1) * share); ++r) {
            Row row{layer, codes + r * padded, gradient + r * padded,
                    Noise(seed * 0x2545f4914f6cdd1dull + static_cast<uint64_t>(r) * 0x632be59bd9b4e019ull),
                    std::vector<float>(padded, kNever)};
            for (int64_t j = 0; j < columns && group == 0; ++j)
                if (inverse[j] > 0.0f)
                    row.price[j] = !support ? prices[r] * inverse[j] : support[r * columns + j] ? -kNever : kNever;
            for (int s = 0; s < sweeps; ++s)
                group ? row.sweep_groups(deviations[s] * spread[r], support + r * columns)
                      : row.sweep(deviations[s] * spread[r]);
            changes[worker] += row.changes;
        }
    };
    std::vector<std::thread> workers;
    for (int worker = 1; worker < threads; ++worker) workers.emplace_back(work, worker);
    work(0);
    for (auto& worker : workers) worker.join();
    int64_t sum = 0;
    for (const int64_t count : changes) sum += count;
    return sum;
}

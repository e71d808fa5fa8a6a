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

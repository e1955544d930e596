// softmax(q k^T * scale) v without the matrix of scores: blocks of queries pass over blocks of keys, and the greatest
// score and the sum so far are kept (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et
// al., FlashAttention, 2022).
//
// A register holds one number of each of several queries, so neither a row's maximum nor its sum crosses lanes, and
// heads of 40 numbers, Stable Diffusion's, fill registers as well as any others.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "vector.hpp"

namespace smooth_rt {

constexpr int QUERIES = LANES * GROUPS;  // of a block
constexpr int KEYS = 128;                // of a block: their scores stay near
constexpr int WIDEST = 256;              // numbers a head

// q and the result are [batch, queries, heads, width], k and v [batch, keys, heads, width].
struct Sizes {
    int64_t batch, queries, keys, heads, width;

    int64_t keys_filled() const { return up(keys, TILE); }
    int64_t width_filled() const { return up(width, TILE); }
    const float* row(const float* tensor, int64_t rows, int64_t b, int64_t n, int64_t h) const {
        return tensor + ((b * rows + n) * heads + h) * width;
    }
};

// How products are formed: in fp32.
struct Single {
    using Number = float;   // of keys and values
    using Weights = float;  // of a block: one a key and query
    static constexpr bool SHORT = false;
    static constexpr int STEP = 1;  // numbers that one instruction multiplies and sums
    static Number rounded(float value) { return value; }
    static Vec multiplied(Vec sum, const Number* one, const Number* lanes) { return all(*one) * *(const Vec*)lanes + sum; }
    static void write(Weights* to, const Vec* weights) { *(Vec*)to = *weights; }
};

#if defined(__AVX512BF16__)
// Or in bf16, pairs of which one instruction multiplies and sums in fp32.
struct Half {
    using Number = uint16_t;
    using Weights = uint16_t;
    static constexpr bool SHORT = true;
    static constexpr int STEP = 2;
    static Number rounded(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        // To the nearest even, but for what is not a number: that must not become one.
        return value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
    }
    static Vec multiplied(Vec sum, const Number* one, const Number* lanes) {
        int pair;
        std::memcpy(&pair, one, 4);
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(lanes));
    }
    static void write(Weights* to, const Vec* weights) {  // of two keys, which become pairs; all between 0 and 1, or NaN
        const __m512i low = _mm512_srli_epi32((__m512i)((Bits)weights[0] + 0x8000), 16);
        _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xAAAAAAAAu, low, (__m512i)((Bits)weights[1] + 0x8000)));
    }
};
#else
using Half = Single;
#endif

// Keys of one head as [keys, width] and values as [keys / STEP, width, STEP], both filled up with zeros.
template <typename Form>
void pack(const float* k, const float* v, const Sizes& s, int64_t b, int64_t h, typename Form::Number* keys,
          typename Form::Number* values) {
    const int64_t width = s.width_filled();
    for (int64_t n = 0; n < s.keys_filled(); ++n) {
        const float* key = s.row(k, s.keys, b, n, h);
        const float* value = s.row(v, s.keys, b, n, h);
        for (int64_t d = 0; d < width; ++d) {
            const bool inside = n < s.keys && d < s.width;
            keys[n * width + d] = Form::rounded(inside ? key[d] : 0.0f);
            values[(n / Form::STEP * width + d) * Form::STEP + n % Form::STEP] = Form::rounded(inside ? value[d] : 0.0f);
        }
    }
}

// One block of queries of one head, from query `first` on. `scale` holds log2(e), since weights are powers of two.
template <typename Form>
void attend(const float* q, const typename Form::Number* k, const typename Form::Number* v, float* out, const Sizes& s,
            int64_t b, int64_t h, int64_t first, float scale) {
    using Number = typename Form::Number;
    constexpr int STEP = Form::STEP;
    constexpr float LEAST = -std::numeric_limits<float>::max();
    const int64_t width = s.width_filled();
    alignas(64) Number queries[WIDEST * QUERIES];  // [width / STEP, QUERIES, STEP]
    alignas(64) float scores[KEYS * QUERIES];
    alignas(64) typename Form::Weights weights[KEYS * QUERIES];  // [KEYS / STEP, QUERIES, STEP]
    alignas(64) float sums[WIDEST * QUERIES];
    std::memset(sums, 0, width * QUERIES * sizeof(float));
    for (int64_t i = 0; i < QUERIES; ++i) {
        const float* query = s.row(q, s.queries, b, std::min(first + i, s.queries - 1), h);
        for (int64_t d = 0; d < width; ++d) {
            const float value = d < s.width ? query[d] * scale : 0.0f;
            queries[(d / STEP * QUERIES + i) * STEP + d % STEP] = Form::rounded(value);
        }
    }
    Vec most[GROUPS], total[GROUPS];
    for (int j = 0; j < GROUPS; ++j) most[j] = all(LEAST), total[j] = Vec{};

    for (int64_t n = 0; n < s.keys_filled(); n += KEYS) {
        const int64_t count = std::min<int64_t>(KEYS, s.keys_filled() - n);
        Vec now[GROUPS];
        for (int j = 0; j < GROUPS; ++j) now[j] = most[j];
        for (int64_t t = 0; t < count; t += TILE) {
            Vec sum[TILE][GROUPS] = {};
            const Number* row = k + (n + t) * width;
            for (int64_t d = 0; d < width; d += STEP)
#pragma GCC unroll 8
                for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 3
                    for (int j = 0; j < GROUPS; ++j)
                        sum[i][j] = Form::multiplied(sum[i][j], row + i * width + d, queries + d * QUERIES + j * LANES * STEP);
#pragma GCC unroll 8
            for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 3
                for (int j = 0; j < GROUPS; ++j) {
                    const Vec score = n + t + i < s.keys ? sum[i][j] : all(LEAST);
                    ((Vec*)scores)[(t + i) * GROUPS + j] = score;
                    now[j] = larger(now[j], score);
                }
        }
        for (int j = 0; j < GROUPS; ++j) {
            const Vec factor = exp2<false>(most[j] - now[j]);
            most[j] = now[j];
            Vec added = Vec{};
            for (int64_t i = 0; i < count; i += STEP) {
                Vec weight[STEP];
#pragma GCC unroll 2
                for (int c = 0; c < STEP; ++c) {
                    weight[c] = exp2<Form::SHORT>(((Vec*)scores)[(i + c) * GROUPS + j] - now[j]);
                    added += weight[c];
                }
                Form::write(weights + i * QUERIES + j * LANES * STEP, weight);
            }
            total[j] = total[j] * factor + added;
            for (int64_t d = 0; d < width; ++d) ((Vec*)sums)[d * GROUPS + j] *= factor;
        }
        for (int64_t d = 0; d < width; d += TILE) {
            Vec sum[TILE][GROUPS];
#pragma GCC unroll 8
            for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 3
                for (int j = 0; j < GROUPS; ++j) sum[i][j] = ((Vec*)sums)[(d + i) * GROUPS + j];
            const Number* column = v + n * width + d * STEP;
            for (int64_t c = 0; c < count; c += STEP)
#pragma GCC unroll 8
                for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 3
                    for (int j = 0; j < GROUPS; ++j)
                        sum[i][j] = Form::multiplied(sum[i][j], column + c * width + i * STEP, weights + c * QUERIES + j * LANES * STEP);
#pragma GCC unroll 8
            for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 3
                for (int j = 0; j < GROUPS; ++j) ((Vec*)sums)[(d + i) * GROUPS + j] = sum[i][j];
        }
    }

    float inverse[QUERIES];
    for (int j = 0; j < GROUPS; ++j) ((Vec*)inverse)[j] = 1.0f / total[j];
    for (int64_t i = 0; i < QUERIES && first + i < s.queries; ++i) {
        float* to = const_cast<float*>(s.row(out, s.queries, b, first + i, h));
        for (int64_t d = 0; d < s.width; ++d) to[d] = sums[d * QUERIES + i] * inverse[i];
    }
}

}  // namespace smooth_rt

// Products for CPUs with AVX512-VNNI: 16 rows of a matrix at a time, one in each lane. int8 inputs and weights are
// multiplied as integers, bf16 ones in pairs.
//
// Memory holds panels of 16 rows. A word of 4 bytes has 1 fp32, 2 bf16, 4 int8 or 8 int4 of one row, as they follow
// each other there; 16 words, one of each row, make a vector, and a panel is its vectors in the order of the columns.
// int8 weights are kept plus 128 and int4 plus 8, as the instruction wants one factor without sign; what that adds to
// a product is known from the sum of the inputs. The scales of int4 lie in panels too.
#pragma once

#include "cpu_vectors.h"

constexpr int64_t BITS[] = {32, 16, 8, 4};

static inline vi broadcast(int32_t word) { return vi{} + word; }

// bf16: the nearest, ties to even. int8: one scale for each row of inputs.
static void narrow(int64_t kind, Input& in) {
    typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    for (int64_t r = 0; r < in.count && kind == BF16; r++)
        for (int64_t k = 0; k < in.cols; k += LANES) {
            vi bits = (vi)load(in.x + r * in.cols + k);
            bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            *(halves*)((uint16_t*)in.narrow + r * in.cols + k) = __builtin_convertvector(bits, halves);
        }
    for (int64_t r = 0; r < in.count && kind >= INT8; r++) {
        const float* x = in.x + r * in.cols;
        vf most = {}, nan = {};
        for (int64_t k = 0; k < in.cols; k += LANES) {
            vf v = load(x + k);
            most = (vf)_mm512_max_ps((__m512)most, _mm512_abs_ps((__m512)v));
            nan += v * 0.0f;  // what is not finite has to show in the logits
        }
        const float limit = std::fmax(largest(most), 1e-12f), inverse = 127.0f / limit;
        in.scale[r] = limit / 127.0f + sum(nan);
        for (int64_t k = 0; k < in.cols; k += 32) {
            __m512i low = _mm512_cvtps_epi32((__m512)(load(x + k) * inverse));
            __m512i high = _mm512_cvtps_epi32((__m512)(load(x + k + 16) * inverse));
            __m128i* to = (__m128i*)((int8_t*)in.narrow + r * in.cols + k);
            _mm_storeu_si128(to, _mm512_cvtsepi32_epi8(low));
            _mm_storeu_si128(to + 1, _mm512_cvtsepi32_epi8(high));
            in.sums[(r * in.cols + k) / 32] = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
        }
    }
}

static inline vf multiply_add(vf acc, vi weights, vi x, std::integral_constant<int, FP32>) { return acc + (vf)weights * (vf)x; }
static inline vf multiply_add(vf acc, vi weights, vi x, std::integral_constant<int, BF16>) {
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)x);
#else
    acc += (vf)(weights << 16) * (vf)(x << 16);
    return acc + (vf)(weights & (int)0xffff0000) * (vf)(x & (int)0xffff0000);
#endif
}
static inline vi multiply_add(vi acc, vi weights, vi x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, (__m512i)x);
}

// N panels times R rows of inputs, what is loaded once being used R and N times. Every sum runs over the columns in
// order, whatever R and N.
template <int KIND, int N, int R>
static inline void tile(const Matrix& m, int64_t panel, const Input& in, int64_t row, float* y) {
    const int64_t words = m.cols * BITS[KIND] / 32, x_words = m.cols * BITS[KIND == INT4 ? INT8 : KIND] / 32;
    const unaligned_vi* w = (const unaligned_vi*)m.data + panel * words;
    const int32_t* x = (KIND == FP32 ? (const int32_t*)in.x : in.narrow) + row * x_words;
    const int32_t* sums = in.sums + row * m.cols / 32;
    vf total[N][R] = {};
    if constexpr (KIND == FP32 || KIND == BF16) {
        for (int64_t k = 0; k < words; k++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int n = 0; n < N; n++)
                    total[n][r] = multiply_add(total[n][r], w[n * words + k], broadcast(x[r * x_words + k]),
                                               std::integral_constant<int, KIND>());
    } else if constexpr (KIND == INT8) {
        vi acc[N][R] = {};
        for (int64_t k = 0; k < words; k++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int n = 0; n < N; n++)
                    acc[n][r] = multiply_add(acc[n][r], w[n * words + k], broadcast(x[r * x_words + k]));
        for (int r = 0; r < R; r++) {
            int32_t offset = 0;
            for (int64_t g = 0; g < m.cols / 32; g++) offset += 128 * sums[r * m.cols / 32 + g];
            for (int n = 0; n < N; n++)
                total[n][r] = __builtin_convertvector(acc[n][r] - offset, vf) * load(m.scale + (panel + n) * 16);
        }
    } else {
        for (int64_t g = 0; g < m.cols / 32; g++) {
            vi acc[N][R];
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++) acc[n][r] = broadcast(-8 * sums[r * m.cols / 32 + g]);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {  // a word holds columns c to c + 3 and c + 8 to c + 11 of 16
                const int64_t at = 8 * g + k / 2 * 4 + k % 2;
                vi low[N], high[N];
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) {
                    vi pairs = w[n * words + 4 * g + k];
                    low[n] = pairs & 0x0f0f0f0f;
                    high[n] = (pairs >> 4) & 0x0f0f0f0f;
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                    for (int n = 0; n < N; n++) {
                        acc[n][r] = multiply_add(acc[n][r], low[n], broadcast(x[r * x_words + at]));
                        acc[n][r] = multiply_add(acc[n][r], high[n], broadcast(x[r * x_words + at + 2]));
                    }
            }
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++)
                    total[n][r] += __builtin_convertvector(acc[n][r], vf) *
                                   load(m.scale + ((panel + n) * (m.cols / 32) + g) * 16);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float* to = y + (row + r) * m.rows + (panel + n) * 16;
            store(to, KIND == INT8 || KIND == INT4 ? total[n][r] * in.scale[row + r] : total[n][r]);
        }
}

template <int KIND> static void multiply_as(const Matrix& m, Range rows, const Input& in, float* y) {
    constexpr int N = KIND == INT4 ? 2 : 4;
    int64_t panel = rows.begin / 16;
    for (; panel + N <= rows.end / 16; panel += N)
        by_rows<6>(in.count, [&](auto R, int64_t row) { tile<KIND, N, R>(m, panel, in, row, y); });
    for (; panel < rows.end / 16; panel++)
        by_rows<6>(in.count, [&](auto R, int64_t row) { tile<KIND, 1, R>(m, panel, in, row, y); });
}

// One row of the matrix as fp32.
static void row_of(const Matrix& m, int64_t row, float* y) {
    const int64_t per_word = 32 / BITS[m.kind], words = m.cols / per_word;
    const int32_t* w = (const int32_t*)m.data + row / 16 * words * 16 + row % 16;
    for (int64_t k = 0; k < m.cols; k++) {
        if (m.kind == INT4) {
            const int at = k % 16 % 8, high = k % 16 / 8;
            const uint8_t pair = w[(k / 16 * 2 + at / 4) * 16] >> 8 * (at % 4);
            y[k] = ((high ? pair >> 4 : pair & 15) - 8) * m.scale[(row / 16 * (m.cols / 32) + k / 32) * 16 + row % 16];
            continue;
        }
        const uint32_t bits = (uint32_t)w[k / per_word * 16] >> BITS[m.kind] * (k % per_word);
        const uint32_t shifted = m.kind == FP32 ? bits : bits << 16;
        if (m.kind == INT8) y[k] = ((int)(bits & 255) - 128) * m.scale[row];
        else memcpy(y + k, &shifted, 4);
    }
}

// Products for CPUs with AVX512-VNNI: 64 rows of a matrix at a time, one in each lane of four vectors. int8 inputs and
// weights are multiplied as integers, bf16 ones in pairs.
//
// Memory holds panels of 64 rows, the last one perhaps of fewer. A word of 4 bytes has 1 fp32, 2 bf16, 4 int8 or 8 int4
// of one row, as they follow each other there; a panel has the first word of each of its rows, then the second, ...
// int8 weights are kept plus 128 and int4 plus 8, as the instruction wants one factor without sign; what that adds to
// a product is known from the sum of the inputs. The scales of int4 lie in panels too.
#pragma once

#include "cpu_vectors.h"
#ifdef __AMX_BF16__
#include "cpu_tiles.h"
#endif

constexpr int64_t BITS[] = {32, 16, 8, 4};

static inline vi broadcast(int32_t word) { return vi{} + word; }

// int8: one scale for each row of inputs.
static void narrow(int64_t kind, Input& in) {
    for (int64_t i = 0; i < in.count * in.cols && kind == BF16; i += LANES) store((bf16*)in.narrow + i, load(in.x + i));
    for (int64_t r = 0; r < in.count && kind >= INT8; r++) {
        const float* x = in.x + r * in.cols;
        vf most = {}, nan = {};
        for (int64_t k = 0; k < in.cols; k += LANES) {
            vf v = load(x + k);
            most = (vf)_mm512_max_ps((__m512)most, _mm512_abs_ps((__m512)v));
            nan += v * 0.0f;  // what is not finite has to show in the logits
        }
        const float limit = std::fmax(largest(most), 1e-12f), inverse = 127.0f / limit;
        in.scale[r] = limit / 127.0f + sum(nan), in.sum[r] = 0;
        for (int64_t k = 0; k < in.cols; k += 32) {
            __m512i low = _mm512_cvtps_epi32((__m512)(load(x + k) * inverse));
            __m512i high = _mm512_cvtps_epi32((__m512)(load(x + k + 16) * inverse));
            __m128i* to = (__m128i*)((int8_t*)in.narrow + r * in.cols + k);
            _mm_storeu_si128(to, _mm512_cvtsepi32_epi8(low));
            _mm_storeu_si128(to + 1, _mm512_cvtsepi32_epi8(high));
            in.group_sums[(r * in.cols + k) / 32] = _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
            in.sum[r] += in.group_sums[(r * in.cols + k) / 32];
        }
    }
}

template <int KIND> static inline vf multiply_add(vf acc, vi weights, vi x) {
    if (KIND == FP32) return acc + (vf)weights * (vf)x;
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)x);
#else
    acc += (vf)(weights << 16) * (vf)(x << 16);
    return acc + (vf)(weights & (int)0xffff0000) * (vf)(x & (int)0xffff0000);
#endif
}
static inline vi multiply_add_ints(vi acc, vi weights, vi x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, (__m512i)x);
}

// What all tiles know of a matrix: where the words of row `first` begin, and how far those of a row are apart.
template <int KIND> struct Panel {
    const int32_t* words;
    const float* scale;
    int64_t width, count;
    Panel(const Matrix& m, int64_t first) {
        const int64_t begin = first / 64 * 64;
        width = std::min<int64_t>(64, m.rows - begin), count = m.cols * BITS[KIND] / 32;
        words = (const int32_t*)m.data + begin * count + first - begin;
        scale = KIND == INT4 ? m.scale + begin * (m.cols / 32) + first - begin : m.scale + first;
    }
    int64_t at(int n) const { return n / 4 * 64 * count + n % 4 * 16; }  // of the n-th vector's words
};

#define EACH_R _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)
#define EACH_N _Pragma("GCC unroll 16") for (int n = 0; n < N; n++)

// y (R, 16 N) = R rows of inputs times N vectors of rows of the matrix: what is loaded once is used R or N times. Each
// sum runs over the columns in order, whatever R and N.
template <int KIND, int N, int R>
static inline void tile(const Panel<KIND>& p, const Input& in, int64_t row, float* y, int64_t next_y) {
    const int64_t x_words = in.cols * BITS[KIND == INT4 ? INT8 : KIND] / 32, groups = in.cols / 32;
    const int32_t *w = p.words, *x = (KIND == FP32 ? (const int32_t*)in.x : in.narrow) + row * x_words;
    vf total[N][R] = {};
    if constexpr (KIND == FP32 || KIND == BF16) {
        for (int64_t k = 0; k < p.count; k++, w += p.width) {
            vi weights[N];
            EACH_N weights[n] = *(const unaligned_vi*)(w + p.at(n));
            EACH_R EACH_N total[n][r] = multiply_add<KIND>(total[n][r], weights[n], broadcast(x[r * x_words + k]));
        }
    } else if constexpr (KIND == INT8) {
        vi acc[N][R];
        EACH_R EACH_N acc[n][r] = broadcast(-128 * in.sum[row + r]);
        for (int64_t k = 0; k < p.count; k++, w += p.width) {
            vi weights[N];
            EACH_N weights[n] = *(const unaligned_vi*)(w + p.at(n));
            EACH_R EACH_N acc[n][r] = multiply_add_ints(acc[n][r], weights[n], broadcast(x[r * x_words + k]));
        }
        EACH_R EACH_N total[n][r] = __builtin_convertvector(acc[n][r], vf) * load(p.scale + 16 * n);
    } else {
        for (int64_t g = 0; g < groups; g++) {
            vi acc[N][R];
            EACH_R EACH_N acc[n][r] = broadcast(-8 * in.group_sums[(row + r) * groups + g]);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++, w += p.width) {  // a word has columns c to c + 3 and c + 8 to c + 11 of 16
                const int64_t at = 8 * g + k / 2 * 4 + k % 2;
                EACH_N {
                    const vi pairs = *(const unaligned_vi*)(w + p.at(n));
                    const vi low = pairs & 0x0f0f0f0f, high = (pairs >> 4) & 0x0f0f0f0f;
                    EACH_R acc[n][r] = multiply_add_ints(acc[n][r], low, broadcast(x[r * x_words + at]));
                    EACH_R acc[n][r] = multiply_add_ints(acc[n][r], high, broadcast(x[r * x_words + at + 2]));
                }
            }
            EACH_N {
                const vf scale = load(p.scale + n / 4 * 64 * groups + g * p.width + n % 4 * 16);
                EACH_R total[n][r] += __builtin_convertvector(acc[n][r], vf) * scale;
            }
        }
    }
    EACH_R EACH_N store(y + r * next_y + 16 * n, KIND >= INT8 ? total[n][r] * in.scale[row + r] : total[n][r]);
}

// Rows of the matrix from a multiple of 64 on.
template <int KIND> static void multiply_as(const Matrix& m, Range rows, const Input& in, float* y) {
    constexpr int STREAMS = 4;  // panels at once for one row: memory is read fastest from a few places
    constexpr int R_MOST = KIND == INT4 ? 3 : 6;  // what fits 32 registers
#ifdef __AMX_BF16__
    // Tiles add products in bf16 in an order of their own, so all counts must take them. Sums of ints are exact: one
    // input, for which vectors are faster, and columns that do not fill tiles of 64 bytes can do without.
    if constexpr (KIND == BF16 || KIND == INT8) {
        const int64_t whole = rows.end / 64 * 64;
        if (TILES && rows.begin < whole && (KIND == BF16 || (m.cols % 64 == 0 && in.count > 1))) {
            multiply_by_tiles<KIND>(m, rows.begin, whole, in, y);
            rows.begin = whole;
        }
    }
#endif
    for (int64_t n = rows.begin; n < rows.end;) {
        const Panel<KIND> panel(m, n);
        const bool whole = panel.width == 64;
        if (in.count == 1 && n + 64 * STREAMS <= rows.end) {
            tile<KIND, 4 * STREAMS, 1>(panel, in, 0, y + n, m.rows);
            n += 64 * STREAMS;
            continue;
        }
        by_rows<R_MOST>(in.count, [&](auto R, int64_t row) {
            if (whole) tile<KIND, 4, R>(panel, in, row, y + row * m.rows + n, m.rows);
            else tile<KIND, 1, R>(panel, in, row, y + row * m.rows + n, m.rows);
        });
        n += whole ? 64 : 16;
    }
}

// One row of the matrix as fp32.
static void row_of(const Matrix& m, int64_t row, float* y) {
    const int64_t per_word = 32 / BITS[m.kind], begin = row / 64 * 64, width = std::min<int64_t>(64, m.rows - begin);
    const int32_t* w = (const int32_t*)m.data + begin * m.cols / per_word + row - begin;
    const float* scales = m.scale + begin * m.cols / 32 + row - begin;  // of int4
    for (int64_t k = 0; k < m.cols; k++) {
        if (m.kind == INT4) {
            const int at = k % 16 % 8, high = k % 16 / 8;
            const uint8_t pair = w[(k / 16 * 2 + at / 4) * width] >> 8 * (at % 4);
            y[k] = ((high ? pair >> 4 : pair & 15) - 8) * scales[k / 32 * width];
        } else {
            const uint32_t bits = (uint32_t)w[k / per_word * width] >> BITS[m.kind] * (k % per_word);
            const uint32_t widened = m.kind == FP32 ? bits : bits << 16;
            if (m.kind == INT8) y[k] = ((int)(bits & 255) - 128) * m.scale[row];
            else memcpy(y + k, &widened, 4);
        }
    }
}

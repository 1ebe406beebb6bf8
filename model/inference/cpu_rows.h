// Products for other CPUs, by vectors of 8 floats: weights lie row by row, are widened in registers, and all arithmetic
// is fp32. Every sum runs in one order whatever the number of inputs: lane by lane, four of them, over each 32 columns.
#pragma once

#include <vector>

#include "cpu_vectors.h"

#ifdef __AVX2__  // what g++ makes of the portable form below is half as fast
static inline vi load_ints(const uint16_t* p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline vi load_ints(const int8_t* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline vi load_ints(const uint8_t* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
template <class T> static inline vi load_ints(const T* p) {
    typedef T t8 __attribute__((vector_size(8 * sizeof(T))));
    t8 v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vi);
}
#endif

// 8 weights of a row, the i-th of the four eights from column k; those of int8 still without their scale.
template <int KIND> static inline vf weights(const Matrix& m, int64_t row, int64_t k, int i) {
    const int64_t at = row * m.cols + k;
    if (KIND == FP32) return load((const float*)m.data + at + 8 * i);
    if (KIND == BF16) return (vf)(load_ints((const uint16_t*)m.data + at + 8 * i) << 16);
    if (KIND == INT8) return __builtin_convertvector(load_ints((const int8_t*)m.data + at + 8 * i), vf);
    vi pairs = load_ints((const uint8_t*)m.data + at / 2 + i / 2 * 8);  // a byte holds columns c and c + 8 of 16
    return __builtin_convertvector((i % 2 ? pairs >> 4 : pairs & 15) - 8, vf) * m.scale[at / 32];
}

// Where the weights of a row from column k lie.
template <int KIND> static inline const char* address(const Matrix& m, int64_t row, int64_t k) {
    const uint64_t at = row * m.cols + k;
    return (const char*)m.data + (KIND == FP32 ? 4 * at : KIND == BF16 ? 2 * at : KIND == INT8 ? at : at / 2);
}

// Row n times one row of x. Four sums keep the multipliers busy, and memory is read fastest in its own order.
template <int KIND> static inline float dot(const Matrix& m, int64_t n, const float* x) {
    vf acc[4] = {};
    for (int64_t k = 0; k < m.cols; k += 32) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc[i] += weights<KIND>(m, n, k, i) * load(x + k + 8 * i);
    }
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3])) * (KIND == INT8 ? m.scale[n] : 1.0f);
}

// N rows of the matrix times R rows of x: what is loaded once is used R and N times. The four sums of dot() are made
// one after the other, because 12 fit the registers.
template <int KIND, int N, int R> static inline void tile(const Matrix& m, int64_t n, const float* x, float* y) {
    vf half[2][N][R];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vf acc[N][R] = {};
        for (int64_t k = 0; k < m.cols; k += 32) {
            __builtin_prefetch(address<KIND>(m, n + 4 + i, k));
            vf in[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) in[r] = load(x + r * m.cols + k + 8 * i);
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
                vf w = weights<KIND>(m, n + j, k, i);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) acc[j][r] += w * in[r];
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < N; j++)
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) half[i / 2][j][r] = i % 2 ? half[i / 2][j][r] + acc[j][r] : acc[j][r];
    }
#pragma GCC unroll 4
    for (int j = 0; j < N; j++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            y[r * m.rows + n + j] = sum(half[0][j][r] + half[1][j][r]) * (KIND == INT8 ? m.scale[n + j] : 1.0f);
}

// The same for many rows of x: R of them times 4 rows of the matrix, both in the order of narrow(), so that each of the
// four sums reads neighbours.
template <int R> static inline void wide_tile(const float* w, int64_t K, const float* x, vf (&out)[4][R]) {
    vf half[2][4][R];
    for (int i = 0; i < 4; i++) {
        vf acc[4][R] = {};
        for (int64_t k = 0; k < K / 4; k += 8) {
            vf in[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) in[r] = load(x + r * K + i * K / 4 + k);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const vf weight = load(w + j * K + i * K / 4 + k);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) acc[j][r] += weight * in[r];
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) half[i / 2][j][r] = i % 2 ? half[i / 2][j][r] + acc[j][r] : acc[j][r];
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) out[j][r] = half[0][j][r] + half[1][j][r];
}

constexpr int64_t MANY = 12;  // rows of x for which it pays to widen weights in memory

template <int KIND> static void multiply_many(const Matrix& m, Range rows, const Input& in, float* y) {
    std::vector<float> wide(4 * m.cols);
    const float* x = (const float*)in.narrow;
    for (int64_t n = rows.begin; n < rows.end; n += 4) {
        for (int64_t j = 0; j < 4; j++)
            for (int64_t k = 0; k < m.cols; k += 32)
                for (int i = 0; i < 4; i++)
                    store(&wide[j * m.cols + i * m.cols / 4 + k / 4], weights<KIND>(m, n + j, k, i));
        by_rows<3>(in.count, [&](auto R, int64_t first) {
            vf out[4][R];
            wide_tile<R>(wide.data(), m.cols, x + first * m.cols, out);
            for (int j = 0; j < 4; j++)
                for (int r = 0; r < R; r++)
                    y[(first + r) * m.rows + n + j] = sum(out[j][r]) * (KIND == INT8 ? m.scale[n + j] : 1.0f);
        });
    }
}

template <int KIND> static void multiply_as(const Matrix& m, Range rows, const Input& in, float* y) {
    if (in.count >= MANY) return multiply_many<KIND>(m, rows, in, y);
    if (in.count == 1) {
        for (int64_t n = rows.begin; n < rows.end; n++) y[n] = dot<KIND>(m, n, in.x);
        return;
    }
    for (int64_t n = rows.begin; n < rows.end; n += 4)
        for (int64_t b = 0, count; b < in.count; b += count) {
            const int64_t left = in.count - b;
            const float* x = in.x + b * m.cols;
            float* to = y + b * m.rows;
            count = left == 3 || left == 5 || left == 6 ? 3 : std::min<int64_t>(left, 4);
            if (count == 4) {
                tile<KIND, 2, 4>(m, n, x, to);
                tile<KIND, 2, 4>(m, n + 2, x, to);
            } else if (count == 3) tile<KIND, 4, 3>(m, n, x, to);
            else if (count == 2) tile<KIND, 4, 2>(m, n, x, to);
            else tile<KIND, 4, 1>(m, n, x, to);
        }
}

// Inputs stay fp32. Of many, each row's eights are sorted by the sum of dot() that they are part of.
static void narrow(int64_t, Input& in) {
    for (int64_t r = 0; r < in.count && in.count >= MANY; r++)
        for (int64_t k = 0; k < in.cols; k += 32)
            for (int i = 0; i < 4; i++)
                store((float*)in.narrow + r * in.cols + i * in.cols / 4 + k / 4, load(in.x + r * in.cols + k + 8 * i));
}

template <int KIND> static void row_as(const Matrix& m, int64_t row, float* y) {
    for (int64_t k = 0; k < m.cols; k += 32)
        for (int i = 0; i < 4; i++) {
            vf w = weights<KIND>(m, row, k, i);
            store(y + k + 8 * i, KIND == INT8 ? w * m.scale[row] : w);
        }
}

// One row of the matrix as fp32.
static void row_of(const Matrix& m, int64_t row, float* y) {
    switch (m.kind) {
        case FP32: return row_as<FP32>(m, row, y);
        case BF16: return row_as<BF16>(m, row, y);
        case INT8: return row_as<INT8>(m, row, y);
        default: return row_as<INT4>(m, row, y);
    }
}

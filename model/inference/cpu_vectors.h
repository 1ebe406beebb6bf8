// What both forms of the products (cpu_panels.h, cpu_rows.h) and the decoder share: vectors, matrices, one fp32 tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define PANELS 1
constexpr int LANES = 16;
#else
#define PANELS 0
constexpr int LANES = 8;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t unaligned_vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t bf16;  // the upper half of a float
typedef bf16 unaligned_bf16s __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline vf load(const float* p) { return *(const unaligned_vf*)p; }
static inline void store(float* p, vf v) { *(unaligned_vf*)p = v; }
static inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const unaligned_bf16s*)p, vi) << 16); }
static inline void store(bf16* p, vf v) {  // the nearest, ties to even
    const vi bits = (vi)v;
    *(unaligned_bf16s*)p = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, unaligned_bf16s);
}

#if PANELS
static inline float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
#elif defined(__AVX2__)
static inline float sum(vf v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
static inline float sum(vf v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
#endif

static inline float largest(vf v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = std::fmax(m, v[i]);
    return m;
}

// exp by 2^n * 2^f, |f| <= 1/2, with the Taylor polynomial of 2^f: relative error below 1e-6.
static inline vf exp(vf x) {
    x = x < -87.0f ? vf{} - 87.0f : x > 87.0f ? vf{} + 87.0f : x;
    vf t = x * 1.44269504f, rounded = (t + 12582912.0f) - 12582912.0f, f = t - rounded;
    vf p = 1.5403530e-4f * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * (vf)((__builtin_convertvector(rounded, vi) + 127) << 23);
}

// ------------------------------------------------------------------------------------------------ matrices

enum Kind { FP32, BF16, INT8, INT4 };
struct Matrix {  // (rows, cols): rows a multiple of 16, cols of 32
    const void* data;
    const float* scale;  // int8: one a row, int4: one for 32 weights
    int64_t rows, cols, kind;
};

// The rows of numbers that matrices are multiplied by: fp32, and what a form makes of them for narrow weights.
struct Input {
    const float* x;  // (count, cols)
    int64_t count, cols;
    int32_t* narrow;  // bf16 or int8 (count, cols)
    int32_t *sum, *group_sums;  // of int8, (count,) and (count, cols / 32)
    float* scale;               // of int8, (count,)
};

struct Range { int64_t begin, end; };

// This thread's share of n, in multiples of 64, the last one perhaps of 16.
static Range share(int64_t n) {
    int64_t threads = omp_get_num_threads(), id = omp_get_thread_num(), panels = (n + 63) / 64;
    return {panels * id / threads * 64, std::min(panels * (id + 1) / threads * 64, n)};
}

// f(how many rows, the first of them), at most MOST at once; their number is known at compile time.
template <int MOST, class F> static inline void by_rows(int64_t count, F f) {
    for (int64_t first = 0; first < count; first += MOST) {
        switch (std::min<int64_t>(count - first, MOST)) {
            case 1: f(std::integral_constant<int, 1>(), first); break;
            case 2: f(std::integral_constant<int, std::min(2, MOST)>(), first); break;
            case 3: f(std::integral_constant<int, std::min(3, MOST)>(), first); break;
            case 4: f(std::integral_constant<int, std::min(4, MOST)>(), first); break;
            case 5: f(std::integral_constant<int, std::min(5, MOST)>(), first); break;
            default: f(std::integral_constant<int, MOST>(), first);
        }
    }
}

// y (R, N vectors) = x (R, K) w (K, N vectors), in fp32. Every sum runs over k in order, whatever R and N.
template <int N, int R, class T>
static inline void fp32_tile(const T* w, int64_t next_vector, int64_t next_k, int64_t K, const float* x,
                             int64_t next_x, float* y, int64_t next_y) {
    vf acc[N][R] = {};
    for (int64_t k = 0; k < K; k++) {
        vf weights[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) weights[n] = load(w + n * next_vector + k * next_k);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) acc[n][r] += weights[n] * x[r * next_x + k];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) store(y + r * next_y + n * LANES, acc[n][r]);
}

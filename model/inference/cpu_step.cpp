// One token for each row of a batch through the whole dense decoder, on the CPU: what is left when a step of
// torch operations is reduced to the reading of the weights. Compiled and called by cpu_step.py.
//
// Weights are fp32, bf16, int8 (one scale a row) or int4 (one scale for 32 weights) and are widened in registers;
// all arithmetic is fp32. Every sum runs in one order whatever the number of rows, so that a row's logits are the
// same bits alone and in a batch.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef float unaligned_f8 __attribute__((vector_size(32), aligned(4), may_alias));

static inline f8 load(const float* p) { return *(const unaligned_f8*)p; }
static inline void store(float* p, f8 v) { *(unaligned_f8*)p = v; }
#ifdef __AVX2__  // what g++ makes of the portable form below is half as fast
#include <immintrin.h>
static inline i8 load_ints(const uint16_t* p) { return (i8)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline i8 load_ints(const int8_t* p) { return (i8)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline i8 load_ints(const uint8_t* p) { return (i8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline float sum(f8 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#else
template <class T> static inline i8 load_ints(const T* p) {
    typedef T t8 __attribute__((vector_size(8 * sizeof(T))));
    t8 v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, i8);
}
static inline float sum(f8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
#endif

// exp by 2^n * 2^f, |f| <= 1/2, with the Taylor polynomial of 2^f: relative error below 1e-6.
static inline f8 exp(f8 x) {
    x = x < -87.0f ? f8{} - 87.0f : x > 87.0f ? f8{} + 87.0f : x;
    f8 t = x * 1.44269504f, rounded = (t + 12582912.0f) - 12582912.0f, f = t - rounded;
    f8 p = 1.5403530e-4f * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * (f8)((__builtin_convertvector(rounded, i8) + 127) << 23);
}

// Waits for the other threads of a team: for some 50 us in a loop, then asleep. OpenMP's own barrier loops for
// milliseconds, while the thread that it waits for may need this very core.
struct Barrier {
    std::atomic<int> arrived{0}, phase{0};
    void wait() {
        int now = phase.load();
        if (arrived.fetch_add(1) + 1 == omp_get_num_threads()) {
            arrived.store(0);
            phase.store(now + 1);
            phase.notify_all();
            return;
        }
        for (int i = 0; i < 10000; i++)
            if (phase.load(std::memory_order_acquire) != now) return;
        while (phase.load() == now) phase.wait(now);
    }
};

// ------------------------------------------------------------------------------------------------ matrices

enum Kind { FP32, BF16, INT8, INT4 };
struct Matrix { const void* data; const float* scale; int64_t rows, cols, kind; };  // (rows, cols), row-major

// 8 weights of a row, the i-th of the four eights from column k; those of int8 still without their scale.
template <int KIND> static inline f8 weights(const Matrix& m, int64_t row, int64_t k, int i) {
    const int64_t at = row * m.cols + k;
    if (KIND == FP32) return load((const float*)m.data + at + 8 * i);
    if (KIND == BF16) return (f8)(load_ints((const uint16_t*)m.data + at + 8 * i) << 16);
    if (KIND == INT8) return __builtin_convertvector(load_ints((const int8_t*)m.data + at + 8 * i), f8);
    i8 pairs = load_ints((const uint8_t*)m.data + at / 2 + i / 2 * 8);  // a byte holds columns c and c + 8 of 16
    return __builtin_convertvector((i % 2 ? pairs >> 4 : pairs & 15) - 8, f8) * m.scale[at / 32];
}

// Where the weights of a row from column k lie.
template <int KIND> static inline const char* address(const Matrix& m, int64_t row, int64_t k) {
    const uint64_t at = row * m.cols + k;
    return (const char*)m.data + (KIND == FP32 ? 4 * at : KIND == BF16 ? 2 * at : KIND == INT8 ? at : at / 2);
}

// Row n times one row of x. Four sums keep the multipliers busy, and memory is read fastest in its own order.
template <int KIND> static inline float dot(const Matrix& m, int64_t n, const float* x) {
    f8 acc[4] = {};
    for (int64_t k = 0; k < m.cols; k += 32) {
        __builtin_prefetch(address<KIND>(m, n, k) + 1024);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) acc[i] += weights<KIND>(m, n, k, i) * load(x + k + 8 * i);
    }
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3])) * (KIND == INT8 ? m.scale[n] : 1.0f);
}

// N rows of the matrix times R rows of x: what is loaded once is used R and N times. The four sums of dot() are made
// one after the other, because 12 fit the registers.
template <int KIND, int N, int R> static inline void tile(const Matrix& m, int64_t n, const float* x, float* y) {
    f8 half[2][N][R];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        f8 acc[N][R] = {};
        for (int64_t k = 0; k < m.cols; k += 32) {
            __builtin_prefetch(address<KIND>(m, n + 4 + i, k));
            f8 in[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) in[r] = load(x + r * m.cols + k + 8 * i);
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) {
                f8 w = weights<KIND>(m, n + j, k, i);
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

template <int KIND> static void multiply(const Matrix& m, int64_t begin, int64_t end, const float* x, float* y, int B) {
    if (B == 1) {
        for (int64_t n = begin; n < end; n++) y[n] = dot<KIND>(m, n, x);
        return;
    }
    for (int64_t n = begin; n < end; n += 4)
        for (int b = 0, rows; b < B; b += rows) {
            const int left = B - b;
            const float* in = x + b * m.cols;
            float* out = y + b * m.rows;
            rows = left == 3 || left == 5 || left == 6 ? 3 : std::min(left, 4);
            if (rows == 4) {
                tile<KIND, 2, 4>(m, n, in, out);
                tile<KIND, 2, 4>(m, n + 2, in, out);
            } else if (rows == 3) tile<KIND, 4, 3>(m, n, in, out);
            else if (rows == 2) tile<KIND, 4, 2>(m, n, in, out);
            else tile<KIND, 4, 1>(m, n, in, out);
        }
}

struct Range { int64_t begin, end; };

// This thread's share of n, in multiples of 8.
static Range share(int64_t n) {
    int64_t threads = omp_get_num_threads(), id = omp_get_thread_num();
    return {n / 8 * id / threads * 8, n / 8 * (id + 1) / threads * 8};
}

// This thread's share of y (B, rows) = x (B, cols) times the matrix transposed.
static void linear(const Matrix& m, const float* x, float* y, int B) {
    const auto [begin, end] = share(m.rows);
    switch (m.kind) {
        case FP32: return multiply<FP32>(m, begin, end, x, y, B);
        case BF16: return multiply<BF16>(m, begin, end, x, y, B);
        case INT8: return multiply<INT8>(m, begin, end, x, y, B);
        default: return multiply<INT4>(m, begin, end, x, y, B);
    }
}

template <int KIND> static void embed_as(const Matrix& m, int64_t token, float* x) {
    for (int64_t k = 0; k < m.cols; k += 32)
        for (int i = 0; i < 4; i++) {
            f8 w = weights<KIND>(m, token, k, i);
            store(x + k + 8 * i, KIND == INT8 ? w * m.scale[token] : w);
        }
}

static void embed(const Matrix& m, int64_t token, float* x) {
    switch (m.kind) {
        case FP32: return embed_as<FP32>(m, token, x);
        case BF16: return embed_as<BF16>(m, token, x);
        case INT8: return embed_as<INT8>(m, token, x);
        default: return embed_as<INT4>(m, token, x);
    }
}

// ------------------------------------------------------------------------------------------------ the decoder

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm and k_norm: null without QK-norm
};
struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate;
    float eps, rope_factor;
    const Layer* layer;
    Matrix embedding;
    const float *norm, *inv_freq;
};
struct Cache { float *k, *v; int64_t layer_stride, slot_stride, head_stride; };  // in floats; keys are head_dim apart

static void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
    f8 squares = {};
    for (int64_t i = 0; i < n; i += 8) squares += load(x + i) * load(x + i);
    float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
    for (int64_t i = 0; i < n; i += 8) store(y + i, load(x + i) * scale * load(weight + i));
}

static void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

// One query head against n keys: y (D) = softmax(q k^T / sqrt(D)) v.
static void attend(const float* q, const float* keys, const float* values, int64_t n, int64_t D, float* scores, float* y) {
    float largest = -INFINITY, scale = 1.0f / std::sqrt((float)D);
    for (int64_t j = 0; j < n; j++) {
        f8 acc = {};
        for (int64_t d = 0; d < D; d += 8) acc += load(q + d) * load(keys + j * D + d);
        scores[j] = sum(acc) * scale;
        largest = std::fmax(largest, scores[j]);
    }
    for (int64_t j = n; j < (n + 7) / 8 * 8; j++) scores[j] = -INFINITY;
    f8 total = {};
    for (int64_t j = 0; j < n; j += 8) {
        f8 p = exp(load(scores + j) - largest);
        store(scores + j, p);
        total += p;
    }
    float inverse = 1.0f / sum(total);
    for (int64_t d = 0; d < D; d += 16) {
        f8 low = {}, high = {};
        for (int64_t j = 0; j < n; j++) {
            low += scores[j] * load(values + j * D + d);
            high += scores[j] * load(values + j * D + d + 8);
        }
        store(y + d, low * inverse);
        store(y + d + 8, high * inverse);
    }
}

static void add_product(const Matrix& m, const float* x, float* product, float* residual, int B) {
    linear(m, x, product, B);
    const auto [begin, end] = share(m.rows);
    for (int b = 0; b < B; b++)
        for (int64_t i = begin; i < end; i++)
            residual[b * m.rows + i] += product[b * m.rows + i];
}

// Floats of scratch memory that step() needs.
extern "C" int64_t scratch_size(const Model* m, int64_t B, int64_t longest, int64_t threads) {
    int64_t D = m->head_dim, widest = m->heads * D + 2 * m->kv_heads * D;
    return B * (2 * m->hidden + widest + m->heads * D + 2 * m->intermediate + D) + threads * (longest + 16 + B * m->hidden);
}

// tokens, positions (B,): the new tokens and where they stand; row b works on slot b of the cache. logits (B, vocab).
extern "C" void step(const Model* m, Cache cache, const int64_t* tokens, const int64_t* positions, int64_t B, int64_t longest,
                     int64_t threads, float* scratch, float* logits) {
    const int64_t H = m->hidden, D = m->head_dim, NQ = m->heads * D, NK = m->kv_heads * D, I = m->intermediate;
    const int64_t group = m->heads / m->kv_heads;
    float *x = scratch, *product = x + B * H, *q = product + B * H, *k = q + B * NQ, *v = k + B * NK;
    float *attended = v + B * NK, *gate = attended + B * NQ, *up = gate + B * I, *cos = up + B * I, *sin = cos + B * D / 2;
    float* own = sin + B * D / 2;

    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        const Range mine = share(I);
        float* scores = own + id * (longest + 16 + B * H);
        float* normed = scores + longest + 16;  // by each thread for itself: cheaper than to wait for another
        for (int64_t b = id; b < B; b += team) {
            embed(m->embedding, tokens[b], x + b * H);
            for (int64_t i = 0; i < D / 2; i++) {
                float angle = positions[b] * m->inv_freq[i];
                cos[b * D / 2 + i] = std::cos(angle) * m->rope_factor;
                sin[b * D / 2 + i] = std::sin(angle) * m->rope_factor;
            }
        }
        barrier.wait();
        for (int64_t l = 0; l < m->layers; l++) {
            const Layer& layer = m->layer[l];
            for (int64_t b = 0; b < B; b++) rms_norm(x + b * H, layer.input_norm, H, m->eps, normed + b * H);
            linear(layer.q, normed, q, B);
            linear(layer.k, normed, k, B);
            linear(layer.v, normed, v, B);
            barrier.wait();
            for (int64_t i = id; i < B * m->kv_heads; i += team) {
                int64_t b = i / m->kv_heads, h = i % m->kv_heads, at = positions[b];
                const float *c = cos + b * D / 2, *s = sin + b * D / 2;
                int64_t offset = l * cache.layer_stride + b * cache.slot_stride + h * cache.head_stride;
                float *keys = cache.k + offset, *values = cache.v + offset, *new_k = k + b * NK + h * D;
                if (layer.k_norm) rms_norm(new_k, layer.k_norm, D, m->eps, new_k);
                rotate(new_k, c, s, D / 2);
                memcpy(keys + at * D, new_k, D * sizeof(float));
                memcpy(values + at * D, v + b * NK + h * D, D * sizeof(float));
                for (int64_t g = h * group; g < (h + 1) * group; g++) {
                    float* query = q + b * NQ + g * D;
                    if (layer.q_norm) rms_norm(query, layer.q_norm, D, m->eps, query);
                    rotate(query, c, s, D / 2);
                    attend(query, keys, values, at + 1, D, scores, attended + b * NQ + g * D);
                }
            }
            barrier.wait();
            add_product(layer.o, attended, product, x, B);
            barrier.wait();
            for (int64_t b = 0; b < B; b++) rms_norm(x + b * H, layer.post_norm, H, m->eps, normed + b * H);
            linear(layer.gate, normed, gate, B);
            linear(layer.up, normed, up, B);
            for (int b = 0; b < B; b++)
                for (int64_t i = mine.begin; i < mine.end; i += 8) {  // what this thread computed itself
                    f8 g = load(gate + b * I + i);
                    store(gate + b * I + i, g / (1.0f + exp(-g)) * load(up + b * I + i));
                }
            barrier.wait();
            add_product(layer.down, gate, product, x, B);
            barrier.wait();
        }
        for (int64_t b = 0; b < B; b++) rms_norm(x + b * H, m->norm, H, m->eps, normed + b * H);
        linear(m->embedding, normed, logits, B);
        barrier.wait();
    }
}

// New tokens of some sequences through the whole decoder, on the CPU: what is left when a forward of torch operations
// is reduced to the reading of the weights. Compiled and called by cpu_step.py.
//
// A row is one token of one sequence; sequences may have several. Every sum runs in one order whatever the number of
// rows, so that a token's logits are the same bits alone and in a batch, from a prompt and from decoding.

#include <atomic>

#include "cpu_vectors.h"
#if PANELS
#include "cpu_panels.h"
#else
#include "cpu_rows.h"
#endif

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

// ------------------------------------------------------------------------------------------------ the model

struct Linear { Matrix weight, a, b; };  // with an adapter: weight + b a; without one, a has no rows
struct FeedForward { Linear gate, up, down; };
struct Layer {
    Linear q, k, v, o;
    Matrix router;
    const FeedForward* feed_forwards;  // the experts, then those that see every row: of a dense model, the only one
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // q_norm and k_norm: null without QK-norm
};
struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate;
    int64_t experts, experts_per_row, shared, normalise;
    float eps, rope_factor;
    const Layer* layer;
    Matrix embedding;
    const float *norm, *inv_freq;
};

// Blocks of LANES positions: of keys (head_dim, LANES), of values (LANES, head_dim); fp32 or bf16. Strides in numbers.
struct Cache { void *k, *v; int64_t layer_stride, slot_stride, head_stride, in_bf16; };

struct Rows {  // those of a slot are neighbours, their positions in order and without a gap
    const int64_t *tokens, *slots, *positions, *wanted;  // (count,), and the rows whose logits are wanted
    int64_t count, wanted_count;
};

static void multiply(const Matrix& m, Range rows, const Input& in, float* y) {
    switch (m.kind) {
        case FP32: return multiply_as<FP32>(m, rows, in, y);
        case BF16: return multiply_as<BF16>(m, rows, in, y);
        case INT8: return multiply_as<INT8>(m, rows, in, y);
        default: return multiply_as<INT4>(m, rows, in, y);
    }
}

static void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
    vf squares = {};
    for (int64_t i = 0; i < n; i += LANES) squares += load(x + i) * load(x + i);
    float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
    for (int64_t i = 0; i < n; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
}

static void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

// In place: the exponentials of n scores, then zeros up to `padded`; returns 1 / their sum.
static float softmax(float* scores, int64_t n, int64_t padded) {
    const int64_t end = (n + LANES - 1) / LANES * LANES;
    for (int64_t j = n; j < end; j++) scores[j] = -INFINITY;
    vf most = load(scores), total = {};
    for (int64_t j = LANES; j < end; j += LANES) most = load(scores + j) > most ? load(scores + j) : most;
    const float limit = largest(most);
    for (int64_t j = 0; j < end; j += LANES) {
        vf p = exp(load(scores + j) - limit);
        store(scores + j, p);
        total += p;
    }
    for (int64_t j = n; j < padded; j++) scores[j] = 0;
    return 1.0f / sum(total);
}

constexpr int QUERIES = PANELS ? 6 : 4;  // rows that an fp32 tile holds in registers, times VECTORS
constexpr int VECTORS = PANELS ? 4 : 2;

// Queries of one head, or of heads with one key head, against a slot's keys: y = softmax(q k^T / sqrt(D)) v.
// Query r (of count, next_q apart, as the results y) sees n + r * grow keys.
template <class T>
static void attend(const float* q, int64_t next_q, int64_t count, int64_t n, int64_t grow, const T* keys,
                   const T* values, int64_t D, float* scores, float* y) {
    by_rows<QUERIES>(count, [&](auto R, int64_t first) {
        const float* x = q + first * next_q;
        float* to = y + first * next_q;
        const float scale = 1.0f / std::sqrt((float)D);
        const int64_t most = n + (first + R - 1) * grow, padded = (most + LANES - 1) / LANES * LANES;
        int64_t j = 0;
        for (; j + VECTORS * LANES <= padded; j += VECTORS * LANES)
            fp32_tile<VECTORS, R>(keys + j * D, LANES * D, LANES, D, x, next_q, scores + j, padded);
        for (; j < padded; j += LANES) fp32_tile<1, R>(keys + j * D, 0, LANES, D, x, next_q, scores + j, padded);
        float inverse[R];
        for (int r = 0; r < R; r++) {
            float* mine = scores + r * padded;
            for (j = 0; j < padded; j += LANES) store(mine + j, load(mine + j) * scale);
            inverse[r] = softmax(mine, n + (first + r) * grow, padded);
        }
        int64_t d = 0;
        for (; d + VECTORS * LANES <= D; d += VECTORS * LANES)
            fp32_tile<VECTORS, R>(values + d, LANES, D, most, scores, padded, to + d, next_q);
        for (; d < D; d += LANES) fp32_tile<1, R>(values + d, 0, D, most, scores, padded, to + d, next_q);
        for (int r = 0; r < R; r++)
            for (d = 0; d < D; d += LANES) store(to + r * next_q + d, load(to + r * next_q + d) * inverse[r]);
    });
}

// ------------------------------------------------------------------------------------------------ the step

// Memory that is handed out piece by piece, in 64 bytes.
struct Arena {
    float* base;
    int64_t used;
    float* take(int64_t floats) {
        float* p = base + used;
        used += (floats + 15) / 16 * 16;
        return p;
    }
};

struct Shared {  // by all threads, each of which writes its own columns or rows
    float *x, *q, *k, *v, *attended, *gate, *up, *product, *adapted, *cos, *sin;
    Shared(const Model& m, int64_t B, Arena& arena) {
        const int64_t Q = m.heads * m.head_dim, K = m.kv_heads * m.head_dim;
        x = arena.take(B * m.hidden), q = arena.take(B * Q), k = arena.take(B * K), v = arena.take(B * K);
        attended = arena.take(B * Q), gate = arena.take(B * m.intermediate), up = arena.take(B * m.intermediate);
        product = arena.take(B * m.hidden), adapted = arena.take(B * std::max({m.hidden, Q, m.intermediate}));
        cos = arena.take(B * m.head_dim / 2), sin = arena.take(B * m.head_dim / 2);
    }
};

struct Own {  // by each thread for itself: to compute a row again is cheaper than to wait for another thread
    float *normed, *chosen, *weights, *router, *low, *scores;
    int64_t* rows;
    Input in, low_in;
    Own(const Model& m, int64_t B, int64_t longest, int64_t rank, Arena& arena) {
        const int64_t widest = std::max({m.hidden, m.heads * m.head_dim, m.intermediate});
        normed = arena.take(B * m.hidden), chosen = arena.take(B * m.hidden), low = arena.take(B * rank);
        weights = arena.take(B), router = arena.take(B * (2 * m.experts + 15)), rows = (int64_t*)arena.take(2 * B);
        scores = arena.take(QUERIES * (longest + LANES));
        in = {nullptr, 0, 0, (int32_t*)arena.take(B * widest), (int32_t*)arena.take(B),
              (int32_t*)arena.take(B * widest / 32), arena.take(B)};
        low_in.narrow = (int32_t*)arena.take(B * rank);
    }
};

struct Step {
    const Model& m;
    const Cache cache;
    const Rows rows;
    Barrier& barrier;
    Shared& all;
    Own& own;
    const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();

    // x (count, cols) as products with matrices of this one's kind want it.
    const Input& input(const float* x, int64_t count, const Matrix& m) { return input(x, count, m, own.in); }
    static const Input& input(const float* x, int64_t count, const Matrix& m, Input& in) {
        in.x = x, in.count = count, in.cols = m.cols;
        narrow(m.kind, in);
        return in;
    }

    // This thread's share of the columns of y (count, rows of the weight).
    void linear(const Linear& l, const Input& in, float* y) {
        const Range mine = share(l.weight.rows);
        multiply(l.weight, mine, in, y);
        if (l.a.rows == 0) return;
        multiply(l.a, {0, l.a.rows}, in, own.low);
        multiply(l.b, mine, input(own.low, in.count, l.b, own.low_in), all.adapted);
        for (int64_t r = 0; r < in.count; r++)
            for (int64_t i = mine.begin; i < mine.end; i++) y[r * l.b.rows + i] += all.adapted[r * l.b.rows + i];
    }

    void normalise(const float* weight) {
        for (int64_t r = 0; r < rows.count; r++)
            rms_norm(all.x + r * m.hidden, weight, m.hidden, m.eps, own.normed + r * m.hidden);
    }

    void embed() {
        const int64_t half = m.head_dim / 2;
        for (int64_t r = id; r < rows.count; r += team) {
            row_of(m.embedding, rows.tokens[r], all.x + r * m.hidden);
            for (int64_t i = 0; i < half; i++) {
                float angle = rows.positions[r] * m.inv_freq[i];
                all.cos[r * half + i] = std::cos(angle) * m.rope_factor;
                all.sin[r * half + i] = std::sin(angle) * m.rope_factor;
            }
        }
        barrier.wait();
    }

    template <class T> T* cached(void* kept, int64_t layer, int64_t row, int64_t head) {
        return (T*)kept + layer * cache.layer_stride + rows.slots[row] * cache.slot_stride + head * cache.head_stride;
    }

    // Norm and rotation of each row's queries and keys of one key head, which goes into the cache with its values.
    template <class T> void place(const Layer& layer, int64_t l, int64_t r, int64_t h) {
        const int64_t D = m.head_dim, at = rows.positions[r], group = m.heads / m.kv_heads;
        const float *cos = all.cos + r * D / 2, *sin = all.sin + r * D / 2;
        for (int64_t g = h * group; g < (h + 1) * group; g++) {
            float* q = all.q + (r * m.heads + g) * D;
            if (layer.q_norm) rms_norm(q, layer.q_norm, D, m.eps, q);
            rotate(q, cos, sin, D / 2);
        }
        float *k = all.k + (r * m.kv_heads + h) * D, *v = all.v + (r * m.kv_heads + h) * D;
        if (layer.k_norm) rms_norm(k, layer.k_norm, D, m.eps, k);
        rotate(k, cos, sin, D / 2);
        T* key = cached<T>(cache.k, l, r, h) + at / LANES * LANES * D + at % LANES;
        T stored[LANES];
        for (int64_t d = 0; d < D; d += LANES) {
            store(stored, load(k + d));
            for (int64_t i = 0; i < LANES; i++) key[(d + i) * LANES] = stored[i];
            store(cached<T>(cache.v, l, r, h) + at * D + d, load(v + d));
        }
    }

    void attention(const Layer& layer, int64_t l) {
        normalise(layer.input_norm);
        const Input& in = input(own.normed, rows.count, layer.q.weight);
        linear(layer.q, in, all.q);
        linear(layer.k, in, all.k);
        linear(layer.v, in, all.v);
        barrier.wait();
        if (cache.in_bf16) attend_all<bf16>(layer, l);
        else attend_all<float>(layer, l);
        barrier.wait();
        linear(layer.o, input(all.attended, rows.count, layer.o.weight), all.product);
        const Range mine = share(m.hidden);
        for (int64_t r = 0; r < rows.count; r++)
            for (int64_t i = mine.begin; i < mine.end; i++) all.x[r * m.hidden + i] += all.product[r * m.hidden + i];
        barrier.wait();
    }

    // all.attended from all.q, all.k and all.v, by way of the cache.
    template <class T> void attend_all(const Layer& layer, int64_t l) {
        const int64_t D = m.head_dim, Q = m.heads * D, group = m.heads / m.kv_heads;
        for (int64_t i = id; i < rows.count * m.kv_heads; i += team)
            place<T>(layer, l, i / m.kv_heads, i % m.kv_heads);
        barrier.wait();
        int64_t item = 0;
        for (int64_t r = 0, count; r < rows.count; r += count) {  // rows of one slot, as many as a tile takes
            count = 1;
            while (count < QUERIES && r + count < rows.count && rows.slots[r + count] == rows.slots[r]) count++;
            for (int64_t h = 0; h < m.kv_heads; h++) {
                if (item++ % team != id) continue;
                const T *keys = cached<T>(cache.k, l, r, h), *values = cached<T>(cache.v, l, r, h);
                const int64_t n = rows.positions[r] + 1, first = r * Q + h * group * D;
                const float* q = all.q + first;
                float* y = all.attended + first;
                if (count == 1) attend(q, D, group, n, 0, keys, values, D, own.scores, y);
                for (int64_t g = 0; g < group && count > 1; g++)
                    attend(q + g * D, Q, count, n, 1, keys, values, D, own.scores, y + g * D);
            }
        }
    }

    // Adds weight[r] times what the feed-forward makes of x (count, hidden) to row own.rows[r] of the residual.
    void feed_forward(const FeedForward& f, const float* x, int64_t count) {
        const int64_t I = m.intermediate;
        const Range mine = share(I), columns = share(m.hidden);
        const Input& in = input(x, count, f.gate.weight);
        linear(f.gate, in, all.gate);
        linear(f.up, in, all.up);
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = r * I + mine.begin; i < r * I + mine.end; i += LANES) {  // this thread's own
                vf g = load(all.gate + i);
                store(all.gate + i, g / (1.0f + exp(-g)) * load(all.up + i));
            }
        barrier.wait();
        linear(f.down, input(all.gate, count, f.down.weight), all.product);
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = columns.begin; i < columns.end; i++)
                all.x[own.rows[r] * m.hidden + i] += own.weights[r] * all.product[r * m.hidden + i];
        barrier.wait();
    }

    // The weights (experts,) of one row from its router's logits: of all but the best they are 0.
    void route(const float* logits, float* weights) {
        float most = *std::max_element(logits, logits + m.experts), total = 0, kept = 0;
        for (int64_t e = 0; e < m.experts; e++) total += std::exp(logits[e] - most);
        std::fill(weights, weights + m.experts, 0.0f);
        for (int64_t i = 0; i < m.experts_per_row; i++) {
            int64_t best = -1;
            for (int64_t e = 0; e < m.experts; e++)
                if (weights[e] == 0 && (best < 0 || logits[e] > logits[best])) best = e;
            kept += weights[best] = std::exp(logits[best] - most) / total;
        }
        for (int64_t e = 0; e < m.experts && m.normalise; e++) weights[e] /= kept;
    }

    void feed_forwards(const Layer& layer) {
        normalise(layer.post_norm);
        float* routed = own.router + rows.count * layer.router.rows;
        if (m.experts)
            multiply(layer.router, {0, layer.router.rows}, input(own.normed, rows.count, layer.router), own.router);
        for (int64_t r = 0; r < rows.count && m.experts; r++)
            route(own.router + r * layer.router.rows, routed + r * m.experts);
        for (int64_t e = 0; e < m.experts; e++) {
            int64_t count = 0;
            for (int64_t r = 0; r < rows.count; r++) {
                if (routed[r * m.experts + e] == 0) continue;
                memcpy(own.chosen + count * m.hidden, own.normed + r * m.hidden, m.hidden * sizeof(float));
                own.weights[count] = routed[r * m.experts + e];
                own.rows[count++] = r;
            }
            if (count) feed_forward(layer.feed_forwards[e], own.chosen, count);
        }
        for (int64_t r = 0; r < rows.count; r++) own.rows[r] = r, own.weights[r] = 1;
        for (int64_t s = 0; s < m.shared; s++) feed_forward(layer.feed_forwards[m.experts + s], own.normed, rows.count);
    }

    void run(float* logits) {
        embed();
        for (int64_t l = 0; l < m.layers; l++) {
            attention(m.layer[l], l);
            feed_forwards(m.layer[l]);
        }
        for (int64_t i = 0; i < rows.wanted_count; i++)
            rms_norm(all.x + rows.wanted[i] * m.hidden, m.norm, m.hidden, m.eps, own.normed + i * m.hidden);
        if (rows.wanted_count)
            multiply(m.embedding, share(m.embedding.rows), input(own.normed, rows.wanted_count, m.embedding), logits);
        barrier.wait();
    }
};

// Whether products of bf16 and int8 are made in the tiles of AMX.
extern "C" int64_t tiles() {
#ifdef __AMX_BF16__
    return TILES;
#else
    return 0;
#endif
}

// Positions in a block of the cache; a matrix lies in panels if they are 16.
extern "C" int64_t lanes() { return LANES; }

// Floats of scratch memory that step() needs.
extern "C" int64_t scratch_size(const Model* m, int64_t count, int64_t longest, int64_t rank, int64_t threads) {
    Arena arena = {nullptr, 0};
    Shared all(*m, count, arena);
    for (int64_t i = 0; i < threads; i++) Own own(*m, count, longest, rank, arena);
    return arena.used;
}

// Writes the rows' keys and values into the cache, and logits (wanted_count, rows of the embedding).
// longest: the largest position plus one; rank: rows of the adapters' largest matrix a.
extern "C" void step(const Model* m, Cache cache, Rows rows, int64_t longest, int64_t rank, int64_t threads,
                     float* scratch, float* logits) {
    Barrier barrier;
    Arena arena = {scratch, 0};
    Shared all(*m, rows.count, arena);
    const int64_t before = arena.used;
    Arena measure = {nullptr, 0};
    Own(*m, rows.count, longest, rank, measure);
#pragma omp parallel num_threads(threads)
    {
        Arena mine = {scratch, before + omp_get_thread_num() * measure.used};
        Own own(*m, rows.count, longest, rank, mine);
        Step{*m, cache, rows, barrier, all, own}.run(logits);
    }
}

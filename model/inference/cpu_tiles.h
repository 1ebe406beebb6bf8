// Products for CPUs with AMX: 16 inputs at a time by 16 rows of a panel (cpu_panels.h), in tiles of 16 x 64 bytes. A
// tile product takes as long for one input as for 16, and less than the reading of the weights.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "cpu_vectors.h"

// Linux lends the registers to processes that ask (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static const bool TILES = syscall(SYS_arch_prctl, 0x1023, 18) == 0;

// Tiles 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights. Up to 16 inputs: tile 4 times four tiles of weights. Up to 32,
// `more` beside the first `rows`: tiles 4 and 5 times two tiles of weights, 2 and 3 being the sums of tile 5.
static void configure_tiles(int rows, int more) {
    struct { uint8_t palette = 1, start = 0, zero[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
    const int others = more ? more : rows, of[] = {rows, rows, others, others, rows, others, 16, 16};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = of[i];
    // Not _tile_loadconfig(): in g++ 12 it says neither that all of `shape` is read, nor that what was stored before has
    // to be in memory for the loads of tiles that follow.
    asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
}

// Sums in fp32 of products in bf16; in int32 of inputs with sign and weights without. A macro, as the names of tiles
// must be literals.
#define MULTIPLY_TILES(sums, inputs, weights)                          \
    if constexpr (KIND == BF16) {                                      \
        _tile_dpbf16ps(sums, inputs, weights);                         \
    } else {                                                           \
        _tile_dpbsud(sums, inputs, weights);                           \
    }

// to (16 or, with `more`, 32 rows, 64) = inputs x times a whole panel w of so many words a row; next_to in words.
template <int KIND>
static void panel_by_tiles(const int32_t* w, int64_t words, const int32_t* x, bool more, int32_t* to, int64_t next_to) {
    const int32_t* lower = x + 16 * words;
    for (int half = 0; half < (more ? 2 : 1); half++) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < words; k += 16) {
            const int32_t* from = w + 64 * k + 32 * half;
            _tile_loadd(4, x + k, 4 * words);
            _tile_loadd(6, from, 256);
            MULTIPLY_TILES(0, 4, 6)
            _tile_loadd(7, from + 16, 256);
            MULTIPLY_TILES(1, 4, 7)
            if (more) {
                _tile_loadd(5, lower + k, 4 * words);
                MULTIPLY_TILES(2, 5, 6)
                MULTIPLY_TILES(3, 5, 7)
            } else {
                _tile_loadd(6, from + 32, 256);
                MULTIPLY_TILES(2, 4, 6)
                _tile_loadd(7, from + 48, 256);
                MULTIPLY_TILES(3, 4, 7)
            }
        }
        int32_t *mine = to + 32 * half, *others = more ? mine + 16 * next_to : mine + 32;
        _tile_stored(0, mine, 4 * next_to);
        _tile_stored(1, mine + 16, 4 * next_to);
        _tile_stored(2, others, 4 * next_to);
        _tile_stored(3, others + 16, 4 * next_to);
    }
}

// The columns of y (count, rows of m) from first to last, both multiples of 64: the same bits whatever the count.
template <int KIND>
static void multiply_by_tiles(const Matrix& m, int64_t first, int64_t last, const Input& in, float* y) {
    const int64_t words = m.cols / (KIND == BF16 ? 2 : 4), whole = in.count / 32 * 32;
    alignas(64) int32_t ints[32 * 64];
    auto multiply_inputs = [&](int64_t begin, int64_t end) {  // in blocks of 32
        const int count = std::min<int64_t>(32, end - begin);
        configure_tiles(std::min(count, 16), std::max(count - 16, 0));
        for (int64_t n = first; n < last; n += 64)
            for (int64_t row = begin; row < end; row += 32) {
                const int32_t* w = (const int32_t*)m.data + n * words;
                const int32_t* x = in.narrow + row * words;
                float* out = y + row * m.rows + n;
                if (KIND == BF16) panel_by_tiles<KIND>(w, words, x, count > 16, (int32_t*)out, m.rows);
                else panel_by_tiles<KIND>(w, words, x, count > 16, ints, 64);
                for (int r = 0; r < count && KIND == INT8; r++)
                    for (int i = 0; i < 64; i += LANES) {
                        const vi sums = *(const unaligned_vi*)(ints + 64 * r + i) - 128 * in.sum[row + r];
                        const vf product = __builtin_convertvector(sums, vf) * load(m.scale + n + i);
                        store(out + r * m.rows + i, product * in.scale[row + r]);
                    }
            }
    };
    if (whole) multiply_inputs(0, whole);
    if (whole < in.count) multiply_inputs(whole, in.count);
    _tile_release();
}

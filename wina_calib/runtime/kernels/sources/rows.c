/* What is computed for many rows: the mask and the RMSNorm in one pass each, and a product with weights (in, out) in bfloat16.

   oneDNN multiplies a few rows by weights that lie in this order 1.2 to 2.4 times as slowly as by those of a stock model. */

#include <stdlib.h>

#include "numbers.h"

int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* From x (rows, in) to y, with zeros for what is dropped; `open` (rows,) or null says which rows are kept whole. */
#define MASK(TYPE)                                                                                                    \
    void mask_##TYPE(const TYPE *x, const float *norm, const float *threshold, const uint8_t *open, TYPE *y,          \
                     int64_t rows, int64_t in, int threads) {                                                         \
        const float limit = *threshold;                                                                               \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t r = 0; r < rows; r++) {        \
            const TYPE *restrict from = x + r * in;                                                                   \
            TYPE *restrict to = y + r * in;                                                                           \
            const float cut = open && open[r] ? -1.0f : limit;                                                        \
            for (int64_t i = 0; i < in; i++) {                                                                        \
                const float v = widen_##TYPE(from[i]), size = v < 0 ? -v : v;                                         \
                to[i] = size * norm[i] <= cut ? 0 : from[i];                                                          \
            }                                                                                                         \
        }                                                                                                             \
    }

/* RMSNorms of x (rows, in). */
#define NORM(TYPE)                                                                                                    \
    void norm_##TYPE(const TYPE *x, const TYPE *weight, TYPE *y, float epsilon, int64_t rows, int64_t in,             \
                     int threads) {                                                                                   \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t r = 0; r < rows; r++)          \
            normed_##TYPE(x + r * in, weight, y + r * in, epsilon, in);                                               \
    }

MASK(float32)
MASK(bfloat16)
NORM(float32)
NORM(bfloat16)

/* Processors that multiply pairs of bfloat16; those with units for whole matrices are left to oneDNN. */
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include <immintrin.h>

#define STRIP 32   /* outputs whose weights are one vector */
#define STRIPS 2   /* strips that a thread works on at a time */
#define DEPTH 128  /* inputs whose weights are in the first cache at a time, half of it, as others may share it */
#define TILE 8     /* rows whose sums are in registers */
#define BLOCK 512  /* rows whose sums are in the second cache */

/* A strip of two weight rows as pairs (k, k + 1) of each output. Sums of outputs 0-3, 8-11, ... and of the others are apart. */
static inline void pack_pair(const bfloat16 *row, const bfloat16 *next, __mmask32 inside, __m512i *pair) {
    const __m512i a = _mm512_maskz_loadu_epi16(inside, row);
    const __m512i b = next ? _mm512_maskz_loadu_epi16(inside, next) : _mm512_setzero_si512();
    pair[0] = _mm512_unpacklo_epi16(a, b);
    pair[1] = _mm512_unpackhi_epi16(a, b);
}

/* sums[r] += x[r, :] @ strip for the rows of a tile, two inputs at a time; `stride` is x's. */
static inline void add_tile(const bfloat16 *x, int64_t stride, const __m512i *strip, int64_t pairs, float *sums) {
    __m512 low[TILE], high[TILE];
    for (int r = 0; r < TILE; r++) {
        low[r] = _mm512_load_ps(sums + r * STRIP);
        high[r] = _mm512_load_ps(sums + r * STRIP + LANES);
    }
    for (int64_t k = 0; k < pairs; k++) {
        const __m512bh a = (__m512bh)strip[2 * k], b = (__m512bh)strip[2 * k + 1];
        for (int r = 0; r < TILE; r++) {
            int32_t both;
            memcpy(&both, x + r * stride + 2 * k, sizeof both);
            const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
            low[r] = _mm512_dpbf16_ps(low[r], a, value);
            high[r] = _mm512_dpbf16_ps(high[r], b, value);
        }
    }
    for (int r = 0; r < TILE; r++) {
        _mm512_store_ps(sums + r * STRIP, low[r]);
        _mm512_store_ps(sums + r * STRIP + LANES, high[r]);
    }
}

/* y (rows, out) = x (rows, in) @ weight (in, out) + bias (out,) or null. Threads share the outputs, and a row's sums are
   added in one order, whatever the number of either. Returns 1 without memory. */
int product_bfloat16(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias, bfloat16 *y, int64_t rows, int64_t in,
                     int64_t out, int threads) {
    const int64_t stride = (in + 1) / 2 * 2, strips = (out + STRIP - 1) / STRIP;
    const int64_t most = (rows < BLOCK ? rows + TILE - 1 : BLOCK) / TILE * TILE;
    const size_t own = (size_t)(DEPTH * STRIPS * STRIP) * sizeof(bfloat16) + (size_t)(most * STRIPS * STRIP) * sizeof(float);
    const size_t copied = ((size_t)(most * stride) * sizeof(bfloat16) + 63) / 64 * 64;
    char *memory = aligned_alloc(64, copied + (size_t)threads * own);
    if (!memory) return 1;
    bfloat16 *padded = (bfloat16 *)memory;
    for (int64_t first = 0; first < rows; first += BLOCK) {
        const int64_t count = rows - first < BLOCK ? rows - first : BLOCK, tiles = (count + TILE - 1) / TILE;
        const bfloat16 *from = x + first * in;
        if (count % TILE || in % 2) {
            memset(padded, 0, copied);
            for (int64_t r = 0; r < count; r++) memcpy(padded + r * stride, from + r * in, (size_t)in * sizeof(bfloat16));
            from = padded;
        }
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
            __m512i *pack = (__m512i *)(memory + copied + (size_t)me * own);
            float *sums = (float *)(pack + DEPTH * STRIPS);
            const int64_t stop = strips * (me + 1) / team;
            for (int64_t s = strips * me / team; s < stop; s += STRIPS) {
                const int64_t width = stop - s < STRIPS ? stop - s : STRIPS;
                memset(sums, 0, (size_t)(width * tiles * TILE * STRIP) * sizeof(float));
                for (int64_t k = 0; k < in; k += DEPTH) {
                    const int64_t pairs = ((in - k < DEPTH ? in - k : DEPTH) + 1) / 2;
                    for (int64_t p = 0; p < pairs; p++)
                        for (int64_t c = 0; c < width; c++) {
                            const int64_t i = k + 2 * p, j = (s + c) * STRIP;
                            const __mmask32 inside = out - j < STRIP ? (1u << (out - j)) - 1 : 0xffffffffu;
                            const bfloat16 *row = weight + i * out + j, *next = i + 1 < in ? row + out : 0;
                            if (i + DEPTH + 1 < in) {
                                __builtin_prefetch(row + DEPTH * out, 0, 2);
                                __builtin_prefetch(row + (DEPTH + 1) * out, 0, 2);
                            }
                            pack_pair(row, next, inside, pack + (c * DEPTH / 2 + p) * 2);
                        }
                    for (int64_t t = 0; t < tiles; t++)
                        for (int64_t c = 0; c < width; c++)
                            add_tile(from + t * TILE * stride + k, stride, pack + c * DEPTH, pairs,
                                     sums + (c * tiles + t) * TILE * STRIP);
                }
                for (int64_t r = 0; r < count; r++)
                    for (int64_t c = 0; c < width; c++) {
                        const float *sum = sums + (c * tiles * TILE + r) * STRIP;
                        const int64_t j = (s + c) * STRIP, end = out - j < STRIP ? out - j : STRIP;
                        for (int64_t i = 0; i < end; i++) { /* eight outputs are four sums here and four a vector on */
                            const float value = sum[i / 8 * 4 + i % 4 + i / 4 % 2 * LANES];
                            const float added = bias ? value + widen_bfloat16(bias[j + i]) : value;
                            y[(first + r) * out + j + i] = narrow_bfloat16(added);
                        }
                    }
            }
        }
    }
    free(memory);
    return 0;
}
#endif

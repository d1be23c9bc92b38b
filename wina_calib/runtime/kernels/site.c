/* y = (x * [abs(x) * norm > threshold]) @ weight + bias for one row x, reading only the kept rows of `weight` (in, out).

   Threads share the outputs, so that there is no sum of parts and a result does not depend on their number. Each makes
   the list of kept inputs for itself: that is cheaper than to wait for one. Eight rows are read side by side, line by
   line, while the next eight are fetched into the second cache; their products are summed before they are added to the
   block's results.
   Sums are in float32. OpenMP's functions are found in the process when this is loaded: torch's threads do the work. */

#include <stdlib.h>

#include "numbers.h"

int omp_get_thread_num(void);
int omp_get_num_threads(void);

#define WORDS 16   /* words of four bytes in a cache line */
#define UNIT 32    /* outputs that a thread's share is a multiple of */
#define BLOCK 6144 /* outputs whose results a thread holds at a time */

#define EIGHT(EACH) EACH(0) EACH(1) EACH(2) EACH(3) EACH(4) EACH(5) EACH(6) EACH(7)
#define SUM(TERM) (TERM(0) + TERM(1) + TERM(2) + TERM(3) + TERM(4) + TERM(5) + TERM(6) + TERM(7))
#define ROW(i)                                                   \
    const number *restrict row##i = weight + index[k + i] * out; \
    const float x##i = value[k + i];

/* The row eight after this one; at the end of the list this one, which costs nothing. */
#define NEXT(i) const number *next##i = weight + index[k + 8 + i < count ? k + 8 + i : k + i] * out;
#define FETCH(i) __builtin_prefetch((const char *)next##i + 4 * start, 0, 2);

/* Run BODY for each word j of eight rows, a cache line at a time, of which the same in the next eight is asked for. */
#define BY_LINES(words, BODY)                                        \
    EIGHT(ROW) EIGHT(NEXT)                                           \
    for (int64_t start = 0; start < words; start += WORDS) {         \
        EIGHT(FETCH)                                                 \
        if (start + WORDS <= words)                                  \
            for (int64_t j = start; j < start + WORDS; j++) { BODY } \
        else                                                         \
            for (int64_t j = start; j < words; j++) { BODY }         \
    }

/* result[j] += sum over kept inputs of value * weight[index, j], for j < width. */
static void add_float32(const float *weight, int64_t out, const int64_t *index, const float *value, int64_t count,
                        int64_t width, float *restrict result) {
    typedef float number;
    int64_t k = 0;
#define TERM(i) x##i * row##i[j]
    for (; k + 8 <= count; k += 8) {
        BY_LINES(width, result[j] += SUM(TERM);)
    }
    for (; k < count; k++) {
        ROW(0)
        for (int64_t j = 0; j < width; j++) result[j] += TERM(0);
    }
#undef TERM
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>

#define LINE 32 /* numbers in a cache line */

/* The same in bfloat16, where the processor multiplies pairs of it: two rows are interleaved, and one instruction adds both
   their products. What interleaving puts out of order is put in order at the end. Numbers below 2^-126 count as zero. */
static void add_bfloat16(const bfloat16 *weight, int64_t out, const int64_t *index, const float *value, int64_t count,
                         int64_t width, float *restrict result) {
    static const bfloat16 nothing[BLOCK];
    float sums[BLOCK];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < count; k += 8) {
        const bfloat16 *row[8], *next[8];
        __m512bh x[4];
        for (int i = 0; i < 8; i++) {
            row[i] = k + i < count ? weight + index[k + i] * out : nothing;
            next[i] = k + 8 + i < count ? weight + index[k + 8 + i] * out : row[i];
        }
        for (int64_t i = 0; i < 4; i++) {
            const uint32_t low = k + 2 * i < count ? bits_of(value[k + 2 * i]) >> 16 : 0;
            const uint32_t high = k + 2 * i + 1 < count ? bits_of(value[k + 2 * i + 1]) : 0;
            x[i] = (__m512bh)_mm512_set1_epi32((int)(low | (high & 0xffff0000u)));
        }
        for (int64_t j = 0; j < width; j += LINE) {
            const __mmask32 here = width - j < LINE ? (1u << (width - j)) - 1 : ~0u;
            for (int i = 0; i < 8; i++) __builtin_prefetch(next[i] + j, 0, 2);
            __m512 low[2] = {_mm512_loadu_ps(sums + j), _mm512_setzero_ps()};
            __m512 high[2] = {_mm512_loadu_ps(sums + j + LINE / 2), _mm512_setzero_ps()};
            for (int i = 0; i < 4; i++) {
                const __m512i even = _mm512_maskz_loadu_epi16(here, row[2 * i] + j);
                const __m512i odd = _mm512_maskz_loadu_epi16(here, row[2 * i + 1] + j);
                low[i % 2] = _mm512_dpbf16_ps(low[i % 2], (__m512bh)_mm512_unpacklo_epi16(even, odd), x[i]);
                high[i % 2] = _mm512_dpbf16_ps(high[i % 2], (__m512bh)_mm512_unpackhi_epi16(even, odd), x[i]);
            }
            _mm512_storeu_ps(sums + j, _mm512_add_ps(low[0], low[1]));
            _mm512_storeu_ps(sums + j + LINE / 2, _mm512_add_ps(high[0], high[1]));
        }
    }
    for (int64_t j = 0; j < width; j++) /* of eight neighbours the first four are among a line's first sixteen sums */
        result[j] += sums[j / LINE * LINE + j % 8 / 4 * (LINE / 2) + j % LINE / 8 * 4 + j % 4];
}

#else

/* The same in bfloat16: two neighbours are loaded as one word, whose halves are widened without a shuffle. Results of
   even and odd columns are apart until the end. */
static void add_bfloat16(const bfloat16 *weight, int64_t out, const int64_t *index, const float *value, int64_t count,
                         int64_t width, float *restrict result) {
    typedef bfloat16 number;
    float even[BLOCK / 2], odd[BLOCK / 2];
    const int64_t pairs = width / 2;
    memset(even, 0, (size_t)pairs * sizeof(float));
    memset(odd, 0, (size_t)pairs * sizeof(float));
    int64_t k = 0;
#define LOAD(i)         \
    uint32_t word##i;   \
    memcpy(&word##i, row##i + 2 * j, sizeof word##i);
#define EVEN(i) x##i * float_of(word##i << 16)
#define ODD(i) x##i * float_of(word##i & 0xffff0000u)
    for (; k + 8 <= count; k += 8) {
        BY_LINES(pairs, EIGHT(LOAD) even[j] += SUM(EVEN); odd[j] += SUM(ODD);)
    }
    for (; k < count; k++) {
        ROW(0)
        for (int64_t j = 0; j < pairs; j++) {
            LOAD(0)
            even[j] += EVEN(0);
            odd[j] += ODD(0);
        }
    }
#undef LOAD
#undef EVEN
#undef ODD
    for (int64_t j = 0; j < pairs; j++) {
        result[2 * j] += even[j];
        result[2 * j + 1] += odd[j];
    }
    if (width % 2)
        for (k = 0; k < count; k++) result[width - 1] += value[k] * widen_bfloat16(weight[index[k] * out + width - 1]);
}

#endif

/* What stays the same from call to call: weight (in, out) contiguous, norm (in,), threshold (), bias (out,) or null. */
struct site {
    const void *weight;
    const float *norm;
    const float *threshold;
    const void *bias;
    int64_t in, out;
};

/* From x (in,) to y (out,); `everything` drops nothing. A NaN is kept, so that it shows. Returns 1 without memory. */
#define SITE(TYPE)                                                                                          \
    int site_##TYPE(const struct site *site, const TYPE *x, TYPE *y, int everything, int threads) {         \
        const int64_t in = site->in, out = site->out;                                                       \
        const TYPE *weight = site->weight, *bias = site->bias;                                              \
        const float *norm = site->norm, threshold = everything ? -1.0f : *site->threshold;                  \
        int64_t *index = malloc((size_t)threads * (size_t)in * (sizeof(int64_t) + sizeof(float)));          \
        if (!index) return 1;                                                                               \
        float *value = (float *)(index + threads * in);                                                     \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                     \
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                          \
            int64_t *own_index = index + me * in;                                                           \
            float *own_value = value + me * in;                                                             \
            int64_t count = 0;                                                                              \
            for (int64_t i = 0; i < in; i++) {                                                              \
                const float v = widen_##TYPE(x[i]), size = v < 0 ? -v : v;                                  \
                own_index[count] = i;                                                                       \
                own_value[count] = v;                                                                       \
                count += !(size * norm[i] <= threshold);                                                    \
            }                                                                                               \
            const int64_t units = (out + UNIT - 1) / UNIT;                                                  \
            const int64_t end = units * (me + 1) / team * UNIT, stop = end < out ? end : out;               \
            float result[BLOCK];                                                                            \
            for (int64_t j = units * me / team * UNIT; j < stop; j += BLOCK) {                              \
                const int64_t width = stop - j < BLOCK ? stop - j : BLOCK;                                  \
                memset(result, 0, (size_t)width * sizeof(float));                                           \
                add_##TYPE(weight + j, out, own_index, own_value, count, width, result);                    \
                for (int64_t i = 0; i < width; i++)                                                         \
                    y[j + i] = narrow_##TYPE(bias ? result[i] + widen_##TYPE(bias[j + i]) : result[i]);     \
            }                                                                                               \
        }                                                                                                   \
        free(index);                                                                                        \
        return 0;                                                                                           \
    }

SITE(float32)
SITE(bfloat16)

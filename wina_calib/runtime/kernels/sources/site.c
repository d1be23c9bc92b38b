/* y = (x * [abs(x) * norm > threshold]) @ weight + bias for one row x, reading only the kept rows of `weight` (in, out).

   Threads share the outputs, so that there is no sum of parts and a result does not depend on their number. Each makes
   the list of kept inputs for itself: that is cheaper than to wait for one. Eight rows are read side by side, line by
   line, while the next eight are fetched into the second cache; their products are summed before they are added to the
   block's results.
   Sums are in float32. OpenMP's functions are found in the process when this is loaded: torch's threads do the work. */

#include <stdlib.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "site.h"

int omp_get_thread_num(void);
int omp_get_num_threads(void);

#define WORDS 16   /* words of four bytes in a cache line */
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

/* List the kept inputs' indices and values, at most `in`; a NaN is kept, so that it shows. Returns their number. */
#define KEPT(TYPE)                                                                                                     \
    int64_t kept_##TYPE(const TYPE *x, const float *norm, float threshold, int64_t in, int64_t *index,                 \
                        float *value) {                                                                                \
        int64_t count = 0, i = 0;                                                                                      \
        KEPT_BY_VECTORS(TYPE)                                                                                          \
        for (; i < in; i++) {                                                                                          \
            const float v = widen_##TYPE(x[i]), size = v < 0 ? -v : v;                                                 \
            index[count] = i;                                                                                          \
            value[count] = v;                                                                                          \
            count += !(size * norm[i] <= threshold);                                                                   \
        }                                                                                                              \
        return count;                                                                                                  \
    }

#ifdef __AVX512F__
#define KEPT_BY_VECTORS(TYPE)                                                                                          \
    for (; i + 16 <= in; i += 16) { /* stores end at i + 16 at the latest, as count is at most i */                    \
        const __m512 v = vector_##TYPE(x + i), score = _mm512_mul_ps(_mm512_abs_ps(v), _mm512_loadu_ps(norm + i));     \
        const __mmask16 keep = _mm512_cmp_ps_mask(score, _mm512_set1_ps(threshold), _CMP_NLE_UQ);                      \
        const __m512i at = _mm512_add_epi64(_mm512_set1_epi64(i), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));           \
        const __mmask8 low = (__mmask8)keep, high = (__mmask8)(keep >> 8);                                             \
        _mm512_storeu_ps(value + count, _mm512_maskz_compress_ps(keep, v));                                            \
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi64(low, at));                                      \
        count += __builtin_popcount(low);                                                                              \
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi64(high, _mm512_add_epi64(at, _mm512_set1_epi64(8)))); \
        count += __builtin_popcount(high);                                                                             \
    }

static inline __m512 vector_float32(const float *x) { return _mm512_loadu_ps(x); }
static inline __m512 vector_bfloat16(const bfloat16 *x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
#else
#define KEPT_BY_VECTORS(TYPE)
#endif

KEPT(float32)
KEPT(bfloat16)

/* Of y (out,) the numbers from `start` to `stop`, from `count` kept inputs. Those from `next` on, if it is not negative, are wanted
   after them. */
#define OUTPUTS(TYPE)                                                                                                  \
    void site_outputs_##TYPE(const struct site *site, struct list kept, int64_t count, int64_t start, int64_t stop,    \
                             int64_t next, TYPE *y) {                                                                  \
        const TYPE *weight = site->weight, *bias = site->bias;                                                         \
        float result[BLOCK];                                                                                           \
        for (int64_t j = start; j < stop; j += BLOCK) {                                                                \
            const int64_t width = stop - j < BLOCK ? stop - j : BLOCK;                                                 \
            if (site->quantized)                                                                                       \
                quantized_outputs(site->quantized, kept.index, kept.value, count, site->in, 1, j, j + width,             \
                                  j + BLOCK < stop ? j + BLOCK : next, result);                                        \
            else {                                                                                                     \
                memset(result, 0, (size_t)width * sizeof(float));                                                      \
                add_##TYPE(weight + j, site->out, kept.index, kept.value, count, width, result);                       \
            }                                                                                                          \
            for (int64_t i = 0; i < width; i++)                                                                        \
                y[j + i] = narrow_##TYPE(bias ? result[i] + widen_##TYPE(bias[j + i]) : result[i]);                    \
        }                                                                                                              \
    }

/* From x (in,) to y (out,); `everything` drops nothing. Returns 1 without memory. */
#define SITE(TYPE)                                                                                                     \
    int site_##TYPE(const struct site *site, const TYPE *x, TYPE *y, int everything, int threads) {                    \
        void *memory = malloc(LIST_BYTES(threads, site->in));                                                          \
        if (!memory) return 1;                                                                                         \
        const float threshold = everything ? -1.0f : *site->threshold;                                                 \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                                \
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads(), out = site->out, unit = unit_of(site); \
            const struct list own = list_of(memory, threads, site->in, me);                                            \
            const int64_t count = kept_##TYPE(x, site->norm, threshold, site->in, own.index, own.value);               \
            site_outputs_##TYPE(site, own, count, share(out, unit, me, team), share(out, unit, me + 1, team), -1, y);      \
        }                                                                                                              \
        free(memory);                                                                                                  \
        return 0;                                                                                                      \
    }

/* Of a head of `size` numbers the first half and the second are coordinates that are turned, each product and sum rounded. */
#define TURN(TYPE)                                                                                                     \
    static void turn_##TYPE(TYPE *restrict head, const TYPE *restrict cosine, const TYPE *restrict sine, int64_t size) { \
        const int64_t half = size / 2;                                                                                 \
        for (int64_t i = 0, j = half; i < half; i++, j++) {                                                            \
            const float a = widen_##TYPE(head[i]), b = widen_##TYPE(head[j]);                                          \
            const TYPE ac = narrow_##TYPE(a * widen_##TYPE(cosine[i])), bs = narrow_##TYPE(b * widen_##TYPE(sine[i])); \
            const TYPE bc = narrow_##TYPE(b * widen_##TYPE(cosine[j])), as = narrow_##TYPE(a * widen_##TYPE(sine[j])); \
            head[i] = narrow_##TYPE(widen_##TYPE(ac) - widen_##TYPE(bs));                                              \
            head[j] = narrow_##TYPE(widen_##TYPE(bc) + widen_##TYPE(as));                                              \
        }                                                                                                              \
    }

/* Of queries, keys and values in y the heads from output `start` to `stop`: queries and keys are normed, where there are weights for
   it, and turned by cosine (size,) and sine (size,). */
#define TURN_HEADS(TYPE)                                                                                               \
    void turn_heads_##TYPE(const struct heads *heads, const TYPE *cosine, const TYPE *sine, int64_t start,             \
                           int64_t stop, TYPE *y) {                                                                    \
        const int64_t size = heads->size;                                                                              \
        for (int64_t h = start / size; h < heads->queries + heads->keys && h < stop / size; h++) {                     \
            const TYPE *weight = h < heads->queries ? heads->query_norm : heads->key_norm;                             \
            if (weight) normed_##TYPE(y + h * size, weight, y + h * size, heads->epsilon, size);                       \
            turn_##TYPE(y + h * size, cosine, sine, size);                                                             \
        }                                                                                                              \
    }

/* As `site`, for queries, keys and values. Threads share whole heads. */
#define TURNED(TYPE)                                                                                                   \
    int turned_##TYPE(const struct site *site, const TYPE *x, TYPE *y, const TYPE *cosine, const TYPE *sine,           \
                      const TYPE *query_norm, const TYPE *key_norm, float epsilon, int64_t queries, int64_t keys,      \
                      int64_t size, int threads) {                                                                     \
        const struct heads heads = {queries, keys, size, query_norm, key_norm, epsilon};                               \
        void *memory = malloc(LIST_BYTES(threads, site->in));                                                          \
        if (!memory) return 1;                                                                                         \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                                \
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                     \
            const int64_t start = share(site->out, size, me, team), stop = share(site->out, size, me + 1, team);       \
            const struct list own = list_of(memory, threads, site->in, me);                                            \
            const int64_t count = kept_##TYPE(x, site->norm, *site->threshold, site->in, own.index, own.value);        \
            site_outputs_##TYPE(site, own, count, start, stop, -1, y);                                                 \
            turn_heads_##TYPE(&heads, cosine, sine, start, stop, y);                                                   \
        }                                                                                                              \
        free(memory);                                                                                                  \
        return 0;                                                                                                      \
    }

/* Of gate and up side by side in both (2 * width,) the numbers from `start` to `stop` of the first become x * sigmoid(x) of the gate, or
   its GELU by tanh, times up. */
#define ACTIVATE(TYPE)                                                                                                 \
    void activate_##TYPE(int gelu, int64_t width, int64_t start, int64_t stop, TYPE *both) {                           \
        for (int64_t j = start; j < stop; j++) {                                                                       \
            const float gate = widen_##TYPE(both[j]);                                                                  \
            const TYPE open = narrow_##TYPE(gate / (1.0f + exponential(gelu ? -2.0f * inner_of_gelu(gate) : -gate)));  \
            both[j] = narrow_##TYPE(widen_##TYPE(open) * widen_##TYPE(both[width + j]));                               \
        }                                                                                                              \
    }

/* The same from kept inputs of the site whose outputs they are. */
#define OWN_GATED(TYPE)                                                                                                \
    void own_gated_##TYPE(const struct site *site, int gelu, struct list kept, int64_t count, int64_t start,           \
                          int64_t stop, TYPE *both) {                                                                  \
        const int64_t width = site->out / 2;                                                                           \
        site_outputs_##TYPE(site, kept, count, start, stop, width + start, both);                                      \
        site_outputs_##TYPE(site, kept, count, width + start, width + stop, -1, both);                                 \
        activate_##TYPE(gelu, width, start, stop, both);                                                               \
    }

/* A gated MLP from x (in,) to y (out,): `first` gives gate and up, from which the input of `second` is made in both (2 * width,).
   A thread computes gate and up of the same outputs, so that threads wait for each other once. Returns 1 without memory. */
#define GATED(TYPE)                                                                                                    \
    int gated_##TYPE(const struct site *first, const struct site *second, const TYPE *x, TYPE *both, TYPE *y,          \
                     int gelu, int threads) {                                                                          \
        const int64_t width = second->in, most = first->in < width ? width : first->in;                                \
        void *memory = malloc(LIST_BYTES(threads, most));                                                              \
        if (!memory) return 1;                                                                                         \
        struct meeting meeting = {0};                                                                                  \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                                \
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                     \
            const struct list own = list_of(memory, threads, most, me);                                                \
            const int64_t unit = unit_of(first), start = share(width, unit, me, team), stop = share(width, unit, me + 1, team); \
            int64_t count = kept_##TYPE(x, first->norm, *first->threshold, first->in, own.index, own.value);           \
            own_gated_##TYPE(first, gelu, own, count, start, stop, both);                                              \
            meet(&meeting, team);                                                                                      \
            count = kept_##TYPE(both, second->norm, *second->threshold, width, own.index, own.value); \
            const int64_t last = unit_of(second), end = share(second->out, last, me + 1, team);                        \
            site_outputs_##TYPE(second, own, count, share(second->out, last, me, team), end, -1, y);                   \
        }                                                                                                              \
        free(memory);                                                                                                  \
        return 0;                                                                                                      \
    }

OUTPUTS(float32)
OUTPUTS(bfloat16)
SITE(float32)
SITE(bfloat16)
TURN(float32)
TURN(bfloat16)
TURN_HEADS(float32)
TURN_HEADS(bfloat16)
TURNED(float32)
TURNED(bfloat16)
ACTIVATE(float32)
ACTIVATE(bfloat16)
OWN_GATED(float32)
OWN_GATED(bfloat16)
GATED(float32)
GATED(bfloat16)

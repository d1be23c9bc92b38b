/* Lines of 32 numbers of weights in bfloat16, for processors that multiply pairs of it; those with units for whole matrices are
   left to oneDNN. */

#pragma once

#include "site.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)
#define PAIRS_OF_BFLOAT16
#include <immintrin.h>

#define ALWAYS static inline __attribute__((always_inline))
#define LINE 32 /* numbers in a line */

static inline int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline __mmask32 first_of(int64_t count) { return count < LINE ? (1u << count) - 1 : ~0u; }

/* Which of sixteen inputs are kept, of those that are `inside` and not zero; `norm` is null where all of these are. */
ALWAYS __mmask16 kept_words(__m512i word, __mmask16 inside, const float *norm, float threshold) {
    const __mmask16 keep = _mm512_mask_test_epi32_mask(inside, word, _mm512_set1_epi32(0x7fff));
    if (!norm) return keep;
    const __m512 size = _mm512_abs_ps(_mm512_castsi512_ps(_mm512_slli_epi32(word, 16)));
    const __m512 score = _mm512_mul_ps(size, _mm512_maskz_loadu_ps(inside, norm));
    return _mm512_mask_cmp_ps_mask(keep, score, _mm512_set1_ps(threshold), _CMP_NLE_UQ);
}

ALWAYS __m512i words_of(const bfloat16 *x, __mmask16 inside) {
    return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(_mm512_maskz_loadu_epi16(inside, x)));
}

/* Outputs (width,) of a line from its sums, of which those of outputs 0-3, 8-11, ... are in the first vector. */
ALWAYS void narrow_line(const float *sums, const bfloat16 *bias, int64_t width, bfloat16 *y) {
    const __mmask32 inside = first_of(width);
    __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + LANES);
    if (bias) {
        const __m512i added = _mm512_maskz_loadu_epi16(inside, bias), none = _mm512_setzero_si512();
        low = _mm512_add_ps(low, _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, added)));
        high = _mm512_add_ps(high, _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, added)));
    }
    const __m512i fours = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
    const __m512i a = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(low));
    const __m512i b = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(high));
    _mm512_mask_storeu_epi16(y, inside, _mm512_permutex2var_epi64(a, fours, b));
}

/* What a masked product is of: x (rows, in), weight (in, out), bias (out,) or null, y (rows, out). `norm` is null where inputs that are
   not zero are kept, `open` (rows,) or null says of which rows all are. */
struct product {
    const bfloat16 *x;
    const float *norm, *threshold;
    const uint8_t *open;
    const bfloat16 *weight, *bias;
    bfloat16 *y;
    int64_t rows, in, out;
};

static inline float limit_of(const struct product *p, int64_t row) {
    return p->open && p->open[row] ? -1.0f : p->norm ? *p->threshold : 0.0f;
}

#define FEW_ROWS 32 /* rows up to which `few_rows` is faster than `many_rows` */

/* Both return 1 without memory. */
int few_rows(const struct product *product, int threads);
int many_rows(const struct product *product, int threads);
#endif

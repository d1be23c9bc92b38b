/* Vectors of whole numbers and floats for products with codes of 4 and 8 bits: AVX-512, AVX2, or none (VECTORS is not defined). */

#pragma once

#include "numbers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define LARGEST 32639.0f /* 127 * 256 + 127: the larger of its two bytes, both signed, is one too */
#define ROUNDS 12582912.0f /* a float of which the last place counts one */
#define TINY 1e-30f /* scaled inputs below which all are zero */

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS int32_t word_of(const void *from) {
    int32_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#define VECTORS
#define VECTOR 64 /* bytes */
typedef __m512i ints;
typedef __m512 floats;

ALWAYS ints zero(void) { return _mm512_setzero_si512(); }
ALWAYS ints load(const void *from) { return _mm512_loadu_si512(from); }
ALWAYS ints low_pairs(ints a, ints b) { return _mm512_unpacklo_epi16(a, b); }
ALWAYS ints high_pairs(ints a, ints b) { return _mm512_unpackhi_epi16(a, b); }
ALWAYS ints only(ints a, int bits) { return _mm512_and_si512(a, _mm512_set1_epi16((short)bits)); }
ALWAYS ints high_byte(ints a) { return _mm512_srli_epi16(a, 8); }
ALWAYS ints signed_high_byte(ints a) { return _mm512_srai_epi16(a, 8); }
ALWAYS ints signed_low_byte(ints a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
ALWAYS ints subtract(ints a, ints b) { return _mm512_sub_epi32(a, b); }
ALWAYS ints sixteen_times(ints a) { return _mm512_slli_epi32(a, 4); }
ALWAYS floats times(floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }

ALWAYS ints add_products(ints sum, ints a, ints b) {
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

/* Of each group in a vector its number, in every place of the group; of all places the first where there are no groups. */
ALWAYS ints spread(const void *number, const int group) {
    const __m512i two = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i four = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    if (group == 64)
        return _mm512_permutexvar_epi32(two, _mm512_castsi128_si512(_mm_loadl_epi64(number)));
    if (group == 32)
        return _mm512_permutexvar_epi32(four, _mm512_castsi128_si512(_mm_loadu_si128(number)));
    return _mm512_set1_epi32(word_of(number));
}
ALWAYS floats as_floats(ints a) { return _mm512_castsi512_ps(a); }

ALWAYS floats halves_times(const uint16_t *from, float by) {
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)), _mm512_set1_ps(by));
}
ALWAYS ints widen_bytes(const int8_t *from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from)); }
ALWAYS void store(void *to, ints a) { _mm512_storeu_si512(to, a); }
ALWAYS void store_floats(float *to, floats a) { _mm512_storeu_ps(to, a); }
ALWAYS floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
ALWAYS floats larger(floats largest, floats a) { return _mm512_range_ps(largest, a, 0x0b); } /* of magnitudes */
ALWAYS floats over(float a, floats b) { /* zero where b is tiny */
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(b, _mm512_set1_ps(TINY), _CMP_GT_OQ), _mm512_set1_ps(a), b);
}
/* Two vectors times one, each number rounded to the 16 bits that it ends in when a large one is added, in pairs. */
ALWAYS ints nearest_pairs(floats low, floats high, floats by) {
    const floats large = _mm512_set1_ps(ROUNDS);
    const ints a = _mm512_castps_si512(_mm512_fmadd_ps(low, by, large)), b = _mm512_castps_si512(_mm512_fmadd_ps(high, by, large));
    return _mm512_mask_blend_epi16(0xaaaaaaaau, a, _mm512_slli_epi32(b, 16));
}
/* Zero points of two inputs in pairs, of as many groups as a vector has numbers. */
ALWAYS ints zero_pairs(const uint8_t *low, const uint8_t *high) {
    const __m128i both = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i *)low), _mm_loadl_epi64((const __m128i *)high));
    const ints even = _mm512_cvtepu32_epi64(_mm256_cvtepu8_epi16(both)); /* two groups in 64 bits */
    return _mm512_and_si512(_mm512_or_si512(even, _mm512_slli_epi64(even, 28)), _mm512_set1_epi16(0x000f));
}
ALWAYS ints all_pairs(int of) { return _mm512_set1_epi16((short)of); }

#ifdef __AVX512VNNI__

#define QUADS 1

/* As it is written, for gcc would copy the sum at each. */
ALWAYS ints add_bytes(ints sum, ints a, ints b) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
ALWAYS ints all_bytes(int of) { return _mm512_set1_epi8((char)of); }
/* 256 times one and the other. */
ALWAYS ints joined(ints high, ints low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

/* Bytes of four vectors, of which four neighbours are of the first, third, second and fourth: of each sixteen bytes the first
   four, and so on. */
ALWAYS void bytes_in_turn(const ints from[4], ints to[4]) {
    const ints a = _mm512_unpacklo_epi8(from[0], from[2]), b = _mm512_unpacklo_epi8(from[1], from[3]);
    const ints c = _mm512_unpackhi_epi8(from[0], from[2]), d = _mm512_unpackhi_epi8(from[1], from[3]);
    to[0] = _mm512_unpacklo_epi16(a, b), to[1] = _mm512_unpackhi_epi16(a, b);
    to[2] = _mm512_unpacklo_epi16(c, d), to[3] = _mm512_unpackhi_epi16(c, d);
}

/* Four vectors times one, each number rounded, as 256 times one signed byte and another: in the same turn. */
ALWAYS void nearest_bytes(const floats from[4], floats by, ints *low, ints *high) {
    const floats large = _mm512_set1_ps(ROUNDS + 128.0f);
    const ints byte = _mm512_set1_epi16(0x00ff);
    ints number[4];
    for (int i = 0; i < 4; i++) number[i] = _mm512_castps_si512(_mm512_fmadd_ps(from[i], by, large));
    const ints a = _mm512_mask_blend_epi16(0xaaaaaaaau, number[0], _mm512_slli_epi32(number[1], 16));
    const ints b = _mm512_mask_blend_epi16(0xaaaaaaaau, number[2], _mm512_slli_epi32(number[3], 16));
    const ints less = _mm512_ternarylogic_epi32(byte, a, _mm512_slli_epi16(b, 8), 0xca); /* 128 too many */
    *low = _mm512_xor_si512(less, _mm512_set1_epi8((char)128));
    *high = _mm512_ternarylogic_epi32(byte, _mm512_srli_epi16(a, 8), b, 0xca);
}

/* Zero points of four inputs in that turn, of as many groups as a vector has numbers. */
ALWAYS ints zero_bytes(const uint8_t *from[4]) {
    __m128i zeros[4];
    for (int i = 0; i < 4; i++) zeros[i] = _mm_loadl_epi64((const __m128i *)from[i]);
    const __m128i a = _mm_unpacklo_epi8(zeros[0], zeros[2]), b = _mm_unpacklo_epi8(zeros[1], zeros[3]);
    const ints even = _mm512_cvtepu32_epi64(_mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b)));
    return _mm512_and_si512(_mm512_or_si512(even, _mm512_slli_epi64(even, 28)), _mm512_set1_epi8(0x0f));
}

#endif

ALWAYS void add_scaled(float *to, ints sum, floats scale) {
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(to)));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define VECTORS
#define VECTOR 32
typedef __m256i ints;
typedef __m256 floats;

ALWAYS ints zero(void) { return _mm256_setzero_si256(); }
ALWAYS ints load(const void *from) { return _mm256_loadu_si256(from); }
ALWAYS ints low_pairs(ints a, ints b) { return _mm256_unpacklo_epi16(a, b); }
ALWAYS ints high_pairs(ints a, ints b) { return _mm256_unpackhi_epi16(a, b); }
ALWAYS ints only(ints a, int bits) { return _mm256_and_si256(a, _mm256_set1_epi16((short)bits)); }
ALWAYS ints high_byte(ints a) { return _mm256_srli_epi16(a, 8); }
ALWAYS ints signed_high_byte(ints a) { return _mm256_srai_epi16(a, 8); }
ALWAYS ints signed_low_byte(ints a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
ALWAYS ints subtract(ints a, ints b) { return _mm256_sub_epi32(a, b); }
ALWAYS ints sixteen_times(ints a) { return _mm256_slli_epi32(a, 4); }
ALWAYS floats times(floats a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }

ALWAYS ints add_products(ints sum, ints a, ints b) {
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

ALWAYS ints spread(const void *number, const int group) {
    const __m256i two = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
    if (group == 32)
        return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_loadl_epi64(number)), two);
    return _mm256_set1_epi32(word_of(number));
}
ALWAYS floats as_floats(ints a) { return _mm256_castsi256_ps(a); }

ALWAYS floats halves_times(const uint16_t *from, float by) {
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)), _mm256_set1_ps(by));
}
ALWAYS ints widen_bytes(const int8_t *from) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)); }
ALWAYS void store(void *to, ints a) { _mm256_storeu_si256(to, a); }
ALWAYS void store_floats(float *to, floats a) { _mm256_storeu_ps(to, a); }
ALWAYS floats load_floats(const float *from) { return _mm256_loadu_ps(from); }
ALWAYS floats larger(floats largest, floats a) { return _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a), largest); }
ALWAYS floats over(float a, floats b) {
    return _mm256_and_ps(_mm256_cmp_ps(b, _mm256_set1_ps(TINY), _CMP_GT_OQ), _mm256_div_ps(_mm256_set1_ps(a), b));
}
ALWAYS ints nearest_pairs(floats low, floats high, floats by) {
    const floats large = _mm256_set1_ps(ROUNDS);
    const ints a = _mm256_castps_si256(_mm256_fmadd_ps(low, by, large)), b = _mm256_castps_si256(_mm256_fmadd_ps(high, by, large));
    return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
}
ALWAYS ints zero_pairs(const uint8_t *low, const uint8_t *high) {
    const __m128i both = _mm_unpacklo_epi8(_mm_cvtsi32_si128(word_of(low)), _mm_cvtsi32_si128(word_of(high)));
    const ints even = _mm256_cvtepu32_epi64(_mm_cvtepu8_epi16(both));
    return _mm256_and_si256(_mm256_or_si256(even, _mm256_slli_epi64(even, 28)), _mm256_set1_epi16(0x000f));
}
ALWAYS ints all_pairs(int of) { return _mm256_set1_epi16((short)of); }

ALWAYS void add_scaled(float *to, ints sum, floats scale) {
    const floats wide = _mm256_cvtepi32_ps(sum);
    _mm256_storeu_ps(to, _mm256_fmadd_ps(wide, scale, _mm256_loadu_ps(to)));
}

#else
#define VECTOR 32
#endif

#define WORDS (VECTOR / 4)
#ifndef QUADS
#define QUADS 0
#endif

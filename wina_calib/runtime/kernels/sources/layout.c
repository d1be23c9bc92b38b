/* Matrices turned from rows to columns: numbers of 16 and of 32 bits, whatever they stand for.

   A block of whole cache lines is read, turned in the first cache, and written as whole lines: strides are often powers of two,
   at which a cache has room for few lines. */

#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define SIDE 32 /* numbers on a side of a block */

/* Blocks, turned; those of 16 bits eight by eight where there are vectors. */
static void turn_float32(const uint32_t (*from)[SIDE], uint32_t (*to)[SIDE]) {
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) to[j][i] = from[i][j];
}

static void turn_bfloat16(const uint16_t (*from)[SIDE], uint16_t (*to)[SIDE]) {
#ifdef __SSE2__
    for (int i = 0; i < SIDE; i += 8)
        for (int j = 0; j < SIDE; j += 8) {
            __m128i a[8], b[8];
            for (int k = 0; k < 8; k++) a[k] = _mm_loadu_si128((const __m128i *)(from[i + k] + j));
            for (int k = 0; k < 4; k++) {
                b[2 * k] = _mm_unpacklo_epi16(a[k], a[k + 4]);
                b[2 * k + 1] = _mm_unpackhi_epi16(a[k], a[k + 4]);
            }
            for (int k = 0; k < 4; k++) {
                a[2 * k] = _mm_unpacklo_epi16(b[k], b[k + 4]);
                a[2 * k + 1] = _mm_unpackhi_epi16(b[k], b[k + 4]);
            }
            for (int k = 0; k < 4; k++) {
                _mm_storeu_si128((__m128i *)(to[j + 2 * k] + i), _mm_unpacklo_epi16(a[k], a[k + 4]));
                _mm_storeu_si128((__m128i *)(to[j + 2 * k + 1] + i), _mm_unpackhi_epi16(a[k], a[k + 4]));
            }
        }
#else
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) to[j][i] = from[i][j];
#endif
}

/* to (columns, stride), of which the first `rows` of each row are written, from the first `columns` of (rows, given). Blocks side by
   side follow each other, as what is read lies in small pages more often than what is written. */
#define COLUMNS(TYPE, NUMBER)                                                                                          \
    void columns_##TYPE(const NUMBER *from, NUMBER *to, int64_t rows, int64_t columns, int64_t given, int64_t stride,  \
                        int threads) {                                                                                 \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                                              \
        for (int64_t i = 0; i < rows; i += SIDE) {                                                                     \
            const int64_t high = rows - i < SIDE ? rows - i : SIDE;                                                    \
            NUMBER read[SIDE][SIDE] = {{0}}, turned[SIDE][SIDE];                                                       \
            for (int64_t j = 0; j < columns; j += SIDE) {                                                              \
                const int64_t wide = columns - j < SIDE ? columns - j : SIDE;                                          \
                for (int64_t k = 0; k < high; k++)                                                                     \
                    memcpy(read[k], from + (i + k) * given + j, (size_t)wide * sizeof(NUMBER));                        \
                turn_##TYPE((const NUMBER(*)[SIDE])read, turned);                                                      \
                for (int64_t k = 0; k < wide; k++)                                                                     \
                    memcpy(to + (j + k) * stride + i, turned[k], (size_t)high * sizeof(NUMBER));                       \
            }                                                                                                          \
        }                                                                                                              \
    }

COLUMNS(float32, uint32_t)
COLUMNS(bfloat16, uint16_t)

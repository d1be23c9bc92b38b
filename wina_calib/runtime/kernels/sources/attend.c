/* Attention of one token: query (heads, size), key and value (key heads, length, size), heads in order of their key head.

   A key or value is read and widened once for all query heads of its head. Softmax and sums are in float32. */

#include <stdlib.h>

#include "attend.h"

/* Where keys or values are, in numbers: the next head's and the next place's. */
struct strides {
    int64_t head, place;
};

/* The keys or values of PLACES places from `t` on; past the end zeros. */
#define WIDEN(TYPE)                                                                                                    \
    static void wide_##TYPE(const TYPE *from, int64_t stride, int64_t t, int64_t length, int64_t size,                 \
                            float *restrict to) {                                                                      \
        const int64_t count = length - t < PLACES ? length - t : PLACES;                                               \
        for (int64_t p = 0; p < count; p++) {                                                                          \
            const TYPE *row = from + (t + p) * stride;                                                                 \
            for (int64_t i = 0; i < size; i++) to[p * size + i] = widen_##TYPE(row[i]);                                \
        }                                                                                                              \
        memset(to + count * size, 0, (size_t)((PLACES - count) * size) * sizeof(float));                               \
    }

/* score[p] = query (size,) @ keys[p], for PLACES places. */
static inline void score_places(const float *restrict query, const float *restrict keys, int64_t size, float *score) {
    float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < size; i++) {
        a += query[i] * keys[i];
        b += query[i] * keys[size + i];
        c += query[i] * keys[2 * size + i];
        d += query[i] * keys[3 * size + i];
    }
    score[0] = a, score[1] = b, score[2] = c, score[3] = d;
}

/* sum (size,) += weight[p] * values[p], for PLACES places. */
static inline void add_places(const float *restrict weight, const float *restrict values, int64_t size, float *restrict sum) {
    const float a = weight[0], b = weight[1], c = weight[2], d = weight[3];
    for (int64_t i = 0; i < size; i++)
        sum[i] += (a * values[i] + b * values[size + i]) + (c * values[2 * size + i] + d * values[3 * size + i]);
}

/* In place: scores (length,) to weights whose sum is 1, or that are all zero where nothing is seen. */
static inline void soften(float *restrict row, const uint8_t *seen, int64_t length) {
    float most = -INFINITY, total = 0;
    if (seen)
        for (int64_t t = 0; t < length; t++) row[t] = seen[t] ? row[t] : -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < length; t++) most = row[t] > most ? row[t] : most;
    for (int64_t t = 0; t < length; t++) row[t] = row[t] == -INFINITY ? 0 : exponential(row[t] - most);
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < length; t++) total += row[t];
    const float scale = total == 0 ? 0 : 1 / total;
    for (int64_t t = 0; t < length; t++) row[t] *= scale;
}

/* One key head of `attend`: to y (group, size), with `scratch` as SCRATCH says. */
#define ATTEND_HEAD(TYPE)                                                                                              \
    void attend_head_##TYPE(const TYPE *query, const TYPE *key, int64_t key_place, const TYPE *value,                  \
                            int64_t value_place, const uint8_t *seen, TYPE *y, int64_t group, int64_t length,          \
                            int64_t size, float scale, float *scratch) {                                               \
        const int64_t padded = (length + PLACES - 1) / PLACES * PLACES;                                                \
        float *weight = scratch, *wide = weight + group * padded, *sum = wide + group * size;                          \
        float *block = sum + group * size;                                                                             \
        for (int64_t i = 0; i < group * size; i++) {                                                                   \
            wide[i] = scale * widen_##TYPE(query[i]);                                                                  \
            sum[i] = 0;                                                                                                \
        }                                                                                                              \
        for (int64_t t = 0; t < length; t += PLACES) {                                                                 \
            wide_##TYPE(key, key_place, t, length, size, block);                                                       \
            for (int64_t r = 0; r < group; r++)                                                                        \
                score_places(wide + r * size, block, size, weight + r * padded + t);                                   \
        }                                                                                                              \
        for (int64_t r = 0; r < group; r++) {                                                                          \
            soften(weight + r * padded, seen, length);                                                                 \
            for (int64_t t = length; t < padded; t++) weight[r * padded + t] = 0;                                      \
        }                                                                                                              \
        for (int64_t t = 0; t < length; t += PLACES) {                                                                 \
            wide_##TYPE(value, value_place, t, length, size, block);                                                   \
            for (int64_t r = 0; r < group; r++)                                                                        \
                add_places(weight + r * padded + t, block, size, sum + r * size);                                      \
        }                                                                                                              \
        for (int64_t i = 0; i < group * size; i++) y[i] = narrow_##TYPE(sum[i]);                                       \
    }

/* To y (heads, size). `seen` (length,) or null says which places are attended to; what lies before the first or behind the last
   of them, such as the rest of a static cache, is not read. Returns 1 without memory. */
#define ATTEND(TYPE)                                                                                                   \
    int attend_##TYPE(const TYPE *query, const TYPE *key, const TYPE *value, const uint8_t *seen, TYPE *y,             \
                      const struct strides *strides, int64_t heads, int64_t key_heads, int64_t length, int64_t size,   \
                      float scale, int threads) {                                                                      \
        const int64_t first = first_seen(seen, &length), group = heads / key_heads, own = SCRATCH(group, length, size); \
        float *memory = malloc((size_t)(key_heads * own) * sizeof(float));                                             \
        if (!memory) return 1;                                                                                         \
        key += first * strides[0].place, value += first * strides[1].place;                                            \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t h = 0; h < key_heads; h++)      \
            attend_head_##TYPE(query + h * group * size, key + h * strides[0].head, strides[0].place,                  \
                               value + h * strides[1].head, strides[1].place, seen ? seen + first : seen,              \
                               y + h * group * size, group, length, size, scale, memory + h * own);                    \
        free(memory);                                                                                                  \
        return 0;                                                                                                      \
    }

WIDEN(float32)
WIDEN(bfloat16)
ATTEND_HEAD(float32)
ATTEND_HEAD(bfloat16)
ATTEND(float32)
ATTEND(bfloat16)

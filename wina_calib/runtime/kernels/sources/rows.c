/* What is computed for several rows beside their products: the mask and the RMSNorm in one pass each. */

#include "numbers.h"

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

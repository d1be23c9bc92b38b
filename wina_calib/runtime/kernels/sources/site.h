/* What is known of a site before it gets an input, and how threads share it. */

#include "numbers.h"

/* Weights (in, out) by input: codes of 8 bits, or of 4, of which byte i of a group holds outputs i (low) and i + group / 2. */
struct quantized {
    const uint8_t *codes;
    const uint16_t *scales;     /* (in, out / group) float16, of 4-bit codes */
    const uint8_t *zeros;       /* (in, ceil(out / group / 2)) zero points of 4-bit codes, the even group's low; null: all 8 */
    const float *output_scales; /* (out,), of 8-bit codes */
    int64_t in, out;
    int32_t bits, group;
};

/* What stays the same from call to call: weight (in, out) contiguous or `quantized`, norm (in,), threshold (), bias (out,) or
   null. */
struct site {
    const void *weight;
    const float *norm;
    const float *threshold;
    const void *bias;
    int64_t in, out;
    const struct quantized *quantized;
};

#define QUANTIZED_UNIT 128 /* outputs that a thread's share of quantized ones is a multiple of */

/* Where the share of thread `me` begins of `out` numbers in units, and the one's before it ends. */
static inline int64_t share(int64_t out, int64_t unit, int64_t me, int64_t team) {
    const int64_t start = (out + unit - 1) / unit * me / team * unit;
    return start < out ? start : out;
}

/* Results (rows, stop - start) of quantized outputs from `start` to `stop` for kept inputs with values (rows, spacing). */
void quantized_outputs(const struct quantized *weight, const int64_t *index, const float *value, int64_t count, int64_t spacing,
                       int64_t rows, int64_t start, int64_t stop, float *result);

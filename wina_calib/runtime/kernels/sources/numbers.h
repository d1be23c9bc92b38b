/* The numbers that weights and inputs are stored in, to and from float. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float float32;
typedef uint16_t bfloat16;

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float widen_float32(float value) { return value; }
static inline float narrow_float32(float value) { return value; }
static inline float widen_bfloat16(bfloat16 value) { return float_of((uint32_t)value << 16); }

static inline bfloat16 narrow_bfloat16(float value) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bfloat16)(value != value ? 0x7fc0 : rounded);
}

/* e^x within two units of the last place, without a branch so that loops over it are vectors; infinite from 88.72 on, zero
   below -87. */
static inline float exponential(float x) {
    const float low = x < -87.0f ? -87.0f : x, inside = low > 88.72f ? 88.72f : low;
    const float shifted = inside * 1.44269504f + 12582912.0f, power = shifted - 12582912.0f; /* rounds to a whole number */
    const float rest = inside - power * 0.693359375f + power * 2.12194440e-4f;
    float sum = 1.9875691500e-4f; /* Cephes' expf */
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    const float result = float_of(bits_of(sum) + (bits_of(shifted) << 23));
    const float known = x < -87.0f ? 0.0f : x > 88.72f ? float_of(0x7f800000u) : x; /* a NaN is kept, so that it shows */
    return x == inside ? result : known;
}

/* What GELU's approximation takes the tanh of. */
static inline float inner_of_gelu(float x) { return 0.79788456080f * (x + 0.044715f * x * x * x); }

#define LANES 16 /* floats in a vector */

/* The RMSNorm of x (in,) to y, which may be x: over its root mean square, rounded as weights are, times weight (in,). Sixteen
   sums are kept apart, so that they are one vector. */
#define NORMED(TYPE)                                                                                                  \
    static inline void normed_##TYPE(const TYPE *x, const TYPE *weight, TYPE *y, float epsilon, int64_t in) {         \
        float sums[LANES] = {0}, sum = 0;                                                                             \
        int64_t i = 0;                                                                                                \
        for (; i + LANES <= in; i += LANES)                                                                           \
            for (int64_t j = 0; j < LANES; j++) sums[j] += widen_##TYPE(x[i + j]) * widen_##TYPE(x[i + j]);           \
        for (; i < in; i++) sum += widen_##TYPE(x[i]) * widen_##TYPE(x[i]);                                           \
        for (int64_t j = 0; j < LANES; j++) sum += sums[j];                                                           \
        const float scale = 1.0f / sqrtf(sum / (float)in + epsilon);                                                  \
        for (i = 0; i < in; i++) {                                                                                    \
            const TYPE unit = narrow_##TYPE(widen_##TYPE(x[i]) * scale);                                              \
            y[i] = narrow_##TYPE(widen_##TYPE(unit) * widen_##TYPE(weight[i]));                                       \
        }                                                                                                             \
    }

NORMED(float32)
NORMED(bfloat16)

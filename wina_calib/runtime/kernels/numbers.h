/* The numbers that weights and inputs are stored in, to and from float. */

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

/* Attention of one token by key heads, for calls that hold threads already. */

#pragma once

#include "numbers.h"

#define PLACES 4 /* keys or values that are widened and multiplied at a time */

/* Floats that one key head of `group` query heads needs. */
#define SCRATCH(group, length, size) ((group) * (((length) + PLACES - 1) / PLACES * PLACES + 2 * (size)) + PLACES * (size))

/* The first place of `seen` (length,) or null that is attended to; `length` becomes that of what lies from there to the last. */
static inline int64_t first_seen(const uint8_t *seen, int64_t *length) {
    int64_t first = 0;
    for (; seen && *length > 1 && !seen[*length - 1]; --*length) continue;
    for (; seen && *length > 1 && !seen[first]; --*length) first++;
    return first;
}

void attend_head_float32(const float32 *query, const float32 *key, int64_t key_place, const float32 *value, int64_t value_place,
                         const uint8_t *seen, float32 *y, int64_t group, int64_t length, int64_t size, float scale,
                         float *scratch);
void attend_head_bfloat16(const bfloat16 *query, const bfloat16 *key, int64_t key_place, const bfloat16 *value,
                          int64_t value_place, const uint8_t *seen, bfloat16 *y, int64_t group, int64_t length, int64_t size,
                          float scale, float *scratch);

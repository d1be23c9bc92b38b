/* What is known of a site before it gets an input, and how threads share it. */

#pragma once

#include <sched.h>
#include <stdatomic.h>

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

#define PATIENCE 1000      /* pauses that a thread waits for others without letting anyone else run */
#define UNIT 32            /* outputs that a thread's share is a multiple of */
#define QUANTIZED_UNIT 128 /* outputs that a thread's share of quantized ones is a multiple of */

/* Where the share of thread `me` begins of `out` numbers in units, and the one's before it ends. */
static inline int64_t share(int64_t out, int64_t unit, int64_t me, int64_t team) {
    const int64_t start = (out + unit - 1) / unit * me / team * unit;
    return start < out ? start : out;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Where the threads of a call wait for each other. */
struct meeting {
    atomic_int_fast32_t here, round;
};

/* Wait until all threads of the team are here. Mostly the others are a few microseconds behind: to wait for them in the kernel would
   take longer. Who waits long lets others run, as where threads outnumber processors one of the team may be among them. */
static inline void meet(struct meeting *meeting, int64_t team) {
    const int_fast32_t round = atomic_load_explicit(&meeting->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&meeting->here, 1, memory_order_acq_rel) + 1 == team) {
        atomic_store_explicit(&meeting->here, 0, memory_order_relaxed);
        atomic_store_explicit(&meeting->round, round + 1, memory_order_release);
        return;
    }
    for (int i = 0; atomic_load_explicit(&meeting->round, memory_order_acquire) == round; i++)
        if (i < PATIENCE)
            pause_briefly();
        else
            sched_yield();
}

/* What a thread lists kept inputs in, for inputs of up to `in`. */
struct list {
    int64_t *index;
    float *value;
};

static inline struct list list_of(void *memory, int64_t threads, int64_t in, int64_t me) {
    int64_t *index = memory;
    return (struct list){index + me * in, (float *)(index + threads * in) + me * in};
}

#define LIST_BYTES(threads, in) ((size_t)(threads) * (size_t)(in) * (sizeof(int64_t) + sizeof(float)))

/* Outputs that a thread's share of a site is a multiple of. */
static inline int64_t unit_of(const struct site *site) { return site->quantized ? QUANTIZED_UNIT : UNIT; }

/* How queries and keys become heads: their counts, the numbers of each, the weights (size,) of their norms or null. */
struct heads {
    int64_t queries, keys, size;
    const void *query_norm, *key_norm;
    float epsilon;
};

/* Parts of a token that several calls are made of, for each type; what they do is said where they are. */
#define DECLARED(TYPE)                                                                                                 \
    int64_t kept_##TYPE(const TYPE *x, const float *norm, float threshold, int64_t in, int64_t *index, float *value);  \
    void site_outputs_##TYPE(const struct site *site, struct list kept, int64_t count, int64_t start, int64_t stop,    \
                             int64_t next, TYPE *y);                                                                   \
    void turn_heads_##TYPE(const struct heads *heads, const TYPE *cosine, const TYPE *sine, int64_t start,             \
                           int64_t stop, TYPE *y);                                                                     \
    void own_gated_##TYPE(const struct site *site, int gelu, struct list kept, int64_t count, int64_t start,           \
                          int64_t stop, TYPE *both);                                                                   \
    void activate_##TYPE(int gelu, int64_t width, int64_t start, int64_t stop, TYPE *both);

DECLARED(float32)
DECLARED(bfloat16)

#define PARTS 4     /* of kept inputs */
#define ENOUGH 512  /* inputs from which on they are multiplied in parts */

/* Whether the products of one row with parts of the inputs are summed apart, so that threads can take whole columns: where each takes
   a piece of every column, the processor fetches with it what belongs to others. Sums are of the same parts whoever takes them. */
static inline int in_parts(const struct quantized *weight) { return weight->in >= ENOUGH; }

/* Products (out,) of a part of `count` kept inputs, one row. The parts before `last` follow it. */
void quantized_part(const struct quantized *weight, const int64_t *index, const float *value, int64_t count, int64_t part,
                    int64_t last, float *result);

/* Results (rows, stop - start) of quantized outputs from `start` to `stop` for kept inputs with values (rows, spacing), at most 16384
   in all. Outputs from `next` on, if it is not negative, will be asked for next. */
void quantized_outputs(const struct quantized *weight, const int64_t *index, const float *value, int64_t count, int64_t spacing,
                       int64_t rows, int64_t start, int64_t stop, int64_t next, float *result);

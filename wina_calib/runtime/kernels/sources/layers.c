/* One token through all decoder layers of Llama's form in one call: norm, queries, keys and values, rotary embedding, attention
   over the cache as it lies, its output, and the gated MLP, each with its residual.

   Between two products of megabytes whatever else runs finds its code and data gone from the caches; here that is a few
   hundred lines of code, and threads begin once a token. They share the parts of the inputs of each product, or its outputs, and
   the key heads of attention, and wait for each other where one reads what others wrote. Norms and lists of kept inputs each makes
   for itself. Results are rounded where the calls for parts of a layer round them, and are the same for any number of threads. */

#include <stdlib.h>

#include "site.h"

#include "attend.h"

int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* What stays the same from token to token. */
struct layer {
    const struct site *attn_in, *attn_out, *mlp_in, *mlp_out;
    const void *norm, *mlp_norm; /* weights (width,) */
    struct heads heads;
    float epsilon, mlp_epsilon, scale;
    int32_t gelu;
};

/* Where a layer's keys and values (key heads, length, size) lie, how far heads and places are apart in numbers, and how many places
   are filled: `counter` says so where it is not null, and counts on. */
struct past {
    void *keys, *values;
    int64_t key_head, key_place, value_head, value_place, filled;
    int64_t *counter;
};

static inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

/* Numbers for the products and heads of a token that threads share, and for each thread its normed input and attention. */
struct room {
    int64_t width, listed, heads, attended, inner, scratch, sums;
};

static struct room room_for(const struct layer *layers, int64_t count, int64_t length) {
    struct room need = {layers->attn_in->in, 0, 0, 0, 0, 0, 0};
    for (const struct layer *l = layers; l < layers + count; l++) {
        need.listed = larger_of(need.listed, larger_of(larger_of(l->attn_in->in, l->attn_out->in), l->mlp_out->in));
        need.heads = larger_of(need.heads, l->attn_in->out);
        need.attended = larger_of(need.attended, l->attn_out->in);
        need.inner = larger_of(need.inner, l->mlp_in->out);
        need.sums = larger_of(need.sums, larger_of(larger_of(l->attn_in->out, l->mlp_in->out), l->mlp_out->out));
        need.scratch = larger_of(need.scratch, SCRATCH(l->heads.queries / l->heads.keys, length, l->heads.size));
    }
    return need;
}

/* Whether threads take parts of a site's inputs: as many each. */
static inline int by_inputs(const struct site *site, int64_t team) {
    return team > 1 && PARTS % team == 0 && site->quantized && in_parts(site->quantized);
}

/* The products of a thread's parts of a site's inputs, to sums (PARTS, out). */
static void own_parts(const struct site *site, struct list own, int64_t count, int64_t me, int64_t team, float *sums) {
    const int64_t last = share(PARTS, 1, me + 1, team);
    for (int64_t part = share(PARTS, 1, me, team); part < last; part++)
        quantized_part(site->quantized, own.index, own.value, count, part, last, sums + part * site->out);
}

/* y (out,) from `start` to `stop` from the sums of all parts. */
#define JOINED(TYPE)                                                                                                   \
    static void joined_##TYPE(const struct site *site, const float *sums, int64_t start, int64_t stop, TYPE *y) {      \
        const TYPE *bias = site->bias;                                                                                 \
        for (int64_t j = start; j < stop; j++) {                                                                       \
            float sum = sums[j];                                                                                       \
            for (int64_t part = 1; part < PARTS; part++) sum += sums[part * site->out + j];                            \
            y[j] = narrow_##TYPE(bias ? sum + widen_##TYPE(bias[j]) : sum);                                            \
        }                                                                                                              \
    }

JOINED(float32)
JOINED(bfloat16)

/* A thread's share of a site's outputs, in multiples of `unit`. */
#define SITE_OUTPUTS(TYPE, site, unit, to)                                                                             \
    if (by_inputs(site, team)) {                                                                                       \
        own_parts(site, own, count, me, team, sums);                                                                   \
        meet(&meeting, team);                                                                                          \
        joined_##TYPE(site, sums, share((site)->out, unit, me, team), share((site)->out, unit, me + 1, team), to);     \
    } else                                                                                                             \
        site_outputs_##TYPE(site, own, count, share((site)->out, unit, me, team),                                      \
                            share((site)->out, unit, me + 1, team), -1, to);

/* to[j] += from[j] for a thread's share of a site's outputs. */
#define ADD_RESIDUAL(TYPE, site, from, to)                                                                             \
    for (int64_t j = share((site)->out, unit_of(site), me, team); j < share((site)->out, unit_of(site), me + 1, team); j++) \
        (to)[j] = narrow_##TYPE(widen_##TYPE((from)[j]) + widen_##TYPE((to)[j]));

/* From x (width,) to hidden (count, width), what each layer gives, and behind it the norm of the last one's with the weights `norm`
   (width,), which may be null. A layer's cache has room for `length` places, of which `seen`
   (length,) or null says which are attended to. Returns 1 without memory, 2 where a cache is full; then nothing was changed. */
#define LAYERS(TYPE)                                                                                                   \
    int layers_##TYPE(const struct layer *layers, struct past *past, int64_t layer_count, const TYPE *x, TYPE *hidden, \
                      const TYPE *cosine, const TYPE *sine, const uint8_t *seen, const TYPE *norm, float epsilon,      \
                      int64_t length, int threads) {                                                                   \
        for (int64_t l = 0; l < layer_count; l++) {                                                                    \
            if (past[l].counter) past[l].filled = *past[l].counter;                                                    \
            if (past[l].filled < 0 || past[l].filled >= length) return 2;                                              \
        }                                                                                                              \
        int64_t places = length;                                                                                       \
        const int64_t first = first_seen(seen, &places);                                                               \
        const struct room need = room_for(layers, layer_count, places);                                                \
        const size_t shared = (size_t)(need.width + need.heads + need.attended + need.inner);                          \
        const size_t lists = LIST_BYTES(threads, need.listed);                                                         \
        const size_t scratches = (size_t)(threads * need.scratch + PARTS * need.sums) * sizeof(float);                 \
        char *memory = malloc(lists + scratches + (shared + (size_t)(threads * need.width)) * sizeof(TYPE));           \
        if (!memory) return 1;                                                                                         \
        TYPE *const middle = (TYPE *)(memory + lists + scratches), *const heads = middle + need.width;                 \
        TYPE *const attended = heads + need.heads, *const both = attended + need.attended;                             \
        struct meeting meeting = {0};                                                                                  \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                                \
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                     \
            const struct list own = list_of(memory, threads, need.listed, me);                                         \
            float *sums = (float *)(memory + lists), *scratch = sums + PARTS * need.sums + me * need.scratch;          \
            TYPE *normed = both + need.inner + me * need.width;                                                        \
            for (int64_t l = 0; l < layer_count; l++) {                                                                \
                const struct layer *layer = layers + l;                                                                \
                const struct site *in = layer->attn_in, *out = layer->attn_out, *mlp = layer->mlp_in, *down = layer->mlp_out; \
                const struct heads *form = &layer->heads;                                                              \
                const int64_t size = form->size, group = form->queries / form->keys, key_heads = form->keys;           \
                const TYPE *from = l ? hidden + (l - 1) * need.width : x;                                              \
                TYPE *to = hidden + l * need.width;                                                                    \
                TYPE *keys = past[l].keys, *values = past[l].values;                                                   \
                                                                                                                       \
                normed_##TYPE(from, layer->norm, normed, layer->epsilon, need.width);                                  \
                int64_t count = kept_##TYPE(normed, in->norm, *in->threshold, in->in, own.index, own.value);           \
                const int64_t start = share(in->out, size, me, team), stop = share(in->out, size, me + 1, team);       \
                SITE_OUTPUTS(TYPE, in, size, heads)                                                                    \
                turn_heads_##TYPE(form, cosine, sine, start, stop, heads);                                             \
                for (int64_t h = larger_of(start / size - form->queries, 0); h < stop / size - form->queries; h++) {   \
                    TYPE *place = h < key_heads ? keys + h * past[l].key_head + past[l].filled * past[l].key_place     \
                                                : values + (h - key_heads) * past[l].value_head                        \
                                                      + past[l].filled * past[l].value_place;                          \
                    memcpy(place, heads + (form->queries + h) * size, (size_t)size * sizeof(TYPE));                    \
                }                                                                                                      \
                meet(&meeting, team);                                                                                  \
                for (int64_t h = share(key_heads, 1, me, team); h < share(key_heads, 1, me + 1, team); h++)            \
                    attend_head_##TYPE(heads + h * group * size, keys + h * past[l].key_head + first * past[l].key_place, \
                                       past[l].key_place, values + h * past[l].value_head + first * past[l].value_place, \
                                       past[l].value_place, seen ? seen + first : seen, attended + h * group * size,   \
                                       group, places, size, layer->scale, scratch);                                    \
                meet(&meeting, team);                                                                                  \
                count = kept_##TYPE(attended, out->norm, *out->threshold, out->in, own.index, own.value);              \
                SITE_OUTPUTS(TYPE, out, unit_of(out), middle)                                                          \
                ADD_RESIDUAL(TYPE, out, from, middle)                                                                  \
                meet(&meeting, team);                                                                                  \
                normed_##TYPE(middle, layer->mlp_norm, normed, layer->mlp_epsilon, need.width);                        \
                count = kept_##TYPE(normed, mlp->norm, *mlp->threshold, mlp->in, own.index, own.value);                \
                const int64_t width = down->in, begin = share(width, unit_of(mlp), me, team);                          \
                const int64_t end = share(width, unit_of(mlp), me + 1, team);                                          \
                if (by_inputs(mlp, team)) {                                                                            \
                    own_parts(mlp, own, count, me, team, sums);                                                        \
                    meet(&meeting, team);                                                                              \
                    joined_##TYPE(mlp, sums, begin, end, both);                                                        \
                    joined_##TYPE(mlp, sums, width + begin, width + end, both);                                        \
                    activate_##TYPE(layer->gelu, width, begin, end, both);                                             \
                } else                                                                                                 \
                    own_gated_##TYPE(mlp, layer->gelu, own, count, begin, end, both);                                  \
                meet(&meeting, team);                                                                                  \
                count = kept_##TYPE(both, down->norm, *down->threshold, down->in, own.index, own.value);               \
                SITE_OUTPUTS(TYPE, down, unit_of(down), to)                                                            \
                ADD_RESIDUAL(TYPE, down, middle, to)                                                                   \
                meet(&meeting, team);                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t l = 0; l < layer_count; l++)                                                                      \
            if (past[l].counter) ++*past[l].counter;                                                                   \
        if (norm) normed_##TYPE(hidden + (layer_count - 1) * need.width, norm, hidden + layer_count * need.width, epsilon, need.width); \
        free(memory);                                                                                                  \
        return 0;                                                                                                      \
    }

LAYERS(float32)
LAYERS(bfloat16)

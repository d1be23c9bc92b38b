/* A masked product of many rows with weights (in, out) in bfloat16: as fast as the products can be made.

   A strip of weights is copied to the first cache. There each row multiplies those of its own kept inputs, two inputs at a time,
   which takes more instructions a product than rows side by side that take all inputs, and is worth it where a row drops enough
   of them. */

#include <stdlib.h>

#include "lines.h"

int omp_get_thread_num(void);
int omp_get_num_threads(void);

#ifdef PAIRS_OF_BFLOAT16

#define DEPTH 128  /* inputs whose weights are in the first cache at a time, half of it, as others may share it */
#define STRIP 64   /* outputs of them: two lines of each input */
#define PANEL 512  /* outputs that a thread reads side by side */
#define VECTORS 4  /* of sums of a strip */
#define TILE 8     /* rows whose sums are in registers */
#define MOST 128   /* rows whose sums are in the second cache */
#define LISTED 88  /* kept inputs of DEPTH up to which a row has a list of them */
#define ENTRIES 92 /* room for them, filled up to a multiple of four */
#define NOWHERE (DEPTH * STRIP * 2) /* bytes to the zeros behind a strip */

/* Two kept inputs and where their weights are in a strip, in bytes. */
struct pair {
    uint32_t values;
    uint16_t first, second;
};

/* What DEPTH inputs of some rows multiply with. A row is among those with lists or those that take all. */
struct inputs {
    int64_t listed, whole, count, pairs;
    uint64_t used[DEPTH / 64];            /* inputs that a row keeps, and their numbers */
    uint8_t number[DEPTH];
    int32_t listed_row[MOST], stop[MOST], whole_row[MOST];
    struct pair pair[MOST * ENTRIES / 2]; /* of the listed rows, one row's after another's */
    uint32_t both[MOST * DEPTH / 2];      /* pairs of inputs of the whole rows (tiles, DEPTH / 2, TILE) */
};

/* The block `b` of inputs of `rows` rows from the one at `first` on. */
static void list_inputs(const struct product *p, int64_t b, int64_t first, int64_t rows, struct inputs *to) {
    const bfloat16 *x = p->x + first * p->in + b * DEPTH;
    const int64_t count = smaller_of(p->in - b * DEPTH, DEPTH);
    const __m512i places = _mm512_slli_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 23); /* times 128 bytes, in the high half */
    struct pair *next = to->pair;
    to->listed = to->whole = to->count = 0;
    to->pairs = (count + 1) / 2;
    memset(to->used, 0, sizeof to->used);
    for (int64_t r = 0; r < rows; r++, x += p->in) {
        uint32_t kept[DEPTH + 2 * LANES];
        bfloat16 masked[DEPTH];
        int64_t found = 0;
        for (int64_t i = 0; i < 2 * to->pairs; i += LANES) {
            const __mmask16 inside = (__mmask16)first_of(count - i);
            const __m512i word = words_of(x + i, inside);
            const __mmask16 keep = kept_words(word, inside, p->norm ? p->norm + b * DEPTH + i : 0, limit_of(p, first + r));
            const __m512i entry = _mm512_or_si512(word, _mm512_add_epi32(places, _mm512_set1_epi32((int)i << 23)));
            _mm512_storeu_si512(kept + found, _mm512_maskz_compress_epi32(keep, entry));
            _mm256_storeu_si256((__m256i *)(masked + i), _mm512_cvtepi32_epi16(_mm512_maskz_mov_epi32(keep, word)));
            found += __builtin_popcount(keep);
            to->used[i / 64] |= (uint64_t)keep << i % 64;
        }
        if (found > LISTED) {
            uint32_t *own = to->both + to->whole / TILE * (DEPTH / 2) * TILE + to->whole % TILE;
            for (int64_t p = 0; p < to->pairs; p++) memcpy(own + p * TILE, masked + 2 * p, sizeof *own);
            to->whole_row[to->whole++] = (int32_t)r;
            continue;
        }
        if (!found) continue;
        _mm512_storeu_si512(kept + found, _mm512_set1_epi32(NOWHERE << 16));
        for (int64_t i = 0; i < found; i += LANES) { /* value, place, value, place become two values and two places */
            const __m512i given = _mm512_loadu_si512(kept + i);
            _mm512_storeu_si512(next + i / 2, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(given, 0xd8), 0xd8));
        }
        next += (found + 3) / 4 * 2;
        to->listed_row[to->listed] = (int32_t)r;
        to->stop[to->listed++] = (int32_t)(next - to->pair);
    }
    for (int half = 0; half < DEPTH / 64; half++)
        for (uint64_t left = to->used[half]; left; left &= left - 1)
            to->number[to->count++] = (uint8_t)(64 * half + __builtin_ctzll(left));
}

/* Two vectors of sums += the products of a pair with a line of its weights. */
ALWAYS void add_line(const struct pair *pair, const char *strip, __m512bh x, __m512 *low, __m512 *high) {
    __m512i a = _mm512_load_si512(strip + pair->first), b = _mm512_load_si512(strip + pair->second);
    __asm__("" : "+v"(a), "+v"(b)); /* each is loaded once: loads are what there are too many of */
    *low = _mm512_dpbf16_ps(*low, (__m512bh)_mm512_unpacklo_epi16(a, b), x);
    *high = _mm512_dpbf16_ps(*high, (__m512bh)_mm512_unpackhi_epi16(a, b), x);
}

/* sums (STRIP,) += the products of one row's pairs. */
ALWAYS void add_listed(const struct pair *pair, const struct pair *stop, const char *strip, float *sums) {
    __m512 a = _mm512_load_ps(sums), b = _mm512_load_ps(sums + LANES), c = _mm512_load_ps(sums + 2 * LANES);
    __m512 d = _mm512_load_ps(sums + 3 * LANES), e = _mm512_setzero_ps(), f = e, g = e, h = e;
    for (; pair < stop; pair += 2) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32((int)pair[0].values), y = (__m512bh)_mm512_set1_epi32((int)pair[1].values);
        add_line(pair, strip, x, &a, &b);
        add_line(pair, strip + 2 * LINE, x, &c, &d);
        add_line(pair + 1, strip, y, &e, &f);
        add_line(pair + 1, strip + 2 * LINE, y, &g, &h);
    }
    _mm512_store_ps(sums, _mm512_add_ps(a, e));
    _mm512_store_ps(sums + LANES, _mm512_add_ps(b, f));
    _mm512_store_ps(sums + 2 * LANES, _mm512_add_ps(c, g));
    _mm512_store_ps(sums + 3 * LANES, _mm512_add_ps(d, h));
}

/* The same for all inputs of some rows, whose sums are at `row`; `packed` (pairs, VECTORS). */
ALWAYS void add_whole(const int rows, const uint32_t *both, int64_t pairs, const __m512i *packed, const int32_t *row, float *sums) {
    for (int v = 0; v < VECTORS; v += 2) {
        __m512 low[TILE], high[TILE];
        for (int r = 0; r < rows; r++) {
            low[r] = _mm512_load_ps(sums + row[r] * STRIP + v * LANES);
            high[r] = _mm512_load_ps(sums + row[r] * STRIP + (v + 1) * LANES);
        }
        for (int64_t p = 0; p < pairs; p++) {
            const __m512bh a = (__m512bh)packed[VECTORS * p + v], b = (__m512bh)packed[VECTORS * p + v + 1];
            for (int r = 0; r < rows; r++) {
                const __m512bh x = (__m512bh)_mm512_set1_epi32((int)both[p * TILE + r]);
                low[r] = _mm512_dpbf16_ps(low[r], a, x);
                high[r] = _mm512_dpbf16_ps(high[r], b, x);
            }
        }
        for (int r = 0; r < rows; r++) {
            _mm512_store_ps(sums + row[r] * STRIP + v * LANES, low[r]);
            _mm512_store_ps(sums + row[r] * STRIP + (v + 1) * LANES, high[r]);
        }
    }
}

static void add_tile(int64_t rows, const uint32_t *both, int64_t pairs, const __m512i *packed, const int32_t *row, float *sums) {
#define CASE(n) case n: add_whole(n, both, pairs, packed, row, sums); break;
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
#undef CASE
}

/* Weights that are asked for while others are multiplied: lines of the inputs that are used, one input's after another's. */
struct ahead {
    const struct inputs *inputs;
    const bfloat16 *weight;
    int64_t out, lines, input, line;
};

static inline void ask(struct ahead *ahead, int64_t lines) {
    for (; lines > 0 && ahead->input < ahead->inputs->count; lines--) {
        const bfloat16 *row = ahead->weight + ahead->inputs->number[ahead->input] * ahead->out;
        __builtin_prefetch(row + ahead->line * LINE, 0, 2);
        if (++ahead->line == ahead->lines) {
            ahead->line = 0;
            ahead->input++;
        }
    }
}

/* A strip of `width` outputs: as it is for listed rows, and as pairs of inputs (pairs, VECTORS) for whole ones. */
static void copy_strip(const struct inputs *inputs, const bfloat16 *weight, int64_t out, int64_t in, int64_t width, char *strip,
                       __m512i *packed) {
    const __mmask32 inside[2] = {first_of(width), width > LINE ? first_of(width - LINE) : 0};
    for (int64_t i = 0; i < inputs->count && inputs->listed; i++)
        for (int h = 0; h < 2; h++) {
            const int64_t k = inputs->number[i];
            _mm512_store_si512(strip + (2 * k + h) * 64, _mm512_maskz_loadu_epi16(inside[h], weight + k * out + h * LINE));
        }
    for (int64_t p = 0; p < inputs->pairs && inputs->whole; p++)
        for (int h = 0; h < 2; h++) {
            const bfloat16 *row = weight + 2 * p * out + h * LINE;
            const __m512i a = _mm512_maskz_loadu_epi16(inside[h], row);
            const __m512i b = _mm512_maskz_loadu_epi16(2 * p + 1 < in ? inside[h] : 0, row + out);
            packed[VECTORS * p + 2 * h] = _mm512_unpacklo_epi16(a, b);
            packed[VECTORS * p + 2 * h + 1] = _mm512_unpackhi_epi16(a, b);
        }
}

/* Of a strip of one row its outputs (width,). */
static void narrow_strip(const float *sums, const bfloat16 *bias, int64_t width, bfloat16 *y) {
    for (int64_t j = 0; j < width; j += LINE) narrow_line(sums + j, bias ? bias + j : 0, width - j, y + j);
}

/* What a thread has room for. */
struct room {
    char *strip;
    __m512i *packed;
    float *sums;
};

/* What one thread computes of outputs, from `start` to `stop`, for `count` rows from the one at `first` on. */
static void own_outputs(const struct product *p, const struct inputs *inputs, int64_t first, int64_t count, int64_t start,
                        int64_t stop, struct room room) {
    const int64_t blocks = (p->in + DEPTH - 1) / DEPTH, out = p->out;
    for (int64_t panel = start, width; panel < stop; panel += width) {
        width = smaller_of(stop - panel, PANEL);
        const int64_t strips = (width + STRIP - 1) / STRIP;
        memset(room.sums, 0, (size_t)(strips * count * STRIP) * sizeof(float));
        for (int64_t b = 0; b < blocks; b++) {
            const struct inputs *here = inputs + b;
            const int64_t after = (b + 1) % blocks, from = after ? panel : panel + width;
            struct ahead ahead = {inputs + after, p->weight + after * DEPTH * out + from, out, 0, 0, 0};
            ahead.lines = (smaller_of(stop - from, PANEL) + LINE - 1) / LINE;
            const int64_t turns = strips * (here->listed + here->whole);
            const int64_t lines = turns ? (ahead.inputs->count * ahead.lines + turns - 1) / turns : 0;
            for (int64_t s = 0; s < strips; s++) {
                float *own = room.sums + s * count * STRIP;
                const int64_t j = panel + s * STRIP;
                copy_strip(here, p->weight + b * DEPTH * out + j, out, p->in - b * DEPTH, smaller_of(panel + width - j, STRIP),
                           room.strip, room.packed);
                for (int64_t r = 0; r < here->listed; r++) {
                    ask(&ahead, lines);
                    add_listed(here->pair + (r ? here->stop[r - 1] : 0), here->pair + here->stop[r], room.strip,
                               own + here->listed_row[r] * STRIP);
                }
                for (int64_t r = 0; r < here->whole; r += TILE) {
                    const int64_t rows = smaller_of(here->whole - r, TILE);
                    ask(&ahead, lines * rows);
                    add_tile(rows, here->both + r * DEPTH / 2, here->pairs, room.packed, here->whole_row + r, own);
                }
            }
        }
        for (int64_t r = 0; r < count; r++)
            for (int64_t s = 0, j = panel; s < strips; s++, j += STRIP)
                narrow_strip(room.sums + (s * count + r) * STRIP, p->bias ? p->bias + j : 0, smaller_of(panel + width - j, STRIP),
                             p->y + (first + r) * out + j);
    }
}

int many_rows(const struct product *p, int threads) {
    const int64_t blocks = (p->in + DEPTH - 1) / DEPTH;
    const size_t strip = NOWHERE + STRIP * 2, packed = DEPTH * STRIP * sizeof(bfloat16);
    const size_t own = strip + packed + (size_t)(PANEL * smaller_of(p->rows, MOST)) * sizeof(float);
    const size_t lists = ((size_t)blocks * sizeof(struct inputs) + 63) / 64 * 64;
    char *memory = aligned_alloc(64, lists + (size_t)threads * own);
    if (!memory) return 1;
    struct inputs *inputs = (struct inputs *)memory;
    for (int64_t first = 0; first < p->rows; first += MOST) {
        const int64_t count = smaller_of(p->rows - first, MOST);
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
            char *mine = memory + lists + (size_t)me * own;
            const struct room room = {mine, (__m512i *)(mine + strip), (float *)(mine + strip + packed)};
            for (int64_t b = me; b < blocks; b += team) list_inputs(p, b, first, count, inputs + b);
            memset(room.strip + NOWHERE, 0, STRIP * 2);
            _Pragma("omp barrier")
            own_outputs(p, inputs, first, count, share(p->out, STRIP, me, team), share(p->out, STRIP, me + 1, team), room);
        }
    }
    free(memory);
    return 0;
}

/* A row's result does not depend on the number of threads. Returns 1 without memory. */
int product_bfloat16(const bfloat16 *x, const float *norm, const float *threshold, const uint8_t *open, const bfloat16 *weight,
                     const bfloat16 *bias, bfloat16 *y, int64_t rows, int64_t in, int64_t out, int threads) {
    const struct product product = {x, norm, threshold, open, weight, bias, y, rows, in, out};
    return rows <= FEW_ROWS ? few_rows(&product, threads) : many_rows(&product, threads);
}

#endif

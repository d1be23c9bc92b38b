/* Products of kept inputs with quantized weights, which lie by input: int4 with scales in groups of outputs inside a column,
   int8 with a scale an output.

   A block of kept inputs at a time is multiplied in whole numbers: what an input and a group's scale give is rounded to 16 bits
   of the block's largest of that group, two inputs are interleaved, and one instruction adds both their products with the
   codes; or, for one row of 4-bit codes with AVX-512, four inputs, whose products with either byte of those 16 bits are added.
   Sums of a block are exact, and added up in float32. The error is that rounding: 2^-16 of the largest, which is far below what
   weights of 4 and 8 bits and inputs in bfloat16 have lost before.
   While a block is multiplied from the second cache, the next one's columns are fetched into it. */

#include <stdlib.h>

#include "site.h"
#include "vectors.h"

int omp_get_thread_num(void);
int omp_get_num_threads(void);

#define COLUMNS 64 /* kept inputs that are multiplied at a time; at most 256, or sums would not fit */
#define PAIRS (COLUMNS / 2)
#define SUMS 16384 /* sums that a thread holds */
#define TILE 4608  /* outputs at a time, at most: a block of columns and the next fit the second cache */
#define GROUPS (TILE / 32 + WORDS)
#define LINE 64    /* bytes of a cache line */
#define AT_ONCE 4  /* rows that a code is unpacked for */

/* What a block of kept inputs multiplies with, for some rows: numbers of 16 bits in pairs (rows, PAIRS, groups), what such a
   number counts for (rows, groups), and the sums of what zero points stand for (rows, groups). */
struct factors {
    int64_t groups;
    int32_t pair[AT_ONCE * PAIRS * GROUPS];
    float scale[AT_ONCE * GROUPS];
    int32_t shift[AT_ONCE * GROUPS];
};

#define SIDE 16 /* columns that are asked for side by side: memory gives most to few that are read on and on */
#define NEAR (2 * LINE) /* bytes ahead in a column that are asked for once more: of what is asked for in a row some is not fetched */

/* What follows a block: columns from a tile's first output on, and where the next of them are asked for, a line at a time. */
struct ahead {
    const uint8_t *column[2 * COLUMNS];
    int64_t input[COLUMNS], group; /* whose scales and zero points are asked for, and from which group on */
    int64_t first, offset, bytes;  /* of SIDE columns, in a column, and where it ends */
    struct beside {
        const char *from; /* of the first input */
        int64_t row, bytes, lines;
    } beside[2]; /* scales and zero points of a tile's groups */
};

/* Ask for a line of four columns of the SIDE next ones to be in the second cache. */
ALWAYS void ask_four(const struct ahead *ahead, int64_t k) {
    const uint8_t *const *column = ahead->column + ahead->first + k % SIDE;
    for (int i = 0; i < 4; i++) __builtin_prefetch(column[i] + ahead->offset, 0, 2);
}

/* Where in a column to ask once more while its vector at `offset` is read. */
ALWAYS int64_t near_of(const struct ahead *ahead, int64_t offset) { return offset + NEAR < ahead->bytes ? offset + NEAR : offset; }

/* Ask once more for line number `n` of the next block's scales and zero points, of one input after the other. */
ALWAYS void ask_beside(const struct ahead *ahead, int64_t n) {
    const struct beside *of = ahead->beside;
    int64_t line = n / COLUMNS;
    if (line >= of->lines) line -= of->lines, of++;
    if (line >= of->lines) return;
    const int64_t last = of->bytes - 1, at = line * LINE < last ? line * LINE : last;
    __builtin_prefetch(of->from + ahead->input[n % COLUMNS] * of->row + at, 0, 2);
}

/* Go on to their next line, or to the next columns; behind the last known ones asking again costs nothing. */
ALWAYS void go_on(struct ahead *ahead) {
    ahead->offset += LINE;
    if (ahead->offset >= ahead->bytes) {
        ahead->offset = 0;
        ahead->first += ahead->first < 2 * COLUMNS - SIDE ? SIDE : 0;
    }
}

/* Some kept inputs, filled up to a multiple of four: their indices, and their columns from a tile's first output on. */
struct block {
    const uint8_t *column[COLUMNS];
    int64_t input[COLUMNS], count;
};

/* Whether codes are taken of four inputs at a time. */
#define BY_FOUR(bits, rows) (QUADS && (bits) == 4 && (rows) == 1)

#ifdef VECTORS

/* The sums of a vector of codes in the order of their outputs. Interleaving puts the first words of each 16 bytes into one vector of
   pairs and the others into another; each of these gives a sum for every place in a word: of bytes, or of their halves. */
ALWAYS void in_order(const int bits, const int group, const int rows, const float *sums, float *result) {
    if (BY_FOUR(bits, rows)) {
        const int half = group / 2;
        for (int byte = 0; byte < VECTOR; byte += 4)
            for (int high = 0; high < 2; high++) {
                const float *from = sums + (byte % 16 / 2 + high) * WORDS + byte / 16 * 4;
                memcpy(result + byte / half * group + high * half + byte % half, from, 4 * sizeof(float));
            }
        return;
    }
    const int halves = bits == 4 ? 2 : 1, half = bits == 4 ? group / 2 : VECTOR;
    for (int byte = 0; byte < VECTOR; byte += 8)
        for (int high = 0; high < halves; high++) {
            const float *even = sums + (byte % 16 / 8 * 2 * halves + high) * WORDS + byte / 16 * 4;
            const __m128 a = _mm_loadu_ps(even), b = _mm_loadu_ps(even + halves * WORDS);
            float *to = result + byte / half * half * halves + high * half + byte % half;
            _mm_storeu_ps(to, _mm_unpacklo_ps(a, b));
            _mm_storeu_ps(to + 4, _mm_unpackhi_ps(a, b));
        }
}

#if QUADS

/* sums += the products of a block's 4-bit codes in the vector at `offset`: of four inputs at a time, both codes of a byte and the low
   one, with both bytes of each number. */
ALWAYS void add_by_four(const int group, const struct block *block, int64_t offset, const struct factors *by,
                        struct ahead *ahead, float *sums) {
    const int64_t g = 2 * offset / group, groups = by->groups;
    ints both[2][4], low[2][4];
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 4; i++) both[h][i] = low[h][i] = zero();
    const int64_t near = near_of(ahead, offset);
    for (int64_t k = 0; k < block->count; k += 4) {
        ints x[2], from[4], codes[4];
        ask_four(ahead, k);
        for (int i = 0; i < 4; i++) __builtin_prefetch(block->column[k + i] + near, 0, 2);
        ask_beside(ahead, offset / LINE * (COLUMNS / 4) + k / 4);
        if (k % SIDE == SIDE - 4) go_on(ahead);
        for (int i = 0; i < 4; i++) from[i] = load(block->column[k + i] + offset);
        for (int h = 0; h < 2; h++) x[h] = spread(by->pair + (k / 2 + h) * groups + g, group);
        bytes_in_turn(from, codes);
        for (int i = 0; i < 4; i++) {
            const ints less = only(codes[i], 0x0f0f);
            for (int h = 0; h < 2; h++) {
                both[h][i] = add_bytes(both[h][i], codes[i], x[h]);
                low[h][i] = add_bytes(low[h][i], less, x[h]);
            }
        }
    }
    const floats scale = as_floats(spread(by->scale + g, group)), less = times(scale, 0.0625f);
    const ints shift = spread(by->shift + g, group), more = sixteen_times(shift);
    for (int i = 0; i < 4; i++) {
        const ints all = joined(both[1][i], both[0][i]), code = joined(low[1][i], low[0][i]);
        add_scaled(sums + 2 * i * WORDS, subtract(code, shift), scale);
        add_scaled(sums + (2 * i + 1) * WORDS, subtract(subtract(all, code), more), less);
    }
}

#endif

/* sums (rows, stride) += the products of a block's codes in the vector at `offset`. */
ALWAYS void add_vector(const int bits, const int group, const int rows, const struct block *block, int64_t offset,
                       const struct factors *by, struct ahead *ahead, float *sums, int64_t stride) {
#if QUADS
    if (BY_FOUR(bits, rows)) {
        add_by_four(group, block, offset, by, ahead, sums);
        return;
    }
#endif
    const int parts = bits == 4 ? 4 : 2, halves = rows == 1 ? 2 : 1;
    const int64_t g = bits == 4 ? 2 * offset / group : 0, groups = by->groups, near = near_of(ahead, offset);
    for (int first = 0; first < 2; first += halves) {
        ints sum[4][2][4];
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < halves; h++)
                for (int n = 0; n < parts; n++) sum[r][h][n] = zero();
        for (int64_t p = 0; p < block->count / 2; p++) {
            const ints a = load(block->column[2 * p] + offset), b = load(block->column[2 * p + 1] + offset);
            if (!first && p % 2 && (VECTOR == LINE || p / (SIDE / 2) % 2)) { /* of two vectors in a line one asks */
                ask_four(ahead, 2 * p - 2);
                if (p % (SIDE / 2) == SIDE / 2 - 1) go_on(ahead);
            }
            if (!first && offset % LINE == 0) {
                for (int i = 0; i < 2; i++) __builtin_prefetch(block->column[2 * p + i] + near, 0, 2);
                if (bits == 4) ask_beside(ahead, offset / LINE * PAIRS + p);
            }
            ints x[4];
            for (int r = 0; r < rows; r++) x[r] = spread(by->pair + (r * PAIRS + p) * groups + g, bits == 4 ? group : 0);
            for (int h = 0; h < halves; h++) {
                const ints both = first + h ? high_pairs(a, b) : low_pairs(a, b);
                ints part[4];
                if (bits == 4) { /* each code, the third with sixteen times the fourth, two of them sixteen times */
                    part[0] = only(both, 0x0f);
                    part[1] = only(both, 0xf0);
                    part[2] = high_byte(both);
                    part[3] = only(part[2], 0xf0);
                } else {
                    part[0] = signed_low_byte(both);
                    part[1] = signed_high_byte(both);
                }
                for (int r = 0; r < rows; r++)
                    for (int n = 0; n < parts; n++) sum[r][h][n] = add_products(sum[r][h][n], part[n], x[r]);
            }
        }
        for (int r = 0; r < rows; r++) {
            const floats scale = as_floats(spread(by->scale + r * groups + g, bits == 4 ? group : 0));
            for (int h = 0; h < halves; h++) {
                float *to = sums + r * stride + (first + h) * parts * WORDS;
                if (bits == 4) {
                    const ints shift = spread(by->shift + r * groups + g, group), more = sixteen_times(shift);
                    const floats less = times(scale, 0.0625f);
                    add_scaled(to, subtract(sum[r][h][0], shift), scale);
                    add_scaled(to + WORDS, subtract(sum[r][h][1], more), less);
                    add_scaled(to + 2 * WORDS, subtract(subtract(sum[r][h][2], sum[r][h][3]), shift), scale);
                    add_scaled(to + 3 * WORDS, subtract(sum[r][h][3], more), less);
                } else {
                    add_scaled(to, sum[r][h][0], scale);
                    add_scaled(to + WORDS, sum[r][h][1], scale);
                }
            }
        }
    }
}

#else

ALWAYS void in_order(const int bits, const int group, const int rows, const float *sums, float *result) {
    (void)group, (void)rows;
    memcpy(result, sums, (size_t)(VECTOR * 8 / bits) * sizeof(float));
}

ALWAYS void add_vector(const int bits, const int group, const int rows, const struct block *block, int64_t offset,
                       const struct factors *by, struct ahead *ahead, float *sums, int64_t stride) {
    (void)ahead;
    const int64_t groups = by->groups;
    for (int r = 0; r < rows; r++) {
        int32_t sum[2 * VECTOR] = {0};
        for (int64_t p = 0; p < block->count / 2; p++) {
            const int32_t *pair = by->pair + (r * PAIRS + p) * groups;
            int16_t code[2][2 * VECTOR];
            for (int k = 0; k < 2; k++) {
                const uint8_t *from = block->column[2 * p + k] + offset;
                if (bits == 8)
                    for (int i = 0; i < VECTOR; i++) code[k][i] = (int8_t)from[i];
                else
                    for (int s = 0; s < VECTOR; s += group / 2)
                        for (int i = s; i < s + group / 2; i++) {
                            code[k][s + i] = from[i] & 15;
                            code[k][s + i + group / 2] = from[i] >> 4;
                        }
            }
            const int size = bits == 8 ? VECTOR : group;
            for (int s = 0; s < VECTOR * 8 / bits; s += size) {
                const int32_t both = bits == 8 ? *pair : pair[(2 * offset + s) / group];
                const int16_t x = (int16_t)(both & 0xffff), y = (int16_t)(both >> 16);
                for (int i = s; i < s + size; i++) sum[i] += (int32_t)x * code[0][i] + (int32_t)y * code[1][i];
            }
        }
        for (int i = 0; i < VECTOR * 8 / bits; i++) {
            const int64_t g = r * groups + (bits == 4 ? (2 * offset + i) / group : 0);
            sums[r * stride + i] += (float)(sum[i] - (bits == 4 ? by->shift[g] : 0)) * by->scale[g];
        }
    }
}

#endif

static inline float widen_float16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    const float finite = float_of(rest << 13) * 0x1p112f; /* also of those that are not normal */
    const uint32_t bits = rest < 0x7c00 ? bits_of(finite) : rest << 13 | 0x7f800000;
    return float_of(sign | bits);
}

/* To the nearest whole number, for sizes below 2^22; a NaN to zero. */
static inline int32_t nearest(float x) { return x != x ? 0 : (int32_t)(bits_of(x + ROUNDS) - 0x4b400000u); }

static inline int32_t pair_of(int32_t low, int32_t high) { return (int32_t)(((uint32_t)low & 0xffff) | (uint32_t)high << 16); }

/* The factors of row `r` for 8-bit codes and inputs with these values, an even number. */
static void round_inputs(const float *value, int64_t count, int64_t r, struct factors *by) {
    float largest = 0;
    for (int64_t k = 0; k < count; k++) {
        const float size = value[k] < 0 ? -value[k] : value[k];
        largest = size > largest ? size : largest;
    }
    const float inverse = largest > TINY ? LARGEST / largest : 0.0f;
    for (int64_t k = 0; k < count; k += 2)
        by->pair[r * PAIRS + k / 2] = pair_of(nearest(value[k] * inverse), nearest(value[k + 1] * inverse));
    by->scale[r] = largest * (1.0f / LARGEST);
}

#ifdef VECTORS

/* A copy of the bytes before `end`, and zeros behind. */
ALWAYS const void *readable(const void *from, const void *end, size_t count, void *copy) {
    if ((const char *)from + count <= (const char *)end) return from;
    memset(copy, 0, count);
    memcpy(copy, from, (size_t)((const char *)end - (const char *)from));
    return copy;
}

/* What multiplies the codes of four inputs, whose values times scales these are, to `to` and `stride` behind it; and the sums of the
   products of that with zero points, whose places are null where all are 8. */
#if QUADS
ALWAYS void factors_by_four(const floats scaled[4], floats inverse, const uint8_t *zeros[4], const int with_zeros, int32_t *to,
                            int64_t stride, ints shift[2]) {
    const ints zero_point = with_zeros ? zero_bytes(zeros) : all_bytes(8);
    ints low, high;
    nearest_bytes(scaled, inverse, &low, &high);
    store(to, low);
    store(to + stride, high);
    shift[0] = add_bytes(shift[0], zero_point, low);
    shift[1] = add_bytes(shift[1], zero_point, high);
}
#endif

ALWAYS void factors_by_two(const floats scaled[4], floats inverse, const uint8_t *zeros[4], const int with_zeros, int32_t *to,
                           int64_t stride, ints *shift) {
    for (int i = 0; i < 4; i += 2) {
        const ints both = nearest_pairs(scaled[i], scaled[i + 1], inverse);
        store(to + i / 2 * stride, both);
        *shift = add_products(*shift, both, with_zeros ? zero_pairs(zeros[i], zeros[i + 1]) : all_pairs(8));
    }
}

/* The factors of row `r` of `rows` for a block of inputs with these values, in the groups from `g0` on, which is even. What is read
   behind a column's last group is there unless the column is one of the last: `checked` reads no further than there are numbers. */
ALWAYS void scale_block(const struct quantized *weight, const struct block *block, const float *value, int64_t g0, int64_t groups,
                        int64_t r, struct factors *by, struct ahead *ahead, const int by_four, const int checked,
                        const int with_zeros) {
    const int64_t stride = by->groups, all = weight->out / weight->group, row = (all + 1) / 2;
    int32_t *pair = by->pair + r * PAIRS * stride;
    const uint16_t *scales_end = weight->scales + weight->in * all;
    const uint8_t *zeros_end = with_zeros ? weight->zeros + weight->in * row : 0;
    floats scaled[COLUMNS];
    for (int64_t g = 0; g < groups; g += WORDS) {
        const uint16_t *scales = weight->scales + g0 + g, *scales_after = weight->scales + ahead->group + g;
        floats most[4] = {as_floats(zero()), as_floats(zero()), as_floats(zero()), as_floats(zero())};
        const int asks = ahead->first < COLUMNS + COLUMNS / 2;
        for (int64_t k = 0; k < block->count; k += 4) {
            for (int i = 0; i < 4; i++) {
                uint16_t copy[WORDS];
                const uint16_t *from = scales + block->input[k + i] * all;
                scaled[k + i] = halves_times(checked ? readable(from, scales_end, sizeof copy, copy) : from, value[k + i]);
                most[i] = larger(most[i], scaled[k + i]);
                __builtin_prefetch(scales_after + ahead->input[k + i] * all, 0, 2);
            }
            if (asks) ask_four(ahead, k);
            if (asks && k % SIDE == SIDE - 4) go_on(ahead);
        }
        const floats largest = larger(larger(most[0], most[1]), larger(most[2], most[3]));
        const floats inverse = over(LARGEST, largest);
        ints shift[2] = {zero(), zero()};
        for (int64_t k = 0; k < block->count; k += 4) {
            const uint8_t *zeros[4] = {0};
            uint64_t copy[4];
            for (int64_t i = 0; i < 4 && with_zeros; i++) {
                zeros[i] = weight->zeros + (g0 + g) / 2 + block->input[k + i] * row;
                if (checked) zeros[i] = readable(zeros[i], zeros_end, sizeof *copy, copy + i);
                __builtin_prefetch(weight->zeros + (ahead->group + g) / 2 + ahead->input[k + i] * row, 0, 2);
            }
#if QUADS
            if (by_four)
                factors_by_four(scaled + k, inverse, zeros, with_zeros, pair + k / 2 * stride + g, stride, shift);
            else
#endif
                (void)by_four,
                factors_by_two(scaled + k, inverse, zeros, with_zeros, pair + k / 2 * stride + g, stride, shift);
        }
#if QUADS
        if (by_four) shift[0] = joined(shift[1], shift[0]);
#endif
        store(by->shift + r * stride + g, shift[0]);
        store_floats(by->scale + r * stride + g, times(largest, 1.0f / LARGEST));
    }
}

static void scale_inputs(const struct quantized *weight, const struct block *block, const float *value, int64_t g0, int64_t groups,
                         int64_t r, int64_t rows, struct factors *by, struct ahead *ahead) {
    const int by_four = BY_FOUR(4, rows), zeros = weight->zeros != 0;
    const int checked = block->input[block->count - 1] + WORDS >= weight->in; /* a column has at least one group */
#define SCALED(by_four, checked, zeros) scale_block(weight, block, value, g0, groups, r, by, ahead, by_four, checked, zeros)
    if (by_four)
        checked ? SCALED(1, 1, zeros) : zeros ? SCALED(1, 0, 1) : SCALED(1, 0, 0);
    else
        checked ? SCALED(0, 1, zeros) : zeros ? SCALED(0, 0, 1) : SCALED(0, 0, 0);
#undef SCALED
}

#else

static void scale_inputs(const struct quantized *weight, const struct block *block, const float *value, int64_t g0, int64_t groups,
                         int64_t r, int64_t rows, struct factors *by, struct ahead *ahead) {
    (void)rows, (void)ahead;
    float scaled[COLUMNS][GROUPS], inverse[GROUPS];
    const int64_t stride = by->groups, all = weight->out / weight->group, row = (all + 1) / 2;
    float *scale = by->scale + r * stride;
    int32_t *shift = by->shift + r * stride;
    memset(scale, 0, (size_t)stride * sizeof(float));
    memset(shift, 0, (size_t)stride * sizeof(int32_t));
    for (int64_t k = 0; k < block->count; k++) {
        const uint16_t *from = weight->scales + block->input[k] * all + g0;
        for (int64_t g = 0; g < groups; g++) {
            scaled[k][g] = value[k] * widen_float16(from[g]);
            const float size = scaled[k][g] < 0 ? -scaled[k][g] : scaled[k][g];
            scale[g] = size > scale[g] ? size : scale[g];
        }
    }
    for (int64_t g = 0; g < groups; g++) {
        inverse[g] = scale[g] > TINY ? LARGEST / scale[g] : 0.0f;
        scale[g] *= 1.0f / LARGEST;
    }
    for (int64_t k = 0; k < block->count; k += 2) {
        const uint8_t *zeros = weight->zeros ? weight->zeros + g0 / 2 : 0;
        const uint8_t *a = zeros + block->input[k] * row, *b = zeros + block->input[k + 1] * row;
        for (int64_t g = 0; g < groups; g++) {
            const int32_t low = nearest(scaled[k][g] * inverse[g]), high = nearest(scaled[k + 1][g] * inverse[g]);
            by->pair[(r * PAIRS + k / 2) * stride + g] = pair_of(low, high);
            shift[g] += zeros ? low * (a[g / 2] >> g % 2 * 4 & 15) + high * (b[g / 2] >> g % 2 * 4 & 15) : 8 * (low + high);
        }
    }
}

#endif

/* The vectors of a tile from `offset` to `stop` (bytes), and their sums (rows, stride). */
ALWAYS void add_tile(const int bits, const int group, const int rows, const struct block *block, int64_t stop,
                     const struct factors *by, struct ahead *ahead, float *sums, int64_t stride) {
    const int outputs = bits == 4 ? 2 * VECTOR : VECTOR;
    int64_t offset = 0;
    for (; offset + VECTOR <= stop; offset += VECTOR, sums += outputs)
        add_vector(bits, group, rows, block, offset, by, ahead, sums, stride);
    if (offset < stop) { /* the rest of each column, and zeros after it; what they give is not used */
        uint8_t rest[COLUMNS * VECTOR] = {0};
        struct block last = *block;
        for (int64_t k = 0; k < block->count; k++) {
            memcpy(rest + k * VECTOR, block->column[k] + offset, (size_t)(stop - offset));
            last.column[k] = rest + k * VECTOR - offset;
        }
        add_vector(bits, group, rows, &last, offset, by, ahead, sums, stride);
    }
}

/* Of the sums of a tile's outputs those from `first` to `stop` in their order. */
ALWAYS void put_in_order(const int bits, const int group, const int rows, const float *sums, int64_t first, int64_t stop, float *result) {
    const int64_t outputs = VECTOR * 8 / bits;
    for (int64_t j = 0; j < stop; j += outputs) {
        const int64_t from = j < first ? first : j, end = j + outputs < stop ? j + outputs : stop;
        float all[2 * VECTOR];
        in_order(bits, group, rows, sums + j, all);
        if (from < end) memcpy(result + from, all + from - j, (size_t)(end - from) * sizeof(float));
    }
}

/* Code for each format. */
#define FORMATS(weight, CALL) \
    if ((weight)->bits == 8) CALL(8, 64) else if ((weight)->group == 64) CALL(4, 64) else CALL(4, 32)
#define TILES(rows)                                                                                                    \
    static void add_tile_##rows(const struct quantized *weight, const struct block *block, int64_t stop,               \
                                const struct factors *by, struct ahead *ahead, float *sums, int64_t stride) {          \
        FORMATS(weight, TILE_OF_##rows)                                                                                \
    }
#define TILE_OF(bits, group, rows) { add_tile(bits, group, rows, block, stop, by, ahead, sums, stride); }
#define TILE_OF_1(bits, group) TILE_OF(bits, group, 1)
#define TILE_OF_2(bits, group) TILE_OF(bits, group, 2)
#define TILE_OF_4(bits, group) TILE_OF(bits, group, 4)
TILES(1)
TILES(2)
TILES(4)

/* Ask for some bytes to be in the second cache. */
ALWAYS void fetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes - 1; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
    __builtin_prefetch((const char *)from + bytes - 1, 0, 2);
}

#define MOST_ROWS 16
#define FAR 16.0f /* times the usual size of a row's values: such an input is not rounded with the others */

/* The sizes (rows,) from which values (rows, spacing) count as far from the others of their row: the mean of their roots, squared,
   is what is usual whatever the size of a few. */
static void far_limits(const float *value, int64_t count, int64_t spacing, int64_t rows, float *limit) {
    for (int64_t r = 0; r < rows; r++) {
        float sum = 0;
        for (int64_t k = 0; k < count; k++) sum += sqrtf(fabsf(value[r * spacing + k]));
        limit[r] = FAR * (sum / (float)count) * (sum / (float)count);
    }
}

/* Whether the input of `value` is far from the others in one of the rows. */
static inline int is_far(const float *value, int64_t spacing, int64_t rows, const float *limit) {
    int far = 0;
    for (int64_t r = 0; r < rows; r++) far |= fabsf(value[r * spacing]) > limit[r];
    return far;
}

/* Kept inputs at `index`, and the output from which on they are multiplied. */
struct read {
    const int64_t *index;
    int64_t count, first;
};

/* Where inputs from number `place` on lie; behind the last one it again. */
ALWAYS void columns_of(const struct quantized *weight, const struct read *from, int64_t place, int64_t count, const uint8_t **to) {
    const int64_t column = weight->out * weight->bits / 8, last = from->count - 1;
    const int64_t inside = last - place < 0 ? 0 : last - place < count ? last - place : count;
    const uint8_t *codes = weight->codes + from->first * weight->bits / 8;
    for (int64_t i = 0; i < inside; i++) to[i] = codes + from->index[place + i] * column;
    for (int64_t i = inside; i < count; i++) to[i] = codes + from->index[last] * column;
}

/* Where COLUMNS inputs from number `k` on lie, and after the last of these the ones that are read then. */
static void columns_on(const struct quantized *weight, const struct read *now, const struct read *then, int64_t k, const uint8_t **to) {
    const int64_t left = now->count - k, own = !then->count || left > COLUMNS ? COLUMNS : left < 0 ? 0 : left;
    columns_of(weight, now, k, own, to);
    if (own < COLUMNS) columns_of(weight, then, own - left, COLUMNS - own, to + own);
}

/* Bytes of each input, which may begin in the middle of a line. */
static struct beside beside_of(const void *from, int64_t row, int64_t bytes) {
    return (struct beside){from, row, bytes, bytes < LINE / 2 ? 1 : (bytes - 2) / LINE + 2};
}

/* Say which inputs follow number `k`, for a block that has begun to be asked for. */
static void look_ahead(struct ahead *ahead, const struct quantized *weight, const struct read *now, const struct read *then, int64_t k) {
    const struct read *from = k < now->count || !then->count ? now : then;
    const int64_t place = from == now ? k : k - now->count, last = from->count - 1;
    const int64_t inside = last - place < 0 ? 0 : last - place < COLUMNS ? last - place : COLUMNS;
    for (int64_t i = 0; i < inside; i++) ahead->input[i] = from->index[place + i];
    for (int64_t i = inside; i < COLUMNS; i++) ahead->input[i] = from->index[last];
    columns_on(weight, now, then, k + COLUMNS, ahead->column + COLUMNS);
    ahead->group = weight->bits == 4 ? from->first / weight->group : 0;
    if (weight->bits == 4) {
        const int64_t groups = 2 * ahead->bytes / weight->group, all = weight->out / weight->group;
        ahead->beside[0] = beside_of(weight->scales + ahead->group, 2 * all, 2 * groups);
        if (weight->zeros) ahead->beside[1] = beside_of(weight->zeros + ahead->group / 2, (all + 1) / 2, (groups + 1) / 2);
    }
}

/* Ask for the first block of inputs as a whole. */
static struct ahead ask_first(const struct quantized *weight, const struct read *now, const struct read *then, int64_t bytes) {
    struct ahead ahead = {.bytes = bytes};
    const int64_t all = weight->bits == 4 ? weight->out / weight->group : 0, groups = weight->bits == 4 ? 2 * bytes / weight->group : 0;
    columns_on(weight, now, then, 0, ahead.column);
    look_ahead(&ahead, weight, now, then, 0);
    for (int64_t i = 0; i < COLUMNS && groups; i++) {
        fetch(weight->scales + ahead.input[i] * all + ahead.group, 2 * groups);
        if (weight->zeros) fetch(weight->zeros + ahead.input[i] * ((all + 1) / 2) + ahead.group / 2, (groups + 1) / 2);
    }
    while (ahead.first < COLUMNS) {
        for (int64_t k = 0; k < SIDE; k += 4) ask_four(&ahead, k);
        go_on(&ahead);
    }
    return ahead;
}

/* sums (rows, stride) += the products of a block of `size` inputs, whose values (rows, spacing) are at `place`, or side by side. */
static void add_block(const struct quantized *weight, const struct block *block, const float *value, const int64_t *place,
                      int64_t size, int64_t spacing, int64_t rows, int64_t from, int64_t bytes, struct factors *by,
                      struct ahead *ahead, float *sums, int64_t stride) {
    for (int64_t r = 0, taken; r < rows; r += taken) {
        taken = rows - r >= 4 ? 4 : rows - r >= 2 ? 2 : 1;
        for (int64_t i = 0; i < taken; i++) {
            float own[COLUMNS] = {0};
            if (place)
                for (int64_t j = 0; j < size; j++) own[j] = value[(r + i) * spacing + place[j]];
            else
                memcpy(own, value + (r + i) * spacing, (size_t)size * sizeof *own);
            if (weight->bits == 4)
                scale_inputs(weight, block, own, from / weight->group, 2 * bytes / weight->group, i, taken, by, ahead);
            else
                round_inputs(own, block->count, i, by);
        }
        (taken == 4 ? add_tile_4 : taken == 2 ? add_tile_2 : add_tile_1)(weight, block, bytes, by, ahead, sums + r * stride, stride);
    }
}

/* Results (rows, stop - now.first) of outputs up to `stop` for kept inputs with values (rows, spacing), of at most MOST_ROWS rows. A
   value that is not finite makes NaN of its row. Codes of 8 bits have no scale of their input, so that one input may be far larger
   than others and its weights far smaller: those that are far have blocks of their own. What is read then is asked for in the end. */
static void multiply(const struct quantized *weight, struct read now, struct read then, const float *value, int64_t spacing,
                     int64_t rows, int64_t stop, float *result) {
    const int bits = weight->bits, group = weight->group;
    const int64_t start = now.first, count = now.count, vector = VECTOR * 8 / bits, column = weight->out * bits / 8;
    const int64_t unit = bits == 4 ? 2 * group : 1, begin = start / unit * unit, room = SUMS / rows / 128 * 128;
    const int64_t tile = room < TILE ? room : TILE, tiles = (stop - begin + tile - 1) / tile;
    const int64_t most = tiles ? ((stop - begin + tiles - 1) / tiles + 127) / 128 * 128 : tile; /* tiles alike */
    float sums[SUMS], limit[MOST_ROWS];
    struct factors by;
    int passes = 1;
    if (bits == 8) {
        far_limits(value, count, spacing, rows, limit);
        for (int64_t k = 0; k < count; k++) passes = is_far(value + k, spacing, rows, limit) ? 2 : passes;
    }
    for (int64_t from = begin; from < stop; from += most) {
        const int64_t left = (bits == 4 ? (stop + group - 1) / group * group : stop) - from, here = left < most ? left : most;
        const int64_t stride = (here + vector - 1) / vector * vector, bytes = here * bits / 8;
        const uint8_t *codes = weight->codes + from * bits / 8;
        const struct read after = from + most < stop ? (struct read){now.index, count, from + most} : then;
        struct ahead ahead;
        now.first = from;
        if (count) ahead = ask_first(weight, &now, &after, bytes);
        by.groups = bits == 4 ? (here / group + WORDS - 1) / WORDS * WORDS : 1;
        memset(sums, 0, (size_t)(rows * stride) * sizeof(float));
        for (int far = 0; far < passes; far++)
            for (int64_t k = 0; k < count;) {
                struct block block;
                int64_t place[COLUMNS], size = 0;
                const float *values = value;
                if (passes == 1) { /* what was asked for */
                    size = count - k < COLUMNS ? count - k : COLUMNS;
                    memcpy(block.input, ahead.input, sizeof block.input);
                    memcpy(block.column, ahead.column, sizeof block.column);
                    values += k, k += size;
                } else {
                    for (; k < count && size < COLUMNS; k++) {
                        place[size] = k;
                        size += is_far(value + k, spacing, rows, limit) == far;
                    }
                    if (!size) break;
                    for (int64_t i = 0; i < size; i++) {
                        block.input[i] = now.index[place[i]];
                        block.column[i] = codes + block.input[i] * column;
                    }
                }
                for (block.count = size; block.count % 4; block.count++) {
                    block.input[block.count] = block.input[size - 1];
                    block.column[block.count] = block.column[size - 1];
                }
                ahead.first = ahead.first < COLUMNS ? 0 : ahead.first - COLUMNS;
                memmove(ahead.column, ahead.column + COLUMNS, COLUMNS * sizeof *ahead.column);
                look_ahead(&ahead, weight, &now, &after, k);
                add_block(weight, &block, values, passes == 1 ? 0 : place, size, spacing, rows, from, bytes, &by, &ahead, sums, stride);
            }
        const int64_t first = from < start ? start - from : 0, end = from + here < stop ? here : stop - from;
        for (int64_t r = 0; r < rows; r++) {
            float *to = result + r * (stop - start) + from - start;
#define IN_ORDER(bits, group) { put_in_order(bits, group, r == rows - 1 ? rows % 2 : 2, sums + r * stride, first, end, to); }
            FORMATS(weight, IN_ORDER)
            for (int64_t o = first; o < end && bits == 8; o++) to[o] *= weight->output_scales[from + o];
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        int bad = 0;
        for (int64_t k = 0; k < count; k++) bad |= (bits_of(value[r * spacing + k]) & 0x7f800000u) == 0x7f800000u;
        for (int64_t o = 0; o < stop - start && bad; o++) result[r * (stop - start) + o] = float_of(0x7fc00000u);
    }
}

/* Part number `part` of `count` kept inputs. */
static struct read part_of(const int64_t *index, int64_t count, int64_t part, int64_t first) {
    const int64_t from = share(count, COLUMNS, part, PARTS);
    return (struct read){index + from, share(count, COLUMNS, part + 1, PARTS) - from, first};
}

void quantized_part(const struct quantized *weight, const int64_t *index, const float *value, int64_t count, int64_t part,
                    int64_t last, float *result) {
    const struct read now = part_of(index, count, part, 0), none = {0};
    const struct read then = part + 1 < last ? part_of(index, count, part + 1, 0) : none;
    multiply(weight, now, then, value + (now.index - index), 0, 1, weight->out, result);
}

void quantized_outputs(const struct quantized *weight, const int64_t *index, const float *value, int64_t count, int64_t spacing,
                       int64_t rows, int64_t start, int64_t stop, int64_t next, float *result) {
    const struct read then = {index, next < 0 ? 0 : count, next};
    if (rows > 1 || !in_parts(weight)) {
        multiply(weight, (struct read){index, count, start}, then, value, spacing, rows, stop, result);
        return;
    }
    float added[SUMS];
    for (int64_t part = 0; part < PARTS; part++) {
        const struct read now = part_of(index, count, part, start);
        const struct read after = part + 1 < PARTS ? part_of(index, count, part + 1, start) : then;
        multiply(weight, now, after, value + (now.index - index), spacing, rows, stop, part ? added : result);
        for (int64_t i = 0; part && i < stop - start; i++) result[i] += added[i];
    }
}

/* A share of outputs of y (rows, out) for kept inputs, in TYPE. */
#define NARROWED(TYPE)                                                                                                 \
    static void outputs_##TYPE(const struct site *site, const int64_t *index, const float *value, int64_t count,       \
                               int64_t rows, int64_t start, int64_t stop, TYPE *y) {                                   \
        const TYPE *bias = site->bias;                                                                                 \
        float result[SUMS];                                                                                            \
        const int64_t most = SUMS / rows / QUANTIZED_UNIT * QUANTIZED_UNIT;                                                                \
        for (int64_t from = start; from < stop; from += most) {                                                        \
            const int64_t width = stop - from < most ? stop - from : most;                                             \
            quantized_outputs(site->quantized, index, value, count, site->in, rows, from, from + width, -1, result);       \
            for (int64_t r = 0; r < rows; r++)                                                                         \
                for (int64_t o = 0; o < width; o++) {                                                                  \
                    const float found = result[r * width + o];                                                         \
                    y[r * site->out + from + o] = narrow_##TYPE(bias ? found + widen_##TYPE(bias[from + o]) : found);  \
                }                                                                                                      \
        }                                                                                                              \
    }

/* The inputs that one of the rows of x (rows, in) keeps, and their values (rows, in), zero where a row drops them. */
#define UNION(TYPE)                                                                                                    \
    static int64_t union_##TYPE(const TYPE *x, const float *norm, float threshold, const uint8_t *open, int64_t rows,  \
                                int64_t in, int64_t *index, float *value) {                                            \
        uint8_t *kept = (uint8_t *)value;                                                                              \
        int64_t count = 0;                                                                                             \
        memset(kept, 0, (size_t)in);                                                                                   \
        for (int64_t r = 0; r < rows; r++) {                                                                           \
            const float cut = open && open[r] ? -1.0f : threshold;                                                     \
            for (int64_t i = 0; i < in; i++) {                                                                         \
                const float v = widen_##TYPE(x[r * in + i]), size = v < 0 ? -v : v;                                    \
                kept[i] |= !(size * norm[i] <= cut);                                                                   \
            }                                                                                                          \
        }                                                                                                              \
        for (int64_t i = 0; i < in; i++) {                                                                             \
            index[count] = i;                                                                                          \
            count += kept[i];                                                                                          \
        }                                                                                                              \
        for (int64_t r = 0; r < rows; r++) {                                                                           \
            const float cut = open && open[r] ? -1.0f : threshold;                                                     \
            for (int64_t k = 0; k < count; k++) {                                                                      \
                const float v = widen_##TYPE(x[r * in + index[k]]);                                                    \
                const uint32_t keep = -(uint32_t) !(fabsf(v) * norm[index[k]] <= cut); /* a branch is rarely foreseen */  \
                value[r * in + k] = float_of(bits_of(v) & keep);                                                       \
            }                                                                                                          \
        }                                                                                                              \
        return count;                                                                                                  \
    }

/* From x (rows, in) to y (rows, out), at most MOST_ROWS; `open` (rows,) or null says which rows are kept whole. Inputs that one of
   the rows keeps are read for all. Threads share the outputs. Returns 1 without memory. */
#define FEW(TYPE)                                                                                                      \
    int few_##TYPE(const struct site *site, const TYPE *x, const uint8_t *open, TYPE *y, int64_t rows, int threads) {  \
        const int64_t in = site->in, out = site->out;                                                                  \
        void *memory = malloc((size_t)threads * (size_t)in * (sizeof(int64_t) + (size_t)rows * sizeof(float)));        \
        if (!memory) return 1;                                                                                         \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                                \
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                     \
            int64_t *index = (int64_t *)memory + me * in;                                                              \
            float *value = (float *)((int64_t *)memory + threads * in) + me * rows * in;                               \
            const int64_t count = union_##TYPE(x, site->norm, *site->threshold, open, rows, in, index, value);         \
            outputs_##TYPE(site, index, value, count, rows, share(out, QUANTIZED_UNIT, me, team), share(out, QUANTIZED_UNIT, me + 1, team), y); \
        }                                                                                                              \
        free(memory);                                                                                                  \
        return 0;                                                                                                      \
    }

/* The outputs of `half` bytes of 4-bit codes, the low codes' and then the high ones': (code - zero_point) * scale. */
#define LOOKED_UP(TYPE)                                                                                                \
    ALWAYS void outputs_of_##TYPE(const uint8_t *codes, int64_t half, float scale, int zero_point, TYPE *to) {         \
        TYPE table[16];                                                                                                \
        for (int code = 0; code < 16; code++) table[code] = narrow_##TYPE((float)(code - zero_point) * scale);         \
        for (int64_t i = 0; i < half; i++) {                                                                           \
            to[i] = table[codes[i] & 15];                                                                              \
            to[i + half] = table[codes[i] >> 4];                                                                       \
        }                                                                                                              \
    }

LOOKED_UP(float32)
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
/* The same, where the processor rounds to bfloat16. */
ALWAYS void outputs_of_bfloat16(const uint8_t *codes, int64_t half, float scale, int zero_point, bfloat16 *to) {
    for (int64_t i = 0; i < half; i += 16)
        for (int h = 0; h < 2; h++) {
            const __m128i both = _mm_loadu_si128((const __m128i *)(codes + i));
            const __m512i code = _mm512_cvtepu8_epi32(_mm_and_si128(h ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15)));
            const __m512 number = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(zero_point)));
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_mul_ps(number, _mm512_set1_ps(scale)));
            _mm256_storeu_si256((__m256i *)(to + h * half + i), (__m256i)rounded);
        }
}
#elif defined(VECTORS)
/* The same, with the bytes of what each code stands for looked up by one instruction. */
ALWAYS void outputs_of_bfloat16(const uint8_t *codes, int64_t half, float scale, int zero_point, bfloat16 *to) {
    const __m256i first = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), one = _mm256_set1_epi32(1);
    __m256i rounded[2];
    for (int h = 0; h < 2; h++) {
        const __m256i code = _mm256_sub_epi32(_mm256_add_epi32(first, _mm256_set1_epi32(8 * h)), _mm256_set1_epi32(zero_point));
        const __m256i x = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(scale)));
        const __m256i even = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(_mm256_srli_epi32(x, 16), one));
        rounded[h] = _mm256_srli_epi32(_mm256_add_epi32(x, even), 16);
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded[0], rounded[1]), 0xd8);
    const __m128i a = _mm256_castsi256_si128(words), b = _mm256_extracti128_si256(words, 1), byte = _mm_set1_epi16(255);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    for (int64_t i = 0; i < half; i += 16)
        for (int h = 0; h < 2; h++) {
            const __m128i both = _mm_loadu_si128((const __m128i *)(codes + i));
            const __m128i code = _mm_and_si128(h ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
            const __m128i x = _mm_shuffle_epi8(low, code), y = _mm_shuffle_epi8(high, code);
            _mm_storeu_si128((__m128i *)(to + h * half + i), _mm_unpacklo_epi8(x, y));
            _mm_storeu_si128((__m128i *)(to + h * half + i + 8), _mm_unpackhi_epi8(x, y));
        }
}
#else
LOOKED_UP(bfloat16)
#endif

/* Weights (in, stop - start) of outputs from `start`, an even group's first, to `stop`. */
#define DEQUANTIZED(TYPE)                                                                                              \
    void dequantize_##TYPE(const struct quantized *weight, int64_t start, int64_t stop, TYPE *to, int threads) {       \
        const int64_t width = stop - start, size = weight->bits == 4 ? weight->group : 1, half = size / 2;             \
        const int64_t groups = weight->out / size, row = (groups + 1) / 2;                                             \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t k = 0; k < weight->in; k++) {   \
            TYPE *restrict own = to + k * width;                                                                       \
            if (weight->bits == 8) {                                                                                   \
                const int8_t *codes = (const int8_t *)weight->codes + k * weight->out + start;                         \
                for (int64_t o = 0; o < width; o++)                                                                    \
                    own[o] = narrow_##TYPE((float)codes[o] * weight->output_scales[start + o]);                        \
                continue;                                                                                              \
            }                                                                                                          \
            for (int64_t o = 0; o < width; o += size) {                                                                \
                const int64_t g = (start + o) / size;                                                                  \
                const uint8_t *codes = weight->codes + (k * weight->out + start + o) / 2;                              \
                const float scale = widen_float16(weight->scales[k * groups + g]);                                     \
                const int zero = weight->zeros ? weight->zeros[k * row + g / 2] >> g % 2 * 4 & 15 : 8;                 \
                outputs_of_##TYPE(codes, half, scale, zero, own + o);                                                  \
            }                                                                                                          \
        }                                                                                                              \
    }

NARROWED(float32)
NARROWED(bfloat16)
UNION(float32)
UNION(bfloat16)
FEW(float32)
FEW(bfloat16)
DEQUANTIZED(float32)
DEQUANTIZED(bfloat16)

#define RUN 256 /* numbers of a row of inputs that share a scale */
#define PART 32 /* numbers that rows are filled up to a multiple of */

/* The product of two rows of `count` numbers, a multiple of PART, of which the second is in runs with a scale each. */
static inline float row_product(const int8_t *weight, const int16_t *x, const float *scale, int64_t count) {
    float total[WORDS] = {0}, found = 0;
    for (int64_t run = 0; run < count; run += RUN) {
        const int64_t stop = count - run < RUN ? count : run + RUN;
#ifdef VECTORS
        ints sum = zero();
        for (int64_t i = run; i < stop; i += VECTOR / 2) sum = add_products(sum, widen_bytes(weight + i), load(x + i));
        add_scaled(total, sum, as_floats(spread(scale + run / RUN, 0)));
#else
        int32_t sum = 0;
        for (int64_t i = run; i < stop; i++) sum += weight[i] * x[i];
        total[0] += (float)sum * scale[run / RUN];
#endif
    }
    for (int64_t i = 0; i < WORDS; i++) found += total[i];
    return found;
}

/* x (in,) in runs as numbers of 16 bits, filled up with zeros, and their scales; NaN for what is not finite. */
static void round_runs(const float *x, int64_t in, int16_t *rounded, float *scale) {
    for (int64_t run = 0; run < in; run += RUN) {
        const int64_t stop = in - run < RUN ? in : run + RUN;
        float largest = 0;
        int bad = 0;
        for (int64_t i = run; i < stop; i++) {
            const float size = x[i] < 0 ? -x[i] : x[i];
            largest = size > largest ? size : largest;
            bad |= (bits_of(x[i]) & 0x7f800000u) == 0x7f800000u;
        }
        const float inverse = largest > TINY && !bad ? LARGEST / largest : 0.0f;
        for (int64_t i = run; i < stop; i++) rounded[i] = bad ? 0 : (int16_t)nearest(x[i] * inverse);
        scale[run / RUN] = bad ? float_of(0x7fc00000u) : largest * (1.0f / LARGEST);
    }
    for (int64_t i = in; i < (in + PART - 1) / PART * PART; i++) rounded[i] = 0;
}

/* y (rows, out) = x (rows, in) @ weight (out, in) transposed, by rows in 8 bits with a scale each. Threads share the outputs.
   Returns 1 without memory. */
#define BY_ROWS(TYPE)                                                                                                  \
    int by_rows_##TYPE(const int8_t *weight, const float *scales, const TYPE *x, TYPE *y, int64_t rows, int64_t in,    \
                       int64_t out, int threads) {                                                                     \
        const int64_t filled = (in + PART - 1) / PART * PART, runs = (in + RUN - 1) / RUN;                             \
        const size_t sizes = (size_t)in * sizeof(float) + (size_t)(rows * runs) * sizeof(float);                       \
        float *wide = malloc(sizes + (size_t)(rows * filled) * sizeof(int16_t) + (size_t)filled);                      \
        if (!wide) return 1;                                                                                           \
        float *scale = wide + in;                                                                                      \
        int16_t *rounded = (int16_t *)(scale + rows * runs);                                                           \
        int8_t *last = (int8_t *)(rounded + rows * filled); /* the last row may not be read past its end */            \
        for (int64_t r = 0; r < rows; r++) {                                                                           \
            for (int64_t i = 0; i < in; i++) wide[i] = widen_##TYPE(x[r * in + i]);                                    \
            round_runs(wide, in, rounded + r * filled, scale + r * runs);                                              \
        }                                                                                                              \
        memset(last, 0, (size_t)filled);                                                                               \
        memcpy(last, weight + (out - 1) * in, (size_t)in);                                                             \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)") {                                                \
            const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();                                     \
            for (int64_t o = share(out, QUANTIZED_UNIT, me, team); o < share(out, QUANTIZED_UNIT, me + 1, team); o++) {                    \
                const int8_t *row = o + 1 < out ? weight + o * in : last;                                              \
                for (int64_t r = 0; r < rows; r++)                                                                     \
                    y[r * out + o] =                                                                                   \
                        narrow_##TYPE(scales[o] * row_product(row, rounded + r * filled, scale + r * runs, filled));   \
            }                                                                                                          \
        }                                                                                                              \
        free(wide);                                                                                                    \
        return 0;                                                                                                      \
    }

BY_ROWS(float32)
BY_ROWS(bfloat16)

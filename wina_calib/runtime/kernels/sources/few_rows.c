/* A masked product of a few rows with weights (in, out) in bfloat16: as fast as the weights can be read.

   They are read once, in the order in which they lie, sixteen inputs side by side while the next sixteen are fetched into the
   second cache, and those of inputs that no row keeps are left out. What is read stays in registers as pairs of inputs while all
   rows' sums, from the second cache, go by. */

#include <stdlib.h>

#include "lines.h"

int omp_get_thread_num(void);
int omp_get_num_threads(void);

#ifdef PAIRS_OF_BFLOAT16

#define GROUP 16   /* inputs at a time */
#define PANEL 2048 /* outputs whose sums a thread holds */
#define EIGHT(EACH) EACH(0) EACH(1) EACH(2) EACH(3) EACH(4) EACH(5) EACH(6) EACH(7)

static const bfloat16 nothing[PANEL];

/* The group `g` of masked inputs to `masked` (rows, GROUP). Returns which of them a row keeps. */
static uint16_t mask_group(const struct product *p, int64_t g, bfloat16 *masked) {
    const __mmask16 inside = (__mmask16)first_of(p->in - g * GROUP);
    uint16_t used = 0;
    for (int64_t r = 0; r < p->rows; r++) {
        const __m512i word = words_of(p->x + r * p->in + g * GROUP, inside);
        const __mmask16 keep = kept_words(word, inside, p->norm ? p->norm + g * GROUP : 0, limit_of(p, r));
        used |= keep;
        _mm256_storeu_si256((__m256i *)(masked + r * GROUP), _mm512_cvtepi32_epi16(_mm512_maskz_mov_epi32(keep, word)));
    }
    return used;
}

/* sums (lines, rows, LINE) += the products of x (rows, GROUP) with `width` outputs at `row`; those at `next` are asked for. */
static void add_group(const bfloat16 *const *row, const bfloat16 *const *next, const bfloat16 *x, int64_t rows, int64_t width,
                      float *sums) {
    for (int64_t j = 0; j < width; j += LINE) {
        const __mmask32 inside = first_of(width - j);
#define ASK(i)                                           \
    __builtin_prefetch(next[2 * i] + j, 0, 2);           \
    __builtin_prefetch(next[2 * i + 1] + j, 0, 2);
#define LOAD(i)                                                                 \
    const __m512i even##i = _mm512_maskz_loadu_epi16(inside, row[2 * i] + j);   \
    const __m512i odd##i = _mm512_maskz_loadu_epi16(inside, row[2 * i + 1] + j);
#define PAIR(i)                                                                 \
    const __m512bh low##i = (__m512bh)_mm512_unpacklo_epi16(even##i, odd##i);   \
    const __m512bh high##i = (__m512bh)_mm512_unpackhi_epi16(even##i, odd##i);
#define ADD(i)                                                                  \
    memcpy(&both, x + r * GROUP + 2 * i, sizeof both);                          \
    low = _mm512_dpbf16_ps(low, low##i, (__m512bh)_mm512_set1_epi32(both));     \
    high = _mm512_dpbf16_ps(high, high##i, (__m512bh)_mm512_set1_epi32(both));
        EIGHT(ASK)
        EIGHT(LOAD)
        EIGHT(PAIR)
        for (int64_t r = 0; r < rows; r++, sums += LINE) {
            __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + LANES);
            int32_t both;
            EIGHT(ADD)
            _mm512_store_ps(sums, low);
            _mm512_store_ps(sums + LANES, high);
        }
    }
}

/* What one thread computes of outputs, from `start` to `stop`. */
static void own_panel(const struct product *p, const bfloat16 *masked, const uint16_t *used, int64_t start, int64_t stop,
                      float *sums) {
    const int64_t groups = (p->in + GROUP - 1) / GROUP, width = stop - start, lines = (width + LINE - 1) / LINE;
    const bfloat16 *row[GROUP], *next[GROUP];
    memset(sums, 0, (size_t)(lines * p->rows * LINE) * sizeof(float));
    for (int64_t g = -1; g < groups; g++) {
        for (int64_t i = 0; i < GROUP; i++) {
            row[i] = g < 0 ? nothing : next[i];
            next[i] = g + 1 < groups && used[g + 1] >> i & 1 ? p->weight + ((g + 1) * GROUP + i) * p->out + start : nothing;
        }
        if (g >= 0 && used[g]) add_group(row, next, masked + g * p->rows * GROUP, p->rows, width, sums);
    }
    for (int64_t l = 0; l < lines; l++)
        for (int64_t r = 0; r < p->rows; r++) {
            const int64_t j = start + l * LINE;
            narrow_line(sums + (l * p->rows + r) * LINE, p->bias ? p->bias + j : 0, stop - j, p->y + r * p->out + j);
        }
}

int few_rows(const struct product *p, int threads) {
    const int64_t groups = (p->in + GROUP - 1) / GROUP;
    const size_t inputs = (size_t)(groups * p->rows * GROUP) * sizeof(bfloat16), own = (size_t)(p->rows * PANEL) * sizeof(float);
    const size_t shared = (inputs + (size_t)groups * sizeof(uint16_t) + 63) / 64 * 64;
    char *memory = aligned_alloc(64, shared + (size_t)threads * own);
    if (!memory) return 1;
    bfloat16 *masked = (bfloat16 *)memory;
    uint16_t *used = (uint16_t *)(memory + inputs);
    _Pragma("omp parallel num_threads(threads) if (threads > 1)") {
        const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        for (int64_t g = share(groups, 1, me, team); g < share(groups, 1, me + 1, team); g++)
            used[g] = mask_group(p, g, masked + g * p->rows * GROUP);
        _Pragma("omp barrier")
        const int64_t stop = share(p->out, LINE, me + 1, team);
        for (int64_t j = share(p->out, LINE, me, team); j < stop; j += PANEL)
            own_panel(p, masked, used, j, smaller_of(j + PANEL, stop), (float *)(memory + shared + (size_t)me * own));
    }
    free(memory);
    return 0;
}

#endif

/* Products of many tokens where a processor multiplies bfloat16 and adds float32 faster than it does float32.
 *
 * A number is given to such a unit in parts: as the nearest bfloat16 alone (8 bits of fraction), or as that
 * and the nearest bfloat16 to what is left (16 bits together). With two parts each, high * high + low * high
 * + high * low differs from the product by at most 3 * 2**-16 of it; what is left out is the product of the
 * low parts. Weights that are kept as bfloat16 have one part and are exact.
 *
 * Weights are the left operand, as their values lie, and tokens the right one, rearranged once per call. A
 * panel of weights is converted once per call into a core's second cache; sums stay in registers over a chunk
 * of the summed dimension.
 */
#include <time.h>

#include "bfloat_unit.h"
#include "product.h"
#include "simd.h"

#ifdef BFLOAT_UNIT

enum {
    BLOCK = PAIR * PAIR,
    CHUNK = 2048,    /* summed values of a panel, of all parts together */
    PANEL_PAIRS = 4, /* pairs of rows of a panel, at most */
    STRETCH = 1024,  /* parts of tokens that a panel serves before it is converted again: bounds the memory */
};

enum { SUMS = 16, STEPS = 1024, ROUNDS = 16 };

/* Seconds that STEPS * SUMS products of DEPTH values take, by pairs of bfloat16 or by float32. */
static double seconds_of(int by_pairs) {
    const __m512 half = _mm512_set1_ps(0.5f);
    const __m512bh halves = _mm512_cvtne2ps_pbh(half, half);
    __m512 sums[SUMS];
    UNROLL for (int s = 0; s < SUMS; s++)
        sums[s] = half;
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int step = 0; step < STEPS; step++) {
        UNROLL for (int s = 0; s < SUMS; s++) {
            if (by_pairs) {
                sums[s] = _mm512_dpbf16_ps(sums[s], halves, halves);
            } else {
                sums[s] = _mm512_fmadd_ps(sums[s], half, half);
                sums[s] = _mm512_fmadd_ps(sums[s], half, half);
            }
            __asm__ volatile("" : "+v"(sums[s])); /* the compiler cannot foresee the sum */
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    return (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
}

/* Measured once: processors that have the instruction take half the time of float32 (Zen 4) or twice that
 * (Sapphire Rapids, whose lead is in its tiles, which a virtual machine may hide), so noise cannot decide. */
static int vectors_gain(void) {
    static int gain = -1; /* not measured yet; threads that race get the same answer */
    if (gain < 0) {
        double least_of[2] = {1, 1};
        for (int round = 0; round < 2 * ROUNDS; round++) {
            const double seconds = seconds_of(round % 2);
            if (seconds < least_of[round % 2]) least_of[round % 2] = seconds;
        }
        gain = least_of[1] < least_of[0];
    }
    return gain;
}

/* Three products in place of one leave vectors of bfloat16 nothing of their lead over float32. */
EXPORT int takes_bfloats(int parts) { return parts == 1 || has_matrix_unit(); }

EXPORT int gains_by_bfloats(int parts) { return has_matrix_unit() || (parts == 1 && vectors_gain()); }

/* The nearest bfloat16 to 32 floats, and, where they are wanted, those to what is left of them, which for an
 * infinity is no number. */
INLINE void split(__m512 first, __m512 second, __m512i *high, __m512i *low) {
    *high = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    if (!low) return;
    const __m512i pair = *high;
    const __m512 first_high =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(pair)), 16));
    const __m512 second_high =
        _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pair, 1)), 16));
    first = _mm512_sub_ps(first, first_high);
    second = _mm512_sub_ps(second, second_high);
    *low = (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* Where the tile of a part lies: [tokens / SIDE][width / DEPTH][parts]. */
typedef struct {
    int64_t depths, parts;
} token_order;

INLINE int64_t place_of(token_order order, int64_t side, int64_t depth) {
    return (side * order.depths + depth) * order.parts * TILE;
}

/* SIDE tokens as tiles in which pairs of summed values lie next to each other; zeros beyond the tokens. */
static void arrange_tokens(const product *p, int64_t side, token_order order, uint16_t *into) {
    const int64_t width = p->matrix->form->width;
    for (int64_t depth = 0; depth < order.depths; depth++) {
        __m512i parts[2][SIDE];
        for (int64_t i = 0; i < SIDE; i++) {
            const int64_t token = side * SIDE + i, k = depth * DEPTH;
            __m512 first = _mm512_setzero_ps(), second = first;
            if (token < p->tokens) load_depth(p->x + token * p->x_stride + k, width - k, &first, &second);
            split(first, second, &parts[0][i], order.parts == 2 ? &parts[1][i] : NULL);
        }
        for (int64_t part = 0; part < order.parts; part++) {
            uint16_t *tile = into + place_of(order, side, depth) + part * TILE;
            transpose(parts[part]);
            for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(tile + i * DEPTH, parts[part][i]);
        }
    }
}

/* A panel of weights as tiles: [row tiles][depths][parts], of columns [column, column + count). Rows beyond
 * the matrix are whatever was there before: their sums are not read. */
typedef struct {
    int64_t row, rows, column, count, depths, parts;
    uint16_t *tiles;
    float *unpacked; /* SIDE rows of `CHUNK` */
} weight_panel;

INLINE void convert_rows(const packed_matrix *matrix, const weight_panel *panel, int64_t first,
                         int64_t rows) {
    const int as_kept = matrix->form->kind == BFLOAT;
    if (!as_kept)
        unpack_panel(matrix, panel->row + first, rows, panel->column, panel->count, panel->unpacked, CHUNK);
    uint16_t *tiles = panel->tiles + first / SIDE * panel->depths * panel->parts * TILE;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t depth = 0; depth < panel->depths; depth++) {
            const int64_t k = depth * DEPTH, left = panel->count - k;
            uint16_t *row = tiles + depth * panel->parts * TILE + r * DEPTH;
            if (as_kept) {
                const uint8_t *kept = matrix->data + (panel->row + first + r) * matrix->stride;
                _mm512_storeu_si512(
                    row, _mm512_maskz_loadu_epi16(first_lanes(left), kept + 2 * (panel->column + k)));
                continue;
            }
            __m512 one, two;
            __m512i high, low;
            load_depth(panel->unpacked + r * CHUNK + k, left, &one, &two);
            split(one, two, &high, panel->parts == 2 ? &low : NULL);
            _mm512_storeu_si512(row, high);
            if (panel->parts == 2) _mm512_storeu_si512(row + TILE, low);
        }
}

static void convert_panel(const product *p, const weight_panel *panel) {
    for (int64_t r = 0; r < panel->rows; r += SIDE) {
        const int64_t rows = least(SIDE, panel->rows - r), left = panel->rows - r - rows;
        prefetch_panel(p->matrix, panel->row + r + rows, least(SIDE, left), panel->column,
                       left ? panel->count : 0);
        convert_rows(p->matrix, panel, r, rows);
    }
}

/* A tile of sums [rows, tokens] plus bias into out [tokens, rows]. */
static void write_tile(const product *p, int64_t row, int64_t token, const float *sums) {
    const int64_t rows = least(SIDE, p->rows - row), tokens = least(SIDE, p->tokens - token);
    if (rows <= 0) return;
    const __mmask16 wanted = (__mmask16)((1u << rows) - 1);
    const __m512 bias = p->bias ? _mm512_maskz_loadu_ps(wanted, p->bias + row) : _mm512_setzero_ps();
    __m512i lines[SIDE];
    for (int i = 0; i < SIDE; i++) lines[i] = _mm512_loadu_si512(sums + i * SIDE);
    transpose(lines);
    for (int64_t t = 0; t < tokens; t++)
        _mm512_mask_storeu_ps(p->out + (token + t) * p->out_stride + row, wanted,
                              _mm512_add_ps(_mm512_castsi512_ps(lines[t]), bias));
}

typedef struct {
    const product *p;
    token_order order;
    const uint16_t *tokens;
    int64_t pairs; /* of tokens */
} job;

#define VECTORS multiply_vectors(rows, row_step, tokens, token_step, panel->depths, begins, sums)

#define PAIRS(row_parts, token_parts) \
    multiply_tiles(rows, row_step, row_parts, tokens, token_step, token_parts, panel->depths, begins, sums)

static void multiply_panel(const job *j, const weight_panel *panel, int begins, int ends, float *sums) {
    const int64_t row_step = panel->depths * panel->parts * TILE, token_step = place_of(j->order, 1, 0);
    const int by_tiles = has_matrix_unit();
    for (int64_t pair = 0; pair < j->pairs; pair++) {
        const uint16_t *tokens = j->tokens + place_of(j->order, 2 * pair, panel->column / DEPTH);
        for (int64_t r = 0; r < panel->rows; r += PAIR, sums += BLOCK) {
            const uint16_t *rows = panel->tiles + r / SIDE * row_step;
            if (!by_tiles) VECTORS;
            else if (panel->parts == 2) PAIRS(2, 2);
            else if (j->order.parts == 2) PAIRS(1, 2);
            else PAIRS(1, 1);
            for (int tile = 0; ends && tile < 4; tile++)
                write_tile(j->p, panel->row + r + tile / 2 * SIDE, (2 * pair + tile % 2) * SIDE,
                           sums + tile * SIDE * SIDE);
        }
    }
}

static int multiply_stretch(const product *p, int parts, int threads) {
    const int64_t width = p->matrix->form->width, sides = (p->tokens + PAIR - 1) / PAIR * 2;
    const token_order order = {(width + DEPTH - 1) / DEPTH, parts};
    const int64_t row_parts = p->matrix->form->kind == BFLOAT ? 1 : parts, chunk = CHUNK / row_parts;
    /* Smaller panels where there are few rows, or some threads would have nothing to do. */
    const int64_t share = (p->rows + 2 * threads * PAIR - 1) / (2 * threads * PAIR);
    const int64_t panel_rows = PAIR * most(1, least(PANEL_PAIRS, share));
    uint16_t *tokens = scratch(SHARED_SLOT, sizeof *tokens * (size_t)place_of(order, sides, 0));
    if (!tokens) return 2;
    const job j = {p, order, tokens, sides / 2};
    const size_t tile_bytes = sizeof(uint16_t) * PANEL_PAIRS * PAIR * CHUNK;
    const size_t sum_bytes = sizeof(float) * (size_t)(panel_rows * sides * SIDE);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(max : failed)
    {
        uint8_t *own = scratch(OWN_SLOT, tile_bytes + sum_bytes + sizeof(float) * SIDE * CHUNK);
        if (own) enter_unit();
        else failed = 2;
#pragma omp for schedule(static)
        for (int64_t side = 0; side < sides; side++) arrange_tokens(p, side, order, tokens);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < p->rows; row += panel_rows)
            for (int64_t k = 0; own && k < width; k += chunk) {
                const int64_t count = least(chunk, width - k);
                const weight_panel panel = {row,
                                            least(panel_rows, p->rows - row),
                                            k,
                                            count,
                                            (count + DEPTH - 1) / DEPTH,
                                            row_parts,
                                            (uint16_t *)own,
                                            (float *)(own + tile_bytes + sum_bytes)};
                convert_panel(p, &panel);
                multiply_panel(&j, &panel, k == 0, k + count == width, (float *)(own + tile_bytes));
            }
        if (own) leave_unit();
    }
    return failed;
}

int multiply_in_bfloats(const product *p, int parts, int threads) {
    int failed = 0;
    const int64_t stretch = STRETCH / parts;
    for (int64_t t = 0; t < p->tokens && !failed; t += stretch) {
        product part = *p;
        part.x += t * p->x_stride;
        part.out += t * p->out_stride;
        part.tokens = least(stretch, p->tokens - t);
        failed = multiply_stretch(&part, parts, threads);
    }
    return failed;
}

#else

EXPORT int takes_bfloats(int parts) {
    (void)parts;
    return 0;
}

EXPORT int gains_by_bfloats(int parts) { return takes_bfloats(parts); }

int multiply_in_bfloats(const product *p, int parts, int threads) {
    (void)p, (void)parts, (void)threads;
    return 2; /* never called */
}

#endif

/* x [tokens, width] times a packed matrix [rows, width], transposed: unpacked piece by piece, in the cache.
 *
 * No more than a panel of weights exists as floats at any time, small enough for a core's own cache, and each
 * is unpacked once per call; floats of 16 bits become float32 on the way. With few tokens the weights pass
 * through a core once and are all that costs: they, or their bare codes (bare_codes.c), are multiplied with the
 * tokens in dot products (`dot_tile`). With many, arithmetic is all that costs: tokens are rearranged once so
 * that a vector holds one value of LANES tokens (`outer_tile`).
 */
#include "formats.h"
#include "product.h"
#include "tiles.h"

enum {
    FEW_TOKENS = 8,        /* up to here dot products are faster */
    FEW_FLOAT_TOKENS = LANES == 16 ? 12 : 16, /* the same where rows are read in place, so often */
    TOGETHER = 3,          /* tokens that share the registers with four rows */
    FEW_ROWS = 8,   /* rows of a panel of dot products */
    FEW_COLUMNS = 1024,
    MANY_ROWS = 96, /* rows of a panel of outer products, at most */
    MANY_COLUMNS = 256,
    PART_COLUMNS = 64, /* whose successors are prefetched at once; more requests would wait for each other */
    MANY_TOKENS = 512, /* tokens that a panel serves before it is unpacked again: bounds the sums */
    TILE_ROWS = 6,     /* of sums, whose vectors fill three quarters of the registers */
    TALL_ROWS = 12,    /* of sums of one vector each, of which six would wait for each other */
    TILE_VECTORS = LANES == 16 ? 4 : 2,
    WIDE = LANES == 16, /* then there are also twice as many registers */
};

/* Rows that few tokens are multiplied with: their floats, and what is prefetched meanwhile. */
typedef struct {
    const uint8_t *rows;
    int64_t stride; /* bytes */
    int64_t next;   /* bytes from these to the FEW_ROWS rows that come next, or 0 */
} row_panel;

#define DOT(row_count, token_count)                                                                       \
    UNROLL for (int first = 0; first < FEW_ROWS; first += row_count) {                                    \
        const int64_t ahead =                                                                              \
            first + row_count < FEW_ROWS ? row_count * panel.stride : panel.next - first * panel.stride;   \
        dot_tile(panel.rows + first * panel.stride, panel.stride, kind, row_count, x, p->x_stride, token_count, count, \
                 sums + first, FEW_ROWS, panel.next ? ahead : 0);                                        \
    }

/* sums[token * FEW_ROWS + row] of FEW_ROWS rows and up to four tokens, by tiles that fit the registers. */
INLINE void dot_panel(const product *p, row_panel panel, int64_t kind, const float *x, int64_t tokens,
                      int64_t count, vec *sums) {
    switch (tokens) {
        case 1: DOT((kind == CODES ? 8 : 4), 1); break; /* memory is read by fewer streams */
        case 2: DOT((WIDE ? 8 : 4), 2); break;
        case 3: DOT((WIDE ? 8 : 4), 3); break;
        case 4: DOT((WIDE ? 4 : 2), 4); break;
    }
}

/* FEW_ROWS rows, or fewer at the end: a panel's other rows are then whatever it held before.
 *
 * Floats are read where they lie and become float32 in registers; codes are unpacked first. */
static void few_tokens(const product *p, int64_t row, float *unpacked) {
    const packed_matrix *matrix = p->matrix;
    const int64_t rows = least(FEW_ROWS, p->rows - row), width = matrix->form->width;
    const int64_t kind = rows == FEW_ROWS ? matrix->form->kind : CODES, each = matrix->form->bits / 8;
    int64_t columns = FEW_COLUMNS; /* few enough for the tokens' to stay in the first cache */
    if (kind != CODES && p->tokens == 1) columns = 4 * FEW_COLUMNS;
    if (kind != CODES && p->tokens > 4) columns = FEW_COLUMNS / 2;
    vec sums[FEW_FLOAT_TOKENS * FEW_ROWS] = {0};
    for (int64_t k = 0; k < width; k += columns) {
        const int64_t count = least(columns, width - k), stride = matrix->stride;
        row_panel panel = {matrix->data + row * stride + k * each, stride, count * each};
        if (k + count == width) panel.next = FEW_ROWS * stride - k * each;
        if (kind == CODES) {
            prefetch_panel(matrix, row + rows, least(rows, p->rows - row - rows), k, count);
            unpack_panel(matrix, row, rows, k, count, unpacked, FEW_COLUMNS);
            panel = (row_panel){(const uint8_t *)unpacked, FEW_COLUMNS * sizeof *unpacked, 0};
        }
        for (int64_t t = 0, tokens; t < p->tokens; t += tokens) {
            const float *x = p->x + t * p->x_stride + k;
            tokens = p->tokens - t == 4 ? 4 : least(TOGETHER, p->tokens - t);
            if (t) panel.next = 0; /* prefetched already */
            vec *into = sums + t * FEW_ROWS;
            switch (kind) {
                case HALF: dot_panel(p, panel, HALF, x, tokens, count, into); break;
                case BFLOAT: dot_panel(p, panel, BFLOAT, x, tokens, count, into); break;
                case SINGLE: dot_panel(p, panel, SINGLE, x, tokens, count, into); break;
                default: dot_panel(p, panel, CODES, x, tokens, count, into);
            }
        }
    }
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t r = 0; r < rows; r++)
            p->out[t * p->out_stride + row + r] =
                sum(sums[t * FEW_ROWS + r]) + (p->bias ? p->bias[row + r] : 0);
}

/* Vectors of LANES tokens: packed[(v, k, lane)], zeros beyond the tokens. */
static void arrange_tokens(const product *p, int64_t k, int64_t vectors, float *packed) {
    const int64_t count = least(MANY_COLUMNS, p->matrix->form->width - k);
    for (int64_t t = 0; t < vectors * LANES; t += LANES, packed += MANY_COLUMNS * LANES) {
        const float *x = p->x + t * p->x_stride + k;
        const int64_t tokens = least(LANES, p->tokens - t);
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            vec lines[LANES] = {0};
            for (int64_t lane = 0; lane < tokens; lane++) lines[lane] = load(x + lane * p->x_stride + i);
            turn(lines);
            for (int64_t j = 0; j < LANES; j++) store(packed + (i + j) * LANES, lines[j]);
        }
        for (; i < count; i++)
            for (int64_t lane = 0; lane < LANES; lane++)
                packed[i * LANES + lane] = lane < tokens ? x[lane * p->x_stride + i] : 0;
    }
}

/* Prefetch where the outputs of tokens [t, end) and of some rows will be written. */
static void expect_sums(const product *p, int64_t row, int64_t rows, int64_t t, int64_t end) {
    for (; t < end; t++)
        for (int64_t r = 0; r < rows; r += 64 / (int64_t)sizeof *p->out)
            __builtin_prefetch(p->out + t * p->out_stride + row + r, 1);
}

/* Sums [rows, tokens] of tokens [t, end) plus bias into out [tokens, rows], a square of LANES at a time. */
static void write_sums(const product *p, int64_t row, int64_t rows, int64_t t, int64_t end, const float *sums,
                       int64_t sum_stride) {
    for (; t < end; t += LANES)
        for (int64_t r = 0; r < rows; r += LANES) {
            const int64_t count = least(LANES, rows - r);
            vec lines[LANES] = {0};
            for (int64_t i = 0; i < count; i++)
                lines[i] = load(sums + (r + i) * sum_stride + t) + (p->bias ? p->bias[row + r + i] : 0);
            turn(lines);
            float *out = p->out + t * p->out_stride + row + r;
            for (int64_t lane = 0; lane < least(LANES, end - t); lane++, out += p->out_stride) {
                if (count == LANES) store(out, lines[lane]);
                else memcpy(out, &lines[lane], (size_t)count * sizeof *out);
            }
        }
}

#define OUTER(row_count, vectors)                                                                            \
    case row_count:                                                                                          \
        outer_tile(panel, MANY_COLUMNS, row_count, (const uint8_t *)tokens, SINGLE, LANES,                   \
                   MANY_COLUMNS *LANES, vectors, count, begins, sums, sum_stride);                                   \
        break;

#define OUTER_OF(vectors)                                                                         \
    switch (rows) {                                                                               \
        OUTER(1, vectors)                                                                         \
        OUTER(2, vectors) OUTER(3, vectors) OUTER(4, vectors) OUTER(5, vectors) OUTER(6, vectors) \
    }

static void outer_rows(const float *panel, int64_t rows, const float *tokens, int64_t vectors, int64_t count,
                       int begins, float *sums, int64_t sum_stride) {
    switch (vectors) {
        case 1:
            switch (rows) {
                OUTER(TALL_ROWS, 1)
                default: OUTER_OF(1)
            }
            break;
        case 2: OUTER_OF(2) break;
#if LANES == 16
        case 3: OUTER_OF(3) break;
        case 4: OUTER_OF(4) break;
#endif
    }
}

static void many_tokens(const product *p, int64_t row, int64_t rows, const float *tokens, float *panel,
                        float *sums) {
    const int64_t width = p->matrix->form->width;
    const int64_t vectors = (p->tokens + LANES - 1) / LANES, sum_stride = vectors * LANES;
    /* Into the nearest cache just before their first use, unless a block's numbers serve more rows than that. */
    const int by_tile = p->matrix->form->block_rows == 1, in_parts = p->matrix->form->kind != CODES;
    for (int64_t k = 0; k < width; k += MANY_COLUMNS) {
        const int64_t count = least(MANY_COLUMNS, width - k);
        const int64_t next = least(MANY_COLUMNS, width - k - count);
        if (!by_tile) unpack_panel(p->matrix, row, rows, k, count, panel, MANY_COLUMNS);
        for (int64_t v = 0; v < vectors; v += TILE_VECTORS) {
            const int64_t first = v * LANES, served = least(TILE_VECTORS * LANES, p->tokens - first);
            for (int64_t r = 0, tile_rows; r < rows; r += tile_rows) {
                tile_rows = vectors == 1 && rows - r >= TALL_ROWS ? TALL_ROWS : least(TILE_ROWS, rows - r);
                const int64_t left = rows - r - tile_rows, part = in_parts && v == 0 ? PART_COLUMNS : count;
                /* What is unpacked next: the next tile, or else the next columns of the first, or of these. */
                const int next_tile = by_tile && left;
                const int64_t soon = next_tile ? row + r + tile_rows : by_tile ? row : row + r;
                const int64_t soon_rows = by_tile ? least(tile_rows, left ? left : rows) : tile_rows;
                const int64_t soon_k = next_tile ? k : k + count, soon_count = next_tile ? count : next;
                if (v == 0 && by_tile)
                    unpack_panel(p->matrix, row + r, tile_rows, k, count, panel + r * MANY_COLUMNS,
                                 MANY_COLUMNS);
                for (int64_t i = 0; i < count; i += part) {
                    if (v == 0)
                        prefetch_panel(p->matrix, soon, soon_rows, soon_k + i, least(part, soon_count - i));
                    outer_rows(panel + r * MANY_COLUMNS + i, tile_rows,
                               tokens + (k * vectors + v * MANY_COLUMNS + i) * LANES,
                               least(TILE_VECTORS, vectors - v), least(part, count - i), k + i == 0,
                               sums + r * sum_stride + v * LANES, sum_stride);
                }
                if (!next)
                    expect_sums(p, row, rows, first + served * r / rows,
                                first + served * (r + tile_rows) / rows);
            }
            if (!next) write_sums(p, row, rows, first, first + served, sums, sum_stride);
        }
    }
}

static int multiply_few(const product *p, int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : failed)
    for (int64_t row = 0; row < p->rows; row += FEW_ROWS) {
        float *panel = scratch(OWN_SLOT, sizeof(float) * FEW_ROWS * FEW_COLUMNS);
        if (panel) few_tokens(p, row, panel);
        else failed = 2;
    }
    return failed;
}

static int multiply_many(const product *p, int threads) {
    const int64_t vectors = (p->tokens + LANES - 1) / LANES;
    const int64_t chunks = (p->matrix->form->width + MANY_COLUMNS - 1) / MANY_COLUMNS;
    /* Smaller panels where there are few rows, or some threads would have nothing to do. */
    const int64_t share = (p->rows / (8 * threads) + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    const int64_t panel_rows = most(4 * TILE_ROWS, least(MANY_ROWS, share));
    const size_t panel_floats = MANY_ROWS * MANY_COLUMNS, sum_floats = (size_t)(MANY_ROWS * vectors * LANES);
    float *tokens = scratch(SHARED_SLOT, sizeof(float) * (size_t)(chunks * MANY_COLUMNS * vectors * LANES));
    if (!tokens) return 2;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(max : failed)
    {
        float *panel = scratch(OWN_SLOT, sizeof(float) * (panel_floats + sum_floats));
        if (!panel) failed = 2;
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks; chunk++)
            arrange_tokens(p, chunk * MANY_COLUMNS, vectors, tokens + chunk * MANY_COLUMNS * vectors * LANES);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < p->rows; row += panel_rows)
            if (panel)
                many_tokens(p, row, least(panel_rows, p->rows - row), tokens, panel, panel + panel_floats);
    }
    return failed;
}

/* out [tokens, rows] = x [tokens, width] @ matrix^T + bias. 0; 2: no memory.
 *
 * parts: bfloat16 numbers that may stand for each number of a product of many tokens; 0 for none. */
EXPORT int multiply(const format *form, const uint8_t *data, int64_t data_stride, int64_t rows,
                    const float *x, int64_t x_stride, int64_t tokens, const float *bias, float *out,
                    int64_t out_stride, int parts, int threads) {
    const packed_matrix matrix = {form, data, data_stride};
    const int64_t few = form->kind == CODES ? FEW_TOKENS : FEW_FLOAT_TOKENS;
    int failed = 0;
    if (parts && tokens > VECTOR_TOKENS && takes_bfloats(parts)) {
        const product whole = {&matrix, rows, x, x_stride, tokens, bias, out, out_stride};
        return multiply_in_bfloats(&whole, parts, threads);
    }
    for (int64_t t = 0; t < tokens && !failed; t += MANY_TOKENS) {
        const product part = {&matrix,
                              rows,
                              x + t * x_stride,
                              x_stride,
                              least(MANY_TOKENS, tokens - t),
                              bias,
                              out + t * out_stride,
                              out_stride};
        if (part.tokens <= BARE_TOKENS && knows_bare_codes(form)) failed = multiply_bare_codes(&part, threads);
        else failed = part.tokens <= few ? multiply_few(&part, threads) : multiply_many(&part, threads);
    }
    return failed;
}

/* x [tokens, width] times a packed matrix [rows, width], transposed: unpacked piece by piece, in the cache.
 *
 * No more than a panel of weights exists as floats at any time, small enough for a core's own cache, and each
 * is unpacked once per call. With few tokens the weights pass through a core once and are all that costs:
 * they meet the tokens in dot products (`dot_tile`). With many, arithmetic is all that costs: tokens are
 * rearranged once so that a vector holds one value of LANES tokens (`outer_tile`).
 */
#include "formats.h"
#include "tiles.h"

enum {
    FEW_TOKENS = 8, /* up to here dot products are faster */
    FEW_ROWS = 8,   /* rows of a panel of dot products */
    FEW_COLUMNS = 1024,
    MANY_ROWS = 96, /* rows of a panel of outer products, at most */
    MANY_COLUMNS = 256,
    MANY_TOKENS = 512, /* tokens that a panel serves before it is unpacked again: bounds the sums */
    TILE_ROWS = 6,     /* of sums, whose vectors fill three quarters of the registers */
    TILE_VECTORS = LANES == 16 ? 4 : 2,
};

typedef struct {
    const packed_matrix *matrix;
    int64_t rows;
    const float *x; /* [tokens, width], x_stride floats apart */
    int64_t x_stride, tokens;
    const float *bias; /* [rows] or NULL */
    float *out;        /* [tokens, rows], out_stride floats apart */
    int64_t out_stride;
} product;

#define DOT(row_count, token_count, first)                                                              \
    dot_tile(panel + (first) * FEW_COLUMNS, FEW_COLUMNS, row_count, x, p->x_stride, token_count, count, \
             sums + (first) * (token_count))

/* Sums of a panel's rows times up to four tokens. With one or two, eight rows keep the adders busy. */
INLINE void dot_panel(const product *p, const float *panel, const float *x, int64_t tokens, int64_t count,
                      vec *sums) {
    switch (tokens) {
        case 1: DOT(8, 1, 0); break;
        case 2: DOT(8, 2, 0); break;
        case 3:
            DOT(4, 3, 0);
            DOT(4, 3, 4);
            break;
        case 4:
            DOT(4, 4, 0);
            DOT(4, 4, 4);
            break;
    }
}

/* Where `dot_panel` leaves the sum of a row and a token: tokens of a tile of 8 or of 4 rows. */
INLINE int64_t dot_place(int64_t row, int64_t token, int64_t tokens) {
    if (tokens <= 2) return token * 8 + row;
    return row / 4 * 4 * tokens + token * 4 + row % 4;
}

/* FEW_ROWS rows, or fewer at the end: a panel's other rows are then whatever it held before. */
static void few_tokens(const product *p, int64_t row, float *panel) {
    const int64_t rows = least(FEW_ROWS, p->rows - row), width = p->matrix->form->width;
    vec sums[FEW_TOKENS / 4][FEW_ROWS * 4] = {0};
    for (int64_t k = 0; k < width; k += FEW_COLUMNS) {
        const int64_t count = least(FEW_COLUMNS, width - k);
        prefetch_panel(p->matrix, row + rows, least(rows, p->rows - row - rows), k, count);
        unpack_panel(p->matrix, row, rows, k, count, panel, FEW_COLUMNS);
        for (int64_t t = 0; t < p->tokens; t += 4)
            dot_panel(p, panel, p->x + t * p->x_stride + k, least(4, p->tokens - t), count, sums[t / 4]);
    }
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t r = 0; r < rows; r++) {
            const vec found = sums[t / 4][dot_place(r, t % 4, least(4, p->tokens - t / 4 * 4))];
            p->out[t * p->out_stride + row + r] = sum(found) + (p->bias ? p->bias[row + r] : 0);
        }
}

/* Vectors of LANES tokens: packed[(v, k, lane)], zeros beyond the tokens. */
static void arrange_tokens(const product *p, int64_t k, int64_t vectors, float *packed) {
    const int64_t count = least(MANY_COLUMNS, p->matrix->form->width - k);
    for (int64_t token = 0; token < vectors * LANES; token++) {
        const float *x = p->x + token * p->x_stride + k;
        float *lane = packed + token / LANES * MANY_COLUMNS * LANES + token % LANES;
        for (int64_t i = 0; i < count; i++) lane[i * LANES] = token < p->tokens ? x[i] : 0;
    }
}

/* Sums [rows, tokens] plus bias into out [tokens, rows], a vector of tokens at a time. */
static void write_sums(const product *p, int64_t row, int64_t rows, const float *sums, int64_t sum_stride) {
    float turned[LANES][MANY_ROWS];
    for (int64_t t = 0; t < p->tokens; t += LANES) {
        for (int64_t r = 0; r < rows; r++) {
            const vec found = load(sums + r * sum_stride + t) + (p->bias ? p->bias[row + r] : 0);
            for (int lane = 0; lane < LANES; lane++) turned[lane][r] = found[lane];
        }
        for (int64_t lane = 0; lane < least(LANES, p->tokens - t); lane++)
            memcpy(p->out + (t + lane) * p->out_stride + row, turned[lane], (size_t)rows * sizeof(float));
    }
}

#define OUTER(row_count, vectors)                                                                            \
    case row_count:                                                                                          \
        outer_tile(panel, MANY_COLUMNS, row_count, tokens, LANES, MANY_COLUMNS *LANES, vectors, count, sums, \
                   sum_stride);                                                                              \
        break;

#define OUTER_OF(vectors)                                                                         \
    switch (rows) {                                                                               \
        OUTER(1, vectors)                                                                         \
        OUTER(2, vectors) OUTER(3, vectors) OUTER(4, vectors) OUTER(5, vectors) OUTER(6, vectors) \
    }

static void outer_rows(const float *panel, int64_t rows, const float *tokens, int64_t vectors, int64_t count,
                       float *sums, int64_t sum_stride) {
    switch (vectors) {
        case 1: OUTER_OF(1) break;
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
    memset(sums, 0, (size_t)(rows * sum_stride) * sizeof *sums);
    for (int64_t k = 0; k < width; k += MANY_COLUMNS) {
        const int64_t count = least(MANY_COLUMNS, width - k);
        unpack_panel(p->matrix, row, rows, k, count, panel, MANY_COLUMNS);
        const int64_t next = p->matrix->form->bits == 8 ? least(MANY_COLUMNS, width - k - count) : 0;
        for (int64_t v = 0; v < vectors; v += TILE_VECTORS)
            for (int64_t r = 0; r < rows; r += TILE_ROWS) {
                const int64_t tile_rows = least(TILE_ROWS, rows - r);
                /* Fewer bits come fast enough without being asked for. */
                if (next && v == 0) prefetch_panel(p->matrix, row + r, tile_rows, k + count, next);
                outer_rows(
                    panel + r * MANY_COLUMNS, tile_rows, tokens + (k * vectors + v * MANY_COLUMNS) * LANES,
                    least(TILE_VECTORS, vectors - v), count, sums + r * sum_stride + v * LANES, sum_stride);
            }
    }
    write_sums(p, row, rows, sums, sum_stride);
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
    const int64_t share = (p->rows / (2 * threads) + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
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

/* out [tokens, rows] = x [tokens, width] @ matrix^T + bias. 0; 2: no memory. */
EXPORT int multiply(const format *form, const uint8_t *data, int64_t data_stride, int64_t rows,
                    const float *x, int64_t x_stride, int64_t tokens, const float *bias, float *out,
                    int64_t out_stride, int threads) {
    const packed_matrix matrix = {form, data, data_stride};
    int failed = 0;
    for (int64_t t = 0; t < tokens && !failed; t += MANY_TOKENS) {
        const product part = {&matrix,
                              rows,
                              x + t * x_stride,
                              x_stride,
                              least(MANY_TOKENS, tokens - t),
                              bias,
                              out + t * out_stride,
                              out_stride};
        failed = part.tokens <= FEW_TOKENS ? multiply_few(&part, threads) : multiply_many(&part, threads);
    }
    return failed;
}

/* Few tokens times a packed matrix, by its bare codes, which are not made into the weights they stand for.
 *
 * Decoding a code is then one conversion, and two codes (or four) stand in each byte. Where groups lie along
 * columns, the rows of a block share their scales: a token's values are multiplied with them once for all rows.
 * Where groups lie along rows, the sum over a group is multiplied with its scale. What a group adds to every
 * code, its minimum or zero, is multiplied with the sum of a token's values.
 */
#include "decode.h"
#include "product.h"

enum {
    COLUMNS = 1024, /* whose tokens stay in the nearest cache */
    TOGETHER = 4,   /* tokens that a block is multiplied with at once */
    MOST_ROWS = 128, /* of a block along columns */
    MOST_SUMS = 16,
    AHEAD = 8, /* rows of bytes */
};

int knows_bare_codes(const format *form) {
    if (form->kind != CODES || form->bits == 3 || form->width < LANES) return 0;
    if (form->along == ALONG_COLUMN) return form->group <= MOST_ROWS;
    return (form->group == 32 || form->group == 64 || form->group == 128) && form->width % form->group == 0;
}

/* Groups along columns */

/* scaled[t * COLUMNS + i] = x * scale, zeros up to a whole vector; base[t] += x * (what every code is shifted by). */
static void scale_tokens(const format *form, const uint8_t *block, const float *x, int64_t x_stride,
                         int64_t tokens, int64_t column, int64_t count, float *scaled, vec *base) {
    group_numbers numbers;
    for (int64_t c = 0; c < count; c += PIECE) {
        const int64_t piece = least(PIECE, count - c);
        read_numbers(form, block, column + c, piece, &numbers);
        for (int64_t i = 0; i < piece; i += LANES) {
            vec scale = load(numbers.scale + i), shift = shifts_of(&numbers, i);
            const int64_t lanes = least(LANES, piece - i);
            for (int64_t lane = lanes; lane < LANES; lane++) scale[lane] = shift[lane] = 0;
            for (int64_t t = 0; t < tokens; t++) {
                const float *from = x + t * x_stride + column + c + i;
                vec value = {0};
                if (lanes == LANES) value = load(from);
                else memcpy(&value, from, (size_t)lanes * sizeof(float));
                base[t] = fma_vec(value, shift, base[t]);
                store(scaled + t * COLUMNS + c + i, value * scale);
            }
        }
    }
}

/* Some rows of bytes, `width` bytes apart, each of which holds a row of codes per field; rows of fields are `step`
 * rows apart: sums[(row + field * step) * TOGETHER + t]. Enough rows for additions not to wait for each other. */
INLINE void multiply_bytes(const uint8_t *bytes, int64_t width, int rows, int64_t bits, const float *scaled,
                           int tokens, int64_t count, vec *sums, int64_t step) {
    const int fields = (int)(8 / bits);
    vec acc[MOST_SUMS];
#define SUM(r, f, t) acc[((r) * fields + (f)) * tokens + (t)]
#define KEPT(r, f, t) sums[((r) + (f) * step) * TOGETHER + (t)]
    UNROLL for (int r = 0; r < rows; r++) UNROLL
        for (int f = 0; f < fields; f++) UNROLL
            for (int t = 0; t < tokens; t++) SUM(r, f, t) = KEPT(r, f, t);
    for (int64_t k = 0; k < count; k += LANES) {
        UNROLL for (int r = 0; r < rows; r++) {
            const ivec held = load_bytes(bytes + r * width + k);
            UNROLL for (int f = 0; f < fields; f++) {
                ivec codes = held >> (int)(f * bits);
                if (f + 1 < fields) codes &= (1 << bits) - 1;
                const vec value = to_float(codes);
                UNROLL for (int t = 0; t < tokens; t++)
                    SUM(r, f, t) = fma_vec(value, load(scaled + t * COLUMNS + k), SUM(r, f, t));
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL
        for (int f = 0; f < fields; f++) UNROLL
            for (int t = 0; t < tokens; t++) KEPT(r, f, t) = SUM(r, f, t);
#undef SUM
#undef KEPT
}

/* Prefetch rows of bytes that are read a few microseconds later; those past a block are the next one's. */
INLINE void ask_ahead(const uint8_t *bytes, int64_t width, int64_t rows, int64_t count) {
    enum { CACHE_LINE = 64 };
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < count; i += CACHE_LINE)
            __builtin_prefetch((const void *)((uintptr_t)bytes + (uintptr_t)(r * width + i)));
}

#define MULTIPLY_ROWS(rows, bits, tokens)                                                   \
    multiply_bytes(codes + j * form->width, form->width, rows, bits, scaled, tokens, count, \
                   sums + j * TOGETHER, byte_rows)

#define MULTIPLY(bits, tokens, together)                                                \
    do {                                                                                \
        int64_t j = 0;                                                                  \
        for (; j + (together) <= byte_rows; j += (together)) {                          \
            ask_ahead(codes + (j + AHEAD) * form->width, form->width, together, count); \
            MULTIPLY_ROWS(together, bits, tokens);                                      \
        }                                                                               \
        for (; j < byte_rows; j++) MULTIPLY_ROWS(1, bits, tokens);                      \
    } while (0)

#define MULTIPLY_BITS(tokens, two, four, eight)    \
    switch (form->bits) {                          \
        case 2: MULTIPLY(2, tokens, two); break;   \
        case 4: MULTIPLY(4, tokens, four); break;  \
        case 8: MULTIPLY(8, tokens, eight); break; \
    }                                              \
    break;

/* Up to TOGETHER tokens and one block. */
static void share_block(const product *p, int64_t row, const float *x, int64_t tokens, float *out, float *scaled) {
    const format *form = p->matrix->form;
    const uint8_t *block = p->matrix->data + row / form->group * p->matrix->stride;
    const int64_t byte_rows = form->group * form->bits / 8;
    vec sums[MOST_ROWS * TOGETHER], base[TOGETHER] = {{0}};
    memset(sums, 0, (size_t)(form->group * TOGETHER) * sizeof *sums);
    for (int64_t column = 0; column < form->width; column += COLUMNS) {
        const int64_t count = least(COLUMNS, form->width - column);
        const uint8_t *codes = block + column;
        scale_tokens(form, block, x, p->x_stride, tokens, column, count, scaled, base);
        switch (tokens) {
            case 1: MULTIPLY_BITS(1, 2, 4, 8)
            case 2: MULTIPLY_BITS(2, 1, 2, 4)
            case 3: MULTIPLY_BITS(3, 1, 2, 3)
            case 4: MULTIPLY_BITS(4, 1, 1, 2)
        }
    }
    const int64_t rows = least(form->group, p->rows - row);
    float shared[TOGETHER], results[TOGETHER];
    sum_four(base, shared);
    for (int64_t r = 0; r < rows; r++) {
        sum_four(sums + r * TOGETHER, results);
        for (int64_t t = 0; t < tokens; t++)
            out[t * p->out_stride + row + r] = results[t] + shared[t] + (p->bias ? p->bias[row + r] : 0);
    }
}

/* Groups along rows */

/* sums[t * sum_stride + g] = the sum of a token's values over group g, zeros up to a whole vector. */
static void sum_groups(const product *p, int64_t sum_stride, float *sums) {
    const int64_t size = p->matrix->form->group;
    memset(sums, 0, sizeof(float) * (size_t)(p->tokens * sum_stride));
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t g = 0; g < p->matrix->form->groups; g++) {
            vec lanes = {0};
            for (int64_t i = 0; i < size; i += LANES) lanes += load(p->x + t * p->x_stride + g * size + i);
            sums[t * sum_stride + g] = sum(lanes);
        }
}

/* acc[t] = the products of a group's codes, of a size that the compiler knows, with each token's values. */
INLINE void multiply_group(const uint8_t *bytes, int64_t bits, int64_t size, const float *x,
                           int64_t x_stride, int tokens, vec *acc) {
    ivec held[LARGEST_KNOWN / LANES];
    hold_plane(bytes, size * bits / 8, held);
    UNROLL for (int t = 0; t < tokens; t++) acc[t] = (vec){0};
    UNROLL for (int64_t v = 0; v < size; v += LANES) {
        const vec value = to_float(field_of(held, bits, size, v) & ((1 << bits) - 1));
        UNROLL for (int t = 0; t < tokens; t++)
            acc[t] = fma_vec(value, load(x + t * x_stride + v), acc[t]);
    }
}

/* One row and up to TOGETHER tokens, whose sums over groups are `group_sums`. */
INLINE void multiply_row(const product *p, int64_t row, const float *x, int tokens, const float *group_sums,
                         int64_t sum_stride, float *out, int64_t bits, int64_t size) {
    const format *form = p->matrix->form;
    const uint8_t *block = p->matrix->data + row * p->matrix->stride;
    const int64_t bytes = size * bits / 8;
    vec sums[TOGETHER] = {{0}};
    float results[TOGETHER];
    for (int64_t first = 0; first < form->groups; first += PIECE) {
        const int64_t count = least(PIECE, form->groups - first);
        group_numbers numbers;
        read_numbers(form, block, first, count, &numbers);
        for (int64_t g = 0; g < count; g++) {
            vec acc[TOGETHER];
            multiply_group(block + (first + g) * bytes, bits, size, x + (first + g) * size, p->x_stride, tokens,
                           acc);
            const vec scale = splat(numbers.scale[g]);
            UNROLL for (int t = 0; t < tokens; t++) sums[t] = fma_vec(acc[t], scale, sums[t]);
        }
        for (int64_t g = 0; g < count; g += LANES) {
            vec shift = shifts_of(&numbers, g);
            for (int64_t lane = count - g; lane < LANES; lane++) shift[lane] = 0;
            UNROLL for (int t = 0; t < tokens; t++)
                sums[t] = fma_vec(shift, load(group_sums + t * sum_stride + first + g), sums[t]);
        }
    }
    sum_four(sums, results);
    for (int t = 0; t < tokens; t++) out[t * p->out_stride + row] = results[t] + (p->bias ? p->bias[row] : 0);
}

#define ROW(bits, size, tokens) multiply_row(p, row, x, tokens, group_sums, sum_stride, out, bits, size)
#define ROW_OF(bits, size)                 \
    switch (tokens) {                      \
        case 1: ROW(bits, size, 1); break; \
        case 2: ROW(bits, size, 2); break; \
        case 3: ROW(bits, size, 3); break; \
        case 4: ROW(bits, size, 4); break; \
    }                                      \
    break;
#define ROW_OF_BITS(size)            \
    switch (p->matrix->form->bits) { \
        case 2: ROW_OF(2, size)      \
        case 4: ROW_OF(4, size)      \
        case 8: ROW_OF(8, size)      \
    }                                \
    break;

static void along_row(const product *p, int64_t row, int64_t t, const float *group_sums, int64_t sum_stride) {
    const int64_t tokens = least(TOGETHER, p->tokens - t);
    const float *x = p->x + t * p->x_stride;
    float *out = p->out + t * p->out_stride;
    group_sums += t * sum_stride;
    switch (p->matrix->form->group) {
        case 32: ROW_OF_BITS(32)
        case 64: ROW_OF_BITS(64)
        case 128: ROW_OF_BITS(128)
    }
}

static int multiply_rows(const product *p, int threads) {
    enum { ROWS = 8 }; /* multiplied with some tokens before the others: they stay in a cache */
    const int64_t sum_stride = (p->matrix->form->groups + LANES - 1) / LANES * LANES;
    float *group_sums = scratch(SHARED_SLOT, sizeof(float) * (size_t)(p->tokens * sum_stride));
    if (!group_sums) return 2;
    sum_groups(p, sum_stride, group_sums);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < p->rows; row += ROWS)
        for (int64_t t = 0; t < p->tokens; t += TOGETHER)
            for (int64_t r = row; r < least(row + ROWS, p->rows); r++) along_row(p, r, t, group_sums, sum_stride);
    return 0;
}

static int multiply_blocks(const product *p, int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : failed)
    for (int64_t row = 0; row < p->rows; row += p->matrix->form->group) {
        float *scaled = scratch(OWN_SLOT, sizeof(float) * TOGETHER * COLUMNS);
        if (!scaled) {
            failed = 2;
            continue;
        }
        for (int64_t t = 0; t < p->tokens; t += TOGETHER)
            share_block(p, row, p->x + t * p->x_stride, least(TOGETHER, p->tokens - t), p->out + t * p->out_stride,
                        scaled);
    }
    return failed;
}

int multiply_bare_codes(const product *p, int threads) {
    return p->matrix->form->along == ALONG_COLUMN ? multiply_blocks(p, threads) : multiply_rows(p, threads);
}

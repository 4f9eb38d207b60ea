/* The inner loops of products: small tiles of outputs whose sums stay in registers.
 *
 * Sizes are constants where these are called, so that loops unroll and arrays become registers.
 */
#ifndef TILES_H
#define TILES_H

#include "formats.h"
#include "simd.h"


/* LANES floats that are kept in `kind`, or the first `count` of them; other lanes are not defined. */
INLINE vec load_floats(const uint8_t *from, int64_t count, int64_t kind) {
    if (kind == HALF) return load_halves(from, count);
    if (kind == BFLOAT) return load_bfloats(from, count);
    vec found = {0};
    if (count >= LANES) memcpy(&found, from, sizeof found);
    else memcpy(&found, from, (size_t)count * sizeof(float));
    return found;
}

/* sums[t * sum_stride + r] += the LANES partial sums of row r times token t, both `count` long.
 *
 * Rows are floats of any kind, `row_stride` bytes apart. Vectors run along the summed dimension: neither operand
 * needs rearranging, and a sum over lanes is left to the caller. What is left over after whole vectors goes
 * to the first lanes. Meanwhile the rows that lie `ahead` bytes further on are fetched into the second cache, line
 * by line, unless it is 0: rows are often a power of two apart, so that they share sets of the first cache. */
INLINE void dot_tile(const uint8_t *rows, int64_t row_stride, int64_t kind, int row_count, const float *tokens,
                     int64_t token_stride, int token_count, int64_t count, vec *sums, int64_t sum_stride,
                     int64_t ahead) {
    const int64_t each = kind == HALF || kind == BFLOAT ? 2 : 4;
    vec acc[32];
    UNROLL for (int t = 0; t < token_count; t++) UNROLL
        for (int r = 0; r < row_count; r++) acc[t * row_count + r] = sums[t * sum_stride + r];
#define DOT_STEP(k)                                                                         \
    do {                                                                                    \
        vec token[4];                                                                       \
        UNROLL for (int t = 0; t < token_count; t++)                                        \
            token[t] = load(tokens + t * token_stride + (k));                               \
        UNROLL for (int r = 0; r < row_count; r++) {                                        \
            const vec row = load_floats(rows + r * row_stride + (k) * each, LANES, kind);   \
            UNROLL for (int t = 0; t < token_count; t++)                                    \
                acc[t * row_count + r] = fma_vec(row, token[t], acc[t * row_count + r]);    \
        }                                                                                   \
    } while (0)
    int64_t k = 0;
    if (ahead) {
        const int64_t line = 64 / each;
        for (; k + line <= count; k += line) {
            UNROLL for (int r = 0; r < row_count; r++)
                __builtin_prefetch(
                    (const void *)((uintptr_t)rows + (uintptr_t)(r * row_stride + k * each + ahead)), 0, 2);
            UNROLL for (int64_t i = 0; i < line; i += LANES) DOT_STEP(k + i);
        }
    }
    for (; k + LANES <= count; k += LANES) DOT_STEP(k);
#undef DOT_STEP
    UNROLL for (int t = 0; t < token_count; t++) UNROLL
        for (int r = 0; r < row_count; r++) sums[t * sum_stride + r] = acc[t * row_count + r];
    if (k == count) return;
    for (int r = 0; r < row_count; r++) {
        const vec row = load_floats(rows + r * row_stride + k * each, count - k, kind);
        for (int t = 0; t < token_count; t++)
            for (int64_t i = k; i < count; i++)
                sums[t * sum_stride + r][i - k] += row[i - k] * tokens[t * token_stride + i];
    }
}

/* sums[r][v] += the sum over k of rows[r][k] * columns[k][v], where columns[k][v] is the vector of numbers of `kind`
 * that begins k * step + v * vector_stride numbers on. `sum_stride` floats lie between rows of sums, which
 * may hold anything before if it `begins` with them.
 *
 * Vectors run along outputs: a row's values are broadcast one by one, and no sum over lanes is needed. */
INLINE void outer_tile(const float *rows, int64_t row_stride, int row_count, const uint8_t *columns, int64_t kind,
                       int64_t step, int64_t vector_stride, int vectors, int64_t count, int begins, float *sums,
                       int64_t sum_stride) {
    const int64_t each = kind == HALF || kind == BFLOAT ? 2 : 4;
    vec acc[32];
    if (begins) {
        UNROLL for (int i = 0; i < row_count * vectors; i++) acc[i] = (vec){0};
    } else {
        UNROLL for (int r = 0; r < row_count; r++) UNROLL
            for (int v = 0; v < vectors; v++) acc[r * vectors + v] = load(sums + r * sum_stride + v * LANES);
    }
    for (int64_t k = 0; k < count; k++) {
        vec column[8];
        UNROLL for (int v = 0; v < vectors; v++)
            column[v] = load_floats(columns + (k * step + v * vector_stride) * each, LANES, kind);
        UNROLL for (int r = 0; r < row_count; r++) {
            const vec row = splat(rows[r * row_stride + k]);
            UNROLL for (int v = 0; v < vectors; v++)
                acc[r * vectors + v] = fma_vec(row, column[v], acc[r * vectors + v]);
        }
    }
    UNROLL for (int r = 0; r < row_count; r++) UNROLL
        for (int v = 0; v < vectors; v++) store(sums + r * sum_stride + v * LANES, acc[r * vectors + v]);
}

#endif

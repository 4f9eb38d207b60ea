/* The inner loops of products: small tiles of outputs whose sums stay in registers.
 *
 * Sizes are constants where these are called, so that loops unroll and arrays become registers.
 */
#ifndef TILES_H
#define TILES_H

#include "simd.h"

/* sums[t * rows + r] += the LANES partial sums of row r times token t, both `count` long.
 *
 * Vectors run along the summed dimension: neither operand needs rearranging, and a sum over lanes is left
 * to the caller. What is left over after whole vectors goes to the first lane. */
INLINE void dot_tile(const float *rows, int64_t row_stride, int row_count, const float *tokens,
                     int64_t token_stride, int token_count, int64_t count, vec *sums) {
    vec acc[32];
    UNROLL for (int i = 0; i < row_count * token_count; i++)
        acc[i] = sums[i];
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        vec row[8];
        UNROLL for (int r = 0; r < row_count; r++)
            row[r] = load(rows + r * row_stride + k);
        UNROLL for (int t = 0; t < token_count; t++) {
            const vec token = load(tokens + t * token_stride + k);
            UNROLL for (int r = 0; r < row_count; r++)
                acc[t * row_count + r] = fma_vec(row[r], token, acc[t * row_count + r]);
        }
    }
    UNROLL for (int i = 0; i < row_count * token_count; i++)
        sums[i] = acc[i];
    for (; k < count; k++)
        for (int t = 0; t < token_count; t++)
            for (int r = 0; r < row_count; r++)
                sums[t * row_count + r][0] += rows[r * row_stride + k] * tokens[t * token_stride + k];
}

/* sums[r][v] += the sum over k of rows[r][k] * columns[k][v], where columns[k][v] is the vector at
 * k * step + v * vector_stride. `sum_stride` floats lie between rows of sums.
 *
 * Vectors run along outputs: a row's values are broadcast one by one, and no sum over lanes is needed. */
INLINE void outer_tile(const float *rows, int64_t row_stride, int row_count, const float *columns,
                       int64_t step, int64_t vector_stride, int vectors, int64_t count, float *sums,
                       int64_t sum_stride) {
    vec acc[32];
    UNROLL for (int r = 0; r < row_count; r++) UNROLL
        for (int v = 0; v < vectors; v++) acc[r * vectors + v] = load(sums + r * sum_stride + v * LANES);
    for (int64_t k = 0; k < count; k++) {
        vec column[8];
        UNROLL for (int v = 0; v < vectors; v++)
            column[v] = load(columns + k * step + v * vector_stride);
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

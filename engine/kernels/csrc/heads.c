/* A few packed tokens and the queries of their heads, where each head has one: values go from codes to
 * sums without being floats in memory. With several queries per head, unpacking once for all is faster.
 */
#include "decode.h"

/* Groups that lie along rows, do not cross heads, and have a usual size. */
static int has_whole_groups(const format *form, int64_t width) {
    const int64_t size = form->group;
    return form->kind == CODES && form->along == ALONG_ROW && (size == 32 || size == 64 || size == 128) &&
           width % size == 0 && form->groups <= PIECE;
}

int can_score_heads(const format *form, int64_t width) {
    return form->along == ALONG_COLUMN ? width % LANES == 0 : has_whole_groups(form, width);
}

int can_mix_heads(const format *form, int64_t width) { return has_whole_groups(form, width); }

/* Prefetch the next tile. The rows of a tile are read side by side, in more streams than the processor's own
 * prefetcher follows; one request per group does not wait for the others. */
INLINE void prefetch_next(const head_tile *tile, const uint8_t *bytes) {
    __builtin_prefetch(bytes + TOKEN_TILE * tile->matrix.stride);
}

INLINE void read_tile(const head_tile *tile, int64_t size, group_numbers *numbers) {
    const format *form = tile->matrix.form;
    const int64_t first = tile->column / size, count = tile->heads * tile->width / size;
    for (int64_t t = 0; t < tile->rows; t++) {
        const uint8_t *block = tile->matrix.data + (tile->row + t) * tile->matrix.stride;
        read_numbers(form, block, first, count, numbers + t);
        prefetch_next(tile, block + form->code_bytes + 2 * first);
        prefetch_next(tile, block + form->code_bytes + 2 * (first + form->groups));
    }
}

/* Group `group` of the tile's columns of token t. */
INLINE void decode_tile(const head_tile *tile, int64_t t, int64_t group, const group_numbers *numbers,
                        int64_t bits, int64_t size, vec *values) {
    const uint8_t *bytes = tile->matrix.data + (tile->row + t) * tile->matrix.stride +
                           (tile->column / size + group) * (size * bits / 8);
    prefetch_next(tile, bytes);
    decode_group(bytes, size, numbered(numbers + t, group, bits), bits, values);
}

static void write_scores(const vec *sums, int64_t rows, float bias, float *scores) {
    for (int64_t t = 0; t < rows; t += 4) {
        float results[4];
        sum_four(sums + t, results);
        for (int64_t i = 0; i < least(4, rows - t); i++) scores[t + i] = results[i] + bias;
    }
}

INLINE void score_rows(const head_tile *tile, const float *query, float *scores, int64_t stride, int64_t bits,
                       int64_t size) {
    group_numbers numbers[TOKEN_TILE];
    read_tile(tile, size, numbers);
    const int64_t groups = tile->width / size; /* of a head */
    for (int64_t head = 0; head < tile->heads; head++) {
        vec sums[TOKEN_TILE];
        for (int64_t t = 0; t < TOKEN_TILE; t++) {
            vec total = {0};
            for (int64_t group = head * groups; group < (head + 1) * groups && t < tile->rows; group++) {
                vec values[LARGEST_KNOWN / LANES];
                decode_tile(tile, t, group, numbers, bits, size, values);
                UNROLL for (int v = 0; v < size / LANES; v++)
                    total = fma_vec(values[v], load(query + group * size + v * LANES), total);
            }
            sums[t] = total;
        }
        write_scores(sums, tile->rows, 0, scores + head * stride);
    }
}

/* A column's scale is the same for all tokens of a block, so it is the query that is scaled:
 * sum of query * ((code - zero) * scale + minimum) = sum of code * (query * scale) + a number of the head. */
INLINE void score_columns(const head_tile *tile, const float *query, float *scores, int64_t stride,
                          int64_t bits) {
    const format *form = tile->matrix.form;
    const uint8_t *block = tile->matrix.data + tile->row / form->group * tile->matrix.stride;
    row_fields fields[TOKEN_TILE];
    for (int64_t t = 0; t < TOKEN_TILE; t++) /* rows beyond the tile's repeat its last */
        fields[t] =
            fields_of(form, block, bits, tile->row % form->group + least(t, tile->rows - 1), tile->column);
    for (int64_t head = 0; head < tile->heads; head++) {
        vec sums[TOKEN_TILE] = {0}, bias = {0};
        for (int64_t c = head * tile->width; c < (head + 1) * tile->width; c += LANES) {
            group_numbers numbers;
            read_numbers(form, block, tile->column + c, LANES, &numbers);
            const vec part = load(query + c), scaled = part * load(numbers.scale);
            bias = fma_vec(part, load(numbers.minimum), bias) - scaled * load(numbers.zero);
            UNROLL for (int64_t t = 0; t < TOKEN_TILE; t++)
                sums[t] = fma_vec(to_float(codes_of(fields[t], c, bits)), scaled, sums[t]);
        }
        write_scores(sums, tile->rows, sum(bias), scores + head * stride);
    }
}

INLINE void mix_rows(const head_tile *tile, const float *weights, int64_t stride, float *out, int64_t bits,
                     int64_t size) {
    group_numbers numbers[TOKEN_TILE];
    read_tile(tile, size, numbers);
    for (int64_t group = 0; group < tile->heads * tile->width / size; group++) {
        const float *weight = weights + group * size / tile->width * stride;
        vec sums[LARGEST_KNOWN / LANES];
        UNROLL for (int v = 0; v < size / LANES; v++)
            sums[v] = load(out + group * size + v * LANES);
        for (int64_t t = 0; t < tile->rows; t++) {
            vec values[LARGEST_KNOWN / LANES];
            decode_tile(tile, t, group, numbers, bits, size, values);
            UNROLL for (int v = 0; v < size / LANES; v++)
                sums[v] = fma_vec(values[v], splat(weight[t]), sums[v]);
        }
        UNROLL for (int v = 0; v < size / LANES; v++)
            store(out + group * size + v * LANES, sums[v]);
    }
}

#define CASE_OF_BITS(call, bits)                    \
    case bits:                                      \
        if (form->group == 32) call(bits, 32);      \
        else if (form->group == 64) call(bits, 64); \
        else call(bits, 128);                       \
        break;

#define EVERY_CASE(call)      \
    switch (form->bits) {     \
        CASE_OF_BITS(call, 2) \
        CASE_OF_BITS(call, 3) \
        CASE_OF_BITS(call, 4) \
        CASE_OF_BITS(call, 8) \
    }

#define SCORE_ROWS(bits, size) score_rows(tile, query, scores, stride, bits, size)
#define MIX_ROWS(bits, size) mix_rows(tile, weights, stride, out, bits, size)

void score_heads(const head_tile *tile, const float *query, float *scores, int64_t stride) {
    const format *form = tile->matrix.form;
    if (form->along == ALONG_ROW) {
        EVERY_CASE(SCORE_ROWS)
        return;
    }
    switch (form->bits) {
        case 2: score_columns(tile, query, scores, stride, 2); break;
        case 3: score_columns(tile, query, scores, stride, 3); break;
        case 4: score_columns(tile, query, scores, stride, 4); break;
        case 8: score_columns(tile, query, scores, stride, 8); break;
    }
}

void mix_heads(const head_tile *tile, const float *weights, int64_t stride, float *out) {
    const format *form = tile->matrix.form;
    EVERY_CASE(MIX_ROWS)
}

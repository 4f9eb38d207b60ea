/* Attention of one query per sequence to its packed and its exact tokens.
 *
 * Keys and values are unpacked a tile of tokens and one head at a time into the nearest cache, once for all
 * query heads that share them. Three steps per head: scores of all visible tokens, their softmax, the
 * weighted sum of values. Tokens without weight (those that `kept` leaves out) have no value read.
 */
#include "formats.h"
#include "select.h"
#include "tiles.h"

enum { TILE = 32 /* tokens that are unpacked at once */, ITEM_VALUES = 1024 };

/* Mirrored field by field in native.py. */
typedef struct {
    const format *keys, *values;
    int64_t block_tokens, block_bytes, key_bytes; /* of one block of tokens: its keys come first */
    int64_t heads, groups, key_width, value_width;
    const float *sinks; /* [heads] or NULL */
    double scale, softcap; /* softcap 0: none */
    int64_t sequences;
    const uint8_t *const *packed;
    const int64_t *packed_tokens;
    const float *const *rows; /* exact tokens, keys then values, row_strides floats apart */
    const int64_t *row_counts, *row_strides;
    const int64_t *first; /* the first visible token */
    const int64_t *kept;  /* visible past tokens that count, by score */
    const float *query;   /* [sequences, heads, key_width], query_stride floats between sequences */
    float *out;           /* [sequences, heads, value_width] */
    int64_t query_stride, out_stride;
} attention_call;

/* What one thread works with on heads of one sequence. */
typedef struct {
    const attention_call *call;
    int64_t sequence, tokens, padded; /* visible tokens, and as many as whole vectors hold */
    float *panel;                     /* [TILE, head width]: a tile of keys or values */
    float *scores;                    /* [query heads, padded] */
    float *spare;                     /* [padded] */
} workplace;

/* Rows of one head's keys or values. */
typedef struct {
    const float *data;
    int64_t stride;
} rows_of_head;

/* How many tokens from `token` on lie together, at most TILE: in one block, or in the exact rows. */
static int64_t tile_length(const attention_call *call, int64_t sequence, int64_t token) {
    const int64_t packed = call->packed_tokens[sequence];
    if (token >= packed) return least(TILE, packed + call->row_counts[sequence] - token);
    int64_t length = least(TILE, packed - token);
    if (call->block_tokens > 1) length = least(length, call->block_tokens - token % call->block_tokens);
    return length;
}

/* `count` tokens of a head, unpacked into the panel or where they lie as exact rows. */
static rows_of_head head_rows(const workplace *place, int want_values, int64_t head, int64_t token, int64_t count) {
    const attention_call *call = place->call;
    const int64_t width = want_values ? call->value_width : call->key_width;
    const int64_t packed_tokens = call->packed_tokens[place->sequence];
    if (token >= packed_tokens) {
        const int64_t stride = call->row_strides[place->sequence];
        const int64_t column = (want_values ? call->groups * call->key_width : 0) + head * width;
        return (rows_of_head){call->rows[place->sequence] + (token - packed_tokens) * stride + column, stride};
    }
    const format *form = want_values ? call->values : call->keys;
    const uint8_t *data = call->packed[place->sequence] + (want_values ? call->key_bytes : 0);
    const int64_t bytes = form->code_bytes + form->groups * (form->offset == MIDDLE ? 2 : 4);
    packed_matrix matrix = {form, data + token / call->block_tokens * call->block_bytes, bytes};
    if (call->block_tokens == 1) matrix.stride = call->block_bytes; /* blocks of one token: rows of one matrix */
    unpack_panel(&matrix, token % call->block_tokens, count, head * width, width, place->panel, width);
    return (rows_of_head){place->panel, width};
}

#define SCORES(query_count)                                                                                  \
    do {                                                                                                     \
        vec sums[8 * query_count] = {0};                                                                     \
        dot_tile(keys.data + t * keys.stride, keys.stride, 8, query + q * width, width, query_count, width,  \
                 sums);                                                                                      \
        for (int i = 0; i < 8 * query_count; i += 4)                                                         \
            sum_four(sums + i, scores + (q + i / 8) * stride + t + i % 8);                                   \
        q += query_count;                                                                                    \
    } while (0)

/* scores[q][t] = query q times key t. */
static void score_tile(rows_of_head keys, int64_t count, const float *query, int64_t queries, int64_t width,
                       float *scores, int64_t stride) {
    int64_t t = 0;
    for (; t + 8 <= count; t += 8)
        for (int64_t q = 0; q < queries;) {
            if (queries - q >= 2) SCORES(2);
            else SCORES(1);
        }
    for (; t < count; t++)
        for (int64_t q = 0; q < queries; q++) {
            vec found = {0};
            dot_tile(keys.data + t * keys.stride, keys.stride, 1, query + q * width, width, 1, width, &found);
            scores[q * stride + t] = sum(found);
        }
}

/* Scores become weights that sum to less than or exactly 1; the rest is the sink's. */
static void softmax(float *scores, int64_t tokens, int64_t padded, float sink) {
    float highest = sink;
#pragma omp simd reduction(max : highest)
    for (int64_t t = 0; t < tokens; t++) highest = scores[t] > highest ? scores[t] : highest;
    for (int64_t t = tokens; t < padded; t++) scores[t] = -INFINITY;
    vec sums = {0};
    for (int64_t t = 0; t < padded; t += LANES) {
        const vec weight = exp_vec(load(scores + t) - highest);
        store(scores + t, weight);
        sums += weight;
    }
    const float inverse = 1 / (sum(sums) + expf(sink - highest));
    for (int64_t t = 0; t < padded; t += LANES) store(scores + t, load(scores + t) * inverse);
}

static void cap(float *scores, int64_t tokens, float limit) {
    for (int64_t t = 0; t < tokens; t++) scores[t] = tanhf(scores[t] / limit) * limit;
}

#define MIX_VECTORS(query_count, vectors)                                                                    \
    for (; e + (vectors) * LANES <= width; e += (vectors) * LANES)                                           \
        outer_tile(weights, stride, query_count, values.data + e, values.stride, LANES, vectors, count,      \
                   out + e, width);

#define MIX(query_count, vectors)                                                                            \
    case query_count:                                                                                        \
        MIX_VECTORS(query_count, vectors)                                                                    \
        MIX_VECTORS(query_count, 1)                                                                          \
        break;

/* out[q] += the sum of weights[q][t] * values[t], for up to four queries. */
static void mix_tile(const float *weights, int64_t stride, int64_t queries, rows_of_head values, int64_t count,
                     int64_t width, float *out) {
    int64_t e = 0;
    switch (queries) { /* eight sums or more, or the adders wait for each other */
        MIX(1, 8)
        MIX(2, 4)
        MIX(3, 4)
        MIX(4, 4)
    }
    for (; e < width; e++)
        for (int64_t q = 0; q < queries; q++)
            for (int64_t t = 0; t < count; t++)
                out[q * width + e] += weights[q * stride + t] * values.data[t * values.stride + e];
}

/* Whether any of a head's queries gives weight to a token. */
static int has_weight(const float *weights, int64_t stride, int64_t queries, int64_t token) {
    for (int64_t q = 0; q < queries; q++)
        if (weights[q * stride + token] != 0) return 1;
    return 0;
}

static void attend(workplace *place, int64_t first_head, int64_t heads) {
    const attention_call *call = place->call;
    const int64_t shared = call->heads / call->groups, s = place->sequence, stride = place->padded;
    const float *query = call->query + s * call->query_stride;
    float *out = call->out + s * call->out_stride;
    const int64_t start = call->first[s], end = start + place->tokens;
    for (int64_t token = start, count; token < end; token += count) {
        count = tile_length(call, s, token);
        for (int64_t head = first_head; head < first_head + heads; head++)
            score_tile(head_rows(place, 0, head, token, count), count, query + head * shared * call->key_width,
                       shared, call->key_width,
                       place->scores + (head - first_head) * shared * stride + token - start, stride);
    }
    for (int64_t q = 0; q < heads * shared; q++) {
        float *scores = place->scores + q * stride;
        const int64_t query_head = first_head * shared + q;
        for (int64_t t = 0; t < place->tokens; t++) scores[t] *= (float)call->scale;
        if (call->softcap != 0) cap(scores, place->tokens, (float)call->softcap);
        keep_highest(scores, place->tokens - 1, call->kept[s], place->spare);
        softmax(scores, place->tokens, stride, call->sinks ? call->sinks[query_head] : -INFINITY);
        memset(out + query_head * call->value_width, 0, (size_t)call->value_width * sizeof *out);
    }
    for (int64_t token = start, tile; token < end; token += tile) {
        tile = tile_length(call, s, token);
        for (int64_t head = first_head; head < first_head + heads; head++) {
            const float *weights = place->scores + (head - first_head) * shared * stride + token - start;
            for (int64_t t = 0, count; t < tile; t += count) { /* runs of tokens that have weight */
                for (count = 0; t + count < tile && has_weight(weights, stride, shared, t + count);) count++;
                if (count == 0) {
                    count = 1;
                    continue;
                }
                const rows_of_head values = head_rows(place, 1, head, token + t, count);
                for (int64_t q = 0; q < shared; q += 4)
                    mix_tile(weights + q * stride + t, stride, least(4, shared - q), values, count,
                             call->value_width, out + (head * shared + q) * call->value_width);
            }
        }
    }
}

/* Heads that one thread takes at a time: as many as make good use of the memory read with each token, but
 * few enough to keep all threads busy. */
static int64_t heads_per_item(const attention_call *call, int threads) {
    int64_t heads = most(1, least(call->groups, ITEM_VALUES / call->key_width));
    while (heads > 1 && call->sequences * ((call->groups + heads - 1) / heads) < 2 * threads) heads = (heads + 1) / 2;
    return heads;
}

/* 0; 2: no memory. */
EXPORT int attend_sequences(const attention_call *call, int threads) {
    const int64_t heads = heads_per_item(call, threads), items = (call->groups + heads - 1) / heads;
    const int64_t head_width = most(call->key_width, call->value_width);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : failed)
    for (int64_t item = 0; item < call->sequences * items; item++) {
        const int64_t s = item / items, first_head = item % items * heads;
        const int64_t tokens = call->packed_tokens[s] + call->row_counts[s] - call->first[s];
        workplace place = {.call = call, .sequence = s, .tokens = tokens};
        place.padded = (tokens + LANES - 1) / LANES * LANES;
        const int64_t queries = heads * (call->heads / call->groups);
        place.panel = scratch(OWN_SLOT, sizeof(float) * (size_t)(TILE * head_width + (queries + 1) * place.padded));
        if (!place.panel) {
            failed = 2;
            continue;
        }
        place.spare = place.panel + TILE * head_width;
        place.scores = place.spare + place.padded;
        attend(&place, first_head, least(heads, call->groups - first_head));
    }
    return failed;
}

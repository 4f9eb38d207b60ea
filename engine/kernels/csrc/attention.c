/* Attention of one query per sequence to its packed and its exact tokens.
 *
 * A thread takes a few neighbouring heads of a sequence. It unpacks their keys and values a few tokens at a
 * time into the nearest cache, once for all query heads that share them. Three steps: scores of all visible
 * tokens, their softmax, the weighted sum of values. Values of tokens without weight are not read.
 */
#include "attention.h"
#include "select.h"
#include "tiles.h"

enum {
    PANEL_VALUES = 512, /* unpacked of a token at once, about: a tile fits the nearest cache */
    PADDING = 16,       /* floats between rows of a tile, which would otherwise share cache sets */
};

static int64_t tokens_of(const attention_call *call, int64_t sequence) {
    return call->packed_tokens[sequence] + call->row_counts[sequence];
}

static int64_t visible_of(const attention_call *call, int64_t sequence) {
    const int64_t tokens = tokens_of(call, sequence);
    return call->window ? least(tokens, call->window) : tokens;
}

/* How many of `past` visible past tokens are attended to: at least one, if there is one. */
static int64_t kept_of(const attention_call *call, int64_t past) {
    return call->fraction >= 1 ? past : least(past, most(1, (int64_t)(call->fraction * (double)past)));
}

/* What one thread works on, and its buffers. */
typedef struct {
    const attention_call *call;
    int64_t sequence, first_head, heads;
    int64_t start;          /* the first visible token */
    int64_t tokens, padded; /* visible tokens, and as many as whole vectors hold */
    float *panel;           /* [TOKEN_TILE, heads, head width]: a tile of keys or values */
    float *scores;          /* [query heads, padded] */
    float *spare;           /* [padded] */
} workplace;

/* Rows of keys or values, of one head or of all heads of a workplace: floats of a kind, read where they lie.
 */
typedef struct {
    const uint8_t *data;
    int64_t stride, kind; /* stride: bytes */
    int64_t ahead;        /* bytes to the next tile's, which the processor does not foresee; 0 in a panel */
} float_rows;

static float_rows in_place(const uint8_t *data, int64_t stride, int64_t kind) {
    return (float_rows){data, stride, kind, TOKEN_TILE * stride};
}

static float_rows of_head(float_rows rows, int64_t head, int64_t width) {
    rows.data += head * width * (rows.kind == SINGLE ? 4 : 2);
    return rows;
}

/* Tokens from `token` on that lie together, at most TOKEN_TILE: in one block, or in the exact rows. */
static int64_t tile_length(const attention_call *call, int64_t sequence, int64_t token) {
    const int64_t packed = call->packed_tokens[sequence];
    if (token >= packed) return least(TOKEN_TILE, packed + call->row_counts[sequence] - token);
    int64_t length = least(TOKEN_TILE, packed - token);
    if (call->block_tokens > 1) length = least(length, call->block_tokens - token % call->block_tokens);
    return length;
}

/* `count` packed tokens of a workplace's heads. */
static head_tile find_tile(const workplace *place, int want_values, int64_t token, int64_t count) {
    const attention_call *call = place->call;
    const format *form = want_values ? call->values : call->keys;
    const int64_t width = want_values ? call->value_width : call->key_width;
    const int64_t bytes = form->code_bytes + form->groups * (form->offset == MIDDLE ? 2 : 4);
    const uint8_t *block = call->packed[place->sequence] + token / call->block_tokens * call->block_bytes;
    /* Blocks of one token are the rows of one matrix. */
    const packed_matrix matrix = {form, block + (want_values ? call->key_bytes : 0),
                                  call->block_tokens == 1 ? call->block_bytes : bytes};
    return (head_tile){matrix, token % call->block_tokens, count, place->first_head * width, place->heads,
                       width};
}

/* `count` tokens of all heads as floats: unpacked into the panel, or where they lie. */
static float_rows read_rows(const workplace *place, int want_values, int64_t token, int64_t count) {
    const attention_call *call = place->call;
    const int64_t packed_tokens = call->packed_tokens[place->sequence];
    if (token >= packed_tokens) {
        const int64_t stride = call->row_strides[place->sequence];
        const float *row = call->rows[place->sequence] + (token - packed_tokens) * stride;
        if (want_values) row += call->groups * call->key_width + place->first_head * call->value_width;
        else row += place->first_head * call->key_width;
        return in_place((const uint8_t *)row, stride * (int64_t)sizeof *row, SINGLE);
    }
    const head_tile tile = find_tile(place, want_values, token, count);
    const packed_matrix *matrix = &tile.matrix;
    if (matrix->form->kind != CODES)
        return in_place(matrix->data + tile.row * matrix->stride + 2 * tile.column, matrix->stride,
                        matrix->form->kind);
    const int64_t columns = tile.heads * tile.width;
    unpack_panel(&tile.matrix, tile.row, count, tile.column, columns, place->panel, columns + PADDING);
    return (float_rows){(const uint8_t *)place->panel, (columns + PADDING) * (int64_t)sizeof *place->panel,
                        SINGLE, 0};
}

/* Prefetch one head's rows of the next tile. */
static void prefetch_rows(float_rows rows, int64_t count, int64_t width) {
    const int64_t bytes = width * (rows.kind == SINGLE ? 4 : 2);
    for (int64_t t = 0; t < count && rows.ahead; t++)
        prefetch((const uint8_t *)((uintptr_t)rows.data + (uintptr_t)(t * rows.stride + rows.ahead)), bytes);
}

#define SCORES(query_count)                                                                                \
    do {                                                                                                   \
        vec sums[8 * query_count];                                                                         \
        UNROLL for (int i = 0; i < 8 * query_count; i++)                                                   \
            sums[i] = (vec){0};                                                                            \
        dot_tile(keys.data + t * keys.stride, keys.stride, kind, 8, query + q * width, width, query_count, \
                 width, sums, 8, q == 0 ? keys.ahead : 0);                                                 \
        UNROLL for (int i = 0; i < 8 * query_count; i += 4)                                                \
            sum_four(sums + i, scores + (q + i / 8) * stride + t + i % 8);                                 \
        q += query_count;                                                                                  \
    } while (0)

INLINE void score_kind(float_rows keys, int64_t kind, int64_t count, const float *query, int64_t queries,
                       int64_t width, float *scores, int64_t stride) {
    int64_t t = 0;
    for (; t + 8 <= count; t += 8)
        for (int64_t q = 0; q < queries;) {
            if (queries - q >= 2) SCORES(2);
            else SCORES(1);
        }
    for (; t < count; t++)
        for (int64_t q = 0; q < queries; q++) {
            vec products = {0};
            dot_tile(keys.data + t * keys.stride, keys.stride, kind, 1, query + q * width, width, 1, width,
                     &products, 1, 0);
            scores[q * stride + t] = sum(products);
        }
}

/* scores[q][t] = query q times key t. */
static void score_tile(float_rows keys, int64_t count, const float *query, int64_t queries, int64_t width,
                       float *scores, int64_t stride) {
    switch (keys.kind) {
        case HALF: score_kind(keys, HALF, count, query, queries, width, scores, stride); break;
        case BFLOAT: score_kind(keys, BFLOAT, count, query, queries, width, scores, stride); break;
        default: score_kind(keys, SINGLE, count, query, queries, width, scores, stride);
    }
}

/* Scores become weights that sum to 1, or to less where a sink takes the rest. Returns their log-sum-exp. */
static float softmax(float *scores, int64_t tokens, int64_t padded, float sink) {
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
    const float total = sum(sums) + expf(sink - highest), inverse = 1 / total;
    for (int64_t t = 0; t < padded; t += LANES) store(scores + t, load(scores + t) * inverse);
    return highest + logf(total);
}

static void cap(float *scores, int64_t tokens, float limit) {
    for (int64_t t = 0; t < tokens; t++) scores[t] = tanhf(scores[t] / limit) * limit;
}

#define MIX_VECTORS(query_count, vectors)                                                                   \
    for (; e + (vectors) * LANES <= width; e += (vectors) * LANES)                                          \
        outer_tile(weights, stride, query_count, values.data + e * each, kind, values.stride / each, LANES, \
                   vectors, count, 0, out + e, width);

#define MIX(query_count)        \
    MIX_VECTORS(query_count, 4) \
    MIX_VECTORS(query_count, 1) \
    break;

INLINE void mix_kind(const float *weights, int64_t stride, int64_t queries, float_rows values, int64_t kind,
                     int64_t count, int64_t width, float *out) {
    const int64_t each = kind == SINGLE ? 4 : 2;
    int64_t e = 0;
    switch (queries) { /* at least eight sums, so that additions do not wait for each other */
        case 1: MIX_VECTORS(1, 8) MIX(1) case 2: MIX(2)
        case 3: MIX(3)
        case 4: MIX(4)
    }
    for (; e < width; e++)
        for (int64_t t = 0; t < count; t++) {
            const float value = load_floats(values.data + t * values.stride + e * each, 1, kind)[0];
            for (int64_t q = 0; q < queries; q++) out[q * width + e] += weights[q * stride + t] * value;
        }
}

/* out[q] += the sum of weights[q][t] * values[t], for up to four queries. */
static void mix_tile(const float *weights, int64_t stride, int64_t queries, float_rows values, int64_t count,
                     int64_t width, float *out) {
    switch (values.kind) {
        case HALF: mix_kind(weights, stride, queries, values, HALF, count, width, out); break;
        case BFLOAT: mix_kind(weights, stride, queries, values, BFLOAT, count, width, out); break;
        default: mix_kind(weights, stride, queries, values, SINGLE, count, width, out);
    }
}

/* Whether any of a workplace's queries gives weight to a token. */
static int has_weight(const workplace *place, int64_t queries, int64_t t) {
    for (int64_t q = 0; q < queries; q++)
        if (place->scores[q * place->padded + t] != 0) return 1;
    return 0;
}

static void score_tokens(const workplace *place, int64_t shared) {
    const attention_call *call = place->call;
    const int64_t width = call->key_width, start = place->start;
    const float *query =
        call->query + place->sequence * call->query_stride + place->first_head * shared * width;
    const int direct = shared == 1 && can_score_heads(call->keys, width);
    for (int64_t t = 0, count; t < place->tokens; t += count) {
        count = tile_length(call, place->sequence, start + t);
        if (direct && start + t < call->packed_tokens[place->sequence]) {
            const head_tile tile = find_tile(place, 0, start + t, count);
            score_heads(&tile, query, place->scores + t, place->padded);
            continue;
        }
        const float_rows keys = read_rows(place, 0, start + t, count);
        for (int64_t head = 0; head < place->heads; head++)
            score_tile(of_head(keys, head, width), count, query + head * shared * width, shared, width,
                       place->scores + head * shared * place->padded + t, place->padded);
    }
}

static void weigh_tokens(const workplace *place, int64_t shared) {
    const attention_call *call = place->call;
    for (int64_t q = 0; q < place->heads * shared; q++) {
        float *scores = place->scores + q * place->padded;
        for (int64_t t = 0; t < place->tokens; t++) scores[t] *= (float)call->scale;
        if (call->softcap != 0) cap(scores, place->tokens, (float)call->softcap);
        keep_highest(scores, place->tokens - 1, kept_of(call, place->tokens - 1), place->spare);
        const int64_t head = place->first_head * shared + q;
        const float total =
            softmax(scores, place->tokens, place->padded, call->sinks ? call->sinks[head] : -INFINITY);
        if (call->lse) call->lse[place->sequence * call->heads + head] = total;
    }
}

static void mix_tokens(const workplace *place, int64_t shared) {
    const attention_call *call = place->call;
    const int64_t width = call->value_width, queries = place->heads * shared;
    const int64_t start = place->start;
    float *out = call->out + place->sequence * call->out_stride + place->first_head * shared * width;
    const int direct = shared == 1 && can_mix_heads(call->values, width);
    memset(out, 0, (size_t)(queries * width) * sizeof *out);
    for (int64_t t = 0, count; t < place->tokens; t += count) {
        const int64_t tile = tile_length(call, place->sequence, start + t);
        for (count = 0; count < tile && has_weight(place, queries, t + count);) count++;
        if (count == 0) {
            count = 1;
            continue;
        }
        if (direct && start + t < call->packed_tokens[place->sequence]) {
            const head_tile tile = find_tile(place, 1, start + t, count);
            mix_heads(&tile, place->scores + t, place->padded, out);
            continue;
        }
        const float_rows values = read_rows(place, 1, start + t, count);
        for (int64_t head = 0; head < place->heads; head++) {
            const float_rows own = of_head(values, head, width);
            prefetch_rows(own, count, width);
            for (int64_t q = head * shared; q < (head + 1) * shared; q += 4)
                mix_tile(place->scores + q * place->padded + t, place->padded,
                         least(4, (head + 1) * shared - q), own, count, width, out + q * width);
        }
    }
}

/* Heads that a thread takes at a time: all, which reads memory in order, or as many as the panel is made for;
 * fewer to keep all threads busy; one where heads differ in the tokens that they read. */
static int64_t heads_per_item(const attention_call *call, int threads) {
    for (int64_t s = 0; s < call->sequences; s++) {
        const int64_t past = visible_of(call, s) - 1;
        if (kept_of(call, past) < past) return 1;
    }
    const int direct = call->heads == call->groups && can_score_heads(call->keys, call->key_width) &&
                       can_mix_heads(call->values, call->value_width);
    const int unpacks = !direct && (call->keys->kind == CODES || call->values->kind == CODES);
    int64_t heads = unpacks ? most(1, least(call->groups, PANEL_VALUES / call->key_width)) : call->groups;
    while (heads > 1 && call->sequences * ((call->groups + heads - 1) / heads) < 2 * threads)
        heads = (heads + 1) / 2;
    return heads;
}

EXPORT int attend_sequences(const attention_call *call, int threads) {
    const int64_t heads = heads_per_item(call, threads), items = (call->groups + heads - 1) / heads;
    const int64_t shared = call->heads / call->groups;
    const int64_t panel_floats = TOKEN_TILE * (heads * most(call->key_width, call->value_width) + PADDING);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : failed)
    for (int64_t item = 0; item < call->sequences * items; item++) {
        const int64_t s = item / items, first_head = item % items * heads;
        const int64_t tokens = visible_of(call, s);
        workplace place = {.call = call, .sequence = s, .first_head = first_head, .tokens = tokens};
        place.start = tokens_of(call, s) - tokens;
        place.heads = least(heads, call->groups - first_head);
        place.padded = (tokens + LANES - 1) / LANES * LANES;
        place.panel =
            scratch(OWN_SLOT, sizeof(float) * (size_t)(panel_floats + (heads * shared + 1) * place.padded));
        if (!place.panel) {
            failed = 2;
            continue;
        }
        place.spare = place.panel + panel_floats;
        place.scores = place.spare + place.padded;
        score_tokens(&place, shared);
        weigh_tokens(&place, shared);
        mix_tokens(&place, shared);
    }
    return failed;
}

/* One fresh token per sequence: appended to the exact tokens, attended from, and packed if it has to be.
 *
 * All of a layer in one call, from addresses: the time of a small model's pass is mostly that of its calls.
 */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "pack.h"

/* Mirrored field by field in cpu/attention.py. */
typedef struct {
    attention_call attention; /* without its five columns of sequences, which follow from those below */
    uint8_t *const *packed;   /* [sequences] each, as of `attention_call`, before the fresh token */
    const int64_t *packed_tokens;
    float *const *rows;
    const int64_t *row_counts;
    const int64_t *packs;       /* whether the fresh token, the only exact one, is packed afterwards */
    const float *keys, *values; /* of the fresh tokens, the strides in floats */
    int64_t key_stride, value_stride;
} decode_call;

static void append_rows(const decode_call *call) {
    const int64_t keys = call->attention.groups * call->attention.key_width;
    const int64_t values = call->attention.groups * call->attention.value_width;
    for (int64_t s = 0; s < call->attention.sequences; s++) {
        float *row = call->rows[s] + call->row_counts[s] * (keys + values);
        memcpy(row, call->keys + s * call->key_stride, (size_t)keys * sizeof(float));
        memcpy(row + keys, call->values + s * call->value_stride, (size_t)values * sizeof(float));
    }
}

/* As `attend_sequences`, over the fresh tokens as well. */
static int attend_all(const decode_call *call, int64_t *table, int threads) {
    const int64_t count = call->attention.sequences;
    int64_t *row_counts = table, *strides = table + count;
    for (int64_t s = 0; s < count; s++) {
        row_counts[s] = call->row_counts[s] + 1;
        strides[s] = call->attention.groups * (call->attention.key_width + call->attention.value_width);
    }
    attention_call whole = call->attention;
    whole.packed = (const uint8_t *const *)call->packed;
    whole.packed_tokens = call->packed_tokens;
    whole.rows = (const float *const *)call->rows;
    whole.row_counts = row_counts;
    whole.row_strides = strides;
    return attend_sequences(&whole, threads);
}

/* Blocks of one token. Returns what `pack_matrix` does. */
static int pack_rows(const decode_call *call, int64_t *table, int threads) {
    const attention_call *form = &call->attention;
    const int64_t count = form->sequences, width = form->groups * (form->key_width + form->value_width);
    const float **rows = (const float **)table;
    uint8_t **targets = (uint8_t **)(table + count);
    int64_t *blocks = table + 2 * count, *strides = table + 3 * count, chosen = 0;
    for (int64_t s = 0; s < count; s++) {
        if (!call->packs[s]) continue;
        rows[chosen] = call->rows[s];
        targets[chosen] = call->packed[s] + call->packed_tokens[s] * form->block_bytes;
        blocks[chosen] = 1;
        strides[chosen++] = width;
    }
    if (!chosen) return 0;
    return pack_sequences(form->keys, form->values, 1, form->key_bytes, form->block_bytes, chosen, blocks,
                          rows, strides, targets, threads);
}

/* 0; 1: a value to be packed is not finite or beyond its range; 2: no memory. */
EXPORT int decode_sequences(const decode_call *call, int threads) {
    int64_t *table = malloc(sizeof(int64_t) * 4 * (size_t)call->attention.sequences);
    if (!table) return 2;
    append_rows(call);
    int failed = attend_all(call, table, threads);
    if (!failed) failed = pack_rows(call, table, threads);
    free(table);
    return failed;
}

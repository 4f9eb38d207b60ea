/* Arguments of attention of one query per sequence. */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "formats.h"

/* Mirrored field by field in cpu/attention.py. */
typedef struct {
    const format *keys, *values;
    int64_t block_tokens, block_bytes, key_bytes; /* of one block of tokens: its keys come first */
    int64_t heads, groups, key_width, value_width;
    const float *sinks;    /* [heads] or NULL */
    double scale, softcap; /* softcap 0: none */
    int64_t sequences;
    const uint8_t *const *packed;
    const int64_t *packed_tokens;
    const float *const *rows; /* exact tokens, keys then values, row_strides floats apart */
    const int64_t *row_counts, *row_strides;
    int64_t window;     /* newest visible tokens, the query's own among them; 0: all */
    double fraction;    /* of the visible past tokens, by score, that are attended to */
    const float *query; /* [sequences, heads, key_width], query_stride floats between sequences */
    float *out;         /* [sequences, heads, value_width] */
    float *lse;         /* [sequences, heads]: log-sum-exp of the scores, or NULL */
    int64_t query_stride, out_stride;
} attention_call;

/* 0; 2: no memory. */
EXPORT int attend_sequences(const attention_call *call, int threads);

#endif

/* What the files that multiply hand to each other. */
#ifndef PRODUCT_H
#define PRODUCT_H

#include "formats.h"

typedef struct {
    const packed_matrix *matrix;
    int64_t rows;
    const float *x; /* [tokens, width], x_stride floats apart */
    int64_t x_stride, tokens;
    const float *bias; /* [rows] or NULL */
    float *out;        /* [tokens, rows], out_stride floats apart */
    int64_t out_stride;
} product;

enum { BARE_TOKENS = 12 /* up to here `multiply_bare_codes` is faster, where it knows the format */ };

enum {
    VECTOR_TOKENS = 16 /* up to here bfloat16 gains nothing; mirrored in engine/spec/precision.py */
};

/* Whether `multiply_bare_codes` knows the format. */
int knows_bare_codes(const format *form);

/* The product of few tokens; 0, or 2 if there is no memory. */
int multiply_bare_codes(const product *p, int threads);

/* Whether a product of many tokens can be computed with each number as `parts` bfloat16, 1 or 2. */
EXPORT int takes_bfloats(int parts);

/* Whether it is faster then than in float32. */
EXPORT int gains_by_bfloats(int parts);

/* That product; 0, or 2 if there is no memory. */
int multiply_in_bfloats(const product *p, int parts, int threads);

#endif

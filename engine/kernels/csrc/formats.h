/* A packed matrix as the kernels see it. The layout of its bytes is described in engine/spec/quant.py. */
#ifndef FORMATS_H
#define FORMATS_H

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { MINIMUM, ZERO, MIDDLE }; /* what a group keeps beside its scale */
enum { ALONG_ROW, ALONG_COLUMN };
enum { FIT_RANGE, FIT_ERROR };
enum { CODES, HALF, BFLOAT, SINGLE };

/* Filled in by native.py from a QuantSpec or a FloatSpec and a width; mirrored there field by field. Floats
 * have a width and their kind; a block is then one row of them, and no more. */
typedef struct {
    int64_t bits;       /* 2, 3, 4 or 8; 16 or 32 for floats */
    int64_t group;      /* values of one group, a multiple of 8 */
    int64_t offset;     /* MINIMUM, ZERO or MIDDLE */
    int64_t along;      /* ALONG_ROW or ALONG_COLUMN */
    int64_t fit;        /* FIT_RANGE or FIT_ERROR */
    int64_t width;      /* values of a row */
    int64_t groups;     /* groups of one block */
    int64_t code_bytes; /* bytes of one block's codes; its scales follow, then its minima or zero points */
    int64_t block_rows; /* rows of one block: 1, or `group` along columns */
    int64_t kind;       /* CODES; HALF, BFLOAT, SINGLE: floats at any address, even an odd one */
} format;

typedef struct {
    const format *form;
    const uint8_t *data; /* the first block */
    int64_t stride;      /* bytes from one block to the next */
} packed_matrix;

/* How the codes of a group become values: fma(code - zero, scale, minimum).
 *
 * One formula serves all three offsets exactly: what a format lacks is a zero of 0 or a minimum of -0,
 * the number that changes no other by being added.
 */
typedef struct {
    float scale, zero, minimum;
} affine;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Rows [row, row + rows) and columns [column, column + columns) as floats, `stride` floats apart. */
void unpack_panel(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column, int64_t columns,
                  float *out, int64_t stride);

/* Ask memory for what `unpack_panel` will read a few microseconds later, all within the matrix. */
void prefetch_panel(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column, int64_t columns);

enum { TOKEN_TILE = 8 /* tokens that attention unpacks at once */ };

/* Whether `score_heads` or `mix_heads` know a format, for heads of a width. */
int can_score_heads(const format *form, int64_t width);
int can_mix_heads(const format *form, int64_t width);

/* Rows of a tile: up to TOKEN_TILE tokens, whose columns from `column` on are `heads` of `width` each. */
typedef struct {
    packed_matrix matrix;
    int64_t row, rows, column, heads, width;
} head_tile;

/* scores[head * stride + t] = the query [heads, width] of each head times row t of the tile. */
void score_heads(const head_tile *tile, const float *query, float *scores, int64_t stride);

/* out [heads, width] += the sum over rows of weights[head * stride + t] times row t. */
void mix_heads(const head_tile *tile, const float *weights, int64_t stride, float *out);

/* Pack the rows of one block; 0, or 1 if a value is not finite or beyond fp16.
 *
 * values: `rows` rows, `stride` floats apart; fewer than a block has where the matrix ends. */
int pack_block(const format *form, const float *values, int64_t stride, int64_t rows, uint8_t *block);

/* Scale and offset (fp16) of one group of `count` values; 0, or 1 if they are not finite.
 *
 * scratch: `count` floats. */
int fit_group(const format *form, const float *values, int64_t count, float *scratch, uint16_t *scale,
              uint16_t *offset);

/* A buffer of the calling thread, aligned to 64 bytes, kept for its next call: fresh memory is slow to touch.
 *
 * One buffer per slot; asking again for a slot gives up what it held. NULL if there is no memory. */
enum { SHARED_SLOT, OWN_SLOT, SLOTS };
void *scratch(int slot, size_t bytes);

#endif

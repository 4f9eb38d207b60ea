#ifndef PACK_H
#define PACK_H

#include "formats.h"

/* Full blocks of tokens of several sequences: sequence s has blocks[s] of them, of `tokens` rows each, which
 * hold keys, then values. Returns what `pack_matrix` does. */
EXPORT int pack_sequences(const format *keys, const format *values, int64_t tokens, int64_t key_bytes,
                          int64_t block_bytes, int64_t sequences, const int64_t *blocks,
                          const float *const *rows, const int64_t *strides, uint8_t *const *targets,
                          int threads);

#endif

/* How a processor multiplies bfloat16: by tiles of a matrix unit (AMX), or by vectors of pairs (AVX512-BF16).
 *
 * Both take the same operands: tiles of SIDE rows by DEPTH values as they lie, and tiles of SIDE tokens by
 * DEPTH in which pairs of summed values lie next to each other. The first is about ten times as fast as
 * vectors of float32, the second twice or, on other processors, half. BFLOAT_UNIT says that there is one.
 */
#ifndef BFLOAT_UNIT_H
#define BFLOAT_UNIT_H

#include "simd.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BFLOAT_UNIT

enum {
    SIDE = 16,       /* rows of a tile; also tokens */
    DEPTH = 32,      /* summed values of a tile: 64 bytes */
    TILE = 512,      /* values of a tile of bfloat16 */
    PAIR = 2 * SIDE, /* rows, or tokens, that are multiplied at once */
};

/* The first `count` of DEPTH lanes, or all. */
INLINE __mmask32 first_lanes(int64_t count) { return count >= DEPTH ? ~0u : (1u << count) - 1; }

/* DEPTH floats, or the first `count` of them and zeros. */
INLINE void load_depth(const float *from, int64_t count, __m512 *first, __m512 *second) {
    const __mmask32 wanted = first_lanes(count);
    *first = _mm512_maskz_loadu_ps((__mmask16)wanted, from);
    *second = _mm512_maskz_loadu_ps((__mmask16)(wanted >> 16), from + 16);
}

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

enum {
    REQUEST_PERMISSION = 0x1023,
    TILE_DATA = 18,
};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

INLINE int has_matrix_unit(void) {
    static int granted = -1; /* not asked yet; threads that race get the same answer */
    if (granted < 0) granted = !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
    return granted;
}

/* Permission is the process's, shapes are each thread's own; others that use the unit set theirs. */
INLINE void shape_tiles(void) {
    tile_shapes shapes = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = 64;
        shapes.rows[tile] = SIDE;
    }
    _tile_loadconfig(&shapes);
}

#define ADD_PRODUCTS()           \
    do {                         \
        _tile_dpbf16ps(0, 4, 6); \
        _tile_dpbf16ps(1, 4, 7); \
        _tile_dpbf16ps(2, 5, 6); \
        _tile_dpbf16ps(3, 5, 7); \
    } while (0)

#define LOAD_ROWS(part)                                      \
    do {                                                     \
        _tile_loadd(4, rows + (part) * TILE, 64);            \
        _tile_loadd(5, rows + row_step + (part) * TILE, 64); \
    } while (0)

#define LOAD_TOKENS(part)                                        \
    do {                                                         \
        _tile_loadd(6, tokens + (part) * TILE, 64);              \
        _tile_loadd(7, tokens + token_step + (part) * TILE, 64); \
    } while (0)

/* sums [PAIR rows, PAIR tokens] (+)= rows times tokens, four tiles one after the other. */
INLINE void multiply_tiles(const uint16_t *rows, int64_t row_step, int row_parts, const uint16_t *tokens,
                           int64_t token_step, int token_parts, int64_t depths, int begins, float *sums) {
    if (begins) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + SIDE * SIDE, 64);
        _tile_loadd(2, sums + 2 * SIDE * SIDE, 64);
        _tile_loadd(3, sums + 3 * SIDE * SIDE, 64);
    }
    for (int64_t depth = 0; depth < depths; depth++) {
        LOAD_ROWS(0);
        if (token_parts == 2) {
            LOAD_TOKENS(1);
            ADD_PRODUCTS();
        }
        LOAD_TOKENS(0);
        ADD_PRODUCTS();
        if (row_parts == 2) {
            LOAD_ROWS(1);
            ADD_PRODUCTS();
        }
        rows += row_parts * TILE;
        tokens += token_parts * TILE;
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SIDE * SIDE, 64);
    _tile_stored(2, sums + 2 * SIDE * SIDE, 64);
    _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
}

#else

INLINE int has_matrix_unit(void) { return 0; }
INLINE void shape_tiles(void) {}
INLINE void multiply_tiles(const uint16_t *rows, int64_t row_step, int row_parts, const uint16_t *tokens,
                           int64_t token_step, int token_parts, int64_t depths, int begins, float *sums) {
    (void)rows, (void)row_step, (void)row_parts, (void)tokens, (void)token_step, (void)token_parts;
    (void)depths, (void)begins, (void)sums; /* never called */
}

#endif

INLINE void enter_unit(void) {
    if (has_matrix_unit()) shape_tiles();
}

INLINE void leave_unit(void) {
#ifdef __AMX_TILE__
    if (has_matrix_unit()) _tile_release();
#endif
}

enum { VECTOR_ROWS = 8 /* with two vectors of tokens their sums fill half of the registers */ };

/* Two values of a row, for every lane of tokens. */
INLINE __m512bh pair_of(const uint16_t *values) {
    int32_t pair;
    memcpy(&pair, values, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* As `multiply_tiles`, by vectors, of one part each. */
INLINE void multiply_vectors(const uint16_t *rows, int64_t row_step, const uint16_t *tokens,
                             int64_t token_step, int64_t depths, int begins, float *sums) {
    for (int64_t first = 0; first < PAIR; first += VECTOR_ROWS) {
        const uint16_t *row = rows + first / SIDE * row_step + first % SIDE * DEPTH, *token = tokens;
        float *into = sums + first / SIDE * 2 * SIDE * SIDE + first % SIDE * SIDE;
        __m512 left[VECTOR_ROWS], right[VECTOR_ROWS];
        UNROLL for (int r = 0; r < VECTOR_ROWS; r++) {
            left[r] = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(into + r * SIDE);
            right[r] = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(into + (SIDE + r) * SIDE);
        }
        for (int64_t depth = 0; depth < depths; depth++, row += TILE, token += TILE) UNROLL
            for (int pair = 0; pair < DEPTH; pair += 2) {
                const __m512bh one = (__m512bh)_mm512_loadu_si512(token + pair * SIDE);
                const __m512bh two = (__m512bh)_mm512_loadu_si512(token + token_step + pair * SIDE);
                UNROLL for (int r = 0; r < VECTOR_ROWS; r++) {
                    const __m512bh both = pair_of(row + r * DEPTH + pair);
                    left[r] = _mm512_dpbf16_ps(left[r], both, one);
                    right[r] = _mm512_dpbf16_ps(right[r], both, two);
                }
            }
        UNROLL for (int r = 0; r < VECTOR_ROWS; r++) {
            _mm512_storeu_ps(into + r * SIDE, left[r]);
            _mm512_storeu_ps(into + (SIDE + r) * SIDE, right[r]);
        }
    }
}

#endif
#endif

/* The product of 4-bit weights and activations that are rounded to 8 bits per token and group of weights.
 *
 * A group has 32, 64 or 128 values along a row, codes 0..15 with one scale and 8 for zero; a token's values
 * of the same group become -127..127 with a scale of their own. Products of 32 values are summed in exact
 * integers and scaled as floats, so that a large value costs no more than its own group its accuracy.
 */
#include "formats.h"
#include "integers.h"

enum {
    CHUNK = 32,     /* values that are summed as integers; 16 bytes of a row's codes */
    TILE_ROWS = 16, /* whose sums are one vector */
    STRETCH = 128,  /* tokens that a row's codes serve before they are unpacked again */
    LARGEST_GROUP = 128,
    TOGETHER = 4, /* tokens whose sums stay in registers */
};

/* Tokens by chunks: what is multiplied with one chunk of weights lies together. */
typedef struct {
    int64_t tokens, chunks;
    int8_t *codes;  /* [chunks][tokens][CHUNK], in the order of the codes in a row's bytes */
    float *scales;  /* [chunks][tokens] */
    int32_t *zeros; /* [chunks][tokens]: minus the sum of the codes times the weights' zero */
} rounded;

/* TILE_ROWS rows of weights; those beyond the matrix are its last again. */
typedef struct {
    const uint8_t *rows[TILE_ROWS];
    int64_t next;  /* bytes from a row to the same one of the next tile */
    float *scales; /* [groups][TILE_ROWS] */
} weight_tile;

/* An address further on, which may be beyond all rows. */
INLINE void ask_for(const uint8_t *from, int64_t further) {
    __builtin_prefetch((const void *)((uintptr_t)from + (uintptr_t)further));
}

#ifdef INTEGER_VECTORS_512

typedef struct {
    __m512i codes[CHUNK / 4]; /* of 16 rows, four values of each */
} chunk_of_weights;

/* Four rows' bytes in each vector of which rows r, r + 4, r + 8 and r + 12 are the quarters. */
INLINE __m512i quarters(const weight_tile *tile, int r, int64_t at) {
    const __m128i one = _mm_loadu_si128((const __m128i *)(tile->rows[r] + at));
    __m512i all = _mm512_castsi128_si512(one);
    UNROLL for (int q = 1; q < 4; q++) {
        const __m128i next = _mm_loadu_si128((const __m128i *)(tile->rows[r + 4 * q] + at));
        all = _mm512_mask_broadcast_i32x4(all, (__mmask16)(0xf << 4 * q), next);
    }
    return all;
}

INLINE chunk_of_weights unpack_chunk(const weight_tile *tile, int64_t chunk) {
    const int64_t at = chunk * (CHUNK / 2);
    if (at % 64 == 0) UNROLL
        for (int r = 0; r < TILE_ROWS; r++) ask_for(tile->rows[r] + at, tile->next);
    const __m512i a = quarters(tile, 0, at), b = quarters(tile, 1, at);
    const __m512i c = quarters(tile, 2, at), d = quarters(tile, 3, at);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
    const __m512i bytes[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                              _mm512_unpacklo_epi64(ab_high, cd_high),
                              _mm512_unpackhi_epi64(ab_high, cd_high)};
    const __m512i mask = _mm512_set1_epi8(15);
    chunk_of_weights weights;
    UNROLL for (int i = 0; i < 4; i++) {
        weights.codes[i] = _mm512_and_si512(bytes[i], mask);
        weights.codes[4 + i] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), mask);
    }
    return weights;
}

INLINE __m512i four_of_each(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

INLINE void multiply_tokens(const chunk_of_weights *weights, __m512 scale, const int8_t *codes,
                            const float *token_scales, const int32_t *zeros, float *sums, int count) {
    __m512i whole[TOGETHER];
    UNROLL for (int t = 0; t < count; t++)
        whole[t] = _mm512_set1_epi32(zeros[t]);
    UNROLL for (int i = 0; i < CHUNK / 4; i++) UNROLL
        for (int t = 0; t < count; t++)
            whole[t] =
                _mm512_dpbusd_epi32(whole[t], weights->codes[i], four_of_each(codes + t * CHUNK + 4 * i));
    UNROLL for (int t = 0; t < count; t++) {
        const __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(token_scales[t]));
        float *sum = sums + t * TILE_ROWS;
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[t]), by, _mm512_loadu_ps(sum)));
    }
}

/* sums[token][TILE_ROWS] (+)= a chunk of the tile times a chunk of every token. */
INLINE void multiply_chunk(const weight_tile *tile, int64_t chunk, const float *scales, const rounded *x,
                           float *sums) {
    const chunk_of_weights weights = unpack_chunk(tile, chunk);
    const __m512 scale = _mm512_loadu_ps(scales);
    const int64_t place = chunk * x->tokens;
    int64_t t = 0;
    for (; t + TOGETHER <= x->tokens; t += TOGETHER)
        multiply_tokens(&weights, scale, x->codes + (place + t) * CHUNK, x->scales + place + t,
                        x->zeros + place + t, sums + t * TILE_ROWS, TOGETHER);
    for (; t < x->tokens; t++)
        multiply_tokens(&weights, scale, x->codes + (place + t) * CHUNK, x->scales + place + t,
                        x->zeros + place + t, sums + t * TILE_ROWS, 1);
}

#else

INLINE void multiply_chunk(const weight_tile *tile, int64_t chunk, const float *scales, const rounded *x,
                           float *sums) {
    const int8_t *codes = x->codes + chunk * x->tokens * CHUNK;
    const float *token_scales = x->scales + chunk * x->tokens;
    const int32_t *zeros = x->zeros + chunk * x->tokens;
    uint8_t weights[TILE_ROWS][CHUNK];
    for (int r = 0; r < TILE_ROWS; r++) {
        const uint8_t *bytes = tile->rows[r] + chunk * (CHUNK / 2);
        for (int i = 0; i < CHUNK / 2; i++) {
            weights[r][i] = bytes[i] & 15;
            weights[r][CHUNK / 2 + i] = bytes[i] >> 4;
        }
    }
    for (int64_t t = 0; t < x->tokens; t++, codes += CHUNK)
        for (int r = 0; r < TILE_ROWS; r++) {
            lanes acc = nothing();
            UNROLL for (int k = 0; k < CHUNK; k += STEP)
                acc = add_products(acc, weights[r] + k, codes + k);
            const float by = scales[r] * token_scales[t];
            sums[t * TILE_ROWS + r] += (float)(total(acc) + zeros[t]) * by;
        }
}

#endif

/* Without the sign, floats are ordered as their bits are, NaN above all. */
INLINE int32_t largest_magnitude(const float *values, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

/* Values [from, from + count) of a token's group: its codes in the order of a row's bytes, scale, zero. */
INLINE void round_group(const float *x, int64_t count, int64_t group, rounded *into, int64_t chunk,
                        int64_t token) {
    float values[LARGEST_GROUP] = {0}, largest;
    int8_t codes[LARGEST_GROUP] = {0};
    memcpy(values, x, sizeof *x * (size_t)count);
    const int32_t bits = largest_magnitude(values, group);
    memcpy(&largest, &bits, sizeof largest);
    const int finite = largest < INFINITY; /* else all products of the token become NaN */
    const float scale = finite ? largest / 127 : NAN, divisor = scale > 0 ? scale : 1;
    for (int64_t i = 0; finite && i < group; i++) codes[i] = (int8_t)(int32_t)rintf(values[i] / divisor);
    for (int64_t c = 0; c < group / CHUNK; c++, chunk++) {
        const int64_t place = chunk * into->tokens + token, half = CHUNK / 2;
        int8_t *target = into->codes + place * CHUNK;
        memcpy(target, codes + c * half, (size_t)half);
        memcpy(target + half, codes + group / 2 + c * half, (size_t)half);
        int32_t total = 0;
        for (int i = 0; i < CHUNK; i++) total += target[i];
        into->scales[place] = scale;
        into->zeros[place] = -8 * total;
    }
}

static void round_token(const format *form, const float *x, rounded *into, int64_t token) {
    const int64_t size = form->group;
    for (int64_t from = 0; from < form->width; from += size) {
        const int64_t count = least(size, form->width - from), chunk = from / CHUNK;
        if (count == 32 && size == 32) round_group(x + from, 32, 32, into, chunk, token);
        else round_group(x + from, count, size, into, chunk, token);
    }
}

INLINE weight_tile tile_of(const packed_matrix *matrix, int64_t row, int64_t rows, float *scales) {
    const format *form = matrix->form;
    weight_tile tile = {.next = TILE_ROWS * matrix->stride, .scales = scales};
    for (int64_t r = 0; r < TILE_ROWS; r++)
        tile.rows[r] = matrix->data + least(row + r, rows - 1) * matrix->stride;
    for (int64_t g = 0; g < form->groups; g += LANES) {
        const int64_t count = least(LANES, form->groups - g);
        vec some[TILE_ROWS];
        for (int64_t r = 0; r < TILE_ROWS; r++) {
            const uint8_t *halves = tile.rows[r] + form->code_bytes + 2 * g;
            some[r] = load_halves(halves, count);
            ask_for(halves, tile.next);
        }
#if LANES == 16
        transpose((__m512i *)some);
        for (int64_t i = 0; i < count; i++) store(scales + (g + i) * TILE_ROWS, some[i]);
#else
        for (int64_t i = 0; i < count; i++)
            for (int64_t r = 0; r < TILE_ROWS; r++) scales[(g + i) * TILE_ROWS + r] = some[r][i];
#endif
    }
    return tile;
}

/* The arguments of one product. */
typedef struct {
    packed_matrix matrix;
    int64_t rows;
    const float *bias;
    float *out;
    int64_t out_stride;
} int4_product;

static void multiply_tile(const int4_product *p, int64_t row, const rounded *x, float *own) {
    const format *form = p->matrix.form;
    float *sums = own + form->groups * TILE_ROWS;
    const weight_tile tile = tile_of(&p->matrix, row, p->rows, own);
    memset(sums, 0, sizeof *sums * (size_t)(x->tokens * TILE_ROWS));
    for (int64_t chunk = 0; chunk < x->chunks; chunk++)
        multiply_chunk(&tile, chunk, tile.scales + chunk * CHUNK / form->group * TILE_ROWS, x, sums);
    const int64_t count = least(TILE_ROWS, p->rows - row);
    float bias[TILE_ROWS] = {0};
    if (p->bias) memcpy(bias, p->bias + row, sizeof *bias * (size_t)count);
    for (int64_t t = 0; t < x->tokens; t++) {
        float *out = p->out + t * p->out_stride + row;
        for (int r = 0; r < TILE_ROWS; r++) sums[t * TILE_ROWS + r] += bias[r];
        memcpy(out, sums + t * TILE_ROWS, sizeof *out * (size_t)count);
    }
}

/* out [tokens, rows] = (x rounded) @ matrix^T + bias, for `4-g32-symmetric` and groups of 64 and 128. 0; 2:
 * no memory. */
EXPORT int multiply_int4(const format *form, const uint8_t *data, int64_t stride, int64_t rows,
                         const float *x, int64_t x_stride, int64_t count, const float *bias, float *out,
                         int64_t out_stride, int threads) {
    const int64_t chunks = form->groups * (form->group / CHUNK), most_tokens = most(1, least(STRETCH, count));
    const size_t each = CHUNK + sizeof(float) + sizeof(int32_t), places = (size_t)(chunks * most_tokens);
    int8_t *codes = scratch(SHARED_SLOT, places * each);
    if (!codes) return 2;
    rounded tokens = {.chunks = chunks, .codes = codes, .scales = (float *)(codes + places * CHUNK)};
    tokens.zeros = (int32_t *)(tokens.scales + places);
    const size_t own_floats = (size_t)(TILE_ROWS * (form->groups + most_tokens));
    int failed = 0;
#pragma omp parallel num_threads(threads) firstprivate(tokens) reduction(max : failed)
    {
        float *own = scratch(OWN_SLOT, sizeof(float) * own_floats);
        if (!own) failed = 2;
        for (int64_t first = 0; first < count; first += STRETCH) {
            int4_product p = {{form, data, stride}, rows, bias, out + first * out_stride, out_stride};
            tokens.tokens = least(STRETCH, count - first);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens.tokens; t++)
                round_token(form, x + (first + t) * x_stride, &tokens, t);
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row += TILE_ROWS)
                if (own) multiply_tile(&p, row, &tokens, own);
        }
    }
    return failed;
}

/* Causal attention of prompts to themselves, a block of keys at a time: tokens x tokens is never written out.
 *
 * A task is a stretch of the queries of one head. For each block of keys it keeps what the sums have to be
 * corrected by once a higher score turns up (the online softmax of FlashAttention, Dao et al. 2022). Products
 * are those of matmul.c in float32, or of bfloats.c, where numbers are rounded to bfloat16 and added up in
 * float32; softmax is float32 in both.
 */
#include "bfloat_unit.h"
#include "formats.h"
#include "tiles.h"

enum {
    ROWS = 32,     /* queries that are multiplied at once */
    KEYS = 128,    /* of a block */
    STRETCH = 256, /* queries that a block serves once it is arranged; with it all fits the second cache */
    PAD = 32,      /* widths are filled up to multiples of it */
    OUTER_ROWS = 4,
};

#define LOWEST (-3e38f) /* finite: its distance to itself is a number */

/* Mirrored field by field in cpu/prompts.py. Strides in floats; widths are consecutive. */
typedef struct {
    int64_t heads, groups, key_width, value_width, window; /* window 0: none */
    double scale;                                          /* positive */
    int64_t prompts;
    const int64_t *starts, *lengths; /* of the prompts, in tokens */
    const float *query, *keys, *values;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    float *out;    /* [tokens, heads, value_width] */
    float *lse;    /* [tokens, heads]: log-sum-exp of the scores, or NULL */
    int64_t in_bfloats;
} prompt_call;

/* What one thread works on, and its buffers. Operands are floats or bfloat16, `sums` lie as `place_of` says.
 * The padding of a tile of rows, columns or keys may hold anything: nothing that is read depends on it. */
typedef struct {
    const prompt_call *call;
    int64_t head, group;
    int64_t start, first, end; /* tokens before the prompt; queries [first, end) within it */
    int64_t key_pad, value_pad;
    void *query, *keys, *values, *weights;
    float *scores;           /* [ROWS, KEYS] */
    float *sums;             /* [STRETCH / ROWS] times [ROWS, value_pad] */
    float *highest, *total;  /* [STRETCH]: the highest score so far, the sum of exp(score - highest) */
} workplace;

/* Where vector v of row r of ROWS lies: in rows of `pitch` floats, or in blocks of four tiles. */
INLINE int64_t place_of(int in_blocks, int64_t pitch, int64_t r, int64_t v) {
#ifdef BFLOAT_UNIT
    if (in_blocks) return v / 2 * PAIR * PAIR + (r / SIDE * 2 + v % 2) * SIDE * SIDE + r % SIDE * SIDE;
#endif
    (void)in_blocks;
    return r * pitch + v * LANES;
}

/* One key, or query, or value of the task. */
INLINE const float *query_at(const workplace *w, int64_t token) {
    return w->call->query + (w->start + token) * w->call->query_token + w->head * w->call->query_head;
}

INLINE const float *key_at(const workplace *w, int64_t token) {
    return w->call->keys + (w->start + token) * w->call->key_token + w->group * w->call->key_head;
}

INLINE const float *value_at(const workplace *w, int64_t token) {
    return w->call->values + (w->start + token) * w->call->value_token + w->group * w->call->value_head;
}

/* Queries and values as they lie, keys as vectors of LANES tokens: [vector][width][lane]. */
static void arrange_query(const workplace *w) {
    const int64_t width = w->call->key_width;
    float *into = w->query;
    for (int64_t q = w->first; q < w->end; q++, into += w->key_pad)
        memcpy(into, query_at(w, q), (size_t)width * sizeof *into);
}

/* Keys from `key` on as vectors of LANES tokens, of which `count` exist: into [width][lane]. */
static void arrange_lanes(const workplace *w, int64_t key, int64_t count, float *into) {
    const int64_t width = w->call->key_width;
    int64_t k = 0;
#if LANES == 16
    for (; k + LANES <= width; k += LANES) {
        __m512i lines[LANES];
        for (int64_t t = 0; t < LANES; t++)
            lines[t] = t < count ? _mm512_loadu_si512(key_at(w, key + t) + k) : _mm512_setzero_si512();
        transpose(lines);
        for (int i = 0; i < LANES; i++) _mm512_storeu_si512(into + (k + i) * LANES, lines[i]);
    }
#endif
    for (int64_t t = 0; t < LANES; t++)
        for (int64_t i = k; i < width; i++) into[i * LANES + t] = t < count ? key_at(w, key + t)[i] : 0;
}

static void arrange_block(const workplace *w, int64_t key, int64_t count) {
    for (int64_t t = 0; t < count; t += LANES)
        arrange_lanes(w, key + t, count - t, (float *)w->keys + t * w->key_pad);
    for (int64_t t = 0; t < count; t++)
        memcpy((float *)w->values + t * w->value_pad, value_at(w, key + t),
               (size_t)w->call->value_width * sizeof(float));
}

/* sums [OUTER_ROWS, vectors] += rows times columns, over `count` values. */
static void add_outer(const float *rows, int64_t row_stride, const float *columns, int64_t step,
                      int64_t vector_stride, int64_t vectors, int64_t count, int begins, float *sums,
                      int64_t sum_stride) {
    int64_t v = 0;
#if LANES == 16
    for (; v + 4 <= vectors; v += 4)
        outer_tile(rows, row_stride, OUTER_ROWS, (const uint8_t *)(columns + v * vector_stride), SINGLE, step,
                   vector_stride, 4, count, begins, sums + v * LANES, sum_stride);
#endif
    for (; v < vectors; v += 2)
        outer_tile(rows, row_stride, OUTER_ROWS, (const uint8_t *)(columns + v * vector_stride), SINGLE, step,
                   vector_stride, 2, count, begins, sums + v * LANES, sum_stride);
}

static void score(const workplace *w, int64_t tile, int64_t count) {
    const int64_t vectors = (count + 2 * LANES - 1) / (2 * LANES) * 2;
    const float *query = (const float *)w->query + tile * ROWS * w->key_pad;
    for (int64_t r = 0; r < ROWS; r += OUTER_ROWS)
        add_outer(query + r * w->key_pad, w->key_pad, w->keys, LANES, w->key_pad * LANES, vectors,
                  w->call->key_width, 1, w->scores + r * KEYS, KEYS);
}

static void mix(const workplace *w, int64_t tile, int64_t count) {
    float *sums = w->sums + tile * ROWS * w->value_pad;
    for (int64_t r = 0; r < ROWS; r += OUTER_ROWS)
        add_outer(w->scores + r * KEYS, KEYS, w->values, w->value_pad, LANES, w->value_pad / LANES, count, 0,
                  sums + r * w->value_pad, w->value_pad);
}

#ifdef BFLOAT_UNIT

/* DEPTH floats, or the first `count` of them and zeros, as bfloat16. */
INLINE __m512i nearest(const float *from, int64_t count) {
    __m512 first, second;
    load_depth(from, count, &first, &second);
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

INLINE void multiply_block(const uint16_t *rows, int64_t row_step, const uint16_t *tokens, int64_t token_step,
                           int64_t depths, int begins, float *sums) {
    if (has_matrix_unit()) multiply_tiles(rows, row_step, 1, tokens, token_step, 1, depths, begins, sums);
    else multiply_vectors(rows, row_step, tokens, token_step, depths, begins, sums);
}

/* Tiles of SIDE queries by DEPTH: [queries / SIDE][depth]. */
static void arrange_query_tiles(const workplace *w) {
    const int64_t depths = w->key_pad / DEPTH;
    uint16_t *into = w->query;
    for (int64_t q = w->first; q < w->end; q++)
        for (int64_t depth = 0, k = 0; depth < depths; depth++, k += DEPTH) {
            const int64_t row = q - w->first;
            _mm512_storeu_si512(into + (row / SIDE * depths + depth) * TILE + row % SIDE * DEPTH,
                                nearest(query_at(w, q) + k, w->call->key_width - k));
        }
}

/* Tiles of SIDE keys by DEPTH, and of SIDE columns of values by DEPTH tokens, with pairs next to each other;
 * zeros beyond the tokens. */
static void arrange_block_tiles(const workplace *w, int64_t key, int64_t count) {
    const int64_t depths = w->key_pad / DEPTH;
    for (int64_t side = 0; side < (count + PAIR - 1) / PAIR * 2; side++)
        for (int64_t depth = 0, k = 0; depth < depths; depth++, k += DEPTH) {
            __m512i lines[SIDE];
            for (int64_t i = 0; i < SIDE; i++) {
                const int64_t t = side * SIDE + i;
                lines[i] = t < count ? nearest(key_at(w, key + t) + k, w->call->key_width - k)
                                     : _mm512_setzero_si512();
            }
            transpose(lines);
            uint16_t *tile = (uint16_t *)w->keys + (side * depths + depth) * TILE;
            for (int i = 0; i < SIDE; i++) _mm512_storeu_si512(tile + i * DEPTH, lines[i]);
        }
    for (int64_t t = 0; t < (count + DEPTH - 1) / DEPTH * DEPTH; t += 2)
        for (int64_t e = 0; e < w->value_pad; e += SIDE) {
            __m512 pair[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            const __mmask16 wanted = (__mmask16)first_lanes(most(0, w->call->value_width - e));
            for (int one = 0; one < 2; one++)
                if (t + one < count)
                    pair[one] = _mm512_maskz_loadu_ps(wanted, value_at(w, key + t + one) + e);
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(pair[1], pair[0]);
            const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
            const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
            uint16_t *tile = (uint16_t *)w->values + (e / SIDE * (KEYS / DEPTH) + t / DEPTH) * TILE;
            _mm512_storeu_si512(tile + t % DEPTH * SIDE, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

static void score_tiles(const workplace *w, int64_t tile, int64_t count) {
    const int64_t step = w->key_pad / DEPTH * TILE;
    for (int64_t t = 0; t < count; t += PAIR)
        multiply_block((const uint16_t *)w->query + tile * 2 * step, step,
                       (const uint16_t *)w->keys + t / SIDE * step, step, w->key_pad / DEPTH, 1,
                       w->scores + t / PAIR * PAIR * PAIR);
}

static void mix_tiles(const workplace *w, int64_t tile, int64_t count) {
    const int64_t step = KEYS / DEPTH * TILE, depths = (count + DEPTH - 1) / DEPTH;
    for (int64_t e = 0; e < w->value_pad; e += PAIR)
        multiply_block(w->weights, step, (const uint16_t *)w->values + e / SIDE * step, step, depths, 0,
                       w->sums + tile * ROWS * w->value_pad + e * PAIR);
}

INLINE void store_weights(const workplace *w, int64_t r, int64_t v, vec first, vec second) {
    uint16_t *tile = (uint16_t *)w->weights + (r / SIDE * (KEYS / DEPTH) + v / 2) * TILE;
    _mm512_storeu_si512(tile + r % SIDE * DEPTH, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

#else

enum { PAIR = ROWS };
INLINE void arrange_query_tiles(const workplace *w) { (void)w; } /* never called */
INLINE void arrange_block_tiles(const workplace *w, int64_t key, int64_t count) {
    (void)w, (void)key, (void)count;
}
INLINE void score_tiles(const workplace *w, int64_t tile, int64_t count) { (void)w, (void)tile, (void)count; }
INLINE void mix_tiles(const workplace *w, int64_t tile, int64_t count) { (void)w, (void)tile, (void)count; }
INLINE void store_weights(const workplace *w, int64_t r, int64_t v, vec first, vec second) {
    (void)w, (void)r, (void)v, (void)first, (void)second;
}

#endif

/* Lanes in which `numbers` >= begin and < end; elsewhere minus infinity. */
INLINE vec visible(vec scores, ivec numbers, int64_t begin, int64_t end) {
    const ivec seen = (numbers >= (int32_t)begin) & (numbers < (int32_t)end);
    return (vec)(((ivec)scores & seen) | ((ivec)splat(-INFINITY) & ~seen));
}

/* The highest score so far of one of a tile's queries, once it has seen `vectors` more; lanes that it must
 * not see become minus infinity. */
INLINE float see_scores(const workplace *w, int in_blocks, int64_t r, int64_t row, int64_t key,
                        int64_t vectors) {
    const prompt_call *call = w->call;
    const int64_t query = w->first + row, end = query + 1 - key;
    const int64_t begin = call->window ? query + 1 - call->window - key : 0;
    const vec scale = splat((float)call->scale);
    vec best = splat(w->highest[row]);
    if (begin > 0 || end < vectors * LANES)
        for (int64_t v = 0; v < vectors; v++) {
            float *place = w->scores + place_of(in_blocks, KEYS, r, v);
            store(place, visible(load(place), lane_numbers() + (int32_t)(v * LANES), begin, end));
        }
    for (int64_t v = 0; v < vectors; v++)
        best = highest_of(best, load(w->scores + place_of(in_blocks, KEYS, r, v)) * scale);
    return highest_lane(best);
}

/* Scores of a tile's queries against `count` keys from `key` on become weights; sums so far are corrected. */
INLINE void weigh(const workplace *w, int in_blocks, int64_t tile, int64_t key, int64_t count) {
    const int64_t step = in_blocks ? PAIR : 2 * LANES, vectors = (count + step - 1) / step * (step / LANES);
    const int64_t rows = least(ROWS, w->end - w->first - tile * ROWS);
    const vec scale = splat((float)w->call->scale);
    float shrink[ROWS] = {0}; /* the distance of the highest score to what it was, and exp of it */
    for (int64_t r = 0; r < rows; r++) {
        const float highest = see_scores(w, in_blocks, r, tile * ROWS + r, key, vectors);
        shrink[r] = w->highest[tile * ROWS + r] - highest;
        w->highest[tile * ROWS + r] = highest;
    }
    for (int64_t r = 0; r < rows; r += LANES) store(shrink + r, exp_vec(load(shrink + r)));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t row = tile * ROWS + r;
        const vec highest = splat(w->highest[row]);
        vec total = {0};
        for (int64_t v = 0; v < vectors; v += 2) {
            vec weight[2];
            UNROLL for (int one = 0; one < 2; one++) {
                float *place = w->scores + place_of(in_blocks, KEYS, r, v + one);
                weight[one] = exp_vec(load(place) * scale - highest);
                total += weight[one];
                if (!in_blocks) store(place, weight[one]);
            }
            if (in_blocks) store_weights(w, r, v, weight[0], weight[1]);
        }
        w->total[row] = w->total[row] * shrink[r] + sum(total);
        if (shrink[r] == 1) continue;
        float *sums = w->sums + tile * ROWS * w->value_pad;
        for (int64_t v = 0; v < w->value_pad / LANES; v++) {
            float *place = sums + place_of(in_blocks, w->value_pad, r, v);
            store(place, load(place) * shrink[r]);
        }
    }
}

/* Ask for where the outputs of a tile's queries will be written. */
static void expect_rows(const workplace *w, int64_t first, int64_t last) {
    const int64_t width = w->call->value_width;
    for (int64_t query = first; query <= last; query++)
        for (int64_t e = 0; e < width; e += 64 / (int64_t)sizeof(float))
            __builtin_prefetch(w->call->out + ((w->start + query) * w->call->heads + w->head) * width + e, 1);
}

static void write_rows(const workplace *w, int in_blocks) {
    const int64_t width = w->call->value_width;
    for (int64_t row = 0; row < w->end - w->first; row++) {
        const int64_t place = (w->start + w->first + row) * w->call->heads + w->head;
        const float *sums = w->sums + row / ROWS * ROWS * w->value_pad, inverse = 1 / w->total[row];
        float *out = w->call->out + place * width;
        for (int64_t v = 0; v * LANES < width; v++) {
            const vec mean = load(sums + place_of(in_blocks, w->value_pad, row % ROWS, v)) * inverse;
            if ((v + 1) * LANES <= width) store(out + v * LANES, mean);
            else memcpy(out + v * LANES, &mean, (size_t)(width - v * LANES) * sizeof(float));
        }
        if (w->call->lse) w->call->lse[place] = w->highest[row] + logf(w->total[row]);
    }
}

INLINE void attend_stretch(const workplace *w, int in_blocks) {
    const int64_t rows = w->end - w->first, window = w->call->window;
    for (int64_t row = 0; row < rows; row++) w->highest[row] = LOWEST, w->total[row] = 0;
    memset(w->sums, 0, sizeof(float) * (size_t)((rows + ROWS - 1) / ROWS * ROWS * w->value_pad));
    if (in_blocks) arrange_query_tiles(w);
    else arrange_query(w);
    for (int64_t key = window ? most(0, w->first + 1 - window) : 0; key < w->end; key += KEYS) {
        const int64_t keys = least(KEYS, w->end - key);
        if (in_blocks) arrange_block_tiles(w, key, keys);
        else arrange_block(w, key, keys);
        for (int64_t tile = 0; tile * ROWS < rows; tile++) {
            const int64_t first = w->first + tile * ROWS, last = least(first + ROWS, w->end) - 1;
            const int64_t count = least(keys, last + 1 - key);
            if (key + keys == w->end) expect_rows(w, first, last);
            if (count <= 0 || (window && key + keys <= first + 1 - window)) continue;
            if (in_blocks) score_tiles(w, tile, count);
            else score(w, tile, count);
            weigh(w, in_blocks, tile, key, count);
            if (in_blocks) mix_tiles(w, tile, count);
            else mix(w, tile, count);
        }
    }
    write_rows(w, in_blocks);
}

static void attend_floats(const workplace *w) { attend_stretch(w, 0); }
static void attend_bfloats(const workplace *w) { attend_stretch(w, 1); }

static float *take(float **from, int64_t floats) {
    float *taken = *from;
    *from += floats;
    return taken;
}

/* Whether this is faster than torch's attention: not without fused multiply-adds. */
EXPORT int gains_by_prompts(void) { return LANES >= 8; }

/* 0; 2: no memory. */
EXPORT int attend_prompts(const prompt_call *call, int threads) {
    int64_t longest = 0;
    for (int64_t p = 0; p < call->prompts; p++) longest = most(longest, call->lengths[p]);
    const int64_t stretches = (longest + STRETCH - 1) / STRETCH, each = stretches * call->heads;
    const int64_t key_pad = (call->key_width + PAD - 1) / PAD * PAD;
    const int64_t value_pad = (call->value_width + PAD - 1) / PAD * PAD;
    const int64_t floats = (STRETCH + KEYS) * (key_pad + value_pad) + 2 * ROWS * KEYS + 2 * STRETCH;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(max : failed)
    {
        float *buffer = scratch(OWN_SLOT, sizeof(float) * (size_t)floats), *next = buffer;
        workplace w = {.call = call, .key_pad = key_pad, .value_pad = value_pad};
        if (buffer) {
            w.query = take(&next, STRETCH * key_pad), w.keys = take(&next, KEYS * key_pad);
            w.values = take(&next, KEYS * value_pad), w.sums = take(&next, STRETCH * value_pad);
            w.scores = take(&next, ROWS * KEYS), w.weights = take(&next, ROWS * KEYS);
            w.highest = take(&next, STRETCH), w.total = take(&next, STRETCH);
#ifdef BFLOAT_UNIT
            if (call->in_bfloats) enter_unit();
#endif
        } else failed = 2;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < call->prompts * each; task++) {
            const int64_t prompt = task / each, stretch = stretches - 1 - task % each / call->heads;
            w.head = task % call->heads, w.group = w.head / (call->heads / call->groups);
            w.start = call->starts[prompt];
            w.first = stretch * STRETCH, w.end = least(w.first + STRETCH, call->lengths[prompt]);
            if (!buffer || w.first >= w.end) continue;
            if (call->in_bfloats) attend_bfloats(&w);
            else attend_floats(&w);
        }
#ifdef BFLOAT_UNIT
        if (buffer && call->in_bfloats) leave_unit();
#endif
    }
    return failed;
}

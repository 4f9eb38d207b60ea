/* From floats to codes: whole matrices, and the blocks of several sequences' KV caches. */
#include "codes.h"
#include "pack.h"

enum { COLUMN_TILE = 16 /* columns whose groups are gathered at once: a cache line of a row */ };

/* Where one thread works: values and their codes, a group of each; floats of the search; packed groups. */
typedef struct {
    float *values, *search;
    uint8_t *codes, *packed;
} workplace;

static int find_workplace(const format *form, workplace *place) {
    const size_t group = (size_t)form->group;
    char *memory = scratch(OWN_SLOT, group * (COLUMN_TILE * 5 + 5));
    if (!memory) return 1;
    place->values = (float *)memory;
    place->search = place->values + group * COLUMN_TILE;
    place->codes = (uint8_t *)(place->search + group);
    place->packed = place->codes + group;
    return 0;
}

/* The nearest codes. Divides as the reference does: a product with the inverse would round differently. */
static void encode(const format *form, const float *values, uint16_t scale, uint16_t offset, uint8_t *codes) {
    const float step = half_to_float(scale), number = half_to_float(offset);
    const float middle = form->offset == MIDDLE ? (float)(1 << (form->bits - 1)) : 0;
    const vec divisor = splat(step != 0 ? step : 1), minimum = splat(form->offset == MINIMUM ? number : 0);
    const vec zero = splat(form->offset == ZERO ? number : middle);
    const float levels = (float)((1 << form->bits) - 1);
    int64_t i = 0;
    for (; i + LANES <= form->group; i += LANES)
        store_codes(codes + i, (load(values + i) - minimum) / divisor + zero, levels);
    if (i < form->group) { /* groups are multiples of 8 */
        float rest[LANES] = {0};
        uint8_t rest_codes[LANES];
        memcpy(rest, values + i, (size_t)(form->group - i) * sizeof *rest);
        store_codes(rest_codes, (load(rest) - minimum) / divisor + zero, levels);
        memcpy(codes + i, rest_codes, (size_t)(form->group - i));
    }
}

static void write_half(uint8_t *to, uint16_t half) { memcpy(to, &half, sizeof half); }

/* One group into its planes and its numbers, `group` of the block that they belong to.
 *
 * present: of its values those that are no filling; the others decide nothing. */
static int pack_group(const format *form, const float *values, int64_t present, const workplace *place,
                      uint8_t *block, int64_t group, uint8_t *planes) {
    uint16_t scale, offset;
    if (fit_group(form, values, present, place->search, &scale, &offset)) return 1;
    uint8_t *numbers = block + form->code_bytes + 2 * group;
    write_half(numbers, scale);
    if (form->offset != MIDDLE) write_half(numbers + 2 * form->groups, offset);
    encode(form, values, scale, offset, place->codes);
    switch (form->bits) {
        case 2: put_group(place->codes, 2, form->group, planes); break;
        case 3: put_group(place->codes, 3, form->group, planes); break;
        case 4: put_group(place->codes, 4, form->group, planes); break;
        case 8: put_group(place->codes, 8, form->group, planes); break;
    }
    return 0;
}

static int pack_row(const format *form, const float *values, const workplace *place, uint8_t *block) {
    const int64_t bytes = form->group * form->bits / 8;
    for (int64_t group = 0; group < form->groups; group++) {
        const float *members = values + group * form->group;
        const int64_t present = least(form->group, form->width - group * form->group);
        if (present < form->group) { /* what the last group lacks repeats its last value */
            memcpy(place->values, members, (size_t)present * sizeof(float));
            for (int64_t i = present; i < form->group; i++) place->values[i] = members[present - 1];
            members = place->values;
        }
        if (pack_group(form, members, present, place, block, group, block + group * bytes)) return 1;
    }
    return 0;
}

/* Along columns a block is, byte by byte, the transpose of its packed groups. */
static int pack_columns(const format *form, const float *values, int64_t stride, int64_t rows,
                        const workplace *place, uint8_t *block) {
    const int64_t size = form->group, bytes = size * form->bits / 8;
    for (int64_t column = 0; column < form->width; column += COLUMN_TILE) {
        const int64_t count = least(COLUMN_TILE, form->width - column);
        for (int64_t r = 0; r < size; r++) {
            const float *row = values + least(r, rows - 1) * stride + column;
            for (int64_t c = 0; c < count; c++) place->values[c * size + r] = row[c];
        }
        for (int64_t c = 0; c < count; c++)
            if (pack_group(form, place->values + c * size, least(size, rows), place, block, column + c,
                           place->packed + c * bytes))
                return 1;
        for (int64_t j = 0; j < bytes; j++)
            for (int64_t c = 0; c < count; c++)
                block[j * form->width + column + c] = place->packed[c * bytes + j];
    }
    return 0;
}

/* Up to LANES floats as 16-bit ones; returns the lanes that are not finite then. */
INLINE ivec round_floats(const format *form, const float *values, int64_t count, uint8_t *to) {
    const vec limit =
        splat(form->kind == HALF ? 65520.0f : 0x1.ffp127f); /* from here on they become infinite */
    vec floats = {0};
    memcpy(&floats, values, (size_t)count * sizeof(float));
    uint8_t rounded[2 * LANES];
    if (form->kind == HALF) store_halves(rounded, floats);
    else store_bfloats(rounded, floats);
    memcpy(to, rounded, (size_t)count * 2);
    return ~((vec)((ivec)floats & 0x7fffffff) < limit);
}

/* A row as 16-bit floats; 1 if one of them is not finite. */
static int round_row(const format *form, const float *values, uint8_t *block) {
    ivec beyond = {0};
    int64_t i = 0;
    for (; i + LANES <= form->width; i += LANES)
        beyond |= round_floats(form, values + i, LANES, block + 2 * i);
    if (i < form->width) beyond |= round_floats(form, values + i, form->width - i, block + 2 * i);
    for (int lane = 0; lane < LANES; lane++)
        if (beyond[lane]) return 1;
    return 0;
}

int pack_block(const format *form, const float *values, int64_t stride, int64_t rows, uint8_t *block) {
    workplace place;
    if (form->kind != CODES) return round_row(form, values, block);
    if (find_workplace(form, &place)) return 2;
    if (form->along == ALONG_COLUMN) return pack_columns(form, values, stride, rows, &place, block);
    return pack_row(form, values, &place, block);
}

/* Pack [rows, form->width] floats, `stride` apart. 0; 1: not finite or beyond fp16; 2: no memory. */
EXPORT int pack_matrix(const format *form, const float *values, int64_t stride, int64_t rows, uint8_t *out,
                       int64_t out_stride, int threads) {
    const int64_t blocks = (rows + form->block_rows - 1) / form->block_rows;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : failed)
    for (int64_t b = 0; b < blocks; b++) {
        if (failed > 0) continue; /* a thread's own maximum begins below zero */
        const int64_t row = b * form->block_rows;
        failed = pack_block(form, values + row * stride, stride, least(form->block_rows, rows - row),
                            out + b * out_stride);
    }
    return failed;
}

EXPORT int pack_sequences(const format *keys, const format *values, int64_t tokens, int64_t key_bytes,
                          int64_t block_bytes, int64_t sequences, const int64_t *blocks,
                          const float *const *rows, const int64_t *strides, uint8_t *const *targets,
                          int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : failed) collapse(2)
    for (int64_t s = 0; s < sequences; s++) {
        for (int part = 0; part < 2; part++) {
            const format *form = part ? values : keys;
            const int64_t bytes = form->code_bytes + form->groups * (form->offset == MIDDLE ? 2 : 4);
            for (int64_t b = 0; b < blocks[s]; b++) {
                uint8_t *target = targets[s] + b * block_bytes + (part ? key_bytes : 0);
                for (int64_t t = 0; t < tokens; t += form->block_rows) {
                    const float *from = rows[s] + (b * tokens + t) * strides[s] + (part ? keys->width : 0);
                    const int status = pack_block(form, from, strides[s], form->block_rows,
                                                  target + t / form->block_rows * bytes);
                    if (status > failed) failed = status;
                }
            }
        }
    }
    return failed;
}

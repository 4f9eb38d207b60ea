/* From codes to floats: any rectangle of a packed matrix, and all of one over several threads. */
#include "codes.h"

enum { PIECE = 256 /* codes that are taken apart at once, so that they stay in the nearest cache */ };

INLINE void decode(const uint8_t *codes, int64_t count, affine to, float *out) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        store(out + i, fma_vec(load_bytes(codes + i) - to.zero, splat(to.scale), splat(to.minimum)));
    for (; i < count; i++) out[i] = ((float)codes[i] - to.zero) * to.scale + to.minimum;
}

INLINE uint16_t read_half(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return half;
}

/* What a block holds for one of its groups. */
INLINE affine group_affine(const format *form, const uint8_t *block, int64_t group) {
    const uint8_t *numbers = block + form->code_bytes + 2 * group;
    affine found = {half_to_float(read_half(numbers)), 0.0f, -0.0f};
    if (form->offset == MIDDLE) {
        found.zero = (float)(1 << (form->bits - 1));
    } else {
        const float offset = half_to_float(read_half(numbers + 2 * form->groups));
        *(form->offset == ZERO ? &found.zero : &found.minimum) = offset;
    }
    return found;
}

/* A rectangle of a matrix whose groups lie along rows; bits and size are the format's, known when inlined. */
INLINE void unpack_along_rows(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column,
                              int64_t columns, float *out, int64_t stride, int64_t bits, int64_t size) {
    const format *form = matrix->form;
    const int64_t bytes = size * bits / 8;
    uint8_t codes[PIECE];
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *block = matrix->data + (row + r) * matrix->stride;
        for (int64_t done = 0; done < columns;) {
            const int64_t group = (column + done) / size, from = column + done - group * size;
            const int64_t to = least(least(size, from + PIECE), from + columns - done);
            float *target = out + r * stride + done;
            const affine numbers = group_affine(form, block, group);
            if (size <= PIECE && to - from == size) { /* the common case has constant bounds */
                take_group(block + group * bytes, bits, size, 0, size, codes);
                decode(codes, size, numbers, target);
            } else {
                take_group(block + group * bytes, bits, size, from, to, codes);
                decode(codes, to - from, numbers, target);
            }
            done += to - from;
        }
    }
}

/* The numbers of some columns' groups, as arrays. */
typedef struct {
    float scale[PIECE], zero[PIECE], minimum[PIECE];
} column_numbers;

static void read_columns(const format *form, const uint8_t *block, int64_t column, int64_t count,
                         column_numbers *numbers) {
    for (int64_t c = 0; c < count; c++) {
        const affine found = group_affine(form, block, column + c);
        numbers->scale[c] = found.scale;
        numbers->zero[c] = found.zero;
        numbers->minimum[c] = found.minimum;
    }
}

INLINE void decode_columns(const uint8_t *codes, int64_t count, const column_numbers *numbers, float *out) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES)
        store(out + c, fma_vec(load_bytes(codes + c) - load(numbers->zero + c), load(numbers->scale + c),
                               load(numbers->minimum + c)));
    for (; c < count; c++)
        out[c] = ((float)codes[c] - numbers->zero[c]) * numbers->scale[c] + numbers->minimum[c];
}

/* A rectangle of a matrix whose groups lie along columns. */
INLINE void unpack_along_columns(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column,
                                 int64_t columns, float *out, int64_t stride, int64_t bits) {
    const format *form = matrix->form;
    uint8_t codes[PIECE];
    column_numbers numbers;
    for (int64_t done = 0; done < rows;) {
        const int64_t first = (row + done) % form->group;
        const uint8_t *block = matrix->data + (row + done) / form->group * matrix->stride;
        const int64_t count = least(form->group - first, rows - done);
        for (int64_t c = 0; c < columns; c += PIECE) {
            const int64_t piece = least(PIECE, columns - c);
            read_columns(form, block, column + c, piece, &numbers);
            for (int64_t r = 0; r < count; r++) {
                take_row(block, bits, form->group, form->width, first + r, column + c, piece, codes);
                decode_columns(codes, piece, &numbers, out + (done + r) * stride + c);
            }
        }
        done += count;
    }
}

#define ROWS(bits, size) unpack_along_rows(matrix, row, rows, column, columns, out, stride, bits, size)
#define COLUMNS(bits) unpack_along_columns(matrix, row, rows, column, columns, out, stride, bits)
#define BITS_OF_SIZE(bits)                                                                                   \
    case bits:                                                                                               \
        if (form->along == ALONG_COLUMN) COLUMNS(bits);                                                      \
        else if (form->group == 64) ROWS(bits, 64);                                                          \
        else if (form->group == 32) ROWS(bits, 32);                                                          \
        else if (form->group == 128) ROWS(bits, 128);                                                        \
        else ROWS(bits, form->group);                                                                        \
        break;

void unpack_panel(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column, int64_t columns,
                  float *out, int64_t stride) {
    const format *form = matrix->form;
    switch (form->bits) {
        BITS_OF_SIZE(2)
        BITS_OF_SIZE(3)
        BITS_OF_SIZE(4)
        BITS_OF_SIZE(8)
    }
}

/* Rows [0, rows) of a matrix into `out`. */
EXPORT void unpack_matrix(const format *form, const uint8_t *data, int64_t data_stride, int64_t rows,
                          float *out, int64_t stride, int threads) {
    enum { STRIP = 16 };
    const packed_matrix matrix = {form, data, data_stride};
    const int64_t strip = form->along == ALONG_COLUMN ? form->group : STRIP;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row += strip)
        unpack_panel(&matrix, row, least(strip, rows - row), 0, form->width, out + row * stride, stride);
}

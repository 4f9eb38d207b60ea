/* From codes to floats: any rectangle of a packed matrix, and all of one over several threads. */
#include "decode.h"
#include "tiles.h"

INLINE void decode_bytes(const uint8_t *codes, int64_t count, decoder by, int64_t bits, float *out) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(out + i, decode(load_bytes(codes + i), by, bits));
    for (; i < count; i++)
        out[i] = ((float)codes[i] - by.numbers.zero) * by.numbers.scale + by.numbers.minimum;
}

/* Columns of one row of a matrix whose groups lie along rows; no more than PIECE groups. */
INLINE void unpack_row(const format *form, const uint8_t *block, int64_t column, int64_t columns, float *out,
                       int64_t bits) {
    const int64_t size = form->group, first = column / size, bytes = size * bits / 8;
    group_numbers numbers;
    read_numbers(form, block, first, (column + columns - 1) / size - first + 1, &numbers);
    for (int64_t done = 0; done < columns;) {
        uint8_t codes[PIECE];
        const int64_t group = (column + done) / size, from = column + done - group * size;
        const int64_t to = least(least(size, from + PIECE), from + columns - done);
        take_codes(block + group * bytes, bits, size, from, to, codes);
        decode_bytes(codes, to - from, numbered(&numbers, group - first, bits), bits, out + done);
        done += to - from;
    }
}

/* The same for whole groups of a size that the compiler knows. */
INLINE void unpack_groups(const format *form, const uint8_t *block, int64_t column, int64_t columns,
                          float *out, int64_t bits, int64_t size) {
    const int64_t first = column / size, count = columns / size, bytes = size * bits / 8;
    group_numbers numbers;
    read_numbers(form, block, first, count, &numbers);
    for (int64_t g = 0; g < count; g++) {
        vec values[LARGEST_KNOWN / LANES];
        decode_group(block + (first + g) * bytes, size, numbered(&numbers, g, bits), bits, values);
        UNROLL for (int v = 0; v < size / LANES; v++)
            store(out + g * size + v * LANES, values[v]);
    }
}

/* A rectangle of a matrix whose groups lie along rows; `size` is that of groups where it is a usual one, or
 * 0. */
INLINE void unpack_along_rows(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column,
                              int64_t columns, float *out, int64_t stride, int64_t bits, int64_t size) {
    const int64_t most_columns = (PIECE - 1) * matrix->form->group;
    const int whole = size && column % size == 0 && columns % size == 0;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *block = matrix->data + (row + r) * matrix->stride;
        for (int64_t c = 0; c < columns; c += most_columns) {
            const int64_t count = least(most_columns, columns - c);
            float *target = out + r * stride + c;
            if (whole) unpack_groups(matrix->form, block, column + c, count, target, bits, size);
            else unpack_row(matrix->form, block, column + c, count, target, bits);
        }
    }
}

INLINE void decode_row(row_fields from, int64_t bits, int64_t count, const group_numbers *numbers,
                       float *out) {
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) {
        const ivec codes = codes_of(from, c, bits);
        store(out + c, fma_vec(to_float(codes) - load(numbers->zero + c), load(numbers->scale + c),
                               load(numbers->minimum + c)));
    }
    for (; c < count; c++) {
        int code = from.bytes[0][c] >> from.shift[0] & (bits == 3 ? 3 : (1 << bits) - 1);
        if (bits == 3) code |= (from.bytes[1][c] >> from.shift[1] & 1) << 2;
        out[c] = ((float)code - numbers->zero[c]) * numbers->scale[c] + numbers->minimum[c];
    }
}

/* A rectangle of a matrix whose groups lie along columns. */
INLINE void unpack_along_columns(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column,
                                 int64_t columns, float *out, int64_t stride, int64_t bits) {
    const format *form = matrix->form;
    group_numbers numbers;
    for (int64_t done = 0; done < rows;) {
        const int64_t first = (row + done) % form->group;
        const uint8_t *block = matrix->data + (row + done) / form->group * matrix->stride;
        const int64_t count = least(form->group - first, rows - done);
        for (int64_t c = 0; c < columns; c += PIECE) {
            const int64_t piece = least(PIECE, columns - c);
            read_numbers(form, block, column + c, piece, &numbers);
            for (int64_t r = 0; r < count; r++)
                decode_row(fields_of(form, block, bits, first + r, column + c), bits, piece, &numbers,
                           out + (done + r) * stride + c);
        }
        done += count;
    }
}

/* A rectangle of floats of 16 bits; what is beyond whole vectors is converted in a vector of its own. */
INLINE void unpack_floats(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column,
                          int64_t columns, float *out, int64_t stride, int64_t kind) {
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *from = matrix->data + (row + r) * matrix->stride + 2 * column;
        float *to = out + r * stride;
        int64_t c = 0;
        for (; c + LANES <= columns; c += LANES) store(to + c, load_floats(from + 2 * c, LANES, kind));
        if (c == columns) continue;
        const vec rest = load_floats(from + 2 * c, columns - c, kind);
        for (int64_t lane = 0; c + lane < columns; lane++) to[c + lane] = rest[lane];
    }
}

static void copy_floats(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column,
                        int64_t columns, float *out, int64_t stride) {
    for (int64_t r = 0; r < rows; r++)
        memcpy(out + r * stride, matrix->data + (row + r) * matrix->stride + 4 * column, 4 * (size_t)columns);
}

#define ROWS(bits, size) unpack_along_rows(matrix, row, rows, column, columns, out, stride, bits, size)
#define COLUMNS(bits) unpack_along_columns(matrix, row, rows, column, columns, out, stride, bits)
#define CASE_OF_BITS(bits)                              \
    case bits:                                          \
        if (form->along == ALONG_COLUMN) COLUMNS(bits); \
        else if (form->group == 64) ROWS(bits, 64);     \
        else if (form->group == 32) ROWS(bits, 32);     \
        else if (form->group == 128) ROWS(bits, 128);   \
        else ROWS(bits, 0);                             \
        break;

void unpack_panel(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column, int64_t columns,
                  float *out, int64_t stride) {
    const format *form = matrix->form;
    switch (form->bits) {
        CASE_OF_BITS(2)
        CASE_OF_BITS(3)
        CASE_OF_BITS(4)
        CASE_OF_BITS(8)
        case 16:
            if (form->kind == HALF) unpack_floats(matrix, row, rows, column, columns, out, stride, HALF);
            else unpack_floats(matrix, row, rows, column, columns, out, stride, BFLOAT);
            break;
        case 32: copy_floats(matrix, row, rows, column, columns, out, stride); break;
    }
}

void prefetch_panel(const packed_matrix *matrix, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    const format *form = matrix->form;
    const int64_t size = form->group, bytes = size * form->bits / 8;
    if (columns <= 0) return;
    if (form->kind != CODES) {
        const int64_t each = form->bits / 8;
        for (int64_t r = row; r < row + rows; r++)
            prefetch(matrix->data + r * matrix->stride + column * each, columns * each);
        return;
    }
    for (int64_t r = row; r < row + rows; r++) {
        const uint8_t *block = matrix->data + r / form->block_rows * matrix->stride;
        int64_t first = column, last = column + columns - 1; /* groups */
        if (form->along == ALONG_ROW) {
            first = column / size;
            last = (column + columns - 1) / size;
            prefetch(block + first * bytes, (last - first + 1) * bytes);
        } else {
            const row_fields from = fields_of(form, block, form->bits, r % size, column);
            for (int p = 0; p < planes_of(form->bits).count; p++) prefetch(from.bytes[p], columns);
            if (r % size && r > row) continue; /* the block's numbers are prefetched already */
        }
        const uint8_t *numbers = block + form->code_bytes + 2 * first;
        prefetch(numbers, 2 * (last - first + 1));
        if (form->offset != MIDDLE) prefetch(numbers + 2 * form->groups, 2 * (last - first + 1));
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

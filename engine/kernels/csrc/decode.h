/* From codes to floats, a vector or a group at a time. */
#ifndef DECODE_H
#define DECODE_H

#include "codes.h"

enum {
    PIECE = 256,         /* codes or groups that are taken apart at once: they stay in the nearest cache */
    LARGEST_KNOWN = 128, /* values of the largest group that is decoded without loops */
};

/* How a group's codes become values.
 *
 * Sixteen lanes hold the value of every code of up to four bits: one instruction then looks up sixteen
 * codes, and ignores what else is in their bytes. A table of fewer bits repeats itself. */
typedef struct {
    vec table;
    affine numbers;
} decoder;

#define HAS_TABLE(bits) (LANES == 16 && (bits) <= 4)

INLINE vec apply(vec codes, affine numbers) {
    return fma_vec(codes - numbers.zero, splat(numbers.scale), splat(numbers.minimum));
}

INLINE decoder decoder_of(affine numbers, int64_t bits) {
    decoder made = {.numbers = numbers};
    if (HAS_TABLE(bits)) {
        made.table = apply(to_float(lane_numbers() & ((1 << bits) - 1)), numbers);
    }
    return made;
}

/* The values of codes that stand in the lowest bits of each lane. */
INLINE vec decode(ivec codes, decoder by, int64_t bits) {
#if LANES == 16
    if (HAS_TABLE(bits)) return (vec)_mm512_permutexvar_ps((__m512i)codes, (__m512)by.table);
#endif
    return apply(to_float(codes & ((1 << bits) - 1)), by.numbers);
}

/* Values v, v + 1, ... of a plane in the lowest bits of the lanes, other bits above them. A plane that has
 * fewer bytes than there are lanes stands in `held` repeatedly: each repetition is another field. */
INLINE ivec field_of(const ivec *held, int64_t bits, int64_t size, int64_t v) {
    const int length = (int)(size * bits / 8), first = (int)(v / length);
    if (length >= LANES) return held[v % length / LANES] >> (int)(first * bits);
    return held[0] >> (first + lane_numbers() / length) * (int)bits;
}

/* The bytes of a plane, each loaded once, for `field_of`. */
INLINE void hold_plane(const uint8_t *bytes, int64_t length, ivec *held) {
    if (length < LANES) held[0] = load_repeated(bytes, (int)length);
    UNROLL for (int64_t i = 0; i < length / LANES; i++)
        held[i] = load_bytes(bytes + i * LANES);
}

/* A whole group of a size that the compiler knows, at most 128. */
INLINE void decode_group(const uint8_t *bytes, int64_t size, decoder by, int64_t bits, vec *values) {
    const plane_list planes = planes_of(bits);
    ivec held[2][LARGEST_KNOWN / LANES];
    UNROLL for (int p = 0; p < planes.count; p++) {
        const int64_t length = size * planes.bits[p] / 8;
        hold_plane(bytes, length, held[p]);
        bytes += length;
    }
    UNROLL for (int64_t v = 0; v < size; v += LANES) {
        ivec codes = field_of(held[0], planes.bits[0], size, v);
        if (bits == 3) codes = (codes & 3) | (field_of(held[1], 1, size, v) & 1) << 2;
        values[v / LANES] = decode(codes, by, bits);
    }
}

/* The numbers of some consecutive groups of a block, as arrays. */
typedef struct {
    float scale[PIECE], zero[PIECE], minimum[PIECE];
} group_numbers;

static inline void read_numbers(const format *form, const uint8_t *block, int64_t group, int64_t count,
                                group_numbers *numbers) {
    const uint8_t *scales = block + form->code_bytes + 2 * group, *offsets = scales + 2 * form->groups;
    const vec zero = splat(form->offset == MIDDLE ? (float)(1 << (form->bits - 1)) : 0);
    for (int64_t g = 0; g < count; g += LANES) {
        store(numbers->scale + g, load_halves(scales + 2 * g, count - g));
        store(numbers->zero + g, form->offset == ZERO ? load_halves(offsets + 2 * g, count - g) : zero);
        store(numbers->minimum + g,
              form->offset == MINIMUM ? load_halves(offsets + 2 * g, count - g) : splat(-0.0f));
    }
}

/* What each of LANES groups adds to a value beside code * scale. */
INLINE vec shifts_of(const group_numbers *numbers, int64_t group) {
    return fma_vec(splat(0) - load(numbers->zero + group), load(numbers->scale + group),
                   load(numbers->minimum + group));
}

INLINE decoder numbered(const group_numbers *numbers, int64_t group, int64_t bits) {
    return decoder_of((affine){numbers->scale[group], numbers->zero[group], numbers->minimum[group]}, bits);
}

/* Where the codes of one row lie in a block whose groups lie along columns: a field of each plane. */
typedef struct {
    const uint8_t *bytes[2];
    int shift[2];
} row_fields;

INLINE row_fields fields_of(const format *form, const uint8_t *block, int64_t bits, int64_t row,
                            int64_t column) {
    const plane_list planes = planes_of(bits);
    row_fields fields = {{0}, {0}};
    for (int p = 0; p < planes.count; p++) {
        const int64_t length = form->group * planes.bits[p] / 8;
        fields.bytes[p] = block + row % length * form->width + column;
        fields.shift[p] = (int)(row / length) * planes.bits[p];
        block += length * form->width;
    }
    return fields;
}

/* LANES codes of a row, from the column that is `c` further on. */
INLINE ivec codes_of(row_fields from, int64_t c, int64_t bits) {
    const ivec codes = load_bytes(from.bytes[0] + c) >> from.shift[0];
    if (bits == 8) return codes;
    if (bits == 3) return (codes & 3) | (load_bytes(from.bytes[1] + c) >> from.shift[1] & 1) << 2;
    return codes & ((1 << bits) - 1);
}

#endif

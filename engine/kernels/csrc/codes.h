/* Codes of 2, 3, 4 or 8 bits in planes of 4, 2 or 1 bits: taken apart into bytes, and put together.
 *
 * A plane of b bits holds f = 8 / b fields per byte; of a group of g codes, field i of byte j is code
 * i * g/f + j. So consecutive codes lie in consecutive bytes at the same shift, and no code needs shuffling.
 *
 * Functions are inlined: with the bits and the group known, loops have constant lengths and become a
 * few vector instructions.
 */
#ifndef CODES_H
#define CODES_H

#include "formats.h"
#include "simd.h"

typedef struct {
    int count, bits[2]; /* low bits first */
} plane_list;

INLINE plane_list planes_of(int64_t bits) {
    if (bits == 3) return (plane_list){2, {2, 1}};
    return (plane_list){1, {(int)bits, 0}};
}

typedef uint64_t word __attribute__((aligned(1), may_alias));

#define EVERY_BYTE 0x0101010101010101u

/* codes[i] (|)= ((bytes[i] >> shift) & (2**bits - 1)) << low. Eight bytes at a time: the mask removes what
 * a shift brings in from the neighbouring byte. */
INLINE void take_field(const uint8_t *bytes, int64_t count, int bits, int shift, int low, uint8_t *codes) {
    const uint64_t mask = ((1u << bits) - 1) * EVERY_BYTE;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const uint64_t field = (*(const word *)(bytes + i) >> shift) & mask;
        *(word *)(codes + i) = low ? *(word *)(codes + i) | field << low : field;
    }
    for (; i < count; i++) {
        const uint8_t field = (bytes[i] >> shift) & ((1 << bits) - 1);
        codes[i] = low ? codes[i] | field << low : field;
    }
}

/* Codes [from, to) of a group whose planes lie one after the other. */
INLINE void take_codes(const uint8_t *bytes, int64_t bits, int64_t group, int64_t from, int64_t to,
                       uint8_t *codes) {
    const plane_list planes = planes_of(bits);
    int low = 0;
    for (int p = 0; p < planes.count; p++) {
        const int width = planes.bits[p];
        const int64_t length = group * width / 8;
        for (int field = 0; field < 8 / width; field++) {
            const int64_t first = most(from, field * length), last = least(to, (field + 1) * length);
            if (first < last)
                take_field(bytes + first - field * length, last - first, width, field * width, low,
                           codes + first - from);
        }
        bytes += length;
        low += width;
    }
}

/* The planes of a group of codes, one after the other. */
INLINE void put_group(const uint8_t *codes, int64_t bits, int64_t group, uint8_t *bytes) {
    const plane_list planes = planes_of(bits);
    int low = 0;
    UNROLL for (int p = 0; p < planes.count; p++) {
        const int width = planes.bits[p];
        const int64_t length = group * width / 8;
        const uint64_t mask = ((1u << width) - 1) * EVERY_BYTE;
        int64_t j = 0;
        for (; j + 8 <= length; j += 8) {
            uint64_t made = 0;
            UNROLL for (int field = 0; field < 8 / width; field++)
                made |= (*(const word *)(codes + field * length + j) >> low & mask) << (field * width);
            *(word *)(bytes + j) = made;
        }
        for (; j < length; j++) {
            unsigned made = 0;
            for (int field = 0; field < 8 / width; field++)
                made |= (codes[field * length + j] >> low & (unsigned)(mask & 0xff)) << (field * width);
            bytes[j] = (uint8_t)made;
        }
        bytes += length;
        low += width;
    }
}

#endif

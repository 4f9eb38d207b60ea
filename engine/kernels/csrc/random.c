/* Numbers that are nearly normal, each a function of a stream and its own index: any part can be made alone.
 *
 * All but the last product is arithmetic of integers modulo 2**32, so that every machine, and the reference in
 * torch, has the same values. Good enough for weights that nobody trained; no generator for statistics.
 */
#include "formats.h"
#include "simd.h"

enum { AS_SINGLE, AS_HALF, AS_BFLOAT }; /* float32, float16, bfloat16 */

enum { CHUNK = 1 << 14 /* values that a thread takes at once */, PIECE = 512 /* that are made at once */ };

/* What 2**32 consecutive values of a stream share: the finaliser of SplitMix64 (Steele, Lea, Flood, 2014). */
static uint64_t block_key(uint64_t stream, uint64_t block) {
    uint64_t z = stream + (block + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* The sum of four numbers of 16 bits less its mean: within 3.46 standard deviations.
 *
 * A multiply and xorshift hash of the counter. One half of the key shifts the counter, the other enters
 * between the rounds, so that two streams are no windows of one sequence. */
INLINE int32_t nearly_normal(uint64_t key, uint32_t counter) {
    uint32_t x = counter + (uint32_t)key;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x ^= (uint32_t)(key >> 32);
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    uint32_t y = x * 0x9E3779B1u;
    y ^= y >> 15;
    return (int32_t)((x & 0xFFFF) + (x >> 16) + (y & 0xFFFF) + (y >> 16)) - 131070;
}

INLINE uint16_t float_to_brain(float value) { /* to nearest, ties to even; values are finite */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static void to_halves(const float *values, int64_t count, uint16_t *out) {
    int64_t i = 0;
#if defined(__AVX2__) && defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; i++) out[i] = float_to_half(values[i]);
}

static void fill(uint64_t stream, uint64_t start, int64_t count, float scale, int kind, char *out) {
    float values[PIECE];
    for (int64_t at = 0, size; at < count; at += size) {
        const uint64_t index = start + (uint64_t)at, key = block_key(stream, index >> 32);
        const uint32_t counter = (uint32_t)index;
        size = least(least(PIECE, count - at), ((int64_t)1 << 32) - counter);
        float *to = kind == AS_SINGLE ? (float *)out + at : values;
        uint16_t *halves = (uint16_t *)out + at;
        for (int64_t i = 0; i < size; i++) to[i] = (float)nearly_normal(key, counter + (uint32_t)i) * scale;
        if (kind == AS_HALF) to_halves(values, size, halves);
        if (kind == AS_BFLOAT)
            for (int64_t i = 0; i < size; i++) halves[i] = float_to_brain(values[i]);
    }
}

/* Values `start` to `start + count` of a stream, times `scale`, as numbers of a kind. */
EXPORT void fill_random(uint64_t stream, uint64_t start, int64_t count, float scale, int kind, void *out,
                        int threads) {
    const int64_t bytes = kind == AS_SINGLE ? 4 : 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < count; at += CHUNK)
        fill(stream, start + (uint64_t)at, least(CHUNK, count - at), scale, kind, (char *)out + at * bytes);
}

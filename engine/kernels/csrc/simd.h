/* One vector of floats, as wide as the machine has them: AVX-512, AVX2, or four lanes that every compiler can
 * map.
 *
 * All arithmetic of the kernels is written on `vec` with + - * and the few functions below, so that this
 * is the only file that knows an instruction set. The build forbids the compiler to contract a * b + c by
 * itself (-ffp-contract=off): packing has to round exactly as the reference does. Where a fused
 * multiply-add is welcome, the code says `fma_vec`.
 */
#ifndef SIMD_H
#define SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

/* Ask for the lines of some bytes, one at least. */
INLINE void prefetch(const uint8_t *from, int64_t bytes) {
    enum { CACHE_LINE = 64 };
    for (int64_t i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch(from + i);
    __builtin_prefetch(from + bytes - 1);
}

INLINE vec load(const float *from) { return *(const unaligned_vec *)from; }

INLINE void store(float *to, vec value) { *(unaligned_vec *)to = value; }

INLINE vec splat(float value) { return value - (vec){0}; }

/* a * b + c, rounded once where the machine can. */
INLINE vec fma_vec(vec a, vec b, vec c) {
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE float sum(vec value) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)value);
#else
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += value[lane];
    return total;
#endif
}

/* The higher one of each lane. */
INLINE vec highest_of(vec a, vec b) {
    const ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

INLINE float highest_lane(vec value) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)value);
#else
    float highest = value[0];
    for (int lane = 1; lane < LANES; lane++) highest = value[lane] > highest ? value[lane] : highest;
    return highest;
#endif
}

/* The sums over lanes of four vectors: half the shuffles of four single sums. */
INLINE void sum_four(const vec *values, float *sums) {
#if LANES == 16
    const __m512 a = (__m512)values[0], b = (__m512)values[1], c = (__m512)values[2], d = (__m512)values[3];
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                                     (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                      (__m256)_mm512_extractf64x4_pd((__m512d)all, 1)); /* a b c d a b c d */
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif LANES == 8
    const __m256 ab = _mm256_hadd_ps((__m256)values[0], (__m256)values[1]);
    const __m256 all = _mm256_hadd_ps(ab, _mm256_hadd_ps((__m256)values[2], (__m256)values[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    for (int i = 0; i < 4; i++) sums[i] = sum(values[i]);
#endif
}

#if LANES == 16
/* Sixteen rows of sixteen lanes each, in place. */
INLINE void transpose(__m512i *rows) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

#endif

/* LANES rows of LANES floats, in place. */
INLINE void turn(vec *rows) {
#if LANES == 16
    transpose((__m512i *)rows);
#else
    for (int r = 0; r < LANES; r++)
        for (int lane = 0; lane < r; lane++) {
            const float kept = rows[r][lane];
            rows[r][lane] = rows[lane][r];
            rows[lane][r] = kept;
        }
#endif
}

/* LANES bytes as integers. */
INLINE ivec load_bytes(const uint8_t *from) {
#if LANES == 16
    return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LANES == 8
    return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    return (ivec){from[0], from[1], from[2], from[3]};
#endif
}

/* The nearest integers, ties to even, of lanes that are cut off below 0 and above `most`, which is at most
 * 255. */
INLINE void store_codes(uint8_t *to, vec value, float most) {
#if LANES == 16
    const __m512 cut = _mm512_min_ps(_mm512_max_ps((__m512)value, _mm512_setzero_ps()), _mm512_set1_ps(most));
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(cut)));
#else
    for (int lane = 0; lane < LANES; lane++) {
        const float cut = value[lane] < 0 ? 0 : value[lane] > most ? most : value[lane];
        to[lane] = (uint8_t)(int32_t)((cut + 0x1.8p23f) - 0x1.8p23f);
    }
#endif
}

/* `count` bytes, 4 or more but fewer than LANES, again and again. */
INLINE ivec load_repeated(const uint8_t *from, int count) {
    uint8_t repeated[LANES];
    for (int lane = 0; lane < LANES; lane += count) memcpy(repeated + lane, from, (size_t)count);
    return load_bytes(repeated);
}

INLINE ivec lane_numbers(void) {
    ivec numbers = {0};
    UNROLL for (int lane = 0; lane < LANES; lane++)
        numbers[lane] = lane;
    return numbers;
}

INLINE vec to_float(ivec value) { return __builtin_convertvector(value, vec); }

/* The bits of one fp16 number, exactly as a float. */
INLINE float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
    union {
        uint32_t bits;
        float value;
    } number;
    if (exponent == 0) {
        number.value = (float)fraction * 0x1p-24f;
        number.bits |= sign;
    } else {
        number.bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
    }
    return number.value;
#endif
}

/* `count` fp16 numbers, at most LANES; other lanes are not defined, and their memory is not read. */
INLINE vec load_halves(const uint8_t *from, int64_t count) {
#if LANES == 16 && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 wanted = (__mmask16)(count < LANES ? (1u << count) - 1 : 0xffff);
    return (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(wanted, from));
#elif LANES == 8 && defined(__F16C__)
    if (count >= LANES) return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#endif
    vec found = {0};
    for (int lane = 0; lane < LANES && lane < count; lane++) {
        uint16_t half;
        memcpy(&half, from + 2 * lane, sizeof half);
        found[lane] = half_to_float(half);
    }
    return found;
}

/* The same for bfloat16: the upper half of a float. */
INLINE vec load_bfloats(const uint8_t *from, int64_t count) {
#if LANES == 16
    if (count >= LANES)
        return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif LANES == 8
    if (count >= LANES)
        return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#endif
    ivec found = {0};
    for (int lane = 0; lane < LANES && lane < count; lane++) {
        uint16_t upper;
        memcpy(&upper, from + 2 * lane, sizeof upper);
        found[lane] = (int32_t)((uint32_t)upper << 16);
    }
    return (vec)found;
}

/* The nearest fp16 number, ties to even; infinity beyond its range. */
INLINE uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    union {
        uint32_t bits;
        float value;
    } number = {.value = value}, rounded;
    const uint16_t sign = (number.bits >> 16) & 0x8000;
    number.bits &= 0x7fffffff;
    if (number.bits > 0x7f800000) return sign | 0x7e00;  /* NaN */
    if (number.bits >= 0x477ff000) return sign | 0x7c00; /* 65520 and more round to infinity */
    if (number.bits < 0x38800000) {                      /* a multiple of 2**-24: one addition rounds to it */
        rounded.value = number.value + 0.5f;
        return sign | (uint16_t)(rounded.bits - 0x3f000000);
    }
    const uint32_t odd = (number.bits >> 13) & 1;
    return sign | (uint16_t)((number.bits - 0x38000000 + 0xfff + odd) >> 13);
#endif
}

/* The nearest fp16 numbers, ties to even. */
INLINE void store_halves(uint8_t *to, vec value) {
#if LANES == 16
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8 && defined(__F16C__)
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < LANES; lane++) {
        const uint16_t half = float_to_half(value[lane]);
        memcpy(to + 2 * lane, &half, sizeof half);
    }
#endif
}

/* The nearest bfloat16 numbers, ties to even; what is no number may become an infinity. */
INLINE void store_bfloats(uint8_t *to, vec value) {
    const ivec bits = (ivec)value;
    const ivec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    for (int lane = 0; lane < LANES; lane++) {
        const uint16_t half = (uint16_t)rounded[lane];
        memcpy(to + 2 * lane, &half, sizeof half);
    }
}

/* e to the power of each lane, which must not be positive; 0 below -87. Within 2 ulp.
 *
 * exp(x) = 2**n * exp(f) with n the integer nearest to x / ln 2; adding and subtracting 1.5 * 2**23
 * rounds to an integer, and ln 2 in two parts keeps f exact.
 */
INLINE vec exp_vec(vec x) {
    const ivec hidden = x < -87.0f; /* not so for NaN, which stays one */
    x = (vec)((ivec)x & ~hidden);
    const vec rounder = splat(0x1.8p23f);
    const vec n = fma_vec(x, splat(1.44269504f), rounder) - rounder;
    vec f = fma_vec(n, splat(-0.693359375f), x);
    f = fma_vec(n, splat(2.12194440e-4f), f);
    vec p = splat(1.0f / 5040); /* |f| <= ln(2) / 2: the Taylor series is exact to a float with eight terms */
    UNROLL for (int term = 0; term < 6; term++)
        p = fma_vec(p, f, splat((const float[]){1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1}[term]));
    p = fma_vec(p, f, splat(1));
    const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & ~hidden);
}

#endif

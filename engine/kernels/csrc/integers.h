/* Sums of products of unsigned and signed bytes in exact integers of 32 bits. */
#ifndef INTEGERS_H
#define INTEGERS_H

#include "simd.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define INTEGER_VECTORS_512
enum { STEP = 64 };
typedef __m512i lanes;
INLINE lanes nothing(void) { return _mm512_setzero_si512(); }
INLINE lanes add_products(lanes acc, const uint8_t *row, const int8_t *codes) {
    return _mm512_dpbusd_epi32(acc, _mm512_loadu_si512(row), _mm512_loadu_si512(codes));
}
INLINE int32_t total(lanes acc) { return _mm512_reduce_add_epi32(acc); }
#elif defined(__AVX2__)
enum { STEP = 16 };
typedef __m256i lanes;
INLINE lanes nothing(void) { return _mm256_setzero_si256(); }
/* Widened to 16 bits first: products of unsigned and signed bytes saturate when pairs are added. */
INLINE lanes add_products(lanes acc, const uint8_t *row, const int8_t *codes) {
    const __m256i weights = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)row));
    const __m256i values = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(weights, values));
}
INLINE int32_t total(lanes acc) {
    int32_t lane[8], result = 0;
    _mm256_storeu_si256((__m256i *)lane, acc);
    for (int i = 0; i < 8; i++) result += lane[i];
    return result;
}
#else
enum { STEP = 1 };
typedef int32_t lanes;
INLINE lanes nothing(void) { return 0; }
INLINE lanes add_products(lanes acc, const uint8_t *row, const int8_t *codes) { return acc + *row * *codes; }
INLINE int32_t total(lanes acc) { return acc; }
#endif

#endif

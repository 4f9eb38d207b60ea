/* The product of 8-bit weights and activations that are rounded to 8 bits per token, in exact integers.
 *
 * Weights are codes 0..255 with one scale per row and 128 for zero; a token's activations become
 * -127..127. A product is at most 255 * 127, so 32 bits hold the sum of 65536 of them and more.
 */
#include "formats.h"
#include "integers.h"

enum { ROWS = 4, TOKENS = 4 /* of one tile */ };

/* Codes of one token, padded with zeros to whole vectors; their scale; their sum times the weights' zero. */
typedef struct {
    int8_t *codes;
    float scale;
    int32_t zero_sum;
} token;

/* sums[r * TOKENS + t] = sum of (code of row r - 128) * code of token t. */
INLINE void integer_tile(const uint8_t *rows, int64_t stride, int row_count, const token *tokens,
                         int token_count, int64_t width, int32_t *sums) {
    lanes acc[ROWS * TOKENS];
    UNROLL for (int i = 0; i < ROWS * TOKENS; i++)
        acc[i] = nothing();
    int64_t k = 0;
    for (; k + STEP <= width; k += STEP) UNROLL
        for (int r = 0; r < row_count; r++) UNROLL
            for (int t = 0; t < token_count; t++)
                acc[r * TOKENS + t] =
                    add_products(acc[r * TOKENS + t], rows + r * stride + k, tokens[t].codes + k);
    UNROLL for (int r = 0; r < row_count; r++) UNROLL
        for (int t = 0; t < token_count; t++) {
            int32_t result = total(acc[r * TOKENS + t]) - tokens[t].zero_sum;
            for (int64_t i = k; i < width; i++) result += rows[r * stride + i] * tokens[t].codes[i];
            sums[r * TOKENS + t] = result;
        }
}

/* Symmetric, nearest even: the largest magnitude becomes 127. */
static void round_token(const float *x, int64_t width, token *into) {
    float largest = 0, check = 0;
#pragma omp simd reduction(max : largest) reduction(+ : check)
    for (int64_t i = 0; i < width; i++) {
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        check += x[i] * 0.0f;
    }
    into->scale = largest / 127;
    const float divisor = into->scale > 0 ? into->scale : 1;
    if (check != 0) { /* not a number, or infinite: so are all products */
        memset(into->codes, 0, (size_t)width);
        into->scale = NAN;
        into->zero_sum = 0;
        return;
    }
    int32_t codes = 0;
#pragma omp simd reduction(+ : codes)
    for (int64_t i = 0; i < width; i++) {
        const float code = rintf(x[i] / divisor);
        into->codes[i] = (int8_t)(code > 127 ? 127 : code < -127 ? -127 : code);
        codes += into->codes[i];
    }
    into->zero_sum = 128 * codes;
}

#define TILE(row_count, token_count) \
    integer_tile(first, stride, row_count, tokens + t, token_count, width, sums)

/* out [tokens, rows] = (x rounded) @ matrix^T + bias, for `8-row-symmetric`. 0; 2: no memory.
 *
 * An output is float(integer sum) * weight scale * token scale + bias. */
EXPORT int multiply_int8(const format *form, const uint8_t *data, int64_t stride, int64_t rows,
                         const float *x, int64_t x_stride, int64_t count, const float *bias, float *out,
                         int64_t out_stride, int threads) {
    const int64_t width = form->width, padded = (width + 63) / 64 * 64;
    token *tokens = scratch(SHARED_SLOT, (size_t)count * (sizeof(token) + (size_t)padded));
    if (!tokens) return 2;
    int8_t *codes = (int8_t *)(tokens + count);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; t++) {
            tokens[t].codes = codes + t * padded;
            round_token(x + t * x_stride, width, tokens + t);
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row += ROWS) {
            const uint8_t *first = data + row * stride;
            const int64_t row_count = least(ROWS, rows - row);
            for (int64_t t = 0; t < count;) {
                int32_t sums[ROWS * TOKENS];
                const int64_t token_count = row_count == ROWS && count - t >= TOKENS ? TOKENS : 1;
                if (token_count == TOKENS) TILE(ROWS, TOKENS);
                else if (row_count == ROWS) TILE(ROWS, 1);
                else
                    for (int64_t r = 0; r < row_count; r++)
                        integer_tile(first + r * stride, stride, 1, tokens + t, 1, width, sums + r * TOKENS);
                for (int64_t i = 0; i < token_count; i++)
                    for (int64_t r = 0; r < row_count; r++) {
                        uint16_t scale;
                        memcpy(&scale, first + r * stride + form->code_bytes, sizeof scale);
                        out[(t + i) * out_stride + row + r] =
                            (float)sums[r * TOKENS + i] * half_to_float(scale) * tokens[t + i].scale +
                            (bias ? bias[row + r] : 0);
                    }
                t += token_count;
            }
        }
    }
    return 0;
}

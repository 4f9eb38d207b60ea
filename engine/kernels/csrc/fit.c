/* Scale and offset of one group: from its range, or the narrower range that loses least.
 *
 * Operation for operation what engine/kernels/reference.py does, whose results have to be repeated bit by
 * bit: sums are of doubles, so that their order does not matter to what is rounded to fp16 afterwards. Loops
 * are plain C: the compiler vectorises them, reductions where `omp simd` allows it.
 */
#include <math.h>

#include "formats.h"
#include "simd.h"

static const float SHRINKS[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f, 0.65f, 0.6f, 0.5f};

typedef struct {
    uint16_t scale, offset; /* as they are stored */
} fit;

typedef struct {
    float low, high;
} range;

/* fp16, away from zero where fp16 has few bits left: a narrow group's scale must not vanish. */
static uint16_t scale_to_half(float scale) {
    if (fabsf(scale) < 0x1p-14f) scale = copysignf(ceilf(fabsf(scale) * 0x1p24f) * 0x1p-24f, scale);
    return float_to_half(scale);
}

static int is_finite_half(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

static float levels_of(const format *form) { return (float)((1 << form->bits) - 1); }

static float middle_of(const format *form) { return (float)(1 << (form->bits - 1)); }

/* NaN in either bound if a value is NaN or infinite. */
static range range_of(const float *values, int64_t count) {
    float low = values[0], high = values[0], check = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : check)
    for (int64_t i = 0; i < count; i++) {
        low = values[i] < low ? values[i] : low;
        high = values[i] > high ? values[i] : high;
        check += values[i] * 0.0f;
    }
    return check == 0 ? (range){low, high} : (range){NAN, NAN};
}

/* `shrink` of the range spread over all codes. */
static fit fit_range(const format *form, range of, float shrink) {
    if (form->offset == MIDDLE) { /* the value of largest magnitude becomes the first code, as in Q4_0 */
        const float extreme = -of.low >= of.high ? of.low : of.high;
        return (fit){scale_to_half(extreme * (shrink / -middle_of(form))), 0};
    }
    if (form->offset == ZERO) {
        const float low = (of.low > 0 ? 0 : of.low) * shrink, high = (of.high < 0 ? 0 : of.high) * shrink;
        const uint16_t scale = scale_to_half((high - low) / levels_of(form));
        const float step = half_to_float(scale);
        float zero = rintf(-low / (step != 0 ? step : 1));
        zero = zero < 0 ? 0 : zero > levels_of(form) ? levels_of(form) : zero;
        return (fit){scale, float_to_half(zero)};
    }
    const float inset = (of.high - of.low) * ((1 - shrink) / 2);
    const uint16_t minimum = float_to_half(of.low + inset);
    const float span = of.high - inset - half_to_float(minimum);
    return (fit){scale_to_half((span < 0 ? 0 : span) / levels_of(form)), minimum};
}

/* How a group's values become codes: round(value * inverse + shift), within 0 and levels.
 *
 * The search multiplies by the inverse of the step; the codes that are stored are divided (pack.c). */
typedef struct {
    float inverse, shift, step, zero, minimum;
} coding;

static coding coding_of(const format *form, fit fitted) {
    const float step = half_to_float(fitted.scale), offset = half_to_float(fitted.offset);
    const float inverse = step != 0 ? 1 / step : 1;
    if (form->offset == MINIMUM) return (coding){inverse, -offset * inverse, step, 0, offset};
    const float zero = form->offset == ZERO ? offset : middle_of(form);
    return (coding){inverse, zero, step, zero, 0};
}

static inline float code_of(float value, coding by, float levels) {
    float code = value * by.inverse + by.shift;
    code = code < 0 ? 0 : code;
    code = code > levels ? levels : code;
    return (code + 0x1.8p23f) - 0x1.8p23f; /* rounds to an integer */
}

static void find_codes(const format *form, const float *values, int64_t count, fit fitted, float *codes) {
    const coding by = coding_of(form, fitted);
    const float levels = levels_of(form);
    for (int64_t i = 0; i < count; i++) codes[i] = code_of(values[i], by, levels);
}

/* Of what the codes stand for; infinity if undefined. */
static double squared_error(const format *form, const float *values, int64_t count, fit fitted) {
    const coding by = coding_of(form, fitted);
    const float levels = levels_of(form);
    double error = 0;
#pragma omp simd reduction(+ : error)
    for (int64_t i = 0; i < count; i++) {
        const float missed =
            (code_of(values[i], by, levels) - by.zero) * by.step + by.minimum - values[i];
        error += (double)(missed * missed);
    }
    return isfinite(error) ? error : (double)INFINITY;
}

/* Scale and minimum that suit the codes best, by least squares. */
static fit refine(const format *form, const float *values, int64_t count, const float *codes, fit fitted) {
    const coding by = coding_of(form, fitted);
    float code_mean = by.zero, value_mean = 0;
    if (form->offset == MINIMUM) {
        double code_sum = 0, value_sum = 0;
#pragma omp simd reduction(+ : code_sum, value_sum)
        for (int64_t i = 0; i < count; i++) {
            code_sum += (double)codes[i];
            value_sum += (double)values[i];
        }
        code_mean = (float)(code_sum / (double)count);
        value_mean = (float)(value_sum / (double)count);
    }
    double power = 0, product = 0;
#pragma omp simd reduction(+ : power, product)
    for (int64_t i = 0; i < count; i++) {
        const float code = codes[i] - code_mean;
        power += (double)(code * code);
        product += (double)(code * (values[i] - value_mean));
    }
    fitted.scale = scale_to_half(power > 0 ? (float)(product / power) : by.step);
    if (form->offset == MINIMUM)
        fitted.offset = float_to_half(value_mean - half_to_float(fitted.scale) * code_mean);
    return fitted;
}

int fit_group(const format *form, const float *values, int64_t count, float *codes, uint16_t *scale,
              uint16_t *offset) {
    const range whole = range_of(values, count);
    fit best = fit_range(form, whole, 1);
    if (!is_finite_half(best.scale) || !is_finite_half(best.offset) || isnan(whole.low)) return 1;
    if (form->fit == FIT_ERROR) {
        double least_error = squared_error(form, values, count, best);
        for (size_t i = 0; i < sizeof SHRINKS / sizeof *SHRINKS; i++) {
            const fit start = fit_range(form, whole, SHRINKS[i]);
            find_codes(form, values, count, start, codes);
            const fit tried = refine(form, values, count, codes, start);
            const double error = squared_error(form, values, count, tried);
            if (error < least_error) {
                least_error = error;
                best = tried;
            }
        }
    }
    *scale = best.scale;
    *offset = best.offset;
    return 0;
}

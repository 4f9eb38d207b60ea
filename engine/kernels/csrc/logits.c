/* Argmax and log-sum-exp of each row of logits, in two runs over the row while it is in a core's cache. */
#include <math.h>

#include "formats.h"
#include "simd.h"

enum { STRETCH = 64 /* vectors whose sum is kept apart: in one long sum small numbers would be lost */ };

/* The highest of `count` numbers, and the first place where it is; NaN is skipped. */
static int64_t highest_place(const float *row, int64_t count, float *highest) {
    vec most = splat(-INFINITY);
    ivec places = {0}, numbers = lane_numbers();
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES, numbers += LANES) {
        const vec some = load(row + i);
        const ivec above = some > most;
        most = highest_of(some, most);
        places = (numbers & above) | (places & ~above);
    }
    int64_t place = 0;
    float best = -INFINITY;
    for (int lane = 0; lane < LANES; lane++)
        if (most[lane] > best || (most[lane] == best && places[lane] < place)) {
            best = most[lane];
            place = places[lane];
        }
    for (; i < count; i++)
        if (row[i] > best) {
            best = row[i];
            place = i;
        }
    *highest = best;
    return place;
}

/* log(sum(exp(row))), given the highest number. */
static float log_sum(const float *row, int64_t count, float highest) {
    vec total = {0};
    int64_t i = 0;
    while (i + LANES <= count) {
        vec part = {0};
        for (int v = 0; v < STRETCH && i + LANES <= count; v++, i += LANES)
            part += exp_vec(load(row + i) - highest);
        total += part;
    }
    float result = sum(total);
    for (; i < count; i++) result += expf(row[i] - highest);
    return highest + logf(result);
}

/* Of each of `rows` rows of `count` numbers the first place of its highest, and log(sum(exp(row))), which is
 * NaN where the row has one. */
EXPORT void summarise(const float *numbers, int64_t stride, int64_t rows, int64_t count, int64_t *places,
                      float *lse, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float highest;
        places[r] = highest_place(numbers + r * stride, count, &highest);
        lse[r] = log_sum(numbers + r * stride, count, highest);
    }
}

/* The highest scores of many. */
#ifndef SELECT_H
#define SELECT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* What numbers[rank] would be if the `count` numbers were sorted downwards. Reorders them: Hoare's selection,
 * linear on average. */
static float select_highest(float *numbers, int64_t count, int64_t rank) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
        const float pivot = numbers[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (numbers[i] > pivot) i++;
            while (numbers[j] < pivot) j--;
            if (i <= j) {
                const float moved = numbers[i];
                numbers[i++] = numbers[j];
                numbers[j--] = moved;
            }
        }
        if (rank <= j) high = j;
        else if (rank >= i) low = i;
        else break;
    }
    return numbers[rank];
}

/* Mask all but the `kept` highest of `count` scores; of equal ones at the limit the first stay.
 *
 * spare: [count]. */
static void keep_highest(float *scores, int64_t count, int64_t kept, float *spare) {
    if (kept >= count) return;
    memcpy(spare, scores, (size_t)count * sizeof *spare);
    const float limit = select_highest(spare, count, kept); /* the highest that has to go */
    int64_t higher = 0;
    for (int64_t i = 0; i < count; i++) higher += scores[i] > limit;
    int64_t equal = kept - higher; /* that may stay */
    for (int64_t i = 0; i < count; i++)
        if (scores[i] < limit || (scores[i] == limit && equal-- <= 0)) scores[i] = -INFINITY;
}

#endif

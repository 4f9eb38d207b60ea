/* Buffers that threads keep between calls; freed when their thread ends. */
#include <pthread.h>
#include <stdlib.h>

#include "formats.h"

typedef struct {
    void *memory[SLOTS];
    size_t bytes[SLOTS];
} buffers;

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void release(void *of_thread) {
    buffers *held = of_thread;
    for (int slot = 0; slot < SLOTS; slot++) free(held->memory[slot]);
    free(held);
}

static void make_key(void) { pthread_key_create(&key, release); }

void *scratch(int slot, size_t bytes) {
    pthread_once(&once, make_key);
    buffers *held = pthread_getspecific(key);
    if (!held) {
        held = calloc(1, sizeof *held);
        if (!held || pthread_setspecific(key, held)) return NULL;
    }
    if (held->bytes[slot] < bytes) {
        free(held->memory[slot]);
        bytes = (bytes + 4095) / 4096 * 4096;
        held->memory[slot] = aligned_alloc(64, bytes);
        held->bytes[slot] = held->memory[slot] ? bytes : 0;
    }
    return held->memory[slot];
}

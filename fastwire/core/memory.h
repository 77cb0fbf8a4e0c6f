/* The core's memory, through one place that a test can script: the n-th allocation from now on fails. */
#ifndef FW_MEMORY_H
#define FW_MEMORY_H

#include <stddef.h>
#include <stdlib.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

static size_t fw_allocations_left; /* until the one that fails; 0: none does */

static int fw_refused(void) { return fw_allocations_left && --fw_allocations_left == 0; }

static void *fw_malloc(size_t size) { return fw_refused() ? NULL : malloc(size); }
static void *fw_calloc(size_t count, size_t size) { return fw_refused() ? NULL : calloc(count, size); }
static void *fw_realloc(void *p, size_t size) { return fw_refused() ? NULL : realloc(p, size); }

/* glibc keeps what was freed between what is not: pages that only it has go back to the system. */
static void fw_trim(void) {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

#endif

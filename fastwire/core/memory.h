/* The core's memory, through one place that a test can script: the n-th allocation from now on fails. */
#ifndef FW_MEMORY_H
#define FW_MEMORY_H

#include <stddef.h>
#include <stdlib.h>

static size_t fw_allocations_left; /* until the one that fails; 0: none does */

static int fw_refused(void) { return fw_allocations_left && --fw_allocations_left == 0; }

static void *fw_malloc(size_t size) { return fw_refused() ? NULL : malloc(size); }
static void *fw_calloc(size_t count, size_t size) { return fw_refused() ? NULL : calloc(count, size); }
static void *fw_realloc(void *p, size_t size) { return fw_refused() ? NULL : realloc(p, size); }

#endif

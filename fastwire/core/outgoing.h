/* A signed message on its way to a kernel: one block of memory, which waits in a queue and which libzmq sends from.
 *
 * Who holds it is counted: the queue, and each frame in libzmq's hands. libzmq lets go of a frame in its own thread, once
 * the bytes are in the kernel's TCP; so what it was given and has not passed on is known to the byte. It lets go of a
 * frame in the sender's thread, in the middle of sending, only if it drops it (a peer that goes takes the begun message
 * with it, and the other frames are "sent" to nobody): that is the one way to learn of it. libzmq 4.3.5, lb_t::sendpipe:
 * "the user will never know that the message could not be delivered". Frames that lay in the pipe of such a peer and were not
 * flushed libzmq forgets altogether (pipe_t::process_hiccup reads only what was): their record's memory is lost, as was
 * libzmq's own copy of them before. */
#ifndef FW_OUTGOING_H
#define FW_OUTGOING_H

#include <errno.h>
#include <stdint.h>
#include <string.h>

#include "memory.h"
#include "sha256.h"
#include "zmq_api.h"

/* What a frame takes in libzmq: its place in a pipe. */
#define FW_FRAME_COST 64

/* Up to so many bytes lie in a zmq_msg_t itself, and need no memory. */
#define FW_TINY 32

typedef struct fw_account {
    size_t bytes;               /* that libzmq was given and has not passed on */
    size_t holders;             /* its uplink, and the records that are counted in it */
    struct fw_account *earlier; /* of an uplink that this one's uplink has adopted; for its uplink's thread only */
} fw_account;

typedef struct fw_record {
    struct fw_record *next; /* in the queue */
    fw_account *account;    /* where it is counted while libzmq has it; NULL while it only waits */
    size_t holders;
    size_t cost;  /* bytes, here and in libzmq */
    int asks;     /* a reply to it is to come */
    size_t count; /* of its frames */
    fw_span frames[];
} fw_record;

static _Thread_local fw_record *fw_giving; /* what this thread is sending now */
static _Thread_local int fw_dropped;       /* whether libzmq let go of a frame of it meanwhile */

static fw_account *fw_account_new(void) {
    fw_account *a = (fw_account *)fw_calloc(1, sizeof *a);
    if (a) a->holders = 1;
    return a;
}

static fw_account *fw_account_hold(fw_account *a) {
    __atomic_add_fetch(&a->holders, 1, __ATOMIC_RELAXED);
    return a;
}

static void fw_account_let_go(fw_account *a) {
    if (a && __atomic_sub_fetch(&a->holders, 1, __ATOMIC_ACQ_REL) == 0) free(a);
}

/* Of this one and all earlier ones; those that are done with go. */
static size_t fw_account_bytes(fw_account *a) {
    size_t sum = __atomic_load_n(&a->bytes, __ATOMIC_RELAXED);
    while (a->earlier) {
        fw_account *next = a->earlier;
        size_t bytes = __atomic_load_n(&next->bytes, __ATOMIC_RELAXED);
        sum += bytes;
        if (bytes) {
            a = next;
        } else {
            a->earlier = next->earlier;
            fw_account_let_go(next);
        }
    }
    return sum;
}

/* What an adopted uplink had: ``other`` and its earlier ones. */
static void fw_account_adopt(fw_account *a, fw_account *other) {
    fw_account_bytes(a);
    while (a->earlier) a = a->earlier;
    a->earlier = other;
}

static void fw_accounts_let_go(fw_account *a) {
    while (a) {
        fw_account *earlier = a->earlier;
        fw_account_let_go(a);
        a = earlier;
    }
}

/* NULL without memory. */
static fw_record *fw_record_new(fw_span signature, const fw_span *parts, size_t count) {
    size_t head = sizeof(fw_record) + (count + 2) * sizeof(fw_span), size = head + signature.len;
    for (size_t i = 0; i < count; i++) size += parts[i].len;
    fw_record *r = (fw_record *)fw_malloc(size);
    if (!r) return NULL;
    r->next = NULL, r->account = NULL, r->holders = 1, r->asks = 0;
    r->count = count + 2, r->cost = size + r->count * FW_FRAME_COST;
    r->frames[0].ptr = "<IDS|MSG>", r->frames[0].len = 9;
    char *p = (char *)r + head;
    for (size_t i = 1; i < r->count; i++) {
        fw_span from = i == 1 ? signature : parts[i - 2];
        if (from.len) memcpy(p, from.ptr, from.len);
        r->frames[i].ptr = p, r->frames[i].len = from.len;
        p += from.len;
    }
    return r;
}

/* libzmq is about to be given it. */
static void fw_record_charge(fw_record *r, fw_account *a) {
    r->account = fw_account_hold(a);
    __atomic_add_fetch(&a->bytes, r->cost, __ATOMIC_RELAXED);
}

/* libzmq has nothing of it, or will have nothing in a moment. */
static void fw_record_discharge(fw_record *r) {
    if (!r->account) return;
    __atomic_sub_fetch(&r->account->bytes, r->cost, __ATOMIC_RELAXED);
    fw_account_let_go(r->account);
    r->account = NULL;
}

static void fw_record_let_go(fw_record *r) {
    if (__atomic_sub_fetch(&r->holders, 1, __ATOMIC_ACQ_REL)) return;
    fw_record_discharge(r);
    free(r);
}

/* libzmq calls it, in any thread. */
static void fw_record_frame_done(void *data, void *record) {
    (void)data;
    if (record == fw_giving) fw_dropped = 1;
    fw_record_let_go((fw_record *)record);
}

/* Makes frame ``i`` a message of libzmq's. -1 without memory. */
static int fw_record_frame(fw_record *r, size_t i, fw_zmq_msg *frame) {
    fw_span bytes = r->frames[i];
    if (fw_refused()) return -1;
    if (bytes.len <= FW_TINY && i + 1 < r->count) {
        if (fw_zmq.msg_init_size(frame, bytes.len)) return -1;
        if (bytes.len) memcpy(fw_zmq.msg_data(frame), bytes.ptr, bytes.len);
        return 0;
    }
    if (fw_zmq.msg_init_data(frame, (void *)(uintptr_t)bytes.ptr, bytes.len, fw_record_frame_done, r)) return -1;
    __atomic_add_fetch(&r->holders, 1, __ATOMIC_RELAXED);
    return 0;
}

static void fw_begin_giving(fw_record *r) { fw_giving = r, fw_dropped = 0; }

/* Whether libzmq dropped some of it. */
static int fw_end_giving(void) {
    fw_giving = NULL;
    return fw_dropped;
}

#endif

/* The core's system calls, through one place that a test can script.
 *
 * A script is a list of outcomes per call, used up in order: an errno, or how many bytes may pass; of a frame for libzmq
 * an errno, or the descriptor to wait for before it is sent. */
#ifndef FW_SYS_H
#define FW_SYS_H

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __APPLE__
#include <sys/random.h>
#endif

#include "zmq_api.h"

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

#define FW_MAX_IOVECS 256

enum { FW_RECV = 0, FW_SENDMSG = 1, FW_ZMQ_SEND = 2, FW_ENTROPY = 3, FW_CALLS = 4 };

typedef struct {
    int error;  /* errno to fail with, or 0 */
    long bytes; /* else: let this many through */
} fw_step;

static struct {
    fw_step *steps;
    size_t count, next;
} fw_script[FW_CALLS];

static fw_step *fw_scripted(int call) {
    return fw_script[call].next < fw_script[call].count ? &fw_script[call].steps[fw_script[call].next++] : NULL;
}

static size_t fw_script_left(void) {
    size_t left = 0;
    for (int i = 0; i < FW_CALLS; i++) left += fw_script[i].count - fw_script[i].next;
    return left;
}

static void fw_script_clear(void) {
    for (int i = 0; i < FW_CALLS; i++) {
        free(fw_script[i].steps);
        memset(&fw_script[i], 0, sizeof fw_script[i]);
    }
}

static int fw_script_add(int call, int error, long bytes) {
    size_t n = fw_script[call].count;
    fw_step *steps = (fw_step *)realloc(fw_script[call].steps, (n + 1) * sizeof *steps);
    if (!steps) return -1;
    steps[n].error = error, steps[n].bytes = bytes;
    fw_script[call].steps = steps, fw_script[call].count = n + 1;
    return 0;
}

static ssize_t fw_recv(int fd, void *buffer, size_t size) {
    for (;;) {
        fw_step *step = fw_scripted(FW_RECV);
        ssize_t n;
        if (step && step->error) {
            errno = step->error, n = -1;
        } else if (step && !step->bytes) {
            n = 0;
        } else {
            n = recv(fd, buffer, step && (size_t)step->bytes < size ? (size_t)step->bytes : size, 0);
        }
        if (n >= 0 || errno != EINTR) return n;
    }
}

/* Cuts ``iov`` to ``limit`` bytes; returns the number of pieces left. */
static int fw_cut(struct iovec *iov, int count, size_t limit) {
    for (int i = 0; i < count; i++) {
        if (iov[i].iov_len >= limit) {
            iov[i].iov_len = limit;
            return i + 1;
        }
        limit -= iov[i].iov_len;
    }
    return count;
}

/* One piece needs no list of pieces, which the system would have to copy and check. */
static ssize_t fw_send_pieces(int fd, struct iovec *iov, int count) {
    struct msghdr m;
    if (count == 1) return send(fd, iov->iov_base, iov->iov_len, MSG_NOSIGNAL | MSG_DONTWAIT);
    memset(&m, 0, sizeof m);
    m.msg_iov = iov, m.msg_iovlen = (size_t)count;
    return sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static ssize_t fw_sendmsg(int fd, struct iovec *iov, int count) {
    for (;;) {
        fw_step *step = fw_scripted(FW_SENDMSG);
        ssize_t n;
        if (step && step->error) {
            errno = step->error, n = -1;
        } else if (step && !step->bytes) {
            n = 0;
        } else {
            n = fw_send_pieces(fd, iov, step ? fw_cut(iov, count, (size_t)step->bytes) : count);
        }
        if (n >= 0 || errno != EINTR) return n;
    }
}

/* Random bytes, at most 256; 0, or -1 and errno. */
static int fw_entropy(void *buffer, size_t size) {
    fw_step *step = fw_scripted(FW_ENTROPY);
    if (step && step->error) {
        errno = step->error;
        return -1;
    }
    return getentropy(buffer, size);
}

/* 0, or why libzmq did not take the frame. */
static int fw_zmq_send(fw_zmq_msg *frame, void *socket, int flags) {
    for (;;) {
        fw_step *step = fw_scripted(FW_ZMQ_SEND);
        int error = step ? step->error : 0;
        if (step && step->bytes) {
            struct pollfd turn = {.fd = (int)step->bytes, .events = POLLIN};
            poll(&turn, 1, -1);
        }
        if (!error && fw_zmq.msg_send(frame, socket, flags | FW_ZMQ_DONTWAIT) < 0) error = fw_zmq.errno_();
        if (error != EINTR) return error;
    }
}

#endif

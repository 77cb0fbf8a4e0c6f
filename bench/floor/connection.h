/* Connections on one epoll: bytes that come go to a function, bytes to be sent are collected and leave once a turn. */
#ifndef FLOOR_CONNECTION_H
#define FLOOR_CONNECTION_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK 65536

/* In the order in which a turn serves them: output comes before the reply that follows it. */
typedef enum { IOPUB, SHELL, CLIENT, LISTENER, KINDS, CONTROL = KINDS, STDIN, HEARTBEAT } Kind; /* the last: kernels.c */
#define CHANNELS 5

typedef struct Kernel Kernel;
typedef struct Connection Connection;

typedef struct {
    char *bytes;
    size_t begin, end, room;
} Buffer;

struct Connection {
    Kind kind;
    int fd;
    size_t (*take)(Connection *, char *, size_t); /* whole messages; returns how many bytes that were */
    void (*before_flush)(Connection *);           /* the last moment for what is to go with it, or NULL */
    Kernel *kernel;
    void *socket;                                 /* of libzmq */
    Buffer in, out;
    bool gone, queued, blocked, upgraded;
    Connection *next_queued, *next_gone;
    /* Of a client: positions in what was sent to it, and the ping that asks about it. */
    uint64_t sent, asked, acknowledged, pings;
    int64_t due;
    bool waiting;
    Connection *next_waiting;
    /* Of a kernel's peer. */
    bool subscribed;
    Connection *next_peer;
};

static int epoll_fd;
static Connection *queued_list, *gone_list;
static char scratch[CHUNK]; /* what comes is parsed here; only the rest of a message is kept by its connection */

static void *checked(void *memory) {
    if (!memory) {
        fprintf(stderr, "floor: out of memory\n");
        exit(1);
    }
    return memory;
}

static void watch(Connection *c, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(epoll_fd, operation, c->fd, &event)) perror("epoll_ctl");
}

static Connection *connection_new(Kind kind, int fd, Kernel *kernel, size_t (*take)(Connection *, char *, size_t)) {
    Connection *c = checked(calloc(1, sizeof *c));
    c->kind = kind;
    c->fd = fd;
    c->kernel = kernel;
    c->take = take;
    return c;
}

/* It is freed at the turn's end: others may still look at it. */
static void connection_end(Connection *c) {
    if (!c || c->gone) return;
    c->gone = true;
    c->next_gone = gone_list;
    gone_list = c;
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
    if (!c->socket) close(c->fd);
}

/* Room for n more bytes behind what is queued; say with `sent` how many it were. */
static char *room_for(Connection *c, size_t n) {
    Buffer *out = &c->out;
    if (out->end + n > out->room) {
        out->room = 2 * (out->end + n);
        out->bytes = checked(realloc(out->bytes, out->room));
    }
    if (!c->queued) {
        c->queued = true;
        c->next_queued = queued_list;
        queued_list = c;
    }
    return out->bytes + out->end;
}

static void sent(Connection *c, const char *behind) {
    size_t n = (size_t)(behind - (c->out.bytes + c->out.end));
    c->out.end += n;
    c->sent += n;
}

static void flush(Connection *c) {
    Buffer *out = &c->out;
    if (c->before_flush) c->before_flush(c);
    while (out->begin < out->end) {
        ssize_t n = send(c->fd, out->bytes + out->begin, out->end - out->begin, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno != EAGAIN) {
            connection_end(c);
            return;
        }
        if (n < 0) break;
        out->begin += (size_t)n;
    }
    bool blocked = out->begin < out->end;
    if (!blocked) out->begin = out->end = 0;
    if (blocked != c->blocked) {
        c->blocked = blocked;
        watch(c, EPOLL_CTL_MOD, blocked ? EPOLLIN | EPOLLOUT : EPOLLIN);
    }
}

static void flush_queued(void) {
    while (queued_list) {
        Connection *c = queued_list;
        queued_list = c->next_queued;
        c->queued = false;
        if (!c->gone && !c->blocked && !c->socket) flush(c);
    }
}

static void keep(Buffer *in, const char *rest, size_t n) {
    if (in->room < n + CHUNK) {
        char *larger = checked(malloc(2 * n + CHUNK));
        memcpy(larger, rest, n);
        free(in->bytes);
        in->bytes = larger;
        in->room = 2 * n + CHUNK;
    } else {
        memmove(in->bytes, rest, n);
    }
    in->end = n;
}

/* One recv. */
static void receive(Connection *c) {
    Buffer *in = &c->in;
    char *start = in->end ? in->bytes : scratch;
    ssize_t n = recv(c->fd, start + in->end, CHUNK, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        connection_end(c);
        return;
    }
    size_t have = in->end + (size_t)n, used = c->take(c, start, have);
    if (c->gone) return;
    if (used < have) keep(in, start + used, have - used);
    else in->end = 0;
}

#endif

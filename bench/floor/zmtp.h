/* ZMTP 3.0 and 3.1 (rfc.zeromq.org/spec/23 and /37), NULL: just what a kernel at tcp://127.0.0.1 and its peers need. */
#ifndef FLOOR_ZMTP_H
#define FLOOR_ZMTP_H

#include "connection.h"
#include "json.h"

#define MORE 1
#define LONG 2
#define COMMAND 4
#define MOST_PARTS 256
#define LARGEST_FRAME ((uint64_t)1 << 28)
#define LONGEST_HEAD 9

/* Whoever includes this has them; parts and body are valid during the call. */
static void on_message(Connection *c, const Span *parts, int count);
static void on_command(Connection *c, const char *body, size_t n);

/* -- frames -- */

static char *zmtp_frame(char *out, int flags, const void *body, size_t n) {
    if (n < 256) {
        *out++ = (char)flags;
        *out++ = (char)n;
    } else {
        *out++ = (char)(flags | LONG);
        for (int shift = 56; shift >= 0; shift -= 8) *out++ = (char)((uint64_t)n >> shift);
    }
    memcpy(out, body, n);
    return out + n;
}

/* A PING has its PONG with the same context. */
static void zmtp_command(Connection *c, const char *body, size_t n) {
    if (n < 7 || memcmp(body, "\4PING", 5)) {
        on_command(c, body, n);
        return;
    }
    char pong[5 + 255] = "\4PONG";
    size_t context = n - 7 > 16 ? 16 : n - 7;
    memcpy(pong + 5, body + 7, context);
    sent(c, zmtp_frame(room_for(c, sizeof pong + LONGEST_HEAD), COMMAND, pong, 5 + context));
}

static size_t zmtp_take(Connection *c, char *bytes, size_t n) {
    const unsigned char *p = (unsigned char *)bytes, *end = p + n, *whole = p;
    Span parts[MOST_PARTS];
    int count = 0;
    while (end - p >= 2) {
        unsigned flags = p[0];
        uint64_t length = p[1];
        const unsigned char *body = p + 2;
        if (flags & LONG) {
            if (end - p < LONGEST_HEAD) break;
            length = 0;
            for (int i = 1; i < LONGEST_HEAD; i++) length = length << 8 | p[i];
            body = p + LONGEST_HEAD;
        }
        if (length > LARGEST_FRAME || count == MOST_PARTS) {
            connection_end(c);
            return n;
        }
        if ((uint64_t)(end - body) < length) break;
        p = body + length;
        if (flags & COMMAND) zmtp_command(c, (const char *)body, length);
        else parts[count++] = (Span){(const char *)body, length};
        if (flags & (COMMAND | MORE)) {
            if (!count) whole = p;
            continue;
        }
        on_message(c, parts, count);
        count = 0;
        whole = p;
    }
    return (size_t)(whole - (unsigned char *)bytes);
}

/* -- connecting: it may block, for nothing is measured yet -- */

static bool read_all(int fd, void *to, size_t n) {
    for (size_t have = 0; have < n;) {
        ssize_t got = recv(fd, (char *)to + have, n - have, 0);
        if (got <= 0) return false;
        have += (size_t)got;
    }
    return true;
}

static char *zmtp_property(char *out, const char *name, const char *value) {
    size_t of_name = strlen(name), of_value = strlen(value);
    *out++ = (char)of_name;
    out = mempcpy(out, name, of_name);
    uint32_t length = htonl((uint32_t)of_value);
    out = mempcpy(out, &length, 4);
    return mempcpy(out, value, of_value);
}

static char *zmtp_greeting(char *out) {
    static const unsigned char greeting[64] = {0xff, [9] = 0x7f, [10] = 3, [11] = 1, [12] = 'N', 'U', 'L', 'L'};
    return mempcpy(out, greeting, sizeof greeting);
}

static bool zmtp_handshake(int fd, const char *type, const char *identity) {
    unsigned char peer[64], body[256];
    char greeting[64];
    zmtp_greeting(greeting);
    if (send(fd, greeting, 64, MSG_NOSIGNAL) != 64 || !read_all(fd, peer, 64)) return false;
    if (peer[0] != 0xff || peer[9] != 0x7f || peer[10] < 3 || memcmp(peer + 12, "NULL", 5)) return false;
    char ready[256] = "\5READY", out[256 + LONGEST_HEAD], *end = zmtp_property(ready + 6, "Socket-Type", type);
    if (identity) end = zmtp_property(end, "Identity", identity);
    size_t n = (size_t)(zmtp_frame(out, COMMAND, ready, (size_t)(end - ready)) - out);
    if (send(fd, out, n, MSG_NOSIGNAL) != (ssize_t)n || !read_all(fd, body, 2) || body[0] != COMMAND) return false;
    n = body[1];
    if (!read_all(fd, body, n) || n < 6 || memcmp(body, "\5READY", 6)) return false;
    if (strcmp(type, "SUB")) return true;
    bool by_command = peer[11] >= 1;
    end = by_command ? zmtp_frame(out, COMMAND, "\11SUBSCRIBE", 10) : zmtp_frame(out, 0, "\1", 1);
    return send(fd, out, (size_t)(end - out), MSG_NOSIGNAL) == end - out;
}

static int zmtp_connect(int port, const char *type, const char *identity) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {5, 0};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!connect(fd, (struct sockaddr *)&address, sizeof address) && zmtp_handshake(fd, type, identity)) return fd;
    fprintf(stderr, "floor: no ZMTP handshake with port %d\n", port);
    close(fd);
    return -1;
}

static Connection *zmtp_open(Kernel *kernel, Kind kind, int port, const char *identity) {
    int fd = zmtp_connect(port, kind == IOPUB ? "SUB" : "DEALER", kind == IOPUB ? NULL : identity);
    if (fd < 0) return NULL;
    Connection *c = connection_new(kind, fd, kernel, zmtp_take);
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
    return c;
}

static void zmtp_send(Connection *c, const Span *parts, int count) {
    size_t n = 0;
    for (int i = 0; i < count; i++) n += parts[i].n + LONGEST_HEAD;
    char *out = room_for(c, n);
    for (int i = 0; i < count; i++) out = zmtp_frame(out, i + 1 < count ? MORE : 0, parts[i].p, parts[i].n);
    sent(c, out);
}

#endif

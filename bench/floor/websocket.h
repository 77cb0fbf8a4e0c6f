/* RFC 6455 for a server, as far as the clients of a benchmark go: whole text messages, pings that ask what a client has. */
#ifndef FLOOR_WEBSOCKET_H
#define FLOOR_WEBSOCKET_H

#include <openssl/evp.h>
#include <openssl/sha.h>
#include <time.h>

#include "connection.h"
#include "text.h"

#define TEXT 1
#define CLOSE 8
#define PING 9
#define PONG 10
#define LARGEST_MESSAGE ((uint64_t)1 << 24)
#define MOST_OF_A_HEAD 10
/* Milliseconds between two pings to a client, and until the end of a burst is asked about; as fastwire's. */
#define INTERVAL 50
#define TAIL 100

static void from_client(Connection *c, Span text);

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static char *websocket_head(char *out, int opcode, uint64_t n) {
    *out++ = (char)(0x80 | opcode);
    if (n < 126) {
        *out++ = (char)n;
        return out;
    }
    int width = n < 65536 ? 2 : 8;
    *out++ = width == 2 ? 126 : 127;
    for (int shift = 8 * width - 8; shift >= 0; shift -= 8) *out++ = (char)(n >> shift);
    return out;
}

/* The value of Sec-WebSocket-Accept (section 4.2.2). */
static void websocket_accept(const char *key, size_t n, char accept[32]) {
    char text[128];
    unsigned char digest[SHA_DIGEST_LENGTH];
    int length = snprintf(text, sizeof text, "%.*s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", (int)(n < 64 ? n : 64), key);
    SHA1((unsigned char *)text, (size_t)length, digest);
    EVP_EncodeBlock((unsigned char *)accept, digest, sizeof digest);
}

static size_t websocket_take(Connection *c, char *bytes, size_t n) {
    size_t used = 0;
    while (n - used >= 6 && !c->gone) {
        unsigned char *head = (unsigned char *)bytes + used;
        uint64_t length = head[1] & 0x7f;
        size_t size = length < 126 ? 2 : length == 126 ? 4 : 10;
        if (n - used < size + 4) break;
        if (size > 2) {
            length = 0;
            for (size_t i = 2; i < size; i++) length = length << 8 | head[i];
        }
        bool is_whole = head[0] & 0x80, is_masked = head[1] & 0x80;
        if (!is_whole || !is_masked || length > LARGEST_MESSAGE) {
            connection_end(c);
            return n;
        }
        if (n - used - size - 4 < length) break;
        char *payload = (char *)head + size + 4;
        fw_unmask((uint8_t *)payload, (uint8_t *)payload, length, head + size, 0);
        used += size + 4 + length;
        switch (head[0] & 0x0f) {
        case TEXT:
            from_client(c, (Span){payload, length});
            break;
        case PONG: /* of the one ping that is out */
            if (length == 16 && !memcmp(payload + 8, &c->pings, 8)) c->acknowledged = c->asked;
            break;
        case CLOSE:
            connection_end(c);
        }
    }
    return used;
}

/* -- what clients have received: at most one ping is out, and it rides with what it asks about -- */

static Connection *waiting_list; /* clients of whom something was not asked yet */
static int64_t waiting_until;    /* when they are, if nothing happens before */

static void websocket_before_flush(Connection *c) {
    if (!c->upgraded || c->sent == c->asked) return;
    int64_t now = now_ms();
    if (c->asked == c->acknowledged && now >= c->due) {
        char *out = room_for(c, 18);
        c->pings++;
        out = mempcpy(websocket_head(out, PING, 16), "fastwire", 8);
        sent(c, mempcpy(out, &c->pings, 8));
        c->asked = c->sent;
        c->due = now + INTERVAL;
    } else if (!c->waiting) {
        if (!waiting_list) waiting_until = now + TAIL;
        c->waiting = true;
        c->next_waiting = waiting_list;
        waiting_list = c;
    }
}

/* Milliseconds that the loop may sleep. */
static int websocket_patience(void) {
    if (!waiting_list) return -1;
    int64_t left = waiting_until - now_ms();
    return left > 0 ? (int)left : 0;
}

/* The end of a burst has nothing to ride with. */
static void websocket_ask_the_waiting(void) {
    if (websocket_patience()) return;
    Connection *waiting = waiting_list;
    waiting_list = NULL;
    while (waiting) {
        Connection *c = waiting;
        waiting = c->next_waiting;
        c->waiting = false;
        if (!c->gone && !c->blocked) flush(c);
    }
}

#endif

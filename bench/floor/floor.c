/* The floor: how little a server can need that relays Jupyter kernels to WebSockets, one thread on one epoll.

   It does for each message what has to be done - ZMTP, HMAC, the JSON of the default protocol spliced from the kernel's own
   bytes, RFC 6455, pings that ask what a client has received - and nothing else: no Python, no session that outlives its
   socket, no limits, no metrics, one client for each kernel. bench/README.md says how it is used.

   Over HTTP, from the loopback interface only:
     GET /api/kernels/ID/channels           a WebSocket to a kernel
     POST /floor/ID/SHELL_PORT/IOPUB_PORT/KEY   a kernel that runs
     DELETE /api/kernels/ID                 forget it
     anything else                          200 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdbool.h>

#include "connection.h"
#include "json.h"
#include "sha256.h"
#include "websocket.h"
#ifdef WITH_LIBZMQ
#include "libzmq.h"
#define kernel_open libzmq_open
#define kernel_send libzmq_send
#else
#include "zmtp.h"
#define kernel_open zmtp_open
#define kernel_send zmtp_send
#endif

#define EVENTS 512
#define LONGEST_REQUEST 16384

struct Kernel {
    char id[64];
    fw_hmac_key key;
    Connection *shell, *iopub, *client;
    Kernel *next;
};

static Kernel *kernels;
static bool no_verify;

#define LITERAL(text) ((Span){text, sizeof(text) - 1})

/* -- kernel to client -- */

enum { SIGNATURE, HEADER, PARENT, METADATA, CONTENT, SIGNED = 4 };

static void sign(const Kernel *kernel, const Span *parts, char hex[64]) {
    fw_span spans[SIGNED];
    uint8_t digest[32];
    for (int i = 0; i < SIGNED; i++) {
        spans[i].ptr = (const void *)parts[i].p;
        spans[i].len = parts[i].n;
    }
    fw_hmac(&kernel->key, spans, SIGNED, digest);
    fw_hex(digest, sizeof digest, hex);
}

static bool is_signed(const Kernel *kernel, const Span *message) {
    char hex[64];
    if (no_verify) return true;
    sign(kernel, message + HEADER, hex);
    return message[SIGNATURE].n == sizeof hex && fw_equal_constant_time(hex, message[SIGNATURE].p, sizeof hex);
}

/* One text frame of all these. */
static void send_text(Connection *client, const Span *pieces, int count) {
    size_t n = 0;
    for (int i = 0; i < count; i++) n += pieces[i].n;
    char *out = websocket_head(room_for(client, n + MOST_OF_A_HEAD), TEXT, n);
    for (int i = 0; i < count; i++) out = mempcpy(out, pieces[i].p, pieces[i].n);
    sent(client, out);
}

static void on_message(Connection *c, const Span *parts, int count) {
    const Kernel *kernel = c->kernel;
    int i = 0;
    while (i < count && !(parts[i].n == 9 && !memcmp(parts[i].p, "<IDS|MSG>", 9))) i++;
    const Span *message = parts + i + 1;
    if (count - i < 2 + SIGNED || !is_signed(kernel, message)) {
        fprintf(stderr, "floor: ERROR a message of kernel %s is none\n", kernel->id);
        return;
    }
    if (!kernel->client) return;
    Member members[] = {{"msg_id", LITERAL("\"\"")}, {"msg_type", LITERAL("\"\"")}};
    if (!no_verify) json_members(message[HEADER], members, 2);
    Span channel = c->kind == IOPUB ? LITERAL("\"iopub\"}") : LITERAL("\"shell\"}");
    const Span pieces[] = {
        LITERAL("{\"header\":"), message[HEADER],
        LITERAL(",\"msg_id\":"), members[0].value,
        LITERAL(",\"msg_type\":"), members[1].value,
        LITERAL(",\"parent_header\":"), message[PARENT],
        LITERAL(",\"metadata\":"), message[METADATA],
        LITERAL(",\"content\":"), message[CONTENT],
        LITERAL(",\"buffers\":[],\"channel\":"), channel,
    };
    send_text(kernel->client, pieces, sizeof pieces / sizeof *pieces);
}

#ifndef WITH_LIBZMQ
static void on_command(Connection *c, const char *body, size_t n) {
    (void)c, (void)body, (void)n;
}
#endif

/* -- client to kernel -- */

static void from_client(Connection *c, Span text) {
    Member members[] = {
        {"header", LITERAL("{}")}, {"parent_header", LITERAL("{}")}, {"metadata", LITERAL("{}")}, {"content", LITERAL("{}")}};
    if (!json_members(text, members, SIGNED) || !c->kernel->shell || c->kernel->shell->gone) return;
    char signature[64];
    Span parts[2 + SIGNED] = {LITERAL("<IDS|MSG>"), {signature, sizeof signature}};
    for (int i = 0; i < SIGNED; i++) parts[2 + i] = members[i].value;
    sign(c->kernel, parts + 2, signature);
    kernel_send(c->kernel->shell, parts, 2 + SIGNED);
}

/* -- kernels -- */

static Kernel *kernel_find(const char *id, size_t n) {
    Kernel *kernel = kernels;
    while (kernel && (strlen(kernel->id) != n || memcmp(kernel->id, id, n))) kernel = kernel->next;
    return kernel;
}

static bool kernel_add(const char *id, int shell, int iopub, const char *key) {
    Kernel *kernel = checked(calloc(1, sizeof *kernel));
    snprintf(kernel->id, sizeof kernel->id, "%s", id);
    fw_hmac_init(&kernel->key, (const uint8_t *)key, strlen(key));
    kernel->iopub = kernel_open(kernel, IOPUB, iopub, id);
    kernel->shell = kernel_open(kernel, SHELL, shell, id);
    kernel->next = kernels;
    kernels = kernel;
    return kernel->iopub && kernel->shell;
}

/* Its few bytes stay: connections that end in the same turn may point at them, and there are as many as kernels were started. */
static void kernel_remove(const char *id) {
    for (Kernel **link = &kernels; *link; link = &(*link)->next) {
        Kernel *kernel = *link;
        if (strcmp(kernel->id, id)) continue;
        *link = kernel->next;
        connection_end(kernel->client);
        connection_end(kernel->shell);
        connection_end(kernel->iopub);
        kernel->client = kernel->shell = kernel->iopub = NULL;
        return;
    }
}

/* -- HTTP -- */

static void answer(Connection *c, const char *status) {
    char *out = room_for(c, 128);
    sent(c, out + sprintf(out, "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}", status));
}

static void upgrade(Connection *c, Kernel *kernel, const char *request) {
    const char *key = strcasestr(request, "\r\nSec-WebSocket-Key:");
    if (!kernel || !key) {
        answer(c, "404 Not Found");
        return;
    }
    key += strlen("\r\nSec-WebSocket-Key:");
    key += strspn(key, " ");
    char accept[32], *out = room_for(c, 256);
    websocket_accept(key, strcspn(key, " \r\n"), accept);
    sent(c, out + sprintf(out,
                          "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                          "Sec-WebSocket-Accept: %s\r\n\r\n", accept));
    connection_end(kernel->client);
    kernel->client = c;
    c->kernel = kernel;
    c->upgraded = true;
    c->take = websocket_take;
    c->before_flush = websocket_before_flush;
}

static void http_request(Connection *c, const char *request) {
    char id[64], key[128];
    int shell, iopub;
    if (sscanf(request, "GET /api/kernels/%63[^/ ]/channels", id) == 1 && strcasestr(request, "\r\nUpgrade:"))
        upgrade(c, kernel_find(id, strlen(id)), request);
    else if (sscanf(request, "POST /floor/%63[^/ ]/%d/%d/%127[^/ ]", id, &shell, &iopub, key) == 4)
        answer(c, kernel_add(id, shell, iopub, key) ? "200 OK" : "500 Internal Server Error");
    else {
        if (sscanf(request, "DELETE /api/kernels/%63[^/ ]", id) == 1) kernel_remove(id);
        answer(c, "200 OK");
    }
}

static size_t http_take(Connection *c, char *bytes, size_t n) {
    char *end = memmem(bytes, n, "\r\n\r\n", 4);
    if (!end) {
        if (n > LONGEST_REQUEST) connection_end(c);
        return 0;
    }
    end[2] = 0;
    http_request(c, bytes);
    size_t used = (size_t)(end + 4 - bytes);
    return c->upgraded && !c->gone ? used + websocket_take(c, bytes + used, n - used) : used;
}

static void accept_client(Connection *listener) {
    int one = 1, fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    watch(connection_new(CLIENT, fd, NULL, http_take), EPOLL_CTL_ADD, EPOLLIN);
}

static bool listen_on(int port) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 512)) {
        perror("floor: listen");
        return false;
    }
    watch(connection_new(LISTENER, fd, NULL, NULL), EPOLL_CTL_ADD, EPOLLIN);
    return true;
}

/* -- turns -- */

static void serve(Connection *c, uint32_t events) {
    if (c->gone) return;
    if (c->kind == LISTENER) {
        accept_client(c);
        return;
    }
#ifdef WITH_LIBZMQ
    if (c->socket) {
        libzmq_receive(c);
        return;
    }
#endif
    if (events & EPOLLOUT) flush(c);
    if (!c->gone && events & ~(uint32_t)EPOLLOUT) receive(c);
}

#ifdef WITH_LIBZMQ
/* A send may have taken the edge that told of what came: iopub first, as in a turn. */
static void read_on(void) {
    for (Connection *c = queued_list; c; c = c->next_queued)
        if (c->socket && !c->gone) {
            if (!c->kernel->iopub->gone) libzmq_receive(c->kernel->iopub);
            libzmq_receive(c);
        }
}
#endif

static void forget_gone(void) {
    Connection *left = NULL;
    while (gone_list) {
        Connection *c = gone_list;
        gone_list = c->next_gone;
        if (c->kernel && c->kernel->client == c) c->kernel->client = NULL;
        if (c->waiting || c->queued) {
            c->next_gone = left;
            left = c;
            continue;
        }
#ifdef WITH_LIBZMQ
        if (c->socket) zmq_close(c->socket);
#endif
        free(c->in.bytes);
        free(c->out.bytes);
        free(c);
    }
    gone_list = left;
}

static void turn(void) {
    static struct epoll_event events[EVENTS];
    int n = epoll_wait(epoll_fd, events, EVENTS, websocket_patience());
    for (int kind = 0; kind < KINDS; kind++)
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if ((int)c->kind == kind) serve(c, events[i].events);
        }
#ifdef WITH_LIBZMQ
    read_on();
#endif
    flush_queued();
    websocket_ask_the_waiting();
    flush_queued();
    forget_gone();
}

int main(int argc, char **argv) {
    int port = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--no-verify")) no_verify = true;
        else if (sscanf(argv[i], "--port=%d", &port) != 1) {
            fprintf(stderr, "usage: floor --port=PORT [--no-verify]\n");
            return 2;
        }
    }
    signal(SIGPIPE, SIG_IGN);
    fw_sha256_select(0);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (!listen_on(port)) return 1;
    for (;;) turn();
}

/* Many light kernels in one process: a thousand of them, each a process of its own, would leave a small machine nothing to
   measure. They say what bench/light_kernel.py says, and compute nothing.

     kernels --host=SOCKET              the process that plays them all, one thread on one epoll
     kernels --join=SOCKET FILE         stands for one of them: what a server starts, waits for, signals and kills

   The second hands its connection file to the first through a Unix socket and sleeps until that is closed: then the kernel
   has ended. When it is killed, the host sees the socket close and drops the kernel, its ports and its peers. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/un.h>
#include <time.h>

#include "connection.h"
#include "json.h"
#include "sha256.h"
#include "zmtp.h"

#define EVENTS 512
#define LONGEST_FILE 8192
#define LONGEST_HEADER 512
#define LONGEST_REPLY 1024
#define GREETING 64

#define LITERAL(text) ((Span){text, sizeof(text) - 1})

struct Kernel {
    fw_hmac_key key;
    bool is_signed;
    char session[33];
    unsigned long serial, count;
    Connection *process, *peers; /* whoever stands for it; all that are connected to its ports */
    Connection *listeners[CHANNELS];
    bool ending;
    Kernel *next_ending;
};

static const Kind channels[CHANNELS] = {IOPUB, SHELL, CONTROL, STDIN, HEARTBEAT};
static const char *const ports[CHANNELS] = {"iopub_port", "shell_port", "control_port", "stdin_port", "hb_port"};
static Kernel *ending_list;
static char date[40];

/* -- what a kernel says -- */

enum { DELIMITER, SIGNATURE, HEADER, PARENT, METADATA, CONTENT, PARTS, SIGNED = 4 };

static void sign(const Kernel *kernel, const Span *parts, char hex[64]) {
    fw_span spans[SIGNED];
    uint8_t digest[32];
    for (int i = 0; i < SIGNED; i++) spans[i] = (fw_span){(const void *)parts[i].p, parts[i].n};
    fw_hmac(&kernel->key, spans, SIGNED, digest);
    fw_hex(digest, sizeof digest, hex);
}

/* To one peer, or to all that have subscribed. A topic stands before what is published; a ROUTER's peer gets no identity. */
static void say(Kernel *kernel, Connection *to, const char *type, Span parent, Span content) {
    char header[LONGEST_HEADER], hex[64], topic[64];
    int n = snprintf(header, sizeof header,
                     "{\"msg_id\": \"%s_%lu\", \"msg_type\": \"%s\", \"username\": \"light\", \"session\": \"%s\", "
                     "\"date\": \"%s\", \"version\": \"5.3\"}", kernel->session, ++kernel->serial, type, kernel->session, date);
    Span parts[1 + PARTS] = {{topic, (size_t)snprintf(topic, sizeof topic, "kernel.light.%s", type)}, LITERAL("<IDS|MSG>"),
                             {hex, kernel->is_signed ? sizeof hex : 0}, {header, (size_t)n}, parent, LITERAL("{}"), content};
    sign(kernel, parts + 1 + HEADER, hex);
    if (to) {
        zmtp_send(to, parts + 1, PARTS);
        return;
    }
    for (Connection *peer = kernel->peers; peer; peer = peer->next_peer)
        if (peer->kind == IOPUB && peer->subscribed && !peer->gone) zmtp_send(peer, parts, 1 + PARTS);
}

static void say_status(Kernel *kernel, const char *state, Span parent) {
    char content[64];
    say(kernel, NULL, "status", parent, (Span){content, (size_t)sprintf(content, "{\"execution_state\": \"%s\"}", state)});
}

static void execute(Kernel *kernel, Connection *peer, Span parent, Span request) {
    Member asked[] = {{"code", LITERAL("\"\"")}, {"silent", LITERAL("false")}};
    char text[LONGEST_REPLY];
    json_members(request, asked, 2);
    if (asked[1].value.p[0] != 't') {
        kernel->count++;
        char *echo = checked(malloc(asked[0].value.n + 64));
        int n = sprintf(echo, "{\"code\": %.*s, \"execution_count\": %lu}", (int)asked[0].value.n, asked[0].value.p, kernel->count);
        say(kernel, NULL, "execute_input", parent, (Span){echo, (size_t)n});
        free(echo);
        n = sprintf(text, "{\"data\": {\"text/plain\": \"4\"}, \"metadata\": {}, \"execution_count\": %lu}", kernel->count);
        say(kernel, NULL, "execute_result", parent, (Span){text, (size_t)n});
    }
    int n = sprintf(text, "{\"status\": \"ok\", \"execution_count\": %lu, \"user_expressions\": {}, \"payload\": []}", kernel->count);
    say(kernel, peer, "execute_reply", parent, (Span){text, (size_t)n});
}

/* Its reply leaves first: `end_the_ending` is called when everything is flushed. */
static void ends(Kernel *kernel) {
    if (kernel->ending) return;
    kernel->ending = true;
    kernel->next_ending = ending_list;
    ending_list = kernel;
}

static bool is_asked(Span type, const char *name) {
    return type.n == strlen(name) + 2 && !memcmp(type.p + 1, name, type.n - 2);
}

static void answer(Kernel *kernel, Connection *peer, Span parent, Span request) {
    Member members[] = {{"msg_type", LITERAL("\"\"")}}, restart[] = {{"restart", LITERAL("false")}};
    json_members(parent, members, 1);
    Span type = members[0].value;
    char text[LONGEST_REPLY];
    if (is_asked(type, "execute_request")) {
        execute(kernel, peer, parent, request);
    } else if (is_asked(type, "kernel_info_request")) {
        say(kernel, peer, "kernel_info_reply", parent,
            LITERAL("{\"status\": \"ok\", \"protocol_version\": \"5.3\", \"implementation\": \"fastwire-light\", "
                    "\"implementation_version\": \"1.0\", \"language_info\": {\"name\": \"python\", \"version\": \"3\", "
                    "\"mimetype\": \"text/x-python\", \"file_extension\": \".py\"}, "
                    "\"banner\": \"fastwire light kernel: it computes nothing\", \"help_links\": [], "
                    "\"supported_features\": []}"));
    } else if (is_asked(type, "comm_info_request")) {
        say(kernel, peer, "comm_info_reply", parent, LITERAL("{\"status\": \"ok\", \"comms\": {}}"));
    } else if (is_asked(type, "interrupt_request")) {
        say(kernel, peer, "interrupt_reply", parent, LITERAL("{\"status\": \"ok\"}"));
    } else if (is_asked(type, "shutdown_request")) {
        json_members(request, restart, 1);
        Span flag = restart[0].value;
        int n = snprintf(text, sizeof text, "{\"status\": \"ok\", \"restart\": %.*s}", (int)flag.n, flag.p);
        say(kernel, peer, "shutdown_reply", parent, (Span){text, (size_t)n});
        ends(kernel);
    } else if (type.n > 10 && !memcmp(type.p + type.n - 9, "_request\"", 9)) {
        int n = snprintf(text, 64, "%.*s_reply", (int)(type.n > 50 ? 40 : type.n - 10), type.p + 1);
        text[n] = 0;
        say(kernel, peer, text, parent, LITERAL("{\"status\": \"error\", \"ename\": \"NotImplemented\", \"evalue\": \"\", \"traceback\": []}"));
    }
}

static void on_message(Connection *peer, const Span *parts, int count) {
    Kernel *kernel = peer->kernel;
    char hex[64];
    if (peer->kind == HEARTBEAT) {
        zmtp_send(peer, parts, count);
        return;
    }
    if (peer->kind == IOPUB) { /* a subscription as ZMTP 3.0 has it */
        peer->subscribed = count == 1 && parts[0].n && parts[0].p[0] == 1;
        return;
    }
    int i = 0;
    while (i < count && !(parts[i].n == 9 && !memcmp(parts[i].p, "<IDS|MSG>", 9))) i++;
    const Span *message = parts + i;
    if (count - i < PARTS) {
        fprintf(stderr, "[E kernels] refused a message without a delimiter or with too few parts\n");
        return;
    }
    sign(kernel, message + HEADER, hex);
    if (kernel->is_signed && (message[SIGNATURE].n != sizeof hex || memcmp(hex, message[SIGNATURE].p, sizeof hex))) {
        fprintf(stderr, "[E kernels] refused a message with a wrong signature\n");
        return;
    }
    say_status(kernel, "busy", message[HEADER]);
    answer(kernel, peer, message[HEADER], message[CONTENT]);
    say_status(kernel, "idle", message[HEADER]);
}

/* -- peers -- */

static void on_command(Connection *peer, const char *body, size_t n) {
    if (n >= 10 && !memcmp(body, "\11SUBSCRIBE", 10)) peer->subscribed = true;
}

/* What comes before the first frame; a peer that speaks something else finds out by itself. */
static size_t greeting_take(Connection *peer, char *bytes, size_t n) {
    if (n < GREETING) return 0;
    char ready[64] = "\5READY", *end = zmtp_property(ready + 6, "Socket-Type", peer->kind == IOPUB ? "PUB" : "ROUTER");
    sent(peer, zmtp_frame(room_for(peer, sizeof ready + LONGEST_HEAD), COMMAND, ready, (size_t)(end - ready)));
    peer->take = zmtp_take;
    return GREETING + zmtp_take(peer, bytes + GREETING, n - GREETING);
}

static void accept_peer(Connection *listener) {
    int one = 1, fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    Connection *peer = connection_new(listener->kind, fd, listener->kernel, greeting_take);
    peer->next_peer = peer->kernel->peers;
    peer->kernel->peers = peer;
    watch(peer, EPOLL_CTL_ADD, EPOLLIN);
    sent(peer, zmtp_greeting(room_for(peer, GREETING)));
}

/* -- kernels -- */

static int listen_on(const char *ip, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (inet_pton(AF_INET, ip, &address.sin_addr) == 1 && !bind(fd, (struct sockaddr *)&address, sizeof address) &&
        !listen(fd, 1024))
        return fd;
    fprintf(stderr, "[E kernels] cannot listen on %s:%d: %s\n", ip, port, strerror(errno));
    close(fd);
    return -1;
}

/* The text of a JSON string that has nothing escaped. */
static void copy_string(Span value, char *to, size_t room) {
    snprintf(to, room, "%.*s", value.n > 2 ? (int)(value.n - 2) : 0, value.p + 1);
}

static bool kernel_begin(Connection *process, Span file) {
    Member members[CHANNELS + 2];
    char ip[64], key[256];
    for (int i = 0; i < CHANNELS; i++) members[i] = (Member){ports[i], LITERAL("0")};
    members[CHANNELS] = (Member){"ip", LITERAL("\"127.0.0.1\"")};
    members[CHANNELS + 1] = (Member){"key", LITERAL("\"\"")};
    if (!json_members(file, members, CHANNELS + 2)) return false;
    copy_string(members[CHANNELS].value, ip, sizeof ip);
    copy_string(members[CHANNELS + 1].value, key, sizeof key);
    Kernel *kernel = checked(calloc(1, sizeof *kernel));
    static unsigned long number;
    snprintf(kernel->session, sizeof kernel->session, "%08lx%08x%016lx", ++number, (unsigned)getpid(), (unsigned long)time(NULL));
    kernel->is_signed = key[0];
    fw_hmac_init(&kernel->key, (const uint8_t *)key, strlen(key));
    kernel->process = process;
    process->kernel = kernel;
    for (int i = 0; i < CHANNELS; i++) {
        int fd = listen_on(ip, atoi(members[i].value.p));
        if (fd < 0) return false;
        kernel->listeners[i] = connection_new(channels[i], fd, kernel, NULL);
        watch(kernel->listeners[i], EPOLL_CTL_ADD, EPOLLIN);
    }
    return true;
}

/* Its ports are free before anybody is told of its end. */
static void kernel_end(Kernel *kernel) {
    for (int i = 0; i < CHANNELS; i++) connection_end(kernel->listeners[i]);
    for (Connection *peer = kernel->peers; peer; peer = peer->next_peer) connection_end(peer);
    connection_end(kernel->process);
}

static void end_the_ending(void) {
    while (ending_list) {
        Kernel *kernel = ending_list;
        ending_list = kernel->next_ending;
        kernel_end(kernel);
    }
}

/* A line: the path of a connection file. */
static size_t process_take(Connection *process, char *bytes, size_t n) {
    char *end = memchr(bytes, '\n', n), text[LONGEST_FILE];
    if (!end) return 0;
    *end = 0;
    FILE *file = fopen(bytes, "r");
    size_t length = file ? fread(text, 1, sizeof text, file) : 0;
    if (file) fclose(file);
    if (!kernel_begin(process, (Span){text, length})) {
        fprintf(stderr, "[E kernels] no kernel can be made of %s\n", bytes);
        if (process->kernel) ends(process->kernel);
        else connection_end(process);
    }
    return n;
}

static void accept_process(Connection *listener) {
    int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0) watch(connection_new(CLIENT, fd, NULL, process_take), EPOLL_CTL_ADD, EPOLLIN);
}

/* -- turns -- */

static void read_clock(void) {
    struct timespec now;
    struct tm parts;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &parts);
    size_t n = strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S", &parts);
    snprintf(date + n, sizeof date - n, ".%06ldZ", now.tv_nsec / 1000);
}

static bool is_listener(const Connection *c) {
    return !c->take;
}

static void serve(Connection *c, uint32_t events) {
    if (c->gone) return;
    if (is_listener(c)) {
        if (c->kind == LISTENER) accept_process(c);
        else accept_peer(c);
        return;
    }
    if (events & EPOLLOUT) flush(c);
    if (!c->gone && events & ~(uint32_t)EPOLLOUT) receive(c);
    if (c->gone && c->kind == CLIENT && c->kernel) ends(c->kernel); /* its process was killed */
}

static void forget(Connection *c) {
    if (c->kernel)
        for (Connection **link = &c->kernel->peers; *link; link = &(*link)->next_peer)
            if (*link == c) {
                *link = c->next_peer;
                break;
            }
    if (c->kind == CLIENT && c->kernel) free(c->kernel);
    free(c->in.bytes);
    free(c->out.bytes);
    free(c);
}

/* A kernel goes with its process, which is forgotten last: it was the last of them to end. */
static void forget_gone(void) {
    Connection *processes = NULL;
    while (gone_list) {
        Connection *c = gone_list;
        gone_list = c->next_gone;
        if (c->kind == CLIENT) {
            c->next_gone = processes;
            processes = c;
        } else {
            forget(c);
        }
    }
    while (processes) {
        Connection *c = processes;
        processes = c->next_gone;
        forget(c);
    }
}

static void turn(void) {
    static struct epoll_event events[EVENTS];
    int n = epoll_wait(epoll_fd, events, EVENTS, -1);
    read_clock();
    for (int i = 0; i < n; i++) serve(events[i].data.ptr, events[i].events);
    flush_queued();
    end_the_ending();
    forget_gone();
}

/* -- the two programs -- */

static struct sockaddr_un place(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    return address;
}

static int host(const char *path) {
    struct sockaddr_un address = place(path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) {
        perror("kernels: listen");
        return 1;
    }
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    watch(connection_new(LISTENER, fd, NULL, NULL), EPOLL_CTL_ADD, EPOLLIN);
    for (;;) turn();
}

/* What was started for one kernel does not outlive whoever started it, and asks nothing of the processor. */
static int join(const char *path, const char *file) {
    struct sockaddr_un address = place(path);
    char end;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    signal(SIGINT, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) || dprintf(fd, "%s\n", file) < 0) {
        perror("kernels: join");
        return 1;
    }
    while (read(fd, &end, 1) < 0 && errno == EINTR) continue;
    return 0;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    fw_sha256_select(0);
    if (argc == 2 && !strncmp(argv[1], "--host=", 7)) return host(argv[1] + 7);
    if (argc == 3 && !strncmp(argv[1], "--join=", 7)) return join(argv[1] + 7, argv[2]);
    fprintf(stderr, "usage: kernels --host=SOCKET | kernels --join=SOCKET CONNECTION_FILE\n");
    return 2;
}

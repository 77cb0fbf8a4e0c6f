/* The loop's thread and the standby reader on the same connections, for ThreadSanitizer: what comes is in order and whole,
 * while connections come and go, and beside a loop that says when it waits another that never does. */
#include <assert.h>
#include <stdio.h>

#include "core/standby.h"

enum { LINKS = 8, BYTES = 4000000 };

typedef struct {
    int ours, theirs;
} pair;

static void *kernel(void *argument) {
    pair *p = (pair *)argument;
    unsigned char chunk[4096];
    for (size_t sent = 0; sent < BYTES;) {
        size_t n = BYTES - sent < sizeof chunk ? BYTES - sent : sizeof chunk;
        for (size_t i = 0; i < n; i++) chunk[i] = (unsigned char)((sent + i) % 251);
        ssize_t done = send(p->theirs, chunk, n, MSG_NOSIGNAL);
        assert(done > 0);
        sent += (size_t)done;
        if (sent % 7 == 0) usleep(100);
    }
    shutdown(p->theirs, SHUT_WR);
    return NULL;
}

/* What came of a connection, behind ``*got``; 0 at its end. */
static ssize_t hear(fw_aside *a, int fd, size_t *got) {
    unsigned char buffer[65536];
    ssize_t n = fw_aside_recv(a, fd, buffer, sizeof buffer);
    for (ssize_t k = 0; k < n; k++) assert(buffer[k] == (unsigned char)((*got + (size_t)k) % 251));
    if (n > 0) *got += (size_t)n;
    assert(n || *got == BYTES);
    return n;
}

/* A loop that waits, and does what comes at once. */
static void *waiting_loop(void *argument) {
    pair *p = (pair *)argument;
    int tell[2];
    size_t got = 0;
    char octets[64];
    fw_aside link;
    fw_beat *beat = fw_beat_new();
    assert(!pipe(tell));
    fcntl(tell[0], F_SETFL, O_NONBLOCK), fcntl(tell[1], F_SETFL, O_NONBLOCK);
    struct pollfd ready[2] = {{p->ours, POLLIN, 0}, {tell[0], POLLIN, 0}};
    fw_aside_init(&link);
    fw_beat_turn(beat, fw_now());
    fw_beat_does(beat, FW_IN_TURN);
    assert(!fw_aside_watch(&link, p->ours, tell[1], beat));
    do {
        fw_beat_does(beat, FW_WAITS);
        assert(poll(ready, 2, -1) > 0);
        fw_beat_turn(beat, fw_now());
        fw_beat_does(beat, FW_IN_TURN);
        while (read(tell[0], octets, sizeof octets) > 0) {}
    } while (hear(&link, p->ours, &got));
    fw_aside_destroy(&link);
    fw_beat_release(beat);
    close(p->ours), close(tell[0]), close(tell[1]);
    return NULL;
}

static pair make_pair(void) {
    int ends[2];
    assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    return (pair){ends[0], ends[1]};
}

int main(void) {
    int tell[2];
    pthread_t threads[LINKS], beside[2];
    pair other = make_pair();
    pair pairs[LINKS];
    fw_aside links[LINKS], idle;
    size_t got[LINKS] = {0}, ended = 0;
    unsigned char octets[64];
    fw_beat *beat = fw_beat_new();
    assert(!pipe(tell));
    fcntl(tell[0], F_SETFL, O_NONBLOCK), fcntl(tell[1], F_SETFL, O_NONBLOCK);
    assert(!pthread_create(&beside[0], NULL, kernel, &other));
    assert(!pthread_create(&beside[1], NULL, waiting_loop, &other));
    for (int i = 0; i < LINKS; i++) {
        pairs[i] = make_pair();
        fw_aside_init(&links[i]);
        assert(!fw_aside_watch(&links[i], pairs[i].ours, tell[1], beat));
        assert(!pthread_create(&threads[i], NULL, kernel, &pairs[i]));
    }
    for (int turn = 0; ended < LINKS; turn++) {
        if (turn % 50 == 0) {
            pair p = make_pair();
            fw_aside_init(&idle);
            assert(!fw_aside_watch(&idle, p.ours, tell[1], beat));
            fw_aside_destroy(&idle);
            close(p.ours), close(p.theirs);
            fw_aside_rest(&links[turn / 50 % LINKS], turn % 100 == 0);
            usleep(80000); /* a loop that is blocked */
        }
        fw_beat_turn(beat, fw_now());
        while (read(tell[0], octets, sizeof octets) > 0) {}
        for (int i = 0; i < LINKS; i++) {
            if (links[i].fd < 0 || hear(&links[i], pairs[i].ours, &got[i])) continue;
            fw_aside_destroy(&links[i]);
            links[i].fd = -1;
            close(pairs[i].ours);
            ended++;
        }
        usleep(200);
    }
    for (int i = 0; i < LINKS; i++) pthread_join(threads[i], NULL), close(pairs[i].theirs);
    for (int i = 0; i < 2; i++) pthread_join(beside[i], NULL);
    close(other.theirs);
    printf("%llu bytes were taken aside, %zu are held\n",
           (unsigned long long)__atomic_load_n(&fw_standby.taken, __ATOMIC_RELAXED),
           fw_standby_held());
    assert(__atomic_load_n(&fw_standby.taken, __ATOMIC_RELAXED) > 0);
    assert(fw_standby_held() == 0 && fw_standby.resting == 0);
    fw_beat_release(beat);
    assert(!fw_standby.beats);
    return 0;
}

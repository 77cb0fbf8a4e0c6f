/* The loop's thread and the standby reader on the same connections, for ThreadSanitizer: what comes is in order and whole,
 * while connections come and go. */
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

int main(void) {
    int tell[2];
    pthread_t threads[LINKS];
    pair pairs[LINKS];
    fw_aside links[LINKS], idle;
    size_t got[LINKS] = {0}, ended = 0;
    unsigned char buffer[65536];
    fw_beat *beat = fw_beat_new();
    assert(!pipe(tell));
    fcntl(tell[0], F_SETFL, O_NONBLOCK), fcntl(tell[1], F_SETFL, O_NONBLOCK);
    for (int i = 0; i < LINKS; i++) {
        int ends[2];
        assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
        fcntl(ends[0], F_SETFL, O_NONBLOCK);
        pairs[i].ours = ends[0], pairs[i].theirs = ends[1];
        fw_aside_init(&links[i]);
        assert(!fw_aside_watch(&links[i], ends[0], tell[1], beat));
        assert(!pthread_create(&threads[i], NULL, kernel, &pairs[i]));
    }
    for (int turn = 0; ended < LINKS; turn++) {
        if (turn % 50 == 0) {
            int ends[2];
            assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
            fw_aside_init(&idle);
            assert(!fw_aside_watch(&idle, ends[0], tell[1], beat));
            fw_aside_destroy(&idle);
            close(ends[0]), close(ends[1]);
            fw_aside_rest(&links[turn / 50 % LINKS], turn % 100 == 0);
            usleep(80000); /* a loop that is blocked */
        }
        fw_beat_turn(beat, fw_now());
        while (read(tell[0], buffer, sizeof buffer) > 0) {}
        for (int i = 0; i < LINKS; i++) {
            if (links[i].fd < 0) continue;
            ssize_t n = fw_aside_recv(&links[i], pairs[i].ours, buffer, sizeof buffer);
            for (ssize_t k = 0; k < n; k++) assert(buffer[k] == (unsigned char)((got[i] + (size_t)k) % 251));
            if (n > 0) got[i] += (size_t)n;
            if (n == 0) {
                assert(got[i] == BYTES);
                fw_aside_destroy(&links[i]);
                links[i].fd = -1;
                close(pairs[i].ours);
                ended++;
            }
        }
        usleep(200);
    }
    for (int i = 0; i < LINKS; i++) pthread_join(threads[i], NULL), close(pairs[i].theirs);
    printf("%llu bytes were taken aside, %zu are held\n",
           (unsigned long long)__atomic_load_n(&fw_standby.taken, __ATOMIC_RELAXED),
           fw_standby_held());
    assert(__atomic_load_n(&fw_standby.taken, __ATOMIC_RELAXED) > 0);
    assert(fw_standby_held() == 0 && fw_standby.resting == 0);
    fw_beat_release(beat);
    assert(!fw_standby.beats);
    return 0;
}

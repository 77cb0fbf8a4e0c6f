/* The standby reader: a thread that takes bytes off kernels' connections while nobody drains them.
 *
 * A PUB socket drops what is said beyond 1,000 messages and the system's buffers when nobody reads, without a word. libzmq's
 * I/O thread always read; a loop that an extension blocks for ten seconds does not. So there is one thread, for the whole
 * process, that needs no GIL and knows no messages:
 *
 * - It sleeps in poll() until a connection is readable, then looks every 200 ms whether each loop goes on (`fw_beat`): that costs
 *   a glance, where looking at a thousand connections costs as much as dozens of messages. When nothing comes it sleeps again.
 *   Not more often: for one kernel at 50 requests a second each wake-up costs as much as a message or two. The system's
 *   buffers hold more than 400 ms of what ipykernel prints as fast as it can.
 * - Of a loop whose turn has lasted 20 ms it takes what is readable, in the order it came, into memory of its own beside the
 *   connection (`fw_aside`), and tells the loop by an octet in a pipe: the descriptor need not be readable any more. So it
 *   comes within 220 ms: what is said meanwhile lies in the system's buffers, and beyond them in the kernel's own. The same of a
 *   connection that its loop leaves alone for a while.
 * - A loop in whose place our poller waits says when it does. Of another, uvloop or one without epoll, only the turns are seen:
 *   one that has none may be idle. What is readable tells, if it still is 5 ms later and no turn has begun: 225 ms.
 * - Turns go on, so a loop does. Where more than 256 descriptors are ready (FW_POLLED) a turn has those that epoll says first;
 *   they stand last then, and each has its turn before one has it twice. One of a thousand waits for four turns.
 * - Whoever drains the connection is given that first (`fw_aside_recv`). A lock for each connection keeps the two from
 *   reading at once; no Python runs under it, and the thread takes no other but the registry's, which comes first.
 * - What it takes has bounds, of all together and of what each connection belongs to (`fw_purse`). At one the thread leaves
 *   the bytes where they are: in the system's buffers, then with the kernel, whose PUB socket drops.
 * - It is in pages of its own, which the system has back as they are drained: what the C library keeps counts for nobody.
 *
 * A child of fork has no thread, and nothing of its parent's connections: they are taken off its registry, whose lock the fork
 * waits for, so that nobody who is not there holds it. (A connection's lock is held with the registry's, or under the GIL.)
 *
 * poll() keeps a file open that was closed meanwhile: who takes a connection off the registry wakes the thread before. */
#ifndef FW_STANDBY_H
#define FW_STANDBY_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "core/sys.h"

#define FW_PAUSE 200000000u     /* ns between looks while loops go on */
#define FW_PATIENCE 20000000u   /* ns of a turn that lasts too long */
#define FW_AGAIN 5000000u       /* ns between looks while there is something to take */
#define FW_ASIDE_STEP 1048576u  /* bytes of one connection before the next has its turn */
#define FW_CHUNK 65536u         /* bytes of memory, its head among them */
#define FW_LEAST_ROOM 4096u     /* bytes of a chunk that another recv is worth */

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

typedef struct fw_chunk {
    struct fw_chunk *next;
    uint32_t start, end;
    char data[FW_CHUNK - sizeof(void *) - 2 * sizeof(uint32_t)];
} fw_chunk;

/* What may be taken for somebody, and was: bytes of memory that are a part of what a larger ``whole`` may have. Who it is a
 * part of changes with the registry's lock only, in the thread of the loop that drains its connections; so do its owners. */
typedef struct fw_purse {
    size_t limit, held;         /* atomic */
    size_t owners;
    struct fw_purse *whole;
} fw_purse;

/* What a loop is seen to do between two turns, */
enum { FW_UNSEEN, FW_WAITS, FW_IN_TURN };
/* and what the thread makes of it: no turn was seen for long, what was readable then is to be gone at the next look, it was not. */
enum { FW_GOES_ON, FW_QUIET, FW_ASKED, FW_BLOCKED };

/* The turns of a loop. Its owners change with the registry's lock, as who has it in the list does. */
typedef struct fw_beat {
    uint64_t turns;             /* atomic, as the next two */
    uint64_t began;             /* when the last one did, in ns */
    int does;
    uint64_t seen;              /* of the turns, at a look */
    int state;
    size_t links, owners;
    struct fw_beat *next, *before;
} fw_beat;

typedef struct fw_aside {
    int fd, tell;               /* of the connection; of the pipe that wakes its loop */
    fw_beat *beat;
    int rests;                  /* its loop leaves it alone */
    int ended, error, told;
    fw_chunk *first, *last;
    fw_purse *purse;
    pthread_mutex_t lock;
    struct fw_aside *next, *before;
} fw_aside;

static struct {
    pthread_mutex_t lock;       /* of this, and of who stands in the list */
    fw_aside *first;
    size_t count, resting;
    fw_beat *beats;
    int runs;                   /* the thread, in this process */
    int forks;                  /* are seen to */
    int wake[2];
    fw_purse all;
    uint64_t taken;             /* bytes since the process began; atomic */
} fw_standby = {PTHREAD_MUTEX_INITIALIZER, NULL, 0, 0, NULL, 0, 0, {-1, -1}, {SIZE_MAX, 0, 1, NULL}, 0};

static uint64_t fw_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* -- purses -- */

/* With the registry's lock held. */
static void fw_purse_drop(fw_purse *purse) {
    fw_purse *whole;
    for (; purse && --purse->owners == 0; purse = whole) {
        whole = purse->whole;
        free(purse);
    }
}

static void fw_purse_release(fw_purse *purse) {
    pthread_mutex_lock(&fw_standby.lock);
    fw_purse_drop(purse);
    pthread_mutex_unlock(&fw_standby.lock);
}

/* Has no limit of its own at first. NULL without memory. */
static fw_purse *fw_purse_new(void) {
    fw_purse *purse = (fw_purse *)calloc(1, sizeof *purse);
    if (!purse) return NULL;
    purse->limit = SIZE_MAX, purse->owners = 1, purse->whole = &fw_standby.all;
    pthread_mutex_lock(&fw_standby.lock);
    purse->whole->owners++;
    pthread_mutex_unlock(&fw_standby.lock);
    return purse;
}

static void fw_purse_set_limit(fw_purse *purse, size_t limit) { __atomic_store_n(&purse->limit, limit, __ATOMIC_RELAXED); }

static size_t fw_purse_held(fw_purse *purse) { return __atomic_load_n(&purse->held, __ATOMIC_RELAXED); }

/* ``more`` or, wrapped round, less. */
static void fw_purse_add(fw_purse *purse, size_t more) {
    for (; purse; purse = purse->whole) __atomic_add_fetch(&purse->held, more, __ATOMIC_RELAXED);
}

static int fw_purse_has_room(fw_purse *purse, size_t more) {
    for (; purse; purse = purse->whole) {
        if (fw_purse_held(purse) + more > __atomic_load_n(&purse->limit, __ATOMIC_RELAXED)) return 0;
    }
    return 1;
}

/* Be a part of another from now on. */
static void fw_purse_move(fw_purse *purse, fw_purse *whole) {
    pthread_mutex_lock(&fw_standby.lock);
    whole->owners++;
    fw_purse_add(purse->whole, -fw_purse_held(purse));
    fw_purse_drop(purse->whole);
    purse->whole = whole;
    fw_purse_add(whole, fw_purse_held(purse));
    pthread_mutex_unlock(&fw_standby.lock);
}

/* -- loops -- */

/* NULL without memory. */
static fw_beat *fw_beat_new(void) {
    fw_beat *beat = (fw_beat *)calloc(1, sizeof *beat);
    if (!beat) return NULL;
    beat->owners = 1, beat->began = fw_now();
    pthread_mutex_lock(&fw_standby.lock);
    beat->next = fw_standby.beats;
    if (beat->next) beat->next->before = beat;
    fw_standby.beats = beat;
    pthread_mutex_unlock(&fw_standby.lock);
    return beat;
}

/* With the registry's lock held. */
static void fw_beat_drop(fw_beat *beat) {
    if (--beat->owners) return;
    if (beat->before) beat->before->next = beat->next;
    else fw_standby.beats = beat->next;
    if (beat->next) beat->next->before = beat->before;
    free(beat);
}

static void fw_beat_release(fw_beat *beat) {
    pthread_mutex_lock(&fw_standby.lock);
    fw_beat_drop(beat);
    pthread_mutex_unlock(&fw_standby.lock);
}

static uint64_t fw_beat_turns(fw_beat *beat) { return __atomic_load_n(&beat->turns, __ATOMIC_RELAXED); }

/* In the loop's thread alone, as the next. */
static void fw_beat_turn(fw_beat *beat, uint64_t now) {
    __atomic_store_n(&beat->began, now, __ATOMIC_RELAXED);
    __atomic_store_n(&beat->turns, beat->turns + 1, __ATOMIC_RELEASE);
}

/* FW_IN_TURN behind `fw_beat_turn`: who sees it sees when. */
static void fw_beat_does(fw_beat *beat, int what) { __atomic_store_n(&beat->does, what, __ATOMIC_RELEASE); }

/* With the registry's lock held, in the thread: whether there were turns since the last look. */
static int fw_beat_judge(fw_beat *beat, uint64_t now) {
    int does = __atomic_load_n(&beat->does, __ATOMIC_ACQUIRE), asked = beat->state >= FW_ASKED;
    uint64_t turns = __atomic_load_n(&beat->turns, __ATOMIC_ACQUIRE);
    int goes_on = turns != beat->seen;
    beat->seen = turns;
    if (does == FW_WAITS || __atomic_load_n(&beat->began, __ATOMIC_RELAXED) + FW_PATIENCE > now) beat->state = FW_GOES_ON;
    else beat->state = does == FW_IN_TURN || (asked && !goes_on) ? FW_BLOCKED : FW_QUIET;
    return beat->links && goes_on;
}

/* -- what was taken off one connection -- */

static void fw_aside_init(fw_aside *a) {
    memset(a, 0, sizeof *a);
    a->fd = a->tell = -1;
    pthread_mutex_init(&a->lock, NULL);
    pthread_mutex_lock(&fw_standby.lock);
    a->purse = &fw_standby.all;
    a->purse->owners++;
    pthread_mutex_unlock(&fw_standby.lock);
}

/* With the lock held, as those that follow. The first chunk goes. */
static void fw_aside_drop(fw_aside *a) {
    fw_chunk *chunk = a->first;
    a->first = chunk->next;
    if (!a->first) a->last = NULL;
    munmap(chunk, FW_CHUNK);
    fw_purse_add(a->purse, -(size_t)FW_CHUNK);
}

static int fw_aside_is_empty(fw_aside *a) { return !a->first || (a->first == a->last && a->first->start == a->first->end); }

static void fw_aside_empty(fw_aside *a) {
    while (a->first) fw_aside_drop(a);
}

/* -- of the thread -- */

/* A chunk with room for one more read; NULL at a bound or without memory. */
static fw_chunk *fw_aside_room(fw_aside *a) {
    fw_chunk *chunk = a->last;
    if (chunk && sizeof chunk->data - chunk->end >= FW_LEAST_ROOM) return chunk;
    if (!fw_purse_has_room(a->purse, FW_CHUNK)) return NULL;
    chunk = (fw_chunk *)mmap(NULL, FW_CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (chunk == MAP_FAILED) return NULL;
    fw_purse_add(a->purse, FW_CHUNK);
    if (a->last) a->last->next = chunk;
    else a->first = chunk;
    return a->last = chunk;
}

/* Takes what is there; whether anything was. */
static int fw_aside_take(fw_aside *a) {
    size_t taken = 0;
    ssize_t n = 1;
    fw_chunk *chunk;
    pthread_mutex_lock(&a->lock);
    while (!a->ended && n > 0 && taken < FW_ASIDE_STEP && (chunk = fw_aside_room(a))) {
        n = recv(a->fd, chunk->data + chunk->end, sizeof chunk->data - chunk->end, MSG_DONTWAIT);
        if (n > 0) {
            chunk->end += (uint32_t)n;
            taken += (size_t)n;
        } else if (n == 0 || (errno != EAGAIN && errno != EINTR && errno != ENOBUFS && errno != ENOMEM)) {
            a->ended = 1;
            a->error = n ? errno : 0;
        }
    }
    if (fw_aside_is_empty(a)) fw_aside_empty(a);
    if ((taken || a->ended) && !a->told && a->tell >= 0) a->told = write(a->tell, "", 1) >= 0;
    pthread_mutex_unlock(&a->lock);
    __atomic_add_fetch(&fw_standby.taken, taken, __ATOMIC_RELAXED);
    return taken > 0;
}

/* The descriptors to look at, behind that of the pipe, in the order of the registry, whose lock is held; NULL without
 * memory. poll() leaves out a descriptor below 0. No lock of a connection's: they change with the registry's, or here. */
static struct pollfd *fw_standby_list(int all) {
    struct pollfd *list = (struct pollfd *)calloc(fw_standby.count + 1, sizeof *list);
    struct pollfd *next = list;
    fw_aside *a;
    if (!list) return NULL;
    next->fd = fw_standby.wake[0], next->events = POLLIN;
    for (a = fw_standby.first; a; a = a->next) {
        next++;
        next->fd = !a->ended && (all || a->rests || a->beat->state != FW_GOES_ON) ? a->fd : -1, next->events = POLLIN;
    }
    return list;
}

/* Until something is readable, or the registry has changed. */
static void fw_standby_await(void) {
    char octets[64];
    struct pollfd *list;
    size_t count;
    pthread_mutex_lock(&fw_standby.lock);
    list = fw_standby_list(1);
    count = fw_standby.count + 1;
    pthread_mutex_unlock(&fw_standby.lock);
    if (list && poll(list, (nfds_t)count, -1) > 0 && list[0].revents) {
        while (read(fw_standby.wake[0], octets, sizeof octets) > 0) {}
    }
    free(list);
}

/* With the registry's lock held: takes what is readable where nobody drains it. Whether it is to look again soon. */
static int fw_standby_take(void) {
    struct pollfd *list = fw_standby_list(0), *next = list;
    fw_aside *a;
    int again = 0;
    if (list && poll(list, (nfds_t)(fw_standby.count + 1), 0) > 0) {
        for (a = fw_standby.first; a; a = a->next) {
            if (!(++next)->revents) continue;
            if (a->rests || a->beat->state == FW_BLOCKED) again |= fw_aside_take(a);
            else a->beat->state = FW_ASKED, again = 1;
        }
    }
    free(list);
    return again;
}

/* One look after ``*pause`` ns, and how long to pause before the next. False: nothing comes. */
static int fw_standby_look(uint64_t *pause) {
    struct timespec time = {0, (long)*pause};
    fw_beat *beat;
    int late = 0, goes_on = 0, again = 0;
    nanosleep(&time, NULL);
    pthread_mutex_lock(&fw_standby.lock);
    for (beat = fw_standby.beats; beat; beat = beat->next) {
        goes_on |= fw_beat_judge(beat, fw_now());
        late |= beat->links && beat->state != FW_GOES_ON;
    }
    if (late || fw_standby.resting) again = fw_standby_take();
    pthread_mutex_unlock(&fw_standby.lock);
    *pause = again ? FW_AGAIN : FW_PAUSE;
    return again || goes_on;
}

static void *fw_standby_run(void *nothing) {
    uint64_t pause = FW_PAUSE;
    (void)nothing;
    for (;;) {
        fw_standby_await();
        while (fw_standby_look(&pause)) {}
    }
    return NULL;
}

/* With the registry's lock held. What was taken and not drained is dropped. */
static void fw_aside_strike(fw_aside *a) {
    if (a->before) a->before->next = a->next;
    else fw_standby.first = a->next;
    if (a->next) a->next->before = a->before;
    fw_standby.count--;
    fw_standby.resting -= (size_t)a->rests, a->rests = 0;
    a->beat->links--, fw_beat_drop(a->beat), a->beat = NULL;
    pthread_mutex_lock(&a->lock);
    fw_aside_empty(a);
    a->ended = a->error = 0;
    a->fd = a->tell = -1;
    pthread_mutex_unlock(&a->lock);
}

static void fw_standby_before_fork(void) { pthread_mutex_lock(&fw_standby.lock); }

static void fw_standby_after_fork(void) { pthread_mutex_unlock(&fw_standby.lock); }

static void fw_standby_in_child(void) {
    int i;
    while (fw_standby.first) fw_aside_strike(fw_standby.first);
    for (i = 0; i < 2; i++) close(fw_standby.wake[i]), fw_standby.wake[i] = -1;
    fw_standby.runs = 0;
    pthread_mutex_unlock(&fw_standby.lock);
}

/* With the registry's lock held; 0, or an errno. */
static int fw_standby_start(void) {
    sigset_t all, before;
    pthread_t thread;
    int problem, i;
    if (fw_standby.runs) return 0;
    if (!fw_standby.forks) {
        problem = pthread_atfork(fw_standby_before_fork, fw_standby_after_fork, fw_standby_in_child);
        if (problem) return problem;
        fw_standby.forks = 1;
    }
    if (fw_standby.wake[0] < 0) {
        if (pipe(fw_standby.wake)) return errno;
        for (i = 0; i < 2; i++) {
            fcntl(fw_standby.wake[i], F_SETFL, O_NONBLOCK);
            fcntl(fw_standby.wake[i], F_SETFD, FD_CLOEXEC);
        }
    }
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    problem = pthread_create(&thread, NULL, fw_standby_run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (problem) return problem;
    pthread_detach(thread);
    fw_standby.runs = 1;
    return 0;
}

static void fw_standby_wake(void) {
    ssize_t n = write(fw_standby.wake[1], "", 1);
    (void)n; /* full: it will wake up */
}

/* -- of the loop's thread -- */

static void fw_standby_set_limit(size_t limit) { fw_purse_set_limit(&fw_standby.all, limit); }

static size_t fw_standby_held(void) { return fw_purse_held(&fw_standby.all); }

static uint64_t fw_standby_taken(void) { return __atomic_load_n(&fw_standby.taken, __ATOMIC_RELAXED); }

/* Takes care of a connection from now on, which a loop drains; 0, or an errno. */
static int fw_aside_watch(fw_aside *a, int fd, int tell, fw_beat *beat) {
    int problem;
    pthread_mutex_lock(&fw_standby.lock);
    problem = fw_standby_start();
    if (!problem) {
        a->fd = fd, a->tell = tell, a->ended = a->error = a->told = 0;
        a->beat = beat, beat->owners++, beat->links++;
        a->before = NULL, a->next = fw_standby.first;
        if (a->next) a->next->before = a;
        fw_standby.first = a;
        fw_standby.count++;
        fw_standby_wake();
    }
    pthread_mutex_unlock(&fw_standby.lock);
    return problem;
}

/* Before its descriptor is closed. */
static void fw_aside_leave(fw_aside *a) {
    if (a->fd < 0) return;
    pthread_mutex_lock(&fw_standby.lock);
    fw_aside_strike(a);
    fw_standby_wake();
    pthread_mutex_unlock(&fw_standby.lock);
}

/* Its loop leaves it alone, or does not any more. */
static void fw_aside_rest(fw_aside *a, int rests) {
    if (a->fd < 0 || a->rests == rests) return;
    pthread_mutex_lock(&fw_standby.lock);
    fw_standby.resting += (size_t)rests - (size_t)a->rests;
    a->rests = rests;
    pthread_mutex_unlock(&fw_standby.lock);
}

static void fw_aside_destroy(fw_aside *a) {
    fw_aside_leave(a);
    fw_purse_release(a->purse);
    pthread_mutex_destroy(&a->lock);
}

/* What is taken of it counts there. */
static void fw_aside_charge(fw_aside *a, fw_purse *purse) {
    size_t held = 0;
    fw_chunk *chunk;
    pthread_mutex_lock(&fw_standby.lock);
    pthread_mutex_lock(&a->lock);
    for (chunk = a->first; chunk; chunk = chunk->next) held += FW_CHUNK;
    purse->owners++;
    fw_purse_add(a->purse, -held);
    fw_purse_drop(a->purse);
    a->purse = purse;
    fw_purse_add(purse, held);
    pthread_mutex_unlock(&a->lock);
    pthread_mutex_unlock(&fw_standby.lock);
}

/* What was taken; with the lock held. */
static size_t fw_aside_give(fw_aside *a, void *buffer, size_t size) {
    size_t given = 0, n;
    while (a->first && given < size) {
        n = a->first->end - a->first->start;
        n = n < size - given ? n : size - given;
        memcpy((char *)buffer + given, a->first->data + a->first->start, n);
        a->first->start += (uint32_t)n;
        given += n;
        if (a->first->start == a->first->end) fw_aside_drop(a);
    }
    return given;
}

/* As recv: first what was taken, and behind it what is there. Fewer bytes than ``size`` are all there were. */
static ssize_t fw_aside_recv(fw_aside *a, int fd, void *buffer, size_t size) {
    ssize_t n = 0;
    size_t given;
    int error;
    if (fd != a->fd) return fw_recv(fd, buffer, size);
    pthread_mutex_lock(&a->lock);
    a->told = 0;
    given = fw_aside_give(a, buffer, size);
    if (a->ended) {
        n = a->error ? -1 : 0, errno = a->error;
    } else if (given < size) {
        n = fw_recv(fd, (char *)buffer + given, size - given);
    }
    error = n < 0 ? errno : 0;
    pthread_mutex_unlock(&a->lock);
    if (n < 0) errno = error;
    return given && n < 0 ? (ssize_t)given : n + (ssize_t)given;
}

/* Something to receive, be it the end. */
static int fw_aside_has(fw_aside *a) {
    int has;
    pthread_mutex_lock(&a->lock);
    has = !fw_aside_is_empty(a) || a->ended;
    pthread_mutex_unlock(&a->lock);
    return has;
}

#endif

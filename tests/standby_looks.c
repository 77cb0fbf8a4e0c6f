/* What the standby reader makes of a loop, look by look, at times that are made up: it has no thread here. */
#include <assert.h>
#include <stdio.h>

#include "core/standby.h"

#define MS 1000000u

enum { HOUR = 3600000 };

static fw_beat *beat;
static fw_aside a;
static int kernel;
static char octet;

static void begin(void) {
    int ends[2];
    assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    beat = fw_beat_new();
    fw_beat_turn(beat, 1000 * MS); /* and not when the program began */
    fw_aside_init(&a);
    a.fd = ends[0], kernel = ends[1], a.beat = beat, beat->links = 1, beat->owners = 2;
    fw_standby.first = &a, fw_standby.count = 1;
}

static void end(void) {
    int fd = a.fd;
    fw_aside_destroy(&a);
    fw_beat_release(beat);
    assert(!fw_standby.first && !fw_standby.beats && !fw_standby_held());
    close(fd), close(kernel);
}

static void say(void) { assert(write(kernel, "x", 1) == 1); }

/* Whether there is something, as the loop is given it. */
static int is_there(void) { return fw_aside_recv(&a, a.fd, &octet, 1) == 1; }

/* What it looks like then, and whether it is to be looked at again soon. */
static int look(uint64_t ms, int *again) {
    fw_beat_judge(beat, ms * MS);
    *again = beat->state != FW_GOES_ON && fw_standby_take();
    return beat->state;
}

static void a_loop_that_says_when_it_waits(void) {
    int again;
    begin();
    fw_beat_does(beat, FW_WAITS);
    say();
    assert(look(HOUR, &again) == FW_GOES_ON && !again && !fw_aside_has(&a));
    fw_beat_turn(beat, HOUR * (uint64_t)MS);
    fw_beat_does(beat, FW_IN_TURN);
    assert(look(HOUR + 19, &again) == FW_GOES_ON && !again && !fw_aside_has(&a));
    assert(look(HOUR + 20, &again) == FW_BLOCKED && again && fw_aside_has(&a));
    assert(is_there());
    fw_beat_turn(beat, (HOUR + 30) * (uint64_t)MS);
    say();
    assert(look(HOUR + 40, &again) == FW_GOES_ON && !again && !fw_aside_has(&a));
    end();
}

static void a_loop_that_is_idle(void) {
    int again;
    begin();
    assert(look(1050, &again) == FW_QUIET && !again);
    assert(look(HOUR, &again) == FW_QUIET && !again);
    say(); /* and before the loop wakes up there is a look */
    assert(look(HOUR + 50, &again) == FW_ASKED && again && !fw_aside_has(&a));
    fw_beat_turn(beat, (HOUR + 51) * (uint64_t)MS);
    assert(is_there());
    assert(look(HOUR + 55, &again) == FW_GOES_ON && !again);
    assert(look(HOUR + 105, &again) == FW_QUIET && !again);
    say();
    assert(look(HOUR + 155, &again) == FW_ASKED && again);
    fw_beat_turn(beat, (HOUR + 156) * (uint64_t)MS);
    assert(is_there());
    say(); /* the thread comes late: there was a turn, and so it asks again */
    assert(look(HOUR + 200, &again) == FW_ASKED && again && !fw_aside_has(&a));
    end();
}

static void a_loop_of_which_only_turns_are_seen_is_blocked(void) {
    int again;
    begin();
    assert(look(1019, &again) == FW_GOES_ON && !again);
    say();
    assert(look(1069, &again) == FW_ASKED && again && !fw_aside_has(&a));
    assert(look(1074, &again) == FW_BLOCKED && again && fw_aside_has(&a));
    assert(look(1079, &again) == FW_BLOCKED && !again);
    say();
    assert(look(1129, &again) == FW_BLOCKED && again);
    fw_beat_turn(beat, 1130 * MS);
    assert(is_there() && is_there());
    assert(look(1140, &again) == FW_GOES_ON && !again);
    end();
}

static void what_a_loop_leaves_alone_is_taken_while_it_is_idle(void) {
    int again;
    begin();
    fw_aside_rest(&a, 1);
    say();
    assert(look(HOUR, &again) == FW_QUIET && again && fw_aside_has(&a));
    end();
}

int main(void) {
    a_loop_that_says_when_it_waits();
    a_loop_that_is_idle();
    a_loop_of_which_only_turns_are_seen_is_blocked();
    what_a_loop_leaves_alone_is_taken_while_it_is_idle();
    return 0;
}

/* epoll, where there is one: which descriptors are ready. */
#ifndef FASTWIRE_POLL_H
#define FASTWIRE_POLL_H

#include <errno.h>

#if defined(__linux__)
#include <sys/epoll.h>
#include <unistd.h>

#define FW_POLLED 256

static int fw_poll_open(void) { return epoll_create1(EPOLL_CLOEXEC); }

static int fw_poll_add(int poll, int fd) {
    struct epoll_event event;
    event.events = EPOLLIN;
    event.data.u64 = 0;
    event.data.fd = fd;
    return epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
}

static int fw_poll_remove(int poll, int fd) {
    struct epoll_event event; /* Linux before 2.6.9 wants one */
    return epoll_ctl(poll, EPOLL_CTL_DEL, fd, &event);
}

/* Writes the numbers of those that are ready, at most FW_POLLED, to `ready` and returns how many; -1 with errno. */
static int fw_poll_wait(int poll, int *ready, int milliseconds) {
    struct epoll_event events[FW_POLLED];
    int count = epoll_wait(poll, events, FW_POLLED, milliseconds);
    for (int i = 0; i < count; i++)
        ready[i] = events[i].data.fd;
    return count;
}

static void fw_poll_close(int poll) { close(poll); }

#else

#define FW_POLLED 1
static int fw_poll_open(void) { errno = ENOSYS; return -1; }
static int fw_poll_add(int poll, int fd) { (void)poll; (void)fd; errno = ENOSYS; return -1; }
static int fw_poll_remove(int poll, int fd) { (void)poll; (void)fd; errno = ENOSYS; return -1; }
static int fw_poll_wait(int poll, int *ready, int ms) { (void)poll; (void)ready; (void)ms; errno = ENOSYS; return -1; }
static void fw_poll_close(int poll) { (void)poll; }

#endif
#endif

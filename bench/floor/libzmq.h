/* The same as zmtp.h through libzmq, to see what that costs. Its descriptor is edge-triggered: whoever sends on a socket, or
   reads from one, reads on until nothing is there. */
#ifndef FLOOR_LIBZMQ_H
#define FLOOR_LIBZMQ_H

#include <zmq.h>

#include "connection.h"
#include "json.h"

#define MOST_PARTS 256

static void on_message(Connection *c, const Span *parts, int count);

static void *libzmq_context;

static Connection *libzmq_open(Kernel *kernel, Kind kind, int port, const char *identity) {
    if (!libzmq_context) libzmq_context = checked(zmq_ctx_new());
    void *socket = zmq_socket(libzmq_context, kind == IOPUB ? ZMQ_SUB : ZMQ_DEALER);
    int zero = 0, fd;
    size_t size = sizeof fd;
    char address[64];
    if (!socket) return NULL;
    zmq_setsockopt(socket, ZMQ_SNDHWM, &zero, sizeof zero);
    zmq_setsockopt(socket, ZMQ_RCVHWM, &zero, sizeof zero);
    zmq_setsockopt(socket, ZMQ_LINGER, &zero, sizeof zero);
    if (kind == IOPUB) zmq_setsockopt(socket, ZMQ_SUBSCRIBE, "", 0);
    else zmq_setsockopt(socket, ZMQ_ROUTING_ID, identity, strlen(identity));
    snprintf(address, sizeof address, "tcp://127.0.0.1:%d", port);
    if (zmq_connect(socket, address) || zmq_getsockopt(socket, ZMQ_FD, &fd, &size)) {
        zmq_close(socket);
        return NULL;
    }
    Connection *c = connection_new(kind, fd, kernel, NULL);
    c->socket = socket;
    watch(c, EPOLL_CTL_ADD, EPOLLIN | EPOLLET);
    return c;
}

static void libzmq_receive(Connection *c) {
    static zmq_msg_t messages[MOST_PARTS];
    Span parts[MOST_PARTS];
    int count = 0;
    for (;;) {
        zmq_msg_init(&messages[count]);
        if (zmq_msg_recv(&messages[count], c->socket, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(&messages[count]);
            return;
        }
        parts[count] = (Span){zmq_msg_data(&messages[count]), zmq_msg_size(&messages[count])};
        bool more = zmq_msg_more(&messages[count]);
        count++;
        if (more && count < MOST_PARTS) continue;
        on_message(c, parts, count);
        while (count) zmq_msg_close(&messages[--count]);
    }
}

static void libzmq_send(Connection *c, const Span *parts, int count) {
    for (int i = 0; i < count; i++)
        zmq_send(c->socket, parts[i].p, parts[i].n, ZMQ_DONTWAIT | (i + 1 < count ? ZMQ_SNDMORE : 0));
    room_for(c, 0); /* at the turn's end it is read once more */
}

#endif

/* libzmq's own functions, found at run time in the library that pyzmq has loaded: nothing is linked, and both speak
 * of the same sockets. Declarations: libzmq's zmq.h (API 4.x). */
#ifndef FW_ZMQ_API_H
#define FW_ZMQ_API_H

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

#define FW_ZMQ_DONTWAIT 1
#define FW_ZMQ_SNDMORE 2
#define FW_ZMQ_EVENTS 15
#define FW_ZMQ_POLLIN 1
#define FW_ZMQ_POLLOUT 2

typedef struct {
    _Alignas(16) unsigned char opaque[64];
} fw_zmq_msg;

static struct {
    int (*msg_init)(fw_zmq_msg *);
    int (*msg_init_size)(fw_zmq_msg *, size_t);
    int (*msg_init_data)(fw_zmq_msg *, void *, size_t, void (*)(void *, void *), void *);
    int (*msg_send)(fw_zmq_msg *, void *, int);
    int (*msg_recv)(fw_zmq_msg *, void *, int);
    int (*msg_close)(fw_zmq_msg *);
    int (*msg_move)(fw_zmq_msg *, fw_zmq_msg *);
    void *(*msg_data)(fw_zmq_msg *);
    size_t (*msg_size)(const fw_zmq_msg *);
    int (*msg_more)(const fw_zmq_msg *);
    int (*getsockopt)(void *, int, void *, size_t *);
    int (*errno_)(void);
    void (*version)(int *, int *, int *);
} fw_zmq;

/* ``path``: pyzmq's compiled module, already loaded; dlsym searches what it depends on too. Returns 1 when all
 * functions were found. */
static int fw_zmq_find(const char *path) {
    static const char *names[] = {"zmq_msg_init", "zmq_msg_init_size", "zmq_msg_init_data", "zmq_msg_send",
                                  "zmq_msg_recv", "zmq_msg_close",     "zmq_msg_move",      "zmq_msg_data",
                                  "zmq_msg_size", "zmq_msg_more",      "zmq_getsockopt",    "zmq_errno",
                                  "zmq_version"};
    void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!library) return 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        void *symbol = dlsym(library, names[i]);
        if (!symbol) return 0;
        memcpy((char *)&fw_zmq + i * sizeof(void *), &symbol, sizeof symbol);
    }
    int major = 0, minor = 0, patch = 0;
    fw_zmq.version(&major, &minor, &patch);
    return major == 4;
}

#endif

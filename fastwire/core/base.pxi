# Spans, memory, counters, the system-call shim and the build's own facts.

cdef extern from "core/memory.h" nogil:
    void fw_trim()
    void *malloc "fw_malloc"(size_t)
    void *calloc "fw_calloc"(size_t, size_t)
    void *realloc "fw_realloc"(void *, size_t)
    size_t fw_allocations_left

cdef extern from "core/sys.h" nogil:
    enum: FW_RECV
    enum: FW_SENDMSG
    enum: FW_ZMQ_SEND
    enum: FW_ENTROPY
    enum: FW_MAX_IOVECS
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t fw_recv(int fd, void *buffer, size_t size)
    ssize_t fw_sendmsg(int fd, iovec *iov, int count)
    int fw_entropy(void *buffer, size_t size)
    size_t fw_script_left()
    void fw_script_clear()
    int fw_script_add(int call, int error, long bytes)

cdef extern from "core/standby.h" nogil:
    ctypedef struct fw_aside:
        pass
    void fw_aside_init(fw_aside *a)
    void fw_aside_destroy(fw_aside *a)
    ctypedef struct fw_beat:
        pass
    fw_beat *fw_beat_new()
    void fw_beat_release(fw_beat *beat)
    uint64_t fw_beat_turns(fw_beat *beat)
    void fw_beat_turn(fw_beat *beat, uint64_t now)
    enum: FW_UNSEEN
    enum: FW_WAITS
    enum: FW_IN_TURN
    void fw_beat_does(fw_beat *beat, int what)
    int fw_aside_watch(fw_aside *a, int fd, int tell, fw_beat *beat)
    void fw_aside_rest(fw_aside *a, bint rests)
    void fw_aside_leave(fw_aside *a)
    ssize_t fw_aside_recv(fw_aside *a, int fd, void *buffer, size_t size)
    bint fw_aside_has(fw_aside *a)
    ctypedef struct fw_purse:
        pass
    fw_purse *fw_purse_new()
    void fw_purse_release(fw_purse *purse)
    void fw_purse_set_limit(fw_purse *purse, size_t limit)
    size_t fw_purse_held(fw_purse *purse)
    void fw_purse_move(fw_purse *purse, fw_purse *whole)
    void fw_aside_charge(fw_aside *a, fw_purse *purse)
    void fw_standby_set_limit(size_t limit)
    uint64_t fw_standby_taken()
    size_t fw_standby_held()

cdef extern from "core/sha256.h" nogil:
    ctypedef struct fw_hmac_key:
        pass
    ctypedef struct fw_span:
        const void *ptr
        size_t len
    const char *fw_sha256_select(int portable)
    void fw_hmac_init(fw_hmac_key *k, const uint8_t *key, size_t n)
    fw_span fw_next_run(const fw_span *spans, size_t count, size_t *i)
    void fw_hmac_outer(const fw_hmac_key *k, const uint8_t *inner, uint8_t *digest)
    void fw_hmac(const fw_hmac_key *k, const fw_span *spans, size_t count, uint8_t *digest)
    void fw_hex(const uint8_t *data, size_t n, char *out)
    void fw_unhex(const char *text, size_t n, uint8_t *out)
    int fw_equal_constant_time(const void *a, const void *b, size_t n)

cdef extern from "core/text.h" nogil:
    ctypedef struct fw_utf8:
        uint8_t missing
        uint8_t low
        uint8_t high
    int fw_utf8_feed(fw_utf8 *s, const uint8_t *p, size_t n)
    int fw_utf8_valid(const uint8_t *p, size_t n)
    Py_ssize_t fw_utf8_of(uint8_t *out, const void *text, size_t n, int kind)
    const uint8_t *fw_json_plain(const uint8_t *p, const uint8_t *end)
    void fw_unmask(uint8_t *out, const uint8_t *p, size_t n, const uint8_t *key, uint64_t offset)

cdef extern from "core/difference.h" nogil:
    size_t fw_difference(
        uint8_t *out, size_t room, const uint8_t *other, size_t other_size, const uint8_t *text, size_t size
    )
    void fw_from_difference(uint8_t *out, size_t size, const uint8_t *other, const uint8_t *difference)
    const uint8_t *fw_end_of_difference(size_t size, const uint8_t *difference)
    bint fw_is_difference_of(const uint8_t *text, size_t size, const uint8_t *other, const uint8_t *difference)

cdef extern from "core/zmq_api.h" nogil:
    enum: FW_ZMQ_DONTWAIT
    enum: FW_ZMQ_SNDMORE
    enum: FW_ZMQ_EVENTS
    enum: FW_ZMQ_POLLIN
    enum: FW_ZMQ_POLLOUT
    ctypedef struct fw_zmq_msg:
        pass
    int fw_zmq_find(const char *path)
    int zmq_msg_init "fw_zmq.msg_init"(fw_zmq_msg *)
    int zmq_msg_recv "fw_zmq.msg_recv"(fw_zmq_msg *, void *, int)
    int zmq_msg_close "fw_zmq.msg_close"(fw_zmq_msg *)
    int zmq_msg_move "fw_zmq.msg_move"(fw_zmq_msg *, fw_zmq_msg *)
    void *zmq_msg_data "fw_zmq.msg_data"(fw_zmq_msg *)
    size_t zmq_msg_size "fw_zmq.msg_size"(const fw_zmq_msg *)
    int zmq_msg_more "fw_zmq.msg_more"(const fw_zmq_msg *)
    int zmq_getsockopt "fw_zmq.getsockopt"(void *, int, void *, size_t *)
    int zmq_errno "fw_zmq.errno_"()
    int fw_zmq_send(fw_zmq_msg *frame, void *socket, int flags)

cdef extern from "core/outgoing.h" nogil:
    ctypedef struct fw_account:
        pass
    ctypedef struct fw_record:
        fw_record *next
        size_t cost
        bint asks
        size_t count
        fw_span *frames
    fw_account *fw_account_new()
    size_t fw_account_bytes(fw_account *)
    void fw_account_adopt(fw_account *, fw_account *)
    void fw_accounts_let_go(fw_account *)
    fw_record *fw_record_new(fw_span signature, const fw_span *parts, size_t count)
    int fw_record_frame(fw_record *, size_t i, fw_zmq_msg *frame)
    void fw_record_charge(fw_record *, fw_account *)
    void fw_record_discharge(fw_record *)
    void fw_record_let_go(fw_record *)
    void fw_begin_giving(fw_record *)
    bint fw_end_giving()

cdef extern from *:
    """
    #if defined(__clang__)
    #define FW_COMPILER "clang " __clang_version__
    #elif defined(__GNUC__)
    #define FW_COMPILER "gcc " __VERSION__
    #else
    #define FW_COMPILER "unknown"
    #endif
    /* What leads to an exception stands apart from what runs; see setup.py. */
    #if defined(__GNUC__)
    static void __Pyx_AddTraceback(const char *, int, int, const char *) __attribute__((cold));
    #endif
    /* PyBuffer_Release leaves such a view alone. */
    #define fw_hold_nothing(view) ((view)->obj = NULL)
    /* Memory that is kept for reuse. A sanitizer sees what is used after its end only when it is freed. */
    #if defined(__SANITIZE_ADDRESS__)
    #define FW_SPARE_BYTES 0
    #elif defined(__has_feature)
    #if __has_feature(address_sanitizer)
    #define FW_SPARE_BYTES 0
    #endif
    #endif
    #ifndef FW_SPARE_BYTES
    #define FW_SPARE_BYTES (2u << 20)
    #endif
    """
    const size_t FW_SPARE_BYTES
    const char *FW_COMPILER
    const char *CYTHON_ABI
    void hold_nothing "fw_hold_nothing"(Py_buffer *view)

cdef extern from "Python.h":
    bint PyUnicode_IS_ASCII(object text)
    int PyUnicode_KIND(object text)
    void *PyUnicode_DATA(object text)
    uint8_t *PyUnicode_1BYTE_DATA(object text)

PROTOCOL_V1 = "v1.kernel.websocket.jupyter.org"

# Parts up to this size are copied into contiguous blocks, larger ones are referenced where they lie.
cdef enum:
    COPY_LIMIT = 8192


# -- live objects, counted so that a test can fail on a leak --

cdef struct Live:
    Py_ssize_t messages
    Py_ssize_t zmq_messages
    Py_ssize_t blocks
    Py_ssize_t buffers
    Py_ssize_t records      # that an uplink holds; libzmq may hold more

cdef Live alive
memset(&alive, 0, sizeof(alive))


def live():
    return {
        "messages": alive.messages,
        "zmq_messages": alive.zmq_messages,
        "blocks": alive.blocks,
        "buffers": alive.buffers,
        "records": alive.records,
    }


# -- memory for bytes that pass through --

# What is given back is kept for the next: the C library would return it to the system, whose page faults then cost more
# than what was done with the bytes. Sizes are powers of two.
cdef enum:
    LEAST_BLOCK = 11        # 2 KiB
    BLOCK_SIZES = 8         # up to 256 KiB

cdef struct Spare:
    Spare *next

cdef Spare *spare_blocks[BLOCK_SIZES]
cdef size_t spare_bytes = 0
cdef size_t block_bytes = 0     # of those that are in use
cdef size_t history_bytes = 0   # of what refuses replays, of all sockets (`sign`)
cdef size_t ledger_bytes = 0    # of what is known of runs, of all kernels (`ledger`)
cdef Py_ssize_t log_bytes = 0   # what logs count as theirs, most of it blocks
memset(spare_blocks, 0, sizeof(spare_blocks))


cdef inline size_t aligned(size_t size) noexcept nogil:
    return (size + 7) & ~<size_t>7


cdef inline int block_size_of(size_t size) noexcept nogil:
    """Which of the sizes; BLOCK_SIZES for more than there is."""
    cdef int which = 0
    while which < BLOCK_SIZES and (<size_t>1 << (LEAST_BLOCK + which)) < size:
        which += 1
    return which


cdef void *block_get(size_t *size) noexcept:
    """At least ``size`` bytes, how many is written there; NULL without memory."""
    global spare_bytes, block_bytes
    cdef int which = block_size_of(size[0])
    cdef Spare *block
    if which < BLOCK_SIZES:
        size[0] = <size_t>1 << (LEAST_BLOCK + which)
        block = spare_blocks[which]
        if block != NULL:
            spare_blocks[which] = block.next
            spare_bytes -= size[0]
            block_bytes += size[0]
            alive.blocks += 1
            return block
    block = <Spare *>malloc(size[0])
    if block != NULL:
        block_bytes += size[0]
        alive.blocks += 1
    return block


cdef void block_put(void *block, size_t size) noexcept:
    """``size`` is what `block_get` said."""
    global spare_bytes, block_bytes
    cdef int which = block_size_of(size)
    block_bytes -= size
    alive.blocks -= 1
    if which == BLOCK_SIZES or spare_bytes + size > FW_SPARE_BYTES:
        free(block)
        return
    (<Spare *>block).next = spare_blocks[which]
    spare_blocks[which] = <Spare *>block
    spare_bytes += size


def memory_beside_logs():
    cdef Py_ssize_t used = <Py_ssize_t>(block_bytes + spare_bytes + history_bytes + ledger_bytes + fw_standby_held())
    return max(used - log_bytes, <Py_ssize_t>0)


# -- counters, since the process began --

# Of a message's channel; in the order of Uplink's sockets, then what only kernels send.
cdef enum:
    SHELL
    CONTROL
    STDIN
    UPLINKS         # channels that take messages
    IOPUB = 3
    ELSEWHERE = 4
    CHANNEL_COUNT = 5

CHANNELS = ("shell", "control", "stdin", "iopub", "other")

cdef struct Traffic:
    uint64_t messages
    uint64_t bytes

cdef struct Counters:
    Traffic from_kernels[CHANNEL_COUNT]
    Traffic to_kernels[CHANNEL_COUNT]
    Traffic from_clients
    Traffic to_clients
    uint64_t batches
    uint64_t rejected
    uint64_t invalid_signatures     # also of messages that pass all the same
    uint64_t replayed_signatures
    uint64_t budget_hits            # drains that ended with messages still there
    uint64_t waited                 # messages that were not sent at once: a socket was full, or shell held
    uint64_t flushes
    uint64_t blocked
    uint64_t no_buffers

cdef Counters counted
cdef Counters uncounted     # of queues that are no client's
memset(&counted, 0, sizeof(counted))
memset(&uncounted, 0, sizeof(uncounted))


cdef inline void tally(Traffic *traffic, uint64_t nbytes) noexcept nogil:
    traffic.messages += 1
    traffic.bytes += nbytes


def counters():
    cdef int i
    result = {}
    for i in range(CHANNEL_COUNT):
        result["from_kernels", CHANNELS[i], "messages"] = counted.from_kernels[i].messages
        result["from_kernels", CHANNELS[i], "bytes"] = counted.from_kernels[i].bytes
        result["to_kernels", CHANNELS[i], "messages"] = counted.to_kernels[i].messages
        result["to_kernels", CHANNELS[i], "bytes"] = counted.to_kernels[i].bytes
    result["from_clients", "", "messages"] = counted.from_clients.messages
    result["from_clients", "", "bytes"] = counted.from_clients.bytes
    result["to_clients", "", "messages"] = counted.to_clients.messages
    result["to_clients", "", "bytes"] = counted.to_clients.bytes
    result["batches", "", ""] = counted.batches
    result["rejected", "", ""] = counted.rejected
    result["invalid_signatures", "", ""] = counted.invalid_signatures
    result["replayed_signatures", "", ""] = counted.replayed_signatures
    result["budget_hits", "", ""] = counted.budget_hits
    result["waited", "", ""] = counted.waited
    result["flushes", "", ""] = counted.flushes
    result["blocked", "", ""] = counted.blocked
    result["no_buffers", "", ""] = counted.no_buffers
    result["taken_aside", "", ""] = fw_standby_taken()
    return result


# -- spans over Python's buffers --

cdef inline int span_of(object obj, Py_buffer *held, fw_span *span) except -1:
    """Where obj's bytes are; ``held`` is to be released when they are no longer needed."""
    hold_nothing(held)
    if PyBytes_CheckExact(obj):
        span.ptr = PyBytes_AS_STRING(obj)
        span.len = PyBytes_GET_SIZE(obj)
        return 0
    PyObject_GetBuffer(obj, held, PyBUF_SIMPLE)
    span.ptr = held.buf
    span.len = held.len
    return 0


cdef inline void release(Py_buffer *held) noexcept:
    PyBuffer_Release(held)


cdef enum:
    FEW = 8


@cython.final
@cython.freelist(8)
cdef class Views:
    """Spans over a sequence of buffers, released with the object."""

    cdef fw_span *spans
    cdef Py_ssize_t count
    cdef Py_buffer *held
    cdef Py_ssize_t taken
    cdef object parts
    cdef fw_span few_spans[FEW]
    cdef Py_buffer few_held[FEW]

    def __cinit__(self, parts):
        cdef Py_ssize_t i
        # A tuple: hashlib lets other threads run, and the caller's list may be theirs.
        self.parts = tuple(PySequence_Fast(parts, "parts must be a sequence of buffers"))
        self.count = len(self.parts)
        if self.count <= FEW:
            self.spans = self.few_spans
            self.held = self.few_held
        else:
            self.spans = <fw_span *>malloc(self.count * sizeof(fw_span))
            self.held = <Py_buffer *>malloc(self.count * sizeof(Py_buffer))
            if self.spans == NULL or self.held == NULL:
                raise MemoryError
        for i in range(self.count):
            span_of(self.parts[i], &self.held[i], &self.spans[i])
            self.taken = i + 1

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.taken):
            release(&self.held[i])
        if self.spans != self.few_spans:
            free(self.spans)
            free(self.held)


cdef inline bytes span_bytes(fw_span span):
    return PyBytes_FromStringAndSize(<const char *>span.ptr, <Py_ssize_t>span.len)


cdef object need_four(Py_ssize_t count):
    return MalformedMessage(
        f"a Jupyter message has header, parent_header, metadata and content; got {count} parts"
    )


# -- a growing list of spans --

cdef enum:
    FEW_SPANS = 1024

cdef struct Spans:
    fw_span *items
    size_t count
    size_t room


cdef int spans_add(Spans *spans, const void *ptr, size_t length) noexcept nogil:
    cdef fw_span *items
    cdef size_t room
    if spans.count == spans.room:
        room = spans.room * 2 if spans.room else 16
        items = <fw_span *>realloc(spans.items, room * sizeof(fw_span))
        if items == NULL:
            return -1
        spans.items = items
        spans.room = room
    spans.items[spans.count].ptr = ptr
    spans.items[spans.count].len = length
    spans.count += 1
    return 0


cdef void spans_clear(Spans *spans) noexcept nogil:
    """What one message of very many parts needed is not kept."""
    spans.count = 0
    if spans.room > FEW_SPANS:
        free(spans.items)
        spans.items = NULL
        spans.room = 0


# -- what this build is --

cdef bint direct_zmq = False
cdef const char *sha_instructions = NULL     # their name


def _find_libzmq():
    try:
        from zmq.backend.cython import _zmq
    except ImportError:
        return False
    return bool(fw_zmq_find(os.fsencode(_zmq.__file__)))


cdef bint libzmq_found = _find_libzmq()
direct_zmq = libzmq_found
sha_instructions = fw_sha256_select(0)


def build_info():
    import zmq

    from fastwire import __version__
    return {
        "version": __version__,
        "zmq": "direct" if direct_zmq else "pyzmq",
        "libzmq": zmq.zmq_version(),
        "zmtp": "3.1",
        "sha256": "portable" if sha_instructions == NULL else sha_instructions.decode(),
        "cython": CYTHON_ABI.decode().replace("_", "."),
        "compiler": FW_COMPILER.decode(),
    }


# -- for the tests --

def script_syscalls(steps):
    calls = {"recv": FW_RECV, "sendmsg": FW_SENDMSG, "zmq_send": FW_ZMQ_SEND, "entropy": FW_ENTROPY}
    numbers = {name: number for number, name in errorcode.items()}
    fw_script_clear()
    for call, outcome in steps:
        error, count = (numbers[outcome], 0) if isinstance(outcome, str) else (0, outcome)
        if fw_script_add(calls[call], error, count):
            raise MemoryError


def scripted_left():
    return fw_script_left() + fw_allocations_left


def fail_allocation(size_t number):
    global fw_allocations_left
    fw_allocations_left = number


def force_portable(portable):
    global sha_instructions
    sha_instructions = fw_sha256_select(bool(portable))


def use_pyzmq(fallback):
    global direct_zmq
    direct_zmq = libzmq_found and not fallback

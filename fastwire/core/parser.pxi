# RFC 6455: bytes in, messages out, or frames into another socket's queue.

OP_TEXT = 0x1
OP_BINARY = 0x2
OP_CLOSE = 0x8
OP_PING = 0x9
OP_PONG = 0xA
RSV1 = 0x40

cdef enum:
    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA
    FIN_BIT = 0x80
    RSV1_BIT = 0x40
    RSV_BITS = 0x70
    MASK_BIT = 0x80
    MAX_CONTROL = 125
    READ_SIZE = 262144
    RELAY_SIZE = 16384      # of what is passed on: its sender is to see that a slow reader takes some

cdef enum:
    NO_ERROR
    BAD_FRAME
    BAD_TEXT
    TOO_BIG
    TOO_MANY
    NO_ROOM


cdef bint is_close_code(int code) noexcept nogil:
    """Codes that may stand in a Close frame: RFC 6455 section 7.4 and IANA's registry."""
    return (
        1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
    )


cdef const char *close_problem(const uint8_t *p, size_t got, size_t length, int *error) noexcept nogil:
    """What the first ``got`` bytes of a Close payload show to be wrong with it, or NULL."""
    cdef fw_utf8 reason
    error[0] = BAD_FRAME
    if length == 1:
        return "a Close frame has a code of two bytes or nothing"
    if got < 2:
        return NULL
    if not is_close_code((p[0] << 8) | p[1]):
        return "a Close frame has a code that must not be sent"
    reason.missing = 0
    if not fw_utf8_feed(&reason, p + 2, got - 2) or (got == length and reason.missing):
        error[0] = BAD_TEXT
        return "a Close frame's reason is not UTF-8"
    return NULL


cdef dict FRAME_ERRORS = {
    BAD_FRAME: ProtocolError, BAD_TEXT: InvalidPayload, TOO_BIG: MessageTooBig, TOO_MANY: PolicyViolation,
    NO_ROOM: OutOfMemory,
}


cdef object frame_error(int error, const char *problem):
    return FRAME_ERRORS[error](problem.decode())


def parse_close(payload):
    cdef Py_buffer held
    cdef fw_span span
    cdef const char *problem
    cdef int error
    span_of(payload, &held, &span)
    try:
        problem = close_problem(<const uint8_t *>span.ptr, span.len, span.len, &error)
        if problem != NULL:
            raise frame_error(error, problem)
        if span.len == 0:
            return None, ""
        data = span_bytes(span)
        return int.from_bytes(data[:2], "big"), data[2:].decode()
    finally:
        release(&held)


def close_payload(code, str reason=""):
    if code is None:
        return b""
    if not 0 <= code < 65536 or not is_close_code(code):
        raise ValueError(f"{code} is no code for a Close frame: 1000 to 1003, 1007 to 1014 and 3000 to 4999 are")
    text = reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")
    return int(code).to_bytes(2, "big") + text.encode()


cdef size_t header_size(uint64_t length) noexcept nogil:
    return 2 if length < 126 else 4 if length < 65536 else 10


cdef enum:
    KEYS = 64               # read at a time, at most 256 bytes of getentropy(3)
    MOST_HEADER = 14

cdef uint8_t keys[4 * KEYS]
cdef int keys_left = 0


cdef int new_key(uint8_t *key) except -1:
    """A mask that nobody can foresee (RFC 6455 section 5.3)."""
    global keys_left
    if keys_left == 0:
        if fw_entropy(keys, sizeof(keys)):
            raise OSError(errno, os.strerror(errno))
        keys_left = KEYS
    keys_left -= 1
    memcpy(key, &keys[4 * keys_left], 4)
    return 0


cdef size_t write_header(char *out, int first_byte, uint64_t length) noexcept nogil:
    """A server's frame header, in 2, 4 or 10 bytes."""
    cdef int i
    out[0] = <char>first_byte
    if length < 126:
        out[1] = <char>length
        return 2
    if length < 65536:
        out[1] = 126
        out[2] = <char>(length >> 8)
        out[3] = <char>length
        return 4
    out[1] = 127
    for i in range(8):
        out[2 + i] = <char>(length >> (56 - 8 * i))
    return 10


cdef int first_byte(int opcode, uint64_t length, bint fin) except -1:
    cdef int bare = opcode & ~RSV1_BIT
    if opcode < 0 or not (bare <= BINARY or CLOSE <= bare <= PONG):
        raise ValueError(f"unknown opcode {opcode:#x}")
    if bare >= CLOSE and (not fin or length > MAX_CONTROL or opcode != bare):
        raise ValueError("a control frame is whole, not compressed, and has at most 125 bytes")
    return opcode | (FIN_BIT if fin else 0)


def frame_header(int opcode, uint64_t length, *, bint fin=True):
    cdef char out[10]
    cdef int first = first_byte(opcode, length, fin)
    return PyBytes_FromStringAndSize(out, <Py_ssize_t>write_header(out, first, length))


# A complete message or control frame that was not taken yet. It lies in bytes of its own, or in the shared read buffer:
# there still masked, unless it is text, so that whoever copies it unmasks it in the same pass.
cdef struct Event:
    char *ptr
    size_t len
    PyObject *own       # bytes, maybe with room behind ``len``
    uint8_t opcode      # with RSV1 for a compressed message
    bint masked
    uint8_t key[4]


cdef extern from *:
    """
    /* Bytes to be filled, and bytes of another length; without an exception when there is no memory. */
    static PyObject *fw_new_bytes(size_t length) {
        PyObject *made = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)length);
        if (!made) PyErr_Clear();
        return made;
    }
    static int fw_resize_bytes(PyObject **bytes, size_t length) {
        int failed = _PyBytes_Resize(bytes, (Py_ssize_t)length);
        if (failed) PyErr_Clear();
        return !failed;
    }
    """
    PyObject *fw_new_bytes(size_t length)
    bint fw_resize_bytes(PyObject **bytes, size_t length)


cdef PyObject *new_bytes(size_t length) noexcept:
    cdef PyObject *made = fw_new_bytes(length)
    alive.blocks += made != NULL
    return made


cdef void free_bytes(PyObject *own) noexcept:
    alive.blocks -= 1
    Py_DECREF(<object>own)


cdef bint resize_bytes(PyObject **own, size_t length) noexcept:
    """False, and the bytes are gone, when there is no memory."""
    cdef bint done = fw_resize_bytes(own, length)
    alive.blocks -= not done
    return done


cdef bint own_event(Event *event) noexcept:
    """Gives it bytes of its own, unmasked. False when there is no memory."""
    cdef PyObject *own = new_bytes(event.len)
    if own == NULL:
        return False
    copy = PyBytes_AS_STRING(<object>own)
    if event.masked:
        fw_unmask(<uint8_t *>copy, <uint8_t *>event.ptr, event.len, event.key, 0)
    else:
        memcpy(copy, event.ptr, event.len)
    event.own = own
    event.ptr = copy
    event.masked = False
    return True


cdef void unmask_event(Event *event) noexcept:
    """In place."""
    if event.masked:
        fw_unmask(<uint8_t *>event.ptr, <uint8_t *>event.ptr, event.len, event.key, 0)
        event.masked = False


# One read buffer serves all parsers. The parser whose messages lie in it, if any (borrowed: it clears this itself).
# One whose messages are being sent keeps the buffer until they are: Python code may run meanwhile, and other threads.
cdef char *read_buffer = NULL
cdef PyObject *read_buffer_owner = NULL


cdef class WriteQueue


# It refers to one queue, which refers to no parser: there is no cycle to look for.
@cython.no_gc
@cython.final
cdef class FrameParser:
    cdef uint64_t max_message_size
    cdef uint64_t max_fragments     # 0: any number
    cdef bint deflate
    cdef bint client                # our role: what a server sends is not masked
    cdef bint relaying              # frames are not joined, but passed on as they come,
    cdef WriteQueue sink            # to here, or nowhere
    cdef Counters *counts

    cdef uint8_t head[MOST_HEADER]  # of the frame that is being read
    cdef int head_length
    cdef bint in_payload
    cdef uint8_t opcode
    cdef bint fin
    cdef uint8_t key[4]
    cdef uint64_t frame_length
    cdef uint64_t frame_got

    cdef readonly uint64_t control_frames

    cdef uint64_t fragments         # of the message that is being joined
    cdef uint8_t message_opcode     # of the message that is being joined, 0 for none; with RSV1
    cdef PyObject *message          # bytes with room for ``message_room``
    cdef size_t message_length
    cdef size_t message_room
    cdef fw_utf8 utf8
    cdef uint8_t control[MAX_CONTROL]

    cdef Event *events
    cdef size_t head_event
    cdef size_t event_count
    cdef size_t event_room
    cdef size_t event_bytes
    cdef size_t owned           # events before it have bytes of their own

    cdef int error
    cdef const char *problem
    cdef bint saw_close

    cdef bint lent              # its messages are being sent by an Uplink
    cdef char *kept_buffer      # the read buffer, when another parser needed one meanwhile

    def __cinit__(self, *args, **options):
        self.counts = &uncounted

    def __init__(
        self, uint64_t max_message_size=10485760, *, bint deflate=False, uint64_t max_fragments=0, bint client=False
    ):
        self.max_message_size = max_message_size
        self.max_fragments = max_fragments
        self.deflate = deflate
        self.client = client
        self.counts = &uncounted if client else &counted

    def __dealloc__(self):
        global read_buffer_owner
        cdef size_t i
        if read_buffer_owner == <PyObject *>self:
            read_buffer_owner = NULL
        for i in range(self.head_event, self.event_count):
            self.drop(&self.events[i])
        free(self.events)
        free(self.kept_buffer)
        if self.message != NULL:
            free_bytes(self.message)

    # -- bytes in --

    def feed(self, data):
        cdef Py_buffer held
        cdef fw_span span
        cdef size_t done = 0, piece
        span_of(data, &held, &span)
        try:
            while done < span.len:
                try:
                    self.claim_read_buffer()
                except MemoryError:
                    if done == 0:
                        raise
                    self.no_memory()  # the caller could not go on in the middle
                    return
                piece = min(span.len - done, <size_t>READ_SIZE)
                memcpy(read_buffer, <const char *>span.ptr + done, piece)
                self.parse(<uint8_t *>read_buffer, piece)
                done += piece
        finally:
            release(&held)

    def receive(self, int fd):
        return self.receive_from(fd)

    cdef ssize_t receive_from(self, int fd) except -2:
        cdef ssize_t got
        self.claim_read_buffer()
        got = fw_recv(fd, read_buffer, RELAY_SIZE if self.relaying else READ_SIZE)
        if got < 0:
            if errno in (EAGAIN, ENOBUFS, ENOMEM):
                return -1
            raise OSError(errno, os.strerror(errno))
        self.parse(<uint8_t *>read_buffer, got)
        return got

    cdef int claim_read_buffer(self) except -1:
        """Makes the buffer free: messages in it that nobody took yet move into memory of their own."""
        global read_buffer, read_buffer_owner
        cdef FrameParser owner
        self.check_not_lent()
        self.leave_kept_buffer()
        if read_buffer_owner != NULL:
            owner = <FrameParser>read_buffer_owner
            if owner.lent:
                owner.kept_buffer = read_buffer
                read_buffer = NULL
            else:
                owner.own_events()
            read_buffer_owner = NULL
        if read_buffer == NULL:
            read_buffer = <char *>malloc(READ_SIZE)
            if read_buffer == NULL:
                raise MemoryError
        return 0

    cdef int check_not_lent(self) except -1:
        if self.lent:
            raise RuntimeError("this parser's messages are being sent: use it from one thread, not from within a call")
        return 0

    cdef int lend(self) except -1:
        """Until `take_back` the events stay where they are."""
        self.check_not_lent()
        self.leave_kept_buffer()
        self.lent = True
        return 0

    cdef void take_back(self) noexcept:
        self.lent = False

    cdef int leave_kept_buffer(self) except -1:
        if self.kept_buffer != NULL:
            self.own_events()
            free(self.kept_buffer)
            self.kept_buffer = NULL
        return 0

    cdef int own_events(self) except -1:
        cdef size_t i
        for i in range(max(self.head_event, self.owned), self.event_count):
            if self.events[i].own == NULL and not own_event(&self.events[i]):
                raise MemoryError
            self.owned = i + 1
        return 0

    cdef void parse(self, uint8_t *p, size_t length) noexcept:
        global read_buffer_owner
        cdef uint8_t *end = p + length
        while p < end and not self.error and not self.saw_close:
            if not self.in_payload:
                p = self.parse_head(p, end)
                if self.in_payload and self.is_passing():
                    self.begin_passing()
            if self.in_payload and not self.error:
                p = self.parse_payload(p, end)
        if self.event_count > self.head_event:
            read_buffer_owner = <PyObject *>self

    # -- frame headers --

    cdef int fail(self, int error, const char *problem) noexcept:
        self.error = error
        self.problem = problem
        return -1

    cdef int no_memory(self) noexcept:
        return self.fail(NO_ROOM, "there is no memory for the message")

    cdef uint8_t *parse_head(self, uint8_t *p, uint8_t *end) noexcept:
        """Collects one header; each octet is judged as it comes."""
        cdef int need
        while p < end:
            self.head[self.head_length] = p[0]
            self.head_length += 1
            p += 1
            if self.head_length == 1:
                if self.judge_first():
                    return p
            elif self.head_length == 2:
                if self.judge_second():
                    return p
            if self.head_length >= 2:
                need = self.length_bytes()
                if self.head_length <= 2 + need and self.judge_length(need):
                    return p
                if self.head_length == 2 + need + (0 if self.client else 4):
                    if not self.client:
                        memcpy(self.key, &self.head[2 + need], 4)
                    self.head_length = 0
                    self.frame_got = 0
                    self.in_payload = True
                    return p
        return p

    cdef int length_bytes(self) noexcept:
        cdef int short_length = self.head[1] & 0x7F
        return 0 if short_length < 126 else 2 if short_length == 126 else 8

    cdef int judge_first(self) noexcept:
        cdef uint8_t first = self.head[0]
        cdef int reserved = first & RSV_BITS
        self.opcode = first & 0x0F
        self.fin = (first & FIN_BIT) != 0
        if reserved == RSV1_BIT and self.deflate and (self.opcode == TEXT or self.opcode == BINARY):
            reserved = 0
        if reserved:
            return self.fail(BAD_FRAME, "a reserved bit is set")
        if self.opcode >= CLOSE:
            if self.opcode > PONG:
                return self.fail(BAD_FRAME, "the opcode is reserved")
            if not self.fin:
                return self.fail(BAD_FRAME, "a control frame is fragmented")
        elif self.opcode > BINARY:
            return self.fail(BAD_FRAME, "the opcode is reserved")
        elif self.opcode == CONTINUATION:
            if not self.message_opcode:
                return self.fail(BAD_FRAME, "a continuation without a message to continue")
            self.fragments += 1
            if self.fragments == self.max_fragments:
                return self.fail(TOO_MANY, "the message has more fragments than the server accepts")
        elif self.message_opcode:
            return self.fail(BAD_FRAME, "a new message begins inside another")
        else:
            self.message_opcode = first & (0x0F | RSV1_BIT)
            self.fragments = 0
            self.utf8.missing = 0
        return 0

    cdef int judge_second(self) noexcept:
        if self.client and self.head[1] & MASK_BIT:
            return self.fail(BAD_FRAME, "a server's frame is masked")
        if not self.client and not self.head[1] & MASK_BIT:
            return self.fail(BAD_FRAME, "a client's frame is not masked")
        cdef int length = self.head[1] & 0x7F
        cdef int error
        cdef const char *problem
        if self.opcode >= CLOSE and length > MAX_CONTROL:
            return self.fail(BAD_FRAME, "a control frame is longer than 125 bytes")
        if self.opcode == CLOSE:
            problem = close_problem(self.head, 0, length, &error)
            if problem != NULL:
                return self.fail(error, problem)
        return 0

    cdef int judge_length(self, int need) noexcept:
        """With each octet of the length: what it will be at least and at most."""
        cdef uint64_t length = self.head[1] & 0x7F
        cdef uint64_t to_come = 0
        cdef int i
        if need:
            length = 0
            for i in range(need):
                length <<= 8
                to_come <<= 8
                if i < self.head_length - 2:
                    length |= self.head[2 + i]
                else:
                    to_come |= 0xFF
            if length >> 63:
                return self.fail(BAD_FRAME, "the length has its highest bit set")
            if length + to_come < (126 if need == 2 else 65536):
                return self.fail(BAD_FRAME, "the length is not in its shortest form")
        self.frame_length = length
        if self.opcode < CLOSE and (
            length > self.max_message_size or self.message_length > self.max_message_size - length
        ):
            return self.fail(TOO_BIG, "message too big")
        return 0

    # -- payloads --

    cdef uint8_t *parse_payload(self, uint8_t *p, uint8_t *end) noexcept:
        cdef size_t room = end - p
        cdef uint64_t left = self.frame_length - self.frame_got
        cdef size_t n = <size_t>left if left < room else room
        if self.is_passing():
            self.pass_bytes(p, n)
        elif self.opcode >= CLOSE:
            fw_unmask(p, p, n, self.key, self.frame_got)
            self.control_bytes(p, n)
        else:
            self.data_bytes(p, n)
        self.frame_got += n
        if self.frame_got == self.frame_length:
            self.in_payload = False
        return p + n

    cdef int control_bytes(self, uint8_t *p, size_t n) noexcept:
        cdef int error
        cdef const char *problem
        cdef size_t got = <size_t>self.frame_got + n
        cdef bint whole = n == self.frame_length
        if not whole:
            memcpy(&self.control[self.frame_got], p, n)
            p = self.control
        if self.opcode == CLOSE:
            problem = close_problem(p, got, <size_t>self.frame_length, &error)
            if problem != NULL:
                return self.fail(error, problem)
        if got < self.frame_length:
            return 0
        self.saw_close = self.opcode == CLOSE
        self.control_frames += 1
        return self.emit(self.opcode, <char *>p, <size_t>self.frame_length, not whole)

    cdef int data_bytes(self, uint8_t *p, size_t n) noexcept:
        cdef bint last = self.fin and self.frame_got + n == self.frame_length
        cdef bint whole = last and self.message_length == 0
        cdef uint8_t opcode = self.message_opcode
        if whole and opcode != TEXT:
            self.message_opcode = 0
            return self.emit_masked(opcode, <char *>p, n)
        if whole:
            fw_unmask(p, p, n, self.key, self.frame_got)
        else:
            p = self.join(p, n)
            if p == NULL:
                return -1
        if opcode == TEXT and (not fw_utf8_feed(&self.utf8, p, n) or (last and self.utf8.missing)):
            return self.fail(BAD_TEXT, "a text message is not UTF-8")
        if not last:
            return 0
        self.message_opcode = 0
        return self.emit(opcode, <char *>p, n, False) if whole else self.emit_joined(opcode)

    cdef uint8_t *join(self, uint8_t *p, size_t n) noexcept:
        """Unmasks ``n`` bytes to the end of the message, and returns where. Room grows with the bytes that have come,
        never with the length that was declared."""
        cdef uint8_t *end
        cdef size_t length = self.message_length + n
        if n == 0:
            return p
        if length > self.message_room and not self.make_room(length):
            self.no_memory()
            return NULL
        end = <uint8_t *>PyBytes_AS_STRING(<object>self.message) + self.message_length
        fw_unmask(end, p, n, self.key, self.frame_got)
        self.message_length = length
        return end

    cdef bint make_room(self, size_t length) noexcept:
        cdef size_t room = max(length + length // 2, <size_t>4096)
        cdef uint64_t whole = self.message_length + self.frame_length - self.frame_got
        if self.fin and whole <= 2 * length:
            room = <size_t>whole
        self.message_room = 0
        if self.message == NULL:
            self.message = new_bytes(room)
        else:
            resize_bytes(&self.message, room)
        if self.message == NULL:
            self.message_length = 0
            return False
        self.message_room = room
        return True

    cdef int emit_joined(self, uint8_t opcode) noexcept:
        cdef Event *event = self.new_event(opcode, self.message_length)
        if event == NULL:
            return -1
        event.own = self.message
        event.ptr = PyBytes_AS_STRING(<object>self.message)
        tally(&self.counts.from_clients, event.len)
        self.message = NULL
        self.message_length = 0
        self.message_room = 0
        return 0

    cdef int emit_masked(self, uint8_t opcode, char *p, size_t n) noexcept:
        cdef Event *event = self.new_event(opcode, n)
        if event == NULL:
            return -1
        event.ptr = p
        event.masked = True
        memcpy(event.key, self.key, 4)
        tally(&self.counts.from_clients, n)
        return 0

    cdef int emit(self, uint8_t opcode, char *p, size_t n, bint copy) noexcept:
        cdef Event *event = self.new_event(opcode, n)
        if event == NULL:
            return -1
        event.ptr = p
        if copy and not own_event(event):
            self.event_count -= 1
            self.event_bytes -= n
            return self.no_memory()
        if opcode < CLOSE:
            tally(&self.counts.from_clients, n)
        return 0

    cdef Event *new_event(self, uint8_t opcode, size_t length) noexcept:
        cdef Event *events
        cdef size_t room
        if self.event_count == self.event_room:
            room = self.event_room * 2 if self.event_room else 8
            events = <Event *>realloc(self.events, room * sizeof(Event))
            if events == NULL:
                self.no_memory()
                return NULL
            self.events = events
            self.event_room = room
        events = &self.events[self.event_count]
        memset(events, 0, sizeof(Event))
        events.opcode = opcode
        events.len = length
        self.event_count += 1
        self.event_bytes += length
        return events

    # -- passing on --

    def relay(self, WriteQueue sink):
        self.check_not_lent()
        if sink is not None and (
            self.head_length or self.in_payload or self.message_opcode or self.event_count > self.head_event
        ):
            raise ValueError("frames can only be passed on from a parser's first")
        self.relaying = True
        self.sink = sink

    cdef inline bint is_passing(self) noexcept:
        """A Close frame is not passed on: it is for us, and what follows from it is to be decided."""
        return self.relaying and self.opcode != CLOSE

    cdef int begin_passing(self) noexcept:
        cdef int first = self.opcode | (FIN_BIT if self.fin else 0)
        if self.sink is None:
            return 0
        try:
            self.sink.begin_frame(first, self.frame_length)
        except MemoryError:
            return self.no_memory()
        except OSError:
            return self.fail(NO_ROOM, "the system has no random bytes")
        return 0

    cdef int pass_bytes(self, uint8_t *p, size_t n) noexcept:
        """As they come, whether their frame is whole or not: what is passed on takes no memory here. Their mask comes
        off, and the next goes on, in one pass."""
        try:
            if self.sink is not None:
                self.sink.put_payload(p, n, self.key)
        except MemoryError:
            return self.no_memory()
        if self.frame_got + n < self.frame_length:
            return 0
        if self.opcode >= CLOSE:
            self.control_frames += 1
            return 0
        self.counts.from_clients.bytes += self.frame_length
        if self.fin:
            self.counts.from_clients.messages += 1
            self.message_opcode = 0
        return 0

    # -- messages out --

    cdef inline Event *peek(self) noexcept:
        """The first event, or NULL. What lies in the read buffer may still be masked: `unmask_event`."""
        return &self.events[self.head_event] if self.head_event < self.event_count else NULL

    cdef void drop(self, Event *event) noexcept:
        if event.own != NULL:
            free_bytes(event.own)

    cdef void took(self) noexcept:
        """The first event has been used."""
        global read_buffer_owner
        cdef Event *event = &self.events[self.head_event]
        self.event_bytes -= event.len
        self.drop(event)
        self.head_event += 1
        if self.head_event == self.event_count:
            self.head_event = 0
            self.event_count = 0
            self.owned = 0
            if read_buffer_owner == <PyObject *>self:
                read_buffer_owner = NULL
            free(self.kept_buffer)
            self.kept_buffer = NULL
            if self.event_room > 64:
                free(self.events)
                self.events = NULL
                self.event_room = 0

    cdef object raise_error(self):
        raise frame_error(self.error, self.problem)

    def __iter__(self):
        return self

    def __next__(self):
        # First: it may run a finalizer, which may come back here. Nothing else does, and what fails takes nothing.
        cdef tuple item = PyTuple_New(2)
        cdef Event *event = self.peek()
        cdef object opcode
        self.check_not_lent()
        if event == NULL:
            if self.error:
                self.raise_error()
            raise StopIteration
        payload = self.payload_of(event)
        opcode = event.opcode
        Py_INCREF(opcode)
        PyTuple_SET_ITEM(item, 0, opcode)
        Py_INCREF(payload)
        PyTuple_SET_ITEM(item, 1, payload)
        self.took()
        return item

    cdef object payload_of(self, Event *event):
        if event.opcode == TEXT:
            return PyUnicode_DecodeUTF8(event.ptr, <Py_ssize_t>event.len, NULL)
        if event.own == NULL and not own_event(event):
            raise MemoryError
        if <size_t>PyBytes_GET_SIZE(<object>event.own) != event.len:
            return PyBytes_FromStringAndSize(event.ptr, <Py_ssize_t>event.len)
        return <bytes>event.own

    @property
    def pending(self):
        return self.event_count - self.head_event

    @property
    def buffered_bytes(self):
        return self.message_length + self.event_bytes

    @property
    def closed(self):
        return self.error != 0 or self.saw_close

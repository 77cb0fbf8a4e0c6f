# Client to kernel: messages are taken from a parser, decoded, signed and sent.

from collections import deque

cdef enum:
    FRAME_COST = 64     # of a Python object that holds a frame: a million empty ones are not free


cdef size_t cost_of(list frames) except? 0:
    """What the parts of a message that waits take, in bytes; its signature may be made anew."""
    cdef size_t total = 0
    for frame in frames[2:]:
        total += FRAME_COST + len(frame)
    return total


cdef int channel_index(fw_span channel, bint quoted) noexcept nogil:
    """SHELL, CONTROL, STDIN, or -1. Only the default protocol quotes and escapes it."""
    if channel.ptr == NULL:
        return SHELL
    if quoted:
        if not is_string(channel):
            return -1
        channel = inside(channel)
    elif memchr(channel.ptr, 92, channel.len) != NULL:
        return -1
    if spells(channel, b"shell", 5):
        return SHELL
    if spells(channel, b"control", 7):
        return CONTROL
    if spells(channel, b"stdin", 5):
        return STDIN
    return -1


@cython.final
cdef class Uplink:
    cdef int protocol
    cdef Signer signer
    cdef list sockets           # of shell, control, stdin
    cdef list waiting           # per socket: a deque of multipart messages it had no room for
    cdef readonly size_t waiting_bytes
    cdef readonly Py_ssize_t waiting_messages
    cdef readonly uint64_t sent
    cdef public bint held
    cdef object allowed
    cdef list notes
    cdef Message message        # that is being sent
    cdef bint sending
    cdef int touched            # bit per socket that was sent to since `readable` looked at it

    def __init__(self, protocol, Signer signer not None, dict sockets not None, *, allowed_message_types=frozenset()):
        self.protocol = protocol_of(protocol)
        self.signer = signer
        self.sockets = [sockets[channel] for channel in CHANNELS[:UPLINKS]]
        self.waiting = [deque() for _ in self.sockets]
        self.allowed = frozenset(allowed_message_types)
        self.notes = []

    def __dealloc__(self):
        free(self.message.parts.items)

    def relay(self, FrameParser parser not None):
        cdef Event *event
        parser.lend()
        try:
            while True:
                event = parser.peek()
                if event == NULL or event.opcode >= CLOSE:
                    break
                unmask_event(event)
                try:
                    self.pass_on(event.opcode, fixed(event.ptr, event.len))
                finally:
                    parser.took()
        finally:
            parser.take_back()
        return self.readable()

    def send(self, int opcode, payload):
        cdef Py_buffer held
        cdef fw_span span
        if isinstance(payload, str):
            payload = text_span(payload, &span)
            hold_nothing(&held)
        else:
            span_of(payload, &held, &span)
        try:
            if opcode != BINARY and not fw_utf8_valid(<const uint8_t *>span.ptr, span.len):
                raise malformed("it is not UTF-8")
            self.pass_on(opcode, span)
        finally:
            release(&held)
        return self.readable()

    cdef int pass_on(self, int opcode, fw_span payload) except -1:
        # Python code may run in between, and other threads: hashlib's, pyzmq's, a finalizer.
        if self.sending:
            raise RuntimeError("this uplink is sending: use it from one thread, not from within a call")
        self.sending = True
        try:
            return self.decode_and_send(opcode, payload)
        finally:
            self.sending = False

    cdef int decode_and_send(self, int opcode, fw_span payload) except -1:
        cdef const char *problem
        cdef int target
        cdef bytes text
        self.message.parts.count = 0
        if self.protocol == V1 and opcode == BINARY:
            problem = v1_message(payload, &self.message)
        elif self.protocol == V1:
            problem = "the v1 protocol has binary frames only"
        elif opcode == BINARY:
            problem = legacy_split(payload, &self.message)
        else:
            problem = legacy_json(payload, False, &self.message)
        if problem != NULL:
            raise malformed(problem)
        target = channel_index(self.message.channel, self.protocol == LEGACY)
        if target < 0:
            self.note(f"no such channel: {channel_of(self.message.channel, self.protocol == LEGACY)[:64]!r}")
            return 0
        if self.allowed and not self.is_allowed():
            return 0
        if self.message.text_content:
            text = content_of_text(self.message.parts.items[3])
            self.message.parts.items[3] = fixed(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        return self.dispatch(target)

    cdef bint is_allowed(self) except -1:
        cdef Header header
        if scan_header(self.message.parts.items[0], &header) == NOT_JSON:
            raise malformed("its header is not a JSON object")
        if header.msg_type.ptr == NULL or not is_string(header.msg_type):
            raise malformed("its header has no msg_type")
        msg_type = unescaped(header.msg_type)
        if msg_type in self.allowed:
            return True
        self.note(f"message type {msg_type[:64]!r} is not allowed")
        return False

    cdef int note(self, str text) except -1:
        if len(self.notes) < 16:
            self.notes.append(text)
        return 0

    cdef int dispatch(self, int target) except -1:
        """Signs the message and sends it, or lets it wait behind those that wait already."""
        cdef bytes signature = self.signer.hex_signature(self.message.parts.items)
        cdef Spans *parts = &self.message.parts
        cdef size_t nbytes = sum_of(parts.items, <Py_ssize_t>parts.count)
        if not self.waiting[target] and not self.holds(target) and self.send_spans(target, signature) == SENT:
            self.sent += 1
            tally(&counted.to_kernels[target], nbytes)
            return 0
        if self.sockets[target].closed:
            raise SocketClosed("the ZMQ socket is closed")
        counted.waited += 1
        tally(&counted.to_kernels[target], nbytes)
        frames = [DELIMITER, signature] + parts_list(parts)
        self.waiting[target].append(frames)
        self.waiting_messages += 1
        self.waiting_bytes += cost_of(frames)
        return 0

    cdef bint holds(self, int target) noexcept:
        return self.held and target == SHELL

    cdef int send_spans(self, int target, bytes signature) except -1:
        cdef Spans *parts = &self.message.parts
        cdef void *handle
        cdef size_t i
        cdef int flags, result = SENT
        if not direct_zmq:
            return self.send_frames(target, [DELIMITER, signature] + parts_list(parts))
        self.touched |= 1 << target
        handle = handle_of(self.sockets[target])
        if send_part(handle, b"<IDS|MSG>", 9, FW_ZMQ_SNDMORE) == FULL:
            return FULL
        # A peer that goes away in the middle takes the begun message with it. libzmq drops its other parts too, and
        # must be given them to know where the next message begins; then this one is sent again as a whole.
        if send_part(handle, PyBytes_AS_STRING(signature), PyBytes_GET_SIZE(signature), FW_ZMQ_SNDMORE) == FULL:
            result = FULL
        for i in range(parts.count):
            flags = FW_ZMQ_SNDMORE if i + 1 < parts.count else 0
            if send_part(handle, parts.items[i].ptr, parts.items[i].len, flags) == FULL:
                result = FULL
        return result

    cdef int send_frames(self, int target, list frames) except -1:
        self.touched |= 1 << target
        if self.sockets[target].closed:
            raise SocketClosed("the ZMQ socket is closed")
        try:
            self.sockets[target].send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            return FULL
        except zmq.ZMQError as error:
            raise zmq_problem(error.errno) from None
        return SENT

    def retry(self):
        cdef int target
        for target in range(UPLINKS):
            self.send_waiting(target)
        return self.readable()

    cdef int send_waiting(self, int target) except -1:
        """The number of messages that a socket has taken now."""
        cdef int taken = 0
        queue = self.waiting[target]
        if queue and self.sockets[target].closed:
            raise SocketClosed("the ZMQ socket is closed")
        while queue and not self.holds(target):
            frames = queue[0]
            if self.send_frames(target, frames) == FULL:
                break
            queue.popleft()
            taken += 1
            self.sent += 1
            self.waiting_messages -= 1
            self.waiting_bytes -= cost_of(frames)
        return taken

    def adopt(self, Uplink other not None):
        if other is self:
            return
        for mine, theirs in zip(self.waiting, other.waiting):
            if self.signer is not other.signer:  # a kernel that came back may have another key
                for frames in theirs:
                    frames[1] = self.signer.sign(frames[2:])
            mine.extendleft(reversed(theirs))
            theirs.clear()
        self.waiting_bytes += other.waiting_bytes
        self.waiting_messages += other.waiting_messages
        self.sent += other.sent
        self.touched |= other.touched
        other.waiting_bytes = 0
        other.waiting_messages = 0
        other.sent = 0
        other.touched = 0

    cdef int readable(self) except -1:
        """Which of the sockets that were sent to have something to read: their descriptor may have lost its edge. So
        may one that has room again for messages that wait: those are sent until it is full."""
        cdef int target, events, result = 0
        for target in range(UPLINKS):
            if not self.touched & (1 << target) and not self.waiting[target]:
                continue
            events = self.events_of(target)
            while events & FW_ZMQ_POLLOUT and self.waiting[target] and self.send_waiting(target):
                events = self.events_of(target)
            if events & FW_ZMQ_POLLIN:
                result |= 1 << target
        self.touched = 0
        return result

    cdef int events_of(self, int target) except -1:
        """ZMQ_EVENTS, 0 for a closed socket: whoever sends to it hears of that."""
        cdef int events
        cdef size_t size = sizeof(int)
        cdef void *handle
        socket = self.sockets[target]
        if not direct_zmq:
            return 0 if socket.closed else socket.getsockopt(zmq.EVENTS)
        try:
            handle = handle_of(socket)
        except SocketClosed:
            return 0
        if zmq_getsockopt(handle, FW_ZMQ_EVENTS, &events, &size):
            raise zmq_problem(zmq_errno())
        return events

    @property
    def ignored(self):
        notes = self.notes
        self.notes = []
        return notes


cdef int send_part(void *handle, const void *data, size_t length, int flags) except -1:
    cdef int problem
    while zmq_send(handle, data, length, flags | FW_ZMQ_DONTWAIT) < 0:
        problem = zmq_errno()
        if problem == EAGAIN:
            return FULL
        if problem != EINTR:
            raise zmq_problem(problem)
    return SENT

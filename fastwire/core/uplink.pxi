# Client to kernel: messages are taken from a parser, decoded, signed and sent.

from collections import deque

# -- sending --

# There is one sender. A message that waits, or that libzmq is given, is made a record (core/outgoing.h), which is given
# again as a whole until it is taken.

cdef struct Line:
    fw_record *first
    fw_record *last


cdef void line_add(Line *line, fw_record *record) noexcept nogil:
    record.next = NULL
    if line.first == NULL:
        line.first = record
    else:
        line.last.next = record
    line.last = record


cdef fw_record *line_pop(Line *line) noexcept nogil:
    cdef fw_record *record = line.first
    line.first = record.next
    return record


cdef void line_drop(Line *line) noexcept:
    while line.first != NULL:
        let_go(line_pop(line))


cdef fw_record *new_record(fw_span signature, const fw_span *parts, size_t count, bint asks) except NULL:
    cdef fw_record *record = fw_record_new(signature, parts, count)
    if record == NULL:
        raise MemoryError
    record.asks = asks
    alive.records += 1
    return record


cdef void let_go(fw_record *record) noexcept:
    alive.records -= 1
    fw_record_let_go(record)


cdef void line_put_before(Line *line, Line *other) noexcept nogil:
    """All of ``other``, which is empty afterwards."""
    if other.first == NULL:
        return
    other.last.next = line.first
    if line.first == NULL:
        line.last = other.last
    line.first = other.first
    other.first = NULL


cdef enum:
    USUAL_FRAMES = 64
    FEW_PARTS = 14          # of a message: its four, and buffers

# Frames on their way to libzmq. All of a message are made before the first is sent: one that is begun can only be ended
# by its other frames.
cdef fw_zmq_msg *outgoing = NULL
cdef size_t outgoing_room = 0


cdef int make_frames(fw_record *record) except -1:
    global outgoing, outgoing_room
    cdef fw_zmq_msg *frames
    cdef size_t i, room
    if outgoing_room < record.count:
        room = max(record.count, <size_t>USUAL_FRAMES)
        frames = <fw_zmq_msg *>realloc(outgoing, room * sizeof(fw_zmq_msg))
        if frames == NULL:
            raise MemoryError
        outgoing = frames
        outgoing_room = room
    for i in range(record.count):
        if fw_record_frame(record, i, &outgoing[i]):
            close_outgoing(0, i)
            raise MemoryError
    return 0


cdef void close_outgoing(size_t begin, size_t end) noexcept nogil:
    cdef size_t i
    for i in range(begin, end):
        zmq_msg_close(&outgoing[i])


cdef void trim_outgoing() noexcept:
    """What one message of 65,000 frames needed is not kept."""
    global outgoing, outgoing_room
    if outgoing_room > SPARE_ROOM:
        free(outgoing)
        outgoing = NULL
        outgoing_room = 0


cdef int give(void *handle, fw_record *record, int *problem) noexcept nogil:
    """Gives the frames that were made to libzmq: SENT when it took all of them, and keeps them. FULL: it is to be given
    them again. ``problem`` is an errno when the socket will take nothing any more."""
    cdef int result = SENT
    cdef size_t i
    cdef int error
    problem[0] = 0
    fw_begin_giving(record)
    for i in range(record.count):
        error = fw_zmq_send(&outgoing[i], handle, FW_ZMQ_SNDMORE if i + 1 < record.count else 0)
        if error == 0:
            continue
        result = FULL
        zmq_msg_close(&outgoing[i])
        # A peer that goes away in the middle takes the begun message with it. libzmq drops its other frames too, and
        # must be given them to know where the next message begins. Without a peer none is begun.
        if i == 0 or error != EAGAIN:
            close_outgoing(i + 1, record.count)
            problem[0] = error if error != EAGAIN else 0
            break
    return FULL if fw_end_giving() else result


# -- reading what a client says --

cdef int channel_index(fw_span channel, bint quoted) noexcept nogil:
    """SHELL, CONTROL, STDIN, or -1. Only the default protocol quotes and escapes it."""
    if channel.ptr == NULL:
        return SHELL
    if quoted:
        if not is_string(channel):
            return -1
        channel = inside(channel)
    elif is_escaped(channel):
        return -1
    if spells(channel, b"shell", 5):
        return SHELL
    if spells(channel, b"control", 7):
        return CONTROL
    if spells(channel, b"stdin", 5):
        return STDIN
    return -1


cdef fw_span type_of(fw_span header) noexcept:
    """The inside of its msg_type; a NULL ptr where there is none."""
    cdef fw_span said = member_of(header, b"msg_type", 8)
    if said.ptr != NULL and is_string(said):
        return inside(said)
    said.ptr = NULL
    return said


cdef bint is_request(fw_span msg_type) noexcept:
    """Whether a reply to a message of this type is to come. Comms have none; what cannot be read may have one."""
    if msg_type.ptr == NULL or is_escaped(msg_type):
        return True
    return msg_type.len >= 8 and memcmp(<const char *>msg_type.ptr + msg_type.len - 8, b"_request", 8) == 0


@cython.final
cdef class Uplink:
    cdef object __weakref__
    cdef int protocol
    cdef Signer signer
    cdef list sockets           # of shell, control, stdin
    cdef Line waiting[UPLINKS]  # per socket: messages it had no room for
    cdef fw_account *account    # of what libzmq has, and of what uplinks that were adopted gave it
    cdef object tracked         # the same by pyzmq: (MessageTracker, bytes)
    cdef size_t tracked_bytes
    cdef size_t line_bytes      # of all that stand in `waiting`
    cdef Py_ssize_t line_messages
    cdef readonly uint64_t sent
    cdef readonly uint64_t answers      # messages on stdin, sent or waiting
    cdef readonly size_t unanswered     # requests that a socket has taken, and that had no reply
    cdef readonly bint asked            # the kernel waits for an input_reply
    cdef public bint held
    cdef frozenset allowed
    cdef Ledger ledger          # that is told of requests, or None
    cdef list notes
    cdef Message message        # that is being sent
    cdef bint sending
    cdef int touched            # bit per socket that was sent to since `readable` looked at it
    cdef int unwritten          # bit per socket that had bytes left to write when `readable` looked at it

    def __init__(self, protocol, Signer signer not None, dict sockets not None, *, allowed_message_types=frozenset(),
                 Ledger ledger=None):
        self.protocol = protocol_of(protocol)
        self.signer = signer
        self.sockets = [sockets[channel] for channel in CHANNELS[:UPLINKS]]
        self.tracked = deque()
        self.allowed = frozenset(allowed_message_types)
        self.ledger = ledger
        self.notes = []
        if ledger is not None:
            ledger.uplinks.add(self)

    def __cinit__(self):
        self.account = fw_account_new()
        if self.account == NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef int target
        for target in range(UPLINKS):
            line_drop(&self.waiting[target])
        fw_accounts_let_go(self.account)
        free(self.message.parts.items)

    cdef int begin(self) except -1:
        """Python code may run meanwhile, and other threads: hashlib's, pyzmq's, a finalizer."""
        if self.sending:
            raise RuntimeError("this uplink is sending: use it from one thread, not from within a call")
        self.sending = True
        return 0

    cdef void end(self) noexcept:
        self.sending = False
        spans_clear(&self.message.parts)

    def relay(self, FrameParser parser not None):
        return self.relay_from(parser)

    cdef int relay_from(self, FrameParser parser) except -1:
        self.begin()
        try:
            parser.lend()
            try:
                self.pass_all(parser)
            finally:
                parser.take_back()
            return self.readable()
        finally:
            self.end()

    cdef int pass_all(self, FrameParser parser) except -1:
        cdef Event *event
        while True:
            event = parser.peek()
            if event == NULL or event.opcode >= CLOSE:
                return 0
            unmask_event(event)
            try:
                self.pass_on(event.opcode, fixed(event.ptr, event.len))
            except FastwireError:
                parser.took()  # refused for what it is; anything else leaves it to the next call
                raise
            parser.took()

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
            self.begin()
            try:
                self.pass_on(opcode, span)
                return self.readable()
            finally:
                self.end()
        finally:
            release(&held)

    cdef int pass_on(self, int opcode, fw_span payload) except -1:
        cdef const char *problem
        cdef int target
        cdef fw_span msg_type
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
            raise refusal(problem)
        target = channel_index(self.message.channel, self.protocol == LEGACY)
        if target < 0:
            self.note(f"no such channel: {channel_of(self.message.channel, self.protocol == LEGACY)[:64]!r}")
            return 0
        if len(self.allowed) and not self.is_allowed():
            return 0
        kept = mend(&self.message)  # noqa: F841 - the parts lie in it
        msg_type = type_of(self.message.parts.items[0])
        if self.ledger is not None and target != CONTROL:
            self.tell(target, msg_type)
        return self.dispatch(target, msg_type)

    cdef int tell(self, int target, fw_span msg_type) except -1:
        """What is asked, or answered. Before it goes: what fails here is tried again."""
        return self.ledger.answer() if target == STDIN else self.ledger.ask(self.message.parts.items, msg_type)

    cdef int ask_still(self) except -1:
        """The kernel began anew: what waits here is asked of the new process."""
        return self.mark_waiting(LOST_RUN, QUEUED_RUN)

    def retire(self):
        if self.ledger is not None:
            self.ledger.uplinks.discard(self)
            self.mark_waiting(QUEUED_RUN, LOST_RUN)

    cdef int mark_waiting(self, str before, str state) except -1:
        """The runs among what waits here."""
        cdef fw_record *record = self.waiting[SHELL].first
        while record != NULL:
            if record.asks:
                self.ledger.mark(record.frames[2], before, state)
            record = record.next
        return 0

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

    cdef int dispatch(self, int target, fw_span msg_type) except -1:
        """Signs the message and sends it, or lets it wait behind those that wait already."""
        cdef fw_span *parts = self.message.parts.items
        cdef size_t count = self.message.parts.count
        cdef char text[MOST_SIGNATURE]
        cdef fw_span signature = fixed(text, self.signer.hex_signature(parts, text))
        cdef bint asks = target != STDIN and is_request(msg_type)
        cdef bint waits = self.has_waiting(target) or self.holds(target)
        cdef bint sent = False
        if not waits and count <= FEW_PARTS and isinstance(self.sockets[target], ZmtpStream):
            sent = self.send_parts(target, signature, parts, count, asks) == SENT
            waits = not sent
        if not sent:
            self.pass_record(target, new_record(signature, parts, count, asks), waits)
        self.answers += target == STDIN
        tally(&counted.to_kernels[target], sum_of(parts, <Py_ssize_t>count))
        return 0

    cdef int send_parts(self, int target, fw_span signature, const fw_span *parts, size_t count, bint asks) except -1:
        """To a connection of our own, which copies what it takes: nearly all need no record."""
        cdef fw_span frames[FEW_PARTS + 2]
        frames[0] = fixed(b"<IDS|MSG>", 9)
        frames[1] = signature
        memcpy(frames + 2, parts, count * sizeof(fw_span))
        self.touched |= 1 << target
        if (<ZmtpStream>self.sockets[target]).send_frames(frames, <Py_ssize_t>count + 2) == FULL:
            return FULL
        self.note_sent(target, asks)
        return SENT

    cdef int pass_record(self, int target, fw_record *record, bint waits) except -1:
        """Sends it, or lets it wait."""
        try:
            if waits or self.send_record(target, record) == FULL:
                if self.sockets[target].closed:
                    raise SocketClosed("the ZMQ socket is closed")
                counted.waited += 1
                self.wait(target, record)
            else:
                let_go(record)
        except BaseException:
            let_go(record)
            raise
        return 0

    cdef fw_record *sign(self, const fw_span *parts, size_t count, bint asks) except NULL:
        cdef char text[MOST_SIGNATURE]
        cdef size_t size = self.signer.hex_signature(parts, text)
        return new_record(fixed(text, size), parts, count, asks)

    cdef bint holds(self, int target) noexcept:
        return self.held and target == SHELL

    cdef void wait(self, int target, fw_record *record) noexcept:
        line_add(&self.waiting[target], record)
        self.line_messages += 1
        self.line_bytes += record.cost

    cdef bint has_waiting(self, int target) except -1:
        if not streams_with_unsent:
            return self.waiting[target].first != NULL
        if isinstance(self.sockets[target], ZmtpStream) and (<ZmtpStream>self.sockets[target]).has_unsent:
            self.take_back(target, <ZmtpStream>self.sockets[target])
        return self.waiting[target].first != NULL

    cdef int take_back(self, int target, ZmtpStream stream) except -1:
        """What connections that broke did not wholly take waits here again, before all that came after it."""
        cdef Line line = Line(NULL, NULL)
        cdef size_t nbytes = 0, asked = 0
        cdef bint asks
        cdef Views views
        cdef list message
        try:
            for message in stream.unsent:
                views = Views(message[2:])
                asks = target != STDIN and views.count > 0 and is_request(type_of(views.spans[0]))
                line_add(&line, self.sign(views.spans, views.count, asks))
                asked += line.last.asks
                nbytes += line.last.cost
        except BaseException:
            line_drop(&line)
            raise
        line_put_before(&self.waiting[target], &line)
        self.line_bytes += nbytes
        self.line_messages += len(stream.unsent)
        self.sent -= len(stream.unsent)
        self.unanswered -= min(asked, self.unanswered)  # of one that was started again nothing is
        stream.take_unsent()
        return 0

    cdef int send_record(self, int target, fw_record *record) except -1:
        cdef int result
        self.touched |= 1 << target
        if isinstance(self.sockets[target], ZmtpStream):
            result = (<ZmtpStream>self.sockets[target]).send_frames(record.frames, <Py_ssize_t>record.count)
        elif direct_zmq:
            result = self.send_directly(target, record)
        else:
            result = self.send_by_pyzmq(target, record)
        if result == SENT:
            self.note_sent(target, record.asks)
        return result

    cdef void note_sent(self, int target, bint asks) noexcept:
        self.sent += 1
        self.unanswered += asks
        self.asked = self.asked and target != STDIN

    cdef int send_directly(self, int target, fw_record *record) except -1:
        cdef int problem, result
        cdef void *handle = handle_of(self.sockets[target])
        make_frames(record)
        # From here to the last frame nothing of Python's runs.
        fw_record_charge(record, self.account)
        result = give(handle, record, &problem)
        trim_outgoing()
        if result == FULL:
            fw_record_discharge(record)
        if problem:
            raise zmq_problem(problem)
        return result

    cdef int send_by_pyzmq(self, int target, fw_record *record) except -1:
        cdef size_t i
        cdef int result = SENT
        socket = self.sockets[target]
        if socket.closed:
            raise SocketClosed("the ZMQ socket is closed")
        frames = [span_bytes(record.frames[i]) for i in range(record.count)]
        last = zmq.Frame(frames.pop(), track=True, copy=False, copy_threshold=0)
        self.track(last.tracker, record.cost)
        try:
            for frame in frames:
                result |= self.send_frame(socket, frame, zmq.SNDMORE)
                if result == FULL and frame is frames[0]:
                    break
            else:
                result |= self.send_frame(socket, last, 0)
        except BaseException:
            # A message that is begun and cannot be ended would swallow the next one.
            socket.close()
            self.untrack(self.tracked.pop())
            raise
        if result == FULL:
            self.untrack(self.tracked.pop())
        return result

    cdef int track(self, object tracker, size_t cost) except -1:
        self.tracked.append((tracker, cost))
        self.tracked_bytes += cost
        return 0

    cdef int untrack(self, tuple entry) except -1:
        self.tracked_bytes -= <size_t>entry[1]
        return 0

    cdef int send_frame(self, socket, frame, int flags) except -1:
        try:
            socket.send(frame, flags | zmq.DONTWAIT, copy=isinstance(frame, bytes))
        except zmq.Again:
            return FULL
        except zmq.ZMQError as error:
            raise zmq_problem(error.errno) from None
        return SENT

    def retry(self):
        cdef int target
        self.begin()
        try:
            for target in range(UPLINKS):
                self.send_waiting(target)
            return self.readable()
        finally:
            self.end()

    cdef int send_waiting(self, int target) except -1:
        """The number of messages that a socket has taken now."""
        cdef Line *line = &self.waiting[target]
        cdef int taken = 0
        cdef fw_record *record
        if self.has_waiting(target) and self.sockets[target].closed:
            raise SocketClosed("the ZMQ socket is closed")
        while line.first != NULL and not self.holds(target):
            if self.send_record(target, line.first) == FULL:
                break
            record = line_pop(line)
            self.line_messages -= 1
            self.line_bytes -= record.cost
            let_go(record)
            taken += 1
        return taken

    def adopt(self, Uplink other not None):
        if other is self:
            return
        self.begin()
        try:
            other.begin()
            try:
                self.take_over(other)
            finally:
                other.end()
        finally:
            self.end()

    cdef int take_over(self, Uplink other) except -1:
        cdef int target
        for target in range(UPLINKS):
            if other.sockets[target] is not self.sockets[target]:
                other.has_waiting(target)  # of a connection that nobody will make anew
        cdef fw_account *fresh = fw_account_new()
        if fresh == NULL:
            raise MemoryError
        try:
            tracked = other.tracked + self.tracked
            nothing = deque()
            if self.signer is not other.signer:  # a kernel that came back may have another key
                other.sign_anew(self.signer)
        except BaseException:
            fw_accounts_let_go(fresh)
            raise
        for target in range(UPLINKS):
            line_put_before(&self.waiting[target], &other.waiting[target])
        fw_account_adopt(self.account, other.account)
        other.account = fresh
        self.tracked = tracked
        other.tracked = nothing
        self.tracked_bytes += other.tracked_bytes
        other.tracked_bytes = 0
        self.line_bytes += other.line_bytes
        self.line_messages += other.line_messages
        self.sent += other.sent
        self.answers += other.answers
        self.unanswered += other.unanswered
        self.asked = self.asked or other.asked
        self.touched |= other.touched
        self.unwritten |= other.unwritten
        other.line_bytes = 0
        other.line_messages = 0
        other.sent = 0
        other.answers = 0
        other.forget()
        other.touched = 0
        return 0

    def answered(self, Batch batch not None):
        self.note_answers(batch)

    cdef void note_answers(self, Batch batch) noexcept:
        cdef Py_ssize_t i
        cdef int kind
        for i in range(batch.count):
            kind = batch.messages[i].kind
            if kind == REPLY and self.unanswered:
                self.unanswered -= 1
                # Whoever was asked in a cell that has ended, by an interrupt perhaps, is not waited for.
                self.asked = self.asked and self.unanswered
            elif kind == INPUT_REQUEST:
                self.asked = True

    cpdef forget(self):
        self.unanswered = 0
        self.asked = False

    cdef int sign_anew(self, Signer signer) except -1:
        """What waits: all of it or, without memory, nothing."""
        cdef Line lines[UPLINKS]
        cdef fw_record *record
        cdef int target
        cdef size_t nbytes = 0
        memset(lines, 0, sizeof(lines))
        before, self.signer = self.signer, signer
        try:
            for target in range(UPLINKS):
                record = self.waiting[target].first
                while record != NULL:
                    line_add(&lines[target], self.sign(record.frames + 2, record.count - 2, record.asks))
                    nbytes += lines[target].last.cost
                    record = record.next
        except BaseException:
            self.signer = before
            for target in range(UPLINKS):
                line_drop(&lines[target])
            raise
        self.line_bytes = nbytes
        for target in range(UPLINKS):
            line_drop(&self.waiting[target])
            self.waiting[target] = lines[target]
        return 0

    cdef int readable(self) except -1:
        """Which of the sockets that were sent to have something to read: their descriptor may have lost its edge. So
        may one that has room again for messages that wait: those are sent until it is full."""
        cdef int target, result = 0
        for target in range(UPLINKS):
            if not self.touched & (1 << target) and not self.has_waiting(target):
                continue
            try:
                if self.is_readable(target):
                    result |= 1 << target
            except MemoryError:  # what was sent was sent; whoever reads sees whether there is something
                result |= 1 << target
        self.touched = 0
        return result

    cdef bint is_readable(self, int target) except -1:
        cdef int events = self.events_of(target)
        while events & FW_ZMQ_POLLOUT and self.waiting[target].first != NULL and self.send_waiting(target):
            events = self.events_of(target)
        return events & FW_ZMQ_POLLIN != 0

    cdef int events_of(self, int target) except -1:
        """ZMQ_EVENTS, 0 for a closed socket: whoever sends to it hears of that."""
        cdef int events
        cdef size_t size = sizeof(int)
        cdef void *handle
        socket = self.sockets[target]
        if isinstance(socket, ZmtpStream):
            events = events_of_stream(<ZmtpStream>socket)
            self.unwritten &= ~(1 << target)
            self.unwritten |= ((<ZmtpStream>socket).output_bytes() > 0) << target
            return events
        if not direct_zmq:
            return 0 if socket.closed else socket.getsockopt(zmq.EVENTS)
        try:
            handle = handle_of(socket)
        except SocketClosed:
            return 0
        if zmq_getsockopt(handle, FW_ZMQ_EVENTS, &events, &size):
            raise zmq_problem(zmq_errno())
        return events

    cdef bint needs_looking(self, size_t free_bytes) except -1:
        """Whether something is left to do after sending: notes, what waits, or more on its way than is for free."""
        if len(self.notes) or self.count_waiting():
            return True
        if not self.unwritten and not self.tracked_bytes and not fw_account_bytes(self.account):
            return False
        return self.on_their_way() > free_bytes

    @property
    def sending_bytes(self):
        return self.on_their_way()

    cdef size_t on_their_way(self) except? 1:
        cdef size_t nbytes = fw_account_bytes(self.account)
        while self.tracked_bytes and self.tracked[0][0].done:
            self.untrack(self.tracked.popleft())
        for socket in self.sockets:
            if isinstance(socket, ZmtpStream):
                nbytes += (<ZmtpStream>socket).output_bytes()
        return nbytes + self.tracked_bytes

    @property
    def sending_messages(self):
        return sum([socket.pending_messages for socket in self.sockets if isinstance(socket, ZmtpStream)])

    @property
    def waiting_bytes(self):
        cdef size_t nbytes = self.line_bytes
        for socket in self.sockets:
            if isinstance(socket, ZmtpStream):
                nbytes += (<ZmtpStream>socket).unsent_bytes
        return nbytes

    @property
    def waiting_messages(self):
        return self.count_waiting()

    cdef Py_ssize_t count_waiting(self) except -1:
        cdef Py_ssize_t messages = self.line_messages
        if not streams_with_unsent:
            return messages
        for socket in self.sockets:
            if isinstance(socket, ZmtpStream):
                messages += len((<ZmtpStream>socket).unsent)
        return messages

    @property
    def ignored(self):
        notes = self.notes
        self.notes = []
        return notes


cdef int events_of_stream(ZmtpStream stream) except -1:
    """Writes what it was given. One that has not written everything is to be looked at, as if it were readable."""
    cdef int events = 0
    if stream.fd < 0 or stream.closed:
        return 0
    if stream.write(stream.fd) != DONE:
        events |= FW_ZMQ_POLLIN
    if stream.has_room():
        events |= FW_ZMQ_POLLOUT
    return events

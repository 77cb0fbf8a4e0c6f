# ZMTP 3 (ZeroMQ RFC 37 and 23): one connection to a kernel, from the side that connects, NULL, as DEALER or SUB.
#
# It knows no socket but the descriptor it is given: bytes come in by `feed` or by the ``fd`` of `drain`, go out by
# `flush`, and a new connection begins with `renew`. What is difficult:
#
# - A message is all of its frames or none, and commands may stand between them. So a message stays in the inbox until
#   its last frame is there, and what was looked at is not looked at again: a peer that sends a million frames octet by
#   octet pays for each once.
# - A peer declares sizes before it sends. Memory grows with the bytes that came, twofold, and never ahead of them.
# - Parts are used long after the next bytes were read. Those of a message that fills half of the inbox stay where they
#   were received, and the inbox is left to them (`Received`); others are copied: small ones pin more than they are.
# - What is written in half belongs to its connection. Positions of messages in the output are kept until they are
#   wholly written. What is not when the connection ends is `unsent`: its `Uplink` takes it back and sends it as a
#   whole, before all that waits there, on the next connection or on that of a kernel that moved.

cdef enum:
    GREETING_SIZE = 64
    INBOX_SIZE = 65536
    LEAST_READ = 16384
    MAX_COMMAND = 65536
    MAX_COMMANDS = 1048576      # bytes of commands between the frames of one message
    MAX_FRAMES = 1048576        # of one message: each costs more than its two octets
    MAX_PONGS = 1024            # that wait to be written; further pings are not answered
    OUTPUT_ROOM = 65536         # bytes that wait to be written; beyond it no message is taken

# Largest message, in bytes of its frames: what the default protocol can say to a client.
cdef uint64_t MAX_MESSAGE = <uint64_t>1 << 32

# Flags of a frame.
cdef enum:
    ZMTP_MORE = 1
    ZMTP_LONG = 2
    ZMTP_COMMAND = 4

# A connection is in one of these, in this order.
cdef enum:
    AWAITS_GREETING     # of the peer, RFC 37 "Greeting"
    AWAITS_READY        # RFC 37 "The NULL Security Mechanism"
    TALKS
    OVER                # ERROR, or bytes that break the protocol; `renew` begins anew

ZMTP_STATES = ("greeting", "handshake", "ready", "over")

# Streams that have messages which connections before did not wholly take: hardly ever one, and nobody looks meanwhile.
cdef Py_ssize_t streams_with_unsent = 0

# What became of a message that is to be sent.
cdef enum:
    SENT
    FULL

# What looking at the inbox came to.
cdef enum:
    ONWARDS
    UNFINISHED
    WHOLE
    BROKEN

cdef const char *NULL_MECHANISM = b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"

#: Of each type of socket: those it may talk to.
ZMTP_PEERS = {"DEALER": (b"ROUTER", b"DEALER", b"REP"), "SUB": (b"PUB", b"XPUB")}


# Bytes that came and were not used up: from ``start``, where the message that is being received begins, to ``end``.
cdef struct Inbox:
    char *data
    size_t size
    size_t start
    size_t end


cdef bint inbox_room(Inbox *inbox, size_t wanted, bint pinned) noexcept:
    """Room to read into. ``wanted``: how long the message at its start is known to be; ``pinned``: what was used up is
    somebody's, and stays where it is. False without memory, and nothing has changed."""
    cdef size_t held = inbox.end - inbox.start
    cdef size_t room = INBOX_SIZE
    cdef char *data
    if inbox.data != NULL:
        if held == 0 and not pinned:
            inbox.start = inbox.end = 0
        if inbox.size - inbox.end >= LEAST_READ:
            return True
        if not pinned and held <= inbox.start and inbox.size - held >= LEAST_READ:
            memmove(inbox.data, inbox.data + inbox.start, held)
            inbox.start = 0
            inbox.end = held
            return True
        # At least by half, whatever is declared: a message of many frames grows with each.
        room = max(room, (wanted if held + held // 2 <= wanted < held * 2 else held * 2) + LEAST_READ)
    data = <char *>block_get(&room)
    if data == NULL:
        return False
    if inbox.data != NULL:
        memcpy(data, inbox.data + inbox.start, held)
        if not pinned:
            block_put(inbox.data, inbox.size)
    inbox.data = data
    inbox.size = room
    inbox.start = 0
    inbox.end = held
    return True


# Where a message lies in the output.
cdef struct Range:
    uint64_t start
    uint64_t end


cdef inline size_t zmtp_head(char *out, int flags, uint64_t size) noexcept nogil:
    """A frame's head, in 2 or 9 bytes; only its length when ``out`` is NULL."""
    cdef int i
    if size < 256:
        if out != NULL:
            out[0] = <char>flags
            out[1] = <char>size
        return 2
    if out != NULL:
        out[0] = <char>(flags | ZMTP_LONG)
        for i in range(8):
            out[1 + i] = <char>(size >> (56 - 8 * i))
    return 9


cdef inline bint is_spelled(const uint8_t *p, size_t length, bytes name) noexcept:
    """Whether a property has this name, in any case (RFC 37)."""
    cdef size_t i
    cdef const uint8_t *other = <const uint8_t *>PyBytes_AS_STRING(name)
    if length != <size_t>PyBytes_GET_SIZE(name):
        return False
    for i in range(length):
        if (p[i] | 32) != (other[i] | 32):
            return False
    return True


cdef class Budget


@cython.final
@cython.no_gc_clear  # whose the inbox is, it is to know at its end
cdef class ZmtpStream:
    cdef readonly str socket_type
    cdef readonly int fd            # that an `Uplink` writes to; -1 while there is none
    cdef fw_aside aside             # what the standby reader took of it
    cdef readonly bint closed       # for good
    cdef bytes identity
    cdef uint64_t max_message_size

    cdef int phase
    cdef readonly int minor         # of the peer's version 3
    cdef readonly bint ended        # the peer sends no more
    cdef int failed                 # with which reading ended, 0 for the end of the stream
    cdef readonly bint foreign      # the peer speaks no ZMTP 3 with NULL
    cdef readonly bint refused      # the peer said ERROR
    cdef readonly bint more         # the last drain left something
    cdef const char *problem
    cdef char reason[256]           # of an ERROR
    cdef size_t reason_length
    cdef bint busy                  # draining

    cdef Inbox inbox
    cdef Received pinned            # the inbox, when parts of a batch lie in it
    cdef Spans frames               # of the message that is being received: offsets from its start, and lengths
    cdef size_t scanned             # bytes from its start that were looked at
    cdef size_t wanted              # bytes from its start that the next frame is known to reach to
    cdef bint whole                 # all of its frames are there
    cdef uint64_t frame_bytes
    cdef size_t command_bytes

    cdef WriteQueue output
    cdef Range *ranges              # a ring of messages that are not wholly written
    cdef size_t range_room
    cdef size_t first_range
    cdef size_t last_range
    cdef list unsent                # messages that connections before did not wholly take, each as its frames
    cdef size_t unsent_bytes
    cdef bint has_unsent
    cdef int pongs                  # that may wait to be written
    cdef readonly uint64_t sent     # messages that were wholly written

    def __init__(self, str socket_type, identity=None, *, uint64_t max_message_size=MAX_MESSAGE):
        if socket_type not in ZMTP_PEERS:
            raise ValueError(f"socket_type is DEALER or SUB, not {socket_type!r}")
        self.identity = bytes(identity or b"")
        if len(self.identity) > 255 or self.identity[:1] == b"\0":
            raise ValueError("an identity has at most 255 bytes, of which the first is not 0")
        self.socket_type = socket_type
        self.max_message_size = max_message_size

    def __cinit__(self):
        fw_aside_init(&self.aside)
        self.fd = -1
        self.unsent = []
        self.output = WriteQueue(acknowledge=True)
        self.output.counts = &uncounted
        self.greet()

    def __dealloc__(self):
        global streams_with_unsent
        streams_with_unsent -= self.has_unsent
        fw_aside_destroy(&self.aside)
        if self.inbox.data != NULL and self.pinned is None:
            block_put(self.inbox.data, self.inbox.size)
        free(self.frames.items)
        free(self.ranges)

    # -- a new connection --

    def attach(self, int fd, int tell=-1, Poller poller=None):
        cdef int problem
        if tell >= 0 and poller is None:
            raise TypeError("who is told has a poller")
        self.detach()
        self.fd = fd
        if tell >= 0:
            problem = fw_aside_watch(&self.aside, fd, tell, poller.beat)
            if problem:
                raise OSError(problem, os.strerror(problem))

    def rest(self, bint rests):
        fw_aside_rest(&self.aside, rests)

    def charge(self, Budget budget not None):
        fw_aside_charge(&self.aside, budget.purse)

    def detach(self):
        fw_aside_leave(&self.aside)
        self.fd = -1

    def renew(self):
        self.check_not_busy()
        self.keep_unsent()
        self.forget()
        self.phase = AWAITS_GREETING
        self.ended = self.foreign = self.refused = self.more = False
        self.failed = self.minor = self.pongs = 0
        self.problem = NULL
        self.greet()

    def close(self):
        self.closed = True
        self.detach()
        try:
            self.keep_unsent()
        except MemoryError:  # they are lost with what they need
            pass
        if not self.busy:
            self.forget()
            self.phase = OVER
            self.problem = b"the connection is closed"

    cdef void forget(self) noexcept:
        """What came and was no message yet, and what was to be written."""
        self.output.release_all()
        self.first_range = self.last_range
        self.inbox.start = self.inbox.end
        self.let_go()
        self.next_message()

    cdef int keep_unsent(self) except -1:
        """The messages that were not wholly written, each whole."""
        cdef list messages = []
        cdef size_t i, nbytes = 0
        cdef Range *range_
        cdef bytes data
        if self.first_range == self.last_range:
            return 0
        data = self.output.kept_bytes()
        for i in range(self.first_range, self.last_range):
            range_ = self.range_at(i)
            messages.append(
                frames_of_message(data[range_.start - self.output.acked : range_.end - self.output.acked])
            )
            nbytes += range_.end - range_.start
        self.unsent += messages
        self.unsent_bytes += nbytes
        self.note_unsent()
        self.first_range = self.last_range
        return 0

    def take_unsent(self):
        unsent = self.unsent
        self.unsent = []
        self.unsent_bytes = 0
        self.note_unsent()
        return unsent

    cdef void note_unsent(self) noexcept:
        global streams_with_unsent
        streams_with_unsent += (len(self.unsent) > 0) - self.has_unsent
        self.has_unsent = len(self.unsent) > 0

    cdef int greet(self) except -1:
        """Signature, version 3.1, NULL, not as server. At once: a peer may wait for it before it greets."""
        cdef char *out = self.output.reserve(GREETING_SIZE)
        memset(out, 0, GREETING_SIZE)
        out[0] = <char>0xFF
        out[9] = 0x7F
        out[10] = 3
        out[11] = 1
        memcpy(out + 12, NULL_MECHANISM, 20)
        return 0

    cdef int check_not_busy(self) except -1:
        if self.busy:
            raise RuntimeError("this stream is being drained: use it from one thread, not from within a call")
        return 0

    # -- bytes in --

    def feed(self, data):
        cdef Py_buffer held
        cdef fw_span span
        cdef size_t done = 0, piece
        self.check_not_busy()
        span_of(data, &held, &span)
        try:
            while done < span.len:
                self.make_room()
                piece = min(span.len - done, self.inbox.size - self.inbox.end)
                memcpy(self.inbox.data + self.inbox.end, <const char *>span.ptr + done, piece)
                self.inbox.end += piece
                done += piece
        finally:
            release(&held)

    cdef int make_room(self) except -1:
        cdef char *before = self.inbox.data
        if not inbox_room(&self.inbox, self.wanted, self.pinned is not None):
            raise MemoryError
        if self.inbox.data != before:
            self.pinned = None
        return 0

    cdef ssize_t read(self, int fd) except -1:
        """How many bytes came; 0 when there are none now, or there will be no more."""
        cdef size_t room = self.inbox.size - self.inbox.end
        cdef ssize_t got = fw_aside_recv(&self.aside, fd, self.inbox.data + self.inbox.end, room)
        if got > 0:
            self.inbox.end += got
            return got
        if got == 0:
            self.ended = True
        elif errno not in (EAGAIN, ENOBUFS, ENOMEM):
            self.ended = True
            self.failed = errno
        return 0

    cdef void let_go(self) noexcept:
        """An inbox with nothing in it takes no memory."""
        if self.inbox.data == NULL or self.inbox.start != self.inbox.end:
            return
        if self.pinned is None:
            block_put(self.inbox.data, self.inbox.size)
        self.pinned = None
        memset(&self.inbox, 0, sizeof(Inbox))

    # -- messages --

    def drain(self, int fd, str channel, Signer signer not None, *, Py_ssize_t max_messages=DRAIN_MESSAGES,
              size_t max_bytes=DRAIN_BYTES, bint permissive=False):
        return self.drain_all(fd, channel, signer, max_messages, max_bytes, permissive)

    cdef Batch drain_all(self, int fd, str channel, Signer signer, Py_ssize_t max_messages, size_t max_bytes,
                         bint permissive):
        self.check_not_busy()
        self.busy = True
        self.more = False
        try:
            return self.receive(fd, channel, signer, max_messages, max_bytes, permissive)
        finally:
            self.busy = False
            self.let_go()

    cdef Batch receive(self, int fd, str channel, Signer signer, Py_ssize_t max_messages, size_t max_bytes,
                       bint permissive):
        cdef Batch batch = None
        cdef size_t got = 0, room = 0
        cdef ssize_t n = 0
        cdef int step
        try:
            while True:
                step = self.look()
                if step == WHOLE:
                    if batch is None:
                        batch = new_batch(channel)
                        counted.batches += 1
                    self.add_to(batch, signer, permissive)
                    if batch.spent(max_messages, max_bytes):
                        break
                    continue
                if step == BROKEN:
                    raise self.broken()
                if fd < 0 or self.ended or <size_t>n < room:
                    return batch
                if got >= max_bytes:
                    break
                self.make_room()
                room = self.inbox.size - self.inbox.end
                n = self.read(fd)
                got += n
        except Exception:
            # What was received is not lost for it; the next drain says it again.
            if batch is None or batch.is_empty():
                raise
        else:
            counted.budget_hits += 1
        self.more = True
        if batch is not None:
            batch.more = True
        return batch

    cdef int add_to(self, Batch batch, Signer signer, bint permissive) except -1:
        """The message that is whole joins the batch, or is rejected by it."""
        cdef const char *base = self.inbox.data + self.inbox.start
        cdef size_t i
        for i in range(self.frames.count):
            self.frames.items[i].ptr = base + <size_t>self.frames.items[i].ptr
        try:
            if self.pinned is None and self.scanned >= self.inbox.size // 2:
                self.pin(batch.store)
            batch.add_spans(signer, permissive, self.frames.items, self.frames.count, self.is_pinned_by(batch.store))
        except BaseException:  # the next drain finds it where it was
            for i in range(self.frames.count):
                self.frames.items[i].ptr = <void *>(<const char *>self.frames.items[i].ptr - base)
            raise
        self.inbox.start += self.scanned
        self.next_message()
        return 0

    cdef bint is_pinned_by(self, Store store) noexcept:
        """Whether parts of this message may stay where they are, for as long as ``store`` is there."""
        return self.pinned is not None and self.pinned.store == store.number and self.scanned >= self.inbox.size // 2

    cdef int pin(self, Store store) except -1:
        cdef Received pinned = Received.__new__(Received)
        pinned.size = self.inbox.size
        pinned.store = store.number
        store.keep(pinned)
        pinned.data = self.inbox.data
        self.pinned = pinned
        return 0

    cdef void next_message(self) noexcept:
        self.whole = False
        spans_clear(&self.frames)
        self.scanned = 0
        self.wanted = 0
        self.frame_bytes = 0
        self.command_bytes = 0

    # -- looking at bytes --

    cdef int look(self) except -1:
        """On to the end of the next message. What raises has used up nothing."""
        cdef int step = WHOLE if self.whole else ONWARDS
        while step == ONWARDS:
            if self.phase == OVER:
                return BROKEN
            step = self.look_at_greeting() if self.phase == AWAITS_GREETING else self.look_at_frame()
        self.whole = step == WHOLE
        return step

    cdef int breaks(self, const char *problem) noexcept:
        self.phase = OVER
        self.problem = problem
        return BROKEN

    cdef int is_foreign(self, const char *problem) noexcept:
        self.foreign = True
        return self.breaks(problem)

    cdef object broken(self):
        text = self.problem.decode()
        if self.refused:
            text += ": " + self.reason[: self.reason_length].decode("utf-8", "replace")
        return ZmtpError(text)

    cdef int look_at_greeting(self) except -1:
        """RFC 37 "Greeting", judged as its octets come: an older peer sends fewer, and waits."""
        cdef const uint8_t *p = <const uint8_t *>self.inbox.data + self.inbox.start
        cdef size_t n = self.inbox.end - self.inbox.start
        if n >= 1 and p[0] != 0xFF or n >= 10 and not p[9] & 1:
            return self.is_foreign("the peer does not greet as ZMTP 2 or later does")
        if n >= 11 and p[10] < 3:
            return self.is_foreign("the peer speaks ZMTP 2")
        if n < GREETING_SIZE:
            return UNFINISHED
        if memcmp(p + 12, NULL_MECHANISM, 20) != 0:
            return self.is_foreign("the peer wants a security mechanism that is not NULL")
        self.say_ready()
        self.minor = p[11] if p[10] == 3 else 1
        self.inbox.start += GREETING_SIZE
        self.phase = AWAITS_READY
        return ONWARDS

    cdef int look_at_frame(self) except -1:
        cdef const uint8_t *p = <const uint8_t *>self.inbox.data + self.inbox.start + self.scanned
        cdef size_t left = self.inbox.end - self.inbox.start - self.scanned
        cdef size_t head, i
        cdef uint64_t size
        cdef int step
        if left < 2:
            return UNFINISHED
        if p[0] > (ZMTP_MORE | ZMTP_LONG | ZMTP_COMMAND) or p[0] & ZMTP_COMMAND and p[0] & ZMTP_MORE:
            return self.breaks("a frame has flags that ZMTP 3 does not know")
        head = 2
        size = p[1]
        if p[0] & ZMTP_LONG:
            head = 9
            if left < head:
                return UNFINISHED
            size = 0
            for i in range(1, 9):
                size = size << 8 | p[i]
        step = self.judge_size(p[0], size)
        if step != ONWARDS:
            return step
        self.wanted = self.scanned + head + size
        if left - head < size:
            return UNFINISHED
        if p[0] & ZMTP_COMMAND:
            step = self.obey(p + head, size)
            if step == ONWARDS:
                self.skip_command(head + size)
            return step
        if spans_add(&self.frames, <const void *>(self.scanned + head), size):
            raise MemoryError
        self.scanned += head + size
        self.frame_bytes += size
        return ONWARDS if p[0] & ZMTP_MORE else WHOLE

    cdef int judge_size(self, int flags, uint64_t size) noexcept:
        """Before any of it costs memory."""
        if size >> 63:
            return self.breaks("a frame declares more bytes than there can be")
        if flags & ZMTP_COMMAND:
            if size > MAX_COMMAND or self.command_bytes > MAX_COMMANDS:
                return self.breaks("a command is larger than any that ZMTP has, or commands never end")
        elif self.phase != TALKS:
            return self.breaks("a message comes before READY")
        elif size > self.max_message_size - self.frame_bytes or self.frames.count >= MAX_FRAMES:
            return self.breaks("a message is larger than a kernel may send")
        return ONWARDS

    cdef void skip_command(self, size_t nbytes) noexcept:
        """A command in the middle of a message stays there until the message is whole."""
        if self.frames.count:
            self.scanned += nbytes
            self.command_bytes += nbytes
        else:
            self.inbox.start += nbytes

    # -- commands --

    cdef int obey(self, const uint8_t *p, size_t size) except -1:
        """RFC 37 "Commands": a name and its data; an unknown one is ignored."""
        cdef fw_span name
        if size == 0 or p[0] >= size:
            return self.breaks("a command has no name")
        name = fixed(<const char *>p + 1, p[0])
        p += 1 + name.len
        size -= 1 + name.len
        if spells(name, b"ERROR", 5):
            return self.is_refused(p, size)
        if self.phase == AWAITS_READY:
            if not spells(name, b"READY", 5):
                return self.breaks("a command comes before READY")
            return self.shake_hands(p, size)
        if spells(name, b"PING", 4) and size >= 2 and self.pongs < MAX_PONGS:
            self.say_command(b"PONG", fixed(<const char *>p + 2, min(size - 2, <size_t>16)))
            self.pongs += 1
        return ONWARDS

    cdef int is_refused(self, const uint8_t *p, size_t size) noexcept:
        self.reason_length = min(<size_t>p[0], size - 1, sizeof(self.reason)) if size else 0
        memcpy(self.reason, p + 1, self.reason_length)
        self.refused = True
        return self.breaks("the peer refuses the connection")

    cdef int shake_hands(self, const uint8_t *p, size_t size) except -1:
        """READY's properties: a name, and a value with four octets of length."""
        cdef bytes peer = None
        cdef size_t name, value
        while size:
            name = p[0]
            if size < 1 + name + 4:
                return self.breaks("READY has a property that is not whole")
            value = <size_t>p[1 + name] << 24 | p[2 + name] << 16 | p[3 + name] << 8 | p[4 + name]
            if value > size - name - 5:
                return self.breaks("READY has a property that is not whole")
            if is_spelled(p + 1, name, b"Socket-Type"):
                peer = span_bytes(fixed(<const char *>p + name + 5, value))
            p += name + value + 5
            size -= name + value + 5
        if peer not in ZMTP_PEERS[self.socket_type]:
            return self.breaks("the peer is not the type of socket that a kernel has there")
        if self.socket_type == "SUB":
            self.subscribe()
        self.phase = TALKS
        return ONWARDS

    # -- what is said --

    cdef int say_ready(self) except -1:
        cdef bytes body = b"\x05READY\x0bSocket-Type" + property_value(self.socket_type.encode())
        if self.socket_type == "DEALER":
            body += b"\x08Identity" + property_value(self.identity)
        return self.say(ZMTP_COMMAND, fixed(PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body)))

    cdef int subscribe(self) except -1:
        """To everything. A peer of 3.0 knows no command for it."""
        if self.minor:
            return self.say_command(b"SUBSCRIBE", fixed(NULL, 0))
        return self.say(0, fixed(b"\x01", 1))

    cdef int say_command(self, bytes name, fw_span data) except -1:
        cdef bytes body = bytes([len(name)]) + name + span_bytes(data)
        return self.say(ZMTP_COMMAND, fixed(PyBytes_AS_STRING(body), PyBytes_GET_SIZE(body)))

    cdef int say(self, int flags, fw_span body) except -1:
        cdef size_t head = zmtp_head(NULL, flags, body.len)
        cdef char *out = self.output.reserve(head + body.len)
        zmtp_head(out, flags, body.len)
        memcpy(out + head, body.ptr, body.len)
        return 0

    def send(self, frames):
        cdef Views views = Views(frames)
        if views.count == 0:
            raise ValueError("a message has at least one frame")
        return self.send_frames(views.spans, views.count) == SENT

    cdef int send_frames(self, const fw_span *frames, Py_ssize_t count) except -1:
        """SENT, or FULL: nothing of it was taken."""
        cdef char *out
        cdef size_t size = sum_of(frames, count)
        cdef Py_ssize_t i
        if not self.has_room() and not self.makes_room():
            return FULL
        for i in range(count):
            size += zmtp_head(NULL, 0, frames[i].len)
        out = self.place(size)
        for i in range(count):
            out += zmtp_head(out, ZMTP_MORE if i + 1 < count else 0, frames[i].len)
            memcpy(out, frames[i].ptr, frames[i].len)
            out += frames[i].len
        return SENT

    cdef bint has_room(self) noexcept:
        return self.phase == TALKS and not self.ended and self.output.queued - self.output.written < OUTPUT_ROOM

    cdef bint makes_room(self) except -1:
        """Whether what waits can be written now."""
        if self.fd < 0 or self.phase != TALKS:
            return False
        self.write(self.fd)
        return self.has_room()

    cdef char *place(self, size_t size) except NULL:
        """Where a message of so many bytes is to be written."""
        cdef char *out
        if self.last_range - self.first_range == self.range_room:
            self.more_ranges()
        out = self.output.reserve(size)
        self.range_at(self.last_range)[0] = Range(self.output.queued - size, self.output.queued)
        self.last_range += 1
        return out

    cdef inline Range *range_at(self, size_t index) noexcept:
        return &self.ranges[index & (self.range_room - 1)]

    cdef int more_ranges(self) except -1:
        cdef size_t room = self.range_room * 2 if self.range_room else 4
        cdef Range *ranges = <Range *>malloc(room * sizeof(Range))
        cdef size_t i
        if ranges == NULL:
            raise MemoryError
        for i in range(self.first_range, self.last_range):
            ranges[i & (room - 1)] = self.range_at(i)[0]
        free(self.ranges)
        self.ranges = ranges
        self.range_room = room
        return 0

    # -- bytes out --

    def flush(self, int fd):
        return self.write(fd)

    cdef int write(self, int fd) except -1:
        cdef int result = self.output.write_to(fd, FLUSH_LIMIT)
        while result == MORE:
            result = self.output.write_to(fd, FLUSH_LIMIT)
        self.note_written()
        return result

    def take(self, size_t limit):
        data = self.output.take(limit)
        self.note_written()
        return data

    cdef void note_written(self) noexcept:
        """Let go of what is wholly written; a message that is not stays whole."""
        cdef uint64_t written = self.output.written
        while self.first_range < self.last_range and self.range_at(self.first_range).end <= written:
            self.first_range += 1
            self.sent += 1
        if self.first_range < self.last_range:
            written = min(written, self.range_at(self.first_range).start)
        self.output.release_until(written)
        if self.output.written == self.output.queued:
            self.pongs = 0

    # -- looking --

    @property
    def state(self):
        return ZMTP_STATES[self.phase]

    @property
    def errno(self):
        return self.failed

    @property
    def ready(self):
        return self.phase == TALKS and not self.ended

    @property
    def buffered_bytes(self):
        return self.inbox.end - self.inbox.start

    @property
    def taken_aside(self):
        return fw_aside_has(&self.aside)

    @property
    def memory(self):
        cdef size_t inbox = self.inbox.size if self.pinned is None else 0
        cdef size_t frames = self.frames.room * sizeof(fw_span) if self.frames.room > FEW_SPANS else 0
        return inbox + frames + self.output_bytes() + self.unsent_bytes

    cdef size_t output_bytes(self) noexcept:
        return <size_t>(self.output.queued - self.output.written)

    @property
    def pending_bytes(self):
        return self.output_bytes()

    @property
    def pending_messages(self):
        return <Py_ssize_t>(self.last_range - self.first_range)

    @property
    def unsent_messages(self):
        return len(self.unsent)


def trim_memory():
    with nogil:
        fw_trim()


def limit_standby(size_t limit):
    fw_standby_set_limit(limit)


cdef list frames_of_message(bytes message):
    """Of one that we have written ourselves."""
    cdef list frames = []
    cdef const uint8_t *p = <const uint8_t *>PyBytes_AS_STRING(message)
    cdef Py_ssize_t at = 0, head, size, i
    while at < PyBytes_GET_SIZE(message):
        head = 2
        size = p[at + 1]
        if p[at] & ZMTP_LONG:
            head = 9
            size = 0
            for i in range(1, 9):
                size = size << 8 | p[at + i]
        at += head + size
        frames.append(message[at - size : at])
    return frames


cdef bytes property_value(bytes value):
    return len(value).to_bytes(4, "big") + value

# One client's connection, where nothing happens but messages: its bytes in and out without Python.
#
# Everything else is told to whoever is for it (`fastwire.transport` and what stands behind it): the first and the last
# bytes, a socket without room, control frames that are not answers to our pings, messages that nobody takes here.

# What the next write waits for; `fastwire.transport.Wait` has them by name.
cdef enum:
    FOR_NOTHING
    FOR_TURN
    FOR_ROOM
    FOR_BUFFERS
    FOR_STREAM

cdef enum:
    SIGN_OF_LIFE = 1000000000   # ns between those that are told: keepalives count in tens of seconds


cdef class Asking:
    """The numbers of `fastwire.flow.Acknowledgements`, which tells of them."""

    cdef readonly double delay
    cdef readonly double tail
    cdef readonly double interval
    cdef readonly uint64_t much
    cdef public uint64_t position
    cdef public bint outstanding
    cdef public bint demoted
    cdef public bint _answered
    cdef public uint64_t _asked
    cdef public double _since       # the first bytes after `_asked` went out; negative: there are none
    cdef public double _again       # not before
    cdef readonly uint64_t _number
    cdef char payload[16]

    def __cinit__(self, bytes prefix not None, double delay, double tail, double interval, uint64_t much):
        if len(prefix) != 8:
            raise ValueError("the prefix of a ping has 8 bytes")
        memcpy(self.payload, PyBytes_AS_STRING(prefix), 8)
        memset(self.payload + 8, 0, 8)
        self.delay = delay
        self.tail = tail
        self.interval = interval
        self.much = much
        self._since = -1.0

    cdef bint is_wanted(self, uint64_t position, double now) noexcept:
        if position <= self._asked:
            return False
        if self._since < 0:
            self._since = now
        return not self.outstanding and now >= self.time_of(position, self.delay)

    cdef double time_of(self, uint64_t position, double delay) noexcept:
        """When bytes that wait ``delay`` are to be asked about."""
        if not self._answered:
            return 0.0
        return self._again if self.is_much(position) else self._since + delay

    cdef bint is_much(self, uint64_t position) noexcept:
        return position >= self.position + self.much

    def wanted(self, uint64_t position, double now):
        """The bytes before ``position`` go out now. Returns whether a ping is to go with them and ask about them."""
        return self.is_wanted(position, now)

    cdef double wait_of(self, uint64_t position, double now) noexcept:
        """Negative for ever."""
        if position <= self._asked or self.outstanding:
            return -1.0
        if self._since < 0:
            self._since = now
        return max(self.time_of(position, self.tail) - now, 0.0)

    def wait(self, uint64_t position, double now):
        """Seconds until the bytes before ``position`` are asked about although nothing follows them; None when they
        have been."""
        cdef double wait = self.wait_of(position, now)
        return None if wait < 0 else wait

    cdef void ask_about(self, uint64_t position, double now) noexcept:
        cdef int i
        self._number += 1
        for i in range(8):
            self.payload[8 + i] = <char>(self._number >> (56 - 8 * i))
        self._asked = position
        self._since = -1.0
        self._again = now + self.interval
        self.outstanding = True

    def ask(self, uint64_t position, double now):
        """The payload of a ping that is queued behind ``position``."""
        self.ask_about(position, now)
        return self._payload

    @property
    def _payload(self):
        return self.payload[:16]

    cdef bint is_answered(self, fw_span payload, uint64_t written) noexcept:
        if not self.outstanding or written <= self._asked:
            return False
        if payload.len != 16 or memcmp(payload.ptr, self.payload, 16) != 0:
            return False
        self.outstanding = self.demoted = False
        self._answered = True
        self.position = self._asked
        return True

    def answer(self, bytes payload not None, uint64_t written):
        """A pong came when ``written`` bytes had gone out. Returns whether it answers our ping: its payload can be
        guessed, and nobody has what was not written."""
        return self.is_answered(fixed(PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload)), written)


cdef class Outlet


@cython.final
cdef class Wire(Part):
    cdef public int fd              # -1: Tornado's stream has it, or it is closed
    cdef public FrameParser parser
    cdef readonly WriteQueue queue
    cdef Poller poller
    cdef object owner               # the transport, which is told what happens
    cdef public int waits_for
    cdef readonly bint over         # nothing is read or written any more
    cdef readonly uint64_t writes   # system calls
    # who writes
    cdef public uint64_t data_end   # behind the last message
    cdef public bint we_are_done    # our Close frame was said
    cdef public bint closes         # ours or the peer's was
    cdef public bint attended       # somebody waits for bytes to be written
    cdef public object on_progress
    cdef public Outlet outlet       # instead of that, where the kernel's log gives it more
    # what the peer has
    cdef public Asking asks
    cdef public double look_delay   # seconds between looks at a ping that is not answered
    cdef uint64_t told_alive        # ns
    # who reads
    cdef public bint hands_out      # messages may be handed out
    cdef public Uplink uplink       # takes them
    cdef public object settle       # called with what `Uplink.relay` returned, when there is something to do
    cdef public size_t free_bytes   # may wait for the kernel without being looked at
    cdef public bint watched        # settle each time
    cdef readonly uint64_t answered     # of our pings

    def __init__(self, int fd, FrameParser parser not None, WriteQueue queue not None, Poller poller not None, owner):
        self.fd = fd
        self.parser = parser
        self.queue = queue
        self.poller = poller
        self.owner = owner

    def end(self):
        """Nothing is read or written any more."""
        self.over = True
        self.uplink = self.settle = self.on_progress = self.outlet = None
        self.poller.forget(self)

    # -- writing --

    cpdef int schedule(self) except -1:
        """Write once at the end of this turn, unless a write waits for something else already."""
        if self.waits_for == FOR_NOTHING:
            self.poller.flush_later(self)
            self.waits_for = FOR_TURN
        return 0

    cpdef uint64_t extend(self, Frames frames) except? 0:
        """The position behind them."""
        self.schedule()
        self.queue.add_frames(frames)
        self.data_end = self.queue.queued
        return self.data_end

    cdef int on_end(self) except -1:
        if self.over:
            return 0
        try:
            self.flush()
        except Exception as error:
            if self.waits_for == FOR_TURN and not self.at_end:  # nobody would come back to what is left
                self.owner.on_lost(error)
            raise
        return 0

    cdef int flush(self) except -1:
        cdef uint64_t before = self.queue.written
        cdef int status
        if self.fd < 0 or self.waits_for != FOR_TURN:
            self.poller.python_ran = True
            self.owner.flush()
            return 0
        self.ride()
        status = self.write()
        if status != DONE:
            self.poller.python_ran = True
            self.owner.after_write(status, before, False)
            return 0
        self.waits_for = FOR_NOTHING
        if self.queue.written != before:
            self.is_written()
        return 0

    cpdef int write(self) noexcept:
        """One sendmsg; see `WriteQueue.flush`."""
        self.writes += 1
        return self.queue.write_to(self.fd, FLUSH_LIMIT)

    cdef int is_written(self) except -1:
        if self.attended:
            self.poller.python_ran = True
            self.owner.on_written()
        else:
            self.progress()
        return 0

    cpdef int progress(self) except -1:
        """The peer has more of our bytes, or the system has."""
        if self.over:
            return 0
        if self.outlet is not None:
            return self.outlet.progress()
        if self.on_progress is not None:
            self.poller.python_ran = True
            self.on_progress()
        return 0

    # -- what the peer has --

    @property
    def received(self):
        return self.received_bytes()

    cdef uint64_t received_bytes(self) except? 1:
        """How far the peer is known to have our bytes: acknowledged, or written where it is not asked."""
        if self.asks is not None and not self.asks.demoted:
            return self.asks.position
        # What Tornado's stream was given is not written.
        return self.queue.written if self.fd >= 0 else <uint64_t>self.owner.written

    cpdef int ride(self) except -1:
        """Bytes are about to be written: a ping that is due goes with them, and with those of a client that gets more
        only when it has answered. Where there is no memory for it they go alone: the next ones ask about them."""
        cdef Asking asks = self.asks
        cdef double now
        if asks is None:
            return 0
        try:
            if not self.look_at and self.data_end > asks.position and not asks.demoted:
                self.look_after(asks.tail)
            if self.data_end > asks._asked and not self.we_are_done:
                now = nanoseconds() / 1e9
                if asks.is_wanted(self.data_end, now) or (not asks.outstanding and self.is_behind()):
                    self.ask(now)
                elif asks.is_much(self.data_end):
                    self.look_by(now)
        except MemoryError:
            pass
        return 0

    cdef int look_by(self, double now) except -1:
        """Many bytes do not wait for a look that was set for few."""
        cdef double wait = self.asks.wait_of(self.data_end, now)
        if wait >= 0 and (not self.look_at or self.look_at > <uint64_t>((now + wait) * 1e9)):
            self.look_after(wait)
        return 0

    cdef bint is_behind(self) noexcept:
        return self.outlet is not None and self.outlet.is_behind()

    cdef int ask_soon(self) except -1:
        """It gets more only when it has answered, and there may be nothing that would take a ping with it."""
        cdef Asking asks = self.asks
        if asks is None or asks.outstanding or asks.demoted or self.data_end <= asks._asked or self.we_are_done:
            return 0
        return self.schedule()

    cdef int ask(self, double now) except -1:
        cdef char *out = self.queue.reserve(18)
        self.asks.ask_about(self.queue.queued - 18, now)
        out[0] = <char>(FIN_BIT | PING)
        out[1] = 16
        memcpy(out + 2, self.asks.payload, 16)
        self.look_delay = self.asks.interval
        if self.look_at:  # for what is asked about now; whether that is answered is seen later
            self.look_at = max(self.look_at, <uint64_t>((now + self.asks.interval) * 1e9))
        return 0

    cpdef int look_after(self, double seconds) except -1:
        return self.poller.call_at(self, nanoseconds() + <uint64_t>(seconds * 1e9))

    cdef int on_time(self, uint64_t now) except -1:
        """Is the last ping answered? Is there something to ask about, and nothing that would take a ping with it?"""
        cdef double wait
        if self.over or self.asks is None:
            return 0
        if self.asks.outstanding:
            self.poller.python_ran = True
            self.owner.on_silence()
            return 0
        wait = self.asks.wait_of(self.data_end, now / 1e9)
        if wait > 0:
            self.look_after(wait)
        elif wait == 0 and not self.we_are_done:
            self.schedule()
        return 0

    cpdef int is_acknowledged(self) except -1:
        """A pong has said so."""
        cdef uint64_t now = nanoseconds()
        cdef Asking asks = self.asks
        if not self.look_at or self.look_delay > asks.interval or asks.is_much(self.data_end):
            # It was long in coming, or much was written meanwhile: that is not kept waiting for the next look.
            self.look_at = 0
            self.on_time(now)
        if now - self.told_alive >= SIGN_OF_LIFE:
            self.told_alive = now
            self.poller.python_ran = True
            self.owner.on_sign_of_life()
        return self.progress()

    # -- reading --

    cdef int on_ready(self) except -1:
        cdef ssize_t received
        if self.over or self.fd < 0:
            return 0
        try:
            received = self.parser.receive_from(self.fd)
        except OSError as error:
            self.poller.python_ran = True
            self.owner.on_lost(error)
            return 0
        if received == 0:
            self.poller.python_ran = True
            self.owner.on_end_of_stream()
        elif received > 0 and not self.takes_all():
            self.poller.python_ran = True
            self.owner.on_received()
        return 0

    cdef bint takes_all(self) except -1:
        """Whether everything that has come is dealt with."""
        cdef FrameParser parser = self.parser
        cdef Event *event
        cdef fw_span payload
        while self.hands_out and self.uplink is not None:
            event = parser.peek()
            if event == NULL:
                return parser.error == 0
            if event.opcode < CLOSE:
                if not self.pass_on():
                    return True
            elif event.opcode == PONG and self.asks is not None:
                payload = fixed(event.ptr, event.len)
                # Out of our hands, that is: over TLS the system has records of which OpenSSL has not told us yet.
                if not self.asks.is_answered(payload, self.queue.written):
                    return False
                parser.took()
                self.answered += 1
                try:
                    self.is_acknowledged()
                except BaseException as error:  # what came behind it is not kept waiting
                    self.poller.tell(self, error)
            else:
                return False
        return False

    cdef bint pass_on(self) except -1:
        """To the kernel. False: a message was refused, or what followed from one, and that is dealt with."""
        try:
            self.send_all(self.uplink)
        except Exception as error:
            self.poller.python_ran = True
            self.owner.on_refused(error)
            return False
        return True

    cdef int send_all(self, Uplink uplink) except -1:
        cdef int readable
        try:
            readable = uplink.relay_from(self.parser)
        except MessageError:
            # The messages before it went out, and their answers may be there.
            self.settle(uplink.retry())
            raise
        if readable or self.watched or uplink.needs_looking(self.free_bytes):
            self.poller.python_ran = True
            self.settle(readable)
        return 0

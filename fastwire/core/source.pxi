# What a kernel says on its way into its log: a channel that we speak ourselves, and what is learned from it in passing.

cdef enum:
    LONGEST_NEIGHBOUR = 65536       # bytes of a header that is kept to stand beside
    LEAST_NEIGHBOUR = 64            # bytes of room for a longer one
    TELL_AFTER = 500000000          # ns, and a multiple of them: what many kernels do is told in one wake-up
    TELL_AGAIN = 2000000000         # ns between two tellings of one kernel
    LONGEST_WAIT = 32               # turns that a reply waits for output; more is a kernel that prints without an end


cdef class KernelTraffic:
    """Messages of a kernel, and the bytes of their parts."""

    cdef public uint64_t messages
    cdef public uint64_t nbytes


cdef class KernelSide(Part):
    """The base of `fastwire.relay.KernelRelay`.

    What a kernel printed before a reply comes before it. It says the two on different sockets, perhaps between two
    reads of ours, so only one order of reading is right: the reply, then iopub until it is empty; and nothing that was
    read is given before. So in each turn iopub is what is read last, and replies wait for that.
    """

    cdef public Log journal
    cdef public Activity activity
    cdef public KernelTraffic traffic
    cdef public Source iopub_source     # where we speak it ourselves
    cdef public bint needs_a_word       # what is said may change whether the kernel is heard
    cdef public list observers
    cdef readonly dict listeners        # to all that is said
    cdef public Poller poller
    cdef public Marks budgets
    cdef list replies                   # that were read, and not given: of each, who gives it, and the batch
    cdef size_t reply_bytes
    cdef Batch given                    # that is being given
    cdef int waits                      # turns with output that they have waited
    cdef bint unseen_activity
    cdef str unseen_state
    cdef uint64_t told_at               # ns; when observers heard last
    cdef char *neighbour                # the last message on iopub: its header and, behind that, its parent
    cdef size_t header_size, neighbour_size, neighbour_room

    def __cinit__(self, *args, **options):
        self.observers = []
        self.listeners = {}
        self.replies = []
        self.traffic = KernelTraffic()

    def __dealloc__(self):
        free(self.neighbour)

    def on_iopub(self, Batch batch not None):
        """For all clients, and for who looks whether the kernel is at work."""
        self.hear(batch)

    cdef int hear(self, Batch batch) except -1:
        cdef bint active, said = False
        if not batch.count:
            return 0
        if self.needs_a_word:
            self.poller.python_ran = True
            self.on_word()
        self.keep_neighbour(&batch.messages[batch.count - 1])
        active = self.activity.look(batch, &said)
        if self.observers and (active or said):
            self.note(active, self.activity.state if said else None)
        if len(self.journal.outlets) or self.journal.history_limit:
            self.journal.say_all(batch, False)
        return self.let_listen(batch)

    cdef int let_listen(self, Batch batch) except -1:
        if len(self.listeners):
            self.poller.python_ran = True
            self.tell_listeners(batch)
        return 0

    def tell_listeners(self, batch):
        raise NotImplementedError

    def on_word(self):
        raise NotImplementedError

    # -- replies behind their output --

    def after_output(self, give, Batch batch not None):
        """``give(batch)`` when iopub was read to its end."""
        self.hold(give, batch)

    cdef int hold(self, give, Batch batch) except -1:
        self.poller.follow(self)
        self.replies.append((give, batch))
        self.reply_bytes += batch.nbytes
        return 0

    def holds_enough(self):
        return self.has_enough()

    cdef bint has_enough(self) noexcept:
        """What is said besides is not read yet: as much as may be read in a turn waits for output."""
        return self.reply_bytes >= self.budgets.turn

    def look_at_replies(self):
        """iopub was read."""
        if len(self.replies):
            self.poller.follow(self)

    cdef int on_all_read(self) except -1:
        cdef Source iopub = self.iopub_source
        cdef bint behind, pressed = self.journal.may_be_pressed()
        if iopub is not None and not iopub.is_held_back() and not pressed:
            behind = not iopub.receive()
        elif len(self.replies):
            self.poller.python_ran = True
            behind = self.iopub_is_behind()
        else:
            return 0 if iopub is None else iopub.wake()
        if not behind or self.waits >= LONGEST_WAIT:
            return self.give_all()
        if len(self.replies):
            self.waits += not (pressed and self.iopub_waits())
        return 0

    def iopub_is_behind(self):
        """Comes back, and looks at replies then."""
        raise NotImplementedError

    def iopub_waits(self):
        """For the disk; so do replies."""
        raise NotImplementedError

    def try_later(self):
        raise NotImplementedError

    def give_replies(self):
        self.give_all()

    cdef int give_all(self) except -1:
        """Now, whatever may still come. Whoever asks for it from within gives those behind the one that is given, when
        that is in the log."""
        cdef Py_ssize_t i = 0, end = len(self.replies)
        self.waits = 0
        if not end or (self.given is not None and not self.given.logged):
            return 0
        before = self.given
        try:
            while i < end and self.give_one(i):
                i += 1
        finally:
            self.given = before
            if before is None:
                self.forget_given(i)
        self.journal.tell_of_python(self.poller)
        return 0

    cdef int forget_given(self, Py_ssize_t count) except -1:
        """They are None, and may stay."""
        if count == len(self.replies):
            self.replies.clear()
            return 0
        try:
            del self.replies[:count]
        except MemoryError:
            pass
        return 0

    cdef bint give_one(self, Py_ssize_t i) except -1:
        """A reply keeps its place until it is given, so that no memory is needed to try again: None was given, or is.
        Returns whether those behind it may follow: others are not kept waiting for one that fails."""
        cdef tuple entry = self.replies[i]
        cdef bint is_given = False
        cdef Batch batch
        cdef size_t nbytes
        if entry is None:
            return True
        give, batch = entry
        nbytes = batch.nbytes
        self.given = batch
        self.replies[i] = None
        self.reply_bytes -= nbytes
        try:
            if isinstance(give, Source):
                (<Source>give).give(batch)
            else:
                self.poller.python_ran = True
                give(batch)
            is_given = True
        except BaseException as error:
            interrupted = self.poller.tell(give, error)
            is_given = batch.logged or not (interrupted or isinstance(error, MemoryError))
        finally:
            if not is_given:
                self.replies[i] = entry
                self.reply_bytes += nbytes
                self.try_later()
        return is_given

    # -- activity --

    cdef int note(self, bint active, str state) except -1:
        """Observers hear of it soon, not each time; who shows what they make of it calls `tell_observers` before."""
        self.unseen_activity |= active
        if state is not None:
            self.unseen_state = state
        if not self.look_at:
            self.poller.call_at(self, time_to_tell(nanoseconds(), self.told_at))
        return 0

    cdef int on_time(self, uint64_t now) except -1:
        self.poller.python_ran = True
        self.tell_observers()
        return 0

    def unseen(self):
        """What `observers` have not been told: whether there was activity, and the state if it was said."""
        cdef bint active = self.unseen_activity
        state = self.unseen_state
        self.unseen_activity = False
        self.unseen_state = None
        self.look_at = 0
        self.told_at = nanoseconds()
        return active, state

    def tell_observers(self):
        raise NotImplementedError

    def forget_times(self):
        if self.poller is not None:
            self.poller.forget(self)

    # -- the last message --

    cdef void keep_neighbour(self, const Indexed *message) noexcept:
        """The one before stays where there is no memory."""
        cdef fw_span header = message.parts[0]
        cdef fw_span parent = message.parts[1]
        cdef size_t size = header.len + parent.len
        cdef size_t room
        cdef char *data = self.neighbour
        if size > LONGEST_NEIGHBOUR:
            return
        if size > self.neighbour_room or size + LEAST_NEIGHBOUR < self.neighbour_room // 2:
            room = size + LEAST_NEIGHBOUR
            data = <char *>realloc(data, room)
            if data == NULL:
                return
            self.neighbour_room = room
        self.neighbour = data
        self.header_size = header.len
        self.neighbour_size = size
        memcpy(data, header.ptr, header.len)
        memcpy(data + header.len, parent.ptr, parent.len)

    @property
    def last_headers(self):
        """Of the last message on iopub: its header and parent header; None before."""
        if self.neighbour == NULL:
            return None
        return self.neighbour[: self.header_size], self.neighbour[self.header_size : self.neighbour_size]


cdef uint64_t time_to_tell(uint64_t now, uint64_t told_at) noexcept nogil:
    cdef uint64_t at_least = max(now + TELL_AFTER, told_at + TELL_AGAIN)
    return (at_least + TELL_AFTER - 1) // TELL_AFTER * TELL_AFTER


@cython.final
cdef class Source(Part):
    """One channel. What happens on it besides messages is its `fastwire.channels.Channel`'s."""

    cdef readonly ZmtpStream stream
    cdef Signer signer
    cdef str name
    cdef bint permissive
    cdef object channel
    cdef Poller poller
    cdef KernelSide kernel
    cdef Outlet outlet              # whose replies come on it; None: what comes is for all
    cdef public Uplink uplink       # what waits for room on it
    cdef public bint was_ready      # its `Link` knows that it is
    cdef public bint comes_back     # in the next turn of the loop: there is more
    cdef public Batch kept          # what there was no memory to pass on: it goes before all that comes

    def __init__(self, ZmtpStream stream not None, Poller poller not None, owner):
        """``owner.wake`` is called when there is something to receive."""
        self.stream = stream
        self.poller = poller
        self.channel = owner

    def pass_to(self, channel, Signer signer not None, bint permissive, KernelSide kernel not None, Outlet outlet=None):
        """Messages pass to a kernel's log, for all or for one, without the channel; what else happens is its."""
        self.channel = channel
        self.name = channel.name
        self.signer = signer
        self.permissive = permissive
        self.kernel = kernel
        self.outlet = outlet
        if outlet is None:
            kernel.iopub_source = self

    def end(self):
        """The channel is closed."""
        if self.kernel is not None and self.kernel.iopub_source is self:
            self.kernel.iopub_source = None
        self.kernel = None
        self.outlet = None
        self.uplink = None

    cdef int on_ready(self) except -1:
        cdef KernelSide kernel = self.kernel
        if kernel is None or self.is_held_back() or self.stream.fd < 0:
            return self.wake()
        if kernel.journal.may_be_pressed():
            return self.wake()
        if self.outlet is None:
            return self.poller.follow(kernel)
        if kernel.has_enough():
            return self.wake()
        self.receive()
        if self.kernel is not None and (self.uplink is None or self.uplink.count_waiting()):
            self.poller.python_ran = True
            self.channel.after_wake_up()
        return 0

    cdef int wake(self) except -1:
        self.poller.python_ran = True
        self.channel.wake()
        return 0

    cdef bint is_held_back(self) noexcept:
        """Something is to be passed on before anything more is received."""
        return self.comes_back or self.kept is not None

    cdef bint receive(self) except -1:
        """What is there, up to the budget of a turn. False: there is more, and it comes back for that."""
        cdef ZmtpStream stream = self.stream
        cdef Batch batch
        cdef bint more
        if stream.fd < 0:
            return True
        try:
            batch = stream.drain_all(
                stream.fd, self.name, self.signer, DRAIN_MESSAGES, self.kernel.budgets.turn, self.permissive
            )
        except Exception as error:
            self.poller.python_ran = True
            self.channel.could_not_receive(error)
            return not self.comes_back
        more = stream.more
        try:
            if more:
                self.poller.python_ran = True
                self.channel.come_back()
            if batch is not None:
                self.take(batch)
        except MemoryError:
            self.channel.keep(batch)
            raise
        if self.kernel is not None:
            self.kernel.journal.tell_of_python(self.poller)
        if stream.fd >= 0 and self.is_unsettled():
            self.poller.python_ran = True
            self.channel.settle()
        return not more

    cdef int take(self, Batch batch) except -1:
        cdef KernelSide kernel = self.kernel
        if batch.reasons is not None:
            self.poller.python_ran = True
            self.channel.on_faulty(batch)
        if not batch.count or self.kernel is None:
            return 0
        self.pass_on(batch)
        kernel.traffic.messages += batch.count
        kernel.traffic.nbytes += batch.nbytes
        return 0

    cdef int pass_on(self, Batch batch) except -1:
        if self.outlet is None:
            return self.kernel.hear(batch)
        return self.kernel.hold(self, batch)

    cdef int give(self, Batch batch) except -1:
        """A reply, behind its output."""
        if self.kernel is None:  # its client is gone
            return 0
        if self.outlet.wire is None:  # its client is away, and may have been waited for
            self.poller.python_ran = True
            self.channel.on_batch(batch)
            return 0
        self.kernel.activity.note_answers(batch)
        try:
            self.kernel.journal.tell_one(self.outlet, batch, False, False, 0)
        finally:
            if self.uplink is not None and batch.logged:  # or it comes again
                self.uplink.note_answers(batch)
        return 0 if self.kernel is None else self.kernel.let_listen(batch)

    cdef bint is_unsettled(self) except -1:
        """The connection is to be looked at: bytes wait to be written, it is ready now, or it has ended."""
        cdef ZmtpStream stream = self.stream
        return stream.ended or stream.output_bytes() > 0 or (stream.phase == TALKS) != self.was_ready

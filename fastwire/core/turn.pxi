# One turn of the loop: what is ready is handled, then each connection that has something to write is flushed once.
#
# What is difficult: a turn is to cost no Python, and the loop is asyncio's. So a `Poller` may stand where the loop
# waits (`take_over`): it waits for the loop's descriptors and for its own, handles its own, and goes on waiting. It
# returns to the loop when that has something to do: one of its descriptors is ready, its time has come, or Python ran,
# which may have left it a callback. Elsewhere the loop watches the poller's descriptor, and calls `turn`.

cdef extern from "core/poll.h" nogil:
    enum: FW_POLLED
    int fw_poll_open()
    int fw_poll_add(int poll, int fd)
    int fw_poll_remove(int poll, int fd)
    int fw_poll_wait(int poll, int *ready, int milliseconds)
    void fw_poll_close(int poll)

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef enum:
    SWEEP = 20000000        # ns between looks at those who wait for a time, at least
    CROWD_A_TURN = 256      # of a crowd, flushed at one turn's end: 2 ms


cdef class Part:
    """What a turn calls without Python: a descriptor that is ready, bytes that are to be written, a time that came."""

    cdef bint follows               # `on_all_read` is to be called in this turn
    cdef bint at_end                # it is to be flushed at this turn's end
    cdef bint is_of_crowd           # or later: very many have the same to write, and others do not wait for all of them
    cdef bint awaits                # it stands among those that `look` is called of
    cdef uint64_t look_at           # ns; when

    cdef int on_ready(self) except -1:
        return 0

    cdef int on_all_read(self) except -1:
        """Everything else that was ready in this turn was read."""
        return 0

    cdef int on_end(self) except -1:
        return 0

    cdef int on_time(self, uint64_t now) except -1:
        return 0


@cython.final
@cython.internal
cdef class Parts:
    """Parts in the order they came. What they lie in stays for the next: there are some in every turn."""

    cdef list items             # and None behind them
    cdef Py_ssize_t count

    def __init__(self):
        self.items = []

    cdef int add(self, Part part) except -1:
        if self.count == len(self.items):
            self.items.append(part)
        else:
            self.items[self.count] = part
        self.count += 1
        return 0

    cdef inline Part at(self, Py_ssize_t i):
        return <Part>self.items[i]

    cdef int clear(self) except -1:
        cdef Py_ssize_t i, count = self.count
        self.count = 0
        for i in range(count):
            self.items[i] = None
        return 0


# Who is to hear that a descriptor is ready.
cdef struct Watcher:
    PyObject *who                   # NULL: nobody
    bint is_part


@cython.final
cdef class Poller:
    cdef readonly int fd
    cdef dict watched               # of each descriptor: a `Part`, or what is called
    cdef Watcher *by_fd             # the same, at their numbers
    cdef int fd_room
    cdef Parts followers            # `on_all_read` of them is called in this turn
    cdef Parts parts                # that are flushed at this turn's end; who left meanwhile has no `at_end`
    cdef Parts called               # room for either, while they are called
    cdef list crowd                 # that are flushed then, or at the end of the next turns, in this order
    cdef dict callbacks             # that are called then, once each
    cdef dict waiting               # parts that wait for a time; as keys, so that one can leave
    cdef uint64_t sweep_at          # the next look at them, UINT64_MAX for none
    cdef uint64_t swept             # the last one
    cdef object report              # called with whoever raised, and the exception
    cdef object later               # makes the loop call `end`, when no turn is running
    cdef bint in_turn
    cdef bint ends_soon             # something is to be done at this turn's end, or at the next one's
    cdef bint end_is_due            # the loop was told
    cdef bint timer_is_set          # the loop will call `tick`
    cdef bint python_ran            # in this turn
    cdef object interrupt           # what was raised to end the loop: after this turn
    cdef object loop_select         # that of the loop's selector, whose place this has
    cdef int loop_fd
    cdef fw_beat *beat              # by which the standby reader knows that this goes on
    cdef uint64_t began             # ns; when the last turn did

    def __cinit__(self):
        self.fd = self.loop_fd = -1     # first: it may go no further, and 0 is somebody's
        self.beat = fw_beat_new()
        if self.beat == NULL:
            raise MemoryError
        self.watched = {}
        self.followers = Parts()
        self.parts = Parts()
        self.called = Parts()
        self.crowd = []
        self.callbacks = {}
        self.waiting = {}
        self.sweep_at = UINT64_MAX

    def __init__(self, report, later):
        self.report = report
        self.later = later

    def __dealloc__(self):
        if self.fd >= 0:
            fw_poll_close(self.fd)
        free(self.by_fd)
        if self.beat != NULL:
            fw_beat_release(self.beat)

    @property
    def turns(self):
        return fw_beat_turns(self.beat)

    cdef inline void begin(self) noexcept nogil:
        """A turn of the loop's."""
        self.began = nanoseconds()
        fw_beat_turn(self.beat, self.began)

    # -- descriptors --

    def open(self):
        """Whether there is an epoll now."""
        if self.fd < 0:
            self.fd = fw_poll_open()
        return self.fd >= 0

    def close(self):
        self.give_back()
        if self.fd >= 0:
            fw_poll_close(self.fd)
            self.fd = -1

    def watch(self, int fd, callback):
        cdef int error
        self.make_room(fd)
        before = self.watched.get(fd)
        self.watched[fd] = callback  # first: one that is ready and that nobody knows would wake us for ever
        if self.fd >= 0 and fw_poll_add(self.fd, fd):
            error = errno
            if before is None:
                del self.watched[fd]
            else:
                self.watched[fd] = before
            raise OSError(error, os.strerror(error))
        self.by_fd[fd] = Watcher(<PyObject *>callback, isinstance(callback, Part))

    cdef int make_room(self, int fd) except -1:
        cdef int room = max(2 * fd, 64)
        cdef Watcher *by_fd
        if fd < 0:
            raise ValueError("a descriptor is not negative")
        if fd < self.fd_room:
            return 0
        by_fd = <Watcher *>realloc(self.by_fd, room * sizeof(Watcher))
        if by_fd == NULL:
            raise MemoryError
        memset(by_fd + self.fd_room, 0, (room - self.fd_room) * sizeof(Watcher))
        self.by_fd = by_fd
        self.fd_room = room
        return 0

    def unwatch(self, int fd, callback):
        """Whether it was watched."""
        if self.watched.get(fd) != callback:
            return False
        self.by_fd[fd].who = NULL
        del self.watched[fd]
        if self.fd >= 0:
            fw_poll_remove(self.fd, fd)
        return True

    def __len__(self):
        return len(self.watched)

    # -- in the place of the loop's selector --

    def take_over(self, selector):
        """``selector`` is a loop's `selectors.EpollSelector`; its ``select`` is ours until `give_back`."""
        cdef int fd = selector.fileno()
        theirs = selector.select
        ours = self.select
        if fw_poll_add(self.fd, fd):
            return False
        try:
            selector.select = ours
        except BaseException:
            fw_poll_remove(self.fd, fd)
            raise
        self.loop_fd = fd
        self.loop_select = theirs
        self.begin()
        fw_beat_does(self.beat, FW_IN_TURN)
        return True

    @property
    def has_taken_over(self):
        return self.loop_fd >= 0

    def give_back(self):
        if self.loop_fd < 0:
            return
        fw_poll_remove(self.fd, self.loop_fd)
        self.loop_fd = -1
        fw_beat_does(self.beat, FW_UNSEEN)
        selector = self.loop_select.__self__
        self.loop_select = None
        del selector.select
        # Who counted on the next wait has only the loop now: connections that nobody watches here, over TLS.
        if self.ends_soon:
            self.see_to_the_end()
        if len(self.waiting):
            self.see_to_the_time()

    def select(self, timeout=None):
        """See `selectors.BaseSelector.select`. What is raised here ends the loop: want of memory is not, and what was
        not done for it is done in the next turn."""
        cdef int ready[FW_POLLED]
        cdef uint64_t until = 0
        cdef double seconds
        cdef int count
        cdef bint forever = timeout is None
        if not forever:
            until = nanoseconds()
            if timeout:
                seconds = timeout
                until += <uint64_t>(max(seconds, 0.0) * 1e9)
        while True:
            PyErr_CheckSignals()
            count = self.wait(ready, forever, until)
            if count < 0 and errno != EINTR:
                raise OSError(errno, os.strerror(errno))
            self.python_ran = False
            try:
                is_loops = self.handle(ready, count)
            except MemoryError:
                return ()
            if is_loops:
                return self.loop_select(0) if self.loop_select is not None else ()
            if self.python_ran or self.fd < 0 or self.loop_fd < 0 or (not forever and self.began >= until):
                return ()

    cdef int wait(self, int *ready, bint forever, uint64_t until) noexcept:
        """At most to the time, or to that of a look at those who wait."""
        cdef int count, milliseconds = -1
        cdef uint64_t now
        cdef int fd = self.fd
        if self.ends_soon:
            forever = False
            until = 0
        elif self.sweep_at != UINT64_MAX and (forever or self.sweep_at < until):
            forever = False
            until = self.sweep_at
        if not forever:
            now = nanoseconds()
            milliseconds = 0 if until <= now else <int>min((until - now + 999999) // 1000000, <uint64_t>86400000)
        if milliseconds == 0:
            self.begin()
            return fw_poll_wait(fd, ready, 0)
        with nogil:
            fw_beat_does(self.beat, FW_WAITS)
            count = fw_poll_wait(fd, ready, milliseconds)
            self.begin()  # before the GIL is ours: who keeps it from us keeps the loop
            fw_beat_does(self.beat, FW_IN_TURN)
        return count

    def turn(self):
        """Everything that is ready now, where the loop calls us."""
        cdef int ready[FW_POLLED]
        cdef int count
        if self.fd < 0:
            return
        self.begin()
        count = fw_poll_wait(self.fd, ready, 0)
        self.handle(ready, count)

    def ready(self, callback not None):
        """One descriptor is, where the loop watches each. The first of a round begins a turn, which the next one ends:
        a round that lasts is seen to."""
        if not self.end_is_due:
            self.begin()
            self.see_to_the_end()
        self.call_ready(callback, isinstance(callback, Part))

    cdef bint handle(self, const int *ready, int count) except -1:
        """Whether a descriptor of the loop's is ready."""
        cdef int i
        cdef bint is_loops = False
        self.in_turn = True
        try:
            for i in range(count):
                if ready[i] == self.loop_fd:
                    is_loops = True
                else:
                    self.call(ready[i])
            if self.sweep_at <= self.began:
                self.sweep()
            if self.followers.count:
                self.call_followers()
        finally:
            self.in_turn = False
            self.end()
        return is_loops

    cdef int call(self, int fd) except -1:
        if fd >= self.fd_room or self.by_fd[fd].who == NULL:  # one before it has unwatched it
            return 0
        return self.call_ready(<object>self.by_fd[fd].who, self.by_fd[fd].is_part)

    def wake(self, Part part not None):
        """As if its descriptor were ready."""
        self.call_ready(part, True)

    cdef int call_ready(self, object callback, bint is_part) except -1:
        try:
            if is_part:
                (<Part>callback).on_ready()
            else:
                self.python_ran = True
                callback()
        except Exception as error:
            self.tell(callback, error)
        return 0

    cdef bint tell(self, object who, object error) noexcept:
        """One that raises does not keep the others from their turn, and neither does who is told. True: it was
        interrupted, by what is to end the loop, and does so when all have had theirs."""
        self.python_ran = True
        if isinstance(error, Exception):
            self.report(who, error)
            return False
        self.interrupt = error
        self.see_to_the_end()
        return True

    # -- what is read last --

    cdef int follow(self, Part part) except -1:
        """`on_all_read` of it once, in this turn; the same in the loop's next when none is running."""
        if not part.follows:
            self.see_to_the_end()
            self.followers.add(part)
            part.follows = True
        return 0

    cdef int call_followers(self) except -1:
        """Who follows again meanwhile does so in the next turn."""
        cdef Part part
        cdef Parts followers = self.followers
        cdef Py_ssize_t i
        self.followers = self.spare_room()
        for i in range(followers.count):
            part = followers.at(i)
            if not part.follows:
                continue
            part.follows = False
            try:
                part.on_all_read()
            except BaseException as error:
                if self.tell(part, error):
                    self.follow(part)
        return self.keep_room(followers)

    cdef Parts spare_room(self):
        """Of its own for whoever calls in the middle of a call."""
        cdef Parts spare = self.called
        self.called = None
        return Parts() if spare is None else spare

    cdef int keep_room(self, Parts parts) except -1:
        """They were called."""
        parts.clear()
        self.called = parts
        return 0

    # -- the end of a turn --

    cdef int flush_later(self, Part part) except -1:
        if not part.at_end:
            self.see_to_the_end()
            if part.is_of_crowd:
                self.crowd.append(part)
            else:
                self.parts.add(part)
            part.at_end = True
        return 0

    def at_end(self, callback):
        """Call it once at the end of this turn, or in the loop's next when none is running."""
        self.see_to_the_end()
        self.callbacks[callback] = None

    cdef int see_to_the_end(self) except -1:
        self.ends_soon = True
        if not self.in_turn and self.loop_fd < 0 and not self.end_is_due:
            self.later(self.end_turn)
            self.end_is_due = True
        return 0

    def end_turn(self):
        self.begin()
        self.end_is_due = False
        self.in_turn = True
        try:
            if self.followers.count:
                self.call_followers()
        finally:
            self.in_turn = False
            self.end()

    cdef inline bint is_left(self) noexcept:
        """Something is for the next turn's end."""
        return (
            self.parts.count > 0 or self.followers.count > 0 or len(self.callbacks) > 0 or len(self.crowd) > 0
            or self.interrupt is not None
        )

    cdef int end(self) except -1:
        if not self.ends_soon:
            return 0
        self.ends_soon = False
        try:
            self.end_all()
        finally:
            if self.is_left():
                self.see_to_the_end()
        if self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            self.ends_soon = self.is_left()
            raise interrupt
        return 0

    cdef int end_all(self) except -1:
        cdef Part part
        cdef Parts parts
        cdef Py_ssize_t i
        if self.parts.count:
            parts = self.parts
            self.parts = self.spare_room()
            for i in range(parts.count):
                self.flush(parts.at(i))
            self.keep_room(parts)
        if len(self.crowd):
            crowd = self.crowd[:CROWD_A_TURN]
            del self.crowd[:CROWD_A_TURN]
            for part in crowd:
                self.flush(part)
        if len(self.callbacks):
            callbacks = self.callbacks
            self.callbacks = {}
            self.python_ran = True
            for callback in callbacks:
                try:
                    callback()
                except BaseException as error:
                    self.tell(callback, error)
        return 0

    cdef int flush(self, Part part) except -1:
        if not part.at_end:  # it left meanwhile
            return 0
        part.at_end = False
        try:
            part.on_end()
        except BaseException as error:
            if self.tell(part, error):
                self.flush_later(part)
        return 0

    cdef int forget(self, Part part) except -1:
        """It is over: nothing is called any more."""
        self.waiting.pop(part, None)
        if not len(self.waiting):
            self.sweep_at = UINT64_MAX
        part.follows = part.at_end = part.awaits = False
        part.look_at = 0
        return 0

    # -- times --

    cdef int call_at(self, Part part, uint64_t when) except -1:
        """`on_time` of it then, or at most a `SWEEP` later. Cheap for very many, most of whom leave early."""
        if not part.awaits:
            self.waiting[part] = None
            part.awaits = True
        part.look_at = when
        self.sweep_at = min(self.sweep_at, max(when, self.swept + SWEEP))
        self.see_to_the_time()
        return 0

    cdef int see_to_the_time(self) except -1:
        """Where we do not wait ourselves the loop does, once for all."""
        if self.loop_fd < 0 and not self.timer_is_set:
            self.later(None)
            self.timer_is_set = True
        return 0

    def tick(self):
        """What the loop calls then."""
        self.begin()
        self.timer_is_set = False
        try:
            self.sweep()
        finally:
            if len(self.waiting):
                self.see_to_the_time()

    cdef int sweep(self) except -1:
        cdef Part part
        cdef uint64_t now = nanoseconds()
        cdef uint64_t next_one = UINT64_MAX
        cdef list due = []
        for part in self.waiting:
            if part.look_at <= now:
                due.append(part)
            else:
                next_one = min(next_one, part.look_at)
        self.swept = now
        self.sweep_at = max(next_one, now + SWEEP)  # for ever, where there is none
        for part in due:
            if not part.awaits or part.look_at > now:  # one before it had it forgotten, or called later
                continue
            del self.waiting[part]
            part.awaits = False
            if part.look_at == 0:  # it needs none any more
                continue
            part.look_at = 0
            try:
                part.on_time(now)
            except BaseException as error:
                if self.tell(part, error):
                    self.call_at(part, now)
        return 0

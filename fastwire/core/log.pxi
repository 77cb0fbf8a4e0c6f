# A kernel's log where nothing happens but messages: an entry is appended, given to the sockets that take it at once,
# and let go when their clients have it. What happens when somebody is behind is `fastwire.journal`'s, whose essay tells
# of all of it; these are the bases of its classes.

cdef enum:
    CROWD = 64              # clients of a log, above which they are flushed some at a time


cdef class LogCursor:
    cdef readonly Log journal
    cdef readonly long long number
    cdef object audience                # the same, of entries that are its alone
    cdef readonly object user
    cdef readonly Budget budget         # of that user
    cdef public bint is_connected
    cdef public bint was_closed
    cdef readonly Flight flight
    cdef public LogSegment place        # where it reads on; None where it is live
    cdef public long long position
    cdef public long long taken
    cdef public long long written
    cdef public set passed_over         # the numbers of messages that its client cannot take, from its position on
    cdef public LogSegment stands       # where it needs nothing before

    def __init__(self, Log journal not None, long long number, user, Budget budget not None):
        self.journal = journal
        self.number = number
        self.audience = number
        self.user = user
        self.budget = budget
        self.flight = Flight()
        self.position = journal.end
        self.passed_over = set()

    @property
    def is_live(self):
        return self.place is None

    def stand(self):
        self.take_stand()

    cdef int take_stand(self) except -1:
        """Where it needs nothing before."""
        cdef Given oldest = self.flight.first()
        cdef LogSegment needed = oldest.segment if oldest is not None else self.place
        cdef LogSegment before = self.stands
        if needed is before:
            return 0
        if needed is not None:
            needed.standers[self] = None
        self.stands = needed
        if before is not None:
            del before.standers[self]
        try:
            if needed is not None:
                self.journal.arrive(needed)
        finally:
            if before is not None:
                self.journal.leave_segment(before)
        return 0

    def given(self, LogEntry entry not None, uint64_t begin, uint64_t end, ends, indices=None):
        """A socket was given messages of the next entry, all or those with these indices; none where ``end`` is
        ``begin``."""
        cdef LogSegment segment = self.place if self.place is not None else self.journal.open
        cdef long long index
        if self.journal.cursors.get(self.audience) is not self:  # whoever gave it has ended it
            return
        if end > begin:
            numbers = None if indices is None else [entry.first + index for index in indices]
            self.flight.add(Given(end, begin, ends, entry.first, numbers, segment))
        if self.place is not None:
            self.pass_entry(entry)
            self.journal.recount_entry(segment, entry)
        if self.stands is None:
            self.take_stand()

    cdef Given give_live(self, LogEntry entry, uint64_t begin, Ends ends):
        """`given` of a live one, all messages, before it is given them: its `end` is not known yet."""
        cdef Given given = Given.__new__(Given)
        given.end = UINT64_MAX
        given.begin = begin
        given.ends = ends
        given.first = entry.first
        given.segment = self.journal.open
        self.flight.add(given)
        try:
            if self.stands is None:
                self.take_stand()
        except BaseException:
            self.flight.take_back()
            raise
        return given

    def pass_entry(self, entry):
        raise NotImplementedError

    def release(self, uint64_t position):
        self.release_until(position)
        self.let_go()

    def release_only(self, uint64_t position):
        self.release_until(position)

    cdef int let_go(self) except -1:
        """What nobody needs any more of the segment that is open. It may stand nowhere: memory ran out as it was to."""
        cdef Given oldest = self.flight.first()
        cdef LogSegment stands = self.stands
        if oldest is not None and self.place is None and stands is not None and len(stands.standers) == 1:
            self.journal.shorten_open(stands, oldest.first)
        return 0

    cdef int release_until(self, uint64_t position) except -1:
        """The client has received everything before a position of its socket."""
        cdef Given oldest = self.flight.first()
        if oldest is not None:
            if oldest.end > position:
                return 0
            self.flight.drop_before(position)
        elif self.stands is None:  # else it could not leave when it had nothing more to wait for
            return 0
        self.take_stand()
        return 0


cdef class Log:
    cdef readonly dict cursors
    cdef public LogSegment front
    cdef public LogSegment needed       # where begins what somebody may need; what is before is history
    cdef public LogSegment open
    cdef public Py_ssize_t history_limit
    cdef public Py_ssize_t history      # bytes of what everybody has: what is before ``needed``
    cdef long long kept_until           # the number of what may be next in it
    cdef readonly set readers           # who reads, each in its ``zone``
    cdef readonly set told              # where others stopped who may come back
    cdef bint has_grown                 # it has
    cdef bint is_offered                # budgets know that there is some
    cdef bint joins                     # lines of output, where nobody stops between them
    cdef tuple states                   # of a segment that is kept, and of one that is free
    cdef readonly Ledger ledger         # what became of what clients asked; told of a segment when that is whole
    cdef public long long end           # the number of what comes next
    cdef readonly Budget budget
    cdef public Budget user_budget      # of the hindmost cursor's user
    cdef Budget total
    cdef public Py_ssize_t count_of_behind       # cursors that are
    cdef LogEntry newest                # while it is handed on
    cdef list postponed                 # what is said meanwhile
    cdef bint was_sealed                # since it was empty
    cdef bint python_ran                # and a `Poller` is to hear of it
    cdef readonly dict outlets          # of those who hear all that is said, by number
    cdef tuple listeners                # the same
    # Bytes, and parts of a limit: `fastwire.journal` has their reasons.
    cdef Py_ssize_t most_segment, live_segment, crowded_segment, least_segment, window_part, least_window
    cdef Py_ssize_t crowded_at, join_at, spill_at

    def __init__(self, Budget budget not None, Budget total not None, LogSegment first not None, tuple sizes not None,
                 tuple parts not None, tuple states not None, bint joins):
        self.cursors = {}
        self.outlets = {}
        self.listeners = ()
        self.postponed = []
        self.ledger = Ledger()
        self.readers = set()
        self.told = set()
        self.states = states
        self.joins = joins
        self.budget = budget
        self.user_budget = budget.whole
        self.total = total
        self.front = self.needed = self.open = first
        self.most_segment, self.live_segment, self.crowded_segment, self.least_segment, self.least_window = sizes
        self.window_part, self.crowded_at, self.join_at, self.spill_at = parts

    # -- in --

    cdef LogEntry add(self, Batch batch, object audience, bint momentary, bint ours, Py_ssize_t missing):
        cdef LogSegment segment
        cdef LogEntry entry
        cdef Py_ssize_t count = batch.count
        checked_missing(missing)
        if self.open.entries and <Py_ssize_t>batch.memory_size() > self.size_of_segment():
            self.seal_open()
        segment = self.open
        entry = LogEntry.__new__(LogEntry)
        entry.first = self.end
        entry.end = self.end + count
        entry.batch = batch
        entry.audience = audience
        entry.memory = batch.memory_size() + ENTRY_SIZE
        entry.momentary = momentary
        entry.ours = ours
        entry.missing = missing
        segment.make_ready(audience)
        segment.entries.append(entry)
        segment.count(audience, entry.messages())
        self.end = segment.end = entry.end
        batch.logged = True
        self.add_memory(segment, entry.memory)
        self.newest = entry
        return entry

    def append(self, Batch batch not None, audience=None, *, bint momentary=False, bint ours=False,
               Py_ssize_t missing=0):
        return self.add(batch, audience, momentary, ours, missing)

    def listen(self, Outlet outlet not None):
        """It hears all that is said from now on."""
        self.outlets[outlet.cursor.number] = outlet
        self.listeners = tuple(self.outlets.values())

    def unlisten(self, Outlet outlet not None):
        self.outlets.pop(outlet.cursor.number, None)
        self.listeners = tuple(self.outlets.values())

    def say(self, Batch batch not None, *, bint ours=False):
        """Messages for all who hear, and then it is settled."""
        self.say_all(batch, ours)

    cdef int say_all(self, Batch batch, bint ours) except -1:
        cdef LogEntry entry
        if self.newest is not None:
            self.postponed.append((None, batch, False, ours, 0))
            return 0
        entry = self.add(batch, None, False, ours, 0)
        try:
            self.hand_to_all(entry)
        finally:
            self.settle_all()
        return 0

    cdef int hand_to_all(self, LogEntry entry) except -1:
        cdef tuple listeners = self.listeners
        cdef Outlet outlet
        cdef object failure = None
        cdef bint is_crowd = len(listeners) > CROWD
        cdef Py_ssize_t i
        for i in range(len(listeners)):
            outlet = <Outlet>listeners[i]
            if outlet.wire is not None:
                outlet.wire.is_of_crowd = is_crowd
            try:
                self.hand_on(outlet, entry)
            except Exception as error:  # the others have theirs
                failure = error
        if failure is not None:
            raise failure
        return 0

    cdef int hand_on(self, Outlet outlet, LogEntry entry) except -1:
        try:
            outlet.pass_on(entry)
        except Exception:
            if outlet.cursor.place is not None:
                raise
            self.python_ran = True
            outlet.fall_behind(entry)  # it reads it from here
            if outlet.wire is not None:
                outlet.pump()
        return 0

    def tell(self, Outlet outlet not None, Batch batch not None, *, bint momentary=False, bint ours=False,
             Py_ssize_t missing=0):
        """Messages for one, and then it is settled."""
        self.tell_one(outlet, batch, momentary, ours, missing)

    cdef int tell_one(self, Outlet outlet, Batch batch, bint momentary, bint ours, Py_ssize_t missing) except -1:
        cdef LogEntry entry
        if self.newest is not None:
            self.postponed.append((outlet, batch, momentary, ours, missing))
            return 0
        entry = self.add(batch, outlet.cursor.audience, momentary, ours, missing)
        try:
            self.hand_on(outlet, entry)
        finally:
            self.settle_all()
        return 0

    def settle(self):
        self.settle_all()

    cdef int settle_all(self) except -1:
        """And what was said meanwhile is said: it would have overtaken what others had still to be given."""
        cdef Outlet outlet
        self.settle_newest()
        while len(self.postponed):
            to, batch, momentary, ours, missing = self.postponed.pop(0)
            if to is None:
                self.say_all(batch, ours)
                continue
            outlet = to
            if self.cursors.get(outlet.cursor.audience) is outlet.cursor:  # or it has ended
                self.tell_one(outlet, batch, momentary, ours, missing)
        return 0

    cdef int settle_newest(self) except -1:
        """Whoever could be given the newest entry at once was."""
        cdef LogSegment segment = self.open
        cdef LogEntry newest = self.newest
        self.newest = None
        if segment is self.needed and not len(segment.standers):
            self.leave_segment(segment)
            return 0
        if newest is not None:
            self.recount_entry(segment, newest)
        if segment.memory >= self.size_of_segment():
            self.seal_open()
        if self.is_much():
            self.python_ran = True
            self.make_room()
        return 0

    cdef bint is_much(self) noexcept:
        """Something is to become smaller: what is needed, or what may be asked for."""
        cdef Budget budget = self.budget
        while budget is not None:
            if budget.used - budget.kept > budget.limit // self.join_at or budget.used > budget.limit // self.spill_at:
                return True
            budget = budget.whole
        return False

    def recount(self, LogSegment segment not None, LogEntry entry not None):
        self.recount_entry(segment, entry)

    cdef int recount_entry(self, LogSegment segment, LogEntry entry) except -1:
        """Encoding it for a socket has made it larger."""
        cdef Py_ssize_t before
        if type(entry) is LogEntry and segment.entries is not None:
            if self.is_short():
                entry.batch.forget_frames()
            before = entry.memory
            entry.memory = entry.batch.memory_size() + ENTRY_SIZE
            if entry.memory != before:
                self.add_memory(segment, entry.memory - before)
        return 0

    cdef bint is_short(self) noexcept:
        """Of memory: what waits is to be put aside."""
        cdef Budget budget = self.budget
        while budget is not None:
            if budget.used - budget.kept > budget.limit // self.spill_at:
                return True
            budget = budget.whole
        return False

    def hold(self, LogSegment segment not None, Py_ssize_t nbytes):
        self.add_memory(segment, nbytes)

    cdef void add_memory(self, LogSegment segment, Py_ssize_t nbytes) noexcept:
        global log_bytes
        log_bytes += nbytes
        segment.memory += nbytes
        self.budget.add(nbytes)

    cdef int seal_open(self) except -1:
        self.was_sealed = self.python_ran = True
        self.seal()
        return 0

    cdef void tell_of_python(self, Poller poller) noexcept:
        """Whoever ran has perhaps asked the loop for something."""
        if self.python_ran:
            self.python_ran = False
            poller.python_ran = True

    cdef bint may_be_pressed(self) noexcept:
        """Little room is left: whoever is to be read may have to wait for the disk (`fastwire.journal`)."""
        cdef Budget budget = self.budget
        while budget is not None:
            if budget.used > budget.limit // 4 * 3:
                return True
            budget = budget.whole
        return False

    def seal(self):
        raise NotImplementedError

    def make_room(self):
        raise NotImplementedError

    # -- how much --

    cdef Py_ssize_t share(self) noexcept:
        """Bytes of memory that it may have where all logs have the same."""
        return min(self.budget.limit, self.user_budget.fair_share(), self.total.fair_share())

    cdef Py_ssize_t size_of_segment(self) noexcept:
        cdef Py_ssize_t most = self.most_segment
        if not self.count_of_behind:
            most = self.live_segment if self.has_plenty() else self.crowded_segment
        return max(min(most, self.share() // 16), self.least_segment)

    cdef bint has_plenty(self) noexcept:
        """Where nobody is behind there may be a thousand logs, and what is open cannot be put aside."""
        return (self.user_budget.used - self.user_budget.kept < self.user_budget.limit // self.crowded_at and
                self.total.used - self.total.kept < self.total.limit // self.crowded_at)

    cdef Py_ssize_t size_of_window(self) noexcept:
        return max(self.share() // self.window_part // max(self.count_of_behind, <Py_ssize_t>1), self.least_window)

    @property
    def segment_size(self):
        """Bytes of memory at which a segment is whole."""
        return self.size_of_segment()

    @property
    def window(self):
        """Bytes that a client may have on their way to it, unacknowledged: they cannot be dropped."""
        return self.size_of_window()

    # -- out --

    cdef int arrive(self, LogSegment segment) except -1:
        """A cursor stands there now."""
        if segment is self.needed and len(segment.standers) == 1:
            self.charge()
        return 0

    cdef int charge(self) except -1:
        """The user of the hindmost cursor."""
        cdef LogCursor hindmost = next(iter(self.needed.standers))
        if hindmost.budget is not self.user_budget:
            self.python_ran = True
            self.charge_to(hindmost.budget)
        return 0

    def charge_hindmost(self):
        """The one before it has ended."""
        if len(self.needed.standers):
            self.charge()

    def charge_to(self, budget):
        raise NotImplementedError

    def leave(self, LogSegment segment not None):
        self.leave_segment(segment)

    cdef int leave_segment(self, LogSegment segment) except -1:
        """A cursor stands there no more: what nobody needs is history, or can go."""
        if segment is not self.needed or len(segment.standers):
            return 0
        while not len(self.needed.standers) and self.needed is not self.open:
            self.python_ran = True
            self.has_passed()
        if len(self.needed.standers):
            self.charge()
        elif self.newest is not None:
            return 0  # some may not have been given it yet: `settle_newest` comes back
        elif not self.history_limit:
            self.empty_open()
        elif self.open.entries:
            self.keep_open()
        if self.was_sealed and not len(self.needed.standers):
            self.was_sealed = False
            self.python_ran = True
            self.is_empty()
        return self.look_at_growth()

    cdef int look_at_growth(self) except -1:
        """Something was kept."""
        if self.has_grown:
            self.has_grown = False
            if self.is_much():
                self.python_ran = True
                self.make_room()
        return 0

    cdef int shorten_open(self, LogSegment segment, long long first) except -1:
        """Who alone stands there needs nothing before ``first``: with messages on their way at each moment it never is
        without anybody, and would be whole, and in Python's hands, again and again. Half of its entries go at a time:
        each is copied to another list once or twice."""
        cdef list entries = segment.entries
        cdef LogEntry last
        cdef Py_ssize_t count
        if segment is not self.open or segment is not self.needed or segment.memory < self.size_of_segment() // 16:
            return 0
        count = len(entries) // 2
        if not count:
            return 0
        last = entries[count - 1]
        if last.end > first:
            return 0
        first = last.end
        try:
            if self.history_limit and not self.keep_entries(entries[:count], segment.first, first):
                return 0
            self.add_memory(segment, -segment.shorten(count, first))
        except MemoryError:  # it becomes whole then
            return 0
        return self.look_at_growth()

    def learn(self):
        """Let the ledger read what it has not."""
        if self.open.entries:
            self.ledger.learn(self.open.entries)

    # -- what everybody has (`core/history.pxi`) --

    cdef int keep_open(self) except -1:
        """Nobody needs what is open. Where there is no memory it stays, and is looked at again with what comes next."""
        cdef bint is_kept
        try:
            is_kept = self.keep_segment(self.open)
        except MemoryError:
            return 0
        return self.empty_open() if is_kept else self.seal_open()

    def keep(self, LogSegment segment not None):
        return self.keep_segment(segment)

    cdef bint keep_segment(self, LogSegment segment) except -1:
        return self.keep_entries(segment.entries, segment.first, segment.end)

    cdef bint keep_entries(self, list entries, long long first, long long last) except -1:
        """The first that are needed, with numbers from ``first`` to ``last``, are not any more: what may be asked for
        is copied. False: something is missing there, and it stays as it is. What raises (there is no memory) may be
        called again."""
        cdef list cuts = self.cuts() if self.readers or self.told else None
        cdef LogEntry entry
        cdef Indexed *m
        cdef Kept tail = self.tail()
        cdef Py_ssize_t i
        cdef long long number, end
        for each in entries:
            if type(each) is not LogEntry:
                return False
        if tail is not None and tail.end < first:
            self.new_tail(first)  # something between was lost
        for entry in entries:
            if not self.goes_together(entry, first):
                self.kept_until = max(self.kept_until, entry.end)
            for i in range(entry.batch.count):
                number = entry.first + i
                end = number + 1 if i < entry.batch.count - 1 else entry.end
                if number < self.kept_until:
                    continue
                m = &entry.batch.messages[i]
                if is_to_keep(self.ledger, entry, m, number):
                    self.keep_message(entry, m, first, number, end, cuts)
                self.kept_until = end
            tail = self.tail()
            if tail is not None:
                tail.allow_usual()
        tail = self.tail()
        if tail is None and (self.readers or self.front is not self.needed):
            tail = self.new_tail(first)
        if tail is not None:
            tail.end = last
        self.kept_until = last
        if not self.is_offered:
            self.python_ran = True
            self.offer()
            self.is_offered = True
        return True

    cdef bint goes_together(self, LogEntry entry, long long begin) except -1:
        """Which numbers the messages of a joined entry stand for is not known any more: they are in one block. False:
        all of them that are to be kept are too much."""
        cdef Kept tail = self.tail()
        cdef Indexed *m
        cdef Py_ssize_t i
        cdef size_t size = 0
        if entry.batch.count < 2 or entry.end - entry.first == entry.batch.count or self.kept_until > entry.first:
            return True
        for i in range(entry.batch.count):
            m = &entry.batch.messages[i]
            if is_to_keep(self.ledger, entry, m, entry.first + i):
                size += size_to_keep(m, False)
        if not size or tail is not None and tail.may_use(size):
            return True
        if <Py_ssize_t>size > self.history_limit:
            self.python_ran = True
            self.trim(0)
            self.new_tail(entry.end)
            return False
        # They take less: the room is made as they come.
        self.new_tail(begin if tail is None else entry.first).allow(size)
        return True

    cdef Kept tail(self):
        """The last block, where nothing lies between it and what is needed."""
        cdef LogSegment last = self.needed.previous
        return <Kept>last if type(last) is Kept else None

    cdef Kept new_tail(self, long long first):
        cdef Kept tail = Kept.__new__(Kept)
        cdef LogSegment before = self.needed.previous
        tail.entries = []
        tail.counts = {}
        tail.standers = {}
        tail.waiters = []
        tail.state = self.states[0]
        tail.first = tail.end = first
        tail.usual = tail.most = min(<size_t>KEPT_BLOCK, <size_t>(self.history_limit // KEPT_BLOCKS))
        tail.previous = before
        tail.next = self.needed
        self.needed.previous = tail
        if before is not None:
            before.next = tail
        if self.front is self.needed:
            self.front = tail
            self.is_offered = False
        return tail

    cdef int keep_message(self, LogEntry entry, const Indexed *m, long long begin, long long number, long long end,
                          list cuts) except -1:
        """Since ``begin`` nothing else is to be kept, where there is no block yet."""
        cdef Kept tail = self.tail()
        cdef StreamText stream
        cdef size_t size
        cdef bint repeats = tail is not None and tail.repeats(m)
        if repeats and self.joins and tail.joins(m, entry, &stream) and not is_cut(cuts, tail, number):
            if self.has_room(tail, stream.text.len + 8):
                return self.has_kept(tail, tail.join(stream.text, end), end)
        size = size_to_keep(m, repeats)
        if tail is None or not self.has_room(tail, size):
            size = size_to_keep(m, False)
            repeats = False
            if <Py_ssize_t>size > self.history_limit:
                self.python_ran = True
                self.trim(0)  # what is kept is all from some number on
                self.new_tail(end)
                return 0
            tail = self.new_tail(begin if tail is None else number)
            tail.allow(size)
            self.has_room(tail, size)
        return self.has_kept(tail, tail.add(m, entry, number, end, repeats), end)

    cdef bint has_room(self, Kept tail, size_t size) except -1:
        cdef size_t before = tail.room
        cdef bint has_room = tail.make_room(size)
        if tail.room != before:
            self.add_memory(tail, tail.room - before)
            self.budget.add(0, tail.room - before)
            self.has_grown = True
        return has_room

    cdef int has_kept(self, Kept tail, size_t size, long long end) except -1:
        tail.end = end
        tail.weight += size
        self.history += size
        while self.history > self.history_limit and self.front is not self.needed:
            if type(self.front) is Kept:
                self.drop_block()
            else:
                self.python_ran = True
                self.trim(self.history_limit)
        return 0

    def count_as_history(self, LogSegment segment not None):
        segment.weight = segment.size()
        self.history += segment.weight

    def drop_front(self):
        self.drop_block()

    cdef int drop_block(self) except -1:
        """A block."""
        cdef Kept front = <Kept?>self.front
        self.add_memory(front, -<Py_ssize_t>front.room)
        self.budget.add(0, -<Py_ssize_t>front.room)
        self.history -= front.weight
        self.front = front.next
        self.front.previous = front.next = None
        front.state = self.states[1]
        front.let_go()
        return 0

    cdef list cuts(self):
        """Zones in which somebody reads, or may read on: of each the first number, and the last."""
        cdef long long number
        cdef list cuts = [reader.zone for reader in self.readers]
        if self.told:
            self.told = {number for number in self.told if number >= self.kept_until}
            cuts += [(number, number) for number in self.told]
        return cuts

    def empty(self):
        self.empty_open()

    cdef int empty_open(self) except -1:
        """The segment that is open is all there is, and nobody needs it."""
        cdef LogSegment segment = self.open
        if segment.entries:
            segment.entries = []
            self.add_memory(segment, -segment.memory)
            segment.empty_counts()
            segment.first = self.end
            segment.version += 1
        return 0

    def has_passed(self):
        raise NotImplementedError

    def offer(self):
        raise NotImplementedError

    def trim(self, limit):
        raise NotImplementedError

    def is_empty(self):
        raise NotImplementedError


cdef class Outlet:
    """One client's way out of a log, where it gets what everybody gets: the base of `fastwire.downlink.Downlink`."""

    cdef readonly LogCursor cursor
    cdef public Wire wire               # of its socket; None without one
    cdef object protocol_name
    cdef int protocol_number
    cdef public object prepare
    cdef public bint prepare_all
    cdef public bint compresses
    cdef public Marks budgets

    def __cinit__(self, LogCursor cursor not None, *args, **options):
        self.cursor = cursor
        self.protocol = None

    @property
    def protocol(self):
        return self.protocol_name

    @protocol.setter
    def protocol(self, protocol):
        self.protocol_number = protocol_of(protocol)
        self.protocol_name = protocol

    def has_room(self):
        return self.takes_more()

    cdef bint takes_more(self) except -1:
        """The socket may be given more."""
        cdef Wire wire = self.wire
        cdef WriteQueue queue = wire.queue
        return (
            <Py_ssize_t>(queue.queued - queue.written) < self.budgets.high_water
            and <Py_ssize_t>(queue.queued - wire.received_bytes()) < self.cursor.journal.size_of_window()
            and not wire.closes
            and not wire.over
        )

    cdef bint is_behind(self) noexcept:
        return self.cursor.place is not None

    cdef int pass_on(self, LogEntry entry) except -1:
        """An entry that was just appended for this client, or for all."""
        if self.cursor.place is not None:
            return 0
        if self.wire is None or not self.takes_more():
            self.cursor.journal.python_ran = True
            self.fall_behind(entry)
            self.ask_soon()
        elif self.is_plain(entry):
            self.give_plainly(entry)
        else:
            self.wire.poller.python_ran = True
            self.try_to_give(entry)
        return 0

    cdef bint is_plain(self, LogEntry entry) except -1:
        """Whether this client gets what everybody gets."""
        cdef LogCursor cursor = self.cursor
        if type(entry) is not LogEntry or self.compresses or cursor.passed_over:
            return False
        if entry.first < cursor.written or entry.first < cursor.position:
            return False
        return self.prepare is None or entry.ours or not (self.prepare_all or entry.batch.is_unusual())

    cdef int give_plainly(self, LogEntry entry) except -1:
        cdef Wire wire = self.wire
        cdef uint64_t begin = wire.queue.queued
        cdef Frames frames
        cdef Given given = None
        if not entry.batch.count:
            return 0
        try:
            frames = entry.batch.frames_for(self.protocol_number)
            given = self.cursor.give_live(entry, begin, frames.ends)
            given.end = wire.extend(frames)
        except Exception as error:
            if given is not None:
                self.cursor.flight.take_back()
            wire.poller.python_ran = True
            self.could_not_give(entry, error)
        return 0

    cdef int progress(self) except -1:
        """The client has more, or its socket has room."""
        cdef Poller poller = self.wire.poller
        self.cursor.release_until(self.wire.received_bytes())
        self.cursor.let_go()
        self.cursor.journal.tell_of_python(poller)
        if self.cursor.place is not None:
            poller.python_ran = True
            self.pump()
            self.ask_soon()
        return 0

    cdef int ask_soon(self) except -1:
        if self.wire is not None and self.is_behind():
            self.wire.ask_soon()
        return 0

    def fall_behind(self, entry):
        raise NotImplementedError

    def try_to_give(self, entry):
        raise NotImplementedError

    def could_not_give(self, entry, error):
        raise NotImplementedError

    def pump(self):
        raise NotImplementedError

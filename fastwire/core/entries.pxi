# What a kernel's log consists of: entries in segments, the bytes they take, and what each client was given of them.

cdef enum:
    ENTRY_SIZE = 128        # bytes, about what an entry takes beside its batch

ENTRY = ENTRY_SIZE


cdef class Marks:
    """The base of `fastwire.budgets.Budgets`: the numbers that each message is measured by."""

    cdef public Py_ssize_t high_water   # bytes that may wait in a socket's queue before it is given more
    cdef public size_t turn             # bytes that a kernel may say in a turn


cdef class Budget:
    """Bytes that something takes, which are a part of what a larger ``whole`` takes."""

    cdef public Py_ssize_t limit
    cdef public Py_ssize_t used
    cdef public Py_ssize_t freed        # in all, since somebody set it to 0
    cdef readonly Budget whole
    cdef readonly Py_ssize_t kept       # of these, what everybody has: it goes first
    cdef readonly set logs
    cdef readonly set sealed            # the logs that have something whole which somebody needs
    cdef readonly set histories         # the logs that keep what everybody has
    cdef fw_purse *purse                # what the standby reader takes

    def __cinit__(self, *args, **options):
        self.purse = fw_purse_new()
        if self.purse == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.purse != NULL:
            fw_purse_release(self.purse)

    def __init__(self, Py_ssize_t limit, Budget whole=None):
        self.limit = limit
        self.logs = set()
        self.sealed = set()
        self.histories = set()
        if whole is not None:
            self.move(whole)

    def move(self, Budget whole not None):
        if self.whole is not whole:
            if self.whole is not None:
                self.whole.add(-self.used, -self.kept)
            self.whole = whole
            whole.add(self.used, self.kept)
            fw_purse_move(self.purse, whole.purse)

    @property
    def aside(self):
        return fw_purse_held(self.purse)

    def limit_aside(self, size_t limit):
        fw_purse_set_limit(self.purse, limit)

    def take(self, Py_ssize_t nbytes, Py_ssize_t kept=0):
        self.add(nbytes, kept)

    cdef void add(self, Py_ssize_t nbytes, Py_ssize_t kept=0) noexcept:
        cdef Budget budget = self
        while budget is not None:
            budget.used += nbytes
            budget.kept += kept
            if nbytes < 0:
                budget.freed -= nbytes
            budget = budget.whole

    @property
    def needed(self):
        """What somebody has still to get."""
        return self.used - self.kept

    cdef Py_ssize_t fair_share(self) noexcept:
        return self.limit // max(<Py_ssize_t>len(self.logs), <Py_ssize_t>1)

    @property
    def share(self):
        return self.fair_share()


@cython.no_gc   # thousands are kept: each collection would look at all of them, and nothing of one leads back
@cython.freelist(64)
cdef class LogEntry:
    cdef public long long first
    cdef public long long end
    cdef public Batch batch
    cdef public object audience         # a cursor's number; None for all
    cdef public Py_ssize_t memory
    cdef public bint momentary
    cdef public bint ours
    cdef public Py_ssize_t missing      # messages that it tells are missing; 0 for what a kernel said

    def __init__(self, long long first, long long end, Batch batch not None, audience=None, *, bint momentary=False,
                 bint ours=False, Py_ssize_t missing=0):
        self.first = first
        self.end = end
        self.batch = batch
        self.audience = audience
        self.momentary = momentary
        self.ours = ours
        self.missing = checked_missing(missing)
        self.memory = batch.memory_size() + ENTRY_SIZE

    cdef Py_ssize_t messages(self) noexcept:
        return self.missing if self.missing or self.batch is None else self.batch.count

    def __len__(self):
        return self.batch.count

    @property
    def count(self):
        return self.messages()

    @property
    def has_output(self):
        return (
            self.audience is None and not self.momentary
            and self.batch.by_class[STREAM] + self.batch.by_class[DISPLAY] > 0
        )

    def part(self, long long begin, long long end):
        cdef long long most = self.batch.count
        if begin == self.first and end == self.end:
            return self
        batch = self.batch.part(min(begin - self.first, most), min(end - self.first, most))
        return LogEntry(
            begin, end, batch, self.audience, momentary=self.momentary, ours=self.ours, missing=self.missing
        )


cdef Py_ssize_t checked_missing(Py_ssize_t count) except -1:
    if count < 0:
        raise ValueError(f"no {count} messages can be missing")
    return count


cdef class LogSegment:
    cdef public object state
    cdef public long long first
    cdef public long long end
    cdef public list entries            # None: on the disk alone
    cdef dict counted                   # of each audience: messages, but for those
    cdef long long for_all              # that were appended for all, or for the one who was last, since somebody asked
    cdef long long for_one
    cdef object one
    cdef public Py_ssize_t memory
    cdef public LogSegment previous
    cdef public LogSegment next
    cdef public object record
    cdef public dict standers           # the cursors that need nothing before it and may need this
    cdef public list waiters
    cdef public bint is_joined
    cdef public Py_ssize_t version      # changes when its entries do
    cdef public Py_ssize_t weight       # what it counts as history

    @property
    def nbytes(self):
        return self.size()

    cdef Py_ssize_t size(self) except -1:
        return self.record.size if self.entries is None and self.record is not None else self.memory

    @property
    def counts(self):
        """Of each audience: messages."""
        self.settle_counts()
        return self.counted

    @counts.setter
    def counts(self, dict counts not None):
        self.counted = counts
        self.for_all = self.for_one = 0

    cdef int make_ready(self, object audience) except -1:
        """So that `count` of it needs no memory."""
        if audience is not None and audience is not self.one:
            self.settle_counts()
            self.one = audience
        return 0

    cdef void count(self, object audience, Py_ssize_t messages) noexcept:
        if audience is None:
            self.for_all += messages
        else:
            self.for_one += messages

    def read(self, long long position):
        """Its entries that end behind a number."""
        return [entry for entry in self.entries if (<LogEntry>entry).end > position]

    cdef int settle_counts(self) except -1:
        cdef dict counted = self.counted
        if self.for_all:
            counted[None] = counted.get(None, 0) + self.for_all
            self.for_all = 0
        if self.for_one:
            counted[self.one] = counted.get(self.one, 0) + self.for_one
            self.for_one = 0
        return 0

    cdef Py_ssize_t shorten(self, Py_ssize_t count, long long first) except -1:
        """Without so many entries at its beginning, which is ``first`` then. Returns what they took."""
        cdef list rest = self.entries[count:]
        cdef dict counted = {}
        cdef Py_ssize_t memory = 0
        cdef LogEntry each
        for each in rest:
            counted[each.audience] = counted.get(each.audience, 0) + each.messages()
            memory += each.memory
        self.entries = rest
        self.counts = counted
        self.first = first
        self.version += 1
        return self.memory - memory

    cdef int empty_counts(self) except -1:
        self.for_all = self.for_one = 0
        if len(self.counted):
            self.counted = {}
        return 0


@cython.final
@cython.freelist(64)
cdef class Given:
    cdef readonly uint64_t end
    cdef readonly uint64_t begin
    cdef readonly object ends
    cdef readonly long long first
    cdef readonly object numbers
    cdef readonly LogSegment segment

    def __init__(self, uint64_t end, uint64_t begin, ends, long long first, numbers, LogSegment segment not None):
        self.end = end
        self.begin = begin
        self.ends = ends
        self.first = first
        self.numbers = numbers
        self.segment = segment

    def reached(self, uint64_t position):
        place = self.ends.complete_before(max(position, self.begin) - self.begin)
        return None if place == len(self.ends) else self.number(place)

    def longest(self, uint64_t received, uint64_t written):
        nbytes, place = self.ends.longest(max(received, self.begin) - self.begin, max(written, self.begin) - self.begin)
        return (nbytes, self.number(place)) if nbytes else (0, 0)

    cdef object number(self, Py_ssize_t place):
        return self.first + place if self.numbers is None else self.numbers[place]


@cython.final
cdef class Flight:
    """What a client was given and is not known to have, the oldest first."""

    cdef list items         # from ``head`` on
    cdef Py_ssize_t head

    def __cinit__(self):
        self.items = []

    def __len__(self):
        return len(self.items) - self.head

    def __iter__(self):
        return iter(self.items[self.head :])

    @property
    def oldest(self):
        return self.first()

    cdef Given first(self):
        """None when there is none."""
        return <Given>self.items[self.head] if self.head < len(self.items) else None

    cpdef int add(self, Given given) except -1:
        self.items.append(given)
        return 0

    cdef int take_back(self) except -1:
        """The newest."""
        del self.items[-1:]
        return 0

    cdef int drop_before(self, uint64_t position) except -1:
        """All that ends there, or before."""
        cdef Py_ssize_t head = self.head
        cdef Py_ssize_t count = len(self.items)
        while head < count and (<Given>self.items[head]).end <= position:
            head += 1
        self.head = head
        # What was dropped stays in the list for a while, so that each costs the same however many there are.
        if head == count or head > 64 and head > count // 2:
            self.head = 0   # before: letting go of something may come back here
            try:
                del self.items[:head]
            except MemoryError:
                self.head = head
        return 0

    def clear(self):
        before = self.items  # let go at last: that may come back here  # noqa: F841
        self.items = []
        self.head = 0

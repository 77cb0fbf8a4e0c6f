# The runs of a kernel: what became of each execute_request, at a cost of each request. What clients ask passes
# `Uplink`; the rest is learned from messages in the log, a segment at a time. What is asked is copied as it is, and
# becomes runs when somebody looks: by then it is several requests, at hardly more than the price of one.

RUN_STATES = ("queued", "running", "done", "aborted", "lost")

cdef str QUEUED_RUN, RUNNING_RUN, DONE_RUN, ABORTED_RUN, LOST_RUN
QUEUED_RUN, RUNNING_RUN, DONE_RUN, ABORTED_RUN, LOST_RUN = RUN_STATES

cdef enum:
    LARGEST_REQUEST = 8192      # bytes of a header that is kept
    LARGEST_NAME = 512          # of a cell's id
    LARGEST_DATE = 64
    UNKNOWN = -1                # an execution count
    ASKED_ROOM = 1024           # bytes of requests that are no runs yet: malloc has no more at hand in one piece
    RUN_SIZE = 512              # bytes that one takes, with its place and its name, beside what is kept of its request
    LEAST_RUNS = 32             # of a kernel that are known however much others' take

# In the order in which runs are forgotten.
cdef enum:
    ENDED_RUNS
    QUEUED_RUNS
    RUNNING_RUNS
    CHAINS_OF_RUNS

cdef size_t ledger_bytes_limit = 8 << 20


# Behind it lie a request's header and its metadata.
cdef struct Asked:
    uint32_t header             # bytes
    uint32_t metadata


cdef struct Date:
    uint8_t size                # of the JSON string; 0 where none was said
    char text[LARGEST_DATE]


cdef inline void note_date(Date *date, const Indexed *m) noexcept nogil:
    cdef fw_span said = fixed(<const char *>m.text[0].ptr + m.header.date_at, m.header.date_size)
    date.size = 0
    if is_string(said) and said.len <= LARGEST_DATE:
        memcpy(date.text, said.ptr, said.len)
        date.size = <uint8_t>said.len


cdef inline str date_of(const Date *date):
    return unescaped(fixed(date.text, date.size)) if date.size else None


@cython.final
@cython.no_gc   # names and numbers
@cython.freelist(64)
cdef class Run:
    cdef readonly str msg_id
    cdef readonly bytes header      # of the request, as its client sent it or its kernel repeated it
    cdef str cell_name
    cdef bytes metadata             # of the request, until somebody asks for its cell
    cdef readonly str state
    cdef readonly bint was_asked    # and not only heard of
    cdef readonly bint failed
    cdef readonly bint replied
    cdef readonly Py_ssize_t messages
    cdef readonly long long first
    cdef readonly long long last
    cdef readonly long long asks
    cdef readonly uint64_t order
    cdef PyObject *older            # in its chain: its ledger has them all. Who is forgotten before and after it
    cdef PyObject *newer
    cdef long long counted          # its execution count
    cdef Py_ssize_t memory          # bytes, while its ledger has it
    cdef Date began_at, ended_at

    def __init__(self):
        raise TypeError("runs are found in a Ledger")

    @property
    def is_over(self):
        return self.state is not QUEUED_RUN and self.state is not RUNNING_RUN

    @property
    def cell(self):
        if self.metadata is not None:
            self.cell_name = name_in(bytes_span(self.metadata), b"cellId", 6)
            self.metadata = None
        return self.cell_name

    @property
    def execution_count(self):
        return None if self.counted == UNKNOWN else self.counted

    @property
    def begun(self):
        return date_of(&self.began_at)

    @property
    def ended(self):
        return date_of(&self.ended_at)


cdef inline int chain_of(Run run) noexcept:
    """Late output of one that was forgotten is nothing that somebody waits for."""
    if run.state is RUNNING_RUN:
        return RUNNING_RUNS
    return QUEUED_RUNS if run.state is QUEUED_RUN and run.was_asked else ENDED_RUNS


# Of runs, by when they came to be what they are.
cdef struct Chain:
    PyObject *oldest
    PyObject *newest


# As Python's json spells them.
cdef fw_span USUAL_BUSY = fixed(b'{"execution_state": "busy"}', 27)
cdef fw_span USUAL_IDLE = fixed(b'{"execution_state": "idle"}', 27)


cdef inline fw_span bytes_span(bytes text) noexcept:
    return fixed(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))


cdef str name_in(fw_span text, const char *name, size_t length):
    """A string in a JSON object; None where there is none, or one that is longer than names are."""
    cdef fw_span value = member_of(text, name, length)
    if value.ptr == NULL or not is_string(value) or value.len > LARGEST_NAME:
        return None
    return unescaped(value)


cdef inline bint says(fw_span value, const char *word, size_t length) noexcept nogil:
    """Whether a JSON value is this string."""
    return value.ptr != NULL and is_string(value) and spells(inside(value), word, length)


cdef long long count_of(fw_span value) noexcept nogil:
    """A number of decimal digits."""
    cdef const char *text = <const char *>value.ptr
    cdef long long count = 0
    cdef size_t i
    if not 0 < value.len <= 18:
        return UNKNOWN
    for i in range(value.len):
        if not 48 <= text[i] <= 57:
            return UNKNOWN
        count = count * 10 + text[i] - 48
    return count


cdef inline bint is_called(Run run, fw_span text) noexcept:
    """Whether the inside of a JSON string is its id: of the usual ones, that no character is escaped in."""
    cdef str name = run.msg_id
    if not PyUnicode_IS_ASCII(name) or is_escaped(text):
        return False
    return same_bytes(text, fixed(<char *>PyUnicode_1BYTE_DATA(name), PyUnicode_GET_LENGTH(name)))


@cython.final
cdef class Ledger:
    cdef dict runs              # by msg_id
    cdef Py_ssize_t most
    cdef object uplinks         # that tell it what is asked, weakly
    cdef Py_ssize_t memory      # bytes of them all
    cdef uint64_t count
    cdef Run running            # that began last
    cdef Chain chains[CHAINS_OF_RUNS]   # each run is in one
    cdef Run last               # that was asked or began
    cdef char *asked            # requests that are no runs yet, each behind its `Asked`; NULL where there are none
    cdef size_t asked_start
    cdef size_t asked_end
    cdef size_t asked_anew      # those before it were asked of a process that is gone
    cdef readonly long long position
    # The last parent header, which nearly always is the next one's, and the run that it names.
    cdef char *parent
    cdef size_t parent_size, parent_room
    cdef Run named

    def __init__(self, Py_ssize_t most=512):
        if most < 1:
            raise ValueError("most has to be at least 1")
        self.runs = {}
        self.most = most
        self.uplinks = WeakSet()

    def __dealloc__(self):
        global ledger_bytes
        ledger_bytes -= self.memory
        free(self.parent)
        self.forget_asked()

    def __len__(self):
        self.settle()
        return len(self.runs)

    def get(self, str msg_id not None):
        self.settle()
        return self.runs.get(msg_id)

    def all(self):
        self.settle()
        return sorted(self.runs.values(), key=_order_of)

    # -- what clients ask --

    cdef int ask(self, const fw_span *parts, fw_span msg_type) except -1:
        """A message for shell, as it goes to the kernel; ``msg_type`` is as `type_of` has it."""
        cdef fw_span header = parts[0]
        cdef fw_span metadata = parts[2]
        cdef size_t size = aligned(sizeof(Asked) + header.len + metadata.len)
        if header.len > LARGEST_REQUEST:
            return 0
        if size > ASKED_ROOM or is_escaped(header) or is_escaped(metadata):
            self.settle()
            self.be_asked(header, metadata)
        elif msg_type.ptr != NULL and spells(msg_type, b"execute_request", 15):
            if size > ASKED_ROOM - self.asked_end:
                self.settle()
            self.note_asked(header, metadata)
            self.asked_end += size
        return 0

    cdef int note_asked(self, fw_span header, fw_span metadata) except -1:
        """There is room for it."""
        global ledger_bytes
        cdef Asked *asked
        cdef char *data
        if self.asked == NULL:
            self.asked = <char *>malloc(ASKED_ROOM)
            if self.asked == NULL:
                raise MemoryError
            ledger_bytes += ASKED_ROOM
        asked = <Asked *>(self.asked + self.asked_end)
        asked.header = <uint32_t>header.len
        asked.metadata = <uint32_t>metadata.len
        data = <char *>(asked + 1)
        memcpy(data, header.ptr, header.len)
        if metadata.len:
            memcpy(data + header.len, metadata.ptr, metadata.len)
        return 0

    cdef int settle(self) except -1:
        """What was asked are runs now. Where there is no memory for one, it and those behind it are the next time. No
        Python runs meanwhile: nothing that lies there is escaped."""
        cdef Asked *asked
        cdef const char *data
        cdef Run run
        while self.asked_start < self.asked_end:
            asked = <Asked *>(self.asked + self.asked_start)
            data = <const char *>(asked + 1)
            run = self.be_asked(fixed(data, asked.header), fixed(data + asked.header, asked.metadata))
            if run is not None and self.asked_start < self.asked_anew:
                self.become(run, LOST_RUN)
            self.asked_start += aligned(sizeof(Asked) + asked.header + asked.metadata)
        self.forget_asked()
        return 0

    cdef void forget_asked(self) noexcept:
        global ledger_bytes
        if self.asked != NULL:
            ledger_bytes -= ASKED_ROOM
        free(self.asked)
        self.asked = NULL
        self.asked_start = self.asked_end = self.asked_anew = 0

    cdef Run be_asked(self, fw_span text, fw_span metadata):
        """None where it is no execute_request."""
        cdef Header header
        cdef Run run
        if scan_header(text, &header) == NOT_JSON:
            return None
        if header.msg_type.ptr == NULL or not is_string(header.msg_type):
            return None
        if not spells(inside(header.msg_type), b"execute_request", 15):
            return None
        if header.msg_id.ptr == NULL or not is_string(header.msg_id):
            return None
        run = self.new(unescaped(header.msg_id), span_bytes(text), True)
        if metadata.len <= LARGEST_NAME:
            run.metadata = span_bytes(metadata)
            self.count_bytes(run, len(run.metadata))
        else:
            run.cell_name = name_in(metadata, b"cellId", 6)
        return run

    cdef int answer(self) except -1:
        """An input_reply goes to the kernel."""
        cdef Run run
        for run in self.runs.values():
            run.asks = -1
        return 0

    cdef Run new(self, str msg_id, bytes header, bint was_asked):
        """Of a request that comes again the last counts."""
        cdef Run run = Run.__new__(Run)
        cdef Run before
        self.parent_size = 0
        before = self.runs.get(msg_id)
        if before is not None:
            self.forget(before)
        while self.has_no_room():
            self.forget(self.hindmost())
        self.count += 1
        run.msg_id = msg_id
        run.header = header
        run.state = QUEUED_RUN
        run.was_asked = was_asked
        run.first = run.last = run.asks = -1
        run.counted = UNKNOWN
        run.order = self.count
        self.add(run)
        return run

    cdef bint has_no_room(self) noexcept:
        cdef Py_ssize_t count = len(self.runs)
        return count >= self.most or (count >= LEAST_RUNS and ledger_bytes > ledger_bytes_limit)

    @property
    def is_full(self):
        """Whether the next run takes the place of one that somebody waits for."""
        self.settle()
        return self.has_no_room() and self.chains[ENDED_RUNS].oldest == NULL

    cdef Run hindmost(self):
        """Who is forgotten first. What goes on, somebody may wait for."""
        cdef int i
        for i in range(CHAINS_OF_RUNS):
            if self.chains[i].oldest != NULL:
                return <Run>self.chains[i].oldest
        return None

    cdef int add(self, Run run) except -1:
        self.runs[run.msg_id] = run
        self.enter(run)
        self.last = run
        self.count_bytes(run, RUN_SIZE + len(run.header))
        return 0

    cdef int forget(self, Run run) except -1:
        """Who waits for it hears of nothing any more."""
        del self.runs[run.msg_id]
        self.leave(run)
        if not run.is_over:
            run.state = LOST_RUN
        if self.last is run:
            self.last = None
        self.count_bytes(run, -run.memory)
        return 0

    cdef void become(self, Run run, str state) noexcept:
        self.leave(run)
        run.state = state
        self.enter(run)

    cdef void enter(self, Run run) noexcept:
        """Behind all others in its chain."""
        cdef Chain *chain = &self.chains[chain_of(run)]
        run.older = chain.newest
        run.newer = NULL
        if chain.newest == NULL:
            chain.oldest = <PyObject *>run
        else:
            (<Run>chain.newest).newer = <PyObject *>run
        chain.newest = <PyObject *>run

    cdef void leave(self, Run run) noexcept:
        cdef Chain *chain = &self.chains[chain_of(run)]
        if run.older == NULL:
            chain.oldest = run.newer
        else:
            (<Run>run.older).newer = run.newer
        if run.newer == NULL:
            chain.newest = run.older
        else:
            (<Run>run.newer).older = run.older

    cdef void count_bytes(self, Run run, Py_ssize_t more) noexcept:
        global ledger_bytes
        run.memory += more
        self.memory += more
        ledger_bytes += more

    # -- what kernels say --

    cpdef int learn(self, list entries) except -1:
        """Those of the log, in order. What was learned is passed by, and what the server said itself."""
        cdef LogEntry entry
        cdef Py_ssize_t i
        for entry in entries:
            if entry.ours or entry.end <= self.position:
                continue
            for i in range(entry.batch.count):
                self.hear(&entry.batch.messages[i], entry.first + i)
            self.position = max(self.position, entry.end)
        return 0

    cdef Run hear(self, const Indexed *m, long long number):
        """Whose a message is. What was heard before is passed by: no run that was forgotten since begins with it."""
        cdef bint is_new = number >= self.position
        cdef Run run
        if self.asked != NULL:
            self.settle()
        run = self.run_of(m.text[1], is_new)
        if is_new:
            if run is not None:
                self.follow(run, m, number)
            self.position = number + 1  # memory may run out at the next
        return run

    cdef Run run_of(self, fw_span parent_header, bint may_begin):
        """The messages of one request have the same parent, byte for byte."""
        cdef Run run
        cdef char *parent
        if self.parent_size and same_bytes(parent_header, fixed(self.parent, self.parent_size)):
            return self.named
        run = self.find(parent_header, may_begin)
        self.parent_size = 0
        if parent_header.len > LARGEST_REQUEST or run is None and not may_begin:
            return run
        if parent_header.len > self.parent_room:
            parent = <char *>realloc(self.parent, parent_header.len)
            if parent == NULL:
                return run
            self.parent = parent
            self.parent_room = parent_header.len
        memcpy(self.parent, parent_header.ptr, parent_header.len)
        self.parent_size = parent_header.len
        self.named = run
        return run

    cdef Run find(self, fw_span parent_header, bint may_begin):
        cdef Parent parent
        cdef Run run
        scan_parent(parent_header, &parent)
        if not says(parent.msg_type, b"execute_request", 15) or parent_header.len > LARGEST_REQUEST:
            return None
        if parent.msg_id.ptr == NULL or not is_string(parent.msg_id):
            return None
        if self.last is not None and is_called(self.last, inside(parent.msg_id)):
            return self.last
        msg_id = unescaped(parent.msg_id)
        run = self.runs.get(msg_id)
        return self.new(msg_id, span_bytes(parent_header), False) if run is None and may_begin else run

    cdef int follow(self, Run run, const Indexed *m, long long number) except -1:
        cdef fw_span said
        if m.kind == STATUS:
            if same_bytes(m.text[3], USUAL_BUSY):
                self.begin(run, m)
            elif same_bytes(m.text[3], USUAL_IDLE):
                self.end(run, m, DONE_RUN)
            else:
                said = member_of(m.text[3], b"execution_state", 15)
                if says(said, b"busy", 4):
                    self.begin(run, m)
                elif says(said, b"idle", 4):
                    self.end(run, m, DONE_RUN)
        elif m.kind == REPLY:
            self.hear_reply(run, m)
        elif m.kind == ERROR:
            run.failed = True
        elif m.kind == INPUT_REQUEST:
            run.asks = number
        elif m.kind == OTHER and spells(inside(m.header.msg_type), b"execute_input", 13):
            run.counted = count_of(member_of(m.text[3], b"execution_count", 15))
            self.begin(run, m)
        run.messages += 1
        run.last = number
        if run.first < 0:
            run.first = number
        return 0

    cdef int hear_reply(self, Run run, const Indexed *m) except -1:
        cdef fw_span said
        if not spells(inside(m.header.msg_type), b"execute_reply", 13):
            return 0
        said = member_of(m.text[3], b"status", 6)
        run.replied = True
        run.failed = run.failed or says(said, b"error", 5)
        if run.counted == UNKNOWN:
            run.counted = count_of(member_of(m.text[3], b"execution_count", 15))
        if says(said, b"aborted", 7) or says(said, b"abort", 5):
            self.end(run, m, ABORTED_RUN)
        return 0

    cdef int begin(self, Run run, const Indexed *m) except -1:
        if run.state == QUEUED_RUN or run.state == LOST_RUN:
            self.become(run, RUNNING_RUN)
            self.last = run
            note_date(&run.began_at, m)
            if self.running is not None and self.running.state == RUNNING_RUN and self.running.replied:
                self.become(self.running, DONE_RUN)  # its idle was lost
            self.running = run
        return 0

    cdef int end(self, Run run, const Indexed *m, str state) except -1:
        run.asks = -1
        note_date(&run.ended_at, m)
        if run.state != ABORTED_RUN:
            self.become(run, state)
        return 0

    cpdef lose_all(self):
        cdef Run run
        self.asked_anew = self.asked_end
        for run in self.runs.values():
            run.asks = -1
            if not run.is_over:
                self.become(run, LOST_RUN)

    def begin_anew(self):
        cdef Uplink uplink
        self.lose_all()
        for uplink in self.uplinks:
            uplink.ask_still()

    cdef int mark(self, fw_span header, str before, str state) except -1:
        """The run of a request that waits in an uplink, where that has been in the state ``before``."""
        cdef fw_span msg_id = member_of(header, b"msg_id", 6)
        cdef Run run
        if msg_id.ptr == NULL or not is_string(msg_id):
            return 0
        self.settle()
        run = self.runs.get(unescaped(msg_id))
        if run is not None and run.state is before:
            self.become(run, state)
        return 0


def limit_ledgers(size_t limit):
    global ledger_bytes_limit
    ledger_bytes_limit = limit


def _order_of(Run run not None):
    return run.order


def answers_to(Batch batch not None, str msg_id not None):
    cdef Py_ssize_t i
    cdef Parent parent
    cdef fw_span before
    cdef bint is_its = False
    cdef list found = []
    before.ptr = NULL
    before.len = 0
    for i in range(batch.count):
        if before.ptr == NULL or not same_bytes(before, batch.messages[i].text[1]):
            before = batch.messages[i].text[1]
            scan_parent(before, &parent)
            is_its = parent.msg_id.ptr != NULL and is_string(parent.msg_id) and unescaped(parent.msg_id) == msg_id
        if is_its:
            found.append(i)
    return found


def indices_of_types(Batch batch not None, list names not None):
    cdef Py_ssize_t i
    return [i for i in range(batch.count) if in_names(inside(batch.messages[i].header.msg_type), names)]

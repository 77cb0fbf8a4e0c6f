# The runs of a kernel: what became of each execute_request, at a cost of each request. What clients ask passes
# `Uplink`; the rest is learned from messages in the log, a segment at a time.

RUN_STATES = ("queued", "running", "done", "aborted", "lost")

cdef str QUEUED_RUN, RUNNING_RUN, DONE_RUN, ABORTED_RUN, LOST_RUN
QUEUED_RUN, RUNNING_RUN, DONE_RUN, ABORTED_RUN, LOST_RUN = RUN_STATES

cdef enum:
    LARGEST_REQUEST = 8192      # bytes of a header that is kept
    LARGEST_NAME = 512          # of a cell's id, a date


@cython.final
@cython.no_gc   # names and numbers
cdef class Run:
    cdef readonly str msg_id
    cdef readonly bytes header      # of the request, as its client sent it or its kernel repeated it
    cdef readonly str cell
    cdef readonly str state
    cdef readonly bint failed
    cdef readonly bint replied
    cdef readonly object execution_count
    cdef readonly Py_ssize_t messages
    cdef readonly long long first
    cdef readonly long long last
    cdef readonly long long asks
    cdef readonly str begun
    cdef readonly str ended
    cdef readonly uint64_t order

    def __init__(self):
        raise TypeError("runs are found in a Ledger")

    @property
    def is_over(self):
        return self.state not in (QUEUED_RUN, RUNNING_RUN)


cdef str name_in(fw_span text, const char *name, size_t length):
    """A string in a JSON object; None where there is none, or one that is longer than names are."""
    cdef fw_span value = member_of(text, name, length)
    if value.ptr == NULL or not is_string(value) or value.len > LARGEST_NAME:
        return None
    return unescaped(value)


cdef object count_in(fw_span text):
    cdef fw_span value = member_of(text, b"execution_count", 15)
    if value.ptr == NULL or value.len > 18 or not span_bytes(value).isdigit():
        return None
    return int(span_bytes(value))


@cython.final
cdef class Ledger:
    cdef dict runs              # by msg_id, those that were not heard of for longest first
    cdef Py_ssize_t most
    cdef uint64_t count
    cdef Run running            # that began last
    cdef readonly long long position

    def __init__(self, Py_ssize_t most=512):
        if most < 1:
            raise ValueError("most has to be at least 1")
        self.runs = {}
        self.most = most

    def __len__(self):
        return len(self.runs)

    def get(self, str msg_id not None):
        return self.runs.get(msg_id)

    def all(self):
        return sorted(self.runs.values(), key=_order_of)

    # -- what clients ask --

    cdef int ask(self, const fw_span *parts, const Header *header) except -1:
        """A message for shell, as it goes to the kernel."""
        cdef Run run
        if header.msg_type.ptr == NULL or not is_string(header.msg_type):
            return 0
        if not spells(inside(header.msg_type), b"execute_request", 15):
            return 0
        if header.msg_id.ptr == NULL or not is_string(header.msg_id) or parts[0].len > LARGEST_REQUEST:
            return 0
        run = self.new(unescaped(header.msg_id), span_bytes(parts[0]))
        run.cell = name_in(parts[2], b"cellId", 6)
        return 0

    cdef int answer(self) except -1:
        """An input_reply goes to the kernel."""
        cdef Run run
        for run in self.runs.values():
            run.asks = -1
        return 0

    cdef Run new(self, str msg_id, bytes header):
        """Of a request that comes again the last counts."""
        cdef Run run = Run.__new__(Run)
        self.runs.pop(msg_id, None)
        if len(self.runs) >= self.most:
            del self.runs[next(iter(self.runs))]
        self.count += 1
        run.msg_id = msg_id
        run.header = header
        run.state = QUEUED_RUN
        run.first = run.last = run.asks = -1
        run.order = self.count
        self.runs[msg_id] = run
        return run

    # -- what kernels say --

    cpdef int learn(self, list entries) except -1:
        """Those of the log, in order. What was learned is passed by, and what the server said itself."""
        cdef LogEntry entry
        cdef Batch batch
        cdef Py_ssize_t i
        cdef fw_span before
        cdef Run run = None
        cdef long long number
        before.ptr = NULL
        before.len = 0
        for entry in entries:
            if entry.ours or entry.end <= self.position:
                continue
            batch = entry.batch
            number = entry.first
            for i in range(batch.count):
                # The messages of one request have the same parent, byte for byte.
                if before.ptr == NULL or not same_bytes(before, batch.messages[i].text[1]):
                    before = batch.messages[i].text[1]
                    run = self.run_of(before)
                if number + i >= self.position:
                    if run is not None:
                        self.follow(run, &batch.messages[i], number + i)
                    self.position = number + i + 1  # memory may run out at the next
            self.position = max(self.position, entry.end)
        return 0

    cdef Run run_of(self, fw_span parent_header):
        cdef Parent parent
        cdef Run run
        scan_parent(parent_header, &parent)
        if parent.msg_type.ptr == NULL or not is_string(parent.msg_type) or parent_header.len > LARGEST_REQUEST:
            return None
        if not spells(inside(parent.msg_type), b"execute_request", 15):
            return None
        if parent.msg_id.ptr == NULL or not is_string(parent.msg_id):
            return None
        msg_id = unescaped(parent.msg_id)
        run = self.runs.get(msg_id)
        return self.new(msg_id, span_bytes(parent_header)) if run is None else run

    cdef int follow(self, Run run, const Indexed *m, long long number) except -1:
        if m.kind == STATUS:
            self.hear(run, m)
        elif m.kind == REPLY:
            self.hear_reply(run, m)
        elif m.kind == ERROR:
            run.failed = True
        elif m.kind == INPUT_REQUEST:
            run.asks = number
        elif m.kind == OTHER and spells(inside(m.header.msg_type), b"execute_input", 13):
            run.execution_count = count_in(m.text[3])
            self.begin(run, m)
        run.messages += 1
        run.last = number
        if run.first < 0:
            run.first = number
        return 0

    cdef int hear(self, Run run, const Indexed *m) except -1:
        said = name_in(m.text[3], b"execution_state", 15)
        if said == "busy":
            self.begin(run, m)
        elif said == "idle":
            self.end(run, m)
        return 0

    cdef int hear_reply(self, Run run, const Indexed *m) except -1:
        if not spells(inside(m.header.msg_type), b"execute_reply", 13):
            return 0
        said = name_in(m.text[3], b"status", 6)
        run.replied = True
        run.failed = run.failed or said == "error"
        if run.execution_count is None:
            run.execution_count = count_in(m.text[3])
        if said == "aborted" or said == "abort":
            run.state = ABORTED_RUN
            self.end(run, m)
        return 0

    cdef int begin(self, Run run, const Indexed *m) except -1:
        if run.state == QUEUED_RUN or run.state == LOST_RUN:
            run.state = RUNNING_RUN
            run.begun = name_in(m.text[0], b"date", 4)
            # It is the newest of those that are forgotten.
            self.runs[run.msg_id] = self.runs.pop(run.msg_id, run)
            if self.running is not None and self.running.state == RUNNING_RUN and self.running.replied:
                self.running.state = DONE_RUN  # its idle was lost
            self.running = run
        return 0

    cdef int end(self, Run run, const Indexed *m) except -1:
        run.asks = -1
        run.ended = name_in(m.text[0], b"date", 4)
        if run.state != ABORTED_RUN:
            run.state = DONE_RUN
        return 0

    def begin_anew(self):
        cdef Run run
        for run in self.runs.values():
            run.asks = -1
            if run.state == QUEUED_RUN or run.state == RUNNING_RUN:
                run.state = LOST_RUN


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

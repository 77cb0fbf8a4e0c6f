# What a kernel is doing, read from its iopub: the part of activity tracking that would be Python per message.

cdef bint in_names(fw_span name, list names) noexcept:
    """Whether the inside of a JSON string is one of some ASCII names."""
    cdef bytes known
    for known in names:
        if spells(name, PyBytes_AS_STRING(known), PyBytes_GET_SIZE(known)):
            return True
    return False


cdef fw_span member_of(fw_span text, const char *name, size_t length) noexcept nogil:
    """The last value of that name in a JSON object; a NULL ptr where there is none."""
    cdef Members members
    cdef Member m
    cdef fw_span found
    found.ptr = NULL
    found.len = 0
    if members_of(&members, text) == NOT_JSON:
        return found
    while next_member(&members, &m) == MEMBER:
        if spells(m.key, name, length):
            found = m.value
    return found


# -- whose words a status is --

cdef struct Parent:
    fw_span msg_type    # JSON values; a NULL ptr where there is none
    fw_span msg_id
    fw_span session


cdef void scan_parent(fw_span text, Parent *parent) noexcept nogil:
    cdef Members members
    cdef Member m
    memset(parent, 0, sizeof(Parent))
    if members_of(&members, text) == NOT_JSON:
        return
    while next_member(&members, &m) == MEMBER:
        if spells(m.key, b"msg_type", 8):
            parent.msg_type = m.value
        elif spells(m.key, b"msg_id", 6):
            parent.msg_id = m.value
        elif spells(m.key, b"session", 7):
            parent.session = m.value


# Requests that come on control: a kernel answers them while it is at work.
cdef list OF_CONTROL = [
    b"shutdown_request", b"interrupt_request", b"debug_request", b"usage_request",
    b"create_subshell_request", b"delete_subshell_request", b"list_subshell_request",
]

# Each is one object, to be compared by `is`: comparing texts is a call into a part of Python that no turn needs.
cdef str BUSY = "busy"
cdef str IDLE = "idle"
cdef str STARTING = "starting"


cdef str known_state(str name):
    for known in (BUSY, IDLE, STARTING):
        if name == known:
            return known
    return name


cdef enum:
    MOST_BUSY = 64          # requests; of more, which no kernel works on at a time, the oldest are forgotten
    LARGEST_STATUS = 8192   # bytes of a status that is kept
    USUAL_TYPE = 40         # bytes of a message type that is remembered


# A request that is worked on, and the status that said so.
cdef struct Busy:
    Busy *next
    uint64_t request
    size_t count        # of the status's parts, which lie behind this with their lengths; 0 when it was too large


cdef inline size_t *busy_lengths(Busy *busy) noexcept nogil:
    return <size_t *>(<char *>busy + sizeof(Busy))


cdef Busy *new_busy(uint64_t request, const fw_span *parts, size_t count) noexcept:
    """NULL without memory."""
    cdef Busy *busy = <Busy *>malloc(sizeof(Busy) + count * sizeof(size_t) + sum_of(parts, count))
    cdef char *p
    cdef size_t i
    if busy == NULL:
        return NULL
    busy.next = NULL
    busy.request = request
    busy.count = count
    p = <char *>(busy_lengths(busy) + count)
    for i in range(count):
        busy_lengths(busy)[i] = parts[i].len
        memcpy(p, parts[i].ptr, parts[i].len)
        p += parts[i].len
    return busy


cdef list busy_parts(Busy *busy):
    cdef list parts = []
    cdef const char *p = <const char *>(busy_lengths(busy) + busy.count)
    cdef size_t i
    for i in range(busy.count):
        parts.append(p[: busy_lengths(busy)[i]])
        p += busy_lengths(busy)[i]
    return parts


@cython.final
cdef class Activity:
    cdef list untracked
    cdef readonly str state
    cdef readonly uint64_t shown    # messages of output
    cdef Busy *busy         # the oldest first
    cdef size_t busy_count
    # The last parent's message type, which nearly always is the next one's, and what it means.
    cdef char type_text[USUAL_TYPE]
    cdef size_t type_size
    cdef bint type_is_tracked
    cdef bint type_is_of_control

    def __cinit__(self, *args, **options):
        self.type_is_tracked = True     # of none at all

    def __dealloc__(self):
        self.end_all()

    def __init__(self, untracked_message_types, str state not None=STARTING):
        self.untracked = [name.encode() for name in untracked_message_types]
        self.state = known_state(state)

    cdef bint is_tracked(self, fw_span msg_type) noexcept:
        """A message type that is missing is tracked, as in jupyter_server."""
        return msg_type.ptr == NULL or not is_string(msg_type) or not in_names(inside(msg_type), self.untracked)

    cdef void learn_type(self, fw_span msg_type) noexcept:
        if same_bytes(msg_type, fixed(self.type_text, self.type_size)):
            return
        self.type_is_tracked = self.is_tracked(msg_type)
        self.type_is_of_control = is_of_control(msg_type)
        self.type_size = <size_t>-1
        if 0 < msg_type.len <= USUAL_TYPE:
            memcpy(self.type_text, msg_type.ptr, msg_type.len)
            self.type_size = msg_type.len

    def observe(self, Batch batch not None):
        cdef bint said = False
        cdef bint active = self.look(batch, &said)
        return active, self.state if said else None

    cdef bint look(self, Batch batch, bint *said) except -1:
        """Whether it is activity; and whether it said something about the state."""
        cdef Py_ssize_t i
        cdef Indexed *m
        cdef Parent parent
        cdef fw_span before
        cdef bint active = False
        for i in range(batch.count):
            m = &batch.messages[i]
            # The messages of one request have the same parent, byte for byte.
            if i == 0 or not same_bytes(before, m.text[1]):
                before = m.text[1]
                scan_parent(before, &parent)
                self.learn_type(parent.msg_type)
            if not active:
                active = self.type_is_tracked or self.state is BUSY or self.is_tracked(m.header.msg_type)
            self.shown += m.kind == STREAM or m.kind == DISPLAY or m.kind == ERROR
            if m.kind == STATUS and self.follow(m, &parent):
                said[0] = True
        return active

    cdef bint follow(self, const Indexed *m, const Parent *parent) except -1:
        """Whether a status says something about the state; its parent's type is the one that was learned last."""
        cdef fw_span said = member_of(m.text[3], b"execution_state", 15)
        if said.ptr == NULL or not is_string(said):
            return False
        if self.type_is_tracked and not self.type_is_of_control:
            self.hear(m, parent, state_name(said))
            return True
        if self.state is STARTING and not spells(inside(said), b"starting", 8):
            self.state = IDLE
            return True
        return False

    cdef int hear(self, const Indexed *m, const Parent *parent, str said) except -1:
        """The kernel is busy until all requests that it said to be busy with have ended. An idle that names none ends
        them all."""
        cdef uint64_t request = 0
        cdef bint is_named = names_request(parent, &request)
        if said is BUSY:
            if is_named and self.place_of(request)[0] == NULL:
                self.begin(m, request)
        elif said is STARTING or not is_named:
            self.end_all()
        elif said is IDLE:
            self.end_one(self.place_of(request))
        self.state = BUSY if said is IDLE and self.busy != NULL else said
        return 0

    cdef Busy **place_of(self, uint64_t request) noexcept:
        """Where a request that is worked on stands; behind the last for another."""
        cdef Busy **place = &self.busy
        while place[0] != NULL and place[0].request != request:
            place = &place[0].next
        return place

    cdef int begin(self, const Indexed *m, uint64_t request) except -1:
        cdef Busy *busy
        # jupyter_client would have to adapt what is foreign.
        cdef bint fits = not m.foreign and sum_of(m.parts, m.count) <= LARGEST_STATUS
        busy = new_busy(request, m.parts, m.count if fits else 0)
        if busy == NULL:
            raise MemoryError
        if self.busy_count == MOST_BUSY:
            self.end_one(&self.busy)
        self.place_of(request)[0] = busy
        self.busy_count += 1
        return 0

    cdef void end_one(self, Busy **place) noexcept:
        cdef Busy *busy = place[0]
        if busy != NULL:
            place[0] = busy.next
            self.busy_count -= 1
            free(busy)

    cdef void end_all(self) noexcept:
        while self.busy != NULL:
            self.end_one(&self.busy)

    def answered(self, Batch batch not None):
        self.note_answers(batch)

    cdef int note_answers(self, Batch batch) except -1:
        cdef Py_ssize_t i
        cdef Parent parent
        cdef uint64_t request = 0
        if self.busy == NULL:
            return 0
        for i in range(batch.count):
            if batch.messages[i].kind == REPLY:
                scan_parent(batch.messages[i].text[1], &parent)
                if names_request(&parent, &request):
                    self.end_one(self.place_of(request))
        return 0

    @property
    def status(self):
        cdef Busy *busy = self.busy
        if self.state is BUSY:
            while busy != NULL and busy.count == 0:
                busy = busy.next
            if busy != NULL:
                return busy_parts(busy)
        return None

    def forget(self):
        self.end_all()

    def begin_anew(self):
        self.forget()
        if self.state is BUSY:
            self.state = STARTING


cdef bint is_of_control(fw_span msg_type) noexcept:
    return msg_type.ptr != NULL and is_string(msg_type) and in_names(inside(msg_type), OF_CONTROL)


cdef bint names_request(const Parent *parent, uint64_t *request) noexcept nogil:
    """What tells a request from others: its id, of the client that chose it. False for a parent that is no request. As
    a hash, which nobody can foresee: the id may be long."""
    if parent.msg_id.ptr == NULL or not is_string(parent.msg_id):
        return False
    request[0] = secret_hash(parent.session, secret_hash(parent.msg_id, parent.session.ptr != NULL))
    return True


cdef uint64_t secret_hash(fw_span text, uint64_t state) noexcept nogil:
    cdef const char *p = <const char *>text.ptr
    cdef size_t left = text.len
    cdef uint64_t word
    state = (state ^ left) * slot_multiplier
    while left:
        word = 0
        memcpy(&word, p, min(left, <size_t>8))
        state = (state ^ word) * slot_multiplier
        state ^= state >> 32
        p += min(left, <size_t>8)
        left -= min(left, <size_t>8)
    return state


cdef str state_name(fw_span said):
    if spells(inside(said), b"busy", 4):
        return BUSY
    if spells(inside(said), b"idle", 4):
        return IDLE
    return known_state(unescaped(said))

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

cdef enum:
    MOST_BUSY = 64          # requests; of more, which no kernel works on at a time, the oldest are forgotten
    LARGEST_STATUS = 8192   # bytes of a status that is kept


@cython.final
cdef class Activity:
    cdef list untracked
    cdef readonly str state
    cdef readonly uint64_t shown    # messages of output
    cdef dict busy          # of each request that is worked on: the status that said so, or None if that was too large

    def __init__(self, untracked_message_types, str state not None="starting"):
        self.untracked = [name.encode() for name in untracked_message_types]
        self.state = state
        self.busy = {}

    cdef bint is_tracked(self, fw_span msg_type) noexcept:
        """A message type that is missing is tracked, as in jupyter_server."""
        return msg_type.ptr == NULL or not is_string(msg_type) or not in_names(inside(msg_type), self.untracked)

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
        cdef bint active = False, tracked = False
        for i in range(batch.count):
            m = &batch.messages[i]
            # The messages of one request have the same parent, byte for byte.
            if i == 0 or not same_bytes(before, m.text[1]):
                before = m.text[1]
                scan_parent(before, &parent)
                tracked = self.is_tracked(parent.msg_type)
            if not active:
                active = tracked or self.state == "busy" or self.is_tracked(m.header.msg_type)
            self.shown += m.kind == STREAM or m.kind == DISPLAY or m.kind == ERROR
            if m.kind == STATUS and self.follow(m, &parent, tracked):
                said[0] = True
        return active

    cdef bint follow(self, const Indexed *m, const Parent *parent, bint tracked) except -1:
        """Whether a status says something about the state."""
        cdef fw_span said = member_of(m.text[3], b"execution_state", 15)
        if said.ptr == NULL or not is_string(said):
            return False
        if tracked and not is_of_control(parent.msg_type):
            self.hear(m, parent, state_name(said))
            return True
        if self.state == "starting" and not spells(inside(said), b"starting", 8):
            self.state = "idle"
            return True
        return False

    cdef int hear(self, const Indexed *m, const Parent *parent, str said) except -1:
        """The kernel is busy until all requests that it said to be busy with have ended. An idle that names none ends
        them all."""
        key = key_of(parent)
        if said == "busy":
            if key is not None and key not in self.busy:
                self.begin(m, key)
        elif said == "starting" or key is None:
            self.busy.clear()
        elif said == "idle":
            self.busy.pop(key, None)
        self.state = "busy" if said == "idle" and self.busy else said
        return 0

    cdef int begin(self, const Indexed *m, object key) except -1:
        if len(self.busy) == MOST_BUSY:
            del self.busy[next(iter(self.busy))]
        self.busy[key] = None
        # jupyter_client would have to adapt what is foreign.
        if not m.foreign and sum_of(m.parts, m.count) <= LARGEST_STATUS:
            self.busy[key] = [span_bytes(m.parts[i]) for i in range(m.count)]
        return 0

    def answered(self, Batch batch not None):
        self.note_answers(batch)

    cdef int note_answers(self, Batch batch) except -1:
        cdef Py_ssize_t i
        cdef Parent parent
        if not self.busy:
            return 0
        for i in range(batch.count):
            if batch.messages[i].kind == REPLY:
                scan_parent(batch.messages[i].text[1], &parent)
                self.busy.pop(key_of(&parent), None)
        return 0

    @property
    def status(self):
        if self.state == "busy":
            for parts in self.busy.values():
                if parts is not None:
                    return list(parts)
        return None

    def forget(self):
        self.busy.clear()

    def begin_anew(self):
        self.forget()
        if self.state == "busy":
            self.state = "starting"


cdef bint is_of_control(fw_span msg_type) noexcept:
    return msg_type.ptr != NULL and is_string(msg_type) and in_names(inside(msg_type), OF_CONTROL)


cdef object key_of(const Parent *parent):
    """What tells a request from others: its id, of the client that chose it. None for a parent that is no request. As
    a hash, which no kernel can foresee: the id may be long."""
    if parent.msg_id.ptr == NULL or not is_string(parent.msg_id):
        return None
    return hash((span_bytes(parent.msg_id), span_bytes(parent.session) if parent.session.ptr != NULL else None))


cdef str state_name(fw_span said):
    if spells(inside(said), b"busy", 4):
        return "busy"
    if spells(inside(said), b"idle", 4):
        return "idle"
    return unescaped(said)

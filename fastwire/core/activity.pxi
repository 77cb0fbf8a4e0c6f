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


@cython.final
cdef class Activity:
    cdef list untracked

    def __init__(self, untracked_message_types):
        self.untracked = [name.encode() for name in untracked_message_types]

    cdef bint is_tracked(self, fw_span msg_type) noexcept:
        """A message type that is missing is tracked, as in jupyter_server."""
        return msg_type.ptr == NULL or not is_string(msg_type) or not in_names(inside(msg_type), self.untracked)

    def observe(self, Batch batch not None, str state):
        cdef Py_ssize_t i
        cdef Indexed *m
        cdef fw_span parent, said
        cdef bint active = False, parent_tracked = False
        parent.ptr = NULL
        parent.len = 0
        for i in range(batch.count):
            m = &batch.messages[i]
            # The messages of one request have the same parent, byte for byte.
            if i == 0 or m.parts[1].len != parent.len or memcmp(m.parts[1].ptr, parent.ptr, parent.len):
                parent = m.parts[1]
                parent_tracked = self.is_tracked(member_of(parent, b"msg_type", 8))
            if not active:
                active = parent_tracked or state == "busy" or self.is_tracked(m.header.msg_type)
            if m.kind == STATUS:
                said = member_of(m.parts[3], b"execution_state", 15)
                if said.ptr == NULL or not is_string(said):
                    continue
                if parent_tracked:
                    state = state_name(said)
                elif state == "starting" and not spells(inside(said), b"starting", 8):
                    state = "idle"
        return active, state


cdef str state_name(fw_span said):
    if spells(inside(said), b"busy", 4):
        return "busy"
    if spells(inside(said), b"idle", 4):
        return "idle"
    return unescaped(said)

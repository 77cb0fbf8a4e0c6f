# What waits for a client that is behind: batches made small, and read back from where they were put aside.

cdef enum:
    JOINED_TEXT = 1048576       # at most so many bytes of text in streams that were joined


cdef struct StreamText:
    fw_span name        # with its quotes
    fw_span text        # without


cdef bint stream_text(const Indexed *m, StreamText *found) noexcept nogil:
    """Whether a message is a stream like any other: four parts of UTF-8, no metadata, name and text all it says."""
    cdef Members members
    cdef Member member
    cdef int state
    found.name.ptr = NULL
    found.text.ptr = NULL
    if m.kind != STREAM or m.count != 4 or m.text != m.parts or not is_empty_object(m.parts[2]):
        return False
    if members_of(&members, m.parts[3]) == NOT_JSON:
        return False
    while True:
        state = next_member(&members, &member)
        if state != MEMBER:
            return state == NO_MORE and found.name.ptr != NULL and found.text.ptr != NULL
        if not is_string(member.value):
            return False
        if found.name.ptr == NULL and spells(member.key, b"name", 4):
            found.name = member.value
        elif found.text.ptr == NULL and spells(member.key, b"text", 4):
            found.text = inside(member.value)
        else:
            return False


cdef bint is_empty_object(fw_span text) noexcept nogil:
    cdef Members members
    cdef Member member
    return members_of(&members, text) != NOT_JSON and next_member(&members, &member) == NO_MORE


cdef bint same_bytes(fw_span a, fw_span b) noexcept nogil:
    return a.len == b.len and (a.len == 0 or memcmp(a.ptr, b.ptr, a.len) == 0)


cdef bint ends_in_half(fw_span text) noexcept nogil:
    """The text may end with the escape of a surrogate's first half, which must not meet a second one."""
    cdef const uint8_t *p = <const uint8_t *>text.ptr + text.len
    cdef int digit
    if text.len < 6 or p[-6] != 92 or p[-5] != 117 or (p[-4] | 0x20) != 100:
        return False
    digit = hex_digit(p[-3])
    return digit >= 8 and digit < 12


cdef bint follows(const Indexed *first, const StreamText *stream, const fw_span *before, size_t joined,
                  const Indexed *m, const StreamText *next) noexcept nogil:
    """Whether the text of ``m`` can be joined to that of ``first``, ``joined`` bytes so far, ``before`` its last."""
    return (
        joined + next.text.len <= JOINED_TEXT
        and not ends_in_half(before[0])
        and same_bytes(stream.name, next.name)
        and same_bytes(first.parts[1], m.parts[1])
    )


cdef int copy_message(Batch batch, const Indexed *m, fw_span *content) except -1:
    """A message of another batch joins this one, all its bytes copied; with ``content`` in the place of its own."""
    cdef Indexed *message = batch.new_message()
    cdef size_t size
    cdef char *p
    cdef uint32_t i
    message.count = m.count
    message.parts = <fw_span *>batch.store.get(m.count * sizeof(fw_span))
    size = sum_of(m.parts, m.count)
    if content != NULL:
        size -= m.parts[3].len
    p = <char *>batch.store.get(size)
    for i in range(m.count):
        if i == 3 and content != NULL:
            message.parts[i] = content[0]
            continue
        memcpy(p, m.parts[i].ptr, m.parts[i].len)
        message.parts[i] = fixed(p, m.parts[i].len)
        p += m.parts[i].len
    scan_header(message.parts[0], &message.header)
    return batch.index(message)


cdef int add_joined(Batch batch, const Indexed *first, const StreamText *stream, const Spans *texts,
                    size_t length) except -1:
    cdef size_t size = 22 + stream.name.len + length
    cdef char *start = <char *>batch.store.get(size)
    cdef char *p = start
    cdef fw_span content
    cdef size_t i
    memcpy(p, b'{"name": ', 9)
    memcpy(p + 9, stream.name.ptr, stream.name.len)
    p += 9 + stream.name.len
    memcpy(p, b', "text": "', 11)
    p += 11
    for i in range(texts.count):
        memcpy(p, texts.items[i].ptr, texts.items[i].len)
        p += texts.items[i].len
    memcpy(p, b'"}', 2)
    content = fixed(start, p + 2 - start)
    return copy_message(batch, first, &content)


@cython.final
cdef class Walk:
    """The messages of some batches, one after the other."""

    cdef list batches
    cdef Py_ssize_t batch
    cdef Py_ssize_t index

    cdef Indexed *next(self) noexcept:
        """NULL behind the last."""
        cdef Batch batch
        while self.batch < len(self.batches):
            batch = <Batch>self.batches[self.batch]
            if self.index < batch.count:
                self.index += 1
                return &batch.messages[self.index - 1]
            self.batch += 1
            self.index = 0
        return NULL


def compacted(batches, size_t size, *, bint join=True, bint output=True):
    cdef Walk walk = Walk.__new__(Walk)
    cdef Batch batch
    cdef Batch result
    cdef Indexed *m
    cdef Indexed *first
    cdef StreamText stream, next
    cdef Spans texts
    cdef size_t length
    walk.batches = list(batches)
    channels = {batch.channel for batch in walk.batches}
    if len(channels) != 1:
        raise ValueError("batches that are made one have one channel")
    result = new_batch(channels.pop())
    # Many groups are small: a reply, a status. They are to take no more than they need.
    result.store.arena.expected = min(memory_of(walk.batches, output), <size_t>FIRST_CHUNK * 4)
    result.received = (<Batch>walk.batches[0]).received
    results = [result]
    join = join and result.channel_number == IOPUB
    memset(&texts, 0, sizeof(texts))
    try:
        m = walk.next()
        while m != NULL:
            first = m
            m = walk.next()
            if not output and (first.kind == STREAM or first.kind == DISPLAY):
                continue
            if result.nbytes >= size:
                result = new_batch(result.channel)
                results.append(result)
            if not join or not stream_text(first, &stream):
                copy_message(result, first, NULL)
                continue
            texts.count = 0
            add_text(&texts, stream.text)
            length = stream.text.len
            while m != NULL and stream_text(m, &next) and follows(
                first, &stream, &texts.items[texts.count - 1], length, m, &next
            ):
                add_text(&texts, next.text)
                length += next.text.len
                m = walk.next()
            if texts.count == 1:
                copy_message(result, first, NULL)
            else:
                add_joined(result, first, &stream, &texts, length)
    finally:
        free(texts.items)
    return [batch for batch in results if batch.count]


cdef size_t memory_of(list batches, bint output):
    """What the messages take when they are copied."""
    cdef Batch batch
    cdef Indexed *m
    cdef Py_ssize_t i
    cdef size_t size = 0
    for batch in batches:
        for i in range(batch.count):
            m = &batch.messages[i]
            if output or (m.kind != STREAM and m.kind != DISPLAY):
                size += m.count * sizeof(fw_span) + sum_of(m.parts, m.count) + 32
    return size


cdef int add_text(Spans *texts, fw_span text) except -1:
    if spans_add(texts, text.ptr, text.len):
        raise MemoryError
    return 0


def batch_of_frames(str channel, bytes data not None):
    cdef Batch batch = new_batch(channel)
    cdef Indexed *message
    cdef Spans parts
    cdef fw_span rest = fixed(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    cdef fw_span payload, name
    cdef const char *problem
    batch.store.keep(data)
    memset(&parts, 0, sizeof(parts))
    try:
        while rest.len:
            parts.count = 0
            if not next_frame(&rest, &payload):
                raise unreadable()
            problem = v1_split(payload, payload.len, &name, &parts)
            if problem != NULL:
                raise MemoryError if problem == NO_MEMORY else unreadable()
            message = batch.new_message()
            message.count = <uint32_t>parts.count
            message.parts = <fw_span *>batch.store.get(parts.count * sizeof(fw_span))
            memcpy(message.parts, parts.items, parts.count * sizeof(fw_span))
            if any_blank(message.parts) or scan_header(message.parts[0], &message.header) == NOT_JSON:
                raise unreadable()
            if not names_message(&message.header):
                raise unreadable()
            batch.index(message)
    finally:
        free(parts.items)
    return batch


cdef object unreadable():
    return MalformedMessage("what was put aside cannot be read back")


cdef bint next_frame(fw_span *rest, fw_span *payload) noexcept nogil:
    """Takes an unmasked binary frame from the front of ``rest``."""
    cdef const uint8_t *p = <const uint8_t *>rest.ptr
    cdef size_t header = 2
    cdef uint64_t length
    if rest.len < 2 or p[0] != (FIN_BIT | BINARY) or p[1] > 127:
        return False
    length = p[1]
    if length == 126:
        header = 4
        if rest.len < 4:
            return False
        length = (<uint64_t>p[2] << 8) | p[3]
    elif length == 127:
        header = 10
        if rest.len < 10:
            return False
        length = (<uint64_t>load_be32(p + 2) << 32) | load_be32(p + 6)
    if length > rest.len - header:
        return False
    payload[0] = fixed(<const char *>p + header, length)
    rest[0] = fixed(<const char *>p + header + length, rest.len - header - length)
    return True

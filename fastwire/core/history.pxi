# What everybody has and somebody may ask for: the messages of runs, copied out of the batches they came in, so that
# those go round as if nothing were kept. They lie in blocks, one behind the other, each a segment of the log before
# those that are needed; the oldest block goes first.
#
# In a block lie records: a head, the lengths of the message's parts, the parts. A parent header that is the one before
# it is left out, and a line of output is joined to the line before it. What cannot be asked for is not kept: a message
# that answers no execute_request and changes no display.

cdef enum:
    KEPT_BLOCK = 65536          # bytes of a block, at most, unless a message is larger
    KEPT_BLOCKS = 8             # of what may be kept are blocks at least
    LARGEST_KEPT = 4194304      # bytes of a segment that is copied; a larger one stays as it is
    NOBODYS = -1                # audience: all

cdef enum:                      # of a record
    IS_OURS = 1
    IS_MOMENTARY = 2
    HAS_PARENT_BEFORE = 4       # its parent header is that of the record before it
    IS_JOINED = 8               # it stands for several messages

LARGEST_TO_KEEP = LARGEST_KEPT


cdef struct KeptHead:
    size_t size                 # with this head
    long long first             # the numbers that it stands for
    long long end
    long long audience
    uint32_t count              # of parts
    uint8_t channel
    uint8_t flags


cdef inline uint32_t *lengths_of(KeptHead *head) noexcept nogil:
    return <uint32_t *>(head + 1)


cdef inline char *bytes_of(KeptHead *head) noexcept nogil:
    return <char *>(head + 1) + head.count * sizeof(uint32_t)


@cython.final
cdef class Kept(LogSegment):
    """A block."""

    cdef char *data
    cdef size_t room            # bytes there are
    cdef size_t used
    cdef size_t most            # that may be used
    cdef KeptHead *last
    cdef fw_span parent         # of the last record
    cdef size_t name_at, name_size      # in the last, where that is output to which more can be joined

    def __dealloc__(self):
        self.let_go()

    cdef void let_go(self) noexcept:
        if self.data != NULL:
            block_put(self.data, self.room)
        self.data = NULL
        self.last = NULL
        self.room = self.used = self.most = self.name_size = 0

    cdef bint make_room(self, size_t size) except -1:
        """For so many bytes more. False: there is to be another block."""
        cdef size_t room = max(self.room * 2, aligned(self.used + size))
        cdef char *data
        if self.used + size > self.most:
            return False
        if self.used + size <= self.room:
            return True
        data = <char *>block_get(&room)
        if data == NULL:
            raise MemoryError
        if self.data != NULL:
            memcpy(data, self.data, self.used)
            self.last = <KeptHead *>(data + (<char *>self.last - self.data))
            self.parent.ptr = data + (<const char *>self.parent.ptr - self.data)
            block_put(self.data, self.room)
        self.data = data
        self.room = room
        return True

    cdef bint repeats(self, const Indexed *m) noexcept:
        """Whether a message's parent header is the one before it."""
        return self.last != NULL and same_bytes(self.parent, m.parts[1])

    cdef void add(self, const Indexed *m, LogEntry entry, long long number, long long end, size_t size,
                  bint repeats) noexcept:
        """Behind `make_room`."""
        cdef KeptHead *head = <KeptHead *>(self.data + self.used)
        cdef StreamText stream
        cdef fw_span run            # parts that lie one behind the other
        cdef uint32_t i
        cdef char *p
        head.size = size
        head.first = number
        head.end = end
        head.audience = NOBODYS if entry.audience is None else <long long>entry.audience
        head.count = m.count
        head.channel = <uint8_t>entry.batch.channel_number
        head.flags = entry.ours * IS_OURS | entry.momentary * IS_MOMENTARY
        if end - number > 1:
            head.flags |= IS_JOINED
        p = bytes_of(head)
        run = m.parts[0]
        for i in range(m.count):
            lengths_of(head)[i] = <uint32_t>m.parts[i].len
            if i == 0:
                continue
            if i == 1 and repeats:
                head.flags |= HAS_PARENT_BEFORE
            elif m.parts[i].ptr == <const char *>run.ptr + run.len:
                run.len += m.parts[i].len
            else:
                memcpy(p, run.ptr, run.len)
                p += run.len
                run = m.parts[i]
        memcpy(p, run.ptr, run.len)
        p += run.len
        if not repeats:
            self.parent = fixed(bytes_of(head) + m.parts[0].len, m.parts[1].len)
        self.last = head
        self.used += size
        self.name_size = 0
        if m.kind == STREAM and head.audience == NOBODYS and not head.flags & (IS_OURS | IS_MOMENTARY):
            if stream_text(m, &stream) and is_end_of(stream.text, m.parts[3]):
                # Joined text goes where this one ends.
                self.name_size = stream.name.len
                self.name_at = p - self.data - m.parts[3].len + (
                    <const char *>stream.name.ptr - <const char *>m.parts[3].ptr)

    cdef bint joins(self, const Indexed *m, LogEntry entry, StreamText *stream) noexcept:
        """Whether a message is more of the output that came last."""
        cdef KeptHead *head = self.last
        cdef char *end
        if not self.name_size or m.kind != STREAM or entry.audience is not None or entry.ours or entry.momentary:
            return False
        if not same_bytes(self.parent, m.parts[1]) or not stream_text(m, stream):
            return False
        if not same_bytes(stream.name, fixed(self.data + self.name_at, self.name_size)):
            return False
        end = self.end_of_last()
        return not ends_in_half(fixed(self.data + self.name_at, end - 2 - (self.data + self.name_at)))

    cdef char *end_of_last(self) noexcept:
        cdef KeptHead *head = self.last
        cdef char *p = bytes_of(head)
        cdef uint32_t i
        for i in range(head.count):
            if i != 1 or not head.flags & HAS_PARENT_BEFORE:
                p += lengths_of(head)[i]
        return p

    cdef size_t join(self, fw_span text, long long end) noexcept:
        """Behind `make_room`. Returns how many bytes it took."""
        cdef KeptHead *head = self.last
        cdef char *p = self.end_of_last() - 2
        cdef size_t before = head.size
        memcpy(p, text.ptr, text.len)
        memcpy(p + text.len, b'"}', 2)
        lengths_of(head)[3] += <uint32_t>text.len
        head.size = aligned(p + text.len + 2 - <char *>head)
        head.end = end
        head.flags |= IS_JOINED
        self.used += head.size - before
        return head.size - before

    def read(self, long long position):
        cdef list entries = []
        cdef LogEntry entry = None
        cdef KeptHead *before = NULL
        cdef KeptHead *head
        cdef fw_span parent
        cdef size_t at = 0
        cdef Indexed *message
        parent.ptr = NULL
        while at < self.used:
            head = <KeptHead *>(self.data + at)
            at += head.size
            if not head.flags & HAS_PARENT_BEFORE:
                parent = fixed(bytes_of(head) + lengths_of(head)[0], lengths_of(head)[1])
            if head.end <= position:
                continue
            if before == NULL or not belongs(before, head):
                entry = LogEntry.__new__(LogEntry)
                entry.first = head.first
                entry.batch = new_batch(CHANNELS[head.channel])
                entry.audience = None if head.audience == NOBODYS else head.audience
                entry.ours = head.flags & IS_OURS != 0
                entry.momentary = head.flags & IS_MOMENTARY != 0
                entries.append(entry)
            message = entry.batch.new_message()
            fill(entry.batch, message, head, parent)
            entry.end = head.end
            before = head
        for entry in entries:
            entry.memory = entry.batch.memory_size() + ENTRY_SIZE
        return entries


cdef inline bint is_to_keep(Ledger ledger, LogEntry entry, const Indexed *m, long long number) except -1:
    """Whether it may be asked for. May be asked again: the ledger hears each number once."""
    return entry.ours or ledger.hear(m, number) is not None or changes_display(m)


cdef inline size_t size_to_keep(const Indexed *m, bint repeats) noexcept nogil:
    """Of a message's record."""
    cdef size_t size = sizeof(KeptHead) + m.count * sizeof(uint32_t) + sum_of(m.parts, m.count)
    return aligned(size - m.parts[1].len if repeats else size)


cdef inline bint is_end_of(fw_span text, fw_span content) noexcept nogil:
    """Whether a JSON string's inside is followed by nothing but the end of the object that it is in."""
    cdef const char *end = <const char *>text.ptr + text.len
    return end + 2 == <const char *>content.ptr + content.len and end[1] == 125


cdef inline bint belongs(KeptHead *before, KeptHead *head) noexcept nogil:
    """Whether two messages may be of one entry, where each number has its message."""
    return (
        not before.flags & IS_JOINED and before.end == head.first
        and before.audience == head.audience and before.channel == head.channel
        and not (before.flags ^ head.flags) & (IS_OURS | IS_MOMENTARY)
    )


cdef int fill(Batch batch, Indexed *message, KeptHead *head, fw_span parent) except -1:
    """A record becomes the next message of a batch, all its bytes copied."""
    cdef size_t size = bytes_of(head) - <char *>head
    cdef const char *p = bytes_of(head)
    cdef char *copy
    cdef uint32_t i
    message.count = head.count
    message.parts = <fw_span *>batch.store.get(head.count * sizeof(fw_span))
    copy = <char *>batch.store.get(head.size - size + parent.len)
    for i in range(head.count):
        size = lengths_of(head)[i]
        message.parts[i] = fixed(copy, size)
        if i == 1:
            memcpy(copy, parent.ptr, size)
        else:
            memcpy(copy, p, size)
        if i != 1 or not head.flags & HAS_PARENT_BEFORE:
            p += size
        copy += size
    scan_header(message.parts[0], &message.header)
    return batch.index(message)


cdef bint is_cut(list cuts, Kept tail, long long number) except -1:
    """Whether somebody may read on between the last record and what has this number."""
    cdef long long begin, end
    if cuts is not None:
        for begin, end in cuts:
            if tail.last.first < end and begin <= number:
                return True
    return False


cdef bint changes_display(const Indexed *m) noexcept nogil:
    """It may be asked for beside the run that it is of."""
    return m.kind == DISPLAY and spells(inside(m.header.msg_type), b"update_display_data", 19)

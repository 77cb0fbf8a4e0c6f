# What everybody has and somebody may ask for: the messages of runs, copied out of the batches they came in, so that
# those go round as if nothing were kept. They lie in blocks, one behind the other, each a segment of the log before
# those that are needed; the oldest block goes first.
#
# In a block lie records: a head, the lengths of the message's parts, the parts. A header lies there as what differs
# from one before it (core/difference.h), which halves what a short message takes. A parent header that is the one
# before it is left out, and a line of output is joined to the line before it. What cannot be asked for is not kept: a
# message that answers no execute_request and changes no display.

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
    HEADER_IS_DIFFERENCE = 16
    PARENT_IS_DIFFERENCE = 32

LARGEST_TO_KEEP = LARGEST_KEPT


cdef struct KeptHead:
    size_t size                 # with this head
    long long first             # the numbers that it stands for
    long long end
    long long audience
    uint32_t count              # of parts
    uint8_t channel
    uint8_t flags


# A header, or a parent header, in a block.
cdef struct KeptText:
    size_t at           # where it lies; 0 for none
    size_t size         # of the text
    size_t other        # where the whole one lies that it is told by; 0: it is one itself


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
    cdef size_t usual           # bytes that may be used,
    cdef size_t most            # and while there is what is to be in one block
    cdef KeptHead *last
    cdef size_t end_of_last     # of its parts
    cdef KeptText parent        # of the last
    cdef KeptText whole_header  # the last that lie there as they are
    cdef KeptText whole_parent
    cdef size_t name_at, name_size      # in the last, where that is output to which more can be joined

    def __dealloc__(self):
        self.let_go()

    cdef void let_go(self) noexcept:
        if self.data != NULL:
            block_put(self.data, self.room)
        self.data = NULL
        self.last = NULL
        self.room = self.used = self.usual = self.most = self.name_size = 0
        self.parent.at = self.whole_header.at = self.whole_parent.at = 0

    cdef inline bint may_use(self, size_t size) noexcept:
        """So many bytes more."""
        return self.used + size <= self.most

    cdef inline void allow(self, size_t size) noexcept:
        """So many more, for what is to be in one block."""
        self.most = max(self.most, self.used + size)

    cdef inline void allow_usual(self) noexcept:
        """All of that is there."""
        self.most = max(self.usual, self.used)

    cdef bint make_room(self, size_t size) except -1:
        """For so many bytes more. False: there is to be another block."""
        cdef size_t room = max(self.room * 2, aligned(self.used + size))
        cdef char *data
        if not self.may_use(size):
            return False
        if self.used + size <= self.room:
            return True
        data = <char *>block_get(&room)
        if data == NULL:
            raise MemoryError
        if self.data != NULL:
            memcpy(data, self.data, self.used)
            self.last = <KeptHead *>(data + (<char *>self.last - self.data))
            block_put(self.data, self.room)
        self.data = data
        self.room = room
        return True

    cdef bint repeats(self, const Indexed *m) noexcept:
        """Whether a message's parent header is the one before it."""
        return self.is_text(&self.parent, m.parts[1])

    cdef bint is_text(self, const KeptText *kept, fw_span text) noexcept:
        if kept.at == 0 or kept.size != text.len:
            return False
        if kept.other == 0:
            return memcmp(self.data + kept.at, text.ptr, text.len) == 0
        return fw_is_difference_of(
            <const uint8_t *>text.ptr, text.len, <const uint8_t *>self.data + kept.other,
            <const uint8_t *>self.data + kept.at
        )

    cdef size_t keep_text(self, KeptText *kept, KeptText *whole, size_t at, fw_span text) noexcept:
        """Writes a text there, as what differs from the last whole one where that makes it half as long; elsewhere it
        is the whole one for those that come. Returns where it ends, which is not behind where the text would."""
        cdef size_t size = 0
        kept.at = at
        kept.size = text.len
        kept.other = whole.at
        if whole.at:
            size = fw_difference(
                <uint8_t *>self.data + at, text.len // 2, <const uint8_t *>self.data + whole.at, whole.size,
                <const uint8_t *>text.ptr, text.len
            )
        if size:
            return at + size
        memcpy(self.data + at, text.ptr, text.len)
        kept.other = 0
        whole[0] = kept[0]
        return at + text.len

    cdef size_t end_of(self, const KeptText *kept) noexcept:
        if kept.other == 0:
            return kept.at + kept.size
        return fw_end_of_difference(kept.size, <const uint8_t *>self.data + kept.at) - <const uint8_t *>self.data

    cdef size_t add(self, const Indexed *m, LogEntry entry, long long number, long long end, bint repeats) noexcept:
        """Behind `make_room`. Returns how many bytes it took: they may be fewer."""
        cdef KeptHead *head = <KeptHead *>(self.data + self.used)
        cdef fw_span run = m.parts[2]       # parts that lie one behind the other
        cdef uint32_t i
        cdef char *p
        head.first = number
        head.end = end
        head.audience = NOBODYS if entry.audience is None else <long long>entry.audience
        head.count = m.count
        head.channel = <uint8_t>entry.batch.channel_number
        head.flags = entry.ours * IS_OURS | entry.momentary * IS_MOMENTARY
        if end - number > 1:
            head.flags |= IS_JOINED
        for i in range(m.count):
            lengths_of(head)[i] = <uint32_t>m.parts[i].len
        p = self.data + self.keep_headers(head, m, repeats)
        for i in range(3, m.count):
            if m.parts[i].ptr == <const char *>run.ptr + run.len:
                run.len += m.parts[i].len
            else:
                memcpy(p, run.ptr, run.len)
                p += run.len
                run = m.parts[i]
        memcpy(p, run.ptr, run.len)
        p += run.len
        self.end_of_last = p - self.data
        head.size = aligned(p - <char *>head)
        self.last = head
        self.used += head.size
        self.note_name(m)
        return head.size

    cdef size_t keep_headers(self, KeptHead *head, const Indexed *m, bint repeats) noexcept:
        """Returns where they end."""
        cdef KeptText header
        cdef size_t at = self.keep_text(&header, &self.whole_header, bytes_of(head) - self.data, m.parts[0])
        if header.other:
            head.flags |= HEADER_IS_DIFFERENCE
        if repeats:
            head.flags |= HAS_PARENT_BEFORE
            return at
        at = self.keep_text(&self.parent, &self.whole_parent, at, m.parts[1])
        if self.parent.other:
            head.flags |= PARENT_IS_DIFFERENCE
        return at

    cdef void note_name(self, const Indexed *m) noexcept:
        """Of the last record: text that is joined to it goes where it ends."""
        cdef StreamText stream
        self.name_size = 0
        if m.kind != STREAM or self.last.audience != NOBODYS or self.last.flags & (IS_OURS | IS_MOMENTARY):
            return
        if stream_text(m, &stream) and is_end_of(stream.text, m.parts[3]):
            self.name_size = stream.name.len
            self.name_at = self.end_of_last - m.parts[3].len + (
                <const char *>stream.name.ptr - <const char *>m.parts[3].ptr)

    cdef bint joins(self, const Indexed *m, LogEntry entry, StreamText *stream) noexcept:
        """Whether a message that `repeats` is more of the output that came last."""
        cdef fw_span text
        if not self.name_size or m.kind != STREAM or entry.audience is not None or entry.ours or entry.momentary:
            return False
        if not stream_text(m, stream):
            return False
        if not same_bytes(stream.name, fixed(self.data + self.name_at, self.name_size)):
            return False
        text = fixed(self.data + self.name_at, self.end_of_last - 2 - self.name_at)
        return not ends_in_half(text)

    cdef size_t join(self, fw_span text, long long end) noexcept:
        """Behind `make_room`. Returns how many bytes it took."""
        cdef KeptHead *head = self.last
        cdef char *p = self.data + self.end_of_last - 2
        cdef size_t before = head.size
        memcpy(p, text.ptr, text.len)
        memcpy(p + text.len, b'"}', 2)
        lengths_of(head)[3] += <uint32_t>text.len
        self.end_of_last += text.len
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
        cdef KeptText header, parent, whole_header, whole_parent
        cdef size_t at = 0, place
        cdef Indexed *message
        memset(&whole_header, 0, sizeof(KeptText))
        memset(&whole_parent, 0, sizeof(KeptText))
        while at < self.used:
            head = <KeptHead *>(self.data + at)
            at += head.size
            header.at = bytes_of(head) - self.data
            self.find_text(&header, &whole_header, lengths_of(head)[0], head.flags & HEADER_IS_DIFFERENCE)
            place = self.end_of(&header)
            if not head.flags & HAS_PARENT_BEFORE:
                parent.at = place
                self.find_text(&parent, &whole_parent, lengths_of(head)[1], head.flags & PARENT_IS_DIFFERENCE)
                place = self.end_of(&parent)
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
            self.fill(entry.batch, message, head, &header, &parent, place)
            entry.end = head.end
            before = head
        for entry in entries:
            entry.memory = entry.batch.memory_size() + ENTRY_SIZE
        return entries

    cdef void find_text(self, KeptText *kept, KeptText *whole, size_t size, bint is_difference) noexcept:
        """One that `keep_text` has written, from the first on."""
        kept.size = size
        kept.other = whole.at if is_difference else 0
        if not is_difference:
            whole[0] = kept[0]

    cdef int fill(self, Batch batch, Indexed *message, KeptHead *head, const KeptText *header, const KeptText *parent,
                  size_t place) except -1:
        """A record becomes the next message of a batch, all its bytes copied. Behind its headers comes ``place``."""
        cdef char *copy
        cdef size_t size = 0
        cdef uint32_t i
        for i in range(head.count):
            size += lengths_of(head)[i]
        message.count = head.count
        message.parts = <fw_span *>batch.store.get(head.count * sizeof(fw_span))
        copy = <char *>batch.store.get(size)
        for i in range(head.count):
            message.parts[i] = fixed(copy, lengths_of(head)[i])
            copy += lengths_of(head)[i]
        self.copy_text(<char *>message.parts[0].ptr, header)
        self.copy_text(<char *>message.parts[1].ptr, parent)
        memcpy(<char *>message.parts[2].ptr, self.data + place, copy - <char *>message.parts[2].ptr)
        scan_header(message.parts[0], &message.header)
        return batch.index(message)

    cdef void copy_text(self, char *to, const KeptText *kept) noexcept:
        if kept.other:
            fw_from_difference(
                <uint8_t *>to, kept.size, <const uint8_t *>self.data + kept.other, <const uint8_t *>self.data + kept.at
            )
        else:
            memcpy(to, self.data + kept.at, kept.size)


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

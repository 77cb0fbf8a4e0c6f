# Outgoing bytes: frames that are encoded once, and a queue for each socket that writes them.

FLUSH_DONE = 0
FLUSH_MORE = 1
FLUSH_BLOCKED = 2
FLUSH_NO_BUFFERS = 3
FLUSH_DEAD = 4

cdef enum:
    DONE = 0
    MORE = 1
    BLOCKED = 2
    NO_BUFFERS = 3
    DEAD = 4
    FLUSH_LIMIT = 1048576
    FIRST_BLOCK = 4096
    LARGEST_BLOCK = 65536
    SHARE_FROM = 2048       # frames of fewer bytes are copied into a queue, others are shared between queues
    FEW_ENDS = 4            # frames of which the ends need no memory of their own


cdef struct Segment:
    const char *ptr
    size_t len


@cython.final
@cython.freelist(64)
cdef class Ends:
    """Where frames end, which may be asked long after their bytes have gone."""

    cdef uint64_t *items        # of each frame, in bytes from the first
    cdef Py_ssize_t count
    cdef uint64_t few[FEW_ENDS]

    def __init__(self):
        raise TypeError("Ends are those of Frames")

    def __dealloc__(self):
        if self.items != self.few:
            free(self.items)

    cdef int make(self, Py_ssize_t count) except -1:
        self.items = self.few
        if count > FEW_ENDS:
            self.items = <uint64_t *>malloc(count * sizeof(uint64_t))
            if self.items == NULL:
                raise MemoryError
        self.count = count
        return 0

    def __len__(self):
        return self.count

    def complete_before(self, uint64_t nbytes):
        cdef Py_ssize_t low = 0, high = self.count, middle
        while low < high:
            middle = (low + high) // 2
            if self.items[middle] <= nbytes:
                low = middle + 1
            else:
                high = middle
        return low

    def longest(self, uint64_t received, uint64_t written):
        cdef Py_ssize_t index, best = -1
        cdef uint64_t begin = 0, most = 0
        for index in range(self.count):
            if begin >= written:
                break
            if self.items[index] > received and self.items[index] - begin > most:
                most = self.items[index] - begin
                best = index
            begin = self.items[index]
        return most, best


@cython.final
@cython.no_gc   # its owner is a batch's store
@cython.freelist(64)
cdef class Frames:
    """Wire bytes: one block with everything small, and segments that interleave it with large parts elsewhere."""

    cdef char *block
    cdef size_t block_size
    cdef Segment *segments
    cdef Py_ssize_t segment_count
    cdef Segment one            # nearly always there is no more
    cdef readonly Ends ends
    cdef Py_ssize_t count
    cdef uint64_t received      # when the batch was, in ns
    cdef readonly size_t nbytes
    cdef object owner       # keeps the large parts alive; None when everything is in the block

    def __init__(self):
        raise TypeError("Frames are made by Batch.frames")

    def __dealloc__(self):
        if self.block != NULL:
            block_put(self.block, self.block_size)
        if self.segments != &self.one:
            free(self.segments)

    cdef size_t memory(self) noexcept:
        return self.block_size + self.count * sizeof(uint64_t) + self.segment_count * sizeof(Segment)

    def __len__(self):
        return self.count

    def __bytes__(self):
        cdef Py_ssize_t i
        return b"".join(
            [
                PyBytes_FromStringAndSize(self.segments[i].ptr, <Py_ssize_t>self.segments[i].len)
                for i in range(self.segment_count)
            ]
        )


# Who keeps an entry's bytes, and how to let go of them.
cdef enum:
    IN_BLOCK        # a Block of this queue
    OF_OBJECT       # a Python object, one reference
    OF_BUFFER       # a Py_buffer of its own

cdef struct Block:
    size_t size
    size_t used
    uint32_t entries    # that lie in it

# Of frames in a queue, for the time they take.
cdef struct Stamp:
    uint64_t end        # position behind their last byte
    uint64_t received
    uint64_t messages

cdef struct Entry:
    const char *ptr
    size_t len
    uint64_t end        # position behind its last byte
    void *keeper
    int kind


cdef inline char *block_data(Block *block) noexcept nogil:
    return <char *>block + sizeof(Block)


cdef void *keep(object data, int kind, fw_span *span) except NULL:
    """Holds the bytes of ``data`` where they lie; those of a buffer are in ``span`` then."""
    cdef Py_buffer *buffer
    if kind == OF_OBJECT:
        Py_INCREF(data)
        alive.buffers += 1
        return <void *>data
    buffer = <Py_buffer *>malloc(sizeof(Py_buffer))
    if buffer == NULL:
        raise MemoryError
    try:
        PyObject_GetBuffer(data, buffer, PyBUF_SIMPLE)
    except BaseException:
        free(buffer)
        raise
    span[0] = fixed(<const char *>buffer.buf, buffer.len)
    alive.buffers += 1
    return buffer


cdef void drop(void *keeper, int kind) noexcept:
    alive.buffers -= 1
    if kind == OF_OBJECT:
        Py_DECREF(<object>keeper)
    else:
        PyBuffer_Release(<Py_buffer *>keeper)
        free(keeper)


@cython.final
cdef class WriteQueue:
    cdef size_t copy_threshold
    cdef bint acknowledging
    cdef Entry *entries         # a ring
    cdef size_t room            # a power of two
    cdef size_t first           # oldest entry that is still kept
    cdef size_t next_write      # oldest entry with bytes to write
    cdef size_t last            # behind the newest; the three only grow
    cdef Block *block           # that small data is copied into
    cdef Stamp *stamps          # a ring, of frames that are not wholly written
    cdef size_t stamp_room
    cdef size_t first_stamp
    cdef size_t last_stamp
    cdef uint64_t timed_messages
    cdef uint64_t timed_ns
    cdef readonly uint64_t queued
    cdef readonly uint64_t written
    cdef uint64_t acked
    cdef int failed
    cdef Counters *counts
    cdef bint mask              # a client's: its frames are masked
    cdef uint8_t key[4]         # of the frame that was begun last
    cdef uint64_t frame_got     # bytes of its payload
    cdef readonly uint64_t unfinished

    def __cinit__(self, *args, **options):
        self.counts = &uncounted

    def __init__(self, *, size_t copy_threshold=COPY_LIMIT, bint acknowledge=False, bint mask=False):
        self.copy_threshold = copy_threshold
        self.acknowledging = acknowledge
        self.mask = mask
        self.counts = &uncounted if mask else &counted

    def __dealloc__(self):
        self.release_all()
        free(self.entries)
        free(self.stamps)

    # -- in --

    cdef inline Entry *entry(self, size_t index) noexcept:
        return &self.entries[index & (self.room - 1)]

    cdef int make_room(self, size_t count, size_t length) except -1:
        """For so many entries, and for so many bytes in a block: `add` and `reserve` do not fail afterwards."""
        cdef Entry *entries
        cdef size_t room, i
        if self.last - self.first + count > self.room:
            room = max(self.room, <size_t>16)
            while room < self.last - self.first + count:
                room *= 2
            entries = <Entry *>malloc(room * sizeof(Entry))
            if entries == NULL:
                raise MemoryError
            for i in range(self.first, self.last):
                entries[i & (room - 1)] = self.entry(i)[0]
            free(self.entries)
            self.entries = entries
            self.room = room
        if length and (self.block == NULL or self.block.size - self.block.used < length):
            self.new_block(length)
        return 0

    cdef int add(self, const char *ptr, size_t length, void *keeper, int kind) except -1:
        cdef Entry *entry
        self.make_room(1, 0)
        entry = self.entry(self.last)
        self.last += 1
        self.queued += length
        entry.ptr = ptr
        entry.len = length
        entry.end = self.queued
        entry.keeper = keeper
        entry.kind = kind
        return 0

    cdef char *reserve(self, size_t length) except NULL:
        """Room for ``length`` bytes at the end of the queue; they count as queued and must be filled in."""
        cdef Entry *entry
        cdef Block *block = self.block
        cdef char *p
        if block == NULL or block.size - block.used < length:
            block = self.new_block(length)
        p = block_data(block) + block.used
        if self.last > self.next_write:
            entry = self.entry(self.last - 1)
            if entry.ptr + entry.len == p and entry.kind == IN_BLOCK and entry.keeper == block:
                block.used += length
                entry.len += length
                self.queued += length
                entry.end = self.queued
                return p
        self.add(p, length, block, IN_BLOCK)
        block.used += length
        block.entries += 1
        return p

    cdef Block *new_block(self, size_t length) except NULL:
        cdef size_t size = FIRST_BLOCK
        cdef Block *block
        if self.block != NULL:
            size = min(sizeof(Block) + self.block.size * 4, <size_t>LARGEST_BLOCK)
        size = max(size, sizeof(Block) + length)
        block = <Block *>block_get(&size)
        if block == NULL:
            raise MemoryError
        block.size = size - sizeof(Block)
        block.used = 0
        block.entries = 0
        if self.block != NULL and self.block.entries == 0:
            self.free_block(self.block)
        self.block = block
        return block

    # What raises has queued nothing: half a frame would end the connection. Positions are made before, as they are
    # objects, which need memory.

    def append(self, data):
        cdef Py_buffer held
        cdef fw_span span
        span_of(data, &held, &span)
        try:
            return self.put(NULL, 0, data, span)
        finally:
            release(&held)

    def append_frame(self, int opcode, payload):
        cdef Py_buffer held
        cdef fw_span span
        cdef char header[MOST_HEADER]
        cdef size_t n
        self.check_finished()
        if isinstance(payload, str):
            payload = (<str>payload).encode()
        span_of(payload, &held, &span)
        try:
            n = self.new_header(header, first_byte(opcode, span.len, True), span.len)
            position = self.put_masked(header, n, span) if self.mask else self.put(header, n, payload, span)
        finally:
            release(&held)
        if opcode < CLOSE or opcode & RSV1_BIT:
            self.counts.to_clients.messages += 1
        return position

    cdef int check_finished(self) except -1:
        if self.unfinished:
            raise ValueError("the frame before is not finished")
        return 0

    cdef size_t new_header(self, char *out, int first, uint64_t length) except 0:
        """With a new key, where frames are masked."""
        cdef size_t n = write_header(out, first, length)
        if self.mask:
            new_key(self.key)
            out[1] |= <char>MASK_BIT
            memcpy(out + n, self.key, 4)
            n += 4
        return n

    cdef object put_masked(self, const char *header, size_t n, fw_span span):
        cdef object position = self.queued + n + span.len
        cdef char *p = self.reserve(n + span.len)
        memcpy(p, header, n)
        fw_unmask(<uint8_t *>p + n, <const uint8_t *>span.ptr, span.len, self.key, 0)
        return position

    # A frame that comes piece by piece (`FrameParser.relay`).

    cdef int begin_frame(self, int first, uint64_t length) except -1:
        cdef char header[MOST_HEADER]
        cdef size_t n = self.new_header(header, first, length)
        memcpy(self.reserve(n), header, n)
        self.unfinished = length
        self.frame_got = 0
        if first & FIN_BIT and first & 0x0F < CLOSE:
            self.counts.to_clients.messages += 1
        return 0

    cdef int put_payload(self, const uint8_t *p, size_t n, const uint8_t *key) except -1:
        """The next bytes of the frame, which are masked with ``key``."""
        cdef uint8_t both[4]
        cdef int i
        if n == 0:
            return 0
        for i in range(4):
            both[i] = key[i] ^ (self.key[i] if self.mask else 0)
        fw_unmask(<uint8_t *>self.reserve(n), p, n, both, self.frame_got)
        self.frame_got += n
        self.unfinished -= n
        return 0

    cdef object put(self, const char *header, size_t n, object data, fw_span span):
        """The header, and behind it the bytes of ``data``; the position behind them."""
        cdef object position
        cdef char *p
        cdef int kind
        cdef void *keeper
        if span.len <= self.copy_threshold:
            position = self.queued + n + span.len
            if n + span.len:
                p = self.reserve(n + span.len)
                if n:
                    memcpy(p, header, n)
                if span.len:
                    memcpy(p + n, span.ptr, span.len)
            return position
        kind = OF_OBJECT if PyBytes_CheckExact(data) else OF_BUFFER
        keeper = keep(data, kind, &span)
        try:
            position = self.queued + n + span.len
            self.make_room(2, n)
        except BaseException:
            drop(keeper, kind)
            raise
        if n:
            memcpy(self.reserve(n), header, n)
        self.add(<const char *>span.ptr, span.len, keeper, kind)
        return position

    def extend(self, Frames frames not None):
        # First: it is an object, which needs memory.
        cdef object position = self.queued + frames.nbytes
        self.add_frames(frames)
        return position

    cdef int add_frames(self, Frames frames) except -1:
        cdef Py_ssize_t i
        cdef Segment *segment
        cdef size_t copied = 0
        self.check_finished()
        if self.mask:
            raise ValueError("frames that clients share are not masked")
        for i in range(frames.segment_count):
            if frames.segments[i].len <= SHARE_FROM:
                copied += frames.segments[i].len
        self.make_room(frames.segment_count, copied)
        if frames.count and self.last_stamp - self.first_stamp == self.stamp_room:
            self.more_stamps()
        for i in range(frames.segment_count):
            segment = &frames.segments[i]
            if segment.len <= SHARE_FROM:
                memcpy(self.reserve(segment.len), segment.ptr, segment.len)
            else:
                self.add(segment.ptr, segment.len, keep(frames, OF_OBJECT, NULL), OF_OBJECT)
        if frames.count:
            self.stamp(frames)
            counted.to_clients.messages += frames.count
        return 0

    cdef void stamp(self, Frames frames) noexcept:
        cdef Stamp *stamp = &self.stamps[self.last_stamp & (self.stamp_room - 1)]
        stamp.end = self.queued
        stamp.received = frames.received
        stamp.messages = frames.count
        self.last_stamp += 1

    cdef int more_stamps(self) except -1:
        cdef size_t room = self.stamp_room * 2 if self.stamp_room else 4
        cdef Stamp *stamps = <Stamp *>malloc(room * sizeof(Stamp))
        cdef size_t i
        if stamps == NULL:
            raise MemoryError
        for i in range(self.first_stamp, self.last_stamp):
            stamps[i & (room - 1)] = self.stamps[i & (self.stamp_room - 1)]
        free(self.stamps)
        self.stamps = stamps
        self.stamp_room = room
        return 0

    # -- out --

    def flush(self, int fd, size_t limit=FLUSH_LIMIT):
        return self.write_to(fd, limit)

    cdef int write_to(self, int fd, size_t limit) noexcept:
        cdef iovec pieces[FW_MAX_IOVECS]
        cdef size_t given
        cdef int count
        cdef ssize_t sent
        self.failed = 0
        if self.queued == self.written:
            return DONE
        count = self.gather(pieces, limit, &given)
        sent = fw_sendmsg(fd, pieces, count)
        if sent < 0:
            return self.judge_failure()
        self.counts.flushes += 1
        self.advance(<uint64_t>sent)
        if <size_t>sent < given:
            self.counts.blocked += 1
            return BLOCKED
        return DONE if self.queued == self.written else MORE

    cdef int judge_failure(self) noexcept:
        self.failed = errno
        if self.failed == EAGAIN:
            self.counts.blocked += 1
            return BLOCKED
        if self.failed in (ENOBUFS, ENOMEM):
            self.counts.no_buffers += 1
            return NO_BUFFERS
        return DEAD

    cdef int gather(self, iovec *pieces, size_t limit, size_t *given) noexcept:
        """The next bytes to write, at most ``limit``, as pieces."""
        cdef size_t index = self.next_write
        cdef size_t skip, length
        cdef Entry *entry
        cdef int count = 0
        given[0] = 0
        while index < self.last and count < FW_MAX_IOVECS and given[0] < limit:
            entry = self.entry(index)
            skip = entry.len - <size_t>(entry.end - self.written) if index == self.next_write else 0
            length = min(entry.len - skip, limit - given[0])
            pieces[count].iov_base = <void *>(entry.ptr + skip)
            pieces[count].iov_len = length
            given[0] += length
            count += 1
            index += 1
        return count

    cdef void advance(self, uint64_t count) noexcept:
        self.written += count
        self.counts.to_clients.bytes += count
        while self.next_write < self.last and self.entry(self.next_write).end <= self.written:
            self.next_write += 1
        if self.first_stamp < self.last_stamp:
            self.time_written()
        if not self.acknowledging:
            self.acked = self.written
            self.release_passed()

    cdef void time_written(self) noexcept:
        """Note how long what is wholly written now took since it was received."""
        cdef uint64_t now, took, messages = 0, batches = 0
        cdef Stamp *stamp
        while self.first_stamp < self.last_stamp:
            stamp = &self.stamps[self.first_stamp & (self.stamp_room - 1)]
            if stamp.end > self.written:
                break
            if batches == 0:
                now = nanoseconds()
            took = now - stamp.received
            observe(&time_to_flush, took, stamp.messages)
            self.timed_ns += took * stamp.messages
            messages += stamp.messages
            batches += 1
            self.first_stamp += 1
        if batches:
            self.timed_messages += messages
            observe(&messages_per_flush, messages, 1)
            observe(&batches_per_flush, batches, 1)

    def take(self, size_t limit):
        cdef iovec pieces[FW_MAX_IOVECS]
        cdef size_t given, left = <size_t>min(<uint64_t>limit, self.queued - self.written)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>left)
        cdef char *out = PyBytes_AS_STRING(data)
        cdef int i
        while left:
            for i in range(self.gather(pieces, left, &given)):
                memcpy(out, pieces[i].iov_base, pieces[i].iov_len)
                out += pieces[i].iov_len
            if given == 0:  # a finalizer has cleared the queue
                return data[: out - PyBytes_AS_STRING(data)]
            self.advance(given)
            left -= given
        return data

    def acknowledge(self, uint64_t position):
        if not self.acknowledging:
            raise ValueError("this queue does not wait for acknowledgement")
        if position > self.written:
            raise ValueError("what was not written cannot be acknowledged")
        self.release_until(position)

    # -- letting go --

    # An entry is out of the queue before its bytes are let go: a finalizer may come back here.

    cdef void release_until(self, uint64_t position) noexcept:
        if position > self.acked:
            self.acked = position
            self.release_passed()

    cdef bytes kept_bytes(self):
        """What is queued and was not acknowledged, written or not."""
        cdef bytes data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(self.queued - self.acked))
        cdef char *out = PyBytes_AS_STRING(data)
        cdef Entry *entry
        cdef size_t index, skip
        for index in range(self.first, self.last):
            entry = self.entry(index)
            skip = <size_t>(max(self.acked, entry.end - entry.len) - (entry.end - entry.len))
            memcpy(out, entry.ptr + skip, entry.len - skip)
            out += entry.len - skip
        return data

    cdef void let_go_first(self) noexcept:
        cdef Entry entry = self.entry(self.first)[0]
        self.first += 1
        self.let_go(&entry)

    cdef void release_passed(self) noexcept:
        while self.first < self.next_write and self.entry(self.first).end <= self.acked:
            self.let_go_first()
        if self.first == self.last and self.block != NULL and self.block.entries == 0:
            self.reuse_block()

    cdef void reuse_block(self) noexcept:
        """An idle queue keeps one small block."""
        if self.block.size > FIRST_BLOCK:
            self.free_block(self.block)
            self.block = NULL
        else:
            self.block.used = 0

    cdef void let_go(self, Entry *entry) noexcept:
        cdef Block *block
        if entry.kind == IN_BLOCK:
            block = <Block *>entry.keeper
            block.entries -= 1
            if block.entries == 0 and block != self.block:
                self.free_block(block)
            return
        drop(entry.keeper, entry.kind)

    cdef void free_block(self, Block *block) noexcept:
        block_put(block, sizeof(Block) + block.size)

    cdef void release_all(self) noexcept:
        cdef size_t end = self.last
        self.next_write = end
        self.first_stamp = self.last_stamp
        self.written = self.queued
        self.acked = self.queued
        while self.first < end:
            self.let_go_first()
        if self.block != NULL and self.block.entries == 0:
            self.free_block(self.block)
            self.block = NULL

    def clear(self):
        cdef uint64_t lost = self.queued - self.written
        self.release_all()
        return lost

    @property
    def errno(self):
        return self.failed

    @property
    def acknowledged(self):
        return self.acked

    @property
    def pending_bytes(self):
        return self.queued - self.written

    @property
    def unacknowledged_bytes(self):
        return self.written - self.acked

    @property
    def held_buffers(self):
        return self.last - self.first

    @property
    def time_to_flush(self):
        return self.timed_messages, self.timed_ns / 1e9

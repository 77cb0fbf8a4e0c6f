# Kernel to clients: ZMQ messages are received, verified and indexed in batches, and encoded once per protocol.

import zmq

cdef enum:
    STATUS
    REPLY
    STREAM
    DISPLAY
    COMM
    INPUT_REQUEST
    ERROR
    OTHER
    CLASSES

MESSAGE_CLASSES = ("status", "reply", "stream", "display", "comm", "input_request", "error", "other")

cdef enum:
    MAX_REASONS = 16
    FIRST_CHUNK = 2048
    CHUNK_HEAD = 32         # of a `Chunk`, 16-aligned
    LARGEST_CHUNK = 65536
    DRAIN_MESSAGES = 1024
    DRAIN_BYTES = 1048576
    BATCH_SIZE = 512        # what a batch's Python objects take, at least, with the few messages that lie in them
    FEW_MESSAGES = 2        # that need no memory of their own


cdef int classify(const Header *header) noexcept nogil:
    cdef fw_span name = inside(header.msg_type)
    cdef const char *p = <const char *>name.ptr
    if spells(name, b"stream", 6):
        return STREAM
    if spells(name, b"status", 6):
        return STATUS
    if spells(name, b"display_data", 12) or spells(name, b"execute_result", 14):
        return DISPLAY
    if spells(name, b"update_display_data", 19):
        return DISPLAY
    if name.len > 6 and memcmp(p + name.len - 6, b"_reply", 6) == 0:
        return REPLY
    if name.len > 5 and memcmp(p, b"comm_", 5) == 0:
        return COMM
    if spells(name, b"error", 5):
        return ERROR
    if spells(name, b"input_request", 13):
        return INPUT_REQUEST
    return OTHER


# -- memory of a batch: chunks that are freed together --

cdef struct Chunk:
    Chunk *older
    size_t size     # with this head
    size_t used


cdef struct Arena:
    Chunk *newest
    size_t size         # of all chunks
    size_t expected     # bytes, of which the first chunk is made; 0 when nobody knows


cdef void *arena_get(Arena *arena, size_t size) noexcept:
    """``size`` bytes, 16-aligned, at an address that stays; NULL without memory."""
    cdef Chunk *chunk = arena.newest
    cdef size_t room = FIRST_CHUNK
    cdef void *p
    size = (size + 15) & ~<size_t>15
    if chunk == NULL or chunk.size - chunk.used < size:
        if chunk != NULL:
            room = min(chunk.size * 4, <size_t>LARGEST_CHUNK)
        elif arena.expected:
            room = CHUNK_HEAD + arena.expected
        room = max(room, CHUNK_HEAD + size)
        chunk = <Chunk *>block_get(&room)
        if chunk == NULL:
            return NULL
        chunk.older = arena.newest
        chunk.size = room
        chunk.used = CHUNK_HEAD
        arena.newest = chunk
        arena.size += room
    p = <char *>chunk + chunk.used
    chunk.used += size
    return p


cdef void arena_free(Arena *arena) noexcept:
    cdef Chunk *chunk
    while arena.newest != NULL:
        chunk = arena.newest
        arena.newest = chunk.older
        block_put(chunk, chunk.size)


cdef struct Indexed:
    fw_span *parts      # header, parent_header, metadata, content, buffers
    fw_span *text       # the first four as UTF-8: the same, or copies where they were not
    uint32_t count
    uint8_t kind        # its class
    bint foreign        # not protocol 5: jupyter_client must adapt it
    Header header       # of the header as UTF-8


@cython.final
@cython.no_gc
cdef class Received:
    """A block that a connection received into, and that parts of a batch lie in (`ZmtpStream`)."""

    cdef char *data
    cdef size_t size
    cdef uint64_t store     # the number of that batch's

    def __dealloc__(self):
        if self.data != NULL:
            block_put(self.data, self.size)


@cython.final
@cython.no_gc   # what it keeps are bytes: nothing of it leads back
@cython.freelist(64)
cdef class Store:
    """The memory that parts lie in, shared by a batch and its frames."""

    cdef Arena arena
    cdef fw_zmq_msg **held      # large parts, where libzmq received them
    cdef size_t held_count
    cdef size_t held_room
    cdef list kept              # Python objects that parts point into
    cdef size_t elsewhere       # bytes of both
    cdef uint64_t number        # no other has it: the address of one that is gone is the next one's

    def __dealloc__(self):
        cdef size_t i
        for i in range(self.held_count):
            zmq_msg_close(self.held[i])
        alive.zmq_messages -= self.held_count
        free(self.held)
        arena_free(&self.arena)

    cdef void *get(self, size_t size) except NULL:
        cdef void *p = arena_get(&self.arena, size)
        if p == NULL:
            raise MemoryError
        return p

    cdef int keep(self, object data) except -1:
        if self.kept is None:
            self.kept = []
        self.kept.append(data)
        self.elsewhere += size_of_kept(data)
        return 0

    cdef size_t memory(self) noexcept:
        return self.arena.size + self.elsewhere

    cdef fw_zmq_msg *room_to_hold(self, size_t count) except NULL:
        """For so many large frames; `hold` does not fail afterwards."""
        cdef fw_zmq_msg **held
        cdef size_t room
        if self.held_count + count > self.held_room:
            room = max(self.held_room * 2, self.held_count + count, <size_t>4)
            held = <fw_zmq_msg **>realloc(self.held, room * sizeof(void *))
            if held == NULL:
                raise MemoryError
            self.held = held
            self.held_room = room
        return <fw_zmq_msg *>self.get(count * sizeof(fw_zmq_msg))

    cdef void hold(self, fw_zmq_msg *mine, fw_zmq_msg *frame) noexcept:
        """Keeps a large frame where libzmq received it: its bytes stay where they are."""
        zmq_msg_init(mine)
        zmq_msg_move(mine, frame)
        self.held[self.held_count] = mine
        self.held_count += 1
        self.elsewhere += zmq_msg_size(mine)
        alive.zmq_messages += 1


cdef size_t size_of_kept(object data):
    if isinstance(data, Store):
        return (<Store>data).memory()
    if isinstance(data, bytes):
        return len(data)
    if isinstance(data, Received):
        return (<Received>data).size
    return sum([len(part) for part in data])


cdef enum:
    SMALL_ROOM = 65536      # bytes of one message's small frames that are copied

cdef inline bint is_kept(const Incoming *incoming, fw_span span) noexcept nogil:
    """Whether a frame's bytes are still where libzmq received them."""
    return <const char *>span.ptr < incoming.small or <const char *>span.ptr > incoming.small + SMALL_ROOM


# What was found of a message before it joins a batch.
cdef struct Judged:
    Py_ssize_t first    # where its parts begin
    Header header
    bint fresh          # its digest is to be remembered
    uint64_t digest


@cython.final
@cython.no_gc   # a history keeps thousands, each collection would look at all of them, and nothing of one leads back
@cython.freelist(64)
cdef class Batch:
    cdef readonly str channel
    cdef int channel_number
    cdef Store store
    cdef Indexed *messages
    cdef Py_ssize_t count
    cdef Py_ssize_t room
    cdef Indexed few[FEW_MESSAGES]
    cdef readonly size_t nbytes
    cdef size_t refused_bytes       # of messages that were rejected: they cost their digests
    cdef Py_ssize_t by_class[CLASSES]
    cdef readonly bint more
    cdef readonly bint logged       # it is in a `Log`
    cdef uint64_t received          # when, in ns
    cdef list reasons
    cdef readonly Py_ssize_t rejected_count
    cdef Py_ssize_t foreign_count
    cdef Frames v1_frames
    cdef Frames legacy_frames

    def __init__(self):
        raise TypeError("batches are made by drain, batch_of and Batch.replaced")

    def __dealloc__(self):
        alive.messages -= self.count
        if self.messages != self.few:
            free(self.messages)

    # -- filling --

    cdef Indexed *new_message(self) except NULL:
        cdef Indexed *messages
        cdef Py_ssize_t room
        if self.count == self.room:
            room = self.room * 4
            messages = <Indexed *>realloc(NULL if self.messages == self.few else self.messages, room * sizeof(Indexed))
            if messages == NULL:
                raise MemoryError
            if self.messages == self.few:
                memcpy(messages, self.few, self.count * sizeof(Indexed))
            self.messages = messages
            self.room = room
        return &self.messages[self.count]

    cdef int index(self, Indexed *message) except -1:
        """The parts of ``message`` are in place; it joins the batch."""
        message.kind = classify(&message.header)
        message.foreign = not is_version_5(&message.header)
        message.text = message.parts
        if not four_are_utf8(message.parts):
            self.respell(message)
        self.foreign_count += message.foreign
        self.by_class[message.kind] += 1
        self.nbytes += sum_of(message.parts, message.count)
        self.count += 1
        alive.messages += 1
        return 0

    cdef int respell(self, Indexed *message) except -1:
        """Copies of the four parts in which bytes that are not UTF-8 are U+FFFD."""
        cdef int i
        cdef bytes text
        message.text = <fw_span *>self.store.get(4 * sizeof(fw_span))
        for i, text in enumerate(four_as_utf8(message.parts)):
            self.store.keep(text)
            message.text[i] = fixed(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        scan_header(message.text[0], &message.header)
        return 0

    cdef int remember(self, object error) except -1:
        if self.reasons is None:
            self.reasons = []
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(error)
        return 0

    cdef object judge(self, Signer signer, bint permissive, const fw_span *frames, Py_ssize_t count,
                      Judged *judged):
        """None when the message is good, else the error that refuses it."""
        cdef Py_ssize_t i
        cdef int verdict
        for i in range(count):
            if frames[i].len == 9 and memcmp(frames[i].ptr, b"<IDS|MSG>", 9) == 0:
                break
        else:
            return no_delimiter()
        judged.first = i + 2
        if count - judged.first < 4:
            return need_four(max(count - judged.first, 0))
        verdict = signer.judge(frames[i + 1], frames + judged.first, &judged.digest)
        judged.fresh = verdict == TRUSTED
        if verdict != TRUSTED:
            if verdict == REPLAYED:
                counted.replayed_signatures += 1
            else:
                counted.invalid_signatures += 1
            error = signature_error(verdict, frames[i + 1].len)
            if not permissive:
                return error
            self.remember(error)
        if scan_header(frames[judged.first], &judged.header) == NOT_JSON or not names_message(&judged.header):
            return bad_header()
        if any_blank(frames + judged.first):
            return blank_part()
        return None

    cdef bint refuses(self, Signer signer, bint permissive, const fw_span *frames, Py_ssize_t count,
                      Judged *judged) except -1:
        """Whether a message is rejected. What raises (there is no memory) has done nothing."""
        memset(judged, 0, sizeof(Judged))
        error = self.judge(signer, permissive, frames, count, judged)
        if error is None:
            return False
        self.remember(error)
        self.rejected_count += 1
        self.refused_bytes += sum_of(frames, count)
        counted.rejected += 1
        if judged.fresh:
            signer.remember(judged.digest)
        return True

    cdef void accept(self, Signer signer, const Judged *judged, Indexed *message) noexcept:
        """It has joined the batch."""
        if judged.fresh:
            signer.remember(judged.digest)
        tally(&counted.from_kernels[self.channel_number], sum_of(message.parts, message.count))

    cdef bint is_empty(self) noexcept:
        return self.count + self.rejected_count == 0

    cdef bint spent(self, Py_ssize_t max_messages, size_t max_bytes) noexcept:
        """Whether a drain's budget is used up; by what it refuses too."""
        return self.count + self.rejected_count >= max_messages or self.nbytes + self.refused_bytes >= max_bytes

    # What raises adds nothing: the message comes again.

    cdef int add_zmq(self, Signer signer, bint permissive, Incoming *incoming) except -1:
        """Takes over the frames of one message that libzmq received."""
        cdef fw_span *spans = incoming.spans
        cdef Py_ssize_t i
        cdef Judged judged
        cdef Indexed *message
        cdef fw_zmq_msg *kept = incoming.kept
        cdef fw_zmq_msg *held
        cdef char *small
        cdef size_t small_bytes = 0, large = 0
        if self.refuses(signer, permissive, spans, incoming.count, &judged):
            return 0
        message = self.new_message()
        message.count = <uint32_t>(incoming.count - judged.first)
        message.parts = <fw_span *>self.store.get(message.count * sizeof(fw_span))
        for i in range(judged.first, incoming.count):
            if spans[i].len <= COPY_LIMIT:
                small_bytes += spans[i].len
            else:
                large += 1
        small = <char *>self.store.get(small_bytes)
        held = self.store.room_to_hold(large)
        for i in range(judged.first, incoming.count):
            message.parts[i - judged.first] = spans[i]
            if spans[i].len <= COPY_LIMIT:
                memcpy(small, spans[i].ptr, spans[i].len)
                message.parts[i - judged.first].ptr = small
                small += spans[i].len
        # The header moved: what was found in it moves along.
        self.rebase(message, &judged.header, spans[judged.first].ptr)
        self.index(message)
        self.accept(signer, &judged, message)
        for i in range(incoming.count):
            if i >= judged.first and spans[i].len > COPY_LIMIT:
                self.store.hold(held, kept)
                held += 1
            if is_kept(incoming, spans[i]):
                kept += 1
        return 0

    cdef int add_spans(self, Signer signer, bint permissive, const fw_span *spans, Py_ssize_t count,
                       bint large_stay) except -1:
        """One message whose frames lie where others will be received. ``large_stay``: the batch's store keeps them."""
        cdef Py_ssize_t i
        cdef Judged judged
        cdef Indexed *message
        cdef char *copied
        cdef size_t copied_bytes = 0
        if self.refuses(signer, permissive, spans, count, &judged):
            return 0
        message = self.new_message()
        message.count = <uint32_t>(count - judged.first)
        message.parts = <fw_span *>self.store.get(message.count * sizeof(fw_span))
        for i in range(judged.first, count):
            if spans[i].len <= COPY_LIMIT or not large_stay:
                copied_bytes += spans[i].len
        copied = <char *>self.store.get(copied_bytes)
        for i in range(judged.first, count):
            message.parts[i - judged.first] = spans[i]
            if spans[i].len <= COPY_LIMIT or not large_stay:
                memcpy(copied, spans[i].ptr, spans[i].len)
                message.parts[i - judged.first].ptr = copied
                copied += spans[i].len
        self.rebase(message, &judged.header, spans[judged.first].ptr)
        self.index(message)
        self.accept(signer, &judged, message)
        return 0

    cdef int rebase(self, Indexed *message, const Header *header, const void *before) noexcept:
        cdef const char *after = <const char *>message.parts[0].ptr
        message.header = header[0]
        message.header.msg_id.ptr = after + (<const char *>header.msg_id.ptr - <const char *>before)
        message.header.msg_type.ptr = after + (<const char *>header.msg_type.ptr - <const char *>before)
        if header.version.ptr != NULL:
            message.header.version.ptr = after + (<const char *>header.version.ptr - <const char *>before)
        return 0

    cdef int add_python(self, Signer signer, bint permissive, object frames) except -1:
        """One message whose frames are Python's; those that are not bytes are copied."""
        cdef Views views
        cdef Judged judged
        frames = [frame if type(frame) is bytes else bytes(frame) for frame in frames]
        views = Views(frames)
        if self.refuses(signer, permissive, views.spans, views.count, &judged):
            return 0
        self.add_parts(frames[judged.first:])
        self.accept(signer, &judged, &self.messages[self.count - 1])
        return 0

    cdef int add_parts(self, list parts) except -1:
        """A message that is known to be good; ``parts`` are bytes."""
        cdef Views views = Views(parts)
        cdef Indexed *message = self.new_message()
        if views.count < 4:
            raise need_four(views.count)
        if any_blank(views.spans):
            raise blank_part()
        self.store.keep(parts)
        message.count = <uint32_t>views.count
        message.parts = <fw_span *>self.store.get(views.count * sizeof(fw_span))
        memcpy(message.parts, views.spans, views.count * sizeof(fw_span))
        if scan_header(message.parts[0], &message.header) == NOT_JSON or not names_message(&message.header):
            raise bad_header()
        return self.index(message)

    # -- looking --

    def __len__(self):
        return self.count

    cdef Indexed *at(self, Py_ssize_t index) except NULL:
        if index < 0:
            index += self.count
        if index < 0 or index >= self.count:
            raise IndexError("the batch has no such message")
        return &self.messages[index]

    def __getitem__(self, Py_ssize_t index):
        cdef Indexed *message = self.at(index)
        cdef uint32_t i
        return [span_bytes(message.parts[i]) for i in range(message.count)]

    def headers(self, Py_ssize_t index):
        cdef Indexed *message = self.at(index)
        return span_bytes(message.parts[0]), span_bytes(message.parts[1])

    def msg_type(self, Py_ssize_t index):
        return unescaped(self.at(index).header.msg_type)

    def message_class(self, Py_ssize_t index):
        return MESSAGE_CLASSES[self.at(index).kind]

    @property
    def counts(self):
        cdef int i
        return tuple([self.by_class[i] for i in range(CLASSES)])

    @property
    def rejected(self):
        return list(self.reasons or ())

    @property
    def faulty(self):
        return self.reasons is not None

    @property
    def memory(self):
        return self.memory_size()

    cdef size_t memory_size(self) noexcept:
        cdef size_t size = BATCH_SIZE + self.room * sizeof(Indexed) + self.store.memory()
        if self.v1_frames is not None:
            size += self.v1_frames.memory()
        if self.legacy_frames is not None:
            size += self.legacy_frames.memory()
        return size

    @property
    def unusual(self):
        return self.is_unusual()

    cdef inline bint is_unusual(self) noexcept:
        return self.foreign_count > 0 or self.by_class[ERROR] > 0

    @property
    def foreign(self):
        cdef Py_ssize_t i
        if not self.foreign_count:
            return []
        return [i for i in range(self.count) if self.messages[i].foreign]

    def part(self, Py_ssize_t begin, Py_ssize_t end):
        cdef Batch other = new_batch(self.channel)
        cdef Indexed *message
        cdef Py_ssize_t i
        if not 0 <= begin <= end <= self.count:
            raise IndexError("the batch has no such messages")
        other.received = self.received
        other.store.keep(self.store)
        for i in range(begin, end):
            message = other.new_message()
            message[0] = self.messages[i]
            other.index(message)
        return other

    def replaced(self, dict changes not None):
        cdef Batch other = new_batch(self.channel)
        cdef Indexed *message
        cdef Py_ssize_t i
        other.more = self.more
        other.received = self.received
        other.store.keep(self.store)
        for i in range(self.count):
            if i not in changes:
                message = other.new_message()
                message[0] = self.messages[i]
                other.index(message)
            elif changes[i] is not None:
                other.add_parts([bytes(part) for part in changes[i]])
        return other

    # -- encoding --

    def frames(self, protocol):
        return self.frames_for(protocol_of(protocol))

    cdef Frames frames_for(self, int protocol):
        if protocol == V1:
            if self.v1_frames is None:
                self.v1_frames = encode_batch(self, V1)
            return self.v1_frames
        if self.legacy_frames is None:
            self.legacy_frames = encode_batch(self, LEGACY)
        return self.legacy_frames

    def forget_frames(self):
        self.v1_frames = self.legacy_frames = None


cdef str name_of_iopub = CHANNELS[IOPUB]
cdef str name_of_shell = CHANNELS[SHELL]


cdef int channel_number(str channel) except -1:
    if channel is name_of_iopub:  # nearly always, and the very same object
        return IOPUB
    if channel is name_of_shell:
        return SHELL
    if len(channel) > 64:
        raise ValueError("a channel's name has at most 64 characters")
    return CHANNELS.index(channel) if channel in CHANNELS else ELSEWHERE


# Of the last batch's store.
cdef uint64_t stores = 0


cdef Batch new_batch(str channel):
    global stores
    cdef Batch batch
    batch = Batch.__new__(Batch)
    batch.messages = batch.few
    batch.room = FEW_MESSAGES
    batch.channel = channel
    batch.channel_number = channel_number(channel)
    batch.store = Store.__new__(Store)
    stores += 1
    batch.store.number = stores
    batch.received = nanoseconds()
    return batch


# -- frames of a batch --

cdef struct Writer:
    char *out               # next free byte of the block
    const char *run         # where the segment that is being written begins
    Segment *segments
    Py_ssize_t count


cdef inline void write_span(Writer *w, fw_span span) noexcept nogil:
    """Copies a small span into the block; a large one ends the running segment and is one of its own."""
    if span.len <= COPY_LIMIT:
        memcpy(w.out, span.ptr, span.len)
        w.out += span.len
        return
    end_segment(w)
    w.segments[w.count].ptr = <const char *>span.ptr
    w.segments[w.count].len = span.len
    w.count += 1


cdef void end_segment(Writer *w) noexcept nogil:
    if w.out > w.run:
        w.segments[w.count].ptr = w.run
        w.segments[w.count].len = w.out - w.run
        w.count += 1
    w.run = w.out


cdef size_t payload_size(const Indexed *m, int protocol, const Tails *tails) noexcept nogil:
    cdef size_t size
    if protocol == V1:
        return v1_table_size(m.count) + tails.channel.len + sum_of(m.parts, m.count)
    size = 83 + sum_of(m.text, 4) + m.header.msg_id.len + m.header.msg_type.len
    if m.count == 4:
        return size + tails.text.len
    return size + tails.binary.len + 4 * <size_t>(m.count - 2) + sum_of(m.parts + 4, m.count - 4)


cdef size_t large_bytes(const fw_span *spans, Py_ssize_t count, Py_ssize_t *segments) noexcept nogil:
    cdef size_t total = 0
    cdef Py_ssize_t i
    for i in range(count):
        if spans[i].len > COPY_LIMIT:
            total += spans[i].len
            segments[0] += 2
    return total


cdef void write_v1(Writer *w, const Indexed *m, fw_span channel) noexcept nogil:
    cdef uint32_t i
    v1_table(w.out, channel.len, m.parts, m.count)
    w.out += v1_table_size(m.count)
    write_span(w, channel)
    for i in range(m.count):
        write_span(w, m.parts[i])


cdef void write_legacy(Writer *w, const Indexed *m, const Tails *tails) noexcept nogil:
    cdef fw_span pieces[PIECES]
    cdef uint32_t i
    cdef int k
    legacy_pieces(pieces, m.text, &m.header, tails.text if m.count == 4 else tails.binary)
    if m.count > 4:
        legacy_table(w.out, sum_of(pieces, PIECES), m.parts + 4, m.count - 4)
        w.out += 4 * (m.count - 2)
    for k in range(PIECES):
        write_span(w, pieces[k])
    for i in range(4, m.count):
        write_span(w, m.parts[i])


cdef Frames encode_batch(Batch batch, int protocol):
    cdef Frames frames = Frames.__new__(Frames)
    cdef Tails tails
    cdef Writer w
    cdef Indexed *m
    cdef Py_ssize_t i
    cdef Py_ssize_t segments = 1
    cdef size_t size, copied = 0
    cdef tuple kept = tails_of(batch.channel_number, batch.channel, &tails)  # noqa: F841 - they lie in it
    frames.ends = Ends.__new__(Ends)
    frames.ends.make(batch.count)
    for i in range(batch.count):
        m = &batch.messages[i]
        size = payload_size(m, protocol, &tails)
        if protocol == LEGACY and m.count > 4 and size > 0xFFFFFFFFu:
            raise MalformedMessage("a message with buffers is at most 4 GiB in the default protocol; use v1")
        size += header_size(size)
        frames.nbytes += size
        frames.ends.items[i] = frames.nbytes
        copied += size - large_bytes(m.parts if protocol == V1 else m.text, 4, &segments)
        copied -= large_bytes(m.parts + 4, m.count - 4, &segments)
        if protocol == LEGACY:
            copied -= large_bytes(&m.header.msg_id, 1, &segments) + large_bytes(&m.header.msg_type, 1, &segments)
    frames.count = batch.count
    frames.received = batch.received
    frames.block_size = copied + 1
    frames.block = <char *>block_get(&frames.block_size)
    frames.segments = &frames.one
    if segments > 1:
        frames.segments = <Segment *>malloc(segments * sizeof(Segment))
    if frames.block == NULL or frames.segments == NULL:
        raise MemoryError
    w.out = frames.block
    w.run = frames.block
    w.segments = frames.segments
    w.count = 0
    for i in range(batch.count):
        m = &batch.messages[i]
        size = payload_size(m, protocol, &tails)
        w.out += write_header(w.out, FIN_BIT | (BINARY if protocol == V1 or m.count > 4 else TEXT), size)
        if protocol == V1:
            write_v1(&w, m, tails.channel)
        else:
            write_legacy(&w, m, &tails)
    end_segment(&w)
    frames.segment_count = w.count
    if segments > 1:
        frames.owner = batch.store
    return frames


# -- receiving --

cdef enum:
    SPARE_ROOM = 1024

cdef enum:
    NOTHING
    RECEIVED

# Room that the last drain left for the next. Each takes it for itself: Python code runs while messages are judged
# (hashlib's, a finalizer), and with it other threads, which may drain too.
cdef Incoming *spare = NULL


cdef Incoming *take_spare() except NULL:
    global spare
    cdef Incoming *mine = spare
    spare = NULL
    if mine == NULL:
        mine = <Incoming *>calloc(1, sizeof(Incoming))
        if mine == NULL:
            raise MemoryError
    return mine


cdef void give_back(Incoming *mine) noexcept:
    """What one message of a million frames needed is not kept."""
    global spare
    close_frames(mine)
    if spare == NULL and mine.room <= SPARE_ROOM:
        spare = mine
    else:
        free_incoming(mine)


cdef void free_incoming(Incoming *incoming) noexcept:
    close_frames(incoming)
    free(incoming.spans)
    free(incoming.kept)
    free(incoming.small)
    free(incoming)


cdef int more_room(Incoming *incoming) except -1:
    """Room for more frames; those that are there move along. Without memory they stay."""
    cdef Py_ssize_t room = incoming.room * 2 if incoming.room else 32
    cdef fw_zmq_msg *kept = <fw_zmq_msg *>malloc((room + 1) * sizeof(fw_zmq_msg))
    cdef fw_span *spans = <fw_span *>realloc(incoming.spans, room * sizeof(fw_span))
    cdef Py_ssize_t i, k = 0
    if spans != NULL:
        incoming.spans = spans
    if incoming.small == NULL:
        incoming.small = <char *>malloc(SMALL_ROOM)
    if kept == NULL or spans == NULL or incoming.small == NULL:
        free(kept)
        raise MemoryError
    for i in range(incoming.count):
        if is_kept(incoming, spans[i]):
            zmq_msg_init(&kept[k])
            zmq_msg_move(&kept[k], &incoming.kept[k])
            # The bytes of a very small message lie in the zmq_msg_t itself.
            spans[i].ptr = zmq_msg_data(&kept[k])
            k += 1
    zmq_msg_init(&kept[k])
    free(incoming.kept)
    incoming.kept = kept
    incoming.room = room
    return 0


cdef bint receive_message(void *handle, Incoming *incoming) except -1:
    """Whether a whole message is in ``incoming`` now. `close_frames` lets go of it; what was received when memory ran
    out stays there, and the next call goes on."""
    cdef fw_zmq_msg *frame
    cdef fw_span *span
    while not incoming.whole:
        if incoming.count == incoming.room:
            more_room(incoming)
        frame = &incoming.kept[incoming.kept_count]
        if receive_frame(handle, frame) == NOTHING:
            return False
        incoming.whole = not zmq_msg_more(frame)
        span = &incoming.spans[incoming.count]
        span[0] = fixed(<const char *>zmq_msg_data(frame), zmq_msg_size(frame))
        incoming.count += 1
        if span.len <= COPY_LIMIT and span.len <= SMALL_ROOM - incoming.used:
            memcpy(incoming.small + incoming.used, span.ptr, span.len)
            span.ptr = incoming.small + incoming.used
            incoming.used += span.len
        else:
            incoming.kept_count += 1
            zmq_msg_init(frame + 1)
    return True


cdef inline int receive_frame(void *handle, fw_zmq_msg *frame) except -1:
    """NOTHING when there is no message."""
    cdef int problem
    while zmq_msg_recv(frame, handle, FW_ZMQ_DONTWAIT) < 0:
        problem = zmq_errno()
        if problem == EINTR:
            continue
        if problem == EAGAIN:
            return NOTHING
        raise zmq_problem(problem)
    return RECEIVED


cdef void close_frames(Incoming *incoming) noexcept:
    """Of one message: the place of the next is empty."""
    cdef Py_ssize_t i
    if incoming.room:
        for i in range(incoming.kept_count + 1):
            zmq_msg_close(&incoming.kept[i])
        zmq_msg_init(incoming.kept)
    incoming.kept_count = 0
    incoming.count = 0
    incoming.used = 0
    incoming.whole = False


cdef object zmq_problem(int number):
    if number in (zmq.ENOTSOCK, zmq.ETERM):
        return SocketClosed("the ZMQ socket or its context is closed")
    return zmq.ZMQError(number)


cdef void *handle_of(object socket) except NULL:
    """The socket's handle now; it must not be kept, the socket may be closed before the next call."""
    cdef size_t handle = socket.underlying
    if handle == 0:
        raise SocketClosed("the ZMQ socket is closed")
    return <void *>handle


def drain(socket, str channel, Signer signer not None, *, Py_ssize_t max_messages=DRAIN_MESSAGES,
          size_t max_bytes=DRAIN_BYTES, bint permissive=False):
    # The GIL stays: a drain is over in microseconds, taking the GIL back from a busy thread can take milliseconds.
    cdef Incoming *incoming
    if not direct_zmq:
        return drain_by_pyzmq(socket, channel, signer, max_messages, max_bytes, permissive)
    incoming = signer.unread if signer.unread != NULL else take_spare()
    signer.unread = NULL
    try:
        return drain_directly(socket, channel, signer, max_messages, max_bytes, permissive, incoming)
    finally:
        if incoming.count and signer.unread == NULL:
            signer.unread = incoming
        else:
            give_back(incoming)


cdef Batch drain_directly(socket, str channel, Signer signer, Py_ssize_t max_messages, size_t max_bytes,
                          bint permissive, Incoming *incoming):
    cdef Batch batch = None
    cdef void *handle = NULL
    cdef bint may_be_closed = True      # Python code has run since its handle was read
    while True:
        try:
            if may_be_closed:
                handle = handle_of(socket)
            if not receive_message(handle, incoming):
                return batch
            may_be_closed = batch is None   # making it may collect garbage
            if batch is None:
                batch = new_batch(channel)
                counted.batches += 1
            batch.add_zmq(signer, permissive, incoming)
        except MemoryError:
            # What was received is not lost for it, nor what is being received.
            if batch is None or batch.is_empty():
                raise
            batch.more = True
            return batch
        except BaseException as error:
            close_frames(incoming)
            if batch is None or not isinstance(error, (SocketClosed, zmq.ZMQError)):
                raise
            batch.more = True  # the next drain says it again
            return batch
        close_frames(incoming)
        may_be_closed |= signer.runs_python() or batch.reasons is not None or batch.store.kept is not None
        if batch.spent(max_messages, max_bytes):
            counted.budget_hits += 1
            batch.more = True
            return batch


cdef Batch drain_by_pyzmq(socket, str channel, Signer signer, Py_ssize_t max_messages, size_t max_bytes,
                          bint permissive):
    cdef Batch batch = None
    while True:
        try:
            if signer.unread_frames is None:
                signer.unread_frames = socket.recv_multipart(zmq.DONTWAIT)
            if batch is None:
                batch = new_batch(channel)
                counted.batches += 1
            batch.add_python(signer, permissive, signer.unread_frames)
        except zmq.Again:
            return batch
        except MemoryError:
            if batch is None or batch.is_empty():
                raise
            batch.more = True
            return batch
        except zmq.ZMQError as error:
            if batch is None:
                raise zmq_problem(error.errno) from None
            batch.more = True
            return batch
        except BaseException:
            signer.unread_frames = None
            raise
        signer.unread_frames = None
        if batch.spent(max_messages, max_bytes):
            counted.budget_hits += 1
            batch.more = True
            return batch


def receive_and_drop(socket):
    cdef Incoming *incoming
    cdef Py_ssize_t dropped = 0
    if not direct_zmq:
        raise RuntimeError("libzmq's own functions are not in use")
    incoming = take_spare()
    try:
        while receive_message(handle_of(socket), incoming):
            close_frames(incoming)
            dropped += 1
        return dropped
    finally:
        give_back(incoming)


def batch_of(str channel, messages, Signer signer not None, *, bint permissive=False):
    cdef Batch batch = new_batch(channel)
    for frames in messages:
        batch.add_python(signer, permissive, frames)
    return batch

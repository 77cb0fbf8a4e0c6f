# The two WebSocket protocols of kernels: v1 (offsets) and the default one (JSON, or JSON and buffers behind offsets).

from fastwire.errors import MessageError

DELIMITER = b"<IDS|MSG>"

cdef enum:
    V1
    LEGACY
    PIECES = 13     # of a message's JSON text: seven fixed ones around six values
    MAX_OFFSETS = 65536     # of a client's message: each part costs far more than the few bytes that declare it

cdef const char *NO_MEMORY = "there is no memory for its parts"


cdef int protocol_of(object protocol) except -1:
    if protocol is None:
        return LEGACY
    if protocol == PROTOCOL_V1:
        return V1
    raise ValueError(f"unknown protocol {protocol!r}: None or {PROTOCOL_V1!r}")


cdef inline void store_le64(char *p, uint64_t value) noexcept nogil:
    cdef int i
    for i in range(8):
        p[i] = <char>(value >> (8 * i))


cdef inline uint64_t load_le64(const uint8_t *p) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(8):
        value |= <uint64_t>p[i] << (8 * i)
    return value


cdef inline void store_be32(char *p, uint32_t value) noexcept nogil:
    p[0] = <char>(value >> 24)
    p[1] = <char>(value >> 16)
    p[2] = <char>(value >> 8)
    p[3] = <char>value


cdef inline uint32_t load_be32(const uint8_t *p) noexcept nogil:
    return (<uint32_t>p[0] << 24) | (<uint32_t>p[1] << 16) | (<uint32_t>p[2] << 8) | p[3]


def split_identities(frames):
    frames = list(frames)
    for i, frame in enumerate(frames):
        if len(frame) == 9 and bytes(frame) == DELIMITER:
            break
    else:
        raise no_delimiter()
    parts = frames[i + 2:]
    if len(parts) < 4:
        raise need_four(len(parts))
    return [bytes(identity) for identity in frames[:i]], bytes(frames[i + 1]), parts


cdef object no_delimiter():
    return MalformedMessage("the multipart message has no <IDS|MSG> delimiter")


# -- v1 --

cdef inline size_t v1_table_size(Py_ssize_t parts) noexcept nogil:
    return 8 * (<size_t>parts + 3)


cdef void v1_table(char *out, size_t channel_length, const fw_span *parts, Py_ssize_t count) noexcept nogil:
    """The number of offsets, then where channel and each part begin and the last one ends."""
    cdef uint64_t offset = v1_table_size(count)
    cdef Py_ssize_t i
    store_le64(out, <uint64_t>count + 2)
    store_le64(out + 8, offset)
    offset += channel_length
    store_le64(out + 16, offset)
    for i in range(count):
        offset += parts[i].len
        store_le64(out + 24 + 8 * i, offset)


def encode_v1(str channel, parts):
    cdef Views views = Views(parts)
    cdef bytes name = channel.encode()
    cdef size_t table = v1_table_size(views.count)
    cdef size_t size = table + PyBytes_GET_SIZE(name)
    cdef Py_ssize_t i
    cdef bytes message
    cdef char *out
    for i in range(views.count):
        size += views.spans[i].len
    message = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
    out = PyBytes_AS_STRING(message)
    v1_table(out, PyBytes_GET_SIZE(name), views.spans, views.count)
    memcpy(out + table, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
    out += table + PyBytes_GET_SIZE(name)
    for i in range(views.count):
        memcpy(out, views.spans[i].ptr, views.spans[i].len)
        out += views.spans[i].len
    return message


cdef const char *v1_split(fw_span payload, uint64_t most, fw_span *channel, Spans *parts) noexcept nogil:
    """What is wrong with it, or NULL. It may have ``most`` offsets."""
    cdef const uint8_t *p = <const uint8_t *>payload.ptr
    cdef uint64_t count, begin, end, i
    if payload.len < 8:
        return "it is shorter than its first offset"
    count = load_le64(p)
    if count < 6:
        return "it has fewer than six offsets (a channel and four parts)"
    if count > payload.len // 8 - 1:
        return "it declares more offsets than it has bytes for"
    if count > most:
        return "it has more than 65,536 offsets"
    begin = load_le64(p + 8)
    if begin < 8 * (count + 1):
        return "its channel begins inside the offsets"
    for i in range(1, count):
        end = load_le64(p + 8 * (i + 1))
        if end < begin or end > payload.len:
            return "its offsets run backwards or past its end"
        if i == 1:
            channel.ptr = p + begin
            channel.len = end - begin
        elif spans_add(parts, p + begin, end - begin):
            return NO_MEMORY
        begin = end
    if not fw_utf8_valid(<const uint8_t *>channel.ptr, channel.len):
        return "its channel is not UTF-8"
    return NULL


cdef object malformed(const char *problem):
    return MalformedMessage("a client's message was refused: " + problem.decode())


cdef object refusal(const char *problem):
    """Of what was found while a message was taken apart; that memory ran out is not its sender's fault."""
    return MemoryError() if problem == NO_MEMORY else malformed(problem)


def decode_v1(payload):
    cdef Py_buffer held
    cdef fw_span span, channel
    cdef Spans parts
    cdef const char *problem
    if isinstance(payload, str):
        raise malformed("the v1 protocol has binary frames only")
    memset(&parts, 0, sizeof(parts))
    span_of(payload, &held, &span)
    try:
        problem = v1_split(span, MAX_OFFSETS, &channel, &parts)
        if problem != NULL:
            raise refusal(problem)
        return span_bytes(channel).decode(), parts_list(&parts)
    finally:
        free(parts.items)
        release(&held)


cdef list parts_list(Spans *parts):
    cdef size_t i
    return [span_bytes(parts.items[i]) for i in range(parts.count)]


# -- the default protocol, kernel to client --

cdef inline fw_span fixed(const char *text, size_t length) noexcept nogil:
    cdef fw_span span
    span.ptr = text
    span.len = length
    return span


cdef void legacy_pieces(fw_span *out, const fw_span *parts, const Header *header, fw_span tail) noexcept nogil:
    out[0] = fixed(b'{"header": ', 11)
    out[1] = parts[0]
    out[2] = fixed(b', "msg_id": ', 12)
    out[3] = header.msg_id
    out[4] = fixed(b', "msg_type": ', 14)
    out[5] = header.msg_type
    out[6] = fixed(b', "parent_header": ', 19)
    out[7] = parts[1]
    out[8] = fixed(b', "metadata": ', 14)
    out[9] = parts[2]
    out[10] = fixed(b', "content": ', 13)
    out[11] = parts[3]
    out[12] = tail


cdef bytes legacy_tail(str channel, bint has_buffers):
    """What closes a message's JSON text; in the binary form the buffers follow it."""
    buffers = "" if has_buffers else ', "buffers": []'
    return f'{buffers}, "channel": {json.dumps(channel)}}}'.encode()


cdef dict known_channels = {}


cdef tuple channel_bytes(str channel):
    """The channel's name, and what closes a message's JSON text without and with buffers."""
    if channel not in known_channels:
        if len(known_channels) >= 64:
            known_channels.clear()
        known_channels[channel] = (channel.encode(), legacy_tail(channel, False), legacy_tail(channel, True))
    return known_channels[channel]


cdef struct Tails:
    fw_span channel
    fw_span text
    fw_span binary

# Of the channels that kernels have, at their numbers.
cdef Tails named_tails[ELSEWHERE]
cdef list named_texts = [channel_bytes(name) for name in CHANNELS[:ELSEWHERE]]


cdef Tails tails_in(tuple texts) except *:
    cdef Tails tails
    cdef bytes channel, text, binary
    channel, text, binary = texts
    tails.channel = fixed(PyBytes_AS_STRING(channel), PyBytes_GET_SIZE(channel))
    tails.text = fixed(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    tails.binary = fixed(PyBytes_AS_STRING(binary), PyBytes_GET_SIZE(binary))
    return tails


def _name_tails():
    cdef int number
    for number in range(ELSEWHERE):
        named_tails[number] = tails_in(named_texts[number])


_name_tails()


cdef tuple tails_of(int number, str channel, Tails *tails):
    """`channel_bytes` as spans; what is returned keeps them there."""
    cdef tuple texts = None
    if number < ELSEWHERE:
        tails[0] = named_tails[number]
    else:
        texts = channel_bytes(channel)
        tails[0] = tails_in(texts)
    return texts


cdef bint four_are_utf8(const fw_span *parts) noexcept nogil:
    cdef int i
    for i in range(4):
        if not fw_utf8_valid(<const uint8_t *>parts[i].ptr, parts[i].len):
            return False
    return True


cdef list four_as_utf8(const fw_span *parts):
    """As jupyter_client reads them: what is not UTF-8 becomes U+FFFD."""
    cdef int i
    return [span_bytes(parts[i]).decode("utf-8", "replace").encode() for i in range(4)]


cdef bint any_blank(const fw_span *parts) noexcept nogil:
    cdef int i
    for i in range(1, 4):
        if is_blank(parts[i]):
            return True
    return False


cdef size_t write_pieces(char *out, const fw_span *pieces, int count) noexcept nogil:
    cdef char *start = out
    cdef int i
    for i in range(count):
        memcpy(out, pieces[i].ptr, pieces[i].len)
        out += pieces[i].len
    return out - start


cdef size_t sum_of(const fw_span *spans, Py_ssize_t count) noexcept nogil:
    cdef size_t total = 0
    cdef Py_ssize_t i
    for i in range(count):
        total += spans[i].len
    return total


cdef void legacy_table(char *out, size_t text_length, const fw_span *buffers, Py_ssize_t count) noexcept nogil:
    """The number of blobs (the text and the buffers), then where each begins."""
    cdef uint64_t offset = 4 * (<uint64_t>count + 2)
    cdef Py_ssize_t i
    store_be32(out, <uint32_t>count + 1)
    store_be32(out + 4, <uint32_t>offset)
    offset += text_length
    for i in range(count):
        store_be32(out + 8 + 4 * i, <uint32_t>offset)
        offset += buffers[i].len


cdef object blank_part():
    return MalformedMessage("parent_header, metadata and content must be JSON; one of them is empty")


def encode_legacy(str channel, parts):
    cdef Views views = Views(parts)
    cdef Header header
    cdef fw_span pieces[PIECES]
    cdef Py_ssize_t buffers = views.count - 4
    cdef bytes tail
    if views.count < 4:
        raise need_four(views.count)
    # Text is checked as Python decodes it.
    if buffers and not four_are_utf8(views.spans):
        return encode_legacy(channel, four_as_utf8(views.spans) + list(views.parts)[4:])
    if any_blank(views.spans):
        raise blank_part()
    if scan_header(views.spans[0], &header) == NOT_JSON or not names_message(&header):
        raise bad_header()
    tail = channel_bytes(channel)[2 if buffers else 1]
    legacy_pieces(pieces, views.spans, &header, fixed(PyBytes_AS_STRING(tail), PyBytes_GET_SIZE(tail)))
    if buffers:
        return legacy_binary(pieces, views.spans + 4, buffers)
    try:
        return legacy_text(pieces)
    except UnicodeDecodeError:
        return encode_legacy(channel, four_as_utf8(views.spans))


cdef str legacy_text(const fw_span *pieces):
    cdef size_t size = sum_of(pieces, PIECES)
    cdef char *out = <char *>malloc(size)
    if out == NULL:
        raise MemoryError
    try:
        write_pieces(out, pieces, PIECES)
        return PyUnicode_DecodeUTF8(out, <Py_ssize_t>size, NULL)
    finally:
        free(out)


cdef bytes legacy_binary(const fw_span *pieces, const fw_span *buffers, Py_ssize_t count):
    cdef size_t table = 4 * (<size_t>count + 2)
    cdef size_t text = sum_of(pieces, PIECES)
    cdef size_t size = table + text + sum_of(buffers, count)
    cdef bytes message
    cdef char *out
    if size > 0xFFFFFFFFu:
        raise MalformedMessage("a message with buffers is at most 4 GiB in the default protocol; use v1")
    message = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
    out = PyBytes_AS_STRING(message)
    legacy_table(out, text, buffers, count)
    out += table
    out += write_pieces(out, pieces, PIECES)
    write_pieces(out, buffers, <int>count)
    return message


# -- the default protocol, client to kernel --

cdef struct Message:
    fw_span channel     # a JSON value with its quotes in the default protocol; a NULL ptr means shell
    bint text_content   # content is a JSON string that holds the JSON text
    Spans parts         # header, parent_header, metadata, content, buffers


cdef bint is_null(fw_span value) noexcept nogil:
    return value.len == 4 and memcmp(value.ptr, b"null", 4) == 0


cdef bint holds_nothing(fw_span value) noexcept nogil:
    """null, or an empty array, object or string: jupyter_client's `Session` iterates over what is there."""
    cdef const uint8_t *first = <const uint8_t *>value.ptr
    cdef const uint8_t *end = first + value.len
    if first[0] == 34:
        return value.len == 2
    if first[0] == 91 or first[0] == 123:
        return skip_space(first + 1, end) == end - 1
    return is_null(value)


cdef const char *legacy_json(fw_span text, bint binary, Message *message) noexcept nogil:
    """Finds the four parts in a message's JSON text. Returns what is wrong with it, or NULL."""
    cdef Members members
    cdef Member m
    cdef fw_span found[4]
    cdef fw_span buffers
    cdef int state, i
    cdef uint8_t first
    memset(found, 0, sizeof(found))
    memset(&buffers, 0, sizeof(buffers))
    message.channel.ptr = NULL
    if members_of(&members, text) == NOT_JSON:
        return "it is not a JSON object"
    while True:
        state = next_member(&members, &m)
        if state == NOT_JSON:
            return "it is not valid JSON"
        if state == NO_MORE:
            break
        if spells(m.key, b"header", 6):
            found[0] = m.value
        elif spells(m.key, b"parent_header", 13):
            found[1] = m.value
        elif spells(m.key, b"metadata", 8):
            found[2] = m.value
        elif spells(m.key, b"content", 7):
            found[3] = m.value
        elif spells(m.key, b"channel", 7):
            message.channel = m.value
        elif spells(m.key, b"buffers", 7):
            buffers = m.value
    if found[0].ptr == NULL or (<const uint8_t *>found[0].ptr)[0] != 123:
        return "it has no header, or one that is not an object"
    if found[1].ptr == NULL or found[2].ptr == NULL:
        return "parent_header or metadata is missing"
    if buffers.ptr != NULL and not binary and not holds_nothing(buffers):
        return "buffers travel in binary frames only"
    if message.channel.ptr != NULL and is_null(message.channel):
        message.channel.ptr = NULL
    if found[3].ptr == NULL or is_null(found[3]):
        found[3] = fixed(b"{}", 2)
    first = (<const uint8_t *>found[3].ptr)[0]
    message.text_content = first == 34
    if first != 123 and first != 34:
        return "content must be an object"
    for i in range(4):
        if spans_add(&message.parts, found[i].ptr, found[i].len):
            return NO_MEMORY
    return NULL


cdef const char *legacy_split(fw_span payload, Message *message) noexcept nogil:
    """The binary form: blobs behind big-endian offsets, the first of them the JSON text."""
    cdef const uint8_t *p = <const uint8_t *>payload.ptr
    cdef uint64_t count, begin, end, i
    cdef fw_span text
    cdef const char *problem
    if payload.len < 8:
        return "it is shorter than its first offset"
    count = load_be32(p)
    if count < 1 or count > payload.len // 4 - 1:
        return "it declares more blobs than it has bytes for, or none"
    if count > MAX_OFFSETS:
        return "it has more than 65,536 offsets"
    begin = load_be32(p + 4)
    if begin < 4 * (count + 1):
        return "its JSON text begins inside the offsets"
    for i in range(1, count + 1):
        end = load_be32(p + 4 * (i + 1)) if i < count else payload.len
        if end < begin or end > payload.len:
            return "its offsets run backwards or past its end"
        if i == 1:
            text.ptr = p + begin
            text.len = end - begin
            if not fw_utf8_valid(<const uint8_t *>text.ptr, text.len):
                return "its JSON text is not UTF-8"
            problem = legacy_json(text, True, message)
            if problem != NULL:
                return problem
        elif spans_add(&message.parts, p + begin, end - begin):
            return NO_MEMORY
        begin = end
    return NULL


cdef const char *v1_message(fw_span payload, Message *message) noexcept nogil:
    message.text_content = False
    return v1_split(payload, MAX_OFFSETS, &message.channel, &message.parts)


cdef bytes content_of_text(fw_span content):
    """The JSON text inside a JSON string (Session.serialize takes content that is packed already)."""
    text = unescaped(content)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


cdef const uint8_t *half_pair(const uint8_t *p, const uint8_t *end) noexcept nogil:
    """The first escape in a JSON text that is half of a surrogate pair without the other, or NULL."""
    cdef int unit
    while True:
        p = <const uint8_t *>memchr(p, 92, end - p)
        if p == NULL or end - p < 6:  # a content that is text need not be JSON
            return NULL
        unit = hex_four(p + 2, end) if p[1] == 117 else 0
        if unit >= 0xD800 and unit < 0xDC00 and end - p >= 12 and p[6] == 92 and p[7] == 117 and is_low(p + 8, end):
            p += 12
        elif unit >= 0xD800 and unit < 0xE000:
            return p
        else:
            p += 2


cdef inline bint is_low(const uint8_t *digits, const uint8_t *end) noexcept nogil:
    return hex_four(digits, end) & ~0x3FF == 0xDC00


cdef bytes with_whole_pairs(fw_span *text):
    """JSON may spell half of a surrogate pair, kernels cannot read it: IPython's cell had no end. It becomes U+FFFD, in
    a copy that the caller keeps; None where there is none."""
    cdef const uint8_t *found = half_pair(<const uint8_t *>text.ptr, <const uint8_t *>text.ptr + text.len)
    cdef bytes copy
    cdef char *p
    if found == NULL:
        return None
    copy = span_bytes(text[0])
    p = PyBytes_AS_STRING(copy) + (found - <const uint8_t *>text.ptr)
    text[0] = fixed(PyBytes_AS_STRING(copy), text.len)
    while p != NULL:
        memcpy(p, b"\\ufffd", 6)
        p = <char *>half_pair(<const uint8_t *>p + 6, <const uint8_t *>text.ptr + text.len)
    return copy


cdef list mend(Message *message):
    """What a client may say and a kernel cannot read is put right. Keep what this returns as long as the parts."""
    cdef list kept = None
    cdef bytes text
    cdef int i
    if message.text_content:
        text = content_of_text(message.parts.items[3])
        message.parts.items[3] = fixed(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        kept = [text]
    for i in range(4):
        text = with_whole_pairs(&message.parts.items[i])
        if text is not None:
            kept = (kept or []) + [text]
    return kept


cdef object text_span(str text, fw_span *span):
    """Where a text's UTF-8 is; the object that keeps it there."""
    cdef bytes data
    cdef Py_ssize_t length
    cdef int kind
    if PyUnicode_IS_ASCII(text):
        span[0] = fixed(<const char *>PyUnicode_1BYTE_DATA(text), PyUnicode_GET_LENGTH(text))
        return text
    length = PyUnicode_GET_LENGTH(text)
    kind = PyUnicode_KIND(text)
    data = PyBytes_FromStringAndSize(NULL, length * min(kind + 1, 4))
    length = fw_utf8_of(<uint8_t *>PyBytes_AS_STRING(data), PyUnicode_DATA(text), length, kind)
    if length < 0:
        raise malformed("it has a lone surrogate")
    span[0] = fixed(PyBytes_AS_STRING(data), length)
    return data


cdef str channel_of(fw_span channel, bint quoted):
    if channel.ptr == NULL:
        return "shell"
    if quoted and is_string(channel):
        return unescaped(channel)
    return span_bytes(channel).decode("utf-8", "replace")


def decode_legacy(payload):
    cdef Py_buffer held
    cdef fw_span span
    cdef Message message
    cdef const char *problem
    cdef bint binary = not isinstance(payload, str)
    if binary:
        span_of(payload, &held, &span)
    else:
        payload = text_span(payload, &span)
        hold_nothing(&held)
    memset(&message, 0, sizeof(message))
    try:
        problem = legacy_split(span, &message) if binary else legacy_json(span, False, &message)
        if problem != NULL:
            raise refusal(problem)
        kept = mend(&message)  # noqa: F841 - the parts lie in it
        return channel_of(message.channel, True), parts_list(&message.parts)
    finally:
        free(message.parts.items)
        release(&held)

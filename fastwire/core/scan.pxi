# A JSON scanner that finds where values begin and end; it builds nothing. It takes what Python's json.loads takes.

cdef enum:
    MAX_DEPTH = 1000
    DEPTH_WORDS = 16    # of 64 bits, one bit a level: set for an object, clear for an array


cdef inline const uint8_t *skip_space(const uint8_t *p, const uint8_t *end) noexcept nogil:
    while p < end and p[0] <= 0x20 and (p[0] == 0x20 or p[0] == 0x0A or p[0] == 0x0D or p[0] == 0x09):
        p += 1
    return p


cdef inline int hex_digit(uint8_t c) noexcept nogil:
    if c >= 48 and c <= 57:
        return c - 48
    c |= 0x20
    if c >= 97 and c <= 102:
        return c - 87
    return -1


cdef inline int hex_four(const uint8_t *p, const uint8_t *end) noexcept nogil:
    cdef int value = 0
    cdef int i, digit
    if end - p < 4:
        return -1
    for i in range(4):
        digit = hex_digit(p[i])
        if digit < 0:
            return -1
        value = value * 16 + digit
    return value


cdef inline const uint8_t *skip_string(const uint8_t *p, const uint8_t *end) noexcept nogil:
    """``p`` behind the opening quote; returns behind the closing one, NULL if it is no string."""
    p = fw_json_plain(p, end)
    if p < end and p[0] == 34:  # nearly always
        return p + 1
    return skip_escapes(p, end)


cdef const uint8_t *skip_escapes(const uint8_t *p, const uint8_t *end) noexcept nogil:
    """`skip_string` from the middle of a string on."""
    while True:
        p = fw_json_plain(p, end)
        if p == end or p[0] < 0x20:
            return NULL
        if p[0] == 34:
            return p + 1
        p += 1
        if p == end:
            return NULL
        if p[0] == 117:
            if hex_four(p + 1, end) < 0:
                return NULL
            p += 5
        elif memchr(b'"\\/bfnrt', p[0], 8) != NULL:
            p += 1
        else:
            return NULL


cdef inline const uint8_t *skip_digits(const uint8_t *p, const uint8_t *end) noexcept nogil:
    """NULL unless there is at least one."""
    cdef const uint8_t *start = p
    while p < end and p[0] >= 48 and p[0] <= 57:
        p += 1
    return p if p > start else NULL


cdef enum:
    ALWAYS_INTEGER = 640    # digits that Python's limit allows at the least (sys.int_info.str_digits_check_threshold)


cdef bint too_many_digits(Py_ssize_t digits) noexcept with gil:
    """For an integer in Python now: a program may change the limit, 0 is none."""
    cdef Py_ssize_t most
    try:
        most = sys.get_int_max_str_digits()
    except MemoryError:
        return False
    return most and digits > most


cdef const uint8_t *skip_number(const uint8_t *p, const uint8_t *end) noexcept nogil:
    cdef const uint8_t *digits
    if p[0] == 45:
        p += 1
        if end - p >= 8 and memcmp(p, b"Infinity", 8) == 0:
            return p + 8
    digits = p
    if p < end and p[0] == 48:
        p += 1
    else:
        p = skip_digits(p, end)
        if p == NULL:
            return NULL
    if p == end or (p[0] != 46 and (p[0] | 0x20) != 101):
        if p - digits > ALWAYS_INTEGER and too_many_digits(p - digits):
            return NULL
        return p
    if p[0] == 46:
        p = skip_digits(p + 1, end)
        if p == NULL:
            return NULL
    if p < end and (p[0] | 0x20) == 101:
        p += 1
        if p < end and (p[0] == 43 or p[0] == 45):
            p += 1
        p = skip_digits(p, end)
    return p


cdef inline const uint8_t *skip_word(
    const uint8_t *p, const uint8_t *end, const char *word, Py_ssize_t length
) noexcept nogil:
    return p + length if end - p >= length and memcmp(p, word, length) == 0 else NULL


cdef const uint8_t *skip_scalar(const uint8_t *p, const uint8_t *end) noexcept nogil:
    cdef uint8_t c = p[0]
    if c == 34:
        return skip_string(p + 1, end)
    if c == 45 or (c >= 48 and c <= 57):
        return skip_number(p, end)
    if c == 116:
        return skip_word(p, end, b"true", 4)
    if c == 102:
        return skip_word(p, end, b"false", 5)
    if c == 110:
        return skip_word(p, end, b"null", 4)
    if c == 78:
        return skip_word(p, end, b"NaN", 3)
    if c == 73:
        return skip_word(p, end, b"Infinity", 8)
    return NULL


cdef const uint8_t *skip_key(const uint8_t *p, const uint8_t *end) noexcept nogil:
    """``p`` at a key's quote; returns behind its colon, at the value."""
    if p == end or p[0] != 34:
        return NULL
    p = skip_string(p + 1, end)
    if p == NULL:
        return NULL
    p = skip_space(p, end)
    if p == end or p[0] != 58:
        return NULL
    return skip_space(p + 1, end)


cdef const uint8_t *skip_value(const uint8_t *p, const uint8_t *end, int depth) noexcept nogil:
    """``p`` at a value that stands ``depth`` levels deep; returns behind it, NULL if there is none."""
    cdef uint64_t objects[DEPTH_WORDS]
    cdef int base = depth
    cdef bint in_object
    if p < end and p[0] == 34:
        return skip_string(p + 1, end)
    while True:
        if p == NULL or p == end:
            return NULL
        if p[0] == 123 or p[0] == 91:
            if depth == MAX_DEPTH:
                return NULL
            if depth == base:
                memset(objects, 0, sizeof(objects))
            in_object = p[0] == 123
            if in_object:
                objects[depth >> 6] |= (<uint64_t>1) << (depth & 63)
            else:
                objects[depth >> 6] &= ~((<uint64_t>1) << (depth & 63))
            depth += 1
            p = skip_space(p + 1, end)
            if p == end:
                return NULL
            if p[0] != (125 if in_object else 93):
                if in_object:
                    p = skip_key(p, end)
                continue
        else:
            p = skip_scalar(p, end)
            if p == NULL:
                return NULL
            if depth == base:
                return p
            p = skip_space(p, end)
        # Behind a value, or at the bracket of an empty container: close what ends here, then on to the next value.
        while True:
            if p == end:
                return NULL
            in_object = (objects[(depth - 1) >> 6] >> ((depth - 1) & 63)) & 1
            if p[0] != (125 if in_object else 93):
                break
            p += 1
            depth -= 1
            if depth == base:
                return p
            p = skip_space(p, end)
        if p[0] != 44:
            return NULL
        p = skip_space(p + 1, end)
        if in_object:
            p = skip_key(p, end)


# -- the members of one object --

cdef struct Member:
    fw_span key         # between the quotes, as spelled
    fw_span value       # the JSON text of the value, without space around it

cdef struct Members:
    const uint8_t *p
    const uint8_t *end
    bint first

cdef enum:
    MEMBER = 1
    NO_MORE = 0
    NOT_JSON = -1


cdef int members_of(Members *m, fw_span text) noexcept nogil:
    """MEMBER when ``text`` begins an object, else NOT_JSON."""
    m.end = <const uint8_t *>text.ptr + text.len
    m.p = skip_space(<const uint8_t *>text.ptr, m.end)
    m.first = True
    if m.p == m.end or m.p[0] != 123:
        return NOT_JSON
    m.p = skip_space(m.p + 1, m.end)
    return MEMBER


cdef int end_of_text(Members *m) noexcept nogil:
    m.p = skip_space(m.p + 1, m.end)
    return NO_MORE if m.p == m.end else NOT_JSON


cdef int next_member(Members *m, Member *member) noexcept nogil:
    """MEMBER, NO_MORE (the object is closed and nothing follows it) or NOT_JSON."""
    cdef const uint8_t *start
    if m.p == m.end:
        return NOT_JSON
    if m.first:
        m.first = False
        if m.p[0] == 125:
            return end_of_text(m)
    else:
        if m.p[0] == 125:
            return end_of_text(m)
        if m.p[0] != 44:
            return NOT_JSON
        m.p = skip_space(m.p + 1, m.end)
    if m.p == m.end or m.p[0] != 34:
        return NOT_JSON
    start = m.p + 1
    m.p = skip_string(start, m.end)
    if m.p == NULL:
        return NOT_JSON
    member.key.ptr = start
    member.key.len = m.p - 1 - start
    m.p = skip_space(m.p, m.end)
    if m.p == m.end or m.p[0] != 58:
        return NOT_JSON
    start = skip_space(m.p + 1, m.end)
    m.p = skip_string(start + 1, m.end) if start < m.end and start[0] == 34 else skip_value(start, m.end, 1)
    if m.p == NULL:
        return NOT_JSON
    member.value.ptr = start
    member.value.len = m.p - start
    m.p = skip_space(m.p, m.end)
    return MEMBER


cdef inline bint spells(fw_span text, const char *name, size_t length) noexcept nogil:
    """Whether the inside of a JSON string, escapes undone, is the ASCII ``name``."""
    if text.len == length:
        return memcmp(text.ptr, name, length) == 0
    return text.len > length and spells_escaped(text, name, length)


cdef bint spells_escaped(fw_span text, const char *name, size_t length) noexcept nogil:
    """`spells` for a text that is longer than the name."""
    cdef const uint8_t *p = <const uint8_t *>text.ptr
    cdef const uint8_t *end = p + text.len
    cdef size_t i
    cdef int c
    if p[0] != <uint8_t>name[0] and p[0] != 92:
        return False
    for i in range(length):
        if p == end:
            return False
        c = p[0]
        p += 1
        if c == 92:
            c = p[0]
            p += 1
            if c == 117:
                c = hex_four(p, end)
                p += 4
            elif c == 98:
                c = 8
            elif c == 102:
                c = 12
            elif c == 110:
                c = 10
            elif c == 114:
                c = 13
            elif c == 116:
                c = 9
        if c != <uint8_t>name[i]:
            return False
    return p == end


cdef inline bint is_string(fw_span value) noexcept nogil:
    return value.len >= 2 and (<const uint8_t *>value.ptr)[0] == 34


cdef inline fw_span inside(fw_span string) noexcept nogil:
    """A JSON string without its quotes."""
    cdef fw_span text
    text.ptr = <const uint8_t *>string.ptr + 1
    text.len = string.len - 2
    return text


cdef inline bint is_blank(fw_span text) noexcept nogil:
    cdef const uint8_t *end = <const uint8_t *>text.ptr + text.len
    return skip_space(<const uint8_t *>text.ptr, end) == end


cdef inline bint is_escaped(fw_span text) noexcept nogil:
    """Whether something in it is, which Python's json is to read."""
    return text.len > 0 and memchr(text.ptr, 92, text.len) != NULL


cdef object unescaped(fw_span string):
    """The str of a JSON string, quotes included. Bytes that are not UTF-8 become U+FFFD."""
    cdef fw_span text = inside(string)
    if not is_escaped(text):
        return PyUnicode_DecodeUTF8(<const char *>text.ptr, <Py_ssize_t>text.len, b"replace")
    return json.loads(span_bytes(string).decode("utf-8", "replace"))


# -- headers --

cdef struct Header:
    fw_span msg_id      # JSON strings, quotes included; a NULL ptr where there is none
    fw_span msg_type
    fw_span version
    uint32_t date_at    # where in it its date is, whatever that may be; its size is 0 where there is none
    uint32_t date_size


cdef int scan_header(fw_span text, Header *header) noexcept nogil:
    """MEMBER for a JSON object (what it has is in ``header``), else NOT_JSON."""
    cdef Members members
    cdef Member m
    cdef int found
    memset(header, 0, sizeof(Header))
    if members_of(&members, text) == NOT_JSON:
        return NOT_JSON
    while True:
        found = next_member(&members, &m)
        if found == NO_MORE:
            return MEMBER
        if found == NOT_JSON:
            return NOT_JSON
        if spells(m.key, b"msg_id", 6):
            header.msg_id = m.value
        elif spells(m.key, b"msg_type", 8):
            header.msg_type = m.value
        elif spells(m.key, b"version", 7):
            header.version = m.value
        elif spells(m.key, b"date", 4):
            header.date_at = <uint32_t>(<const char *>m.value.ptr - <const char *>text.ptr)
            header.date_size = <uint32_t>m.value.len


cdef bint names_message(const Header *header) noexcept nogil:
    return (
        header.msg_id.ptr != NULL and is_string(header.msg_id)
        and header.msg_type.ptr != NULL and is_string(header.msg_type)
    )


cdef bint is_version_5(const Header *header) noexcept nogil:
    cdef const uint8_t *p
    if header.version.ptr == NULL or not is_string(header.version):
        return False
    p = <const uint8_t *>header.version.ptr
    return p[1] == 53 and (header.version.len == 3 or p[2] == 46)


def header_fields(header):
    cdef Header found
    cdef Py_buffer held
    cdef fw_span text
    span_of(header, &held, &text)
    try:
        if scan_header(text, &found) == NOT_JSON or not names_message(&found):
            raise bad_header()
        return unescaped(found.msg_id), unescaped(found.msg_type)
    finally:
        release(&held)


def check_json(text):
    cdef Py_buffer held
    cdef fw_span span
    cdef const uint8_t *p
    cdef const uint8_t *end
    span_of(text, &held, &span)
    try:
        end = <const uint8_t *>span.ptr + span.len
        p = skip_value(skip_space(<const uint8_t *>span.ptr, end), end, 0)
        if p == NULL or skip_space(p, end) != end or not fw_utf8_valid(<const uint8_t *>span.ptr, span.len):
            raise MalformedMessage("this is not one JSON text")
    finally:
        release(&held)


cdef object bad_header():
    return MalformedMessage("the header must be a JSON object whose msg_id and msg_type are strings")

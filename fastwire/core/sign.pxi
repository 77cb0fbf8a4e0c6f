# HMAC signatures and the history that refuses replays.

import hashlib
import hmac
import secrets

cdef extern from *:
    """
    /* GCC takes a function that only prefetches for one without effect, and leaves its calls out: the asm is one. */
    #define fw_prefetch(p) do { __builtin_prefetch(p); __asm__ volatile (""); } while (0)
    """
    void prefetch "fw_prefetch"(const void *p) noexcept nogil

cdef enum:
    UNSIGNED
    SHA256
    HASHLIB

cdef enum:
    # Without SHA instructions: beyond five blocks OpenSSL's assembly gains more than the calls of hashlib cost, also
    # where it has instructions that this was compiled without.
    OPENSSL_FROM = 5 * 64 - 8
    # The table of the history has at least twice as many slots, and its indexes 32 bits.
    MAX_HISTORY = 1 << 30
    # However much memory the others take, each may remember so many.
    LEAST_HISTORY = 1024
    MOST_SIGNATURE = 128    # bytes: SHA-512's

# The frames of the message that is being received. Small ones are copied behind each other as they come, and the next
# takes their place in libzmq's hands: an eighth less work for libzmq than to keep each, and HMAC reads them in one go.
cdef struct Incoming:
    fw_span *spans
    fw_zmq_msg *kept    # the frames that are not in ``small``, in order, and room for the next
    Py_ssize_t kept_count
    Py_ssize_t count
    Py_ssize_t room     # of spans and kept
    char *small
    size_t used         # of small
    bint whole          # all frames have come


# What `Signer.judge` says of a signature.
cdef enum:
    TRUSTED
    FORGED
    REPLAYED


# The last ``limit`` digests: a ring in the order they came, and an open-addressed table into it. The first eight
# bytes of a keyed digest stand for it: nobody without the key can make two that agree. A kernel has the key, and may
# choose messages whose digests agree in some bits: which bits make a slot, it cannot know.
cdef struct History:
    uint64_t *ring
    uint32_t *table     # index into the ring plus one, 0 is free
    uint32_t mask       # of the table's size, a power of two at least twice the ring's
    uint32_t shift      # of a product's upper bits, as many as make a slot
    uint32_t room       # of the ring
    uint32_t count
    uint32_t oldest
    uint32_t limit


cdef size_t history_bytes_limit = 8 << 20

cdef uint64_t slot_multiplier = int.from_bytes(secrets.token_bytes(8), "little") | 1


cdef inline uint32_t history_home(const History *h, uint64_t digest) noexcept nogil:
    """The slot where a search begins. Multiplicative hashing with a multiplier nobody knows is universal."""
    return <uint32_t>((digest * slot_multiplier) >> h.shift)


cdef inline void history_expect(const History *h, fw_span signature) noexcept nogil:
    """The slot of what a signature claims to be, and that of the oldest, will be looked at: they lie anywhere in what
    caches do not hold, and come while the message is hashed."""
    cdef uint64_t digest
    if h.count and signature.len >= 2 * sizeof(digest):
        fw_unhex(<const char *>signature.ptr, sizeof(digest), <uint8_t *>&digest)
        prefetch(&h.table[history_home(h, digest)])
        prefetch(&h.table[history_home(h, h.ring[h.oldest])])


cdef bint history_has(const History *h, uint64_t digest) noexcept nogil:
    cdef uint32_t slot
    if h.count == 0:
        return False
    slot = history_home(h, digest)
    while h.table[slot]:
        if h.ring[h.table[slot] - 1] == digest:
            return True
        slot = (slot + 1) & h.mask
    return False


cdef void history_index(History *h, uint32_t position) noexcept nogil:
    cdef uint32_t slot = history_home(h, h.ring[position])
    while h.table[slot]:
        slot = (slot + 1) & h.mask
    h.table[slot] = position + 1


cdef void history_forget_oldest(History *h) noexcept nogil:
    """Takes the oldest digest out of the table, moving up those that had to probe past it."""
    cdef uint32_t slot = history_home(h, h.ring[h.oldest])
    cdef uint32_t gap, home
    while h.table[slot] != h.oldest + 1:
        slot = (slot + 1) & h.mask
    gap = slot
    while True:
        slot = (slot + 1) & h.mask
        if h.table[slot] == 0:
            break
        home = history_home(h, h.ring[h.table[slot] - 1])
        if ((slot - home) & h.mask) >= ((slot - gap) & h.mask):
            h.table[gap] = h.table[slot]
            gap = slot
    h.table[gap] = 0


cdef size_t history_size(const History *h) noexcept nogil:
    return h.room * sizeof(uint64_t) + (h.mask + 1) * sizeof(uint32_t) if h.room else 0


cdef bint history_may_grow(const History *h) noexcept nogil:
    """By as much again. Where all have what they may have together, its oldest digest goes instead."""
    if h.count < h.room or h.room >= h.limit:
        return False
    return h.room < LEAST_HISTORY or history_bytes + history_size(h) <= history_bytes_limit


cdef void history_free(History *h) noexcept nogil:
    global history_bytes
    history_bytes -= history_size(h)
    free(h.ring)
    free(h.table)


cdef int history_grow(History *h) noexcept nogil:
    global history_bytes
    cdef uint32_t room = h.room * 2 if h.room else 64
    cdef uint32_t slots = 1
    cdef uint32_t bits = 0
    cdef uint32_t i
    cdef uint64_t *ring
    cdef uint32_t *table
    if room > h.limit:
        room = h.limit
    while slots < 2 * room:
        slots *= 2
        bits += 1
    ring = <uint64_t *>malloc(room * sizeof(uint64_t))
    table = <uint32_t *>calloc(slots, sizeof(uint32_t))
    if ring == NULL or table == NULL:
        free(ring)
        free(table)
        return -1
    if h.count:
        memcpy(ring, h.ring + h.oldest, (h.count - h.oldest) * sizeof(uint64_t))
        memcpy(ring + h.count - h.oldest, h.ring, h.oldest * sizeof(uint64_t))
    history_free(h)
    h.ring = ring
    h.table = table
    h.oldest = 0
    h.mask = slots - 1
    h.shift = 64 - bits
    h.room = room
    history_bytes += history_size(h)
    for i in range(h.count):
        history_index(h, i)
    return 0


cdef uint32_t history_longest_probe(const History *h) noexcept nogil:
    """The most slots that a search for a digest that is there looks at."""
    cdef uint32_t slot, probes, longest = 0
    if h.count == 0:
        return 0
    for slot in range(h.mask + 1):
        if h.table[slot]:
            probes = ((slot - history_home(h, h.ring[h.table[slot] - 1])) & h.mask) + 1
            longest = max(longest, probes)
    return longest


cdef int history_make_room(History *h) noexcept nogil:
    """For one digest more."""
    return history_grow(h) if history_may_grow(h) else 0


cdef void history_add(History *h, uint64_t digest) noexcept nogil:
    """Behind `history_make_room`."""
    cdef uint32_t position
    if h.limit == 0:
        return
    if h.count < h.room:
        position = h.count
        h.count += 1
    else:
        history_forget_oldest(h)
        position = h.oldest
        h.oldest = (h.oldest + 1) % h.room
    h.ring[position] = digest
    history_index(h, position)


def _keyed(bytes key, str signature_scheme):
    """hashlib's HMAC object for a scheme, or ValueError."""
    prefix, _, name = signature_scheme.partition("-")
    digestmod = getattr(hashlib, name, None) if prefix == "hmac" else None
    try:
        keyed = hmac.new(key, digestmod=digestmod)
        if len(keyed.hexdigest()) > MOST_SIGNATURE:
            raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise ValueError(
            f"signature_scheme must be 'hmac-' and the name of a hash in hashlib, got {signature_scheme!r}"
        ) from None
    return keyed


def _inner(bytes key):
    """hashlib's SHA-256 behind HMAC's inner pad (RFC 2104). Its HMAC objects cost three times as much to copy."""
    if len(key) > 64:
        key = hashlib.sha256(key).digest()
    return hashlib.sha256(bytes([byte ^ 0x36 for byte in key.ljust(64, b"\0")]))


@cython.final
cdef class Signer:
    cdef int scheme
    cdef fw_hmac_key key
    cdef object keyed       # of hashlib, to be copied: HMAC, or with `SHA256` its inner hash
    cdef History history
    cdef readonly str signature_scheme
    cdef Incoming *unread       # what a drain received and had no memory for; the next begins with it
    cdef object unread_frames   # the same by pyzmq

    def __init__(self, key, str signature_scheme="hmac-sha256", *, history_size=65536):
        if not 0 <= history_size <= MAX_HISTORY:
            raise ValueError(f"history_size is a number of digests from 0 to 2**30, not {history_size}")
        key = bytes(memoryview(key))
        keyed = _keyed(key, signature_scheme)
        self.signature_scheme = signature_scheme
        self.history.limit = history_size
        self.keyed = keyed
        if not key:
            self.scheme = UNSIGNED
        elif signature_scheme == "hmac-sha256":
            self.scheme = SHA256
            fw_hmac_init(&self.key, <const uint8_t *>PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))
            self.keyed = _inner(key)
        else:
            self.scheme = HASHLIB

    def __dealloc__(self):
        history_free(&self.history)
        if self.unread != NULL:
            free_incoming(self.unread)

    @property
    def history_size(self):
        return self.history.limit

    @property
    def history_length(self):
        return self.history.count

    def fork(self):
        cdef Signer other = Signer.__new__(Signer)
        other.scheme = self.scheme
        other.key = self.key
        other.keyed = self.keyed
        other.signature_scheme = self.signature_scheme
        other.history.limit = self.history.limit
        return other

    cdef bint runs_python(self) noexcept:
        """Whether other threads may run while a message is judged: hashlib releases the GIL."""
        return self.scheme == HASHLIB or (self.scheme == SHA256 and sha_instructions == NULL)

    cdef bytes digest(self, const fw_span *parts):
        """Of four parts, by hashlib."""
        cdef size_t i = 0
        cdef fw_span run
        keyed = self.keyed.copy()
        while i < 4:
            run = fw_next_run(parts, 4, &i)
            if run.len:
                # Not copied: whoever calls holds the bytes until this returns.
                view = PyMemoryView_FromMemory(<char *>run.ptr, <Py_ssize_t>run.len, PyBUF_READ)
                keyed.update(view)
                view.release()
        return keyed.digest()

    cdef int sha256(self, const fw_span *parts, uint8_t *digest) except -1:
        cdef bytes inner
        if sha_instructions == NULL and sum_of(parts, 4) >= OPENSSL_FROM:
            inner = self.digest(parts)
            fw_hmac_outer(&self.key, <const uint8_t *>PyBytes_AS_STRING(inner), digest)
        else:
            fw_hmac(&self.key, parts, 4, digest)
        return 0

    cdef size_t hex_signature(self, const fw_span *parts, char *out) except? 1:
        """Into ``out``, which has room for MOST_SIGNATURE bytes. How many they are."""
        cdef uint8_t digest[32]
        cdef bytes by_hashlib
        if self.scheme == UNSIGNED:
            return 0
        if self.scheme == HASHLIB:
            by_hashlib = self.digest(parts)
            fw_hex(<const uint8_t *>PyBytes_AS_STRING(by_hashlib), PyBytes_GET_SIZE(by_hashlib), out)
            return 2 * PyBytes_GET_SIZE(by_hashlib)
        self.sha256(parts, digest)
        fw_hex(digest, 32, out)
        return 64

    cdef int judge(self, fw_span signature, const fw_span *parts, uint64_t *digest_of) except -1:
        """TRUSTED, FORGED or REPLAYED. Of one that is TRUSTED the digest is to be remembered, and there is room for it:
        until the message has arrived, memory may run out, and it comes again."""
        cdef uint8_t digest[32]
        cdef char expected[64]
        if self.scheme == UNSIGNED:
            return TRUSTED
        if self.scheme == SHA256:
            history_expect(&self.history, signature)
            self.sha256(parts, digest)
            memcpy(digest_of, digest, 8)
            fw_hex(digest, 32, expected)
            if signature.len != 64 or not fw_equal_constant_time(signature.ptr, expected, 64):
                return FORGED
        else:
            raw = self.digest(parts)
            if not hmac.compare_digest(raw.hex().encode(), span_bytes(signature)):
                return FORGED
            memcpy(digest_of, PyBytes_AS_STRING(raw), 8)
        if history_has(&self.history, digest_of[0]):
            return REPLAYED
        if history_make_room(&self.history):
            raise MemoryError
        return TRUSTED

    cdef void remember(self, uint64_t digest) noexcept:
        if self.scheme != UNSIGNED:
            history_add(&self.history, digest)

    def sign(self, parts):
        cdef Views views = Views(parts)
        cdef char signature[MOST_SIGNATURE]
        cdef size_t size
        if views.count < 4:
            raise need_four(views.count)
        size = self.hex_signature(views.spans, signature)
        return signature[:size]

    def verify(self, signature, parts):
        cdef Views views = Views(parts)
        cdef Py_buffer held
        cdef fw_span span
        cdef int verdict
        cdef uint64_t digest = 0
        if views.count < 4:
            raise need_four(views.count)
        span_of(signature, &held, &span)
        try:
            verdict = self.judge(span, views.spans, &digest)
        finally:
            release(&held)
        if verdict != TRUSTED:
            raise signature_error(verdict, span.len)
        self.remember(digest)


def limit_histories(size_t limit):
    global history_bytes_limit
    history_bytes_limit = limit


def longest_probe(Signer signer not None):
    return history_longest_probe(&signer.history)


cdef object signature_error(int verdict, size_t length):
    if verdict == REPLAYED:
        return DuplicateSignature("a message with this signature has been received before")
    if length == 0:
        return InvalidSignature("the message is not signed, but the connection has a key")
    return InvalidSignature("the signature does not match; does the kernel use another key or scheme?")

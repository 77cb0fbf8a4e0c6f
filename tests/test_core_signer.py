"""Signatures: every scheme and length against hmac, and the history that refuses replays."""

import gc
import hashlib
import hmac
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import builders
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.session import Session

from fastwire import _core
from fastwire.errors import DuplicateSignature, InvalidSignature, MalformedMessage

SCHEMES = [f"hmac-{name}" for name in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "blake2b", "sha3_256")]
BLOCK_EDGES = (0, 1, 54, 55, 56, 57, 63, 64, 65, 120, 127, 128, 129, 183, 184, 192, 256, 639, 640, 2047, 2048, 4096)
KEY_LENGTHS = (1, 20, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 1000)
PARTS = [b"{}", b"[]", b"1", b"2"]


def split(data: bytes, places: tuple[int, int, int]) -> list[bytes]:
    first, second, third = sorted(places)
    return [data[:first], data[first:second], data[second:third], data[third:]]


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    return hmac.new(key, data, hashlib.sha256).hexdigest().encode()


def numbered(number: int) -> list[bytes]:
    return [b"%d" % number, b"{}", b"{}", b"{}"]


def outcome(signer: _core.Signer | oracle.Signer, signature: bytes, parts: list[bytes]) -> type | None:
    try:
        return signer.verify(signature, parts)
    except (InvalidSignature, DuplicateSignature) as error:
        return type(error)


# -- sign ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_signs_as_jupyter_client_does(scheme: str, portable: bool) -> None:
    session = Session(key=builders.KEY, signature_scheme=scheme)
    signer = _core.Signer(builders.KEY, scheme)
    rng = random.Random(scheme)
    for length in (*BLOCK_EDGES, 10_000):
        parts = split(rng.randbytes(length), tuple(rng.randint(0, length) for _ in range(3)))
        assert signer.sign(parts) == session.sign(parts)
    assert signer.signature_scheme == scheme


def test_every_length_up_to_200(portable: bool) -> None:
    signer = _core.Signer(builders.KEY)
    for length in range(201):
        data = bytes(range(length))
        assert signer.sign([data, b"", b"", b""]) == hmac_sha256(builders.KEY, data)
        assert signer.sign([b"", b"", b"", data]) == hmac_sha256(builders.KEY, data)


@pytest.mark.parametrize("length", [*BLOCK_EDGES[:-5]])
def test_parts_are_one_text_wherever_they_are_split(length: int, portable: bool) -> None:
    signer = _core.Signer(builders.KEY)
    data = random.Random(length).randbytes(length)
    expected = hmac_sha256(builders.KEY, data)
    for place in range(length + 1):
        assert signer.sign(split(data, (place, length // 2, length))) == expected


@given(key=st.binary(min_size=1, max_size=200), parts=builders.raw_parts, large=st.integers(0, 10_000))
def test_any_key_and_parts(portable: bool, key: bytes, parts: list[bytes], large: int) -> None:
    parts[2] += random.Random(large).randbytes(large)
    assert _core.Signer(key).sign(parts) == hmac_sha256(key, b"".join(parts[:4]))


@pytest.mark.parametrize("scheme", ["hmac-sha256", "hmac-sha512", "hmac-md5"])
def test_keys_shorter_and_longer_than_the_block(scheme: str, portable: bool) -> None:
    for length in KEY_LENGTHS:
        key = bytes(i % 251 for i in range(length))
        for parts in (PARTS, [*PARTS[:3], bytes(3000)]):  # without SHA instructions OpenSSL hashes what is long
            assert _core.Signer(key, scheme).sign(parts) == oracle.Signer(key, scheme).sign(parts)


def test_switching_the_code_under_a_signer_changes_nothing() -> None:
    signer, expected = _core.Signer(builders.KEY), oracle.Signer(builders.KEY).sign(PARTS)
    for portable in (True, False, True):
        _core.force_portable(portable)
        assert signer.sign(PARTS) == expected


class Noted:
    """A hash of hashlib that notes what it is given, its copies too."""

    def __init__(self, made: Any, given: list[int]) -> None:
        self.made, self.given = made, given

    def copy(self) -> "Noted":
        return Noted(self.made.copy(), self.given)

    def update(self, data: bytes) -> None:
        self.given.append(len(data))
        self.made.update(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.made, name)


def test_who_hashes_what(portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never slower than hashlib, whatever the CPU has. With SHA instructions all is ours. Without them five blocks of C
    cost less than hashlib's calls, and from there on OpenSSL hashes, which may have assembly of its own. On a CPU
    without SHA instructions: 1.2 us (hashlib 1.9) for 200 bytes, 2.0 (2.3) for 400, 120.3 (120.7) for 64 KiB; where
    OpenSSL has them: 1.4 (1.5) for 311 bytes, 575 (576) for 1 MiB. `bench/test_core.py` measures it."""
    given: list[int] = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data=b"", **options: Noted(sha256(data, **options), given))
    signer = _core.Signer(builders.KEY)
    monkeypatch.undo()
    del given[:]
    has_instructions = _core.build_info()["sha256"] != "portable"
    for size in (0, 1, 200, 311, 312, 400, 639, 640, 2048, 65_536, 1 << 20):
        parts = [b"h" * (size // 2), b"", b"", b"c" * (size - size // 2)]
        assert signer.sign(parts) == hmac_sha256(builders.KEY, b"".join(parts))
        assert sum(given) == (0 if has_instructions or size < 312 else size)
        del given[:]


def test_signing_many_megabytes(portable: bool) -> None:
    data = bytes(range(256)) * 12_345
    parts = [b"{", data, b"", data[:-7]]
    assert _core.Signer(builders.KEY).sign(parts) == hmac_sha256(builders.KEY, b"".join(parts))


def test_buffers_are_not_signed() -> None:
    signer = _core.Signer(builders.KEY)
    assert signer.sign([*PARTS, b"buffer"]) == signer.sign(PARTS)
    assert signer.verify(signer.sign(PARTS), [*PARTS, b"another"]) is None


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_a_key_a_part_and_a_signature(kind: type) -> None:
    signer, expected = _core.Signer(kind(builders.KEY)), oracle.Signer(builders.KEY).sign(PARTS)
    assert signer.sign([kind(part) for part in PARTS]) == expected
    assert signer.sign(tuple(PARTS)) == expected
    signer.verify(kind(expected), [kind(part) for part in PARTS])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_than_four_parts(count: int) -> None:
    signer = _core.Signer(builders.KEY)
    with pytest.raises(MalformedMessage):
        signer.sign(PARTS[:count])
    with pytest.raises(MalformedMessage):
        signer.verify(b"0" * 64, PARTS[:count])


def test_an_empty_key_signs_nothing_and_accepts_anything() -> None:
    signer = _core.Signer(b"")
    assert signer.sign(PARTS) == b""
    for signature in (b"", b"", b"anything", b"\xff" * 64):
        assert signer.verify(signature, PARTS) is None
    assert signer.history_length == 0


@pytest.mark.parametrize(
    "scheme", ["", "sha256", "hmac", "hmac-", "hmac-sha0", "hmac_sha256", "hmac-new", "HMAC-sha256"]
)
def test_unknown_schemes(scheme: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        _core.Signer(builders.KEY, scheme)


def test_a_hash_whose_signature_is_longer_than_any_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = SimpleNamespace(block_size=128, digest_size=65, update=lambda text: None, hexdigest=lambda: "00" * 65)
    wide.copy = lambda: wide
    wide.digest = lambda: bytes(65)
    monkeypatch.setattr(hashlib, "wide", lambda text=b"": wide, raising=False)
    assert len(hmac.new(b"key", digestmod=hashlib.wide).hexdigest()) == 130
    with pytest.raises(ValueError, match="hmac-wide"):
        _core.Signer(builders.KEY, "hmac-wide")


# -- verify ----------------------------------------------------------------------------------------

WRONG = {
    "empty": lambda good: b"",
    "truncated": lambda good: good[:-1],
    "one digit": lambda good: good[:1],
    "longer": lambda good: good + b"0",
    "doubled": lambda good: good * 2,
    "a zero octet behind": lambda good: good + b"\0",
    "upper case": bytes.upper,
    "not hexadecimal": lambda good: b"g" * len(good),
    "not ASCII": lambda good: b"\xe9" * len(good),
    "raw digest": lambda good: bytes.fromhex(good.decode()),
    "space before": lambda good: b" " + good[1:],
    "first digit": lambda good: bytes([good[0] ^ 1]) + good[1:],
    "last digit": lambda good: good[:-1] + bytes([good[-1] ^ 1]),
}


@pytest.mark.parametrize("scheme", ["hmac-sha256", "hmac-sha512"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_signatures(scheme: str, wrong: object, portable: bool) -> None:
    signer = _core.Signer(b"key 2", scheme)
    good = signer.sign(PARTS)
    assert wrong(good) != good
    with pytest.raises(InvalidSignature):
        signer.verify(wrong(good), PARTS)
    assert signer.history_length == 0
    signer.verify(good, PARTS)


@given(parts=builders.raw_parts, part=st.integers(0, 3), place=st.integers(0, 60), bit=st.integers(0, 7))
def test_one_changed_bit_is_noticed(parts: list[bytes], part: int, place: int, bit: int) -> None:
    signer = _core.Signer(builders.KEY)
    good = signer.sign(parts)
    changed = bytearray(parts[part] + b"x")
    changed[place % len(changed)] ^= 1 << bit
    with pytest.raises(InvalidSignature):
        signer.verify(good, [*parts[:part], changed, *parts[part + 1 :]])


def test_another_key_and_another_scheme() -> None:
    good = _core.Signer(builders.KEY).sign(PARTS)
    for other in (_core.Signer(b"another"), _core.Signer(builders.KEY, "hmac-sha3_256")):
        with pytest.raises(InvalidSignature):
            other.verify(good, PARTS)


# -- history ---------------------------------------------------------------------------------------


def test_a_replay_is_refused() -> None:
    signer = _core.Signer(builders.KEY)
    good = signer.sign(PARTS)
    signer.verify(good, PARTS)
    for _ in range(3):
        with pytest.raises(DuplicateSignature):
            signer.verify(good, PARTS)
    assert signer.history_length == 1


def test_an_invalid_signature_is_never_remembered() -> None:
    signer = _core.Signer(builders.KEY)
    later, good = numbered(1), _core.Signer(builders.KEY).sign(numbered(1))
    with pytest.raises(InvalidSignature):
        signer.verify(good, PARTS)
    assert signer.history_length == 0
    signer.verify(good, later)


@given(
    size=st.integers(0, 6),
    attempts=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60),
)
def test_the_last_digests_are_refused_and_no_others(size: int, attempts: list[tuple[int, bool]]) -> None:
    core, plain = builders.signers(history_size=size)
    for number, honest in attempts:
        parts = numbered(number)
        signature = plain.sign(parts) if honest else plain.sign(numbered(number + 1))
        assert outcome(core, signature, parts) == outcome(plain, signature, parts)
        assert core.history_length == len(plain.history)
    assert core.history_size == size


def test_a_long_history_stays_exact() -> None:
    """Through every growth of its table, and around its ring more than once."""
    size, rng = 3000, random.Random(7)
    core, plain = builders.signers(history_size=size)
    for number in range(3 * size):
        parts = numbered(number)
        core.verify(core.sign(parts), parts)
        plain.history.append(plain.sign(parts))
        assert core.history_length == min(number + 1, size)
    for number in (*rng.sample(range(3 * size), 200), 2 * size, 3 * size - 1):
        parts = numbered(number)
        if number >= 2 * size:
            with pytest.raises(DuplicateSignature):
                core.verify(core.sign(parts), parts)
    assert outcome(core, core.sign(numbered(2 * size - 1)), numbered(2 * size - 1)) is None
    assert outcome(core, core.sign(numbered(2 * size)), numbered(2 * size)) is None  # the last one pushed it out


@pytest.mark.parametrize("shift", [0, 64 - 13], ids=["lowest", "highest"])
def test_who_has_the_key_cannot_crowd_the_table(shift: int) -> None:
    """Digests that agree in the bits that would be a slot of a table of this size."""
    size, signer = 4096, _core.Signer(builders.KEY, history_size=4096)
    crowd = 0
    for number in range(1 << 20):
        parts = numbered(number)
        signature = signer.sign(parts)
        if (int.from_bytes(bytes.fromhex(signature[:16].decode()), "little") >> shift) % (2 * size) < size // 16:
            signer.verify(signature, parts)
            crowd += 1
        if crowd == size:
            break
    assert signer.history_length == size
    assert _core.longest_probe(signer) < size // 16


def test_no_history_refuses_nothing() -> None:
    signer = _core.Signer(builders.KEY, history_size=0)
    for _ in range(3):
        signer.verify(signer.sign(PARTS), PARTS)
    assert signer.history_length == 0


def test_the_default_history() -> None:
    assert _core.Signer(builders.KEY).history_size == 65536


def test_a_large_history_costs_nothing_before_it_is_used() -> None:
    signer = _core.Signer(builders.KEY, history_size=1 << 30)
    signer.verify(signer.sign(PARTS), PARTS)
    assert (signer.history_size, signer.history_length) == (1 << 30, 1)


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    yield _core.limit_histories
    _core.limit_histories(8 << 20)


def test_all_histories_together_have_a_bound(limit: Callable[[int], None]) -> None:
    """Each remembers a thousand and what it has room for when the bound is reached; what others leave is had again."""
    gc.collect()
    before = _core.memory_beside_logs()
    limit(1 << 20)
    signers = [_core.Signer(builders.KEY) for _ in range(40)]
    for number in range(5000):
        parts = numbered(number)
        signature = signers[0].sign(parts)
        for signer in signers:
            signer.verify(signature, parts)
    assert (1 << 20) * 3 // 4 < _core.memory_beside_logs() - before <= 1 << 20
    lengths = {signer.history_length for signer in signers}
    assert lengths == {1024, 2048}
    for signer in signers:
        last = range(5000 - signer.history_length, 5000)
        for number in (last[0], last[-1]):
            with pytest.raises(DuplicateSignature):
                signer.verify(signer.sign(numbered(number)), numbered(number))
        assert outcome(signer, signer.sign(numbered(last[0] - 1)), numbered(last[0] - 1)) is None
    first, *others = signers
    del signers, signer, others
    for number in range(5000, 9000):
        first.verify(first.sign(numbered(number)), numbered(number))
    assert first.history_length > 4000
    with pytest.raises(DuplicateSignature):
        first.verify(first.sign(numbered(5000)), numbered(5000))
    with pytest.raises(DuplicateSignature):
        first.verify(first.sign(numbered(4999)), numbered(4999))
    del first
    assert _core.memory_beside_logs() == before


@given(
    rounds=st.lists(
        st.tuples(st.booleans(), st.integers(0, 900), st.lists(st.integers(0, 2500), max_size=20)), max_size=8
    )
)
def test_a_history_that_may_not_grow_for_a_while_keeps_its_order(rounds: list[tuple[bool, int, list[int]]]) -> None:
    """It has come round when it grows again: what it refuses are the last it has remembered, whatever its room."""
    core, number = _core.Signer(builders.KEY), 3000
    remembered: list[int] = []
    try:
        for may_grow, count, old in rounds:
            _core.limit_histories(8 << 20 if may_grow else 0)
            for fresh in [*range(number, number + count), *old]:
                kept = remembered[len(remembered) - core.history_length :]
                expected = DuplicateSignature if fresh in kept else None
                assert outcome(core, core.sign(numbered(fresh)), numbered(fresh)) is expected
                if expected is None:
                    remembered.append(fresh)
            number += count
    finally:
        _core.limit_histories(8 << 20)


@pytest.mark.parametrize("size", [-1, (1 << 30) + 1, 1 << 31, 1 << 32])
def test_a_history_whose_table_could_not_be_indexed(size: int) -> None:
    with pytest.raises(ValueError, match=r"history_size is a number of digests from 0 to 2\*\*30"):
        _core.Signer(builders.KEY, history_size=size)


@pytest.mark.parametrize("scheme", ["hmac-sha256", "hmac-sha1"])
def test_forks_have_the_same_key_and_a_history_of_their_own(scheme: str) -> None:
    first = _core.Signer(builders.KEY, scheme, history_size=5)
    first.verify(first.sign(PARTS), PARTS)
    second = first.fork()
    assert (second.signature_scheme, second.history_size, second.history_length) == (scheme, 5, 0)
    assert second.sign(PARTS) == first.sign(PARTS)
    second.verify(second.sign(PARTS), PARTS)
    second.verify(second.sign(numbered(1)), numbered(1))
    assert (first.history_length, second.history_length) == (1, 2)
    first.verify(first.sign(numbered(1)), numbered(1))


def test_a_fork_of_an_unsigned_one_is_unsigned() -> None:
    fork = _core.Signer(b"").fork()
    assert fork.sign(PARTS) == b""
    assert fork.verify(b"x", PARTS) is None


def test_the_key_is_copied() -> None:
    key = bytearray(builders.KEY)
    signer = _core.Signer(key)
    key[:] = bytes(len(key))
    assert signer.sign(PARTS) == oracle.Signer(builders.KEY).sign(PARTS)
    assert signer.fork().sign(PARTS) == oracle.Signer(builders.KEY).sign(PARTS)


def test_the_build_says_which_code_signs() -> None:
    assert _core.build_info()["sha256"] in {"sha-ni", "armv8", "portable"}

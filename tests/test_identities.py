"""Names by which a kernel knows its clients."""

from fastwire.identities import MOST, Identities


def test_a_name_is_taken_once() -> None:
    names = Identities()
    assert names.take(b"ann") == b"ann"
    assert len({names.take(b"ann") for _ in range(3)} - {b"ann"}) == 3


def test_names_are_remembered_up_to_a_number() -> None:
    """From there on all are new ones: none that was taken comes again."""
    names = Identities()
    taken = {names.take(str(number).encode()) for number in range(MOST + 10)}
    assert len(taken) == MOST + 10
    assert names.take(b"0") not in taken
    assert names.take(b"bob") != b"bob"

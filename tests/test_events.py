"""The log of events: bounded, the newest first, the same event once."""

import pytest

from fastwire.events import KINDS, Log


def test_every_kind_is_counted_from_the_start() -> None:
    assert Log().counts == dict.fromkeys(KINDS, 0)


def test_the_newest_comes_first() -> None:
    log = Log()
    log.note("slow", "one", kernel="k", client="a")
    log.note("resume", "two", kernel="k", client="b")
    assert [(event.kind, event.text, event.kernel, event.client) for event in log.recent()] == [
        ("resume", "two", "k", "b"),
        ("slow", "one", "k", "a"),
    ]


def test_what_happens_again_is_one_event_with_its_last_words() -> None:
    log = Log()
    for text in ("one", "two", "three"):
        log.note("slow", text, kernel="k", client="a")
        log.note("slow", text, kernel="k", client="b")
    assert [(event.client, event.text, event.times) for event in log.recent()] == [("b", "three", 3), ("a", "three", 3)]
    assert all(event.first <= event.last for event in log.recent())
    assert log.counts["slow"] == 6


def test_the_oldest_is_forgotten_and_still_counted() -> None:
    log = Log(size=3)
    for client in "abcad":
        log.note("drop", "text", client=client)
    assert [event.client for event in log.recent()] == ["d", "a", "c"]
    assert log.counts["drop"] == 5


def test_only_known_kinds() -> None:
    with pytest.raises(ValueError, match="no kind"):
        Log().note("surprise", "text")

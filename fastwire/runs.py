"""What became of one request, read from a kernel's log: its messages, and the outputs they make.

A *run* is an execute_request (`fastwire._core.Run`). `Messages` are those that answer it, with their numbers in the
log; `Outputs` makes of them what a notebook would show, by the rules of nbclient: streams are joined, ``clear_output``
and ``update_display_data`` applied. This room knows no jupyter_server.
"""

from __future__ import annotations

import asyncio
import enum
import json
import math
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fastwire._core import Batch, Run, answers_to, indices_of_types
from fastwire.errors import FastwireError
from fastwire.journal import Journal, end_of
from fastwire.segments import Entry, Gap, Segment, Zone
from fastwire.segments import State as Place

__all__ = [
    "TRANSITIONS", "Answer", "Asked", "BadInput", "DiskIsLate", "Event", "Lost", "Message", "Messages", "Outputs",
    "Reader", "Shown", "State", "bring_up_to_date", "described", "parsed", "plain", "read_body", "read_outputs",
]  # fmt: skip

#: Seconds that what lies on the disk is waited for.
DISK_PATIENCE = 30.0

#: Seconds that a run may be given; expressions that it may come with.
LONGEST_RUN, MOST_EXPRESSIONS = 7 * 86400, 100

#: What changes a display that another run has made.
UPDATES = [b"update_display_data"]

#: Of its header, whatever a client may have put there.
OF_THE_REQUEST = ("session", "username", "date")

#: What becomes an output of a cell.
SHOWN = ("stream", "display_data", "execute_result", "error")

#: That may name a display.
DISPLAYS = ("display_data", "execute_result", "update_display_data")


#: How a message of a batch may be seen: its parts, or None where it may not.
Shown = Callable[[Batch, int], list[bytes] | None]


class State(enum.Enum):
    """Of a run: what `fastwire._core.RUN_STATES` calls so."""

    QUEUED = "its kernel has not said that it began"
    RUNNING = "its kernel is busy with it"
    DONE = "its kernel is idle again"
    ABORTED = "its reply says so: one before it failed"
    LOST = "its kernel began anew before it was over, or too many were asked since; it may begin all the same"


class Event(enum.Enum):
    BEGAN = "status busy, or execute_input"
    ENDED = "status idle"
    GAVE_UP = "a reply that says aborted"
    NEXT_BEGAN = "the next one begins, and this one's reply was seen: its idle was lost"
    BEGAN_ANEW = "the kernel's process is another, which was not asked"
    FORGOTTEN = "too many others are not over"


#: As the ledger has them (`core/ledger.pxi`), which learns them where messages are. What is not there changes nothing.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.BEGAN): State.RUNNING,
    (State.QUEUED, Event.ENDED): State.DONE,
    (State.QUEUED, Event.GAVE_UP): State.ABORTED,
    (State.QUEUED, Event.BEGAN_ANEW): State.LOST,
    (State.QUEUED, Event.FORGOTTEN): State.LOST,
    (State.RUNNING, Event.ENDED): State.DONE,
    (State.RUNNING, Event.GAVE_UP): State.ABORTED,
    (State.RUNNING, Event.NEXT_BEGAN): State.DONE,
    (State.RUNNING, Event.BEGAN_ANEW): State.LOST,
    (State.RUNNING, Event.FORGOTTEN): State.LOST,
    (State.DONE, Event.GAVE_UP): State.ABORTED,
    (State.LOST, Event.BEGAN): State.RUNNING,
    (State.LOST, Event.ENDED): State.DONE,
    (State.LOST, Event.GAVE_UP): State.ABORTED,
}


class DiskIsLate(FastwireError):
    """What was put aside cannot be read now."""


class Lost(NamedTuple):
    """What is gone: the numbers from ``first`` to ``before`` another; how much that was, where that is known."""

    first: int
    before: int
    messages: int | None = None
    nbytes: int | None = None


class Reader:
    """Reads the log from a number on, and holds nothing: what is gone when it comes there is ``lost``, as numbers from
    one to before another. ``on_ready`` is called when what it waits for has come from the disk."""

    def __init__(self, journal: Journal, position: int) -> None:
        self.position = position
        self._end = position  # of what it was handed last
        self.lost: list[Zone] = []
        self.on_ready: Callable[[], None] | None = self._is_there
        self.wake: Callable[[], None] | None = None
        self._journal = journal
        self._segment = journal.front
        self._caught: Sequence[Entry] | None = None
        journal.readers.add(self)

    def next(self) -> Sequence[Entry] | None:
        """The entries of a segment from its position on; empty at the end of the log. None: they lie on the disk, and
        ``wake`` is called when it is worth to ask again."""
        entries = self._next()
        if entries:
            self._end = entries[-1].end
        return entries

    @property
    def zone(self) -> Zone:
        """The numbers in which it may stop, and somebody go on: it was handed entries, and not all are read. What is
        joined there would come twice."""
        return (self.position, max(self.position, self._end))

    def _next(self) -> Sequence[Entry] | None:
        caught, self._caught = self._caught, None
        if caught and (rest := self._from(caught)):
            return rest
        while True:
            segment = self._find()
            if segment.entries is None:
                self._journal.fetch(segment, self)
                return None
            rest = segment.read(self.position)
            if rest or segment.next is None:
                return rest
            self.position = max(self.position, segment.end)

    def _from(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        return entries[bisect_right(entries, self.position, key=end_of) :]

    def _find(self) -> Segment:
        """Where its position is. If what it has read is gone that is near one of two places, most often."""
        journal = self._journal
        segment: Segment = self._segment
        if segment.state is Place.FREED:
            segment = journal.front if self.position < journal.front.end else journal.needed
        while self.position < segment.first and segment.previous is not None:
            segment = segment.previous  # what was open is kept there now
        while segment.next is not None and segment.end <= self.position:
            segment = segment.next
        if self.position < segment.first:
            self.lost.append((self.position, segment.first))
            self.position = segment.first
        self._segment = segment
        return segment

    def pass_by(self, entry: Entry) -> None:
        """It was read."""
        self.position = max(self.position, entry.end)

    def _is_there(self) -> None:
        self._caught = self._segment.entries
        if self._caught:
            self._end = self._caught[-1].end
        if self.wake is not None:
            self.wake()

    def close(self) -> None:
        """Somebody may go on where it stopped."""
        self.on_ready = self.wake = None
        self._journal.readers.discard(self)
        self._journal.remember(self.position)


class BadInput(FastwireError):
    """What somebody asks for is not well-formed."""


def read_body(body: bytes) -> dict[str, Any]:
    """A JSON object, of text that has a spelling in UTF-8."""

    def no_constant(name: str) -> None:
        raise BadInput(f"the body is not JSON: {name} is no number there")

    try:
        value = json.loads(body.decode(), parse_constant=no_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the body is not JSON in UTF-8 ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise BadInput("the body has to be a JSON object")
    return value


def checked(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """Of a kind; true and false are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadInput(f"{name} has to be {what}")
    return value


class Asked:
    """What somebody asks a kernel to run."""

    names = ("code", "store_history", "allow_stdin", "user_expressions", "metadata", "timeout")

    def __init__(self, /, **asked: Any) -> None:
        if unknown := {*asked} - {*self.names}:
            raise BadInput(f"unknown: {shown(unknown)}; known are {', '.join(self.names)}")
        if "code" not in asked:
            raise BadInput("code is missing")
        expressions = checked("user_expressions", asked.get("user_expressions", {}), dict, "an object")
        if len(expressions) > MOST_EXPRESSIONS or not all(isinstance(each, str) for each in expressions.values()):
            raise BadInput(f"user_expressions has to have strings, {MOST_EXPRESSIONS} at most")
        self.content = {
            "code": checked("code", asked["code"], str, "a string"),
            "silent": False,
            "store_history": checked("store_history", asked.get("store_history", True), bool, "true or false"),
            "user_expressions": expressions,
            "allow_stdin": checked("allow_stdin", asked.get("allow_stdin", False), bool, "true or false"),
            "stop_on_error": True,
        }
        self.metadata: dict[str, Any] = checked("metadata", asked.get("metadata", {}), dict, "an object")
        self.timeout: float | None = None
        if asked.get("timeout") is not None:
            self.timeout = checked("timeout", asked["timeout"], (int, float), "a number of seconds, or null")
            if not 0 < self.timeout <= LONGEST_RUN:
                raise BadInput(f"timeout has to be more than 0 and at most {LONGEST_RUN} seconds")


class Answer:
    """To what a run asks."""

    def __init__(self, /, **asked: Any) -> None:
        if {*asked} != {"value"}:
            raise BadInput("value has to be there, and nothing else")
        self.value: str = checked("value", asked["value"], str, "a string")


def shown(names: Iterable[str]) -> str:
    """What somebody else has chosen, as one line of ASCII can have it."""
    return ", ".join(ascii(name[:32]) for name in sorted(names)[:5])


class Message(NamedTuple):
    """One message in the log. ``through`` is the last number that it stands for: lines are joined."""

    number: int
    through: int
    channel: str
    msg_type: str
    parts: list[bytes]

    @property
    def content(self) -> Any:
        return parsed(self.parts[3])


def parsed(text: bytes) -> Any:
    """JSON of a kernel, which may be anything: what cannot be read is None, and so is what JSON has no word for."""
    try:
        return json.loads(text.decode("utf-8", "replace"), parse_constant=lambda _: None, parse_float=finite)
    except (ValueError, RecursionError):
        return None


def finite(text: str) -> float | None:
    """A number that is too large for Python would be written again as a word that JSON does not have."""
    value = float(text)
    return value if math.isfinite(value) else None


def described(run: Run, journal: Journal) -> dict[str, Any]:
    """A run, as JSON has it."""
    header = parsed(run.header)
    header = header if isinstance(header, dict) else {}
    return {
        "msg_id": run.msg_id,
        "cell": run.cell,
        **{name: text if isinstance(text := header.get(name), str) else None for name in OF_THE_REQUEST},
        "state": run.state,
        "failed": run.failed,
        "execution_count": run.execution_count,
        "begun": run.begun,
        "ended": run.ended,
        "asks": run.asks >= 0,
        "messages": run.messages,
        "first": run.first if run.messages else None,
        "last": run.last if run.messages else None,
        "complete": not run.messages or run.first >= journal.front.first,
    }


class Messages:
    """The messages of a run from a number on, as long as somebody reads them. ``lost`` is what is gone of them.
    ``shown`` says how one may be seen: its parts, or None where it may not."""

    def __init__(self, journal: Journal, run: Run, begin: int = 0, shown: Shown = Batch.__getitem__) -> None:
        self.lost: list[Lost] = []
        self._shown = shown
        self._run = run
        self._journal = journal
        self._reader = Reader(journal, max(begin, run.first if run.messages else journal.end))
        self._is_there = asyncio.Event()
        self._reader.wake = self._is_there.set

    @property
    def position(self) -> int:
        """What comes next has this number, or a larger one."""
        return self._reader.position

    async def read(self) -> AsyncIterator[Message]:
        """What there is until now. May be called again when there is more."""
        self._journal.learn()
        async for entry in self._entries(self._run.last + 1):
            if isinstance(entry, Gap):
                self.lost.append(Lost(entry.first, entry.end, entry.missing, entry.nbytes))
            for index in answers_to(entry.batch, self._run.msg_id):
                parts = self._shown(entry.batch, index)
                if parts is not None:
                    yield message_of(entry, index, parts)

    async def updates(self) -> dict[str, Message]:
        """What others have said since about displays: the last of each, by its name."""
        found = {}
        async for entry in self._entries(self._journal.end):
            for index in indices_of_types(entry.batch, UPDATES):
                message = message_of(entry, index, entry.batch[index])
                if isinstance(message.content, dict) and (name := display_id(message.content)) is not None:
                    found[name] = message
        return found

    async def _entries(self, before: int) -> AsyncIterator[Entry]:
        """Those that begin before a number."""
        while self._reader.position < before:
            entries = self._reader.next()
            self._note_lost(before)
            if entries is None:
                await self._disk()
                continue
            if not entries:
                break
            for entry in entries:
                if entry.first >= before:
                    return
                self._reader.pass_by(entry)
                yield entry
            await asyncio.sleep(0)  # a segment is little, a log is not

    def _note_lost(self, before: int) -> None:
        lost, self._reader.lost = self._reader.lost, []
        self.lost += [Lost(first, min(end, before)) for first, end in lost if first < before]

    async def _disk(self) -> None:
        try:
            async with asyncio.timeout(DISK_PATIENCE):
                await self._is_there.wait()
        except TimeoutError:
            raise DiskIsLate("what was put aside on disk cannot be read now: the disk does not answer") from None
        self._is_there.clear()

    def close(self) -> None:
        self._reader.close()


def message_of(entry: Entry, index: int, parts: list[bytes]) -> Message:
    """``parts`` are as it is shown."""
    batch = entry.batch
    number = entry.first + index
    through = entry.end - 1 if index + 1 == len(entry) else number
    return Message(number, max(through, number), batch.channel, type_of(batch, index, parts), parts)


def type_of(batch: Batch, index: int, parts: list[bytes]) -> str:
    """An older protocol has other names."""
    if not batch.unusual or index not in batch.foreign:
        return batch.msg_type(index)
    return str(parsed(parts[0])["msg_type"])


class Outputs:
    """What a notebook shows below a cell of the run ``msg_id``. ``limit`` bounds the bytes of the messages that are put
    together, and ``is_too_much`` says that they were more."""

    def __init__(self, limit: int, msg_id: str = "") -> None:
        self.question: dict[str, Any] | None = None
        self.is_too_much = False
        self._left = limit
        self._msg_id = msg_id
        self._shown: list[tuple[str, dict[str, Any]]] = []  # the type and the content of each
        self._texts: list[str] = []  # of the last, a stream, what is to be joined to it
        self._displays: dict[str, dict[str, Any]] = {}  # what was said of each last: all of a name show that
        self._catching: set[str] = set()  # Output widgets
        self._clears = False

    @property
    def displays(self) -> set[str]:
        """The names of those that others may change."""
        return {*self._displays}

    @property
    def left(self) -> int:
        """Bytes of ``limit``, less than 0 where that was too little."""
        return self._left

    def add(self, message: Message) -> None:
        """One that answers the run."""
        self._left -= len(message.parts[3])
        self.is_too_much |= self._left < 0
        content = None if self.is_too_much else message.content
        if not isinstance(content, dict):
            return
        if message.msg_type == "input_request":
            self.question = {"prompt": text_of(content.get("prompt")), "password": bool(content.get("password"))}
        elif message.channel == "iopub" and not self._is_caught(message.msg_type, content):
            self._hear(message.msg_type, content)

    def _is_caught(self, msg_type: str, content: dict[str, Any]) -> bool:
        """By an Output widget, which says when it begins, by the id of the run, and by none when that is over. One with
        the id of another run catches what that says."""
        if msg_type.startswith("comm_") and isinstance(name := content.get("comm_id"), str):
            data = content.get("data")
            state = data.get("state") if isinstance(data, dict) else None
            if isinstance(state, dict) and "msg_id" in state:
                is_ours = bool(self._msg_id) and state["msg_id"] == self._msg_id
                (self._catching.add if is_ours else self._catching.discard)(name)
        return bool(self._catching)

    def _hear(self, msg_type: str, content: dict[str, Any]) -> None:
        if msg_type == "clear_output":
            self._clears = bool(content.get("wait"))
            if not self._clears:
                self._clear()
        elif msg_type in DISPLAYS:
            self.update(content)
        if msg_type in SHOWN:
            self._show(msg_type, content)

    def update(self, content: dict[str, Any]) -> None:
        """Of displays, by whichever run."""
        name = display_id(content)
        if name in self._displays:
            self._displays[name] = content

    def _show(self, msg_type: str, content: dict[str, Any]) -> None:
        if self._clears:
            self._clear()
        if msg_type == "stream" and self._is_joined(content):
            return
        self._end_stream()
        if msg_type in DISPLAYS and (name := display_id(content)) is not None:
            self._displays[name] = content
        self._shown.append((msg_type, content))

    def _is_joined(self, content: dict[str, Any]) -> bool:
        """Whether it goes on in the stream that is the last output."""
        msg_type, last = self._shown[-1] if self._shown else ("", {})
        if msg_type != "stream" or last.get("name") != content.get("name"):
            return False
        self._texts.append(text_of(content.get("text")))
        return True

    def _end_stream(self) -> None:
        if self._texts:
            last = self._shown[-1][1]
            last["text"] = "".join([text_of(last.get("text")), *self._texts])
            self._texts.clear()

    def _clear(self) -> None:
        self._clears = False
        self._shown.clear()
        self._texts.clear()
        self._displays.clear()

    def made(self, from_message: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """All outputs, each made by a function of nbformat (`nbformat.v4.output_from_msg`), which takes its time. What
        that does not take, is left out."""
        self._end_stream()
        for msg_type, content in self._shown:
            try:
                output = from_message({"header": {"msg_type": msg_type}, "content": self._as_it_is_now(content)})
            except Exception:  # noqa: BLE001 - whatever a kernel may have put there
                continue
            yield output

    def _as_it_is_now(self, content: dict[str, Any]) -> dict[str, Any]:
        last = self._displays.get(display_id(content) or "")
        if last is None:
            return content
        return content | {"data": last.get("data"), "metadata": last.get("metadata")}


async def read_outputs(
    journal: Journal, run: Run, limit: int, shown: Shown = Batch.__getitem__
) -> tuple[Outputs, Messages]:
    """Of a run, as it was when it said its last; and where that was read, which is closed."""
    messages, outputs = Messages(journal, run, shown=shown), Outputs(limit, run.msg_id)
    try:
        async for message in messages.read():
            outputs.add(message)
    finally:
        messages.close()
    return outputs, messages


async def bring_up_to_date(journal: Journal, read: list[tuple[Run, Outputs]]) -> None:
    """Displays that others have changed since, of any number of runs in one reading of the log."""
    read = [(run, outputs) for run, outputs in read if run.is_over and outputs.displays]
    if not read:
        return
    messages = Messages(journal, read[0][0], min(run.last for run, _ in read))
    try:
        updates = await messages.updates()
    finally:
        messages.close()
    for run, outputs in read:
        for name in outputs.displays & updates.keys():
            if updates[name].number > run.last:
                outputs.update(updates[name].content)


def display_id(content: dict[str, Any]) -> str | None:
    transient = content.get("transient")
    name = transient.get("display_id") if isinstance(transient, dict) else None
    return name if isinstance(name, str) and name else None


def plain(output: dict[str, Any]) -> str:
    """An output as a terminal shows it."""
    if output["output_type"] == "stream":
        return text_of(output.get("text"))
    if output["output_type"] == "error":
        return text_of([f"{line}\n" for line in output.get("traceback") or ()])
    data = output.get("data")
    text = text_of(data.get("text/plain")) if isinstance(data, dict) else ""
    return f"{text}\n" if text else ""


def text_of(value: Any) -> str:
    """Of a multi-line string, which may be a list."""
    if isinstance(value, list):
        return "".join(each for each in value if isinstance(each, str))
    return value if isinstance(value, str) else ""

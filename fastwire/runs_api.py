"""Runs over HTTP: what a kernel said can be asked for, and code be run without a WebSocket.

Below ``/fastwire/api/kernels/<id>/runs`` of a Jupyter server; ``docs/runs.md`` has the interface. Who may read kernels,
by the server's authorizer, reads runs; who may execute, runs code and answers what that asks. `install` adds it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from operator import attrgetter
from typing import Any, TypeVar

try:
    from jupyter_core.utils import ensure_async
    from jupyter_server.auth.decorator import authorized
    from jupyter_server.utils import url_path_join
    from nbformat.v4 import output_from_msg
    from tornado import web
    from tornado.iostream import StreamClosedError
except ImportError as error:
    raise ImportError(
        f"fastwire.runs_api needs Jupyter Server ({error.name} is missing): pip install 'jupyter-fastwire[serve]'"
    ) from error

from fastwire import rest
from fastwire._core import RUN_STATES, Batch, Run
from fastwire.errors import FastwireError, MessageError
from fastwire.flow import KIB, MIB
from fastwire.journal import Journal
from fastwire.kernels import Kernel, kernel_of
from fastwire.rest import refusal, refuse
from fastwire.runs import (
    Answer,
    Asked,
    BadInput,
    DiskIsLate,
    Lost,
    Message,
    Messages,
    Outputs,
    Shown,
    bring_up_to_date,
    described,
    parsed,
    plain,
    read_body,
    read_outputs,
)
from fastwire.sockets import shortage

__all__ = ["URL", "install"]

log = logging.getLogger(__name__)

#: Below the server's base URL.
URL = f"{rest.URL}/kernels"

#: Of a web application's settings.
INSTALLED = "fastwire_runs_installed"

#: Seconds that a request may wait for news.
LONGEST_WAIT = 300.0

#: Seconds that news are gathered, and until somebody looks who was not told (the kernel began anew, or is gone).
GATHER, LOOK = 0.02, 1.0

#: Seconds between signs of life on a stream.
HEARTBEAT = 15.0

#: Bytes of messages that are made outputs at once. What is more can be read as messages.
MOST_OUTPUT = 32 * MIB

#: Bytes of a request, which is read at once: a tenth of a second at the worst. Runs of a kernel that may wait.
MOST_BODY, MOST_QUEUED = MIB, 256

#: As many times what is kept is passed by for a list with outputs.
LONGEST_WAY = 4

#: Outputs that nbformat makes before the loop may do something else: two milliseconds or three.
AT_ONCE = 25

#: Seconds between two looks whether a run that may take so long has begun.
HAS_IT_BEGUN = 0.25

#: Bytes that a reader has to take within ``write_deadline``.
PIECE = 64 * KIB

#: Larger than any number of a message.
ENDLESS = 1 << 62

#: What JSON may come as: what is said where their user says nothing counts, too (`rest.Handler.initialize`).
JSON_TYPES = {"application/json", "", "text/plain"}

#: As JSON has them; Python reads more than that as one.
A_NUMBER = re.compile(r"[0-9]{1,19}(\.[0-9]{1,19})?([eE][+-]?[0-9]{1,3})?", re.ASCII)

Method = TypeVar("Method", bound=Callable[..., Any])

KERNEL, RUN = r"(?P<kernel_id>\w+-\w+-\w+-\w+-\w+)", r"(?P<msg_id>[^/]+)"


def install(app: web.Application) -> None:
    """Add the interface to a Jupyter server's web application, once."""
    if app.settings.get(INSTALLED):
        return
    app.settings[INSTALLED] = True
    runs = url_path_join(app.settings["base_url"], URL, KERNEL, "runs")
    one = url_path_join(runs, RUN)
    app.add_handlers(
        ".*$",
        [
            (runs, RunsHandler),
            (one, RunHandler),
            (url_path_join(one, "input"), InputHandler),
            (url_path_join(one, r"buffers/(?P<number>\d{1,18})/(?P<index>\d{1,9})"), BufferHandler),
        ],
    )


def may_execute(method: Method) -> Method:
    """Of a handler: for who may execute, by the server's authorizer."""
    authorize: Callable[[Method], Method] = authorized("execute")
    return authorize(method)


class Handler(rest.Handler):
    """What is common to all: kernels and runs are found, or refused in words; a body is read."""

    #: Called when its reader has left.
    on_gone: Callable[[], None] | None = None

    #: Seconds in which its reader has to take a piece of an answer.
    patience: float = 0.0

    def kernel(self, kernel_id: str) -> Kernel:
        """That is asked of, in a way that there is."""
        self.check_arguments()
        if self.serverapp is not None and self.serverapp.gateway_config.gateway_enabled:
            refuse(404, "kernels are behind a gateway: nothing is kept here of what they say")
        if kernel_id not in self.kernel_manager:
            refuse(404, "there is no kernel of this id")
        kernel = kernel_of(self.kernel_manager.get_kernel(kernel_id))
        if not kernel.relay.limits.history_limit:
            refuse(404, "nothing is kept of what kernels say: set c.Fastwire.history_limit, to 2097152 (2 MiB), say")
        self.patience = kernel.relay.limits.write_deadline
        kernel.relay.drain_iopub()
        kernel.relay.journal.learn()
        return kernel

    def run(self, kernel: Kernel, msg_id: str) -> Run:
        journal: Journal = kernel.relay.journal
        run = journal.ledger.get(msg_id)
        if run is None:
            refuse(404, "no run of this id is known: it was never asked, or too many were since")
        return run

    def number(self, name: str, default: float | None, most: float, kind: Callable[[str], Any] = int) -> Any:
        text = self.get_query_argument(name, None)
        if text is None:
            return default
        try:
            value = kind(text) if A_NUMBER.fullmatch(text) else most + 1
        except ValueError:
            value = most + 1
        if not 0 <= value <= most:
            refuse(400, f"{name} has to be a number from 0 to {most:g}")
        return value

    def flag(self, name: str) -> bool:
        text = self.get_query_argument(name, "0")
        if text not in ("0", "1"):
            refuse(400, f"{name} has to be 0 or 1")
        return text == "1"

    def document(self, kind: Callable[..., Any]) -> Any:
        """The body of the request, checked: what is wrong reaches no kernel."""
        kind_of_body = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind_of_body not in JSON_TYPES:
            refuse(415, "the body has to be JSON: Content-Type: application/json")
        try:
            if len(self.request.body) > MOST_BODY:
                refuse(413, f"the body has more than {MOST_BODY // MIB} MiB")
            return kind(**read_body(self.request.body))
        except BadInput as error:
            refuse(400, str(error))

    @property
    def username(self) -> str:
        return str(getattr(self.current_user, "username", ""))

    async def check_that_it_runs(self, kernel: Kernel) -> None:
        problem = shortage(kernel.manager.context)
        if problem is None and not await ensure_async(kernel.manager.is_alive()):
            problem = "the kernel is not running"
        if problem is not None:
            refuse(503, problem)

    def check_that_it_is_allowed(self, msg_type: str) -> None:
        """What no client may send to kernels is not sent for one."""
        allowed = getattr(self.kernel_manager, "allowed_message_types", None)
        if allowed and msg_type not in allowed:
            refuse(403, f"this server lets nobody send a message of the type {msg_type} (allowed_message_types)")

    async def say(self, document: dict[str, Any], status: int = 200, **lists: list[str]) -> None:
        """``lists`` are of what is JSON already."""
        text = json.dumps(document)
        for name, each in lists.items():
            text = f'{text[:-1]}, "{name}": [{", ".join(each)}]}}'
        self.set_status(status)
        await self.answer(text.encode())

    async def answer(self, body: bytes, kind: str = "application/json") -> None:
        """Returns when it is written, or its reader is gone. In pieces where it is long, unless it may have to be known
        whole: compressed, and HTTP/1.0 has no chunks."""
        self.set_header("Cache-Control", "no-store")
        whole = self.request.version == "HTTP/1.0" and self.settings.get("compress_response")
        rest: bytes | None = body
        with suppress(StreamClosedError):
            if len(body) > PIECE and not whole:
                rest = None
                if self.is_known(body):
                    self.set_status(HTTPStatus.NOT_MODIFIED)
                else:
                    self.set_header("Content-Type", kind)
                    self.set_header("Content-Length", len(body))
                    await self.tell(body)
            await self.until_taken(self.finish(rest, set_content_type=kind))

    def is_known(self, body: bytes) -> bool:
        """To who asks, who has it: what Tornado says of an answer in one piece."""
        if self.get_status() != HTTPStatus.OK:
            return False
        self.set_header("Etag", f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"')
        return bool(self.check_etag_header())

    async def tell(self, body: bytes) -> None:
        """A part of an answer, after its headers. Who does not take it is left: he holds a place, and the memory for
        this. Raises `StreamClosedError` where nobody reads any more."""
        for begin in range(0, len(body) or 1, PIECE):
            self.write(body[begin : begin + PIECE])
            await self.until_taken(self.flush())

    async def until_taken(self, written: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self.patience or None):
                await written
        except TimeoutError:
            connection: Any = self.request.connection
            connection.close()
            raise StreamClosedError from None

    @contextmanager
    def place(self, kernel: Kernel) -> Iterator[None]:
        """Who reads or waits costs something: as many may as may be connected."""
        if len(kernel.asking) >= kernel.relay.limits.clients_per_kernel:
            refuse(429, "too many read this kernel's runs now: c.Fastwire.clients_per_kernel")
        kernel.asking.add(self)
        try:
            yield
        except DiskIsLate as error:
            refuse(503, str(error))
        finally:
            kernel.asking.discard(self)

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if self.on_gone is not None:
            self.on_gone()


class RunsHandler(Handler):
    """All runs of a kernel that are known."""

    arguments = ("state", "cell", "since", "outputs")

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        kernel = self.kernel(kernel_id)
        journal = kernel.relay.journal
        states, outputs = self.states(), self.flag("outputs")
        cell, since = self.get_query_argument("cell", None), self.number("since", None, ENDLESS)
        document = {"first": journal.front.first, "end": journal.end}
        runs = [
            run
            for run in journal.ledger.all()
            if run.state in states
            and cell in (None, run.cell)
            and (since is None or run.last >= since or not run.is_over)
        ]
        if not outputs:
            await self.say({"runs": [described(run, journal) for run in runs], **document})
            return
        with self.place(kernel):
            await self.say(document, runs=[text async for text in with_outputs(journal, runs, kernel.rewriting.shown)])

    @web.authenticated
    @may_execute
    async def post(self, kernel_id: str) -> None:
        kernel = self.kernel(kernel_id)
        self.check_that_it_is_allowed("execute_request")
        asked = self.document(Asked)
        await self.check_that_it_runs(kernel)
        ledger = kernel.relay.journal.ledger
        waiting = sum(run.state == "queued" and run.was_asked for run in ledger.all())
        if waiting >= MOST_QUEUED or ledger.is_full:
            refuse(429, f"{waiting} runs of this kernel wait already")
        try:
            msg_id = kernel.open_executor().execute(asked.content, asked.metadata, self.username)
        except FastwireError as error:
            refuse(400 if isinstance(error, MessageError) else 503, str(error))
        if asked.timeout is not None:
            soon(interrupted_after(kernel, msg_id, asked.timeout))
        self.set_header("Location", url_path_join(self.base_url, URL, kernel_id, "runs", msg_id))
        await self.say(described(self.run(kernel, msg_id), kernel.relay.journal), 201)

    def states(self) -> tuple[str, ...]:
        text = self.get_query_argument("state", None)
        states = RUN_STATES if text is None else tuple(text.split(","))
        if not {*states} <= {*RUN_STATES}:
            refuse(400, f"state has to be one of {', '.join(RUN_STATES)}, or some of them with commas between")
        return states


async def with_outputs(journal: Journal, runs: list[Run], shown: Shown = Batch.__getitem__) -> AsyncIterator[str]:
    """Of those that are over and all there; as far as it is not too much together. Threads may speak for many runs
    at once: what lies between the messages of one is passed by for each of them, but not without end."""
    left, read = MOST_OUTPUT, {}
    way = LONGEST_WAY * (journal.end - journal.front.first)
    for run in filter(attrgetter("is_over"), runs):
        way -= run.last - run.first
        if left < 0 or way < 0:
            break
        outputs, messages = await read_outputs(journal, run, left, shown)
        left = outputs.left
        if not messages.lost and not outputs.is_too_much:
            read[run.msg_id] = outputs
    await bring_up_to_date(journal, [(run, read[run.msg_id]) for run in runs if run.msg_id in read])
    for run in runs:
        made = None
        if run.msg_id in read:
            made = [json.dumps(output) async for output in made_of(read[run.msg_id])]
        text = "null" if made is None else f"[{', '.join(made)}]"
        yield f'{json.dumps(described(run, journal))[:-1]}, "outputs": {text}}}'


class RunHandler(Handler):
    """One run: as outputs, as messages, as text, as a stream of events."""

    arguments = ("raw", "after", "wait", "partial")

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str, msg_id: str) -> None:
        kernel = self.kernel(kernel_id)
        run = self.run(kernel, msg_id)
        after, wait = self.number("after", None, ENDLESS), self.number("wait", 0.0, LONGEST_WAIT, float)
        raw, partial = self.flag("raw"), self.flag("partial")
        kind, last_event = self.kind(("application/json", "text/event-stream", "text/plain")), self.last_event_id()
        with self.place(kernel):
            if kind == "text/event-stream":
                await Events(self, kernel, run).stream(after if last_event is None else last_event, partial=partial)
                return
            await self.until_there_is_more(kernel, run, after, wait)
            if raw:
                await self.say_messages(kernel, run, 0 if after is None else after + 1, partial=partial)
            else:
                await self.say_outputs(kernel, run, as_text=kind == "text/plain", partial=partial)

    def kind(self, kinds: tuple[str, ...]) -> str:
        """What is accepted, the first of it that there is."""
        accepted = self.request.headers.get("Accept", "*/*")
        for each in accepted.split(","):
            name = each.partition(";")[0].strip().lower()
            if name in kinds:
                return name
            if name in ("*/*", "application/*", ""):
                return kinds[0]
        return kinds[0]

    def last_event_id(self) -> int | None:
        text = self.request.headers.get("Last-Event-ID")
        if text is not None and not re.fullmatch("[0-9]{1,18}", text):
            refuse(400, "Last-Event-ID has to be that of an event")
        return None if text is None else int(text)

    async def until_there_is_more(self, kernel: Kernel, run: Run, after: int | None, wait: float) -> None:
        """Than what has the number ``after``, or until it is over; for so long at most."""
        async with News(kernel, self) as news:
            deadline = time.monotonic() + wait
            while not run.is_over and (after is None or run.last <= after):
                left = deadline - time.monotonic()
                if left <= 0 or not await news.wait(left):
                    break

    async def say_messages(self, kernel: Kernel, run: Run, begin: int, *, partial: bool) -> None:
        messages = Messages(kernel.relay.journal, run, begin, kernel.rewriting.shown)
        found, size, last = [], 0, begin - 1
        try:
            async for message in messages.read():
                if message.through < begin:
                    continue
                found.append(json.dumps(self.told(message)))
                last = message.through
                size += len(found[-1])
                if size > MOST_OUTPUT:  # the rest is there for who asks again
                    break
        finally:
            messages.close()
        if await self.is_gone(kernel, run, messages.lost, partial=partial):
            return
        run_now = described(run, kernel.relay.journal)
        await self.say({"run": run_now, "last": last, "lost": told(messages.lost)}, messages=found)

    def told(self, message: Message) -> dict[str, Any]:
        """A message in JSON; its buffers have URLs."""
        path = self.request.path.rstrip("/")
        header, parent_header, metadata, content = map(parsed, message.parts[:4])
        return {
            "seq": message.number,
            "through": message.through,
            "channel": message.channel,
            "header": header,
            "parent_header": parent_header,
            "metadata": metadata,
            "content": content,
            "buffers": [f"{path}/buffers/{message.number}/{index}" for index in range(len(message.parts) - 4)],
        }

    async def say_outputs(self, kernel: Kernel, run: Run, *, as_text: bool, partial: bool) -> None:
        journal = kernel.relay.journal
        outputs, messages = await read_outputs(journal, run, MOST_OUTPUT, kernel.rewriting.shown)
        await bring_up_to_date(journal, [(run, outputs)])
        if outputs.is_too_much:
            refuse(413, f"its outputs are more than {MOST_OUTPUT // MIB} MiB: ask for its messages (?raw=1)")
        if await self.is_gone(kernel, run, messages.lost, partial=partial):
            return
        if as_text:
            text = "".join([plain(output) async for output in made_of(outputs)])
            await self.answer(text.encode("utf-8", "replace"), "text/plain; charset=UTF-8")
            return
        made = [json.dumps(output) async for output in made_of(outputs)]
        document = {
            "run": described(run, journal),
            "input": outputs.question if run.asks >= 0 else None,
            "last": max(run.last, messages.position - 1) if run.messages else -1,
            "lost": told(messages.lost),
        }
        await self.say(document, outputs=made)

    async def is_gone(self, kernel: Kernel, run: Run, lost: list[Lost], *, partial: bool) -> bool:
        """And that was said."""
        if not lost or partial:
            return False
        reason = "some of what was asked for is not kept any more; ?partial=1 has the rest"
        found = described(run, kernel.relay.journal)
        document = {"message": reason, "reason": reason, "run": found, "lost": told(lost)}
        await self.say(document, 410)
        return True


async def made_of(outputs: Outputs) -> AsyncIterator[dict[str, Any]]:
    """By nbformat, a few at once."""
    for count, output in enumerate(outputs.made(output_from_msg), 1):
        yield output
        if count % AT_ONCE == 0:
            await asyncio.sleep(0)


def told(lost: list[Lost]) -> list[dict[str, int | None]]:
    return [each._asdict() for each in lost]


class News:
    """Waits until a kernel says something, while its reader is there."""

    def __init__(self, kernel: Kernel, handler: Handler) -> None:
        self._handler = handler
        self._kernel = kernel
        self._event = asyncio.Event()
        self.is_left = False

    async def __aenter__(self) -> News:
        self._end = self._kernel.relay.listen(lambda _, __: self._event.set())
        self._handler.on_gone = self._leave
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end()
        self._handler.on_gone = None

    def _leave(self) -> None:
        self.is_left = True
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """For so long at most. False: nobody reads any more, or the kernel is gone."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, LOOK)):
                await self._event.wait()
                await asyncio.sleep(GATHER)
        self._event.clear()
        self._kernel.relay.journal.learn()
        return not self.is_left and not self._kernel.relay.is_closed


class Events:
    """A run's messages as server-sent events (HTML, section 9.2): ``message``, each with its number as its id; ``lost``
    where something is missing; ``done`` with the run when it is over."""

    def __init__(self, handler: RunHandler, kernel: Kernel, run: Run) -> None:
        self._handler = handler
        self._kernel = kernel
        self._run = run

    async def stream(self, after: int | None, *, partial: bool) -> None:
        handler, run, journal = self._handler, self._run, self._kernel.relay.journal
        if after is not None and run.is_over and run.last <= after:
            handler.set_status(204)  # which tells a browser not to come back
            handler.finish()
            return
        begin = 0 if after is None else after + 1
        gone = Lost(max(begin, run.first), journal.front.first)
        is_gone = run.messages and gone.first < gone.before
        if is_gone and await handler.is_gone(self._kernel, run, [gone], partial=partial):
            return
        handler.set_header("Content-Type", "text/event-stream")
        handler.set_header("Cache-Control", "no-store")
        handler.set_header("X-Accel-Buffering", "no")  # nginx would gather them
        with suppress(StreamClosedError, DiskIsLate):  # it is not over: whoever reads it comes back
            async with News(self._kernel, handler) as news:
                await self._follow(news, begin)

    async def _follow(self, news: News, begin: int) -> None:
        relay = self._kernel.relay
        messages = Messages(relay.journal, self._run, begin, self._kernel.rewriting.shown)
        spoke = time.monotonic()
        try:
            await self._tell("")  # that it is open
            while True:
                is_over = self._run.is_over or relay.is_closed
                async for text in self._events(messages, begin):
                    await self._tell(text)
                    spoke = time.monotonic()
                if is_over:
                    break
                if time.monotonic() - spoke > HEARTBEAT:
                    await self._tell(": nothing new\n\n")
                    spoke = time.monotonic()
                await news.wait(HEARTBEAT)
                if news.is_left:
                    return
        finally:
            messages.close()
        await self._tell(event("done", described(self._run, relay.journal)))

    async def _tell(self, text: str) -> None:
        await self._handler.tell(text.encode())

    async def _events(self, messages: Messages, begin: int) -> AsyncIterator[str]:
        async for message in messages.read():
            for text in self._lost(messages):
                yield text
            if message.through >= begin:
                yield event("message", self._handler.told(message), message.through)
        for text in self._lost(messages):
            yield text

    def _lost(self, messages: Messages) -> list[str]:
        lost, messages.lost = messages.lost, []
        return [event("lost", each._asdict(), each.before - 1) for each in lost]


def event(kind: str, data: object, number: int | None = None) -> str:
    name = f"id: {number}\n" if number is not None else ""
    return f"{name}event: {kind}\ndata: {json.dumps(data)}\n\n"


class InputHandler(Handler):
    """Answers what a run asks, whoever asked for that."""

    @web.authenticated
    @may_execute
    async def post(self, kernel_id: str, msg_id: str) -> None:
        kernel = self.kernel(kernel_id)
        run = self.run(kernel, msg_id)
        self.check_that_it_is_allowed("input_reply")
        answer = self.document(Answer)
        await self.check_that_it_runs(kernel)
        if run.asks < 0:
            refuse(409, "the run asks nothing now")
        try:
            kernel.open_executor().answer(answer.value, self.username)
        except FastwireError as error:
            refuse(503, str(error))
        self.set_status(204)
        self.finish()


def soon(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    under_way.add(task)
    task.add_done_callback(under_way.discard)


#: A loop knows its tasks weakly.
under_way: set[asyncio.Task[None]] = set()


async def interrupted_after(kernel: Kernel, msg_id: str, seconds: float) -> None:
    """A run that takes longer than so many seconds, from its beginning: before, another would be interrupted. It looks,
    and listens to nothing: of many that wait, each would hear all that the first one says."""
    journal, deadline = kernel.relay.journal, math.inf
    while not kernel.relay.is_closed:
        journal.learn()
        run = journal.ledger.get(msg_id)
        if run is None or run.is_over:
            return
        if deadline == math.inf and run.state == "running":
            deadline = time.monotonic() + seconds
        left = deadline - time.monotonic()
        if left <= 0:
            log.info("kernel %s is interrupted: a run took more than %g s", kernel.relay.name, seconds)
            try:
                await ensure_async(kernel.manager.interrupt_kernel())
            except Exception as error:  # noqa: BLE001 - whatever a provisioner may say: in the middle of a restart, say
                log.warning("kernel %s cannot be interrupted: %s", kernel.relay.name, error)
            return
        await asyncio.sleep(min(left, HAS_IT_BEGUN))


class BufferHandler(Handler):
    """A binary buffer of a message."""

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str, msg_id: str, number: str, index: str) -> None:
        kernel = self.kernel(kernel_id)
        run = self.run(kernel, msg_id)
        self.set_header("Content-Disposition", "attachment")
        with self.place(kernel):
            buffer = await self.find(kernel.relay.journal, run, int(number), int(index))
            await self.answer(buffer, "application/octet-stream")

    async def find(self, journal: Journal, run: Run, number: int, index: int) -> bytes:
        messages = Messages(journal, run, number)
        try:
            async for message in messages.read():
                if message.number <= number <= message.through and index + 4 < len(message.parts):
                    return message.parts[4 + index]
                if message.number > number:
                    break
        finally:
            messages.close()
        if messages.lost:
            refuse(410, "this message is not kept any more")
        raise refusal(404, "there is no such buffer")

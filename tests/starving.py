"""Runs every public function of the core with each of its allocations failing once: `test_core_memory` starts it.

Of each function a case makes what it needs and returns ``(call, outcome)``: ``call`` is what runs without memory, and
``outcome`` says, in plain values, what came of its result. One that failed is called again, and must come to the same.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from builders import KEY, client_frame, message
from starving_messages import (
    FOREIGN,
    LARGE,
    LEGACY_BINARY,
    LEGACY_TEXT,
    MANY,
    PARTS,
    RUN,
    STATUS,
    Case,
    Kernel,
    activity,
    adopt,
    asked,
    batch,
    drain,
    feed,
    flush,
    frames_of,
    held,
    idle,
    listed,
    one,
    pure,
    put_aside,
    queued,
    receive,
    relay,
    relay_feed,
    retry,
    runs_of,
    sending,
    signed,
    streaming,
    take,
    take_events,
    two,
    unsent,
    verify,
    with_queue,
    zmtp_call,
    zmtp_drain,
    zmtp_feed,
    zmtp_flush,
    zmtp_renew,
    zmtp_send,
)
from starving_turn import (
    Turn,
    asking_and_full,
    at_end,
    busy,
    done,
    flying,
    full,
    given,
    hear,
    in_the_loops_place,
    keeping,
    kept,
    log_append,
    logged,
    looked_after,
    passing,
    passing_as_it_is,
    questions,
    reading,
    ready,
    received,
    released,
    released_by_half,
    replying,
    ride,
    say,
    silent,
    taken_over,
    tell,
    tell_another,
    turning,
)

from fastwire import _core
from fastwire._core import (
    OP_BINARY,
    OP_PING,
    OP_TEXT,
    PROTOCOL_V1,
    Activity,
    Budget,
    Flight,
    FrameParser,
    Kept,
    KernelTraffic,
    Ledger,
    LogEntry,
    LogSegment,
    Marks,
    Part,
    Poller,
    Signer,
    Uplink,
    WriteQueue,
    ZmtpStream,
)
from fastwire.errors import OutOfMemory

#: Every public function and method of the core. A name may have several cases.
CASES: dict[str, Case | Sequence[Case]] = {
    "build_info": pure(_core.build_info),
    "live": pure(lambda: sorted(_core.live())),
    "counters": pure(lambda: sorted(_core.counters())),
    "histograms": pure(lambda: sorted(_core.histograms())),
    "Signer": pure(lambda: Signer(KEY), lambda it: it.sign(PARTS)),
    "Signer.fork": pure(Signer(KEY).fork, lambda it: it.sign(PARTS)),
    "Signer.sign": [pure(lambda: Signer(KEY).sign(PARTS)), pure(lambda: Signer(KEY, "hmac-sha512").sign(PARTS))],
    "Signer.verify": [verify, lambda: verify("hmac-sha512")],
    "split_identities": pure(lambda: _core.split_identities([b"id", *signed(PARTS)])),
    "encode_v1": pure(lambda: _core.encode_v1("shell", PARTS)),
    "decode_v1": pure(lambda: _core.decode_v1(asked(1)[0])),
    "encode_legacy": [pure(lambda p=p: _core.encode_legacy("shell", p)) for p in (STATUS, PARTS, FOREIGN)],
    "decode_legacy": [pure(lambda t=t: _core.decode_legacy(t)) for t in (LEGACY_TEXT, LEGACY_BINARY)],
    "header_fields": pure(lambda: _core.header_fields(PARTS[0])),
    "check_json": [pure(lambda: _core.check_json(b'{"a": [1, 2]}')), pure(lambda: _core.check_json(b"1" * 700))],
    "frame_header": pure(lambda: _core.frame_header(OP_BINARY, 70_000)),
    "parse_close": pure(lambda: _core.parse_close(b"\x03\xe8bye")),
    "close_payload": pure(lambda: _core.close_payload(1000, "bye")),
    "FrameParser": pure(FrameParser, lambda it: it.pending),
    "FrameParser.feed": [feed, relay_feed(mask=False), relay_feed(mask=True)],
    "FrameParser.relay": pure(lambda: FrameParser().relay(WriteQueue()), lambda _: None),
    "FrameParser.receive": receive,
    "FrameParser.__next__": [
        take_events(client_frame(OP_TEXT, "é" * 100), client_frame(OP_BINARY, b"b"), client_frame(OP_PING, b"p")),
        take_events(client_frame(OP_BINARY, b"b" * 600, fin=False), client_frame(0, b"c")),
    ],
    "WriteQueue": pure(WriteQueue, lambda it: it.queued),
    "WriteQueue.append": [
        queued(lambda q: q.append(b"small")),
        queued(lambda q: q.append(b"a" * LARGE)),
        queued(lambda q: q.append(bytearray(LARGE))),
        queued(lambda q: q.append(b"a" * 5000)),
    ],
    "WriteQueue.append_frame": [
        queued(lambda q: q.append_frame(OP_TEXT, "text")),
        queued(lambda q: q.append_frame(OP_BINARY, b"a" * LARGE)),
        queued(lambda q: q.append_frame(OP_BINARY, memoryview(bytearray(LARGE)))),
        queued(lambda q: q.append_frame(OP_BINARY, b"a" * LARGE), b"b" * 3900),
    ],
    "WriteQueue.extend": [
        queued(lambda q: q.extend(one().frames(None))),
        queued(lambda q: q.extend(one().frames(PROTOCOL_V1))),
        queued(lambda q: q.extend(idle().frames(None))),
    ],
    "WriteQueue.flush": flush,
    "WriteQueue.take": take,
    "WriteQueue.acknowledge": with_queue(lambda q: q.acknowledge(50)),
    "WriteQueue.clear": with_queue(lambda q: (q.clear(), None)[1]),
    "drain": [drain(), drain("hmac-sha512")],
    "batch_of": pure(lambda: batch(PARTS, STATUS, FOREIGN, *MANY), listed),
    "batch_of_frames": put_aside,
    "compacted": pure(lambda: _core.compacted([one(), two()], 3000), lambda made: [listed(each) for each in made]),
    "Batch.__getitem__": pure(lambda: one()[0]),
    "Batch.headers": pure(lambda: one().headers(0)),
    "Batch.msg_type": pure(lambda: one().msg_type(1)),
    "Batch.message_class": pure(lambda: one().message_class(1)),
    "Batch.replaced": pure(lambda: one().replaced({0: STATUS, 2: None}), listed),
    "Batch.frames": [frames_of(None), frames_of(PROTOCOL_V1)],
    "Frames.__bytes__": pure(lambda: bytes(two().frames(None))),
    "Ends.complete_before": pure(lambda: one().frames(None).ends.complete_before(10)),
    "Ends.longest": pure(lambda: one().frames(None).ends.longest(0, 10)),
    "Batch.part": pure(lambda: one().part(1, 3), listed),
    "Batch.forget_frames": pure(lambda: one().part(0, 2).forget_frames()),
    "Activity": pure(lambda: Activity(["usage_reply"]), lambda it: it.state),
    "Activity.observe": activity(lambda it: it.observe(idle())),
    "Activity.answered": activity(lambda it: it.answered(idle())),
    "Activity.forget": activity(lambda it: it.forget()),
    "Activity.begin_anew": activity(lambda it: it.begin_anew()),
    "Run": pure(lambda: _core.Run, lambda _: None),
    "Ledger": pure(Ledger, len),
    "Ledger.get": runs_of(lambda it, _: it.get("r")),
    "Ledger.all": runs_of(lambda it, _: it.all()),
    "Ledger.learn": runs_of(lambda it, entries: it.learn(entries), is_known=False),
    "Ledger.begin_anew": runs_of(lambda it, _: it.begin_anew()),
    "Ledger.lose_all": runs_of(lambda it, _: it.lose_all()),
    "answers_to": pure(lambda: _core.answers_to(batch(*RUN), "r")),
    "indices_of_types": pure(lambda: _core.indices_of_types(two(), [b"stream"])),
    "ZmtpStream": pure(lambda: ZmtpStream("DEALER", b"me"), lambda it: it.take(1000)),
    "ZmtpStream.feed": zmtp_feed,
    "ZmtpStream.drain": zmtp_drain,
    "ZmtpStream.send": [zmtp_send(), zmtp_send(1)],
    "ZmtpStream.flush": zmtp_flush,
    "ZmtpStream.take": zmtp_call(lambda it: it.take(3)),
    "ZmtpStream.renew": zmtp_renew,
    "ZmtpStream.take_unsent": zmtp_call(lambda it: (it.renew(), it.take_unsent())),
    "ZmtpStream.attach": zmtp_call(lambda it: it.attach(-1)),
    "ZmtpStream.rest": zmtp_call(lambda it: it.rest(True)),
    "ZmtpStream.detach": zmtp_call(lambda it: it.detach()),
    "ZmtpStream.close": zmtp_call(lambda it: it.close()),
    "Uplink": pure(lambda: Uplink(None, Signer(KEY), Kernel.sockets_of_nobody), lambda it: it.sent),
    "Uplink.send": [
        sending(lambda it: it.send(OP_BINARY, asked(1)[0])),
        sending(lambda it: it.send(OP_BINARY, asked(1)[0]), before=held),
        streaming(),
        streaming(bytes(70_000)),
    ],
    "Uplink.relay": relay,
    "Uplink.retry": [retry, unsent(lambda it, _: it.retry())],
    "Uplink.adopt": [adopt, unsent(lambda it, other: other.adopt(it))],
    "Uplink.answered": sending(lambda it: (it.answered(idle()), it.unanswered, it.asked)),
    "Uplink.retire": sending(lambda it: it.retire(), before=held),
    "Uplink.forget": sending(lambda it: (it.forget(), it.unanswered, it.asked), before=held),
    "Poller.open": turning(lambda it: it.poller.open()),
    "Poller.close": turning(lambda it: it.poller.close()),
    "Poller.watch": reading,
    "Poller.unwatch": turning(lambda it: it.poller.unwatch(0, print)),
    "Poller": pure(lambda: Poller(print, print), len),
    "Poller.take_over": taken_over(lambda it, selector: it.poller.take_over(selector)),
    "Poller.give_back": taken_over(lambda it, _: it.poller.give_back(), has_taken_over=True),
    "Poller.select": in_the_loops_place(busy, done),
    "Poller.turn": turning(lambda it: it.poller.turn(), received, before=ready),
    "Poller.ready": turning(lambda it: it.poller.ready(_core.Part())),
    "Poller.wake": turning(lambda it: it.poller.wake(_core.Part()), before=ready),
    "Poller.at_end": at_end,
    "Poller.end_turn": [
        turning(lambda it: it.poller.end_turn(), before=full),
        turning(Turn.go_on, Turn.forsaken, before=full, asked=deque),
    ],
    "Poller.tick": [
        turning(lambda it: it.poller.tick(), Turn.look, before=looked_after),
        turning(Turn.go_on, Turn.look, before=looked_after, asked=deque),
    ],
    "Wire.schedule": turning(
        lambda it: it.wires[0].schedule(), before=lambda it: it.wires[0].queue.append_frame(OP_TEXT, "a")
    ),
    "Wire.extend": turning(lambda it: it.wires[0].extend(idle().frames(PROTOCOL_V1))),
    "Wire.ride": turning(ride, ride, before=asking_and_full),
    "Wire.look_after": turning(lambda it: it.wires[0].look_after(0.0), lambda it: it.look(1), before=silent),
    "Wire.end": turning(lambda it: it.wires[0].end(), before=full),
    "Wire.write": turning(lambda it: it.wires[0].write(), before=full),
    "Wire.progress": turning(lambda it: it.wires[0].progress(), before=full),
    "Wire.is_acknowledged": turning(lambda it: it.wires[0].is_acknowledged(), before=silent),
    "Part": pure(Part, callable),
    "Asking": pure(questions, lambda it: it.interval),
    "Asking.wanted": pure(lambda: questions().wanted(1, 1.0)),
    "Asking.wait": pure(lambda: questions().wait(1, 1.0)),
    "Asking.ask": pure(lambda: questions().ask(0, 1.0)),
    "Asking.answer": pure(lambda: questions().answer(b"12345678" * 2, 1)),
    "Marks": pure(Marks, lambda it: it.turn),
    "Budget": pure(lambda: Budget(10), lambda it: it.used),
    "Budget.take": pure(lambda: Budget(10, Budget(20)).take(3)),
    "Budget.move": pure(lambda: Budget(10, Budget(20)).move(Budget(30))),
    "Budget.limit_aside": pure(lambda: Budget(10).limit_aside(3)),
    "KernelTraffic": pure(KernelTraffic, lambda it: it.messages),
    "LogEntry": pure(lambda: LogEntry(0, 2, two()), len),
    "LogEntry.part": pure(lambda: len(LogEntry(0, 2, two()).part(1, 2))),
    "LogSegment": pure(LogSegment, lambda it: it.end),
    "LogSegment.read": kept(lambda it: len(it.open.read(0))),
    "Given": pure(given, lambda it: it.first),
    "Given.reached": pure(lambda: given().reached(0)),
    "Given.longest": pure(lambda: given().longest(0, 10)),
    "Flight": pure(Flight, len),
    "Flight.add": flying(lambda it: it.add(given())),
    "Flight.clear": flying(Flight.clear),
    "Log.append": log_append,
    "Log.listen": logged(lambda it: it.journal.listen(it.outlets[0])),
    "Log.unlisten": logged(lambda it: it.journal.unlisten(it.outlets[0])),
    "Log.settle": logged(lambda it: it.journal.settle()),
    "Log.recount": logged(lambda it: it.journal.recount(it.journal.open, it.entry)),
    "Log.hold": logged(lambda it: it.journal.hold(it.journal.open, 0)),
    "Log.learn": logged(lambda it: it.journal.learn()),
    "Log.charge_hindmost": logged(lambda it: it.journal.charge_hindmost()),
    "Log.leave": logged(lambda it: it.journal.leave(it.journal.open)),
    "Log.keep": keeping,
    "Log.count_as_history": logged(lambda it: it.journal.count_as_history(it.journal.open)),
    "Log.drop_front": kept(lambda it: it.drop_front()),
    "Kept": pure(Kept, lambda it: it.read(0)),
    "Kept.read": kept(lambda it: len(it.front.read(0))),
    "Log.empty": logged(lambda it: it.journal.empty()),
    "LogCursor.stand": logged(lambda it: it.cursors[0].stand()),
    "Outlet.has_room": logged(lambda it: it.outlets[0].has_room()),
    "Log.say": say,
    "Log.tell": [tell, tell_another],
    "LogCursor.release": [released, released_by_half, passing_as_it_is(lambda _, cursor: lambda: cursor.release(2))],
    "LogCursor.release_only": released_by_half,
    "KernelSide.on_iopub": hear,
    "KernelSide.unseen": logged(lambda it: it.side.unseen()),
    "KernelSide.forget_times": logged(lambda it: it.side.forget_times()),
    "Source.end": logged(lambda it: it.source.end()),
    "KernelSide.after_output": replying(lambda side, hold: hold()),
    "KernelSide.give_replies": replying(lambda side, hold: side.give_replies(), before=True),
    "KernelSide.look_at_replies": replying(lambda side, hold: side.look_at_replies(), before=True),
    "KernelSide.holds_enough": replying(lambda side, hold: side.holds_enough(), before=True),
    "Source.pass_to": [passing(), passing(message("execute_reply", "answer"), message("inspect_reply", "another"))],
    "trim_memory": pure(_core.trim_memory),
    "memory_beside_logs": pure(lambda: _core.memory_beside_logs() >= 0),
    "ZmtpStream.charge": pure(lambda: _core.ZmtpStream("SUB").charge(_core.Budget(1))),
    "limit_histories": pure(lambda: _core.limit_histories(8 << 20)),
    "limit_ledgers": pure(lambda: _core.limit_ledgers(8 << 20)),
    "limit_standby": pure(lambda: _core.limit_standby(1 << 62)),
}

#: For the tests: they are called with memory.
SWITCHES = {
    "fail_allocation",
    "force_portable",
    "longest_probe",
    "receive_and_drop",
    "script_syscalls",
    "scripted_left",
    "use_pyzmq",
}

#: Types of the core that `_core.pyi` does not name.
INSIDE = {"Received", "Store", "Views", "Walk"}
#: Made by functions that have a case, or with an object of Python's rooms in other cases.
MADE_BY_OTHERS = {"Batch", "Ends", "Frames", "KernelSide", "Log", "LogCursor", "Outlet", "Source", "Wire"}
#: What Python's rooms do in their subclasses: in the core they raise NotImplementedError.
HOOKS = {
    *("KernelSide.on_word", "KernelSide.tell_listeners", "KernelSide.tell_observers"),
    *("KernelSide.iopub_is_behind", "KernelSide.iopub_waits", "KernelSide.try_later"),
    *("Log.charge_to", "Log.has_passed", "Log.is_empty", "Log.make_room", "Log.offer", "Log.seal", "Log.trim"),
    *("LogCursor.pass_entry", "Outlet.could_not_give", "Outlet.fall_behind", "Outlet.pump", "Outlet.try_to_give"),
}
#: What begins in other cases, and there only: the bytes that it tells of, or gives, are said once.
BENEATH = {"LogCursor.given": "LogCursor.release"}
CALLED = {"__next__", "__getitem__", "__bytes__"}


def public() -> Iterator[str]:
    """The names of what is in `CASES`, or has its reason not to be."""
    for name, value in vars(_core).items():
        if name.startswith("_") or name in INSIDE or getattr(value, "__module__", "fastwire._core") != "fastwire._core":
            continue
        if isinstance(value, type):
            if name not in MADE_BY_OTHERS:
                yield name
            for method, each in vars(value).items():
                full = f"{name}.{method}"
                is_public = callable(each) and (not method.startswith("_") or method in CALLED)
                if is_public:
                    yield full
        elif callable(value) and name not in SWITCHES:
            yield name


# -- failing --


def of_the_core(number: int) -> Callable[[], bool]:
    """Lets that allocation of the core fail; returns what ends it, and says whether it did."""
    _core.fail_allocation(number)

    def end() -> bool:
        fired = _core.scripted_left() == 0
        _core.fail_allocation(0)
        return fired

    return end


def of_python(number: int) -> Callable[[], bool]:
    import _testcapi

    end = _testcapi.remove_mem_hooks
    _testcapi.set_nomemory(number - 1, number)
    return end


QUIET = 6  # calls in a row that nothing has failed in: an allocation may be survived without a word


def exhaust(name: str, case: Case, fail: Callable[[int], Callable[[], object]]) -> int:
    """The number of allocations that failed."""
    call, outcome = case()
    expected = outcome(call())
    failed = quiet = 0
    del call, outcome
    for number in itertools.count(1):
        gc.collect()
        before = _core.live()
        call, outcome = case()
        end = fail(number)
        try:
            result = call()
        except MemoryError:
            fell = True
        else:
            fell = False
        finally:
            end()
        if fell:
            failed += 1
            result = call()
        got = outcome(result)
        if isinstance(got, list) and got[-1:] == [OutOfMemory]:
            assert got[:-1] == expected[: len(got) - 1], (name, number)
        else:
            assert got == expected, (name, number, fell, got, expected)
        del call, outcome, result, got
        after = _core.live()
        if after != before:
            gc.collect()
            after = _core.live()
        assert after == before, (name, number, before, after)
        quiet = 0 if fell else quiet + 1
        if quiet == QUIET:
            return failed
    raise AssertionError


def main(name: str) -> None:
    gc.freeze()
    stray: list[object] = []
    sys.unraisablehook = lambda unraisable: stray.append(repr(unraisable.exc_value))
    cases = CASES[name]
    for case in cases if isinstance(cases, list) else [cases]:
        exhaust(name, case, of_the_core)
        exhaust(name, case, of_python)
    assert not stray, stray


def serve() -> None:
    """For each name, a line of stdin, a line of JSON: how its process ended, and what it said. All are made from this
    one, which has imported everything: that takes longer than most cases do."""
    for line in sys.stdin:
        with tempfile.TemporaryFile() as said:
            if not (child := os.fork()):
                os.dup2(said.fileno(), sys.stderr.fileno())
                main(line.strip())
                sys.exit()
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            sys.stdout.write(json.dumps((code, said.read().decode(errors="replace"))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(each)
    if not sys.argv[1:]:
        serve()

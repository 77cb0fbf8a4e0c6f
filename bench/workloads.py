"""What a cell says, and what it brings back.

A request brings five messages: status busy, execute_input, output, execute_reply, status idle. In a flood the
output is lines, each of which the light kernel sends as a message of its own; a real kernel, and a server, may join
lines, so lines are what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.kernelspec import LIGHT_KERNEL
from bench.messages import BUSY, IDLE, INPUT, MARKERS, REPLY, RESULT

OUTPUT = RESULT
_STREAM = b'"stream"'


@dataclass(frozen=True)
class Workload:
    """A cell and its answer."""

    code: str
    output: bytes = MARKERS[RESULT]  # the text that tells the output's messages from the others
    lines: int = 0  # numbered lines a request; 0: one message

    @property
    def markers(self) -> tuple[bytes, ...]:
        """The text that tells the five kinds apart, by kind."""
        return (*MARKERS[:OUTPUT], self.output, *MARKERS[OUTPUT + 1 :])

    def expected(self, *, replies: bool) -> int:
        """Messages (or lines) that one request brings a client; the reply comes only to the one that asked."""
        kinds = {BUSY, INPUT, IDLE, REPLY} if replies else {BUSY, INPUT, IDLE}
        return len(kinds) + (self.lines or 1)


def result(_kernel: str, *_sizes: int) -> Workload:
    """A sum."""
    return Workload("2+2")


def text(kernel: str, nbytes: int) -> Workload:
    """A result of so many bytes."""
    return Workload(f"big {nbytes}" if kernel == LIGHT_KERNEL else f"'x' * {nbytes}")


def buffers(kernel: str, count: int, nbytes: int) -> Workload:
    """A display with so many binary buffers of so many bytes."""
    code = f"buffers {count} {nbytes}"
    if kernel != LIGHT_KERNEL:
        code = (
            "kernel = get_ipython().kernel; kernel.session.send(kernel.iopub_socket, 'display_data', "
            "{'data': {}, 'metadata': {}, 'transient': {}}, parent=kernel.get_parent(), "
            f"buffers=[bytes({nbytes})] * {count})"
        )
    return Workload(code, b'"display_data"')


def flood(kernel: str, lines: int, nbytes: int) -> Workload:
    """So many lines of so many bytes, each beginning with its number."""
    code = f"flood {lines} {nbytes}"
    if kernel != LIGHT_KERNEL:
        code = f"for i in range({lines}): print(f'{{i:08d}} {'x' * max(1, nbytes - 10)}')"
    return Workload(code, _STREAM, lines)


WORKLOADS = {"result": result, "text": text, "buffers": buffers, "flood": flood}

"""The ZMQ sockets of Jupyter Server's kernels: how many there may be, and how each is opened.

libzmq gives a context 1,023 sockets unless it is told otherwise before the first, and all kernels of a manager share
one context. Where libzmq speaks to kernels, one and its client take seven: with some 145 of them nobody could start,
restart or connect anything.
So the limit is raised to what the process's descriptors allow, and theirs to what the system allows. A client or a
kernel that would come near the end is refused, so that what is there can still be restarted, asked and ended.
"""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import zmq

from fastwire.channels import take_socket
from fastwire.flow import has_room
from fastwire.relay import open_relays
from fastwire.zmtp import Address

__all__ = ["address_of", "open_socket", "raise_limits", "shortage", "shortage_of_descriptors"]

log = logging.getLogger(__name__)

#: As many descriptors as anybody has use for; a kernel, which inherits the limit, may have to close them all.
MOST_DESCRIPTORS = 1 << 16

#: Where a system lists the descriptors of the process that asks.
LISTED = ("/proc/self/fd", "/dev/fd")


# -- how many --------------------------------------------------------------------------------------


def raise_limits(context: zmq.Context[Any]) -> None:
    """Allow as many descriptors and sockets as the system does. In a context that has sockets it changes nothing, but
    what it says then of its limit would be wrong."""
    raise_descriptors()
    if not opened_by(context):
        context.set(zmq.MAX_SOCKETS, min(descriptor_limit(), int(context.get(zmq.SOCKET_LIMIT))))


def raise_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def descriptors() -> int:
    """How many are open; 0 where the system does not tell. Linux has the number since 6.2; to list thousands takes
    longer than all else that a client needs."""
    with suppress(OSError):
        if number := os.stat(LISTED[0]).st_size:  # noqa: PTH116 - of a folder that is none
            return number
    for folder in LISTED:
        with suppress(OSError):
            return len(os.listdir(folder))  # noqa: PTH208 - there may be thousands, and only their number is wanted
    return 0


def opened_by(context: zmq.Context[Any]) -> int:
    return len(context._sockets)  # noqa: SLF001 - libzmq does not tell


def sockets(context: zmq.Context[Any]) -> int:
    """How many are open, with those by which libzmq tells of a broken connection."""
    return opened_by(context) + len(open_relays)


def shortage(context: zmq.Context[Any]) -> str | None:
    """Why one more client or kernel is not admitted, or None."""
    most = int(context.get(zmq.MAX_SOCKETS))
    return shortage_of_descriptors() or no_room("ZMQ sockets", most, sockets(context))


def shortage_of_descriptors() -> str | None:
    """The same of a client that takes no ZMQ socket."""
    return no_room("file descriptors", descriptor_limit(), descriptors())


def no_room(what: str, limit: int, used: int) -> str | None:
    return (
        None if has_room(limit, used) else f"the server has no room for more: {used} of its {limit} {what} are in use"
    )


# -- opening one -----------------------------------------------------------------------------------


#: What a kernel manager may have been given for reaching its kernels in a way of its own.
REACHING = ("_create_connected_socket", "_make_url")

#: Defaults of a context that do not change what is said to a kernel.
HARMLESS = {zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM, zmq.IMMEDIATE}


def address_of(manager: Any, channel: str) -> Address | None:
    """Where a kernel listens that can be spoken to without libzmq. None when its manager has a way of its own to reach
    it, when it encrypts (CURVE), or when it listens elsewhere than at an IP address or a Unix socket."""
    if getattr(manager, "curve_publickey", None) is not None or set(manager.context.sockopts) - HARMLESS:
        return None
    if not all(is_jupyters_own(manager, name) for name in (f"connect_{channel}", *REACHING)):
        return None
    return Address.of(manager._make_url(channel))  # noqa: SLF001 - as its `connect_*` have it


def is_jupyters_own(manager: Any, name: str) -> bool:
    """Whether a method is that of jupyter_client, of which there are two: `IOLoopKernelManager` wraps sockets."""
    if name in vars(manager):
        return False
    owner = next((each for each in type(manager).__mro__ if name in vars(each)), None)
    return owner is not None and owner.__module__.partition(".")[0] == "jupyter_client"


def open_socket(manager: Any, channel: str, identity: bytes | None) -> zmq.Socket[bytes]:
    """A socket of a kernel, through its manager's ``connect_*`` (provisioners, keys and remote addresses are its
    own), with an unbounded receive queue: libzmq must not drop what the kernel sends. That of stdin tells whether it is
    connected (`Session.until_it_can_be_asked`)."""
    options: dict[int, int] = {zmq.RCVHWM: 0}
    if channel == "stdin":
        options[zmq.IMMEDIATE] = 1
    with defaults(manager.context, options):
        opened = take_socket(getattr(manager, f"connect_{channel}")(identity=identity))
    if opened.rcvhwm != 0:
        log.warning("the %s socket of kernel %s drops messages beyond %s", channel, manager.kernel_id, opened.rcvhwm)
    return opened


@contextmanager
def defaults(context: zmq.Context[Any], options: Mapping[int, int]) -> Iterator[None]:
    """Sockets made meanwhile have these options; they count only when set before they connect."""
    before = dict(context.sockopts)
    context.sockopts.update(options)
    try:
        yield
    finally:
        context.sockopts.clear()
        context.sockopts.update(before)

"""The settings of fastwire in Jupyter Server, as traits: ``c.Fastwire``."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Bool, Float, Integer, TraitError, Unicode, default, observe, validate
from traitlets.config import Configurable

from fastwire.disk import is_in_memory
from fastwire.flow import KIB, Limits

__all__ = ["Fastwire", "usable"]

log = logging.getLogger(__name__)

#: Of `Limits`, what is a number, and the largest that each may be: more than anybody has of bytes, and of seconds.
NUMBERS = [field.name for field in fields(Limits) if type(field.default) in (int, float)]
MOST = 1 << 50


class Fastwire(Configurable):
    """Settings of the relay between kernels and clients."""

    resume_timeout = Float(
        Limits.resume_timeout,
        min=0,
        config=True,
        help="Seconds a session is kept for its client to come back after its connection broke.",
    )
    resume_timeout_closed = Float(
        Limits.resume_timeout_closed,
        min=0,
        config=True,
        help="Seconds a session is kept for its client to come back after the client closed the connection.",
    )
    detached_sessions = Integer(
        0,
        config=True,
        help="Of no effect any more: what is kept for clients that are away is bounded in bytes, by "
        "client_memory_limit and client_spill_limit, and in time, by resume_timeout.",
    )
    client_memory_limit = Integer(
        Limits.client_memory_limit,
        min=64 * KIB,  # with less a reply of a few lines would be too much
        config=True,
        help="Bytes of memory that what one kernel has said may take until the clients that are behind have it. Half "
        "of it is used before anything is put aside on disk.",
    )
    user_memory_limit = Integer(
        Limits.user_memory_limit,
        min=0,
        config=True,
        help="Bytes of memory that undelivered messages may take of all kernels whose hindmost client is one user's, "
        "what waits in the queues of sockets included. Clients that show the server's token and no cookie count as one "
        "user.",
    )
    total_memory_limit = Integer(
        Limits.total_memory_limit,
        min=0,
        config=True,
        help="Bytes of memory that the undelivered messages of all kernels may take together, what waits in the queues "
        "of sockets included, what refuses replays of messages and what is known of runs.",
    )
    acknowledge = Bool(
        Limits.acknowledge,
        config=True,
        help="Ask clients by WebSocket pings what they have received; what they have not, their next connection gets. "
        "Without it, what the system's TCP buffers took counts as received.",
    )
    merge = Bool(
        Limits.merge,
        config=True,
        help="Join the adjacent lines that a cell has printed when a quarter of client_memory_limit is used.",
    )
    spill = Bool(
        Limits.spill,
        config=True,
        help="Put aside on disk what does not fit into client_memory_limit. Otherwise the oldest output is dropped.",
    )
    spill_dir = Unicode(
        config=True,
        help="Directory for messages that are put aside, on a disk and not in memory. Default: Jupyter's runtime "
        "directory. The files have no name and are readable by nobody else.",
    )
    client_spill_limit = Integer(
        Limits.client_spill_limit,
        min=0,
        config=True,
        help="Bytes of one kernel's messages that may be put aside. Beyond that the oldest output is dropped, and the "
        "clients that have not got it are told in its place.",
    )
    user_spill_limit = Integer(
        Limits.user_spill_limit,
        min=0,
        config=True,
        help="The same of all kernels whose hindmost client is one user's.",
    )
    total_spill_limit = Integer(Limits.total_spill_limit, min=0, config=True, help="The same of all kernels together.")
    spill_keep_free = Integer(
        Limits.spill_keep_free, min=0, config=True, help="Bytes of the disk of spill_dir that are left to others."
    )
    history_limit = Integer(
        Limits.history_limit,
        min=0,
        config=True,
        help="Bytes of memory in which the messages of one kernel's runs are kept when all clients have them, for "
        "pages that were reloaded and for programs that ask (/fastwire/api/kernels/<id>/runs): 2 MiB are some 20,000 "
        "lines. They are taken as output comes, and are part of what the limits of memory allow: where half of one is "
        "used they go first, the longest ones. 0 keeps none.",
    )
    take_over = Bool(
        False,
        config=True,
        help="Whether fastwire takes the place of a kernel_websocket_connection_class that a configuration or an "
        "extension has chosen, as jupyter-server-documents does. Otherwise it steps aside.",
    )
    write_deadline = Float(
        Limits.write_deadline,
        min=0,
        config=True,
        help="Seconds until a client is closed whose connection takes no byte although some wait, 0 for never. It gets "
        "them when it comes back; a client without a session_id is left to ws_ping_timeout.",
    )
    uplink_deadline = Float(
        Limits.uplink_deadline,
        min=0,
        config=True,
        help="Seconds until a client is closed that is held back at uplink_limit and whose kernel takes nothing.",
    )
    max_message_size = Integer(
        Limits.max_message_size,
        min=0,
        config=True,
        help="Bytes of the longest message a client may send; closed with 1009 beyond. "
        "The websocket_max_message_size of ServerApp.tornado_settings wins.",
    )
    max_fragments = Integer(
        Limits.max_fragments,
        min=0,
        config=True,
        help="Frames in which a client may send one message, 0 for any number; closed with 1008 beyond.",
    )
    control_frame_rate = Float(
        Limits.control_frame_rate,
        min=0,
        config=True,
        help="WebSocket pings and pongs a second that a client may send unasked, on the average of ten seconds; closed "
        "with 1008 beyond.",
    )
    handshake_timeout = Float(
        Limits.handshake_timeout,
        min=0,
        config=True,
        help="Seconds until a connection is closed that has not sent a request's headers, the one that opens a "
        "WebSocket included, or nothing more of its body; 0 for never. Of python -m fastwire.serve.",
    )
    clients_per_kernel = Integer(
        Limits.clients_per_kernel,
        min=0,
        config=True,
        help="WebSockets that may be open to one kernel; closed with 1013 beyond. As many of its clients may be away; "
        "beyond, the longest away is given up. Of kernels behind a gateway the gateway has the clients.",
    )
    clients_per_user = Integer(
        Limits.clients_per_user,
        min=0,
        config=True,
        help="WebSockets that one user may have open to kernels; closed with 1013 beyond. Clients that show the "
        "server's token and no cookie count as one user.",
    )
    uplink_limit = Integer(
        Limits.uplink_limit,
        min=0,
        config=True,
        help="Bytes of a client's messages that a kernel's TCP has not taken, also those in libzmq's queues; "
        "beyond that the client is not read until it does.",
    )
    accept_invalid_signatures = Bool(
        False,
        config=True,
        help="Pass on kernels' messages whose signature does not match, and those that come again, with a warning. "
        "Jupyter Server never checked signatures for clients of the v1 protocol; use this for a kernel that cannot "
        "sign, or sends one message many times.",
    )

    all_websockets = Bool(
        False,
        config=True,
        help="Carry the server's other WebSockets too: terminals, language servers, collaboration. A terminal's "
        "program waits for a slow client; any other client for which more than client_memory_limit waits is closed. "
        "What waits for all of them takes an eighth of total_memory_limit.",
    )

    gateway = Bool(
        True,
        config=True,
        help="Pass clients' frames on to the gateway of the kernels (--gateway-url) as they are. Otherwise Jupyter "
        "Server's own connection class does, which takes each for text.",
    )

    gateway_keep_kernels = Bool(
        False,
        config=True,
        help="Leave kernels running at the gateway when the server ends. The next one with the same root directory and "
        "gateway knows them again.",
    )

    zmtp = Bool(
        True,
        config=True,
        help="Speak to kernels without libzmq where that is possible: over tcp or ipc, without CURVE, ZMTP 3, with a "
        "kernel manager that connects as jupyter_client does. Otherwise, and for all when this is off, libzmq does.",
    )

    @observe("detached_sessions")
    def _no_detached_sessions(self, _: Any) -> None:
        log.warning(
            "Fastwire.detached_sessions has no effect any more, remove it: what is kept for clients that are away is "
            "bounded by client_memory_limit, client_spill_limit and resume_timeout."
        )

    @validate(*NUMBERS)
    def _valid_number(self, proposal: Any) -> Any:
        """The core counts in words of the machine, and no timer is set to infinity, which is a way to say never, or to
        what is no number."""
        value: float = MOST if proposal["value"] == inf else proposal["value"]
        if not 0 <= value <= MOST:
            raise TraitError(f"Fastwire.{proposal['trait'].name} has to be a number from 0 to {MOST}, and is {value}")
        return value

    @default("spill_dir")
    def _default_spill_dir(self) -> str:
        return jupyter_runtime_dir()

    @validate("spill_dir")
    def _valid_spill_dir(self, proposal: Any) -> str:
        directory = str(proposal["value"])
        if self.spill and not Path(directory).is_dir():
            raise TraitError(f"Fastwire.spill_dir: there is no directory {directory}")
        return directory

    def limits(self) -> Limits:
        """What the relays are to keep to."""
        return Limits(
            **{field.name: getattr(self, field.name) for field in fields(Limits) if self.has_trait(field.name)}
        )


@cache
def usable(limits: Limits) -> Limits:
    """Without a directory to spill to where that would be memory, too."""
    if not limits.spill or not limits.spill_dir:
        return limits
    try:
        if not is_in_memory(limits.spill_dir):
            return limits
        problem = "is memory itself (tmpfs)"
    except OSError as error:
        problem = f"cannot be used ({error.strerror})"
    log.warning(
        "Fastwire.spill_dir %s %s: what exceeds client_memory_limit will be dropped. Set it to a directory on a disk, "
        "or Fastwire.spill to False.",
        limits.spill_dir,
        problem,
    )
    return replace(limits, spill_dir="")

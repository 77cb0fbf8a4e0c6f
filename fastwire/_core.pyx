# cython: language_level=3, embedsignature=False, binding=False, freethreading_compatible=False, auto_pickle=False
"""The compiled core. Its contract, with shapes, units and errors, is `_core.pyi`.

The files below are one extension, in the order bytes flow: a kernel's message is drained from ZMQ, verified, scanned,
encoded and queued; a client's bytes are parsed, decoded, signed and sent.
"""

cimport cython
from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport (
    PyBytes_AS_STRING,
    PyBytes_CheckExact,
    PyBytes_FromStringAndSize,
    PyBytes_GET_SIZE,
)
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.sequence cimport PySequence_Fast
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from cpython.unicode cimport PyUnicode_DecodeUTF8, PyUnicode_GET_LENGTH
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENOMEM, errno
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memchr, memcmp, memcpy, memmove, memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

import json
import os
import sys
from errno import errorcode
from weakref import WeakSet

from fastwire.errors import (
    DuplicateSignature,
    FastwireError,
    InvalidPayload,
    InvalidSignature,
    MalformedMessage,
    MessageError,
    MessageTooBig,
    OutOfMemory,
    PolicyViolation,
    ProtocolError,
    SocketClosed,
    ZmtpError,
)

include "core/base.pxi"
include "core/histogram.pxi"
include "core/turn.pxi"
include "core/sign.pxi"
include "core/scan.pxi"
include "core/codec.pxi"
include "core/parser.pxi"
include "core/queue.pxi"
include "core/drain.pxi"
include "core/backlog.pxi"
include "core/activity.pxi"
include "core/ledger.pxi"
include "core/zmtp.pxi"
include "core/uplink.pxi"
include "core/wire.pxi"
include "core/entries.pxi"
include "core/log.pxi"
include "core/history.pxi"
include "core/source.pxi"

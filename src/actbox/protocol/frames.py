"""Frames: a length prefix, a small JSON header, and raw bytes behind it.

::

    uint32 header length | uint32 payload length | header (JSON object, UTF-8) | payload

Both lengths are big-endian and checked against their bounds before anything is allocated. This file is the one part of
actbox that host and guest share; it knows nothing of what the headers say, and does no I/O.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_HEADER = 1 << 20
MAX_PAYLOAD = 64 << 20
PREFIX = struct.Struct("!II")

# A longer whole number is nothing that a header needs, and costs quadratic time to convert.
_MAX_DIGITS = 20
_MAX_KEYS = 10_000

# Bound once, here and at the end of the file: what a guest does to the json module is no reason for its kernel to fall
# silent.
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class FrameError(Exception):
    """The bytes are not a frame: a length over its bound, or a header that is no plain JSON object."""


class Frame(NamedTuple):
    """One decoded frame. `header` is a JSON object of the sender's making: its fields are not checked here."""

    header: dict[str, Any]
    payload: bytes


def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """One frame as bytes.

    Raises:
        FrameError: header or payload are over their bounds, or the header is nested too deeply.
    """
    try:
        head = _to_json(header).encode()
    except RecursionError as exc:
        raise FrameError("the header is nested too deeply") from exc
    if len(head) > MAX_HEADER or len(payload) > MAX_PAYLOAD:
        raise FrameError(f"frame too large: header {len(head)}, payload {len(payload)} bytes")
    return b"".join((PREFIX.pack(len(head), len(payload)), head, payload))


class Decoder:
    """Turns received bytes into frames; holds at most one incomplete frame. `max_payload` may be changed.

    State: `_buffer`, the bytes received and not yet consumed, and `_start`, where the next frame begins in it;
    `_failure`, once the stream cannot be trusted any further.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._buffer = bytearray()
        self._start = 0
        self.max_payload = max_payload
        self._failure: FrameError | None = None

    @property
    def pending(self) -> int:
        """Bytes received that are not part of a delivered frame."""
        return len(self._buffer) - self._start

    def feed(self, data: bytes | memoryview) -> None:
        """Add received bytes."""
        if self._start == len(self._buffer):
            del self._buffer[:]
            self._start = 0
        elif self._start > MAX_HEADER:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def frames(self) -> Iterator[Frame]:
        """The complete frames received so far.

        Raises:
            FrameError: the stream cannot be trusted any further.
        """
        while (frame := self.next_frame()) is not None:
            yield frame

    def next_frame(self) -> Frame | None:
        """The next complete frame, or None until more bytes are fed.

        Raises:
            FrameError: the stream cannot be trusted any further.
        """
        if self._failure is not None:
            raise self._failure
        try:
            return self._next_frame()
        except FrameError as exc:
            self._failure = exc
            raise

    def _next_frame(self) -> Frame | None:
        if self.pending < PREFIX.size:
            return None
        head_size, payload_size = PREFIX.unpack_from(self._buffer, self._start)
        if not 0 < head_size <= MAX_HEADER or payload_size > self.max_payload:
            raise FrameError(f"lengths out of bounds: header {head_size}, payload {payload_size} bytes")
        if self.pending < PREFIX.size + head_size + payload_size:
            return None
        head_start = self._start + PREFIX.size
        payload_start = head_start + head_size
        self._start = payload_start + payload_size
        with memoryview(self._buffer) as view:
            header = parse_header(bytes(view[head_start:payload_start]))
            return Frame(header, bytes(view[payload_start : self._start]))


def parse_header(data: bytes) -> dict[str, Any]:
    """A header's JSON object, strictly: no NaN, no repeated key, no endless number.

    Raises:
        FrameError: it is anything else.
    """
    try:
        header: Any = _from_json(data.decode())
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"bad header: {type(exc).__name__}") from exc
    if type(header) is not dict:
        raise FrameError("bad header: not an object")
    return cast("dict[str, Any]", header)


def _refuse(constant: str) -> float:
    raise ValueError(constant)


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("number too long")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0:
        raise ValueError("number out of range")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_KEYS:
        raise ValueError("too many keys")
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("repeated key")
    return made


_from_json = json.JSONDecoder(
    parse_constant=_refuse, parse_int=_bounded_int, parse_float=_finite, object_pairs_hook=_unique
).decode

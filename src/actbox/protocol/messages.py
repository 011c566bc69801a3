"""Frames from a kernel, checked and turned into typed messages. Everything in them is the guest's word."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from actbox.errors import ProtocolError
from actbox.events import (
    ClearOutput,
    DisplayData,
    Error,
    Event,
    ExecuteResult,
    Stream,
    UpdateDisplayData,
)

if TYPE_CHECKING:
    from actbox.protocol.frames import Frame

_MAX_PARTS = 64
_MAX_NAME = 256
# Bytes of one piece of an archive, and names left out of one.
MAX_PIECE = 256 << 10
_MAX_LEFT_OUT = 1000
# Bytes of one piece of text: what a kernel of ours sends at the most is 1 MiB.
_MAX_TEXT = 2 << 20
# A key or value of JSON may be two bytes on the wire and a hundred here, and deeper ones than these nobody shows.
_MAX_VALUES = 1_000_000
_MAX_DEPTH = 200


@dataclass(frozen=True, slots=True)
class Ready:
    """The kernel is up; its versions are for people to read, Landlock's is the ABI in force, 0 for none."""

    python: str
    ipython: str
    landlock: int = 0


@dataclass(frozen=True, slots=True)
class SetupFailed:
    """The session's boundary could not be built, said before any code of the guest ran."""

    layer: str
    detail: str


@dataclass(frozen=True, slots=True)
class Archive:
    """A piece of the archive that is transfer `id`: bytes that nobody has looked at yet, at most `MAX_PIECE`."""

    id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """The session's code calls a function of the host; `id` is the guest's, and is for the answer alone."""

    id: int
    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of a cell or transfer; comes behind its last output.

    `left_out` names what an archive could not hold; `passed` is what the guest says of a limit that stopped it.
    """

    id: int
    status: str
    execution_count: int
    left_out: tuple[str, ...] = ()
    passed: object = None


Message = Ready | SetupFailed | Reply | Archive | Call | Event


def decode(frame: Frame) -> Message:
    """The message in a frame.

    Raises:
        ProtocolError: it is none that a kernel may send.
    """
    header = frame.header
    match header.get("type"):
        case "stream":
            name = header.get("name")
            if name in ("stdout", "stderr") and len(frame.payload) <= _MAX_TEXT:
                return Stream(name, frame.payload.decode("utf-8", "replace"))
        case "display_data" | "update_display_data" as kind:
            made = DisplayData if kind == "display_data" else UpdateDisplayData
            data, left_out = _bundle(frame)
            return made(data, _mapping(header), _display_id(header), left_out)
        case "execute_result":
            data, left_out = _bundle(frame)
            return ExecuteResult(data, _mapping(header), _number(header, "execution_count"), left_out)
        case "clear_output":
            return ClearOutput(wait=header.get("wait") is True)
        case "error" if len(frame.payload) <= _MAX_TEXT:
            trace = frame.payload.decode("utf-8", "replace")
            return Error(_text(header, "ename"), _text(header, "evalue"), trace)
        case "execute_reply":
            status = _text(header, "status")
            if status in ("ok", "error", "interrupted"):
                return Reply(
                    _number(header, "id"),
                    status,
                    _number(header, "execution_count"),
                    read_left_out(header),
                    header.get("limit"),
                )
        case "archive" if len(frame.payload) <= MAX_PIECE:
            return Archive(_number(header, "id"), frame.payload)
        case "call":
            return Call(_number(header, "id"), _text(header, "name")[:_MAX_NAME], frame.payload)
        case "ready":
            landlock = _number(header, "landlock") if "landlock" in header else 0
            return Ready(_text(header, "python")[:_MAX_NAME], _text(header, "ipython")[:_MAX_NAME], landlock)
        case "failed":
            return SetupFailed(_text(header, "layer")[:_MAX_NAME], _text(header, "detail"))
        case _:
            pass
    raise ProtocolError(f"the kernel sent a message that it may not send: {ascii(header.get('type'))[:80]}")


def _bundle(frame: Frame) -> tuple[dict[str, Any], int]:
    """A display's formats, and how many are missing: left out by the kernel, or too costly to hold here."""
    parts: Any = frame.header.get("parts")
    if type(parts) is not list or len(cast("list[Any]", parts)) > _MAX_PARTS:
        raise ProtocolError("a display without a list of parts")
    left_out = _number(frame.header, "left_out") if "left_out" in frame.header else 0
    data: dict[str, Any] = {}
    start, values = 0, 0
    for part in cast("list[Any]", parts):
        match part:
            case [str(mime), str(form), int(size)] if len(mime) <= _MAX_NAME and size >= 0:
                block = frame.payload[start : start + size]
                if len(block) != size:
                    raise ProtocolError("a display whose parts are longer than its payload")
                start += size
                if form == "json":
                    values += sum(map(block.count, (b",", b":", b"[", b"{")))
                    if values > _MAX_VALUES:
                        left_out += 1
                        continue
                try:
                    data[_valid(mime)] = _content(form, block)
                except _TooDeep:
                    left_out += 1
            case _:
                raise ProtocolError("a display with a malformed part")
    return data, left_out


def _content(form: str, block: bytes) -> Any:
    if form == "binary":
        return block
    if form == "text":
        return block.decode("utf-8", "replace")
    if form == "json":
        try:
            return _without_surrogates(json.loads(block.decode(), parse_constant=str))
        except (ValueError, RecursionError) as exc:
            raise ProtocolError("a display with malformed JSON") from exc
    raise ProtocolError("a display with a part of unknown form")


def _mapping(header: dict[str, Any]) -> dict[str, Any]:
    value: Any = header.get("metadata")
    if type(value) is not dict:
        raise ProtocolError("a display whose metadata is no object")
    return cast("dict[str, Any]", _without_surrogates(value))


def _display_id(header: dict[str, Any]) -> str | None:
    value = header.get("display_id")
    if value is None:
        return None
    return _text(header, "display_id")[:_MAX_NAME]


def read_left_out(header: dict[str, Any]) -> tuple[str, ...]:
    """What an archive could not hold, made printable. Raises `ProtocolError`."""
    match header.get("left_out"):
        case None:
            return ()
        case [*names] if len(names) <= _MAX_LEFT_OUT and all(type(name) is str for name in names):
            return tuple(legible(name) for name in names)
        case _:
            raise ProtocolError("the field left_out is no list of names")


def legible(text: str) -> str:
    """Text of which every character can be shown, and drives no terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _text(header: dict[str, Any], field: str) -> str:
    value = header.get(field)
    if type(value) is not str:
        raise ProtocolError(f"the field {field} is no text")
    return _valid(value)


def _valid(text: str) -> str:
    """JSON can spell a lone surrogate, which no encoding carries: it would break whoever writes the text."""
    return text.encode("utf-8", "backslashreplace").decode()


class _TooDeep(ProtocolError):
    pass


def _without_surrogates(value: Any, depth: int = 0) -> Any:
    """A JSON value all of whose texts can be encoded.

    Raises:
        _TooDeep: it is nested deeper than anything that is shown: whoever walks it later needs the room too.
    """
    if depth > _MAX_DEPTH:
        raise _TooDeep("JSON nested too deeply")
    match value:
        case str():
            return _valid(value)
        case list():
            items = cast("list[Any]", value)
            for index, item in enumerate(items):
                items[index] = _without_surrogates(item, depth + 1)
            return items
        case dict():
            pairs: dict[str, Any] = {}
            for name, item in cast("dict[str, Any]", value).items():
                pairs[_valid(name)] = _without_surrogates(item, depth + 1)
            return pairs
        case _:
            return value


def _number(header: dict[str, Any], field: str) -> int:
    value = header.get(field)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ProtocolError(f"the field {field} is no whole number")
    return value

# NumPy, pandas, pyarrow and IPython's own types are unknown or partly so.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The session's variables, looked at and moved between its cells: the kernel's side.

Looking runs no code of the user's: what is known of a value comes from Python itself or from the library that its type
is of, and of another type only its name is told. What else could run (a table's columns may be anything) runs as a cell
does: it can be interrupted, and the host has set a time for it.
"""

from __future__ import annotations

import collections
import itertools
import json
import sys
import types
from typing import TYPE_CHECKING, Any, cast

from . import values
from .places import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..protocol.frames import Frame
    from .interrupts import Interrupts
    from .output import Channel
    from .shell import Shell

REQUESTS = frozenset(("variables", "get", "set"))
PIECE = 256 << 10
_MAX_NAME = 200
_MAX_LISTING = 3 << 20
# Characters of all previews together; the variables beyond are told without.
_MAX_PREVIEWS = 256 << 10
_DEPTH = 3
_ITEMS = 10
# A longer number takes long to write in decimals.
_MAX_BITS = 256
# Py_TPFLAGS_HEAPTYPE: made by a class statement, or as if.
_MADE = 1 << 9
_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset, collections.deque)
_CONTAINERS = (list, tuple, set, frozenset, dict, collections.deque)
_SHOWN_BY_PYTHON = (bool, float, complex, type(None), type(...), type(NotImplemented))
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Missing(Refused):
    """There is no variable of this name."""


class Server:
    """What serves requests for variables: arguments as of `Transfers`, and the shell whose namespace they are in."""

    def __init__(self, channel: Channel, interrupts: Interrupts, receive: Callable[[], Frame], shell: Shell) -> None:
        self._channel = channel
        self._interrupts = interrupts
        self._receive = receive
        self._shell = shell


class Variables(Server):
    """Serves requests for variables."""

    def serve(self, request: dict[str, Any]) -> None:
        """Carry out a request.

        Raises:
            Refused: it cannot be done, for the reason given.
        """
        number = int(request["id"])
        if request["type"] == "variables":
            for piece in _lines(self._listed(int(request["limit"]), int(request["preview"]))):
                self._channel.send({"type": "archive", "id": number}, piece)
        elif request["type"] == "get":
            self._get(number, request["name"], int(request["max_bytes"]))
        else:
            self._set(request)

    def _listed(self, limit: int, preview: int) -> Iterator[dict[str, Any]]:
        found = ((name, value) for name, value in user_variables(self._shell) if not name.startswith("_"))
        room = _MAX_PREVIEWS
        for name, value in itertools.islice(found, limit):
            told = {"name": name[:_MAX_NAME], **describe(value, preview)}
            room -= len(told.get("preview") or "")
            yield told if room >= 0 else {**told, "preview": None}

    def _get(self, number: int, name: str, max_bytes: int) -> None:
        try:
            value = self._shell.user_ns[name]
        except KeyError:
            raise Missing("there is no such variable") from None
        encoded = values.encode(value)
        data = memoryview(encoded.data)
        if len(data) > max_bytes:
            raise Refused(f"it is {len(data)} bytes, more than the {max_bytes} allowed; pass a larger max_bytes")
        self._channel.send({"type": "archive", "id": number}, values.prefix(encoded.header))
        for start in range(0, len(data), PIECE):
            self._channel.send({"type": "archive", "id": number}, bytes(data[start : start + PIECE]))

    def _set(self, request: dict[str, Any]) -> None:
        data = bytearray()
        while (frame := self._receive()).header.get("type") != "archive_end":
            if frame.header.get("type") == "archive":
                data += frame.payload
        value = values.decode(request["value"], data)
        with self._interrupts.held:
            self._shell.user_ns[request["name"]] = value


def user_variables(shell: Shell) -> list[tuple[str, Any]]:
    """The names that cells have made, or that were put there, and their values; IPython's own are left out."""
    hidden = shell.user_ns_hidden
    nothing = object()
    return [
        (name, value)
        for name, value in list(shell.user_ns.items())
        if type(name) is str and hidden.get(name, nothing) is not value
    ]


def _lines(found: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    """JSON, a line each, in pieces; what is beyond a bound is left out."""
    waiting, room = b"", _MAX_LISTING
    for one in found:
        line = f"{_to_json(one)}\n".encode()
        room -= len(line)
        if room < 0:
            break
        if len(waiting) + len(line) > PIECE:
            yield waiting
            waiting = b""
        waiting += line
    if waiting:
        yield waiting


# -- looking at a value without asking it ----------------------------------------------------------------------------


def describe(value: Any, room: int) -> dict[str, Any]:
    """What can be said of a value: its type, and where known shape, length, dtype, bytes, and a preview."""
    told: dict[str, Any] = {"type": values.type_name(value)}
    try:
        told.update(_of_library(value, room) or _of_python(value, room))
    except Exception:  # noqa: BLE001 - a library's type in a state that it does not know itself; its name must do
        return told
    preview = told.get("preview")
    if preview is not None:
        told["preview"] = preview[:room]
    return told


def _of_python(value: Any, room: int) -> dict[str, Any]:
    kind = type(value)
    told: dict[str, Any] = {"bytes": object.__sizeof__(value)}
    if _among(kind, _SIZED):
        told = {"bytes": cast("Any", kind).__sizeof__(value), "length": len(value)}
    elif kind is memoryview:
        told = {"bytes": value.nbytes, "length": value.nbytes}
    elif kind is int:
        told = {"bytes": int.__sizeof__(value)}
    text = show(value, room)
    return told if text is None else {**told, "preview": text}


def _of_library(value: Any, room: int) -> dict[str, Any] | None:
    kind = type(value)
    numpy, pandas, pyarrow = (sys.modules.get(name) for name in ("numpy", "pandas", "pyarrow"))
    if numpy is not None and kind is numpy.ndarray:
        told: dict[str, Any] = {"bytes": value.nbytes, "shape": list(value.shape), "dtype": value.dtype.str}
        if value.dtype.kind in values.PLAIN_KINDS:
            told["preview"] = _joined("[", _items(value.flat[:_ITEMS]), "]", room, more=value.size > _ITEMS)
        return told
    if numpy is not None and _is_scalar(numpy, kind) and value.dtype.kind in values.PLAIN_KINDS:
        text = show(_items(value.reshape(1))[0], room)
        return {"bytes": value.nbytes, "shape": [], "dtype": value.dtype.str, "preview": text}
    if pandas is not None and kind is pandas.DataFrame:
        columns = [f"{_inner(name, 50, _DEPTH)}: {dtype}" for name, dtype in _columns(numpy, value)]
        more = value.shape[1] > _ITEMS
        size = int(value.memory_usage().sum())
        return {"bytes": size, "shape": list(value.shape), "preview": f"{', '.join(columns)}{', ...' if more else ''}"}
    if pandas is not None and kind is pandas.Series:
        return {"bytes": int(value.memory_usage()), "shape": list(value.shape), "dtype": _dtype(numpy, value.dtype)}
    if pyarrow is not None and kind is pyarrow.Table:
        fields = [f"{field.name!r}: {field.type}" for field in list(value.schema)[:_ITEMS]]
        return {"bytes": value.nbytes, "shape": [value.num_rows, value.num_columns], "preview": ", ".join(fields)}
    return None


def _among(kind: type, kinds: tuple[type, ...]) -> bool:
    """Whether it is one of these types; to compare them would ask the type of a type that a cell has made."""
    return any(kind is each for each in kinds)


def _is_scalar(numpy: Any, kind: type) -> bool:
    """Whether it is a scalar of NumPy's own, and no class that derives from one."""
    return issubclass(kind, numpy.generic) and not type.__dict__["__flags__"].__get__(kind) & _MADE


def _items(array: Any) -> list[Any]:
    """The items of a small array as Python's own; of dates their texts."""
    return (array.astype("U") if array.dtype.kind in "Mm" else array).tolist()


def _columns(numpy: Any, frame: Any) -> Iterator[tuple[Any, str]]:
    for number in range(min(frame.shape[1], _ITEMS)):
        yield frame.columns[number], _dtype(numpy, frame.dtypes.iloc[number])


def _dtype(numpy: Any, dtype: Any) -> str:
    return dtype.str if isinstance(dtype, numpy.dtype) else values.type_name(dtype)


def show(value: Any, room: int, depth: int = _DEPTH) -> str | None:
    """A value as text of about `room` characters; None if only its own code could tell."""
    kind = type(value)
    if _among(kind, _SHOWN_BY_PYTHON):
        return repr(value)
    if kind is int:
        return repr(value) if value.bit_length() <= _MAX_BITS else f"<int of {value.bit_length()} bits>"
    if _among(kind, (str, bytes, bytearray)):
        return repr(value) if len(value) <= room else f"{value[:room]!r}..."
    if kind is range:
        return "range(...)" if max(map(abs, (value.start, value.stop, value.step))) >> _MAX_BITS else repr(value)
    if kind is types.ModuleType:
        name = value.__dict__.get("__name__")
        return f"<module {name[:_MAX_NAME]}>" if type(name) is str else None
    if kind is types.FunctionType:
        code = value.__code__
        return f"{values.exact(value.__name__)[:_MAX_NAME]}({', '.join(code.co_varnames[: code.co_argcount])})"[:room]
    if issubclass(kind, type):
        return f"<class {values.exact(type.__dict__['__qualname__'].__get__(value))[:_MAX_NAME]}>"
    if _among(kind, _CONTAINERS):
        return _shown_container(kind, value, room, depth)
    return None


def _shown_container(kind: type, value: Any, room: int, depth: int) -> str:
    opening, closing = {list: "[]", tuple: "()", dict: "{}", set: "{}"}.get(kind, (f"{kind.__name__}([", "])"))
    more = len(value) > _ITEMS
    if not depth:
        return f"{opening}...{closing}" if value else f"{opening}{closing}"
    if kind is dict:
        pairs = list(itertools.islice(cast("dict[Any, Any]", value).items(), _ITEMS))
        inner = [f"{_inner(key, room, depth)}: {_inner(item, room, depth)}" for key, item in pairs]
        return f"{{{', '.join(inner)}{', ...' if more else ''}}}"
    return _joined(opening, list(itertools.islice(value, _ITEMS)), closing, room, more=more, depth=depth)


def _joined(opening: str, items: list[Any], closing: str, room: int, *, more: bool, depth: int = _DEPTH) -> str:
    inner = [_inner(item, room, depth) for item in items]
    return f"{opening}{', '.join(inner)}{', ...' if more else ''}{closing}"


def _inner(value: Any, room: int, depth: int) -> str:
    text = show(value, room, depth - 1)
    return f"<{values.type_name(value)}>" if text is None else text[:room]

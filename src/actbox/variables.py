"""A session's variables: what there is, and single ones in and out, as data.

Nothing that a session says is trusted: a listing is read strictly, and of a value only plain data is made (see
`values`).
"""

from __future__ import annotations

import json
import keyword
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from actbox import values
from actbox.errors import (
    ActboxError,
    InvalidArgument,
    ProtocolError,
    VariableMissing,
    VariableRefused,
    VariableUnsupported,
)
from actbox.exchange import Exchange, Exchanges, send_pieces
from actbox.guest import values as guest_values
from actbox.guest.places import Refused
from actbox.protocol import frames
from actbox.protocol.messages import legible
from actbox.shielded import in_thread
from actbox.values import Unsupported

if TYPE_CHECKING:
    from actbox.exchange import Send

MAX_BYTES = 64 << 20
_MAX_LIMIT = 10_000
_MAX_PREVIEW = 10_000
_MAX_LISTING = 4 << 20
_MAX_TEXT = 200
_MAX_DIMENSIONS = 64
_MOST = 1 << 53


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable of a session, by the session's own account; texts are made printable.

    `type` is the type's name with its module, unless that is builtin or a cell's. `bytes` is what the value itself
    takes: of an array or a table its data, of a list or the like not what is in it. `shape` and `dtype` are those of
    arrays and tables, `length` that of Python's own containers. `preview` is the beginning of the value in words; None
    where only code of the value's own could tell.
    """

    name: str
    type: str
    bytes: int | None = None
    shape: tuple[int, ...] | None = None
    length: int | None = None
    dtype: str | None = None
    preview: str | None = None


class Variables(Exchanges):
    """The methods of clients about single variables. Each is an execution, in its turn among the cells.

    `timeout` is in seconds, the time behind cells submitted before included. Each method raises:
        InvalidArgument: an argument that cannot be used; nothing was done.
        StateError: the client is not connected.
        ExecutionTimeout, ExecutionInterrupted, KernelDied, ExecutionLost, ProtocolError, LimitExceeded: as for a cell.
    """

    async def variables(self, timeout: float = 120, *, limit: int = 1000, preview: int = 200) -> list[Variable]:
        """The names that cells have made, in their order, modules and functions among them, and what each holds.

        Names that begin with an underscore, and IPython's own, are left out. No code of the values' own types is run
        to find it out. Previews have 256 Ki characters together: the variables beyond that are told without.

        Args:
            timeout: see the class.
            limit: the number of variables at the most; the first ones are told.
            preview: the number of characters of a preview at the most.
        """
        listing = _Listing(_number("limit", limit, _MAX_LIMIT), _number("preview", preview, _MAX_PREVIEW))
        await self.exchange(listing, timeout)
        return listing.found

    async def get(self, name: str, timeout: float = 120, *, max_bytes: int = MAX_BYTES) -> Any:
        """The value of a variable, as data of its own: changing it here changes nothing there.

        JSON values with bytes anywhere among them, nan and infinity too; NumPy arrays of plain items; `pyarrow.Table`;
        and pandas DataFrames, which travel by Arrow. Tuples come as lists, NumPy's scalars and other types that derive
        from JSON's as what they derive from. What comes is checked and never run: see `docs/variables.md`.

        Args:
            name: of the variable.
            timeout: see the class.
            max_bytes: a larger value is refused; 64 MiB by default. It bounds what travels: as Python's objects, JSON
                and tables can take some thirty times as much.

        Raises:
            VariableMissing: (a `LookupError`) there is none of this name.
            VariableUnsupported: (a `TypeError`) its type does not travel; says what does.
            VariableRefused: it is too large, a library is not installed, or what came was none.
        """
        name = _name(name)
        request = {"type": "get", "name": name, "max_bytes": _number("max_bytes", max_bytes, _MOST)}
        getting = _Getting(request)
        await self.exchange(getting, timeout)
        try:
            return await in_thread(values.decode, getting.head, getting.data)
        except values.Malformed as exc:
            raise VariableRefused(name, legible(str(exc))) from exc

    async def set(self, name: str, value: Any, timeout: float = 120, *, max_bytes: int = MAX_BYTES) -> None:
        """Give a variable a value; it is there when all of the value has arrived. Types are those of `get`.

        Raises:
            VariableUnsupported: (a `TypeError`) the type does not travel; says what does.
            VariableRefused: it is larger than `max_bytes`, or a library is not installed.
        """
        most = _number("max_bytes", max_bytes, _MOST)
        name = _name(name)
        self.check_connected()
        try:
            encoded = await in_thread(values.encode, value)
            guest_values.prefix(encoded.header)
        except Unsupported as exc:
            raise VariableUnsupported(name, exc.kind, exc.remedy) from exc
        except Refused as exc:
            raise VariableRefused(name, exc.reason) from exc
        if len(encoded.data) > most:
            raise VariableRefused(name, f"it is {len(encoded.data)} bytes, more than the {most} allowed")
        await self.exchange(_Setting(name, encoded), timeout)


class _OfVariable(Exchange):
    """A request about one variable, or all."""

    def refusal(self, name: str, reason: str) -> ActboxError:
        variable = self.request.get("name", "")
        match name:
            case VariableMissing.__name__:
                return VariableMissing(variable, reason)
            case VariableUnsupported.__name__:
                kind, _, remedy = reason.partition(": ")
                return VariableUnsupported(variable, kind, remedy)
            case VariableRefused.__name__:
                return VariableRefused(variable, reason)
            case _:
                return VariableRefused(variable, f"{name}: {reason}"[:1000])


class _Listing(_OfVariable):
    """`found`, what was told so far, and `_rest`, the line that has not ended; `_room`, bytes that may come yet."""

    def __init__(self, limit: int, preview: int) -> None:
        super().__init__({"type": "variables", "limit": limit, "preview": preview})
        self.found: list[Variable] = []
        self._limit = limit
        self._preview = preview
        self._rest = b""
        self._room = _MAX_LISTING

    async def take(self, data: bytes) -> None:
        self._room -= len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._room < 0 or len(self.found) + len(lines) > self._limit:
            raise ProtocolError("the kernel told of more variables than it was asked for")
        for line in lines:
            self.found.append(_variable(line, self._preview))


class _Getting(_OfVariable):
    """`data`, what has come behind the header."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__(request)
        self.data = bytearray()

    async def take_body(self, data: bytes) -> None:
        if len(self.data) + len(data) > self.request["max_bytes"]:
            raise ProtocolError("the kernel sent more than it was asked for")
        self.data += data


class _Setting(_OfVariable):
    def __init__(self, name: str, encoded: values.Encoded) -> None:
        super().__init__({"type": "set", "name": name, "value": encoded.header})
        self._data = encoded.data

    async def send(self, send: Send) -> None:
        await send_pieces(self, send, self._data)


def _variable(line: bytes, preview: int) -> Variable:
    try:
        told = frames.parse_header(line)
    except frames.FrameError as exc:
        raise ProtocolError("the kernel told of a variable in no JSON") from exc
    shape = told.get("shape")
    if shape is not None:
        sides = cast("list[Any]", shape if type(shape) is list else [None])
        shape = tuple(_size(side) for side in sides[: _MAX_DIMENSIONS + 1])
        if len(shape) > _MAX_DIMENSIONS:
            raise ProtocolError("the kernel told of a variable with too many dimensions")
    return Variable(
        _text(told, "name", _MAX_TEXT) or "",
        _text(told, "type", _MAX_TEXT) or "",
        None if told.get("bytes") is None else _size(told["bytes"]),
        shape,
        None if told.get("length") is None else _size(told["length"]),
        _text(told, "dtype", _MAX_TEXT),
        _text(told, "preview", preview),
    )


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ProtocolError("the kernel told of a variable of an impossible size")
    return value


def _text(told: dict[str, Any], field: str, most: int) -> str | None:
    value = told.get(field)
    if value is None and field not in ("name", "type"):
        return None
    if type(value) is not str or len(value) > most:
        raise ProtocolError(f"the kernel told of a variable without a proper {field}")
    return legible(value)


def _name(name: object) -> str:
    """A variable's name, as Python itself writes it: of two spellings of one letter cells know the normal one."""
    spelled = unicodedata.normalize("NFKC", name) if isinstance(name, str) else ""
    if not spelled.isidentifier() or keyword.iskeyword(spelled):
        raise InvalidArgument("name", name, "pass the name of a variable")
    if len(json.dumps(spelled)) > _MAX_TEXT:
        raise InvalidArgument("name", name, f"pass a name of at most {_MAX_TEXT} characters")
    return spelled


def _number(name: str, value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise InvalidArgument(name, value, f"pass a whole number from 0 to {most}")
    return value

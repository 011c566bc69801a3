"""Values that a session sends, made of bytes that nobody has looked at; and ours, made ready to be sent.

What a session sends is data, and never more: nothing is unpickled, no type is named that is not in a list here, every
size is checked against what has arrived before anything of that size is made. NumPy and pyarrow are imported when a
value of theirs comes or goes, and only then.
"""

from __future__ import annotations

import importlib
import json
import math
import struct
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from actbox.guest import values as guest_values
from actbox.guest.places import Refused
from actbox.guest.values import Encoded, Unsupported
from actbox.protocol import frames

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = guest_values.PREFIX
MAX_HEADER = guest_values.MAX_HEADER

_MAX_INDEX_NAMES = 32
_LAST_CHARACTER = 0x10FFFF
_MAX_COLUMNS = 10_000
# pyarrow's names of the types that Arrow keeps in memory as they travel, one item after the other.
_LEAVES = (
    *("boolean", "integer", "floating", "decimal", "date", "time", "timestamp", "duration"),
    *("string", "large_string", "binary", "large_binary"),
)


class Malformed(Exception):
    """What came is no value of the kind that it claims to be, or needs what is not installed here."""


def encode(value: object) -> Encoded:
    """A value of the caller's, ready to be sent. Raises `Unsupported`, or `Refused` if a library is missing here."""
    try:
        return guest_values.encode(value)
    except guest_values.Lacking as exc:
        raise Refused(_lacking(exc.module)) from exc


def parse_json(text: str) -> Any:
    """JSON without NaN, repeated keys or endless numbers. Raises ValueError."""
    return _from_json(text)


def decode(head: bytes, data: bytearray) -> Any:
    """The value that a session has sent.

    Raises:
        Malformed: it is none.
    """
    try:
        header = frames.parse_header(head)
        match header.get("form"):
            case "json":
                return guest_values.from_json(header, bytes(data), _from_endless_json)
            case "array":
                return _to_array(header, data)
            case "table":
                return _to_table(data)
            case "frame":
                return _to_frame(header, data)
            case _:
                raise ValueError("of an unknown form")
    except (frames.FrameError, ValueError, RecursionError) as exc:
        raise Malformed(f"what came is no value ({exc})") from exc


def decode_json(head: bytes, data: bytes) -> Any:
    """A JSON value, with bytes in it, that a session has sent.

    Raises:
        Malformed: it is none.
    """
    try:
        return guest_values.from_json(frames.parse_header(head), data, parse_json)
    except (frames.FrameError, ValueError, RecursionError) as exc:
        raise Malformed(f"what came is no value ({exc})") from exc


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("repeated key")
    return made


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number out of range")
    return number


_from_json = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique).decode
# A value of a variable's may be nan or infinity, spelled as Python spells them, and as nothing else.
_from_endless_json = json.JSONDecoder(parse_constant=float, parse_float=_finite, object_pairs_hook=_unique).decode


_EXTRAS = {"numpy": "data", "pandas": "data", "pyarrow": "arrow"}


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise Malformed(_lacking(module)) from exc


def _lacking(module: str) -> str:
    return f"it needs {module} on the host: pip install 'actbox[{_EXTRAS[module]}]'"


# -- NumPy -----------------------------------------------------------------------------------------------------------


def _to_array(header: dict[str, Any], data: bytearray) -> Any:
    match header:
        case {"dtype": str(name), "shape": [*shape], "order": "C" | "F" as order} if guest_values.DTYPES.fullmatch(
            name
        ):
            pass
        case _:
            raise ValueError("an array without a plain dtype, shape and order")
    if len(shape) > guest_values.MAX_DIMENSIONS or not all(type(side) is int and 0 <= side < 1 << 53 for side in shape):
        raise ValueError("an array of an impossible shape")
    numpy = _need("numpy")
    dtype = numpy.dtype(name)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array whose shape is not its size")
    if sys.byteorder != "little":
        raise ValueError("arrays travel between little-endian machines alone")
    flat = numpy.frombuffer(data, dtype)
    _check_items(numpy, flat)
    return flat.reshape(shape) if order == "C" else flat.reshape(shape[::-1]).T


def _check_items(numpy: Any, flat: Any) -> None:
    """Not all memory is a boolean, or text."""
    if flat.dtype.kind == "b" and flat.size and flat.view(numpy.uint8).max() > 1:
        raise ValueError("booleans that are neither")
    if flat.dtype.kind == "U" and flat.size and flat.view(numpy.uint32).max() > _LAST_CHARACTER:
        raise ValueError("characters that do not exist")


# -- Arrow -----------------------------------------------------------------------------------------------------------


def _to_table(data: bytearray) -> Any:
    pyarrow = _need("pyarrow")
    try:
        for message in _messages(pyarrow, data):
            _check_plain(message)
        with pyarrow.ipc.open_stream(pyarrow.py_buffer(data)) as reader:
            _check_schema(pyarrow, reader.schema)
            table = reader.read_all()
        table.validate(full=True)
        empty = sum(pyarrow.types.is_null(field.type) for field in table.schema)
        if empty * table.num_rows > len(data):
            # A column of nothing takes no room, and is as long as it claims to be.
            raise ValueError("more of nothing than there is of anything")
    except (pyarrow.ArrowException, OSError, struct.error, IndexError) as exc:
        raise ValueError(f"no Arrow table: {exc}") from exc
    return table.replace_schema_metadata(None)


def _to_frame(header: dict[str, Any], data: bytearray) -> Any:
    names: Any = header.get("index")
    columns: Any = header.get("columns")
    name: Any = header.get("columns_name")
    if not _are_names(names, empty=True) or len(names) > _MAX_INDEX_NAMES:
        raise ValueError("a table without a list of index names")
    _need("pandas")
    table = _to_table(data)
    if len(names) > table.num_columns:
        raise ValueError("a table with more index names than columns")
    if columns is not None and not (_are_names(columns) and len(columns) == table.num_columns - len(names)):
        raise ValueError("a table without a name for each column")
    if not _are_names([name], empty=True):
        raise ValueError("a table whose columns have no proper name")
    try:
        return guest_values.to_frame(table, {"index": names, "columns": columns, "columns_name": name})
    except Exception as exc:  # pandas fails in every way
        raise ValueError(f"no DataFrame: {exc}") from exc


def _are_names(names: Any, *, empty: bool = False) -> bool:
    """Whether it is a list of texts and whole numbers; with `empty` an item may be None."""
    if type(names) is not list:
        return False
    for name in cast("list[Any]", names):
        if type(name) is str:
            name.encode()  # a ValueError if no encoding carries it
        elif type(name) is not int and not (empty and name is None):
            return False
    return True


def _messages(pyarrow: Any, data: bytearray) -> Iterator[memoryview]:
    """The metadata of each message of a stream."""
    reader = pyarrow.ipc.MessageReader.open_stream(pyarrow.py_buffer(data))
    while True:
        try:
            yield memoryview(reader.read_next_message().metadata)
        except StopIteration:
            return


def _check_schema(pyarrow: Any, schema: Any) -> None:
    if len(schema) > _MAX_COLUMNS:
        raise ValueError(f"a table of more than {_MAX_COLUMNS} columns")
    for field in schema:
        kind = field.type
        if pyarrow.types.is_dictionary(kind):
            # A category: indices into texts or numbers, which no conversion writes out.
            kind = kind.value_type
        elif pyarrow.types.is_null(kind):
            continue
        _check_type(pyarrow, kind, guest_values.MAX_DEPTH)


def _check_type(pyarrow: Any, kind: Any, room: int) -> None:
    """Lists and structures of plain items: of others a few bytes can claim to be any number of values."""
    types = pyarrow.types
    if not room:
        raise ValueError("a column nested too deep")
    if types.is_list(kind) or types.is_large_list(kind):
        _check_type(pyarrow, kind.value_type, room - 1)
    elif types.is_struct(kind) and kind.num_fields:
        for number in range(kind.num_fields):
            _check_type(pyarrow, kind.field(number).type, room - 1)
    elif not any(getattr(types, f"is_{leaf}")(kind) for leaf in _LEAVES):
        raise ValueError(f"a column of type {str(kind)[:100]}, which is not taken: cast it inside, or drop it")


class _Table(NamedTuple):
    """A table of a FlatBuffer: where it is, and where its fields are, 0 for one that is not there."""

    data: memoryview
    start: int
    fields: tuple[int, ...]

    def follow(self, field: int) -> _Table | None:
        """The table that a field leads to."""
        if field >= len(self.fields) or not self.fields[field]:
            return None
        place = self.start + self.fields[field]
        return _table_at(self.data, place + struct.unpack_from("<I", self.data, place)[0])


def _table_at(data: memoryview, start: int) -> _Table:
    # flatbuffers.dev/internals: a table begins with the distance back to its vtable, of two sizes and its fields.
    vtable = start - struct.unpack_from("<i", data, start)[0]
    if vtable < 0:
        raise ValueError("a message that is none")
    size = struct.unpack_from("<H", data, vtable)[0]
    return _Table(data, start, struct.unpack_from(f"<{max(0, size - 4) // 2}H", data, vtable + 4))


# Arrow's format/Message.fbs: Message.header_type and .header, DictionaryBatch.data, RecordBatch.compression.
_HEADER_TYPE, _HEADER, _DATA, _COMPRESSION = 1, 2, 1, 3
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def _check_plain(metadata: memoryview) -> None:
    """A compressed batch would say for itself how large it becomes. Raises ValueError if there is one."""
    root = _table_at(metadata, struct.unpack_from("<I", metadata, 0)[0])
    if len(root.fields) <= _HEADER or not root.fields[_HEADER_TYPE]:
        return
    kind = metadata[root.start + root.fields[_HEADER_TYPE]]
    batch = root.follow(_HEADER)
    if kind == _DICTIONARY_BATCH and batch is not None:
        batch = batch.follow(_DATA)
    elif kind != _RECORD_BATCH:
        return
    if batch is not None and batch.follow(_COMPRESSION) is not None:
        raise ValueError("compressed, which is not taken")


__all__ = ["Encoded", "Malformed", "Unsupported", "decode", "decode_json", "encode", "parse_json"]

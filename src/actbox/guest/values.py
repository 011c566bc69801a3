# NumPy, pandas and pyarrow are whatever is installed inside, and need not be: their types are unknown here.
"""Values as they travel: a small JSON header, and raw bytes behind it. No pickle, and nothing that could run.

Three forms. "json": JSON values, with bytes anywhere among them; "array": a NumPy array, as dtype, shape, order and its
own memory; "table" and "frame": an Arrow IPC stream. This is the kernel's side, which trusts its host. The host takes
JSON apart by the same functions, and arrays and tables with suspicion of its own (`actbox.values`).
"""

from __future__ import annotations

import datetime as dt
import importlib
import json
import math
import re
import struct
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from .places import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX = struct.Struct("!I")
MAX_DEPTH = 100
MAX_BLOBS = 1000
# Below that of a frame's header, in which it may stand.
MAX_HEADER = 1_000_000
MAX_DIMENSIONS = 64
# Kinds of NumPy's dtypes that are plain memory; objects are not, structures may hold some.
PLAIN_KINDS = "biufcSUMm"
# Booleans, numbers of fixed size, dates with a unit, texts and bytes: of the machine's order, without objects.
DTYPES = re.compile(
    r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<c(?:8|16)|\|S[1-9]\d{0,6}|<U[1-9]\d{0,6}|<[mM]8\[(?:\d{1,9})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\]"
)
# Python writes and reads no more than 4300 digits, which are 14 284 bits.
_MAX_BITS = 14_000

# Bound once, as in frames.
_to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class Unsupported(Refused):
    """A value of a type that does not travel; `kind` names the type, and `remedy` says what does."""

    def __init__(self, kind: str, remedy: str) -> None:
        self.kind = kind
        self.remedy = remedy
        super().__init__(f"{kind}: {remedy}")


class Lacking(Refused):
    """A library that a value needs is not installed: `module`."""

    def __init__(self, module: str, why: str) -> None:
        self.module = module
        super().__init__(f"{why}, and {module} is not installed inside: actbox build -t NAME {module} ...")


class Encoded(NamedTuple):
    """A value ready to travel: its header, and what follows it."""

    header: dict[str, Any]
    data: bytes | memoryview


def type_name(value: object) -> str:
    """The name of a value's type, without asking the type's own code."""
    kind = type(value)
    name = exact(type.__dict__["__qualname__"].__get__(kind))
    module = type.__dict__["__module__"].__get__(kind)
    if type(module) is str and module not in ("builtins", "__main__"):
        name = f"{module}.{name}"
    return name[:200]


def exact(text: str) -> str:
    """A text as Python's own type: one of a subclass would run code of its own when it is cut or put into another."""
    return str.__str__(text)


# -- JSON with bytes in it -------------------------------------------------------------------------------------------


def to_json(value: object, otherwise: Callable[[object], object] | None = None, *, endless: bool = False) -> Encoded:
    """A JSON value in which bytes are cut out; the header's "blobs" says where they belong.

    Tuples become lists. `otherwise` makes JSON of what is neither; by default what derives from a type of JSON's
    becomes that, and a scalar of NumPy's the number or text that it is. `endless` lets nan and infinity pass, which
    Python's own JSON has.

    Raises:
        Unsupported: it holds something else, or is too deep.
    """
    blobs: list[list[Any]] = []
    pieces: list[bytes] = []

    def walk(item: Any, path: tuple[str | int, ...], *, made: bool = False) -> Any:
        kind = cast("Any", type(item))
        if item is None or kind is bool or kind is str:
            return item
        if kind is int:
            return _checked_int(item)
        if kind is float:
            if not endless and not math.isfinite(item):
                raise Unsupported("float", "JSON has no nan or infinity; take None or a text in its place")
            return item
        if len(path) >= MAX_DEPTH:
            raise Unsupported(type_name(item), f"it is nested more than {MAX_DEPTH} deep")
        if kind in (bytes, bytearray, memoryview):
            if len(blobs) >= MAX_BLOBS:
                raise Unsupported(type_name(item), f"it holds more than {MAX_BLOBS} bytes objects; join them")
            pieces.append(bytes(item))
            blobs.append([list(path), len(pieces[-1])])
            return None
        if kind in (list, tuple):
            return [walk(each, (*path, number)) for number, each in enumerate(item)]
        if kind is dict:
            return {(name := _key(key)): walk(each, (*path, name)) for key, each in item.items()}
        if made:
            _no_json(item)
        return walk((otherwise or _simpler)(item), path, made=True)

    try:
        text = _to_json(walk(value, ())).encode()
    except UnicodeEncodeError:
        raise Unsupported(
            "str", "it holds a lone surrogate, which no encoding has; take value.encode('utf-8', 'surrogateescape')"
        ) from None
    return Encoded({"form": "json", "size": len(text), "blobs": blobs}, b"".join((text, *pieces)))


def _checked_int(number: int) -> int:
    if number.bit_length() > _MAX_BITS:
        raise Unsupported("int", f"it has more than {_MAX_BITS} bits; take hex(value)")
    return number


def _key(key: Any) -> str:
    if not issubclass(type(key), str):
        raise Unsupported(
            f"dict with keys of type {type_name(key)}",
            "JSON has keys of text alone; take {str(key): item for key, item in value.items()}",
        )
    return exact(key)


def _simpler(item: Any) -> Any:
    """What JSON has for a value whose type derives from one of JSON's, or for a scalar of NumPy's."""
    numpy = sys.modules.get("numpy")
    kind = cast("Any", type(item))
    if numpy is not None and issubclass(kind, numpy.generic):
        # Of the others some become what they do not mean: a date in nanoseconds a number.
        make = kind.item if item.dtype.kind in "biufSU" else _no_json
    else:
        make = next((of for base, of in _BASES if issubclass(kind, base)), _no_json)
    return make(item)


_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, exact),
    (int, int.__int__),
    (float, float.__float__),
    (bytes, bytes),
    (dict, dict),
    (list, list),
    (tuple, list),
)


def _no_json(item: object) -> NoReturn:
    kind = type(item)
    numpy = sys.modules.get("numpy")
    remedy = next((remedy for types, remedy in _REMEDIES if issubclass(kind, types)), None)
    if numpy is not None and issubclass(kind, numpy.generic):
        remedy = "put it into a NumPy array: numpy.array(value)"
    elif type_name(item) in _TRAVELLERS:
        remedy = "arrays and tables travel by themselves, not within others; give it a name of its own"
    raise Unsupported(
        type_name(item),
        remedy
        or "what travels is JSON values, bytes, NumPy arrays, Arrow tables and pandas DataFrames; "
        "make one of these of it",
    )


_REMEDIES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((set, frozenset), "JSON has no sets; take list(value)"),
    ((dt.date, dt.time), "JSON has no dates; take value.isoformat(), or put it into a NumPy array"),
    ((dt.timedelta,), "JSON has no durations; take value.total_seconds(), or put it into a NumPy array"),
    ((complex,), "JSON has no complex numbers; put it into a NumPy array"),
)
_TRAVELLERS = ("numpy.ndarray", "pandas.DataFrame", "pandas.core.frame.DataFrame", "pyarrow.lib.Table")


def from_json(header: Mapping[str, Any], data: bytes, parse: Callable[[str], Any] = json.loads) -> Any:
    """The opposite of `to_json`, for headers that nobody has looked at.

    Raises:
        ValueError: it is malformed.
    """
    size, blobs = header.get("size"), header.get("blobs")
    if type(size) is not int or not 0 <= size <= len(data) or type(blobs) is not list:
        raise ValueError("no JSON value")
    if len(cast("list[Any]", blobs)) > MAX_BLOBS:
        raise ValueError("too many bytes objects")
    text = data[:size].decode()
    try:
        root = [parse(text)]
    except RecursionError:
        raise ValueError("nested too deep") from None
    if "\\u" in text:
        # JSON can spell a lone surrogate, which no encoding carries: that is an error here, and not at its first use.
        json.dumps(root[0], ensure_ascii=False).encode()
    start = size
    for blob in cast("list[Any]", blobs):
        match blob:
            case [[*path], int(length)] if 0 <= length <= len(data) - start and len(path) <= MAX_DEPTH:
                _put(root, [0, *path], data[start : start + length])
                start += length
            case _:
                raise ValueError("bytes that are not there")
    if start != len(data):
        raise ValueError("more bytes than announced")
    return root[0]


def _put(place: Any, path: list[Any], block: bytes) -> None:
    for step in path[:-1]:
        place = _at(place, step)
    if _at(place, path[-1]) is not None:
        raise ValueError("bytes in the place of something else")
    place[path[-1]] = block


def _at(place: Any, step: object) -> Any:
    match place, step:
        case list(), int() if not isinstance(step, bool) and 0 <= step < len(cast("list[Any]", place)):
            return cast("list[Any]", place)[step]
        case dict(), str() if step in place:
            return cast("dict[str, Any]", place)[step]
        case _:
            raise ValueError("bytes in a place that is not there")


def prefix(header: dict[str, Any]) -> bytes:
    """A header as it stands before what it describes. Raises `Unsupported` beyond `MAX_HEADER`."""
    head = json.dumps(header, separators=(",", ":")).encode()
    if len(head) > MAX_HEADER:
        if header["form"] == "frame":
            raise Unsupported("pandas.DataFrame", "the names of its columns are too long; rename them")
        raise Unsupported("dict", "it holds too many bytes objects below long keys")
    return PREFIX.pack(len(head)) + head


# -- any value -------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Encoded:
    """A value as it travels.

    Raises:
        Unsupported: its type does not.
        Lacking: it would by a library that is not installed.
    """
    numpy, pandas, pyarrow = (sys.modules.get(name) for name in ("numpy", "pandas", "pyarrow"))
    kind = cast("Any", type(value))
    if numpy is not None and issubclass(kind, numpy.ndarray):
        return _from_array(numpy, value)
    if pyarrow is not None and issubclass(kind, (pyarrow.Table, pyarrow.RecordBatch)):
        return _from_table(pyarrow, value, {"form": "table"})
    if pandas is not None and issubclass(kind, pandas.DataFrame):
        return _from_frame(value)
    if pandas is not None and issubclass(kind, pandas.Series):
        raise Unsupported("pandas.Series", "take series.to_frame() or series.to_numpy()")
    if pandas is not None and issubclass(kind, pandas.Index):
        raise Unsupported(type_name(value), "take index.to_frame() or index.to_numpy()")
    if type_name(value).startswith("polars.dataframe."):
        raise Unsupported(type_name(value), "take its to_arrow()")
    return to_json(value, endless=True)


def _from_array(numpy: Any, array: Any) -> Encoded:
    if type(array) is not numpy.ndarray:
        raise Unsupported(
            type_name(array), "take numpy.asarray(value), which leaves out what its type adds, such as a mask"
        )
    dtype = array.dtype.newbyteorder("<")
    if not DTYPES.fullmatch(dtype.str) or array.ndim > MAX_DIMENSIONS:
        raise Unsupported(f"numpy.ndarray of dtype {array.dtype.str}", _array_remedy(array))
    array = array.astype(dtype, copy=False)
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    flat = numpy.ascontiguousarray(array.T if order == "F" else array).reshape(-1)
    header = {"form": "array", "dtype": dtype.str, "shape": list(array.shape), "order": order}
    return Encoded(header, memoryview(flat.view(numpy.uint8)) if flat.nbytes else b"")


def _array_remedy(array: Any) -> str:
    if array.dtype.names:
        return "its items are structures; move its fields one by one, as array['name'], or take tolist()"
    if array.dtype.kind in "mM":
        return "its dates have no unit; convert it by astype('M8[s]') or astype('m8[s]')"
    return "what travels is plain numbers, dates, texts and bytes; convert it by astype(), or take tolist()"


def _from_frame(frame: Any) -> Encoded:
    pyarrow = need("pyarrow", "a pandas.DataFrame travels by Arrow")
    pandas = sys.modules["pandas"]
    columns = list(frame.columns)
    if not all(map(_is_name, columns)):
        raise Unsupported(
            "pandas.DataFrame whose columns are not named by texts or whole numbers",
            "rename them: frame.columns = [str(name) for name in frame.columns]",
        )
    name = frame.columns.name
    header: dict[str, Any] = {"form": "frame", "columns": None, "columns_name": name if _is_name(name) else None}
    if len(set(columns)) < len(columns) or not all(type(name) is str for name in columns):
        # Arrow names columns by different texts.
        header["columns"] = columns
        frame = frame.set_axis([str(number) for number in range(len(columns))], axis=1)
    index = frame.index
    # Arrow counts the rows of columns; where there are none, the index is one.
    plain = type(index) is pandas.RangeIndex and (index.start, index.step, index.name) == (0, 1, None) and bool(columns)
    names: list[Any] = []
    if not plain:
        names = [name if _is_name(name) else None for name in index.names]
        index = index.set_names([f"__index_{number}__" for number in range(len(names))])
        frame = frame.set_axis(index, axis=0)
    try:
        table = pyarrow.Table.from_pandas(frame, preserve_index=not plain)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as exc:
        raise Unsupported("pandas.DataFrame", f"Arrow cannot hold it ({exc}); convert the column") from exc
    return _from_table(pyarrow, table, {**header, "index": names})


def _is_name(name: object) -> bool:
    return type(name) in (str, int)


def _from_table(pyarrow: Any, table: Any, header: dict[str, Any]) -> Encoded:
    # What Arrow and pandas note about a schema is of no use to who does not trust it.
    table = table.replace_schema_metadata(None)
    for field in table.schema:
        if isinstance(field.type, pyarrow.BaseExtensionType):
            # Whoever does not know the type takes it for that of its memory: a month for a number.
            column = f"pyarrow.Table whose column {field.name!r} is of the type {field.type}"
            raise Unsupported(column, "convert the column, as by astype(str)")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write(table)
    return Encoded(header, memoryview(sink.getvalue()))


def decode(header: dict[str, Any], data: bytearray) -> Any:
    """A value of the host's.

    Raises:
        Lacking: a library that it needs is not installed.
    """
    form = header["form"]
    if form == "json":
        return from_json(header, bytes(data))
    if form == "array":
        numpy = need("numpy", "a NumPy array was sent")
        shape = header["shape"] if header["order"] == "C" else header["shape"][::-1]
        array = numpy.frombuffer(data, header["dtype"]).reshape(shape)
        return array if header["order"] == "C" else array.T
    pyarrow = need("pyarrow", "an Arrow table was sent")
    table = pyarrow.ipc.open_stream(pyarrow.py_buffer(data)).read_all()
    return to_frame(table, header) if form == "frame" else table


def to_frame(table: Any, header: Mapping[str, Any]) -> Any:
    """A DataFrame of a table whose last columns are the index, as many as it has names; "columns" names the others."""
    names, columns = header["index"], header["columns"]
    pandas = need("pandas", "a pandas.DataFrame was sent")
    pyarrow = need("pyarrow", "a pandas.DataFrame was sent")
    frame = table.to_pandas(ignore_metadata=True)
    for number, column in enumerate(table.columns):
        if column.null_count and pyarrow.types.is_integer(column.type):
            # As the floats that they become otherwise they would lose digits.
            kind = str(column.type).replace("int", "Int").replace("u", "U")
            dtype = pandas.api.types.pandas_dtype(kind)
            frame.isetitem(number, column.to_pandas(types_mapper={column.type: dtype}.get))
    if names:
        frame = frame.set_index(list(frame.columns[-len(names) :]))
        frame.index.names = names
    if columns is not None:
        frame.columns = columns
    frame.columns.name = header["columns_name"]
    return frame


def need(module: str, why: str) -> Any:
    """A library inside. Raises `Lacking` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise Lacking(module, why) from exc

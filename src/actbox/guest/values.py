# NumPy, pandas and pyarrow are whatever is installed inside, and need not be: their types are unknown here.
"""Values as they travel: a small JSON header, and raw bytes behind it. No pickle, and nothing that could run.

Three forms. "json": JSON values, with bytes anywhere among them; "array": a NumPy array, as dtype, shape, order and its
own memory; "table" and "frame": an Arrow IPC stream. This is the kernel's side, which trusts its host. The host takes
JSON apart by the same functions, and arrays and tables with suspicion of its own (`actbox.values`).
"""

from __future__ import annotations

import importlib
import json
import math
import struct
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from .places import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

PREFIX = struct.Struct("!I")
MAX_DEPTH = 100
MAX_BLOBS = 1000
# Below that of a frame's header, in which it may stand.
MAX_HEADER = 1_000_000
# Kinds of NumPy's dtypes that are plain memory; objects are not, structures may hold some.
PLAIN_KINDS = "biufcSUMm"
MAX_ITEM = 1 << 20

# Bound once, as in frames.
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Unsupported(Refused):
    """A value of a type that does not travel; `kind` names the type, and `remedy` says what does."""

    def __init__(self, kind: str, remedy: str) -> None:
        self.kind = kind
        self.remedy = remedy
        super().__init__(f"{kind}: {remedy}")


class Encoded(NamedTuple):
    """A value ready to travel: its header, and what follows it."""

    header: dict[str, Any]
    data: bytes | memoryview


def type_name(value: object) -> str:
    """The name of a value's type, without asking the type's own code."""
    kind = type(value)
    name = type.__dict__["__qualname__"].__get__(kind)
    module = type.__dict__["__module__"].__get__(kind)
    if type(module) is str and module not in ("builtins", "__main__"):
        name = f"{module}.{name}"
    return str(name)[:200]


# -- JSON with bytes in it -------------------------------------------------------------------------------------------


def to_json(value: object, otherwise: Callable[[object], object] | None = None) -> Encoded:
    """A JSON value in which bytes are cut out; the header's "blobs" says where they belong.

    Tuples become lists. `otherwise` makes JSON of what is neither.

    Raises:
        Unsupported: it holds something else, or is too deep.
    """
    blobs: list[list[Any]] = []
    pieces: list[bytes] = []

    def walk(item: Any, path: tuple[str | int, ...], *, made: bool = False) -> Any:
        kind = cast("Any", type(item))
        if item is None or kind is bool or kind is int or kind is str:
            return item
        if kind is float:
            if not math.isfinite(item):
                raise Unsupported("float", "JSON has no nan or infinity; put it into a NumPy array")
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
            for key in item:
                if type(key) is not str:
                    raise Unsupported(f"dict with keys of type {type_name(key)}", "JSON has keys of text alone")
            return {key: walk(each, (*path, key)) for key, each in item.items()}
        return _no_json(item) if otherwise is None or made else walk(otherwise(item), path, made=True)

    text = _to_json(walk(value, ())).encode()
    return Encoded({"form": "json", "size": len(text), "blobs": blobs}, b"".join((text, *pieces)))


def _no_json(item: object) -> NoReturn:
    raise Unsupported(
        type_name(item),
        "what travels is JSON values, bytes, NumPy arrays, Arrow tables and pandas DataFrames; make one of these of it",
    )


def from_json(header: dict[str, Any], data: bytes, parse: Callable[[str], Any] = json.loads) -> Any:
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
    head = _to_json(header).encode()
    if len(head) > MAX_HEADER:
        raise Unsupported("dict", "it holds too many bytes objects below long keys")
    return PREFIX.pack(len(head)) + head


# -- any value -------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Encoded:
    """A value as it travels.

    Raises:
        Unsupported: its type does not.
    """
    numpy, pandas, pyarrow = (sys.modules.get(name) for name in ("numpy", "pandas", "pyarrow"))
    if numpy is not None:
        if type(value) is numpy.ndarray:
            return _from_array(numpy, value)
        if issubclass(type(value), numpy.generic):
            value = value.item()
    if pyarrow is not None and issubclass(type(value), (pyarrow.Table, pyarrow.RecordBatch)):
        return _from_table(pyarrow, value, {"form": "table"})
    if pandas is not None and issubclass(type(value), pandas.DataFrame):
        return _from_frame(value)
    if pandas is not None and issubclass(type(value), pandas.Series):
        raise Unsupported("pandas.Series", "take series.to_frame() or series.to_numpy()")
    return to_json(value)


def _from_array(numpy: Any, array: Any) -> Encoded:
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in PLAIN_KINDS or not 0 < size <= MAX_ITEM or array.dtype.str[1:] in ("f16", "c32"):
        raise Unsupported(
            f"numpy.ndarray of dtype {array.dtype.str}",
            "what travels is plain numbers, dates, texts and bytes; convert it by astype(), or take tolist()",
        )
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    flat = numpy.ascontiguousarray(array.T if order == "F" else array).reshape(-1)
    header = {"form": "array", "dtype": array.dtype.str, "shape": list(array.shape), "order": order}
    return Encoded(header, memoryview(flat.view(numpy.uint8)) if flat.nbytes else b"")


def _from_frame(frame: Any) -> Encoded:
    pyarrow = need("pyarrow", "a pandas.DataFrame travels by Arrow")
    pandas = sys.modules["pandas"]
    if not all(type(name) is str for name in frame.columns) or not frame.columns.is_unique:
        raise Unsupported(
            "pandas.DataFrame whose columns are not named by different texts",
            "rename them: frame.columns = [str(name) for name in frame.columns]",
        )
    index = frame.index
    plain = type(index) is pandas.RangeIndex and (index.start, index.step, index.name) == (0, 1, None)
    names: list[Any] = []
    if not plain:
        names = [name if type(name) is str else None for name in index.names]
        index = index.set_names([f"__index_{number}__" for number in range(len(names))])
        frame = frame.set_axis(index, axis=0)
    try:
        table = pyarrow.Table.from_pandas(frame, preserve_index=not plain)
    except (pyarrow.ArrowException, TypeError, ValueError) as exc:
        raise Unsupported("pandas.DataFrame", f"Arrow cannot hold it ({exc}); convert the column") from exc
    return _from_table(pyarrow, table, {"form": "frame", "index": names})


def _from_table(pyarrow: Any, table: Any, header: dict[str, Any]) -> Encoded:
    # What Arrow and pandas note about a schema is of no use to who does not trust it.
    table = table.replace_schema_metadata(None)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=None)) as writer:
        writer.write(table)
    return Encoded(header, memoryview(sink.getvalue()))


def decode(header: dict[str, Any], data: bytearray) -> Any:
    """A value of the host's.

    Raises:
        Refused: a library that it needs is not installed.
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
    return to_frame(table, header["index"]) if form == "frame" else table


def to_frame(table: Any, names: list[Any]) -> Any:
    """A DataFrame of a table whose last columns are the index, if `names` has any for it."""
    frame = table.to_pandas(ignore_metadata=True)
    if names:
        frame = frame.set_index(list(frame.columns[-len(names) :]))
        frame.index.names = names
    return frame


def need(module: str, why: str) -> Any:
    """A library inside. Raises `Refused` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise Refused(f"{why}, and {module} is not installed inside: actbox build -t NAME {module} ...") from exc

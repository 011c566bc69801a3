# pandas and pyarrow come without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false, reportUnknownLambdaType=false
"""Values as they travel: frames that come as they were, and bytes that are no value."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from actbox import values
from actbox.guest import values as guest_values

FRAME = pd.DataFrame({"n": [1, 2], "text": ["a", None]}, index=pd.Index(["p", "q"], name="row"))
FRAMES: dict[str, pd.DataFrame] = {
    "whole numbers for columns": pd.DataFrame(np.zeros((2, 3))),
    "columns of one name": pd.DataFrame([[1, "x"]], columns=["a", "a"]),
    "columns with a name": pd.crosstab(pd.Series([1, 2], name="row"), pd.Series(["x", "y"], name="column")),
    "no rows": FRAME.iloc[:0],
    "rows of another": FRAME.reset_index(drop=True).iloc[1:],
    "two indices": FRAME.set_index("n", append=True),
    "whole numbers that lack": pd.DataFrame({"a": pd.array([(1 << 60) + 1, None], "Int64"), "b": [1, 2]}),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_frames_as_people_have_them_come_as_they_were(frame: pd.DataFrame) -> None:
    encoded = guest_values.encode(frame)
    there = guest_values.decode(encoded.header, bytearray(encoded.data))
    back = values.decode(json.dumps(encoded.header).encode(), bytearray(encoded.data))
    for got in (there, back):
        pd.testing.assert_frame_equal(got, frame)


def test_a_frame_without_columns_keeps_its_rows() -> None:
    encoded = guest_values.encode(pd.DataFrame(index=[5, 6, 7]))
    assert list(values.decode(json.dumps(encoded.header).encode(), bytearray(encoded.data)).index) == [5, 6, 7]
    encoded = guest_values.encode(pd.DataFrame(index=range(3)))
    assert len(values.decode(json.dumps(encoded.header).encode(), bytearray(encoded.data))) == 3


@pytest.mark.parametrize("names", [["a"], ["a", None], ["a", "b", "c"], ["a", [1]], 1.5, ["a", "\ud800"], ["a", True]])
def test_a_frame_that_lies_about_its_columns_is_refused(names: Any) -> None:
    encoded = guest_values.encode(pd.DataFrame([[1, 2]]))
    assert encoded.header["columns"] == [0, 1]
    for lie in ({"columns": names}, {"columns_name": names}, {"index": ["x", "y", "z"]}, {"index": ["\ud800"]}):
        with pytest.raises(values.Malformed):
            values.decode(json.dumps({**encoded.header, **lie}).encode(), bytearray(encoded.data))


# -- what is no value --------------------------------------------------------------------------------------------------

LYING_VALUES: list[tuple[dict[str, Any], bytes]] = [
    ({"form": "pickle"}, b"cos\nsystem\n(S'true'\ntR."),
    ({"form": "json", "size": 5, "blobs": []}, b"NaN"),
    ({"form": "json", "size": 3, "blobs": []}, b"nan"),
    ({"form": "json", "size": 3, "blobs": []}, b"Inf"),
    ({"form": "json", "size": 14, "blobs": []}, b'{"a":1,"a":2} '),
    ({"form": "json", "size": 8, "blobs": []}, b'"\\ud800"'),
    ({"form": "json", "size": 5, "blobs": []}, b"1e999"),
    ({"form": "json", "size": 200_000, "blobs": []}, b"[" * 200_000),
    ({"form": "json", "size": 20_000, "blobs": []}, b"1" * 20_000),
    ({"form": "json", "size": 4, "blobs": [[[], 5]]}, b"nullabc"),
    ({"form": "json", "size": 4, "blobs": [[["x"], 3]]}, b"nullabc"),
    ({"form": "json", "size": 4, "blobs": [[[-1], 3]]}, b"nullabc"),
    ({"form": "json", "size": 4, "blobs": [1]}, b"null"),
    ({"form": "json", "size": 4, "blobs": [[[], 0]] * 1001}, b"null"),
    ({"form": "json", "size": -1, "blobs": []}, b"null"),
    ({"form": "array", "dtype": "|O", "shape": [1], "order": "C"}, bytes(8)),
    ({"form": "array", "dtype": "O", "shape": [1], "order": "C"}, bytes(8)),
    ({"form": "array", "dtype": "i4,O", "shape": [1], "order": "C"}, bytes(12)),
    ({"form": "array", "dtype": "<V8", "shape": [1], "order": "C"}, bytes(8)),
    ({"form": "array", "dtype": "<i8", "shape": [2], "order": "C"}, bytes(8)),
    ({"form": "array", "dtype": "<i8", "shape": [-1], "order": "C"}, bytes(8)),
    ({"form": "array", "dtype": "<i8", "shape": [True], "order": "C"}, bytes(8)),
    ({"form": "array", "dtype": "<i8", "shape": [0, 1 << 52, 1 << 52], "order": "C"}, b""),
    ({"form": "array", "dtype": "<i8", "shape": [1] * 70, "order": "C"}, bytes(8)),
    ({"form": "array", "dtype": "<i8", "shape": 1, "order": "C"}, bytes(8)),
    ({"form": "array", "dtype": "<i8", "shape": [1], "order": "K"}, bytes(8)),
    ({"form": "array", "dtype": "|b1", "shape": [1], "order": "C"}, b"\x02"),
    ({"form": "array", "dtype": "<U1", "shape": [1], "order": "C"}, b"\xff\xff\xff\x7f"),
    ({"form": "array", "dtype": "<M8[9999999999D]", "shape": [1], "order": "C"}, bytes(8)),
    ({"form": "table"}, b""),
    ({"form": "table"}, b"\xff" * 64),
    ({"form": "table"}, bytes(64)),
    ({"form": "frame", "index": [None]}, b""),
    ({"form": "frame"}, b""),
]


@pytest.mark.parametrize(
    ("header", "data"), LYING_VALUES, ids=[f"{head} {data[:9]!r}"[:70] for head, data in LYING_VALUES]
)
def test_what_is_no_value_is_refused(header: dict[str, Any], data: bytes) -> None:
    """G6: a value is data of a known kind, or nothing."""
    with pytest.raises(values.Malformed):
        values.decode(json.dumps(header).encode(), bytearray(data))


def stream(table: pa.Table, **options: Any) -> bytearray:
    sink: Any = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write(table)
    return bytearray(sink.getvalue())


def taken(data: bytearray, **header: Any) -> Any:
    return values.decode(json.dumps({"form": "table", **header}).encode(), data)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"x": pa.Array.from_buffers(pa.null(), (1 << 31) - 1, [None])}),
        pa.table({"x": pa.array([[]], pa.list_(pa.null(), 0))}),
        pa.table({"x": pa.array([{}], pa.struct([]))}),
        pa.table({"x": pa.array(["a"], pa.string_view())}),
        pa.table({"x": pa.array([[1]], pa.list_view(pa.int8()))}),
        pa.table({"x": pa.array([[None]], pa.list_(pa.null()))}),
        pa.table({"x": pa.array(["2020-01"], pa.string())})
        .cast(pa.schema([pa.field("x", pa.dictionary(pa.int8(), pa.string()))]))
        .append_column("y", pa.RunEndEncodedArray.from_arrays([1], [1])),
    ],
    ids=lambda table: str(table.schema.types)[:60],
)
def test_a_table_of_more_than_its_bytes_is_refused(table: pa.Table) -> None:
    with pytest.raises(values.Malformed):
        taken(stream(table))


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_table_is_refused(compression: str) -> None:
    table = pa.table({"x": np.zeros(1 << 20), "y": pa.array(["a"] * (1 << 20)).dictionary_encode()})
    with pytest.raises(values.Malformed, match="compressed"):
        taken(stream(table, compression=compression))
    assert taken(stream(table)).equals(table)


def test_a_table_whose_offsets_lie_is_refused() -> None:
    data = stream(pa.table({"x": ["abc", "def"]}))
    place = data.index(np.array([0, 3, 6], np.int32).tobytes())
    data[place : place + 12] = np.array([0, 1 << 30, 6], np.int32).tobytes()
    with pytest.raises(values.Malformed):
        taken(data)


def test_a_table_that_is_torn_anywhere_is_refused_or_read() -> None:
    data = stream(pa.table({"x": ["abc", "def"], "y": [[1], [2, 3]], "z": pa.array(["a", "b"]).dictionary_encode()}))
    random = np.random.default_rng(1)
    for _ in range(500):
        torn = bytearray(data)
        for place in random.integers(0, len(torn), 4):
            torn[place] = int(random.integers(0, 256))
        try:
            taken(torn)
        except values.Malformed:
            continue


def test_a_table_brings_no_types_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a schema says of extension types and of pandas is not followed."""
    field = pa.field("x", pa.int8(), metadata={"ARROW:extension:name": "arrow.py_extension_type"})
    plain = taken(stream(pa.table([pa.array([1], pa.int8())], schema=pa.schema([field], {"pandas": "{}"}))))
    assert plain.schema.metadata is None
    registered = pa.table({"x": pd.period_range("2020-01", periods=2, freq="M")})
    with pytest.raises(values.Malformed, match="not taken"):
        taken(stream(registered))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(values.Malformed, match=r"pip install 'actbox\[arrow\]'"):
        taken(bytearray())


def test_json_that_is_cut_apart_is_put_together_again() -> None:
    encoded = guest_values.to_json({"a": (b"1", {"b": [b"", bytearray(b"22")]}), "c": b"3"})
    back = guest_values.from_json(encoded.header, bytes(encoded.data))
    assert back == {"a": [b"1", {"b": [b"", b"22"]}], "c": b"3"}

# pandas and pyarrow come without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false, reportUnknownLambdaType=false
"""A session's variables: what is told of them, which move, and what a lying kernel gets for it."""

from __future__ import annotations

import asyncio
import collections
import datetime as dt
import enum
import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from talking import SECONDS, indented

from actbox import (
    CodeExecutor,
    ExecutionInterrupted,
    ExecutionTimeout,
    InvalidArgument,
    ProtocolError,
    StateError,
    Variable,
    VariableMissing,
    VariableRefused,
    VariableUnsupported,
)

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parent.parent / "examples" / "variables.py"

# A class all of whose own code would run for ever.
ENDLESS = """
def endless(*_):
    while True: pass
class Endless:
    __repr__ = __str__ = __len__ = __sizeof__ = __iter__ = __hash__ = __eq__ = __getattribute__ = endless
    shape = dtype = nbytes = columns = __class__ = property(endless)
class Kind(type):
    __name__ = __module__ = property(endless)
    __repr__ = __subclasscheck__ = __instancecheck__ = __eq__ = endless
    __hash__ = type.__hash__
class Odd(metaclass=Kind): pass
class Word(str):
    __repr__ = __str__ = __len__ = __getitem__ = __format__ = endless
class Named: pass
Named.__qualname__ = Word("Named")
def named(): pass
named.__name__ = Word("other")
"""

# What a hostile kernel does: `send` puts a piece on the wire, `r` is the request that is being served.
LIE = """
import json, struct
from actbox_guest.guest import shell, variables

def serve(self, r):
    def send(data, type="archive"):
        shell.outputs.send({{"type": type, "id": r["id"]}}, data)
    def value(header, data=b""):
        head = json.dumps(header).encode()
        send(struct.pack("!I", len(head)) + head)
        if data: send(data)
{}
variables.Variables.serve = serve
"""


def lie(body: str) -> str:
    return LIE.format(indented(body))


async def has(executor: CodeExecutor, module: str) -> bool:
    """Whether a library is installed inside."""
    found = await executor.execute(f"import importlib.util; print(importlib.util.find_spec({module!r}) is not None)")
    return found.text == "True"


async def by_name(executor: CodeExecutor, **options: Any) -> dict[str, Variable]:
    return {variable.name: variable for variable in await executor.variables(SECONDS, **options)}


# -- what is told ----------------------------------------------------------------------------------------------------


async def test_the_variables_are_told_in_their_order_with_what_they_hold(client: CodeExecutor) -> None:
    await client.execute(
        "import math\nx = 3\ntext = 'é' * 500\n_hidden = 1\ndef f(a, b): pass\nrow = [1, (2, {'k': b'v'})]"
    )
    found = await client.variables()
    assert [variable.name for variable in found] == ["math", "x", "text", "f", "row"]
    told = {variable.name: variable for variable in found}
    assert told["x"] == Variable("x", "int", bytes=28, preview="3")
    assert told["text"].length == 500
    assert len(str(told["text"].preview)) == 200
    assert (told["f"].type, told["f"].preview) == ("function", "f(a, b)")
    assert (told["math"].type, told["math"].preview) == ("module", "<module math>")
    assert (told["row"].length, told["row"].preview) == (2, "[1, (2, {'k': b'v'})]")


async def test_arrays_and_tables_tell_their_shape_and_type(executor: CodeExecutor) -> None:
    await executor.execute(
        "import numpy as np, pandas as pd\n"
        "a = np.arange(6.0).reshape(2, 3); o = np.array([object()]); d = np.array(['2020-02-29'], 'M8[D]')\n"
        "s = np.float64(2.5); t = pd.DataFrame({'n': [1, 2], 'f': [0.5, 1.5]}); column = t.n"
    )
    told = await by_name(executor)
    assert told["a"] == Variable("a", "numpy.ndarray", 48, (2, 3), None, "<f8", "[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]")
    assert (told["o"].dtype, told["o"].preview) == ("|O", None)
    assert told["d"].preview == "['2020-02-29']"
    assert (told["s"].type, told["s"].shape, told["s"].preview) == ("numpy.float64", (), "2.5")
    assert (told["t"].shape, told["t"].preview) == ((2, 2), "'n': <i8, 'f': <f8")
    assert (told["column"].shape, told["column"].dtype) == ((2,), "<i8")


async def test_no_code_of_the_values_own_is_run(executor: CodeExecutor) -> None:
    await executor.execute(
        f"{ENDLESS}\nimport numpy as np, pandas as pd\ne = Endless(); odd = Odd(); l = [e, odd]; d = {{1: e}}\n"
        "class Shy:\n    __repr__ = __str__ = endless\n"
        "a = np.array([Shy()]); t = pd.DataFrame({'x': a}, dtype=object)\n"
        "t2 = pd.DataFrame([[1]], columns=pd.Index(a, dtype=object)); s = t.x\n"
        "class Array(np.ndarray):\n    shape = nbytes = dtype = property(endless)\n"
        "class Number(np.float64):\n    nbytes = dtype = property(endless)\n    reshape = endless\n"
        "number = Number(1); name = Named()\n"
        "text = Word('x'); sub = np.zeros(3).view(Array); huge = 10 ** 10000; r = range(10 ** 1000)\n"
        "deep = []\nfor _ in range(10000): deep = [deep]\nloop = []; loop.append(loop)",
        SECONDS,
    )
    told = await by_name(executor)
    assert told["e"].type == "Endless"
    assert told["e"].preview is None
    assert told["odd"].type == "Odd"
    assert told["l"].preview == "[<Endless>, <Odd>]"
    assert told["d"].preview == "{1: <Endless>}"
    assert (told["text"].type, told["text"].preview) == ("Word", None)
    assert (told["number"].type, told["number"].preview) == ("Number", None)
    assert (told["name"].type, told["Named"].preview) == ("Named", "<class Named>")
    assert told["named"].preview == "other()"
    assert told["sub"].preview is None
    assert told["huge"].preview == "<int of 33220 bits>"
    assert told["r"].preview == "range(...)"
    assert told["deep"].preview == told["loop"].preview == "[[[[...]]]]"


async def test_a_listing_is_bounded(executor: CodeExecutor) -> None:
    await executor.execute("for i in range(3000): globals()[f'v{i:04}'] = 'x' * 10000")
    assert len(await executor.variables()) == 1000
    found = await executor.variables(limit=5, preview=3)
    assert [(one.name, one.preview) for one in found[:2]] == [("i", "299"), ("v0000", "'xx")]
    assert len(found) == 5


async def test_variables_with_much_to_show_are_told_without_rather_than_left_out(executor: CodeExecutor) -> None:
    await executor.execute("for i in range(3000): globals()[f'v{i:04}'] = 'é' * 10000")
    found = await executor.variables(limit=5000, preview=1000)
    assert [variable.name for variable in found] == ["i", *(f"v{number:04}" for number in range(3000))]
    assert [variable.preview is None for variable in found] == [False] * 263 + [True] * 2738


async def test_a_request_waits_its_turn_and_is_interrupted_like_a_cell(client: CodeExecutor) -> None:
    cell = await client.submit("import time\ntime.sleep(0.2)\nlate = 1")
    assert "late" in await by_name(client)
    assert cell.outcome is not None
    blocked = await client.submit("time.sleep(60)")
    with pytest.raises(ExecutionTimeout, match="had not begun"):
        await client.variables(0.1)
    await blocked.interrupt()
    # As if a library called the user's own code.
    await client.execute(
        f"{ENDLESS}\nfrom actbox_guest.guest import values\nencode, values.encode = values.encode, endless"
    )
    with pytest.raises(ExecutionTimeout) as caught:
        await client.get("late", 0.3)
    assert caught.value.state_kept
    getting = asyncio.create_task(client.get("late"))
    await asyncio.sleep(0)
    getting.cancel()
    with pytest.raises((asyncio.CancelledError, ExecutionInterrupted)):
        await getting
    await client.execute("values.encode = encode")
    assert await client.get("late") == 1


# -- what moves ------------------------------------------------------------------------------------------------------


VALUES: list[Any] = [
    None,
    True,
    -1,
    10**100,
    2.5,
    "é😀\0",
    [],
    {},
    b"",
    b"\0\xff",
    [1, [b"a", {"b": b"b"}]],
    {"": {"x": None}},
]


async def test_json_and_bytes_move_as_they_are(executor: CodeExecutor) -> None:
    for value in VALUES:
        await executor.set("v", value)
        told = await executor.execute(f"print(v == {value!r}, type(v).__name__)")
        assert told.text == f"True {type(value).__name__}"
        assert await executor.get("v") == value


class Level(enum.IntEnum):
    HIGH = 3


class Point(NamedTuple):
    x: int
    y: str


# What Python's own `json` would write, or people put into results without a thought, and what comes of it.
SIMPLER: list[tuple[Any, Any]] = [
    (float("inf"), float("inf")),
    ({"n": np.int64(3), "x": np.float64(1.5), "b": np.bool_(True), "s": np.str_("é")}, None),
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    (collections.OrderedDict(b=1, a=[2]), {"b": 1, "a": [2]}),
    ([Level.HIGH, Point(1, "y")], [3, [1, "y"]]),
]


@pytest.mark.parametrize(("value", "comes"), SIMPLER, ids=lambda value: str(value)[:40])
async def test_what_derives_from_a_type_of_json_travels_as_that(executor: CodeExecutor, value: Any, comes: Any) -> None:
    await executor.set("v", value)
    got = await executor.get("v")
    assert got == (value if comes is None else comes)
    assert {type(item) for item in got.values()} <= {int, float, bool, str, list} if type(got) is dict else True


async def test_results_with_nan_and_numbers_of_numpy_come_out(executor: CodeExecutor) -> None:
    await executor.execute(
        "import numpy as np, collections\n"
        "scores = {'mean': np.array([1.0, 2.0]).mean(), 'worst': float('nan'), 'n': np.int64(2)}\n"
        "words = collections.Counter('aab'); when = np.datetime64('2020-01-01', 'ns')"
    )
    scores = await executor.get("scores")
    assert (scores["mean"], scores["n"]) == (1.5, 2)
    assert math.isnan(scores["worst"])
    assert await executor.get("words") == {"a": 2, "b": 1}
    with pytest.raises(VariableUnsupported, match=r"numpy\.array"):
        await executor.get("when")


ARRAYS: list[Any] = [
    np.arange(12).reshape(3, 4),
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(12).reshape(3, 4)[::2, ::-1],
    np.array(7.5),
    np.empty((0, 3), np.float32),
    np.array([1 + 2j]),
    np.array([True, False]),
    np.array(["é", "long text"]),
    np.array([b"a", b"bc"]),
    np.array(["2020-02-29", "NaT"], "M8[us]"),
    np.array([1, 2], ">i4"),
    np.zeros((1,) * 12),
]


async def test_arrays_move_with_their_shape_and_type(executor: CodeExecutor) -> None:
    for array in ARRAYS:
        await executor.set("v", array)
        got = await executor.get("v")
        assert got.shape == array.shape
        assert got.dtype == array.dtype.newbyteorder("<")
        assert np.array_equal(got, array, equal_nan=array.dtype.kind in "fcM")
        got[...] = got  # both are the receiver's own, and can be written
        await executor.execute("v[...] = v")


async def test_a_large_array_moves_both_ways(client: CodeExecutor) -> None:
    array = np.random.default_rng(1).random((1500, 1000))
    await client.set("v", array)
    assert (await client.execute("print(v.shape, v.flags.writeable)")).text == "(1500, 1000) True"
    assert np.array_equal(await client.get("v"), array)


FRAME = pd.DataFrame(
    {
        "n": [1, 2],
        "text": ["a", None],
        "when": pd.to_datetime(["2020-02-29", "2021-01-01"]),
        "kind": pd.Categorical(["x", "y"]),
    },
    index=pd.Index(["p", "q"], name="row"),
)
TABLE = pa.table({"lists": [[1, 2], None], "structs": [{"a": 1.5}, {"a": None}], "nothing": pa.nulls(2)})


@pytest.mark.parametrize("value", [FRAME, FRAME.reset_index(drop=True), TABLE], ids=["indexed", "plain", "table"])
async def test_tables_move_by_arrow_or_say_what_they_lack(executor: CodeExecutor, value: Any) -> None:
    if not await has(executor, "pyarrow"):
        with pytest.raises(VariableRefused, match="pyarrow is not installed inside: actbox build"):
            await executor.set("v", value)
        await executor.execute("import pandas; v = pandas.DataFrame({'x': [1]})")
        with pytest.raises(VariableRefused, match="pyarrow is not installed inside"):
            await executor.get("v")
        return
    await executor.set("v", value)
    assert (await executor.execute("print(type(v).__name__)")).text == type(value).__name__
    got: Any = await executor.get("v")
    if isinstance(value, pd.DataFrame):
        pd.testing.assert_frame_equal(got, value)
    else:
        assert got.equals(value)


async def test_what_the_host_lacks_is_told_as_the_hosts(
    executor: CodeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(VariableRefused, match=r"on the host: pip install 'actbox\[arrow\]'"):
        await executor.set("v", FRAME)


async def test_a_name_means_what_it_means_in_a_cell(executor: CodeExecutor) -> None:
    await executor.set("\N{MICRO SIGN}", 5)  # which Python's parser makes a Greek letter
    assert (await executor.execute("print(\N{MICRO SIGN})")).text == "5"
    assert await executor.get("\N{MICRO SIGN}") == await executor.get("\N{GREEK SMALL LETTER MU}") == 5
    with pytest.raises(InvalidArgument):
        await executor.set("class", 5)


async def test_what_does_not_move_says_its_type_and_what_does(executor: CodeExecutor) -> None:
    await executor.execute(
        "import numpy as np, pandas as pd, datetime\n"
        "class Mine: pass\nmine = Mine(); nested = {'a': [mine]}; keys = {1: 2}; inner = [np.zeros(1)]\n"
        "objects = np.array([mine]); fields = np.zeros(1, 'i4,f8'); "
        "column = pd.Series([1]); day = datetime.date.today(); masked = np.ma.array([1]); some = {1}\n"
        "path = 'a\\udcff'; long = 10 ** 5000; undated = np.array(['NaT'], 'M8')"
    )
    for name, kind, remedy in [
        ("mine", "Mine", "make one of these of it"),
        ("nested", "Mine", "make one"),
        ("keys", "dict with keys of type int", r"str\(key\)"),
        ("inner", "numpy.ndarray", "by themselves"),
        ("masked", "numpy.ma.MaskedArray", "asarray"),
        ("some", "set", r"list\(value\)"),
        ("path", "str", "surrogateescape"),
        ("long", "int", "hex"),
        ("undated", "numpy.ndarray of dtype <M8", "unit"),
        ("objects", "numpy.ndarray of dtype |O", "tolist"),
        ("fields", "numpy.ndarray of dtype |V12", "one by one"),
        ("column", "pandas.Series", "to_frame"),
        ("day", "datetime.date", "isoformat"),
    ]:
        with pytest.raises(VariableUnsupported, match=remedy) as caught:
            await executor.get(name)
        assert (caught.value.name, caught.value.type) == (name, kind)
    with pytest.raises(VariableMissing) as missing:
        await executor.get("nowhere")
    assert isinstance(missing.value, LookupError)
    months = pd.DataFrame({"month": pd.period_range("2020-01", periods=2, freq="M")})
    for value in (object(), {1: 2}, np.array([None]), dt.date(2020, 2, 29), 10**5000, "\ud800", pl.DataFrame(), months):
        with pytest.raises(VariableUnsupported):
            await executor.set("v", value)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(VariableUnsupported, match="nested"):
        await executor.set("v", deep)
    with pytest.raises(VariableMissing):
        await executor.get("v")


async def test_sizes_are_bounded_by_an_argument(client: CodeExecutor) -> None:
    await client.execute("v = bytes(1000); old = 1")
    assert await client.get("v", max_bytes=1100) == bytes(1000)
    with pytest.raises(VariableRefused, match="more than the 999 allowed; pass a larger max_bytes"):
        await client.get("v", max_bytes=999)
    with pytest.raises(VariableRefused, match="allowed"):
        await client.set("old", bytes(1000), max_bytes=999)
    assert await client.get("old") == 1


async def test_what_cannot_be_asked_is_said_before_anything_is_done(executor: CodeExecutor) -> None:
    for call in (
        executor.get("a b"),
        executor.get(cast("Any", 1)),
        executor.set("x" * 300, 1),
        executor.get("a", max_bytes=-1),
        executor.variables(limit=-1),
        executor.variables(preview=cast("Any", 1.5)),
        executor.variables(0),
    ):
        with pytest.raises(InvalidArgument):
            await call
    await executor.disconnect()
    with pytest.raises(StateError):
        await executor.variables()


# -- a kernel that lies ----------------------------------------------------------------------------------------------

LYING_LISTINGS = [
    'for _ in range(100): send(b\'{"name": "x", "type": "y"}\\n\' * 200)',
    'send(b\'{"name": 1, "type": "y"}\\n\')',
    "send(b'no json\\n')",
    'send(b\'{"name": "x", "type": "y", "bytes": -1}\\n\')',
    'send(b\'{"name": "x", "type": "y", "shape": [1.5]}\\n\')',
    'send(b\'{"name": "x", "type": "y", "preview": "\' + b\'p\' * 201 + b\'"}\\n\')',
]


async def test_a_listing_that_lies_ends_the_session(executor: CodeExecutor) -> None:
    for body in LYING_LISTINGS:
        await executor.execute(lie(body))
        with pytest.raises(ProtocolError):
            await executor.variables(SECONDS)
    assert (await executor.execute("print(1)")).restarted


async def test_more_than_was_asked_for_ends_the_session(client: CodeExecutor) -> None:
    for body in (
        "while True: value({'form': 'json', 'size': 0, 'blobs': []}, bytes(200000))",
        "send(b'\\xff\\xff\\xff\\xff')\nsend(bytes(99))",
        "send(b'x', type='table')",
    ):
        await client.execute(lie(body))
        with pytest.raises(ProtocolError):
            await client.get("v", SECONDS, max_bytes=1 << 20)


async def test_a_value_that_lies_is_refused_and_the_session_goes_on(client: CodeExecutor) -> None:
    await client.execute(lie("value({'form': 'array', 'dtype': '|O', 'shape': [1], 'order': 'C'}, bytes(8))"))
    with pytest.raises(VariableRefused, match="no value"):
        await client.get("v")
    await client.execute(lie("raise ValueError('\\x1b[2Jof its own')"))
    with pytest.raises(VariableRefused, match=r"ValueError: \\x1b\[2Jof its own"):
        await client.get("v")
    await client.execute(lie("pass"))
    with pytest.raises(ProtocolError, match="less than"):
        await client.get("v")
    assert (await client.execute("print(1)")).text == "1"


async def test_a_kernel_in_no_hurry_is_not_waited_for(executor: CodeExecutor) -> None:
    await executor.execute(lie("while True: pass"))
    for request in (executor.get("v", 0.2), executor.set("v", bytes(8 << 20), 0.2), executor.variables(0.2)):
        with pytest.raises(ExecutionTimeout):
            await request


@pytest.mark.usefixtures("default_engine")
@pytest.mark.timeout(60)
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=55
    )
    assert done.returncode == 0, done.stderr
    assert "readings: numpy.ndarray (1000,)" in done.stdout
    assert "the mean is 3.0" in done.stdout
    assert "lock: _thread.lock" in done.stdout


def test_what_the_tests_need_is_here() -> None:
    assert importlib.util.find_spec("pyarrow")


async def test_bytes_below_keys_too_long_to_be_told_are_refused(executor: CodeExecutor) -> None:
    value = {f"{number}{'k' * 9000}": b"x" for number in range(200)}
    with pytest.raises(VariableUnsupported, match="below long keys"):
        await executor.set("v", value)
    await executor.execute("v = {f\"{number}{'k' * 9000}\": b'x' for number in range(200)}")
    with pytest.raises(VariableUnsupported, match="below long keys"):
        await executor.get("v")

"""Functions of the host: called by a session's code as its own, decided by the host alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import functools
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import pytest
from pydantic import BaseModel, BeforeValidator
from talking import SECONDS, error_of, text_of, until

from actbox import (
    Allow,
    CallLimits,
    CodeExecutionContainer,
    CodeExecutor,
    Deny,
    ExecutionClient,
    ExecutionError,
    ExecutionTimeout,
    FunctionCall,
    InvalidArgument,
    LimitExceeded,
    Limits,
    ProtocolError,
)
from actbox.clock import Clock

if TYPE_CHECKING:
    from collections.abc import Generator

    from talking import MakeExecutor

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parent.parent / "examples" / "functions.py"

# What a hostile kernel sends: calls that no function of the guest's has made.
FORGE = """
import json, struct
from actbox_guest.guest import shell, values
def arguments(*args, **kwargs):
    encoded = values.to_json([args, kwargs])
    return values.prefix(encoded.header) + encoded.data
def forge(name, data=None, number=1, **fields):
    shell.outputs.channel.at_once({"type": "call", "id": number, "name": name, **fields}, data or arguments())
"""


def add(first: int, second: int = 2) -> int:
    """Add two numbers."""
    return first + second


def twice(text: str) -> str:
    return text * 2


async def echo(value: Any) -> Any:
    """Give back what was given."""
    return value


@contextlib.contextmanager
def released() -> Generator[threading.Event]:
    """An event that threads wait for; they do not outlive the block."""
    event = threading.Event()
    try:
        yield event
    finally:
        event.set()


# -- calling ---------------------------------------------------------------------------------------------------------


async def test_a_function_is_called_like_one_of_the_sessions_own(client: CodeExecutor) -> None:
    client.functions(add, echo, twice=twice)
    assert await text_of(client, "print(add(1), add(1, second=5), twice('ab'), echo(None))") == "3 6 abab None"
    shown = await text_of(client, "import inspect; help(add); print(inspect.signature(add), add.__name__)")
    assert shown is not None
    assert "add(first: int, second: int = 2) -> int" in shown
    assert "Add two numbers." in shown
    assert await text_of(client, "print(await echo.aio([1]), await add.aio(1))") == "[1] 3"
    assert [variable.name for variable in await client.variables()] == ["inspect"]


VALUES: list[Any] = [None, True, 1.5, 10**30, "é\0", b"\0\xff", [1, [b"x"]], {"a": {"b": b""}}, {"": []}]


async def test_json_and_bytes_go_and_come_as_they_are(executor: CodeExecutor) -> None:
    executor.functions(echo)
    assert await text_of(executor, f"for v in {VALUES!r}: assert echo(v) == v") is None


class Point(BaseModel):
    x: float
    label: str = ""


@dataclasses.dataclass
class Found:
    name: str
    when: dt.date


async def test_arguments_and_results_are_checked_by_their_annotations(executor: CodeExecutor) -> None:
    got: list[object] = []

    def model(point: Point, day: dt.date, pair: tuple[int, str], *rest: int, **named: bytes) -> Found:
        got.extend((point, day, pair, rest, named))
        return Found("f", day)

    def lies() -> int:
        return cast("int", "a secret")

    def odd() -> object:
        return object()

    executor.functions(model, lies, odd, add)
    code = "print(model({'x': 1}, '2020-02-29', [1, 'a'], 5, 6, raw=b'r'))"
    assert await text_of(executor, code) == "{'name': 'f', 'when': '2020-02-29'}"
    assert got == [Point(x=1), dt.date(2020, 2, 29), (1, "a"), (5, 6), {"raw": b"r"}]
    for wrong in ("add('1')", "add(1.5)", "add(True)", "add(None)", "add(b'1')"):
        assert await error_of(executor, wrong) == "TypeError: add(): first: Input should be a valid integer"
    assert "rest: Input" in await error_of(executor, "model({'x': 1}, '2020-02-29', [1, 'a'], 'x')")
    assert "x Field required" in await error_of(executor, "model({}, '2020-02-29', [1, 'a'])")
    for wrong in ("add()", "add(1, 2, 3)", "add(1, third=1)"):
        assert (await error_of(executor, wrong)).startswith("TypeError: ")
    assert await error_of(executor, "add(object())") == "TypeError: add() takes JSON values and bytes, not object"
    told = await error_of(executor, "lies()")
    assert told == "TypeError: the result of lies() is not what can be returned: Input should be a valid integer"
    assert (await error_of(executor, "odd()")).startswith("TypeError: the result of odd()")


def _confused(value: object) -> object:
    raise LookupError(f"a secret about {value}")


async def test_a_check_of_the_hosts_own_that_fails_is_told_at_once(executor: CodeExecutor) -> None:
    confused = Annotated[int, BeforeValidator(_confused)]

    def takes(value: int) -> None:
        pytest.fail("called")

    def gives() -> int:
        return 1

    takes.__annotations__["value"] = gives.__annotations__["return"] = confused
    executor.functions(takes, gives, echo)
    assert await error_of(executor, "takes(1)") == "TypeError: takes(): value: LookupError while it was checked"
    told = "TypeError: the result of gives() is not what can be returned: LookupError while it was checked"
    assert await error_of(executor, "gives()") == told


@pytest.mark.parametrize("depth", [300, 900, 5000])
async def test_arguments_nested_deep_are_refused_at_once(executor: CodeExecutor, depth: int) -> None:
    executor.functions(echo, add)
    execution = await executor.submit(
        f"{FORGE}text = b'[[' + b'[' * {depth} + b']' * {depth} + b'],{{}}]'\n"
        "forge('add', values.prefix({'form': 'json', 'size': len(text), 'blobs': []}) + text, 99)\necho(1)"
    )
    with contextlib.suppress(ProtocolError):  # a parser that goes less deep takes it for none
        await execution.result(SECONDS)
        assert [call.verdict for call in execution.calls] == ["refused", "returned"]


async def test_functions_in_the_clothes_of_others_are_called_as_what_they_are(executor: CodeExecutor) -> None:
    class Mailbox:
        def __init__(self, owner: str) -> None:
            self.owner = owner

        async def __call__(self, text: str) -> str:
            return f"{self.owner}: {text}"

    def later(value: int) -> Any:
        return echo([value])

    def fail(value: int) -> Any:
        return no_such(value)

    def make(size: int) -> list[int]:
        return list(range(size))

    executor.functions(later=later, send=Mailbox("me"), part=functools.partial(make, size=2))
    assert await text_of(executor, "print(later(1), await later.aio(2), send('hi'), part())") == "[1] [2] me: hi [0, 1]"
    assert await error_of(executor, "send(1)") == "TypeError: send(): text: Input should be a valid string"
    assert await error_of(executor, "part(size='1')") == "TypeError: part(): size: Input should be a valid integer"
    executor.functions(Found, fail=fail)
    assert await text_of(executor, "print(Found('f', '2020-02-29'))") == "{'name': 'f', 'when': '2020-02-29'}"
    assert (
        await error_of(executor, "Found(1, '2020-02-29')") == "TypeError: Found(): name: Input should be a valid string"
    )
    assert await error_of(executor, "fail(1)") == "LookupError: no 1"


async def no_such(value: Any) -> None:
    raise LookupError(f"no {value}")


class OwnError(Exception):
    def __str__(self) -> str:
        return "of my own"


ERRORS: list[tuple[BaseException, str]] = [
    (ValueError("wrong"), "ValueError: wrong"),
    (KeyError("key"), "KeyError: 'key'"),
    (OwnError(), "OwnError: of my own"),
    (SystemExit(3), "SystemExit: 3"),
    (KeyboardInterrupt("k"), "KeyboardInterrupt: k"),
    (asyncio.CancelledError("c"), "CancelledError: c"),
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "UnicodeDecodeError: 'utf-8' codec"),
]


async def test_exceptions_come_back_with_name_and_message_alone(executor: CodeExecutor) -> None:
    def fail(number: int) -> None:
        raise ERRORS[number][0]

    async def fail_later(number: int) -> None:
        raise ERRORS[number][0]

    executor.functions(fail, fail_later)
    for way in ("fail", "fail_later"):
        for number, (_, told) in enumerate(ERRORS):
            code = f"try: {way}({number})\nexcept Exception as e: print(f'{{type(e).__name__}}: {{e}}')"
            assert (await text_of(executor, code) or "").startswith(told)


async def test_threads_and_tasks_call_at_once(client: CodeExecutor) -> None:
    most = now = 0

    async def slow(number: int) -> int:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return number

    client.functions(slow, limits=CallLimits(in_flight=8))
    code = "import asyncio\nprint(await asyncio.gather(*(slow.aio(i) for i in range(50))) == list(range(50)))"
    assert await text_of(client, code) == "True"
    assert 1 < most <= 8
    code = (
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(20) as pool:\n"
        "    print(list(pool.map(slow, range(50))) == list(range(50)))"
    )
    assert await text_of(client, code) == "True"
    assert 1 < most <= 8
    code = "async def both():\n    return await asyncio.gather(slow.aio(1), asyncio.to_thread(slow, 2))\n"
    assert await text_of(client, f"{code}print(asyncio.run(both()))") == "[1, 2]"


async def test_output_and_calls_keep_their_order(executor: CodeExecutor) -> None:
    seen: list[str] = []

    async def note(text: str) -> None:
        seen.append(f"{text} after {(execution.so_far().text or '').split()[-1:]}")

    executor.functions(note)
    execution = await executor.submit("for i in range(3):\n    print('line', i)\n    note(str(i))")
    await execution.result(SECONDS)
    assert seen == ["0 after ['0']", "1 after ['1']", "2 after ['2']"]
    assert [(call.name, call.verdict) for call in execution.calls] == [("note", "returned")] * 3


async def test_a_call_that_waits_is_interrupted_and_its_answer_is_dropped(client: CodeExecutor) -> None:
    with released() as event:
        cancelled = asyncio.Event()

        def blocks() -> str:
            event.wait(SECONDS)
            return "late"

        async def waits() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        client.functions(blocks, waits, add)
        for code in ("blocks()", "waits()", "await waits.aio()", "import asyncio; asyncio.run(waits.aio())"):
            with pytest.raises(ExecutionTimeout) as caught:
                await client.execute(f"x = 1\n{code}", 0.2)
            assert caught.value.state_kept
        await asyncio.wait_for(cancelled.wait(), SECONDS)
        assert await text_of(client, "print(x, add(1))") == "1 3"
    assert await text_of(client, "print(add(2))") == "4"


async def test_a_thread_that_outlives_its_cell_calls_no_more(executor: CodeExecutor) -> None:
    begun = False

    async def forever() -> None:
        nonlocal begun
        begun = True
        await asyncio.Event().wait()

    executor.functions(add, forever, has_begun=lambda: begun)
    code = (
        "import threading\ntold = []\n"
        "def work(f, wait):\n    wait()\n    try: f()\n"
        "    except Exception as e: told.append(f'{type(e).__name__}: {e}')\n"
        "go = threading.Event()\n"
        "threads = [threading.Thread(target=work, args=a) for a in ((forever, int), (lambda: add(1), go.wait))]\n"
        "for t in threads: t.start()\nwhile not has_begun(): pass"
    )
    await executor.execute(code, SECONDS)
    # Between the cells: a request for a variable is none.
    await executor.execute(
        "import atexit; from actbox_guest.guest import values\nold = values.encode\n"
        "def encode(v):\n    threads[0].join(); go.set(); threads[1].join(); return old(v)\n"
        "values.encode = encode"
    )
    told = await executor.get("told", SECONDS)
    assert told[0] == "CallRefused: the cell that called has ended"
    assert told[1].startswith("CallRefused: add() can be called while a cell runs")


async def test_a_child_process_cannot_call(executor: CodeExecutor) -> None:
    executor.functions(add)
    code = (
        "import os\nadd(1)\nif not (pid := os.fork()):\n    try: add(1)\n    except RuntimeError as e: print(e)\n"
        "    os._exit(0)\nos.waitpid(pid, 0)\nprint(add(3))"
    )
    text = await text_of(executor, code)
    assert text is not None
    assert "not by a child" in text
    assert text.endswith("5")


async def test_a_fresh_kernel_has_the_functions_before_its_first_cell(client: CodeExecutor) -> None:
    client.functions(add)
    assert await text_of(client, "print(add(1))") == "3"
    with pytest.raises(ExecutionError):
        await client.execute("import os; os.kill(os.getpid(), 9)", SECONDS)
    result = await client.execute("print(add(1))", SECONDS)
    assert (result.text, result.restarted) == ("3", True)


async def test_functions_are_added_and_replaced_between_cells(executor: CodeExecutor) -> None:
    assert "NameError" in await error_of(executor, "add(1)")
    executor.functions(add)
    assert await text_of(executor, "print(add(1)); mine = 1") == "3"
    executor.functions(echo)
    await executor.execute("add = 'the user has taken the name'")
    executor.functions(twice=echo)
    assert await text_of(executor, "print(add, echo(1), twice(2), mine)") == "the user has taken the name 1 2 1"


async def test_a_saved_function_finds_the_hosts_functions_again(
    executor: CodeExecutor, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    executor.functions(add)
    await executor.execute("kept = [add, 1]")
    assert (await executor.save(tmp_path / "state")).names == ("kept",)
    async with make_executor() as other:
        with pytest.raises(Exception, match="it uses add, which this session lacks; register"):
            await other.restore(tmp_path / "state")
        other.functions(add)
        await other.restore(tmp_path / "state")
        assert await text_of(other, "print(kept[0](5))") == "7"


# -- approval, time and budgets --------------------------------------------------------------------------------------


async def test_each_call_is_approved_edited_or_denied(client: CodeExecutor) -> None:
    asked: list[FunctionCall] = []

    def decide(call: FunctionCall) -> Any:
        asked.append(call)
        match call.arguments["first"]:
            case 1:
                return True
            case 2:
                return Allow({"first": 100})
            case 3:
                return Allow({"first": "x"})
            case 4:
                return Allow({"other": 1})
            case 5:
                return Deny("not five")
            case 6:
                return False
            case 7:
                raise ValueError("the approver's own secret")
            case _:
                return "yes"

    async def decide_later(call: FunctionCall) -> Any:
        await asyncio.sleep(0)
        return decide(call)

    for approve in (decide, decide_later):
        asked.clear()
        client.functions(add, approve=approve)
        client.functions(free=add)
        assert await text_of(client, "print(add(1, 1), add(2), free(9))") == "2 102 11"
        for number, told in [
            (3, "TypeError: add(): first: Input should be a valid integer"),
            (4, "TypeError: add(): it has no parameter 'other'"),
            (5, "CallRefused: add() was denied: not five"),
            (6, "CallRefused: add() was denied: it was not approved"),
            (7, "CallRefused: add() was denied: it was not approved"),
            (8, "CallRefused: add() was denied: it was not approved"),
        ]:
            assert await error_of(client, f"add({number})") == told
        assert "first: Input" in await error_of(client, "add('no approval for what is wrong')")
        assert asked[0] == FunctionCall("add", {"first": 1, "second": 1})
        assert len(asked) == 8
    execution = await client.submit("try: add(5)\nexcept RuntimeError: pass\nfree(1)")
    await execution.result(SECONDS)
    assert [call.verdict for call in execution.calls] == ["denied", "returned"]


async def test_who_approves_sees_all_arguments_and_may_edit_them_as_json(executor: CodeExecutor) -> None:
    asked: list[FunctionCall] = []

    def book(day: dt.date, *guests: str, room: str = "small", point: Point | None = None) -> str:
        return f"{room} on {day:%d.%m.} for {len(guests)}, {point!r}"

    def decide(call: FunctionCall) -> Allow:
        asked.append(call)
        return Allow({**call.arguments, "day": "2020-02-29", "point": {"x": 1}})

    executor.functions(book, approve=decide)
    told = "small on 29.02. for 2, Point(x=1.0, label='')"
    assert await text_of(executor, "print(book('2020-01-01', 'a', 'b'))") == told
    day = dt.date(2020, 1, 1)
    assert asked == [FunctionCall("book", {"day": day, "guests": ("a", "b"), "room": "small", "point": None})]
    executor.functions(book, approve=lambda _: Allow({"room": "large"}))
    assert await error_of(executor, "book('2020-01-01')") == "TypeError: book(): missing a required argument: 'day'"
    executor.functions(book, approve=lambda _: Allow(cast("Any", "large")))
    assert "was denied: it was not approved" in await error_of(executor, "book('2020-01-01')")


async def test_approval_takes_none_of_the_cells_time(client: CodeExecutor) -> None:
    async def decide(_call: FunctionCall) -> bool:
        await asyncio.sleep(0.4)
        return True

    client.functions(add, approve=decide)
    assert (await client.execute("print(add(1), add(2))", 0.35)).text == "3 4"
    with pytest.raises(ExecutionTimeout) as caught:
        await client.execute("add(1)\nwhile True: pass", 0.35)
    assert caught.value.state_kept


async def test_approval_takes_none_of_the_wall_limit(engine: str, workspace_path: Path) -> None:
    async def decide(_call: FunctionCall) -> bool:
        await asyncio.sleep(0.7)
        return True

    async with (
        CodeExecutionContainer(
            workspace_path=workspace_path, engine=engine, env={}, preload=(), limits=Limits(wall=0.6)
        ) as container,
        CodeExecutor("k", container.workspace, container.port) as executor,
    ):
        executor.functions(add, approve=decide)
        assert await text_of(executor, "print(add(1))") == "3"
        with pytest.raises(LimitExceeded, match="wall"):
            await executor.execute("add(1)\nwhile True: pass", SECONDS)


async def test_a_cell_that_waits_for_approval_is_interrupted(client: CodeExecutor) -> None:
    asked = asyncio.Event()

    async def decide(_call: FunctionCall) -> bool:
        asked.set()
        await asyncio.Event().wait()
        return True

    client.functions(add, approve=decide)
    execution = await client.submit("x = 1\nadd(1)")
    await asyncio.wait_for(asked.wait(), SECONDS)
    await execution.interrupt()
    assert [call.verdict for call in execution.calls] == ["abandoned"]
    assert await text_of(client, "print(x)") == "1"


async def test_budgets_refuse_inside_and_on_the_outcome(client: CodeExecutor) -> None:
    client.functions(add, limits=CallLimits(per_cell=5, per_session=12))
    with pytest.raises(LimitExceeded, match="calls per cell") as caught:
        await client.execute("done = 0\nwhile True:\n    add(1)\n    done += 1", SECONDS)
    assert (caught.value.limit, caught.value.bound, caught.value.state_kept) == ("calls_per_cell", 5, True)
    execution = await client.submit(
        "print(done)\ntry:\n    for i in range(9): add(i)\nexcept RuntimeError as e: print(e)"
    )
    text = (await execution.result(SECONDS)).text
    assert text == "5\nthere may be 5 calls per cell, and they are used up"
    assert execution.calls_over is not None
    with pytest.raises(LimitExceeded) as caught:
        await client.execute("for i in range(5): add(i)", SECONDS)
    assert caught.value.limit == "calls_per_session"
    assert await text_of(client, "print('goes on')") == "goes on"


async def test_calls_that_wait_when_the_budget_is_used_up_are_no_flood(executor: CodeExecutor) -> None:
    go = asyncio.Event()

    async def slow() -> None:
        await go.wait()

    executor.functions(slow, echo, limits=CallLimits(per_cell=4, in_flight=4))
    execution = await executor.submit(
        "import asyncio\nx = 1\ntasks = [asyncio.ensure_future(slow.aio()) for _ in range(3000)]\n"
        "await asyncio.sleep(0)\nprint('all wait')\n"
        "got = await asyncio.gather(*tasks, return_exceptions=True)\n"
        "print(got[:4], {type(each).__name__ for each in got[4:]})"
    )
    await until(lambda: execution.so_far().text == "all wait")
    go.set()
    assert (await execution.result(SECONDS)).text == "all wait\n[None, None, None, None] {'CallBudgetExceeded'}"
    # And as many as may be at work can be on their way before the kernel hears of it.
    executor.functions(limits=CallLimits(per_cell=5, in_flight=200))
    await executor.execute(f"{FORGE}for _ in range(1200): forge('echo', arguments(1))", SECONDS)
    assert await text_of(executor, "print(x)") == "1"


async def test_calls_wait_for_those_that_nobody_waits_for_any_more(executor: CodeExecutor) -> None:
    at_work = 0
    go = asyncio.Event()

    async def slow() -> None:
        nonlocal at_work
        at_work += 1
        await go.wait()

    executor.functions(slow, echo, limits=CallLimits(in_flight=2))
    code = (
        "import asyncio\n"
        "try: await asyncio.wait_for(slow.aio(), 0.01)\nexcept asyncio.TimeoutError: pass\n"
        "print(await asyncio.gather(slow.aio(), echo.aio(1), echo.aio(2)))"
    )
    execution = await executor.submit(code)
    await until(lambda: at_work == 2)
    go.set()
    assert (await execution.result(SECONDS)).text == "[None, 1, 2]"
    assert [call.verdict for call in execution.calls] == ["returned"] * 4


async def test_a_clock_that_is_stopped_keeps_what_is_left() -> None:
    fired: list[str] = []
    clock = Clock()
    gone = clock.after(0.01, fired.append, "cancelled")
    gone.cancel()
    clock.after(0.05, fired.append, "first")
    with clock.stopped(), clock.stopped():
        clock.after(0.01, fired.append, "second")
        await asyncio.sleep(0.1)
        assert fired == []
    await asyncio.sleep(0.2)
    assert fired == ["second", "first"]


# -- G16: a session that lies ----------------------------------------------------------------------------------------


async def test_what_is_not_registered_is_refused(client: CodeExecutor, make_executor: MakeExecutor) -> None:
    called: list[str] = []
    client.functions(echo, mine=lambda: called.append("mine"))
    async with make_executor() as other:
        other.functions(theirs=lambda: called.append("theirs"))
        assert await text_of(other, "theirs()") is None
        # By its name, by another session's number or key, by the name of what is no function.
        names = ("theirs", "__init__", "functions", "echo.__globals__", "os.system", "x" * 1000, "\\x1b[2J")
        execution = await client.submit(
            FORGE + "".join(f"forge('{name}', session=1, key='{other.key}', executor='x')\n" for name in names)
        )
        await execution.result(SECONDS)
        assert await text_of(client, "echo(None)") is None
    assert [call.verdict for call in execution.calls] == ["refused"] * len(names)
    assert called == ["theirs"]


async def test_forged_arguments_are_checked_like_any(client: CodeExecutor) -> None:
    client.functions(add)
    execution = await client.submit(
        FORGE
        + "".join(
            f"forge('add', arguments({given}), 99)\n"
            for given in ("'1'", "", "1, 2, 3", "1, first=1", "first=[]", "**{'first; x': 1}", "{'first': 1}")
        )
        + "import time\nwhile not add(1): pass"
    )
    await execution.result(SECONDS)
    assert [call.verdict for call in execution.calls] == ["refused"] * 7 + ["returned"]


NO_CALLS = [
    "forge('add', b'x')",
    "forge('add', b'\\0\\0\\0\\0')",
    "forge('add', b'\\xff\\xff\\xff\\xff' + bytes(100))",
    "forge('add', values.prefix({'form': 'json', 'size': 2, 'blobs': []}) + b'{}')",
    "forge('add', values.prefix({'form': 'json', 'size': 9, 'blobs': []}) + b'[[NaN],{}]')",
    "forge('add', arguments(1), number=-1)",
    "forge('add', arguments(1), number='1')",
    "forge(['add'])",
    "shell.outputs.channel.at_once({'type': 'call_result', 'id': 1, 'status': 'ok'})",
    "shell.outputs.channel.at_once({'type': 'functions'})",
]


async def test_what_is_no_call_ends_the_session_and_no_other(
    executor: CodeExecutor, make_executor: MakeExecutor
) -> None:
    executor.functions(add)
    async with make_executor() as other:
        for call in NO_CALLS:
            with pytest.raises(ProtocolError):
                await executor.execute(f"{FORGE}{call}\nimport time; time.sleep(60)", SECONDS)
        assert await text_of(other, "print(1)") == "1"
    assert (await executor.execute("print(add(1))", SECONDS)).text == "3"


async def test_answers_go_to_the_session_that_called(client: CodeExecutor, make_executor: MakeExecutor) -> None:
    """Two sessions use the same numbers at once; each gets its own answers."""
    gate = asyncio.Event()

    async def mine() -> str:
        await gate.wait()
        return "mine"

    async def theirs() -> str:
        await gate.wait()
        return "theirs"

    async with make_executor() as other:
        client.functions(f=mine)
        other.functions(f=theirs)
        first, second = await client.submit("print(f())"), await other.submit("print(f())")
        asyncio.get_running_loop().call_later(0.1, gate.set)
        assert (await first.result(SECONDS)).text == "mine"
        assert (await second.result(SECONDS)).text == "theirs"


async def test_floods_of_calls_hurt_nobody_else(client: CodeExecutor, make_executor: MakeExecutor) -> None:
    at_work = most = 0

    async def slow() -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        try:
            await asyncio.sleep(0.02)
        finally:
            at_work -= 1

    client.functions(slow, limits=CallLimits(in_flight=4, bytes=1024))
    async with make_executor() as other:
        flood = await client.submit(f"{FORGE}while True: forge('slow')")
        large = "forge('slow', arguments(bytes(1 << 20)))"
        began = time.monotonic()
        for _ in range(5):
            assert await text_of(other, "print(1)") == "1"
        assert time.monotonic() - began < SECONDS / 2
        with pytest.raises(ProtocolError, match="flood"):
            await flood.result(SECONDS)
        assert most == 4
        assert len(flood.calls) == 1000
        execution = await client.submit(f"{FORGE}for i in range(20): {large}")
        await execution.result(SECONDS)
        assert {call.verdict for call in execution.calls} <= {"refused"}
        assert await text_of(other, "print(1)") == "1"


async def test_a_large_result_is_refused_and_large_arguments_are_not_sent(executor: CodeExecutor) -> None:
    executor.functions(echo, big=lambda: bytes(5000), limits=CallLimits(bytes=4096))
    assert await error_of(executor, "big()") == "ValueError: the result is more than 4096 bytes"
    assert "more than the 4096 allowed" in await error_of(executor, "echo(bytes(5000))")
    assert await text_of(executor, "print(len(echo(bytes(3000))))") == "3000"


async def test_a_transfer_calls_nothing(executor: CodeExecutor) -> None:
    called: list[int] = []
    executor.functions(note=lambda: called.append(1))
    await executor.execute(
        f"{FORGE}old = values.encode\ndef encode(v):\n    forge('note'); return old(v)\nvalues.encode = encode; x = 1"
    )
    assert await executor.get("x") == 1
    assert called == []


def test_what_cannot_be_registered_is_said_and_nothing_is() -> None:
    client = ExecutionClient(1)

    def unknown(value: Any) -> None:
        """Annotated with what is not there."""

    unknown.__annotations__["value"] = "NotThere"

    async def steps() -> Any:
        yield 1

    for given in (1, lambda: 1, unknown, steps):
        with pytest.raises(InvalidArgument):
            client.functions(add, cast("Any", given))
    for name in ("_x", "class", "a b"):
        with pytest.raises(InvalidArgument):
            client.functions(add, **{name: cast("Any", add)})
    for wrong in ({"approve": True}, {"limits": {"per_cell": 1}}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            client.functions(add, **cast("Any", wrong))
    with pytest.raises(InvalidArgument, match="arguments"):
        Allow(cast("Any", ["first", 1]))
    assert client._registry is None
    for wrong in ({"per_cell": -1}, {"in_flight": 0}, {"bytes": 1 << 40}, {"per_session": True}):
        with pytest.raises(InvalidArgument):
            CallLimits(**cast("Any", wrong))


def test_without_pydantic_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(InvalidArgument, match=r"pip install 'actbox\[functions\]'"):
        ExecutionClient(1).functions(add)


@pytest.mark.usefixtures("default_engine")
@pytest.mark.timeout(60)
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=55
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "at once: together 1.00 francs",
        "an exception comes back: no price for 'plum'",
        "denied: send() was denied: messages go to the shop alone",
        "without end: calls_per_cell is 50",
        "sent: ['shop@example.org: [by an agent] an apple and a pear, please']",
    ):
        assert line in done.stdout

"""The log: what is written, that no text can forge an entry, and that no disk can hurt the agent."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actbox import logger as module
from actbox.errors import ExecutionError
from actbox.logger import Logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = pytest.mark.anyio

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "agent.log"


def records(file: Path) -> list[dict[str, Any]]:
    text = file.with_suffix(".jsonl").read_bytes().decode("ascii")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def people(file: Path) -> str:
    """The human file, its times replaced by T; whatever splits it into lines, the lines are the same."""
    text = file.read_bytes().decode()
    assert text.splitlines() == text.split("\n")[:-1]
    return re.sub(f"^{TIME}", "T", text, flags=re.MULTILINE)


def heads(file: Path) -> list[str]:
    return [line for line in people(file).split("\n") if line and not line.startswith("  ")]


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert all(record.levelno == logging.ERROR for record in caplog.records if record.name == "actbox.logger")
    return [record.getMessage() for record in caplog.records if record.name == "actbox.logger"]


async def test_an_entry_is_written_for_people_and_for_programs(file: Path) -> None:
    async with Logger(file) as logger:
        await logger.log("asked the model", {"model": "some-model", "tokens": 12, "stop": ["a", None], "tags": {}})
    assert people(file) == textwrap.dedent("""\
        T asked the model
            model: some-model
            tokens: 12
            stop: ["a", null]
            tags: {}
        """)
    (record,) = records(file)
    assert re.fullmatch(TIME, record.pop("time"))
    assert record == {
        "kind": "message",
        "context": [],
        "message": "asked the model",
        "metadata": {"model": "some-model", "tokens": 12, "stop": ["a", None], "tags": {}},
        "error": None,
        "caller": __name__,
    }


async def test_long_text_stands_behind_bars_below_its_first_line(file: Path) -> None:
    async with Logger(file) as logger, logger.context("agent"), logger.context("turn 1"):
        await logger.log("the model answers:\nimport math\n\nprint(math.pi)\n", {"tokens": 3})
        await logger.log("")
    assert people(file) == textwrap.dedent("""\
        T [agent / turn 1] the model answers:
          | import math
          |
          | print(math.pi)
          |
            tokens: 3
        T [agent / turn 1]
        """)
    assert [record["context"] for record in records(file)] == [["agent", "turn 1"]] * 2
    assert records(file)[0]["message"] == "the model answers:\nimport math\n\nprint(math.pi)\n"


async def test_an_error_is_logged_with_its_traceback(file: Path) -> None:
    async with Logger(str(file)) as logger:
        try:
            _ = 1 / 0
        except ZeroDivisionError as exc:
            await logger.log_error(exc)
    lines = people(file).splitlines()
    assert lines[0] == "T ERROR ZeroDivisionError: division by zero"
    assert lines[1] == "  | Traceback (most recent call last):"
    assert lines[-1] == "  | ZeroDivisionError: division by zero"
    (record,) = records(file)
    assert record["kind"] == "error"
    assert record["message"] == "ZeroDivisionError: division by zero"
    assert record["error"]["type"] == "ZeroDivisionError"
    assert record["error"]["message"] == "division by zero"
    assert "_ = 1 / 0" in record["error"]["traceback"]
    assert record["error"]["trace"] is None


async def test_an_error_of_a_cell_is_logged_with_the_traceback_inside_the_sandbox(file: Path) -> None:
    async with Logger(file) as logger:
        await logger.log_error(
            ExecutionError("NameError: x", "Cell 1\n\x1b[31mNameError\x1b[0m\n2026-10-01T12:00 fake")
        )
    assert people(file) == textwrap.dedent(r"""
        T ERROR actbox.errors.ExecutionError: NameError: x
          | actbox.errors.ExecutionError: NameError: x
          |
          | Inside the sandbox:
          | Cell 1
          | \x1b[31mNameError\x1b[0m
          | 2026-10-01T12:00 fake
        """).lstrip("\n")
    assert records(file)[0]["error"]["trace"] == "Cell 1\n\x1b[31mNameError\x1b[0m\n2026-10-01T12:00 fake"


class UnshowableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class Unshowable:
    def __init__(self, error: type[Exception] = RuntimeError) -> None:
        self.error = error

    def __repr__(self) -> str:
        raise self.error


class Endless:
    def __repr__(self) -> str:
        return repr(self)


class UnlistableDict(dict[str, Any]):
    def items(self) -> Any:
        raise LookupError


async def test_whatever_is_logged_nothing_is_raised(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    anything: list[Any] = [
        KeyboardInterrupt("stop"),
        asyncio.CancelledError(),
        ExceptionGroup("many", [ValueError("a"), UnshowableError()]),
        UnshowableError(),
        Unshowable(),
        ExecutionError("e", trace=7),  # pyright: ignore[reportArgumentType]
        "no exception",
        None,
    ]
    metadata: list[Any] = [[1, 2], "text", 7, 0, Unshowable(), UnlistableDict(a=1), float("nan")]
    async with Logger(file) as logger:
        for thing in anything:
            await logger.log_error(thing)
            await logger.log(thing)
            with logger.context(thing):
                await logger.log("inside")
        for thing in metadata:
            await logger.log("odd metadata", thing)
    assert len(records(file)) == len(heads(file)) == 3 * len(anything) + len(metadata)
    assert logger.dropped == 0
    assert complaints(caplog) == []


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        ([1, math.nan], "[1, nan]"),
        ({1, 2}, "{1, 2}"),
        ({1: 2}, {"1": 2}),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ((1, 2), [1, 2]),
        (b"\xff", "b'\\xff'"),
        (Path("a/b"), repr(Path("a/b"))),
        ([Path("a")], [repr(Path("a"))]),
        (Unshowable(), "<Unshowable that cannot be shown>"),
        (Unshowable(ValueError), "<Unshowable that cannot be shown>"),
        ([Unshowable(), 1], ["<Unshowable that cannot be shown>", 1]),
        (Endless(), "<Endless that cannot be shown>"),
        (10**5000, "<int that cannot be shown>"),
        (range(3), "range(0, 3)"),
        ("\ud800", "\ud800"),
        ("long" * 100_000, "long" * 100_000),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_metadata_that_json_does_not_know_is_kept_as_text(file: Path, value: object, kept: object) -> None:
    async with Logger(file) as logger:
        await logger.log("message", {"odd": value, "plain": 1})
    assert records(file)[0]["metadata"] == {"odd": kept, "plain": 1}


async def test_metadata_may_be_cyclic_deep_or_oddly_named(file: Path) -> None:
    cycle: dict[str, Any] = {"a": 1}
    cycle["self"] = cycle
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    odd: dict[Any, Any] = {(1, 2): "x", None: "y"}
    async with Logger(file) as logger:
        await logger.log("cycle", cycle)
        await logger.log("deep", {"deep": deep, "plain": 1})
        await logger.log("odd", odd)
    first, second, third = records(file)
    assert first["metadata"] == {"a": 1, "self": "{'a': 1, 'self': {...}}"}
    assert second["metadata"] == {"deep": "<list that cannot be shown>", "plain": 1}
    assert third["metadata"] == {"(1, 2)": "x", "None": "y"}
    while deep:  # so that not even the interpreter's own destructor has to recurse
        deep = deep.pop()


@pytest.mark.parametrize("depth", range(200, 1000, 20))
async def test_what_could_be_logged_can_be_shown(file: Path, depth: int) -> None:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    async with Logger(file) as logger:
        await logger.log("deep", {"deep": deep})
        await logger.log("next")
    assert len(heads(file)) == 2
    assert logger.dropped == 0


async def test_the_repr_of_an_unknown_value_is_bounded(file: Path) -> None:
    async with Logger(file) as logger:
        await logger.log("message", {"bytes": bytes(1_000_000)})
    assert len(records(file)[0]["metadata"]["bytes"]) == 1000


async def test_a_very_long_message_is_kept_whole(file: Path) -> None:
    message = "é\n" * 1_000_000
    async with Logger(file) as logger:
        await logger.log(message)
    assert records(file)[0]["message"] == message
    assert people(file).count("é") == 1_000_000


async def test_an_entry_is_what_it_was_when_it_was_logged(file: Path) -> None:
    metadata: dict[str, Any] = {"list": [1]}
    async with Logger(file) as logger:
        await logger.log("before", metadata)
        metadata["list"].append(2)
        metadata["more"] = 3
        await logger.log("after", metadata)
    assert [record["metadata"] for record in records(file)] == [{"list": [1]}, {"list": [1, 2], "more": 3}]


TRICKS = st.sampled_from(
    [
        *("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\0", "\b", "\x7f", "\ud800", "é"),
        *("\x1b[2J", "\x9b1A", "\u202e", "\u2066", "    key: value", "  | text"),
        *("2026-10-01T12:00:00.000Z ERROR forged", '{"time": "2026"}'),
    ]
)
TEXTS = st.lists(TRICKS | st.text(), max_size=6).map("".join)


@settings(deadline=None)  # it writes files, and machines differ
@given(st.lists(st.tuples(TEXTS, TEXTS, st.dictionaries(TEXTS, TEXTS | st.lists(TEXTS), max_size=2)), max_size=5))
def test_no_text_can_forge_an_entry(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str, dict[str, Any]]]
) -> None:
    """F6, G18."""
    file = tmp_path_factory.mktemp("logs") / "agent.log"
    logger = Logger(file)  # made where no loop runs

    async def write() -> None:
        async with logger:
            for frame, message, metadata in entries:
                async with logger.context(frame):
                    await logger.log(message, metadata)
                    await logger.log_error(ValueError(message))

    asyncio.run(write())
    if not entries:
        assert not file.exists()
        return
    assert len(heads(file)) == len(records(file)) == 2 * len(entries)
    assert all(re.match(r"T( |$)", head) for head in heads(file))
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", people(file))
    # Behind a bar is a message's line, behind four spaces is metadata, behind six and a bar a line of its value: none
    # can pass for another.
    facts = sum(len(metadata) for _, _, metadata in entries)
    assert len(re.findall(r"^ {4}(?! {2}\|)", people(file), flags=re.MULTILINE)) == facts
    logged = [record for record in records(file) if record["kind"] == "message"]
    assert [(*record["context"], record["message"], record["metadata"]) for record in logged] == entries


async def test_frames_nest_per_task_and_are_inherited(file: Path) -> None:
    async with Logger(file) as logger:
        together = anyio.Event()
        entered: list[str] = []

        async def work(name: str) -> None:
            async with logger.context(name):
                entered.append(name)
                if len(entered) == 3:
                    together.set()
                await together.wait()
                await logger.log(name)
                with logger.context("inner"):
                    await logger.log(name)
            await logger.log(name)

        async with logger.context("outer"), anyio.create_task_group() as tasks:
            for name in "abc":
                tasks.start_soon(work, name)
        await logger.log("last")
    found: dict[str, list[list[str]]] = {}
    for record in records(file):
        found.setdefault(record["message"], []).append(record["context"])
    assert found.pop("last") == [[]]
    assert found == {name: [["outer", name], ["outer", name, "inner"], ["outer"]] for name in "abc"}


async def test_the_frames_of_one_logger_are_not_those_of_another(file: Path, tmp_path: Path) -> None:
    async with Logger(file) as one, Logger(tmp_path / "two.log") as two, one.context("one"), two.context("two"):
        await one.log("")
        await two.log("")
    assert records(file)[0]["context"] == ["one"]
    assert records(tmp_path / "two.log")[0]["context"] == ["two"]


async def test_a_frame_ends_with_its_block_even_if_that_raises(file: Path) -> None:
    async with Logger(file) as logger:
        with pytest.raises(ZeroDivisionError):
            async with logger.context("a"):
                raise ZeroDivisionError
        await logger.log("")
    assert records(file)[0]["context"] == []


async def test_a_block_may_end_in_another_task_than_it_began_in(file: Path) -> None:
    async with Logger(file) as logger:

        async def generate() -> AsyncGenerator[None]:
            async with logger.context("generator"):
                yield

        generator = generate()
        await asyncio.create_task(anext(generator))  # pyright: ignore[reportArgumentType]
        with logger.context("here"):
            await generator.aclose()
            await logger.log("")
    assert records(file)[0]["context"] == ["here"]


async def test_blocks_that_end_out_of_order_take_away_their_own_frame(file: Path) -> None:
    async with Logger(file) as logger:
        one, two = logger.context("one"), logger.context("two")
        one.__enter__()
        two.__enter__()
        one.__exit__()
        await logger.log("")
        two.__exit__()
        await logger.log("")
    assert [record["context"] for record in records(file)] == [["two"], []]


async def test_closing_loses_nothing(file: Path) -> None:
    logger = Logger(file)
    for number in range(5000):
        await logger.log(f"message {number}")
    await logger.aclose()
    assert [record["message"] for record in records(file)] == [f"message {number}" for number in range(5000)]
    assert len(heads(file)) == 5000


async def test_closing_may_be_repeated_and_done_by_several_at_once(file: Path) -> None:
    logger = Logger(file)
    await logger.log("message")
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(logger.aclose)
    await logger.aclose()
    assert len(records(file)) == 1
    unused = Logger(file)
    await unused.aclose()
    await unused.aclose()


async def test_many_threads_and_loops_may_use_one_logger(file: Path) -> None:
    logger = Logger(file)

    async def some(name: str) -> None:
        for _ in range(100):
            await logger.log(name)

    async with anyio.create_task_group() as tasks:
        for name in "abcd":
            tasks.start_soon(anyio.to_thread.run_sync, lambda name=name: asyncio.run(some(name)))
    await logger.aclose()
    assert sorted(record["message"] for record in records(file)) == sorted("abcd" * 100)


async def test_what_is_logged_after_closing_is_dropped_and_reported_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = Logger(file)
    await logger.log("kept")
    await logger.aclose()
    for _ in range(3):
        await logger.log("dropped")
    assert logger.dropped == 3
    assert len(records(file)) == 1
    assert len(complaints(caplog)) == 1
    assert "closed" in complaints(caplog)[0]
    assert repr(logger) == f"<Logger {str(file)!r} closed dropped=3>"


async def test_a_cancelled_task_still_writes_everything(file: Path) -> None:
    with anyio.CancelScope() as scope:
        async with Logger(file) as logger:
            for _ in range(2000):
                await logger.log("message")
            scope.cancel()
    assert scope.cancelled_caught
    assert len(records(file)) == 2000


async def test_the_cancellation_of_closing_is_not_swallowed(file: Path) -> None:
    os.mkfifo(file.parent.parent / "fifo")
    logger = Logger(file.parent.parent / "fifo")
    await logger.log("message")
    closing = asyncio.create_task(logger.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.sleep(0)
    assert not closing.done()
    with (file.parent.parent / "fifo").open() as reader:
        assert "message" in await anyio.to_thread.run_sync(reader.read)
    with pytest.raises(asyncio.CancelledError):
        await closing


async def test_a_disk_that_does_not_answer_stalls_neither_the_loop_nor_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_CLOSE_TIMEOUT", 0.05)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    logger = Logger(fifo)  # to open a FIFO for writing blocks until there is a reader
    with anyio.fail_after(5):
        for _ in range(100):
            await logger.log("message")
        await logger.aclose()
    assert len(complaints(caplog)) == 1
    assert "did not finish" in complaints(caplog)[0]
    with fifo.open() as reader:
        assert len(await anyio.to_thread.run_sync(reader.readlines)) == 100
    await logger.aclose()
    assert logger.dropped == 0


async def test_an_entry_is_on_disk_soon_even_if_nobody_closes(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with Logger(fifo) as logger:
        await logger.log("first")
        with fifo.open() as reader:
            assert "first" in await anyio.to_thread.run_sync(reader.readline)
            await logger.log("second")
            assert "second" in await anyio.to_thread.run_sync(reader.readline)
            await logger.aclose()


def break_by_full_disk(file: Path) -> None:
    file.parent.mkdir()
    file.symlink_to("/dev/full")


def break_by_full_disk_for_programs(file: Path) -> None:
    file.parent.mkdir()
    file.with_suffix(".jsonl").symlink_to("/dev/full")


def break_by_file_in_place_of_the_folder(file: Path) -> None:
    file.parent.touch()


def break_by_folder_in_place_of_the_file(file: Path) -> None:
    file.mkdir(parents=True)


def break_by_folder_in_place_of_the_jsonl_file(file: Path) -> None:
    file.with_suffix(".jsonl").mkdir(parents=True)


@pytest.mark.parametrize("damage", [each for name, each in list(globals().items()) if name.startswith("break_by_")])
async def test_a_broken_disk_is_reported_once_and_never_raised(
    file: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    damage(file)
    async with Logger(file) as logger:
        for _ in range(1000):
            await logger.log("message")
        await logger.log_error(ValueError("x"))
    assert logger.dropped == 1001
    assert len(complaints(caplog)) == 1
    assert str(file) in complaints(caplog)[0]


@pytest.mark.parametrize("path", ["/", "/proc/actbox/agent.log", "a\0b", "x" * 5000, "\ud800"])
async def test_a_path_that_cannot_be_a_file_is_reported_once_and_never_raised(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Logger(path) as logger:
        await logger.log("message")
        await logger.log("message")
    assert logger.dropped == 2
    assert len(complaints(caplog)) == 1


async def test_files_that_somebody_closed_are_reported_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Logger(file) as logger:
        await logger.log("kept")
        with anyio.fail_after(5):
            jsonl = file.with_suffix(".jsonl")
            while not jsonl.exists() or not jsonl.stat().st_size:
                await anyio.lowlevel.checkpoint()
        for each in logger._writer._files:  # pyright: ignore[reportPrivateUsage]
            each.close()
        await logger.log("lost")
        await logger.log("lost")
    assert logger.dropped == 2
    assert len(complaints(caplog)) == 1
    assert len(records(file)) == 1


async def test_a_process_without_a_free_thread_is_reported_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_thread: threading.Thread) -> None:
        message = "can't start new thread"
        raise RuntimeError(message)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        async with Logger(file) as logger:
            await logger.log("lost")
            await logger.log("lost")
    assert logger.dropped == 2
    assert len(complaints(caplog)) == 1
    assert "can't start new thread" in complaints(caplog)[0]


async def test_a_report_that_fails_does_not_reach_the_agent(file: Path) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
            raise RuntimeError

    break_by_full_disk(file)
    handler = Broken()
    logging.getLogger("actbox.logger").addHandler(handler)
    try:
        async with Logger(file) as logger:
            await logger.log("lost")
        await logger.log("lost")
    finally:
        logging.getLogger("actbox.logger").removeHandler(handler)
    assert logger.dropped == 2


async def test_without_a_file_the_human_form_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    async with Logger() as logger, logger.context("a"):
        await logger.log("to the terminal \x1b[2J\ud800")
    assert logger.file is None
    assert logger.jsonl_file is None
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(TIME + r" \[a\] to the terminal \\x1b\[2J\\ud800\n", err)
    assert repr(logger) == "<Logger 'stderr' closed dropped=0>"


async def test_without_even_stderr_the_agent_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    async with Logger() as logger:
        await logger.log("lost")
    assert logger.dropped == 1
    assert len(complaints(caplog)) == 1


async def test_files_are_appended_to_and_a_line_that_a_crash_cut_off_is_ended(file: Path) -> None:
    async with Logger(file) as logger:
        await logger.log("first")
    for path in (file, file.with_suffix(".jsonl")):
        path.write_bytes(path.read_bytes() + b'{"cut')
    async with Logger(file) as logger:
        await logger.log("second")
    assert people(file) == 'T first\n{"cut\nT second\n'
    lines = file.with_suffix(".jsonl").read_text().splitlines()
    assert [json.loads(lines[0])["message"], lines[1], json.loads(lines[2])["message"]] == ["first", '{"cut', "second"]


async def test_the_path_is_that_of_the_moment_the_logger_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = Logger("agent.log")
    monkeypatch.chdir("/")
    async with logger:
        await logger.log("message")
    assert logger.file == tmp_path / "agent.log"
    assert logger.jsonl_file == tmp_path / "agent.jsonl"
    assert len(records(tmp_path / "agent.log")) == 1


async def test_a_file_that_is_named_like_a_jsonl_file_is_not_its_own(tmp_path: Path) -> None:
    async with Logger(tmp_path / "a.jsonl") as logger:
        await logger.log("message")
    assert logger.jsonl_file == tmp_path / "a.jsonl.jsonl"
    assert people(tmp_path / "a.jsonl") == "T message\n"
    assert json.loads((tmp_path / "a.jsonl.jsonl").read_text())["message"] == "message"


async def test_the_caller_of_an_entry_that_is_a_task_of_its_own_is_unknown(file: Path) -> None:
    async with Logger(file) as logger:
        await asyncio.create_task(logger.log("message"))
        await logger.log_error(ValueError("x"))
    assert [record["caller"] for record in records(file)] == [None, __name__]


async def test_a_forgotten_logger_says_so_and_still_writes_everything(file: Path) -> None:
    held = [Logger(file)]
    for _ in range(1000):
        await held[0].log("message")
    finished = held[0]._writer.finished  # pyright: ignore[reportPrivateUsage]
    with pytest.warns(ResourceWarning, match="not closed"):
        held.clear()
    await anyio.to_thread.run_sync(finished.result, 5)
    assert len(records(file)) == 1000


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise RuntimeError"])
def test_what_was_logged_is_written_when_the_interpreter_exits(file: Path, ending: str) -> None:
    program = textwrap.dedent(f"""
        import asyncio, sys
        from actbox.logger import Logger

        logger = Logger({str(file)!r})

        async def main():
            for _ in range(1000):
                await logger.log("message" * 100)

        asyncio.run(main())
        {ending}
    """)
    subprocess.run([sys.executable, "-c", program], check=False, timeout=15, capture_output=True)
    assert len(records(file)) == 1000
    assert len(heads(file)) == 1000

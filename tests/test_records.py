"""What the log has of a session: every cell with its end, and what was done to the session as a whole."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from actbox import CodeExecutor, ExecutionError, ExecutionResult, ExecutionTimeout, KernelDied, Logger
from actbox.events import Died, Error, Exceeded, Failed, Finished, Interrupted, Lost, Outcome, Overrun, TimedOut
from actbox.records import entry

if TYPE_CHECKING:
    from pathlib import Path

    from actbox import CodeExecutionContainer

pytestmark = pytest.mark.anyio
OVER = Overrun("memory", 100, 200)


def words(outcome: Outcome, transfer: object = None) -> tuple[str, dict[str, Any]]:
    execution: Any = SimpleNamespace(
        so_far=lambda: ExecutionResult(None, [], []), transfer=transfer, code="x = 1", id="unused"
    )
    return entry(execution, outcome)


@pytest.mark.parametrize(
    ("outcome", "told", "back"),
    [
        (Finished(3), "cell 3 finished", None),
        (Failed(Error("ValueError", "no", ""), 4), "cell 4 failed: ValueError", None),
        (Interrupted(state_kept=True), "cell interrupted, state kept", None),
        (Interrupted(state_kept=False), "cell interrupted, state lost", None),
        (TimedOut(1.5, state_kept=True), "cell timed out after 1.5 s, state kept", None),
        (
            TimedOut(1, state_kept=False, rolled_back_to=7),
            "cell timed out after 1 s, back to the state after cell 7",
            7,
        ),
        (Exceeded(OVER, state_kept=False), "cell went over the limit memory, state lost", None),
        (
            Exceeded(OVER, state_kept=False, rolled_back_to=0),
            "cell went over the limit memory, back to the state after cell 0",
            0,
        ),
        (Died(signal=9), "kernel died, state lost", None),
        (Died(signal=9, rolled_back_to=2), "kernel died, back to the state after cell 2", 2),
        (Lost("the container is gone"), "cell lost: the container is gone", None),
        (Lost("the client was disconnected"), "cell lost: the client was disconnected", None),
    ],
)
def test_an_entry_says_how_it_ended_and_what_state_there_is(outcome: Outcome, told: str, back: int | None) -> None:
    message, facts = words(outcome)
    assert (message, facts.get("went_back_to")) == (told, back)
    assert (facts["code"], facts["outcome"]) == ("x = 1", type(outcome).__name__)


def test_an_entry_of_a_transfer_names_it() -> None:
    transfer = SimpleNamespace(request={"type": "download", "id": 3, "path": "/tmp/x"})
    message, facts = words(Exceeded(OVER, state_kept=True), transfer)
    assert message == "transfer went over the limit memory, state kept"
    assert (facts["type"], facts["path"], "id" in facts, "code" in facts) == ("download", "/tmp/x", False, False)


async def test_the_log_tells_of_forks_checkpoints_and_ways_back(
    container: CodeExecutionContainer, key: str, tmp_path: Path
) -> None:
    async with (
        Logger(tmp_path / "log") as logger,
        CodeExecutor(
            key, container.workspace, container.port, logger=logger, recover=True, interrupt_grace=1
        ) as executor,
    ):
        await executor.execute("x = 1")
        await executor.checkpoint("good", files=True)
        async with await executor.fork(f"{key}-b", files="copy") as branch:
            await branch.execute("x += 1")
        with pytest.raises(KernelDied):
            await executor.execute("import os; os._exit(3)")
        with contextlib.suppress(ExecutionError, ExecutionTimeout):
            await executor.execute("x = 5; 1 / 0")
        await executor.rollback("good")
        assert (await executor.execute("print(x)")).text == "1"
    lines = [cast("dict[str, Any]", json.loads(line)) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [(line["message"], line["metadata"]["key"]) for line in lines]
    assert told == [
        ("cell 1 finished", key),
        ("checkpoint kept", key),
        ("session forked", key),
        ("cell 2 finished", f"{key}-b"),
        ("kernel died, back to the state after cell 1", key),
        ("cell 2 failed: ZeroDivisionError", key),
        ("session rolled back to its state after cell 1", key),
        ("cell 2 finished", key),
    ]
    assert lines[1]["metadata"] == {"key": key, "checkpoint": "good", "cell": 1, "files": True}
    assert lines[2]["metadata"] == {"key": key, "branch": f"{key}-b", "files": "copy"}
    assert lines[4]["metadata"]["went_back_to"] == 1
    assert lines[6]["metadata"]["checkpoint"] == "good"

"""Sessions that outlive their clients: nothing is lost or doubled, whoever leaves, comes back, or is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from branches import SLEEP
from connections import BY_THE_PORT, RawAttached, Relay
from sandboxes import supervisors

from actbox import (
    AttachedClient,
    AttachedExecution,
    CodeExecutionContainer,
    ConnectionError,
    DriveRefused,
    Dropped,
    ExecutionContainer,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionLost,
    ExecutionResult,
    ExecutionTimeout,
    ExecutionUnknown,
    InvalidArgument,
    KernelDied,
    SessionGone,
    StateError,
    StillRunning,
    desk,
    dialogue,
    named,
)
from actbox.events import Finished, KernelRestarted, Lost, Stream
from actbox.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from actbox.lines import Standing
    from actbox.protocol.frames import Frame

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("no_named_sessions")]

BOUND = 15.0
# What a cell of a conversation puts out: text, a display of each form, and how often it has run.
TALK = """
import sys
from IPython.display import display
runs = globals().get('runs', 0) + 1
print('said', runs, flush=True)
print('é😀', file=sys.stderr)
display({'text/plain': 'plain', 'application/json': {'a': [1, None]}, 'image/png': b'\\x89PNG\\r\\n\\x1a\\n'}, raw=True)
runs
"""

Talk = tuple[list[Any], ExecutionResult]


def resident() -> int:
    """The memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


async def events_of(execution: AttachedExecution, after: int = 0) -> list[Any]:
    """The numbered events, however it ended."""
    found: list[Any] = []
    with contextlib.suppress(ExecutionError, ExecutionTimeout):
        async for numbered in execution.events(after):
            found += [numbered]
    return found


async def outcome_of(result: Coroutine[Any, Any, ExecutionResult]) -> Any:
    """What `result` gives or raises, as a value that can be compared."""
    try:
        return await asyncio.wait_for(result, BOUND)
    except Exception as exc:  # noqa: BLE001 - it is looked at
        return type(exc), str(exc), vars(exc)


def without_traces(told: Any) -> Any:
    """An exception's type, message and fields; traces name the cell by its number, and no two take the same time."""
    kind, message, fields = told
    kept = {name: value for name, value in fields.items() if "trace" not in name}
    result = kept.pop("result", None)
    if result is not None:
        outputs = [replace(output, trace=None) for output in result.outputs]
        kept["result"] = replace(result, outputs=outputs, duration=0.0, _keep_text=None)
    return kind, message, kept


# -- leaving and coming back -----------------------------------------------------------------------------------------


async def test_a_session_keeps_its_state_and_its_output_for_who_comes_next(
    attach: Callable[..., AttachedClient],
) -> None:
    async with attach() as first:
        execution = await first.submit(
            "import time\nx = 41\nprint('begun', flush=True)\ntime.sleep(0.2)\nprint('done')"
        )
        async for number, event in execution.events():
            assert (number, event) == (1, Stream("stdout", "begun\n"))
            break
    async with attach() as second:
        found = second.execution(execution.id)
        assert [event.text for _, event in await events_of(found, after=1)] == ["done\n"]
        assert (await found.result()).text == "begun\ndone"
        assert (await second.execute("x + 1")).text == "42"
        assert [(each.state, each.outcome) for each in await second.executions()] == [("ended", "Finished")] * 2
        assert found.outcome == Finished(1)


async def test_a_replay_begins_at_any_point_and_is_the_same_for_all(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as driver, attach(drive=False) as watcher:
        execution = await driver.submit("import time\nfor n in range(5):\n    print(n, flush=True); time.sleep(0.02)")
        live = await events_of(execution)
        assert [number for number, _ in live] == list(range(1, len(live) + 1))
        for after in range(len(live) + 2):
            assert await events_of(watcher.execution(execution.id), after) == live[after:]
        assert await watcher.execution(execution.id).result() == await execution.result()


async def test_an_attached_client_tells_what_a_plain_one_does(
    attach: Callable[..., AttachedClient], executor: Any
) -> None:
    cells = [
        TALK,
        "1/0",
        "import os; print('last', flush=True); import time; time.sleep(0.1); os.kill(os.getpid(), 9)",
        "'x' in globals()",
        "raise SystemExit",
        "from IPython.display import clear_output\nprint('a'); clear_output(); print('b')",
        "display(1, display_id='d'); display(2, display_id='d', update=True)",
        "while True: pass",
    ]
    async with attach() as client:
        for code in cells:
            seconds = 0.3 if "while" in code else BOUND
            execution = await client.submit(code, seconds)
            plain = await executor.submit(code)
            told, expected = await outcome_of(execution.result()), await outcome_of(plain.result(seconds))
            if isinstance(expected, ExecutionResult):
                # The one is timed apart from the other, and saves its images elsewhere or not at all.
                assert isinstance(told, ExecutionResult)
                images = [replace(image, path=None) for image in expected.images]
                assert told == replace(expected, images=images, duration=told.duration)
            else:
                assert without_traces(told) == without_traces(expected)
            assert type(execution.outcome) is type(plain.outcome)


async def test_a_session_with_a_key_saves_its_images_and_tells_where(
    attach: Callable[..., AttachedClient], container: CodeExecutionContainer, key: str
) -> None:
    async with attach(key=key) as client:
        (image,) = (await client.execute(TALK)).images
        assert image.path is not None
        assert image.path.is_relative_to(container.workspace.images_path / key)
        assert image.path.read_bytes() == image.data
        assert (await client.execute("import os; os.getcwd()")).text == f"'/app/skills/private/{key}'"
    with pytest.raises(InvalidArgument, match="another key"):
        async with attach(key=f"{key}-other"):
            pass


async def test_a_kernel_that_dies_while_nobody_is_there_is_told_of_later(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client:
        dying = await client.submit("import os, time; time.sleep(0.1); os.kill(os.getpid(), 9)")
        after = await client.submit("1")
    async with attach() as client:
        with pytest.raises(KernelDied) as caught:
            await client.execution(dying.id).result(BOUND)
        assert (caught.value.signal, client.execution(dying.id).outcome) == (signal.SIGKILL, None)
        assert (await client.execution(after.id).result(BOUND)).restarted
        assert (await events_of(client.execution(after.id)))[0] == (1, KernelRestarted())


async def test_a_timeout_holds_though_nobody_is_there(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client:
        running = await client.submit("x = 1\nwhile True: pass", timeout=0.2)
        waiting = await client.submit("y = 1", timeout=0.1)
    async with attach(drive=False) as watcher:
        with pytest.raises(ExecutionTimeout) as caught:
            await watcher.execution(running.id).result(BOUND)
        assert (caught.value.timeout, caught.value.state_kept) == (0.2, True)
        with pytest.raises(ExecutionTimeout) as caught:
            await watcher.execution(waiting.id).result(BOUND)
        assert not caught.value.started


async def test_waiting_can_end_without_ending_the_cell(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client:
        execution = await client.submit(SLEEP)
        with pytest.raises(StillRunning):
            await execution.result(0.05)
        waiting = asyncio.create_task(execution.result())
        async for _ in execution.events():
            break
        waiting.cancel()
        await asyncio.wait([waiting])
        assert [each.state for each in await client.executions()] == ["running"]
        await execution.interrupt()
        with pytest.raises(ExecutionInterrupted):
            await execution.result()


OTHER_PROCESS = """
import asyncio, json, os, sys
from actbox import AttachedClient

async def main(port, token, name, code):
    async with AttachedClient(port, name, token=token) as client:
        execution = await client.submit(code, id="from afar")
        async for _ in execution.events():
            os.kill(os.getpid(), 9)

asyncio.run(main(**json.load(sys.stdin)))
"""


async def test_a_session_outlives_the_process_that_drove_it(
    container: CodeExecutionContainer, session_name: str
) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", OTHER_PROCESS, stdin=asyncio.subprocess.PIPE)
    code = "import time\nx = 1\nfor n in range(20):\n    print(n, flush=True); time.sleep(0.02)"
    arguments = {"port": container.port, "token": container.token, "name": session_name, "code": code}
    async with asyncio.timeout(BOUND):
        await process.communicate(json.dumps(arguments).encode())
    assert process.returncode == -signal.SIGKILL
    async with AttachedClient(container.port, session_name, take_over=True) as client:
        result = await client.execution("from afar").result(BOUND)
        assert result.text == "\n".join(map(str, range(20)))
        assert (await client.execute("x")).text == "1"


# -- who may do what -------------------------------------------------------------------------------------------------


async def test_one_drives_and_others_watch(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as driver, attach(drive=False) as watcher:
        execution = await driver.submit(SLEEP)
        with pytest.raises(DriveRefused, match="drive=True"):
            await watcher.submit("1")
        with pytest.raises(DriveRefused):
            await watcher.execution(execution.id).interrupt()
        with pytest.raises(DriveRefused):
            await watcher.end()
        with pytest.raises(DriveRefused, match="take_over=True"):
            async with attach():
                pass
        async with attach(take_over=True) as other:
            await other.execution(execution.id).interrupt()
            with pytest.raises(DriveRefused):
                await driver.submit("1")
            # Who was relieved may still watch.
            assert await outcome_of(execution.result()) == await outcome_of(watcher.execution(execution.id).result())
            assert (await other.execute("1")).text == "1"
    async with attach() as again:
        assert (await again.execute("2")).text == "2"


async def test_a_cell_runs_once_however_often_it_is_submitted(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client:
        for _ in range(3):
            execution = await client.submit(TALK, id="mine")
            assert (await execution.result()).text.splitlines()[0] == "said 1"  # type: ignore[union-attr]
        with pytest.raises(InvalidArgument, match="another cell"):
            await client.submit("other", id="mine")
        for bad in ("", "x" * 101, "\n"):
            with pytest.raises(InvalidArgument):
                await client.submit("1", id=bad)


async def test_what_was_never_submitted_is_not_waited_for(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client:
        for ask in (lambda: client.execution("x").result(), lambda: events_of(client.execution("x"))):
            with pytest.raises(ExecutionUnknown, match="nobody submitted it"):
                await ask()
    with pytest.raises(StateError, match="not attached"):
        await client.submit("1")


# -- bounds ----------------------------------------------------------------------------------------------------------


async def test_a_journal_that_overflows_says_what_is_missing_and_the_result_is_whole(
    attach: Callable[..., AttachedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "Journal", lambda: Journal(max_events=4))
    async with attach() as client:
        execution = await client.submit("for n in range(10): display(n)")
        result = await execution.result()
        assert result.text == "\n".join(map(str, range(10)))
        (number, dropped), *rest = await events_of(execution)
        assert (number, dropped) == (6, Dropped(1, 6))
        assert [number for number, _ in rest] == [7, 8, 9, 10]
        assert (await events_of(execution, after=3))[0] == (6, Dropped(4, 6))
        (standing,) = await client.executions()
        assert (standing.first, standing.last) == (7, 10)


async def test_records_are_dropped_for_newer_ones_and_their_cells_never_run_again(
    attach: Callable[..., AttachedClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "MAX_ENDED", 2)
    count = "runs = globals().get('runs', 0) + 1; print(runs)"
    async with attach() as client:
        for n in range(4):
            await (await client.submit(count, id=f"cell {n}")).result()
        assert [each.id for each in await client.executions()] == ["cell 2", "cell 3"]
        again = await client.submit(count, id="cell 0")
        with pytest.raises(ExecutionUnknown, match="dropped for newer ones"):
            await again.result()
        assert (await client.execute("runs")).text == "4"


async def test_a_reader_who_does_not_read_holds_up_nobody(container: CodeExecutionContainer) -> None:
    loud = b"display({'image/png': bytes(8 << 20)}, raw=True); print('x' * (2 << 20))"
    async with RawAttached(container) as slow:
        assert (await slow.receive() or {}).get("type") == "welcome"
        slow.send({"type": "submit", "n": 1, "execution": "loud", "timeout": BOUND}, loud)
        assert (await slow.receive() or {}).get("type") == "done"
        async with AttachedClient(container.port, "raw", drive=False) as watcher:
            await watcher.execution("loud").result(BOUND)
            before = resident()
            for number in range(2, 200):
                slow.send({"type": "read", "n": number, "execution": "loud", "after": 0})
            # The answers to these come behind them, or would.
            result = await watcher.execution("loud").result(BOUND)
            for _ in range(100):
                await watcher.executions()
                await asyncio.sleep(0)
            assert result.omitted_bytes > 0
            # Of 200 answers with 8 MiB each.
            assert resident() - before < 100 << 20
    async with asyncio.timeout(BOUND), AttachedClient(container.port, "raw", take_over=True) as client:
        assert (await client.execute("1")).text == "1"


async def test_readers_share_what_they_read(container: CodeExecutionContainer, session_name: str) -> None:
    async with AttachedClient(container.port, session_name) as driver, contextlib.AsyncExitStack() as stack:
        execution = await driver.submit(TALK)
        kept = await events_of(execution)
        for _ in range(5):
            watcher = await stack.enter_async_context(AttachedClient(container.port, session_name, drive=False))
            read = await events_of(watcher.execution(execution.id))
            assert all(one is other for (_, one), (_, other) in zip(read, kept, strict=True))


# -- the end ---------------------------------------------------------------------------------------------------------


async def test_a_session_ends_with_its_time_to_live(
    attach: Callable[..., AttachedClient], container: CodeExecutionContainer, session_name: str
) -> None:
    async with attach(ttl=0.15) as client:
        await client.submit(SLEEP)
    await until(lambda: session_name not in container.kept_sessions)
    with pytest.raises(SessionGone, match="none of this name"):
        async with attach(drive=False):
            pass
    async with attach() as client:
        assert await client.executions() == []


async def test_who_comes_back_in_time_stops_the_clock(attach: Callable[..., AttachedClient]) -> None:
    async with attach(ttl=0.2) as client:
        await client.execute("x = 1")
    async with attach(ttl=0.2, drive=False) as watcher, attach(ttl=30) as client:
        await client.execute("import time; time.sleep(0.4)")
        assert await watcher.executions()
    async with attach() as client:
        assert (await client.execute("x")).text == "1"


async def test_the_driver_ends_a_session_for_everybody(
    attach: Callable[..., AttachedClient], container: CodeExecutionContainer
) -> None:
    async with attach() as driver, attach(drive=False) as watcher:
        execution = await driver.submit(SLEEP)
        waiting = [asyncio.create_task(watcher.execution(execution.id).result()) for _ in range(3)]
        async for _ in watcher.execution(execution.id).events():
            break
        await driver.end()
        assert container.kept_sessions == ()
        for task in waiting:
            with pytest.raises(ExecutionLost, match="ended by its driver"):
                await task
        with pytest.raises(SessionGone, match="ended by its driver"):
            await watcher.executions()


@pytest.mark.parametrize("host", ["localhost", BY_THE_PORT])
async def test_a_container_that_closes_ends_its_sessions_and_says_so(engine: str, host: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        container = ExecutionContainer(engine=engine, preload=(), show_pull_progress=False)
        await stack.enter_async_context(container)
        client = AttachedClient(container.port, "it", host=host, token=container.token, patience=0.3)
        await stack.enter_async_context(client)
        execution = await client.submit(SLEEP)
        waiting = asyncio.create_task(execution.result())
        async for _ in execution.events():
            break
        await container.kill()
        with pytest.raises(ExecutionLost, match="the container was closed"):
            await asyncio.wait_for(waiting, BOUND)
        with pytest.raises(ConnectionError):
            await client.submit("1")
        assert container.kept_sessions == ()
        assert "0 sessions" in repr(container)


@pytest.mark.engines("bubblewrap")
@pytest.mark.parametrize("host", ["localhost", BY_THE_PORT])
async def test_a_sandbox_that_goes_is_told_of_as_to_a_plain_client(engine: str, host: str) -> None:
    before = supervisors(os.getpid())
    async with (
        ExecutionContainer(engine=engine, preload=(), show_pull_progress=False) as container,
        AttachedClient(container.port, "it", host=host, token=container.token) as client,
    ):
        execution = await client.submit(SLEEP)
        async for _ in execution.events():
            break
        for pid in supervisors(os.getpid()) - before:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ExecutionLost):
            await asyncio.wait_for(execution.result(), BOUND)
        assert execution.outcome == Lost("the container is gone")
        with pytest.raises(ExecutionLost):
            await client.execute("1")


async def test_a_line_that_cannot_be_mended_is_given_up(container: CodeExecutionContainer, session_name: str) -> None:
    async with Relay(container.port) as relay:
        client = AttachedClient(relay.port, session_name, token=container.token, patience=0.2)
        async with client:
            execution = await client.submit(SLEEP)
            relay.every = 1
            relay.cut("gateway", 1)
            with pytest.raises(ExecutionLost, match=r"not mended within 0\.2 s"):
                await execution.result()
            relay.toward, relay.every = "", None
            await execution.interrupt()
    with pytest.raises(ConnectionError, match="no container answers"):
        async with asyncio.timeout(BOUND), AttachedClient(relay.port, session_name, token=container.token):
            pass


# -- cuts ------------------------------------------------------------------------------------------------------------


async def converse(port: int, container: ExecutionContainer, name: str, id: str) -> Talk:  # noqa: A002
    """Submit a cell, read its events, get its result."""
    async with AttachedClient(port, name, token=container.token, take_over=True) as client:
        execution = await client.submit(TALK, id=id)
        return await events_of(execution), await execution.result()


@pytest.mark.parametrize("toward", ["gateway", "client"])
async def test_cut_at_any_byte_nothing_is_lost_or_doubled(
    container: CodeExecutionContainer, session_name: str, toward: str
) -> None:
    async with Relay(container.port) as relay, AttachedClient(container.port, session_name) as watcher:
        await converse(relay.port, container, session_name, "talk 000")
        whole = dict(relay.passed)
        points = range(1, whole[toward] + 1, max(1, whole[toward] // 220))
        assert len(points) >= 220
        for run, point in enumerate(points, 1):
            connections = relay.connections
            relay.cut(toward, point)
            told = await converse(relay.port, container, session_name, f"talk {run:03}")
            kept = watcher.execution(f"talk {run:03}")
            assert told == (await events_of(kept), await kept.result())
            assert [number for number, _ in told[0]] == list(range(1, len(told[0]) + 1))
            assert told[1].text == f"said {run + 1}\né😀\nplain\n{run + 1}"
            # Only what comes behind the last answer can be cut unnoticed.
            assert relay.connections - connections == 2 or point > whole[toward] * 0.8
        # As many as were submitted, whatever was sent twice.
        assert await value(container, session_name, "runs") == str(len(points) + 1)


async def value(container: ExecutionContainer, name: str, expression: str) -> str | None:
    async with AttachedClient(container.port, name, take_over=True) as client:
        return (await client.execute(expression)).text


@pytest.mark.parametrize("toward", ["gateway", "client"])
async def test_cut_while_a_session_is_made_or_ended_there_is_one_and_then_none(
    container: CodeExecutionContainer, session_name: str, toward: str
) -> None:
    async def live(port: int, session_name: str) -> None:
        async with AttachedClient(port, session_name, token=container.token) as client:
            assert (await client.execute(TALK)).text == "said 1\né😀\nplain\n1"
            await client.end()

    async with Relay(container.port) as relay:
        await live(relay.port, session_name)
        whole = relay.passed[toward]
        for point in range(1, whole + 1, max(1, whole // 12)):
            relay.cut(toward, point)
            await live(relay.port, f"{session_name} {point}")
            relay.toward = ""
            assert container.kept_sessions == ()
    await until(lambda: "0 sessions" in repr(container))


async def test_a_long_replay_comes_through_though_every_connection_breaks(
    container: CodeExecutionContainer, session_name: str
) -> None:
    async with Relay(container.port) as relay, AttachedClient(container.port, session_name) as driver:
        execution = await driver.submit("for n in range(300): display(n)")
        await execution.result()
        relay.every = 3000
        relay.cut("client", 3000)
        watcher = AttachedClient(relay.port, session_name, token=container.token, drive=False)
        async with watcher:
            found: list[Any] = []
            async for numbered in watcher.execution(execution.id).events():
                found.append(numbered)
                if len(found) == 300:
                    relay.toward, relay.every = "", None
        assert found == await events_of(execution)
        assert relay.connections > 10


async def test_a_connection_that_has_gone_silent_is_made_anew(
    container: CodeExecutionContainer, session_name: str
) -> None:
    async with Relay(container.port) as relay:
        client = AttachedClient(relay.port, session_name, token=container.token, heartbeat_interval=0.05)
        async with client:
            execution = await client.submit("import time; time.sleep(0.1); print('heard')")
            relay.mute_until = 2
            assert (await asyncio.wait_for(execution.result(), BOUND)).text == "heard"
            assert relay.connections == 2


async def test_a_client_that_has_gone_silent_drives_no_longer(
    container: CodeExecutionContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "IDLE_SECONDS", 0.2)
    async with RawAttached(container) as raw:
        assert (await raw.receive() or {}).get("type") == "welcome"
        with pytest.raises(DriveRefused):
            async with AttachedClient(container.port, "raw"):
                pass
        assert await raw.receive() is None
        async with AttachedClient(container.port, "raw") as client:
            assert (await client.execute("1")).text == "1"


@pytest.mark.parametrize("failures", [1, 1_000_000])
async def test_an_answer_that_fails_on_the_containers_side_keeps_nobody_waiting(
    container: CodeExecutionContainer, session_name: str, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    left = failures
    frame_of = dialogue.standings_frame

    def failing(standings: list[Standing]) -> Frame:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RuntimeError("a mistake of ours")
        return frame_of(standings)

    monkeypatch.setattr(dialogue, "standings_frame", failing)
    async with AttachedClient(
        container.port, session_name, host=BY_THE_PORT, token=container.token, patience=0.5
    ) as client:
        assert (await client.execute("print(1)")).text == "1"
        async with asyncio.timeout(BOUND):
            if failures > 1:
                with pytest.raises(ConnectionError):
                    await client.executions()
            else:
                assert len(await client.executions()) == 1
        assert (await client.execute("print(2)")).text == "2"


async def test_who_was_cut_off_and_relieved_meanwhile_may_go_on_watching(
    container: CodeExecutionContainer, session_name: str
) -> None:
    async with Relay(container.port) as relay:
        first = AttachedClient(relay.port, session_name, token=container.token)
        async with first:
            execution = await first.submit(SLEEP)
            waiting = asyncio.create_task(execution.result())
            async with AttachedClient(container.port, session_name, take_over=True) as second:
                relay.cut("gateway", 1)
                with pytest.raises(DriveRefused):
                    await first.submit("1")
                assert relay.connections == 2
                await second.execution(execution.id).interrupt()
                with pytest.raises(ExecutionInterrupted):
                    await waiting


# -- those who do not keep to the rules ------------------------------------------------------------------------------

BAD_WISHES: list[dict[str, Any]] = [
    {"attach": None},
    {"attach": ""},
    {"attach": "x" * 101},
    {"attach": "a\x1bb"},
    {"client": 1},
    {"client": "x" * 2000},
    {"ttl": "1"},
    {"ttl": -1},
    {"ttl": 0},
    {"ttl": None},
    {"key": "../x"},
    {"key": ["x"]},
    {"drive": 1},
    {"drive": False},
    {"take_over": None},
    {"incarnation": 5},
    {"incarnation": "unheard of"},
]

BAD_REQUESTS: list[dict[str, Any]] = [
    {},
    {"type": "execute", "id": 1},
    {"type": "kill"},
    {"type": "read", "n": 1, "execution": "x"},
    {"type": "read", "n": 1, "execution": "x", "after": -1},
    {"type": "read", "n": 1, "execution": "x", "after": 1 << 60},
    {"type": "read", "n": 0, "execution": "x", "after": 0},
    {"type": "read", "n": "1", "execution": "x", "after": 0},
    {"type": "result", "n": 1, "execution": 5},
    {"type": "submit", "n": 1, "execution": "x"},
    {"type": "submit", "n": 1, "execution": "x", "timeout": "1"},
    {"type": "end"},
]


@pytest.mark.parametrize("wish", BAD_WISHES)
async def test_a_wish_that_cannot_be_granted_is_refused_and_nothing_is_made(
    container: CodeExecutionContainer, wish: dict[str, Any]
) -> None:
    async with RawAttached(container, **wish) as raw:
        answer = await raw.receive()
        assert answer is not None
        assert answer["type"] == "refused"
        assert await raw.receive() is None
    assert container.kept_sessions == ()


async def test_without_the_token_nobody_is_attached(container: CodeExecutionContainer, session_name: str) -> None:
    async with RawAttached(container, token="wrong") as raw:
        assert await raw.receive() == {"type": "refused", "reason": "the token is missing or wrong"}
    with pytest.raises(ConnectionError, match="token is missing or wrong"):
        async with AttachedClient(container.port, session_name, host=BY_THE_PORT, token="wrong"):
            pass
    assert container.kept_sessions == ()


async def test_who_breaks_the_rules_is_cut_off_and_the_session_goes_on(container: CodeExecutionContainer) -> None:
    async with AttachedClient(container.port, "raw", drive=True) as driver:
        await driver.execute("x = 1")
        for bad in BAD_REQUESTS:
            async with RawAttached(container, drive=False, take_over=False) as raw:
                assert (await raw.receive() or {}).get("type") == "welcome"
                raw.send(bad)
                assert await raw.receive() is None, bad
        async with RawAttached(container, drive=False, take_over=False) as raw:
            await raw.receive()
            await driver.submit(SLEEP, id="sleep")
            for number in range(1, 300):
                raw.send({"type": "result", "n": number, "execution": "sleep"})
            assert await raw.receive() is None
        await driver.execution("sleep").interrupt()
        assert (await driver.execute("x")).text == "1"


async def test_bad_values_are_refused_one_by_one(container: CodeExecutionContainer) -> None:
    async with RawAttached(container) as raw:
        assert (await raw.receive() or {}).get("type") == "welcome"
        for number, (header, kind) in enumerate(
            [
                ({"type": "submit", "execution": "", "timeout": 1}, "InvalidArgument"),
                ({"type": "submit", "execution": "x", "timeout": 0}, "InvalidArgument"),
                ({"type": "submit", "execution": "x" * 999, "timeout": 1}, "InvalidArgument"),
                ({"type": "read", "execution": "x", "after": 0}, "ExecutionUnknown"),
                ({"type": "interrupt", "execution": "x"}, "ExecutionUnknown"),
            ],
            1,
        ):
            raw.send({**header, "n": number})
            answer = await raw.receive()
            assert answer is not None
            assert (answer["type"], answer["kind"], answer["re"]) == ("refused", kind, number)

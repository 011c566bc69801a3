"""One cell, many events, exactly one outcome: order, time limits, interrupts, deaths, and callers' mistakes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import time
from typing import TYPE_CHECKING, Any, Self

import pytest

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ConnectionError,
    Execution,
    ExecutionClient,
    ExecutionContainer,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionLost,
    ExecutionResult,
    ExecutionTimeout,
    InvalidArgument,
    KernelDied,
    PortInUse,
    ProtocolError,
    StateError,
    execution_environment,
)
from actbox.events import (
    Died,
    DisplayData,
    Event,
    ExecuteResult,
    Failed,
    Finished,
    Interrupted,
    KernelRestarted,
    Lost,
    Stream,
    TimedOut,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator
    from pathlib import Path

    MakeExecutor = Callable[[], contextlib.AbstractAsyncContextManager[CodeExecutor]]

pytestmark = pytest.mark.anyio

SECONDS = 10.0
GRACE = 1.0
MIB = 1 << 20
SLEEP = "import time; print('asleep', flush=True); time.sleep(60)"
UNTIL_GO = "import pathlib, time\nprint('begun')\nwhile not pathlib.Path('go').exists(): time.sleep(0.005)"


@pytest.fixture
async def impatient(container: CodeExecutionContainer, key: str) -> AsyncIterator[CodeExecutor]:
    """An executor that kills soon what does not heed an interrupt."""
    async with CodeExecutor(key, container.workspace, container.port, interrupt_grace=GRACE) as made:
        yield made


@pytest.fixture
def small(workspace_path: Path, engine: str) -> CodeExecutionContainer:
    """A container of the test's own that starts quickly; not started."""
    return CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())


async def text_of(executor: ExecutionClient, code: str) -> str | None:
    return (await executor.execute(code, timeout=SECONDS)).text


async def read_into(chunks: list[str], execution: Execution, timeout: float = SECONDS) -> None:
    async for chunk in execution.stream(timeout):
        chunks.append(chunk)  # noqa: PERF401 - what came before it raises counts


def is_there(path: Path) -> bool:
    return path.exists()


async def until_output(execution: Execution) -> None:
    """Wait until the cell has put out something: then it runs."""
    async with asyncio.timeout(SECONDS):
        while execution.so_far().text is None:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def within(seconds: float) -> Generator[None]:
    """What is inside takes no longer than this."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


class Growth:
    """The largest size that this process had while the block ran, above its size before, in bytes."""

    async def __aenter__(self) -> Self:
        self._before = self._largest = _resident()
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._task.cancel()
        self._largest = max(self._largest, _resident())

    async def _sample(self) -> None:
        while True:
            self._largest = max(self._largest, _resident())
            await asyncio.sleep(0.005)

    @property
    def bytes(self) -> int:
        return self._largest - self._before


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a file of the kernel's
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- execute, submit, result, events -------------------------------------------------------------------------------


async def test_a_result_says_what_came_out_and_how_long_it_took(executor: CodeExecutor) -> None:
    result = await executor.execute("print('out')\n1 + 1")
    assert isinstance(result, ExecutionResult)
    assert (result.text, result.images) == ("out\n2", [])
    assert (result.execution_count, result.restarted, result.truncated) == (1, False, False)
    assert 0 < result.duration < SECONDS
    assert (await executor.execute("x = 1")).text is None


async def test_an_execution_tells_of_itself_while_it_runs_and_after(executor: CodeExecutor) -> None:
    execution = await executor.submit(UNTIL_GO)
    assert execution.outcome is None
    assert repr(execution) == "<Execution waiting>"
    await until_output(execution)
    assert execution.so_far().text == "begun"
    assert repr(execution) == "<Execution running>"
    (executor.working_dir / "go").touch()
    assert (await execution.result(SECONDS)).text == "begun"
    assert execution.outcome == Finished(1)
    assert execution.so_far().text == "begun"


async def test_events_come_in_order_and_end_with_the_cell(executor: CodeExecutor) -> None:
    execution = await executor.submit("print('a')\ndisplay('b')\nimport sys; print('c', file=sys.stderr)\n4")
    events: list[Event] = []
    async for event in execution.events(SECONDS):
        last = events[-1] if events else None
        if isinstance(event, Stream) and isinstance(last, Stream) and last.name == event.name:
            events[-1] = Stream(event.name, last.text + event.text)  # a text may come in pieces
        else:
            events.append(event)
    assert events == [
        Stream("stdout", "a\n"),
        DisplayData({"text/plain": "'b'"}),
        Stream("stderr", "c\n"),
        ExecuteResult({"text/plain": "4"}, {}, 1),
    ]


async def test_a_stream_is_what_a_result_would_say(executor: CodeExecutor) -> None:
    execution = await executor.submit("print('a', end='')\ndisplay('b')\nprint('c')\n4")
    assert "".join([chunk async for chunk in execution.stream(SECONDS)]) == "a\n'b'\nc\n4\n"


async def test_a_stream_comes_while_the_cell_runs(executor: CodeExecutor) -> None:
    execution = await executor.submit(
        "import pathlib, time\nfor n in range(3):\n"
        "    print(n)\n    while not pathlib.Path(str(n)).exists(): time.sleep(0.002)"
    )
    got = ""
    async for chunk in execution.stream(SECONDS):
        got += chunk
        if got.count("\n") <= 3:
            (executor.working_dir / str(got.count("\n") - 1)).touch()
    assert got == "0\n1\n2\n"


async def test_a_result_after_a_stream_is_there_at_once(executor: CodeExecutor) -> None:
    execution = await executor.submit("print('x')")
    assert "".join([chunk async for chunk in execution.stream(SECONDS)]) == "x\n"
    with pytest.raises(StopIteration) as done:  # it ends without having waited
        execution.result(SECONDS).__await__().send(None)
    assert done.value.value.text == "x"


async def test_a_stream_after_the_end_gives_what_had_come(executor: CodeExecutor) -> None:
    execution = await executor.submit("print('x')")
    await execution.result(SECONDS)
    assert "".join([chunk async for chunk in execution.stream(SECONDS)]) == "x\n"
    assert [chunk async for chunk in execution.stream(SECONDS)] == []


async def test_a_stream_of_a_failing_cell_raises_at_its_end(executor: CodeExecutor) -> None:
    execution = await executor.submit("print('x')\n1 / 0")
    chunks: list[str] = []
    with pytest.raises(ExecutionError, match="ZeroDivisionError"):
        await read_into(chunks, execution)
    assert "".join(chunks) == "x\n"
    assert isinstance(execution.outcome, Failed)
    for _ in range(2):
        with pytest.raises(ExecutionError, match="ZeroDivisionError"):
            await execution.result(SECONDS)


async def test_any_number_of_tasks_may_await_a_result(executor: CodeExecutor) -> None:
    execution = await executor.submit("import time; time.sleep(0.05); print('x')")
    results = await asyncio.gather(*(execution.result(SECONDS) for _ in range(3)))
    assert [result.text for result in results] == ["x", "x", "x"]


async def test_a_stream_may_be_left_early_and_the_cell_goes_on(executor: CodeExecutor) -> None:
    execution = await executor.submit("for n in range(50_000): print(n)\nprint('end')")
    async for _ in execution.stream(SECONDS):
        break
    result = await execution.result(SECONDS)
    assert (result.text or "").endswith("49999\nend")
    assert await text_of(executor, "n") == "49999"


async def test_tasks_that_use_one_executor_take_turns(executor: CodeExecutor) -> None:
    await executor.execute("running = 0", timeout=SECONDS)
    code = "running += 1; import time; time.sleep(0.002); alone = running == 1; running -= 1\nalone, {}"
    texts = await asyncio.gather(*(text_of(executor, code.format(n)) for n in range(20)))
    assert texts == [f"(True, {n})" for n in range(20)]


async def test_an_executor_may_live_in_another_thread_and_loop(container: CodeExecutionContainer, key: str) -> None:
    async def use() -> list[str | None]:
        async with CodeExecutor(key, container.workspace, container.port, interrupt_grace=GRACE) as executor:
            texts = [await text_of(executor, "x = 1\nx")]
            with pytest.raises(ExecutionTimeout):
                await executor.execute("while True: pass", timeout=0.2)
            texts.append(await text_of(executor, "x"))
            with pytest.raises(KernelDied):
                await executor.execute("import os; os._exit(1)", timeout=SECONDS)
            return [*texts, await text_of(executor, "2")]

    assert await asyncio.to_thread(lambda: asyncio.run(use())) == ["1", "1", "2"]


async def test_cells_run_in_the_order_of_submission(executor: CodeExecutor) -> None:
    executions = [await executor.submit(f"seen = [*globals().get('seen', []), {n}]\nseen") for n in range(20)]
    for n, execution in reversed(list(enumerate(executions))):
        assert (await execution.result(SECONDS)).text == str(list(range(n + 1)))


async def test_a_cell_that_fails_does_not_hold_up_those_behind(executor: CodeExecutor) -> None:
    first = await executor.submit("1 / 0")
    second = await executor.submit("'second'")
    assert (await second.result(SECONDS)).text == "'second'"
    with pytest.raises(ExecutionError):
        await first.result(SECONDS)


async def test_executors_at_the_same_time_never_see_each_other(make_executor: MakeExecutor) -> None:
    async with contextlib.AsyncExitStack() as stack:
        executors = [await stack.enter_async_context(make_executor()) for _ in range(6)]

        async def use(number: int, executor: CodeExecutor) -> None:
            await text_of(
                executor,
                f"import os\nx = {number}\nopen('mine', 'w').write('{number}'); open('/tmp/f', 'w').write('{number}')",
            )
            for cell in range(10):
                code = f"print(x, {cell}); os.system('echo s{number}'); x, open('mine').read(), open('/tmp/f').read()"
                expected = f"{number} {cell}\ns{number}\n({number}, '{number}', '{number}')"
                assert await text_of(executor, code) == expected
            listing = "import os\nos.listdir('/app/skills/private'), [p for p in os.listdir('/proc') if p.isdigit()]"
            assert await text_of(executor, listing) == f"(['{executor.key}'], ['1', '2'])"

        await asyncio.gather(*(use(number, executor) for number, executor in enumerate(executors)))


# -- time limits -----------------------------------------------------------------------------------------------------

OBEDIENT = {
    "sleep": "import time\ntime.sleep(60)",
    "loop": "while True: pass",
    "printing": "while True: print('x' * 1000)",
    "displaying": "while True: display('x')",
    "await": "import asyncio\nawait asyncio.sleep(60)",
    "lock": "import threading\nlock = threading.Lock(); lock.acquire(); lock.acquire()",
    "join": "import threading, time\nt = threading.Thread(target=time.sleep, args=(9,))\nt.start(); t.join()",
    "C sleep": "import ctypes\nctypes.CDLL(None).sleep(60)",
    "subprocess": "import subprocess\nsubprocess.run(['sleep', '60'])",
    "system": "import os\nos.system('sleep 60')",
    "shell": "!sleep 60",
    "bash": "%%bash\nsleep 60",
    "finally": "try:\n    while True: pass\nfinally:\n    print('tidied up')",
}

STUBBORN = {
    "ignored": "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)",
    "caught": "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: continue",
    "masked": "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\ntime.sleep(60)",
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "printing": ("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: print('x' * 1000)"),
}


@pytest.mark.parametrize("code", OBEDIENT.values(), ids=OBEDIENT.keys())
async def test_a_cell_that_outlives_its_time_is_interrupted_and_the_state_is_kept(
    executor: CodeExecutor, code: str
) -> None:
    """E10."""
    await executor.execute("kept = 5", timeout=SECONDS)
    with within(0.4 + 2), pytest.raises(ExecutionTimeout) as caught:
        await executor.execute(code, timeout=0.4)
    assert (caught.value.timeout, caught.value.state_kept, caught.value.started) == (0.4, True, True)
    assert isinstance(caught.value, TimeoutError)
    result = await executor.execute("kept", timeout=SECONDS)
    assert (result.text, result.restarted) == ("5", False)


@pytest.mark.parametrize("code", STUBBORN.values(), ids=STUBBORN.keys())
async def test_a_cell_that_does_not_heed_the_interrupt_is_killed_and_the_state_is_lost(
    impatient: CodeExecutor, code: str
) -> None:
    """E11, E18."""
    await impatient.execute("kept = 5", timeout=SECONDS)
    with within(0.3 + GRACE + 2), pytest.raises(ExecutionTimeout) as caught:
        await impatient.execute(code, timeout=0.3)
    assert (caught.value.state_kept, caught.value.started) == (False, True)
    result = await impatient.execute("'kept' in globals()", timeout=SECONDS)
    assert (result.text, result.restarted, result.execution_count) == ("False", True, 1)


@pytest.mark.parametrize("code", ["import re\nre.match('(a+)+$', 'a' * 60 + 'b')", "7 ** (10 ** 9); None"])
async def test_whether_the_state_was_kept_is_said_truly(impatient: CodeExecutor, code: str) -> None:
    """E12."""
    await impatient.execute("kept = 5", timeout=SECONDS)
    with within(0.3 + GRACE + 2), pytest.raises(ExecutionTimeout) as caught:
        await impatient.execute(code, timeout=0.3)
    result = await impatient.execute("'kept' in globals()", timeout=SECONDS)
    assert result.text == str(caught.value.state_kept)
    assert result.restarted is not caught.value.state_kept


async def test_output_until_the_end_of_the_time_is_not_lost(executor: CodeExecutor) -> None:
    with pytest.raises(ExecutionTimeout) as caught:
        await executor.execute(SLEEP, timeout=0.3)
    assert (caught.value.text or "").startswith("asleep")


async def test_the_time_limit_of_a_stream_counts_too(executor: CodeExecutor) -> None:
    execution = await executor.submit(SLEEP)
    chunks: list[str] = []
    with pytest.raises(ExecutionTimeout):
        await read_into(chunks, execution, 0.3)
    assert "".join(chunks).startswith("asleep\n")
    assert execution.outcome == TimedOut(0.3, state_kept=True)


async def test_a_cell_that_waits_behind_others_all_its_time_never_runs(executor: CodeExecutor) -> None:
    first = await executor.submit(UNTIL_GO)
    second = await executor.submit("ran = True")
    third = await executor.submit("'third'")
    await until_output(first)
    with pytest.raises(ExecutionTimeout) as caught:
        await second.result(timeout=0.05)
    assert (caught.value.started, caught.value.state_kept) == (False, True)
    (executor.working_dir / "go").touch()
    assert (await first.result(SECONDS)).text == "begun"
    assert (await third.result(SECONDS)).text == "'third'"
    assert await text_of(executor, "'ran' in globals()") == "False"


async def test_a_cell_behind_one_that_is_killed_runs_in_a_fresh_kernel(impatient: CodeExecutor) -> None:
    first = await impatient.submit(STUBBORN["ignored"])
    second = await impatient.submit("2")
    with pytest.raises(ExecutionTimeout):
        await first.result(timeout=0.3)
    result = await second.result(SECONDS)
    assert (result.text, result.restarted) == ("2", True)


async def test_the_strictest_of_several_time_limits_counts(executor: CodeExecutor) -> None:
    execution = await executor.submit(SLEEP)
    with within(5):
        results = await asyncio.gather(execution.result(0.3), execution.result(60), return_exceptions=True)
    assert [type(result) for result in results] == [ExecutionTimeout, ExecutionTimeout]


@pytest.mark.parametrize("timeout", [1e-9, 5, 10**9, 1e300, 10**300], ids=lambda timeout: repr(timeout)[:12])
async def test_any_positive_number_is_a_time(executor: CodeExecutor, timeout: float) -> None:
    await executor.execute("kept = 1", timeout=SECONDS)
    if timeout < 1:
        with pytest.raises(ExecutionTimeout) as caught:
            await executor.execute("import time; time.sleep(60)", timeout=timeout)
        assert caught.value.state_kept
    else:
        assert (await executor.execute("2", timeout=timeout)).text == "2"
    assert await text_of(executor, "kept") == "1"


@pytest.mark.parametrize(
    "timeout",
    [0, -1, float("nan"), float("inf"), float("-inf"), "1", True, None, b"1", [1], 10**400, 1j],
    ids=lambda timeout: repr(timeout)[:12],
)
async def test_a_time_that_is_no_positive_number_is_refused(executor: CodeExecutor, timeout: Any) -> None:
    with pytest.raises(InvalidArgument, match="timeout"):
        await executor.execute("ran = True", timeout=timeout)
    execution = await executor.submit("2")
    with pytest.raises(InvalidArgument, match="timeout"):
        await execution.result(timeout)
    with pytest.raises(InvalidArgument, match="timeout"):
        await anext(execution.stream(timeout))
    assert (await execution.result(SECONDS)).text == "2"
    assert await text_of(executor, "'ran' in globals()") == "False"


# -- interrupts and cancellation -------------------------------------------------------------------------------------


async def test_an_interrupt_ends_the_cell_and_keeps_the_state(executor: CodeExecutor) -> None:
    execution = await executor.submit(f"x = 1\n{SLEEP}")
    await until_output(execution)
    await execution.interrupt()
    assert isinstance(execution.outcome, Interrupted)
    with pytest.raises(ExecutionInterrupted) as caught:
        await execution.result(SECONDS)
    assert caught.value.state_kept
    assert caught.value.text == "asleep"
    assert "KeyboardInterrupt" in (caught.value.trace or "")
    await execution.interrupt()  # does nothing any more
    assert await text_of(executor, "x") == "1"


async def test_an_interrupt_that_is_not_heeded_kills_the_kernel(impatient: CodeExecutor) -> None:
    execution = await impatient.submit(f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEP}")
    await until_output(execution)
    with within(GRACE + 2):
        await execution.interrupt()
    assert execution.outcome == Interrupted(state_kept=False)
    with pytest.raises(ExecutionInterrupted) as caught:
        await execution.result(SECONDS)
    assert not caught.value.state_kept
    assert (await impatient.execute("1", timeout=SECONDS)).restarted


async def test_a_cell_interrupted_before_it_runs_never_runs(executor: CodeExecutor) -> None:
    first = await executor.submit(SLEEP)
    second = await executor.submit("ran = True")
    await until_output(first)
    await second.interrupt()
    assert second.outcome == Interrupted(state_kept=True, started=False)
    await first.interrupt()
    assert await text_of(executor, "'ran' in globals()") == "False"


async def test_an_interrupt_at_any_moment_of_the_beginning_keeps_the_state(executor: CodeExecutor) -> None:
    await executor.execute("kept = 1", timeout=SECONDS)
    for turns in range(40):
        execution = await executor.submit(SLEEP)
        for _ in range(turns // 4):
            await asyncio.sleep(0)
        with within(1.5):
            await execution.interrupt()
        assert isinstance(execution.outcome, Interrupted)
        assert execution.outcome.state_kept
    assert await text_of(executor, "kept") == "1"


async def test_an_interrupt_while_ipython_prepares_the_cell_is_not_lost(executor: CodeExecutor) -> None:
    await executor.execute(
        "import time\ndef prepare():\n    print('preparing')\n    time.sleep(0.3)\n"
        "get_ipython().events.register('pre_execute', prepare)\nkept = 1",
        timeout=SECONDS,
    )
    execution = await executor.submit(SLEEP)
    await until_output(execution)
    with within(1.5):
        await execution.interrupt()
    assert isinstance(execution.outcome, Interrupted)
    assert execution.outcome.state_kept
    assert await text_of(executor, "get_ipython().events.unregister('pre_execute', prepare)\nkept") == "preparing\n1"


async def test_an_interrupt_at_any_moment_of_the_end_keeps_the_state(executor: CodeExecutor) -> None:
    await executor.execute("import time\nkept = 1", timeout=SECONDS)
    for turn in range(60):
        execution = await executor.submit(f"print('on')\ntime.sleep({turn} / 30_000)\nprint('off')")
        await until_output(execution)
        with within(1.5):
            await execution.interrupt()
        assert isinstance(execution.outcome, Interrupted | Finished)
        result = await executor.execute("kept", timeout=SECONDS)
        assert (result.text, result.restarted) == ("1", False)


async def test_an_interrupt_that_the_interpreter_did_not_see_is_repeated(executor: CodeExecutor) -> None:
    # As when the signal comes between the interpreter's last look and a call that blocks.
    await executor.execute("x = 5", timeout=SECONDS)
    code = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print("begun", flush=True)
signal.sigwait({signal.SIGINT})
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
time.sleep(60)
"""
    execution = await executor.submit(code)
    await until_output(execution)
    await execution.interrupt()
    assert isinstance(execution.outcome, Interrupted)
    assert execution.outcome.state_kept
    assert await text_of(executor, "x") == "5"


async def test_an_interrupt_is_seen_once_by_code_that_handles_it(executor: CodeExecutor) -> None:
    code = """
import time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1.2)
    print("cleaned")
"""
    execution = await executor.submit(code)
    await until_output(execution)
    await execution.interrupt()
    assert (await execution.result(SECONDS)).text == "begun\ncleaned"


async def test_code_that_handles_the_interrupt_ends_as_it_likes(executor: CodeExecutor) -> None:
    code = "import time\ntry:\n    print('on')\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('caught')\n"
    execution = await executor.submit(code)
    await until_output(execution)
    await execution.interrupt()
    assert isinstance(execution.outcome, Finished)
    assert (await execution.result(SECONDS)).text == "on\ncaught"
    execution = await executor.submit(f"{code}    raise ValueError('instead')")
    await until_output(execution)
    await execution.interrupt()
    with pytest.raises(ExecutionError, match="ValueError: instead"):
        await execution.result(SECONDS)


async def test_cancelling_the_task_that_waits_interrupts_the_cell(executor: CodeExecutor) -> None:
    await executor.execute("kept = 1", timeout=SECONDS)
    execution = await executor.submit(SLEEP)
    waiting = asyncio.create_task(execution.result(60))
    await until_output(execution)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with within(2):
        assert await text_of(executor, "kept") == "1"
    assert isinstance(execution.outcome, Interrupted)


async def test_cancelling_a_reader_interrupts_the_cell(executor: CodeExecutor) -> None:
    execution = await executor.submit(f"kept = 1\n{SLEEP}")

    async def read() -> None:
        async for _ in execution.stream(60):
            pass

    reading = asyncio.create_task(read())
    await until_output(execution)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    with within(2):
        assert await text_of(executor, "kept") == "1"


async def test_asyncio_timeouts_around_a_call_interrupt_the_cell(executor: CodeExecutor) -> None:
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.3):
            await executor.execute(f"kept = 1\n{SLEEP}")
    assert not isinstance(caught.value, ExecutionTimeout)
    with within(2):
        assert await text_of(executor, "kept") == "1"


async def test_cancelling_at_any_moment_leaves_a_session_that_works(executor: CodeExecutor) -> None:
    await executor.execute("import time\nkept = 1", timeout=SECONDS)
    for turns in range(40):
        task = asyncio.create_task(executor.execute("time.sleep(0.002)", timeout=SECONDS))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        result = await executor.execute("kept", timeout=SECONDS)
        assert (result.text, result.restarted) == ("1", False)


async def test_an_interrupt_reaches_only_its_own_executor(make_executor: MakeExecutor) -> None:
    """G5."""
    async with make_executor() as one, make_executor() as two:
        other = await two.submit(UNTIL_GO)
        execution = await one.submit(SLEEP)
        await until_output(other)
        await until_output(execution)
        await execution.interrupt()
        assert other.outcome is None
        (two.working_dir / "go").touch()
        assert (await other.result(SECONDS)).text == "begun"


# -- much output -----------------------------------------------------------------------------------------------------


async def test_a_stream_passes_everything_and_the_hosts_memory_does_not_grow(executor: CodeExecutor) -> None:
    """G8."""
    execution = await executor.submit("line = 'x' * 999\nfor n in range(200_000): print(line)")
    size = 0
    async with Growth() as growth:
        async for chunk in execution.stream(timeout=18):
            size += len(chunk)
    assert size == 200_000_000
    assert growth.bytes < 64 * MIB
    assert (await execution.result(SECONDS)).omitted_bytes > 190_000_000


async def test_output_that_nobody_reads_does_not_grow_the_hosts_memory(executor: CodeExecutor) -> None:
    """G7, G8."""
    async with Growth() as growth:
        result = await executor.execute("line = 'é' * 50_000\nfor n in range(1000): print(line)", timeout=18)
    assert growth.bytes < 64 * MIB
    assert result.truncated


async def test_displays_that_nobody_reads_do_not_grow_the_hosts_memory(executor: CodeExecutor) -> None:
    """G9."""
    code = """
from IPython.display import publish_display_data
for n in range(60): publish_display_data({"text/plain": "p", "application/x-own": bytes(5_000_000)})
"""
    async with Growth() as growth:
        result = await executor.execute(code, timeout=18)
    kept = sum(len(output.data.get("application/x-own", b"")) for output in result.outputs)
    assert kept <= 64 * MIB
    assert growth.bytes < kept + 64 * MIB
    assert result.omitted_media == 60 - kept // 5_000_000
    assert result.text == "\n".join(["p"] * 60)


async def test_metadata_that_nobody_reads_does_not_grow_the_hosts_memory(executor: CodeExecutor) -> None:
    """G9."""
    code = """
from IPython.display import publish_display_data
for n in range(300): publish_display_data({"text/plain": "p"}, {"m": "x" * 200_000})
"""
    async with Growth() as growth:
        await executor.execute(code, timeout=18)
    assert growth.bytes < 128 * MIB


async def test_a_slow_reader_makes_the_guest_wait_and_gets_everything(executor: CodeExecutor) -> None:
    execution = await executor.submit("for n in range(30_000): print('x' * 999)")
    size = 0
    async with Growth() as growth:
        async for chunk in execution.stream(timeout=18):
            size += len(chunk)
            await asyncio.sleep(0.001)
    assert size == 30_000_000
    assert growth.bytes < 64 * MIB


async def test_a_reader_that_stops_reading_does_not_make_an_obedient_cell_lose_its_state(
    executor: CodeExecutor,
) -> None:
    await executor.execute("kept = 1", timeout=SECONDS)
    execution = await executor.submit("while True: print('x' * 1000)")
    stream = execution.stream(timeout=0.5)
    await anext(stream)
    async with asyncio.timeout(5):
        while execution.outcome is None:  # noqa: ASYNC110 - it ends by its time limit
            await asyncio.sleep(0.01)
    assert execution.outcome == TimedOut(0.5, state_kept=True)
    with pytest.raises(ExecutionTimeout):
        [chunk async for chunk in stream]  # pyright: ignore[reportUnusedExpression]
    assert await text_of(executor, "kept") == "1"


async def test_what_came_before_anybody_read_is_cut_and_said(executor: CodeExecutor) -> None:
    execution = await executor.submit("for n in range(10_000): print('x' * 999)")
    await execution.result(SECONDS)
    text = "".join([chunk async for chunk in execution.stream(SECONDS)])
    note = re.search(r"\n\.\.\. \[(\d+) bytes came before anybody read, and were left out\] \.\.\.\n", text)
    assert note is not None
    assert len(text) - len(note[0]) + int(note[1]) == 10_000_000


@pytest.mark.parametrize("unit", ["0123456789", "aé€😀", "😀"])
async def test_a_long_text_keeps_head_and_tail_and_counts_the_rest_exactly(executor: CodeExecutor, unit: str) -> None:
    count = 1_300_000 // len(unit)
    result = await executor.execute(f"print('<' + '{unit}' * {count} + '>', end='')", timeout=SECONDS)
    whole = f"<{unit * count}>"
    assert [output.name for output in result.outputs] == ["stdout", "stderr", "stdout"]
    head, note, tail = (output.text for output in result.outputs)
    assert whole.startswith(head)
    assert whole.endswith(tail)
    kept = len(head.encode()) + len(tail.encode())
    assert kept + result.omitted_bytes == len(whole.encode())
    assert MIB - 8 < kept <= MIB
    assert str(result.omitted_bytes) in note
    assert result.truncated


async def test_a_text_at_the_limit_is_whole(executor: CodeExecutor) -> None:
    result = await executor.execute(f"print('x' * {MIB}, end='')", timeout=SECONDS)
    assert result.text == "x" * MIB
    assert not result.truncated


async def test_one_flood_does_not_hold_up_the_others(make_executor: MakeExecutor) -> None:
    """G7."""
    async with make_executor() as loud, make_executor() as quiet:
        flood = await loud.submit("while True: print('x' * 1000)")
        await until_output(flood)
        with within(5):
            for n in range(20):
                assert await text_of(quiet, str(n)) == str(n)
        await flood.interrupt()
        assert flood.outcome is not None


# -- deaths ----------------------------------------------------------------------------------------------------------

DEATHS: dict[str, tuple[str, int | None, int | None]] = {
    "SIGKILL": ("os.kill(os.getpid(), 9)", 9, None),
    "SIGTERM": ("os.kill(os.getpid(), 15)", 15, None),
    "exit 0": ("os._exit(0)", None, 0),
    "exit 7": ("os._exit(7)", None, 7),
    "segfault": ("ctypes.string_at(0)", 11, None),
    "abort": ("os.abort()", 6, None),
    "thread": (
        "import threading; threading.Thread(target=os._exit, args=(3,)).start(); threading.Event().wait()",
        None,
        3,
    ),
}


@pytest.mark.parametrize(("code", "signal", "exit_code"), DEATHS.values(), ids=DEATHS.keys())
async def test_the_death_of_a_kernel_is_told_at_once_and_the_next_cell_finds_another(
    executor: CodeExecutor, code: str, signal: int | None, exit_code: int | None
) -> None:
    """E15, E16."""
    await executor.execute("kept = 1", timeout=SECONDS)
    execution = await executor.submit(
        f"import ctypes, os, time\nprint('last words')\nos.system('echo from below')\ntime.sleep(0.05)\n{code}"
    )
    with within(2), pytest.raises(KernelDied) as caught:
        await execution.result(SECONDS)
    assert (caught.value.signal, caught.value.exit_code) == (signal, exit_code)
    assert isinstance(execution.outcome, Died)
    assert not caught.value.state_kept
    assert caught.value.text == "last words\nfrom below"
    second = await executor.submit("'kept' in globals()")
    events = [event async for event in second.events(SECONDS)]
    assert events[0] == KernelRestarted()
    assert second.restarted
    result = await second.result(SECONDS)
    assert (result.text, result.restarted, result.execution_count) == ("False", True, 1)
    third = await executor.execute("1", timeout=SECONDS)
    assert (third.restarted, third.execution_count) == (False, 2)


async def test_a_kernel_that_closes_all_its_descriptors_is_dead(executor: CodeExecutor) -> None:
    """E17."""
    with within(5), pytest.raises(KernelDied):
        await executor.execute("import os\nos.closerange(0, 4096)", timeout=SECONDS)
    result = await executor.execute("1", timeout=SECONDS)
    assert (result.text, result.restarted) == ("1", True)


async def test_a_kernel_that_closes_its_stream_and_lives_on_is_killed(executor: CodeExecutor) -> None:
    """E17."""
    with within(8), pytest.raises(KernelDied):
        await executor.execute("import os, time\nos.closerange(3, 4096)\nwhile True: time.sleep(1)", timeout=SECONDS)
    assert (await executor.execute("1", timeout=SECONDS)).restarted


async def test_a_kernel_that_dies_between_two_cells_is_replaced(executor: CodeExecutor) -> None:
    await executor.execute("import os, threading\nthreading.Timer(0.02, os._exit, (1,)).start()", timeout=SECONDS)
    session = executor._session
    assert session is not None
    assert await session.exited(SECONDS) is not None
    result = await executor.execute("'os' in globals()", timeout=SECONDS)
    assert (result.text, result.restarted) == ("False", True)


async def test_a_kernel_that_dies_at_any_moment_is_replaced_and_no_cell_runs_twice(executor: CodeExecutor) -> None:
    for turn in range(12):
        with contextlib.suppress(KernelDied):
            await executor.execute(
                f"import os, threading\nthreading.Timer({turn} / 2000, os._exit, (1,)).start()", timeout=SECONDS
            )
        execution = await executor.submit("open('ran', 'a').write('x'); None")
        with contextlib.suppress(KernelDied):
            await execution.result(SECONDS)
        session = executor._session
        if session is not None and not execution.restarted:
            assert await session.exited(SECONDS) is not None
        ran = executor.working_dir / "ran"
        assert not ran.exists() or ran.read_text() in ("", "x")
        ran.unlink(missing_ok=True)


async def test_cells_behind_a_dead_kernel_run_in_a_fresh_one(executor: CodeExecutor) -> None:
    executions = [await executor.submit(code) for code in ("x = 1\nimport os; os._exit(1)", "'x' in globals()", "2")]
    results = await asyncio.gather(*(execution.result(SECONDS) for execution in executions), return_exceptions=True)
    assert isinstance(results[0], KernelDied)
    assert isinstance(results[1], ExecutionResult)
    assert isinstance(results[2], ExecutionResult)
    assert (results[1].text, results[1].restarted) == ("False", True)
    assert (results[2].text, results[2].restarted) == ("2", False)


async def test_the_death_of_one_kernel_touches_no_other(make_executor: MakeExecutor) -> None:
    async with make_executor() as one, make_executor() as two:
        await two.execute("x = 1", timeout=SECONDS)
        for _ in range(3):
            with pytest.raises(KernelDied):
                await one.execute(
                    "import os\nfor pid in range(-1, 99):\n    try: os.kill(pid, 9)\n    except OSError: pass",
                    timeout=SECONDS,
                )
        assert await text_of(two, "x") == "1"


async def test_what_a_dead_kernel_had_started_is_gone_too(executor: CodeExecutor) -> None:
    """E14."""
    beat = executor.working_dir / "beat"
    code = """
import os, subprocess
script = "trap '' TERM INT HUP; while :; do echo x >> beat; sleep 0.01; done"
subprocess.Popen(["sh", "-c", script], start_new_session=True)
while not os.path.exists("beat"): pass
os._exit(1)
"""
    with pytest.raises(KernelDied):
        await executor.execute(code, timeout=SECONDS)
    assert (
        await text_of(executor, "import os\nos.remove('beat')\nimport time; time.sleep(0.1)\nos.path.exists('beat')")
        == "False"
    )
    assert not beat.exists()


# -- a guest that breaks the rules of the wire ------------------------------------------------------------------------

FIND_STREAM = """
import json, os, socket, stat, struct
def is_stream(fd):
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode): return False
    except OSError: return False
    with socket.socket(fileno=os.dup(fd)) as copy: return copy.type == socket.SOCK_STREAM
[fd] = [fd for fd in range(3, 256) if is_stream(fd)]
stream = socket.socket(fileno=os.dup(fd))
def frame(header, payload=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    stream.sendall(struct.pack("!II", len(head), len(payload)) + head + payload)
"""

FORGERIES = {
    "garbage": "stream.sendall(b'garbage' * 1000)",
    "zeros": "stream.sendall(bytes(1 << 20))",
    "http": "stream.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n')",
    "endless": "stream.sendall(struct.pack('!II', 2**32 - 1, 2**32 - 1))",
    "no object": "frame(b'[]')",
    "deep": "frame(b'[' * 200_000)",
    "deep type": "frame(b'{\"type\":' + b'[' * 950 + b']' * 950 + b'}')",
    "number": "frame(b'{\"type\":' + b'9' * 5000 + b'}')",
    "type": "frame({'type': 'welcome'})",
    "ready": "frame({'type': 'ready', 'python': '3', 'ipython': '9'})",
    "failed": "frame({'type': 'failed', 'layer': 'seccomp', 'detail': 'off'})",
    "other reply": "frame({'type': 'execute_reply', 'id': 99, 'status': 'ok', 'execution_count': 1})",
    "display": "frame({'type': 'display_data', 'parts': [['a/b', 'text', 100]], 'metadata': {}})",
    "deep JSON": "frame({'type': 'display_data', 'parts': [['a', 'json', 90000]], 'metadata': {}}, b'[' * 90000)",
    "stdin": "frame({'type': 'stream', 'name': 'stdin'}, b'x')",
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
async def test_a_guest_that_breaks_the_rules_loses_its_own_session_alone(
    make_executor: MakeExecutor, forgery: str
) -> None:
    """G1, G3, G4, G5, G16."""
    async with make_executor() as liar, make_executor() as other:
        await other.execute("x = 1", timeout=SECONDS)
        with within(5), pytest.raises(ProtocolError):
            await liar.execute(
                f"{FIND_STREAM}\nprint('before')\n{forgery}\nimport time; time.sleep(5)", timeout=SECONDS
            )
        assert await text_of(other, "x") == "1"
        result = await liar.execute("2", timeout=SECONDS)
        assert (result.text, result.restarted) == ("2", True)


@pytest.mark.parametrize("depth", [100, 500, 900, 940, 970, 990])
async def test_json_of_any_depth_does_not_harm_the_host(executor: CodeExecutor, depth: int) -> None:
    """G4."""
    code = f"""{FIND_STREAM}
b = b"[" * {depth} + b"]" * {depth}
frame({{"type": "display_data", "parts": [["a/json", "json", len(b)]], "metadata": {{}}}}, b)
frame(b'{{"type": "display_data", "parts": [], "metadata": {{"m": ' + b + b'}}}}')
"""
    with contextlib.suppress(ProtocolError):
        await executor.execute(code, timeout=SECONDS)
    assert await text_of(executor, "2") == "2"


async def test_a_guest_that_stops_in_the_middle_of_a_frame_is_ended_by_the_time_limit(impatient: CodeExecutor) -> None:
    """G2."""
    code = f"{FIND_STREAM}\nstream.sendall(struct.pack('!II', 100, 0) + b'{{')\nimport time; time.sleep(60)"
    with within(5), pytest.raises((ExecutionTimeout, ProtocolError)):
        await impatient.execute(code, timeout=0.5)
    assert await text_of(impatient, "2") == "2"


async def test_a_guest_that_ends_its_cell_twice_deceives_only_itself(executor: CodeExecutor) -> None:
    """G5."""
    code = f"{FIND_STREAM}\nframe({{'type': 'execute_reply', 'id': 1, 'status': 'ok', 'execution_count': 1}})"
    await executor.execute(code, timeout=SECONDS)
    with contextlib.suppress(ProtocolError):
        await executor.execute("1", timeout=SECONDS)
    assert await text_of(executor, "2") == "2"


async def test_descriptors_that_a_guest_sends_are_not_taken(executor: CodeExecutor) -> None:
    """G15: they come with what is right otherwise, ten at a time."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterdir keeps one open
    code = f"""{FIND_STREAM}
import array
head = b'{{"type": "stream", "name": "stdout"}}'
held = [os.dup(0) for _ in range(10)]
for _ in range(20):
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", held))
    stream.sendmsg([struct.pack("!II", len(head), 1) + head + b"x"], [rights])
"""
    assert await text_of(executor, code) == "x" * 20
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


async def test_a_kernel_that_does_not_read_holds_up_nobody(
    impatient: CodeExecutor, make_executor: MakeExecutor
) -> None:
    """G13: fifty megabytes wait for it; they and it are given up, and others answer meanwhile."""
    async with make_executor() as other:
        with within(10):
            stopped = asyncio.create_task(impatient.execute("import os; os.kill(os.getpid(), 19)", timeout=1))
            cells = [asyncio.create_task(impatient.execute(f"'{'x' * 10 * MIB}'; None", timeout=1)) for _ in range(5)]
            for _ in range(20):
                assert await text_of(other, "1") == "1"
            outcomes = await asyncio.gather(stopped, *cells, return_exceptions=True)
    assert isinstance(outcomes[0], ExecutionTimeout)
    assert all(isinstance(outcome, (ExecutionTimeout, ExecutionResult)) for outcome in outcomes)
    assert await text_of(impatient, "2") == "2"


# -- lost ------------------------------------------------------------------------------------------------------------


async def test_disconnecting_while_cells_run_loses_them(container: CodeExecutionContainer, key: str) -> None:
    executor = CodeExecutor(key, container.workspace, container.port)
    await executor.connect()
    executions = [await executor.submit(code) for code in (SLEEP, "2", "3")]
    await until_output(executions[0])
    waiting = asyncio.create_task(executions[0].result(60))
    with within(5):
        await executor.disconnect()
    for execution in executions:
        assert isinstance(execution.outcome, Lost)
        with pytest.raises(ExecutionLost):
            await execution.result(SECONDS)
    with pytest.raises(ExecutionLost) as caught:
        await waiting
    assert caught.value.text == "asleep"
    assert isinstance(caught.value, OSError)


async def test_a_disconnect_that_is_cancelled_is_finished_all_the_same(small: CodeExecutionContainer, key: str) -> None:
    async with small:
        executor = CodeExecutor(key, small.workspace, small.port)
        await executor.connect()
        execution = await executor.submit(SLEEP)
        await until_output(execution)
        task = asyncio.create_task(executor.disconnect())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert isinstance(execution.outcome, Lost)
        assert "0 sessions" in repr(small)


async def test_when_the_container_goes_its_cells_are_lost(small: CodeExecutionContainer, key: str) -> None:
    await small.run()
    executor = CodeExecutor(key, small.workspace, small.port)
    await executor.connect()
    try:
        execution = await executor.submit(SLEEP)
        behind = await executor.submit("2")
        await until_output(execution)
        with within(10):
            await small.kill()
            with pytest.raises(ExecutionLost):
                await execution.result(SECONDS)
            with pytest.raises(ConnectionError):
                await behind.result(SECONDS)
            with pytest.raises(ConnectionError):
                await executor.execute("3", timeout=SECONDS)
    finally:
        await executor.disconnect()
        await small.kill()


async def test_a_session_can_be_left_and_entered_again(container: CodeExecutionContainer, key: str) -> None:
    executor = CodeExecutor(key, container.workspace, container.port)
    async with executor:
        await executor.execute("x = 1", timeout=SECONDS)
    async with executor:
        assert await text_of(executor, "'x' in globals()") == "False"


# -- what the caller does wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [None, 5, b"1", ["1"], True])
async def test_code_that_is_no_string_is_refused(executor: CodeExecutor, code: Any) -> None:
    with pytest.raises(InvalidArgument, match="code"):
        await executor.execute(code)
    with pytest.raises(InvalidArgument, match="code"):
        await executor.submit(code)


async def test_a_huge_cell_runs_and_a_larger_one_is_refused(executor: CodeExecutor) -> None:
    assert await text_of(executor, f"x = '''{'y' * 10_000_000}'''\nlen(x)") == "10000000"
    assert await text_of(executor, f"#{'😀' * ((16 << 20) - 3)}\n1") == "1"
    with pytest.raises(InvalidArgument, match="code"):
        await executor.execute(" " * ((16 << 20) + 1))
    assert await text_of(executor, "len(x)") == "10000000"


async def test_a_cell_of_many_lines_runs(executor: CodeExecutor) -> None:
    assert await text_of(executor, "x = 0\n" + "x += 1\n" * 5000 + "x") == "5000"


async def test_a_client_must_be_connected(container: CodeExecutionContainer, key: str) -> None:
    executor = CodeExecutor(key, container.workspace, container.port)
    for _ in range(2):
        with pytest.raises(StateError):
            await executor.submit("1")
        with pytest.raises(StateError):
            await executor.execute("1")
        async with executor:
            with pytest.raises(StateError):
                await executor.connect()
            assert await text_of(executor, "1") == "1"
        await executor.disconnect()


async def test_sessions_that_come_and_go_leave_nothing_open(
    container: CodeExecutionContainer, make_executor: MakeExecutor
) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only their number matters

    async with make_executor() as executor:
        await executor.execute("1")
    before, sessions = open_files(), len(container._sessions)
    for turn in range(20):
        async with make_executor() as executor:
            if turn % 4 == 1:
                await executor.execute("1", timeout=SECONDS)
            elif turn % 4 == 2:
                await executor.submit(SLEEP)
            elif turn % 4 == 3:
                with pytest.raises(KernelDied):
                    await executor.execute("import os; os._exit(1)", timeout=SECONDS)
    assert len(container._sessions) == sessions
    assert open_files() <= before


async def test_a_client_without_a_key_has_a_session_too(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port) as client:
        assert await text_of(client, "import os\nos.getcwd(), os.listdir('/app')") == "('/app', ['skills'])"
        assert await text_of(client, "os.listdir('/app/skills')") == "['shared']"


@pytest.mark.parametrize("port", [0, -1, 65536, "8888", None, True, 1.5])
def test_a_client_needs_a_port(port: Any) -> None:
    with pytest.raises(InvalidArgument, match="port"):
        ExecutionClient(port)


@pytest.mark.parametrize("name", ["heartbeat_interval", "interrupt_grace"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", None])
def test_a_clients_times_are_positive_numbers(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument):
        ExecutionClient(8888, **{name: value})


async def test_a_port_where_nobody_listens_is_a_connection_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for token in (None, "token"):
        with within(5), pytest.raises(ConnectionError):
            await ExecutionClient(port, token=token).connect()


async def test_a_container_must_be_started_once_and_not_be_closed(small: CodeExecutionContainer, key: str) -> None:
    with pytest.raises(StateError):
        _ = small.port
    async with small:
        port = small.port
        with pytest.raises(StateError):
            await small.run()
        async with CodeExecutor(key, small.workspace, port) as executor:
            assert await text_of(executor, "1") == "1"
    with pytest.raises(StateError):
        _ = small.port
    with pytest.raises(StateError):
        await small.run()
    await small.kill()
    with pytest.raises(ConnectionError):
        await CodeExecutor(key, small.workspace, port).connect()


async def test_a_container_that_was_never_started_can_be_killed(small: CodeExecutionContainer) -> None:
    await small.kill()
    await small.kill()
    with pytest.raises(StateError):
        await small.run()


async def test_a_port_in_use_is_told_before_anything_starts(workspace_path: Path, engine: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, port=port, preload=())
        with pytest.raises(PortInUse) as caught:
            await container.run()
        assert caught.value.port == port
        assert isinstance(caught.value, OSError)
    assert not is_there(workspace_path)


async def test_a_container_has_the_port_that_was_asked_for(workspace_path: Path, engine: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for _ in range(2):  # a port whose last owner has just gone can be had again
        container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, port=port, preload=())
        async with container, CodeExecutor("a", container.workspace, port) as executor:
            assert container.port == port
            assert await text_of(executor, "1") == "1"


@pytest.mark.parametrize("port", [0, -1, 65536, "8888", True, 1.5])
def test_a_containers_port_is_a_port(port: Any) -> None:
    with pytest.raises(InvalidArgument, match="port"):
        ExecutionContainer(port=port)


@pytest.mark.parametrize("name", ["", "docker!", "Bubblewrap", None, 5])
def test_an_unknown_engine_is_refused(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="engine"):
        ExecutionContainer(engine=name)


@pytest.mark.parametrize("network", [True, False, "host", [], ["example.com"]])
def test_there_is_no_network_to_be_had(network: Any) -> None:
    with pytest.raises(InvalidArgument, match="network"):
        ExecutionContainer(network=network)


@pytest.mark.parametrize(
    "targets", [["a", "a/b"], ["a/b/c", "a"], ["a", "a"], ["a", "./a"], ["a", "/app/a/x"], ["a//b", "a/b/c"]]
)
def test_binds_may_not_nest(tmp_path: Path, targets: list[str]) -> None:
    binds = {str(tmp_path / str(number)): target for number, target in enumerate(targets)}
    with pytest.raises(InvalidArgument, match="binds"):
        ExecutionContainer(binds=binds)


@pytest.mark.parametrize("target", ["", ".", "..", "../x", "a/../../x", "/etc", "/", "/app", "/app/../etc", "a\0b"])
def test_a_bind_is_below_app(tmp_path: Path, target: str) -> None:
    with pytest.raises(InvalidArgument, match="binds"):
        ExecutionContainer(binds={str(tmp_path): target})


def test_only_binds_can_be_read_only(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="readonly"):
        ExecutionContainer(binds={str(tmp_path): "a"}, readonly=["b"])
    with pytest.raises(InvalidArgument, match="readonly"):
        CodeExecutionContainer(workspace_path=tmp_path, readonly=["images"])


@pytest.mark.parametrize(
    "env",
    [
        {"": "x"},
        {"A=B": "x"},
        {"A\0": "x"},
        {"A": "x\0"},
        {"A": 5},
        {5: "x"},
        {"A": None},
        {"A": "\ud800"},
        {"A": "x" * MIB},
    ],
)
def test_environment_variables_that_cannot_be_are_refused(env: Any) -> None:
    with pytest.raises(InvalidArgument, match="env"):
        ExecutionContainer(env=env)


async def test_environment_variables_reach_the_session_exactly(workspace_path: Path, engine: str) -> None:
    env = {
        "QUOTES": "'\"`$HOME\\ $(id) ;&|<>*?~#!",
        "LINES": "a\nb\r\n\tc",
        "UNICODE": "é😀\u202eנ\ufeff",
        "LONG": "0123456789" * 10_000,
        "EMPTY": "",
        "SPACE": " x ",
        "with space": "y",
        "DASH-ED": "z",
    }
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=(), env=env)
    async with container, CodeExecutor("a", container.workspace, container.port) as executor:
        for name, value in env.items():
            assert await text_of(executor, f"import os\nos.environ[{name!r}] == {value!r}") == "True"
        assert await text_of(executor, "!printenv LONG | wc -c") == "100001"


async def test_nothing_of_the_hosts_environment_gets_in(
    workspace_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B1."""
    monkeypatch.setenv("A_SECRET_OF_THE_HOST", "hunter2")
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    async with container, CodeExecutor("a", container.workspace, container.port) as executor:
        code = "import os\n'A_SECRET_OF_THE_HOST' in os.environ, b'hunter2' in open('/proc/1/environ', 'rb').read()"
        with contextlib.suppress(ExecutionError):
            assert await text_of(executor, code) == "(False, False)"
        assert await text_of(executor, "'A_SECRET_OF_THE_HOST' in os.environ") == "False"


async def test_the_whole_environment_comes_in_one_context(tmp_path: Path, engine: str) -> None:
    async with execution_environment(
        "key", workspace_path=tmp_path / "w", log_file=tmp_path / "log", env_vars={"A": "b"}, engine=engine, preload=()
    ) as environment:
        assert await text_of(environment.executor, "import os\nos.environ['A']") == "'b'"
        with pytest.raises(ExecutionError):
            await environment.executor.execute("1 / 0")
    log = (tmp_path / "log").read_text()
    assert "cell 1 finished" in log
    assert "cell 2 failed: ZeroDivisionError" in log


# -- what may go wrong on the host meanwhile ---------------------------------------------------------------------------


async def test_an_image_that_cannot_be_saved_is_still_in_the_result(executor: CodeExecutor) -> None:
    shutil.rmtree(executor.images_dir)
    png = b"\x89PNG\r\n\x1a\n"
    result = await executor.execute(
        f"x = 1\nfrom IPython.display import Image\nImage(data={png!r}, format='png')", timeout=SECONDS
    )
    assert [(image.data, image.path) for image in result.images] == [(png, None)]
    assert await text_of(executor, "x") == "1"


async def test_bytes_that_are_no_image_are_not_taken_for_one(executor: CodeExecutor) -> None:
    """G11."""
    code = "from IPython.display import publish_display_data\npublish_display_data({'image/png': b'<script>'})"
    result = await executor.execute(code, timeout=SECONDS)
    assert result.images == []
    assert list(executor.images_dir.iterdir()) == []
    assert result.outputs[0].data["image/png"] == b"<script>"


async def test_a_log_that_fails_does_not_hold_up_the_cells_behind(container: CodeExecutionContainer, key: str) -> None:
    class Failing(CodeExecutor):
        async def note_end(self, execution: Execution) -> None:  # noqa: ARG002 - it is another's signature
            raise OSError("the disk is full")

    async with Failing(key, container.workspace, container.port) as executor:
        executions = [await executor.submit(str(n)) for n in range(3)]
        results = await asyncio.gather(*(execution.result(5) for execution in executions))
        assert [result.text for result in results] == ["0", "1", "2"]

"""The limits of a whole session: however they are gone over, the outcome says which, by how much, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import sandboxes
from connections import BY_THE_PORT

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ExecutionClient,
    ExecutionError,
    ExecutionTimeout,
    InvalidArgument,
    LimitExceeded,
    Limits,
    usage,
)
from actbox.cli import ExitCode, main
from actbox.events import Overrun
from actbox.guest import refusals
from actbox.guest import usage as guest
from actbox.sessions import read_overrun

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

pytestmark = pytest.mark.anyio

SECONDS = 12.0
GRACE = 0.3
MIB = 1 << 20
TIGHT = Limits(
    memory=256 * MIB, pids=40, open_files=64, disk=48 * MIB, files=400, file_size=16 * MIB, tmp=8 * MIB, shm=4 * MIB
)
CPU, WALL = 0.6, 0.6


async def _run(
    limits: Limits, engine: str, folder: Path, *, groups: bool = False
) -> AsyncIterator[CodeExecutionContainer]:
    made = CodeExecutionContainer(workspace_path=folder, engine=engine, preload=(), limits=limits)
    with pytest.MonkeyPatch.context() as patch:
        if not groups:
            patch.setenv("ACTBOX_CGROUP", "/nonexistent")
        await made.run()
    try:
        await made.warmed()
        yield made
    finally:
        await made.kill()


@pytest.fixture(scope="module")
async def tight(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CodeExecutionContainer]:
    """A container of little of everything but time, and of no control groups: what is bounded anywhere is bounded."""
    async for made in _run(TIGHT, engine, tmp_path_factory.mktemp("tight")):
        yield made


@pytest.fixture(scope="module")
async def grouped(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CodeExecutionContainer]:
    """The same where this process may make control groups, of which each session has one."""
    async for made in _run(TIGHT, engine, tmp_path_factory.mktemp("grouped"), groups=True):
        if not made.enforcement.startswith("cgroup"):
            pytest.skip("no control groups can be made for sessions here")
        yield made


@pytest.fixture(scope="module")
async def brief(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CodeExecutionContainer]:
    """A container of little processor time."""
    async for made in _run(Limits(cpu=CPU), engine, tmp_path_factory.mktemp("brief")):
        yield made


@pytest.fixture(scope="module")
async def short(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CodeExecutionContainer]:
    """A container whose cells may not take long."""
    async for made in _run(Limits(wall=WALL), engine, tmp_path_factory.mktemp("short")):
        yield made


@pytest.fixture(params=["here", "by the port"])
def enter(request: pytest.FixtureRequest, key: str) -> Callable[..., CodeExecutor]:
    """Makes a session of the test's key: straight, and by the port with the token."""

    def make(container: CodeExecutionContainer, grace: float = GRACE) -> CodeExecutor:
        return enter_as(key, container, by_the_port=request.param == "by the port", grace=grace)

    return make


def enter_as(
    key: str, container: CodeExecutionContainer, *, by_the_port: bool = False, grace: float = GRACE
) -> CodeExecutor:
    host, token = (BY_THE_PORT, container.token) if by_the_port else ("localhost", None)
    return CodeExecutor(key, container.workspace, container.port, host, token=token, interrupt_grace=grace)


# What the cells below are made of. Nothing here ends by itself: only a limit ends it.
TOOLS = """
import ctypes, mmap, os, signal, sys, tempfile, threading, time

kept = []

def take(mib):
    \"\"\"Hold memory that RLIMIT_DATA says nothing of.\"\"\"
    held = mmap.mmap(-1, mib << 20)
    for _ in range(mib):
        held.write(b"x" * (1 << 20))
    kept.append(held)

def burn(seconds=1e9):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def fill(mib, folder="."):
    for number in range(mib // 8):
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            for _ in range(8):
                file.write(b"x" * (1 << 20))

def flood(count, folder="."):
    for number in range(count):
        os.close(tempfile.mkstemp(dir=folder)[0])

def rest():
    while True:
        time.sleep(60)

def child(work, *args):
    pid = os.fork()
    if pid == 0:
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            work(*args)
            rest()
        finally:
            os._exit(0)
    return pid

def daemon(work, *args):
    \"\"\"Forked twice, in a session of its own: nobody's child but the first process's.\"\"\"
    pid = os.fork()
    if pid == 0:
        os.setsid()
        child(work, *args)
        os._exit(0)
    os.waitpid(pid, 0)

def thread(work, *args):
    threading.Thread(target=work, args=args, daemon=True).start()

def later(start, work, *args):
    \"\"\"Begin when the cell is over.\"\"\"
    def wait():
        time.sleep(0.3)
        work(*args)
    start(wait)
"""


async def prepare(executor: CodeExecutor) -> None:
    await executor.execute(TOOLS, timeout=SECONDS)


async def exceed(executor: CodeExecutor, code: str, timeout: float = SECONDS) -> LimitExceeded:
    """What a cell gets that must go over a limit."""
    with pytest.raises(LimitExceeded) as caught:
        await executor.execute(textwrap.dedent(code), timeout=timeout)
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)


async def until_ended(executor: ExecutionClient) -> None:
    """Until the session is known to be over, without a cell."""
    session = executor._session
    if session is not None:
        await until(lambda: session.ended)


async def is_fresh(executor: CodeExecutor) -> bool:
    """Whether the next cell runs, in a fresh kernel that says that it is one."""
    result = await executor.execute("'kept' in globals()", timeout=SECONDS)
    assert result.text in ("True", "False")
    assert result.restarted == (result.text == "False")
    return result.restarted


# -- memory ----------------------------------------------------------------------------------------------------------

MEMORY = {
    "one process": "take(400); rest()",
    "many processes": "for _ in range(4): child(take, 100)\nrest()",
    "orphans": "for _ in range(4): daemon(take, 100)\nrest()",
    "threads": "for _ in range(4): thread(take, 100)\nrest()",
    "private memory of many": "for _ in range(4): child(lambda: kept.append(b'x' * (100 << 20)))\nrest()",
    # prctl(PR_SET_DUMPABLE, 0): nobody may look into it.
    "a process that hides": "child(lambda: (ctypes.CDLL(None).prctl(4, 0, 0, 0, 0), take(400)))\nrest()",
    "behind a stopped kernel": (
        "child(lambda: (time.sleep(0.2), os.kill(os.getppid(), signal.SIGSTOP), take(400)))\nrest()"
    ),
    "signals ignored": "signal.signal(signal.SIGINT, signal.SIG_IGN); take(400); rest()",
}


@pytest.mark.parametrize("way", MEMORY)
async def test_memory_of_the_whole_session_is_bounded(tight: CodeExecutionContainer, key: str, way: str) -> None:
    """E3."""
    async with enter_as(key, tight) as executor:
        await prepare(executor)
        error = await exceed(executor, f"print('begun', flush=True)\n{MEMORY[way]}")
        assert (error.limit, error.bound, error.state_kept) == ("memory", TIGHT.memory, False)
        assert TIGHT.memory < error.use < 2 << 30
        assert (error.name, error.trace, error.text) == (None, None, "begun")
        assert await is_fresh(executor)


GROUPED = {
    **{way: code for way, code in MEMORY.items() if way != "signals ignored"},
    # Pages of a file in memory that no process shows: mapped, written, and given back.
    "memory that is no longer mapped": """
        while True:
            held = mmap.mmap(-1, 64 << 20)
            for _ in range(64):
                held.write(b"x" * (1 << 20))
            held.madvise(mmap.MADV_DONTNEED)
            kept.append(held)
    """,
}


@pytest.mark.engines("bubblewrap")
@pytest.mark.parametrize("way", GROUPED)
async def test_with_a_control_group_the_system_bounds_memory_too(
    grouped: CodeExecutionContainer, key: str, way: str
) -> None:
    """E3."""
    async with enter_as(key, grouped, grace=10) as executor:
        await prepare(executor)
        error = await exceed(executor, textwrap.dedent(GROUPED[way]))
        assert (error.limit, error.bound) == ("memory", TIGHT.memory)
        # The system kills whom it likes, the watcher the kernel: what is told is what came of it.
        assert TIGHT.memory < error.use < TIGHT.memory + 200 * MIB
        if not error.state_kept:
            assert await is_fresh(executor)


@pytest.mark.engines("bubblewrap")
@pytest.mark.parametrize("start", ["thread", "child", "daemon"])
async def test_with_a_control_group_memory_taken_between_two_cells_ends_the_session_too(
    grouped: CodeExecutionContainer, enter: Callable[..., CodeExecutor], start: str
) -> None:
    async with enter(grouped) as executor:
        await prepare(executor)
        await executor.execute(f"later({start}, take, 400)", timeout=SECONDS)
        await until_ended(executor)
        assert await is_fresh(executor)


async def test_shared_memory_counts_once(tight: CodeExecutionContainer, key: str) -> None:
    async with enter_as(key, tight) as executor:
        await prepare(executor)
        # Six processes that have the same 120 MiB, and pass the limit with the first that takes its own.
        await executor.execute("take(120)\nfor _ in range(5): child(lambda: sum(kept[0][::4096]))", timeout=SECONDS)
        await executor.execute("time.sleep(1)", timeout=SECONDS)
        assert not await is_fresh(executor)
        error = await exceed(executor, "take(200); rest()")
        assert TIGHT.memory < error.use < 500 * MIB


@pytest.mark.parametrize("start", ["thread", "child", "daemon"])
async def test_memory_taken_between_two_cells_ends_the_session(
    tight: CodeExecutionContainer, enter: Callable[..., CodeExecutor], start: str
) -> None:
    """E3."""
    async with enter(tight) as executor:
        await prepare(executor)
        await executor.execute(f"later({start}, take, 400)", timeout=SECONDS)
        await until_ended(executor)
        assert await is_fresh(executor)


async def test_one_process_that_asks_for_too_much_is_refused_it(
    tight: CodeExecutionContainer, enter: Callable[..., CodeExecutor]
) -> None:
    """E2."""
    async with enter(tight) as executor:
        await prepare(executor)
        error = await exceed(executor, "held = bytearray(100 << 20)\nbytearray(400 << 20)")
        assert (error.limit, error.bound, error.state_kept) == ("memory", TIGHT.memory, True)
        assert 100 * MIB < error.use < TIGHT.memory
        assert error.name == "MemoryError"
        assert error.trace is not None
        assert "bytearray(400 << 20)" in error.trace
        assert (await executor.execute("len(held) >> 20", timeout=SECONDS)).text == "100"


async def test_threads_whose_stacks_take_too_much_are_told_as_memory(tight: CodeExecutionContainer, key: str) -> None:
    """E9."""
    async with enter_as(key, tight) as executor:
        await prepare(executor)
        error = await exceed(executor, "threading.stack_size(64 << 20)\nwhile True: thread(rest)")
        assert (error.limit, error.bound, error.state_kept) == ("memory", TIGHT.memory, True)
        assert TIGHT.memory - 64 * MIB < error.use < TIGHT.memory
        assert error.name == "RuntimeError"


@pytest.mark.parametrize(
    "call", ["os.memfd_create('x')", "libc.shmget(0, 4096, 0o600)", "libc.msgget(0, 0o600)", "libc.semget(0, 1, 0o600)"]
)
async def test_memory_that_no_limit_sees_cannot_be_had(executor: CodeExecutor, call: str) -> None:
    """E2."""
    code = f"""
        import ctypes, errno, os
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            made, number = {call}, ctypes.get_errno()
        except OSError as error:
            made, number = -1, error.errno
        print(made, errno.errorcode[number])
    """
    assert (await executor.execute(textwrap.dedent(code), timeout=SECONDS)).text == "-1 ENOSYS"


# -- processor time --------------------------------------------------------------------------------------------------

PROCESSOR = {
    "one process": "burn()",
    "many processes": "for _ in range(3): child(burn)\nrest()",
    "orphans": "for _ in range(3): daemon(burn)\nrest()",
    "threads": "for _ in range(3): thread(burn)\nrest()",
    "children that are waited for": "while True: os.waitpid(child(lambda: (burn(0.1), os._exit(0))), 0)",
    "children that nobody waits for": (
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "while True:\n    child(lambda: (burn(0.4), os._exit(0)))\n    time.sleep(0.6)"
    ),
    "a child that ended long ago": "for _ in range(9): os.waitpid(child(lambda: (burn(0.1), os._exit(0))), 0)\nrest()",
}


@pytest.mark.parametrize("way", PROCESSOR)
async def test_processor_time_of_a_cell_is_bounded(brief: CodeExecutionContainer, key: str, way: str) -> None:
    """E10."""
    async with enter_as(key, brief, grace=10) as executor:
        await prepare(executor)
        error = await exceed(executor, f"print('begun', flush=True)\n{PROCESSOR[way]}")
        assert (error.limit, error.bound, error.state_kept, error.text) == ("cpu", CPU, True, "begun")
        assert CPU < error.use < CPU + 5
        assert error.name is None


@pytest.mark.parametrize(
    "stubborn", ["signal.signal(signal.SIGINT, signal.SIG_IGN); burn()", "child(burn); os.kill(os.getpid(), 19)"]
)
async def test_a_cell_that_does_not_heed_the_interrupt_loses_its_state(
    brief: CodeExecutionContainer, enter: Callable[..., CodeExecutor], stubborn: str
) -> None:
    async with enter(brief) as executor:
        await prepare(executor)
        error = await exceed(executor, stubborn)
        assert (error.limit, error.bound, error.state_kept) == ("cpu", CPU, False)
        assert await is_fresh(executor)


@pytest.mark.parametrize("start", ["thread", "child", "daemon"])
async def test_processor_time_used_between_two_cells_ends_the_session(
    brief: CodeExecutionContainer, enter: Callable[..., CodeExecutor], start: str
) -> None:
    async with enter(brief) as executor:
        await prepare(executor)
        await executor.execute(f"later({start}, burn)", timeout=SECONDS)
        await until_ended(executor)
        assert await is_fresh(executor)


async def test_what_a_cell_left_burning_after_its_end_ends_the_session(
    brief: CodeExecutionContainer, enter: Callable[..., CodeExecutor]
) -> None:
    async with enter(brief, grace=10) as executor:
        await prepare(executor)
        error = await exceed(executor, "daemon(burn); rest()")
        assert (error.limit, error.state_kept) == ("cpu", True)
        await until_ended(executor)
        assert await is_fresh(executor)


async def test_processor_time_counts_anew_for_every_cell(brief: CodeExecutionContainer, key: str) -> None:
    async with enter_as(key, brief) as executor:
        await prepare(executor)
        for _ in range(4):
            await executor.execute(f"burn({CPU / 3})", timeout=SECONDS)
        assert not await is_fresh(executor)


# -- the clock -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        ("rest()", True),
        ("burn()", True),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN); rest()", False),
        ("os.kill(os.getpid(), signal.SIGSTOP)", False),
    ],
)
async def test_a_cell_ends_when_its_time_on_the_clock_is_over(
    short: CodeExecutionContainer, enter: Callable[..., CodeExecutor], code: str, *, kept: bool
) -> None:
    """E10, E11."""
    async with enter(short, grace=10 if kept else GRACE) as executor:
        await prepare(executor)
        error = await exceed(executor, code)
        assert (error.limit, error.bound, error.use, error.state_kept) == ("wall", WALL, WALL, kept)
        assert await is_fresh(executor) == (not kept)


async def test_the_callers_own_timeout_comes_first_if_it_is_shorter(short: CodeExecutionContainer, key: str) -> None:
    async with enter_as(key, short) as executor:
        with pytest.raises(ExecutionTimeout):
            await executor.execute("import time; time.sleep(60)", timeout=WALL / 4)
        # And the clock starts anew with every cell.
        for _ in range(4):
            await executor.execute(f"time.sleep({WALL / 3})", timeout=SECONDS)


# -- the disk --------------------------------------------------------------------------------------------------------

DISK = {
    "one process": ("disk", "fill(200); rest()"),
    "many processes": ("disk", "for _ in range(4): child(fill, 40)\nrest()"),
    "orphans": ("disk", "for _ in range(4): daemon(fill, 40)\nrest()"),
    "threads": ("disk", "for _ in range(4): thread(fill, 40)\nrest()"),
    "without writing": (
        "disk",
        "for n in range(9): os.posix_fallocate(os.open(f'f{n}', os.O_CREAT | os.O_WRONLY), 0, 15 << 20)\nrest()",
    ),
    "deleted files": (
        "disk",
        (
            "for n in range(9):\n"
            "    kept.append(open('x', 'wb')); kept[-1].write(b'x' * (15 << 20)); os.remove('x')\n"
            "rest()"
        ),
    ),
    "a deep place": (
        "disk",
        "place = '.'\nfor _ in range(60):\n    place += '/d'; os.mkdir(place)\nfill(200, place); rest()",
    ),
    "empty files": ("files", "flood(3000); rest()"),
    "empty files of many processes": ("files", "for _ in range(4): child(flood, 600)\nrest()"),
    "folders": ("files", "for n in range(3000): os.mkdir(str(n))\nrest()"),
    "links": ("files", "open('x', 'w').close()\nfor n in range(3000): os.symlink('x', f'l{n}')\nrest()"),
    "names of one file": ("files", "open('x', 'w').close()\nfor n in range(3000): os.link('x', f'l{n}')\nrest()"),
}


@pytest.mark.parametrize("way", DISK)
async def test_the_private_folder_is_bounded(tight: CodeExecutionContainer, key: str, way: str) -> None:
    """E6, E7."""
    limit, code = DISK[way]
    # Whoever waits for a slow disk heeds no interrupt until it has answered.
    async with enter_as(key, tight, grace=10) as executor:
        await prepare(executor)
        error = await exceed(executor, f"print('begun', flush=True)\n{code}")
        bound = getattr(TIGHT, limit)
        assert (error.limit, error.bound, error.state_kept, error.text) == (limit, bound, True, "begun")
        assert error.use > bound


@pytest.mark.parametrize("work", ["fill, 200", "flood, 3000"])
@pytest.mark.parametrize("start", ["thread", "child", "daemon"])
async def test_a_disk_filled_between_two_cells_ends_the_session(
    tight: CodeExecutionContainer, enter: Callable[..., CodeExecutor], start: str, work: str
) -> None:
    """E6, E7."""
    async with enter(tight) as executor:
        await prepare(executor)
        await executor.execute(f"later({start}, {work})", timeout=SECONDS)
        await until_ended(executor)
        assert await is_fresh(executor)


async def test_what_an_earlier_session_left_does_not_stop_the_next_one(tight: CodeExecutionContainer, key: str) -> None:
    async with enter_as(key, tight, grace=10) as executor:
        await prepare(executor)
        assert (await exceed(executor, "fill(80); rest()")).limit == "disk"
    async with enter_as(key, tight, grace=10) as executor:
        await prepare(executor)
        # It may read and clean up for longer than it takes to look, and only what it adds is held against it.
        await executor.execute("print(len(os.listdir()))\ntime.sleep(1.5)", timeout=SECONDS)
        await executor.execute("for name in os.listdir()[:3]: os.remove(name)\ntime.sleep(1)", timeout=SECONDS)
        assert (await exceed(executor, "fill(80); rest()")).limit == "disk"
        await executor.execute("for name in os.listdir(): os.remove(name)\ntime.sleep(1)", timeout=SECONDS)
        await executor.execute("fill(16)", timeout=SECONDS)
        assert not await is_fresh(executor)


async def test_a_file_of_many_names_takes_its_room_once(tight: CodeExecutionContainer, key: str) -> None:
    async with enter_as(key, tight) as executor:
        await prepare(executor)
        await executor.execute("fill(8)\nfor n in range(20): os.link(os.listdir()[0], f'l{n}')", timeout=SECONDS)
        await executor.execute("fill(24); time.sleep(1.5)", timeout=SECONDS)
        assert not await is_fresh(executor)


# -- what the system refuses -----------------------------------------------------------------------------------------

REFUSED = {
    "a large file": ("file_size", "OSError", "with open('x', 'wb') as f:\n    for _ in range(40): f.write(bytes(MIB))"),
    "open files": ("open_files", "OSError", "while True: kept.append(open('/dev/null'))"),
    "processes": ("pids", "BlockingIOError", "while True: child(rest)"),
    "orphans": ("pids", "BlockingIOError", "for _ in range(30): daemon(rest)\nwhile True: child(rest)"),
    "threads": ("pids", "RuntimeError", "threading.stack_size(1 << 18)\nwhile True: thread(rest)"),
    "temporary files": ("tmp", "OSError", "for n in range(9): open(f'/tmp/{n}', 'wb').write(bytes(MIB))"),
    "shared memory": ("shm", "OSError", "for n in range(9): open(f'/dev/shm/{n}', 'wb').write(bytes(MIB))"),
    "an exception of an exception": (
        "tmp",
        "KeyError",
        "try:\n    open('/tmp/x', 'wb').write(bytes(9 * MIB))\nexcept OSError:\n    {}['no']",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
async def test_what_the_system_refuses_is_told_as_the_limit_behind_it(
    tight: CodeExecutionContainer, enter: Callable[..., CodeExecutor], way: str
) -> None:
    """E1, E4, E5, E8, E9."""
    limit, name, code = REFUSED[way]
    async with enter(tight) as executor:
        await prepare(executor)
        error = await exceed(executor, f"MIB = 1 << 20\n{code}")
        assert (error.limit, error.name, error.state_kept) == (limit, name, True)
        bound = getattr(TIGHT, limit)
        assert error.bound == bound
        assert bound - 1 <= error.use <= bound + 3
        assert error.trace
        assert not await is_fresh(executor)


async def test_without_a_workspace_the_limit_of_app_is_that_of_tmp(tight: CodeExecutionContainer) -> None:
    async with ExecutionClient(tight.port) as client:
        with pytest.raises(LimitExceeded) as caught:
            await client.execute("for n in range(9): open(f'/app/{n}', 'wb').write(bytes(1 << 20))", timeout=SECONDS)
    assert (caught.value.limit, caught.value.bound) == ("tmp", TIGHT.tmp)


@pytest.mark.parametrize(
    "code",
    [
        "raise OSError(28, 'No space left on device')",
        "raise BlockingIOError(11, 'Resource temporarily unavailable')",
        'raise RuntimeError("can\'t start new thread")',
        "import socket; a, b = socket.socketpair(); a.setblocking(False); a.recv(1)",
        "open('/nonexistent')",
    ],
)
async def test_an_error_that_no_limit_is_behind_is_told_as_itself(executor: CodeExecutor, code: str) -> None:
    with pytest.raises(ExecutionError) as caught:
        await executor.execute(code, timeout=SECONDS)
    assert type(caught.value) is ExecutionError


def test_a_chain_of_exceptions_without_end_ends_the_search() -> None:
    first, second = KeyError(), ValueError()
    first.__context__, second.__context__ = second, first
    assert refusals.refused_by(first, asdict(TIGHT)) is None


# -- another process -------------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import asyncio, json, sys
from actbox import CodeExecutor, LimitExceeded, Workspace

async def main(port, token, key, workspace, cells):
    async with CodeExecutor(key, Workspace(workspace), port, token=token, interrupt_grace=3) as client:
        for code in cells:
            try:
                result = await client.execute(code, timeout=12)
                answer = [result.text, result.restarted]
            except LimitExceeded as exc:
                answer = [exc.limit, exc.bound, exc.use > exc.bound - 2, exc.state_kept, exc.name]
            print(json.dumps(answer), flush=True)

asyncio.run(main(**json.load(sys.stdin)))
"""


async def in_another_process(container: CodeExecutionContainer, key: str, cells: list[str]) -> list[list[Any]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OTHER_PROCESS, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    asked = {"port": container.port, "token": container.token, "key": key}
    try:
        async with asyncio.timeout(18):
            out, _ = await process.communicate(
                json.dumps({**asked, "workspace": str(container.workspace.path), "cells": cells}).encode()
            )
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


async def test_a_client_of_another_process_hears_the_same(tight: CodeExecutionContainer, key: str) -> None:
    cells = [TOOLS, "take(400); rest()", TOOLS, "fill(200); rest()", "while True: kept.append(open('/dev/null'))", "1"]
    answers = await in_another_process(tight, key, cells)
    assert answers == [
        [None, False],
        ["memory", TIGHT.memory, True, False, None],
        [None, True],
        ["disk", TIGHT.disk, True, True, None],
        ["open_files", TIGHT.open_files, True, True, "OSError"],
        ["1", False],
    ]


async def test_a_client_of_another_process_hears_of_time_too(brief: CodeExecutionContainer, key: str) -> None:
    stubborn = "signal.signal(signal.SIGINT, signal.SIG_IGN); burn()"
    answers = await in_another_process(brief, key, [TOOLS, "burn()", stubborn, "1"])
    assert answers == [
        [None, False],
        ["cpu", CPU, True, True, None],
        ["cpu", CPU, True, False, None],
        ["1", True],
    ]


# -- neighbours ------------------------------------------------------------------------------------------------------

# A session's worst, each for as long as its limits let it.
BOMBS = {
    "forks": "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "memory": "while True:\n    try:\n        child(take, 60)\n    except OSError:\n        rest()",
    "disk": "for _ in range(3): child(fill, 400)\nrest()",
    "files": "for _ in range(3): child(flood, 100_000)\nrest()",
    "processor": "for _ in range(6): daemon(burn)\nburn()",
}


async def round_trips(executor: CodeExecutor, over: Callable[[], bool]) -> float:
    """Seconds in which 95 of 100 cells come back, each well; of 50 at least, until it is over."""
    times: list[float] = []
    await executor.execute("x = 0", timeout=SECONDS)
    while not over() or len(times) < 50:
        began = time.perf_counter()
        result = await executor.execute("x += 1; print(x)", timeout=SECONDS)
        times.append(time.perf_counter() - began)
        assert (result.text, result.restarted) == (str(len(times)), False)
    return sorted(times)[int(len(times) * 0.95)]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_neighbour_goes_on_while_a_session_does_its_worst(bomb: str, engine: str, workspace_path: Path) -> None:
    """D15, E1, E23."""
    before = sandboxes.sandboxed(os.getpid())
    limits = Limits(memory=512 * MIB, pids=64, disk=64 * MIB, files=2000, cpu=2, file_size=32 * MIB)
    async with CodeExecutionContainer(
        workspace_path=workspace_path, engine=engine, preload=(), limits=limits
    ) as container:
        await container.warmed()
        async with enter_as("bomb", container, grace=2) as attacker, enter_as("neighbour", container) as neighbour:
            await prepare(attacker)
            # Of a machine that is busy itself not more is asked than it gives in peace.
            in_peace = await round_trips(neighbour, lambda: True)
            running = asyncio.create_task(exceed(attacker, BOMBS[bomb], 60))
            at_war = await round_trips(neighbour, running.done)
            error = await running
            assert error.limit in ("cpu", "memory", "disk", "files", "pids")
            assert at_war < max(0.5, 10 * in_peace)
            # Whatever it left burning ends too, and its folder can be used again.
            if bomb in ("forks", "processor"):
                await until_ended(attacker)
            assert (await attacker.execute("1 + 1", timeout=SECONDS)).text == "2"
        async with enter_as("bomb", container) as attacker:
            code = "import os\nfor name in os.listdir(): os.remove(name)\nprint(os.listdir())"
            assert (await attacker.execute(code, timeout=SECONDS)).text == "[]"
    await until(lambda: sandboxes.sandboxed(os.getpid()) <= before)


async def test_of_a_session_that_went_over_nothing_is_left(tight: CodeExecutionContainer, key: str) -> None:
    async with enter_as("other", tight) as other:
        await other.execute("1", timeout=SECONDS)
        before = sandboxes.sandboxed(os.getpid())
        async with enter_as(key, tight) as executor:
            await prepare(executor)
            await exceed(executor, "for _ in range(9): daemon(rest)\nchild(take, 400)\nrest()")
        # A process waits, forked ahead of need, for the next session: another one than before.
        await until(lambda: len(sandboxes.sandboxed(os.getpid())) <= len(before))


# -- the watch of the disk, with a clock and a disk of our own -------------------------------------------------------


class Machine:
    """What `DiskWatch` asks of the system: the time, and what is free on the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.bytes, self.files, self.counts_files = 1 << 40, 1 << 30, True
        self.walks = 0
        self.walk_seconds = 0.0
        walk = usage.DiskWatch._walk

        def counting(watch: usage.DiskWatch, folder: int) -> tuple[int, int]:
            self.walks += 1
            held = walk(watch, folder)
            self.now += self.walk_seconds
            watch._walked, watch._walk_seconds = self.now, self.walk_seconds
            return held

        monkeypatch.setattr(usage.DiskWatch, "_walk", counting)
        monkeypatch.setattr(usage.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(usage.os, "statvfs", self._statvfs)

    def _statvfs(self, _folder: int) -> SimpleNamespace:
        return SimpleNamespace(
            f_bavail=self.bytes // 4096,
            f_frsize=4096,
            f_favail=self.files if self.counts_files else 0,
            f_files=1 << 31 if self.counts_files else 0,
        )

    async def look(self, watch: usage.DiskWatch) -> Overrun | None:
        """A look, and the pause after it."""
        found = await watch.look()
        self.now += watch.pause
        return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "key"
    made.mkdir()
    return made


def watch_of(folder: Path, **limits: int) -> usage.DiskWatch:
    return usage.DiskWatch(folder.parent, folder.name, Limits(**limits))


def write(path: Path, size: int) -> None:
    path.write_bytes(b"x" * size)


async def test_a_disk_that_does_not_change_is_walked_once_and_asked_ever_more_seldom(
    machine: Machine, folder: Path
) -> None:
    watch = watch_of(folder)
    pauses: list[float] = []
    for _ in range(9):
        await machine.look(watch)
        pauses.append(watch.pause)
    assert pauses == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert machine.walks == 1
    machine.bytes -= 4096
    await machine.look(watch)
    assert (watch.pause, machine.walks) == (0.5, 2)
    machine.bytes -= 4096
    await machine.look(watch)
    assert (watch.pause, machine.walks) == (0.5, 2)  # so little is worth a walk from time to time


async def test_what_others_write_to_the_disk_is_not_held_against_a_session(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=MIB, files=10)
    for _ in range(20):
        machine.bytes -= 10 * MIB
        machine.files -= 20
        assert await machine.look(watch) is None
    assert machine.walks == 20


async def test_what_others_free_does_not_hide_what_a_session_takes(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=64 * MIB)
    await machine.look(watch)
    write(folder / "x", 65 * MIB)
    began = machine.now
    machine.bytes += 4096
    while (found := await machine.look(watch)) is None:
        assert machine.now < began + 10
    assert found.limit == "disk"


async def test_a_walk_takes_its_share_of_the_time_and_no_more(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=1000 * MIB)
    machine.walk_seconds = 2.0
    began = machine.now
    while machine.now < began + 200:
        # Worth a walk at every look, and never as much as there was left.
        machine.bytes = watch._free_at_walk[0] - 64 * MIB if machine.walks else machine.bytes
        await machine.look(watch)
    assert machine.walks == 5  # each 2 s, and 40 s after the one before


async def test_a_likely_overrun_is_looked_into_soon_however_long_it_takes(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=64 * MIB)
    await machine.look(watch)
    machine.walk_seconds = 2.0
    machine.bytes -= 8 * MIB
    assert await machine.look(watch) is None
    began = machine.now
    write(folder / "x", 65 * MIB)
    machine.bytes -= 100 * MIB
    while (found := await machine.look(watch)) is None:
        assert machine.now < began + 10
    assert (found.limit, found.bound) == ("disk", 64 * MIB)
    assert 65 * MIB <= found.use < 66 * MIB


async def test_where_files_are_not_counted_every_change_may_be_a_flood(machine: Machine, folder: Path) -> None:
    machine.counts_files = False
    watch = watch_of(folder, files=10)
    await machine.look(watch)
    for number in range(30):
        write(folder / str(number), 0)
    assert await machine.look(watch) is None
    machine.bytes -= 4096
    assert await machine.look(watch) == Overrun("files", 10, 20)  # no further than to be certain


async def test_what_is_shut_to_us_is_laid_to_whom_it_belongs(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "shut").mkdir()
    open_ = os.open

    def refusing(path: str, flags: int, *args: Any, **more: Any) -> int:
        if path == "shut":
            raise PermissionError(13, "Permission denied")
        return open_(path, flags, *args, **more)

    monkeypatch.setattr(usage.os, "open", refusing)
    watch = watch_of(folder, disk=64 * MIB)
    await machine.look(watch)
    machine.bytes -= 30 * MIB
    assert await machine.look(watch) is None
    machine.bytes -= 40 * MIB
    found = await machine.look(watch)
    assert found is not None
    assert found.limit == "disk"
    assert 70 * MIB <= found.use < 71 * MIB


async def test_after_an_excuse_only_what_is_added_counts(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=MIB)
    await machine.look(watch)
    write(folder / "x", 2 * MIB)
    machine.bytes -= 2 * MIB
    watch.excuse()
    for _ in range(5):
        assert await machine.look(watch) is None
    write(folder / "y", 2 * MIB)
    machine.bytes -= 2 * MIB
    found = await machine.look(watch)
    assert found is not None
    assert 4 * MIB <= found.use < 5 * MIB


@pytest.mark.parametrize("way", ["one process", "deleted files"])
async def test_a_session_outlives_a_cell_that_was_ended_for_its_disk(
    tight: CodeExecutionContainer, enter: Callable[..., CodeExecutor], way: str
) -> None:
    async with enter(tight, grace=10) as executor:
        await prepare(executor)
        # What was written between the watch's look and the cell's end is found out behind it.
        code = f"try:\n    {DISK[way][1].replace(chr(10), chr(10) + '    ')}\nfinally:\n    fill(40); kept.append(1)"
        error = await exceed(executor, code)
        assert (error.limit, error.state_kept) == ("disk", True)
        for _ in range(8):
            await executor.execute("time.sleep(0.5)", timeout=SECONDS)
        assert not await is_fresh(executor)
        await executor.execute("for name in os.listdir(): os.remove(name)", timeout=SECONDS)


async def test_a_folder_that_is_gone_or_a_link_holds_nothing(machine: Machine, folder: Path, tmp_path: Path) -> None:
    watch = watch_of(folder)
    os.rmdir(folder)  # noqa: PTH106 - at once
    assert await watch.look() is None
    os.symlink(tmp_path, folder)  # noqa: PTH211
    assert await watch.look() is None
    assert machine.walks == 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are wanted


def walk_of(watch: usage.DiskWatch, folder: Path) -> tuple[int, int]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        return watch._walk(fd)
    finally:
        os.close(fd)


def nest(folder: Path, depth: int, *, comb: bool = False) -> None:
    """Folders in each other, deeper than a path can name; with `comb` another one beside each."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        if comb:
            os.mkdir("a", dir_fd=here)
            os.mkdir("z", dir_fd=here)
        above, here = here, os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(above)
    os.close(os.open("last", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def unnest(folder: Path) -> None:
    """Take it away again; what pytest itself clears away may not be as deep."""
    depth = 0
    above = [os.open(folder, os.O_RDONLY)]
    with contextlib.suppress(FileNotFoundError):
        while True:
            above.append(os.open("d", os.O_RDONLY, dir_fd=above[-1]))
            depth += 1
    for fd in reversed(above):
        for name in os.listdir(fd):  # noqa: PTH208 - there is no path
            if name == "last":
                os.remove(name, dir_fd=fd)
            else:
                os.rmdir(name, dir_fd=fd)
        os.close(fd)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Leave to open as many descriptors as `unnest` needs."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("comb", [False, True])
def test_a_deep_tree_is_counted_whole_and_in_time(folder: Path, many_files: None, *, comb: bool) -> None:
    nest(folder, 1000, comb=comb)
    try:
        watch = watch_of(folder)
        before, began = descriptors(), time.monotonic()
        assert walk_of(watch, folder)[1] == (3001 if comb else 1001)
        assert time.monotonic() - began < 3
        assert descriptors() == before
    finally:
        unnest(folder)


def test_what_lies_deeper_than_any_path_can_name_counts_as_too_much(folder: Path, many_files: None) -> None:
    """A24."""
    nest(folder, 2100)
    try:
        assert walk_of(watch_of(folder, files=50_000), folder)[1] == 100_001
    finally:
        unnest(folder)


def test_a_wide_and_deep_tree_holds_few_descriptors_and_opens_few_folders_twice(
    folder: Path, many_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A24."""
    nest(folder, 400, comb=True)
    opened, most = 0, 0
    open_ = os.open

    def counting(*args: Any, **more: Any) -> int:
        nonlocal opened, most
        opened += 1
        most = max(most, descriptors())
        return open_(*args, **more)

    try:
        before = descriptors()
        monkeypatch.setattr(usage.os, "open", counting)
        walk_of(watch_of(folder), folder)
        monkeypatch.undo()
        # 1200 folders, and a way of up to 400 back to each of 400 that were closed, which serves as many as are kept.
        assert 1200 < opened < 1200 + 400 * 400 / 32
        assert most - before < 40
    finally:
        monkeypatch.undo()
        unnest(folder)


def test_a_hundred_thousand_files_are_counted_in_time() -> None:
    # In memory, where they are made in a second.
    """A24."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        for name in range(10):
            (Path(place) / str(name)).mkdir()
            fd = os.open(f"{place}/{name}", os.O_RDONLY)
            for number in range(10_000):
                os.mknod(str(number), dir_fd=fd)
            os.close(fd)
        watch = watch_of(Path(place))
        began = time.monotonic()
        assert walk_of(watch, Path(place))[1] == 100_010
        assert time.monotonic() - began < 5
        # One that need not know so exactly does not look at all of them.
        began = time.monotonic()
        assert walk_of(watch_of(Path(place), files=100), Path(place))[1] < 500
        assert time.monotonic() - began < 0.5


def test_links_and_odd_things_are_neither_followed_nor_opened(folder: Path) -> None:
    """A14, A18."""
    outside = folder.parent / "outside"
    outside.mkdir()
    write(outside / "large", MIB)
    for name, target in (("up", ".."), ("loop", "loop"), ("self", "."), ("root", "/"), ("out", str(outside))):
        (folder / name).symlink_to(target)
    (folder / "sub").mkdir()
    (folder / "sub" / "back").symlink_to("../sub")
    os.mkfifo(folder / "pipe")  # opening it would wait for ever
    held, count = walk_of(watch_of(folder), folder)
    assert count == 8
    assert held < MIB


def test_a_folder_that_changes_while_it_is_walked_does_no_harm(folder: Path) -> None:
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            for number in range(20):
                place = folder / f"d{number}"
                with contextlib.suppress(OSError):
                    place.mkdir()
                    (place / "x").mkdir()
                    place.rename(folder / f"e{number}")
                    (folder / f"e{number}" / "x").rmdir()
                    (folder / f"e{number}").rmdir()
                    place.symlink_to("/")
                    place.unlink()

    churning = threading.Thread(target=churn)
    churning.start()
    before = descriptors()
    try:
        for _ in range(200):
            assert walk_of(watch_of(folder), folder)[1] <= 60
    finally:
        ended.set()
        churning.join()
    assert descriptors() == before


async def test_unreadable_and_deep_and_looping_folders_do_not_stop_the_watch(
    tight: CodeExecutionContainer, key: str
) -> None:
    async with enter_as(key, tight, grace=10) as executor:
        await prepare(executor)
        code = """
            for mode in (0, 0o300, 0o600):
                os.mkdir(f"m{mode}"); open(f"m{mode}/x", "w").close(); os.chmod(f"m{mode}", mode)
            for name, target in (("up", ".."), ("loop", "loop"), ("root", "/")):
                os.symlink(target, name)
            os.mkfifo("pipe")
            place = "."
            for _ in range(100):
                place += "/d"; os.mkdir(place)
        """
        await executor.execute(textwrap.dedent(code), timeout=SECONDS)
        assert (await exceed(executor, "fill(200, 'd/d'); rest()")).limit == "disk"
        await executor.execute("for mode in (0, 0o300, 0o600): os.chmod(f'm{mode}', 0o700)", timeout=SECONDS)


# -- the watcher's meter, with processes of our own ------------------------------------------------------------------


@dataclass
class Process:
    """A process as the meter sees it; times in clock ticks."""

    own: int = 0
    children: int = 0
    resident: int = 0
    proportional: int = 0


class World:
    """All processes of a session."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: dict[int, Process] = {2: Process()}
        self.deleted = 0
        self.asked_for_shares = 0
        for name in ("_processes", "_ticks", "_resident", "_proportional", "_in_deleted_files"):
            monkeypatch.setattr(guest, name, getattr(self, name))
        monkeypatch.setattr(guest, "_TICKS", 100)
        self._used = SimpleNamespace(ru_utime=0.0, ru_stime=0.0)
        monkeypatch.setattr(guest.resource, "getrusage", self._reaped)

    def reap(self, seconds: float) -> None:
        """The watcher has waited for an orphan that used so much."""
        self._used.ru_utime += seconds

    def _reaped(self, _who: int) -> SimpleNamespace:
        return self._used

    def _processes(self, own: int) -> list[int]:
        return [pid for pid in self.all if pid > own]

    def _ticks(self, pid: int) -> tuple[int, int]:
        return self.all[pid].own, self.all[pid].children

    def _resident(self, pids: list[int]) -> int:
        return sum(self.all[pid].resident for pid in pids)

    def _proportional(self, pid: int) -> int:
        self.asked_for_shares += 1
        return self.all[pid].proportional

    def _in_deleted_files(self, _pids: list[int], _device: int) -> int:
        return self.deleted


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def meter_of(*, memory: int = 1000, cpu: float | None = None, disk: int = 1000) -> guest.Meter:
    return guest.Meter({"memory": memory, "cpu": cpu, "disk": disk}, 1, "/")


def test_a_session_that_sleeps_is_looked_at_ever_more_seldom(world: World) -> None:
    meter = meter_of()
    pauses: list[int] = []
    for _ in range(6):
        meter.look()
        pauses.append(meter.pause)
    assert pauses == [500, 1000, 2000, 2000, 2000, 2000]
    world.all[2].own += 1  # a tick is no sign of life
    meter.look()
    assert meter.pause == 2000
    world.all[2].own += 5
    meter.look()
    assert meter.pause == 250
    meter.look()
    meter.begin_cell()
    assert meter.pause == 250


def test_shares_of_memory_are_asked_for_only_when_it_may_be_too_much(world: World) -> None:
    world.all |= {3: Process(resident=600, proportional=300), 4: Process(resident=400, proportional=300)}
    meter = meter_of(memory=1000)
    assert meter.look() is None
    assert world.asked_for_shares == 0
    world.all[5] = Process(resident=600, proportional=300)
    assert meter.look() is None
    assert world.asked_for_shares == 4
    world.all[5].proportional = 500
    assert meter.look() == guest.Overrun("memory", 1100)


def test_processor_time_counts_from_the_cells_beginning_whoever_used_it(world: World) -> None:
    meter = meter_of(cpu=1.0)
    world.all[2].own = 500
    assert meter.look() is None  # before the first cell
    meter.begin_cell()
    world.all[2].own += 30
    assert meter.look() is None
    world.all[3] = Process(own=30)
    assert meter.look() is None
    del world.all[3]
    world.all[2].children += 30  # it was waited for
    assert meter.look() is None
    world.reap(0.5)
    assert meter.look() == guest.Overrun("cpu", 1.1)


def test_who_goes_on_after_an_overrun_is_told_of_again(world: World) -> None:
    meter = meter_of(cpu=1.0)
    meter.begin_cell()
    found: list[float] = []
    for _ in range(40):
        world.all[2].own += 10
        over = meter.look()
        if over is not None:
            found.append(over.use)
    assert found == [1.1, 1.1, 1.1]


def test_the_time_of_children_whom_nobody_waits_for_is_not_forgotten(world: World) -> None:
    meter = meter_of(cpu=1.0)
    meter.begin_cell()
    found = None
    for pid in range(10, 16):
        world.all[pid] = Process(own=10)
        found = found or meter.look()
        world.all[pid].own = 20
        found = found or meter.look()
        del world.all[pid]
    assert found == guest.Overrun("cpu", 1.1)


def test_the_number_of_a_process_that_has_gone_may_come_again(world: World) -> None:
    meter = meter_of(cpu=10.0)
    meter.begin_cell()
    world.all[3] = Process(own=600)
    meter.look()
    world.all[3] = Process(own=500)
    assert meter.look() == guest.Overrun("cpu", 11.0)


def test_deleted_files_are_told_of_when_there_are_more_of_them(world: World) -> None:
    meter = meter_of(disk=1000)
    world.deleted = 900
    assert meter.look() is None
    world.deleted = 1100
    assert meter.look() == guest.Overrun("disk", 1100)
    assert meter.look() is None
    world.deleted = 1200
    assert meter.look() == guest.Overrun("disk", 1200)


def test_deleted_files_are_found_in_the_processes_that_hold_them(tmp_path: Path) -> None:
    path = tmp_path / "x"
    device = tmp_path.stat().st_dev
    with path.open("wb") as one, path.open("rb"):
        one.write(bytes(MIB) + b"x" * MIB)
        one.flush()
        before = guest._in_deleted_files([os.getpid()], device)
        path.unlink()
        held = guest._in_deleted_files([os.getpid()], device)
        assert 2 * MIB <= held - before < 3 * MIB  # once, though it is open twice
        assert guest._in_deleted_files([os.getpid()], device + 1) < held
    assert guest._in_deleted_files([os.getpid(), 1 << 30], device) == before


def test_a_real_process_is_measured() -> None:
    resident, proportional = guest._resident([os.getpid()]), guest._proportional(os.getpid())
    assert MIB < proportional <= resident * 1.1
    own, _ = guest._ticks(os.getpid())
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert guest._ticks(os.getpid())[0] >= own + 5
    assert guest._ticks(1 << 30) == (0, 0)
    assert guest._proportional(1 << 30) == 0
    assert os.getpid() in guest._processes(1)


# -- what is asked for, and what is told -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 1.5, "1", True, None, 1 << 62, b"1", [1], float("nan")])
@pytest.mark.parametrize("name", [entry.name for entry in fields(Limits) if entry.name not in ("cpu", "wall")])
def test_a_limit_is_a_positive_whole_number(name: str, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="pass a whole number") as caught:
        Limits(**{name: bad})
    assert (caught.value.name, repr(caught.value.value)) == (f"limits.{name}", repr(bad))


@pytest.mark.parametrize("bad", [0, -1, -0.5, "1", True, False, float("nan"), float("inf"), 1e10, [1], b"1"])
@pytest.mark.parametrize("name", ["cpu", "wall"])
def test_a_limit_of_time_is_a_positive_number_of_seconds_or_none(name: str, bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="positive number of seconds, or None") as caught:
        Limits(**{name: bad})
    assert caught.value.name == f"limits.{name}"


def test_limits_that_can_be_kept_are_taken() -> None:
    assert Limits() == Limits(cpu=None, wall=None)
    assert Limits(cpu=1, wall=0.25, disk=1, files=1, file_size=1, pids=8, tmp=MIB).wall == 0.25
    for name, least in (("memory", 256 * MIB), ("pids", 8), ("open_files", 64), ("tmp", MIB), ("shm", 4096)):
        assert getattr(Limits(**{name: least}), name) == least
        with pytest.raises(InvalidArgument, match=f"at least {least}"):
            Limits(**{name: least - 1})


@pytest.mark.parametrize(
    "told",
    [
        *(None, 1, "memory", [], {}, {"limit": "memory"}, {"use": 1}, {"limit": 1, "use": 1}),
        *({"limit": "media", "use": 1}, {"limit": "__class__", "use": 1}, {"limit": "cpu", "use": 1}),
        *({"limit": "memory", "use": use} for use in (True, -1, "1", None, 1 << 62, float("inf"), float("nan"))),
    ],
)
def test_a_guest_that_lies_about_limits_is_not_believed(told: object) -> None:
    """G5."""
    assert read_overrun(told, Limits()) is None


def test_of_what_a_guest_says_the_bound_is_our_own() -> None:
    told = {"limit": "memory", "use": 5, "bound": 7}
    assert read_overrun(told, Limits()) == Overrun("memory", Limits().memory, 5)


def test_an_overrun_says_in_a_sentence_what_it_was() -> None:
    error = LimitExceeded("memory", 256 * MIB, 300 * MIB, state_kept=False)
    assert str(error) == (
        "over the limit memory of 256.0 MiB, with 300.0 MiB in use: the kernel was killed; the session's state is lost"
    )
    error = LimitExceeded("pids", 40, 39, state_kept=True, name="BlockingIOError", value="[Errno 11] no")
    assert str(error).startswith("BlockingIOError: [Errno 11] no; over the limit pids of 40, with 39 in use: ")
    assert "cpu of 0.5 s, with 0.75 s in use" in str(LimitExceeded("cpu", 0.5, 0.75, state_kept=True))


def test_the_command_says_which_limit_it_was(
    capfd: pytest.CaptureFixture[str], workspace_path: Path, engine: str
) -> None:
    code = "kept = []\nwhile True: kept.append(open('/dev/null'))"
    arguments = ["run", "--workspace", str(workspace_path), "--engine", engine]
    assert main([*arguments, "--json", "-c", code]) == ExitCode.LIMIT == 10
    document = json.loads(capfd.readouterr().out)
    assert document["outcome"] == "limit_exceeded"
    assert document["limit"] == {"name": "open_files", "bound": 1024, "use": 1024}
    assert (document["state_kept"], document["error"]["name"]) == (True, "OSError")
    assert main([*arguments, "-c", code]) == ExitCode.LIMIT
    assert "over the limit open_files of 1024, with 1024 in use" in capfd.readouterr().err

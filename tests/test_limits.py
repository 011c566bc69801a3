"""The limits of a whole session: however they are gone over, the outcome says which, by how much, and what is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
import time
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import pytest
import sandboxes
from connections import BY_THE_PORT
from needs import lacking

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
from actbox.sessions import read_overrun

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from actbox.cgroups import Group

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
            reason = "no control groups can be made for sessions here"
            if os.geteuid() == 0:
                lacking(reason)
            pytest.skip(f"{reason}: root can, and who was given a folder of cgroup v2")
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


@pytest.mark.root
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


@pytest.mark.root
@pytest.mark.engines("bubblewrap")
async def test_with_a_control_group_the_system_may_take_the_watcher_too(
    grouped: CodeExecutionContainer, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E3: where nobody is left to say how the kernel ended, the group knows that it was for memory."""
    async with enter_as(key, grouped) as executor:
        await executor.execute("import time", timeout=SECONDS)
        session: Any = executor._session
        group: Group = session._family.group
        watcher, *others = (group._memory / "cgroup.procs").read_text("ascii").split()
        assert others
        cell = await executor.submit("print('begun'); time.sleep(60)")
        async for _ in cell.events(SECONDS):
            break
        monkeypatch.setattr(group, "memory_kills", lambda: 2)
        os.kill(int(watcher), signal.SIGKILL)
        with pytest.raises(LimitExceeded) as caught:
            await cell.result(SECONDS)
        assert (caught.value.limit, caught.value.state_kept) == ("memory", False)
        assert (await executor.execute("1", timeout=SECONDS)).restarted


@pytest.mark.root
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


async def test_a_look_at_the_disk_that_fails_is_not_the_last_one(
    tight: CodeExecutionContainer, key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = 2
    look = usage.DiskWatch._look

    def failing(watch: usage.DiskWatch) -> Overrun | None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RuntimeError("can't start new thread")
        return look(watch)

    monkeypatch.setattr(usage.DiskWatch, "_look", failing)
    async with enter_as(key, tight, grace=10) as executor:
        await prepare(executor)
        # What is there at the first look that succeeds is not this session's.
        await until(lambda: left < -1)
        assert (await exceed(executor, "fill(200); rest()")).limit == "disk"
    assert "could not be looked at" in caplog.text


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

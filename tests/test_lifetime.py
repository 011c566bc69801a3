"""Lifetime: whatever a session starts ends with it, and whatever the host does, nothing of a container survives it.

Processes are followed by descriptors (pidfd), so that the end of one whose parent is gone can be waited for, and no
number can come to mean another. Run as a script, this file is the host process that is killed, interrupted or forgets.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import secrets
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiodocker.containers import DockerContainer, DockerContainers
from sandboxes import children, containers, folders, is_docker, sandboxed

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ExecutionContainer,
    ExecutionError,
    ExecutionTimeout,
    KernelDied,
    SandboxUnavailable,
    WorkspaceError,
    supervision,
)
from actbox.engines import bubblewrap, launcher, stage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    Make = Callable[[], contextlib.AbstractAsyncContextManager[CodeExecutor]]

pytestmark = pytest.mark.anyio

BOUND = 10.0

# --- What is left -----------------------------------------------------------------------------------------------------


def in_use(pid: int) -> set[int]:
    """A program's processes and its sandboxes', less those that wait to become a session.

    Such a one is pid 1 of a nested namespace, and has no child.
    """
    below = children()

    def waits(one: int) -> bool:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{one}/status").read_text(encoding="utf-8", errors="replace")
            numbers = re.search(r"^NSpid:(.*)$", status, re.MULTILINE)
            return numbers is not None and numbers[1].split()[2:] == ["1"] and not below.get(one)
        return False

    return {one for one in sandboxed(pid) if not waits(one)}


@contextlib.contextmanager
def held(pids: Iterable[int]) -> Generator[dict[int, int]]:
    """A descriptor for each process that is there, by which its end can be waited for: {descriptor: pid}."""
    fds: dict[int, int] = {}
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fds[os.pidfd_open(pid)] = pid
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def survivors(fds: dict[int, int], seconds: float = BOUND) -> set[int]:
    """Wait until all have ended; those that have not within the bound."""
    deadline = time.monotonic() + seconds
    waiting = dict(fds)
    poller = select.poll()
    for fd in waiting:
        poller.register(fd, select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poller.poll(left * 1000):
            poller.unregister(fd)
            del waiting[fd]
    return set(waiting.values())


async def none_survives(fds: dict[int, int]) -> bool:
    return await asyncio.to_thread(survivors, fds) == set()


# The processes that a container has before any session: the supervisor, and bubblewrap that waits for it.
ALONE = {"bubblewrap": 2, "docker": 1}


async def nothing_is_left(pid: int, workspace: Path) -> bool:
    """Whether what a program that ended has had with the engine comes to an end too."""
    ends = await until(lambda: containers(pid) == [] and mentioning(str(workspace)) == set())
    return ends and folders(pid) == []


async def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition, within the bound; whether it came to hold."""
    deadline = time.monotonic() + BOUND
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def mentioning(text: str) -> set[int]:
    """The processes of this machine that have `text` in their command line, environment or mounts."""
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ", "mountinfo"):
            with contextlib.suppress(OSError):
                if text.encode() in (folder / name).read_bytes():
                    found.add(int(folder.name))
    return found - {os.getpid()}


def mounts() -> list[str]:
    """Where something is mounted in this process's namespace, of what this process may have mounted.

    Others mount things meanwhile, container engines above all.
    """
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    ours = (tempfile.gettempdir(), *folders(os.getpid()))
    places = [line.split()[4] for line in lines]
    return sorted(place for place in places if place == stage.STAGE or place.startswith(ours))


def connections() -> int:
    """How many sockets of this process are connected to Docker's daemon."""
    found = 0
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - iterdir keeps one open
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as copy:
                    found += is_docker(copy.getpeername())
    return found


def traces() -> dict[str, Any]:
    """What this process has now that containers and sessions could leave behind."""
    gc.collect()
    to_docker = connections()
    return {
        "processes": len(in_use(os.getpid())),
        "descriptors": len(os.listdir("/proc/self/fd")) - to_docker,  # noqa: PTH208 - iterdir keeps one open
        "connections": to_docker,
        "containers": sorted(container.id for container in containers(os.getpid())),
        "mounts": mounts(),
        "folders": folders(os.getpid()),
        "temporary files": sorted(os.listdir(tempfile.gettempdir())),  # noqa: PTH208
        # asyncio's worker threads wait for the next call; the launcher lives as long as the process.
        "threads": sum(not thread.name.startswith(("asyncio_", "actbox-launcher")) for thread in threading.enumerate()),
    }


async def back_to(before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Wait until the traces are as before; those that are not within the bound."""

    def more(now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        # A container that is open meanwhile lets go of connections that it does not need.
        changed = {name for name in before if before[name] != now[name]}
        changed -= {"connections"} if now["connections"] <= before["connections"] else set()
        return {name: (before[name], now[name]) for name in changed}

    await until(lambda: not more(traces()))
    return more(traces())


def open_files() -> dict[int, int]:
    """How many descriptors each process of this machine's sandboxes that are ours has open."""
    found: dict[int, int] = {}
    for pid in in_use(os.getpid()):
        with contextlib.suppress(OSError):
            found[pid] = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    return found


def left_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208


def kept_in(cache: Path) -> list[str]:
    return sorted(str(path) for path in cache.glob("*/*"))


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))  # noqa: PTH208


@pytest.fixture
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes this process's temporary files go to a folder that nobody else writes."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# --- What a session starts --------------------------------------------------------------------------------------------

# Three daemons as a service would start them: new session, second fork, deaf to all signals that can be ignored; the
# second closes every descriptor, the third is stopped.
DAEMONS = """
import os, signal, time
reader, writer = os.pipe()
for number in range(3):
    first = os.fork()
    if first == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(kind, signal.SIG_IGN)
        os.chdir("/")
        os.write(writer, b"x")
        if number == 1:
            os.closerange(0, 1024)
        if number == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            time.sleep(1)
    os.waitpid(first, 0)
count = 0
while count < 3:
    count += len(os.read(reader, 3))
"""


async def _leave_session(executor: CodeExecutor) -> None:
    await executor.disconnect()


async def _die(executor: CodeExecutor) -> None:
    with pytest.raises(KernelDied):
        await executor.execute("import os; os.kill(os.getpid(), 9)")


async def _exit(executor: CodeExecutor) -> None:
    with pytest.raises(KernelDied):
        await executor.execute("import os; os._exit(0)")


async def _be_killed(executor: CodeExecutor) -> None:
    with pytest.raises(ExecutionTimeout) as caught:
        await executor.execute("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", timeout=0.2)
    assert not caught.value.state_kept


async def _close_everything(executor: CodeExecutor) -> None:
    with pytest.raises(KernelDied):
        await executor.execute("import os, time; os.closerange(0, 4096); time.sleep(999)")


ENDINGS = {
    "the session is left": _leave_session,
    "the kernel kills itself": _die,
    "the kernel exits": _exit,
    "the kernel is stopped and killed (E18)": _be_killed,
    "the kernel closes its stream (E17)": _close_everything,
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_daemons_end_with_their_session(container: CodeExecutionContainer, key: str, ending: str) -> None:
    """E13: setsid, a second fork and ignored signals do not keep a process alive."""
    before = in_use(os.getpid())
    async with CodeExecutor(key, container.workspace, container.port, interrupt_grace=0.2) as executor:
        await executor.execute(DAEMONS)
        new = in_use(os.getpid()) - before
        assert len(new) >= 4
        with held(new) as processes:
            await ENDINGS[ending](executor)
            assert await none_survives(processes)
        if ending != "the session is left":
            assert (await executor.execute("print(1)")).text == "1"
    assert await until(lambda: in_use(os.getpid()) <= before)


async def test_daemons_end_with_the_container(workspace_path: Path, engine: str) -> None:
    """E13: and with the container, if that is closed over the session's head."""
    before = in_use(os.getpid())
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    await container.run()
    executor = CodeExecutor("one", container.workspace, container.port)
    await executor.connect()
    await executor.execute(DAEMONS)
    with held(in_use(os.getpid()) - before) as processes:
        assert len(processes) >= 6
        await container.kill()
        assert await none_survives(processes)
    await executor.disconnect()


@pytest.mark.parametrize("command", ["!nohup sleep 998877 >/dev/null 2>&1 &", "%%bash --bg\nsleep 998877"])
async def test_programs_in_the_background_end_with_the_session(make_executor: Make, command: str) -> None:
    """E14: after the session was left, and after its kernel died."""
    before = in_use(os.getpid())
    async with make_executor() as executor:
        for die in (True, False):
            await executor.execute(command)
            assert await until(lambda: len(mentioning("998877") & in_use(os.getpid())) > 0)
            with held(in_use(os.getpid()) - before) as processes:
                if die:
                    await _die(executor)
                else:
                    await executor.disconnect()
                assert await none_survives(processes)
        assert mentioning("998877") & in_use(os.getpid()) == set()


@pytest.mark.parametrize(
    "code", ["input()", "input('name: ')", "import getpass; getpass.getpass()", "import getpass; getpass.getpass('> ')"]
)
async def test_nobody_is_asked(executor: CodeExecutor, code: str) -> None:
    """E24: a question is refused at once, and the state is kept."""
    await executor.execute("x = 42")
    with pytest.raises(ExecutionError) as caught:
        await executor.execute(code, timeout=BOUND)
    assert caught.value.name == "StdinNotImplementedError"
    assert (await executor.execute("print(x)")).text == "42"


async def test_the_hosts_standard_input_is_not_read(executor: CodeExecutor) -> None:
    """E24: what a session reads there is empty."""
    code = "import os, sys; print([os.read(0, 9), sys.__stdin__.read(), os.isatty(0)])"
    assert (await executor.execute(code, timeout=BOUND)).text == "[b'', '', False]"


# --- What the host does -----------------------------------------------------------------------------------------------


async def hold(workspace: str) -> None:
    """Open a container and two sessions whose cells run, and wait for ever."""
    async with (
        CodeExecutionContainer(workspace_path=workspace, preload=(), show_pull_progress=False) as container,
        CodeExecutor("one", container.workspace, container.port) as one,
        CodeExecutor("two", container.workspace, container.port) as two,
    ):
        await two.execute(DAEMONS)
        cells = [
            await one.submit("print('on'); import time; time.sleep(999)"),
            await two.submit("print('on')\nwhile True: pass"),
        ]
        for cell in cells:
            async for _ in cell.stream(999):
                break
        tell("ready")
        await asyncio.Event().wait()


async def forget(workspace: str) -> None:
    """Start a container and a session, and end the program without a word to them."""
    container = CodeExecutionContainer(workspace_path=workspace, preload=(), show_pull_progress=False)
    await container.run()
    executor = CodeExecutor("one", container.workspace, container.port)
    await executor.connect()
    await executor.execute(DAEMONS)
    keep.extend((container, executor))
    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)


async def fork_and_hold(workspace: str) -> None:
    """Like `hold`, with a forked child that outlives this process and holds copies of all its descriptors."""
    async with (
        CodeExecutionContainer(workspace_path=workspace, preload=(), show_pull_progress=False) as container,
        CodeExecutor("one", container.workspace, container.port) as executor,
    ):
        await executor.execute(DAEMONS)
        if os.fork() == 0:
            sys.stdin.readline()
            os._exit(0)
        tell("ready")
        await asyncio.Event().wait()


keep: list[Any] = []


def tell(word: str) -> None:
    os.write(1, f"{word}\n".encode())


@contextlib.contextmanager
def host(task: Callable[[str], Any], workspace: Path, tmp: Path, engine: str) -> Generator[subprocess.Popen[bytes]]:
    """Another process that uses actbox, in a process group of its own, ready."""
    process = subprocess.Popen(
        [sys.executable, "-W", "always::ResourceWarning", __file__, task.__name__, str(workspace)],
        env={**os.environ, "TMPDIR": str(tmp), "ACTBOX_ENGINE": engine},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], BOUND)[0], "the other process is not ready"
        line = process.stdout.readline()
        assert line == b"ready\n", (process.communicate()[1] or b"").decode()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
async def test_nothing_survives_the_host_process(
    workspace_path: Path, own_tmp: Path, engine: str, death: signal.Signals
) -> None:
    """E20: no process, no container, no mount, no temporary file."""
    shm = shared_memory()
    with host(hold, workspace_path, own_tmp, engine) as process, held(in_use(process.pid)) as processes:
        # The supervisor, for each session a watcher and a kernel, and the daemons; and bubblewrap, where it is used.
        assert len(processes) == ALONE[engine] + 7
        os.kill(process.pid, death)
        assert await none_survives(processes)
        assert process.wait(BOUND) == -death
        assert await nothing_is_left(process.pid, workspace_path)
    assert left_in(own_tmp) == []
    assert await until(lambda: shared_memory() <= shm)


async def test_nothing_survives_though_a_child_of_the_host_does(
    workspace_path: Path, own_tmp: Path, engine: str
) -> None:
    """E20: a forked child holds the other ends of all sockets, so their end alone would not be enough."""
    with host(fork_and_hold, workspace_path, own_tmp, engine) as process:
        below = children()[process.pid]
        (child,) = mentioning(fork_and_hold.__name__) & set(below)
        with held(in_use(process.pid) - {child}) as processes:
            assert len(processes) == ALONE[engine] + 5
            process.kill()
            assert await none_survives(processes)
        process.wait(BOUND)
        with held([child]) as processes:
            assert survivors(processes, 0) == {child}


async def test_ctrl_c_leaves_nothing(workspace_path: Path, own_tmp: Path, engine: str) -> None:
    """E14: Ctrl-C in a terminal goes to the whole process group; contexts are left, and nothing is left behind."""
    with host(hold, workspace_path, own_tmp, engine) as process, held(sandboxed(process.pid)) as processes:
        assert processes
        os.killpg(process.pid, signal.SIGINT)
        _, complaint = await asyncio.to_thread(process.communicate, timeout=BOUND)
        assert process.returncode == -signal.SIGINT
        assert b"KeyboardInterrupt" in complaint
        assert b"ResourceWarning" not in complaint
        assert b"never retrieved" not in complaint
        assert await none_survives(processes)
    # The contexts were left: what was theirs is gone before the program is.
    assert containers(process.pid) == []
    assert await nothing_is_left(process.pid, workspace_path)
    assert left_in(own_tmp) == []


async def test_a_program_that_forgets_its_container_leaves_nothing(
    workspace_path: Path, own_tmp: Path, engine: str
) -> None:
    """E20: the end of the interpreter is enough."""
    with host(forget, workspace_path, own_tmp, engine) as process, held(in_use(process.pid)) as processes:
        assert len(processes) == ALONE[engine] + 5
        await asyncio.to_thread(process.communicate, b"\n", BOUND)
        assert process.returncode == 0
        assert await none_survives(processes)
    assert await nothing_is_left(process.pid, workspace_path)
    assert left_in(own_tmp) == []


def test_a_container_outlives_the_thread_that_started_it(
    workspace_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E21: the signal that ends it with its parent is tied to a thread, which must not be the caller's."""
    monkeypatch.setattr(launcher, "_launcher", launcher._Launcher())
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    executors: list[CodeExecutor] = []
    loop = asyncio.new_event_loop()

    async def start() -> None:
        await container.run()
        executors.append(CodeExecutor("one", container.workspace, container.port))
        await executors[0].connect()

    async def use_and_close() -> None:
        assert (await executors[0].execute("print(42)")).text == "42"
        async with CodeExecutor("two", container.workspace, container.port) as other:
            assert (await other.execute("print(43)")).text == "43"
        with held(in_use(os.getpid()) - before) as processes:
            assert len(processes) == ALONE[engine] + 2
            await executors[0].disconnect()
            await container.kill()
            assert await none_survives(processes)

    before = in_use(os.getpid())
    thread = threading.Thread(target=lambda: loop.run_until_complete(start()))
    thread.start()
    thread.join(BOUND)
    assert not thread.is_alive()
    try:
        # The kernel sends that signal before it lets go of the thread.
        assert loop.run_until_complete(until(lambda: not Path(f"/proc/self/task/{thread.native_id}").exists()))
        loop.run_until_complete(use_and_close())
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def test_many_sessions_leave_no_growth(container: CodeExecutionContainer, own_tmp: Path) -> None:
    """E22: on the host, and in the supervisor that forks them."""

    async def cycle(number: int) -> None:
        async with CodeExecutor(f"cycle-{number % 3}", container.workspace, container.port) as executor:
            code = "import subprocess; subprocess.Popen(['sleep', '99'])" if number % 2 else "print(1)"
            await executor.execute(code)
            if number % 5 == 0:
                with pytest.raises(KernelDied):
                    await executor.execute("import os; os._exit(1)")
                await executor.execute("print(1)")

    await cycle(0)
    before = traces()
    # With the session in store, whose end the supervisor holds.
    assert await until(lambda: sandboxed(os.getpid()) > in_use(os.getpid()))
    inside = open_files()
    for number in range(30):
        await cycle(number)
    assert await back_to(before) == {}
    assert await until(lambda: open_files() == inside)


async def test_many_containers_leave_no_growth(workspace_path: Path, engine: str, own_tmp: Path) -> None:
    """E22: processes, descriptors, mounts, temporary files, threads."""

    async def cycle() -> None:
        async with CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container:
            async with CodeExecutor("one", container.workspace, container.port) as executor:
                assert (await executor.execute("print(1)")).text == "1"
            # One that is open when the container goes.
            other = CodeExecutor("two", container.workspace, container.port)
            await other.connect()
        await other.disconnect()

    await cycle()
    before = traces()
    for _ in range(5):
        await cycle()
    assert await back_to(before) == {}


async def test_an_exception_in_the_context_leaves_nothing(workspace_path: Path, engine: str, own_tmp: Path) -> None:
    """E14: leaving by an exception, with a cell that runs."""
    before = traces()

    async def fail() -> None:
        async with (
            CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container,
            CodeExecutor("one", container.workspace, container.port) as executor,
        ):
            await executor.execute(DAEMONS)
            await executor.submit("while True: pass")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await back_to(before) == {}


async def test_cancellation_leaves_nothing(workspace_path: Path, engine: str, own_tmp: Path) -> None:
    """E14: the task that holds the contexts is cancelled while it waits for a cell."""
    before = traces()
    running = asyncio.Event()

    async def work() -> None:
        async with (
            CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container,
            CodeExecutor("one", container.workspace, container.port) as executor,
        ):
            await executor.execute(DAEMONS)
            execution = await executor.submit("print('on')\nwhile True: pass")
            async for _ in execution.stream():
                running.set()

    task = asyncio.create_task(work())
    await asyncio.wait_for(running.wait(), BOUND)
    task.cancel()
    await asyncio.wait([task], timeout=BOUND)
    assert task.cancelled()
    assert await back_to(before) == {}


async def _cancel_starts(workspace_path: Path, engine: str, reached: threading.Event, go: threading.Event) -> None:
    """Cancel some starts once `reached` is set, and then let them go on."""
    for _ in range(3):
        reached.clear()
        go.clear()
        starting = asyncio.create_task(
            CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()).run()
        )
        assert await until(reached.is_set)
        starting.cancel()
        await asyncio.sleep(0)
        go.set()
        await asyncio.wait([starting], timeout=BOUND)
        assert starting.cancelled()
        del starting


@pytest.mark.engines("bubblewrap")
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_start_that_is_cancelled_leaves_nothing(
    workspace_path: Path, engine: str, own_tmp: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while a thread starts bubblewrap: just before it is there, and just after."""
    reached, go = threading.Event(), threading.Event()
    real = launcher.spawn

    def spawn(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        process = real(*args, **kwargs) if moment == "after" else None
        reached.set()
        assert go.wait(BOUND)
        return process or real(*args, **kwargs)

    async with CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()):
        pass  # whatever is made once for all is made
    before = traces()
    monkeypatch.setattr(launcher, "spawn", spawn)
    await _cancel_starts(workspace_path, engine, reached, go)
    assert await back_to(before) == {}


@pytest.mark.engines("docker")
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["create", "show", "start"])
async def test_a_start_that_is_cancelled_leaves_no_container(
    workspace_path: Path, engine: str, own_tmp: Path, step: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while the daemon is asked: just before it has done it, and just after."""
    reached, go = threading.Event(), threading.Event()
    place = DockerContainers if step == "create" else DockerContainer
    real = getattr(place, step)

    async def ask(*args: Any, **kwargs: Any) -> Any:
        answer = await real(*args, **kwargs) if moment == "after" else None
        assert folders(os.getpid()) != []
        reached.set()
        assert await asyncio.to_thread(go.wait, BOUND)
        return answer if moment == "after" else await real(*args, **kwargs)

    before = traces()
    monkeypatch.setattr(place, step, ask)
    await _cancel_starts(workspace_path, engine, reached, go)
    assert await back_to(before) == {}


async def test_a_session_that_is_cancelled_while_it_starts_leaves_nothing(
    container: CodeExecutionContainer, key: str, own_tmp: Path
) -> None:
    """At each of the first steps of connecting."""
    async with CodeExecutor(key, container.workspace, container.port):
        pass
    before = traces()
    for steps in range(12):
        connecting = asyncio.create_task(CodeExecutor(key, container.workspace, container.port).connect())
        for _ in range(steps):
            await asyncio.sleep(0)
        connecting.cancel()
        await asyncio.wait([connecting], timeout=BOUND)
        assert connecting.cancelled()
        del connecting
    assert await back_to(before) == {}


# --- A sandbox that cannot be set up ----------------------------------------------------------------------------------

# What the script in bubblewrap's place does: BWRAP is the real one, TOKEN marks whatever it starts.
BROKEN = {
    "unknown option": 'exec BWRAP --setenv TOKEN 1 --no-such-option "$@"',
    "missing source": 'exec BWRAP --setenv TOKEN 1 --ro-bind /TOKEN /x "$@"',
    "bad status descriptor": 'exec BWRAP --setenv TOKEN 1 --json-status-fd 999 "$@"',
    "bad filter": 'exec BWRAP --setenv TOKEN 1 --seccomp 0 "$@"',
    "destination under a file": 'exec BWRAP --setenv TOKEN 1 --ro-bind /dev/null /x --dir /x/y "$@"',
    "no word": "exit 1",
    "killed": "kill -9 $$",
    "another program": "exec BWRAP --setenv TOKEN 1 --ro-bind / / -- /bin/false",
    "words": "echo hello; echo 'bwrap: something: else' >&2; exit 3",
}


def script(tmp_path: Path, body: str) -> tuple[Path, str]:
    """A program in bubblewrap's place, executable by whomever root becomes, and the mark of what it starts."""
    token = f"actbox-test-{secrets.token_hex(8)}"
    real = bubblewrap.find_bwrap().path
    body = body.replace("BWRAP", str(real)).replace("TOKEN", token)
    path = tmp_path / "bwrap"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {real} "$@"\n{body}\n', encoding="utf-8")
    path.chmod(0o755)
    return path, token


@pytest.mark.engines("bubblewrap")
@pytest.mark.usefixtures("container")  # it has the environment prepared
@pytest.mark.parametrize("kind", BROKEN)
async def test_a_sandbox_that_cannot_be_set_up_is_told_and_leaves_no_process(
    kind: str, workspace_path: Path, tmp_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E25: at once, whichever step fails; a child that bubblewrap left in its set-up is ended too."""
    path, token = script(tmp_path, BROKEN[kind])
    before = traces()
    monkeypatch.setenv("ACTBOX_BWRAP", str(path))
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    try:
        with pytest.raises(SandboxUnavailable) as caught:
            async with asyncio.timeout(BOUND):
                await container.run()
        assert caught.value.detail
        assert caught.value.remedy
        assert await until(lambda: mentioning(token) == set())
        assert await back_to(before) == {}
    finally:
        await container.kill()
        for pid in mentioning(token):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.engines("bubblewrap")
@pytest.mark.usefixtures("container")  # as above
async def test_a_sandbox_that_never_comes_up_is_given_up(
    workspace_path: Path, tmp_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E25: a program that neither starts the supervisor nor ends."""
    path, token = script(tmp_path, "exec sleep 99 # TOKEN")
    before = traces()
    monkeypatch.setenv("ACTBOX_BWRAP", str(path))
    monkeypatch.setattr(supervision, "_READY_SECONDS", 0.5)
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    with pytest.raises(SandboxUnavailable):
        await container.run()
    assert mentioning(token) == set()
    assert await back_to(before) == {}


async def test_a_first_start_prepares_the_environment_and_leaves_nothing_else(
    workspace_path: Path, tmp_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E22: what is made once for all is whole, and the second start finds it."""
    monkeypatch.setenv("ACTBOX_CACHE_DIR", str(tmp_path / "cache"))
    made: list[list[str]] = []
    for _ in range(2):
        before = traces()
        async with (
            CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container,
            CodeExecutor("one", container.workspace, container.port) as executor,
        ):
            assert (await executor.execute("print(1)")).text == "1"
        assert await back_to(before) == {}
        made.append(kept_in(tmp_path / "cache"))
    assert len(made[0]) <= 1  # none, where nothing had to be prepared
    assert made[0] == made[1]


@pytest.mark.engines("bubblewrap")
async def test_a_preparation_that_fails_leaves_nothing(
    workspace_path: Path, tmp_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E25: no process and no half-made folder."""
    path, token = script(tmp_path, BROKEN["bad status descriptor"])
    before = traces()
    monkeypatch.setenv("ACTBOX_BWRAP", str(path))
    monkeypatch.setenv("ACTBOX_CACHE_DIR", str(tmp_path / "cache"))
    try:
        with pytest.raises(SandboxUnavailable):
            await CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()).run()
        assert await until(lambda: mentioning(token) == set())
        assert await back_to(before) == {}
        assert kept_in(tmp_path / "cache") == []
    finally:
        for pid in mentioning(token):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("readonly", [True, False])
async def test_a_folder_that_vanishes_before_the_start_is_told(
    tmp_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch, *, readonly: bool
) -> None:
    """E25: between the host's look at it and the mount."""
    folder = tmp_path / "data"

    def vanish(_container: ExecutionContainer) -> None:
        folder.mkdir()
        folder.rmdir()

    before = traces()
    monkeypatch.setattr(ExecutionContainer, "prepare_folders", vanish)
    binds = {str(folder): "data"}
    container = ExecutionContainer(binds=binds, engine=engine, preload=(), readonly=["data"] if readonly else ())
    with pytest.raises((SandboxUnavailable, WorkspaceError)) as caught:
        await container.run()
    assert "data" in str(caught.value)
    if isinstance(caught.value, SandboxUnavailable):
        assert re.fullmatch("[a-z -]+", caught.value.layer)
    assert await back_to(before) == {}


if __name__ == "__main__":
    asyncio.run({"hold": hold, "forget": forget, "fork_and_hold": fork_and_hold}[sys.argv[1]](sys.argv[2]))

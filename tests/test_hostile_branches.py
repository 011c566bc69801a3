"""Branches that would harm the others, outlive them, or tell the host something false: it ends typed, and in time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import pytest
from branches import COUNT, DEAF, SLEEP, begun, prints, value
from docker_tools import until
from test_lifetime import mentioning

from actbox import (
    CodeExecutionContainer,
    ExecutionClient,
    ExecutionContainer,
    ExecutionError,
    ExecutionLost,
    ExecutionTimeout,
    ForkRefused,
    KernelDied,
    LimitExceeded,
    Limits,
    ProtocolError,
    SessionBroken,
    local_session,
)
from actbox import family as families

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

BOUND = 15.0
ENDINGS = (KernelDied, ExecutionLost, ExecutionTimeout, LimitExceeded, ProtocolError)


@pytest.fixture(params=[False, True], ids=["nested", "separate"])
async def family(request: pytest.FixtureRequest, engine: str) -> AsyncIterator[list[ExecutionClient]]:
    """A session and two branches of it, with no room for many processes."""
    limits = Limits(pids=48)
    async with (
        ExecutionContainer(
            engine=engine, preload=(), limits=limits, separate=request.param, show_pull_progress=False
        ) as own,
        ExecutionClient(own.port, interrupt_grace=0.3) as first,
    ):
        await first.execute("import os, signal; x = 1")
        async with await first.fork() as one, await first.fork() as other:
            yield [first, one, other]


@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(-1, 9); os._exit(1)",
        "os.kill(os.getppid(), 9)",
        "os.kill(os.getppid(), signal.SIGSTOP)",
        "[os.kill(pid, 9) for pid in map(int, filter(str.isdigit, os.listdir('/proc'))) if pid != os.getpid()]",
        "while True:\n    try: os.fork()\n    except OSError: pass",
        "while True: os.write(1, b'x' * 65536)",
        "os.closerange(3, 200)",
    ],
    ids=["kills all", "kills the watcher", "stops the watcher", "kills by number", "fork bomb", "flood", "closes all"],
)
async def test_whatever_a_branch_does_to_the_others_all_cells_end(family: list[ExecutionClient], attack: str) -> None:
    first, one, other = family
    await first.checkpoint("good")
    cells = [await each.submit(DEAF) for each in (first, other)]
    for cell in cells:
        await begun(cell)
    began = time.monotonic()
    with contextlib.suppress(ExecutionError, *ENDINGS):
        await one.execute(f"try:\n    {attack.replace(chr(10), chr(10) + '    ')}\nexcept OSError: pass", timeout=1)
    for cell in cells:
        with pytest.raises(ENDINGS):
            await cell.result(timeout=0.5)
    assert time.monotonic() - began < BOUND
    # Each gets a session again, its own or a fresh one, and the checkpoint is there or said to be missing.
    for each in family:
        assert (await each.execute("print(7)", timeout=BOUND)).text == "7"


HELD = """
from actbox_guest.guest import branching
import os, sys
def fork():
    sockets = sys._getframe(1).f_locals['sockets']
    if os.fork() == 0:
        os.setsid()
        if os.fork(): os._exit(0)
        sockets.stream.close()
        os.set_inheritable(sockets.kin.fileno(), True)
        os.execvp('sleep', ['sleep', '%d'])
    return False
branching.fork = fork
"""


async def test_who_holds_the_sockets_of_a_kernel_that_never_comes_does_not_outlive_the_session(
    container: CodeExecutionContainer,
) -> None:
    seconds = 100_000 + time.time_ns() % 100_000
    async with ExecutionClient(container.port) as client:
        await client.execute(HELD % seconds)
        with pytest.raises(ForkRefused):
            await client.fork()
        assert await value(client, "1") == "1"
        assert mentioning(f"{seconds}")
    assert await until(lambda: not mentioning(f"{seconds}"))


@pytest.mark.parametrize(
    "lie",
    [
        "pass",
        "os.fork() or sockets.kin.send(b'here') and os._exit(0)",
        "sockets.kin.send(b''); sockets.kin.send(b'x' * 9000)",
        "sockets.stream.sendall(b'x' * 100_000)",
    ],
    ids=["nobody comes", "who says so is gone", "noise to the watcher", "noise to the host"],
)
async def test_a_fork_that_is_only_claimed_makes_no_branch(client: ExecutionClient, lie: str) -> None:
    await client.execute(
        "from actbox_guest.guest import branching\nimport os, sys\n"
        f"def fork():\n    sockets = sys._getframe(1).f_locals['sockets']\n    {lie}\n    return False\n"
        "real, branching.fork = branching.fork, fork\nx = 1"
    )
    with pytest.raises((ForkRefused, SessionBroken)):
        await asyncio.wait_for(client.fork(), BOUND)
    await client.execute("branching.fork = real" if await value(client, "'x' in globals()") == "True" else "x = 1")
    async with await client.fork() as branch:
        assert await value(branch, "x") == "1"


async def test_a_branch_has_none_of_its_parents_streams(client: ExecutionClient) -> None:
    await client.execute(
        "import os\ndef links():\n    found = []\n    for fd in os.listdir('/proc/self/fd'):\n"
        "        try: found.append(os.readlink(f'/proc/self/fd/{fd}'))\n        except OSError: pass\n"
        "    return sorted(link for link in found if link.startswith(('socket', 'pipe')))"
    )
    async with await client.fork() as one, await client.fork() as other:
        held = [set((await value(each, "links()")).strip("[]").split(", ")) for each in (client, one, other)]
    assert all(held)
    assert not held[0] & held[1]
    assert not held[0] & held[2]
    assert not held[1] & held[2]


async def test_a_stopped_watcher_keeps_no_cell_from_ending(
    engine: str, change_guest: Callable[[str, str, str], None]
) -> None:
    # Where the system has no Landlock of ABI 6 a session in a sandbox of its own can signal its watcher.
    change_guest("session.py", r"            domain\.enter\(\)\n", "            pass\n")
    async with (
        ExecutionContainer(engine=engine, preload=(), separate=True, show_pull_progress=False) as own,
        ExecutionClient(own.port, interrupt_grace=0.3) as client,
    ):
        await client.execute("x = 1")
        async with await client.fork() as branch:
            waiting = await client.submit(SLEEP)
            await begun(waiting)
            cell = await branch.submit(f"import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\n{DEAF}")
            await begun(cell)
            with pytest.raises(ENDINGS):
                await cell.result(timeout=0.5)
            with pytest.raises(ENDINGS):
                await waiting.result(timeout=0.5)
            for each in (client, branch):
                assert (await each.execute("print(7)")).text == "7"


async def test_where_the_watcher_is_stopped_nobody_of_the_family_goes_on(
    engine: str, change_guest: Callable[[str, str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_guest("session.py", r"            domain\.enter\(\)\n", "            pass\n")
    monkeypatch.setattr(local_session, "_HEED_SECONDS", 0.5)
    monkeypatch.setattr(families, "_WORD_SECONDS", 0.5)
    async with (
        ExecutionContainer(engine=engine, preload=(), separate=True, show_pull_progress=False) as own,
        ExecutionClient(own.port, interrupt_grace=0.3) as client,
    ):
        session = client._session
        assert session is not None
        async with await client.fork() as branch:
            with pytest.raises(ENDINGS):
                await branch.execute(f"import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\n{DEAF}", timeout=0.5)
            assert await until(lambda: session.ended)
            assert (await client.execute("print(7)")).restarted


async def test_nothing_of_a_fork_bomb_goes_on_after_its_branch(engine: str) -> None:
    async with (
        ExecutionContainer(engine=engine, preload=(), limits=Limits(pids=100), show_pull_progress=False) as own,
        ExecutionClient(own.port, interrupt_grace=0.3) as client,
    ):
        before = await value(client, COUNT)
        # What is forked between a look and a kill is a matter of chance.
        for _ in range(2):
            async with await client.fork() as branch:
                with contextlib.suppress(ExecutionError, *ENDINGS):
                    await branch.execute(
                        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", timeout=0.5
                    )
            assert await until(lambda: prints(client, COUNT, before))

"""Forks of a session: copies that go on by themselves, checkpoints to go back to, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from branches import COUNT, SLEEP, prints, value
from docker_tools import until
from needs import lacking

from actbox import (
    CallLimits,
    CodeExecutionContainer,
    CodeExecutor,
    ExecutionClient,
    ExecutionContainer,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionLost,
    ExecutionTimeout,
    ForkRefused,
    InvalidArgument,
    KernelDied,
    LimitExceeded,
    Limits,
    SandboxUnavailable,
    SessionBroken,
    StateError,
    family,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

BOUND = 15.0


# -- branches --------------------------------------------------------------------------------------------------------


async def test_a_branch_has_the_state_and_both_go_on_alone(client: ExecutionClient) -> None:
    await client.execute("import math\nx = [1]\ndef f(): return sum(x) * math.pi")
    async with await client.fork() as branch:
        assert await value(branch, "x, round(f(), 2)") == "[1] 3.14"
        await branch.execute("x.append(2); y = 1")
        await client.execute("x.append(3)")
        assert await value(branch, "x, 'y' in globals()") == "[1, 2] True"
        assert await value(client, "x, 'y' in globals()") == "[1, 3] False"
    assert await value(client, "x") == "[1, 3]"


async def test_a_branch_counts_and_names_its_cells_as_the_session_did(client: ExecutionClient) -> None:
    await client.execute("1")
    last = await client.execute("41")
    async with await client.fork() as branch:
        assert (await branch.execute("_ + 1")).text == "42"
        assert (await branch.execute("1")).execution_count == last.execution_count + 2
        with pytest.raises(ExecutionError, match="ZeroDivisionError"):
            await branch.execute("1/0")


async def test_each_has_a_stream_of_its_own(client: ExecutionClient) -> None:
    async with await client.fork() as branch:
        both = await asyncio.gather(
            *(one.execute("import os; print(os.getpid()); os.system('echo from a child')") for one in (client, branch))
        )
    first, second = ((result.text or "").splitlines() for result in both)
    assert first[1:] == second[1:] == ["from a child", "0"]
    assert first[0] != second[0]


async def test_random_numbers_differ_between_branches(client: ExecutionClient) -> None:
    draw = "import random, uuid; drawn = (random.random(), uuid.uuid1().hex, uuid.uuid4().hex)"
    await client.execute(draw)
    try:
        await client.execute("import numpy as np; np.random.seed(1)")
        draw += "; drawn += (np.random.rand(),)"
    except ExecutionError:
        pass
    async with await client.fork() as one, await client.fork() as other:
        for each in (client, one, other):
            await each.execute(draw)
        drawn = [json.loads(await value(each, "__import__('json').dumps(drawn)")) for each in (client, one, other)]
    for position in range(len(drawn[0])):
        assert len({numbers[position] for numbers in drawn}) == 3


async def test_many_branches_of_one_parent_work_at_once(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port) as client:
        await client.execute("data = list(range(100_000))")
        branches = [await client.fork() for _ in range(32)]
        try:
            results = await asyncio.gather(
                *(branch.execute(f"print(sum(data) + {number})") for number, branch in enumerate(branches))
            )
            assert [result.text for result in results] == [str(4999950000 + number) for number in range(32)]
        finally:
            await asyncio.gather(*(branch.disconnect() for branch in branches))
        assert await value(client, "len(data)") == "100000"


async def test_a_branch_of_a_branch_outlives_both(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port) as client:
        await client.execute("x = 1")
        child = await client.fork()
        await child.execute("x = 2")
        grandchild = await child.fork()
    await child.disconnect()
    async with grandchild:
        assert await value(grandchild, "x") == "2"


async def test_a_branch_shares_memory_until_it_writes(container: CodeExecutionContainer) -> None:
    own = """
def own():
    kinds = ('Private_Clean:', 'Private_Dirty:')
    with open('/proc/self/smaps_rollup') as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(kinds))
"""
    async with ExecutionClient(container.port) as client:
        await client.execute(f"block = bytearray(b'x') * (256 << 20)\n{own}")
        async with await client.fork() as branch:
            assert int(await value(branch, "own()")) < 50 << 10
            await branch.execute("block[:] = bytes(len(block))")
            assert int(await value(branch, "own()")) > 250 << 10
            assert await value(client, "block[0], block[-1]") == "120 120"


async def test_files_and_processes_are_shared(container: CodeExecutionContainer, key: str) -> None:
    async with CodeExecutor(key, container.workspace, container.port) as executor:
        await executor.execute("open('mine', 'w').write('1')")
        async with await executor.fork() as branch:
            await branch.execute("open('mine', 'w').write('2')")
            assert await value(executor, "open('mine').read()") == "2"
            assert await value(branch, "__import__('os').getcwd()") == await value(
                executor, "__import__('os').getcwd()"
            )
            assert branch.working_dir == executor.working_dir


async def test_the_watcher_is_the_parent_of_every_kernel(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port) as client, await client.fork() as branch, await branch.fork() as leaf:
        for each in (client, branch, leaf):
            assert await value(each, "__import__('os').getppid()") == "1"


# -- what cannot be copied -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (
            "import threading, time\nthreading.Thread(target=time.sleep, args=(99,), name='my worker').start()",
            "my worker",
        ),
        (
            (
                "import _thread, time\nbegun = []\n"
                "def wait():\n    begun.append(1)\n    while True: time.sleep(0.01)\n"
                "_thread.start_new_thread(wait, ())\nwhile not begun: time.sleep(0.01)"
            ),
            "the thread [0-9]+, which has no name",
        ),
        ("import subprocess\nchild = subprocess.Popen(['sleep', '99'])", "subprocess [0-9]+ \\(sleep\\)"),
        (
            "import asyncio\nwaiting = asyncio.create_task(asyncio.sleep(99), name='my task')\nawait asyncio.sleep(0)",
            "my task",
        ),
    ],
    ids=["thread", "nameless thread", "subprocess", "task"],
)
async def test_what_a_copy_would_miss_is_refused_by_name_unless_forced(
    client: ExecutionClient, code: str, named: str
) -> None:
    await client.execute(code)
    await client.execute("x = 1")
    with pytest.raises(ForkRefused, match=named):
        await client.fork()
    with pytest.raises(ForkRefused, match=named):
        await client.checkpoint("one")
    assert await value(client, "x") == "1"
    async with await client.fork(force=True) as branch:
        assert await value(branch, "x") == "1"
        assert (await branch.execute("import asyncio\nawait asyncio.sleep(0, 5)")).text == "5"
        async with await branch.fork() as leaf:
            assert await value(leaf, "x") == "1"


async def test_threads_and_children_that_have_ended_are_no_reason(client: ExecutionClient) -> None:
    await client.execute("import threading, subprocess\nt = threading.Thread(target=int); t.start(); t.join()")
    await client.execute("subprocess.run(['true'], check=True)\nimport asyncio\nawait asyncio.sleep(0)")
    await client.execute(
        "import os\nchild = os.fork()\nif child == 0: os._exit(0)\nos.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)"
    )
    async with await client.fork() as branch:
        assert await value(branch, "1") == "1"


async def test_a_limit_of_processes_refuses_a_fork_by_its_name(engine: str, tmp_path: Path) -> None:
    async with (
        ExecutionContainer(
            engine=engine,
            preload=(),
            limits=Limits(pids=16),
            binds={str(tmp_path / "b"): "b"},
            show_pull_progress=False,
        ) as own,
        ExecutionClient(own.port) as client,
    ):
        await client.execute("x = 1")
        branches: list[ExecutionClient] = []
        with pytest.raises(LimitExceeded) as caught:  # noqa: PT012 - one of them refuses
            for _ in range(20):
                branches.append(await client.fork())  # noqa: PERF401 - what was made before is kept
        assert caught.value.limit == "pids"
        assert 2 <= len(branches) <= 16
        assert await value(client, "x") == "1"
        await asyncio.gather(*(branch.disconnect() for branch in branches))
        async with await client.fork() as branch:
            assert await value(branch, "x") == "1"


@pytest.fixture
async def bounded(engine: str) -> AsyncIterator[ExecutionClient]:
    """A session of little memory and processor time."""
    limits = Limits(memory=320 << 20, cpu=1.5)
    async with (
        ExecutionContainer(engine=engine, preload=(), limits=limits, show_pull_progress=False) as own,
        ExecutionClient(own.port) as made,
    ):
        yield made


async def test_memory_is_bounded_for_all_together_and_who_runs_pays(bounded: ExecutionClient) -> None:
    take = "held = bytearray(b'x') * (150 << 20)"
    async with await bounded.fork() as first, await bounded.fork() as second:
        await first.execute(take)
        with pytest.raises(LimitExceeded) as caught:
            await second.execute(
                f"{take}\nmore = bytearray(b'x') * (50 << 20)\nimport time; time.sleep(99)", timeout=BOUND
            )
        assert caught.value.limit == "memory"
        assert not caught.value.state_kept
        assert await value(first, "len(held)") == str(150 << 20)
        assert (await second.execute("print(1)")).restarted


async def test_processor_time_is_each_branchs_own(bounded: ExecutionClient) -> None:
    burn = "import time\nwhile time.process_time() < {}: pass"
    async with await bounded.fork() as busy, await bounded.fork() as idle:
        quiet = await idle.submit("import time; time.sleep(3)")
        with pytest.raises(LimitExceeded) as caught:
            await busy.execute(burn.format(99), timeout=BOUND)
        assert caught.value.limit == "cpu"
        assert caught.value.state_kept
        await quiet.result(BOUND)
        # What a cell uses counts from its own beginning.
        await idle.execute("import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass")
        await idle.execute("end = time.process_time() + 1\nwhile time.process_time() < end: pass")


# -- how they end ----------------------------------------------------------------------------------------------------


async def test_the_death_of_one_is_none_of_the_others(client: ExecutionClient) -> None:
    await client.execute("x = 1")
    async with await client.fork() as branch, await client.fork() as other:
        with pytest.raises(KernelDied) as died:
            await branch.execute("import os; print('last words'); os._exit(7)")
        assert died.value.exit_code == 7
        assert died.value.text == "last words"
        with pytest.raises(KernelDied) as killed:
            await client.execute("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert killed.value.signal == signal.SIGKILL
        assert await value(other, "x") == "1"
        # A session of its own is given to whoever lost theirs.
        assert await value(branch, "'x' in globals()") == "False"
        assert (await client.execute("1")).restarted


async def test_interrupts_and_timeouts_reach_the_one_they_are_for(client: ExecutionClient) -> None:
    async with await client.fork() as branch:
        cell, other = await branch.submit(SLEEP), await client.submit(SLEEP)
        for each in (cell, other):
            async for _ in each.stream(BOUND):
                break
        await cell.interrupt()
        with pytest.raises(ExecutionInterrupted):
            await cell.result(BOUND)
        assert other.outcome is None
        await other.interrupt()
        with pytest.raises(ExecutionTimeout) as late:
            await branch.execute(SLEEP, timeout=0.3)
        assert late.value.state_kept
        assert await value(client, "1") == "1"


async def test_a_deaf_branch_is_killed_and_its_children_with_it(container: CodeExecutionContainer) -> None:
    deaf = (
        "import os, signal, subprocess, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '876'])\nprint(child.pid)\nwhile True: time.sleep(9)"
    )
    async with ExecutionClient(container.port, interrupt_grace=1) as client, await client.fork() as branch:
        with pytest.raises(ExecutionTimeout) as late:
            await branch.execute(deaf, timeout=0.5)
        assert not late.value.state_kept
        looking = (
            "[n for n in os.listdir('/proc') if n.isdigit() and b'876' in open(f'/proc/{n}/cmdline', 'rb').read()]"
        )
        await client.execute("import os")
        assert await until(lambda: prints(client, looking, "[]"))


async def test_closing_a_branch_ends_its_kernel_alone(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port) as client:
        before = await value(client, COUNT)
        async with await client.fork():
            assert int(await value(client, COUNT)) == int(before) + 1
        assert await until(lambda: prints(client, COUNT, before))


async def test_the_container_takes_all_of_them_along(engine: str) -> None:
    async with ExecutionContainer(engine=engine, preload=(), show_pull_progress=False) as own:
        client = ExecutionClient(own.port)
        await client.connect()
        branch = await client.fork()
        cell = await branch.submit(SLEEP)
        async for _ in cell.stream(BOUND):
            break
    with pytest.raises(ExecutionLost):
        await cell.result(BOUND)
    with pytest.raises(ExecutionLost):
        await client.execute("1")
    await branch.disconnect()
    await client.disconnect()


async def test_nothing_is_left_of_branches(container: CodeExecutionContainer) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterdir keeps one open

    async with ExecutionClient(container.port) as client:
        async with await client.fork() as branch:
            await value(branch, "1")
        before, tasks = open_files(), len(asyncio.all_tasks())
        for _ in range(20):
            async with await client.fork() as branch:
                await value(branch, "1")
            await client.execute("import threading; go = threading.Event(); threading.Thread(target=go.wait).start()")
            with pytest.raises(ForkRefused):
                await client.fork()
            await client.execute("go.set(); threading.enumerate()[-1].join(1)")
        assert await until(lambda: open_files() <= before)
        assert len(asyncio.all_tasks()) <= tasks
        here = "len(__import__('os').listdir('/proc/self/fd'))"
        held = await value(client, here)
        for _ in range(5):
            async with await client.fork():
                pass
        assert await value(client, here) == held


async def test_a_fork_waits_for_its_turn_and_no_longer_than_it_may(client: ExecutionClient) -> None:
    cell = await client.submit(SLEEP)
    async for _ in cell.stream(BOUND):
        break
    with pytest.raises(ExecutionTimeout) as late:
        await client.fork(timeout=0.2)
    assert not late.value.started
    waiting = asyncio.ensure_future(client.fork())
    await asyncio.sleep(0)
    after = await client.submit("x = 5")
    await cell.interrupt()
    async with await asyncio.wait_for(waiting, BOUND) as branch:
        await after.result(BOUND)
        assert await value(branch, "'x' in globals()") == "False"


async def test_a_cancelled_fork_leaves_no_branch(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port) as client:
        before = await value(client, COUNT)
        for turns in range(12):
            task = asyncio.ensure_future(client.fork())
            for _ in range(turns * 3):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await task).disconnect()
        assert await until(lambda: prints(client, COUNT, before))


async def test_a_client_that_is_gone_forks_nothing(container: CodeExecutionContainer) -> None:
    client = ExecutionClient(container.port)
    with pytest.raises(StateError):
        await client.fork()
    await client.connect()
    cell = await client.submit(SLEEP)
    waiting = asyncio.ensure_future(client.fork())
    async for _ in cell.stream(BOUND):
        break
    await client.disconnect()
    with pytest.raises(StateError):
        await waiting
    with pytest.raises(InvalidArgument):
        await client.fork(timeout=-1)


@pytest.mark.parametrize("host", ["localhost", "127.1"], ids=["here", "by the port"])
async def test_a_session_with_all_its_numbers_taken_refuses_a_fork_and_goes_on(
    container: CodeExecutionContainer, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(family, "_SLOTS", 3)
    async with ExecutionClient(container.port, host, token=container.token) as client:
        await client.execute("x = 1")
        async with await client.fork():
            await client.checkpoint("one")
            with pytest.raises(ForkRefused, match="2 forks and checkpoints already"):
                await client.fork()
            assert await value(client, "x") == "1"
            await client.discard("one")
            assert await until(lambda: prints(client, COUNT, "3"))
            async with await client.fork() as branch:
                assert await value(branch, "x") == "1"


# -- a kernel that does not play along -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.fork = lambda: os._exit(3)",
        "import os\nos.register_at_fork(after_in_child=lambda: os._exit(3))",
        "import os\nos.register_at_fork(before=lambda: os._exit(3))",
        "import threading\nthreading.enumerate = None",
    ],
)
async def test_a_kernel_that_will_not_be_copied_is_told_of(client: ExecutionClient, code: str) -> None:
    await client.submit(code)
    with pytest.raises((ForkRefused, SessionBroken)):
        await client.fork()
    async with ExecutionClient(client.port) as other:
        assert await value(other, "1") == "1"


async def test_a_forked_child_of_a_cell_is_no_kernel(client: ExecutionClient) -> None:
    await client.execute("import os\nif os.fork() == 0:\n    import time; time.sleep(99)")
    with pytest.raises(ForkRefused, match="subprocess"):
        await client.fork()
    async with await client.fork(force=True) as branch:
        assert await value(branch, "1") == "1"


# -- from another process --------------------------------------------------------------------------------------------

REMOTE = """
import asyncio, sys
from actbox import ExecutionClient, KernelDied

async def main():
    async with ExecutionClient(int(sys.argv[1]), token=sys.argv[2]) as client:
        await client.execute("x = [1]")
        async with await client.fork() as branch:
            await branch.execute("x.append(2)")
            await client.checkpoint("one")
            try:
                await client.execute("import os; os._exit(3)")
            except KernelDied:
                await client.rollback("one")
            for each in (client, branch):
                print((await each.execute("print(x)")).text)

asyncio.run(main())
"""


async def test_a_client_in_another_process_forks_and_goes_back(container: CodeExecutionContainer) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", REMOTE, str(container.port), container.token, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert out.decode().splitlines() == ["[1]", "[1, 2]"]


# -- where it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.engines("docker")
async def test_gvisor_refuses_by_its_name(engine: str) -> None:
    try:
        async with (
            ExecutionContainer(engine=engine, runtime="runsc", preload=(), show_pull_progress=False) as own,
            ExecutionClient(own.port) as client,
        ):
            await client.execute("x = 1", timeout=50)
            with pytest.raises(ForkRefused, match="gVisor"):
                await client.fork()
            assert await value(client, "x") == "1"
    except SandboxUnavailable as exc:
        lacking(str(exc))


# -- folders ---------------------------------------------------------------------------------------------------------


async def test_a_branch_may_have_a_copy_of_the_folder(worker: CodeExecutor) -> None:
    async with await worker.fork(files="copy") as branch:
        assert branch.working_dir.parent.parent == worker.working_dir
        assert await value(branch, "sorted(os.listdir())") == "['below', 'link', 'skill.py']"
        assert await value(branch, "os.readlink('link'), oct(os.stat('skill.py').st_mode & 0o777)") == "skill.py 0o755"
        await branch.execute("open('below/deep/file', 'w').write('two'); open('skill.py', 'w').write('value = 2')")
        assert await value(worker, "open('below/deep/file').read(), skill.value") == "one 1"
        assert (branch.working_dir / "below" / "deep" / "file").read_text("utf-8") == "two"
        await branch.execute("open('newer.py', 'w').write('value = 3')")
        assert await value(branch, "__import__('newer').value") == "3"
        async with await branch.fork(files="copy") as leaf, await branch.fork() as twin:
            assert await value(leaf, "open('below/deep/file').read()") == "two"
            assert twin.working_dir == branch.working_dir
        assert branch.working_dir.is_dir()
        place = branch.working_dir
    assert not place.exists()
    assert await value(worker, "open('below/deep/file').read()") == "one"


async def test_a_folder_that_cannot_be_copied_makes_no_branch(container: CodeExecutionContainer, key: str) -> None:
    async with CodeExecutor(key, container.workspace, container.port) as worker:
        await worker.execute("open('.branches', 'w').close()")
        with pytest.raises(ForkRefused):
            await worker.fork(files="copy")
        with pytest.raises(InvalidArgument):
            await worker.fork(files="none")  # pyright: ignore[reportArgumentType]
        assert await until(lambda: prints(worker, COUNT, "2"))


async def test_a_copy_of_the_folder_stays_as_long_as_anybody_works_there(worker: CodeExecutor) -> None:
    branch = await worker.fork(files="copy")
    twin = await branch.fork()
    place = branch.working_dir
    await branch.disconnect()
    await twin.checkpoint("one")
    await twin.execute("open('newer', 'w').write('kept')")
    assert twin.working_dir == place
    with pytest.raises(KernelDied):
        await twin.execute("os._exit(3)")
    # A fresh kernel works in the folder of the key, and what it goes back to still has its own.
    assert await value(twin, "__import__('os').getcwd()") == f"/app/skills/private/{worker.key}"
    assert twin.working_dir == worker.working_dir
    await twin.rollback("one")
    assert twin.working_dir == place
    assert await value(twin, "open('newer').read()") == "kept"
    assert await value(worker, "os.path.exists('newer')") == "False"
    await twin.disconnect()
    assert not place.exists()


@pytest.mark.parametrize(
    "what", ["shutil.rmtree('.branches')", "os.rename('.branches', 'b'); os.symlink('/', '.branches')"]
)
async def test_a_session_that_hides_a_branchs_folder_keeps_nobody_from_leaving(worker: CodeExecutor, what: str) -> None:
    async with await worker.fork(files="copy") as branch:
        await worker.execute(f"import shutil; {what}")
    assert not branch.working_dir.is_symlink()
    assert await value(worker, "1") == "1"


async def test_a_folder_that_is_copied_too_slowly_is_given_up_with_its_branch(
    container: CodeExecutionContainer, worker: CodeExecutor
) -> None:
    before = await value(worker, COUNT)
    copies = len(container._sessions)
    await worker.execute("import shutil, time; shutil.copytree = lambda *_, **__: time.sleep(999)")
    with pytest.raises(ExecutionTimeout) as late:
        await worker.fork(files="copy", timeout=0.5)
    assert late.value.state_kept
    waiting = asyncio.ensure_future(worker.fork(files="copy"))
    assert await until(lambda: len(container._sessions) > copies)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(waiting, BOUND)
    assert await until(lambda: prints(worker, COUNT, before))
    assert await value(worker, "skill.value") == "1"


async def test_a_branch_may_have_a_key_of_its_own(worker: CodeExecutor, key: str) -> None:
    async with await worker.fork(f"{key}-b") as branch:
        assert branch.images_dir.name == branch.key == f"{key}-b"
        assert branch.working_dir == worker.working_dir
        with pytest.raises(KernelDied):
            await branch.execute("os._exit(3)")
        assert (await branch.execute("import os; print(os.getcwd())")).text == f"/app/skills/private/{key}-b"
        assert branch.working_dir.name == f"{key}-b"
    with pytest.raises(InvalidArgument):
        await worker.fork("../x")


# -- functions of the host -------------------------------------------------------------------------------------------


async def test_a_branch_calls_the_functions_of_its_session(client: ExecutionClient) -> None:
    called: list[int] = []

    def note(number: int) -> int:
        called.append(number)
        return number + 1

    client.functions(note, limits=CallLimits(per_session=4))
    assert (await client.execute("print(note(1))")).text == "2"
    await client.checkpoint("one")
    async with await client.fork() as branch:
        assert (await branch.execute("print(note(2))")).text == "3"
        with pytest.raises(KernelDied):
            await client.execute("note(3); import os; os._exit(3)")
        await client.rollback("one")
        assert (await client.execute("print(note(4), note(5))")).text == "5 6"
        # A death and a rollback have given no call back; the branch counts its own.
        with pytest.raises(LimitExceeded, match="calls_per_session"):
            await client.execute("note(6)")
        assert (await branch.execute("print(note(7), note(8))")).text == "8 9"
        with pytest.raises(LimitExceeded, match="calls_per_session"):
            await branch.execute("note(9)")
    assert called == [1, 2, 3, 4, 5, 7, 8]

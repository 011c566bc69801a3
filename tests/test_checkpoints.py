"""Checkpoints of a session, the last good state that is kept unasked, and the files that are kept with them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from branches import COUNT, prints, value
from docker_tools import listed, until

from actbox import (
    CheckpointMissing,
    CodeExecutionContainer,
    CodeExecutor,
    ExecutionClient,
    ExecutionContainer,
    ExecutionError,
    ExecutionTimeout,
    ForkRefused,
    InvalidArgument,
    KernelDied,
    Limits,
    LocalPathError,
    ProtocolError,
    SessionBroken,
    StateError,
    TransferRefused,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

BOUND = 15.0

# -- checkpoints -----------------------------------------------------------------------------------------------------


async def test_a_session_goes_back_as_often_as_it_likes(client: ExecutionClient) -> None:
    await client.execute("x = [1]")
    kept = await client.checkpoint("one")
    await client.execute("x.append(2)")
    await client.checkpoint("two")
    for _ in range(3):
        await client.execute("x.clear(); del x")
        assert await client.rollback("one") == kept
        assert await value(client, "x") == "[1]"
        await client.rollback("two")
        assert await value(client, "x") == "[1, 2]"
    assert [checkpoint.name for checkpoint in client.checkpoints()] == ["one", "two"]
    assert client.checkpoints()[0].cell < client.checkpoints()[1].cell


@pytest.mark.parametrize(
    "ruin",
    [
        "import os; os._exit(3)",
        "import ctypes; ctypes.string_at(0)",
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(9)",
        "import builtins\nbuiltins.__dict__.clear()",
        "import os; os.closerange(0, 256)",
    ],
    ids=["exit", "segfault", "deaf", "no builtins", "no files"],
)
async def test_whatever_a_cell_has_ruined_is_undone(container: CodeExecutionContainer, ruin: str) -> None:
    async with ExecutionClient(container.port, interrupt_grace=1) as client:
        await client.execute("x = 1")
        await client.checkpoint("good")
        with contextlib.suppress(ExecutionError, ExecutionTimeout):
            await client.execute(ruin, timeout=0.5)
        await client.rollback("good")
        result = await client.execute("print(x)")
        assert (result.text, result.restarted) == ("1", False)


async def test_a_checkpoint_of_the_same_name_takes_the_place_of_the_older(client: ExecutionClient) -> None:
    for number in range(3):
        await client.execute(f"x = {number}")
        await client.checkpoint("same")
    await client.execute("x = 99")
    await client.rollback("same")
    assert await value(client, "x") == "2"
    assert len(client.checkpoints()) == 1


async def test_what_is_not_there_cannot_be_gone_back_to(client: ExecutionClient) -> None:
    await client.execute("x = 1")
    with pytest.raises(CheckpointMissing, match="there is none of this name") as caught:
        await client.rollback("nothing")
    assert isinstance(caught.value, KeyError)
    with pytest.raises(CheckpointMissing):
        await client.discard("nothing")
    await client.checkpoint("one")
    await client.discard("one")
    with pytest.raises(CheckpointMissing):
        await client.rollback("one")
    assert await value(client, "x") == "1"


@pytest.mark.parametrize("name", ["", "x" * 101, "a\nb", "\x1b[2J", 3, None])
async def test_names_that_cannot_be_shown_are_refused(container: CodeExecutionContainer, name: Any) -> None:
    async with ExecutionClient(container.port) as client:
        with pytest.raises(InvalidArgument):
            await client.checkpoint(name)


async def test_there_is_a_bound_on_checkpoints(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, max_checkpoints=2) as client:
        await client.checkpoint("one")
        await client.checkpoint("two")
        with pytest.raises(StateError, match="2 checkpoints"):
            await client.checkpoint("three")
        await client.checkpoint("two")
        await client.discard("one")
        await client.checkpoint("three")


async def test_a_checkpoint_that_the_session_has_killed_is_told_of(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port) as client:
        await client.checkpoint("one")
        with pytest.raises(KernelDied):
            await client.execute("import os; os.kill(-1, 9); os._exit(1)")
        assert await until(lambda: client.checkpoints() == [])
        with pytest.raises(CheckpointMissing, match="killed"):
            await client.rollback("one")
        assert (await client.execute("print(1)")).text == "1"


async def test_checkpoints_that_are_dead_take_up_no_room(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, max_checkpoints=2) as client:
        await client.checkpoint("one")
        await client.checkpoint("two")
        with pytest.raises(KernelDied):
            await client.execute("import os; os.kill(-1, 9); os._exit(1)")
        assert await until(lambda: client.checkpoints() == [])
        for name in ("three", "four"):
            await client.checkpoint(name)
        assert [kept.name for kept in client.checkpoints()] == ["three", "four"]
        with pytest.raises(StateError, match="2 checkpoints"):
            await client.checkpoint("five")


async def test_a_kernel_that_died_unseen_is_not_kept_for_what_it_was(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port) as client:
        await client.execute("x = 1")
        await client.checkpoint("one")
        await dies_between_cells(client)
        with pytest.raises(SessionBroken, match="had ended since the last cell; the session's state is lost"):
            await client.checkpoint("one")
        await client.rollback("one")
        assert await value(client, "x") == "1"


@pytest.fixture
async def crowded(engine: str) -> AsyncIterator[Callable[..., ExecutionClient]]:
    """Makes clients of a container whose sessions may have few processes."""
    async with ExecutionContainer(
        engine=engine, preload=(), limits=Limits(pids=128), separate=True, show_pull_progress=False
    ) as own:

        def make(*, recover: bool = False) -> ExecutionClient:
            return ExecutionClient(own.port, interrupt_grace=1, recover=recover)

        yield make


# Children that only wait, as many as there may be; and such that never stop to have children.
CROWD = """
import os, time
while True:
    try:
        if os.fork() == 0:
            while True: time.sleep(9)
    except OSError:
        break
"""
BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""


@pytest.mark.parametrize("code", [CROWD, BOMB], ids=["crowd", "bomb"])
async def test_a_session_without_room_for_another_process_goes_back(
    crowded: Callable[..., ExecutionClient], code: str
) -> None:
    async with crowded() as client:
        await client.execute("x = 1")
        await client.checkpoint("good")
        with contextlib.suppress(ExecutionError, ExecutionTimeout):
            await client.execute(code, timeout=1)
        await client.rollback("good")
        result = await client.execute("print(x)")
        assert (result.text, result.restarted) == ("1", False)
        assert await until(lambda: prints(client, f"{COUNT} < 10", "True"))


@pytest.mark.parametrize("code", [f"{CROWD}os._exit(3)", BOMB], ids=["crowd", "bomb"])
async def test_a_death_among_many_processes_is_gone_back_behind(
    crowded: Callable[..., ExecutionClient], code: str
) -> None:
    async with crowded(recover=True) as client:
        good = await client.execute("x = 1")
        with pytest.raises((KernelDied, ExecutionTimeout)) as ended:
            await client.execute(f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{code}", timeout=1)
        assert ended.value.rolled_back_to == good.execution_count
        assert await value(client, "x") == "1"


# -- the last good state ---------------------------------------------------------------------------------------------


async def test_a_death_says_to_which_cell_the_session_went_back(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, recover=True, interrupt_grace=1) as client:
        await client.execute("x = 1")
        good = await client.execute("x = 2")
        with pytest.raises(KernelDied) as died:
            await client.execute("x = 3; import os; os._exit(3)")
        assert died.value.rolled_back_to == good.execution_count
        assert f"after cell {good.execution_count}" in str(died.value)
        result = await client.execute("print(x)")
        assert (result.text, result.restarted) == ("2", False)
        with pytest.raises(ExecutionTimeout) as late:
            await client.execute(
                "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nx = 4\nwhile True: time.sleep(9)",
                timeout=0.3,
            )
        assert late.value.rolled_back_to == result.execution_count
        assert await value(client, "x") == "2"


async def dies_between_cells(client: ExecutionClient) -> None:
    """Have the kernel end when no cell runs."""
    session = client._session
    assert session is not None
    await client.execute("import os, threading; x = 'unseen'; threading.Timer(0.05, os._exit, (7,)).start()")
    assert await until(lambda: session.ended)


async def test_a_death_between_cells_is_gone_back_behind_and_told_by_the_next(
    container: CodeExecutionContainer,
) -> None:
    async with ExecutionClient(container.port, recover=True) as client:
        good = await client.execute("x = 1")
        await dies_between_cells(client)
        result = await client.execute("print(x)")
        assert (result.text, result.restarted, result.rolled_back_to) == ("1", False, good.execution_count)
        assert f"as after cell {good.execution_count}" in str(result.for_model())
        assert (await client.execute("print(x)")).rolled_back_to is None
        await dies_between_cells(client)
        with pytest.raises(SessionBroken, match="had ended since the last cell") as broken:
            await client.fork()
        assert broken.value.rolled_back_to is not None
        assert await value(client, "x") == "1"


async def test_a_kernel_that_will_not_be_copied_any_more_is_told_of_by_the_next_cell(
    container: CodeExecutionContainer,
) -> None:
    async with ExecutionClient(container.port, recover=True) as client:
        good = await client.execute("x = 1")
        await client.execute("x = 2; import os; os.fork = lambda: os._exit(3)")
        result = await client.execute("print(x)")
        assert (result.text, result.restarted, result.rolled_back_to) == ("1", False, good.execution_count)


async def test_values_that_were_set_and_states_that_were_restored_are_kept_too(
    container: CodeExecutionContainer, tmp_path: Path
) -> None:
    async with ExecutionClient(container.port, recover=True) as client:
        await client.set("x", 1)
        with pytest.raises(KernelDied) as died:
            await client.execute("import os; os._exit(3)")
        assert died.value.rolled_back_to == 0
        assert await value(client, "x") == "1"
        await client.save(tmp_path / "state")
    async with ExecutionClient(container.port, recover=True) as client:
        await client.restore(tmp_path / "state")
        with pytest.raises(KernelDied):
            await client.execute("import os; os._exit(3)")
        assert await value(client, "x") == "1"


async def test_who_leaves_while_a_copy_is_made_waits_for_nobody_and_leaves_nothing(
    container: CodeExecutionContainer,
) -> None:
    before = len(container._sessions)
    for turns in range(0, 40, 2):
        client = ExecutionClient(container.port, recover=True)
        await client.connect()
        await client.execute("x = 1")
        # The copy of the last good state is under way.
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(3):
            await client.disconnect()
        assert len(container._sessions) == before


async def test_after_a_rollback_the_good_state_is_the_one_gone_back_to(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, recover=True) as client:
        await client.execute("x = 1")
        kept = await client.checkpoint("one")
        await client.execute("x = 2")
        await client.rollback("one")
        with pytest.raises(KernelDied) as died:
            await client.execute("import os; os._exit(3)")
        assert died.value.rolled_back_to == kept.cell
        assert await value(client, "x") == "1"


async def test_a_cell_that_fails_is_kept_as_it_left_things(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, recover=True) as client:
        await client.execute("x = 1")
        with pytest.raises(ExecutionError) as failed:
            await client.execute("x = 2; 1/0")
        assert failed.value.rolled_back_to is None
        assert await value(client, "x") == "2"


async def test_without_a_good_state_the_state_is_lost(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, recover=True) as client:
        with pytest.raises(KernelDied) as died:
            await client.execute("import os; os._exit(3)")
        assert died.value.rolled_back_to is None
        assert (await client.execute("x = 1")).restarted
        with pytest.raises(KernelDied) as again:
            await client.execute("import os; os.kill(-1, 9); os._exit(1)")
        assert again.value.rolled_back_to is None
        assert (await client.execute("print('x' in globals())")).text == "False"


# -- files ----------------------------------------------------------------------------------------------------------


async def test_files_come_back_with_a_checkpoint_if_they_were_kept(worker: CodeExecutor) -> None:
    kept = await worker.checkpoint("with", files=True)
    assert kept.files
    assert sorted(kept.left_out) == ["link", "pipe"]
    plain = await worker.checkpoint("without")
    assert not plain.files
    ruin = "import shutil\nshutil.rmtree('below'); os.unlink('skill.py'); open('extra', 'w').close()"
    await worker.execute(ruin)
    await worker.rollback("without")
    assert await value(worker, "sorted(os.listdir())") == "['extra', 'link', 'pipe']"
    for turn in range(2):
        await worker.rollback("with")
        assert (
            await value(worker, "sorted(os.listdir()), open('below/deep/file').read()") == "['below', 'skill.py'] one"
        )
        await worker.execute(f"import shutil; shutil.rmtree('below'); turn = {turn}")
    await worker.discard("with")


async def test_a_notebook_tells_of_a_rollback(worker: CodeExecutor) -> None:
    kept = await worker.checkpoint("one")
    await worker.execute("x = 1")
    async with await worker.fork() as branch:
        await branch.execute("branched = 1")
        await worker.rollback("one")
        await worker.execute("y = 2")
        sources = [cell["source"] for cell in worker.notebook()["cells"]][-3:]
        assert sources == ["x = 1", f"**Here the session went back to its state after cell {kept.cell}.**", "y = 2"]
        before, fork, after = [cell["source"] for cell in branch.notebook()["cells"]][-3:]
        assert (before, after) == ("x = 1", "branched = 1")
        assert "the session was forked" in fork


async def test_nothing_is_left_of_kept_files(worker: CodeExecutor, tmp_path: Path, monkeypatch: Any) -> None:
    def held() -> int:
        # What has no name is shown below where it was made.
        found = 0
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found += str(link.readlink()).startswith(f"{tmp_path}/")
        return found

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await worker.checkpoint("one", files=True)
    assert held() == 1
    await worker.checkpoint("one", files=True)
    assert held() == 1
    await worker.discard("one")
    assert held() == 0
    await worker.checkpoint("two", files=True)
    await worker.disconnect()
    assert held() == 0


async def test_files_that_are_kept_have_no_name_on_the_host(
    worker: CodeExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    await worker.checkpoint("one", files=True)
    assert listed(tmp_path, "*") == []
    os.rmdir(tmp_path)  # noqa: PTH106
    with pytest.raises(LocalPathError, match="TMPDIR"):
        await worker.checkpoint("two", files=True)
    await worker.rollback("one")
    assert [kept.name for kept in worker.checkpoints()] == ["one"]


async def test_files_that_cannot_be_put_back_in_time_leave_the_session_as_it_is(worker: CodeExecutor) -> None:
    before = await value(worker, COUNT)
    await worker.execute(
        "from actbox_guest.guest import folders\nimport time\n"
        "clear = folders.PrivateFolder._clear\nfolders.PrivateFolder._clear = lambda _: time.sleep(999)"
    )
    await worker.checkpoint("one", files=True)
    await worker.execute("x = 1")
    with pytest.raises(ExecutionTimeout) as late:
        await asyncio.wait_for(worker.rollback("one", timeout=0.5), BOUND)
    assert late.value.state_kept
    assert await value(worker, "x") == "1"
    assert [kept.name for kept in worker.checkpoints()] == ["one"]
    await worker.discard("one")
    assert await until(lambda: prints(worker, COUNT, before))


@pytest.mark.parametrize(
    "lie",
    [
        "os._exit(3)",
        "shell.outputs.send({'type': 'archive', 'id': request['id']}, b'x' * 200_000)\n    return []",
        "while True: shell.outputs.send({'type': 'archive', 'id': request['id']}, b'x' * 200_000)",
        "shell.outputs.send({'type': 'archive', 'id': 7 << 20}, b'x')\n    return []",
        "raise RuntimeError('\\x1b[2J')",
    ],
    ids=["dies", "no archive", "without end", "of another request", "raises"],
)
async def test_a_copy_that_does_not_play_along_costs_only_the_checkpoint(
    container: CodeExecutionContainer, worker: CodeExecutor, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    def most(_limits: Limits) -> int:
        return 10 << 20

    monkeypatch.setattr("actbox.kept_files._most", most)
    sessions = len(container._sessions)
    async with await worker.fork(files="copy") as branch:
        await branch.execute(
            "import os\nfrom actbox_guest.guest import shell, transfer\n"
            f"def serve(self, request):\n    {lie}\ntransfer.Transfers.serve = serve"
        )
        with contextlib.suppress(ForkRefused, TransferRefused, ProtocolError):
            await branch.checkpoint("one", files=True, timeout=BOUND)
            with pytest.raises((CheckpointMissing, TransferRefused, ProtocolError)):
                await branch.rollback("one", timeout=BOUND)
        assert branch.working_dir.is_dir()
        assert await value(branch, "os.path.isdir('.')") == "True"
        for kept in branch.checkpoints():
            await branch.discard(kept.name)
        assert len(container._sessions) == sessions + 1
    assert await value(worker, "open('below/deep/file').read()") == "one"

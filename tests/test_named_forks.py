"""Checkpoints and forks of named sessions: what a whole session is made, by whoever drives it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from connections import Relay

from actbox import (
    AttachedClient,
    CheckpointMissing,
    CodeExecutionContainer,
    ConnectionError,
    DriveRefused,
    ExecutionClient,
    ExecutionTimeout,
    ForkRefused,
    InvalidArgument,
    KernelDied,
    SessionGone,
    StateError,
)
from actbox.keeping import Keeper

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("no_named_sessions")]

BOUND = 15.0
THREAD = "import threading; threading.Thread(target=threading.Event().wait, name='busy', daemon=True).start()"


async def text_of(client: AttachedClient, code: str) -> str | None:
    return (await client.execute(code, timeout=BOUND)).text


async def test_a_state_is_gone_back_to_by_whoever_drives_then(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client:
        await client.execute("x = 1")
        made = await client.checkpoint("one")
        assert (made.name, made.cell, made.files) == ("one", 1, False)
        await client.execute("del x")
    async with attach() as client:
        assert [found.name for found in await client.checkpoints()] == ["one"]
        assert await client.rollback("one") == made
        assert await text_of(client, "print(x)") == "1"
        await client.discard("one")
        assert await client.checkpoints() == []


async def test_files_are_kept_with_a_state_and_come_back(
    attach: Callable[..., AttachedClient], container: CodeExecutionContainer, key: str
) -> None:
    folder = container.workspace.private_skills_path / key
    async with attach(key=key) as client:
        await client.execute("open('file', 'w').write('old')\nimport os; os.symlink('file', 'link')")
        made = await client.checkpoint("one", files=True)
        assert (made.files, made.left_out) == (True, ("link",))
        await client.execute("open('file', 'w').write('new'); open('more', 'w').close()")
        await client.rollback("one")
        assert sorted(path.name for path in folder.iterdir()) == ["file"]
        assert (folder / "file").read_text() == "old"


async def test_a_fork_is_a_named_session_that_goes_on_by_itself(
    attach: Callable[..., AttachedClient], container: CodeExecutionContainer, session_name: str
) -> None:
    other = f"{session_name} too"
    async with attach() as client:
        await client.execute("x = [1]")
        branch = await client.fork(other)
        await client.execute("x.append(2)")
        with pytest.raises(InvalidArgument, match="there is a session of this name"):
            await client.fork(other)
        assert set(container.kept_sessions) == {session_name, other}
        await client.end()
    async with branch:
        assert await text_of(branch, "print(x)") == "[1]"
        await branch.end()


async def test_a_fork_that_nobody_attaches_to_ends_with_its_time_to_live(
    attach: Callable[..., AttachedClient], container: CodeExecutionContainer, session_name: str
) -> None:
    async with attach(ttl=0.1) as client:
        await client.fork(f"{session_name} too")
        async with asyncio.timeout(BOUND):
            while len(container.kept_sessions) > 1:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)


async def test_a_fork_with_a_key_of_its_own_works_in_a_copy(
    attach: Callable[..., AttachedClient], key: str, session_name: str
) -> None:
    async with attach(key=key) as client:
        await client.execute("open('file', 'w').write('old')")
        async with await client.fork(f"{session_name} too", key=f"{key}-too", files="copy") as branch:
            await client.execute("open('file', 'w').write('new')")
            assert await text_of(branch, "print(open('file').read())") == "old"
            await branch.end()


async def test_a_session_made_to_recover_goes_back_by_itself(attach: Callable[..., AttachedClient]) -> None:
    async with attach(recover=True) as client:
        await client.execute("x = 1")
        with pytest.raises(KernelDied) as caught:
            await client.execute("import os; os._exit(3)")
        assert caught.value.rolled_back_to == 1
        assert await text_of(client, "print(x)") == "1"


async def test_refusals_come_as_they_are_said(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client, attach(drive=False) as watcher:
        with pytest.raises(CheckpointMissing, match="none of this name"):
            await client.rollback("none")
        with pytest.raises(CheckpointMissing):
            await client.discard("none")
        with pytest.raises(InvalidArgument):
            await client.checkpoint("")
        with pytest.raises(InvalidArgument):
            await client.checkpoint("x", timeout=-1)
        with pytest.raises(InvalidArgument, match="no key"):
            await client.checkpoint("x", files=True)
        with pytest.raises(InvalidArgument, match="no key"):
            await client.fork("x", key="x")
        await client.execute(THREAD)
        with pytest.raises(ForkRefused, match="busy"):
            await client.checkpoint("x")
        assert (await client.checkpoint("x", force=True)).name == "x"
        sleeping = await client.submit("import time; time.sleep(999)", timeout=999)
        with pytest.raises(ExecutionTimeout) as caught:
            await client.rollback("x", timeout=0.05)
        assert (caught.value.started, caught.value.what) == (False, "request")
        await sleeping.interrupt()
        for asked in (watcher.checkpoint("y"), watcher.rollback("x"), watcher.discard("x"), watcher.fork("y")):
            with pytest.raises(DriveRefused):
                await asked
        assert [found.name for found in await watcher.checkpoints()] == ["x"]


async def test_who_stops_waiting_for_a_change_stops_nothing_else(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client:
        sleeping = await client.submit("x = 1\nimport time; time.sleep(999)", timeout=999)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.checkpoint("one"), 0.05)
        await sleeping.interrupt()
        async with asyncio.timeout(BOUND):
            while not await client.checkpoints():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
        await client.execute("del x")
        await client.rollback("one")
        assert await text_of(client, "print(x)") == "1"


async def test_a_session_that_ends_meanwhile_is_gone(attach: Callable[..., AttachedClient]) -> None:
    async with attach() as client, attach(drive=False) as watcher:
        await client.submit("import time; time.sleep(999)", timeout=999)
        keeping = asyncio.create_task(client.checkpoint("one"))
        while (await watcher.executions())[0].state != "running":  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)
        await client.end()
        async with asyncio.timeout(BOUND):
            with pytest.raises((SessionGone, StateError)):
                await keeping
            with pytest.raises(SessionGone):
                await watcher.checkpoints()


async def test_cut_at_any_byte_a_change_is_done_once(container: CodeExecutionContainer, session_name: str) -> None:
    async with Relay(container.port) as relay:
        client = AttachedClient(relay.port, session_name, token=container.token)
        async with asyncio.timeout(40), client:
            await client.execute("x = 0")
            points = [("gateway", at) for at in range(1, 200, 40)] + [("client", at) for at in range(1, 120, 30)]
            for toward, after in points:
                await client.execute("x += 1")
                relay.cut(toward, after)
                await client.fork(f"{session_name} {toward} {after}")
                relay.cut("", 0)
            # A fork that was made twice would have been refused, for its name is taken.
            assert len(container.kept_sessions) == len(points) + 1


async def test_a_container_that_was_closed_adopts_no_fork() -> None:
    def make(_key: str | None, _recover: bool) -> ExecutionClient:  # noqa: FBT001 - a `Keeper`'s
        raise AssertionError

    keeper = Keeper(make)
    keeper.check_new("other")
    await keeper.close()
    with pytest.raises(ConnectionError, match="closed"):
        keeper.check_new("other")

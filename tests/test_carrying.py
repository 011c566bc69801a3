"""Files, variables and states through a client that is attached to a named session."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest
from connections import BY_THE_PORT, RawAttached, Relay

from actbox import (
    AttachedClient,
    CodeExecutionContainer,
    DriveRefused,
    ExecutionLost,
    ExecutionTimeout,
    InvalidArgument,
    KernelDied,
    LocalPathError,
    SessionGone,
    StateError,
    TransferRefused,
    VariableMissing,
    carrying,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.usefixtures("no_named_sessions")]

BOUND = 15.0
MIB = 1 << 20


async def test_files_variables_and_states_go_in_and_out(attach: Callable[..., AttachedClient], tmp_path: Path) -> None:
    data = os.urandom(5 * MIB + 1)
    (tmp_path / "sent").write_bytes(data)
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "below" / "file").write_text("of a folder")
    (tmp_path / "folder" / "link").symlink_to("below")
    async with attach() as client:
        await client.upload_file("/tmp/file", tmp_path / "sent")
        await client.download_file("/tmp/file", tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == data
        assert await client.upload_directory("/tmp/folder", tmp_path / "folder") == ["link"]
        await client.execute("import os; os.symlink('/', '/tmp/folder/out')")
        assert await client.download_directory("/tmp/folder", tmp_path / "back") == ["out"]
        assert (tmp_path / "back" / "below" / "file").read_text() == "of a folder"
        await client.delete_file("/tmp/file")
        with pytest.raises(TransferRefused, match="No such file"):
            await client.download_file("/tmp/file", tmp_path / "never")
        await client.set("x", {"a": [1, 2.5, None]})
        assert await client.get("x") == {"a": [1, 2.5, None]}
        assert [variable.name for variable in await client.variables()] == ["os", "x"]
        with pytest.raises(VariableMissing):
            await client.get("y")
        assert (await client.save(tmp_path / "state")).names == ("os", "x")
        await client.execute("del x")
        assert "x" in (await client.restore(tmp_path / "state")).names
        assert (await client.execute("print(x)")).text == "{'a': [1, 2.5, None]}"


async def test_a_transfer_waits_its_turn_and_the_cell_before_it_is_heard_of(
    attach: Callable[..., AttachedClient],
) -> None:
    async with attach() as client:
        cell = await client.submit("print('on'); x = 0")
        await client.set("x", 1)
        assert (await cell.result()).text == "on"
        assert await client.get("x") == 1


async def test_only_who_drives_may_have_something_carried(attach: Callable[..., AttachedClient]) -> None:
    async with attach(), attach(drive=False) as watcher:
        with pytest.raises(DriveRefused):
            await watcher.set("x", 1)
    with pytest.raises(StateError):
        await watcher.set("x", 1)


async def test_what_goes_wrong_is_told_as_by_a_plain_client(
    attach: Callable[..., AttachedClient], tmp_path: Path
) -> None:
    async with attach() as client:
        with pytest.raises(InvalidArgument):
            await client.set("x", 1, timeout=0)
        with pytest.raises(LocalPathError):
            await client.upload_file("/tmp/x", tmp_path)
        await client.execute("open('/tmp/x', 'wb').write(bytes(3 << 20))")
        with pytest.raises(TransferRefused, match="more than the"):
            await client.download_file("/tmp/x", tmp_path / "x", max_bytes=MIB)
        sleeping = await client.submit("import time; time.sleep(999)", timeout=999)
        with pytest.raises(ExecutionTimeout) as caught:
            await client.set("x", 1, timeout=0.05)
        assert (caught.value.state_kept, caught.value.started) == (True, False)
        setting = asyncio.create_task(client.set("x", 1))
        await sleeping.interrupt()
        await setting
        assert await client.get("x") == 1


async def test_a_kernel_that_dies_during_a_transfer_is_told_of(
    attach: Callable[..., AttachedClient], tmp_path: Path
) -> None:
    async with attach() as client:
        await client.execute(
            "from actbox_guest.guest import variables\nimport os\n"
            "variables.Variables.serve = lambda self, request: os._exit(7)"
        )
        with pytest.raises(KernelDied) as caught:
            await client.get("x")
        assert caught.value.exit_code == 7
        await client.upload_file("/tmp/again", __file__)
        await client.download_file("/tmp/again", tmp_path / "again")
        await client.end()
        with pytest.raises(StateError):
            await client.get("x")


async def test_a_session_that_has_ended_meanwhile_is_lost(
    container: CodeExecutionContainer, attach: Callable[..., AttachedClient], session_name: str
) -> None:
    async with attach() as client:
        await client.submit("import time; time.sleep(999)", timeout=999)
        setting = asyncio.create_task(client.set("x", 1))
        async with AttachedClient(container.port, session_name, take_over=True) as other:
            await other.end()
        async with asyncio.timeout(BOUND):
            with pytest.raises((ExecutionLost, DriveRefused)):
                await setting
            with pytest.raises(ExecutionLost):
                await client.set("x", 1)


async def test_cancelling_a_transfer_ends_it_and_the_session_goes_on(
    attach: Callable[..., AttachedClient], container: CodeExecutionContainer, key: str
) -> None:
    async with attach(key=key) as client:
        await client.execute(
            "from actbox_guest.guest import variables\nimport time\nserve = variables.Variables.serve\n"
            "def slow(self, request):\n    open('begun', 'w').close()\n    time.sleep(999)\n"
            "variables.Variables.serve = slow\nx = 1"
        )
        begun = container.workspace.private_skills_path / key / "begun"
        getting = asyncio.create_task(client.get("x"))
        async with asyncio.timeout(BOUND):
            while not begun.exists():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
            getting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await getting
            # Behind it: the session has given it up, and has kept its state.
            await client.execute("variables.Variables.serve = serve")
            assert await client.get("x") == 1


async def test_an_upload_that_waits_holds_up_nothing(container: CodeExecutionContainer, tmp_path: Path) -> None:
    """Nor does one whose kernel does not read: it is killed in time."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 * MIB)
    async with AttachedClient(container.port, "upload", host=BY_THE_PORT, token=container.token) as client:
        sleeping = await client.submit("import time; print('on', flush=True); time.sleep(999)", timeout=999)
        uploading = asyncio.create_task(client.upload_file("/tmp/large", tmp_path / "large"))
        async with asyncio.timeout(BOUND):
            async for number, _event in sleeping.events():
                assert number == 1
                break
            await sleeping.interrupt()
            await uploading
        await client.end()


async def test_cut_anywhere_a_transfer_is_done_or_lost_and_never_half_done(
    container: CodeExecutionContainer, session_name: str, tmp_path: Path
) -> None:
    (tmp_path / "old").write_text("old")
    new = os.urandom(700_000)
    (tmp_path / "new").write_bytes(new)
    lost = 0
    async with Relay(container.port) as relay, AttachedClient(container.port, session_name) as plain:
        for toward, points in (("gateway", range(60, 720_000, 60_000)), ("client", range(20, 400, 40))):
            for after in points:
                await plain.upload_file("/tmp/file", tmp_path / "old")
                client = AttachedClient(relay.port, session_name, token=container.token, take_over=True)
                async with asyncio.timeout(BOUND), client:
                    relay.cut(toward, after)
                    try:
                        await client.upload_file("/tmp/file", tmp_path / "new")
                    except ExecutionLost:
                        lost += 1
                    relay.cut("", 0)
                await plain.detach()
                await plain.attach()
                async with asyncio.timeout(BOUND):
                    await plain.download_file("/tmp/file", tmp_path / "now")
                assert (tmp_path / "now").read_bytes() in (b"old", new), (toward, after)
    assert lost > 5


@pytest.mark.parametrize(
    "more",
    [
        {"carry": {"type": "execute"}},
        {"carry": {"type": "fork"}},
        {"carry": None},
        {"carry": {"type": "variables"}, "timeout": "1"},
        {"carry": {"type": "variables"}, "timeout": True},
    ],
)
async def test_what_is_no_transfer_is_not_carried(container: CodeExecutionContainer, more: dict[str, Any]) -> None:
    async with attached(container) as place, RawAttached(container, **{**place, "timeout": 1, **more}) as raw:
        assert await raw.receive() is None


async def test_a_transfer_is_for_a_client_that_is_attached(container: CodeExecutionContainer) -> None:
    async with attached(container) as place:
        for changed, refusal in (({"client": "another"}, StateError), ({"incarnation": "another"}, SessionGone)):
            wish = {**place, "carry": {"type": "variables"}, "timeout": 1, **changed}
            async with RawAttached(container, **wish) as raw:
                answer = await raw.receive() or {}
                assert (answer["type"], answer["kind"]) == ("refused", refusal.__name__)


async def test_who_sends_more_than_it_may_is_cut_off(container: CodeExecutionContainer) -> None:
    async with attached(container) as place, AttachedClient(container.port, "raw", take_over=True) as client:
        await client.submit("import time; time.sleep(999)", timeout=999)
        async with RawAttached(container, **place) as again:
            await again.receive()
            async with RawAttached(container, **place, carry={"type": "upload"}, timeout=99) as raw:
                assert (await raw.receive() or {}).get("type") == "welcome"
                raw.send({"type": "go"})
                for _ in range(100):
                    raw.send({"type": "archive"}, b"x")
                assert await raw.receive() is None


@contextlib.asynccontextmanager
async def attached(container: CodeExecutionContainer) -> AsyncGenerator[dict[str, Any]]:
    """A place in a session, and how to greet as the one who has it."""
    async with RawAttached(container) as raw:
        welcome = await raw.receive() or {}
        yield {"client": raw.hello["client"], "incarnation": welcome["incarnation"]}


async def test_without_a_connection_for_it_nothing_is_begun(
    container: CodeExecutionContainer, session_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    async def refuse(*_arguments: object) -> None:
        nonlocal tries
        tries += 1
        raise ConnectionRefusedError("nothing there")

    async with AttachedClient(container.port, session_name, host=BY_THE_PORT, token=container.token) as client:
        with monkeypatch.context() as patched:
            patched.setattr(carrying, "reach", refuse)
            with pytest.raises(ExecutionLost, match="not begun"):
                await client.set("x", 1)
        assert tries == 3
        await client.set("x", 1)

"""The engine "docker": whatever happens to host, container or daemon, outcomes are typed and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import docker_tools as tools
import dockerd
import pytest
from docker_tools import SLIM, WAYS, Outside, Relay, descriptors, folders, mounts, said, socket_relay, until
from dockerd import PrivateDaemon

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ConnectionError,
    ExecutionClient,
    ExecutionContainer,
    ExecutionLost,
    SandboxUnavailable,
    list_containers,
    prune_containers,
)
from actbox.cli import ExitCode
from actbox.engines.docker import boundary, owner, staging
from actbox.engines.docker import engine as engine_module

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90), pytest.mark.counting]

BOUND = 15.0
LONG = "print('on'); import time; time.sleep(999)"


@pytest.fixture(scope="module")
async def outside() -> Outside:
    return await tools.reached()


@pytest.fixture
async def nothing_left(outside: Outside) -> AsyncIterator[None]:
    """Whatever the test does, nothing of a container of this process's is there afterwards."""
    before = (folders(), mounts(), await outside.volumes())
    yield
    try:
        assert await outside.none_left()
        assert (folders(), mounts(), await outside.volumes()) == before
    finally:
        await outside.remove(*[one["Id"] for one in await outside.containers()])


@pytest.fixture(scope="module")
async def own(outside: Outside, slim: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PrivateDaemon]:
    """A daemon that may be killed; it runs again after each test."""
    dockerd.required()
    folder = tmp_path_factory.mktemp("own")
    saved = await asyncio.to_thread(tools.saved_slim, outside.url)
    with PrivateDaemon(folder / "daemon") as made:
        await asyncio.to_thread(made.load, saved)
        yield made


@pytest.fixture(scope="module")
async def slim(outside: Outside) -> AsyncIterator[None]:
    yield
    await tools.remove_slim(outside)


def container(way: str = "nested", **more: Any) -> ExecutionContainer:
    return ExecutionContainer(engine="docker", preload=(), show_pull_progress=False, **{**WAYS[way], **more})


async def started(client: ExecutionClient, code: str = LONG) -> asyncio.Task[Any]:
    """A cell that runs."""
    cell = await client.submit(code)
    async for _ in cell.stream(999):
        break
    return asyncio.create_task(cell.result(60))


async def answers(made: ExecutionContainer) -> bool:
    async with ExecutionClient(port=made.port) as client:
        return (await client.execute("print(6 * 7)", timeout=BOUND)).text == "42"


def fill(file: Path) -> None:
    """Write a file until the disk is full."""
    with file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(1 << 20))


def relayed(way: str, outside: Outside) -> contextlib.AbstractAsyncContextManager[Relay]:
    """Between a host and the daemon: a TCP port makes it a stream, a unix socket does not."""
    return Relay(outside.socket) if way == "stream" else socket_relay(outside.socket)


# -- the host ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_the_containers_of_a_killed_host_end_and_are_removed(way: str, outside: Outside) -> None:
    """E20."""
    tools.need_runtime(await outside.ask("GET", "info"), way)
    async with relayed(way, outside) as relay:
        with tools.host(way, relay.url) as host:
            assert await said(host) == "ready"
            found = await outside.containers(host.pid)
            assert [one["State"] for one in found] == ["running"]
            host.send_signal(signal.SIGKILL)
            host.wait()
            assert await outside.none_left(host.pid)
        # What it had for the time of the start is long gone; nothing else was made.
        assert folders(host.pid) == []


@pytest.mark.parametrize("by", ["the next start", "actbox prune"])
async def test_what_a_host_leaves_that_is_killed_before_its_container_runs_is_reaped(by: str, outside: Outside) -> None:
    """E20."""
    async with socket_relay(outside.socket) as relay, container() as living:
        gate = relay.gate("POST /containers/+/attach")
        with tools.host("nested", relay.url) as host:
            async with asyncio.timeout(BOUND):
                await gate.held.wait()
            host.send_signal(signal.SIGKILL)
            host.wait()
        left = await outside.containers(host.pid)
        assert [one["State"] for one in left] == ["created"]
        told = {info.id: info.owner for info in await list_containers()}
        mine = {one["Id"] for one in await outside.containers()}
        assert told[left[0]["Id"]] == "dead"
        assert {told[one] for one in mine} == {"alive"}
        if by == "actbox prune":
            assert left[0]["Id"] in {info.id for info in await prune_containers()}
        else:
            async with container():
                pass
        assert await outside.containers(host.pid) == []
        assert folders(host.pid) == []
        assert {one["Id"] for one in await outside.containers()} == mine
        assert await answers(living)


async def test_two_hosts_keep_out_of_each_others_way(outside: Outside) -> None:
    with tools.host("nested", outside.url) as host:
        assert await said(host) == "ready"
        theirs = await outside.containers(host.pid)
        async with container() as ours:
            mine = await outside.containers()
            assert await prune_containers() == []
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "actbox", "prune", "--json"],
                capture_output=True,
                check=True,
                timeout=BOUND,
            )
            assert json.loads(done.stdout) == {"containers": []}
            assert await answers(ours)
            told = {info.pid: info.owner for info in await list_containers()}
            assert told[host.pid] == told[os.getpid()] == "alive"
            assert [one["Id"] for one in await outside.containers()] == [one["Id"] for one in mine]
        assert [one["Id"] for one in await outside.containers(host.pid)] == [one["Id"] for one in theirs]
        assert [one["State"] for one in await outside.containers(host.pid)] == ["running"]
        host.send_signal(signal.SIGKILL)
        host.wait()
        assert await outside.none_left(host.pid)


# -- the container ends ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("way", WAYS)
async def test_a_cell_whose_container_is_killed_is_lost(
    way: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.need_runtime(await outside.ask("GET", "info"), way)
    async with relayed(way, outside) as relay:
        monkeypatch.setenv("DOCKER_HOST", relay.url)
        async with container(way) as made, ExecutionClient(port=made.port) as client:
            cell = await started(client)
            await outside.kill()
            async with asyncio.timeout(BOUND):
                with pytest.raises(ExecutionLost) as caught:
                    await cell
            assert caught.value.text == "on"
            assert await outside.none_left()
            if way in ("nested", "stream"):
                with pytest.raises(ConnectionError):
                    await client.execute("1")
        async with container(way) as made:
            assert await answers(made)


# -- the daemon ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["nested", "separate", "stream"])
async def test_a_killed_daemon_ends_in_typed_outcomes_and_what_is_left_is_reaped(
    way: str, own: PrivateDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    its = Outside(own.url)
    async with relayed(way, its) as relay:
        monkeypatch.setenv("DOCKER_HOST", relay.url)
        made = container(way, tag=SLIM)
        await made.run()
        client = ExecutionClient(port=made.port)
        await client.connect()
        cell = await started(client, "print('on'); import time; time.sleep(1); print('off')")
        await asyncio.to_thread(own.kill)
        try:
            if way == "stream":
                with pytest.raises(ExecutionLost):
                    await cell
            else:
                # A control socket needs no daemon.
                assert (await cell).text == "on\noff"
            before = time.monotonic()
            await client.disconnect()
            await made.kill()
            assert time.monotonic() - before < BOUND
            with pytest.raises(SandboxUnavailable) as caught:
                await container(way, tag=SLIM).run()
            assert caught.value.layer == "docker"
        finally:
            await asyncio.to_thread(own.start)
        async with container(way, tag=SLIM) as made:
            assert await answers(made)
            mine = [one["State"] for one in await its.containers()]
            assert mine == (["running"] if way != "separate" else [])
    assert await its.none_left()
    assert folders() == mounts() == []


@pytest.mark.usefixtures("slim")
async def test_a_full_disk_of_the_daemon_is_a_typed_error_and_leaves_nothing(
    outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerd.required()
    saved = await asyncio.to_thread(tools.saved_slim, outside.url)
    with PrivateDaemon(tmp_path / "daemon", megabytes=600) as daemon:
        await asyncio.to_thread(daemon.load, saved)
        monkeypatch.setenv("DOCKER_HOST", daemon.url)
        filling = tmp_path / "daemon" / "data" / "filling"
        with pytest.raises(OSError, match="No space left"):
            await asyncio.to_thread(fill, filling)
        with pytest.raises(SandboxUnavailable) as caught:
            await container(tag=SLIM).run()
        assert "no space left" in str(caught.value)
        its = Outside(daemon.url)
        assert await its.none_left()
        assert folders() == mounts() == []
        filling.unlink()
        async with container(tag=SLIM) as made:
            assert await answers(made)


# -- starting and stopping -------------------------------------------------------------------------------------------


async def test_fifty_containers_leave_nothing(outside: Outside, tmp_path: Path) -> None:
    """E22."""

    async def one(number: int) -> None:
        async with (
            turn,
            CodeExecutionContainer(
                engine="docker", workspace_path=tmp_path / str(number % 4), preload=(), show_pull_progress=False
            ) as made,
            CodeExecutor("one", made.workspace, made.port) as executor,
        ):
            assert (await executor.execute("print(6 * 7)")).text == "42"

    turn = asyncio.Semaphore(4)
    await one(0)
    before = (folders(), mounts(), await outside.volumes(), descriptors())
    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(one(number))
    assert await outside.none_left()
    assert (folders(), mounts(), await outside.volumes()) == before[:3]
    assert await until(lambda: descriptors() <= before[3])
    assert tools.listed(tmp_path, "**/.actbox-*") == []


STEPS = (
    "GET /info",
    "GET /version",
    "GET /containers/json",
    "GET /images/",
    "POST /containers/create",
    "GET /containers/",
    "POST /containers/+/attach",
    "POST /containers/+/start",
)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("answers", [False, True], ids=["before it", "before its answer"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("way", ["nested", "stream"])
async def test_a_start_that_is_cancelled_at_a_request_leaves_nothing(
    way: str, step: str, *, answers: bool, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with relayed(way, outside) as relay:
        monkeypatch.setenv("DOCKER_HOST", relay.url)
        gate = relay.gate(step, answers=answers)
        starting = asyncio.create_task(container(way).run())
        async with asyncio.timeout(BOUND):
            await gate.held.wait()
        starting.cancel()
        # Whoever undoes the start needs the daemon.
        asyncio.get_running_loop().call_soon(relay.mend)
        async with asyncio.timeout(BOUND):
            with pytest.raises(asyncio.CancelledError):
                await starting


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("step", STEPS)
async def test_a_start_whose_connection_is_cut_at_a_request_is_a_typed_error(
    step: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with relayed("nested", outside) as relay:
        monkeypatch.setenv("DOCKER_HOST", relay.url)
        gate = relay.gate(step, answers=True)
        made = container()
        starting = asyncio.create_task(made.run())
        async with asyncio.timeout(BOUND):
            await gate.held.wait()
        relay.cut()
        relay.mend()
        async with asyncio.timeout(BOUND):
            (outcome,) = await asyncio.gather(starting, return_exceptions=True)
        # Questions are asked again.
        assert isinstance(outcome, SandboxUnavailable) or (outcome is None and step.startswith("GET"))
        await made.kill()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("step", ["_make_folder", "_mount", "remove_folder", "listen", "supervision"])
async def test_a_start_that_is_cancelled_between_requests_leaves_nothing(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step == "_mount" and not tools.IS_ROOT:
        pytest.skip("only root's folders are mounted")
    place, name = {
        "_make_folder": (engine_module, "_make_folder"),
        "_mount": (staging, "_mount"),
        "remove_folder": (owner, "remove_folder"),
        "listen": (boundary.DockerBoundary, "listen"),
        "supervision": (CodeExecutionContainer, "_start_boundary"),
    }[step]
    real = getattr(place, name)
    loop = asyncio.get_running_loop()
    made = CodeExecutionContainer(engine="docker", workspace_path=tmp_path, preload=(), show_pull_progress=False)

    def cancel_at_its_beginning(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(starting.cancel)
        # In a worker thread the loop goes on beside it, and the thread comes after the cancellation.
        if step in ("_mount", "remove_folder"):
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(BOUND)
        return real(*arguments)

    async def cancel_when_it_stands(*arguments: Any, **more: Any) -> Any:
        result = await real(*arguments, **more)
        starting.cancel()
        return result

    monkeypatch.setattr(place, name, cancel_when_it_stands if step == "supervision" else cancel_at_its_beginning)

    async def hold() -> None:
        async with made:
            await asyncio.Event().wait()

    starting = asyncio.create_task(hold())
    async with asyncio.timeout(BOUND):
        with pytest.raises(asyncio.CancelledError):
            await starting


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("way", ["nested", "separate", "stream"])
@pytest.mark.parametrize("error", [SandboxUnavailable("hardened container", "detail", "remedy"), KeyError("x")])
async def test_a_container_that_is_not_as_planned_is_removed_before_it_runs(
    way: str, error: Exception, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H15."""

    def audit(*_: object, **_more: object) -> None:
        raise error

    async with relayed(way, outside) as relay:
        monkeypatch.setenv("DOCKER_HOST", relay.url)
        monkeypatch.setattr(engine_module, "audit", audit)
        with pytest.raises(type(error)):
            await container(way).run()
        assert await outside.containers() == []
        assert not any("/start" in request for request in relay.requests)


# -- ps and prune ----------------------------------------------------------------------------------------------------


async def forged(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Containers that were never started, with the labels of owners near and far: {whose: id}."""
    here = owner.this_process()
    ended = await asyncio.to_thread(subprocess.Popen, ["true"])
    ended.wait()
    parts = {
        "alive": (here.machine, here.boot, here.space, here.pid, here.started),
        "ended": (here.machine, here.boot, here.space, ended.pid, "1"),
        "another of its number": (here.machine, here.boot, here.space, here.pid, int(here.started) - 1),
        "before the machine was started anew": (here.machine, "other", here.space, here.pid, here.started),
        "another pid namespace": (here.machine, here.boot, "1", here.pid, here.started),
        "another machine": ("other", here.boot, here.space, here.pid, here.started),
        "not ours": ("other", "label"),
    }
    image = (await outside.ask("GET", "images/actbox-default:latest/json"))["Id"]
    made: dict[str, str] = {}
    for name, owned in parts.items():
        labels = {owner.LABEL: "/".join(map(str, owned)), owner.TAG_LABEL: f"\x1b[2J{name}"}
        made[name] = await outside.create({"Image": image, "Cmd": ["python3"], "Labels": labels})
    return made


LIVES = {
    "alive": "alive",
    "ended": "dead",
    "another of its number": "dead",
    "before the machine was started anew": "dead",
    "another pid namespace": "unknown",
    "another machine": "unknown",
}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "actbox", *arguments], capture_output=True, encoding="utf-8", timeout=BOUND, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("as_json", [False, True])
async def test_ps_tells_whose_containers_there_are_and_prune_removes_those_of_the_dead(
    *, as_json: bool, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await forged(outside, monkeypatch)
    try:
        if as_json:
            listed = json.loads(command("ps", "--json").stdout)["containers"]
            mine = {one["id"]: one for one in listed if one["id"] in made.values()}
            assert {name: mine[made[name]]["owner"] for name in LIVES} == LIVES
            assert mine[made["alive"]] == {
                "id": made["alive"],
                "tag": "\x1b[2Jalive",
                "state": "created",
                "owner": "alive",
                "pid": os.getpid(),
                "machine": owner.this_process().machine,
                "age": mine[made["alive"]]["age"],
            }
            assert 0 <= mine[made["alive"]]["age"] < 60
        else:
            done = command("ps")
            head, *rows = done.stdout.splitlines()
            assert head.split() == ["CONTAINER", "STATE", "AGE", "PROCESS", "IMAGE"]
            by_id = {row.split()[0]: row for row in rows}
            words = {"alive": "", "dead": "(ended)", "unknown": "(elsewhere)"}
            for name, life in LIVES.items():
                row = by_id[made[name][:12]]
                assert words[life] in row
                assert ("(" in row) is (life != "alive")
                assert row.endswith(name)
            assert "\x1b" not in done.stdout
            assert "actbox prune" in done.stderr
        assert made["not ours"][:12] not in command("ps").stdout
        pruned = command("prune", "--json") if as_json else command("prune")
        dead = {made[name] for name, life in LIVES.items() if life == "dead"}
        if as_json:
            assert {one["id"] for one in json.loads(pruned.stdout)["containers"]} == dead
        else:
            assert {row.split()[0] for row in pruned.stdout.splitlines()[1:]} == {one[:12] for one in dead}
            assert all("removed" in row for row in pruned.stdout.splitlines()[1:])
        left = {one["Id"] for one in await outside.ask("GET", "containers/json", all="1")}
        assert left & set(made.values()) == set(made.values()) - dead
        assert "prune" not in command("ps").stderr
    finally:
        await outside.remove(*made.values())


@pytest.mark.parametrize("name", ["ps", "prune"])
async def test_ps_and_prune_say_that_no_daemon_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{tools.free_port()}")
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "actbox", name],
        capture_output=True,
        encoding="utf-8",
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == ExitCode.UNAVAILABLE
    assert "DOCKER_HOST" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def test_folders_of_ended_processes_are_swept_and_those_of_living_ones_are_not() -> None:
    mine = owner.make_folder()
    try:
        ended = await asyncio.to_thread(subprocess.Popen, ["true"])
        ended.wait()
        dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
        (dead / "s").mkdir(parents=True)
        (dead / "s" / "control").touch()
        (dead / "profile.json").touch()
        (dead / "kept").mkdir()
        (dead / "kept" / "file").touch()
        with contextlib.ExitStack() as stack:
            stack.callback(os.rmdir, dead)
            stack.callback(os.rmdir, dead / "kept")
            stack.callback(os.unlink, dead / "kept" / "file")
            owner.sweep()
            # What may be below a mount is never removed.
            assert sorted(path.name for path in dead.glob("**/*")) == ["file", "kept"]
        assert mine.is_dir()
    finally:
        owner.remove_folder(mine)
    assert not mine.exists()

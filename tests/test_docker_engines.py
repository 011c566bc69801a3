"""The engine "docker" over every way to an engine and on every engine: TCP, gVisor, Podman, and none at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import docker_tools as tools
import pytest
from docker_tools import SLIM, Outside, Relay, given, until

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ExecutionClient,
    ExecutionContainer,
    ExecutionInterrupted,
    ExecutionLost,
    ExecutionTimeout,
    KernelDied,
    SandboxUnavailable,
)
from actbox.engines.docker import daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from actbox import Execution

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90), pytest.mark.counting]

BOUND = 15.0
MEGABYTE = 1 << 20
POUR = "import os\ndata = b'x' * 65535 + b'\\n'\nfor _ in range({megabytes} * 16): os.write(1, data)\n"


@pytest.fixture(scope="module")
async def outside() -> Outside:
    return await tools.reached()


@pytest.fixture
async def relay(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Relay]:
    """A daemon at a TCP address; nothing of a container is left afterwards."""
    async with Relay(outside.socket) as made:
        monkeypatch.setenv("DOCKER_HOST", made.url)
        yield made
        assert await outside.none_left()
        assert tools.folders() == tools.mounts() == []


@pytest.fixture
async def container(relay: Relay) -> AsyncIterator[ExecutionContainer]:
    async with ExecutionContainer(engine="docker", preload=(), show_pull_progress=False) as made:
        yield made


async def size_of(cell: Execution) -> int:
    """How much a cell writes."""
    return sum([len(text) async for text in cell.stream(60)])


async def begun(client: ExecutionClient, code: str) -> Execution:
    cell = await client.submit(code)
    async for _ in cell.stream(BOUND):
        break
    return cell


# -- a TCP address ---------------------------------------------------------------------------------------------------


async def test_a_daemon_at_a_tcp_address_needs_none_of_our_files(
    container: ExecutionContainer, relay: Relay, outside: Outside, tmp_path: Path
) -> None:
    inspected = await outside.inspect()
    assert inspected["Mounts"] == []
    assert inspected["HostConfig"]["SecurityOpt"][0] == "no-new-privileges"
    assert container.isolation == "nested namespaces"
    (tmp_path / "up").write_bytes(os.urandom(3 * MEGABYTE))
    async with ExecutionClient(port=container.port) as client:
        assert (await client.execute("x = 6 * 7\nprint(x)")).text == "42"
        await client.upload_file("file", tmp_path / "up")
        assert (await client.execute("import os; print(os.path.getsize('file'), x)")).text == f"{3 * MEGABYTE} 42"
        await client.download_file("file", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == (tmp_path / "up").read_bytes()
    assert sum("/attach" in request for request in relay.requests) == 1


async def test_fifty_megabytes_come_over_tcp_whole(container: ExecutionContainer) -> None:
    async with ExecutionClient(port=container.port) as client:
        before = time.monotonic()
        assert await size_of(await client.submit(POUR.format(megabytes=50))) == 50 * MEGABYTE
        assert time.monotonic() - before < 30
        assert (await client.execute("print(1)")).text == "1"


async def test_cells_are_interrupted_and_killed_over_tcp(container: ExecutionContainer) -> None:
    async with ExecutionClient(port=container.port, interrupt_grace=1) as client:
        await client.execute("x = 1")
        cell = await begun(client, "print('on'); import time; time.sleep(999)")
        await cell.interrupt()
        with pytest.raises(ExecutionInterrupted) as interrupted:
            await cell.result(BOUND)
        assert interrupted.value.state_kept
        assert (await client.execute("print(x)")).text == "1"
        with pytest.raises(ExecutionTimeout) as late:
            await client.execute("import time; time.sleep(999)", timeout=0.3)
        assert late.value.state_kept
        deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(9)"
        with pytest.raises(ExecutionTimeout) as killed:
            await client.execute(deaf, timeout=0.3)
        assert not killed.value.state_kept
        with pytest.raises(KernelDied) as died:
            await client.execute("import os; os._exit(7)")
        assert died.value.exit_code == 7
        assert (await client.execute("print('x' in globals())")).text == "False"


async def test_a_session_is_forked_over_tcp(container: ExecutionContainer) -> None:
    async with ExecutionClient(port=container.port) as client:
        await client.execute("x = 1")
        async with await client.fork() as branch:
            await branch.execute("x = 2")
            await client.checkpoint("one")
            with pytest.raises(KernelDied):
                await client.execute("import os; os._exit(7)")
            await client.rollback("one")
            assert (await branch.execute("print(x)")).text == "2"
            assert (await client.execute("print(x)")).text == "1"


async def test_many_sessions_share_one_connection(container: ExecutionContainer, relay: Relay) -> None:
    attached = [request for request in relay.requests if "/attach" in request]

    async def one(number: int) -> None:
        async with ExecutionClient(port=container.port) as client:
            for turn in range(5):
                text = (await client.execute(f"print({number} * 1000 + {turn}, 'x' * 100_000)")).text or ""
                assert text == f"{number * 1000 + turn} {'x' * 100_000}"

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(one(number))
    assert [request for request in relay.requests if "/attach" in request] == attached
    assert len(attached) == 1


async def test_a_client_that_does_not_read_stalls_nobody(container: ExecutionContainer, relay: Relay) -> None:
    """G7, G8."""
    async with ExecutionClient(port=container.port) as slow, ExecutionClient(port=container.port) as quick:
        cell = await slow.submit(POUR.format(megabytes=40))
        reading = cell.stream(60)
        size = len(await anext(reading))
        assert await until(lambda: relay.carried > MEGABYTE)
        for _ in range(20):
            assert (await quick.execute("print('y' * 1000)", timeout=5)).text == "y" * 1000
        # What all the buffers on the way hold was sent, and no more.
        assert relay.carried < 20 * MEGABYTE
        size += sum([len(text) async for text in reading])
        assert size == 40 * MEGABYTE


@pytest.mark.parametrize("after", [1, 70_000, 3_000_000, 9_000_000])
@pytest.mark.parametrize("separate", [False, True])
async def test_a_cell_whose_link_is_cut_is_lost_and_its_container_goes(
    after: int, *, separate: bool, relay: Relay, outside: Outside
) -> None:
    async with (
        ExecutionContainer(engine="docker", preload=(), show_pull_progress=False, separate=separate) as made,
        ExecutionClient(port=made.port) as client,
    ):
        cell = await client.submit(POUR.format(megabytes=10) + "import time; time.sleep(999)")
        wanted = relay.carried + after
        reading = asyncio.create_task(cell.result(60))
        assert await until(lambda: relay.carried >= wanted or reading.done())
        assert not reading.done()
        relay.cut()
        async with asyncio.timeout(BOUND):
            with pytest.raises(ExecutionLost):
                await reading
        # By itself: its standard input has ended.
        assert await outside.none_left()


async def test_a_link_that_is_cut_for_good_takes_the_container_with_it(outside: Outside) -> None:
    with pytest.MonkeyPatch.context() as patch:
        async with Relay(outside.socket) as relay:
            patch.setenv("DOCKER_HOST", relay.url)
            made = ExecutionContainer(engine="docker", preload=(), show_pull_progress=False)
            await made.run()
            client = ExecutionClient(port=made.port)
            await client.connect()
            cell = await begun(client, "print('on'); import time; time.sleep(999)")
        # Nobody listens any more.
        with pytest.raises(ExecutionLost):
            await cell.result(BOUND)
        assert await outside.none_left()
        before = time.monotonic()
        await client.disconnect()
        await made.kill()
        assert time.monotonic() - before < BOUND


@pytest.mark.root
async def test_roots_folders_are_refused_where_no_mount_can_be_seen(relay: Relay, tmp_path: Path) -> None:
    if not tools.IS_ROOT:
        pytest.skip("an ordinary user's containers have that user's folders")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SandboxUnavailable) as caught:
        await ExecutionContainer(engine="docker", binds={str(folder): "data"}, preload=()).run()
    assert caught.value.layer == "folders"
    assert str(folder) in caught.value.detail
    assert f"chown -R 65534:65534 {folder}" in caught.value.remedy
    assert list(folder.iterdir()) == []
    # Read-only ones are as they are, and its remedy helps.
    os.chown(folder, tools.NOBODY, tools.NOBODY)
    async with (
        ExecutionContainer(engine="docker", binds={str(folder): "data"}, preload=()) as made,
        ExecutionClient(port=made.port) as client,
    ):
        await client.execute("open('data/file', 'w').close()")
    assert (folder / "file").stat().st_uid == tools.NOBODY


async def test_a_folder_that_the_engine_sees_otherwise_is_refused(outside: Outside, tmp_path: Path) -> None:
    """As on another machine, where a folder of the same name is there by chance."""
    shown, meant = tmp_path / "shown", tmp_path / "meant"
    for folder in (shown, meant):
        folder.mkdir()
        if tools.IS_ROOT:
            os.chown(folder, tools.NOBODY, tools.NOBODY)

    class Elsewhere(Relay):
        """Names another folder to the daemon, and ours in what it tells."""

        def outward(self, data: bytes) -> bytes:
            return data.replace(os.fsencode(meant), os.fsencode(shown))

        def homeward(self, data: bytes) -> bytes:
            return data.replace(os.fsencode(shown), os.fsencode(meant))

    with pytest.MonkeyPatch.context() as patch:
        async with Elsewhere(outside.socket) as relay:
            patch.setenv("DOCKER_HOST", relay.url)
            with pytest.raises(SandboxUnavailable) as caught:
                await ExecutionContainer(engine="docker", binds={str(meant): "data"}, preload=()).run()
            assert caught.value.layer == "folders"
            assert "/app/data" in caught.value.detail
            assert await outside.none_left()
    assert list(shown.iterdir()) == list(meant.iterdir()) == []


# -- runtimes --------------------------------------------------------------------------------------------------------


async def test_gvisor_runs_sessions_end_to_end(outside: Outside, workspace_path: Path) -> None:
    tools.need_runtime(await outside.ask("GET", "info"), "runsc")
    for folder in ("skills/private/one", "skills/private", "skills/shared", "images"):
        given(workspace_path / folder)
    async with (
        CodeExecutionContainer(
            engine="docker", runtime="runsc", workspace_path=workspace_path, preload=(), show_pull_progress=False
        ) as made,
        CodeExecutor("one", made.workspace, made.port, interrupt_grace=1) as executor,
    ):
        # A kernel of its own, which is no Linux.
        assert (await executor.execute("import os; print(os.uname().release)")).text != os.uname().release
        assert (await outside.inspect())["HostConfig"]["Runtime"] == "runsc"
        await executor.execute("open('file', 'w').write('kept'); x = 1")
        with pytest.raises(ExecutionTimeout) as late:
            await executor.execute("import time; time.sleep(999)", timeout=0.5)
        assert late.value.state_kept
        assert (await executor.execute("print(x)")).text == "1"
        assert await size_of(await executor.submit(POUR.format(megabytes=5))) == 5 * MEGABYTE
    assert (workspace_path / "skills" / "private" / "one" / "file").read_text() == "kept"
    assert await outside.none_left()


@pytest.mark.parametrize("engine", ["docker", "auto"])
async def test_an_unknown_runtime_is_refused_with_the_names_there_are(engine: str, outside: Outside) -> None:
    with pytest.raises(SandboxUnavailable) as caught:
        await ExecutionContainer(engine=engine, runtime="no-such").run()
    assert caught.value.layer == "runtime"
    for name in (await outside.ask("GET", "info"))["Runtimes"]:
        assert name in caught.value.detail
    assert await outside.containers() == []


# -- Podman ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def slim(outside: Outside) -> AsyncIterator[None]:
    await asyncio.to_thread(tools.build_slim, outside.url)
    yield
    await tools.remove_slim(outside)


@pytest.fixture(scope="module")
def podman(outside: Outside, slim: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """Podman's service, with storage of its own and `SLIM` in it; an ordinary user's is rootless."""
    if shutil.which("podman") is None:
        tools.lacking("no podman is installed")
    folder = tmp_path_factory.mktemp("podman")
    with tempfile.TemporaryDirectory(prefix="podman-", dir="/tmp") as run:
        (Path(run) / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = []\n[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        )
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DOCKER", "DBUS"))},
            "CONTAINERS_CONF": f"{run}/containers.conf",
            "XDG_RUNTIME_DIR": run,
        }
        command = ["podman", "--root", str(folder / "root"), "--runroot", f"{run}/run"]
        if not tools.IS_ROOT:
            asked = subprocess.run(
                [*command, "info", "--format", "{{.Store.GraphDriverName}}"],
                env=environ, cwd="/", capture_output=True, text=True, timeout=BOUND, check=False,
            )  # fmt: skip
            if asked.stdout.strip() != "overlay":
                pytest.skip(f"rootless podman copies images for every container here: {asked.stdout}{asked.stderr}")
        saved = tools.saved_slim(outside.url)
        loaded = subprocess.run(
            [*command, "load", "--input", saved],
            env=environ, cwd="/", capture_output=True, text=True, timeout=80, check=False,
        )  # fmt: skip
        if loaded.returncode:
            if tools.IS_ROOT:
                tools.lacking(f"podman: {loaded.stderr}")
            pytest.skip(f"rootless podman does not work here: {loaded.stderr}")
        url = f"unix://{run}/podman.sock"
        service = subprocess.Popen([*command, "system", "service", "-t", "0", url], env=environ, cwd="/")
        try:
            deadline = time.monotonic() + BOUND
            while not Path(f"{run}/podman.sock").is_socket():
                assert service.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield Outside(url)
        finally:
            service.terminate()
            service.wait(BOUND)
            clean = [*command, "system", "reset", "--force"]
            subprocess.run(clean, env=environ, cwd="/", capture_output=True, timeout=60, check=False)


@pytest.mark.root
@pytest.mark.parametrize("way", ["nested", "separate", "stream"])
async def test_podman_runs_sessions_end_to_end(
    way: str, podman: Outside, workspace_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", podman.url)
    for folder in ("skills/private/one", "skills/private", "skills/shared"):
        (workspace_path / folder).mkdir(parents=True, exist_ok=True)
        if way == "stream":
            given(workspace_path / folder)
    whose = (workspace_path / "skills" / "private" / "one").stat().st_uid
    async with contextlib.AsyncExitStack() as stack:
        if way == "stream":
            relay = await stack.enter_async_context(Relay(podman.socket))
            monkeypatch.setenv("DOCKER_HOST", relay.url)
        made = await stack.enter_async_context(
            CodeExecutionContainer(
                SLIM,
                engine="docker",
                workspace_path=workspace_path,
                preload=(),
                show_pull_progress=False,
                separate=way == "separate",
            )
        )
        executor = await stack.enter_async_context(CodeExecutor("one", made.workspace, made.port))
        assert made.isolation == ("one sandbox per session" if way == "separate" else "nested namespaces")
        await executor.execute("import six; open('file', 'w').write('kept'); x = 1")
        with pytest.raises(ExecutionTimeout) as late:
            await executor.execute("import time; time.sleep(999)", timeout=0.5)
        assert late.value.state_kept
        status = (await executor.execute("print(open('/proc/self/status').read())")).text or ""
        assert "NoNewPrivs:\t1" in status
        # By TCP no file of ours is seen, so that Podman can only have its own filter instead of ours.
        assert "Seccomp_filters:\t3" in status
        assert "CapBnd:\t0000000000000000" in status
        resolving = await executor.execute("import os; print(*(open(f).read() for f in FILES if os.path.exists(f)))"
            .replace("FILES", "['/etc/resolv.conf']"))  # fmt: skip
        assert (resolving.text or "").split() in (["nameserver", "127.0.0.1"], [])
        async with CodeExecutor("two", made.workspace, made.port) as other:
            assert (await other.execute("import os; print(os.listdir('/app/skills/private'))")).text == "['two']"
    file = workspace_path / "skills" / "private" / "one" / "file"
    assert file.read_text() == "kept"
    assert file.stat().st_uid == whose
    assert await podman.none_left()
    assert tools.mounts() == tools.folders() == []


@pytest.mark.root
@pytest.mark.usefixtures("podman")
async def test_a_cell_whose_podman_container_is_killed_is_lost(
    podman: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", podman.url)
    async with (
        ExecutionContainer(SLIM, engine="docker", preload=(), show_pull_progress=False) as made,
        ExecutionClient(port=made.port) as client,
    ):
        cell = await begun(client, "print('on'); import time; time.sleep(999)")
        await podman.kill()
        with pytest.raises(ExecutionLost):
            await cell.result(BOUND)
    assert await podman.none_left()


# -- no engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["no socket", "nobody listens", "a port", "no daemon", "nonsense", "silent"])
async def test_where_no_daemon_answers_the_remedy_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        writer.close()

    async def other(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"220 mail.example.org\r\n")
        writer.close()

    released = asyncio.Event()
    with tempfile.TemporaryDirectory(prefix="engine-", dir="/tmp") as folder:
        path = Path(folder) / "docker.sock"
        handler = {"silent": silent, "no daemon": other}.get(kind)
        server = await asyncio.start_unix_server(handler, path) if handler is not None else None
        if kind == "nobody listens":
            (await asyncio.start_unix_server(silent, path)).close()
        urls = {"a port": f"tcp://127.0.0.1:{tools.free_port()}", "nonsense": "gopher://x"}
        monkeypatch.setenv("DOCKER_HOST", urls.get(kind, f"unix://{path}"))
        monkeypatch.setattr(daemon, "ANSWER_SECONDS", 1.0)
        with pytest.raises(SandboxUnavailable) as caught:
            async with asyncio.timeout(BOUND):
                await ExecutionContainer(engine="docker").run()
        assert caught.value.layer == "docker"
        assert "DOCKER_HOST" in caught.value.remedy
        assert "actbox doctor --engine docker" in caught.value.remedy
        released.set()
        if server is not None:
            server.close()
    assert tools.folders() == []

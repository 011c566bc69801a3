"""What the tests of the engine "docker" share: a look at the daemon from outside, a relay to it, and hosts to kill.

Run as a script, `docker_tools.py WAY`, this file is a host process: it starts a container, tells that by a line, and
waits for its end. `WAY` is one of `WAYS`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import aiodocker
from needs import lacking
from registry import layer

from actbox import ExecutionClient, ExecutionContainer, SandboxUnavailable
from actbox.engines.docker import daemon, owner

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping

BOUND = 15.0
IS_ROOT = os.geteuid() == 0
NOBODY = 65534
# How a container is made, as arguments of `ExecutionContainer`; "stream" is nested, with the daemon at a TCP address.
WAYS: dict[str, dict[str, Any]] = {
    "nested": {},
    "separate": {"separate": True},
    "stream": {},
    "runsc": {"runtime": "runsc"},
}


async def until(condition: Callable[[], Awaitable[bool] | bool], seconds: float = BOUND) -> bool:
    """Wait for a condition, within the bound; whether it came to hold."""
    deadline = time.monotonic() + seconds
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)


# -- the daemon ------------------------------------------------------------------------------------------------------


class Outside:
    """A daemon at `url`, asked past the code under test."""

    def __init__(self, url: str) -> None:
        self.url = url

    @property
    def socket(self) -> str:
        """The path of its unix socket."""
        return self.url.removeprefix("unix://")

    async def ask(self, method: str, path: str, body: object = None, **parameters: str) -> Any:
        """The daemon's answer, if it is JSON.

        Raises:
            aiodocker.DockerError: it refuses.
        """
        async with (
            aiodocker.Docker(self.url) as docker,
            docker._query(path, method, params=parameters, data=None if body is None else json.dumps(body)) as answer,
        ):
            text = await answer.text()
        with contextlib.suppress(ValueError):
            return json.loads(text)
        return text

    async def fetch(self, path: str) -> bytes:
        """What the daemon sends."""
        async with aiodocker.Docker(self.url) as docker, docker._query(path) as answer:
            return await answer.read()

    async def containers(self, pid: int | None = None) -> list[dict[str, Any]]:
        """The containers that a process made; this one's without `pid`."""
        found = await self.ask("GET", "containers/json", all="1", filters=json.dumps({"label": [owner.LABEL]}))
        wanted = str(os.getpid() if pid is None else pid)
        return [one for one in found if one["Labels"][owner.LABEL].split("/")[3:4] == [wanted]]

    async def none_left(self, pid: int | None = None) -> bool:
        """Whether a process's containers go away within the bound."""
        return await until(lambda: self._has_none(pid))

    async def _has_none(self, pid: int | None) -> bool:
        return not await self.containers(pid)

    async def inspect(self, number: int = 0) -> dict[str, Any]:
        """All about one of this process's containers, the newest first."""
        return await self.ask("GET", f"containers/{(await self.containers())[number]['Id']}/json")

    async def kill(self) -> None:
        """Kill the first process of each of this process's containers."""
        for one in await self.containers():
            await self.ask("POST", f"containers/{one['Id']}/kill")

    async def create(self, body: Mapping[str, object]) -> str:
        """Make a container; its id."""
        return (await self.ask("POST", "containers/create", body))["Id"]

    async def remove(self, *containers: str) -> None:
        """Remove containers, those that are gone already too."""
        for one in containers:
            with contextlib.suppress(aiodocker.DockerError):
                await self.ask("DELETE", f"containers/{one}", force="1", v="1")

    async def images(self) -> set[str]:
        """The ids of all images, intermediate ones too."""
        return {one["Id"] for one in await self.ask("GET", "images/json", all="1")}

    async def volumes(self) -> set[str]:
        """The names of all volumes."""
        return {one["Name"] for one in (await self.ask("GET", "volumes"))["Volumes"] or ()}

    async def run(self, body: Mapping[str, object]) -> tuple[int, Any]:
        """Run a container to its end: its exit code, and the JSON that it wrote."""
        made = await self.create({"Tty": True, **body})
        try:
            await self.ask("POST", f"containers/{made}/start")
            async with asyncio.timeout(BOUND):
                code = (await self.ask("POST", f"containers/{made}/wait"))["StatusCode"]
            return code, await self.ask("GET", f"containers/{made}/logs", stdout="1")
        finally:
            await self.remove(made)


async def reached() -> Outside:
    """The daemon of this machine, with the default image built; skips the test, or fails it in CI, if there is none."""
    try:
        async with daemon.reach() as found, ExecutionContainer(engine="docker", preload=(), separate=True):
            return Outside(found.url)
    except SandboxUnavailable as exc:
        lacking(str(exc))
        raise


def need_runtime(info: Mapping[str, Any], way: str) -> None:
    """Skip a test of a way whose runtime the daemon lacks."""
    wanted = WAYS[way].get("runtime")
    if wanted is not None and wanted not in info["Runtimes"]:
        lacking(f"the engine has no runtime {wanted}")


def user() -> str:
    """Whom a container of this process's must run as, in the words of `inspect`."""
    return f"{NOBODY}:{NOBODY}" if IS_ROOT else f"{os.geteuid()}:{os.getegid()}"


def given(folder: Path) -> Path:
    """A folder that a container's user may write in every way, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if IS_ROOT:
        os.chown(folder, NOBODY, NOBODY)
    return folder


def uids(pid: int) -> set[str]:
    """The users that a process is, on this machine."""
    return set(Path(f"/proc/{pid}/status").read_text("utf-8").split("Uid:")[1].split()[:4])


def listed(folder: Path, pattern: str) -> list[str]:
    """The names of what matches a pattern in a folder."""
    return sorted(path.name for path in folder.glob(pattern))


# -- images ----------------------------------------------------------------------------------------------------------

SLIM = "actbox-test/slim:latest"


@dataclass(frozen=True, slots=True)
class Built:
    """How `actbox build` made `SLIM`: each line it wrote, and whether it still ran then."""

    lines: tuple[tuple[str, bool], ...]


def base() -> str:
    """The image that the tests build on."""
    named = os.environ.get("ACTBOX_DOCKER_BASE")
    if not named:
        lacking("ACTBOX_DOCKER_BASE names no image to build on")
    return named or ""


@functools.cache
def build_slim(url: str) -> Built:
    """Build a small image with IPython and six, once for all tests."""
    arguments = ["build", "-t", SLIM, "--engine", "docker", "--base", base(), "six"]
    environ = {**os.environ, "DOCKER_HOST": url}
    with subprocess.Popen(
        [sys.executable, "-m", "actbox", *arguments], env=environ, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stderr is not None
        lines = tuple((line.rstrip("\n"), process.poll() is None) for line in process.stderr)
    assert process.returncode == 0, lines
    return Built(lines)


async def remove_slim(outside: Outside) -> None:
    """Remove what `build_slim` made."""
    build_slim.cache_clear()
    saved_slim.cache_clear()
    with contextlib.suppress(aiodocker.DockerError):
        await outside.ask("DELETE", f"images/{SLIM}", force="1")


@functools.cache
def saved_slim(url: str) -> Path:
    """The same as a file, for a daemon of a test's own."""
    if shutil.which("docker") is None:
        lacking("no docker is installed")
    build_slim(url)
    folder = Path(tempfile.mkdtemp(prefix="actbox-slim-"))
    atexit.register(shutil.rmtree, folder)
    file = folder / "slim.tar"
    subprocess.run(["docker", "--host", url, "save", "--output", file, SLIM], check=True, timeout=60)
    return file


async def derived(outside: Outside, name: str, *lines: str, files: Mapping[str, bytes] | None = None) -> str:
    """An image made of `SLIM` by lines of a Dockerfile; `files` (executable) are what it can copy. Its name."""
    packed = layer({"Dockerfile": "\n".join((f"FROM {SLIM}", *lines)).encode(), **(files or {})})
    async with aiodocker.Docker(outside.url) as docker:
        told = await docker.images.build(fileobj=io.BytesIO(packed), encoding="identity", tag=name, rm=True)
    assert not any("error" in item for item in told), told
    return name


# -- what is left ----------------------------------------------------------------------------------------------------


def folders(pid: int | None = None) -> list[str]:
    """The folders for sockets and mounts that a process has now."""
    bases = {"/run", f"/run/user/{os.geteuid()}", "/tmp", tempfile.gettempdir()}
    name = f"actbox-*-{os.getpid() if pid is None else pid}-*"
    return sorted(str(path) for base in bases for path in Path(base).glob(name))


def mounts() -> list[str]:
    """The mounts that the engine has made for this process's containers."""
    lines = Path("/proc/self/mountinfo").read_text("utf-8").splitlines()
    own = re.compile(rf"/actbox-\d+-{os.getpid()}-")
    return sorted(place for place in (line.split()[4] for line in lines) if own.search(place))


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterdir keeps one open


# -- a relay ---------------------------------------------------------------------------------------------------------

_REQUEST = re.compile(rb"([A-Z]+) (?:/v[0-9.]+)?(/\S*) HTTP/1\.1\r\n")


@dataclass
class Gate:
    """Holds up requests that begin like `pattern`, "+" being one part of a path; with `answers` what is said to them.

    State: `held`, set once something waits; `opened`, set to let it go on.
    """

    pattern: str
    answers: bool
    held: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    def matches(self, request: str) -> bool:
        """Whether it holds this one up."""
        return re.match(re.escape(self.pattern).replace(r"\+", "[^/]+"), request) is not None


class Relay:
    """Carries connections to a daemon's unix socket, from a TCP port or a socket of its own; entering starts it.

    State: the open connections, the requests so far ("POST /containers/create"), the gates, and how many bytes came
    from the daemon.
    """

    def __init__(self, target: str, path: Path | None = None) -> None:
        self._target = target
        self._path = path
        self._writers: set[asyncio.StreamWriter] = set()
        self._gates: list[Gate] = []
        self._server: asyncio.Server
        self.requests: list[str] = []
        self.carried = 0

    async def __aenter__(self) -> Self:
        if self._path is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        else:
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        self.cut()
        self.mend()

    @property
    def url(self) -> str:
        """The address, as DOCKER_HOST wants it."""
        if self._path is not None:
            return f"unix://{self._path}"
        return "tcp://{}:{}".format(*self._server.sockets[0].getsockname())

    def outward(self, data: bytes) -> bytes:
        """What the daemon is told instead of `data`; of the same length."""
        return data

    def homeward(self, data: bytes) -> bytes:
        """What is heard instead of `data`; of the same length."""
        return data

    def gate(self, pattern: str, *, answers: bool = False) -> Gate:
        """Hold up every request that begins like `pattern` from now on."""
        made = Gate(pattern, answers)
        self._gates.append(made)
        return made

    def mend(self) -> None:
        """Let all go on that is held up, and hold up nothing more."""
        for gate in self._gates:
            gate.opened.set()
        self._gates.clear()

    def cut(self) -> None:
        """End all connections, at once."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_unix_connection(self._target, limit=1 << 20)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        state: list[Gate] = []
        tasks = [
            asyncio.ensure_future(self._outward(reader, back, state)),
            asyncio.ensure_future(self._homeward(there, writer, state)),
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for one in (writer, back):
                one.close()
                self._writers.discard(one)

    async def _outward(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, state: list[Gate]) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                request = _REQUEST.match(data)
                if request is not None:
                    named = f"{request[1].decode()} {request[2].decode()}"
                    self.requests.append(named)
                    matching = [gate for gate in self._gates if gate.matches(named)]
                    state[:] = [gate for gate in matching if gate.answers]
                    for gate in matching:
                        if not gate.answers:
                            gate.held.set()
                            await gate.opened.wait()
                back.write(self.outward(data))
                await back.drain()
            if back.can_write_eof():
                back.write_eof()

    async def _homeward(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, state: list[Gate]) -> None:
        with contextlib.suppress(OSError):
            while data := await there.read(1 << 16):
                for gate in tuple(state):
                    gate.held.set()
                    await gate.opened.wait()
                self.carried += len(data)
                writer.write(self.homeward(data))
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()


@contextlib.asynccontextmanager
async def socket_relay(target: str) -> AsyncGenerator[Relay]:
    """A relay that listens on a unix socket, so that the engine behind it is taken for this machine's."""
    with tempfile.TemporaryDirectory(prefix="relay-", dir="/tmp") as folder:
        async with Relay(target, Path(folder) / "docker.sock") as made:
            yield made


# -- hosts -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def host(way: str, url: str) -> Generator[subprocess.Popen[bytes]]:
    """A process that starts a container at the daemon `url`; killed at the end, if it still is."""
    command = [sys.executable, __file__, way]
    environ = {**os.environ, "DOCKER_HOST": url}
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def said(process: subprocess.Popen[bytes]) -> str:
    """The next line that a host prints."""
    assert process.stdout is not None
    async with asyncio.timeout(2 * BOUND):
        return (await asyncio.to_thread(process.stdout.readline)).decode().strip()


async def _hold(way: str) -> None:
    async with (
        ExecutionContainer(engine="docker", preload=(), show_pull_progress=False, **WAYS[way]) as container,
        ExecutionClient(port=container.port) as client,
    ):
        cell = await client.submit("print('on'); import time; time.sleep(999)")
        async for _ in cell.stream(999):
            break
        print("ready", flush=True)  # noqa: T201
        await asyncio.Event().wait()


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    asyncio.run(_hold(sys.argv[1]))

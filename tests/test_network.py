"""The way out of a session, from inside: real clients in real sessions, on every engine, against servers on loopback.

C1 to C27 are the cases of the containment suite; what the proxy alone decides is in `test_egress_proxy.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker_tools as tools
import pytest
from docker_tools import WAYS, until
from needs import lacking
from outside import LOOPBACK, MIB, SECONDS, Names, Server, make_certificate, serving, web
from sandboxes import sandboxed

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ExecutionClient,
    ExecutionContainer,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionTimeout,
    Network,
    execution_environment,
)
from actbox.cli import ExitCode
from actbox.guest import forwarder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from actbox.egress import Record

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

ENDLESS = 1 << 40
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "PIP_TARGET")

# What sessions are given to try things with.
TOOLS = r"""
import ctypes, errno, glob, json, os, signal, socket, ssl, threading, urllib.error, urllib.request

def fetch(url, data=None, opener=urllib.request.build_opener()):
    "The status and the text of what is there, or 0 and the error."
    try:
        with opener.open(url, data, timeout=10) as answer:
            return [answer.status, answer.read().decode()]
    except urllib.error.HTTPError as error:
        with error:
            return [error.code, error.reason]
    except OSError as error:
        return [0, str(error)]

def port():
    return int(os.environ["HTTP_PROXY"].rpartition(":")[2])

def dial(data=b"", to=None):
    made = socket.create_connection(("127.0.0.1", to or port()), 10)
    made.sendall(data)
    return made

def all_of(sock):
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data.decode()

def named(function, *args):
    "What came of a call: ok, or the error's name."
    try:
        function(*args)
    except socket.gaierror:
        return "gaierror"
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    return "ok"

def connect(host, port, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as sock:
        sock.settimeout(5)
        sock.connect((host, port))
        sock.sendall(b"x")

def peer(number):
    "The certificate that ok.example shows."
    with dial(b"CONNECT ok.example:%d HTTP/1.1\r\n\r\n" % number) as sock:
        sock.recv(4096)
        with ssl._create_unverified_context().wrap_socket(sock, server_hostname="ok.example") as wrapped:
            return ssl.DER_cert_to_PEM_cert(wrapped.getpeercert(True))

def pids():
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())

def forwarder():
    "The process that listens: neither the kernel nor a child of it, and the youngest of those."
    return max(pid for pid in pids() if pid not in (1, os.getpid()) and parent(pid) != os.getpid())

def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])

def state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""

def peak(pid):
    "The most memory that a process ever held, in MiB."
    with open(f"/proc/{pid}/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) // 1024

def listeners():
    found = []
    for name in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{name}") as file:
                found += [line.split()[1] for line in file if line.split()[3] == "0A"]
        except OSError:
            pass
    return found
"""


async def ask(client: ExecutionClient, code: str) -> Any:
    """The value of an expression in a session."""
    result = await client.execute(f"print(json.dumps({code}))", timeout=30)
    return json.loads((result.text or "").splitlines()[-1])


async def begun(client: ExecutionClient, code: str) -> Any:
    """A cell that has printed something."""
    cell = await client.submit(code)
    async for _ in cell.stream(SECONDS):
        break
    return cell


async def holds(condition: Callable[[], bool]) -> None:
    assert await until(condition, SECONDS)


def held() -> tuple[int, int]:
    """The files and the tasks of this process."""
    return tools.descriptors(), len(asyncio.all_tasks())


async def no_more_than(before: tuple[int, int]) -> None:
    """Wait until there are no more files and tasks than before; fewer there may be, as connections to a daemon end."""
    await until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)), SECONDS)
    assert all(now <= then for now, then in zip(held(), before, strict=True)), (held(), before)


# -- the world, and a container that may see a part of it --------------------------------------------------------------


@dataclass
class World:
    """Servers, plain and in TLS, and the certificate of the latter."""

    plain: Server
    secret: Server
    certificate: Path

    @property
    def url(self) -> str:
        return f"http://ok.example:{self.plain.port}"

    @property
    def secret_url(self) -> str:
        return f"https://ok.example:{self.secret.port}"

    def network(self, **bounds: Any) -> Network:
        """What allows ok.example."""
        allow = [f"http://ok.example:{self.plain.port}", f"ok.example:{self.secret.port}"]
        return Network(allow, private=["ok.example"], **bounds)

    def reset(self) -> None:
        for server in (self.plain, self.secret):
            server.connections = server.received = server.sent = 0


@pytest.fixture(scope="module")
async def served(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    certificate = make_certificate(tmp_path_factory.mktemp("tls"))
    async with serving(web) as plain, serving(web, certificate) as secret:
        yield World(plain, secret, certificate)


@pytest.fixture
async def world(served: World) -> World:
    """The servers, with nothing on them."""
    await holds(lambda: served.plain.open == served.secret.open == 0)
    served.reset()
    return served


def names() -> Names:
    return Names(ok_example=LOOPBACK, other_example=LOOPBACK, index_example=LOOPBACK)


# Not in the default image, and no reason to make another: they are Python, and a session imports its skills.
CLIENTS = ("requests", "httpx", "urllib3", "certifi", "charset_normalizer", "idna", "httpcore", "h11", "anyio")


def show_clients(folder: Path) -> None:
    for package in (*CLIENTS, "typing_extensions"):
        for file in importlib.metadata.files(package) or ():
            if file.suffix == ".py" or file.name.endswith(".pem"):
                place = folder / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), place)


@pytest.fixture(scope="module")
async def networked(
    engine: str, served: World, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[CodeExecutionContainer]:
    """A container whose sessions may reach ok.example, and trust its certificate."""
    workspace = tmp_path_factory.mktemp("workspace")
    shared = workspace / "skills" / "shared"
    shared.mkdir(parents=True)
    for folder in (workspace, shared.parent, shared):
        folder.chmod(0o755)
    (shared / "trusted.pem").write_text(served.certificate.read_text("ascii").partition("-----BEGIN PRIVATE")[0])
    if engine == "docker":
        show_clients(shared)
    place = "/app/skills/shared/trusted.pem"
    trusted: dict[str, str] = {"SSL_CERT_FILE": place, "REQUESTS_CA_BUNDLE": place}
    async with CodeExecutionContainer(
        workspace_path=workspace, engine=engine, env=trusted, network=served.network(), preload=()
    ) as made:
        made.resolver = names()
        yield made


@contextlib.asynccontextmanager
async def session(container: CodeExecutionContainer, key: str = "one") -> AsyncGenerator[CodeExecutor]:
    async with CodeExecutor(key, container.workspace, container.port) as made:
        await made.execute(TOOLS)
        yield made


@contextlib.asynccontextmanager
async def container_of(engine: str, network: Network | None, **more: Any) -> AsyncGenerator[ExecutionContainer]:
    async with ExecutionContainer(engine=engine, network=network, preload=(), show_pull_progress=False, **more) as made:
        made.resolver = names()
        yield made


@contextlib.asynccontextmanager
async def session_of(container: ExecutionContainer, **more: Any) -> AsyncGenerator[ExecutionClient]:
    async with ExecutionClient(port=container.port, **more) as made:
        await made.execute(TOOLS)
        yield made


@pytest.fixture
async def client(networked: CodeExecutionContainer) -> AsyncIterator[CodeExecutor]:
    async with session(networked) as made:
        yield made


# -- what is listed ----------------------------------------------------------------------------------------------------


async def test_urllib_requests_and_httpx_reach_what_is_listed(client: CodeExecutor, world: World) -> None:
    for get in ("urllib.request.urlopen({0!r}).read()", "requests.get({0!r}).text", "httpx.get({0!r}).text"):
        module = get.partition(".")[0]
        for url in (world.url, world.secret_url):
            await client.execute(f"import {module}")
            assert await ask(client, f"json.loads({get.format(url + '/path')})") == {
                "method": "GET",
                "path": "/path",
                "length": 0,
            }
    assert (world.plain.connections, world.secret.connections) == (3, 3)


async def test_curl_reaches_what_is_listed(client: CodeExecutor, world: World) -> None:
    if await ask(client, "__import__('shutil').which('curl')") is None:
        lacking("there is no curl inside")
    for url in (world.url, world.secret_url):
        assert '"path": "/curl"' in str((await client.execute(f"!curl -sS {url}/curl")).text)
    refused = (await client.execute("!curl -sSi https://evil.example/")).text or ""
    assert "HTTP/1.1 403 Forbidden: evil.example is not on the allow-list" in refused


async def test_a_certificate_that_is_not_trusted_is_not_made_so(
    networked: CodeExecutionContainer, world: World
) -> None:
    """Nobody stands in the middle: the session sees the server's own certificate."""
    async with session(networked) as client:
        await client.execute("del os.environ['SSL_CERT_FILE']")
        assert "CERTIFICATE_VERIFY_FAILED" in (await ask(client, f"fetch({world.secret_url!r})"))[1]
        found = await ask(client, f"peer({world.secret.port})")
        assert found.strip() in world.certificate.read_text("ascii")


async def test_what_is_not_listed_is_refused_by_its_name(client: CodeExecutor, world: World) -> None:
    """C8, C12."""
    plain = await ask(client, "fetch('http://other.example/')")
    assert plain == [403, "Forbidden: other.example is not on the allow-list of this session"]
    secret = await ask(client, "fetch('https://other.example/')")
    assert secret[0] == 0
    assert "403 Forbidden: other.example is not on the allow-list of this session" in secret[1]
    port = await ask(client, f"fetch('http://ok.example:{world.secret.port}/')")
    assert port[0] == 403
    # C8: metadata services, by address and by name.
    for host in ("169.254.169.254", "[fd00:ec2::254]", "metadata.google.internal"):
        assert (await ask(client, f"fetch('http://{host}:80/')"))[0] == 403
    # C26: the second hop is a request of its own.
    hop = await ask(client, f"fetch('{world.url}/go?http://other.example/')")
    assert hop == [403, "Forbidden: other.example is not on the allow-list of this session"]
    assert (world.plain.connections, world.secret.connections) == (1, 0)


# -- pip ---------------------------------------------------------------------------------------------------------------


def wheel() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        place = "tinypk-1.0.dist-info"
        files = {
            "tinypk.py": "VALUE = 42\n",
            f"{place}/METADATA": "Metadata-Version: 2.1\nName: tinypk\nVersion: 1.0\n",
            f"{place}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{name},,\n" for name in (*files, f"{place}/RECORD"))
        for name, text in {**files, f"{place}/RECORD": record}.items():
            archive.writestr(name, text)
    return data.getvalue()


async def index(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An index of one package (PEP 503)."""
    name = "tinypk-1.0-py3-none-any.whl"
    pages = {
        "/simple/tinypk/": ("text/html", f'<a href="{name}">{name}</a>'.encode()),
        f"/simple/tinypk/{name}": ("application/octet-stream", wheel()),
    }
    head = await reader.readuntil(b"\r\n\r\n")
    server.heads.append(head)
    kind, body = pages.get(head.split(b" ", 2)[1].decode(), ("text/plain", b""))
    status = b"200 OK" if body else b"404 Not Found"
    writer.write(b"HTTP/1.1 %s\r\nContent-Type: %s\r\n" % (status, kind.encode()))
    writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def test_what_pip_installs_is_importable_in_the_next_cell_and_gone_with_the_session(
    engine: str, workspace_path: Path
) -> None:
    async with serving(index) as server:
        network = Network([f"http://index.example:{server.port}"], private=["index.example"])
        async with CodeExecutionContainer(
            engine=engine, workspace_path=workspace_path, network=network, preload=()
        ) as container:
            container.resolver = names()
            where = f"--index-url http://index.example:{server.port}/simple --trusted-host index.example"
            async with session(container) as client:
                with pytest.raises(ExecutionError, match="No module named 'tinypk'"):
                    await client.execute("import tinypk")
                told = await client.execute(f"%pip install --no-input {where} tinypk", timeout=45)
                assert "Successfully installed tinypk-1.0" in (told.text or "")
                assert (await client.execute("import tinypk; print(tinypk.VALUE)")).text == "42"
            assert any(b"/simple/tinypk/tinypk-1.0" in head for head in server.heads)
            async with session(container) as client, session(container, "two") as other:
                for each in (client, other):
                    with pytest.raises(ExecutionError, match="No module named 'tinypk'"):
                        await each.execute("import tinypk")


# -- past the proxy ----------------------------------------------------------------------------------------------------

OUTSIDE = [
    *(["1.1.1.1", 443], ["8.8.8.8", 53], ["169.254.169.254", 80], ["10.0.0.1", 80], ["192.168.0.1", 80]),
    *(["2606:4700:4700::1111", 443], ["fd00:ec2::254", 80]),
]
NO_ROUTE = {"ENETUNREACH", "EADDRNOTAVAIL", "EAFNOSUPPORT"}


async def test_there_is_no_way_but_the_proxy(client: CodeExecutor, world: World) -> None:
    """C1, C2, C8, C27: with a network there is no more of one than without."""
    for kind in ("STREAM", "DGRAM"):
        found = await ask(client, f"[named(connect, *to, socket.SOCK_{kind}) for to in {OUTSIDE}]")
        assert set(found) <= NO_ROUTE
        assert found[0] == "ENETUNREACH"
    for name in ("ok.example", "x.attacker.tld", "metadata.google.internal"):
        assert await ask(client, f"named(socket.getaddrinfo, {name!r}, 80)") == "gaierror"
    # The host's own loopback is another one (C3).
    assert await ask(client, f"named(connect, '127.0.0.1', {world.plain.port})") == "ECONNREFUSED"
    assert await ask(client, "[line.split(':')[0].strip() for line in open('/proc/net/dev')][2:]") == ["lo"]
    # What says that no proxy is wanted only takes the way away.
    for without in (
        "os.environ.update(NO_PROXY='*', no_proxy='*')",
        "[os.environ.pop(name) for name in list(os.environ) if name.lower().endswith('_proxy')]",
    ):
        status, error = await ask(client, f"({without}, fetch({world.url!r}, opener=urllib.request.build_opener()))[1]")
        assert status == 0
        assert re.search("Name or service not known|name resolution|No address", error)
    assert world.plain.connections == 0


async def test_no_socket_of_the_hosts_services_is_there(client: CodeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """C9."""
    places = ["/var/run/docker.sock", "/run/docker.sock", "/run/containerd/*.sock", "/run/user/*/bus", "/run/actbox*"]
    assert await ask(client, f"[path for place in {places} for path in glob.glob(place)]") == []
    assert await ask(client, "[name for name in os.environ if name in ('SSH_AUTH_SOCK', 'DOCKER_HOST')]") == []


async def test_the_kernel_holds_nothing_of_the_way_out(client: CodeExecutor) -> None:
    """A27: the socket on which connections are asked for is another process's, which cannot be looked into."""
    await client.execute(
        "def links():\n"
        "    found = []\n"
        "    for fd in sorted(map(int, os.listdir('/proc/self/fd'))):\n"
        "        try: found.append(os.readlink(f'/proc/self/fd/{fd}').partition(':')[0])\n"
        "        except OSError: pass\n"
        "    return sorted(name for name in found if name != 'anon_inode')"
    )
    assert await ask(client, "links()") == ["/dev/null", "pipe", "pipe", "pipe", "pipe", "socket", "socket"]
    other = await ask(client, "forwarder()")
    for place in ("fd", "mem", "maps", "environ"):
        open_ = "os.listdir" if place == "fd" else "open"
        assert await ask(client, f"named({open_}, '/proc/{other}/{place}')") in ("EACCES", "EPERM")
    # pidfd_getfd and ptrace, by their numbers.
    for call in (f"syscall(438, os.pidfd_open({other}), 3, 0)", f"ptrace(16, {other}, 0, 0)"):
        code = f"(ctypes.CDLL(None, use_errno=True).{call}, errno.errorcode[ctypes.get_errno()])"
        assert await ask(client, code) in ([-1, "EPERM"], [-1, "EACCES"], [-1, "ENOSYS"])


def number_inside(pid: int) -> int:
    found = re.search(r"NSpid:.*\s(\d+)\n", Path(f"/proc/{pid}/status").read_text("utf-8"))
    return int(found[1]) if found is not None else 0


async def seen_from_here(client: ExecutionClient, before: set[int]) -> int:
    """The forwarder of a session, as this machine numbers it; `before` are the processes of the time before it."""
    number = await ask(client, "forwarder()")
    for pid in sandboxed(os.getpid()) - before:
        with contextlib.suppress(OSError):
            if number_inside(pid) == number:
                return pid
    raise AssertionError(number)


async def test_the_way_ends_with_the_forwarder_and_the_session_goes_on(
    networked: CodeExecutionContainer, world: World
) -> None:
    """C22: where the system lets a session, it may kill it. Nothing becomes direct then."""
    async with session(networked, "two") as other:
        before = sandboxed(os.getpid())
        async with session(networked) as client:
            assert (await ask(client, f"fetch({world.url!r})"))[0] == 200
            await client.execute("x = 42; victim = forwarder(); idle = dial()")
            if await ask(client, "named(os.kill, victim, signal.SIGKILL)") != "ok":
                os.kill(await seen_from_here(client, before), signal.SIGKILL)
            await client.execute("while state(victim) not in ('', 'Z'): pass")
            assert await ask(client, "all_of(idle)") == ""
            for url in (world.url, world.secret_url):
                status, error = await ask(client, f"fetch({url!r})")
                assert (status, "refused" in error) == (0, True)
            assert await ask(client, "named(connect, '1.1.1.1', 443)") == "ENETUNREACH"
            assert await ask(client, "x") == 42
            # Nobody else's way has ended.
            assert (await ask(other, f"fetch({world.url!r})"))[0] == 200
    async with session(networked) as client:
        assert (await ask(client, f"fetch({world.url!r})"))[0] == 200


async def test_a_forwarder_that_is_stopped_holds_up_nothing(networked: CodeExecutionContainer, world: World) -> None:
    async with session(networked, "two") as other:
        before = sandboxed(os.getpid())
        async with session(networked) as client:
            victim = await seen_from_here(client, before)
            os.kill(victim, signal.SIGSTOP)
            await client.execute("waiting = [dial() for _ in range(20)]")
            assert (await ask(other, f"fetch({world.url!r})"))[0] == 200
            os.kill(victim, signal.SIGCONT)
            await client.execute("[sock.close() for sock in waiting]")
            assert (await ask(client, f"fetch({world.url!r})"))[0] == 200
            os.kill(victim, signal.SIGSTOP)
        assert (await ask(other, f"fetch({world.url!r})"))[0] == 200


async def test_a_session_cannot_use_the_way_of_another(
    networked: CodeExecutionContainer, engine: str, world: World
) -> None:
    """C23: of the same container, of one with another list, or of one without any."""
    others = Network(["http://other.example"], private=["other.example"])
    async with (
        container_of(engine, others) as listed,
        container_of(engine, None) as closed,
        session(networked) as first,
        session(networked, "two") as second,
        session_of(listed) as third,
        session_of(closed) as fourth,
    ):
        port = await ask(first, "port()")
        request = f"b'GET {world.url}/ HTTP/1.1\\r\\n\\r\\n'"
        assert "200 OK" in await ask(first, f"all_of(dial({request}))")
        world.reset()
        # Every session sees its own processes alone, and of the listeners its own.
        assert [len(await ask(each, "pids()")) for each in (first, second, third, fourth)] == [3, 3, 3, 2]
        assert [len(await ask(each, "listeners()")) for each in (first, second, third, fourth)] == [1, 1, 1, 0]
        for each in (third, fourth):
            answer = await ask(
                each,
                f"(lambda: all_of(dial({request}, {port})))() if named(connect, '127.0.0.1', {port}) == 'ok' else ''",
            )
            assert "200 OK" not in answer
        assert (await ask(third, f"fetch({world.url!r})")) == [
            403,
            "Forbidden: ok.example is not on the allow-list of this session",
        ]
        assert (await ask(fourth, f"fetch({world.url!r})"))[0] == 0
        assert world.plain.connections == 0


async def test_a_relay_inside_changes_no_answer(client: CodeExecutor, world: World) -> None:
    """C24: who asks is the session, whichever of its processes it is, and however often it is handed on."""
    await client.execute(
        "def relay(listener):\n"
        "    while True:\n"
        "        connection, _ = listener.accept()\n"
        "        with connection, dial(connection.recv(65536)) as way:\n"
        "            connection.sendall(all_of(way).encode())\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "threading.Thread(target=relay, args=(listener,), daemon=True).start()\n"
        "there = listener.getsockname()[1]"
    )
    for target, status in (
        (f"GET {world.url}/", "200"),
        ("GET http://other.example/", "403"),
        ("CONNECT other.example:443", "403"),
        ("CONNECT 169.254.169.254:443", "403"),
    ):
        answer = await ask(client, f"all_of(dial(b'{target} HTTP/1.1\\r\\n\\r\\n', there))")
        assert answer.startswith(f"HTTP/1.1 {status} ")
    assert world.plain.connections == 1


async def test_without_a_network_nothing_of_it_is_there(engine: str) -> None:
    """C27."""
    async with container_of(engine, None) as container, session_of(container) as client:
        names_ = [spelt for name in VARIABLES for spelt in (name, name.lower())]
        assert await ask(client, f"[name for name in {names_} if name in os.environ]") == []
        assert await ask(client, "[listeners(), os.path.exists('/tmp/.packages'), len(pids())]") == [[], False, 2]
        assert container.network is None
        assert container.egress == ()


# -- what it bears -----------------------------------------------------------------------------------------------------


async def test_many_connections_at_once_are_served(client: CodeExecutor, world: World) -> None:
    """C25."""
    await client.execute(
        "from concurrent.futures import ThreadPoolExecutor\n"
        f"with ThreadPoolExecutor(32) as pool: found = list(pool.map(fetch, [f'{world.url}/{{i}}' for i in range(96)]))"
    )
    found = await ask(client, "found")
    assert [status for status, _ in found] == [200] * 96
    assert [json.loads(text)["path"] for _, text in found] == [f"/{number}" for number in range(96)]


async def test_who_has_too_many_connections_is_told_so(networked: CodeExecutionContainer, world: World) -> None:
    """C25."""
    async with session(networked) as client, session(networked, "two") as other:
        before = tools.descriptors()
        await client.execute("idle = [dial() for _ in range(150)]")
        told = await ask(client, "[all_of(sock).partition('\\r\\n')[0] for sock in idle[64:]]")
        assert len(set(told)) == 1
        assert told[0].startswith("HTTP/1.1 503 Service Unavailable: the session has 64 connections open already")
        assert tools.descriptors() <= before + 64
        # It is that session's own bound, and over when they are.
        assert (await ask(other, f"fetch({world.url!r})"))[0] == 200
        await client.execute("[sock.close() for sock in idle]")
        await holds(lambda: tools.descriptors() <= before)
        assert (await ask(client, f"fetch({world.url!r})"))[0] == 200


async def test_a_session_that_asks_without_end_harms_no_other(networked: CodeExecutionContainer, world: World) -> None:
    """C25."""
    async with session(networked) as client, session(networked, "two") as other:
        before = tools.descriptors()
        storm = await begun(client, "print('on')\nwhile True: dial(b'\\x00garbage').close()")
        for _ in range(20):
            assert (await ask(other, f"fetch({world.url!r})"))[0] == 200
            assert tools.descriptors() < before + 200
        await storm.interrupt()
        with pytest.raises(ExecutionInterrupted) as interrupted:
            await storm.result(SECONDS)
        assert interrupted.value.state_kept
        assert (await ask(client, f"fetch({world.url!r})"))[0] == 200


def forget_peak() -> None:
    """Have the system measure anew; see proc_pid_clear_refs(5)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """The most memory that this process has held since then, in MiB."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return int(found[1]) // 1024


async def test_what_is_large_goes_through_and_is_kept_nowhere(client: CodeExecutor, world: World) -> None:
    """C25."""
    most = 64 * MIB
    forget_peak()
    before = peak()
    inside = await ask(client, "peak(forwarder())")
    url = f"{world.url}/long?{most}"
    await client.execute(
        f"with urllib.request.urlopen({url!r}) as answer:\n"
        "    came = 0\n"
        "    while piece := answer.read(1 << 20): came += len(piece)"
    )
    assert await ask(client, "came") == most
    await client.execute(
        "def pieces():\n"
        "    for _ in range(64): yield bytes(1 << 20)\n"
        f"request = urllib.request.Request('{world.url}/up', pieces(), {{'Content-Length': str({most})}})"
    )
    assert json.loads((await ask(client, "fetch(request)"))[1])["length"] == most
    assert world.plain.received == most
    assert peak() - before < 24
    assert await ask(client, "peak(forwarder())") - inside < 8


async def test_who_does_not_read_is_not_read_for(networked: CodeExecutionContainer, world: World) -> None:
    async with session(networked) as client, session(networked, "two") as other:
        await client.execute(f"slow = dial(b'GET {world.url}/long?{ENDLESS} HTTP/1.1\\r\\n\\r\\n'); slow.recv(1)")
        for _ in range(20):
            assert (await ask(other, f"fetch({world.url!r})"))[0] == 200
        assert 0 < world.plain.sent < 32 * MIB


# -- ends --------------------------------------------------------------------------------------------------------------


async def test_a_download_is_interrupted_and_the_way_stays(client: CodeExecutor, world: World) -> None:
    cell = await begun(
        client,
        f"print('on')\nwith urllib.request.urlopen('{world.url}/long?{ENDLESS}') as answer:\n"
        "    while answer.read(1 << 16): pass",
    )
    await holds(lambda: world.plain.sent > MIB)
    await cell.interrupt()
    with pytest.raises(ExecutionInterrupted) as interrupted:
        await cell.result(SECONDS)
    assert interrupted.value.state_kept
    # Its server learns of it.
    await holds(lambda: world.plain.open == 0)
    assert (await ask(client, f"fetch({world.url!r})"))[0] == 200


async def test_a_kernel_killed_in_a_download_leaves_nothing(networked: CodeExecutionContainer, world: World) -> None:
    before = held()
    async with CodeExecutor("one", networked.workspace, networked.port, interrupt_grace=0.2) as client:
        await client.execute(TOOLS)
        with pytest.raises(ExecutionTimeout) as late:
            await client.execute(
                "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                f"answers = [urllib.request.urlopen('{world.url}/long?{ENDLESS}') for _ in range(8)]\n"
                "while True: [answer.read(1 << 16) for answer in answers]",
                timeout=2,
            )
        assert not late.value.state_kept
        assert world.plain.connections == 8
        await holds(lambda: world.plain.open == 0)
        # The next kernel has a way of its own.
        await client.execute(TOOLS)
        assert (await ask(client, f"fetch({world.url!r})"))[0] == 200
    await no_more_than(before)


async def test_a_closed_session_leaves_nothing(networked: CodeExecutionContainer, world: World) -> None:
    before, logged = held(), len(networked.egress)
    async with session(networked) as client:
        await client.execute(
            f"slow = [dial(b'GET {world.url}/long?{ENDLESS} HTTP/1.1\\r\\n\\r\\n') for _ in range(10)]\n"
            f"[sock.recv(1) for sock in slow]\n"
            f"half = [dial(b'CONNECT ok.example:{world.secret.port} HTTP/1.1\\r\\n\\r\\n') for _ in range(10)]\n"
            "[sock.recv(1) for sock in half]\n"
            "idle = [dial() for _ in range(10)]"
        )
        assert world.plain.open == 10
    await holds(lambda: world.plain.open == 0)
    await no_more_than(before)
    # Each that was answered has its record, whichever ended first, it or the session.
    assert len(networked.egress) >= logged + 20


# -- the records -------------------------------------------------------------------------------------------------------


async def test_every_connection_leaves_a_record(
    networked: CodeExecutionContainer, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Record] = []
    networked.on_egress = told.append
    try:
        with caplog.at_level(logging.INFO, "actbox.egress"):
            async with session(networked) as client:
                await ask(client, f"fetch('{world.url}/long?100000')")
                await ask(client, "fetch('https://other.example/')")
                await holds(lambda: len(told) == 2)
    finally:
        networked.on_egress = None
    assert networked.egress[-2:] == tuple(told)
    assert [(record.host, record.port, record.address, str(record.verdict)) for record in told] == [
        ("ok.example", world.plain.port, LOOPBACK, "allowed"),
        ("other.example", 443, "", "refused"),
    ]
    assert told[0].bytes_down > 100_000
    assert 0 < told[0].bytes_up < 1000
    assert [entry.getMessage() for entry in caplog.records if entry.name == "actbox.egress"] == list(map(str, told))


async def test_a_record_that_cannot_be_taken_harms_nobody(networked: CodeExecutionContainer, world: World) -> None:
    def refuse(record: Record) -> None:
        raise RuntimeError(record.host)

    networked.on_egress = refuse
    try:
        async with session(networked) as client:
            assert (await ask(client, f"fetch({world.url!r})"))[0] == 200
            assert (await ask(client, f"fetch({world.url!r})"))[0] == 200
    finally:
        networked.on_egress = None


async def test_the_log_of_an_environment_has_the_connections(engine: str, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "agent.log"
    async with execution_environment(
        env_vars={},
        workspace_path=tmp_path / "workspace",
        log_file=log,
        engine=engine,
        network=Network(["ok.example"]),
        preload=(),
    ) as env:
        await env.executor.execute(TOOLS)
        await ask(env.executor, "fetch('https://other.example/')")
        await holds(lambda: len(env.container.egress) == 1)
    lines = [json.loads(line) for path in log.parent.glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    found = [line for line in lines if "connection refused" in json.dumps(line)]
    assert len(found) == 1
    assert "other.example" in json.dumps(found[0])
    assert "other.example" in log.read_text("utf-8")


def test_the_command_takes_hosts(default_engine: str, workspace_path: Path) -> None:
    code = TOOLS + "print(fetch('http://ok.invalid/'), fetch('http://other.invalid/'))"
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "actbox", "run", "--workspace", str(workspace_path)),
            *("--allow", "http://ok.invalid", "--allow", "*.example.org", "-c", code),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=30,
        check=True,
    )
    allowed, refused = re.findall(r"\[\d+, '[^']*'\]", ran.stdout)
    assert re.match(r"\[50[24], '.*ok\.invalid (does not resolve|was not resolved in time)", allowed)
    assert refused == "[403, 'Forbidden: other.invalid is not on the allow-list of this session']"


def test_the_command_says_what_cannot_be_allowed(default_engine: str, workspace_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "actbox", "run", "--workspace", str(workspace_path), "--allow", "*", "-c", "1"],
        capture_output=True,
        encoding="utf-8",
        timeout=30,
        check=False,
    )
    assert ran.returncode == ExitCode.USAGE
    assert "network.allow" in ran.stderr


# -- the forwarder alone -----------------------------------------------------------------------------------------------


@dataclass
class Forwarding:
    """A forwarder in a thread: the port that it listens on, and the host's end of the socket on which it asks."""

    port: int
    asking: socket.socket

    def dial(self, data: bytes = b"") -> socket.socket:
        """A connection of the session's, for which the host was asked."""
        made = socket.create_connection((LOOPBACK, self.port), SECONDS)
        made.sendall(data)
        assert self.asking.recv(16) == b"c"
        return made

    def give(self, stream: socket.socket) -> None:
        with stream:
            socket.send_fds(self.asking, [b"c"], [stream.fileno()])


@pytest.fixture
def forwarding() -> Iterator[Forwarding]:
    listener = forwarder.listen()
    asking, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asking.settimeout(SECONDS)
    made = forwarder.Forwarder(listener, theirs)
    thread = threading.Thread(target=made.run)
    thread.start()
    with listener, theirs:
        with asking:
            yield Forwarding(listener.getsockname()[1], asking)
        thread.join(SECONDS)
        assert not thread.is_alive()
        # The end of the process is what closes these.
        for end in made._ends.values():
            end.sock.close()


def rest(sock: socket.socket) -> bytes:
    sock.settimeout(SECONDS)
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def test_a_last_word_is_heard_though_nobody_listens_any_more(forwarding: Forwarding) -> None:
    with forwarding.dial(b"a request") as client:
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(b"no")
        forwarding.give(theirs)
        assert rest(client) == b"no"


def test_each_direction_ends_for_itself(forwarding: Forwarding) -> None:
    with forwarding.dial(b"a request") as client:
        client.shutdown(socket.SHUT_WR)
        ours, theirs = socket.socketpair()
        with ours:
            forwarding.give(theirs)
            assert rest(ours) == b"a request"
            ours.sendall(b"an answer")
            ours.shutdown(socket.SHUT_WR)
            assert rest(client) == b"an answer"


def test_a_connection_that_the_host_cannot_give_ends(forwarding: Forwarding) -> None:
    with forwarding.dial() as first, forwarding.dial() as second:
        forwarding.asking.send(b"n")
        assert rest(first) == b""
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(b"hello")
        forwarding.give(theirs)
        assert rest(second) == b"hello"


@pytest.mark.parametrize("inwards", [True, False])
def test_the_forwarder_waits_for_who_does_not_read(forwarding: Forwarding, *, inwards: bool) -> None:
    with forwarding.dial() as client:
        ours, theirs = socket.socketpair()
        with ours:
            forwarding.give(theirs)
            sender = ours if inwards else client
            sender.settimeout(1)
            with pytest.raises(TimeoutError):
                sender.sendall(bytes(64 * MIB))


# -- every way to a session --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def by(way: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[dict[str, Any]]:
    """What makes a container's sessions be reached in a way; "stream" is a daemon at a TCP address."""
    if way in ("stream", "runsc"):
        outside = await tools.reached()
        tools.need_runtime(await outside.ask("GET", "info"), way)
        if way == "stream":
            async with tools.Relay(outside.socket) as relay:
                monkeypatch.setenv("DOCKER_HOST", relay.url)
                yield WAYS[way]
            return
    yield WAYS[way]


only_docker = pytest.mark.engines("docker")


@pytest.mark.parametrize(
    "way",
    ["nested", "separate", pytest.param("stream", marks=only_docker), pytest.param("runsc", marks=only_docker)],
)
async def test_the_way_out_is_the_same_however_a_session_is_reached(
    way: str, engine: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        by(way, monkeypatch) as arguments,
        container_of(engine, world.network(), **arguments) as container,
        session_of(container) as client,
    ):
        assert (await ask(client, f"fetch({world.url!r})"))[0] == 200
        assert (await ask(client, "fetch('http://other.example/')"))[0] == 403
        assert await ask(client, "named(connect, '1.1.1.1', 443)") in ("ENETUNREACH", "EHOSTUNREACH")
        # Who has said all still hears the whole answer.
        long = f"{world.url}/long?{8 * MIB}"
        await client.execute(f"half = dial(b'GET {long} HTTP/1.1\\r\\n\\r\\n'); half.shutdown(1)")
        assert await ask(client, "len(all_of(half).partition('\\r\\n\\r\\n')[2])") == 8 * MIB
        # Much, in both directions.
        body = f"fetch('{world.url}/up', bytes({4 * MIB}))"
        assert json.loads((await ask(client, body))[1])["length"] == 4 * MIB
        assert await ask(client, f"len(fetch({long!r})[1])") == 8 * MIB
        # A server that takes nothing holds up nobody who sends.
        head = f"POST {world.url}/rude HTTP/1.1\\r\\nContent-Length: {32 * MIB}\\r\\n\\r\\n"
        assert await ask(client, f"named(dial, b'{head}' + bytes({8 * MIB}))") in ("EPIPE", "ECONNRESET")


@pytest.mark.parametrize("way", ["nested", pytest.param("stream", marks=only_docker)])
async def test_connections_that_are_given_up_leave_nothing(
    way: str, engine: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with by(way, monkeypatch) as arguments, container_of(engine, world.network(), **arguments) as container:
        before = held()
        async with session_of(container) as client:
            assert (await ask(client, f"fetch({world.url!r})"))[0] == 200
            await holds(lambda: len(container.egress) == 1)
            opened = held()
            await client.execute(
                f"slow = [dial(b'GET {world.url}/long?{ENDLESS} HTTP/1.1\\r\\n\\r\\n') for _ in range(20)]\n"
                "[sock.recv(1) for sock in slow]"
            )
            assert world.plain.open == 20
            await client.execute("x = 42; [sock.close() for sock in slow]")
            await holds(lambda: world.plain.open == 0)
            await no_more_than(opened)
            # Not one of the 64 that it may have is taken.
            await client.execute("idle = [dial() for _ in range(64)]")
            assert (await ask(client, f"fetch({world.url!r})"))[0] == 503
            await client.execute("[sock.close() for sock in idle]")
            await no_more_than(opened)
            # Nor has the session itself ended with them.
            assert await ask(client, "x") == 42
        await no_more_than(before)

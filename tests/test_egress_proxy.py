"""The proxy of one session, over sockets of its own, against servers on loopback and a resolver that knows only them.

C8 to C27 are the cases of the containment suite, as far as the host's side decides them. Servers are at 127.0.0.1, so
the names that lead there are `private`; where that is the case itself, they are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from outside import LOOPBACK, MIB, SECONDS, Names, Server, echo, make_certificate, serving, silence, sink, web

from actbox.egress import Proxy, Reason, Record, Verdict
from actbox.egress.dialling import SystemResolver, is_our_own
from actbox.egress.relay import Meter, Relay
from actbox.network import Network

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

    from typing_extensions import Buffer

    from actbox.egress.policy import Address

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a self-signed certificate for the names used here, in one file."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


# -- the guest ------------------------------------------------------------------------------------------------------


class Guest:
    """One end of a socket pair, of which the proxy serves the other."""

    def __init__(self, sock: socket.socket, serving: asyncio.Task[None]) -> None:
        self.sock = sock
        self.serving = serving
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    async def send(self, data: bytes) -> None:
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, data), SECONDS)

    async def read(self) -> bytes:
        """What comes next; nothing at the end, however it came."""
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 65536), SECONDS)
        except ConnectionResetError:
            return b""

    async def all(self) -> bytes:
        data = b""
        while piece := await self.read():
            data += piece
        return data

    async def head(self) -> bytes:
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            piece = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, 1), SECONDS)
            assert piece, data
            data += piece
        return data

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        """The status and the whole of the answer to a request, until the end."""
        await self.send(data)
        answer = await self.all()
        assert answer, "closed without a word"
        return int(answer.split(b" ", 2)[1]), answer

    async def connect(self, authority: str) -> int:
        await self.send(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
        return int((await self.head()).split(b" ", 2)[1])

    async def handshake(self, certificate: Path, name: str | None) -> None:
        context = ssl.create_default_context(cafile=str(certificate))
        if name is None:
            context.check_hostname = False
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        await self._through(self._tls.do_handshake)

    async def say(self, data: bytes) -> None:
        """Send within TLS."""
        assert self._tls is not None
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
            await self._flush()

    async def hear(self, count: int) -> bytes:
        """Read so many bytes within TLS; less only at the end."""
        tls = self._tls
        assert tls is not None
        data = b""
        while len(data) < count:
            piece = await self._through(lambda: tls.read(65536))
            if not piece:
                break
            data += piece
        return data

    async def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            await self.send(data)

    async def _through(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self.read()
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except ssl.SSLZeroReturnError:
                return b""
            else:
                await self._flush()
                return result


@dataclass
class Session:
    """A proxy with the log of it, and guests that come to it."""

    proxy: Proxy
    records: list[Record]
    guests: list[Guest] = field(default_factory=list[Guest])

    def guest(self) -> Guest:
        ours, its = socket.socketpair()
        ours.setblocking(False)
        made = Guest(ours, asyncio.create_task(self.proxy.serve(its)))
        self.guests.append(made)
        return made

    async def end(self) -> Record:
        """The record of the one connection, or of the last, when all are over."""
        for guest in self.guests:
            guest.sock.close()
        await asyncio.wait_for(asyncio.gather(*(guest.serving for guest in self.guests)), SECONDS)
        assert self.proxy.connections == 0
        return self.records[-1]


@contextlib.asynccontextmanager
async def session(network: Network, names: Names | None = None) -> AsyncGenerator[Session]:
    records: list[Record] = []
    proxy = Proxy(network, records.append, names or Names())
    made = Session(proxy, records)
    try:
        yield made
    finally:
        await asyncio.wait_for(proxy.close(), SECONDS)
        for guest in made.guests:
            guest.sock.close()
        await asyncio.wait_for(asyncio.gather(*(guest.serving for guest in made.guests)), SECONDS)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, in the loop's own turns."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - what is looked at has no event of its own
            await asyncio.sleep(0)


def to(server: Server, *more: str, plain: bool = False, **bounds: Any) -> Network:
    """What allows ok.example at this server's port."""
    scheme = "http://" if plain else ""
    return Network([f"{scheme}ok.example:{server.port}", *more], private=["ok.example"], **bounds)


def here() -> Names:
    return Names(ok_example=LOOPBACK, evil_example=LOOPBACK, other_example=LOOPBACK)


# -- refused before anything is resolved ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("authority", "status"),
    [
        *(
            (f"{host}:443", 403)
            for host in ("2130706433", "0x7f.1", "127.1", "0177.0.0.1", "0", "①②⑦.0.0.1", "１２７.1")
        ),
        *((f"{host}:443", 403) for host in ("127.0.0.1", "[::1]", "169.254.169.254", "[fd00:ec2::254]", "localhost")),
        *(
            (f"{host}:443", 400)
            for host in ("127.0.0.1\0.ok.example", "a b", "ok.example%00", "%2e.ok.example", "x@ok.com")
        ),
        *((f"{host}:443", 403) for host in ("evil-ok.example", "ok.example.evil.com", "a.ok.example", "o_k.example")),
        ("metadata.google.internal:443", 403),
        *((f"ok.example:{port}", 403) for port in (22, 25, 80, 6379)),
        *((f"ok.example:{port}", 400) for port in (0, 65536, "443x", "", "\r\n443")),
    ],
)
async def test_nothing_is_resolved_for_what_is_not_allowed(authority: str, status: int) -> None:
    """C8, C10, C11, C12, C15."""
    names = here()
    async with session(Network(["ok.example"], private=["ok.example"]), names) as one:
        got, answer = await one.guest().ask(f"CONNECT {authority} HTTP/1.1\r\n\r\n".encode())
        assert got == status
        assert answer.count(b"\r\n\r\n") == 1  # one answer, whatever was asked
        record = await one.end()
    assert names.asked == []
    assert (record.verdict, record.address, record.bytes_up) == (Verdict.REFUSED, "", 0)
    assert str(record).isascii()
    assert str(record).isprintable()


async def test_a_refusal_names_the_host_and_the_list_in_its_status_line() -> None:
    async with session(Network(["ok.example"])) as one:
        _, answer = await one.guest().ask(b"CONNECT EVIL.example.:443 HTTP/1.1\r\n\r\n")
        record = await one.end()
    assert answer.startswith(b"HTTP/1.1 403 Forbidden: evil.example is not on the allow-list of this session\r\n")
    assert answer.endswith(b"\r\n\r\nevil.example is not on the allow-list of this session\n")
    assert (record.host, record.port, record.reason) == ("evil.example", 443, Reason.NOT_LISTED)


@pytest.mark.parametrize("network", [Network(), Network([])])
async def test_an_empty_list_refuses_everything(network: Network) -> None:
    """C20."""
    async with session(network, here()) as one:
        for target in ("CONNECT ok.example:443", "GET http://ok.example/"):
            status, _ = await one.guest().ask(f"{target} HTTP/1.1\r\n\r\n".encode())
            assert status == 403


@pytest.mark.parametrize(
    "data",
    [
        b"\x05\x01\x00",  # SOCKS5 without authentication
        b"\x05\x02\x00\x01\x00\x01\x7f\x00\x00\x01\x00\x50",
        b"\x04\x01\x01\xbb\x00\x00\x00\x01\0ok.example\0",
        b"\x16\x03\x01\x02\x00\x01",  # TLS to the proxy itself
        b"\0",
    ],
)
async def test_what_is_not_http_is_refused_at_its_first_byte(data: bytes) -> None:
    """C21."""
    async with session(Network(["*"], dangerously_allow_all=True), here()) as one:
        status, _ = await one.guest().ask(data)
        assert status == 400
        assert (await one.end()).reason is Reason.MALFORMED


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET http://ok.example/ HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST http://ok.example/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"CONNECT http://ok.example/ HTTP/1.1\r\n\r\n", 400),
        (b"GET ok.example:443 HTTP/1.1\r\n\r\n", 400),
        (b"GET http://ok.example/ HTTP/1.1\r\nX: a\r\n b\r\n\r\n", 400),
        (b"GET http://ok.example/ HTTP/1.1\nHost: ok.example\n\n", 400),
        (b"GET http://ok.example/ HTTP/1.1\r\nX: " + b"a" * MIB + b"\r\n\r\n", 431),
        (b"GET http://ok.example/ HTTP/1.1\r\n" + b"a: b\r\n" * 100_000 + b"\r\n", 431),
        (b"GET http://ok.example/" + b"a" * MIB, 431),
        (b"GET http://ok.example/ HTTP/1.1\r\n" + b"a:b\r\n" * 101 + b"\r\n", 431),
    ],
)
async def test_what_can_be_read_in_two_ways_or_is_too_large_is_refused(request_: bytes, status: int) -> None:
    """C17."""
    async with serving(web) as server, session(to(server, "http://ok.example", plain=True), here()) as one:
        guest = one.guest()
        sending = asyncio.create_task(guest.send(request_))
        answer = await guest.all()
        # Of what is too large not all is taken.
        with contextlib.suppress(OSError):
            await sending
        assert int(answer.split(b" ", 2)[1]) == status
        assert server.connections == 0


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "addresses",
    [
        *("127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "100.64.0.1"),
        *("0.0.0.0", "127.0.0.1 ::1 10.0.0.1", "fd00:ec2::254", "2002:7f00:1::"),
    ],
)
async def test_a_name_that_leads_inside_is_refused(addresses: str) -> None:
    """C13."""
    async with serving(sink) as server:
        async with session(Network([f"ok.example:{server.port}"]), Names(ok_example=addresses)) as one:
            status, answer = await one.guest().ask(f"CONNECT ok.example:{server.port} HTTP/1.1\r\n\r\n".encode())
            assert status == 403
            assert addresses.encode() not in answer
            assert (await one.end()).reason is Reason.NOT_PUBLIC
        assert server.connections == 0


async def test_the_resolver_is_asked_once_and_its_answer_is_the_address(certificate: Path) -> None:
    """C14: a second question would get an address at which nobody listens."""
    async with serving(web, certificate) as server:
        names = here()
        names.known["ok.example"] = [[LOOPBACK], ["127.0.0.9"]]
        async with session(to(server), names) as one:
            guest = one.guest()
            assert await guest.connect(f"ok.example:{server.port}") == 200
            await guest.handshake(certificate, "ok.example")
            await guest.say(b"GET /x HTTP/1.1\r\nHost: ok.example\r\n\r\n")
            assert (await guest.hear(15)).startswith(b"HTTP/1.1 200 OK")
            assert (await one.end()).address == LOOPBACK
        assert names.asked == ["ok.example"]


async def test_the_next_address_is_tried_when_one_does_not_answer(certificate: Path) -> None:
    async with serving(web, certificate) as server:
        names = Names(ok_example="::1 127.0.0.1")  # at ::1 nobody listens on this port, where there is one at all
        async with session(to(server), names) as one:
            guest = one.guest()
            await guest.connect(f"ok.example:{server.port}")
            await guest.handshake(certificate, "ok.example")
            assert (await one.end()).address == LOOPBACK


async def test_a_name_that_does_not_resolve_is_a_502() -> None:
    async with session(Network(["nowhere.example"])) as one:
        status, answer = await one.guest().ask(b"CONNECT nowhere.example:443 HTTP/1.1\r\n\r\n")
        assert status == 502
        assert b"Name or service" not in answer
        record = await one.end()
        assert (record.verdict, record.reason) == (Verdict.FAILED, Reason.NOT_RESOLVED)


async def test_a_host_that_is_not_there_is_told_apart(certificate: Path) -> None:
    async with serving(sink) as server:
        pass
    async with session(to(server, f"http://ok.example:{server.port}"), here()) as one:
        status, answer = await one.guest().ask(f"GET http://ok.example:{server.port}/ HTTP/1.1\r\n\r\n".encode())
        assert status == 502
        assert LOOPBACK.encode() not in answer
        guest = one.guest()
        assert await guest.connect(f"ok.example:{server.port}") == 200
        with pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
            await guest.handshake(certificate, "ok.example")
        await one.end()
        assert [record.reason for record in one.records] == [Reason.UNREACHABLE] * 2
        assert {record.verdict for record in one.records} == {Verdict.FAILED}


async def test_the_machines_own_resolver_is_asked_in_threads_of_its_own() -> None:
    resolver = SystemResolver()
    try:
        found = await asyncio.wait_for(resolver("localhost"), SECONDS)
    finally:
        resolver.close()
    assert ipaddress.ip_address(LOOPBACK) in found or ipaddress.ip_address("::1") in found


def test_the_machine_knows_its_own_addresses() -> None:
    assert is_our_own(ipaddress.ip_address(LOOPBACK))
    assert not is_our_own(ipaddress.ip_address("203.0.113.7"))
    assert not is_our_own(ipaddress.ip_address("8.8.8.8"))


async def test_the_machines_own_public_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """C13: as 8.8.8.8 would be on the machine that has it."""

    def is_8888(address: Address) -> bool:
        return str(address) == "8.8.8.8"

    monkeypatch.setattr("actbox.egress.dialling.is_our_own", is_8888)
    async with session(Network(["ok.example"]), Names(ok_example="8.8.8.8")) as one:
        status, _ = await one.guest().ask(b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n")
        assert status == 403
        assert (await one.end()).reason is Reason.NOT_PUBLIC


# -- tunnels ----------------------------------------------------------------------------------------------------------


async def test_tls_goes_through_to_an_allowed_host(certificate: Path) -> None:
    async with serving(echo, certificate) as server, session(to(server), here()) as one:
        guest = one.guest()
        assert await guest.connect(f"OK.Example.:{server.port}") == 200
        await guest.handshake(certificate, "ok.example")
        await guest.say(b"hello")
        assert await guest.hear(5) == b"hello"
        record = await one.end()
        assert (record.host, record.port, record.address) == ("ok.example", server.port, LOOPBACK)
        assert (record.verdict, record.reason) == (Verdict.ALLOWED, Reason.ENDED)
        assert record.bytes_up == one.proxy.bytes_up > 300
        assert record.bytes_down == one.proxy.bytes_down > 300
        assert 0 < record.seconds < SECONDS
        assert abs(record.time - time.time()) < 60


async def test_a_hello_may_follow_connect_at_once_and_come_in_pieces(certificate: Path) -> None:
    async with serving(echo, certificate) as server, session(to(server), here()) as one:
        hello = client_hello("ok.example")
        guest = one.guest()
        await guest.send(f"CONNECT ok.example:{server.port} HTTP/1.1\r\n\r\n".encode() + hello[:40])
        assert b" 200 " in await guest.head()
        for at in range(40, len(hello)):
            await guest.send(hello[at : at + 1])
        assert (await guest.read())[:2] == b"\x16\x03"  # the ServerHello


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("evil.example", Reason.OTHER_SERVER_NAME),
        ("a.ok.example", Reason.OTHER_SERVER_NAME),
        (None, Reason.NO_SERVER_NAME),
    ],
)
async def test_a_hello_for_another_server_goes_nowhere(certificate: Path, name: str | None, reason: Reason) -> None:
    """C18: even where the other name is allowed too, and is at the same address."""
    async with serving(echo, certificate) as server:
        async with session(to(server, f"evil.example:{server.port}"), here()) as one:
            guest = one.guest()
            assert await guest.connect(f"ok.example:{server.port}") == 200
            with pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name"):
                await guest.handshake(certificate, name)
            record = await one.end()
            assert (record.verdict, record.reason, record.address) == (Verdict.REFUSED, reason, "")
        assert server.connections == 0


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\n\r\n",
        b"\0" * 9,
    ],
)
async def test_what_is_not_tls_goes_nowhere(data: bytes) -> None:
    """C18."""
    async with serving(echo) as server:
        async with session(to(server), here()) as one:
            guest = one.guest()
            assert await guest.connect(f"ok.example:{server.port}") == 200
            await guest.send(data)
            assert await guest.all() == b""
            assert (await one.end()).reason is Reason.NOT_TLS
        assert server.connections == 0


async def test_a_hello_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """C18."""
    monkeypatch.setattr("actbox.egress.hello.MOST_SECONDS", 0.2)
    async with serving(echo) as server:
        async with session(to(server), here()) as one:
            guest = one.guest()
            assert await guest.connect(f"ok.example:{server.port}") == 200
            await guest.send(client_hello("ok.example")[:-1])
            assert await guest.all() == b""
            assert (await one.end()).reason is Reason.TOO_SLOW
        assert server.connections == 0


async def test_each_side_may_end_its_half_first() -> None:
    """Below TLS, where a half can end: the upper half is at its end, and what comes down still comes."""

    async def late(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.received = len(await reader.read(-1))
        writer.write(b"late")
        await writer.drain()

    async with serving(late) as server, session(to(server), here()) as one:
        hello = client_hello("ok.example")
        guest = one.guest()
        assert await guest.connect(f"ok.example:{server.port}") == 200
        await guest.send(hello + b"rest")
        guest.sock.shutdown(socket.SHUT_WR)
        assert await guest.all() == b"late"
        assert server.received == len(hello) + 4
        record = await one.end()
        assert (record.verdict, record.bytes_up, record.bytes_down) == (Verdict.ALLOWED, len(hello) + 4, 4)


async def test_who_does_not_read_makes_the_other_wait() -> None:
    """C25: the proxy keeps nothing: while the guest does not read, the host cannot send on."""
    sent = 0

    async def flood(_server: Server, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async with serving(flood) as server, session(to(server), here()) as one:
        guest = one.guest()
        assert await guest.connect(f"ok.example:{server.port}") == 200
        await guest.send(client_hello("ok.example"))
        before = -1
        # Full when the loop has turned a thousand times without a byte more.
        while sent != before or not sent:
            before = sent
            for _ in range(1000):
                await asyncio.sleep(0)
        assert sent < 64 * MIB
        assert one.proxy.bytes_down < 4 * MIB
        assert await guest.read()


async def test_streams_run_side_by_side(certificate: Path) -> None:
    async with serving(echo, certificate) as server, session(to(server), here()) as one:

        async def talk(number: int) -> bytes:
            guest = one.guest()
            assert await guest.connect(f"ok.example:{server.port}") == 200
            await guest.handshake(certificate, "ok.example")
            data = bytes([number]) * 200_000
            _, heard = await asyncio.gather(guest.say(data), guest.hear(len(data)))
            return heard

        heard = await asyncio.wait_for(asyncio.gather(*map(talk, range(12))), SECONDS)
        assert heard == [bytes([number]) * 200_000 for number in range(12)]
        await one.end()
        assert {record.verdict for record in one.records} == {Verdict.ALLOWED}


class Endless(socket.socket):
    """Always has something to be read, and always takes what is sent."""

    def recv(self, bufsize: int, _flags: int = 0, /) -> bytes:
        return b"x" * bufsize

    def send(self, data: Buffer, _flags: int = 0, /) -> int:
        return len(memoryview(data))


async def test_a_busy_stream_leaves_the_loop_to_others() -> None:
    """Where both ends are always ready nothing ever waits, and the loop would turn no more."""
    network = Network(["ok.example"], bytes_up=64 * MIB, bytes_down=64 * MIB)
    with Endless(socket.AF_UNIX) as guest, Endless(socket.AF_UNIX) as host:
        guest.setblocking(False)
        host.setblocking(False)
        relay = Relay(guest, host, Meter(network), SECONDS)
        busy = asyncio.create_task(relay.tunnel(b""))
        await until(lambda: relay.up > MIB and relay.down > MIB)
        # Neither direction has come to its bound before others had a turn.
        assert max(relay.up, relay.down) < 32 * MIB
        busy.cancel()
        with pytest.raises(asyncio.CancelledError):
            await busy


# -- plain http -------------------------------------------------------------------------------------------------------


async def test_one_request_a_connection_and_the_host_field_is_ours() -> None:
    """C16."""
    async with serving(web) as server, session(to(server, plain=True), here()) as one:
        url = f"http://ok.example:{server.port}"
        first = f"GET {url}/a HTTP/1.1\r\nHost: evil.example\r\nConnection: keep-alive\r\n\r\n"
        second = "GET http://evil.example/b HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        status, answer = await one.guest().ask((first + second).encode())
        assert status == 200
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"\r\nConnection: close\r\n" in answer
        assert len(server.heads) == 1
        assert f"\r\nHost: ok.example:{server.port}\r\n".encode() in server.heads[0]
        assert b"evil" not in server.heads[0]
        assert (await one.end()).verdict is Verdict.ALLOWED


async def test_what_hides_behind_a_body_is_not_sent() -> None:
    """C17."""
    async with serving(web) as server, session(to(server, plain=True), here()) as one:
        url = f"http://ok.example:{server.port}"
        smuggled = b"GET /smuggled HTTP/1.1\r\nHost: evil.example\r\n\r\n"
        request = f"POST {url}/ HTTP/1.1\r\nConnection: Content-Length\r\nContent-Length: 3\r\n\r\nabc".encode()
        status, answer = await one.guest().ask(request + smuggled)
        assert status == 200
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"method": "POST", "path": "/", "length": 3}
        assert server.bodies == [b"abc"]


async def test_a_body_may_come_late_and_wait_for_leave() -> None:
    async def careful(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        server.bodies.append(await reader.readexactly(5))
        writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await reader.read()  # keeps its side open, though it was asked to close

    async with serving(careful) as server, session(to(server, plain=True), here()) as one:
        guest = one.guest()
        line = f"PUT http://ok.example:{server.port}/ HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        await guest.send(line.encode())
        assert await guest.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await guest.send(b"12345")
        assert await guest.head() == b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        assert server.bodies == [b"12345"]


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-x\r\n", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", b"HTTP/1.1 200", b"", b"HTTP/1.1 200 OK\n\n"],
)
async def test_what_is_no_answer_in_http_is_a_502(answer: bytes) -> None:
    async def odd(_server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async with serving(odd) as server, session(to(server, plain=True), here()) as one:
        status, _ = await one.guest().ask(f"GET http://ok.example:{server.port}/ HTTP/1.1\r\n\r\n".encode())
        assert status == 502
        assert (await one.end()).reason is Reason.BAD_ANSWER


async def test_plain_http_and_tls_have_ports_of_their_own(certificate: Path) -> None:
    async with serving(web) as plain, serving(web, certificate) as secret:
        network = Network([f"http://ok.example:{plain.port}", f"ok.example:{secret.port}"], private=["ok.example"])
        async with session(network, here()) as one:
            status, _ = await one.guest().ask(f"GET http://ok.example:{secret.port}/ HTTP/1.1\r\n\r\n".encode())
            assert status == 403
            assert await one.guest().connect(f"ok.example:{plain.port}") == 403
        assert plain.connections == secret.connections == 0


# -- bounds -----------------------------------------------------------------------------------------------------------


async def test_ten_thousand_connections_cost_little() -> None:
    """C25."""
    network = Network(["ok.example"], connections=8, header_seconds=60)
    async with session(network, here()) as one:
        first = [one.guest() for _ in range(8)]
        await until(lambda: one.proxy.connections == 8)
        began = time.process_time()
        for _ in range(10_000):
            ours, its = socket.socketpair()
            with ours:
                await one.proxy.serve(its)
                assert its.fileno() == -1
                assert ours.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert time.process_time() - began < SECONDS
        assert one.proxy.connections == 8
        # The log does not grow with them, and says how many it left out.
        assert len(one.records) < 2000
        assert {record.reason for record in one.records} == {Reason.CONNECTIONS}
        status, _ = await first[0].ask(b"CONNECT evil.example:443 HTTP/1.1\r\n\r\n")
        assert status == 403


async def test_a_head_that_comes_slowly_is_given_up() -> None:
    """C25."""
    async with session(Network(["ok.example"], header_seconds=0.3), here()) as one:
        guest = one.guest()
        answer = b""
        # A byte at a time, for as long as there is no answer: each of them comes soon enough.
        for byte in b"GET http://ok.example/ HTTP/1.1\r\nX: " + b"a" * 10_000:
            await guest.send(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                answer = await asyncio.wait_for(guest.read(), 0.01)
                break
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert (await one.end()).reason is Reason.TOO_SLOW


async def test_an_endless_upload_is_cut_at_the_bound() -> None:
    """C25."""
    async with serving(sink) as server, session(to(server, bytes_up=MIB), here()) as one:
        guest = one.guest()
        assert await guest.connect(f"ok.example:{server.port}") == 200
        await guest.send(client_hello("ok.example"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(10_000):
                await guest.send(b"x" * 65536)
            pytest.fail("everything was taken")
        record = await one.end()
        assert (record.verdict, record.reason) == (Verdict.CUT, Reason.BYTES_UP)
        assert record.bytes_up == one.proxy.bytes_up <= MIB
        await until(lambda: server.received == record.bytes_up)
        # It is the session's bound: the next connection is not even begun.
        guest = one.guest()
        assert await guest.connect(f"ok.example:{server.port}") == 503
        assert server.connections == 1


async def test_an_endless_answer_is_cut_at_the_bound() -> None:
    """C25."""
    async with serving(web) as server, session(to(server, plain=True, bytes_down=MIB), here()) as one:
        _, answer = await one.guest().ask(
            f"GET http://ok.example:{server.port}/long?{8 * MIB} HTTP/1.1\r\n\r\n".encode()
        )
        record = await one.end()
        assert (record.verdict, record.reason) == (Verdict.CUT, Reason.BYTES_DOWN)
        assert len(answer) == record.bytes_down <= MIB


async def test_an_idle_tunnel_is_closed() -> None:
    """C25."""
    async with serving(silence) as server, session(to(server, idle_seconds=0.2), here()) as one:
        guest = one.guest()
        assert await guest.connect(f"ok.example:{server.port}") == 200
        await guest.send(client_hello("ok.example"))
        assert await guest.all() == b""
        record = await one.end()
        assert (record.verdict, record.reason) == (Verdict.CUT, Reason.IDLE)
        assert 0.2 <= record.seconds < SECONDS


async def test_a_host_that_does_not_answer_is_a_504() -> None:
    """C25."""
    async with serving(silence) as server, session(to(server, plain=True, idle_seconds=0.2), here()) as one:
        status, _ = await one.guest().ask(f"GET http://ok.example:{server.port}/ HTTP/1.1\r\n\r\n".encode())
        assert status == 504


async def test_what_moves_is_not_idle(certificate: Path) -> None:
    async with serving(echo, certificate) as server, session(to(server, idle_seconds=0.6), here()) as one:
        guest = one.guest()
        assert await guest.connect(f"ok.example:{server.port}") == 200
        await guest.handshake(certificate, "ok.example")
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            await guest.say(b"still here")
            assert await guest.hear(10) == b"still here"
        assert (await one.end()).verdict is Verdict.ALLOWED


async def test_a_guest_that_leaves_is_recorded() -> None:
    async with session(Network(["ok.example"]), here()) as one:
        guest = one.guest()
        await guest.send(b"CONNECT ok.ex")
        record = await one.end()
        assert (record.verdict, record.reason) == (Verdict.REFUSED, Reason.LEFT)


# -- sessions ---------------------------------------------------------------------------------------------------------


async def test_a_closed_proxy_serves_nobody(certificate: Path) -> None:
    """C22."""
    async with serving(echo, certificate) as server, session(to(server), here()) as one:
        guest = one.guest()
        assert await guest.connect(f"ok.example:{server.port}") == 200
        await guest.handshake(certificate, "ok.example")
        waiting = one.guest()
        await waiting.send(b"CONNECT ")
        await until(lambda: one.proxy.connections == 2)
        await asyncio.wait_for(one.proxy.close(), SECONDS)
        assert [record.reason for record in one.records] == [Reason.CLOSED] * 2
        assert {record.verdict for record in one.records} == {Verdict.CUT}
        await guest.all()  # what had come, and then the end
        assert await waiting.all() == b""
        late = one.guest()
        assert await late.all() == b""
        await one.proxy.close()


async def test_a_cancelled_serve_ends_its_connection_alone() -> None:
    async with session(Network(["ok.example"]), here()) as one:
        first, second = one.guest(), one.guest()
        await until(lambda: one.proxy.connections == 2)
        first.serving.cancel()
        assert await first.all() == b""
        await until(lambda: one.proxy.connections == 1)
        assert one.records[0].reason is Reason.CLOSED
        assert (await second.ask(b"CONNECT evil.example:443 HTTP/1.1\r\n\r\n"))[0] == 403
        with pytest.raises(asyncio.CancelledError):
            await first.serving
        one.guests.remove(first)
        first.sock.close()


async def test_each_proxy_has_its_own_rules() -> None:
    """C23."""
    async with serving(web) as server, session(to(server, plain=True), here()) as a, session(Network(), here()) as b:
        request = f"GET http://ok.example:{server.port}/ HTTP/1.1\r\n\r\n".encode()
        assert (await a.guest().ask(request))[0] == 200
        assert (await b.guest().ask(request))[0] == 403
        assert b.proxy.bytes_up == 0


async def test_a_relay_inside_gets_the_same_refusal() -> None:
    """C24: a proxy in the sandbox that takes CONNECT and asks on for its client: who asks here does not matter."""
    async with session(Network(["ok.example"]), here()) as one:

        async def relay(_server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            guest = one.guest()
            await guest.send(await reader.readuntil(b"\r\n\r\n"))
            writer.write(await guest.all())
            await writer.drain()

        async with serving(relay) as server:
            reader, writer = await asyncio.open_connection(LOOPBACK, server.port)
            writer.write(b"CONNECT evil.example:443 HTTP/1.1\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), SECONDS)
            writer.close()
            assert answer.startswith(b"HTTP/1.1 403 ")


async def test_a_log_that_fails_harms_no_connection(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_record: Record) -> None:
        raise RuntimeError("the disk is full")

    proxy = Proxy(Network(), broken, Names())
    ours, its = socket.socketpair()
    with ours:
        ours.sendall(b"CONNECT ok.example:443 HTTP/1.1\r\n\r\n")
        ours.shutdown(socket.SHUT_WR)
        await asyncio.wait_for(proxy.serve(its), SECONDS)
        assert ours.recv(65536).startswith(b"HTTP/1.1 403 ")
    await proxy.close()
    assert "the disk is full" in caplog.text


# -- clients of the standard library ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def forwarding(one: Session) -> AsyncGenerator[str]:
    """The address of a port that leads to the proxy, as inside a session."""
    loop = asyncio.get_running_loop()
    listener = socket.create_server((LOOPBACK, 0))
    listener.setblocking(False)
    tasks: set[asyncio.Task[None]] = set()

    async def accept() -> None:
        while True:
            accepted, _ = await loop.sock_accept(listener)
            tasks.add(asyncio.create_task(one.proxy.serve(accepted)))

    accepting = asyncio.create_task(accept())
    try:
        yield f"http://{LOOPBACK}:{listener.getsockname()[1]}"
    finally:
        accepting.cancel()
        await asyncio.wait([accepting])
        listener.close()
        await one.proxy.close()
        await asyncio.gather(*tasks)


def fetch(proxy: str, url: str, certificate: Path | None = None, data: bytes | None = None) -> tuple[int, bytes]:
    """What urllib gets by way of this proxy."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({"http": proxy, "https": proxy})]
    if certificate is not None:
        handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=str(certificate))))
    try:
        with urllib.request.build_opener(*handlers).open(url, data, timeout=SECONDS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.fixture
def _no_bypass(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield  # noqa: PT022 - the patch lasts for the test


@pytest.mark.usefixtures("_no_bypass")
async def test_urllib_works_by_the_proxy(certificate: Path) -> None:
    async with serving(web) as plain, serving(web, certificate) as secret:
        network = Network([f"http://ok.example:{plain.port}", f"ok.example:{secret.port}"], private=["ok.example"])
        async with session(network, here()) as one, forwarding(one) as proxy:
            for url, data in (
                (f"http://ok.example:{plain.port}/a?b", None),
                (f"http://ok.example:{plain.port}/a?b", b"x" * 300_000),
                (f"https://ok.example:{secret.port}/a?b", None),
                (f"https://ok.example:{secret.port}/a?b", b"x" * 300_000),
            ):
                status, body = await asyncio.to_thread(fetch, proxy, url, certificate, data)
                assert status == 200
                wanted = {"method": "POST" if data else "GET", "path": "/a?b", "length": len(data or b"")}
                assert json.loads(body) == wanted
            status, body = await asyncio.to_thread(fetch, proxy, f"http://ok.example:{plain.port}/long?{3 * MIB}")
            assert (status, len(body)) == (200, 3 * MIB)
            await until(lambda: one.proxy.connections == 0)
            assert {record.verdict for record in one.records} == {Verdict.ALLOWED}


@pytest.mark.usefixtures("_no_bypass")
async def test_urllib_is_told_what_is_not_on_the_list(certificate: Path) -> None:
    async with session(Network(["ok.example"]), here()) as one, forwarding(one) as proxy:
        with pytest.raises(urllib.error.URLError, match=r"403.*evil\.example is not on the allow-list"):
            await asyncio.to_thread(fetch, proxy, "https://evil.example/", certificate)
        status, body = await asyncio.to_thread(fetch, proxy, "http://evil.example/")
        assert (status, body) == (403, b"evil.example is not on the allow-list of this session\n")


@pytest.mark.usefixtures("_no_bypass")
async def test_a_redirect_is_asked_for_like_anything_else() -> None:
    """C26."""
    async with serving(web) as server, session(to(server, plain=True), here()) as one, forwarding(one) as proxy:
        metadata = "http://169.254.169.254/latest/meta-data/"
        for goal in (metadata, "http://evil.example/", f"http://127.0.0.1:{server.port}/"):
            status, _ = await asyncio.to_thread(fetch, proxy, f"http://ok.example:{server.port}/go?{goal}")
            assert status == 403
        back = f"http://ok.example:{server.port}/back"
        status, body = await asyncio.to_thread(fetch, proxy, f"http://ok.example:{server.port}/go?{back}")
        assert (status, json.loads(body)["path"]) == (200, "/back")


@functools.cache
def client_hello(name: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()

"""One connection of the guest's, from its first byte to its record: each step decided elsewhere, and acted on here."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeVar

from actbox.egress import heads, hello
from actbox.egress.dialling import connect, resolve
from actbox.egress.heads import Connect, Fetch
from actbox.egress.policy import decide
from actbox.egress.relay import PIECE, Over, Relay
from actbox.egress.verdicts import FAILURES, Reason, Record, Refusal, Verdict, escaped
from actbox.network import canonical_host

if TYPE_CHECKING:
    from actbox.egress.dialling import Resolver
    from actbox.egress.policy import Address, Target
    from actbox.egress.relay import Meter
    from actbox.network import Network

T = TypeVar("T")

# Seconds for the last word, and bytes that are still taken meanwhile: a socket closed with unread bytes in it would
# tell the guest of a reset connection, instead of what it was told.
_FAREWELL_SECONDS = 1.0
_FAREWELL_BYTES = 1 << 20


class _Stage(Enum):
    """In which language the guest can be told that it goes no further."""

    HTTP = auto()
    TLS = auto()
    NONE = auto()


class Conversation:
    """See the module's text.

    State: `_stage`; `_host`, `_port`, `_address`, what is known so far; `_relay` once bytes go to the host; `_reason`,
    why it ended.
    """

    def __init__(self, guest: socket.socket, network: Network, resolver: Resolver, meter: Meter) -> None:
        self._guest = guest
        self._network = network
        self._resolver = resolver
        self._meter = meter
        self._stage = _Stage.HTTP
        self._host = ""
        self._port = 0
        self._address: Address | None = None
        self._relay: Relay | None = None
        self._reason = Reason.CLOSED
        self._began = time.time()
        self._clock = time.monotonic()

    async def run(self) -> None:
        """Serve the guest, and tell it if it goes no further. Leaves the guest's socket open."""
        try:
            await self._serve()
            self._reason = Reason.ENDED
        except Over as over:
            self._reason = over.refusal.reason
            await self._tell(over.refusal)

    def record(self) -> Record:
        """What became of it, once it is over; if `run` was cancelled, that it was closed."""
        relay = self._relay
        return Record(
            time=self._began,
            host=self._host,
            port=self._port,
            address=str(self._address or ""),
            verdict=_verdict(self._reason, relayed=relay is not None),
            reason=self._reason,
            bytes_up=relay.up if relay else 0,
            bytes_down=relay.down if relay else 0,
            seconds=time.monotonic() - self._clock,
        )

    # -- the steps --------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        head, rest = await self._read_head()
        request = _granted(heads.parse(head))
        self._host, self._port = canonical_host(request.host) or escaped(request.host), request.port
        target = _granted(decide(self._network, request.host, request.port, plain=isinstance(request, Fetch)))
        if self._meter.spent:
            raise Over(self._meter.spent)
        addresses = _granted(await resolve(self._resolver, target))
        match request:
            case Connect():
                await self._tunnel(target, addresses, rest)
            case Fetch():
                await self._exchange(request, target, addresses, rest)

    async def _tunnel(self, target: Target, addresses: tuple[Address, ...], first: bytes) -> None:
        await self._send(heads.ESTABLISHED)
        self._stage = _Stage.NONE
        # Only now does a client say which server it wants; not a packet goes to the host before.
        first = await self._read_hello(target, first)
        with await self._connect(target, addresses) as host:
            self._stage = _Stage.NONE
            self._relay = Relay(self._guest, host, self._meter, self._network.idle_seconds)
            await self._relay.tunnel(first)

    async def _exchange(self, request: Fetch, target: Target, addresses: tuple[Address, ...], first: bytes) -> None:
        length = request.length or 0
        # What comes behind the body would be another request, and is not read.
        first = first[:length]
        with await self._connect(target, addresses) as host:
            self._relay = Relay(self._guest, host, self._meter, self._network.idle_seconds)
            try:
                await self._relay.exchange(request.head(target) + first, length - len(first), request.method)
            finally:
                if self._relay.answering:
                    self._stage = _Stage.NONE
        await self._part(b"")

    async def _connect(self, target: Target, addresses: tuple[Address, ...]) -> socket.socket:
        host, self._address = _granted(await connect(target, addresses))
        return host

    # -- the guest --------------------------------------------------------------------------------------------------

    async def _read_head(self) -> tuple[bytes, bytes]:
        """The head of the request, and what came behind it."""
        data = bytearray()
        try:
            async with asyncio.timeout(self._network.header_seconds):
                while True:
                    seen = len(data)
                    data += await self._read()
                    if not heads.looks_like_http(data):
                        raise Over(Refusal(400, Reason.MALFORMED, "this is an HTTP proxy"))
                    end = heads.end_of_head(data, seen)
                    if (end or len(data)) > self._network.header_bytes:
                        bound = self._network.header_bytes
                        raise Over(Refusal(431, Reason.TOO_LARGE, f"the request's head has more than {bound} bytes"))
                    if end is not None:
                        return bytes(data[:end]), bytes(data[end:])
        except TimeoutError:
            bound = self._network.header_seconds
            raise Over(Refusal(408, Reason.TOO_SLOW, f"the request's head took longer than {bound:g} s")) from None

    async def _read_hello(self, target: Target, data: bytes) -> bytes:
        """The first bytes of the tunnel, once there is a ClientHello for the target in them."""
        reader = hello.HelloReader()
        came = bytearray()
        try:
            async with asyncio.timeout(hello.MOST_SECONDS):
                while True:
                    data = data or await self._read()
                    came += data
                    found = reader.feed(data)
                    if found is not None:
                        break
                    data = b""
        except TimeoutError:
            raise Over(Refusal(408, Reason.TOO_SLOW, "the ClientHello did not come in time")) from None
        except hello.NotTLS:
            raise Over(Refusal(400, Reason.NOT_TLS, "only TLS may be spoken here")) from None
        self._stage = _Stage.TLS
        if refusal := hello.judge(found, target):
            raise Over(refusal)
        return bytes(came)

    async def _read(self) -> bytes:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._guest, PIECE)
        except OSError:
            data = b""
        if not data:
            self._stage = _Stage.NONE
            raise Over(Refusal(400, Reason.LEFT, "the request is not whole"))
        return data

    async def _send(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._network.header_seconds):
                await asyncio.get_running_loop().sock_sendall(self._guest, data)
        except OSError:  # a timeout is one
            self._stage = _Stage.NONE
            raise Over(Refusal(400, Reason.LEFT, "nobody listens")) from None

    async def _tell(self, refusal: Refusal) -> None:
        match self._stage:
            case _Stage.HTTP:
                await self._part(heads.refuse(refusal))
            case _Stage.TLS:
                await self._part(hello.alert(refusal))
            case _Stage.NONE:
                pass

    async def _part(self, last: bytes) -> None:
        """Say the last word, and hear the guest out, within bounds."""
        loop = asyncio.get_running_loop()
        left = _FAREWELL_BYTES
        with contextlib.suppress(OSError):
            async with asyncio.timeout(min(_FAREWELL_SECONDS, self._network.idle_seconds)):
                await loop.sock_sendall(self._guest, last)
                self._guest.shutdown(socket.SHUT_WR)
                while left > 0 and (data := await loop.sock_recv(self._guest, PIECE)):
                    left -= len(data)


def _granted(decided: T | Refusal) -> T:
    if isinstance(decided, Refusal):
        raise Over(decided)
    return decided


def _verdict(reason: Reason, *, relayed: bool) -> Verdict:
    if reason is Reason.ENDED:
        return Verdict.ALLOWED
    if reason in FAILURES:
        return Verdict.FAILED
    return Verdict.CUT if relayed or reason is Reason.CLOSED else Verdict.REFUSED

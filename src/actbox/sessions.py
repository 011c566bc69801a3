"""How a client comes to a session: by a door in this process, or over TCP with a token.

A container opens a door at its port. A client in the same process finds it here by the port alone and gets a socket
straight to its kernel; any other client connects to the port, where the container's gateway relays (see `gateway`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from actbox.connecting import TCP_SECONDS, Address, Pieces, beat, reach
from actbox.errors import ConnectionError, ForkRefused, ProtocolError, SandboxUnavailable
from actbox.events import Overrun
from actbox.protocol import messages
from actbox.protocol.frames import Frame
from actbox.shielded import finish
from actbox.spec import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from actbox.lines import Line, Wish
    from actbox.link import Link

READY_SECONDS = 60.0
# What can be passed: names of fields of `Limits`.
OVERRUNS = frozenset({"memory", "cpu", "pids", "disk", "files", "wall", "open_files", "file_size", "tmp", "shm"})
_MOST = 1 << 62


@dataclass(frozen=True, slots=True)
class Exit:
    """How a session ended, as the supervisor saw it.

    `status` is the kernel's wait status, None if it was not the kernel that ended; `begun` the last cell that it had
    begun, None if nobody knows; `killed` says that the host asked for it; `gone` that the whole container went;
    `memory_limit` is set when the machine ran out of memory then; `overrun` says which limit of the session's was
    passed, if that is why; `violation` says which rule of the wire a gateway saw broken.
    """

    status: int | None = None
    begun: int | None = None
    killed: bool = False
    gone: bool = False
    memory_limit: int | None = None
    overrun: Overrun | None = None
    violation: str | None = None


class Session(Protocol):
    """One kernel, seen from its client."""

    limits: Limits
    on_overrun: Callable[[Overrun], None] | None
    """Called when a limit is passed that ends a cell but need not end the session; set by the client."""

    async def receive(self) -> Frame | None:
        """The kernel's next frame; None once it is gone. Raises `ProtocolError`."""
        ...

    async def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """A frame to the kernel. Raises the built-in `ConnectionError`."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the kernel is known to be gone."""
        ...

    def interrupt(self, cell: int) -> None:
        """Have SIGINT sent if this cell still runs then."""
        ...

    def kill(self) -> None:
        """Have the kernel and all it started killed."""
        ...

    async def exited(self, timeout: float) -> Exit | None:
        """How it ended; None if that is not known within `timeout` seconds."""
        ...

    slot: int
    """The number that a request to fork names the new kernel by."""

    async def branch(self) -> Session:
        """A session for a kernel that this one is about to fork; nothing can be done with it until it is `ready`.

        Raises the built-in `ConnectionError`; `ForkRefused` if there are too many.
        """
        ...

    async def ready(self) -> None:
        """Wait for the forked kernel's first word. Raises as `wait_ready`."""
        ...

    async def close(self) -> None:
        """Kill, and wait within a bound until it is gone. Never raises."""
        ...


class Door(Protocol):
    """What a running container offers to clients in its process."""

    async def open_session(self, key: str | None) -> Session:
        """A session in a fresh kernel that is ready for cells."""
        ...

    async def attach(self, wish: Wish) -> Line:
        """A client's place in a named session. Raises as `Keeper.attach`."""
        ...

    def attached(self, wish: Wish) -> Line:
        """The place of a client that is attached. Raises as `Keeper.attached`."""
        ...


_doors: dict[int, Door] = {}


def open_door(port: int, door: Door) -> None:
    """Let clients of this process find a container by its port."""
    _doors[port] = door


def close_door(port: int, door: Door) -> None:
    """The opposite of `open_door`; another container's door at the same port is left alone."""
    if _doors.get(port) is door:
        del _doors[port]


def find_door(port: int, host: str) -> Door | None:
    """The door of a container of this process; None if it has none with this port."""
    return _doors.get(port) if host in ("localhost", "127.0.0.1", "::1") else None


async def connect(port: int, host: str, *, key: str | None, token: str | None, heartbeat: float) -> Session:
    """A session at the container of this port.

    Raises:
        ConnectionError: nothing answers there, the token is wrong or missing, or the session cannot be made.
        SandboxUnavailable: the session's boundary cannot be built.
    """
    door = find_door(port, host)
    if door is not None:
        return await door.open_session(key)
    return await _connect_tcp(port, host, key=key, token=token, heartbeat=heartbeat)


async def wait_ready(receive: Callable[[], Any], ended: Callable[[], Any]) -> None:
    """Wait for a fresh kernel's first message.

    Raises:
        SandboxUnavailable: the guest's set-up says which layer failed.
        ConnectionError: it ended, or gave no sign within 60 s.
    """
    try:
        async with asyncio.timeout(READY_SECONDS):
            frame: Frame | None = await receive()
    except TimeoutError:
        raise ConnectionError(f"the kernel was not ready within {READY_SECONDS:g} s") from None
    if frame is None:
        raise ConnectionError(f"the kernel ended before it was ready{await ended()}")
    match messages.decode(frame):
        case messages.Ready():
            return
        case messages.SetupFailed(layer, detail):
            raise SandboxUnavailable(layer, detail, "Run `actbox doctor` for what this machine has.")
        case _:
            raise ProtocolError("the kernel's first message was not that it is ready")


async def _connect_tcp(port: int, host: str, *, key: str | None, token: str | None, heartbeat: float) -> Session:
    if token is None:
        raise ConnectionError(
            f"no container of this process has port {port}; to reach one of another process pass its token"
        )
    return await _RemoteSession.at(Address(host, port, token, heartbeat), {"key": key})


def read_overrun(told: object, limits: Limits) -> Overrun | None:
    """What was passed, of {"limit", "use"}: the bound is our own word."""
    match told:
        case {"limit": str(name), "use": int() | float() as use} if name in OVERRUNS and not isinstance(use, bool):
            bound = getattr(limits, name)
            return None if bound is None or not 0 <= use < _MOST else Overrun(name, bound, use)
        case _:
            return None


def read_status(told: object) -> int | None:
    """A wait status of a process that has ended; None for anything else."""
    if type(told) is int and 0 <= told < 1 << 16 and (os.WIFEXITED(told) or os.WIFSIGNALED(told)):
        return told
    return None


class _RemoteSession:
    """A session behind a gateway.

    State: `_exit`, set when the gateway says how the kernel ended; `_beating`, the heartbeat's task; `_pieces`, what
    keeps an upload from standing in the way of orders.
    """

    def __init__(self, link: Link, address: Address, pieces: Pieces) -> None:
        self.limits = Limits()
        self.slot = 0
        self.on_overrun: Callable[[Overrun], None] | None = None
        self._link = link
        self._address = address
        self._pieces = pieces
        self._exit: Exit | None = None
        self._exited = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None

    @classmethod
    async def at(cls, address: Address, wish: dict[str, Any]) -> _RemoteSession:
        """A session at a gateway: a fresh one for a key, or the one that a ticket is for. Raises `ConnectionError`."""
        pieces = Pieces()
        try:
            link = await reach(address, pieces)
        except OSError as exc:
            raise ConnectionError(f"no container answers at {address}: {exc or 'timed out'}") from exc
        session = cls(link, address, pieces)
        try:
            await session._greet(wish)
        except BaseException:
            await finish(session.close())
            raise
        return session

    async def branch(self) -> _RemoteSession:
        try:
            await self._link.send({"type": "branch"})
        except OSError as exc:
            raise ConnectionError("the gateway closed the connection") from exc
        try:
            async with asyncio.timeout(TCP_SECONDS):
                frame = await self.receive()
        except TimeoutError:
            raise ConnectionError("the gateway did not answer") from None
        match frame.header if frame is not None else None:
            case {"type": "branch", "ticket": str(ticket), "slot": int(slot)}:
                made = await self.at(self._address, {"ticket": ticket})
                made.slot = slot
                return made
            case {"type": "branch", "refused": str(reason)}:
                raise ForkRefused(reason)
            case {"type": "branch", "reason": str(reason)}:
                raise ConnectionError(ascii(reason)[1:300])
            case _:
                raise ConnectionError("the kernel is gone")

    async def ready(self) -> None:
        await wait_ready(self.receive, self._how_it_ended)

    async def _how_it_ended(self) -> str:
        return "" if self._exit is None or self._exit.status is None else f" (wait status {self._exit.status})"

    async def _greet(self, wish: dict[str, Any]) -> None:
        """Show the token, say what is wanted, and wait until it is there."""
        try:
            await self._link.send({"type": "hello", "token": self._address.token, **wish})
        except OSError as exc:
            raise ConnectionError("the gateway closed the connection") from exc
        try:
            async with asyncio.timeout(READY_SECONDS + TCP_SECONDS):
                frame = await self._link.receive()
        except TimeoutError:
            raise ConnectionError("the gateway did not answer the greeting") from None
        if frame is None:
            raise ConnectionError("the gateway closed the connection")
        if frame.header.get("type") != "welcome":
            raise ConnectionError(f"the gateway refused: {ascii(frame.header.get('reason'))[:300]}")
        limits: Any = frame.header.get("limits", {})
        try:
            self.limits = Limits(**limits)
        except (TypeError, ValueError) as exc:
            raise ConnectionError("what answers at this port is no container's gateway") from exc
        self._beating = asyncio.create_task(beat(self._link, self._address.heartbeat))

    async def receive(self) -> Frame | None:
        while True:
            frame = await self._link.receive()
            if frame is None:
                if self._exit is None:
                    self._exit = Exit(gone=True)
                self._exited.set()
                return None
            if frame.header.get("type") == "overrun":
                overrun = read_overrun(frame.header, self.limits)
                if overrun is not None and self.on_overrun is not None:
                    self.on_overrun(overrun)
                continue
            if frame.header.get("type") == "exited":
                fact = frame.header
                limit = fact.get("memory_limit")
                begun = fact.get("begun")
                self._exit = Exit(
                    read_status(fact.get("status")),
                    begun if type(begun) is int else None,
                    killed=fact.get("killed") is True,
                    gone=fact.get("gone") is True,
                    memory_limit=limit if isinstance(limit, int) else None,
                    overrun=read_overrun(fact.get("overrun"), self.limits),
                    violation=fact.get("violation") and str(fact["violation"])[:300],
                )
                self._exited.set()
                return None
            return frame

    async def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        if header.get("type") == "archive":
            await self._pieces.send(self._link, Frame(header, payload))
        else:
            await self._link.send(header, payload)

    @property
    def ended(self) -> bool:
        return self._link.ended

    def interrupt(self, cell: int) -> None:
        self._order({"type": "interrupt", "cell": cell})

    def kill(self) -> None:
        self._order({"type": "kill"})

    def _order(self, header: dict[str, Any]) -> None:
        task = asyncio.ensure_future(self._link.send(header))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def exited(self, timeout: float) -> Exit | None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), timeout)
        return self._exit

    async def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
        await self._link.close_gracefully()

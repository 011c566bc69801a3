"""A container's TCP port: other processes come in with the token, and frames are relayed.

A kernel never gets the accepted socket itself. A TCP socket belongs to the host's network, and whoever holds one may
disconnect it and connect it anew (`connect` with AF_UNSPEC), which would be a way out of the sandbox. So this is the
one place with a hop more; a client in the container's own process does not come through here.

A greeting that names a session is for one that is kept: from then on a `desk` answers that client.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from actbox import carrying, connecting, desk, dialogue, refusals
from actbox.errors import ActboxError, ConnectionError, ForkRefused, ProtocolError
from actbox.link import Link
from actbox.protocol import frames
from actbox.sessions import Door, Exit

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from actbox.events import Overrun
    from actbox.protocol.frames import Frame
    from actbox.sessions import Session

logger = logging.getLogger(__name__)

_HELLO_SECONDS = 5.0
_HELLO_PAYLOAD = 4096
_MAX_STRANGERS = 64
# What a gateway says itself; a kernel that says it lies.
_GATEWAY_TYPES = frozenset({"welcome", "refused", "exited", "pong", "overrun", "branch", "taken"})
_TICKET_SECONDS = 30.0
# What a kernel is asked for; it gets nothing else from a client.
_REQUESTS = frozenset(
    {
        *("execute", "download", "upload", "delete", "archive", "archive_end"),
        *("variables", "get", "set", "save", "restore", "functions"),
        *("fork", "settle", "clear"),
    }
)
# What may wait for a kernel: the pieces that a client has on their way, and a few requests behind them.
_MOST_WAITING = connecting.PIECES + 8
_EXIT_SECONDS = 5.0
_MAX_CELL = 1 << 53


class _TokenDoor(Door, Protocol):
    """A door that strangers must show a token at."""

    @property
    def token(self) -> str: ...


class Gateway:
    """See the module's text.

    State: the server; `_guests`, the task of each connection; `_strangers`, how many have not shown the token yet;
    `_tickets`, sessions that are being forked, each to be fetched by a connection of its own.
    """

    def __init__(self, listener: socket.socket, door: _TokenDoor) -> None:
        self._listener = listener
        self._door = door
        self.port: int = listener.getsockname()[1]
        self._accepting: asyncio.Task[None] | None = None
        self._guests: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._tickets: dict[str, Session] = {}
        self._lapsing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Accept connections from now on."""
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Close the port and every connection."""
        tasks = [*self._guests, *self._lapsing, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except OSError as exc:
                logger.warning("the port %d cannot accept: %s", self.port, exc)
                await asyncio.sleep(0.1)
                continue
            if self._strangers >= _MAX_STRANGERS:
                accepted.close()
                continue
            self._strangers += 1
            task = asyncio.create_task(self._serve(accepted))
            self._guests.add(task)
            task.add_done_callback(self._guests.discard)

    async def _serve(self, accepted: socket.socket) -> None:
        known = False
        link = await Link.over(accepted, _HELLO_PAYLOAD)
        try:
            try:
                async with asyncio.timeout(_HELLO_SECONDS):
                    hello = await link.receive()
            finally:
                known = True
                self._strangers -= 1
            if hello is None:
                return
            if not self._admits(hello):
                await link.send({"type": "refused", "reason": "the token is missing or wrong"})
                await link.close_gracefully()
                return
            link.allow(frames.MAX_PAYLOAD)
            if "attach" in hello.header:
                await self._attend(link, hello.header)
                return
            try:
                session = await self._session_for(hello.header)
            except ActboxError as exc:
                await link.send({"type": "refused", "reason": str(exc)[:2000]})
                await link.close_gracefully()
                return
            await self._relay(link, session)
        except (OSError, TimeoutError, ProtocolError):
            # A stranger who says nothing, or leaves: there is nobody to tell.
            return
        finally:
            if not known:
                self._strangers -= 1
            link.close()

    async def _attend(self, link: Link, hello: dict[str, Any]) -> None:
        """Serve a client that would be attached to a named session, or is and would have something carried."""
        is_attached = "carry" in hello
        try:
            wish = dialogue.read_wish(hello)
            line = self._door.attached(wish) if is_attached else await self._door.attach(wish)
        except ActboxError as exc:
            refusal = refusals.refusal_frame(exc)
            await link.send(refusal.header)
            await link.close_gracefully()
            return
        if is_attached:
            await carrying.serve(link, line, hello)
        else:
            await desk.serve(link, line)

    async def _session_for(self, hello: dict[str, Any]) -> Session:
        ticket = hello.get("ticket")
        if ticket is None:
            return await self._door.open_session(hello.get("key"))
        session = self._tickets.pop(ticket, None) if isinstance(ticket, str) else None
        if session is None:
            raise ConnectionError("the ticket is for no session")
        return session

    async def _issue_ticket(self, session: Session) -> dict[str, Any]:
        """Have a session made for a kernel to be forked; what its client is told."""
        try:
            branch = await session.branch()
        except ForkRefused as exc:
            return {"type": "branch", "refused": exc.reason[:300]}
        except OSError as exc:
            return {"type": "branch", "reason": str(exc)[:300]}
        ticket = secrets.token_urlsafe(32)
        self._tickets[ticket] = branch
        lapsing = asyncio.create_task(self._let_lapse(ticket))
        self._lapsing.add(lapsing)
        lapsing.add_done_callback(self._lapsing.discard)
        return {"type": "branch", "ticket": ticket, "slot": branch.slot}

    async def _let_lapse(self, ticket: str) -> None:
        """Close the session of a ticket that nobody shows."""
        try:
            await asyncio.sleep(_TICKET_SECONDS)
        finally:
            session = self._tickets.pop(ticket, None)
            if session is not None:
                await session.close()

    def _admits(self, hello: Frame) -> bool:
        token = hello.header.get("token")
        if hello.header.get("type") != "hello" or not isinstance(token, str):
            return False
        return hmac.compare_digest(token.encode("utf-8", "replace"), self._door.token.encode())

    async def _relay(self, link: Link, session: Session) -> None:
        try:
            await link.send({"type": "welcome", "limits": asdict(session.limits)})
            session.on_overrun = _telling(link)
            outward = asyncio.create_task(_outward(session, link))
            inward = asyncio.create_task(self._inward(link, session))
            try:
                await asyncio.wait({outward, inward}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (outward, inward):
                    task.cancel()
                # Whichever way they end, a client that has left is why.
                await asyncio.gather(outward, inward, return_exceptions=True)
        finally:
            await session.close()
        await link.close_gracefully()

    async def _inward(self, link: Link, session: Session) -> None:
        """What the client says: cells and transfers for the kernel, which may be long in reading, orders for us."""
        waiting: asyncio.Queue[Frame] = asyncio.Queue(_MOST_WAITING)
        beside = {asyncio.create_task(_pass_on(waiting, session, link))}
        try:
            while (frame := await link.receive()) is not None:
                header = frame.header
                match header:
                    case {"type": str(kind)} if kind in _REQUESTS:
                        waiting.put_nowait(frame)
                    case {"type": "call_result"}:
                        # The kernel may be long in reading it, and what comes behind it must not wait for that.
                        task = asyncio.create_task(_try_to_send(session, header, frame.payload))
                        beside.add(task)
                        task.add_done_callback(beside.discard)
                    case {"type": "interrupt", "cell": int(cell)} if 0 < cell < _MAX_CELL:
                        session.interrupt(cell)
                    case {"type": "kill"}:
                        session.kill()
                    case {"type": "branch"}:
                        await link.send(await self._issue_ticket(session))
                    case {"type": "ping"}:
                        await link.send({"type": "pong"})
                    case _:
                        return
        except asyncio.QueueFull:
            # A client that does not wait for its pieces to be taken is none of ours.
            return
        finally:
            for task in beside:
                task.cancel()


async def _pass_on(waiting: asyncio.Queue[Frame], session: Session, link: Link) -> None:
    """Give the kernel what is for it, in turn, and say of each piece of an upload that there is room for another."""
    while True:
        frame = await waiting.get()
        # A kernel that died meanwhile is told of by the other direction.
        await _try_to_send(session, frame.header, frame.payload)
        if frame.header.get("type") == "archive":
            await _try_to_send(link, {"type": "taken"})


def _telling(link: Link) -> Callable[[Overrun], None]:
    """Tells the client of a limit that was passed."""
    telling: set[asyncio.Task[None]] = set()

    def tell(overrun: Overrun) -> None:
        task = asyncio.create_task(_try_to_send(link, {"type": "overrun", **asdict(overrun)}))
        telling.add(task)
        task.add_done_callback(telling.discard)

    return tell


async def _try_to_send(to: Link | Session, header: dict[str, Any], payload: bytes = b"") -> None:
    with contextlib.suppress(OSError):
        await to.send(header, payload)


async def _outward(session: Session, link: Link) -> None:
    """What the kernel says, and at last how it ended."""
    violation = None
    try:
        while (frame := await session.receive()) is not None:
            kind = frame.header.get("type")
            if not isinstance(kind, str) or kind in _GATEWAY_TYPES:
                raise ProtocolError("the kernel spoke for the gateway")
            await link.send(frame.header, frame.payload)
    except (ProtocolError, frames.FrameError) as exc:
        # A header that was within its bounds as it came may not be as we would write it.
        violation = str(exc)
        session.kill()
    exit_ = await session.exited(_EXIT_SECONDS / 5)
    if exit_ is None:
        session.kill()
        exit_ = await session.exited(_EXIT_SECONDS) or Exit()
    fact: dict[str, Any] = {**asdict(exit_), "violation": violation}
    with contextlib.suppress(OSError):
        await link.send({"type": "exited", **fact})

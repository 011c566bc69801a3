"""The way out of one session: its connections, each served by the rules of one `Network`, and the log of them.

There is no listener on the host, so nobody but the holder of a socket that was handed to `serve` can use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from actbox.egress import heads
from actbox.egress.conversation import Conversation
from actbox.egress.dialling import SystemResolver
from actbox.egress.relay import Meter
from actbox.egress.verdicts import Allowance, Reason, Record, Refusal, Verdict

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from actbox.egress.dialling import Resolver
    from actbox.network import Network

logger = logging.getLogger(__name__)


class Proxy:
    """An HTTP proxy for one session. All its methods belong to one event loop.

    State: `_connections`, the task of each; `_meter`, the bytes of all; `_allowance`, what may still be logged;
    `_closed`.

    Args:
        network: what may be reached; it cannot change any more.
        log: called with the record of each connection when it is over, in the loop, so it should be quick. Refusals
            that come by the hundreds are counted in the next record instead (`Record.suppressed`).
        resolver: finds the addresses of a name; None for the machine's own.
    """

    def __init__(
        self, network: Network, log: Callable[[Record], None] | None = None, resolver: Resolver | None = None
    ) -> None:
        self._network = network
        self._log = log
        self._resolver = resolver or SystemResolver()
        self._connections: set[asyncio.Task[None]] = set()
        self._meter = Meter(network)
        self._allowance = Allowance()
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.connections} connections"
        return f"<Proxy {state}, {self.bytes_up} bytes up, {self.bytes_down} bytes down>"

    @property
    def connections(self) -> int:
        """How many connections are served now."""
        return len(self._connections)

    @property
    def bytes_up(self) -> int:
        """How many bytes have gone out so far."""
        return self._meter.up

    @property
    def bytes_down(self) -> int:
        """How many bytes have come in so far."""
        return self._meter.down

    async def serve(self, sock: socket.socket) -> None:
        """Serve one connected stream socket of the guest's, which belongs to the proxy from now on, until it is over.

        Nothing that a guest or a host does is raised. Cancelling this ends the connection. When the proxy is closed, or
        `Network.connections` are served already, the socket is closed without delay.
        """
        sock.setblocking(False)
        if self._closed:
            sock.close()
            return
        if len(self._connections) >= self._network.connections:
            self._turn_away(sock)
            return
        conversation = Conversation(sock, self._network, self._resolver, self._meter)
        task = asyncio.create_task(conversation.run())
        self._connections.add(task)
        # Here and not in the task, which may be cancelled before it begins.
        task.add_done_callback(lambda _: self._over(task, sock, conversation))
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
        if not task.cancelled():
            task.result()

    async def close(self) -> None:
        """End every connection; each has been logged when this returns. May be called again."""
        self._closed = True
        tasks = tuple(self._connections)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if isinstance(self._resolver, SystemResolver):
            self._resolver.close()

    def _turn_away(self, sock: socket.socket) -> None:
        """Refuse a connection without a task, a wait or a byte read: there may be thousands."""
        most = self._network.connections
        message = f"the session has {most} connections open already, which is all that it may have"
        with sock, contextlib.suppress(OSError):
            sock.send(heads.refuse(Refusal(503, Reason.CONNECTIONS, message)))
        self._write(Record(time.time(), "", 0, "", Verdict.REFUSED, Reason.CONNECTIONS, 0, 0, 0.0))

    def _over(self, task: asyncio.Task[None], sock: socket.socket, conversation: Conversation) -> None:
        self._connections.discard(task)
        sock.close()
        self._write(conversation.record())

    def _write(self, record: Record) -> None:
        suppressed = self._allowance.take(record.verdict)
        if self._log is None or suppressed is None:
            return
        try:
            self._log(replace(record, suppressed=suppressed))
        except Exception:
            logger.exception("a connection could not be logged: %s", record)

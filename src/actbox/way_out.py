"""A session's way out: what it asks for on one socket, and the proxy that serves what it is given.

The session's forwarder sends a datagram for each connection that it wants, and gets one back with a descriptor: one
end of a fresh stream, whose other end the session's proxy serves. So the host listens nowhere, the guest never holds a
socket of the host's network, and a session's policy is bound to what was given to that session.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

from actbox.egress import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from actbox.egress import Record, Resolver
    from actbox.network import Network

_DATAGRAM = 16


class WayOut:
    """See the module's text.

    State: `_asking`, our end of the socket; `_serving`, the task of each connection; `_closed`.
    """

    def __init__(self, network: Network, log: Callable[[Record], None], resolver: Resolver | None) -> None:
        self._proxy = Proxy(network, log, resolver)
        self._asking, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._asking.setblocking(False)
        self._serving: set[asyncio.Task[None]] = set()
        self._closed = False
        asyncio.get_running_loop().add_reader(self._asking, self._hear)

    def _hear(self) -> None:
        try:
            data = self._asking.recv(_DATAGRAM)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # Nobody can ask any more; what is under way goes on until the session ends.
            asyncio.get_running_loop().remove_reader(self._asking)
            return
        try:
            ours, theirs = socket.socketpair()
        except OSError:
            # This process has no descriptors left. An answer without one says that there is none.
            with contextlib.suppress(OSError):
                self._asking.send(b"n")
            return
        with theirs:
            try:
                socket.send_fds(self._asking, [b"c"], [theirs.fileno()])
            except OSError:
                # A guest that asks without end and takes nothing gets no more.
                ours.close()
                return
        task = asyncio.create_task(self._proxy.serve(ours))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def close(self) -> None:
        """End every connection. Bounded in time; may be called again."""
        if self._closed:
            return
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._asking)
        self._asking.close()
        self.theirs.close()
        await self._proxy.close()
        if self._serving:
            await asyncio.wait(self._serving)

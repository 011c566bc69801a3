# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A running container: its control socket, what it complained of, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from typing import TYPE_CHECKING

import aiodocker
import aiohttp

from actbox.engines.base import Boundary, Layout
from actbox.errors import SandboxUnavailable
from actbox.shielded import finish

if TYPE_CHECKING:
    from aiodocker.containers import DockerContainer
    from aiodocker.stream import Stream

    from actbox.engines.docker.tunnel import Tunnel

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.05
# What the engine answers to a removal: another one is under way, or over.
_BEING_REMOVED = 409
_NO_SUCH = 404
_COMPLAINT = 16384
STDERR = 2


class Output:
    """What a container writes to its standard error: the last 16 KiB. State: `_parts` and their size."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._size = 0

    def take(self, data: bytes) -> None:
        """Keep some more, and drop as much of the oldest."""
        self._parts.append(data[-_COMPLAINT:])
        self._size += len(self._parts[-1])
        while self._size - len(self._parts[0]) >= _COMPLAINT:
            self._size -= len(self._parts.popleft())

    def text(self) -> str:
        """All that is kept."""
        return b"".join(self._parts)[-_COMPLAINT:].decode("utf-8", "replace").strip()


class DockerBoundary(Boundary):
    """State: the container and the connection it is managed by; the task that reads its stderr; the one that closes."""

    def __init__(self, docker: aiodocker.Docker, container: DockerContainer, layout: Layout) -> None:
        self.layout = layout
        self.control: socket.socket
        self.tunnel: Tunnel | None = None
        self.output = Output()
        self._docker = docker
        self._container = container
        self._listening: asyncio.Task[None] | None = None
        self._closing: asyncio.Future[None] | None = None

    @property
    def id(self) -> str:
        """The container's id."""
        return self._container.id

    def listen(self, stream: Stream) -> None:
        """Keep what the container writes to its standard error."""
        self._listening = asyncio.ensure_future(self._listen(stream))

    async def _listen(self, stream: Stream) -> None:
        try:
            with contextlib.suppress(OSError, aiohttp.ClientError, aiodocker.DockerError):
                while (message := await stream.read_out()) is not None:
                    if message.stream == STDERR:
                        self.output.take(message.data)
        finally:
            await _close_stream(stream)

    async def ended(self) -> None:
        """Wait until the container's standard error has ended, which it does with the container."""
        if self._listening is not None:
            await asyncio.wait([self._listening])

    def explanation(self) -> SandboxUnavailable | None:
        """See `Boundary.explanation`."""
        said = self.output.text().splitlines()
        if not said:
            return None
        return SandboxUnavailable(
            "container", ascii(said[-1][:500])[1:-1], "`actbox doctor --engine docker` tells more."
        )

    async def close(self) -> None:
        """See `Boundary.close`."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await finish(_until(self._closing))

    async def _close(self) -> None:
        # The container's first process ends when its control socket does, and everything inside with it: that holds
        # even if the daemon does not answer.
        with contextlib.suppress(AttributeError, OSError):
            self.control.shutdown(socket.SHUT_RDWR)
            self.control.close()
        if self.tunnel is not None:
            await self.tunnel.close()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await remove(self._container)
        except (TimeoutError, aiodocker.DockerError, aiohttp.ClientError, OSError) as exc:
            logger.warning("the container %s was told to end, but cannot be removed: %s", self.id[:12], exc)
        finally:
            if self._listening is not None:
                self._listening.cancel()
                await asyncio.wait([self._listening])
            await self._docker.close()


async def remove(container: DockerContainer) -> None:
    """Kill and remove a container with its volumes, and wait until it is gone; one that is gone already is fine.

    Raises:
        aiodocker.DockerError: the engine cannot.
        TimeoutError: somebody else's removal of it does not end.
    """
    try:
        await container.delete(force=True, v=True)
    except aiodocker.DockerError as exc:
        if exc.status == _BEING_REMOVED:
            await _gone(container)
        elif exc.status != _NO_SUCH:
            raise


async def _gone(container: DockerContainer) -> None:
    # The engine's own wait can miss a removal that ends while the wait begins.
    async with asyncio.timeout(_CLOSE_SECONDS):
        while True:
            try:
                await container.show()
            except aiodocker.DockerError as exc:
                if exc.status == _NO_SUCH:
                    return
                raise
            await asyncio.sleep(_POLL_SECONDS)


async def _until(closing: asyncio.Future[None]) -> None:
    await closing


async def _close_stream(stream: Stream) -> None:
    # The library's own close takes the connection for open.
    with contextlib.suppress(AssertionError, OSError):
        await stream.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets for the control's datagrams."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The first words between the host and a container's first process, over either way in.

By socket: the host listens in a folder that nobody but the container sees, and the guest connects. From then on
descriptors can be passed. By stream: the guest speaks over its standard input and output, which the daemon carries.
Either way the guest says what it is, the host hands it the guest code, and nothing but the image's Python has run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, TypeVar, cast

import aiodocker
import aiohttp

from actbox.engines.docker import boot, daemon
from actbox.engines.docker.boundary import pair
from actbox.engines.docker.tunnel import GONE, Tunnel
from actbox.errors import EnvironmentUnusable, SandboxUnavailable

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path

    from aiodocker.containers import DockerContainer

    from actbox.engines.docker.boundary import DockerBoundary

FOLDERS_REMEDY = (
    "The engine must see this machine's folders: run it here, or share them with it (Docker Desktop: file sharing). "
    "Without binds, files come and go by upload_file and download_file."
)
_T = TypeVar("_T")
_SECONDS = 60.0
_MAX_HELLO = 4096
_NO_SUCH_PROGRAM = ("executable file not found", "no such file or directory", "error finding executable")


class Meeting:
    """Starts a container and meets its first process.

    State: nothing; `tag` is for messages.
    """

    def __init__(self, boundary: DockerBoundary, container: DockerContainer, tag: str) -> None:
        self._boundary = boundary
        self._container = container
        self._tag = tag

    async def by_socket(self, folder: Path) -> None:
        """Give the boundary its control socket, through `folder`, which is bound where `boot.SOCKET` says.

        Raises:
            EnvironmentUnusable: the image cannot run the guest.
            SandboxUnavailable: the engine cannot start it, or it ended, or gave no sign within 60 s.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener:
            path = folder / boot.SOCKET.rpartition("/")[2]
            listener.bind(str(path))
            # Nobody else can enter the folder above; inside, the user may be another one.
            path.chmod(0o666)
            listener.listen(1)
            listener.setblocking(False)
            stream = self._container.attach(stderr=True)
            with daemon.translated("docker"):
                await stream._init()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - attach before the start
            self._boundary.listen(stream)
            await self._start()
            loop = asyncio.get_running_loop()
            control, _ = await self._unless_it_ends(loop.sock_accept(listener))
        self._boundary.control = control
        control.setblocking(False)
        hello = await self._unless_it_ends(loop.sock_recv(control, _MAX_HELLO))
        self._check(hello)
        _pass_bundle(control)

    async def by_stream(self) -> None:
        """Give the boundary its control socket, at the other end of which a tunnel carries all to the container.

        Raises: as `by_socket`.
        """
        stream = self._container.attach(stdin=True, stdout=True, stderr=True)
        with daemon.translated("docker"):
            await stream._init()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - attach before the start
        boundary = self._boundary
        ours, theirs = pair()
        ours.setblocking(False)
        boundary.control = ours
        boundary.tunnel = tunnel = Tunnel(stream, theirs, boundary.output)
        await self._start()
        try:
            async with asyncio.timeout(_SECONDS):
                hello = await tunnel.read_block(_MAX_HELLO)
                if hello is None:
                    raise self._why()
                self._check(hello)
                code = boot.bundle()
                await stream.write_in(struct.pack(">I", len(code)) + code)
        except GONE as exc:
            raise self._why() from exc
        tunnel.open()

    async def _start(self) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                await self._container.start()
        except aiodocker.DockerError as exc:
            detail = daemon.said(exc)
            if any(sign in detail for sign in _NO_SUCH_PROGRAM):
                raise EnvironmentUnusable(self._tag, f"there is no python3 in it ({detail})") from exc
            raise SandboxUnavailable("docker", detail, "`actbox doctor --engine docker` tells more.") from exc
        except (TimeoutError, OSError, aiohttp.ClientError) as exc:
            raise SandboxUnavailable("docker", f"the container did not start: {exc!r}", daemon.REMEDY) from exc

    async def _unless_it_ends(self, waiting: Coroutine[Any, Any, _T]) -> _T:
        """What is waited for, unless the container ends before."""
        wanted = asyncio.ensure_future(waiting)
        ended = asyncio.ensure_future(self._boundary.ended())
        try:
            await asyncio.wait({wanted, ended}, timeout=_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                return wanted.result()
        finally:
            for task in (wanted, ended):
                task.cancel()
            with contextlib.suppress(BaseException):
                await asyncio.gather(wanted, ended, return_exceptions=True)
        raise self._why()

    def _why(self) -> SandboxUnavailable:
        return self._boundary.explanation() or SandboxUnavailable(
            "container",
            f"the image {self._tag} gave no sign of life",
            f"Try it by hand: docker run --rm --entrypoint python3 {self._tag} -V",
        )

    def _check(self, hello: bytes) -> None:
        """Whether the image's Python can run the guest code, and sees the right folders."""
        try:
            told: Any = json.loads(hello)
            version = tuple(cast("list[int]", told["python"]))
            has_ipython, kind = bool(told["ipython"]), ascii(told["implementation"])[1:-1]
            unseen = [ascii(path)[1:-1] for path in cast("list[str]", told["unseen"])]
        except (ValueError, TypeError, KeyError) as exc:
            raise SandboxUnavailable(
                "container", "its first process is not ours", "Pull or build the image anew."
            ) from exc
        named = ".".join(map(str, version))
        if version < boot.OLDEST or kind != "cpython":
            least = ".".join(map(str, boot.OLDEST))
            raise EnvironmentUnusable(self._tag, f"its python3 is {kind} {named}; CPython {least} or newer is needed")
        if not has_ipython:
            raise EnvironmentUnusable(self._tag, f"its Python {named} has no IPython")
        if unseen:
            place = unseen[0].rpartition("/")[0]
            raise SandboxUnavailable("folders", f"what the engine shows at {place} is another folder", FOLDERS_REMEDY)


def _pass_bundle(control: socket.socket) -> None:
    """Hand over the guest code, in a file that has no name and that the receiver cannot write, and what tells our end.

    The end of the control socket is not enough: a forked child of ours holds a copy. The descriptor of this process
    gives the receiver no power over it, as it is of another pid namespace.
    """
    fd = os.memfd_create("actbox-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, boot.bundle())
        os.lseek(fd, 0, os.SEEK_SET)
        reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            own = os.pidfd_open(os.getpid())
            try:
                socket.send_fds(control, [b"g"], [reading, own])
            finally:
                os.close(own)
        finally:
            os.close(reading)
    finally:
        os.close(fd)

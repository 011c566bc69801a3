"""Files into and out of a session, between its cells: the kernel's side of a transfer.

Everything is done with the rights of the session and within its own root, so a link that leads elsewhere leads nowhere
new; still none is followed. Each step holds interrupts back: one that comes is heeded between two pieces.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from . import packing, places
from .places import Refused
from .unpacking import Arrival

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ..protocol.frames import Frame
    from .interrupts import Interrupts
    from .output import Channel

REQUESTS = frozenset(("download", "upload", "delete"))


class Transfers:
    """Serves requests for files.

    Args:
        channel: where pieces of archives are sent.
        interrupts: what holds interrupts back.
        receive: the next frame of the host's; interruptible while it waits.
    """

    def __init__(self, channel: Channel, interrupts: Interrupts, receive: Callable[[], Frame]) -> None:
        self._channel = channel
        self._interrupts = interrupts
        self._receive = receive

    def serve(self, request: dict[str, Any]) -> list[str]:
        """Carry out a request; the names of what was left out of a folder, made printable.

        Raises:
            Refused: it cannot be done, for the reason given.
        """
        try:
            root, parts = places.split(str(request["path"]))
            as_file = request.get("kind") == "file"
            if not parts and (as_file or request["type"] == "delete"):
                raise Refused("it is a folder, not a regular file")
            if request["type"] == "download":
                return self._download(int(request["id"]), root, parts, request.get("without", ()), as_file=as_file)
            if request["type"] == "upload":
                self._upload(root, parts, as_file=as_file)
            else:
                self._delete(root, parts)
        except OSError as exc:
            raise Refused(_reason(exc)) from exc
        return []

    def _download(
        self, number: int, root: str, parts: list[bytes], without: Iterable[str], *, as_file: bool
    ) -> list[str]:
        left_out: list[str] = []
        with contextlib.ExitStack() as stack:
            with self._interrupts.held:
                if as_file:
                    folder = _closed_by(stack, _walk(root, parts[:-1]))
                    pieces = packing.pack_file(_closed_by(stack, places.open_file(folder, parts[-1])[0]))
                else:
                    folder = _closed_by(stack, _walk(root, parts, read=True))
                    unwanted = frozenset(os.fsencode(str(name)) for name in without)
                    pieces = packing.pack_folder(folder, left_out, unwanted)
                stack.callback(pieces.close)
            while (piece := self._next(pieces)) is not None:
                self._channel.send({"type": "archive", "id": number}, piece)
        return left_out

    def _next(self, pieces: Iterator[bytes]) -> bytes | None:
        with self._interrupts.held:
            return next(pieces, None)

    def _upload(self, root: str, parts: list[bytes], *, as_file: bool) -> None:
        with contextlib.ExitStack() as stack:
            with self._interrupts.held:
                folder = _closed_by(stack, _walk(root, parts[:-1] if as_file else parts, make=True))
                arrival = Arrival(folder, only=parts[-1] if as_file else None)
                stack.callback(self._close, arrival)
            while (frame := self._receive()).header.get("type") != "archive_end":
                if frame.header.get("type") == "archive":
                    with self._interrupts.held:
                        arrival.feed(frame.payload)
            with self._interrupts.held:
                arrival.settle()

    def _close(self, arrival: Arrival) -> None:
        with self._interrupts.held:
            arrival.close()

    def _delete(self, root: str, parts: list[bytes]) -> None:
        with self._interrupts.held, contextlib.ExitStack() as stack:
            folder = _closed_by(stack, _walk(root, parts[:-1]))
            if stat.S_ISDIR(os.lstat(parts[-1], dir_fd=folder).st_mode):
                raise Refused("it is a folder, not a file")
            os.unlink(parts[-1], dir_fd=folder)


def _closed_by(stack: contextlib.ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _walk(root: str, parts: list[bytes], *, make: bool = False, read: bool = False) -> int:
    """A descriptor of the folder below a root."""
    here = places.enter(None, root.encode(), read=read and not parts)
    for number, part in enumerate(parts, 1):
        above = here
        try:
            here = places.enter(above, part, make=make, read=read and number == len(parts))
        finally:
            os.close(above)
    return here


def _reason(exc: OSError) -> str:
    if exc.errno == errno.EROFS:
        return f"{exc.strerror}: what may be written are /tmp and the folders below /app that are not read-only"
    return exc.strerror or str(exc)

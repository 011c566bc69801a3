"""The private folder of a checkpoint, kept on the host: the archive that the session has made of it, as it came.

It lies in a file without a name, which ends with this process however that ends. Nothing in it is looked into here: the
session that gets it back unpacks it, with its own rights and the same suspicion as any archive.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from actbox.copies import KernelRefused
from actbox.errors import LocalPathError, ProtocolError, TransferRefused
from actbox.exchange import PIECE
from actbox.guest.folders import BRANCHES
from actbox.shielded import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from actbox.copies import Carried, Copy
    from actbox.protocol.messages import Reply
    from actbox.spec import Limits

# Of an archive beside the files' own bytes, for each file: its header, one more for a long path, what fills it up.
_OVERHEAD = 2048


class KeptFiles:
    """See the module's text.

    State: `_file`, open until `close`; `_size`, what was written; `_lock`, held while a thread has to do with it;
    `left_out`, what of the folder is not in it, as the session tells: printable paths.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._file: BinaryIO | None = None
        self._size = 0
        self._lock = asyncio.Lock()
        self.left_out: tuple[str, ...] = ()

    async def close(self) -> None:
        """Let go of them; may be called again."""
        async with self._lock:
            file, self._file = self._file, None
            if file is not None:
                await in_thread(file.close)

    async def open(self) -> None:
        """Make the file. Raises `LocalPathError`."""
        await self._touch(self._open)

    def _open(self) -> None:
        self._file = cast("BinaryIO", tempfile.TemporaryFile(buffering=0))  # noqa: SIM115 - closed by `close`

    async def add(self, data: bytes) -> None:
        """The next piece. Raises `LocalPathError`, and `KernelRefused` if there is too much of it."""
        self._size += len(data)
        if self._size > self._most:
            raise KernelRefused("", f"it is more than the {self._most} bytes allowed")
        async with self._lock:
            if self._file is not None:
                await self._touch(_write, self._file.fileno(), data)

    async def piece(self, start: int) -> bytes:
        """The piece that begins there; empty at the end. Raises `LocalPathError`."""
        async with self._lock:
            if self._file is None:
                raise ConnectionResetError("it was discarded meanwhile")
            return await self._touch(os.pread, self._file.fileno(), PIECE, start)

    async def _touch(self, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return await in_thread(work, *args)
        except OSError as exc:
            place = Path(tempfile.gettempdir())
            raise LocalPathError(place, f"{exc.strerror or exc}; make room there, or set TMPDIR") from exc


async def keep_folder(copy: Copy, path: str) -> KeptFiles:
    """What is in a session's private folder, `path` inside; nothing is kept if this raises.

    Raises:
        TransferRefused: the folder cannot be packed, or is more than `Limits.disk` and `Limits.files` allow.
        LocalPathError: it cannot be kept here.
        LimitExceeded, ProtocolError, OSError, FrameError: as `copies.ask`.
    """
    made = KeptFiles(_most(copy.session.limits))
    try:
        await made.open()
        request = {"type": "download", "path": path, "kind": "directory", "without": [BRANCHES]}
        made.left_out = (await _asked(copy, request, _Coming(made), path)).left_out
    except BaseException:
        await made.close()
        raise
    return made


async def put_back(copy: Copy, files: KeptFiles, path: str) -> None:
    """Make a session's private folder what it was when it was kept. Raises as `keep_folder`; it is half done then."""
    await _asked(copy, {"type": "clear"}, None, path)
    await _asked(copy, {"type": "upload", "path": path, "kind": "directory"}, _Going(files), path)


def _most(limits: Limits) -> int:
    return limits.disk + limits.files * _OVERHEAD


async def _asked(copy: Copy, request: dict[str, Any], carried: Carried | None, path: str) -> Reply:
    try:
        return await copy.ask(request, carried)
    except KernelRefused as exc:
        raise TransferRefused(path, exc.reason("", "TransferRefused", "FolderRefused")) from exc


class _Coming:
    def __init__(self, files: KeptFiles) -> None:
        self._files = files

    async def send(self, send: Callable[[dict[str, Any], bytes], Awaitable[None]]) -> None:
        """See `Carried`: nothing goes."""

    async def take(self, data: bytes) -> None:
        await self._files.add(data)


class _Going:
    def __init__(self, files: KeptFiles) -> None:
        self._files = files

    async def send(self, send: Callable[[dict[str, Any], bytes], Awaitable[None]]) -> None:
        start = 0
        while piece := await self._files.piece(start):
            start += len(piece)
            await send({"type": "archive"}, piece)
        await send({"type": "archive_end"}, b"")

    async def take(self, data: bytes) -> None:  # noqa: ARG002 - nothing should come
        """See `Carried`."""
        raise ProtocolError("the kernel sent an archive that nobody asked for")


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]

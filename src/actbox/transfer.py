"""Files into and out of a session: the host's side.

A transfer waits its turn among the cells and is an execution like any of them, so it ends like one: in time, by an
interrupt, or with its kernel. The session packs and unpacks within its own boundary; the host never opens a path there.
What the session sends is a tar stream of its own making, which `guest.unpacking` takes apart with suspicion.

All that touches a disk runs in worker threads, one piece of an archive at a time: a transfer holds a few pieces in
memory, however large the file is, and whoever is faster waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from actbox.errors import (
    ActboxError,
    ExecutionError,
    InvalidArgument,
    LocalPathError,
    LocalPathMissing,
    ProtocolError,
    TransferRefused,
)
from actbox.execution import check_timeout
from actbox.guest import packing, places
from actbox.guest.places import Refused
from actbox.guest.unpacking import Arrival, InTheWay
from actbox.protocol.messages import legible
from actbox.shielded import finish, in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Generator

    from actbox.execution import Transfer

    Send = Callable[[dict[str, Any], bytes], Awaitable[None]]
    Kind = Literal["file", "directory"]

MAX_BYTES = 1 << 30
_MAX_REASON = 1000


class FileTransfers(ABC):
    """The methods of a client that move files; it says how a transfer is carried out.

    `relpath` is a path inside, relative to `/app`, or absolute in `/app` or `/tmp`; `local_path` one of the host. Both
    may name what they are to become, and neither may be a symbolic link, or inside lead through one. On the host links
    above `local_path` are followed: do not pass one below a folder that a session can write. `timeout` is in seconds,
    the time behind cells submitted before included.

    Each method raises:
        InvalidArgument: a path, timeout or bound that cannot be used; nothing was done.
        StateError: the client is not connected.
        TransferRefused: the file inside is missing, no regular file, not permitted, too large, or the like. If a
            directory was to be uploaded, none of it has been, unless the disk failed in the middle of the last step.
        LocalPathError: the same of the file on the host.
        ExecutionTimeout, ExecutionInterrupted, KernelDied, ExecutionLost, ProtocolError: as for a cell.

    A transfer that fails leaves no part of a file behind on either side, and none that it would have replaced is gone.
    Inside, folders that were made for it may stay, and if the kernel was killed a hidden one named `.actbox-*`.
    """

    @abstractmethod
    def check_connected(self) -> None:
        """Raises `StateError` unless transfers can be submitted."""

    @abstractmethod
    async def carry_out(self, transfer: Transfer, timeout: float) -> None:
        """Have a transfer carried out behind the cells and transfers submitted before; raises as `Execution.result`."""

    async def upload_file(self, relpath: str, local_path: str | Path, timeout: float = 120) -> None:
        """Copy a file of the host to `relpath`; missing folders above it are made.

        A regular file that is there is replaced at once when everything has arrived, anything else refuses. The owner's
        right to execute is kept; owner, times and other rights are not.

        Raises:
            LocalPathMissing: (a `FileNotFoundError`) there is no such file.
        """
        await self._carry(_Upload(_inside(relpath), on_host(local_path), "file"), timeout)

    async def upload_directory(self, relpath: str, local_path: str | Path, timeout: float = 120) -> list[str]:
        """Copy what is in a folder of the host into the folder `relpath`, which is made when missing.

        Folders are merged, files that are there already are replaced, each at once, when everything has arrived.

        Returns:
            What was left out, being neither a regular file nor a folder: paths below `local_path`, made printable.

        Raises:
            LocalPathMissing: (a `FileNotFoundError`) there is no such folder.
        """
        return await self._carry(_Upload(_inside(relpath), on_host(local_path), "directory"), timeout)

    async def download_file(
        self, relpath: str, local_path: str | Path, timeout: float = 120, *, max_bytes: int = MAX_BYTES
    ) -> None:
        """Copy a file from inside to `local_path`; missing folders above it are made.

        A regular file that is there is replaced at once when everything has arrived, anything else refuses. The file is
        this process's, with the rights that its umask leaves, and executable if it was.

        A file of more than `max_bytes`, 1 GiB by default, is refused.
        """
        await self._carry(_Download(_inside(relpath), on_host(local_path), "file", max_bytes), timeout)

    async def download_directory(
        self,
        relpath: str,
        local_path: str | Path,
        timeout: float = 120,
        *,
        max_bytes: int = MAX_BYTES,
        without: Collection[str] = (),
    ) -> list[str]:
        """Copy what is in a folder inside into the folder `local_path`, which is made when missing.

        Folders are merged, files that are there already are replaced, each at once, when everything has arrived.

        Files of more than `max_bytes` together, 1 GiB by default, are refused. Entries of the folder itself whose names
        are in `without` are not looked at.

        Returns:
            What was left out, being neither a regular file nor a folder: paths below `relpath`, made printable. Of what
            is there this is, as the contents are, the session's own word.
        """
        transfer = _Download(_inside(relpath), on_host(local_path), "directory", max_bytes)
        transfer.request["without"] = [str(name) for name in without]
        return await self._carry(transfer, timeout)

    async def delete_file(self, relpath: str, timeout: float = 120) -> None:
        """Remove a file inside, or whatever else is there but a folder; of a symbolic link the link itself."""
        await self._carry(_Deletion(_inside(relpath)), timeout)

    async def _carry(self, transfer: _Transfer, timeout: float) -> list[str]:
        check_timeout(timeout)
        self.check_connected()
        try:
            await transfer.open()
            try:
                await self.carry_out(transfer, timeout)
            except ActboxError as exc:
                if transfer.failure is not None:
                    raise transfer.failure from exc
                if type(exc) is ExecutionError:
                    reason = exc.value if exc.name == TransferRefused.__name__ else str(exc)
                    raise TransferRefused(transfer.path, legible(reason or "")[:_MAX_REASON]) from None
                raise
            if transfer.failure is None:
                await transfer.settle()
            if transfer.failure is not None:
                raise transfer.failure
            return list(transfer.left_out)
        finally:
            await finish(transfer.close())


class _Transfer:
    """One transfer; see `actbox.execution.Transfer`. The base moves nothing.

    State: `failure`, what went wrong on this side, set once; `left_out`; `_released`, whether it is being ended, and
    `_closed`, whether nobody wants it any more; `_lock`, held while a worker thread has to do with it; `_held`, what
    must be given back.
    """

    def __init__(self, request: dict[str, Any], local: Path) -> None:
        self.request = request
        self.path: str = request["path"]
        self.failure: Exception | None = None
        self.left_out: tuple[str, ...] = ()
        self._as_file = request.get("kind") == "file"
        self._local = local
        self._released = False
        self._closed = False
        self._lock = asyncio.Lock()
        self._held = contextlib.ExitStack()

    async def open(self) -> None:
        """Find what is needed on this side. Raises `LocalPathError`; `close` must follow all the same."""
        with self._failing():
            await in_thread(self._prepare)
        if self.failure is not None:
            raise self.failure

    def _prepare(self) -> None:
        """Called in a worker thread, as are all methods that are not asynchronous and begin with an underscore."""

    async def send(self, send: Send) -> None:
        """See `Transfer`."""

    async def take(self, data: bytes) -> None:  # noqa: ARG002 - nothing should come
        """See `Transfer`."""
        raise ProtocolError("the kernel sent an archive that nobody asked for")

    async def settle(self) -> None:
        """The kernel has done its part; what is wrong on this side yet goes to `failure`."""

    def release(self) -> None:
        """See `Transfer`."""
        self._released = True

    async def close(self) -> None:
        """Give everything back, and undo what was not completed. The kernel may be at it still."""
        async with self._lock:
            self._closed = True
            await in_thread(self._held.close)

    @property
    def is_ending(self) -> bool:
        """Whether no piece has to be sent or kept any more."""
        return self._released or self._closed or self.failure is not None

    @contextlib.contextmanager
    def _failing(self) -> Generator[None]:
        """What goes wrong here is the transfer's failure."""
        try:
            yield
        except (ActboxError, Refused, OSError) as exc:
            self.failure = self._explained(exc)

    def _explained(self, exc: ActboxError | Refused | OSError) -> Exception:
        if isinstance(exc, ActboxError):
            return exc
        if isinstance(exc, Refused):
            return LocalPathError(self._local, exc.reason)
        return LocalPathError(self._local, f"{exc.strerror or exc}; {_remedy(exc)}")


class _Deletion(_Transfer):
    def __init__(self, path: str) -> None:
        super().__init__({"type": "delete", "path": path}, Path())


class _Upload(_Transfer):
    """`_source`, the descriptor of the file or folder."""

    def __init__(self, path: str, local: Path, kind: Kind) -> None:
        super().__init__({"type": "upload", "path": path, "kind": kind}, local)
        self._source = -1

    def _prepare(self) -> None:
        path = os.fsencode(self._local)
        try:
            if self._as_file:
                self._source = places.open_file(None, path)[0]
            else:
                self._source = places.enter(None, path, read=True)
        except FileNotFoundError:
            raise LocalPathMissing(self._local) from None
        except Refused as exc:
            raise LocalPathError(self._local, f"{exc.bare}; pass the path of one") from None
        self._held.callback(os.close, self._source)

    async def send(self, send: Send) -> None:
        left_out: list[str] = []
        pieces = packing.pack_file(self._source) if self._as_file else packing.pack_folder(self._source, left_out)
        with contextlib.closing(pieces):
            while (piece := await self._next(pieces)) is not None:
                await send({"type": "archive"}, piece)
        if self.is_ending:
            return
        self.left_out = tuple(left_out)
        await send({"type": "archive_end"}, b"")

    async def _next(self, pieces: Generator[bytes]) -> bytes | None:
        piece = None
        async with self._lock:
            if not self.is_ending:
                with self._failing():
                    piece = await in_thread(next, pieces, None)
        return None if self.is_ending else piece


class _Download(_Transfer):
    """`_arrival`, where the archive becomes files; `_made`, the folders made for it; `_settled`, whether they stay."""

    def __init__(self, path: str, local: Path, kind: Kind, max_bytes: int) -> None:
        super().__init__({"type": "download", "path": path, "kind": kind}, local)
        if type(max_bytes) is not int or max_bytes < 0:
            raise InvalidArgument("max_bytes", max_bytes, "pass a whole number of bytes")
        self._max_bytes = max_bytes
        self._arrival: Arrival | None = None
        self._made: list[Path] = []
        self._settled = False

    def _prepare(self) -> None:
        folder, name = self._local, None
        if self._as_file:
            check_target(self._local)
            # The folder above a file may be reached through links, as any path of the caller's.
            folder, name = self._local.parent.resolve(), os.fsencode(self._local.name)
        self._held.callback(self._unmake)
        self._make(folder)
        try:
            target = places.enter(None, os.fsencode(folder))
        except Refused as exc:
            raise LocalPathError(folder, f"{exc.bare}; pass another path") from None
        self._held.callback(os.close, target)
        self._arrival = Arrival(target, self._max_bytes, name)
        self._held.callback(self._arrival.close)

    def _make(self, folder: Path) -> None:
        missing: list[Path] = []
        while not os.path.lexists(folder):
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                self._made.append(path)

    def _unmake(self) -> None:
        for path in reversed(self._made if not self._settled else []):
            # One in which somebody else has put something stays.
            with contextlib.suppress(OSError):
                path.rmdir()

    async def take(self, data: bytes) -> None:
        async with self._lock:
            if not self.is_ending and self._arrival is not None:
                with self._failing():
                    await in_thread(self._arrival.feed, data)

    async def settle(self) -> None:
        async with self._lock:
            if not self.is_ending and self._arrival is not None:
                with self._failing():
                    await in_thread(self._arrival.settle)
                    self._settled = True

    def _explained(self, exc: ActboxError | Refused | OSError) -> Exception:
        if isinstance(exc, Refused) and not isinstance(exc, InTheWay):
            return TransferRefused(self.path, exc.reason)
        return super()._explained(exc)


def check_target(path: Path) -> None:
    """Raises LocalPathError if a file may not be written to `path`."""
    if path.name in ("", ".."):
        raise LocalPathError(path, "it is a folder; pass the path that the file is to have")
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat().st_mode
        if not stat.S_ISREG(found):
            raise LocalPathError(path, f"it is {places.kind(found)}; pass the path that the file is to have")


def _remedy(exc: OSError) -> str:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room on its disk"
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give this user the right to it, or pass another path"
    return "pass another path"


def _inside(relpath: object) -> str:
    """A path inside that can be asked for."""
    if not isinstance(relpath, str):
        raise InvalidArgument("relpath", relpath, "pass a path as a string")
    try:
        places.split(relpath)
    except Refused as exc:
        raise InvalidArgument("relpath", relpath, exc.reason) from None
    return relpath


def on_host(local_path: object) -> Path:
    """A path on the host that the system can be asked for."""
    if not isinstance(local_path, str | os.PathLike) or not str(cast("object", local_path)):
        raise InvalidArgument("local_path", cast("object", local_path), "pass a path as a string or Path")
    try:
        path = Path(cast("str", local_path))
        encoded = os.fsencode(path)
    except (TypeError, ValueError) as exc:
        raise InvalidArgument("local_path", cast("object", local_path), f"pass a path of this system ({exc})") from None
    if b"\0" in encoded:
        raise InvalidArgument("local_path", str(path), "pass a path without NUL")
    return path

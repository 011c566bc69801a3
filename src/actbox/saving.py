"""A session's state, kept in a file of the host.

What is in the file is the session's own affair: here it is bytes with a checksum, which are never looked into. It is
written beside its place and moved there when it is whole; nothing is written through a link.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from actbox.errors import ActboxError, InvalidArgument, LocalPathError, LocalPathMissing, ProtocolError, StateRefused
from actbox.exchange import PIECE, Exchange, Exchanges
from actbox.guest import places
from actbox.guest.places import Refused
from actbox.protocol import frames
from actbox.protocol.messages import legible
from actbox.shielded import finish, in_thread
from actbox.transfer import check_target, on_host

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

    from actbox.exchange import Send

MAX_BYTES = 1 << 30
VERSION = 1
_MAGIC = b"actbox\0\n"
# What a file begins with: the magic, the format's version, the size of the state and its SHA-256.
_PREAMBLE = struct.Struct(f"!{len(_MAGIC)}sIQ32s")
_MAX_NAMES = 10_001
_MAX_TEXT = 500
_MOST = 1 << 53


@dataclass(frozen=True, slots=True)
class SessionState:
    """What was saved or restored, by the session's own account; texts are made printable.

    `names` are the variables, modules that were imported among them. `left_out` are those that could not be saved, each
    with the reason; after restoring it names "os.getcwd()" if the working folder is not there. `more` counts what was
    left out beyond the 500 that are told.
    """

    names: tuple[str, ...]
    left_out: Mapping[str, str]
    more: int = 0


class Saving(Exchanges):
    """The methods of clients that save and restore a session's state. Each is an execution, in its turn.

    `timeout` is in seconds, the time behind cells submitted before included. Each method raises:
        InvalidArgument: an argument that cannot be used; nothing was done.
        StateError: the client is not connected.
        LocalPathError: the file cannot be read or written.
        StateRefused: the state is larger than allowed, or the file is none that this session can take; nothing has
            changed.
        ExecutionTimeout, ExecutionInterrupted, KernelDied, ExecutionLost, ProtocolError, LimitExceeded: as for a cell.
    """

    async def save(self, path: str | Path, timeout: float = 120, *, max_bytes: int = MAX_BYTES) -> SessionState:
        """Write the session's variables, imports and working folder to a file of the host.

        Functions and classes that cells defined are among them if cloudpickle is installed inside. A regular file that
        is there is replaced at once when all has arrived; anything else refuses. Only the user may read the file.

        Args:
            path: of the file.
            timeout: see the class.
            max_bytes: a larger state is refused; 1 GiB by default.
        """
        if type(max_bytes) is not int or not 0 <= max_bytes < _MOST:
            raise InvalidArgument("max_bytes", max_bytes, "pass a whole number of bytes")
        return await self._keep(_Saved(on_host(path), max_bytes), timeout)

    async def restore(self, path: str | Path, timeout: float = 120) -> SessionState:
        """Bring back what `save` has written, into a fresh session or one at work.

        Variables of the same names are replaced, others stay. The session unpickles the file, within its boundary: code
        that a file holds is code in that session, so restore only files into sessions that may run it.

        Raises:
            LocalPathMissing: (a `FileNotFoundError`) there is no such file.
        """
        return await self._keep(_Restored(on_host(path)), timeout)

    async def _keep(self, kept: _Kept, timeout: float) -> SessionState:
        self.check_connected()
        try:
            await kept.open()
            await self.exchange(kept, timeout)
            told = _read(kept.head)
            await kept.settle()
            return told
        finally:
            await finish(kept.close())


class _Kept(Exchange):
    """A state on its way; `_held` is what must be given back, `_lock` is held while a thread has to do with it."""

    def __init__(self, request: dict[str, Any], path: Path) -> None:
        super().__init__(request)
        self.path = path
        self._held = contextlib.ExitStack()
        self._lock = asyncio.Lock()

    def refusal(self, name: str, reason: str) -> ActboxError:
        return StateRefused(self.path, reason if name == StateRefused.__name__ else f"{name}: {reason}")

    async def open(self) -> None:
        """Find what is needed on this side. Raises what `save` and `restore` say."""
        with self._failing():
            await in_thread(self.prepare)
        if self.failure is not None:
            raise self.failure

    def prepare(self) -> None:
        """Called in a worker thread."""

    async def settle(self) -> None:
        """The kernel has done its part."""

    async def close(self) -> None:
        """Give everything back, and undo what was not completed."""
        async with self._lock:
            self.released = True
            await in_thread(self._held.close)

    @contextlib.contextmanager
    def _failing(self) -> Generator[None]:
        """What goes wrong here is the request's failure."""
        try:
            yield
        except ActboxError as exc:
            self.failure = exc
        except Refused as exc:
            self.failure = LocalPathError(self.path, f"{exc.bare}; pass another path")
        except OSError as exc:
            self.failure = LocalPathError(self.path, f"{exc.strerror or exc}; pass another path")


class _Saved(_Kept):
    """`_file`, the new one, in `_folder` and called `_name` until it is whole; `_size` and `_digest` of it so far."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__({"type": "save", "max_bytes": max_bytes}, path)
        self._max_bytes = max_bytes
        self._file = self._folder = -1
        self._name = f".actbox-{secrets.token_hex(8)}"
        self._size = 0
        self._digest = hashlib.sha256()

    def prepare(self) -> None:
        check_target(self.path)
        # The folder may be reached through links, as any path of the caller's.
        self._folder = places.enter(None, os.fsencode(self.path.parent.resolve()))
        self._held.callback(os.close, self._folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self._name, flags, 0o600, dir_fd=self._folder)
        self._held.callback(self._remove)
        self._held.callback(os.close, self._file)
        _write(self._file, bytes(_PREAMBLE.size))

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._folder)

    async def take_body(self, data: bytes) -> None:
        if self._size + len(data) > self._max_bytes:
            raise ProtocolError("the kernel sent more than it was asked for")
        self._size += len(data)
        async with self._lock:
            if not self.released:
                with self._failing():
                    await in_thread(self._add, data)

    def _add(self, data: bytes) -> None:
        self._digest.update(data)
        _write(self._file, data)

    async def settle(self) -> None:
        async with self._lock:
            with self._failing():
                await in_thread(self._complete)
        if self.failure is not None:
            raise self.failure

    def _complete(self) -> None:
        os.pwrite(self._file, _PREAMBLE.pack(_MAGIC, VERSION, self._size, self._digest.digest()), 0)
        os.fsync(self._file)
        check_target(self.path)
        os.rename(self._name, self.path.name, src_dir_fd=self._folder, dst_dir_fd=self._folder)


class _Restored(_Kept):
    """`_file`, the file, and `_size`, the bytes of the state in it."""

    def __init__(self, path: Path) -> None:
        super().__init__({"type": "restore"}, path)
        self._file = -1
        self._size = 0

    def prepare(self) -> None:
        try:
            self._file = places.open_file(None, os.fsencode(self.path))[0]
        except FileNotFoundError:
            raise LocalPathMissing(self.path) from None
        self._held.callback(os.close, self._file)
        begin = os.pread(self._file, _PREAMBLE.size, 0)
        if len(begin) < _PREAMBLE.size or not begin.startswith(_MAGIC):
            raise StateRefused(self.path, "it is no file that save() has written")
        _, version, self._size, digest = _PREAMBLE.unpack(begin)
        if version != VERSION:
            raise StateRefused(self.path, f"it is of version {version} of the format, and this actbox reads {VERSION}")
        if os.fstat(self._file).st_size != _PREAMBLE.size + self._size:
            raise StateRefused(self.path, "it is corrupt: its size is not what was written")
        found = hashlib.sha256()
        for start in range(0, self._size, PIECE):
            found.update(self._piece(start))
        if found.digest() != digest:
            raise StateRefused(self.path, "it is corrupt: its checksum is not that of what was written")

    def _piece(self, start: int) -> bytes:
        return os.pread(self._file, min(PIECE, self._size - start), _PREAMBLE.size + start)

    async def send(self, send: Send) -> None:
        for start in range(0, self._size, PIECE):
            piece = b""
            async with self._lock:
                if not self.released:
                    with self._failing():
                        piece = await in_thread(self._piece, start)
            if self.released or self.failure is not None:
                return
            await send({"type": "archive"}, piece)
        await send({"type": "archive_end"}, b"")


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _read(head: bytes) -> SessionState:
    """What the guest has told. Raises `ProtocolError`."""
    try:
        told = frames.parse_header(head)
    except frames.FrameError as exc:
        raise ProtocolError("the kernel told of a state in no JSON") from exc
    match told:
        case {"names": [*names], "left_out": dict(), "more": int(more)} if len(names) <= _MAX_NAMES:
            pairs = cast("dict[str, Any]", told["left_out"]).items()
            if all(type(text) is str for text in (*names, *dict(pairs).values())) and 0 <= more < _MOST:
                return SessionState(
                    tuple(legible(name) for name in cast("list[str]", names)),
                    {legible(name)[:_MAX_TEXT]: legible(reason)[:_MAX_TEXT] for name, reason in pairs},
                    more,
                )
        case _:
            pass
    raise ProtocolError("the kernel told of a state without names and reasons")

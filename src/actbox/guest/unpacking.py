"""A tar stream of anybody's making becomes files and folders; shared by both sides, see `places`.

The stream is read as it comes, header by header, and whatever is no plain regular file or folder below its own root is
refused before a byte of it is kept. What arrives is unpacked into a hidden folder that nobody else knows of, and only
when it is complete moved to where it belongs.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
from typing import TYPE_CHECKING

from . import places
from .places import Refused, kind

if TYPE_CHECKING:
    from collections.abc import Generator

    # Yields whenever it needs another piece.
    Steps = Generator[None, None, bytes]

# Bytes of a member's extended header; it holds a path, of which no system takes more than 4 KiB.
MAX_EXTENDED = 64 << 10
_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RECORD = re.compile(rb"([0-9]{1,5}) ([^=\n\0]{1,200})=")
_SIZE = re.compile(rb"[0-9]{1,19}")
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


class InTheWay(Refused):
    """What has arrived cannot take its place, as something else is there."""


class Unpacker:
    """Makes files and folders of an archive that is fed to it piece by piece.

    Members are regular files and folders, each below a folder that came before it, none twice; names, depth, number and
    the sum of the sizes have bounds. Files are readable by all, and executable if the owner's bit says so, as far as
    the umask lets them be.

    Args:
        folder: a descriptor of an empty folder, which stays the caller's.
        max_bytes: of all files together, or None.
        only: the archive holds one regular file, which gets this name.

    State: `_steps`, the reading, which waits for the next piece; `_piece`, what of the last one was not read yet;
    `_above`, the folders from the root to that of the last member, with their descriptors; `_entries` and `_bytes`,
    how many were read; `_done`, whether the end was.
    """

    def __init__(self, folder: int, max_bytes: int | None = None, only: bytes | None = None) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._only = only
        self._piece = memoryview(b"")
        self._above: list[tuple[bytes, int]] = []
        self._entries = 0
        self._bytes = 0
        self._done = False
        self._steps = self._read()
        next(self._steps)

    def feed(self, data: bytes) -> None:
        """Take in the next piece of the archive; blocks on the disk.

        Raises:
            Refused: it is no such archive; what was made of it so far is for the caller to remove.
            OSError: the disk is full, or the like.
        """
        if data:
            self._piece = memoryview(data)
            try:
                next(self._steps)
            except StopIteration:
                raise Refused("the archive does not end where it should") from None

    def finish(self) -> None:
        """The archive has ended.

        Raises:
            Refused: it had not, by its own account.
        """
        if not self._done:
            raise Refused("the archive ends too early")
        if self._only is not None and self._entries == 0:
            raise Refused("the archive is empty")

    def close(self) -> None:
        """Close what is open; must not be called while `feed` runs."""
        self._steps.close()
        self._leave(0)

    # -- the stream ----------------------------------------------------------------------------------------------

    def _some(self, limit: int) -> Generator[None, None, memoryview]:
        while not self._piece:
            yield
        data, self._piece = self._piece[:limit], self._piece[limit:]
        return data

    def _exactly(self, size: int) -> Steps:
        data = bytearray()
        while len(data) < size:
            data += yield from self._some(size - len(data))
        return bytes(data)

    def _read(self) -> Generator[None, None, None]:
        while (block := (yield from self._exactly(_BLOCK))) != _ZEROS:
            info = _parse(block)
            path, size = info.name.encode("utf-8", "surrogateescape"), info.size
            if info.type == tarfile.XHDTYPE:
                if not 0 <= size <= MAX_EXTENDED:
                    raise Refused(f"a member has an extended header of {size} bytes")
                records = _records((yield from self._exactly(size + -size % _BLOCK))[:size])
                info = _parse((yield from self._exactly(_BLOCK)))
                path = records.get(b"path", info.name.encode("utf-8", "surrogateescape"))
                size = int(records[b"size"]) if b"size" in records else info.size
            yield from self._member(info, path, size)
        if (yield from self._exactly(_BLOCK)) != _ZEROS:
            raise Refused("the archive's end is malformed")
        self._done = True
        while not self._piece:
            yield

    # -- its members ---------------------------------------------------------------------------------------------

    def _member(self, info: tarfile.TarInfo, path: bytes, size: int) -> Generator[None, None, None]:
        shown = path[: places.MAX_NAME]
        self._entries += 1
        if self._entries > (1 if self._only is not None else places.MAX_ENTRIES):
            raise Refused("there are too many members in the archive", shown)
        if info.type not in (*_REGULAR, tarfile.DIRTYPE):
            raise Refused(f"it is {_type(info.type)}, neither a regular file nor a folder", shown)
        is_folder = info.type == tarfile.DIRTYPE
        if size < 0 or (is_folder and size):
            raise Refused(f"its size of {size} bytes is impossible", shown)
        self._bytes += size
        if self._max_bytes is not None and self._bytes > self._max_bytes:
            raise Refused(f"with it there are {self._bytes} bytes, more than the {self._max_bytes} allowed", shown)
        parts = _parts(path, is_folder=is_folder)
        if self._only is not None:
            if is_folder:
                raise Refused("it is a folder, not a regular file", shown)
            parts = [self._only]
        above = self._enter(parts[:-1], shown)
        try:
            if is_folder:
                os.mkdir(parts[-1], 0o755, dir_fd=above)
                return
            file = os.open(parts[-1], _NEW_FILE, 0o755 if info.mode & stat.S_IXUSR else 0o644, dir_fd=above)
        except FileExistsError:
            raise Refused("it comes twice", shown) from None
        try:
            yield from self._fill(file, size)
        finally:
            os.close(file)
        yield from self._exactly(-size % _BLOCK)

    def _fill(self, file: int, size: int) -> Generator[None, None, None]:
        while size:
            data = yield from self._some(size)
            size -= len(data)
            while data:
                data = data[os.write(file, data) :]

    def _enter(self, parts: list[bytes], shown: bytes) -> int:
        """The descriptor of the folder that these components name; it stays open for the next member."""
        common = 0
        while common < min(len(parts), len(self._above)) and self._above[common][0] == parts[common]:
            common += 1
        self._leave(common)
        here = self._above[-1][1] if self._above else self._folder
        for part in parts[common:]:
            try:
                here = places.enter(here, part)
            except (Refused, FileNotFoundError):
                raise Refused("it lies in what did not come before it as a folder", shown) from None
            self._above.append((part, here))
        return here

    def _leave(self, depth: int) -> None:
        while len(self._above) > depth:
            os.close(self._above.pop()[1])


class Arrival:
    """An archive on its way into a folder: `feed` it, then `settle`; `close` removes what has not settled.

    It is unpacked into a hidden folder within the folder, as that is surely on the same file system. Then each of its
    files takes its place at once, the one that was there before is replaced; folders are merged. Nothing is moved
    unless everything can be.

    Args:
        folder: a descriptor of the folder, which stays the caller's.
        max_bytes, only: as of `Unpacker`.

    Raises:
        OSError: nothing can be made in the folder.
    """

    def __init__(self, folder: int, max_bytes: int | None = None, only: bytes | None = None) -> None:
        self._folder = folder
        self._name = b".actbox-" + os.urandom(8).hex().encode()
        os.mkdir(self._name, 0o700, dir_fd=folder)
        try:
            self._stage = places.enter(folder, self._name, read=True)
        except BaseException:
            places.remove(folder, self._name)
            raise
        self._unpacker = Unpacker(self._stage, max_bytes, only)

    def feed(self, data: bytes) -> None:
        """See `Unpacker.feed`."""
        self._unpacker.feed(data)

    def settle(self) -> None:
        """Move what has arrived to its place.

        Raises:
            Refused: the archive is not complete; nothing was moved.
            InTheWay: what is in a file's place is no regular file, or in a folder's no folder; nothing was moved.
            OSError: the system refuses a move; some may have been made.
        """
        self._unpacker.finish()
        _merge(self._stage, self._folder, b"", move=False)
        _merge(self._stage, self._folder, b"", move=True)

    def close(self) -> None:
        """Remove what has not settled. Never raises."""
        self._unpacker.close()
        os.close(self._stage)
        places.remove(self._folder, self._name)


def _merge(stage: int, folder: int, prefix: bytes, *, move: bool) -> None:
    """Whether all of `stage` has its place in `folder`, or, with `move`, put it there."""
    for name in places.names(stage):
        new = os.lstat(name, dir_fd=stage).st_mode
        try:
            old = os.lstat(name, dir_fd=folder).st_mode
        except FileNotFoundError:
            old = None
        if old is not None and stat.S_ISDIR(old) and stat.S_ISDIR(new):
            inner = places.enter(stage, name, read=True)
            try:
                outer = places.enter(folder, name)
                try:
                    _merge(inner, outer, prefix + name + b"/", move=move)
                finally:
                    os.close(outer)
            finally:
                os.close(inner)
        elif old is not None and not (stat.S_ISREG(old) and stat.S_ISREG(new)):
            raise InTheWay(f"{kind(old)} is there already, and {kind(new)} cannot take its place", prefix + name)
        elif move:
            os.replace(name, name, src_dir_fd=stage, dst_dir_fd=folder)


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as exc:
        raise Refused(f"the archive has a malformed header ({exc})") from exc


def _records(data: bytes) -> dict[bytes, bytes]:
    """An extended header's records, each `{its length} {keyword}={value}` and a line's end."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(data):
        begin = _RECORD.match(data, start)
        if begin is None:
            raise Refused("a member has a malformed extended header")
        stop = start + int(begin[1])
        keyword, value = begin[2], data[begin.end() : stop - 1]
        if not begin.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n" or keyword in records:
            raise Refused("a member has a malformed extended header")
        if keyword.startswith(b"GNU.sparse") or (keyword == b"size" and not _SIZE.fullmatch(value)):
            raise Refused(f"a member has an extended header with {places.legible(keyword)}")
        records[keyword] = value
        start = stop
    return records


def _parts(path: bytes, *, is_folder: bool) -> list[bytes]:
    """A member's path as its components."""
    shown = path[: places.MAX_NAME]
    parts = (path[:-1] if is_folder and path.endswith(b"/") else path).split(b"/")
    if len(parts) > places.MAX_DEPTH:
        raise Refused(f"it is more than {places.MAX_DEPTH} folders deep", shown)
    for part in parts:
        if part in (b"", b".", b"..") or b"\0" in part or len(part) > places.MAX_NAME:
            raise Refused("its path leads out of the archive, or is none", shown)
    return parts


def _type(type_: bytes) -> str:
    words = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.CHRTYPE: "a device"}
    words |= {tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a named pipe", tarfile.GNUTYPE_SPARSE: "a sparse file"}
    return words.get(type_, f"of type {places.legible(type_)}")

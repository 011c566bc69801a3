"""Files and folders become a tar stream (POSIX pax), piece by piece; shared by both sides, see `places`.

A stream holds names, contents and whether the owner may execute. Owners, times and other rights stay where they are.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from typing import TYPE_CHECKING

from . import places
from .places import Refused

if TYPE_CHECKING:
    from collections.abc import Generator

# Bytes of one piece at the most.
CHUNK = 256 << 10
END = bytes(2 * tarfile.BLOCKSIZE)
# The one member's name where the other side knows better how the file is called.
ALONE = b"file"


def pack_file(file: int) -> Generator[bytes, None, None]:
    """The pieces of an archive of one regular file, whose descriptor stays the caller's.

    Raises:
        Refused: (while iterated) the file shrinks meanwhile.
        OSError: (while iterated) it cannot be read.
    """
    os.lseek(file, 0, os.SEEK_SET)
    return _in_chunks(_file(file, os.fstat(file), ALONE))


def pack_folder(
    folder: int, left_out: list[str], without: frozenset[bytes] = frozenset()
) -> Generator[bytes, None, None]:
    """The pieces of an archive of all in a folder, whose descriptor stays the caller's.

    What is neither a regular file nor a folder goes into `left_out`, as printable text; an entry that vanishes before
    it is reached is as if it had never been there, and so are those entries of the folder itself that are `without`.

    Raises:
        Refused: (while iterated) something cannot be read, changes meanwhile, or is more than the bounds of `places`.
    """
    return _in_chunks(_Walk(left_out, without).blocks(folder, b"", 1))


class _Walk:
    """One walk over a tree; counts entries and collects what is left out."""

    def __init__(self, left_out: list[str], without: frozenset[bytes]) -> None:
        self._left_out = left_out
        self._without = without
        self._room = places.MAX_ENTRIES
        self._left_out_room = places.MAX_LEFT_OUT_TEXT

    def blocks(self, folder: int, prefix: bytes, depth: int) -> Generator[bytes, None, None]:
        names = places.names(folder, self._room)
        self._room -= len(names)
        for name in names:
            if depth == 1 and name in self._without:
                continue
            path = prefix + name
            try:
                found = os.lstat(name, dir_fd=folder).st_mode
                if stat.S_ISDIR(found):
                    opened, status = places.enter(folder, name, read=True), None
                elif stat.S_ISREG(found):
                    opened, status = places.open_file(folder, name)
                else:
                    self._leave_out(path)
                    continue
            except FileNotFoundError:
                continue
            except Refused:
                self._leave_out(path)
                continue
            except OSError as exc:
                raise Refused(exc.strerror or "it cannot be read", path) from exc
            try:
                if status is not None:
                    yield from _file(opened, status, path)
                elif depth == places.MAX_DEPTH:
                    raise Refused(f"it is more than {places.MAX_DEPTH} folders deep", path[-places.MAX_NAME :])
                else:
                    yield _header(path, tarfile.DIRTYPE, 0o755, 0)
                    yield from self.blocks(opened, path + b"/", depth + 1)
            finally:
                os.close(opened)

    def _leave_out(self, path: bytes) -> None:
        name = places.legible(path)
        self._left_out_room -= len(name)
        if len(self._left_out) == places.MAX_LEFT_OUT or self._left_out_room < 0:
            raise Refused(f"more than {len(self._left_out)} entries are neither regular files nor folders")
        self._left_out.append(name)


def _file(file: int, status: os.stat_result, path: bytes) -> Generator[bytes, None, None]:
    left = status.st_size
    yield _header(path, tarfile.REGTYPE, 0o755 if status.st_mode & stat.S_IXUSR else 0o644, left)
    padding = bytes(-left % tarfile.BLOCKSIZE)
    while left:
        data = os.read(file, min(left, CHUNK))
        if not data:
            raise Refused("it became shorter while it was read", path)
        left -= len(data)
        yield data
    yield padding


def _header(path: bytes, type_: bytes, mode: int, size: int) -> bytes:
    info = tarfile.TarInfo(path.decode("utf-8", "surrogateescape"))
    info.type, info.mode, info.size = type_, mode, size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _in_chunks(blocks: Generator[bytes, None, None]) -> Generator[bytes, None, None]:
    """The blocks and the end of the archive, in pieces of CHUNK bytes, the last one of what is left."""
    held = bytearray()
    with contextlib.closing(blocks):
        for block in blocks:
            held += block
            while len(held) >= CHUNK:
                yield bytes(held[:CHUNK])
                del held[:CHUNK]
    held += END
    yield bytes(held[:CHUNK])
    if len(held) > CHUNK:
        yield bytes(held[CHUNK:])

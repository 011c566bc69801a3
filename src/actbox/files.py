"""Where the host opens a path that the guest can write, and where the guest's bytes become files. Nowhere else.

What a guest can write, it can replace by a symbolic link to anything of the host's, between any two of our calls
(CVE-2024-42472 and its kin). So a folder is opened one component at a time, relative to the descriptor of the one above
and never through a link, and a file is created under a name of the host's choice, relative to such a descriptor.

What the bytes claim to be is checked by their first bytes. They are never parsed or decoded here: a PNG of a few bytes
can ask for gigabytes of pixels, and image decoders are what attacks are made for.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import shutil
import stat
import threading
from collections import deque
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from actbox.errors import LocalPathError, WorkspaceError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

__all__ = [
    "ImageFolder",
    "TextFolder",
    "image_extension",
    "looks_like",
    "open_folder",
    "remove_folder",
    "replace_file",
]

# MIME type to (extension, what the file begins with). WebP has its length between the two parts of its mark; SVG is
# text and is looked at apart.
_KINDS: dict[str, tuple[str, re.Pattern[bytes] | None]] = {
    "image/png": (".png", re.compile(rb"\x89PNG\r\n\x1a\n")),
    "image/jpeg": (".jpg", re.compile(rb"\xff\xd8\xff")),
    "image/gif": (".gif", re.compile(rb"GIF8[79]a")),
    "image/webp": (".webp", re.compile(rb"RIFF.{4}WEBP", re.DOTALL)),
    "image/svg+xml": (".svg", None),
    "application/pdf": (".pdf", re.compile(rb"%PDF-")),
}

_XML_SPACE = re.compile(r"[ \t\r\n]*")
_SVG_ROOT = re.compile(r"<svg[ \t\r\n/>]")

# O_PATH, where there is one: to walk through a folder one need not be allowed to list it.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TRIES = 8  # names tried: even the first is taken only if the guest guesses 24 random bits
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def image_extension(mime_type: str) -> str | None:
    """The extension, with its dot, of files of this MIME type; None if the host stores no such files.

    Only the exact, lower-case types without parameters are known.
    """
    kind = _KINDS.get(mime_type)
    return None if kind is None else kind[0]


def looks_like(data: bytes, mime_type: str) -> bool:
    """Whether the data begins like a file of this MIME type. False for a type of which the host stores no files.

    An SVG is UTF-8 throughout, and its first tag after declarations, comments and a DOCTYPE is `<svg`. A DOCTYPE with
    an internal subset is refused: it could define entities, and what plotting libraries write has none.
    """
    if mime_type not in _KINDS:
        return False
    begins = _KINDS[mime_type][1]
    return _looks_like_svg(data) if begins is None else begins.match(data) is not None


def _looks_like_svg(data: bytes) -> bool:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    at = 1 if text.startswith("\ufeff") else 0
    while True:  # each turn goes forward and none looks back, so the time is linear whatever the guest wrote
        at = _XML_SPACE.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess] - it matches nothing, too
        for begin, end in (("<?", "?>"), ("<!--", "-->"), ("<!DOCTYPE", ">")):
            if text.startswith(begin, at):
                ending = text.find(end, at + len(begin))
                if ending < 0 or (begin == "<!DOCTYPE" and text.find("[", at, ending) >= 0):
                    return False
                at = ending + len(end)
                break
        else:
            return _SVG_ROOT.match(text, at) is not None


class ImageFolder:
    """A folder into which the host puts images that come from a guest, each under a name of its own.

    The guest may write the folder too, so nothing in it is trusted, overwritten or followed. `save` blocks on the disk:
    call it in a worker thread. It may be called from several threads at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = itertools.count(1)  # all that changes; `next` is atomic

    def save(self, data: bytes, mime_type: str) -> Path | None:
        """Write the image to a new file named `{UTC date}-{time}-{number}-{6 hex digits}{extension}`, and return it.

        None, and nothing is written, if the MIME type is none of `image_extension` or the data does not begin like
        such a file. The file holds all of the data or is not there.

        Raises:
            WorkspaceError: the folder is missing, a symbolic link, not writable, or the disk is full.
        """
        extension = image_extension(mime_type)
        if extension is None or not looks_like(data, mime_type):
            return None
        with open_folder(self.path) as folder:
            try:
                name, file = _create(folder, self._numbers, extension)
                _fill(folder, name, file, data)
            except OSError as exc:
                remedy = "make it writable for this user" if exc.errno in _FORBIDDEN else "see that its disk has room"
                raise WorkspaceError(self.path, f"no image can be saved here ({exc.strerror}); {remedy}") from exc
        return self.path / name


class TextFolder:
    """A hidden folder in one that a session may write, into which the host puts long texts for the session to read.

    Texts get names of the host's; nothing there is overwritten or followed. The newest are kept, together at most
    `MAX_KEPT` bytes and `MAX_TEXTS` of them; older ones of this object's are removed. `save` blocks on the disk. It may
    be called from several threads at once.

    State: `_kept`, name and size of every file that was written and not removed, the oldest first.
    """

    NAME = ".outputs"
    MAX_KEPT = 32 << 20
    MAX_TEXTS = 100

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = itertools.count(1)
        self._kept: deque[tuple[str, int]] = deque()
        self._lock = threading.Lock()

    def save(self, text: str) -> str:
        """Write the text as UTF-8 to a new file, and return its name within `path`.

        Raises:
            WorkspaceError: the folder is missing, a symbolic link, not writable, or the disk is full.
        """
        data = text.encode("utf-8", "backslashreplace")
        with self._lock, open_folder(self.path, self.NAME, make=True) as folder:
            try:
                name, file = _create(folder, self._numbers, ".txt")
                _fill(folder, name, file, data)
            except OSError as exc:
                remedy = "make it writable for this user" if exc.errno in _FORBIDDEN else "see that its disk has room"
                raise WorkspaceError(self.path, f"no text can be saved here ({exc.strerror}); {remedy}") from exc
            self._kept.append((name, len(data)))
            while len(self._kept) > self.MAX_TEXTS or sum(size for _, size in self._kept) > self.MAX_KEPT:
                with suppress(OSError):  # the session may have removed it
                    os.unlink(self._kept.popleft()[0], dir_fd=folder)
        return f"{self.NAME}/{name}"


def _create(folder: int, numbers: Iterator[int], extension: str) -> tuple[str, int]:
    tries = 0
    while True:
        time = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        name = f"{time}-{next(numbers):04d}-{secrets.token_hex(3)}{extension}"
        try:
            return name, os.open(name, _NEW_FILE, 0o644, dir_fd=folder)
        except FileExistsError:
            tries += 1
            if tries == _TRIES:
                raise


def _fill(folder: int, name: str, file: int, data: bytes) -> None:
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
        finally:
            os.close(file)  # where a full quota is reported late (NFS), it is here
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
        raise


def replace_file(root: Path, below: Sequence[str], name: str, data: bytes) -> None:
    """Write the file `root/below.../name` whole: a new one is made beside it, and takes its place at once.

    Whatever had the name before is replaced, a symbolic link too, but no folder. Blocks on the disk.

    Raises:
        LocalPathError: the folder is missing or reached through a link, or the file cannot be written.
    """
    path = root.joinpath(*below, name)
    try:
        with open_folder(root, *below) as folder:
            new = f".{secrets.token_hex(8)}.part"
            _fill(folder, new, os.open(new, _NEW_FILE, 0o666, dir_fd=folder), data)
            try:
                os.replace(new, name, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                os.unlink(new, dir_fd=folder)
                raise
    except WorkspaceError as exc:
        raise LocalPathError(exc.path, exc.problem) from exc
    except OSError as exc:
        raise LocalPathError(path, f"it cannot be written ({exc.strerror}); pass another path") from exc


@contextmanager
def open_folder(path: Path, *below: str, make: bool = False) -> Generator[int]:
    """A descriptor of the folder `path/below[0]/below[1]/...`, closed at the end of the block.

    `path` may be reached through symbolic links but be none itself; neither may any of `below`. With `make`, folders
    of `below` that are missing are made, with the mode that the umask leaves. The descriptor is for use as `dir_fd`.

    Raises:
        WorkspaceError: a component is missing, a symbolic link, no folder, or out of reach.
    """
    here = path
    folder = _open(here, str(path), None, make=False)
    try:
        for name in below:
            here /= name
            upper, folder = folder, _open(here, name, folder, make=make)
            os.close(upper)
        yield folder
    finally:
        os.close(folder)


def remove_folder(path: Path, *below: str) -> None:
    """Remove the folder `path/below[0]/...` with all that is in it, as far as that can be; no link is followed.

    Raises:
        WorkspaceError: a folder above it is a symbolic link, no folder, or out of reach.
    """
    with open_folder(path, *below[:-1]) as folder, suppress(FileNotFoundError):
        shutil.rmtree(below[-1], dir_fd=folder, onerror=_leave)


def _leave(_what: object, _path: str, _error: object) -> None:
    """What cannot be removed stays."""


def _open(path: Path, name: str, above: int | None, *, make: bool) -> int:
    try:
        if make:
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=above)
        return os.open(name, _FOLDER, dir_fd=above)
    except (OSError, ValueError) as exc:
        raise WorkspaceError(path, _problem(name, above, exc)) from exc


def _problem(name: str, above: int | None, exc: OSError | ValueError) -> str:
    """What is wrong with a folder that could not be opened or made, and what to do about it."""
    if isinstance(exc, FileNotFoundError):
        return "the folder does not exist; make it, or pass another path"
    found = None
    with suppress(OSError, ValueError):
        found = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
    if found is not None and stat.S_ISLNK(found):
        return "it is a symbolic link, which could lead anywhere; put a folder in its place"
    if found is not None and not stat.S_ISDIR(found):
        return "it is not a folder; move it away, or pass another path"
    what = f"the folder cannot be {'made' if found is None else 'opened'}"
    if isinstance(exc, OSError) and exc.errno in _FORBIDDEN:
        what += f" ({exc.strerror}); make {'the one above it' if found is None else 'it'} writable for this user"
    else:
        what += f" ({exc.strerror if isinstance(exc, OSError) else exc})"
    return f"{what}, or pass another path"

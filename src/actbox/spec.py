"""What is asked of a container: frozen, validated values. This module does no I/O and knows no engine."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from actbox.errors import InvalidArgument, InvalidKey

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

DEFAULT_TAG = "default"
APP = PurePosixPath("/app")

# One component of a path that may become a folder on any file system that hosts share.
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_TAG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
# What can name an image: host, port, path, tag and digest. The engine knows the finer grammar.
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:-]{0,254}", re.ASCII)
_RUNTIME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", re.ASCII)
_ENV_NAME = re.compile(r"[^=\0]+")
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*", re.ASCII)
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{name}{n}" for name in ("COM", "LPT") for n in range(1, 10))}
_MAX_ENV = 1 << 20
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one session, the same on every engine; going over ends the cell with `LimitExceeded`.

    Attributes:
        memory: bytes. One process that asks for more private memory (`RLIMIT_DATA`) gets a `MemoryError`; its address
            space (`RLIMIT_AS`) is bounded to four times that. If all processes of the session together hold more, the
            session's kernel is killed: looked at every 0.25 s while it works, every 2 s at the latest. Default 4 GiB.
        cpu: seconds of processor time that one cell may use in all its processes; None for no bound, the default.
        pids: processes and threads at one time (`RLIMIT_NPROC` in the session's own user namespace). Default 256.
        open_files: file descriptors of one process (`RLIMIT_NOFILE`). Default 1024.
        disk: bytes that the session's private folder may hold; what it held before counts. Where the host does not see
            the folder there is none. Default 8 GiB.
        files: files and folders that it may hold. Default 200 000.
        wall: seconds that one cell may take, whatever timeout its caller gives; None for no bound, the default.
        file_size: bytes of any one file written (`RLIMIT_FSIZE`). Default 1 GiB.
        tmp: bytes of `/tmp`, and of `/app` where no workspace is mounted. Default 256 MiB.
        shm: bytes of `/dev/shm`. Default 64 MiB.
        output: bytes of text that a result keeps of one cell, head and tail half each. Default 1 MiB.
        media: bytes of everything else that a result keeps of one cell (images, HTML, JSON). Default 64 MiB.
    """

    memory: int = 4096 * MIB
    cpu: float | None = None
    pids: int = 256
    disk: int = 8192 * MIB
    files: int = 200_000
    wall: float | None = None
    open_files: int = 1024
    file_size: int = 1024 * MIB
    tmp: int = 256 * MIB
    shm: int = 64 * MIB
    output: int = MIB
    media: int = 64 * MIB

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("cpu", "wall"):
                if value is not None and not _is_seconds(value):
                    raise InvalidArgument(f"limits.{entry.name}", value, "pass a positive number of seconds, or None")
                continue
            if type(value) is not int or not _SMALLEST.get(entry.name, 1) <= value < 1 << 62:
                least = _SMALLEST.get(entry.name, 1)
                raise InvalidArgument(f"limits.{entry.name}", value, f"pass a whole number of at least {least}")


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LONGEST


_LONGEST = 1e9
# Below these a Python session cannot even start, or a result cannot say what it left out.
_SMALLEST = {"memory": 256 * MIB, "pids": 8, "open_files": 64, "tmp": MIB, "shm": 4096, "output": 1024, "media": 1024}


@dataclass(frozen=True, slots=True)
class Bind:
    """A host folder shown inside: `source` on the host, `target` inside, read-only or not.

    With `per_key` the folder holds one sub-folder a key, and a session sees its own key's sub-folder alone.
    """

    source: Path
    target: PurePosixPath
    readonly: bool = False
    per_key: bool = False


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container.

    What runs (`tag`, and by which of a Docker engine's runtimes), what is shown (`binds`), what sessions find in
    `os.environ` (`env`).
    """

    tag: str = DEFAULT_TAG
    binds: tuple[Bind, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    limits: Limits = field(default_factory=Limits)
    preload: tuple[str, ...] = ()
    runtime: str | None = None

    def __post_init__(self) -> None:
        check_reference(self.tag)
        if self.runtime is not None and not _RUNTIME.fullmatch(self.runtime):
            raise InvalidArgument("runtime", self.runtime, "pass the name of a runtime of the engine, such as 'runsc'")
        for bind in self.binds:
            if not bind.target.is_relative_to(APP) or bind.target == APP or ".." in bind.target.parts:
                raise InvalidArgument("binds", str(bind.target), "a bind's target is a path below /app")
        # The leaf rule: nothing is ever mounted or created beneath a folder that a session may have written, because
        # the session could have put a symbolic link in the way (GHSA-pxhw-h44j-8pfx in bubblewrap before 0.12).
        targets = sorted(bind.target for bind in self.binds)
        for upper, lower in itertools.pairwise(targets):
            if lower.is_relative_to(upper):
                raise InvalidArgument("binds", str(lower), f"it lies beneath the bind {upper}; binds may not nest")
        size = 0
        for name, value in self.env.items():
            if type(name) is not str or not _ENV_NAME.fullmatch(name) or type(value) is not str or "\0" in value:
                raise InvalidArgument("env", name, "names and values are strings without NUL, names without '='")
            try:
                size += len(name.encode()) + len(value.encode())
            except UnicodeEncodeError:
                raise InvalidArgument("env", name, "names and values must be encodable as UTF-8") from None
        if size > _MAX_ENV:
            raise InvalidArgument("env", f"{size} bytes", f"all variables together may have {_MAX_ENV} bytes")
        for module in self.preload:
            if not _MODULE.fullmatch(module):
                raise InvalidArgument("preload", module, "pass dotted module names")


def check_key(key: object) -> str:
    """The key itself, if it can name a folder anywhere.

    Raises:
        InvalidKey: it is not a string, or outside the grammar.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key) or key.upper() in _RESERVED:
        raise InvalidKey(key)
    return key


def check_tag(tag: object) -> str:
    """The tag itself, if it can name an environment.

    Raises:
        InvalidArgument: it is not a string, or outside the grammar.
    """
    if not isinstance(tag, str) or not _TAG.fullmatch(tag):
        raise InvalidArgument("tag", tag, "a tag is 1 to 64 of a-z, 0-9, '.', '_', '-', and starts with a-z or 0-9")
    return tag


def check_reference(tag: object) -> str:
    """The tag itself, if it can name an environment or an image.

    Raises:
        InvalidArgument: it is not a string, or outside the grammar.
    """
    if not isinstance(tag, str) or not _REFERENCE.fullmatch(tag):
        raise InvalidArgument("tag", tag, "pass the tag of an environment, or the name of an image for engine='docker'")
    return tag


def bind_target(path: str | PurePosixPath) -> PurePosixPath:
    """A bind's place inside: relative paths are below /app.

    Raises:
        InvalidArgument: the path leaves /app or is /app itself.
    """
    target = APP / PurePosixPath(path)
    if "\0" in str(path) or ".." in target.parts or not target.is_relative_to(APP) or target == APP:
        raise InvalidArgument("binds", str(path), "a bind's target is a path below /app")
    return target


def _resolved(source: str) -> Path:
    try:
        return Path(source).resolve()
    except (ValueError, OSError, RuntimeError) as exc:
        raise InvalidArgument("binds", source, f"pass the path of a folder ({exc})") from exc


def make_binds(binds: Mapping[str, str] | None, readonly: Collection[str]) -> tuple[Bind, ...]:
    """Binds from the public arguments: host path to path below /app; `readonly` lists targets.

    Raises:
        InvalidArgument: a target outside /app, or a read-only target that is no bind.
    """
    locked = {bind_target(target) for target in readonly}
    made = tuple(
        Bind(_resolved(source), bind_target(target), readonly=bind_target(target) in locked)
        for source, target in (binds or {}).items()
    )
    unknown = locked - {bind.target for bind in made}
    if unknown:
        raise InvalidArgument("readonly", sorted(map(str, unknown)), "each entry must be the target of a bind")
    return made

"""The contract between a container and what builds its boundary.

An engine starts the guest's supervisor inside a boundary and hands back one connected socket to it. Of sessions, cells
and frames it knows nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from actbox.errors import SandboxUnavailable
    from actbox.spec import ContainerSpec

MATPLOTLIB = "/tmp/.matplotlib"
# The environment that every session starts with, whatever the engine; the host's own never gets in.
VARIABLES = {
    "HOME": "/tmp",
    "USER": "sandbox",
    "LANG": "C.UTF-8",
    "SHELL": "/bin/sh",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "MPLCONFIGDIR": MATPLOTLIB,
    # One pool of two threads serves cells of two cores' worth; more only cost memory in each session.
    "MALLOC_ARENA_MAX": "4",
}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of protection on this machine: whether it is on, what was seen, and what mends it if it is not."""

    name: str
    state: Literal["on", "weaker", "missing"]
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the supervisor must know of the boundary it wakes up in; sent to it as its first datagram.

    `guest_path` is where the guest code lies, `extra_path` what `sys.path` lacks, `seeds` are folders to be copied to
    where a library expects to write its caches, as (from, to); `folders` tells which device and inode must be found at
    the place of each bound folder, as (place, device, inode): a name may have come to mean another one meanwhile.
    """

    guest_path: str
    extra_path: tuple[str, ...]
    seeds: tuple[tuple[str, str], ...]
    folders: tuple[tuple[str, int, int], ...]
    nested: bool


class Boundary(ABC):
    """A running boundary with the supervisor inside.

    `control` is a connected `SOCK_SEQPACKET` unix socket to the supervisor over which descriptors can be passed; it
    belongs to the boundary and is closed by it.
    """

    control: socket.socket
    layout: Layout

    @abstractmethod
    def explanation(self) -> SandboxUnavailable | None:
        """Why it ended by itself before it was ready, as far as its processes said so on their standard error."""

    @abstractmethod
    async def close(self) -> None:
        """End everything inside and wait until it is gone. Bounded in time; may be called again; never raises."""


class Engine(ABC):
    """Builds boundaries on this machine."""

    name: ClassVar[str]

    @abstractmethod
    async def start(
        self, spec: ContainerSpec, *, nested: bool, key: str | None, progress: Callable[[str], None]
    ) -> Boundary:
        """Start a supervisor in a new boundary.

        Args:
            spec: what is asked for.
            nested: True for a container of many sessions, each in namespaces of its own; False for one session alone.
            key: with `nested=False`, the key of that session, whose folder alone is shown.
            progress: told in a line what is being waited for, when that takes long.

        Raises:
            SandboxUnavailable: a layer is missing.
            EnvironmentNotFound: nobody built `spec.tag`, and it cannot be pulled.
            EnvironmentUnusable: no session can run in it.
        """

    @abstractmethod
    async def examine(self) -> list[Layer]:
        """What works on this machine, layer by layer, found out by trying."""

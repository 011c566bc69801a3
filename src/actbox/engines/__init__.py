"""What builds the boundary. Each engine is one file or folder behind the contract in `base`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from actbox.engines.bubblewrap import BubblewrapEngine
from actbox.engines.containers import ContainerInfo, build_image, list_containers, prune_containers
from actbox.engines.environments import build as build_environment
from actbox.engines.environments import known
from actbox.errors import InvalidArgument

if TYPE_CHECKING:
    from actbox.engines.base import Engine

__all__ = [
    "NAMES",
    "ContainerInfo",
    "build_environment",
    "build_image",
    "candidates",
    "known",
    "list_containers",
    "prune_containers",
]

NAMES = ("auto", "bubblewrap", "docker")


def candidates(name: str, runtime: str | None = None) -> tuple[Engine, ...]:
    """The engines to be tried for this name, in order: the first whose boundary stands is used.

    "auto" is `ACTBOX_ENGINE` from the environment; if that is not set either, bubblewrap and then Docker. A `runtime`
    is one of a Docker engine's.

    Raises:
        InvalidArgument: there is no engine of that name, or it has no runtimes.
    """
    chosen = os.environ.get("ACTBOX_ENGINE") or "auto" if name == "auto" else name
    if chosen not in NAMES:
        raise InvalidArgument("engine", chosen, f"the engines are: {', '.join(NAMES)}")
    if runtime is not None:
        if chosen == "bubblewrap":
            raise InvalidArgument("runtime", runtime, "only engine='docker' has runtimes")
        chosen = "docker"
    names = ("bubblewrap", "docker") if chosen == "auto" else (chosen,)
    return tuple(_make(name) for name in names)


def _make(name: str) -> Engine:
    if name == "bubblewrap":
        return BubblewrapEngine()
    # The library behind it takes tenths of a second to import.
    from actbox.engines.docker import DockerEngine  # noqa: PLC0415

    return DockerEngine()

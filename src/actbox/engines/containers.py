"""What can be asked of a Docker engine without starting anything; imports what speaks to it only when asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """A container that actbox made.

    Attributes:
        id: the engine's id, 64 hexadecimal digits.
        tag: the image it was asked for by.
        state: the engine's word: "running", "created", "exited", "dead" and so on.
        owner: "alive": its process runs here; "dead": it was left behind; "unknown": it is another machine's, or
            another pid namespace's, and cannot be asked from here.
        pid: of the process that made it.
        machine: that process's machine, as /etc/machine-id names it.
        age: seconds since it was made.
    """

    id: str
    tag: str
    state: str
    owner: Literal["alive", "dead", "unknown"]
    pid: int
    machine: str
    age: float


async def list_containers() -> list[ContainerInfo]:
    """The containers of the Docker engine that actbox made, the oldest first.

    Raises:
        SandboxUnavailable: no engine answers.
    """
    from actbox.engines.docker import reaper  # noqa: PLC0415 - see the module's text

    return await reaper.list_containers()


async def prune_containers() -> list[ContainerInfo]:
    """Remove the containers, and files, that were left behind by processes which have ended; return the containers.

    A container whose process lives, or cannot be asked from here, is left alone.

    Raises:
        SandboxUnavailable: no engine answers.
    """
    from actbox.engines.docker import reaper  # noqa: PLC0415

    return await reaper.prune_containers()


async def build_image(
    tag: str,
    packages: Sequence[str] = (),
    requirements: Path | None = None,
    base: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Make or replace the image `tag` on the Docker engine, with IPython and what is asked for, its bytecode compiled.

    Args:
        tag: the image's name; "default" for the one that `tag="default"` means on this engine.
        packages: requirement specifiers, or paths of wheels, as `uv pip install` takes them.
        requirements: a requirements file.
        base: an image with CPython >= 3.10, pulled when missing; None for `ACTBOX_DOCKER_BASE`, else the official slim
            image of the running Python's version.
        progress: is handed each line of what happens.

    Raises:
        InvalidArgument: a tag, package or requirements file that cannot be used.
        EnvironmentNotFound: there is no such base.
        EnvironmentBuildError: uv or the engine failed; `detail` holds the last lines.
        SandboxUnavailable: no engine answers.
    """
    from actbox.engines.docker import building  # noqa: PLC0415

    await building.build_image(tag, packages, requirements, base, progress)

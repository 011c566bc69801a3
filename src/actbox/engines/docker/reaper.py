# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Which containers are there, whose they are, and the end of those whose owner is dead."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

import aiodocker
import aiohttp

from actbox.engines.containers import ContainerInfo
from actbox.engines.docker import daemon, owner
from actbox.engines.docker.boundary import remove

if TYPE_CHECKING:
    from aiodocker.containers import DockerContainer

logger = logging.getLogger(__name__)

_BETWEEN = 8  # removals at one time


async def list_containers() -> list[ContainerInfo]:
    """See `containers.list_containers`."""
    async with daemon.reach() as found:
        with daemon.translated("docker"):
            return [info for info, _ in await _ours(found.docker)]


async def prune_containers() -> list[ContainerInfo]:
    """See `containers.prune_containers`."""
    async with daemon.reach() as found:
        with daemon.translated("docker"):
            return await _remove_dead(found.docker)


async def reap(docker: aiodocker.Docker) -> None:
    """Like `prune_containers`, at a start: what cannot be done now is no reason not to start."""
    try:
        removed = await _remove_dead(docker)
    except (aiodocker.DockerError, aiohttp.ClientError, OSError, TimeoutError) as exc:
        logger.warning("containers that were left behind could not be looked for: %s", exc)
        return
    for info in removed:
        logger.info("removed the container %s, left behind by process %d", info.id[:12], info.pid)


async def _remove_dead(docker: aiodocker.Docker) -> list[ContainerInfo]:
    await asyncio.to_thread(owner.sweep)
    dead = [(info, container) for info, container in await _ours(docker) if info.owner == "dead"]
    turn = asyncio.Semaphore(_BETWEEN)

    async def end(container: DockerContainer) -> bool:
        async with turn:
            with contextlib.suppress(aiodocker.DockerError, TimeoutError):
                await remove(container)
                return True
        return False

    gone = await asyncio.gather(*(end(container) for _, container in dead))
    return [info for (info, _), removed in zip(dead, gone, strict=True) if removed]


async def _ours(docker: aiodocker.Docker) -> list[tuple[ContainerInfo, DockerContainer]]:
    filters = f'{{"label":["{owner.LABEL}"]}}'
    containers = await docker.containers.list(all=True, filters=filters)
    found = [(_info(container), container) for container in containers]
    return sorted(((info, container) for info, container in found if info is not None), key=lambda pair: -pair[0].age)


def _info(container: DockerContainer) -> ContainerInfo | None:
    known: dict[str, Any] = container._container  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - what `list` said
    labels: dict[str, str] = known.get("Labels") or {}
    own = owner.owner_of(labels)
    if own is None:
        return None
    created = known.get("Created")
    age = max(0.0, time.time() - created) if isinstance(created, int | float) else 0.0
    return ContainerInfo(
        container.id, labels.get(owner.TAG_LABEL, ""), str(known.get("State")), own.life(), own.pid, own.machine, age
    )

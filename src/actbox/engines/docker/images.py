# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Images: found, pulled when missing, and built from a base with the packages that are asked for."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiodocker
import aiohttp

from actbox.engines.docker import daemon
from actbox.errors import EnvironmentNotFound, SandboxUnavailable
from actbox.spec import DEFAULT_TAG

if TYPE_CHECKING:
    from collections.abc import Callable

    from actbox.engines.docker.daemon import Daemon

# Where "default" lies among the engine's images.
DEFAULT_IMAGE = "actbox-default:latest"
_NOT_FOUND = 404
# A pull that moves nothing for so long has stalled.
_STALL_SECONDS = 120.0
_TELL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Image:
    """An image that the engine has: its id, and the places that it declares as volumes."""

    id: str
    volumes: tuple[str, ...]


def name_of(tag: str) -> str:
    """The engine's name for a tag: an image's name is its own tag, and "default" is ours."""
    return DEFAULT_IMAGE if tag == DEFAULT_TAG else tag


async def ensure(found: Daemon, tag: str, progress: Callable[[str], None]) -> Image:
    """The image of this tag, pulled if the engine lacks it; "default" is built instead.

    Raises:
        EnvironmentNotFound: neither the engine nor the registry has it.
        SandboxUnavailable: the registry cannot be reached, or the pull broke off.
        EnvironmentBuildError: (for "default") it cannot be built.
    """
    image = await look(found, tag)
    if image is None:
        if tag == DEFAULT_TAG:
            from actbox.engines.docker.building import build_default  # noqa: PLC0415 - once for each machine

            await build_default(found, progress)
        else:
            await _pull(found, tag, progress)
        image = await look(found, tag)
    if image is None:
        raise EnvironmentNotFound(tag, await known(found))
    return image


async def look(found: Daemon, tag: str) -> Image | None:
    """The image of this tag, if the engine has it."""
    with daemon.translated("docker"):
        try:
            told: dict[str, Any] = await found.docker.images.inspect(name_of(tag))
        except aiodocker.DockerError as exc:
            if exc.status == _NOT_FOUND:
                return None
            raise
    config: dict[str, Any] = told.get("Config") or {}
    return Image(str(told["Id"]), tuple(sorted(config.get("Volumes") or {})))


async def known(found: Daemon) -> tuple[str, ...]:
    """The names of the engine's images."""
    with daemon.translated("docker"):
        images: list[dict[str, Any]] = await found.docker.images.list()
    names = {name for image in images for name in image.get("RepoTags") or []}
    return tuple(sorted(names - {"<none>:<none>"}))


class _Layers:
    """What a pull has told so far. State: for each layer its status, and the bytes of it that came and that it has."""

    def __init__(self, tag: str, progress: Callable[[str], None]) -> None:
        self._tag = tag
        self._progress = progress
        self._status: dict[str, str] = {}
        self._bytes: dict[str, tuple[int, int]] = {}
        self._told = 0.0

    def take(self, item: dict[str, Any]) -> None:
        """One line of the engine's; tells the caller each layer's steps, and how far it is once a second."""
        layer, status = item.get("id"), str(item.get("status", ""))
        if layer is None or not status or status.startswith("Pulling from"):
            return
        detail: dict[str, Any] = item.get("progressDetail") or {}
        if isinstance(detail.get("total"), int):
            self._bytes[layer] = int(detail.get("current", 0)), int(detail["total"])
        step = self._status.get(layer) != status
        self._status[layer] = status
        now = time.monotonic()
        if step and status in ("Pull complete", "Already exists", "Download complete"):
            self._progress(f"{self._tag}: layer {layer}: {status.lower()} ({self._overall()})")
        elif now - self._told >= _TELL_SECONDS and layer in self._bytes:
            current, total = self._bytes[layer]
            self._told = now
            self._progress(
                f"{self._tag}: layer {layer}: {status.lower()} {current / 1e6:.1f} of {total / 1e6:.1f} MB "
                f"({self._overall()})"
            )

    def _overall(self) -> str:
        ready = sum(status in ("Pull complete", "Already exists") for status in self._status.values())
        return f"{ready} of {len(self._status)} layers"


def _pull_parameters(tag: str) -> dict[str, str]:
    """One image, also where the name says nothing of a version: the engine would take all there are."""
    last = tag.rpartition("/")[2]
    return {"fromImage": tag} if "@" in tag or ":" in last else {"fromImage": tag, "tag": "latest"}


async def _pull(found: Daemon, tag: str, progress: Callable[[str], None]) -> None:
    progress(f"pulling the image {tag}")
    layers = _Layers(tag, progress)
    try:
        # Closed whatever happens: as long as somebody listens the daemon goes on pulling.
        async with aclosing(daemon.told(found.docker, "images/create", _pull_parameters(tag))) as stream:
            while True:
                async with asyncio.timeout(_STALL_SECONDS):
                    item: dict[str, Any] | None = await anext(stream, None)
                if item is None:
                    return
                layers.take(item)
    except aiodocker.DockerError as exc:
        detail = daemon.said(exc)
        if exc.status == _NOT_FOUND or "not found" in detail or "manifest unknown" in detail:
            raise EnvironmentNotFound(tag, await known(found)) from exc
        raise SandboxUnavailable("image", f"{tag}: {detail}", _PULL_REMEDY) from exc
    except TimeoutError as exc:
        detail = f"{tag}: nothing has come for {_STALL_SECONDS:g} s"
        raise SandboxUnavailable("image", detail, _PULL_REMEDY) from exc
    except (aiohttp.ClientError, OSError) as exc:
        raise SandboxUnavailable("image", f"{tag}: {exc}", _PULL_REMEDY) from exc


_PULL_REMEDY = (
    "See that the registry can be reached from the engine (docker pull), or build an image: "
    "actbox build -t NAME --engine docker [--base IMAGE]."
)

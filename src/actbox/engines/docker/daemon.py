# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The engine's daemon: how it is reached, what it is, and its errors in our words.

It is found as the Docker command line finds it: `DOCKER_HOST`, `DOCKER_CONTEXT`, the current context, the usual
sockets; and beyond these the sockets of engines that an ordinary user runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import aiodocker
import aiohttp

from actbox.errors import ActboxError, SandboxUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

_USUAL = ("/run/docker.sock", "/var/run/docker.sock")
ANSWER_SECONDS = 60.0
_CONNECT_SECONDS = 10.0
REMEDY = (
    "Start the Docker engine, let this user reach its socket (group docker), or point DOCKER_HOST at one; "
    "`actbox doctor --engine docker` tells more."
)


@dataclass(frozen=True, slots=True)
class Daemon:
    """An engine that answered.

    Attributes:
        docker: the connection; who opened it closes it.
        url: where it was reached.
        info, version: its own words.
        local: whether it can be expected to see this machine's files and processes.
    """

    docker: aiodocker.Docker
    url: str
    info: dict[str, Any]
    version: dict[str, Any]
    local: bool

    @property
    def rootless(self) -> bool:
        """Whether uid 0 inside is the engine's own, ordinary user outside."""
        return any("rootless" in option for option in self._security)

    @property
    def remaps_users(self) -> bool:
        """Whether uids inside are others outside (dockerd's `--userns-remap`)."""
        return any(option.startswith("name=userns") for option in self._security)

    @property
    def filters_calls(self) -> bool:
        """Whether it can apply a seccomp profile."""
        return any("seccomp" in option for option in self._security)

    @property
    def unbounded(self) -> tuple[str, ...]:
        """What of a container it cannot bound: "memory", "processes"."""
        if self.rootless and str(self.info.get("CgroupVersion") or "1") == "1":
            return ("memory", "processes")
        known = (("memory", "MemoryLimit"), ("processes", "PidsLimit"))
        return tuple(word for word, name in known if self.info.get(name) is False)

    @property
    def is_podman(self) -> bool:
        """Whether it is Podman, which speaks Docker's API too."""
        return any("Podman" in str(part.get("Name")) for part in self.version.get("Components") or [])

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The names of the runtimes that it has."""
        return tuple(self.info.get("Runtimes") or {})

    @property
    def machine(self) -> str:
        """The processors' kind as `os.uname` names it."""
        named = str(self.info.get("Architecture") or os.uname().machine)
        return {"amd64": "x86_64", "arm64": "aarch64"}.get(named, named)

    @property
    def _security(self) -> list[str]:
        return [str(option) for option in self.info.get("SecurityOptions") or []]


@asynccontextmanager
async def reach() -> AsyncGenerator[Daemon]:
    """A connection to the engine, closed at the end of the block.

    Raises:
        SandboxUnavailable: none is found, or it does not answer.
    """
    daemon = await open_daemon()
    try:
        yield daemon
    finally:
        await daemon.docker.close()


async def open_daemon() -> Daemon:
    """Like `reach`, for whoever keeps the connection."""
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=_CONNECT_SECONDS)
    try:
        docker = aiodocker.Docker(_rootless_socket(), timeout=timeout)
    except AssertionError as exc:
        # The library's way to say that it has looked everywhere.
        detail = "there is no Docker engine: DOCKER_HOST is not set, and no socket is at any usual place"
        raise SandboxUnavailable("docker", detail, REMEDY) from exc
    except (ValueError, OSError, ImportError, aiodocker.DockerError) as exc:
        raise SandboxUnavailable("docker", f"the engine cannot be addressed: {exc}", REMEDY) from exc
    try:
        with translated("docker"):
            info, version = await asyncio.gather(docker.system.info(), docker.version())
            return Daemon(docker, _url(docker), dict(info), version, _is_local(docker))
    except BaseException:
        await docker.close()
        raise


def _rootless_socket() -> str | None:
    """The socket of an engine that this user runs, if nothing else is named or there; None for the library's search."""
    if os.environ.get("DOCKER_HOST") or os.environ.get("DOCKER_CONTEXT"):
        return None
    if any(Path(path).is_socket() for path in _USUAL) or (Path.home() / ".docker" / "config.json").exists():
        return None
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    found = [folder / name for name in ("docker.sock", "podman/podman.sock") if (folder / name).is_socket()]
    return f"unix://{found[0]}" if found else None


def _url(docker: aiodocker.Docker) -> str:
    path = getattr(docker.connector, "path", None)
    return f"unix://{path}" if isinstance(path, str) else str(docker.docker_host)


def _is_local(docker: aiodocker.Docker) -> bool:
    """A unix socket on Linux; a virtual machine's (Docker Desktop) turns out when it does not see our files."""
    path = getattr(docker.connector, "path", None)
    if not isinstance(path, str) or not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116
    return False


@contextlib.contextmanager
def translated(layer: str, remedy: str = REMEDY) -> Generator[None]:
    """Turn what the library raises into `SandboxUnavailable`.

    Errors of ours, and cancellation, pass.
    """
    try:
        yield
    except ActboxError:
        raise
    except aiodocker.DockerError as exc:
        raise SandboxUnavailable(layer, said(exc), remedy) from exc
    except TimeoutError as exc:
        raise SandboxUnavailable(layer, "the engine did not answer in time", remedy) from exc
    except (aiohttp.ClientError, OSError) as exc:
        raise SandboxUnavailable(layer, f"the engine cannot be reached: {exc}", remedy) from exc


def said(exc: aiodocker.DockerError) -> str:
    """An error's text, in one line."""
    return " ".join(str(exc.message).split())[:1000]


async def told(
    docker: aiodocker.Docker, path: str, params: dict[str, str], data: IO[bytes] | None = None
) -> AsyncGenerator[dict[str, Any]]:
    """What the engine tells while it works: the lines of its answer to a POST, each a JSON object.

    The library's own streams leave their connection open when they are let go of, and the engine at work.

    Raises:
        aiodocker.DockerError: the engine refuses, or one of its lines is an error.
    """
    headers = {"Content-Type": "application/x-tar" if data is not None else "application/json"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
    response = await docker._do_query(  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - see above
        path, "POST", params=params, data=data, headers=headers, timeout=timeout
    )
    try:
        async for line in response.content:
            if not line.strip():
                continue
            item: dict[str, Any] = json.loads(line)
            if "error" in item:
                raise aiodocker.DockerError(0, str(item["error"]))
            yield item
    except ValueError as exc:
        raise aiodocker.DockerError(0, f"the engine's answer is malformed: {exc}") from exc
    finally:
        response.close()

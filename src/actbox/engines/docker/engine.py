# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The engine "docker": containers of a Docker engine, or of Podman by the same API, on this machine or another.

A container is made from data (`plan`), audited as the engine made it, started, and spoken to over a unix socket in a
bound folder; where the engine does not see this machine's files, over the stream that is attached to it (`tunnel`).
Neither needs a network. Readiness is the guest's first word (`meeting`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import aiodocker

from actbox.engines.base import MATPLOTLIB, Boundary, Engine, Layer, Layout
from actbox.engines.docker import daemon, images, owner, plan, reaper, staging
from actbox.engines.docker.audit import audit
from actbox.engines.docker.boundary import DockerBoundary, remove
from actbox.engines.docker.meeting import FOLDERS_REMEDY, Meeting
from actbox.engines.folders import hold_folders, mark_folders
from actbox.errors import SandboxUnavailable
from actbox.shielded import finish

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from aiodocker.containers import DockerContainer

    from actbox.engines.docker.daemon import Daemon
    from actbox.spec import ContainerSpec

logger = logging.getLogger(__name__)

# Runtimes with a kernel of their own: a unix socket of this machine's cannot be reached through it.
_OWN_KERNELS = ("runsc", "gvisor", "kata")


class _OutOfSight(Exception):
    """The engine does not see this machine's files."""


class DockerEngine(Engine):
    """See the module's text. State: whether the containers of dead owners have been looked for."""

    name: ClassVar[str] = "docker"

    def __init__(self) -> None:
        self._reaped = False

    async def start(
        self, spec: ContainerSpec, *, nested: bool, key: str | None, progress: Callable[[str], None]
    ) -> Boundary:
        """See `Engine.start`."""
        found = await daemon.open_daemon()
        reap, self._reaped = not self._reaped, True
        start = _Start(found, spec, nested=nested, key=key, reap=reap)
        try:
            return await start.run(progress)
        except BaseException:
            await finish(start.undo())
            raise

    async def examine(self) -> list[Layer]:
        """See `Engine.examine`."""
        from actbox.engines.docker.examination import examine  # noqa: PLC0415 - only `doctor` asks

        return await examine()


class _Start:
    """One container on its way up.

    State: `_asked`, whether the engine was asked for it, by `_name`; `_container`, once it is known; `_boundary`, once
    there is one, to which container and connection then belong; `_folder`, the host's folder of its socket and mounts,
    which lives no longer than the start.
    """

    def __init__(self, found: Daemon, spec: ContainerSpec, *, nested: bool, key: str | None, reap: bool) -> None:
        self._found = found
        self._spec = spec
        self._nested = nested
        self._key = key
        self._reap = reap
        # By its name it can be removed though the answer to its creation never came.
        self._name = f"actbox-{secrets.token_hex(12)}"
        self._asked = False
        self._container: DockerContainer | None = None
        self._boundary: DockerBoundary | None = None
        self._folder: Path | None = None

    async def run(self, progress: Callable[[str], None]) -> Boundary:
        found, spec = self._found, self._spec
        _check_engine(found, spec)
        if self._reap:
            image, _ = await asyncio.gather(images.ensure(found, spec.tag, progress), reaper.reap(found.docker))
        else:
            image = await images.ensure(found, spec.tag, progress)
        own_kernel = spec.runtime is not None and any(name in spec.runtime for name in _OWN_KERNELS)
        facts = plan.Facts(
            image=image.id,
            volumes=image.volumes,
            memory=int(found.info.get("MemTotal") or 0),
            swap_limit=bool(found.info.get("SwapLimit")),
            machine=found.machine,
            user=_user(found),
            bounds=_bounds(found),
            userns="host" if found.remaps_users else "",
            seccomp=_takes_profiles(found, own_kernel=own_kernel),
            podman=found.is_podman,
        )
        if found.local and not own_kernel:
            try:
                return await self._run(facts, by_socket=True)
            except _OutOfSight:
                # A unix socket, but another machine's behind it.
                await self._clear_folder()
        return await self._run(facts, by_socket=False)

    async def _run(self, facts: plan.Facts, *, by_socket: bool) -> Boundary:
        folders = plan.folders(self._spec, nested=self._nested, key=self._key)
        named = tuple((folder.place, folder.source) for folder in folders)
        # Another kernel gives numbers of its own to what it shows.
        with hold_folders(named if by_socket else ()) as held, mark_folders(() if by_socket else named) as marks:
            if self._found.local:
                self._folder = _make_folder()
            meeting_place = self._folder / "s" if self._folder is not None and by_socket else None
            made = plan.make_plan(
                facts,
                self._spec,
                await staging.show(folders, int(facts.user.split(":")[0]), self._folder),
                nested=self._nested,
                key=self._key,
                socket_folder=meeting_place,
                profile=self._profile(facts),
                marks=marks,
                resolver=self._resolver(),
                labels=owner.labels(self._spec.tag),
            )
            container = await self._create(made)
            layout = Layout("", (), ((plan.WARM, MATPLOTLIB),), held, self._nested)
            self._boundary = boundary = DockerBoundary(self._found.docker, container, layout)
            meeting = Meeting(boundary, container, self._spec.tag)
            await (meeting.by_stream() if meeting_place is None else meeting.by_socket(meeting_place))
        await self._clear_folder()
        return boundary

    def _profile(self, facts: plan.Facts) -> str | None:
        if facts.seccomp == "none":
            return None
        text = plan.system_calls(facts, nested=self._nested)
        if facts.seccomp == "inline":
            return text
        assert self._folder is not None  # noqa: S101 - "file" is for engines that see our files
        path = self._folder / "profile.json"
        path.write_text(text, "utf-8")
        return str(path)

    def _resolver(self) -> Path | None:
        # Podman heeds no `Dns` where there is no network, and shows the machine's name servers and search domains.
        if not self._found.is_podman or self._folder is None:
            return None
        path = self._folder / "resolv.conf"
        path.write_text("nameserver 127.0.0.1\n", "utf-8")
        path.chmod(0o644)
        return path

    async def _create(self, made: plan.Plan) -> DockerContainer:
        remedy = "`actbox doctor --engine docker` tells what the engine can do."
        with daemon.translated("docker", remedy):
            try:
                self._container = await self._made(dict(made.body))
            except aiodocker.DockerError as exc:
                detail = daemon.said(exc)
                if "bind source path does not exist" in detail or "no such file or directory" in detail:
                    if self._folder is not None and str(self._folder) in detail:
                        raise _OutOfSight from exc
                    raise SandboxUnavailable("folders", detail, FOLDERS_REMEDY) from exc
                raise
            audit(made, await self._container.show(), podman=self._found.is_podman)
        return self._container

    async def _made(self, body: dict[str, Any]) -> DockerContainer:
        """Have the container made, and wait for that even if cancelled: else it would be there later, and unknown."""
        self._asked = True
        making = asyncio.ensure_future(self._found.docker.containers.create(body, name=self._name))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            await asyncio.wait([making], timeout=daemon.ANSWER_SECONDS)
            if making.done() and not making.cancelled() and making.exception() is None:
                self._container = making.result()
            raise

    async def undo(self) -> None:
        """End whatever has been begun."""
        try:
            if self._boundary is not None:
                await self._boundary.close()
                return
            if self._asked:
                container = self._container or self._found.docker.containers.container(self._name)
                with daemon.translated("docker"):
                    await remove(container)
        except SandboxUnavailable:
            # It is labelled: the next start removes it.
            pass
        finally:
            await self._clear_folder()
            await self._found.docker.close()

    async def _clear_folder(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            await asyncio.to_thread(owner.remove_folder, folder)


def _check_engine(found: Daemon, spec: ContainerSpec) -> None:
    kind = found.info.get("OSType")
    if kind not in ("linux", None):
        remedy = "Switch the engine to Linux containers."
        raise SandboxUnavailable("docker", f"the engine runs {kind} containers", remedy)
    if spec.runtime is not None and spec.runtime not in found.runtimes:
        raise SandboxUnavailable(
            "runtime",
            f"the engine has no runtime {spec.runtime!r}, but {', '.join(found.runtimes)}",
            "Install it and name it to the engine (dockerd --add-runtime, or /etc/docker/daemon.json).",
        )


def _takes_profiles(found: Daemon, *, own_kernel: bool) -> Literal["inline", "file", "none"]:
    if own_kernel or not found.filters_calls:
        return "none"
    if not found.is_podman:
        return "inline"
    return "file" if found.local else "none"


def _bounds(found: Daemon) -> bool:
    """Whether the engine can bound a container; sessions are bounded by their own limits in any case."""
    if found.unbounded:
        logger.warning(
            "this engine cannot bound the %s of a container: only the limits inside hold",
            " and the ".join(found.unbounded),
        )
    return not found.unbounded


def _user(found: Daemon) -> str:
    """Whom a container runs as: whoever the workspace's files belong to, and never root of this machine."""
    if found.rootless:
        # Inside, root is the engine's own user, who is an ordinary one outside.
        return "0:0"
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        return f"{staging.NOBODY}:{staging.NOBODY}"
    return f"{os.geteuid()}:{os.getegid()}"


def _make_folder() -> Path:
    folder = owner.make_folder()
    # Nobody else can enter the one above; inside, the user may be another one.
    (folder / "s").mkdir(mode=0o755)
    (folder / "s").chmod(0o755)
    return folder

"""`ExecutionContainer`: an engine's boundary, a supervisor, and a port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from actbox import cgroups, engines, sessions
from actbox.client import ExecutionClient
from actbox.errors import (
    ConnectionError,
    InvalidArgument,
    PortInUse,
    SandboxUnavailable,
    StateError,
    WorkspaceError,
)
from actbox.family import Family
from actbox.gateway import Gateway
from actbox.keeping import Keeper
from actbox.local_session import LocalSession
from actbox.network import Network
from actbox.shielded import finish
from actbox.spec import DEFAULT_TAG, Bind, ContainerSpec, Limits, check_key, make_binds
from actbox.supervision import NestingRefused, Supervision
from actbox.usage import DiskWatch
from actbox.way_out import WayOut

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from types import TracebackType

    from actbox.egress import Record, Resolver
    from actbox.engines.base import Boundary, Engine
    from actbox.lines import Wish
    from actbox.named import Attachment

logger = logging.getLogger(__name__)
egress_logger = logging.getLogger("actbox.egress")

DEFAULT_PRELOAD = ("numpy", "pandas", "matplotlib.pyplot", "matplotlib_inline.backend_inline")
_PACKAGES = "/tmp/.packages"
_KEPT_RECORDS = 1000
WATCHDOG = "rlimits and a watchdog"


class ExecutionContainer:
    """A sandbox that holds any number of sessions, each isolated from the host and from the others.

    Args:
        tag: the environment inside. With bubblewrap, "default" is the one actbox is installed in, others are made by
            `actbox build`. With Docker it is the name of any image with Python >= 3.10 and IPython, pulled when it is
            missing; "default" is built at its first use.
        binds: host folders shown inside, as {host path: path below /app}; made when missing, writable unless listed
            in `readonly`. A session without a key sees all of them.
        env: variables of every session's `os.environ`. Nothing else of the host's environment gets in.
        port: TCP port on 127.0.0.1 where other processes reach this container with its `token`; None for a free one.
        show_pull_progress: say on standard error what is being waited for, when starting takes long.
        engine: "bubblewrap", "docker", or "auto": `ACTBOX_ENGINE` if that is set, else bubblewrap where its boundary
            stands, else Docker.
        limits: bounds on each session.
        network: which hosts sessions may reach, by a proxy on the host that decides about every connection; None for no
            network at all. What a session installs with pip goes to its scratch space, can be imported from the next
            cell on, and ends with the session.
        preload: modules imported once, before sessions are forked; None for numpy, pandas and matplotlib as far as
            the environment has them. A module's threads and open files do not survive the fork.
        readonly: targets of `binds` that may not be written inside.
        runtime: which of a Docker engine's runtimes runs the container, such as "runsc" for gVisor; None for its own
            choice.
        separate: give every session a boundary of its own, not only namespaces of its own within this one. It then
            takes as long to open as a container to start.

    Raises:
        InvalidArgument: an argument that cannot be used; nothing was started.

    State: `_boundary` and `_supervision`, from `run` to `kill` (in a container of separate sandboxes there is none);
    `_gateway`; `_sessions`, the open ones; `_keeper`, of the named ones; `_refusal`, why every session gets a boundary
    of its own, if nobody asked for that; `_engines`, those that may still be tried, one once it stands.
    """

    def __init__(
        self,
        tag: str = DEFAULT_TAG,
        binds: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        show_pull_progress: bool = True,  # noqa: FBT001, FBT002 - the ancestor's signature
        *,
        engine: str = "auto",
        limits: Limits | None = None,
        network: Network | None = None,
        preload: Collection[str] | None = None,
        readonly: Collection[str] = (),
        runtime: str | None = None,
        separate: bool = False,
    ) -> None:
        if network is not None and not isinstance(network, Network):
            raise InvalidArgument("network", network, "pass Network(allow=[...]), or None for no network")
        if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 1 << 16):
            raise InvalidArgument("port", port, "pass a TCP port from 1 to 65535, or None for a free one")
        self._engines: tuple[Engine, ...] = engines.candidates(engine, runtime)
        self._separate_asked = bool(separate)
        self._preload_chosen = preload is not None
        self._spec = ContainerSpec(
            tag=tag,
            binds=self._make_binds(binds, readonly),
            env=dict(env or {}),
            limits=limits or Limits(),
            preload=tuple(DEFAULT_PRELOAD if preload is None else preload),
            runtime=runtime,
        )
        self._network = network
        self._egress: deque[Record] = deque(maxlen=_KEPT_RECORDS)
        self.on_egress: Callable[[Record], None] | None = None
        """Called with the record of each connection that a session tried, when it is over."""
        self.resolver: Resolver | None = None
        """Finds the addresses of names for the sessions opened from now on; None for this machine's own."""
        self._asked_port = port
        self._show_progress = show_pull_progress
        self._token = secrets.token_urlsafe(32)
        self._boundary: Boundary | None = None
        self._supervision: Supervision | None = None
        self._gateway: Gateway | None = None
        self._sessions: set[LocalSession] = set()
        self._keeper = Keeper(self.make_client)
        self._refusal: NestingRefused | None = None
        self._hierarchy: cgroups.Hierarchy | None = None
        self._state = "new"

    def _make_binds(self, binds: Mapping[str, str] | None, readonly: Collection[str]) -> tuple[Bind, ...]:
        return make_binds(binds, readonly)

    async def __aenter__(self) -> Self:
        await self.run()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._spec.tag!r}, {self._state}, {len(self._sessions)} sessions>"

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1.

        Raises:
            StateError: the container is not running.
        """
        return self._running().port

    @property
    def token(self) -> str:
        """What a client in another process must show at `port`."""
        return self._token

    @property
    def limits(self) -> Limits:
        """The bounds on each session."""
        return self._spec.limits

    @property
    def engine(self) -> str:
        """The engine in force.

        Raises:
            StateError: "auto" is only decided when the container runs.
        """
        if len(self._engines) > 1:
            raise StateError(f"this container is {self._state}: its engine is not decided yet")
        return next(engine.name for engine in self._engines)

    @property
    def enforcement(self) -> str:
        """What bounds a session's memory and processes: "cgroup v2", "cgroup v1", or "rlimits and a watchdog".

        The limits of processes and the watchdog are in force in any case.
        """
        return str(self._hierarchy) if self._hierarchy is not None else WATCHDOG

    @property
    def network(self) -> Network | None:
        """Which hosts sessions may reach; None for none."""
        return self._network

    @property
    def egress(self) -> tuple[Record, ...]:
        """The connections that sessions tried, with host, bytes and verdict: the last 1000 that are over.

        Each is also a line of the log "actbox.egress".
        """
        return tuple(self._egress)

    def _note_egress(self, record: Record) -> None:
        self._egress.append(record)
        egress_logger.info("%s", record)
        if self.on_egress is not None:
            self.on_egress(record)

    @property
    def isolation(self) -> str:
        """How sessions are kept apart.

        "nested namespaces", or "one sandbox per session" if that was asked for, or the machine does not let a sandbox
        hold others: then each session starts a sandbox of its own, in about the time of a container start.
        """
        return "one sandbox per session" if self._is_separate else "nested namespaces"

    @property
    def nesting_refusal(self) -> str | None:
        """What the machine refused, where every session gets a sandbox of its own without being asked; else None."""
        return str(self._refusal) if self._refusal else None

    @property
    def _is_separate(self) -> bool:
        return self._separate_asked or self._refusal is not None

    async def run(self) -> None:
        """Start the container.

        Raises:
            SandboxUnavailable: the boundary cannot be built here; names the missing layer. Nothing was run.
            EnvironmentNotFound: nobody built this tag, and no registry has it.
            EnvironmentUnusable: the image lacks what a session needs; says what.
            PortInUse: the port asked for is taken.
            WorkspaceError: a bound folder cannot be used.
            StateError: it was started before.
        """
        if self._state != "new":
            raise StateError(f"this container is {self._state}: make another one")
        self._state = "starting"
        try:
            # Bound first: a port that is taken is known at once, and is held from then on.
            listener = _bind(self._asked_port)
            self._gateway = Gateway(listener, self)
            await asyncio.to_thread(self.prepare_folders)
            await self._start_supervisor()
            await self._gateway.start()
        except BaseException:
            await self.kill()
            raise
        self._state = "running"
        sessions.open_door(self.port, self)

    async def kill(self) -> None:
        """End the container and everything in it. Bounded in time; may be called again."""
        if self._state in ("closed", "closing"):
            return
        self._state = "closing"
        await finish(self._shut_down())

    async def _shut_down(self) -> None:
        try:
            if self._gateway is not None:
                with contextlib.suppress(StateError):
                    sessions.close_door(self._gateway.port, self)
                # While the port is still there, so that attached clients hear of it.
                await self._keeper.close()
                await self._gateway.close()
            for session in list(self._sessions):
                session.container_gone()
            await asyncio.gather(*(session.close() for session in list(self._sessions)), return_exceptions=True)
            if self._supervision is not None:
                self._supervision.stop()
            if self._boundary is not None:
                await self._boundary.close()
        finally:
            self._boundary = self._supervision = None
            self._state = "closed"

    async def warmed(self) -> None:
        """Wait until all is done ahead that can be; sessions opened before that import libraries themselves."""
        self._running()
        if self._supervision is not None:
            await self._supervision.warmed()

    # -- for subclasses ------------------------------------------------------------------------------------------

    def prepare_folders(self) -> None:
        """Make the host folders of the binds that are missing.

        Raises:
            WorkspaceError: one is no folder, or cannot be made.
        """
        for bind in self._spec.binds:
            try:
                Path(bind.source).mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise WorkspaceError(bind.source, f"cannot be made a folder: {exc.strerror}") from exc

    def prepare_key(self, key: str) -> None:
        """Make the host folders of a session's key that are missing."""
        raise InvalidArgument("key", key, "this container has no workspace: use CodeExecutionContainer")

    def make_client(self, key: str | None, recover: bool) -> ExecutionClient:  # noqa: FBT001 - a `Keeper`'s
        """A client for a named session that is kept here; not connected."""
        if key is not None:
            raise InvalidArgument("key", key, "this container has no workspace: use CodeExecutionContainer")
        return ExecutionClient(self.port, recover=recover)

    # -- sessions ------------------------------------------------------------------------------------------------

    async def open_session(self, key: str | None) -> sessions.Session:
        """A session in a fresh kernel; called by clients through the door.

        Raises:
            StateError: the container is not running.
            InvalidKey: the key cannot be used.
            ConnectionError: no kernel could be had.
            SandboxUnavailable: the session's boundary cannot be built.
        """
        if self._state not in ("running", "starting"):
            raise ConnectionError(f"the container is {self._state}")
        if key is not None:
            check_key(key)
            await asyncio.to_thread(self.prepare_key, key)
        if self._is_separate:
            boundary, supervision = await self._start_boundary(self._engines[0], nested=False, key=key)
        else:
            boundary, supervision = None, self._supervision
            if supervision is None:
                raise ConnectionError("the container is gone")
        family = Family(
            self._spec.limits, supervision, boundary, self._disk_watch(key), self._way_out(), self._make_group()
        )
        session = LocalSession(family, 0, self._sessions.add, self._sessions.discard)
        try:
            await session.start(self._session_config(key))
        except BaseException:
            await finish(session.close())
            raise
        return session

    async def attach(self, wish: Wish) -> Attachment:
        """A client's place in a named session; called by `AttachedClient` through the door, or by the gateway."""
        if self._state != "running":
            raise ConnectionError(f"the container is {self._state}")
        return await self._keeper.attach(wish)

    def attached(self, wish: Wish) -> Attachment:
        """The place of a client that is attached; called by the gateway. Raises `SessionGone`, `StateError`."""
        return self._keeper.attached(wish)

    @property
    def kept_sessions(self) -> tuple[str, ...]:
        """The names of the sessions that are kept for `AttachedClient`, with or without one at present."""
        return self._keeper.names

    def _make_group(self) -> cgroups.Group | None:
        """A control group for a session. A Docker engine has its own around the whole container."""
        if self._hierarchy is None:
            return None
        try:
            return cgroups.Group(self._hierarchy, self._spec.limits)
        except OSError as exc:
            logger.warning("no control group can be made for a session: %s", exc)
            return None

    def _way_out(self) -> WayOut | None:
        return None if self._network is None else WayOut(self._network, self._note_egress, self.resolver)

    def _disk_watch(self, key: str | None) -> DiskWatch | None:
        """What watches the size of the session's private folder, if it has one."""
        for bind in self._spec.binds:
            if bind.per_key and not bind.readonly and key is not None:
                return DiskWatch(bind.source, key, self._spec.limits)
        return None

    def _session_config(self, key: str | None) -> dict[str, Any]:
        skills: list[str] = []
        cwd = "/app"
        for bind in self._spec.binds:
            if bind.per_key and key is not None:
                cwd = f"{bind.target}/{key}"
                skills.append(cwd)
            elif not bind.per_key and bind.target.parts[2:3] == ("skills",):
                skills.append(str(bind.target))
        skills.sort(key=lambda path: path == cwd)
        return {
            "key": key,
            "env": dict(self._spec.env),
            "limits": asdict(self._spec.limits),
            "cwd": cwd,
            "skills": skills or ["/app"],
            "packages": None if self._network is None else _PACKAGES,
        }

    async def _start_supervisor(self) -> None:
        """Start what stands first: the engines are tried in order."""
        refused: list[SandboxUnavailable] = []
        for engine in self._engines:
            try:
                await self._start_with(engine)
            except SandboxUnavailable as exc:
                refused.append(exc)
            else:
                self._engines = (engine,)
                if engine.name == "bubblewrap":
                    self._hierarchy = await asyncio.to_thread(_find_hierarchy)
                return
        if len(refused) == 1:
            raise refused[0]
        reasons = "; ".join(
            f"{engine.name}: {exc.layer}: {exc.detail}" for engine, exc in zip(self._engines, refused, strict=True)
        )
        remedies = " Or: ".join(exc.remedy for exc in refused)
        raise SandboxUnavailable("engine", reasons, remedies) from refused[-1]

    async def _start_with(self, engine: Engine) -> None:
        if not self._separate_asked:
            try:
                self._boundary, self._supervision = await self._start_boundary(engine, nested=True, key=None)
            except NestingRefused as exc:
                self._refusal = exc
                logger.warning(
                    "This machine does not let a sandbox hold others (%s): every session gets a sandbox of its own, "
                    "and starts more slowly.",
                    exc,
                )
            else:
                return
        # What cannot be built for a session must be known now, not at its first cell.
        boundary, supervision = await self._start_boundary(engine, nested=False, key=None, probe=True)
        supervision.stop()
        await boundary.close()

    async def _start_boundary(
        self, engine: Engine, *, nested: bool, key: str | None, probe: bool = False
    ) -> tuple[Boundary, Supervision]:
        progress: Callable[[str], None] = _say if self._show_progress else logger.info
        boundary = await engine.start(self._spec, nested=nested, key=key, progress=progress)
        supervision = Supervision(boundary, self._supervisor_gone if nested else _nothing)
        binds = [
            {"target": str(bind.target), "readonly": bind.readonly, "per_key": bind.per_key}
            for bind in self._spec.binds
        ]
        try:
            await supervision.start(binds, () if probe else self._spec.preload, demanded=self._preload_chosen)
        except ConnectionError as exc:
            supervision.stop()
            explanation = boundary.explanation()
            await boundary.close()
            if explanation is not None:
                raise explanation from exc
            raise SandboxUnavailable("supervisor", str(exc), "Run `actbox doctor`.") from exc
        except BaseException:
            supervision.stop()
            await boundary.close()
            raise
        return boundary, supervision

    def _supervisor_gone(self) -> None:
        """The sandbox ended by itself: every session is lost, and no new one can be had."""
        if self._state == "running":
            self._state = "gone"
            if self._gateway is not None:
                sessions.close_door(self._gateway.port, self)

    def _running(self) -> Gateway:
        if self._gateway is None or self._state not in ("running", "gone"):
            raise StateError(f"this container is {self._state}: use `async with`, or await run()")
        return self._gateway


def _find_hierarchy() -> cgroups.Hierarchy | None:
    found = cgroups.find()
    if found is not None:
        cgroups.sweep(found)
    return found


def _bind(port: int | None) -> socket.socket:
    # With its protocol named: else asyncio leaves Nagle's algorithm on for what it accepts, and whatever is said in two
    # frames waits 40 ms for the other side to acknowledge the first.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if port is not None:
            # A port whose last owner has just gone may be taken over; one that is listened on may not.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port or 0))
        listener.listen(64)
    except OSError as exc:
        listener.close()
        raise PortInUse(port or 0, exc.strerror or str(exc)) from exc
    listener.setblocking(False)
    return listener


def _say(line: str) -> None:
    sys.stderr.write(f"actbox: {line}\n")
    sys.stderr.flush()


def _nothing() -> None:
    return

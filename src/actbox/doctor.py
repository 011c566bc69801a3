"""What works on this machine: each layer of the boundary, found out by building it and looking at it from inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actbox import engines
from actbox.client import ExecutionClient
from actbox.container import WATCHDOG, ExecutionContainer
from actbox.engines.base import Layer
from actbox.errors import ActboxError, SandboxUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Layer", "examine"]

# Run as a cell: prints one line a fact, "name<TAB>value".
_LOOK = """
import ctypes, os, socket
with open("/proc/self/status") as file:
    status = dict(line.rstrip("\\n").split(":\\t", 1) for line in file if ":\\t" in line)
def denied(path, flags):
    try:
        os.close(os.open(path, flags, 0o600))
    except OSError as error:
        return type(error).__name__ if error.errno is None else os.strerror(error.errno)
    return "allowed"
def family(number):
    try:
        socket.socket(number, socket.SOCK_STREAM).close()
    except OSError as error:
        return os.strerror(error.errno)
    return "allowed"
with open("/proc/self/uid_map") as file:
    uid_map = file.read().split()
with open("/proc/net/dev") as file:
    interfaces = file.read().splitlines()[2:]
facts = {
    "uid": str(os.getuid()),
    "caps": max(status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")),
    "nnp": status["NoNewPrivs"],
    "seccomp": status["Seccomp"] + "/" + status.get("Seccomp_filters", "?"),
    "uid_map": " ".join(uid_map),
    "processes": str(sum(name.isdigit() for name in os.listdir("/proc"))),
    "write_root": denied("/actbox-probe", os.O_CREAT | os.O_WRONLY),
    "write_dev": denied("/dev/actbox-probe", os.O_CREAT | os.O_WRONLY),
    "interfaces": ",".join(line.split(":")[0].strip() for line in interfaces),
    "vsock": family(40),
    # A file that the mounts let anybody write who is its process; landlock_create_ruleset(2) tells the ABI.
    "write_proc": denied("/proc/self/comm", os.O_WRONLY),
    "landlock": str(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)),
}
for name, value in facts.items():
    print(name, value, sep="\\t")
"""


async def examine(
    engine: str = "auto",
    tag: str = "default",
    progress: Callable[[str], None] | None = None,
    *,
    runtime: str | None = None,
) -> list[Layer]:
    """The layers of the boundary on this machine, by building a container and looking from inside a session.

    Args:
        engine: as of `ExecutionContainer`.
        tag: the environment to run in.
        progress: told in a line what is being tried.
        runtime: as of `ExecutionContainer`.

    Returns:
        What was found, in the order in which it is needed; the first "missing" one explains why there are no more. Of
        "auto", what the engine lacks that is tried first is told as "weaker" if another one was tried after it.

    Raises:
        InvalidArgument: there is no such engine.
    """

    def tell(line: str) -> None:
        if progress is not None:
            progress(line)

    layers: list[Layer] = []
    for candidate in engines.candidates(engine, runtime):
        tell(f"looking at the engine {candidate.name}")
        # What an engine lacks that another one stands in for is no reason to say that nothing can be had.
        layers = [_stood_in_for(layer, candidate.name) for layer in layers]
        found = await candidate.examine()
        if not any(layer.state == "missing" for layer in found):
            tell("building a sandbox")
            found += await _look_inside(candidate.name, tag, runtime, tell)
        layers += found
        if not any(layer.state == "missing" for layer in found):
            break
    return layers


def _stood_in_for(layer: Layer, name: str) -> Layer:
    if layer.state != "missing":
        return layer
    return Layer(layer.name, "weaker", f"{layer.detail} (tried next: {name})", layer.remedy)


async def _look_inside(name: str, tag: str, runtime: str | None, tell: Callable[[str], None]) -> list[Layer]:
    """Build a container, and look around from inside a session."""
    layers: list[Layer] = []
    try:
        async with ExecutionContainer(
            tag, engine=name, preload=(), show_pull_progress=False, runtime=runtime
        ) as container:
            layers += [_nesting(container), _limits(container)]
            tell("looking around from inside a session")
            async with ExecutionClient(container.port) as client:
                result = await client.execute(_LOOK, timeout=30)
            facts = dict(line.split("\t", 1) for line in (result.text or "").splitlines() if "\t" in line)
            layers += _judge(facts, nested=container.nesting_refusal is None)
    except SandboxUnavailable as exc:
        layers.append(Layer(exc.layer, "missing", exc.detail, exc.remedy))
    except ActboxError as exc:
        layers.append(Layer("session", "missing", str(exc)))
    return layers


def _nesting(container: ExecutionContainer) -> Layer:
    if container.isolation == "nested namespaces":
        return Layer("sessions apart", "on", "nested user, pid, mount, net, ipc and uts namespaces for each session")
    return Layer(
        "sessions apart",
        "weaker",
        f"one sandbox per session, slower to start: {container.nesting_refusal}",
        "Allow nested user namespaces; AppArmor profiles (Ubuntu's for bwrap, Docker's own) and gVisor do not.",
    )


def _limits(container: ExecutionContainer) -> Layer:
    if container.enforcement == WATCHDOG:
        return Layer(
            "session limits",
            "weaker",
            f"{WATCHDOG}: what one session takes is measured some times a second, not bounded by the kernel",
            "Name a control group that this user may divide by ACTBOX_CGROUP, or use an engine that has one.",
        )
    return Layer("session limits", "on", f"{container.enforcement}, beside the limits of processes and a watchdog")


def _judge(facts: dict[str, str], *, nested: bool) -> list[Layer]:
    def layer(name: str, detail: str, *, holds: bool) -> Layer:
        return Layer(name, "on" if holds else "missing", detail, "" if holds else "Report this: it should not happen.")

    return [
        layer(
            "unprivileged inside and outside",
            f"uid {facts.get('uid')}, map {facts.get('uid_map')}",
            holds=_is_nobody(facts, nested=nested),
        ),
        layer("no capabilities", facts.get("caps", "?"), holds=facts.get("caps", "?").strip("0") == ""),
        layer("no new privileges", facts.get("nnp", "?"), holds=facts.get("nnp") == "1"),
        layer(
            "system call filter",
            f"mode/filters {facts.get('seccomp')}; vsock: {facts.get('vsock')}",
            holds=facts.get("seccomp", "").startswith("2") and facts.get("vsock") != "allowed",
        ),
        layer(
            "own /proc", f"{facts.get('processes')} processes visible", holds=facts.get("processes") in ("2", "3", "4")
        ),
        layer("no network", f"interfaces: {facts.get('interfaces')}", holds=facts.get("interfaces") == "lo"),
        layer(
            "read-only root and /dev",
            f"{facts.get('write_root')}; {facts.get('write_dev')}",
            holds="allowed" not in (facts.get("write_root"), facts.get("write_dev")),
        ),
        _landlock(facts),
    ]


def _landlock(facts: dict[str, str]) -> Layer:
    """The second layer over the file system, which not every kernel has."""
    offered = facts.get("landlock", "?")
    if facts.get("write_proc") != "allowed":
        return Layer("landlock", "on", f"ABI {offered}; writing to /proc: {facts.get('write_proc')}")
    return Layer(
        "landlock",
        "weaker",
        f"the mounts are the only layer over the file system; ABI offered: {offered if offered != '-1' else 'none'}",
        "Use Linux 5.19 or later with Landlock switched on (lsm=landlock,... on its command line); gVisor has none.",
    )


def _is_nobody(facts: dict[str, str], *, nested: bool) -> bool:
    """Whether a session's user is not root, neither inside nor, as far as can be told from there, outside."""
    try:
        uid = int(facts["uid"])
        inside, outside, size = (int(part) for part in facts["uid_map"].split()[:3])
    except (KeyError, ValueError):
        return False
    # Without nesting, a map of one user is the engine's own: what lies outside it cannot be seen.
    hidden = not nested and size == 1
    return (uid != 0 or hidden) and (outside + uid - inside != 0 or hidden)

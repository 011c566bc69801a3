"""What a Docker engine is, layer by layer, in its own words; for `actbox doctor`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from actbox.engines.base import Layer
from actbox.engines.docker import building, daemon, images
from actbox.errors import SandboxUnavailable
from actbox.spec import DEFAULT_TAG

if TYPE_CHECKING:
    from actbox.engines.docker.daemon import Daemon

# A container's way out through runc, and the versions that have none: the first of each branch, later branches too.
_RUNC_FLAWS = (
    ("CVE-2024-21626", ((1, 1, 12),)),
    ("CVE-2025-31133, CVE-2025-52565 and CVE-2025-52881", ((1, 2, 8), (1, 3, 3), (1, 4, 0))),
)
_CGROUP_REMEDY = "Use a machine with cgroup v2 (systemd's default since 2021), or an engine that root runs."


async def examine() -> list[Layer]:
    """The layers that the engine brings; one that is "missing" says why no container can be had."""
    try:
        async with daemon.reach() as found:
            layers = [_engine(found), *_runc(found), _limits(found), _filter(found), _runtimes(found), _users(found)]
            layers.append(await _image(found))
    except SandboxUnavailable as exc:
        return [Layer(exc.layer, "missing", exc.detail, exc.remedy)]
    return layers


def _engine(found: Daemon) -> Layer:
    name = "Podman" if found.is_podman else "Docker"
    told = f"{name} {found.version.get('Version')} (API {found.version.get('ApiVersion')}) at {found.url}"
    if found.info.get("OSType") not in ("linux", None):
        return Layer("docker", "missing", f"{told} runs no Linux containers", "Switch it to Linux containers.")
    if not found.local:
        return Layer(
            "docker", "on", f"{told}; another machine's, or not a unix socket: spoken to over attached streams"
        )
    return Layer("docker", "on", told)


def _runc(found: Daemon) -> list[Layer]:
    parts: list[dict[str, Any]] = found.version.get("Components") or []
    told = next((str(part.get("Version")) for part in parts if part.get("Name") == "runc"), None)
    if told is None:
        return []
    version = read_version(told)
    flaws = [name for name, mended in _RUNC_FLAWS if version is not None and not is_mended(version, mended)]
    if version is None or not flaws:
        return [Layer("runc", "on", told)]
    detail = f"{told} has known ways out of a container: {'; '.join(flaws)}"
    remedy = (
        "Upgrade runc. Code that runs as an ordinary user without capabilities, in nested namespaces, can hardly use "
        "them; runtime='runsc' does without runc."
    )
    return [Layer("runc", "weaker", detail, remedy)]


def read_version(text: str) -> tuple[int, int, int] | None:
    """The number at the beginning of a version, such as (1, 1, 5) of "1.1.5+ds1-1"."""
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def is_mended(version: tuple[int, int, int], mended: tuple[tuple[int, int, int], ...]) -> bool:
    """Whether a version is at or after the first good one of its branch, or of a later branch than all listed."""
    same = [first for first in mended if first[:2] == version[:2]]
    return version >= same[0] if same else version > mended[-1]


def _limits(found: Daemon) -> Layer:
    info = found.info
    version = str(info.get("CgroupVersion") or "1")
    lacking = found.unbounded
    if lacking:
        detail = (
            f"cgroup v{version}: a container's {' and '.join(lacking)} cannot be bounded; sessions bound themselves"
        )
        return Layer("container limits", "weaker", detail, _CGROUP_REMEDY)
    swap = "" if info.get("SwapLimit") else "; swap cannot be bounded"
    return Layer("container limits", "on", f"cgroup v{version}, {info.get('CgroupDriver')}{swap}")


def _filter(found: Daemon) -> Layer:
    if found.filters_calls:
        return Layer("engine's call filter", "on", "the engine applies our seccomp profile to the whole container")
    detail = "the engine applies no seccomp profile; the guest installs its own"
    return Layer("engine's call filter", "weaker", detail, "Use an engine that was built with seccomp.")


def _runtimes(found: Daemon) -> Layer:
    names = ", ".join(found.runtimes) or "not told"
    gvisor = "gVisor is there: runtime='runsc'" if "runsc" in found.runtimes else "without gVisor (runsc)"
    return Layer("runtimes", "on", f"{names} (default: {found.info.get('DefaultRuntime')}); {gvisor}")


def _users(found: Daemon) -> Layer:
    if found.rootless:
        return Layer("engine's user", "on", "rootless: the engine itself is an ordinary user")
    return Layer("engine's user", "on", "root; containers run as an ordinary user without capabilities")


async def _image(found: Daemon) -> Layer:
    if await images.look(found, DEFAULT_TAG) is not None:
        return Layer("default image", "on", images.DEFAULT_IMAGE)
    return Layer("default image", "on", f"built at its first use, on {building.default_base()}")

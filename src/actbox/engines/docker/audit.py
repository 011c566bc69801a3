# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Is a created container the one that was planned? An engine may leave out, or add, what it was not asked for.

Compared is what `inspect` tells, before the container is started. Podman tells some things in other words; each such
word is listed here, and nothing else passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actbox.errors import SandboxUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from actbox.engines.docker.plan import Plan

# What must be as it was asked for, where it was.
_SAME = (
    "AutoRemove", "Memory", "MemorySwap", "OomScoreAdj", "PidsLimit", "Privileged", "PublishAllPorts", "ReadonlyRootfs",
    "Runtime", "ShmSize", "NetworkMode", "UsernsMode", "CgroupnsMode",
)  # fmt: skip
# What must not be there at all. Podman tells of binds here too; `Mounts` has them all.
_NONE = (
    "CapAdd", "CgroupParent", "ContainerIDFile", "DeviceCgroupRules", "DeviceRequests", "Devices", "ExtraHosts",
    "GroupAdd", "Links", "OomKillDisable", "PortBindings", "Sysctls", "VolumesFrom",
)  # fmt: skip
# Of namespaces that only this container has there are several names. "shareable", Podman's only kind of ipc, is one
# that others may join; who may is the engine's affair.
_OWN = {"PidMode": ("", "private"), "UTSMode": ("", "private"), "IpcMode": ("private", "shareable", "none")}
# Podman lists what it drops of what it would give by default, containers.conf(5).
_DEFAULT_CAPABILITIES = frozenset(
    ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID",
     "SYS_CHROOT")
)  # fmt: skip


def audit(plan: Plan, found: Mapping[str, Any], *, podman: bool) -> None:
    """Compare a created container with its plan.

    Args:
        plan: what was asked for.
        found: the engine's `inspect` of the container.
        podman: whether the engine is Podman.

    Raises:
        SandboxUnavailable: a difference that may weaken the boundary, named.
    """
    for name, value in _differences(plan, found, podman=podman):
        raise SandboxUnavailable(
            "hardened container",
            f"the engine made {name} {str(value)[:200]!r} of what was asked for",
            "Use an engine that honours the options of the Docker Engine API.",
        )


def _differences(plan: Plan, found: Mapping[str, Any], *, podman: bool) -> Iterator[tuple[str, Any]]:
    wanted: Mapping[str, Any] = plan.body["HostConfig"]
    host: Mapping[str, Any] = found.get("HostConfig") or {}
    config: Mapping[str, Any] = found.get("Config") or {}
    for name in _SAME:
        if name in wanted and host.get(name) != wanted[name]:
            yield name, host.get(name)
    for name in _NONE:
        if host.get(name):
            yield name, host.get(name)
    for name, own in _OWN.items():
        if host.get(name) not in own:
            yield name, host.get(name)
    if not _drops_all(host, podman=podman):
        yield "CapDrop", host.get("CapDrop")
    # "unmask" is an order, and no state, of Podman's.
    options = {option for option in wanted["SecurityOpt"] if not option.startswith("unmask=")}
    if set(host.get("SecurityOpt") or []) != options:
        yield "SecurityOpt", host.get("SecurityOpt")
    if not podman and not _masks(wanted, host):
        yield "MaskedPaths", host.get("MaskedPaths")
    for name in ("User", "Entrypoint"):
        if config.get(name) != plan.body[name]:
            yield name, config.get(name)
    networks = (found.get("NetworkSettings") or {}).get("Networks") or {}
    if set(networks) - {"none"}:
        yield "Networks", sorted(networks)
    if not _same_mounts(wanted["Mounts"], wanted["Tmpfs"], found.get("Mounts") or []):
        yield "Mounts", found.get("Mounts")


def _drops_all(host: Mapping[str, Any], *, podman: bool) -> bool:
    dropped = host.get("CapDrop") or []
    if podman:
        return {str(name).removeprefix("CAP_") for name in dropped} >= _DEFAULT_CAPABILITIES
    return dropped == ["ALL"]


def _masks(wanted: Mapping[str, Any], host: Mapping[str, Any]) -> bool:
    if "MaskedPaths" in wanted:
        return host.get("MaskedPaths") == wanted["MaskedPaths"]
    # What is masked by default differs between versions; this never does.
    return "/proc/kcore" in (host.get("MaskedPaths") or []) and "/proc/sys" in (host.get("ReadonlyPaths") or [])


def _same_mounts(wanted: list[dict[str, Any]], tmpfs: Mapping[str, str], found: list[dict[str, Any]]) -> bool:
    """Only the folders asked for, each as writable as asked for; no volume, no engine socket."""
    asked = {mount["Target"]: mount for mount in wanted}
    for mount in found:
        place = mount.get("Destination")
        if mount.get("Type") == "tmpfs" and place in tmpfs:
            continue
        bind = asked.pop(place, None)
        if bind is None or mount.get("Type") != "bind" or mount.get("Source") != bind["Source"]:
            return False
        if bool(mount.get("RW")) is bool(bind["ReadOnly"]):
            return False
    return not asked

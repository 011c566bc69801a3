# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""What a Docker container is made of, as data: decided here without I/O, sent by `engine`, looked after by `audit`.

Everything that affects what a container can see or do lives in this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from actbox.engines.base import VARIABLES
from actbox.engines.docker import boot
from actbox.engines.profile import docker_profile, to_json
from actbox.spec import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from actbox.spec import ContainerSpec

WARM = "/opt/actbox/matplotlib"
NEW_ROOT = "/newroot"
# Of a container of many sessions: what all of them together may have, in sessions that use all they may.
_SESSIONS = 64
_MOST_PIDS = 1 << 15
# The supervisor with its libraries, beside what the sessions use.
_SUPERVISOR_MEMORY = 512 * MIB
_SUPERVISOR_PIDS = 16  # docs/engines.md tells it
_MEMORY_SHARE = 0.75
# Docker's own list, less what lies in /proc: a fresh /proc can be mounted only where the old one is seen whole. Here no
# process is root and none has a capability, and a session sees its fresh one alone.
_MASKED_OUTSIDE_PROC = ("/sys/firmware", "/sys/devices/virtual/powercap")


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found out about the engine and the image.

    Attributes:
        image: the image's id, so that nothing can come between looking at it and using it.
        volumes: places that the image declares as volumes.
        memory: bytes of the engine's machine.
        swap_limit: whether the engine can bound swap.
        machine: the processors' kind as `os.uname` names it.
        bounds: whether the engine can bound a container's memory and processes.
        user: "uid:gid" that everything inside runs as, on the engine's machine.
        userns: Docker's `UsernsMode`; "" for the engine's own.
        seccomp: how the engine takes our system call profile: as text ("inline", Docker), as a file of its machine's
            ("file", Podman), or not at all ("none": it cannot, does not see our files, or its runtime brings a kernel
            of its own). The guest installs its own filter in every case.
        podman: whether it is Podman, which has another word for `MaskedPaths`.
    """

    image: str
    volumes: tuple[str, ...]
    memory: int
    swap_limit: bool
    machine: str
    user: str
    bounds: bool = True
    userns: str = ""
    seccomp: Literal["inline", "file", "none"] = "inline"
    podman: bool = False


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of the host, bound at `place`."""

    place: str
    source: Path
    readonly: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole container: the Engine API's body of `containers/create`, and what an `inspect` of it must show."""

    body: Mapping[str, Any]
    folders: tuple[Folder, ...]


def folders(spec: ContainerSpec, *, nested: bool, key: str | None) -> tuple[Folder, ...]:
    """The binds of a container; see `Engine.start` for `nested` and `key`."""
    found: list[Folder] = []
    for bind in spec.binds:
        source, place = bind.source, str(bind.target)
        if bind.per_key and not nested:
            if key is None:
                continue
            source, place = source / key, f"{place}/{key}"
        found.append(Folder(place, source, bind.readonly))
    return tuple(found)


def make_plan(
    facts: Facts,
    spec: ContainerSpec,
    binds: tuple[Folder, ...],
    *,
    nested: bool,
    key: str | None,
    socket_folder: Path | None,
    profile: str | None,
    marks: tuple[str, ...],
    resolver: Path | None,
    labels: Mapping[str, str],
) -> Plan:
    """The container for a supervisor.

    Args:
        facts: see there.
        spec: what is asked for.
        binds: its folders, as `folders` gives them, with the sources that the engine is to see.
        nested: whether it holds many sessions.
        key: of the one session, otherwise.
        socket_folder: the host's folder in which the control socket lies; None to speak over the attached stream.
        profile: the system call profile as the engine takes it, see `Facts.seccomp`; None for the engine's own.
        marks: files that tell inside that the folders are the right ones.
        resolver: a file to show as /etc/resolv.conf, for an engine that would show the machine's; None for others.
        labels: what tells that the container is ours.
    """
    way: Literal["socket", "stream"] = "stream" if socket_folder is None else "socket"
    mounts = [_mount(folder.source, folder.place, readonly=folder.readonly) for folder in binds]
    if socket_folder is not None:
        mounts.append(_mount(socket_folder, str(PurePosixPath(boot.SOCKET).parent), readonly=True))
    if resolver is not None:
        mounts.append(_mount(resolver, "/etc/resolv.conf", readonly=True))
    body = {
        "Image": facts.image,
        # `-I`: nothing of the image's variables or the working directory is imported before the boundary stands.
        "Entrypoint": ["python3", "-I", "-B", "-c", boot.script(way, marks)],
        "Cmd": [],
        "Env": [f"{name}={value}" for name, value in VARIABLES.items()],
        "User": facts.user,
        "WorkingDir": "/",
        "Hostname": "actbox",
        "Labels": dict(labels),
        "Healthcheck": {"Test": ["NONE"]},
        "AttachStdin": way == "stream",
        "AttachStdout": way == "stream",
        "AttachStderr": True,
        "OpenStdin": way == "stream",
        # When the host's end of the stream goes, so does the container's standard input, and with it the container.
        "StdinOnce": way == "stream",
        "Tty": False,
        "HostConfig": _host_config(facts, spec, mounts, profile, nested=nested, bare=not nested and key is None),
    }
    return Plan(body, binds)


def system_calls(facts: Facts, *, nested: bool) -> str:
    """The profile's JSON for a container of many sessions, or of one."""
    return to_json(docker_profile("outer" if nested else "inner", facts.machine))


def _host_config(
    facts: Facts, spec: ContainerSpec, mounts: list[dict[str, Any]], profile: str | None, *, nested: bool, bare: bool
) -> dict[str, Any]:
    limits = spec.limits
    memory, pids = _bounds(facts, spec, nested=nested)
    security = ["no-new-privileges", *([f"seccomp={profile}"] if profile is not None else [])]
    config: dict[str, Any] = {
        "AutoRemove": True,
        "Privileged": False,
        "CapAdd": [],
        "CapDrop": ["ALL"],
        "SecurityOpt": security,
        "ReadonlyRootfs": True,
        "NetworkMode": "none",
        "PublishAllPorts": False,
        # Otherwise the machine's own name servers and search domains would be told inside, network or not.
        "Dns": ["127.0.0.1"],
        "DnsSearch": ["."],
        "PortBindings": {},
        "IpcMode": "private",
        "PidMode": "",
        "UTSMode": "",
        "UsernsMode": facts.userns,
        "Binds": [],
        "Mounts": mounts,
        "Devices": [],
        "Tmpfs": _tmpfs(facts, spec, nested=nested, bare=bare),
        "ShmSize": limits.shm,
        "OomScoreAdj": 500,
        "Init": False,
        # What is written to the container's own output would fill the engine's disk.
        "LogConfig": {"Type": "none", "Config": {}},
        "RestartPolicy": {"Name": "no"},
    }
    if facts.bounds:
        config |= {"Memory": memory, "PidsLimit": pids}
    if facts.bounds and facts.swap_limit:
        config["MemorySwap"] = memory
    if spec.runtime is not None:
        config["Runtime"] = spec.runtime
    if not facts.podman:
        config["CgroupnsMode"] = "private"
    if nested and facts.podman:
        security.append("unmask=/proc/*")
    elif nested:
        config["MaskedPaths"] = list(_MASKED_OUTSIDE_PROC)
        config["ReadonlyPaths"] = []
    return config


def _bounds(facts: Facts, spec: ContainerSpec, *, nested: bool) -> tuple[int, int]:
    """Bytes of memory and number of processes of a whole container."""
    limits = spec.limits
    if not nested:
        return limits.memory + _SUPERVISOR_MEMORY, limits.pids + _SUPERVISOR_PIDS
    memory = max(limits.memory + _SUPERVISOR_MEMORY, int(facts.memory * _MEMORY_SHARE))
    return memory, min(_SESSIONS * limits.pids, _MOST_PIDS) + _SUPERVISOR_PIDS


def _tmpfs(facts: Facts, spec: ContainerSpec, *, nested: bool, bare: bool) -> dict[str, str]:
    limits = spec.limits
    common = "rw,nosuid,nodev"
    # A volume would be a writable place on the engine's disk that nobody bounds, and all sessions would share it.
    sized = dict.fromkeys(facts.volumes, "ro,nosuid,nodev,noexec,size=64k,mode=0755")
    if nested:
        # Sessions get a /tmp of their own; this one is the supervisor's alone.
        sized["/tmp"] = f"{common},size={64 * MIB},mode=1777"
        sized[NEW_ROOT] = f"{common},size=64k,mode=0755"
        return sized
    sized["/tmp"] = f"{common},exec,size={limits.tmp},mode=1777"
    if bare:
        sized["/app"] = f"{common},exec,size={limits.tmp},mode=1777"
    return sized


def _mount(source: Path, place: str, *, readonly: bool) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": str(source),
        "Target": place,
        "ReadOnly": readonly,
        # What is mounted below the folder was not asked for.
        "BindOptions": {"Propagation": "rprivate", "NonRecursive": True},
    }

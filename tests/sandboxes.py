"""What an engine has made for a program: processes, containers and folders, seen from the host, on every engine.

bubblewrap and all that it starts are descendants of the program. Docker's containers are the daemon's children: there
the labels of a container tell whose it is, and the daemon tells its first process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from actbox.engines.docker import daemon, images, owner

__all__ = [
    "Container",
    "children",
    "containers",
    "descendants",
    "find_docker",
    "folders",
    "image_variables",
    "is_docker",
    "sandboxed",
    "supervisors",
]


@dataclass(frozen=True, slots=True)
class Container:
    """A container of Docker's; `pid` of its first process, 0 if none runs."""

    id: str
    state: str
    pid: int


def children() -> dict[int, list[int]]:
    """The children of every process of this machine."""
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            found.setdefault(int(fields[1]), []).append(int(folder.name))
    return found


def descendants(pid: int) -> set[int]:
    """The processes below one, however deep."""
    below, found, waiting = children(), set[int](), [pid]
    while waiting:
        for child in below.get(waiting.pop(), []):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def sandboxed(pid: int) -> set[int]:
    """The processes that a program has started, and those of its containers."""
    firsts = {container.pid for container in containers(pid)} - {0}
    return descendants(pid).union(firsts, *(descendants(first) for first in firsts))


def supervisors(pid: int) -> set[int]:
    """The first process of each of a program's sandboxes: what bubblewrap, its child, or Docker has started."""
    below = children()
    found = {supervisor for bwrap in below.get(pid, []) for supervisor in below.get(bwrap, [])}
    return found | {container.pid for container in containers(pid)} - {0}


def folders(pid: int) -> list[str]:
    """What a program keeps beside its containers of Docker's while they start."""
    places = ("/run", f"/run/user/{os.geteuid()}", "/tmp")
    names = f"actbox-{owner.this_process().space}-{pid}-*"
    return sorted(str(path) for place in places for path in Path(place).glob(names))


# --- Docker's daemon --------------------------------------------------------------------------------------------------

_found: list[str] = []


async def find_docker() -> None:
    """Look for the daemon as actbox does, once and for all: tests hide it from actbox later."""
    async with daemon.reach() as found:
        _found[:] = [found.url]


def containers(pid: int) -> list[Container]:
    """The containers that a process has made, in whatever state. Without a daemon there are none."""
    if not _found:
        return []
    filters = urllib.parse.quote(json.dumps({"label": [owner.LABEL]}))
    found: list[Container] = []
    here = owner.this_process()
    listing: list[dict[str, Any]] = _ask(f"/containers/json?all=1&filters={filters}") or []
    for listed in listing:
        own = owner.owner_of(listed["Labels"])
        if own is None or (own.machine, own.boot, own.space, own.pid) != (here.machine, here.boot, here.space, pid):
            continue
        told = _ask(f"/containers/{listed['Id']}/json")
        if told is not None:
            state: dict[str, Any] = told["State"]
            found.append(Container(listed["Id"], state["Status"], state["Pid"]))
    return found


def is_docker(address: object) -> bool:
    """Whether a socket's address, of this machine's or of TCP, is the daemon's."""
    if not _found:
        return False
    kind, _, place = _found[0].partition("://")
    if kind == "unix":
        return address == place
    return isinstance(address, tuple) and ":".join(map(str, cast("tuple[object, ...]", address)[:2])) == place


def image_variables() -> set[str]:
    """The names of the variables that the default image sets."""
    told = _ask(f"/images/{images.DEFAULT_IMAGE}/json")
    variables: list[str] = told["Config"]["Env"] or []
    return {variable.partition("=")[0] for variable in variables}


def _ask(path: str) -> Any:
    """What the daemon answers; None if there is no such thing any more."""
    kind, _, place = _found[0].partition("://")
    connection = _Local(place) if kind == "unix" else http.client.HTTPConnection(re.sub("/.*", "", place))
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status == http.HTTPStatus.NOT_FOUND:
            return None
        assert answer.status == http.HTTPStatus.OK, body
        return json.loads(body)


class _Local(http.client.HTTPConnection):
    """A connection to a socket of this machine."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)

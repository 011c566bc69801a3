"""Folders as a container's user may write them, when the host is root.

Nothing inside is ever uid 0 outside, so root's folders could not be written. A writable folder is therefore shown by an
id-mapped mount, on which the owner of the folder is the container's user. The container gets a mount of its own from
that one, so ours is there for as long as the container takes to start, and no longer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from actbox.engines import stage
from actbox.errors import SandboxUnavailable
from actbox.shielded import in_thread

if TYPE_CHECKING:
    from pathlib import Path

    from actbox.engines.docker.plan import Folder

NOBODY = 65534
_SECONDS = 30.0


async def show(folders: tuple[Folder, ...], user: int, below: Path | None) -> tuple[Folder, ...]:
    """The folders with the sources that the engine is to bind.

    Args:
        folders: what the container is to show.
        user: the container's uid outside.
        below: a folder of ours for mounts; None if the engine would not see them.

    Raises:
        SandboxUnavailable: the file system of a folder cannot map users.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or user == 0:
        return folders
    mounts: list[tuple[str, str, list[int]]] = []
    shown: list[Folder] = []
    for folder in folders:
        status = folder.source.stat()
        if folder.readonly or status.st_uid == user:
            shown.append(folder)
            continue
        if below is None:
            detail = f"{folder.source} belongs to uid {status.st_uid}, which no container of root's may be"
            remedy = f"Give it to uid {user} (chown -R {user}:{user} {folder.source}), or run as an ordinary user."
            raise SandboxUnavailable("folders", detail, remedy)
        name = str(len(mounts))
        mounts.append((str(folder.source), name, [status.st_uid, status.st_gid]))
        shown.append(replace(folder, source=below / name))
    if mounts and below is not None:
        # A cancellation waits: who clears up must find all that was mounted.
        await in_thread(_mount, mounts, user, below)
    return tuple(shown)


def _mount(mounts: list[tuple[str, str, list[int]]], user: int, below: Path) -> None:
    fd = os.memfd_create("actbox-stage", 0)
    try:
        work = {"mounts": mounts, "uid": user, "gid": user, "argv": [], "stage": str(below)}
        os.write(fd, json.dumps(work).encode())
        os.lseek(fd, 0, os.SEEK_SET)
        done = subprocess.run(
            [sys.executable, "-I", "-S", stage.__file__, str(fd)],
            pass_fds=(fd,),
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_SECONDS,
        )
    finally:
        os.close(fd)
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()
        found = re.search(r"actbox-stage: ([^:]+): (.*)", said)
        layer, detail = (found[1], found[2]) if found else ("staging", said[-500:])
        raise SandboxUnavailable(layer, detail, "Run as an ordinary user who may reach the engine.")

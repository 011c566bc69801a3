# The library's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Building an image: a base with Python, and on top of it IPython and what is asked for.

The packages are chosen and fetched on the host, by uv, for the base's Python and platform. So the build needs no
network inside, works where the host's index settings and credentials do, and none of these end up in the image.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
import tarfile
import tempfile
import threading
from collections import deque
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import aiodocker
import aiohttp

from actbox.engines import environments
from actbox.engines.docker import boot, daemon, images, owner
from actbox.engines.docker.boundary import STDERR, Output, remove
from actbox.errors import EnvironmentBuildError, InvalidArgument
from actbox.spec import DEFAULT_TAG, check_reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from actbox.engines.docker.daemon import Daemon

DEFAULT_PACKAGES = ("cloudpickle", "numpy", "pandas", "matplotlib")
_QUERY_SECONDS = 60.0
_TAIL = 20
# The steps of glibc for which uv has names; wheels for an older one run on a newer.
_GLIBC = (17, 28, *range(31, 41))
_QUERY = """\
import json, platform, sys, sysconfig
print(json.dumps({"version": sys.version_info[:2], "implementation": sys.implementation.name,
    "machine": platform.machine(), "libc": platform.libc_ver(),
    "packages": sysconfig.get_path("purelib"), "path": sys.path}))
"""
# Run in the build: what a read-only container could never add. Folders of the path that are missing are left out.
_PREPARE = """\
import compileall, importlib.util, os, shutil, sys
for folder in dict.fromkeys(sys.path):
    if os.path.isdir(folder): compileall.compile_dir(folder, quiet=2, workers=0)
os.environ["MPLCONFIGDIR"] = {warm!r}
if shutil.which("python") is None: os.symlink(sys.executable, "/usr/local/bin/python")
if importlib.util.find_spec("matplotlib"):
    os.makedirs({warm!r}, exist_ok=True)
    import matplotlib.font_manager
"""


@dataclass(frozen=True, slots=True)
class _Python:
    """A base's Python: its version, its platform in uv's words, and the folder its packages lie in."""

    version: tuple[int, int]
    platform: str
    packages: str


def default_base() -> str:
    """The base of images: `ACTBOX_DOCKER_BASE`, else the official slim image of the running Python's version."""
    return os.environ.get("ACTBOX_DOCKER_BASE") or "python:{}.{}-slim".format(*sys.version_info[:2])


async def build_image(
    tag: str,
    packages: Sequence[str] = (),
    requirements: Path | None = None,
    base: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """See `containers.build_image`."""
    check_reference(tag)
    if "@" in tag:
        raise InvalidArgument("tag", tag, "an image that is built has a name, not a digest")
    async with daemon.reach() as found:
        await _build(found, tag, packages, requirements, base or default_base(), progress or _ignore)


async def build_default(found: Daemon, progress: Callable[[str], None]) -> None:
    """The image of the tag "default": IPython, cloudpickle, numpy, pandas and matplotlib on `default_base`."""
    progress(f"building the image {images.DEFAULT_IMAGE} (once)")
    await _build(found, DEFAULT_TAG, DEFAULT_PACKAGES, None, default_base(), progress)


async def _build(
    found: Daemon,
    tag: str,
    packages: Sequence[str],
    requirements: Path | None,
    base: str,
    progress: Callable[[str], None],
) -> None:
    image = await images.ensure(found, check_reference(base), progress)
    python = await _describe(found, tag, base, image.id)
    loop = asyncio.get_running_loop()
    left = threading.Event()

    def report(line: str) -> None:
        # In uv's thread: raising ends uv.
        if left.is_set():
            raise _Left
        loop.call_soon_threadsafe(progress, line)

    with tempfile.TemporaryDirectory(prefix="actbox-build-") as name:
        folder = Path(name)
        installing = asyncio.ensure_future(
            asyncio.to_thread(
                environments.install_into,
                folder / "site",
                tag,
                packages,
                requirements,
                version=python.version,
                platform=python.platform,
                progress=report,
            )
        )
        try:
            await asyncio.shield(installing)
        except asyncio.CancelledError:
            left.set()
            # Its folder is about to be removed: uv must be gone before.
            await asyncio.wait([installing])
            raise
        with (folder / "context.tar").open("w+b") as context:
            await asyncio.to_thread(_pack, context, folder / "site", image.id, python)
            context.seek(0)
            before = await images.look(found, tag)
            await _send(found, tag, context, progress)
            await _forget(found, before, await images.look(found, tag))


class _Left(Exception):
    """Whoever asked for the build has left."""


async def _describe(found: Daemon, tag: str, base: str, image: str) -> _Python:
    """What the base's Python says of itself, in a container without any rights."""
    body: dict[str, Any] = {
        "Image": image,
        "Entrypoint": ["python3", "-I", "-c", _QUERY],
        "Cmd": [],
        "User": "65534:65534",
        "Labels": owner.labels(tag),
        "AttachStdout": True,
        "AttachStderr": True,
        "HostConfig": {
            "AutoRemove": True,
            "NetworkMode": "none",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "LogConfig": {"Type": "none", "Config": {}},
        },
    }
    output, errors = bytearray(), Output()
    try:
        async with asyncio.timeout(_QUERY_SECONDS):
            container = await found.docker.containers.create(body)
            try:
                stream = container.attach(stdout=True, stderr=True)
                await stream._init()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - attach before the start
                async with stream:
                    await container.start()
                    while (message := await stream.read_out()) is not None:
                        if message.stream == STDERR:
                            errors.take(message.data)
                        elif len(output) < 1 << 20:
                            output += message.data
            finally:
                await remove(container)
        return _understood(json.loads(output))
    except (aiodocker.DockerError, aiohttp.ClientError, OSError, ValueError, TypeError, KeyError) as exc:
        said = daemon.said(exc) if isinstance(exc, aiodocker.DockerError) else errors.text() or repr(exc)
        raise EnvironmentBuildError(tag, f"the base {base} has no Python that describes itself: {said[-500:]}") from exc


def _understood(told: dict[str, Any]) -> _Python:
    major, minor = (int(part) for part in told["version"])
    if told["implementation"] != "cpython" or (major, minor) < boot.OLDEST:
        raise ValueError(f"it is {told['implementation']} {major}.{minor}; CPython 3.10 or newer is needed")
    libc, libc_version = (str(part) for part in told["libc"])
    machine = str(told["machine"])
    packages = str(told["packages"])
    if packages not in told["path"]:
        # Debian's own scheme puts packages beside the system's.
        packages = next(path for path in reversed(cast("list[str]", told["path"])) if path.endswith("-packages"))
    if libc != "glibc":
        return _Python((major, minor), f"{machine}-unknown-linux-musl", packages)
    found = int(libc_version.split(".")[1])
    step = max((known for known in _GLIBC if known <= found), default=_GLIBC[0])
    return _Python((major, minor), f"{machine}-manylinux_2_{step}", packages)


def _pack(context: io.BufferedRandom, site: Path, base: str, python: _Python) -> None:
    """The build's context: the packages and a Dockerfile. Owners and times are left out, so that equal builds are."""
    from actbox.engines.docker.plan import WARM  # noqa: PLC0415 - with what else is packed

    prepare = ["python3", "-I", "-c", _PREPARE.format(warm=WARM)]
    lines = [f"FROM {base}", "USER 0", f"COPY site/ {python.packages}/"]
    scripts = site / "bin"
    if scripts.is_dir():
        lines.append("COPY bin/ /usr/local/bin/")
    lines += [f"RUN {json.dumps(prepare)}", "LABEL actbox.image=1"]
    with tarfile.open(fileobj=context, mode="w") as archive:
        data = "\n".join(lines).encode()
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
        for path in sorted(site.rglob("*")):
            relative = path.relative_to(site)
            if relative.parts[0] != "bin":
                _add(archive, path, f"site/{relative}")
            elif path.is_file() and len(relative.parts) == 2:  # noqa: PLR2004 - bin/NAME
                _add(archive, path, f"bin/{relative.name}", script=True)


def _add(archive: tarfile.TarFile, path: Path, name: str, *, script: bool = False) -> None:
    entry = archive.gettarinfo(path, name)
    if not (entry.isfile() or entry.isdir()):
        return
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0
    entry.mode = 0o755 if entry.isdir() or script or entry.mode & 0o100 else 0o644
    if not entry.isfile():
        archive.addfile(entry)
        return
    if script:
        # Written for the host's Python.
        data = re.sub(rb"\A#!.*python[^\n]*", b"#!/usr/bin/env python3", path.read_bytes())
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
        return
    with path.open("rb") as file:
        archive.addfile(entry, file)


async def _send(found: Daemon, tag: str, context: io.BufferedRandom, progress: Callable[[str], None]) -> None:
    tail: deque[str] = deque(maxlen=_TAIL)
    try:
        parameters = {"t": images.name_of(tag), "rm": "1", "forcerm": "1"}
        async with aclosing(daemon.told(found.docker, "build", parameters, context)) as stream:
            async for item in stream:
                for line in str(item.get("stream") or item.get("status") or "").splitlines():
                    text = "".join(character for character in line if character.isprintable()).strip()
                    if text:
                        tail.append(text)
                        progress(text)
    except (aiodocker.DockerError, aiohttp.ClientError, OSError) as exc:
        said = daemon.said(exc) if isinstance(exc, aiodocker.DockerError) else str(exc)
        raise EnvironmentBuildError(tag, "\n".join([*tail, said])) from exc


async def _forget(found: Daemon, before: images.Image | None, now: images.Image | None) -> None:
    """Remove the image that was replaced, unless it has another name, or a container runs on it."""
    if before is None or now is None or before.id == now.id:
        return
    with suppress(aiodocker.DockerError):
        told: dict[str, Any] = await found.docker.images.inspect(before.id)
        if not told.get("RepoTags"):
            await found.docker.images.delete(before.id)


def _ignore(line: str) -> None:
    del line

"""ipybox 0.3.2 as a contender: an environment for it, an image for its containers, and a process to drive it.

`python benchmarks/peer_ipybox.py` makes both and prints what a few rounds of the peer alone took. It needs a Docker
daemon with a bridge network, and of the network only PyPI; as root `BRIDGE=1 .ci/docker up` makes the daemon and the
base image.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from rounds import Driver, Round
from uv import find_uv_bin

NAME = "ipybox 0.3.2"
BASE = "actbox-ci/base:1"
_IPYBOX = "ipybox==0.3.2"
_GATEWAY = "jupyter-kernel-gateway==3.0.1"
# The same versions as actbox has in the project's environment; the two before are what ipybox asks for in its image.
_LIBRARIES = tuple(f"{name}=={metadata.version(name)}" for name in ("matplotlib", "numpy", "pandas"))
_INSIDE = (_GATEWAY, "ipykernel>=6.29,<7", *_LIBRARIES)
_FOLDER = Path(__file__).resolve().parent

# ipybox's own image, without conda between the container's start and the server's, which can only make it quicker: the
# same user, port, folder and arguments. `modinfo` is what each of its clients imports first. Nothing is fetched while
# it is built.
_DOCKERFILE = f"""\
FROM {BASE}
COPY site /usr/local/lib/python3.11/dist-packages
RUN ["python3", "-m", "compileall", "-q", "-j", "0", "/usr/local/lib/python3.11/dist-packages"]
COPY --chown=1000:1000 home /home/appuser
COPY modinfo.py /app/ipybox/
ENV HOME=/home/appuser JUPYTER_PATH=/usr/local/lib/python3.11/dist-packages/share/jupyter
USER 1000:1000
WORKDIR /app
EXPOSE 8888
CMD ["python3", "-m", "kernel_gateway", "--KernelGatewayApp.ip=0.0.0.0", "--KernelGatewayApp.port=8888"]
"""


def driver() -> Driver:
    """The peer's process, with what it needs made if it is not there.

    Raises:
        SystemExit: It cannot be made here; the message says what is missing.
    """
    python = _environment()
    return Driver(NAME, [str(python), str(_FOLDER / "driven_ipybox.py"), _image(python)])


def _cache() -> Path:
    """What is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actbox-bench"


def _environment() -> Path:
    """The interpreter of an environment that has ipybox, and nothing of the project's."""
    folder = _cache() / f"{_IPYBOX.replace('==', '-')}-py{sys.version_info.major}.{sys.version_info.minor}"
    if not (folder / "complete").exists():
        _tell(f"installing {_IPYBOX} in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        python = folder / "bin" / "python"
        # The project's own variables would lead uv back to the project's environment.
        run = functools.partial(subprocess.run, check=True, env=_without("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT"))
        run([find_uv_bin(), "venv", "--quiet", "--no-project", "--python", sys.executable, folder])
        run([find_uv_bin(), "pip", "install", "--quiet", "--compile-bytecode", "--python", python, _IPYBOX])
        (folder / "complete").touch()
    return folder / "bin" / "python"


def _image(python: Path) -> str:
    """The name of the image, built if there is none of this recipe on this base."""
    base = _docker("image", "inspect", "--format", "{{.Id}}", BASE)
    if not base:
        raise SystemExit(f"there is no image {BASE}; as root: BRIDGE=1 .ci/docker up")
    if not _docker("network", "inspect", "--format", "{{.Id}}", "bridge"):
        raise SystemExit(f"{NAME} needs a bridge network, which the daemon lacks; as root: BRIDGE=1 .ci/docker up")
    recipe = json.dumps([base, _DOCKERFILE, _INSIDE])
    tag = f"actbox-bench/ipybox:{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if _docker("image", "inspect", "--format", "{{.Id}}", tag):
        return tag
    _tell(f"building {tag}")
    with tempfile.TemporaryDirectory(prefix="actbox-bench-") as name:
        context = Path(name)
        (context / "home").mkdir()
        (context / "Dockerfile").write_text(_DOCKERFILE)
        shutil.copy(_modinfo(python), context)
        # For the image's Python and C library, whatever this machine's are.
        options = ["--python-version=3.11", f"--python-platform={os.uname().machine}-manylinux_2_28"]
        options += ["--only-binary=:all:", f"--target={context / 'site'}"]
        subprocess.run([find_uv_bin(), "pip", "install", "--quiet", *options, *_INSIDE], check=True)
        # The builder that every daemon has; the other one would be one more thing to install.
        build = ["docker", "build", "--network=none", f"--tag={tag}", context]
        done = subprocess.run(
            build, check=False, capture_output=True, text=True, env=os.environ | {"DOCKER_BUILDKIT": "0"}
        )
        if done.returncode:
            raise SystemExit(f"the image of {NAME} cannot be built:\n{done.stdout}{done.stderr}")
    return tag


def _modinfo(python: Path) -> Path:
    (found,) = python.parent.parent.glob("lib/python*/site-packages/ipybox/modinfo.py")
    return found


def _docker(*arguments: str) -> str:
    """What the command says, and nothing where it fails."""
    try:
        return subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        raise SystemExit("there is no docker command; as root: BRIDGE=1 .ci/docker up") from None


def _without(*names: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in names}


def _tell(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


async def _alone(count: int, trips: int) -> list[Round]:
    async with driver() as peer:
        return [await peer.round(trips) for _ in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trips", type=int, default=100)
    arguments = parser.parse_args()
    for done in asyncio.run(_alone(arguments.rounds, arguments.trips)):
        print(
            f"start {done.start:.3f} s, ready {done.start_ready:.3f} s; further {done.further:.3f} s, "
            f"ready {done.further_ready:.3f} s; round trip {statistics.median(done.trips):.5f} s; "
            f"{done.lost} cells without their text"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

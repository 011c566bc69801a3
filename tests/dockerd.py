"""A Docker daemon of a test's own, for what nobody may do to the machine's: kill it, fill its disk, empty it.

Only root can start one.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from needs import lacking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SECONDS = 60.0
_POLL_SECONDS = 0.02
_BASES = Path("/var/cache/actbox-ci")
_CGROUPS = Path("/sys/fs/cgroup")


def required() -> None:
    """Skip the test where it may not start a daemon or there is none to start; as root in CI, fail it."""
    reason = "only root can start a Docker daemon" if os.geteuid() else ""
    for program in ("docker", "dockerd", "ip", "mount"):
        if not reason and shutil.which(program) is None:
            reason = f"no {program} is installed"
    if reason and os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def base_tar() -> Path:
    """The root file system that `.ci/docker up` made, a Debian with its python3; skips or fails the test if it did not.

    `PrivateDaemon.add` makes an image of it, and `registry.split` several layers.
    """
    tars = sorted(_BASES.glob("base-*.tar"))
    if not tars:
        lacking("no base image; as root: .ci/docker up")
    return tars[0]


class PrivateDaemon:
    """A dockerd with its data in `folder`, which it makes and removes; entering the context starts it.

    With `megabytes` the data, containers' files included, are on a file system of that size. `options` are further
    ones of dockerd's, like `--max-download-attempts=1`, without which a pull that fails is tried for a minute. Its
    containers' networks lead no further than this machine. It knows runsc if that is installed.

    Leaving the context ends whatever it started, containers included, whether it was killed or not, and removes every
    mount, cgroup, network device and file. Nothing here waits longer than a minute. State: the running dockerd, if any.
    """

    def __init__(self, folder: Path, *, megabytes: int | None = None, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.log = folder / "dockerd.log"
        self._megabytes = megabytes
        self._options = tuple(options)
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._run = Path()

    @property
    def socket(self) -> Path:
        """Where it listens; short enough for a socket's address whatever `folder` is."""
        return self._run / "docker.sock"

    @property
    def url(self) -> str:
        """The same, as DOCKER_HOST wants it."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """Of dockerd.

        Raises:
            RuntimeError: It does not run.
        """
        if self._process is None:
            raise RuntimeError("the daemon does not run")
        return self._process.pid

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.folder.mkdir()
            stack.callback(shutil.rmtree, self.folder)
            # dockerd, containerd and the shims carry its name in their arguments: that is how they are found again. It
            # is as long as a network device's may be.
            self._run = Path("/run", f"actbox-{secrets.token_hex(4)}")
            self._run.mkdir(mode=0o700)
            stack.callback(shutil.rmtree, self._run)
            (self.folder / "data").mkdir()
            if self._megabytes:
                size = f"size={self._megabytes}m"
                subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", self.folder / "data"], check=True)
            # Of its own: with the default one, or none, it would share or delete that of the machine's daemon.
            subprocess.run(["ip", "link", "add", self._run.name, "type", "bridge"], check=True)
            stack.callback(subprocess.run, ["ip", "link", "delete", self._run.name], check=True)
            stack.callback(_remove_cgroups, self._run.name)
            stack.callback(_unmount_below, self.folder, self._run)
            stack.callback(self._end)
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def start(self) -> None:
        """Start it on the data that are there; returns when it answers.

        Raises:
            RuntimeError: It runs already, or ended, or did not answer in time; with the end of its log.
        """
        if self._process is not None:
            raise RuntimeError("the daemon runs already")
        config = self.folder / "daemon.json"
        # This runsc recognises the host's network by a sign that newer kernels show everywhere, and then refuses to
        # start with a network of its own.
        runsc = {"path": shutil.which("runsc"), "runtimeArgs": ["--network=none"]}
        config.write_text(json.dumps({"runtimes": {"runsc": runsc}} if runsc["path"] else {}))
        command = [
            "dockerd",
            f"--config-file={config}",
            f"--data-root={self.folder / 'data'}",
            f"--exec-root={self._run}",
            f"--pidfile={self._run / 'dockerd.pid'}",
            f"--host={self.url}",
            f"--containerd-namespace={self._run.name}",
            f"--cgroup-parent=/{self._run.name}",
            f"--bridge={self._run.name}",
            *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--ip=127.0.0.1"),
            *self._options,
        ]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._process = process
        if not _until(lambda: self._answers() or process.poll() is not None) or process.poll() is not None:
            end = self.log.read_text(errors="replace")[-2000:]
            self.kill()
            raise RuntimeError(f"the daemon does not answer:\n{end}")

    def kill(self) -> None:
        """SIGKILL dockerd, and with it its containerd; containers go on. Returns when `start` may follow."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            containerd = int((self._run / "containerd" / "containerd.pid").read_text())
            # It ends with its parent anyway. The next dockerd would take it for alive until somebody has waited for it.
            os.kill(containerd, signal.SIGKILL)
            if not _until(lambda: not Path(f"/proc/{containerd}").exists()):
                raise RuntimeError(f"containerd, process {containerd}, is not gone")

    def docker(self, *arguments: str | os.PathLike[str]) -> str:
        """What the command `docker ARGUMENTS` prints.

        Raises:
            subprocess.CalledProcessError: It failed; the reason is in `stderr`.
        """
        command = ["docker", "--host", self.url, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS).stdout

    def add(self, tar: Path, name: str) -> None:
        """Make an image called `name` of a root file system."""
        self.docker("import", tar, name)

    def load(self, archive: Path) -> None:
        """Load what `docker save` wrote."""
        self.docker("load", "--input", archive)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("docker", timeout=_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(_SECONDS)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.sock.connect(str(self.socket))
            connection.request("GET", "/_ping")
            return connection.getresponse().status == http.HTTPStatus.OK
        return False

    def _end(self) -> None:
        """End dockerd in order if it runs, then whatever is left of what it started."""
        if self._process is not None:
            with contextlib.suppress(subprocess.SubprocessError):
                if containers := self.docker("ps", "--all", "--quiet").split():
                    self.docker("rm", "--force", *containers)
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_SECONDS / 2)
        self.kill()
        # The sockets of shims that had no time to remove them are outside of its folders.
        addresses = self._run.glob(f"**/{self._run.name}/*/address")
        sockets = [Path(path.read_text().removeprefix("unix://")) for path in addresses]
        while left := _descendants(_named(self._run.name)):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not _until(lambda left=left: not left & _alive()):
                raise RuntimeError(f"processes cannot be killed: {left}")
        for path in sockets:
            path.unlink(missing_ok=True)


# -- what is left behind ---------------------------------------------------------------------------------------------


def _until(condition: Callable[[], bool]) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _parents() -> Iterator[tuple[int, int]]:
    """Each process that has not ended, and its parent."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state not in {"Z", "X"}:
                yield int(path.parent.name), int(parent)


def _alive() -> set[int]:
    return {pid for pid, _ in _parents()}


def _named(name: str) -> set[int]:
    """The processes with `name` in their arguments."""
    found: set[int] = set()
    for pid in _alive() - {os.getpid()}:
        with contextlib.suppress(OSError):
            if os.fsencode(name) in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def _descendants(pids: set[int]) -> set[int]:
    """`pids` and all below them."""
    found, parents = set(pids), dict(_parents())
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found


def _unmount_below(*folders: Path) -> None:
    """Take away every mount in `folders`, the latest first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed(points):
        if any(Path(point).is_relative_to(folder) for folder in folders):
            subprocess.run(["umount", point], check=True)


def _remove_cgroups(name: str) -> None:
    """Remove the cgroups called `name`, in each hierarchy; they are empty by now."""
    for top in (*_CGROUPS.glob(f"*/{name}"), *_CGROUPS.glob(name)):
        for path in sorted(top.glob("**/"), reverse=True):
            path.rmdir()

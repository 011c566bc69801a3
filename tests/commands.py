"""Runs the command as people run it: as a process, in a pipe and at a terminal; a plugin of the suite."""

from __future__ import annotations

import base64
import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from sandboxes import sandboxed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    Cli = Callable[..., subprocess.CompletedProcess[str]]

COMMAND = [sys.executable, "-m", "actbox"]
# Who runs the tests may ignore SIGINT, as a shell's background job does, and that would be inherited. With a terminal,
# it becomes the one that Ctrl-C is sent by.
BEGIN = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "actbox", *sys.argv[1:]])
"""
BOUND = 15.0
# For tests of what happens on this side alone, whichever engine is on the other.
one_engine = pytest.mark.engines("bubblewrap")
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode()
SHOW_IMAGE = f"display({{'image/png': {PNG!r}, 'text/plain': 'a picture'}}, raw=True)"
# A machine without either engine.
NEITHER = {"ACTBOX_BWRAP": "/nonexistent/bwrap", "DOCKER_HOST": "unix:///nonexistent/docker.sock"}
SAID = {"bubblewrap": "/nonexistent/bwrap", "docker": "Cannot connect to Docker Engine via unix:///nonexistent/"}


@pytest.fixture
def environ(default_engine: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "ACTBOX_BWRAP")},
        "TERM": "xterm",
        # The terminals of these tests do not answer when asked where the cursor is.
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "PYTHONWARNINGS": "error::ResourceWarning",
    }


def run(
    *arguments: str, workspace: Path, environ: dict[str, str], stdin: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    where = [] if arguments[0] in ("doctor", "build") else ["--workspace", str(workspace)]
    return subprocess.run(
        [*COMMAND, arguments[0], *where, *arguments[1:]],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        timeout=BOUND,
        check=False,
        env=environ,
        cwd=cwd,
    )


@pytest.fixture
def cli(workspace_path: Path, environ: dict[str, str]) -> Cli:
    def call(*arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return run(*arguments, workspace=workspace_path, environ={**environ, **more}, stdin=stdin)

    return call


class Running:
    """A command that runs, whose output is read as it comes; at a terminal of its own if `terminal`."""

    def __init__(self, arguments: Sequence[str], environ: dict[str, str], *, terminal: bool) -> None:
        self.reading, child = pty.openpty() if terminal else os.pipe()
        self._stdin = -1 if terminal else os.open(os.devnull, os.O_RDONLY)
        stdin = child if terminal else self._stdin
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, *arguments],
            stdin=stdin,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env=environ,
        )
        os.close(child)
        self.output = b""
        self._seen = 0
        self._deadline = time.monotonic() + BOUND

    def until(self, expected: bytes) -> bytes:
        """Read until something comes, behind what was waited for before; what came until then."""
        while (found := self.output.find(expected, self._seen)) < 0:
            assert self._read(), f"the command ended before it wrote {expected!r}: {self.output!r}"
        begin, self._seen = self._seen, found + len(expected)
        return self.output[begin : self._seen]

    def end(self) -> int:
        """Read to the end, and the exit code."""
        while self._read():
            pass
        return self.process.wait(max(0.1, self._deadline - time.monotonic()))

    def _read(self) -> bool:
        left = self._deadline - time.monotonic()
        if left <= 0 or not select.select([self.reading], [], [], left)[0]:
            pytest.fail(f"nothing more came: {self.output!r}")
        try:
            data = os.read(self.reading, 65536)
        except OSError:  # how the end of a terminal reads
            data = b""
        self.output += data
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self.reading, text.encode())

    def descendants(self) -> list[int]:
        """Descriptors of all processes that it started, directly or not, and of those of its containers."""
        return [os.pidfd_open(pid) for pid in sorted(sandboxed(self.process.pid))]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        for fd in (self.reading, self._stdin):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def begin(workspace_path: Path, environ: dict[str, str]) -> Iterator[Callable[..., Running]]:
    """Starts a command and leaves it running."""
    with contextlib.ExitStack() as opened:

        def call(command: str, *arguments: str, terminal: bool = False, **more: str) -> Running:
            where = ["--workspace", str(workspace_path)] if command in ("run", "repl") else []
            running = Running([command, *where, *arguments], {**environ, **more}, terminal=terminal)
            opened.callback(running.close)
            return running

        yield call


def all_end(pidfds: list[int]) -> bool:
    """Whether all these processes end, within a bound."""
    try:
        poller = select.poll()
        for fd in pidfds:
            poller.register(fd, select.POLLIN)
        deadline = time.monotonic() + 5
        left = set(pidfds)
        while left and (events := poller.poll(max(0.0, deadline - time.monotonic()) * 1000)):
            for fd, _ in events:
                poller.unregister(fd)
                left.discard(fd)
        return not left
    finally:
        for fd in pidfds:
            os.close(fd)

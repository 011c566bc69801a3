"""One thread that starts every process of actbox.

`bwrap --die-with-parent` asks the kernel for a signal when the *thread* that started it ends (PR_SET_PDEATHSIG). A
sandbox started from a worker thread would die with that worker; this thread lives as long as the process.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    _Job = tuple[Future[subprocess.Popen[bytes]], Sequence[str], Sequence[int], int]


class _Launcher:
    """State: the thread, made at first use and again in a forked process, and its queue."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job] | None = None

    def spawn(self, argv: Sequence[str], pass_fds: Sequence[int], output: int) -> Future[subprocess.Popen[bytes]]:
        with self._lock:
            if self._jobs is None:
                self._jobs = queue.SimpleQueue()
                threading.Thread(target=_serve, args=(self._jobs,), name="actbox-launcher", daemon=True).start()
            done: Future[subprocess.Popen[bytes]] = Future()
            self._jobs.put((done, argv, pass_fds, output))
            return done

    def forget(self) -> None:
        """A forked child has no launcher thread, whatever its parent had."""
        self._lock = threading.Lock()
        self._jobs = None


_launcher = _Launcher()
os.register_at_fork(after_in_child=_launcher.forget)


def spawn(argv: Sequence[str], *, pass_fds: Sequence[int] = (), output: int) -> subprocess.Popen[bytes]:
    """Start a process in its own process group, with an empty environment and nothing inherited but `pass_fds`.

    Args:
        argv: the program, an absolute path, and its arguments.
        pass_fds: descriptors that it gets under the same numbers.
        output: a descriptor for its standard output and error.

    Raises:
        OSError: it cannot be executed.
    """
    return _launcher.spawn(argv, pass_fds, output).result()


def _serve(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        done, argv, pass_fds, output = jobs.get()
        try:
            process = subprocess.Popen(
                argv,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                process_group=0,
                cwd="/",
            )
        except BaseException as exc:  # noqa: BLE001 - it belongs to the caller
            done.set_exception(exc)
        else:
            done.set_result(process)
        del done, argv, pass_fds, output

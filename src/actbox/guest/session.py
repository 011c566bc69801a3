"""One session's processes, from the supervisor's fork to the end of its kernel.

::

    supervisor ── fork ── A: enters new namespaces, forks once more, tells the supervisor B's pid, ends
                          └── B: pid 1 of the session: builds the root, gives up every right, forks, then reaps
                              └── K: the kernel

B cannot be signalled or looked into from inside; when K ends, B says how and ends too, and the system kills whatever
else runs in the pid namespace. Where namespaces may not be nested the container holds one session alone: then the
supervisor itself stands in B's place.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from ..protocol import frames
from . import interrupts, isolation
from .caches import plant
from .kernel import Kernel, close_other_files

if TYPE_CHECKING:
    import mmap
    import socket
    from types import FrameType

    from .reload import SkillReloader
    from .shell import Shell

_START_SECONDS = 10


class Start:
    """What a session needs from the supervisor, handed on by fork."""

    def __init__(
        self,
        stream: socket.socket,
        status: int,
        page: mmap.mmap,
        binds: list[dict[str, Any]],
        seeds: list[list[str]],
        shell: Shell,
        reloader: SkillReloader,
        *,
        nested: bool,
    ) -> None:
        self.stream = stream
        self.status = status
        self.page = page
        self.binds = binds
        self.seeds = seeds
        self.shell = shell
        self.reloader = reloader
        self.nested = nested


def run_first(start: Start) -> NoReturn:
    """Process A: never returns."""
    code = 70
    try:
        start.stream.settimeout(_START_SECONDS)
        config = _read_config(start.stream)
        start.stream.settimeout(None)
        if start.nested:
            isolation.enter_namespaces()
        child = os.fork()
        if child == 0:
            _run_second(start, config)
        _tell(start.status, {"pid": child})
        code = 0
    except isolation.LayerError as exc:
        _fail(start.stream, exc)
    except BaseException as exc:  # noqa: BLE001 - a forked child must not run on into its parent's code
        _fail(start.stream, isolation.LayerError("session", getattr(exc, "errno", None), repr(exc)))
    finally:
        os._exit(code)


def _run_second(start: Start, config: dict[str, Any]) -> NoReturn:
    """Process B, pid 1 of a nested session: never returns."""
    try:
        signal.set_wakeup_fd(-1)
        close_other_files({0, 1, 2, start.stream.fileno(), start.status})
        limits = config["limits"]
        if start.nested:
            isolation.build_root(start.binds, config["key"], limits)
            isolation.raise_loopback()
        isolation.set_limits(limits)
        isolation.give_up_rights()
        # From here on the kernel, which has the same user, cannot open this process's memory or files.
        isolation.set_dumpable(value=False)
        kernel = fork_kernel(start, config)
        start.stream.close()
        _stand_watch(start, kernel)
    except isolation.LayerError as exc:
        _fail(start.stream, exc)
    except BaseException as exc:  # noqa: BLE001 - see run_first
        _fail(start.stream, isolation.LayerError("session", getattr(exc, "errno", None), repr(exc)))
    finally:
        os._exit(70)


def _stand_watch(start: Start, kernel: int) -> NoReturn:
    def forward(_number: int, _frame: FrameType | None) -> None:
        interrupts.forward(start.page, kernel)

    signal.signal(signal.SIGINT, forward)
    while True:
        pid, status = os.wait()
        if pid == kernel:
            _tell(start.status, {"status": status})
            os._exit(0)


def fork_kernel(start: Start, config: dict[str, Any]) -> int:
    """Fork process K. Its parent has given up every right already."""
    out, err = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        for fd in (*out, *err):
            os.close(fd)
        return child
    code = 71
    try:
        os.close(start.status)
        os.setsid()
        isolation.set_dumpable(value=True)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(out[1], 1)
        os.dup2(err[1], 2)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, 0)
        keep = {0, 1, 2, start.stream.fileno(), out[0], err[0]}
        close_other_files(keep)
        plant(start.seeds)
        Kernel(start.stream, (out[0], err[0]), start.page, start.shell, start.reloader).serve(config)
        code = 0
    except BaseException:  # noqa: BLE001 - the last place where it can be told
        traceback.print_exc()
    finally:
        # Whatever the guest has made of Python itself: this process ends here.
        os._exit(code)


def _read_config(stream: socket.socket) -> dict[str, Any]:
    """The host's first frame: what this session is to be. The stream is the host's own until the kernel starts."""
    decoder = frames.Decoder()
    while (frame := decoder.next_frame()) is None:
        data = stream.recv(65536)
        if not data:
            raise EOFError("the host closed the session's stream")
        decoder.feed(data)
    config: dict[str, Any] = json.loads(frame.payload)
    return config


def _fail(stream: socket.socket, exc: isolation.LayerError) -> None:
    try:
        header = {"type": "failed", "layer": exc.layer, "errno": exc.errno, "detail": exc.detail[:2000]}
        stream.sendall(frames.encode(header))
    except OSError:
        return


def _tell(status: int, fact: dict[str, int]) -> None:
    os.write(status, json.dumps(fact).encode() + b"\n")

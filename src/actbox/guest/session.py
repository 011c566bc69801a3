"""One session's processes, from the supervisor's fork to the end of its kernel.

::

    supervisor ── fork ── A: enters new namespaces, forks once more, ends
                          └── B: pid 1 of the session: builds the root, gives up every right, forks, then watches
                              └── K: the kernel

A and B may be forked before anybody asks for a session; B then waits for its two sockets. On `stream` the host speaks
to the kernel; on `watch` to B, which the guest cannot signal or look into (see `watch`). K may be forked in its turn
(see `branching`): then B watches over several kernels. When the host lets go of the last `watch`, so does the session:
B's end ends everything in the pid namespace. Where namespaces may not be nested the container holds one session alone,
B is no pid 1, and it is the host that ends the whole container.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..protocol import frames
from . import forwarder, interrupts, isolation, usage
from .caches import plant
from .kernel import Kernel, close_other_files
from .watch import Watcher, tell

if TYPE_CHECKING:
    import mmap
    from types import FrameType

    from .landlock import Domain
    from .reload import SkillReloader
    from .shell import Shell

_START_SECONDS = 10


@dataclass
class Start:
    """What a session takes along from the supervisor; `handover` is where its two sockets will come from."""

    handover: socket.socket
    binds: list[dict[str, Any]]
    seeds: list[list[str]]
    shell: Shell
    reloader: SkillReloader
    nested: bool


@dataclass
class _Sockets:
    stream: socket.socket
    watch: socket.socket
    asking: socket.socket | None


def run_first(start: Start) -> NoReturn:
    """Process A: never returns."""
    try:
        if start.nested:
            isolation.enter_namespaces()
        if os.fork() == 0:
            _run_second(start)
    except BaseException as exc:  # noqa: BLE001 - a forked child must not run on into its parent's code
        with contextlib.suppress(OSError):
            _fail(_take_sockets(start.handover).stream, exc)
    finally:
        os._exit(0)


def _run_second(start: Start) -> NoReturn:
    """Process B, pid 1 of a nested session: never returns."""
    try:
        signal.set_wakeup_fd(-1)
        close_other_files({0, 1, 2, start.handover.fileno()})
        sockets = _take_sockets(start.handover)
        # The system tells the host who says it: so it learns this process's number in its own namespace.
        tell(sockets.watch, {"hello": True})
        try:
            config = _read_config(sockets.stream)
            limits = config["limits"]
            if start.nested:
                isolation.build_root(start.binds, config["key"], limits)
                isolation.raise_loopback()
            # The first process of the namespace gets orphans anyway, forked kernels among them.
            config["forks"] = start.nested or isolation.adopt_orphans()
            isolation.set_limits(limits)
            isolation.give_up_rights()
            # From here on the kernel, which has the same user, cannot open this process's memory or files.
            isolation.set_dumpable(value=False)
            domain = isolation.make_domain(start.binds, config["key"])
            config["landlock"] = domain.abi
            memory = interrupts.make_slots()
            kin, their_kin = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            children = _note_children()
            if sockets.asking is not None:
                config["env"] = {**_fork_forwarder(sockets.asking, children), **config["env"]}
            kernel = _fork_kernel(start, sockets.stream, their_kin, memory, config, domain)
            domain.close()
            their_kin.close()
        except BaseException as exc:
            _fail(sockets.stream, exc)
            raise
        sockets.stream.close()
        # In a pid namespace of its own this process is 1; otherwise what came before it is not the session's.
        meter = usage.Meter(limits, os.getpid(), config["cwd"])
        watcher = Watcher(memory, start.handover, children, meter)
        watcher.add(0, sockets.watch, kin, kernel)
        watcher.run()
    except BaseException:  # noqa: BLE001 - see run_first; the host knows already, or is gone
        os._exit(70)
    finally:
        os._exit(0)


def _note_children() -> int:
    """A descriptor that becomes readable when a child ends."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _note_signal)
    return reader


def _note_signal(_number: int, _frame: FrameType | None) -> None:
    """A handler must stand for the wake-up descriptor to be written to."""


def _fork_forwarder(asking: socket.socket, children: int) -> dict[str, str]:
    """Fork the process that leads to the session's proxy; the variables that tell programs of it."""
    listener = forwarder.listen()
    port: int = listener.getsockname()[1]
    if os.fork() == 0:
        signal.set_wakeup_fd(-1)
        os.close(children)
        close_other_files({0, 1, 2, listener.fileno(), asking.fileno()})
        forwarder.run_forwarder(listener, asking)
    listener.close()
    asking.close()
    return forwarder.variables(port)


def _fork_kernel(
    start: Start,
    stream: socket.socket,
    kin: socket.socket,
    memory: mmap.mmap,
    config: dict[str, Any],
    domain: Domain,
) -> int:
    """Fork process K. Its parent has given up every right already."""
    out, err = os.pipe(), os.pipe()
    child = os.fork()
    if child:
        for fd in (*out, *err):
            os.close(fd)
        return child
    code = 71
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        isolation.set_dumpable(value=True)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(out[1], 1)
        os.dup2(err[1], 2)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, 0)
        try:
            # The kernel alone: the watcher is to signal it and look into it, and not the other way round.
            domain.enter()
        except OSError as exc:
            _fail(stream, isolation.LayerError("landlock", exc.errno, str(exc)))
            raise
        close_other_files({0, 1, 2, stream.fileno(), kin.fileno(), out[0], err[0]})
        plant(start.seeds)
        Kernel(stream, kin, (out[0], err[0]), memory, start.shell, start.reloader).serve(config)
        code = 0
    except BaseException:  # noqa: BLE001 - the last place where it can be told
        traceback.print_exc()
    finally:
        # Whatever the guest has made of Python itself: this process ends here.
        os._exit(code)


def _take_sockets(handover: socket.socket) -> _Sockets:
    """Wait for the session's sockets: stream, watch, and one to ask for connections if there is a network."""
    _, fds, _, _ = socket.recv_fds(handover, 1, 3, socket.MSG_CMSG_CLOEXEC)
    if len(fds) < 2:  # noqa: PLR2004 - stream and watch
        raise EOFError("no session was handed over")
    stream, watch, *asking = (socket.socket(fileno=fd) for fd in fds)
    return _Sockets(stream, watch, asking[0] if asking else None)


def _read_config(stream: socket.socket) -> dict[str, Any]:
    """The host's first frame: what this session is to be. The stream is the host's own until the kernel starts."""
    decoder = frames.Decoder()
    stream.settimeout(_START_SECONDS)
    while (frame := decoder.next_frame()) is None:
        data = stream.recv(65536)
        if not data:
            raise EOFError("the host closed the session's stream")
        decoder.feed(data)
    stream.settimeout(None)
    config: dict[str, Any] = json.loads(frame.payload)
    return config


def _fail(stream: socket.socket, exc: BaseException) -> None:
    """Tell the host which layer could not be built."""
    layer = exc.layer if isinstance(exc, isolation.LayerError) else "session"
    number = getattr(exc, "errno", None)
    detail = exc.detail if isinstance(exc, isolation.LayerError) else repr(exc)
    header = {"type": "failed", "layer": layer, "errno": number, "detail": detail[:2000]}
    with contextlib.suppress(OSError):
        stream.sendall(frames.encode(header))

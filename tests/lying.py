"""An engine whose guest is code of the test's: it speaks the raw wire, and lies as the test likes.

Nothing is sandboxed and no process is started. A boundary is a thread that plays the supervisor; each session is two
threads more, one that plays the kernel by a script and one that plays the watcher. All of them end with their sockets.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar

from actbox.engines.base import Boundary, Engine, Layer, Layout
from actbox.protocol import frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from actbox import SandboxUnavailable
    from actbox.spec import ContainerSpec

    Script = Callable[["Kernel"], None]
    Supervising = Callable[["Liar", socket.socket], None]

_SECONDS = 20.0
_ECHO = 1 << 20
READY = {"type": "ready", "python": "3.11", "ipython": "9"}


class Kernel:
    """What a script speaks through: the kernel's stream, and its watcher's socket.

    Every call raises OSError once the host has ended the session; that ends the script, and is no failure.
    """

    def __init__(self, stream: socket.socket, watch: socket.socket) -> None:
        stream.settimeout(_SECONDS)
        self.stream = stream
        self.watch = watch
        self.cell = 0
        self._decoder = frames.Decoder()

    def request(self) -> frames.Frame:
        """The host's next frame."""
        while (frame := self._decoder.next_frame()) is None:
            data = self.stream.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the host is gone")
            self._decoder.feed(data)
        number = frame.header.get("id")
        if isinstance(number, int):
            self.cell = number
        return frame

    def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.stream.sendall(data)

    def frame(self, header: dict[str, Any] | bytes, payload: bytes = b"") -> None:
        """Send a frame with any header, right or wrong."""
        self.raw(framed(header, payload))

    def reply(self, **fields: Any) -> None:
        """End the cell, well unless the fields say otherwise."""
        self.frame({"type": "execute_reply", "id": self.cell, "status": "ok", "execution_count": 1, **fields})

    def tell(self, news: dict[str, Any] | bytes, fds: list[int] | None = None) -> None:
        """Say something as the watcher."""
        socket.send_fds(self.watch, [news if isinstance(news, bytes) else json.dumps(news).encode()], fds or [])

    def greet(self) -> None:
        """Take the configuration, and be ready."""
        self.request()
        self.frame(READY)


def framed(header: dict[str, Any] | bytes, payload: bytes = b"") -> bytes:
    """A frame as bytes, whatever the header."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return frames.PREFIX.pack(len(head), len(payload)) + head + payload


def honest(kernel: Kernel) -> None:
    """Answer each cell with its own code as output, up to a MiB of it."""
    kernel.greet()
    _echo(kernel)


def _echo(kernel: Kernel) -> None:
    while True:
        request = kernel.request()
        kernel.frame({"type": "stream", "name": "stdout"}, request.payload[:_ECHO])
        kernel.reply()


def at_first_cell(lie: Script) -> Script:
    """Behave, but for the first cell: the lie is the answer to it."""

    def script(kernel: Kernel) -> None:
        kernel.greet()
        kernel.request()
        lie(kernel)
        _echo(kernel)

    return script


class Liar(Engine):
    """See the module's text.

    Args:
        supervising: plays the supervisor once it is told its layout; None for one that behaves.

    State: `scripts`, of the sessions to come, honest ones where there is none; `threads`, all that were started.
    """

    name: ClassVar[str] = "lying"

    def __init__(self, supervising: Supervising | None = None) -> None:
        self._supervising = supervising or behave
        self.scripts: deque[Script] = deque()
        self.threads: list[threading.Thread] = []

    async def start(
        self,
        spec: ContainerSpec,
        *,
        nested: bool,
        key: str | None,
        progress: Callable[[str], None],
    ) -> Boundary:
        """See `Engine`."""
        del spec, nested, key, progress
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.run(self._play_supervisor, theirs)
        return _Boundary(ours, self)

    async def examine(self) -> list[Layer]:
        """See `Engine`."""
        return []

    def run(self, play: Callable[..., None], *args: Any) -> None:
        """Play a part in a thread; sockets that the host has closed end it."""

        def part() -> None:
            with contextlib.suppress(OSError):
                play(*args)

        thread = threading.Thread(target=part, daemon=True)
        self.threads.append(thread)
        thread.start()

    def join(self) -> None:
        """Wait for every part's end, which its sockets' end brings."""
        for thread in self.threads:
            thread.join(_SECONDS)
            assert not thread.is_alive(), "a part of the play did not end"

    def _play_supervisor(self, control: socket.socket) -> None:
        with control:
            control.settimeout(None)
            control.recv(1 << 16)
            self._supervising(self, control)

    def serve(self, control: socket.socket) -> None:
        """Play a session for each request, until the host is gone."""
        while True:
            data, fds, _, _ = socket.recv_fds(control, 1 << 16, 3)
            if not data:
                return
            stream, watch, *others = (socket.socket(fileno=fd) for fd in fds)
            for other in others:
                other.close()
            self.run(self._play_kernel, stream, watch, self.scripts.popleft() if self.scripts else honest)

    def _play_kernel(self, stream: socket.socket, watch: socket.socket, script: Script) -> None:
        kernel = Kernel(stream, watch)
        self.run(_play_watcher, kernel)
        try:
            script(kernel)
        finally:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
            stream.close()
            with contextlib.suppress(OSError):
                kernel.tell({"status": 0, "killed": False, "begun": kernel.cell, "limit": None})
            with contextlib.suppress(OSError):
                watch.shutdown(socket.SHUT_RDWR)


def behave(liar: Liar, control: socket.socket) -> None:
    """Be ready at once, and serve."""
    control.send(b'{"op":"ready"}')
    control.send(b'{"op":"warm"}')
    liar.serve(control)


def _play_watcher(kernel: Kernel) -> None:
    """Heed the order to kill, and tell of the end; the script may say other things on the same socket."""
    with kernel.watch as watch:
        while order := watch.recv(4096):
            if json.loads(order).get("op") == "kill":
                with contextlib.suppress(OSError):
                    kernel.stream.shutdown(socket.SHUT_RDWR)
                watch.send(json.dumps({"status": 9, "killed": True, "begun": kernel.cell, "limit": None}).encode())
                return


class _Boundary(Boundary):
    def __init__(self, control: socket.socket, liar: Liar) -> None:
        self.control = control
        self.layout = Layout("/", (), (), (), nested=True)
        self._liar = liar

    def explanation(self) -> SandboxUnavailable | None:
        return None

    async def close(self) -> None:
        self.control.close()

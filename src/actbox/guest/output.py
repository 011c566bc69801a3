"""Everything a cell prints becomes frames, in the order it was printed.

Three sources meet in one buffer under one lock: Python's streams, and the two pipes behind file descriptors 1 and 2
(subprocesses, C code, forked children). Whoever writes through Python first takes in what the pipes hold, so that
`print`, `os.system` and `display` keep their order. One thread empties the pipes meanwhile and flushes text that waits.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import threading
import time
from typing import TYPE_CHECKING, Any

from ..protocol import frames

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from .interrupts import Interrupts

BATCH_BYTES = 32 << 10
BATCH_SECONDS = 0.004
CHUNK_BYTES = 256 << 10
# Output of threads and subprocesses between two cells waits for the next cell; what is beyond this is dropped.
IDLE_BYTES = 1 << 20
_PIPE_READ = 64 << 10
NAMES = ("stdout", "stderr")


class Channel:
    """The session's stream, written to by any thread, a whole frame at a time.

    State, all under `lock`: `_texts` and `_size`, text not yet sent; `_decoders`, the pipes' unfinished characters;
    `_idle`, whether no cell runs, and `_dropped`, what idle text was left out.
    """

    def __init__(self, stream: socket.socket, pipes: tuple[int, int], interrupts: Interrupts) -> None:
        self._stream: socket.socket | None = stream
        self._pipes = pipes
        self._interrupts = interrupts
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.lock = threading.RLock()
        self._texts: list[tuple[str, list[bytes]]] = []
        self._size = 0
        self._armed = False
        self._idle = True
        self._dropped = 0
        self._decoders = [_decoder(), _decoder()]
        for pipe in pipes:
            os.set_blocking(pipe, False)
        os.register_at_fork(after_in_child=self._become_child)

    def start(self) -> None:
        """Begin to empty the pipes in a thread of its own."""
        threading.Thread(target=self._watch, name="actbox-output", daemon=True).start()

    # -- what Python code writes ---------------------------------------------------------------------------------

    def text(self, name: str, text: str) -> None:
        """Text of `sys.stdout` or `sys.stderr`."""
        self._append_own(name, text.encode("utf-8", "backslashreplace"))

    def raw(self, name: str, data: bytes) -> None:
        """Bytes of `sys.stdout.buffer`: any, so they are made valid UTF-8 first."""
        self._append_own(name, data.decode("utf-8", "replace").encode())

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """A frame behind everything written so far."""
        data = frames.encode(header, payload)
        with self._interrupts.held, self.lock:
            if self._stream is None:
                return
            self._drain_pipes()
            self._flush()
            self._write(data)

    def begin(self, header: dict[str, Any]) -> None:
        """A cell begins: send `header`, then what waited since the last one."""
        with self._interrupts.held, self.lock:
            self._write(frames.encode(header))
            self._idle = False
            if self._dropped:
                note = f"\n[{self._dropped} bytes printed between the cells were left out]\n"
                self._texts.append(("stderr", [note.encode()]))
                self._dropped = 0
            self._flush()

    def end(self, header: dict[str, Any]) -> None:
        """A cell ends: `header` comes behind its last output."""
        with self._interrupts.held, self.lock:
            self._drain_pipes()
            for index, name in enumerate(NAMES):
                self._append(name, self._decoders[index].decode(b"", final=True).encode())
            self._flush()
            self._idle = True
            self._write(frames.encode(header))

    # -- inside the lock -----------------------------------------------------------------------------------------

    def _append_own(self, name: str, data: bytes) -> None:
        if self._stream is None:
            _write_all(1 if name == "stdout" else 2, data)
            return
        with self._interrupts.held, self.lock:
            self._drain_pipes()
            self._append(name, data)
            if self._size >= BATCH_BYTES:
                self._flush()
            elif self._size and not self._armed:
                self._armed = True
                os.eventfd_write(self._wake, 1)

    def _append(self, name: str, data: bytes) -> None:
        if not data:
            return
        if self._idle and self._size + len(data) > IDLE_BYTES:
            self._dropped += len(data)
            return
        if self._texts and self._texts[-1][0] == name:
            self._texts[-1][1].append(data)
        else:
            self._texts.append((name, [data]))
        self._size += len(data)

    def _drain_pipes(self) -> bool:
        """Take in what the pipes hold now; False once both are closed."""
        alive = False
        for index, pipe in enumerate(self._pipes):
            while True:
                try:
                    data = os.read(pipe, _PIPE_READ)
                except BlockingIOError:
                    alive = True
                    break
                except OSError:
                    break
                if not data:
                    break
                self._append(NAMES[index], self._decoders[index].decode(data).encode())
                if self._size >= BATCH_BYTES:
                    self._flush()
        return alive

    def _flush(self) -> None:
        if self._idle or not self._texts:
            return
        texts, self._texts, self._size = self._texts, [], 0
        for name, pieces in texts:
            for chunk in _chunks(b"".join(pieces)):
                self._write(frames.encode({"type": "stream", "name": name}, chunk))

    def _write(self, data: bytes) -> None:
        if self._stream is not None:
            # A host that is gone ends this process by its supervisor; until then there is nobody to write to.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._stream.sendall(data)

    # -- the thread, and forked children -------------------------------------------------------------------------

    def _watch(self) -> None:
        poller = select.poll()
        for fd in (*self._pipes, self._wake):
            poller.register(fd, select.POLLIN)
        alive = True
        while alive:
            poller.poll()
            # Text may be complete in a moment: one frame for a burst of prints, not one each.
            time.sleep(BATCH_SECONDS)
            with self.lock:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                self._armed = False
                try:
                    alive = self._drain_pipes()
                    self._flush()
                except OSError:
                    return

    def _become_child(self) -> None:
        """A forked child of the kernel prints through the pipes, never into the parent's stream."""
        if self._stream is None:
            return
        self.lock = threading.RLock()
        self._stream.close()
        self._stream = None
        self._texts, self._size = [], 0
        for fd in (*self._pipes, self._wake):
            os.close(fd)


class OutStream(io.TextIOBase):
    """`sys.stdout` and `sys.stderr` of a kernel."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, name: str, write: Callable[[str, str], None], write_raw: Callable[[str, bytes], None]) -> None:
        self.name = f"<{name}>"
        self.mode = "w"
        self._name = name
        self._write = write
        self._fd = 1 if name == "stdout" else 2
        self.buffer = _Buffer(name, write_raw)

    def write(self, text: str, /) -> int:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance] - the guest's code is not typed
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if text:
            self._write(self._name, text)
        return len(text)

    def flush(self) -> None:
        """Nothing waits in this object."""

    def reconfigure(self, **_options: object) -> None:
        """Accepted for programs that set their encoding; it is always UTF-8."""

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def close(self) -> None:
        """A kernel's streams stay open: the next cell needs them."""


class _Buffer(io.RawIOBase):
    def __init__(self, name: str, write_raw: Callable[[str, bytes], None]) -> None:
        self._name = name
        self._write_raw = write_raw

    def write(self, data: Any, /) -> int:
        block = bytes(data)
        self._write_raw(self._name, block)
        return len(block)

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """See `OutStream.close`."""


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _chunks(data: bytes) -> list[bytes]:
    """The text in pieces of at most CHUNK_BYTES, never cut inside a character."""
    if len(data) <= CHUNK_BYTES:
        return [data]
    pieces: list[bytes] = []
    start = 0
    while start < len(data):
        stop = min(start + CHUNK_BYTES, len(data))
        while stop < len(data) and data[stop] & 0xC0 == 0x80:  # noqa: PLR2004 - UTF-8's continuation bytes
            stop -= 1
        pieces.append(data[start:stop])
        start = stop
    return pieces


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]

"""Everything a cell prints becomes frames, in the order it was printed.

Three sources meet in one buffer under one lock: Python's streams, and the two pipes behind file descriptors 1 and 2
(subprocesses, C code, forked children). Whoever writes through Python first takes in what the pipes hold, so that
`print`, `os.system` and `display` keep their order. One thread empties the pipes meanwhile, and sends what waits.

What a cell puts out waits BATCH_SECONDS for more, so that a burst of prints is one frame and a short cell, its result
and its reply are one write. A timer descriptor wakes the thread for that: nothing is woken for a cell that is shorter.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
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
THREAD = "actbox-output"


class Channel:
    """The session's stream, written to by any thread, a whole frame at a time.

    State, all under `lock`: `_texts` and `_size`, text not yet made frames; `_frames`, frames not yet sent, with their
    size; `_armed`, whether the timer runs, and `_flushed`, when something was last sent; `_decoders` and
    `_raw_decoders`, unfinished characters of the pipes and of `sys.stdout.buffer`; `_idle`, whether no cell
    runs, and `_dropped`, what idle text was left out.
    """

    def __init__(self, stream: socket.socket, pipes: tuple[int, int], interrupts: Interrupts) -> None:
        self._stream: socket.socket | None = stream
        self._pipes = pipes
        self._interrupts = interrupts
        self._timer = _Timer()
        self.lock = threading.RLock()
        self._texts: list[tuple[str, list[bytes]]] = []
        self._size = 0
        self._frames: list[bytes] = []
        self._frames_size = 0
        self._armed = False
        self._flushed = 0.0
        self._idle = True
        self._dropped = 0
        self._decoders = [_decoder(), _decoder()]
        self._raw_decoders = [_decoder(), _decoder()]
        # Asked at every write: two reads that find nothing cost ten times as much as this.
        self._waiting = select.poll()
        self._register_pipes()
        os.register_at_fork(after_in_child=self._become_child)

    def start(self) -> None:
        """Begin to empty the pipes in a thread of its own."""
        threading.Thread(target=self._watch, name=THREAD, daemon=True).start()

    def move(self, stream: socket.socket, pipes: tuple[int, int]) -> None:
        """Serve another kernel's stream: in a forked child, which has left its parent's behind."""
        self._pipes = pipes
        self._timer = _Timer()
        self._armed = False
        self._idle = True
        self._dropped = 0
        self._decoders = [_decoder(), _decoder()]
        self._raw_decoders = [_decoder(), _decoder()]
        self._waiting = select.poll()
        self._register_pipes()
        self._stream = stream
        self.start()

    def _register_pipes(self) -> None:
        for pipe in self._pipes:
            os.set_blocking(pipe, False)
            self._waiting.register(pipe, select.POLLIN)

    # -- what Python code writes ---------------------------------------------------------------------------------

    def text(self, name: str, text: str) -> None:
        """Text of `sys.stdout` or `sys.stderr`."""
        self._append_own(name, text.encode("utf-8", "backslashreplace"))

    def raw(self, name: str, data: bytes) -> None:
        """Bytes of `sys.stdout.buffer`: any, so they are made valid UTF-8 first."""
        if self._stream is not None:
            with self._interrupts.held, self.lock:
                data = self._raw_decoders[NAMES.index(name)].decode(data).encode()
        self._append_own(name, data)

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """A frame behind everything written so far."""
        data = frames.encode(header, payload)
        with self._interrupts.held, self.lock:
            self._drain_pipes()
            self._frame_texts()
            self._queue(data)

    def at_once(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """A frame behind everything written so far, that does not wait for more."""
        with self._interrupts.held, self.lock:
            self.send(header, payload)
            self._flush()

    def begin(self) -> None:
        """A cell begins: what waited since the last one is its first output."""
        with self._interrupts.held, self.lock:
            self._idle = False
            if self._dropped:
                note = f"\n[{self._dropped} bytes printed between the cells were left out]\n"
                self._texts.append(("stderr", [note.encode()]))
                self._dropped = 0

    def end(self, header: dict[str, Any]) -> None:
        """A cell ends: `header` comes behind its last output, and everything is sent."""
        with self._interrupts.held, self.lock:
            self._drain_pipes()
            for index, name in enumerate(NAMES):
                for decoder in (self._raw_decoders[index], self._decoders[index]):
                    self._append(name, decoder.decode(b"", final=True).encode())
            self._frame_texts()
            self._idle = True
            self._queue(frames.encode(header))
            self._flush()

    def now(self, header: dict[str, Any]) -> None:
        """A frame that does not wait."""
        with self._interrupts.held, self.lock:
            self._queue(frames.encode(header))
            self._flush()

    # -- inside the lock -----------------------------------------------------------------------------------------

    def _append_own(self, name: str, data: bytes) -> None:
        if self._stream is None:
            _write_all(1 if name == "stdout" else 2, data)
            return
        with self._interrupts.held, self.lock:
            self._drain_pipes()
            self._append(name, data)
            if self._size >= BATCH_BYTES:
                self._frame_texts()
            elif data.endswith(b"\n") and time.monotonic() - self._flushed > BATCH_SECONDS:
                # The first line after a pause goes at once: it may be the last before a crash.
                self._frame_texts()
                self._flush()
            elif self._size:
                self._arm()

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
        if not self._waiting.poll(0):
            return True
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
                    self._frame_texts()
        return alive

    def _frame_texts(self) -> None:
        """Make frames of the text so far; what comes between two cells stays text until the next."""
        if self._idle or not self._texts:
            return
        texts, self._texts, self._size = self._texts, [], 0
        for name, pieces in texts:
            for chunk in _chunks(b"".join(pieces)):
                self._queue(frames.encode({"type": "stream", "name": name}, chunk))

    def _queue(self, data: bytes) -> None:
        self._frames.append(data)
        self._frames_size += len(data)
        if self._frames_size >= BATCH_BYTES:
            self._flush()
        else:
            self._arm()

    def _flush(self) -> None:
        """Send the frames that wait."""
        data, self._frames, self._frames_size = b"".join(self._frames), [], 0
        self._flushed = time.monotonic()
        if self._stream is not None and data:
            # A host that is gone ends this process by its supervisor; until then there is nobody to write to.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._stream.sendall(data)

    def _arm(self) -> None:
        if not self._armed and not self._idle:
            self._armed = True
            self._timer.start(BATCH_SECONDS)

    # -- the thread, and forked children -------------------------------------------------------------------------

    def _watch(self) -> None:
        poller = select.poll()
        for fd in (*self._pipes, self._timer.fd):
            poller.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            try:
                if self._timer.fd not in ready:
                    # More may come in a moment: one frame for a burst of prints, not one each.
                    time.sleep(BATCH_SECONDS)
                with self.lock:
                    if self._timer.fd in ready:
                        self._timer.clear()
                        self._armed = False
                    alive = self._drain_pipes()
                    self._frame_texts()
                    self._flush()
            except OSError:
                # The guest closed the descriptors under us; its stream too, or the next cell will say so.
                return
            if not alive:
                for pipe in self._pipes:
                    with contextlib.suppress(KeyError):
                        poller.unregister(pipe)

    def _become_child(self) -> None:
        """A forked child of the kernel prints through the pipes, never into the parent's stream."""
        if self._stream is None:
            return
        self.lock = threading.RLock()
        self._stream.close()
        self._stream = None
        self._texts, self._size = [], 0
        self._frames, self._frames_size = [], 0
        for fd in (*self._pipes, self._timer.fd):
            os.close(fd)


class _Timer:
    """A timer that makes a descriptor readable (timerfd_create(2); Python has it from 3.13 on)."""

    _CLOEXEC_NONBLOCK = 0o2004000
    _MONOTONIC = 1

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(self._MONOTONIC, self._CLOEXEC_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._settings: dict[float, ctypes.Array[ctypes.c_long]] = {}

    def start(self, seconds: float) -> None:
        """Fire once, so much later (below a second)."""
        setting = self._settings.get(seconds)
        if setting is None:
            # struct itimerspec: interval and value, each seconds and nanoseconds.
            setting = self._settings[seconds] = (ctypes.c_long * 4)(0, 0, 0, int(seconds * 1e9))
        self._libc.timerfd_settime(self.fd, 0, setting, None)

    def clear(self) -> None:
        """Take note that it fired."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 8)


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

"""The record of what an agent did: model interactions and executions, for people and for programs.

Everything about the log lives here; this file knows no session, no container and no workspace. Three laws:

- **The log never hurts the agent.** Nothing here raises into the caller or blocks its event loop: entries are put on a
  queue, one daemon thread writes them, and trouble is reported once, by the stdlib logger `actbox.logger`.
- **An entry is what it was when it was logged.** It becomes a line of JSON at the call; the human form is a view of it.
- **No text can forge an entry.** Messages carry the words of a model and of a guest. In the human file only an entry's
  first line begins at column 0, and no control character survives; in the JSONL file an entry is one line of ASCII.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import json
import logging
import os
import queue
import re
import stat
import sys
import threading
import traceback
import warnings
import weakref
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, cast

from actbox.errors import ExecutionError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Logger"]

_log = logging.getLogger("actbox.logger")

_CLOSE_TIMEOUT = 10.0  # seconds that closing, or the interpreter's exit, waits for a disk that does not answer
_BATCH = 256  # entries a write: a flood costs few system calls, a crash cuts off little
_MAX_REPR = 1000  # characters kept of the repr of a value that JSON does not know

# What a terminal or an editor acts on instead of showing: C0 (newline is handled apart), DEL, C1, marks that reorder or
# break lines (CVE-2021-42574), and lone surrogates, which UTF-8 cannot hold.
_UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Logger:
    """Writes entries to `file`, for people, and to `jsonl_file`, one JSON object a line, for programs.

    Both files are appended to, and made with their folder when the first entry comes. `jsonl_file` is `file` with the
    suffix `.jsonl` (`agent.log` and `agent.jsonl`). Without a file, the human form goes to stderr, and nowhere else.

    A JSONL entry has the fields `time` (ISO 8601, UTC, milliseconds), `kind` ("message" or "error"), `context` (list
    of frames, outermost first), `message`, `metadata` (an object or null), `error` (null, or `type`, `message`,
    `traceback` and `trace`, the traceback inside the sandbox or null) and `caller` (a module's name or null).

    One logger may be used by many tasks, threads and event loops at once, and made where no loop runs. No method
    raises, whatever the disk does: the first failure is reported to the stdlib logger `actbox.logger`, and what was
    lost from then on is counted by `dropped`. Entries are written as soon as the thread gets to them, so a crash loses
    at most the last few; after `aclose` all are on disk.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self.file = None if file is None else Path(file).absolute()  # the process may change its directory later
        self.jsonl_file = None if self.file is None else _beside(self.file)
        self._writer = _Writer(self.file, self.jsonl_file)

    @property
    def dropped(self) -> int:
        """Entries that are not, or not entirely, on disk: logged after a failure or after `aclose`."""
        return self._writer.dropped

    async def log(self, message: str, metadata: dict[str, Any] | None = None) -> None:
        """Log a message of any length, and facts about it. Waits for nothing, so it cannot be cancelled half-way.

        What JSON cannot hold in `metadata` is kept as its `repr`, cut to 1000 characters.
        """
        self._put("message", _safely(str, message), metadata)

    async def log_error(self, e: BaseException) -> None:
        """Log an exception with its traceback; of an `ExecutionError` also the traceback inside the sandbox."""
        trace = e.trace if isinstance(e, ExecutionError) else None
        error = {
            "type": _safely(_type_name, e),
            "message": _safely(str, e),
            "traceback": _safely(_traceback, e),
            "trace": None if trace is None else _safely(str, trace),
        }
        self._put("error", f"{error['type']}: {error['message']}", None, error)

    def context(self, frame: str) -> _Frame:
        """A block whose entries carry `frame`: `async with logger.context("turn 1"):`, or a plain `with`.

        Blocks nest. A task started inside a block inherits its frames; what a task enters, no other task sees.
        """
        return _Frame(self, _safely(str, frame))

    async def aclose(self) -> None:
        """Write everything that was logged and close the files. May be called again; entries from now on are dropped.

        Waits at most 10 seconds, also when cancelled meanwhile (the cancellation is raised afterwards): the end of a
        cancelled agent is what one wants to read most.
        """
        self._writer.close()
        loop = asyncio.get_running_loop()
        written = asyncio.wrap_future(self._writer.finished)
        deadline = loop.time() + _CLOSE_TIMEOUT
        cancelled: asyncio.CancelledError | None = None
        while not written.done() and (left := deadline - loop.time()) > 0:
            try:
                await asyncio.wait({written}, timeout=left)
            except asyncio.CancelledError as exc:
                cancelled = exc
        if not written.done():
            self._writer.report("stalled", f"closing did not finish within {_CLOSE_TIMEOUT:g} s")
        if cancelled is not None:
            raise cancelled

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_writer"):  # else the constructor was given something that is no path
            self._writer.forget()

    def __repr__(self) -> str:
        state = "closed" if self._writer.closed else "open"
        return f"<Logger {str(self.file or 'stderr')!r} {state} dropped={self.dropped}>"

    def _put(self, kind: str, message: str, metadata: object, error: dict[str, str | None] | None = None) -> None:
        record: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "kind": kind,
            "context": [frame.name for frame in _frames.get() if frame.logger is self],
            "message": message,
            "metadata": metadata if metadata is None or isinstance(metadata, dict) else {"metadata": metadata},
            "error": error,
            "caller": _caller(),
        }
        self._writer.put(_json_line(record))


class _Frame:
    """One frame of a logger's context, entered by `with` or `async with`."""

    def __init__(self, logger: Logger, name: str) -> None:
        self.logger = logger
        self.name = name

    def __enter__(self) -> None:
        _frames.set((*_frames.get(), self))

    def __exit__(self, *exc: object) -> None:
        # Not `ContextVar.reset`: it raises if the block ends in another task than it began in (an async generator that
        # the loop finalises, a fixture). There the frame is not in sight and there is nothing to take away.
        frames = _frames.get()
        if self in frames:
            last = len(frames) - 1 - frames[::-1].index(self)
            _frames.set(frames[:last] + frames[last + 1 :])

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *exc: object) -> None:
        self.__exit__()


# One variable for all loggers: a ContextVar made per object would be kept alive by every context that ever saw it.
_frames: ContextVar[tuple[_Frame, ...]] = ContextVar("actbox_log_frames", default=())


class _Writer:
    """The thread that owns the files. It knows lines, not loggers, so that a forgotten logger can be collected."""

    def __init__(self, file: Path | None, jsonl_file: Path | None) -> None:
        self.paths = () if file is None or jsonl_file is None else (file, jsonl_file)
        self.finished: Future[None] = Future()  # done when all that was logged is written and the files are closed
        # SimpleQueue: its `put` may be called by the collector in the midst of another `put`.
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # held for a few instructions, never while writing or reporting
        # All that changes, under the lock:
        self.closed = False
        self.dropped = 0
        self._thread: threading.Thread | None = None
        self._reported: set[str] = set()
        # Changed by the thread alone:
        self._files: list[BinaryIO] = []
        self._broken = False

    def put(self, line: str) -> None:
        problem = "it was closed before"
        with self._lock:
            if not self.closed:
                try:
                    self._start()
                except RuntimeError as exc:  # the process may have no more threads
                    problem = f"it has no thread to write with ({exc})"
                else:
                    self._queue.put(line)
                    return
            self.dropped += 1
        self.report("refused", problem)

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="actbox-logger", daemon=True)
            thread.start()
            self._thread = thread
            _writers.add(self)

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
            if self._thread is None:
                self.finished.set_result(None)
        self._queue.put(None)

    def forget(self) -> None:
        """The logger was collected. Called by the collector, so it takes no lock and waits for nothing."""
        if self._thread is not None and not self.closed:
            self._queue.put(None)
            warnings.warn(f"a Logger was not closed: {list(map(str, self.paths))}", ResourceWarning, stacklevel=2)

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT)

    def report(self, kind: str, problem: str) -> None:
        """Say, once for each kind of trouble, that entries are lost."""
        with self._lock:
            if kind in self._reported:
                return
            self._reported.add(kind)
        with suppress(Exception):  # a broken logging handler is no reason to stop the agent
            _log.error("the log %s loses entries: %s", [str(path) for path in self.paths] or "stderr", problem)

    def _run(self) -> None:
        going_on = True
        while going_on:
            batch = [self._queue.get()]
            with suppress(queue.Empty):
                while len(batch) < _BATCH:
                    batch.append(self._queue.get_nowait())
            going_on = None not in batch
            self._write([line for line in batch if line is not None])
        for file in self._files:
            with suppress(OSError):
                file.close()
        self.finished.set_result(None)

    def _write(self, lines: list[str]) -> None:
        if lines and not self._broken:
            try:
                self._write_to_files(lines)
            except Exception as exc:  # noqa: BLE001 - whatever it is, the agent goes on and closing must not hang
                self._broken = True
                self.report("broken", f"{type(exc).__name__}: {exc}")
        if self._broken:
            with self._lock:
                self.dropped += len(lines)

    def _write_to_files(self, lines: list[str]) -> None:
        people = "".join(map(_for_people, lines))
        if not self.paths:
            sys.stderr.write(people)
            sys.stderr.flush()
            return
        if not self._files:
            self.paths[0].parent.mkdir(parents=True, exist_ok=True)
            for path in self.paths:
                self._files.append(_open(path))
        for file, text in zip(self._files, (people, "".join(lines)), strict=True):
            rest = memoryview(text.encode())
            while rest:
                rest = rest[file.write(rest) :]


# Those whose thread lives: at the interpreter's exit they get their time.
_writers: weakref.WeakSet[_Writer] = weakref.WeakSet()


@atexit.register
def _drain() -> None:  # pyright: ignore[reportUnusedFunction] - atexit calls it
    writers = list(_writers)
    for writer in writers:
        writer.close()
    for writer in writers:
        writer.wait()


def _beside(file: Path) -> Path:
    beside = file.parent / f"{file.stem}.jsonl"
    return beside if beside != file else file.parent / f"{file.name}.jsonl"


def _open(path: Path) -> BinaryIO:
    """The file, unbuffered, for appending; a line that a crash cut off is ended first, so that ours begins a line."""
    file = path.open("ab", buffering=0)
    with suppress(OSError):
        found = os.fstat(file.fileno())
        if stat.S_ISREG(found.st_mode) and found.st_size:
            with path.open("rb") as before:
                before.seek(-1, os.SEEK_END)
                cut = before.read(1) != b"\n"
            if cut:
                file.write(b"\n")
    return file


def _for_people(line: str) -> str:
    """The human form of a JSONL line: one line at column 0, the rest of the text behind bars, then the metadata.

    ::

        2026-10-01T12:00:00.123Z [agent / turn 1] asked the model
            model: some-model
        2026-10-01T12:00:02.456Z [agent / turn 1] the model answers:
          | import math
          | print(math.pi)
            tokens: 12
            answer:
              | first line
              | second line
    """
    record: dict[str, Any] = json.loads(line)
    first, *rest = record["message"].split("\n")
    if (error := record["error"]) is not None:
        first = f"ERROR {first}"
        rest = error["traceback"].rstrip("\n").split("\n")  # it ends with the whole message
        if error["trace"] is not None:
            rest += ["", "Inside the sandbox:", *error["trace"].rstrip("\n").split("\n")]
    path = f"[{' / '.join(map(_one_line, record['context']))}]" if record["context"] else ""
    lines = [" ".join(filter(None, (record["time"], path, _one_line(first))))]
    lines += [f"  | {_one_line(text)}" for text in rest]
    metadata: dict[str, Any] = record["metadata"] or {}
    for key, value in metadata.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        first, *rest = shown.split("\n")
        # A name that begins like a line of a value is shown as a literal, which cannot.
        name = _one_line(key) if key[:1].isalnum() else ascii(key)
        if rest:
            lines.append(f"    {name}:")
            lines += [f"      | {_one_line(text)}" for text in (first, *rest)]
        else:
            lines.append(f"    {name}: {_one_line(first)}")
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _one_line(text: str) -> str:
    r"""The text with everything visible: ESC becomes `\x1b`, a right-to-left override `\u202e`, a newline `\n`."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text).replace("\n", "\\n")


def _json_line(record: dict[str, object]) -> str:
    """The entry as a line of JSON. Metadata with a NaN, a cycle or a key that is no name: each such value its repr."""
    try:
        return json.dumps(record, allow_nan=False, default=_repr) + "\n"
    except Exception:  # noqa: BLE001 - besides what json raises, what the metadata's own classes raise
        facts = cast("dict[object, object]", record["metadata"])  # all else in the record is text
        return json.dumps({**record, "metadata": _salvage(facts)}) + "\n"


def _salvage(metadata: dict[object, object]) -> dict[str, object]:
    try:
        items = list(metadata.items())
    except Exception:  # noqa: BLE001 - as above
        return {"metadata": _repr(metadata)}
    kept: dict[str, object] = {}
    for key, value in items:
        try:
            kept[_safely(str, key)] = json.loads(json.dumps(value, allow_nan=False, default=_repr))
        except Exception:  # noqa: BLE001 - as above
            kept[_safely(str, key)] = _repr(value)
    return kept


def _safely(show: Callable[[Any], str], value: object) -> str:
    try:
        return show(value)
    except Exception:  # noqa: BLE001 - foreign code runs here, and nothing of it may come out of the log
        return f"<{type(value).__name__} that cannot be shown>"


def _repr(value: object) -> str:
    text = _safely(repr, value)
    return text if len(text) <= _MAX_REPR else f"{text[: _MAX_REPR - 3]}..."


def _type_name(e: object) -> str:
    kind = type(e)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _traceback(e: BaseException) -> str:
    return "".join(traceback.format_exception(e))


def _caller() -> str | None:
    """The module that awaited `log`; None if that was made a task of its own, as then the caller cannot be seen."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals is globals():
        frame = frame.f_back
    name = None if frame is None else frame.f_globals.get("__name__")
    return name if isinstance(name, str) and not name.startswith("asyncio.") else None

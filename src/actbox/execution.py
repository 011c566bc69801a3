"""One cell or transfer, seen by who asked for it: many events, exactly one outcome.

Everything that affects what a caller of `stream`, `events` or `result` sees lives here; how the cell is run, and ended
when it will not end, is the client's affair.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

from actbox.clock import Clock
from actbox.errors import (
    ActboxError,
    ExecutionError,
    ExecutionInterrupted,
    ExecutionLost,
    ExecutionTimeout,
    InvalidArgument,
    KernelDied,
    LimitExceeded,
    ProtocolError,
)
from actbox.events import (
    CallRecord,
    Died,
    DisplayData,
    Event,
    Exceeded,
    ExecuteResult,
    Failed,
    Finished,
    Interrupted,
    KernelRestarted,
    Lost,
    Outcome,
    Overrun,
    Stream,
    TimedOut,
)
from actbox.files import looks_like
from actbox.outputs import Image, image_types, strip_ansi
from actbox.result import ExecutionResult, Fold, event_size

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
    from pathlib import Path

    from actbox.spec import Limits

logger = logging.getLogger(__name__)

# Events that wait for a reader. With one attached the guest has to wait beyond this; without, they are left out.
_BACKLOG_BYTES = 1 << 20
_BACKLOG_EVENTS = 4096
_MAX_IMAGES = 1000
# Seconds; beyond it a timer that any clock can hold is as good as the one asked for.
_LONGEST = 1e9


class Stopper(Protocol):
    """The client, as an execution needs it: to have the cell ended."""

    def stop(self, execution: Execution, why: Literal["interrupt", "timeout"], timeout: float = 0.0) -> None:
        """End the cell: by an interrupt, and by killing its kernel if that does not help."""
        ...


class Transfer(Protocol):
    """What an execution moves between host and kernel instead of running code.

    `failure` is what went wrong on this side, `left_out` the names of what an archive could not hold.
    """

    request: dict[str, Any]
    failure: Exception | None
    left_out: tuple[str, ...]

    async def send(self, send: Callable[[dict[str, Any], bytes], Awaitable[None]]) -> None:
        """Send what follows the request. Raises nothing but the built-in `ConnectionError`."""
        ...

    async def take(self, data: bytes) -> None:
        """A piece of the archive that comes. Raises `ProtocolError` if none should."""
        ...

    def release(self) -> None:
        """Send no more and keep no more: the transfer is being ended."""
        ...


class Execution:
    """A cell that was submitted; made by `ExecutionClient.submit`. With `transfer` it is one of files, and has no code.

    Any number of tasks may await `result` at once. `stream` and `events` share one sequence of events: an event goes
    to one reader.

    State: `_fold` and `_images`, what is kept of the output; `_events`, what waits for a reader, with its size;
    `_moved`, whether anything of an archive has come, or a call; `_changed`, completed and renewed whenever a reader
    should look again; `_waiting`, completed at the end; `_outcome`, set once. `clock` is the time that timeouts count,
    `calls` what the cell has called of the host's functions (the first 1000), `calls_over` the bound on calls that it
    has met.
    """

    def __init__(
        self,
        client: Stopper,
        code: str,
        keep_image: Callable[[bytes, str], Path | None],
        transfer: Transfer | None = None,
    ) -> None:
        self.code = code
        self.transfer = transfer
        self.keep_text: Callable[[str], str | None] | None = None
        self.clock = Clock()
        self.calls: list[CallRecord] = []
        self.calls_over: Overrun | None = None
        self._client = client
        self._keep_image = keep_image
        self._fold: Fold | None = None
        self._media_limit = 0
        self._images: list[Image] = []
        self._image_bytes = 0
        self._events: deque[Event] = deque()
        self._events_size = 0
        self._unread_bytes = 0
        self._readers = 0
        self._released = False
        self._changed: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._outcome: Outcome | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self.started: datetime | None = None
        self._began = 0.0
        self._duration = 0.0
        self._at_line_start = True
        self._moved = False

    def __repr__(self) -> str:
        state = "waiting" if self._fold is None else "running"
        return f"<Execution {self._outcome or state}>"

    # -- for the caller ------------------------------------------------------------------------------------------

    @property
    def outcome(self) -> Outcome | None:
        """How the cell ended; None while it has not."""
        return self._outcome

    @property
    def error(self) -> ActboxError | None:
        """The exception that `result` raises for how the cell ended, without its `result`; None if for none."""
        return ending(self._outcome, None if self._fold is None else self._fold.text(), self._what)

    @property
    def _what(self) -> str:
        return "cell" if self.transfer is None else "transfer"

    @property
    def restarted(self) -> bool:
        """Whether the cell ran in a fresh kernel because the one before had died: earlier state is lost."""
        return self._fold is not None and self._fold.restarted

    async def result(self, timeout: float = 120) -> ExecutionResult:
        """Wait for the cell's end.

        Args:
            timeout: seconds from this call, the time behind earlier cells included. Then the cell is interrupted; if
                it does not heed that within the client's grace, its kernel is killed.

        Raises:
            ExecutionError: the code raised, was interrupted, or its kernel died (see the subclasses).
            ExecutionTimeout: (a `TimeoutError`) time was up; says whether the state was kept.
            ExecutionLost: (a `ConnectionError`) the container is gone.
            ProtocolError: the guest broke the rules of the wire; its session was ended.
            InvalidArgument: `timeout` is no positive number.

        Cancelling the awaiting task interrupts the cell.
        """
        with self._deadline(timeout):
            await self._wait_for_end()
        return self._conclude()

    async def stream(self, timeout: float = 120) -> AsyncGenerator[str]:
        """The cell's text as it comes: what is printed, and the plain text of what is displayed.

        Arguments and errors are those of `result`, which is available at once when the stream has ended. Nothing is
        left out while the stream is being read: a guest that prints faster waits.
        """
        async for event in self.events(timeout):
            chunk = self._as_text(event)
            if chunk:
                yield chunk

    async def events(self, timeout: float = 120) -> AsyncGenerator[Event]:
        """Everything that the cell puts out, as it comes; arguments and errors are those of `result`."""
        with self._deadline(timeout):
            self._readers += 1
            try:
                while True:
                    while self._events:
                        yield self._take_event()
                    if self._outcome is not None:
                        break
                    self._changed = self._changed or asyncio.get_running_loop().create_future()
                    await self._or_interrupt(asyncio.shield(self._changed))
            finally:
                self._readers -= 1
                self._make_room()
        if self._unread_bytes:
            note = f"\n... [{self._unread_bytes} bytes came before anybody read, and were left out] ...\n"
            self._unread_bytes = 0
            yield Stream("stderr", note)
        self._conclude()

    async def interrupt(self) -> None:
        """Interrupt the cell, and wait until it has ended.

        It gets SIGINT; if it does not end within the client's grace its kernel is killed. Does nothing if it has
        ended. How it ended is in `outcome`.
        """
        if self._outcome is None:
            self._client.stop(self, "interrupt")
            await self._wait_for_end()

    def so_far(self) -> ExecutionResult:
        """What the cell has put out until now, whether it still runs, ended well or not."""
        count = self._outcome.execution_count if isinstance(self._outcome, Finished | Failed) else 0
        fold = self._fold or Fold(1024, 1024)
        error = self.error
        return fold.result(
            images=list(self._images),
            execution_count=count,
            duration=self._duration,
            ending=None if error is None else str(error),
            keep_text=self.keep_text,
        )

    # -- for the client ------------------------------------------------------------------------------------------

    def begin(self, limits: Limits, *, restarted: bool, rolled_back_to: int | None = None) -> None:
        """A kernel is about to get the cell: see `ExecutionResult` for what became of the one before."""
        if self._fold is None:
            self._fold = Fold(limits.output, limits.media)
            self._media_limit = limits.media
            self._began = asyncio.get_running_loop().time()
            self.started = datetime.now(UTC)
        if restarted or rolled_back_to is not None:
            event = KernelRestarted(rolled_back_to)
            self._fold.add(event)
            self._give_event(event)

    async def take(self, event: Event) -> None:
        """An event of the kernel. Returns when there is room for more."""
        assert self._fold is not None  # noqa: S101 - begin comes first
        if isinstance(event, DisplayData | ExecuteResult):
            for mime, data in image_types(event.data):
                await self._take_image(mime, data)
        self._fold.add(event)
        if not isinstance(event, Stream):
            # Frames that are at hand are taken without a pause: costly ones must leave the loop to others too.
            await asyncio.sleep(0)
        size = event_size(event)
        full = self._events_size + size > _BACKLOG_BYTES or len(self._events) >= _BACKLOG_EVENTS
        if full and (not self._readers or self._released):
            self._unread_bytes += size
            return
        self._give_event(event)
        while self._readers and not self._released and self._outcome is None and self._events_size > _BACKLOG_BYTES:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def send_archive(self, send: Callable[[dict[str, Any], bytes], Awaitable[None]]) -> None:
        """Send what follows a transfer's request; the transfer is ended if that fails here."""
        assert self.transfer is not None  # noqa: S101 - the client asks before
        # A stream that has ended is noticed where it is read.
        with suppress(OSError):
            await self.transfer.send(send)
        self._end_failed(self.transfer)

    async def take_archive(self, data: bytes) -> None:
        """A piece of a transfer's archive. Raises `ProtocolError` if it has none."""
        if self.transfer is None:
            raise ProtocolError("the kernel sent an archive that nobody asked for")
        self._moved = True
        await self.transfer.take(data)
        self._end_failed(self.transfer)

    def _end_failed(self, transfer: Transfer) -> None:
        if transfer.failure is not None:
            self._client.stop(self, "interrupt")

    def note_call(self) -> None:
        """The cell has called a function of the host: it cannot be run again as if it had not begun."""
        self._moved = True

    def release(self) -> None:
        """Let the kernel's output through though the reader is slow: the cell is being ended."""
        self._released = True
        if self.transfer is not None:
            self.transfer.release()
        self._make_room()

    def end(self, outcome: Outcome) -> None:
        """The one ending."""
        if self._outcome is None:
            self._outcome = outcome
            self._duration = asyncio.get_running_loop().time() - self._began if self._began else 0.0
            for waiting in self._waiting:
                if not waiting.done():
                    waiting.set_result(None)
            self._notify()
            self._make_room()

    @property
    def has_output(self) -> bool:
        """Whether the kernel has sent anything of this cell."""
        return self._moved or (self._fold is not None and self._fold.used)

    @property
    def fold(self) -> Fold | None:
        """What is kept so far."""
        return self._fold

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _deadline(self, timeout: float) -> Generator[None]:
        check_timeout(timeout)
        timer = self.clock.after(min(timeout, _LONGEST), self._client.stop, self, "timeout", timeout)
        try:
            yield
        finally:
            timer.cancel()

    async def _wait_for_end(self) -> None:
        if self._outcome is None:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                await self._or_interrupt(waiting)
            finally:
                self._waiting.remove(waiting)

    async def _or_interrupt(self, waiting: Awaitable[object]) -> None:
        try:
            await waiting
        except asyncio.CancelledError:
            self._client.stop(self, "interrupt")
            raise

    async def _take_image(self, mime: str, data: bytes) -> None:
        if not looks_like(data, mime):
            return
        if self._image_bytes + len(data) > self._media_limit or len(self._images) >= _MAX_IMAGES:
            return
        self._image_bytes += len(data)
        try:
            path = await asyncio.to_thread(self._keep_image, data, mime)
        except OSError as exc:
            # The caller's disk, not the cell's fault: the image itself is in the result.
            logger.warning("an image was not saved: %s", exc)
            path = None
        self._images.append(Image(data, mime, path))

    def _give_event(self, event: Event) -> None:
        self._events.append(event)
        self._events_size += event_size(event)
        self._notify()

    def _take_event(self) -> Event:
        event = self._events.popleft()
        self._events_size -= event_size(event)
        if self._events_size < _BACKLOG_BYTES // 2:
            self._make_room()
        return event

    def _notify(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
        self._changed = None

    def _make_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    def _as_text(self, event: Event) -> str:
        match event:
            case Stream(_, text):
                chunk = text
            case DisplayData(data) | ExecuteResult(data):
                plain = data.get("text/plain")
                chunk = f"{plain}\n" if isinstance(plain, str) and plain else ""
                if chunk and not self._at_line_start:
                    chunk = f"\n{chunk}"
            case _:
                return ""
        if chunk:
            self._at_line_start = chunk.endswith("\n")
        return chunk

    def _conclude(self) -> ExecutionResult:
        return conclude(self._outcome, self.so_far(), self._what)


def conclude(outcome: Outcome | None, result: ExecutionResult, what: str = "cell") -> ExecutionResult:
    """The result of a cell or transfer that ended well; else what `Execution.result` raises is raised."""
    error = ending(outcome, result.text, what)
    if error is None:
        return result
    error.result = result if result.ending is not None else replace(result, ending=str(error))
    raise error


def ending(outcome: Outcome | None, text: str | None, what: str) -> ActboxError | None:
    """The exception for how a cell or transfer ended; None if well, or not yet."""
    match outcome:
        case None | Finished():
            return None
        case Failed(error):
            return ExecutionError(
                f"{error.name}: {error.value}",
                strip_ansi(error.traceback),
                name=error.name,
                value=error.value,
                colored_trace=error.traceback,
                text=text,
            )
        case Interrupted(state_kept, error, _, back):
            trace = strip_ansi(error.traceback) if error else None
            return ExecutionInterrupted(state_kept=state_kept, trace=trace, text=text, what=what, rolled_back_to=back)
        case TimedOut(timeout, state_kept, started, back):
            return ExecutionTimeout(
                timeout, state_kept=state_kept, started=started, text=text, what=what, rolled_back_to=back
            )
        case Exceeded(overrun, state_kept, error, back):
            return LimitExceeded(
                overrun.limit,
                overrun.bound,
                overrun.use,
                state_kept=state_kept,
                trace=strip_ansi(error.traceback) if error else None,
                name=error.name if error else None,
                value=error.value if error else None,
                text=text,
                rolled_back_to=back,
            )
        case Died(signal, exit_code, reason, memory_limit, back):
            return KernelDied(
                signal=signal,
                exit_code=exit_code,
                reason=reason,
                memory_limit=memory_limit,
                text=text,
                rolled_back_to=back,
            )
        case Lost(reason, violation):
            if violation:
                return ProtocolError(reason)
            return ExecutionLost(f"{reason}: it is unknown whether the {what} had its effects", text=text)


def check_timeout(timeout: object) -> None:
    """Raises InvalidArgument unless `timeout` is a positive, finite number of seconds."""
    seconds = math.nan
    if isinstance(timeout, int | float) and not isinstance(timeout, bool):
        with suppress(OverflowError):
            seconds = float(timeout)
    if not 0 < seconds < math.inf:
        raise InvalidArgument("timeout", timeout, "pass a positive, finite number of seconds")

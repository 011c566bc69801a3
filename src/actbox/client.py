"""`ExecutionClient`: the host's handle on one kernel. Requests out, events in, one cell or transfer at a time."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import deque
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from actbox import endings, sessions
from actbox.calls import CellCalls
from actbox.endings import Stop, Why
from actbox.errors import (
    ConnectionError,
    InvalidArgument,
    ProtocolError,
    SandboxUnavailable,
    StateError,
)
from actbox.events import Died, Ended, Finished, Lost, Outcome, Overrun
from actbox.execution import Execution, check_timeout
from actbox.forking import DEFAULT_CHECKPOINTS, Forking
from actbox.forks import Step
from actbox.mcp import McpServers
from actbox.protocol import frames, messages
from actbox.saving import Saving
from actbox.sessions import read_overrun
from actbox.shielded import finish
from actbox.transfer import FileTransfers
from actbox.variables import Variables

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from pathlib import Path
    from types import TracebackType

    from actbox.copies import Copy
    from actbox.execution import Transfer
    from actbox.result import ExecutionResult
    from actbox.sessions import Session

logger = logging.getLogger(__name__)

DEFAULT_GRACE = 2.0
_MAX_CODE = 16 << 20
# How long the end of a kernel that was killed, or closed its stream, may take to be known.
_EXIT_SECONDS = 5.0


class ExecutionClient(Forking, FileTransfers, Variables, Saving, McpServers):
    """A stateful IPython session in a running container: made on entering the context, destroyed on leaving it.

    Cells and transfers of files run in the order in which they were submitted. One client belongs to one event loop;
    its methods may be called by any number of that loop's tasks.

    Args:
        port: the container's `port`.
        host: where the container runs.
        heartbeat_interval: seconds between signs of life over TCP. A client in the container's own process needs
            none: its stream ends with the kernel.
        token: the container's `token`; needed only in another process than the container's.
        interrupt_grace: seconds that an interrupted cell may take to end before its kernel is killed.
        recover: keep a copy of the session after each cell that ends well, and go back to it when the kernel dies or
            has to be killed; what went wrong then says which cell that was (`rolled_back_to`). It costs some
            milliseconds a cell, and memory for what cells change.
        max_checkpoints: how many checkpoints may be kept at one time; each is a process, see `Limits.pids`.

    State: `_queue`, what is to be done, the first of it being done; `_runner`, the task that does it; `_stops`, why the
    running execution is being ended; `_running_cell`, its number once the kernel has it; `_is_branch`, whether it was
    connected from the beginning. Which kernel it has is told in `Forking`.
    """

    def __init__(
        self,
        port: int,
        host: str = "localhost",
        heartbeat_interval: float = 10,
        *,
        token: str | None = None,
        interrupt_grace: float = DEFAULT_GRACE,
        recover: bool = False,
        max_checkpoints: int = DEFAULT_CHECKPOINTS,
    ) -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 1 << 16:
            raise InvalidArgument("port", port, "pass the port of a running container")
        check_timeout(heartbeat_interval)
        check_timeout(interrupt_grace)
        self.port = port
        self.host = host
        self._heartbeat = heartbeat_interval
        self._token = token
        self._grace = interrupt_grace
        self._connected = False
        self._begin(is_branch=False)
        super().__init__(recover=recover, max_checkpoints=max_checkpoints)

    def _begin(self, *, is_branch: bool) -> None:
        self._is_branch = is_branch
        self._queue: deque[Execution | Step] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._stops: dict[int, Stop] = {}
        self._running_cell = 0

    def make_branch(self, of: Copy) -> Self:
        """See `Forking`."""
        made = copy.copy(self)
        made._registry = self._registry.branch() if self._registry is not None else None  # noqa: SLF001 - one of its own kind
        made._begin(is_branch=True)  # noqa: SLF001
        made._begin_with(of)  # noqa: SLF001
        return made

    async def __aenter__(self) -> Self:
        if not self._is_branch:
            await self.connect()
        self._is_branch = False
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()

    def __repr__(self) -> str:
        state = "connected" if self._connected else "not connected"
        return f"<{type(self).__name__} {self.host}:{self.port}, {state}, {len(self._queue)} cells>"

    async def connect(self) -> None:
        """Create a kernel and connect to it.

        Raises:
            ConnectionError: no container answers, or it refuses.
            SandboxUnavailable: the session's boundary cannot be built.
            StateError: already connected.
        """
        if self._connected:
            raise StateError("this client is connected already")
        await self.begin_session()
        self._connected = True

    async def disconnect(self) -> None:
        """Destroy the kernel; a cell that still runs ends as lost. Bounded in time; may be called again."""
        self._connected = False
        session, self._session = self._session, None
        runner, self._runner = self._runner, None
        await finish(self._shut_down(session, runner))

    async def _shut_down(self, session: Session | None, runner: asyncio.Task[None] | None) -> None:
        # The runner first: it must not take the session's end for the kernel's death.
        if runner is not None:
            runner.cancel()
            await asyncio.wait([runner])
        if session is not None:
            await session.close()
        late, self._session = self._session, None
        if late is not None:
            await late.close()
        await self.close_copies()
        await self.close_servers()
        while self._queue:
            waiting = self._queue.popleft()
            if isinstance(waiting, Step):
                waiting.abandon()
            else:
                waiting.end(Lost("the client was disconnected"))

    async def execute(self, code: str, timeout: float = 120) -> ExecutionResult:
        """Run a cell and wait for its result; arguments and errors are those of `submit` and `Execution.result`."""
        check_timeout(timeout)
        execution = await self.submit(code)
        return await execution.result(timeout)

    async def submit(self, code: str) -> Execution:
        """Put a cell behind those submitted before; returns at once.

        Raises:
            InvalidArgument: `code` is no string, or longer than 16 MiB.
            StateError: not connected.
        """
        if not isinstance(code, str):
            raise InvalidArgument("code", code, "pass the cell's source as a string")
        if len(code) > _MAX_CODE:
            raise InvalidArgument("code", f"{len(code)} characters", f"a cell has at most {_MAX_CODE} characters")
        self.check_connected()
        return self._enqueue(Execution(self, code, self.keep_image))

    def check_connected(self) -> None:
        """See `FileTransfers`."""
        if not self._connected:
            raise StateError("this client is not connected: use `async with`, or await connect()")

    def submit_transfer(self, transfer: Transfer) -> Execution:
        """Put a transfer behind the cells and transfers submitted before; raises `StateError` unless connected."""
        self.check_connected()
        return self._enqueue(Execution(self, "", self.keep_image, transfer))

    async def carry_out(self, transfer: Transfer, timeout: float) -> None:
        """See `FileTransfers`."""
        await self.submit_transfer(transfer).result(timeout)

    def _enqueue(self, execution: Execution) -> Execution:
        execution.keep_text = self.keep_text
        self._queue.append(execution)
        self._start_runner()
        return execution

    def submit_step(self, step: Step) -> None:
        """See `Forking`."""
        self._queue.append(step)
        self._start_runner()

    def withdraw_step(self, step: Step) -> None:
        """See `Forking`."""
        self._queue.remove(step)

    def _start_runner(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run_queue())

    # -- for subclasses ------------------------------------------------------------------------------------------

    @property
    def session_key(self) -> str | None:
        """The key that the session is opened with."""
        return None

    def keep_image(self, data: bytes, mime_type: str) -> Path | None:  # noqa: ARG002 - for subclasses
        """Save an image and say where; called in a worker thread. This class saves none."""
        return None

    def keep_text(self, text: str) -> str | None:  # noqa: ARG002 - for subclasses
        """Keep a text where the session can read it, and say where, inside. This class keeps none."""
        return None

    async def note_end(self, execution: Execution) -> None:
        """Called once for every execution that ran, after its outcome is known."""

    async def open_session(self) -> Session:
        """A fresh kernel. Raises `ConnectionError`, `SandboxUnavailable`, `ProtocolError`."""
        return await sessions.connect(
            self.port, self.host, key=self.session_key, token=self._token, heartbeat=self._heartbeat
        )

    # -- running cells -------------------------------------------------------------------------------------------

    async def _run_queue(self) -> None:
        while self._queue:
            execution = self._queue[0]
            if isinstance(execution, Step):
                try:
                    await execution.run()
                finally:
                    if self._queue and self._queue[0] is execution:
                        self._queue.popleft()
                continue
            outcome: Outcome = Lost("the client was disconnected")
            try:
                outcome = await self._recovered(await self._run(execution))
            except Exception as exc:
                logger.exception("a cell could not be followed")
                outcome = Lost(f"actbox failed ({exc!r})")
                if self._session is not None:
                    await self.drop_session(self._session)
            finally:
                stop = self._stops.pop(id(execution), None)
                if stop is not None and stop.timer is not None:
                    stop.timer.cancel()
                self._running_cell = 0
                if self._queue and self._queue[0] is execution:
                    self._queue.popleft()
                execution.end(outcome)
            try:
                await self.note_end(execution)
            except Exception:
                # A note that cannot be taken is no reason to let the cells behind wait for ever.
                logger.exception("an execution's end could not be noted")
            if self._recovers and isinstance(outcome, Finished) and _changes_state(execution):
                await self.keep_good()

    async def _recovered(self, outcome: Outcome) -> Outcome:
        """The outcome, and if it cost the state and that could be had back, said so."""
        if isinstance(outcome, Ended) and self._session is None:
            number = await self.go_back_to_good()
            if number is not None:
                return replace(outcome, rolled_back_to=number)
        return outcome

    async def _run(self, execution: Execution) -> Outcome:
        for attempt in range(2):
            if not self._connected:
                break
            try:
                session = await self.live_session()
            except (ConnectionError, SandboxUnavailable, ProtocolError) as exc:
                return Lost(f"no kernel could be had ({exc})")
            if self._registry is not None:
                await self._registry.settle()
            stop = self._stops.get(id(execution))
            if stop is not None:
                return endings.not_started(stop)
            execution.begin(session.limits, restarted=self._lost_state, rolled_back_to=self._went_back)
            if execution.transfer is None:
                # A cell's result says what became of the state. A transfer has none: the next cell's will say it.
                self._lost_state, self._went_back = False, None
            self._cell += 1
            self._running_cell = self._cell
            with self._bounded(execution, session):
                outcome = await self._run_in(execution, session, self._cell)
            if outcome is not None:
                return outcome
            # The kernel was gone before it began the cell: nothing has run, a fresh one can take it.
            if attempt:
                return Died(reason="fresh kernels end before they begin a cell")
        return Lost("the client was disconnected")

    @contextmanager
    def _bounded(self, execution: Execution, session: Session) -> Generator[None]:
        """End the cell when one of the session's limits is passed meanwhile."""

        def end(overrun: Overrun) -> None:
            self.stop(execution, "limit", overrun=overrun)

        session.on_overrun = end
        wall = session.limits.wall
        timer = None
        if wall is not None:
            timer = execution.clock.after(wall, end, Overrun("wall", wall, wall))
        try:
            yield
        finally:
            session.on_overrun = None
            if timer is not None:
                timer.cancel()

    async def _run_in(self, execution: Execution, session: Session, cell: int) -> Outcome | None:
        """Send the cell and follow it to its end; None if the kernel was gone before it began."""
        sending: asyncio.Task[None] | None = None
        calls = CellCalls(self._registry, execution, session)
        try:
            sending = await self._send_request(execution, session, cell)
            while (frame := await session.receive()) is not None:
                message = messages.decode(frame)
                match message:
                    case messages.Reply(number) if number == cell and self._is_killed(execution):
                        # It came too late: what is told is how the kernel ends.
                        continue
                    case messages.Reply(number, status, count, left_out, passed) if number == cell:
                        if execution.transfer is not None and left_out:
                            execution.transfer.left_out = left_out
                        stop = self._stops.get(id(execution))
                        refused = read_overrun(passed, session.limits)
                        return endings.replied(execution, stop, status, count, refused)
                    case messages.Archive(number, data) if number == cell:
                        await execution.take_archive(data)
                    case messages.Call():
                        await calls.take(message)
                    case messages.Reply() | messages.Ready() | messages.SetupFailed() | messages.Archive():
                        raise ProtocolError(f"the kernel sent a {type(message).__name__} out of turn")
                    case _:
                        await execution.take(message)
        except ProtocolError as exc:
            await self.drop_session(session)
            return endings.violation(str(exc))
        except (OSError, frames.FrameError):
            # The stream ended while it was written to.
            pass
        finally:
            if sending is not None:
                sending.cancel()
                await asyncio.wait([sending])
            await calls.close()
        return await self._after_end(execution, session, cell)

    async def _send_request(self, execution: Execution, session: Session, cell: int) -> asyncio.Task[None] | None:
        """Send the cell, or what a transfer asks for; what sends the rest of it, if there is any."""
        if self._registry is not None:
            # Before whatever it is: a state that is restored may hold functions of the host too.
            await self._registry.announce(session)
        if execution.transfer is None:
            code = execution.code.encode("utf-8", "surrogatepass")
            await session.send({"type": "execute", "id": cell}, code)
            return None
        await session.send({**execution.transfer.request, "id": cell})
        # Beside the reading: the kernel may end an upload before all of it was sent.
        return asyncio.create_task(execution.send_archive(_numbered(session, cell)))

    def _is_killed(self, execution: Execution) -> bool:
        stop = self._stops.get(id(execution))
        return stop is not None and stop.killed

    async def _after_end(self, execution: Execution, session: Session, cell: int) -> Outcome | None:
        exit_ = await session.exited(_EXIT_SECONDS / 5)
        lived_on = exit_ is None
        if lived_on:
            # The kernel closed its stream but lives on: it is of no more use.
            session.kill()
            exit_ = await session.exited(_EXIT_SECONDS)
        await self.drop_session(session)
        return endings.ended(execution, self._stops.get(id(execution)), cell, exit_, lived_on=lived_on)

    # -- ending cells --------------------------------------------------------------------------------------------

    def stop(
        self,
        execution: Execution,
        why: Why,
        timeout: float = 0.0,
        overrun: Overrun | None = None,
    ) -> None:
        """End a cell: an interrupt first, and the kernel's death if that does not help. Returns at once."""
        if execution.outcome is not None or id(execution) in self._stops:
            return
        if execution not in self._queue:
            return
        if execution is not self._queue[0]:
            self._queue.remove(execution)
            execution.end(endings.not_started(Stop(why, timeout)))
            return
        stop = Stop(why, timeout, overrun)
        self._stops[id(execution)] = stop
        execution.release()
        session = self._session
        if session is not None and self._running_cell:
            session.interrupt(self._running_cell)
            stop.timer = asyncio.get_running_loop().call_later(self._grace, _kill, stop, session)


def _changes_state(execution: Execution) -> bool:
    """Whether it may have changed variables: as a cell, or as a request that puts some there."""
    return execution.transfer is None or execution.transfer.request["type"] in ("set", "restore")


def _kill(stop: Stop, session: Session) -> None:
    stop.killed = True
    session.kill()


def _numbered(session: Session, cell: int) -> Callable[[dict[str, Any], bytes], Awaitable[None]]:
    """Sends frames that belong to this cell."""

    async def send(header: dict[str, Any], payload: bytes) -> None:
        await session.send({**header, "id": cell}, payload)

    return send

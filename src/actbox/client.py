"""`ExecutionClient`: the host's handle on one kernel. Requests out, events in, one cell or transfer at a time."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from actbox import sessions
from actbox.errors import (
    CheckpointMissing,
    ConnectionError,
    ExecutionTimeout,
    ForkRefused,
    InvalidArgument,
    LimitExceeded,
    ProtocolError,
    SandboxUnavailable,
    SessionBroken,
    StateError,
)
from actbox.events import (
    Died,
    Ended,
    Error,
    Exceeded,
    Failed,
    Finished,
    Interrupted,
    Lost,
    Outcome,
    Overrun,
    TimedOut,
)
from actbox.execution import Execution, check_timeout
from actbox.forks import Checkpoint, Checkpoints, Copy, Files, Step, ask, copy_of
from actbox.functions import CellCalls, is_budget
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

    from actbox.execution import Transfer
    from actbox.result import ExecutionResult
    from actbox.sessions import Exit, Session

logger = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_GRACE = 2.0
DEFAULT_CHECKPOINTS = 32
# Of one copy: the kernel may hold gigabytes, and the machine be busy.
_COPY_SECONDS = 60.0
_LONGEST = 1e9
_MAX_CODE = 16 << 20
# How long the end of a kernel that was killed, or closed its stream, may take to be known.
_EXIT_SECONDS = 5.0


@dataclass(slots=True)
class _Stop:
    """Why a running cell is being ended, the timer that will kill its kernel, and whether it has."""

    why: Literal["interrupt", "timeout", "limit"]
    timeout: float
    overrun: Overrun | None = None
    killed: bool = False
    timer: asyncio.TimerHandle | None = None


class ExecutionClient(FileTransfers, Variables, Saving, McpServers):
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

    State: `_queue`, what is to be done, the first of it being done; `_runner`, the task that does it; `_session`,
    the kernel, None before the first and after a death; `_lost_state`, whether the next cell begins without its state;
    `_stops`, why the running execution is being ended; `_cell`, the number of the last request sent; `_is_branch`,
    whether it was connected from the beginning.
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
        if isinstance(max_checkpoints, bool) or not isinstance(max_checkpoints, int) or max_checkpoints < 0:
            raise InvalidArgument("max_checkpoints", max_checkpoints, "pass a whole number of at least 0")
        self.port = port
        self.host = host
        self._heartbeat = heartbeat_interval
        self._token = token
        self._grace = interrupt_grace
        self._recovers = recover
        self._max_checkpoints = max_checkpoints
        self._connected = False
        self._lost_state = False
        self._session: Session | None
        self._begin()

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
        self._session = await self.open_session()
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
        await self._checkpoints.close()
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

    def _start_runner(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run_queue())

    # -- copies --------------------------------------------------------------------------------------------------

    async def fork(self, *, force: bool = False, timeout: float = 120) -> Self:
        """Copy the session, in its turn behind the cells submitted before.

        The copy has every variable and import, in the same memory until one of the two writes; from then on both go on
        by themselves, with clients of their own. The copy is connected: leave its context, or `disconnect` it, to end
        it; it does not end with this one. What is random in Python and NumPy by itself differs between the two; a
        generator that a cell has made is a variable like others. Folders, `/tmp`, open files with their positions,
        and processes are shared: the two are not protected from each other, and `Limits` bound them together.

        Args:
            force: copy all the same if there are threads, asyncio tasks or running subprocesses, which the copy will
                not have.
            timeout: seconds, the time behind cells submitted before included.

        Raises:
            ForkRefused: a copy would miss something, which is named.
            LimitExceeded: one of the session's limits (`pids`, `memory`) does not allow it.
            SessionBroken: the kernel did not answer as it must; its state is lost.
            ExecutionTimeout: it was not this request's turn in time.
            InvalidArgument, StateError: as of `submit`.
        """
        return await self._do(timeout, lambda: self._fork(force=force))

    async def _fork(self, *, force: bool, prepare: Callable[[Self], Awaitable[None]] | None = None) -> Self:
        branch = self._twin(await self._copy(force=force))
        if prepare is not None:
            try:
                await prepare(branch)
            except BaseException:
                await finish(branch.disconnect())
                raise
        return branch

    def _twin(self, of: Copy) -> Self:
        """A client like this one, of another session."""
        made = copy.copy(self)
        made._begin(of)  # noqa: SLF001 - one of its own kind
        return made

    def _begin(self, of: Copy | None = None) -> None:
        self._session = of.session if of is not None else None
        self._is_branch = of is not None
        self._registry = self._registry.branch() if self._registry is not None else None
        self._queue: deque[Execution | Step] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._stops: dict[int, _Stop] = {}
        self._running_cell = 0
        self._cell = of.requests if of is not None else 0
        self._checkpoints = Checkpoints(self._max_checkpoints)

    async def checkpoint(self, name: str, *, force: bool = False, timeout: float = 120) -> Checkpoint:
        """Keep the session as it is now, for `rollback`; in its turn, and at the price of a `fork`.

        Args:
            name: 1 to 100 printable characters; an older checkpoint of the same name is replaced.
            force: see `fork`, as are `timeout` and the errors.
            timeout: see there.

        Raises:
            StateError: there are `max_checkpoints` already.
        """
        self._checkpoints.check_name(name)
        return await self._do(timeout, lambda: self._park(name, force=force))

    async def _park(
        self, name: str, *, force: bool, save: Callable[[Copy], Awaitable[Files]] | None = None
    ) -> Checkpoint:
        self._checkpoints.check_name(name)
        made = await self._copy(force=force)
        try:
            files = await save(made) if save is not None else None
        except BaseException:
            await finish(made.session.close())
            raise
        return await self._checkpoints.keep(name, made, files)

    async def rollback(self, name: str, *, timeout: float = 120) -> Checkpoint:
        """Go back to a checkpoint, whatever has become of the session since; in its turn behind cells submitted before.

        The session is then a copy of the checkpoint, which can be gone back to again. Files stay as they are, unless
        they were kept with it.

        Raises:
            CheckpointMissing: (a `KeyError`) there is none of this name, or its process is gone; nothing has changed.
            LimitExceeded: one of the session's limits (`pids`, `memory`) does not allow it; nothing has changed.
            ExecutionTimeout, InvalidArgument, StateError: as of `fork`.
        """
        self._checkpoints.find(name)
        return await self._do(timeout, lambda: self._go_back(name))

    async def _go_back(self, name: str) -> Checkpoint:
        parked = self._checkpoints.find(name)
        made = await self._checkpoints.wake(parked)
        if parked.files is not None:
            try:
                await self.restore_files(made, parked.files)
            except BaseException:
                await finish(made.session.close())
                raise
        await self._replace_session(made)
        self.note_rollback(parked.checkpoint)
        if self._recovers:
            # What was kept since is what nobody wants any more.
            await self._keep_good()
        return parked.checkpoint

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that can be gone back to, the oldest first."""
        kept = [parked.checkpoint for parked in self._checkpoints.parked.values() if not parked.session.ended]
        return sorted(kept, key=lambda checkpoint: checkpoint.created)

    async def discard(self, name: str) -> None:
        """Let a checkpoint go. Raises `CheckpointMissing`."""
        await self._checkpoints.discard(name)

    async def _copy(self, *, force: bool) -> Copy:
        try:
            session = await self._live_session()
        except (ConnectionError, SandboxUnavailable, ProtocolError) as exc:
            raise SessionBroken(f"no kernel could be had ({exc})") from exc
        self._cell += 1
        try:
            return await copy_of(session, self._cell, force=force, timeout=_COPY_SECONDS)
        except SessionBroken:
            await self._drop(session)
            await self._go_back_to_good()
            raise

    async def _replace_session(self, found: Copy) -> None:
        older, self._session = self._session, found.session
        self._lost_state = False
        self._cell = found.requests
        if older is not None:
            await finish(older.close())

    async def _keep_good(self) -> None:
        """Keep the session as the last good state; what cannot be copied is gone back behind."""
        session = self._session
        if session is None or session.ended:
            return
        self._cell += 1
        try:
            await self._checkpoints.keep_good(await copy_of(session, self._cell, force=False, timeout=_COPY_SECONDS))
        except (ForkRefused, LimitExceeded) as exc:
            logger.info("the session's state was not kept: %s", exc)
        except SessionBroken:
            await self._drop(session)
            await self._go_back_to_good()

    async def _go_back_to_good(self) -> int | None:
        """Take up the last good state; the number of its cell, None if there is none to be had."""
        good = self._checkpoints.good
        if good is None or not self._connected:
            return None
        try:
            await self._replace_session(await self._checkpoints.wake(good))
        except (CheckpointMissing, LimitExceeded) as exc:
            logger.warning("the last good state is lost too: %s", exc)
            return None
        return good.checkpoint.cell

    async def _do(self, timeout: float, work: Callable[[], Awaitable[T]]) -> T:
        """Have something done in turn with the executions. Once it has begun it is done to its end."""
        check_timeout(timeout)
        self.check_connected()
        step = Step(work)
        self._queue.append(step)
        self._start_runner()
        try:
            await asyncio.wait([step.done], timeout=min(timeout, _LONGEST))
            if not step.begun and not step.done.done():
                self._queue.remove(step)
                raise ExecutionTimeout(timeout, state_kept=True, started=False, what="request")
            return await asyncio.shield(step.done)
        except asyncio.CancelledError:
            await finish(self._undo(step))
            raise

    async def _undo(self, step: Step) -> None:
        """Nobody wants what a step makes any more."""
        if not step.begun and step in self._queue:
            self._queue.remove(step)
            return
        await asyncio.wait([step.done])
        if step.done.exception() is None and isinstance(step.done.result(), ExecutionClient):
            await step.done.result().disconnect()

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

    def note_rollback(self, checkpoint: Checkpoint) -> None:
        """Called when the session has gone back to a checkpoint."""

    async def restore_files(self, made: Copy, files: Files) -> None:
        """Put files back that were kept with a checkpoint. This class keeps none."""

    async def ask(self, request: dict[str, Any]) -> None:
        """Have the kernel do something that is no cell, when nothing else is sent to it. Raises as `forks.ask`."""
        assert self._session is not None  # noqa: S101 - for twins, which begin with one
        self._cell += 1
        await ask(self._session, {**request, "id": self._cell})

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
                    await self._drop(self._session)
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
            if self._recovers and isinstance(outcome, Finished) and execution.transfer is None:
                await self._keep_good()

    async def _recovered(self, outcome: Outcome) -> Outcome:
        """The outcome, and if it cost the state and that could be had back, said so."""
        if isinstance(outcome, Ended) and self._session is None:
            number = await self._go_back_to_good()
            if number is not None:
                return replace(outcome, rolled_back_to=number)
        return outcome

    async def _run(self, execution: Execution) -> Outcome:
        for attempt in range(2):
            if not self._connected:
                break
            try:
                session = await self._live_session()
            except (ConnectionError, SandboxUnavailable, ProtocolError) as exc:
                return Lost(f"no kernel could be had ({exc})")
            stop = self._stops.get(id(execution))
            if stop is not None:
                return _not_started(stop)
            execution.begin(session.limits, restarted=self._lost_state)
            if execution.transfer is None:
                # A cell's result says that the state was lost. A transfer has none: the next cell's will say it.
                self._lost_state = False
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

    async def _live_session(self) -> Session:
        session = self._session
        if session is not None and not session.ended:
            return session
        if session is not None:
            await session.close()
            self._session = None
            self._lost_state = True
        self._session = await self.open_session()
        return self._session

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
                        return self._ending(execution, status, count, read_overrun(passed, session.limits))
                    case messages.Archive(number, data) if number == cell:
                        await execution.take_archive(data)
                    case messages.Call():
                        await calls.take(message)
                    case messages.Reply() | messages.Ready() | messages.SetupFailed() | messages.Archive():
                        raise ProtocolError(f"the kernel sent a {type(message).__name__} out of turn")
                    case _:
                        await execution.take(message)
        except ProtocolError as exc:
            await self._drop(session)
            return _violation(str(exc))
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

    def _ending(self, execution: Execution, status: str, count: int, refused: Overrun | None) -> Outcome:
        stop = self._stops.get(id(execution))
        error = execution.fold.error if execution.fold is not None else None
        if stop is not None and stop.why == "timeout":
            return TimedOut(stop.timeout, state_kept=True)
        if stop is not None and stop.overrun is not None:
            return Exceeded(stop.overrun, state_kept=True)
        if stop is not None and status == "interrupted":
            return Interrupted(state_kept=True, error=error)
        if status == "ok":
            return Finished(count)
        if error is not None and execution.calls_over is not None and is_budget(error.name):
            return Exceeded(execution.calls_over, state_kept=True, error=error)
        if refused is not None and error is not None:
            return Exceeded(refused, state_kept=True, error=error)
        return Failed(error or Error("KeyboardInterrupt" if status == "interrupted" else "Error", "", ""), count)

    async def _after_end(self, execution: Execution, session: Session, cell: int) -> Outcome | None:
        exit_ = await session.exited(_EXIT_SECONDS / 5)
        lives_on = exit_ is None
        if lives_on:
            # The kernel closed its stream but lives on: it is of no more use.
            session.kill()
            exit_ = await session.exited(_EXIT_SECONDS)
        await self._drop(session)
        stop = self._stops.get(id(execution))
        if exit_ is not None and exit_.violation is not None:
            return _violation(exit_.violation)
        if exit_ is not None and exit_.gone:
            return Lost("the container is gone")
        if exit_ is not None and exit_.overrun is not None:
            return Exceeded(exit_.overrun, state_kept=False)
        if stop is not None:
            if stop.overrun is not None:
                return Exceeded(stop.overrun, state_kept=False)
            if stop.why == "timeout":
                return TimedOut(stop.timeout, state_kept=False)
            return Interrupted(state_kept=False)
        if exit_ is not None and exit_.killed and not lives_on:
            return Lost("the session was closed")
        if exit_ is not None and exit_.begun is not None and exit_.begun < cell and not execution.has_output:
            return None
        return Died(reason="it closed its stream and was killed") if lives_on else _death(exit_)

    async def _drop(self, session: Session) -> None:
        """The session is of no more use; the next cell gets another, and is told so."""
        if self._session is session:
            self._session = None
            self._lost_state = True
        await session.close()

    # -- ending cells --------------------------------------------------------------------------------------------

    def stop(
        self,
        execution: Execution,
        why: Literal["interrupt", "timeout", "limit"],
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
            execution.end(_not_started(_Stop(why, timeout)))
            return
        stop = _Stop(why, timeout, overrun)
        self._stops[id(execution)] = stop
        execution.release()
        session = self._session
        if session is not None and self._running_cell:
            session.interrupt(self._running_cell)
            stop.timer = asyncio.get_running_loop().call_later(self._grace, _kill, stop, session)


def _kill(stop: _Stop, session: Session) -> None:
    stop.killed = True
    session.kill()


def _numbered(session: Session, cell: int) -> Callable[[dict[str, Any], bytes], Awaitable[None]]:
    """Sends frames that belong to this cell."""

    async def send(header: dict[str, Any], payload: bytes) -> None:
        await session.send({**header, "id": cell}, payload)

    return send


def _violation(what: str) -> Lost:
    return Lost(f"the session was ended, its guest broke the rules of the wire: {what}", violation=True)


def _not_started(stop: _Stop) -> Outcome:
    if stop.why == "timeout":
        return TimedOut(stop.timeout, state_kept=True, started=False)
    return Interrupted(state_kept=True, started=False)


def _death(exit_: Exit | None) -> Died:
    if exit_ is None or exit_.status is None:
        return Died(reason="nothing is known of its end")
    if os.WIFSIGNALED(exit_.status):
        return Died(signal=os.WTERMSIG(exit_.status), memory_limit=exit_.memory_limit)
    return Died(exit_code=os.waitstatus_to_exitcode(exit_.status))

"""`AttachedClient`: the host's handle on a named session that goes on when its client has gone."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from actbox import sessions
from actbox.connecting import Address
from actbox.errors import (
    ConnectionError,
    ExecutionLost,
    InvalidArgument,
    SessionGone,
    StateError,
    StillRunning,
)
from actbox.execution import check_timeout, conclude
from actbox.lines import Change, Wish, check_name
from actbox.rejoining import Rejoining
from actbox.saving import Saving
from actbox.shielded import finish
from actbox.transfer import FileTransfers
from actbox.variables import Variables

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from types import TracebackType

    from actbox.checkpoint import Checkpoint
    from actbox.events import Outcome
    from actbox.execution import Transfer
    from actbox.journal import Numbered
    from actbox.lines import Ending, Line, Standing
    from actbox.result import ExecutionResult

T = TypeVar("T")
Kind = Literal["checkpoint", "rollback", "discard", "fork"]
_MAX_CODE = 16 << 20
# Seconds: a gateway takes who says nothing for 90 for gone.
_LONGEST_BEAT = 25.0
_LONGEST = 1e9


class AttachedClient(FileTransfers, Variables, Saving):
    """A client of a session that has a name: attached on entering the context, detached on leaving it.

    The session lives in the process that runs the container. It is made by the first client that would drive it, goes
    on when that leaves or its process ends, and ends with `end`, with its time to live, or with the container. What
    cells put out meanwhile is kept in a journal for whoever comes next. Any number of clients may watch, one may drive.

    Files, variables and saved states go in and out as with `ExecutionClient`, and only for the client that drives. Such
    a transfer is bound to its client: it ends when that leaves, and is `ExecutionLost` if its connection breaks. It has
    no id and no journal.

    One client belongs to one event loop; its methods may be called by any number of that loop's tasks.

    Args:
        port: the container's `port`.
        name: the session's: 1 to 100 printable characters.
        host: where the container runs.
        token: the container's `token`; needed only in another process than the container's.
        key: of a container with a workspace: the executor key that a new session gets. None for none, or for that
            which the session has.
        ttl: seconds that the session is kept from when its last client has left, whether cells still run or not. That
            of the client that came last to drive is in force.
        drive: submit cells and interrupt them; False only to watch what others do.
        take_over: drive in the place of the client that does now, which may go on watching.
        recover: have a new session keep its last good state; see `ExecutionClient`.
        heartbeat_interval: seconds between signs of life over TCP, 25 at the most.
        patience: seconds for which a connection that broke is made anew, until something comes by it again. Nothing is
            lost or doubled by that.

    State: `_line`, while attached.
    """

    def __init__(
        self,
        port: int,
        name: str,
        *,
        host: str = "localhost",
        token: str | None = None,
        key: str | None = None,
        ttl: float = 600.0,
        drive: bool = True,
        take_over: bool = False,
        recover: bool = False,
        heartbeat_interval: float = 10,
        patience: float = 30.0,
    ) -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 1 << 16:
            raise InvalidArgument("port", port, "pass the port of a running container")
        check_name("name", name)
        for seconds in (ttl, heartbeat_interval, patience):
            check_timeout(seconds)
        self.port = port
        self.host = host
        self.name = name
        self._token = token
        self._heartbeat = heartbeat_interval
        self._patience = patience
        client = secrets.token_hex(16)
        self._wish = Wish(name, client, key, ttl, bool(drive), bool(take_over), recover=bool(recover))
        self._line: Line | None = None

    async def __aenter__(self) -> Self:
        await self.attach()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.detach()

    def __repr__(self) -> str:
        state = "attached" if self._line is not None else "not attached"
        return f"<{type(self).__name__} {self.name!r} at {self.host}:{self.port}, {state}>"

    async def attach(self) -> None:
        """Attach to the session, or make it.

        Raises:
            DriveRefused: another client drives it, and `take_over` was not asked for.
            SessionGone: there is none of this name, and this client would only watch.
            ConnectionError: no container answers, the token is wrong, or no kernel can be had.
            SandboxUnavailable: a new session's boundary cannot be built.
            InvalidArgument: a name or key that cannot be used, or a key that is not the session's.
            StateError: attached already; or there are too many sessions, or too many clients of this one.
        """
        if self._line is not None:
            raise StateError("this client is attached already")
        door = sessions.find_door(self.port, self.host)
        if door is not None:
            self._line = await door.attach(self._wish)
            return
        if self._token is None:
            raise ConnectionError(
                f"no container of this process has port {self.port}; to reach one of another process pass its token"
            )
        line = Rejoining(
            Address(self.host, self.port, self._token, min(self._heartbeat, _LONGEST_BEAT)), self._wish, self._patience
        )
        try:
            await line.open()
        except BaseException:
            await finish(line.leave())
            raise
        self._line = line

    async def detach(self) -> None:
        """Leave the session, which goes on. Bounded in time; may be called again."""
        line, self._line = self._line, None
        if line is not None:
            await finish(line.leave())

    async def end(self) -> None:
        """End the session for everybody, and detach. Raises `DriveRefused`, `ConnectionError`, `StateError`."""
        await self.line().end()
        await self.detach()

    async def submit(self, code: str, timeout: float = 120, *, id: str | None = None) -> AttachedExecution:  # noqa: A002 - what it is
        """Put a cell behind those submitted before; returns once the session has it.

        Args:
            code: the cell's source.
            timeout: seconds from now, the time behind earlier cells included. Then the cell is interrupted, and its
                kernel killed if that does not help, whether anybody is attached or not.
            id: how the execution can be found again: 1 to 100 printable characters, which no other cell of this session
                has. If the same cell was submitted with it before, that is the execution, and nothing is run. None for
                one that is chosen at random.

        Raises:
            DriveRefused: this client only watches, or another has taken over.
            InvalidArgument: `code`, `timeout` or `id` cannot be used.
            StateError: not attached, or too many cells wait.
            SessionGone: the session has ended.
            ConnectionError: it cannot be reached; whether it has the cell is unknown, and submitting it again with the
                same id is safe.
        """
        if not isinstance(code, str):
            raise InvalidArgument("code", code, "pass the cell's source as a string")
        if len(code) > _MAX_CODE:
            raise InvalidArgument("code", f"{len(code)} characters", f"a cell has at most {_MAX_CODE} characters")
        check_timeout(timeout)
        if id is not None:
            check_name("id", id)
        execution = AttachedExecution(self.line, id if id is not None else secrets.token_hex(8))
        await self.line().submit(execution.id, code, timeout)
        return execution

    async def execute(self, code: str, timeout: float = 120) -> ExecutionResult:
        """Run a cell and wait for its result; errors are those of `submit` and `AttachedExecution.result`."""
        execution = await self.submit(code, timeout)
        return await execution.result()

    async def executions(self) -> list[Standing]:
        """The executions that are known, in the order in which they were submitted, and where each stands.

        Kept are those that wait or run, and of those that have ended the last 100, as far as 64 MiB hold what they put
        out. Raises `SessionGone`, `ConnectionError`, `StateError`.
        """
        return await self.line().executions()

    def execution(self, id: str) -> AttachedExecution:  # noqa: A002
        """The execution of this id, whoever submitted it. Whether there is one shows when something of it is asked."""
        return AttachedExecution(self.line, id)

    # -- the session as a whole ----------------------------------------------------------------------------------

    async def checkpoint(
        self, name: str, *, files: bool = False, force: bool = False, timeout: float = 120
    ) -> Checkpoint:
        """Keep the session as it is now, for `rollback`, in its turn behind the cells submitted before.

        It is done whether anybody is attached or not; a task that is cancelled while it waits cancels nothing else.
        Arguments and errors are those of `CodeExecutor.checkpoint`; `files` needs a session with a key. This one and
        the methods that follow raise too:
            DriveRefused: this client does not drive the session (not for `checkpoints`).
            SessionGone: the session has ended.
            ConnectionError: it cannot be reached; whether this was done is unknown.
        """
        (made,) = await self._change("checkpoint", name, timeout, force=force, files=files)
        return made

    async def rollback(self, name: str, *, timeout: float = 120) -> Checkpoint:
        """Go back to a checkpoint; see `CodeExecutor.rollback`."""
        (found,) = await self._change("rollback", name, timeout)
        return found

    async def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that can be gone back to, the oldest first."""
        return await self.line().checkpoints()

    async def discard(self, name: str) -> None:
        """Let a checkpoint go. Raises `CheckpointMissing`."""
        await self._change("discard", name, 1)

    async def fork(
        self,
        name: str,
        *,
        key: str | None = None,
        files: Literal["shared", "copy"] = "shared",
        force: bool = False,
        timeout: float = 120,
    ) -> AttachedClient:
        """Copy the session; the copy is a named session too, and belongs to the container.

        Args:
            name: the new session's, which no other has.
            key: as of `CodeExecutor.fork`, as are those that follow; this and a copy of the files need a session with
                a key.
            files: see there.
            force: see there.
            timeout: see there.

        Returns:
            A client for the new session, not attached; if none is within `ttl` seconds the session ends.

        Raises:
            InvalidArgument: there is a session of this name; else as `CodeExecutor.fork`.
        """
        check_name("name", name)
        if files not in ("shared", "copy"):
            raise InvalidArgument("files", files, 'pass "shared" or "copy"')
        await self._change("fork", name, timeout, force=force, files=files == "copy", key=key)
        return AttachedClient(
            self.port,
            name,
            host=self.host,
            token=self._token,
            ttl=self._wish.ttl,
            heartbeat_interval=self._heartbeat,
            patience=self._patience,
        )

    async def _change(self, kind: Kind, name: str, timeout: float, **more: Any) -> list[Checkpoint]:
        check_timeout(timeout)
        return await self.line().change(Change(kind, name, secrets.token_hex(16), timeout, **more))

    # -- for transfers -------------------------------------------------------------------------------------------

    def check_connected(self) -> None:
        """See `FileTransfers`."""
        self.line()

    async def carry_out(self, transfer: Transfer, timeout: float) -> None:
        """See `FileTransfers`."""
        try:
            ending = await self.line().carry(transfer, timeout)
        except (SessionGone, ConnectionError) as exc:
            if isinstance(exc, ExecutionLost):
                raise
            raise ExecutionLost(f"{exc}: it is unknown whether the transfer had its effects") from exc
        conclude(ending.outcome, ending.result, "transfer")

    def line(self) -> Line:
        """How to reach the session. Raises `StateError` unless attached."""
        if self._line is None:
            raise StateError("this client is not attached: use `async with`, or await attach()")
        return self._line


class AttachedExecution:
    """A cell of a named session; made by `AttachedClient.submit` or `execution`.

    Any number of tasks, and of clients, may read its events and await its result, each from where it likes. Cancelling
    them ends their waiting, and not the cell.

    State: `_ending`, once it is known.
    """

    def __init__(self, line: Callable[[], Line], id: str) -> None:  # noqa: A002
        self.id = id
        self._line = line
        self._ending: Ending | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r} {self.outcome or ''}>"

    @property
    def outcome(self) -> Outcome | None:
        """How the cell ended, once `result` or `events` has brought it; else None."""
        return self._ending.outcome if self._ending is not None else None

    async def events(self, after: int = 0) -> AsyncGenerator[Numbered]:
        """Everything that the cell has put out behind event number `after`, and then what it puts out, as it comes.

        Yields each event with its number, from 1 without a gap; `after=n` begins with number n + 1. In the place of
        events that the journal had no more room for stands one `Dropped`, which says which. A reader who takes its time
        holds up nobody. At the end it raises what `result` raises.
        """
        if isinstance(after, bool) or not isinstance(after, int) or not 0 <= after < 1 << 53:
            raise InvalidArgument("after", after, "pass the number of an event, or 0 for all of them")
        ended = False
        while not ended:
            position = after
            page = await self._told(lambda line, position=position: line.read(self.id, position))
            ended = page.ended
            for number, event in page.events:
                yield number, event
                after = number
        await self._conclude()

    async def result(self, timeout: float | None = None) -> ExecutionResult:
        """Wait for the cell's end; its result is whole, whatever the journal has dropped.

        Args:
            timeout: seconds to wait; None for as long as it takes. The cell goes on: what ends it is the time that it
                was submitted with.

        Raises:
            StillRunning: (a `TimeoutError`) it has not ended within `timeout`.
            ExecutionError, ExecutionTimeout, ProtocolError: as of `Execution.result`.
            ExecutionLost: the session has ended, or cannot be reached.
            ExecutionUnknown: there is no execution of this id, or its record was dropped for newer ones.
        """
        if timeout is None:
            return await self._conclude()
        check_timeout(timeout)
        bound = asyncio.timeout(min(timeout, _LONGEST))
        try:
            async with bound:
                ending = await self._find_ending()
        except TimeoutError:
            if not bound.expired():
                raise
            raise StillRunning(timeout) from None
        return conclude(ending.outcome, ending.result)

    async def interrupt(self) -> None:
        """Interrupt the cell, and wait until it has ended; see `Execution.interrupt`.

        Raises:
            DriveRefused: this client does not drive the session.
            ExecutionLost, ExecutionUnknown: as of `result`.
        """
        await self._told(lambda line: line.interrupt(self.id))
        await self._find_ending()

    async def _conclude(self) -> ExecutionResult:
        ending = await self._find_ending()
        return conclude(ending.outcome, ending.result)

    async def _find_ending(self) -> Ending:
        if self._ending is None:
            self._ending = await self._told(lambda line: line.result(self.id))
        return self._ending

    async def _told(self, ask: Callable[[Line], Awaitable[T]]) -> T:
        """What the session answers. Raises `ExecutionLost` where there is none any more, or none can be reached."""
        try:
            return await ask(self._line())
        except SessionGone as exc:
            raise ExecutionLost(f"{exc}: what became of the cell is unknown") from exc
        except ConnectionError as exc:
            raise ExecutionLost(f"{exc}: what becomes of the cell is unknown") from exc

"""Which kernel a client's requests go to, and how another takes its place: the side of `forks` that callers see.

What runs in the kernel, and how that ends, is `client`'s affair.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self, TypeVar

from actbox.copies import Copy, copy_of
from actbox.errors import (
    ActboxError,
    CheckpointMissing,
    ConnectionError,
    ExecutionTimeout,
    ForkRefused,
    InvalidArgument,
    LimitExceeded,
    ProtocolError,
    SandboxUnavailable,
    SessionBroken,
)
from actbox.execution import check_timeout
from actbox.forks import ROOM_SECONDS, Checkpoints, Step
from actbox.protocol import frames
from actbox.shielded import finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from actbox.checkpoint import Checkpoint
    from actbox.kept_files import KeptFiles
    from actbox.sessions import Session
    from actbox.work_folder import WorkFolder

logger = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_CHECKPOINTS = 32
# Of one copy: the kernel may hold gigabytes, and the machine be busy.
_COPY_SECONDS = 60.0
_LONGEST = 1e9


class Forking(ABC):
    """The methods of `ExecutionClient` that copy its session, and go back to copies.

    Args:
        recover: keep the last good state; see `ExecutionClient`, as for `max_checkpoints`.
        max_checkpoints: see there.

    State: `_session`, the kernel, None before the first and after a death; `_cell`, the number of the last request that
    it was sent; `_lost_state`, whether the next cell begins without its state, and `_went_back`, the number of the cell
    whose state it begins with after a death that no cell has told of; `_checkpoints`; `_place`, the folder that it
    works in, if it has one.
    """

    _connected: bool

    def __init__(self, *, recover: bool, max_checkpoints: int) -> None:
        if isinstance(max_checkpoints, bool) or not isinstance(max_checkpoints, int) or max_checkpoints < 0:
            raise InvalidArgument("max_checkpoints", max_checkpoints, "pass a whole number of at least 0")
        self._recovers = recover
        self._max_checkpoints = max_checkpoints
        self._lost_state = False
        self._went_back: int | None = None
        self._place: WorkFolder | None = None
        self._begin_with(None)

    def _begin_with(self, of: Copy | None) -> None:
        self._session: Session | None = of.session if of is not None else None
        self._cell = of.requests if of is not None else 0
        self._checkpoints = Checkpoints(self._max_checkpoints)
        if of is not None:
            self._place = of.place

    # -- what the client offers ----------------------------------------------------------------------------------

    @abstractmethod
    def check_connected(self) -> None:
        """Raises `StateError` unless requests can be submitted."""

    @abstractmethod
    def submit_step(self, step: Step) -> None:
        """Put a step behind the executions submitted before."""

    @abstractmethod
    def withdraw_step(self, step: Step) -> None:
        """Take a step that has not begun out of the queue."""

    @abstractmethod
    async def open_session(self) -> Session:
        """A fresh kernel. Raises `ConnectionError`, `SandboxUnavailable`, `ProtocolError`."""

    @abstractmethod
    def make_branch(self, of: Copy) -> Self:
        """A client like this one, of a copy of its session; it is connected."""

    def fresh_place(self) -> WorkFolder | None:
        """Where a fresh kernel works; None if it has no folder of its own on the host."""
        return None

    async def note_rollback(self, checkpoint: Checkpoint) -> None:  # noqa: B027 - most note nothing
        """Called when the session has gone back to a checkpoint."""

    async def restore_files(self, made: Copy, files: KeptFiles) -> None:  # noqa: B027 - most keep none
        """Put files back that were kept with a checkpoint; raises as `kept_files.put_back`. This class keeps none."""

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
            timeout: seconds, the time behind cells submitted before included. A kernel that has begun to copy itself
                has 60 s for it whatever this is.

        Raises:
            ForkRefused: a copy would miss something, which is named, or the session has 511 kernels already.
            LimitExceeded: one of the session's limits (`pids`, `memory`) does not allow it.
            SessionBroken: the kernel did not answer as it must, or had ended since the last cell; its state is lost.
            ExecutionTimeout: it was not this request's turn in time.
            InvalidArgument, StateError: as of `submit`.
        """
        return await self.in_turn(timeout, lambda step: self._fork(step, force=force))

    async def _fork(
        self, step: Step, *, force: bool, prepare: Callable[[Self, Copy], Awaitable[None]] | None = None
    ) -> Self:
        made = await self._copy(force=force)
        branch = self.make_branch(made)
        if prepare is not None:
            try:
                await step.within(lambda: prepare(branch, made))
            except BaseException as exc:
                await finish(branch.disconnect())
                if _is_broken(exc):
                    raise ForkRefused(f"the copy ended before it was ready: {exc}") from exc
                raise
            branch._cell = made.requests  # noqa: SLF001 - one of its own kind
        return branch

    @abstractmethod
    async def disconnect(self) -> None:
        """Destroy the kernel."""

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
        return await self.in_turn(timeout, lambda step: self._park(step, name, force=force))

    async def _park(
        self, step: Step, name: str, *, force: bool, keep: Callable[[Copy], Awaitable[KeptFiles]] | None = None
    ) -> Checkpoint:
        self._checkpoints.check_name(name)
        made = await self._copy(force=force)
        files = None
        if keep is not None:
            try:
                files = await step.within(lambda: keep(made))
            except BaseException as exc:
                await finish(made.close())
                if _is_broken(exc):
                    raise ForkRefused(f"the copy ended before its files were kept: {exc}") from exc
                raise
        return await self._checkpoints.keep(name, made, files)

    async def rollback(self, name: str, *, timeout: float = 120) -> Checkpoint:
        """Go back to a checkpoint, whatever has become of the session since; in its turn behind cells submitted before.

        The session is then a copy of the checkpoint, which can be gone back to again. Files stay as they are, unless
        they were kept with it. Where the session's limits leave no room for a copy beside it, as after a cell that has
        started processes without end, the session is ended first.

        Raises:
            CheckpointMissing: (a `KeyError`) there is none of this name, or its process is gone; nothing has changed.
            LimitExceeded: one of the session's limits (`pids`, `memory`) does not allow it, even with the session
                ended: its state is lost, and the checkpoint is still there.
            ExecutionTimeout, InvalidArgument, StateError: as of `fork`.
        """
        self._checkpoints.find(name)
        return await self.in_turn(timeout, lambda step: self._go_back(step, name))

    async def _go_back(self, step: Step, name: str) -> Checkpoint:
        parked = self._checkpoints.find(name)
        try:
            made = await self._checkpoints.wake(parked, 0 if self._session is not None else ROOM_SECONDS)
        except LimitExceeded:
            if self._session is None:
                raise
            # What takes up the room is what nobody wants any more.
            await self.drop_session(self._session)
            made = await self._checkpoints.wake(parked, ROOM_SECONDS)
        if parked.files is not None:
            try:
                async with asyncio.timeout(step.left):
                    await self.restore_files(made, parked.files)
            except BaseException as exc:
                await finish(made.close())
                if _is_broken(exc):
                    raise CheckpointMissing(name, f"its copy ended before it had its files: {exc}") from exc
                raise
        await self._replace_session(made)
        self._went_back = None
        await self.note_rollback(parked.checkpoint)
        if self._recovers:
            # What was kept since is what nobody wants any more.
            await self.keep_good()
        return parked.checkpoint

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that can be gone back to, the oldest first."""
        return self._checkpoints.alive()

    async def discard(self, name: str) -> None:
        """Let a checkpoint go. Raises `CheckpointMissing`."""
        await self._checkpoints.discard(name)

    async def _copy(self, *, force: bool) -> Copy:
        await self._tell_of_death()
        try:
            session = await self.live_session()
        except (ConnectionError, SandboxUnavailable, ProtocolError) as exc:
            raise SessionBroken(f"no kernel could be had ({exc})") from exc
        self._cell += 1
        try:
            made = await copy_of(session, self._cell, force=force, timeout=_COPY_SECONDS)
        except SessionBroken as exc:
            await self.drop_session(session)
            raise SessionBroken(exc.reason, rolled_back_to=await self.go_back_to_good()) from exc
        made.settle_in(self._place)
        return made

    async def _tell_of_death(self) -> None:
        """Raises `SessionBroken` if the kernel has ended and nobody knows: a copy of another is not what was wanted."""
        session = self._session
        if session is None or not session.ended:
            return
        await self.drop_session(session)
        raise SessionBroken("the kernel had ended since the last cell", rolled_back_to=await self.go_back_to_good())

    # -- the kernel ----------------------------------------------------------------------------------------------

    async def live_session(self) -> Session:
        """The kernel that the next request goes to: a fresh one, or the last good state, if there is none."""
        session = self._session
        if session is not None and not session.ended:
            return session
        if session is not None:
            await self.drop_session(session)
        number = await self.go_back_to_good()
        if number is not None and self._session is not None:
            self._went_back = number
            return self._session
        return await self.begin_session()

    async def begin_session(self) -> Session:
        """Have a fresh kernel. Raises as `open_session`."""
        session = self._session = await self.open_session()
        await self.work_in(self.fresh_place())
        return session

    async def drop_session(self, session: Session) -> None:
        """The session is of no more use; the next cell gets another, and is told so."""
        if self._session is session:
            self._session = None
            self._lost_state = True
        await finish(session.close())

    async def _replace_session(self, found: Copy) -> None:
        older, self._session = self._session, found.session
        self._lost_state = False
        self._cell = found.requests
        left, self._place = self._place, found.place
        if older is not None:
            await finish(older.close())
        if left is not None:
            await finish(left.leave())

    async def work_in(self, place: WorkFolder | None) -> None:
        """Work in another folder from now on."""
        left, self._place = self._place, place
        if place is not None:
            place.join()
        if left is not None:
            await finish(left.leave())

    async def close_copies(self) -> None:
        """End the checkpoints, and leave the folder that a branch may have had."""
        await self._checkpoints.close()
        await self.work_in(self.fresh_place())

    # -- the last good state -------------------------------------------------------------------------------------

    async def keep_good(self) -> None:
        """Keep the session as the last good state; what cannot be copied is gone back behind."""
        session = self._session
        if session is None or session.ended:
            return
        self._cell += 1
        try:
            made = await copy_of(session, self._cell, force=False, timeout=_COPY_SECONDS)
        except (ForkRefused, LimitExceeded) as exc:
            logger.info("the session's state was not kept: %s", exc)
        except SessionBroken:
            await self.drop_session(session)
            self._went_back = await self.go_back_to_good()
        else:
            made.settle_in(self._place)
            await self._checkpoints.keep_good(made)

    async def go_back_to_good(self) -> int | None:
        """Take up the last good state; the number of its cell, None if there is none to be had."""
        good = self._checkpoints.good
        if good is None or not self._connected:
            return None
        try:
            await self._replace_session(await self._checkpoints.wake(good, ROOM_SECONDS))
        except (CheckpointMissing, LimitExceeded) as exc:
            logger.warning("the last good state is lost too: %s", exc)
            # Whoever is told so must not find it again later.
            await self._checkpoints.drop_good()
            return None
        return good.checkpoint.cell

    # -- turns ---------------------------------------------------------------------------------------------------

    async def in_turn(self, timeout: float, work: Callable[[Step], Awaitable[T]]) -> T:
        """Have something done in turn with the executions.

        Raises:
            ExecutionTimeout: it had not begun in time, or a part of it that may be given up was not done.
            InvalidArgument, StateError: as of `submit`.
        """
        check_timeout(timeout)
        self.check_connected()
        step = Step(work, asyncio.get_running_loop().time() + min(timeout, _LONGEST))
        self.submit_step(step)
        try:
            await asyncio.wait([step.done], timeout=step.left)
            if not step.begun and not step.done.done():
                self.withdraw_step(step)
                raise ExecutionTimeout(timeout, state_kept=True, started=False, what="request")
            return await asyncio.shield(step.done)
        except asyncio.CancelledError:
            await finish(self._undo(step))
            raise
        except TimeoutError as exc:
            if isinstance(exc, ExecutionTimeout):
                raise
            raise ExecutionTimeout(timeout, state_kept=True, what="request") from exc

    async def _undo(self, step: Step) -> None:
        """Nobody wants what a step makes any more."""
        if not step.begun and not step.done.done():
            self.withdraw_step(step)
            return
        step.give_up()
        await asyncio.wait([step.done])
        if step.done.exception() is None and isinstance(step.done.result(), Forking):
            await step.done.result().disconnect()


def _is_broken(exc: BaseException) -> bool:
    """Whether a copy has ended, or speaks no frames; that the time is over is an `OSError` of Python's too."""
    if isinstance(exc, ActboxError | TimeoutError):
        return False
    return isinstance(exc, frames.FrameError | OSError)

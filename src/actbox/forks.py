"""Copies of a kernel, made between two cells: branches to work in, and checkpoints to go back to.

A copy is a process that the kernel forks: it holds the same variables in the same memory until one of the two writes.
A checkpoint is such a copy to which nobody speaks until it is wanted again; it is then copied in its turn, so it can be
gone back to any number of times.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actbox.errors import (
    ActboxError,
    CheckpointMissing,
    ForkRefused,
    InvalidArgument,
    LimitExceeded,
    ProtocolError,
    SessionBroken,
    StateError,
)
from actbox.events import Error
from actbox.protocol import frames, messages
from actbox.sessions import read_overrun
from actbox.shielded import finish, in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from actbox.sessions import Session

_REFUSALS = ("ForkRefused", "FolderRefused")
_MAX_NAME = 100
_MAX_REASON = 1000
# A copy of a checkpoint runs none of the guest's code, so that it takes moments; what does not answer is broken.
_COPY_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state that a session can go back to.

    Attributes:
        name: what it was called.
        cell: the number (`execution_count`) of the last cell that had run then, 0 for none.
        created: when, in seconds since 1970.
        files: whether the private folder was kept with it.
        left_out: what of that folder was not, being neither a regular file nor a folder: printable paths.
    """

    name: str
    cell: int
    created: float
    files: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Files:
    """A folder's files on the host, in a folder of ours, and what of it is not among them."""

    place: Path
    left_out: tuple[str, ...]

    def remove(self) -> None:
        """Remove them."""
        shutil.rmtree(self.place, ignore_errors=True)


@dataclass(slots=True)
class Parked:
    """A copy that waits: its session, how many requests it was sent, and the files that were kept with it."""

    session: Session
    checkpoint: Checkpoint
    files: Files | None = None
    requests: int = 0

    async def close(self) -> None:
        """End it, and remove its files."""
        await self.session.close()
        if self.files is not None:
            await in_thread(self.files.remove)


@dataclass(slots=True)
class Copy:
    """A session with a fresh copy, the number of the last cell that it knows of, and how many requests it was sent."""

    session: Session
    cell: int
    requests: int = 0


async def copy_of(session: Session, request: int, *, force: bool, timeout: float) -> Copy:
    """Have the kernel of an idle session copied.

    Args:
        session: nothing else may be sent to it meanwhile.
        request: a number that it was not sent yet.
        force: leave behind what cannot be copied.
        timeout: seconds.

    Raises:
        ForkRefused: there is something that a copy would miss, or the copy ended at once; the session goes on.
        LimitExceeded: one of the session's limits does not allow it; the session goes on.
        SessionBroken: the kernel gives no proper answer, or none in time: the session is of no more use.
    """
    branch: Session | None = None
    try:
        async with asyncio.timeout(timeout):
            branch = await session.branch()
            cell = await ask(session, {"type": "fork", "id": request, "slot": branch.slot, "force": force})
            try:
                await branch.ready()
            except (ActboxError, OSError) as exc:
                raise ForkRefused(f"the copy ended before it was ready: {exc}"[:_MAX_REASON]) from exc
    except BaseException as exc:
        if branch is not None:
            await finish(branch.close())
        if isinstance(exc, TimeoutError) and not isinstance(exc, ActboxError):
            raise SessionBroken(f"the kernel was not copied within {timeout:g} s") from exc
        if isinstance(exc, OSError | ProtocolError | frames.FrameError) and not isinstance(exc, ForkRefused):
            raise SessionBroken(str(exc)[:_MAX_REASON]) from exc
        raise
    return Copy(branch, cell)


async def ask(session: Session, request: dict[str, Any]) -> int:
    """Send an idle session a request, and wait for its end; the number of its last cell.

    Raises:
        ForkRefused: the kernel refuses.
        LimitExceeded: one of the session's limits does.
        ProtocolError, OSError: it does not answer as it must.
    """
    number = request["id"]
    await session.send(request)
    error: Error | None = None
    while (frame := await session.receive()) is not None:
        match messages.decode(frame):
            case messages.Reply(answered, status, cell, _, passed) if answered == number:
                if status == "ok":
                    return cell
                overrun = read_overrun(passed, session.limits)
                name, value = (error.name, error.value) if error is not None else (status, "")
                if overrun is not None:
                    raise LimitExceeded(
                        overrun.limit, overrun.bound, overrun.use, state_kept=True, name=name, value=value
                    )
                reason = value if name in _REFUSALS else f"{name}: {value}"
                raise ForkRefused(messages.legible(reason)[:_MAX_REASON])
            case Error() as told:
                error = told
            case messages.Reply() | messages.Ready() | messages.SetupFailed() | messages.Archive():
                raise ProtocolError("the kernel answered out of turn")
            case _:
                # What threads of the session print meanwhile belongs to no cell.
                continue
    raise ConnectionResetError("the kernel ended")


@dataclass(slots=True)
class Checkpoints:
    """The states that one client can go back to. State: `parked`, by name; `good`, the one that is kept unasked."""

    most: int
    parked: dict[str, Parked] = field(default_factory=dict[str, "Parked"])
    good: Parked | None = None

    def check_name(self, name: object) -> None:
        """Raises `InvalidArgument` unless it can be a checkpoint's name, `StateError` if there is no room for it."""
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
            raise InvalidArgument("name", name, f"pass 1 to {_MAX_NAME} printable characters")
        if name not in self.parked and len(self.parked) >= self.most:
            raise StateError(f"there are {self.most} checkpoints already: discard some, or raise max_checkpoints")

    async def keep(self, name: str, copy: Copy, files: Files | None = None) -> Checkpoint:
        """Park a copy under a name, in the place of an older one; `files` belong to it from now on."""
        left_out = files.left_out if files is not None else ()
        checkpoint = Checkpoint(name, copy.cell, time.time(), files is not None, left_out)
        parked = Parked(copy.session, checkpoint, files, copy.requests)
        older, self.parked[name] = self.parked.get(name), parked
        if older is not None:
            await finish(older.close())
        return checkpoint

    async def keep_good(self, copy: Copy) -> None:
        """Park a copy as the last good state."""
        older, self.good = self.good, Parked(copy.session, Checkpoint("", copy.cell, time.time()))
        if older is not None:
            await finish(older.close())

    def find(self, name: str) -> Parked:
        """The one of this name. Raises `CheckpointMissing`."""
        parked = self.parked.get(name)
        if parked is None:
            raise CheckpointMissing(name, "there is none of this name")
        if parked.session.ended:
            raise CheckpointMissing(name, "its process has been killed, by the session itself or for its memory")
        return parked

    async def wake(self, parked: Parked) -> Copy:
        """A copy of a parked one.

        Raises:
            CheckpointMissing: it is gone, or broken; it is dropped.
            LimitExceeded: one of the session's limits does not allow it.
        """
        parked.requests += 1
        name = parked.checkpoint.name
        try:
            return await copy_of(parked.session, parked.requests, force=True, timeout=_COPY_SECONDS)
        except ForkRefused as exc:
            raise CheckpointMissing(name, exc.reason) from exc
        except SessionBroken as exc:
            await self._drop(parked)
            raise CheckpointMissing(name, str(exc)) from exc

    async def _drop(self, parked: Parked) -> None:
        if self.good is parked:
            self.good = None
        elif self.parked.get(parked.checkpoint.name) is parked:
            del self.parked[parked.checkpoint.name]
        await finish(parked.close())

    async def discard(self, name: str) -> None:
        """End the one of this name. Raises `CheckpointMissing`."""
        parked = self.parked.pop(name, None)
        if parked is None:
            raise CheckpointMissing(name, "there is none of this name")
        await finish(parked.close())

    async def close(self) -> None:
        """End them all."""
        kept = [*self.parked.values(), *([self.good] if self.good is not None else [])]
        self.parked.clear()
        self.good = None
        await asyncio.gather(*(parked.close() for parked in kept))


class Step:
    """Something that a client does by itself between two executions, in turn with them."""

    def __init__(self, work: Callable[[], Awaitable[Any]]) -> None:
        self._work = work
        self.begun = False
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Do it. Only a cancellation is raised here."""
        self.begun = True
        try:
            result = await self._work()
        except asyncio.CancelledError:
            self.abandon()
            raise
        except Exception as exc:  # noqa: BLE001 - whoever waits for it gets it
            self._fail(exc)
        else:
            if not self.done.done():
                self.done.set_result(result)

    def abandon(self) -> None:
        """It will not be done any more."""
        self._fail(StateError("the client was disconnected"))

    def _fail(self, exc: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(exc)
            # Nobody may be waiting any more.
            self.done.exception()

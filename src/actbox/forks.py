"""Copies of a kernel that wait: checkpoints, to go back to.

A checkpoint is a copy to which nobody speaks until it is wanted again; it is then copied in its turn, so it can be gone
back to any number of times.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from actbox.checkpoint import Checkpoint
from actbox.copies import Copy, copy_of
from actbox.errors import (
    CheckpointMissing,
    ForkRefused,
    InvalidArgument,
    LimitExceeded,
    SessionBroken,
    StateError,
)
from actbox.shielded import finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from actbox.kept_files import KeptFiles

T = TypeVar("T")
_MAX_NAME = 100
# A copy of a checkpoint runs none of the guest's code, so that it takes moments; what does not answer is broken.
_COPY_SECONDS = 20.0
# How long a limit that refuses a copy may be due to processes that are being killed just then.
ROOM_SECONDS = 10.0
_AGAIN_SECONDS = 0.02


@dataclass(slots=True)
class Parked:
    """A copy that waits, the files that were kept with it, and the folder that it works in."""

    copy: Copy
    checkpoint: Checkpoint
    files: KeptFiles | None = None

    @property
    def ended(self) -> bool:
        """Whether it cannot be gone back to any more."""
        return self.copy.session.ended

    async def close(self) -> None:
        """End it, and let go of its files and its folder."""
        await self.copy.close()
        if self.files is not None:
            await self.files.close()


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
        if name not in self.parked and len(self.alive()) >= self.most:
            raise StateError(f"there are {self.most} checkpoints already: discard some, or raise max_checkpoints")

    def alive(self) -> list[Checkpoint]:
        """Those that can be gone back to, the oldest first."""
        kept = [parked.checkpoint for parked in self.parked.values() if not parked.ended]
        return sorted(kept, key=lambda checkpoint: checkpoint.created)

    async def keep(self, name: str, copy: Copy, files: KeptFiles | None = None) -> Checkpoint:
        """Park a copy under a name, in the place of an older one; all of it belongs to this from now on."""
        left_out = files.left_out if files is not None else ()
        checkpoint = Checkpoint(name, copy.cell, time.time(), files is not None, left_out)
        going = [self.parked.pop(name)] if name in self.parked else []
        while len(self.parked) >= max(self.most, 1):
            # Only what is dead can be too much.
            dead = next((each for each, parked in self.parked.items() if parked.ended), None)
            if dead is None:
                break
            going.append(self.parked.pop(dead))
        self.parked[name] = Parked(copy, checkpoint, files)
        for parked in going:
            await finish(parked.close())
        return checkpoint

    async def keep_good(self, copy: Copy) -> None:
        """Park a copy as the last good state."""
        older, self.good = self.good, Parked(copy, Checkpoint("", copy.cell, time.time()))
        if older is not None:
            await finish(older.close())

    async def drop_good(self) -> None:
        """There is no good state any more."""
        older, self.good = self.good, None
        if older is not None:
            await finish(older.close())

    def find(self, name: str) -> Parked:
        """The one of this name. Raises `CheckpointMissing`."""
        parked = self.parked.get(name) if isinstance(name, str) else None
        if parked is None:
            raise CheckpointMissing(name, "there is none of this name")
        if parked.ended:
            raise CheckpointMissing(name, "its process has been killed, by the session itself or for its memory")
        return parked

    async def wake(self, parked: Parked, room: float) -> Copy:
        """A copy of a parked one; for `room` seconds a limit that does not allow it is tried again.

        Raises:
            CheckpointMissing: it is gone, or broken; it is dropped.
            LimitExceeded: one of the session's limits does not allow it.
        """
        ends = asyncio.get_running_loop().time() + room
        while True:
            try:
                return await self._copy(parked)
            except LimitExceeded:
                # Processes that were killed just now may not be gone yet.
                if asyncio.get_running_loop().time() >= ends:
                    raise
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _copy(self, parked: Parked) -> Copy:
        parked.copy.requests += 1
        name = parked.checkpoint.name
        try:
            made = await copy_of(parked.copy.session, parked.copy.requests, force=True, timeout=_COPY_SECONDS)
        except ForkRefused as exc:
            raise CheckpointMissing(name, exc.reason) from exc
        except SessionBroken as exc:
            await self._drop(parked)
            raise CheckpointMissing(name, exc.reason) from exc
        made.settle_in(parked.copy.place)
        return made

    async def _drop(self, parked: Parked) -> None:
        if self.good is parked:
            self.good = None
        elif self.parked.get(parked.checkpoint.name) is parked:
            del self.parked[parked.checkpoint.name]
        await finish(parked.close())

    async def discard(self, name: str) -> None:
        """End the one of this name. Raises `CheckpointMissing`."""
        parked = self.parked.pop(name, None) if isinstance(name, str) else None
        if parked is None:
            raise CheckpointMissing(name, "there is none of this name")
        await finish(parked.close())

    async def close(self) -> None:
        """End them all."""
        kept = [*self.parked.values(), *([self.good] if self.good is not None else [])]
        self.parked.clear()
        self.good = None
        await asyncio.gather(*(parked.close() for parked in kept))


# -- a turn ----------------------------------------------------------------------------------------------------------


class Step:
    """Something that a client does by itself between two executions, in turn with them.

    Args:
        work: what is done; it is given this step.
        ends: when the caller's time is over, by the loop's clock.

    State: `begun`; `done`, its result; `_part`, what may be given up while it is under way; `_unwanted`, whether nobody
    waits for it any more.
    """

    def __init__(self, work: Callable[[Step], Awaitable[Any]], ends: float) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._ends = ends
        self._part: asyncio.Future[Any] | None = None
        self._unwanted = False
        self.begun = False
        self.done: asyncio.Future[Any] = self._loop.create_future()

    @property
    def left(self) -> float:
        """Seconds that are left of the caller's time."""
        return max(0.0, self._ends - self._loop.time())

    async def run(self) -> None:
        """Do it. Only a cancellation is raised here."""
        self.begun = True
        try:
            result = await self._work(self)
        except asyncio.CancelledError:
            self.abandon()
            raise
        except Exception as exc:  # noqa: BLE001 - whoever waits for it gets it
            self._fail(exc)
        else:
            if not self.done.done():
                self.done.set_result(result)

    async def within(self, part: Callable[[], Awaitable[T]]) -> T:
        """Do a part of it that ends with the caller's time, or when nobody waits any more.

        Raises:
            TimeoutError: (the built-in one) the time is over.
            StateError: nobody waits; nobody will see it.
        """
        doing = self._part = asyncio.ensure_future(_do(part))
        if self._unwanted:
            doing.cancel()
        try:
            await asyncio.wait([doing], timeout=self.left)
            if not doing.done():
                raise TimeoutError
            if doing.cancelled():
                raise StateError("nobody waits for it any more")
            return doing.result()
        finally:
            self._part = None
            if not doing.done():
                doing.cancel()
                await asyncio.wait([doing])

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        self._unwanted = True
        if self._part is not None:
            self._part.cancel()

    def abandon(self) -> None:
        """It will not be done any more."""
        self._fail(StateError("the client was disconnected"))

    def _fail(self, exc: BaseException) -> None:
        if not self.done.done():
            self.done.set_exception(exc)
            # Nobody may be waiting any more.
            self.done.exception()


async def _do(part: Callable[[], Awaitable[T]]) -> T:
    # Called here: what is cancelled before it has begun must not leave a coroutine that nobody awaits.
    return await part()

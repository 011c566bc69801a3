"""What the kernels of one session share on the host: a first one, and all that were forked from it.

They live in the same namespaces, folders, control group and network, and are bounded together. What belongs to all ends
with the last of them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING

from actbox.errors import ForkRefused
from actbox.events import Overrun
from actbox.shielded import finish

if TYPE_CHECKING:
    import socket
    from collections.abc import Coroutine
    from typing import Any, Protocol

    from actbox import cgroups
    from actbox.engines.base import Boundary
    from actbox.spec import Limits
    from actbox.supervision import Supervision
    from actbox.usage import DiskWatch
    from actbox.way_out import WayOut

    class Member(Protocol):
        """A kernel of the family, as the family needs it."""

        slot: int
        at_work: bool

        def pass_on(self, overrun: Overrun) -> None:
            """A limit was passed that all of them share."""
            ...


logger = logging.getLogger(__name__)

# As many as the watcher inside has room for (`guest/interrupts.py`).
_SLOTS = 512
_LOOK_SECONDS = 1.0
# How long a watcher may be silent that has much to kill, on a machine with much to do.
_WORD_SECONDS = 25.0
_numbers = itertools.count(1)


class Family:
    """See the module's text.

    Args:
        limits: what bounds all of them together.
        supervision: of the container that they are in.
        boundary: that container, if it is theirs alone; closed with them.
        disk: watches the private folder, if there is one.
        way_out: leads to allowed hosts, if there are any.
        group: the control group, if one could be made.

    State: `members`; `number`, which the supervisor knows the session by; `_slot`, the last number given to a kernel;
    `_looking`, the task that looks at what they use; `_memory_kills`, how many of those were told of; `_doubted`,
    sockets to a watcher that owes a word, with the time until it is given up.
    """

    def __init__(
        self,
        limits: Limits,
        supervision: Supervision,
        boundary: Boundary | None,
        disk: DiskWatch | None,
        way_out: WayOut | None,
        group: cgroups.Group | None,
    ) -> None:
        self.limits = limits
        self.supervision = supervision
        self.disk = disk
        self.way_out = way_out
        self.group = group
        self.number = next(_numbers)
        self.members: set[Member] = set()
        self._boundary = boundary
        self._closing: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._memory_kills = 0
        self._doubted: dict[socket.socket, asyncio.TimerHandle] = {}
        self._slot = 0

    @property
    def is_alone(self) -> bool:
        """Whether the container is theirs, and nobody else's."""
        return self._boundary is not None

    def new_slot(self) -> int:
        """A number for a kernel to be forked.

        Raises:
            ForkRefused: 511 of them live.
        """
        taken = {member.slot for member in self.members}
        for _ in range(_SLOTS - 1):
            self._slot = self._slot % (_SLOTS - 1) + 1
            if self._slot not in taken:
                return self._slot
        raise ForkRefused(f"the session has {_SLOTS - 1} forks and checkpoints already: close or discard some")

    def begin_looking(self) -> None:
        """Look at what they use, until the end."""
        if self._looking is None and (self.disk is not None or self.group is not None):
            self._looking = asyncio.create_task(self._look_after())

    async def _look_after(self) -> None:
        """Look at what the watcher inside does not see: the private folder, and whom the system has killed."""
        failed = False
        while True:
            try:
                overrun = await self.disk.look() if self.disk is not None else None
                if overrun is not None:
                    self._tell(overrun)
                self._tell_kills()
            except Exception:
                # No thread to be had, or whatever else: a session is not left without a bound for that.
                if not failed:
                    logger.exception("what a session uses could not be looked at, and will be again")
                failed = True
            await asyncio.sleep(self.disk.pause if self.disk is not None else _LOOK_SECONDS)

    def kills(self) -> Overrun | None:
        """Whether the system has killed some of them for their memory since this was last asked."""
        kills = self.group.memory_kills() if self.group is not None else 0
        if self.group is None or kills <= self._memory_kills:
            return None
        self._memory_kills = kills
        return Overrun("memory", self.limits.memory, self.group.peak())

    def _tell_kills(self) -> None:
        overrun = self.kills()
        if overrun is not None:
            self._tell(overrun)

    def _tell(self, overrun: Overrun) -> None:
        """Tell those that run a cell; if none does, one of them that has done so before."""
        at_work = [member for member in self.members if member.at_work]
        for member in at_work or sorted(self.members, key=lambda member: member.slot)[:1]:
            member.pass_on(overrun)

    def end(self) -> None:
        """End the container, if it is theirs alone: a kernel may have killed or stopped its watcher there."""
        if self._boundary is not None and len(self.members) <= 1:
            self._close_soon(self._boundary.close())

    def doubt(self, watch: socket.socket) -> None:
        """The watcher has not heeded an order that came by this socket, which is the family's from now on.

        Where a kernel can stop its watcher, nobody can end any of them any more: then the container goes.
        """
        loop = asyncio.get_running_loop()
        loop.add_reader(watch, self._settle, watch)
        self._doubted[watch] = loop.call_later(_WORD_SECONDS, self._give_up, watch)

    def _settle(self, watch: socket.socket) -> None:
        """It has said something, or is gone."""
        self._doubted.pop(watch).cancel()
        asyncio.get_running_loop().remove_reader(watch)
        watch.close()

    def _give_up(self, watch: socket.socket) -> None:
        self._settle(watch)
        if self._boundary is not None:
            self._close_soon(self._boundary.close())

    def _close_soon(self, closing: Coroutine[Any, Any, None]) -> None:
        if self._closing is not None:
            closing.close()
            return
        self.supervision.stop()
        self._closing = asyncio.ensure_future(closing)

    async def leave(self, member: Member) -> None:
        """A kernel has ended; the last one takes along what belongs to all. Never raises."""
        self.members.discard(member)
        if self.members:
            return
        for watch in list(self._doubted):
            self._settle(watch)
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        if self.way_out is not None:
            await self.way_out.close()
        if self.group is not None:
            await finish(asyncio.to_thread(self.group.remove))
        self.end()
        if self._closing is not None:
            await asyncio.wait([self._closing])

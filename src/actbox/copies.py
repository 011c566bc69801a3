"""Copies of a kernel, made between two cells, and how a kernel is asked for them.

A copy is a process that the kernel forks: it holds the same variables in the same memory until one of the two writes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from actbox.errors import ActboxError, ForkRefused, LimitExceeded, ProtocolError, SessionBroken
from actbox.events import Error
from actbox.protocol import frames, messages
from actbox.sessions import read_overrun
from actbox.shielded import finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from actbox.events import Overrun
    from actbox.sessions import Session
    from actbox.work_folder import WorkFolder

_MAX_REASON = 1000
_EXIT_SECONDS = 1.0


# -- one request of a session that is no cell ------------------------------------------------------------------------


class KernelRefused(Exception):
    """The kernel refuses a request: the name and the message of its exception, both the guest's word."""

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self.value = value
        super().__init__(name, value)

    def reason(self, *own: str) -> str:
        """Why, printable and of one length; the names of `own` exceptions go without saying."""
        text = self.value if self.name in own else f"{self.name}: {self.value}"
        return messages.legible(text)[:_MAX_REASON]


class Carried(Protocol):
    """What an archive that goes with a request is made of, or becomes."""

    async def send(self, send: Callable[[dict[str, Any], bytes], Awaitable[None]]) -> None:
        """Send what follows the request."""
        ...

    async def take(self, data: bytes) -> None:
        """A piece of the archive that comes. What it raises ends the request."""
        ...


async def ask(session: Session, request: dict[str, Any], carried: Carried | None = None) -> messages.Reply:
    """Send an idle session a request, and wait for its end; for how long is the caller's affair.

    A session whose request was not brought to its end here is of no more use.

    Raises:
        KernelRefused: the kernel refuses.
        LimitExceeded: one of the session's limits does.
        ProtocolError, OSError, FrameError: it does not answer as it must, or has ended.
    """
    number = request["id"]
    await session.send(request)
    if carried is None:
        return await _answer(session, number, None)

    async def send(header: dict[str, Any], payload: bytes) -> None:
        await session.send({**header, "id": number}, payload)

    # Beside each other: the kernel may end the request before all was sent, and what fails here must not wait for it.
    sending = asyncio.ensure_future(carried.send(send))
    answering = asyncio.ensure_future(_answer(session, number, carried))
    try:
        await asyncio.wait([sending, answering], return_when=asyncio.FIRST_EXCEPTION)
        failed = sending.exception() if sending.done() else None
        if failed is not None and (isinstance(failed, ActboxError) or not isinstance(failed, OSError)):
            raise failed
        # A stream that has ended is noticed where it is read.
        return await answering
    finally:
        for task in (sending, answering):
            task.cancel()
        await asyncio.wait([sending, answering])


async def _answer(session: Session, number: int, carried: Carried | None) -> messages.Reply:
    error: Error | None = None
    while (frame := await session.receive()) is not None:
        match messages.decode(frame):
            case messages.Reply(answered) as reply if answered == number:
                if reply.status == "ok":
                    return reply
                name, value = (error.name, error.value) if error is not None else (reply.status, "")
                overrun = read_overrun(reply.passed, session.limits)
                if overrun is not None:
                    raise _exceeded(overrun, name, value)
                raise KernelRefused(name, value)
            case messages.Archive(answered, data) if answered == number and carried is not None:
                await carried.take(data)
            case Error() as told:
                error = told
            case messages.Reply() | messages.Ready() | messages.SetupFailed() | messages.Archive() | messages.Call():
                raise ProtocolError("the kernel answered out of turn")
            case _:
                # What threads of the session print meanwhile belongs to no cell.
                continue
    exit_ = await session.exited(_EXIT_SECONDS)
    if exit_ is not None and exit_.overrun is not None:
        raise _exceeded(exit_.overrun)
    raise ConnectionResetError("the kernel ended")


def _exceeded(overrun: Overrun, name: str | None = None, value: str | None = None) -> LimitExceeded:
    return LimitExceeded(overrun.limit, overrun.bound, overrun.use, state_kept=True, name=name, value=value)


# -- a copy ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Copy:
    """A session with a fresh copy: the last cell that it knows of, how many requests it was sent, where it works.

    It counts in `place` as one that works there, until it is closed, or whoever takes it up has left.
    """

    session: Session
    cell: int
    requests: int = 0
    place: WorkFolder | None = None

    def settle_in(self, place: WorkFolder | None) -> None:
        """This is where it works."""
        self.place = place
        if place is not None:
            place.join()

    async def ask(self, request: dict[str, Any], carried: Carried | None = None) -> messages.Reply:
        """See `ask`."""
        self.requests += 1
        return await ask(self.session, {**request, "id": self.requests}, carried)

    async def close(self) -> None:
        """End it, and leave its folder."""
        await self.session.close()
        if self.place is not None:
            await self.place.leave()


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
            reply = await ask(session, {"type": "fork", "id": request, "slot": branch.slot, "force": force})
            try:
                await branch.ready()
            except (ActboxError, OSError) as exc:
                raise ForkRefused(f"the copy ended before it was ready: {exc}"[:_MAX_REASON]) from exc
    except BaseException as exc:
        if branch is not None:
            await finish(branch.close())
        if isinstance(exc, KernelRefused):
            raise ForkRefused(exc.reason("ForkRefused")) from exc
        if isinstance(exc, ForkRefused):
            raise
        if isinstance(exc, TimeoutError) and not isinstance(exc, ActboxError):
            raise SessionBroken(f"the kernel was not copied within {timeout:g} s") from exc
        if isinstance(exc, OSError | ProtocolError | frames.FrameError):
            raise SessionBroken(str(exc)[:_MAX_REASON]) from exc
        raise
    return Copy(branch, reply.execution_count)

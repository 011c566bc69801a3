"""A line over TCP that mends itself: when the connection breaks it is made anew, and what was not answered asked again.

Nothing is lost or doubled by that. A page of events is asked for by the number of the last event that has come, and a
cell is submitted with an id of its own, which is run once however often it is heard of.
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from actbox import carrying, dialogue, refusals
from actbox.connecting import TCP_SECONDS, Address, Pieces, beat, reach
from actbox.dialogue import Request
from actbox.errors import ActboxError, ConnectionError, ProtocolError, SessionGone, StateError, shown
from actbox.protocol import frames

if TYPE_CHECKING:
    from actbox.checkpoint import Checkpoint
    from actbox.execution import Transfer
    from actbox.lines import Change, Ending, Page, Standing, Wish
    from actbox.link import Link
    from actbox.protocol.frames import Frame

# A new session may be long in coming.
_WELCOME_SECONDS = 75.0
# Between two attempts, seconds: none before the first, then these.
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 1.0
_LEAVE_SECONDS = 2.0
# Attempts at a connection for a transfer, each after one at that for all else.
_CARRYING_TRIES = 3
# Of one answer.
_MAX_FRAMES = 50_000
_MAX_BYTES = 1 << 30


class _Cut(Exception):
    """There is no connection; another attempt may make one."""


@dataclass(slots=True)
class _Question:
    """A request that waits for its answer; `over` is completed by the last frame, or by the end of the connection."""

    link: Link
    over: asyncio.Future[None]
    answer: list[Frame] = field(default_factory=list["Frame"])
    size: int = 0
    answered: bool = False


class Rejoining:
    """See the module's text; a `Line`. A connection that is broken is mended for `patience` seconds.

    State: `_link`, the connection, with the tasks `_reading` it and `_beating`; `_joining`, the task that makes one;
    `_questions`, what is asked on this connection, by number; `_failures`, connections in a row that brought no answer,
    and `_since`, when the first of them failed; `_gone`, why nothing can be asked any more.
    """

    def __init__(self, address: Address, wish: Wish, patience: float) -> None:
        self._address = address
        self._patience = patience
        self._wish = wish
        self._link: Link | None = None
        self._reading: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
        self._joining: asyncio.Task[Link] | None = None
        self._questions: dict[int, _Question] = {}
        self._numbers = itertools.count(1)
        self._failures = 0
        self._since = 0.0
        self._gone: ActboxError | None = None

    @property
    def incarnation(self) -> str:
        """See `Line`."""
        return self._wish.incarnation or ""

    async def open(self) -> None:
        """Attach. Raises as `Keeper.attach`, and `ConnectionError` if nothing answers there or the token is wrong."""
        await self._live_link()

    # -- what can be asked ---------------------------------------------------------------------------------------

    async def submit(self, id: str, code: str, timeout: float) -> None:  # noqa: A002
        """See `Line`."""
        await self._ask(Request(0, "submit", id, timeout=timeout, code=code))

    async def read(self, id: str, after: int) -> Page:  # noqa: A002
        """See `Line`."""
        while True:
            page = dialogue.read_page(after, await self._ask(Request(0, "read", id, after)))
            if page.events or page.ended:
                return page

    async def result(self, id: str) -> Ending:  # noqa: A002
        """See `Line`."""
        return dialogue.read_ending(await self._ask(Request(0, "result", id)))

    async def interrupt(self, id: str) -> None:  # noqa: A002
        """See `Line`."""
        await self._ask(Request(0, "interrupt", id))

    async def carry(self, transfer: Transfer, timeout: float) -> Ending:
        """See `Line`."""
        for attempt in itertools.count(1):
            link = await self._live_link()
            try:
                return await carrying.carry(self._address, self._wish, transfer, timeout)
            except StateError:
                # The gateway has noticed before us that the connection for all else is gone.
                link.close()
                if attempt == _CARRYING_TRIES:
                    raise
            except carrying.NotBegun as exc:
                if attempt == _CARRYING_TRIES:
                    raise ConnectionError(f"the transfer has not begun: {exc}") from exc
        raise AssertionError

    async def change(self, change: Change) -> list[Checkpoint]:
        """See `Line`."""
        return dialogue.read_checkpoints(await self._ask(Request(0, "change", change=change)))

    async def checkpoints(self) -> list[Checkpoint]:
        """See `Line`."""
        return dialogue.read_checkpoints(await self._ask(Request(0, "checkpoints")))

    async def executions(self) -> list[Standing]:
        """See `Line`."""
        return dialogue.read_standings(await self._ask(Request(0, "executions")))

    async def end(self) -> None:
        """See `Line`."""
        asked = False
        try:
            while True:
                link = await self._live_link()
                if await self._ask_once(link, Request(0, "end")) is not None:
                    return
                asked = True
        except SessionGone:
            # That it has ended was the answer that got lost.
            if not asked:
                raise

    async def leave(self) -> None:
        """See `Line`."""
        link, self._link = self._link, None
        self._gone = self._gone or StateError("this client has left the session")
        if link is not None and self._reading is not None:
            # To the desk's last word, so that whoever attaches next finds this one gone.
            with suppress(OSError):
                await link.send({"type": "leave"})
                await asyncio.wait([self._reading], timeout=_LEAVE_SECONDS)
            link.close()
        tasks = [task for task in (self._joining, self._reading, self._beating) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._hang_up(link)

    async def _ask(self, request: Request) -> list[Frame]:
        """The frames of the answer; of a page, those that have come. Raises what was answered, if it is a refusal."""
        while True:
            link = await self._live_link()
            answer = await self._ask_once(link, request)
            if answer is not None:
                return answer

    async def _ask_once(self, link: Link, request: Request) -> list[Frame] | None:
        """The same on this connection; None if it broke before."""
        number = next(self._numbers)
        asking = dialogue.request_frame(request._replace(number=number))
        question = _Question(link, asyncio.get_running_loop().create_future())
        self._questions[number] = question
        try:
            await link.send(asking.header, asking.payload)
            await question.over
        except asyncio.CancelledError:
            # In its own time: a task that is cancelled does not wait for the line.
            forgetting = asyncio.ensure_future(link.send({"type": "forget", "n": number}))
            forgetting.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        except OSError:
            pass
        finally:
            self._questions.pop(number, None)
        if question.size > _MAX_BYTES or len(question.answer) > _MAX_FRAMES:
            raise ProtocolError("the gateway's answer is too long")
        if question.answered and question.answer[-1].header.get("type") == "refused":
            raise self._refused(question.answer[-1])
        if question.answered or (question.answer and request.kind == "read"):
            return question.answer
        return None

    def _refused(self, frame: Frame) -> ActboxError:
        exc = refusals.read_refusal(frame.header)
        if isinstance(exc, SessionGone) and self._wish.incarnation is not None:
            self._gone = exc
        return exc

    # -- the connection ------------------------------------------------------------------------------------------

    async def _live_link(self) -> Link:
        if self._gone is not None:
            raise self._gone
        if self._link is not None and not self._link.ended:
            return self._link
        if self._joining is None or self._joining.done():
            self._joining = asyncio.create_task(self._join())
            # Whoever asked may have been cancelled.
            self._joining.add_done_callback(lambda done: done.cancelled() or done.exception())
        joining = self._joining
        try:
            return await asyncio.shield(joining)
        except asyncio.CancelledError:
            if joining.cancelled() and self._gone is not None:
                raise self._gone from None
            raise

    async def _join(self) -> Link:
        """Connect, and again, until that succeeds, is refused, or has gone on for too long."""
        cause: _Cut | None = None
        while True:
            if self._failures > 1:
                await asyncio.sleep(min(_FIRST_PAUSE * 2 ** min(self._failures - 2, 20), _LONGEST_PAUSE))
            if self._failures and asyncio.get_running_loop().time() - self._since > self._patience:
                self._failures = 0
                raise ConnectionError(
                    f"the line to the session {shown(self._wish.name)} is broken, and was not mended within "
                    f"{self._patience:g} s: {cause or 'connections end before anything is answered'}"
                ) from cause
            try:
                return await self._connect()
            except _Cut as exc:
                cause = exc
                self._note_failure()

    async def _connect(self) -> Link:
        address, wish = self._address, self._wish
        try:
            link = await reach(address, Pieces())
        except OSError as exc:
            if wish.incarnation is None and not self._failures:
                raise ConnectionError(f"no container answers at {address}: {exc or 'timed out'}") from exc
            raise _Cut(str(exc) or "nothing answers") from exc
        try:
            await self._greet(link)
        except BaseException:
            link.close()
            raise
        self._link = link
        self._reading = asyncio.create_task(self._read(link))
        self._beating = asyncio.create_task(beat(link, address.heartbeat))
        return link

    async def _greet(self, link: Link) -> None:
        wish = self._wish
        bound = _WELCOME_SECONDS if wish.incarnation is None else TCP_SECONDS
        try:
            await link.send({"type": "hello", "token": self._address.token, **dialogue.wish_fields(wish)})
            async with asyncio.timeout(bound):
                frame = await link.receive()
        except (OSError, TimeoutError, ProtocolError) as exc:
            raise _Cut(str(exc) or "the gateway did not answer the greeting") from exc
        match frame.header if frame is not None else None:
            case None:
                raise _Cut("the gateway closed the connection")
            case {"type": "welcome", "incarnation": str(incarnation)} if wish.incarnation in (None, incarnation):
                self._wish = replace(wish, incarnation=incarnation, take_over=False)
            case {"type": "refused"}:
                assert frame is not None  # noqa: S101 - for the types
                raise self._refused(frame)
            case _:
                raise ConnectionError("what answers at this port is no container's gateway")

    async def _read(self, link: Link) -> None:
        """Give each frame to who asked for it, to the end of the connection."""
        begun = asyncio.get_running_loop().time()
        productive = False
        try:
            while (frame := await link.receive()) is not None:
                number = frame.header.get("re")
                question = self._questions.get(number) if isinstance(number, int) else None
                if question is None or question.over.done():
                    continue
                self._failures, productive = 0, True
                question.answer.append(frame)
                question.size += len(frame.payload)
                question.answered = frame.header.get("type") in dialogue.LAST
                if question.answered or question.size > _MAX_BYTES or len(question.answer) > _MAX_FRAMES:
                    question.over.set_result(None)
        except (ProtocolError, frames.FrameError):
            # What comes cannot be read: a fresh connection may do better, and will not be tried without end.
            pass
        finally:
            link.close()
            if self._link is link:
                self._link = None
            lived = asyncio.get_running_loop().time() - begun
            asked = self._hang_up(link)
            if asked and not productive and lived < self._address.heartbeat:
                self._note_failure()

    def _note_failure(self) -> None:
        if not self._failures:
            self._since = asyncio.get_running_loop().time()
        self._failures += 1

    def _hang_up(self, link: Link | None) -> bool:
        """Have what was asked on this connection asked again; whether there was anything."""
        asked = [question for question in self._questions.values() if question.link is link]
        for question in asked:
            if not question.over.done():
                question.over.set_result(None)
        return bool(asked)

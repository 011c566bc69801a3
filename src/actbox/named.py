"""One named session: who is attached to it, what has been submitted, and what came of that.

It is driven by a real client of the container's own process, so that everything that can happen to a cell happens as it
always does. What comes of each execution goes to its journal, whether anybody is attached or not; readers take pages of
it, and hold nothing here. Nobody waits for a reader.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol

from actbox.errors import ActboxError, DriveRefused, ExecutionUnknown, InvalidArgument, SessionGone, StateError
from actbox.events import Lost
from actbox.execution import check_timeout
from actbox.journal import Journal
from actbox.lines import PAGE_BYTES, PAGE_EVENTS, Ending, Page, Standing, Wish, check_name
from actbox.result import ExecutionResult, bundle_size
from actbox.shielded import finish

if TYPE_CHECKING:
    from actbox.checkpoint import Checkpoint
    from actbox.client import ExecutionClient
    from actbox.execution import Execution, Transfer
    from actbox.lines import Change

logger = logging.getLogger(__name__)

_MAX_CLIENTS = 64
_LONGEST = 1e9
# Executions that wait or run, and their source.
_MAX_OPEN = 256
_MAX_OPEN_BYTES = 64 << 20
# Of those that have ended, how many are kept, and what all they put out may take.
MAX_ENDED = 100
MAX_ENDED_BYTES = 64 << 20
# Ids whose record was dropped: a request that comes again must not run a cell again.
_MAX_FORGOTTEN = 10_000
# Changes that have ended, and may be asked for again by who has not heard of that.
_MAX_CHANGES = 1000


class Owner(Protocol):
    """Who keeps the sessions, as one of them needs it."""

    def drop(self, session: NamedSession, reason: str) -> asyncio.Task[None]:
        """Close a session, whose name is free at once."""
        ...

    def check_new(self, name: str) -> None:
        """Raises `InvalidArgument` or `StateError` if there can be no new session of this name."""
        ...

    def adopt(self, wish: Wish, client: ExecutionClient) -> None:
        """Keep a session that has a kernel already; nobody is attached to it."""
        ...


class _Kept:
    """An execution and its journal.

    State: `execution`, the client's; `ending`, once it has ended; `waiting`, futures to complete when there is news.
    """

    def __init__(self, id_: str, code: str, execution: Execution) -> None:
        self.id = id_
        self.digest = _digest(code)
        self.code_size = len(code)
        self.journal = Journal()
        self.execution: Execution | None = execution
        self.ending: Ending | None = None
        self.size = 0
        self.waiting: set[asyncio.Future[None]] = set()

    async def follow(self, execution: Execution, timeout: float) -> None:
        """Write the journal to the execution's end, of which nobody is told. The time counts from now."""
        outcome = None
        try:
            with suppress(ActboxError):
                async for event in execution.events(timeout):
                    self.journal.add(event)
                    self.tell()
            outcome = execution.outcome
        except Exception:
            logger.exception("an execution could not be followed")
        finally:
            result = execution.so_far()
            self.ending = Ending(outcome or Lost("nobody could follow it"), result)
            # The result shares the contents of displays with the journal, but not what that has dropped.
            self.size = self.journal.size + _size(result)
            self.execution = None

    def tell(self) -> None:
        """There is news."""
        for future in self.waiting:
            if not future.done():
                future.set_result(None)

    def standing(self) -> Standing:
        state: Literal["waiting", "running", "ended"] = "ended"
        if self.ending is None:
            state = "waiting" if self.execution is None or self.execution.fold is None else "running"
        outcome = type(self.ending.outcome).__name__ if self.ending is not None else None
        return Standing(self.id, state, self.journal.first, self.journal.last, outcome)


class NamedSession:
    """One named session.

    State: `_clients`, who is attached, by what they call themselves; `driver`, the one of them that drives; `ttl` and
    `_timer`, which runs while there is none; `_kept`, the executions that are known, in order; `_forgotten`, ids of
    those that are not any more; `_following`, a task for each that has not ended; `_changes`, a task for each of the
    newest changes, by mark; `ended`, why it has.
    """

    def __init__(self, owner: Owner, wish: Wish, client: ExecutionClient, *, connected: bool = False) -> None:
        self.name = wish.name
        self.key = wish.key
        self.incarnation = secrets.token_hex(16)
        self.client = client
        self.ttl = wish.ttl
        self.driver: Attachment | None = None
        self.ended: str | None = None
        self._owner = owner
        self._clients: dict[str, Attachment] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._forgotten: OrderedDict[str, str] = OrderedDict()
        self._following: set[asyncio.Task[None]] = set()
        self._changes: OrderedDict[str, asyncio.Task[list[Checkpoint]]] = OrderedDict()
        self._opening = asyncio.create_task(self._open(connected=connected))

    async def _open(self, *, connected: bool) -> None:
        try:
            if not connected:
                await self.client.connect()
        except BaseException as exc:
            if self.ended is None:
                self.drop(f"it could not be made: {exc}")
            raise

    async def opened(self) -> None:
        """Wait until there is a kernel; raises what `connect` raised. It is made even if nobody waits any more."""
        await asyncio.wait([self._opening])
        if self.ended is not None and self._opening.cancelled():
            raise SessionGone(self.name, self.ended)
        self._opening.result()

    # -- who is attached -----------------------------------------------------------------------------------------

    def join(self, wish: Wish) -> Attachment:
        """See `Keeper.attach`."""
        drives = wish.drive
        driver = self.driver
        if drives and driver is not None and driver.client != wish.client and not wish.take_over:
            if wish.incarnation is None:
                raise DriveRefused(
                    "another client drives this session: pass take_over=True to drive in its place, "
                    "or drive=False to watch"
                )
            # One that comes back after a cut can still watch what it has begun.
            drives = False
        before = self._clients.get(wish.client)
        if before is None and len(self._clients) >= _MAX_CLIENTS:
            raise StateError(f"{_MAX_CLIENTS} clients are attached to this session already")
        attachment = Attachment(self, wish.client)
        self._clients[wish.client] = attachment
        if before is not None:
            before.detach()
        if drives:
            self.driver = attachment
            self.ttl = wish.ttl
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return attachment

    def place_of(self, client: str) -> Attachment:
        """See `Keeper.attached`."""
        attachment = self._clients.get(client)
        if attachment is None:
            raise StateError("this client is not attached")
        return attachment

    def part(self, attachment: Attachment) -> None:
        """A client has left; the last one starts the time to live."""
        if self.driver is attachment:
            self.driver = None
        if self._clients.get(attachment.client) is attachment:
            del self._clients[attachment.client]
        self.wait_for_clients()

    def wait_for_clients(self) -> None:
        """Begin with the time to live, unless somebody is attached."""
        if not self._clients and self._timer is None and self.ended is None:
            self._timer = asyncio.get_running_loop().call_later(
                min(self.ttl, _LONGEST), self.drop, "its time to live was over"
            )

    # -- executions ----------------------------------------------------------------------------------------------

    def knows(self, id_: str, code: str) -> bool:
        """Whether this cell was submitted before. Raises `InvalidArgument` if the id is that of another."""
        kept = self._kept.get(id_)
        known = kept.digest if kept is not None else self._forgotten.get(id_)
        if known is not None and known != _digest(code):
            raise InvalidArgument("id", id_, "another cell of this session has it: choose another")
        return known is not None

    async def submit(self, id_: str, code: str, timeout: float) -> None:
        """See `Line.submit`."""
        unfinished = [kept for kept in self._kept.values() if kept.ending is None]
        size = len(code) + sum(kept.code_size for kept in unfinished)
        if len(unfinished) >= _MAX_OPEN or (unfinished and size > _MAX_OPEN_BYTES):
            raise StateError(f"{len(unfinished)} cells of this session wait already: wait for some")
        execution = await self.client.submit(code)
        kept = _Kept(id_, code, execution)
        self._kept[id_] = kept
        task = asyncio.create_task(self._follow(kept, execution, timeout))
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    async def _follow(self, kept: _Kept, execution: Execution, timeout: float) -> None:
        await kept.follow(execution, timeout)
        self._drop_old()
        kept.tell()

    def _drop_old(self) -> None:
        """Keep within the bounds: the oldest records go; the newest stays, whatever its size."""
        ended = [kept for kept in self._kept.values() if kept.ending is not None]
        size = sum(kept.size for kept in ended)
        for count, kept in zip(range(len(ended), 1, -1), ended, strict=False):
            if count <= MAX_ENDED and size <= MAX_ENDED_BYTES:
                break
            size -= kept.size
            del self._kept[kept.id]
            self._forgotten[kept.id] = kept.digest
            kept.tell()
        while len(self._forgotten) > _MAX_FORGOTTEN:
            self._forgotten.popitem(last=False)

    def find(self, id_: str) -> _Kept:
        """The execution of this id. Raises `ExecutionUnknown`."""
        kept = self._kept.get(id_)
        if kept is None:
            forgotten = id_ in self._forgotten
            raise ExecutionUnknown(
                id_, "it has ended, and its record was dropped for newer ones" if forgotten else "nobody submitted it"
            )
        return kept

    def standings(self) -> list[Standing]:
        """See `Line.executions`."""
        return [kept.standing() for kept in self._kept.values()]

    # -- the session as a whole ----------------------------------------------------------------------------------

    async def change(self, change: Change) -> list[Checkpoint]:
        """See `Line.change`. It is done to its end, whoever leaves meanwhile."""
        task = self._changes.get(change.mark)
        if task is None:
            task = asyncio.create_task(self._change(change))
            # Nobody may be waiting for it any more.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._changes[change.mark] = task
            for mark in [mark for mark, older in self._changes.items() if older.done()][:-_MAX_CHANGES]:
                del self._changes[mark]
        try:
            return await asyncio.shield(task)
        except StateError as exc:
            if self.ended is not None:
                raise SessionGone(self.name, self.ended) from exc
            raise

    async def _change(self, change: Change) -> list[Checkpoint]:
        client, name, timeout = self.client, change.name, change.timeout
        match change.kind:
            case "checkpoint":
                files = {"files": True} if change.files else {}
                self._check_folder(change)
                return [await client.checkpoint(name, force=change.force, timeout=timeout, **files)]
            case "rollback":
                return [await client.rollback(name, timeout=timeout)]
            case "discard":
                await client.discard(name)
                return []
            case "fork":
                await self._fork(change)
                return []

    def _check_folder(self, change: Change) -> None:
        for argument, value in (("files", change.files), ("key", change.key)):
            if value and self.key is None:
                raise InvalidArgument(argument, value, "this session has no key, and so no folder of its own")

    async def _fork(self, change: Change) -> None:
        self._check_folder(change)
        self._owner.check_new(change.name)
        more: dict[str, Any] = {} if self.key is None else {"key": change.key}
        more |= {"files": "copy"} if change.files else {}
        branch = await self.client.fork(force=change.force, timeout=change.timeout, **more)
        try:
            self._owner.check_new(change.name)
        except BaseException:
            await finish(branch.disconnect())
            raise
        wish = Wish(change.name, "", change.key or self.key, self.ttl)
        self._owner.adopt(wish, branch)

    # -- the end -------------------------------------------------------------------------------------------------

    def drop(self, reason: str) -> asyncio.Task[None]:
        """End it; returns at once."""
        return self._owner.drop(self, reason)

    async def close(self, reason: str) -> None:
        """End it, and wait for that. Whoever waits for something of it is told why."""
        if self.ended is not None:
            return
        self.ended = reason
        if self._timer is not None:
            self._timer.cancel()
        for attachment in list(self._clients.values()):
            attachment.wake()
        await finish(self._shut_down())

    async def _shut_down(self) -> None:
        if self._opening is not asyncio.current_task():
            self._opening.cancel()
        await asyncio.wait([self._opening])
        if not self._opening.cancelled():
            self._opening.exception()
        await self.client.disconnect()
        tasks = [*self._following, *self._changes.values()]
        if tasks:
            await asyncio.wait(tasks)


class Attachment:
    """A client's place in a session: the `Line` of the container's own process.

    State: `_left`, whether it has left; `_waiting`, futures of those who wait for news by it.
    """

    def __init__(self, session: NamedSession, client: str) -> None:
        self.client = client
        self._session = session
        self._left = False
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def incarnation(self) -> str:
        """See `Line`, as for all that follows."""
        return self._session.incarnation

    def _check(self) -> None:
        if self._session.ended is not None:
            raise SessionGone(self._session.name, self._session.ended)
        if self._left:
            raise StateError("this client has left the session")

    def _check_drives(self) -> None:
        if self._session.driver is not self:
            raise DriveRefused(
                "this client does not drive the session: attach with drive=True, and take_over=True if another does"
            )

    async def submit(self, id: str, code: str, timeout: float) -> None:  # noqa: A002
        self._check()
        check_name("id", id)
        check_timeout(timeout)
        # Before asking who drives: what was accepted once stays so, though the answer was lost.
        if not self._session.knows(id, code):
            self._check_drives()
            await self._session.submit(id, code, timeout)

    async def read(self, id: str, after: int) -> Page:  # noqa: A002
        while True:
            self._check()
            kept = self._session.find(id)
            events = kept.journal.after(after, PAGE_BYTES, PAGE_EVENTS)
            last = events[-1][0] if events else after
            ended = kept.ending is not None and last >= kept.journal.last
            if events or ended:
                return Page(tuple(events), ended)
            await self._news(kept)

    async def result(self, id: str) -> Ending:  # noqa: A002
        while True:
            self._check()
            kept = self._session.find(id)
            if kept.ending is not None:
                return kept.ending
            await self._news(kept)

    async def interrupt(self, id: str) -> None:  # noqa: A002
        self._check()
        kept = self._session.find(id)
        self._check_drives()
        if kept.execution is not None:
            self._session.client.stop(kept.execution, "interrupt")

    async def carry(self, transfer: Transfer, timeout: float) -> Ending:
        self._check()
        self._check_drives()
        execution = self._session.client.submit_transfer(transfer)
        try:
            await execution.result(timeout)
        except ActboxError:
            if execution.outcome is None:
                raise
        assert execution.outcome is not None  # noqa: S101 - what result returns after
        return Ending(execution.outcome, execution.so_far())

    async def change(self, change: Change) -> list[Checkpoint]:
        self._check()
        check_timeout(change.timeout)
        self._check_drives()
        return await self._session.change(change)

    async def checkpoints(self) -> list[Checkpoint]:
        self._check()
        return self._session.client.checkpoints()

    async def executions(self) -> list[Standing]:
        self._check()
        return self._session.standings()

    async def end(self) -> None:
        self._check()
        self._check_drives()
        await asyncio.shield(self._session.drop("it was ended by its driver"))

    async def leave(self) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave at once."""
        if not self._left:
            self._left = True
            self._session.part(self)
            self.wake()

    def wake(self) -> None:
        """Have those who wait look again."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def _news(self, kept: _Kept) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        kept.waiting.add(future)
        self._waiting.add(future)
        try:
            await future
        finally:
            kept.waiting.discard(future)
            self._waiting.discard(future)


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()


def _size(result: ExecutionResult) -> int:
    texts = sum(len(output.text) + len(output.trace or "") for output in result.outputs)
    displays = sum(bundle_size(output.data, output.metadata) for output in result.outputs)
    return len(result.text or "") + texts + displays + sum(len(image.data) for image in result.images)

"""The contract between a client and a session that is kept for it, whatever lies between the two.

In the container's own process it is kept by the session itself (`named`); elsewhere by a line over TCP that mends
itself (`rejoining`), with a desk at its other end (`desk`). What is asked may be asked again: an answer that was lost
costs nothing but the asking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from actbox.errors import InvalidArgument

if TYPE_CHECKING:
    from actbox.checkpoint import Checkpoint
    from actbox.events import Outcome
    from actbox.execution import Transfer
    from actbox.journal import Numbered
    from actbox.result import ExecutionResult

# Of one page, in bytes or so and in events; one event may be larger.
PAGE_BYTES = 1 << 20
PAGE_EVENTS = 200
_MAX_NAME = 100


@dataclass(frozen=True, slots=True)
class Wish:
    """Which session a client would be attached to, and as what.

    Attributes:
        name: the session's. It is made if there is none, unless the client only watches.
        client: the client's own, chosen at random and shown to nobody else: who shows it is that client, come back.
        key: the executor key that a new session gets.
        ttl: seconds that the session is kept when nobody is attached; a driver's word.
        drive: whether to submit and interrupt, or only to watch.
        take_over: take the right to drive away from another client.
        incarnation: of the session, once it is known: a client that comes back wants that one, and no other.
        recover: whether a new session keeps its last good state.
    """

    name: str
    client: str
    key: str | None = None
    ttl: float = 600.0
    drive: bool = True
    take_over: bool = False
    incarnation: str | None = None
    recover: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to a whole session, in its turn among the cells; see the methods of `AttachedClient` of these names.

    Attributes:
        kind: what.
        name: of the checkpoint, or of the session that a fork becomes.
        mark: chosen at random: what is asked for again with the same mark is not done again.
        timeout: in seconds; nothing waits for "discard".
        force, files, key: as of `CodeExecutor.checkpoint` and `fork`.
    """

    kind: Literal["checkpoint", "rollback", "discard", "fork"]
    name: str
    mark: str
    timeout: float = 120.0
    force: bool = False
    files: bool = False
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Events that follow one another; `ended` if the execution has ended and none will follow these."""

    events: tuple[Numbered, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Ending:
    """How an execution ended, and all that is kept of its output."""

    outcome: Outcome
    result: ExecutionResult


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an execution stands.

    Attributes:
        id: as its submitter chose it.
        state: "waiting" behind others, "running" or "ended".
        first, last: the numbers of the oldest event that is kept and of the newest; `last` is 0 before any came.
        outcome: once it has ended, how: the name of one of the outcomes in `actbox.events`.
    """

    id: str
    state: Literal["waiting", "running", "ended"]
    first: int
    last: int
    outcome: str | None = None


class Line(Protocol):
    """What an attached client can ask for.

    Every method raises `SessionGone` once the session has ended, `StateError` once the client has left, and
    `ConnectionError` if the session cannot be reached.
    """

    @property
    def incarnation(self) -> str:
        """Names this session, and no later one of the same name."""
        ...

    async def submit(self, id: str, code: str, timeout: float) -> None:  # noqa: A002 - what it is
        """Put a cell behind those submitted before; with an id that is known nothing happens.

        Raises:
            DriveRefused: this client does not drive.
            InvalidArgument: the id is that of another cell.
            StateError: too much waits already.
        """
        ...

    async def read(self, id: str, after: int) -> Page:  # noqa: A002
        """What follows an event; waits until there is something, or the execution has ended.

        Raises `ExecutionUnknown`.
        """
        ...

    async def result(self, id: str) -> Ending:  # noqa: A002
        """Wait for the execution's end. Raises `ExecutionUnknown`."""
        ...

    async def interrupt(self, id: str) -> None:  # noqa: A002
        """Have the execution interrupted; returns at once. Raises `DriveRefused`, `ExecutionUnknown`."""
        ...

    async def carry(self, transfer: Transfer, timeout: float) -> Ending:
        """Have a transfer carried out, in its turn among the cells; of all that can be asked it alone is not repeated.

        Cancelling who waits for it ends it.

        Raises:
            DriveRefused: this client does not drive.
            ExecutionLost: the connection broke meanwhile.
        """
        ...

    async def change(self, change: Change) -> list[Checkpoint]:
        """Do something to the session as a whole; the checkpoint that was made or gone back to, if any.

        Raises `DriveRefused`, and what the methods of these names of `CodeExecutor` do.
        """
        ...

    async def checkpoints(self) -> list[Checkpoint]:
        """Those that can be gone back to, the oldest first."""
        ...

    async def executions(self) -> list[Standing]:
        """Those that are known, in the order in which they were submitted."""
        ...

    async def end(self) -> None:
        """End the session. Raises `DriveRefused`."""
        ...

    async def leave(self) -> None:
        """Detach; the session goes on. Never raises; may be called again."""
        ...


def check_name(argument: str, name: object) -> None:
    """Raises `InvalidArgument` unless it can be the name of a session or the id of an execution; says which."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise InvalidArgument(argument, name, f"pass 1 to {_MAX_NAME} printable characters")

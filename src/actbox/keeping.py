"""The named sessions of a container: they outlive their clients, and end with their time to live or the container."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from actbox.errors import ConnectionError, InvalidArgument, SessionGone, StateError
from actbox.execution import check_timeout
from actbox.lines import check_name
from actbox.named import NamedSession

if TYPE_CHECKING:
    from collections.abc import Callable

    from actbox.client import ExecutionClient
    from actbox.lines import Wish
    from actbox.named import Attachment

_MAX_SESSIONS = 64
_MAX_ENDINGS = 1000


class Keeper:
    """The named sessions of one container.

    Args:
        make_client: a client for a new session with this key, and whether it recovers; not yet connected.

    State: `_sessions`, by name; `_endings`, what became of those that have ended, by incarnation; `_closing`, the tasks
    that close some; `_closed`.
    """

    def __init__(self, make_client: Callable[[str | None, bool], ExecutionClient]) -> None:
        self._make_client = make_client
        self._sessions: dict[str, NamedSession] = {}
        self._endings: OrderedDict[str, str] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sessions that are kept."""
        return tuple(self._sessions)

    async def attach(self, wish: Wish) -> Attachment:
        """Attach a client to a session, which is made if there is none.

        Raises:
            SessionGone: there is none, and this client would only watch; or the one it comes back to has ended.
            DriveRefused: another client drives it.
            InvalidArgument: a value that cannot be used, or a key that is not the session's.
            StateError: there are too many sessions, or clients.
            ConnectionError, SandboxUnavailable: a new session cannot be had.
        """
        check_name("name", wish.name)
        check_timeout(wish.ttl)
        if self._closed:
            raise ConnectionError("the container is closed")
        session = self._sessions.get(wish.name)
        if wish.incarnation is not None and (session is None or session.incarnation != wish.incarnation):
            raise SessionGone(wish.name, self._endings.get(wish.incarnation, "it has ended"))
        if session is None:
            session = self._make(wish)
        elif wish.key is not None and wish.key != session.key:
            raise InvalidArgument("key", wish.key, "the session of this name was made with another key, or with none")
        attachment = session.join(wish)
        try:
            await session.opened()
        except BaseException:
            await attachment.leave()
            raise
        return attachment

    def attached(self, wish: Wish) -> Attachment:
        """The place of a client that is attached. Raises `SessionGone`, `StateError`."""
        session = self._sessions.get(wish.name)
        if session is None or session.incarnation != wish.incarnation:
            raise SessionGone(wish.name, self._endings.get(wish.incarnation or "", "it has ended"))
        return session.place_of(wish.client)

    def _make(self, wish: Wish) -> NamedSession:
        if not wish.drive:
            raise SessionGone(wish.name, "there is none of this name")
        self._check_room()
        session = NamedSession(self, wish, self._make_client(wish.key, wish.recover))
        self._sessions[wish.name] = session
        return session

    def _check_room(self) -> None:
        if len(self._sessions) >= _MAX_SESSIONS:
            raise StateError(f"{_MAX_SESSIONS} sessions are kept already: end some")

    def check_new(self, name: str) -> None:
        """Raises `InvalidArgument`, `StateError` or `ConnectionError` if there can be no new session of this name."""
        check_name("name", name)
        if self._closed:
            # A fork that was under way when the container was closed must not be kept by nobody.
            raise ConnectionError("the container is closed")
        if name in self._sessions:
            raise InvalidArgument("name", name, "there is a session of this name: choose another, or end that")
        self._check_room()

    def adopt(self, wish: Wish, client: ExecutionClient) -> None:
        """Keep a session that has a kernel already; nobody is attached to it."""
        session = NamedSession(self, wish, client, connected=True)
        self._sessions[wish.name] = session
        session.wait_for_clients()

    def drop(self, session: NamedSession, reason: str) -> asyncio.Task[None]:
        """A session is to end: its name is free at once."""
        if self._sessions.get(session.name) is session:
            del self._sessions[session.name]
            self._endings[session.incarnation] = reason
            while len(self._endings) > _MAX_ENDINGS:
                self._endings.popitem(last=False)
        task = asyncio.create_task(session.close(reason))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def close(self) -> None:
        """End all sessions. May be called again."""
        self._closed = True
        for session in list(self._sessions.values()):
            self.drop(session, "the container was closed")
        if self._closing:
            await asyncio.wait(self._closing)

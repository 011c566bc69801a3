"""The folder that a session works in, seen from the host."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from actbox.errors import WorkspaceError
from actbox.files import TextFolder, remove_folder
from actbox.guest.folders import BRANCHES
from actbox.shielded import in_thread

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)


class WorkFolder:
    """A key's private folder, or a branch's copy of it.

    A copy is removed when the last that works there has left it: executors, and states that they can go back to.

    Args:
        private: the folder of all private folders, on the host.
        inside: the same as sessions see it.
        key: whose it is.
        copy: the name of a branch's copy; None for the key's own.

    State: `below`, the names that lead there; `texts`, long texts that are put there for the session; `_users`, how
    many work there.
    """

    def __init__(self, private: Path, inside: str, key: str, copy: str | None = None) -> None:
        self.key = key
        self._private = private
        self.below = (key,) if copy is None else (key, BRANCHES, copy)
        self._is_copy = copy is not None
        self._users = 0
        self.path = private.joinpath(*self.below)
        self.inside = "/".join((inside, *self.below))
        self.texts = TextFolder(self.path)

    def join(self) -> None:
        """One more works here."""
        self._users += 1

    async def leave(self) -> None:
        """One less works here. Never raises: a session can put anything in the way, and what it hides there stays."""
        self._users -= 1
        if self._users or not self._is_copy:
            return
        try:
            await in_thread(remove_folder, self._private, *self.below)
        except (WorkspaceError, OSError) as exc:
            logger.warning("the folder of a branch was not removed: %s", exc)

"""Serves rounds of actbox: `python driven_actbox.py ENGINE TAG`."""

from __future__ import annotations

import itertools
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import rounds

from actbox import CodeExecutionContainer, CodeExecutor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class _Actbox:
    """Containers of `tag` over workspaces below `folder`, each with all its defaults.

    State: numbers, to give each workspace and each session a new name.
    """

    def __init__(self, engine: str, tag: str, folder: Path) -> None:
        self._engine = engine
        self._tag = tag
        self._folder = folder
        self.numbers = itertools.count(1)

    @asynccontextmanager
    async def container(self) -> AsyncGenerator[rounds.Container]:
        """See `rounds.Contender`."""
        workspace = self._folder / f"workspace-{next(self.numbers)}"
        async with CodeExecutionContainer(
            tag=self._tag, workspace_path=workspace, env={}, engine=self._engine
        ) as container:
            yield _Container(self, container)


class _Container:
    def __init__(self, owner: _Actbox, container: CodeExecutionContainer) -> None:
        self._owner = owner
        self._container = container

    async def warmed(self) -> None:
        await self._container.warmed()

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[rounds.Session]:
        key = f"session-{next(self._owner.numbers)}"
        async with CodeExecutor(key, self._container.workspace, self._container.port) as executor:
            yield _Session(executor)


class _Session:
    def __init__(self, executor: CodeExecutor) -> None:
        self._executor = executor

    async def run(self, code: str) -> str:
        return (await self._executor.execute(code)).text or ""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="actbox-bench-") as name:
        rounds.serve(_Actbox(sys.argv[1], sys.argv[2], Path(name)))

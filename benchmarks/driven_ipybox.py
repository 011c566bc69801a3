# ipybox is not in the project's environment; see peer_ipybox.
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
"""Serves rounds of ipybox, in an environment that has it: `python driven_ipybox.py IMAGE`."""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import rounds
from ipybox import ExecutionClient, ExecutionContainer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class _Ipybox:
    """Containers of `image`, and clients with all their defaults: both as ipybox's own documentation uses them."""

    def __init__(self, image: str) -> None:
        self._image = image

    @asynccontextmanager
    async def container(self) -> AsyncGenerator[rounds.Container]:
        """See `rounds.Contender`."""
        async with ExecutionContainer(tag=self._image, show_pull_progress=False) as container:
            yield _Container(container.port)


class _Container:
    def __init__(self, port: int) -> None:
        self._port = port

    async def warmed(self) -> None:
        """See `rounds.Container`; every kernel imports for itself."""

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[rounds.Session]:
        async with ExecutionClient(port=self._port) as client:
            yield _Session(client)


class _Session:
    def __init__(self, client: Any) -> None:
        self._client = client

    async def run(self, code: str) -> str:
        return (await self._client.execute(code)).text or ""


if __name__ == "__main__":
    rounds.serve(_Ipybox(sys.argv[1]))

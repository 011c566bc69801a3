"""Fixtures of the one suite: every test that needs an engine gets it here, on every engine that this machine has."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    EnvironmentBuildError,
    EnvironmentNotFound,
    ExecutionContainer,
    SandboxUnavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

# A busy machine may take its time over an example.
settings.register_profile("actbox", deadline=None)
settings.load_profile("actbox")

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The host's side is asyncio."""
    return "asyncio"


@pytest.fixture(scope="session", params=["bubblewrap", "docker"])
async def engine(request: pytest.FixtureRequest) -> str:
    """The engine under test: every one of them in turn. One that this machine lacks is skipped, but not in CI."""
    name: str = request.param
    try:
        async with ExecutionContainer(engine=name, preload=()):
            return name
    except (SandboxUnavailable, EnvironmentBuildError, EnvironmentNotFound) as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{name}: {exc}")


@pytest.fixture(scope="session")
async def container(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CodeExecutionContainer]:
    """One running container over a workspace, for all tests that do not harm it; libraries are loaded."""
    workspace = tmp_path_factory.mktemp("workspace")
    async with CodeExecutionContainer(workspace_path=workspace, engine=engine, env={"GREETING": "hello"}) as made:
        await made.warmed()
        yield made


@pytest.fixture
def key() -> str:
    """A key that no other test has."""
    return f"key-{next(_numbers)}"


@pytest.fixture
async def executor(container: CodeExecutionContainer, key: str) -> AsyncIterator[CodeExecutor]:
    """A fresh session in the shared container."""
    async with CodeExecutor(key, container.workspace, container.port) as made:
        yield made


@pytest.fixture
def make_executor(
    container: CodeExecutionContainer,
) -> Callable[[], contextlib.AbstractAsyncContextManager[CodeExecutor]]:
    """Makes more sessions in the shared container, each with a key of its own."""

    def make() -> contextlib.AbstractAsyncContextManager[CodeExecutor]:
        return CodeExecutor(f"key-{next(_numbers)}", container.workspace, container.port)

    return make


@pytest.fixture
def workspace_path(tmp_path: Path) -> Path:
    """A folder for a container of the test's own."""
    return tmp_path / "workspace"

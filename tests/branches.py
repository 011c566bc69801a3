"""What the tests of forks, of checkpoints and of hostile branches share; its fixtures are everybody's (`conftest`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from actbox import CodeExecutionContainer, CodeExecutor, ExecutionClient, ExecutionContainer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from actbox import Execution

# How many processes a session has, by its own account.
COUNT = "len([name for name in __import__('os').listdir('/proc') if name.isdigit()])"
SLEEP = "print('on', flush=True); import time; time.sleep(999)"
# It can only be killed.
DEAF = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('on')\nwhile True: time.sleep(9)"


@pytest.fixture(params=["shared", "separate"])
async def client(
    request: pytest.FixtureRequest, engine: str, container: CodeExecutionContainer
) -> AsyncIterator[ExecutionClient]:
    """A session among others, and one in a sandbox of its own."""
    if request.param == "shared":
        async with ExecutionClient(container.port, interrupt_grace=1) as made:
            yield made
        return
    async with (
        ExecutionContainer(engine=engine, preload=(), separate=True, show_pull_progress=False) as own,
        ExecutionClient(own.port, interrupt_grace=1) as made,
    ):
        yield made


@pytest.fixture
async def worker(container: CodeExecutionContainer, key: str) -> AsyncIterator[CodeExecutor]:
    """An executor with some files: a module, a folder, and a link."""
    async with CodeExecutor(key, container.workspace, container.port, interrupt_grace=1) as made:
        await made.execute(
            "import os\nopen('skill.py', 'w').write('value = 1')\nos.makedirs('below/deep')\n"
            "open('below/deep/file', 'w').write('one')\nos.symlink('skill.py', 'link')\nos.mkfifo('pipe')\n"
            "os.chmod('skill.py', 0o755)\nimport skill"
        )
        yield made


async def value(client: ExecutionClient, expression: str) -> str:
    """What an expression prints."""
    return (await client.execute(f"print({expression})")).text or ""


async def prints(client: ExecutionClient, expression: str, expected: str) -> bool:
    """Whether it prints this."""
    return await value(client, expression) == expected


async def begun(cell: Execution) -> None:
    """Wait until a cell has put something out: then it runs."""
    async for _ in cell.stream(15):
        return

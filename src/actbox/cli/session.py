"""`actbox run` and `actbox repl`: code in a session of its own."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from actbox import (
    ActboxError,
    CodeExecutionContainer,
    CodeExecutor,
    InvalidArgument,
    LocalPathError,
    Network,
    dotenv_variables,
)
from actbox import repl as prompt
from actbox.cli.documents import as_json, document_of, nothing_ran
from actbox.cli.exits import ExitCode, code_for, code_of
from actbox.terminal import CellPrinter, Console, Signals

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator

__all__ = ["repl", "run"]


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Run code in a fresh session; the exit code."""
    code = _code(arguments, console)
    env = _env(arguments)

    async def command(signals: Signals) -> int:
        async with _session(arguments, env, console) as executor:
            execution = await executor.submit(code)
            try:
                with signals.interrupting(execution, second_leaves=True):
                    if arguments.json:
                        document = await document_of(execution, arguments.timeout)
                        await console.write("stdout", as_json(document))
                    else:
                        await CellPrinter(console).follow(execution, arguments.timeout)
            finally:
                # Also where a signal, or a reader who left, is why this ends.
                written = await _write_notebook(executor, arguments, console)
            return code_for(execution.outcome) if written else ExitCode.HOST

    try:
        return asyncio.run(Signals.run(command))
    except (ActboxError, OSError) as exc:
        if arguments.json and code_of(exc) is not ExitCode.USAGE:
            console.write_now("stdout", as_json(nothing_ran(exc)))
        raise


def repl(arguments: argparse.Namespace, console: Console) -> int:
    """Run cells in one session; the exit code."""
    env = _env(arguments)

    async def command(signals: Signals) -> int:
        async with _session(arguments, env, console) as executor:
            try:
                await prompt.converse(executor, console, signals, arguments.timeout)
            finally:
                written = await _write_notebook(executor, arguments, console)
        return ExitCode.FINISHED if written else ExitCode.HOST

    return asyncio.run(Signals.run(command))


async def _write_notebook(executor: CodeExecutor, arguments: argparse.Namespace, console: Console) -> bool:
    """Write the notebook that was asked for; whether that went well. What the code put out is out already."""
    try:
        if arguments.notebook is not None:
            await executor.save_notebook(arguments.notebook)
    except LocalPathError as exc:
        await console.say(f"no notebook was written: {exc}")
        return False
    return True


@asynccontextmanager
async def _session(
    arguments: argparse.Namespace, env: dict[str, str], console: Console
) -> AsyncGenerator[CodeExecutor]:
    async with contextlib.AsyncExitStack() as stack:
        with console.waiting("starting"):
            container = await stack.enter_async_context(
                CodeExecutionContainer(
                    tag=arguments.tag,
                    env=env,
                    workspace_path=arguments.workspace,
                    engine=arguments.engine,
                    runtime=arguments.runtime,
                    network=Network(arguments.allow) if arguments.allow else None,
                    # The one session is there before anything could be loaded for it.
                    preload=(),
                )
            )
            executor = CodeExecutor(arguments.key, container.workspace, container.port)
            await stack.enter_async_context(executor)
        yield executor


def _code(arguments: argparse.Namespace, console: Console) -> str:
    """The code to run.

    Raises:
        InvalidArgument: there is none to be had, or it is not UTF-8.
    """
    if arguments.code is not None:
        # An argument that is no text in the locale's encoding comes with lone surrogates.
        return _decoded("CODE", arguments.code, arguments.code.encode("utf-8", "surrogatepass"))
    if arguments.file != "-":
        try:
            return _decoded("FILE", arguments.file, Path(arguments.file).read_bytes())
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else str(exc)
            raise InvalidArgument("FILE", arguments.file, f"it cannot be read: {reason}") from exc
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison] - it is None if closed
        raise InvalidArgument("FILE", "-", "standard input is closed")
    hint = "reading code from the terminal; Ctrl-D ends it" if sys.stdin.isatty() else ""
    with console.waiting(hint):
        return _decoded("FILE", "-", sys.stdin.buffer.read())


def _decoded(name: str, value: str, data: bytes) -> str:
    try:
        # An editor's byte order mark is no part of the code.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InvalidArgument(name, value, f"it is not UTF-8: {exc.reason} at byte {exc.start}") from exc


def _env(arguments: argparse.Namespace) -> dict[str, str]:
    if arguments.env_file is None:
        return {}
    # `absolute`: the default of that function, `.env`, may be missing; what was asked for may not.
    return dotenv_variables(arguments.env_file.absolute(), export=False)

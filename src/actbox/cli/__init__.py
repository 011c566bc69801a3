"""The command line: `actbox run`, `repl`, `build`, `doctor`, `ps` and `prune`.

It knows public names alone. What may be shown of a guest's words is decided in `terminal`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import enum
import json
import math
import os
import platform
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actbox import (
    ActboxError,
    CodeExecutionContainer,
    CodeExecutor,
    ConnectionError,
    ContainerInfo,
    EnvironmentBuildError,
    EnvironmentNotFound,
    EnvironmentUnusable,
    ExecutionError,
    InvalidArgument,
    Layer,
    LocalPathError,
    Network,
    Output,
    ProtocolError,
    SandboxUnavailable,
    __version__,
    build_environment,
    build_image,
    dotenv_variables,
    examine,
    list_containers,
    prune_containers,
)
from actbox import repl as prompt
from actbox.events import Died, Exceeded, Failed, Finished, Interrupted, Lost, Outcome, TimedOut
from actbox.terminal import CellPrinter, Console, OutputClosed, Signals, Stopped, one_line

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from types import FrameType

    from actbox import Execution

__all__ = ["ExitCode", "main"]

DEFAULT_SECONDS = 120.0
# A prompt has somebody who can interrupt.
_ENDLESS_SECONDS = 365 * 86400.0
_SIGNALLED = 128
_MARKS = {"on": "ok", "weaker": "weaker", "missing": "MISSING"}


class ExitCode(enum.IntEnum):
    """What the process ends with. 128 and a signal's number: by SIGTERM (143), SIGHUP (129), a closed output (141)."""

    FINISHED = 0
    ERROR = 1
    USAGE = 2
    INTERRUPTED = 3
    TIMED_OUT = 4
    DIED = 5
    LOST = 6
    VIOLATION = 7
    UNAVAILABLE = 8
    HOST = 9
    LIMIT = 10


_EPILOG = """\
exit codes:
  0  the code ran to its end (repl: the end was reached; doctor: nothing is missing)
  1  the code raised an exception
  2  the command line, the code's file or the .env file cannot be used
  3  interrupted
  4  the code did not end in time
  5  the kernel died: killed, out of memory, or it ended itself
  6  the container was lost, or no session could be had
  7  the guest broke the rules of the wire
  8  the sandbox cannot be built here, or the environment is not there
  9  something else on this machine: the workspace, the port, the disk
  10  the code went over one of the session's limits
  129, 141, 143  ended by SIGHUP; by a reader who left, as `| head` does; by SIGTERM

Text from inside is made safe for a terminal: escape sequences are left out, other control characters are shown, a
carriage return begins a new line. `run --json` has it all as it was.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv[1:]` if None, and return its exit code. Call it in the main thread."""
    console = Console()
    try:
        arguments = _parser().parse_args(argv)
        return int(arguments.command(arguments, console))
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else ExitCode.USAGE
    except OutputClosed:
        return _SIGNALLED + signal.SIGPIPE
    except Stopped as exc:
        return ExitCode.INTERRUPTED if exc.number == signal.SIGINT else _SIGNALLED + exc.number
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except (ActboxError, OSError) as exc:
        console.say_now(str(exc))
        return _code_of(exc)
    finally:
        _flush()


def _flush() -> None:
    """Write what argparse printed, lest the interpreter complains later that nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # pyright: ignore[reportUnnecessaryComparison] - it is None if closed
            try:
                stream.flush()
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _code_of(error: Exception) -> ExitCode:
    """The exit code for what went wrong before or besides a cell."""
    match error:
        case InvalidArgument():
            return ExitCode.USAGE
        case SandboxUnavailable() | EnvironmentNotFound() | EnvironmentUnusable() | EnvironmentBuildError():
            return ExitCode.UNAVAILABLE
        case ConnectionError():
            return ExitCode.LOST
        case ProtocolError():
            return ExitCode.VIOLATION
        case _:
            return ExitCode.HOST


# -- the arguments ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="actbox",
        description="Runs Python in a sandbox: stateful sessions that see nothing of this machine but a workspace.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"actbox {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    run = add("run", "run code in a fresh session, and show what it puts out")
    run.set_defaults(command=_run)
    source = run.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", metavar="FILE", help="a file of Python; - for standard input")
    source.add_argument("-c", dest="code", metavar="CODE", help="the code itself")
    _add_session_arguments(run)
    run.add_argument(
        "--timeout",
        type=_seconds,
        default=DEFAULT_SECONDS,
        metavar="SECONDS",
        help=f"time after which the code is interrupted (default: {DEFAULT_SECONDS:g})",
    )
    run.add_argument(
        "--notebook",
        type=_notebook_path,
        metavar="FILE",
        help="write the session to a Jupyter notebook, whatever came of it",
    )
    run.add_argument("--json", action="store_true", help="print one JSON document at the end, and nothing before")

    repl = add("repl", "run cells in one session, from a prompt or from standard input")
    repl.set_defaults(command=_repl)
    _add_session_arguments(repl)
    repl.add_argument(
        "--timeout", type=_seconds, default=_ENDLESS_SECONDS, metavar="SECONDS", help="bound on each cell (none)"
    )

    repl.add_argument("--notebook", type=_notebook_path, metavar="FILE", help="write the session to a Jupyter notebook")

    build = add("build", "make or replace an environment, to be used by --tag")
    build.set_defaults(command=_build)
    build.add_argument("-t", "--tag", required=True, help="the environment's name")
    build.add_argument("-r", "--requirements", type=Path, metavar="FILE", help="a requirements file")
    build.add_argument("--python", metavar="3.x", help="a version or an interpreter's path (the running one)")
    build.add_argument("--engine", default="auto", help="docker makes an image (default: bubblewrap)")
    build.add_argument("--base", metavar="IMAGE", help="with --engine docker: what to build on (official slim image)")
    build.add_argument("packages", nargs="*", metavar="PACKAGE", help="requirements, as pip takes them")

    doctor = add("doctor", "tell what works on this machine, and how to mend what does not")
    doctor.set_defaults(command=_doctor)
    _add_engine_arguments(doctor)
    doctor.add_argument("--json", action="store_true", help="print one JSON document")

    ps = add("ps", "list the containers of the Docker engine that actbox made")
    ps.set_defaults(command=_ps)
    ps.add_argument("--json", action="store_true", help="print one JSON document")

    prune = add("prune", "remove the containers that processes left behind which have ended; live ones stay")
    prune.set_defaults(command=_prune)
    prune.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_session_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--key", default="default", help="names the session's private folder (default: default)")
    parser.add_argument(
        "--workspace", type=Path, default=Path("workspace"), metavar="FOLDER", help="made if missing (./workspace)"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="HOST",
        help="a host that the session may reach, such as pypi.org or *.pythonhosted.org; repeatable (default: none)",
    )
    parser.add_argument("--env-file", type=Path, metavar="FILE", help="variables for the session, in .env format")
    _add_engine_arguments(parser)


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tag", default="default", help="the environment inside, made by `actbox build`; with docker, an image"
    )
    parser.add_argument(
        "--engine", default="auto", help="what builds the sandbox: bubblewrap, docker, auto (default: auto)"
    )
    parser.add_argument("--runtime", metavar="NAME", help="a runtime of the Docker engine's, such as runsc for gVisor")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{ascii(text)[:40]} is no positive number of seconds")
    return seconds


def _notebook_path(text: str) -> Path:
    path = Path(text)
    if "\0" in text or not path.name or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{ascii(text)[:200]} is no file in a folder that is there")
    return path


# -- run and repl ----------------------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, console: Console) -> int:
    code = _code(arguments, console)
    env = _env(arguments)

    async def command(signals: Signals) -> int:
        async with _session(arguments, env, console) as executor:
            execution = await executor.submit(code)
            with signals.interrupting(execution, second_leaves=True):
                if arguments.json:
                    document = await _follow_silently(execution, arguments.timeout)
                    await console.write("stdout", _as_json(document))
                else:
                    await CellPrinter(console).follow(execution, arguments.timeout)
            written = await _write_notebook(executor, arguments, console)
            return _code_for(execution.outcome) if written else ExitCode.HOST

    try:
        return asyncio.run(Signals.run(command))
    except (ActboxError, OSError) as exc:
        if arguments.json and _code_of(exc) is not ExitCode.USAGE:
            console.write_now("stdout", _as_json(_nothing_ran(exc)))
        raise


def _repl(arguments: argparse.Namespace, console: Console) -> int:
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
        console.say_now(f"no notebook was written: {exc}")
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


def _code_for(outcome: Outcome | None) -> ExitCode:
    match outcome:
        case Finished():
            return ExitCode.FINISHED
        case Failed():
            return ExitCode.ERROR
        case Interrupted():
            return ExitCode.INTERRUPTED
        case TimedOut():
            return ExitCode.TIMED_OUT
        case Exceeded():
            return ExitCode.LIMIT
        case Died():
            return ExitCode.DIED
        case Lost(violation=True):
            return ExitCode.VIOLATION
        case Lost() | None:
            return ExitCode.LOST


# -- JSON ------------------------------------------------------------------------------------------------------------

_OUTCOMES = {
    ExitCode.FINISHED: "finished",
    ExitCode.ERROR: "error",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TIMED_OUT: "timed_out",
    ExitCode.DIED: "died",
    ExitCode.LOST: "lost",
    ExitCode.VIOLATION: "protocol_violation",
    ExitCode.UNAVAILABLE: "unavailable",
    ExitCode.HOST: "host_error",
    ExitCode.LIMIT: "limit_exceeded",
}
# Every document has every field. `outputs` are those of a notebook: bytes are base64, and `base64` names their types.
_EMPTY: dict[str, Any] = {
    "outcome": None,
    "message": None,  # one line that says what went wrong
    "text": None,
    "images": [],
    "outputs": [],
    "error": None,  # {"name", "value", "trace"}
    "state_kept": None,
    "signal": None,
    "exit_code": None,
    "memory_limit": None,
    "limit": None,  # {"name", "bound", "use"}
    "execution_count": None,
    "duration": None,
    "restarted": False,
    "truncated": False,
}


async def _follow_silently(execution: Execution, timeout: float) -> dict[str, Any]:
    """The document of a cell, at its end."""
    document = dict(_EMPTY)
    try:
        await execution.result(timeout)
    except ActboxError as exc:
        document["message"] = str(exc)
        if isinstance(exc, ExecutionError) and exc.name is not None:
            document["error"] = {"name": exc.name, "value": exc.value, "trace": exc.trace}
    result = execution.so_far()
    document |= {
        "outcome": _OUTCOMES[_code_for(execution.outcome)],
        "text": result.text,
        "images": [
            {"path": str(image.path) if image.path else None, "mime_type": image.mime_type, "size": len(image.data)}
            for image in result.images
        ],
        "outputs": [_output(output) for output in result.outputs],
        "duration": round(result.duration, 6),
        "restarted": result.restarted,
        "truncated": result.truncated,
    }
    match execution.outcome:
        case Finished(count) | Failed(_, count):
            document |= {"execution_count": count, "state_kept": True}
        case Interrupted(state_kept) | TimedOut(_, state_kept):
            document["state_kept"] = state_kept
        case Exceeded(overrun, state_kept):
            limit = {"name": overrun.limit, "bound": overrun.bound, "use": overrun.use}
            document |= {"limit": limit, "state_kept": state_kept}
        case Died(number, exit_code, _, memory_limit):
            document |= {"signal": number, "exit_code": exit_code, "memory_limit": memory_limit, "state_kept": False}
        case Lost() | None:
            document["state_kept"] = False
    return document


def _nothing_ran(error: Exception) -> dict[str, Any]:
    return {**_EMPTY, "outcome": _OUTCOMES[_code_of(error)], "message": str(error)}


def _output(output: Output) -> dict[str, Any]:
    binary = sorted(mime for mime, value in output.data.items() if isinstance(value, bytes))
    return {
        "kind": output.kind,
        "name": output.name,
        "text": output.text,
        "data": {mime: _content(value) for mime, value in output.data.items()},
        "base64": binary,
        "metadata": _content(output.metadata),
        "display_id": output.display_id,
        "execution_count": output.execution_count,
        "trace": output.trace,
    }


def _content(value: Any) -> Any:
    """A value of the guest's as JSON can hold it: its own may be deeper than can be written, or hold infinities."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    try:
        # Nested as deep as it will stand in the document.
        text = json.dumps([[[[[[[[value]]]]]]]])
    except RecursionError:
        return None
    return json.loads(text, parse_constant=str)[0][0][0][0][0][0][0][0]


def _as_json(document: dict[str, Any]) -> str:
    # ASCII without controls, whatever is in it; json escapes all others.
    return json.dumps(document, ensure_ascii=True, allow_nan=False).replace("\x7f", "\\u007f") + "\n"


# -- build and doctor ------------------------------------------------------------------------------------------------


def _build(arguments: argparse.Namespace, console: Console) -> int:
    def leave(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    def tell(line: str) -> None:
        console.write_now("stderr", f"{one_line(line)}\n")

    if _engine_of(arguments) == "docker":
        if arguments.python is not None:
            raise InvalidArgument("--python", arguments.python, "an image's Python is that of its --base")

        async def command(_signals: Signals) -> int:
            await build_image(arguments.tag, arguments.packages, arguments.requirements, arguments.base, tell)
            return ExitCode.FINISHED

        asyncio.run(Signals.run(command))
        console.say_now(f"the image {arguments.tag} is ready: actbox run --engine docker --tag {arguments.tag} ...")
        return ExitCode.FINISHED
    if arguments.base is not None:
        raise InvalidArgument("--base", arguments.base, "only --engine docker builds on an image")
    # By an exception, so that a half-made environment is removed.
    before = signal.signal(signal.SIGTERM, leave)
    try:
        build_environment(arguments.tag, arguments.packages, arguments.requirements, arguments.python, tell)
    finally:
        signal.signal(signal.SIGTERM, before)
    console.say_now(f"the environment {arguments.tag} is ready: actbox run --tag {arguments.tag} ...")
    return ExitCode.FINISHED


def _engine_of(arguments: argparse.Namespace) -> str:
    """The engine that is meant to use what is built; environments are for "auto" too."""
    named: str = arguments.engine
    return os.environ.get("ACTBOX_ENGINE", "") if named == "auto" else named


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    async def command(_signals: Signals) -> int:
        with console.waiting("examining this machine") as show:
            layers = await examine(arguments.engine, arguments.tag, show, runtime=arguments.runtime)
        missing = [layer for layer in layers if layer.state == "missing"]
        facts = {"actbox": __version__, "python": platform.python_version(), "kernel": _kernel()}
        if arguments.json:
            found = [
                {"name": layer.name, "state": layer.state, "detail": layer.detail, "remedy": layer.remedy}
                for layer in layers
            ]
            await console.write("stdout", _as_json({**facts, "can_build": not missing, "layers": found}))
        else:
            await console.write("stdout", _table(facts, layers))
        return ExitCode.UNAVAILABLE if missing else ExitCode.FINISHED

    return asyncio.run(Signals.run(command))


# -- ps and prune ----------------------------------------------------------------------------------------------------


def _ps(arguments: argparse.Namespace, console: Console) -> int:
    async def command(_signals: Signals) -> int:
        await _list(await list_containers(), arguments, console)
        return ExitCode.FINISHED

    return asyncio.run(Signals.run(command))


def _prune(arguments: argparse.Namespace, console: Console) -> int:
    async def command(_signals: Signals) -> int:
        await _list(await prune_containers(), arguments, console, done="removed")
        return ExitCode.FINISHED

    return asyncio.run(Signals.run(command))


async def _list(
    containers: list[ContainerInfo], arguments: argparse.Namespace, console: Console, done: str | None = None
) -> None:
    if arguments.json:
        await console.write("stdout", _as_json({"containers": [asdict(container) for container in containers]}))
        return
    rows = [("CONTAINER", "STATE", "AGE", "PROCESS", "IMAGE")]
    for found in containers:
        owner = {"alive": f"{found.pid}", "dead": f"{found.pid} (ended)"}.get(found.owner, f"{found.pid} (elsewhere)")
        state = done or found.state
        rows.append((found.id[:12], one_line(state), _age(found.age), owner, one_line(found.tag)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if done is None and any(found.owner == "dead" for found in containers):
        console.say_now("some were left behind: `actbox prune` removes them, and so does the next start")
    await console.write("stdout", "\n".join(lines) + "\n")


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _kernel() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _table(facts: dict[str, str], layers: list[Layer]) -> str:
    lines = ["  ".join(f"{name} {value}" for name, value in facts.items()), ""]
    width = max((len(one_line(layer.name)) for layer in layers), default=0)
    for layer in layers:
        lines.append(f"{_MARKS[layer.state]:8} {one_line(layer.name):{width}}  {one_line(layer.detail)}".rstrip())
        if layer.remedy:
            lines.append(f"{'':8}   -> {one_line(layer.remedy)}")
    missing = [one_line(layer.name) for layer in layers if layer.state == "missing"]
    weaker = [one_line(layer.name) for layer in layers if layer.state == "weaker"]
    if missing:
        verdict = f"Sandboxes cannot be built on this machine: {', '.join(missing)}."
    elif weaker:
        verdict = f"Sandboxes can be built on this machine; weaker than it could be: {', '.join(weaker)}."
    else:
        verdict = "Sandboxes can be built on this machine, and every layer is on."
    return "\n".join([*lines, "", verdict, ""])

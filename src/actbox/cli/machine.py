"""`actbox build`, `doctor`, `ps` and `prune`: what sessions need on this machine, and what they left on it."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
from dataclasses import asdict
from typing import TYPE_CHECKING

from actbox import (
    ContainerInfo,
    InvalidArgument,
    Layer,
    __version__,
    build_environment,
    build_image,
    examine,
    list_containers,
    prune_containers,
)
from actbox.cli.documents import as_json
from actbox.cli.exits import ExitCode
from actbox.terminal import Console, Signals, Stopped, one_line

if TYPE_CHECKING:
    import argparse
    from types import FrameType

__all__ = ["build", "doctor", "prune", "ps"]

_MARKS = {"on": "ok", "weaker": "weaker", "missing": "MISSING"}


def build(arguments: argparse.Namespace, console: Console) -> int:
    """Make an environment, or an image."""

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


def doctor(arguments: argparse.Namespace, console: Console) -> int:
    """Tell what works here."""

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
            await console.write("stdout", as_json({**facts, "can_build": not missing, "layers": found}))
        else:
            await console.write("stdout", _table(facts, layers))
        return ExitCode.UNAVAILABLE if missing else ExitCode.FINISHED

    return asyncio.run(Signals.run(command))


def ps(arguments: argparse.Namespace, console: Console) -> int:
    """List the containers that actbox made."""

    async def command(_signals: Signals) -> int:
        await _list(await list_containers(), arguments, console)
        return ExitCode.FINISHED

    return asyncio.run(Signals.run(command))


def prune(arguments: argparse.Namespace, console: Console) -> int:
    """Remove those that were left behind."""

    async def command(_signals: Signals) -> int:
        await _list(await prune_containers(), arguments, console, done="removed")
        return ExitCode.FINISHED

    return asyncio.run(Signals.run(command))


async def _list(
    containers: list[ContainerInfo], arguments: argparse.Namespace, console: Console, done: str | None = None
) -> None:
    if arguments.json:
        await console.write("stdout", as_json({"containers": [asdict(container) for container in containers]}))
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

"""What a command line may say, and which function carries it out."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from actbox import __version__
from actbox.cli import machine, session
from actbox.cli.exits import EPILOG

__all__ = ["parser"]

DEFAULT_SECONDS = 120.0
# A prompt has somebody who can interrupt.
_ENDLESS_SECONDS = 365 * 86400.0


def parser() -> argparse.ArgumentParser:
    """The parser; what it makes has the function as `command`, to be called with it and a console."""
    made = argparse.ArgumentParser(
        prog="actbox",
        description="Runs Python in a sandbox: stateful sessions that see nothing of this machine but a workspace.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"actbox {__version__}")
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    run = add("run", "run code in a fresh session, and show what it puts out")
    run.set_defaults(command=session.run)
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
    repl.set_defaults(command=session.repl)
    _add_session_arguments(repl)
    repl.add_argument(
        "--timeout", type=_seconds, default=_ENDLESS_SECONDS, metavar="SECONDS", help="bound on each cell (none)"
    )
    repl.add_argument("--notebook", type=_notebook_path, metavar="FILE", help="write the session to a Jupyter notebook")

    build = add("build", "make or replace an environment, to be used by --tag")
    build.set_defaults(command=machine.build)
    build.add_argument("-t", "--tag", required=True, help="the environment's name")
    build.add_argument("-r", "--requirements", type=Path, metavar="FILE", help="a requirements file")
    build.add_argument("--python", metavar="3.x", help="a version or an interpreter's path (the running one)")
    build.add_argument("--engine", default="auto", help="docker makes an image (default: bubblewrap)")
    build.add_argument("--base", metavar="IMAGE", help="with --engine docker: what to build on (official slim image)")
    build.add_argument("packages", nargs="*", metavar="PACKAGE", help="requirements, as pip takes them")

    doctor = add("doctor", "tell what works on this machine, and how to mend what does not")
    doctor.set_defaults(command=machine.doctor)
    _add_engine_arguments(doctor)
    doctor.add_argument("--json", action="store_true", help="print one JSON document")

    ps = add("ps", "list the containers of the Docker engine that actbox made")
    ps.set_defaults(command=machine.ps)
    ps.add_argument("--json", action="store_true", help="print one JSON document")

    prune = add("prune", "remove the containers that processes left behind which have ended; live ones stay")
    prune.set_defaults(command=machine.prune)
    prune.add_argument("--json", action="store_true", help="print one JSON document")
    return made


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

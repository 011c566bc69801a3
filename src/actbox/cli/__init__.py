"""The command line: `actbox run`, `repl`, `build`, `doctor`, `ps` and `prune`.

It knows public names alone. What may be shown of a guest's words is decided in `terminal`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from actbox import ActboxError
from actbox.cli.arguments import parser
from actbox.cli.exits import SIGNALLED, ExitCode, code_of
from actbox.terminal import Console, OutputClosed, Stopped

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ExitCode", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv[1:]` if None, and return its exit code. Call it in the main thread."""
    console = Console()
    try:
        arguments = parser().parse_args(argv)
        return int(arguments.command(arguments, console))
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else ExitCode.USAGE
    except OutputClosed:
        return SIGNALLED + signal.SIGPIPE
    except Stopped as exc:
        return ExitCode.INTERRUPTED if exc.number == signal.SIGINT else SIGNALLED + exc.number
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except (ActboxError, OSError) as exc:
        console.say_now(str(exc))
        return code_of(exc)
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

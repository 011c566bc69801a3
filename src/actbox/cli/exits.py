"""What the command ends with: an exit code for every outcome, and for whatever went wrong besides."""

from __future__ import annotations

import enum

from actbox import (
    ConnectionError,
    EnvironmentBuildError,
    EnvironmentNotFound,
    EnvironmentUnusable,
    InvalidArgument,
    ProtocolError,
    SandboxUnavailable,
)
from actbox.events import Died, Exceeded, Failed, Finished, Interrupted, Lost, Outcome, TimedOut

__all__ = ["EPILOG", "SIGNALLED", "ExitCode", "code_for", "code_of"]

SIGNALLED = 128


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


EPILOG = """\
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


def code_of(error: Exception) -> ExitCode:
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


def code_for(outcome: Outcome | None) -> ExitCode:
    """The exit code for how a cell ended."""
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

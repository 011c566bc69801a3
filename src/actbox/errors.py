"""Every exception that actbox raises on purpose, drawn as a tree.

::

    ActboxError
    ├── InvalidArgument (ValueError)          the caller gave a value that cannot be used
    │   ├── InvalidKey                        an executor key outside the grammar
    │   └── DotenvError                       a .env file that is missing or malformed
    ├── StateError (RuntimeError)             used before start, after close, or twice
    │   └── DriveRefused                      another client drives this session, or this one only watches
    ├── WorkspaceError (OSError)              a workspace path that is unusable or unsafe
    ├── LocalPathError (OSError)              a file or folder on the host that cannot be transferred, or written
    │   └── LocalPathMissing (FileNotFoundError)
    ├── SandboxUnavailable                    the machine cannot build the boundary: names the layer
    ├── EnvironmentNotFound                   a tag that nobody built
    ├── EnvironmentUnusable                   an image in which no session can run: says what it lacks
    ├── EnvironmentBuildError                 `actbox build` failed
    ├── PortInUse (OSError)                   the TCP port asked for is taken
    ├── ConnectionError (ConnectionError)     no session could be had, or the link to it is gone
    │   ├── ExecutionLost                     the container is gone; unknown whether the cell ran
    │   └── SessionGone                       a named session that is not, or no longer, kept
    ├── ProtocolError                         the guest broke the rules of the wire
    ├── McpServerError                        an MCP server that cannot be started, reached or used
    │   └── McpServerTimeout (TimeoutError)   it did not answer in time
    ├── TransferRefused                       a path inside, or what came from it, that cannot be transferred
    ├── VariableRefused                       a variable that cannot be moved: says why, and what can be
    │   ├── VariableMissing (LookupError)     there is none of this name
    │   └── VariableUnsupported (TypeError)   a type that does not travel
    ├── StateRefused                          a session's state that cannot be saved or restored: says why
    ├── ForkRefused                           a session that was not copied, and goes on: says why
    ├── CheckpointMissing (KeyError)          there is no such state to go back to, or no more
    ├── SessionBroken                         a kernel that would not be copied as kernels are; it was ended
    ├── ExecutionUnknown (KeyError)           no execution of this id is kept
    ├── StillRunning (TimeoutError)           the wait is over, the cell is not
    ├── ExecutionTimeout (TimeoutError)       a cell outlived its time; says whether the state was kept
    └── ExecutionError                        the cell ended badly
        ├── LimitExceeded                     the session went over one of its limits: which, and by how much
        ├── ExecutionInterrupted              `interrupt()` or a cancelled task stopped it
        └── KernelDied                        the kernel process ended: signal or exit code

Whose fault it is can be read from the branch: the caller's (`InvalidArgument`, `StateError`, `WorkspaceError`,
`LocalPathError`, `EnvironmentNotFound`, `EnvironmentUnusable`, `PortInUse`), the machine's (`SandboxUnavailable`,
`EnvironmentBuildError`, `ConnectionError`), another program's (`McpServerError`), the guest's (`ProtocolError`,
`TransferRefused`, `VariableRefused`, `StateRefused`, `ForkRefused`, `CheckpointMissing`, `SessionBroken`,
`ExecutionTimeout`, `ExecutionError`). Facts are fields, prose is `str()`.

This module imports nothing of actbox.
"""

from __future__ import annotations

import builtins
import signal as _signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "ActboxError",
    "CheckpointMissing",
    "ConnectionError",
    "DotenvError",
    "DriveRefused",
    "EnvironmentBuildError",
    "EnvironmentNotFound",
    "EnvironmentUnusable",
    "ExecutionError",
    "ExecutionInterrupted",
    "ExecutionLost",
    "ExecutionTimeout",
    "ExecutionUnknown",
    "ForkRefused",
    "InvalidArgument",
    "InvalidKey",
    "KernelDied",
    "LimitExceeded",
    "LocalPathError",
    "LocalPathMissing",
    "McpServerError",
    "McpServerTimeout",
    "PortInUse",
    "ProtocolError",
    "SandboxUnavailable",
    "SessionBroken",
    "SessionGone",
    "StateError",
    "StateRefused",
    "StillRunning",
    "TransferRefused",
    "VariableMissing",
    "VariableRefused",
    "VariableUnsupported",
    "WorkspaceError",
]


class ActboxError(Exception):
    """The root of everything that actbox raises on purpose.

    `result` is an `ExecutionResult` of what a cell had put out when it ended with this exception, ready to be read by
    `for_model`; None if the exception is not about a cell.
    """

    result: Any = None


class InvalidArgument(ActboxError, ValueError):
    """A value that cannot be used. `name` and `value` are the argument, `remedy` is what to pass instead."""

    def __init__(self, name: str, value: object, remedy: str) -> None:
        self.name = name
        self.value = value
        self.remedy = remedy
        super().__init__(f"{name}={shown(value)}: {remedy}")


class InvalidKey(InvalidArgument):
    """An executor key outside the grammar: it names folders, so only plain names are taken."""

    def __init__(self, value: object) -> None:
        super().__init__(
            "key",
            value,
            "a key is 1 to 64 characters of A-Z, a-z, 0-9, '_' and '-', starts with a letter or digit, "
            "and is not a reserved device name such as CON",
        )


class DotenvError(InvalidArgument):
    """A .env file that is missing, unreadable or malformed; `line` is the first bad line, from 1, if any."""

    def __init__(self, path: Path, problem: str, line: int | None = None) -> None:
        self.path = path
        self.line = line
        super().__init__("dotenv_path", str(path), problem)


class StateError(ActboxError, RuntimeError):
    """An object used before it was started, after it was closed, or started twice."""


class DriveRefused(StateError):
    """Only the client that drives a kept session may do this; `reason` says why it is not this one, and the remedy."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class WorkspaceError(ActboxError, OSError):
    """A workspace path that is unusable (a file, not writable) or unsafe (a symbolic link where none may be)."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{shown(str(path))}: {problem}")


class LocalPathError(ActboxError, OSError):
    """A path on the host that a transfer cannot read or write: `path`, and `problem` with what to do about it."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        self.problem = problem
        super().__init__(f"{shown(str(path))}: {problem}")


class LocalPathMissing(LocalPathError, FileNotFoundError):
    """The file or folder to be uploaded is not there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "it does not exist; pass the path of what is to be uploaded")


class SandboxUnavailable(ActboxError):
    """The boundary cannot be built on this machine. Nothing was run.

    `layer` names what is missing (for example "bubblewrap", "user namespaces", "seccomp"), `detail` what the system
    said, `remedy` what to do about it.
    """

    def __init__(self, layer: str, detail: str, remedy: str) -> None:
        self.layer = layer
        self.detail = detail
        self.remedy = remedy
        super().__init__(f"the sandbox cannot be built: {layer}: {detail}. {remedy}")


class EnvironmentNotFound(ActboxError):
    """No environment of this tag was built; `known` lists the tags that exist."""

    def __init__(self, tag: str, known: tuple[str, ...]) -> None:
        self.tag = tag
        self.known = known
        super().__init__(
            f"no environment is tagged {shown(tag)} (known: {', '.join(known)}); "
            f"make it with: actbox build -t {tag} [-r requirements.txt | PACKAGE...]"
        )


class EnvironmentUnusable(ActboxError):
    """An image that is there, but in which no session can run; `detail` says what it lacks."""

    def __init__(self, tag: str, detail: str) -> None:
        self.tag = tag
        self.detail = detail
        super().__init__(
            f"no session can run in the image {shown(tag)}: {detail}. Build one on it: "
            f"actbox build -t NAME --engine docker --base {tag} [-r requirements.txt | PACKAGE...]"
        )


class EnvironmentBuildError(ActboxError):
    """`actbox build` could not make an environment; `detail` is what the installer said."""

    def __init__(self, tag: str, detail: str) -> None:
        self.tag = tag
        self.detail = detail
        super().__init__(f"the environment {shown(tag)} was not built: {detail}")


class PortInUse(ActboxError, OSError):
    """The TCP port asked for is taken or may not be bound."""

    def __init__(self, port: int, detail: str) -> None:
        self.port = port
        super().__init__(f"port {port} on 127.0.0.1 cannot be bound ({detail}); pass port=None for a free one")


class ConnectionError(ActboxError, builtins.ConnectionError):  # noqa: A001 - the ancestor's name, kept
    """No session could be had, or the link to the container is gone."""


class ExecutionLost(ConnectionError):
    """The container went away while a cell ran: whether the cell had its effects is unknown.

    `text` is the output that had arrived.
    """

    def __init__(self, message: str, *, text: str | None = None) -> None:
        self.text = text
        super().__init__(message)


class SessionGone(ConnectionError):
    """There is no kept session of this name, or no longer: `name`, and `reason`, which says what became of it."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"the session {shown(name)} is not kept: {reason}")


class ProtocolError(ActboxError):
    """The guest sent something outside the wire's rules. Its session was ended; no other is touched."""


class McpServerError(ActboxError):
    """An MCP server that was not mounted: it cannot be started or reached, or has no tool that can be used.

    `name` is what it was to be called, `reason` why; that may quote the server.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"the MCP server {shown(name)} was not mounted: {reason}")


class McpServerTimeout(McpServerError, builtins.TimeoutError):
    """It did not answer within `timeout` seconds; what was started of it was ended."""

    def __init__(self, name: str, timeout: float) -> None:
        self.timeout = timeout
        super().__init__(name, f"it did not answer within {timeout:g} s")


class TransferRefused(ActboxError):
    """A file or folder inside cannot be transferred; the session goes on, its variables as they were.

    `path` is the path inside as it was given, `reason` why: it is missing, a symbolic link, no regular file, not
    permitted, larger than allowed, or what came from there was no plain archive. The reason may quote the guest.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{shown(path)} was not transferred: {reason}")


class ForkRefused(ActboxError):
    """The kernel was not copied; the session goes on as it was.

    `reason` says why: threads, asyncio tasks or running subprocesses that a copy would not have, each by its name, or
    what the system refused. It may quote the guest.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the session was not forked: {reason}")


class CheckpointMissing(ActboxError, KeyError):
    """There is no checkpoint to go back to, or no more: `name` and `reason` say which and why. The session goes on."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"the checkpoint {shown(name)} cannot be had: {reason}")

    def __str__(self) -> str:
        # A KeyError shows its message in quotes.
        return str(self.args[0])


class SessionBroken(ActboxError):
    """The kernel did not do what kernels do when it was to be copied: it was ended, and the session's state is lost.

    `reason` says what it did. Where a state to go back to is kept (`recover=True`) the session has gone back to it, and
    `rolled_back_to` is the number of the cell after which it was as it is again.
    """

    def __init__(self, reason: str, *, rolled_back_to: int | None = None) -> None:
        self.reason = reason
        self.rolled_back_to = rolled_back_to
        super().__init__(f"{reason}; {_fate(rolled_back_to)}")


class VariableRefused(ActboxError):
    """A variable cannot be moved; the session goes on, its variables as they were.

    `name` is the variable, `reason` why: it is larger than allowed, a library that it needs is not installed inside or
    here, or what came was no value of the kind that it claimed to be. The reason may quote the guest.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        super().__init__(f"the variable {shown(name)} was not moved: {reason}")


class VariableMissing(VariableRefused, LookupError):
    """There is no variable of this name."""


class VariableUnsupported(VariableRefused, TypeError):
    """A value of a type that does not travel: `type` names it, `remedy` says what does."""

    def __init__(self, name: str, type: str, remedy: str) -> None:  # noqa: A002 - the field's name
        self.type = type
        self.remedy = remedy
        super().__init__(name, f"{type}: {remedy}")


class StateRefused(ActboxError):
    """A session's state was not saved, or a file not restored; the session and the file are as they were.

    `path` is the file of the host, `reason` why: the state is larger than allowed; the file is corrupt, was not written
    by `save`, or by another Python; the session lacks a module that it needs. The reason may quote the guest.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{shown(str(path))}: {reason}")


class ExecutionUnknown(ActboxError, KeyError):
    """A kept session has no execution of this `id`: nobody submitted it, or its record was dropped since (`reason`)."""

    def __init__(self, id: str, reason: str) -> None:  # noqa: A002 - what it is
        self.id = id
        self.reason = reason
        super().__init__(f"the execution {shown(id)} cannot be had: {reason}")

    def __str__(self) -> str:
        # A KeyError shows its message in quotes.
        return str(self.args[0])


class StillRunning(ActboxError, builtins.TimeoutError):
    """A cell of a kept session has not ended within `timeout` seconds of waiting. It goes on; ask again."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        super().__init__(f"the cell has not ended within {timeout:g} s; it goes on, and its result can be had later")


class ExecutionTimeout(ActboxError, builtins.TimeoutError):
    """A cell, or a transfer (then `what` says so), did not end in time.

    `timeout` is the time allowed in seconds; `state_kept` is True if an interrupt ended the cell (or it had not begun)
    and the session goes on, False if the kernel had to be killed; `text` is the output until then. `rolled_back_to` is
    as of `ExecutionError`.
    """

    def __init__(
        self,
        timeout: float,
        *,
        state_kept: bool,
        text: str | None = None,
        started: bool = True,
        what: str = "cell",
        rolled_back_to: int | None = None,
    ) -> None:
        self.timeout = timeout
        self.rolled_back_to = rolled_back_to
        self.what = what
        self.state_kept = state_kept
        self.started = started
        self.text = text
        if not started:
            fate = "it had not begun, and will not run"
        elif state_kept:
            fate = "it was interrupted; the session's state is kept"
        else:
            fate = f"it ignored the interrupt, so the kernel was killed; {_fate(rolled_back_to)}"
        super().__init__(f"the {what} did not end within {timeout:g} s: {fate}")


class ExecutionError(ActboxError):
    """A cell raised an exception, or ended badly in one of the ways of the subclasses.

    Args:
        message: one line, for an exception `Name: value`.
        trace: the traceback without colours, None if there is none.

    Fields: `name` and `value` of the user's exception, `colored_trace` (the traceback with ANSI colours), `text` (the
    output before the end, None if none), `state_kept` (whether the session's variables survive), `rolled_back_to` (the
    number of the cell after which the session was as it is again, if it went back by itself).
    """

    state_kept = True
    rolled_back_to: int | None = None

    def __init__(
        self,
        message: str,
        trace: str | None = None,
        *,
        name: str | None = None,
        value: str | None = None,
        colored_trace: str | None = None,
        text: str | None = None,
    ) -> None:
        self.trace = trace
        self.name = name
        self.value = value
        self.colored_trace = colored_trace
        self.text = text
        super().__init__(message)


class LimitExceeded(ExecutionError):
    """A cell went over one of its session's limits.

    `limit` names it as `Limits` does, `bound` is that limit and `use` what was in use when it was passed, or when more
    was refused; bytes, seconds or a number of things, as the limit has it. If the system refused the code more, `name`,
    `value` and `trace` are those of the exception that it got (`MemoryError` and the like), and the state is kept.
    Otherwise the cell was interrupted; `state_kept` is False if its kernel had to be killed.
    """

    def __init__(
        self,
        limit: str,
        bound: float,
        use: float,
        *,
        state_kept: bool,
        trace: str | None = None,
        name: str | None = None,
        value: str | None = None,
        text: str | None = None,
        rolled_back_to: int | None = None,
    ) -> None:
        self.rolled_back_to = rolled_back_to
        self.limit = limit
        self.bound = bound
        self.use = use
        self.state_kept = state_kept
        got = f"{name}: {value}; " if name and value else f"{name}; " if name else ""
        fate = "the session's state is kept" if state_kept else f"the kernel was killed; {_fate(rolled_back_to)}"
        message = f"{got}over the limit {limit} of {amount(limit, bound)}, with {amount(limit, use)} in use: {fate}"
        super().__init__(message, trace, name=name, value=value, text=text)


def amount(limit: str, number: float) -> str:
    """A limit's number with its unit."""
    if limit in ("cpu", "wall"):
        return f"{number:g} s"
    if limit in ("memory", "disk", "file_size", "tmp", "shm"):
        return f"{number / (1 << 20):.1f} MiB"
    return f"{number:g}"


class ExecutionInterrupted(ExecutionError):
    """`Execution.interrupt()`, or the cancellation of the task that awaited the result, stopped the cell.

    `state_kept` is False when the cell ignored the interrupt and the kernel had to be killed.
    """

    def __init__(
        self,
        *,
        state_kept: bool,
        trace: str | None = None,
        text: str | None = None,
        what: str = "cell",
        rolled_back_to: int | None = None,
    ) -> None:
        self.state_kept = state_kept
        self.rolled_back_to = rolled_back_to
        fate = "the session's state is kept" if state_kept else f"the kernel had to be killed; {_fate(rolled_back_to)}"
        super().__init__(f"the {what} was interrupted: {fate}", trace, name="KeyboardInterrupt", value="", text=text)


class KernelDied(ExecutionError):
    """The kernel's process ended while the cell ran. The next cell finds a fresh kernel, or an earlier state.

    `signal` is the signal's number or None, `exit_code` the exit code or None, `memory_limit` the session's memory
    limit in bytes when the death looks like running out of memory, else None.
    """

    state_kept = False

    def __init__(
        self,
        *,
        signal: int | None = None,
        exit_code: int | None = None,
        reason: str | None = None,
        memory_limit: int | None = None,
        text: str | None = None,
        rolled_back_to: int | None = None,
    ) -> None:
        self.rolled_back_to = rolled_back_to
        self.signal = signal
        self.exit_code = exit_code
        self.memory_limit = memory_limit
        if reason is None and signal is not None:
            reason = f"killed by {signal_name(signal)}"
        elif reason is None:
            reason = f"exited with code {exit_code}"
        if memory_limit is not None:
            reason += f", likely out of memory (limit {memory_limit >> 20} MiB)"
        self.reason = reason
        super().__init__(f"the kernel died: {reason}; {_fate(rolled_back_to)}", text=text)


def _fate(rolled_back_to: int | None) -> str:
    if rolled_back_to is None:
        return "the session's state is lost"
    return f"the session went back to its state after cell {rolled_back_to}"


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; `signal 70` where the platform has no name."""
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def shown(value: object, limit: int = 120) -> str:
    """A value as one line of printable ASCII of at most `limit` characters, whatever it holds."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

"""`actbox repl`: a prompt whose cells run in one session, one after the other.

What is typed is only looked at here, to know whether it is complete; it is run nowhere but inside.
"""

from __future__ import annotations

import codecs
import os
import sys
from typing import TYPE_CHECKING, Any, Protocol

from actbox import ExecutionLost, __version__
from actbox.events import Failed, Finished
from actbox.terminal import CellPrinter, Console, Signals, in_thread

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from actbox import CodeExecutor

__all__ = ["converse"]

_LEAVE = {"exit", "exit()", "quit", "quit()"}
_READ = 64 << 10


class _Reader(Protocol):
    """Where cells come from."""

    async def read(self, number: int) -> str | None:
        """The next cell, to be number `number`; None at the end."""
        ...


async def converse(executor: CodeExecutor, console: Console, signals: Signals, timeout: float) -> None:
    """Read cells and run them until there are no more, or `exit` is read.

    At a terminal with a prompt, where Ctrl-D ends; otherwise lines are gathered until they make a complete cell. An
    open block ends with an empty line, as at Python's own prompt. Whatever becomes of a cell, the next one is run: a
    kernel that died is replaced by a fresh one.

    Args:
        executor: connected.
        console: where outputs go.
        signals: Ctrl-C interrupts the running cell, and does nothing more until it has ended.
        timeout: seconds that each cell may run.

    Raises:
        ExecutionLost: the container is gone.
        OutputClosed: nobody reads standard output.
    """
    reader: _Reader
    if console.interactive and sys.stdin is not None and sys.stdin.isatty():  # pyright: ignore[reportUnnecessaryComparison] - it is None if closed
        banner = f"actbox {__version__}: Python in a sandbox. Ctrl-C interrupts a cell, Ctrl-D leaves.\n"
        await console.write("stderr", banner)
        reader = _Prompt()
    else:
        reader = _Lines()
    number = 1
    while (code := await reader.read(number)) is not None:
        if code.strip() in _LEAVE:
            break
        if not code.strip():
            continue
        # The prompt had SIGINT for itself.
        signals.watch()
        execution = await executor.submit(code)
        with signals.interrupting(execution, second_leaves=False):
            failure = await CellPrinter(console, numbered=True).follow(execution, timeout)
        if isinstance(failure, ExecutionLost):
            raise failure
        match execution.outcome:
            case Finished(count) | Failed(_, count):
                number = count + 1
            case outcome:
                number = number + 1 if getattr(outcome, "state_kept", False) else 1
        if console.interactive:
            await console.end_line("stdout")


class _Completeness:
    """Tells whether a cell is complete, with all that IPython understands beyond Python."""

    def __init__(self) -> None:
        # Takes a tenth of a second, which no other command should pay.
        from IPython.core.inputtransformer2 import TransformerManager  # noqa: PLC0415

        self._check: Any = TransformerManager().check_complete

    def look(self, code: str) -> int | None:
        """None if it can be run as it is, be it wrong, else the indent of the line that must follow."""
        if code and not code.rsplit("\n", 1)[-1].strip():
            # The line that was just ended is empty.
            code += "\n"
        try:
            status, indent = self._check(code)
        except Exception:  # noqa: BLE001 - IPython stumbled over it: the kernel shall say how
            return None
        return (indent or 0) if status == "incomplete" else None


class _Lines:
    """Cells from a pipe or file, one line after the other.

    State: `_held`, what was read beyond the last line taken; `_ended`, whether there is no more.
    """

    def __init__(self) -> None:
        self._completeness = _Completeness()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._ended = sys.stdin is None  # pyright: ignore[reportUnnecessaryComparison] - it is None if closed

    async def read(self, number: int) -> str | None:  # noqa: ARG002 - there is no prompt to show it in
        lines: list[str] = []
        while (line := await self._line()) is not None:
            lines.append(line)
            code = "\n".join(lines)
            if self._completeness.look(code) is None:
                return code
        return "\n".join(lines) or None

    async def _line(self) -> str | None:
        while "\n" not in self._held and not self._ended:
            # Not `sys.stdin` itself, for the reason that `terminal` gives for the other streams.
            data = await in_thread(lambda: os.read(sys.stdin.fileno(), _READ))
            self._ended = not data
            self._held += self._decoder.decode(data, final=self._ended)
        if not self._held:
            return None
        line, _, self._held = self._held.partition("\n")
        return line.removesuffix("\r")


class _Prompt:
    """Cells from a person at a terminal; the history is kept in memory alone."""

    def __init__(self) -> None:
        # As above.
        from prompt_toolkit import PromptSession  # noqa: PLC0415

        self._session = PromptSession[str](
            multiline=True,
            key_bindings=_bindings(_Completeness()),
            prompt_continuation=lambda width, _line, _wraps: "...: ".rjust(width),
        )

    async def read(self, number: int) -> str | None:
        while True:
            try:
                code = await self._session.prompt_async(f"In [{number}]: ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None
            return code.rstrip()


def _bindings(completeness: _Completeness) -> KeyBindings:
    """Enter runs a complete cell if the cursor is in its last line that is not empty, and begins a line otherwise."""
    from prompt_toolkit.key_binding import KeyBindings  # noqa: PLC0415 - as above

    bindings = KeyBindings()

    @bindings.add("enter")
    def enter(event: KeyPressEvent) -> None:  # pyright: ignore[reportUnusedFunction] - the decorator keeps it
        buffer = event.current_buffer
        document = buffer.document
        indent = completeness.look(document.text if document.line_count == 1 else document.text_before_cursor)
        at_end = document.on_last_line or not document.text_after_cursor.strip()
        if at_end and indent is None:
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n" + " " * (indent or 0))

    return bindings

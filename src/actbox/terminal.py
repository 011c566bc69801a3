"""What stands between a sandbox and the terminal of whoever started it.

Everything that decides which bytes of a guest's reach standard output and standard error lives here, and what Ctrl-C
does meanwhile. Text from inside is hostile: a terminal can be told to rename its window, to fill the clipboard, to type
an answer into the shell, to hide a line or to write it backwards. So nothing from inside is written unless it went
through `sanitize` or a `Sanitizer`.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from actbox import ActboxError, ExecutionError
from actbox.events import (
    ClearOutput,
    DisplayData,
    Error,
    Event,
    ExecuteResult,
    KernelRestarted,
    MimeData,
    Stream,
    UpdateDisplayData,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from typing import TextIO

    from actbox import Execution

__all__ = ["CellPrinter", "Console", "OutputClosed", "Sanitizer", "Signals", "Stopped", "one_line", "sanitize"]

_T = TypeVar("_T")

# -- text ------------------------------------------------------------------------------------------------------------

# What is never written as it is: C0 without newline and tab, DEL, C1; separators and overrides of the direction of
# writing (CVE-2021-42574), with which a line reads as what it is not; lone surrogates, which no encoding carries.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
# ECMA-48, 5.4: what a control sequence holds before its final byte.
_PARAMETERS = re.compile(r"[ -?]*")
_SGR = re.compile(r"[0-9;]{0,64}")
_MAX_SGR = 64
# DCS, SOS, OSC, PM, APC: after ESC, and as one character.
_STRINGS = "PX]^_"
_STRINGS_8BIT = "\x90\x98\x9d\x9e\x9f"
_CSI_8BIT = "\x9b"
# BEL, CAN, SUB, ST; an ESC begins ST or another sequence; a newline ends what was never meant to be one.
_STRING_END = re.compile(r"[\x07\x18\x1a\x9c\x1b\n]")
_RESET = "\x1b[0m"


class Sanitizer:
    r"""Makes text that comes in pieces safe for a terminal, wherever it was cut.

    * Escape sequences are left out: CSI, OSC, DCS, APC, PM and SOS, whole or broken, with ESC or as one character of
      C1. A string (OSC and the like) that is never ended ends at the next newline, so that no more than a line is lost.
    * Every other control character, the overrides of the writing direction and lone surrogates are shown: `\x07`,
      `\u202e`, `\udc80`.
    * Nothing overwrites what was shown: a carriage return begins a new line, unless the line is empty or a newline
      follows. A progress bar becomes a line for each of its states.
    * With `colors`, sequences `ESC [ digits and ; m` of at most 64 characters are kept, and `close` ends the last.

    State: `_state`, what the next character belongs to; `_parameters` of a sequence that may be kept, else None;
    `_returned`, whether a carriage return waits for what follows; `_line_empty`; `_colored`, whether a colour was set.
    None of it grows with the text.
    """

    def __init__(self, *, colors: bool = False) -> None:
        self._colors = colors
        self._state: Literal["text", "escape", "intermediate", "control", "string"] = "text"
        self._parameters: str | None = None
        self._returned = False
        self._line_empty = True
        self._colored = False

    def feed(self, text: str) -> str:
        """What may be shown of the next piece."""
        out: list[str] = []
        at = 0
        while at < len(text):
            match self._state:
                case "text":
                    at = self._in_text(text, at, out)
                case "escape" | "intermediate":
                    at = self._in_escape(text, at)
                case "control":
                    at = self._in_control(text, at, out)
                case "string":
                    at = self._in_string(text, at)
        return "".join(out)

    def close(self) -> str:
        """What remains to be shown at the end; a sequence that was not ended is dropped. It may be fed again then."""
        out: list[str] = []
        if self._returned:
            self._put("\n", out)
        if self._colored:
            out.append(_RESET)
        self._state = "text"
        self._returned = self._colored = False
        return "".join(out)

    def _put(self, text: str, out: list[str]) -> None:
        if text:
            out.append(text)
            self._line_empty = text.endswith("\n")

    def _in_text(self, text: str, at: int, out: list[str]) -> int:
        if self._returned:
            self._returned = False
            if text[at] not in "\r\n":
                self._put("\n", out)
        found = _UNSAFE.search(text, at)
        if found is None:
            self._put(text[at:], out)
            return len(text)
        self._put(text[at : found.start()], out)
        character = found[0]
        if character == "\r":
            self._returned = not self._line_empty
        elif character == "\x1b":
            self._state = "escape"
        elif character == _CSI_8BIT:
            self._state = "control"
            self._parameters = None
        elif character in _STRINGS_8BIT:
            self._state = "string"
        else:
            self._put(ascii(character)[1:-1], out)
        return found.end()

    def _in_escape(self, text: str, at: int) -> int:
        character = text[at]
        if self._state == "escape" and character == "[":
            self._state = "control"
            self._parameters = "" if self._colors else None
        elif self._state == "escape" and character in _STRINGS:
            self._state = "string"
        elif " " <= character <= "/":
            self._state = "intermediate"
        else:
            self._state = "text"
            # What is no final byte was not meant as part of a sequence.
            return at + ("0" <= character <= "~")
        return at + 1

    def _in_control(self, text: str, at: int, out: list[str]) -> int:
        found = _PARAMETERS.match(text, at)
        end = found.end() if found else at
        if self._parameters is not None:
            self._parameters += text[at : min(end, at + _MAX_SGR + 1)]
            if len(self._parameters) > _MAX_SGR:
                self._parameters = None
        if end == len(text):
            return end
        self._state = "text"
        if not "@" <= text[end] <= "~":
            return end
        if text[end] == "m" and self._parameters is not None and _SGR.fullmatch(self._parameters):
            out.append(f"\x1b[{self._parameters}m")
            self._colored = True
        return end + 1

    def _in_string(self, text: str, at: int) -> int:
        found = _STRING_END.search(text, at)
        if found is None:
            return len(text)
        self._state = "text"
        return found.start() if found[0] in "\x1b\n" else found.end()


def sanitize(text: str, *, colors: bool = False) -> str:
    """All of a text made safe for a terminal; see `Sanitizer`."""
    sanitizer = Sanitizer(colors=colors)
    return sanitizer.feed(text) + sanitizer.close()


def one_line(text: str) -> str:
    """A text made safe and put on one line."""
    return re.sub(r"\s*[\n\t]\s*", " ", sanitize(text)).strip()


# -- standard output and standard error ------------------------------------------------------------------------------

StreamName = Literal["stdout", "stderr"]


class OutputClosed(Exception):
    """Nobody reads standard output any more, as after `| head`."""


@dataclass(frozen=True, slots=True)
class _Target:
    """One of the two streams: a descriptor, or what stands in for it in this process; both None if it is closed."""

    fd: int | None
    stream: TextIO | None
    is_terminal: bool

    @classmethod
    def of(cls, stream: TextIO | None) -> _Target:
        if stream is None:
            return cls(None, None, is_terminal=False)
        stream.flush()
        try:
            fd = stream.fileno()
        except (OSError, ValueError):
            return cls(None, stream, is_terminal=False)
        return cls(fd, stream, is_terminal=os.isatty(fd))

    def write(self, text: str) -> None:
        if self.stream is None:
            return
        if self.fd is None:
            self.stream.write(text)
            return
        # Not the stream: its lock, held by a thread that is left behind, would break the interpreter's exit.
        data = memoryview(text.encode(self.stream.encoding, "backslashreplace"))
        while data:
            data = data[os.write(self.fd, data) :]


class Console:
    """Standard output and standard error of this process.

    What it is handed must be safe already, except by `say`. A failure of standard error is ignored, since there is
    nowhere left to tell it.

    State: `_unfinished`, where the last line has no newline yet; two streams on one terminal count as one.
    """

    def __init__(self) -> None:
        self._targets = {"stdout": _Target.of(sys.stdout), "stderr": _Target.of(sys.stderr)}
        self._unfinished: set[str] = set()

    @property
    def interactive(self) -> bool:
        """Whether somebody sits at standard output."""
        return self._targets["stdout"].is_terminal

    @property
    def colors(self) -> bool:
        """Whether standard error takes colours: a terminal, and nobody asked for none (see no-color.org)."""
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return self._targets["stderr"].is_terminal and not plain

    async def write(self, name: StreamName, text: str) -> None:
        """Write safe text at once, however slow the reader; the event loop goes on meanwhile.

        Raises:
            OutputClosed: nobody reads it.
            OSError: it cannot be written, for example to a full disk.
        """
        if text:
            # A stopped terminal or pager blocks for ever. A worker of the loop's own would have to be waited for at
            # the end; this thread is left behind.
            await in_thread(lambda: self.write_now(name, text))

    def write_now(self, name: StreamName, text: str) -> None:
        """As `write`, for where there is no event loop."""
        try:
            self._targets[name].write(text)
        except BrokenPipeError:
            if name == "stdout":
                raise OutputClosed from None
        except OSError:
            if name == "stdout":
                raise
        if text.endswith("\n"):
            self._unfinished.discard(self._place(name))
        elif text:
            self._unfinished.add(self._place(name))

    async def end_line(self, name: StreamName) -> None:
        """See to it that the next text begins a line."""
        if self._place(name) in self._unfinished:
            await self.write(name, "\n")

    async def say(self, message: str) -> None:
        """Tell something in a line of its own on standard error."""
        await in_thread(lambda: self.say_now(message))

    def say_now(self, message: str) -> None:
        """As `say`, for where there is no event loop."""
        begin = "\n" if self._place("stderr") in self._unfinished else ""
        self.write_now("stderr", f"{begin}actbox: {one_line(message)}\n")

    @contextmanager
    def waiting(self, what: str) -> Generator[Callable[[str], None]]:
        """Show on a terminal what is being waited for, until the block ends; call what it gives to show another."""
        shown = 0

        def show(line: str) -> None:
            nonlocal shown
            if not self._targets["stderr"].is_terminal:
                return
            line = f"actbox: {one_line(line)}..." if line else ""
            # The cursor stays at the line's begin, so that whatever else is written there takes the line's place.
            self._targets["stderr"].write(f"{' ' * shown}\r{line}\r")
            shown = len(line)

        with suppress(OSError):
            show(what)
        try:
            yield show
        finally:
            with suppress(OSError):
                show("")

    def _place(self, name: StreamName) -> str:
        return "terminal" if self._targets[name].is_terminal else name


async def in_thread(function: Callable[[], _T]) -> _T:
    """Call a function that may block for ever in a thread that nobody will wait for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def succeed(value: _T) -> None:
        if not done.done():
            done.set_result(value)

    def fail(error: BaseException) -> None:
        if not done.done():
            done.set_exception(error)

    def work() -> None:
        # The loop may have been closed meanwhile.
        with suppress(RuntimeError):
            try:
                value = function()
            except BaseException as exc:  # noqa: BLE001 - it belongs to the caller
                loop.call_soon_threadsafe(fail, exc)
            else:
                loop.call_soon_threadsafe(succeed, value)

    threading.Thread(target=work, name="actbox-terminal", daemon=True).start()
    return await done


# -- cells -----------------------------------------------------------------------------------------------------------


class CellPrinter:
    """Shows what one cell puts out, as it comes.

    Printed text goes to where the cell printed it, the plain text of displays and results to standard output, each on
    lines of its own, tracebacks to standard error. Nothing shown is taken back: `clear_output` has no effect, and an
    updated display is shown again.

    State: `_sanitizers`, one for each stream; `_error_shown`, whether an exception was.
    """

    def __init__(self, console: Console, *, numbered: bool = False) -> None:
        self._console = console
        self._numbered = numbered
        self._sanitizers: dict[StreamName, Sanitizer] = {"stdout": Sanitizer(), "stderr": Sanitizer()}
        self._error_shown = False

    async def follow(self, execution: Execution, timeout: float) -> ActboxError | None:
        """Show a cell to its end and what there is to say of it; returns what `Execution.result` would raise."""
        failure: ActboxError | None = None
        try:
            async with aclosing(execution.events(timeout)) as events:
                async for event in events:
                    await self._show(event)
        except ActboxError as exc:
            failure = exc
        await self._end_streams()
        await self._conclude(execution, failure)
        return failure

    async def _show(self, event: Event) -> None:
        match event:
            case Stream(name, text):
                await self._console.write(name, self._sanitizers[name].feed(text))
            case ExecuteResult(data, _, count):
                await self._show_display(data, f"Out[{count}]: " if self._numbered else "")
            case DisplayData(data) | UpdateDisplayData(data):
                await self._show_display(data, "")
            case Error():
                await self._show_error(event)
            case KernelRestarted(None):
                await self._console.say("the kernel before had died: this cell begins without the session's state")
            case KernelRestarted(back):
                await self._console.say(
                    f"the kernel before had died: this cell begins with the state after cell {back}"
                )
            case ClearOutput():
                pass

    async def _show_display(self, data: MimeData, label: str) -> None:
        plain = data.get("text/plain")
        text = sanitize(plain) if isinstance(plain, str) else one_line(f"[{', '.join(data)}]")
        if label and "\n" in text.rstrip("\n"):
            label += "\n"
        await self._show_block("stdout", label + text)

    async def _show_error(self, error: Error) -> None:
        trace = error.traceback.rstrip("\n") or f"{error.name}: {error.value}"
        await self._show_block("stderr", sanitize(trace, colors=self._console.colors))
        self._error_shown = True

    async def _show_block(self, name: StreamName, text: str) -> None:
        if text:
            await self._end_stream(name)
            await self._console.end_line(name)
            await self._console.write(name, text if text.endswith("\n") else f"{text}\n")

    async def _end_streams(self) -> None:
        await self._end_stream("stdout")
        await self._end_stream("stderr")

    async def _end_stream(self, name: StreamName) -> None:
        sanitizer, self._sanitizers[name] = self._sanitizers[name], Sanitizer()
        await self._console.write(name, sanitizer.close())

    async def _conclude(self, execution: Execution, failure: ActboxError | None) -> None:
        # A plain ExecutionError is the cell's own exception, whose traceback says it all.
        if failure is not None and not (type(failure) is ExecutionError and self._error_shown):
            await self._console.say(str(failure))
        result = execution.so_far()
        if result.omitted_media:
            await self._console.say(f"{result.omitted_media} displays were too large, and their images are not saved")
        for image in result.images:
            if image.path is not None:
                await self._console.end_line("stderr")
                await self._console.write("stderr", f"image: {one_line(str(image.path))}\n")


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal ended the command; everything is closed."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"ended by signal {number}")


class Signals:
    """What SIGINT, SIGTERM and SIGHUP do: they cancel the command, once, so that its sandbox is closed.

    While a cell runs, the first SIGINT interrupts the cell instead.

    State: `_stopped_by`, the first signal that cancelled; `_on_interrupt`, what SIGINT does at present: it returns
    False if the command is to be cancelled all the same; `_interrupts`, tasks that wait for an interrupt's effect.
    """

    def __init__(self, task: asyncio.Task[int]) -> None:
        self._task = task
        self._stopped_by: int | None = None
        self._on_interrupt: Callable[[], bool] | None = None
        self._interrupts: set[asyncio.Task[None]] = set()

    @classmethod
    async def run(cls, command: Callable[[Signals], Awaitable[int]]) -> int:
        """Run a command to its end; call it in the main thread.

        Raises:
            Stopped: a signal ended it.
        """

        async def begin() -> int:
            return await command(signals)

        task = asyncio.create_task(begin())
        signals = cls(task)
        signals.watch()
        try:
            return await task
        except asyncio.CancelledError:
            if signals._stopped_by is None:
                raise
            raise Stopped(signals._stopped_by) from None

    def watch(self) -> None:
        """Take over the signals; again after somebody else had them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Who started us with a signal ignored (nohup, a shell's background job) meant it.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._take, number)

    @contextmanager
    def interrupting(self, execution: Execution, *, second_leaves: bool) -> Generator[None]:
        """Within the block SIGINT interrupts the cell, and a second one leaves or does nothing."""
        asked = False

        def interrupt() -> bool:
            nonlocal asked
            if asked or execution.outcome is not None:
                return not second_leaves
            asked = True
            task = asyncio.create_task(execution.interrupt())
            self._interrupts.add(task)
            task.add_done_callback(self._interrupts.discard)
            return True

        self._on_interrupt = interrupt
        try:
            yield
        finally:
            self._on_interrupt = None

    def _take(self, number: int) -> None:
        if number == signal.SIGINT and self._on_interrupt is not None and self._on_interrupt():
            return
        # Once: a second cancellation would tear the closing that the first one began.
        if self._stopped_by is None:
            self._stopped_by = number
            self._task.cancel()

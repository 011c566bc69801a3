# IPython's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""IPython as people know it, with its outputs turned into events.

The shell is made once, by the supervisor, before any session exists; a session's kernel inherits it by fork and
connects it to its own channel. Until then outputs have nowhere to go, and nothing produces any.
"""

from __future__ import annotations

import base64
import binascii
import builtins
import contextlib
import getpass
import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import StdinNotImplementedError
from IPython.core.history import HistoryManager
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.page import as_hook, display_page
from traitlets import Any as AnyTrait
from traitlets import Type

if TYPE_CHECKING:
    from collections.abc import Generator

    from .output import Channel

MAX_BUNDLE = 48 << 20
MAX_ERROR_TEXT = 128 << 10
_TEXT_FORMATS = ("text/", "image/svg+xml", "application/javascript", "application/xml")
_BINARY_FORMATS = ("image/", "audio/", "video/", "application/pdf")


class _Outputs:
    """Where the shell's outputs go: the channel of this process's session, once there is one."""

    channel: Channel | None = None

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        if self.channel is not None:
            self.channel.send(header, payload)

    def bundle(self, kind: str, data: dict[str, Any], metadata: dict[str, Any] | None, extra: dict[str, Any]) -> None:
        """One display as a frame; beyond MAX_BUNDLE formats are left out, the largest first, and named."""
        parts = [(mime, *_as_bytes(mime, value)) for mime, value in data.items()]
        left_out: list[str] = []
        while sum(len(block) for _, _, block in parts) > MAX_BUNDLE:
            largest = max(parts, key=lambda part: len(part[2]))
            parts.remove(largest)
            left_out.append(str(largest[0])[:200])
        header = {
            "type": kind,
            "parts": [[str(mime)[:200], form, len(block)] for mime, form, block in parts],
            "metadata": _plain(metadata or {}),
            **extra,
        }
        if left_out:
            header["left_out"] = left_out
        self.send(header, b"".join(block for _, _, block in parts))


outputs = _Outputs()


class Publisher(DisplayPublisher):
    """`display()`, `update_display()` and `clear_output()`."""

    def publish(
        self,
        data: dict[str, Any],
        metadata: dict[str, Any] | None = None,
        source: object = None,  # noqa: ARG002
        *,
        transient: dict[str, Any] | None = None,
        update: bool = False,
        **_kwargs: object,
    ) -> None:
        display_id = (transient or {}).get("display_id")
        extra = {} if display_id is None else {"display_id": str(display_id)[:200]}
        outputs.bundle("update_display_data" if update else "display_data", data, metadata, extra)

    def clear_output(self, wait: bool = False) -> None:  # noqa: FBT001, FBT002 - IPython's signature
        outputs.send({"type": "clear_output", "wait": bool(wait)})


class Hook(DisplayHook):
    """The value of a cell's last expression."""

    def write_output_prompt(self) -> None:
        """The prompt is the host's to draw."""

    def write_format_data(self, format_dict: dict[str, Any], md_dict: dict[str, Any] | None = None) -> None:
        if format_dict:
            outputs.bundle("execute_result", format_dict, md_dict, {"execution_count": self.prompt_count})


class QuietHistory(HistoryManager):
    """History in memory alone: the one on disk starts a thread, which must not exist before a fork."""

    enabled = False  # pyright: ignore[reportAssignmentType] - overrides a trait with its value


class Shell(InteractiveShell):
    """An `InteractiveShell` without a terminal."""

    displayhook_class = Type(Hook)
    display_pub_class = Type(Publisher)
    exit_now = AnyTrait(default_value=False)

    def init_history(self) -> None:
        self.history_manager = QuietHistory(shell=self, parent=self)
        self.configurables.append(self.history_manager)  # pyright: ignore[reportArgumentType]

    def init_virtualenv(self) -> None:
        """The interpreter inside is the right one already."""

    def init_hooks(self) -> None:
        super().init_hooks()
        self.set_hook("show_in_pager", as_hook(display_page), 99)

    @contextlib.contextmanager
    def _tee(self, channel: str) -> Generator[None]:  # noqa: ARG002
        """IPython 9 keeps a copy of all that a cell prints; a session's memory is not for that."""
        yield

    def ask_exit(self) -> None:
        """`quit()` and `exit()` end the cell, not the session."""
        raise SystemExit

    def enable_gui(self, gui: str | None = None) -> None:
        """There is no screen; figures are displayed inline."""

    def showtraceback(self, *args: Any, **kwargs: Any) -> None:
        """Show the current exception, unless it is how a cell ends well."""
        if not ended_well(sys.exc_info()[1]):
            super().showtraceback(*args, **kwargs)

    def _showtraceback(self, etype: type[BaseException] | None, evalue: BaseException | None, stb: list[str]) -> None:
        name = getattr(etype, "__name__", str(etype))
        try:
            value = str(evalue)
        except Exception as exc:  # noqa: BLE001 - the user's __str__ may do anything
            value = f"<{type(exc).__name__} in __str__>"
        send_error(name, value, "\n".join(stb))


def ended_well(error: BaseException | None) -> bool:
    """`quit()`, `exit()`, `sys.exit()` and `sys.exit(0)` end a cell as they end a program: well."""
    return isinstance(error, SystemExit) and error.code in (None, 0)


def send_error(name: str, value: str, trace: str) -> None:
    """An exception of the user's code, each text cut to a bound in its middle."""
    header = {"type": "error", "ename": _cut(_valid(name), 1000), "evalue": _cut(_valid(value), MAX_ERROR_TEXT)}
    outputs.send(header, _cut(_valid(trace), MAX_ERROR_TEXT * 2).encode())


def make_shell() -> Shell:
    """The shell, ready to be forked."""
    shell = Shell.instance()
    shell.autoawait = True
    # There is no prompt to leave by Ctrl-D.
    warnings.filterwarnings("ignore", message="To exit: use")
    _refuse_input()
    return shell


def warm_up(shell: Shell) -> None:
    """Import, before any fork, what IPython imports at its first cell and at its first traceback.

    The cell is this one, never a guest's; it leaves no trace in the namespace or the history.
    """
    shell.run_cell("pass", store_history=False, silent=True)
    try:
        raise ValueError
    except ValueError:
        shell.InteractiveTB.structured_traceback(*sys.exc_info())
        shell.SyntaxTB.structured_traceback(SyntaxError, SyntaxError("", ("", 1, 1, "", 1, 1)), None)


def _refuse_input() -> None:
    def refuse(*_args: object, **_kwargs: object) -> str:
        raise StdinNotImplementedError(
            "nobody is there to answer input(): assign the value in code, or pass it in the session's environment"
        )

    builtins.input = refuse
    getpass.getpass = refuse
    if hasattr(builtins, "raw_input"):
        builtins.raw_input = refuse  # pyright: ignore[reportAttributeAccessIssue]


def _as_bytes(mime: str, value: object) -> tuple[str, bytes]:
    """A format's value as it travels: ("text" | "binary" | "json", bytes)."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "binary", bytes(value)
    if isinstance(value, str):
        if mime.startswith(_BINARY_FORMATS) and not mime.startswith(_TEXT_FORMATS):
            try:
                return "binary", base64.b64decode(value, validate=False)
            except (binascii.Error, ValueError):
                pass
        return "text", value.encode("utf-8", "backslashreplace")
    return "json", json.dumps(_plain(value), separators=(",", ":")).encode()


def _plain(value: object) -> Any:
    """`value` as strict JSON: what JSON cannot hold becomes its text."""
    try:
        text = json.dumps(value, default=str, allow_nan=False)
        return json.loads(_valid(text))
    except (TypeError, ValueError, RecursionError):
        return json.loads(json.dumps(_valid(repr(value))[:10_000]))


def _valid(text: str) -> str:
    """Text without lone surrogates, which no encoding carries."""
    return text.encode("utf-8", "backslashreplace").decode()


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def connect(channel: Channel) -> None:
    """Send the outputs of this process's shell into `channel` from now on."""
    from .output import OutStream

    outputs.channel = channel
    sys.stdout = sys.__stdout__ = OutStream("stdout", channel.text, channel.raw)  # pyright: ignore[reportAttributeAccessIssue]
    sys.stderr = sys.__stderr__ = OutStream("stderr", channel.text, channel.raw)  # pyright: ignore[reportAttributeAccessIssue]

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
import re
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any

from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.error import StdinNotImplementedError
from IPython.core.formatters import DisplayFormatter
from IPython.core.history import HistoryManager
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.page import as_hook, display_page
from traitlets import Any as AnyTrait
from traitlets import Instance, Type

from . import pictures, tables

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from .output import Channel

MAX_BUNDLE = 48 << 20
MAX_PARTS = 64
MAX_PLAIN_TEXT = 16 << 20
MAX_METADATA = 256 << 10
# Characters. One beyond the BMP is twelve bytes of a frame's header, which has a bound of 1 MiB.
MAX_ERROR_TEXT = 64 << 10
# What IPython's own syntax needs: magics, shell commands, help, auto-call at the start of a line, pasted prompts.
_SPECIAL_SYNTAX = re.compile(r"[%!?\f\r]|^\s*(?:[,;/]|>>>|\.\.\.|In ?\[)", re.MULTILINE)
# As often as the interpreter wants to see code before it has settled.
_WARM_UP_ROUNDS = 12
# Bound once, as in frames.
_to_json = json.JSONEncoder(separators=(",", ":"), default=str).encode
_from_json = json.loads
_SCALARS = frozenset((bool, int, float, complex, str, bytes))
_BLANKS = frozenset(("", " ", "\t", "\n", "\v"))
_TEXT_FORMATS = ("text/", "image/svg+xml", "application/javascript", "application/xml")
_BINARY_FORMATS = ("image/", "audio/", "video/", "application/pdf")


def _never() -> bool:
    return False


def _interrupt() -> None:
    """Its code is run in the place of a cell that was interrupted before it began."""
    raise KeyboardInterrupt


class _Outputs:
    """Where the shell's outputs go: the channel of this process's session, once there is one."""

    channel: Channel | None = None
    told_error = False

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        if self.channel is not None:
            self.channel.send(header, payload)

    def bundle(self, kind: str, data: dict[str, Any], metadata: dict[str, Any] | None, extra: dict[str, Any]) -> None:
        """One display as a frame; a large image gets a smaller copy.

        Beyond MAX_BUNDLE formats are left out, the largest first, and counted.
        """
        parts = [(str(mime)[:200], *_as_bytes(str(mime), value)) for mime, value in data.items()]
        copy = pictures.copy_of(parts)
        if copy is not None:
            parts.append((pictures.MIME, "binary", copy))
        left_out = len(parts) - MAX_PARTS
        del parts[MAX_PARTS:]
        left_out = max(0, left_out)
        while sum(len(block) for _, _, block in parts) > MAX_BUNDLE:
            parts.remove(max(parts, key=lambda part: len(part[2])))
            left_out += 1
        header = {
            "type": kind,
            "parts": [[mime, form, len(block)] for mime, form, block in parts],
            "metadata": _metadata(metadata),
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

    def quiet(self) -> bool:
        """Whether the cell ends in a semicolon; most hold none, and need not be tokenised to see that."""
        cells: list[str] = self.shell.user_ns["_ih"]  # pyright: ignore[reportOptionalMemberAccess]
        return bool(cells) and ";" in cells[-1] and bool(super().quiet())

    def start_displayhook(self) -> None:
        """IPython's writes to `sys.stdout`, whatever the guest has put there."""

    def finish_displayhook(self) -> None:
        """See `start_displayhook`."""

    def write_output_prompt(self) -> None:
        """The prompt is the host's to draw."""

    def write_format_data(self, format_dict: dict[str, Any], md_dict: dict[str, Any] | None = None) -> None:
        if format_dict:
            outputs.bundle("execute_result", format_dict, md_dict, {"execution_count": self.prompt_count})


class QuietHistory(HistoryManager):
    """History in memory alone: the one on disk starts a thread, which must not exist before a fork."""

    enabled = False  # pyright: ignore[reportAssignmentType] - overrides a trait with its value


class Transformer(TransformerManager):
    """IPython's syntax beside Python's, looked for only in cells that can hold some.

    A cell without any of its characters is Python already; to find that out by its tokens takes longer than the rest
    of a short cell's round trip.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known = self._transforms()

    def _transforms(self) -> list[Any]:
        return [*self.cleanup_transforms, *self.line_transforms, *self.token_transformers]

    def transform_cell(self, cell: str) -> str:
        plain = cell[:1] not in _BLANKS and not _SPECIAL_SYNTAX.search(cell) and self._transforms() == self._known
        if not plain:
            return super().transform_cell(cell)
        return cell if cell.endswith("\n") else f"{cell}\n"


class Formats(DisplayFormatter):
    """IPython's formatters, asked only where one of them can have an answer.

    A number or a string has a plain text and nothing else, unless somebody registered more for its type; to ask each
    of a dozen formatters in turn takes longer than the rest of a short cell.
    """

    def format(self, obj: object, include: Any = None, exclude: Any = None) -> Any:
        if include is None and exclude is None and type(obj) in _SCALARS and self._is_plain(type(obj), id(obj)):
            return {"text/plain": self.formatters["text/plain"](obj)}, {}
        return super().format(obj, include, exclude)

    def _is_plain(self, kind: type, identity: int) -> bool:
        others = [formatter for name, formatter in self.formatters.items() if name != "text/plain"]
        for formatter in (*others, self.ipython_display_formatter, self.mimebundle_formatter):
            types = formatter.type_printers
            if kind in types or object in types or identity in formatter.singleton_printers:
                return False
            if any(module == "builtins" for module, _ in formatter.deferred_printers):
                return False
        return True


class Shell(InteractiveShell):
    """An `InteractiveShell` without a terminal."""

    input_transformer_manager = Instance(Transformer, ())
    displayhook_class = Type(Hook)
    # The other way gives each `!command` a terminal: it would wait there for input that nobody can give.
    system = InteractiveShell.system_raw
    display_pub_class = Type(Publisher)
    exit_now = AnyTrait(default_value=False)
    interrupted: Callable[[], bool] = staticmethod(_never)

    def init_history(self) -> None:
        self.history_manager = QuietHistory(shell=self, parent=self)
        self.configurables.append(self.history_manager)  # pyright: ignore[reportArgumentType]

    def init_virtualenv(self) -> None:
        """The interpreter inside is the right one already."""

    def init_display_formatter(self) -> None:
        self.display_formatter = Formats(parent=self)
        tables.register(self.display_formatter)
        self.configurables.append(self.display_formatter)  # pyright: ignore[reportArgumentType]

    def init_hooks(self) -> None:
        super().init_hooks()
        self.set_hook("show_in_pager", as_hook(display_page), 99)

    @contextlib.contextmanager
    def _tee(self, channel: str) -> Generator[None]:  # noqa: ARG002
        """IPython 9 keeps a copy of all that a cell prints; a session's memory is not for that."""
        yield

    def _format_exception_for_storage(self, exception: BaseException, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """IPython 9 also keeps each exception's traceback; it trips over a `__str__` that raises."""
        return {"ename": type(exception).__name__, "evalue": _message(exception), "traceback": []}

    async def run_code(self, code_obj: Any, result: Any = None, *, async_: bool = False) -> bool:
        """Run a part of the cell; the first does not run if the cell was interrupted before it.

        IPython takes an interrupt that comes in a `pre_execute` callback for the callback's own error.
        """
        interrupted, self.interrupted = self.interrupted, _never
        if interrupted():
            code_obj, async_ = _interrupt.__code__, False
        return await super().run_code(code_obj, result, async_=async_)

    def ask_exit(self) -> None:
        """`quit()` and `exit()` end the cell, not the session."""
        raise SystemExit

    def enable_gui(self, gui: str | None = None) -> None:
        """There is no screen; figures are displayed inline."""

    def showtraceback(self, *args: Any, **kwargs: Any) -> None:
        """Show the current exception, unless it is how a cell ends well."""
        error = sys.exc_info()[1]
        if error is None or not (ended_well(error) or _needs_python(error)):
            super().showtraceback(*args, **kwargs)
        elif not ended_well(error):
            send_error(*in_short(error))

    def show_usage_error(self, exc: BaseException) -> None:
        """A magic that does not exist, or was called wrongly."""
        send_error("UsageError", str(exc), f"UsageError: {exc}")

    def _showtraceback(self, etype: type[BaseException] | None, evalue: BaseException | None, stb: list[str]) -> None:
        name = etype.__name__ if etype is not None else "Error"
        send_error(name, _message(evalue), "\n".join(stb))


def ended_well(error: BaseException | None) -> bool:
    """`quit()`, `exit()`, `sys.exit()` and `sys.exit(0)` end a cell as they end a program: well."""
    return isinstance(error, SystemExit) and error.code in (None, 0)


def in_short(error: BaseException) -> tuple[str, str, str]:
    """An exception's name, message and traceback by Python's own means, which stand whatever its class does."""
    return type(error).__name__, _message(error), "".join(traceback.format_exception(error))


def send_error(name: str, value: str, trace: str) -> None:
    """An exception of the user's code, each text cut to a bound in its middle."""
    outputs.told_error = True
    header = {"type": "error", "ename": _cut(_valid(name), 1000), "evalue": _cut(_valid(value), MAX_ERROR_TEXT)}
    outputs.send(header, _cut(_valid(trace), MAX_ERROR_TEXT * 4).encode())


def _message(error: BaseException | None) -> str:
    try:
        return str(error)
    except Exception as exc:  # noqa: BLE001 - the user's __str__ may do anything
        return f"<{type(exc).__name__} in __str__>"


def _needs_python(error: BaseException) -> bool:
    """Whether IPython's traceback cannot show it: an exception group somewhere, or a `__str__` that raises."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if hasattr(link, "exceptions") and hasattr(link, "derive"):
            return True
        link = link.__cause__ or link.__context__
    try:
        str(error)
    except Exception:  # noqa: BLE001 - see _message
        return True
    return False


def make_shell() -> Shell:
    """The shell, ready to be forked."""
    shell = Shell.instance()
    shell.autoawait = True
    # There is no prompt to leave by Ctrl-D.
    warnings.filterwarnings("ignore", message="To exit: use")
    _refuse_input()
    return shell


def warm_up(shell: Shell) -> None:
    """Do before any fork what IPython does at its first cells and at its first traceback.

    That is imports, caches, and the counters with which Python specialises its bytecode: each session that had to do
    it would be slower, and would copy the pages of memory on which it is noted. The cells are these, never a guest's,
    and leave no trace in the namespace or the history.
    """
    fresh = {name: value for name, value in shell.user_ns.items() if name.startswith("_")}
    for _ in range(_WARM_UP_ROUNDS):
        for cell in ("1 + 1", "import sys", "print(end='')"):
            shell.run_cell(cell, store_history=True)
    shell.reset(new_session=True)
    # A reset leaves out what makes the namespace a module (multiprocessing looks for `__spec__`), and `_`.
    for name, value in fresh.items():
        shell.user_ns.setdefault(name, value)
    for name in ("_", "__", "___"):
        # The hook takes a `_` that is not its own for the user's, and leaves it alone from then on.
        setattr(shell.displayhook, name, shell.user_ns[name])
    for name in ("_i", "_ii", "_iii", "_i00"):
        setattr(shell.history_manager, name, "")
    try:
        raise ValueError
    except ValueError as exc:
        shell.InteractiveTB.structured_traceback(type(exc), exc, exc.__traceback__)
        shell.SyntaxTB.structured_traceback(SyntaxError, SyntaxError("", ("", 1, 1, "", 1, 1)), None)


def _refuse_input() -> None:
    """Let `input()` say at once that it gets no answer: kernels are built to ask a front end, and would wait for it."""

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
        return "text", _cut(value, MAX_PLAIN_TEXT if mime == "text/plain" else MAX_BUNDLE).encode(
            "utf-8", "backslashreplace"
        )
    return "json", _to_json(_plain(value)).encode()


def _metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """A display's metadata, as far as it is an object of a sensible size."""
    plain = _plain(metadata or {})
    return plain if isinstance(plain, dict) and len(_to_json(plain)) <= MAX_METADATA else {}


def _plain(value: object) -> Any:
    """`value` as strict JSON: what JSON cannot hold becomes its text, key by key and item by item."""
    try:
        return _from_json(_valid(_to_json(value)), parse_constant=str)
    except (TypeError, ValueError, RecursionError):
        if isinstance(value, dict):
            return {_valid(str(key)): _salvage(item) for key, item in value.items()}
        return _salvage(value)


def _salvage(value: object) -> Any:
    """A value that may not be JSON at all."""
    try:
        return _from_json(_valid(_to_json(value)), parse_constant=str)
    except (TypeError, ValueError):
        return _valid(repr(value))[:10_000]
    except RecursionError:
        return "<nested too deeply>"


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

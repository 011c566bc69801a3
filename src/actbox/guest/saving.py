# IPython's own types are partly unknown, and cloudpickle comes without any.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A session's state into a file and out of it: the kernel's side, and the one place in actbox that unpickles.

It runs inside alone, with the session's rights, on what a session has written: the host keeps the bytes and never looks
into them. cloudpickle is used where it is installed (Ray, Dask and Spark live by it, so it is kept up): functions and
classes that cells defined travel by value with it. Without it there is plain pickle, and these are left out.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import re
import struct
import sys
import types
from typing import TYPE_CHECKING, Any

from . import values
from .places import Refused
from .variables import PIECE, Server, user_variables

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..protocol.frames import Frame
    from .output import Channel

REQUESTS = frozenset(("save", "restore"))
_HEAD = struct.Struct("!I")
_MAX_HEAD = 1 << 20
_MAX_NAMES = 10_000
_MAX_REASON = 200
_MAX_REASONS = 500
# What IPython keeps for itself, whatever it holds just now.
_OWN = re.compile(r"__.*__|_{1,3}|_i{0,3}|_i?\d+|_[iod]h|_exit_code")
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_PROTOCOL = 5


class StateRefused(Refused):
    """A state that cannot be saved or restored."""


class _TooLarge(Exception):
    """More bytes than allowed."""


class Saving(Server):
    """Serves requests to save and restore."""

    def serve(self, request: dict[str, Any], own: str) -> None:
        """Carry out a request; `own` is the session's own folder.

        Raises:
            Refused: it cannot be done, for the reason given; then no variable has changed.
        """
        if request["type"] == "save":
            self._save(int(request["id"]), int(request["max_bytes"]), own)
        else:
            self._restore(int(request["id"]), own)

    # -- into a file ---------------------------------------------------------------------------------------------

    def _save(self, number: int, max_bytes: int, own: str) -> None:
        found = [(name, value) for name, value in user_variables(self._shell) if not _OWN.fullmatch(name)]
        modules = {name: value.__name__ for name, value in found if _is_import(value)}
        state = {name: value for name, value in found if not _is_import(value)}
        left_out: dict[str, str] = {}
        # Once for nothing: then it is known what must be left out, and no file is begun that cannot be ended.
        try:
            self._write(state, _Counter(max_bytes))
        except _TooLarge:
            raise StateRefused(_too_large(max_bytes)) from None
        except Exception:  # noqa: BLE001 - the values' own code; which of them it is, and why, is looked for
            left_out = self._hindrances(state, max_bytes)
            state = {name: value for name, value in state.items() if name not in left_out}
        if len(state) + len(modules) > _MAX_NAMES:
            raise StateRefused(f"there are more than {_MAX_NAMES} variables; put them into a dict")
        cwd = _cwd(own)
        head = _json({"library": _library(), "python": sys.version_info[:2], "modules": modules, "cwd": cwd})
        send = _Sender(self._channel, number)
        send.write(_report([*modules, *state], left_out))
        try:
            counter = _Counter(max_bytes, into=send)
            counter.write(_HEAD.pack(len(head)) + head)
            self._write(state, counter)
        except _TooLarge:
            raise StateRefused(_too_large(max_bytes)) from None
        except Exception as exc:
            raise StateRefused(_in_words(exc)) from exc
        send.flush()

    def _hindrances(self, state: dict[str, Any], max_bytes: int) -> dict[str, str]:
        """The variables that cannot be pickled, and why."""
        found: dict[str, str] = {}
        for name, value in state.items():
            try:
                self._write({name: value}, _Counter(max_bytes))
            except _TooLarge:  # noqa: PERF203 - each by itself is what is asked for
                raise StateRefused(_too_large(max_bytes)) from None
            except Exception as exc:  # noqa: BLE001 - see _save
                found[name] = _in_words(exc)
        return found

    def _write(self, state: dict[str, Any], sink: _Counter) -> None:
        _pickler(sink, self._shell.user_ns, self._known()).dump(state)

    def _known(self) -> dict[int, str]:
        """What every session has under its name, by identity: IPython's own, and functions of the host."""
        space = self._shell.user_ns
        return {
            id(value): name
            for name, value in self._shell.user_ns_hidden.items()
            if type(value) not in _SCALARS and space.get(name) is value
        }

    # -- out of a file -------------------------------------------------------------------------------------------

    def _restore(self, number: int, own: str) -> None:
        source = io.BufferedReader(_Source(self._receive), PIECE)
        head = self._read_head(source)
        found: dict[str, Any] = {}
        for name, module in head["modules"].items():
            try:
                found[name] = importlib.import_module(module)
            except Exception as exc:  # noqa: PERF203 - the first that fails ends it
                raise StateRefused(f"the module {module} cannot be imported ({_in_words(exc)})") from exc
        space = self._shell.user_ns
        before = dict(space)
        try:
            found.update(_Unpickler(source, space).load())
            if source.read(1):
                raise StateRefused("the file holds more than a session's state")
            with self._interrupts.held:
                space.update(found)
                space["__builtins__"] = before["__builtins__"]
        except BaseException as exc:
            # A function's globals are put there while it is made.
            with self._interrupts.held:
                space.clear()
                space.update(before)
            if isinstance(exc, (Refused, KeyboardInterrupt, MemoryError)) or not isinstance(exc, Exception):
                raise
            raise StateRefused(_in_words(exc)) from exc
        left_out: dict[str, str] = {}
        if head["cwd"] is not None:
            cwd = os.path.normpath(os.path.join(own, head["cwd"]))
            try:
                os.chdir(cwd)
            except (OSError, ValueError) as exc:
                left_out["os.getcwd()"] = f"{cwd}: {getattr(exc, 'strerror', exc)}"
        send = _Sender(self._channel, number)
        send.write(_report(list(found), left_out))
        send.flush()

    def _read_head(self, source: io.BufferedIOBase) -> dict[str, Any]:
        size = source.read(_HEAD.size)
        if len(size) < _HEAD.size or not 0 < _HEAD.unpack(size)[0] <= _MAX_HEAD:
            raise StateRefused("the file does not begin as a session's state does")
        try:
            head: dict[str, Any] = json.loads(source.read(_HEAD.unpack(size)[0]))
            library, python = str(head["library"]), tuple(head["python"])
            modules, cwd = head["modules"], head["cwd"]
        except (ValueError, KeyError, TypeError) as exc:
            raise StateRefused("the file does not begin as a session's state does") from exc
        if type(modules) is not dict or type(cwd) not in (str, type(None)):
            raise StateRefused("the file does not begin as a session's state does")
        if python != sys.version_info[:2]:
            # The code of functions is the interpreter's own.
            was, here = (".".join(map(str, version)) for version in (python, sys.version_info[:2]))
            raise StateRefused(f"it was saved by Python {was}, and here is {here}")
        if library == "cloudpickle":
            values.need("cloudpickle", "it was saved with cloudpickle")
        return head


def _cwd(own: str) -> str | None:
    """The working folder; one in the session's own folder as the way from there, where every session has its own."""
    try:
        cwd = os.getcwd()
    except OSError:
        return None
    return os.path.relpath(cwd, own) if os.path.commonpath((cwd, own)) == own else cwd


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _report(names: list[str], left_out: dict[str, str]) -> bytes:
    first = dict(list(left_out.items())[:_MAX_REASONS])
    data = _json({"names": names, "left_out": first, "more": len(left_out) - len(first)})
    if len(data) > values.MAX_HEADER:
        raise StateRefused("the names of the variables are too long to be told")
    return values.PREFIX.pack(len(data)) + data


def _too_large(max_bytes: int) -> str:
    return f"it is more than the {max_bytes} bytes allowed; pass a larger max_bytes, or delete what is not needed"


def _in_words(exc: BaseException) -> str:
    try:
        text = str(exc)
    except Exception:  # noqa: BLE001 - the user's __str__ may do anything
        text = ""
    return f"{type(exc).__name__}: {text}"[:_MAX_REASON]


def _is_import(value: object) -> bool:
    return type(value) is types.ModuleType and sys.modules.get(value.__name__) is value


def _library() -> str:
    try:
        importlib.import_module("cloudpickle")
    except ImportError:
        return "pickle"
    return "cloudpickle"


def _pickler(sink: Any, space: dict[str, Any], known: dict[int, str]) -> Any:
    """A pickler that knows the session's namespace, and what all sessions have, by name."""
    # Not empty, or cloudpickle would put something in; its identity stands for the namespace.
    stand_in = {"__name__": "__main__"}

    def persistent_id(_self: object, value: Any) -> Any:
        if value is stand_in:
            return "namespace"
        name = known.get(id(value))
        return None if name is None else ("name", name)

    if _library() == "cloudpickle":
        base = importlib.import_module("cloudpickle").Pickler
        pickler = type("Pickler", (base,), {"persistent_id": persistent_id})(sink, protocol=_PROTOCOL)
        # Functions that cells defined have the namespace for their globals, here and when they are made again.
        pickler.globals_ref[id(space)] = stand_in
        return pickler

    def reducer_override(_self: object, value: Any) -> Any:
        if issubclass(type(value), (type, types.FunctionType)) and getattr(value, "__module__", "") == "__main__":
            raise pickle.PicklingError("defined in a cell; these need cloudpickle inside: actbox build ... cloudpickle")
        return NotImplemented

    methods = {"persistent_id": persistent_id, "reducer_override": reducer_override}
    return type("Pickler", (pickle.Pickler,), methods)(sink, protocol=_PROTOCOL)


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: Any, space: dict[str, Any]) -> None:
        super().__init__(source)
        self._space = space

    def persistent_load(self, pid: Any) -> Any:
        if pid == "namespace":
            return self._space
        try:
            return self._space[pid[1]]
        except KeyError:
            raise StateRefused(
                f"it uses {pid[1]}, which this session lacks; register the host's functions first"
            ) from None


class _Counter(io.RawIOBase):
    """Counts what is written, passes it on if anybody wants it, and raises `_TooLarge` beyond a bound."""

    def __init__(self, room: int, into: _Sender | None = None) -> None:
        self._room = room
        self._into = into

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        self._room -= size
        if self._room < 0:
            raise _TooLarge
        if self._into is not None:
            self._into.write(data)
        return size


class _Sender:
    """Sends what is written as the archive of a request."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self._number = number
        self._waiting = bytearray()

    def write(self, data: Any) -> None:
        """Send this, in whole pieces."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE):
            self._waiting += view[start : start + PIECE]
            while len(self._waiting) >= PIECE:
                self._send(bytes(self._waiting[:PIECE]))
                del self._waiting[:PIECE]

    def flush(self) -> None:
        """Send the rest."""
        if self._waiting:
            self._send(bytes(self._waiting))
            self._waiting.clear()

    def _send(self, piece: bytes) -> None:
        self._channel.send({"type": "archive", "id": self._number}, piece)


class _Source(io.RawIOBase):
    """What the host sends, up to its end."""

    def __init__(self, receive: Callable[[], Frame]) -> None:
        self._receive = receive
        self._rest = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest and not self._ended:
            frame = self._receive()
            self._ended = frame.header.get("type") == "archive_end"
            if frame.header.get("type") == "archive":
                self._rest = memoryview(frame.payload)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

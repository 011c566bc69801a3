"""Functions of the host that a session's code may call.

The session is not trusted: a call names one of the functions registered for this client, or is refused; its arguments
are data, checked against the annotations here; its answer goes to the session that it came from, as that has no way to
name another. The number of a call is the guest's and is only sent back. How many calls there may be, how many at once
and how large, is bounded here, whatever the kernel's own side does.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import inspect
import json
import keyword
import logging
import threading
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, cast

from actbox import values
from actbox.errors import InvalidArgument, ProtocolError
from actbox.events import CallRecord, Overrun
from actbox.guest import values as guest_values
from actbox.shielded import in_thread
from actbox.values import Unsupported

if TYPE_CHECKING:
    from actbox.execution import Execution
    from actbox.protocol.messages import Call
    from actbox.sessions import Session

P = ParamSpec("P")

logger = logging.getLogger(__name__)

_MAX_MESSAGE = 8 << 10
_MAX_DOC = 16 << 10
_MAX_WORDS = 500
_MAX_RECORDS = 1000
_MAX_PAYLOAD = 32 << 20
# How long functions that are cancelled may take to end before nobody waits for them any more.
_CLOSE_SECONDS = 1.0
# Calls of a cell beyond its budget that are still answered. The kernel's own side stops at the first.
_FLOOD = 1000
_BUDGET_ERROR = "CallBudgetExceeded"
# The name under which the kernel's side has a class for it.
TOOL_ERROR = "mcptools.ToolError"


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What a session may call.

    `per_cell` and `per_session` are numbers of calls, of whatever outcome; `in_flight` is how many may be at work at
    once (more wait inside); `bytes` is how large the arguments of a call, or its result, may be, at most 32 MiB.
    """

    per_cell: int = 1000
    per_session: int = 100_000
    in_flight: int = 16
    bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, least in (("per_cell", 0), ("per_session", 0), ("in_flight", 1), ("bytes", 1024)):
            value = cast("object", getattr(self, name))
            if type(value) is not int or not least <= value < 1 << 53:
                raise InvalidArgument(name, value, f"pass a whole number from {least}")
        if self.bytes > _MAX_PAYLOAD:
            raise InvalidArgument("bytes", self.bytes, f"pass at most {_MAX_PAYLOAD}")


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call that waits for approval: the function's name, and its arguments by parameter, checked already."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Allow:
    """Approval of a call; with `arguments` these take the place of the session's, and are checked like them."""

    arguments: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Deny:
    """Refusal of a call; the session's code sees the reason."""

    reason: str = "it was not approved"


Decision = bool | Allow | Deny
Approve = Callable[[FunctionCall], Decision | Awaitable[Decision]]


class Bound(Protocol):
    """Arguments that were checked: by parameter, for who approves, and as they are passed."""

    @property
    def arguments(self) -> Mapping[str, Any]: ...
    @property
    def args(self) -> tuple[Any, ...]: ...
    @property
    def kwargs(self) -> dict[str, Any]: ...


class Callee(Protocol):
    """What a session may call: `name` is what a call says, `told` what the session is told of it.

    One with a `module`, a name and a text, is in that module of `mcptools` inside, the others in the namespace.
    """

    @property
    def name(self) -> str: ...
    @property
    def approve(self) -> Approve | None: ...
    @property
    def told(self) -> dict[str, Any]: ...
    @property
    def call(self) -> Callable[..., Any]: ...
    @property
    def module(self) -> tuple[str, str] | None: ...

    def bind(self, args: list[Any], kwargs: dict[str, Any]) -> Bound:
        """The session's arguments, checked. Raises TypeError."""
        ...

    def rebind(self, arguments: Mapping[str, Any]) -> Bound:
        """The approver's arguments, checked. Raises TypeError."""
        ...

    def pack(self, result: Any) -> bytes:
        """The result as it travels."""
        ...


class _NotCalled(Exception):
    """The function is not called; `status` is what the session is told, `verdict` what is recorded."""

    def __init__(self, status: str, message: str, verdict: Literal["denied", "refused"] = "refused") -> None:
        self.status = status
        self.verdict: Literal["denied", "refused"] = verdict
        super().__init__(message)


class ToolError(Exception):
    """A tool of a server failed, or its server did: `mcptools.ToolError` inside, with this message."""


class _Raised(Exception):
    """The function was called, and raised this."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__()


class HostFunctions:
    """The method of `ExecutionClient` that registers functions.

    State: `_registry`, what is registered, None before the first.
    """

    _registry: Registry | None = None

    def functions(
        self,
        *functions: Callable[..., Any],
        approve: Approve | None = None,
        limits: CallLimits | None = None,
        **named: Callable[..., Any],
    ) -> None:
        """Let the session's code call these functions, from the next cell on and in whatever kernel it runs.

        Inside they are plain functions with the same signature and docstring. A call blocks its thread;
        `await f.aio(...)` lets an event loop go on meanwhile. Arguments and results are JSON values and bytes, and are
        checked against the annotations by pydantic. Exceptions come back with their class's name and their message.

        Args:
            functions: synchronous ones are called in a thread each, asynchronous ones in this event loop.
            approve: decides each call of these functions: True or `Allow`, False or `Deny`. A synchronous one is called
                in a thread. While it is asked, the cell's time stands still.
            limits: of all calls, for all functions of this client; as they were if None.
            named: functions under another name than their own.

        Raises:
            InvalidArgument: a function or name that cannot be used, or pydantic is missing; nothing was registered.
        """
        registry = self._registry or Registry()
        made: list[Callee] = []
        for name, function in [*((getattr(each, "__name__", ""), each) for each in functions), *named.items()]:
            made.append(_make(name, function, approve))
        registry.add(made, limits)
        self._registry = registry


class Registry:
    """What a client has registered.

    State: the functions and limits; `servers`, what some of them need, and is closed with the client. `_version`,
    counted up with each change, and what was told (`_told`) to whom (`_session`); `_calls`, how many there were,
    whatever became of the kernels that called; `_at_work`, how many functions run, in a thread that was abandoned too;
    `_tasks`.
    """

    def __init__(self) -> None:
        self.functions: dict[str, Callee] = {}
        self.servers: dict[str, Any] = {}
        self.limits = CallLimits()
        self.tasks: set[asyncio.Task[None]] = set()
        self.at_work = 0
        self._version = 0
        self._told = -1
        self._session: Session | None = None
        self._calls = 0

    def add(self, functions: Iterable[Callee], limits: CallLimits | None) -> None:
        """Register these, in the place of others of their names."""
        self.functions.update({function.name: function for function in functions})
        self.limits = limits or self.limits
        self._version += 1

    def branch(self) -> Registry:
        """The same functions for a copy of the session, which has as many calls left; servers stay with the first."""
        made = Registry()
        made.functions.update(self.functions)
        made.limits, made._calls = self.limits, self._calls
        return made

    def replace(self, module: str, functions: Iterable[Callee]) -> None:
        """Let these be all that there is in a module; without any there is none."""
        for name, function in list(self.functions.items()):
            if function.module is not None and function.module[0] == module:
                del self.functions[name]
        self.add(functions, None)

    async def announce(self, session: Session) -> None:
        """Tell a kernel that is about to get a request, unless it knows."""
        if self._session is not session:
            self._session, self._told = session, -1
        if self._told != self._version:
            self._told = self._version
            modules: dict[str, tuple[str, list[dict[str, Any]]]] = {}
            plain: list[dict[str, Any]] = []
            for function in self.functions.values():
                if function.module is None:
                    plain.append(function.told)
                else:
                    module, doc = function.module
                    modules.setdefault(module, (doc, []))[1].append(function.told)
            told = json.dumps({"functions": plain, "modules": modules}).encode()
            header = {"type": "functions", "in_flight": self.limits.in_flight, "max_bytes": self.limits.bytes}
            await session.send(header, told)

    def count(self) -> int:
        """One call more of this session; how many there are with it."""
        self._calls += 1
        return self._calls


class CellCalls:
    """The calls of one cell.

    State: `_calls`, how many there were; `_tasks`, those that are at work; `_refusals`, answers on their way.
    """

    def __init__(self, registry: Registry | None, execution: Execution, session: Session) -> None:
        self._registry = registry or Registry()
        self._execution = execution
        self._session = session
        self._calls = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusals: set[asyncio.Task[None]] = set()

    async def take(self, call: Call) -> None:
        """A call of the session's code; it is answered, at once or beside the cell.

        Raises:
            ProtocolError: it is none, or one of a flood.
        """
        self._calls += 1
        if self._calls > self._registry.limits.per_cell + _FLOOD:
            raise ProtocolError("a flood of calls")
        # Frames that are at hand are taken without a pause: leave the loop to others too.
        await asyncio.sleep(0)
        self._execution.note_call()
        try:
            function = self._find(call)
        except _NotCalled as exc:
            self._record(call.name, "refused", 0.0)
            # Not here: a kernel that does not read its answers must not keep us from reading what it says.
            self._start(self._reply(call, {"status": exc.status, "message": str(exc)}), self._refusals)
            return
        args, kwargs = _read(call.data)
        self._start(self._serve(call, function, args, kwargs), self._tasks)

    def _start(self, work: Coroutine[Any, Any, None], *sets: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        for tasks in (*sets, self._registry.tasks):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def close(self) -> None:
        """The cell has ended: nobody waits for an answer any more."""
        tasks = self._tasks | self._refusals
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_SECONDS)

    def _find(self, call: Call) -> Callee:
        """The function that may be called."""
        limits = self._registry.limits
        if self._execution.transfer is not None:
            raise _NotCalled("refused", "functions of the host can be called while a cell runs, and none does")
        for limit, count, bound in (
            ("calls_per_cell", self._calls, limits.per_cell),
            ("calls_per_session", self._registry.count(), limits.per_session),
        ):
            if count > bound:
                self._execution.calls_over = Overrun(limit, bound, count)
                raise _NotCalled("budget", f"there may be {bound} {limit.replace('_', ' ')}, and they are used up")
        function = self._registry.functions.get(call.name)
        if function is None:
            raise _NotCalled("refused", f"the host has no function {ascii(call.name)[:100]} for this session")
        if len(call.data) > limits.bytes:
            raise _NotCalled("refused", f"the arguments are more than the {limits.bytes} bytes allowed")
        if max(len(self._tasks), self._registry.at_work) >= limits.in_flight:
            raise _NotCalled("refused", f"{limits.in_flight} calls are at work already")
        return function

    async def _serve(self, call: Call, function: Callee, args: list[Any], kwargs: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        verdict: Any = "abandoned"
        try:
            answer, payload, verdict = await self._outcome(function, args, kwargs)
            await self._reply(call, answer, payload)
        finally:
            self._record(call.name, verdict, loop.time() - began)

    async def _outcome(
        self, function: Callee, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], bytes, str]:
        try:
            bound = await _checked(function, function.bind, args, kwargs)
            bound = await self._approved(function, bound)
            result = await self._call(function, bound)
            payload = function.pack(result)
            if len(payload) > self._registry.limits.bytes:
                return (
                    _error("ValueError", f"the result is more than {self._registry.limits.bytes} bytes"),
                    b"",
                    "raised",
                )
        except _NotCalled as exc:
            return {"status": exc.status, "message": str(exc)[:_MAX_MESSAGE]}, b"", exc.verdict
        except TypeError as exc:
            # What does not fit the annotations; the function's own comes as `_Raised`.
            return _error("TypeError", f"{function.name}(): {exc}"), b"", "refused"
        except _Raised as exc:
            logger.debug("the function %s raised", function.name, exc_info=exc.error)
            return _error(_name(exc.error), _message(exc.error)), b"", "raised"
        return {"status": "ok"}, payload, "returned"

    async def _approved(self, function: Callee, bound: Bound) -> Bound:
        if function.approve is None:
            return bound
        asked = FunctionCall(function.name, dict(bound.arguments))
        decision: object = None
        with self._execution.clock.stopped():
            try:
                decision = await self._run(function.approve, (asked,), {})
                if inspect.isawaitable(decision):
                    decision = await decision
            except _Raised as exc:
                logger.warning("the approval of %s failed", function.name, exc_info=exc.error)
            except Exception:
                logger.exception("the approval of %s failed", function.name)
        match decision:
            case True | Allow(None):
                return bound
            case Allow(arguments) if arguments is not None:
                return await _checked(function, function.rebind, arguments)
            case Deny(reason):
                raise _NotCalled("refused", f"{function.name}() was denied: {reason}", "denied")
            case _:
                raise _NotCalled("refused", f"{function.name}() was denied: {Deny().reason}", "denied")

    async def _call(self, function: Callee, bound: Bound) -> Any:
        return await self._run(function.call, bound.args, bound.kwargs)

    async def _run(self, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call something of the caller's. Raises `_Raised`, whatever it raises."""
        if not _is_async(work):
            return await self._in_thread(work, args, kwargs)
        task = asyncio.current_task()
        self._registry.at_work += 1
        try:
            return await work(*args, **kwargs)
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            raise _Raised(exc) from None
        finally:
            self._registry.at_work -= 1

    async def _in_thread(self, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A thread of its own: one that never returns must not keep others from theirs, nor this process from its end.
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        context = contextvars.copy_context()

        def run() -> None:
            value, error = None, None
            try:
                value = context.run(work, *args, **kwargs)
            except BaseException as exc:  # noqa: BLE001 - it is the session's code that is told
                error = exc
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(note, value, error)

        def note(value: Any, error: BaseException | None) -> None:
            self._registry.at_work -= 1
            if not ended.done():
                ended.set_result((value, error))

        self._registry.at_work += 1
        try:
            threading.Thread(target=run, name="actbox-function", daemon=True).start()
        except BaseException:
            self._registry.at_work -= 1
            raise
        value, error = await ended
        if error is not None:
            raise _Raised(error)
        return value

    async def _reply(self, call: Call, answer: dict[str, Any], payload: bytes = b"") -> None:
        # A kernel that is gone is noticed where it is read.
        with contextlib.suppress(OSError):
            await self._session.send({"type": "call_result", "id": call.id, **answer}, payload)

    def _record(self, name: str, verdict: Any, seconds: float) -> None:
        if len(self._execution.calls) < _MAX_RECORDS:
            self._execution.calls.append(CallRecord(name, verdict, seconds))


class _Function:
    """One function: what the session is told of it, and how arguments and results are checked."""

    module: tuple[str, str] | None = None

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        approve: Approve | None,
        signature: inspect.Signature,
        adapters: dict[str, Any],
    ) -> None:
        self.name = name
        self.call = call
        self.approve = approve
        self._signature = signature
        self._adapters = adapters
        self.told = {
            "name": name,
            "doc": (inspect.getdoc(call) or "")[:_MAX_DOC],
            "parameters": [
                [
                    parameter.name,
                    int(parameter.kind),
                    _words(parameter.annotation, _annotation),
                    _words(parameter.default, repr),
                ]
                for parameter in signature.parameters.values()
            ],
            "returns": _words(signature.return_annotation, _annotation),
        }

    def bind(self, args: list[Any], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """The session's arguments, checked. Raises TypeError."""
        return self._checked(self._signature.bind(*args, **kwargs), _from_session)

    def rebind(self, arguments: Mapping[str, Any]) -> inspect.BoundArguments:
        """The approver's arguments, checked. Raises TypeError."""
        bound = inspect.BoundArguments(self._signature, cast("Any", dict(arguments)))
        self._signature.bind(*bound.args, **bound.kwargs)
        return self._checked(bound, _from_host)

    def _checked(self, bound: inspect.BoundArguments, check: Callable[[Any, Any], Any]) -> inspect.BoundArguments:
        for name, value in bound.arguments.items():
            adapter = self._adapters.get(name)
            kind = self._signature.parameters[name].kind
            if adapter is None:
                continue
            try:
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    bound.arguments[name] = tuple(check(adapter, each) for each in value)
                elif kind is inspect.Parameter.VAR_KEYWORD:
                    bound.arguments[name] = {key: check(adapter, each) for key, each in value.items()}
                else:
                    bound.arguments[name] = check(adapter, value)
            except ValueError as exc:
                raise TypeError(f"{name}: {_why(exc)}") from None
        return bound

    def pack(self, result: Any) -> bytes:
        """The result as it travels. Raises TypeError if it is not what the annotation says."""
        adapter = self._adapters.get("return")
        core = importlib.import_module("pydantic_core")
        try:
            if adapter is not None:
                result = adapter.dump_python(adapter.validate_python(result, strict=True))
            encoded = guest_values.to_json(result, core.to_jsonable_python)
            return guest_values.prefix(encoded.header) + encoded.data
        except (ValueError, TypeError, RecursionError, Unsupported) as exc:
            raise not_returned(self.name, _why(exc)) from None


def not_returned(name: str, why: str) -> Exception:
    """For `Callee.pack`: the function was called, and its result cannot travel."""
    return _Raised(TypeError(f"the result of {name}() is not what can be returned: {why}"))


def _make(name: object, call: Any, approve: Approve | None) -> _Function:
    if not callable(call):
        raise InvalidArgument("functions", call, "pass functions")
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise InvalidArgument("functions", name, "give the function a name: functions(name=function)")
    try:
        pydantic: Any = importlib.import_module("pydantic")
    except ImportError as exc:
        raise InvalidArgument("functions", name, "install pydantic: pip install 'actbox[functions]'") from exc
    try:
        signature = inspect.signature(call)
        hinted = call if inspect.isroutine(call) else getattr(call, "func", call.__call__)
        hints = typing.get_type_hints(hinted, include_extras=True)
        adapters = {each: pydantic.TypeAdapter(hint) for each, hint in hints.items() if hint is not Any}
    except Exception as exc:
        raise InvalidArgument("functions", name, f"its annotations cannot be used ({exc})"[:500]) from exc
    return _Function(name, call, approve, signature, adapters)


async def _checked(function: Callee, check: Callable[P, Bound], *args: P.args, **kwargs: P.kwargs) -> Bound:
    """The arguments, by a check of the function's. A server's schema may keep a thread busy, but not the event loop."""
    return check(*args, **kwargs) if function.module is None else await in_thread(check, *args, **kwargs)


def _is_async(work: Any) -> bool:
    return inspect.iscoroutinefunction(work) or inspect.iscoroutinefunction(getattr(work, "__call__", None))  # noqa: B004


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _words(value: Any, write: Callable[[Any], str]) -> str | None:
    if value is inspect.Parameter.empty:
        return None
    try:
        return write(value)[:_MAX_WORDS]
    except Exception:  # noqa: BLE001 - a default's own __repr__
        return "..."


def _from_session(adapter: Any, value: Any) -> Any:
    """A value as JSON means it: a list may be a tuple, a text a date; with bytes in it, as Python means it."""
    if has_bytes(value):
        return adapter.validate_python(value, strict=True)
    return adapter.validate_json(json.dumps(value), strict=True)


def _from_host(adapter: Any, value: Any) -> Any:
    return adapter.validate_python(value, strict=True)


def has_bytes(value: Any) -> bool:
    """Whether there are bytes anywhere in a value as it came."""
    match value:
        case bytes():
            return True
        case list():
            return any(has_bytes(each) for each in cast("list[Any]", value))
        case dict():
            return any(has_bytes(each) for each in cast("dict[str, Any]", value).values())
        case _:
            return False


def _read(data: bytes) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments. Raises ProtocolError."""
    size = guest_values.PREFIX.size
    head = guest_values.PREFIX.unpack_from(data)[0] if len(data) >= size else -1
    if not 0 < head <= guest_values.MAX_HEADER:
        raise ProtocolError("a call without arguments")
    try:
        arguments = values.decode_json(data[size : size + head], data[size + head :])
    except values.Malformed as exc:
        raise ProtocolError(f"a call with malformed arguments: {exc}") from exc
    match arguments:
        case [[*args], dict()]:
            return args, cast("dict[str, Any]", arguments[1])
        case _:
            raise ProtocolError("a call without positional and named arguments")


def _why(exc: Exception) -> str:
    """What is wrong with a value, without the value, which may be large or not the session's to see."""
    errors: Any = getattr(exc, "errors", None)
    if errors is None:
        return str(exc)[:_MAX_WORDS]
    told = errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, error['loc']))} {error['msg']}".strip() for error in told[:5])[:_MAX_WORDS]


def _error(name: str, message: str) -> dict[str, Any]:
    return {"status": "error", "name": name[:_MAX_WORDS], "message": message[:_MAX_MESSAGE]}


def _name(error: BaseException) -> str:
    """What an exception's class is called inside."""
    return TOOL_ERROR if isinstance(error, ToolError) else type(error).__name__


def _message(error: BaseException) -> str:
    if isinstance(error, KeyError) and len(error.args) == 1:
        error = Exception(error.args[0])  # its own str() is the repr() of what it was given
    try:
        return str(error)
    except Exception as exc:  # noqa: BLE001 - the exception's own __str__
        return f"<{type(exc).__name__} in __str__>"


def is_budget(name: str) -> bool:
    """Whether an exception of this name is the kernel's word for calls that are used up."""
    return name == _BUDGET_ERROR

"""A session's calls of the host: what is registered for it, and how each call is taken, decided and answered.

The session is not trusted: a call names one of the functions registered for this client, or is refused; its arguments
are data, checked by the function that is called; its answer goes to the session that it came from, as that has no way
to name another. The number of a call is the guest's and is only sent back. How many calls there may be, how many at
once and how large, is bounded here, whatever the kernel's own side does.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import json
import logging
import threading
from typing import TYPE_CHECKING, Any, ParamSpec, cast

from actbox import values
from actbox.callee import Allow, CallLimits, Deny, FunctionCall, NotCalled, Raised, ToolError
from actbox.errors import ProtocolError
from actbox.events import CallRecord, Overrun
from actbox.guest import values as guest_values
from actbox.shielded import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

    from actbox.callee import Bound, Callee
    from actbox.execution import Execution
    from actbox.protocol.messages import Call
    from actbox.sessions import Session

P = ParamSpec("P")

logger = logging.getLogger(__name__)

# Characters of what the session is told went wrong, and of an exception's name.
_MAX_MESSAGE = 8 << 10
_MAX_NAME = 500
_MAX_RECORDS = 1000
# Of a server's messages, whatever the limits are: it may have to say much of its tools.
_LEAST_MESSAGE = 4 << 20
# How long a cell waits for a server that has other tools now, until it begins with those that were.
_SETTLE_SECONDS = 2.0
# How long functions that are cancelled may take to end before nobody waits for them any more.
_CLOSE_SECONDS = 1.0
# Calls of a cell beyond its budget that are still answered. The kernel's own side stops when it hears of it.
_FLOOD = 1000
_BUDGET_ERROR = "CallBudgetExceeded"
# The name under which the kernel's side has a class for it.
_TOOL_ERROR = "mcptools.ToolError"


class Registry:
    """What a client has registered.

    State: the functions and limits; `servers`, what some of them need, and is closed with the client. `_version`,
    counted up with each change, and what was told (`_told`) to whom (`_session`); `_calls`, how many there were,
    whatever became of the kernels that called; `at_work`, how many functions run, in a thread that was abandoned too;
    `tasks`, held here so that they are not lost.
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

    @property
    def max_message(self) -> int:
        """Bytes that a message of a server's may have now; it may hold a result twice, as text and as data."""
        return max(_LEAST_MESSAGE, 4 * self.limits.bytes)

    async def settle(self) -> None:
        """Let servers say which tools they have now, if they have said that these have changed, within a bound."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_SECONDS):
                for server in list(self.servers.values()):
                    await server.settle()

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
        limits = self._registry.limits
        # As many as may be at once are on their way before the kernel hears that its budget is used up.
        if self._calls > limits.per_cell + limits.in_flight + _FLOOD:
            raise ProtocolError("a flood of calls")
        # Frames that are at hand are taken without a pause: leave the loop to others too.
        await asyncio.sleep(0)
        self._execution.note_call()
        try:
            function = self._find(call)
        except NotCalled as exc:
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
            raise NotCalled("refused", "functions of the host can be called while a cell runs, and none does")
        for limit, count, bound in (
            ("calls_per_cell", self._calls, limits.per_cell),
            ("calls_per_session", self._registry.count(), limits.per_session),
        ):
            if count > bound:
                self._execution.calls_over = Overrun(limit, bound, count)
                raise NotCalled("budget", f"there may be {bound} {limit.replace('_', ' ')}, and they are used up")
        function = self._registry.functions.get(call.name)
        if function is None:
            raise NotCalled("refused", f"the host has no function {ascii(call.name)[:100]} for this session")
        if len(call.data) > limits.bytes:
            raise NotCalled("refused", f"the arguments are more than the {limits.bytes} bytes allowed")
        if max(len(self._tasks), self._registry.at_work) >= limits.in_flight:
            raise NotCalled("refused", f"{limits.in_flight} calls are at work already")
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
            result = await self._run(function.call, bound.args, bound.kwargs)
            payload = function.pack(result)
            if len(payload) > self._registry.limits.bytes:
                return (
                    _error("ValueError", f"the result is more than {self._registry.limits.bytes} bytes"),
                    b"",
                    "raised",
                )
        except NotCalled as exc:
            return {"status": exc.status, "message": str(exc)[:_MAX_MESSAGE]}, b"", exc.verdict
        except TypeError as exc:
            # What does not fit the annotations; the function's own comes as `Raised`.
            return _error("TypeError", f"{function.name}(): {exc}"), b"", "refused"
        except Raised as exc:
            logger.debug("the function %s raised", function.name, exc_info=exc.error)
            return _error(_name(exc.error), _message(exc.error)), b"", "raised"
        except Exception:
            # No thread can be had, or whatever else: who called must hear of it, and not wait for the cell's end.
            logger.exception("a call of %s failed on the host", function.name)
            return _error("RuntimeError", f"{function.name}() failed on the host"), b"", "refused"
        return {"status": "ok"}, payload, "returned"

    async def _approved(self, function: Callee, bound: Bound) -> Bound:
        if function.approve is None:
            return bound
        asked = FunctionCall(function.name, dict(bound.arguments))
        decision: object = None
        with self._execution.clock.stopped():
            try:
                decision = await self._run(function.approve, (asked,), {})
            except Raised as exc:
                logger.warning("the approval of %s failed", function.name, exc_info=exc.error)
            except Exception:
                logger.exception("the approval of %s failed", function.name)
        match decision:
            case True | Allow(None):
                return bound
            case Allow(arguments) if arguments is not None:
                try:
                    return await _checked(function, function.rebind, arguments)
                except TypeError as exc:
                    logger.warning("the arguments that %s was approved with do not fit: %s", function.name, exc)
                    raise
            case Deny(reason):
                raise NotCalled("refused", f"{function.name}() was denied: {reason}", "denied")
            case _:
                raise NotCalled("refused", f"{function.name}() was denied: {Deny().reason}", "denied")

    async def _run(self, work: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call something of the caller's. Raises `Raised`, whatever it raises."""
        if not _is_async(work):
            value = await self._in_thread(work, args, kwargs)
            if not inspect.isawaitable(value):
                return value
            # An asynchronous one in the clothes of another: a lambda, or a decorator's.
            work, args, kwargs = _result_of, (value,), {}
        task = asyncio.current_task()
        self._registry.at_work += 1
        try:
            return await work(*args, **kwargs)
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            raise Raised(exc) from None
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
            raise Raised(error)
        return value

    async def _reply(self, call: Call, answer: dict[str, Any], payload: bytes = b"") -> None:
        # A kernel that is gone is noticed where it is read.
        with contextlib.suppress(OSError):
            await self._session.send({"type": "call_result", "id": call.id, **answer}, payload)

    def _record(self, name: str, verdict: Any, seconds: float) -> None:
        if len(self._execution.calls) < _MAX_RECORDS:
            self._execution.calls.append(CallRecord(name, verdict, seconds))


async def _checked(function: Callee, check: Callable[P, Bound], *args: P.args, **kwargs: P.kwargs) -> Bound:
    """The arguments, by a check of the function's. A server's schema may keep a thread busy, but not the event loop."""
    return check(*args, **kwargs) if function.module is None else await in_thread(check, *args, **kwargs)


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _is_async(work: Any) -> bool:
    return inspect.iscoroutinefunction(work) or inspect.iscoroutinefunction(getattr(work, "__call__", None))  # noqa: B004


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


def _error(name: str, message: str) -> dict[str, Any]:
    return {"status": "error", "name": name[:_MAX_NAME], "message": message[:_MAX_MESSAGE]}


def _name(error: BaseException) -> str:
    """What an exception's class is called inside."""
    return _TOOL_ERROR if isinstance(error, ToolError) else type(error).__name__


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

"""Functions of the host that a session's code may call: Python functions, checked against their annotations."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import keyword
import logging
import typing
from typing import TYPE_CHECKING, Any, cast

from actbox.callee import CallLimits, check_approve, has_bytes, not_returned
from actbox.calls import Registry
from actbox.errors import InvalidArgument
from actbox.guest import values as guest_values
from actbox.values import Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from actbox.callee import Approve, Callee

logger = logging.getLogger(__name__)

_MAX_DOC = 16 << 10
_MAX_WORDS = 500


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
            functions: synchronous ones are called in a thread each, asynchronous ones in this event loop. What is to
                be awaited, of a lambda for example, is awaited there.
            approve: decides each call of these functions: True or `Allow`, False or `Deny`. A synchronous one is called
                in a thread. While it is asked, the cell's time stands still.
            limits: of all calls, for all functions of this client; as they were if None.
            named: functions under another name than their own.

        Raises:
            InvalidArgument: a function, name, `approve` or `limits` that cannot be used, or pydantic is missing;
                nothing was registered.
        """
        check_approve(approve)
        if limits is not None and not isinstance(limits, CallLimits):
            raise InvalidArgument("limits", limits, "pass actbox.CallLimits")
        registry = self._registry or Registry()
        made: list[Callee] = []
        for name, function in [*((getattr(each, "__name__", ""), each) for each in functions), *named.items()]:
            made.append(_make(name, function, approve))
        registry.add(made, limits)
        self._registry = registry


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
        bound = self._checked(self._signature.bind(*args, **kwargs), _from_session)
        # Who approves must see all that it will be called with.
        bound.apply_defaults()
        return bound

    def rebind(self, arguments: Mapping[str, Any]) -> inspect.BoundArguments:
        """The approver's arguments, checked. Raises TypeError."""
        for name in arguments:
            if name not in self._signature.parameters:
                raise TypeError(f"it has no parameter {name!r}")
        bound = inspect.BoundArguments(self._signature, cast("Any", dict(arguments)))
        bound.apply_defaults()
        self._signature.bind(*bound.args, **bound.kwargs)
        return self._checked(bound, _from_host)

    def _checked(self, bound: inspect.BoundArguments, check: Callable[[Any, Any], Any]) -> inspect.BoundArguments:
        for name, value in bound.arguments.items():
            adapter = self._adapters.get(name)
            parameter = self._signature.parameters[name]
            kind = parameter.kind
            if adapter is None or (check is _from_host and value is parameter.default):
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
            except RecursionError:
                raise TypeError(f"{name}: it is nested too deep") from None
            except Exception as exc:
                if isinstance(exc, TypeError):
                    raise
                # A validator of the host's own, which should have raised ValueError: its words are not the session's.
                logger.warning("the argument %s of %s could not be checked", name, self.name, exc_info=exc)
                raise TypeError(f"{name}: {type(exc).__name__} while it was checked") from None
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
        except Exception as exc:
            logger.warning("the result of %s could not be checked", self.name, exc_info=exc)
            raise not_returned(self.name, f"{type(exc).__name__} while it was checked") from None


def _make(name: object, call: Any, approve: Approve | None) -> _Function:
    if not callable(call):
        raise InvalidArgument("functions", call, "pass functions")
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise InvalidArgument("functions", name, "give the function a name: functions(name=function)")
    if inspect.isasyncgenfunction(call):
        raise InvalidArgument("functions", name, "pass one that returns a list: nothing is called step by step")
    try:
        pydantic: Any = importlib.import_module("pydantic")
    except ImportError as exc:
        raise InvalidArgument("functions", name, "install pydantic: pip install 'actbox[functions]'") from exc
    try:
        signature = inspect.signature(call)
        hints = _hints(call)
        adapters = {each: pydantic.TypeAdapter(hint) for each, hint in hints.items() if hint is not Any}
    except Exception as exc:
        raise InvalidArgument("functions", name, f"its annotations cannot be used ({exc})"[:500]) from exc
    return _Function(name, call, approve, signature, adapters)


def _hints(call: Any) -> dict[str, Any]:
    """The annotations of what is called in the end."""
    if isinstance(call, functools.partial):
        return _hints(cast("Any", call).func)
    if inspect.isclass(call):
        # What it makes is one of it, whatever its __init__ returns.
        hints = typing.get_type_hints(call.__init__, include_extras=True)
        return {name: hint for name, hint in hints.items() if name != "return"}
    return typing.get_type_hints(call if inspect.isroutine(call) else call.__call__, include_extras=True)


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
    """A value of the approver's: as Python means it, or as JSON does, as which a person may have edited it."""
    try:
        return adapter.validate_python(value, strict=True)
    except ValueError as wrong:
        try:
            return _from_session(adapter, value)
        except (ValueError, TypeError):
            raise wrong from None


def _why(exc: Exception) -> str:
    """What is wrong with a value, without the value, which may be large or not the session's to see."""
    errors: Any = getattr(exc, "errors", None)
    if errors is None:
        return str(exc)[:_MAX_WORDS]
    told = errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, error['loc']))} {error['msg']}".strip() for error in told[:5])[:_MAX_WORDS]

"""The package `mcptools`: a module for each MCP server that the host has mounted, with its tools as functions.

The modules are made of data and have no source: nothing that a server says is run here, or becomes a name before the
host has made an identifier of it.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_PACKAGE = "mcptools"
_DOC = "Tools of MCP servers that run on the host, a module for each server."


class ToolError(RuntimeError):
    """The tool failed, or the server answered with an error; the message is the server's."""


# Its home inside, by which it is pickled too.
ToolError.__module__ = _PACKAGE

# The modules of ours, by their full names.
_made: dict[str, ModuleType] = {}
# What the host has told of each function that is there, by module and name.
_known: dict[str, dict[str, dict[str, Any]]] = {}


def install(modules: dict[str, tuple[str, list[dict[str, Any]]]], make: Callable[[dict[str, Any]], Any]) -> None:
    """Let there be these modules and no others; functions of which nothing new is told stay as they are."""
    if not modules and not _known:
        return
    package = _module(_PACKAGE, _DOC, is_package=True)
    package.__dict__.update(ToolError=ToolError, __path__=[])
    for name in _known.keys() - modules.keys():
        del _known[name]
        sys.modules.pop(f"{_PACKAGE}.{name}", None)
        package.__dict__.pop(name, None)
    for name, (doc, tools) in modules.items():
        module = _module(f"{_PACKAGE}.{name}", doc)
        known = _known.setdefault(name, {})
        for gone in known.keys() - {told["as"] for told in tools}:
            del known[gone]
            module.__dict__.pop(gone, None)
        for told in tools:
            if known.get(told["as"]) != told:
                known[told["as"]] = told
                module.__dict__[told["as"]] = make(told)
        module.__dict__["__all__"] = sorted(known)
        package.__dict__[name] = module
    package.__dict__["__all__"] = ["ToolError", *sorted(_known)]


def _module(name: str, doc: str, *, is_package: bool = False) -> ModuleType:
    """The module of ours under this name, whoever has put another one there."""
    module = _made.get(name)
    if module is None or sys.modules.get(name) is not module:
        # Of Python's own type, as which modules are known where variables are told and saved.
        module = _made[name] = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=is_package)
        module.__package__ = name if is_package else _PACKAGE
        sys.modules[name] = module
        _known.pop(name.partition(".")[2], None)
    module.__doc__ = doc
    return module

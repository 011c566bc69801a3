"""What builds the boundary. Each engine is one file behind the contract in `base`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from actbox.engines import environments
from actbox.engines.bubblewrap import BubblewrapEngine, explain
from actbox.engines.environments import build as build_environment
from actbox.errors import InvalidArgument

if TYPE_CHECKING:
    from actbox.engines.base import Engine

__all__ = ["NAMES", "available", "build_environment", "explain", "known", "select"]

NAMES = ("auto", "bubblewrap")


def select(name: str) -> Engine:
    """The engine of this name; "auto" is `ACTBOX_ENGINE` from the environment, else bubblewrap.

    Raises:
        InvalidArgument: there is no engine of that name.
    """
    chosen = os.environ.get("ACTBOX_ENGINE", "bubblewrap") if name == "auto" else name
    if chosen not in NAMES:
        raise InvalidArgument("engine", chosen, f"the engines are: {', '.join(NAMES)}")
    return BubblewrapEngine()


def known() -> tuple[str, ...]:
    """The tags of the environments that there are, "default" first."""
    return environments.known()


def available(tag: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `modules` whose package the environment of this tag has.

    Raises:
        EnvironmentNotFound: nobody built it.
    """
    environment = environments.find(tag)
    wanted = {module: [module.split(".")[0]] for module in modules}
    if "matplotlib_inline.backend_inline" in wanted:
        # It comes with IPython, and needs what IPython does not.
        wanted["matplotlib_inline.backend_inline"].append("matplotlib")
    return tuple(module for module, packages in wanted.items() if all(map(environment.has, packages)))

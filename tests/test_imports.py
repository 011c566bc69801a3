"""The rooms of the house and the stairs between them, read off the syntax trees: nothing is imported upwards.

And what the host's side must never do, whatever a guest sends: unpickle, evaluate, or start a shell.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import actbox

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(actbox.__file__).parent
MODULES = {
    ".".join(("actbox", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}

# A room is a module or a sub-package. From the roof to the ground; a room imports from floors below its own, and a
# sub-package within itself. A new room needs a place here.
FLOORS: tuple[set[str], ...] = (
    {"__main__"},
    {"cli"},
    {"repl"},
    {"terminal"},
    {"__init__"},
    {"executor", "doctor"},
    {"container"},
    {"keeping"},
    {"named"},
    {"client"},
    {"attached", "mcp"},
    {"endings", "forking", "functions", "gateway", "rejoining"},
    {"calls", "carrying", "desk", "forks", "local_session"},
    {"kept_files"},
    {"copies", "dialogue", "notebook", "records", "saving", "variables"},
    {"exchange", "history", "sessions", "transfer"},
    {"lines"},
    {"execution", "journal"},
    {"family", "mcp_server", "result"},
    {"blocks", "mcp_tools", "supervision", "workspace"},
    {"connecting", "engines", "pictures", "skills", "values", "way_out", "work_folder"},
    {"cgroups", "egress", "guest", "link", "readable", "refusals", "usage"},
    {"callee", "dotenv", "files", "logger", "mcp_stdio", "outputs", "protocol", "spec"},
    {"frontmatter", "mcp_http", "network", "schemas"},
    {"events"},
    {"checkpoint", "clock", "errors", "shielded"},
)
assert sum(map(len, FLOORS)) == len(set[str]().union(*FLOORS)), "a room is on two floors"
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Rooms that may open fewer doors than their floor has.
ONLY = {
    "errors": set[str](),
    "events": set[str](),
    "callee": {"errors"},
    "clock": set[str](),
    "shielded": set[str](),
    "schemas": set[str](),
    "spec": {"errors"},
    "protocol": {"errors", "events"},
    "network": {"errors"},
    "egress": {"errors", "network"},
    "engines": {"errors", "shielded", "spec"},
    "guest": {"protocol"},
    "values": {"guest", "protocol"},
    "pictures": {"guest"},
    "files": {"errors"},
    "dotenv": {"errors"},
    # Public names alone, and the events, which are as public.
    "terminal": {"__init__", "events"},
    "repl": {"__init__", "events", "terminal"},
    "cli": {"__init__", "events", "repl", "terminal"},
    "__main__": {"cli"},
}

# Doors from one module into another, between rooms that keep apart otherwise.
DOORS = {
    # The Docker profile is the guest's policy in other words, made of the same tables.
    "actbox.engines.profile": {"actbox.guest.seccomp", "actbox.guest.syscalls"},
}

NEVER_IMPORTED = {"cloudpickle", "dill", "jsonpickle", "marshal", "pickle", "pickletools", "runpy", "shelve", "yaml"}
# What restores a session's state, inside it.
UNPICKLES = {"actbox.guest.saving"}
NEVER_CALLED = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "pickle.loads", "marshal.loads"),
}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(module: str) -> Iterator[str]:
    """The modules that a module imports, anywhere in it and for whatever reason, by their full names."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1]]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            submodules = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            yield from submodules
            if len(submodules) < len(node.names):
                yield source


def own(module: str) -> set[str]:
    """The rooms of actbox that a module imports from, its own left out, and those it has a door to."""
    names = {name for name in imported(module) if name.split(".")[0] == "actbox"}
    rooms = {room_of(name) for name in names - DOORS.get(module, set())}
    return rooms - {room_of(module)}


def foreign(module: str) -> set[str]:
    """The packages of others that a module imports from."""
    tops = {name.split(".")[0] for name in imported(module)}
    return tops - sys.stdlib_module_names - {"actbox"}


def test_every_room_has_its_floor() -> None:
    assert {room_of(module) for module in MODULES} <= FLOOR.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    room = room_of(module)
    if room == "__init__":
        return  # it names what is public, wherever that is
    upwards = {other for other in own(module) if FLOOR[other] <= FLOOR[room]}
    assert upwards == set()
    assert own(module) <= ONLY.get(room, FLOOR.keys())


def test_the_public_names_come_from_below() -> None:
    assert {room for room in own("actbox") if FLOOR[room] <= FLOOR["__init__"]} == set()


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in ("cli", "repl", "terminal")])
def test_the_terminals_side_takes_public_names_alone(module: str) -> None:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module == "actbox":
            names = {alias.name for alias in node.names} - {"repl", "terminal"}
            assert names <= set(actbox.__all__)


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) == "guest"])
def test_the_guest_knows_the_frames_alone(module: str) -> None:
    # It runs in any image with IPython, as a package of another name: so its own parts are named relatively.
    own_imports = {name for name in imported(module) if name.startswith("actbox.")}
    assert {name for name in own_imports if room_of(name) != "guest"} <= {"actbox.protocol.frames"}
    assert foreign(module) <= {"IPython", "traitlets"}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] != "actbox"
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "actbox" for alias in node.names)


@pytest.mark.parametrize("module", ["actbox.protocol", "actbox.protocol.frames", "actbox.engines.stage"])
def test_what_also_runs_inside_needs_the_standard_library_alone(module: str) -> None:
    assert {name for name in imported(module) if name.startswith("actbox")} == set()
    assert foreign(module) == set()


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(module: str) -> None:
    """G6: what a guest sends is data, and never more."""
    if module not in UNPICKLES:
        assert {name.split(".")[0] for name in imported(module)} & NEVER_IMPORTED == set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in NEVER_CALLED
            assert "shell=True" not in [ast.unparse(word) for word in node.keywords]


def test_what_unpickles_is_the_kernels_alone() -> None:
    importers = {module for module in MODULES if UNPICKLES & set(imported(module))}
    assert importers == {"actbox.guest.kernel"}
    assert {module for module in MODULES if importers & set(imported(module))} == {"actbox.guest.session"}


def test_the_rules_see_what_they_forbid() -> None:
    """The reading of imports itself: relative, of modules by name, in a function, for types alone."""
    source = "from ..protocol import frames\nfrom . import seccomp\nif x:\n    from .shell import Shell\n"
    TREES["actbox.guest.invented"] = ast.parse(f"{source}def f():\n    import os.path\n")
    MODULES["actbox.guest.invented"] = PACKAGE / "guest" / "invented.py"
    try:
        found = set(imported("actbox.guest.invented"))
    finally:
        del TREES["actbox.guest.invented"], MODULES["actbox.guest.invented"]
    assert found == {"actbox.protocol.frames", "actbox.guest.seccomp", "actbox.guest.shell", "os.path"}

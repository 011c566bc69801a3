"""Fixtures of the one suite: every test that needs an engine gets it here, on every engine that this machine has."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sandboxes
from connections import BY_THE_PORT, SECONDS
from hypothesis import settings

from actbox import (
    ActboxError,
    AttachedClient,
    CodeExecutionContainer,
    CodeExecutor,
    EnvironmentBuildError,
    EnvironmentNotFound,
    ExecutionContainer,
    SandboxUnavailable,
)
from actbox.engines import bubblewrap
from actbox.engines.docker import boot

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

# A busy machine may take its time over an example.
settings.register_profile("actbox", deadline=None)
settings.load_profile("actbox")

pytest_plugins = ["branches", "case_table", "commands"]

_numbers = itertools.count(1)
# What a kernel and its stream do, what needs no kernel, and what the command says: alike for root and for any user.
ALIKE = frozenset(
    {
        *("test_kernel", "test_executions", "test_gateway", "test_variables", "test_functions", "test_libraries"),
        *("test_mcp", "test_mcp_hostile", "test_reattach", "test_carrying", "test_named_forks", "test_lying_kernel"),
        *("test_archives", "test_dialogue", "test_frames", "test_fuzz_frames", "test_result", "test_schemas"),
        *("test_for_model", "test_values", "test_notebook", "test_terminal", "test_profile", "test_imports"),
        *("test_egress_policy", "test_egress_proxy", "test_bench", "test_rounds", "test_soak", "test_cases"),
        *("test_cli", "test_cli_machine", "test_cli_repl", "test_readme", "test_logger", "test_dotenv"),
        *("test_examples", "test_example_reattach", "test_hostile_branches", "test_seccomp", "test_docker_images"),
        *("test_docker_engines", "test_limits", "test_meter", "test_disk_watch", "test_forks", "test_records"),
    }
)
# Here folders have a part, which root shows by mounts of its own, or groups, which root may make. Where that is the
# affair of Docker's engine other modules look: for a second user these run on the other engine alone.
ALIKE_ON_DOCKER = frozenset(
    {
        *("test_saving", "test_skills", "test_environments", "test_checkpoints", "test_transfer"),
        *("test_network", "test_races", "test_unavailable", "test_landlock", "test_lifetime"),
    }
)


# The gateway knows nothing of engines and users: these try it with both engines, the others with one.
ABOUT_THE_PORT = frozenset({"test_gateway", "test_reattach"})


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--again`, for a second pass as another user, who need not try all again."""
    told = "leave out what is alike for every user: a second pass, after one as another user"
    parser.addoption("--again", action="store_true", help=told)


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks of this suite."""
    config.addinivalue_line("markers", "engines(name, ...): the test is about these engines, and runs on no other")
    config.addinivalue_line("markers", "root: only root can try it, in a second pass too")
    config.addinivalue_line("markers", "counting: the test counts all that this process has, and runs early")


@pytest.hookimpl(trylast=True)  # pytest has its own order of what shares a fixture
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is about one engine where the engine is another; run what counts before what is shared exists."""
    left_out: set[pytest.Item] = set()
    for item in items:
        if config.getoption("--again") and _is_alike(item):
            left_out.add(item)
            continue
        if "docker-by the port" in item.name and item.path.stem not in ABOUT_THE_PORT:
            left_out.add(item)
            continue
        mark = item.get_closest_marker("engines")
        if mark is not None:
            assert isinstance(item, pytest.Function)
            assert hasattr(item, "callspec"), f"{item.nodeid} needs the fixture 'engine' for its mark"
            if item.callspec.params["engine"] not in mark.args:
                left_out.add(item)
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.get_closest_marker("counting") is None)
    config.hook.pytest_deselected(items=list(left_out))


def _is_alike(item: pytest.Item) -> bool:
    """Whether the test has nothing to tell of another user."""
    if item.get_closest_marker("root") is not None:
        return False
    on_docker = "docker" in item.name and item.path.stem in ALIKE_ON_DOCKER
    return on_docker or "by the port" in item.name or item.path.stem in ALIKE


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the Docker engine's default image before any test's time runs; what is wrong with it the fixture tells."""
    if session.config.option.collectonly:
        return
    if any("docker" in item.name for item in session.items):
        with contextlib.suppress(ActboxError):
            asyncio.run(_make_image())


async def _make_image() -> None:
    async with ExecutionContainer(engine="docker", preload=()):
        pass


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The host's side is asyncio."""
    return "asyncio"


@pytest.fixture(scope="session", params=["bubblewrap", "docker"])
async def engine(request: pytest.FixtureRequest, anyio_backend: str) -> str:
    """The engine under test: every one of them in turn. One that this machine lacks is skipped, but not in CI."""
    name: str = request.param
    try:
        async with ExecutionContainer(engine=name, preload=()):
            if name == "docker":
                await sandboxes.find_docker()
            return name
    except (SandboxUnavailable, EnvironmentBuildError, EnvironmentNotFound) as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{name}: {exc}")


@pytest.fixture
def default_engine(engine: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine under test, as the one of programs that name none."""
    monkeypatch.setenv("ACTBOX_ENGINE", engine)
    return engine


@pytest.fixture(scope="session")
async def container(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CodeExecutionContainer]:
    """One running container over a workspace, for all tests that do not harm it; libraries are loaded."""
    workspace = tmp_path_factory.mktemp("workspace")
    async with CodeExecutionContainer(workspace_path=workspace, engine=engine, env={"GREETING": "hello"}) as made:
        await made.warmed()
        yield made


@pytest.fixture
def key() -> str:
    """A key that no other test has."""
    return f"key-{next(_numbers)}"


@pytest.fixture
async def executor(container: CodeExecutionContainer, key: str) -> AsyncIterator[CodeExecutor]:
    """A fresh session in the shared container."""
    async with CodeExecutor(key, container.workspace, container.port) as made:
        yield made


@pytest.fixture
def grace() -> float:
    """Seconds that a `client` gives an interrupted cell."""
    return 1.0


@pytest.fixture(params=["here", "by the port"])
async def client(
    request: pytest.FixtureRequest, container: CodeExecutionContainer, key: str, grace: float
) -> AsyncIterator[CodeExecutor]:
    """An executor that kills soon what does not heed an interrupt; by its own socket, and through the gateway."""
    by_the_port = request.param == "by the port"
    options: dict[str, Any] = {"token": container.token} if by_the_port else {}
    host = BY_THE_PORT if by_the_port else "localhost"
    async with CodeExecutor(key, container.workspace, container.port, host, interrupt_grace=grace, **options) as made:
        yield made


@pytest.fixture
def make_executor(
    container: CodeExecutionContainer,
) -> Callable[[], contextlib.AbstractAsyncContextManager[CodeExecutor]]:
    """Makes more sessions in the shared container, each with a key of its own."""

    def make() -> contextlib.AbstractAsyncContextManager[CodeExecutor]:
        return CodeExecutor(f"key-{next(_numbers)}", container.workspace, container.port)

    return make


@pytest.fixture
def session_name(key: str) -> str:
    """The name of a named session, which no other test has."""
    return f"named {key}"


@pytest.fixture(params=["in this process", "by the port"])
def attach(
    request: pytest.FixtureRequest, container: CodeExecutionContainer, session_name: str
) -> Callable[..., AttachedClient]:
    """Makes clients of one named session, of both kinds."""

    def make(**arguments: Any) -> AttachedClient:
        if request.param == "by the port":
            arguments = {"host": BY_THE_PORT, "token": container.token, **arguments}
        return AttachedClient(container.port, session_name, **arguments)

    return make


@pytest.fixture
async def no_named_sessions(container: CodeExecutionContainer) -> AsyncIterator[None]:
    """Ends what a test has left, and sees to it that no kernel of a named session stays behind."""
    yield
    for kept in container.kept_sessions:
        async with AttachedClient(container.port, kept, take_over=True) as client:
            await client.end()
    async with asyncio.timeout(SECONDS):
        while "0 sessions" not in repr(container):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


@pytest.fixture
def workspace_path(tmp_path: Path) -> Path:
    """A folder for a container of the test's own."""
    return tmp_path / "workspace"


@pytest.fixture
def change_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Changes a file of the guest's by a regular expression that must match once, for containers that start then.

    The changed copy takes the place of the real one: with bubblewrap as the folder that is bound, with Docker as the
    code that is handed over.
    """
    package = tmp_path / "package"

    def change(file: str, pattern: str, new: str) -> None:
        if not package.exists():
            for part in ("guest", "protocol"):
                source = Path(boot.__file__).parents[2] / part
                shutil.copytree(source, package / part, ignore=shutil.ignore_patterns("__pycache__"))
            monkeypatch.setattr(bubblewrap, "_PACKAGE", package)
            monkeypatch.setattr(boot, "_PACKAGE", package)
        place = package / "guest" / file
        text, changes = re.subn(pattern, new, place.read_text(encoding="utf-8"))
        assert changes == 1, f"{file} has changed: adapt the test"
        place.write_text(text, encoding="utf-8")
        monkeypatch.setattr(boot, "bundle", functools.cache(boot.bundle.__wrapped__))

    return change

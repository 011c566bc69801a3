"""Control groups of sessions: made where this process may, never around this process, and gone with the session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from actbox import CodeExecutionContainer, CodeExecutor, Limits
from actbox.cgroups import Group, Hierarchy, find

pytestmark = pytest.mark.anyio


def own_group() -> str:
    return Path("/proc/self/cgroup").read_text("ascii")


needs_groups = pytest.mark.skipif(
    find() is None and not (os.environ.get("CI") and os.geteuid() == 0), reason="this user may make no control groups"
)


def processes(group: Path) -> list[str]:
    return (group / "cgroup.procs").read_text("ascii").split()


def delegated(folder: Path) -> Path:
    """A folder as the kernel shows one of version 2 that has the controllers."""
    folder.mkdir()
    (folder / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (folder / "cgroup.subtree_control").write_text("memory pids\n")
    return folder


def test_a_delegated_folder_of_version_2_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = delegated(tmp_path / "delegated")
    monkeypatch.setenv("ACTBOX_CGROUP", str(folder))
    assert find() == Hierarchy(2, folder, folder)


def test_a_folder_without_the_controllers_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = delegated(tmp_path / "delegated")
    (folder / "cgroup.controllers").write_text("cpu\n")
    monkeypatch.setenv("ACTBOX_CGROUP", str(folder))
    assert find() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may make groups everywhere")
def test_an_ordinary_user_has_none_unless_it_was_delegated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACTBOX_CGROUP", raising=False)
    assert find() is None


def test_a_group_of_version_2_is_told_its_bounds(tmp_path: Path) -> None:
    folder = delegated(tmp_path / "delegated")
    group = Group(Hierarchy(2, folder, folder), Limits(memory=1 << 30, pids=50))
    (made,) = (path for path in folder.iterdir() if path.is_dir())
    told = {name: (made / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max")}
    assert int(told["memory.max"]) >= 1 << 30
    assert told["memory.swap.max"] == "0"
    assert 50 <= int(told["pids.max"]) < 100
    (made / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (made / "memory.peak").write_text("12345\n")
    assert (group.memory_kills(), group.peak()) == (2, 12345)


@pytest.mark.parametrize("number", [0, -1])
def test_what_is_no_process_is_never_added(tmp_path: Path, number: int) -> None:
    """To the kernel 0 means whoever writes: the host itself would be bounded by the session's limits."""
    folder = delegated(tmp_path / "delegated")
    group = Group(Hierarchy(2, folder, folder), Limits())
    with pytest.raises(ProcessLookupError):
        group.add(number)
    assert not list(folder.glob("*/cgroup.procs"))


@needs_groups
async def test_this_process_stays_in_its_own_group(workspace_path: Path) -> None:
    before = own_group()
    async with CodeExecutionContainer(workspace_path=workspace_path, engine="bubblewrap", preload=()) as container:
        assert container.enforcement.startswith("cgroup v")
        for number in range(40):
            async with CodeExecutor(f"key-{number}", container.workspace, container.port) as executor:
                assert (await executor.execute("print(1)")).text == "1"
            assert own_group() == before


@needs_groups
async def test_a_session_s_processes_are_in_its_group_which_goes_with_it(workspace_path: Path) -> None:
    hierarchy = find()
    assert hierarchy is not None
    own = f"actbox-{os.getpid()}-*"
    before = set(hierarchy.memory.glob(own))
    async with CodeExecutionContainer(workspace_path=workspace_path, engine="bubblewrap", preload=()) as container:
        async with CodeExecutor("key", container.workspace, container.port) as executor:
            await executor.execute("import subprocess; child = subprocess.Popen(['sleep', '60'])")
            (group,) = set(hierarchy.memory.glob(own)) - before
            # The watcher, the kernel, and what it started.
            assert len(processes(group)) == 3
        assert set(hierarchy.memory.glob(own)) == before
        assert not set(hierarchy.pids.glob(f"{group.name}"))


async def test_a_container_tells_what_bounds_its_sessions(container: CodeExecutionContainer, engine: str) -> None:
    found = find()
    expected = str(found) if found is not None and engine == "bubblewrap" else "rlimits and a watchdog"
    assert container.enforcement == expected

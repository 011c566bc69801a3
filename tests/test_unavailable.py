"""H12: where a layer of the boundary is missing nothing runs, and the layer is named.

A machine that lacks something is made by a script in bubblewrap's place, by an address where no Docker engine is, or by
a copy of the guest's code that behaves as it would there. Where only sessions within sessions are refused, each gets a
sandbox of its own: the last part shows that the promises hold there too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import test_containment as attempts
from sandboxes import containers, sandboxed, supervisors
from test_containment import NUMBERS, inside
from test_libraries import use_files, use_fork, use_loopback, use_pty, use_shared_memory, use_spawn, use_subprocess
from test_lifetime import DAEMONS, back_to, held, none_survives, own_tmp, traces, until

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ConnectionError,
    ExecutionClient,
    ExecutionContainer,
    ExecutionError,
    ExecutionLost,
    ExecutionTimeout,
    InvalidArgument,
    KernelDied,
    Limits,
    SandboxUnavailable,
    StateError,
    WorkspaceError,
    doctor,
)
from actbox.engines import bubblewrap
from actbox.engines.docker import plan
from actbox.guest import seccomp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator
    from pathlib import Path

__all__ = ["own_tmp"]  # a fixture

pytestmark = pytest.mark.anyio

BOUND = 10.0


@pytest.fixture(scope="module")
def real_bwrap() -> Path:
    """A bubblewrap that a script can start as whoever it runs."""
    try:
        bwrap = bubblewrap.find_bwrap()
    except SandboxUnavailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))
    if bwrap.bundled and os.geteuid() == 0:
        pytest.skip("root becomes another user, who may not reach the bundled bubblewrap")
    return bwrap.path


def script(folder: Path, body: str) -> Path:
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def wrapper(folder: Path, real: Path, body: str) -> Path:
    """A script that has the real one's version, and starts it otherwise."""
    return script(folder, f'[ "$1" = --version ] && exec {real} "$@"\n{body}')


async def refused(workspace_path: Path, engine: str) -> SandboxUnavailable:
    """What starting a container raises; nothing may be left of it, and nothing have run."""
    before = traces()
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    with pytest.raises(SandboxUnavailable) as caught:
        async with asyncio.timeout(BOUND):
            await container.run()
    assert await back_to(before) == {}
    with pytest.raises(ConnectionError):
        await container.open_session(None)
    error = caught.value
    assert error.layer in str(error)
    assert error.detail
    assert error.remedy
    return error


# --- bubblewrap itself ------------------------------------------------------------------------------------------------


@pytest.mark.engines("bubblewrap")
async def test_without_bubblewrap_nothing_runs(
    workspace_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H12: the one that is named is not there; no other is taken in its place."""
    monkeypatch.setenv("ACTBOX_BWRAP", "/nonexistent/bwrap")
    error = await refused(workspace_path, engine)
    assert error.layer == "bubblewrap"
    assert "/nonexistent/bwrap" in error.detail


@pytest.mark.engines("bubblewrap")
@pytest.mark.parametrize(
    ("body", "sign"),
    [
        ("echo bubblewrap 0.4.0", "0.4.0"),
        ("echo bubblewrap 0.7.9", "0.7.9"),
        ("echo hello", "hello"),
        ("exit 1", "--version"),
        ("kill -9 $$", "--version"),
    ],
)
async def test_a_bubblewrap_that_is_too_old_or_none_is_refused(
    body: str,
    sign: str,
    workspace_path: Path,
    tmp_path: Path,
    engine: str,
    own_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """H12: by what it says of itself."""
    monkeypatch.setenv("ACTBOX_BWRAP", str(script(tmp_path, body)))
    error = await refused(workspace_path, engine)
    assert error.layer == "bubblewrap"
    assert sign in error.detail


@pytest.mark.engines("bubblewrap")
@pytest.mark.parametrize("mode", [0o4755, 0o2755])
async def test_a_set_id_bubblewrap_is_refused(
    mode: int,
    workspace_path: Path,
    tmp_path: Path,
    engine: str,
    own_tmp: Path,
    real_bwrap: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """H12: it can be traced while it sets up (CVE-2026-41163)."""
    copy = tmp_path / "bwrap"
    shutil.copy(real_bwrap, copy)
    copy.chmod(mode)
    if not copy.stat().st_mode & (stat.S_ISUID | stat.S_ISGID):
        pytest.skip("this file system does not keep the bit")
    monkeypatch.setenv("ACTBOX_BWRAP", str(copy))
    error = await refused(workspace_path, engine)
    assert error.layer == "bubblewrap"
    assert "set-uid" in error.detail


@pytest.mark.engines("bubblewrap")
async def test_a_bubblewrap_that_cannot_be_executed_is_refused(
    workspace_path: Path, tmp_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H12: a file that is no program."""
    path = tmp_path / "bwrap"
    path.write_bytes(b"\x7fELF")
    path.chmod(0o755)
    monkeypatch.setenv("ACTBOX_BWRAP", str(path))
    assert (await refused(workspace_path, engine)).layer == "bubblewrap"


# --- which engine -----------------------------------------------------------------------------------------------------

NOWHERE = "unix:///nonexistent/docker.sock"


@pytest.mark.engines("docker")
async def test_without_docker_nothing_runs(
    workspace_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H12: no other engine is taken in its place."""
    monkeypatch.setenv("DOCKER_HOST", NOWHERE)
    error = await refused(workspace_path, engine)
    assert error.layer == "docker"
    assert "/nonexistent/docker.sock" in error.detail


@pytest.mark.engines("docker")
@pytest.mark.parametrize("reason", ["there is no bubblewrap", "no sandbox can be built with it"])
async def test_where_bubblewraps_boundary_does_not_stand_docker_is_used(
    engine: str, workspace_path: Path, tmp_path: Path, own_tmp: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H12: by "auto"; the engine is known once it stands."""
    place = "/nonexistent/bwrap"
    if reason.startswith("no"):
        place = str(script(tmp_path, '[ "$1" = --version ] && exec echo bubblewrap 0.11.0\nexit 1'))
    monkeypatch.setenv("ACTBOX_BWRAP", place)
    monkeypatch.delenv("ACTBOX_ENGINE", raising=False)
    before = traces()
    container = CodeExecutionContainer(workspace_path=workspace_path, preload=())
    with pytest.raises(StateError):
        _ = container.engine
    async with container, CodeExecutor("one", container.workspace, container.port) as executor:
        assert container.engine == engine
        assert (await executor.execute("print(42)")).text == "42"
        assert [one.id in str(before["containers"]) for one in containers(os.getpid())].count(False) == 1
    assert await back_to(before) == {}


@pytest.mark.engines("bubblewrap")
async def test_where_bubblewraps_boundary_stands_docker_is_not_asked(
    workspace_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H12: by "auto"."""
    monkeypatch.setenv("DOCKER_HOST", NOWHERE)
    monkeypatch.delenv("ACTBOX_ENGINE", raising=False)
    async with CodeExecutionContainer(workspace_path=workspace_path, preload=()) as container:
        assert container.engine == engine


async def test_where_no_engine_stands_the_reason_of_each_is_told(
    workspace_path: Path, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H12: and the remedy of each; in `doctor` too."""
    monkeypatch.setenv("ACTBOX_BWRAP", "/nonexistent/bwrap")
    monkeypatch.setenv("DOCKER_HOST", NOWHERE)
    monkeypatch.delenv("ACTBOX_ENGINE", raising=False)
    error = await refused(workspace_path, "auto")
    assert error.layer == "engine"
    assert "bubblewrap: /nonexistent/bwrap" in error.detail
    assert "docker: docker: " in error.detail
    assert "/nonexistent/docker.sock" in error.detail
    assert "apt install bubblewrap" in error.remedy
    assert "DOCKER_HOST" in error.remedy
    found = [(layer.name, layer.state) for layer in await doctor.examine("auto")]
    assert found == [("bubblewrap", "weaker"), ("docker", "missing")]


async def test_the_default_engine_is_that_of_the_environment(
    workspace_path: Path, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H12: where `ACTBOX_ENGINE` names one, no other is tried."""
    monkeypatch.setenv("ACTBOX_ENGINE", engine)
    async with CodeExecutionContainer(workspace_path=workspace_path, preload=()) as container:
        assert container.engine == engine
    monkeypatch.setenv("ACTBOX_BWRAP", "/nonexistent/bwrap")
    monkeypatch.setenv("DOCKER_HOST", NOWHERE)
    error = await refused(workspace_path, "auto")
    assert error.layer == engine


def test_a_default_engine_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """H12: as if it were an argument; one that is empty is none."""
    monkeypatch.setenv("ACTBOX_ENGINE", "steam")
    with pytest.raises(InvalidArgument, match="steam"):
        ExecutionContainer()
    assert ExecutionContainer(engine="bubblewrap").engine == "bubblewrap"
    monkeypatch.setenv("ACTBOX_ENGINE", "")
    with pytest.raises(StateError):
        _ = ExecutionContainer().engine


def test_a_runtime_is_of_docker_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """H12: by "auto" it chooses the engine."""
    monkeypatch.delenv("ACTBOX_ENGINE", raising=False)
    with pytest.raises(InvalidArgument, match="runtime"):
        ExecutionContainer(engine="bubblewrap", runtime="runc")
    assert ExecutionContainer(runtime="runc").engine == "docker"
    monkeypatch.setenv("ACTBOX_ENGINE", "bubblewrap")
    with pytest.raises(InvalidArgument, match="runtime"):
        ExecutionContainer(runtime="runc")


@pytest.mark.engines("docker")
async def test_a_runtime_that_docker_lacks_is_named(engine: str, workspace_path: Path, own_tmp: Path) -> None:
    """H12: with those that it has."""
    before = traces()
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=(), runtime="warp-drive")
    with pytest.raises(SandboxUnavailable) as caught:
        await container.run()
    assert caught.value.layer == "runtime"
    assert "warp-drive" in caught.value.detail
    assert "runc" in caught.value.detail
    assert await back_to(before) == {}


# --- what the machine does not allow ----------------------------------------------------------------------------------


@pytest.mark.engines("bubblewrap")
async def test_without_user_namespaces_nothing_runs(
    workspace_path: Path,
    tmp_path: Path,
    engine: str,
    own_tmp: Path,
    real_bwrap: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """H12: the real bubblewrap, started where none can be made."""
    inner = f'exec {real_bwrap} --unshare-user --disable-userns --dev-bind / / -- {real_bwrap} "$@"'
    monkeypatch.setenv("ACTBOX_BWRAP", str(wrapper(tmp_path, real_bwrap, inner)))
    error = await refused(workspace_path, engine)
    assert error.layer == "user namespaces"
    assert "namespace" in error.detail
    layers = await doctor.examine(engine)
    assert [(layer.name, layer.state) for layer in layers if layer.state == "missing"] == [
        ("user namespaces", "missing")
    ]


@pytest.fixture
def guest_with(change_guest: Callable[[str, str, str], None]) -> Callable[[str, str, str], None]:
    """Puts a copy of the guest in the place of the real one in which one text is another."""

    def change(file: str, old: str, new: str) -> None:
        change_guest(file, re.escape(old), new.replace("\\", r"\\"))

    return change


async def test_on_a_machine_without_a_filter_nothing_runs(
    workspace_path: Path, engine: str, own_tmp: Path, guest_with: Callable[[str, str, str], None]
) -> None:
    """H12: the machine is one that the system call table does not know."""
    guest_with("seccomp.py", "machine = os.uname().machine\n", 'machine = "riscv64"\n')
    error = await refused(workspace_path, engine)
    assert error.layer == "seccomp"
    assert "riscv64" in error.detail


@pytest.mark.parametrize("stage", ["outer", "inner"])
def test_there_is_no_filter_for_an_unknown_machine(stage: seccomp.Stage) -> None:
    """H12: rather than one that means something else."""
    with pytest.raises(seccomp.UnsupportedMachine, match="riscv64"):
        seccomp.program(stage, "riscv64")


async def test_a_kernel_that_refuses_the_filter_gets_no_session(
    workspace_path: Path, engine: str, own_tmp: Path, guest_with: Callable[[str, str, str], None]
) -> None:
    """H12: the whole sandbox's."""
    guest_with("seccomp.py", "    if result < 0:\n", "    if True:\n")
    error = await refused(workspace_path, engine)
    assert error.layer == "seccomp"


async def test_a_kernel_that_refuses_the_sessions_filter_runs_no_cell(
    workspace_path: Path,
    tmp_path: Path,
    engine: str,
    own_tmp: Path,
    guest_with: Callable[[str, str, str], None],
) -> None:
    """H12: each session's own; neither nested nor in a sandbox of its own."""
    guest_with("seccomp.py", "    if result < 0:\n", '    if result < 0 or stage == "inner":\n')
    before = traces()
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    ran = False
    with pytest.raises(SandboxUnavailable) as caught:
        async with container, CodeExecutor("one", container.workspace, container.port):
            ran = True
    assert not ran
    assert caught.value.layer == "seccomp"
    assert await back_to(before) == {}


async def test_capabilities_that_cannot_be_dropped_run_no_cell(
    workspace_path: Path, engine: str, own_tmp: Path, guest_with: Callable[[str, str, str], None]
) -> None:
    """H12: what was asked of the kernel is looked at afterwards."""
    guest_with("isolation.py", '_check("capability drop", _libc.capset(header, bytes(24)))\n', "pass\n")
    container = CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())
    with contextlib.suppress(SandboxUnavailable):
        async with container, CodeExecutor("one", container.workspace, container.port) as executor:
            # In a sandbox of its own a session has no capability to begin with.
            assert container.isolation == "one sandbox per session"
            assert int((await inside(executor, attempts.status, "self"))["CapEff"], 16) == 0


# Drop a right for good, then start a container and tell how that ended.
LESSER_ROOT = """
import asyncio, ctypes, json, os, sys
capability, workspace = int(sys.argv[1]), sys.argv[2]
if capability >= 0:
    assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0
    os.execv(sys.executable, [sys.executable, sys.argv[3], "-1", workspace])
from actbox import CodeExecutionContainer, CodeExecutor, SandboxUnavailable
async def main():
    try:
        async with CodeExecutionContainer(workspace_path=workspace, engine="bubblewrap", preload=()) as container:
            async with CodeExecutor("one", container.workspace, container.port) as executor:
                print(json.dumps(["ran", (await executor.execute("print(42)")).text]))
    except SandboxUnavailable as exc:
        print(json.dumps([exc.layer, exc.detail, exc.remedy]))
asyncio.run(main())
"""


def as_lesser_root(tmp_path: Path, workspace: Path, capability: int, *prefix: str) -> list[str]:
    program = tmp_path / "program.py"
    program.write_text(LESSER_ROOT, encoding="utf-8")
    argv = [*prefix, sys.executable, str(program), str(capability), str(workspace), str(program)]
    process = subprocess.run(argv, capture_output=True, text=True, timeout=BOUND, check=False, stdin=subprocess.DEVNULL)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root stages the sandbox")


@needs_root
@pytest.mark.parametrize("capability", [21, 7, 6], ids=["sys_admin", "setuid", "setgid"])
def test_root_without_the_rights_to_stage_runs_nothing(capability: int, tmp_path: Path, workspace_path: Path) -> None:
    """H12: as in a container that gives root no rights; nothing is run as root instead."""
    layer, detail, remedy = as_lesser_root(tmp_path, workspace_path, capability)
    assert layer in ("private mount namespace", "id-mapped mounts", "unprivileged user")
    assert detail
    assert "ordinary user" in remedy


def test_root_of_a_user_namespace_runs_nothing_or_in_a_sandbox(tmp_path: Path, workspace_path: Path) -> None:
    """H12: root in name alone, as in a rootless container."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Ur", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespace can be made by unshare")
    found = as_lesser_root(tmp_path, workspace_path, -1, unshare, "-Ur")
    assert found[0] in ("ran", "id-mapped mounts", "unprivileged user", "user namespaces")


# --- one sandbox per session ------------------------------------------------------------------------------------------


def _system_calls_of_one(real: Callable[..., str], facts: plan.Facts, *, nested: bool) -> str:
    return real(facts, nested=False)


@pytest.fixture(scope="module")
def no_nesting(engine: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine where a sandbox cannot hold others."""
    real_calls = plan.system_calls
    with pytest.MonkeyPatch.context() as patch:
        if engine == "docker":
            # With the filter of a container that holds one session alone.
            patch.setattr(plan, "system_calls", functools.partial(_system_calls_of_one, real_calls))
        else:
            real: Path = request.getfixturevalue("real_bwrap")
            path = wrapper(tmp_path_factory.mktemp("bin"), real, f'exec {real} --disable-userns "$@"')
            patch.setenv("ACTBOX_BWRAP", str(path))
        yield


@pytest.fixture(scope="module")
async def separate(
    no_nesting: None, engine: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[CodeExecutionContainer]:
    """A running container on such a machine."""
    async with CodeExecutionContainer(
        workspace_path=tmp_path_factory.mktemp("workspace"), engine=engine, preload=(), env={"GREETING": "hello"}
    ) as container:
        yield container


@pytest.fixture
async def alone(separate: CodeExecutionContainer, key: str) -> AsyncIterator[CodeExecutor]:
    """A session in a sandbox of its own."""
    async with CodeExecutor(key, separate.workspace, separate.port, interrupt_grace=1) as executor:
        yield executor


async def test_refused_nesting_is_told_and_worked_round(
    no_nesting: None, workspace_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    """H12: with a warning in the log, and the reason at hand."""
    with caplog.at_level(logging.WARNING, "actbox"):
        async with CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container:
            assert container.isolation == "one sandbox per session"
            assert "namespaces" in (container.nesting_refusal or "")
            async with ExecutionClient(container.port) as client:
                assert (await client.execute("print(42)")).text == "42"
    (record,) = [record for record in caplog.records if record.name.startswith("actbox")]
    assert record.levelno == logging.WARNING
    assert "sandbox of its own" in record.getMessage()
    found = {layer.name: layer.state for layer in await doctor.examine(engine)}
    assert found["sessions apart"] == "weaker"
    assert "missing" not in found.values()


async def test_every_session_gets_a_sandbox_of_its_own_if_asked_for(
    workspace_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    """H12: without a word of it, where a sandbox could hold others."""
    before = supervisors(os.getpid())
    with caplog.at_level(logging.WARNING, "actbox"):
        async with CodeExecutionContainer(
            workspace_path=workspace_path, engine=engine, preload=(), separate=True
        ) as container:
            assert (container.isolation, container.nesting_refusal) == ("one sandbox per session", None)
            assert supervisors(os.getpid()) == before
            async with (
                CodeExecutor("one", container.workspace, container.port) as one,
                CodeExecutor("two", container.workspace, container.port) as two,
            ):
                assert len(supervisors(os.getpid()) - before) == 2
                assert [(await executor.execute("print(42)")).text for executor in (one, two)] == ["42", "42"]
    assert caplog.records == []


# Where Docker mounts what every container of its has.
DOCKER_MOUNTS = {
    *("/", "/dev", "/dev/mqueue", "/dev/pts", "/dev/shm", "/proc", "/sys", "/sys/firmware", "/tmp", "/run/actbox"),
    *("/sys/devices/virtual/powercap", *attempts.DOCKER_FILES),
}


async def test_alone_a_session_sees_nothing_of_the_host(
    separate: CodeExecutionContainer, alone: CodeExecutor, tmp_path: Path, engine: str
) -> None:
    """A1."""
    (tmp_path / "canary").touch()
    paths = [str(tmp_path / "canary"), str(separate.workspace.path)]
    if engine == "docker":
        paths += attempts.SOCKETS
        assert await inside(alone, attempts.opened, paths) == dict.fromkeys(paths, "ENOENT")
        found = {place for place, _, _ in await inside(alone, attempts.mounted)}
        folders = {"/app/skills/shared", f"/app/skills/private/{alone.key}"}
        assert folders <= found
        assert {
            place for place in found - DOCKER_MOUNTS - folders if not place.startswith(("/proc/", "/sys/fs/cgroup"))
        } == set()
        # The control socket came through it, and it is empty since.
        assert await inside(alone, attempts.listed, "/run/actbox") == []
        attempts.check_docker_files(await inside(alone, attempts.texts, attempts.DOCKER_FILES))
        return
    paths += attempts.NOT_INSIDE
    assert await inside(alone, attempts.opened, paths) == dict.fromkeys(paths, "ENOENT")
    assert set(await inside(alone, attempts.listed, "/")) <= attempts.IN_ROOT
    assert set(await inside(alone, attempts.listed, "/etc")) <= attempts.IN_ETC
    assert await inside(alone, attempts.users) == ["root", "sandbox", "nobody"]


async def test_alone_a_session_writes_only_its_own_folders(
    separate: CodeExecutionContainer, alone: CodeExecutor, engine: str
) -> None:
    """A2, A3, A4, A5, A7, A8."""
    skill = separate.workspace.shared_skills_path / "skill.py"
    skill.write_text("answer = 42\n", encoding="ascii")
    skill.chmod(0o666)
    paths = ["/usr/x", "/etc/x", "/opt/actbox/x", "/x", "/app/x", "/app/skills/x", "/app/skills/private/x"]
    paths += ["/app/skills/shared/x", *(["/var/tmp/x"] if engine == "docker" else ["/opt/actbox/guest/x"])]
    assert set((await inside(alone, attempts.created, paths)).values()) == {"EROFS"}
    # Docker's /dev is root's.
    refusal = "EACCES" if engine == "docker" else "EROFS"
    assert set((await inside(alone, attempts.created, ["/dev/x"])).values()) == {refusal}
    assert set((await inside(alone, attempts.changed, "/app/skills/shared/skill.py")).values()) <= {"EROFS", "EPERM"}
    assert set((await inside(alone, attempts.changed, "/usr/bin/env")).values()) <= {
        "EROFS",
        "EPERM",
        "EACCES",
        "EXDEV",
    }
    assert set((await inside(alone, attempts.mounts_undone, NUMBERS)).values()) == {"EPERM"}
    assert set((await inside(alone, attempts.mounts_in_own_namespace, NUMBERS)).values()) == {"EPERM EPERM"}
    assert await inside(alone, attempts.created, ["own", "/tmp/own", "/dev/shm/own"]) == dict.fromkeys(
        ["own", "own/", "/tmp/own", "/tmp/own/", "/dev/shm/own", "/dev/shm/own/"], "ok"
    )


async def test_alone_a_session_sees_its_own_key_alone(separate: CodeExecutionContainer, alone: CodeExecutor) -> None:
    """A6: and a client without a key sees none."""
    async with (
        CodeExecutor("other", separate.workspace, separate.port) as other,
        ExecutionClient(separate.port) as keyless,
    ):
        await other.execute("open('secret', 'w').close()")
        assert await inside(alone, attempts.listed, "..") == [alone.key]
        paths = ["../other/secret", "/app/skills/private/other/secret", "/proc/1/root/app/skills/private/other/secret"]
        assert set((await inside(alone, attempts.opened, paths)).values()) <= {"ENOENT", "EACCES"}
        assert set((await inside(keyless, attempts.opened, paths)).values()) <= {"ENOENT", "EACCES"}
        assert "private" not in await inside(keyless, attempts.listed, "/app/skills")


async def test_alone_a_link_in_the_place_of_a_keys_folder_is_refused(
    separate: CodeExecutionContainer, key: str, tmp_path: Path
) -> None:
    """A12."""
    separate.workspace.private_skills_path.joinpath(key).symlink_to(tmp_path)
    with pytest.raises(WorkspaceError):
        await CodeExecutor(key, separate.workspace, separate.port).connect()


async def test_alone_a_link_that_comes_after_the_hosts_check_is_refused(
    separate: CodeExecutionContainer, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A12: the race between check and use, which here ends at a place of the host."""
    (tmp_path / "canary").touch()
    separate.workspace.private_skills_path.joinpath(key).symlink_to(tmp_path)
    monkeypatch.setattr(type(separate), "prepare_key", attempts.mock.Mock())
    client = attempts.KeyedClient(separate.port)
    client.key = key
    with pytest.raises((SandboxUnavailable, WorkspaceError)):
        await client.connect()


async def test_alone_no_set_id_file_can_be_made(alone: CodeExecutor) -> None:
    """A22."""
    found = await inside(alone, attempts.set_id_files, NUMBERS)
    assert set(found.values()) <= {"EPERM", "ENOSYS"}


async def test_alone_a_session_holds_no_descriptor_but_its_own(alone: CodeExecutor) -> None:
    """A27."""
    attempts.check_descriptors(await inside(alone, attempts.descriptors))


async def test_alone_the_environment_is_ours_and_no_process_tells_the_hosts(
    no_nesting: None, workspace_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B1, B2, A29."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2hunter2")
    async with (
        CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container,
        CodeExecutor("one", container.workspace, container.port) as executor,
    ):
        attempts.check_variables(await inside(executor, attempts.environment), engine)
        for entry in (await inside(executor, attempts.readable_processes)).values():
            for text in entry.values():
                assert "SECRET_TOKEN" not in text
                assert "hunter2" not in text
                assert str(workspace_path) not in text


async def test_alone_nothing_outside_can_be_reached(alone: CodeExecutor) -> None:
    """C1, C3, C5, C6."""
    found = await inside(alone, attempts.connected, attempts.OUTSIDE)
    assert set(found.values()) <= {"ENETUNREACH", "EADDRNOTAVAIL", "EINVAL", "EAFNOSUPPORT"}
    assert await inside(alone, attempts.interfaces) == ["lo"]
    addresses = [["127.0.0.1", alone.port]]
    assert set((await inside(alone, attempts.connected, addresses)).values()) == {"ECONNREFUSED"}
    families = await inside(alone, attempts.families)
    assert {name for name, answer in families.items() if answer == "ok"} <= {"1", "2", "10"}


async def test_alone_sessions_share_nothing(separate: CodeExecutionContainer, alone: CodeExecutor) -> None:
    """D1, D2, D6, D7, D9."""
    async with CodeExecutor("other", separate.workspace, separate.port) as other:
        attempts.check_shared(
            await inside(alone, attempts.shared_with_others, True),
            await inside(alone, attempts.shared_with_others, False),
            await inside(other, attempts.shared_with_others, False),
        )
        outside = sorted(sandboxed(os.getpid()))
        seen = await inside(other, attempts.pids)
        assert len(seen) <= 3
        assert await inside(other, attempts.signalled, [pid for pid in outside if pid not in seen]) == ["ESRCH"]
        await other.execute("x = 42")
        with contextlib.suppress(KernelDied):
            await inside(alone, attempts.killed_all)
        assert (await other.execute("print(x)")).text == "42"
        assert (await alone.execute("print(1)")).text == "1"


async def test_alone_the_supervisor_cannot_be_looked_into(alone: CodeExecutor) -> None:
    """D3, D4, D5, D13."""
    assert set((await inside(alone, attempts.traced, NUMBERS, 1)).values()) == {"EPERM"}
    assert set((await inside(alone, attempts.reached_into, NUMBERS, 1)).values()) == {"EPERM"}
    for pid in await inside(alone, attempts.pids):
        if pid != int((await inside(alone, attempts.status, "self"))["Pid"]):
            found = await inside(alone, attempts.other_process, pid)
            assert {answer for name, answer in found.items() if name != "cmdline"} <= {"EACCES", "EPERM"}


@pytest.mark.parametrize("pid", ["self", "1"])
async def test_alone_a_session_has_no_rights(alone: CodeExecutor, pid: str) -> None:
    """H1, H3, H4, H5, H9."""
    found = await inside(alone, attempts.status, pid)
    assert {name: found[name] for name in attempts.NO_CAPABILITIES} == attempts.NO_CAPABILITIES
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    names = [name for name in attempts.ATTACK_SURFACE if name in NUMBERS]
    assert set((await inside(alone, attempts.calls_refused, NUMBERS, names)).values()) == {"EPERM"}
    namespaces = await inside(alone, attempts.namespaces_left, NUMBERS)
    assert set(namespaces.values()) <= {"EPERM", "ENOSYS"}
    assert 0 not in {uid for child in sandboxed(os.getpid()) for uid in attempts.host_uids(child)}


async def test_alone_a_cell_that_takes_too_long_is_interrupted(alone: CodeExecutor) -> None:
    """E10: and the state is kept."""
    await alone.execute("x = 42")
    with pytest.raises(ExecutionTimeout) as caught:
        await alone.execute("while True: pass", timeout=0.5)
    assert caught.value.state_kept
    assert (await alone.execute("print(x)")).text == "42"


STUBBORN = {
    "ignores the interrupt (E11)": "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "stops itself (E18)": "import os; os.kill(os.getpid(), 19)",
}
STOP_WATCHER = "import os\nfor pid in range(2, os.getpid()):\n    try: os.kill(pid, 19)\n    except OSError: pass"


async def killed_for_not_ending(executor: CodeExecutor, code: str) -> None:
    began = time.monotonic()
    with pytest.raises(ExecutionTimeout) as caught:
        await executor.execute(f"{code}\nwhile True: pass", timeout=0.5)
    assert not caught.value.state_kept
    assert time.monotonic() - began < BOUND
    result = await executor.execute("print(1)")
    assert (result.text, result.restarted) == ("1", True)


@pytest.mark.parametrize("way", STUBBORN)
async def test_alone_a_cell_that_will_not_end_is_killed(alone: CodeExecutor, way: str) -> None:
    """E11: in bounded time; the next cell finds a fresh kernel."""
    await killed_for_not_ending(alone, STUBBORN[way])


@pytest.fixture
async def exposed(
    change_guest: Callable[[str, str, str], None], workspace_path: Path, engine: str
) -> AsyncIterator[CodeExecutor]:
    """A session in a sandbox of its own where there is no Landlock: it can signal the process that watches it."""
    change_guest(*attempts.WITHOUT_LANDLOCK)
    async with (
        CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=(), separate=True) as container,
        CodeExecutor("one", container.workspace, container.port, interrupt_grace=1) as executor,
    ):
        yield executor


async def test_alone_a_cell_that_stops_its_watcher_is_killed(exposed: CodeExecutor) -> None:
    """E11: as any other that will not end."""
    await killed_for_not_ending(exposed, STOP_WATCHER)


@pytest.mark.parametrize("code", ["os.kill(-1, 9)", "os.kill(os.getppid(), 9)"])
async def test_alone_a_session_that_kills_its_watcher_ends(exposed: CodeExecutor, code: str) -> None:
    """D2, E15: and the host knows; a loop behind it cannot make anybody wait."""
    with pytest.raises((KernelDied, ExecutionTimeout)):
        async with asyncio.timeout(BOUND):
            await exposed.execute(f"import os\n{code}\nwhile True: pass", timeout=1)
    assert (await exposed.execute("print(1)")).text == "1"


async def test_alone_a_kernel_that_dies_is_started_anew(alone: CodeExecutor) -> None:
    """E15, E16."""
    for code in ("import os; os.kill(os.getpid(), 9)", "import os; os._exit(3)", "import ctypes; ctypes.string_at(0)"):
        with pytest.raises(KernelDied):
            await alone.execute(code)
        assert (await alone.execute("print(1)")).restarted
    with pytest.raises(ExecutionError) as caught:
        await alone.execute("x = bytearray(1 << 40)")
    assert caught.value.name == "MemoryError"


@pytest.mark.parametrize("ending", ["left", "died", "timed out", "container closed"])
async def test_alone_daemons_end_with_their_session(
    no_nesting: None, workspace_path: Path, engine: str, ending: str
) -> None:
    """E13: though the session has no process namespace but its sandbox's."""
    before = sandboxed(os.getpid())
    async with CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=()) as container:
        executor = CodeExecutor("one", container.workspace, container.port, interrupt_grace=0.2)
        await executor.connect()
        await executor.execute(DAEMONS)
        with held(sandboxed(os.getpid()) - before) as processes:
            assert len(processes) >= 6
            if ending == "died":
                with pytest.raises(KernelDied):
                    await executor.execute("import os; os.kill(os.getpid(), 9)")
            elif ending == "timed out":
                with pytest.raises(ExecutionTimeout):
                    await executor.execute("import os; os.kill(os.getpid(), 19)", timeout=0.2)
            elif ending == "container closed":
                execution = await executor.submit("while True: pass")
                await container.kill()
                with pytest.raises(ExecutionLost):
                    await execution.result(BOUND)
            else:
                await executor.disconnect()
            assert await none_survives(processes)
        if ending in ("died", "timed out"):
            assert (await executor.execute("print(1)")).text == "1"
        await executor.disconnect()
    assert await until(lambda: sandboxed(os.getpid()) <= before)


async def test_alone_many_sessions_leave_no_growth(separate: CodeExecutionContainer, own_tmp: Path) -> None:
    """E22."""

    async def cycle() -> None:
        async with CodeExecutor("cycle", separate.workspace, separate.port) as executor:
            await executor.execute("print(1)")

    await cycle()
    before = traces()
    for _ in range(5):
        await cycle()
    assert await back_to(before) == {}


async def test_alone_a_sandbox_that_cannot_be_had_later_is_told(
    separate: CodeExecutionContainer, key: str, engine: str, own_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H12: each session's boundary is built anew, and may fail anew."""
    before = traces()
    with monkeypatch.context() as patch:
        patch.setenv("ACTBOX_BWRAP", "/nonexistent/bwrap")
        patch.setenv("DOCKER_HOST", NOWHERE)
        with pytest.raises(SandboxUnavailable) as caught:
            await CodeExecutor(key, separate.workspace, separate.port).connect()
        assert caught.value.layer == engine
    assert await back_to(before) == {}
    async with CodeExecutor(key, separate.workspace, separate.port) as executor:
        assert (await executor.execute("print(1)")).text == "1"


async def test_alone_what_a_session_starts_is_bounded(workspace_path: Path, engine: str) -> None:
    """H12: by the bound that was asked for, whoever it is that keeps it."""
    async with (
        CodeExecutionContainer(
            workspace_path=workspace_path, engine=engine, preload=(), separate=True, limits=Limits(pids=30)
        ) as container,
        CodeExecutor("one", container.workspace, container.port) as executor,
    ):
        # With Docker the bound is the container's, which has a few processes more.
        assert 20 <= await inside(executor, attempts.forked, 100) < 50
        assert (await executor.execute("print(1)")).text == "1"


@contextlib.contextmanager
def sleepers(count: int) -> Generator[None]:
    """So many processes of the user whom containers run as."""
    user = None if os.geteuid() else 65534
    processes = [subprocess.Popen(["/bin/sleep", "99"], user=user) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def test_alone_what_else_the_user_runs_does_not_count(workspace_path: Path, engine: str) -> None:
    """H12: the bound is on the session, not on all that its user runs on this machine."""
    with sleepers(40):
        async with (
            CodeExecutionContainer(
                workspace_path=workspace_path, engine=engine, preload=(), separate=True, limits=Limits(pids=30)
            ) as container,
            CodeExecutor("one", container.workspace, container.port) as executor,
        ):
            assert await inside(executor, attempts.forked, 10) == 10


@pytest.mark.parametrize(
    "use",
    [use_fork, use_spawn, use_shared_memory, use_pty, use_loopback, use_subprocess, use_files],
    ids=lambda use: use.__name__,
)
async def test_alone_ordinary_python_works(alone: CodeExecutor, use: Callable[[], bool], engine: str) -> None:
    """H11."""
    # Docker turns IPv6 off where there is no network.
    arguments = [False] if use is use_loopback and engine == "docker" else []
    assert await inside(alone, use, *arguments) is True

"""The engine "docker": what a container is allowed, as the daemon tells it, and as code inside finds it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import re
import stat
from typing import TYPE_CHECKING, Any

import attempts
import docker_tools as tools
import pytest
from docker_tools import WAYS, Outside, Relay, given
from test_profile import attacks, expected_of_attacks
from test_seccomp import HERE

from actbox import (
    ActboxError,
    CodeExecutionContainer,
    CodeExecutor,
    ExecutionClient,
    ExecutionContainer,
    ExecutionError,
    ExecutionLost,
    Limits,
    SandboxUnavailable,
)
from actbox.engines.docker import audit as auditing
from actbox.engines.docker import engine as engine_module
from actbox.engines.docker import plan, staging

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from pathlib import Path

    from actbox.guest.seccomp import Stage

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60), pytest.mark.counting]

BOUND = 15.0
MIB = 1 << 20


@pytest.fixture(scope="module")
async def outside() -> Outside:
    return await tools.reached()


@pytest.fixture(autouse=True)
async def nothing_left(outside: Outside) -> AsyncIterator[None]:
    yield
    assert await outside.none_left()
    assert tools.mounts() == tools.folders() == []


@contextlib.asynccontextmanager
async def reached_by(way: str, outside: Outside, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[None]:
    """Within, the engine is reached in this way."""
    tools.need_runtime(await outside.ask("GET", "info"), way)
    async with Relay(outside.socket) as relay:
        if way == "stream":
            monkeypatch.setenv("DOCKER_HOST", relay.url)
        yield


def coded(workspace: Path, way: str, **more: Any) -> CodeExecutionContainer:
    return CodeExecutionContainer(
        engine="docker", workspace_path=workspace, preload=(), show_pull_progress=False, **{**WAYS[way], **more}
    )


# -- what the daemon tells -------------------------------------------------------------------------------------------

BIND = {"Propagation": "rprivate", "NonRecursive": True}


def mount(place: str, *, readonly: bool) -> dict[str, Any]:
    wanted = {"Type": "bind", "Target": place, "BindOptions": BIND}
    return {**wanted, "ReadOnly": True} if readonly else wanted


def expected(way: str, memory: int) -> dict[str, Any]:
    """Everything in `HostConfig` that is neither empty, nor zero, nor the daemon's own word for that."""
    facts = plan.Facts(image="", volumes=(), memory=0, swap_limit=True, machine=HERE, user="")
    binds = [mount("/app/skills/shared", readonly=True)]
    binds.append(mount("/app/skills/private" if way == "nested" else "/app/skills/private/one", readonly=False))
    binds.append(mount("/run/actbox", readonly=True))
    found: dict[str, Any] = {
        "AutoRemove": True,
        "CapDrop": ["ALL"],
        "CgroupnsMode": "private",
        "Dns": ["127.0.0.1"],
        "DnsSearch": ["."],
        "IpcMode": "private",
        "LogConfig": {"Type": "none", "Config": {}},
        "Memory": int(memory * 0.75) if way == "nested" else 4096 * MIB + 512 * MIB,
        "Mounts": binds,
        "NetworkMode": "none",
        "OomScoreAdj": 500,
        "PidsLimit": 64 * 256 + 16 if way == "nested" else 256 + 16,
        "ReadonlyRootfs": True,
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "SecurityOpt": ["no-new-privileges", f"seccomp={plan.system_calls(facts, nested=way == 'nested')}"],
        "ShmSize": 64 * MIB,
    }
    found["MemorySwap"] = found["Memory"]
    if way == "nested":
        found["Tmpfs"] = {
            "/newroot": "rw,nosuid,nodev,size=64k,mode=0755",
            "/tmp": f"rw,nosuid,nodev,size={64 * MIB},mode=1777",
        }
        found["MaskedPaths"] = ["/sys/firmware", "/sys/devices/virtual/powercap"]
    else:
        found["Tmpfs"] = {"/tmp": f"rw,nosuid,nodev,exec,size={256 * MIB},mode=1777"}
    return found


# Of the daemon's own: the default runtime, and what `docker run` masks.
DAEMONS_OWN = {"Runtime", "ConsoleSize"}
LEAST_MASKED = {"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"}
LEAST_READONLY = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}


@pytest.mark.parametrize("way", ["nested", "separate"])
async def test_a_container_has_exactly_the_options_it_should(way: str, outside: Outside, workspace_path: Path) -> None:
    """H15."""
    info = await outside.ask("GET", "info")
    if not info["SwapLimit"]:
        tools.lacking("this machine cannot bound swap")
    async with (
        coded(workspace_path, way) as made,
        CodeExecutor("one", made.workspace, made.port),
    ):
        inspected = await outside.inspect()
    host = {name: value for name, value in inspected["HostConfig"].items() if value and name not in DAEMONS_OWN}
    sources = [bind.pop("Source") for bind in host["Mounts"]]
    assert sources[0] == str(workspace_path / "skills" / "shared")
    assert sources[2].endswith("/s")
    if way == "separate":
        assert set(host.pop("MaskedPaths")) >= LEAST_MASKED
        assert set(host.pop("ReadonlyPaths")) >= LEAST_READONLY
    assert host == expected(way, info["MemTotal"])
    config = inspected["Config"]
    assert config["User"] == tools.user()
    assert config["Entrypoint"][:4] == ["python3", "-I", "-B", "-c"]
    assert not config["Cmd"]
    assert not config["Tty"]
    assert not config["OpenStdin"]
    assert config["Healthcheck"] == {"Test": ["NONE"]}
    networks = inspected["NetworkSettings"]
    assert set(networks["Networks"]) == {"none"}
    assert not networks["Ports"]
    assert not networks["Networks"]["none"]["IPAddress"]
    # Nothing of the host's environment.
    assert not any(name in " ".join(config["Env"]) for name in ("DOCKER_HOST", "ACTBOX", "PWD"))
    found = sorted((entry["Destination"], not entry["RW"]) for entry in inspected["Mounts"])
    assert found == sorted((entry["Target"], "ReadOnly" in entry) for entry in host["Mounts"])


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        place: Any = found
        for part in path[:-1]:
            place = place[part]
        before = copy.deepcopy(place)
        place[path[-1]] = to
        assert place != before

    return change


def _add(*path: str, item: Any) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        place = found
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = [*(place.get(path[-1]) or []), item]

    return change


def _replace_option(begin: str, new: list[str]) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        options: list[str] = found["HostConfig"]["SecurityOpt"]
        kept = [option for option in options if not option.startswith(begin)]
        assert kept != options
        found["HostConfig"]["SecurityOpt"] = kept + new

    return change


def _mounted(name: str, *, to: Any, at: str = "/app/skills/shared") -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        (entry,) = [entry for entry in found["Mounts"] if entry["Destination"].startswith(at)]
        assert entry[name] != to
        entry[name] = to

    return change


def _drop_mount(found: dict[str, Any]) -> None:
    del found["Mounts"][0]


def _more(kind: str, place: str, source: str = "/srv", **more: Any) -> dict[str, Any]:
    return {"Type": kind, "Destination": place, "Source": source, "RW": True, **more}


SOCKET = "/var/run/docker.sock"
# name of what is refused: single deviations
DEVIATIONS: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("AutoRemove", _set("HostConfig", "AutoRemove", to=False)),
    ("Privileged", _set("HostConfig", "Privileged", to=True)),
    ("ReadonlyRootfs", _set("HostConfig", "ReadonlyRootfs", to=False)),
    ("PublishAllPorts", _set("HostConfig", "PublishAllPorts", to=True)),
    ("PortBindings", _set("HostConfig", "PortBindings", to={"80/tcp": [{"HostPort": "80"}]})),
    ("CapAdd", _set("HostConfig", "CapAdd", to=["SYS_ADMIN"])),
    ("CapDrop", _set("HostConfig", "CapDrop", to=[])),
    ("CapDrop", _set("HostConfig", "CapDrop", to=None)),
    ("CapDrop", _set("HostConfig", "CapDrop", to=["MKNOD"])),
    ("Devices", _set("HostConfig", "Devices", to=[{"PathOnHost": "/dev/kvm"}])),
    ("DeviceRequests", _set("HostConfig", "DeviceRequests", to=[{"Driver": "nvidia"}])),
    ("DeviceCgroupRules", _set("HostConfig", "DeviceCgroupRules", to=["a *:* rwm"])),
    ("GroupAdd", _set("HostConfig", "GroupAdd", to=["docker"])),
    ("CgroupParent", _set("HostConfig", "CgroupParent", to="/")),
    ("CgroupnsMode", _set("HostConfig", "CgroupnsMode", to="host")),
    ("VolumesFrom", _set("HostConfig", "VolumesFrom", to=["another"])),
    ("Links", _set("HostConfig", "Links", to=["another"])),
    ("ExtraHosts", _set("HostConfig", "ExtraHosts", to=["host:127.0.0.1"])),
    ("Sysctls", _set("HostConfig", "Sysctls", to={"net.ipv4.ip_forward": "1"})),
    ("NetworkMode", _set("HostConfig", "NetworkMode", to="host")),
    ("NetworkMode", _set("HostConfig", "NetworkMode", to="bridge")),
    ("NetworkMode", _set("HostConfig", "NetworkMode", to="default")),
    ("NetworkMode", _set("HostConfig", "NetworkMode", to="container:another")),
    ("NetworkMode", _set("HostConfig", "NetworkMode", to=None)),
    ("Networks", _set("NetworkSettings", "Networks", to={"none": {}, "bridge": {}})),
    ("PidMode", _set("HostConfig", "PidMode", to="host")),
    ("PidMode", _set("HostConfig", "PidMode", to="container:another")),
    ("IpcMode", _set("HostConfig", "IpcMode", to="host")),
    ("IpcMode", _set("HostConfig", "IpcMode", to="container:another")),
    ("UTSMode", _set("HostConfig", "UTSMode", to="host")),
    ("UsernsMode", _set("HostConfig", "UsernsMode", to="host")),
    ("Memory", _set("HostConfig", "Memory", to=0)),
    ("Memory", _set("HostConfig", "Memory", to=None)),
    ("MemorySwap", _set("HostConfig", "MemorySwap", to=-1)),
    ("PidsLimit", _set("HostConfig", "PidsLimit", to=0)),
    ("PidsLimit", _set("HostConfig", "PidsLimit", to=None)),
    ("OomKillDisable", _set("HostConfig", "OomKillDisable", to=True)),
    ("ShmSize", _set("HostConfig", "ShmSize", to=1 << 40)),
    ("SecurityOpt", _set("HostConfig", "SecurityOpt", to=None)),
    ("SecurityOpt", _replace_option("seccomp", [])),
    ("SecurityOpt", _replace_option("seccomp", ["seccomp=unconfined"])),
    ("SecurityOpt", _replace_option("seccomp", ['seccomp={"defaultAction":"SCMP_ACT_ALLOW"}'])),
    ("SecurityOpt", _replace_option("no-new-privileges", [])),
    ("SecurityOpt", _replace_option("no-new-privileges", ["no-new-privileges:false"])),
    ("SecurityOpt", _replace_option("no-new-privileges", ["no-new-privileges=false"])),
    ("SecurityOpt", _add("HostConfig", "SecurityOpt", item="apparmor=unconfined")),
    ("SecurityOpt", _add("HostConfig", "SecurityOpt", item="systempaths=unconfined")),
    ("SecurityOpt", _add("HostConfig", "SecurityOpt", item="label=disable")),
    ("MaskedPaths", _set("HostConfig", "MaskedPaths", to=[])),
    ("MaskedPaths", _set("HostConfig", "MaskedPaths", to=None)),
    ("User", _set("Config", "User", to="")),
    ("User", _set("Config", "User", to="0:0")),
    ("Entrypoint", _set("Config", "Entrypoint", to=["/bin/sh"])),
    ("Mounts", _set("Mounts", to=[])),
    ("Mounts", _drop_mount),
    ("Mounts", _add("Mounts", item=_more("bind", SOCKET, SOCKET))),
    ("Mounts", _add("Mounts", item=_more("volume", "/data"))),
    ("Mounts", _add("Mounts", item=_more("bind", "/tmp"))),
    ("Mounts", _add("Mounts", item=_more("tmpfs", "/data"))),
    ("Mounts", _mounted("RW", to=True)),
    ("Mounts", _mounted("RW", to=False, at="/app/skills/private")),
    ("Mounts", _mounted("Source", to="/")),
    ("Mounts", _mounted("Destination", to="/srv")),
    ("Mounts", _mounted("Type", to="volume")),
]


@pytest.fixture(scope="module", params=["nested", "separate"])
async def planned(
    request: pytest.FixtureRequest, outside: Outside, tmp_path_factory: pytest.TempPathFactory
) -> tuple[plan.Plan, dict[str, Any]]:
    """A plan, and what the daemon made of it."""
    caught: list[tuple[plan.Plan, dict[str, Any]]] = []

    def audit(wanted: plan.Plan, found: dict[str, Any], *, podman: bool) -> None:
        assert not podman
        auditing.audit(wanted, found, podman=podman)
        caught.append((wanted, found))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "audit", audit)
        workspace = tmp_path_factory.mktemp("audited")
        async with (
            coded(workspace, request.param) as made,
            CodeExecutor("one", made.workspace, made.port),
        ):
            return caught[-1]


@pytest.mark.parametrize(("name", "change"), DEVIATIONS, ids=[f"{i} {name}" for i, (name, _) in enumerate(DEVIATIONS)])
async def test_a_container_that_deviates_is_refused(
    name: str, change: Callable[[dict[str, Any]], None], planned: tuple[plan.Plan, dict[str, Any]]
) -> None:
    """H15."""
    wanted, found = planned
    auditing.audit(wanted, found, podman=False)
    changed = copy.deepcopy(found)
    change(changed)
    with pytest.raises(SandboxUnavailable) as caught:
        auditing.audit(wanted, changed, podman=False)
    assert caught.value.layer == "hardened container"
    assert f"made {name} " in caught.value.detail


async def test_what_a_daemon_that_remaps_users_is_asked_for_is_what_it_may_do(
    planned: tuple[plan.Plan, dict[str, Any]],
) -> None:
    wanted, found = copy.deepcopy(planned)
    dict(wanted.body)["HostConfig"]["UsernsMode"] = "host"
    with pytest.raises(SandboxUnavailable, match="UsernsMode"):
        auditing.audit(wanted, found, podman=False)
    found["HostConfig"]["UsernsMode"] = "host"
    auditing.audit(wanted, found, podman=False)


# -- the profile alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "stage"), [("nested", "outer"), ("separate", "inner")])
async def test_the_engines_own_filter_denies_the_attacks(way: str, stage: Stage, outside: Outside) -> None:
    """H5."""
    async with (
        ExecutionContainer(engine="docker", preload=(), **WAYS[way]) as made,
        ExecutionClient(port=made.port),
    ):
        inspected = await outside.inspect()
    host = inspected["HostConfig"]
    taken = ("CapDrop", "SecurityOpt", "ReadonlyRootfs", "NetworkMode", "MaskedPaths", "ReadonlyPaths", "PidsLimit")
    uid, gid = inspected["Config"]["User"].split(":")
    body = {
        "Image": inspected["Image"],
        "User": inspected["Config"]["User"],
        "Entrypoint": attempts.command(attacks(HERE)),
        "WorkingDir": "/own",
    }
    config = {name: host[name] for name in taken}
    config["Tmpfs"] = {"/own": f"uid={uid},gid={gid},mode=0700"}
    code, printed = await outside.run({**body, "HostConfig": config})
    assert code == 0, printed
    assert printed == expected_of_attacks(HERE, stage)
    # And without it they succeed.
    config["SecurityOpt"] = ["no-new-privileges", "seccomp=unconfined"]
    found = (await outside.run({**body, "HostConfig": config}))[1]
    open_to_all = ("ptrace", "personality changed", "fchmodat 02755", "unshare", "AF_NETLINK", "chmod 04755")
    assert {label: found[label] for label in open_to_all} == dict.fromkeys(open_to_all, "ok")


STATUS = """
import json
with open("/proc/self/status") as file:
    print(json.dumps(dict(line.rstrip("\\n").split(":\\t", 1) for line in file)))
"""


@pytest.mark.parametrize("way", ["nested", "separate", "stream"])
async def test_a_session_has_no_rights_and_three_filters(
    way: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H1, H9."""
    async with (
        reached_by(way, outside, monkeypatch),
        ExecutionContainer(engine="docker", preload=(), show_pull_progress=False, **WAYS[way]) as made,
        ExecutionClient(port=made.port) as client,
    ):
        status = json.loads((await client.execute(STATUS)).text or "")
        pid = (await outside.inspect())["State"]["Pid"]
    assert {int(value, 16) for name, value in status.items() if name.startswith("Cap")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Seccomp_filters"] == "3"
    assert "0" not in status["Uid"].split()
    assert pid > 0


# -- what is seen inside ---------------------------------------------------------------------------------------------

LEAVE = """
import os, socket, subprocess, sys
name = {name!r}
for folder in ("/tmp", "/dev/shm", "."):
    with open(f"{{folder}}/{{name}}", "w") as file:
        file.write(name)
listener = socket.socket(socket.AF_UNIX)
listener.bind(f"\\0{{name}}")
listener.listen()
port = socket.socket()
port.bind(("127.0.0.1", 4242))
port.listen()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)", name])
assert os.environ.setdefault("LEFT", name) == name
"""
SEE = """
import json, os, socket
def command(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""
def listed(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError as exc:
        return [type(exc).__name__]
def connects(family, address):
    with socket.socket(family) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address)
        except OSError:
            return False
    return True
print(json.dumps({
    "processes": [command(pid)[-50:] for pid in os.listdir("/proc") if pid.isdecimal()],
    "tmp": listed("/tmp"), "shm": listed("/dev/shm"), "mqueue": listed("/dev/mqueue"),
    "keys": listed("/app/skills/private"), "own": listed("."),
    "abstract": [name for name in NAMES if connects(socket.AF_UNIX, "\\0" + name)],
    "port": connects(socket.AF_INET, ("127.0.0.1", 4242)),
    "environ": os.environ.get("LEFT"),
    "interfaces": [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line],
    "sockets": [path for path in ("/run/docker.sock", "/var/run/docker.sock", "/run/podman/podman.sock",
        "/run/actbox/control") if os.path.exists(path)],
    "outside": [address for address in ("1.1.1.1", "169.254.169.254", "172.17.0.1") if connects(socket.AF_INET,
        (address, 80))],
}))
"""


@pytest.mark.parametrize("way", WAYS)
async def test_two_sessions_see_nothing_of_each_other(
    way: str, outside: Outside, workspace_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D1, D6, D7."""
    for folder in ("skills/private/first", "skills/private/second", "skills/shared"):
        given(workspace_path / folder)
    given(workspace_path / "skills" / "private")
    async with (
        reached_by(way, outside, monkeypatch),
        coded(workspace_path, way) as made,
        CodeExecutor("first", made.workspace, made.port) as first,
        CodeExecutor("second", made.workspace, made.port) as second,
    ):
        names = ("first-was-here", "second-was-here")
        executors = dict(zip(names, (first, second), strict=True))
        await first.execute(LEAVE.format(name=names[0]))
        see = f"NAMES = {names!r}\n{SEE}"
        alone = json.loads((await second.execute(see)).text or "")
        assert not alone["port"]
        await second.execute(LEAVE.format(name=names[1]))
        for name, executor in executors.items():
            other = next(one for one in names if one != name)
            found = json.loads((await executor.execute(see)).text or "")
            text = json.dumps(found)
            assert other not in text
            assert other.removesuffix("-was-here") not in text
            assert found["tmp"].count(name) == found["shm"].count(name) == found["own"].count(name) == 1
            assert found["abstract"] == [name]
            assert found["environ"] == name
            assert found["port"]
            assert found["keys"] == [name.removesuffix("-was-here")]
            assert any(name in line for line in found["processes"])
            assert len(found["processes"]) <= 5
            assert found["sockets"] == found["outside"] == []
            assert found["interfaces"] == ["lo"]
        assert tools.listed(workspace_path, "skills/private/*/*") == sorted(names)


@pytest.mark.parametrize("way", WAYS)
async def test_files_belong_to_whom_their_folder_belongs(
    way: str, outside: Outside, workspace_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workspace_path / "skills" / "private" / "one"
    if way in ("nested", "separate"):
        folder.mkdir(parents=True)
    else:
        given(workspace_path / "skills" / "private")
        given(folder)
    whose = folder.stat()
    async with (
        reached_by(way, outside, monkeypatch),
        coded(workspace_path, way) as made,
        CodeExecutor("one", made.workspace, made.port) as executor,
    ):
        uid = (await executor.execute("import os; open('file', 'w').close(); print(os.getuid())")).text
        await executor.execute("os.mkdir('folder'); open('folder/file', 'w').close(); os.chmod('file', 0o600)")
        pid = (await outside.inspect())["State"]["Pid"]
        host_uids = tools.uids(pid)
    assert uid != "0"
    for name in ("file", "folder", "folder/file"):
        status = (folder / name).lstat()
        assert (status.st_uid, status.st_gid) == (whose.st_uid, whose.st_gid)
        assert not stat.S_IMODE(status.st_mode) & 0o7000
    if way != "runsc":
        assert host_uids == {tools.user().split(":")[0]}


# -- limits ----------------------------------------------------------------------------------------------------------

FORK_BOMB = """
import os
forked = 0
try:
    while forked < 100_000:
        if os.fork() == 0:
            import time
            time.sleep(999)
        forked += 1
except OSError as exc:
    print(type(exc).__name__, forked)
"""
MEMORY_BOMB = """
import os, time
for number in range(40):
    if os.fork() == 0:
        held = bytearray(100 << 20)
        for place in range(0, len(held), 4096):
            held[place] = 1
        time.sleep(999)
time.sleep(20)
print("it fits")
"""


@pytest.mark.parametrize("way", ["nested", "separate"])
async def test_a_fork_bomb_is_bounded_and_others_go_on(way: str, outside: Outside, workspace_path: Path) -> None:
    """D15, E1."""
    limits = Limits(pids=64)
    async with (
        coded(workspace_path, way, limits=limits) as made,
        CodeExecutor("bomb", made.workspace, made.port) as bomb,
        CodeExecutor("other", made.workspace, made.port) as other,
    ):
        found = (await bomb.execute(FORK_BOMB, timeout=BOUND)).text or ""
        kind, count = found.split()
        assert kind == "BlockingIOError"
        # In a container of its own it is the container that is bounded.
        assert int(count) <= (64 + 16 if way == "separate" else 64)
        assert (await other.execute("import subprocess; print(subprocess.run('true').returncode)")).text == "0"
        pids = (await outside.inspect())["HostConfig"]["PidsLimit"]
        assert pids == 64 + 16 if way == "separate" else pids == 64 * 64 + 16


@pytest.mark.parametrize("way", ["nested", "separate"])
async def test_a_memory_bomb_is_bounded_and_others_go_on(way: str, workspace_path: Path) -> None:
    """E3."""
    async with (
        coded(workspace_path, way, limits=Limits(memory=256 * MIB)) as made,
        CodeExecutor("bomb", made.workspace, made.port) as bomb,
        CodeExecutor("other", made.workspace, made.port) as other,
    ):
        cell = asyncio.create_task(bomb.execute(MEMORY_BOMB, timeout=30))
        while not cell.done():
            assert (await other.execute("print(6 * 7)", timeout=BOUND)).text == "42"
            await asyncio.wait([cell], timeout=0.2)
        with pytest.raises((ExecutionError, ExecutionLost)):
            await cell
        assert (await bomb.execute("print(6 * 7)", timeout=BOUND)).text == "42"
        assert (await other.execute("print(6 * 7)", timeout=BOUND)).text == "42"


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "while it starts"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_folder_that_becomes_a_link_is_never_shown(
    way: str, when: str, outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A12."""
    folder, secret, aside = given(tmp_path / "folder"), given(tmp_path / "secret"), tmp_path / "aside"
    (secret / "key").write_text("secret")

    def swap() -> None:
        folder.rename(aside)
        folder.symlink_to(secret, target_is_directory=True)

    real = staging.show

    async def show(*arguments: Any) -> Any:
        if not aside.exists():
            swap()
        return await real(*arguments)

    async with reached_by(way, outside, monkeypatch):
        made = ExecutionContainer(
            engine="docker", binds={str(folder): "data"}, preload=(), show_pull_progress=False, **WAYS[way]
        )
        if when == "before":
            swap()
        else:
            monkeypatch.setattr(staging, "show", show)
        with pytest.raises(ActboxError) as caught:
            async with asyncio.timeout(BOUND):
                await made.run()
    assert isinstance(caught.value, SandboxUnavailable)
    assert caught.value.layer == "folders"
    assert [path.name for path in secret.iterdir()] == ["key"]
    assert list(aside.iterdir()) == []


@pytest.mark.parametrize("end", ["well", "refused", "cancelled"])
@pytest.mark.parametrize("way", ["stream", "runsc"])
async def test_marks_never_stay_behind(
    way: str, end: str, outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = given(tmp_path / "folder")
    seen: list[list[str]] = []
    real = engine_module.audit

    def audit(wanted: plan.Plan, found: dict[str, Any], *, podman: bool) -> None:
        seen.append([path.name for path in folder.iterdir()])
        real(wanted, found, podman=podman)
        if end == "refused":
            raise SandboxUnavailable("layer", "detail", "remedy")
        if end == "cancelled":
            starting.cancel()

    monkeypatch.setattr(engine_module, "audit", audit)

    async def run() -> list[str]:
        async with (
            ExecutionContainer(
                engine="docker", binds={str(folder): "data"}, preload=(), show_pull_progress=False, **WAYS[way]
            ) as made,
            ExecutionClient(port=made.port) as client,
        ):
            found = await client.execute("import json, os; print(json.dumps(os.listdir('data')))")
            return json.loads(found.text or "")

    async with reached_by(way, outside, monkeypatch):
        starting = asyncio.create_task(run())
        expected = {"well": (), "refused": SandboxUnavailable, "cancelled": asyncio.CancelledError}[end]
        async with asyncio.timeout(2 * BOUND):
            if end == "well":
                assert await starting == []
            else:
                with pytest.raises(expected):
                    await starting
    assert all(len(names) == 1 and re.fullmatch(r"\.actbox-[0-9a-f]{32}", names[0]) for names in seen)
    assert seen
    assert list(folder.iterdir()) == []


async def test_what_is_mounted_below_a_folder_is_not_shown(outside: Outside, tmp_path: Path) -> None:
    """A1."""
    if not tools.IS_ROOT:
        pytest.skip("only root can mount")
    folder = given(tmp_path / "folder")
    (folder / "below").mkdir()
    await run_program("mount", "-t", "tmpfs", "tmpfs", str(folder / "below"))
    try:
        (folder / "below" / "file").touch()
        for way in ("nested", "separate"):
            async with (
                ExecutionContainer(engine="docker", binds={str(folder): "data"}, preload=(), **WAYS[way]) as made,
                ExecutionClient(port=made.port) as client,
            ):
                assert (await client.execute("import os; print(os.listdir('data/below'))")).text == "[]"
    finally:
        await run_program("umount", str(folder / "below"))


async def run_program(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(*arguments)
    assert await process.wait() == 0

"""The Docker daemon and the registry that other tests use do what they promise, and leave nothing behind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import dockerd
import pytest
from dockerd import PrivateDaemon
from needs import lacking
from registry import Registry, layer, split

if TYPE_CHECKING:
    from collections.abc import Iterator

# Daemons take seconds to start and to end.
pytestmark = pytest.mark.timeout(120)

ONCE = ("--max-download-attempts=1",)
# The host's programs in an image that has none of its own.
HOST = [f"--volume={folder}:{folder}:ro" for folder in ("/usr", "/lib", "/lib64")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dockerd.required()
    return tmp_path / "daemon"


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as made:
        yield made


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    """One for all tests that leave it as it is."""
    dockerd.required()
    with PrivateDaemon(tmp_path_factory.mktemp("daemon") / "daemon", options=ONCE) as made:
        yield made


def _complaint(daemon: PrivateDaemon, *arguments: str) -> str:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        daemon.docker(*arguments)
    return caught.value.stderr


def _traces(name: str) -> list[str]:
    """What mentions a daemon's name: processes, mounts, cgroups, network devices."""
    processes = [str(pid) for pid in dockerd._named(name)]
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{name}")]
    return [*processes, *mounts, *groups, *(_devices() & {name})]


def _devices() -> set[str]:
    """The network devices of this machine."""
    return {path.name for path in Path("/sys/class/net").iterdir()}


# -- the daemon ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [False, True])
def test_a_daemon_leaves_nothing_behind(folder: Path, registry: Registry, *, killed: bool) -> None:
    image = registry.add("tiny", [layer({"hello": b"hello"})])
    with PrivateDaemon(folder) as daemon:
        name = daemon.socket.parent.name
        daemon.docker("run", "--detach", "--network=none", *HOST, image.reference, "/usr/bin/sleep", "1000")
        assert _traces(name)
        if killed:
            daemon.kill()
            assert _traces(name)
    assert not _traces(name)
    assert not daemon.socket.parent.exists()
    assert not folder.exists()


def test_a_killed_daemon_comes_back_with_its_data(folder: Path, registry: Registry) -> None:
    image = registry.add("tiny", [layer({"hello": b"hello"})])
    with PrivateDaemon(folder, options=["--live-restore"]) as daemon:
        run = daemon.docker("run", "--detach", "--network=none", *HOST, image.reference, "/usr/bin/sleep", "1000")
        first = daemon.pid
        daemon.kill()
        with pytest.raises(RuntimeError, match="does not run"):
            assert daemon.pid
        assert "Cannot connect" in _complaint(daemon, "ps")
        daemon.start()
        assert daemon.pid != first
        assert daemon.docker("ps", "--quiet", "--no-trunc") == run
        with pytest.raises(RuntimeError, match="runs already"):
            daemon.start()


def test_a_daemon_that_does_not_start_shows_its_log_and_leaves_nothing(folder: Path) -> None:
    daemon = PrivateDaemon(folder, options=["--no-such-option"])
    with pytest.raises(RuntimeError, match="no-such-option"):
        daemon.__enter__()
    assert not folder.exists()
    assert not daemon.socket.parent.exists()


def test_a_daemon_with_a_small_disk_fills_it(folder: Path, registry: Registry) -> None:
    small = registry.add("small", [layer({"data": bytes(1 << 20)})])
    large = registry.add("large", [layer({"data": os.urandom(40 << 20)})])
    with PrivateDaemon(folder, megabytes=32, options=ONCE) as daemon:
        assert "no space left" in _complaint(daemon, "pull", large.reference)
        daemon.docker("pull", small.reference)


def test_a_daemon_leaves_the_default_bridge_alone(folder: Path) -> None:
    ours = "docker0" not in _devices()
    if ours:
        subprocess.run(["ip", "link", "add", "docker0", "type", "bridge"], check=True)
    try:
        with PrivateDaemon(folder):
            assert "docker0" in _devices()
        assert "docker0" in _devices()
    finally:
        if ours:
            subprocess.run(["ip", "link", "delete", "docker0"], check=True)


def test_a_daemon_is_reached_below_a_long_folder(tmp_path: Path) -> None:
    dockerd.required()
    folder = tmp_path / ("long" * 30)
    with PrivateDaemon(folder) as daemon:
        assert len(os.fsencode(daemon.socket)) < 100
        assert daemon.docker("images", "--quiet") == ""


def test_a_base_runs_its_python(daemon: PrivateDaemon) -> None:
    daemon.add(dockerd.base_tar(), "base:1")
    code = "import sys; print(sys.executable)"
    assert daemon.docker("run", "--rm", "--network=none", "base:1", "python3", "-c", code) == "/usr/bin/python3\n"


def test_a_saved_image_is_loaded(daemon: PrivateDaemon, registry: Registry, tmp_path: Path) -> None:
    image = registry.add("saved", [layer({"hello": b"hello"})])
    daemon.docker("pull", image.reference)
    daemon.docker("save", "--output", str(tmp_path / "saved.tar"), image.reference)
    daemon.docker("rmi", image.reference)
    daemon.load(tmp_path / "saved.tar")
    assert daemon.docker("images", "--quiet", "--no-trunc", image.reference) == f"{image.config}\n"


def test_a_daemon_knows_runsc(daemon: PrivateDaemon, registry: Registry) -> None:
    if not Path("/usr/bin/runsc").exists():
        lacking("runsc is not installed")
    image = registry.add("tiny", [layer({"hello": b"hello"})])
    run = ["run", "--rm", "--network=none", "--runtime=runsc", *HOST, image.reference]
    assert daemon.docker(*run, "/usr/bin/uname", "-r") == "4.4.0\n"


# -- what may not be there -------------------------------------------------------------------------------------------


def test_only_root_needs_a_daemon_and_only_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(pytest.skip.Exception, match="no docker is installed"):
        dockerd.required()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no docker is installed"):
        dockerd.required()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="only root"):
        dockerd.required()


# -- the registry ----------------------------------------------------------------------------------------------------


def test_a_pull_gets_what_was_put_in(daemon: PrivateDaemon, registry: Registry) -> None:
    image = registry.add("some/name", [layer({"a": b"1"}), layer({"b": b"2"})], tag="v1", config={"Cmd": ["/a"]})
    assert f"Digest: {image.digest}" in daemon.docker("pull", image.reference)
    found = json.loads(daemon.docker("inspect", image.reference))[0]
    assert found["Id"] == image.config
    assert found["Config"]["Cmd"] == ["/a"]
    assert found["RootFS"]["Layers"] == list(image.layers)
    assert f"GET /v2/some/name/blobs/{image.layers[1]}" in registry.requests


def test_a_hidden_image_is_unknown(daemon: PrivateDaemon, registry: Registry) -> None:
    image = registry.add("hidden", [layer({"a": b"hidden"})])
    registry.hide(image)
    assert "manifest unknown" in _complaint(daemon, "pull", image.reference)
    assert "manifest unknown" in _complaint(daemon, "pull", f"{registry.host}/never-put-in:1")
    registry.mend()
    daemon.docker("pull", image.reference)


def test_a_cut_layer_ends_a_pull_until_it_is_mended(daemon: PrivateDaemon, registry: Registry) -> None:
    image = registry.add("cut", [layer({"data": b"cut" + bytes(1 << 20)})])
    registry.cut(image.layers[0], at=1000)
    assert "unexpected EOF" in _complaint(daemon, "pull", image.reference)
    registry.mend()
    daemon.docker("pull", image.reference)


def test_a_corrupt_layer_is_refused(daemon: PrivateDaemon, registry: Registry) -> None:
    image = registry.add("corrupt", [layer({"data": b"corrupt"})])
    registry.corrupt(image.layers[0])
    assert "filesystem layer verification failed" in _complaint(daemon, "pull", image.reference)


@pytest.mark.parametrize("mended", [False, True])
def test_a_stalled_layer_holds_a_pull_up(daemon: PrivateDaemon, registry: Registry, *, mended: bool) -> None:
    image = registry.add(f"stalled-{mended}".lower(), [layer({"data": f"{mended}".encode() + bytes(1 << 20)})])
    registry.stall(image.layers[0], at=1 << 19)
    with subprocess.Popen(["docker", "--host", daemon.url, "pull", "--quiet", image.reference]) as pull:
        assert registry.stalled.wait(30)
        assert pull.poll() is None
        if mended:
            registry.mend()
        else:
            pull.send_signal(signal.SIGINT)
    assert (pull.returncode == 0) is mended


def test_a_registry_closes_with_a_request_held_up() -> None:
    with Registry() as registry:
        image = registry.add("stalled", [layer({"data": b"data"})])
        registry.stall(image.layers[0])
        connection = http.client.HTTPConnection(registry.host, timeout=30)
        connection.request("GET", f"/v2/stalled/blobs/{image.layers[0]}")
        answer = connection.getresponse()
        assert registry.stalled.wait(30)
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    connection.close()


def test_a_download_is_resumed_where_it_ended(registry: Registry) -> None:
    content = layer({"data": b"data"})
    image = registry.add("part", [content])
    connection = http.client.HTTPConnection(registry.host, timeout=30)
    connection.request("GET", f"/v2/part/blobs/{image.layers[0]}", headers={"Range": "bytes=100-"})
    answer = connection.getresponse()
    assert answer.status == http.client.PARTIAL_CONTENT
    assert answer.read() == content[100:]
    connection.close()


def test_split_layers_make_the_same_root(daemon: PrivateDaemon, registry: Registry) -> None:
    layers = split(dockerd.base_tar(), 4)
    sizes = [len(one) for one in layers]
    assert max(sizes) < 2 * min(sizes)
    image = registry.add("base", layers)
    daemon.docker("pull", image.reference)
    daemon.add(dockerd.base_tar(), "whole:1")
    listing = ["/usr/bin/find", "/", "-xdev", "(", "-path", "/dev", "-o", "-path", "/etc", ")", "-prune", "-o"]
    listing += ["-type", "d", "-printf", "%p %M %U:%G\\n", "-o", "-printf", "%p %M %U:%G %s %l\\n"]
    run = ["run", "--rm", "--network=none"]
    assert sorted(daemon.docker(*run, image.reference, *listing).splitlines()) == sorted(
        daemon.docker(*run, "whole:1", *listing).splitlines()
    )

"""The engine "docker" and images: pulled, refused for what they lack, built, and bounded whatever they declare."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from typing import TYPE_CHECKING, Any

import aiodocker
import docker_tools as tools
import dockerd
import pytest
from docker_tools import SLIM, Outside, Relay, descriptors
from dockerd import PrivateDaemon
from registry import Registry, layer

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    EnvironmentBuildError,
    EnvironmentNotFound,
    EnvironmentUnusable,
    ExecutionClient,
    ExecutionContainer,
    InvalidArgument,
    SandboxUnavailable,
    build_image,
)
from actbox.cli import ExitCode
from actbox.engines import environments
from actbox.engines.docker import boundary, building, images, meeting

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90), pytest.mark.counting]

BOUND = 15.0


@pytest.fixture(scope="module")
async def outside() -> Outside:
    return await tools.reached()


@pytest.fixture(scope="module")
async def slim(outside: Outside) -> AsyncIterator[tools.Built]:
    yield await asyncio.to_thread(tools.build_slim, outside.url)
    await tools.remove_slim(outside)


@pytest.fixture(autouse=True)
async def nothing_left(outside: Outside) -> AsyncIterator[None]:
    before = await outside.volumes()
    yield
    assert await outside.none_left()
    assert await outside.volumes() == before


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as made:
        yield made


@pytest.fixture
async def names(outside: Outside) -> AsyncIterator[list[str]]:
    """What is put in here is removed from the daemon's images afterwards."""
    made: list[str] = []
    yield made
    for name in made:
        with contextlib.suppress(aiodocker.DockerError):
            await outside.ask("DELETE", f"images/{name}", force="1")


def container(tag: str, *, telling: bool = False, separate: bool = False) -> ExecutionContainer:
    return ExecutionContainer(tag, engine="docker", preload=(), show_pull_progress=telling, separate=separate)


async def refusal(kind: type[Exception], tag: str, seconds: float = BOUND) -> Any:
    """What starting it raises, in bounded time."""
    with pytest.raises(kind) as caught:
        async with asyncio.timeout(seconds):
            await container(tag).run()
    assert tag in str(caught.value)
    return caught.value


# -- pulled ----------------------------------------------------------------------------------------------------------


async def test_an_image_that_the_registry_does_not_have_is_not_found(registry: Registry) -> None:
    tag = f"{registry.host}/nothing:1"
    error = await refusal(EnvironmentNotFound, tag)
    assert error.tag == tag
    assert "actbox-default:latest" in error.known
    assert any(request.startswith(("HEAD /v2/nothing", "GET /v2/nothing")) for request in registry.requests)


async def test_a_registry_that_cannot_be_reached_is_told() -> None:
    error = await refusal(SandboxUnavailable, f"127.0.0.1:{tools.free_port()}/nothing:1", 60)
    assert error.layer == "image"
    assert "refused" in error.detail
    assert "actbox build" in error.remedy


async def test_a_pull_that_stalls_ends(registry: Registry, monkeypatch: pytest.MonkeyPatch, outside: Outside) -> None:
    monkeypatch.setattr(images, "_STALL_SECONDS", 1.0)
    image = registry.add("stalled", [layer({"data": bytes(1 << 20)})])
    registry.stall(image.layers[0], at=1000)
    before = await outside.images()
    open_files = descriptors()
    error = await refusal(SandboxUnavailable, image.reference)
    assert error.layer == "image"
    assert "nothing has come for 1 s" in error.detail
    assert await outside.images() == before
    # The registry's own connections are this process's too.
    registry.mend()
    assert await tools.until(lambda: descriptors() <= open_files)
    # What was not closed complains now.
    gc.collect()


async def test_a_pull_that_is_cancelled_ends(registry: Registry, outside: Outside) -> None:
    image = registry.add("cancelled", [layer({"data": bytes(1 << 20)})])
    registry.stall(image.layers[0], at=1000)
    starting = asyncio.create_task(container(image.reference).run())
    assert await asyncio.to_thread(registry.stalled.wait, BOUND)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(BOUND):
            await starting
    gc.collect()


@pytest.mark.root
@pytest.mark.parametrize("fault", ["cut", "corrupt"])
async def test_a_pull_that_breaks_is_told(
    fault: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dockerd.required()
    image = registry.add("broken", [layer({"data": bytes(1 << 20)})])
    if fault == "cut":
        registry.cut(image.layers[0], at=1000)
    else:
        registry.corrupt(image.layers[0])
    with PrivateDaemon(tmp_path / "daemon", options=["--max-download-attempts=1"]) as daemon:
        monkeypatch.setenv("DOCKER_HOST", daemon.url)
        error = await refusal(SandboxUnavailable, image.reference, 60)
        assert error.layer == "image"
        assert {"cut": "unexpected EOF", "corrupt": "verification failed"}[fault] in error.detail
        assert await Outside(daemon.url).images() == set()


@pytest.mark.usefixtures("slim")
async def test_a_missing_image_is_pulled_and_each_layer_told(
    registry: Registry, outside: Outside, names: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    packed = io.BytesIO(await outside.fetch(f"images/{SLIM}/get"))
    with tarfile.open(fileobj=packed) as archive:

        def content(name: str) -> bytes:
            file = archive.extractfile(name)
            assert file is not None
            return file.read()

        manifest = json.loads(content("manifest.json"))[0]
        layers = [content(name) for name in manifest["Layers"]]
    # One that the daemon cannot have.
    layers.append(layer({"opt/pulled": str(time.time_ns()).encode()}))
    image = registry.add("complete", layers, config={"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]})
    names.append(image.reference)
    async with container(image.reference, telling=True) as made, ExecutionClient(port=made.port) as client:
        assert (await client.execute("import six, os; print(os.path.exists('/opt/pulled'))")).text == "True"
    told = capfd.readouterr().err.splitlines()
    assert told[0] == f"actbox: pulling the image {image.reference}"
    pattern = rf"actbox: {re.escape(image.reference)}: layer ([0-9a-f]+): (.*) \((\d+) of \d+ layers\)"
    steps = [found for line in told[1:] if (found := re.fullmatch(pattern, line))]
    assert len(steps) == len(told) - 1
    ready = {step[1] for step in steps if step[2] in ("pull complete", "already exists")}
    assert len(ready) == len(layers)
    assert [int(step[3]) for step in steps] == sorted(int(step[3]) for step in steps)
    assert int(steps[-1][3]) == len(layers)


async def test_only_the_tag_that_is_asked_for_is_pulled(registry: Registry, outside: Outside, names: list[str]) -> None:
    other = registry.add("two", [layer({"a": b"1"})], tag="other")
    latest = registry.add("two", [layer({"a": b"2"})], tag="latest")
    names += [latest.reference, other.reference]
    await refusal(EnvironmentUnusable, latest.reference.removesuffix(":latest"))
    assert not any("other" in request for request in registry.requests)
    # The second time it is there.
    asked = len(registry.requests)
    await refusal(EnvironmentUnusable, latest.reference.removesuffix(":latest"))
    assert len(registry.requests) == asked


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["socket", "stream"])
async def way(request: pytest.FixtureRequest, outside: Outside, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    async with Relay(outside.socket) as relay:
        if request.param == "stream":
            monkeypatch.setenv("DOCKER_HOST", relay.url)
        yield request.param


async def test_an_image_without_python_is_unusable(way: str, registry: Registry, names: list[str]) -> None:
    image = registry.add("tiny", [layer({"hello": way.encode()})])
    names.append(image.reference)
    error = await refusal(EnvironmentUnusable, image.reference)
    assert error.tag == image.reference
    assert "no python3" in error.detail
    assert f"actbox build -t NAME --engine docker --base {image.reference}" in str(error)


async def test_an_image_without_ipython_is_unusable(way: str) -> None:
    error = await refusal(EnvironmentUnusable, tools.base())
    assert "has no IPython" in error.detail
    assert f"--base {tools.base()}" in str(error)


@pytest.mark.usefixtures("slim")
@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("sys.version_info = (3, 9, 2, 'final', 0)", "its python3 is cpython 3.9.2; CPython 3.10 or newer is needed"),
        ("sys.version_info = (2, 7, 18, 'final', 0)", "cpython 2.7.18"),
        ("sys.implementation.name = 'pypy'", "its python3 is pypy 3."),
    ],
)
async def test_an_image_whose_python_cannot_run_us_is_unusable(
    lie: str, said: str, way: str, outside: Outside, names: list[str]
) -> None:
    python = f"#!/usr/bin/python3\nimport sys\n{lie}\nexec(sys.argv[-1])\n"
    names.append("actbox-test/lies")
    tag = await tools.derived(
        outside, names[0], "COPY python3 /usr/local/bin/python3", files={"python3": python.encode()}
    )
    assert said in (await refusal(EnvironmentUnusable, tag)).detail


@pytest.mark.usefixtures("slim")
@pytest.mark.parametrize(
    ("python", "layers"),
    [
        ("#!/bin/sh\nprintf '\\0\\0\\0\\011{\"op\": 1}'\n", {"container"}),
        ("#!/bin/sh\necho Hello\n", {"container"}),
        ("#!/bin/sh\necho it is broken >&2; exit 3\n", {"container"}),
        ("#!/bin/sh\nkill -9 $$\n", {"container"}),
    ],
)
async def test_an_image_whose_python_is_none_is_refused(
    python: str, layers: set[str], way: str, outside: Outside, names: list[str]
) -> None:
    names.append("actbox-test/none")
    tag = await tools.derived(
        outside, names[0], "COPY python3 /usr/local/bin/python3", files={"python3": python.encode()}
    )
    with pytest.raises(SandboxUnavailable) as caught:
        async with asyncio.timeout(BOUND):
            await container(tag).run()
    assert caught.value.layer in layers
    if "broken" in python:
        assert caught.value.detail == "it is broken"


@pytest.mark.usefixtures("slim")
async def test_an_image_that_says_nothing_is_given_up(
    way: str, outside: Outside, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names.append("actbox-test/silent")
    tag = await tools.derived(
        outside, names[0], "COPY python3 /usr/local/bin/python3", files={"python3": b"#!/bin/sh\nsleep 99\n"}
    )
    monkeypatch.setattr(meeting, "_SECONDS", 1.0)
    error = await refusal(SandboxUnavailable, tag)
    assert error.layer == "container"
    assert "no sign of life" in error.detail


@pytest.mark.usefixtures("slim")
async def test_an_image_that_is_slow_to_start_is_waited_for(
    way: str, outside: Outside, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names.append("actbox-test/slow")
    python = b'#!/bin/sh\nsleep 1.5\nexec /usr/bin/python3 "$@"\n'
    tag = await tools.derived(outside, names[0], "COPY python3 /usr/local/bin/python3", files={"python3": python})
    # However short the time is that a container has to end.
    monkeypatch.setattr(boundary, "_CLOSE_SECONDS", 0.5)
    async with container(tag, separate=True):
        pass


# -- built -----------------------------------------------------------------------------------------------------------


async def test_an_image_is_built_on_a_base(slim: tools.Built) -> None:
    lines = [line for line, _ in slim.lines]
    assert lines[-1].startswith(f"actbox: the image {SLIM} is ready")
    # They come while it builds.
    assert any(line.startswith("+ six==") and runs for line, runs in slim.lines)
    assert any(line.startswith("Step 1/") and runs for line, runs in slim.lines)
    async with container(SLIM) as made, ExecutionClient(port=made.port) as client:
        found = await client.execute("import six, sys, os; print(six.__name__, os.access('/usr', os.W_OK))")
        assert found.text == "six False"


@pytest.mark.parametrize("requirement", ["actbox-no-such-package-at-all==1", "six==999"])
async def test_a_package_that_there_is_not_builds_nothing(requirement: str, outside: Outside) -> None:
    before = await outside.images()
    containers = {one["Id"] for one in await outside.ask("GET", "containers/json", all="1")}
    with pytest.raises(EnvironmentBuildError) as caught:
        await build_image("actbox-test/bad", [requirement], base=tools.base())
    assert caught.value.tag == "actbox-test/bad"
    assert requirement.partition("=")[0] in caught.value.detail
    assert await outside.images() == before
    assert {one["Id"] for one in await outside.ask("GET", "containers/json", all="1")} == containers


def install_marker(folder: Path, *_: object, progress: Callable[[str], None], **_more: object) -> None:
    """In the place of uv, for a base that has IPython already."""
    folder.mkdir()
    (folder / "marker.py").write_text("found = 42\n")
    progress("+ marker==1")


async def test_a_build_that_fails_in_the_engine_leaves_nothing(
    outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "install_into", install_marker)
    monkeypatch.setattr(building, "_PREPARE", "import sys; print('something of {warm}'); sys.exit('it failed')")
    before = await outside.images()
    containers = {one["Id"] for one in await outside.ask("GET", "containers/json", all="1")}
    with pytest.raises(EnvironmentBuildError, match="it failed"):
        await build_image("actbox-test/failed", base=tools.base())
    with pytest.raises(aiodocker.DockerError):
        await outside.ask("GET", "images/actbox-test/failed/json")
    assert {one["Id"] for one in await outside.ask("GET", "containers/json", all="1")} == containers
    # What the steps before it made is the engine's cache of builds, and has no name.
    assert all(
        not one["RepoTags"] or one["RepoTags"] == ["<none>:<none>"]
        for one in await outside.ask("GET", "images/json", all="1")
        if one["Id"] not in before
    )


async def test_a_base_that_is_no_python_builds_nothing(registry: Registry, names: list[str]) -> None:
    image = registry.add("base", [layer({"hello": b"base"})])
    names.append(image.reference)
    with pytest.raises(EnvironmentBuildError, match="no Python") as caught:
        await build_image("actbox-test/bad", base=image.reference)
    assert image.reference in caught.value.detail
    with pytest.raises(EnvironmentNotFound):
        await build_image("actbox-test/bad", base=f"{registry.host}/nothing:1")


@pytest.mark.parametrize("tag", ["name@sha256:" + 64 * "0", "", "-t", "a b"])
async def test_a_build_has_a_name(tag: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await build_image(tag)
    assert caught.value.name == "tag"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--engine", "docker", "--python", "3.12"], "--python"),
        (["--engine", "bubblewrap", "--base", "python:3.12"], "--base"),
        (["--base", "python:3.12"], "--base"),
    ],
)
async def test_a_build_refuses_what_the_engine_has_no_use_for(
    arguments: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACTBOX_ENGINE", raising=False)
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "actbox", "build", "-t", "actbox-test-refused", *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == ExitCode.USAGE
    assert name in done.stderr


@pytest.mark.usefixtures("slim")
async def test_the_default_image_is_built_at_its_first_use(
    outside: Outside, names: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "DEFAULT_IMAGE", "actbox-test/default:latest")
    monkeypatch.setattr(environments, "install_into", install_marker)
    monkeypatch.setenv("ACTBOX_DOCKER_BASE", SLIM)
    names.append("actbox-test/default")
    for first in (True, False):
        async with container("default", telling=True) as made, ExecutionClient(port=made.port) as client:
            assert (await client.execute("import marker; print(marker.found)")).text == "42"
        told = capfd.readouterr().err
        assert ("actbox: building the image actbox-test/default:latest (once)" in told) is first
        assert ("+ marker==1" in told) is first


# -- declared --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slim")
@pytest.mark.parametrize("separate", [False, True])
async def test_what_an_image_declares_neither_breaks_nor_widens_a_container(
    *, separate: bool, outside: Outside, names: list[str], workspace_path: Path
) -> None:
    """H15."""
    names.append("actbox-test/declaring")
    tag = await tools.derived(
        outside,
        names[0],
        "RUN mkdir -p /srv/it && echo kept > /srv/it/file && chmod 777 /srv/it",
        "VOLUME /srv/it /data /tmp /app",
        "USER 12345",
        "WORKDIR /srv/it",
        'ENTRYPOINT ["/bin/false"]',
        'CMD ["--wrong"]',
        "HEALTHCHECK CMD touch /tmp/healthy",
        "EXPOSE 80",
        "STOPSIGNAL SIGSTOP",
        "ENV PYTHONSTARTUP=/srv/evil.py PYTHONPATH=/srv PYTHONHOME=/nowhere HOME=/srv ONE=1",
        "COPY json.py /srv/json.py",
        files={"json.py": b"raise SystemExit('not this one')"},
    )
    before = await outside.volumes()
    async with (
        CodeExecutionContainer(
            tag, engine="docker", workspace_path=workspace_path, preload=(), show_pull_progress=False, separate=separate
        ) as made,
        CodeExecutor("one", made.workspace, made.port) as executor,
    ):
        code = """
import json, os
found = {}
for place in ("/srv/it", "/data"):
    try:
        written = 0
        with open(f"{place}/file", "wb", buffering=0) as file:
            while written < 1 << 24:
                written += file.write(bytes(4096))
    except OSError:
        pass
    found[place] = written
found["uid"] = os.getuid()
found["cwd"] = os.getcwd()
found["home"] = os.environ["HOME"]
found["json"] = json.__file__.startswith("/usr")
found["healthy"] = os.path.exists("/tmp/healthy")
print(json.dumps(found))
"""
        found = json.loads((await executor.execute(code)).text or "")
        # A volume's place is small where it can be written at all.
        assert all(found[place] <= 64 << 10 for place in ("/srv/it", "/data"))
        assert found["uid"] != 12345
        assert found["cwd"] == "/app/skills/private/one"
        assert found["home"] == "/tmp"
        assert found["json"]
        assert not found["healthy"]
        inspected = await outside.inspect()
        assert inspected["Config"]["User"] == tools.user()
        assert inspected["State"].get("Health") is None
        assert {mount["Type"] for mount in inspected["Mounts"]} <= {"bind", "tmpfs"}
        assert await outside.volumes() == before

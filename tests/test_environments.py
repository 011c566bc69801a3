"""Environments: found without a process, built by a real uv, and never left half-made."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import py_compile
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actbox.engines import environments
from actbox.engines.environments import build, cache_dir, find, has_bytecode, known
from actbox.errors import EnvironmentBuildError, EnvironmentNotFound, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT = 60.0  # seconds; the bound of every wait here
SOURCE = Path(environments.__file__).parents[2]
builds = pytest.mark.timeout(180)  # the first build of a machine downloads IPython


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; the folder of its environments is returned, and may not exist yet."""
    monkeypatch.setenv("ACTBOX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "environments"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment "ready" that has IPython and iniconfig."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTBOX_CACHE_DIR", str(tmp_path_factory.mktemp("built")))
        return build("ready", ["iniconfig"]).prefix


def written(store: Path, tag: str = "made", changes: dict[str, object] | None = None) -> Path:
    """An environment written by hand, around the running interpreter."""
    folder = store / tag
    (folder / "lib" / "packages").mkdir(parents=True)
    default = find("default")
    facts: dict[str, object] = {
        "format": 1,
        "executable": str(default.executable),
        "base_prefix": str(default.base_prefix),
        "version": list(default.version),
        "site_packages": ["lib/packages"],
        "shared_library_dir": None,
    }
    (folder / "actbox-environment.json").write_text(json.dumps(facts | (changes or {})))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def project(folder: Path, name: str, *, body: str = "") -> str:
    """The source of a package whose in-tree build backend needs no download; `body` runs before it builds."""
    (folder / name).mkdir(parents=True)
    (folder / name / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "1"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (folder / name / "backend.py").write_text(
        f"""\
import socket, sys, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    {body or "pass"}
    wheel = "{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(folder + "/" + wheel, "w") as archive:
        archive.writestr("{name}.py", "value = 1\\n")
        archive.writestr("{name}-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1\\n")
        archive.writestr("{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n")
        archive.writestr("{name}-1.dist-info/RECORD", "")
    return wheel
build_editable = build_wheel
"""
    )
    return str(folder / name)


class Gate:
    """A package whose build waits: `arrived()` until it has begun, `open()` to let it go on."""

    def __init__(self, folder: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(WAIT)
        port: int = self._listener.getsockname()[1]
        body = f"socket.create_connection(('127.0.0.1', {port}), {WAIT}).recv(1)"
        self.package = project(folder, "gate", body=body)

    def arrived(self) -> None:
        self._builder, _ = self._listener.accept()
        self._builder.settimeout(WAIT)

    def open(self) -> None:
        self._builder.sendall(b"!")

    def builder_is_gone(self) -> bool:
        """Waits for the end of the build backend's process; anything that it sends would be a mistake."""
        try:
            return self._builder.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._listener.close()
        if hasattr(self, "_builder"):
            self._builder.close()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path)
    yield made
    made.close()


def run(folder: Path, code: str) -> str:
    """What the environment's own Python prints."""
    command = [folder / "bin" / "python", "-I", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT).stdout.strip()


def in_child(code: str, **env: str) -> subprocess.Popen[str]:
    """A Python with actbox, as a process of its own."""
    start = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    environ = os.environ | {"PYTHONPATH": str(SOURCE)} | env
    return subprocess.Popen([sys.executable, "-c", start], env=environ, stderr=subprocess.PIPE, text=True)


# --- the running interpreter ---


def test_the_default_environment_is_that_of_the_running_interpreter() -> None:
    default = find("default")
    assert default.tag == "default"
    assert default.version == sys.version_info[:2]
    assert default.prefix == Path(sys.prefix).resolve()
    assert default.base_prefix == Path(sys.base_prefix).resolve()
    assert default.executable.is_file()
    assert default.executable == default.executable.resolve()
    assert default.has("pytest")
    assert all(folder.is_dir() for folder in default.site_packages)


def test_the_default_executable_is_a_python_of_the_same_base() -> None:
    default = find("default")
    code = "import sys; print(sys.base_prefix, *sys.version_info[:2])"
    done = subprocess.run([default.executable, "-I", "-c", code], check=True, capture_output=True, timeout=WAIT)
    folder, major, minor = done.stdout.decode().split()
    assert Path(folder).resolve() == default.base_prefix
    assert (int(major), int(minor)) == default.version


def test_the_source_of_an_editable_install_is_no_package_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert tmp_path.resolve() not in find("default").site_packages
    assert SOURCE.resolve() not in find("default").site_packages


def test_finding_the_default_environment_starts_no_process_and_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(os, "posix_spawn", None)
    seconds: list[float] = []
    for _ in range(10):
        begin = time.perf_counter()
        find("default")
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.005


def test_a_venv_made_from_a_venv_leads_to_the_real_interpreter(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", first], check=True, timeout=WAIT)
    subprocess.run([first / "bin" / "python", "-m", "venv", "--without-pip", second], check=True, timeout=WAIT)
    # What actbox imports alone, not the package folder that holds it.
    (tmp_path / "shim").mkdir()
    for name in ("uv", "dotenv"):
        package = find_spec(name)
        assert package is not None
        assert package.submodule_search_locations
        (tmp_path / "shim" / name).symlink_to(package.submodule_search_locations[0])
    code = (
        "from actbox.engines.environments import find; e = find('default')\n"
        "print(e.executable, e.base_prefix, e.prefix, *e.site_packages, sep='|')"
    )
    done = subprocess.run(
        [second / "bin" / "python", "-c", code],
        env={"PYTHONPATH": f"{SOURCE}:{tmp_path / 'shim'}", "PYTHONNOUSERSITE": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=WAIT,
    )
    default = find("default")
    packages = second.resolve() / "lib" / "python{}.{}".format(*default.version) / "site-packages"
    expected = [default.executable, default.base_prefix, second.resolve(), packages]
    assert done.stdout.strip().split("|") == list(map(str, expected))


# --- packages, fingerprints, bytecode ---


def test_a_module_is_had_as_file_package_or_extension_and_not_by_its_remains(tmp_path: Path) -> None:
    for name in ("package/__init__.py", "plain.py", "fast.cpython-311-x86_64-linux-gnu.so", "bare.so", "space/part.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone" / "__pycache__").mkdir(parents=True)
    environment = dataclasses.replace(find("default"), site_packages=(tmp_path,))
    assert all(environment.has(name) for name in ("package", "plain", "fast", "bare", "space", "package.anything"))
    assert not any(environment.has(name) for name in ("gone", "fas", "plain_", "os", "", ".", "*", "../etc", "a/b"))


def test_the_fingerprint_follows_the_installed_packages(cache: Path) -> None:
    packages = written(cache) / "lib" / "packages"
    seen = [find("made").fingerprint]
    assert find("made").fingerprint == seen[0]
    (packages / "any.py").touch()
    assert find("made").fingerprint == seen[0]
    (packages / "six-1.dist-info").mkdir()
    seen.append(find("made").fingerprint)
    (packages / "six-1.dist-info").rename(packages / "six-2.dist-info")
    seen.append(find("made").fingerprint)
    os.utime(packages / "six-2.dist-info", ns=(1, 1))
    seen.append(find("made").fingerprint)
    (packages / "hook.pth").touch()
    seen.append(find("made").fingerprint)
    assert len(set(seen)) == len(seen)


def test_bytecode_counts_only_if_the_interpreter_would_use_it(tmp_path: Path) -> None:
    default = find("default")
    version = "python{}.{}".format(*default.version)
    packages = tmp_path / "packages" / "IPython" / "core"
    packages.mkdir(parents=True)
    (tmp_path / "lib" / version).mkdir(parents=True)
    for name in ("os.py", "ast.py", "inspect.py"):
        (tmp_path / "lib" / version / name).write_text("1\n")
    environment = dataclasses.replace(default, base_prefix=tmp_path, site_packages=(tmp_path / "packages",))
    assert not has_bytecode(environment)
    for source in (tmp_path / "lib" / version).glob("*.py"):
        py_compile.compile(str(source), doraise=True)
    assert has_bytecode(environment)

    shell = packages / "interactiveshell.py"
    shell.write_text("1\n")
    assert not has_bytecode(environment)
    compiled = py_compile.compile(str(shell), doraise=True)
    assert has_bytecode(environment)
    shell.write_text("2 + 2  # changed since\n")
    assert not has_bytecode(environment)
    py_compile.compile(str(shell), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    assert has_bytecode(environment)
    assert compiled is not None
    Path(compiled).write_bytes(b"cut short")
    assert not has_bytecode(environment)
    assert not has_bytecode(dataclasses.replace(environment, base_prefix=tmp_path / "nothing"))


# --- looking up what was built ---


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ACTBOX_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"ACTBOX_CACHE_DIR": "~/own"}, "/home/someone/own"),
        ({"ACTBOX_CACHE_DIR": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/actbox"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/someone/.cache/actbox"),
        ({}, "/home/someone/.cache/actbox"),
    ],
)
def test_the_cache_folder_follows_the_variables(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACTBOX_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_known_tags_are_default_first_and_only_what_was_built(cache: Path) -> None:
    assert known() == ("default",)
    for tag in ("zoo", "ant", "default"):
        written(cache, tag)
    (cache / "empty").mkdir()
    (cache / ".ant~01234567").mkdir()
    assert known() == ("default", "ant", "zoo")


def test_an_unknown_tag_says_which_exist_and_how_to_make_it(cache: Path) -> None:
    written(cache, "other")
    with pytest.raises(EnvironmentNotFound, match=r"actbox build -t mine .*") as caught:
        find("mine")
    assert caught.value.tag == "mine"
    assert caught.value.known == ("default", "other")


@pytest.mark.parametrize("tag", ["", "../up", "A", "a/b", ".hidden", "a~b", "-t", "a" * 65, None, 1])
def test_a_tag_outside_the_grammar_is_refused(tag: str) -> None:
    with pytest.raises(InvalidArgument):
        find(tag)
    with pytest.raises(InvalidArgument):
        build(tag)


def test_what_was_written_is_found(cache: Path) -> None:
    folder = written(cache).resolve()
    found = find("made")
    assert (found.tag, found.prefix, found.site_packages) == ("made", folder, (folder / "lib" / "packages",))
    assert (found.executable, found.version) == (find("default").executable, find("default").version)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"executable": "/nowhere/python"},
        {"executable": "python"},
        {"executable": "/\0"},
        {"executable": "/etc/passwd"},
        {"executable": 1},
        {"base_prefix": "/nowhere"},
        {"base_prefix": None},
        {"version": "3.11"},
        {"version": [3]},
        {"version": [2, 7]},
        {"version": [3, "11"]},
        {"site_packages": []},
        {"site_packages": "lib/packages"},
        {"site_packages": ["lib/packages", 1]},
        {"site_packages": ["lib/nothing"]},
        {"site_packages": ["/etc"]},
        {"site_packages": ["../other"]},
        {"shared_library_dir": "/nowhere"},
        {"shared_library_dir": 1},
    ],
    ids=str,
)
def test_damaged_metadata_says_to_build_again(cache: Path, changes: dict[str, object]) -> None:
    written(cache, changes=changes)
    with pytest.raises(EnvironmentBuildError, match="build it again: actbox build -t made"):
        find("made")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000], ids=lambda text: text[:5].hex())
def test_metadata_that_is_no_object_says_to_build_again(cache: Path, text: bytes) -> None:
    (written(cache) / "actbox-environment.json").write_bytes(text)
    with pytest.raises(EnvironmentBuildError, match="build it again"):
        find("made")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["format", "executable", "base_prefix", "version", "site_packages", "shared_library_dir"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(field=fields, value=anything)
def test_no_metadata_makes_find_fail_in_another_way(cache: Path, field: str, value: object) -> None:
    shutil.rmtree(cache, ignore_errors=True)
    written(cache, changes={field: value})
    try:
        found = find("made")
    except EnvironmentBuildError:
        return
    assert found.executable.is_file()
    assert all(folder.is_dir() for folder in (found.prefix, found.base_prefix, *found.site_packages))


# --- building ---


@builds
def test_a_built_environment_runs_ipython_and_what_was_asked_for(built: Path) -> None:
    assert run(built, "import IPython, iniconfig; print('here')") == "here"
    assert names(built.parent) == ["ready"]


@builds
def test_a_built_environment_is_found_with_its_bytecode(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTBOX_CACHE_DIR", str(built.parent.parent))
    found = find("ready")
    default = find("default")
    assert (found.executable, found.base_prefix) == (default.executable, default.base_prefix)
    assert (found.version, found.shared_library_dir) == (default.version, default.shared_library_dir)
    assert found.prefix == built
    assert found.has("IPython")
    assert found.has("iniconfig")
    assert not found.has("pytest")
    assert has_bytecode(dataclasses.replace(default, site_packages=())) == has_bytecode(found)
    compiled = found.site_packages[0] / "iniconfig" / "__pycache__"
    assert list(compiled.glob("__init__.*.pyc"))
    assert known() == ("default", "ready")


@builds
def test_a_build_replaces_the_old_environment_and_leaves_nothing_else(cache: Path, tmp_path: Path) -> None:
    first = build("mine", [project(tmp_path, "one")])
    second = build("mine", [project(tmp_path, "two")])
    assert first.prefix == second.prefix
    assert first.fingerprint != second.fingerprint
    assert not second.has("one")
    assert run(second.prefix, "import two; print(two.value)") == "1"
    assert names(cache) == ["mine"]


@builds
def test_a_build_replaces_the_old_one_where_folders_cannot_be_swapped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(other))

    monkeypatch.setattr(environments, "_exchange", refuse)
    written(cache, "mine")
    assert build("mine", [project(tmp_path, "two")]).has("two")
    assert names(cache) == ["mine"]


@builds
def test_a_build_may_run_from_a_strict_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("UV_LINK_MODE", "symlink")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    before = os.umask(0o077)
    try:
        made = build("strict", ["iniconfig"])
    finally:
        os.umask(before)
    package = made.site_packages[0] / "iniconfig"
    assert list((package / "__pycache__").glob("__init__.*.pyc"))
    assert not any(path.is_symlink() for path in made.site_packages[0].rglob("*"))
    if os.geteuid() == 0:  # what root builds is read by another user inside
        shared = [made.prefix.parent.parent, made.prefix.parent, *made.prefix.rglob("*")]
        modes = [(path, path.stat().st_mode) for path in shared if not path.is_symlink()]
        assert [path for path, mode in modes if not mode & stat.S_IROTH] == []
        assert [path for path, mode in modes if stat.S_ISDIR(mode) and not mode & stat.S_IXOTH] == []


@builds
def test_requirements_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "-r odd name.txt"
    file.write_text(f"# with a comment\n{project(tmp_path, 'one')}\n")
    assert build("mine", requirements=file).has("one")


@builds
def test_progress_is_told_line_by_line_without_draft_names(tmp_path: Path) -> None:
    lines: list[str] = []
    build("mine", [project(tmp_path, "one")], progress=lines.append)
    assert any(line.startswith(" + ipython==") for line in lines)
    assert any("one==1" in line for line in lines)
    assert not any(".mine~" in line for line in lines)
    assert all(line.isprintable() for line in lines)


@builds
def test_a_failed_build_keeps_the_old_environment_and_says_why(cache: Path) -> None:
    written(cache, "mine")
    before = find("mine")
    with pytest.raises(EnvironmentBuildError, match="no-such-package-of-actbox") as caught:
        build("mine", ["iniconfig", "no-such-package-of-actbox"])
    assert caught.value.tag == "mine"
    assert find("mine") == before
    assert names(cache) == ["mine"]


@builds
def test_a_failed_first_build_leaves_nothing(cache: Path) -> None:
    with pytest.raises(EnvironmentBuildError):
        build("mine", ["no-such-package-of-actbox"])
    assert names(cache) == []
    assert known() == ("default",)


@builds
def test_an_exception_of_progress_stops_the_build_without_a_trace(cache: Path) -> None:
    def stop(line: str) -> None:
        if "Resolved" in line:
            raise KeyboardInterrupt

    written(cache, "mine")
    before = find("mine")
    with pytest.raises(KeyboardInterrupt):
        build("mine", progress=stop)
    assert find("mine") == before
    assert names(cache) == ["mine"]


@builds
def test_ctrl_c_kills_what_uv_runs_and_leaves_nothing(cache: Path, gate: Gate) -> None:
    child = in_child(f"from actbox.engines.environments import build; build('mine', [{gate.package!r}])")
    with child:
        gate.arrived()
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=WAIT)
    assert gate.builder_is_gone()
    assert "KeyboardInterrupt" in stderr
    assert names(cache) == []


@builds
def test_a_second_build_of_the_tag_fails_clearly_while_the_first_goes_on(cache: Path, gate: Gate) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(build, "mine", [gate.package])
        gate.arrived()
        with pytest.raises(EnvironmentBuildError, match="another build of it is running"):
            build("mine")
        assert build("mine.too").has("IPython")
        gate.open()
        assert first.result(WAIT).has("gate")
    assert names(cache) == ["mine", "mine.too"]


@builds
def test_a_killed_build_stays_locked_until_uv_ends_and_is_then_swept_up(cache: Path, gate: Gate) -> None:
    with in_child(f"from actbox.engines.environments import build; build('mine', [{gate.package!r}])") as child:
        gate.arrived()
        child.kill()
    with pytest.raises(EnvironmentBuildError, match="another build of it is running"):
        build("mine")
    gate.open()
    with (cache / ".mine~lock").open("rb") as lock, ThreadPoolExecutor(1) as pool:
        pool.submit(fcntl.flock, lock, fcntl.LOCK_EX).result(WAIT)
    assert [name.partition("~")[0] for name in names(cache)] == [".mine", ".mine"]
    assert not build("mine").has("gate")
    assert names(cache) == ["mine"]


@builds
def test_an_editable_install_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text(f"-e {project(tmp_path, 'linked')}\n")
    with pytest.raises(EnvironmentBuildError, match="linked is an editable install"):
        build("mine", requirements=tmp_path / "requirements.txt")
    assert names(cache) == []


@builds
def test_what_a_build_backend_prints_cannot_restyle_the_terminal(tmp_path: Path) -> None:
    body = "print('\\x1b]0;title\\x07\\x1b[31mred\\x1b[0m \\u202e \\x9b1m', file=sys.stderr); raise SystemExit(3)"
    with pytest.raises(EnvironmentBuildError, match="red") as caught:
        build("mine", [project(tmp_path, "loud", body=body)])
    assert all(line.isprintable() for line in caught.value.detail.splitlines())
    assert "title" not in caught.value.detail
    assert len(caught.value.detail.splitlines()) <= 20


@builds
def test_the_password_of_an_index_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://someone:hunter2@127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(EnvironmentBuildError) as caught:
        build("mine", ["https://someone:hunter2@127.0.0.1:9/one-1-py3-none-any.whl"], progress=lines.append)
    assert "hunter2" not in "\n".join((*lines, str(caught.value), caught.value.detail))


# --- what is refused before anything is made ---


@pytest.mark.parametrize(
    "packages",
    [
        ["-e"],
        ["six", "--index-url=http://evil"],
        [" -r file"],
        ["--"],
        [""],
        [" "],
        ["six\n--pre"],
        ["a\0b"],
        [1],
        "six",
    ],
    ids=repr,
)
def test_packages_that_could_be_options_are_refused(cache: Path, packages: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="packages"):
        build("mine", packages)
    assert not cache.exists()


@pytest.mark.parametrize("python", ["", "--python=x", " -c", "3.12\n", "\0"], ids=repr)
def test_a_python_that_could_be_an_option_is_refused(cache: Path, python: str) -> None:
    with pytest.raises(InvalidArgument, match="python"):
        build("mine", python=python)
    assert not cache.exists()


def test_requirements_that_are_no_file_are_refused(cache: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(InvalidArgument, match="requirements"):
            build("mine", requirements=path)
    assert not cache.exists()


def test_the_default_tag_cannot_be_built(cache: Path) -> None:
    with pytest.raises(InvalidArgument, match="running interpreter"):
        build("default")
    assert not cache.exists()


def test_a_python_that_does_not_exist_is_told(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentBuildError, match="No interpreter found"):
        build("mine", python=str(tmp_path / "python"))
    assert names(cache) == []


def test_a_python_that_is_too_old_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_OLDEST", (99, 0))
    with pytest.raises(InvalidArgument, match=r"CPython 99\.0 or newer"):
        build("mine", python=str(find("default").executable))
    assert names(cache) == []


def test_a_missing_uv_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(environments, "find_uv_bin", missing)
    with pytest.raises(EnvironmentBuildError, match="pip install uv"):
        build("mine")
    assert names(cache) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACTBOX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(EnvironmentBuildError, match="file"):
        build("mine")
    assert known() == ("default",)
    with pytest.raises(EnvironmentNotFound):
        find("mine")

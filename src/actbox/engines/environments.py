"""The Pythons that can be shown inside a sandbox: found, described, and built with uv.

Everything that decides which interpreter and which package folders a session gets lives here; this file does not know
how they are mounted. An environment is only ever read by a sandbox: nothing here runs while a session does.

What is built lies below `cache_dir()`::

    environments/TAG/                      a relocatable virtual environment
    environments/TAG/actbox-environment.json   what `find` reads, so that looking one up starts no process
    environments/.TAG~xxxxxxxx/            a draft, or the environment that a new one replaced; gone after the build
    environments/.TAG~lock                 locked while a build of TAG runs; gone after the build

"~" is outside the grammar of tags, so that no tag's own files can be taken for another tag's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import site
import stat
import subprocess
import sys
import sysconfig
from collections import deque
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, cast

from uv import find_uv_bin

from actbox.errors import EnvironmentBuildError, EnvironmentNotFound, InvalidArgument
from actbox.spec import DEFAULT_TAG, check_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

_METADATA = "actbox-environment.json"
_FORMAT = 1
_OLDEST = (3, 10)  # what the guest code is written for
# The guest's kernel is IPython; matplotlib-inline is how its figures become images; pip is for sessions that may reach
# an index.
_ALWAYS = ("ipython>=8.18", "matplotlib-inline", "pip")
_QUERY_TIMEOUT = 60.0  # seconds; a cold start of a Python from a slow disk takes single seconds
_TAIL = 20  # lines of the installer's stderr that an error quotes
_LINE = 1 << 16  # bytes; a build backend may print lines without end

# Run by the new environment's interpreter, which may be another version and has no actbox.
_QUERY = """\
import json, os, site, sys, sysconfig
print(json.dumps({
    "implementation": sys.implementation.name,
    "version": sys.version_info[:2],
    "candidates": [getattr(sys, "_base_executable", None), sys.executable],
    "prefix": sys.prefix,
    "base_prefix": sys.base_prefix,
    "site_packages": [folder for folder in site.getsitepackages() if os.path.isdir(folder)],
    "library": [sysconfig.get_config_var(name) for name in ("Py_ENABLE_SHARED", "LIBDIR", "INSTSONAME")],
}))
"""

# Python's own variables would make the environment depend on the shell it was built from: a foreign module path, a
# bytecode cache elsewhere or none at all. Everything else (proxies, certificates, index settings) is uv's to see.
_NOT_FOR_UV = (
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONPYCACHEPREFIX",
    "VIRTUAL_ENV",
)

_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.?)")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")

# Of the standard library and of the packages that take longest to import: files that a session is sure to load.
_SAMPLE_STDLIB = ("ast.py", "inspect.py", "asyncio/events.py", "json/decoder.py")
_SAMPLE_PACKAGES = (
    "IPython/core/interactiveshell.py",
    "numpy/__init__.py",
    "numpy/lib/__init__.py",
    "pandas/__init__.py",
    "pandas/core/frame.py",
    "matplotlib/pyplot.py",
)
_PYC_HEADER = 16  # PEP 552: magic, flags, then mtime and size of the source, or its hash


@dataclass(frozen=True, slots=True)
class Environment:
    """One Python and its packages, as host paths with all symbolic links resolved.

    Attributes:
        tag: the name it was found by.
        executable: the base interpreter's binary, never a virtual environment's link to it.
        base_prefix: the folder of that interpreter (its standard library lies below).
        prefix: the virtual environment's folder; `base_prefix` if it is none.
        version: major and minor.
        site_packages: the package folders in the order of `sys.path`; an editable install's source is none of them.
        shared_library_dir: where the interpreter's libpython lies, if it is linked against one below `base_prefix`.
        fingerprint: hexadecimal digest that changes when the interpreter or the set of installed packages does.
    """

    tag: str
    executable: Path
    base_prefix: Path
    prefix: Path
    version: tuple[int, int]
    site_packages: tuple[Path, ...]
    shared_library_dir: Path | None
    fingerprint: str

    def has(self, module: str) -> bool:
        """Whether the top-level name of `module` lies in the package folders. Nothing is imported."""
        name = module.partition(".")[0]
        return name.isidentifier() and any(_holds(folder, name) for folder in self.site_packages)


def find(tag: str) -> Environment:
    """The environment of this tag; "default" is that of the running interpreter. Starts no process.

    Raises:
        InvalidArgument: the tag is outside the grammar.
        EnvironmentNotFound: nobody built it.
        EnvironmentBuildError: it was built, but is damaged or its interpreter is gone: it must be built again.
    """
    if check_tag(tag) == DEFAULT_TAG:
        return _running()
    return _load(tag, _store() / tag)


def known() -> tuple[str, ...]:
    """The tags that `find` knows, "default" first, then what was built in the order of the alphabet."""
    try:
        with os.scandir(_store()) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError:
        names = []
    built = (name for name in names if name != DEFAULT_TAG and (_store() / name / _METADATA).is_file())
    return (DEFAULT_TAG, *built)


def cache_dir() -> Path:
    """The folder below which environments are built: $ACTBOX_CACHE_DIR, $XDG_CACHE_HOME/actbox or ~/.cache/actbox.

    It need not exist.

    Raises:
        InvalidArgument: neither variable is set, and the user has no home folder.
    """
    try:
        if own := os.environ.get("ACTBOX_CACHE_DIR"):
            return Path(own).expanduser().absolute()
        shared = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG base directory specification: relative paths are invalid and to be ignored.
        return (Path(shared) if shared.startswith("/") else Path.home() / ".cache") / "actbox"
    except RuntimeError:
        raise InvalidArgument("ACTBOX_CACHE_DIR", None, "there is no home folder; set it to an absolute path") from None


def build(
    tag: str,
    packages: Sequence[str] = (),
    requirements: Path | None = None,
    python: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Environment:
    """Make or replace the environment `tag`, with IPython and what is asked for, its bytecode compiled.

    The new environment takes the old one's place in one step (where the file system cannot swap two folders, such as
    NFS, the tag is missing for a moment). When anything fails, Ctrl-C and an exception of `progress` included, the old
    one stays as it was and no file is left behind. A container that runs on the old one keeps what it has imported and
    cannot import the rest: stop it first. Takes as long as downloads and compilers do; uv bounds its network waits.

    Args:
        tag: any tag but "default".
        packages: requirement specifiers, or paths of wheels and source folders, as `uv pip install` takes them.
        requirements: a requirements file.
        python: what `uv venv --python` takes: a version or a path; None for the interpreter that runs this.
        progress: is handed each line that uv prints, without control characters and credentials, in this thread.

    Raises:
        InvalidArgument: a tag, package, requirements file or Python that cannot be used.
        EnvironmentBuildError: uv failed (`detail` holds its last lines), another build of this tag is running, or the
            folder cannot be written.
    """
    if check_tag(tag) == DEFAULT_TAG:
        raise InvalidArgument("tag", tag, "'default' is the environment of the running interpreter; choose another tag")
    wanted = _install_arguments(packages, requirements)
    if python is not None and not _plain(python):
        raise InvalidArgument("python", python, "pass a version such as '3.12', or the path of an interpreter")
    report = progress or _ignore
    with _locked(tag) as (store, lock):
        draft = _beside(store, tag)
        try:
            chosen = python or str(_running().executable)
            report(f"Preparing {tag} with Python {chosen}")
            # Quiet, since all that it would say is the draft's path and how to activate it.
            venv = ["venv", "--quiet", "--no-project", "--relocatable", f"--python={chosen}", str(draft)]
            _uv(tag, venv, draft, lock, report)
            facts = _query(tag, draft, chosen)
            # "clone" falls back to copies. Symbolic links, which uv's settings may ask for, would lead into its cache,
            # and that is not shown inside.
            options = ["--compile-bytecode", "--link-mode=clone", f"--python={draft / 'bin' / 'python'}"]
            _uv(tag, ["pip", "install", *options, *wanted], draft, lock, report)
            with _file_errors(tag):
                (draft / _METADATA).write_text(json.dumps(facts, indent=1), "utf-8")
                _check_contents(tag, _load(tag, draft))
                if os.geteuid() == 0:
                    _let_others_read(draft)
                _publish(draft, store / tag)
            return _load(tag, store / tag)
        finally:
            _remove(draft)  # a failed draft, or the environment that was replaced


def install_into(
    folder: Path,
    tag: str,
    packages: Sequence[str],
    requirements: Path | None,
    *,
    version: tuple[int, int],
    platform: str,
    progress: Callable[[str], None],
) -> None:
    """Install IPython and what is asked for into a plain folder, for a Python that may be another machine's.

    Args:
        folder: where the packages go; `bin` below it gets their scripts.
        tag: for messages.
        packages: as of `build`.
        requirements: as of `build`.
        version: major and minor of that Python.
        platform: its platform in uv's words, such as "x86_64-manylinux_2_28".
        progress: as of `build`.

    Raises:
        InvalidArgument: a package or requirements file that cannot be used.
        EnvironmentBuildError: uv failed; `detail` holds its last lines.
    """
    wanted = _install_arguments(packages, requirements)
    target = [f"--target={folder}", "--python-version={}.{}".format(*version), f"--python-platform={platform}"]
    _uv(tag, ["pip", "install", "--link-mode=copy", *target, *wanted], folder, None, progress)


def has_bytecode(environment: Environment) -> bool:
    """Whether the standard library and the big packages come with bytecode that this interpreter would use.

    Looks at a few files of each, so it costs well under a millisecond. Without bytecode every start compiles what it
    imports, because a sandbox cannot write to the environment: seconds instead of tenths.
    """
    version = "{}.{}".format(*environment.version)
    stdlib = (environment.base_prefix / lib / f"python{version}{abi}" for lib in ("lib", "lib64") for abi in ("", "t"))
    home = next((folder for folder in stdlib if (folder / "os.py").is_file()), None)
    if home is None:
        return False
    samples = [home / name for name in _SAMPLE_STDLIB]
    samples += [folder / name for folder in environment.site_packages for name in _SAMPLE_PACKAGES]
    tag = "cpython-{}{}".format(*environment.version)
    # Free-threaded builds (PEP 703) mark theirs with a "t".
    return all(_compiled(source, tag) or _compiled(source, f"{tag}t") for source in samples if source.is_file())


# --- the running interpreter ---


def _running() -> Environment:
    """The interpreter that runs this, with what is on its `sys.path` now.

    Package folders are known by their names, because more of them are on the path than `site.getsitepackages()` tells:
    the user's own, and the parent's where uv lays one environment over another. What else is on the path (a script's
    folder, a checkout by way of a `.pth` file) is the host program's business and is not shown.
    """
    base = Path(sys.base_prefix).resolve()
    version = sys.version_info[:2]
    # `_base_executable` is where `venv` itself looks. It can be missing (embedded Python) or name a link that was
    # removed since (Debian's /usr/bin/python).
    candidates = [getattr(sys, "_base_executable", None), sys.executable]
    executable = _executable(candidates, base, version)
    if executable is None:
        raise EnvironmentBuildError(DEFAULT_TAG, f"the running interpreter's binary is not to be found below {base}")
    own = {*site.getsitepackages(), site.getusersitepackages()}
    shown = (
        Path(folder).resolve()
        for folder in sys.path
        if folder in own or PurePath(folder).name in ("site-packages", "dist-packages")
    )
    folders = tuple(dict.fromkeys(folder for folder in shown if folder.is_dir()))
    library = [sysconfig.get_config_var(name) for name in ("Py_ENABLE_SHARED", "LIBDIR", "INSTSONAME")]
    return Environment(
        tag=DEFAULT_TAG,
        executable=executable,
        base_prefix=base,
        prefix=Path(sys.prefix).resolve(),
        version=version,
        site_packages=folders,
        shared_library_dir=_library_dir(library, base),
        fingerprint=_fingerprint(executable, version, folders),
    )


def _executable(candidates: Sequence[object], base: Path, version: tuple[int, int]) -> Path | None:
    """The first candidate that is a file, else the binary where every Unix Python has it; resolved."""
    usual = base / "bin" / "python{}.{}".format(*version)
    paths = [Path(candidate) for candidate in candidates if isinstance(candidate, str) and candidate]
    return next((path.resolve() for path in (*paths, usual) if path.is_file()), None)


def _library_dir(library: Sequence[object], base: Path) -> Path | None:
    """The folder of libpython from the variables Py_ENABLE_SHARED, LIBDIR and INSTSONAME, if it is there at all.

    A relocated Python (uv's) is built shared but names the folder of the machine that built it.
    """
    shared, folder, name = library
    if shared != 1 or not isinstance(folder, str) or not isinstance(name, str):
        return None
    for place in (Path(folder), base / "lib"):
        if (place / name).is_file() and place.resolve().is_relative_to(base):
            return place.resolve()
    return None


def _fingerprint(executable: Path, version: tuple[int, int], site_packages: Sequence[Path]) -> str:
    """Installing, upgrading or removing a package changes the name or the time of an entry that is counted here."""
    status = executable.stat()
    facts: list[object] = [str(executable), status.st_mtime_ns, status.st_size, *version]
    for folder in site_packages:
        entries: list[tuple[str, int]] = []
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.endswith((".dist-info", ".egg-info", ".pth")):
                    # Another process may be installing at this moment.
                    with contextlib.suppress(FileNotFoundError):
                        entries.append((entry.name, entry.stat(follow_symlinks=False).st_mtime_ns))
        facts += [str(folder), sorted(entries)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _holds(folder: Path, name: str) -> bool:
    """Whether `folder` has the module as source, extension or package; remains of an uninstalled one do not count."""
    if (folder / f"{name}.py").is_file():
        return True
    try:
        return any(entry.name != "__pycache__" for entry in (folder / name).iterdir())
    except OSError:
        return any(folder.glob(f"{name}.*so"))


def _compiled(source: Path, tag: str) -> bool:
    """Whether the interpreter with this cache tag would use the bytecode beside `source` (PEP 552)."""
    try:
        with (source.parent / "__pycache__" / f"{source.stem}.{tag}.pyc").open("rb") as file:
            header = file.read(_PYC_HEADER)
        status = source.stat()
    except OSError:
        return False
    if len(header) < _PYC_HEADER:
        return False
    if header[4] & 1:  # checked by hash, or not at all
        return True
    written = int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF
    return written == (int.from_bytes(header[8:12], "little"), int.from_bytes(header[12:], "little"))


# --- what was built ---


def _store() -> Path:
    return cache_dir() / "environments"


def _load(tag: str, folder: Path) -> Environment:
    """The environment in `folder`, every statement of its metadata checked against the disk.

    Raises:
        EnvironmentNotFound: nothing was built there.
        EnvironmentBuildError: the metadata is malformed, or names what is no longer there.
    """
    try:
        text = (folder / _METADATA).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise EnvironmentNotFound(tag, known()) from None
    except OSError as exc:
        raise EnvironmentBuildError(tag, str(exc)) from exc
    try:
        return _described(tag, folder.resolve(), json.loads(text))
    except (OSError, ValueError, RecursionError, _Damaged) as exc:  # ValueError: no UTF-8 or no JSON
        problem = f"it is damaged ({exc}); build it again: actbox build -t {tag} [-r requirements.txt | PACKAGE...]"
        raise EnvironmentBuildError(tag, problem) from exc


class _Damaged(Exception):
    """What the metadata says is malformed or no longer true."""


def _described(tag: str, folder: Path, raw: object) -> Environment:
    if not isinstance(raw, dict):
        raise _Damaged(f"{_METADATA} holds no object")
    facts = cast("dict[str, object]", raw)
    if facts.get("format") != _FORMAT:
        raise _Damaged(f"{_METADATA} is not of format {_FORMAT}")
    match facts.get("version"):
        case [int(major), int(minor)] if (major, minor) >= _OLDEST:
            version = (major, minor)
        case _:
            raise _Damaged("version is no pair of numbers")
    executable = _absolute(facts, "executable")
    if not os.access(executable, os.X_OK) or not executable.is_file():
        raise _Damaged(f"its interpreter {executable} is gone")
    base = _absolute(facts, "base_prefix")
    library = None if facts.get("shared_library_dir") is None else _absolute(facts, "shared_library_dir")
    packages = tuple(folder / name for name in _names(facts, "site_packages"))
    for place in (base, *packages, *([library] if library else [])):
        if not place.is_dir():
            raise _Damaged(f"the folder {place} is gone")
    return Environment(
        tag=tag,
        executable=executable,
        base_prefix=base,
        prefix=folder,
        version=version,
        site_packages=packages,
        shared_library_dir=library,
        fingerprint=_fingerprint(executable, version, packages),
    )


def _absolute(facts: dict[str, object], name: str) -> Path:
    value = facts.get(name)
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise _Damaged(f"{name} is no absolute path")
    return Path(value)


def _names(facts: dict[str, object], name: str) -> list[str]:
    """Paths below the environment's folder, which may have been moved since they were written."""
    value = facts.get(name)
    items = cast("list[object]", value) if isinstance(value, list) else []
    names = [item for item in items if isinstance(item, str)]
    if not names or len(names) != len(items):
        raise _Damaged(f"{name} is no list of paths")
    if any(item.startswith("/") or "\0" in item or ".." in PurePath(item).parts for item in names):
        raise _Damaged(f"{name} leaves the environment")
    return names


# --- building ---


def _install_arguments(packages: Sequence[str], requirements: Path | None) -> list[str]:
    """What follows `uv pip install`. Nothing of the caller's can be read as an option."""
    if isinstance(packages, str):
        raise InvalidArgument("packages", packages, "pass a list of packages, not one string")
    for package in packages:
        if not _plain(package):
            raise InvalidArgument("packages", package, "pass names such as 'numpy>=2'; options are not taken here")
    arguments: list[str] = []
    if requirements is not None:
        if not requirements.is_file():
            raise InvalidArgument("requirements", str(requirements), "there is no such file")
        arguments.append(f"--requirements={requirements.absolute()}")
    return [*arguments, "--", *_ALWAYS, *packages]


def _plain(argument: object) -> bool:
    return (
        isinstance(argument, str)
        and argument.isprintable()
        and argument.strip() != ""
        and not argument.lstrip().startswith("-")
    )


def _ignore(line: str) -> None:
    del line


@contextlib.contextmanager
def _file_errors(tag: str) -> Generator[None]:
    try:
        yield
    except OSError as exc:
        raise EnvironmentBuildError(tag, str(exc)) from exc


@contextlib.contextmanager
def _locked(tag: str) -> Generator[tuple[Path, int]]:
    """The folder of environments, and the locked file's descriptor; what an earlier build of `tag` left is gone.

    uv inherits the descriptor: if this process is killed while uv goes on, the tag stays locked until uv has ended,
    and only then is its draft swept up.

    Raises:
        EnvironmentBuildError: another build of `tag` is running, or the folder cannot be written.
    """
    store = _store()
    path = store / f".{tag}~lock"
    with _file_errors(tag):
        store.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:  # a sandbox that root starts runs as somebody else
            for folder in (cache_dir(), store):
                folder.chmod(0o755)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise EnvironmentBuildError(tag, "another build of it is running; wait until it has ended") from None
            except BaseException:
                os.close(lock)
                raise
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(lock).st_ino:
                    break
            os.close(lock)  # its last holder removed the file after we had opened it
    try:
        for draft in store.glob(f".{tag}~????????"):
            _remove(draft)
        yield store, lock
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _beside(store: Path, tag: str) -> Path:
    """A new name for a folder that the next build of `tag` sweeps up, should this one not come to its end."""
    return store / f".{tag}~{secrets.token_hex(4)}"


def _uv(tag: str, arguments: Sequence[str], draft: Path, lock: int | None, report: Callable[[str], None]) -> None:
    """Run uv to its end, each line of its stderr reported; on any exception it and its children are killed."""
    try:
        command = [find_uv_bin(), "--color=never", *arguments]
    except FileNotFoundError as exc:
        raise EnvironmentBuildError(tag, "uv is missing; install it with: pip install uv") from exc
    tail: deque[str] = deque(maxlen=_TAIL)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name not in _NOT_FOR_UV},
            pass_fds=() if lock is None else (lock,),
            # A session of its own: Ctrl-C reaches us alone, who then kill all of it, and nothing in it (git, ssh) can
            # stop at a terminal to ask for a password.
            start_new_session=True,
            umask=0o022 if os.geteuid() == 0 else -1,
        )
    except OSError as exc:
        raise EnvironmentBuildError(tag, f"uv cannot be started: {exc}") from exc
    with process:
        try:
            stderr = process.stderr
            while stderr and (raw := stderr.readline(_LINE)):
                for line in _lines(raw):
                    tail.append(line.replace(draft.name, tag))
                    report(tail[-1])
            code = process.wait()
        except BaseException:
            if process.returncode is None:  # not reaped, so the number is still this group's
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise
    if code != 0:
        raise EnvironmentBuildError(tag, "\n".join(tail) or f"uv ended with code {code}")


def _lines(raw: bytes) -> Iterator[str]:
    """A line of output as a terminal may see it: build backends print what they like, and index URLs hold passwords."""
    for line in raw.decode(errors="replace").splitlines():
        text = _CREDENTIALS.sub("***", _ESCAPES.sub("", line).expandtabs())
        text = "".join(character for character in text if character.isprintable()).rstrip()
        if text:
            yield text


def _query(tag: str, draft: Path, python: str) -> dict[str, object]:
    """The metadata of the virtual environment in `draft`, in which nothing is installed yet."""
    try:
        done = subprocess.run(
            [draft / "bin" / "python", "-I", "-c", _QUERY],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_QUERY_TIMEOUT,
            check=True,
        )
        # A sitecustomize of the base interpreter may have printed before.
        told = json.loads(done.stdout.splitlines()[-1])
        name, version = str(told["implementation"]), (int(told["version"][0]), int(told["version"][1]))
        base, prefix = Path(told["base_prefix"]).resolve(), Path(told["prefix"]).resolve()
        library = _library_dir(told["library"], base)
        executable = _executable(told["candidates"], base, version)
        folders = [Path(folder).resolve().relative_to(prefix) for folder in told["site_packages"]]
    except (OSError, subprocess.SubprocessError, LookupError, TypeError, ValueError) as exc:
        raise EnvironmentBuildError(tag, f"its interpreter {python} does not describe itself: {exc}") from exc
    if name != "cpython" or version < _OLDEST:
        found, least = "{} {}.{}".format(name, *version), "CPython {}.{}".format(*_OLDEST)
        raise InvalidArgument("python", python, f"it is {found}; pass {least} or newer")
    return {
        "format": _FORMAT,
        "executable": str(executable),
        "base_prefix": str(base),
        "version": version,
        "site_packages": list(dict.fromkeys(map(str, folders))),
        "shared_library_dir": None if library is None else str(library),
    }


def _check_contents(tag: str, environment: Environment) -> None:
    """Refuse what would only fail later, inside.

    Raises:
        EnvironmentBuildError: uv was configured to install elsewhere, or a package is a link to its source folder.
    """
    if not environment.has("IPython"):
        raise EnvironmentBuildError(tag, "uv did not install into it; look at uv's settings (uv.toml, UV_* variables)")
    for folder in environment.site_packages:
        for origin in folder.glob("*.dist-info/direct_url.json"):  # PEP 610
            told = json.loads(origin.read_bytes())
            if told.get("dir_info", {}).get("editable"):
                name = origin.parent.name.partition("-")[0]
                problem = f"{name} is an editable install, whose source would not be shown inside; list it without -e"
                raise EnvironmentBuildError(tag, problem)


def _let_others_read(folder: Path) -> None:
    """Add read permission for everybody: a wheel, or uv's cache under a strict umask, may keep it from others."""
    for path in (folder, *folder.rglob("*")):
        mode = path.lstat().st_mode
        readable = mode | 0o444 | (0o111 if mode & 0o100 else 0)
        if mode != readable and not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(readable))


def _publish(draft: Path, final: Path) -> None:
    """Put `draft` in the place of `final`; the old one, if any, then lies at `draft`."""
    try:
        draft.rename(final)
    except OSError as exc:
        if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    else:
        return
    try:
        _exchange(draft, final)
    except OSError as exc:
        if exc.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        spare = _beside(final.parent, final.name)
        final.rename(spare)
        try:
            draft.rename(final)
        except BaseException:
            spare.rename(final)
            raise
        spare.rename(draft)


def _exchange(one: Path, other: Path) -> None:
    """Swap two paths of one file system in one step: renameat2(2), for which the standard library has no name.

    Raises:
        OSError: ENOSYS or EINVAL where the C library, the kernel or the file system has no such thing.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(other))
    at_fdcwd, rename_exchange = -100, 2  # linux/fcntl.h, linux/fs.h
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def _remove(path: Path) -> None:
    """Remove whatever is at `path`. What cannot be removed is tried again by the next build of the tag."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)

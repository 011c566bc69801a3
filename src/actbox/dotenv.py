"""Variables from a `.env` file, by the library python-dotenv, with what it lets pass as a warning made an error."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any, TextIO

import dotenv
from dotenv.parser import parse_stream

from actbox.errors import DotenvError, InvalidArgument

__all__ = ["dotenv_variables"]

_log = logging.getLogger("actbox.dotenv")

_DEFAULT_PATH = Path(".env")
_OPTIONS = {"encoding": "utf-8", "interpolate": True, "override": False, "stream": None, "verbose": False}


def dotenv_variables(dotenv_path: Path = _DEFAULT_PATH, export: bool = True, **kwargs: Any) -> dict[str, str]:  # noqa: FBT001, FBT002
    """Read a `.env` file and return its variables; names without a value (`FOO` alone) are left out.

    Args:
        dotenv_path: the file, by default `.env` in the current directory. The default may be missing: then there are
            no variables.
        export: also put the variables into `os.environ` of this process, the host. All are put there or none.
        kwargs: options of python-dotenv. `encoding` (default "utf-8"); `interpolate`, whether `${NAME}` is replaced
            (default True); `override`, whether the export replaces variables that exist (default False); `stream`, an
            open text file to read instead of `dotenv_path`; `verbose`, whether a missing `.env` is logged (default
            False).

    Raises:
        DotenvError: the file is missing (other than the default), a folder, unreadable, not text in the encoding, or a
            line is malformed: it names the file and the line, and repeats nothing of the content, which is secret.
        InvalidArgument: an unknown option or encoding, or both a file and a stream.
    """
    if not isinstance(dotenv_path, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance] - None was once
        raise InvalidArgument("dotenv_path", dotenv_path, "pass the path of a file; to read elsewhere, use stream=")
    path = Path(dotenv_path)  # a string will do, too
    for name in kwargs.keys() - _OPTIONS.keys():
        raise InvalidArgument(name, kwargs[name], f"no such option; python-dotenv's are {', '.join(_OPTIONS)}")
    options: dict[str, Any] = {**_OPTIONS, **kwargs}
    if options["stream"] is None:
        text = _read_file(path, options["encoding"] or "utf-8", verbose=options["verbose"])
    elif path == _DEFAULT_PATH:
        path = Path("<stream>")
        text = _read_stream(path, options["stream"])
    else:
        raise InvalidArgument("stream", options["stream"], "pass either dotenv_path or stream, not both")

    lines = _check_lines(path, text)
    found = dotenv.dotenv_values(stream=io.StringIO(text), interpolate=options["interpolate"])
    variables = {name: value for name, value in found.items() if value is not None}
    for name, value in variables.items():
        if not _fits_environment(name, value):
            raise _at(path, lines[name], "it cannot be an environment variable (a NUL, or a '=' in the name)")
    if export:
        # Not `os.environ.update(variables)`: where the export does not override, `${NAME}` is to mean the same as in
        # the environment exported to. And the library's own switch PYTHON_DOTENV_DISABLED is to work.
        interpolate, override = options["interpolate"], options["override"]
        dotenv.load_dotenv(stream=io.StringIO(text), interpolate=interpolate, override=override)
    return variables


def _read_file(path: Path, encoding: str, *, verbose: bool) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as exc:
        if path == _DEFAULT_PATH and not path.is_symlink():
            if verbose:
                _log.info("there is no %s in %s", path, Path.cwd())
            return ""
        raise DotenvError(path, "the file does not exist; make it, or pass the path of another") from exc
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the path
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise DotenvError(path, f"it cannot be read ({reason}); pass the path of a readable file") from exc
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise _at(
            path, line, f"it is not {encoding}; save the file so, or pass encoding="
        ) from None  # exc holds it all
    except (LookupError, TypeError) as exc:
        raise InvalidArgument("encoding", encoding, "pass the name of a text encoding, such as utf-8") from exc
    # As a file opened as text would give it: universal newlines.
    return io.StringIO(text.removeprefix("\ufeff"), newline=None).read()


def _read_stream(path: Path, stream: TextIO) -> str:
    try:
        return "".join(stream.read())  # fails on bytes
    except (OSError, ValueError, TypeError, AttributeError) as exc:
        raise DotenvError(path, f"it cannot be read as text ({type(exc).__name__})") from None


def _check_lines(path: Path, text: str) -> dict[str, int]:
    """The line of each name, from 1. The library would skip what it cannot parse, and log a warning."""
    lines: dict[str, int] = {}
    for binding in parse_stream(io.StringIO(text)):
        # A statement's text begins with the blank lines before it.
        source = binding.original.string
        line = binding.original.line + source[: len(source) - len(source.lstrip())].count("\n")
        if binding.error:
            raise _at(path, line, "it is not NAME=value, a comment or empty (is a quote left open?)")
        if binding.key is not None:
            lines[binding.key] = line
    return lines


def _fits_environment(name: str, value: str) -> bool:
    try:
        os.fsencode(name + value)
    except UnicodeEncodeError:
        return False
    return "=" not in name and "\0" not in name + value


def _at(path: Path, line: int, problem: str) -> DotenvError:
    return DotenvError(path, f"line {line}: {problem}", line)

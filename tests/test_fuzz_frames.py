"""G19: a bounded run of the fuzzer; `make fuzz` runs it for longer."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import lacking

FUZZER = Path(__file__).with_name("fuzz_frames.py")
# Lets every message end in an error that nobody foresaw.
BROKEN = """
import sys
sys.path.insert(0, {folder!r})
import fuzz_frames
fuzz_frames.messages.decode = lambda frame: 1 // 0
sys.exit(fuzz_frames.main())
"""

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def fuzzer() -> None:
    """Wheels of it are there for some interpreters alone."""
    if importlib.util.find_spec("atheris") is not None:
        return
    has_wheels = platform.machine() == "x86_64" and sys.implementation.name == "cpython" and sys.version_info < (3, 15)
    if not has_wheels:
        pytest.skip(f"atheris has no wheel for {platform.python_version()} on {platform.machine()}")
    lacking("needs the dependency group 'fuzz'")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, errors="replace", check=False)


def test_nothing_but_typed_errors_comes_of_any_bytes() -> None:
    """G19: a hundred thousand runs or eight seconds, whichever is shorter."""
    done = run(str(FUZZER), "--seconds", "8", "--runs", "100000")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None
    assert int(runs[1]) > 1000


def test_an_error_that_nobody_foresaw_is_found_and_shown() -> None:
    """G19."""
    done = run("-c", BROKEN.format(folder=str(FUZZER.parent)), "--seconds", "8")
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stdout + done.stderr
    assert "crash-" in done.stdout

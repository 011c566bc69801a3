"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

import actbox
import actbox.executor

README = (Path(__file__).parent.parent / "README.md").read_text()
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SECONDS = 60


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(SECONDS)
def test_the_first_example_prints_what_the_readme_says(tmp_path: Path, default_engine: str) -> None:
    (language, code), (_, output) = FENCED[:2]
    assert language == "python"
    expected = {output}
    if default_engine == "docker":
        # The image may have such a file, which its root alone may read.
        absent = "FileNotFoundError: [Errno 2] No such file or directory"
        assert absent in output
        expected.add(output.replace(absent, "PermissionError: [Errno 13] Permission denied"))
    assert run(code, tmp_path) in expected
    assert (tmp_path / "logs" / "agent.log").exists()
    assert (tmp_path / "logs" / "agent.jsonl").exists()


@pytest.mark.usefixtures("default_engine")
@pytest.mark.timeout(SECONDS)
def test_the_longer_example_runs(tmp_path: Path) -> None:
    language, code = next(block for block in FENCED[2:] if block[0] == "python")
    assert language == "python"
    imports, body = code.split("\n\n", 1)
    wrapped = f"import asyncio\n{imports}\n\nasync def main():\n{indent(body, '    ')}\n\nasyncio.run(main())\n"
    lines = run(wrapped, tmp_path).splitlines()
    assert lines[:3] == ["0", "1", "2"]
    assert Path(lines[3]).is_relative_to(tmp_path / "workspace" / "images" / "agent-1")
    assert Path(lines[3]).read_bytes().startswith(b"\x89PNG")
    assert lines[4] == "True"


REFERENCE = """
import asyncio
from pathlib import Path
from actbox.executor import CodeExecutionContainer, CodeExecutor

async def main():
    async with CodeExecutionContainer(tag="default", workspace_path=Path("workspace")) as container:
        async with CodeExecutor(key="agent-1", workspace=container.workspace, port=container.port) as executor:
            result = await executor.execute("print('Hello')")
            print(result.text)

asyncio.run(main())
"""


@pytest.mark.usefixtures("default_engine")
@pytest.mark.timeout(SECONDS)
def test_the_ancestors_reference_example_runs_with_the_import_and_the_tag_changed(tmp_path: Path) -> None:
    assert run(REFERENCE, tmp_path) == "Hello\n"


@pytest.mark.usefixtures("default_engine")
@pytest.mark.timeout(SECONDS)
def test_an_environment_needs_no_argument(tmp_path: Path) -> None:
    code = (
        "import asyncio\nfrom actbox import execution_environment\n"
        "async def main():\n"
        "    async with execution_environment() as environment:\n"
        "        print(type(environment.container).__name__, environment.executor.key, environment.logger.file)\n"
        "asyncio.run(main())"
    )
    assert run(code, tmp_path) == f"CodeExecutionContainer default {tmp_path / 'logs' / 'agent.log'}\n"


@pytest.mark.parametrize(
    "name",
    [
        "Workspace",
        "CodeExecutionContainer",
        "CodeExecutor",
        "CodeExecutionEnvironment",
        "dotenv_variables",
        "execution_environment",
    ],
)
def test_the_six_names_are_in_both_places(name: str) -> None:
    assert getattr(actbox, name) is getattr(actbox.executor, name)


def test_every_public_name_is_there() -> None:
    assert all(hasattr(actbox, name) for name in actbox.__all__)

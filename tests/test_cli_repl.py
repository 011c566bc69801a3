"""`actbox repl` on the real engine, in a pipe and at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commands import NEITHER, SHOW_IMAGE, all_end, one_engine

from actbox.cli import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from commands import Cli, Running


def test_the_repl_runs_what_comes_through_a_pipe(cli: Cli) -> None:
    done = cli("repl", stdin="x=1\nx+1\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Out[2]: 2\n", "")


@one_engine
def test_the_repl_gathers_lines_until_they_are_complete(cli: Cli) -> None:
    code = "for i in range(2):\n    print(i)\n\ndef f(\n  a,\n):\n  return a\n\nf(\n'x'\n)\n%%bash\necho hi\n\n"
    code += "'''a\n\nb'''"
    done = cli("repl", stdin=code)
    assert done.stdout == "0\n1\nOut[3]: 'x'\nhi\nOut[5]: 'a\\n\\nb'\n"


def test_the_repl_goes_on_after_errors_and_deaths(cli: Cli) -> None:
    done = cli("repl", stdin="x = 1\n1 / 0\nx\nif\nimport os; os._exit(3)\n'x' in globals()\n")
    assert done.returncode == 0
    assert done.stdout == "Out[3]: 1\nOut[1]: False\n"
    assert "ZeroDivisionError" in done.stderr
    assert "SyntaxError" in done.stderr
    assert "actbox: the kernel died: exited with code 3" in done.stderr
    assert "begins without the session's state" in done.stderr


@one_engine
def test_the_repl_never_runs_code_on_this_side(cli: Cli, tmp_path: Path) -> None:
    done = cli("repl", stdin=f"!touch {tmp_path}/made\nopen('{tmp_path}/made', 'w')\nbreakpoint\n")
    assert done.returncode == 0
    assert not (tmp_path / "made").exists()


@one_engine
def test_the_repl_leaves_at_exit(cli: Cli) -> None:
    done = cli("repl", stdin="1\nexit\n2\n")
    assert (done.returncode, done.stdout) == (0, "Out[1]: 1\n")


@one_engine
def test_the_repl_bounds_cells_when_asked(cli: Cli) -> None:
    done = cli("repl", "--timeout", "0.3", stdin="x = 5\nwhile True: pass\n\nx\n")
    assert (done.returncode, done.stdout) == (0, "Out[3]: 5\n")
    assert "did not end within 0.3 s" in done.stderr


def test_the_repl_ends_with_8_where_no_sandbox_can_be_built(cli: Cli) -> None:
    assert cli("repl", stdin="1\n", **NEITHER).returncode == ExitCode.UNAVAILABLE


def test_the_repl_at_a_terminal_prompts_interrupts_and_leaves(begin: Callable[..., Running]) -> None:
    running = begin("repl", terminal=True)
    running.until(b"In [1]:")
    running.type("6 * 7\r")
    running.until(b"Out[1]: 42\r\n")
    running.until(b"In [2]:")
    # Pasted, as terminals mark it; the block is ended by an empty line.
    running.type("\x1b[200~print('ru' + 'ns')\nwhile True: pass\x1b[201~\r\r")
    running.until(b"runs\r\n")
    running.type("\x03")
    running.until(b"actbox: the cell was interrupted")
    running.until(b"In [3]:")
    running.type("print('a\\x1b[2Jb', end='')\r")
    assert b"ab\r\n" in running.until(b"In [4]:")
    running.type("abandoned\x03")
    running.until(b"In [4]:")
    running.type("import os; os._exit(1)\r")
    running.until(b"actbox: the kernel died")
    running.until(b"In [1]:")
    running.type(f"{SHOW_IMAGE}\r")
    running.until(b"image: ")
    running.until(b"In [2]:")
    running.type("\x04")
    assert running.end() == 0


def test_a_signal_at_the_prompt_leaves(begin: Callable[..., Running]) -> None:
    running = begin("repl", terminal=True)
    running.until(b"In [1]:")
    pidfds = running.descendants()
    running.process.terminate()
    assert running.end() == 143
    assert all_end(pidfds)

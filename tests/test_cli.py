"""`actbox run` on the real engine, in a pipe and at a terminal: what it shows, how it ends, and what drives nothing."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import BOUND, COMMAND, NEITHER, PNG, SAID, SHOW_IMAGE, all_end, one_engine

from actbox import SandboxUnavailable, __version__
from actbox.cli import ExitCode, main

if TYPE_CHECKING:
    from collections.abc import Callable

    from commands import Cli, Running

TITLE_CLEAR_CLIPBOARD = "\x1b]0;title\x07 \x1b[2J \x1b]52;c;ZXZpbA==\x07"
HOSTILE = f"{TITLE_CLEAR_CLIPBOARD} \x1b]8;;http://e\x07 \x1b[6n \x9b31m \u202eback \x1b[31mred one\rtwo"
# The last, since it reaches to the end of its line.
UNENDED = "\x90q"


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_output_goes_where_the_code_printed_it(cli: Cli) -> None:
    done = cli("run", "-c", "import sys; print('out'); print('err', file=sys.stderr); 6 * 7")
    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.FINISHED, "out\n42\n", "err\n")


@one_engine
def test_unfinished_lines_are_passed_on_as_they_are(cli: Cli) -> None:
    done = cli("run", "-c", "print('no newline', end='')")
    assert (done.stdout, done.stderr) == ("no newline", "")


@one_engine
def test_a_display_stands_on_a_line_of_its_own(cli: Cli) -> None:
    done = cli("run", "-c", "print('a', end=''); display('b'); print('c', end=''); 'd'")
    assert done.stdout == "a\n'b'\nc\n'd'\n"


@one_engine
def test_a_display_without_text_is_named_by_its_formats(cli: Cli) -> None:
    done = cli("run", "-c", "display({'text/html': '<b>x</b>', 'x/\\x1b[2J': 'y'}, raw=True)")
    assert done.stdout == "[text/html, x/]\n"


@one_engine
def test_code_comes_from_a_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("\ufeffprint('größe')\n", "utf-8")
    assert cli("run", str(file)).stdout == "größe\n"


@one_engine
def test_code_comes_from_standard_input(cli: Cli) -> None:
    done = cli("run", "-", stdin="x = 20\nprint(x + 1)\n")
    assert (done.returncode, done.stdout) == (ExitCode.FINISHED, "21\n")


def test_output_comes_as_it_is_printed(begin: Callable[..., Running]) -> None:
    running = begin("run", "-c", "print('first'); import threading; threading.Event().wait()")
    running.until(b"first\n")
    running.process.send_signal(signal.SIGINT)
    assert running.end() == ExitCode.INTERRUPTED


def test_images_are_saved_and_listed(cli: Cli, workspace_path: Path) -> None:
    done = cli("run", "--key", "painter", "-c", SHOW_IMAGE)
    assert done.stdout == "a picture\n"
    listed = re.fullmatch(r"image: (.*)\n", done.stderr)
    assert listed
    assert Path(listed[1]).parent == workspace_path / "images" / "painter"
    assert Path(listed[1]).read_bytes() == base64.b64decode(PNG)


def test_nothing_of_the_environment_is_passed_in_unasked(cli: Cli) -> None:
    done = cli("run", "-c", "import os; print(os.environ.get('SECRET'))", SECRET="hidden")
    assert done.stdout == "None\n"


def test_an_env_file_gives_the_session_its_variables(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "some.env"
    file.write_text("TOKEN=abc\n")
    done = cli("run", "--env-file", str(file), "-c", "import os; print(os.environ['TOKEN'])")
    assert done.stdout == "abc\n"


def test_skills_are_importable(cli: Cli, workspace_path: Path) -> None:
    skill = workspace_path / "skills" / "private" / "default" / "greet.py"
    skill.parent.mkdir(parents=True)
    skill.write_text("def hello(): return 'hello'\n")
    assert cli("run", "-c", "import greet; print(greet.hello())").stdout == "hello\n"


# -- how it ends -----------------------------------------------------------------------------------------------------


def test_the_codes_own_error_is_1_with_a_plain_traceback(cli: Cli) -> None:
    done = cli("run", "-c", "print('before'); 1 / 0")
    assert (done.returncode, done.stdout) == (ExitCode.ERROR, "before\n")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "Traceback" in done.stderr
    assert "\x1b" not in done.stderr


def ends_with_a_line(
    capfd: pytest.CaptureFixture[str], workspace: Path, arguments: list[str], code: ExitCode, words: str
) -> None:
    assert main(["run", "--workspace", str(workspace), *arguments]) == code
    told = capfd.readouterr()
    assert told.out == ""
    assert words in told.err.splitlines()[-1]
    assert told.err.splitlines()[-1].startswith("actbox: ")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-c", "while True: pass", "--timeout", "0.3"], ExitCode.TIMED_OUT, "did not end within 0.3 s"),
        (["-c", "import os; os._exit(7)"], ExitCode.DIED, "exited with code 7"),
        (["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], ExitCode.DIED, "SIGKILL"),
        (["-c", "1", "--key", "../up"], ExitCode.USAGE, "key='../up'"),
    ],
)
@pytest.mark.usefixtures("default_engine")
def test_each_bad_end_has_its_code_and_one_line(
    capfd: pytest.CaptureFixture[str], workspace_path: Path, arguments: list[str], code: ExitCode, words: str
) -> None:
    ends_with_a_line(capfd, workspace_path, arguments, code, words)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-c", "1", "--tag", "NO TAG"], ExitCode.USAGE, "tag='NO TAG'"),
        (["-c", "1", "--engine", "steam"], ExitCode.USAGE, "engine='steam'"),
        (["-c", "1", "--engine", "bubblewrap", "--runtime", "runsc"], ExitCode.USAGE, "runtime='runsc'"),
        (["-c", "1", "--env-file", "/nonexistent.env"], ExitCode.USAGE, "nonexistent.env"),
        (["/nonexistent.py"], ExitCode.USAGE, "No such file"),
        (["/"], ExitCode.USAGE, "Is a directory"),
        (["a\0b"], ExitCode.USAGE, "null byte"),
        (
            ["-c", "1", "--engine", "bubblewrap", "--tag", "never-built"],
            ExitCode.UNAVAILABLE,
            "actbox build -t never-built",
        ),
    ],
)
def test_what_cannot_begin_has_its_code_and_one_line(
    capfd: pytest.CaptureFixture[str], workspace_path: Path, arguments: list[str], code: ExitCode, words: str
) -> None:
    ends_with_a_line(capfd, workspace_path, arguments, code, words)


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "-c", "1", "file"], ["run", "-c", "1", "--timeout", "nan"]])
def test_a_wrong_command_line_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == ExitCode.USAGE
    assert "usage: actbox" in capsys.readouterr().err


def test_a_missing_env_file_of_the_default_name_is_told_too(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "-c", "1", "--env-file", ".env"]) == ExitCode.USAGE
    assert "does not exist" in capfd.readouterr().err


def test_code_that_is_not_utf8_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "latin.py"
    file.write_bytes(b"print('gr\xfc\xdfe')")
    assert main(["run", str(file)]) == ExitCode.USAGE
    assert main(["run", "-c", "print('\udcfc')"]) == ExitCode.USAGE
    assert capfd.readouterr().err.count("it is not UTF-8") == 2


def test_a_sandbox_that_cannot_be_built_is_8(cli: Cli, engine: str) -> None:
    done = cli("run", "-c", "print('ran')", **NEITHER)
    assert (done.returncode, done.stdout) == (ExitCode.UNAVAILABLE, "")
    assert done.stderr.startswith(f"actbox: the sandbox cannot be built: {engine}: {SAID[engine]}")


@pytest.mark.engines("bubblewrap")
def test_a_lower_limit_of_the_hosts_is_kept(workspace_path: Path, environ: dict[str, str]) -> None:
    limited = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)); "
        "os.execv(sys.executable, [sys.executable, '-m', 'actbox', *sys.argv[1:]])"
    )
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    done = subprocess.run(
        [sys.executable, "-c", limited, "run", "--workspace", str(workspace_path), "-c", code],
        env=environ,
        timeout=BOUND,
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.stdout, done.stderr) == ("(200, 200)\n", "")


def test_a_workspace_that_is_a_file_is_9(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["run", "--workspace", str(file), "-c", "1"]) == ExitCode.HOST
    assert "actbox: " in capfd.readouterr().err


@pytest.mark.usefixtures("default_engine")
def test_a_guest_that_breaks_the_wire_is_7(capfd: pytest.CaptureFixture[str], workspace_path: Path) -> None:
    garbage = (
        "import os, socket, stat\n"
        "for fd in range(3, 1024):\n"
        "    try:\n"
        "        if stat.S_ISSOCK(os.fstat(fd).st_mode): os.write(fd, b'\\xff' * 4096)\n"
        "    except OSError: pass\n"
        "while True: pass"
    )
    assert main(["run", "--workspace", str(workspace_path), "-c", garbage]) == ExitCode.VIOLATION
    assert "broke the rules of the wire" in capfd.readouterr().err


def test_a_container_that_is_killed_is_6(begin: Callable[..., Running]) -> None:
    running = begin("run", "-c", "print('runs'); import threading; threading.Event().wait()")
    running.until(b"runs")
    pidfds = running.descendants()
    for fd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    assert running.end() == ExitCode.LOST
    assert b"actbox: the container is gone" in running.output
    assert all_end(pidfds)


# -- signals and pipes -----------------------------------------------------------------------------------------------

ENDLESS = "print('runs', flush=True)\nwhile True: pass"


def test_ctrl_c_interrupts_the_code_and_leaves_no_process(begin: Callable[..., Running]) -> None:
    running = begin("run", "-c", ENDLESS)
    running.until(b"runs")
    pidfds = running.descendants()
    assert pidfds
    running.process.send_signal(signal.SIGINT)
    assert running.end() == ExitCode.INTERRUPTED
    assert b"KeyboardInterrupt" in running.output
    assert b"actbox: the cell was interrupted" in running.output
    assert all_end(pidfds)


def test_ctrl_c_at_a_terminal_does_the_same(begin: Callable[..., Running]) -> None:
    running = begin("run", "-c", ENDLESS, terminal=True)
    running.until(b"runs")
    running.type("\x03")
    assert running.end() == ExitCode.INTERRUPTED
    assert b"actbox: the cell was interrupted" in running.output


def test_a_second_ctrl_c_leaves_code_that_ignores_the_first(begin: Callable[..., Running]) -> None:
    ignores = (
        "while True:\n    try:\n        print('runs', flush=True)\n        while True: pass\n"
        "    except KeyboardInterrupt: pass"
    )
    running = begin("run", "-c", ignores)
    running.until(b"runs")
    pidfds = running.descendants()
    running.process.send_signal(signal.SIGINT)
    running.until(b"runs")
    running.process.send_signal(signal.SIGINT)
    assert running.end() == ExitCode.INTERRUPTED
    assert all_end(pidfds)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_close_the_sandbox(begin: Callable[..., Running], number: signal.Signals, code: int) -> None:
    running = begin("run", "-c", ENDLESS)
    running.until(b"runs")
    pidfds = running.descendants()
    running.process.send_signal(number)
    assert running.end() == code
    assert b"Traceback" not in running.output
    assert all_end(pidfds)


def test_a_run_that_is_terminated_is_written_to_its_notebook(begin: Callable[..., Running], tmp_path: Path) -> None:
    file = tmp_path / "out.ipynb"
    running = begin("run", "--notebook", str(file), "-c", ENDLESS)
    running.until(b"runs")
    running.process.terminate()
    assert running.end() == 143
    (cell,) = json.loads(file.read_text("utf-8"))["cells"]
    assert cell["source"] == ENDLESS
    assert cell["outputs"][0]["text"].startswith("runs")


def test_a_reader_that_stops_reading_does_not_keep_a_signal_from_working(begin: Callable[..., Running]) -> None:
    running = begin("run", "-c", "print('runs')\nwhile True: print('x' * 1000)")
    running.until(b"runs")
    pidfds = running.descendants()
    # The pipe is full soon; nobody reads on.
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(BOUND) == 143
    assert all_end(pidfds)


@one_engine
def test_a_closed_output_ends_the_command_without_a_word(tmp_path: Path, environ: dict[str, str]) -> None:
    errors = tmp_path / "errors"
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, "run", "--workspace", str(tmp_path / "workspace"), "-c", "while True: print('line')"],
            stdout=subprocess.PIPE,
            stderr=file,
            env=environ,
        )
        assert process.stdout
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.wait(BOUND) == 128 + signal.SIGPIPE
    assert errors.read_bytes() == b""


@one_engine
def test_closed_standard_streams_do_no_harm(workspace_path: Path, environ: dict[str, str]) -> None:
    script = f'exec "{sys.executable}" -m actbox run --workspace "{workspace_path}" -c "print(1)" <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", script], env=environ, timeout=BOUND, check=False).returncode == 0


@one_engine
def test_a_full_disk_is_told(workspace_path: Path, environ: dict[str, str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "run", "--workspace", str(workspace_path), "-c", "print(1)"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=BOUND,
            check=False,
            env=environ,
        )
    assert (done.returncode, done.stderr) == (ExitCode.HOST, b"actbox: [Errno 28] No space left on device\n")


# -- hostile text ----------------------------------------------------------------------------------------------------

PRINT_ALL = f"""
import sys
text = {HOSTILE!a}
print(text, {UNENDED!a})
print(text, {UNENDED!a}, file=sys.stderr)
sys.stdout.buffer.write(text.encode() + b"\\n")
class Shown:
    def __repr__(self): return text
display(Shown())
display({{'text/plain': text, text: text}}, raw=True)
for letter in text: print(letter, end='', flush=True)
print()
raise type(text, (Exception,), {{}})(text)
"""
SGR = re.compile(rb"\x1b\[[0-9;]{0,64}m")


def assert_harmless(output: bytes) -> None:
    text = output.decode()
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", text), repr(text)
    assert "title" not in text
    assert "ZXZpbA" not in text
    assert "red one" in text


@one_engine
def test_escape_sequences_from_inside_do_not_come_out(cli: Cli) -> None:
    """F5, F6."""
    done = cli("run", "-c", PRINT_ALL)
    assert done.returncode == ExitCode.ERROR
    assert "\r" not in done.stdout + done.stderr
    assert_harmless(done.stdout.encode())
    assert_harmless(done.stderr.encode())
    assert "\\u202eback" in done.stdout


@one_engine
def test_at_a_terminal_only_colors_of_a_traceback_come_out(begin: Callable[..., Running]) -> None:
    """F6."""
    running = begin("run", "-c", PRINT_ALL, terminal=True)
    assert running.end() == ExitCode.ERROR
    # A terminal makes "\r\n" of each newline; the only other "\r" are of the line that says what is waited for.
    waiting, _, shown = running.output.replace(b"\r\n", b"\n").rpartition(b"\r")
    assert waiting.startswith(b"\ractbox: starting...\r")
    assert SGR.search(shown)
    assert_harmless(SGR.sub(b"", shown))


@one_engine
def test_no_color_is_respected(begin: Callable[..., Running]) -> None:
    running = begin("run", "-c", "1 / 0", terminal=True, NO_COLOR="1")
    assert running.end() == ExitCode.ERROR
    assert b"ZeroDivisionError" in running.output
    assert b"\x1b" not in running.output


@one_engine
def test_what_is_waited_for_is_shown_and_taken_back_at_a_terminal(begin: Callable[..., Running]) -> None:
    running = begin("run", "-c", "print('done')", terminal=True)
    assert running.end() == ExitCode.FINISHED
    assert re.fullmatch(rb"\ractbox: starting\.\.\.\r {19,}\r+done\r\n", running.output), running.output


# -- JSON ------------------------------------------------------------------------------------------------------------

FIELDS = {
    *("outcome", "message", "text", "images", "outputs", "error", "state_kept", "signal", "exit_code"),
    *("memory_limit", "execution_count", "duration", "restarted", "truncated", "limit"),
}


def one_document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout.isascii()
    assert done.stdout.endswith("\n")
    assert done.stdout[:-1].isprintable()
    document = json.loads(done.stdout, parse_constant=pytest.fail)
    assert document.keys() == FIELDS
    return document


def test_json_holds_a_result_whole(cli: Cli) -> None:
    done = cli("run", "--json", "-c", f"print('größe\\x1b[2J\\x7f')\n{SHOW_IMAGE}\n6 * 7")
    document = one_document(done)
    assert (done.returncode, document["outcome"], document["message"]) == (ExitCode.FINISHED, "finished", None)
    assert document["text"] == "größe\x1b[2J\x7f\na picture\n42"
    assert [output["kind"] for output in document["outputs"]] == ["stream", "display_data", "execute_result"]
    assert document["outputs"][1]["data"] == {"image/png": PNG, "text/plain": "a picture"}
    assert document["outputs"][1]["base64"] == ["image/png"]
    assert document["images"][0]["mime_type"] == "image/png"
    assert Path(document["images"][0]["path"]).is_file()
    assert document["state_kept"] is True
    assert document["execution_count"] == 1
    assert 0 < document["duration"] < BOUND
    assert not document["restarted"]
    assert not document["truncated"]


@one_engine
def test_json_tells_of_an_error(cli: Cli) -> None:
    done = cli("run", "--json", "-c", "print('before'); raise ValueError('bad\\x1b[2J')")
    document = one_document(done)
    assert (done.returncode, document["outcome"], document["text"]) == (ExitCode.ERROR, "error", "before")
    assert document["error"]["name"] == "ValueError"
    assert document["error"]["value"] == "bad\x1b[2J"
    assert "Traceback" in document["error"]["trace"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "facts"),
    [
        (["-c", "import os; os._exit(7)"], 5, {"outcome": "died", "exit_code": 7, "signal": None, "state_kept": False}),
        (["-c", "import os; os.kill(os.getpid(), 9)"], 5, {"outcome": "died", "exit_code": None, "signal": 9}),
        (["-c", "while True: pass", "--timeout", "0.3"], 4, {"outcome": "timed_out", "state_kept": True}),
        (
            ["-c", "1", "--engine", "bubblewrap", "--tag", "never-built"],
            8,
            {"outcome": "unavailable", "text": None, "outputs": []},
        ),
        (["-c", "print('x' * 3_000_000)"], 0, {"outcome": "finished", "truncated": True}),
    ],
)
def test_json_tells_how_it_ended(cli: Cli, arguments: list[str], code: int, facts: dict[str, object]) -> None:
    done = cli("run", "--json", *arguments)
    document = one_document(done)
    assert done.returncode == code
    assert {name: document[name] for name in facts} == facts


@one_engine
@pytest.mark.parametrize("body", ["[1e999, -1e999]", *("[" * depth + "]" * depth for depth in (200, 400, 480, 900))])
def test_json_is_json_whatever_the_guest_displays(cli: Cli, body: str) -> None:
    # The guest's own encoder refuses most of it: what is sent is made by hand, as a hostile guest would.
    """F6."""
    display = (
        "from actbox_guest.guest import shell\n"
        f"body = {body!r}.encode()\n"
        "header = {'type': 'display_data', 'parts': [['application/json', 'json', len(body)]], 'metadata': {}}\n"
        "shell.outputs.send(header, body)\n"
    )
    document = one_document(cli("run", "--json", "-c", display))
    assert document["outcome"] in ("finished", "protocol_violation")


def test_ctrl_c_still_gives_a_document(begin: Callable[..., Running], workspace_path: Path) -> None:
    fifo = workspace_path / "skills" / "private" / "default" / "fifo"
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        running = begin("run", "--json", "-c", "with open('fifo', 'w') as file: file.write('runs')\nwhile True: pass")
        assert reading in select.select([reading, running.reading], [], [], BOUND)[0], running.output
    finally:
        os.close(reading)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == ExitCode.INTERRUPTED
    document = json.loads(running.output)
    assert (document["outcome"], document["state_kept"]) == ("interrupted", True)
    assert document["error"]["name"] == "KeyboardInterrupt"


# -- the rest --------------------------------------------------------------------------------------------------------


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"actbox {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_the_help_lists_every_exit_code(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    helped = capsys.readouterr().out
    for code in ExitCode:
        assert re.search(rf"^  {code.value}  ", helped, re.MULTILINE)


def test_what_the_host_says_of_a_failure_is_one_harmless_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], workspace_path: Path
) -> None:
    """F6, G18."""

    async def fail(*_: object) -> None:
        raise SandboxUnavailable("layer", "said \x1b]0;t\x07\nmuch", "Mend it.")

    monkeypatch.setattr("actbox.CodeExecutionContainer.run", fail)
    assert main(["run", "--workspace", str(workspace_path), "-c", "1"]) == ExitCode.UNAVAILABLE
    assert capfd.readouterr().err == "actbox: the sandbox cannot be built: layer: said much. Mend it.\n"

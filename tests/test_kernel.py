"""Inside a session: IPython as people know it, outputs in order, whatever a cell does to its own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from actbox import ExecutionError, ExecutionInterrupted, ExecutionResult, ExecutionTimeout, Output
from actbox.events import ClearOutput, DisplayData, Event, Interrupted, UpdateDisplayData
from actbox.result import strip_ansi

if TYPE_CHECKING:
    from pathlib import Path

    from actbox import CodeExecutionContainer, CodeExecutor

pytestmark = pytest.mark.anyio

SECONDS = 10.0


async def run(executor: CodeExecutor, code: str) -> ExecutionResult:
    return await executor.execute(textwrap.dedent(code).strip("\n"), timeout=SECONDS)


async def text_of(executor: CodeExecutor, code: str) -> str | None:
    return (await run(executor, code)).text


async def failure_of(executor: CodeExecutor, code: str) -> ExecutionError:
    with pytest.raises(ExecutionError) as caught:
        await run(executor, code)
    assert type(caught.value) is ExecutionError
    assert caught.value.state_kept
    return caught.value


async def events_of(executor: CodeExecutor, code: str) -> list[Event]:
    execution = await executor.submit(textwrap.dedent(code).strip("\n"))
    return [event async for event in execution.events(SECONDS)]


def only(outputs: list[Output], kind: str) -> Output:
    found = [output for output in outputs if output.kind == kind]
    assert len(found) == 1, outputs
    return found[0]


def edit(path: Path, source: str) -> None:
    """Write a file so that its time differs from before, however coarse the file system's clock is."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(textwrap.dedent(source))
    if path.stat().st_mtime_ns <= before:
        os.utime(path, ns=(before + 10_000_000, before + 10_000_000))


# -- expressions, display, MIME types --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 + 1", "2"),
        ("'text'", "'text'"),
        ("1 + 1;", None),
        ("x = 1", None),
        ("None", None),
        ("", None),
        ("# a comment", None),
        ("   ", None),
        ("\n\n3\n\n", "3"),
        ("1\n2", "2"),
        ("if True:\n    4", None),
        ("print(1)\n2", "1\n2"),
        ("print('a', end='')\n2", "a\n2"),
        ("print('no end', end='')", "no end"),
        ("import sys; sys.stderr.write('err\\n'); None", "err"),
        ("display(1, 2)", "1\n2"),
        ("print('\\n\\n')", None),
        ("for i in range(3): print(i)", "0\n1\n2"),
        ("def f():\n    return 5\nf()", "5"),
        ("x = 1\r\nx", "1"),
        ("\tx = 2\n\tx", "2"),
    ],
)
async def test_a_cell_shows_what_it_prints_and_its_last_expression(
    executor: CodeExecutor, code: str, text: str | None
) -> None:
    assert (await executor.execute(code, timeout=SECONDS)).text == text


async def test_state_is_kept_from_cell_to_cell(executor: CodeExecutor) -> None:
    await run(executor, "import math\nx = 41\ndef up(n): return n + 1")
    assert await text_of(executor, "up(x), math.floor(2.5)") == "(42, 2)"


async def test_state_is_kept_when_a_cell_fails_half_way(executor: CodeExecutor) -> None:
    await failure_of(executor, "x = 1\n1 / 0\nx = 2")
    assert await text_of(executor, "x") == "1"


async def test_history_is_where_ipython_keeps_it(executor: CodeExecutor) -> None:
    await run(executor, "6 * 7")
    await run(executor, "'b'")
    result = await run(executor, "Out[1], _, __, _2, In[1], _i, _ih[2]")
    assert result.text == "(42, 'b', 42, 'b', '6 * 7', \"'b'\", \"'b'\")"
    assert result.execution_count == 3
    assert await text_of(executor, "%history 1-2") == "6 * 7\n'b'"


async def test_a_fresh_session_is_empty(executor: CodeExecutor) -> None:
    code = "_, __, ___, _i, _ii, _iii, dict(Out), len(In)"
    assert await text_of(executor, code) == "('', '', '', '', '', '', {}, 2)"
    names = "sorted(name for name in globals() if not name.startswith('_'))"
    assert await text_of(executor, f"set({names}) - {{'In', 'Out', 'exit', 'get_ipython', 'open', 'quit'}}") == "set()"
    assert await text_of(executor, "%history 1-1") == code
    error = await failure_of(executor, "import sys\nsys.last_value")
    assert "In[4]" in (error.trace or "")


async def test_the_last_expression_is_an_execute_result_with_its_number(executor: CodeExecutor) -> None:
    await run(executor, "1")
    result = await run(executor, "2")
    output = only(result.outputs, "execute_result")
    assert (output.execution_count, result.execution_count) == (2, 2)
    assert output.data == {"text/plain": "2"}


async def test_every_mime_type_is_kept_with_its_metadata(executor: CodeExecutor) -> None:
    result = await run(
        executor,
        r"""
        from IPython.display import publish_display_data
        publish_display_data(
            {
                "text/plain": "p\ud800",
                "text/latex": "$x$",
                "image/svg+xml": "<svg/>",
                "image/png": b"\x89PNG\r\n",
                "image/jpeg": "/9j/",
                "audio/wav": b"RIFF\x00\xff",
                "video/mp4": b"",
                "application/pdf": b"%PDF",
                "application/json": {"a": [1, 2.5, None, True, "é"]},
                "application/vnd.plotly.v1+json": {"data": []},
                "application/javascript": "1",
                "application/x-own": b"\xff\x00",
                "x-own/text": "t",
                "text/html": "<b>😀</b>",
            },
            {"image/png": {"width": 3}, "n": None},
        )
        """,
    )
    output = only(result.outputs, "display_data")
    assert output.data == {
        "text/plain": "p\\ud800",
        "text/latex": "$x$",
        "image/svg+xml": "<svg/>",
        "image/png": b"\x89PNG\r\n",
        "image/jpeg": b"\xff\xd8\xff",
        "audio/wav": b"RIFF\x00\xff",
        "video/mp4": b"",
        "application/pdf": b"%PDF",
        "application/json": {"a": [1, 2.5, None, True, "é"]},
        "application/vnd.plotly.v1+json": {"data": []},
        "application/javascript": "1",
        "application/x-own": b"\xff\x00",
        "x-own/text": "t",
        "text/html": "<b>😀</b>",
    }
    assert output.metadata == {"image/png": {"width": 3}, "n": None}


@pytest.mark.parametrize(
    ("made", "mime", "content"),
    [
        ("Latex('$x$')", "text/latex", "$x$"),
        ("Math('x')", "text/latex", "$\\displaystyle x$"),
        ("Markdown('**a**')", "text/markdown", "**a**"),
        ("HTML('<b>x</b>')", "text/html", "<b>x</b>"),
        ("Javascript('1')", "application/javascript", "1"),
        ("JSON({'a': [1]})", "application/json", {"a": [1]}),
        ("Image(data=b'\\x89PNG\\r\\n\\x1a\\n', format='png')", "image/png", b"\x89PNG\r\n\x1a\n"),
    ],
)
async def test_ipythons_display_classes_keep_their_mime_types(
    executor: CodeExecutor, made: str, mime: str, content: Any
) -> None:
    result = await run(executor, f"from IPython.display import *\n{made}")
    assert only(result.outputs, "execute_result").data[mime] == content


async def test_a_type_with_many_formats_keeps_them_all(executor: CodeExecutor) -> None:
    result = await run(
        executor,
        """
        class Thing:
            def _repr_html_(self): return "<i>thing</i>"
            def _repr_mimebundle_(self, include=None, exclude=None): return {"application/x-thing": b"\\x00\\x01"}
            def __repr__(self): return "thing"
        Thing()
        """,
    )
    assert only(result.outputs, "execute_result").data == {
        "text/plain": "thing",
        "text/html": "<i>thing</i>",
        "application/x-thing": b"\x00\x01",
    }


async def test_a_display_with_a_hundred_formats_does_no_harm(executor: CodeExecutor) -> None:
    """G9."""
    result = await run(
        executor,
        """
        from IPython.display import publish_display_data
        publish_display_data({"text/plain": "kept", **{f"x/{i}": "a" for i in range(100)}})
        """,
    )
    assert result.text == "kept"
    assert result.omitted_media == 1
    assert await text_of(executor, "1") == "1"


@pytest.mark.parametrize(
    "metadata",
    [
        "{'x': float('nan')}",
        "{('tuple',): 1}",
        "{1: {2: 3}}",
        "{'x': {1, 2}}",
        "{'x': 'y' * 3_000_000}",
        "circle",
        "deep",
    ],
)
async def test_metadata_that_json_cannot_hold_does_no_harm(executor: CodeExecutor, metadata: str) -> None:
    """G4."""
    await run(
        executor,
        """
        from IPython.display import publish_display_data
        circle = {}; circle["again"] = circle
        deep = {}
        for _ in range(5000): deep = {"deep": deep}
        """,
    )
    assert await text_of(executor, f"publish_display_data({{'text/plain': 'kept'}}, {metadata})") == "kept"
    assert await text_of(executor, "1") == "1"


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("{'a': float('nan'), 'b': [float('inf'), 1]}", {"a": "NaN", "b": ["Infinity", 1]}),
        ("{1: 'a', None: 'b'}", {"1": "a", "null": "b"}),
        ("{'when': datetime.date(2020, 1, 2)}", {"when": "2020-01-02"}),
        ("['\\ud800']", ["\\ud800"]),
        ("12345678901234567890123", 12345678901234567890123),
    ],
)
async def test_json_keeps_its_shape_around_what_json_does_not_have(
    executor: CodeExecutor, value: str, content: Any
) -> None:
    await run(executor, "import datetime\nfrom IPython.display import publish_display_data")
    result = await run(executor, f"publish_display_data({{'a/json': {value}}})")
    assert only(result.outputs, "display_data").data == {"a/json": content}


async def test_a_representation_that_fails_is_shown_as_an_error_and_the_cell_goes_on(executor: CodeExecutor) -> None:
    """G12."""
    result = await run(
        executor,
        """
        class Bad:
            def _repr_html_(self): raise ValueError("bad html")
            def __repr__(self): return "still here"
        Bad()
        """,
    )
    assert result.text == "still here"
    error = only(result.outputs, "error")
    assert (error.name, error.text) == ("ValueError", "bad html")


async def test_a_repr_that_fails_is_shown_as_an_error(executor: CodeExecutor) -> None:
    result = await run(executor, "class Bad:\n    def __repr__(self): raise KeyError('no repr')\nBad()")
    assert only(result.outputs, "error").name == "KeyError"
    assert await text_of(executor, "1") == "1"


async def test_a_huge_repr_is_cut_and_said_to_be(executor: CodeExecutor) -> None:
    """G12."""
    result = await run(executor, "class R:\n    def __repr__(self): return 'r' * 60_000_000\nR()")
    assert result.truncated
    assert len(result.text or "") < 2 << 20
    assert await text_of(executor, "1") == "1"


async def test_a_repr_over_the_limit_is_left_out_and_counted(
    executor: CodeExecutor, container: CodeExecutionContainer
) -> None:
    size = 3 * container.limits.output
    result = await run(executor, f"class R:\n    def __repr__(self): return 'r' * {size}\nprint('a'); R()")
    assert result.omitted_bytes >= 2 * container.limits.output
    assert len(result.text or "") < 2 * container.limits.output
    assert (result.text or "").startswith("a\n")


# -- matplotlib and pandas -------------------------------------------------------------------------------------------


async def test_figures_are_shown_inline_without_a_magic(executor: CodeExecutor) -> None:
    pytest.importorskip("matplotlib")
    result = await run(executor, "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nprint('x')")
    assert [output.kind for output in result.outputs] == ["stream", "display_data"]
    image = result.images[0]
    assert image.data.startswith(b"\x89PNG")
    assert image.path is not None
    assert image.path.parent == executor.images_dir
    assert image.path.read_bytes() == image.data
    # The figure is closed: the next cell does not show it again.
    assert (await run(executor, "1")).images == []


async def test_figures_that_are_shown_keep_their_place(executor: CodeExecutor) -> None:
    pytest.importorskip("matplotlib")
    result = await run(
        executor,
        """
        import matplotlib.pyplot as plt
        print("before"); plt.plot([1]); plt.show(); print("after")
        """,
    )
    assert [output.kind for output in result.outputs] == ["stream", "display_data", "stream"]
    assert result.text == "before\n<Figure size 640x480 with 1 Axes>\nafter"


async def test_figures_may_be_vector_graphics(executor: CodeExecutor) -> None:
    pytest.importorskip("matplotlib")
    result = await run(
        executor,
        """
        %config InlineBackend.figure_formats = ["svg"]
        import matplotlib.pyplot as plt
        plt.plot([1]); None
        """,
    )
    assert [image.mime_type for image in result.images] == ["image/svg+xml"]


async def test_the_magics_for_figures_are_accepted_too(executor: CodeExecutor) -> None:
    pytest.importorskip("matplotlib")
    await run(executor, "%matplotlib inline")
    result = await run(executor, "import matplotlib.pyplot as plt\nplt.plot([1]); None")
    assert len(result.images) == 1


async def test_a_data_frame_comes_as_html_and_as_text(executor: CodeExecutor) -> None:
    pytest.importorskip("pandas")
    result = await run(executor, "import pandas as pd\npd.DataFrame({'a': [1, 2]})")
    data = only(result.outputs, "execute_result").data
    assert set(data) == {"text/plain", "text/html", "application/vnd.actbox.table+json"}
    assert "<table" in data["text/html"]
    # Columns are aligned by leading blanks, so those stay.
    assert result.text == data["text/plain"] == "   a\n0  1\n1  2"


# -- display ids and clear_output ----------------------------------------------------------------------------------


async def test_a_display_can_be_updated_in_its_cell(executor: CodeExecutor) -> None:
    result = await run(executor, "h = display('old', display_id='d'); print('p'); h.update('new')")
    assert result.text == "'new'\np"
    assert result.outputs[0].display_id == "d"


async def test_a_display_can_be_updated_after_its_cell(executor: CodeExecutor) -> None:
    first = await events_of(executor, "handle = display('old', display_id=True)")
    assert isinstance(first[0], DisplayData)
    events = await events_of(executor, "handle.update('new')")
    assert events == [UpdateDisplayData({"text/plain": "'new'"}, {}, first[0].display_id)]
    events = await events_of(
        executor, "from IPython.display import update_display\nupdate_display('newer', display_id=handle.display_id)"
    )
    assert events == [UpdateDisplayData({"text/plain": "'newer'"}, {}, first[0].display_id)]


async def test_clear_output_takes_back_what_was_shown(executor: CodeExecutor) -> None:
    code = "from IPython.display import clear_output\nprint('old'); clear_output(); print('new')"
    assert await text_of(executor, code) == "new"
    assert await text_of(executor, "print('old'); clear_output(wait=True)") == "old"
    assert await text_of(executor, "print('old'); clear_output(wait=True); print('new')") == "new"
    events = await events_of(executor, "display(1); clear_output(True); display(2)")
    assert [type(event) for event in events] == [DisplayData, ClearOutput, DisplayData]


# -- magics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "pattern"),
    [
        ("%timeit -n 10 -r 1 1 + 1", r"[\d.]+ \S?s ± .* 10 loops each\)"),
        ("%%timeit -n 1 -r 1\nsum(range(10))", r".* 1 loop each\)"),
        ("%time 1 + 1", r"CPU times: .*\nWall time: .*\n2"),
        ("%%time\nprint(3)", r"3\nCPU times: .*\nWall time: .*"),
        ("%%bash\necho hi\necho err >&2", r"hi\nerr|err\nhi"),
        ("%%sh\nexit 0", r""),
        ("%%python\nprint('sub')", r"sub"),
        ("!echo a; echo b", r"a\r?\nb"),
        ("x = !echo a; echo b\nx", r"\['a', 'b'\]"),
        ("name = 'v'\n!echo {name} $name", r"v v"),
        ("!exit 3\n_exit_code", r"3"),
        ("%env GREETING", r"'hello'"),
        ("%cd /tmp\n%pwd", r"/tmp\n'/tmp'"),
        ("%who", r"Interactive namespace is empty\."),
        ("%%capture out\nprint('caught')", r""),
        ("%%html\n<b>x</b>", r"<IPython\.core\.display\.HTML object>"),
        ("len?", r"(?s)Signature: len\(obj, /\)\nDocstring: .*number of items.*"),
        ("import textwrap\ntextwrap.dedent??", r"(?s)Signature: textwrap\.dedent\(text\)\nSource:.*def dedent.*"),
        ("str.isal*?", r"str\.isalnum\nstr\.isalpha"),
        ("%load_ext autoreload\n%autoreload 2", r""),
        ("%xmode Plain", r"Exception reporting mode: Plain"),
        ("%reset -f", r""),
        ("%precision 2\n3.14159", r"(?s).*3\.14"),
        ("%%script false --no-raise-error\nx", r""),
    ],
)
async def test_magics_work(executor: CodeExecutor, code: str, pattern: str) -> None:
    result = await executor.execute(code, timeout=SECONDS)
    assert re.fullmatch(pattern, strip_ansi(result.text or "")), result.text


async def test_captured_output_can_be_looked_at_later(executor: CodeExecutor) -> None:
    assert await text_of(executor, "%%capture out\nprint('caught'); display(1); 2") is None
    assert await text_of(executor, "print(out.stdout, len(out.outputs))") == "caught\n 2"


async def test_files_are_written_into_the_working_directory_and_run(executor: CodeExecutor) -> None:
    assert await text_of(executor, "%%writefile script.py\nprint('from the script')\ny = 5") == "Writing script.py"
    assert (executor.working_dir / "script.py").read_text() == "print('from the script')\ny = 5\n"
    assert await text_of(executor, "%run script.py\ny") == "from the script\n5"


async def test_a_skill_script_can_be_run_with_arguments(executor: CodeExecutor) -> None:
    edit(executor.working_dir / "tool.py", "import sys\nprint(__name__, sys.argv[1:])\nsys.exit(0)\n")
    assert await text_of(executor, "%run tool.py a b") == "__main__ ['a', 'b']"
    assert await text_of(executor, "!python tool.py c") == "__main__ ['c']"


async def test_a_magic_that_does_not_exist_is_named_in_the_error(executor: CodeExecutor) -> None:
    error = await failure_of(executor, "%nosuchmagic")
    assert error.name == "UsageError"
    assert "nosuchmagic" in str(error)


async def test_a_shell_cell_that_fails_is_an_error(executor: CodeExecutor) -> None:
    error = await failure_of(executor, "%%bash\necho out\nexit 3")
    assert error.name == "CalledProcessError"
    assert error.text == "out"


# -- asyncio -------------------------------------------------------------------------------------------------------


async def test_await_works_at_top_level(executor: CodeExecutor) -> None:
    code = """
        import asyncio
        async def add(a, b):
            await asyncio.sleep(0)
            print("adding")
            return a + b
        await add(1, 2)
    """
    assert await text_of(executor, code) == "adding\n3"
    assert await text_of(executor, "async with asyncio.timeout(5): x = await add(3, 4)\nx") == "adding\n7"
    assert await text_of(executor, "[await add(n, n) for n in range(2)]") == "adding\nadding\n[0, 2]"


async def test_asyncio_run_works_inside_a_cell(executor: CodeExecutor) -> None:
    code = "import asyncio\nasync def f(): return 5\nasyncio.run(f())"
    assert await text_of(executor, code) == "5"
    assert await text_of(executor, "await f()") == "5"
    assert await text_of(executor, "asyncio.run(f())") == "5"


async def test_tasks_go_on_between_cells(executor: CodeExecutor) -> None:
    await run(
        executor,
        """
        import asyncio, pathlib
        async def work():
            for n in range(5):
                await asyncio.sleep(0.01)
                print("step", n)
            pathlib.Path("done").touch()
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        """,
    )
    # Nothing is asked of the kernel meanwhile: it works by itself.
    async with asyncio.timeout(SECONDS):
        while not (executor.working_dir / "done").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
    assert await text_of(executor, "task.done()") == "step 0\nstep 1\nstep 2\nstep 3\nstep 4\nTrue"


async def test_a_task_that_fails_between_cells_does_no_harm(executor: CodeExecutor) -> None:
    await run(
        executor,
        """
        import asyncio, pathlib
        async def work():
            await asyncio.sleep(0.01)
            try:
                raise ValueError("in the background")
            finally:
                pathlib.Path("failed").touch()
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        """,
    )
    async with asyncio.timeout(SECONDS):
        while not (executor.working_dir / "failed").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
    assert (await failure_of(executor, "await task")).name == "ValueError"


async def test_a_task_may_end_the_program_between_cells_and_the_session_lives(executor: CodeExecutor) -> None:
    await run(
        executor,
        """
        import asyncio, pathlib, sys
        async def work():
            await asyncio.sleep(0.01)
            pathlib.Path("leaving").touch()
            sys.exit(1)
        x = 1
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        """,
    )
    async with asyncio.timeout(SECONDS):
        while not (executor.working_dir / "leaving").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
    result = await run(executor, "x")
    assert result.outputs[-1].data == {"text/plain": "1"}
    assert not result.restarted


# -- errors --------------------------------------------------------------------------------------------------------


async def test_an_exception_comes_with_name_value_and_both_tracebacks(executor: CodeExecutor) -> None:
    error = await failure_of(executor, "def divide(a):\n    return a / 0\nprint('before')\ndivide(1)")
    assert (error.name, error.value, str(error)) == (
        "ZeroDivisionError",
        "division by zero",
        "ZeroDivisionError: division by zero",
    )
    assert error.text == "before"
    assert error.trace is not None
    assert "\x1b" not in error.trace
    assert "return a / 0" in error.trace
    assert "In[1]" in error.trace
    assert error.colored_trace is not None
    assert "\x1b[" in error.colored_trace
    assert strip_ansi(error.colored_trace) == error.trace


async def test_a_syntax_error_points_at_its_place(executor: CodeExecutor) -> None:
    error = await failure_of(executor, "x = 1\nprint('never')\nx = = 2")
    assert error.name == "SyntaxError"
    assert error.text is None
    assert error.trace is not None
    assert "x = = 2" in error.trace
    assert "^" in error.trace
    assert (await failure_of(executor, "x")).name == "NameError"


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("return 5", "SyntaxError"),
        ("  x = 1\n y = 2", "IndentationError"),
        ("if True:\n\tx\n        y", "TabError"),
        ("'abc", "SyntaxError"),
        ("(" * 500, "SyntaxError"),
        ("f'{'", "SyntaxError"),
        ("import no_such_module_anywhere", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise BaseException('base')", "BaseException"),
        ("import asyncio\nraise asyncio.CancelledError", "CancelledError"),
        ("raise ExceptionGroup('group', [ValueError(1), TypeError(2)])", "ExceptionGroup"),
        ("import asyncio\nasync with asyncio.TaskGroup() as g: g.create_task(asyncio.sleep('x'))", "ExceptionGroup"),
        ("assert 1 == 2, 'text'", "AssertionError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("class E(Exception): pass\nraise E", "E"),
        ("raise type('Ж😀', (Exception,), {})", "Ж😀"),
    ],
)
async def test_every_kind_of_failure_is_an_error_of_its_name(executor: CodeExecutor, code: str, name: str) -> None:
    """G12."""
    await run(executor, "x = 1")
    error = await failure_of(executor, code)
    assert error.name == name
    assert error.trace
    assert name in error.trace
    assert await text_of(executor, "x") == "1"


async def test_code_with_a_nul_is_refused_by_the_compiler(executor: CodeExecutor) -> None:
    assert "null bytes" in str(await failure_of(executor, "x = '\0'"))  # of which kind depends on the Python


async def test_chained_exceptions_are_all_in_the_traceback(executor: CodeExecutor) -> None:
    error = await failure_of(
        executor,
        """
        try:
            try:
                {}["first"]
            except KeyError as exc:
                raise ValueError("second") from exc
        except ValueError:
            raise TypeError("third")
        """,
    )
    assert error.name == "TypeError"
    trace = error.trace or ""
    assert trace.index("KeyError: 'first'") < trace.index("ValueError: second") < trace.index("TypeError: third")
    assert "direct cause" in trace
    assert "another exception occurred" in trace


@pytest.mark.parametrize("method", ["__str__", "__repr__"])
@pytest.mark.parametrize("body", ["raise ValueError('inner')", "return 5", "return None", "return '\\ud800'"])
async def test_an_exception_whose_text_fails_is_still_that_exception(
    executor: CodeExecutor, method: str, body: str
) -> None:
    """G12."""
    error = await failure_of(executor, f"class E(Exception):\n    def {method}(self): {body}\nraise E('x')")
    assert error.name == "E"
    assert await text_of(executor, "1") == "1"


async def test_an_exception_whose_class_has_no_text_is_an_error_too(executor: CodeExecutor) -> None:
    error = await failure_of(
        executor,
        """
        class Meta(type):
            def __str__(self): raise ValueError("no")
            __repr__ = __str__
        class E(Exception, metaclass=Meta): pass
        raise E("x")
        """,
    )
    assert error.name == "E"
    assert await text_of(executor, "1") == "1"


@pytest.mark.parametrize("text", ["x", "é", "😀", "\\ud800", "\\x1b", "\\0"])
async def test_an_exception_with_a_huge_text_is_bounded(executor: CodeExecutor, text: str) -> None:
    """G12."""
    error = await failure_of(executor, f"raise ValueError('{text}' * 10_000_000)")
    assert error.name == "ValueError"
    assert error.value is not None
    assert len(error.value) > 1000
    for kept in (str(error), error.value, error.trace or "", error.colored_trace or ""):
        assert len(kept) < 2 << 20
    assert await text_of(executor, "1") == "1"


async def test_a_long_chain_of_exceptions_is_bounded(executor: CodeExecutor) -> None:
    """G12."""
    error = await failure_of(
        executor,
        """
        last = None
        for n in range(100):
            try:
                raise ValueError("x" * 10_000) from last
            except ValueError as exc:
                last = exc
        raise last
        """,
    )
    assert error.name == "ValueError"
    assert len(error.trace or "") < 2 << 20


async def test_exceptions_in_a_circle_do_not_hang(executor: CodeExecutor) -> None:
    """G12."""
    error = await failure_of(
        executor,
        """
        a, b = ValueError("a"), ValueError("b")
        a.__cause__, b.__cause__ = b, a
        raise a
        """,
    )
    assert error.name == "ValueError"


async def test_warnings_are_shown_on_standard_error(executor: CodeExecutor) -> None:
    result = await run(executor, "import warnings\nwarnings.warn('careful')")
    stream = only(result.outputs, "stream")
    assert stream.name == "stderr"
    assert "UserWarning: careful" in stream.text


# -- ends that are none, and questions that nobody answers -----------------------------------------------------------


@pytest.mark.parametrize("code", ["exit", "quit", "exit()", "quit()", "import sys; sys.exit()", "raise SystemExit(0)"])
async def test_a_session_survives_being_told_to_quit(executor: CodeExecutor, code: str) -> None:
    """E16."""
    await run(executor, "x = 5")
    result = await run(executor, f"{code}")
    assert result.text is None
    again = await run(executor, "x")
    assert again.text == "5"
    assert not again.restarted


async def test_what_comes_behind_an_exit_does_not_run(executor: CodeExecutor) -> None:
    assert await text_of(executor, "import sys\nprint(1)\nsys.exit()\nprint(2)") == "1"


@pytest.mark.parametrize("status", ["3", "'text'", "1.5"])
async def test_an_exit_with_a_status_is_an_error(executor: CodeExecutor, status: str) -> None:
    """E16."""
    error = await failure_of(executor, f"import sys\nsys.exit({status})")
    assert error.name == "SystemExit"
    assert await text_of(executor, "1") == "1"


@pytest.mark.parametrize(
    "code",
    [
        "input()",
        "input('name? ')",
        "import getpass; getpass.getpass()",
        "from getpass import getpass; getpass('pw')",
        "import builtins; builtins.input()",
        "%debug",
    ],
)
async def test_a_question_is_refused_at_once_and_clearly(executor: CodeExecutor, code: str) -> None:
    """E24."""
    if code == "%debug":
        await failure_of(executor, "1 / 0")
    error = await failure_of(executor, code)
    assert error.name == "StdinNotImplementedError"
    assert "input" in str(error)
    assert await text_of(executor, "1") == "1"


async def test_standard_input_is_at_its_end(executor: CodeExecutor) -> None:
    """E24."""
    assert await text_of(executor, "import sys, os\nsys.stdin.read(), os.read(0, 10)") == "('', b'')"
    assert await text_of(executor, "!cat") is None


async def test_a_breakpoint_does_not_wait_for_anybody(executor: CodeExecutor) -> None:
    with pytest.raises(ExecutionError):
        await run(executor, "x = 1\nbreakpoint()\nx = 2")
    assert await text_of(executor, "print('next')") == "next"


# -- output: order and sources ---------------------------------------------------------------------------------------


async def test_output_of_python_subprocesses_and_c_keeps_its_order(executor: CodeExecutor) -> None:
    result = await run(
        executor,
        """
        import ctypes, os, subprocess, sys
        libc = ctypes.CDLL(None)
        for n in range(20):
            print("print", n)
            os.system(f"echo system {n}")
            os.write(1, f"write {n}\\n".encode())
            libc.printf(f"printf {n}\\n".encode()); libc.fflush(None)
            display(n)
            sys.stdout.write(f"stdout {n}\\n")
            sys.stdout.buffer.write(f"buffer {n}\\n".encode())
            sys.stderr.write(f"stderr {n}\\n")
            os.write(2, f"write2 {n}\\n".encode())
        """,
    )
    kinds = ["print", "system", "write", "printf", "-", "stdout", "buffer", "stderr", "write2"]
    expected = "\n".join(f"{kind} {n}" if kind != "-" else str(n) for n in range(20) for kind in kinds)
    assert result.text == expected


async def test_a_cell_ends_after_its_last_output(executor: CodeExecutor) -> None:
    code = """
        import os, subprocess, threading
        print("a")
        subprocess.run(["echo", "b"])
        threads = [threading.Thread(target=print, args=("thread",)) for _ in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os.system("echo c; echo d >&2"); None
        """
    for _ in range(10):
        text = (await text_of(executor, code) or "").split("\n")
        assert text[:2] == ["a", "b"]
        assert "".join(text).count("thread") == 20
        assert sorted(text[-2:]) == ["c", "d"]


async def test_each_cells_output_is_its_own(executor: CodeExecutor) -> None:
    executions = [
        await executor.submit(f"import os\nprint('p{n}'); os.system('echo s{n}'); os.write(1, b'w{n}\\n'); None")
        for n in range(30)
    ]
    for n, execution in enumerate(executions):
        assert (await execution.result(SECONDS)).text == f"p{n}\ns{n}\nw{n}"


async def test_output_of_a_thread_between_cells_comes_with_the_next(executor: CodeExecutor) -> None:
    await run(
        executor,
        """
        import os, pathlib, threading
        go = threading.Event()
        def work():
            go.wait()
            print("from the thread")
            os.write(1, b"and its descriptor\\n")
            pathlib.Path("done").touch()
        thread = threading.Thread(target=work); thread.start()
        threading.Timer(0.05, go.set).start()
        """,
    )
    async with asyncio.timeout(SECONDS):
        while not (executor.working_dir / "done").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
    assert await text_of(executor, "thread.join(); print('next')") == "from the thread\nand its descriptor\nnext"


async def test_much_output_between_cells_is_cut_and_the_session_goes_on(executor: CodeExecutor) -> None:
    await run(
        executor,
        """
        import pathlib, threading
        def work():
            go.wait()
            for _ in range(3000): print("x" * 1000)
            pathlib.Path("done").touch()
        go = threading.Event()
        threading.Thread(target=work).start()
        threading.Timer(0.02, go.set).start()
        """,
    )
    async with asyncio.timeout(SECONDS):
        while not (executor.working_dir / "done").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
    result = await run(executor, "print('next')")
    assert "between the cells were left out" in (result.text or "")
    assert (result.text or "").endswith("next")


async def test_a_background_program_that_never_stops_printing_holds_nothing_up(executor: CodeExecutor) -> None:
    await run(executor, "import subprocess, time\nyes = subprocess.Popen(['yes'], start_new_session=True)\nn = 0")
    for _ in range(5):
        result = await run(executor, "time.sleep(0.05); print('done'); n += 1")
        assert "y\ny\n" in (result.text or "")
    await run(executor, "yes.kill(); yes.wait(); None")
    await run(executor, "")
    assert await text_of(executor, "print('quiet', n)") == "quiet 5"


async def test_a_forked_child_prints_into_the_cell(executor: CodeExecutor) -> None:
    code = """
        import os
        print("parent before")
        pid = os.fork()
        if pid == 0:
            print("child print")
            os.write(1, b"child write\\n")
            os._exit(0)
        os.waitpid(pid, 0)
        print("parent after")
    """
    assert await text_of(executor, code) == "parent before\nchild print\nchild write\nparent after"


async def test_a_forked_child_that_comes_to_the_end_of_the_cell_is_no_second_kernel(executor: CodeExecutor) -> None:
    code = """
        import os
        pid = os.fork()
        if pid: os.waitpid(pid, 0)
        print("child" if pid == 0 else "parent")
    """
    assert await text_of(executor, code) == "child\nparent"
    result = await run(executor, "print(pid > 0)")
    assert result.text == "True"
    assert result.execution_count == 2


@pytest.mark.parametrize("ending", ["1 / 0", "import sys; sys.exit(1)", "raise KeyboardInterrupt", "display(1); 2"])
async def test_a_forked_child_that_fails_leaves_the_parent_alone(executor: CodeExecutor, ending: str) -> None:
    code = f"""
        import os
        pid = os.fork()
        if pid == 0:
            {ending}
        else:
            os.waitpid(pid, 0)
            print("parent")
    """
    result = await run(executor, code)
    assert (result.text or "").endswith("parent")
    assert await text_of(executor, "print(pid > 0)") == "True"


async def test_a_cell_that_forked_can_still_be_interrupted(executor: CodeExecutor) -> None:
    with pytest.raises(ExecutionTimeout) as caught:
        await executor.execute(
            "import os, time\npid = os.fork()\nif pid: os.waitpid(pid, 0); time.sleep(60)", timeout=0.5
        )
    assert caught.value.state_kept
    assert await text_of(executor, "pid > 0") == "True"


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_output_of_multiprocessing_comes_through(executor: CodeExecutor, method: str) -> None:
    edit(executor.working_dir / "worker.py", "def work(n):\n    print('worker', n, flush=True)\n    return n * n\n")
    code = f"""
        import multiprocessing, worker
        with multiprocessing.get_context("{method}").Pool(1) as pool:
            print(pool.map(worker.work, [1, 2, 3]))
    """
    assert await text_of(executor, code) == "worker 1\nworker 2\nworker 3\n[1, 4, 9]"


async def test_bytes_written_to_the_buffer_may_split_a_character(executor: CodeExecutor) -> None:
    code = r"""
        import sys
        for byte in "a€😀\n".encode(): n = sys.stdout.buffer.write(bytes([byte]))
    """
    assert await text_of(executor, code) == "a€😀"


async def test_bytes_of_a_subprocess_may_split_a_character(executor: CodeExecutor) -> None:
    code = r"""
        import os, time
        for byte in "a€😀\n".encode(): os.write(1, bytes([byte])); time.sleep(0.006)
    """
    assert await text_of(executor, code) == "a€😀"


@pytest.mark.parametrize(
    "shown",
    [
        "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467",  # an emoji, and a family joined by ZWJ
        "e\u0301 n\u0303 \u1112\u1161\u11ab",  # combining marks, conjoining jamo
        "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c",  # right to left, an override
        "\u4f60\u597d \u3053\u3093 \u0e2a\u0e27\u0e31\u0e2a",
        "\ufeffbom \u00a0nbsp \u2028line \u2029paragraph \u0085nel",
        "\U0010ffff \ufffe \ufffd",
        "a\0b",
        "\x1b[31mred\x1b[0m \x07 \x08 \x7f",
        "tab\tcarriage\rreturn",
    ],
    ids=ascii,
)
async def test_text_of_every_kind_passes_unchanged(executor: CodeExecutor, shown: str) -> None:
    result = await executor.execute(f"print({shown!r}, end='')", timeout=SECONDS)
    assert result.outputs[0].text == shown
    result = await executor.execute(f"import sys; sys.stderr.write({shown!a}); None", timeout=SECONDS)
    assert result.outputs[0].text == shown
    result = await executor.execute(f"import os; os.write(1, {shown.encode()!r}); None", timeout=SECONDS)
    assert result.outputs[0].text == shown


async def test_code_may_hold_any_text(executor: CodeExecutor) -> None:
    assert (
        await text_of(executor, "größe = '😀\u202e'\nlen(größe), ascii(größe)") == "(2, \"'\\\\U0001f600\\\\u202e'\")"
    )
    with pytest.raises(ExecutionError):
        await executor.execute("x = '\ud800' +", timeout=SECONDS)
    assert await text_of(executor, "1") == "1"


async def test_lone_surrogates_are_spelled_out(executor: CodeExecutor) -> None:
    """G4."""
    assert await text_of(executor, r"print('a\ud800b\udfffc')") == r"a\ud800b\udfffc"
    assert await text_of(executor, r"'a\ud800b'") == r"'a\ud800b'"
    assert (await failure_of(executor, r"raise ValueError('\ud800')")).value == r"\ud800"


async def test_bytes_that_are_no_utf8_are_replaced(executor: CodeExecutor) -> None:
    assert await text_of(executor, r"import os; os.system(r'''printf 'a\377\376b\n' '''); None") == "a\ufffd\ufffdb"
    assert await text_of(executor, r"import sys; sys.stdout.buffer.write(b'a\xffb\xe2'); None") == "a\ufffdb\ufffd"


async def test_a_very_long_line_comes_whole_while_it_is_streamed(executor: CodeExecutor) -> None:
    execution = await executor.submit("print('é' * 5_000_000)")
    size = 0
    async for chunk in execution.stream(SECONDS):
        assert set(chunk) <= {"é", "\n"}
        size += len(chunk)
    assert size == 5_000_001


async def test_many_lines_keep_their_order_while_they_are_streamed(executor: CodeExecutor) -> None:
    execution = await executor.submit("for n in range(100_000): print(n)")
    text = "".join([chunk async for chunk in execution.stream(SECONDS)])
    assert text == "".join(f"{n}\n" for n in range(100_000))


# -- what a cell may do to its own process ---------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", ["io.StringIO()", "None", "open('/dev/null', 'w')", "object()"])
async def test_a_session_survives_that_standard_output_is_replaced(executor: CodeExecutor, replacement: str) -> None:
    await run(executor, f"import io, sys\nsys.stdout = {replacement}")
    assert (
        await text_of(executor, "import os; os.write(1, b'through\\n'); display('shown'); 5") == "through\n'shown'\n5"
    )
    assert (await failure_of(executor, "1 / 0")).name == "ZeroDivisionError"
    assert await text_of(executor, "sys.stdout = sys.__stdout__\nprint('back')") == "back"


async def test_standard_output_may_be_redirected_for_a_while(executor: CodeExecutor) -> None:
    code = (
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as f: print('in')\nprint(f.getvalue())"
    )
    assert await text_of(executor, code) == "in"


async def test_a_session_survives_that_its_streams_are_closed(executor: CodeExecutor) -> None:
    await run(executor, "import sys; sys.stdout.close(); sys.stderr.close(); sys.__stdout__.close()")
    assert await text_of(executor, "print('still'); print('err', file=sys.stderr)") == "still\nerr"


async def test_a_session_survives_that_its_descriptors_are_closed(executor: CodeExecutor) -> None:
    await run(executor, "import os, sys; os.close(0); os.close(1); os.close(2)")
    assert await text_of(executor, "print('still'); 5") == "still\n5"
    assert (await failure_of(executor, "1 / 0")).name == "ZeroDivisionError"


async def test_standard_output_behaves_like_a_text_file(executor: CodeExecutor) -> None:
    code = """
        import sys
        sys.stdout.writelines(["a\\n", "b\\n"])
        sys.stdout.reconfigure(line_buffering=True)
        n = sys.stdout.write("abc\\n")
        print(n, sys.stdout.encoding, sys.stdout.isatty())
        print(sys.stdout.writable(), sys.stdout.closed, sys.stdout.fileno())
        print(1, 2, sep="-", end="!\\n", file=sys.stdout, flush=True)
    """
    assert await text_of(executor, code) == "a\nb\nabc\n4 utf-8 False\nTrue False 1\n1-2!"
    assert (await failure_of(executor, "sys.stdout.write(b'bytes')")).name == "TypeError"


async def test_an_ignored_interrupt_is_only_ignored_in_its_own_cell(executor: CodeExecutor) -> None:
    await run(executor, "import signal, time\nx = 1\nsignal.signal(signal.SIGINT, signal.SIG_IGN); None")
    with pytest.raises(ExecutionTimeout) as caught:
        await executor.execute("time.sleep(60)", timeout=0.3)
    assert caught.value.state_kept
    await run(executor, "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}); None")
    with pytest.raises(ExecutionTimeout) as caught:
        await executor.execute("time.sleep(60)", timeout=0.3)
    assert caught.value.state_kept
    assert await text_of(executor, "x") == "1"


async def test_other_signal_handlers_are_kept(executor: CodeExecutor) -> None:
    await run(executor, "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('usr1')); None")
    assert await text_of(executor, "os.kill(os.getpid(), signal.SIGUSR1)") == "usr1"
    assert await text_of(executor, "signal.setitimer(signal.ITIMER_REAL, 0); signal.alarm(0)") == "0"


async def test_a_keyboard_interrupt_of_the_codes_own_is_an_error(executor: CodeExecutor) -> None:
    with pytest.raises(ExecutionError) as caught:
        await run(executor, "raise KeyboardInterrupt('mine')")
    assert not isinstance(caught.value, ExecutionInterrupted)
    assert (caught.value.name, caught.value.value) == ("KeyboardInterrupt", "mine")


async def test_a_sigint_of_the_codes_own_does_not_end_the_session(executor: CodeExecutor) -> None:
    await run(executor, "import os, signal\nx = 1")
    for code in ("os.kill(os.getpid(), signal.SIGINT)", "os.kill(0, signal.SIGINT)", "signal.raise_signal(2)"):
        with contextlib.suppress(ExecutionError):
            await run(executor, code)
    assert await text_of(executor, "x") == "1"


async def test_the_working_directory_is_kept_from_cell_to_cell(executor: CodeExecutor, key: str) -> None:
    assert await text_of(executor, "import os; print(os.getcwd(), os.environ['PWD'])") == (
        f"/app/skills/private/{key} /app/skills/private/{key}"
    )
    await run(executor, "os.mkdir('below'); os.chdir('below'); open('file', 'w').write('x')")
    assert await text_of(executor, "os.getcwd()") == f"'/app/skills/private/{key}/below'"
    assert (executor.working_dir / "below" / "file").read_text() == "x"


async def test_a_working_directory_that_vanished_does_no_harm(executor: CodeExecutor) -> None:
    await run(executor, "import os; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')")
    assert await text_of(executor, "1 + 1") == "2"
    assert await text_of(executor, "%cd /tmp") == "/tmp"


async def test_environment_variables_are_those_asked_for(executor: CodeExecutor) -> None:
    assert await text_of(executor, "import os; os.environ['GREETING']") == "'hello'"
    await run(executor, "os.environ['MORE'] = 'x'")
    assert await text_of(executor, "!echo $GREETING $MORE") == "hello x"


async def test_builtins_and_modules_may_be_broken_in_one_session_alone(
    executor: CodeExecutor, make_executor: Any
) -> None:
    """D11."""
    await run(executor, "import json, builtins\njson.dumps = None; builtins.hex = None")
    assert await text_of(executor, "1 + 1") == "2"
    async with make_executor() as other:
        assert await text_of(other, "import json\nprint(json.dumps([int(hex(2), 16)]))") == "[2]"


# -- skills ----------------------------------------------------------------------------------------------------------


async def test_skills_of_both_folders_are_importable(executor: CodeExecutor) -> None:
    shared, private = executor.skill_paths
    name = f"shared_{executor.key.replace('-', '_')}"
    edit(shared / f"{name}.py", "WHO = 'shared'\n")
    edit(private / "own.py", "WHO = 'private'\n")
    assert await text_of(executor, f"import {name}, own\n{name}.WHO, own.WHO") == "('shared', 'private')"


@pytest.mark.parametrize("place", [0, 1], ids=["shared", "private"])
async def test_an_edited_skill_takes_effect_at_the_next_cell(executor: CodeExecutor, place: int) -> None:
    path = executor.skill_paths[place] / f"edited_{executor.key.replace('-', '_')}.py"
    name = path.stem
    edit(path, "VALUE = 1\ndef get(): return 'first'\nclass C:\n    def m(self): return 'first'\n")
    await run(executor, f"import {name} as skill\nfrom {name} import get, C\nc = C()")
    assert await text_of(executor, "skill.VALUE, skill.get(), get(), c.m()") == "(1, 'first', 'first', 'first')"
    for n in range(2, 5):
        edit(path, f"VALUE = {n}\ndef get(): return 'edit {n}'\nclass C:\n    def m(self): return 'edit {n}'\n")
        expected = f"({n}, 'edit {n}', 'edit {n}', 'edit {n}')"
        assert await text_of(executor, "skill.VALUE, skill.get(), get(), c.m()") == expected


async def test_a_skill_edited_by_a_cell_takes_effect_at_the_next(executor: CodeExecutor) -> None:
    await run(executor, "%%writefile skill.py\ndef f(): return 1")
    assert await text_of(executor, "import skill\nskill.f()") == "1"
    await run(executor, "%%writefile skill.py\ndef f(): return 22")
    assert await text_of(executor, "skill.f()") == "22"


@pytest.mark.parametrize(
    "source", ["def broken(:\n", "1 / 0\n", "import sys; sys.exit(3)\n", "raise KeyboardInterrupt\n", "x = '\0'\n"]
)
async def test_a_skill_broken_by_an_edit_is_told_and_can_be_mended(executor: CodeExecutor, source: str) -> None:
    path = executor.working_dir / "skill.py"
    edit(path, "VALUE = 1\n")
    await run(executor, "import skill")
    edit(path, source)
    result = await run(executor, "print('cell ran', skill.VALUE)")
    assert "cell ran 1" in (result.text or "")
    assert "skill" in (result.text or "")
    edit(path, "VALUE = 3\n")
    assert await text_of(executor, "skill.VALUE") == "3"


async def test_a_skill_that_was_deleted_keeps_working_in_its_session(executor: CodeExecutor) -> None:
    path = executor.working_dir / "skill.py"
    edit(path, "VALUE = 1\n")
    await run(executor, "import skill")
    path.unlink()
    assert await text_of(executor, "skill.VALUE") == "1"


async def test_a_new_skill_is_importable_at_once(executor: CodeExecutor) -> None:
    for n in range(10):
        assert (await failure_of(executor, f"import new_{n}")).name == "ModuleNotFoundError"
        edit(executor.working_dir / f"new_{n}.py", f"VALUE = {n}\n")
        assert await text_of(executor, f"import new_{n}\nnew_{n}.VALUE") == str(n)


async def test_a_skill_may_be_a_package_with_modules_of_its_own(executor: CodeExecutor) -> None:
    package = executor.working_dir / "package"
    (package / "inner").mkdir(parents=True)
    edit(package / "__init__.py", "from package.tools import tool\n")
    edit(package / "tools.py", "def tool(): return 'tool 1'\n")
    edit(package / "inner" / "__init__.py", "")
    edit(package / "inner" / "deep.py", "from ..tools import tool\nVALUE = 'deep 1'\n")
    await run(executor, "import package\nfrom package.inner import deep")
    assert await text_of(executor, "package.tool(), deep.VALUE, deep.tool()") == "('tool 1', 'deep 1', 'tool 1')"
    edit(package / "inner" / "deep.py", "from ..tools import tool\nVALUE = 'deep 2'\n")
    edit(package / "tools.py", "def tool(): return 'tool 2'\n")
    assert await text_of(executor, "package.tool(), deep.VALUE, deep.tool()") == "('tool 2', 'deep 2', 'tool 2')"
    edit(package / "later.py", "VALUE = 'later'\n")
    assert await text_of(executor, "from package import later\nlater.VALUE") == "'later'"


async def test_skills_leave_no_bytecode_in_their_folders(executor: CodeExecutor) -> None:
    shared, private = executor.skill_paths
    (private / "package").mkdir()
    edit(private / "package" / "__init__.py", "")
    edit(private / "skill.py", "VALUE = 1\n")
    edit(shared / f"leaves_{executor.key.replace('-', '_')}.py", "")
    await run(executor, f"import skill, package, leaves_{executor.key.replace('-', '_')}")
    edit(private / "skill.py", "VALUE = 2\n")
    assert await text_of(executor, "skill.VALUE") == "2"
    await run(executor, "!python -c 'import skill, package'")
    await run(
        executor, "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import skill'], check=True); None"
    )
    for folder in (shared, private):
        assert list(folder.rglob("__pycache__")) == []
        assert list(folder.rglob("*.pyc")) == []


async def test_a_shared_skill_cannot_be_written_inside(executor: CodeExecutor) -> None:
    """A5."""
    error = await failure_of(executor, "open('/app/skills/shared/x.py', 'w')")
    assert error.name == "OSError"
    assert "Read-only" in (error.value or "")


async def test_an_interrupt_that_python_drops_comes_again(executor: CodeExecutor) -> None:
    """In a hook of a fork its exception is told and forgotten."""
    execution = await executor.submit(
        "import os, time\nfirst = [1]\n"
        "def hook():\n    if first: first.clear(); print('on', flush=True); time.sleep(0.5)\n"
        "os.register_at_fork(before=hook)\nif os.fork() == 0: os._exit(0)\ntime.sleep(99)"
    )
    async for _ in execution.stream(10):
        break
    await execution.interrupt()
    assert isinstance(execution.outcome, Interrupted)
    assert execution.outcome.state_kept
    assert "Exception ignored" not in (execution.so_far().text or "")
    assert (await executor.execute("print(first)")).text == "[]"

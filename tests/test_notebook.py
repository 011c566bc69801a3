"""A session as a notebook: every cell and how it ended, in a file that other programs can read."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import warnings
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import nbformat  # pyright: ignore[reportMissingTypeStubs]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbconvert import HTMLExporter  # pyright: ignore[reportMissingTypeStubs]

from actbox import (
    CodeExecutor,
    ExecutionError,
    ExecutionResult,
    ExecutionTimeout,
    InvalidArgument,
    KernelDied,
    LocalPathError,
    Output,
    Workspace,
)
from actbox.cli import ExitCode, main
from actbox.events import Died, Failed, Finished, Interrupted, Lost, Outcome, TimedOut
from actbox.events import Error as RaisedError
from actbox.files import replace_file
from actbox.history import MAX_CELLS, Cell, History
from actbox.notebook import make_notebook, notebook_bytes

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
MIMES = st.sampled_from(["text/plain", "text/html", "image/png", "image/svg+xml", "application/json", "a/b+json", "x"])
TEXT = st.text(st.characters(), max_size=9)  # lone surrogates among them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
OUTPUTS = st.one_of(
    st.builds(Output, st.just("stream"), name=st.sampled_from(["stdout", "stderr"]), text=TEXT),
    st.builds(Output, st.just("error"), name=TEXT, text=TEXT, trace=TEXT),
    st.builds(Output, st.just("display_data"), data=st.dictionaries(MIMES, JSON), metadata=st.dictionaries(TEXT, JSON)),
    st.builds(Output, st.just("execute_result"), data=st.dictionaries(MIMES, JSON), execution_count=st.integers(-1, 9)),
)
OUTCOMES: list[Outcome | None] = [
    Finished(3),
    Failed(RaisedError("E", "why", "trace"), 3),
    Interrupted(state_kept=True),
    TimedOut(1.0, state_kept=False),
    Died(signal=9),
    Lost("gone"),
    None,
]


def checked(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook as others read it, once it has been found valid."""
    read: Any = json.loads(notebook_bytes(notebook))
    assert read == notebook
    nbformat.validate(nbformat.from_dict(read), relax_add_props=False)  # pyright: ignore[reportUnknownMemberType]
    return read


def notebook_of(*cells: Cell, **more: Any) -> dict[str, Any]:
    return make_notebook(cells, version="1", **more)


def cell_of(*outputs: Output, outcome: Outcome | None = OUTCOMES[0], **more: Any) -> Cell:
    return Cell("code", ExecutionResult(None, [], list(outputs), **more), outcome, NOW)


# -- cells to a notebook ----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(TEXT, st.lists(OUTPUTS, max_size=5), st.sampled_from(OUTCOMES), st.booleans(), st.none() | TEXT)
def test_whatever_a_guest_sent_the_notebook_is_valid(
    code: str, outputs: list[Output], outcome: Outcome | None, restarted: Any, ending: str | None
) -> None:
    result = ExecutionResult(None, [], outputs, restarted=restarted, ending=ending, execution_count=3)
    made = checked(notebook_of(Cell(code, result, outcome, NOW, "KernelDied"), forgotten=2, key="k"))
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", *["markdown"] * restarted, "code"]


def test_json_of_any_depth_can_be_read_by_others() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    made = notebook_of(cell_of(Output("display_data", data={"application/json": deep}, metadata={"m": deep})))
    assert nbformat.reads(notebook_bytes(made).decode(), 4)  # pyright: ignore[reportUnknownMemberType]


def test_outputs_keep_their_formats() -> None:
    data = {"image/png": b"\x89PNG", "text/html": "<b>", "application/json": {"a": [1]}, "text/x": ["no text"]}
    made = checked(
        notebook_of(
            cell_of(
                Output("stream", name="stderr", text="\x1b[31mred"),
                Output("display_data", data=data, metadata={"image/png": {"width": 3}}),
                Output("execute_result", data={"text/plain": "1"}, execution_count=3),
                Output("error", name="E", text="why", trace="one\ntwo"),
            )
        )
    )
    assert made["cells"][0]["outputs"] == [
        {"output_type": "stream", "name": "stderr", "text": "\x1b[31mred"},
        {
            "output_type": "display_data",
            "data": {**data, "image/png": base64.b64encode(b"\x89PNG").decode(), "text/x": '["no text"]'},
            "metadata": {"image/png": {"width": 3}},
        },
        {"output_type": "execute_result", "data": {"text/plain": "1"}, "metadata": {}, "execution_count": 3},
        {"output_type": "error", "ename": "E", "evalue": "why", "traceback": ["one", "two"]},
    ]


def test_what_was_left_out_is_told() -> None:
    made = checked(notebook_of(cell_of(omitted_bytes=5, omitted_media=2), forgotten=3))
    assert "3 earlier cells" in made["cells"][0]["source"]
    facts = made["cells"][1]["metadata"]["actbox"]
    assert (facts["omitted_bytes"], facts["omitted_media"]) == (5, 2)


# -- the record -------------------------------------------------------------------------------------------------------


class Ended:
    """Stands for an execution that has ended."""

    def __init__(self, code: str, printed: str = "") -> None:
        self.code = code
        self.outcome = Finished(1)
        self.started = NOW
        self.error = None
        self._printed = printed

    def so_far(self) -> ExecutionResult:
        return ExecutionResult(self._printed, [], [Output("stream", name="stdout", text=self._printed)])


def remember(history: History, code: str, printed: str = "") -> None:
    ended: Any = Ended(code, printed)
    history.add(ended)


def test_the_record_forgets_the_oldest_cells_and_counts_them() -> None:
    history = History(10_000)
    for number in range(20):
        remember(history, str(number), "x" * 1000)
    assert [cell.code for cell in history.cells()] == ["16", "17", "18", "19"]
    assert history.forgotten == 16


def test_the_record_has_no_more_cells_than_its_bound() -> None:
    history = History(1 << 30)
    for number in range(MAX_CELLS + 5):
        remember(history, str(number))
    assert len(history.cells()) == MAX_CELLS
    assert history.forgotten == 5


def test_a_cell_that_is_too_large_is_kept_without_its_outputs() -> None:
    history = History(10_000)
    remember(history, "small")
    remember(history, "large", "x" * 100_000)
    small, large = history.cells()
    assert (small.code, large.code) == ("small", "large")
    assert large.result.outputs == []
    assert large.forgotten >= 100_000
    assert "not in the record" in checked(notebook_of(large))["cells"][0]["outputs"][0]["text"]


def test_what_happens_without_cells_is_bounded_too() -> None:
    history = History(1 << 20)
    for _ in range(MAX_CELLS + 5):
        history.mark("Here something happened.")
    assert len(history.entries()) == MAX_CELLS


def test_a_record_can_be_refused(tmp_path: Path) -> None:
    history = History(0)
    remember(history, "x")
    assert history.cells() == []
    for wrong in (-1, 1.5, True):
        with pytest.raises(InvalidArgument, match="history"):
            CodeExecutor("key", Workspace(tmp_path), 1, history=wrong)  # pyright: ignore[reportArgumentType]


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "out").symlink_to(tmp_path / "secret")
    replace_file(tmp_path, ("folder",), "out", b"new")
    assert (tmp_path / "folder" / "out").read_bytes() == b"new"
    assert not (tmp_path / "folder" / "out").is_symlink()
    assert (tmp_path / "secret").read_text() == "kept"
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(LocalPathError, match="symbolic link"):
        replace_file(tmp_path, ("link",), "other", b"new")
    with pytest.raises(LocalPathError, match="written"):
        replace_file(tmp_path, (), "folder", b"new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "link", "out", "secret"]


# -- on every engine --------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_session_is_a_notebook_that_tells_what_happened(executor: CodeExecutor, tmp_path: Path) -> None:
    await executor.execute("x = 1\nprint('é'); x")
    with pytest.raises(ExecutionError):
        await executor.execute("1 / 0")
    with pytest.raises(ExecutionTimeout):
        await executor.execute("while True: pass", timeout=0.3)
    with pytest.raises(KernelDied):
        await executor.execute("import os; os.kill(os.getpid(), 9)")
    await executor.execute("import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    running = await executor.submit("import time\nprint('began', flush=True); time.sleep(60)")
    async for _ in running.events():
        break
    behind = await executor.submit("never")
    made = checked(executor.notebook())
    assert [cell["metadata"]["actbox"].get("outcome") for cell in made["cells"]] == [
        *("finished", "error", "timed_out", "died", None, "finished", "running", "waiting")
    ]
    assert [cell["execution_count"] for cell in made["cells"] if cell["cell_type"] == "code"][:2] == [1, 2]
    first, raised, late, died, marker, plot, now, _ = made["cells"]
    assert [output["output_type"] for output in first["outputs"]] == ["stream", "execute_result"]
    assert first["metadata"]["actbox"]["duration"] > 0
    assert [output["ename"] for output in raised["outputs"]] == ["ZeroDivisionError"]
    assert [output["ename"] for output in late["outputs"]] == ["KeyboardInterrupt", "ExecutionTimeout"]
    assert "SIGKILL" in died["outputs"][-1]["evalue"]
    assert died["metadata"]["actbox"]["state_kept"] is False
    assert "fresh kernel" in marker["source"]
    assert base64.b64decode(plot["outputs"][0]["data"]["image/png"]).startswith(b"\x89PNG")
    assert now["outputs"][0]["text"].startswith("began")

    await executor.disconnect()
    assert running.outcome is not None
    assert behind.outcome is not None
    await executor.save_notebook(tmp_path / "out.ipynb")
    saved: dict[str, Any] = json.loads(await asyncio.to_thread((tmp_path / "out.ipynb").read_text, "utf-8"))
    assert checked(saved) == executor.notebook()
    last = [cell["metadata"]["actbox"] for cell in saved["cells"][-2:]]
    assert [(facts["outcome"], facts["ran"]) for facts in last] == [("lost", True), ("lost", False)]
    assert "<h" in await asyncio.to_thread(as_html, nbformat.from_dict(saved))  # pyright: ignore[reportUnknownMemberType]


def as_html(notebook: Any) -> str:
    with warnings.catch_warnings(action="ignore"):  # nbconvert's own
        return HTMLExporter().from_notebook_node(notebook)[0]  # pyright: ignore[reportUnknownMemberType]


@pytest.mark.anyio
async def test_a_restored_session_says_where_its_variables_are_from(executor: CodeExecutor, tmp_path: Path) -> None:
    await executor.execute("kept = 1")
    await executor.save(tmp_path / "state")
    await executor.restore(tmp_path / "state")
    await executor.execute("kept")
    first, marker, last = checked(executor.notebook())["cells"]
    assert [first["source"], last["source"]] == ["kept = 1", "kept"]
    assert "a saved session was restored" in marker["source"]


@pytest.mark.anyio
async def test_a_notebook_in_the_sessions_folder_goes_through_no_link(executor: CodeExecutor, tmp_path: Path) -> None:
    await executor.execute(f"import os; os.symlink({str(tmp_path)!r}, 'sub'); os.mkdir('real')")
    with pytest.raises(LocalPathError, match="symbolic link"):
        await executor.save_notebook(executor.working_dir / "sub" / "out.ipynb")
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - quick enough
    await executor.save_notebook(executor.working_dir / "real" / "out.ipynb")
    assert (await executor.execute("os.path.getsize('real/out.ipynb') > 0")).text == "True"


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("default_engine")
@pytest.mark.parametrize(("code", "ends"), [("print(1)", ExitCode.FINISHED), ("1 / 0", ExitCode.ERROR)])
def test_a_run_is_written_to_a_notebook_however_it_ends(
    tmp_path: Path, code: str, ends: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.ipynb"
    file.write_text("old")
    assert main(["run", "--workspace", str(tmp_path / "ws"), "--notebook", str(file), "-c", code]) == ends
    (cell,) = checked(json.loads(file.read_text(encoding="utf-8")))["cells"]
    assert cell["source"] == code
    assert cell["outputs"]


@pytest.mark.usefixtures("default_engine")
def test_a_notebook_that_cannot_be_written_is_an_error_of_the_host(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    arguments = ["run", "--workspace", str(tmp_path / "ws"), "--notebook", str(tmp_path / "folder"), "-c", "print(1)"]
    assert main(arguments) == ExitCode.HOST
    out, err = capfd.readouterr()
    assert out == "1\n"
    assert "no notebook was written" in err


def test_a_notebook_in_no_folder_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--notebook", str(tmp_path / "no" / "out.ipynb"), "-c", "1"]) == ExitCode.USAGE
    assert "no file in a folder" in capsys.readouterr().err

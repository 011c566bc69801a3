from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

TABLE = """\
|                 |           actbox |             peer | ratio | aim |       met |
|-----------------|-----------------:|-----------------:|------:|----:|----------:|
| round trip, ms  | 0.50 (0.40-0.62) |  5.00 (4.00-150) |  10.0 |   8 |       yes |
| memory, MiB [1] | 10.0 (10.0-10.0) | 90.0 (90.0-90.0) |   9.0 |  15 | not known |

[1] not all"""

needs_peer = pytest.mark.skipif(
    importlib.util.find_spec("jupyter_client") is None and not os.environ.get("CI"),
    reason="needs the dependency group 'bench'",
)


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[Any, Any]]:
    """The benchmark's `report` and `memory`; the rest runs as users run it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        yield importlib.import_module("report"), importlib.import_module("memory")


@pytest.fixture
def report(modules: tuple[Any, Any]) -> Any:
    return modules[0]


@pytest.fixture
def memory(modules: tuple[Any, Any]) -> Any:
    return modules[1]


def test_ratio_tells_how_many_times_better_by_the_medians(report: Any) -> None:
    assert report.Row("trip", "ms", ((1.0, 2.0, 99.0), (10.0, 20.0, 21.0))).ratio == 10
    assert report.Row("rate", "MB/s", ((50.0,), (100.0,)), more_is_better=True).ratio == 0.5


@pytest.mark.parametrize(
    ("ours", "aim", "complete", "verdict"),
    [(1.0, 8, True, "yes"), (1.01, 8, True, "no"), (1.0, None, True, ""), (1.0, 8, False, "not known")],
)
def test_aim_is_met_only_by_a_complete_number(
    report: Any, ours: float, aim: float | None, verdict: str, *, complete: bool
) -> None:
    assert report.Row("trip", "ms", ((ours,), (8.0,)), aim=aim, complete=complete).verdict == verdict


def test_table_shows_medians_spreads_and_notes(report: Any) -> None:
    rows = [
        report.Row("round trip", "ms", ((0.5, 0.4, 0.625), (4.0, 5.0, 150.0)), aim=8),
        report.Row("memory", "MiB", ((10.0,), (90.0,)), aim=15, complete=False, note="not all"),
    ]
    assert report.table(rows, "peer") == TABLE


def test_a_cost_is_the_growth_of_the_medians_and_has_a_bound(report: Any) -> None:
    rows = [report.Row("trip", "ms", ((1.0, 1.2), (1.0, 1.0))), report.Row("start", "ms", ((13.0,), (10.0,)))]
    first, second = report.costs(rows).splitlines()[2:]
    assert re.sub(r" +", " ", first) == "| trip, ms | 1.10 (1.00-1.20) | 1.00 (1.00-1.00) | +10% | yes |"
    assert re.sub(r" +", " ", second) == "| start, ms | 13.0 (13.0-13.0) | 10.0 (10.0-10.0) | +30% | no |"


def test_page_names_command_day_machine_and_table(report: Any) -> None:
    rows = [report.Row("trip", "ms", ((1.0,), (8.0,)), aim=8)]
    page = report.page(rows, rows, "peer", {"CPUs": "2"}, date(2030, 1, 2), "make bench")
    assert "Written by `make bench` on 2030-01-02" in page
    assert report.table(rows, "peer") in page
    assert report.costs(rows) in page
    assert page.endswith("- CPUs: 2\n")


def test_descendants_hold_memory_of_their_own(memory: Any) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    before = memory.descendants(os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        new = memory.descendants(os.getpid()) - before
        held = memory.unique(new)
        child.stdin.close()
    assert child.pid in new
    assert held.keys() == new
    assert len(new) == 2
    assert all(size > 1 << 20 for size in held.values())
    assert memory.unique(new) == {}


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, str(FOLDER / "bench.py"), "--quick", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@needs_peer
@pytest.mark.anyio
@pytest.mark.timeout(120)
@pytest.mark.engines("bubblewrap")
@pytest.mark.usefixtures("container")
async def test_quick_run_measures_everything() -> None:
    process = await _start()
    output, complaint = await process.communicate()
    assert process.returncode == 0, complaint.decode()
    text = output.decode()
    for what in (
        "start to the first result",
        "a further session, ready",
        "unique memory",
        "round trip of `1+1`",
        "streaming 10 MB",
        "print loop",
        "interrupt",
        "close",
        "session start, until",
        "all layers",
        "Packages: actbox",
    ):
        assert what in text


@needs_peer
@pytest.mark.anyio
@pytest.mark.timeout(60)
@pytest.mark.engines("bubblewrap")
@pytest.mark.usefixtures("container")
async def test_ctrl_c_leaves_no_process(memory: Any) -> None:
    process = await _start()
    assert process.stderr is not None
    while (line := await process.stderr.readline()) != b"bench: further sessions\n":
        assert line
    started = memory.descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, complaint = await process.communicate()
    assert process.returncode == 130, complaint.decode()
    assert started
    assert memory.unique(started) == {}

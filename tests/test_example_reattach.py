"""The example of sessions that outlive their clients does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "reattach.py"


@pytest.mark.usefixtures("default_engine")
@pytest.mark.timeout(60)
def test_the_example_goes_on_where_the_killed_agent_was(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert "the first agent was killed; kept: analysis" in shown
    seen = {agent: re.findall(rf"{agent} agent, event (\d+):", shown) for agent in ("first", "second")}
    assert seen["first"] == ["1", "2", "3"]
    assert seen["second"] == [str(number) for number in range(4, 4 + len(seen["second"]))]
    assert "all of it, first to last: 11 lines" in shown
    assert "total = 55" in shown
    assert "watcher, event 1: Stream(name='stdout', text='seen by both\\n')" in shown
    assert "the watcher is refused: this client does not drive the session" in shown
    assert shown.endswith("kept at the end: 0\n")

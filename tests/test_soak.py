"""A small soak: `make soak` runs a large one."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parent.parent / "benchmarks" / "soak.py"

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90), pytest.mark.engines("bubblewrap")]


async def test_every_cell_ends_once_and_truly_whatever_happens_and_nothing_is_left(engine: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SOAK), "--sessions", "40", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = (await process.communicate())[0].decode(errors="replace")
    assert process.returncode == 0, said
    counted = re.search(r"^(\d+) cells in 40 sessions", said, re.MULTILINE)
    assert counted is not None
    assert int(counted[1]) >= 40

"""The benchmark's rounds: what is measured, in a process of its own, and how that process ends."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

# A contender whose sessions answer with {text!r}, and that says in the file {told!r} when a container has ended.
CONTENDER = """
import asyncio, contextlib, pathlib, sys
sys.path.insert(0, {folder!r})
import rounds

class Contender:
    @contextlib.asynccontextmanager
    async def container(self):
        try:
            yield self
        finally:
            pathlib.Path({told!r}).write_text("ended")

    async def warmed(self):
        pass

    @contextlib.asynccontextmanager
    async def session(self):
        yield self

    async def run(self, code):
        if {endless!r}:
            pathlib.Path({told!r}).write_text("running")
            await asyncio.Event().wait()
        return {text!r}

rounds.serve(Contender())
"""


@pytest.fixture(scope="module")
def rounds() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        yield importlib.import_module("rounds")


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


def said(told: Path) -> str:
    """What the contender said last, taken away."""
    text = told.read_text() if told.exists() else ""
    if text:
        # It may be there already, and not be written yet.
        told.unlink()
    return text


def driver(rounds: Any, told: Path, text: str, *, endless: bool = False) -> Any:
    code = CONTENDER.format(folder=str(FOLDER), told=str(told), text=text, endless=endless)
    return rounds.Driver("fake", [sys.executable, "-c", code])


async def test_a_round_measures_each_thing_and_ends_its_container(rounds: Any, told: Path) -> None:
    async with driver(rounds, told, "1\n") as fake:
        for _ in range(2):
            done = await fake.round(7)
            assert len(done.trips) == 7
            assert 0 < done.start <= done.start_ready
            assert 0 < done.further <= done.further_ready
            assert done.lost == 0
            assert said(told) == "ended"


async def test_a_round_counts_the_cells_whose_text_was_lost(rounds: Any, told: Path) -> None:
    async with driver(rounds, told, "") as fake:
        assert (await fake.round(3)).lost == 5


async def test_a_round_that_measures_something_else_fails(rounds: Any, told: Path) -> None:
    async with driver(rounds, told, "2") as fake:
        with pytest.raises(RuntimeError, match="fake ended with 1"):
            await fake.round(1)
    assert said(told) == "ended"


async def test_a_round_that_is_left_ends_its_container(rounds: Any, told: Path) -> None:
    async with driver(rounds, told, "1", endless=True) as fake:
        waiting = asyncio.create_task(fake.round(1))
        while said(told) != "running":  # noqa: ASYNC110 - another process says it
            await asyncio.sleep(0.01)
        waiting.cancel()
    assert said(told) == "ended"

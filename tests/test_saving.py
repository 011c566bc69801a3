# ruff: noqa: ASYNC240 - small files of the tests' own
"""A session's state in a file of the host: what survives, what is left out and why, and files that are none."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle  # pyright: ignore[reportMissingTypeStubs] - where it lies, to put it inside
import pytest
from talking import SECONDS, indented, text_of

from actbox import (
    CodeExecutor,
    ExecutionTimeout,
    InvalidArgument,
    LocalPathError,
    LocalPathMissing,
    ProtocolError,
    StateError,
    StateRefused,
    saving,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from talking import MakeExecutor

pytestmark = pytest.mark.anyio

EXAMPLE = Path(__file__).parent.parent / "examples" / "saving.py"

LIE = """
from actbox_guest.guest import saving, shell
def serve(self, r, own=None):
    def send(data, type="archive"):
        shell.outputs.send({{"type": type, "id": r["id"]}}, data)
    report = saving._report
{}
saving.Saving.serve = serve
"""


def lie(body: str) -> str:
    return LIE.format(indented(body))


@pytest.fixture
def file(tmp_path: Path) -> Generator[Path]:
    """A place for a state, beside which nothing hidden is left."""
    folder = tmp_path / "states"
    folder.mkdir()
    yield folder / "state"
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []  # noqa: PTH208 - names are wanted


async def give_cloudpickle(executor: CodeExecutor) -> None:
    """Make cloudpickle importable inside, whatever the environment has."""
    folder = Path(cloudpickle.__file__).parent
    await executor.upload_directory(f"skills/private/{executor.key}/cloudpickle", folder)


async def test_variables_imports_and_the_working_folder_survive(
    client: CodeExecutor, make_executor: MakeExecutor, file: Path
) -> None:
    await text_of(
        client,
        "import math, numpy as np, os.path as osp, os\n"
        "x = 1; shared = [x]; same = {'it': shared}; array = np.arange(1000.0); _own = 'kept'; 3 + 4\n"
        "os.makedirs('/tmp/here', exist_ok=True); os.chdir('/tmp')",
    )
    saved = await client.save(file)
    assert saved.names == ("math", "np", "osp", "os", "x", "shared", "same", "array", "_own")
    assert saved.left_out == {}
    assert file.stat().st_mode & 0o777 == 0o600
    async with make_executor() as other:
        restored = await other.restore(file)
        assert set(restored.names) == set(saved.names)
        assert restored.left_out == {}
        code = "print(x, same['it'] is shared, array.sum(), math.pi > 3, np is not None, osp.sep, os.getcwd(), _own)"
        assert await text_of(other, code) == "1 True 499500.0 True True / /tmp kept"
        assert await text_of(other, "print(In[-1][:5], __name__)") == "print __main__"


async def test_functions_and_classes_of_cells_survive_and_live_in_the_session(
    client: CodeExecutor, make_executor: MakeExecutor, file: Path
) -> None:
    await give_cloudpickle(client)
    await text_of(
        client,
        "import math\nscale = 2\n"
        "def area(r, *, n=1): return math.pi * r ** 2 * scale * n\n"
        "def counter():\n    count = 0\n"
        "    def step():\n        nonlocal count\n        count += 1\n        return count\n"
        "    return step\n"
        "class Point:\n    def __init__(self, x): self.x = x\n    def far(self): return area(self.x)\n"
        "class Named(Point):\n    def far(self): return super().far() + 1\n"
        "p = Named(1); step = counter(); step()",
    )
    saved = await client.save(file)
    assert saved.left_out == {}
    async with make_executor() as other:
        await give_cloudpickle(other)
        await text_of(other, "scale = 7; mine = 'stays'")
        await other.restore(file)
        assert await text_of(other, "print(round(area(1), 2), type(p) is Named, step(), step(), mine)") == (
            "6.28 True 2 3 stays"
        )
        # Its globals are the session's, as they were before: what a cell changes, it sees.
        assert await text_of(other, "scale = 1\nprint(round(area(1), 2), round(p.far(), 2))") == "3.14 4.14"
        await other.save(file)
        await client.restore(file)
        assert await text_of(client, "print(scale, step())") == "1 4"


async def test_what_cannot_be_saved_is_told_with_the_reason(
    client: CodeExecutor, make_executor: MakeExecutor, file: Path
) -> None:
    await text_of(
        client,
        "import threading\nlock = threading.Lock(); kept = 1; gen = (i for i in []); nested = [1, lock]\n"
        "class Bad:\n    def __reduce__(self): raise ValueError('\\x1b[2Jno')\nbad = Bad()",
    )
    saved = await client.save(file)
    assert {"lock", "gen", "nested", "bad"} <= saved.left_out.keys()
    assert "lock" in saved.left_out["lock"]
    assert "\x1b" not in saved.left_out["bad"]
    assert {"threading", "kept"} <= set(saved.names)
    async with make_executor() as other:
        await other.restore(file)
        assert await text_of(other, "print(kept, 'lock' in globals())") == "1 False"


async def test_without_cloudpickle_it_says_what_needs_it(executor: CodeExecutor, file: Path) -> None:
    await text_of(
        executor,
        "import sys; sys.modules['cloudpickle'] = None\nclass Mine: pass\nmine = Mine()\ndef f(): pass\nkept = [1]",
    )
    saved = await executor.save(file)
    assert saved.left_out.keys() == {"Mine", "mine", "f"}
    assert "cloudpickle" in saved.left_out["f"]
    assert saved.names == ("sys", "kept")


async def test_a_folder_that_is_gone_is_told(executor: CodeExecutor, make_executor: MakeExecutor, file: Path) -> None:
    await text_of(executor, "import os; os.mkdir('/tmp/gone'); os.chdir('/tmp/gone')")
    await executor.save(file)
    async with make_executor() as other:
        assert (await other.restore(file)).left_out == {"os.getcwd()": "/tmp/gone: No such file or directory"}


async def test_a_folder_of_the_sessions_own_is_the_other_sessions_own(
    executor: CodeExecutor, make_executor: MakeExecutor, file: Path
) -> None:
    async with make_executor() as other:
        await text_of(other, "import os; os.mkdir('work')")
        await executor.save(file)
        assert (await other.restore(file)).left_out == {}
        await text_of(executor, "import os; os.mkdir('work'); os.chdir('work')")
        await executor.save(file)
        assert (await other.restore(file)).left_out == {}
        assert await text_of(other, "print(os.getcwd())") == f"/app/skills/private/{other.key}/work"


async def test_a_file_is_replaced_whole_and_never_through_a_link(executor: CodeExecutor, file: Path) -> None:
    file.write_text("old")
    with file.open() as reader:
        await executor.save(file)
        assert reader.read() == "old"
    link = file.with_name("link")
    link.symlink_to(file.with_name("elsewhere"))
    folder = file.with_name("folder")
    folder.mkdir()
    for place in (link, folder, file / "below", file.parent / "missing" / "file"):
        with pytest.raises(LocalPathError):
            await executor.save(place)
    with pytest.raises(LocalPathError):
        await executor.restore(link)
    assert not file.with_name("elsewhere").exists()
    with pytest.raises(LocalPathMissing):
        await executor.restore(file.with_name("nowhere"))


async def test_a_state_larger_than_allowed_leaves_the_old_file(client: CodeExecutor, file: Path) -> None:
    await client.save(file)
    before = file.read_bytes()
    await text_of(client, "large = bytes(1 << 20)")
    with pytest.raises(StateRefused, match="more than the 100000 bytes allowed"):
        await client.save(file, max_bytes=100_000)
    assert file.read_bytes() == before
    assert await text_of(client, "print(len(large))") == "1048576"


async def test_saving_ends_in_time_and_leaves_nothing(client: CodeExecutor, file: Path) -> None:
    await text_of(client, "class Slow:\n    def __reduce__(self):\n        while True: pass\nslow = Slow(); x = 1")
    with pytest.raises(ExecutionTimeout) as caught:
        await client.save(file, 0.3)
    assert caught.value.state_kept
    assert not file.exists()
    assert await text_of(client, "print(x)") == "1"


def forged(state: bytes, version: int = 1, size: int | None = None, digest: bytes | None = None) -> bytes:
    whole = hashlib.sha256(state).digest()
    return saving._PREAMBLE.pack(saving._MAGIC, version, len(state) if size is None else size, digest or whole) + state


async def test_a_corrupt_or_foreign_file_is_refused_before_anything_changed(client: CodeExecutor, file: Path) -> None:
    await text_of(client, "x = 'saved'")
    await client.save(file)
    good = file.read_bytes()
    torn = bytearray(good)
    torn[-5] ^= 1
    await text_of(client, "x = 'newer'")
    for content, reason in [
        (b"", "no file that save"),
        (b"PK\x03\x04" * 100, "no file that save"),
        (good[:30], "no file that save"),
        (good[:-1], "corrupt"),
        (good + b"x", "corrupt"),
        (bytes(torn), "corrupt: its checksum"),
        (forged(b"abc", version=2), "version 2 of the format"),
        (forged(b""), "does not begin"),
        (forged(b"\xff" * 99), "does not begin"),
        (forged(b"\0\0\0\x02[]"), "does not begin"),
        (forged(b'\0\0\0\x3f{"library":"pickle","python":[3,9],"modules":{},"cwd":null}    '), "saved by Python 3.9"),
    ]:
        file.write_bytes(content)
        with pytest.raises(StateRefused, match=reason):
            await client.restore(file)
    assert await text_of(client, "print(x)") == "newer"


async def test_a_file_that_fails_half_way_changes_nothing(
    client: CodeExecutor, make_executor: MakeExecutor, file: Path
) -> None:
    await give_cloudpickle(client)
    (client.working_dir / "skill.py").write_text("class Thing: pass")
    await text_of(client, "import skill as _s\nglobal_x = 1\ndef f(): return global_x\nthing = _s.Thing(); del _s")
    await client.save(file)
    async with make_executor() as other:
        await give_cloudpickle(other)
        await text_of(other, "global_x = 'mine'")
        with pytest.raises(StateRefused, match="No module named 'skill'"):
            await other.restore(file)
        assert await text_of(other, "print(global_x, 'f' in globals())") == "mine False"
        (other.working_dir / "skill.py").write_text("class Thing: pass")
        await other.restore(file)
        assert await text_of(other, "print(f(), type(thing).__name__)") == "1 Thing"


async def test_a_file_that_runs_for_ever_is_interrupted(executor: CodeExecutor, file: Path) -> None:
    await give_cloudpickle(executor)
    await text_of(
        executor,
        "x = 'old'\nclass Slow:\n    def __reduce__(self): return exec, ('while True: pass',)\ns = Slow()",
    )
    await executor.save(file)
    await text_of(executor, "x = 'new'")
    with pytest.raises(ExecutionTimeout) as caught:
        await executor.restore(file, 0.3)
    assert caught.value.state_kept
    assert await text_of(executor, "print(x)") == "new"


LYING_STATES = [
    "send(b'\\xff\\xff\\xff\\xff')",
    "send(report([1], {}))",
    "send(report(['x'], {'y': 1}))",
    "send(report(['x'] * 20000, {}))",
    "pass",
    "send(report([], {}))\nwhile True: send(bytes(200000))",
]


async def test_a_kernel_that_lies_about_its_state_leaves_no_file(client: CodeExecutor, file: Path) -> None:
    for body in LYING_STATES:
        await client.execute(lie(body))
        with pytest.raises(ProtocolError):
            await client.save(file, SECONDS, max_bytes=1 << 20)
        assert not file.exists()


async def test_what_is_said_of_a_state_is_printable(executor: CodeExecutor, file: Path) -> None:
    await executor.execute(lie("send(report(['\\x1b[2J'], {'\\n': '\\x07'}))"))
    told = await executor.save(file)
    assert (told.names, told.left_out) == (("\\x1b[2J",), {"\\n": "\\x07"})


async def test_what_cannot_be_asked_is_said_before_anything_is_done(executor: CodeExecutor, file: Path) -> None:
    for call in (executor.save(""), executor.save(file, max_bytes=-1), executor.save(file, 0)):
        with pytest.raises(InvalidArgument):
            await call
    await executor.disconnect()
    with pytest.raises(StateError):
        await executor.save(file)


@pytest.mark.usefixtures("default_engine")
@pytest.mark.timeout(60)
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=55
    )
    assert done.returncode == 0, done.stderr
    assert "left out: lock" in done.stdout
    assert "there again: 5 False" in done.stdout

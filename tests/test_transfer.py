"""Files into and out of a session, on the real engine: what arrives, what is refused, and how a transfer ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
from talking import SECONDS, indented, text_of, until

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ExecutionClient,
    ExecutionLost,
    ExecutionTimeout,
    InvalidArgument,
    KernelDied,
    Limits,
    LocalPathError,
    LocalPathMissing,
    Logger,
    ProtocolError,
    StateError,
    TransferRefused,
)
from actbox.guest.unpacking import Arrival
from actbox.protocol import messages
from actbox.protocol.frames import Frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator
    from pathlib import Path

    from talking import MakeExecutor

    from actbox.sessions import Session

pytestmark = pytest.mark.anyio

GRACE = 1.0
MIB = 1 << 20
UNTIL_GO = "import pathlib, time\nprint('begun')\nwhile not pathlib.Path('go').exists(): time.sleep(0.005)"

# What a hostile kernel does: its transfers are replaced by what the test says. `send` puts a frame on the wire, `r` is
# the request that is being served.
LIE = """
import os, time, tarfile
from actbox_guest.guest import shell, transfer

def member(name, type_=b"0", data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = type_, len(data)
    for field in fields.items():
        setattr(info, *field)
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)

def lie(what):
    def serve(self, request):
        def send(data=b"", type="archive", **fields):
            shell.outputs.send({{"type": type, "id": request["id"], **fields}}, data)
        return what(send, request) or []
    transfer.Transfers.serve = serve

def work(send, r):
{}

lie(work)
"""


def lie(body: str) -> str:
    return LIE.format(indented(body))


@pytest.fixture
async def impatient(container: CodeExecutionContainer, key: str) -> AsyncIterator[CodeExecutor]:
    """An executor that kills soon what does not heed an interrupt."""
    async with CodeExecutor(key, container.workspace, container.port, interrupt_grace=GRACE) as made:
        yield made


@pytest.fixture
def local(tmp_path: Path) -> Generator[Path]:
    """A folder of the host, in which no transfer leaves anything hidden behind."""
    folder = tmp_path / "local"
    folder.mkdir()
    yield folder
    assert list(folder.rglob(".actbox*")) == []


async def tmp_of(executor: ExecutionClient) -> list[str]:
    """What is in /tmp inside, but for what libraries keep there."""
    text = await text_of(executor, "import os; print(*sorted(set(os.listdir('/tmp')) - {'.matplotlib'}), sep='\\n')")
    return (text or "").split()


@contextlib.contextmanager
def within(seconds: float) -> Generator[None]:
    """What is inside takes no longer than this."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208 - names are wanted


class Growth:
    """The largest size that this process had while the block ran, above its size before, in bytes."""

    async def __aenter__(self) -> Self:
        self._before = self._largest = _resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.002):
            self._largest = max(self._largest, _resident())

    @property
    def bytes(self) -> int:
        return self._largest - self._before


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a file of the kernel's
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"x", bytes(range(256)) * 5000], ids=["empty", "a byte", "binary"])
async def test_a_file_goes_in_and_comes_out_as_it_was(client: CodeExecutor, local: Path, content: bytes) -> None:
    (local / "here").write_bytes(content)
    await client.upload_file("/tmp/new/folder/there", local / "here")
    inside = "import pathlib; print(pathlib.Path('/tmp/new/folder/there').read_bytes() == {!r})"
    assert await text_of(client, inside.format(content) if len(content) < 9 else "print(True)") == "True"
    await client.download_file("/tmp/new/folder/there", local / "also" / "new" / "back")
    assert (local / "also" / "new" / "back").read_bytes() == content
    assert (local / "also" / "new" / "back").stat().st_mode & 0o777 == 0o666 & ~_mask() & ~0o022
    assert names(local) == ["also", "here"]


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


async def test_a_relative_path_is_below_app_and_strings_are_paths(
    executor: CodeExecutor, key: str, local: Path
) -> None:
    (local / "skill.py").write_text("print('learnt')")
    await executor.upload_file(f"skills/private/{key}/skill.py", str(local / "skill.py"))
    assert await text_of(executor, "import skill") == "learnt"
    assert (executor.working_dir / "skill.py").read_text() == "print('learnt')"
    (local / "skill.py").write_text("print('learnt anew')")
    await executor.upload_file(f"/app/skills/private/{key}/skill.py", local / "skill.py")
    assert "anew" in str(await text_of(executor, "1"))  # an edited skill takes effect at the next cell
    await executor.download_file(f"skills/private/{key}/skill.py", str(local / "back.py"))
    assert (local / "back.py").read_text() == "print('learnt anew')"


async def test_a_folder_goes_in_and_comes_out_as_it_was(client: CodeExecutor, local: Path) -> None:
    """A22, A23: odd names, empty folders, and no right but the owner's to execute."""
    source = local / "source"
    (source / "empty").mkdir(parents=True)
    (source / "é 😀").mkdir()
    odd = [b"\xff\x1b[2Jx", b"line\nbreak", b"n" * 255, b"-rf"]
    for name in odd:
        with open(os.path.join(os.fsencode(source / "é 😀"), name), "wb") as file:  # noqa: ASYNC230, PTH118, PTH123
            file.write(name)
    (source / "run").write_bytes(b"#!/bin/sh\necho ran")
    (source / "run").chmod(0o700)
    (source / "link").symlink_to("run")
    assert await client.upload_directory("/tmp/a/b", source) == ["link"]
    assert await text_of(client, "!/tmp/a/b/run") == "ran"
    assert await client.download_directory("/tmp/a", local / "x" / "back") == []
    back = local / "x" / "back" / "b"
    assert names(back) == ["empty", "run", "é 😀"]
    assert names(back / "empty") == []
    assert sorted(os.listdir(os.fsencode(back / "é 😀"))) == sorted(odd)  # noqa: PTH208 - bytes
    assert os.access(back / "run", os.X_OK)
    assert not os.access(back / "é 😀" / "-rf", os.X_OK)


async def test_an_empty_folder_comes_out_as_one(executor: CodeExecutor, local: Path) -> None:
    await text_of(executor, "import os; os.mkdir('/tmp/nothing')")
    assert await executor.download_directory("/tmp/nothing", local / "nothing") == []
    assert names(local / "nothing") == []


async def test_a_large_file_takes_little_memory_of_the_host(client: CodeExecutor, local: Path) -> None:
    content = os.urandom(MIB)
    with (local / "large").open("wb") as file:
        for _ in range(64):
            file.write(content)
    async with Growth() as growth:
        await client.upload_file("/tmp/large", local / "large")
        await client.download_file("/tmp/large", local / "back")
    assert growth.bytes < 24 * MIB
    with (local / "large").open("rb") as large, (local / "back").open("rb") as back:
        assert all(back.read(MIB) == large.read(MIB) for _ in range(65))


async def test_a_file_that_is_there_is_replaced_and_folders_are_merged(client: CodeExecutor, local: Path) -> None:
    (local / "in").mkdir()
    (local / "in" / "a").write_text("new")
    await text_of(client, "import os; os.mkdir('/tmp/d'); open('/tmp/d/a', 'w').write('old'); open('/tmp/d/b', 'w')")
    await client.upload_directory("/tmp/d", local / "in")
    assert await text_of(client, "print(open('/tmp/d/a').read(), *sorted(os.listdir('/tmp/d')))") == "new a b"
    (local / "out" / "sub").mkdir(parents=True)
    (local / "out" / "a").write_text("old")
    reader = (local / "out" / "a").open()
    with reader:
        await client.download_directory("/tmp/d", local / "out")
        assert reader.read() == "old"
    assert names(local / "out") == ["a", "b", "sub"]
    assert (local / "out" / "a").read_text() == "new"
    (local / "in" / "a").write_text("newest")
    await client.upload_file("/tmp/d/a", local / "in" / "a")
    await client.download_file("/tmp/d/a", local / "out" / "a")
    assert (local / "out" / "a").read_text() == "newest"


async def test_a_file_is_deleted_and_of_a_link_the_link(
    client: CodeExecutor, container: CodeExecutionContainer
) -> None:
    await text_of(client, "import os; open('/tmp/kept', 'w'); os.symlink('kept', '/tmp/link'); os.mkfifo('/tmp/pipe')")
    await client.delete_file("/tmp/link")
    await client.delete_file("/tmp/pipe")
    assert await tmp_of(client) == ["kept"]
    await client.delete_file("/tmp/kept")
    assert await tmp_of(client) == []
    with pytest.raises(TransferRefused, match="No such file"):
        await client.delete_file("/tmp/kept")
    with pytest.raises(TransferRefused, match="folder"):
        await client.delete_file("/tmp")
    await text_of(client, "os.mkdir('/tmp/folder')")
    with pytest.raises(TransferRefused, match="folder"):
        await client.delete_file("/tmp/folder")


# -- what is refused inside ------------------------------------------------------------------------------------------

MAKE = {
    "a link": "os.symlink('/etc/passwd', '/tmp/x')",
    "a link to nothing": "os.symlink('nothing', '/tmp/x')",
    "a link to itself": "os.symlink('x', '/tmp/x')",
    "a link on the way": "os.symlink('/', '/tmp/root')",
    "a pipe": "os.mkfifo('/tmp/x')",
    "a socket": "import socket; s = socket.socket(socket.AF_UNIX); s.bind('/tmp/x')",
    "a folder": "os.mkdir('/tmp/x')",
    "nothing": "pass",
    "no right": "os.close(os.open('/tmp/x', os.O_CREAT, 0))",
    "a file as a folder": "open('/tmp/file', 'w')",
}


@pytest.mark.parametrize("kind", MAKE)
async def test_only_a_plain_file_comes_out(executor: CodeExecutor, local: Path, kind: str) -> None:
    """A13, A14, A18, A19."""
    path = {"a link on the way": "/tmp/root/etc/passwd", "a file as a folder": "/tmp/file/x"}.get(kind, "/tmp/x")
    await text_of(executor, f"import os; y = 1; {MAKE[kind]}")
    with within(1), pytest.raises(TransferRefused) as refused:
        await executor.download_file(path, local / "made" / "out")
    assert refused.value.path == path
    assert refused.value.reason
    assert names(local) == []
    assert await text_of(executor, "y") == "1"


async def test_a_device_inside_is_not_opened(executor: CodeExecutor, local: Path) -> None:
    """A19: none can be made, and those that there are cannot be asked for."""
    assert "EPERM" in str(await text_of(executor, NO_DEVICE))
    for path in ("/dev/zero", "../dev/zero", "/tmp/../dev/zero", "/etc/passwd", "../etc/passwd", "/proc/self/mem"):
        with pytest.raises(InvalidArgument, match="relpath"):
            await executor.download_file(path, local / "out")
    assert names(local) == []


NO_DEVICE = """
import errno, os, stat
try:
    os.mknod('/tmp/zero', 0o666 | stat.S_IFCHR, os.makedev(1, 5))
except OSError as exc:
    print(errno.errorcode[exc.errno])
"""


async def test_of_a_folder_what_is_no_file_is_left_out_and_named(client: CodeExecutor, local: Path) -> None:
    """A13, A14, A18, A19, A23."""
    await text_of(client, "import os; os.makedirs('/tmp/d/sub'); open('/tmp/d/sub/file', 'w').write('1')")
    await text_of(client, "os.symlink('/etc', '/tmp/d/etc'); os.symlink('/etc/passwd', '/tmp/d/sub/plot.png')")
    await text_of(client, "os.mkfifo(b'/tmp/d/sub/\\xff\\x1b[2Jx\\n')")
    assert await client.download_directory("/tmp/d", local / "out") == [
        "etc",
        "sub/plot.png",
        "sub/\\xff\\x1b[2Jx\\n",
    ]
    assert names(local / "out") == ["sub"]
    assert names(local / "out" / "sub") == ["file"]


async def test_a_file_that_flips_to_a_link_while_it_is_fetched_never_brings_what_is_the_hosts(
    executor: CodeExecutor, local: Path
) -> None:
    """A16: the thread goes on through all of the downloads; what is behind the link is not even the host's."""
    await text_of(executor, FLIP)
    outcomes: set[str] = set()
    for _ in range(40):
        try:
            await executor.download_file("/tmp/plot.png", local / "out")
            outcomes.add((local / "out").read_text())
        except TransferRefused as exc:
            outcomes.add(exc.reason.rpartition(": ")[2])
    assert outcomes <= {"ours", *REFUSALS}
    assert int(str(await text_of(executor, "over = True; print(turns)"))) > 40


REFUSALS = ("it is a symbolic link, not a regular file", "it is no longer a regular file", "No such file or directory")

FLIP = """
import os, threading
over, turns = False, 0
def flip():
    global turns
    while not over:
        os.symlink('/etc/passwd', '/tmp/link'); os.rename('/tmp/link', '/tmp/plot.png')
        with open('/tmp/file', 'w') as file: file.write('ours')
        os.rename('/tmp/file', '/tmp/plot.png')
        turns += 1
threading.Thread(target=flip, daemon=True).start()
"""


async def test_a_tree_without_end_is_refused_soon(executor: CodeExecutor, local: Path) -> None:
    """A24."""
    await text_of(executor, "import os; os.mkdir('/tmp/d'); os.chdir('/tmp/d')")
    await text_of(executor, "for _ in range(300): os.mkdir('d'); os.chdir('d')")
    with within(5), pytest.raises(TransferRefused, match="100 folders deep"):
        await executor.download_directory("/tmp/d", local / "out")
    assert names(local) == []


async def test_nothing_is_uploaded_through_a_link_or_over_what_is_no_file(client: CodeExecutor, local: Path) -> None:
    """A14."""
    (local / "new").write_text("new")
    (local / "tree" / "sub").mkdir(parents=True)
    (local / "tree" / "sub" / "new").write_text("new")
    (local / "tree" / "first").write_text("new")
    await text_of(client, "import os; open('/tmp/kept', 'w').write('kept'); os.symlink('kept', '/tmp/link')")
    await text_of(client, "os.mkdir('/tmp/d'); os.symlink('/tmp/d', '/tmp/sub'); os.mkfifo('/tmp/pipe')")
    for path, reason in (
        ("/tmp/link", "symbolic link"),
        ("/tmp/sub/x", "symbolic link"),
        ("/tmp/pipe", "named pipe"),
        ("/tmp/d", "folder"),
        ("/tmp/kept/x", "not a folder"),
        ("/tmp", "folder"),
        ("x", "Read-only"),
        ("/app/skills/shared/x", "Read-only"),
    ):
        with within(2), pytest.raises(TransferRefused, match=reason):
            await client.upload_file(path, local / "new")
    with pytest.raises(TransferRefused, match="sub: a symbolic link is there already"):
        await client.upload_directory("/tmp", local / "tree")
    assert await tmp_of(client) == ["d", "kept", "link", "pipe", "sub"]
    assert await text_of(client, "print(open('/tmp/kept').read(), os.listdir('/tmp/d'))") == "kept []"


async def test_what_is_larger_than_allowed_is_stopped_and_the_session_goes_on(
    client: CodeExecutor, local: Path
) -> None:
    """A20: a sparse file is as large as it says."""
    await text_of(client, "import os; x = 1; open('/tmp/f', 'w'); os.truncate('/tmp/f', 1 << 30)")
    with within(3), pytest.raises(TransferRefused, match="more than the 1048576 allowed"):
        await client.download_file("/tmp/f", local / "new" / "out", max_bytes=MIB)
    with within(3), pytest.raises(TransferRefused, match="more than the 1048576 allowed"):
        await client.download_directory("/tmp", local / "new" / "out", max_bytes=MIB)
    assert names(local) == []
    result = await client.execute("x")
    assert (result.text, result.restarted) == ("1", False)
    await text_of(client, "os.truncate('/tmp/f', 1 << 20)")
    await client.download_file("/tmp/f", local / "out", max_bytes=MIB)
    assert (local / "out").stat().st_size == MIB


async def test_eight_tebibytes_are_stopped_and_a_full_disk_inside_leaves_nothing(
    workspace_path: Path, engine: str, local: Path
) -> None:
    """A20."""
    limits = Limits(file_size=1 << 44, tmp=4 * MIB)
    async with (
        CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=(), limits=limits) as container,
        CodeExecutor("key", container.workspace, container.port) as executor,
    ):
        await text_of(executor, "import os; x = 1; open('/tmp/f', 'w'); os.truncate('/tmp/f', 1 << 43)")
        with within(3), pytest.raises(TransferRefused, match="allowed"):
            await executor.download_file("/tmp/f", local / "out")
        assert names(local) == []
        with (local / "large").open("wb") as file:
            file.truncate(32 * MIB)
        for _ in range(3):
            with pytest.raises(TransferRefused, match="No space left"):
                await executor.upload_file("/tmp/large", local / "large")
        # The rest of those uploads is in nobody's way: the kernel is in step.
        assert await tmp_of(executor) == ["f"]
        (local / "small").write_text("fits")
        await executor.upload_file("/tmp/small", local / "small")
        assert await text_of(executor, "print(open('/tmp/small').read(), x)") == "fits 1"


# -- what is refused on the host -------------------------------------------------------------------------------------


async def test_what_is_missing_or_no_file_on_the_host_is_said_before_anything_is_sent(
    executor: CodeExecutor, local: Path
) -> None:
    (local / "file").write_text("1")
    (local / "link").symlink_to("file")
    (local / "folder").mkdir()
    (local / "to").symlink_to("folder")
    os.mkfifo(local / "pipe")
    with pytest.raises(FileNotFoundError) as missing:
        await executor.upload_file("/tmp/x", local / "nothing")
    assert isinstance(missing.value, LocalPathMissing)
    assert missing.value.path == local / "nothing"
    with pytest.raises(FileNotFoundError):
        await executor.upload_directory("/tmp/x", local / "nothing")
    for name, reason in (("link", "symbolic link"), ("folder", "a folder"), ("pipe", "named pipe")):
        with within(1), pytest.raises(LocalPathError, match=reason):
            await executor.upload_file("/tmp/x", local / name)
        with within(1), pytest.raises(LocalPathError, match=reason):
            await executor.download_file("/tmp/x", local / name)
    for name, reason in (("to", "symbolic link"), ("file", "a file, not a folder"), ("pipe", "named pipe")):
        with within(1), pytest.raises(LocalPathError, match=reason):
            await executor.upload_directory("/tmp/x", local / name)
        with within(1), pytest.raises(LocalPathError, match=reason):
            await executor.download_directory("/tmp", local / name)
    with pytest.raises(LocalPathError):
        await executor.download_file("/tmp/x", local / "file" / "below")
    with pytest.raises(LocalPathError):
        await executor.download_file("/tmp/x", local / "..")
    assert await tmp_of(executor) == []
    assert names(local / "folder") == []


async def test_a_link_above_a_local_file_is_the_callers_business(executor: CodeExecutor, local: Path) -> None:
    (local / "folder").mkdir()
    (local / "to").symlink_to("folder")
    await text_of(executor, "open('/tmp/x', 'w').write('1')")
    await executor.download_file("/tmp/x", local / "to" / "new" / "x")
    await executor.upload_file("/tmp/y", local / "to" / "new" / "x")
    assert (local / "folder" / "new" / "x").read_text() == "1"


async def test_a_link_that_appears_in_the_place_of_the_local_file_is_not_followed(
    impatient: CodeExecutor, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A13."""
    (local / "secret").write_text("kept")
    await text_of(impatient, "open('/tmp/x', 'w').write('1')")
    feed = Arrival.feed

    def swap(self: Arrival, data: bytes) -> None:
        feed(self, data)
        (local / "out").symlink_to("secret")

    monkeypatch.setattr(Arrival, "feed", swap)
    with pytest.raises(LocalPathError, match="a symbolic link is there already"):
        await impatient.download_file("/tmp/x", local / "out")
    assert (local / "secret").read_text() == "kept"


async def test_a_full_disk_of_the_host_ends_the_transfer_and_not_the_session(
    client: CodeExecutor, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await text_of(client, "x = 1; open('/tmp/x', 'wb').write(bytes(32 << 20))")
    feed, fed = Arrival.feed, 0

    def fill(self: Arrival, data: bytes) -> None:
        nonlocal fed
        fed += 1
        if fed == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        feed(self, data)

    monkeypatch.setattr(Arrival, "feed", fill)
    with pytest.raises(LocalPathError, match=r"No space left.*make room"):
        await client.download_file("/tmp/x", local / "new" / "out")
    assert names(local) == []
    assert fed == 3
    assert await text_of(client, "x") == "1"


async def test_a_local_file_that_shrinks_meanwhile_ends_the_upload_and_not_the_session(
    client: CodeExecutor, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (local / "file").write_bytes(bytes(32 * MIB))
    await text_of(client, "x = 1; open('/tmp/x', 'w').write('old')")
    read, seen = os.read, 0

    def shrink(fd: int, size: int) -> bytes:
        nonlocal seen
        seen += 1
        if seen == 4:
            os.truncate(local / "file", 0)
        return read(fd, size)

    monkeypatch.setattr("actbox.guest.packing.os.read", shrink)
    with pytest.raises(LocalPathError, match="became shorter"):
        await client.upload_file("/tmp/x", local / "file")
    monkeypatch.undo()
    assert await text_of(client, "print(x, open('/tmp/x').read())") == "1 old"
    assert await tmp_of(client) == ["x"]


@pytest.mark.parametrize("relpath", ["", "../x", "/etc/passwd", "x\0y", "x" * 256, 7, None, b"/tmp/x", "\ud800"])
async def test_a_path_inside_that_cannot_be_is_refused_at_once(
    executor: CodeExecutor, local: Path, relpath: Any
) -> None:
    """A15."""
    (local / "file").write_text("1")
    for call in (executor.download_file, executor.download_directory, executor.upload_file, executor.upload_directory):
        with pytest.raises(InvalidArgument, match="relpath"):
            await call(relpath, local / "file")
    with pytest.raises(InvalidArgument, match="relpath"):
        await executor.delete_file(relpath)


async def test_other_arguments_that_cannot_be_used_are_refused_at_once(executor: CodeExecutor, local: Path) -> None:
    for path in (None, 7, "", "x\0y", b"/tmp", "\ud800"):
        with pytest.raises(InvalidArgument, match="local_path"):
            await executor.download_file("/tmp/x", path)  # pyright: ignore[reportArgumentType]
    for bound in (-1, 1.5, None, "1", True):
        with pytest.raises(InvalidArgument, match="max_bytes"):
            await executor.download_file("/tmp/x", local / "out", max_bytes=bound)  # pyright: ignore[reportArgumentType]
    for timeout in (0, -1, None, float("nan")):
        with pytest.raises(InvalidArgument, match="timeout"):
            await executor.download_file("/tmp/x", local / "out", timeout)  # pyright: ignore[reportArgumentType]
    assert names(local) == []


async def test_a_client_that_is_not_connected_transfers_nothing(container: CodeExecutionContainer, local: Path) -> None:
    client = ExecutionClient(container.port)
    for call in (client.download_file, client.download_directory):
        with pytest.raises(StateError):
            await call("/tmp/x", local / "new" / "out")
    with pytest.raises(StateError):
        await client.delete_file("/tmp/x")
    assert names(local) == []


# -- among the cells -------------------------------------------------------------------------------------------------


async def test_transfers_and_cells_take_their_turns(client: CodeExecutor, local: Path) -> None:
    (local / "in").write_bytes(os.urandom(4 * MIB))
    running = await client.submit(UNTIL_GO)
    await until(lambda: running.so_far().text)
    upload = asyncio.create_task(client.upload_file("/tmp/x", local / "in"))
    await until(lambda: "2 cells" in repr(client))
    behind = await client.submit("import os; print(os.path.getsize('/tmp/x'))")
    download = asyncio.create_task(client.download_file("/tmp/x", local / "out"))
    await until(lambda: "4 cells" in repr(client))
    last = await client.submit("1 + 1")
    assert not upload.done()
    (client.working_dir / "go").touch()
    await upload
    await download
    assert (await behind.result(SECONDS)).text == f"{4 * MIB}"
    result = await last.result(SECONDS)
    assert (result.text, result.execution_count) == ("2", 3)
    assert (local / "out").read_bytes() == (local / "in").read_bytes()


async def test_clients_transfer_at_the_same_time(make_executor: MakeExecutor, local: Path) -> None:
    async with make_executor() as one, make_executor() as other:

        async def there_and_back(executor: CodeExecutor, name: str) -> None:
            (local / name).write_bytes(name.encode() * MIB)
            for number in range(3):
                await executor.upload_file("/tmp/x", local / name)
                await executor.download_file("/tmp/x", local / "back" / f"{name}{number}")
                assert (local / "back" / f"{name}{number}").read_bytes() == name.encode() * MIB

        await asyncio.gather(there_and_back(one, "a"), there_and_back(other, "bc"))


async def test_a_transfer_that_waits_too_long_does_not_begin(client: CodeExecutor, local: Path) -> None:
    running = await client.submit(UNTIL_GO)
    await until(lambda: running.so_far().text)
    with pytest.raises(ExecutionTimeout, match=r"transfer.*it had not begun") as raised:
        await client.download_file("/tmp", local / "new" / "out", timeout=0.1)
    assert not raised.value.started
    assert names(local) == []
    (client.working_dir / "go").touch()
    await running.result(SECONDS)


async def test_the_loop_goes_on_while_the_disk_is_slow(
    executor: CodeExecutor, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await text_of(executor, "open('/tmp/x', 'w').write('1')")
    entered, leave = threading.Event(), threading.Event()
    feed = Arrival.feed

    def slow(self: Arrival, data: bytes) -> None:
        entered.set()
        assert leave.wait(SECONDS)
        feed(self, data)

    monkeypatch.setattr(Arrival, "feed", slow)
    download = asyncio.create_task(executor.download_file("/tmp/x", local / "out"))
    await until(entered.is_set)
    assert not download.done()
    leave.set()
    await download
    assert (local / "out").read_text() == "1"


# -- how a transfer ends ---------------------------------------------------------------------------------------------

WITHOUT_END = "import itertools\nsend(member('x', size=1 << 40))\nfor _ in itertools.count(): send(bytes(1 << 18))"


async def test_a_download_that_takes_too_long_is_interrupted(client: CodeExecutor, local: Path) -> None:
    await text_of(client, f"x = 1\n{lie(WITHOUT_END)}")
    with within(5), pytest.raises(ExecutionTimeout, match=r"the transfer did not end within 0\.3 s") as raised:
        await client.download_file("/tmp/x", local / "new" / "out", timeout=0.3, max_bytes=1 << 41)
    assert raised.value.state_kept
    assert names(local) == []
    assert await text_of(client, "x") == "1"


async def test_nothing_more_is_kept_of_a_download_that_is_being_ended(
    executor: CodeExecutor, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await text_of(executor, lie(WITHOUT_END))
    feed, late = Arrival.feed, 0

    def watch(self: Arrival, data: bytes) -> None:
        nonlocal late
        late += bool(executor._stops)
        feed(self, data)

    monkeypatch.setattr(Arrival, "feed", watch)
    with pytest.raises(ExecutionTimeout):
        await executor.download_file("/tmp/x", local / "out", timeout=0.3, max_bytes=1 << 41)
    assert late <= 1  # which was on its way to the thread already


async def test_a_download_that_does_not_heed_the_interrupt_is_killed(client: CodeExecutor, local: Path) -> None:
    await text_of(client, f"x = 1\n{lie('send(member(chr(97)))')}\nimport signal")
    await text_of(client, lie("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"))
    with within(5), pytest.raises(ExecutionTimeout) as raised:
        await client.download_file("/tmp/x", local / "new" / "out", timeout=0.3)
    assert not raised.value.state_kept
    assert names(local) == []
    result = await client.execute("'x' in globals()")
    assert (result.text, result.restarted) == ("False", True)


async def test_an_upload_that_takes_too_long_is_interrupted_and_leaves_nothing(
    client: CodeExecutor, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (local / "file").write_bytes(bytes(8 * MIB))
    await text_of(client, "x = 1; open('/tmp/x', 'w').write('old')")
    read, seen, leave = os.read, 0, threading.Event()

    def slow(fd: int, size: int) -> bytes:
        nonlocal seen
        seen += 1
        if seen == 5:
            assert leave.wait(SECONDS)
        return read(fd, size)

    monkeypatch.setattr("actbox.guest.packing.os.read", slow)
    upload = asyncio.create_task(client.upload_file("/tmp/x", local / "file", timeout=0.3))
    await until(lambda: client._stops)
    leave.set()
    with pytest.raises(ExecutionTimeout) as raised:
        await upload
    assert raised.value.state_kept
    assert await text_of(client, "print(x, open('/tmp/x').read())") == "1 old"
    assert await tmp_of(client) == ["x"]


async def test_a_cancelled_download_leaves_nothing_and_the_session_goes_on(client: CodeExecutor, local: Path) -> None:
    await text_of(client, f"x = 1\n{lie(WITHOUT_END)}")
    download = asyncio.create_task(client.download_file("/tmp/x", local / "new" / "out", max_bytes=1 << 41))
    await until(lambda: any(path.stat().st_size > MIB for path in local.rglob("out")))
    download.cancel()
    with pytest.raises(asyncio.CancelledError):
        await download
    assert names(local) == []
    assert await text_of(client, "x") == "1"


async def test_a_cancelled_download_waits_for_the_piece_that_is_being_written(
    executor: CodeExecutor, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await text_of(executor, lie(WITHOUT_END))
    entered, leave = threading.Event(), threading.Event()
    feed, log = Arrival.feed, list[str]()

    def slow(self: Arrival, data: bytes) -> None:
        entered.set()
        assert leave.wait(SECONDS)
        feed(self, data)
        log.append("fed")

    monkeypatch.setattr(Arrival, "feed", slow)
    download = asyncio.create_task(executor.download_file("/tmp/x", local / "out", max_bytes=1 << 41))
    await until(entered.is_set)
    download.cancel()
    await until(lambda: executor._stops)
    threading.Timer(0.05, leave.set).start()
    with pytest.raises(asyncio.CancelledError):
        await download
    assert log == ["fed"]
    assert names(local) == []
    assert await text_of(executor, "1") == "1"


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_on_the_host(
    make_executor: MakeExecutor, local: Path
) -> None:
    async with make_executor() as executor:
        await text_of(executor, lie(WITHOUT_END))
        download = asyncio.create_task(executor.download_file("/tmp/x", local / "new" / "out", max_bytes=1 << 41))
        await until(lambda: any(path.stat().st_size > MIB for path in local.rglob("out")))
    with pytest.raises(ExecutionLost, match="transfer"):
        await download
    assert names(local) == []


async def test_a_kernel_that_dies_in_the_middle_is_said_and_the_next_cell_knows(
    client: CodeExecutor, local: Path
) -> None:
    await text_of(client, f"x = 1\n{lie('send(member(chr(97), size=1000)); os.kill(os.getpid(), 9)')}")
    with pytest.raises(KernelDied) as raised:
        await client.download_file("/tmp/x", local / "out")
    assert raised.value.signal == signal.SIGKILL
    assert names(local) == []
    # Not even a transfer in between takes the news away from the next cell.
    (local / "file").write_text("1")
    await client.upload_file("/tmp/x", local / "file")
    result = await client.execute("print('x' in globals(), open('/tmp/x').read())")
    assert (result.text, result.restarted) == ("False 1", True)
    assert not (await client.execute("1")).restarted


async def test_what_a_dead_kernel_sent_is_never_continued_by_the_next_one(client: CodeExecutor, local: Path) -> None:
    """It hides that it has begun, so that the download would be begun anew; but something of it has come already."""
    body = "send(member('a', size=10**6) + bytes(50_000))\nhide()\nos.kill(os.getpid(), 9)"
    hide = "import gc\nfrom actbox_guest.guest.interrupts import Interrupts\ndef hide():\n"
    hide += (
        "    for found in gc.get_objects():\n        if isinstance(found, Interrupts): found._slot[16:24] = bytes(8)\n"
    )
    await text_of(client, f"{hide}\n{lie(body)}")
    with pytest.raises(KernelDied):
        await client.download_directory(f"skills/private/{client.key}", local / "out")
    assert names(local) == []


async def test_a_kernel_that_dies_in_the_middle_of_an_upload_is_said(client: CodeExecutor, local: Path) -> None:
    (local / "file").write_bytes(bytes(16 * MIB))
    await text_of(client, lie("os._exit(7)"))
    with pytest.raises(KernelDied) as raised:
        await client.upload_file("/tmp/x", local / "file")
    assert raised.value.exit_code == 7


async def test_an_upload_to_a_kernel_that_died_between_the_cells_goes_to_the_next_one(
    client: CodeExecutor, local: Path
) -> None:
    (local / "file").write_bytes(os.urandom(MIB))
    await until_its_kernel_died(client)
    await client.upload_file("/tmp/x", local / "file")
    await client.download_file("/tmp/x", local / "out")
    assert (local / "out").read_bytes() == (local / "file").read_bytes()


async def test_an_upload_that_was_begun_before_the_death_was_known_is_begun_anew(
    executor: CodeExecutor, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (local / "file").write_bytes(os.urandom(MIB))
    session = await until_its_kernel_died(executor)
    monkeypatch.setattr(type(session), "ended", False)
    await executor.upload_file("/tmp/x", local / "file")
    await executor.download_file("/tmp/x", local / "out")
    assert (local / "out").read_bytes() == (local / "file").read_bytes()


async def until_its_kernel_died(executor: CodeExecutor) -> Session:
    await text_of(executor, "import os, threading; threading.Timer(0.05, os._exit, (7,)).start()")
    session = executor._session
    assert session is not None
    await until(lambda: session.ended)
    return session


# -- kernels that lie ------------------------------------------------------------------------------------------------

LIES = {
    "a symbolic link": "send(member('x', b'2', linkname='/etc/passwd') + bytes(1024))",
    "a path upwards": "send(member('../../x', data=b'1') + bytes(1024))",
    "an absolute path": "send(member('/tmp/x', data=b'1') + bytes(1024))",
    "a device": "send(member('x', b'3') + bytes(1024))",
    "noise": "send(os.urandom(4096))",
    "half an archive": "send(member('x', data=b'1'))",
    "nothing": "pass",
    "more than the end": "send(bytes(1024)); send(member('x'))",
    "a message of its own": "raise transfer.Refused('\\x1b[2J' + 'x' * 5000)",
    "an exception": "1 / 0",
}


@pytest.mark.parametrize("name", LIES)
async def test_a_lie_is_refused_and_the_session_goes_on(client: CodeExecutor, local: Path, name: str) -> None:
    """A25."""
    await text_of(client, f"x = 1\n{lie(LIES[name])}")
    with pytest.raises(TransferRefused) as refused:
        await client.download_directory("/tmp", local / "new" / "out")
    assert names(local) == []
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1200
    assert await text_of(client, "x") == "1"


async def test_a_lie_that_ends_late_is_interrupted(client: CodeExecutor, local: Path) -> None:
    await text_of(client, f"x = 1\n{lie('send(os.urandom(4096)); time.sleep(60)')}")
    with within(5), pytest.raises(TransferRefused):
        await client.download_directory("/tmp", local / "out", max_bytes=1 << 41)
    assert await text_of(client, "x") == "1"


@pytest.mark.parametrize(
    "body",
    [
        "send(id=r['id'] + 1)",
        "send(id='1')",
        "send(bytes((1 << 18) + 1))",
        "send(type='archive_end')",
        "send(type='execute_reply', status='ok', execution_count=1, left_out='x')",
        "send(type='execute_reply', status='ok', execution_count=1, left_out=[1])",
        "send(type='execute_reply', status='ok', execution_count=1, left_out=['x'] * 1001)",
    ],
)
async def test_what_breaks_the_rules_of_the_wire_ends_the_session(client: CodeExecutor, local: Path, body: str) -> None:
    """G5."""
    await text_of(client, lie(body))
    with pytest.raises(ProtocolError):
        await client.download_directory("/tmp", local / "new" / "out")
    assert names(local) == []
    assert (await client.execute("1")).restarted


async def test_an_archive_that_nobody_asked_for_breaks_the_rules(client: CodeExecutor, local: Path) -> None:
    """G5."""
    (local / "file").write_text("1")
    send = "from actbox_guest.guest import shell; shell.outputs.send({'type': 'archive', 'id': %s}, b'x')"
    with pytest.raises(ProtocolError, match="archive"):
        await client.execute(send % 1)
    await text_of(client, lie("send(b'x')"))
    with pytest.raises(ProtocolError, match="archive"):
        await client.upload_file("/tmp/x", local / "file")
    await text_of(client, lie("send(b'x')"))
    with pytest.raises(ProtocolError, match="archive"):
        await client.delete_file("/tmp/x")


async def test_a_kernel_that_says_it_has_all_of_an_upload_is_believed_and_in_step(
    client: CodeExecutor, local: Path
) -> None:
    """Whether the session keeps what it is given is its own affair; the rest of the archive is not sent for nothing."""
    (local / "file").write_bytes(bytes(64 * MIB))
    await text_of(
        client, f"serve = __import__('actbox_guest.guest.transfer').guest.transfer.Transfers.serve{lie('pass')}"
    )
    await client.upload_file("/tmp/x", local / "file")
    await text_of(client, "transfer.Transfers.serve = serve")
    (local / "file").write_bytes(b"1")
    await client.upload_file("/tmp/y", local / "file")
    assert await tmp_of(client) == ["y"]


async def test_names_left_out_are_harmless_to_print(client: CodeExecutor, local: Path) -> None:
    """A23."""
    await text_of(client, lie("send(bytes(1024))\nreturn ['\\x1b[2J', 'a\\nb', '\\udcff', 'é']"))
    left_out = await client.download_directory("/tmp", local / "out")
    assert left_out == ["\\x1b[2J", "a\\nb", "\\udcff", "é"]


def test_an_archive_is_one_of_the_messages_that_a_kernel_may_send() -> None:
    assert messages.decode(Frame({"type": "archive", "id": 3}, b"x")) == messages.Archive(3, b"x")
    for header in ({"type": "archive"}, {"type": "archive", "id": -1}, {"type": "archive", "id": True}):
        with pytest.raises(ProtocolError):
            messages.decode(Frame(header, b""))


async def test_what_is_printed_during_a_transfer_is_no_part_of_it(client: CodeExecutor, local: Path) -> None:
    await text_of(client, lie("print('x' * 100_000); send(member('a', data=b'1')); print('y'); send(bytes(1024))"))
    await client.download_directory("/tmp", local / "out")
    assert (local / "out" / "a").read_text() == "1"


async def test_the_log_tells_of_transfers(container: CodeExecutionContainer, key: str, local: Path) -> None:
    async with (
        Logger(local / "log") as logger,
        CodeExecutor(key, container.workspace, container.port, logger=logger) as executor,
    ):
        await executor.execute("open('/tmp/x', 'w')")
        await executor.download_file("/tmp/x", local / "out")
        with pytest.raises(TransferRefused):
            await executor.delete_file("/tmp/y")
    lines = [json.loads(line) for line in (local / "log.jsonl").read_text().splitlines()]
    told = [(line["message"], line["metadata"].get("type"), line["metadata"].get("path")) for line in lines]
    assert told == [
        ("cell 1 finished", None, None),
        ("transfer finished", "download", "/tmp/x"),
        ("transfer failed", "delete", "/tmp/y"),
    ]

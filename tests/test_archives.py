"""Archives of anybody's making: what is packed, what is unpacked, and what is refused before a byte of it is kept."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import socket
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actbox.guest import packing, places
from actbox.guest.places import Refused
from actbox.guest.unpacking import MAX_EXTENDED, Arrival, InTheWay

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

SECRET = b"what only the host may read"
END = bytes(1024)
ODD_NAMES = [b"caf\xc3\xa9 \xf0\x9f\x98\x80.txt", b"\xff\x1b[2Jx", b"line\nbreak", b"x" * 255, b".lock", b"-rf", b"a b"]


@contextlib.contextmanager
def opened(folder: Path) -> Generator[int]:
    """A descriptor of a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are wanted


def unpack(data: bytes, folder: Path, piece: int = 1 << 18, **options: Any) -> None:
    """Feed an archive and settle it; whatever happens, nothing half-made and no descriptor is left."""
    before = descriptors()
    try:
        with opened(folder) as fd, contextlib.closing(Arrival(fd, **options)) as arrival:
            for start in range(0, len(data), piece):
                arrival.feed(data[start : start + piece])
            arrival.settle()
    finally:
        assert [name for name in os.listdir(folder) if name.startswith(".actbox")] == []  # noqa: PTH208
        assert descriptors() == before


def pack(folder: Path) -> tuple[bytes, list[str]]:
    left_out: list[str] = []
    with opened(folder) as fd:
        pieces = list(packing.pack_folder(fd, left_out))
    assert all(0 < len(piece) <= packing.CHUNK for piece in pieces)
    return b"".join(pieces), left_out


def pack_one(path: Path) -> bytes:
    fd, _ = places.open_file(None, os.fsencode(path))
    try:
        return b"".join(packing.pack_file(fd))
    finally:
        os.close(fd)


def member(name: str, type_: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any) -> bytes:
    """One member, well-formed but for what `fields` say."""
    info = tarfile.TarInfo(name)
    info.type, info.size = type_, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def extended(records: bytes, size: int | None = None) -> bytes:
    """An extended header with these records."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(records) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + records + bytes(-len(records) % 512)


def record(keyword: bytes, value: bytes) -> bytes:
    size = len(keyword) + len(value) + 3
    length = next(n for n in range(size, size + 10) if len(str(n)) + size == n)
    return b"%d %s=%s\n" % (length, keyword, value)


def tree(folder: Path) -> dict[bytes, Any]:
    """All in a folder: path to content and whether it may be executed, or to None for a folder."""
    found: dict[bytes, Any] = {}
    for here, folders, files in os.walk(os.fsencode(folder)):
        for name in folders:
            found[os.path.relpath(os.path.join(here, name), os.fsencode(folder))] = None  # noqa: PTH118 - bytes
        for name in files:
            path = os.path.join(here, name)  # noqa: PTH118 - bytes
            with open(path, "rb") as file:  # noqa: PTH123 - bytes
                found[os.path.relpath(path, os.fsencode(folder))] = (file.read(), os.access(path, os.X_OK))
    return found


def number_256(value: int) -> bytes:
    """A header's number in the base-256 form, which can be negative."""
    return bytes([0xFF if value < 0 else 0x80]) + (value % (1 << 88)).to_bytes(11, "big")


def with_size(header: bytes, size: bytes) -> bytes:
    """A header with another size and its checksum made right."""
    changed = bytearray(header[:512])
    changed[124:136] = size.ljust(12, b"\0")
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


# -- round trips -----------------------------------------------------------------------------------------------------


def test_what_is_packed_is_unpacked_as_it_was(tmp_path: Path) -> None:
    """A23: names that are no text, drive a terminal, or are as long as a name can be."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source / "empty", source / "a" / "b" / "c", target):
        folder.mkdir(parents=True)
    for number, name in enumerate(ODD_NAMES):
        with open(os.path.join(os.fsencode(source / "a"), name), "wb") as file:  # noqa: PTH118, PTH123 - bytes
            file.write(os.urandom(number * 511))
    (source / "a" / "b" / "c" / "nothing").touch()
    (source / "large").write_bytes(os.urandom(3 * packing.CHUNK + 1))
    (source / "run").write_bytes(b"#!/bin/sh\n")
    (source / "run").chmod(0o700)
    data, left_out = pack(source)
    assert left_out == []
    unpack(data, target)
    assert tree(target) == tree(source)
    assert tree(source)[b"run"] == (b"#!/bin/sh\n", True)
    assert len(tree(source)) == len(ODD_NAMES) + 7


@pytest.mark.parametrize("piece", [1, 511, 512, 513])
def test_an_archive_may_come_in_pieces_of_any_size(tmp_path: Path, piece: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / ("deep" * 30)).mkdir(parents=True)
    (source / ("deep" * 30) / "file").write_bytes(bytes(range(256)) * 5)
    target.mkdir()
    unpack(pack(source)[0], target, piece)
    assert tree(target) == tree(source)


def test_the_packed_is_what_other_programs_call_a_tar_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "é").write_bytes(b"x")
    with tarfile.open(fileobj=io.BytesIO(pack(tmp_path)[0])) as archive:
        assert archive.getnames() == ["a", "a/é"]
        assert {(info.uid, info.gid, info.mtime) for info in archive} == {(0, 0, 0)}


@pytest.mark.parametrize("size", [0, 1, packing.CHUNK - 1536, packing.CHUNK - 512, packing.CHUNK, 1 << 20])
def test_one_file_gets_the_name_that_the_receiver_chose(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "here").write_bytes(content)
    (tmp_path / "to").mkdir()
    unpack(pack_one(tmp_path / "here"), tmp_path / "to", only=b"there", max_bytes=size)
    assert tree(tmp_path / "to") == {b"there": (content, False)}


# -- what is refused -------------------------------------------------------------------------------------------------

MEMBERS = {
    "a symbolic link": member("x", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member("x", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a device": member("x", tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a block device": member("x", tarfile.BLKTYPE),
    "a named pipe": member("x", tarfile.FIFOTYPE),
    "a contiguous file": member("x", tarfile.CONTTYPE),
    "a sparse file": member("x", tarfile.GNUTYPE_SPARSE),
    "an unknown type": member("x", b"Z"),
    "a GNU long name": member("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"../x\0") + member("x"),
    "a GNU long link": member("././@LongLink", tarfile.GNUTYPE_LONGLINK, b"../x\0") + member("x", tarfile.SYMTYPE),
    "a GNU long name of gigabytes": member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=1 << 32),
    "a global header": member("x", tarfile.XGLTYPE, record(b"path", b"/etc/passwd")) + member("y"),
    "a global header of gigabytes": member("x", tarfile.XGLTYPE, size=1 << 32),
    "an absolute path": member("/tmp/x"),
    "a path upwards": member("../x"),
    "a path down and upwards": member("a", tarfile.DIRTYPE) + member("a/../../x"),
    "a path upwards in an extended header": extended(record(b"path", b"../x")) + member("x"),
    "an absolute path in an extended header": extended(record(b"path", b"/tmp/x")) + member("x"),
    "a folder upwards": member("..", tarfile.DIRTYPE),
    "the root": member("/", tarfile.DIRTYPE),
    "the folder itself": member(".", tarfile.DIRTYPE),
    "a path from the folder itself": member("./x"),
    "an empty component": member("a", tarfile.DIRTYPE) + member("a//x"),
    "no name": member(""),
    "an empty name in an extended header": extended(record(b"path", b"")) + member("x"),
    "NUL in a name": extended(record(b"path", b"x\0y")) + member("x"),
    "a name of 256 bytes": member("x" * 256),
    "101 folders": b"".join(member("/".join("d" * depth), tarfile.DIRTYPE) for depth in range(1, 102)),
    "no folder before it": member("a/x"),
    "a file as a folder": member("a") + member("a/x"),
    "a file, then a folder of its name": member("a") + member("a", tarfile.DIRTYPE),
    "a folder, then a file of its name": member("a", tarfile.DIRTYPE) + member("a"),
    "a file twice": member("a", data=b"1") + member("a", data=b"2"),
    "a folder twice": member("a", tarfile.DIRTYPE) + member("a", tarfile.DIRTYPE),
    "a negative size": with_size(member("x"), number_256(-1)),
    "a very negative size": with_size(member("x"), number_256(-(1 << 80))),
    "a negative octal size": with_size(member("x"), b"-1"),
    "a size that is no number": with_size(member("x"), b"12x"),
    "a folder with a size": member("x", tarfile.DIRTYPE, bytes(512)),
    "a negative size of an extended header": with_size(extended(b""), number_256(-512)),
    "a negative size in an extended header": extended(record(b"size", b"-1")) + member("x"),
    "a size of words in an extended header": extended(record(b"size", b"many")) + member("x"),
    "GNU's sparse files in an extended header": extended(record(b"GNU.sparse.major", b"1")) + member("x"),
    "two extended headers": extended(record(b"path", b"y")) * 2 + member("x"),
    "two paths in an extended header": extended(record(b"path", b"y") + record(b"path", b"z")) + member("x"),
    "an extended header without records": extended(b"path=x\n") + member("x"),
    "a record that is longer than its header": extended(b"99 path=x\n") + member("x"),
    "a record that is shorter than its keyword": extended(b"3 path=x\n") + member("x"),
    "a record of no length": extended(b"0 path=x\n") + member("x"),
    "a record that does not end": extended(b"10 path=xx") + member("x"),
    "a huge extended header": extended(b"", size=MAX_EXTENDED + 1),
    "an extended header of gigabytes": extended(b"", size=1 << 33),
    "a wrong checksum": member("x").replace(b"ustar", b"usta!"),
    "noise": b"\xa5" * 512,
}


@pytest.mark.parametrize("name", MEMBERS)
def test_nothing_but_plain_files_and_folders_is_unpacked(tmp_path: Path, name: str) -> None:
    """A25; refused at its header, as nothing more is fed."""
    (tmp_path / "in").mkdir()
    before = member("before", data=b"kept until then")
    with pytest.raises(Refused) as refused:
        unpack(before + MEMBERS[name], tmp_path / "in")
    assert "ends too early" not in str(refused.value)
    assert tree(tmp_path) == {b"in": None}


def test_the_refused_would_be_unpacked_if_it_were_plain(tmp_path: Path) -> None:
    """The cases above fail for what they say, not for how they are made."""
    plain = (
        member("a", tarfile.DIRTYPE)
        + member("a/x", data=b"1")
        + extended(record(b"path", b"a/y") + record(b"mtime", b"1.5") + record(b"size", b"1"))
        + member("z", data=b"2")
        + member("x" * 255)
        + with_size(member("w"), number_256(0))
    )
    unpack(plain + END, tmp_path)
    assert tree(tmp_path) == {
        b"a": None,
        b"a/x": (b"1", False),
        b"a/y": (b"2", False),
        b"x" * 255: (b"", False),
        b"w": (b"", False),
    }


def test_what_is_too_large_is_refused_at_its_header(tmp_path: Path) -> None:
    """A20: 8 TiB are announced; none of them is waited for, and no room is made."""
    huge = member("sparse", size=1 << 43)
    with pytest.raises(Refused, match="more than the 1000 allowed"):
        unpack(huge, tmp_path, max_bytes=1000)
    together = member("a", data=bytes(600)) + member("b", data=bytes(401))
    with pytest.raises(Refused, match="1001 bytes, more than the 1000 allowed"):
        unpack(together + END, tmp_path, max_bytes=1000)
    assert tree(tmp_path) == {}
    unpack(member("a", data=bytes(600)) + member("b", data=bytes(400)) + END, tmp_path, max_bytes=1000)
    assert len(tree(tmp_path)) == 2


@pytest.mark.timeout(120)
def test_more_than_a_hundred_thousand_entries_are_refused_and_gone_again(tmp_path: Path) -> None:
    """A24; in memory where that can be, as a disk may take a minute over so many."""
    entries = b"".join(member(f"{number:06}") for number in range(100_001))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        with pytest.raises(Refused, match="100000: there are too many members"):
            unpack(entries, Path(folder))
        assert os.listdir(folder) == []  # noqa: PTH208 - names are wanted


def test_as_many_entries_as_allowed_are_unpacked_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MAX_ENTRIES", 100)
    (tmp_path / "in").mkdir()
    with pytest.raises(Refused, match="too many members"):
        unpack(b"".join(member(f"{number}") for number in range(101)) + END, tmp_path)
    unpack(b"".join(member(f"{number}") for number in range(100)) + END, tmp_path / "in")
    assert len(tree(tmp_path / "in")) == 100


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1755, 0o6777, 0o777])
def test_no_right_but_the_owners_to_execute_is_taken_over(tmp_path: Path, mode: int) -> None:
    """A22."""
    data = member("x", mode=mode) + member("d", tarfile.DIRTYPE, mode=mode) + member("n", mode=mode & ~0o100)
    mask = os.umask(0)
    try:
        unpack(data + END, tmp_path)
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in tmp_path.iterdir()}
    assert modes == {"x": 0o755, "d": 0o755, "n": 0o644}


def test_a_torn_archive_leaves_nothing(tmp_path: Path) -> None:
    whole = member("a", tarfile.DIRTYPE) + member("a/" + "long" * 40, data=b"x" * 700) + member("b") + END
    for cut in {*range(0, len(whole), 256), len(whole) - 1}:
        with pytest.raises(Refused, match="ends too early"):
            unpack(whole[:cut], tmp_path)
        assert tree(tmp_path) == {}
    unpack(whole, tmp_path)
    assert len(tree(tmp_path)) == 3


@pytest.mark.parametrize("data", [END + b"x", END + member("late"), bytes(512) + member("late") + END])
def test_nothing_comes_behind_the_end(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(Refused, match="end"):
        unpack(member("a") + data, tmp_path)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "data",
    [END, member("x", tarfile.DIRTYPE) + END, member("x") + member("y") + END, member("x", tarfile.SYMTYPE) + END],
)
def test_where_one_file_is_expected_nothing_else_will_do(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(Refused):
        unpack(data, tmp_path, only=b"name")
    assert tree(tmp_path) == {}


def test_the_name_of_an_only_file_is_the_receivers_alone(tmp_path: Path) -> None:
    """A26."""
    unpack(member("x/y/z", data=b"1") + END, tmp_path, only=b"mine")
    assert tree(tmp_path) == {b"mine": (b"1", False)}


@given(
    flips=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 4096),
    piece=st.integers(1, 700),
)
@settings(max_examples=300)
def test_any_change_to_an_archive_is_refused_or_unpacked_within_the_folder(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int, piece: int
) -> None:
    """A25."""
    data = bytearray(
        member("a", tarfile.DIRTYPE)
        + member("a/é", data=b"12345")
        + member("b", tarfile.DIRTYPE)
        + member("b/x", data=bytes(600))
        + END
    )
    for place, value in flips:
        data[place % len(data)] = value
    base = tmp_path_factory.mktemp("changed")
    (base / "in").mkdir()
    with contextlib.suppress(Refused):
        unpack(bytes(data[:cut] if cut < 4096 else data), base / "in", piece, max_bytes=10_000)
    assert os.listdir(base) == ["in"]  # noqa: PTH208 - names are wanted
    assert not any(path.is_symlink() for path in base.rglob("*"))


@given(noise=st.binary(max_size=3000))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    """A25."""
    folder = tmp_path_factory.mktemp("noise")
    with pytest.raises(Refused):
        unpack(noise, folder)
    assert tree(folder) == {}


# -- taking its place ------------------------------------------------------------------------------------------------


def test_folders_are_merged_and_files_replaced_at_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "kept").mkdir(parents=True)
    (tmp_path / "a" / "old").write_bytes(b"old")
    with (tmp_path / "a" / "old").open("rb") as reader:
        data = member("a", tarfile.DIRTYPE) + member("a/old", data=b"new") + member("a/more", data=b"1")
        unpack(data + END, tmp_path)
        assert reader.read() == b"old"  # who had it open reads it to its end
    assert tree(tmp_path) == {b"a": None, b"a/kept": None, b"a/old": (b"new", False), b"a/more": (b"1", False)}


def in_the_way(kind: str, path: Path, elsewhere: Path) -> None:
    match kind:
        case "folder":
            path.mkdir()
        case "file":
            path.write_bytes(b"there before")
        case "pipe":
            os.mkfifo(path)
        case _:
            path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("kind", "arriving"),
    [
        ("link to a file", member("x", data=b"new")),
        ("link to a folder", member("x", tarfile.DIRTYPE) + member("x/y", data=b"new")),
        ("folder", member("x", data=b"new")),
        ("file", member("x", tarfile.DIRTYPE) + member("x/y", data=b"new")),
        ("pipe", member("x", data=b"new")),
    ],
)
def test_nothing_is_written_through_a_link_or_over_another_kind(tmp_path: Path, kind: str, arriving: bytes) -> None:
    """A14, A25: and what would have had its place stays away too."""
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "target"
    target.mkdir()
    if kind == "link to a folder":
        elsewhere.mkdir()
    else:
        elsewhere.write_bytes(SECRET)
    in_the_way(kind, target / "x", elsewhere)
    with pytest.raises(InTheWay, match=r"x: .* is there already"):
        unpack(member("a", data=b"1") + arriving + END, target)
    assert os.listdir(target) == ["x"]  # noqa: PTH208 - names are wanted
    assert elsewhere.is_dir() or elsewhere.read_bytes() == SECRET
    assert not elsewhere.is_dir() or not any(elsewhere.iterdir())


def test_a_folder_that_becomes_a_link_meanwhile_is_not_followed(tmp_path: Path) -> None:
    """A17, for what is written: the folder is swapped after it was unpacked into."""
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    for folder in (target, elsewhere):
        folder.mkdir()
    with opened(target) as fd, contextlib.closing(Arrival(fd)) as arrival:
        arrival.feed(member("a", tarfile.DIRTYPE) + member("b", tarfile.DIRTYPE))
        stage = next(target.iterdir())
        (stage / "a").rmdir()
        (stage / "a").symlink_to(elsewhere)
        with pytest.raises(Refused):
            arrival.feed(member("a/x", data=SECRET) + END)
    assert tree(tmp_path) == {b"target": None, b"elsewhere": None}


def test_the_unfinished_is_nobodys_to_read(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        with opened(tmp_path) as fd, contextlib.closing(Arrival(fd)) as arrival:
            arrival.feed(member("a", data=b"1"))
            assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o700]
    finally:
        os.umask(mask)
    assert tree(tmp_path) == {}


# -- packing ---------------------------------------------------------------------------------------------------------


def test_what_is_no_file_and_no_folder_is_left_out_and_named(tmp_path: Path) -> None:
    """A13, A14, A18, A19, A23."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "folder" / "passwd").symlink_to("/etc/passwd")
    (tmp_path / "root").symlink_to("/")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(os.path.join(os.fsencode(tmp_path), b"\xff\x1b[2Jx\n"))  # noqa: PTH118 - bytes
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound, opened(tmp_path) as fd:
        bound.bind(f"/proc/self/fd/{fd}/socket")
        data, left_out = pack(tmp_path)
    assert left_out == ["folder/passwd", "loop", "root", "socket", "\\xff\\x1b[2Jx\\n"]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["file", "folder"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_only_a_regular_file_is_opened_as_one_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    """A13, A18."""
    in_the_way(kind, tmp_path / "x", tmp_path / "y")
    with pytest.raises(Refused, match="not a regular file"):
        places.open_file(None, os.fsencode(tmp_path / "x"))
    with pytest.raises(Refused, match="device"):
        places.open_file(None, b"/dev/zero")


@contextlib.contextmanager
def flipping(first: Callable[[], None], second: Callable[[], None]) -> Generator[Iterator[int]]:
    """Do one and the other in turn, in a thread; yields how often, as it is asked."""
    turns = itertools.count()
    count = [0]
    over = threading.Event()

    def flip() -> None:
        while not over.is_set():
            first()
            second()
            count[0] = next(turns)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield iter(lambda: count[0], -1)
    finally:
        over.set()
        thread.join()


def test_a_file_that_becomes_a_link_again_and_again_is_never_followed(tmp_path: Path) -> None:
    """A16."""
    (tmp_path / "secret").write_bytes(SECRET)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "ours").write_bytes(b"ours")
    (inside / "link").symlink_to(tmp_path / "secret")

    def put(name: str) -> None:
        os.link(inside / name, inside / "new", follow_symlinks=False)
        (inside / "new").rename(inside / "plot")
        # Where both are the same file a rename does nothing.
        (inside / "new").unlink(missing_ok=True)

    outcomes: set[str] = set()
    with flipping(lambda: put("ours"), lambda: put("link")) as turns:
        while outcomes != {"packed", "refused"} or next(turns) < 300:
            try:
                data = pack_one(inside / "plot")
            except Refused:
                outcomes.add("refused")
            except FileNotFoundError:
                continue  # it has not been put there yet
            else:
                assert SECRET not in data
                outcomes.add("packed")
            assert SECRET not in pack(inside)[0]


def test_a_folder_that_becomes_a_link_again_and_again_is_never_followed(tmp_path: Path) -> None:
    """A17."""
    for folder in ("hidden", "inside", "inside/sub"):
        (tmp_path / folder).mkdir()
    (tmp_path / "hidden" / "file").write_bytes(SECRET)
    (tmp_path / "inside" / "sub" / "file").write_bytes(b"ours")
    sub, away = tmp_path / "inside" / "sub", tmp_path / "away"

    def to_link() -> None:
        sub.rename(away)
        sub.symlink_to(tmp_path / "hidden")

    def to_folder() -> None:
        sub.unlink()
        away.rename(sub)

    outcomes: set[bool] = set()
    with flipping(to_link, to_folder) as turns:
        while len(outcomes) < 2 or next(turns) < 300:
            data, left_out = pack(tmp_path / "inside")
            assert SECRET not in data
            outcomes.add(left_out == ["sub"])


def test_a_file_that_shrinks_is_refused_and_one_that_grows_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(packing.CHUNK * 3))
    with opened(tmp_path) as fd:
        pieces = packing.pack_folder(fd, [])
        next(pieces)
        with path.open("ab") as file:
            file.write(b"more")
        data = b"".join(pieces)
        assert len(data) < packing.CHUNK * 2 + 2048
        pieces = packing.pack_folder(fd, [])
        next(pieces)
        os.truncate(path, 1)
        with pytest.raises(Refused, match="file: it became shorter"):
            list(pieces)


def test_a_tree_that_is_too_deep_or_too_wide_is_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A24."""
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(opened(tmp_path))
        for _ in range(300):
            os.mkdir(b"d" * 200, dir_fd=here)
            here = os.open(b"d" * 200, os.O_RDONLY, dir_fd=here)
            stack.callback(os.close, here)
    before = descriptors()
    with pytest.raises(Refused, match="more than 100 folders deep"):
        pack(tmp_path)
    with opened(tmp_path) as fd:
        places.remove(fd, b"d" * 200)
    assert descriptors() == before
    monkeypatch.setattr(places, "MAX_ENTRIES", 10)
    for number in range(5):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "file").touch()
    assert len(pack(tmp_path)[0]) > 10 * 512
    (tmp_path / "4" / "one more").touch()
    with pytest.raises(Refused, match="more than 10 entries"):
        pack(tmp_path)


def test_too_many_to_name_refuse_the_whole(tmp_path: Path) -> None:
    for number in range(places.MAX_LEFT_OUT):
        (tmp_path / f"{number}").symlink_to("x")
    assert len(pack(tmp_path)[1]) == places.MAX_LEFT_OUT
    (tmp_path / "one more").symlink_to("x")
    with pytest.raises(Refused, match="more than 1000 entries are neither"):
        pack(tmp_path)


def test_names_too_long_to_be_told_refuse_the_whole(tmp_path: Path) -> None:
    for number in range(places.MAX_LEFT_OUT_TEXT // 255 + 1):
        (tmp_path / f"{number:0255}").symlink_to("x")
    with pytest.raises(Refused, match="more than 257 entries are neither"):
        pack(tmp_path)


# -- paths inside ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("data/x.csv", "/app", "data/x.csv"),
        ("./data//x/", "/app", "data/x"),
        (".", "/app", ""),
        ("/app", "/app", ""),
        ("/app/x", "/app", "x"),
        ("/tmp/é", "/tmp", "é"),
        ("//tmp/x", "/tmp", "x"),
        ("tmp/x", "/app", "tmp/x"),
        ("\udcff", "/app", "\udcff"),
    ],
)
def test_a_path_inside_is_below_app_or_tmp(path: str, root: str, below: str) -> None:
    """A15."""
    assert places.split(path) == (root, [os.fsencode(part) for part in below.split("/") if part])


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/etc/passwd", "/app2/x", "/tmpx", "../x", "a/../x", "/app/../etc/passwd", "/tmp/.."),
        *("x\0y", "x" * 256, "a/" * 101, "\ud800"),
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    """A15."""
    with pytest.raises(Refused):
        places.split(path)

"""Images that a guest made, on the host's disk: names, marks, links, a full disk."""

from __future__ import annotations

import itertools
import os
import re
import resource
import secrets
import signal
import struct
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actbox.errors import WorkspaceError
from actbox.files import ImageFolder, image_extension, looks_like, open_folder

if TYPE_CHECKING:
    from collections.abc import Generator

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
SAMPLES = {
    "image/png": (".png", PNG),
    "image/jpeg": (".jpg", b"\xff\xd8\xff\xe0" + bytes(100)),
    "image/gif": (".gif", b"GIF89a" + bytes(100)),
    "image/webp": (".webp", b"RIFF\n\0\0\nWEBPVP8 " + bytes(100)),
    "image/svg+xml": (".svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "application/pdf": (".pdf", b"%PDF-1.7\n" + bytes(100)),
}


@contextmanager
def largest_file(size: int) -> Generator[None]:
    """A bound on files that not even root can cross, as a stand-in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("mime_type", SAMPLES)
def test_an_image_of_a_known_type_is_saved_under_a_name_of_the_hosts_choice(tmp_path: Path, mime_type: str) -> None:
    """A26, G11."""
    extension, data = SAMPLES[mime_type]
    saved = ImageFolder(tmp_path).save(data, mime_type)
    assert saved is not None
    assert saved.parent == tmp_path
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-0001-[0-9a-f]{{6}}\{extension}", saved.name)
    assert saved.read_bytes() == data
    assert image_extension(mime_type) == extension


@pytest.mark.parametrize("claimed", SAMPLES)
@pytest.mark.parametrize("actual", SAMPLES)
def test_only_data_with_the_mark_of_the_claimed_type_is_saved(tmp_path: Path, claimed: str, actual: str) -> None:
    """G11."""
    saved = ImageFolder(tmp_path).save(SAMPLES[actual][1], claimed)
    assert (saved is not None) == (claimed == actual)
    assert len(list(tmp_path.iterdir())) == (claimed == actual)


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG", b"<html><script>", b"\x7fELF" + bytes(60), b"GIF87", b"RIFF", b"%PDF", b" " + PNG]
)
def test_what_has_no_known_mark_is_saved_under_no_type(tmp_path: Path, data: bytes) -> None:
    """G11."""
    folder = ImageFolder(tmp_path)
    assert [folder.save(data, mime_type) for mime_type in SAMPLES] == [None] * len(SAMPLES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "mime_type",
    ["", "text/html", "image/PNG", "image/png; charset=x", "image/png\n", "image/../../x", "application/javascript"],
)
def test_an_unknown_type_is_not_saved(tmp_path: Path, mime_type: str) -> None:
    """G11."""
    assert image_extension(mime_type) is None
    assert not looks_like(PNG, mime_type)
    assert ImageFolder(tmp_path).save(PNG, mime_type) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "<svg/>",
        "<svg>",
        "<svg\n width='1'>",
        "\ufeff<svg >",
        " \r\n\t<svg >",
        "<?xml version='1.0'?>\n<!-- a <html> in a comment --><svg >",
        '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN"\n "http://www.w3.org/svg11.dtd">\n<svg >',
        "<!-- 1 --><!-- 2 --><svg ><text>é</text></svg>",
    ],
)
def test_an_svg_is_known_by_its_first_tag(text: str) -> None:
    assert looks_like(text.encode(), "image/svg+xml")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg",
        b"<SVG>",
        b"<svgx>",
        b"<html><svg >",
        b"text <svg >",
        b"<script/><svg >",
        b"<?xml <svg >",
        b"<!-- <svg >",
        b"<!DOCTYPE svg <svg ",
        b'<!DOCTYPE svg [<!ENTITY a "aaaa">]><svg >',
        b"<!ENTITY x><svg >",
        "<svg >".encode("utf-16"),
        b"<svg >\xff",
    ],
)
def test_what_is_not_plainly_an_svg_is_none(data: bytes) -> None:
    """F8, G11."""
    assert not looks_like(data, "image/svg+xml")


@pytest.mark.parametrize(
    "data", [b" " * (1 << 24), b"<!---->" * (1 << 20), b"<!DOCTYPE >" * (1 << 20), b"<?" * (1 << 23)]
)
def test_looking_at_a_long_text_takes_linear_time(data: bytes) -> None:
    assert not looks_like(data, "image/svg+xml")  # the suite's time bound is the assertion


@given(st.binary(), st.sampled_from(list(SAMPLES)) | st.text())
def test_any_bytes_and_any_type_can_be_asked_about(data: bytes, mime_type: str) -> None:
    """G10, G11."""
    if looks_like(data, mime_type):
        assert image_extension(mime_type) is not None


def test_an_image_that_claims_to_be_huge_is_stored_as_the_bytes_it_is(tmp_path: Path) -> None:
    """G10: 50000 by 50000 pixels, which nobody here unpacks."""
    size = struct.pack(">II", 50_000, 50_000)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + size + bytes([8, 6, 0, 0, 0]) + bytes(4)
    saved = ImageFolder(tmp_path).save(bomb, "image/png")
    assert saved is not None
    assert saved.read_bytes() == bomb


def test_images_of_one_second_have_different_names_and_sort_in_order(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    saved = [folder.save(PNG, "image/png") for _ in range(20)]
    assert saved == sorted(tmp_path.iterdir())
    assert len(saved) == 20


def test_two_folder_objects_of_one_path_do_not_overwrite_each_other(tmp_path: Path) -> None:
    saved = {ImageFolder(tmp_path).save(PNG, "image/png") for _ in range(20)}
    assert saved == set(tmp_path.iterdir())
    assert len(saved) == 20


def test_the_file_may_be_read_but_not_run(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        saved = ImageFolder(tmp_path).save(PNG, "image/png")
        assert saved is not None
        assert saved.stat().st_mode & 0o7777 == 0o644
        os.umask(0o077)
        saved = ImageFolder(tmp_path).save(PNG, "image/png")
        assert saved is not None
        assert saved.stat().st_mode & 0o7777 == 0o600
    finally:
        os.umask(before)


def test_a_planted_link_under_the_very_name_is_neither_followed_nor_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A33."""
    outside, images = tmp_path / "outside", tmp_path / "images"
    images.mkdir()
    numbers = itertools.count(1)

    def guessed(size: int) -> str:
        # The guest knows the clock and the counter; three times it also guesses the random part.
        number = next(numbers)
        if number > 3:
            return "11" * size
        for second in range(3):
            time = datetime.now(UTC) + timedelta(seconds=second)
            (images / f"{time:%Y%m%d-%H%M%S}-{number:04d}-{'00' * size}.png").symlink_to(outside)
        return "00" * size

    monkeypatch.setattr(secrets, "token_hex", guessed)
    saved = ImageFolder(images).save(PNG, "image/png")
    assert saved is not None
    assert saved.name.endswith("-0004-111111.png")
    assert saved.is_file()
    assert not saved.is_symlink()
    assert not outside.exists()


def test_names_that_are_always_taken_end_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    really_open = os.open

    def taken(path: str, flags: int, *args: int, dir_fd: int | None = None) -> int:
        if flags & os.O_EXCL:
            tried.append(path)
            raise FileExistsError(17, "File exists")
        return really_open(path, flags, *args, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", taken)
    with pytest.raises(WorkspaceError, match="File exists"):
        ImageFolder(tmp_path).save(PNG, "image/png")
    assert 2 <= len(set(tried)) == len(tried) <= 100


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    """A33."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "images").symlink_to(outside)
    with pytest.raises(WorkspaceError, match="symbolic link"):
        ImageFolder(tmp_path / "images").save(PNG, "image/png")
    assert list(outside.iterdir()) == []


def test_a_folder_that_became_a_link_between_two_images_is_refused(tmp_path: Path) -> None:
    """A33."""
    images, outside = tmp_path / "images", tmp_path / "outside"
    images.mkdir()
    outside.mkdir()
    folder = ImageFolder(images)
    assert folder.save(PNG, "image/png")
    images.rename(tmp_path / "moved")
    images.symlink_to(outside)
    with pytest.raises(WorkspaceError, match="symbolic link"):
        folder.save(PNG, "image/png")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "problem"), [("missing", "does not exist"), ("file", "not a folder"), ("fifo", "not a")]
)
def test_what_is_no_folder_is_refused_and_says_so(tmp_path: Path, kind: str, problem: str) -> None:
    """A18."""
    images = tmp_path / "images"
    if kind == "file":
        images.touch()
    elif kind == "fifo":
        os.mkfifo(images)
    with pytest.raises(WorkspaceError, match=problem) as caught:
        ImageFolder(images).save(PNG, "image/png")
    assert caught.value.path == images


def test_an_image_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    with largest_file(50), pytest.raises(WorkspaceError, match="room"):
        folder.save(PNG, "image/png")
    assert list(tmp_path.iterdir()) == []
    assert folder.save(PNG, "image/png") is not None


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_args: object) -> int:
        raise KeyboardInterrupt

    folder = ImageFolder(tmp_path)
    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.save(PNG, "image/png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_with_a_remedy(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(WorkspaceError, match="writable"):
            ImageFolder(tmp_path).save(PNG, "image/png")
    finally:
        tmp_path.chmod(0o755)


def descriptors() -> list[str]:
    return sorted(found.name for found in Path("/proc/self/fd").iterdir())


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    before = descriptors()
    folder.save(PNG, "image/png")
    with largest_file(50), pytest.raises(WorkspaceError):
        folder.save(PNG, "image/png")
    with pytest.raises(WorkspaceError), open_folder(tmp_path, "a", "b", make=False):
        pass
    with pytest.raises(WorkspaceError), open_folder(tmp_path, "link", make=True):
        pass
    assert descriptors() == before


def test_a_folder_is_entered_component_by_component_and_never_through_a_link(tmp_path: Path) -> None:
    """A14."""
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    with open_folder(tmp_path, "real", "sub") as folder:
        assert os.path.samestat(os.stat(".", dir_fd=folder), (tmp_path / "real" / "sub").stat())
    with pytest.raises(WorkspaceError, match="symbolic link") as caught, open_folder(tmp_path, "link", "sub"):
        pass
    assert caught.value.path == tmp_path / "link"
    with pytest.raises(WorkspaceError, match="does not exist"), open_folder(tmp_path, "real", "other"):
        pass
    with open_folder(tmp_path, "real", "other", "more", make=True):
        assert (tmp_path / "real" / "other" / "more").is_dir()

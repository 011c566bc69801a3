"""Variables from `.env` files: what is read, what is exported, and that mistakes are named and secrets are not."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import dotenv
import pytest

from actbox.dotenv import dotenv_variables
from actbox.errors import DotenvError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Generator


@pytest.fixture(autouse=True)
def _elsewhere(  # pyright: ignore[reportUnusedFunction]
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[None]:
    """An empty current directory, and an os.environ that is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        yield


def test_variables_are_returned_and_exported() -> None:
    Path(".env").write_text("# comment\n\nACTBOX_A=1\nexport ACTBOX_B='two words'\nACTBOX_C=\n")
    assert dotenv_variables() == {"ACTBOX_A": "1", "ACTBOX_B": "two words", "ACTBOX_C": ""}
    assert os.environ["ACTBOX_A"] == "1"
    assert os.environ["ACTBOX_B"] == "two words"
    assert os.environ["ACTBOX_C"] == ""


def test_nothing_is_exported_unless_wanted() -> None:
    Path(".env").write_text("ACTBOX_A=1\n")
    before = dict(os.environ)
    assert dotenv_variables(export=False) == {"ACTBOX_A": "1"}
    assert dict(os.environ) == before


def test_a_name_without_a_value_is_left_out() -> None:
    Path(".env").write_text("ACTBOX_A\nACTBOX_B=1\n")
    assert dotenv_variables() == {"ACTBOX_B": "1"}
    assert "ACTBOX_A" not in os.environ


def test_the_default_file_may_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="actbox.dotenv")
    assert dotenv_variables() == {}
    assert dotenv_variables(Path(".env")) == {}
    assert caplog.records == []
    assert dotenv_variables(verbose=True) == {}
    assert len(caplog.records) == 1


def test_a_file_of_a_parent_folder_is_not_found_by_accident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("ACTBOX_A=1\n")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir("sub")
    assert dotenv_variables() == {}


@pytest.mark.parametrize("path", ["other.env", "sub/.env", "/nonexistent/.env", "./../.env"])
def test_a_file_that_was_named_must_exist(path: str) -> None:
    with pytest.raises(DotenvError, match="does not exist") as caught:
        dotenv_variables(Path(path))
    assert caught.value.path == Path(path)
    assert caught.value.line is None


def test_a_default_file_that_is_a_broken_link_is_not_missing() -> None:
    Path(".env").symlink_to("nowhere")
    with pytest.raises(DotenvError, match="does not exist"):
        dotenv_variables()


def test_a_string_will_do_as_a_path() -> None:
    Path("my.env").write_text("ACTBOX_A=1\n")
    path: Any = "my.env"
    assert dotenv_variables(path) == {"ACTBOX_A": "1"}


@pytest.mark.parametrize("path", [None, 3, b".env"])
def test_what_is_no_path_is_an_invalid_argument(path: Any) -> None:
    with pytest.raises(InvalidArgument, match="dotenv_path"):
        dotenv_variables(path)


def test_a_folder_or_a_nul_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(DotenvError, match="cannot be read"):
            dotenv_variables(path)
    Path(".env").mkdir()
    with pytest.raises(DotenvError, match="cannot be read"):
        dotenv_variables()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused() -> None:
    Path(".env").touch(0o000)
    with pytest.raises(DotenvError, match="Permission denied"):
        dotenv_variables()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("=value\n", 1),
        ("A=1\n\n\n  B C=2\n", 4),
        ("A=1\nB='open\nC=3\n", 2),
        ('A=1\n# x\nB="open\n', 3),
        ("A=1\r\n\r\nB C\r\n", 3),
        ("A=1\rB C\r", 2),
        ("A='x' y\n", 1),
        ("A=1\nB C=1\nD E=1\n", 2),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(text: str, line: int) -> None:
    Path("bad.env").write_bytes(text.encode())
    before = dict(os.environ)
    with pytest.raises(DotenvError, match=f"bad.env.*line {line}:") as caught:
        dotenv_variables(Path("bad.env"))
    assert caught.value.line == line
    assert caught.value.path == Path("bad.env")
    assert dict(os.environ) == before


@pytest.mark.parametrize("content", [b"KEY s3cret=1\n", b"KEY='s3cret\n", b"KEY=s3cret\xff\n", b"KEY=s3cret\0\n"])
def test_an_error_repeats_nothing_of_the_content(content: bytes) -> None:
    Path(".env").write_bytes(content)
    with pytest.raises(DotenvError) as caught:
        dotenv_variables()
    assert "s3cret" not in repr(caught.value)
    assert caught.value.__cause__ is None


def test_what_is_not_in_the_encoding_is_named_by_its_line() -> None:
    Path(".env").write_bytes(b"A=1\nB=2\nC=\xe9\n")
    with pytest.raises(DotenvError, match="line 3: it is not utf-8") as caught:
        dotenv_variables()
    assert caught.value.line == 3
    assert dotenv_variables(encoding="latin-1") == {"A": "1", "B": "2", "C": "é"}


@pytest.mark.parametrize("encoding", ["klingon", "hex", 7])
def test_an_unknown_encoding_is_an_invalid_argument(encoding: Any) -> None:
    Path(".env").write_text("A=1\n")
    with pytest.raises(InvalidArgument, match="encoding"):
        dotenv_variables(encoding=encoding)


def test_a_byte_order_mark_is_no_part_of_the_first_name() -> None:
    Path(".env").write_bytes(b"\xef\xbb\xbfACTBOX_A=1\r\nACTBOX_B=2\r\n")
    assert dotenv_variables() == {"ACTBOX_A": "1", "ACTBOX_B": "2"}


@pytest.mark.parametrize("content", ["A=1\nB=x\0y\n", "A=1\n'B=C'=1\n", "A=1\n'B\0'=1\n"])
def test_what_no_environment_can_hold_is_refused_before_anything_is_exported(content: str) -> None:
    Path(".env").write_text(content)
    before = dict(os.environ)
    with pytest.raises(DotenvError, match="line 2"):
        dotenv_variables()
    assert dict(os.environ) == before


def test_what_is_in_the_environment_is_overridden_only_if_wanted() -> None:
    os.environ["ACTBOX_A"] = "before"
    Path(".env").write_text("ACTBOX_A=after\n")
    assert dotenv_variables() == {"ACTBOX_A": "after"}
    assert os.environ["ACTBOX_A"] == "before"
    assert dotenv_variables(override=True) == {"ACTBOX_A": "after"}
    assert os.environ["ACTBOX_A"] == "after"


def test_names_are_interpolated_unless_unwanted() -> None:
    os.environ["ACTBOX_OUT"] = "out"
    Path(".env").write_text("ACTBOX_A=1\nACTBOX_B=${ACTBOX_A}-${ACTBOX_OUT}-${ACTBOX_NONE:-none}\n")
    assert dotenv_variables()["ACTBOX_B"] == "1-out-none"
    raw = dotenv_variables(interpolate=False, override=True)
    assert raw["ACTBOX_B"] == os.environ["ACTBOX_B"] == "${ACTBOX_A}-${ACTBOX_OUT}-${ACTBOX_NONE:-none}"


def test_a_stream_is_read_in_place_of_the_file() -> None:
    Path(".env").write_text("ACTBOX_A=file\n")
    assert dotenv_variables(stream=io.StringIO("ACTBOX_A=stream\n")) == {"ACTBOX_A": "stream"}
    assert os.environ["ACTBOX_A"] == "stream"
    with pytest.raises(DotenvError, match=r"stream.*line 2:"):
        dotenv_variables(stream=io.StringIO("A=1\nB C\n"))


@pytest.mark.parametrize("stream", [io.BytesIO(b"A=1\n"), 3])
def test_a_stream_that_is_not_text_is_refused(stream: Any) -> None:
    with pytest.raises(DotenvError, match="as text"):
        dotenv_variables(stream=stream)


def test_a_file_and_a_stream_exclude_each_other() -> None:
    Path("my.env").touch()
    with pytest.raises(InvalidArgument, match="not both"):
        dotenv_variables(Path("my.env"), stream=io.StringIO())


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(InvalidArgument, match="overide") as caught:
        dotenv_variables(overide=True)
    assert "override" in str(caught.value)


@pytest.mark.skipif(
    not hasattr(dotenv.main, "_load_dotenv_disabled") and not os.environ.get("CI"),
    reason="python-dotenv before 1.2 has no switch",
)
def test_the_librarys_own_switch_turns_the_export_off() -> None:
    os.environ["PYTHON_DOTENV_DISABLED"] = "1"
    Path(".env").write_text("ACTBOX_A=1\n")
    assert dotenv_variables() == {"ACTBOX_A": "1"}
    assert "ACTBOX_A" not in os.environ

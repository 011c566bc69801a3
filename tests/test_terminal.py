"""Text from inside a sandbox cannot drive the terminal, however it is cut into pieces."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actbox.terminal import Sanitizer, one_line, sanitize

FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
SGR = re.compile(r"\x1b\[[0-9;]{0,64}m")

PIECES = [
    *("\x1b", "\x1b[", "\x1b]", "\x1bP", "\x1b_", "\x1b^", "\x1bX", "\x1b\\", "\x9b", "\x9d", "\x90", "\x9c"),
    *("\x07", "\x18", "0;1", "31", ":", "?", "m", "J", "q", "(", " ", "\r", "\n", "\r\n", "\t", "\x08", "\x7f"),
    *("\x85", "\u202e", "\u2069", "\ud800", "é", "漢", "😀", "text"),
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=30).map("".join)


def in_pieces(text: str, cuts: list[int], *, colors: bool) -> str:
    sanitizer = Sanitizer(colors=colors)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    shown = [sanitizer.feed(text[start:stop]) for start, stop in itertools.pairwise(edges)]
    return "".join([*shown, sanitizer.close()])


@given(TEXTS)
def test_what_is_shown_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    """F5."""
    assert not FORBIDDEN.search(sanitize(text))


@given(TEXTS)
def test_with_colors_what_is_shown_holds_colors_alone_and_ends_them(text: str) -> None:
    """F5."""
    shown = sanitize(text, colors=True)
    assert not FORBIDDEN.search(SGR.sub("", shown))
    assert "\x1b" not in shown or shown.endswith("\x1b[0m")


@given(TEXTS, st.lists(st.integers(0, 1000), max_size=8), st.booleans())
def test_a_text_that_comes_in_pieces_is_shown_as_the_whole_is(text: str, cuts: list[int], colors: bool) -> None:  # noqa: FBT001
    """F5."""
    assert in_pieces(text, cuts, colors=colors) == sanitize(text, colors=colors)


@given(TEXTS, st.booleans())
def test_a_text_that_comes_letter_by_letter_is_shown_as_the_whole_is(text: str, colors: bool) -> None:  # noqa: FBT001
    assert in_pieces(text, list(range(len(text))), colors=colors) == sanitize(text, colors=colors)


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"])), st.booleans())
def test_ordinary_text_is_left_as_it_is(text: str, colors: bool) -> None:  # noqa: FBT001
    assert sanitize(f"{text}\n\t{text}", colors=colors) == f"{text}\n\t{text}"


@given(TEXTS)
def test_one_line_is_one_line(text: str) -> None:
    """F6, G18."""
    assert len(one_line(text).splitlines()) <= 1


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]0;title\x1b\\b", "ab"),
        ("a\x1b]0;title\x9cb", "ab"),
        ("a\x1b[2Jb", "ab"),
        ("a\x1b]52;c;ZXZpbA==\x07b", "ab"),
        ("a\x1b]8;;http://e\x07link\x1b]8;;\x07b", "alinkb"),
        ("a\x1b[6nb", "ab"),
        ("a\x1b[?1049hb", "ab"),
        ("a\x1bPq#0;2\x1b\\b", "ab"),
        ("a\x1b_G;AAAA\x1b\\b", "ab"),
        ("a\x1b^private\x1b\\b", "ab"),
        ("a\x1bXstring\x1b\\b", "ab"),
        ("a\x1bcb", "ab"),
        ("a\x1b(0b", "ab"),
        ("a\x1b#8b", "ab"),
        ("a\x9b31mb", "ab"),
        ("a\x90qdevice\x9cb", "ab"),
        ("a\x9d0;title\x9cb", "ab"),
        ("a\x1b]0;never ended\nb", "a\nb"),
        ("a\x90q", "a"),
        ("a\x1b", "a"),
        ("a\x1b[31", "a"),
        ("a\x1b[31\nb", "a\nb"),
        ("a\x1b\x1b[2Jb", "ab"),
        ("a\x1b]0;x\x1b[2Jb", "ab"),
        ("a\x07\x08\x7f\x85", "a\\x07\\x08\\x7f\\x85"),
        ("a\u202eb\u2066c\u200fd", "a\\u202eb\\u2066c\\u200fd"),
        ("a\ud800b", "a\\ud800b"),
        ("one\rtwo", "one\ntwo"),
        ("one\r\ntwo", "one\ntwo"),
        ("one\r\r\ntwo", "one\ntwo"),
        ("\r 10%\r 20%\r\n", " 10%\n 20%\n"),
        ("one\r", "one\n"),
        ("one\r\x1b[Ktwo", "one\ntwo"),
    ],
)
def test_a_hostile_text_is_shown_harmlessly(hostile: str, shown: str) -> None:
    """F5."""
    assert sanitize(hostile) == shown
    assert sanitize(hostile, colors=True) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\x1b[31mred\x1b[0m"),
        ("\x1b[1;38;5;9mred\x1b[m", "\x1b[1;38;5;9mred\x1b[m\x1b[0m"),
        ("\x1b[" + "1;" * 32 + "mred", "\x1b[" + "1;" * 32 + "mred\x1b[0m"),
        ("\x1b[" + "1;" * 33 + "mred", "red"),
        ("\x1b[?31mred", "red"),
        ("\x1b[38:5:9mred", "red"),
        ("\x1b[31 mred", "red"),
        ("\x9b31mred", "red"),
        ("\x1b[١mred", "١mred"),
    ],
)
def test_only_plain_colors_of_bounded_length_are_kept(text: str, shown: str) -> None:
    assert sanitize(text, colors=True) == shown


def test_what_is_kept_between_pieces_does_not_grow() -> None:
    sanitizer = Sanitizer(colors=True)
    for opening in ("\x1b[", "\x1b]", "\x1b"):
        assert sanitizer.feed(opening) == ""
        for _ in range(100):
            assert sanitizer.feed("1" * 10_000) in ("", "1" * 9_999, "1" * 10_000)
        assert len(repr(vars(sanitizer))) < 400
        sanitizer.close()


def test_a_sanitizer_can_be_used_again_after_its_close() -> None:
    sanitizer = Sanitizer()
    assert sanitizer.feed("a\x1b]0;") + sanitizer.close() + sanitizer.feed("b") == "ab"

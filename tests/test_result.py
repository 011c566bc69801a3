"""A result is a fold of events: what is kept, what is left out and counted, and how it reads as text."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actbox.events import (
    ClearOutput,
    DisplayData,
    Error,
    Event,
    ExecuteResult,
    KernelRestarted,
    Stream,
    UpdateDisplayData,
)
from actbox.result import ExecutionResult, Fold, Image, Output, image_types, join_text, strip_ansi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LIMIT = 1024
MEDIA = 2048
NOTE = re.compile(r"\n\.\.\. \[(\d+) bytes of output left out\] \.\.\.\n")

TEXT = st.text("aé€😀\n", max_size=20)
LONG: st.SearchStrategy[str] = st.tuples(TEXT, st.integers(1, 60)).map(lambda pair: pair[0] * pair[1])
NAMES = st.sampled_from(["stdout", "stderr"])
IDS = st.sampled_from(["one", "two"])
FORMATS: dict[str, st.SearchStrategy[Any]] = {
    "text/plain": LONG | st.binary(max_size=900) | st.just([1, 2]),
    "image/png": st.binary(max_size=900),
    "text/html": LONG,
    "application/json": st.lists(st.integers(), max_size=50),
}
DATA: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({}, optional=FORMATS)
METADATA: st.SearchStrategy[dict[str, Any]] = st.dictionaries(TEXT, LONG, max_size=3)
STREAMS = st.builds(Stream, NAMES, LONG)
SHOWN = st.one_of(
    STREAMS,
    st.builds(DisplayData, DATA, METADATA, st.none() | IDS),
    st.builds(ExecuteResult, DATA, METADATA, st.integers(1, 9)),
    st.builds(Error, TEXT, LONG, LONG),
)
EVENTS = st.lists(
    SHOWN | st.builds(UpdateDisplayData, DATA, METADATA, IDS) | st.builds(ClearOutput, st.booleans()), max_size=30
)


def folded(events: Sequence[Event], limit: int = LIMIT, media: int = MEDIA) -> ExecutionResult:
    fold = Fold(limit, media)
    for event in events:
        fold.add(event)
    return fold.result(images=[], execution_count=1, duration=0.0)


def plain(output: Output) -> str:
    if output.kind in ("stream", "error"):
        return output.text
    text = output.data.get("text/plain", "")
    return text if isinstance(text, str) else ""


def size(text: str) -> int:
    return len(text.encode())


def kept(result: ExecutionResult) -> list[Output]:
    """The outputs without the line that says what was left out."""
    return [output for output in result.outputs if not NOTE.fullmatch(output.text)]


def printed(outputs: Sequence[Output | Stream]) -> str:
    return "".join(output.text for output in outputs)


# -- bounds -------------------------------------------------------------------------------------------------------


@given(EVENTS)
def test_text_stays_within_its_limit_whatever_comes(events: list[Event]) -> None:
    """G8."""
    result = folded(events)
    # The note may have joined text of standard error before and behind it.
    text = sum(size(NOTE.sub("", plain(output))) + size(output.trace or "") for output in result.outputs)
    assert text <= LIMIT


@given(EVENTS)
@example([DisplayData({"text/plain": b"x" * 900})] * 10)
@example([DisplayData({"text/plain": ["x" * 900]})] * 10)
@example([DisplayData({"text/html": "x" * 900}), ClearOutput(wait=True), DisplayData({"text/html": "x" * 900})] * 3)
def test_everything_else_stays_within_its_limit_whatever_comes(events: list[Event]) -> None:
    """G9."""
    total = 0
    for output in folded(events).outputs:
        for value in output.data.values():
            if isinstance(value, bytes):
                total += len(value)
            elif value is not plain(output):
                total += len(value) if isinstance(value, str) else len(json.dumps(value)) // 2
        total += sum(map(len, output.metadata)) + sum(map(len, output.metadata.values()))
    assert total <= MEDIA


@pytest.mark.parametrize("value", [b"x" * 10_000, ["x" * 10_000], "x" * 10_000], ids=["bytes", "json", "text"])
def test_plain_text_that_is_no_text_is_bounded_too(value: Any) -> None:
    result = folded([DisplayData({"text/plain": value}) for _ in range(500)])
    assert sum(len(str(output.data)) for output in result.outputs) < 2 * (LIMIT + MEDIA)
    assert result.truncated


@pytest.mark.parametrize(
    "events",
    [
        [Stream("stdout", "")],
        [Stream("stdout", "a"), Stream("stderr", "b")],
        [DisplayData({})],
        [DisplayData({}, {}, "one"), UpdateDisplayData({}, {}, "one")],
        [DisplayData({f"x/{'y' * 250}{number}": "" for number in range(64)})],
        [DisplayData({}, {"m": "x" * 1000})],
        [ExecuteResult({"a/b": None}, {}, 1)],
        [Error("", "", "")],
        [Error("E" * 1000, "", "")],
        [ClearOutput(wait=True)],
    ],
    ids=["empty", "alternating", "display", "update", "types", "metadata", "nothing", "errors", "names", "clear"],
)
def test_small_events_without_end_do_not_grow_the_result(events: list[Event]) -> None:
    """G7."""
    fold = Fold(1 << 20, 1 << 20)
    # An update looks at every output kept, so there are fewer of them.
    updates = any(isinstance(event, UpdateDisplayData) for event in events)
    for _ in range(300 if updates else 30_000):
        for event in events:
            fold.add(event)
    result = fold.result(images=[], execution_count=1, duration=0.0)
    assert len(result.outputs) <= 20_010
    held = sum(
        len(output.text) + len(output.name or "") + sum(map(len, output.data)) + len(str(output.metadata))
        for output in result.outputs
    )
    assert held <= 4 << 20


def test_updates_do_not_smuggle_in_more_than_the_limits() -> None:
    """G9."""
    fold = Fold(LIMIT, MEDIA)
    for number in range(6):
        fold.add(DisplayData({"text/plain": "x"}, {}, f"d{number}"))
    for _ in range(3):
        for number in range(6):
            fold.add(UpdateDisplayData({"text/plain": "y" * 500, "a/b": b"z" * 1500}, {}, f"d{number}"))
    fold.add(Stream("stdout", "end"))
    result = fold.result(images=[], execution_count=1, duration=0.0)
    assert sum(size(plain(output)) for output in kept(result)) <= LIMIT
    assert sum(len(output.data.get("a/b", b"")) for output in result.outputs) <= MEDIA
    assert result.text is not None
    assert "end" in result.text
    assert result.truncated


# -- what is left out ---------------------------------------------------------------------------------------------


@given(st.lists(STREAMS, max_size=20))
@example([Stream("stdout", "a" + "😀" * 600), Stream("stdout", "b")])
@example([Stream("stdout", "a" * 511 + "€" + "b" * 600)])
@example([Stream("stdout", "a" * LIMIT)])
@example([Stream("stdout", "a" * LIMIT + "b")])
def test_head_and_tail_and_what_is_left_out_make_up_the_whole(streams: list[Stream]) -> None:
    result = folded(streams)
    whole = printed(streams)
    text = printed(result.outputs)
    note = NOTE.search(text)
    if note is None:
        assert text == whole
        assert result.omitted_bytes == 0
        assert not result.truncated
        return
    head, tail = text[: note.start()], text[note.end() :]
    assert whole.startswith(head)
    assert whole.endswith(tail)
    assert int(note[1]) == result.omitted_bytes == size(whole) - size(head) - size(tail)
    assert result.truncated
    # No more than is necessary is left out: one character at each cut.
    assert LIMIT - 8 < size(head) + size(tail) <= LIMIT


@given(st.lists(SHOWN, max_size=30))
def test_left_out_bytes_are_counted_exactly(events: list[Event]) -> None:
    result = folded(events)
    everything = folded(events, 1 << 30, 1 << 30)
    assert everything.omitted_bytes == everything.omitted_media == 0
    text = sum(size(NOTE.sub("", plain(output))) for output in result.outputs)
    assert text + result.omitted_bytes == sum(size(plain(output)) for output in everything.outputs)


@given(st.lists(SHOWN, max_size=8))
def test_nothing_is_lost_below_the_limits(events: list[Event]) -> None:
    result = folded(events, 1 << 20, 1 << 20)
    assert (result.omitted_bytes, result.omitted_media, result.truncated) == (0, 0, False)
    expected: list[Output] = []
    for event in events:
        match event:
            case Stream(name, text):
                last = expected[-1] if expected else None
                if last is not None and last.kind == "stream" and last.name == name:
                    text = expected.pop().text + text
                expected.append(Output("stream", name=name, text=text))
            case DisplayData(data, metadata, display_id):
                expected.append(Output("display_data", data=data, metadata=metadata, display_id=display_id))
            case ExecuteResult(data, metadata, count):
                expected.append(Output("execute_result", data=data, metadata=metadata, execution_count=count))
            case Error(name, value, trace):
                expected.append(Output("error", name=name, text=value, trace=trace))
            case _:
                raise AssertionError(event)
    assert result.outputs == expected


def test_media_beyond_its_limit_is_left_out_and_its_text_stays() -> None:
    """G9."""
    figure = DisplayData({"text/plain": "<figure>", "image/png": b"x" * 1500})
    result = folded([figure, figure, figure])
    assert [set(output.data) for output in result.outputs] == [
        {"text/plain", "image/png"},
        {"text/plain"},
        {"text/plain"},
    ]
    assert result.text == "<figure>\n<figure>\n<figure>"
    assert result.omitted_media == 2
    assert result.omitted_bytes == 0
    assert result.truncated


def test_a_display_counts_once_however_often_it_was_cut() -> None:
    result = folded([DisplayData({"image/png": b"x" * 5000}, {}, None, 3)])
    assert result.omitted_media == 1
    assert folded([DisplayData({"image/png": b"x"}, {}, None, 3)]).omitted_media == 1


def test_one_text_over_the_limit_keeps_its_head_and_tail() -> None:
    result = folded([Stream("stdout", "<" + "x" * 10_000 + ">")])
    assert result.omitted_bytes == 10_002 - LIMIT
    assert result.text is not None
    assert result.text.startswith("<x")
    assert result.text.endswith("x>")


def test_a_million_small_prints_take_a_moment() -> None:
    fold = Fold(1 << 20, 1 << 20)
    began = time.process_time()
    for number in range(100_000):
        fold.add(Stream("stdout", f"{number}\n"))
    assert fold.text() is not None
    assert time.process_time() - began < 5


# -- clear and update -------------------------------------------------------------------------------------------


@given(st.lists(SHOWN, max_size=6), st.lists(SHOWN, max_size=6))
def test_clear_output_forgets_all_that_came_before(before: list[Event], after: list[Event]) -> None:
    assert folded([*before, ClearOutput(wait=False), *after]) == folded(after)


@given(st.lists(SHOWN, max_size=6), st.lists(SHOWN, min_size=1, max_size=6))
def test_clear_output_with_wait_forgets_once_something_comes(before: list[Event], after: list[Event]) -> None:
    assert folded([*before, ClearOutput(wait=True)]) == folded(before)
    assert folded([*before, ClearOutput(wait=True), *after]) == folded(after)


def test_a_later_clear_without_wait_ends_the_waiting_one() -> None:
    events = [Stream("stdout", "a"), ClearOutput(wait=True), ClearOutput(wait=False), Stream("stdout", "b")]
    assert folded([*events, Stream("stdout", "c")]).text == "bc"


def test_an_update_replaces_every_display_of_its_id_in_place() -> None:
    result = folded(
        [
            DisplayData({"text/plain": "old", "text/html": "<b>"}, {"m": 1}, "one"),
            Stream("stdout", "between\n"),
            DisplayData({"text/plain": "other"}, {}, "two"),
            DisplayData({"text/plain": "old"}, {}, "one"),
            UpdateDisplayData({"text/plain": "new"}, {"m": 2}, "one"),
        ]
    )
    assert result.text == "new\nbetween\nother\nnew"
    assert result.outputs[0] == Output("display_data", data={"text/plain": "new"}, metadata={"m": 2}, display_id="one")


def test_an_update_of_a_display_of_another_cell_adds_nothing() -> None:
    assert folded([UpdateDisplayData({"text/plain": "new"}, {}, "elsewhere")]).outputs == []
    assert folded([UpdateDisplayData({"text/plain": "new"}, {}, None)]).outputs == []


@given(st.lists(DATA, min_size=1, max_size=20))
def test_updates_cost_no_more_than_their_last_content(contents: list[dict[str, Any]]) -> None:
    """G9."""
    first = DisplayData({"text/plain": "x"}, {}, "one")
    last = UpdateDisplayData({"text/plain": "last", "image/png": b"x" * 1000}, {}, "one")
    updates = [UpdateDisplayData(content, {}, "one") for content in contents]
    result = folded([first, *updates, last], 1 << 20, MEDIA)
    assert result.outputs == [Output("display_data", data=last.data, display_id="one")]


# -- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ([], None),
        ([Stream("stdout", "")], None),
        ([Stream("stdout", "\n \n")], None),
        ([Stream("stdout", "a"), Stream("stderr", "b")], "ab"),
        ([Stream("stdout", "a\n\n")], "a"),
        ([Stream("stdout", "\n\na")], "a"),
        ([Stream("stdout", "   a  b\n0  1  2\n")], "   a  b\n0  1  2"),
        ([Stream("stdout", "a"), DisplayData({"text/plain": "d"}), Stream("stdout", "b")], "a\nd\nb"),
        ([Stream("stdout", "a\n"), ExecuteResult({"text/plain": "d"}, {}, 1)], "a\nd"),
        ([DisplayData({"image/png": b""}), Stream("stdout", "b")], "b"),
        ([Stream("stdout", "a"), Error("E", "v", "t")], "a"),
        ([Error("E", "v", "t")], None),
        ([DisplayData({"text/plain": b"bytes"})], None),
    ],
)
def test_text_is_what_was_printed_and_displayed_in_order(events: list[Event], text: str | None) -> None:
    assert folded(events).text == text


@given(st.lists(STREAMS, max_size=6))
def test_printed_text_is_joined_without_a_seam(streams: list[Stream]) -> None:
    whole = printed(streams)
    assert (
        join_text([Output("stream", name=name.name, text=name.text) for name in streams]) == whole.strip("\n").rstrip()
    )


def test_text_of_one_stream_becomes_one_output() -> None:
    events = [Stream("stdout", "a"), Stream("stdout", "b"), Stream("stderr", "c"), Stream("stdout", "d")]
    assert [(output.name, output.text) for output in folded(events).outputs] == [
        ("stdout", "ab"),
        ("stderr", "c"),
        ("stdout", "d"),
    ]


def test_a_restart_is_remembered_and_no_output() -> None:
    result = folded([KernelRestarted(), Stream("stdout", "a"), ClearOutput(wait=False)])
    assert result.restarted
    assert result.outputs == []


def test_the_last_error_is_remembered() -> None:
    fold = Fold(LIMIT, MEDIA)
    fold.add(Error("A", "1", "t"))
    fold.add(Error("B", "2", "t"))
    assert fold.error == Error("B", "2", "t")


# -- images and colours -------------------------------------------------------------------------------------------


def test_a_bundle_holds_one_image_the_best_of_its_formats() -> None:
    both = {"image/svg+xml": "<svg/>", "image/png": b"\x89PNG", "text/plain": "x"}
    assert image_types(both) == [("image/png", b"\x89PNG")]
    assert image_types({"image/svg+xml": "<svg/>"}) == [("image/svg+xml", b"<svg/>")]
    assert image_types({"image/tiff": b"x"}) == []
    assert image_types({"image/png": b""}) == []
    assert image_types({"image/png": ["x"]}) == []


def test_an_image_can_be_saved_where_the_caller_wants(tmp_path: Path) -> None:
    Image(b"\x89PNG", "image/png").save(tmp_path / "a.png")
    Image(b"\x89PNG", "image/png").save(str(tmp_path / "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() == b"\x89PNG"


@pytest.mark.parametrize(
    ("colored", "bare"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[38;5;28;01mdef\x1b[39;00m", "def"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]52;c;ZXZpbA==\x1b\\x", "x"),
        ("\x1b]8;;http://e\x07link\x1b]8;;\x07", "link"),
        ("\x1bPq#0\x1b\\x", "x"),
        ("\x1b_apc\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\x", "x"),
        ("\x9b31mx", "31mx"),
        ("\x1b[2J\x1b[6n\x1bcx", "x"),
        ("\x1b", ""),
        ("a\x1b[", "a"),
        ("é€😀\n\t", "é€😀\n\t"),
    ],
)
def test_escape_sequences_are_stripped(colored: str, bare: str) -> None:
    """F5."""
    assert strip_ansi(colored) == bare


@given(st.text("\x1b[]0;m\x07\\\x9c\x9bP_ab\n", max_size=60))
def test_no_escape_is_left_in_stripped_text(text: str) -> None:
    """F5."""
    left = strip_ansi(text)
    assert "\x1b" not in left
    assert not any("\x80" <= character <= "\x9f" for character in left)


def test_stripping_takes_linear_time() -> None:
    began = time.process_time()
    for unit in ("\x1b[", "\x1b]", "\x1bP", "\x1b[0;", "\x1b]x", "\x1b "):
        strip_ansi(unit * 100_000)
    assert time.process_time() - began < 3

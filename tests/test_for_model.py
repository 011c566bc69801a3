"""What a model gets of a result: bounded text, images within bounds, and where the session can read the rest."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import sys
import zlib
from typing import TYPE_CHECKING, Any

import pandas as pd  # pyright: ignore[reportMissingTypeStubs]
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from actbox import (
    CodeExecutor,
    ExecutionError,
    ExecutionResult,
    ExecutionTimeout,
    InvalidArgument,
    KernelDied,
    Output,
    OutputPolicy,
    WorkspaceError,
    to_anthropic,
    to_openai,
)
from actbox.files import TextFolder
from actbox.guest import pictures, tables
from actbox.pictures import MAX_PIXELS, SMALLER, NotReduced, reduced, size_of
from actbox.readable import TABLE, plain, text_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOTE = re.compile(r"\[\.\.\. ([\d,]+) characters left out(?:: \[(\d+):(\d+)\] of the ([\d,]+) in (.+?))? \.\.\.\]")
# Seconds; much is to be read in these, and little time to be spent.
SOON = 5
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=20,
)


def picture(width: int = 4, height: int = 3, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Pillow.effect_noise((width, height), 60).convert("RGB").save(out, kind, **options)
    return out.getvalue()


def claimed(width: int, height: int) -> bytes:
    """A PNG of a few bytes that asks for this many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def result_of(*outputs: Output, keep: Callable[[str], str | None] | None = None, **more: Any) -> ExecutionResult:
    return ExecutionResult(None, [], list(outputs), _keep_text=keep, **more)


def shown(*data: dict[str, Any]) -> ExecutionResult:
    return result_of(*(Output("display_data", data=bundle) for bundle in data))


def printed(text: str) -> Output:
    return Output("stream", name="stdout", text=text)


def text(result: ExecutionResult, policy: OutputPolicy | None = None) -> str:
    """The text of a result that has no images."""
    blocks = result.for_model(policy)
    assert [block["type"] for block in blocks] == ["text"]
    return "".join(block["text"] for block in blocks if block["type"] == "text")


# -- text -------------------------------------------------------------------------------------------------------------


def test_a_short_result_is_given_whole() -> None:
    outputs = [
        printed("one\n"),
        Output("stream", name="stderr", text="two"),
        Output("execute_result", data={"text/plain": "3"}),
    ]
    assert result_of(*outputs).for_model() == [{"type": "text", "text": "one\ntwo\n3"}]


def test_nothing_is_said_to_be_nothing() -> None:
    assert result_of().for_model() == [{"type": "text", "text": "[no output]"}]
    assert result_of(printed(" \n\n")).for_model() == [{"type": "text", "text": "[no output]"}]


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\r 10%\r 20%\r100%\ndone", "100%\ndone"),
        ("a\r\nb\r\n", "a\nb\n"),
        ("a\0b\x07\x08c\x7f", "abc"),
        ("tab\tline\n", "tab\tline\n"),
        ("\x1b]0;title\x07x", "x"),
    ],
)
def test_text_is_as_a_terminal_shows_it_in_the_end(raw: str, read: str) -> None:
    assert plain(raw) == read


def test_long_text_keeps_its_head_and_its_tail_and_says_where_all_of_it_is() -> None:
    whole = "".join(f"line {number}\n" for number in range(5000))
    kept: list[str] = []

    def keep(document: str) -> str:
        kept.append(document)
        return "/app/x.txt"

    found = text(result_of(printed(whole), keep=keep), OutputPolicy(stream=1000))
    assert kept == [whole]
    note = NOTE.search(found)
    assert note is not None
    head, tail = found[: note.start()], found[note.end() + 1 :]
    begin, end = int(note[2]), int(note[3])
    assert (note[4], note[5]) == (f"{len(whole):,}", "/app/x.txt")
    assert note[1] == f"{end - begin:,}"
    assert head == whole[:begin]
    assert f"{tail}\n" == whole[end:]
    assert head.endswith("\n")
    assert 800 < len(head + tail) <= 1000


def test_what_is_not_cut_is_not_kept() -> None:
    def keep(_text: str) -> str:
        raise AssertionError

    assert text(result_of(printed("short"), keep=keep)) == "short"
    long = result_of(printed("x" * 2000), keep=keep)
    assert NOTE.search(text(long, OutputPolicy(stream=1000, spill=False)))


def test_a_disk_that_is_full_costs_the_place_and_nothing_else(tmp_path: Path) -> None:
    def keep(_text: str) -> str:
        raise WorkspaceError(tmp_path, "no room")

    found = NOTE.search(text(result_of(printed("x" * 2000), keep=keep), OutputPolicy(stream=1000)))
    assert found is not None
    assert found[5] is None


def test_a_traceback_is_cut_in_its_middle_and_without_colours() -> None:
    trace = "\x1b[31mValueError\x1b[0m\n" + "frame\n" * 5000 + "ValueError: why"
    error = Output("error", name="ValueError", text="why", trace=trace)
    found = text(result_of(error, ending="ValueError: why"), OutputPolicy(error=500))
    assert found.startswith("ValueError\nframe\n")
    assert found.endswith("frame\nValueError: why")
    assert len(found) < 600


def test_an_ending_is_told_once() -> None:
    error = Output("error", name="ValueError", text="why", trace="Traceback\nValueError: why")
    assert text(result_of(error, ending="ValueError: why")) == "Traceback\nValueError: why"
    assert text(result_of(ending="the kernel died")) == "[the kernel died]"
    assert text(result_of(error, ending="over the limit")).endswith("ValueError: why\n[over the limit]")


def test_a_fresh_kernel_and_missing_displays_are_told() -> None:
    found = text(result_of(printed("x"), restarted=True, omitted_media=2))
    assert found.startswith("[the kernel before this cell had died")
    assert "2 displays" in found


PIECES = st.lists(
    st.tuples(
        st.sampled_from(["stream", "display", "error", "image"]), st.text("ab\n", max_size=30), st.integers(1, 200)
    ),
    max_size=40,
)
BUDGETS = st.just(0) | st.integers(100, 2000)


@settings(max_examples=50)
@given(PIECES, st.integers(100, 3000), BUDGETS, BUDGETS, BUDGETS)
def test_whatever_comes_stays_within_the_budget_and_every_gap_is_told(
    pieces: list[tuple[str, str, int]], total: int, stream: int, display: int, error: int
) -> None:
    policy = OutputPolicy(total=total, stream=stream, display=display, error=error, images=100)
    outputs: list[Output] = []
    for kind, word, times in pieces:
        if kind == "stream":
            outputs.append(printed(word * times))
        elif kind == "error":
            outputs.append(Output("error", name="E", text="", trace=word * times))
        else:
            data = {"text/plain": word * times} if kind == "display" else {"image/png": PNG}
            outputs.append(Output("display_data", data=data))
    documents: list[str] = []

    def keep(document: str) -> str:
        documents.append(document)
        return "PLACE"

    blocks = result_of(*outputs, keep=keep).for_model(policy)
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    assert sum(len(NOTE.sub("", part)) for part in texts) <= total + 2 * len(NOTE.findall("".join(texts))) + 20
    assert sum(block["type"] == "image" for block in blocks) == sum(kind == "image" for kind, _, _ in pieces)
    for gap in NOTE.finditer("".join(texts)):
        assert gap[1] == f"{int(gap[3]) - int(gap[2]):,}"
        assert gap[4] == f"{len(documents[0]):,}"


PNG = picture()


def test_formats_have_budgets_of_their_own() -> None:
    long = shown({"text/markdown": "m" * 3000})
    assert NOTE.search(text(long, OutputPolicy(formats={"text/markdown": 500})))
    assert text(long) == "m" * 3000
    assert text(long, OutputPolicy(display=0)) == "[... 3,001 characters left out ...]"


@pytest.mark.parametrize(
    "wrong", [{"total": 5}, {"stream": -1}, {"images": -1}, {"error": 1.5}, {"display": True}, {"formats": {"a/b": 3}}]
)
def test_a_budget_that_cannot_be_kept_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="policy"):
        OutputPolicy(**wrong)


# -- formats ----------------------------------------------------------------------------------------------------------


def test_html_is_told_without_its_script_where_no_plain_text_says_more() -> None:
    source = (
        "<style>p {x}</style><h1>Title</h1><script>if (a < b) { x('</p>') }</script><!-- c -->"
        "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>&lt;2&gt;</td></tr></table>"
    )
    data = {"text/html": source, "text/plain": "<IPython.core.display.HTML object>"}
    assert text_of(data) == ("text/html", "Title\na | b\n1 | <2>")
    assert text_of({**data, "text/plain": "said"}) == ("text/plain", "said")
    assert text(shown({"text/html": f"<script>{'x' * 100_000}</script>"})) == "[no output]"


def test_html_that_is_written_over_many_lines_reads_as_it_looks() -> None:
    frame: Any = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert text(shown({"text/html": frame.to_html()})) == "a | b\n0 | 1 | x\n1 | 2 | y"
    assert text(shown({"text/html": "<p>one\ntwo</p><pre>three\nfour</pre>\nfive"})) == "one two\nthree\nfour\nfive"


@settings(max_examples=200)
@given(st.text("<>/!-?abpre \n&;"))
@example("<")
@example("a<")
def test_any_html_is_read(source: str) -> None:
    assert shown({"text/html": source}).for_model()


def test_what_begins_no_tag_is_text() -> None:
    assert text(shown({"text/html": "<b>1 < 2</b> and 2 > 1"})) == "1 < 2 and 2 > 1"


def test_a_figure_of_plotly_is_described_without_its_script() -> None:
    figure = {
        "data": [
            {"type": "scatter", "name": "height", "x": {"dtype": "f8", "bdata": base64.b64encode(bytes(800)).decode()}},
            {"type": "bar", "y": [1, 2, 3]},
        ],
        "layout": {"title": {"text": "Growth"}, "xaxis": {"title": {"text": "days"}}},
    }
    data = {"application/vnd.plotly.v1+json": figure, "text/html": f"<script>{'x' * 1_000_000}</script>"}
    assert text(shown(data)) == (
        "[plotly figure 'Growth', 2 traces]\nx: days\n- scatter 'height', 100 points\n- bar, 3 points"
    )


def test_json_and_markdown_are_text_and_the_rest_is_named() -> None:
    placeholder = "<IPython.core.display.Markdown object>"
    assert text(shown({"text/markdown": "# x", "text/plain": placeholder})) == "# x"
    assert (
        text(shown({"application/json": {"a": [1]}, "text/plain": "<IPython.core.display.JSON object>"}))
        == '{"a": [1]}'
    )
    assert text(shown({"application/pdf": b"%PDF-"})) == "[application/pdf: left out, there is no text in it]"


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from([TABLE, "application/vnd.plotly.v1+json", "text/html", "a/b+json"]), JSON))
def test_a_guest_may_send_anything_in_any_format(data: dict[str, Any]) -> None:
    assert shown(data).for_model()


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {"rows": JSON, "columns": JSON, "header": JSON, "head": JSON, "tail": JSON, "left_out_rows": JSON}
    )
)
def test_a_table_may_hold_anything(table: dict[str, Any]) -> None:
    assert shown({TABLE: table, "application/vnd.plotly.v1+json": {"data": [table], "layout": table}}).for_model()


@pytest.mark.timeout(SOON)
@pytest.mark.parametrize(
    "source", ["<" * (1 << 20), "<script>" * (1 << 18), "<!--" * (1 << 18), "<a " * (1 << 19), "&" * (1 << 20)]
)
def test_hostile_html_takes_linear_time(source: str) -> None:
    assert shown({"text/html": source}).for_model()


@pytest.mark.timeout(SOON)
def test_lines_that_are_overwritten_take_linear_time() -> None:
    assert plain("x" * (1 << 21)) == "x" * (1 << 21)
    assert plain("x\r" * (1 << 20)) == "x"


def test_many_small_outputs_stay_within_the_budget() -> None:
    outputs = [Output("display_data", data={"text/plain": "x" * 150}) for _ in range(10_000)]
    assert len(text(result_of(*outputs), OutputPolicy(total=1000, display=100))) < 3000


@pytest.mark.parametrize(
    ("frame", "first"),
    [
        (pd.DataFrame({"a": [1, 2], "b": [0.123456789, None]}), " | a (int64) | b (float64)"),
        (pl.DataFrame({"a": [1, 2], "b": [0.123456789, None]}), "a (Int64) | b (Float64)"),
    ],
    ids=["pandas", "polars"],
)
def test_a_frame_is_a_compact_table_with_its_shape(frame: Any, first: str) -> None:
    lines = text(shown({TABLE: tables.describe(frame)})).splitlines()
    assert lines[:2] == ["[table of 2 rows x 2 columns]", first]
    assert "0.123457" in lines[2]


@pytest.mark.parametrize("library", [pd, pl], ids=["pandas", "polars"])
def test_a_large_frame_costs_little(library: Any) -> None:
    frame = library.DataFrame({f"column {n}": ["x" * 10_000] * 1000 for n in range(100)})
    found = text(shown({TABLE: tables.describe(frame)}), OutputPolicy(display=50_000, total=60_000))
    assert len(found) < 25_000
    assert found.startswith("[table of 1,000 rows x 100 columns]")
    assert found.endswith("[the last 80 columns are not shown]")


def test_frames_that_are_odd_are_tables_too() -> None:
    same = pd.DataFrame([[1, [1] * 100]], columns=["a", "a"], index=pd.MultiIndex.from_tuples([("x", 1)]))
    assert "('x', 1) | 1 | <list of 100>" in text(shown({TABLE: tables.describe(same)}))
    assert text(shown({TABLE: tables.describe(pd.DataFrame())})) == "[table of 0 rows x 0 columns]"
    odd = pd.DataFrame({"a|b\n": ["c\nd"]})
    assert text(shown({TABLE: tables.describe(odd)})).count("\n") == 2


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("options", [{}, {"lossless": True}], ids=["", "lossless"])
def test_the_size_of_an_image_is_read_off_its_header(kind: str, options: dict[str, Any]) -> None:
    assert size_of(picture(37, 23, kind, **options), f"image/{kind.lower()}") == (37, 23)


@given(st.binary(), st.sampled_from(["image/png", "image/jpeg", "image/gif", "image/webp", "image/svg+xml"]))
def test_any_bytes_can_be_asked_for_their_size(data: bytes, mime: str) -> None:
    size_of(data, mime)
    size_of(b"\xff\xd8" + data, mime)
    size_of(b"RIFF0000WEBPVP8X" + data, mime)


def test_an_image_within_the_bounds_goes_as_it_came() -> None:
    blocks = shown({"image/png": PNG, "text/plain": "<Figure size 4x3 with 1 Axes>"}).for_model()
    assert blocks == [{"type": "image", "data": base64.b64encode(PNG).decode(), "mimeType": "image/png"}]


def test_images_and_text_keep_their_order() -> None:
    outputs = [printed("a"), Output("display_data", data={"image/png": PNG}), printed("b")]
    assert [block["type"] for block in result_of(*outputs).for_model()] == ["text", "image", "text"]


def test_more_images_than_allowed_are_named() -> None:
    blocks = shown({"image/png": PNG}, {"image/png": PNG}).for_model(OutputPolicy(images=1))
    assert blocks[1] == {
        "type": "text",
        "text": f"[image/png, 4x3 pixels, {len(PNG)} bytes: left out, no more than 1 are shown]",
    }


def test_nothing_is_decoded_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    large = picture(2000, 10)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert shown({"image/png": PNG}).for_model()[0]["type"] == "image"
    assert "more than 1568 pixels a side or 1,048,576 bytes; display it smaller" in text(shown({"image/png": large}))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_copy_is_made_of_an_image_that_is_too_large_and_of_no_other(kind: str) -> None:
    mime = f"image/{kind.lower()}"
    copy = pictures.copy_of([("text/plain", "text", b"x"), (mime, "binary", picture(2000, 100, kind))])
    assert copy is not None
    assert (size_of(copy, "image/png") or size_of(copy, "image/jpeg")) == (1568, 78)
    assert pictures.copy_of([(mime, "binary", picture(1568, 100, kind))]) is None
    assert pictures.copy_of([(mime, "binary", b"x" * (2 << 20))]) is None


def test_sessions_make_copies_for_the_bounds_that_hold_by_default() -> None:
    policy = OutputPolicy()
    assert (policy.image_side, policy.image_bytes) == (pictures.SIDE, pictures.BYTES)


def test_a_copy_has_few_enough_bytes_too() -> None:
    large = picture(1500, 1500)
    assert len(large) > 1 << 20
    copy = pictures.copy_of([("image/png", "binary", large)])
    assert copy is not None
    assert len(copy) <= 1 << 20


def test_without_pillow_there_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    large = picture(2000, 10)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert pictures.copy_of([("image/png", "binary", large)]) is None


def test_sixteen_bits_keep_their_upper_ones() -> None:
    out = io.BytesIO()
    Pillow.new("I;16", (2000, 10), 0x8000).save(out, "PNG")
    data, _ = reduced(out.getvalue(), "image/png", 100, 1 << 20)
    assert Pillow.open(io.BytesIO(data)).convert("L").getextrema() == (0x80, 0x80)


def test_the_sessions_copy_takes_the_place_of_a_large_image(monkeypatch: pytest.MonkeyPatch) -> None:
    large, copy = picture(2000, 10), picture(1500, 8)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # nothing is decoded here
    blocks = shown({"image/png": large, SMALLER: copy, "text/plain": "<Figure>"}).for_model()
    assert blocks == [{"type": "image", "data": base64.b64encode(copy).decode(), "mimeType": "image/png"}]
    assert "display it smaller" in text(shown({"image/png": large, SMALLER: copy}), OutputPolicy(image_side=1000))
    blocks = shown({"image/png": PNG, SMALLER: copy}).for_model()
    assert blocks == [{"type": "image", "data": base64.b64encode(PNG).decode(), "mimeType": "image/png"}]


@pytest.mark.parametrize(
    "copy",
    [b"", b"x" * 100, picture(1500, 8, "GIF"), claimed(100_000, 10), picture(3, 3) + bytes(1 << 20), "text", {"a": 1}],
    ids=["nothing", "no image", "another kind", "too many pixels", "too many bytes", "text", "json"],
)
def test_a_copy_that_lies_is_not_taken(copy: Any) -> None:
    assert "left out" in text(shown({"image/png": picture(2000, 10), SMALLER: copy}))


def test_without_pillow_a_large_image_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    large = picture(2000, 10)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "install actbox[images]" in text(shown({"image/png": large}), OutputPolicy(downscale=True))


@pytest.mark.parametrize(("kind", "after"), [("PNG", "png"), ("JPEG", "jpeg"), ("GIF", "png"), ("WEBP", "png")])
def test_a_large_image_is_made_smaller(kind: str, after: str) -> None:
    data = picture(400, 100, kind)
    blocks = shown({f"image/{kind.lower()}": data}).for_model(OutputPolicy(downscale=True, image_side=100))
    assert blocks[0]["type"] == "image"
    assert blocks[0]["mimeType"] == f"image/{after}"
    assert size_of(base64.b64decode(blocks[0]["data"]), f"image/{after}") == (100, 25)


def test_an_image_of_many_bytes_becomes_a_jpeg() -> None:
    data, mime = reduced(picture(500, 500), "image/png", 1000, 150_000)
    assert mime == "image/jpeg"
    assert len(data) <= 150_000
    with pytest.raises(NotReduced, match="too large even"):
        reduced(picture(500, 500), "image/png", 1000, 1000)


@pytest.mark.timeout(SOON)
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (claimed(100_000, 100_000), "pixels are not decoded"),
        (claimed(MAX_PIXELS // 1000 + 1, 1000), "pixels are not decoded"),
        (claimed(5000, 5000), "cannot be decoded"),
        (picture(1600, 20)[:3000], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 100, "not what it claims"),
        (b"GIF89a", "not what it claims"),
    ],
    ids=["bomb", "a little too large", "empty", "cut off", "no header", "other"],
)
def test_bombs_and_broken_images_are_left_out(data: bytes, why: str) -> None:
    assert why in text(shown({"image/png": data}), OutputPolicy(downscale=True))


def test_an_svg_is_named() -> None:
    found = text(shown({"image/svg+xml": "<svg/>", "text/plain": "<IPython.core.display.SVG object>"}))
    assert "image/svg+xml, 6 bytes: left out, models take no such images" in found


def test_blocks_fit_the_shapes_of_the_apis() -> None:
    blocks = result_of(printed("a"), Output("display_data", data={"image/png": PNG})).for_model()
    data = base64.b64encode(PNG).decode()
    assert to_anthropic(blocks) == [
        {"type": "text", "text": "a"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
    ]
    assert to_openai(blocks) == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
    ]
    assert to_openai(blocks, responses=True) == [
        {"type": "input_text", "text": "a"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{data}"},
    ]


# -- texts that are kept ----------------------------------------------------------------------------------------------


def test_texts_are_kept_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextFolder, "MAX_KEPT", 1000)
    monkeypatch.setattr(TextFolder, "MAX_TEXTS", 3)
    folder = TextFolder(tmp_path)
    names = [folder.save(str(number)) for number in range(5)]
    assert sorted(path.name for path in (tmp_path / ".outputs").iterdir()) == [name.split("/")[1] for name in names[2:]]
    last = folder.save("é" * 450)
    assert (tmp_path / last).read_text(encoding="utf-8") == "é" * 450
    assert len(list((tmp_path / ".outputs").iterdir())) == 3


def test_no_text_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "session").mkdir()
    (tmp_path / "session" / ".outputs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkspaceError, match="symbolic link"):
        TextFolder(tmp_path / "session").save("x")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- on every engine ---------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_session_reads_on_where_the_model_was_told(executor: CodeExecutor) -> None:
    result = await executor.execute("for number in range(5000): print(number, 'é')")
    note = NOTE.search(text(result, OutputPolicy(stream=500)))
    assert note is not None
    code = f"whole = open({note[5]!r}, encoding='utf-8').read(); print(len(whole), whole[{note[2]}:{note[3]}][:20])"
    first, _, rest = ((await executor.execute(code)).text or "").partition(" ")
    assert f"{int(first):,}" == note[4]
    assert result.text is not None
    assert rest.strip() == result.text[int(note[2]) :][:20].strip()
    assert result.omitted_bytes == 0


@pytest.mark.anyio
async def test_a_session_cannot_send_its_texts_elsewhere(executor: CodeExecutor, tmp_path: Path) -> None:
    await executor.execute(f"import os; os.symlink({str(tmp_path)!r}, '.outputs')")
    result = await executor.execute("print('x' * 100_000)")
    note = NOTE.search(text(result))
    assert note is not None
    assert note[5] is None
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - quick enough


@pytest.mark.anyio
async def test_failed_cells_give_what_there_was_and_why(executor: CodeExecutor) -> None:
    with pytest.raises(ExecutionError) as failed:
        await executor.execute("print('before')\n1 / 0")
    found = text(failed.value.result)
    assert found.startswith("before\n")
    assert found.endswith("ZeroDivisionError: division by zero")
    assert "\x1b" not in found
    with pytest.raises(ExecutionTimeout) as late:
        await executor.execute("print('at work')\nwhile True: pass", timeout=0.5)
    found = text(late.value.result)
    assert found.startswith("at work\n")
    assert found.endswith(f"[{late.value}]")
    with pytest.raises(KernelDied) as died:
        await executor.execute("import os; os.kill(os.getpid(), 9)")
    assert text(died.value.result) == f"[{died.value}]"
    assert text(await executor.execute("1")).startswith("[the kernel before this cell had died")


@pytest.mark.anyio
async def test_a_frame_and_a_plot_of_a_session_are_a_table_and_an_image(executor: CodeExecutor) -> None:
    await executor.execute("import pandas as pd")
    result = await executor.execute("pd.DataFrame({'n': range(1000)})")
    assert text(result).splitlines()[:3] == ["[table of 1,000 rows x 1 columns]", " | n (int64)", "0 | 0"]
    assert result.text is not None
    assert "[1000 rows x 1 columns]" in result.text
    result = await executor.execute("import matplotlib.pyplot as plt\nplt.plot([1, 2]);")
    assert [block["type"] for block in result.for_model()] == ["image"]


@pytest.mark.anyio
async def test_a_large_plot_is_made_smaller_by_the_session(
    executor: CodeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    result = await executor.execute("import matplotlib.pyplot as plt\nplt.figure(dpi=400)\nplt.plot([1, 2]);")
    (block,) = result.for_model()
    assert block["type"] == "image"
    size = size_of(base64.b64decode(block["data"]), block["mimeType"])
    assert size is not None
    assert max(size) == 1568
    whole = size_of(result.images[0].data, "image/png")
    assert whole is not None
    assert max(whole) > 1568
    assert SMALLER in result.outputs[-1].data
    made = executor.notebook()["cells"][-1]["outputs"][-1]["data"]
    assert made.keys() == {"image/png", "text/plain"}


@pytest.mark.anyio
@pytest.mark.engines("bubblewrap")  # its default environment is this one, with plotly and polars
async def test_libraries_of_figures_and_frames_are_understood(executor: CodeExecutor) -> None:
    result = await executor.execute(
        "import plotly.graph_objects as go\ngo.Figure(go.Scatter(x=list(range(50)), name='a'), layout={'title': 'T'})"
    )
    assert text(result) == "[plotly figure 'T', 1 traces]\n- scatter 'a', 50 points"
    result = await executor.execute("import polars as pl\npl.DataFrame({'a': [1]})")
    assert text(result) == "[table of 1 rows x 1 columns]\na (Int64)\n1"

"""The wire's rules, without a wire: bytes are frames or a FrameError, frames are messages or a ProtocolError."""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actbox.errors import ProtocolError
from actbox.events import ClearOutput, DisplayData, Error, ExecuteResult, Stream, UpdateDisplayData
from actbox.protocol import frames, messages
from actbox.protocol.frames import Decoder, Frame, FrameError, encode, parse_header

WHOLE = st.integers(-(10**18), 10**18)
NUMBERS = WHOLE | st.floats(allow_nan=False, allow_infinity=False)
# Surrogates too: JSON can spell them.
ANY_TEXT = st.text(st.characters(), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
HEADERS = st.dictionaries(ANY_TEXT, JSON, max_size=6)
FRAMES = st.builds(Frame, HEADERS, st.binary(max_size=200))


def raw(header: bytes, payload: bytes = b"") -> bytes:
    return frames.PREFIX.pack(len(header), len(payload)) + header + payload


def decode_in_pieces(data: bytes, cuts: list[int]) -> list[Frame]:
    decoder = Decoder()
    got: list[Frame] = []
    start = 0
    for stop in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        decoder.feed(data[start:stop])
        got.extend(decoder.frames())
        start = stop
    assert decoder.pending == 0
    return got


# -- frames -------------------------------------------------------------------------------------------------------


@given(st.lists(FRAMES, max_size=5), st.lists(st.integers(0, 10_000), max_size=8))
def test_frames_survive_the_wire_however_they_are_cut(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(encode(frame.header, frame.payload) for frame in sent)
    assert decode_in_pieces(data, cuts) == sent


@given(st.lists(FRAMES, max_size=3))
def test_frames_survive_the_wire_byte_by_byte(sent: list[Frame]) -> None:
    data = b"".join(encode(frame.header, frame.payload) for frame in sent)
    assert decode_in_pieces(data, list(range(len(data)))) == sent


@given(st.lists(st.binary(max_size=60), max_size=6))
@example([raw(b"{}")[:8], b"x"])
@example([raw(b"\xff\xfe{\0}\0")])
@example([raw(b"[" * 200_000)])
@example([bytes(8)])
def test_any_bytes_are_frames_or_a_frame_error(pieces: list[bytes]) -> None:
    """G3, G19."""
    decoder = Decoder()
    try:
        for piece in pieces:
            decoder.feed(piece)
            for frame in decoder.frames():
                assert type(frame.header) is dict
                assert type(frame.payload) is bytes
    except FrameError:
        return
    assert decoder.pending <= sum(map(len, pieces))


@given(st.binary(max_size=80), st.binary(max_size=20))
@example(b"[" * 200_000, b"")
@example(b'{"a":' * 200_000, b"")
@example(b"9" * 5000, b"")
@example(b'{"a":' + b"9" * 100_000 + b"}", b"")
@example(b'{"a":1e999}', b"")
@example(b'{"a":NaN}', b"")
@example(b'{"a":1,"a":2}', b"")
@example(b'"\\ud800"', b"")
@example(b"\xed\xa0\x80", b"")
@example(b"\0{\0}", b"")
def test_any_header_is_an_object_or_a_frame_error(header: bytes, payload: bytes) -> None:
    """G4, G19."""
    decoder = Decoder()
    decoder.feed(raw(header, payload))
    try:
        frame = decoder.next_frame()
    except FrameError:
        return
    assert frame is not None
    assert frame.payload == payload
    assert type(frame.header) is dict


@pytest.mark.parametrize(
    "prefix",
    [
        (0, 0),
        (frames.MAX_HEADER + 1, 0),
        (2, frames.MAX_PAYLOAD + 1),
        (2**31, 0),
        (2**32 - 1, 2**32 - 1),
        tuple(frames.PREFIX.unpack(b"GET / HT")),
        tuple(frames.PREFIX.unpack(b"\x16\x03\x01\x02\0\x01\0\x01")),
    ],
)
def test_lengths_out_of_bounds_are_refused_before_anything_behind_them_arrives(prefix: tuple[int, int]) -> None:
    """G1."""
    decoder = Decoder()
    decoder.feed(frames.PREFIX.pack(*prefix))
    with pytest.raises(FrameError, match="lengths out of bounds"):
        decoder.next_frame()


def test_a_decoder_may_have_a_lower_bound_for_payloads() -> None:
    decoder = Decoder(max_payload=10)
    decoder.feed(encode({}, b"x" * 10))
    assert decoder.next_frame() == Frame({}, b"x" * 10)
    decoder.feed(encode({}, b"x" * 11)[:8])
    with pytest.raises(FrameError):
        decoder.next_frame()


def test_the_largest_header_and_payload_pass_and_one_byte_more_does_not() -> None:
    """G1."""
    text = "x" * (frames.MAX_HEADER - len('{"a":""}'))
    decoder = Decoder()
    decoder.feed(encode({"a": text}, bytes(frames.MAX_PAYLOAD)))
    frame = decoder.next_frame()
    assert frame is not None
    assert frame.header == {"a": text}
    assert len(frame.payload) == frames.MAX_PAYLOAD
    with pytest.raises(FrameError, match="frame too large"):
        encode({"a": f"{text}x"})
    with pytest.raises(FrameError, match="frame too large"):
        encode({}, bytes(frames.MAX_PAYLOAD + 1))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"1",
        b'"text"',
        b"null",
        b"",
        b"{",
        b"{}{}",
        b"{} x",
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":-1e999}',
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b'{"a":123456789012345678901}',
        b'{"a":' + b"1" * 100_000 + b"}",
        b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a":' * 100_000,
        b"{" + b",".join(b'"%d":0' % number for number in range(10_001)) + b"}",
        b'{"a":"\xff"}',
        b"\xff",
        # UTF-8 alone: no other encoding, no byte order mark, no surrogates as bytes.
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        '{"a":1}'.encode("utf-32"),
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\xed\xa0\x80"}',
    ],
    ids=lambda header: re.sub(r"\W+", " ", ascii(header[:24])),
)
def test_a_header_that_is_no_plain_object_is_refused(header: bytes) -> None:
    """G4."""
    with pytest.raises(FrameError, match="bad header"):
        parse_header(header)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":"' + b"\\u0041" * 170_000 + b'"}',
        b'{"a":[' + b"0," * 500_000 + b"0]}",
        b'{"a":0.' + b"1" * 1_000_000 + b"}",
        b'{"a":1e-' + b"9" * 1_000_000 + b"}",
    ],
    ids=["escapes", "list", "digits", "exponent"],
)
def test_a_header_at_the_bound_costs_a_moment_at_most(header: bytes) -> None:
    """G4."""
    assert len(header) <= frames.MAX_HEADER
    began = time.process_time()
    parse_header(header)
    assert time.process_time() - began < 1


def test_after_a_frame_error_nothing_more_is_decoded() -> None:
    decoder = Decoder()
    decoder.feed(encode({"n": 1}) + raw(b"[]") + encode({"n": 2}))
    assert decoder.next_frame() == Frame({"n": 1}, b"")
    for _ in range(3):
        with pytest.raises(FrameError):
            decoder.next_frame()


@given(st.dictionaries(ANY_TEXT, st.just(math.nan) | st.just(math.inf), min_size=1, max_size=2))
def test_what_is_encoded_is_strict_json(header: dict[str, float]) -> None:
    with pytest.raises((FrameError, ValueError)):
        encode(header)


def test_a_long_stream_of_frames_leaves_nothing_behind() -> None:
    decoder = Decoder()
    frame = encode({"type": "stream"}, bytes(50_000))
    held = 0
    for _ in range(200):
        decoder.feed(frame + frame[:100])
        decoder.feed(frame[100:])
        assert len(list(decoder.frames())) == 2
        held = max(held, len(decoder._buffer))
    assert decoder.pending == 0
    assert held < 4 << 20


# -- messages -----------------------------------------------------------------------------------------------------

TYPES = st.sampled_from(
    [
        "stream",
        "display_data",
        "update_display_data",
        "execute_result",
        "clear_output",
        "error",
        "execute_reply",
        "ready",
        "failed",
    ]
)
PART = st.tuples(ANY_TEXT, st.sampled_from(["text", "binary", "json", "x"]), st.integers(-2, 30)).map(list)
PARTS = st.lists(PART | JSON, max_size=4) | JSON
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from(["stdout", "stderr"]) | JSON,
    "parts": PARTS,
    "metadata": HEADERS | JSON,
    "display_id": ANY_TEXT | JSON,
    "execution_count": st.integers(-1, 5) | JSON,
    "wait": JSON,
    "ename": ANY_TEXT | JSON,
    "evalue": ANY_TEXT | JSON,
    "id": st.integers(-1, 5) | JSON,
    "status": st.sampled_from(["ok", "error", "interrupted"]) | JSON,
    "python": ANY_TEXT | JSON,
    "ipython": ANY_TEXT | JSON,
    "layer": ANY_TEXT | JSON,
    "detail": ANY_TEXT | JSON,
}
NEARLY_RIGHT = st.fixed_dictionaries({"type": TYPES}, optional=FIELDS)


def is_encodable(value: object) -> bool:
    """Whether no lone surrogate is left in any text of a message."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_right(message: messages.Message) -> bool:
    match message:
        case Stream(name, text):
            return name in ("stdout", "stderr") and is_encodable(text)
        case DisplayData(data, metadata) | UpdateDisplayData(data, metadata) | ExecuteResult(data, metadata):
            return is_encodable(dict(data)) and is_encodable(dict(metadata))
        case Error(name, value, trace):
            return is_encodable([name, value, trace])
        case _:
            return True


@given(HEADERS | NEARLY_RIGHT, st.binary(max_size=60))
@example({"type": "display_data", "parts": [["a", "json", 60]], "metadata": {}}, b"[" * 60)
@example({"type": "display_data", "parts": [["a", "json", 8]], "metadata": {}}, b'"\\ud800"')
@example({"type": "display_data", "parts": [], "metadata": {"a": "\ud800"}}, b"")
@example({"type": "display_data", "parts": [["a", "text", 10**18]], "metadata": {}}, b"")
@example({"type": "display_data", "parts": [["a", "text", True]], "metadata": {}}, b"a")
@example({"type": "error", "ename": "\ud800", "evalue": "\udfff"}, b"\xff")
@example({"type": ["stream"]}, b"")
@example({"type": "stream", "name": ["stdout"]}, b"")
def test_any_frame_is_a_message_or_a_protocol_error(header: dict[str, Any], payload: bytes) -> None:
    """G19."""
    try:
        message = messages.decode(Frame(header, payload))
    except ProtocolError as exc:
        complaint = str(exc)
    else:
        assert is_right(message)
        return
    assert complaint.isascii()
    assert len(complaint) < 500


@pytest.mark.parametrize(
    "block",
    [b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000, b"\xff", b"", b"{", b"'a'"],
    ids=["deep list", "deep object", "long number", "no UTF-8", "nothing", "half", "no JSON"],
)
def test_json_that_cannot_be_read_is_a_protocol_error(block: bytes) -> None:
    """G4."""
    header: dict[str, Any] = {"type": "display_data", "metadata": {}}
    header["parts"] = [["application/json", "json", len(block)]]
    with pytest.raises(ProtocolError):
        messages.decode(Frame(header, block))


@pytest.mark.parametrize("depth", [500, 900, 970, 990, 2_000, 50_000, 200_000])
def test_a_type_nested_to_any_depth_is_refused(depth: int) -> None:
    """G4."""
    decoder = Decoder()
    decoder.feed(raw(b'{"type":' + b"[" * depth + b"]" * depth + b"}"))
    with pytest.raises((FrameError, ProtocolError)):
        messages.decode(decoder.next_frame() or Frame({}, b""))


@pytest.mark.parametrize("depth", [201, 500, 900])
def test_metadata_nested_too_deeply_is_a_protocol_error(depth: int) -> None:
    metadata = json.loads('{"a":' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ProtocolError):
        messages.decode(Frame({"type": "display_data", "parts": [], "metadata": metadata}, b""))


@pytest.mark.parametrize(
    "block",
    [b"[" * 300 + b"]" * 300, b"[" + b"[]," * 700_000 + b"0]", b'{"a":' * 300 + b"0" + b"}" * 300],
    ids=["deep list", "many lists", "deep object"],
)
def test_json_that_costs_more_than_it_shows_is_left_out_and_counted(block: bytes) -> None:
    parts = [["text/plain", "text", 1], ["application/json", "json", len(block)]]
    message = messages.decode(
        Frame({"type": "display_data", "parts": parts, "metadata": {}, "left_out": 2}, b"x" + block)
    )
    assert message == DisplayData({"text/plain": "x"}, {}, None, 3)


@pytest.mark.parametrize("header", [{"type": "stream", "name": "stdout"}, {"type": "error", "ename": "", "evalue": ""}])
def test_a_piece_of_text_has_a_bound(header: dict[str, Any]) -> None:
    messages.decode(Frame(header, b"x" * (1 << 20)))
    with pytest.raises(ProtocolError):
        messages.decode(Frame(header, b"x" * (2 << 20) + b"x"))


def test_a_header_nested_too_deeply_is_not_encoded() -> None:
    header: dict[str, Any] = {}
    for _ in range(5000):
        header = {"a": header}
    with pytest.raises(FrameError):
        encode(header)


def test_numbers_that_json_does_not_have_become_their_names() -> None:
    """G4."""
    block = b'{"a":[NaN,Infinity,-Infinity]}'
    header: dict[str, Any] = {"type": "display_data", "metadata": {}}
    header["parts"] = [["application/json", "json", len(block)]]
    message = messages.decode(Frame(header, block))
    assert message == DisplayData({"application/json": {"a": ["NaN", "Infinity", "-Infinity"]}}, {})


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"type": None},
        {"type": "Stream"},
        {"type": "stream"},
        {"type": "stream", "name": "stdin"},
        {"type": "execute"},
        {"type": "welcome", "limits": {}},
        {"type": "exited", "status": 0},
        {"type": "execute_reply", "id": -1, "status": "ok", "execution_count": 1},
        {"type": "execute_reply", "id": 1.0, "status": "ok", "execution_count": 1},
        {"type": "execute_reply", "id": True, "status": "ok", "execution_count": 1},
        {"type": "execute_reply", "id": "1", "status": "ok", "execution_count": 1},
        {"type": "execute_reply", "id": 2**53, "status": "ok", "execution_count": 1},
        {"type": "execute_reply", "id": 1, "status": "fine", "execution_count": 1},
        {"type": "execute_reply", "id": 1, "status": "ok"},
        {"type": "execute_reply", "id": 1, "status": "ok", "execution_count": -1},
        {"type": "error", "ename": "E"},
        {"type": "error", "ename": "E", "evalue": 1},
        {"type": "display_data", "metadata": {}},
        {"type": "display_data", "parts": {}, "metadata": {}},
        {"type": "display_data", "parts": [], "metadata": []},
        {"type": "display_data", "parts": []},
        {"type": "display_data", "parts": [["a", "text", 0]] * 65, "metadata": {}},
        {"type": "display_data", "parts": [["a", "text"]], "metadata": {}},
        {"type": "display_data", "parts": [["a", "text", 1]], "metadata": {}},
        {"type": "display_data", "parts": [["a", "text", -1]], "metadata": {}},
        {"type": "display_data", "parts": [["a", "pickle", 0]], "metadata": {}},
        {"type": "display_data", "parts": [["a" * 257, "text", 0]], "metadata": {}},
        {"type": "display_data", "parts": [], "metadata": {}, "display_id": 5},
        {"type": "execute_result", "parts": [], "metadata": {}},
    ],
    ids=lambda header: json.dumps(header)[:60],
)
def test_a_frame_that_a_kernel_may_not_send_is_refused(header: dict[str, Any]) -> None:
    """G5, G16."""
    with pytest.raises(ProtocolError):
        messages.decode(Frame(header, b""))


def test_every_message_is_decoded_field_by_field() -> None:
    parts = [["text/plain", "text", 1], ["image/png", "binary", 2], ["application/json", "json", 9]]
    display = {"parts": parts, "metadata": {"a": 1}}
    payload = b'x\x89P{"b":[2]}'
    data = {"text/plain": "x", "image/png": b"\x89P", "application/json": {"b": [2]}}
    cases: list[tuple[dict[str, Any], bytes, messages.Message]] = [
        ({"type": "stream", "name": "stderr"}, "é".encode(), Stream("stderr", "é")),
        ({"type": "display_data", **display, "display_id": "i"}, payload, DisplayData(data, {"a": 1}, "i")),
        ({"type": "update_display_data", **display}, payload, UpdateDisplayData(data, {"a": 1}, None)),
        ({"type": "execute_result", **display, "execution_count": 3}, payload, ExecuteResult(data, {"a": 1}, 3)),
        ({"type": "clear_output", "wait": True}, b"", ClearOutput(wait=True)),
        ({"type": "clear_output", "wait": 1}, b"", ClearOutput(wait=False)),
        ({"type": "error", "ename": "E", "evalue": "v"}, b"t\xff", Error("E", "v", "t\ufffd")),
        (
            {"type": "execute_reply", "id": 4, "status": "interrupted", "execution_count": 9},
            b"",
            messages.Reply(4, "interrupted", 9),
        ),
        ({"type": "ready", "python": "3" * 999, "ipython": "9"}, b"", messages.Ready("3" * 256, "9")),
        ({"type": "failed", "layer": "seccomp", "detail": "d"}, b"", messages.SetupFailed("seccomp", "d")),
    ]
    for header, body, expected in cases:
        assert messages.decode(Frame(header, body)) == expected

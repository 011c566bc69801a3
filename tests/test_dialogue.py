"""What attached clients and gateways tell each other: read back as it was written, and nothing else believed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actbox import (
    AttachedClient,
    Checkpoint,
    Dropped,
    Image,
    Output,
    ProtocolError,
    SessionGone,
    Standing,
    dialogue,
    refusals,
)
from actbox.dialogue import Request
from actbox.errors import (
    ActboxError,
    CheckpointMissing,
    ConnectionError,
    DriveRefused,
    ExecutionTimeout,
    ExecutionUnknown,
    ForkRefused,
    InvalidArgument,
    LimitExceeded,
    SandboxUnavailable,
    SessionBroken,
    StateError,
    TransferRefused,
)
from actbox.events import (
    ClearOutput,
    Died,
    DisplayData,
    Error,
    Exceeded,
    ExecuteResult,
    Failed,
    Finished,
    Interrupted,
    KernelRestarted,
    Lost,
    Overrun,
    Stream,
    TimedOut,
    UpdateDisplayData,
)
from actbox.journal import Journal
from actbox.lines import Change, Ending, Page, Wish
from actbox.protocol import frames
from actbox.result import ExecutionResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from actbox.events import Event, Outcome

BOUND = 15.0
PNG = b"\x89PNG\r\n\x1a\n"
ERROR = Error("ValueError", "é", "trace")
EVENTS: list[Event] = [
    KernelRestarted(),
    Stream("stdout", "é😀\n"),
    Stream("stderr", ""),
    DisplayData({"text/plain": "x", "image/png": PNG, "application/json": {"a": [1, None, 0.5]}}, {"m": 1}, "d", 2),
    UpdateDisplayData({"text/html": "<p>"}, {}, "d"),
    ExecuteResult({"text/plain": "1"}, {}, 3),
    ClearOutput(wait=True),
    ERROR,
]
OUTCOMES: list[Outcome] = [
    Finished(1),
    Failed(ERROR, 2),
    Interrupted(state_kept=True, error=ERROR),
    Interrupted(state_kept=False, started=False, rolled_back_to=4),
    TimedOut(0.5, state_kept=True, started=False),
    Exceeded(Overrun("memory", 1024.0, 2048.0), state_kept=True, error=ERROR),
    Exceeded(Overrun("wall", 0.5, 0.5), state_kept=False, rolled_back_to=1),
    Died(signal=9, memory_limit=5),
    Died(exit_code=3),
    Died(reason="why", rolled_back_to=2),
    Lost("gone"),
    Lost("broken", violation=True),
]


def over_the_wire(told: Iterable[frames.Frame]) -> list[frames.Frame]:
    """The frames as they arrive."""
    decoder = frames.Decoder()
    for frame in told:
        decoder.feed(frames.encode({**frame.header, "re": 1}, frame.payload))
    return list(decoder.frames())


# -- the journal -----------------------------------------------------------------------------------------------------


def numbers(journal: Journal, after: int, size: int = 1 << 30, count: int = 1000) -> list[Any]:
    return [event if isinstance(event, Dropped) else number for number, event in journal.after(after, size, count)]


def test_a_journal_numbers_events_and_drops_the_oldest_by_count() -> None:
    journal = Journal(max_events=3)
    assert numbers(journal, 0) == []
    assert (journal.first, journal.last) == (1, 0)
    assert [journal.add(Stream("stdout", str(n))) for n in range(5)] == [1, 2, 3, 4, 5]
    assert (journal.first, journal.last) == (3, 5)
    assert numbers(journal, 0) == [Dropped(1, 2), 3, 4, 5]
    assert numbers(journal, 1) == [Dropped(2, 2), 3, 4, 5]
    assert numbers(journal, 2) == [3, 4, 5]
    assert numbers(journal, 5) == numbers(journal, 99) == []
    assert Dropped(1, 2).count == 2


def test_a_journal_drops_by_size_even_what_has_just_come() -> None:
    journal = Journal(max_bytes=100)
    for _ in range(5):
        journal.add(Stream("stdout", "x" * 40))
    assert (numbers(journal, 0), journal.size) == ([Dropped(1, 3), 4, 5], 80)
    journal.add(Stream("stdout", "x" * 101))
    assert (numbers(journal, 0), journal.size) == ([Dropped(1, 6)], 0)


def test_a_page_has_a_bound_but_never_nothing() -> None:
    journal = Journal()
    for _ in range(5):
        journal.add(Stream("stdout", "x" * 40))
    assert numbers(journal, 0, size=1) == [1]
    assert numbers(journal, 1, size=80) == [2, 3]
    assert numbers(journal, 0, count=4) == [1, 2, 3, 4]


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(0, 45), st.integers(1, 200), st.integers(1, 10))
def test_reading_on_from_the_last_number_misses_nothing(sizes: list[int], after: int, bytes_: int, count: int) -> None:
    journal = Journal(max_bytes=150, max_events=12)
    for size in sizes:
        journal.add(Stream("stdout", "x" * size))
    expected = after + 1
    while page := journal.after(expected - 1, bytes_, count):
        for number, event in page:
            first = event.first if isinstance(event, Dropped) else number
            assert first == expected
            expected = number + 1
    assert expected - 1 == max(after, journal.last)


# -- what is told ----------------------------------------------------------------------------------------------------


def test_a_page_comes_as_it_was_told() -> None:
    events = ((3, Dropped(1, 3)), *((number, event) for number, event in enumerate(EVENTS, 4)))
    for ended in (True, False):
        page = Page(events, ended)
        told = over_the_wire(dialogue.page_frames(page))
        assert dialogue.read_page(0, told) == page
        # Of a page that was cut off, as much as has come.
        assert dialogue.read_page(0, told[:4]) == Page(events[:4], ended=False)
        with pytest.raises(ProtocolError):
            dialogue.read_page(1, told)


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: type(outcome).__name__)
def test_an_ending_comes_as_it_was_told(outcome: Outcome) -> None:
    outputs = [
        Output("stream", name="stdout", text="é" * 2_000_000),
        Output("stream", name="stderr", text="x"),
        Output("display_data", data={"image/png": PNG, "text/plain": "p"}, display_id="d"),
        Output("execute_result", data={"text/plain": "1"}, execution_count=2),
        Output("error", name="ValueError", text="v", trace="t"),
    ]
    images = [Image(PNG, "image/png", Path("/x/1.png")), Image(b"<svg>", "image/svg+xml")]
    text = f"{'é' * 2_000_000}x\np\n1"
    result = ExecutionResult(text, images, outputs, 1, 2, restarted=True, execution_count=3, duration=0.25)
    told = over_the_wire(dialogue.ending_frames(Ending(outcome, result)))
    assert dialogue.read_ending(told) == Ending(outcome, result)
    with pytest.raises(ProtocolError):
        dialogue.read_ending(told[:-1])


def test_an_event_that_no_frame_can_hold_is_told_as_dropped() -> None:
    huge = Error("E", "x" * (frames.MAX_HEADER + 1), "t")
    page = Page(((1, huge), (2, ERROR)), ended=True)
    told = over_the_wire(dialogue.page_frames(page))
    assert dialogue.read_page(0, told).events == ((1, Dropped(1, 1)), (2, ERROR))
    outputs = [Output("error", name="E", text=huge.value, trace="t")]
    told = over_the_wire(dialogue.ending_frames(Ending(Failed(huge, 1), ExecutionResult(None, [], outputs))))
    ending = dialogue.read_ending(told)
    assert isinstance(ending.outcome, Failed)
    assert ending.outcome.error.name == "E"
    assert ending.result.omitted_media == 1


def test_requests_and_wishes_come_as_they_were_told() -> None:
    for request in (
        Request(1, "submit", "id", timeout=0.5, code="é\ud800"),
        Request(2, "read", "id", 7),
        Request(3, "result", "id"),
        Request(4, "interrupt", "id"),
        Request(5, "executions"),
        Request(6, "end"),
        Request(7, "checkpoints"),
        Request(8, "change", change=Change("fork", "n", "m", 1.5, force=True, files=True, key="k")),
    ):
        assert dialogue.read_request(dialogue.request_frame(request)) == request
    for wish in (Wish("n", "c"), Wish("n", "c", "k", 0.5, drive=False, take_over=True, incarnation="i")):
        assert dialogue.read_wish(dialogue.wish_fields(wish)) == wish
    standings = [Standing("a", "running", 1, 0), Standing("b", "ended", 2, 9, "Died")]
    assert dialogue.read_standings(over_the_wire([dialogue.standings_frame(standings)])) == standings
    checkpoints = [Checkpoint("a", 1, 2.5), Checkpoint("b", 0, 3.0, files=True, left_out=("x", "y"))]
    assert dialogue.read_checkpoints(over_the_wire([dialogue.checkpoints_frame(checkpoints)])) == checkpoints


@pytest.mark.parametrize(
    "exc",
    [
        SessionGone("n", "why"),
        ExecutionUnknown("id", "why"),
        SandboxUnavailable("layer", "detail", "remedy"),
        DriveRefused("why"),
        StateError("why"),
        CheckpointMissing("n", "why"),
        TransferRefused("path", "why"),
        ForkRefused("why"),
        SessionBroken("why", rolled_back_to=3),
        LimitExceeded("pids", 5, 6, state_kept=True, name="OSError", value="why"),
        ExecutionTimeout(1.5, state_kept=True, started=False, what="request"),
        ProtocolError("why"),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_a_refusal_is_the_same_exception_on_the_other_side(exc: ActboxError) -> None:
    (frame,) = over_the_wire([refusals.refusal_frame(exc)])
    told = refusals.read_refusal(frame.header)
    assert (type(told), str(told), vars(told)) == (type(exc), str(exc), vars(exc))


def test_other_refusals_keep_their_kind_and_drive_no_terminal() -> None:
    told = refusals.read_refusal(refusals.refusal_frame(InvalidArgument("ttl", -1, "pass more")).header)
    assert isinstance(told, InvalidArgument)
    assert (told.name, told.remedy) == ("ttl", "pass more")
    told = refusals.read_refusal({"kind": "DriveRefused", "reason": "\x1b[2J"})
    assert str(told) == "\\x1b[2J"
    for header in ({}, {"kind": "Exception", "reason": "x"}, {"kind": "SessionGone"}, {"kind": ["x"], "reason": 5}):
        assert isinstance(refusals.read_refusal(header), ConnectionError)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=5,
)
KINDS = [
    "event",
    "dropped",
    "page",
    "output",
    "image",
    "error",
    "ending",
    "standings",
    "refused",
    "read",
    "submit",
    "change",
    "checkpoints",
]
FIELDS = [
    "n",
    "number",
    "event",
    "first",
    "last",
    "ended",
    "mime",
    "path",
    "outcome",
    "rows",
    "execution",
    "after",
    "change",
]


def typed(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "type": kind}


def read_first_page(answer: list[frames.Frame]) -> Page:
    return dialogue.read_page(0, answer)


HEADERS = st.builds(
    typed,
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(FIELDS), JSON | st.just({"type": "stream", "name": "stdout"})),
)


@given(st.lists(st.builds(frames.Frame, HEADERS, st.binary(max_size=10)), max_size=4))
def test_whatever_is_answered_is_understood_or_refused(answer: list[frames.Frame]) -> None:
    for read in (read_first_page, dialogue.read_ending, dialogue.read_standings, dialogue.read_checkpoints):
        with contextlib.suppress(ProtocolError):
            read(answer)
    for frame in answer:
        with contextlib.suppress(ProtocolError):
            dialogue.read_request(frame)
        with contextlib.suppress(ProtocolError):
            dialogue.read_wish(frame.header)
        assert isinstance(refusals.read_refusal(frame.header), ActboxError)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "answer",
    [
        {"type": "page"},
        {"type": "page", "ended": 1},
        {"type": "done"},
        {"type": "ending", "outcome": {"kind": "Finished"}},
        {"type": "standings", "rows": [["x"]]},
    ],
    ids=str,
)
async def test_a_gateway_that_answers_nonsense_is_not_believed(answer: dict[str, Any]) -> None:
    def tell(frame: frames.Frame) -> bytes:
        if frame.header["type"] == "hello":
            return frames.encode({"type": "welcome", "incarnation": "i"})
        return frames.encode({**answer, "re": frame.header["n"]}) if "n" in frame.header else b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = frames.Decoder()
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                decoder.feed(data)
                told = list(decoder.frames())
                writer.write(b"".join(map(tell, told)))
                if any(frame.header["type"] == "leave" for frame in told):
                    break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with asyncio.timeout(BOUND), AttachedClient(port, "x", token="t", patience=0.1) as client:
        with pytest.raises(ProtocolError):
            await client.execution("e").result()
        with pytest.raises(ProtocolError):
            async for _ in client.execution("e").events():
                pass
    server.close()

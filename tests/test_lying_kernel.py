"""A guest that lies in every way it can: the host believes nothing, loses that session alone, and holds little of it.

The guest is `lying.Kernel`, so that a lie is told exactly as it is written. What a real kernel can do from inside its
sandbox is tried in `test_executions` and `test_gateway`. The numbers are those of the cases of containment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lying import READY, Kernel, Liar, at_first_cell, framed
from test_executions import Growth, _resident
from test_frames import ANY_TEXT, FIELDS, HEADERS, JSON

from actbox import (
    ConnectionError,
    Execution,
    ExecutionClient,
    ExecutionContainer,
    ExecutionError,
    ExecutionLost,
    ExecutionResult,
    ExecutionTimeout,
    KernelDied,
    Limits,
    ProtocolError,
    SandboxUnavailable,
    link,
    sessions,
    supervision,
)
from actbox.events import Died, Failed, Finished, Interrupted, Lost
from actbox.protocol import frames

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable

    from lying import Script, Supervising

# What is bounded here is memory; time is, too, but a busy machine may take its own.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90)]

SECONDS = 30.0
GRACE = 0.1
MIB = 1 << 20
PNG = b"\x89PNG\r\n\x1a\n"
# A lie may cost the host what one frame may hold, twice while it is put together, and what a result may keep.
MOST_GROWTH = 3 * 64 * MIB


class Client(ExecutionClient):
    """Notes how often each of its executions ended, and the images that it was given to keep."""

    def __init__(self, port: int, token: str | None = None) -> None:
        super().__init__(port, "127.0.0.1", interrupt_grace=GRACE, token=token)
        self.ended: list[Execution] = []
        self.kept: list[tuple[bytes, str]] = []

    async def note_end(self, execution: Execution) -> None:
        self.ended.append(execution)

    def keep_image(self, data: bytes, mime_type: str) -> Path | None:
        self.kept.append((data, mime_type))
        return None


class House:
    """A container of lying sessions, one honest one in it, and a count of what this process holds open."""

    def __init__(self, supervising: Supervising | None = None, **arguments: Any) -> None:
        self.liar = Liar(supervising)
        self.container = ExecutionContainer(preload=(), **arguments)
        self.container._engines = (self.liar,)
        self._open = open_files()
        self._stack = contextlib.AsyncExitStack()
        self.neighbour: Client

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.container)
        self.neighbour = await self._stack.enter_async_context(self.client())
        await self.neighbour.execute("here", timeout=SECONDS)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        try:
            await self.look_after_neighbour()
        finally:
            await self._stack.aclose()
            await asyncio.to_thread(self.liar.join)
        assert not self.container._sessions
        assert open_files() == self._open

    def client(self, *scripts: Script, by_port: bool = False) -> Client:
        """A client whose sessions are played by these scripts, one after the other, and by honest ones then."""
        self.liar.scripts.extend(scripts)
        return Client(self.container.port, self.container.token if by_port else None)

    async def look_after_neighbour(self) -> None:
        """The honest session goes on, with the state that it had."""
        result = await self.neighbour.execute("still here", timeout=SECONDS)
        assert (result.text, result.restarted) == ("still here", False)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only their number matters


def null_device() -> BinaryIO:
    return Path(os.devnull).open("rb")


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with House() as made:
        yield made


@pytest.fixture(params=["door", "port"])
def by_port(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the client comes through the gateway, as one of another process does."""
    if request.param == "port":
        # The client must not find the container in its own process.
        monkeypatch.setattr(sessions, "_doors", {})
        monkeypatch.setattr(sessions, "open_door", _open_no_door)
    return request.param == "port"


def _open_no_door(_port: int, _door: object) -> None:
    return


async def hear(
    house: House, lie: Script, *, timeout: float = SECONDS, by_port: bool = False
) -> ExecutionResult | Exception:
    """What comes of a cell that is answered by a lie; whatever it is, the client goes on in another session."""
    async with house.client(at_first_cell(lie), by_port=by_port) as client:
        async with asyncio.timeout(2 * SECONDS):
            heard = await outcome_of(client, timeout)
            assert len(client.ended) == 1
            after = await client.execute("after", timeout=SECONDS)
        lost = not isinstance(heard, ExecutionResult | ExecutionError)
        assert (after.text, after.restarted) == ("after", lost) or not lost
    return heard


async def outcome_of(client: Client, timeout: float = SECONDS) -> ExecutionResult | Exception:
    execution = await client.submit("lie")
    try:
        return await execution.result(timeout)
    except (ExecutionError, ExecutionLost, ExecutionTimeout, KernelDied, ProtocolError) as exc:
        return exc


def raw(data: bytes) -> Script:
    return lambda kernel: kernel.raw(data)


def frame(header: dict[str, Any] | bytes, payload: bytes = b"") -> Script:
    return lambda kernel: kernel.frame(header, payload)


def display(block: bytes, form: str = "json", mime: str = "application/json") -> Script:
    return frame({"type": "display_data", "parts": [[mime, form, len(block)]], "metadata": {}}, block)


def and_reply(lie: Script) -> Script:
    def script(kernel: Kernel) -> None:
        lie(kernel)
        kernel.reply()

    return script


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def with_field(value: bytes) -> Script:
    return frame(b'{"type":"stream","name":"stdout","more":' + value + b"}")


# What is no frame, or a frame that no kernel may send.
BROKEN: dict[str, Script] = {
    "G1: lengths of 2^32-1": raw(b"\xff" * 8),
    "G1: a header of 2^32-1": raw(frames.PREFIX.pack(2**32 - 1, 0)),
    "G1: a payload of 2^32-1": raw(frames.PREFIX.pack(2, 2**32 - 1)),
    "G1: 2^63 as one number": raw((2**63).to_bytes(8, "big")),
    "G1: a header of nothing": raw(bytes(8)),
    "G3: garbage": raw(b"garbage" * 1000),
    "G3: HTTP": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "G3: TLS": raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "G3: a MiB of zeros": raw(bytes(MIB)),
    "G4: a depth of 200 000": with_field(nested(200_000)),
    "G4: an int of 5000 digits": with_field(b"9" * 5000),
    "G4: NaN": with_field(b"NaN"),
    "G4: 1e999": with_field(b"1e999"),
    "G4: a repeated key": with_field(b'0,"more":0'),
    "G4: no object": frame(b"[]"),
    "G4: 10^5 keys": frame(b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b"}"),
    "G4: a number for a text": frame({"type": "error", "ename": 1, "evalue": "v"}),
    "G4: a type that is a list": frame({"type": ["stream"]}),
    "G4: metadata of any depth": frame(b'{"type":"display_data","parts":[],"metadata":{"a":' + nested(600) + b"}}"),
    "G4: JSON that ends early": display(b"[" * 100),
    "G4: parts longer than their payload": frame(
        {"type": "display_data", "parts": [["a/b", "text", 10**18]], "metadata": {}}, b"x"
    ),
    "G5: an unknown type": frame({"type": "surprise"}),
    "G5: the reply of another cell": lambda kernel: kernel.reply(id=kernel.cell + 1),
    "G5: ready once more": frame(READY),
    "G5: a layer that failed": frame({"type": "failed", "layer": "seccomp", "detail": "off"}),
    "G5: a piece of an archive": lambda kernel: kernel.frame({"type": "archive", "id": kernel.cell}, b"x"),
    "G6: a pickle": raw(b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93."),
    "G8: 64 MiB of text in one piece": frame({"type": "stream", "name": "stdout"}, b"x" * (64 * MIB)),
    "G12: a trace of 64 MiB": frame({"type": "error", "ename": "E", "evalue": ""}, b"x" * (64 * MIB)),
    "G16: a gateway's word": frame({"type": "exited", "status": 0, "gone": True}),
    "G16: a host's word": frame({"type": "execute", "id": 1}, b"x"),
    "G16: a limit of another's": frame({"type": "overrun", "limit": "memory", "bound": 1, "use": 2}),
}


@pytest.mark.parametrize("lie", BROKEN.values(), ids=BROKEN.keys())
async def test_a_guest_that_breaks_the_rules_is_found_out(house: House, lie: Script, *, by_port: bool) -> None:
    """G1, G3, G4, G5, G6, G8, G12, G16: a ProtocolError, one session lost, and little held."""
    async with Growth() as growth:
        heard = await hear(house, lie, by_port=by_port)
    assert isinstance(heard, ProtocolError)
    # By the port, gateway and client are both in this process.
    assert growth.bytes < MOST_GROWTH * (1 + by_port)


@pytest.mark.parametrize("greeting", ["G1", "G3: garbage", "G3: HTTP", "G3: TLS", "G4: no object", "G5: an unknown"])
async def test_a_guest_that_lies_in_its_greeting_is_no_session(house: House, greeting: str) -> None:
    """G3, G5: what is wrong later is wrong at first."""
    lie = next(lie for name, lie in BROKEN.items() if name.startswith(greeting))

    def script(kernel: Kernel) -> None:
        kernel.request()
        lie(kernel)
        kernel.request()

    with pytest.raises(ProtocolError):
        await house.client(script).connect()


async def test_done_before_start_is_no_greeting(house: House) -> None:
    """G5: a reply before any cell was sent."""

    def script(kernel: Kernel) -> None:
        kernel.request()
        kernel.reply(id=1)
        kernel.request()

    with pytest.raises(ProtocolError):
        await house.client(script).connect()


SURROGATE = b'{"type":"stream","name":"stdout","\\ud800":"\\udfff"}'
# What is odd, and yet within the rules.
ODD: dict[str, Script] = {
    "G4: a lone surrogate in a header": frame(SURROGATE, b"x"),
    "G4: lone surrogates in JSON": display(b'{"\\ud800":["\\udfff"]}'),
    "G4: bytes that are no text": frame({"type": "stream", "name": "stdout"}, b"\xff\xed\xa0\x80x"),
    "G4: numbers that JSON does not have": display(b"[NaN,Infinity,-Infinity]"),
    "G4: JSON of a depth of 600": display(nested(600)),
    "G4: JSON of 10^7 values": display(b"[" + b"[]," * 10_000_000 + b"0]"),
    "G4: JSON of 10^6 keys": display(b"{" + b",".join(b'"%d":0' % number for number in range(1_000_000)) + b"}"),
    "G6: YAML": display(b"!!python/object/apply:os.system [touch canary]", "text", "text/yaml"),
    "G18: names that drive a terminal": frame(
        {"type": "error", "ename": "\x1b]0;x\x07\n%s{}", "evalue": "\r\n%n"}, b"\x1b[2J"
    ),
}


@pytest.mark.parametrize("lie", ODD.values(), ids=ODD.keys())
async def test_what_is_odd_is_taken_as_it_is_and_harms_nobody(house: House, lie: Script, *, by_port: bool) -> None:
    """G4, G6, G18: a result, whose texts can be written anywhere."""
    async with Growth() as growth:
        heard = await hear(house, and_reply(lie), by_port=by_port)
    assert isinstance(heard, ExecutionResult)
    said = [[output.text, dict(output.data), dict(output.metadata)] for output in heard.outputs]
    json.dumps(said, ensure_ascii=False, default=repr).encode()
    assert growth.bytes < MOST_GROWTH


async def test_json_that_would_cost_too_much_is_left_out_and_counted(house: House) -> None:
    """G4, G9: 30 MB on the wire would be two gigabytes here."""
    for block in (b"[" + b"[]," * 10_000_000 + b"0]", nested(600)):
        heard = await hear(house, and_reply(display(block)))
        assert isinstance(heard, ExecutionResult)
        assert heard.omitted_media == 1
        assert [dict(output.data) for output in heard.outputs] == [{}]


async def test_a_header_that_grows_when_it_is_written_again_ends_its_session(house: House, *, by_port: bool) -> None:
    """G4: within its bound as it came, beyond it as the gateway would write it."""
    head = json.dumps({"type": "stream", "name": "stdout", "more": "é" * 400_000}, ensure_ascii=False).encode()
    heard = await hear(house, and_reply(frame(head, b"x")), by_port=by_port)
    assert isinstance(heard, ProtocolError if by_port else ExecutionResult)


@pytest.mark.parametrize("piece", [b"", b"\x00", frames.PREFIX.pack(100, 0) + b'{"type":"'])
async def test_a_guest_that_stalls_in_a_frame_is_ended_by_the_cells_time(
    house: House, piece: bytes, *, by_port: bool
) -> None:
    """G2: promise 100 bytes, send 10, stall."""
    heard = await hear(house, raw(piece), timeout=0.2, by_port=by_port)
    assert isinstance(heard, ExecutionTimeout)
    assert not heard.state_kept


async def test_a_guest_that_sends_byte_by_byte_is_ended_by_the_cells_time(house: House) -> None:
    """G2: a byte now and then is no sign of life that counts."""

    def drip(kernel: Kernel) -> None:
        pause = threading.Event()
        for byte in framed({"type": "stream", "name": "stdout", "more": "x" * 10_000}):
            kernel.raw(bytes([byte]))
            pause.wait(0.02)

    heard = await hear(house, drip, timeout=0.3)
    assert isinstance(heard, ExecutionTimeout)


@pytest.mark.parametrize("said", [b"", b"\x00\x00"])
async def test_a_guest_that_never_greets_is_given_up(
    house: House, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G2: nothing, or half a greeting."""
    monkeypatch.setattr(sessions, "READY_SECONDS", 0.2)

    def script(kernel: Kernel) -> None:
        kernel.request()
        kernel.raw(said)
        kernel.request()

    with pytest.raises(ConnectionError, match="not ready within"):
        await house.client(script).connect()


@pytest.mark.parametrize("number", [1, 2, 100])
async def test_a_reply_too_many_is_never_taken_for_another_cells(house: House, number: int) -> None:
    """G5: two `done`s, and output behind them: the next cell is not ended by what was said before it."""

    def script(kernel: Kernel) -> None:
        for _ in range(number):
            kernel.reply()
        kernel.frame({"type": "stream", "name": "stdout"}, b"late")

    async with house.client(at_first_cell(script)) as client:
        assert isinstance(await outcome_of(client), ExecutionResult)
        second = await outcome_of(client)
        assert isinstance(second, ExecutionResult if number == 1 else ProtocolError)
        assert (await client.execute("third", timeout=SECONDS)).text == "third"


async def test_a_hundred_thousand_tiny_messages_are_bounded_and_hold_up_nobody(house: House) -> None:
    """G7."""
    many = framed({"type": "stream", "name": "stdout"}, b"x") * 10_000

    def flood(kernel: Kernel) -> None:
        for _ in range(10):
            kernel.raw(many)
        kernel.raw(framed({"type": "clear_output", "wait": False}) * 10_000)

    async with Growth() as growth:
        telling = asyncio.ensure_future(hear(house, and_reply(flood), timeout=2 * SECONDS))
        slowest = await slowest_turn(house, telling)
    assert isinstance(await telling, ExecutionResult)
    assert growth.bytes < 64 * MIB
    assert slowest < 5


async def slowest_turn(house: House, until: asyncio.Future[Any]) -> float:
    """The neighbour's slowest cell while something else goes on, in seconds."""
    slowest = 0.0
    while not until.done():
        began = time.monotonic()
        await house.look_after_neighbour()
        slowest = max(slowest, time.monotonic() - began)
    return slowest


@pytest.mark.parametrize("size", [MIB, 64 << 10])
async def test_a_gigabyte_of_output_is_cut_and_counted(house: House, size: int) -> None:
    """G8."""
    piece = framed({"type": "stream", "name": "stdout"}, b"x" * size)

    def flood(kernel: Kernel) -> None:
        for _ in range((1 << 30) // size):
            kernel.raw(piece)

    async with Growth() as growth:
        heard = await hear(house, and_reply(flood))
    assert isinstance(heard, ExecutionResult)
    assert heard.truncated
    assert len(heard.text or "") + heard.omitted_bytes >= 1 << 30
    assert growth.bytes < 64 * MIB


async def test_images_are_bounded_by_size_and_by_number(house: House) -> None:
    """G9: a gigabyte of images, and thousands."""
    large, small = PNG.ljust(32 * MIB, b"x"), PNG + b"x"

    def images(kernel: Kernel) -> None:
        for data, number in ((small, 2000), (large, 32)):
            one: dict[str, Any] = {
                "type": "display_data",
                "parts": [["image/png", "binary", len(data)]],
                "metadata": {},
            }
            for _ in range(number):
                kernel.frame(one, data)

    async with Growth() as growth:
        heard = await hear(house, and_reply(images))
    assert isinstance(heard, ExecutionResult)
    assert len(heard.images) <= 1000
    assert sum(len(image.data) for image in heard.images) <= Limits().media
    assert heard.omitted_media >= 31
    assert growth.bytes < MOST_GROWTH + Limits().media


async def test_updates_without_end_cost_little(house: House) -> None:
    """G9: of one display, in any number."""
    shown: dict[str, Any] = {
        "type": "display_data",
        "parts": [["text/plain", "text", 1]],
        "metadata": {},
        "display_id": "i",
    }
    updates = framed({**shown, "type": "update_display_data"}, b"y") * 1000

    def script(kernel: Kernel) -> None:
        kernel.frame(shown, b"x")
        for _ in range(20):
            kernel.raw(updates)

    async with Growth() as growth:
        heard = await hear(house, and_reply(script))
    assert isinstance(heard, ExecutionResult)
    assert heard.text == "y"
    assert growth.bytes < 32 * MIB


MISLABELLED: dict[str, tuple[str, bytes]] = {
    "HTML": ("image/png", b"<html><script>1</script>"),
    "SVG": ("image/png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "ELF": ("image/jpeg", b"\x7fELF\x02\x01\x01"),
    "empty": ("image/png", b""),
    "half a signature": ("image/png", PNG[:5]),
    "HTML as SVG": ("image/svg+xml", b"<html><svg/></html>"),
    "entities": ("image/svg+xml", b"<!DOCTYPE svg [<!ENTITY a 'a'>]><svg>&a;</svg>"),
    "no image": ("image/x-icon", b"\0\0\1\0"),
}


@pytest.mark.parametrize(("mime", "data"), MISLABELLED.values(), ids=MISLABELLED.keys())
async def test_bytes_that_are_not_what_they_claim_are_no_image(house: House, mime: str, data: bytes) -> None:
    """G11: nothing of them is kept as an image."""
    async with house.client(at_first_cell(and_reply(display(data, "binary", mime)))) as client:
        heard = await outcome_of(client)
        assert isinstance(heard, ExecutionResult)
        assert heard.images == []
        assert client.kept == []


BOMBS: dict[str, tuple[str, bytes]] = {
    "50000 x 50000": ("image/png", PNG + b"\0\0\0\rIHDR\0\0\xc3\x50\0\0\xc3\x50\x08\6\0\0\0"),
    "a text of gigabytes": ("image/png", PNG + b"\0\0\0\0zTXt" + b"\x78\x9c" * 1000),
    "a million frames": ("image/gif", b"GIF89a\x01\0\x01\0\0\0\0" + b",\0\0\0\0\1\0\1\0\0\2\1D\0" * 10_000),
}


@pytest.mark.parametrize(("mime", "data"), BOMBS.values(), ids=BOMBS.keys())
async def test_an_image_is_kept_as_it_came_and_never_decoded(house: House, mime: str, data: bytes) -> None:
    """G10, G11: bytes in, the same bytes out, at no cost."""
    async with house.client(at_first_cell(and_reply(display(data, "binary", mime)))) as client, Growth() as growth:
        heard = await outcome_of(client)
        assert isinstance(heard, ExecutionResult)
        assert [(image.data, image.mime_type) for image in heard.images] == client.kept == [(data, mime)]
    assert growth.bytes < 16 * MIB


async def test_a_kernel_that_stops_reading_is_given_up_and_holds_up_nobody(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G13: while the host sends it 50 MB."""
    monkeypatch.setattr(link, "_SEND_SECONDS", 0.5)
    done = threading.Event()

    def deaf(kernel: Kernel) -> None:
        kernel.greet()
        done.wait(SECONDS)

    async with house.client(deaf) as client, Growth() as growth, _setting(done):
        cells = [await client.submit("x" * (16 * MIB)) for _ in range(3)]
        first = asyncio.ensure_future(cells[0].result(SECONDS))
        slowest = await slowest_turn(house, first)
        # It had begun nothing, so a fresh kernel takes it, and those behind.
        assert (await first).restarted
        for cell in cells[1:]:
            assert not (await cell.result(SECONDS)).restarted
    assert slowest < 5
    assert growth.bytes < MOST_GROWTH


@contextlib.asynccontextmanager
async def _setting(done: threading.Event) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        done.set()


@pytest.mark.parametrize("place", ["stream", "watch"])
async def test_descriptors_that_nobody_asked_for_are_not_taken(house: House, place: str) -> None:
    """G15: floods of them, on every socket that the guest's side has."""
    seen: list[int] = []
    with null_device() as null:

        def flood(kernel: Kernel) -> None:
            piece = framed({"type": "stream", "name": "stdout"}, b"x")
            for _ in range(100):
                if place == "stream":
                    # More at one time the system lets no ordinary user send.
                    _send_with(kernel.stream, piece, [null.fileno()] * 8)
                else:
                    kernel.tell({"over": None}, [null.fileno()] * 3)
                seen.append(open_files())
            kernel.reply()

        async with house.client(at_first_cell(flood)) as client:
            before = open_files()
            assert isinstance(await outcome_of(client), ExecutionResult)
            await house.look_after_neighbour()
            assert open_files() <= before + 1
    assert max(seen) < before + 20


def _send_with(stream: socket.socket, data: bytes, fds: list[int]) -> None:
    assert socket.send_fds(stream, [data], fds) == len(data)


# -- the watcher -----------------------------------------------------------------------------------------------------

DEEP = b'{"status":' + nested(900) + b"}"
# News of an end that cannot be, after which the kernel closes its stream.
NEWS: dict[str, dict[str, Any] | bytes] = {
    "garbage": b"garbage",
    "no UTF-8": b"\xff\xfe",
    "no object": b"[1]",
    "deep": DEEP,
    "oversized": b'{"status":0,"more":"' + b"x" * 5000 + b'"}',
    "a repeated key": b'{"status":0,"status":9}',
    "text": {"status": "killed", "begun": "1", "killed": "no"},
    "truth": {"status": True, "begun": True, "killed": 1},
    "a huge status": {"status": 10**18, "begun": 10**18},
    "a negative status": {"status": -1, "begun": -1},
    "stopped": {"status": 0x137F, "begun": 1},
    "a list": {"status": [9], "begun": [1], "limit": [1]},
    "another's death": {"status": 9, "session": 1, "pid": 1},
    "a limit that is none": {"status": 9, "limit": {"limit": "__class__", "use": 1}},
    "a limit beyond number": {"status": 9, "limit": {"limit": "memory", "use": 1e308}},
}


@pytest.mark.parametrize("news", NEWS.values(), ids=NEWS.keys())
async def test_news_of_an_end_that_cannot_be_ends_that_session_alone(
    house: House, news: dict[str, Any] | bytes
) -> None:
    """G16: wrong statuses, others' deaths, oversized and broken datagrams."""

    def script(kernel: Kernel) -> None:
        kernel.greet()
        kernel.request()
        kernel.tell(news)

    async with house.client(script) as client:
        heard = await outcome_of(client)
        assert isinstance(heard, KernelDied)
        assert (await client.execute("after", timeout=SECONDS)).restarted


async def test_the_cell_of_a_kernel_that_is_said_to_be_dead_and_lives_ends_in_its_time(house: House) -> None:
    """G16: it loses its own session, and no other."""

    def script(kernel: Kernel) -> None:
        kernel.tell({"status": 9, "begun": 1})
        kernel.request()

    heard = await hear(house, script, timeout=0.3)
    assert isinstance(heard, ExecutionTimeout)
    assert not heard.state_kept


IDLE: list[dict[str, Any]] = [{"over": "x"}, {"over": {"limit": "cpu", "use": 1}}, {"hello": 5}, {"over": [[]]}]


@pytest.mark.parametrize("news", IDLE)
async def test_what_a_watcher_may_say_without_sense_is_passed_over(house: House, news: dict[str, Any]) -> None:
    """G16."""

    def script(kernel: Kernel) -> None:
        for _ in range(1000):
            kernel.tell(news)
        kernel.reply()

    assert isinstance(await hear(house, script), ExecutionResult)


# -- the supervisor --------------------------------------------------------------------------------------------------


def saying(*datagrams: bytes, leave: bool = False) -> Supervising:
    """A supervisor that says these things first."""

    def supervising(liar: Liar, control: socket.socket) -> None:
        for datagram in datagrams:
            control.send(datagram)
        if not leave:
            liar.serve(control)

    return supervising


SENSELESS = [
    b'{"op":"ready"}',
    b'{"op":"exited","session":1,"pid":1,"status":9}',
    b'{"op":"session","id":99}',
    b'{"op":"preload-failed","module":"os\\n\\u001b[2J","error":"%s{}\\n"}',
    b'{"op":"preload-failed","module":["os"],"error":1}',
    b'{"op":["ready"]}',
    b"{}",
]


async def test_a_supervisor_that_talks_nonsense_of_others_is_passed_over() -> None:
    """G16: unknown sessions, wrong pids, deaths of others."""
    async with House(saying(b'{"op":"ready"}', *SENSELESS * 50)) as house:
        assert house.container._supervision is not None
        assert house.container._supervision.preload_errors == {}
        assert isinstance(await hear(house, and_reply(raw(b""))), ExecutionResult)


async def test_what_a_supervisor_says_of_a_module_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """G18."""
    news = json.dumps({"op": "preload-failed", "module": "pandas", "error": "a\n\x1b[2J%s{}\r"}).encode()
    house = House(saying(b'{"op":"ready"}', news))
    house.container._spec = ExecutionContainer(preload=("pandas",))._spec
    with caplog.at_level(logging.WARNING):
        async with house:
            pass
    lines = [record.getMessage() for record in caplog.records if "ahead" in record.getMessage()]
    assert lines == [r"the module pandas could not be loaded ahead: a\n\x1b[2J%s{}\r"]


BROKEN_DATAGRAMS = {
    "garbage": b"garbage",
    "no object": b'"ready"',
    "deep": b'{"op":' + nested(20_000) + b"}",
    "oversized": b'{"op":"ready","more":"' + b"x" * 100_000 + b'"}',
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("datagram", BROKEN_DATAGRAMS.values(), ids=BROKEN_DATAGRAMS.keys())
async def test_a_supervisor_that_breaks_the_rules_is_no_container(datagram: bytes) -> None:
    """G1, G3, G4: as its first word; known at once."""
    before = open_files()
    house = House(saying(datagram))
    async with asyncio.timeout(SECONDS):
        with pytest.raises(SandboxUnavailable):
            await house.container.run()
    await asyncio.to_thread(house.liar.join)
    assert open_files() == before


@pytest.mark.parametrize("datagram", BROKEN_DATAGRAMS.values(), ids=BROKEN_DATAGRAMS.keys())
async def test_a_supervisor_that_breaks_the_rules_later_takes_no_more_sessions(datagram: bytes) -> None:
    """G1, G3, G4: the sessions that run are not its own, and go on."""
    tell = threading.Event()

    def supervising(liar: Liar, control: socket.socket) -> None:
        def say() -> None:
            tell.wait(SECONDS)
            control.send(datagram)

        control.send(b'{"op":"ready"}')
        liar.run(say)
        liar.serve(control)

    async with House(supervising) as house:
        tell.set()
        assert house.container._supervision is not None
        async with asyncio.timeout(SECONDS):
            await house.container._supervision.warmed()
        with pytest.raises(ConnectionError):
            await house.client().connect()


@pytest.mark.parametrize("said", [(), (b'{"op":"starting"}',), (b'{"op":"failed","layer":5}',)])
async def test_a_supervisor_that_leaves_before_it_is_ready_is_no_container(said: tuple[bytes, ...]) -> None:
    """G5: early EOF."""
    house = House(saying(*said, leave=True))
    with pytest.raises(SandboxUnavailable, match="ended before it was ready"):
        await house.container.run()
    await asyncio.to_thread(house.liar.join)


async def test_a_supervisor_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """G2."""
    monkeypatch.setattr(supervision, "_READY_SECONDS", 0.2)
    house = House(saying())
    with pytest.raises(SandboxUnavailable, match="no sign within"):
        await house.container.run()
    await asyncio.to_thread(house.liar.join)


# -- anything --------------------------------------------------------------------------------------------------------

KINDS = st.sampled_from(
    [
        *("stream", "display_data", "update_display_data", "execute_result", "clear_output", "error"),
        *("execute_reply", "ready", "failed", "archive", "welcome", "exited", "overrun", "pong"),
    ]
)
ODD_FIELDS = {**FIELDS, "limit": JSON, "left_out": JSON, "data": JSON}
RIGHT = st.builds(
    framed,
    st.fixed_dictionaries({"type": st.just("stream"), "name": st.sampled_from(["stdout", "stderr"])}),
    st.binary(max_size=50),
)
REPLY = st.builds(
    framed,
    st.fixed_dictionaries(
        {
            "type": st.just("execute_reply"),
            "id": st.sampled_from([1, 1, 1, 2]),
            "status": st.sampled_from(["ok", "error", "interrupted"]),
            "execution_count": st.just(1),
        },
        optional={"limit": JSON, "left_out": JSON},
    ),
)
MUTATED = st.builds(
    framed, st.fixed_dictionaries({"type": KINDS}, optional=ODD_FIELDS) | HEADERS, st.binary(max_size=50)
)
NOISE = st.binary(max_size=40) | st.builds(frames.PREFIX.pack, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
SAID = st.lists(RIGHT | REPLY | MUTATED | NOISE, max_size=6)
NEWS_OF_ANY_KIND = (
    st.none()
    | st.binary(min_size=1, max_size=60)
    | st.dictionaries(
        st.sampled_from(["status", "begun", "killed", "limit", "over", "hello"]) | ANY_TEXT, JSON, max_size=5
    )
)


def test_whatever_a_guest_says_a_cell_ends_once_and_its_session_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """G1, G2, G3, G4, G5, G16: any sequence of frames, nearly right ones and bytes, and any news of the end."""
    monkeypatch.setattr(sessions, "READY_SECONDS", 5.0)
    with asyncio.Runner() as runner:
        house = runner.run(House().__aenter__())

        @given(said=SAID, news=NEWS_OF_ANY_KIND, ends=st.booleans())
        def check(said: Iterable[bytes], news: dict[str, Any] | bytes | None, *, ends: bool) -> None:
            runner.run(_check_one(house, b"".join(said), news, ends=ends))

        try:
            # What is loaded once is not what an example costs.
            runner.run(_check_one(house, b"", None, ends=True))
            before = _resident()
            settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], database=None)(check)()
            assert _resident() - before < 32 * MIB
        finally:
            runner.run(house.__aexit__())


async def _check_one(house: House, said: bytes, news: dict[str, Any] | bytes | None, *, ends: bool) -> None:
    before = open_files()

    def script(kernel: Kernel) -> None:
        kernel.greet()
        kernel.request()
        kernel.raw(said)
        if news is not None:
            kernel.tell(news)
        if not ends:
            kernel.request()

    async with asyncio.timeout(SECONDS), house.client(script) as client:
        execution = await client.submit("lie")
        with contextlib.suppress(ExecutionError, ExecutionLost, ProtocolError, KernelDied, ExecutionTimeout):
            await execution.result(0.15)
        assert execution.outcome is not None
        if isinstance(execution.outcome, Lost):
            assert "actbox failed" not in execution.outcome.reason
        assert [execution] == client.ended
        outcome = execution.outcome
        if not isinstance(outcome, Finished | Failed | Interrupted | Died | Lost):
            assert type(outcome).__name__ in ("TimedOut", "Exceeded")
    await house.look_after_neighbour()
    assert len(house.container._sessions) == 1
    async with asyncio.timeout(SECONDS):
        while open_files() > before:  # noqa: ASYNC110 - the thread that plays the kernel ends by itself
            await asyncio.sleep(0.001)


def test_what_is_kept_of_a_session_ends_with_it() -> None:
    """G7: a hundred sessions that lie leave nothing behind that one has not."""

    async def run() -> None:
        async with House() as house:
            for lie in (raw(b"garbage" * 1000), and_reply(raw(b"")), raw(bytes(100))) * 30:
                await hear(house, lie)

    before = _resident()
    asyncio.run(run())
    assert _resident() - before < 32 * MIB

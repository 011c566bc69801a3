"""The world outside of a session, for tests of its way there: servers on loopback, their certificate, their names."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import shutil
import socket
import ssl
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from needs import lacking

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable
    from pathlib import Path

    from actbox.egress.policy import Address

__all__ = [
    "LOOPBACK",
    "MIB",
    "SECONDS",
    "Names",
    "Server",
    "echo",
    "make_certificate",
    "serving",
    "silence",
    "sink",
    "web",
]

SECONDS = 10.0
MIB = 1 << 20
LOOPBACK = "127.0.0.1"
_PIECE = 64 << 10


def make_certificate(folder: Path) -> Path:
    """A key and a self-signed certificate for ok.example, evil.example and other.example, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        lacking("the openssl command is missing")
    path = folder / "both.pem"
    key = path.with_name("key.pem")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=ok.example", "-keyout", str(key), "-out", str(path)),
            *("-addext", "subjectAltName=DNS:ok.example,DNS:evil.example,DNS:other.example"),
        ],
        check=True,
        capture_output=True,
        timeout=SECONDS,
    )
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return path


@dataclass
class Server:
    """A server on loopback.

    State: `connections` that came, and how many are `open`; of each request the head, and the body's first 64 KiB; how
    many bytes it has `received`, and `sent` of long answers.
    """

    port: int
    connections: int = 0
    open: int = 0
    heads: list[bytes] = field(default_factory=list[bytes])
    bodies: list[bytes] = field(default_factory=list[bytes])
    received: int = 0
    sent: int = 0


@contextlib.asynccontextmanager
async def serving(handler: Any, certificate: Path | None = None) -> AsyncGenerator[Server]:
    """A server for the time of the block; `handler` serves each connection, in TLS if there is a certificate."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        server.open += 1
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await handler(server, reader, writer)
        finally:
            server.open -= 1
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(accept, LOOPBACK, 0, ssl=context)
    server = Server(listener.sockets[0].getsockname()[1])
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def web(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request with what it was, as JSON.

    `/go?URL` redirects, `/long?N` has N bytes, `/rude` ends the connection.
    """
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        server.heads.append(head)
        method, path, _ = head.split(b"\r\n")[0].decode().split(" ")
        if path == "/rude":
            writer.transport.abort()
            return
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        server.bodies.append(await _body(server, reader, length))
        if path.startswith("/go?"):
            writer.write(f"HTTP/1.1 302 Found\r\nLocation: {path[4:]}\r\nContent-Length: 0\r\n\r\n".encode())
        elif path.startswith("/long?"):
            await _pour(server, writer, int(path[6:]))
        else:
            body = json.dumps({"method": method, "path": path, "length": length}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()


async def _body(server: Server, reader: asyncio.StreamReader, length: int) -> bytes:
    first = b""
    while length:
        piece = await reader.read(min(length, _PIECE))
        if not piece:
            raise asyncio.IncompleteReadError(first, length)
        length -= len(piece)
        server.received += len(piece)
        first += piece[: _PIECE - len(first)]
    return first


async def _pour(server: Server, writer: asyncio.StreamWriter, length: int) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length)
    while length:
        piece = b"x" * min(length, _PIECE)
        length -= len(piece)
        writer.write(piece)
        await writer.drain()
        server.sent += len(piece)


async def echo(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what comes."""
    while data := await reader.read(65536):
        server.received += len(data)
        writer.write(data)
        await writer.drain()


async def sink(server: Server, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Takes what comes."""
    while data := await reader.read(65536):
        server.received += len(data)


async def silence(_server: Server, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    """Says nothing, and listens until the end."""
    while await reader.read(65536):
        pass


class Names:
    """A resolver that knows a few names, and keeps what it was asked."""

    def __init__(self, **known: str) -> None:
        self.known: dict[str, list[list[str]]] = {
            name.replace("_", "."): [addresses.split()] for name, addresses in known.items()
        }
        self.asked: list[str] = []

    async def __call__(self, host: str, /) -> Iterable[Address]:
        self.asked.append(host)
        answers = self.known.get(host)
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [ipaddress.ip_address(text) for text in answer]

"""An image registry on this machine, over plain HTTP, which serves what a test put in and breaks as it is told."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import platform
import re
import socket
import tarfile
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_CONFIG = "application/vnd.docker.container.image.v1+json"
_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Image:
    """What was put into a registry: the reference to pull, and the digests (`sha256:...`) of its parts."""

    reference: str
    digest: str
    config: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Fault:
    """What happens at that byte of a blob: the connection is closed, or nothing more is sent over it."""

    at: int
    stalls: bool


class Registry:
    """A registry on a free port of 127.0.0.1, which Docker speaks to without TLS; entering the context starts it.

    A fault is named by a digest of an `Image`'s parts, and holds for every request that comes after it was set. A
    daemon tries a failed download again, for a minute unless its `--max-download-attempts` says otherwise, and asks
    for the part that it lacks. State: the images, the faults, and the requests so far (`GET /v2/...`).
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.stalled = threading.Event()
        """Set once a request is held up by `stall`."""
        self._released = threading.Event()
        self._closing = False
        self._blobs: dict[str, bytes] = {}
        self._manifests: dict[tuple[str, str], bytes] = {}
        self._hidden: set[bytes] = set()
        self._faults: dict[str, _Fault] = {}
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def host(self) -> str:
        """How the names of its images begin: `127.0.0.1:PORT`."""
        return f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._closing = True
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(
        self, name: str, layers: Sequence[bytes], *, tag: str = "1", config: Mapping[str, object] | None = None
    ) -> Image:
        """Put in an image of `layers`, each a tar, the lowest first; `config` is like `{"Cmd": ["python3"]}`."""
        diffs = [self._put(layer) for layer in layers]
        machine = platform.machine()
        description = {
            "architecture": _MACHINES.get(machine, machine),
            "os": "linux",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": diffs},
            "history": [{"created_by": f"layer {number}"} for number, _ in enumerate(diffs)],
        }
        config_digest = self._put(json.dumps(description).encode())
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST,
                "config": self._described(config_digest, _CONFIG),
                "layers": [self._described(digest, _LAYER) for digest in diffs],
            }
        ).encode()
        digest = _digest(manifest)
        self._manifests |= {(name, tag): manifest, (name, digest): manifest}
        return Image(f"{self.host}/{name}:{tag}", digest, config_digest, tuple(diffs))

    def hide(self, image: Image) -> None:
        """Answer 404 to whoever asks for its manifest."""
        self._hidden |= {manifest for manifest in self._manifests.values() if _digest(manifest) == image.digest}

    def cut(self, digest: str, at: int) -> None:
        """Close the connection at that byte of a blob."""
        self._faults[digest] = _Fault(at, stalls=False)

    def stall(self, digest: str, at: int = 0) -> None:
        """Send nothing of a blob from that byte on, until `mend`; the connection stays open, for ever if need be."""
        self._released.clear()
        self._faults[digest] = _Fault(at, stalls=True)

    def corrupt(self, digest: str) -> None:
        """Send a blob with its last byte changed, so that the digest is wrong. For good: `mend` does not undo it."""
        blob = self._blobs[digest]
        self._blobs[digest] = blob[:-1] + bytes([blob[-1] ^ 1])

    def mend(self) -> None:
        """Undo `hide`, `cut` and `stall`; what is held up goes on."""
        self._hidden.clear()
        self._faults.clear()
        self._released.set()

    def _put(self, blob: bytes) -> str:
        digest = _digest(blob)
        self._blobs[digest] = blob
        return digest

    def _described(self, digest: str, kind: str) -> dict[str, object]:
        return {"mediaType": kind, "size": len(self._blobs[digest]), "digest": digest}

    # -- for the handler, in threads of its own ----------------------------------------------------------------------

    def manifest(self, name: str, reference: str) -> bytes | None:
        """What is to be sent, if anything."""
        manifest = self._manifests.get((name, reference))
        return None if manifest in self._hidden else manifest

    def blob(self, digest: str) -> bytes | None:
        """What is to be sent, if anything."""
        return self._blobs.get(digest)

    def sendable(self, digest: str, start: int) -> Iterator[bytes]:
        """A blob from `start` on, in pieces, as its fault will have it; a cut ends it early."""
        blob, fault = self._blobs[digest], self._faults.get(digest)
        if fault is None:
            yield blob[start:]
            return
        yield blob[start : fault.at]
        if fault.stalls:
            self.stalled.set()
            self._released.wait()
            if not self._closing:
                yield blob[max(start, fault.at) :]


class _Server(ThreadingHTTPServer):
    """Ends its connections when it is closed, idle ones too, and waits for their threads."""

    daemon_threads = False

    def __init__(self, registry: Registry) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, registry))

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection: the part of the registry's protocol that a pull needs."""

    protocol_version = "HTTP/1.1"

    def __init__(self, registry: Registry, *connection: Any) -> None:
        self._registry = registry
        with contextlib.suppress(ConnectionError):
            super().__init__(*connection)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's names
        """Say nothing; the requests are recorded."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self._registry.requests.append(f"{self.command} {self.path}")
        if self.path == "/v2/":
            self._send(HTTPStatus.OK, b"{}")
        elif (asked := re.fullmatch(r"/v2/(.+)/(manifests|blobs)/([^/]+)", self.path)) is None:
            self._send(HTTPStatus.NOT_FOUND, b"{}")
        elif asked[2] == "blobs":
            self._send_blob(asked[3])
        elif (manifest := self._registry.manifest(asked[1], asked[3])) is None:
            self._refuse("MANIFEST_UNKNOWN")
        else:
            self._send(HTTPStatus.OK, manifest, kind=_MANIFEST, digest=_digest(manifest))

    def _send_blob(self, digest: str) -> None:
        blob = self._registry.blob(digest)
        if blob is None:
            self._refuse("BLOB_UNKNOWN")
            return
        asked = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if start >= len(blob):
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"{}")
            return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(blob) - 1}/{len(blob)}")
        self._send_headers(len(blob) - start, "application/octet-stream", digest)
        if self.command == "GET":
            left = len(blob) - start
            for piece in self._registry.sendable(digest, start):
                self.wfile.write(piece)
                left -= len(piece)
            self.close_connection = left > 0

    def _refuse(self, code: str) -> None:
        self._send(HTTPStatus.NOT_FOUND, json.dumps({"errors": [{"code": code, "message": "unknown"}]}).encode())

    def _send(self, status: HTTPStatus, body: bytes, *, kind: str = "application/json", digest: str = "") -> None:
        self.send_response(status)
        self._send_headers(len(body), kind, digest)
        if self.command == "GET":
            self.wfile.write(body)

    def _send_headers(self, size: int, kind: str, digest: str) -> None:
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        if digest:
            self.send_header("Docker-Content-Digest", digest)
        self.end_headers()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


# -- layers ----------------------------------------------------------------------------------------------------------


def layer(files: Mapping[str, bytes]) -> bytes:
    """A layer of executable files: their content by their path, like `usr/bin/hello`."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.mode, member.size = 0o755, len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def split(root: Path, count: int) -> list[bytes]:
    """The tar of a root file system as `count` layers of about the same size, which together are the same.

    Each layer has all folders above its members, as a folder that a layer lacks would lose its mode.
    """
    packed = [io.BytesIO() for _ in range(count)]
    limit = root.stat().st_size / count
    current = 0
    folders: dict[str, tarfile.TarInfo] = {}
    placed: dict[str, int] = {}  # where each file went: a hard link goes where its target is
    present: list[set[str]] = [set() for _ in packed]
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(tarfile.open(root))
        layers = [stack.enter_context(tarfile.open(fileobj=file, mode="w")) for file in packed]
        for member in source:
            if packed[current].tell() > limit and current < count - 1:
                current += 1
            place = placed[member.linkname] if member.islnk() else current
            placed[member.name] = place
            if member.isdir():
                folders[member.name] = member
            for above in reversed(PurePosixPath(member.name).parents):
                name = f"./{above}" if above.parts else "."
                if name in folders and name not in present[place]:
                    present[place].add(name)
                    layers[place].addfile(folders[name])
            if member.name not in present[place]:
                layers[place].addfile(member, source.extractfile(member) if member.isreg() else None)
            if member.isdir():
                present[place].add(member.name)
    return [file.getvalue() for file in packed]

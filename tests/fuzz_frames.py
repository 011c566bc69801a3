"""Coverage-guided fuzzing of what reads a guest's bytes: frames, messages, and the fold of a result.

`make fuzz SECONDS=60`, or `python tests/fuzz_frames.py [--seconds N] [--runs N] [--seed N]`. It ends with 0 if nothing
but the typed errors ever came; else it shows the traceback and the input, and ends with another number. It begins with
one real frame of each kind.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

# There are no types of it, and it is not there for every interpreter.
atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["actbox.protocol", "actbox.result"]):
    from actbox.errors import ProtocolError
    from actbox.events import ClearOutput, DisplayData, Error, ExecuteResult, Stream, UpdateDisplayData
    from actbox.protocol import frames, messages
    from actbox.result import Fold

_SEEDS: tuple[tuple[dict[str, Any], bytes], ...] = (
    ({"type": "ready", "python": "3.11.7", "ipython": "9.1.0", "landlock": 6}, b""),
    ({"type": "failed", "layer": "seccomp", "errno": 1, "detail": "no"}, b""),
    ({"type": "stream", "name": "stdout"}, "caf\u00e9 \U0001f4e6\n".encode()),
    ({"type": "stream", "name": "stderr"}, b"\xff\xfe"),
    (
        {
            "type": "display_data",
            "parts": [["text/plain", "text", 3], ["image/png", "binary", 8], ["application/json", "json", 9]],
            "metadata": {"image/png": {"width": 3.5}},
            "display_id": "id",
            "left_out": 1,
        },
        b'abc\x89PNG\r\n\x1a\n{"a":[1]}',
    ),
    ({"type": "update_display_data", "parts": [["text/html", "text", 4]], "metadata": {}, "display_id": "id"}, b"<b/>"),
    ({"type": "execute_result", "parts": [["text/plain", "text", 1]], "metadata": {}, "execution_count": 1}, b"2"),
    ({"type": "clear_output", "wait": True}, b""),
    ({"type": "error", "ename": "ValueError", "evalue": "\ud800"}, b"\x1b[31mTraceback"),
    ({"type": "execute_reply", "id": 1, "status": "ok", "execution_count": 1}, b""),
    (
        {
            "type": "execute_reply",
            "id": 2,
            "status": "error",
            "execution_count": 2,
            "limit": {"limit": "cpu", "use": 1},
        },
        b"",
    ),
    ({"type": "execute_reply", "id": 3, "status": "ok", "execution_count": 0, "left_out": ["a\nb"]}, b""),
    ({"type": "archive", "id": 3}, bytes(512)),
)


def read(data: bytes) -> None:
    """One run. The first byte says where the rest is cut, and whether the rest is frames or one header and its payload.

    With the latter no length has to be guessed right before anything is read.
    """
    if not data:
        return
    first, said = data[0], data[1:]
    if first & 1:
        head, _, payload = said.partition(b"\0")
        said = frames.PREFIX.pack(len(head), len(payload)) + head + payload
    cut = len(said) * (first >> 1) // 127
    decoder, fold = frames.Decoder(), Fold(1024, 1024)
    try:
        for piece in (said[:cut], said[cut:]):
            decoder.feed(piece)
            for frame in decoder.frames():
                _take(frame, fold)
    except (frames.FrameError, ProtocolError):
        pass
    result = fold.result(images=[], execution_count=0, duration=0.0)
    (result.text or "").encode()
    if decoder.pending > len(said):
        raise AssertionError("more is pending than was fed")


def _take(frame: frames.Frame, fold: Fold) -> None:
    again = frames.Decoder()
    again.feed(frames.encode(frame.header, frame.payload))
    if again.next_frame() != frame:
        raise AssertionError(f"{frame!r} is another one when it is sent on")
    message = messages.decode(frame)
    if isinstance(message, Stream | DisplayData | UpdateDisplayData | ExecuteResult | ClearOutput | Error):
        fold.add(message)


def _write_seeds(folder: Path) -> None:
    for number, (header, payload) in enumerate(_SEEDS):
        sent = frames.encode(header, payload)
        (folder / f"frame-{number}").write_bytes(b"\x80" + sent + sent)
        (folder / f"parts-{number}").write_bytes(b"\x81" + json.dumps(header).encode() + b"\0" + payload)


def main() -> int:
    """Fuzz in a child, for the fuzzer ends its process; whether all went well, as an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="at the most; 60 by default")
    parser.add_argument("--runs", type=int, default=-1, help="at the most; no bound by default")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer's random numbers; 0 for a new one")
    arguments = parser.parse_args()
    # Not a TemporaryDirectory: the fuzzer's end in the child would remove it.
    folder = Path(tempfile.mkdtemp(prefix="actbox-fuzz-"))
    parent = os.getpid()
    try:
        corpus = folder / "corpus"
        corpus.mkdir()
        _write_seeds(corpus)
        bounds = [
            f"-max_total_time={arguments.seconds}",
            f"-runs={arguments.runs}",
            f"-seed={arguments.seed}",
            "-max_len=4096",
            "-timeout=5",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
            f"-artifact_prefix={folder}/",
        ]
        child = os.fork()
        if child == 0:
            atheris.Setup([sys.argv[0], *bounds, str(corpus)], read)
            atheris.Fuzz()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for path in folder.iterdir():
            if path != corpus:
                print(f"{path.name}: {path.read_bytes()!r}", flush=True)  # noqa: T201 - a script
    finally:
        # The child comes here too, with what it has found, and writes that down when it ends.
        if os.getpid() == parent:
            shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())

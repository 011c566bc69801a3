"""An MCP server over standard streams in a few lines, for what the SDK's own would not do. Run as a program.

Its first argument says how it behaves: "plain"; "silent", it never answers; "gone", it ends at once; "deaf", it goes on
when its input ends, with a child that ignores SIGTERM like itself, whose numbers it writes to the file of the second;
"parent", it has such a child, and ends as others do; "rude", it prints what is no message, and asks without end
without reading the answers; "silly", it says why it cannot work, and ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ["die", "hang", "pid", "garbage", "huge", "huge_last", "huge_lost", "endless", "failed", "grow"]
STARTED: dict[str, Any] = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"tools": {}},
    "serverInfo": {"name": "f", "version": "1"},
}


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    match method, params.get("name"):
        case "initialize", _:
            return {"result": STARTED}
        case "tools/list", _:
            return {"result": {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in NAMES]}}
        case "tools/call", "die":
            os._exit(3)
        case "tools/call", "hang":
            return None
        case "tools/call", "failed":
            return {"error": {"code": -32000, "message": "not today"}}
        case "tools/call", "grow":
            NAMES.append(f"grown_{len(NAMES)}")
            put({"method": "notifications/tools/list_changed"})
            return {"result": {"content": []}}
        case "tools/call", "endless":
            while True:
                sys.stdout.write("x" * (1 << 16))
        case "tools/call", ("huge" | "huge_last" | "huge_lost"):
            return {"result": {"content": [{"type": "text", "text": "x" * (6 << 20)}]}}
        case "tools/call", "garbage":
            return {"result": {"content": [{"type": "image", "data": "no base64!", "mimeType": "image/png"}]}}
        case "tools/call", _:
            return {"result": {"content": [{"type": "text", "text": str(os.getpid())}]}}
        case _:
            return {"error": {"code": -32601, "message": "no such method"}}


def put(message: dict[str, Any], *, last: bool = False, lost: bool = False) -> None:
    """Write a message; with its number last, as other SDKs do, or where nobody looks for it."""
    made = {"jsonrpc": "2.0", **message}
    if last or lost:
        made = {**{name: value for name, value in made.items() if name != "id"}, "id": made["id"]}
    if lost:
        made = {name: made[name] for name in ("jsonrpc", "result", "id")} | {"more": 1}
    sys.stdout.write(f"{json.dumps(made)}\n")
    sys.stdout.flush()


def main(mode: str, *rest: str) -> None:
    if mode == "gone":
        return
    if mode == "silly":
        sys.exit("no \x1b[31mkey\x1b[0m was given")
    if mode in ("deaf", "parent"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = os.fork()
        if child:
            Path(rest[0]).write_text(f"{os.getpid()} {child}", encoding="utf-8")
        else:
            time.sleep(600)
    if mode == "rude":
        sys.stdout.write("Welcome!\n")
        for number in range(20_000):
            put({"id": number, "method": "ping"})
    for line in sys.stdin:
        request = json.loads(line)
        params: dict[str, Any] = request.get("params") or {}
        reply = answer(request["method"], params) if "id" in request and "method" in request else None
        if reply is not None and mode != "silent":
            name = params.get("name")
            put({"id": request["id"], **reply}, last=name == "huge_last", lost=name == "huge_lost")
    if mode == "deaf":
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])

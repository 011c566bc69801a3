"""An MCP server over standard streams in a few lines, for what the SDK's own would not do. Run as a program.

Its first argument says how it behaves: "plain"; "silent", it never answers; "gone", it ends at once; "deaf", it goes on
when its input ends, with a child that ignores SIGTERM like itself, whose numbers it writes to the file of the second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

TOOLS = [{"name": name, "inputSchema": {"type": "object"}} for name in ("die", "hang", "pid", "garbage")]
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
            return {"result": {"tools": TOOLS}}
        case "tools/call", "die":
            os._exit(3)
        case "tools/call", "hang":
            return None
        case "tools/call", "garbage":
            return {"result": {"content": [{"type": "image", "data": "no base64!", "mimeType": "image/png"}]}}
        case "tools/call", _:
            return {"result": {"content": [{"type": "text", "text": str(os.getpid())}]}}
        case _:
            return {"error": {"code": -32601, "message": "no such method"}}


def main(mode: str, *rest: str) -> None:
    if mode == "gone":
        return
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = os.fork()
        if child:
            Path(rest[0]).write_text(f"{os.getpid()} {child}", encoding="utf-8")
        else:
            time.sleep(600)
    for line in sys.stdin:
        request = json.loads(line)
        reply = answer(request["method"], request.get("params") or {}) if "id" in request else None
        if reply is not None and mode != "silent":
            sys.stdout.write(f"{json.dumps({'jsonrpc': '2.0', 'id': request['id'], **reply})}\n")
            sys.stdout.flush()
    if mode == "deaf":
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])

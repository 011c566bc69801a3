"""How the guest code comes into any image: over the socket or stream that the host made, and never onto a disk.

The image's own Python runs a few lines (`script`): they tell its version, read the guest code as one bundle, and
import it from memory. So nothing of it can be written to inside, its version is always the host's, no path of the host
shows, and an engine that does not see the host's files can run it too.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import struct
from pathlib import Path
from typing import Literal

OLDEST = (3, 10)
SOCKET = "/run/actbox/control"
_PACKAGE = Path(__file__).resolve().parent.parent.parent
_GUEST = "actbox_guest"

# What each way in begins with: `channel` is the control socket, `read` gives the bundle. Written for any Python 3, as
# the image's may be too old for us and must be able to say so.
_HELLO = """\
import importlib.util, json, sys
import os
hello = json.dumps({"op": "hello", "python": list(sys.version_info[:3]),
    "ipython": importlib.util.find_spec("IPython") is not None, "implementation": sys.implementation.name,
    "unseen": [path for path in %(marks)r if not os.path.lexists(path)]}).encode()
"""
_BY_SOCKET = """\
import array, socket
channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
channel.connect(%(socket)r)
channel.send(hello)
passed, rest = channel.recvmsg(1, socket.CMSG_SPACE(8), getattr(socket, "MSG_CMSG_CLOEXEC", 0))[:2]
if not passed: sys.exit(0)
code, host = array.array("i", rest[0][2])
with os.fdopen(code, "rb") as file: bundle = file.read()
"""
_BY_STREAM = """\
import struct
def read(size):
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part: sys.exit(0)
        data += part
    return data
hello = struct.pack(">I", len(hello)) + hello
while hello: hello = hello[os.write(1, hello):]
bundle = read(*struct.unpack(">I", read(4)))
"""
# A finder of modules in memory. Bytecode comes along where it was made by the same Python.
_IMPORT = """\
import base64, importlib.abc, importlib.machinery, marshal
modules = json.loads(bundle.decode())
class Bundle(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in modules:
            return importlib.machinery.ModuleSpec(name, self, origin=name, is_package=modules[name]["package"])
    def create_module(self, spec): return None
    def exec_module(self, module):
        entry = modules[module.__name__]
        bytecode = base64.b64decode(entry["bytecode"])
        if bytecode[:4] == importlib.util.MAGIC_NUMBER: code = marshal.loads(bytecode[16:])
        else: code = compile(entry["source"], module.__name__, "exec", dont_inherit=True)
        exec(code, module.__dict__)
sys.meta_path.insert(0, Bundle())
"""
_RUN = {
    "socket": f"from {_GUEST}.guest.supervisor import serve\nserve(channel, host)\n",
    "stream": f"from {_GUEST}.guest.tunnel import serve\nserve()\n",
}


def script(way: Literal["socket", "stream"], marks: tuple[str, ...] = ()) -> str:
    """The program for `python3 -c`.

    Args:
        way: how the host reaches it.
        marks: files that must be seen inside; it tells those that are not.
    """
    begin = _BY_SOCKET % {"socket": SOCKET} if way == "socket" else _BY_STREAM
    return _HELLO % {"marks": list(marks)} + begin + _IMPORT + _RUN[way]


@functools.cache
def bundle() -> bytes:
    """The guest code: JSON of `{module: {"package", "source", "bytecode"}}`."""
    modules = {_GUEST: _entry(None)}
    for name in ("guest", "protocol"):
        modules[f"{_GUEST}.{name}"] = _entry(_PACKAGE / name / "__init__.py")
    files = [*(_PACKAGE / "guest").glob("*.py"), _PACKAGE / "protocol" / "frames.py"]
    for path in files:
        if path.name != "__init__.py":
            modules[f"{_GUEST}.{path.parent.name}.{path.stem}"] = _entry(path)
    return json.dumps(modules).encode()


def _entry(path: Path | None) -> dict[str, object]:
    if path is None:
        return {"package": True, "source": "", "bytecode": ""}
    return {
        "package": path.name == "__init__.py",
        "source": path.read_text(encoding="utf-8"),
        "bytecode": base64.b64encode(_bytecode(path)).decode(),
    }


def _bytecode(path: Path) -> bytes:
    """What this host's Python has compiled the file to, if it has; the guest looks whether its Python can use it."""
    try:
        data = Path(importlib.util.cache_from_source(str(path))).read_bytes()
    except (OSError, NotImplementedError):  # the latter: this interpreter names no cache, so it has none
        return b""
    status = path.stat()
    # PEP 552: flags 0, then the time and the size of the source that it was made of.
    made_of = struct.pack("<III", 0, int(status.st_mtime) & 0xFFFF_FFFF, status.st_size & 0xFFFF_FFFF)
    return data if data[4:16] == made_of else b""

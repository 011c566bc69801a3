"""What people do in a notebook goes on working: Python's own means, and libraries with machine code of their own.

With bubblewrap the libraries come from the environment that the tests run in; for Docker an image with them is built
once, and kept for as long as nothing changes that it is made of.
"""

# What is done is sent into the session as source, without this file's imports.
# ruff: noqa: PLC0415, PTH101, PTH110, PTH116, PTH123, PTH211
# Not every library tells its types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import http.server
import importlib.util
import mmap
import multiprocessing
import os
import pty
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import tomllib
from multiprocessing import shared_memory
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker_tools
import pytest
from needs import lacking
from test_containment import inside

from actbox import CodeExecutionContainer, CodeExecutor
from actbox.engines.docker import daemon, images
from actbox.engines.docker.building import DEFAULT_PACKAGES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.anyio

# --- What is done inside: with libraries ------------------------------------------------------------------------------


def use_numpy() -> bool:
    import numpy as np

    matrix = np.random.default_rng(1).random((200, 200))
    return bool(np.allclose(matrix @ np.linalg.inv(matrix), np.eye(200)))


def use_pandas() -> bool:
    import pandas as pd  # pyright: ignore[reportMissingTypeStubs]

    frame = pd.DataFrame({"a": [1, 2, 2], "b": [1.0, 2.0, 3.0]})
    frame.to_csv("table.csv")  # pyright: ignore[reportUnknownMemberType]
    again: Any = pd.read_csv("table.csv")  # pyright: ignore[reportUnknownMemberType]
    return again.groupby("a")["b"].sum().to_dict() == {1: 1.0, 2: 5.0}


def use_matplotlib() -> bool:
    import matplotlib.pyplot as plt

    plt.plot([1, 2, 3])  # pyright: ignore[reportUnknownMemberType]
    plt.savefig("plot.png")  # pyright: ignore[reportUnknownMemberType]
    plt.close()
    with open("plot.png", "rb") as file:
        return file.read(4) == b"\x89PNG"


def use_scipy() -> bool:
    import numpy as np
    from scipy import fft, linalg, optimize, sparse
    from scipy.sparse.linalg import spsolve

    matrix = np.eye(50) * 3 + np.ones((50, 50))
    solved = linalg.solve(matrix, np.ones(50))
    sparsely: Any = spsolve(sparse.csc_matrix(matrix), np.ones(50))
    lowest = optimize.minimize(lambda x: (x[0] - 2) ** 2, [0.0]).x[0]
    back = fft.ifft(fft.fft(np.arange(64.0), workers=2)).real
    right = np.allclose(matrix @ solved, 1) and np.allclose(solved, sparsely)
    return bool(right and abs(lowest - 2) < 1e-4 and np.allclose(back, np.arange(64)))


def use_sklearn() -> bool:
    """By threads, and by processes that joblib starts and hands its arrays to."""
    import joblib
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    rows = np.random.default_rng(1).random((200, 4))
    right = (rows[:, 0] > 0.5).astype(int)
    forest = RandomForestClassifier(10, n_jobs=2, random_state=1).fit(rows, right)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        scores = cross_val_score(LogisticRegression(), rows, right, cv=3)
    return bool(forest.score(rows, right) > 0.9 and scores.mean() > 0.8)


def use_pyarrow() -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pa.table({"a": list(range(1000)), "b": [str(number) for number in range(1000)]})
    pq.write_table(table, "table.parquet", compression="zstd")
    again = pq.read_table("table.parquet", memory_map=True, use_threads=True)
    return again.equals(table) and pc.sum(again["a"]).as_py() == 499_500


def use_pandas_with_parquet() -> bool:
    import pandas as pd

    frame: Any = pd.DataFrame({"name": ["a", "b", None], "when": pd.date_range("2024-01-01", periods=3)})
    frame.to_parquet("frame.parquet")
    again: Any = pd.read_parquet("frame.parquet")
    return bool(again["when"].equals(frame["when"]) and again["name"].isna().sum() == 1)


def use_duckdb() -> bool:
    """A database in a file, over several threads, and one in memory over a frame of pandas."""
    import duckdb
    import pandas as pd

    with duckdb.connect("data.duckdb", config={"threads": 4}) as database:
        database.execute("CREATE TABLE t AS SELECT range AS x FROM range(100_000)")
        database.execute("COPY t TO 'copy.parquet' (FORMAT parquet)")
        found = database.execute("SELECT sum(x) FROM 'copy.parquet'").fetchone()
    frame = pd.DataFrame({"x": [1, 2, 3]})
    with duckdb.connect() as database:
        database.register("frame", frame)
        return found == (4_999_950_000,) and database.execute("SELECT sum(x) FROM frame").fetchone() == (6,)


def use_pillow() -> bool:
    from PIL import Image, ImageDraw, ImageFilter

    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill="red")
    for name in ("picture.png", "picture.jpg", "picture.webp"):
        image.filter(ImageFilter.BLUR).resize((32, 32)).save(name)
        with Image.open(name) as again:
            if again.size != (32, 32) or again.convert("RGB").getpixel((16, 16))[0] < 200:  # pyright: ignore[reportOptionalSubscript, reportOperatorIssue, reportIndexIssue]
                return False
    return True


def use_requests() -> bool:
    """Of a server of the session's own: there is no other."""
    import requests

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = requests.get(f"http://127.0.0.1:{server.server_port}/", timeout=5).text
        server.shutdown()
    try:
        requests.get("http://192.0.2.1/", timeout=5)
    except requests.ConnectionError:
        return found == "hello"
    return False


LIBRARIES: tuple[Callable[[], bool], ...] = (
    use_numpy,
    use_pandas,
    use_matplotlib,
    use_scipy,
    use_sklearn,
    use_pyarrow,
    use_pandas_with_parquet,
    use_duckdb,
    use_pillow,
    use_requests,
)

# --- What is done inside: with Python alone ---------------------------------------------------------------------------


def use_spawn() -> bool:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return pool.map_async(abs, [-1, -2, -3]).get(10) == [1, 2, 3]


def use_fork() -> bool:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map_async(abs, [-1, -2, -3]).get(10) == [1, 2, 3]


def use_process_pool() -> bool:
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(abs, [-1, -2, -3], timeout=10)) == [1, 2, 3]


def use_manager() -> bool:
    with multiprocessing.get_context("spawn").Manager() as manager:
        shared = manager.dict({"a": 1})
        shared["b"] = 2
        return dict(shared) == {"a": 1, "b": 2}


def use_shared_memory() -> bool:
    block = shared_memory.SharedMemory(create=True, size=1 << 20)
    memory = block.buf
    assert memory is not None
    child = os.fork()
    if child == 0:
        memory[:5] = b"hello"
        os._exit(0)
    os.waitpid(child, 0)
    text = memory[:5].tobytes()
    del memory
    block.close()
    block.unlink()
    return text == b"hello"


def use_anonymous_memory() -> bool:
    with mmap.mmap(-1, 1 << 20) as block:
        block[:5] = b"hello"
        return block[:5] == b"hello"


def use_asyncio_subprocess() -> bool:
    async def talk() -> bytes:
        process = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return (await asyncio.wait_for(process.communicate(b"hello"), 10))[0]

    # The session's own loop belongs to its top-level await.
    results: list[bytes] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(talk())))
    thread.start()
    thread.join(10)
    return results == [b"hello"]


def use_threads() -> bool:
    results: list[int] = []
    threads = [threading.Thread(target=results.append, args=(index,)) for index in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return sorted(results) == [*range(32)]


def use_sqlite() -> bool:
    connection = sqlite3.connect("data.db")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t (x)")
    connection.execute("INSERT INTO t VALUES (42)")
    connection.commit()
    rows = connection.execute("SELECT x FROM t").fetchall()
    connection.close()
    return rows == [(42,)]


def use_pty() -> bool:
    child, terminal = pty.fork()
    if child == 0:
        os.write(1, b"hello")
        os._exit(0)
    text = os.read(terminal, 5)
    os.waitpid(child, 0)
    os.close(terminal)
    return text == b"hello"


def use_loopback(ipv6: bool = True) -> bool:  # noqa: FBT001, FBT002 - called by `inside`
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        if family == socket.AF_INET6 and not (ipv6 and os.path.exists("/proc/net/if_inet6")):
            continue  # a kernel without it
        with (
            socket.create_server((host, 0), family=family) as server,
            socket.create_connection(server.getsockname()[:2], 10) as client,
            server.accept()[0] as peer,
        ):
            client.sendall(b"hello")
            if peer.recv(5, socket.MSG_WAITALL) != b"hello":
                return False
    return bool(socket.getaddrinfo("localhost", 80))


def use_unix_sockets() -> bool:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("/tmp/own.sock")
        server.listen()
        client.connect("/tmp/own.sock")
    return True


def use_subprocess() -> bool:
    done = subprocess.run("echo $((6 * 7)) | cat", shell=True, capture_output=True, check=True)
    return done.stdout == b"42\n"


def use_files() -> bool:
    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=".") as named:
        with open(f"{folder}/a", "w") as file:
            file.write("hello")
        os.chmod(f"{folder}/a", 0o751)
        copy = shutil.copy(f"{folder}/a", "copy")
        os.mkfifo(f"{folder}/pipe")
        os.symlink("a", f"{folder}/link")
        named.write(b"x")
        return stat.S_IMODE(os.stat(copy).st_mode) == 0o751


PYTHON: tuple[Callable[[], bool], ...] = (
    use_spawn,
    use_fork,
    use_process_pool,
    use_manager,
    use_shared_memory,
    use_anonymous_memory,
    use_asyncio_subprocess,
    use_threads,
    use_sqlite,
    use_pty,
    use_loopback,
    use_unix_sockets,
    use_subprocess,
    use_files,
)

# --- Outside ----------------------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """What the libraries' image is made of: the group of that name, what every image has, and requests."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    groups = project["dependency-groups"]
    named = [one for one in groups["dev"] if one.startswith("requests")]
    return [*DEFAULT_PACKAGES, *groups["libraries"], *named]


async def built() -> str:
    """The image with the libraries, named after what it is made of; built if the daemon has none of that name."""
    base = docker_tools.base()
    async with daemon.reach() as found:
        under = await images.look(found, base)
        made_of = "\n".join([under.id if under else base, *requirements()])
        tag = f"actbox-test/libraries:{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
        if await images.look(found, tag) is None:
            command = [sys.executable, "-m", "actbox", "build", "-t", tag, "--engine", "docker", "--base", base]
            done = await asyncio.to_thread(
                subprocess.run, [*command, *requirements()], capture_output=True, check=False, timeout=450
            )
            assert done.returncode == 0, done.stderr
    return tag


@pytest.fixture(scope="module")
async def stocked(engine: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CodeExecutionContainer]:
    """A container whose sessions have the libraries."""
    tag = await built() if engine == "docker" else "default"
    async with CodeExecutionContainer(tag, workspace_path=tmp_path_factory.mktemp("stocked"), engine=engine) as made:
        await made.warmed()
        yield made


@pytest.mark.timeout(500)
@pytest.mark.parametrize("use", LIBRARIES, ids=lambda use: use.__name__)
async def test_libraries_work(stocked: CodeExecutionContainer, key: str, use: Callable[[], bool], engine: str) -> None:
    """H11: those that bring machine code, threads, processes and memory of their own."""
    module = {"pillow": "PIL", "pandas_with_parquet": "pyarrow"}.get(name := use.__name__.removeprefix("use_"), name)
    if engine == "bubblewrap" and importlib.util.find_spec(module) is None:
        lacking(f"there is no {module} in this environment")
    async with CodeExecutor(key, stocked.workspace, stocked.port) as executor:
        assert await inside(executor, use) is True


@pytest.mark.parametrize("use", PYTHON, ids=lambda use: use.__name__)
async def test_ordinary_python_works(executor: CodeExecutor, use: Callable[[], bool]) -> None:
    """H11: processes, threads, memory, files, sockets, terminals."""
    assert await inside(executor, use) is True


async def test_ipython_works(executor: CodeExecutor) -> None:
    """H11: shell commands and magics."""
    assert (await executor.execute("!echo hello")).text == "hello"
    assert (await executor.execute("%%bash\necho $((6 * 7))")).text == "42"
    assert "loop" in ((await executor.execute("%timeit -n 1 -r 1 pass")).text or "")
    assert (await executor.execute("import asyncio\nawait asyncio.sleep(0, 5)")).text == "5"

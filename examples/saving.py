"""A session's work outlives its process: saved to a file of the host, restored in a container that starts later.

Run it with `.venv/bin/python examples/saving.py`; it keeps its files in a temporary folder.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from actbox import execution_environment

WORK = """
import math, threading

rates = {"a": 0.02, "b": 0.05}
lock = threading.Lock()
"""


async def main() -> None:
    """One session works and is closed; another goes on."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "session.actbox"

        async with execution_environment(env_vars={}, workspace_path=folder, log_file=None) as environment:
            await environment.executor.execute(WORK)
            saved = await environment.executor.save(file)
            print(f"saved: {', '.join(saved.names)}")
            for name, reason in saved.left_out.items():
                print(f"left out: {name}, {reason}")

        # Another container, as it could be in another process, on another day.
        async with execution_environment(env_vars={}, workspace_path=folder, log_file=None) as environment:
            await environment.executor.restore(file)
            result = await environment.executor.execute("print(math.floor(100 * rates['b']), 'lock' in globals())")
            print(f"there again: {result.text}")


if __name__ == "__main__":
    asyncio.run(main())

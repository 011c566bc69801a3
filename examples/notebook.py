"""A session as a Jupyter notebook: every cell with its outputs, how long it took, and how it ended.

The record is kept as the session goes, so the notebook can be had afterwards, too. Run it with
`.venv/bin/python examples/notebook.py [out.ipynb]`, and open the file in Jupyter.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from pathlib import Path

from actbox import CodeExecutionContainer, CodeExecutor, ExecutionError, ExecutionTimeout

CELLS = (
    "squares = [n * n for n in range(5)]\nsquares",
    "import matplotlib.pyplot as plt\nplt.plot(squares);",
    "squares[7]",
    "while True: pass",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "print('a fresh kernel goes on')",
)


async def main(file: Path, workspace: Path) -> None:
    """Run the cells, whatever becomes of each, and write the notebook."""
    async with (
        CodeExecutionContainer(workspace_path=workspace) as container,
        CodeExecutor("agent", container.workspace, container.port) as executor,
    ):
        for code in CELLS:
            with contextlib.suppress(ExecutionError, ExecutionTimeout):
                await executor.execute(code, timeout=5 if "plt" in code else 1)
    await executor.save_notebook(file)

    for cell in executor.notebook()["cells"]:
        facts = cell["metadata"]["actbox"]
        took = f"{1000 * facts['duration']:7.1f} ms" if facts.get("ran") else ""
        print(f"{facts.get('outcome', ''):10} {took:10}  {cell['source'].splitlines()[0]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "session.ipynb")
        asyncio.run(main(asked, Path(folder, "workspace")))

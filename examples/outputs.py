"""What a model gets of a result: a budget of text, tables by their shape, images as they are, and where the rest is.

An agent's loop in small: each cell's outcome, a failed one too, becomes blocks for a chat API. Run it with
`.venv/bin/python examples/outputs.py`.
"""

from __future__ import annotations

import asyncio
import tempfile

from actbox import CodeExecutionContainer, CodeExecutor, ExecutionError, OutputPolicy, to_anthropic

# Characters of text in all, and of what is printed; one image a cell.
POLICY = OutputPolicy(total=4000, stream=400, images=1)

CELLS = (
    "import pandas as pd\npd.DataFrame({'n': range(1000), 'square': [n * n for n in range(1000)]})",
    "for n in range(1000): print(n, n * n)",
    "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9]);",
    "1 / 0",
    # The line in the place of what is missing says where it is: the session can read on there.
    "from pathlib import Path\nprint(sorted(Path('.outputs').iterdir())[0].read_text()[5000:5030])",
)


async def main() -> None:
    """Run the cells, and print what a model would get."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            CodeExecutionContainer(workspace_path=folder) as container,
            CodeExecutor("agent", container.workspace, container.port) as executor,
        ):
            for code in CELLS:
                try:
                    result = await executor.execute(code)
                except ExecutionError as error:
                    result = error.result  # what there was until then, and the traceback
                print(f"\n>>> {code}")
                for part in to_anthropic(result.for_model(POLICY)):  # as a message's content
                    print(part["text"] if part["type"] == "text" else f"({part['source']['media_type']})")


if __name__ == "__main__":
    asyncio.run(main())

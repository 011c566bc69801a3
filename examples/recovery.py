"""An agent whose model makes mistakes: wrecked data, an endless loop, a crash. The session goes back, and work goes on.

The model is scripted, so that this runs without one. Run it with `.venv/bin/python examples/recovery.py`; it keeps its
workspace in a temporary folder.
"""

from __future__ import annotations

import asyncio
import tempfile
from typing import TYPE_CHECKING

from actbox import CodeExecutionContainer, CodeExecutor, ExecutionError, ExecutionTimeout

if TYPE_CHECKING:
    from collections.abc import Iterator

# What the model says, a cell at a time. The third, fourth and fifth are mistakes.
SCRIPT = [
    "orders = [{'item': 'tea', 'price': 4.5}, {'item': 'cups', 'price': 12.0}, {'item': 'tea', 'price': 5.0}]",
    "total = sum(order['price'] for order in orders)\nprint(f'total {total:.2f}')",
    "orders.clear()  # meant to clear the screen\nprint('orders left:', len(orders))",
    "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
    "import ctypes\nctypes.string_at(0)",
    """
from collections import Counter
by_item = Counter()
for order in orders:
    by_item[order['item']] += order['price']
print(dict(by_item))
""",
]


def model() -> Iterator[str]:
    """The next cell; a real agent would be told the last result, and ask a model."""
    yield from SCRIPT


def looks_wrong(text: str | None) -> bool:
    """What a check of the agent's might say of a result: here, that the data must not vanish."""
    return text is not None and "orders left: 0" in text


async def work(executor: CodeExecutor) -> None:
    """Run what the model says, one step at a time."""
    for step, code in enumerate(model(), 1):
        # A copy of the session, in milliseconds; it costs memory only for what the cell changes.
        await executor.checkpoint("before")
        try:
            result = await executor.execute(code, timeout=2)
        except ExecutionTimeout as error:
            # recover=True: the kernel had to be killed, and the session is as it was after an earlier cell already.
            print(f"step {step}: {error}")
        except ExecutionError as error:
            print(f"step {step}: {error}")
        else:
            if looks_wrong(result.text):
                await executor.rollback("before")
                print(f"step {step}: {result.text!r} cannot be; went back")
            else:
                print(f"step {step}: {result.text or 'done'}")


async def main() -> None:
    """One container, one executor that keeps the last good state."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            CodeExecutionContainer(workspace_path=folder) as container,
            CodeExecutor("agent", container.workspace, container.port, recover=True, interrupt_grace=0.5) as executor,
        ):
            await work(executor)


if __name__ == "__main__":
    asyncio.run(main())

"""Functions of this program, called by code in the sandbox: typed, counted, and approved one by one.

The session has no network and sees none of this program's files; what it may do outside is what these functions do.
Run it with `.venv/bin/python examples/functions.py`; it keeps its workspace in a temporary folder.
"""

from __future__ import annotations

import asyncio
import tempfile

from actbox import Allow, CallLimits, Deny, FunctionCall, LimitExceeded, execution_environment

PRICES = {"apple": 0.4, "pear": 0.6}
SENT: list[str] = []


async def price(article: str) -> float:
    """The price of an article, in francs."""
    await asyncio.sleep(0.01)  # a database, say
    return PRICES[article]


def send(to: str, text: str) -> None:
    """Send a message to somebody."""
    SENT.append(f"{to}: {text}")


def ask(call: FunctionCall) -> Allow | Deny:
    """Decide a call, as a person would who is shown it; the cell's time stands still meanwhile."""
    if call.arguments["to"] != "shop@example.org":
        return Deny("messages go to the shop alone")
    return Allow({**call.arguments, "text": f"[by an agent] {call.arguments['text']}"})


CELLS = {
    "at once": """
        total = sum(await asyncio.gather(price.aio("apple"), price.aio("pear")))
        print(f"together {total:.2f} francs")
    """,
    "an exception comes back": """
        try:
            price("plum")
        except KeyError as error:
            print(f"no price for {error}")
    """,
    "a wrong type never arrives": """
        try:
            price(7)
        except TypeError as error:
            print(error)
    """,
    "approved, as it was edited": """
        send("shop@example.org", "an apple and a pear, please")
    """,
    "denied": """
        try:
            send("everybody@example.org", "hello")
        except RuntimeError as error:
            print(error)
    """,
}


async def main() -> None:
    """Run the cells, and one that calls without end."""
    with tempfile.TemporaryDirectory() as folder:
        async with execution_environment(env_vars={}, workspace_path=folder, log_file=None) as environment:
            executor = environment.executor
            executor.functions(price, limits=CallLimits(per_cell=50))
            executor.functions(send, approve=ask)

            await executor.execute("import asyncio; help(price)")
            for title, cell in CELLS.items():
                result = await executor.execute(cell)
                print(f"{title}: {result.text or 'done'}")
            try:
                await executor.execute("while True: price('apple')")
            except LimitExceeded as error:
                print(f"without end: {error.limit} is {error.bound}")
    print(f"sent: {SENT}")


if __name__ == "__main__":
    asyncio.run(main())

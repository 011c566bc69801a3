"""Best of 32: one session prepares the data, 32 copies of it each try something else, and the best one goes on.

Run it with `.venv/bin/python examples/search.py`; it keeps its workspace in a temporary folder.
"""

from __future__ import annotations

import asyncio
import tempfile
from time import perf_counter

from actbox import CodeExecutionContainer, CodeExecutor

# Half a million noisy readings of a curve, the features of each up to the 12th power, and a part put aside to judge by.
PREPARE = """
import numpy as np
generator = np.random.default_rng(7)
x = generator.uniform(-1, 1, 500_000)
y = np.sin(4 * x) * np.exp(-x) + generator.normal(0, 0.3, x.size)
powers = np.vander(x, 13, increasing=True)
learn, judge = slice(0, 400_000), slice(400_000, None)
"""

# What a model might propose, each with other numbers.
TRY = """
terms, penalty = {terms}, {penalty}
X = powers[learn, :terms]
weights = np.linalg.solve(X.T @ X + penalty * np.eye(terms), X.T @ y[learn])
error = float(np.sqrt(np.mean((powers[judge, :terms] @ weights - y[judge]) ** 2)))
"""

CANDIDATES = [(terms, penalty) for terms in (2, 3, 4, 5, 6, 8, 10, 13) for penalty in (1e-6, 1e2, 1e4, 1e6)]


async def attempt(branch: CodeExecutor, terms: int, penalty: float) -> float:
    """Try one candidate in its own copy of the session; how far off it is."""
    await branch.execute(TRY.format(terms=terms, penalty=penalty))
    return await branch.get("error")


async def main() -> None:
    """Prepare once, fork 32 times, keep the best."""
    with tempfile.TemporaryDirectory() as folder:
        async with (
            CodeExecutionContainer(workspace_path=folder) as container,
            CodeExecutor("search", container.workspace, container.port) as executor,
        ):
            began = perf_counter()
            await executor.execute(PREPARE)
            prepared = perf_counter() - began

            # No branch prepares anything: it has the arrays, in the same memory until it writes to them.
            began = perf_counter()
            branches = [await executor.fork() for _ in CANDIDATES]
            forked = perf_counter() - began
            errors = await asyncio.gather(
                *(attempt(branch, *candidate) for branch, candidate in zip(branches, CANDIDATES, strict=True))
            )
            print(f"prepared once in {prepared:.2f} s, forked {len(branches)} times in {forked:.2f} s")

            best = min(range(len(branches)), key=lambda number: errors[number])
            terms, penalty = CANDIDATES[best]
            print(f"the best of {len(branches)}: {terms} terms, penalty {penalty:g}, off by {errors[best]:.4f}")

            # The winner has everything that its cell has made; the others go.
            await asyncio.gather(*(branch.disconnect() for branch in branches if branch is not branches[best]))
            async with branches[best] as winner:
                result = await winner.execute("print(f'{len(weights)} weights, the first {weights[0]:+.3f}')")
                print(result.text)


if __name__ == "__main__":
    asyncio.run(main())

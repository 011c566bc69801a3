"""Data in and out of a session without text: arrays, JSON values and bytes, checked on their way.

Run it with `.venv/bin/python examples/variables.py`; it keeps its workspace in a temporary folder.
"""

from __future__ import annotations

import asyncio
import tempfile

import numpy as np

from actbox import VariableUnsupported, execution_environment


async def main() -> None:
    """Measurements go in, cells work on them, results come out."""
    with tempfile.TemporaryDirectory() as folder:
        async with execution_environment(env_vars={}, workspace_path=folder, log_file=None) as environment:
            executor = environment.executor

            await executor.set("readings", np.linspace(1.0, 5.0, 1000))
            await executor.set("settings", {"unit": "kPa", "key": b"\x00\x01"})
            await executor.execute(
                """
                import threading
                result = {"mean": float(readings.mean()), "unit": settings["unit"]}
                squares = readings.reshape(10, 100) ** 2
                lock = threading.Lock()
                """
            )

            # What is there, without running any code of the values' own.
            for variable in await executor.variables():
                shape = variable.shape if variable.shape is not None else ""
                print(f"{variable.name}: {variable.type} {shape} {variable.preview or ''}")

            result = await executor.get("result")
            print(f"the mean is {result['mean']:.1f} {result['unit']}")
            squares = await executor.get("squares")
            print(f"an array of its own here: {squares.shape}, {squares.dtype}")

            # Other types say what they are, and what to do.
            try:
                await executor.get("lock")
            except VariableUnsupported as refusal:
                print(f"{refusal.name}: {refusal.type} does not travel; {refusal.remedy}")


if __name__ == "__main__":
    asyncio.run(main())

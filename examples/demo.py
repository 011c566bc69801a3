"""The main job, end to end: an agent's cells analyse a real data set inside the sandbox.

Four cells, as a model might write them: they keep their state from one to the next, use a skill that all executors
share, get a private skill corrected between two cells, and draw a plot that is saved on the host. Run it with
`make demo`.

The data: body measurements of 344 penguins of the Palmer archipelago, by Gorman, Williams and Fraser (2014), as the
package palmerpenguins ships them.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from textwrap import dedent, indent

from actbox import CodeExecutionEnvironment, ExecutionError, execution_environment

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "demo-output"

SHARED_SKILL = '''
"""Group statistics for tables of measurements."""


def by_group(table, group, column):
    """Count, mean and standard deviation of a column in each group."""
    return table.groupby(group)[column].agg(["count", "mean", "std"]).round(1)
'''

# The first draft of a skill that the agent keeps for itself: it forgets that a slope needs both columns present.
PRIVATE_SKILL = '''
"""Straight lines through clouds of points."""

import numpy as np


def slope(x, y):
    """The slope of the least-squares line."""
    return float(np.polyfit(x, y, 1)[0])
'''

CORRECTED_SKILL = PRIVATE_SKILL.replace(
    "    return",
    "    present = x.notna() & y.notna()\n    x, y = x[present], y[present]\n    return",
)

CELLS = {
    "load": """
        from palmerpenguins import load_penguins
        penguins = load_penguins()
        penguins.head(3)
    """,
    "summarise, with a shared skill": """
        from measurements import by_group
        by_group(penguins, "species", "body_mass_g")
    """,
    "fit, with a private skill": """
        import lines
        lines.slope(penguins.flipper_length_mm, penguins.body_mass_g)
    """,
    "fit again: the skill was edited meanwhile": """
        grams_per_mm = lines.slope(penguins.flipper_length_mm, penguins.body_mass_g)
        print(f"{grams_per_mm:.1f} g of body for each mm of flipper")
    """,
    "draw": """
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for species, group in penguins.groupby("species"):
            axes.scatter(group.flipper_length_mm, group.body_mass_g, s=18, alpha=0.7, label=species)
        axes.set(xlabel="flipper length (mm)", ylabel="body mass (g)", title="Penguins of the Palmer archipelago")
        axes.legend(title="species")
        plt.show()
    """,
    "what a cell cannot do": """
        import socket
        socket.create_connection(("192.0.2.1", 443), timeout=3)
    """,
}


async def run_cell(environment: CodeExecutionEnvironment, title: str, source: str) -> None:
    """Run one cell, print it and what came of it."""
    source = dedent(source).strip()
    print(f"\n── {title} " + "─" * max(0, 76 - len(title)))
    print(indent(source, "  │ "))
    started = time.perf_counter()
    try:
        result = await environment.executor.execute(source, timeout=60)
    except ExecutionError as error:
        print(f"{error}   ({1000 * (time.perf_counter() - started):.1f} ms)")
        return
    print(f"{result.text or ''}   ({1000 * (time.perf_counter() - started):.1f} ms)")
    for image in result.images:
        print(f"image: {image.path}")


async def main() -> None:
    """Run the cells in one session."""
    print("starting a sandboxed session ...")
    started = time.perf_counter()
    log_file = OUT / "agent.log"
    async with execution_environment(
        executor_key="demo", env_vars={}, workspace_path=OUT / "workspace", log_file=log_file
    ) as environment:
        print(f"ready after {1000 * (time.perf_counter() - started):.0f} ms")
        executor = environment.executor
        (executor.workspace.shared_skills_path / "measurements.py").write_text(SHARED_SKILL)
        (executor.working_dir / "lines.py").write_text(PRIVATE_SKILL)
        for title, source in CELLS.items():
            if title.startswith("fit again"):
                (executor.working_dir / "lines.py").write_text(CORRECTED_SKILL)
            await run_cell(environment, title, source)
        images = sorted(executor.images_dir.glob("*.png"))
    print(f"\nimage on this machine: {images[-1]}")
    print(f"log for people:        {log_file}")
    print(f"log for programs:      {log_file.with_suffix('.jsonl')}")


if __name__ == "__main__":
    asyncio.run(main())

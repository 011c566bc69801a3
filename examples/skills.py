"""Skills: what an agent has learned to do, found on the host, given to a model, and used in a session.

A session writes a module and an Agent Skill into its folder. The host lists both, as an agent's prompt would have them,
and another session of the same key imports what the first has written. Run it with
`.venv/bin/python examples/skills.py`.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from actbox import CodeExecutionContainer, CodeExecutor

LEARN = '''
from pathlib import Path

Path("areas.py").write_text(\'\'\'"""Areas of plane figures."""


def circle(radius: float) -> float:
    """The area of a circle."""
    return 3.14159 * radius**2
\'\'\')

skill = Path("unit-conversion")
skill.mkdir()
(skill / "SKILL.md").write_text("""---
name: unit-conversion
description: Converts lengths. Use it when somebody asks for miles.
---
A mile has 1609.344 metres.
""")
import areas  # a skill can be imported at once
print(areas.circle(1))
'''


async def main(workspace: Path) -> None:
    """Write skills inside, find them outside, and use them in the next session."""
    async with CodeExecutionContainer(workspace_path=workspace) as container:
        async with CodeExecutor("agent", container.workspace, container.port) as executor:
            print((await executor.execute(LEARN)).text)

            skills = await executor.skills()
            for skill in skills:  # a line each is what a prompt begins with
                print(f"- {skill.name} ({skill.kind}): {skill.description}")
                for problem in skill.problems:
                    print(f"  {problem.kind}: {problem.message}")
            print(await executor.skill_sources(skill.name for skill in skills))  # all of it, once it is wanted

        async with CodeExecutor("agent", container.workspace, container.port) as executor:
            print((await executor.execute("from areas import circle\nround(circle(2), 2)")).text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder, "workspace")))

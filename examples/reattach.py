"""A session that outlives its clients: one process works in it and is killed, another goes on where it was.

A container keeps a session named "analysis". A first agent, in a process of its own, begins a long cell there and is
killed in the middle, as a crash or a lost connection would have it. A second one attaches to the same session: the cell
has gone on, it replays what was missed, watches the rest as it comes, and finds every variable where it was.

Run it with `python examples/reattach.py`; with an argument it is the first agent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from actbox import AttachedClient, DriveRefused, ExecutionContainer

NAME = "analysis"

# What the first agent has computed when it is killed, and what goes on without it.
LONG = """
import time
total = 0
for step in range(1, 11):
    total += step
    print(f"step {step}: {total}", flush=True)
    time.sleep(0.1)
total
"""


async def first_agent(port: int) -> None:
    """Begin the cell, see three events of it, and be killed."""
    async with AttachedClient(port, NAME, token=os.environ["ACTBOX_TOKEN"], ttl=60) as client:
        # The id is what the others find it by.
        execution = await client.submit(LONG, timeout=30, id="the long one")
        async for number, event in execution.events():
            print(f"  first agent, event {number}: {event}", flush=True)
            if number == 3:  # noqa: PLR2004 - in the middle
                os.kill(os.getpid(), signal.SIGKILL)


async def second_agent(port: int) -> None:
    """Find the session as it is, and go on."""
    async with AttachedClient(port, NAME, take_over=True) as client:
        for standing in await client.executions():
            print(f"{standing.id!r} is {standing.state}, with {standing.last} events so far")
        execution = client.execution("the long one")
        # From where the first one was: what was missed at once, the rest as it comes.
        async for number, event in execution.events(after=3):
            print(f"  second agent, event {number}: {event}")
        result = await execution.result()
        print(f"all of it, first to last: {len((result.text or '').splitlines())} lines")
        print(f"the variables are there: total = {(await client.execute('total')).text}")

        # Others may watch what is done here, and do nothing themselves.
        async with AttachedClient(port, NAME, drive=False) as watcher:
            running = await client.submit("print('seen by both')")
            async for number, event in watcher.execution(running.id).events():
                print(f"  watcher, event {number}: {event}")
            try:
                await watcher.submit("total = 0")
            except DriveRefused as refusal:
                print(f"the watcher is refused: {refusal}")

        # Without this the session would go on for its time to live.
        await client.end()


async def main() -> None:
    """Run a container, and both agents one after the other."""
    async with ExecutionContainer(preload=()) as container:
        first = await asyncio.create_subprocess_exec(
            sys.executable, __file__, str(container.port), env={**os.environ, "ACTBOX_TOKEN": container.token}
        )
        await first.wait()
        print(f"the first agent was killed; kept: {', '.join(container.kept_sessions)}")
        await second_agent(container.port)
        print(f"kept at the end: {len(container.kept_sessions)}")


if __name__ == "__main__":
    asyncio.run(first_agent(int(sys.argv[1])) if sys.argv[1:] else main())

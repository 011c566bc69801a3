"""Timers that can be stopped together: a cell's time, which does not run while somebody is asked about it."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


class Timer:
    """Calls something once, when so much of its clock's time has passed; made by `Clock.after`."""

    def __init__(self, clock: Clock, seconds: float, call: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._clock = clock
        self._left = seconds
        self._call = call
        self._args = args
        self._since = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def run(self) -> None:
        """Let its time pass from now on."""
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        self._handle = loop.call_later(self._left, self._fire)

    def stop(self) -> None:
        """Keep what is left of its time."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
            self._left = max(0.0, self._left - (asyncio.get_running_loop().time() - self._since))

    def cancel(self) -> None:
        """Never call."""
        if self._handle is not None:
            self._handle.cancel()
        self._clock.forget(self)

    def _fire(self) -> None:
        self._clock.forget(self)
        self._call(*self._args)


class Clock:
    """One cell's time. State: `_timers`, those that have not fired; `_stops`, how many have stopped it."""

    def __init__(self) -> None:
        self._timers: set[Timer] = set()
        self._stops = 0

    def after(self, seconds: float, call: Callable[..., object], *args: Any) -> Timer:
        """Call this when so many seconds of the clock's have passed."""
        timer = Timer(self, seconds, call, args)
        self._timers.add(timer)
        if not self._stops:
            timer.run()
        return timer

    @contextmanager
    def stopped(self) -> Generator[None]:
        """While the block runs no time passes; any number of blocks may run at once."""
        self._stops += 1
        if self._stops == 1:
            for timer in self._timers:
                timer.stop()
        try:
            yield
        finally:
            self._stops -= 1
            if not self._stops:
                for timer in self._timers:
                    timer.run()

    def forget(self, timer: Timer) -> None:
        """It has fired, or never will."""
        self._timers.discard(timer)

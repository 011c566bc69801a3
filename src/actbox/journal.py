"""A journal: the events of one execution, numbered from 1, for readers who come late or again.

Pure: it waits for nobody and knows no client. It is bounded, whatever a guest prints: the oldest events go first, and
who asks for them is told which are missing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from actbox.result import event_size

if TYPE_CHECKING:
    from actbox.events import Event

DEFAULT_BYTES = 16 << 20
DEFAULT_EVENTS = 10_000


@dataclass(frozen=True, slots=True)
class Dropped:
    """In the place of events that a reader asked for too late: those numbered `first` to `last`."""

    first: int
    last: int

    @property
    def count(self) -> int:
        """How many there were."""
        return self.last - self.first + 1


Numbered = tuple[int, "Event | Dropped"]
"""An event with its number; of what was dropped, the last one's."""


class Journal:
    """See the module's text.

    Args:
        max_bytes: of all events kept, as `event_size` counts them.
        max_events: kept at one time.

    State: `_kept`, the newest events with their sizes, `size` in all; `last`, the number of the newest, 0 for none.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES, max_events: int = DEFAULT_EVENTS) -> None:
        self._max_bytes = max_bytes
        self._max_events = max_events
        self._kept: deque[tuple[int, Event]] = deque()
        self.size = 0
        self.last = 0

    def __repr__(self) -> str:
        return f"<Journal {self.first}-{self.last}, {self.size} bytes>"

    @property
    def first(self) -> int:
        """The number of the oldest event that is kept; one behind the last if none is."""
        return self.last - len(self._kept) + 1

    def add(self, event: Event) -> int:
        """Keep an event; its number."""
        size = event_size(event)
        self._kept.append((size, event))
        self.size += size
        self.last += 1
        while self.size > self._max_bytes or len(self._kept) > self._max_events:
            self.size -= self._kept.popleft()[0]
        return self.last

    def after(self, number: int, max_bytes: int, max_events: int) -> list[Numbered]:
        """What follows an event, in order and without a gap; as much as fits, but at least one if there is any.

        What is no longer kept stands at the beginning, as one `Dropped`.
        """
        found: list[Numbered] = []
        if number + 1 < self.first:
            found.append((self.first - 1, Dropped(number + 1, self.first - 1)))
            number = self.first - 1
        taken = 0
        for size, event in islice(self._kept, number + 1 - self.first, None):
            if found and (taken + size > max_bytes or len(found) >= max_events):
                break
            number += 1
            taken += size
            found.append((number, event))
        return found

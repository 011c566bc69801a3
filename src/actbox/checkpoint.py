"""A checkpoint, as its owner sees it: a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state that a session can go back to.

    Attributes:
        name: what it was called.
        cell: the number (`execution_count`) of the last cell that had run then, 0 for none.
        created: when, in seconds since 1970.
        files: whether the private folder was kept with it.
        left_out: what of that folder was not, being neither a regular file nor a folder: printable paths.
    """

    name: str
    cell: int
    created: float
    files: bool = False
    left_out: tuple[str, ...] = ()

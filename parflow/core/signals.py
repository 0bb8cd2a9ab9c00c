"""What executor and coordinator say to each other: stimuli go in, instructions come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parflow.core.entries import ChunksListed, Entry, Published, RunEnded
from parflow.model import Job, Receipt

Bell = tuple[int | str, ...]
"""What is to be rung for: the deadline of a stage's output, a wait before an attempt, a breaker's reset, …"""

# --- stimuli: what the executor tells --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SlotsChanged:
    """The cluster can run this many jobs at once."""

    slots: int


@dataclass(frozen=True, slots=True)
class Listed:
    """More of a stage's input was listed."""

    entry: ChunksListed


@dataclass(frozen=True, slots=True)
class BatchReturned:
    """A batch came back: a receipt, or None for a job that was not started, for each of its jobs in order."""

    attempt: str
    receipts: tuple[Receipt | None, ...]


@dataclass(frozen=True, slots=True)
class BatchLost:
    """A batch will never come back: its worker vanished."""

    attempt: str
    reason: str


@dataclass(frozen=True, slots=True)
class Durable:
    """All entries up to this count are on disk."""

    count: int


@dataclass(frozen=True, slots=True)
class SinkPublished:
    """A sink's files were moved to their final names."""

    entry: Published


@dataclass(frozen=True, slots=True)
class Rang:
    """The time that was asked for is over."""

    bell: Bell


@dataclass(frozen=True, slots=True)
class Broke:
    """Something outside a record's reach failed for good: listing, publishing, the cluster."""

    error: str
    arguments: tuple[str | float, ...]


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the run to stop: chunks in flight yield, or (``now``) are abandoned.

    ``status`` is how the run ends: stopped for now, or cancelled, since nobody wants its result any more; ``compensate`` asks
    for what was done to be undone.
    """

    now: bool = False
    status: Literal["stopped", "cancelled"] = "stopped"
    compensate: bool = False


@dataclass(frozen=True, slots=True)
class Stands:
    """What was done outside, and can be undone, the newest first: of each effect whose code undoes it, and its id."""

    effects: tuple[tuple[int, str], ...]


Stimulus = Stands | SlotsChanged | Listed | BatchReturned | BatchLost | Durable | SinkPublished | Rang | Broke | StopRequested


# --- instructions: what the coordinator asks for ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class List:
    """List a stage's input, passing over the first ``skip`` items, which are known."""

    stage: int
    skip: int


@dataclass(frozen=True, slots=True)
class Ring:
    """Say so when so many seconds are over."""

    bell: Bell
    seconds: float


@dataclass(frozen=True, slots=True)
class Append:
    """Write an entry to the journal; it is number ``ticket`` of this coordinator."""

    entry: Entry
    ticket: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a batch of jobs of one stage, or of calls of one task. Batches begin in the order in which they are asked for.

    ``unit`` is the stage's number, or ``~`` the task's. ``share`` is its part of what the run may call a second. A ``probe``
    stops after its first record: a breaker waits for what becomes of it.
    """

    attempt: str
    unit: int
    jobs: tuple[Job, ...]
    share: float = 1.0
    probe: bool = False


@dataclass(frozen=True, slots=True)
class Yield:
    """Ask these batches to come back at their next record."""

    attempts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """End these batches: nobody wants what they make any more, and nobody waits for them to come back."""

    attempts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Move a sink's staged files to their final names."""

    stage: int
    output: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing is left to do."""

    ended: RunEnded


@dataclass(frozen=True, slots=True)
class Survey:
    """Say what was done outside and can be undone."""


Instruction = Survey | List | Ring | Append | Submit | Yield | Cancel | Publish | Finish

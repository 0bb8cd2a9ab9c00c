"""The closed set of journal entries, and their JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from parflow.errors import JournalError
from parflow.model import (
    Address,
    CallFacts,
    Chunk,
    Cursor,
    Failure,
    GraphFacts,
    Piece,
    Receipt,
    Ref,
    Rejected,
    StageFacts,
    TaskFacts,
    dump_json,
    from_json,
    load_json,
    to_json,
)

Status = Literal["running", "succeeded", "failed", "stopped", "cancelled", "compensation_failed"]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run exists: its plan is frozen, and where its code is. Without ``targets`` it is asked for every output."""

    flow: str
    plan: str
    stages: tuple[StageFacts, ...]
    fan_in: int
    versions: dict[str, str] = field(default_factory=dict)
    tasks: tuple[TaskFacts, ...] = ()
    calls: tuple[CallFacts, ...] = ()
    targets: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class Owned:
    """A coordinator took the run, at its start or to resume it, with these options."""

    epoch: int
    owner: str
    max_failures: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChunksListed:
    """More of a stage's input, in input order; ``last`` closes the list.

    Where a stage goes on from another one, its chunks are not repeated here: the fold derives them.
    """

    stage: int
    chunks: tuple[Chunk, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    last: bool = False


@dataclass(frozen=True, slots=True)
class PieceEnded:
    """A piece is no longer pending: ``rest`` is pending in its place.

    ``receipt`` is what was committed, None when the child died; ``failure`` is the record that was given up, and ``undo`` its
    identity, if something was perhaps done for it that is to be undone.
    """

    stage: int
    piece: Piece
    rest: tuple[Piece, ...] = ()
    receipt: Receipt | None = None
    failure: Failure | None = None
    undo: str = ""


@dataclass(frozen=True, slots=True)
class Merged:
    """Partial results of one output were merged: node ``index`` of ``level`` in the tree of a ``bucket``."""

    stage: int
    output: int
    level: int
    index: int
    result: Ref
    seconds: float = 0.0
    slot: str = ""
    started: float = 0.0
    bucket: int = 0


@dataclass(frozen=True, slots=True)
class BarrierOpened:
    """All of a stage's records are committed or dead letters, and there are no more of those than tolerated."""

    stage: int
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """The barrier of one output opened at its deadline, over a ``share`` of the input; ``late`` are the pieces left out."""

    stage: int
    output: int
    share: float
    late: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """Somebody takes a stage's barrier to be right although so many of its records have failed."""

    stage: int
    failed: int
    by: str


@dataclass(frozen=True, slots=True)
class Redone:
    """What of a chunk is run again: one ``record``, the piece that began at record ``first``, or all of it."""

    stage: int
    chunk: int
    first: int = -1
    record: Cursor | None = None
    step: str = ""


@dataclass(frozen=True, slots=True)
class Redriven:
    """Something is to be made up for, and all that rests on it is made again.

    ``outputs`` were cut at their deadline; ``parts`` have dead letters.
    """

    outputs: tuple[Address, ...] = ()
    parts: tuple[Redone, ...] = ()


@dataclass(frozen=True, slots=True)
class Compensating:
    """The run is to end like this, once all that it did and that can be undone is undone."""

    status: Literal["failed", "cancelled"]
    error: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Undone:
    """What was done for a record (its identity), or one effect (its id), was undone, but for what the ``failures`` tell."""

    unit: int
    key: str
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Turned:
    """A step's breaker is ``open``, ``probing`` or ``closed`` now; ``unit`` is a stage's number, or ``~`` a task's."""

    unit: int
    step: str
    to: str


@dataclass(frozen=True, slots=True)
class Published:
    """A sink's files stand under their final names."""

    stage: int
    output: int
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Called:
    """A call was made: its results, the branch that it chose, or why it failed."""

    call: int
    results: tuple[Ref, ...] = ()
    choice: int | None = None
    failure: Failure | None = None
    seconds: float = 0.0
    slot: str = ""
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Decided:
    """Branches were decided on: those ``picked`` (by number), how the others failed, and the nodes that were cancelled."""

    call: int
    picked: tuple[int, ...] = ()
    failures: dict[str, Failure] = field(default_factory=dict)
    cancelled: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Grown:
    """A call returned a lazy graph, which now runs in its place: what is added to the plan, numbered as the plan goes on."""

    call: int
    graph: GraphFacts
    results: tuple[Address, ...]
    code: str
    seconds: float = 0.0
    slot: str = ""
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The coordinator ended the run; a run that didn't succeed can be resumed."""

    status: Literal["succeeded", "failed", "stopped", "cancelled", "compensation_failed"]
    error: str = ""
    arguments: tuple[Any, ...] = ()


Entry = (
    RunStarted
    | Owned
    | ChunksListed
    | PieceEnded
    | Merged
    | BarrierOpened
    | Cut
    | Published
    | Called
    | Decided
    | Grown
    | Redriven
    | Accepted
    | Turned
    | Compensating
    | Undone
    | RunEnded
)

KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Entry)}
STATUS_KINDS = ("RunStarted", "Owned", "RunEnded")
"""The entries that tell a run's status without folding it."""


def encode(entry: Entry) -> tuple[str, bytes]:
    """Return an entry's kind and JSON body, as the journal stores it."""
    return type(entry).__name__, dump_json(to_json(entry))


def decode(kind: str, body: bytes) -> Entry:
    """Rebuild an entry from the journal.

    Raises
    ------
    JournalError
        When the kind is unknown: the journal was written by a newer parflow.
    """
    if kind not in KINDS:
        raise JournalError(f"the journal has an entry of kind {kind!r}, which this version doesn't know. Update parflow.")
    entry: Entry = from_json(KINDS[kind], load_json(body))
    return entry

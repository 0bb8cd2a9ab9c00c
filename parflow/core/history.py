"""The closed set of journal entries, their JSON form, and the fold that turns them back into a run's state.

A run *is* its entries: the coordinator decides an entry, applies it here and has it written; a resumed coordinator applies
the written ones again and stands where the first one stood.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from parflow.errors import JournalError
from parflow.model import (
    Address,
    CallFacts,
    Chunk,
    Failure,
    GraphFacts,
    Part,
    Piece,
    Receipt,
    Ref,
    Rejected,
    SinkFile,
    StageFacts,
    Tally,
    TaskFacts,
    chunk_id,
    dump_json,
    from_json,
    load_json,
    to_json,
)

Status = Literal["running", "succeeded", "failed", "stopped", "cancelled"]


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

    ``receipt`` is what was committed, None when the child died; ``failure`` is the record that was given up.
    """

    stage: int
    piece: Piece
    rest: tuple[Piece, ...] = ()
    receipt: Receipt | None = None
    failure: Failure | None = None


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
class Redriven:
    """What was late is to be made up for: these outputs, which were cut, and all that rests on them are made again."""

    outputs: tuple[Address, ...]


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

    status: Literal["succeeded", "failed", "stopped", "cancelled"]
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


CUT = -1
"""The bucket whose tree of merges has what was there at an output's deadline."""


@dataclass(slots=True)
class ChunkState:
    """A chunk: how many of its pieces are pending, and what the ended ones left, by their first ordinal."""

    chunk: Chunk
    pending: int = 1
    receipts: dict[int, Receipt] = field(default_factory=dict)


@dataclass(slots=True)
class StageState:
    """A stage: its chunks, what is pending, what is done; ``fan_in`` is of its trees of merges."""

    facts: StageFacts
    fan_in: int = 16
    chunks: list[ChunkState] = field(default_factory=list)
    pending: dict[tuple[int, int], Piece] = field(default_factory=dict)
    weight: int = 0
    ended: int = 0  # the weight of chunks of which no piece is pending
    listed: int = 0
    closed: bool = False
    rejected: list[Rejected] = field(default_factory=list)
    lost: list[Failure] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    encodings: dict[str, int] = field(default_factory=dict)
    merged: dict[tuple[int, int, int, int], Ref] = field(default_factory=dict)
    opened: bool = False
    cuts: dict[int, Cut] = field(default_factory=dict)
    leaves: dict[int, tuple[Ref, ...]] = field(default_factory=dict)
    patient: set[int] = field(default_factory=set)  # outputs whose deadline no longer holds
    redriven: bool = False
    cancelled: bool = False
    published: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """Dead letters so far: unusable inputs, given-up records, and those that pieces report."""
        return len(self.rejected) + len(self.lost) + self.tally.failed

    @property
    def records(self) -> int:
        """Records read so far, the dead letters among them."""
        return self.tally.records + len(self.rejected) + len(self.lost)

    @property
    def complete(self) -> bool:
        """Whether every record is committed or a dead letter."""
        return self.closed and not self.pending

    def receipts(self) -> Iterable[tuple[int, Receipt]]:
        """Every committed receipt with its chunk's index, in input order."""
        for index, state in enumerate(self.chunks):
            for first in sorted(state.receipts):
                yield index, state.receipts[first]

    def results(self, output: int, chunks: range | None = None) -> tuple[Ref, ...]:
        """Return what pieces left for an output, in input order."""
        states = self.chunks if chunks is None else self.chunks[chunks.start : chunks.stop]
        return tuple(
            ref
            for state in states
            for first in sorted(state.receipts)
            if (ref := state.receipts[first].results[output]) is not None
        )

    def files(self, output: int) -> list[SinkFile]:
        """Return the files that pieces staged for a sink, in input order."""
        return [file for _, receipt in self.receipts() for file in receipt.files if file.output == output]

    def kept(self, output: int) -> tuple[Ref, ...]:
        """Return where the records of an output are: of a collection, or of a keyed reduction."""
        if self.facts.kinds[output] == "collect":
            return self.results(output)
        roots = (self.root(output, bucket) for bucket in range(self.buckets(output)))
        return tuple(ref for ref in roots if ref is not None)

    def chunks_of(self, output: int) -> Iterator[Chunk]:
        """Yield the chunks of a stage that goes on from here: the same ones, or one for what each piece or bucket kept."""
        if output < 0:
            yield from (state.chunk for state in self.chunks)
            return
        for index, ref in enumerate(ref for ref in self.kept(output) if ref.size):
            path = ref.key or f"{self.facts.outputs[output]}[{index}]"
            part = Part(path, 0, None, ref.size, ref.digest, ref.inline)
            yield Chunk(index, chunk_id((part,)), (part,), ref.size)

    def buckets(self, output: int) -> int:
        """Return into how many buckets an output's partial results are split."""
        return self.facts.buckets[output] if self.facts.buckets else 1

    def root(self, output: int, bucket: int = 0) -> Ref | None:
        """Return the value of a reduction, or a keyed one's rows in a bucket; None before the last merge."""
        bucket = CUT if output in self.cuts else bucket
        return self.merged.get((output, bucket, self.depth(output, bucket), 0))

    def depth(self, output: int, bucket: int = 0) -> int:
        """Return the level of the root in a tree of merges, once all of its leaves are known."""
        leaves = len(self.leaves[output]) if bucket == CUT else len(self.chunks)
        level = 1
        while self.fan_in**level < leaves:
            level += 1
        return level

    def place_of(self, piece: Piece) -> str:
        """Name a piece for a person: its input, and where in it the piece begins."""
        parts = self.chunks[piece.chunk].chunk.parts
        part = parts[min(piece.start.part, len(parts) - 1)] if parts else None
        where = f"{part.path}" if part is not None else f"chunk {piece.chunk}"
        return f"{where}, from record {piece.first}" if piece.first else where

    @property
    def share(self) -> float:
        """Which part of the input, by weight, is done."""
        return self.ended / self.weight if self.weight else 1.0


@dataclass(slots=True)
class CallState:
    """A call or decision: what became of it."""

    facts: CallFacts
    results: tuple[Ref, ...] = ()
    choice: int | None = None
    failure: Failure | None = None
    decided: Decided | None = None
    grown: tuple[Address, ...] = ()
    cancelled: bool = False
    seconds: float = 0.0
    slot: str = ""
    started: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether it was made or decided, or has failed."""
        return bool(self.results or self.grown) or self.choice is not None or self.decided is not None or bool(self.failure)


@dataclass(slots=True)
class RunState:
    """A run, folded from its entries."""

    started: RunStarted | None = None
    owned: Owned | None = None
    stages: list[StageState] = field(default_factory=list)
    tasks: list[TaskFacts] = field(default_factory=list)
    calls: list[CallState] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    status: Status = "running"
    ended: RunEnded | None = None

    def apply(self, entry: Entry) -> None:
        """Take one more entry."""
        match entry:
            case RunStarted():
                self.started = entry
                self._add(GraphFacts(entry.stages, entry.tasks, entry.calls))
            case Owned():
                self.owned, self.status, self.ended = entry, "running", None
            case ChunksListed():
                stage = self.stages[entry.stage]
                base = stage.facts.base
                self._list(stage, entry, entry.chunks if base is None else self.stages[base[0]].chunks_of(base[1]))
            case PieceEnded():
                self._end_piece(self.stages[entry.stage], entry)
            case Merged():
                self.stages[entry.stage].merged[entry.output, entry.bucket, entry.level, entry.index] = entry.result
                self.stages[entry.stage].cancelled = False
            case BarrierOpened():
                self.stages[entry.stage].opened, self.stages[entry.stage].cancelled = True, False
            case Cut():
                self.stages[entry.stage].cuts[entry.output] = entry
                self.stages[entry.stage].leaves[entry.output] = self.stages[entry.stage].results(entry.output)
            case Redriven():
                self._redrive(entry)
            case Published():
                self.stages[entry.stage].published[entry.output] = entry.manifest
            case Called() | Grown():
                self._call(self.calls[entry.call], entry)
            case Decided():
                self._decide(entry)
            case RunEnded():
                self.status, self.ended = entry.status, entry

    def _add(self, graph: GraphFacts) -> None:
        fan_in = self.started.fan_in if self.started is not None else 16
        self.stages += [StageState(facts, fan_in) for facts in graph.stages]
        self.tasks += graph.tasks
        self.calls += [CallState(facts) for facts in graph.calls]

    def _redrive(self, entry: Redriven) -> None:
        """Forget what was made of the outputs at their deadline, and all that rests on it."""
        for number, output in entry.outputs:
            stage = self.stages[number]
            del stage.cuts[output], stage.leaves[output]
            stage.patient.add(output)
            stage.merged = {node: ref for node, ref in stage.merged.items() if node[:2] != (output, CUT)}
        gone = {*entry.outputs}
        for node in resting_on(self, gone):
            if node < 0:
                self.calls[~node] = CallState(self.calls[~node].facts)
            else:
                self.stages[node] = _anew(self.stages[node])

    def _call(self, call: CallState, entry: Called | Grown) -> None:
        call.seconds, call.slot, call.started, call.cancelled = entry.seconds, entry.slot, entry.started, False
        if isinstance(entry, Grown):
            self._add(entry.graph)
            self.codes.append(entry.code)
            call.grown, call.failure = entry.results, None
        else:
            call.results, call.choice, call.failure = entry.results, entry.choice, entry.failure

    def _decide(self, entry: Decided) -> None:
        self.calls[entry.call].decided = entry
        for node in entry.cancelled:
            if node < 0:
                self.calls[~node].cancelled = True
            else:
                self.stages[node].cancelled = True

    @staticmethod
    def _list(stage: StageState, entry: ChunksListed, chunks: Iterable[Chunk]) -> None:
        before = len(stage.chunks)
        for chunk in chunks:
            stage.pending[chunk.index, 0] = Piece(chunk.index)
            stage.chunks.append(ChunkState(chunk))
            stage.weight += chunk.weight
        stage.rejected.extend(entry.rejected)
        stage.listed += len(stage.chunks) - before + len(entry.rejected)
        stage.closed = entry.last

    @staticmethod
    def _end_piece(stage: StageState, entry: PieceEnded) -> None:
        piece, state = entry.piece, stage.chunks[entry.piece.chunk]
        stage.cancelled = False
        del stage.pending[piece.chunk, piece.first]
        for rest in entry.rest:
            stage.pending[rest.chunk, rest.first] = rest
        state.pending += len(entry.rest) - 1
        if not state.pending:
            stage.ended += state.chunk.weight
        if entry.receipt is not None:
            state.receipts[piece.first] = entry.receipt
            stage.tally += entry.receipt.tally
            for encoding, count in entry.receipt.encodings.items():
                stage.encodings[encoding] = stage.encodings.get(encoding, 0) + count
        if entry.failure is not None:
            stage.lost.append(entry.failure)

    @property
    def tally(self) -> Tally:
        """Counts over all stages, dead letters of every kind among the failed."""
        total = Tally()
        for stage in self.stages:
            total += Tally(stage.records, stage.failed, stage.tally.bytes, stage.tally.seconds)
        return total


def _anew(stage: StageState) -> StageState:
    """Return a stage of which nothing is done; what its own source listed stays listed."""
    fresh = StageState(stage.facts, stage.fan_in, patient={*range(len(stage.facts.kinds))}, redriven=True)
    if stage.facts.base is None and not stage.facts.expands:
        fresh.weight, fresh.listed, fresh.closed, fresh.rejected = stage.weight, stage.listed, stage.closed, stage.rejected
        fresh.chunks = [ChunkState(state.chunk) for state in stage.chunks]
        fresh.pending = {(index, 0): Piece(index) for index in range(len(stage.chunks))}
    return fresh


def resting_on(state: RunState, addresses: set[Address]) -> list[int]:
    """Return the nodes that rest, in any number of steps, on one of some addresses."""
    users: dict[Address, list[int]] = {}
    for number, stage in enumerate(state.stages):
        base = (stage.facts.base,) if stage.facts.base is not None else ()
        for node, item in (*stage.facts.needs, *base):
            users.setdefault((node, item if node >= 0 else 0), []).append(number)
    for number, call in enumerate(state.calls):
        for node, item in (*call.facts.needs, *call.facts.arms, *call.grown):
            users.setdefault((node, item if node >= 0 else 0), []).append(~number)
    found: dict[int, None] = {}
    stack = [*addresses]
    while stack:
        for node in users.get(stack.pop(), ()):
            if node not in found:
                found[node] = None
                outputs = range(-1, len(state.stages[node].facts.kinds)) if node >= 0 else range(1)
                stack += [(node, output) for output in outputs]
    return [*found]


def fold(entries: Iterable[Entry]) -> RunState:
    """Return the state that a sequence of entries leads to."""
    state = RunState()
    for entry in entries:
        state.apply(entry)
    return state

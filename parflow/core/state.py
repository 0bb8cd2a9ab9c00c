"""A stage and a call as a run's entries leave them, and how parts of a stage are made pending again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from parflow.core.entries import Accepted, BarrierOpened, ChunksListed, Cut, Decided, Merged, PieceEnded, Published, Redone
from parflow.model import (
    START,
    Address,
    CallFacts,
    Chunk,
    Counts,
    Failure,
    Part,
    Piece,
    Receipt,
    Ref,
    Rejected,
    SinkFile,
    StageFacts,
    Tally,
    chunk_id,
)

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
    steps: dict[str, Counts] = field(default_factory=dict)
    again: dict[tuple[int, int], str] = field(default_factory=dict)  # dead letters that were redriven, by chunk and ordinal
    accepted: int = 0
    owed: dict[str, None] = field(default_factory=dict)  # records that failed, for which something may be left to be undone
    merged: dict[tuple[int, int, int, int], Ref] = field(default_factory=dict)
    opened: bool = False
    cuts: dict[int, Cut] = field(default_factory=dict)
    leaves: dict[int, tuple[Ref, ...]] = field(default_factory=dict)
    patient: set[int] = field(default_factory=set)  # outputs whose deadline no longer holds
    redrives: int = 0
    cancelled: bool = False
    published: dict[int, dict[str, Any]] = field(default_factory=dict)
    placed: dict[int, dict[str, str]] = field(default_factory=dict)  # what stands published though its stage was redriven

    @property
    def redriven(self) -> bool:
        """Whether something of it was made before, and is made again."""
        return self.redrives > 0

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
        return self.closed and not self.pending and not self.owed

    def receipts(self) -> Iterable[tuple[int, Receipt]]:
        """Every committed receipt with its chunk's index, in input order."""
        for index, state in enumerate(self.chunks):
            for first in sorted(state.receipts):
                yield index, state.receipts[first]

    def stands(self, first: int, failure: Failure) -> bool:
        """Tell whether a dead letter still counts, of the piece that began at record ``first``: its record may run again.

        What a record left that ran again begins with itself.
        """
        return failure.ordinal == first or (failure.chunk, failure.ordinal) not in self.again

    def pieces(self) -> Iterator[tuple[int, Receipt]]:
        """Yield the first record of each committed piece, and its receipt, in input order."""
        for state in self.chunks:
            for first in sorted(state.receipts):
                yield first, state.receipts[first]

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
    def is_cut(self) -> bool:
        """Whether every output has opened at its deadline: nobody waits for the rest."""
        return len(self.cuts) == len(self.facts.kinds)

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


def list_chunks(stage: StageState, entry: ChunksListed, chunks: Iterable[Chunk]) -> None:
    """Take more of a stage's input."""
    before = len(stage.chunks)
    for chunk in chunks:
        stage.pending[chunk.index, 0] = Piece(chunk.index)
        stage.chunks.append(ChunkState(chunk))
        stage.weight += chunk.weight
    stage.rejected.extend(entry.rejected)
    stage.listed += len(stage.chunks) - before + len(entry.rejected)
    stage.closed = entry.last


def end_piece(stage: StageState, entry: PieceEnded) -> None:
    """Take what became of a piece."""
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
        _count(stage, entry.receipt)
    if entry.failure is not None:
        stage.lost.append(entry.failure)
        _count_step(stage, entry.failure.step, Counts(1, entry.failure.attempts - 1))
    if entry.undo:
        stage.owed[entry.undo] = None


def pass_barrier(stage: StageState, entry: Merged | BarrierOpened | Cut | Published | Accepted) -> None:
    """Take what becomes of a stage at its barriers."""
    match entry:
        case Merged():
            stage.merged[entry.output, entry.bucket, entry.level, entry.index] = entry.result
            stage.cancelled = False
        case BarrierOpened():
            stage.opened, stage.cancelled = True, False
        case Cut():
            stage.cuts[entry.output] = entry
            stage.leaves[entry.output] = stage.results(entry.output)
        case Published():
            stage.published[entry.output] = entry.manifest
        case Accepted():
            stage.accepted = entry.failed


def _count(stage: StageState, receipt: Receipt) -> None:
    stage.tally += receipt.tally
    for encoding, count in receipt.encodings.items():
        stage.encodings[encoding] = stage.encodings.get(encoding, 0) + count
    for step, counts in receipt.steps.items():
        _count_step(stage, step, counts)


def _count_step(stage: StageState, step: str, counts: Counts) -> None:
    stage.steps[step] = stage.steps.get(step, Counts()) + counts


def redo(stage: StageState, part: Redone) -> None:
    """Make a part of a chunk pending again; what was made of the rest stands, the merges that it went into don't."""
    chunk, state = part.chunk, stage.chunks[part.chunk]
    for output, manifest in stage.published.items():
        names = (file["path"] for file in manifest["files"])
        stage.placed[output] = {file.path: name for file, name in zip(stage.files(output), names, strict=False)}
    if part.record is not None:
        ordinal = part.record.ordinal
        if any(failure.chunk == chunk and failure.ordinal == ordinal for failure in stage.lost):
            stage.lost = [f for f in stage.lost if (f.chunk, f.ordinal) != (chunk, ordinal)]
        else:
            stage.again[chunk, ordinal] = part.step
        piece = Piece(chunk, part.record, 0, ordinal + 1)
    elif part.first >= 0:
        stop = part.first + state.receipts[part.first].tally.records
        state.receipts = {first: r for first, r in state.receipts.items() if not part.first <= first < stop}
        alone = (chunk, part.first) in stage.again  # it had run again before: what it left then is superseded still
        _forget(stage, chunk, range(part.first + alone, stop))
        piece = Piece(chunk, START, part.first, stop)
    else:
        state.receipts = {}
        stage.lost = [failure for failure in stage.lost if failure.chunk != chunk]
        _forget(stage, chunk, None)
        piece = Piece(chunk)
    stage.pending[chunk, piece.first] = piece
    stage.merged = {
        (output, bucket, level, index): ref
        for (output, bucket, level, index), ref in stage.merged.items()
        if bucket == CUT or index != chunk // stage.fan_in**level
    }
    stage.opened, stage.published, stage.accepted = False, {}, 0


def _forget(stage: StageState, chunk: int, ordinals: range | None) -> None:
    """Forget what was redriven record by record, and what is pending, of a part of a chunk that is made again as a whole."""

    def within(key: tuple[int, int]) -> bool:
        return key[0] == chunk and (ordinals is None or key[1] in ordinals)

    stage.again = {key: step for key, step in stage.again.items() if not within(key)}
    stage.pending = {key: piece for key, piece in stage.pending.items() if not within(key)}


def recount(stage: StageState) -> None:
    """Count a stage anew, once some of it was forgotten."""
    stage.tally, stage.encodings, stage.steps = Tally(), {}, {}
    for _, receipt in stage.receipts():
        _count(stage, receipt)
    for failure in stage.lost:
        _count_step(stage, failure.step, Counts(1, failure.attempts - 1))
    for step in stage.again.values():
        stage.tally -= Tally(1, 1)
        _count_step(stage, step, Counts(-1))
    pending = Counter(chunk for chunk, _ in stage.pending)
    for index, state in enumerate(stage.chunks):
        state.pending = pending[index]
    stage.ended = sum(state.chunk.weight for state in stage.chunks if not state.pending)


def anew(stage: StageState) -> StageState:
    """Return a stage of which nothing is done; what its own source listed stays listed."""
    fresh = StageState(stage.facts, stage.fan_in, patient={*range(len(stage.facts.kinds))}, redrives=stage.redrives + 1)
    if stage.facts.base is None and not stage.facts.expands:
        fresh.weight, fresh.listed, fresh.closed, fresh.rejected = stage.weight, stage.listed, stage.closed, stage.rejected
        fresh.chunks = [ChunkState(state.chunk) for state in stage.chunks]
        fresh.pending = {(index, 0): Piece(index) for index in range(len(stage.chunks))}
    return fresh

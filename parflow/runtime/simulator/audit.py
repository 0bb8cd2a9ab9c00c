"""The rules that hold at every step of every run, whatever goes wrong."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from parflow.core.coordinator import Coordinator
from parflow.core.history import (
    BarrierOpened,
    ChunksListed,
    Entry,
    Merged,
    PieceEnded,
    Published,
    RunEnded,
    RunState,
    decode,
    encode,
)
from parflow.core.policies import Tolerance
from parflow.core.signals import (
    Append,
    BatchLost,
    BatchReturned,
    Broke,
    Durable,
    Finish,
    Instruction,
    Publish,
    SlotsChanged,
    Stimulus,
    StopRequested,
    Submit,
    Yield,
)
from parflow.model import ChunkJob, Cursor, MergeJob, Piece, Receipt
from parflow.runtime.simulator.world import CAUSES, VirtualRecord, World


def must(condition: object, rule: str, *what: object) -> None:
    """Raise an AssertionError that states the rule when it is broken."""
    if not condition:
        raise AssertionError(f"{rule}: {', '.join(map(repr, what))}")


class Audit:
    """The rules, kept from outside: own books, made of entries, instructions and stimuli alone.

    Parameters
    ----------
    world : World
        What there is to do.
    entries : iterable of Entry
        What was durable when the coordinator began.
    """

    def __init__(self, world: World, entries: Iterable[Entry]) -> None:
        self.world = world
        self.chunks = [stage.chunks for stage in world.stages]
        self.state = RunState()
        self.ended: dict[tuple[int, int, int], bool] = {}  # a record: whether it is a dead letter
        self.tickets: dict[tuple[int | str, ...], int] = {}  # of each stage, chunk, node and barrier, the last entry's
        self.unsent: dict[tuple[int, int], int] = {}  # fresh chunks and their weights
        self.open: dict[str, Submit] = {}
        self.flying: Counter[tuple[object, ...]] = Counter()
        self.slots = self.ticket = self.durable = 0
        self.stopped = self.abandoned = False
        for entry in entries:
            self._take(entry)

    def hear(self, stimulus: Stimulus) -> None:
        """Note what the coordinator is told."""
        match stimulus:
            case SlotsChanged(slots):
                self.slots = slots
            case BatchReturned(attempt) | BatchLost(attempt):
                if submit := self.open.pop(attempt, None):
                    self.flying.subtract(map(_identity, submit.jobs))
            case Durable(count):
                self.durable = count
            case StopRequested(now):
                self.stopped, self.abandoned = True, self.abandoned or now
            case Broke():
                self.stopped = True

    def see(self, instruction: Instruction) -> None:
        """Hold an instruction against the rules."""
        must(self.state.ended is None or isinstance(instruction, Finish), "nothing is asked after the end", instruction)
        match instruction:
            case Append(entry, ticket):
                must(ticket == self.ticket + 1, "tickets count up", ticket)
                must(decode(*encode(entry)) == entry, "an entry survives its JSON form", entry)
                self.ticket = ticket
                self._take(decode(*encode(entry)))
            case Submit():
                self._submit(instruction)
            case Yield(attempts):
                must(set(attempts) <= set(self.open), "only batches in flight are asked to yield", attempts)
            case Publish(stage, output):
                must(self._settled(("barrier", stage)), "nothing is published before its barrier is durable", stage, output)
            case Finish(ended):
                must(self.state.ended == ended and self.durable == self.ticket, "the end is durable first", ended)

    def check(self, coordinator: Coordinator) -> None:
        """Compare the coordinator with the fold of its entries, and see that a finished one asks for nothing."""
        must(self.state == coordinator.state, "the state is the fold of the entries")
        if coordinator.finished:
            late: list[Stimulus] = [BatchLost(attempt, "") for attempt in self.open]
            late += [SlotsChanged(9), Durable(self.ticket), StopRequested(now=True)]
            must(not any(coordinator.handle(stimulus) for stimulus in late), "nothing is asked after the end")

    def _settled(self, *keys: tuple[int | str, ...]) -> bool:
        return all(self.tickets.get(key, sys.maxsize) <= self.durable for key in keys)

    def _take(self, entry: Entry) -> None:
        match entry:
            case PieceEnded(stage, piece):
                self._piece(entry)
                self.tickets["chunk", stage, piece.chunk] = self.tickets["stage", stage] = self.ticket
                self.unsent.pop((stage, piece.chunk), None)
            case ChunksListed(stage):
                must(not self.state.stages[stage].closed, "a closed list stays closed", stage)
                self.tickets["stage", stage] = self.ticket
                self.unsent.update({(stage, chunk.index): chunk.weight for chunk in entry.chunks})
            case Merged(stage, output, level, index):
                must((output, 0, level, index) not in self.state.stages[stage].merged, "a node is merged once", entry)
                self.tickets["node", stage, output, level, index] = self.ticket
            case BarrierOpened(stage):
                self._barrier(entry)
                self.tickets["barrier", stage] = self.ticket
            case Published(stage, output):
                must(output not in self.state.stages[stage].published, "a sink is published once", entry)
            case RunEnded(status):
                must(self.abandoned or not self.open, "a run ends with nothing in flight", *self.open)
                done = all(stage.opened for stage in self.state.stages)
                must(done or status != "succeeded", "a run succeeds when all barriers are open")
        self.state.apply(entry)

    def _piece(self, entry: PieceEnded) -> None:
        """Every record of a piece is committed, a dead letter, or in one piece of the rest: exactly one of these."""
        stage, piece, receipt, failure = entry.stage, entry.piece, entry.receipt, entry.failure
        records = self.chunks[stage][piece.chunk]
        must(self.state.stages[stage].pending.get((piece.chunk, piece.first)) == piece, "only a pending piece ends", entry)
        span = span_of(piece, records)
        must(not piece.alone or len(span) == 1, "a suspect is one record", entry)
        stop = span.start if receipt is None else span.stop if receipt.status == "done" else _cursor(receipt).ordinal
        ended = {ordinal: records[ordinal].fate in CAUSES for ordinal in range(span.start, stop)}
        if failure is not None:
            must(CAUSES.get(records[failure.ordinal].fate) == failure.cause, "only the guilty are condemned", failure)
            must(piece.alone or failure.cause == "timeout", "a crash is condemned only when it was alone", entry)
            ended[failure.ordinal] = True
        parts = sorted([*ended, *(ordinal for rest in entry.rest for ordinal in span_of(rest, records))])
        must(parts == list(span), "a piece's records end once or are in the rest once", entry)
        taken = [r for r in entry.rest if r.first != piece.first and (r.chunk, r.first) in self.state.stages[stage].pending]
        must(not taken, "pending pieces do not overlap", entry)
        keys = {(stage, piece.chunk, ordinal): dead for ordinal, dead in ended.items()}
        must(not keys.keys() & self.ended.keys(), "a record ends once", entry)
        self.ended.update(keys)

    def _barrier(self, entry: BarrierOpened) -> None:
        number, stage, owned = entry.stage, self.state.stages[entry.stage], self.state.owned
        records = {(number, c, o) for c, chunk in enumerate(self.chunks[number]) for o in range(len(chunk))}
        must(stage.closed and records <= self.ended.keys(), "a barrier opens when every record has ended", entry)
        must(not stage.opened and self._settled(("stage", number)), "a barrier opens once, on durable entries", entry)
        rejected = self.world.stages[number].inputs.count(None)
        failed = rejected + sum(self.ended[record] for record in records)
        accepted = owned is not None and Tolerance(owned.max_failures).accepts(failed, len(records) + rejected)
        must(accepted and failed == entry.failed, "a barrier opens over tolerated failures only", entry)

    def _submit(self, submit: Submit) -> None:
        must(not self.stopped, "nothing begins once the run is to stop", submit)
        must(submit.attempt not in self.open and submit.jobs, "an attempt is new and has something to do", submit)
        self.open[submit.attempt] = submit
        must(len(self.open) <= self.world.window * self.slots, "the window is kept", submit)
        self.flying.update(map(_identity, submit.jobs))
        must(max(self.flying.values()) == 1, "a job is in flight once", submit)
        for job in submit.jobs:
            must(job.stage == submit.unit, "a batch is of one stage", submit)
            if isinstance(job, MergeJob):
                self._merge(job)
                continue
            piece, stage = job.piece, self.state.stages[job.stage]
            must(stage.pending.get((piece.chunk, piece.first)) == piece, "only what is pending is run", job)
            must(not piece.alone or len(submit.jobs) == 1, "a suspect travels alone", submit)
            largest = max(self.unsent.values(), default=0)
            if weight := self.unsent.pop((job.stage, piece.chunk), None):
                must(weight == largest, "the largest chunk is begun first", job)

    def _merge(self, job: MergeJob) -> None:
        stage, fan_in, first = self.state.stages[job.stage], self.world.fan_in, job.index * self.world.fan_in
        width = -(-len(stage.chunks) // fan_in ** (job.level - 1))
        must(stage.closed or first + fan_in <= width, "a merge covers what is listed", job)
        children = range(first, min(first + fan_in, width))
        below: list[tuple[int | str, ...]] = [("node", job.stage, job.output, job.level - 1, c) for c in children]
        if job.level == 1:
            must(all(not stage.chunks[c].pending for c in children), "a merge follows its chunks", job)
            below = [("chunk", job.stage, c) for c in children]
        must(self._settled(*below), "a merge rests on durable entries", job)
        must(not job.last or self._settled(("barrier", job.stage)), "the last merge follows the durable barrier", job)


def _identity(job: ChunkJob | MergeJob) -> tuple[object, ...]:
    """Name what a job does."""
    if isinstance(job, ChunkJob):
        return job.stage, job.piece.chunk, job.piece.first
    return job.stage, job.output, job.level, job.index, "merge"


def span_of(piece: Piece, records: Sequence[VirtualRecord]) -> range:
    """Return the ordinals of a piece's records."""
    return range(piece.first, max(piece.first, len(records) if piece.stop is None else piece.stop))


def _cursor(receipt: Receipt) -> Cursor:
    if receipt.cursor is None:
        raise AssertionError(f"a receipt that is not 'done' has a cursor: {receipt}")
    return receipt.cursor

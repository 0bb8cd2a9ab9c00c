"""The rules that hold at every step of every run, whatever goes wrong."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping

from parflow.core.coordinator import Coordinator
from parflow.core.entries import (
    BarrierOpened,
    Called,
    ChunksListed,
    Decided,
    Entry,
    Grown,
    Merged,
    Owned,
    PieceEnded,
    Published,
    RunEnded,
    Undone,
    decode,
    encode,
)
from parflow.core.history import RunState
from parflow.core.lanes import lane_of
from parflow.core.rules import FREE
from parflow.core.signals import (
    Append,
    BatchLost,
    BatchReturned,
    Broke,
    Cancel,
    Durable,
    Finish,
    Instruction,
    List,
    Publish,
    SlotsChanged,
    Stimulus,
    StopRequested,
    Submit,
    Yield,
)
from parflow.model import CallJob, ChunkJob, Cursor, Job, MergeJob, Piece, Receipt, UndoJob, record_key
from parflow.policies import Tolerance
from parflow.runtime.simulator.branches import Branches
from parflow.runtime.simulator.rules import must, span_of
from parflow.runtime.simulator.truth import Cast, Named
from parflow.runtime.simulator.wants import Key, Wants
from parflow.runtime.simulator.workers import Store
from parflow.runtime.simulator.world import CAUSES, World

Found = Mapping[tuple[int, Piece], Receipt]


class Audit:
    """The rules, kept from outside: own books, made of entries, instructions and stimuli alone.

    Parameters
    ----------
    world : World
        What there is to do.
    entries : iterable of Entry
        What was durable when the coordinator began.
    read : callable
        Opens a result.
    found : mapping
        The results in the store that the coordinator was told of.
    """

    def __init__(self, world: World, entries: Iterable[Entry], store: Store, found: Found) -> None:
        self.world, self.found, self.store = world, found, store
        self.cast = Cast(world, store.read)
        self.state = RunState()
        self.wants = Wants(self.state, self._settled)
        self.branches = Branches(world, self.state, self.wants, self.cast)
        self.ended: dict[tuple[int, int, int], bool] = {}  # a record: whether it is a dead letter
        self.tickets: dict[Key, int] = {}  # of each stage, chunk, node, barrier and call, the last entry's
        self.unsent: dict[tuple[int, int], int] = {}  # fresh chunks and their weights
        self.count, self.dead = Counter[int](), Counter[int]()  # of each stage's ended records
        self.open: dict[str, Submit] = {}
        self.flying: Counter[tuple[object, ...]] = Counter()
        self.back: dict[tuple[object, ...], tuple[Job, Receipt]] = {}  # what has just come back
        self.listing: set[int] = set()
        self.slots = self.ticket = self.durable = 0
        self.stopped = self.abandoned = self.live = False
        for entry in entries:
            self._take(entry)
        self.live = True
        self.branches.begin()

    def hear(self, stimulus: Stimulus) -> None:
        """Note what the coordinator is told."""
        self.back.clear()
        match stimulus:
            case SlotsChanged(slots):
                self.slots = slots
            case BatchReturned(attempt) | BatchLost(attempt):
                if submit := self.open.pop(attempt, None):
                    self.flying.subtract(map(_identity, submit.jobs))
                    if isinstance(stimulus, BatchReturned):
                        pairs = zip(submit.jobs, stimulus.receipts, strict=True)
                        self.back = {_identity(job): (job, receipt) for job, receipt in pairs if receipt is not None}
                        self.branches.suspect(self.back.values())
            case Durable(count):
                self.durable = count
                self.branches.look()
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
            case Cancel(attempts):
                must(set(attempts) <= set(self.open), "only batches in flight are cancelled", attempts)
                cancelled = [self.open.pop(attempt) for attempt in attempts]
                for submit in cancelled:
                    self.flying.subtract(map(_identity, submit.jobs))
                self.branches.cancelled += cancelled
            case List(stage, skip):
                must(skip == self.state.stages[stage].listed, "listing goes on where it stood", instruction)
                must(stage not in self.listing, "a stage is listed once", instruction)
                self.listing.add(stage)
                self._may_begin(stage, instruction)
            case Publish(stage, output):
                must(self._settled(("barrier", stage)), "nothing is published before its barrier is durable", stage, output)
                must(stage in self.branches.wanted, "nothing is done that nobody wants", instruction)
            case Finish(ended):
                must(self.state.ended == ended and self.durable == self.ticket, "the end is durable first", ended)

    def check(self, coordinator: Coordinator) -> None:
        """Compare the coordinator with the fold of its entries, and see that a finished one asks for nothing."""
        must(self.state == coordinator.state, "the state is the fold of the entries")
        quiet = self.durable == self.ticket
        self.branches.check(self.open.values(), ending=coordinator.ending is not None, quiet=quiet)
        if coordinator.finished:
            late: list[Stimulus] = [BatchLost(attempt, "") for attempt in self.open]
            late += [SlotsChanged(9), Durable(self.ticket), StopRequested(now=True)]
            must(not any(coordinator.handle(stimulus) for stimulus in late), "nothing is asked after the end")

    def _settled(self, *keys: Key) -> bool:
        return all(self.tickets.get(key, sys.maxsize) <= self.durable for key in keys)

    # --- entries ----------------------------------------------------------------------------------------------------------

    def _take(self, entry: Entry) -> None:
        before = len(self.state.stages[entry.stage].chunks) if isinstance(entry, ChunksListed) else 0
        match entry:
            case PieceEnded(stage, piece):
                self._piece(entry)
                self.tickets["chunk", stage, piece.chunk] = self.tickets["stage", stage] = self.ticket
                self.unsent.pop((stage, piece.chunk), None)
            case ChunksListed(stage):
                self._listed(entry)
                self.tickets["list", stage] = self.tickets["stage", stage] = self.ticket
            case Merged(stage, output, level, index, bucket=bucket):
                node = (output, bucket, level, index)
                must(node not in self.state.stages[stage].merged, "a node is merged once", entry)
                receipt = self._came_back((stage, *node, "merge"), entry)
                must(receipt is None or receipt.results == (entry.result,), "what is written down came back", entry)
                self.tickets["node", stage, output, bucket, level, index] = self.ticket
            case BarrierOpened(stage):
                self._barrier(entry)
                self.tickets["barrier", stage] = self.ticket
            case Undone(unit, key):
                must(key in self.state.stages[unit].owed, "what is owed is undone", entry)
            case Published(stage, output):
                must(output not in self.state.stages[stage].published, "a sink is published once", entry)
                self.tickets["published", stage, output] = self.ticket
            case Called(call) | Grown(call):
                receipt = self._came_back((~call, "call"), entry)
                self.branches.called(entry, receipt, alone=receipt is not None and self.back[~call, "call"][0].alone)
                self.tickets["call", call] = self.ticket
            case Decided(call):
                self.branches.decided(entry, live=self.live)
                self.tickets["call", call] = self.ticket
            case Owned():
                self.branches.failed.clear()
            case RunEnded():
                self._run_ended(entry)
        self.state.apply(entry)
        if isinstance(entry, ChunksListed):
            chunks = self.state.stages[entry.stage].chunks[before:]
            self.unsent.update({(entry.stage, state.chunk.index): state.chunk.weight for state in chunks})
        if isinstance(entry, Grown):
            self.branches.grown(entry)

    def _came_back(self, key: tuple[object, ...], entry: Entry) -> Receipt | None:
        """Return the receipt that an entry rests on; None for what was written before."""
        if not self.live:
            return None
        must(key in self.back, "what is written down came back, and was not cancelled", entry)
        return self.back[key][1]

    def _listed(self, entry: ChunksListed) -> None:
        stage = self.state.stages[entry.stage]
        must(not stage.closed, "a closed list stays closed", entry)
        must(stage.facts.base is None or not entry.chunks, "what another stage knows is not listed again", entry)
        if self.live and stage.facts.base is not None:
            self._may_begin(entry.stage, entry)
        indexes = [chunk.index for chunk in entry.chunks]
        must(indexes == [*range(len(stage.chunks), len(stage.chunks) + len(indexes))], "a chunk is listed once", entry)

    def _may_begin(self, number: int, what: object) -> None:
        """See that a stage has all that it waits for."""
        facts = self.state.stages[number].facts
        must(number in self.branches.wanted, "nothing is done that nobody wants", what)
        must(self.wants.there(facts.needs), "a stage begins when all that it needs is durable", what)
        must(facts.base is None or self.wants.there([facts.base]), "a stage goes on from what is durable", what)

    def _run_ended(self, entry: RunEnded) -> None:
        must(not self.live or self.abandoned or not self.open, "a run ends with nothing in flight", *self.open)
        there = self.wants.there(self.wants.targets)
        must(there or entry.status != "succeeded", "a run succeeds when all that it is for is there", entry)
        lost = entry.error == "CallFailedError"
        must(not lost or self.branches.truth.lost, "a run fails only when what it is for can't be had", entry)

    def _records(self, number: int, chunk: int) -> list[Named]:
        return self.cast.records(number, self.state.stages[number].chunks[chunk].chunk)

    def _piece(self, entry: PieceEnded) -> None:
        """Every record of a piece is committed, a dead letter, or in one piece of the rest: exactly one of these."""
        stage, piece, receipt, failure = entry.stage, entry.piece, entry.receipt, entry.failure
        fates = [record.fate for _, record in self._records(stage, piece.chunk)]
        must(self.state.stages[stage].pending.get((piece.chunk, piece.first)) == piece, "only a pending piece ends", entry)
        span = span_of(piece, fates)
        must(not piece.alone or len(span) == 1, "a suspect is one record", entry)
        if (receipt is None or self.found.get((stage, piece)) != receipt) and self.live:
            came = self._came_back((stage, piece.chunk, piece.first), entry)
            must(receipt is None or came == receipt, "what is written down came back", entry)
        stop = span.start if receipt is None else span.stop if receipt.status == "done" else _cursor(receipt).ordinal
        ended = {ordinal: fates[ordinal] in CAUSES for ordinal in range(span.start, stop)}
        if failure is not None:
            must(CAUSES.get(fates[failure.ordinal]) == failure.cause, "only the guilty are condemned", failure)
            must(piece.alone or failure.cause == "timeout", "a crash is condemned only when it was alone", entry)
            ended[failure.ordinal] = True
        parts = sorted([*ended, *(ordinal for rest in entry.rest for ordinal in span_of(rest, fates))])
        must(parts == list(span), "a piece's records end once or are in the rest once", entry)
        taken = [r for r in entry.rest if r.first != piece.first and (r.chunk, r.first) in self.state.stages[stage].pending]
        must(not taken, "pending pieces do not overlap", entry)
        keys = {(stage, piece.chunk, ordinal): dead for ordinal, dead in ended.items()}
        must(not keys.keys() & self.ended.keys(), "a record ends once", entry)
        self.ended.update(keys)
        self.count[stage] += len(keys)
        self.dead[stage] += sum(keys.values())
        if self._tolerance.hopeless(self.dead[stage], self.count[stage]):
            self.branches.failed.add(stage)

    @property
    def _tolerance(self) -> Tolerance:
        owned = self.state.owned
        return Tolerance(owned.max_failures if owned is not None else 0)

    def _barrier(self, entry: BarrierOpened) -> None:
        number, stage = entry.stage, self.state.stages[entry.stage]
        records = {(number, c, o) for c in range(len(stage.chunks)) for o in range(len(self._records(number, c)))}
        virtual = self.cast.stages[number].node
        must(stage.facts.base is not None or len(stage.chunks) == len(virtual.chunks), "all chunks are listed", entry)
        must(stage.closed and records <= self.ended.keys(), "a barrier opens when every record has ended", entry)
        must(not stage.opened and self._settled(("stage", number)), "a barrier opens once, on durable entries", entry)
        must(not self.live or number in self.branches.wanted, "nothing is done that nobody wants", entry)
        rejected = virtual.inputs.count(None)
        failed = rejected + sum(self.ended[record] for record in records)
        if self.live and self.world.rules.compensates and not self.state.stuck:
            for record in records:
                self._effect(record, entry)
        accepted = self._tolerance.accepts(failed, len(records) + rejected)
        must(accepted and failed == entry.failed, "a barrier opens over tolerated failures only", entry)

    def _effect(self, record: tuple[int, int, int], entry: BarrierOpened) -> None:
        """See that what was done for a record stands once, or was undone once."""
        number, chunk, ordinal = record
        key = record_key(number, self.state.stages[number].chunks[chunk].chunk, Cursor(ordinal, 0, ordinal))
        wanted = ["done", "undone"] if self.ended[record] else ["done"]
        found = self.store.effects.get(key)
        must(found == wanted, "what stands is what succeeded, once", entry, record, found)

    # --- jobs -------------------------------------------------------------------------------------------------------------

    def _submit(self, submit: Submit) -> None:
        must(not self.stopped, "nothing begins once the run is to stop", submit)
        must(submit.attempt not in self.open and submit.jobs, "an attempt is new and has something to do", submit)
        self.open[submit.attempt] = submit
        must(len(self.open) <= self.world.window * self.slots, "the window is kept", submit)
        self._policies(submit)
        self.flying.update(map(_identity, submit.jobs))
        must(max(self.flying.values()) == 1, "a job is in flight once", submit)
        for job in submit.jobs:
            undoes = isinstance(job, UndoJob)
            must(undoes or job.node in self.branches.wanted, "nothing runs that nobody wants", job)
            must(undoes or job.node not in self.branches.failed, "nothing runs for who has failed", job)
            must(not job.alone or len(submit.jobs) == 1, "a suspect travels alone", submit)
            must(lane_of(job) == lane_of(submit.jobs[0]), "a batch is of one stage or task", submit)
            must(lane_of(job)[0] == submit.unit, "a batch says whose it is", submit)
            if isinstance(job, CallJob):
                self.branches.may_call(job)
            elif isinstance(job, MergeJob):
                self._merge(job)
            elif isinstance(job, ChunkJob):
                self._chunk(job)

    def _policies(self, submit: Submit) -> None:
        lane = lane_of(submit.jobs[0])
        rules = FREE if lane[1] else self.world.rules_of(submit.unit)
        flying = [other for other in self.open.values() if lane_of(other.jobs[0]) == lane]
        must(rules.limit is None or len(flying) <= rules.limit, "a limit is kept", submit)
        work = [other for other in self.open.values() if other.unit >= 0 and not lane_of(other.jobs[0])[1]]
        must(not rules.rated or sum(other.share for other in work) <= 1 + 1e-6, "a rate is shared out once", submit)
        stands = self.state.breakers.get((submit.unit, "read"), "closed") if rules.breakers else "closed"
        must(stands != "open", "nothing runs of a step whose breaker is open", submit)
        must(submit.probe == (stands == "probing"), "a breaker that probes lets one batch through", submit)
        must(sum(other.probe for other in flying) <= 1, "one batch proves a breaker at a time", submit)

    def _chunk(self, job: ChunkJob) -> None:
        piece, stage = job.piece, self.state.stages[job.stage]
        must(stage.pending.get((piece.chunk, piece.first)) == piece, "only what is pending is run", job)
        must(stage.chunks[piece.chunk].chunk == job.chunk, "a job has its chunk", job)
        must(self.wants.there(stage.facts.needs), "a stage runs on what is durable", job)
        must(job.stage in self.listing or stage.closed, "a stage is listed before it runs", job)
        wanted = self.branches.wanted - self.branches.failed
        largest = max((weight for (number, _), weight in self.unsent.items() if number in wanted), default=0)
        if weight := self.unsent.pop((job.stage, piece.chunk), None):
            must(weight == largest or self.world.rules is not FREE, "the largest chunk is begun first", job)

    def _merge(self, job: MergeJob) -> None:
        stage, fan_in, first = self.state.stages[job.stage], self.world.fan_in, job.index * self.world.fan_in
        width = -(-len(stage.chunks) // fan_in ** (job.level - 1))
        must(stage.closed or first + fan_in <= width, "a merge covers what is listed", job)
        must(job.bucket < stage.buckets(job.output), "a merge is of one bucket", job)
        children = range(first, min(first + fan_in, width))
        if job.level == 1:
            must(all(not stage.chunks[c].pending for c in children), "a merge follows its chunks", job)
            below: list[Key] = [("chunk", job.stage, c) for c in children]
            inputs = stage.results(job.output, children)
        else:
            places = [(job.output, job.bucket, job.level - 1, c) for c in children]
            must(all(place in stage.merged for place in places), "a merge follows its children", job)
            below = [("node", job.stage, *place) for place in places]
            inputs = tuple(stage.merged[place] for place in places)
        must(job.inputs == inputs, "a merge takes all that it covers, in order", job)
        must(self._settled(*below), "a merge rests on durable entries", job)
        must(not job.last or self._settled(("barrier", job.stage)), "the last merge follows the durable barrier", job)
        must(job.last == (stage.closed and len(stage.chunks) <= fan_in**job.level), "the last merge is the root", job)


def _identity(job: Job) -> tuple[object, ...]:
    """Name what a job does."""
    if isinstance(job, ChunkJob):
        return job.stage, job.piece.chunk, job.piece.first
    if isinstance(job, CallJob):
        return job.node, "call"
    if isinstance(job, UndoJob):
        return (job.unit, *job.records, *job.effects, "undo")
    return job.stage, job.output, job.bucket, job.level, job.index, "merge"


def _cursor(receipt: Receipt) -> Cursor:
    if receipt.cursor is None:
        raise AssertionError(f"a receipt that is not 'done' has a cursor: {receipt}")
    return receipt.cursor

"""The run's state machine: stimuli in, instructions out. No thread, clock, file or Dask in it.

The executor (and the simulator, with the same code) tells the coordinator what happened and carries out what it asks for,
in order. Each decision that must outlive the process is an entry: it is applied to the state here and handed out as an
`Append`. What can't be taken back (a merge, a barrier, publishing, the end) waits until the executor has said that the entries
it rests on are durable; more work of the same kind need not, since the journal is durable in the order of its entries.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from parflow.core.history import (
    BarrierOpened,
    ChunksListed,
    Entry,
    Merged,
    Owned,
    PieceEnded,
    Published,
    RunEnded,
    RunStarted,
    RunState,
    StageState,
)
from parflow.core.policies import Batching, Tolerance
from parflow.model import ChunkJob, Cursor, Failure, Job, MergeJob, Piece, Receipt

MAX_LOSSES = 4
"""How often a job's worker may vanish, or the job come back untouched, before the run is ended (infrastructure's fault)."""


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
class Broke:
    """Something outside a record's reach failed for good: listing, publishing, the cluster."""

    error: str
    arguments: tuple[str | float, ...]


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the run to stop: chunks in flight yield, or (``now``) are abandoned."""

    now: bool = False


Stimulus = SlotsChanged | Listed | BatchReturned | BatchLost | Durable | SinkPublished | Broke | StopRequested


# --- instructions: what the coordinator asks for ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class List:
    """List a stage's input, passing over the first ``skip`` items, which are known."""

    stage: int
    skip: int


@dataclass(frozen=True, slots=True)
class Append:
    """Write an entry to the journal; it is number ``ticket`` of this coordinator."""

    entry: Entry
    ticket: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Run a batch of jobs of one stage. Batches begin in the order in which they are asked for."""

    attempt: str
    stage: int
    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Yield:
    """Ask these batches to come back at their next record."""

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


Instruction = List | Append | Submit | Yield | Publish | Finish


class Coordinator:
    """Drives one run from its folded state to an end.

    Parameters
    ----------
    run_id : str
        The run's name, for messages.
    state : RunState
        Folded from the journal; has at least `RunStarted` and `Owned`.
    window : int
        Batches in flight for each slot.

    Examples
    --------
    >>> from parflow.core.history import Owned, RunStarted, StageFacts, fold
    >>> facts = StageFacts("read", ("read",), ("count",), ("reduce",))
    >>> state = fold([RunStarted("f", "", (facts,), 16), Owned(1, "me", 0)])
    >>> Coordinator("r", state).start()
    [List(stage=0, skip=0)]
    """

    def __init__(self, run_id: str, state: RunState, *, window: int = 2) -> None:
        if state.started is None or state.owned is None:
            raise ValueError("the state has no RunStarted and Owned entries")
        self.run_id = run_id
        self.state = state
        self.fan_in = state.started.fan_in
        self.epoch = state.owned.epoch
        self.tolerance = Tolerance(state.owned.max_failures)
        self.window = window
        self.slots = 0
        self.inflight: dict[str, Submit] = {}
        self.ending: RunEnded | None = None
        self.finished = False
        self._queue: list[tuple[int, int, int, int, int, int, Job]] = []
        self._pushed = 0
        self._out: list[Instruction] = []
        self._tickets = 0
        self._durable = 0
        self._last = [0] * len(state.stages)  # each stage's last ticket
        self._settling: deque[tuple[int, int, int, int, int]] = deque()
        self._losses: dict[Job, int] = {}
        self._batching = [Batching() for _ in state.stages]
        self._ready: dict[tuple[int, int, int, int], int] = {}
        self._asked: set[tuple[int, int, int, int]] = set()
        self._attempts = 0
        self._adopted: dict[tuple[int, Piece], Receipt] = {}

    # --- the two doors -----------------------------------------------------------------------------------------------

    def start(self, adopted: Iterable[tuple[int, Piece, Receipt]] = ()) -> list[Instruction]:
        """Begin, or go on where the state stands.

        ``adopted`` are results found in the store, for which the journal has no entry: they count as if just returned.
        """
        for number, piece, receipt in adopted:
            if piece.chunk < len(self.state.stages[number].chunks):
                self._adopted[number, piece] = receipt
        for number, stage in enumerate(self.state.stages):
            self._asked.update((number, *node) for node in stage.merged)
            if not stage.closed:
                self._out.append(List(number, stage.listed))
            for index, chunk in enumerate(stage.chunks):
                if not chunk.pending:
                    self._node_ready(number, 0, index)
            for output, level, index in stage.merged:
                self._node_ready(number, level, index, output)
            for piece in tuple(stage.pending.values()):
                self._enqueue(number, piece, fresh=not stage.chunks[piece.chunk].receipts)
        return self._settle()

    def handle(self, stimulus: Stimulus) -> list[Instruction]:
        """Take one fact and return what to do about it, in order."""
        if self.finished:
            return []
        match stimulus:
            case SlotsChanged(slots):
                self.slots = slots
            case Listed(entry):
                self._take_listing(entry)
            case BatchReturned(attempt, receipts):
                self._batch_back(attempt, receipts)
            case BatchLost(attempt, reason):
                batch = self.inflight.pop(attempt, None)
                for job in batch.jobs if batch else ():
                    self._lose(job, reason)
            case Durable(count):
                self._durable = max(self._durable, count)
                while self._settling and self._settling[0][0] <= self._durable:
                    _, number, output, level, index = self._settling.popleft()
                    self._node_ready(number, level, index, output)
            case SinkPublished(entry):
                if self.state.ended is None:  # otherwise the next coordinator asks for it again
                    self._append(entry)
            case Broke(error, arguments):
                self._end("failed", error, *arguments)
            case StopRequested(now):
                self._end("stopped", "RunStoppedError", self.run_id)
                if now:
                    self.inflight.clear()
        return self._settle()

    # --- deciding ----------------------------------------------------------------------------------------------------

    def _append(self, entry: Entry) -> int:
        self.state.apply(entry)
        self._tickets += 1
        self._out.append(Append(entry, self._tickets))
        if not isinstance(entry, (RunStarted, Owned, RunEnded)):
            self._last[entry.stage] = self._tickets
        return self._tickets

    def _settled(self, number: int) -> bool:
        """Tell whether all that was decided of a stage is durable."""
        return self._durable >= self._last[number]

    def _end(self, status: str, error: str = "", *arguments: str | float) -> None:
        """Decide the run's end: what is in flight yields, nothing new begins. The first decision stands."""
        if self.ending is None:
            self.ending = RunEnded(status, error, arguments)  # type: ignore[arg-type]
            if self.inflight:
                self._out.append(Yield(tuple(self.inflight)))

    def _settle(self) -> list[Instruction]:
        """Do whatever the present state allows, and hand out what was asked for."""
        if self.ending is None:
            self._open_barriers()
        if self.ending is None:
            self._fill()
        if self.ending is not None and not self.inflight and not self.finished:
            if self.state.ended is None:
                self._append(self.ending)
            if self._durable >= self._tickets:
                self.finished = True
                self._out.append(Finish(self.ending))
        out, self._out = self._out, []
        return out

    def _take_listing(self, entry: ChunksListed) -> None:
        stage = self.state.stages[entry.stage]
        if stage.closed or self.ending is not None:
            return
        self._append(entry)
        for chunk in entry.chunks:
            self._enqueue(entry.stage, stage.pending[chunk.index, 0], fresh=True)
        self._try_edges(entry.stage)

    def _enqueue(self, number: int, piece: Piece, *, fresh: bool) -> None:
        """Queue a piece, unless its result is there: what is left of a begun chunk before fresh chunks, largest first."""
        found = self._adopted.pop((number, piece), None)
        if found is not None:
            self._chunk_back(number, piece, found)
            return
        chunk = self.state.stages[number].chunks[piece.chunk].chunk
        self._push((int(fresh), -chunk.weight, number, piece.chunk, piece.first), self._job(number, piece))

    def _push(self, rank: tuple[int, int, int, int, int], job: Job) -> None:
        self._pushed += 1  # a last word where ranks tie, so that jobs themselves are never compared
        heapq.heappush(self._queue, (*rank, self._pushed, job))

    def _fill(self) -> None:
        """Keep the window full: one batch in flight for each free place."""
        while self._queue and len(self.inflight) < self.window * self.slots:
            number = self._queue[0][2]
            size = self._batching[number].size(len(self._queue), self.slots)
            jobs: list[Job] = []
            while self._queue and self._queue[0][2] == number and len(jobs) < size:
                alone = self._alone(self._queue[0][-1])
                if alone and jobs:
                    break
                jobs.append(heapq.heappop(self._queue)[-1])
                if alone:
                    break
            self._attempts += 1
            submit = Submit(f"{self.epoch}.{self._attempts}", number, tuple(jobs))
            self.inflight[submit.attempt] = submit
            self._out.append(submit)

    @staticmethod
    def _alone(job: Job) -> bool:
        return isinstance(job, ChunkJob) and job.piece.alone

    # --- what comes back ---------------------------------------------------------------------------------------------

    def _batch_back(self, attempt: str, receipts: tuple[Receipt | None, ...]) -> None:
        batch = self.inflight.pop(attempt, None)
        if batch is None:  # a receipt that came twice, or after its loss was reported
            return
        untouched = not any(receipts)
        for job, receipt in zip(batch.jobs, receipts, strict=True):
            if receipt is None:
                if untouched and self.ending is None:
                    self._lose(job, "no job of the batch was started")
                else:
                    self._requeue(job)
            elif receipt.status == "broken":
                self._requeue(job)
                step, why = (f.step, _tell(f)) if (f := receipt.failure) else ("?", "it can't run")
                self._end("failed", "StepError", self.run_id, step, why)
            elif isinstance(job, MergeJob):
                self._merge_back(job, receipt)
            else:
                if receipt.status != "died":  # nothing of it stands, nor its seconds
                    self._batching[job.stage].saw(receipt.tally.seconds)
                self._chunk_back(job.stage, job.piece, receipt)

    def _lose(self, job: Job, reason: str) -> None:
        self._requeue(job)
        self._losses[job] = self._losses.get(job, 0) + 1
        if self._losses[job] >= MAX_LOSSES:
            what = f"chunk {job.piece.chunk}" if isinstance(job, ChunkJob) else "a merge"
            name = self.state.stages[job.stage].facts.name
            self._end("failed", "StepError", self.run_id, name, f"{what} was lost {self._losses[job]} times: {reason}")

    def _requeue(self, job: Job) -> None:
        if isinstance(job, ChunkJob):
            self._enqueue(job.stage, job.piece, fresh=False)
        else:
            self._push((0, 0, job.stage, job.index, job.output), job)

    def _chunk_back(self, number: int, piece: Piece, receipt: Receipt) -> None:
        stage = self.state.stages[number]
        at = receipt.cursor or piece.start
        rest: tuple[Piece, ...] = ()
        failure: Failure | None = None
        if receipt.status == "stopped":
            if at.ordinal <= piece.first:
                self._enqueue(number, piece, fresh=False)  # it yielded before its first record
                return
            rest = _rest(piece, at)
        elif receipt.status == "died" and (receipt.cursor is None or self._first_loss(number, piece, receipt)):
            self._lose(self._job(number, piece), _tell(receipt.failure) if receipt.failure else "its child died")
            return
        elif receipt.status == "died" and receipt.failure is not None and receipt.failure.cause == "input":
            rest = _without_part(piece, at, len(stage.chunks[piece.chunk].chunk.parts))
            failure = receipt.failure
        elif receipt.status == "died":
            condemned = receipt.failure is not None and (piece.alone or receipt.failure.cause == "timeout")
            rest = _around(piece, at, alone=not condemned)
            failure = receipt.failure if condemned else None
        committed = None if receipt.status == "died" else receipt
        ticket = self._append(PieceEnded(number, piece, rest, committed, failure))
        if not stage.chunks[piece.chunk].pending:
            self._settling.append((ticket, number, -1, 0, piece.chunk))
        for part in rest:
            self._enqueue(number, part, fresh=False)
        if self.tolerance.hopeless(stage.failed, stage.records):
            self._refuse(stage)

    def _job(self, number: int, piece: Piece) -> ChunkJob:
        return ChunkJob(number, piece, self.state.stages[number].chunks[piece.chunk].chunk)

    def _first_loss(self, number: int, piece: Piece, receipt: Receipt) -> bool:
        """Tell whether a child died reading, with no record in hand, for the first time: that may have been chance."""
        reading = receipt.failure is not None and receipt.failure.cause == "input"
        return reading and self._job(number, piece) not in self._losses

    def _refuse(self, stage: StageState) -> None:
        tally = self.state.tally
        first = stage.lost[0].message if stage.lost else stage.rejected[0].message if stage.rejected else ""
        if not first:
            first = next((_tell(r.failure) for _, r in stage.receipts() if r.failure is not None), "see the list")
        limit = self.tolerance.max_failures
        self._end("failed", "TooManyFailuresError", self.run_id, tally.failed, tally.records, limit, first)

    # --- merging and barriers ----------------------------------------------------------------------------------------
    # A reduction's tree has a fixed shape: node (level, index) covers the chunks [index, index + 1) * fan_in ** level. Its
    # bits therefore never depend on the order in which chunks end. Level 0 is the chunks themselves.

    def _root(self, stage: StageState) -> int:
        level = 1
        while self.fan_in**level < len(stage.chunks):
            level += 1
        return level

    def _node_ready(self, number: int, level: int, index: int, output: int = -1) -> None:
        """Count a durable node for its parent; a chunk (output -1) stands for every reduction of its stage."""
        for out, kind in enumerate(self.state.stages[number].facts.kinds):
            if kind == "reduce" and output in (-1, out):
                parent = (number, out, level + 1, index // self.fan_in)
                self._ready[parent] = self._ready.get(parent, 0) + 1
                self._try_merge(*parent)

    def _try_edges(self, number: int) -> None:
        """Look at what a longer list may have released: each level's first node, now sure not to be the root, and its last."""
        stage = self.state.stages[number]
        for output, kind in enumerate(stage.facts.kinds):
            if kind == "reduce":
                for level in range(1, self._root(stage) + 1):
                    last = max(0, len(stage.chunks) - 1) // self.fan_in**level
                    for index in (0, last):
                        self._try_merge(number, output, level, index)

    def _try_merge(self, number: int, output: int, level: int, index: int) -> None:
        """Ask for a merge once all that it covers is durable; for the last one, once the barrier is open too."""
        stage, node = self.state.stages[number], (number, output, level, index)
        nodes = -(-len(stage.chunks) // self.fan_in ** (level - 1))
        wanted = min(self.fan_in, nodes - index * self.fan_in)
        top = self._root(stage) if stage.closed else level + 1
        is_root = level == top
        sure = stage.closed or len(stage.chunks) > self.fan_in**level
        whole = wanted == self.fan_in or stage.closed
        if level > top or node in self._asked or not (sure and whole) or self._ready.get(node, 0) < wanted:
            return
        if is_root and not (stage.opened and self._settled(number)):
            return
        self._asked.add(node)
        first = index * self.fan_in
        if level == 1:
            inputs = stage.results(output, range(first, first + wanted))
        else:
            inputs = tuple(stage.merged[output, level - 1, first + k] for k in range(wanted))
        self._requeue(MergeJob(number, output, level, index, inputs, is_root))

    def _merge_back(self, job: MergeJob, receipt: Receipt) -> None:
        result = receipt.results[0] if receipt.results else None
        if receipt.status != "done" or result is None:
            self._lose(job, _tell(receipt.failure) if receipt.failure else "it gave no result")
            return
        spent = receipt.tally.seconds
        entry = Merged(job.stage, job.output, job.level, job.index, result, spent, receipt.slot, receipt.started)
        self._settling.append((self._append(entry), job.stage, job.output, job.level, job.index))

    def _open_barriers(self) -> None:
        for number, stage in enumerate(self.state.stages):
            if stage.complete and not stage.opened and self._settled(number):
                if not self.tolerance.accepts(stage.failed, stage.records):
                    self._refuse(stage)
                    return
                self._append(BarrierOpened(number, stage.failed))
            if stage.opened and self._settled(number):
                self._after_barrier(number, stage)
        if self._durable >= self._tickets and all(self._stage_done(stage) for stage in self.state.stages):
            self._end("succeeded")

    def _after_barrier(self, number: int, stage: StageState) -> None:
        for output, kind in enumerate(stage.facts.kinds):
            if kind == "reduce":
                self._try_merge(number, output, self._root(stage), 0)
            elif kind == "sink" and output not in stage.published and (number, output, 0, 0) not in self._asked:
                self._asked.add((number, output, 0, 0))
                self._out.append(Publish(number, output))

    def _stage_done(self, stage: StageState) -> bool:
        return stage.opened and all(
            (output, self._root(stage), 0) in stage.merged
            if kind == "reduce"
            else output in stage.published or kind == "collect"
            for output, kind in enumerate(stage.facts.kinds)
        )


def _rest(piece: Piece, at: Cursor) -> tuple[Piece, ...]:
    """Return what of a piece begins at a cursor."""
    return () if piece.stop is not None and at.ordinal >= piece.stop else (Piece(piece.chunk, at, 0, piece.stop),)


def _around(piece: Piece, at: Cursor, *, alone: bool) -> tuple[Piece, ...]:
    """Split a piece around the record at a cursor: what lies before, the record ``alone`` or not at all, what lies behind."""
    before = (Piece(piece.chunk, piece.start, piece.skip, at.ordinal),) if at.ordinal > piece.first else ()
    passed, here = 0, piece.start
    if at.ordinal < piece.first or (at.part, at.offset) == (here.part, here.offset):
        # It died on its way to its first record, which is the one meant; or the record's number is known but not its place.
        at, passed = here, max(piece.skip, at.ordinal - here.ordinal)
    behind = at.ordinal + passed + 1
    suspect = (Piece(piece.chunk, at, passed, behind, alone=True),) if alone else ()
    after = () if piece.stop is not None and behind >= piece.stop else (Piece(piece.chunk, at, passed + 1, piece.stop),)
    return before + suspect + after


def _without_part(piece: Piece, at: Cursor, parts: int) -> tuple[Piece, ...]:
    """Split a piece around what is left of the part at a cursor: one dead letter stands for it, whatever it holds."""
    before = (Piece(piece.chunk, piece.start, piece.skip, at.ordinal),) if at.ordinal > piece.first else ()
    behind = max(at.ordinal, piece.first) + 1
    ends = at.part + 1 >= parts or (piece.stop is not None and behind >= piece.stop)
    return before + (() if ends else (Piece(piece.chunk, Cursor(behind, at.part + 1), 0, piece.stop),))


def _tell(failure: Failure) -> str:
    where = f" ({failure.record})" if failure.record else ""
    return f"{failure.error}: {failure.message}{where}"

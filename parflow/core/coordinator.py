"""The run's state machine: stimuli in, instructions out. No thread, clock, file or Dask in it.

The executor (and the simulator, with the same code) tells the coordinator what happened and carries out what it asks for,
in order. Each decision that must outlive the process is an entry: it is applied to the state here and handed out as an
`Append`. What can't be taken back (a merge, a barrier, publishing, what needs a value, the end) waits until the executor has
said that the entries it rests on are durable; more work of the same kind need not, since the journal is durable in the order
of its entries.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from parflow.core.dataflow import Dataflow, Verdict
from parflow.core.growth import renumbered
from parflow.core.history import (
    BarrierOpened,
    Called,
    ChunksListed,
    Cut,
    Decided,
    Entry,
    Grown,
    Merged,
    PieceEnded,
    RunEnded,
    RunState,
    StageState,
)
from parflow.core.pieces import around, rest_of, without_part
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
    Listed,
    Publish,
    Rang,
    Ring,
    SinkPublished,
    SlotsChanged,
    Stimulus,
    StopRequested,
    Submit,
    Yield,
)
from parflow.core.trees import Trees
from parflow.model import (
    Address,
    CallJob,
    ChunkJob,
    Failure,
    Job,
    MergeJob,
    Piece,
    Receipt,
)
from parflow.policies import Batching, Tolerance

MAX_LOSSES = 4
"""How often a job's worker may vanish, or the job come back untouched, before the run is ended (infrastructure's fault)."""

REST = -1
"""Rings, in an output's place, for what is left in flight of a stage when nobody waits for it any more."""
GRACE_SECONDS = 1.0

Reason = tuple[str, tuple[str | float, ...]]
"""The name of an error, and its arguments."""


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
    >>> from parflow.core.history import Owned, RunStarted, fold
    >>> from parflow.model import StageFacts
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
        self.epoch = state.owned.epoch
        self.tolerance = Tolerance(state.owned.max_failures)
        self.window = window
        self.slots = 0
        self.inflight: dict[str, Submit] = {}
        self.ending: RunEnded | None = None
        self.finished = False
        self._targets = state.started.targets or tuple(
            (number, output) for number, facts in enumerate(state.started.stages) for output in range(len(facts.kinds))
        )
        self._flow = Dataflow(state, self._targets)
        self._trees = Trees(state, self._requeue, self._is_open)
        self._queue: list[tuple[int, int, int, int, int, int, Job]] = []
        self._pushed = 0
        self._out: list[Instruction] = []
        self._tickets = 0
        self._durable = 0
        self._last: dict[int, int] = {}  # each stage's last ticket
        self._settling: deque[tuple[int, Callable[[], None]]] = deque()
        self._losses: dict[Job, int] = {}
        self._batching: defaultdict[int, Batching] = defaultdict(Batching)
        self._begun: set[int] = set()
        self._publishing: set[Address] = set()
        self._overdue: set[Address] = set()
        self._reasons: dict[int, tuple[Failure, Reason]] = {}
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
        for number in range(len(self.state.stages)):
            self._provide_stage(number)
        self._flow.want(self._targets)
        return self._settle()

    def handle(self, stimulus: Stimulus) -> list[Instruction]:
        """Take one fact and return what to do about it, in order."""
        if self.finished:
            return []
        self._take(stimulus)
        return self._settle()

    def _take(self, stimulus: Stimulus) -> None:
        match stimulus:
            case SlotsChanged(slots):
                self.slots = slots
            case Listed(entry):
                self._take_listing(entry)
            case BatchReturned(attempt, receipts):
                self._batch_back(attempt, receipts)
            case BatchLost(attempt, reason):
                batch = self.inflight.pop(attempt, None)
                self._lose_all(batch.jobs if batch else (), reason)
            case Durable(count):
                self._durable = max(self._durable, count)
                while self._settling and self._settling[0][0] <= self._durable:
                    self._settling.popleft()[1]()
            case SinkPublished(entry):
                if self.state.ended is None:  # otherwise the next coordinator asks for it again
                    self._append(entry)
                    self._then(partial(self._flow.provide, (entry.stage, entry.output)))
            case Rang(stage, output):
                self._overdue.add((stage, output))
                self._look(stage)
                if output == REST:
                    self._end_rest(stage)
            case Broke(error, arguments):
                self._end("failed", error, *arguments)
            case StopRequested(now, status):
                self._end(status, "RunCancelledError" if status == "cancelled" else "RunStoppedError", self.run_id)
                if now:
                    self.inflight.clear()

    # --- deciding ----------------------------------------------------------------------------------------------------

    def _append(self, entry: Entry) -> None:
        self.state.apply(entry)
        self._tickets += 1
        self._out.append(Append(entry, self._tickets))
        if isinstance(entry, (ChunksListed, PieceEnded, Merged, BarrierOpened)):
            self._last[entry.stage] = self._tickets

    def _then(self, act: Callable[[], None]) -> None:
        """Put off what rests on the entry decided last until it is durable."""
        self._settling.append((self._tickets, act))

    def _settled(self, number: int) -> bool:
        """Tell whether all that was decided of a stage is durable."""
        return self._durable >= self._last.get(number, 0)

    def _is_open(self, number: int) -> bool:
        return self.state.stages[number].opened and self._settled(number)

    def _end(self, status: str, error: str = "", *arguments: str | float) -> None:
        """Decide the run's end: what is in flight yields, nothing new begins. The first decision stands."""
        if self.ending is None:
            self.ending = RunEnded(status, error, arguments)  # type: ignore[arg-type]
            if self.inflight:
                self._out.append(Yield(tuple(self.inflight)))

    def _settle(self) -> list[Instruction]:
        """Do whatever the present state allows, and hand out what was asked for."""
        while self.ending is None and (self._flow.ready or self._flow.verdicts):
            if self._flow.verdicts:
                self._decide(self._flow.verdicts.popleft())
            else:
                self._begin(self._flow.ready.popleft())
        if self.ending is None and (blamed := self._flow.lost) is not None:
            error, arguments = self._reasons[blamed][1]
            self._end("failed", error, *arguments)
        if self.ending is None and self._flow.done and self._durable >= self._tickets:
            self._end("succeeded")
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

    def _begin(self, node: int) -> None:
        """Start a node whose needs are there."""
        if node < 0:
            self._requeue(CallJob(~node, self.state.calls[~node].facts.task))
            return
        stage = self.state.stages[node]
        again = node in self._begun  # it was cancelled, and is wanted again
        if again:
            self._trees.again(node)
        else:
            self._trees.resume(node)
        self._begun.add(node)
        pending = () if self._is_cut(stage) else tuple(stage.pending.values())
        if not stage.closed and stage.facts.base is not None:
            self._take_listing(ChunksListed(node, last=True))  # the state knows what they are
        elif not stage.closed and not again:  # else it's still being listed
            self._out.append(List(node, stage.listed))
        for output, seconds in enumerate(stage.facts.deadlines):
            if seconds and output not in stage.cuts and output not in stage.patient and not stage.opened:
                self._out.append(Ring(node, output, seconds))
        for output in stage.cuts:
            self._trees.cut(node, output)
        for piece in pending:
            self._enqueue(node, piece, fresh=not stage.chunks[piece.chunk].receipts)
        self._look(node)

    # --- chunks --------------------------------------------------------------------------------------------------------

    def _take_listing(self, entry: ChunksListed) -> None:
        stage = self.state.stages[entry.stage]
        if stage.closed or self.ending is not None:
            return
        known = len(stage.chunks)
        self._append(entry)
        if entry.last:
            self._then(partial(self._listing_kept, entry.stage))
        for index in range(known, len(stage.chunks)):
            self._enqueue(entry.stage, stage.pending[index, 0], fresh=True)
        self._trees.try_edges(entry.stage)

    def _listing_kept(self, number: int) -> None:
        self._flow.provide((number, -1))
        self._look(number)

    def _enqueue(self, number: int, piece: Piece, *, fresh: bool) -> None:
        """Queue a piece, unless its result is there: what is left of a begun chunk before fresh chunks, largest first."""
        found = self._adopted.pop((number, piece), None)
        if found is not None:
            self._chunk_back(number, piece, found)
            return
        stage = self.state.stages[number]
        if self._is_cut(stage):  # nobody waits for it any more
            return
        chunk = stage.chunks[piece.chunk].chunk
        self._push((int(fresh), -chunk.weight, number, piece.chunk, piece.first), self._job(number, piece))

    def _push(self, rank: tuple[int, int, int, int, int], job: Job) -> None:
        if job.node not in self._flow.wanted or job.node in self._flow.failed:  # it's asked for again if it's wanted again
            return
        self._pushed += 1  # a last word where ranks tie, so that jobs themselves are never compared
        heapq.heappush(self._queue, (*rank, self._pushed, job))

    def _fill(self) -> None:
        """Keep the window full: one batch in flight for each free place."""
        while self._queue and len(self.inflight) < self.window * self.slots:
            unit = self._queue[0][2]
            size = self._batching[unit].size(len(self._queue), self.slots)
            jobs: list[Job] = []
            while self._queue and self._queue[0][2] == unit and len(jobs) < size:
                alone = self._queue[0][-1].alone
                if alone and jobs:
                    break
                jobs.append(heapq.heappop(self._queue)[-1])
                if alone:
                    break
            self._attempts += 1
            submit = Submit(f"{self.epoch}.{self._attempts}", unit, tuple(jobs))
            self.inflight[submit.attempt] = submit
            self._out.append(submit)

    # --- what comes back ---------------------------------------------------------------------------------------------

    def _batch_back(self, attempt: str, receipts: tuple[Receipt | None, ...]) -> None:
        batch = self.inflight.pop(attempt, None)
        if batch is None:  # a receipt that came twice, or after its loss was reported
            return
        untouched = not any(receipts)
        for job, receipt in zip(batch.jobs, receipts, strict=True):
            if job.node in self._flow.failed or (self._is_late(job) and (receipt is None or receipt.status == "broken")):
                continue
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
                    self._batching[batch.unit].saw(receipt.tally.seconds)
                if isinstance(job, CallJob):
                    self._call_back(job, receipt)
                else:
                    self._chunk_back(job.stage, job.piece, receipt)

    def _lose_all(self, jobs: Iterable[Job], reason: str) -> None:
        for job in jobs:
            self._lose(job, reason)

    def _lose(self, job: Job, reason: str) -> None:
        if job.node in self._flow.failed or self._is_late(job):
            return
        self._requeue(job)
        self._losses[job] = self._losses.get(job, 0) + 1
        if self._losses[job] >= MAX_LOSSES:
            what = f"chunk {job.piece.chunk}" if isinstance(job, ChunkJob) else "a merge"
            what = "the call" if isinstance(job, CallJob) else what
            self._end(
                "failed", "StepError", self.run_id, self._name(job), f"{what} was lost {self._losses[job]} times: {reason}"
            )

    def _name(self, job: Job) -> str:
        return self.state.tasks[job.task].name if isinstance(job, CallJob) else self.state.stages[job.stage].facts.name

    def _requeue(self, job: Job) -> None:
        if isinstance(job, ChunkJob):
            self._enqueue(job.stage, job.piece, fresh=False)
        elif isinstance(job, CallJob):
            self._push((0, 0, ~job.task, job.call, 0), job)
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
            rest = rest_of(piece, at)
        elif receipt.status == "died" and (receipt.cursor is None or self._first_loss(number, piece, receipt)):
            self._lose(self._job(number, piece), _tell(receipt.failure) if receipt.failure else "its child died")
            return
        elif receipt.status == "died" and receipt.failure is not None and receipt.failure.cause == "input":
            rest = without_part(piece, at, len(stage.chunks[piece.chunk].chunk.parts))
            failure = receipt.failure
        elif receipt.status == "died":
            condemned = receipt.failure is not None and (piece.alone or receipt.failure.cause == "timeout")
            rest = around(piece, at, alone=not condemned)
            failure = receipt.failure if condemned else None
        committed = None if receipt.status == "died" else receipt
        self._append(PieceEnded(number, piece, rest, committed, failure))
        if not stage.chunks[piece.chunk].pending:
            self._then(partial(self._trees.chunk_ready, number, piece.chunk))
        self._then(partial(self._look, number))
        for part in rest:
            self._enqueue(number, part, fresh=False)
        if self.tolerance.hopeless(stage.failed, stage.records) and not self._is_cut(stage):
            self._refuse(number)

    def _job(self, number: int, piece: Piece) -> ChunkJob:
        return ChunkJob(number, piece, self.state.stages[number].chunks[piece.chunk].chunk)

    def _first_loss(self, number: int, piece: Piece, receipt: Receipt) -> bool:
        """Tell whether a child died reading, with no record in hand, for the first time: that may have been chance."""
        reading = receipt.failure is not None and receipt.failure.cause == "input"
        return reading and self._job(number, piece) not in self._losses

    def _merge_back(self, job: MergeJob, receipt: Receipt) -> None:
        result = receipt.results[0] if receipt.results else None
        if receipt.status != "done" or result is None:
            self._lose(job, _tell(receipt.failure) if receipt.failure else "it gave no result")
            return
        place = (job.stage, job.output, job.level, job.index)
        self._append(Merged(*place, result, receipt.tally.seconds, receipt.slot, receipt.started, job.bucket))
        self._then(partial(self._merge_kept, job))

    def _merge_kept(self, job: MergeJob) -> None:
        self._trees.node_ready(job.stage, job.output, job.bucket, job.level, job.index)
        self._provide_reduction(job.stage, job.output)
        self._look(job.stage)

    # --- calls and decisions -------------------------------------------------------------------------------------------

    def _call_back(self, job: CallJob, receipt: Receipt) -> None:
        number, spent = job.call, (receipt.tally.seconds, receipt.slot, receipt.started)
        failure = receipt.failure
        if receipt.status == "died" and receipt.cursor is None:
            self._lose(job, _tell(failure) if failure else "its child died")
        elif receipt.status == "died" and not job.alone and failure is not None and failure.cause != "timeout":
            self._requeue(CallJob(number, job.task, alone=True))
        elif receipt.status != "done" or failure is not None:
            failure = failure or Failure("", self._name(job), "crash", "RecordCrashedError", "it came back without a result")
            self._append(Called(number, (), None, failure, *spent))
            reason: Reason = ("CallFailedError", (self.run_id, self._name(job), _tell(failure)))
            self._fail(~number, failure, reason)
        elif receipt.growth is not None:
            graph, results = renumbered(receipt.growth, self.state)
            self._append(Grown(number, graph, results, receipt.growth.code, *spent))
            self._then(partial(self._called, number))
        else:
            made = tuple(ref for ref in receipt.results if ref is not None)
            self._append(Called(number, made, receipt.choice, None, *spent))
            self._then(partial(self._called, number))

    def _called(self, call: int) -> None:
        if self.state.calls[call].results:
            self._flow.provide((~call, 0))
        elif ~call in self._flow.wanted:
            self._flow.renew(call)

    def _decide(self, verdict: Verdict) -> None:
        """Write down a decision over branches, and end what nobody wants any more."""
        failures = {str(arm): self._reasons[blamed][0] for arm, blamed in verdict.failed.items()}
        gone = self._flow.sweep(verdict)
        self._drop(gone)
        self._append(Decided(verdict.call, verdict.picked, failures, gone))
        self._then(partial(self._flow.provide, (~verdict.call, 0)))

    def _drop(self, nodes: Iterable[int]) -> None:
        """Forget the jobs of nodes that nobody wants, and end those in flight; what shares their batches is queued again."""
        gone = set(nodes)
        if not gone:
            return
        self._queue = [entry for entry in self._queue if entry[-1].node not in gone]
        heapq.heapify(self._queue)
        hit = [submit for submit in self.inflight.values() if any(job.node in gone for job in submit.jobs)]
        self._cancel(hit)
        for job in (job for submit in hit for job in submit.jobs):
            if job.node not in gone:
                self._requeue(job)

    def _cancel(self, submits: Sequence[Submit]) -> None:
        if submits:
            self._out.append(Cancel(tuple(submit.attempt for submit in submits)))
        for submit in submits:
            del self.inflight[submit.attempt]

    def _fail(self, node: int, failure: Failure, reason: Reason) -> None:
        """Give a node up. Whoever needs it fails with it; a decision over branches judges it."""
        if node in self._flow.failed:
            return
        self._reasons[node] = failure, reason
        self._flow.fail(node)
        if self._flow.lost is None:
            self._drop([node])

    # --- barriers ------------------------------------------------------------------------------------------------------

    def _look(self, number: int) -> None:
        """Open a stage's barrier when all of its records are accounted for, durably, and go on behind it."""
        stage = self.state.stages[number]
        if self.ending is not None or number not in self._flow.wanted or number in self._flow.failed:
            return
        if stage.complete and not stage.opened and self._settled(number):
            if self.tolerance.accepts(stage.failed, stage.records):
                self._append(BarrierOpened(number, stage.failed))
                self._then(partial(self._look, number))
            elif not self._is_cut(stage):  # else its value is there, whatever came too late
                self._refuse(number)
        elif not stage.opened:
            self._cut(number)
        elif self._is_open(number):
            self._provide_stage(number)
            self._trees.try_roots(number)
            for output, kind in enumerate(stage.facts.kinds):
                if kind == "sink" and output not in stage.published and (number, output) not in self._publishing:
                    self._publishing.add((number, output))
                    self._out.append(Publish(number, output))

    def _cut(self, number: int) -> None:
        """Open the barriers whose deadline is over, if enough is there; once all are open nobody waits for the rest."""
        stage = self.state.stages[number]
        for output in range(len(stage.facts.deadlines)):
            due = (number, output) in self._overdue and output not in stage.cuts and stage.closed and self._settled(number)
            if due and stage.share >= stage.facts.enough[output]:
                if not self.tolerance.accepts(stage.failed, stage.records):
                    self._refuse(number)
                    return
                self._append(Cut(number, output, stage.share, tuple(stage.pending.values())))
                self._then(partial(self._trees.cut, number, output))
                if self._is_cut(stage):
                    self._release(number)

    @staticmethod
    def _is_cut(stage: StageState) -> bool:
        return len(stage.cuts) == len(stage.facts.kinds)

    def _is_late(self, job: Job) -> bool:
        """Tell whether nobody waits for a job any more: what becomes of it is no matter."""
        return isinstance(job, ChunkJob) and self._is_cut(self.state.stages[job.stage])

    def _release(self, number: int) -> None:
        """Let go of a stage's pieces: what is queued stays undone, what is in flight comes back at its next record."""
        self._queue = [entry for entry in self._queue if entry[2] != number or isinstance(entry[-1], MergeJob)]
        heapq.heapify(self._queue)
        flying = tuple(submit.attempt for submit in self.inflight.values() if submit.unit == number)
        if flying:
            self._out += [Yield(flying), Ring(number, REST, GRACE_SECONDS)]

    def _end_rest(self, number: int) -> None:
        """End what has not come back of pieces that nobody waits for; merges among them are made again."""
        late = [s for s in self.inflight.values() if s.unit == number and any(isinstance(job, ChunkJob) for job in s.jobs)]
        self._cancel(late)
        for job in (job for submit in late for job in submit.jobs if isinstance(job, MergeJob)):
            self._requeue(job)

    def _provide_stage(self, number: int) -> None:
        """Say which of a stage's outputs are there, durably."""
        stage = self.state.stages[number]
        if stage.closed and self._settled(number):
            self._flow.provide((number, -1))
        for output in stage.cuts:
            self._provide_reduction(number, output)
        if not self._is_open(number):
            return
        for output, kind in enumerate(stage.facts.kinds):
            if kind == "collect" or (kind == "sink" and output in stage.published and number not in self._begun):
                self._flow.provide((number, output))
            elif kind in ("reduce", "group"):
                self._provide_reduction(number, output)

    def _provide_reduction(self, number: int, output: int) -> None:
        stage = self.state.stages[number]
        there = output in stage.cuts or self._is_open(number)
        if there and all(stage.root(output, bucket) for bucket in range(stage.buckets(output))):
            self._flow.provide((number, output))

    def _refuse(self, number: int) -> None:
        """Give a stage up: more of its records failed than are tolerated."""
        stage, tally = self.state.stages[number], self.state.tally
        first = stage.lost[0].message if stage.lost else stage.rejected[0].message if stage.rejected else ""
        if not first:
            first = next((_tell(r.failure) for _, r in stage.receipts() if r.failure is not None), "see the list")
        limit = self.tolerance.max_failures
        reason: Reason = ("TooManyFailuresError", (self.run_id, tally.failed, tally.records, limit, first))
        what = f"{stage.failed} of {stage.records} records failed; first: {first}"
        self._fail(number, Failure("", stage.facts.name, "exception", reason[0], what), reason)


def _tell(failure: Failure) -> str:
    where = f" ({failure.record})" if failure.record else ""
    return f"{failure.error}: {failure.message}{where}"

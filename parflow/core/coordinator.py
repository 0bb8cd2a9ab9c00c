"""The run's state machine: stimuli in, instructions out. No thread, clock, file or Dask in it.

The executor (and the simulator, with the same code) tells the coordinator what happened and carries out what it asks for,
in order. Each decision that must outlive the process is an entry: it is applied to the state here and handed out as an
`Append`. What can't be taken back (a merge, a barrier, publishing, what needs a value, the end) waits until the executor has
said that the entries it rests on are durable; more work of the same kind need not, since the journal is durable in the order
of its entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from parflow.core.attempts import Reason, accepts, judge, next_call, refusal, tell
from parflow.core.dataflow import Dataflow, Verdict
from parflow.core.entries import (
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
    Turned,
)
from parflow.core.growth import renumbered
from parflow.core.history import RunState
from parflow.core.lanes import Lanes, Rank
from parflow.core.pieces import around, rest_of, without_part
from parflow.core.rules import RulesOf, free
from parflow.core.signals import (
    Append,
    BatchLost,
    BatchReturned,
    Bell,
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
from parflow.core.state import StageState
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
from parflow.policies import Tolerance

MAX_LOSSES = 4
"""How often a job's worker may vanish, or the job come back untouched, before the run is ended (infrastructure's fault)."""

REST = -1
"""Rings, in an output's place, for what is left in flight of a stage when nobody waits for it any more."""
REST_SECONDS = 1.0


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
    rules : callable
        Gives the policies of a stage (its number) or of a task's calls (``~`` the task's number).
    grace : float
        Seconds that what is in flight has to come back in once the run ends; then it's cancelled.

    Examples
    --------
    >>> from parflow.core.entries import Owned, RunStarted
    >>> from parflow.core.history import fold
    >>> from parflow.model import StageFacts
    >>> facts = StageFacts("read", ("read",), ("count",), ("reduce",))
    >>> state = fold([RunStarted("f", "", (facts,), 16), Owned(1, "me", 0)])
    >>> Coordinator("r", state).start()
    [List(stage=0, skip=0)]
    """

    def __init__(self, run_id: str, state: RunState, *, window: int = 2, rules: RulesOf = free, grace: float = 30.0) -> None:
        if state.started is None or state.owned is None:
            raise ValueError("the state has no RunStarted and Owned entries")
        self.run_id = run_id
        self.state = state
        self.epoch = state.owned.epoch
        self.tolerance = Tolerance(state.owned.max_failures)
        self.rules = rules
        self.grace = grace
        self.ending: RunEnded | None = None
        self.finished = False
        self._targets = state.started.targets or tuple(
            (number, output) for number, facts in enumerate(state.started.stages) for output in range(len(facts.kinds))
        )
        self._flow = Dataflow(state, self._targets)
        self._trees = Trees(state, self._requeue, self._is_open)
        self._out: list[Instruction] = []
        self._lanes = Lanes(self.epoch, rules, window, self._ring, lambda *turn: self._append(Turned(*turn)))
        self._tickets = 0
        self._durable = 0
        self._last: dict[int, int] = {}  # each stage's last ticket
        self._settling: deque[tuple[int, Callable[[], None]]] = deque()
        self._losses: dict[Job, int] = {}
        self._begun: set[int] = set()
        self._publishing: set[Address] = set()
        self._overdue: set[Address] = set()
        self._reasons: dict[int, tuple[Failure, Reason]] = {}
        self._waiting: dict[int, Job] = {}  # jobs before their next attempt, by the number of their bell
        self._bells = 0
        self._adopted: dict[tuple[int, Piece], Receipt] = {}

    @property
    def inflight(self) -> dict[str, Submit]:
        """The batches that are to come back."""
        return self._lanes.inflight

    @property
    def slots(self) -> int:
        """How many jobs the cluster can run at once."""
        return self._lanes.slots

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
                self._lanes.slots = slots
            case Listed(entry):
                self._take_listing(entry)
            case BatchReturned(attempt, receipts):
                self._batch_back(attempt, receipts)
            case BatchLost(attempt, reason):
                batch = self._lanes.back(attempt)
                for job in batch.jobs if batch else ():
                    self._lose(job, reason)
            case Durable(count):
                self._durable = max(self._durable, count)
                while self._settling and self._settling[0][0] <= self._durable:
                    self._settling.popleft()[1]()
            case SinkPublished(entry):
                if self.state.ended is None:  # otherwise the next coordinator asks for it again
                    self._append(entry)
                    self._then(partial(self._flow.provide, (entry.stage, entry.output)))
            case Rang(bell):
                self._rang(bell)
            case Broke(error, arguments):
                self._end("failed", error, *arguments)
            case StopRequested(now, status):
                self._end(status, "RunCancelledError" if status == "cancelled" else "RunStoppedError", self.run_id)
                if now:
                    self.inflight.clear()

    def _rang(self, bell: Bell) -> None:
        match bell:
            case ("again", int(number)):
                self._requeue(self._waiting.pop(number))
            case ("reset", int(unit), str(step)):
                self._lanes.reset(unit, step)
            case ("grace",):
                self._cancel([*self.inflight.values()])
            case (int(stage), int(output)):
                self._overdue.add((stage, output))
                self._look(stage)
                if output == REST:
                    self._end_rest(stage)

    def _ring(self, bell: Bell, seconds: float) -> None:
        self._out.append(Ring(bell, seconds))

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
                self._ring(("grace",), self.grace)

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
            self._out += self._lanes.fill()
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
                self._ring((node, output), seconds)
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
        self._push(self._job(number, piece), (int(fresh), -chunk.weight, piece.chunk, piece.first))

    def _push(self, job: Job, rank: Rank) -> None:
        if job.node in self._flow.wanted and job.node not in self._flow.failed:  # else it's asked for if it's wanted again
            self._lanes.push(job, rank)

    def _later(self, job: Job, seconds: float) -> None:
        """Queue a job once some time is over."""
        if not seconds:
            self._requeue(job)
            return
        self._bells += 1
        self._waiting[self._bells] = job
        self._ring(("again", self._bells), seconds)

    # --- what comes back ---------------------------------------------------------------------------------------------

    def _batch_back(self, attempt: str, receipts: tuple[Receipt | None, ...]) -> None:
        batch = self._lanes.back(attempt)
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
                step, why = (f.step, tell(f)) if (f := receipt.failure) else ("?", "it can't run")
                self._end("failed", "StepError", self.run_id, step, why)
            elif isinstance(job, MergeJob):
                self._merge_back(job, receipt)
            else:
                if receipt.status != "died":  # nothing of it stands, nor its seconds
                    self._lanes.saw(job, receipt.tally.seconds)
                if isinstance(job, CallJob):
                    self._call_back(job, receipt)
                else:
                    self._chunk_back(job.stage, job.piece, receipt)

        if tripped := self._lanes.judge(batch, receipts):
            self._out.append(Yield(tripped))

    def _lose(self, job: Job, reason: str) -> None:
        if job.node in self._flow.failed or self._is_late(job):
            return
        self._requeue(job)
        self._losses[job] = self._losses.get(job, 0) + 1
        if self._losses[job] >= MAX_LOSSES:
            what = f"chunk {job.piece.chunk}" if isinstance(job, ChunkJob) else "a merge"
            what = "the call" if isinstance(job, CallJob) else what
            why = f"{what} was lost {self._losses[job]} times: {reason}"
            self._end("failed", "StepError", self.run_id, self._name(job), why)

    def _name(self, job: Job) -> str:
        return self.state.tasks[job.task].name if isinstance(job, CallJob) else self.state.stages[job.stage].facts.name

    def _requeue(self, job: Job) -> None:
        if isinstance(job, ChunkJob):
            self._enqueue(job.stage, job.piece, fresh=False)
        elif isinstance(job, CallJob):
            self._push(job, (0, 0, job.call, 0))
        else:
            self._push(job, (0, 0, job.index, job.output))

    def _chunk_back(self, number: int, piece: Piece, receipt: Receipt) -> None:
        stage = self.state.stages[number]
        at = receipt.cursor or piece.start
        rest: tuple[Piece, ...] = ()
        failure: Failure | None = None
        delay = 0.0
        if receipt.status == "stopped":
            if at.ordinal <= piece.first:
                self._enqueue(number, piece, fresh=False)  # it yielded before its first record
                return
            rest = rest_of(piece, at)
        elif receipt.status == "died" and (receipt.cursor is None or self._first_loss(number, piece, receipt)):
            self._lose(self._job(number, piece), tell(receipt.failure) if receipt.failure else "its child died")
            return
        elif receipt.status == "died" and receipt.failure is not None and receipt.failure.cause == "input":
            rest = without_part(piece, at, len(stage.chunks[piece.chunk].chunk.parts))
            failure = receipt.failure
        elif receipt.status == "died":
            key = f"{self.run_id}/{number}/{piece.chunk}/{at.ordinal}"
            failure, tried, delay = judge(self.rules(number), piece, receipt.failure, key)
            rest = around(piece, at, alone=failure is None, earlier=tried)
        committed = None if receipt.status == "died" else receipt
        self._append(PieceEnded(number, piece, rest, committed, failure))
        if not stage.chunks[piece.chunk].pending:
            self._then(partial(self._trees.chunk_ready, number, piece.chunk))
        self._then(partial(self._look, number))
        for part in rest:
            if part.alone and delay:
                self._later(self._job(number, part), delay)
            else:
                self._enqueue(number, part, fresh=False)
        if self.tolerance.hopeless(stage.failed, stage.records) and not self._accepts(number) and not self._is_cut(stage):
            self._refuse(number)

    def _accepts(self, number: int) -> bool:
        return accepts(self.state.stages[number], self.rules(number), self.tolerance)

    def _job(self, number: int, piece: Piece) -> ChunkJob:
        return ChunkJob(number, piece, self.state.stages[number].chunks[piece.chunk].chunk)

    def _first_loss(self, number: int, piece: Piece, receipt: Receipt) -> bool:
        """Tell whether a child died reading, with no record in hand, for the first time: that may have been chance."""
        reading = receipt.failure is not None and receipt.failure.cause == "input"
        return reading and self._job(number, piece) not in self._losses

    def _merge_back(self, job: MergeJob, receipt: Receipt) -> None:
        result = receipt.results[0] if receipt.results else None
        if receipt.status != "done" or result is None:
            self._lose(job, tell(receipt.failure) if receipt.failure else "it gave no result")
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
        if receipt.status == "stopped":  # a breaker let it through, and it failed
            self._requeue(job)
        elif receipt.status == "died" and receipt.cursor is None:
            self._lose(job, tell(failure) if failure else "its child died")
        elif receipt.status == "died" and failure is not None and (again := self._next_call(job, failure)) is not None:
            self._later(*again)
        elif receipt.status != "done" or failure is not None:
            failure = failure or Failure("", self._name(job), "crash", "RecordCrashedError", "it came back without a result")
            if receipt.status == "died":
                failure = replace(failure, attempts=len(job.earlier) + 1, earlier=job.earlier)
            self._append(Called(number, (), None, failure, *spent))
            reason: Reason = ("CallFailedError", (self.run_id, self._name(job), tell(failure)))
            self._fail(~number, failure, reason)
        elif receipt.growth is not None:
            graph, results = renumbered(receipt.growth, self.state)
            self._append(Grown(number, graph, results, receipt.growth.code, *spent))
            self._then(partial(self._called, number))
        else:
            made = tuple(ref for ref in receipt.results if ref is not None)
            self._append(Called(number, made, receipt.choice, None, *spent))
            self._then(partial(self._called, number))

    def _next_call(self, job: CallJob, failure: Failure) -> tuple[CallJob, float] | None:
        return next_call(self.rules(~job.task), job, failure, f"{self.run_id}/call{job.call}")

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
        self._lanes.drop(lambda job: job.node in gone)
        hit = [submit for submit in self.inflight.values() if any(job.node in gone for job in submit.jobs)]
        self._cancel(hit)
        for job in (job for submit in hit for job in submit.jobs):
            if job.node not in gone:
                self._requeue(job)

    def _cancel(self, submits: Sequence[Submit]) -> None:
        if submits:
            self._out.append(Cancel(tuple(submit.attempt for submit in submits)))
        for submit in submits:
            self._lanes.back(submit.attempt)

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
            if self._accepts(number):
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
                if not self._accepts(number):
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
        self._lanes.drop(lambda job: job.node == number and isinstance(job, ChunkJob))
        late = self._late(number)
        if late:
            self._out.append(Yield(tuple(submit.attempt for submit in late)))
            self._ring((number, REST), REST_SECONDS)

    def _late(self, number: int) -> list[Submit]:
        return [s for s in self.inflight.values() if s.unit == number and isinstance(s.jobs[0], ChunkJob)]

    def _end_rest(self, number: int) -> None:
        """End what has not come back of pieces that nobody waits for."""
        self._cancel(self._late(number))

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
        self._fail(number, *refusal(self.run_id, self.state, number, self.tolerance))

"""The run's state machine: stimuli in, instructions out. No thread, clock, file or Dask in it.

The executor (and the simulator, with the same code) tells the coordinator what happened and carries out what it asks for,
in order. Each decision that must outlive the process is an entry: it is applied to the state here and handed out as an
`Append`. What can't be taken back (a merge, a barrier, publishing, what needs a value, the end) waits until the executor has
said that the entries it rests on are durable; more work of the same kind need not, since the journal is durable in the order
of its entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from parflow.core.attempts import Reason, judge, next_call, tell
from parflow.core.barriers import REST, Barriers
from parflow.core.dataflow import Dataflow, Verdict
from parflow.core.entries import (
    Called,
    ChunksListed,
    Decided,
    Grown,
    Merged,
    PieceEnded,
    RunEnded,
    Turned,
)
from parflow.core.growth import renumbered
from parflow.core.history import RunState
from parflow.core.lanes import UNDOING, Lanes, Rank, lane_of
from parflow.core.pieces import around, rest_of, without_part
from parflow.core.rules import RulesOf, free
from parflow.core.signals import (
    BatchLost,
    BatchReturned,
    Bell,
    Broke,
    Durable,
    Finish,
    Instruction,
    List,
    Listed,
    Rang,
    SinkPublished,
    SlotsChanged,
    Stands,
    Stimulus,
    StopRequested,
    Submit,
    Survey,
    Yield,
)
from parflow.core.undoing import Undoing
from parflow.model import (
    CallJob,
    ChunkJob,
    Failure,
    Job,
    MergeJob,
    Piece,
    Receipt,
    UndoJob,
    record_key,
)

MAX_LOSSES = 4
"""How often a job's worker may vanish, or the job come back untouched, before the run is ended (infrastructure's fault)."""


class Coordinator(Barriers):
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
    compensate : bool
        Undo all that can be undone when the run fails.

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

    def __init__(
        self,
        run_id: str,
        state: RunState,
        *,
        window: int = 2,
        rules: RulesOf = free,
        grace: float = 30.0,
        compensate: bool = False,
    ) -> None:
        if state.started is None or state.owned is None:
            raise ValueError("the state has no RunStarted and Owned entries")
        targets = state.started.targets or tuple(
            (number, output) for number, facts in enumerate(state.started.stages) for output in range(len(facts.kinds))
        )
        lanes = Lanes(state.owned.epoch, rules, window, self._ring, lambda *turn: self._append(Turned(*turn)))
        super().__init__(run_id, state, Dataflow(state, targets), lanes, rules)
        self.grace = grace
        self.compensate = compensate
        self.finished = False
        self._targets = targets
        self._undoing = Undoing(run_id, state, lanes, self._append, self._survey)
        self._owing = 0  # records whose undoing waits until it's durable that they failed
        self._losses: dict[Job, int] = {}
        self._yielding: set[str] = set()  # batches that were asked to come back, and may do so untouched
        self._alone = False  # there is no cluster any more
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
        if (was := self.state.compensating) is not None:  # nothing is done any more, only undone
            self.ending = RunEnded(was.status, was.error, was.arguments)
            self.compensate = True
            return self._settle()
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
                self._written(count)
            case SinkPublished(entry):
                if self.state.ended is None:  # otherwise the next coordinator asks for it again
                    self._append(entry)
                    self._then(partial(self._flow.provide, (entry.stage, entry.output)))
            case Rang(bell):
                self._rang(bell)
            case Broke() | StopRequested() | Stands():
                self._asked_to_end(stimulus)

    def _asked_to_end(self, stimulus: Broke | StopRequested | Stands) -> None:
        match stimulus:
            case Broke(error, arguments):
                self._end("failed", error, *arguments)
                self._alone = self._alone or error == "ClusterLostError" or not self.slots
            case Stands(effects):
                self._undoing.stands(effects)
            case StopRequested(now, status, compensate):
                self.compensate = self.compensate or compensate
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
                self._cancel([submit for submit in self.inflight.values() if not isinstance(submit.jobs[0], UndoJob)])
            case (int(stage), int(output)):
                self._overdue.add((stage, output))
                self._look(stage)
                if output == REST:
                    self._end_rest(stage)

    # --- deciding ----------------------------------------------------------------------------------------------------

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
        elif self._may_undo:
            if self.compensate and all(isinstance(submit.jobs[0], UndoJob) for submit in self.inflight.values()):
                self._undoing.begin(self.ending)
            self._out += self._lanes.fill(UNDOING)
        if self.ending is not None and not self.inflight and not self.finished and not self._undoes:
            if self.state.ended is None:
                self.ending = self._undoing.ended(self.ending)
                self._append(self.ending)
            if self._durable >= self._tickets:
                self.finished = True
                self._out.append(Finish(self.ending))
        out, self._out = self._out, []
        return out

    def _survey(self) -> None:
        self._then(lambda: self._out.append(Survey()))

    @property
    def _may_undo(self) -> bool:
        """Whether the run ends as nobody wanted it, with workers that can undo what it did."""
        return self.ending is not None and self.ending.status in ("failed", "cancelled") and not self._alone

    @property
    def _undoes(self) -> bool:
        """Whether something is left to be undone, or may be once what was decided is durable."""
        return self._may_undo and (self._undoing.busy or self._owing > 0)

    def _owe(self, number: int, record: str) -> None:
        self._owing -= 1
        self._undoing.owe(number, record)

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
        self._undoing.owe(node, *stage.owed)
        pending = () if stage.is_cut else tuple(stage.pending.values())
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
        if stage.is_cut:  # nobody waits for it any more
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
        untouched = not any(receipts) and attempt not in self._yielding
        self._yielding.discard(attempt)
        for job, receipt in zip(batch.jobs, receipts, strict=True):
            if isinstance(job, UndoJob):
                self._undoing.back(job, receipt)
                if job.unit >= 0:
                    self._then(partial(self._look, job.unit))
                continue
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
            self._yielding.update(tripped)

    def _lose(self, job: Job, reason: str) -> None:
        if not isinstance(job, UndoJob) and (job.node in self._flow.failed or self._is_late(job)):
            return
        self._requeue(job)
        self._losses[job] = self._losses.get(job, 0) + 1
        if self._losses[job] >= MAX_LOSSES:
            names = {MergeJob: "a merge", CallJob: "the call", UndoJob: "what undoes it"}
            what = f"chunk {job.piece.chunk}" if isinstance(job, ChunkJob) else names[type(job)]
            why = f"{what} was lost {self._losses[job]} times: {reason}"
            self._end("failed", "StepError", self.run_id, self._name(job), why)

    def _name(self, job: Job) -> str:
        unit = lane_of(job)[0]
        return self.state.stages[unit].facts.name if unit >= 0 else self.state.tasks[~unit].name

    def _requeue(self, job: Job) -> None:
        if isinstance(job, ChunkJob):
            self._enqueue(job.stage, job.piece, fresh=False)
        elif isinstance(job, CallJob):
            self._push(job, (0, 0, job.call, 0))
        elif isinstance(job, UndoJob):
            self._undoing.push(job)
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
        dead = receipt.status == "died" and failure is not None and self.rules(number).compensates
        undo = record_key(number, stage.chunks[piece.chunk].chunk, at) if dead else ""
        self._append(PieceEnded(number, piece, rest, committed, failure, undo))
        if undo:
            self._owing += 1
            self._then(partial(self._owe, number, undo))
        if not stage.chunks[piece.chunk].pending:
            self._then(partial(self._trees.chunk_ready, number, piece.chunk))
        self._then(partial(self._look, number))
        for part in rest:
            if part.alone and delay:
                self._later(self._job(number, part), delay)
            else:
                self._enqueue(number, part, fresh=False)
        if self.tolerance.hopeless(stage.failed, stage.records) and not self._accepts(number) and not stage.is_cut:
            self._refuse(number)

    def _job(self, number: int, piece: Piece) -> ChunkJob:
        stage = self.state.stages[number]
        return ChunkJob(number, piece, stage.chunks[piece.chunk].chunk, stage.redrives)

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
        self._lanes.drop(lambda job: job.node in gone and not isinstance(job, UndoJob))
        work = [submit for submit in self.inflight.values() if not isinstance(submit.jobs[0], UndoJob)]
        hit = [submit for submit in work if any(job.node in gone for job in submit.jobs)]
        self._cancel(hit)
        for job in (job for submit in hit for job in submit.jobs):
            if job.node not in gone:
                self._requeue(job)

    def _fail(self, node: int, failure: Failure, reason: Reason) -> None:
        """Give a node up. Whoever needs it fails with it; a decision over branches judges it."""
        if node in self._flow.failed:
            return
        self._reasons[node] = failure, reason
        self._flow.fail(node)
        if self._flow.lost is None:
            self._drop([node])

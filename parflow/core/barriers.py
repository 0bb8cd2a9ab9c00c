"""Where a stage ends: barriers that open when all records are accounted for, at a deadline, or not at all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

from parflow.core.attempts import Reason, accepts, refusal
from parflow.core.dataflow import Dataflow
from parflow.core.desk import Desk
from parflow.core.entries import BarrierOpened, Cut, RunEnded
from parflow.core.history import RunState
from parflow.core.lanes import Lanes
from parflow.core.rules import RulesOf
from parflow.core.signals import Cancel, Publish, Submit, Yield
from parflow.core.trees import Trees
from parflow.model import Address, ChunkJob, Failure, Job
from parflow.policies import Tolerance

REST = -1
"""Rings, in an output's place, for what is left in flight of a stage when nobody waits for it any more."""
REST_SECONDS = 1.0


class Barriers(Desk):
    """Opens the barriers of a run's stages, and says what is there behind them.

    Parameters
    ----------
    run_id : str
        For messages.
    state : RunState
        The run.
    flow : Dataflow
        Who waits for what.
    lanes : Lanes
        What is queued and in flight.
    rules : callable
        Gives the policies of a stage.
    """

    def __init__(self, run_id: str, state: RunState, flow: Dataflow, lanes: Lanes, rules: RulesOf) -> None:
        super().__init__(state)
        self.run_id = run_id
        self.rules = rules
        self.tolerance = Tolerance(state.owned.max_failures if state.owned is not None else 0)
        self.ending: RunEnded | None = None
        self._flow = flow
        self._lanes = lanes
        self._trees = Trees(state, self._requeue, self._is_open)
        self._begun: set[int] = set()
        self._publishing: set[Address] = set()
        self._overdue: set[Address] = set()

    @abstractmethod
    def _requeue(self, job: Job) -> None:
        """Queue a job."""

    @abstractmethod
    def _fail(self, node: int, failure: Failure, reason: Reason) -> None:
        """Give a node up."""

    def _accepts(self, number: int) -> bool:
        return accepts(self.state.stages[number], self.rules(number), self.tolerance)

    def _cancel(self, submits: Sequence[Submit]) -> None:
        if submits:
            self._out.append(Cancel(tuple(submit.attempt for submit in submits)))
        for submit in submits:
            self._lanes.back(submit.attempt)

    def _look(self, number: int) -> None:
        """Open a stage's barrier when all of its records are accounted for, durably, and go on behind it."""
        stage = self.state.stages[number]
        if self.ending is not None or number not in self._flow.wanted or number in self._flow.failed:
            return
        if stage.complete and not stage.opened and self._settled(number):
            if self._accepts(number):
                self._append(BarrierOpened(number, stage.failed))
                self._then(partial(self._look, number))
            elif not stage.is_cut:  # else its value is there, whatever came too late
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
                if stage.is_cut:
                    self._release(number)

    def _is_late(self, job: Job) -> bool:
        """Tell whether nobody waits for a job any more: what becomes of it is no matter."""
        return isinstance(job, ChunkJob) and self.state.stages[job.stage].is_cut

    def _release(self, number: int) -> None:
        """Let go of a stage's pieces: what is queued stays undone, what is in flight comes back at its next record."""
        self._lanes.drop(lambda job: job.node == number and isinstance(job, ChunkJob))
        late = self._late(number)
        if late:
            self._out.append(Yield(tuple(submit.attempt for submit in late)))
            self._ring((number, REST), REST_SECONDS)

    def _late(self, number: int) -> list[Submit]:
        return [s for s in self._lanes.inflight.values() if s.unit == number and isinstance(s.jobs[0], ChunkJob)]

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

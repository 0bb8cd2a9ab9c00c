"""Undoing what was done outside: for records that failed with their child, and for a run that ends as nobody wanted it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from parflow.core.entries import Compensating, Entry, RunEnded, Undone
from parflow.core.history import RunState
from parflow.core.lanes import UNDOING, Lanes
from parflow.model import Failure, Receipt, UndoJob

MAX_DEATHS = 3
"""How often a child may end over what it undoes, before that is left as it stands."""


class Undoing:
    """Keeps what a run still has to undo.

    Parameters
    ----------
    run_id : str
        For messages.
    state : RunState
        The run.
    lanes : Lanes
        Where jobs are queued.
    append : callable
        Takes an entry.
    survey : callable
        Asks what stands, once the entry before is durable; `stands` is told.
    """

    def __init__(
        self, run_id: str, state: RunState, lanes: Lanes, append: Callable[[Entry], None], survey: Callable[[], None]
    ) -> None:
        self.run_id = run_id
        self.state = state
        self.lanes = lanes
        self.append = append
        self.survey = survey
        self._deaths: dict[UndoJob, int] = {}
        self._rank: dict[UndoJob, int] = {}
        self._waits = False
        self._known = False

    @property
    def busy(self) -> bool:
        """Whether something is queued, or has to be found."""
        return self._waits or self.lanes.has(UNDOING)

    def owe(self, stage: int, *records: str) -> None:
        """Undo what was done for records of a stage."""
        for record in records:
            self.push(UndoJob(stage, (record,)))

    def push(self, job: UndoJob) -> None:
        """Queue a job, the first ones first."""
        rank = self._rank.setdefault(job, len(self._rank))
        self.lanes.push(job, (0, rank, 0, 0))

    def begin(self, ending: RunEnded) -> None:
        """Undo all that the run did, before it ends."""
        if self._known or self._waits:
            return
        if self.state.compensating is None:
            assert ending.status in ("failed", "cancelled")
            self.append(Compensating(ending.status, ending.error, ending.arguments))
        self._waits = True
        self.lanes.solo = True
        self.survey()

    def stands(self, effects: tuple[tuple[int, str], ...]) -> None:
        """Take what stands, the newest first."""
        self._waits, self._known = False, True
        for unit, name in effects:
            self.push(UndoJob(unit, effects=(name,)))

    def back(self, job: UndoJob, receipt: Receipt | None, failures: tuple[Failure, ...] = ()) -> None:
        """Take what became of a job."""
        if receipt is not None and receipt.status == "done":
            failures = (receipt.failure,) if receipt.failure is not None else ()
        elif receipt is None or receipt.status == "stopped":
            self.push(job)
            return
        else:
            self._deaths[job] = self._deaths.get(job, 0) + 1
            if self._deaths[job] < MAX_DEATHS:
                self.push(job)
                return
            why = receipt.failure or Failure("", "undo", "crash", "RecordCrashedError", "its child died")
            failures = (replace(why, attempts=MAX_DEATHS),)
        self.append(Undone(job.unit, (*job.records, *job.effects)[0], failures))

    def ended(self, ending: RunEnded) -> RunEnded:
        """Return how the run ends after all: as it was to, unless something stands that should not."""
        stuck, was = self.state.stuck, self.state.compensating
        if was is None or not stuck:
            return ending
        first = f"{stuck[0].step}: {stuck[0].error}: {stuck[0].message}"
        return RunEnded("compensation_failed", "CompensationFailedError", (self.run_id, len(stuck), first))

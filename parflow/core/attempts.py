"""What follows from a failure: another attempt, after some time, or a dead letter; and how many of these are tolerated."""

from __future__ import annotations

from dataclasses import replace

from parflow.core.history import RunState
from parflow.core.rules import Rules
from parflow.core.state import StageState
from parflow.model import CallJob, Counts, Failure, Piece
from parflow.policies import Retry, Tolerance

Reason = tuple[str, tuple[str | float, ...]]
"""The name of an error, and its arguments."""
Tried = tuple[tuple[str, str], ...]
"""Attempts that ended a child: the step of each, and how it ended."""


def judge(rules: Rules, piece: Piece, failure: Failure | None, key: str) -> tuple[Failure | None, Tried, float]:
    """Decide on the record that was in hand when a child ended.

    Parameters
    ----------
    rules : Rules
        Of its stage.
    piece : Piece
        That it was in.
    failure : Failure or None
        How it ended; without ``attempts`` it may as well have been another record's fault.
    key : str
        What chance is drawn from.

    Returns
    -------
    tuple
        The dead letter, if the record is given up; else None, all attempts at it, and the seconds before the next one.
    """
    if failure is None or not failure.attempts:
        return None, piece.earlier, 0.0
    tried = (*piece.earlier, (failure.step, _line(failure)))
    attempts = sum(step == failure.step for step, _ in tried)
    retry = rules.retries.get(failure.step)
    delay = _delay(retry, failure, attempts, key)
    if delay is not None:
        return None, tried, delay
    if not _covers(retry, failure) and not piece.alone and failure.cause != "timeout":
        return None, tried, 0.0  # it may have been chance: only a record that is alone is condemned
    return replace(failure, attempts=len(tried), earlier=tuple(line for _, line in tried[:-1])), tried, 0.0


def next_call(rules: Rules, job: CallJob, failure: Failure, key: str) -> tuple[CallJob, float] | None:
    """Return the next attempt at a call that ended its child, and the seconds before it; None to give it up."""
    retry = rules.retries.get(failure.step)
    delay = _delay(retry, failure, len(job.earlier) + 1, key)
    if delay is None and (_covers(retry, failure) or job.alone or failure.cause == "timeout"):
        return None
    return CallJob(job.call, job.task, alone=True, earlier=(*job.earlier, _line(failure))), delay or 0.0


def accepts(stage: StageState, rules: Rules, tolerance: Tolerance) -> bool:
    """Tell whether so many failures of a stage are tolerated, those of a step with a tolerance of its own apart."""
    if stage.accepted >= stage.failed:
        return True
    failed = stage.failed
    for step, own in rules.tolerances.items():
        count = stage.steps.get(step, Counts()).failed
        failed -= count
        if not own.accepts(count, stage.records):
            return False
    return tolerance.accepts(failed, stage.records)


def refusal(run_id: str, state: RunState, number: int, tolerance: Tolerance) -> tuple[Failure, Reason]:
    """Say why a stage is given up: more of its records failed than are tolerated."""
    stage, tally = state.stages[number], state.tally
    first = stage.lost[0].message if stage.lost else stage.rejected[0].message if stage.rejected else ""
    if not first:
        told = (tell(r.failure) for at, r in stage.pieces() if r.failure is not None and stage.stands(at, r.failure))
        first = next(told, "see the list")
    reason: Reason = ("TooManyFailuresError", (run_id, tally.failed, tally.records, tolerance.max_failures, first))
    what = f"{stage.failed} of {stage.records} records failed; first: {first}"
    return Failure("", stage.facts.name, "exception", reason[0], what), reason


def tell(failure: Failure) -> str:
    """Say in a line what failed."""
    where = f" ({failure.record})" if failure.record else ""
    return f"{failure.error}: {failure.message}{where}"


def _line(failure: Failure) -> str:
    return f"{failure.error}: {failure.message}"


def _covers(retry: Retry | None, failure: Failure) -> bool:
    return retry is not None and retry.names(failure.bases)


def _delay(retry: Retry | None, failure: Failure, attempts: int, key: str) -> float | None:
    """Return the seconds before the next attempt at what ended its child so often; None when there is to be none."""
    if retry is None or not _covers(retry, failure):
        return None
    waited = sum(retry.delay(attempt, key) for attempt in range(1, attempts))
    return retry.after(attempts, waited, key)

"""The coordinator under policies: attempts and their waits, limits, rates, breakers, tolerance, and what is undone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parflow.core.coordinator import Coordinator
from parflow.core.entries import (
    Accepted,
    ChunksListed,
    Compensating,
    Entry,
    Owned,
    PieceEnded,
    RunEnded,
    RunStarted,
    Turned,
    Undone,
)
from parflow.core.history import fold
from parflow.core.lanes import UNDOING, WORK, lane_of
from parflow.core.rules import FREE, Rules
from parflow.core.signals import (
    Append,
    BatchLost,
    BatchReturned,
    Cancel,
    Durable,
    Instruction,
    Listed,
    Rang,
    Ring,
    SlotsChanged,
    Stands,
    StopRequested,
    Submit,
    Survey,
    Yield,
)
from parflow.model import (
    CallFacts,
    CallJob,
    Chunk,
    ChunkJob,
    Counts,
    Cursor,
    Failure,
    Part,
    Receipt,
    Ref,
    StageFacts,
    Tally,
    TaskFacts,
    UndoJob,
    record_key,
)
from parflow.policies import Breaker, Retry, Tolerance

T = TypeVar("T")
RECORDS = 4
GONE = Failure("r", "step", "crash", "RecordCrashedError", "died", ("parflow.errors.RecordCrashedError", "builtins.Exception"))


def chunks(count: int, stage: int = 0) -> Listed:
    return Listed(
        ChunksListed(stage, tuple(Chunk(i, f"id{i}", (Part(f"f{i}", 0, None, 9, "1"),), 9) for i in range(count)), last=True)
    )


class Story:
    """A coordinator, all that it asked for, and an executor that writes at once."""

    def __init__(
        self, rules: Rules = FREE, *, slots: int = 2, calls: int = 0, history: Iterable[Entry] = (), **options: Any
    ) -> None:
        stage = StageFacts("read", ("step",), ("sum",), ("reduce",))
        tasks = (TaskFacts("step"),) if calls else ()
        started = RunStarted("flow", "", () if calls else (stage,), 16, {}, tasks, (CallFacts(task=0),) * calls)
        if calls:
            started = replace(started, targets=tuple((~number, 0) for number in range(calls)))
        self.entries: list[Entry] = [*history] or [started]
        self.entries.append(Owned(1, "me", options.pop("max_failures", 0)))
        self.coordinator = Coordinator("run", fold(self.entries), rules=lambda _: rules, window=2, **options)
        self.asked: list[Instruction] = []
        self.do(self.coordinator.start())
        self.tell(SlotsChanged(slots))

    def tell(self, *stimuli: Any) -> list[Instruction]:
        asked: list[Instruction] = []
        for stimulus in stimuli:
            asked += self.do(self.coordinator.handle(stimulus))
        return asked

    def do(self, asked: list[Instruction]) -> list[Instruction]:
        every, new = list(asked), list(asked)
        while tickets := [append.ticket for append in only(Append, new)]:
            self.entries += [append.entry for append in only(Append, new)]
            new = self.coordinator.handle(Durable(tickets[-1]))
            every += new
        self.asked += every
        return every

    @property
    def flying(self) -> list[Submit]:
        return [*self.coordinator.inflight.values()]

    def back(self, submit: Submit, *receipts: Receipt | None) -> list[Instruction]:
        return self.tell(BatchReturned(submit.attempt, receipts))

    @property
    def ended(self) -> RunEnded | None:
        return self.coordinator.state.ended

    def again(self, rules: Rules = FREE, **options: Any) -> Story:
        """Go on with what was written, as another process would."""
        return Story(rules, history=self.entries, **options)


def only(kind: type[T], instructions: Iterable[object]) -> list[T]:
    return [instruction for instruction in instructions if isinstance(instruction, kind)]


def written(kind: type[T], story: Story) -> list[T]:
    return only(kind, story.entries)


def done(job: Any, *, failed: int = 0, bad: int = 0, tripped: str = "") -> Receipt:
    counts = {"step": Counts(failed=failed, calls=RECORDS, bad=bad)}
    return Receipt("done", results=(Ref(1, "d", b"x"),), tally=Tally(RECORDS, failed, 0, 0.5), steps=counts, tripped=tripped)


def died(ordinal: int = 1, failure: Failure = GONE) -> Receipt:
    return Receipt("died", Cursor(ordinal, 0, ordinal), failure=replace(failure, chunk=0, ordinal=ordinal))


# --- attempts ---------------------------------------------------------------------------------------------------------


def test_the_next_attempt_at_a_record_waits_as_its_retry_says() -> None:
    story = Story(Rules(retries={"step": Retry(4, wait=1, jitter=0)}), max_failures=1)
    story.tell(chunks(1))
    for wait in (1.0, 2.0, 4.0):
        (submit,) = [submit for submit in story.flying if any(job.alone or wait == 1 for job in submit.jobs)]
        (ring,) = only(Ring, story.back(submit, died()))
        assert (ring.bell[0], ring.seconds) == ("again", wait)
        assert not any(job.alone for submit in story.flying for job in submit.jobs)
        story.tell(Rang(ring.bell))
    (submit,) = [submit for submit in story.flying if any(job.alone for job in submit.jobs)]
    story.back(submit, died())
    (given_up,) = [entry for entry in written(PieceEnded, story) if entry.failure is not None]
    assert given_up.failure is not None
    assert (given_up.failure.attempts, len(given_up.failure.earlier)) == (4, 3)


def test_attempts_are_counted_on_when_the_run_is_resumed() -> None:
    rules = Rules(retries={"step": Retry(2, wait=0)})
    story = Story(rules, max_failures=1)
    story.tell(chunks(1))
    story.back(story.flying[0], died())
    resumed = story.again(rules, max_failures=1)
    (submit,) = [submit for submit in resumed.flying if submit.jobs[0].alone]
    resumed.back(submit, died())
    assert [entry.failure.attempts for entry in written(PieceEnded, resumed) if entry.failure] == [2]


def test_what_may_have_been_another_record_costs_no_attempt() -> None:
    story = Story(Rules(retries={"step": Retry(2, wait=0)}))
    story.tell(chunks(1))
    story.back(story.flying[0], died(failure=replace(GONE, attempts=0)))
    (alone,) = [job for submit in story.flying for job in submit.jobs if job.alone]
    assert isinstance(alone, ChunkJob)
    assert alone.piece.earlier == ()


def test_a_worker_that_vanishes_costs_no_attempt() -> None:
    story = Story(Rules(retries={"step": Retry(1)}))
    story.tell(chunks(1))
    story.tell(BatchLost(story.flying[0].attempt, "gone"))
    ((job,),) = [submit.jobs for submit in story.flying]
    assert isinstance(job, ChunkJob)
    assert job.piece.earlier == ()


def test_a_call_that_ended_its_child_is_made_again_after_a_while() -> None:
    story = Story(Rules(retries={"step": Retry(2, wait=3, jitter=0)}), calls=1)
    (ring,) = only(Ring, story.back(story.flying[0], died()))
    assert ring.seconds == 3
    assert story.flying == []
    story.tell(Rang(ring.bell))
    assert story.flying[0].jobs == (CallJob(0, 0, True, ("RecordCrashedError: died",)),)
    story.back(story.flying[0], died())
    assert story.ended is not None
    assert story.ended.error == "CallFailedError"


# --- limits and rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_more_batches_are_in_flight_than_the_limit(limit: int) -> None:
    story = Story(Rules(limit=limit), slots=8)
    story.tell(chunks(9))
    while story.flying:
        assert len([submit for submit in story.flying if lane_of(submit.jobs[0])[1] == WORK]) <= limit
        submit = story.flying[0]
        story.back(submit, *(done(job) for job in submit.jobs))
    assert story.ended is not None
    assert story.ended.status == "succeeded"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 40))
def test_shares_of_a_rate_never_add_up_to_more_than_all_of_it(slots: list[int], count: int) -> None:
    story = Story(Rules(rated=frozenset({"step"})), slots=slots[0])
    story.tell(chunks(count))
    for number in range(10**6):
        work = [submit for submit in story.flying if lane_of(submit.jobs[0])[1] == WORK]
        assert sum(submit.share for submit in work) <= 1 + 1e-6
        if not story.flying:
            break
        story.tell(SlotsChanged(slots[number % len(slots)]))
        submit = story.flying[0]
        story.back(submit, *(done(job) for job in submit.jobs))
    assert story.ended is not None
    assert story.ended.status == "succeeded"


# --- breakers ---------------------------------------------------------------------------------------------------------

BREAKER = Rules(breakers={"step": Breaker(failures=0.5, window=4, reset=7)})


def test_while_a_breaker_is_open_nothing_of_its_step_is_sent_and_what_flies_yields() -> None:
    story = Story(BREAKER, slots=2, max_failures=99)
    story.tell(chunks(6))
    first, second = story.flying
    asked = story.back(first, done(first.jobs[0], bad=4, failed=4))
    assert only(Yield, asked) == [Yield((second.attempt,))]
    assert only(Ring, asked) == [Ring(("reset", 0, "step"), 7.0)]
    story.back(second, done(second.jobs[0]))
    assert story.flying == []
    (probe,) = only(Submit, story.tell(Rang(("reset", 0, "step"))))
    assert (probe.probe, len(probe.jobs)) == (True, 1)
    assert only(Submit, story.tell(SlotsChanged(5))) == []


def test_a_batch_that_yields_to_a_breaker_before_it_began_is_not_lost() -> None:
    story = Story(BREAKER, slots=2, max_failures=99)
    story.tell(chunks(12))
    for _ in range(6):
        (first, second) = story.flying
        story.back(first, *(done(job, bad=4) for job in first.jobs))
        story.back(second, *[None] * len(second.jobs))
        (probe,) = only(Submit, story.tell(Rang(("reset", 0, "step"))))
        story.back(probe, *map(done, probe.jobs))
    assert not story.coordinator.finished


def test_a_probe_that_fails_keeps_the_breaker_open_and_its_record_waits() -> None:
    story = Story(BREAKER, slots=1, max_failures=99)
    story.tell(chunks(3))
    story.back(story.flying[0], done(None, bad=4, failed=4))
    (probe,) = only(Submit, story.tell(Rang(("reset", 0, "step"))))
    bad = Receipt("stopped", Cursor(), steps={"step": Counts(calls=1, bad=1)}, tripped="step")
    assert only(Ring, story.back(probe, bad)) == [Ring(("reset", 0, "step"), 7.0)]
    (again,) = only(Submit, story.tell(Rang(("reset", 0, "step"))))
    assert again.jobs == probe.jobs
    good = Receipt("stopped", Cursor(1, 0, 1), (Ref(1, "d", b"x"),), tally=Tally(1), steps={"step": Counts(calls=1)})
    (onward,) = only(Submit, story.back(again, good))
    assert not onward.probe
    assert [entry.to for entry in written(Turned, story)] == ["open", "probing", "open", "probing", "closed"]


def test_a_record_that_never_reaches_the_step_proves_nothing() -> None:
    story = Story(BREAKER, slots=1, max_failures=99)
    story.tell(chunks(3))
    story.back(story.flying[0], done(None, bad=4, failed=4))
    (probe,) = only(Submit, story.tell(Rang(("reset", 0, "step"))))
    passed = Receipt("stopped", Cursor(1, 0, 1), (Ref(1, "d", b"x"),), tally=Tally(1))
    (another,) = only(Submit, story.back(probe, passed))
    assert another.probe


def test_few_calls_open_no_breaker_and_old_ones_are_forgotten() -> None:
    story = Story(BREAKER, slots=1, max_failures=99)
    story.tell(chunks(9))
    for bad in (1, 1, 1, 1):  # of four calls each
        story.back(story.flying[0], *(done(None, bad=bad) for _ in story.flying[0].jobs))
    assert written(Turned, story) == []


# --- tolerance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "status"), [(2, "succeeded"), (1, "failed"), (0.5, "succeeded"), (0.4, "failed")])
def test_a_step_with_a_tolerance_of_its_own_is_judged_by_it_alone(own: float, status: str) -> None:
    story = Story(Rules(tolerances={"step": Tolerance(own)}))
    story.tell(chunks(1))
    while story.flying:
        submit = story.flying[0]
        story.back(submit, *(done(job, failed=2) for job in submit.jobs))
    assert story.ended is not None
    assert story.ended.status == status


def test_what_was_accepted_opens_the_barrier_and_one_more_does_not() -> None:
    def fail(story: Story, failed: int) -> Story:
        while story.flying:
            story.back(story.flying[0], *(done(job, failed=failed) for job in story.flying[0].jobs))
        return story

    story = Story()
    story.tell(chunks(1))
    fail(story, 2)
    for accepted, status in ((2, "succeeded"), (1, "failed")):
        again = Story(history=[*story.entries, Accepted(0, accepted, "Ada")])
        ended = fail(again, 0).ended
        assert ended is not None
        assert ended.status == status


# --- undoing ----------------------------------------------------------------------------------------------------------

UNDO = Rules(compensates=True)


def test_a_barrier_waits_until_what_a_lost_record_did_is_undone() -> None:
    story = Story(UNDO, max_failures=1)
    story.tell(chunks(1))
    story.back(story.flying[0], died())
    (alone,) = [submit for submit in story.flying if submit.jobs[0].alone]
    story.back(alone, died())
    (undo,) = [submit for submit in story.flying if lane_of(submit.jobs[0])[1] == UNDOING]
    chunk = story.coordinator.state.stages[0].chunks[0].chunk
    assert undo.jobs == (UndoJob(0, (record_key(0, chunk, Cursor(1, 0, 1)),)),)
    while others := [submit for submit in story.flying if submit != undo]:
        story.back(others[0], *map(done, others[0].jobs))
    assert not story.coordinator.finished
    resumed = story.again(UNDO, max_failures=1)  # owed still
    (undo,) = resumed.flying
    resumed.back(undo, Receipt("done", tally=Tally(1)))
    while resumed.flying:
        resumed.back(resumed.flying[0], *map(done, resumed.flying[0].jobs))
    assert resumed.ended is not None
    assert resumed.ended.status == "succeeded"


def failing(**options: Any) -> Story:
    story = Story(UNDO, compensate=True, **options)
    story.tell(chunks(1))
    while story.flying:
        story.back(story.flying[0], *(done(job, failed=1) for job in story.flying[0].jobs))
    return story


EFFECTS = tuple((0, f"effect{number}") for number in range(5))


def undone(story: Story, receipt: Callable[[UndoJob], Receipt]) -> list[str]:
    """Undo what is asked for; returns it in order."""
    order: list[str] = []
    while story.flying:
        (submit,) = story.flying  # one after the other
        jobs = only(UndoJob, submit.jobs)
        assert len(jobs) == len(submit.jobs)
        order += [job.effects[0] for job in jobs]
        story.back(submit, *map(receipt, jobs))
    return order


def test_a_run_that_fails_undoes_what_it_did_the_newest_first_and_then_ends() -> None:
    story = failing()
    assert len(only(Survey, story.asked)) == 1
    assert not story.coordinator.finished
    story.tell(Stands(EFFECTS))
    assert undone(story, lambda _: Receipt("done", tally=Tally(1))) == [name for _, name in EFFECTS]
    assert story.ended is not None
    assert (story.ended.status, story.ended.error) == ("failed", "TooManyFailuresError")
    assert [entry.key for entry in written(Undone, story)] == [name for _, name in EFFECTS]


def test_what_cannot_be_undone_makes_another_end_and_is_tried_once_more_by_a_resume() -> None:
    story = failing()
    story.tell(Stands(EFFECTS))
    stuck = Failure("r", "step", "exception", "UndoFailedError", "no")
    undone(story, lambda job: Receipt("done", failure=stuck if job.effects == ("effect3",) else None, tally=Tally(1)))
    assert story.ended is not None
    assert story.ended.status == "compensation_failed"
    assert story.ended.arguments[:2] == ("run", 1)
    again = story.again(UNDO)
    assert (len(only(Survey, again.asked)), only(Submit, again.asked)) == (1, [])
    again.tell(Stands(EFFECTS[3:4]))
    undone(again, lambda _: Receipt("done", tally=Tally(1)))
    assert again.ended is not None
    assert again.ended.status == "failed"


def test_a_run_that_dies_while_it_undoes_goes_on_undoing_and_does_nothing_else() -> None:
    story = failing()
    story.tell(Stands(EFFECTS))
    assert len(written(Compensating, story)) == 1
    again = story.again(UNDO)
    assert only(Submit, again.asked) == []
    again.tell(Stands(EFFECTS[2:]))
    assert undone(again, lambda _: Receipt("done", tally=Tally(1))) == [name for _, name in EFFECTS[2:]]
    assert again.ended is not None
    assert again.ended.status == "failed"
    assert len(written(Compensating, again)) == 1


def test_an_undoing_that_ends_its_child_again_and_again_is_left_standing() -> None:
    story = failing()
    story.tell(Stands(EFFECTS[:1]))
    assert undone(story, lambda _: died()) == ["effect0"] * 3
    assert story.ended is not None
    assert story.ended.status == "compensation_failed"


def test_a_cancelled_run_undoes_what_it_did_when_it_is_asked_to() -> None:
    story = Story(UNDO)
    story.tell(chunks(1))
    story.tell(StopRequested(status="cancelled", compensate=True))
    story.back(story.flying[0], done(None))
    assert len(only(Survey, story.asked)) == 1
    story.tell(Stands(EFFECTS))
    undone(story, lambda _: Receipt("done", tally=Tally(1)))
    assert story.ended is not None
    assert story.ended.status == "cancelled"


def test_a_stopped_run_undoes_nothing() -> None:
    story = Story(UNDO, compensate=True)
    story.tell(chunks(1))
    story.tell(StopRequested())
    story.back(story.flying[0], done(None))
    assert only(Survey, story.asked) == []


# --- the end ----------------------------------------------------------------------------------------------------------


def test_what_does_not_come_back_when_the_run_ends_is_cancelled_after_a_while() -> None:
    story = Story(grace=5)
    story.tell(chunks(2))
    flying = story.flying
    assert Ring(("grace",), 5) in story.tell(StopRequested())
    assert only(Cancel, story.tell(Rang(("grace",)))) == [Cancel(tuple(submit.attempt for submit in flying))]
    assert story.ended is not None
    assert story.ended.status == "stopped"


# --- all at once ------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_under_any_policies_no_record_is_lost_and_no_bound_is_passed(seed: int) -> None:
    """Chunks come back done, in part, bad, or with a dead child; breakers open; processes are replaced; all is counted."""
    rng = random.Random(seed)
    rules = Rules(
        retries={"step": Retry(rng.randint(1, 4), wait=rng.choice([0, 1]))} if rng.random() < 0.7 else {},
        breakers={"step": Breaker(failures=rng.choice([0.3, 1]), window=rng.randint(1, 8), reset=1)}
        if rng.random() < 0.7
        else {},
        limit=rng.choice([None, 1, 2]),
        rated=frozenset({"step"} if rng.random() < 0.5 else ()),
        compensates=rng.random() < 0.5,
    )
    count = rng.randint(1, 8)
    story = Story(rules, slots=rng.randint(1, 4), max_failures=10**6)
    story.tell(chunks(count))
    bells: list[Ring] = only(Ring, story.asked)
    seen = len(story.asked)
    for _ in range(5000):
        if story.ended is not None:
            break
        if rng.random() < 0.02:
            story, bells, seen = story.again(rules, slots=rng.randint(1, 4), max_failures=10**6), [], 0
        work = [submit for submit in story.flying if lane_of(submit.jobs[0])[1] == WORK]
        assert rules.limit is None or len(work) <= rules.limit
        assert not rules.rated or sum(submit.share for submit in work) <= 1 + 1e-6
        stands = story.coordinator.state.breakers.get((0, "step"), "closed")
        assert stands != "probing" or sum(submit.probe for submit in work) <= 1
        if story.flying and (rng.random() < 0.8 or not bells):
            submit = rng.choice(story.flying)
            opened = stands == "open"
            yielding = {attempt for asked in only(Yield, story.asked) for attempt in asked.attempts}
            asked = story.back(submit, *(result(rng, job, submit, yields=submit.attempt in yielding) for job in submit.jobs))
            assert not opened or not [s for s in only(Submit, asked) if lane_of(s.jobs[0])[1] == WORK]
        elif bells:
            story.tell(Rang(bells.pop(rng.randrange(len(bells))).bell))
        bells += only(Ring, story.asked[seen:])
        seen = len(story.asked)
    assert story.ended is not None
    assert story.ended.status == "succeeded"
    stage = story.coordinator.state.stages[0]
    assert stage.records == RECORDS * count
    assert stage.owed == {}


def result(rng: random.Random, job: Any, submit: Submit, *, yields: bool) -> Receipt | None:
    """Return something that may become of a job."""
    if isinstance(job, UndoJob):
        return rng.choice([Receipt("done", tally=Tally(1)), Receipt("stopped", Cursor(1)), died()])
    if not isinstance(job, ChunkJob):
        return Receipt("done", results=(Ref(1, "d", b"x"),))
    piece = job.piece
    stop = RECORDS if piece.stop is None else piece.stop
    if piece.first >= stop:  # nobody knew that the chunk ends here
        return Receipt("done", results=(Ref(1, "d", b"x"),))
    luck = rng.random()
    if luck < 0.1 and yields:
        return None
    if luck < 0.25:
        at = rng.randrange(piece.first, stop)
        return died(at, replace(GONE, attempts=rng.choice([0, 1, 1])) if not job.alone else GONE)
    if submit.probe and luck < 0.5:
        return Receipt("stopped", piece.start, steps={"step": Counts(calls=1, bad=1)}, tripped="step")
    end = piece.first + 1 if submit.probe or luck < 0.4 else stop
    records = end - piece.first
    bad = rng.randint(0, records)
    return Receipt(
        "done" if end == stop else "stopped",
        None if end == stop else Cursor(end, 0, end),
        (Ref(1, "d", b"x"),),
        tally=Tally(records, bad),
        steps={"step": Counts(failed=bad, calls=records, bad=bad)},
    )

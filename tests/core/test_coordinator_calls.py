"""The coordinator's rules for calls, decisions over branches, growth and stages that rest on them, one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

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
    RunStarted,
)
from parflow.core.history import fold
from parflow.core.signals import (
    Append,
    BatchLost,
    Cancel,
    Durable,
    Instruction,
    List,
    Publish,
    Ring,
    SinkPublished,
    SlotsChanged,
    StopRequested,
    Submit,
    Yield,
)
from parflow.model import (
    Address,
    CallFacts,
    CallJob,
    CallKind,
    Cause,
    ChunkJob,
    Cursor,
    Failure,
    GraphFacts,
    Growth,
    Job,
    MergeJob,
    Piece,
    Receipt,
    Ref,
    StageFacts,
    Tally,
    TaskFacts,
)
from tests.core.test_coordinator import back, done, entries, listing, only, pieces

# --- how to say it briefly -------------------------------------------------------------------------------------------

VALUE = Ref(1, "d", inline=b"v")
MADE = Receipt("done", results=(VALUE,))


def at(*calls: int) -> tuple[Address, ...]:
    """The addresses of the first results of calls."""
    return tuple((~number, 0) for number in calls)


def call(*needs: Address, task: int = 0, results: int = 1) -> CallFacts:
    return CallFacts("call", task, needs, results=results)


def choose(*arms: Address, needs: tuple[Address, ...] = ()) -> CallFacts:
    return CallFacts("choose", 0, needs, arms)


def decide(kind: CallKind, *arms: Address, count: int = 1) -> CallFacts:
    return CallFacts(kind, -1, (), arms, count)


def stage(
    *kinds: str, needs: tuple[Address, ...] = (), base: Address | None = None, buckets: tuple[int, ...] = ()
) -> StageFacts:
    return StageFacts("read", ("read",), kinds, kinds, needs=needs, base=base, buckets=buckets)


def begin(
    *calls: CallFacts,
    stages: tuple[StageFacts, ...] = (),
    targets: tuple[Address, ...] = (),
    history: Iterable[Entry] = (),
    slots: int = 8,
    max_failures: float = 0,
) -> Story:
    """A run of a graph, or one that has a history already; the last call is its target, if no other is named."""
    tasks = tuple(TaskFacts(name) for name in ("work", "other"))
    started = RunStarted("flow", "", stages, 2, {}, tasks, calls, targets or at(len(calls) - 1))
    return Story(Coordinator("run", fold([started, *history, Owned(1, "me", max_failures)]), window=1), slots)


class Story:
    """Tells a coordinator what happens; what it writes is durable at once, unless the disk is ``slow``."""

    def __init__(self, coordinator: Coordinator, slots: int) -> None:
        self.coordinator = coordinator
        self.slow = False
        self.written: list[Entry] = []
        self.asked: list[Instruction] = []
        self.take(coordinator.start())
        self.tell(SlotsChanged(slots))

    def tell(self, stimulus: object) -> list[Instruction]:
        return self.take(self.coordinator.handle(stimulus))  # type: ignore[arg-type]

    def take(self, new: list[Instruction]) -> list[Instruction]:
        seen: list[Instruction] = []
        while new:
            seen += new
            appends = only(Append, new)
            self.written += [append.entry for append in appends]
            new = self.coordinator.handle(Durable(appends[-1].ticket)) if appends and not self.slow else []
        self.asked += seen
        return seen

    def flush(self) -> list[Instruction]:
        """Make durable what was written on a slow disk."""
        self.slow = False
        return self.take(self.coordinator.handle(Durable(len(self.written))))

    @property
    def flying(self) -> list[Job]:
        return [job for submit in self.coordinator.inflight.values() for job in submit.jobs]

    @property
    def calls(self) -> list[int]:
        """The calls in flight."""
        return sorted(job.call for job in only(CallJob, self.flying))

    def batch(self, node: int) -> Submit:
        return next(s for s in self.coordinator.inflight.values() if any(job.node == node for job in s.jobs))

    def comes(self, number: int, receipt: Receipt = MADE) -> list[Instruction]:
        """Let a call come back."""
        return self.tell(back(self.batch(~number), receipt))

    def fails(self, number: int) -> list[Instruction]:
        return self.comes(number, Receipt("done", failure=failure()))

    def works(self, number: int, *texts: str, **tally: int) -> list[Instruction]:
        """Let a job of a stage come back, with a result for each of its outputs."""
        results = tuple(Ref(len(text), text, inline=text.encode()) for text in texts)
        return self.tell(back(self.batch(number), Receipt("done", results=results, tally=Tally(**tally))))

    def ended(self) -> str:
        return ", ".join(f"{ended.status} {ended.error}".strip() for ended in entries(RunEnded, self.asked))


def failure(cause: Cause = "exception") -> Failure:
    return Failure("", "work", cause, "ValueError", "no")


def died(cause: Cause) -> Receipt:
    return Receipt("died", Cursor(), failure=failure(cause))


# --- what is begun ---------------------------------------------------------------------------------------------------


def test_a_call_begins_when_all_that_it_needs_is_durable() -> None:
    story = begin(call(), call(), call(*at(0, 1)))
    assert story.calls == [0, 1]
    story.comes(0)
    assert story.calls == [1]
    story.slow = True
    story.comes(1)
    assert story.calls == []
    story.flush()
    assert story.calls == [2]
    story.comes(2)
    assert story.ended() == "succeeded"


def test_a_call_that_nobody_wants_is_not_made() -> None:
    story = begin(call(), call(), targets=at(0))
    assert story.calls == [0]
    story.comes(0)
    assert story.ended() == "succeeded"


def test_calls_of_one_task_travel_together_and_those_of_two_do_not() -> None:
    facts = (*(call(*at(0)) for _ in range(9)), *(call(*at(0), task=1) for _ in range(9)))
    story = begin(call(), *facts, targets=at(*range(1, 19)), slots=1)
    story.comes(0, Receipt("done", results=(VALUE,), tally=Tally(seconds=0.001)))
    batches = [*story.coordinator.inflight.values()]
    assert [batch.unit for batch in batches] == [~1]
    story.tell(back(batches[0], *(Receipt("done", results=(VALUE,), tally=Tally(seconds=0.001)) for _ in batches[0].jobs)))
    (batch,) = story.coordinator.inflight.values()
    assert len(batch.jobs) > 1
    assert len({job.task for job in only(CallJob, batch.jobs)}) == 1


def test_all_results_of_a_call_are_kept_in_their_order() -> None:
    story = begin(call(results=2), call((~0, 1)))
    two = (VALUE, Ref(1, "e", inline=b"w"))
    story.comes(0, Receipt("done", results=two))
    assert entries(Called, story.asked)[0].results == two
    assert story.calls == [1]


def test_a_run_ends_when_its_targets_are_durable_and_not_before() -> None:
    story = begin(call())
    story.slow = True
    story.comes(0)
    assert story.ended() == ""
    story.flush()
    assert story.ended() == "succeeded"


# --- calls that go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["crash", "memory"])
def test_a_call_in_hand_when_its_child_ended_is_made_again_alone(cause: Cause) -> None:
    story = begin(call())
    story.comes(0, died(cause))
    assert entries(Called, story.asked) == []
    assert story.flying == [CallJob(0, 0, alone=True, earlier=("ValueError: no",))]
    story.comes(0)
    assert story.ended() == "succeeded"


def test_a_call_that_crashes_alone_has_failed() -> None:
    story = begin(call())
    story.comes(0, died("crash"))
    story.comes(0, died("crash"))
    twice = replace(failure("crash"), attempts=2, earlier=("ValueError: no",))
    assert entries(Called, story.asked) == [Called(0, failure=twice)]
    assert story.ended() == "failed CallFailedError"


def test_a_call_that_hangs_has_failed_at_once() -> None:
    story = begin(call())
    story.comes(0, died("timeout"))
    assert entries(Called, story.asked) == [Called(0, failure=failure("timeout"))]


def test_a_call_whose_worker_vanished_is_made_again_as_it_was() -> None:
    story = begin(call())
    story.tell(BatchLost(story.batch(~0).attempt, "gone"))
    assert story.flying == [CallJob(0, 0)]


def test_a_call_that_is_lost_four_times_ends_the_run_and_has_not_failed() -> None:
    story = begin(call())
    for _ in range(4):
        story.comes(0, Receipt("died", failure=failure("crash")))
    assert entries(Called, story.asked) == []
    (ended,) = entries(RunEnded, story.asked)
    assert (ended.error, ended.arguments[-1]) == ("StepError", "the call was lost 4 times: ValueError: no")


def test_a_failed_call_fails_those_who_need_it_and_ends_the_run() -> None:
    story = begin(call(), call(*at(0)), call(), targets=at(1, 2))
    asked = story.fails(0)
    assert only(Yield, asked) == [Yield((story.batch(~2).attempt,))]
    story.comes(2)
    (ended,) = entries(RunEnded, story.asked)
    assert ended == RunEnded("failed", "CallFailedError", ("run", "work", "ValueError: no"))
    assert story.coordinator.state.calls[2].results == (VALUE,)


# --- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [0, 1])
def test_only_the_branch_that_was_chosen_runs_once_the_choice_is_durable(choice: int) -> None:
    story = begin(call(), call(), choose(*at(0, 1)))
    assert story.calls == [2]
    story.slow = True
    story.comes(2, Receipt("done", choice=choice))
    assert story.calls == []
    story.flush()
    assert story.calls == [choice]
    story.comes(choice)
    assert story.ended() == "succeeded"


def test_a_stage_in_a_branch_is_listed_when_it_is_chosen() -> None:
    story = begin(choose((0, 0), (1, 0)), stages=(stage("collect"), stage("collect")))
    assert only(List, story.asked) == []
    assert only(List, story.comes(0, Receipt("done", choice=1))) == [List(1, 0)]


# --- decisions over branches -----------------------------------------------------------------------------------------


def test_to_settle_is_to_wait_for_all_and_to_tell_of_failures() -> None:
    story = begin(call(), call(), decide("settle", *at(0, 1)))
    story.fails(0)
    assert entries(Decided, story.asked) == []
    story.comes(1)
    assert entries(Decided, story.asked) == [Decided(2, (1,), {"0": failure()})]
    assert story.ended() == "succeeded"


def test_a_stage_with_too_many_failures_is_a_failed_branch() -> None:
    story = begin(decide("settle", (0, 0)), stages=(stage("collect"),))
    story.tell(listing(1))
    story.works(0, "", records=2, failed=1)
    (decided,) = entries(Decided, story.asked)
    assert (decided.picked, decided.failures["0"].error) == ((), "TooManyFailuresError")
    assert story.ended() == "succeeded"


def test_a_hopeless_branch_is_given_up_and_what_is_in_flight_of_it_ended() -> None:
    story = begin(call(), decide("settle", (0, 0), *at(0)), stages=(stage("collect"),))
    story.tell(listing(*[1] * 9))
    attempt = story.batch(0).attempt
    others = {submit.attempt for submit in story.coordinator.inflight.values() if submit.unit == 0} - {attempt}
    asked = story.works(0, "", records=300, failed=300)
    assert [set(cancel.attempts) for cancel in only(Cancel, asked)] == [others]
    assert story.flying == [CallJob(0, 0)]
    story.tell(listing(1, first=9))
    assert story.flying == [CallJob(0, 0)]


def test_a_race_is_won_by_the_first_that_is_durable_and_the_others_are_cancelled() -> None:
    story = begin(call(), call(), call(*at(1)), decide("race", *at(0, 2)))
    attempt = story.batch(~1).attempt
    story.slow = True
    story.comes(0)
    assert entries(Decided, story.asked) == []
    asked = story.flush()
    assert only(Cancel, asked) == [Cancel((attempt,))]
    assert entries(Decided, asked) == [Decided(3, (0,), {}, (~2, ~1))]
    assert story.ended() == "succeeded"


def test_what_comes_back_of_a_cancelled_attempt_does_not_count() -> None:
    story = begin(call(), call(), call(), decide("race", *at(0, 1)), targets=at(3, 2))
    late = story.batch(~1)
    story.comes(0)
    assert story.tell(back(late, MADE)) == []
    assert story.calls == [2]


def test_what_another_one_wants_is_not_cancelled() -> None:
    story = begin(call(), call(), decide("race", *at(0, 1)), targets=at(2, 1))
    story.comes(0)
    assert only(Cancel, story.asked) == []
    assert story.calls == [1]


def test_what_shares_a_batch_with_a_loser_is_sent_again() -> None:
    short = Receipt("done", results=(VALUE,), tally=Tally(seconds=0.001))
    story = begin(
        call(), *(call(*at(0)) for _ in range(8)), call(*at(0), task=1), decide("race", *at(9, 1)),
        targets=at(10, *range(2, 9)), slots=1,
    )  # fmt: skip
    story.tell(SlotsChanged(2))
    story.comes(0, short)
    shared = story.batch(~1)
    assert len(shared.jobs) > 1
    story.comes(9)
    while story.coordinator.inflight:
        batch = next(iter(story.coordinator.inflight.values()))
        assert ~1 not in [job.node for job in batch.jobs]
        story.tell(back(batch, *(short for _ in batch.jobs)))
    assert story.ended() == "succeeded"


def test_a_cancelled_stage_gets_no_merges_and_no_chunks_of_what_is_still_being_listed() -> None:
    story = begin(call(), decide("race", *at(0), (0, 0)), call(), stages=(stage("reduce"),), targets=at(1, 2))
    story.tell(listing(1, 1, last=False))
    story.slow = True
    story.works(0, "a")
    story.works(0, "b")
    story.comes(0)
    story.flush()
    story.tell(listing(1, first=2))
    assert entries(Decided, story.asked)[0].cancelled == (0,)
    assert story.flying == [CallJob(2, 0)]
    assert story.coordinator.state.stages[0].cancelled


def test_a_stage_that_is_wanted_again_goes_on_where_it_stood_and_is_not_listed_twice() -> None:
    again = choose((0, 0), needs=at(1))
    story = begin(call(), decide("race", *at(0), (0, 0)), again, stages=(stage("reduce"),), targets=at(1, 2))
    story.tell(listing(1, 1, last=False))
    story.works(0, "a")
    story.comes(0)
    assert story.calls == [2]
    story.comes(2, Receipt("done", choice=0))
    assert [job.piece for job in only(ChunkJob, story.flying)] == [Piece(1)]
    story.tell(listing(1, first=2))
    assert [job.piece.chunk for job in only(ChunkJob, story.flying)] == [1, 2]
    assert only(List, story.asked) == [List(0, 0)]


def test_a_merge_that_was_cancelled_is_made_again_when_it_is_wanted_again() -> None:
    again = choose((0, 0), needs=at(1))
    story = begin(call(), decide("race", *at(0), (0, 0)), again, stages=(stage("reduce"),), targets=at(1, 2))
    story.tell(listing(1))
    story.works(0, "a")
    (merge,) = only(MergeJob, story.flying)
    story.comes(0)
    story.comes(2, Receipt("done", choice=0))
    assert only(MergeJob, story.flying) == [merge]


def test_a_branch_that_failed_is_not_run_again_by_whoever_wants_it_later() -> None:
    story = begin(call(), decide("settle", *at(0)), choose(*at(0), needs=at(1)), decide("settle", *at(2)))
    story.fails(0)
    story.comes(2, Receipt("done", choice=0))
    assert story.flying == []
    assert entries(Decided, story.asked) == [Decided(1, (), {"0": failure()}), Decided(3, (), {"0": failure()})]


def test_a_decision_that_was_cancelled_as_it_could_be_taken_is_not_taken() -> None:
    story = begin(call(), decide("settle", *at(0)), call(*at(1)), decide("race", *at(0, 2)))
    story.comes(0)
    assert entries(Decided, story.asked) == [Decided(3, (0,), {}, (~2, ~1))]


def test_a_race_fails_with_its_last_branch() -> None:
    story = begin(call(), call(), decide("race", *at(0, 1)))
    story.fails(1)
    assert story.ended() == ""
    story.fails(0)
    assert story.ended() == "failed CallFailedError"


def test_a_quorum_takes_as_many_as_it_asks_for_in_their_order() -> None:
    story = begin(call(), call(), call(), decide("quorum", *at(0, 1, 2), count=2))
    story.comes(2)
    assert entries(Decided, story.asked) == []
    story.comes(0)
    assert entries(Decided, story.asked) == [Decided(3, (0, 2), {}, (~1,))]


def test_a_quorum_fails_as_soon_as_it_can_not_be_reached() -> None:
    story = begin(call(), call(), call(), decide("quorum", *at(0, 1, 2), count=2))
    story.fails(0)
    assert story.ended() == ""
    story.fails(1)
    story.comes(2)
    assert story.ended() == "failed CallFailedError"


# --- growth ----------------------------------------------------------------------------------------------------------


def test_a_graph_that_a_call_returned_runs_in_its_place_once_it_is_durable() -> None:
    story = begin(call(), call(*at(0)))
    inner = GraphFacts((stage("collect"),), (TaskFacts("new"),), (CallFacts("call", 0, ((0, 0),)),))
    story.slow = True
    story.comes(0, Receipt("done", growth=Growth(inner, at(0), "code")))
    assert only(List, story.asked) == []
    asked = story.flush()
    assert only(List, asked) == [List(0, 0)]
    story.tell(listing(1))
    story.works(0, "a")
    assert story.flying == [CallJob(2, 2)]
    story.comes(2)
    assert story.flying == [CallJob(1, 0)]
    (grown,) = entries(Grown, story.asked)
    assert (grown.results, grown.graph.calls[0].task) == (at(2), 2)


def test_what_grew_in_a_branch_that_nobody_wants_any_more_does_not_run() -> None:
    story = begin(call(), call(), decide("race", *at(0, 1)), call(), targets=at(2, 3))
    story.slow = True
    story.comes(0)
    story.comes(1, Receipt("done", growth=Growth(GraphFacts(calls=(call(),)), at(0), "code")))
    story.flush()
    assert story.calls == [3]


def test_two_graphs_that_grow_at_once_have_numbers_of_their_own() -> None:
    story = begin(call(), call(), call(*at(0, 1)))
    inner = Growth(GraphFacts(tasks=(TaskFacts("new"),), calls=(call(), call(*at(0)))), at(1), "code")
    story.comes(0, Receipt("done", growth=inner))
    story.comes(1, Receipt("done", growth=inner))
    assert story.calls == [3, 5]
    assert [grown.results for grown in entries(Grown, story.asked)] == [at(4), at(6)]


# --- stages that rest on others ----------------------------------------------------------------------------------------


def test_a_stage_is_listed_when_the_values_that_it_needs_are_durable() -> None:
    story = begin(call(), stages=(stage("collect", needs=at(0)),), targets=((0, 0),))
    assert only(List, story.asked) == []
    assert only(List, story.comes(0)) == [List(0, 0)]


def test_a_stage_goes_on_from_another_ones_list_once_that_is_closed_and_durable() -> None:
    story = begin(stages=(stage("collect"), stage("collect", base=(0, -1))), targets=((0, 0), (1, 0)))
    story.tell(listing(1, last=False))
    assert [job.node for job in story.flying] == [0]
    story.slow = True
    story.tell(listing(2, first=1))
    assert {job.node for job in story.flying} == {0}
    story.flush()
    assert [job.piece.chunk for job in only(ChunkJob, story.flying) if job.stage == 1] == [1, 0]
    assert entries(ChunksListed, story.asked)[-1] == ChunksListed(1, last=True)
    assert only(List, story.asked) == [List(0, 0)]


def test_a_stage_goes_on_from_what_another_one_kept_a_chunk_for_each_piece() -> None:
    story = begin(stages=(stage("collect"), stage("collect", base=(0, 0))), targets=((1, 0),))
    story.tell(listing(1, 1))
    story.works(0, "aa")
    assert {job.node for job in story.flying} == {0}
    story.works(0, "")
    (job,) = only(ChunkJob, story.flying)
    assert (job.stage, job.chunk.parts[0].data) == (1, b"aa")


def test_a_stage_that_goes_on_from_another_one_has_its_deadline_too() -> None:
    derived = StageFacts("read", (), ("r",), ("reduce",), base=(0, -1), deadlines=(9.0,), enough=(0.5,))
    story = begin(stages=(stage("collect"), derived), targets=((1, 0),))
    assert only(Ring, story.tell(listing(1))) == [Ring((1, 0), 9.0)]


def test_a_keyed_reduction_has_a_tree_of_merges_for_each_bucket() -> None:
    story = begin(stages=(stage("group", buckets=(2,)),), targets=((0, 0),))
    story.tell(listing(1, 1, 1))
    for text in "abc":
        story.works(0, text)
    merged: list[tuple[int, int, int, bool]] = []
    while jobs := only(MergeJob, story.flying):
        merged.append((jobs[0].bucket, jobs[0].level, jobs[0].index, jobs[0].last))
        assert story.ended() == ""
        story.works(0, f"{jobs[0].bucket}.{jobs[0].level}.{jobs[0].index}")
    assert sorted(merged) == [(b, *node) for b in (0, 1) for node in ((1, 0, False), (1, 1, False), (2, 0, True))]
    assert story.ended() == "succeeded"
    roots = [ref.inline for ref in story.coordinator.state.stages[0].kept(0)]
    assert roots == [b"0.2.0", b"1.2.0"]


def test_a_call_waits_until_a_sink_is_published_durably() -> None:
    story = begin(call((0, 0)), stages=(stage("sink"),))
    story.tell(listing())
    assert only(Publish, story.asked) == [Publish(0, 0)]
    assert story.calls == []
    story.slow = True
    story.tell(SinkPublished(Published(0, 0)))
    assert story.calls == []
    story.flush()
    assert story.calls == [0]


# --- going on --------------------------------------------------------------------------------------------------------


def test_on_resume_a_made_call_is_not_made_again_and_a_failed_one_is() -> None:
    story = begin(call(), call(), call(*at(0, 1)), history=[Called(0, (VALUE,)), Called(1, failure=failure())])
    assert story.calls == [1]
    story.comes(1)
    assert story.calls == [2]
    assert story.coordinator.state.calls[1].failure is None


def test_on_resume_a_choice_stands() -> None:
    story = begin(call(), call(), choose(*at(0, 1)), history=[Called(2, choice=1)])
    assert story.calls == [1]


def test_on_resume_a_decision_stands_and_its_losers_rest() -> None:
    history: list[Entry] = [Called(1, (VALUE,)), Decided(2, (1,), {}, (~0,))]
    story = begin(call(), call(), decide("race", *at(0, 1)), call(*at(2)), history=history)
    assert story.calls == [3]


def test_on_resume_a_race_that_was_not_decided_is_decided_on_what_is_there() -> None:
    story = begin(call(), call(), decide("race", *at(0, 1)), history=[Called(1, (VALUE,))])
    assert entries(Decided, story.asked) == [Decided(2, (1,), {}, (~0,))]


def test_on_resume_what_grew_goes_on() -> None:
    grown = Grown(0, GraphFacts(calls=(call(), call(*at(2)))), at(3), "code")
    story = begin(call(), call(*at(0)), history=[grown, Called(2, (VALUE,))])
    assert story.calls == [3]


def test_on_resume_a_derived_stage_has_the_chunks_that_it_had() -> None:
    stages = (stage("collect"), stage("collect", base=(0, 0)))
    kept: list[Entry] = [
        PieceEnded(0, Piece(0), receipt=done("aa")),
        PieceEnded(0, Piece(1), receipt=done("bb")),
        BarrierOpened(0),
    ]
    listed: list[Entry] = [listing(1, 1).entry, *kept, ChunksListed(1, last=True), PieceEnded(1, Piece(0), receipt=done("a"))]
    story = begin(stages=stages, targets=((1, 0),), history=listed)
    (job,) = only(ChunkJob, story.flying)
    assert (job.stage, job.piece, job.chunk.parts[0].data) == (1, Piece(1), b"bb")
    assert only(List, story.asked) == []


def test_on_resume_the_buckets_that_lack_their_root_get_it() -> None:
    history: list[Entry] = [
        listing(1).entry,
        PieceEnded(0, Piece(0), receipt=done("a")),
        BarrierOpened(0),
        Merged(0, 0, 1, 0, VALUE),
    ]
    story = begin(stages=(stage("group", buckets=(2,)),), targets=((0, 0),), history=history)
    assert [job.bucket for job in only(MergeJob, story.flying)] == [1]
    assert pieces(story.asked) == []


def test_a_stopped_run_decides_nothing_and_the_next_one_does() -> None:
    story = begin(call(), call(), decide("race", *at(0, 1)))
    story.slow = True
    story.comes(0)
    story.tell(StopRequested())
    story.flush()
    assert entries(Decided, story.asked) == []
    story.comes(1)
    assert story.ended() == "stopped RunStoppedError"
    again = begin(call(), call(), decide("race", *at(0, 1)), history=story.written)
    assert [(decided.call, decided.cancelled) for decided in entries(Decided, again.asked)] == [(2, ())]

"""The coordinator's rules for barriers with a deadline, and for making up for what was late."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parflow.core.barriers import REST
from parflow.core.bindings import bind
from parflow.core.coordinator import MAX_LOSSES, Coordinator
from parflow.core.entries import (
    BarrierOpened,
    Called,
    Cut,
    Decided,
    Entry,
    Merged,
    Owned,
    PieceEnded,
    Published,
    Redriven,
    RunEnded,
    RunStarted,
    decode,
    encode,
)
from parflow.core.history import fold
from parflow.core.signals import (
    Append,
    BatchLost,
    Cancel,
    Durable,
    Finish,
    Instruction,
    List,
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
from parflow.model import (
    Address,
    CallFacts,
    CallJob,
    ChunkJob,
    Cursor,
    Failure,
    Job,
    MergeJob,
    Receipt,
    Ref,
    StageFacts,
    Tally,
    TaskFacts,
)
from tests.core.test_coordinator import at, back, done, entries, listing, only

DUE = 60.0
LATER = 90.0

# --- one stage and a call ----------------------------------------------------------------------------------------------


def facts(*kinds: str, deadlines: Iterable[float] = (DUE,), enough: float = 0.0, needs: tuple[Address, ...] = ()) -> StageFacts:
    """A stage whose first outputs have deadlines; the others have none."""
    names = kinds or ("reduce",)
    due = (*deadlines, *(0.0 for _ in names))[: len(names)]
    return StageFacts("read", ("read",), names, names, needs=needs, deadlines=due, enough=tuple(enough for _ in names))


def begun(stage: StageFacts) -> list[Entry]:
    """A run of that stage, and of a call that needs its first output."""
    targets = ((~0, 0), *((0, output) for output in range(1, len(stage.kinds))))
    return [RunStarted("f", "", (stage,), 16, {}, (TaskFacts("use"),), (CallFacts("call", 0, ((0, 0),)),), targets)]


class Story:
    """Tells a coordinator what happens, and has all that it decides written at once."""

    def __init__(self, history: Iterable[Entry], *, max_failures: float = 0) -> None:
        self.history = [*history, Owned(1, "me", max_failures)]
        self.coordinator = Coordinator("run", fold(self.history), window=1)
        self.asked: list[Instruction] = []
        self.take(self.coordinator.start())

    def take(self, new: list[Instruction]) -> list[Instruction]:
        seen: list[Instruction] = []
        while new:
            seen += new
            appends = only(Append, new)
            self.history += [append.entry for append in appends]
            new = self.coordinator.handle(Durable(appends[-1].ticket)) if appends else []
        self.asked += seen
        return seen

    def tell(self, *stimuli: Stimulus) -> list[Instruction]:
        return [asked for stimulus in stimuli for asked in self.take(self.coordinator.handle(stimulus))]

    @property
    def stage(self) -> StageState:
        return self.coordinator.state.stages[0]

    def flying(self, kind: type = object) -> list[Submit]:
        return [submit for submit in self.coordinator.inflight.values() if isinstance(submit.jobs[0], kind)]

    def receipt(self, job: Job, **changes: object) -> Receipt:
        outputs = len(self.stage.facts.kinds) if isinstance(job, ChunkJob) else 1
        ref = Ref(1, "d", inline=b"x")
        return replace(done("x"), results=(ref,) * outputs, **changes)  # type: ignore[arg-type]

    def finish(self, kind: type, **changes: object) -> list[Instruction]:
        """Send back the first batch of a kind of job that is in flight."""
        submit = self.flying(kind)[0]
        return self.tell(back(submit, *(self.receipt(job, **changes) for job in submit.jobs)))

    def come_to_an_end(self) -> RunEnded:
        """Do all that is asked, and nothing else."""
        while not self.coordinator.finished:
            publish = [one for one in only(Publish, self.asked) if one.output not in self.stage.published]
            if publish:
                self.tell(SinkPublished(Published(publish[0].stage, publish[0].output)))
            else:
                self.finish(object)
        return only(Finish, self.asked)[-1].ended

    def again(self, *more: Entry, max_failures: float = 0) -> Story:
        """The same run, gone on with by a coordinator that knows nothing but what was written."""
        story = Story([*self.history, *more], max_failures=max_failures)
        story.tell(SlotsChanged(2))
        return story


def two_chunks(stage: StageFacts, *, max_failures: float = 0) -> Story:
    """Both chunks are in flight."""
    story = Story(begun(stage), max_failures=max_failures)
    story.tell(SlotsChanged(2), listing(5, 5))
    return story


def one_is_late(stage: StageFacts, *, max_failures: float = 0) -> Story:
    """The first of two chunks is done, the second in flight, when the deadline passes."""
    story = two_chunks(stage, max_failures=max_failures)
    story.finish(ChunkJob)
    story.tell(Rang((0, 0)))
    return story


def kinds(history: Iterable[Entry]) -> Counter[type]:
    return Counter(map(type, history))


# --- when it opens -----------------------------------------------------------------------------------------------------


def test_the_alarm_is_set_when_the_stage_begins() -> None:
    assert only(Ring, Story(begun(facts())).asked) == [Ring((0, 0), DUE)]


def test_the_alarm_of_a_stage_that_waits_for_a_value_is_set_when_that_is_there() -> None:
    use = CallFacts("call", 0)
    story = Story([RunStarted("f", "", (facts(needs=((~0, 0),)),), 16, {}, (TaskFacts("make"),), (use,), ((0, 0),))])
    assert only(Ring, story.tell(SlotsChanged(1))) == []
    assert only(Ring, story.finish(CallJob)) == [Ring((0, 0), DUE)]


def test_past_the_deadline_what_is_there_is_merged_and_the_rest_let_go() -> None:
    story = two_chunks(facts())
    story.finish(ChunkJob)
    (late,) = story.flying()
    asked = story.tell(Rang((0, 0)))
    (cut,) = entries(Cut, asked)
    assert (cut.share, [piece.chunk for piece in cut.late]) == (0.5, [1])
    assert only(Yield, asked) == [Yield((late.attempt,))]
    assert only(Ring, asked) == [Ring((0, REST), 1.0)]
    (merge,) = (job for submit in story.flying(MergeJob) for job in submit.jobs)
    assert merge == MergeJob(0, 0, 1, 0, story.stage.leaves[0], last=True, bucket=-1)
    story.tell(back(late, story.receipt(late.jobs[0])))
    assert story.come_to_an_end().status == "succeeded"


def test_a_deadline_before_the_list_is_closed_waits_for_the_list() -> None:
    story = Story(begun(facts()))
    story.tell(SlotsChanged(2), listing(5, last=False))
    story.finish(ChunkJob)
    assert entries(Cut, story.tell(Rang((0, 0)))) == []
    assert len(entries(Cut, story.tell(listing(5, first=1)))) == 1


def test_a_deadline_before_enough_is_there_opens_as_soon_as_it_is() -> None:
    story = Story(begun(facts(enough=0.75)))
    story.tell(SlotsChanged(2), listing(6, 5, 5, 4))
    story.finish(ChunkJob)
    assert entries(Cut, story.tell(Rang((0, 0)))) == []
    assert entries(Cut, story.finish(ChunkJob)) == []
    (cut,) = entries(Cut, story.finish(ChunkJob))
    assert cut.share == 0.8


def test_where_all_is_asked_for_the_deadline_never_cuts() -> None:
    story = two_chunks(facts(enough=1.0))
    story.finish(ChunkJob)
    story.tell(Rang((0, 0)))
    assert story.come_to_an_end().status == "succeeded"
    assert kinds(story.history)[Cut] == 0
    assert kinds(story.history)[BarrierOpened] == 1


def test_a_stage_that_completes_in_time_is_never_cut() -> None:
    story = two_chunks(facts())
    story.finish(ChunkJob)
    story.finish(ChunkJob)
    story.tell(Rang((0, 0)))
    assert story.come_to_an_end().status == "succeeded"
    assert kinds(story.history)[Cut] == 0


def test_a_deadline_while_the_last_piece_is_being_written_is_in_time() -> None:
    story = two_chunks(facts())
    story.finish(ChunkJob)
    (last,) = story.flying()
    appends = only(Append, story.coordinator.handle(back(last, story.receipt(last.jobs[0]))))
    assert story.coordinator.handle(Rang((0, 0))) == []
    asked = story.coordinator.handle(Durable(appends[-1].ticket))
    assert entries(BarrierOpened, asked)
    assert not entries(Cut, asked)


def test_a_cut_waits_for_what_it_rests_on_to_be_written_and_its_merge_for_the_cut() -> None:
    story = two_chunks(facts())
    coordinator, first = story.coordinator, story.flying()[0]
    (ended,) = only(Append, coordinator.handle(back(first, story.receipt(first.jobs[0]))))
    assert coordinator.handle(Rang((0, 0))) == []
    asked = coordinator.handle(Durable(ended.ticket))
    assert entries(Cut, asked)
    assert only(Submit, asked) == []
    (merge,) = only(Submit, coordinator.handle(Durable(ended.ticket + 1)))
    assert isinstance(merge.jobs[0], MergeJob)


def test_more_pieces_than_one_merge_takes_are_merged_in_a_tree() -> None:
    story = Story(begun(facts()))
    story.tell(SlotsChanged(1), listing(5))
    for record in range(1, 18):
        story.finish(ChunkJob, status="stopped", cursor=at(record))
    story.tell(Rang((0, 0)), Rang((0, REST)))
    assert story.come_to_an_end().status == "succeeded"
    assert {(level, index) for _, _, level, index in story.stage.merged} == {(1, 0), (1, 1), (2, 0)}


def test_an_alarm_after_the_end_is_not_heard() -> None:
    story = two_chunks(facts())
    story.come_to_an_end()
    assert story.tell(Rang((0, 0)), Rang((0, REST))) == []


def test_with_nothing_there_the_value_is_a_merge_of_nothing() -> None:
    story = two_chunks(facts())
    asked = story.tell(Rang((0, 0)), Rang((0, REST)))
    (cut,) = entries(Cut, asked)
    assert (cut.share, len(cut.late)) == (0.0, 2)
    (merge,) = (job for submit in story.flying(MergeJob) for job in submit.jobs)
    assert (merge.inputs, merge.last) == ((), True)  # type: ignore[union-attr]
    assert story.come_to_an_end().status == "succeeded"


def test_the_part_of_a_chunk_that_is_done_is_in_the_value_but_not_in_the_share() -> None:
    story = two_chunks(facts())
    story.finish(ChunkJob, status="stopped", cursor=at(3))
    asked = story.tell(Rang((0, 0)))
    (cut,) = entries(Cut, asked)
    assert cut.share == 0.0
    assert {(piece.chunk, piece.first) for piece in cut.late} == {(0, 3), (1, 0)}
    assert len(story.stage.leaves[0]) == 1


@pytest.mark.parametrize(("tolerated", "status"), [(0, "failed"), (1, "succeeded")])
def test_over_more_dead_letters_than_tolerated_it_opens_for_nobody(tolerated: int, status: str) -> None:
    story = two_chunks(facts(), max_failures=tolerated)
    story.finish(ChunkJob, tally=Tally(5, 1, 0, 1.0))
    story.tell(Rang((0, 0)), Rang((0, REST)))
    ended = story.come_to_an_end()
    assert ended.status == status
    assert kinds(story.history)[Cut] == tolerated
    assert ended.error == ("" if tolerated else "TooManyFailuresError")


# --- other outputs of the same stage -----------------------------------------------------------------------------------


def test_a_sibling_without_a_deadline_gets_all_of_the_input() -> None:
    story = one_is_late(facts("reduce", "reduce"))
    assert not only(Yield, story.asked)
    assert story.come_to_an_end().status == "succeeded"
    assert set(story.stage.merged) == {(0, -1, 1, 0), (1, 0, 1, 0)}
    assert len(story.stage.results(1)) == 2
    assert len(story.stage.leaves[0]) == 1


def test_what_rests_on_the_early_value_does_not_wait_for_the_sibling() -> None:
    story = one_is_late(facts("reduce", "reduce"))
    story.finish(MergeJob)
    assert entries(Called, story.finish(CallJob))
    assert story.flying(ChunkJob)


def test_a_sink_beside_it_is_published_when_all_of_the_input_is_there() -> None:
    story = one_is_late(facts("reduce", "sink"))
    story.finish(MergeJob)
    story.finish(CallJob)
    assert only(Publish, story.asked) == []
    assert only(Publish, story.finish(ChunkJob)) == [Publish(0, 1)]
    assert story.come_to_an_end().status == "succeeded"


def test_two_deadlines_open_one_after_the_other_and_the_last_lets_the_rest_go() -> None:
    story = two_chunks(facts("reduce", "reduce", deadlines=(DUE, LATER)))
    assert only(Ring, story.asked) == [Ring((0, 0), DUE), Ring((0, 1), LATER)]
    asked = story.tell(Rang((0, 0)))
    assert (len(entries(Cut, asked)), only(Yield, asked)) == (1, [])
    story.finish(ChunkJob)
    asked = story.tell(Rang((0, 1)))
    assert [(cut.output, cut.share) for cut in entries(Cut, asked)] == [(1, 0.5)]
    assert len(only(Yield, asked)) == 1
    assert [len(story.stage.leaves[output]) for output in (0, 1)] == [0, 1]


# --- what nobody waits for any more ------------------------------------------------------------------------------------


def test_what_does_not_yield_in_time_is_ended() -> None:
    story = one_is_late(facts())
    (late,) = story.flying(ChunkJob)
    assert only(Cancel, story.tell(Rang((0, REST)))) == [Cancel((late.attempt,))]
    assert story.come_to_an_end().status == "succeeded"


def test_a_run_whose_value_is_there_ends_when_what_is_late_is_ended() -> None:
    story = one_is_late(facts())
    story.finish(MergeJob)
    assert only(Finish, story.finish(CallJob)) == []
    assert [one.ended.status for one in only(Finish, story.tell(Rang((0, REST))))] == ["succeeded"]


def test_a_run_that_is_stopped_meanwhile_waits_no_longer_either() -> None:
    story = one_is_late(facts())
    (merge,) = story.flying(MergeJob)
    story.tell(StopRequested(), back(merge, None))
    assert [one.ended.status for one in only(Finish, story.tell(Rang((0, REST))))] == ["stopped"]


def test_a_late_result_is_kept_for_a_redrive_but_stays_out_of_the_value() -> None:
    story = one_is_late(facts())
    story.finish(ChunkJob)
    assert story.come_to_an_end().status == "succeeded"
    assert len(story.stage.leaves[0]) == 1
    again = story.again(Redriven(((0, 0),)))
    assert again.flying(ChunkJob) == []
    assert again.come_to_an_end().status == "succeeded"
    assert len(again.stage.results(0)) == 2


def test_of_a_chunk_that_yields_late_a_redrive_runs_only_the_rest() -> None:
    story = one_is_late(facts())
    story.finish(ChunkJob, status="stopped", cursor=at(3))
    story.come_to_an_end()
    (submit,) = story.again(Redriven(((0, 0),))).flying(ChunkJob)
    assert [job.piece.first for job in only(ChunkJob, submit.jobs)] == [3]


def test_what_was_lost_often_before_the_deadline_may_be_lost_again_after_it() -> None:
    story = two_chunks(facts())
    story.finish(ChunkJob)
    for _ in range(MAX_LOSSES - 1):
        story.tell(BatchLost(story.flying()[0].attempt, "its worker vanished"))
    (late,) = story.flying()
    story.tell(Rang((0, 0)), BatchLost(late.attempt, "its worker vanished"))
    assert story.come_to_an_end().status == "succeeded"


@pytest.mark.parametrize(
    "receipt",
    [
        None,
        Receipt("broken", failure=Failure("", "read", "exception", "OSError", "no space")),
        Receipt("died", failure=Failure("", "read", "crash", "RecordCrashedError", "died")),
        Receipt("died", at(0), failure=Failure("r0", "read", "timeout", "RecordTimeoutError", "60 s")),
        replace(done(records=500, failed=500), results=(None,)),
    ],
    ids=["never begun", "broken", "died", "timed out", "hopeless"],
)
def test_however_late_work_ends_it_does_not_end_the_run(receipt: Receipt | None) -> None:
    story = one_is_late(facts())
    (late,) = story.flying(ChunkJob)
    story.tell(back(late, receipt))
    assert story.come_to_an_end().status == "succeeded"
    assert story.again().come_to_an_end().status == "succeeded"  # nor when somebody else goes on with it


def test_dead_letters_among_what_was_late_count_when_it_is_made_up_for() -> None:
    story = one_is_late(facts())
    story.finish(ChunkJob, tally=Tally(5, 1, 0, 1.0))
    assert story.come_to_an_end().status == "succeeded"
    again = story.again(Redriven(((0, 0),)))
    assert again.come_to_an_end().error == "TooManyFailuresError"
    assert again.again(max_failures=1).come_to_an_end().status == "succeeded"


# --- going on with it --------------------------------------------------------------------------------------------------


def test_a_run_that_is_resumed_between_the_cut_and_its_merge_makes_that_merge_and_nothing_else() -> None:
    again = one_is_late(facts()).again()
    assert only(Ring, again.asked) == []
    assert [type(job) for submit in again.flying() for job in submit.jobs] == [MergeJob]
    assert again.come_to_an_end().status == "succeeded"
    assert kinds(again.history)[PieceEnded] == 1


def test_a_run_that_is_resumed_after_the_merge_goes_on_behind_it() -> None:
    story = one_is_late(facts())
    story.finish(MergeJob)
    assert [type(job) for submit in story.again().flying() for job in submit.jobs] == [CallJob]


def test_a_run_that_is_resumed_before_its_deadline_gets_all_of_its_time_again() -> None:
    story = two_chunks(facts())
    story.finish(ChunkJob)
    assert only(Ring, story.again().asked) == [Ring((0, 0), DUE)]


def test_a_redrive_forgets_the_early_value_and_all_that_rests_on_it_and_nothing_else() -> None:
    story = one_is_late(facts())
    story.tell(Rang((0, REST)))
    story.come_to_an_end()
    state = fold([*story.history, Redriven(((0, 0),))])
    (stage,) = state.stages
    assert (stage.cuts, stage.leaves, stage.merged) == ({}, {}, {})
    assert [chunk.pending for chunk in stage.chunks] == [0, 1]
    assert not state.calls[0].ended


def test_a_redrive_waits_for_all_however_late() -> None:
    story = one_is_late(facts())
    story.tell(Rang((0, REST)))
    story.come_to_an_end()
    again = story.again(Redriven(((0, 0),)))
    assert only(Ring, again.asked) == []
    assert again.come_to_an_end().status == "succeeded"
    assert kinds(again.history) == kinds(story.history) + Counter(
        {Redriven: 1, Owned: 1, PieceEnded: 1, BarrierOpened: 1, Merged: 1, Called: 1, RunEnded: 1}
    )


def test_a_deadline_that_rests_on_another_is_not_cut_when_it_is_made_again() -> None:
    first, second = facts(), facts(needs=((0, 0),))
    story = Story([RunStarted("f", "", (first, second), 16, targets=((1, 0),))])
    story.tell(SlotsChanged(4), listing(5, 5))
    story.finish(ChunkJob)
    story.tell(Rang((0, 0)), Rang((0, REST)))
    story.finish(MergeJob)
    story.tell(listing(5, 5, stage=1), Rang((1, 0)), Rang((1, REST)))
    story.come_to_an_end()
    assert kinds(story.history)[Cut] == 2
    again = story.again(Redriven(((0, 0), (1, 0))))
    assert again.come_to_an_end().status == "succeeded"
    assert only(Ring, again.asked) == []
    assert kinds(again.history)[PieceEnded] == 2 + 2  # what the first stage had done is not done again


# --- a whole workflow --------------------------------------------------------------------------------------------------

UP, USE, BOTH = 0, 1, 2  # the calls; the third settles what is early and what is not
LATE, SAME, AFTER = 0, 1, 2  # the stages: one with a deadline, another of the same chunks, and one after the deadline
RECORDS = 3
GRAPH = (
    StageFacts("late", (), ("sum",), ("reduce",), needs=((~UP, 0),), deadlines=(DUE,), enough=(0.0,)),
    StageFacts("same", (), ("sum",), ("reduce",), base=(LATE, -1)),
    StageFacts("after", (), ("file", "sum"), ("sink", "reduce"), needs=((~USE, 0),)),
)
CALLS = (CallFacts("call", UP), CallFacts("call", USE, ((LATE, 0),)), CallFacts("settle", arms=((~USE, 0), (SAME, 0))))
TARGETS: tuple[Address, ...] = ((LATE, 0), (SAME, 0), (AFTER, 0), (AFTER, 1), (~BOTH, 0))


class World:
    """Runs that workflow. What is late hangs until it's ended; time passes when there is nothing else to do, or by chance."""

    def __init__(self, chunks: int, late: set[int], *, seed: int | None = None, fan_in: int = 2) -> None:
        self.chunks, self.late, self.chance = chunks, late, random.Random(seed)
        self.calm = seed is None
        started = RunStarted("f", "", GRAPH, fan_in, {}, (TaskFacts("up"), TaskFacts("use")), CALLS, TARGETS)
        self.begin: list[Entry] = [started, Owned(1, "me", 0)]

    def go_on(self, history: Iterable[Entry]) -> list[Entry]:
        """Drive a run to its end and return all that is written of it then."""
        self.history = [*history]
        state = fold(self.history)
        self.lagging = not any(isinstance(entry, Redriven) for entry in self.history)
        self.state, self.asleep = state, set[str]()
        self.alarms: list[Ring] = []
        self.coordinator = coordinator = Coordinator("run", state, window=2)
        slots = SlotsChanged(2 if self.calm else self.chance.randint(1, 3))
        todo = self.obey(coordinator.start())
        todo.append(slots)
        while not coordinator.finished:
            stimulus = todo.pop(0) if todo else self.next()
            todo += self.obey(coordinator.handle(stimulus))
            for stage in state.stages:
                assert stage.weight == sum(chunk.chunk.weight for chunk in stage.chunks)
                assert stage.ended == sum(chunk.chunk.weight for chunk in stage.chunks if not chunk.pending)
        assert self.history[-1] == RunEnded("succeeded")
        return self.history

    def obey(self, instructions: list[Instruction]) -> list[Stimulus]:
        facts: list[Stimulus] = []
        for instruction in instructions:
            match instruction:
                case Append(entry, ticket):
                    self.history.append(decode(*encode(entry)))
                    facts.append(Durable(ticket))
                case List(stage, skip):
                    count = self.chunks if stage == LATE else 2
                    facts.append(listing(*[5] * (count - skip), stage=stage, first=skip))
                case Publish(stage, output):
                    written = "".join(text(ref) for ref in self.state.stages[stage].results(output))
                    facts.append(SinkPublished(Published(stage, output, {"rows": written})))
                case Ring():
                    self.alarms.append(instruction)
                case Yield(attempts) if not self.calm:
                    self.asleep -= {attempt for attempt in attempts if self.chance.random() < 0.5}
        return facts

    def next(self) -> Stimulus:
        """Tell what happens next: a batch comes back, or time passes."""
        flying = self.coordinator.inflight
        if self.lagging:
            self.asleep |= {s.attempt for s in flying.values() if any(map(self.is_late, s.jobs)) and self.must_hang(s)}
        awake = [submit for attempt, submit in flying.items() if attempt not in self.asleep]
        if self.alarms and (not awake or (not self.calm and self.chance.random() < 0.1)):
            ring = self.alarms.pop(0)
            return Rang(ring.bell)
        submit = awake[0] if self.calm else self.chance.choice(awake)
        if not self.calm and self.chance.random() < 0.05:
            return BatchLost(submit.attempt, "bad luck")
        return back(submit, *map(self.work, submit.jobs))

    def is_late(self, job: Job) -> bool:
        return isinstance(job, ChunkJob) and job.stage == LATE and job.piece.chunk in self.late

    def must_hang(self, submit: Submit) -> bool:
        return not self.state.stages[LATE].cuts or submit.attempt in self.asleep

    def work(self, job: Job) -> Receipt:
        seconds = 1.0 if self.calm else self.chance.choice([0.001, 1.0])
        if isinstance(job, MergeJob):
            return done("(" + "".join(map(text, job.inputs)) + ")", seconds=seconds)
        if isinstance(job, CallJob):
            return done(f"{job.task}[{''.join(self.values(CALLS[job.call].needs))}]", seconds=seconds)
        assert isinstance(job, ChunkJob)
        stage, piece = GRAPH[job.stage], job.piece
        stop = RECORDS
        if not self.calm and self.chance.random() < 0.2:
            stop = self.chance.randint(piece.first, RECORDS)
        given = "".join(self.values(stage.needs))
        said = "".join(f"{piece.chunk}.{record}{given} " for record in range(piece.first, stop))
        receipt = replace(done(said, seconds=seconds), results=(done(said).results[0],) * len(stage.kinds))
        return receipt if stop == RECORDS else replace(receipt, status="stopped", cursor=Cursor(stop, 0, stop * 10))

    def values(self, addresses: Iterable[Address]) -> list[str]:
        return [text(bind(self.state, address).refs[0]) for address in addresses]

    def result(self) -> dict[str, str]:
        """What the run came to."""
        late, same, total = self.values([(LATE, 0), (SAME, 0), (AFTER, 1)])
        both = bind(self.state, (~BOTH, 0))
        settled = "|".join(text(part.parts[0].refs[0]) for part in both.parts)
        return {"late": late, "same": same, "file": bind(self.state, (AFTER, 0)).data["rows"], "sum": total, "both": settled}


def text(ref: Ref) -> str:
    assert ref.inline is not None
    return ref.inline.decode()


def owned(history: Iterable[Entry]) -> list[Entry]:
    """The same history, and a new coordinator's claim to it."""
    known = [*history]
    epoch = max(entry.epoch for entry in known if isinstance(entry, Owned))
    return [*known, Owned(epoch + 1, "another", 0)]


def redriven(history: Iterable[Entry]) -> list[Entry]:
    return owned([*history, Redriven(((LATE, 0),))])


def full(world: World) -> dict[str, str]:
    """The result of a run in which nothing is late."""
    calm = World(world.chunks, set())
    calm.go_on(world.begin)
    return calm.result()


def flat(value: str) -> list[str]:
    """The records in a value, in order, without the shape of the tree that it was merged in."""
    return value.replace("(", "").replace(")", "").split()


def test_wherever_a_run_is_killed_it_comes_to_the_early_value_and_a_redrive_to_the_full_one() -> None:
    world = World(7, {2, 5})
    early = world.go_on(world.begin)
    value, whole = world.result(), full(world)
    assert [record.split(".")[0] for record in flat(value["late"])][::RECORDS] == ["0", "1", "3", "4", "6"]
    history = world.go_on(redriven(early))
    assert world.result() == whole
    for length in range(len(world.begin), len(history)):
        prefix = history[:length]
        killed = world.go_on(owned(prefix))
        if any(isinstance(entry, Redriven) for entry in prefix):
            assert world.result() == whole
        else:
            assert world.result() == value
            killed = world.go_on(redriven(killed))
            assert world.result() == whole
        assert made(killed) == made(history)


def made(history: Iterable[Entry]) -> Counter[object]:
    """How often each piece, call, decision and sink was written down as done."""
    nodes = Counter[object]()
    for entry in history:
        match entry:
            case PieceEnded(stage, piece):
                nodes["piece", stage, piece.chunk] += 1
            case Called(call):
                nodes["call", call] += 1
            case Decided(call):
                nodes["decision", call] += 1
            case Published(stage, output):
                nodes["sink", stage, output] += 1
    return nodes


def test_a_redrive_makes_again_what_rests_on_the_early_value_once_and_nothing_else() -> None:
    world = World(4, {1})
    before = made(world.go_on(world.begin))
    after = made(world.go_on(redriven(world.history)))
    again = {("call", USE), ("decision", BOTH), ("sink", AFTER, 0), ("piece", AFTER, 0), ("piece", AFTER, 1)}
    assert after - before == Counter([*again, ("piece", LATE, 1)])
    assert all(after[node] == 2 for node in again)
    assert after["call", UP] == 1


@settings(max_examples=150)
@given(
    chunks=st.integers(0, 9),
    late=st.sets(st.integers(0, 8), max_size=4),
    seed=st.integers(0, 2**32),
    fan_in=st.integers(2, 4),
    killed=st.floats(0, 1),
)
def test_whatever_happens_the_early_value_is_what_was_there_and_the_full_one_is_that_of_a_run_without_deadlines(
    chunks: int, late: set[int], seed: int, fan_in: int, killed: float
) -> None:
    world = World(chunks, {chunk for chunk in late if chunk < chunks}, seed=seed, fan_in=fan_in)
    history = world.go_on(owned(cut_short(world.go_on(world.begin), len(world.begin), killed)))
    early = [*takewhile(lambda entry: not isinstance(entry, Cut), history)]
    if len(early) < len(history):
        refs = fold(early).stages[LATE].results(0)
        assert flat(world.result()["late"]) == [record for ref in refs for record in text(ref).split()]
        begin = redriven(history)
        history = world.go_on(owned(cut_short(world.go_on(begin), len(begin), killed)))
        assert kinds(history)[Cut] == 1
    assert world.result() == full(world)


def cut_short(history: list[Entry], least: int, share: float) -> list[Entry]:
    """What is written of a run when it's killed after a share of what came after its begin."""
    return history[: least + int(share * (len(history) - least))]

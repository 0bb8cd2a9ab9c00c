"""The coordinator's rules for barriers with a deadline, and the fold of a redrive."""

from __future__ import annotations

from dataclasses import replace

from parflow.core.coordinator import REST, Coordinator
from parflow.core.history import Called, Cut, Entry, Owned, Redriven, RunStarted, fold
from parflow.core.signals import Append, Cancel, Durable, Finish, Instruction, Rang, Ring, SlotsChanged, Submit, Yield
from parflow.model import CallFacts, CallJob, ChunkJob, MergeJob, Ref, StageFacts, TaskFacts
from tests.core.test_coordinator import back, done, entries, listing, only

DUE = 60.0


def begin(*kinds: str, enough: float = 0.0, history: tuple[Entry, ...] = ()) -> Coordinator:
    """A run of one stage, whose first output has a deadline, and of a call that needs it."""
    names = kinds or ("reduce",)
    deadlines = (DUE, *(0.0 for _ in names[1:]))
    stage = StageFacts("read", ("read",), names, names, deadlines=deadlines, enough=(enough, *(0.0 for _ in names[1:])))
    targets = ((~0, 0), *((0, output) for output in range(1, len(names))))
    started = RunStarted("f", "", (stage,), 16, {}, (TaskFacts("use"),), (CallFacts("call", 0, ((0, 0),)),), targets)
    return Coordinator("run", fold([*(history or (started,)), Owned(1, "me", 0)]), window=1)


class Story:
    """Tells a coordinator what happens, and has all that it decides written at once."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.entries: list[Entry] = []
        self.asked: list[Instruction] = []
        self.take(coordinator.start())

    def take(self, new: list[Instruction]) -> list[Instruction]:
        seen: list[Instruction] = []
        while new:
            seen += new
            appends = only(Append, new)
            self.entries += [append.entry for append in appends]
            new = self.coordinator.handle(Durable(appends[-1].ticket)) if appends else []
        self.asked += seen
        return seen

    def tell(self, stimulus: object) -> list[Instruction]:
        return self.take(self.coordinator.handle(stimulus))  # type: ignore[arg-type]

    def flying(self) -> list[Submit]:
        return [*self.coordinator.inflight.values()]

    def finish(self, kind: type) -> list[Instruction]:
        """Send back the batch of a kind of job that is in flight."""
        submit = next(submit for submit in self.flying() if isinstance(submit.jobs[0], kind))
        outputs = len(self.coordinator.state.stages[0].facts.kinds) if kind is ChunkJob else 1
        return self.tell(
            back(submit, *(replace(done("x"), results=(Ref(1, "d", inline=b"x"),) * outputs) for _ in submit.jobs))
        )


def two_chunks(coordinator: Coordinator) -> Story:
    story = Story(coordinator)
    story.tell(listing(5, 5))
    story.tell(SlotsChanged(2))
    return story


def test_the_alarm_is_set_when_the_stage_begins() -> None:
    story = Story(begin())
    assert only(Ring, story.asked) == [Ring(0, 0, DUE)]


def test_past_the_deadline_what_is_there_is_merged_and_the_rest_let_go() -> None:
    story = two_chunks(begin())
    story.finish(ChunkJob)
    late = story.flying()
    asked = story.tell(Rang(0, 0))
    (cut,) = entries(Cut, asked)
    assert (cut.share, [piece.chunk for piece in cut.late]) == (0.5, [1])
    assert [one.attempts for one in only(Yield, asked)] == [tuple(submit.attempt for submit in late)]
    story.tell(back(late[0], done("late")))
    story.finish(MergeJob)
    asked = story.finish(CallJob)
    assert only(Finish, asked)


def test_what_does_not_yield_in_time_is_ended_and_never_counts_as_lost() -> None:
    story = two_chunks(begin())
    story.finish(ChunkJob)
    (late,) = story.flying()
    story.tell(Rang(0, 0))
    asked = story.tell(Rang(0, REST))
    assert only(Cancel, asked) == [Cancel((late.attempt,))]
    story.finish(MergeJob)
    assert only(Finish, story.finish(CallJob))


def test_a_deadline_before_the_list_is_closed_waits_for_the_list() -> None:
    story = Story(begin())
    story.tell(SlotsChanged(2))
    story.tell(listing(5, last=False))
    story.finish(ChunkJob)
    assert entries(Cut, story.tell(Rang(0, 0))) == []
    assert len(entries(Cut, story.tell(listing(5, first=1)))) == 1


def test_too_little_is_waited_for() -> None:
    story = two_chunks(begin(enough=0.9))
    story.finish(ChunkJob)
    assert entries(Cut, story.tell(Rang(0, 0))) == []
    assert entries(Cut, story.finish(ChunkJob)) == []
    assert not story.coordinator.state.stages[0].cuts


def test_a_sibling_without_a_deadline_gets_all_of_the_input() -> None:
    story = two_chunks(begin("reduce", "reduce"))
    story.finish(ChunkJob)
    asked = story.tell(Rang(0, 0))
    assert not only(Yield, asked)
    story.finish(ChunkJob)
    while not story.coordinator.finished:
        story.finish(type(story.flying()[0].jobs[0]))
    merged = story.coordinator.state.stages[0].merged
    assert set(merged) == {(0, -1, 1, 0), (1, 0, 1, 0)}


def test_a_run_that_is_resumed_after_the_cut_leaves_the_late_pieces_alone() -> None:
    story = two_chunks(begin())
    story.finish(ChunkJob)
    story.tell(Rang(0, 0))
    history = (story.coordinator.state.started, *story.entries)
    again = Story(begin(history=history))  # type: ignore[arg-type]
    again.tell(SlotsChanged(2))
    assert [type(submit.jobs[0]) for submit in again.flying()] == [MergeJob]


def test_a_redrive_forgets_the_early_value_and_all_that_rests_on_it_and_nothing_else() -> None:
    story = two_chunks(begin())
    story.finish(ChunkJob)
    story.tell(Rang(0, 0))
    story.finish(MergeJob)
    story.finish(CallJob)
    state = fold([story.coordinator.state.started, *story.entries, Redriven(((0, 0),))])  # type: ignore[list-item]
    (stage,) = state.stages
    assert not stage.cuts
    assert not stage.merged
    assert [chunk.pending for chunk in stage.chunks] == [0, 1]
    assert not state.calls[0].ended


def test_after_a_redrive_no_deadline_cuts_it_again() -> None:
    story = two_chunks(begin())
    story.finish(ChunkJob)
    story.tell(Rang(0, 0))
    story.finish(MergeJob)
    story.finish(CallJob)
    again = Story(begin(history=(story.coordinator.state.started, *story.entries, Redriven(((0, 0),)))))  # type: ignore[arg-type]
    assert only(Ring, again.asked) == []
    again.tell(SlotsChanged(2))
    again.finish(ChunkJob)
    again.finish(MergeJob)
    assert only(Finish, again.finish(CallJob))
    assert [type(entry) for entry in again.entries].count(Called) == 1
    assert again.coordinator.state.stages[0].root(0) == Ref(1, "d", inline=b"x")

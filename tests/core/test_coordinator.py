"""The coordinator's rules one by one: stimuli in, instructions out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest

from parflow.core.coordinator import Coordinator
from parflow.core.entries import BarrierOpened, ChunksListed, Entry, Merged, Owned, PieceEnded, Published, RunEnded, RunStarted
from parflow.core.history import fold
from parflow.core.signals import (
    Append,
    BatchLost,
    BatchReturned,
    Broke,
    Durable,
    Finish,
    Instruction,
    List,
    Listed,
    Publish,
    Ring,
    SinkPublished,
    SlotsChanged,
    StopRequested,
    Submit,
    Yield,
)
from parflow.model import (
    Cause,
    Chunk,
    ChunkJob,
    Cursor,
    Failure,
    Job,
    MergeJob,
    Part,
    Piece,
    Receipt,
    Ref,
    Rejected,
    StageFacts,
    Tally,
)

T = TypeVar("T")
Worker = Callable[[Job], Receipt]

# --- how to say it briefly -------------------------------------------------------------------------------------------


def begin(*kinds: str, max_failures: float = 0, window: int = 1, stages: int = 1, history: Iterable[Entry] = ()) -> Coordinator:
    """A coordinator of a new run, or of one that has a history already."""
    facts = StageFacts("read", ("read",), kinds or ("reduce",), kinds or ("reduce",))
    entries: list[Entry] = [*history] or [RunStarted("flow", "", (facts,) * stages, 16)]
    return Coordinator("run", fold([*entries, Owned(1, "me", max_failures)]), window=window)


def listing(*weights: int, stage: int = 0, first: int = 0, last: bool = True) -> Listed:
    chunks = (
        Chunk(first + i, f"id{first + i}", (Part(f"f{first + i}", 0, None, weight, "1"),), weight)
        for i, weight in enumerate(weights)
    )
    return Listed(ChunksListed(stage, tuple(chunks), last=last))


def at(ordinal: int) -> Cursor:
    return Cursor(ordinal, 0, ordinal * 10)


def done(text: str = "", *, records: int = 1, failed: int = 0, seconds: float = 1.0) -> Receipt:
    return Receipt("done", results=(Ref(len(text), "d", inline=text.encode()),), tally=Tally(records, failed, 0, seconds))


CRASHED = (("read", "RecordCrashedError: died"),)


def died(ordinal: int, cause: Cause = "crash") -> Receipt:
    return Receipt("died", at(ordinal), failure=Failure(f"r{ordinal}", "read", cause, "RecordCrashedError", "died"))


def only(kind: type[T], instructions: Iterable[object]) -> list[T]:
    return [instruction for instruction in instructions if isinstance(instruction, kind)]


def entries(kind: type[T], instructions: Iterable[Instruction]) -> list[T]:
    return only(kind, [append.entry for append in only(Append, instructions)])


def pieces(instructions: Iterable[Instruction]) -> list[Piece]:
    return [job.piece for submit in only(Submit, instructions) for job in only(ChunkJob, submit.jobs)]


def back(submit: Submit, *receipts: Receipt | None) -> BatchReturned:
    return BatchReturned(submit.attempt, receipts)


def work(job: Job) -> Receipt:
    """What an honest worker gives where nothing goes wrong: the names of chunks, bracketed by merges."""
    if isinstance(job, ChunkJob):
        return done(f"{job.piece.chunk} ")
    assert isinstance(job, MergeJob)
    return done("(" + "".join((ref.inline or b"").decode() for ref in job.inputs) + ")")


def play(
    coordinator: Coordinator,
    instructions: list[Instruction],
    worker: Worker = work,
    pick: Callable[[list[Submit]], Submit] = lambda waiting: waiting[0],
) -> list[Instruction]:
    """Carry everything out at once, as an executor does, until nothing is asked; return all that was asked."""
    asked, new, waiting = list(instructions), list(instructions), list[Submit]()
    while new or waiting:
        waiting += only(Submit, new)
        tickets = [append.ticket for append in only(Append, new)]
        publish = only(Publish, new)
        if tickets:
            new = coordinator.handle(Durable(tickets[-1]))
        elif publish:
            new = coordinator.handle(SinkPublished(Published(publish[0].stage, publish[0].output)))
        elif waiting:
            submit = pick(waiting)
            waiting.remove(submit)
            new = coordinator.handle(back(submit, *map(worker, submit.jobs)))
        else:
            new = []
        asked += new
    return asked


def start(coordinator: Coordinator, *weights: int, slots: int = 1) -> list[Instruction]:
    """Begin, with chunks listed and slots there."""
    return [*coordinator.start(), *coordinator.handle(listing(*weights)), *coordinator.handle(SlotsChanged(slots))]


# --- what is begun, and when -----------------------------------------------------------------------------------------


def test_the_largest_listed_chunk_begins_first() -> None:
    asked = play(coordinator := begin(), start(coordinator, 3, 9, 5))
    assert [piece.chunk for piece in pieces(asked)] == [1, 2, 0]


def test_no_more_batches_are_in_flight_than_the_window_has_places() -> None:
    coordinator = begin(window=2)
    asked = start(coordinator, *[1] * 20, slots=3)
    assert len(only(Submit, asked)) == 6
    assert len(only(Submit, coordinator.handle(SlotsChanged(4)))) == 2


def test_a_free_place_is_refilled_one_for_one() -> None:
    coordinator = begin()
    first, _second = only(Submit, start(coordinator, *[1] * 20, slots=2))
    assert len(only(Submit, coordinator.handle(back(first, done())))) == 1


def test_nothing_begins_without_slots() -> None:
    coordinator = begin()
    assert only(Submit, start(coordinator, 1, 1, slots=0)) == []
    assert len(only(Submit, coordinator.handle(SlotsChanged(2)))) == 2


def test_what_is_left_of_a_begun_chunk_goes_before_fresh_ones() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 9, 5, 7))
    asked = coordinator.handle(back(first, Receipt("stopped", at(4), tally=Tally(4, seconds=1.0))))
    assert pieces(asked) == [Piece(0, at(4))]


def test_short_jobs_travel_together_once_it_is_known_that_they_are_short() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, *[1] * 100))
    assert len(first.jobs) == 1
    (second,) = only(Submit, coordinator.handle(back(first, done(seconds=0.01))))
    assert len(second.jobs) == 25


def test_a_suspect_travels_alone_however_short_jobs_are() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, *[1] * 100))
    (second,) = only(Submit, coordinator.handle(back(first, done(seconds=0.001))))
    crash, *others = died(5), *(done(seconds=0.001) for _ in second.jobs[1:])
    asked = play(coordinator, coordinator.handle(back(second, crash, *others)), lambda _: done(seconds=0.001))
    batches = [[piece.alone for piece in pieces([submit])] for submit in only(Submit, asked)]
    assert [True] in batches
    assert not any(any(batch) for batch in batches if len(batch) > 1)
    assert max(map(len, batches)) > 1


# --- records that break their process --------------------------------------------------------------------------------


def test_a_crash_leaves_the_part_before_the_suspect_alone_and_the_part_after() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    (ended,) = entries(PieceEnded, coordinator.handle(back(first, died(5))))
    suspect = Piece(0, at(5), 0, 6, alone=True, earlier=CRASHED)
    assert ended == PieceEnded(0, Piece(0), (Piece(0, stop=5), suspect, Piece(0, at(5), 1)))


def test_a_record_that_crashes_alone_is_given_up() -> None:
    coordinator = begin(max_failures=1)

    def worker(job: Job) -> Receipt:
        crashes = isinstance(job, ChunkJob) and job.piece.first <= 5 and (job.piece.stop or 9) > 5
        return died(5) if crashes else work(job)

    asked = play(coordinator, start(coordinator, 1), worker)
    (given_up,) = [ended for ended in entries(PieceEnded, asked) if ended.failure is not None]
    assert given_up.piece == Piece(0, at(5), 0, 6, alone=True, earlier=CRASHED)
    assert given_up.failure == Failure(
        "r5", "read", "crash", "RecordCrashedError", "died", attempts=2, earlier=("RecordCrashedError: died",)
    )
    assert entries(BarrierOpened, asked) == [BarrierOpened(0, 1)]


def test_a_record_that_survives_alone_is_kept() -> None:
    crashes = iter([died(5)])
    coordinator = begin()
    asked = play(coordinator, start(coordinator, 1), lambda job: next(crashes, None) or work(job))
    assert [ended.failure for ended in entries(PieceEnded, asked)] == [None] * 4
    assert [ended.status for ended in entries(RunEnded, asked)] == ["succeeded"]


def test_a_timeout_is_condemned_at_once() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    receipt = died(5, "timeout")
    (ended,) = entries(PieceEnded, coordinator.handle(back(first, receipt)))
    assert ended == PieceEnded(0, Piece(0), (Piece(0, stop=5), Piece(0, at(5), 1)), None, receipt.failure)


def test_a_record_that_ran_out_of_memory_is_tried_alone_before_it_is_given_up() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    (ended,) = entries(PieceEnded, coordinator.handle(back(first, died(5, "memory"))))
    assert ended == PieceEnded(0, Piece(0), (Piece(0, stop=5), Piece(0, at(5), 0, 6, True, CRASHED), Piece(0, at(5), 1)))


@pytest.mark.parametrize("cause", ["crash", "timeout"])
def test_a_child_that_dies_on_the_way_to_its_first_record_never_brings_back_the_one_passed_over(cause: Cause) -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    asked = coordinator.handle(back(first, died(0, "timeout")))
    assert pieces(asked) == [Piece(0, at(0), 1)]
    (ended,) = entries(PieceEnded, coordinator.handle(back(only(Submit, asked)[0], died(0, cause))))
    assert [piece.first for piece in ended.rest] == ([1, 2] if cause == "crash" else [2])


def test_a_suspect_whose_number_alone_is_known_is_reached_from_the_pieces_start() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    nowhere = Receipt("died", Cursor(5, 0, 0), failure=died(5).failure)
    (ended,) = entries(PieceEnded, coordinator.handle(back(first, nowhere)))
    assert ended.rest == (Piece(0, stop=5), Piece(0, at(0), 5, 6, True, CRASHED), Piece(0, at(0), 6))


def test_a_piece_that_stopped_at_its_end_leaves_no_rest() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    asked = coordinator.handle(back(first, died(5)))
    (before,) = only(Submit, asked)
    assert before.jobs[0].piece == Piece(0, stop=5)  # type: ignore[union-attr]
    (ended,) = entries(PieceEnded, coordinator.handle(back(before, Receipt("stopped", at(5), results=(None,), tally=Tally(5)))))
    assert ended.rest == ()
    assert sorted(coordinator.state.stages[0].pending) == [(0, 5), (0, 6)]


def test_a_piece_that_yielded_before_its_first_record_is_queued_again_as_it_was() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    asked = coordinator.handle(back(first, Receipt("stopped", at(0))))
    assert entries(PieceEnded, asked) == []
    assert pieces(asked) == [Piece(0)]


# --- batches that come back oddly ------------------------------------------------------------------------------------


def test_a_receipt_that_comes_twice_counts_once() -> None:
    coordinator = begin()
    first, _second = only(Submit, start(coordinator, 1, 1, slots=2))
    assert len(entries(PieceEnded, coordinator.handle(back(first, done())))) == 1
    assert coordinator.handle(back(first, done())) == []


def test_a_receipt_that_comes_after_its_loss_was_reported_is_ignored() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    (again,) = only(Submit, coordinator.handle(BatchLost(first.attempt, "gone")))
    assert again.jobs == first.jobs
    assert again.attempt != first.attempt
    assert coordinator.handle(back(first, done())) == []
    assert len(entries(PieceEnded, coordinator.handle(back(again, done())))) == 1


def test_jobs_that_were_not_started_are_queued_again() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, *[1] * 100))
    (second,) = only(Submit, coordinator.handle(back(first, done(seconds=0.1))))
    assert len(second.jobs) == 2
    asked = coordinator.handle(back(second, done(seconds=0.1), None))
    assert only(ChunkJob, second.jobs)[1].piece in pieces(asked)


def test_a_batch_that_comes_back_untouched_four_times_ends_the_run() -> None:
    coordinator = begin()
    asked = start(coordinator, 1)
    for _ in range(4):
        (submit,) = only(Submit, asked)
        asked = coordinator.handle(back(submit, None))
    (ended,) = entries(RunEnded, asked)
    assert (ended.status, ended.error) == ("failed", "StepError")
    assert "chunk 0 was lost 4 times" in ended.arguments[-1]


def test_a_merge_that_fails_four_times_ends_the_run() -> None:
    def worker(job: Job) -> Receipt:
        return work(job) if isinstance(job, ChunkJob) else died(0)

    coordinator = begin()
    asked = play(coordinator, start(coordinator, 1), worker)
    (ended,) = entries(RunEnded, asked)
    assert (ended.status, ended.error) == ("failed", "StepError")
    assert "a merge was lost 4 times" in ended.arguments[-1]


def test_a_broken_step_ends_the_run_and_loses_no_piece() -> None:
    coordinator = begin()
    (first, second) = only(Submit, start(coordinator, 1, 1, slots=2))
    broken = Receipt("broken", failure=Failure("", "score", "exception", "ImportError", "no module 'x'"))
    asked = coordinator.handle(back(first, broken))
    assert only(Yield, asked) == [Yield((second.attempt,))]
    asked = play(coordinator, coordinator.handle(back(second, done())))
    assert entries(RunEnded, asked) == [RunEnded("failed", "StepError", ("run", "score", "ImportError: no module 'x'"))]
    assert list(coordinator.state.stages[0].pending.values()) == [Piece(0)]


# --- barriers --------------------------------------------------------------------------------------------------------


def test_a_barrier_opens_only_on_durable_entries() -> None:
    coordinator = begin("collect")
    (first,) = only(Submit, start(coordinator, 1))
    (end,) = only(Append, coordinator.handle(back(first, done())))
    assert coordinator.handle(Durable(end.ticket - 1)) == []
    assert entries(BarrierOpened, coordinator.handle(Durable(end.ticket))) == [BarrierOpened(0)]


def test_a_barrier_does_not_wait_for_what_other_stages_write() -> None:
    coordinator = begin("collect", stages=2)
    asked = [*coordinator.start(), *coordinator.handle(SlotsChanged(1)), *coordinator.handle(listing(1))]
    (submit,) = only(Submit, asked)
    (end,) = only(Append, coordinator.handle(back(submit, done())))
    coordinator.handle(listing(1, stage=1, last=False))
    assert entries(BarrierOpened, coordinator.handle(Durable(end.ticket))) == [BarrierOpened(0)]


def test_a_barrier_stays_shut_over_failures_and_opens_on_resume_when_they_are_accepted() -> None:
    coordinator = begin()
    asked = play(coordinator, start(coordinator, 1, 1), lambda _: done(records=10, failed=1))
    assert entries(BarrierOpened, asked) == []
    (ended,) = entries(RunEnded, asked)
    assert (ended.status, ended.error, ended.arguments[:4]) == ("failed", "TooManyFailuresError", ("run", 2, 20, 0))
    assert only(Finish, asked) == [Finish(ended)]

    history = [RunStarted("flow", "", (coordinator.state.stages[0].facts,), 16), *(a.entry for a in only(Append, asked))]
    resumed = begin(history=history, max_failures=2)
    asked = play(resumed, [*resumed.start(), *resumed.handle(SlotsChanged(1))])
    assert pieces(asked) == []
    assert entries(BarrierOpened, asked) == [BarrierOpened(0, 2)]
    assert [end.status for end in entries(RunEnded, asked)] == ["succeeded"]


def test_unusable_inputs_are_failures_too() -> None:
    coordinator = begin()
    rejected = Listed(ChunksListed(0, (), (Rejected("d", "NotAFileError", "'d' is a directory"),), last=True))
    asked = play(coordinator, [*coordinator.start(), *coordinator.handle(rejected)])
    (ended,) = entries(RunEnded, asked)
    assert ended.arguments == ("run", 1, 1, 0, "'d' is a directory")


def test_a_hopeless_run_stops_early() -> None:
    coordinator = begin()
    asked = play(coordinator, start(coordinator, *[1] * 50), lambda _: done(records=100, failed=100))
    assert [end.error for end in entries(RunEnded, asked)] == ["TooManyFailuresError"]
    assert len(entries(PieceEnded, asked)) == 2


def test_a_run_without_inputs_gives_a_merge_of_nothing() -> None:
    coordinator = begin()
    asked = play(coordinator, start(coordinator))
    assert [job for submit in only(Submit, asked) for job in submit.jobs] == [MergeJob(0, 0, 1, 0, (), last=True)]
    assert [end.status for end in entries(RunEnded, asked)] == ["succeeded"]


def test_a_run_without_stages_succeeds_at_once() -> None:
    coordinator = begin(stages=0)
    assert [end.status for end in entries(RunEnded, play(coordinator, coordinator.start()))] == ["succeeded"]


# --- merges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "levels"), [(1, [1]), (16, [1]), (17, [2, 1]), (300, [19, 2, 1])])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_the_merge_tree_has_one_shape_whatever_the_order_of_completion(
    chunks: int, levels: list[int], seed: int | None
) -> None:
    def tree(chunks: list[str]) -> str:
        nodes = ["(" + "".join(chunks[i : i + 16]) + ")" for i in range(0, len(chunks), 16)]
        return nodes[0] if len(nodes) == 1 else tree(nodes)

    coordinator = begin(window=40)
    pick = random.Random(seed).choice if seed else (lambda waiting: waiting[0])
    asked = play(coordinator, start(coordinator, *[1] * chunks), pick=pick)
    merges = entries(Merged, asked)
    assert [sum(merge.level == level for merge in merges) for level in range(1, len(levels) + 1)] == levels
    (root,) = [merge for merge in merges if merge.level == len(levels)]
    assert (root.result.inline or b"").decode() == tree([f"{i} " for i in range(chunks)])


def test_only_the_root_is_the_last_merge_and_it_follows_the_barrier() -> None:
    coordinator = begin(window=40)
    asked = play(coordinator, start(coordinator, *[1] * 40))
    jobs = [(place, job) for place, i in enumerate(asked) for job in only(MergeJob, i.jobs if isinstance(i, Submit) else ())]
    assert [(job.level, job.last) for _, job in jobs] == [(1, False)] * 3 + [(2, True)]
    opened = next(i for i, what in enumerate(asked) if isinstance(what, Append) and isinstance(what.entry, BarrierOpened))
    assert jobs[-1][0] > opened


def test_a_merge_waits_until_its_chunks_are_durable() -> None:
    coordinator = begin(window=40)
    submits = only(Submit, start(coordinator, *[1] * 17))
    asked = [i for submit in submits for i in coordinator.handle(back(submit, *map(work, submit.jobs)))]
    last = only(Append, asked)[-1].ticket
    assert [job for s in only(Submit, coordinator.handle(Durable(last - 2))) for job in only(MergeJob, s.jobs)] == []
    asked = coordinator.handle(Durable(last))
    assert [job.index for s in only(Submit, asked) for job in only(MergeJob, s.jobs)] == [0, 1]


def test_a_node_whose_chunks_ended_before_the_list_went_on_is_merged_all_the_same() -> None:
    coordinator = begin(window=40)
    asked = play(coordinator, [*coordinator.start(), *coordinator.handle(SlotsChanged(1))])
    asked += play(coordinator, coordinator.handle(listing(*[1] * 16, last=False)))
    assert entries(Merged, asked) == []
    asked += play(coordinator, coordinator.handle(listing(1, first=16)))
    assert [(merge.level, merge.index) for merge in entries(Merged, asked)] == [(1, 0), (1, 1), (2, 0)]


def test_a_whole_node_is_merged_while_the_list_is_still_growing() -> None:
    coordinator = begin(window=40)
    coordinator.handle(SlotsChanged(1))
    coordinator.start()
    asked = play(coordinator, coordinator.handle(listing(*[1] * 40, last=False)))
    assert sorted((merge.level, merge.index) for merge in entries(Merged, asked)) == [(1, 0), (1, 1)]


# --- sinks -----------------------------------------------------------------------------------------------------------


def test_a_sink_is_published_once_and_after_its_barrier() -> None:
    coordinator = begin("sink")
    asked = play(coordinator, start(coordinator, 1, 1))
    assert only(Publish, asked) == [Publish(0, 0)]
    assert entries(Published, asked) == [Published(0, 0)]
    kinds = [type(append.entry) for append in only(Append, asked)]
    assert kinds == [ChunksListed, PieceEnded, PieceEnded, BarrierOpened, Published, RunEnded]


def test_a_publication_after_the_end_is_left_to_the_next_coordinator() -> None:
    coordinator = begin("sink", "collect")
    (submit,) = only(Submit, start(coordinator, 1))
    (end,) = only(Append, coordinator.handle(back(submit, done())))
    (opened,) = only(Append, coordinator.handle(Durable(end.ticket)))
    assert only(Publish, coordinator.handle(Durable(opened.ticket))) == [Publish(0, 0)]
    asked = coordinator.handle(StopRequested())
    assert [ended.status for ended in entries(RunEnded, asked)] == ["stopped"]
    assert coordinator.handle(SinkPublished(Published(0, 0))) == []

    history = [RunStarted("flow", "", (coordinator.state.stages[0].facts,), 16)]
    resumed = begin(history=[*history, listing(1).entry, PieceEnded(0, Piece(0), (), done()), BarrierOpened(0)])
    assert only(Publish, resumed.start()) == [Publish(0, 0)]


# --- the end, and going on -------------------------------------------------------------------------------------------


def test_a_drained_run_waits_for_what_is_in_flight_and_ends_stopped() -> None:
    coordinator = begin()
    (submit,) = only(Submit, start(coordinator, 1, 1))
    assert coordinator.handle(StopRequested()) == [Yield((submit.attempt,)), Ring(("grace",), 30.0)]
    (end, ended) = only(Append, coordinator.handle(back(submit, Receipt("stopped", at(3), results=(None,), tally=Tally(3)))))
    assert isinstance(end.entry, PieceEnded)
    assert end.entry.rest == (Piece(0, at(3)),)
    assert ended.entry == RunEnded("stopped", "RunStoppedError", ("run",))
    assert coordinator.handle(Durable(end.ticket)) == []
    assert coordinator.handle(Durable(ended.ticket)) == [Finish(ended.entry)]


def test_a_run_stopped_at_once_waits_for_nobody() -> None:
    coordinator = begin()
    (submit,) = only(Submit, start(coordinator, 1))
    asked = coordinator.handle(StopRequested(now=True))
    assert [ended.status for ended in entries(RunEnded, asked)] == ["stopped"]
    assert coordinator.handle(back(submit, done())) == []


def test_a_cancelled_run_drains_as_a_stopped_one_does_and_ends_cancelled() -> None:
    coordinator = begin()
    (submit,) = only(Submit, start(coordinator, 1, 1))
    assert coordinator.handle(StopRequested(status="cancelled")) == [Yield((submit.attempt,)), Ring(("grace",), 30.0)]
    (end, ended) = only(Append, coordinator.handle(back(submit, Receipt("stopped", at(3), results=(None,), tally=Tally(3)))))
    assert isinstance(end.entry, PieceEnded)
    assert ended.entry == RunEnded("cancelled", "RunCancelledError", ("run",))


def test_who_asks_twice_waits_no_longer() -> None:
    coordinator = begin()
    start(coordinator, 1)
    assert entries(RunEnded, coordinator.handle(StopRequested())) == []
    assert len(entries(RunEnded, coordinator.handle(StopRequested(now=True)))) == 1


def test_a_drain_ends_when_the_worker_of_the_last_batch_vanishes() -> None:
    coordinator = begin()
    (submit,) = only(Submit, start(coordinator, 1))
    coordinator.handle(StopRequested())
    asked = coordinator.handle(BatchLost(submit.attempt, "gone"))
    assert only(Submit, asked) == []
    assert [ended.status for ended in entries(RunEnded, asked)] == ["stopped"]


def test_the_first_reason_to_end_stands() -> None:
    coordinator = begin()
    (submit,) = only(Submit, start(coordinator, 1))
    coordinator.handle(Broke("ClusterLostError", ("no worker", "run")))
    coordinator.handle(StopRequested())
    (ended,) = entries(RunEnded, coordinator.handle(BatchLost(submit.attempt, "gone")))
    assert ended == RunEnded("failed", "ClusterLostError", ("no worker", "run"))


def test_what_is_listed_while_a_run_ends_is_listed_again_on_resume() -> None:
    coordinator = begin()
    start(coordinator, 1)
    coordinator.handle(StopRequested())
    assert coordinator.handle(listing(1, first=1)) == []
    assert coordinator.state.stages[0].listed == 1


def test_after_the_end_nothing_is_asked() -> None:
    coordinator = begin()
    assert isinstance(play(coordinator, start(coordinator, 1, 1))[-1], Finish)
    assert coordinator.handle(SlotsChanged(5)) == []
    assert coordinator.handle(StopRequested()) == []


def test_a_resumed_run_goes_on_where_it_stood() -> None:
    facts = StageFacts("read", ("read",), ("count",), ("reduce",))
    cut = Receipt("stopped", at(4), results=done("a").results, tally=Tally(4))
    history: list[Entry] = [
        RunStarted("flow", "", (facts,), 16),
        Owned(1, "me", 0),
        listing(*[1] * 16, 7, 5, last=False).entry,
        *(PieceEnded(0, Piece(i), receipt=done(f"{i} ")) for i in range(16)),
        PieceEnded(0, Piece(16), (Piece(16, at(4)),), cut),
        Merged(0, 0, 1, 0, Ref(1, "d", inline=b"(0..15)")),
    ]
    coordinator = begin(history=history)
    asked = coordinator.start()
    assert only(List, asked) == [List(0, 18)]
    asked = play(coordinator, [*asked, *coordinator.handle(SlotsChanged(1)), *coordinator.handle(listing(9, first=18))])
    assert pieces(asked) == [Piece(16, at(4)), Piece(18), Piece(17)]
    merges = {(merge.level, merge.index): merge.result.inline for merge in entries(Merged, asked)}
    assert merges == {(1, 1): b"(a16 17 18 )", (2, 0): b"((0..15)(a16 17 18 ))"}


def test_a_result_found_in_the_store_is_adopted_and_not_run_again() -> None:
    facts = StageFacts("read", ("read",), ("count",), ("reduce",))
    history: list[Entry] = [RunStarted("flow", "", (facts,), 16), listing(1, 1).entry]
    coordinator = begin(history=history)
    cut = Receipt("stopped", at(4), results=done("a").results, tally=Tally(4))
    adopted = [(0, Piece(0, at(4)), done("b")), (0, Piece(0), cut), (0, Piece(1, at(7)), done("of another split"))]
    asked = play(coordinator, [*coordinator.start(adopted), *coordinator.handle(SlotsChanged(2))])
    assert pieces(asked) == [Piece(1)]
    assert [merge.result.inline for merge in entries(Merged, asked)] == [b"(ab1 )"]


def test_a_chunk_adopted_in_several_pieces_counts_once_for_its_merge() -> None:
    facts = StageFacts("read", ("read",), ("count",), ("reduce",))
    ended = [PieceEnded(0, Piece(i), receipt=done(f"{i} ")) for i in range(1, 15)]
    history: list[Entry] = [RunStarted("flow", "", (facts,), 16), listing(*[1] * 17).entry, *ended]
    coordinator = begin(history=history, window=9)
    cut = Receipt("stopped", at(4), results=done("0").results, tally=Tally(4))
    coordinator.start([(0, Piece(0), cut), (0, Piece(0, at(4)), done(" "))])
    coordinator.handle(Durable(2))
    asked = coordinator.handle(SlotsChanged(1))
    assert [job for submit in only(Submit, asked) for job in only(MergeJob, submit.jobs)] == []
    merges = entries(Merged, play(coordinator, asked))
    assert (merges[0].result.inline or b"").decode() == "(" + "".join(f"{i} " for i in range(16)) + ")"


def test_attempts_of_two_coordinators_have_different_names() -> None:
    first = begin()
    history: list[Entry] = [RunStarted("flow", "", (first.state.stages[0].facts,), 16), listing(1).entry]
    second = Coordinator("run", fold([*history, Owned(2, "you", 0)]))
    asked = [*second.start(), *second.handle(SlotsChanged(1))]
    assert [submit.attempt for submit in only(Submit, start(first, 1))] == ["1.1"]
    assert [submit.attempt for submit in only(Submit, asked)] == ["2.1"]


def test_a_state_that_nobody_owns_can_not_be_driven() -> None:
    with pytest.raises(ValueError, match="no RunStarted and Owned"):
        Coordinator("run", fold([]))


def test_a_child_that_dies_reading_is_tried_again_and_then_costs_the_rest_of_that_part_alone() -> None:
    coordinator = begin()
    (first,) = only(Submit, start(coordinator, 1))
    chunk = first.jobs[0]
    assert isinstance(chunk, ChunkJob)
    (again,) = only(Submit, coordinator.handle(back(first, died(5, "input"))))
    assert again.jobs == first.jobs
    (ended,) = entries(PieceEnded, coordinator.handle(back(again, died(5, "input"))))
    behind = (Piece(0, Cursor(6, 1, 0)),) if len(chunk.chunk.parts) > 1 else ()
    assert (ended.rest, ended.failure is not None) == ((Piece(0, stop=5), *behind), True)


def test_a_child_that_dies_writing_its_results_costs_no_record() -> None:
    coordinator = begin()
    (batch,) = only(Submit, start(coordinator, 1))
    failure = Failure("", "write", "crash", "RecordCrashedError", "signal 11")
    for _ in range(3):
        (batch,) = only(Submit, coordinator.handle(back(batch, Receipt("died", failure=failure))))
    coordinator.handle(back(batch, Receipt("died", failure=failure)))
    assert coordinator.ending is not None
    assert coordinator.ending.error == "StepError"

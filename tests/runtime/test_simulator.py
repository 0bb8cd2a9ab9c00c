"""The coordinator in worlds that go wrong. ``PARFLOW_SEEDS=5000`` looks at more of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parflow.core import coordinator as core
from parflow.core import pieces
from parflow.core.coordinator import Coordinator
from parflow.core.dataflow import Dataflow
from parflow.core.growth import renumbered
from parflow.core.history import RunState
from parflow.core.lanes import Lanes
from parflow.core.signals import BatchReturned, Instruction, Stimulus, Submit
from parflow.model import Address, Cursor, GraphFacts, Growth, Piece, Receipt
from parflow.runtime.simulator import (
    CALM,
    CAUSES,
    FATES,
    ROUGH,
    Faults,
    VirtualCall,
    VirtualGraph,
    VirtualRecord,
    VirtualStage,
    World,
    expected,
    random_faults,
    random_world,
    simulate,
)
from parflow.runtime.simulator.__main__ import main

SEEDS = int(os.environ.get("PARFLOW_SEEDS", "150"))

RECORDS = st.builds(VirtualRecord, st.sampled_from(("ok", "ok", "ok", *FATES)), st.sampled_from((0.001, 0.1, 1.0, 4.0)))
CHUNKS = st.lists(RECORDS, max_size=5).map(tuple)
STAGES = st.builds(
    VirtualStage,
    st.lists(CHUNKS | CHUNKS | CHUNKS | st.none(), max_size=10).map(tuple),
    st.lists(st.sampled_from(("reduce", "sink", "collect")), min_size=1, max_size=2).map(tuple),
)
WORLDS = st.builds(
    World,
    st.lists(STAGES, min_size=1, max_size=2).map(tuple),
    slots=st.integers(1, 4),
    fan_in=st.integers(2, 4),
    max_failures=st.sampled_from((0, 1, 0.1, 100)),
    slice=st.sampled_from((0.5, 10.0)),
    window=st.integers(1, 3),
)
FAULTS = st.builds(
    Faults,
    batch=st.floats(0, 0.5),
    kill=st.floats(0, 0.05),
    stop=st.floats(0, 0.05),
    slots=st.floats(0, 0.1),
    disk=st.floats(0, 5),
    listing=st.floats(0, 5),
    budget=st.integers(0, 20),
)

# --- every world, every fault ----------------------------------------------------------------------------------------


@settings(max_examples=SEEDS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=WORLDS, seed=st.integers(0, 2**32), faults=FAULTS)
def test_any_world_comes_to_its_one_result_through_any_faults(world: World, seed: int, faults: Faults) -> None:
    outcome = simulate(world, seed, faults)
    assert (outcome.results, outcome.dead) == expected(world)


@settings(max_examples=SEEDS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(which=st.integers(0, 2**32), seed=st.integers(0, 2**32), faults=FAULTS)
def test_any_graph_comes_to_what_the_winners_of_its_races_lead_to(which: int, seed: int, faults: Faults) -> None:
    world = random_world(which)
    outcome = simulate(world, seed, faults)
    assert (outcome.results, outcome.dead) == expected(world, outcome.picks)


def test_many_seeds_come_to_what_they_must() -> None:
    """Each simulation compares its own result with what must come out; a race is won by chance, all else is the same."""
    raced, met = 0, set[str]()
    for seed in range(SEEDS):
        world = random_world(seed)
        rough, calm = simulate(world, seed, random_faults(seed)), simulate(world, seed, CALM)
        chance = any(call.kind in ("race", "quorum", "settle") for call in every_call(world))
        raced += chance
        if not chance:
            assert (rough.results, rough.dead) == (calm.results, calm.dead)
        met |= rough.faults.keys()
    assert 0 < raced < SEEDS
    kinds = {"worker lost", "receipt lost", "receipt twice", "receipt late", "untouched", "broken", "kill", "stop", "slots"}
    assert met == kinds | {"died writing"}


def every_call(world: World) -> list[VirtualCall]:
    """Return the calls of a world, and of what they grow."""
    found, stack = list[VirtualCall](), [*world.calls]
    while stack:
        found.append(stack.pop())
        if found[-1].grows is not None:
            stack += found[-1].grows.calls
    return found


def test_a_seed_tells_the_same_story_twice() -> None:
    assert simulate(random_world(3), 3, ROUGH) == simulate(random_world(3), 3, ROUGH)


def test_a_calm_world_keeps_all_slots_busy() -> None:
    chunk = (VirtualRecord("ok", 1.0),) * 5
    outcome = simulate(World((VirtualStage((chunk,) * 64, ("collect",)),), slots=8))
    assert 64 * 5 / 8 <= outcome.makespan < 64 * 5 / 8 + 1
    assert (outcome.restarts, outcome.faults) == (0, {})


def test_more_slots_make_a_run_shorter_and_its_result_no_other() -> None:
    def world(slots: int) -> World:
        return World(random_world(11).stages, slots=slots, max_failures=1000)

    alone, many = simulate(world(1)), simulate(world(16))
    assert many.makespan < alone.makespan
    assert (many.results, many.dead) == (alone.results, alone.dead)


def test_a_world_in_which_all_fails_gives_all_as_dead_letters() -> None:
    chunks = tuple(tuple(VirtualRecord(fate, 0.1) for _ in range(30)) for fate in CAUSES for _ in range(3))
    outcome = simulate(World((VirtualStage(chunks),)), seed=1, faults=ROUGH)
    assert len(outcome.dead) == 30 * 3 * len(CAUSES)
    assert outcome.restarts > 0


def test_a_world_whose_target_can_not_be_had_fails_however_often_it_is_resumed() -> None:
    calls = (VirtualCall(), VirtualCall(fate="crashes"), VirtualCall(needs=((~0, 0), (~1, 0))))
    outcome = simulate(World(calls=calls, targets=((~2, 0),)), seed=1, faults=ROUGH)
    assert (outcome.results, outcome.dead) == ({}, ())
    assert outcome.restarts >= 2


def test_a_race_is_won_by_the_faster_and_a_failure_is_an_outcome() -> None:
    calls = (
        VirtualCall(seconds=4.0), VirtualCall(fate="raises"), VirtualCall(seconds=1.0),
        VirtualCall("race", arms=((~0, 0), (~1, 0), (~2, 0))), VirtualCall("settle", arms=((~3, 0), (~1, 0))),
    )  # fmt: skip
    outcome = simulate(World(calls=calls, slots=3, targets=((~4, 0),)))
    assert outcome.results == {(~4, 0): b"[c2.0, failed]"}
    assert outcome.picks == {"c3": (2,), "c4": (0,)}


def test_what_a_call_grew_runs_in_its_place() -> None:
    stage = VirtualStage(((VirtualRecord(), VirtualRecord("raises")),), ("collect",))
    grown = VirtualGraph((stage,), (VirtualCall(needs=((0, 0),)),), ((~0, 0), (0, 0)))
    outcome = simulate(World(calls=(VirtualCall(results=2, grows=grown),), targets=((~0, 1),), max_failures=1))
    assert (outcome.results, outcome.dead) == ({(~0, 1): b"c0/0.0.0 "}, ("c0/0.0.1",))


def test_a_keyed_reduction_puts_each_record_into_one_bucket_and_a_stage_goes_on_from_there() -> None:
    keyed = VirtualStage(((VirtualRecord(),) * 5,) * 7, ("group", "collect"), buckets=(3, 1))
    world = World((keyed, VirtualStage(base=(0, 0), kinds=("collect",))), targets=((0, 0), (0, 1), (1, 0)))
    results = simulate(world, seed=1, faults=ROUGH).results
    names = [name + "'" for name in results[0, 0].decode().split()]
    assert sorted(names) == sorted(results[0, 1].decode().split())
    assert results[1, 0].decode().split() == [f"1~{name}" for name in results[0, 0].decode().split()]


def test_the_command_line_says_how_it_went_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--first", "7"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("3 seeds, ")
    assert line.count("\n") == 1


# --- the rules can be broken: a coordinator with one fault is caught ---------------------------------------------------


def caught(capsys: pytest.CaptureFixture[str], seeds: int = 400) -> str:
    assert main(["--seeds", str(seeds)]) == 1
    story = capsys.readouterr().err
    assert story.startswith("seed ")
    return story.partition("\n")[0]


def test_a_barrier_that_opens_early_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Coordinator, "_settled", lambda _self, _number: True)
    assert "durable" in caught(capsys)


def test_a_receipt_that_counts_twice_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    handle, ever = Coordinator.handle, dict[str, Submit]()

    def forgetful(self: Coordinator, stimulus: Stimulus) -> list[Instruction]:
        if isinstance(stimulus, BatchReturned) and stimulus.attempt in ever and self.ending is None:
            self.inflight.setdefault(stimulus.attempt, ever[stimulus.attempt])
        asked = handle(self, stimulus)
        ever.update(self.inflight)
        return asked

    monkeypatch.setattr(Coordinator, "handle", forgetful)
    assert "what is written down came back" in caught(capsys)


def test_a_crash_condemned_without_a_trial_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk_back = Coordinator._chunk_back

    def hasty(self: Coordinator, number: int, piece: Piece, receipt: Receipt) -> None:
        if receipt.failure is not None and receipt.failure.cause == "crash":
            object.__setattr__(receipt.failure, "cause", "timeout")
        chunk_back(self, number, piece, receipt)

    monkeypatch.setattr(Coordinator, "_chunk_back", hasty)
    assert "only the guilty are condemned" in caught(capsys)


def test_the_part_before_a_crash_that_is_forgotten_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pieces.around

    def without_the_part_before(piece: Piece, at: Cursor, **how: Any) -> tuple[Piece, ...]:
        return tuple(part for part in whole(piece, at, **how) if part.first >= at.ordinal)

    monkeypatch.setattr(core, "around", without_the_part_before)
    assert "a piece's records end once or are in the rest once" in caught(capsys)


def test_a_lost_batch_that_is_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Coordinator, "_lose", lambda _self, _job, _reason: None)
    assert "a run never stands still" in caught(capsys)


def test_a_window_that_is_too_wide_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fill = Lanes.fill

    def wide(self: Lanes, *kinds: int) -> Iterator[Submit]:
        self.window += 1
        yield from fill(self, *kinds)
        self.window -= 1

    monkeypatch.setattr(Lanes, "fill", wide)
    assert "the window is kept" in caught(capsys)


def test_what_begins_on_something_that_is_not_durable_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    then = Coordinator._then

    def hasty(self: Coordinator, act: Callable[[], None]) -> None:
        if isinstance(act, partial) and act.func.__name__ == "_called" and self.state.calls[act.args[0]].results:
            act()
        else:
            then(self, act)

    monkeypatch.setattr(Coordinator, "_then", hasty)
    assert "durable" in caught(capsys)


def test_a_loser_that_runs_on_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Coordinator, "_drop", lambda _self, _nodes: None)
    found = caught(capsys)
    assert "is cancelled" in found or "nothing runs that nobody wants" in found


def test_a_decision_that_cancels_nobody_is_caught(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Dataflow, "sweep", lambda _self, _verdict: ())
    assert "what nobody wants any more is cancelled" in caught(capsys)


def test_a_crowd_that_is_cancelled_with_a_loser_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requeue, drop, dropping = Coordinator._requeue, Coordinator._drop, list[int]()

    def cruel(self: Coordinator, nodes: Iterable[int]) -> None:
        dropping.append(1)
        drop(self, nodes)
        dropping.pop()

    monkeypatch.setattr(Coordinator, "_drop", cruel)
    monkeypatch.setattr(Coordinator, "_requeue", lambda self, job: None if dropping else requeue(self, job))
    assert "a run never stands still" in caught(capsys, 2500)


def test_a_grown_graph_with_wrong_numbers_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unmoved(growth: Growth, state: RunState) -> tuple[GraphFacts, tuple[Address, ...]]:
        return growth.graph, renumbered(growth, state)[1]

    monkeypatch.setattr(core, "renumbered", unmoved)
    assert "what grew" in caught(capsys)


def test_a_call_that_is_blamed_for_a_crash_without_a_trial_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_back = Coordinator._call_back
    monkeypatch.setattr(
        Coordinator, "_call_back", lambda self, job, receipt: call_back(self, replace(job, alone=True), receipt)
    )
    assert "only the guilty fail" in caught(capsys)


def test_a_coordinator_killed_as_it_stops_with_nothing_else_under_way_goes_on() -> None:
    world = World((VirtualStage((), ("reduce", "reduce")),), slots=1, fan_in=2, slice=0.5)
    faults = Faults(batch=0.25, kill=0.03125, stop=0.03125, slots=0.0, disk=1.0, listing=0.0, budget=2)
    assert simulate(world, 1801, faults).results == expected(world)[0]

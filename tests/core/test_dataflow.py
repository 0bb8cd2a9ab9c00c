"""Which nodes of a run are wanted, ready, failed or given up, whatever happens in which order."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parflow.core.dataflow import Dataflow, Verdict
from parflow.core.entries import BarrierOpened, Called, ChunksListed, Decided, Grown, Merged, Owned, RunStarted
from parflow.core.growth import renumbered
from parflow.core.history import RunState, fold
from parflow.model import Address, CallFacts, CallKind, Failure, GraphFacts, Growth, Ref, StageFacts, TaskFacts

# --- how to say it briefly -------------------------------------------------------------------------------------------

RESULT = Ref(1, "d", inline=b"r")
FAILURE = Failure("", "work", "exception", "ValueError", "no")


def at(*calls: int) -> tuple[Address, ...]:
    """Return the addresses of the first results of calls."""
    return tuple((~number, 0) for number in calls)


def call(*needs: int) -> CallFacts:
    return CallFacts("call", 0, at(*needs))


def choose(condition: int, *arms: int) -> CallFacts:
    return CallFacts("choose", 0, at(condition), at(*arms))


def decide(kind: CallKind, *arms: int, count: int = 1) -> CallFacts:
    return CallFacts(kind, -1, (), at(*arms), count)


def stage(*needs: Address, base: Address | None = None, kinds: tuple[str, ...] = ("reduce",)) -> StageFacts:
    return StageFacts("stage", (), kinds, kinds, (), needs, base)


def state_of(*calls: CallFacts, stages: tuple[StageFacts, ...] = (), targets: tuple[Address, ...]) -> RunState:
    started = RunStarted("flow", "", stages, 16, {}, (TaskFacts("work"),), calls, targets)
    return fold([started, Owned(1, "me", 0)])


def begun(*calls: CallFacts, stages: tuple[StageFacts, ...] = (), wanted: tuple[Address, ...]) -> Dataflow:
    """Return a dataflow whose targets are wanted."""
    flow = Dataflow(state_of(*calls, stages=stages, targets=wanted), wanted)
    flow.want(wanted)
    return flow


def ready(flow: Dataflow) -> list[int]:
    """Take what can start."""
    taken = sorted(flow.ready, reverse=True)
    flow.ready.clear()
    return taken


def calls_ready(flow: Dataflow) -> list[int]:
    return [~node for node in ready(flow)]


def done(flow: Dataflow, number: int) -> None:
    flow.state.apply(Called(number, (RESULT,)))
    flow.provide((~number, 0))


def chosen(flow: Dataflow, number: int, choice: int) -> None:
    flow.state.apply(Called(number, (), choice))
    flow.renew(number)


def failed(flow: Dataflow, number: int) -> None:
    flow.state.apply(Called(number, (), None, FAILURE))
    flow.fail(~number)


def decided(flow: Dataflow) -> tuple[Verdict, tuple[int, ...]]:
    """Write the next verdict down; returns it, and what nobody wants any more."""
    verdict = flow.verdicts.popleft()
    gone = flow.sweep(verdict)
    flow.state.apply(Decided(verdict.call, verdict.picked, {str(arm): FAILURE for arm in verdict.failed}, gone))
    flow.provide((~verdict.call, 0))
    return verdict, gone


# --- calls --------------------------------------------------------------------------------------------------------------


def test_a_call_is_ready_when_all_that_it_needs_is_there() -> None:
    flow = begun(call(), call(), call(0, 1, 0), wanted=at(2))
    assert calls_ready(flow) == [0, 1]
    done(flow, 0)
    assert calls_ready(flow) == []
    done(flow, 1)
    assert calls_ready(flow) == [2]
    assert not flow.done
    done(flow, 2)
    assert flow.done


def test_what_nobody_wants_does_not_run() -> None:
    flow = begun(call(), call(), call(1), wanted=at(0))
    assert calls_ready(flow) == [0]
    assert flow.wanted == {~0}


def test_results_of_one_call_are_there_together() -> None:
    flow = begun(CallFacts("call", 0, results=3), CallFacts("call", 0, ((~0, 2), (~0, 1))), wanted=((~1, 0), (~0, 2)))
    assert calls_ready(flow) == [0]
    done(flow, 0)
    assert flow.has((~0, 1))
    assert calls_ready(flow) == [1]


def test_a_failure_goes_to_all_that_wait_and_names_whom_to_blame() -> None:
    flow = begun(call(), call(0), call(1), call(), wanted=at(2, 3))
    failed(flow, 0)
    assert flow.failed == {~0: ~0, ~1: ~0, ~2: ~0}
    assert flow.lost == ~0
    assert not flow.has((~2, 0))


def test_a_failure_of_what_no_target_rests_on_loses_nothing() -> None:
    flow = begun(call(), call(), decide("settle", 0, 1), wanted=at(2))
    failed(flow, 0)
    assert flow.lost is None


def test_what_is_wanted_after_it_failed_fails_at_once() -> None:
    flow = begun(call(), decide("settle", 0), choose(1, 3), call(0), wanted=at(2))
    failed(flow, 0)
    decided(flow)
    chosen(flow, 2, 0)
    assert flow.lost == ~0


# --- choices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [0, 1])
def test_of_a_choice_only_the_chosen_branch_is_wanted(choice: int) -> None:
    flow = begun(call(), call(), call(), choose(0, 1, 2), wanted=at(3))
    assert calls_ready(flow) == [0]
    done(flow, 0)
    assert calls_ready(flow) == [3]
    chosen(flow, 3, choice)
    assert calls_ready(flow) == [1 + choice]
    done(flow, 1 + choice)
    assert flow.done
    assert ~(2 - choice) not in flow.wanted


def test_a_choice_of_what_is_there_already_is_done_at_once() -> None:
    flow = begun(call(), choose(0, 0), wanted=at(1))
    done(flow, 0)
    chosen(flow, 1, 0)
    assert flow.done


# --- decisions ---------------------------------------------------------------------------------------------------------


def test_settle_waits_for_all_and_tells_which_failed() -> None:
    flow = begun(call(), call(), call(1), decide("settle", 0, 2), wanted=at(3))
    done(flow, 0)
    assert not flow.verdicts
    failed(flow, 1)
    verdict, gone = decided(flow)
    assert verdict == Verdict(3, (0,), {1: ~1})
    assert flow.done
    assert gone == ()  # they have ended, by failing: nothing of them is cancelled


def test_a_race_is_decided_by_the_first_and_gives_up_what_only_the_others_need() -> None:
    flow = begun(call(), call(), call(1, 0), decide("race", 0, 2), wanted=at(3))
    ready(flow)
    done(flow, 0)
    verdict, gone = decided(flow)
    assert verdict.picked == (0,)
    assert gone == (~2, ~1)
    assert flow.done
    done(flow, 1)  # it was on its way
    assert calls_ready(flow) == []


def test_what_is_wanted_elsewhere_too_is_not_given_up() -> None:
    flow = begun(call(), call(), decide("race", 0, 1), wanted=at(2, 1))
    done(flow, 0)
    assert decided(flow)[1] == ()
    assert not flow.done
    done(flow, 1)
    assert flow.done


def test_a_race_fails_with_its_last_branch_and_blames_the_first() -> None:
    flow = begun(call(), call(), decide("race", 0, 1), wanted=at(2))
    failed(flow, 1)
    assert flow.lost is None
    failed(flow, 0)
    assert flow.lost == ~0


def test_a_quorum_takes_the_first_ones_in_their_order() -> None:
    flow = begun(call(), call(), call(), decide("quorum", 0, 1, 2, count=2), wanted=at(3))
    done(flow, 2)
    assert not flow.verdicts
    done(flow, 0)
    verdict, gone = decided(flow)
    assert verdict.picked == (0, 2)
    assert gone == (~1,)


def test_a_quorum_fails_as_soon_as_it_cannot_be_reached() -> None:
    flow = begun(call(), call(), call(), decide("quorum", 0, 1, 2, count=2), wanted=at(3))
    failed(flow, 1)
    assert flow.lost is None
    failed(flow, 2)
    assert flow.lost == ~1


def test_a_decision_is_taken_once() -> None:
    flow = begun(call(), call(), decide("race", 0, 1), wanted=at(2))
    done(flow, 0)
    done(flow, 1)
    assert len(flow.verdicts) == 1
    decided(flow)
    assert not flow.verdicts


def test_a_decision_over_nothing_but_failures_of_the_past_is_settled_all_the_same() -> None:
    flow = begun(call(), decide("settle", 0, 0), wanted=at(1))
    failed(flow, 0)
    assert decided(flow)[0] == Verdict(1, (), {0: ~0, 1: ~0})
    assert flow.done


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_that_goes_on_from_another_one_waits_for_its_list_alone() -> None:
    stages = (stage(), stage((0, 0), base=(0, -1)))
    flow = begun(stages=stages, wanted=((1, 0),))
    assert ready(flow) == [0]
    flow.provide((0, -1))
    assert ready(flow) == []
    flow.provide((0, 0))
    assert ready(flow) == [1]


def test_outputs_of_a_stage_become_available_one_by_one() -> None:
    flow = begun(call_on((0, 1)), stages=(stage(kinds=("reduce", "collect")),), wanted=((~0, 0), (0, 0)))
    flow.provide((0, 1))
    assert 0 in ready(flow)
    assert not flow.has((0, 0))


def call_on(*needs: Address) -> CallFacts:
    return CallFacts("call", 0, needs)


def test_a_failed_stage_takes_all_of_its_outputs_with_it() -> None:
    flow = begun(call_on((0, 0)), call_on((0, 1)), stages=(stage(kinds=("reduce", "collect")),), wanted=at(0, 1))
    flow.fail(0)
    assert flow.failed == {0: 0, ~0: 0, ~1: 0}


# --- growth -----------------------------------------------------------------------------------------------------------


def grow(flow: Dataflow, number: int, *calls: CallFacts, result: Address) -> None:
    """Let a call return a graph, whose numbers are its own."""
    facts, results = renumbered(Growth(GraphFacts((), (), calls), (result,), "code"), flow.state)
    flow.state.apply(Grown(number, facts, results, "code"))
    flow.renew(number)


def test_what_a_call_returned_runs_in_its_place() -> None:
    flow = begun(call(), call(0), wanted=at(1))
    ready(flow)
    grow(flow, 0, call(), call(0), result=(~1, 0))
    assert calls_ready(flow) == [2]
    done(flow, 2)
    assert calls_ready(flow) == [3]
    done(flow, 3)
    assert flow.has((~0, 0))
    assert calls_ready(flow) == [1]


def test_a_loop_of_thousands_of_turns_ends_without_a_deep_stack() -> None:
    flow = begun(call(), wanted=at(0))
    for number in range(5000):
        assert calls_ready(flow) == [number]
        grow(flow, number, call(), result=(~0, 0))
    done(flow, 5000)
    assert flow.done


def test_numbers_of_a_graph_go_on_where_those_of_the_run_end() -> None:
    state = state_of(call(), call(), stages=(stage(), stage()), targets=at(0))
    inner = (stage((~0, 1), base=(0, -1)), stage())
    growth = Growth(
        GraphFacts(inner, (TaskFacts("new"),), (call(), CallFacts("choose", 0, ((1, 0),), at(0)))), ((~1, 0), (1, 0)), "code"
    )
    facts, results = renumbered(growth, state)
    assert facts.stages[0].needs == ((~2, 1),)
    assert facts.stages[0].base == (2, -1)
    assert [one.task for one in facts.calls] == [1, 1]
    assert (facts.calls[1].needs, facts.calls[1].arms) == (((3, 0),), ((~2, 0),))
    assert results == ((~3, 0), (3, 0))


# --- going on ---------------------------------------------------------------------------------------------------------


def test_what_was_done_before_is_not_ready_again() -> None:
    state = state_of(call(), call(0), choose(1, 3, 4), call(), call(1), targets=at(2))
    for entry in (Called(0, (RESULT,)), Called(1, (RESULT,)), Called(2, (), 1)):
        state.apply(entry)
    flow = Dataflow(state, at(2))
    flow.want(at(2))
    assert calls_ready(flow) == [4]
    assert flow.wanted == {~2, ~4, ~1}


def test_a_call_that_failed_before_is_made_again_and_one_that_was_decided_on_is_not() -> None:
    state = state_of(call(), call(), decide("settle", 0, 1), call(2), call(), targets=at(3, 4))
    state.apply(Called(0, (), None, FAILURE))
    state.apply(Decided(2, (1,), {"0": FAILURE}))
    state.apply(Called(4, (), None, FAILURE))
    flow = Dataflow(state, at(3, 4))
    flow.want(at(3, 4))
    assert calls_ready(flow) == [3, 4]
    assert ~0 not in flow.wanted


def test_a_stage_that_was_complete_wants_nothing_more() -> None:
    state = state_of(call(), stages=(stage((~0, 0)),), targets=((0, 0),))
    for entry in (ChunksListed(0, last=True), BarrierOpened(0), Merged(0, 0, 1, 0, RESULT)):
        state.apply(entry)
    flow = Dataflow(state, ((0, 0),))
    flow.want(((0, 0),))
    assert ready(flow) == [0]
    assert ~0 not in flow.wanted


# --- any graph, any order -----------------------------------------------------------------------------------------------


@dataclass
class Play:
    """Runs a graph of calls to its end, one thing at a time, in any order."""

    facts: list[CallFacts]
    bad: set[int]
    choices: list[int]
    chance: random.Random
    made: list[int] = field(default_factory=list)

    def run(self, target: int, forgetful: bool) -> Dataflow:
        flow = begun(*self.facts, wanted=at(target))
        while flow.lost is None and (flow.ready or flow.verdicts):
            if flow.verdicts and (not flow.ready or self.chance.random() < 0.5):
                decided(flow)
                continue
            place = self.chance.randrange(len(flow.ready))
            number = ~flow.ready[place]
            del flow.ready[place]
            self._make(flow, number)
            if forgetful and self.chance.random() < 0.3:  # the process was lost, and another one goes on
                flow = Dataflow(flow.state, at(target))
                flow.want(at(target))
        return flow

    def _make(self, flow: Dataflow, number: int) -> None:
        facts = self.facts[number]
        assert all(flow.has(need) for need in facts.needs)
        self.made.append(number)
        if number in self.bad:
            failed(flow, number)
        elif facts.kind == "choose":
            chosen(flow, number, self.choices[number] % len(facts.arms))
        else:
            done(flow, number)

    def meant(self, number: int, seen: dict[int, bool]) -> bool:
        """Tell whether a call succeeds, as a plain recursion says; ``seen`` are all that it takes."""
        if number in seen:
            return seen[number]
        facts = self.facts[number]
        needs = [self.meant(~need[0], seen) for need in facts.needs]
        good = all(needs) and number not in self.bad
        arms = [~arm[0] for arm in facts.arms]
        if facts.kind == "choose":
            good = good and self.meant(arms[self.choices[number] % len(arms)], seen)
        elif facts.kind != "call":
            won = sum([self.meant(arm, seen) for arm in arms])
            good = facts.kind == "settle" or won >= facts.count
        seen[number] = good
        return good


@st.composite
def graphs(draw: Callable[[st.SearchStrategy[object]], object]) -> list[CallFacts]:
    facts = [call()]
    for _ in range(draw(st.integers(1, 12))):  # type: ignore[call-overload]
        others = st.lists(st.integers(0, len(facts) - 1), min_size=1, max_size=3)
        needs: list[int] = draw(others)  # type: ignore[assignment]
        arms: list[int] = draw(others)  # type: ignore[assignment]
        kind = draw(st.sampled_from(["call", "call", "choose", "settle", "race", "quorum"]))
        match kind:
            case "call":
                facts.append(call(*needs))
            case "choose":
                facts.append(choose(needs[0], *arms))
            case "quorum":
                facts.append(decide("quorum", *arms, count=min(2, len(arms))))
            case "settle" | "race":
                facts.append(decide(kind, *arms))
    return facts


@settings(max_examples=200)
@given(graphs(), st.sets(st.integers(0, 12), max_size=3), st.lists(st.integers(0, 2), min_size=13, max_size=13), st.randoms())
def test_any_graph_in_any_order_ends_as_a_plain_recursion_says_and_makes_no_call_twice(
    facts: list[CallFacts], bad: set[int], choices: list[int], chance: random.Random
) -> None:
    bad = {number for number in bad if number < len(facts) and facts[number].kind in ("call", "choose")}
    play = Play(facts, bad, choices, chance)
    target = len(facts) - 1
    flow = play.run(target, forgetful=False)
    seen: dict[int, bool] = {}
    assert flow.done == play.meant(target, seen)
    assert flow.done == (flow.lost is None)
    assert len(play.made) == len(set(play.made))
    assert set(play.made) <= seen.keys()


@settings(max_examples=200)
@given(graphs(), st.lists(st.integers(0, 2), min_size=13, max_size=13), st.randoms())
def test_a_run_that_is_lost_again_and_again_makes_no_finished_call_twice(
    facts: list[CallFacts], choices: list[int], chance: random.Random
) -> None:
    play = Play(facts, set(), choices, chance)
    flow = play.run(len(facts) - 1, forgetful=True)
    assert flow.done
    assert len(play.made) == len(set(play.made))

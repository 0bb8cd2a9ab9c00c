"""What an address stands for: found where it is, however long the way there, and made of what is there."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parflow.core.bindings import Binding, bind
from parflow.core.entries import Called, ChunksListed, Decided, Grown, Merged, Owned, PieceEnded, Published, RunStarted
from parflow.core.history import RunState, fold
from parflow.model import (
    Address,
    CallFacts,
    CallKind,
    Chunk,
    Failure,
    GraphFacts,
    Outcome,
    Part,
    Piece,
    Receipt,
    Ref,
    StageFacts,
    Tally,
    TaskFacts,
)

FAILURE = Failure("", "work", "exception", "ValueError", "no")


def ref(value: Any) -> Ref:
    data = pickle.dumps(value)
    return Ref(len(data), "d", inline=data)


def many(*records: Any) -> Ref:
    data = b"".join(map(pickle.dumps, records))
    return Ref(len(data), "d", inline=data)


def load(binding: Binding) -> Any:
    """Open what is bound, as a worker does."""

    def read(ref: Ref) -> Any:
        return pickle.loads(ref.inline or b"")

    def read_all(refs: tuple[Ref, ...]) -> list[Any]:
        found = []
        for one in refs:
            data = one.inline or b""
            while data:
                found.append(pickle.loads(data))
                data = data[len(pickle.dumps(found[-1])) :]
        return found

    return binding.load(read, read_all)


def state_of(*calls: CallFacts, stages: tuple[StageFacts, ...] = ()) -> RunState:
    return fold([RunStarted("flow", "", stages, 16, {}, (TaskFacts("work"),), calls), Owned(1, "me", 0)])


def call(kind: CallKind = "call", *arms: Address, results: int = 1) -> CallFacts:
    return CallFacts(kind, 0, arms=arms, results=results)


def stage(kind: str, buckets: int = 1) -> StageFacts:
    return StageFacts("stage", (), ("out",), (kind,), buckets=(buckets,) if buckets > 1 else ())


def chunk(index: int) -> Chunk:
    return Chunk(index, f"c{index}", (Part("f", 0, None, 1, "s"),), 1)


# --- what a stage gives ---------------------------------------------------------------------------------------------------


def test_a_reduction_is_the_value_at_the_root_of_its_merges() -> None:
    state = state_of(stages=(stage("reduce"),))
    state.apply(Merged(0, 0, 1, 0, ref(41)))
    assert load(bind(state, (0, 0))) == 41


def test_a_collection_is_the_records_of_its_pieces_in_input_order() -> None:
    state = state_of(stages=(stage("collect"),))
    state.apply(ChunksListed(0, (chunk(0), chunk(1)), last=True))
    for index, records in ((1, ["c"]), (0, ["a", "b"])):
        state.apply(PieceEnded(0, Piece(index), (), Receipt("done", results=(many(*records),), tally=Tally(1))))
    assert load(bind(state, (0, 0))) == ["a", "b", "c"]


def test_a_collection_of_nothing_is_an_empty_list() -> None:
    state = state_of(stages=(stage("collect"),))
    state.apply(ChunksListed(0, last=True))
    assert load(bind(state, (0, 0))) == []


def test_rows_of_a_keyed_reduction_are_those_of_its_buckets_one_after_the_other() -> None:
    state = state_of(stages=(stage("group", buckets=3),))
    for bucket, rows in ((2, ["c"]), (0, ["a"]), (1, [])):
        state.apply(Merged(0, 0, 1, 0, many(*rows), bucket=bucket))
    assert load(bind(state, (0, 0))) == ["a", "c"]


def test_what_a_sink_gives_is_its_manifest() -> None:
    state = state_of(stages=(stage("sink"),))
    state.apply(Published(0, 0, {"rows": 3}))
    assert load(bind(state, (0, 0))) == {"rows": 3}


# --- what a call gives ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(), min_size=1, max_size=5))
def test_each_result_of_a_call_has_its_place(values: list[int]) -> None:
    state = state_of(call(results=len(values)))
    state.apply(Called(0, tuple(map(ref, values))))
    assert [load(bind(state, (~0, item))) for item in range(len(values))] == values


def test_a_choice_is_what_its_branch_is() -> None:
    state = state_of(call(results=2), call("choose", (0, 0), (~0, 1)), stages=(stage("reduce"),))
    state.apply(Called(0, (ref("a"), ref("b"))))
    state.apply(Called(1, (), 1))
    assert load(bind(state, (~1, 0))) == "b"


def test_a_choice_of_records_is_the_list_of_them() -> None:
    state = state_of(call("choose", (0, 0)), stages=(stage("collect"),))
    state.apply(ChunksListed(0, (chunk(0),), last=True))
    state.apply(PieceEnded(0, Piece(0), (), Receipt("done", results=(many(1, 2),))))
    state.apply(Called(0, (), 0))
    binding = bind(state, (~0, 0))
    assert (binding.form, load(binding)) == ("records", [1, 2])


def test_a_graph_that_was_returned_gives_each_result_in_its_place() -> None:
    state = state_of(call(results=2))
    inner = GraphFacts((), (), (call(), call()))
    state.apply(Grown(0, inner, ((~2, 0), (~1, 0)), "code"))
    state.apply(Called(1, (ref("one"),)))
    state.apply(Called(2, (ref("two"),)))
    assert [load(bind(state, (~0, item))) for item in (0, 1)] == ["two", "one"]


@pytest.mark.parametrize("turns", [1, 10_000])
def test_the_value_of_a_loop_is_found_at_its_end_without_a_deep_stack(turns: int) -> None:
    state = state_of(call())
    for number in range(turns):
        state.apply(Grown(number, GraphFacts((), (), (call(),)), ((~(number + 1), 0),), "code"))
    state.apply(Called(turns, (ref("last"),)))
    assert load(bind(state, (~0, 0))) == "last"


def test_a_race_is_what_the_winner_is() -> None:
    state = state_of(call(), call(), call("race", (~0, 0), (~1, 0)))
    state.apply(Called(1, (ref("second"),)))
    state.apply(Decided(2, (1,)))
    assert load(bind(state, (~2, 0))) == "second"


def test_a_quorum_is_a_list_and_what_settled_are_outcomes() -> None:
    arms: tuple[Address, ...] = ((~0, 0), (~1, 0), (~2, 0))
    state = state_of(call(), call(), call(), call("quorum", *arms), call("settle", *arms), call("settle", (~4, 0), (~3, 0)))
    state.apply(Called(0, (ref("a"),)))
    state.apply(Called(2, (ref("c"),)))
    state.apply(Decided(3, (0, 2), {"1": FAILURE}))
    state.apply(Decided(4, (0, 2), {"1": FAILURE}))
    state.apply(Decided(5, (0, 1)))
    outcomes = [Outcome("a"), Outcome(failure=FAILURE), Outcome("c")]
    assert load(bind(state, (~3, 0))) == ["a", "c"]
    assert load(bind(state, (~4, 0))) == outcomes
    assert load(bind(state, (~5, 0))) == [Outcome(outcomes), Outcome(["a", "c"])]


def test_a_binding_travels() -> None:
    part = Binding("value", (ref(1),))
    binding = Binding("list", parts=(Binding("outcome", parts=(part,)), Binding("data", data={"rows": 2})))
    assert pickle.loads(pickle.dumps(binding)) == binding
    assert load(binding) == [Outcome(1), {"rows": 2}]


def test_each_reading_is_an_object_of_its_own() -> None:
    state = state_of(call())
    state.apply(Called(0, (ref([1]),)))
    binding = bind(state, (~0, 0))
    load(binding).append(2)
    assert load(binding) == [1]

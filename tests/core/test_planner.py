"""From a lazy graph to stages and calls: what runs in one pass, what is stored in between, and what only a branch wants."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parflow.core import reducers
from parflow.core.plan import Plan, Stage
from parflow.core.planner import StoredSource, make_plan, reach
from parflow.core.reducers.grouped import Grouped
from parflow.errors import GraphError
from parflow.model import Address
from parflow.nodes import (
    Arguments,
    CallNode,
    CollectNode,
    OutputNode,
    RecordsNode,
    ReduceNode,
    SinkNode,
    Slot,
    SourceNode,
    StepNode,
    StoredNode,
    Task,
    Use,
)

# --- how to say it briefly -------------------------------------------------------------------------------------------


class Place:
    """A source, of which only the name counts here."""

    def __init__(self, name: str) -> None:
        self.name = name


def source(name: str = "read") -> SourceNode:
    return SourceNode(Place(name))


def task(name: str) -> Task:
    return Task(lambda *values: values, name)


def given_to(*nodes: OutputNode) -> Arguments:
    return Arguments(tuple(Slot(number) for number in range(len(nodes))), {}, tuple(map(Use, nodes)))


def step(parent: RecordsNode, name: str, *needs: OutputNode) -> StepNode:
    return StepNode("map", task(name), parent, given_to(*needs))


def mean(parent: RecordsNode, name: str = "mean") -> ReduceNode:
    return ReduceNode(reducers.mean(), parent, name)


def call(name: str, *needs: OutputNode) -> CallNode:
    return CallNode("call", name, task(name), given_to(*needs))


def when(condition: OutputNode, *arms: OutputNode) -> CallNode:
    return CallNode("choose", "when", task("when"), given_to(condition), tuple(map(Use, arms)))


def settle(*arms: OutputNode) -> CallNode:
    return CallNode("settle", "settle", arms=tuple(map(Use, arms)))


def plan(*outputs: OutputNode) -> Plan:
    return make_plan("flow", outputs)


def shape(made: Plan) -> list[tuple[list[str], list[str]]]:
    """Return the names of each stage's steps and outputs."""
    return [([step.task.name for step in stage.steps], [output.name for output in stage.outputs]) for stage in made.stages]


def output_at(made: Plan, address: Address | None) -> str:
    assert address is not None
    node, item = address
    return made.stages[node].outputs[item].name if node >= 0 else made.calls[~node].name


# --- one pass ---------------------------------------------------------------------------------------------------------


def test_all_that_hangs_on_a_source_and_waits_for_nothing_is_one_pass() -> None:
    docs = source()
    clean = step(docs, "clean")
    outputs: list[OutputNode] = [
        mean(step(clean, "score")),
        SinkNode(None, clean, "write"),
        CollectNode(docs),
        mean(docs, "all"),
    ]
    made = plan(*outputs)
    assert shape(made) == [(["clean", "score"], ["mean", "write", "collect", "all"])]
    assert [entry.parent for entry in made.stages[0].steps] == [-1, 0]
    assert [output.parent for output in made.stages[0].outputs] == [1, 0, -1, -1]
    assert made.targets == ((0, 0), (0, 1), (0, 2), (0, 3))


def test_a_node_that_is_wanted_twice_is_there_once() -> None:
    total = mean(step(source(), "clean"))
    made = plan(total, call("f", total, total), total)
    assert shape(made) == [(["clean"], ["mean"])]
    assert made.targets == ((0, 0), (-1, 0), (0, 0))
    assert made.calls[0].facts.needs == ((0, 0), (0, 0))


def test_two_sources_are_two_passes() -> None:
    made = plan(mean(source("a")), mean(source("b")))
    assert [stage.source.name for stage in made.stages] == ["a", "b"]


def test_nothing_to_compute_is_no_plan() -> None:
    with pytest.raises(GraphError, match="'flow' returns nothing"):
        plan()


# --- what waits for values -------------------------------------------------------------------------------------------------


def test_a_step_that_waits_for_a_value_of_the_same_records_goes_on_from_what_was_stored() -> None:
    parsed = step(source(), "parse")
    average = mean(parsed)
    made = plan(CollectNode(step(parsed, "normalise", average)))
    assert shape(made) == [(["parse"], ["mean", "records of parse"]), (["normalise"], ["collect"])]
    assert made.stages[1].base == (0, 1)
    assert made.stages[1].needs == ((0, 0),)
    assert isinstance(made.stages[1].source, StoredSource)


def test_what_is_collected_anyway_is_not_stored_twice() -> None:
    parsed = step(source(), "parse")
    made = plan(CollectNode(parsed, "mine"), CollectNode(step(parsed, "normalise", mean(parsed))))
    assert shape(made) == [(["parse"], ["mine", "mean"]), (["normalise"], ["collect"])]
    assert output_at(made, made.stages[1].base) == "mine"


def test_a_step_right_behind_the_source_reads_it_again_from_the_same_list() -> None:
    docs = source()
    made = plan(CollectNode(step(docs, "normalise", mean(docs))))
    assert shape(made) == [([], ["mean"]), (["normalise"], ["collect"])]
    assert made.stages[1].base == (0, -1)


def test_steps_that_wait_for_the_same_values_share_a_pass() -> None:
    docs, value = source(), call("value")
    one, two = step(docs, "one", value), step(docs, "two", value)
    made = plan(mean(one), mean(two), mean(step(two, "three", value)))
    assert shape(made) == [(["one", "two", "three"], ["mean", "mean", "mean"])]
    assert made.stages[0].base is None


def test_a_later_step_that_waits_for_more_is_a_pass_of_its_own() -> None:
    first = step(source(), "first", call("a"))
    second = step(first, "second", call("b"))
    third = step(second, "third")
    made = plan(mean(third), mean(first))
    assert shape(made) == [(["first"], ["records of first", "mean"]), (["second", "third"], ["mean"])]
    assert made.stages[1].needs == ((-2, 0),)


def test_a_chain_that_waits_for_more_and_more_is_one_pass_where_nothing_else_goes_on_from_it() -> None:
    first = step(source(), "first", call("a"))
    made = plan(mean(step(first, "second", call("b"))))
    assert shape(made) == [(["first", "second"], ["mean"])]
    assert made.stages[0].needs == ((-1, 0), (-2, 0))


def test_rows_of_a_keyed_reduction_are_read_where_they_are_kept() -> None:
    grouped = ReduceNode(Grouped("k", reducers.count(), buckets=3), source(), "groups")
    rows = StoredNode(grouped)
    made = plan(CollectNode(rows), mean(step(rows, "size")))
    assert shape(made) == [([], ["groups"]), (["size"], ["mean"])]
    assert made.targets == ((0, 0), (1, 0))
    assert made.stages[1].base == (0, 0)
    assert made.facts().stages[0].buckets == (3,)


def test_the_items_of_a_value_are_a_source_that_waits_for_it() -> None:
    items = SourceNode(Place("expand"), Use(call("pages"), 0))
    made = plan(CollectNode(step(items, "read")))
    assert (made.stages[0].value, made.stages[0].needs, made.stages[0].base) == ((-1, 0), ((-1, 0),), None)


# --- branches ---------------------------------------------------------------------------------------------------------------


def test_branches_are_passes_of_their_own_and_what_they_share_is_stored() -> None:
    parsed = step(source(), "parse")
    arms = [mean(step(parsed, name), f"mean of {name}") for name in ("one", "two")]
    made = plan(when(call("condition"), *arms))
    assert shape(made) == [
        (["parse"], ["records of parse"]),
        (["one"], ["mean of one"]),
        (["two"], ["mean of two"]),
    ]
    assert made.stages[1].base == made.stages[2].base == (0, 0)
    assert [output_at(made, arm) for arm in made.calls[-1].facts.arms] == ["mean of one", "mean of two"]


def test_what_is_wanted_in_any_case_is_made_with_the_rest_although_a_branch_wants_it_too() -> None:
    parsed = step(source(), "parse")
    average, top = mean(parsed), mean(parsed, "top")
    made = plan(average, when(call("condition"), top, average))
    assert shape(made) == [(["parse"], ["mean", "records of parse"]), ([], ["top"])]
    assert made.stages[1].base == (0, 1)


def test_a_sink_of_a_branch_is_in_no_pass_that_runs_in_any_case() -> None:
    rows = step(source(), "rows")
    made = plan(mean(rows), when(call("condition"), SinkNode(None, rows, "write"), call("other")))
    (sinks,) = (stage for stage in made.stages if any(output.kind == "sink" for output in stage.outputs))
    assert [output.kind for output in sinks.outputs] == ["sink"]


def test_what_two_branches_of_one_decision_want_together_is_one_pass() -> None:
    rows = step(source(), "rows")
    both = mean(rows, "both")
    made = plan(settle(both, call("f", both), both))
    assert shape(made) == [(["rows"], ["both"])]
    assert [output_at(made, arm) for arm in made.calls[-1].facts.arms] == ["both", "f", "both"]


def test_a_branch_within_a_branch_is_not_fused_with_what_is_around_it() -> None:
    rows = source()
    inner = when(call("inner"), mean(rows, "deep"), call("shallow"))
    made = plan(when(call("outer"), inner, mean(rows, "flat")))
    assert sorted(outputs[0] for _, outputs in shape(made)) == ["deep", "flat"]


# --- calls ------------------------------------------------------------------------------------------------------------------


def test_calls_of_one_function_share_its_task_as_long_as_its_policies_are_the_same() -> None:
    def work() -> None: ...

    same, slow = Task(work, "work"), Task(work, "work", timeout=1.0)
    nodes = [CallNode("call", "work", one) for one in (same, Task(work, "work"), slow)]
    made = plan(*nodes)
    assert [call.facts.task for call in made.calls] == [0, 0, 1]
    assert made.tasks == (same, slow)


def test_a_call_comes_after_those_it_waits_for_however_long_the_chain() -> None:
    last = call("first")
    for _ in range(20_000):
        last = call("next", last)
    made = plan(last)
    assert made.targets == ((~20_000, 0),)
    assert all(entry.facts.needs == ((~(number - 1), 0),) for number, entry in enumerate(made.calls) if number)


def test_every_node_is_reached_once_and_after_what_it_rests_on() -> None:
    first = call("first")
    pair = [call("left", first), call("right", first)]
    last = call("last", *pair, first)
    assert reach([last, first]) == [first, *pair, last]


def test_the_item_of_a_call_with_several_results_is_part_of_its_address() -> None:
    pair = CallNode("call", "pair", task("pair"), results=2)
    use = CallNode("call", "use", task("use"), Arguments((Slot(0), Slot(1)), {}, (Use(pair, 1), Use(pair, 0))))
    made = make_plan("flow", [Use(use), Use(pair, 1)])
    assert made.calls[1].facts.needs == ((-1, 1), (-1, 0))
    assert made.targets == ((-2, 0), (-1, 1))


def test_where_lazy_results_stood_only_addresses_are_left() -> None:
    made = plan(call("f", call("g")), CollectNode(step(source(), "s", call("h"))))
    assert all(not entry.arguments.uses for entry in made.calls)
    assert all(not entry.arguments.uses for stage in made.stages for entry in stage.steps)


# --- any graph --------------------------------------------------------------------------------------------------------------

Draw = Callable[[st.SearchStrategy[Any]], Any]


KINDS = ["source", "step", "step", "reduce", "collect", "group", "expand", "call", "when", "settle"]


@st.composite
def graphs(draw: Draw) -> list[OutputNode]:
    """Draw a graph of steps, reductions, calls and decisions, and what of it is asked for."""
    records: list[RecordsNode] = [source("a")]
    outputs: list[OutputNode] = [call("start")]
    for number in range(draw(st.integers(1, 14))):
        parent = draw(st.sampled_from(records))
        needs = draw(st.lists(st.sampled_from(outputs), max_size=2))
        match draw(st.sampled_from(KINDS)):
            case "source":
                records.append(source(f"s{number}"))
            case "step":
                records.append(step(parent, f"step{number}", *needs))
            case "reduce":
                outputs.append(mean(parent, f"mean{number}"))
            case "collect":
                outputs.append(CollectNode(parent, f"collect{number}"))
            case "group":
                records.append(StoredNode(ReduceNode(Grouped(None, reducers.count()), parent, f"group{number}")))
            case "expand":
                records.append(SourceNode(Place(f"e{number}"), Use(draw(st.sampled_from(outputs)))))
            case "call":
                outputs.append(call(f"call{number}", *needs))
            case "when":
                outputs.append(when(*(draw(st.sampled_from(outputs)) for _ in range(3))))
            case "settle":
                outputs.append(settle(*needs, outputs[-1]))
    return list(draw(st.lists(st.sampled_from(outputs), min_size=1, max_size=4)))


@settings(max_examples=150)
@given(graphs())
def test_every_plan_is_complete_without_circles_and_runs_no_step_twice(wanted: list[OutputNode]) -> None:
    made = plan(*wanted)
    nodes = reach(wanted)

    steps = Counter(id(entry.task) for stage in made.stages for entry in stage.steps)
    assert steps == Counter(id(node.task) for node in nodes if isinstance(node, StepNode))
    assert len(made.calls) == sum(isinstance(node, CallNode) for node in nodes)
    assert all(stage.outputs for stage in made.stages)
    assert [output_at(made, address) for address in made.targets] == [_shown(node) for node in wanted]

    rests = {number: _rests_on(stage) for number, stage in enumerate(made.stages)}
    rests |= {~number: [*entry.facts.needs, *entry.facts.arms] for number, entry in enumerate(made.calls)}
    done: set[int] = set()
    while ready := {node for node in rests.keys() - done if all(address[0] in done for address in rests[node])}:
        done |= ready
    assert done == rests.keys()


def _shown(node: OutputNode) -> str:
    """Return the name of what gives a node's result: rows of a keyed reduction are kept as they are."""
    kept = isinstance(node, CollectNode) and isinstance(node.parent, StoredNode)
    return node.parent.output.name if kept else node.name  # type: ignore[union-attr]


def _rests_on(stage: Stage) -> list[Address]:
    return [*stage.needs, *([stage.base] if stage.base is not None else [])]


@settings(max_examples=100)
@given(graphs())
def test_what_only_a_branch_wants_shares_no_pass_with_what_is_wanted_elsewhere(wanted: list[OutputNode]) -> None:
    """Nothing that may stay undone hangs on a pass that is made for something else, or the other way round."""
    made = plan(*wanted)
    reasons: dict[Address, set[tuple[int, int] | None]] = {}
    stack: list[tuple[Address, tuple[int, int] | None]] = [(address, None) for address in made.targets]
    while stack:
        address, reason = stack.pop()
        address = (address[0], 0) if address[0] < 0 else address
        if address[1] < 0:  # a list of chunks comes without the work on them
            continue
        if reason in reasons.setdefault(address, set()):
            continue
        reasons[address].add(reason)
        node = address[0]
        if node >= 0:
            stack += [(need, reason) for need in _rests_on(made.stages[node])]
        else:
            facts = made.calls[~node].facts
            stack += [(need, reason) for need in facts.needs]
            stack += [(arm, (~node, place)) for place, arm in enumerate(facts.arms)]
    for number, stage in enumerate(made.stages):
        outputs = enumerate(stage.outputs)
        asked = [place for place, output in outputs if not output.name.startswith("records of")]  # those are kept for others
        why = [reasons.get((number, output), set()) for output in asked]
        always = [None in each for each in why]
        assert all(always) or not any(always)
        assert all(always) or all(each == why[0] for each in why)


def test_operators_are_tasks_like_any_other() -> None:
    made = plan(CallNode("call", "add", Task(operator.add, "add"), Arguments((1, 2))))
    assert made.facts().tasks[0].name == "add"

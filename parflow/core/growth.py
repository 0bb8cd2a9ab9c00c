"""A plan that grows: the numbers of a graph that a call returned go on where the plan's end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from parflow.core.history import RunState
from parflow.model import Address, CallFacts, GraphFacts, Growth, StageFacts


def renumbered(growth: Growth, state: RunState) -> tuple[GraphFacts, tuple[Address, ...]]:
    """Return a graph and the addresses of its results, numbered as the next parts of a run's plan."""
    stages, tasks, calls = len(state.stages), len(state.tasks), len(state.calls)

    def moved(addresses: Iterable[Address]) -> tuple[Address, ...]:
        return tuple((node + stages if node >= 0 else node - calls, item) for node, item in addresses)

    def stage(facts: StageFacts) -> StageFacts:
        base = None if facts.base is None else moved([facts.base])[0]
        return replace(facts, needs=moved(facts.needs), base=base)

    def call(facts: CallFacts) -> CallFacts:
        task = facts.task if facts.task < 0 else facts.task + tasks
        return replace(facts, task=task, needs=moved(facts.needs), arms=moved(facts.arms))

    graph = growth.graph
    made = GraphFacts(tuple(map(stage, graph.stages)), graph.tasks, tuple(map(call, graph.calls)))
    return made, moved(growth.results)

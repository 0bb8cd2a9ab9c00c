"""From a lazy graph to a plan: where it is cut, what is fused, and what is stored in between.

Record-wise steps fuse with all that hangs on one source, as long as they can run in one pass: they wait for the same values
and are wanted in the same branches. Where that differs, the records are stored once, and both sides go on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from parflow.core.forms import Batched
from parflow.core.plan import Call, Output, Plan, Stage, Step
from parflow.errors import GraphError
from parflow.model import Address, CallFacts
from parflow.nodes import (
    CallNode,
    CollectNode,
    OutputNode,
    RecordsNode,
    ReduceNode,
    SinkNode,
    SourceNode,
    StepNode,
    StoredNode,
    Task,
    Use,
)

Node = OutputNode | RecordsNode
Guard = frozenset[tuple[int, int]] | None
"""The branches (a decision's identity, an arm) in which alone a node is wanted; None for a node that always is."""
Key = tuple[frozenset[int], Guard]
"""What must be equal for two steps to run in one pass: the values waited for, and the guard."""


@dataclass(frozen=True)
class StoredSource:
    """Stands for records that an earlier stage stored; named by what made them."""

    name: str


def make_plan(name: str, outputs: Iterable[Use | OutputNode], stored: Any = StoredSource) -> Plan:
    """Cut a graph into stages and calls.

    Parameters
    ----------
    name : str
        The workflow's name.
    outputs : iterable of Use or nodes
        What the workflow is asked for, in the order in which the caller wants results.
    stored : callable
        Makes the source that reads what an earlier stage stored.

    Returns
    -------
    Plan
        Its stages and calls, those that others rest on first.

    Raises
    ------
    GraphError
        When nothing is asked for.
    """
    wanted = [use if isinstance(use, Use) else Use(use) for use in outputs]
    if not wanted:
        raise GraphError(f"workflow {name!r} returns nothing to compute; return a Value or a Dataset")
    plan = _Planner(wanted, stored).plan(name)
    for stage in plan.stages:
        _check_undoing(stage)
    return plan


def _check_undoing(stage: Stage) -> None:
    """Refuse to undo what was done for a part of a record: it's the whole record that fails.

    Raises
    ------
    GraphError
        Naming the step.
    """
    for step in stage.steps:
        index = step.parent
        while step.task.compensate is not None and index >= 0:
            above = stage.steps[index]
            if above.kind in ("flat_map", "map_batches"):
                raise GraphError(
                    f"step {step.task.name!r} has compensate=, and comes after {above.kind} {above.task.name!r} in one stage: "
                    f"only what was done for a whole record is undone. Put it before {above.task.name!r}, or begin a stage: "
                    f"`pf.expand({step.task.name}, docs.{above.kind}({above.task.name}).reduce(pf.concat()))`."
                )
            index = above.parent


def _inputs(node: Node) -> Iterator[Node]:
    """Yield what a node rests on."""
    if isinstance(node, CallNode):
        yield from (use.node for use in node.arguments.uses)
        yield from (use.node for use in node.arms)
    elif isinstance(node, SourceNode):
        if node.value is not None:
            yield node.value.node
    elif isinstance(node, StoredNode):
        yield node.output
    else:
        yield node.parent
        if isinstance(node, StepNode):
            yield from (use.node for use in node.arguments.uses)


def reach(roots: Iterable[Node]) -> list[Node]:
    """Return all nodes, each after what it rests on; without recursion, since chains of calls are long."""
    done: dict[int, Node] = {}
    stack: list[tuple[Node, Iterator[Node] | None]] = [(root, None) for root in reversed([*roots])]
    while stack:
        node, rest = stack.pop()
        if id(node) in done:
            continue
        rest = _inputs(node) if rest is None else rest
        for child in rest:
            if id(child) not in done:
                stack += [(node, rest), (child, None)]
                break
        else:
            done[id(node)] = node
    return [*done.values()]


@dataclass
class _Draft:
    """A stage while it is made; a node that two branches share is added once."""

    number: int
    root: RecordsNode
    steps: list[StepNode] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    outputs: list[tuple[OutputNode, int]] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)

    def add(self, chain: Iterable[StepNode]) -> int:
        """Add steps, each after the one before; returns the last one's index."""
        parent = -1
        for node in chain:
            if id(node) not in self.places:
                self.places[id(node)] = len(self.steps)
                self.steps.append(node)
                self.parents.append(parent)
            parent = self.places[id(node)]
        return parent


class _Planner:
    def __init__(self, wanted: list[Use], stored: Any) -> None:
        self.wanted = wanted
        self.stored = stored
        self.nodes = reach(use.node for use in wanted)
        self.guards: dict[int, Guard] = {}
        self.needs: dict[int, frozenset[int]] = {}
        self.keys: dict[int, Key] = {}
        self.drafts: dict[tuple[int, Key], _Draft] = {}
        self.places: dict[int, Address] = {}
        self.kept: dict[int, CollectNode] = {}
        self.tasks: dict[Any, int] = {}
        self.task_list: list[Task] = []

    def plan(self, name: str) -> Plan:
        self._guard()
        self._wait()
        self._key()
        calls: list[CallNode] = []
        for node in self.nodes:
            if isinstance(node, CallNode):
                self.places[id(node)] = (~len(calls), 0)
                calls.append(node)
            elif isinstance(node, CollectNode) and isinstance(node.parent, StoredNode):
                self.places[id(node)] = self.places[id(node.parent.output)]  # they are kept as they are
            elif isinstance(node, (ReduceNode, SinkNode, CollectNode)):
                self._place(node)
        stages = tuple(map(self._stage, self.drafts.values()))
        made = tuple(map(self._call, calls))
        return Plan(name, stages, tuple(map(self._address, self.wanted)), tuple(self.task_list), made)

    # --- what can run together ------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        """Find the branches in which each node is wanted, from what is asked for down."""
        guards: dict[int, Guard] = {id(use.node): None for use in self.wanted}
        for node in reversed(self.nodes):
            own = guards[id(node)]
            armed = [id(use.node) for use in node.arms] if isinstance(node, CallNode) else []
            for child in _inputs(node) if not armed else (use.node for use in node.arguments.uses):  # type: ignore[union-attr]
                _widen(guards, id(child), own)
            for arm, child_id in enumerate(armed):
                _widen(guards, child_id, frozenset([(id(node), arm)]))
        self.guards = guards

    def _wait(self) -> None:
        """Find the values that each record-wise node, and its output, waits for."""
        for node in self.nodes:
            own: frozenset[int] = frozenset()
            if isinstance(node, StepNode):
                own = self.needs[id(node.parent)].union(id(use.node) for use in node.arguments.uses)
            elif isinstance(node, SourceNode):
                own = frozenset() if node.value is None else frozenset([id(node.value.node)])
            elif isinstance(node, StoredNode):
                own = frozenset([id(node.output)])
            elif not isinstance(node, CallNode):
                own = self.needs[id(node.parent)]
            self.needs[id(node)] = own

    def _key(self) -> None:
        """Give each node the key of those that go on from it, where they have one; else one of its own."""
        onward: dict[int, set[Key]] = {}
        for node in reversed(self.nodes):
            if isinstance(node, CallNode):
                continue
            keys = onward.get(id(node), set())
            own = (self.needs[id(node)], self.guards[id(node)])
            key = next(iter(keys)) if len(keys) == 1 else own
            self.keys[id(node)] = key
            if not isinstance(node, (SourceNode, StoredNode)):
                onward.setdefault(id(node.parent), set()).add(key)
        for node in self.nodes:
            if isinstance(node, CollectNode) and self.keys[id(node)] == self.keys[id(node.parent)]:
                self.kept[id(node.parent)] = node

    # --- stages ---------------------------------------------------------------------------------------------------------

    def _place(self, output: ReduceNode | SinkNode | CollectNode) -> None:
        """Put an output into the stage where it belongs, and what it goes on from before it."""
        if id(output) in self.places:
            return
        key = self.keys[id(output)] if id(output) in self.keys else self.keys[id(output.parent)]
        chain: list[StepNode] = []
        root = output.parent
        while isinstance(root, StepNode) and self.keys[id(root)] == key:
            chain.append(root)
            root = root.parent
        if isinstance(root, StepNode):
            self._place(self.kept.setdefault(id(root), CollectNode(root, f"records of {root.task.name}")))
        draft = self.drafts.setdefault((id(root), key), _Draft(len(self.drafts), root))
        parent = draft.add(reversed(chain))
        self.places[id(output)] = (draft.number, len(draft.outputs))
        draft.outputs.append((output, parent))

    def _stage(self, draft: _Draft) -> Stage:
        root, base, value = draft.root, None, None
        if isinstance(root, StepNode):
            source, base = self.stored(root.task.name), self.places[id(self.kept[id(root)])]
        elif isinstance(root, StoredNode):
            source, base = self.stored(root.output.name), self.places[id(root.output)]
        else:
            source = root.source
            value = self._address(root.value) if root.value is not None else None
            first = self.drafts.get((id(root), (self.needs[id(root)], None)))
            if first is not None and first is not draft:
                base = (first.number, -1)  # what is listed once stays the same for all who read it
        steps = tuple(map(self._step, draft.steps, draft.parents))
        together = max((step.together for step in steps), default=1)
        if together > 1 and hasattr(source, "together"):
            source = replace(source, together=together)
        outputs = tuple(_output(node, parent) for node, parent in draft.outputs)
        return Stage(source, steps, outputs, base, value if base is None else None)

    def _step(self, node: StepNode, parent: int) -> Step:
        kind = "map_batches" if isinstance(node.task.function, Batched) else node.kind
        arguments = replace(node.arguments, uses=()) if node.arguments.uses else node.arguments
        return Step(kind, node.task, parent, arguments, tuple(map(self._address, node.arguments.uses)))

    # --- calls ----------------------------------------------------------------------------------------------------------

    def _address(self, use: Use) -> Address:
        node, item = self.places[id(use.node)]
        return (node, use.item) if node < 0 else (node, item)

    def _call(self, node: CallNode) -> Call:
        uses = node.arguments.uses
        needs, arms = tuple(map(self._address, uses)), tuple(map(self._address, node.arms))
        task = -1 if node.task is None else self._task(node.task)
        arguments = replace(node.arguments, uses=()) if uses else node.arguments
        return Call(node.name, CallFacts(node.kind, task, needs, arms, node.count, node.results), arguments)

    def _task(self, task: Task) -> int:
        policies = (task.timeout, task.memory, task.retry, task.max_failures, task.breaker, task.limit, task.rate)
        key = (id(task.function), task.name, task.version, policies, id(task.resources), id(task.compensate), task.in_doubt)
        if key not in self.tasks:
            self.tasks[key] = len(self.task_list)
            self.task_list.append(task)
        return self.tasks[key]


def _widen(guards: dict[int, Guard], node: int, guard: Guard) -> None:
    """Note one more reason to want a node."""
    if node not in guards:
        guards[node] = guard
    else:
        known = guards[node]
        guards[node] = None if known is None or guard is None else known | guard


def _output(node: OutputNode, parent: int) -> Output:
    if isinstance(node, ReduceNode):
        kind: Literal["reduce", "group"] = "group" if hasattr(node.reducer, "buckets") else "reduce"
        return Output(kind, node.name, node.reducer, parent, node.deadline, node.at_least)
    if isinstance(node, SinkNode):
        return Output("sink", node.name, node.sink, parent)
    assert isinstance(node, CollectNode)
    return Output("collect", node.name, None, parent)

"""From a lazy graph to stages between barriers: fused, checked and frozen.

All record-wise steps that hang on one source run in one pass over it: a stage is that source, the tree of its steps, and the
outputs that end it (reductions, sinks, collections), each a barrier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from parflow.core.fingerprint import fingerprint
from parflow.core.forms import Batched, Concurrent, is_async, is_built
from parflow.core.history import StageFacts
from parflow.errors import GraphError
from parflow.model import CollectNode, OutputNode, RecordsNode, ReduceNode, SinkNode, SourceNode, StepNode, Task

BATCH_ENOUGH = 32
"""Records of a batch that small inputs are still cut for: more would cost them their parallelism."""


@dataclass(frozen=True, slots=True)
class Step:
    """A fused record-wise step; ``parent`` is the index of the step before it, -1 for the source."""

    kind: Literal["map", "filter", "flat_map", "map_batches"]
    task: Task
    parent: int

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that running the step takes, whatever its function does."""
        function = self.task.function
        if isinstance(function, Batched):
            return {"records": (), "pandas": ("pandas",), "arrow": ("pyarrow",)}[function.form]
        return ("asyncio",) if is_async(function) else ()

    @property
    def together(self) -> int:
        """Records that a chunk should have, where its size is free to choose, so that the step is not kept from its work."""
        if isinstance(self.task.function, Batched):
            return min(self.task.function.size, BATCH_ENOUGH)
        return 2 * self.task.function.calls if isinstance(self.task.function, Concurrent) else 1

    @property
    def manner(self) -> str:
        """Say in words how the step's function is called and what it may take; nothing for the plain way."""
        task, words = self.task, []
        if is_built(task.function):
            words.append("built once a child")
        if isinstance(task.function, Batched):
            words.append(f"{task.function.form}, {task.function.size:,} at a time")
        if is_async(task.function):
            words.append(f"{task.function.calls if isinstance(task.function, Concurrent) else 1:,} in flight")
        if task.timeout:
            words.append(f"timeout {task.timeout:g} s")
        if task.memory:
            words.append(f"memory {task.memory / 2**20:.0f} MiB")
        return f" [{', '.join(words)}]" if words else ""


@dataclass(frozen=True, slots=True)
class Output:
    """What ends a branch of a stage; ``body`` is the reducer or the sink."""

    kind: Literal["reduce", "sink", "collect"]
    name: str
    body: Any
    parent: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What runs between two barriers. Pickled, it is what travels to the children."""

    source: Any
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]

    @property
    def name(self) -> str:
        """Name the stage by what it does."""
        return " → ".join([self.source.name, *(step.task.name for step in self.steps)])

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that the stage's own parts need, worth importing once before children are forked."""
        modules = {module for part in (self.source, *(output.body for output in self.outputs)) for module in _preload(part)}
        return tuple(sorted(modules.union(*(step.preload for step in self.steps))))

    def label(self, number: int) -> str:
        """Name step ``number`` as children count them: 0 reads, then the steps, then the outputs."""
        names = ["read", *(step.task.name for step in self.steps), *(output.name for output in self.outputs)]
        return names[number] if number < len(names) else "?"

    def timeouts(self, default: float | None) -> tuple[float | None, ...]:
        """Return the seconds that one call of each numbered step may take."""
        return (None, *(step.task.timeout or default for step in self.steps), *(default for _ in self.outputs))

    def memory(self, default: int | None) -> int | None:
        """Return the bytes that a child may use: the largest that a task asks for, else the run's."""
        return max((step.task.memory for step in self.steps if step.task.memory), default=default)

    def facts(self) -> StageFacts:
        """Return what the journal keeps of the stage."""
        prints = [fingerprint(self.source)]
        prints += [fingerprint((step.kind, step.parent, step.task.version, step.task.function)) for step in self.steps]
        prints += [fingerprint((output.kind, output.parent, output.body)) for output in self.outputs]
        return StageFacts(
            self.name,
            tuple(step.task.name for step in self.steps),
            tuple(output.name for output in self.outputs),
            tuple(output.kind for output in self.outputs),
            tuple(prints),
        )


def _preload(part: Any) -> Sequence[str]:
    own = type(part).__module__
    return (*getattr(part, "preload", ()), *([own] if own.startswith("parflow.") else []))


@dataclass(frozen=True, slots=True)
class Plan:
    """A frozen workflow: its stages, and for each requested output its stage and place there."""

    name: str
    stages: tuple[Stage, ...]
    targets: tuple[tuple[int, int], ...]

    def facts(self) -> tuple[StageFacts, ...]:
        """Return what the journal keeps of every stage."""
        return tuple(stage.facts() for stage in self.stages)

    def explain(self) -> str:
        """Describe the plan in words: stages, fused steps, barriers, and what is stored where."""
        lines = [f"plan of {self.name}: {len(self.stages)} stage{'s' if len(self.stages) != 1 else ''}"]
        for number, stage in enumerate(self.stages):
            lines.append(f"stage {number}: {stage.source!r}")
            for step in stage.steps:
                after = "" if step.parent == stage.steps.index(step) - 1 else f" (after {stage.label(step.parent + 1)})"
                lines.append(f"  {step.kind} {step.task.name}{after}{step.manner}")
            for output in stage.outputs:
                what = {
                    "reduce": "partial results in the store, merged in input order",
                    "sink": "one file a chunk, published when the stage is complete",
                    "collect": "records in the store",
                }[output.kind]
                lines.append(f"  barrier: {output.kind} {output.name} (of {stage.label(output.parent + 1)}): {what}")
        return "\n".join(lines)


def make_plan(name: str, outputs: Iterable[OutputNode]) -> Plan:
    """Cut a graph into stages.

    Parameters
    ----------
    name : str
        The workflow's name.
    outputs : iterable of nodes
        What the workflow is asked for, in the order in which the caller wants results.

    Returns
    -------
    Plan
        One stage a source, in the order in which outputs name them first.

    Raises
    ------
    GraphError
        When two sinks write to one path, or nothing is asked for.
    """
    wanted = list(outputs)
    if not wanted:
        raise GraphError(f"workflow {name!r} returns nothing to compute; return a Value or a Dataset")
    drafts: dict[SourceNode, _Draft] = {}
    places: dict[OutputNode, tuple[int, int]] = {}
    for output in wanted:
        if output in places:
            continue
        chain = _chain(output.parent)
        source = chain[0]
        assert isinstance(source, SourceNode)
        draft = drafts.setdefault(source, _Draft(len(drafts)))
        parent = draft.add(chain[1:])
        places[output] = (draft.number, len(draft.outputs))
        draft.outputs.append(_output(output, parent))
    stages = tuple(draft.stage(node.source) for node, draft in drafts.items())
    _check_sinks(stages)
    return Plan(name, stages, tuple(places[output] for output in wanted))


class _Draft:
    """A stage while the graph is being walked; a node that two branches share is added once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.steps: list[Step] = []
        self.outputs: list[Output] = []
        self.seen: dict[RecordsNode, int] = {}

    def stage(self, source: Any) -> Stage:
        together = max((step.together for step in self.steps), default=1)
        if together > 1 and hasattr(source, "together"):
            source = replace(source, together=together)
        return Stage(source, tuple(self.steps), tuple(self.outputs))

    def add(self, nodes: Iterable[RecordsNode]) -> int:
        parent = -1
        for node in nodes:
            assert isinstance(node, StepNode)
            if node not in self.seen:
                self.seen[node] = len(self.steps)
                kind = "map_batches" if isinstance(node.task.function, Batched) else node.kind
                self.steps.append(Step(kind, node.task, parent))
            parent = self.seen[node]
        return parent


def _chain(node: RecordsNode) -> list[RecordsNode]:
    chain: list[RecordsNode] = [node]
    while isinstance(node, StepNode):
        node = node.parent
        chain.append(node)
    return chain[::-1]


def _output(node: OutputNode, parent: int) -> Output:
    if isinstance(node, ReduceNode):
        return Output("reduce", node.name, node.reducer, parent)
    if isinstance(node, SinkNode):
        return Output("sink", node.name, node.sink, parent)
    assert isinstance(node, CollectNode)
    return Output("collect", node.name, None, parent)


def _check_sinks(stages: Iterable[Stage]) -> None:
    seen: dict[str, str] = {}
    for stage in stages:
        for output in stage.outputs:
            if output.kind == "sink":
                if output.body.path in seen:
                    raise GraphError(
                        f"two sinks, {seen[output.body.path]} and {output.name}, write to {output.body.path!r}; "
                        "give each a folder of its own"
                    )
                seen[output.body.path] = output.name

"""What a run executes: stages between barriers, and calls on their results; frozen, and explained in words.

All record-wise steps that hang on one source run in one pass over it: a stage is that source, the tree of its steps, and the
outputs that end it (reductions, sinks, collections), each a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from parflow.core.fingerprint import fingerprint
from parflow.core.forms import Batched, Concurrent, is_async, is_built
from parflow.model import Address, CallFacts, GraphFacts, StageFacts, TaskFacts, quick
from parflow.nodes import NO_ARGUMENTS, Arguments, Task

BATCH_ENOUGH = 32
"""Records of a batch that small inputs are still cut for: more would cost them their parallelism."""


@dataclass(frozen=True, slots=True)
class Step:
    """A fused record-wise step; ``parent`` is the index of the step before it, -1 for the source.

    ``needs`` are the addresses of the lazy results among its ``arguments``.
    """

    kind: Literal["map", "filter", "flat_map", "map_batches"]
    task: Task
    parent: int
    arguments: Arguments = NO_ARGUMENTS
    needs: tuple[Address, ...] = ()

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

    kind: Literal["reduce", "group", "sink", "collect"]
    name: str
    body: Any
    parent: int
    deadline: float = 0.0
    at_least: float = 1.0


@dataclass(frozen=True, slots=True)
class Stage:
    """What runs between two barriers. Pickled, it is what travels to the children.

    ``base`` is where its chunks come from, when its source doesn't list them itself; ``value`` the list that they are made of.
    """

    source: Any
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    base: Address | None = None
    value: Address | None = None

    @property
    def needs(self) -> tuple[Address, ...]:
        """The lazy results that the stage is given."""
        value = () if self.value is None else (self.value,)
        return tuple(dict.fromkeys((*value, *(need for step in self.steps for need in step.needs))))

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

    @property
    def trunk(self) -> frozenset[str]:
        """Names of the steps in which a record can fail before anything that was made of it has gone anywhere."""
        names: list[str] = []
        at = -1
        while True:
            after = [index for index, step in enumerate(self.steps) if step.parent == at]
            if len(after) != 1 or any(output.parent == at for output in self.outputs):
                break
            at = after[0]
            names.append(self.steps[at].task.name)
            if self.steps[at].kind in ("flat_map", "map_batches"):
                break
        every = [self.label(number) for number in range(1 + len(self.steps) + len(self.outputs))]
        return frozenset(name for name in names if every.count(name) == 1)

    def facts(self) -> StageFacts:
        """Return what the journal keeps of the stage."""
        buckets = tuple(output.body.buckets if output.kind == "group" else 1 for output in self.outputs)
        deadlines = tuple(output.deadline for output in self.outputs)
        prints = [fingerprint(self.source)]
        prints += [
            fingerprint((step.kind, step.parent, step.task.version, step.task.function, *_constants(step.arguments)))
            for step in self.steps
        ]
        prints += [fingerprint((output.kind, output.parent, output.body)) for output in self.outputs]
        return StageFacts(
            self.name,
            tuple(step.task.name for step in self.steps),
            tuple(output.name for output in self.outputs),
            tuple(output.kind for output in self.outputs),
            tuple(prints),
            self.needs,
            self.base,
            buckets if any(count > 1 for count in buckets) else (),
            deadlines if any(deadlines) else (),
            tuple(output.at_least for output in self.outputs) if any(deadlines) else (),
            self.value is not None,
        )


def _preload(part: Any) -> Sequence[str]:
    own = type(part).__module__
    return (*getattr(part, "preload", ()), *([own] if own.startswith("parflow.") else []))


def _constants(arguments: Arguments) -> tuple[Any, ...]:
    return (arguments.args, arguments.kwargs) if arguments.args or arguments.kwargs else ()


@quick
@dataclass(frozen=True, slots=True)
class Call:
    """A call in a plan, or a decision over branches."""

    name: str
    facts: CallFacts
    arguments: Arguments


@dataclass(frozen=True, slots=True)
class Plan:
    """A frozen workflow: its stages and calls, the tasks that these call, and where each requested result comes from."""

    name: str
    stages: tuple[Stage, ...]
    targets: tuple[Address, ...]
    tasks: tuple[Task, ...] = ()
    calls: tuple[Call, ...] = ()

    def facts(self) -> GraphFacts:
        """Return what the journal keeps of the plan."""
        given: list[list[Any]] = [[] for _ in self.tasks]
        for call in self.calls:
            if call.facts.task >= 0:
                given[call.facts.task] += _constants(call.arguments)
        tasks = (
            TaskFacts(task.name, fingerprint((task.version, task.function, constants)))
            for task, constants in zip(self.tasks, given, strict=True)
        )
        return GraphFacts(tuple(stage.facts() for stage in self.stages), tuple(tasks), tuple(call.facts for call in self.calls))

    @property
    def undoes(self) -> bool:
        """Whether anything in it can be undone."""
        return any(task.compensate for task in (*self.tasks, *(step.task for stage in self.stages for step in stage.steps)))

    def explain(self) -> str:
        """Describe the plan in words: stages, fused steps, barriers, calls, and what is stored where."""
        from parflow.core.explain import explain

        return explain(self)

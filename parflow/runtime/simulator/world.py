"""What a simulated run doesn't decide itself: the records, calls and their fates, and the faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from parflow.core.rules import FREE, Rules
from parflow.model import Address, CallFacts, CallKind, Cause, GraphFacts, StageFacts, TaskFacts

Fate = Literal["ok", "raises", "crashes", "crashes once", "hangs", "memory"]
FATES: tuple[Fate, ...] = get_args(Fate)
CAUSES: dict[Fate, Cause] = {"raises": "exception", "crashes": "crash", "hangs": "timeout", "memory": "memory"}
"""The fates that end in a dead letter or a failed call, always and whatever else happens."""


@dataclass(frozen=True, slots=True)
class VirtualRecord:
    """A record: what happens to whoever runs it, and how long that takes (seconds)."""

    fate: Fate = "ok"
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class VirtualStage:
    """A stage.

    Parameters
    ----------
    inputs : tuple
        In order: a chunk's records, or None for one that listing rejects.
    kinds, buckets : tuple
        Of its outputs.
    needs, base, expands
        As of `StageFacts`. What is listed of a value is ``inputs`` all the same; only the names tell the value.
    rough : float
        Of a stage that goes on from another one: which share of its records may end badly.
    """

    inputs: tuple[tuple[VirtualRecord, ...] | None, ...] = ()
    kinds: tuple[str, ...] = ("reduce",)
    needs: tuple[Address, ...] = ()
    base: Address | None = None
    expands: bool = False
    buckets: tuple[int, ...] = ()
    rough: float = 0.0

    @property
    def chunks(self) -> list[tuple[VirtualRecord, ...]]:
        """The inputs that listing accepts."""
        return [records for records in self.inputs if records is not None]


@dataclass(frozen=True, slots=True)
class VirtualCall:
    """A call or a decision; all but what follows is as of `CallFacts`.

    Parameters
    ----------
    fate, seconds
        What happens to whoever makes it, and how long that takes.
    choice : int
        The branch that it chooses.
    grows : VirtualGraph
        What it returns in the place of a value.
    """

    kind: CallKind = "call"
    needs: tuple[Address, ...] = ()
    arms: tuple[Address, ...] = ()
    count: int = 1
    results: int = 1
    task: int = 0
    fate: Fate = "ok"
    seconds: float = 1.0
    choice: int = 0
    grows: VirtualGraph | None = None

    @property
    def decides(self) -> bool:
        """Whether it waits for branches, and is never made."""
        return self.kind in ("settle", "race", "quorum")


@dataclass(frozen=True, slots=True)
class VirtualGraph:
    """Stages and calls, and what they are there for."""

    stages: tuple[VirtualStage, ...] = ()
    calls: tuple[VirtualCall, ...] = ()
    results: tuple[Address, ...] = ()

    @property
    def decides(self) -> bool:
        """Whether there is a decision over branches in it, or in what may grow in it."""
        return any(call.decides or (call.grows is not None and call.grows.decides) for call in self.calls)


@dataclass(frozen=True, slots=True)
class World:
    """All that a run does not decide itself.

    Parameters
    ----------
    stages, calls : tuple
        What there is to do.
    slots : int
        Jobs that run at once.
    fan_in : int
        Nodes that one merge takes.
    max_failures : float
        As of `Tolerance`. A run that ends over it is resumed with as many as it said, unless it has decisions over branches:
        a branch that failed once fails always.
    timeout, slice : float
        Seconds after which a hanging record or call is killed, and after which a batch stops at its next record.
    window : int
        Batches in flight for each slot.
    targets : tuple
        What is wanted; every output of every stage, if nothing is said.
    rules : Rules
        Policies of each stage, whose one step is ``read``; of calls only the limit holds.
    """

    stages: tuple[VirtualStage, ...] = ()
    slots: int = 2
    fan_in: int = 2
    max_failures: float = 0
    timeout: float = 5.0
    slice: float = 10.0
    window: int = 2
    calls: tuple[VirtualCall, ...] = ()
    targets: tuple[Address, ...] = ()
    rules: Rules = FREE

    def rules_of(self, unit: int) -> Rules:
        """Return the policies of a stage, or of a task's calls."""
        return self.rules if unit >= 0 or self.rules is FREE else Rules(limit=self.rules.limit)

    @property
    def graph(self) -> VirtualGraph:
        """What there is to do, and what it is there for."""
        every = tuple((number, output) for number, stage in enumerate(self.stages) for output in range(len(stage.kinds)))
        return VirtualGraph(self.stages, self.calls, self.targets or every)


def nodes(graph: VirtualGraph, label: str = "") -> Iterator[tuple[str, str, VirtualStage | VirtualCall]]:
    """Yield the label of everything that a graph has or may grow, the label of the graph that it is in, and itself."""
    for number, stage in enumerate(graph.stages):
        yield label_of(label, number), label, stage
    for number, call in enumerate(graph.calls):
        name = label_of(label, ~number)
        yield name, label, call
        if call.grows is not None:
            yield from nodes(call.grows, f"{name}/")


def label_of(graph: str, node: int) -> str:
    """Name a node, whatever its number in a run: ``2`` is a stage, ``c2`` a call, ``c2/1`` a stage in what that one grew."""
    return f"{graph}{node}" if node >= 0 else f"{graph}c{~node}"


def facts_of(graph: VirtualGraph, label: str = "") -> GraphFacts:
    """Return what the journal keeps of a graph."""
    stages = tuple(
        StageFacts(
            label_of(label, number),
            ("read",),
            tuple(f"{label}{number}.{output}" for output in range(len(stage.kinds))),
            stage.kinds,
            needs=stage.needs,
            base=stage.base,
            buckets=stage.buckets,
            expands=stage.expands,
        )
        for number, stage in enumerate(graph.stages)
    )
    calls = tuple(
        CallFacts(call.kind, -1 if call.decides else call.task, call.needs, call.arms, call.count, call.results)
        for call in graph.calls
    )
    tasks = 1 + max((call.task for call in calls), default=-1)
    return GraphFacts(stages, tuple(TaskFacts(task_name(label, number)) for number in range(tasks)), calls)


def task_name(graph: str, task: int) -> str:
    """Name a task of a graph."""
    return f"{graph}task {task}"


@dataclass(frozen=True, slots=True)
class Faults:
    """How rough the world is: chances from 0 to 1, and how many faults there are at the most.

    Parameters
    ----------
    batch : float
        That a batch meets one of `BATCH_FAULTS`.
    kill : float
        That the coordinator's process dies before an instruction is carried out.
    stop : float
        That before an event somebody stops the run (drained or at once), or the cluster is declared lost.
    slots : float
        That before an event the number of slots changes, also to 0 (and back).
    disk : float
        Longest time until an entry is durable, in seconds; entries become so in groups.
    listing : float
        Longest time between two blocks of a listing, in seconds.
    budget : int
        Faults in all; then the world is calm, so that every run comes to an end.
    """

    batch: float = 0.0
    kill: float = 0.0
    stop: float = 0.0
    slots: float = 0.0
    disk: float = 0.0
    listing: float = 0.0
    budget: int = 12


CALM = Faults()
ROUGH = Faults(batch=0.15, kill=0.01, stop=0.01, slots=0.03, disk=3.0, listing=1.0)
BATCH_FAULTS = ("worker lost", "receipt lost", "receipt twice", "receipt late", "untouched", "died writing", "broken")

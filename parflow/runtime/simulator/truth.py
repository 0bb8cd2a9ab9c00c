"""What must come out of a world, by plain recursion, and which virtual node each number of a run is."""

from __future__ import annotations

import functools
import random
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from parflow.model import Address, Chunk, Outcome, Ref, digest
from parflow.policies import Tolerance
from parflow.runtime.simulator.world import (
    CAUSES,
    FATES,
    VirtualCall,
    VirtualGraph,
    VirtualRecord,
    VirtualStage,
    World,
    facts_of,
    label_of,
    nodes,
)

INPUT = "1"
"""The stamp of a virtual input; other parts are of what an earlier stage kept."""

Picks = Mapping[str, tuple[int, ...]]
"""The branches that won, by the label of the decision: what depends on who was first is no matter of a world."""

Named = tuple[str, VirtualRecord]
V = TypeVar("V", VirtualStage, VirtualCall)


class UndecidedError(Exception):
    """A value depends on a decision that was not taken."""


# --- how values look ---------------------------------------------------------------------------------------------------


def said(value: Any) -> str:
    """Return a value as text."""
    match value:
        case list():
            return f"[{', '.join(map(said, value))}]"
        case Outcome():
            return said(value.value) if value.ok else "failed"
        case dict():
            return f"published {value['content']}"
        case _:
            return str(value)


def mark(values: Iterable[str]) -> str:
    """Return what a name has at its end, so that it tells what its maker was given."""
    return "#" + digest("|".join(values).encode())[:6]


def bare(name: str) -> str:
    """Return a name without the marks in it: that part of it which is no matter of who was first."""
    return re.sub("#[0-9a-f]{6}", "", name)


def bucket_of(name: str, buckets: int) -> int:
    """Return the bucket of a record in a keyed reduction."""
    return zlib.crc32(bare(name).encode()) % buckets


def of_output(name: str, output: int) -> str:
    """Return what a stage's output has of a record, so that no output is taken for another one."""
    return name + "'" * output


def names_in(data: bytes) -> list[str]:
    """Return the names of the records in a result."""
    return re.findall("[^()! ]+", data.decode())


@functools.lru_cache(100_000)
def _derived(label: str, rough: float, origin: str) -> VirtualRecord:
    rng = random.Random(f"{label} {origin}")  # noqa: S311 - chance to repeat, not to keep a secret
    return VirtualRecord(rng.choice(FATES) if rng.random() < rough else "ok", rng.choice((0.001, 0.1, 1.0)))


def go_on(label: str, stage: VirtualStage, origin: str, given: str) -> Named:
    """Return the record that a stage makes of another one's."""
    return f"{label}~{origin}{given}", _derived(label, stage.rough, bare(origin))


# --- which node a number is --------------------------------------------------------------------------------------------


class Place(Generic[V]):
    """A node of a run: its label, that of the graph which it is in, and what it is."""

    def __init__(self, graph: str, number: int, node: V) -> None:
        self.graph, self.number, self.label = graph, number, label_of(graph, number)
        self.node: V = node


class Cast:
    """Which virtual node each number of a run is, as the run grows.

    Parameters
    ----------
    world : World
        What there is to do.
    read : callable
        Opens a result.
    """

    def __init__(self, world: World, read: Callable[[Ref], bytes]) -> None:
        self.read = read
        self.stages: list[Place[VirtualStage]] = []
        self.calls: list[Place[VirtualCall]] = []
        self.tasks: list[str] = []
        self._add(world.graph, "")

    def _add(self, graph: VirtualGraph, label: str) -> None:
        self.stages += [Place(label, number, stage) for number, stage in enumerate(graph.stages)]
        self.calls += [Place(label, ~number, call) for number, call in enumerate(graph.calls)]
        self.tasks += [task.name for task in facts_of(graph, label).tasks]

    def grow(self, call: int) -> None:
        """Add what a call returned."""
        place = self.calls[call]
        if place.node.grows is None:
            raise AssertionError(f"call {place.label} returns no graph")
        self._add(place.node.grows, f"{place.label}/")

    def names(self, addresses: Iterable[Address]) -> list[tuple[str, int]]:
        """Return addresses with labels in the place of numbers."""
        return [((self.stages[node] if node >= 0 else self.calls[~node]).label, item) for node, item in addresses]

    def records(self, number: int, chunk: Chunk, given: str = "") -> list[Named]:
        """Return the records of a chunk with their names; ``given`` marks the values that their stage was given."""
        place, (part,) = self.stages[number], chunk.parts
        if place.node.base is None:
            return [
                (f"{place.label}.{chunk.index}.{ordinal}{given}", record)
                for ordinal, record in enumerate(place.node.chunks[chunk.index])
            ]
        if part.stamp == INPUT:
            origins = [f"{part.path}.{ordinal}" for ordinal in range(part.size)]
        else:
            ref = Ref(part.size, part.stamp, part.data, None if part.data is not None else part.path)
            origins = names_in(self.read(ref))
        return [go_on(place.label, place.node, origin, given) for origin in origins]


# --- what must come out ------------------------------------------------------------------------------------------------


class Truth:
    """What the nodes of a world come to, whatever goes wrong on the way.

    Parameters
    ----------
    world : World
        What there is to do.
    picks : mapping
        Who won each race and quorum; without, the first branches that can. What fails is the same whoever won.
    """

    def __init__(self, world: World, picks: Picks | None = None) -> None:
        self.world, self.picks = world, picks
        self.free = self if picks is None else Truth(world)
        self.tolerance = Tolerance(world.max_failures if world.graph.decides else 10**9)
        self.graphs: dict[str, str] = {}
        self.stages: dict[str, VirtualStage] = {}
        self.calls: dict[str, VirtualCall] = {}
        for label, graph, node in nodes(world.graph):
            self.graphs[label] = graph
            if isinstance(node, VirtualStage):
                self.stages[label] = node
            else:
                self.calls[label] = node
        self._good: dict[tuple[str, bool], bool] = {}
        self._texts: dict[tuple[str, int], str] = {}
        self._chunks: dict[str, list[list[Named]]] = {}

    @property
    def lost(self) -> bool:
        """Whether a target can't be had."""
        return not all(self.good("", target) for target in self.world.graph.results)

    def good(self, graph: str, address: Address) -> bool:
        """Tell whether there will be a value at an address of a graph."""
        key, known = (label_of(graph, address[0]), address[1] < 0), self.free._good  # noqa: SLF001
        if key not in known:
            known[key] = self._is_good(*key)
        return known[key]

    def _is_good(self, label: str, its_list: bool) -> bool:
        graph = self.graphs[label]
        if label in self.stages:
            stage = self.stages[label]
            rests = (*stage.needs, stage.base) if stage.base is not None else stage.needs
            return all(self.good(graph, need) for need in rests) and (its_list or self._tolerated(label))
        call = self.calls[label]
        if call.kind == "settle":
            return True
        if call.decides:
            return sum(self.good(graph, arm) for arm in call.arms) >= call.count
        if call.fate in CAUSES or not all(self.good(graph, need) for need in call.needs):
            return False
        if call.grows is not None:
            return all(self.good(f"{label}/", result) for result in call.grows.results)
        return call.kind == "call" or self.good(graph, call.arms[call.choice])

    def _tolerated(self, label: str) -> bool:
        rejected = self.stages[label].inputs.count(None)
        fates = [record.fate for chunk in self.free.chunks(label) for _, record in chunk]
        return self.tolerance.accepts(rejected + sum(fate in CAUSES for fate in fates), rejected + len(fates))

    # --- stages -----------------------------------------------------------------------------------------------------------

    def shaped(self, label: str) -> bool:
        """Tell whether a stage's chunks are the same in every run, and so its trees of merges."""
        stage = self.stages[label]
        if stage.base is None:
            return True
        base = label_of(self.graphs[label], stage.base[0])
        return self.shaped(base) if stage.base[1] < 0 else self.stages[base].kinds[stage.base[1]] == "group"

    def chunks(self, label: str) -> list[list[Named]]:
        """Return the records of each chunk of a stage with their names; one chunk for all, if they come as they come."""
        if label not in self._chunks:
            stage = self.stages[label]
            given = self.given(label)
            if stage.base is None:
                self._chunks[label] = [
                    [(f"{label}.{c}.{o}{given}", record) for o, record in enumerate(chunk)]
                    for c, chunk in enumerate(stage.chunks)
                ]
            else:
                origins = self._origins(label_of(self.graphs[label], stage.base[0]), stage.base[1])
                self._chunks[label] = [[go_on(label, stage, origin, given) for origin in chunk] for chunk in origins]
        return self._chunks[label]

    def given(self, label: str) -> str:
        """Return the mark of the values that a stage or call is given."""
        needs = (self.stages.get(label) or self.calls[label]).needs
        return mark(self.text(self.graphs[label], need) for need in needs) if needs else ""

    def _origins(self, label: str, output: int) -> list[list[str]]:
        """Return the names of what is in the chunks of a stage that goes on from another one."""
        stage = self.stages[label]
        if output >= 0:
            kept = self._kept(label, output)
            if stage.kinds[output] == "group":
                return [part for part in kept if part]
            return [[name for part in kept for name in part]]
        if stage.base is not None:
            return self._origins(label_of(self.graphs[label], stage.base[0]), stage.base[1])
        places = [(place, chunk) for place, chunk in enumerate(stage.inputs) if chunk is not None]
        path = self.path(label)
        return [[f"{path(place)}.{ordinal}" for ordinal in range(len(chunk))] for place, chunk in places]

    def path(self, label: str) -> Callable[[int], str]:
        """Return what names the inputs of a stage."""
        stage = self.stages[label]
        given = mark([self.text(self.graphs[label], stage.needs[0])]) if stage.expands else ""
        return lambda place: f"{label}.input{place}{given}"

    def _kept(self, label: str, output: int) -> list[list[str]]:
        """Return the names that survived: of a keyed reduction by bucket, else by chunk."""
        names = [
            [of_output(name, output) for name, record in chunk if record.fate not in CAUSES] for chunk in self.chunks(label)
        ]
        stage = self.stages[label]
        if stage.kinds[output] != "group":
            return names
        buckets = stage.buckets[output]
        return [[n for chunk in names for n in chunk if bucket_of(n, buckets) == bucket] for bucket in range(buckets)]

    def dead(self, label: str) -> list[str]:
        """Return the dead letters of a stage."""
        path = self.path(label)
        rejected = [path(place) for place, chunk in enumerate(self.stages[label].inputs) if chunk is None]
        return rejected + [name for chunk in self.chunks(label) for name, record in chunk if record.fate in CAUSES]

    def content(self, label: str, output: int) -> str:
        """Return what an output of a stage holds."""
        kept = ["".join(f"{name} " for name in names) for names in self._kept(label, output)]
        if self.stages[label].kinds[output] != "reduce":
            return "".join(kept)
        if not self.shaped(label):
            return "".join(kept) + "!"
        tree, fan_in = kept, self.world.fan_in
        while tree is kept or len(tree) > 1:
            tree = ["(" + "".join(tree[i : i + fan_in]) + ")" for i in range(0, max(1, len(tree)), fan_in)]
        return tree[0] + "!"

    # --- values -----------------------------------------------------------------------------------------------------------

    def text(self, graph: str, address: Address) -> str:
        """Return the value at an address of a graph, as text."""
        label = label_of(graph, address[0])
        key = label, address[1]
        if key not in self._texts:
            self._texts[key] = self._of_stage(*key) if label in self.stages else self._of_call(*key)
        return self._texts[key]

    def _of_stage(self, label: str, output: int) -> str:
        content = self.content(label, output)
        if self.stages[label].kinds[output] != "sink":
            return content
        return said({"content": digest(content.encode())})

    def _of_call(self, label: str, item: int) -> str:
        call, graph = self.calls[label], self.graphs[label]
        if call.grows is not None:
            return self.text(f"{label}/", call.grows.results[item])
        match call.kind:
            case "call":
                return f"{label}.{item}{self.given(label)}"
            case "choose":
                return self.text(graph, call.arms[call.choice])
            case "settle":
                outcomes = [self.text(graph, arm) if self.good(graph, arm) else "failed" for arm in call.arms]
                return f"[{', '.join(outcomes)}]"
        won = [self.text(graph, call.arms[arm]) for arm in self.picked(label)]
        return won[0] if call.kind == "race" else f"[{', '.join(won)}]"

    def picked(self, label: str) -> tuple[int, ...]:
        """Return the branches that a decision took."""
        call, graph = self.calls[label], self.graphs[label]
        good = tuple(arm for arm, address in enumerate(call.arms) if self.good(graph, address))
        if call.kind == "settle":
            return good
        if self.picks is None:
            return good[: call.count]
        if label not in self.picks:
            raise UndecidedError(label)
        return self.picks[label]

    def complete(self) -> set[str]:
        """Return the nodes that every run brings to their end whose target can be had: what each one rests on."""
        found: set[str] = set()
        stack = [("", target) for target in self.world.graph.results]
        while stack:
            graph, (node, item) = stack.pop()
            if (label := label_of(graph, node)) in found:
                continue
            if item >= 0:  # of a list alone, the rest is no matter
                found.add(label)
            if label in self.stages:
                stage = self.stages[label]
                rests = (*stage.needs, stage.base) if stage.base is not None else stage.needs
            else:
                call = self.calls[label]
                chosen = (call.choice,) if call.kind == "choose" else self.picked(label) if call.decides else ()
                rests = (*call.needs, *(call.arms[arm] for arm in chosen))
                stack += [(f"{label}/", result) for result in (call.grows.results if call.grows is not None else ())]
            stack += [(graph, address) for address in rests]
        return found


def expected(world: World, picks: Picks | None = None) -> tuple[dict[Address, bytes], tuple[str, ...]]:
    """Return the results and the dead letters that every run must come to in which ``picks`` won; none if it must fail.

    The dead letters are of the stages that a target rests on.
    """
    truth = Truth(world, picks)
    if truth.lost:
        return {}, ()
    results: dict[Address, bytes] = {}
    for node, item in world.graph.results:
        text = truth.content(label_of("", node), item) if node >= 0 else truth.text("", (node, item))
        results[node, item] = text.encode()
    dead = [name for label in truth.complete() if label in truth.stages for name in truth.dead(label)]
    return results, tuple(sorted(dead))

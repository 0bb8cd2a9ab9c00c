"""Worlds and faults made of a seed."""

from __future__ import annotations

import random
from dataclasses import replace

from parflow.core.rules import FREE, Rules
from parflow.model import Address, CallKind
from parflow.policies import Breaker, Retry
from parflow.runtime.simulator.truth import Truth
from parflow.runtime.simulator.world import FATES, Faults, VirtualCall, VirtualGraph, VirtualRecord, VirtualStage, World

HOPELESS = 15
"""Chunks of a stage in which nothing succeeds, so many that it's given up before its end."""
SECONDS = (0.001, 0.01, 0.1, 1.0, 4.0)
MOSTLY = 0.85
"""How often a world that can't succeed is thrown away."""


def random_world(seed: int) -> World:
    """Return a small world of any shape: stages that have nothing to do with each other, or a graph of stages and calls."""
    rng = random.Random(seed)  # noqa: S311 - chance to repeat, not to keep a secret
    tolerated = rng.choice((0, 1, 0.05, 1000))
    settings = World((), rng.randint(1, 4), rng.randint(2, 4), tolerated, slice=rng.choice((0.5, 10.0)), rules=_rules(seed))
    if rng.random() < 0.35:
        made = _Maker(rng, 0.15)
        for _ in range(rng.choice((1, 1, 2, 3))):
            made.stage((0, 1, 2, 5, 9, 20), 6, related=False)
        return replace(settings, stages=tuple(made.stages))
    while True:
        graph = _Maker(rng, 0.05).graph(rng.randint(2, 8), rng.randint(1, 3))
        world = replace(settings, stages=graph.stages, calls=graph.calls, targets=graph.results)
        if not Truth(world).lost or rng.random() >= MOSTLY:
            return world


def _rules(seed: int) -> Rules:
    rng = random.Random(f"rules {seed}")  # noqa: S311
    if rng.random() < 0.5:
        return FREE
    named = rng.choice(("Error", "OtherError"))
    retry = Retry(rng.randint(2, 4), wait=rng.choice((0, 0.5)), on=named)  # with one attempt a crash by chance costs a record
    retries = {"read": retry} if rng.random() < 0.5 else {}
    breakers = {"read": Breaker(rng.choice((0.5, 1.0)), rng.randint(1, 9), reset=2)} if rng.random() < 0.5 else {}
    rated = frozenset({"read"}) if rng.random() < 0.3 else frozenset[str]()
    limit = rng.choice((None, None, 1, 2))
    return Rules(retries, {}, breakers, limit, rated, compensates=rng.random() < 0.4)


def random_faults(seed: int) -> Faults:
    """Return a calm to rough set of faults."""
    rng = random.Random(seed)  # noqa: S311 - chance to repeat, not to keep a secret
    batch, kill, stop, slots, disk, listing = (high * rng.choice((0, 0.3, 1)) for high in (0.3, 0.02, 0.02, 0.06, 3.0, 5.0))
    return Faults(batch, kill, stop, slots, disk, listing, budget=rng.choice((3, 12)))


class _Maker:
    """Makes a graph, each node after what it rests on."""

    def __init__(self, rng: random.Random, bad: float, depth: int = 0) -> None:
        self.rng, self.bad, self.depth = rng, bad, depth
        self.stages: list[VirtualStage] = []
        self.calls: list[VirtualCall] = []
        self.values: list[Address] = []

    def graph(self, size: int, results: int) -> VirtualGraph:
        makers = {
            self.stage: 5,
            self.derived: 4,
            self.call: 6,
            self.choose: 2,
            self.decision: 5,
            self.again: 3,
            self.crowd: 1,
            self.hopeless: 0.3,
        }
        while len(self.stages) + len(self.calls) < size or not self.values:
            self.rng.choices([*makers], [*makers.values()])[0]()
        late = self.values[-4:]
        return VirtualGraph(
            tuple(self.stages),
            tuple(self.calls),
            tuple(self.rng.choice(late if self.rng.random() < 0.7 else self.values) for _ in range(results)),
        )

    def record(self) -> VirtualRecord:
        fate = self.rng.choice(FATES) if self.rng.random() < self.bad else "ok"
        return VirtualRecord(fate, self.rng.choice(SECONDS))

    def kinds(self, *, keyed: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
        every = ("reduce", "reduce", "sink", "collect", *(("group", "group", "collect") if keyed else ()))
        kinds = tuple(self.rng.choice(every) for _ in range(self.rng.randint(1, 2)))
        buckets = tuple(self.rng.randint(2, 3) if kind == "group" else 1 for kind in kinds)
        return kinds, buckets if "group" in kinds else ()

    def needs(self) -> tuple[Address, ...]:
        return tuple(self.rng.choice(self.values) for _ in range(self.rng.choice((0, 1, 1, 2))) if self.values)

    def stage(self, chunks: tuple[int, ...] = (0, 1, 2, 3, 5), records: int = 4, *, related: bool = True) -> None:
        made = [tuple(self.record() for _ in range(self.rng.randint(0, records))) for _ in range(self.rng.choice(chunks))]
        inputs = tuple(None if self.rng.random() < self.bad / 5 else chunk for chunk in made)
        kinds, buckets = self.kinds(keyed=related)
        needs = self.needs() if related and self.rng.random() < 0.6 else ()
        expands = bool(needs) and self.rng.random() < 0.4
        self._add_stage(VirtualStage(inputs, kinds, needs, None, expands, buckets))

    def hopeless(self) -> None:
        """Add a stage in which nothing succeeds, and somebody who can do without it."""
        self._add_stage(VirtualStage(((VirtualRecord("raises", 0.01),) * 20,) * HOPELESS))
        self.decision((self.values[-1], *self.arms()))

    def derived(self) -> None:
        kept = [(s, o) for s, stage in enumerate(self.stages) for o, k in enumerate(stage.kinds) if k in ("collect", "group")]
        listed = [
            number for number, stage in enumerate(self.stages) if len(stage.inputs) < HOPELESS
        ]  # else it's not sure to be
        bases = kept * 2 + [(number, -1) for number in listed]
        if bases:
            kinds, buckets = self.kinds(keyed=True)
            needs = self.needs() if self.rng.random() < 0.5 else ()
            self._add_stage(VirtualStage((), kinds, needs, self.rng.choice(bases), False, buckets, rough=self.bad))

    def call(self, bad: float | None = None) -> None:
        fate = self.rng.choice(FATES) if self.rng.random() < (self.bad if bad is None else bad) else "ok"
        results, grows = self.rng.choice((1, 1, 1, 2)), None
        if self.depth < 2 and fate == "ok" and self.rng.random() < 0.25:
            grows = _Maker(self.rng, self.bad, self.depth + 1).graph(self.rng.randint(1, 3), results)
        self._add_call(
            VirtualCall("call", self.needs(), (), 1, results, self.rng.randint(0, 1), fate, self.seconds(), 0, grows)
        )

    def choose(self, needs: tuple[Address, ...] | None = None, arms: tuple[Address, ...] | None = None) -> None:
        needs, arms = needs or self.needs(), arms or self.arms()
        fate = self.rng.choice(FATES) if self.rng.random() < self.bad else "ok"
        choice, task = self.rng.randrange(len(arms)), self.rng.randint(0, 1)
        self._add_call(VirtualCall("choose", needs, arms, 1, 1, task, fate, self.seconds(), choice))

    def decision(self, arms: tuple[Address, ...] | None = None) -> None:
        kinds: tuple[CallKind, ...] = ("settle", "race", "race", "quorum")
        kind, arms = self.rng.choice(kinds), arms or self.arms(bad=0.3)
        self._add_call(VirtualCall(kind, (), arms, self.rng.randint(1, len(arms)) if kind == "quorum" else 1))

    def again(self) -> None:
        """Add a decision, and a choice made after it of one of its branches, which may have failed or been cancelled."""
        arms = self.arms(bad=0.3)
        self.decision(arms)
        self.choose((self.values[-1],), arms)
        if self.rng.random() < 0.5:
            self.decision((self.values[-1], *self.arms()))

    def crowd(self) -> None:
        """Add many short calls that travel together, half of them branches of one decision, half of another one."""
        first = len(self.calls)
        for _ in range(self.rng.choice((8, 24))):
            self._add_call(VirtualCall(seconds=self.rng.choice((0.001, 0.001, 0.001, 0.05))))
        calls = [(~number, 0) for number in range(first, len(self.calls))]
        self.rng.shuffle(calls)
        self.decision(tuple(calls[: len(calls) // 2]))
        self.decision(tuple(calls[len(calls) // 2 :]))
        self.decision(tuple(self.values[-2:]))

    def arms(self, bad: float | None = None) -> tuple[Address, ...]:
        """Return branches: what is there already, or something of their own."""
        arms: list[Address] = []
        for _ in range(self.rng.randint(1, 4)):
            way = self.rng.random()
            if way < 0.7 or not self.values:
                for _ in range(self.rng.choice((1, 1, 2))):
                    self.call(bad) if way < 0.5 else self.stage()
                arms.append(self.values[-1])
            else:
                arms.append(self.rng.choice(self.values))
        return tuple(arms)

    def seconds(self) -> float:
        return self.rng.choice(SECONDS)

    def _add_stage(self, stage: VirtualStage) -> None:
        self.values += [(len(self.stages), output) for output in range(len(stage.kinds))]
        self.stages.append(stage)

    def _add_call(self, call: VirtualCall) -> None:
        self.values += [(~len(self.calls), item) for item in range(call.results)]
        self.calls.append(call)

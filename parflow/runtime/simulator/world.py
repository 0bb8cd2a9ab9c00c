"""What a simulated run doesn't decide itself: the records and their fates, the faults, and what must come out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from parflow.model import Cause

Fate = Literal["ok", "raises", "crashes", "crashes once", "hangs", "memory"]
FATES: tuple[Fate, ...] = get_args(Fate)
CAUSES: dict[Fate, Cause] = {"raises": "exception", "crashes": "crash", "hangs": "timeout", "memory": "memory"}
"""The fates that end in a dead letter, always and whatever else happens."""


@dataclass(frozen=True, slots=True)
class VirtualRecord:
    """A record: what happens to whoever runs it, and how long that takes (seconds)."""

    fate: Fate = "ok"
    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class VirtualStage:
    """A stage: its inputs in order (a chunk's records, or None for one that listing rejects) and its outputs' kinds."""

    inputs: tuple[tuple[VirtualRecord, ...] | None, ...]
    kinds: tuple[str, ...] = ("reduce",)

    @property
    def chunks(self) -> list[tuple[VirtualRecord, ...]]:
        """The inputs that listing accepts."""
        return [records for records in self.inputs if records is not None]


@dataclass(frozen=True, slots=True)
class World:
    """All that a run does not decide itself.

    Parameters
    ----------
    stages : tuple of VirtualStage
        What there is to do.
    slots : int
        Jobs that run at once.
    fan_in : int
        Nodes that one merge takes.
    max_failures : float
        As of `Tolerance`. A run that ends over it is resumed with as many as it said.
    timeout, slice : float
        Seconds after which a hanging record is killed, and after which a batch stops at its next record.
    window : int
        Batches in flight for each slot.
    """

    stages: tuple[VirtualStage, ...]
    slots: int = 2
    fan_in: int = 2
    max_failures: float = 0
    timeout: float = 5.0
    slice: float = 10.0
    window: int = 2


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
BATCH_FAULTS = ("worker lost", "receipt lost", "receipt twice", "receipt late", "untouched", "broken")


def expected(world: World) -> tuple[dict[tuple[int, int], bytes], tuple[str, ...]]:
    """Return the results and the dead letters that every run of a world must come to, by plain loops."""
    results: dict[tuple[int, int], bytes] = {}
    dead: list[str] = []
    for number, stage in enumerate(world.stages):
        dead += [f"{number}.input{i}" for i, records in enumerate(stage.inputs) if records is None]
        names = [[(f"{number}.{c}.{o}", r.fate) for o, r in enumerate(records)] for c, records in enumerate(stage.chunks)]
        dead += [name for chunk in names for name, fate in chunk if fate in CAUSES]
        nodes = [b"".join(name.encode() + b" " for name, fate in chunk if fate not in CAUSES) for chunk in names]
        for output, kind in enumerate(stage.kinds):
            tree = nodes
            while kind == "reduce" and (tree is nodes or len(tree) > 1):
                groups = range(0, max(1, len(tree)), world.fan_in)
                tree = [b"(" + b"".join(tree[i : i + world.fan_in]) + b")" for i in groups]
            results[number, output] = tree[0] + b"!" if kind == "reduce" else b"".join(nodes)
    return results, tuple(sorted(dead))


def random_world(seed: int) -> World:
    """Return a small world of any shape."""
    rng = random.Random(seed)  # noqa: S311 - chance to repeat, not to keep a secret

    def record() -> VirtualRecord:
        fate = rng.choice(FATES) if rng.random() < 0.15 else "ok"
        return VirtualRecord(fate, rng.choice((0.001, 0.01, 0.1, 1.0, 4.0)))

    def stage() -> VirtualStage:
        chunks = [tuple(record() for _ in range(rng.randint(0, 6))) for _ in range(rng.choice((0, 1, 2, 5, 9, 20)))]
        kinds = tuple(rng.choice(("reduce", "reduce", "sink", "collect")) for _ in range(rng.randint(1, 2)))
        return VirtualStage(tuple(None if rng.random() < 0.03 else chunk for chunk in chunks), kinds)

    stages = tuple(stage() for _ in range(rng.choice((1, 1, 2, 3))))
    tolerated = rng.choice((0, 1, 0.05, 1000))
    return World(stages, rng.randint(1, 4), rng.randint(2, 4), tolerated, slice=rng.choice((0.5, 10.0)))


def random_faults(seed: int) -> Faults:
    """Return a calm to rough set of faults."""
    rng = random.Random(seed)  # noqa: S311 - chance to repeat, not to keep a secret
    batch, kill, stop, slots, disk, listing = (high * rng.choice((0, 0.3, 1)) for high in (0.3, 0.02, 0.02, 0.06, 3.0, 5.0))
    return Faults(batch, kill, stop, slots, disk, listing, budget=rng.choice((3, 12)))

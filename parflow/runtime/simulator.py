"""The coordinator on a virtual cluster: virtual clock, records, disk and store, and seeded faults.

What runs here is the coordinator that runs for real; only what it talks to is made up. A seed decides every fault, so a
failure is repeated by its number: ``python -m parflow.runtime.simulator --first 4711 --seeds 1``.

The "value" of a reduction is the names of the records in it, in order, with a bracket for each merge: a lost record, one
that counts twice, two in the wrong order or another shape of the tree all show in the result.
"""

from __future__ import annotations

import argparse
import heapq
import pickle
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from parflow.core.coordinator import (
    Append,
    BatchLost,
    BatchReturned,
    Broke,
    Coordinator,
    Durable,
    Finish,
    Instruction,
    List,
    Listed,
    Publish,
    SinkPublished,
    SlotsChanged,
    Stimulus,
    StopRequested,
    Submit,
    Yield,
)
from parflow.core.history import (
    BarrierOpened,
    ChunksListed,
    Entry,
    Merged,
    Owned,
    PieceEnded,
    Published,
    RunEnded,
    RunStarted,
    RunState,
    StageFacts,
    decode,
    encode,
    fold,
)
from parflow.core.policies import Tolerance
from parflow.model import (
    Cause,
    Chunk,
    ChunkJob,
    Cursor,
    Failure,
    MergeJob,
    Part,
    Piece,
    Receipt,
    Ref,
    Rejected,
    SinkFile,
    Tally,
    chunk_id,
    digest,
    make_ref,
)

Fate = Literal["ok", "raises", "crashes", "crashes once", "hangs", "memory"]
CAUSES: dict[Fate, Cause] = {"raises": "exception", "crashes": "crash", "hangs": "timeout", "memory": "memory"}
"""The fates that end in a dead letter, always and whatever else happens."""
INLINE = 24
"""A larger result goes to the virtual store, so that both ways are taken (bytes)."""
MERGE_SECONDS = 0.05


# --- the made-up world -----------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    ``results`` are by stage and output; ``dead`` are the names of the dead letters, sorted; ``makespan`` is in virtual
    seconds; ``faults`` counts what was done to the run.
    """

    results: dict[tuple[int, int], bytes]
    dead: tuple[str, ...]
    makespan: float
    steps: int
    batches: int
    restarts: int
    faults: dict[str, int]


def simulate(world: World, seed: int = 0, faults: Faults = CALM, *, audit: bool = True) -> Outcome:
    """Run a virtual workflow to its successful end, through all faults, and return what came of it.

    Parameters
    ----------
    world : World
        What there is to do.
    seed : int
        Decides every fault and every delay.
    faults : Faults
        How rough it is.
    audit : bool
        Hold every step against the rules; without, only what comes out at the end (much faster for large worlds).

    Raises
    ------
    AssertionError
        When a rule was broken: it names the seed, the rule, and what happened just before.

    Examples
    --------
    >>> one = (VirtualRecord(), VirtualRecord("raises"))
    >>> outcome = simulate(World((VirtualStage((one, one)),), max_failures=2), seed=1, faults=ROUGH)
    >>> outcome.results[0, 0], outcome.dead
    (b'(0.0.0 0.1.0 )!', ('0.0.1', '0.1.1'))
    """
    simulation = _Simulation(world, seed, faults, audit)
    try:
        return simulation.run()
    except Exception as error:
        story = "\n".join(f"  {moment:.3f} {what!r}" for moment, what in simulation.story)
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{story}") from error


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
        fate = rng.choice(get_args(Fate)) if rng.random() < 0.15 else "ok"
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
    chances = [high * rng.choice((0, 0.3, 1)) for high in (0.3, 0.02, 0.02, 0.06, 3.0, 5.0)]
    return Faults(*chances, budget=rng.choice((3, 12)))


# --- the rules -------------------------------------------------------------------------------------------------------


def _must(condition: object, rule: str, *what: object) -> None:
    if not condition:
        raise AssertionError(f"{rule}: {', '.join(map(repr, what))}")


class Audit:
    """The rules, kept from outside: own books, made of entries, instructions and stimuli alone.

    Parameters
    ----------
    world : World
        What there is to do.
    entries : iterable of Entry
        What was durable when the coordinator began.
    """

    def __init__(self, world: World, entries: Iterable[Entry]) -> None:
        self.world = world
        self.chunks = [stage.chunks for stage in world.stages]
        self.state = RunState()
        self.ended: dict[tuple[int, int, int], bool] = {}  # a record: whether it is a dead letter
        self.tickets: dict[tuple[int | str, ...], int] = {}  # of each stage, chunk, node and barrier, the last entry's
        self.unsent: dict[tuple[int, int], int] = {}  # fresh chunks and their weights
        self.open: dict[str, Submit] = {}
        self.flying: Counter[tuple[object, ...]] = Counter()
        self.slots = self.ticket = self.durable = 0
        self.stopped = self.abandoned = False
        for entry in entries:
            self._take(entry)

    def hear(self, stimulus: Stimulus) -> None:
        """Note what the coordinator is told."""
        match stimulus:
            case SlotsChanged(slots):
                self.slots = slots
            case BatchReturned(attempt) | BatchLost(attempt):
                if submit := self.open.pop(attempt, None):
                    self.flying.subtract(map(_identity, submit.jobs))
            case Durable(count):
                self.durable = count
            case StopRequested(now):
                self.stopped, self.abandoned = True, self.abandoned or now
            case Broke():
                self.stopped = True

    def see(self, instruction: Instruction) -> None:
        """Hold an instruction against the rules."""
        _must(self.state.ended is None or isinstance(instruction, Finish), "nothing is asked after the end", instruction)
        match instruction:
            case Append(entry, ticket):
                _must(ticket == self.ticket + 1, "tickets count up", ticket)
                _must(decode(*encode(entry)) == entry, "an entry survives its JSON form", entry)
                self.ticket = ticket
                self._take(decode(*encode(entry)))
            case Submit():
                self._submit(instruction)
            case Yield(attempts):
                _must(set(attempts) <= set(self.open), "only batches in flight are asked to yield", attempts)
            case Publish(stage, output):
                _must(self._settled(("barrier", stage)), "nothing is published before its barrier is durable", stage, output)
            case Finish(ended):
                _must(self.state.ended == ended and self.durable == self.ticket, "the end is durable first", ended)

    def check(self, coordinator: Coordinator) -> None:
        """Compare the coordinator with the fold of its entries, and see that a finished one asks for nothing."""
        _must(self.state == coordinator.state, "the state is the fold of the entries")
        if coordinator.finished:
            stimuli = (SlotsChanged(9), Durable(self.ticket), StopRequested(now=True), *(BatchLost(a, "") for a in self.open))
            _must(not any(map(coordinator.handle, stimuli)), "nothing is asked after the end")

    def _settled(self, *keys: tuple[int | str, ...]) -> bool:
        return all(self.tickets.get(key, sys.maxsize) <= self.durable for key in keys)

    def _take(self, entry: Entry) -> None:
        match entry:
            case PieceEnded(stage, piece):
                self._piece(entry)
                self.tickets["chunk", stage, piece.chunk] = self.tickets["stage", stage] = self.ticket
                self.unsent.pop((stage, piece.chunk), None)
            case ChunksListed(stage):
                _must(not self.state.stages[stage].closed, "a closed list stays closed", stage)
                self.tickets["stage", stage] = self.ticket
                self.unsent.update({(stage, chunk.index): chunk.weight for chunk in entry.chunks})
            case Merged(stage, output, level, index):
                _must((output, level, index) not in self.state.stages[stage].merged, "a node is merged once", entry)
                self.tickets["node", stage, output, level, index] = self.ticket
            case BarrierOpened(stage):
                self._barrier(entry)
                self.tickets["barrier", stage] = self.ticket
            case Published(stage, output):
                _must(output not in self.state.stages[stage].published, "a sink is published once", entry)
            case RunEnded(status):
                _must(self.abandoned or not self.open, "a run ends with nothing in flight", *self.open)
                done = all(stage.opened for stage in self.state.stages)
                _must(done or status != "succeeded", "a run succeeds when all barriers are open")
        self.state.apply(entry)

    def _piece(self, entry: PieceEnded) -> None:
        """Every record of a piece is committed, a dead letter, or in one piece of the rest: exactly one of these."""
        stage, piece, receipt, failure = entry.stage, entry.piece, entry.receipt, entry.failure
        records = self.chunks[stage][piece.chunk]
        _must(self.state.stages[stage].pending.get((piece.chunk, piece.first)) == piece, "only a pending piece ends", entry)
        span = _span(piece, records)
        stop = span.start if receipt is None else span.stop if receipt.status == "done" else _cursor(receipt).ordinal
        ended = {ordinal: records[ordinal].fate in CAUSES for ordinal in range(span.start, stop)}
        if failure is not None:
            _must(CAUSES.get(records[failure.ordinal].fate) == failure.cause, "only the guilty are condemned", failure)
            _must(piece.alone or failure.cause == "timeout", "a crash is condemned only when it was alone", entry)
            ended[failure.ordinal] = True
        parts = sorted([*ended, *(ordinal for rest in entry.rest for ordinal in _span(rest, records))])
        _must(parts == list(span), "a piece's records end once or are in the rest once", entry)
        taken = [r for r in entry.rest if r.first != piece.first and (r.chunk, r.first) in self.state.stages[stage].pending]
        _must(not taken, "pending pieces do not overlap", entry)
        keys = {(stage, piece.chunk, ordinal): dead for ordinal, dead in ended.items()}
        _must(not keys.keys() & self.ended.keys(), "a record ends once", entry)
        self.ended.update(keys)

    def _barrier(self, entry: BarrierOpened) -> None:
        number, stage, owned = entry.stage, self.state.stages[entry.stage], self.state.owned
        records = {(number, c, o) for c, chunk in enumerate(self.chunks[number]) for o in range(len(chunk))}
        _must(stage.closed and records <= self.ended.keys(), "a barrier opens when every record has ended", entry)
        _must(not stage.opened and self._settled(("stage", number)), "a barrier opens once, on durable entries", entry)
        rejected = self.world.stages[number].inputs.count(None)
        failed = rejected + sum(self.ended[record] for record in records)
        accepted = owned is not None and Tolerance(owned.max_failures).accepts(failed, len(records) + rejected)
        _must(accepted and failed == entry.failed, "a barrier opens over tolerated failures only", entry)

    def _submit(self, submit: Submit) -> None:
        _must(not self.stopped, "nothing begins once the run is to stop", submit)
        _must(submit.attempt not in self.open and submit.jobs, "an attempt is new and has something to do", submit)
        self.open[submit.attempt] = submit
        _must(len(self.open) <= self.world.window * self.slots, "the window is kept", submit)
        self.flying.update(map(_identity, submit.jobs))
        _must(max(self.flying.values()) == 1, "a job is in flight once", submit)
        for job in submit.jobs:
            _must(job.stage == submit.stage, "a batch is of one stage", submit)
            if isinstance(job, MergeJob):
                self._merge(job)
                continue
            piece, stage = job.piece, self.state.stages[job.stage]
            _must(stage.pending.get((piece.chunk, piece.first)) == piece, "only what is pending is run", job)
            _must(not piece.alone or len(submit.jobs) == 1, "a suspect travels alone", submit)
            largest = max(self.unsent.values(), default=0)
            if weight := self.unsent.pop((job.stage, piece.chunk), None):
                _must(weight == largest, "the largest chunk is begun first", job)

    def _merge(self, job: MergeJob) -> None:
        stage, fan_in, first = self.state.stages[job.stage], self.world.fan_in, job.index * self.world.fan_in
        width = -(-len(stage.chunks) // fan_in ** (job.level - 1))
        _must(stage.closed or first + fan_in <= width, "a merge covers what is listed", job)
        children = range(first, min(first + fan_in, width))
        if job.level == 1:
            _must(all(not stage.chunks[c].pending for c in children), "a merge follows its chunks", job)
            below = [("chunk", job.stage, c) for c in children]
        else:
            below = [("node", job.stage, job.output, job.level - 1, c) for c in children]
        _must(self._settled(*below), "a merge rests on durable entries", job)
        _must(not job.last or self._settled(("barrier", job.stage)), "the last merge follows the durable barrier", job)


def _identity(job: ChunkJob | MergeJob) -> tuple[object, ...]:
    """Name what a job does."""
    if isinstance(job, ChunkJob):
        return job.stage, job.piece.chunk, job.piece.first
    return job.stage, job.output, job.level, job.index, "merge"


def _span(piece: Piece, records: Sequence[VirtualRecord]) -> range:
    return range(piece.first, max(piece.first, len(records) if piece.stop is None else piece.stop))


def _cursor(receipt: Receipt) -> Cursor:
    if receipt.cursor is None:
        raise AssertionError(f"a receipt that is not 'done' has a cursor: {receipt}")
    return receipt.cursor


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Batch:
    """A batch on the virtual cluster, the coordinator that sent it, and the fault it meets after ``fuse`` records."""

    submit: Submit
    epoch: int
    fault: str = ""
    fuse: int = 0
    yielding: bool = False
    begun: float = 0.0


class _Simulation:
    """One run: the executor, the journal, the store and the cluster in one, on a heap of events."""

    def __init__(self, world: World, seed: int, faults: Faults, audit: bool) -> None:
        self.world, self.faults, self.auditing = world, faults, audit
        self.chunks = [stage.chunks for stage in world.stages]
        self.rng = random.Random(seed)  # noqa: S311 - chance to repeat, not to keep a secret
        self.now = 0.0
        self.story: deque[tuple[float, object]] = deque(maxlen=60)
        self.met: Counter[str] = Counter()
        self.steps = self.batches = self.epoch = 0
        self.journal: list[tuple[str, bytes]] = []
        self.buffer: list[tuple[int, tuple[str, bytes]]] = []
        self.store: dict[str, bytes] = {}
        self.found: dict[tuple[int, Piece], Receipt] = {}  # results in the store, as a restarted coordinator finds them
        self.staged: dict[str, bytes] = {}
        self.published: dict[tuple[int, int], bytes] = {}
        self.crashed: set[tuple[int, int, int]] = set()
        self.slots = world.slots
        self.waiting: deque[_Batch] = deque()
        self.running: dict[str, _Batch] = {}
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._scheduled = 0

    def run(self) -> Outcome:
        facts = tuple(StageFacts(f"stage {i}", ("read",), s.kinds, s.kinds) for i, s in enumerate(self.world.stages))
        self.journal.append(encode(RunStarted("simulated", "", facts, self.world.fan_in)))
        self._begin(self.world.max_failures)
        while self.coordinator.state.status != "succeeded" or not self.coordinator.finished:
            self._misfortune()
            _must(self._events, "a run never stands still")
            self.now, _, epoch, act = heapq.heappop(self._events)
            if epoch in (0, self.epoch):
                self.steps += 1
                act()
                self._start_batches()
        return self._outcome()

    def _later(self, delay: float, act: Callable[[], None], *, outlives: bool = False) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (self.now + delay, self._scheduled, 0 if outlives else self.epoch, act))

    def _strikes(self, chance: float, what: str) -> bool:
        if not chance or self.met.total() >= self.faults.budget or self.rng.random() >= chance:
            return False
        self.met[what] += 1
        return True

    def _misfortune(self) -> None:
        if self._strikes(self.faults.slots, "slots"):
            self.slots = self.rng.choice((0, 0, 1, 2, self.world.slots, 8))
            self._later(self.rng.uniform(0, 8), self._recover, outlives=True)
            self._tell(SlotsChanged(self.slots))
        if self._strikes(self.faults.stop, "stop"):
            stops = (StopRequested(), StopRequested(now=True), Broke("ClusterLostError", ("no worker", "run")))
            self._tell(self.rng.choice(stops))

    def _recover(self) -> None:
        self.slots = self.world.slots
        self._tell(SlotsChanged(self.slots))

    # --- the executor's part ---

    def _begin(self, max_failures: float) -> None:
        """Take the run: a first coordinator, or one after a stop or a kill."""
        self.epoch += 1
        self.waiting.clear()
        self.running.clear()  # what runs goes on for nobody, and may still write to the store
        self.buffer.clear()
        self.journal.append(encode(Owned(self.epoch, "simulator", max_failures)))
        entries = [decode(*entry) for entry in self.journal]
        self.coordinator = Coordinator("run", fold(entries), window=self.world.window)
        self.audit = Audit(self.world, entries) if self.auditing else None
        adopted = [(stage, piece, receipt) for (stage, piece), receipt in self.found.items()]
        self.rng.shuffle(adopted)
        self._carry_out(self.coordinator, self.coordinator.start(adopted))
        self._tell(SlotsChanged(self.slots))

    def _tell(self, stimulus: Stimulus) -> None:
        self.story.append((self.now, stimulus))
        if self.audit:
            self.audit.hear(stimulus)
        self._carry_out(self.coordinator, self.coordinator.handle(stimulus))

    def _carry_out(self, coordinator: Coordinator, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if self._strikes(self.faults.kill, "kill"):
                self.story.append((self.now, "killed"))
                survivors = self.buffer[: self.rng.randint(0, len(self.buffer))]
                self.journal.extend(entry for _, entry in survivors)
                self._begin(self._tolerated())
                return
            self.story.append((self.now, instruction))
            if self.audit:
                self.audit.see(instruction)
            self._do(instruction)
        if self.audit and coordinator is self.coordinator:
            self.audit.check(coordinator)
        if coordinator is self.coordinator and coordinator.finished and coordinator.state.status != "succeeded":
            self._begin(self._tolerated())

    def _tolerated(self) -> float:
        """Return max_failures for whoever goes on: what the last failed run says that it takes."""
        state = self.coordinator.state
        if state.ended is not None and state.ended.error == "TooManyFailuresError" and self.coordinator.finished:
            return float(state.ended.arguments[1])
        return self.world.max_failures if state.owned is None else state.owned.max_failures

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case List(stage, skip):
                self._later(0, partial(self._list, stage, skip))
            case Append(entry, ticket):
                if not self.buffer:
                    self._later(0.01 + self.rng.uniform(0, self.faults.disk), self._flush)
                self.buffer.append((ticket, encode(entry)))
            case Submit():
                self.batches += 1
                fault = self.rng.choice(BATCH_FAULTS) if self._strikes(self.faults.batch, "batch") else ""
                self.met[fault] += bool(fault)
                self.waiting.append(_Batch(instruction, self.epoch, fault, self.rng.randint(0, 3)))
            case Yield(attempts):
                for batch in [*self.waiting, *self.running.values()]:
                    batch.yielding |= batch.submit.attempt in attempts
            case Publish(stage, output):
                self._later(0.1, partial(self._publish, stage, output))

    def _list(self, stage: int, at: int) -> None:
        """List a block of inputs: a few, or none; the last block says so, or an empty one after it."""
        inputs = self.world.stages[stage].inputs
        stop = min(len(inputs), at + self.rng.randint(0, max(4, len(inputs) // 100)))
        index = sum(records is not None for records in inputs[:at])
        chunks, rejected = [], []
        for place, records in enumerate(inputs[at:stop], at):
            path = f"{stage}.input{place}"
            if records is None:
                rejected.append(Rejected(path, "NotAFileError", "is a folder"))
            else:
                parts = (Part(path, 0, None, len(records), "1"),)
                chunks.append(Chunk(index + len(chunks), chunk_id(parts), parts, 1 + len(records)))
        last = stop == len(inputs) and self.rng.random() < 0.7
        if not last:
            self._later(self.rng.uniform(0, self.faults.listing), partial(self._list, stage, stop))
        self._tell(Listed(ChunksListed(stage, tuple(chunks), tuple(rejected), last)))

    def _flush(self) -> None:
        """Make a group of entries durable."""
        size = self.rng.randint(1, len(self.buffer)) if self.faults.disk else len(self.buffer)
        group, self.buffer = self.buffer[:size], self.buffer[size:]
        self.journal.extend(entry for _, entry in group)
        if self.buffer:
            self._later(self.rng.uniform(0, self.faults.disk), self._flush)
        self._tell(Durable(group[-1][0]))

    def _publish(self, stage: int, output: int) -> None:
        files = self.coordinator.state.stages[stage].files(output)
        content = b"".join(self.staged[file.path] for file in files)
        before = self.published.setdefault((stage, output), content)
        _must(before == content, "a sink's content never changes", before, content)
        self._tell(SinkPublished(Published(stage, output, {"files": len(files)})))

    # --- the cluster's part ---

    def _start_batches(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            batch = self.waiting.popleft()
            batch.begun = self.now
            self.running[batch.submit.attempt] = batch
            self._proceed(batch, self._work(batch))

    def _proceed(self, batch: _Batch, work: Generator[float, None, tuple[Receipt | None, ...]]) -> None:
        """Let a batch go on to its next record, or meet its fault, or come back."""
        attempt = batch.submit.attempt
        if batch.fault in ("worker lost", "receipt late"):
            batch.fuse -= 1
            if batch.fuse < 0:
                lost, batch.fault = batch.fault == "worker lost", ""
                if not lost:
                    self._later(0, partial(self._proceed, batch, work), outlives=True)
                self._come_back(batch, BatchLost(attempt, "its worker vanished"), free=lost)
                return
        try:
            delay = next(work)
        except StopIteration as end:
            receipts: tuple[Receipt | None, ...] = end.value
            stimulus = BatchLost(attempt, "gone") if batch.fault == "receipt lost" else BatchReturned(attempt, receipts)
            if batch.fault == "receipt twice":
                self._later(self.rng.uniform(0, 5), partial(self._come_back, batch, stimulus), outlives=True)
            self._later(0, partial(self._come_back, batch, stimulus), outlives=True)
        else:
            self._later(delay, partial(self._proceed, batch, work), outlives=True)

    def _come_back(self, batch: _Batch, stimulus: Stimulus, *, free: bool = True) -> None:
        if batch.epoch != self.epoch:
            return
        if free:
            self.running.pop(batch.submit.attempt, None)
        self._tell(stimulus)

    def _work(self, batch: _Batch) -> Generator[float, None, tuple[Receipt | None, ...]]:
        """Do a batch as an honest worker does, and wait as long as it takes."""
        receipts: list[Receipt | None] = []
        for job in batch.submit.jobs:
            if batch.fault == "untouched" or batch.yielding or (receipts and self._late(batch)):
                receipts.append(None)
            elif batch.fault == "broken":
                receipts.append(Receipt("broken", failure=Failure("", "read", "exception", "ImportError", "no module")))
            elif isinstance(job, MergeJob):
                yield MERGE_SECONDS
                data = b"(" + b"".join(map(self._read, job.inputs)) + b")" + b"!" * job.last
                receipts.append(Receipt("done", results=(make_ref(data, self._put, INLINE),)))
            else:
                receipts.append((yield from self._chunk(batch, job)))
        return tuple(receipts)

    def _late(self, batch: _Batch) -> bool:
        return self.now - batch.begun >= self.world.slice

    def _chunk(self, batch: _Batch, job: ChunkJob) -> Generator[float, None, Receipt]:
        """Run a piece of a chunk, record by record."""
        piece, done, failures, begun = job.piece, [], list[Failure](), self.now
        records = self.chunks[job.stage][piece.chunk]
        for ordinal in _span(piece, records):
            if batch.yielding or (self._late(batch) and ordinal > piece.first):
                return self._receipt(job, done, failures, begun, Cursor(ordinal, 0, ordinal))
            record, key = records[ordinal], (job.stage, piece.chunk, ordinal)
            name = f"{job.stage}.{piece.chunk}.{ordinal}"
            if record.fate == "memory" and not piece.alone:
                return self._receipt(job, done, failures, begun, Cursor(ordinal, 0, ordinal), suspect=True)
            yield self.world.timeout if record.fate == "hangs" else record.seconds
            cause = "crash" if record.fate == "crashes once" and key not in self.crashed else CAUSES.get(record.fate)
            self.crashed.add(key)
            failure = cause and Failure(name, "read", cause, "Error", "no", chunk=piece.chunk, ordinal=ordinal)
            if failure and cause in ("crash", "timeout"):
                return Receipt("died", Cursor(ordinal, 0, ordinal), failure=failure)
            if failure:
                failures.append(failure)
            else:
                done.append(name)
        at_end = piece.stop is not None and batch.yielding
        return self._receipt(job, done, failures, begun, Cursor(piece.stop or 0, 0, piece.stop or 0) if at_end else None)

    def _receipt(
        self,
        job: ChunkJob,
        names: list[str],
        failures: list[Failure],
        begun: float,
        cursor: Cursor | None = None,
        *,
        suspect: bool = False,
    ) -> Receipt:
        """Keep what a piece gave, in the store or at hand, and say so."""
        data = "".join(f"{name} " for name in names).encode()
        results: list[Ref | None] = []
        files = []
        for output, kind in enumerate(self.world.stages[job.stage].kinds):
            if kind == "sink" and names:
                path = f"{self._scheduled}-{output}"
                self.staged[path] = data
                files.append(SinkFile(output, path, len(names), len(data)))
            results.append(None if kind == "sink" else make_ref(data, self._put, INLINE))
        receipt = Receipt(
            "done" if cursor is None else "stopped",
            cursor,
            suspect=suspect,
            results=tuple(results),
            files=tuple(files),
            failures=make_ref(pickle.dumps(failures), self._put, INLINE) if failures else None,
            failure=failures[0] if failures else None,
            tally=Tally(len(names) + len(failures), len(failures), len(data), self.now - begun),
            encodings={"utf-8": len(names)} if names else {},
            started=begun,
        )
        if any(ref and ref.key for ref in (*results, receipt.failures)):
            self.found[job.stage, job.piece] = receipt
        return receipt

    # --- the store's part, and the end ---

    def _put(self, data: bytes) -> str:
        self.store[digest(data)] = data
        return digest(data)

    def _read(self, ref: Ref) -> bytes:
        data = ref.inline if ref.inline is not None else self.store[ref.key or ""]
        _must(digest(data) == ref.digest, "the store gives what was put there", ref)
        return data

    def _outcome(self) -> Outcome:
        """Read the results as a user would, from the journal alone, and compare them with what must come out."""
        state = fold(decode(*entry) for entry in self.journal)
        results: dict[tuple[int, int], bytes] = {}
        dead: list[str] = []
        for number, stage in enumerate(state.stages):
            dead += [rejected.path for rejected in stage.rejected] + [failure.record for failure in stage.lost]
            for _, receipt in stage.receipts():
                dead += [f.record for f in pickle.loads(self._read(receipt.failures))] if receipt.failures else []
            for output, kind in enumerate(stage.facts.kinds):
                if kind == "reduce":
                    results[number, output] = self._read(stage.merged[max(node for node in stage.merged if node[0] == output)])
                elif kind == "sink":
                    results[number, output] = self.published[number, output]
                else:
                    results[number, output] = b"".join(map(self._read, stage.results(output)))
        outcome = Outcome(results, tuple(sorted(dead)), self.now, self.steps, self.batches, self.epoch - 1, dict(self.met))
        _must((results, outcome.dead) == expected(self.world), "the result is that of an undisturbed run", outcome)
        return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate many seeds and say how it went in one line; return 1 and the story when a rule was broken."""
    parser = argparse.ArgumentParser(prog="python -m parflow.runtime.simulator", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    options = parser.parse_args(arguments)
    began, steps, restarts, met = time.perf_counter(), 0, 0, Counter[str]()
    for seed in range(options.first, options.first + options.seeds):
        try:
            outcome = simulate(random_world(seed), seed, random_faults(seed))
        except AssertionError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        steps, restarts = steps + outcome.steps, restarts + outcome.restarts
        met.update(outcome.faults)
    spent = time.perf_counter() - began
    sys.stdout.write(f"{options.seeds} seeds, {steps} steps, {restarts} restarts, {met.total()} faults, {spent:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One run on the virtual cluster: executor and journal on a heap of events, with workers and a store."""

from __future__ import annotations

import heapq
import pickle
import random
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial

from parflow.core.bindings import bind
from parflow.core.coordinator import Coordinator
from parflow.core.entries import ChunksListed, Grown, Owned, Published, RunStarted, decode, encode
from parflow.core.history import RunState, fold
from parflow.core.signals import (
    Append,
    BatchLost,
    BatchReturned,
    Broke,
    Cancel,
    Durable,
    Instruction,
    List,
    Listed,
    Publish,
    Rang,
    Ring,
    SinkPublished,
    SlotsChanged,
    Stimulus,
    StopRequested,
    Submit,
    Yield,
)
from parflow.model import Address, Chunk, MergeJob, Part, Piece, Rejected, chunk_id, digest
from parflow.runtime.simulator.audit import Audit
from parflow.runtime.simulator.rules import must
from parflow.runtime.simulator.truth import INPUT, Cast, Truth, UndecidedError, expected, mark, said
from parflow.runtime.simulator.workers import Batch, Receipts, Store, Workers
from parflow.runtime.simulator.world import BATCH_FAULTS, CALM, Faults, VirtualCall, World, facts_of, nodes

FAILURES = 3
"""How often a run that must fail is seen to do so."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    ``results`` are by target; ``dead`` are the names of the dead letters of what the targets rest on, sorted; ``picks`` are
    the branches that won, by the label of the decision; ``makespan`` is in virtual seconds; ``faults`` counts what was done
    to the run. A run that had to fail has neither results nor dead letters.
    """

    results: dict[Address, bytes]
    dead: tuple[str, ...]
    makespan: float
    steps: int
    batches: int
    restarts: int
    faults: dict[str, int]
    picks: dict[str, tuple[int, ...]] = field(default_factory=dict)


def simulate(world: World, seed: int = 0, faults: Faults = CALM, *, audit: bool = True) -> Outcome:
    """Run a virtual workflow to its end, through all faults, and return what came of it.

    That is its success, unless what it is for can't be had: then it's seen to fail, and again each time it's resumed.

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
    >>> from parflow.runtime.simulator import ROUGH, VirtualRecord, VirtualStage, World, simulate
    >>> one = (VirtualRecord(), VirtualRecord("raises"))
    >>> outcome = simulate(World((VirtualStage((one, one)),), max_failures=2), seed=1, faults=ROUGH)
    >>> outcome.results[0, 0], outcome.dead
    (b'(0.0.0 0.1.0 )!', ('0.0.1', '0.1.1'))
    """
    simulation = Simulation(world, seed, faults, audit)
    try:
        return simulation.run()
    except Exception as error:
        story = "\n".join(f"  {moment:.3f} {what!r}" for moment, what in simulation.story)
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}\n{story}") from error


class Simulation:
    """One run: the executor, the journal and the cluster in one, on a heap of events."""

    def __init__(self, world: World, seed: int, faults: Faults, audit: bool) -> None:
        self.world, self.faults, self.auditing = world, faults, audit
        self.truth = Truth(world)
        self.rng = random.Random(seed)  # noqa: S311 - chance to repeat, not to keep a secret
        self.now = 0.0
        self.story: deque[tuple[float, object]] = deque(maxlen=60)
        self.met: Counter[str] = Counter()
        self.steps = self.batches = self.epoch = 0
        every = [node for _, _, node in nodes(world.graph)]
        weights = [1 if isinstance(node, VirtualCall) else 10 + sum(map(len, node.chunks)) for node in every]
        self.patience = 10_000 + 50 * sum(weights)
        self.journal: list[tuple[str, bytes]] = []
        self.buffer: list[tuple[int, tuple[str, bytes]]] = []
        self.failures = 0
        self.store = Store()
        self.workers = Workers(world, self.truth, self.store, lambda: self.now)
        self.published: dict[Address, bytes] = {}
        self.slots = world.slots
        self.waiting: deque[Batch] = deque()
        self.running: dict[str, Batch] = {}
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._scheduled = 0

    def run(self) -> Outcome:
        """Go through the events until the run has succeeded, or has failed often enough."""
        graph, targets = facts_of(self.world.graph), self.world.targets
        started = RunStarted("simulated", "", graph.stages, self.world.fan_in, {}, graph.tasks, graph.calls, targets)
        self.journal.append(encode(started))
        self._begin(self.world.max_failures)
        while not self._is_over():
            self._misfortune()
            self._start_batches()  # a coordinator that has just begun anew may have sent some
            must(self._events, "a run never stands still")
            must(self.steps < self.patience, "a run comes to an end", self.steps)
            self.now, _, epoch, act = heapq.heappop(self._events)
            if epoch in (0, self.epoch):
                self.steps += 1
                act()
                self._start_batches()
        return self._outcome()

    def _is_over(self) -> bool:
        return self.coordinator.finished and (self.coordinator.state.status == "succeeded" or self.failures >= FAILURES)

    def _later(self, delay: float, act: Callable[[], None], *, outlives: bool = False) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, (self.now + delay, self._scheduled, 0 if outlives else self.epoch, act))

    def _strikes(self, chance: float, *kinds: str) -> str:
        """Roll the dice: return one of the kinds of fault, or nothing."""
        if not chance or self.met.total() >= self.faults.budget or self.rng.random() >= chance:
            return ""
        kind = self.rng.choice(kinds)
        self.met[kind] += 1
        return kind

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
        self.coordinator = Coordinator("run", fold(entries), window=self.world.window, rules=self.world.rules_of)
        found = {key: receipt for key, receipt in self.store.found.items() if self._is_pending(*key)}
        self.cast = Cast(self.world, self.store.read)
        for entry in entries:
            if isinstance(entry, Grown):
                self.cast.grow(entry.call)
        self.audit = Audit(self.world, entries, self.store, found) if self.auditing else None
        adopted = [(stage, piece, receipt) for (stage, piece), receipt in found.items()]
        self.rng.shuffle(adopted)
        self._carry_out(self.coordinator, self.coordinator.start(adopted))
        self._tell(SlotsChanged(self.slots))

    def _is_pending(self, stage: int, piece: Piece) -> bool:
        """Tell whether a restarted coordinator is told of what the store has of a piece."""
        state = self.coordinator.state.stages[stage]
        return not state.facts.needs and piece.chunk < len(state.chunks) and bool(state.chunks[piece.chunk].pending)

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
        if coordinator is self.coordinator and coordinator.finished:
            state, failed = coordinator.state, _is_final(coordinator.state, self.world)
            self.failures += failed
            must(not failed or self.truth.lost, "a run fails only when what it is for can't be had", state.ended)
            must(state.status != "succeeded" or not self.truth.lost, "a run without what it is for fails", state.ended)
            if not self._is_over():
                self._begin(self._tolerated())

    def _tolerated(self) -> float:
        """Return max_failures for whoever goes on: what the last failed run says that it takes, if more may be tolerated."""
        state, fixed = self.coordinator.state, self.world.graph.decides
        if state.ended is not None and state.ended.error == "TooManyFailuresError" and self.coordinator.finished and not fixed:
            return float(state.ended.arguments[1])
        return self.world.max_failures if state.owned is None else state.owned.max_failures

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case List(stage, skip):
                self._later(0, partial(self._list, stage, skip))
            case Append(entry, ticket):
                if isinstance(entry, Grown):
                    self.cast.grow(entry.call)
                if not self.buffer:
                    self._later(0.01 + self.rng.uniform(0, self.faults.disk), self._flush)
                self.buffer.append((ticket, encode(entry)))
            case Submit():
                self.batches += 1
                fault = self._strikes(self.faults.batch, *BATCH_FAULTS)
                given = {job.node: self._given(job.node) for job in instruction.jobs if not isinstance(job, MergeJob)}
                self.waiting.append(Batch(instruction, self.epoch, given, fault, self.rng.randint(0, 3)))
            case Yield(attempts):
                for batch in [*self.waiting, *self.running.values()]:
                    batch.yielding |= batch.submit.attempt in attempts
            case Cancel(attempts):
                self._cancel(attempts)
            case Ring(bell, seconds):
                self._later(seconds, partial(self._tell, Rang(bell)))
            case Publish(stage, output):
                self._later(0.1, partial(self._publish, stage, output))

    def _given(self, node: int) -> list[str]:
        """Return the values that a node needs, as text."""
        state = self.coordinator.state
        needs = state.stages[node].facts.needs if node >= 0 else state.calls[~node].facts.needs
        return [self._value(state, address) for address in needs]

    def _value(self, state: RunState, address: Address) -> str:
        read, read_all = self.store.read, self.store.read_all
        return said(bind(state, address).load(lambda ref: read(ref).decode(), lambda refs: read_all(refs).decode()))

    def _cancel(self, attempts: tuple[str, ...]) -> None:
        """End batches; those that have begun may come back all the same."""
        for batch in [*self.waiting, *self.running.values()]:
            if batch.submit.attempt in attempts:
                batch.ended = batch in self.waiting or self.rng.random() < 0.5
                self.running.pop(batch.submit.attempt, None)
        self.waiting = deque(batch for batch in self.waiting if not batch.ended)

    def _list(self, stage: int, at: int) -> None:
        """List a block of inputs: a few, or none; the last block says so, or an empty one after it."""
        place = self.cast.stages[stage]
        inputs = place.node.inputs
        given = mark(self._given(stage)[:1]) if place.node.expands else ""
        stop = min(len(inputs), at + self.rng.randint(0, max(4, len(inputs) // 100)))
        index = sum(records is not None for records in inputs[:at])
        chunks, rejected = list[Chunk](), list[Rejected]()
        for number, records in enumerate(inputs[at:stop], at):
            path = f"{place.label}.input{number}{given}"
            if records is None:
                rejected.append(Rejected(path, "NotAFileError", "is a folder"))
            else:
                parts = (Part(path, 0, None, len(records), INPUT),)
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
        content = b"".join(self.store.staged[file.path] for file in files)
        before = self.published.setdefault((stage, output), content)
        must(before == content, "a sink's content never changes", before, content)
        self._tell(SinkPublished(Published(stage, output, {"content": digest(content)})))

    # --- the cluster's part ---

    def _start_batches(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            batch = self.waiting.popleft()
            batch.begun = self.now
            self.running[batch.submit.attempt] = batch
            self._proceed(batch, self.workers.work(batch, self.cast))

    def _proceed(self, batch: Batch, work: Generator[float, None, Receipts]) -> None:
        """Let a batch go on to its next record, or meet its fault, or come back."""
        attempt = batch.submit.attempt
        if batch.ended:
            return
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
            receipts: Receipts = end.value
            stimulus = BatchLost(attempt, "gone") if batch.fault == "receipt lost" else BatchReturned(attempt, receipts)
            if batch.fault == "receipt twice":
                self._later(self.rng.uniform(0, 5), partial(self._come_back, batch, stimulus), outlives=True)
            self._later(0, partial(self._come_back, batch, stimulus), outlives=True)
        else:
            self._later(delay, partial(self._proceed, batch, work), outlives=True)

    def _come_back(self, batch: Batch, stimulus: Stimulus, *, free: bool = True) -> None:
        if batch.epoch != self.epoch:
            return
        if free:
            self.running.pop(batch.submit.attempt, None)
        self._tell(stimulus)

    # --- the end ---

    def _outcome(self) -> Outcome:
        """Read the results as a user would, from the journal alone, and compare them with what must come out."""
        state = fold(decode(*entry) for entry in self.journal)
        picks = {self.cast.calls[n].label: c.decided.picked for n, c in enumerate(state.calls) if c.decided is not None}
        truth = Truth(self.world, picks)
        self._compare(state, truth)
        results: dict[Address, bytes] = {}
        dead: list[str] = []
        if not truth.lost:
            complete = truth.complete()
            for number, stage in enumerate(state.stages):
                dead += self._dead(state, number) if stage.facts.name in complete else []
            for address in self.world.graph.results:
                is_sink = address[0] >= 0 and state.stages[address[0]].facts.kinds[address[1]] == "sink"
                results[address] = self.published[address] if is_sink else self._value(state, address).encode()
        restarts = self.epoch - 1
        outcome = Outcome(results, tuple(sorted(dead)), self.now, self.steps, self.batches, restarts, dict(self.met), picks)
        must((results, outcome.dead) == expected(self.world, picks), "the result is that of an undisturbed run", outcome)
        return outcome

    def _compare(self, state: RunState, truth: Truth) -> None:
        """See that all that was finished on the way is kept and right, wanted or not."""
        for number, call in enumerate(state.calls):
            place = self.cast.calls[number]
            for item in range(len(call.results)):
                value, meant = self._value(state, (~number, item)), truth.text(place.graph, (place.number, item))
                must(value == meant, "what was finished is kept", place.label, value, meant)
        for number in range(len(state.stages)):
            try:
                guilty = {*truth.dead(self.cast.stages[number].label)}
            except UndecidedError:
                continue
            must({*self._dead(state, number)} <= guilty, "only the guilty are dead letters", number)

    def _dead(self, state: RunState, number: int) -> list[str]:
        stage = state.stages[number]
        dead = [rejected.path for rejected in stage.rejected] + [failure.record for failure in stage.lost]
        for _, receipt in stage.receipts():
            dead += [f.record for f in pickle.loads(self.store.read(receipt.failures))] if receipt.failures else []
        return dead


def _is_final(state: RunState, world: World) -> bool:
    """Tell whether a run ended so that resuming it is of no use."""
    error = state.ended.error if state.ended is not None else ""
    return error == "CallFailedError" or (error == "TooManyFailuresError" and world.graph.decides)

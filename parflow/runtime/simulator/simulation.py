"""One run on the virtual cluster: executor, journal, store and workers in one, on a heap of events."""

from __future__ import annotations

import heapq
import pickle
import random
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

from parflow.core.coordinator import Coordinator
from parflow.core.history import ChunksListed, Owned, Published, RunStarted, decode, encode, fold
from parflow.core.signals import (
    Append,
    BatchLost,
    BatchReturned,
    Broke,
    Durable,
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
from parflow.model import (
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
    StageFacts,
    Tally,
    chunk_id,
    digest,
    make_ref,
)
from parflow.runtime.simulator.audit import Audit, must, span_of
from parflow.runtime.simulator.world import BATCH_FAULTS, CALM, CAUSES, Faults, World, expected

INLINE = 24
"""A larger result goes to the virtual store, so that both ways are taken (bytes)."""
MERGE_SECONDS = 0.05


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


@dataclass(slots=True)
class _Batch:
    """A batch on the virtual cluster, the coordinator that sent it, and the fault it meets after ``fuse`` records."""

    submit: Submit
    epoch: int
    fault: str = ""
    fuse: int = 0
    yielding: bool = False
    begun: float = 0.0


class Simulation:
    """One run: the executor, the journal, the store and the cluster in one, on a heap of events."""

    def __init__(self, world: World, seed: int, faults: Faults, audit: bool) -> None:
        self.world, self.faults, self.auditing = world, faults, audit
        self.chunks = [stage.chunks for stage in world.stages]
        self.rng = random.Random(seed)  # noqa: S311 - chance to repeat, not to keep a secret
        self.now = 0.0
        self.story: deque[tuple[float, object]] = deque(maxlen=60)
        self.met: Counter[str] = Counter()
        self.steps = self.batches = self.epoch = 0
        self.patience = 10_000 + 50 * sum(len(records) for chunks in self.chunks for records in chunks)
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
        """Go through the events until the run has succeeded."""
        facts = tuple(StageFacts(f"stage {i}", ("read",), s.kinds, s.kinds) for i, s in enumerate(self.world.stages))
        self.journal.append(encode(RunStarted("simulated", "", facts, self.world.fan_in)))
        self._begin(self.world.max_failures)
        while self.coordinator.state.status != "succeeded" or not self.coordinator.finished:
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
                fault = self._strikes(self.faults.batch, *BATCH_FAULTS)
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
        chunks, rejected = list[Chunk](), list[Rejected]()
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
        must(before == content, "a sink's content never changes", before, content)
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
        piece, done, failures, begun = job.piece, list[str](), list[Failure](), self.now
        records = self.chunks[job.stage][piece.chunk]
        for ordinal in span_of(piece, records):
            here = Cursor(ordinal, 0, ordinal) if ordinal > piece.first else piece.start
            if batch.yielding or (self._late(batch) and ordinal > piece.first):
                return self._receipt(job, done, failures, begun, here)
            record, key = records[ordinal], (job.stage, piece.chunk, ordinal)
            name = f"{job.stage}.{piece.chunk}.{ordinal}"
            yield self.world.timeout if record.fate == "hangs" else record.seconds
            cause = "crash" if record.fate == "crashes once" and key not in self.crashed else CAUSES.get(record.fate)
            self.crashed.add(key)
            failure = cause and Failure(name, "read", cause, "Error", "no", chunk=piece.chunk, ordinal=ordinal)
            if failure and cause in ("crash", "timeout", "memory"):
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
    ) -> Receipt:
        """Keep what a piece gave, in the store or at hand, and say so."""
        data = "".join(f"{name} " for name in names).encode()
        results: list[Ref | None] = []
        files = []
        for output, kind in enumerate(self.world.stages[job.stage].kinds):
            if kind == "sink" and names:
                path = f"part-{len(self.staged)}"
                self.staged[path] = data
                files.append(SinkFile(output, path, len(names), len(data)))
            results.append(None if kind == "sink" else make_ref(data, self._put, INLINE))
        receipt = Receipt(
            "done" if cursor is None else "stopped",
            cursor,
            results=tuple(results),
            files=tuple(files),
            failures=make_ref(pickle.dumps(failures), self._put, INLINE) if failures else None,
            failure=failures[0] if failures else None,
            tally=Tally(len(names) + len(failures), len(failures), len(data), self.now - begun),
            encodings={"utf-8": len(names)} if names else {},
            started=begun,
        )
        if files or any(ref and ref.key for ref in (*results, receipt.failures)):
            self.found[job.stage, job.piece] = receipt
        return receipt

    # --- the store's part, and the end ---

    def _put(self, data: bytes) -> str:
        self.store[digest(data)] = data
        return digest(data)

    def _read(self, ref: Ref) -> bytes:
        data = ref.inline if ref.inline is not None else self.store[ref.key or ""]
        must(digest(data) == ref.digest, "the store gives what was put there", ref)
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
        must((results, outcome.dead) == expected(self.world), "the result is that of an undisturbed run", outcome)
        return outcome

"""What honest workers do on the virtual cluster: pieces of chunks, merges and calls, as long as they take."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field

from parflow.core.signals import Submit
from parflow.model import (
    CallJob,
    ChunkJob,
    Counts,
    Cursor,
    Failure,
    Growth,
    MergeJob,
    Piece,
    Receipt,
    Ref,
    SinkFile,
    Tally,
    UndoJob,
    digest,
    make_ref,
    record_key,
)
from parflow.runtime.simulator.rules import must, span_of
from parflow.runtime.simulator.truth import Cast, Truth, bucket_of, mark, names_in, of_output
from parflow.runtime.simulator.world import CAUSES, Fate, World, facts_of

INLINE = 24
"""A larger result goes to the virtual store, so that both ways are taken (bytes)."""
MERGE_SECONDS = 0.05

Receipts = tuple[Receipt | None, ...]


@dataclass(slots=True)
class Batch:
    """A batch on the virtual cluster, the coordinator that sent it, and the fault it meets after ``fuse`` records.

    ``given`` are the values that the nodes of its jobs need, as text.
    """

    submit: Submit
    epoch: int
    given: dict[int, list[str]] = field(default_factory=dict)
    fault: str = ""
    fuse: int = 0
    yielding: bool = False
    ended: bool = False
    begun: float = 0.0


class Store:
    """The virtual store: results by digest, staged files, and what a restarted coordinator finds of finished pieces."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.staged: dict[str, bytes] = {}
        self.found: dict[tuple[int, Piece], Receipt] = {}
        self.effects: dict[str, list[str]] = {}  # what was done outside for each record, and undone

    def do(self, record: str) -> None:
        """Do something outside for a record, unless it was done before: what was undone is done anew by a redrive alone."""
        self.effects.setdefault(record, ["done"])

    def undo(self, record: str) -> None:
        """Undo it, unless there is nothing that stands."""
        if self.effects.get(record, [])[-1:] == ["done"]:
            self.effects[record].append("undone")

    def put(self, data: bytes) -> str:
        """Keep data, and return its key."""
        self.objects[digest(data)] = data
        return digest(data)

    def read(self, ref: Ref) -> bytes:
        """Return what a reference stands for."""
        data = ref.inline if ref.inline is not None else self.objects[ref.key or ""]
        must(digest(data) == ref.digest, "the store gives what was put there", ref)
        return data

    def read_all(self, refs: Iterable[Ref]) -> bytes:
        """Return what several references stand for."""
        return b"".join(map(self.read, refs))

    def keep(self, data: bytes) -> Ref:
        """Keep a result, at hand or here."""
        return make_ref(data, self.put, INLINE)


class Workers:
    """Does batches.

    Parameters
    ----------
    world, truth
        What there is to do, and the shapes of trees.
    store : Store
        Where results go.
    now : callable
        The virtual time, in seconds.
    """

    def __init__(self, world: World, truth: Truth, store: Store, now: Callable[[], float]) -> None:
        self.world, self.truth, self.store, self.now = world, truth, store, now
        self.crashed: set[object] = set()

    def work(self, batch: Batch, cast: Cast) -> Generator[float, None, Receipts]:
        """Do a batch as an honest worker does, and wait as long as it takes."""
        receipts: list[Receipt | None] = []
        for job in batch.submit.jobs:
            if batch.fault == "untouched" or batch.yielding or (receipts and self._late(batch)):
                receipts.append(None)
            elif batch.fault == "broken":
                receipts.append(Receipt("broken", failure=Failure("", "read", "exception", "ImportError", "no module")))
            elif batch.fault == "died writing":
                receipts.append(Receipt("died", failure=Failure("", "write", "crash", "RecordCrashedError", "signal 11")))
            elif isinstance(job, MergeJob):
                yield MERGE_SECONDS
                receipts.append(self._merge(job, cast))
            elif isinstance(job, CallJob):
                receipts.append((yield from self._call(batch, job, cast)))
            elif isinstance(job, UndoJob):
                yield MERGE_SECONDS
                for record in job.records:
                    self.store.undo(record)
                receipts.append(Receipt("done", tally=Tally(len(job.records))))
            else:
                receipts.append((yield from self._chunk(batch, job, cast)))
        return tuple(receipts)

    def _late(self, batch: Batch) -> bool:
        return self.now() - batch.begun >= self.world.slice

    def _fails(self, key: object, fate: Fate, name: str, step: str) -> Failure | None:
        cause = "crash" if fate == "crashes once" and key not in self.crashed else CAUSES.get(fate)
        self.crashed.add(key)
        return Failure(name, step, cause, "Error", "no", ("virtual.Error",)) if cause else None

    def _merge(self, job: MergeJob, cast: Cast) -> Receipt:
        place, data = cast.stages[job.stage], self.store.read_all(job.inputs)
        if place.node.kinds[job.output] == "group":
            if job.level == 1:
                buckets = place.node.buckets[job.output]
                data = "".join(f"{n} " for n in names_in(data) if bucket_of(n, buckets) == job.bucket).encode()
        else:
            data = (b"(" + data + b")" if self.truth.shaped(place.label) else data) + b"!" * job.last
        return Receipt("done", results=(self.store.keep(data),))

    def _call(self, batch: Batch, job: CallJob, cast: Cast) -> Generator[float, None, Receipt]:
        place, begun = cast.calls[job.call], self.now()
        call = place.node
        yield self.world.timeout if call.fate == "hangs" else call.seconds
        tally = Tally(seconds=self.now() - begun)
        failure = self._fails(place.label, call.fate, "", cast.tasks[job.task])
        if failure is not None and failure.cause != "exception":
            return Receipt("died", Cursor(), failure=failure)
        if failure is not None:
            return Receipt("done", failure=failure, tally=tally)
        if call.grows is not None:
            label = f"{place.label}/"
            return Receipt("done", growth=Growth(facts_of(call.grows, label), call.grows.results, label), tally=tally)
        if call.kind == "choose":
            return Receipt("done", choice=call.choice, tally=tally)
        given = mark(batch.given[job.node]) if call.needs else ""
        results = tuple(self.store.keep(f"{place.label}.{item}{given}".encode()) for item in range(call.results))
        return Receipt("done", results=results, tally=tally, started=begun)

    def _chunk(self, batch: Batch, job: ChunkJob, cast: Cast) -> Generator[float, None, Receipt]:
        """Run a piece of a chunk, record by record."""
        piece, done, failures, begun = job.piece, list[str](), list[Failure](), self.now()
        place = cast.stages[job.stage]
        records = cast.records(job.stage, job.chunk, mark(batch.given[job.stage]) if place.node.needs else "")
        for ordinal in span_of(piece, records):
            here = Cursor(ordinal, 0, ordinal) if ordinal > piece.first else piece.start
            if batch.yielding or (self._late(batch) and ordinal > piece.first):
                return self._receipt(job, place.node.kinds, done, failures, begun, here)
            name, record = records[ordinal]
            identity = record_key(job.stage, job.chunk, Cursor(ordinal, 0, ordinal))
            if self.world.rules.compensates:
                self.store.do(identity)
            yield self.world.timeout if record.fate == "hangs" else record.seconds
            failure = self._fails((place.label, piece.chunk, ordinal), record.fate, name, "read")
            if failure is None:
                done.append(name)
                continue
            failure = Failure(name, "read", failure.cause, "Error", "no", failure.bases, chunk=piece.chunk, ordinal=ordinal)
            if failure.cause != "exception":
                return Receipt("died", Cursor(ordinal, 0, ordinal), failure=failure)
            self.store.undo(identity)
            failures.append(failure)
        at_end = piece.stop is not None and batch.yielding
        end = Cursor(piece.stop or 0, 0, piece.stop or 0) if at_end else None
        return self._receipt(job, place.node.kinds, done, failures, begun, end)

    def _receipt(
        self,
        job: ChunkJob,
        kinds: tuple[str, ...],
        names: list[str],
        failures: list[Failure],
        begun: float,
        cursor: Cursor | None = None,
    ) -> Receipt:
        """Keep what a piece gave, in the store or at hand, and say so."""
        results: list[Ref | None] = []
        files = []
        for output, kind in enumerate(kinds):
            data = "".join(f"{of_output(name, output)} " for name in names).encode()
            if kind == "sink" and names:
                path = f"part-{len(self.store.staged)}"
                self.store.staged[path] = data
                files.append(SinkFile(output, path, len(names), len(data)))
            results.append(None if kind == "sink" else self.store.keep(data))
        receipt = Receipt(
            "done" if cursor is None else "stopped",
            cursor,
            results=tuple(results),
            files=tuple(files),
            failures=self.store.keep(pickle.dumps(failures)) if failures else None,
            failure=failures[0] if failures else None,
            tally=Tally(len(names) + len(failures), len(failures), len(names), self.now() - begun),
            steps={"read": Counts(len(failures), 0, len(names) + len(failures), len(failures))},
            encodings={"utf-8": len(names)} if names else {},
            started=begun,
        )
        if files or any(ref and ref.key for ref in (*results, receipt.failures)):
            self.store.found[job.stage, job.piece] = receipt
        return receipt

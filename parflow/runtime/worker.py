"""What travels to a worker and what it does there: run chunks, merge partials. Receipts come back, never data."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from parflow.core.bindings import Binding
from parflow.core.plan import Stage
from parflow.core.state import StageState
from parflow.errors import CodeError, StoreError
from parflow.model import (
    INLINE_BYTES,
    CallJob,
    Job,
    MergeJob,
    Piece,
    Receipt,
    UndoJob,
    digest,
    dump_json,
    from_json,
    load_json,
    to_json,
)
from parflow.nodes import Task
from parflow.runtime.attempts import TERMS, Terms, Windows
from parflow.runtime.calls import Given, run_call
from parflow.runtime.here import Site, entered
from parflow.runtime.instances import Instances
from parflow.runtime.marker import JOB, STEP, STOP, Marker
from parflow.runtime.pipeline import Broken, Context, describe, run_merge, run_piece
from parflow.runtime.prints import PRINTS
from parflow.runtime.program import read_code
from parflow.runtime.undoing import run_undo
from parflow.storage.store import Store, open_store

Isolation = Literal["process", "inline"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some jobs of one stage, or calls of one task. Holds no user object: the code is opaque bytes in the store.

    ``labels`` and ``timeouts`` (seconds) are of the numbered steps; ``memory`` is in bytes; after ``slice`` seconds the job
    in hand yields and the rest of the batch comes back untouched. ``bindings`` are the values that the stage needs, in its
    order; ``given`` what each call is made with. ``terms`` are what policies leave to the child;
    ``resources`` what a Dask worker must have to take it; ``began`` when the run began (seconds since 1970).
    """

    run_id: str
    attempt: str
    unit: int
    jobs: tuple[Job | UndoJob, ...]
    store: str
    code: str
    labels: tuple[str, ...]
    timeouts: tuple[float | None, ...]
    memory: int | None = None
    slice: float = 30.0
    isolation: Isolation = "process"
    preload: tuple[str, ...] = ()
    inline_bytes: int = INLINE_BYTES
    bindings: tuple[Binding, ...] = ()
    given: tuple[Given, ...] = ()
    terms: Terms = TERMS
    resources: Mapping[str, float] | None = None
    began: float = 0.0

    @property
    def name(self) -> str:
        """Name the batch among those of all runs: a worker may serve several at once."""
        return f"{self.run_id}/{self.attempt}"


@dataclass(slots=True)
class Opened:
    """Stores and code that a process has opened, so that each is opened once.

    ``shared`` says whether threads share it.
    """

    shared: bool = False
    stores: dict[str, Store] = field(default_factory=dict)
    codes: dict[tuple[str, str], Any] = field(default_factory=dict)
    windows: dict[tuple[str, int], Windows] = field(default_factory=dict)
    instances: Instances = field(init=False)

    def __post_init__(self) -> None:
        self.instances = Instances(shared=self.shared)

    def store(self, url: str) -> Store:
        """Return the store at a URL."""
        if url not in self.stores:
            self.stores[url] = open_store(url, create=False)
        return self.stores[url]

    def code(self, batch: Batch) -> Any:
        """Open the user's code: a stage or a task.

        Raises
        ------
        Broken
            When it can't be loaded here, with the reason.
        """
        key = (batch.store, batch.code)
        if key not in self.codes:
            data = read_code(self.store(batch.store), batch.code)
            try:
                self.codes[key] = pickle.loads(data)
            except Exception as error:
                name = type(error).__name__
                hint = "Install the missing module on every worker, or define the function in the flow's own file."
                wrong = CodeError("load", f"its code can't be loaded by the worker: {name}: {error}. {hint}")
                raise Broken("load", wrong) from error
        return self.codes[key]

    def stage(self, batch: Batch) -> Stage:
        """Open a stage's code, build what its class tasks call, and give its steps the values that they need.

        Raises
        ------
        Broken
            When it can't be loaded or built here, with the reason.
        """
        stage: Stage = self.code(batch)
        values = dict(zip(stage.needs, batch.bindings, strict=True))
        return self.instances.ready(stage, batch.run_id, batch.code, values, self.store(batch.store))

    def task(self, batch: Batch) -> Task:
        """Open a task's code, and build it if it's a class.

        Raises
        ------
        Broken
            When it can't be loaded or built here, with the reason.
        """
        return self.instances.task(self.code(batch), batch.run_id, batch.code)

    def close(self) -> None:
        """Close what was built."""
        self.instances.close()


def run_jobs(batch: Batch, first: int, opened: Opened, marker: Marker) -> Iterator[tuple[int, Receipt]]:
    """Run the jobs of a batch from number ``first`` on; yields each one's number and receipt.

    It ends early when the marker says so, when a step is broken, or when a job died of memory: the next job wants a fresh
    process.
    """
    windows = opened.windows.setdefault((batch.run_id, batch.unit), {})
    for number in range(first, len(batch.jobs)):
        if marker[STOP]:
            return
        try:
            job = batch.jobs[number]
            marker[STEP] = 0  # no step's timeout holds for what comes before its first record
            if isinstance(job, (MergeJob, UndoJob)):
                code = opened.code(batch)
            else:
                code = opened.task(batch) if isinstance(job, CallJob) else opened.stage(batch)
            PRINTS.begin()
            marker[JOB] = number + 1
            receipt = _run_job(batch, number, code, opened.store(batch.store), marker, windows)
        except Broken as broken:
            receipt = Receipt("broken", failure=describe(broken.error, record="", step=broken.step, cause="exception"))
        except StoreError as error:
            receipt = Receipt("broken", failure=describe(error, record="", step="store", cause="exception"))
        except Exception as error:  # noqa: BLE001 - parflow itself: never a record's fault
            receipt = Receipt("broken", failure=describe(error, record="", step=batch.labels[0], cause="exception"))
        yield number, receipt
        if receipt.status in ("broken", "died"):
            return


def _run_job(batch: Batch, number: int, code: Any, store: Store, marker: Marker, windows: Windows) -> Receipt:
    job = batch.jobs[number]
    token = f"{batch.attempt}-{secrets.token_hex(3)}"  # Dask may run a batch of a lost worker again: names never collide
    if isinstance(job, MergeJob):
        name = f"s{job.stage}-merge{job.output}.{job.bucket}-{job.level}-{job.index:06d}-{token}"
        return run_merge(code, job, Context(batch.run_id, name, store, marker, batch.inline_bytes))
    if isinstance(job, UndoJob):
        context = Context(batch.run_id, f"undo{job.unit}-{token}", store, marker, batch.inline_bytes)
        with entered(Site(batch.run_id, batch.began, store, marker, job, code)):
            return run_undo(code, job, context)
    if isinstance(job, CallJob):
        context = Context(batch.run_id, f"call{job.call}-{token}", store, marker, batch.inline_bytes, batch.terms, windows)
        with entered(Site(batch.run_id, batch.began, store, marker, job, code)):
            return run_call(code, batch.given[number], context, len(job.earlier))
    name = f"s{job.stage}-{job.piece.chunk:06d}-{job.piece.first:09d}-{token}"
    context = Context(batch.run_id, name, store, marker, batch.inline_bytes, batch.terms, windows)
    with entered(Site(batch.run_id, batch.began, store, marker, job, code)):
        receipt = run_piece(code, job, context, batch.timeouts)
    if receipt.files or any(ref is not None and ref.key for ref in receipt.results):
        claim = {"stage": job.stage, "chunk": job.chunk.id, "piece": to_json(job.piece), "receipt": to_json(receipt)}
        body = dump_json(claim)
        store.put(f"done/{name}.json", f"{digest(body)}\n".encode() + body)
    return receipt


def adoptable(store: Store, stages: Sequence[StageState]) -> Iterator[tuple[int, Piece, Receipt]]:
    """Yield what the store holds of chunks that the journal has pending: finished pieces whose entries were lost.

    A claim that is damaged, or whose results are, is passed over: its piece runs again.
    """
    for key in store.keys("done/"):
        stage, chunk = (int(part) for part in key.removeprefix("done/s").split("-")[:2])
        if stages[stage].facts.needs or stages[stage].redriven:  # made with other values, or published, before a redrive
            continue
        if chunk >= len(stages[stage].chunks) or not stages[stage].chunks[chunk].pending:
            continue
        said, _, body = store.get(key).partition(b"\n")
        if said != digest(body).encode():
            continue
        claim: dict[str, Any] = load_json(body)
        receipt = from_json(Receipt, claim["receipt"])
        if claim["chunk"] == stages[stage].chunks[chunk].chunk.id and _whole(store, receipt):
            yield stage, from_json(Piece, claim["piece"]), receipt


def _whole(store: Store, receipt: Receipt) -> bool:
    try:
        for ref in (*receipt.results, receipt.failures):
            if ref is not None:
                store.get_checked(ref)
    except StoreError:
        return False
    return True

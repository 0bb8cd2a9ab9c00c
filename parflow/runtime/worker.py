"""What travels to a worker and what it does there: run chunks, merge partials. Receipts come back, never data."""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from parflow.core.history import StageState
from parflow.core.plan import Stage
from parflow.errors import CodeError
from parflow.model import INLINE_BYTES, Job, MergeJob, Piece, Receipt, dump_json, from_json, load_json, to_json
from parflow.runtime.instances import Instances
from parflow.runtime.marker import JOB, STEP, STOP, Marker
from parflow.runtime.pipeline import Broken, Context, describe, run_merge, run_piece
from parflow.storage.store import Store, open_store

Isolation = Literal["process", "inline"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some jobs of one stage. Holds no user object: the stage's code is opaque bytes in the store, named by ``code``.

    ``labels`` and ``timeouts`` (seconds) are of the numbered steps; ``memory`` is in bytes; after ``slice`` seconds the job
    in hand yields and the rest of the batch comes back untouched.
    """

    run_id: str
    attempt: str
    stage: int
    jobs: tuple[Job, ...]
    store: str
    code: str
    labels: tuple[str, ...]
    timeouts: tuple[float | None, ...]
    memory: int | None = None
    slice: float = 30.0
    isolation: Isolation = "process"
    preload: tuple[str, ...] = ()
    inline_bytes: int = INLINE_BYTES

    @property
    def name(self) -> str:
        """Name the batch among those of all runs: a worker may serve several at once."""
        return f"{self.run_id}/{self.attempt}"


@dataclass(slots=True)
class Opened:
    """Stores and stages that a process has opened, so that each is opened once.

    ``shared`` says whether threads share it.
    """

    shared: bool = False
    stores: dict[str, Store] = field(default_factory=dict)
    stages: dict[tuple[str, str], Stage] = field(default_factory=dict)
    instances: Instances = field(init=False)

    def __post_init__(self) -> None:
        self.instances = Instances(shared=self.shared)

    def store(self, url: str) -> Store:
        """Return the store at a URL."""
        if url not in self.stores:
            self.stores[url] = open_store(url)
        return self.stores[url]

    def stage(self, batch: Batch) -> Stage:
        """Open the user's code.

        Raises
        ------
        Broken
            When it can't be loaded here, with the reason.
        """
        key = (batch.store, batch.code)
        if key not in self.stages:
            data = self.store(batch.store).get(batch.code)
            try:
                self.stages[key] = pickle.loads(data)
            except Exception as error:
                name = type(error).__name__
                hint = "Install the missing module on every worker, or define the function in the flow's own file."
                wrong = CodeError("load", f"its code can't be loaded by the worker: {name}: {error}. {hint}")
                raise Broken("load", wrong) from error
        return self.stages[key]

    def ready(self, batch: Batch) -> Stage:
        """Open the user's code, and build what its class tasks call.

        Raises
        ------
        Broken
            When it can't be loaded or built here, with the reason.
        """
        return self.instances.ready(self.stage(batch), batch.run_id, batch.code)

    def close(self) -> None:
        """Close what was built."""
        self.instances.close()


def run_jobs(batch: Batch, first: int, opened: Opened, marker: Marker) -> Iterator[tuple[int, Receipt]]:
    """Run the jobs of a batch from number ``first`` on; yields each one's number and receipt.

    It ends early when the marker says so, when a step is broken, or when a job died of memory: the next job wants a fresh
    process.
    """
    for number in range(first, len(batch.jobs)):
        if marker[STOP]:
            return
        try:
            job = batch.jobs[number]
            marker[STEP] = 0  # no step's timeout holds for what comes before its first record
            stage = opened.stage(batch) if isinstance(job, MergeJob) else opened.ready(batch)
            marker[JOB] = number + 1
            receipt = _run_job(batch, job, stage, opened.store(batch.store), marker)
        except Broken as broken:
            receipt = Receipt("broken", failure=describe(broken.error, record="", step=broken.step, cause="exception"))
        except Exception as error:  # noqa: BLE001 - the store, the sink or parflow itself: never a record's fault
            receipt = Receipt("broken", failure=describe(error, record="", step=batch.labels[0], cause="exception"))
        yield number, receipt
        if receipt.status in ("broken", "died"):
            return


def _run_job(batch: Batch, job: Job, stage: Stage, store: Store, marker: Marker) -> Receipt:
    token = f"{batch.attempt}-{secrets.token_hex(3)}"  # Dask may run a batch of a lost worker again: names never collide
    if isinstance(job, MergeJob):
        name = f"s{job.stage}-merge{job.output}-{job.level}-{job.index:06d}-{token}"
        return run_merge(stage, job, Context(batch.run_id, name, store, marker, batch.inline_bytes))
    name = f"s{job.stage}-{job.piece.chunk:06d}-{job.piece.first:09d}-{token}"
    receipt = run_piece(stage, job, Context(batch.run_id, name, store, marker, batch.inline_bytes), batch.timeouts)
    if receipt.files or any(ref is not None and ref.key for ref in receipt.results):
        claim = {"stage": job.stage, "chunk": job.chunk.id, "piece": to_json(job.piece), "receipt": to_json(receipt)}
        store.put(f"done/{name}.json", dump_json(claim))
    return receipt


def adoptable(store: Store, stages: Sequence[StageState]) -> Iterator[tuple[int, Piece, Receipt]]:
    """Yield what the store holds of chunks that the journal has pending: finished pieces whose entries were lost."""
    for key in store.keys("done/"):
        stage, chunk = (int(part) for part in key.removeprefix("done/s").split("-")[:2])
        if chunk >= len(stages[stage].chunks) or not stages[stage].chunks[chunk].pending:
            continue
        claim: dict[str, Any] = load_json(store.get(key))
        if claim["chunk"] == stages[stage].chunks[chunk].chunk.id:
            yield stage, from_json(Piece, claim["piece"]), from_json(Receipt, claim["receipt"])

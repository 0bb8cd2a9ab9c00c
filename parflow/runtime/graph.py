"""A plan as one plain Dask graph: stage by chunk, a merge tree a reduction. Builds, never computes.

Run this way a workflow is ordinary Dask, in memory: no journal, no store, no isolation; the first record that fails raises.
`.run()` sends the same functions chunk by chunk instead, and adds all that.
"""

from __future__ import annotations

import io
import pickle
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from parflow.core.plan import Plan, Stage
from parflow.errors import InputError, RecordError
from parflow.model import START, Chunk, ChunkJob, MergeJob, Piece, Receipt, Ref, Rejected, chunk_id, digest
from parflow.runtime.code import dumps
from parflow.runtime.instances import Instances
from parflow.runtime.marker import WORDS
from parflow.runtime.pipeline import Broken, Context, run_merge, run_piece

FAN_IN = 16
"""Partial results that one merge takes."""
INSTANCES = Instances(shared=True)
"""What class tasks built in this process, by the name of the computation."""


@dataclass
class MemoryStore:
    """A store that is a dict and travels with its task."""

    objects: dict[str, bytes] = field(default_factory=dict)
    url: str = "memory"

    def put(self, name: str, data: bytes) -> str:
        """Keep bytes under a name."""
        self.objects[name] = data
        return name

    def get(self, key: str) -> bytes:
        """Return the bytes of a key."""
        return self.objects[key]

    def get_checked(self, ref: Ref) -> bytes:
        """Return the bytes of a reference; here they are always at hand."""
        assert ref.inline is not None
        return ref.inline


def _context(run_id: str, name: str, store: MemoryStore) -> Context:
    return Context(run_id, name, store, [0] * WORDS, inline_bytes=2**62)


def plain_chunk(stage: Stage, chunk: Chunk, store: MemoryStore, run_id: str) -> Receipt:
    """Run a whole chunk in this thread; the first dead letter raises."""
    job = ChunkJob(0, Piece(chunk.index, START), chunk)
    name = f"plain-{chunk.index:06d}"
    try:
        stage = INSTANCES.ready(stage, run_id, run_id)
        receipt = run_piece(stage, job, _context(run_id, name, store), (None,) * (1 + len(stage.steps) + len(stage.outputs)))
    except Broken as broken:
        raise broken.error from None
    if receipt.failure is not None:
        failure = receipt.failure
        raise RecordError(f"{failure.record}: step {failure.step}: {failure.error}: {failure.message}\n{failure.traceback}")
    return receipt


def plain_merge(stage: Stage, output: int, last: bool, partials: list[Any]) -> Any:
    """Merge partial results: receipts of chunks, or what merges returned; the last one returns the value."""
    refs = [part.results[output] if isinstance(part, Receipt) else part for part in partials]
    job = MergeJob(0, output, 0, 0, tuple(ref for ref in refs if ref is not None), last)
    try:
        result = run_merge(stage, job, _context("plain", "merge", MemoryStore())).results[0]
    except Broken as broken:
        raise broken.error from None
    assert result is not None
    assert result.inline is not None
    return pickle.loads(result.inline) if last else result


def plain_records(output: int, receipt: Receipt) -> list[Any]:
    """Return the records that a chunk kept."""
    ref = receipt.results[output]
    assert ref is not None
    assert ref.inline is not None
    return list(unpickle_all(ref.inline))


def plain_publish(stage: Stage, output: int, run_id: str, receipts: list[Receipt]) -> Any:
    """Move a sink's files to their final names."""
    files = [file for receipt in receipts for file in receipt.files if file.output == output]
    return stage.outputs[output].body.publish(run_id, files)


def unpickle_all(data: bytes) -> Iterator[Any]:
    """Yield the objects pickled one after the other into bytes."""
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        yield pickle.load(stream)


def _name(stage: Stage, chunks: list[Chunk]) -> str:
    """Name a computation: Dask takes two of one name for one, so the name covers all that a pickle of the code does."""
    try:
        code = digest(dumps(stage))
    except Exception:  # noqa: BLE001 - code that can't travel runs on threads all the same, under a name of its own
        code = secrets.token_hex(16)
    return digest("".join([code, *stage.facts().fingerprints, chunk_id(p for c in chunks for p in c.parts)]).encode())[:16]


def plain_graph(plan: Plan, target: int) -> tuple[dict[Any, Any], list[Any]]:
    """Build the graph of one requested output.

    Parameters
    ----------
    plan : Plan
        A plan; its source is listed here.
    target : int
        Which of its targets.

    Returns
    -------
    dict, list
        The graph, with explicit keys, and the output keys: one for a value or a sink, one a chunk for records.

    Raises
    ------
    InputError
        When an input can't be used: plain Dask has no dead letters.
    """
    from dask._task_spec import List, Task, TaskRef

    number, output = plan.targets[target]
    stage = plan.stages[number]
    kind = stage.outputs[output].kind
    listing = MemoryStore()
    chunks: list[Chunk] = []
    for item in stage.source.chunks(listing):
        if isinstance(item, Rejected):
            raise InputError(f"{item.path}: {item.message}")
        chunks.append(item)
    name = _name(stage, chunks)
    graph: dict[Any, Any] = {}
    level: list[Any] = []
    for chunk in chunks:
        key = (f"parflow-chunk-{name}", chunk.index)
        store = MemoryStore({part.path: listing.objects[part.path] for part in chunk.parts if part.path in listing.objects})
        graph[key] = Task(key, plain_chunk, stage, chunk, store, name)
        level.append(key)
    if kind == "collect":
        keys = [(f"parflow-records-{name}-{output}", index) for index in range(len(level))]
        graph.update({key: Task(key, plain_records, output, TaskRef(chunk)) for key, chunk in zip(keys, level, strict=True)})
        if not keys:
            keys = [(f"parflow-records-{name}-{output}", 0)]
            graph[keys[0]] = Task(keys[0], list)
        return graph, keys
    if kind == "sink":
        key = (f"parflow-publish-{name}", output)
        graph[key] = Task(key, plain_publish, stage, output, name, List(*map(TaskRef, level)))
        return graph, [key]
    depth = 0
    while True:
        depth += 1
        groups = [level[first : first + FAN_IN] for first in range(0, len(level), FAN_IN)] or [[]]
        last = len(groups) == 1
        level = [(f"parflow-merge-{name}-{output}", depth, index) for index in range(len(groups))]
        for key, group in zip(level, groups, strict=True):
            graph[key] = Task(key, plain_merge, stage, output, last, List(*map(TaskRef, group)))
        if last:
            return graph, level


def concatenate(results: Iterable[Iterable[Any]]) -> list[Any]:
    """Put the records of chunks together."""
    return [record for records in results for record in records]


def gathered(graph: dict[Any, Any], keys: list[Any]) -> tuple[dict[Any, Any], Any]:
    """Add to the graph of a dataset the one key of all its records; returns the graph and that key."""
    from dask._task_spec import List, Task, TaskRef

    last = f"parflow-all-{keys[0][0]}"
    return {**graph, last: Task(last, concatenate, List(*map(TaskRef, keys)))}, last

"""A plan as one plain Dask graph: stage by chunk, a merge tree a reduction, call by call. Builds, never computes.

Run this way a workflow is ordinary Dask, in memory: no journal, no store, no isolation; the first record that fails raises.
`.run()` sends the same functions chunk by chunk instead, and adds all that. What only shows at run time (the branch that is
chosen, a graph that a task returns) runs within the key that it belongs to.
"""

from __future__ import annotations

import operator
import pickle
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parflow.core.bindings import Binding
from parflow.core.plan import Plan, Stage
from parflow.errors import GraphError, InputError, RecordError
from parflow.model import (
    START,
    Address,
    Chunk,
    ChunkJob,
    MergeJob,
    Outcome,
    Part,
    Piece,
    Receipt,
    Ref,
    Rejected,
    chunk_id,
    digest,
)
from parflow.nodes import Arguments, Task
from parflow.runtime.calls import graph_in, invoke, parts_of
from parflow.runtime.code import dumps
from parflow.runtime.instances import Instances
from parflow.runtime.marker import WORDS
from parflow.runtime.pipeline import Broken, Context, describe, run_merge, run_piece
from parflow.runtime.values import unpickle_all

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


def plain_chunk(stage: Stage, chunk: Chunk, store: MemoryStore, run_id: str, values: list[Any]) -> Receipt:
    """Run a whole chunk in this thread, given the values that its stage needs; the first dead letter raises."""
    job = ChunkJob(0, Piece(chunk.index, START), chunk)
    name = f"plain-{chunk.index:06d}"
    bindings = {address: Binding("data", data=value) for address, value in zip(stage.needs, values, strict=True)}
    try:
        stage = INSTANCES.ready(stage, run_id, run_id, bindings, store)
        receipt = run_piece(stage, job, _context(run_id, name, store), (None,) * (1 + len(stage.steps) + len(stage.outputs)))
    except Broken as broken:
        raise broken.error from None
    if receipt.failure is not None:
        failure = receipt.failure
        raise RecordError(f"{failure.record}: step {failure.step}: {failure.error}: {failure.message}\n{failure.traceback}")
    return receipt


def plain_stored(stage: Stage, index: int, kept: Any, run_id: str, values: list[Any]) -> Receipt:
    """Run a stage on what a chunk, or a bucket, of another one kept."""
    part = Part(f"{stage.source.name}[{index}]", 0, None, kept.size, kept.digest, kept.inline)
    chunk = Chunk(index, chunk_id((part,)), (part,) if kept.size else (), kept.size)
    return plain_chunk(stage, chunk, MemoryStore(), run_id, values)


def plain_items(stage: Stage, run_id: str, values: list[Any]) -> Receipt:
    """Run a stage on all items of the list that is the first of its values: how many only shows now."""
    store = MemoryStore()
    chunks = [*stage.source.of(values[0]).chunks(store)]
    parts = tuple(part for chunk in chunks for part in chunk.parts)
    return plain_chunk(stage, Chunk(0, "", parts, 0), store, run_id, values)


def plain_merge(stage: Stage, output: int, level: int, bucket: int, last: bool, partials: list[Any]) -> Any:
    """Merge partial results: receipts of chunks, or what merges returned; the last one returns the value."""
    refs = [part.results[output] if isinstance(part, Receipt) else part for part in partials]
    job = MergeJob(0, output, level, 0, tuple(ref for ref in refs if ref is not None), last, bucket)
    try:
        result = run_merge(stage, job, _context("plain", "merge", MemoryStore())).results[0]
    except Broken as broken:
        raise broken.error from None
    assert result is not None
    return pickle.loads(result.inline or b"") if last and stage.outputs[output].kind == "reduce" else result


def plain_kept(output: int, receipt: Receipt) -> Any:
    """Return where what a chunk kept is."""
    return receipt.results[output]


def plain_records(output: int, kept: Any) -> list[Any]:
    """Open the records that a chunk, or a bucket, kept."""
    ref: Any = kept.results[output] if isinstance(kept, Receipt) else kept
    return list(unpickle_all(ref.inline))


def plain_publish(stage: Stage, output: int, run_id: str, receipts: list[Receipt]) -> Any:
    """Move a sink's files to their final names."""
    files = [file for receipt in receipts for file in receipt.files if file.output == output]
    return stage.outputs[output].body.publish(run_id, files)


# --- calls and decisions -------------------------------------------------------------------------------------------------


def plain_call(task: Task, arguments: Arguments, results: int, run_id: str, values: Sequence[Any]) -> Any:
    """Make a call in this thread; a lazy graph that it returns is computed in its place.

    Raises
    ------
    GraphError
        When it returns something lazy where nobody looks for it.
    """
    before: Any = None
    while True:
        try:
            built = INSTANCES.task(task, run_id, f"{run_id}/{task.name}")
        except Broken as broken:
            raise broken.error from None
        args, kwargs = arguments.filled(values)
        made = invoke(built, args, kwargs)
        plan = graph_in(made, results)
        if plan is None:
            return tuple(parts_of(task.name, made, results)) if results > 1 else made
        if made is before:
            raise GraphError(
                f"a task returned a {type(made).__name__} with something lazy in it, which would stay lazy: lazy values are "
                "found in lists, tuples and dicts, and not in classes of one's own made of these."
            )
        before, last = made, _last_call(plan)
        if last is None or results > 1:
            graph, key = whole_graph(plan)
            got = get_sync_of(graph, key)
            return tuple(got) if results > 1 else got[0]
        builder = _Builder(plan, {})  # a loop's next turn: made here, since one within the other they would go too deep
        task, arguments = plan.tasks[plan.calls[last].facts.task], plan.calls[last].arguments
        needs = builder.needs(last)
        run_id, values = builder.call_name(last, needs), get_sync_of(builder.finish(), needs)


def _last_call(plan: Plan) -> int | None:
    """Return the number of the call that is all that a plan is for, if that's a call of one result."""
    (node, _), *more = plan.targets
    if more or node >= 0:
        return None
    facts = plan.calls[~node].facts
    return ~node if facts.kind == "call" and facts.results == 1 else None


Arm = tuple[dict[Any, Any], Any]
"""A branch: its graph, without what it shares with the whole, and its last key."""


def plain_choose(task: Task, arguments: Arguments, arms: list[Arm], shared: dict[Any, Any], values: list[Any]) -> Any:
    """Compute the branch that is chosen."""
    args, kwargs = arguments.filled(values)
    return _compute(arms[task.function(*args, **kwargs)], shared)


def plain_decide(kind: str, count: int, arms: list[Arm], shared: dict[Any, Any]) -> Any:
    """Compute branches, one after the other, until it's decided."""
    outcomes: list[Outcome] = []
    for arm in arms:
        try:
            outcomes.append(Outcome(_compute(arm, shared)))
        except Exception as error:  # noqa: BLE001 - whatever a branch raises is its outcome
            outcomes.append(Outcome(failure=describe(error, record="", step=kind, cause="exception")))
            last = error
        won = [outcome.value for outcome in outcomes if outcome.ok]
        if kind != "settle" and len(won) == count:
            return won[0] if kind == "race" else won
    if kind == "settle":
        return outcomes
    raise last


def _compute(arm: Arm, shared: dict[Any, Any]) -> Any:
    from dask._task_spec import DataNode

    graph, key = arm
    return get_sync_of({**graph, **{name: DataNode(name, value) for name, value in shared.items()}}, key)


def get_sync_of(graph: dict[Any, Any], key: Any) -> Any:
    """Compute one key in this thread."""
    from dask.local import get_sync

    return get_sync(graph, key)


# --- building --------------------------------------------------------------------------------------------------------------


def whole_graph(plan: Plan) -> tuple[dict[Any, Any], Any]:
    """Build the graph of all that a plan is asked for; returns it and the key of the list of results."""
    from dask._task_spec import List, Task, TaskRef

    builder = _Builder(plan, {})
    keys = [builder.value(address) for address in plan.targets]
    last = f"parflow-results-{digest(repr(keys).encode())[:16]}"
    return {**builder.finish(), last: Task(last, list, List(*map(TaskRef, keys)))}, last


def plain_graph(plan: Plan, target: int) -> tuple[dict[Any, Any], list[Any]]:
    """Build the graph of one requested output.

    Parameters
    ----------
    plan : Plan
        A plan; its sources are listed here.
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
    builder = _Builder(plan, {})
    number, output = plan.targets[target]
    if number >= 0 and plan.stages[number].outputs[output].kind in ("collect", "group"):
        keys = builder.records(number, output)
    else:
        keys = [builder.value((number, output))]
    return builder.finish(), keys


class _Builder:
    """Builds keys for what is asked of it, each once.

    ``outer`` has the keys that are computed elsewhere: a branch takes their values from there. ``named`` says how many calls
    have which name there.
    """

    def __init__(self, plan: Plan, outer: dict[Address, Any], named: Mapping[str, int] | None = None) -> None:
        self.plan = plan
        self.graph: dict[Any, Any] = {}
        self.outer = outer
        self.shared: set[Any] = set()
        self.values: dict[Address, Any] = {}
        self.chunks: dict[int, list[Any]] = {}
        self.names: dict[int, str] = {}
        self.calls: dict[int, Any] = {}
        self.named: dict[str, int] = dict(named or {})
        self.listings: dict[int, tuple[list[Chunk], MemoryStore]] = {}
        self.undecided: list[tuple[Any, int, list[Any]]] = []

    def add(self, key: Any, function: Any, *args: Any) -> Any:
        from dask._task_spec import Task

        self.graph[key] = Task(key, function, *args)
        return key

    def refs(self, keys: Iterable[Any]) -> Any:
        from dask._task_spec import List, TaskRef

        return List(*map(TaskRef, keys))

    def value(self, address: Address) -> Any:
        """Return the key whose result is the value at an address."""
        if address in self.outer:
            self.shared.add(self.outer[address])
            return self.outer[address]
        if address not in self.values:
            for node in self._before(address[0]):  # what a long chain rests on, first: no deep recursion
                self.stage(node) if node >= 0 else self._call(~node)
            self.values[address] = self._value(address)
        return self.values[address]

    def _before(self, node: int) -> list[int]:
        """Return the nodes that one rests on and that have no keys yet, and itself: each after what it rests on."""
        done: dict[int, None] = {}
        stack: list[tuple[int, Iterator[int]]] = [(node, self._rests_on(node))]
        while stack:
            node, rest = stack[-1]
            for other in rest:
                if other not in done and other not in self.chunks and ~other not in self.calls:
                    stack.append((other, self._rests_on(other)))
                    break
            else:
                done[node] = None
                stack.pop()
        return [*done]

    def _rests_on(self, node: int) -> Iterator[int]:
        if node < 0:
            needs = self.plan.calls[~node].facts.needs
        else:
            stage = self.plan.stages[node]
            needs = stage.needs
            if stage.base is not None and stage.base[1] >= 0:
                yield stage.base[0]
        yield from (address[0] for address in needs if address not in self.outer)

    def _value(self, address: Address) -> Any:
        from dask._task_spec import TaskRef

        node, item = address
        if node < 0:
            key = self._call(~node)
            many = self.plan.calls[~node].facts.results > 1
            return self.add((f"{key}-item", item), operator.getitem, TaskRef(key), item) if many else key
        stage = self.plan.stages[node]
        match stage.outputs[item].kind:
            case "collect" | "group":
                keys = self.records(node, item)
                return self.add(f"{keys[0][0]}-all", concatenate, self.refs(keys))
            case "sink":
                key = (f"parflow-publish-{self.name(node)}", item)
                return self.add(key, plain_publish, stage, item, self.name(node), self.refs(self.stage(node)))
            case _:
                return self.merged(node, item, 0)

    # --- stages ---------------------------------------------------------------------------------------------------------

    def stage(self, number: int) -> list[Any]:
        """Return the keys of a stage's chunks: their results are receipts."""
        if number not in self.chunks:
            self.chunks[number] = [*self._chunks(number)]
        return self.chunks[number]

    def _chunks(self, number: int) -> Iterator[Any]:
        from dask._task_spec import TaskRef

        stage = self.plan.stages[number]
        needs = self.refs([self.value(address) for address in stage.needs])
        if stage.base is not None and stage.base[1] >= 0:
            kept = self.kept(*stage.base)
            for index, key in enumerate(kept):
                name = (f"parflow-chunk-{self.name(number)}", index)
                yield self.add(name, plain_stored, stage, index, TaskRef(key), self.name(number), needs)
        elif stage.value is not None:
            yield self.add((f"parflow-chunk-{self.name(number)}", 0), plain_items, stage, self.name(number), needs)
        else:
            chunks, listing = self.listed(number)
            for chunk in chunks:
                key = (f"parflow-chunk-{self.name(number)}", chunk.index)
                store = MemoryStore({p.path: listing.objects[p.path] for p in chunk.parts if p.path in listing.objects})
                yield self.add(key, plain_chunk, stage, chunk, store, self.name(number), needs)

    def listed(self, number: int) -> tuple[list[Chunk], MemoryStore]:
        """List a stage's input, or take what another stage listed."""
        base = self.plan.stages[number].base
        if base is not None:
            return self.listed(base[0])
        if number not in self.listings:
            listing, chunks = MemoryStore(), []
            for item in self.plan.stages[number].source.chunks(listing):
                if isinstance(item, Rejected):
                    raise InputError(f"{item.path}: {item.message}")
                chunks.append(item)
            self.listings[number] = chunks, listing
        return self.listings[number]

    def name(self, number: int) -> str:
        """Name a computation: Dask takes two of one name for one, so the name covers all that a pickle of the code does."""
        if number not in self.names:
            stage = self.plan.stages[number]
            given = [self.value(address) for address in stage.needs]
            if stage.base is not None and stage.base[1] >= 0:
                given += self.kept(*stage.base)
            elif stage.value is None:
                given.append(chunk_id(part for chunk in self.listed(number)[0] for part in chunk.parts))
            self.names[number] = _digest(stage, repr(given), *stage.facts().fingerprints)
        return self.names[number]

    def kept(self, number: int, output: int) -> list[Any]:
        """Return keys that tell where the records of an output are: one a chunk, or a bucket."""
        from dask._task_spec import TaskRef

        stage = self.plan.stages[number].outputs[output]
        if stage.kind == "group":
            return [self.merged(number, output, bucket) for bucket in range(stage.body.buckets)]
        name = f"parflow-kept-{self.name(number)}-{output}"
        keys = [(name, index) for index in range(len(self.stage(number)))]
        for key, chunk in zip(keys, self.stage(number), strict=True):
            if key not in self.graph:
                self.add(key, plain_kept, output, TaskRef(chunk))
        return keys

    def records(self, number: int, output: int) -> list[Any]:
        """Return keys of lists of records, one a chunk or a bucket, in order."""
        from dask._task_spec import TaskRef

        name = f"parflow-records-{self.name(number)}-{output}"
        grouped = self.plan.stages[number].outputs[output].kind == "group"
        kept = self.kept(number, output) if grouped else self.stage(number)
        keys = [(name, index) for index in range(len(kept))]
        for key, ref in zip(keys, kept, strict=True):
            if key not in self.graph:
                self.add(key, plain_records, output, TaskRef(ref))
        return keys or [self.add((name, 0), list)]

    def merged(self, number: int, output: int, bucket: int) -> Any:
        """Return the key of a reduction's last merge: it has the value, or tells where a bucket's rows are."""
        stage, level, depth = self.plan.stages[number], self.stage(number), 0
        name = f"parflow-merge-{self.name(number)}-{output}-{bucket}"
        while True:
            depth += 1
            groups = [level[first : first + FAN_IN] for first in range(0, len(level), FAN_IN)] or [[]]
            last = len(groups) == 1
            level = [(name, depth, index) for index in range(len(groups))]
            for key, group in zip(level, groups, strict=True):
                if key not in self.graph:
                    self.add(key, plain_merge, stage, output, depth, bucket, last, self.refs(group))
            if last:
                return level[0]

    # --- calls ----------------------------------------------------------------------------------------------------------

    def _call(self, number: int) -> Any:
        if number in self.calls:
            return self.calls[number]
        call = self.plan.calls[number]
        facts, needs = call.facts, self.needs(number)
        name = self.call_name(number, needs)
        key = self.calls[number] = f"parflow-{call.name}-{name}"
        if facts.kind == "call":
            return self.add(key, plain_call, self.plan.tasks[facts.task], call.arguments, facts.results, name, self.refs(needs))
        self.undecided.append((key, number, needs))
        self.graph[key] = None  # until it's known what its branches share with the whole
        return key

    def needs(self, number: int) -> list[Any]:
        """Return the keys of what a call is given."""
        return [self.values.get(address) or self.value(address) for address in self.plan.calls[number].facts.needs]

    def call_name(self, number: int, needs: list[Any]) -> str:
        """Name a call by what it does; the second one of the same name is another one all the same."""
        call = self.plan.calls[number]
        facts = call.facts
        task = self.plan.tasks[facts.task] if facts.task >= 0 else None
        name = _digest((task, call.arguments), repr(needs), facts.kind, repr(facts.arms) if facts.arms else "")
        count = self.named[name] = self.named.get(name, 0) + 1
        return name if count == 1 else f"{name}-{count}"

    def finish(self) -> dict[Any, Any]:
        """Build the branches of decisions, and return the graph."""
        from dask._task_spec import Dict, TaskRef

        known = {**self.outer, **self.values}
        for key, number, needs in self.undecided:
            call = self.plan.calls[number]
            arms, shared = [], set()
            for address in call.facts.arms:
                branch = _Builder(self.plan, known, self.named)
                last = branch.value(address)
                arms.append((branch.finish(), last))
                shared |= branch.shared
            given = Dict({name: TaskRef(name) for name in shared})
            self.shared |= shared & set(self.outer.values())
            arms = _opaque(arms)
            if call.facts.kind == "choose":
                task = self.plan.tasks[call.facts.task]
                self.add(key, plain_choose, task, call.arguments, arms, given, self.refs(needs))
            else:
                self.add(key, plain_decide, call.facts.kind, call.facts.count, arms, given)
        return self.graph


class _Opaque(list[Any]):
    """A list in which Dask doesn't look for keys."""


def _opaque(arms: list[Arm]) -> Any:
    from dask._task_spec import DataNode

    return DataNode(None, _Opaque(arms))


def _digest(code: Any, *more: str) -> str:
    """Name what is computed: code that can't travel runs on threads all the same, under a name of its own."""
    try:
        own = digest(dumps(code))
    except Exception:  # noqa: BLE001 - any refusal is one
        own = secrets.token_hex(16)
    return digest("\0".join([own, *more]).encode("utf-8", "surrogatepass"))[:16]


def concatenate(results: Iterable[Iterable[Any]]) -> list[Any]:
    """Put the records of chunks together."""
    return [record for records in results for record in records]


def gathered(graph: dict[Any, Any], keys: list[Any]) -> tuple[dict[Any, Any], Any]:
    """Add to the graph of a dataset the one key of all its records; returns the graph and that key."""
    from dask._task_spec import List, Task, TaskRef

    last = f"parflow-all-{keys[0][0]}"
    return {**graph, last: Task(last, concatenate, List(*map(TaskRef, keys)))}, last

"""Make a call of a task on values."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from parflow.core.bindings import Binding
from parflow.core.forms import is_async
from parflow.core.plan import Plan
from parflow.errors import RecordMemoryError
from parflow.model import CallKind, Cause, Chunk, Cursor, Failure, Receipt, Ref, Tally, quick
from parflow.nodes import Arguments, Task, is_plain
from parflow.runtime.attempts import Unproven, Watch, policies, tried
from parflow.runtime.marker import CALL, CLOSING, STEP, put
from parflow.runtime.once import call_once
from parflow.runtime.pipeline import Context, describe, keep_bytes, preview, trace_of
from parflow.runtime.prints import PRINTS
from parflow.runtime.program import grown
from parflow.runtime.values import filled, pickled
from parflow.storage.sources.items import ItemsSource


@quick
@dataclass(frozen=True, slots=True)
class Given:
    """What a call is made with: its pickled `Arguments`, where the values are that it needs, and what it gives."""

    arguments: Ref
    bindings: tuple[Binding, ...]
    kind: CallKind
    results: int


def pack_arguments(arguments: Arguments) -> bytes:
    """Pickle arguments for a call; plain data in the quick way, all else with the code that other processes lack."""
    if is_plain(arguments.args) and is_plain(arguments.kwargs):
        return pickle.dumps(arguments, protocol=5)
    from parflow.runtime.code import dumps

    return dumps(arguments)


def run_call(task: Task, given: Given, context: Context, earlier: int = 0) -> Receipt:
    """Make one call, and keep what it gives.

    Parameters
    ----------
    task : Task
        What to call; built, if it's a class.
    given : Given
        With what.
    context : Context
        Store, names and marker; whoever watches the marker enforces the task's timeout.
    earlier : int
        Attempts at it that ended a child.

    Returns
    -------
    Receipt
        ``done``: with results, a choice, a lazy graph that is to run in the call's place, or the failure. ``died``: out of
        memory.
    """
    started, clock = time.time(), time.perf_counter()
    marker = context.marker
    put(marker, (0, 0, 0, 0))
    made: dict[str, Any] = {}
    args: Sequence[Any] = ()
    watch = Watch(context.windows)
    try:
        arguments = pickle.loads(context.store.get_checked(given.arguments))
        args, kwargs = filled(arguments, given.bindings, context.store)
        marker[CALL] += 1
        marker[STEP] = 1
        attempts = policies(task, 1, marker, watch, context.terms, earlier)

        def call(_: Any) -> Any:
            return call_once(task, lambda: invoke(task, args, kwargs))

        result = call(None) if attempts is None else attempts.around(call)(None)
        if given.kind == "choose":
            made["choice"] = int(result)
        else:
            made.update(_kept(task.name, result, given.results, context))
    except MemoryError as error:
        failure = _failure(task, RecordMemoryError(), "memory", args, error)
        return Receipt("died", Cursor(), failure=failure, tally=Tally(seconds=time.perf_counter() - clock), started=started)
    except Unproven:
        made = {"status": "stopped", "cursor": Cursor()}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
        made = {"failure": _failure(task, error, "exception", args, error)}
    spent = Tally(seconds=time.perf_counter() - clock)
    return Receipt(**{"status": "done"} | made, tally=spent, started=started, steps=watch.steps, tripped=watch.tripped)


def invoke(task: Task, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a task's function, and wait for it if it's async."""
    if not is_async(task.function):
        return task.function(*args, **kwargs)
    from parflow.runtime.flights import LOOP

    return LOOP.complete(lambda: task.function(*args, **kwargs))


def parts_of(name: str, result: Any, results: int) -> Iterable[Any]:
    """Return the results of a call one by one."""
    if results == 1:
        return (result,)
    gave = f"a {type(result).__qualname__}"
    if isinstance(result, (tuple, list)):
        if len(result) == results:
            return result
        gave = f"{len(result)}"
    raise TypeError(f"task {name!r} has outputs={results}, so it returns a tuple of {results} results, not {gave}")


def _kept(name: str, result: Any, results: int, context: Context) -> dict[str, Any]:
    """Keep what a call returned: its results or, since nothing lazy can be pickled, the lazy graph among them."""
    try:
        parts = [pickled(part) for part in parts_of(name, result, results)]
    except Exception:
        plan = graph_in(result, results)
        if plan is None:
            raise
        return {"growth": grown(context.store, _with_items(plan, context))}
    context.marker[STEP] = CLOSING
    return {"results": tuple(keep_bytes(data, context.named(number)) for number, data in enumerate(parts))}


def graph_in(result: Any, results: int) -> Plan | None:
    """Return the plan of a lazy graph, if that's what a call returned, alone or in lists, tuples and dicts."""
    lazy = _find(result)
    if lazy is None:
        return None
    plan: Plan = lazy.__parflow_plan__(result, results)
    return plan


@dataclass
class KeptItems(ItemsSource):
    """The items of an iterable that only the process of a call had at hand, kept in the store with the graph they belong to."""

    kept: Ref | None = field(default=None, kw_only=True)

    def check(self) -> None:
        """Do nothing: the items were gone through when they were kept."""

    def chunks(self, store: Any) -> Iterator[Chunk]:
        """Fetch the items, and cut them into chunks."""
        self.iterable = pickle.loads(store.get_checked(self.kept))
        return super().chunks(store)


def _with_items(plan: Plan, context: Context) -> Plan:
    """Return a plan whose iterables travel: another process lists what is in them."""
    from parflow.runtime.code import dumps

    stages = []
    for number, stage in enumerate(plan.stages):
        source = stage.source
        if isinstance(source, ItemsSource) and source.iterable is not None and stage.base is None:
            kept = keep_bytes(dumps([*source.iterable]), context.named(f"items{number}"))
            source = KeptItems(None, chunk_records=source.chunk_records, together=source.together, kept=kept)
        stages.append(replace(stage, source=source))
    return replace(plan, stages=tuple(stages))


def _find(value: Any, above: tuple[int, ...] = ()) -> Any:
    if hasattr(type(value), "__parflow_plan__"):
        return value
    if isinstance(value, (tuple, list, dict)) and id(value) not in above:
        items = value.values() if isinstance(value, dict) else value
        above = (*above, id(value))
        return next((found for item in items if (found := _find(item, above)) is not None), None)
    return None


def _failure(task: Task, error: BaseException, cause: Cause, args: Sequence[Any], where: BaseException) -> Failure:
    shown = ", ".join(preview(item) for item in args[:5])
    known: dict[str, Any] = {"traceback": trace_of(where), "preview": shown[:400], **tried(error), "output": PRINTS.of(0)}
    return describe(error, record="", step=task.name, cause=cause, **known)

"""The lazy graph: tasks, and the nodes that sources, steps, barriers and calls are. Nodes are compared by identity."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from parflow.model import CallKind, Part, quick
from parflow.policies import Breaker, Retry


class Source(Protocol):
    """What a source module gives: it lists inputs in order and reads a part from an offset. Pickles by value."""

    name: str
    splittable: bool

    def check(self) -> None:
        """Raise an InputError when the source can't give a single input."""

    def read(self, part: Part, offset: int, store: Any) -> Iterator[tuple[int, Any]]:
        """Yield ``(offset, raw)`` for each record of the part that begins at or after ``offset``."""

    def decode(self, raw: Any) -> Any:
        """Turn a raw record into what the first step gets."""

    def record_id(self, part: Part, offset: int) -> str:
        """Name a record for a person: file and offset."""

    def size(self, part: Part) -> int:
        """Return the input bytes of a part."""


@dataclass(frozen=True, eq=False)
class Task:
    """A function with policies. Called, it is the plain function.

    Attributes
    ----------
    function : callable
        What to call with a record.
    name : str
        The step's name in plans, dead letters and progress.
    timeout : float, optional
        Seconds that one call may take.
    memory : int, optional
        Bytes that the child process may use.
    version : str
        Part of the fingerprint: change it to say "this is other code".
    outputs : int
        How many results a call of it gives.
    retry : Retry, optional
        What is tried again, how often and when.
    max_failures : float, optional
        How many of the step's records may fail, a count or a share; without it they count among the run's.
    breaker : Breaker, optional
        When the step is held back for a while because it fails.
    limit : int, optional
        How many chunks, or calls, of the step run at once.
    rate : float, optional
        Calls a second, of the whole run.
    resources : dict, optional
        Dask worker resources that a chunk or call of it takes.
    compensate : callable, optional
        Undoes a call, given what it returned.
    in_doubt : {"stop", "retry"}
        What becomes of such a call whose process died: nobody makes it again, or it's made again.
    """

    function: Callable[..., Any]
    name: str
    timeout: float | None = None
    memory: int | None = None
    version: str = ""
    outputs: int = 1
    retry: Retry | None = None
    max_failures: float | None = None
    breaker: Breaker | None = None
    limit: int | None = None
    rate: float | None = None
    resources: dict[str, float] | None = None
    compensate: Callable[[Any], Any] | None = None
    in_doubt: Literal["stop", "retry"] = "stop"

    def __post_init__(self) -> None:
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):  # as functools.wraps does, on a frozen value
            object.__setattr__(self, attribute, getattr(self.function, attribute, None))
        object.__setattr__(self, "__wrapped__", self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain function."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Use:
    """A lazy result that something is given: number ``item`` of what a node gives."""

    node: OutputNode
    item: int = 0


@quick
@dataclass(frozen=True, slots=True)
class Slot:
    """Stands, among arguments, for the lazy result of that number."""

    number: int


@quick
@dataclass(frozen=True, slots=True)
class Arguments:
    """What a function is given beside records: any structure of values, with a `Slot` in the place of each lazy one.

    ``uses`` are the lazy results, in the order of the slots' numbers.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    uses: tuple[Use, ...] = ()

    def filled(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments, with values in the places of their slots."""
        if not self.uses and not values:
            return self.args, self.kwargs

        def put(slot: Slot) -> Any:
            return values[slot.number]

        return replace_in(self.args, (Slot,), put), replace_in(self.kwargs, (Slot,), put)


NO_ARGUMENTS = Arguments()


@dataclass(frozen=True, eq=False)
class SourceNode:
    """Where records come from; ``value`` is the lazy list that they are the items of."""

    source: Any
    value: Use | None = None


@dataclass(frozen=True, eq=False)
class StoredNode:
    """The records that a keyed reduction gives."""

    output: ReduceNode


@dataclass(frozen=True, eq=False)
class StepNode:
    """A record-wise step on the records of ``parent``."""

    kind: Literal["map", "filter", "flat_map"]
    task: Task
    parent: RecordsNode
    arguments: Arguments = NO_ARGUMENTS


RecordsNode = SourceNode | StoredNode | StepNode


@dataclass(frozen=True, eq=False)
class ReduceNode:
    """A barrier: one value made of all records of ``parent``; or, past a ``deadline`` (seconds), of ``at_least`` this share."""

    reducer: Any
    parent: RecordsNode
    name: str
    deadline: float = 0.0
    at_least: float = 1.0


@dataclass(frozen=True, eq=False)
class SinkNode:
    """Records of ``parent`` written to files, one a chunk."""

    sink: Any
    parent: RecordsNode
    name: str


@dataclass(frozen=True, eq=False)
class CollectNode:
    """All records of ``parent``, kept in the store in input order."""

    parent: RecordsNode
    name: str = "collect"


@dataclass(frozen=True, eq=False)
class CallNode:
    """A call of a task on values, or a decision over branches (``arms``)."""

    kind: CallKind
    name: str
    task: Task | None = None
    arguments: Arguments = NO_ARGUMENTS
    arms: tuple[Use, ...] = ()
    count: int = 1
    results: int = 1


OutputNode = ReduceNode | SinkNode | CollectNode | CallNode


def replace_in(value: Any, kinds: tuple[type, ...], put: Callable[[Any], Any]) -> Any:
    """Return a structure of lists, tuples and dicts with what is of one of the ``kinds`` replaced; itself when nothing is."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in kinds:
        return put(value)
    if kind is list or isinstance(value, tuple):
        items = [replace_in(item, kinds, put) for item in value]
        if all(map(operator.is_, items, value)):
            return value
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if kind is dict:
        pairs = {key: replace_in(item, kinds, put) for key, item in value.items()}
        return pairs if any(pairs[key] is not value[key] for key in pairs) else value
    return value


def is_plain(value: Any) -> bool:
    """Tell whether a value is made of numbers, text, bytes, slots, and lists, tuples and dicts of them alone."""
    kind = type(value)
    if kind in _PLAIN or kind is Slot:
        return True
    if kind is list or kind is tuple:
        return all(map(is_plain, value))
    return kind is dict and all(map(is_plain, value)) and all(map(is_plain, value.values()))


_PLAIN = {int, float, str, bytes, bool, type(None)}

"""The frozen values that every layer shares, and their JSON form.

A *task* is a function with policies, a *step* its place in a workflow, a *chunk* a slice of the input, a *record* one
document or what a step made of it, a *cursor* a place inside a chunk. A *job* is what a worker is asked to do, a *receipt*
what it sends back: never data, only where the data is.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import orjson

from parflow.errors import UsageError

T = TypeVar("T")

Address = tuple[int, int]
"""Names a result in a plan: output ``o`` of stage ``s`` is ``(s, o)``, result ``i`` of call ``c`` is ``(~c, i)``.

The first number alone names the node that gives it. ``(s, -1)`` is the list of stage ``s``'s chunks.
"""

INLINE_BYTES = 64 * 1024
"""A result up to this size stands in the receipt and the journal entry, a larger one in the store (bytes)."""


C = TypeVar("C", bound=type)


def quick(cls: C) -> C:
    """Pickle a frozen value by its fields' values, in order: several times as fast as what a dataclass with slots does."""
    names = [field.name for field in dataclasses.fields(cls)]
    take = operator.attrgetter(*names) if len(names) > 1 else None

    def reduce(self: Any) -> tuple[type, tuple[Any, ...]]:
        return cls, take(self) if take is not None else (getattr(self, names[0]),)

    cls.__reduce__ = reduce  # type: ignore[assignment, method-assign]
    return cls


# --- places in the input ---------------------------------------------------------------------------------------------


@quick
@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """A place inside a chunk: before record number ``ordinal``, which begins at ``offset`` of part ``part``.

    ``ordinal`` counts records from the chunk's start, ``part`` indexes ``Chunk.parts``, ``offset`` is in bytes of the
    decompressed file, or the position in a list of items.
    """

    ordinal: int = 0
    part: int = 0
    offset: int = 0


START = Cursor()


@quick
@dataclass(frozen=True, slots=True)
class Part:
    """One slice of one input: the records that begin in ``[start, stop)``.

    ``stop`` is None for "to the end". ``size`` (bytes) and ``stamp`` are the whole file's when it was listed; ``stamp`` is
    opaque and equal as long as the file is unchanged (its modification time in ns, an ETag, a digest). A small input that is
    no file, such as a few Python objects, stands in ``data`` itself.
    """

    path: str
    start: int
    stop: int | None
    size: int
    stamp: str
    data: bytes | None = None


@quick
@dataclass(frozen=True, slots=True)
class Chunk:
    """A slice of a stage's input: what one job reads at the most.

    ``id`` depends on the parts alone. ``index`` is the chunk's place in input order, which merges follow; ``weight``
    (bytes, with an opening cost a file) is what scheduling sorts by.
    """

    index: int
    id: str
    parts: tuple[Part, ...]
    weight: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """An input that listing found unusable; it becomes a dead letter of the step ``read``."""

    path: str
    error: str
    message: str


# --- work and what comes back ----------------------------------------------------------------------------------------


@quick
@dataclass(frozen=True, slots=True)
class Ref:
    """Where a result is: bytes at hand (``inline``), or an object of the store (``key``). ``digest`` is of the bytes."""

    size: int
    digest: str
    inline: bytes | None = None
    key: str | None = None


@quick
@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous part of a chunk that is still to be run.

    Records ``[start.ordinal + skip, stop)``: reading begins at ``start`` and passes over ``skip`` records. ``stop`` None is
    the chunk's end. An ``alone`` piece is one suspect record, run in a fresh child; ``earlier`` are the attempts at it that
    ended a child: the step, and in a line how it ended.
    """

    chunk: int
    start: Cursor = START
    skip: int = 0
    stop: int | None = None
    alone: bool = False
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def first(self) -> int:
        """Ordinal of the first record to run."""
        return self.start.ordinal + self.skip


@quick
@dataclass(frozen=True, slots=True)
class ChunkJob:
    """Run a piece of a chunk through a stage's pipeline; ``redrive`` counts how often what failed there was run again."""

    stage: int
    piece: Piece
    chunk: Chunk
    redrive: int = 0

    @property
    def node(self) -> int:
        """The node of the plan that it works for."""
        return self.stage

    @property
    def alone(self) -> bool:
        """Whether it wants a fresh child to itself."""
        return self.piece.alone


@quick
@dataclass(frozen=True, slots=True)
class MergeJob:
    """Merge partial results, given in chunk order, of one reduction; ``last`` applies the reducer's ``finish``.

    A keyed reduction has a tree of merges for each ``bucket``.
    """

    stage: int
    output: int
    level: int
    index: int
    inputs: tuple[Ref, ...]
    last: bool
    bucket: int = 0
    alone: ClassVar[bool] = False

    @property
    def node(self) -> int:
        """The node of the plan that it works for."""
        return self.stage


@quick
@dataclass(frozen=True, slots=True)
class CallJob:
    """Make a call of a task; an ``alone`` one was in hand when its child ended, and is made again in a fresh one.

    ``earlier`` says in a line each how attempts at it ended that ended a child.
    """

    call: int
    task: int
    alone: bool = False
    earlier: tuple[str, ...] = ()

    @property
    def node(self) -> int:
        """The node of the plan that it works for."""
        return ~self.call


@quick
@dataclass(frozen=True, slots=True)
class UndoJob:
    """Undo what was done outside, the newest first: the ``effects`` named, and those of ``records`` (`record_key`, `call_key`).

    ``unit`` is whose code undoes them: a stage's, or (``~``) a task's.
    """

    unit: int
    records: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()
    alone: ClassVar[bool] = False

    @property
    def node(self) -> int:
        """The unit: what is undone is no longer any node's business."""
        return self.unit


Job = ChunkJob | MergeJob | CallJob | UndoJob

Cause = Literal["exception", "crash", "timeout", "memory", "input"]


@quick
@dataclass(frozen=True, slots=True)
class Failure:
    """A dead letter: one record that failed for good, and why.

    Everything is text, made where it happened: the exception itself never travels. ``bases`` are the qualified names of the
    exception's classes, so that policies can match on names. ``earlier`` says in a line each how earlier attempts ended;
    ``output`` is what the record's code printed. ``chunk``, ``ordinal``, ``part`` and ``offset`` are the record's place.
    """

    record: str
    step: str
    cause: Cause
    error: str
    message: str
    bases: tuple[str, ...] = ()
    traceback: str = ""
    preview: str = ""
    attempts: int = 1
    chunk: int = -1
    ordinal: int = -1
    part: int = -1
    offset: int = -1
    earlier: tuple[str, ...] = ()
    output: str = ""


@quick
@dataclass(frozen=True, slots=True)
class Outcome:
    """How a branch ended, as `settle` gives it: with a ``value``, or with a ``failure``.

    Examples
    --------
    >>> Outcome(3).ok, Outcome(failure=Failure("", "judge", "exception", "ValueError", "no")).ok
    (True, False)
    """

    value: Any = None
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        """Whether the branch succeeded."""
        return self.failure is None


@quick
@dataclass(frozen=True, slots=True)
class SinkFile:
    """One file that a piece wrote for a sink, staged under ``path`` until its stage is complete."""

    output: int
    path: str
    rows: int
    size: int


@quick
@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of a piece: records read, records that became dead letters, input bytes, and seconds of work."""

    records: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.records + other.records,
            self.failed + other.failed,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
        )

    def __sub__(self, other: Tally) -> Tally:
        return self + Tally(-other.records, -other.failed, -other.bytes, -other.seconds)


@quick
@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of one step: dead letters, attempts beyond each first one and, where a breaker asks, calls and bad ones."""

    failed: int = 0
    retries: int = 0
    calls: int = 0
    bad: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.failed + other.failed, self.retries + other.retries, self.calls + other.calls, self.bad + other.bad)

    def __sub__(self, other: Counts) -> Counts:
        return self + Counts(-other.failed, -other.retries, -other.calls, -other.bad)


@quick
@dataclass(frozen=True, slots=True)
class Receipt:
    """What a worker says of one job.

    status
        ``done``: all of it. ``stopped``: up to ``cursor``, the rest is to be queued again. ``died``: the record at ``cursor``
        was in hand when the child ended or ran out of memory, and nothing of the job stands (the failure's cause is ``input``
        when that record was still to be read; no cursor: when results were being written). ``broken``: the step can't run.
    results
        One reference for each output of the stage: a reduction's partial state, a collection's records, or None.
    failures
        The dead letters: a pickled list of `Failure` of ``tally.failed`` items, or None.
    failure
        The first of them; always there when the status is ``died`` or ``broken``, or when a call failed.
    choice
        Of a call that chooses: the number of the branch.
    growth
        Of a call that returned a lazy graph: the graph that now runs in its place.
    steps
        Counts of steps, by name, where there is something to count.
    tripped
        The step whose breaker opened: the piece stopped before its next record.
    """

    status: Literal["done", "stopped", "died", "broken"]
    cursor: Cursor | None = None
    results: tuple[Ref | None, ...] = ()
    files: tuple[SinkFile, ...] = ()
    failures: Ref | None = None
    failure: Failure | None = None
    tally: Tally = Tally()
    encodings: dict[str, int] = field(default_factory=dict)
    slot: str = ""
    started: float = 0.0
    choice: int | None = None
    growth: Growth | None = None
    steps: dict[str, Counts] = field(default_factory=dict)
    tripped: str = ""


# --- what the journal keeps of a plan ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageFacts:
    """A stage: enough to fold, show and check a run without its code.

    needs
        The values that its steps are given.
    base
        Where its chunks come from, when it's not its source: the list of another stage (``(s, -1)``), or what that one's
        pieces kept for an output, a chunk each.
    expands
        Whether its chunks are made of the first value that it needs.
    buckets
        Into how many buckets each output's partial results are split: 1, but for keyed reductions.
    deadlines, enough
        For each output: seconds after which its barrier opens over what is there (0: never), once that is this share of the
        input.
    """

    name: str
    steps: tuple[str, ...]
    outputs: tuple[str, ...]
    kinds: tuple[str, ...]
    fingerprints: tuple[str, ...] = ()
    needs: tuple[Address, ...] = ()
    base: Address | None = None
    buckets: tuple[int, ...] = ()
    deadlines: tuple[float, ...] = ()
    enough: tuple[float, ...] = ()
    expands: bool = False


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What calls call."""

    name: str
    fingerprint: str = ""


CallKind = Literal["call", "choose", "settle", "race", "quorum"]


@quick
@dataclass(frozen=True, slots=True)
class CallFacts:
    """A call, or a decision over branches.

    kind
        ``call``: its task makes its ``results``, given its ``needs``. ``choose``: its task names the one of its ``arms`` whose
        result is its own. ``settle``, ``race`` and ``quorum`` wait for their arms: for all to end in any way, for the first to
        succeed, for the first ``count`` to.
    """

    kind: CallKind = "call"
    task: int = -1
    needs: tuple[Address, ...] = ()
    arms: tuple[Address, ...] = ()
    count: int = 1
    results: int = 1


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """Stages, tasks and calls."""

    stages: tuple[StageFacts, ...] = ()
    tasks: tuple[TaskFacts, ...] = ()
    calls: tuple[CallFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class Growth:
    """A graph that a call returned: what is in it, what it gives (in its own numbers), and where its code is."""

    graph: GraphFacts
    results: tuple[Address, ...]
    code: str


# --- digests and the JSON form -----------------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    """Return the 128-bit BLAKE2 digest of bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def chunk_id(parts: Iterable[Part]) -> str:
    """Return the identity of a chunk: the digest of its parts, whatever else is in the run."""
    text = "\n".join(f"{p.path}\0{p.start}\0{p.stop}\0{p.size}\0{p.stamp}" for p in parts)
    return digest(text.encode("utf-8", "surrogateescape"))


def record_key(stage: int, chunk: Chunk, at: Cursor) -> str:
    """Return the identity of a record within its run, whichever attempt has it in hand; its effects are kept under it."""
    return digest(f"{stage}/{chunk.index}/{chunk.id}/{at.part}/{at.offset}".encode())


def call_key(call: int) -> str:
    """Return the identity of a call within its run."""
    return digest(f"call/{call}".encode())


def make_ref(data: bytes, put: Callable[[bytes], str], limit: int = INLINE_BYTES) -> Ref:
    """Keep small results at hand and hand larger ones to ``put``, which returns their key."""
    if len(data) <= limit:
        return Ref(len(data), digest(data), inline=data)
    return Ref(len(data), digest(data), key=put(data))


def to_json(value: Any) -> Any:
    """Turn a frozen value into what JSON has: dicts (without fields that have their default), lists, text and numbers."""
    kind: Any = type(value)
    return _writer(kind)(value)


def dump_json(value: Any) -> bytes:
    """Write JSON; text that is not Unicode (lone surrogates: odd file names, documents' own text) is escaped, not lost."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value).encode("ascii")


def load_json(data: bytes) -> Any:
    """Read what `dump_json` wrote."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data)


def from_json(kind: type[T], data: Any) -> T:
    """Rebuild a value that `to_json` wrote, of the annotated type ``kind``."""
    return typing.cast("T", _reader(typing.cast("Any", kind))(data))


@functools.cache
def _writer(kind: Any) -> Callable[[Any], Any]:
    if dataclasses.is_dataclass(kind):
        fields = [(f.name, f.default) for f in dataclasses.fields(kind)]
        return lambda value: {
            name: to_json(item) for name, default in fields if (item := getattr(value, name)) is not default and item != default
        }
    if issubclass(kind, bytes):
        return lambda value: base64.b64encode(value).decode("ascii")
    if issubclass(kind, (tuple, list)):
        return lambda value: [to_json(item) for item in value]
    if issubclass(kind, dict):
        return lambda value: {str(key): to_json(item) for key, item in value.items()}
    return lambda value: value


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        make: Any = kind
        readers = {f.name: _reader(hints[f.name]) for f in dataclasses.fields(kind)}
        return lambda data: make(**{name: readers[name](item) for name, item in data.items()})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        (real,) = (arg for arg in args if arg is not type(None))
        inner = _reader(real)
        return lambda data: None if data is None else inner(data)
    if origin is tuple:
        inner = _reader(args[0])
        return lambda data: tuple(inner(item) for item in data)
    if origin is dict and dataclasses.is_dataclass(args[1]):
        within = _reader(typing.cast("Any", args[1]))
        return lambda data: {key: within(item) for key, item in data.items()}
    if kind is bytes:
        return base64.b64decode
    return lambda data: data


# --- words people write ------------------------------------------------------------------------------------------------

_UNITS = {
    "s": {"": 1.0, "ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0},
    "B": {
        "": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
        "k": 2.0**10, "m": 2.0**20, "g": 2.0**30, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40,
    },
}  # fmt: skip


def _quantity(value: float | str, unit: Literal["s", "B"], example: str) -> float:
    given = value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:e-?\d+)?)\s*([a-zA-Z]*)\s*", value)
        scale = _UNITS[unit].get(match[2].lower()) if match else None
        try:
            value = float(match[1]) * scale if match and scale else float("nan")
        except ValueError:
            value = float("nan")
    if not value > 0:
        raise UsageError(f"{given!r} is no amount above zero; write a number of {unit} or, for example, {example!r}")
    return float(value)


def seconds(value: float | str) -> float:
    """Read a duration: seconds, or text such as ``"30s"``, ``"5m"``, ``"1.5h"``.

    >>> seconds("5m")
    300.0
    """
    return _quantity(value, "s", "30s")


def nbytes(value: float | str) -> int:
    """Read a size: bytes, or text such as ``"512MiB"``, ``"2GB"``.

    >>> nbytes("8 MiB")
    8388608
    """
    return int(_quantity(value, "B", "512MiB"))

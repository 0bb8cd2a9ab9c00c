"""Where code finds itself: the run, the step and the record that it works for.

A piece, or a call, is entered once; which record is in hand is asked of the marker only when somebody wants to know, so the
path of a record costs nothing. A coroutine keeps its record's place, since others go on while it waits.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from random import Random
from typing import Any, NamedTuple

from parflow.core.forms import Batched, inner, is_async, within
from parflow.core.plan import Stage, Step
from parflow.errors import UsageError
from parflow.model import CallJob, ChunkJob, Cursor, UndoJob, call_key, digest, record_key
from parflow.runtime.marker import GUESS, ORDINAL, STEP, Marker, Place, take
from parflow.storage.effects import Effect
from parflow.storage.store import Store

TRIES: ContextVar[int] = ContextVar("parflow_tries", default=0)
"""How often this child has tried the call in hand before."""


_NONE = [-1, 0]


class Call(NamedTuple):
    """Which call of which step is in hand: of the record at a place, the ``nth`` (from 0) that a flat_map made of it."""

    step: int
    place: Place
    nth: int


@dataclass(slots=True)
class Site:
    """A piece or a call that is being run, entered once.

    ``code`` is the stage or, of a call, the task; ``unit`` whose code that is; ``began`` when the run began (seconds since
    1970). ``nth`` counts the calls of steps that may have several for a record, by their numbers.
    """

    run_id: str
    began: float
    store: Store
    marker: Marker
    job: ChunkJob | CallJob | UndoJob
    code: Any
    nth: dict[int, list[int]] = field(default_factory=dict)
    asked: set[tuple[str, int]] = field(default_factory=set)

    @property
    def unit(self) -> int:
        """Whose code it runs: a stage's, or (``~``) a task's."""
        match self.job:
            case CallJob(task=task):
                return ~task
            case UndoJob(unit=unit):
                return unit
        return self.job.stage

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1: of the piece's records, or of the call."""
        match self.job:
            case ChunkJob(piece=piece):
                return 1 + len(piece.earlier)
            case CallJob(earlier=earlier):
                return 1 + len(earlier)
        return 1

    def now(self) -> Call:
        """Return what is in hand on this thread."""
        flying = _FLYING.get()
        if flying is not None:
            return flying
        step, place = self.marker[STEP], take(self.marker)
        ordinal, nth = self.nth.get(step, _NONE)
        return Call(step, place, nth if ordinal == place[0] else 0)

    def label(self, step: int) -> str:
        """Name a step."""
        return str(self.code.label(step) if isinstance(self.code, Stage) else self.code.name)

    def record(self, place: Place) -> str:
        """Name the record at a place, for a person."""
        if isinstance(self.job, ChunkJob):
            return str(self.code.source.record_id(self.job.chunk.parts[place[1]], place[2]))
        return ""

    def record_key(self, place: Place) -> str:
        """Return the identity of the record at a place, or of the call, within its run."""
        if isinstance(self.job, ChunkJob):
            return record_key(self.job.stage, self.job.chunk, Cursor(*place[:3]))
        return call_key(self.job.call) if isinstance(self.job, CallJob) else "undo"

    def key(self, call: Call) -> str:
        """Return the idempotency key of a call.

        Raises
        ------
        UsageError
            When it belongs to no record.
        """
        if isinstance(self.job, ChunkJob):
            steps = self.code.steps
            batch = call.step <= len(steps) and isinstance(steps[call.step - 1].task.function, Batched)
            if not 0 < call.step <= len(steps) or batch or call.place[3] & GUESS:
                raise UsageError(
                    f"step {self.label(call.step)!r} has no idempotency key here: it works on many records at once, or on what "
                    "a batch of other size was made of. Ask in a step before, or write pf.once('a key of your own', f, …)."
                )
        return digest(f"{self.run_id}/{self.record_key(call.place)}/{call.step}/{call.nth}".encode())


_main: Site | None = None
"""Where the main thread is: that of a child, whose other threads are those of its tasks."""
_SITE: ContextVar[Site | None] = ContextVar("parflow_site", default=None)
_FLYING: ContextVar[Call | None] = ContextVar("parflow_flying", default=None)


@contextmanager
def entered(site: Site) -> Iterator[None]:
    """Be at a site: what runs meanwhile on this thread, and in the coroutines that it starts, finds itself there."""
    global _main  # noqa: PLW0603 - a process has one main thread
    token, is_main = _SITE.set(site), threading.current_thread() is threading.main_thread()
    _main = site if is_main else _main
    try:
        yield
    finally:
        _SITE.reset(token)
        _main = None if is_main else _main


def site() -> Site | None:
    """Return where this thread is; None outside of a run.

    Raises
    ------
    UsageError
        When a task has started the thread, and the thread doesn't know its record.
    """
    here = _SITE.get()
    if here is None and _main is not None and threading.current_thread() is not threading.main_thread():
        raise UsageError(
            "this thread doesn't know for which record it works: start it with the task's context variables, as in "
            "`pool.submit(contextvars.copy_context().run, f, …)` (`asyncio.to_thread` does so by itself), or ask before that"
        )
    return here


# --- what the steps of a stage have to do for it ------------------------------------------------------------------------


def placed(stage: Stage, here: Site) -> Stage:
    """Return a stage whose steps keep track of what can't be asked of the marker: calls of one record, coroutines."""
    steps = tuple(_placed(stage, number, here) for number in range(1, 1 + len(stage.steps)))
    return stage if all(new is old for new, old in zip(steps, stage.steps, strict=True)) else replace(stage, steps=steps)


def _placed(stage: Stage, number: int, here: Site) -> Step:
    step = stage.steps[number - 1]
    function = step.task.function
    above = [*ancestors(stage, step.parent)]
    many = any(stage.steps[index].kind in ("flat_map", "map_batches") for index in above)
    if isinstance(function, Batched) or not (many or is_async(function)):
        return step
    if is_async(function):
        certain = not any(stage.steps[index].kind == "map_batches" for index in above)
        return with_function(step, within(function, _flying(inner(function), number, here, certain=certain)))
    return with_function(step, _counted(function, number, here))


def with_function(step: Step, function: Callable[..., Any]) -> Step:
    """Return a step that calls another function."""
    return replace(step, task=replace(step.task, function=function))


def ancestors(stage: Stage, index: int) -> Iterator[int]:
    """Yield the index of a step, and those of the steps before it, backwards."""
    while index >= 0:
        yield index
        index = stage.steps[index].parent


def _counted(function: Callable[[Any], Any], number: int, here: Site) -> Callable[[Any], Any]:
    """Count the calls for each record: their order is the same in every attempt."""
    count = _counter(number, here)

    def call(record: Any) -> Any:
        count()
        return function(record)

    return call


def _counter(number: int, here: Site) -> Callable[[], None]:
    """Count one more call of a step for the record in hand, unless it's the same once more."""
    marker, tries, seen = here.marker, TRIES.get, here.nth.setdefault(number, [-1, 0])

    def count() -> None:
        ordinal = marker[ORDINAL]
        if seen[0] != ordinal:
            seen[:] = ordinal, 0
        elif not tries():
            seen[1] += 1

    return count


def _flying(function: Callable[[Any], Any], number: int, here: Site, *, certain: bool) -> Callable[[Any], Any]:
    """Keep with a coroutine which call it is, as the marker has it when it begins."""
    count = _counter(number, here)

    async def call(record: Any) -> Any:
        if _FLYING.get() is None:
            count()
            place = (*take(here.marker)[:3], 0 if certain else GUESS)
            _FLYING.set(Call(number, place, here.nth[number][1]))
        made = function(record)
        return [one async for one in made] if hasattr(made, "__aiter__") else await made

    return call


# --- what users ask for ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inside:
    """The effect in whose function the code is, the idempotency key there, and what it is inside of itself."""

    effect: Effect
    key: str
    outer: Inside | None = None

    def within(self, name: str) -> bool:
        """Tell whether the code is inside of an effect."""
        return self.effect.id == name or (self.outer is not None and self.outer.within(name))


INSIDE: ContextVar[Inside | None] = ContextVar("parflow_inside", default=None)


class Here:
    """Where the code that asks is: its run, step and record.

    Outside of a run, and in plain Dask (``compute``), there is neither run nor record: the names are empty, `idempotency_key`
    is a new one each time, `random` is seeded by chance, `now` is now.

    Attributes
    ----------
    run_id : str
        The run's name.
    step : str
        The step's, or the call's.
    record : str
        The record's name, as in dead letters; empty for a call.
    attempt : int
        Which attempt this is, from 1.
    """

    def __init__(self, at: Site | None) -> None:
        call = at.now() if at is not None else None
        self._site, self._call, self._inside = at, call, INSIDE.get()
        self.run_id = at.run_id if at is not None else ""
        self.step = at.label(call.step) if at is not None and call is not None else ""
        self.step = self._inside.effect.step if self._inside is not None else self.step
        self.attempt = (at.attempt if at is not None else 1) + TRIES.get()

    @property
    def record(self) -> str:
        """The record's name, as in dead letters; empty for a call."""
        if self._inside is not None:
            return self._inside.effect.record
        return self._site.record(self._call.place) if self._site is not None and self._call is not None else ""

    @cached_property
    def idempotency_key(self) -> str:
        """Names this call of the step: the same in every attempt of it, in every resume, and no other call's.

        Within a function that `once` calls, or that is compensated, it is the effect's: another one when it's done anew after
        it was undone.

        Raises
        ------
        UsageError
            Where a step works on many records at once.
        """
        if self._inside is not None:
            return self._inside.key
        if self._site is None or self._call is None:
            return secrets.token_hex(16)
        return self._site.key(self._call)

    @cached_property
    def random(self) -> Random:
        """Chance that falls the same in every attempt: seeded from the idempotency key."""
        return Random(self.idempotency_key) if self._site is not None else Random()  # noqa: S311 - it's no secret

    @property
    def now(self) -> datetime:
        """When the run began, in UTC: every attempt, resume and replay sees the same."""
        return datetime.fromtimestamp(self._site.began, UTC) if self._site is not None else datetime.now(UTC)

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """Writes to stderr, with the record's name; unless the code has set up logging, which then decides."""
        return _Named(_logger(), {"step": self.step, "record": self.record})

    def __repr__(self) -> str:
        return f"Here({self.run_id!r}, {self.step!r}, {self.record!r}, attempt {self.attempt})"


class _Named(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        assert self.extra is not None
        names = " ".join(str(name) for name in self.extra.values() if name)
        return (f"{names}: {msg}" if names else msg), {**kwargs, "extra": {**self.extra, **kwargs.get("extra", {})}}


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what stderr is now: a child redirects it."""

    @property
    def stream(self) -> Any:
        """Where it writes."""
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        """Leave it: it's always the present one."""


def _logger() -> logging.Logger:
    logger = logging.getLogger("parflow.records")
    if not logger.hasHandlers():
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return logger


def context() -> Here:
    """Return where the code that asks is: its run, step and record, with a key, chance and a clock that retries don't change.

    It's asked within a task; in a thread that the task starts itself, only when that got the task's context variables, as
    `asyncio.to_thread` gives them.

    Returns
    -------
    Here
        Of the record in hand now; keep it to have it later.

    Raises
    ------
    UsageError
        In a thread that doesn't know its record.

    Examples
    --------
    >>> import parflow as pf
    >>> def draw(name):
    ...     here = pf.context()
    ...     return name, here.step, here.attempt, here.random.random() < 1
    >>> draw("a plain function")
    ('a plain function', '', 1, True)
    >>> import tempfile
    >>> [*pf.items(["anna"]).map(draw).run(home=tempfile.mkdtemp(), isolation="inline").result()]
    [('anna', 'draw', 1, True)]
    """
    return Here(site())

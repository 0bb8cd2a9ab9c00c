"""What holds for one stage, or for the calls of one task: the policies of its steps, put together."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from parflow.errors import UsageError
from parflow.nodes import Task
from parflow.policies import Breaker, Retry, Tolerance


@dataclass(frozen=True, slots=True)
class Rules:
    """Policies of a unit, by the names of its steps.

    Attributes
    ----------
    retries : mapping
        What is tried again.
    tolerances : mapping
        How many records of a step may fail, for steps that have a tolerance of their own.
    breakers : mapping
        When the unit is held back.
    limit : int, optional
        Batches of it in flight at the most.
    rated : frozenset of str
        Steps whose calls a second are limited.
    resources : mapping
        Dask worker resources that a batch takes.
    compensates : bool
        Whether a step of it can be undone.
    """

    retries: Mapping[str, Retry] = field(default_factory=dict)
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    breakers: Mapping[str, Breaker] = field(default_factory=dict)
    limit: int | None = None
    rated: frozenset[str] = frozenset()
    resources: Mapping[str, float] = field(default_factory=dict)
    compensates: bool = False


FREE = Rules()
RulesOf = Callable[[int], Rules]
"""Gives the rules of a stage (its number) or of a task (``~`` its number)."""


def free(_: int) -> Rules:
    """Give a unit no rules."""
    return FREE


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a run says in the place of its tasks: a retry for steps that have none, and others for steps by name."""

    retry: Retry | None = None
    retries: Mapping[str, Retry] = field(default_factory=dict)

    @classmethod
    def of(cls, retry: Retry | int | Mapping[str, Retry | int] | None) -> Overrides:
        """Read what a person wrote.

        Raises
        ------
        UsageError
            When it's no Retry.
        """
        if isinstance(retry, Mapping):
            return cls(retries={name: _retry(value) for name, value in retry.items()})
        return cls() if retry is None else cls(_retry(retry))

    @classmethod
    def unpack(cls, packed: str) -> Overrides:
        """Open overrides that were pickled, and written as text; none of them, if there is no text."""
        return pickle.loads(base64.b64decode(packed)) if packed else NO_OVERRIDES

    def retry_of(self, task: Task) -> Retry | None:
        """Return what holds for a task."""
        return self.retries.get(task.name) or task.retry or self.retry


def _retry(value: object) -> Retry:
    if isinstance(value, Retry):
        return value
    if isinstance(value, int):
        return Retry(value)
    raise UsageError(f"retry={value!r} is no Retry; write pf.Retry(attempts=3), a number of attempts, or these by step name")


NO_OVERRIDES = Overrides()


def rules_of(tasks: Iterable[Task], overrides: Overrides = NO_OVERRIDES) -> Rules:
    """Put the policies of some steps together.

    Examples
    --------
    >>> rules_of([Task(len, "a", limit=3), Task(str, "b", limit=2, retry=Retry(5))]).limit
    2
    """
    tasks = [*tasks]
    limits = [task.limit for task in tasks if task.limit is not None]
    resources: dict[str, float] = {}
    for task in tasks:
        for name, count in (task.resources or {}).items():
            resources[name] = max(resources.get(name, 0), count)
    rules = Rules(
        {task.name: retry for task in tasks if (retry := overrides.retry_of(task)) is not None},
        {task.name: Tolerance(task.max_failures) for task in tasks if task.max_failures is not None},
        {task.name: task.breaker for task in tasks if task.breaker is not None},
        min(limits, default=None),
        frozenset(task.name for task in tasks if task.rate is not None),
        resources,
        any(task.compensate is not None for task in tasks),
    )
    return FREE if rules == FREE else rules

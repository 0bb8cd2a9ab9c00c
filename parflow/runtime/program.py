"""A run's program: its plan, and where in the store each part's code is; it grows when a call returns a graph."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parflow.core.plan import Call, Plan, Stage
from parflow.core.rules import NO_OVERRIDES, Overrides, Rules, rules_of
from parflow.errors import StoreError
from parflow.model import Growth, digest
from parflow.nodes import Task
from parflow.storage.store import damaged


@dataclass(frozen=True, slots=True)
class Kept:
    """A plan in the store: its key, and those of the code of each stage and each task."""

    key: str
    plan: Plan
    stages: tuple[str, ...]
    tasks: tuple[str, ...]


def keep(store: Any, plan: Plan, shape: Any = None) -> Kept:
    """Pickle a plan into the store, each stage and each task by itself as well.

    Raises
    ------
    CodeError
        Naming the step, and what it uses, that can't travel.
    """
    from parflow.runtime.code import dumps, pack, pack_task, refused_arguments

    stages = tuple(keep_code(store, pack(stage)) for stage in plan.stages)
    tasks = tuple(keep_code(store, pack_task(task)) for task in plan.tasks)
    try:
        whole = dumps((plan, stages, tasks, shape))
    except Exception as error:
        raise refused_arguments(plan, error) from error
    return Kept(keep_code(store, whole), plan, stages, tasks)


def fetch(store: Any, key: str, plan: Plan | None = None) -> Kept:
    """Open a plan that was kept; the same ``plan`` at hand has what a pickle leaves out, such as the items of an iterable."""
    kept, stages, tasks, _ = pickle.loads(read_code(store, key))
    return Kept(key, plan or kept, stages, tasks)


def keep_code(store: Any, data: bytes) -> str:
    """Keep pickled code, and return its key."""
    return str(store.put(_name(data), data))


def read_code(store: Any, key: str) -> bytes:
    """Return pickled code, which is kept under its digest: a damaged constant would give wrong results silently.

    Raises
    ------
    StoreError
        When it is not what was kept.
    """
    data: bytes = store.get(key)
    if key != _name(data):
        raise StoreError(damaged(store.url, key, f"the digest of its {len(data):,} bytes is another one"))
    return data


def _name(data: bytes) -> str:
    return f"code/{digest(data)}.pkl"


def open_plan(store: Any, key: str) -> tuple[Plan, Any]:
    """Return a plan that was kept, and the shape of its results."""
    plan, _, _, shape = pickle.loads(read_code(store, key))
    return plan, shape


def grown(store: Any, plan: Plan) -> Growth:
    """Keep a plan that a call returned, and say what is in it."""
    return Growth(plan.facts(), plan.targets, keep(store, plan).key)


class Program:
    """What runs, numbered as the run's state numbers it.

    Parameters
    ----------
    kept : Kept
        The plan that a run begins with.
    overrides : Overrides
        What the run says in the place of its tasks.
    """

    def __init__(self, kept: Kept, overrides: Overrides = NO_OVERRIDES) -> None:
        self.overrides = overrides
        self._rules: dict[int, Rules] = {}
        self._resources: dict[str, float] | None = None
        self.stages: list[Stage] = []
        self.tasks: list[Task] = []
        self.calls: list[Call] = []
        self._stage_codes: list[str] = []
        self._task_codes: list[str] = []
        self.add(kept)

    def add(self, kept: Kept) -> None:
        """Go on with one more plan."""
        self._resources = None
        self.stages += kept.plan.stages
        self._stage_codes += kept.stages
        self.tasks += kept.plan.tasks
        self._task_codes += kept.tasks
        self.calls += kept.plan.calls

    def rules(self, unit: int) -> Rules:
        """Return the policies of a unit: of a stage's steps, or of a task's calls."""
        if unit not in self._rules:
            tasks = [step.task for step in self.stages[unit].steps] if unit >= 0 else [self.tasks[~unit]]
            self._rules[unit] = rules_of(tasks, self.overrides)
        return self._rules[unit]

    @property
    def resources(self) -> Mapping[str, float]:
        """Dask worker resources that its tasks ask for: of each, the most."""
        if self._resources is None:
            asked = [self.rules(unit).resources for unit in (*range(len(self.stages)), *(~n for n in range(len(self.tasks))))]
            self._resources = {
                name: max(each.get(name, 0.0) for each in asked) for name in sorted({name for each in asked for name in each})
            }
        return self._resources

    def code(self, unit: int) -> str:
        """Return the key of a unit's code: a stage's, or (``~``) a task's."""
        return self._stage_codes[unit] if unit >= 0 else self._task_codes[~unit]

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that its stages need."""
        return tuple(sorted({module for stage in self.stages for module in stage.preload}))

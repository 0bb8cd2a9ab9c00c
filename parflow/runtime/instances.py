"""The objects that class tasks call, built once where they are used and closed at the end."""

from __future__ import annotations

import contextlib
import pickle
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from parflow.core.bindings import Binding
from parflow.core.forms import More, inner, is_async, is_built, within
from parflow.core.plan import Stage, Step
from parflow.errors import CodeError
from parflow.model import Address, digest
from parflow.nodes import Task
from parflow.runtime.pipeline import Broken
from parflow.runtime.values import filled

RUNS = 2
"""Runs whose objects a process keeps: those of an earlier one go when another run comes."""


class Instances:
    """What class tasks built in this process.

    A child has one thread, and so an object of its own. Threads that share a process (``isolation="inline"``, plain Dask)
    share its objects too, and take turns calling them; these are never closed, only forgotten.

    Parameters
    ----------
    shared : bool
        Whether threads share this process.
    """

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared
        self.lock = threading.RLock()
        self.runs: dict[str, dict[Any, Any]] = {}
        self.built: dict[str, list[Any]] = {}

    def ready(self, stage: Stage, run: str, code: str, values: Mapping[Address, Binding], store: Any) -> Stage:
        """Return a stage whose class tasks are built, and whose steps have the values that they need.

        That happens once for each run and code.

        Raises
        ------
        Broken
            When a class can't be built, or a value not be opened, with the reason.
        """
        if not any(step.arguments.args or step.arguments.kwargs or is_built(step.task.function) for step in stage.steps):
            return stage
        given = digest(pickle.dumps(values)) if values else ""  # a loop runs the same code with other values
        with self.lock:
            mine = self._mine(run)
            if (code, given) not in mine:
                tasks = [self._once(mine, (code, place), step.task, run) for place, step in enumerate(stage.steps)]
                steps = tuple(_given(step, task, values, store) for step, task in zip(stage.steps, tasks, strict=True))
                mine[code, given] = replace(stage, steps=steps)
            made: Stage = mine[code, given]
            return made

    def task(self, task: Task, run: str, code: str) -> Task:
        """Return a task that is built, if it's a class; once for each run and code.

        Raises
        ------
        Broken
            When the class can't be built, with the reason.
        """
        if not is_built(task.function):
            return task
        with self.lock:
            return self._once(self._mine(run), code, task, run)

    def _once(self, mine: dict[Any, Any], name: Any, task: Task, run: str) -> Task:
        if name not in mine:
            mine[name] = self._built(task, run)
        made: Task = mine[name]
        return made

    def _mine(self, run: str) -> dict[Any, Any]:
        mine = self.runs[run] = self.runs.pop(run, {})  # the latest one last
        for old in [*self.runs][:-RUNS]:
            self._forget(old)
        return mine

    def close(self) -> None:
        """Close what was built, the latest first."""
        for run in [*self.runs][::-1]:
            self._forget(run)

    def _built(self, task: Task, run: str) -> Task:
        function = task.function
        if not is_built(function):
            return task
        make = inner(function)
        try:
            made = _loop(make) if is_async(function) else make()
        except (Exception, SystemExit) as error:  # whatever its __init__ raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"its object can't be built: {type(error).__name__}: {error} ({last.filename}:{last.lineno}, in {last.name})"
            raise Broken(task.name, CodeError(task.name, what)) from error
        self.built.setdefault(run, []).append(made)
        call = _in_turns(made) if self.shared and not is_async(function) else made
        return replace(task, function=within(function, call))

    def _forget(self, run: str) -> None:
        del self.runs[run]
        built = self.built.pop(run, [])
        while built and not self.shared:
            close = getattr(built.pop(), "close", None)
            if callable(close):
                with contextlib.suppress(Exception):  # its work is done, and kept
                    _loop(close) if is_async(close) else close()


def _given(step: Step, task: Task, values: Mapping[Address, Binding], store: Any) -> Step:
    """Return a step whose function is called with the values that it needs."""
    if not (step.arguments.args or step.arguments.kwargs):
        return replace(step, task=task)
    try:
        args, kwargs = filled(step.arguments, [values[address] for address in step.needs], store)
    except Exception as error:
        what = f"a value that it is given can't be opened: {type(error).__name__}: {error}"
        raise Broken(task.name, CodeError(task.name, what)) from error
    given = More(inner(task.function), args, kwargs)
    return replace(step, task=replace(task, function=within(task.function, given)))


def _in_turns(made: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    def call(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return made(*args, **kwargs)

    return call


def _loop(make: Callable[[], Any]) -> Any:
    """Call in the event loop what belongs to async code: clients of all kinds want it when they are made and closed."""
    from parflow.runtime.flights import LOOP

    return LOOP.complete(make)

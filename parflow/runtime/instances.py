"""The objects that class tasks call, built once where they are used and closed at the end."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from parflow.core.forms import inner, is_async, is_built, within
from parflow.core.plan import Stage, Step
from parflow.errors import CodeError
from parflow.runtime.pipeline import Broken

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
        self.runs: dict[str, dict[str, Stage]] = {}
        self.built: dict[str, list[Any]] = {}

    def ready(self, stage: Stage, run: str, code: str) -> Stage:
        """Return a stage whose class tasks are built, which happens once for each run and code.

        Raises
        ------
        Broken
            When a class can't be built, with the reason.
        """
        if not any(is_built(step.task.function) for step in stage.steps):
            return stage
        with self.lock:
            mine = self.runs[run] = self.runs.pop(run, {})  # the latest one last
            for old in [*self.runs][:-RUNS]:
                self._forget(old)
            if code not in mine:
                mine[code] = replace(stage, steps=tuple(self._step(step, run) for step in stage.steps))
            return mine[code]

    def close(self) -> None:
        """Close what was built, the latest first."""
        for run in [*self.runs][::-1]:
            self._forget(run)

    def _step(self, step: Step, run: str) -> Step:
        function = step.task.function
        if not is_built(function):
            return step
        make = inner(function)
        try:
            made = _loop(make) if is_async(function) else make()
        except (Exception, SystemExit) as error:  # whatever its __init__ raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            what = f"its object can't be built: {type(error).__name__}: {error} ({last.filename}:{last.lineno}, in {last.name})"
            raise Broken(step.task.name, CodeError(step.task.name, what)) from error
        self.built.setdefault(run, []).append(made)
        call = _in_turns(made) if self.shared and not is_async(function) else made
        return replace(step, task=replace(step.task, function=within(function, call)))

    def _forget(self, run: str) -> None:
        del self.runs[run]
        built = self.built.pop(run, [])
        while built and not self.shared:
            close = getattr(built.pop(), "close", None)
            if callable(close):
                with contextlib.suppress(Exception):  # its work is done, and kept
                    _loop(close) if is_async(close) else close()


def _in_turns(made: Callable[[Any], Any]) -> Callable[[Any], Any]:
    lock = threading.Lock()

    def call(record: Any) -> Any:
        with lock:
            return made(record)

    return call


def _loop(make: Callable[[], Any]) -> Any:
    """Call in the event loop what belongs to async code: clients of all kinds want it when they are made and closed."""
    from parflow.runtime.flights import LOOP

    return LOOP.complete(make)

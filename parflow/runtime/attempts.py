"""How a function is called under its task's policies: at its pace, again after a failure, and watched by its breaker.

A function without policies is called as it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

from parflow.core.rules import Overrides
from parflow.errors import EffectInDoubtError, UndoneError
from parflow.model import Counts
from parflow.nodes import Task
from parflow.policies import Retry
from parflow.runtime.here import TRIES
from parflow.runtime.marker import CALL, OFFSET, ORDINAL, STEP, STOP, WAITING, YIELD, Marker

_TRIED = "_parflow_tried"
FINAL = (MemoryError, EffectInDoubtError, UndoneError)
"""What another attempt in the same child can't help."""


class Unproven(BaseException):
    """The record that a breaker let through failed: nothing of it stands, and it is tried again later.

    Not an Exception: no step swallows it.
    """


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a batch runs: what the run says in the place of tasks (pickled), its share of rates, a breaker's probe."""

    overrides: str = ""
    share: float = 1.0
    probe: bool = False

    def retry(self, task: Task) -> Retry | None:
        """Return what of a task is tried again."""
        return _opened(self.overrides).retry_of(task) if self.overrides else task.retry


TERMS = Terms()


@lru_cache(maxsize=8)
def _opened(overrides: str) -> Overrides:
    return Overrides.unpack(overrides)


Windows = dict[str, deque[bool]]


class Watch:
    """What is counted of a piece's steps, for the receipt; ``windows`` are the latest calls, by step, of this process."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows
        self.steps: dict[str, Counts] = {}
        self.tripped = ""

    def count(self, step: str, counts: Counts) -> None:
        """Count more of a step."""
        self.steps[step] = self.steps.get(step, Counts()) + counts


class Attempts:
    """The policies of one step, for as long as one piece runs.

    Parameters
    ----------
    task : Task
        What is called.
    number : int
        The step's number in the marker.
    marker : Marker
        What says which record is in hand; while it waits, no timeout holds.
    watch : Watch
        Where calls are counted.
    terms : Terms
        On what terms.
    earlier : int
        Attempts at the first record that ended a child.
    """

    def __init__(self, task: Task, number: int, marker: Marker, watch: Watch, terms: Terms, earlier: int = 0) -> None:
        self.name = task.name
        self.retry = terms.retry(task)
        self.breaker = task.breaker
        self.number = number
        self.marker = marker
        self.watch = watch
        self.probe = terms.probe and task.breaker is not None
        self.earlier = earlier
        self.interval = 1 / (task.rate * terms.share) if task.rate else 0.0
        self.due = time.monotonic() + self.interval
        self.recent = watch.windows.setdefault(task.name, deque(maxlen=task.breaker.window if task.breaker else 1))

    # --- plain functions -----------------------------------------------------------------------------------------------

    def around(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a function that calls another one under the policies.

        What it raises in the end knows of all attempts (`tried`).
        """
        marker = self.marker

        def call(record: Any) -> Any:
            began, errors = time.monotonic(), list[str]()
            before, self.earlier = self.earlier, 0
            try:
                while True:
                    self._sleep(self._pause())
                    marker[STEP] = self.number
                    marker[CALL] += 1
                    start = time.monotonic()
                    try:
                        made = function(record)
                    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
                        self._sleep(self._failed(error, errors, before, time.monotonic() - began))
                    else:
                        self._saw(self._is_slow(time.monotonic() - start))
                        return made
            finally:
                if errors:
                    TRIES.set(0)

        return call

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.marker[STEP] = WAITING
            time.sleep(seconds)

    # --- coroutines ----------------------------------------------------------------------------------------------------

    async def await_on(self, call: Callable[[], Awaitable[Any]], sleep: Callable[[float], Awaitable[Any]]) -> Any:
        """Await what a function returns under the policies; ``sleep`` waits on the event loop."""
        began, errors = time.monotonic(), list[str]()
        before, self.earlier = self.earlier, 0
        try:
            while True:
                if (pause := self._pause()) > 0:
                    await sleep(pause)
                start = time.monotonic()
                try:
                    made = await call()
                except (Exception, SystemExit) as error:  # noqa: BLE001
                    await sleep(self._failed(error, errors, before, time.monotonic() - began))
                else:
                    self._saw(self._is_slow(time.monotonic() - start))
                    return made
        finally:
            if errors:
                TRIES.set(0)

    # --- deciding ------------------------------------------------------------------------------------------------------

    def _pause(self) -> float:
        """Return the seconds until the next call may begin, and count it."""
        if not self.interval:
            return 0.0
        now = time.monotonic()
        at = max(now, self.due)
        self.due = at + self.interval
        return at - now

    def _is_slow(self, seconds: float) -> bool:
        return self.breaker is not None and self.breaker.slow is not None and seconds > float(self.breaker.slow)

    def _saw(self, bad: bool) -> None:
        if self.breaker is None:
            return
        self.recent.append(bad)
        self.watch.count(self.name, Counts(calls=1, bad=int(bad)))
        if self.breaker.opens(sum(self.recent), len(self.recent)):
            self.watch.tripped = self.name
            self.marker[STOP] = self.marker[STOP] or YIELD
            self.recent.clear()

    def _failed(self, error: BaseException, errors: list[str], before: int, spent: float) -> float:
        """Take note of a failed attempt; returns the seconds before the next one, or raises the error when there is none."""
        self._saw(bad=True)
        if self.probe:
            self.watch.tripped = self.name
            raise Unproven from error
        attempt = before + len(errors) + 1
        delay = None
        if self.retry is not None and not isinstance(error, FINAL) and self.retry.wants(error):
            delay = self.retry.after(attempt, spent, f"{self.name}/{self.marker[ORDINAL]}/{self.marker[OFFSET]}", asked(error))
        if delay is None:
            remember(error, attempt, tuple(errors))
            raise error
        self.watch.count(self.name, Counts(retries=1))
        errors.append(f"{type(error).__qualname__}: {error}"[:200])
        TRIES.set(len(errors))
        return delay


def policies(task: Task, number: int, marker: Marker, watch: Watch, terms: Terms, earlier: int = 0) -> Attempts | None:
    """Return the policies under which a step is called; None for one that has none."""
    if terms.retry(task) is None and task.breaker is None and task.rate is None:
        return None
    return Attempts(task, number, marker, watch, terms, earlier)


def remember(error: BaseException, attempts: int, earlier: tuple[str, ...]) -> None:
    """Let an exception know of the attempts that it ended."""
    if attempts > 1:
        error.__dict__[_TRIED] = (attempts, earlier)


def tried(error: BaseException) -> dict[str, Any]:
    """Return what a dead letter says of the attempts that an exception ended."""
    attempts, earlier = getattr(error, "__dict__", {}).get(_TRIED, (1, ()))
    return {"attempts": attempts, "earlier": earlier}


def asked(error: BaseException) -> float:
    """Return the seconds that a service asked to be left alone for, in an exception; 0 when it didn't.

    It's the exception's ``retry_after``, or the ``Retry-After`` header of its ``response``: seconds, or a date.

    Examples
    --------
    >>> class Busy(Exception):
    ...     retry_after = "1.5"
    >>> asked(Busy()), asked(ValueError())
    (1.5, 0.0)
    """
    try:
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        value = getattr(error, "retry_after", None) or headers.get("Retry-After")
        if value is None:
            return 0.0
        if hasattr(value, "total_seconds"):
            return max(0.0, float(value.total_seconds()))
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except Exception:  # noqa: BLE001 - a stranger's exception may hold anything
        return 0.0

"""Values that answer one decision each. They never sleep, look at a clock or roll dice."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parflow.errors import UsageError
from parflow.model import digest, seconds


@dataclass(frozen=True, slots=True)
class Retry:
    """What is tried again, how often and when.

    Exceptions are tried again in the child that has the record in hand; crashes and records that take too long or too much
    memory in a new one. Workers that vanish cost no attempt.

    Parameters
    ----------
    attempts : int
        How often a record is tried at the most.
    wait : float or str
        Before the second attempt: seconds, or text such as ``"500ms"``.
    factor : float
        Each further wait is so many times the one before; 1 for waits that stay the same.
    cap : float or str
        No wait is longer, unless the service asks for it: an exception that has ``retry_after`` (seconds), or a ``response``
        with a ``Retry-After`` header, is waited for as long as it says.
    jitter : float
        Which part of each wait is left to chance, from 0 to 1, so that many children don't come back at the same moment.
    on : exception class, str, or tuple of them, or callable
        What is tried again: classes, their names (``"TimeoutError"``, ``"requests.exceptions.ConnectionError"``), or a function
        that is given the exception and says whether. A function is asked about exceptions alone: crashes, timeouts and lack of
        memory (`RecordCrashedError`, `RecordTimeoutError`, `RecordMemoryError`) are then not tried again.
    total : float or str, optional
        No attempt begins later than so many seconds after the first one. Of attempts in new children the waits alone count.

    Examples
    --------
    >>> retry = Retry(attempts=4, wait="1s", jitter=0, on=(ConnectionError, TimeoutError))
    >>> [retry.delay(attempt, "") for attempt in (1, 2, 3)]
    [1.0, 2.0, 4.0]
    >>> retry.wants(ConnectionResetError()), retry.wants(ValueError())
    (True, False)
    """

    attempts: int = 3
    wait: float | str = 1.0
    factor: float = 2.0
    cap: float | str = 60.0
    jitter: float = 0.5
    on: Any = (Exception,)
    total: float | str | None = None

    def __post_init__(self) -> None:
        at_least_one("attempts", self.attempts)
        if not self.factor >= 1 or not 0 <= self.jitter <= 1:
            raise UsageError(f"factor={self.factor!r} has to be 1 or more, and jitter={self.jitter!r} from 0 to 1")
        for name in ("wait", "cap", "total"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, 0.0 if value == 0 else seconds(value))
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if all(isinstance(kind, str) or (isinstance(kind, type) and issubclass(kind, BaseException)) for kind in kinds):
            object.__setattr__(self, "on", tuple(kind if isinstance(kind, str) else _name(kind) for kind in kinds))
        elif not callable(self.on):
            raise UsageError(f"on={self.on!r} is no exception class, no name of one, no tuple of these, and no function")

    def wants(self, error: BaseException) -> bool:
        """Tell whether an exception is tried again."""
        return self.names([_name(kind) for kind in type(error).__mro__]) if isinstance(self.on, tuple) else bool(self.on(error))

    def names(self, bases: Sequence[str]) -> bool:
        """Tell whether what has these qualified names of its own and its base classes is tried again."""
        return isinstance(self.on, tuple) and any(
            base == kind or base.rpartition(".")[2] == kind for kind in self.on for base in bases
        )

    def delay(self, attempt: int, key: str, asked: float = 0.0) -> float:
        """Return the seconds to wait after a failed attempt, counted from 1.

        Chance is drawn from ``key``: the same record waits as long each time it is replayed. ``asked`` is what the service
        asked for.
        """
        longest = min(float(self.cap), float(self.wait) * self.factor ** (attempt - 1))
        chance = int(digest(f"{key}/{attempt}".encode())[:8], 16) / 2**32
        return max(longest * (1 - self.jitter * chance), asked)

    def after(self, attempt: int, waited: float, key: str, asked: float = 0.0) -> float | None:
        """Return the seconds to wait after a failed attempt, ``waited`` after the first began; None after the last one."""
        if attempt >= self.attempts:
            return None
        delay = self.delay(attempt, key, asked)
        return None if self.total is not None and waited + delay > float(self.total) else delay


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@dataclass(frozen=True, slots=True)
class Breaker:
    """When a step is held back because it fails: a service that is down is left alone, and no more records are lost to it.

    All children of a run share it. It opens when too many of the step's latest calls failed (attempts count, one by one). While
    it is open nothing of the step runs, and what waits for it is neither lost nor failed; after ``reset`` one record is tried,
    and decides whether the breaker closes or stays open as long again.

    Parameters
    ----------
    failures : float
        Share of the latest calls that failed, above 0 and up to 1.
    window : int
        How many of the latest calls are looked at; with fewer it doesn't open.
    reset : float or str
        Seconds that it stays open.
    slow : float or str, optional
        A call that takes longer counts as failed here (the record does not).

    Examples
    --------
    >>> breaker = Breaker(failures=0.5, window=4, reset="30s")
    >>> breaker.opens(2, 4), breaker.opens(2, 3)
    (True, False)
    """

    failures: float = 0.5
    window: int = 20
    reset: float | str = 30.0
    slow: float | str | None = None

    def __post_init__(self) -> None:
        at_least_one("window", self.window)
        if not 0 < self.failures <= 1:
            raise UsageError(f"failures={self.failures!r} is no share above 0 and up to 1")
        object.__setattr__(self, "reset", seconds(self.reset))
        object.__setattr__(self, "slow", None if self.slow is None else seconds(self.slow))

    def opens(self, failed: int, calls: int) -> bool:
        """Tell whether it opens when so many of so many latest calls failed."""
        return calls >= self.window and failed >= self.failures * calls


def at_least_one(what: str, value: Any) -> int:
    """Return a number of things, at least one.

    Raises
    ------
    UsageError
        When it's none.
    """
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"{what}={value!r} is no number of things; write 1 or more")
    return value


def per_second(rate: float | str) -> float:
    """Read a rate: calls a second, or text such as ``"100/s"``, ``"6000/min"``, ``"5/10s"``.

    >>> per_second("6000/min"), per_second("5/10s"), per_second(2)
    (100.0, 0.5, 2.0)
    """
    value = float("nan")
    if isinstance(rate, str) and (match := re.fullmatch(r"\s*([0-9.]+)\s*/\s*([0-9.]*)\s*([a-z]+)\s*", rate)):
        value = float(match[1]) / seconds(f"{match[2] or 1}{match[3]}")
    elif isinstance(rate, (int, float)):
        value = float(rate)
    if not 0 < value < math.inf:
        raise UsageError(f"rate={rate!r} is no rate; write calls a second (100), or for example '100/s' or '6000/min'")
    return value


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How many dead letters a barrier may open over.

    Parameters
    ----------
    max_failures : float
        A count (an integer), or a share of the records read (a float below 1). 0 tolerates none.

    Examples
    --------
    >>> Tolerance(2).accepts(2, 100), Tolerance(0.01).accepts(2, 100)
    (True, False)
    """

    max_failures: float = 0

    def __post_init__(self) -> None:
        value = self.max_failures
        if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
            raise UsageError(f"max_failures is {value!r}; give a count (0, 1, 2 …) or a share of the records below 1 (0.01)")

    def accepts(self, failed: int, records: int) -> bool:
        """Tell whether ``failed`` of ``records`` may be left out."""
        limit = self.max_failures * records if 0 < self.max_failures < 1 else self.max_failures
        return failed <= limit

    def hopeless(self, failed: int, records: int) -> bool:
        """Tell whether nearly everything fails, so that going on is a waste: at least 200 records, over 95% failed."""
        return records >= 200 and failed > 0.95 * records and not self.accepts(failed, records)


@dataclass(slots=True)
class Batching:
    """How many jobs travel to a worker in one Dask key: enough to hide its cost, few enough to share work evenly.

    The mean of recent job seconds is kept with exponential weights; a batch holds about ``target`` seconds of jobs, and
    never more than its share of what is queued (guided self-scheduling: Polychronopoulos and Kuck, 1987). Once ``known``
    jobs were seen, ``grain`` seconds of them are shared out no further: a key costs as much.
    """

    target: float = 0.25
    grain: float = 0.002
    limit: int = 256
    known: int = 100
    seen: int = 0
    mean: float | None = None

    def saw(self, seconds: float) -> None:
        """Take the duration of one more job."""
        self.seen += 1
        self.mean = seconds if self.mean is None else 0.8 * self.mean + 0.2 * seconds

    def size(self, queued: int, slots: int) -> int:
        """Return how many of the ``queued`` jobs to send at once."""
        if self.mean is None:
            return 1
        mean = max(self.mean, 1e-6)
        share = -(-queued // max(1, 2 * slots))
        if self.seen >= self.known:
            share = max(share, int(self.grain / mean))
        return max(1, min(self.limit, share, int(self.target / mean)))

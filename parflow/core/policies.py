"""Values that answer one decision each. They never sleep, look at a clock or roll dice."""

from __future__ import annotations

import math
from dataclasses import dataclass

from parflow.errors import UsageError


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

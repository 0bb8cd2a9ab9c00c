"""What may be sent to workers now: a queue for each unit of work, and what holds it back (limits, rates, breakers).

A *lane* is what may travel together: chunks of one stage, merges of one, calls of one task, or what undoes these. Only work is
held back: merges run no step, and what is to be undone can't wait.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from parflow.core.rules import FREE, RulesOf
from parflow.core.signals import Bell, Submit
from parflow.model import CallJob, Counts, Job, MergeJob, Receipt, UndoJob
from parflow.policies import Batching, Breaker

Lane = tuple[int, int]
"""A unit, and what of it: `WORK`, `MERGES` or `UNDOING`."""
WORK, MERGES, UNDOING = range(3)
Rank = tuple[int, int, int, int]
"""What goes first within all lanes: the lower one."""


@dataclass(slots=True)
class Gate:
    """A step's breaker as it stands."""

    breaker: Breaker
    state: Literal["closed", "open", "probing"] = "closed"
    probe: str | None = None
    recent: deque[Counts] = field(default_factory=deque)

    def saw(self, counts: Counts) -> bool:
        """Take more calls into the window; tell whether it opens."""
        self.recent.append(counts)
        while sum(c.calls for c in self.recent) - self.recent[0].calls >= self.breaker.window:
            self.recent.popleft()
        return self.breaker.opens(sum(c.bad for c in self.recent), sum(c.calls for c in self.recent))


class Lanes:
    """Queues jobs, and hands out batches of them while there is room.

    Parameters
    ----------
    epoch : int
        The coordinator's, for the names of attempts.
    rules : callable
        Gives the rules of each unit.
    window : int
        Batches in flight for each slot.
    ring : callable
        Called with a bell and seconds when a breaker is to be reset later.
    turned : callable
        Called with a unit, a step and what its breaker has become.
    """

    def __init__(
        self,
        epoch: int,
        rules: RulesOf,
        window: int,
        ring: Callable[[Bell, float], None],
        turned: Callable[[int, str, str], None],
    ) -> None:
        self.epoch = epoch
        self.rules = rules
        self.window = window
        self.ring = ring
        self.turned = turned
        self.slots = 0
        self.solo = False  # undo one after the other
        self.inflight: dict[str, Submit] = {}
        self._heaps: dict[Lane, list[tuple[Rank, int, Job]]] = {}
        self._pushed = 0
        self._attempts = 0
        self._flying: Counter[Lane] = Counter()
        self._batching: defaultdict[Lane, Batching] = defaultdict(Batching)
        self._gates: dict[int, dict[str, Gate]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    # --- in ----------------------------------------------------------------------------------------------------------------

    def push(self, job: Job, rank: Rank) -> None:
        """Queue a job."""
        self._pushed += 1  # a last word where ranks tie, so that jobs themselves are never compared
        heapq.heappush(self._heaps.setdefault(lane_of(job), []), (rank, self._pushed, job))

    def drop(self, unwanted: Callable[[Job], bool]) -> None:
        """Forget queued jobs."""
        for lane, heap in [*self._heaps.items()]:
            kept = [entry for entry in heap if not unwanted(entry[-1])]
            if len(kept) < len(heap):
                heapq.heapify(kept)
                self._heaps[lane] = kept
            if not kept:
                del self._heaps[lane]

    def has(self, kind: int) -> bool:
        """Tell whether something of a kind is queued."""
        return any(lane[1] == kind for lane in self._heaps)

    # --- out ---------------------------------------------------------------------------------------------------------------

    def fill(self, *kinds: int) -> Iterator[Submit]:
        """Yield batches to send now: as many as there are free places, of lanes (of these kinds) that nothing holds back."""
        while len(self.inflight) < self.window * self.slots:
            free = (lane for lane in self._heaps if (not kinds or lane[1] in kinds) and self._is_free(lane))
            first = sorted(free, key=self._first)[:2]
            if not first:
                return
            yield self._take(first[0], self._first(first[1]) if len(first) > 1 else None)

    def _first(self, lane: Lane) -> tuple[int, int, int, int, int, int]:
        (fresh, weight, *rest), pushed, _ = self._heaps[lane][0]
        return fresh, weight, lane[0], rest[0], rest[1], pushed

    def _is_free(self, lane: Lane) -> bool:
        if lane[1] == UNDOING and self.solo:
            return not any(count for other, count in self._flying.items() if other[1] == UNDOING)
        rules = FREE if lane[1] else self.rules(lane[0])
        if rules is FREE:
            return True
        if rules.limit is not None and self._flying[lane] >= rules.limit:
            return False
        if (rules.rated or rules.breakers) and self._flying[lane] >= self.slots:  # nothing waits at a worker
            return False
        if rules.rated and self._spent(rules.rated) + self._share(lane) > 1 + 1e-9:
            return False
        gates = self._gates.get(lane[0], {}).values()
        return all(gate.state == "closed" or (gate.state == "probing" and gate.probe is None) for gate in gates)

    def _spent(self, steps: frozenset[str]) -> float:
        """Return how much of the rates of some steps is in flight, of whichever unit."""
        work = (submit for submit in self.inflight.values() if lane_of(submit.jobs[0])[1] == WORK)
        return sum(submit.share for submit in work if steps & self.rules(submit.unit).rated)

    def _share(self, lane: Lane) -> float:
        """Return the part of a rate for one more batch: all that is queued is to get on evenly."""
        limit = self.rules(lane[0]).limit or self.slots
        return 1 / max(1, min(self.slots, limit, len(self._heaps[lane])))

    def _take(self, lane: Lane, rival: tuple[int, ...] | None) -> Submit:
        """Take a batch out of a lane, as far as nothing of another one goes first."""
        unit, heap = lane[0], self._heaps[lane]
        rules = FREE if lane[1] else self.rules(unit)
        probing = [gate for gate in self._gates.get(unit, {}).values() if gate.state == "probing"] if rules.breakers else []
        size = 1 if probing else self._batching[lane].size(len(self), self.slots)
        share = self._share(lane) if rules.rated else 1.0
        jobs: list[Job] = []
        while heap and len(jobs) < size:
            alone = heap[0][-1].alone
            if alone and jobs:
                break
            jobs.append(heapq.heappop(heap)[-1])
            if alone or (heap and rival is not None and self._first(lane) > rival):
                break
        if not heap:
            del self._heaps[lane]
        self._attempts += 1
        submit = Submit(f"{self.epoch}.{self._attempts}", unit, tuple(jobs), share, bool(probing))
        for gate in probing:
            gate.probe = submit.attempt
        self.inflight[submit.attempt] = submit
        self._flying[lane] += 1
        return submit

    # --- back --------------------------------------------------------------------------------------------------------------

    def back(self, attempt: str) -> Submit | None:
        """Take a batch out of those in flight; None when it's there no more."""
        submit = self.inflight.pop(attempt, None)
        if submit is not None:
            lane = lane_of(submit.jobs[0])
            self._flying[lane] -= 1
            for gate in self._gates.get(submit.unit, {}).values():
                if gate.probe == attempt:
                    gate.probe = None
        return submit

    def saw(self, job: Job, seconds: float) -> None:
        """Take the duration of a job, for the size of later batches."""
        self._batching[lane_of(job)].saw(seconds)

    def judge(self, submit: Submit, receipts: Sequence[Receipt | None]) -> tuple[str, ...]:
        """Let the breakers of a unit see what came back; returns the batches that are to yield, since one has opened."""
        unit = submit.unit
        breakers = self.rules(unit).breakers
        if not breakers or lane_of(submit.jobs[0])[1]:
            return ()
        gates = self._gates.setdefault(unit, {step: Gate(breaker) for step, breaker in breakers.items()})
        opened = False
        for receipt in filter(None, receipts):
            for step, gate in gates.items():
                counts = receipt.steps.get(step, Counts())
                tripped = receipt.tripped == step
                if gate.state == "closed" and (gate.saw(counts) or tripped):
                    opened = True
                    self._open(unit, step, gate)
                elif gate.state == "probing" and submit.probe and (counts.bad or tripped):
                    self._open(unit, step, gate)
                elif gate.state == "probing" and submit.probe and counts.calls:
                    gate.state = "closed"
                    gate.recent.clear()
                    self.turned(unit, step, "closed")
        return tuple(a for a, s in self.inflight.items() if lane_of(s.jobs[0]) == (unit, WORK)) if opened else ()

    def _open(self, unit: int, step: str, gate: Gate) -> None:
        gate.state = "open"
        gate.recent.clear()
        self.turned(unit, step, "open")
        self.ring(("reset", unit, step), float(gate.breaker.reset))

    def reset(self, unit: int, step: str) -> None:
        """Let one record through, some time after a breaker opened."""
        self._gates[unit][step].state = "probing"
        self.turned(unit, step, "probing")


def lane_of(job: Job) -> Lane:
    """Return the lane of a job."""
    match job:
        case CallJob(task=task):
            return ~task, WORK
        case UndoJob(unit=unit):
            return unit, UNDOING
        case MergeJob(stage=stage):
            return stage, MERGES
    return job.stage, WORK

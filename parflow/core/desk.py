"""What every part of a coordinator works at: entries decided and durable, and what is asked for meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from parflow.core.entries import BarrierOpened, ChunksListed, Entry, Merged, PieceEnded
from parflow.core.history import RunState
from parflow.core.signals import Append, Bell, Instruction, Ring


class Desk:
    """Decides entries, and puts off what rests on them until they are durable.

    Parameters
    ----------
    state : RunState
        The run; each entry is applied to it at once.
    """

    def __init__(self, state: RunState) -> None:
        self.state = state
        self._out: list[Instruction] = []
        self._tickets = 0
        self._durable = 0
        self._last: dict[int, int] = {}  # each stage's last ticket
        self._settling: deque[tuple[int, Callable[[], None]]] = deque()

    def _append(self, entry: Entry) -> None:
        self.state.apply(entry)
        self._tickets += 1
        self._out.append(Append(entry, self._tickets))
        if isinstance(entry, (ChunksListed, PieceEnded, Merged, BarrierOpened)):
            self._last[entry.stage] = self._tickets

    def _then(self, act: Callable[[], None]) -> None:
        """Put off what rests on the entry decided last until it is durable."""
        if self._durable >= self._tickets:
            act()
        else:
            self._settling.append((self._tickets, act))

    def _written(self, count: int) -> None:
        """Take note that so many entries are durable, and do what waited for them."""
        self._durable = max(self._durable, count)
        while self._settling and self._settling[0][0] <= self._durable:
            self._settling.popleft()[1]()

    def _settled(self, number: int) -> bool:
        """Tell whether all that was decided of a stage is durable."""
        return self._durable >= self._last.get(number, 0)

    def _is_open(self, number: int) -> bool:
        return self.state.stages[number].opened and self._settled(number)

    def _ring(self, bell: Bell, seconds: float) -> None:
        self._out.append(Ring(bell, seconds))

"""Async steps: a sliding window of calls in flight, on the one event loop of the process.

The loop runs only while its step waits, on the thread that runs the records. So at any moment one record's code runs, and the
marker says which: a coroutine that goes on takes its record in hand.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
import types
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from parflow.core.forms import Concurrent, inner
from parflow.core.plan import Step
from parflow.errors import Cancelled, ParflowError, RecordTimeoutError
from parflow.runtime.attempts import Attempts
from parflow.runtime.marker import CALL, GUESS, HELD, KEPT, STEP, Marker, Place, put, take
from parflow.runtime.steps import Door, Fail, door

BEATS, LONGEST_BEAT = 16, 0.25
"""How often a timeout is looked at while it runs, and how long there is between two looks at the most (seconds)."""
FAREWELL = 5
"""Turns of the loop that a cancelled call gets to let go of what it holds: one for each task that waits for another."""


class Loop:
    """The event loop of this process. Threads that share it take turns; whoever runs it runs the calls of all."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.pid = 0
        self.loop: asyncio.AbstractEventLoop
        self.leaving = False

    def ready(self) -> asyncio.AbstractEventLoop:
        """Return the loop, made when it's first needed; a forked process has its own."""
        if asyncio._get_running_loop() is not None:  # noqa: SLF001 - get_running_loop() raises instead
            raise ParflowError("async tasks can't run on a thread that runs an event loop already; compute on another one")
        with self.lock:
            if self.pid != os.getpid():
                self.loop, self.pid = asyncio.new_event_loop(), os.getpid()
                atexit.register(self.loop.close)
            return self.loop

    def turn(self) -> None:
        """Let everything that is ready go on, once."""
        self.loop.call_soon(self.loop.stop)
        self.run()

    def run(self) -> None:
        """Run until the loop is stopped.

        Raises
        ------
        Cancelled
            When it was stopped because nobody waits for this process any more.
        """
        self.loop.run_forever()
        if self.leaving:
            raise Cancelled

    def complete(self, make: Callable[[], Any]) -> Any:
        """Call a function inside the loop, and wait for what it returns if that is to be awaited."""

        async def call() -> Any:
            made = make()
            return await made if hasattr(made, "__await__") else made

        with self.lock:
            task = self.ready().create_task(call())
            task.add_done_callback(lambda _: self.loop.stop())
            while not task.done():
                self.run()
        if task.cancelled():
            raise ParflowError("the call cancelled itself (asyncio.CancelledError)")
        return task.result()

    # --- when nobody waits any more --------------------------------------------------------------------------------------

    def interrupt(self) -> bool:
        """Stop the loop, from a signal handler; tell whether it was at rest, so that no code is there to be told by a raise."""
        if self.pid != os.getpid() or not self.loop.is_running():
            return False
        self.leaving = True
        self.loop.call_soon_threadsafe(self.loop.stop)  # which wakes it as well
        return asyncio.current_task(self.loop) is None

    def leave(self) -> None:
        """Cancel all that is left, as asyncio does at a program's end, and wait until it has cleaned up."""
        if self.pid == os.getpid():
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                if not task.cancelling():  # else it's cleaning up
                    task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


LOOP = Loop()


class _Call:
    """One record's call."""

    __slots__ = ("began", "done", "error", "made", "overdue", "place", "record", "task")

    def __init__(self, place: Place, record: Any, began: float) -> None:
        self.place = place
        self.record = record
        self.began = began
        self.done = False
        self.overdue = False
        self.made: Any = None
        self.error: BaseException | None = None
        self.task: asyncio.Task[None] | None = None


class Flights:
    """An async step: so many calls in flight at once, results in the order of the records.

    A call that passes its timeout is cancelled and set aside at once. Its clock stands still while no coroutine can go on
    (another step works, or a call blocks the loop), so that a call is not held to account for others. A loop that is blocked
    for a whole timeout shows no heartbeat any more: its supervisor ends the child.
    """

    def __init__(
        self,
        step: Step,
        number: int,
        marker: Marker,
        fail: Fail,
        onward: Door,
        timeout: float | None,
        attempts: Attempts | None = None,
    ) -> None:
        self.attempts = attempts
        function = step.task.function
        self.most = function.calls if isinstance(function, Concurrent) else 1
        self.function = inner(function)
        self.number = number
        self.marker = marker
        self.fail = fail
        self.kind = step.kind
        shapes: dict[str, Callable[[Any], Any]] = {"map": _same, "filter": bool, "flat_map": list}
        self.shape = shapes[step.kind]
        self.onward = onward
        self.timeout = timeout
        self.beat = min(timeout / BEATS, LONGEST_BEAT) if timeout else 0.0
        self.clock = self.last = 0.0
        LOOP.ready()
        self.timer: asyncio.TimerHandle | None = None
        self.calls: deque[_Call] = deque()
        self.awaited: _Call | None = None
        self.thread = threading.get_ident()
        self.door = door(marker, self.push)

    def push(self, record: Any) -> None:
        """Start a call; wait for the oldest ones while there are too many."""
        call = _Call(take(self.marker), record, self.clock + 2 * self.beat)  # the clock may lag so far
        with LOOP.lock:
            loop = LOOP.ready()
            if self.timeout and self.timer is None:
                self.last = loop.time()
                self.timer = loop.call_later(self.beat, self._tick)
            call.task = loop.create_task(self._fly(call))
            self.calls.append(call)
            LOOP.turn()
        self._land(self.most - 1, call.place)
        if self.calls:
            self.marker[HELD] |= KEPT  # a thread that a call started may work while the next record is read

    def flush(self) -> None:
        """Wait for all calls."""
        self._land(0, take(self.marker))
        self._still()

    def abort(self) -> None:
        """Cancel all calls."""
        self._still()
        calls, self.calls = self.calls, deque()
        with LOOP.lock:
            for call in calls:
                if not call.done and call.task is not None:
                    call.task.cancel()
                    call.done = True
            if calls:
                LOOP.turn()

    # --- landing -------------------------------------------------------------------------------------------------------

    def _land(self, most: int, here: Place) -> None:
        """Push on what is done, in order, until no more than ``most`` calls are in flight."""
        while self.calls and (self.calls[0].done or len(self.calls) > most):
            self._wait(self.calls[0])
            call = self.calls.popleft()
            if call.task is None:  # its time was over: it's told so before anybody acts on that
                self._leave()
            put(self.marker, call.place)
            self.marker[STEP] = self.number
            if call.error is not None:
                late = call.task is None or (call.overdue and isinstance(call.error, RecordTimeoutError))
                self.fail(self.number, call.error, call.record, "timeout" if late else "exception")
            elif self.kind == "map":
                self.onward.push(call.made)
            elif self.kind == "flat_map":
                self.onward.many(call.made)
            elif call.made:
                self.onward.push(call.record)
        put(self.marker, here)

    def _wait(self, call: _Call) -> None:
        with LOOP.lock:
            self._in_hand(call)
            self.awaited = call
            while not call.done:
                LOOP.run()

    def _leave(self) -> None:
        with LOOP.lock:
            for _ in range(FAREWELL):
                LOOP.turn()

    def _in_hand(self, call: _Call) -> None:
        """Name a call's record in the marker, as the first suspect of all that are in flight."""
        put(self.marker, (*call.place[:-1], GUESS))
        self.marker[STEP] = self.number

    # --- on the loop -----------------------------------------------------------------------------------------------------

    async def _fly(self, call: _Call) -> None:
        try:
            made = await self._named(self._made(call), call)
            error: BaseException | None = None
        except (Exception, SystemExit, asyncio.CancelledError) as raised:  # noqa: BLE001 - user code may raise anything
            made, error = None, raised
        if not call.done:
            self._over(call, made, error)

    async def _made(self, call: _Call) -> Any:
        if self.attempts is None:
            return await self._called(call.record)

        async def attempt() -> Any:
            call.began, call.overdue = self.clock + 2 * self.beat, False
            try:
                return await self._called(call.record)
            except asyncio.CancelledError:
                if call.overdue and self.timeout:
                    raise RecordTimeoutError(self.timeout) from None
                raise
            finally:
                call.began = math.inf  # until the next attempt no timeout holds

        return await self.attempts.await_on(attempt, asyncio.sleep)

    async def _called(self, record: Any) -> Any:
        made = self.function(record)
        made = [one async for one in made] if hasattr(made, "__aiter__") else await made
        return self.shape(made)

    @types.coroutine
    def _named(self, coroutine: Any, call: _Call) -> Generator[Any, Any, Any]:
        """Drive a coroutine; whenever its own code goes on, its record is the one in hand."""
        error: BaseException | None = None
        value: Any = None
        while True:
            if not call.done and threading.get_ident() == self.thread:
                self._in_hand(call)
            try:
                waits = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            try:
                value, error = (yield waits), None
            except BaseException as thrown:  # noqa: BLE001 - it's the coroutine's to handle
                error = thrown

    def _over(self, call: _Call, made: Any, error: BaseException | None) -> None:
        call.made, call.error, call.done = made, error, True
        if call is self.awaited:
            LOOP.loop.stop()

    def _tick(self) -> None:
        """Move the clock on, by no more than two beats, and set aside the calls whose time is over."""
        now = LOOP.loop.time()
        self.clock += min(now - self.last, 2 * self.beat)
        self.last = now
        self.marker[CALL] += 1
        assert self.timeout is not None
        for call in tuple(self.calls):
            if self.clock - call.began <= self.timeout or call.done or call.task is None:
                continue
            call.task.cancel()
            if self.attempts is not None and not call.overdue:
                call.overdue = True  # it may be tried again, unless it doesn't let itself be cancelled
                continue
            call.task = None
            self._over(call, None, RecordTimeoutError(self.timeout))
        self.timer = LOOP.loop.call_later(self.beat, self._tick)

    def _still(self) -> None:
        with LOOP.lock:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None


def _same(made: Any) -> Any:
    return made

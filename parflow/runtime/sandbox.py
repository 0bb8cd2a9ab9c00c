"""User code in child processes, supervised by a worker's threads.

One sandbox belongs to one Dask worker. A thread that runs a batch takes a child, hands it the batch, and watches: receipts
on a socket, the record in hand in shared memory. A child that crashes, hangs or outgrows its memory costs that record; the
batch goes on in the next child, a few milliseconds later.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from dataclasses import replace
from typing import Any

from parflow.errors import ParflowError, RecordCrashedError, RecordMemoryError, RecordTimeoutError
from parflow.model import ChunkJob, Cursor, Receipt, Tally
from parflow.runtime.child import MARKER_BYTES, START, receive, send
from parflow.runtime.marker import (
    ARMED,
    CALL,
    CLOSING,
    GUESS,
    HELD,
    JOB,
    LATE,
    LEAVE,
    OFFSET,
    ORDINAL,
    PART,
    READING,
    STEP,
    STOP,
    WORDS,
    YIELD,
)
from parflow.runtime.pipeline import describe
from parflow.runtime.prints import left_behind
from parflow.runtime.worker import Batch, Opened, run_jobs

POLL, WATCHFUL_POLL = 0.25, 0.05
"""Seconds between two looks at a child: at its clock and output; and at its memory or calls, when those have limits."""
LOG_BYTES = 4 << 20
"""What a child may print before the beginning is thrown away (bytes)."""
NOTICE_SECONDS = 0.25
"""What a call that is told that it takes too long may take to notice, before its child is killed."""
LEAVE_SECONDS = 2.0
"""What idle children may take, all together, to close what their class tasks opened; and a cancelled one to clean up."""

LOADS = 5
"""Children in a row that may end before they have a job in hand, until what they load is blamed."""

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "ARROW_NUM_THREADS")


class ForkServer:
    """A clean process that forks children: it has the needed modules and none of the worker's threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.sock: socket.socket | None = None
        self.imported: set[str] = set()
        self.closed = False

    def _alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def _start(self) -> socket.socket:
        if self.closed:
            raise ParflowError("the sandbox is closed")
        if self.sock is not None and self._alive():
            return self.sock
        self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        environment = {**dict.fromkeys(_ONE_THREAD, "1"), **os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs.fileno()), path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C at the terminal is the coordinator's to handle
        )
        theirs.close()
        self.sock, self.imported = ours, set()
        return ours

    def ask(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> int:
        """Send a message and return the answer; a server that died is started anew, once."""
        with self.lock:
            for again in (True, False):
                if message["do"] == "wait" and not self._alive():
                    break
                sock = self._start()
                try:
                    socket.send_fds(sock, [json.dumps(message).encode()], fds)
                    answer = sock.recv(1 << 16)
                except OSError:
                    answer = b""
                if answer:
                    return int(json.loads(answer))
                self._stop()
                if not again:
                    break
        if message["do"] == "wait":
            return -int(signal.SIGKILL)  # it died with its server
        raise ParflowError("the sandbox's fork server ended twice as it started; see what it printed above")

    def load(self, modules: tuple[str, ...]) -> None:
        """Import modules before children are forked, each once."""
        missing = [name for name in modules if name not in self.imported]
        if missing:
            self.ask({"do": "import", "modules": missing})
            self.imported.update(missing)

    def _stop(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """End the server, and with it every child that is left."""
        with self.lock:
            self.closed = True
            self._stop()


class Child:
    """One child process, its socket, its marker and what it printed."""

    def __init__(self, server: ForkServer, memory: int | None) -> None:
        self.server = server
        self.memory = memory
        self.used = False
        self.sock, theirs = socket.socketpair()
        shared = os.memfd_create("parflow-marker")
        os.ftruncate(shared, MARKER_BYTES)
        self.log = os.memfd_create("parflow-log")  # no file: on a full disk a print would be what fails
        fcntl.fcntl(self.log, fcntl.F_SETFL, os.O_APPEND)
        self.marker = memoryview(mmap.mmap(shared, MARKER_BYTES)).cast("Q")
        try:
            self.pid = server.ask({"do": "fork", "memory": memory}, (theirs.fileno(), shared, self.log))
            self.parent = server.process
        finally:
            theirs.close()
            os.close(shared)

    def gone(self) -> bool:
        """Tell whether an idle child has ended, or is about to: it says nothing unasked, so its socket shows only that."""
        if self.parent is not None and self.parent.poll() is not None:
            return True
        look = select.poll()
        look.register(self.sock, select.POLLIN | select.POLLHUP)
        return bool(look.poll(0))

    def resident(self) -> int:
        """Return the bytes of memory that the child holds now, 0 when it is gone."""
        try:
            with open(f"/proc/{self.pid}/statm") as statm:
                fields = statm.read().split()
        except OSError:
            return 0
        return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE

    def trim(self) -> None:
        """Throw away what a flooding child printed."""
        if os.fstat(self.log).st_size > LOG_BYTES:
            os.ftruncate(self.log, 0)

    def end(self) -> int:
        """Kill the child, whatever it does; returns its exit code, negative for a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        code = self.server.ask({"do": "wait", "pid": self.pid})
        self.sock.close()
        os.close(self.log)
        return code


class Sandbox:
    """The children of one worker.

    Examples
    --------
    >>> sandbox = Sandbox()
    >>> sandbox.close()
    """

    def __init__(self) -> None:
        self.server = ForkServer()
        self.lock = threading.Lock()
        self.warming = threading.Lock()
        self.idle: list[Child] = []
        self.busy: dict[int, Child] = {}
        self.stopped: set[str] = set()
        self.markers: dict[str, Any] = {}
        self.working: dict[str, Child] = {}
        self.opened = Opened(shared=True)
        self.closed = False

    # --- children ------------------------------------------------------------------------------------------------------

    def warm(self, children: int, preload: tuple[str, ...], memory: int | None) -> None:
        """Import and fork ahead of the first batch, up to so many children; those with another limit go."""
        try:
            self._warm(children, preload, memory)
        except ParflowError:
            if not self.closed:  # else nobody needs them any more
                raise

    def _warm(self, children: int, preload: tuple[str, ...], memory: int | None) -> None:
        with self.warming:
            self.server.load(preload)
            with self.lock:
                odd = [child for child in self.idle if child.memory != memory]
                self.idle = [child for child in self.idle if child.memory == memory]
                missing = children - len(self.idle) - len(self.busy)
            _dismiss(odd)
            for child in odd:
                child.end()
            for child in [Child(self.server, memory) for _ in range(missing)]:
                self._give(child)

    def _take(self, memory: int | None, *, fresh: bool) -> Child:
        with self.lock:
            if self.closed:
                raise ParflowError("the sandbox is closed")
            dead = [child for child in self.idle if child.gone()]  # all of them are, if their fork server was killed
            self.idle = [child for child in self.idle if child not in dead]
            taken = next((child for child in self.idle if child.memory == memory and not (fresh and child.used)), None)
            if taken is not None:
                self.idle.remove(taken)
                self.busy[taken.pid] = taken
        for child in dead:
            child.end()
        if taken is None:
            taken = Child(self.server, memory)
            with self.lock:
                self.busy[taken.pid] = taken
        return taken

    def _give(self, child: Child) -> None:
        with self.lock:
            self.busy.pop(child.pid, None)
            if not self.closed:
                self.idle.append(child)
                return
        child.end()

    def _drop(self, child: Child) -> int:
        with self.lock:
            self.busy.pop(child.pid, None)
        return child.end()

    def close(self) -> None:
        """End every child: one that works at once, an idle one when it has closed what its tasks opened."""
        with self.lock:
            self.closed = True
            idle, self.idle, busy = self.idle, [], [*self.busy.values()]
        for child in busy:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        _dismiss(idle)
        for child in idle:
            child.end()
        self.server.close()

    # --- batches -------------------------------------------------------------------------------------------------------

    def stop(self, names: tuple[str, ...]) -> None:
        """Ask batches to come back at their next record; those that have not begun won't."""
        self._ask(names, YIELD)

    def _ask(self, names: tuple[str, ...], how: int) -> None:
        with self.lock:
            self.stopped.update(names)
            for name in names:
                if name in self.markers:
                    self.markers[name][STOP] = max(how, self.markers[name][STOP])

    def kill(self, names: tuple[str, ...]) -> None:
        """End batches at once: the records in hand are lost with their children."""
        self._signal(names, signal.SIGKILL)

    def cancel(self, names: tuple[str, ...]) -> None:
        """End batches that nobody waits for: their children are told (`Cancelled`), and killed if they don't leave soon."""
        self._signal(names, signal.SIGTERM)
        late = threading.Timer(LEAVE_SECONDS, self.kill, (names,))
        late.daemon = True
        late.start()

    def _signal(self, names: tuple[str, ...], number: signal.Signals) -> None:
        self._ask(names, LEAVE)
        with self.lock:  # while it's held, a child that works on one of them goes to no other batch
            for name in names:
                if name in self.working:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.working[name].pid, number)

    def run(self, batch: Batch, slot: str) -> tuple[Receipt | None, ...]:
        """Run a batch to its end, its time slice, or until it is asked to stop.

        Returns
        -------
        tuple of Receipt or None
            One for each job; None for a job that was not begun.
        """
        receipts: list[Receipt | None] = [None] * len(batch.jobs)
        began = time.monotonic()
        if batch.isolation == "inline":
            self._inline(batch, receipts)
        else:
            with self.warming:  # children that are on their way are worth waiting for
                self.server.load(batch.preload)
            number, barren = 0, 0
            while number < len(batch.jobs) and barren < LOADS:
                if batch.name in self.stopped or (number and time.monotonic() - began > batch.slice):
                    break
                before = number
                number = self._isolated(batch, number, receipts, began)
                barren = barren + 1 if number == before else 0
                last = receipts[number - 1] if number else None
                if last is not None and last.status == "broken":
                    break
            if barren == LOADS:
                receipts[number] = _unloadable(batch)
        with self.lock:
            self.markers.pop(batch.name, None)
        return tuple(None if receipt is None else _placed(receipt, slot) for receipt in receipts)

    def _inline(self, batch: Batch, receipts: list[Receipt | None]) -> None:
        marker = array("Q", bytes(8 * WORDS))
        self._watchable(batch, marker)
        timer = threading.Timer(batch.slice, marker.__setitem__, (STOP, YIELD))
        timer.daemon = True
        timer.start()
        try:
            for number, receipt in run_jobs(batch, 0, self.opened, marker):
                receipts[number] = receipt
        finally:
            timer.cancel()

    def _watchable(self, batch: Batch, marker: Any, child: Child | None = None) -> None:
        with self.lock:
            self.markers[batch.name] = marker
            if child is not None:
                self.working[batch.name] = child
            if batch.name in self.stopped:
                marker[STOP] = YIELD

    def _isolated(self, batch: Batch, first: int, receipts: list[Receipt | None], began: float) -> int:
        """Give the jobs from ``first`` on to one child; returns the number of the job after the last that it answered."""
        job = batch.jobs[first]
        child = self._take(batch.memory, fresh=job.alone)
        child.used = True
        child.marker[JOB], child.marker[STOP], child.marker[CALL], child.marker[LATE] = 0, 0, 0, 0
        self._watchable(batch, child.marker, child)
        death: tuple[str, ParflowError] | None
        try:
            send(child.sock, pickle.dumps((batch, first), protocol=5))
            death = self._watch(child, batch, receipts, began)
        except (ConnectionError, BrokenPipeError):
            death = ("crash", RecordCrashedError("it closed its connection"))
        with self.lock:
            self.working.pop(batch.name, None)
        answered = max((n + 1 for n, receipt in enumerate(receipts) if receipt is not None), default=first)
        if death is not None:
            at = child.marker[JOB] - 1
            receipt = _obituary(child, batch, *death, self._drop) if at >= answered else None
            if receipt is None:
                self._drop(child)
                return answered
            receipts[at] = receipt
            return at + 1
        last = receipts[answered - 1] if answered else None
        if (last is not None and last.status == "died") or (batch.memory and child.resident() > 0.8 * batch.memory):
            _dismiss([child])
            self._drop(child)
        else:
            self._give(child)
        return answered if batch.name not in self.stopped and child.marker[STOP] == 0 else len(batch.jobs)

    def _watch(
        self, child: Child, batch: Batch, receipts: list[Receipt | None], began: float
    ) -> tuple[str, ParflowError] | None:
        """Follow a child until it has answered the batch (None) or has to be ended (cause and error)."""
        limits = [limit for limit in batch.timeouts if limit]
        poll = min([POLL, batch.slice / 8, *(min(limit / 4, WATCHFUL_POLL) for limit in limits)])
        poll = min(poll, WATCHFUL_POLL) if batch.memory else poll
        ready = select.poll()
        ready.register(child.sock, select.POLLIN | select.POLLHUP)
        marker, seen, since = child.marker, (0, 0, 0, 0), time.monotonic()
        base = child.resident()
        while True:
            if ready.poll(int(poll * 1000) or 1):
                message = receive(child.sock)
                if message is None:
                    return ("crash", RecordCrashedError("it closed its connection"))
                answer = pickle.loads(message)
                if answer is None:
                    return None
                receipts[answer[0]] = answer[1]
                continue
            now = time.monotonic()
            if now - began > batch.slice:
                marker[STOP] = marker[STOP] or YIELD
            if limits:
                hand = (marker[JOB], marker[ORDINAL], marker[CALL], marker[STEP])
                limit = batch.timeouts[hand[3]] if hand[3] < len(batch.timeouts) else None
                if hand != seen:
                    seen, since = hand, now
                elif limit and now - since > limit:
                    certain = marker[ARMED] and not marker[HELD] & GUESS
                    if not certain or now - since > limit + NOTICE_SECONDS:
                        return ("timeout", RecordTimeoutError(limit))
                    if marker[LATE] != hand[2]:  # what the child made so far is kept when the call notices
                        marker[LATE] = hand[2]
                        with contextlib.suppress(ProcessLookupError):  # it has ended, which shows next
                            os.kill(child.pid, signal.SIGUSR1)
            if batch.memory and child.resident() - base > batch.memory:
                return ("memory", RecordMemoryError())
            child.trim()


def _dismiss(children: list[Child]) -> None:
    """Let idle children end by themselves, and wait until they have, or for so long; whoever asks kills what is left."""
    leaving = select.poll()
    handles = []
    for child in children:
        with contextlib.suppress(OSError):  # it's gone already
            child.sock.shutdown(socket.SHUT_WR)
            handles.append(os.pidfd_open(child.pid))
            leaving.register(handles[-1], select.POLLIN)
    until = time.monotonic() + LEAVE_SECONDS
    left = len(handles)
    while left and (seconds := until - time.monotonic()) > 0:
        for handle, _ in leaving.poll(1000 * seconds):
            leaving.unregister(handle)
            left -= 1
    for handle in handles:
        os.close(handle)


def _obituary(child: Child, batch: Batch, cause: Any, error: ParflowError, drop: Any) -> Receipt:
    """Say what became of the job that a child had in hand when it ended. The record's name is the coordinator's to add."""
    marker = child.marker
    at, step = Cursor(marker[ORDINAL], marker[PART], marker[OFFSET]), marker[STEP]
    job = batch.jobs[marker[JOB] - 1]
    output, trace = left_behind(child.log, marker, alone=job.alone)
    code = drop(child)
    if cause == "crash" and code != -signal.SIGKILL:
        error = RecordCrashedError(f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})")
    if cause == "timeout" and marker[HELD] and isinstance(job, ChunkJob) and not job.piece.alone:
        cause = "crash"  # it may be another one's fault: only a record that is alone is condemned
    if step == READING and isinstance(job, ChunkJob):
        if marker[HELD]:  # it may be the fault of a record that a step kept; the marker has the next one's number only
            at = Cursor(at.ordinal, job.piece.start.part, job.piece.start.offset)
        else:
            cause = "input"  # no record was in hand: what kills is the rest of the part that it read
    label = batch.labels[step] if step < len(batch.labels) else batch.labels[0]
    known = {"traceback": trace, "output": output, "ordinal": at.ordinal}
    failure = describe(error, record="", step=label, cause=cause, **known)
    return Receipt("died", cursor=None if step == CLOSING else at, failure=failure, tally=Tally())


def _unloadable(batch: Batch) -> Receipt:
    error = RecordCrashedError(f"{LOADS} times, while it loaded the step's code or opened its input")
    return Receipt("broken", failure=describe(error, record="", step=batch.labels[0], cause="crash"))


def _placed(receipt: Receipt, slot: str) -> Receipt:
    return replace(receipt, slot=slot)

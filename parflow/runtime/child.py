"""The far side of the sandbox: a fork server that imports once, and the children that it forks.

The fork server runs no user code, has one thread and answers at once; a child opens the user's pickled code and runs
records until it is told to go, ends itself, or is killed. Both end when the worker does, whatever ends it: the server sees
its socket close (and looks at its parent every second), and the kernel kills the children with the server
(``PR_SET_PDEATHSIG``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

from parflow.errors import Cancelled
from parflow.runtime.marker import LEAVE, STOP, WORDS, late
from parflow.runtime.prints import PRINTS

HEADER = struct.Struct("<Q")
MARKER_BYTES = 8 * WORDS
START = "import sys,json; sys.path[:]=json.loads(sys.argv[2]); from parflow.runtime.child import serve; serve(int(sys.argv[1]))"


def send(sock: socket.socket, data: bytes) -> None:
    """Send one length-prefixed message."""
    sock.sendall(HEADER.pack(len(data)) + data)


def receive(sock: socket.socket) -> bytes | None:
    """Return the next message, None when the other side is gone."""
    head = _exactly(sock, HEADER.size)
    return None if head is None else _exactly(sock, HEADER.unpack(head)[0])


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            more = sock.recv(min(size - len(data), 1 << 20))
        except ConnectionError:
            return None
        if not more:
            return None
        data += more
    return bytes(data)


def serve(control: int) -> NoReturn:
    """Be the fork server: obey the messages on a socket until it closes.

    A message is JSON: ``import`` modules, ``fork`` a child (its socket, marker and log come along as descriptors; the answer
    is its pid), ``wait`` for one that has ended (the answer is its exit code, negative for a signal).
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever ends a whole group of processes means the coordinator
        signal.signal(number, signal.SIG_IGN)
    PRINTS.listen()
    parent = os.getppid()
    importlib.import_module("parflow.runtime.worker")  # what each child needs, once for all of them
    sock = socket.socket(fileno=control)
    sock.settimeout(1.0)
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 3)
        except TimeoutError:
            if os.getppid() != parent:
                os._exit(0)
            continue
        except ConnectionError:
            os._exit(0)
        if not data:
            os._exit(0)
        message = json.loads(data)
        answer: int = 0
        match message["do"]:
            case "import":
                for name in message["modules"]:
                    with contextlib.suppress(Exception):  # a child that needs it says so in its own words
                        importlib.import_module(name)
                _leave_pandas_out()
            case "fork":
                answer = _fork(sock, fds, message["memory"])
                for fd in fds:
                    os.close(fd)
            case "wait":
                answer = _wait(message["pid"])
        try:
            sock.send(json.dumps(answer).encode())
        except ConnectionError:
            os._exit(0)


class _NoPandas:
    """Finds no pandas."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        """Say that it isn't there; leave other modules to others."""
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _leave_pandas_out() -> None:
    """Keep Arrow from importing pandas (0.3 s, 35 MB, in each child) only to ask whether a list is a Series.

    Arrow asks once and remembers that it was not there; where it's needed (``to_pandas``) it looks again.
    """
    if "pyarrow" in sys.modules and "pandas" not in sys.modules:
        finder: Any = _NoPandas
        sys.meta_path.insert(0, finder)
        try:
            sys.modules["pyarrow"].array([0])
        finally:
            sys.meta_path.remove(finder)


def _wait(pid: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return -signal.SIGKILL  # it was forked by a server that died, and died with it


def _fork(control: socket.socket, fds: list[int], memory: int | None) -> int:
    gc.collect()
    gc.freeze()  # what is shared stays shared: the collector must not touch it in the children
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        control.close()
        _die_with(server)
        _redirect(fds[2])
        if memory:
            _limit(memory)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("900")  # the kernel's out-of-memory killer takes a child, never the worker
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()  # forked siblings would draw the same numbers
        faulthandler.enable()
        _run(socket.socket(fileno=fds[0]), memoryview(mmap.mmap(fds[1], MARKER_BYTES)).cast("Q"))
    finally:
        os._exit(70)


def _die_with(server: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != server:
        os._exit(0)


def _redirect(log: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _limit(memory: int) -> None:
    """Let the child's private memory grow by ``memory`` bytes and no further: an allocation past it fails in the child."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[5]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, used + memory))


def _cancelled(marker: Any) -> None:
    """Tell the user's code that nobody waits for it any more: what it opened is closed on the way out.

    That is for its supervisor to say; from anybody else the signal is meant for the coordinator, which hears it as well.
    Coroutines that wait are told when the child leaves: a raise in the midst of the event loop would be lost there.
    """
    flights: Any = sys.modules.get("parflow.runtime.flights")
    if marker[STOP] == LEAVE and (flights is None or not flights.LOOP.interrupt()):
        raise Cancelled


def _run(sock: socket.socket, marker: Any) -> NoReturn:
    from parflow.runtime.worker import Opened, run_jobs

    opened = Opened()
    PRINTS.marker = marker
    signal.signal(signal.SIGTERM, lambda *_: _cancelled(marker))
    signal.signal(signal.SIGUSR1, lambda *_: late(marker))
    try:
        while (message := receive(sock)) is not None:
            batch, first = pickle.loads(message)
            for answer in run_jobs(batch, first, opened, marker):
                send(sock, pickle.dumps(answer, protocol=5))
            send(sock, pickle.dumps(None))
    except Cancelled:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        flights: Any = sys.modules.get("parflow.runtime.flights")
        if flights is not None:
            flights.LOOP.leave()
    opened.close()
    os._exit(0)

"""Chaos: the processes of a run are killed at random moments, and the same seed draws the same moments."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import psutil

from parflow.api.runs import Run, home_folder, list_runs, open_run
from parflow.errors import ParflowError, UsageError
from parflow.runtime.child import START

What = Literal["child", "worker", "coordinator"]
Processes = dict[What, list[psutil.Process]]

SHOWN = 2000
"""Characters of what a command said at its end, for the error that shows them."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment at which something is killed: seconds after the one before, what, and which of all there are (0 to 1)."""

    seconds: float
    what: What
    which: float


@dataclass(frozen=True, slots=True)
class Kill:
    """A process that was killed: seconds after the chaos began, what it was, and its id."""

    at: float
    what: What
    pid: int


@dataclass(frozen=True, slots=True)
class Survived:
    """What became of a run that was killed until it succeeded: its result, the run, all kills, and how often it was started."""

    result: Any
    run: Run
    kills: tuple[Kill, ...]
    starts: int


class Chaos:
    """Kills the processes of a run (SIGKILL) at the moments of a Poisson process.

    Only what belongs to the run is ever killed: children of its sandboxes, its workers, and, with `survive`, its coordinator.
    The cluster of one process that a run has without ``cluster=`` has no worker process: there a worker's death is that of the
    fork server and all of its children.

    A record whose child is killed is run again alone; if that child is killed as well, it's a dead letter like any other
    record that ends its process. A task that says ``retry=`` outlives more.

    Parameters
    ----------
    seed : int
        The same seed draws the same moments; which process that meets depends on what there is just then.
    children, workers, coordinator : float
        Kills a second, on average.
    most : int, optional
        After so many kills it is quiet, so that everything ends.

    Examples
    --------
    >>> import itertools
    >>> [moment.what for moment in itertools.islice(Chaos(seed=5, children=2, workers=1).moments(), 4)]
    ['child', 'worker', 'child', 'child']

    Children die while a run goes on in this process::

        run = flow("texts/*.txt").run(wait=False)
        with Chaos(seed=7, children=2.0).on(run) as storm:
            run.wait()
        print(run.result(), storm.kills)

    The whole program dies, and goes on::

        survived = Chaos(seed=7, children=2.0, coordinator=0.2).survive("flow.py:wordcount", source="texts/*.txt")
        print(survived.result, survived.kills)
    """

    def __init__(
        self, *, seed: int, children: float = 0.0, workers: float = 0.0, coordinator: float = 0.0, most: int | None = None
    ) -> None:
        self.seed = seed
        self.rates: dict[What, float] = dict(zip(get_args(What), (children, workers, coordinator), strict=True))
        self.most = most
        if min(self.rates.values()) < 0 or not any(self.rates.values()):
            raise UsageError("chaos wants something to kill: give children=, workers= or coordinator= kills a second")

    def moments(self) -> Iterator[Moment]:
        """Yield the moments, without end."""
        chance = random.Random(self.seed)  # noqa: S311 - it has to be the same again, not unforeseeable
        total = sum(self.rates.values())
        while True:
            (what,) = chance.choices([*self.rates], [*self.rates.values()])
            yield Moment(chance.expovariate(total), what, chance.random())

    def on(self, run: Run) -> Storm:
        """Kill children and workers of a run of this process, for as long as a ``with`` block takes.

        Parameters
        ----------
        run : Run
            Started in this process with ``wait=False``.

        Returns
        -------
        Storm
            A context manager; its ``kills`` say what was killed.

        Raises
        ------
        UsageError
            When the coordinator is to be killed, which is this process; or the run is of another process.
        """
        if self.rates["coordinator"]:
            raise UsageError("this run's coordinator is this process; to kill it as well, write chaos.survive('flow.py:name')")
        executor = run._executor  # noqa: SLF001 - one face
        if executor is None:
            raise UsageError(f"run {run.run_id} doesn't run in this process; start it here, with wait=False")
        return Storm(self, lambda: _of_hands(executor.hands))

    def survive(
        self,
        flow: str,
        *options: str,
        workers: int | None = None,
        home: str | os.PathLike[str] | None = None,
        **arguments: object,
    ) -> Survived:
        r"""Run a workflow in a process of its own, with chaos, and resume it until it has ended by itself.

        Parameters
        ----------
        flow : str
            ``file.py``, ``file.py:name`` or ``module:name``, as for ``parflow run``.
        *options : str
            Words that have no value, such as ``"--compensate"``.
        workers : int, optional
            Slots of the local cluster.
        home : path-like, optional
            Where journal and results are.
        arguments
            The workflow's own, and the options of ``parflow run`` that have a value, such as ``max_failures=1``.

        Returns
        -------
        Survived
            The result, the run, and what was killed when.

        Raises
        ------
        RunError
            When the run failed.
        ParflowError
            When the command ended without a run; it says what it printed.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> code = "import parflow as pf\n@pf.workflow\ndef total(n: int): return pf.items(range(n)).reduce(pf.sum())"
        >>> _ = (folder / "flow.py").write_text(code)
        >>> survived = Chaos(seed=1, coordinator=2.0, most=2).survive(f"{folder}/flow.py", home=folder / "home", n=5)
        >>> survived.result, survived.starts - len(survived.kills)
        (10, 1)
        """
        place = home_folder(home)
        slots = ["--workers", str(workers)] if workers is not None else []
        words = [*options]
        words += [word for name, value in arguments.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        program = _Program(place, slots)
        with Storm(self, program.processes) as storm:
            code = program.live(["run", flow, *words])
            while code == -signal.SIGKILL and program.pid in {kill.pid for kill in storm.kills}:
                code = program.live(["resume", program.run_id] if program.run_id else ["run", flow, *words])
        if not program.run_id:
            raise ParflowError(f"parflow run {flow} ended with exit code {code}, without a run:\n{program.said}")
        run = open_run(program.run_id, place)
        return Survived(run.result(), run, tuple(storm.kills), program.starts)


class Storm:
    """Chaos under way: kills as long as a ``with`` block takes.

    Attributes
    ----------
    kills : list of Kill
        What was killed so far.
    """

    def __init__(self, chaos: Chaos, look: Callable[[], Processes]) -> None:
        self.chaos = chaos
        self.look = look
        self.kills: list[Kill] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._rage, name="parflow-chaos", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _rage(self) -> None:
        for moment in self.chaos.moments():
            if len(self.kills) == self.chaos.most or self._over.wait(moment.seconds):
                return
            victims = sorted(self.look()[moment.what], key=lambda process: process.pid)
            if victims:
                self._kill(moment.what, victims[int(moment.which * len(victims))])

    def _kill(self, what: What, victim: psutil.Process) -> None:
        kill = Kill(time.monotonic() - self._began, what, victim.pid)
        self.kills.append(kill)  # first, so that whoever sees it die finds the reason
        try:
            victim.kill()  # psutil sees to it that the id is still that process's
        except psutil.NoSuchProcess:
            self.kills.remove(kill)


@dataclass
class _Program:
    """A run in a process of its own that is started again and again."""

    home: str
    options: Sequence[str]
    run_id: str = ""
    said: str = ""
    pid: int = 0
    starts: int = 0
    alive: psutil.Process | None = field(default=None, repr=False)

    def live(self, words: Sequence[str]) -> int:
        """Run a command of parflow's to its end; returns its exit code."""
        command = [sys.executable, "-m", "parflow.cli", *words, "--home", self.home, *self.options]
        self.starts += 1
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
            )
            self.pid = process.pid
            try:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.alive = psutil.Process(process.pid)
                code = process.wait()
            finally:
                self.alive = None
                process.kill()  # after a Ctrl-C; else it has ended
                process.wait()
            said.seek(0)
            self.said = said.read().decode("utf-8", "replace")[-SHOWN:]
        if not self.run_id:
            rows = list_runs(self.home) if os.path.isdir(self.home) else []
            mine = [row.run_id for row in rows if row.lease is not None and row.lease.owner.pid == process.pid]
            self.run_id = mine[0] if mine else ""
        return code

    def processes(self) -> Processes:
        """Return what there is of the program now."""
        alive = self.alive
        coordinator = [alive] if alive is not None else []
        return {**_below(_servers(coordinator)), "coordinator": coordinator}


def _of_hands(hands: Any) -> Processes:
    """Return the processes of a connected cluster that are on this machine."""
    if hands is not None and hands.sandbox is not None:
        server = hands.sandbox.server.process
        return _below([process for process in _children(psutil.Process()) if server is not None and process.pid == server.pid])
    workers: list[psutil.Process] = []
    with contextlib.suppress(Exception):  # the client closes, or a worker that is asked dies: the next moment will do
        host, _ = _whereabouts()
        for where, pid in hands.client.run(_whereabouts, on_error="ignore").values() if hands is not None else ():
            if where == host:
                workers.append(psutil.Process(pid))
    return {**_below(_servers(workers)), "worker": workers}


def _servers(parents: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [process for parent in parents for process in _children(parent) if _forks(process)]


def _below(servers: Sequence[psutil.Process]) -> Processes:
    """Return fork servers, as workers, and the children that they forked."""
    return {"child": _servers(servers), "worker": [*servers], "coordinator": []}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.Error:
        return []


def _forks(process: psutil.Process) -> bool:
    """Tell whether it is a sandbox's: a fork server, or what it forked, which has its command line."""
    try:
        return START in process.cmdline()
    except psutil.Error:
        return False


def _whereabouts() -> tuple[str, int]:
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return f"{socket.gethostname()}/{boot.read().strip()}", os.getpid()

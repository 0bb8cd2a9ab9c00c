"""Fault scripts: which record of which step fails how, at which attempt. The flow's own code stays as it is."""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NoReturn, get_args, overload

from parflow.api.lazy import Lazy
from parflow.api.tasks import Bound, as_task
from parflow.core.fingerprint import fingerprint
from parflow.core.forms import Batched, inner, is_built, within
from parflow.core.plan import Plan
from parflow.errors import InjectedError, UsageError
from parflow.model import nbytes, seconds
from parflow.nodes import Task

Kind = Literal["raise", "crash", "kill", "exit", "hang", "memory", "slow"]
DEADLY: tuple[Kind, ...] = ("crash", "kill", "exit")
FOREVER = 1e9
"""Seconds that nobody waits for."""
LOG = "log"


class _Any:
    def __repr__(self) -> str:
        return "ANY"

    def __reduce__(self) -> str:
        return "ANY"


ANY = _Any()
"""Stands for each record."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where.

    Parameters
    ----------
    step : str
        The step's name, as plans and dead letters have it.
    kind : str
        ``"raise"`` an exception; end the process: ``"crash"`` (SIGSEGV, as broken native code does), ``"kill"`` (SIGKILL, as
        the kernel does when memory is short), ``"exit"`` (`os._exit`); ``"hang"`` for good; take ``"memory"``, touch and free
        it; be ``"slow"``, and then go on.
    record : object or callable, optional
        What the step is given (of a call: its first argument): a value to be equal to, or a function that says whether it is
        meant. Without it, each record.
    attempt : int or collection of int, optional
        The attempts that go wrong, counted from 1 for each record, whichever process makes them. Without it, all.
    error : exception or its class, optional
        What is raised; by default an `InjectedError`.
    seconds : float or str
        What ``"slow"`` takes: seconds, or text such as ``"500ms"``.
    size : int or str
        What ``"memory"`` takes: bytes, or text such as ``"1GiB"``.

    Examples
    --------
    >>> fault = Fault("score", "crash", record=lambda doc: doc["id"] == 17, attempt=1)
    >>> fault.means({"id": 17}), fault.means({"id": 18})
    (True, False)
    """

    step: str
    kind: Kind = "raise"
    record: Any = ANY
    attempt: int | Collection[int] | None = None
    error: BaseException | type[BaseException] | None = None
    seconds: float | str = 1.0
    size: float | str = "1GiB"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UsageError(f"kind={self.kind!r} is unknown; write one of {', '.join(map(repr, get_args(Kind)))}")
        object.__setattr__(self, "seconds", seconds(self.seconds))
        object.__setattr__(self, "size", nbytes(self.size))

    def means(self, record: Any) -> bool:
        """Tell whether it is about this record."""
        if self.record is ANY:
            return True
        return bool(self.record(record) if callable(self.record) else record == self.record)

    def at(self, attempt: int) -> bool:
        """Tell whether it happens at this attempt."""
        wanted = (self.attempt,) if isinstance(self.attempt, int) else self.attempt
        return wanted is None or attempt in wanted

    def happen(self, attempt: int) -> float:
        """Let it happen, and return the seconds that are to be waited before the step goes on."""
        match self.kind:
            case "raise":
                raise self.error if self.error is not None else InjectedError(self.step, attempt)
            case "crash" | "kill" | "exit":
                self._die()
            case "memory":
                bytearray(int(self.size))[:: os.sysconf("SC_PAGESIZE")] = bytes(_pages(int(self.size)))
        return {"hang": FOREVER, "slow": float(self.seconds)}.get(self.kind, 0.0)

    def _die(self) -> NoReturn:
        if self.kind != "exit":
            os.kill(os.getpid(), signal.SIGSEGV if self.kind == "crash" else signal.SIGKILL)
        os._exit(1)


def _pages(size: int) -> int:
    return math.ceil(size / os.sysconf("SC_PAGESIZE"))


@dataclass(frozen=True, slots=True)
class Happened:
    """A fault that happened: the step, what, the beginning of the record's repr, and at which of its attempts."""

    step: str
    kind: str
    record: str
    attempt: int


@dataclass(frozen=True)
class _Script:
    """The faults of one step, as they travel with its function; ``owner`` is the process that must not be killed."""

    step: str
    faults: tuple[Fault, ...]
    many: bool
    folder: str = field(compare=False)
    owner: int = field(compare=False)

    def meet(self, given: Sequence[Any], named: dict[str, Any]) -> float:
        """Let happen what is to happen to what the step is given; returns seconds to wait."""
        first = next(iter((*given, *named.values())), None)
        wait = 0.0
        for record in _records(first) if self.many else (first,):
            faults = [fault for fault in self.faults if fault.means(record)]
            attempt = self._attempt(record) if faults else 0
            for fault in faults:
                if fault.at(attempt):
                    self._note(fault, record, attempt)
                    wait += fault.happen(attempt)
        return wait

    def _attempt(self, record: Any) -> int:
        """Count one more attempt at a record, and return its number: an empty file each, so that a death forgets none."""
        name = os.path.join(self.folder, fingerprint((self.step, record)))
        attempt = 1
        while True:
            try:
                os.close(os.open(f"{name}.{attempt}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                attempt += 1
            else:
                return attempt

    def _note(self, fault: Fault, record: Any, attempt: int) -> None:
        if fault.kind in DEADLY and os.getpid() == self.owner:
            raise UsageError(
                f"the fault {fault.kind!r} of step {self.step!r} would end the process that made the script: it wants a child, "
                "and so a run with isolation='process', the default"
            )
        happened = Happened(self.step, fault.kind, repr(record)[:200], attempt)
        handle = os.open(os.path.join(self.folder, LOG), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        try:
            os.write(handle, f"{json.dumps(asdict(happened))}\n".encode())  # one write: lines don't mix
        finally:
            os.close(handle)


def _records(batch: Any) -> Iterable[Any]:
    """Return the records of a batch: a list, a DataFrame or an Arrow table."""
    if hasattr(batch, "to_pylist"):
        return list(batch.to_pylist())
    return list(batch.to_dict("records")) if hasattr(batch, "to_dict") else batch


class Faults:
    """A script of faults for a flow.

    What it did, and how often each record was tried, is kept in a folder, so that no death makes it forget.

    Parameters
    ----------
    faults : iterable of Fault
        What goes wrong. Of several for one record and attempt those that come first happen first.
    folder : path-like, optional
        Where it is kept: of a cluster on several machines, a folder that all of them share. By default a temporary one,
        which goes with this process.

    Examples
    --------
    A service that refuses the first call for 3, and always that for 5:

    >>> import parflow as pf
    >>> @pf.task
    ... def ask(n):
    ...     return n * n
    >>> faults = Faults([Fault("ask", record=5, error=ConnectionError("down"))])
    >>> squares = pf.items([1, 3, 5]).map(ask)
    >>> run = faults.on(squares).run(max_failures=1, isolation="inline")
    >>> list(run.result()), run.dead_letters()[0].message
    ([1, 9], 'down')
    >>> faults.happened()
    [Happened(step='ask', kind='raise', record='5', attempt=1)]
    """

    def __init__(self, faults: Iterable[Fault], folder: str | os.PathLike[str] | None = None) -> None:
        self.faults = tuple(faults)
        self.folder = os.path.abspath(folder) if folder is not None else tempfile.mkdtemp(prefix="parflow-faults-")
        os.makedirs(self.folder, exist_ok=True)
        if folder is None:
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    @overload
    def on(self, what: Bound | Lazy) -> Bound: ...
    @overload
    def on(self, what: Callable[..., Any]) -> Task: ...
    def on(self, what: Any) -> Any:
        """Return the same with faults: a workflow with its arguments, a dataset or a value, to be run; or a task.

        Of a workflow each step whose name a fault has gets it. Graphs that tasks return while it runs are not looked into: give
        those their tasks with faults.

        Parameters
        ----------
        what : Bound, Dataset, Value, Task or callable
            What is to fail.

        Raises
        ------
        UsageError
            When a fault names a step that isn't there.
        """
        if isinstance(what, Bound):
            return _Faulty(what, self)
        if isinstance(what, Lazy):
            return _Faulty(Bound(what._label(), {}, what, ()), self)  # noqa: SLF001 - one face
        task = as_task(what, None)
        self._check({task.name})
        return self._task(task)

    def plan(self, plan: Plan) -> Plan:
        """Return a plan whose steps and calls have the faults.

        Raises
        ------
        UsageError
            When a fault names a step that isn't there.
        """
        self._check({step.task.name for stage in plan.stages for step in stage.steps} | {task.name for task in plan.tasks})
        stages = [
            replace(stage, steps=tuple(replace(step, task=self._task(step.task)) for step in stage.steps))
            for stage in plan.stages
        ]
        return replace(plan, stages=tuple(stages), tasks=tuple(map(self._task, plan.tasks)))

    def happened(self) -> list[Happened]:
        """Return what happened so far, in that order: a test that nothing went wrong in shows nothing."""
        try:
            with open(os.path.join(self.folder, LOG)) as log:
                return [Happened(**json.loads(line)) for line in log]
        except FileNotFoundError:
            return []

    def _check(self, names: set[str]) -> None:
        for fault in self.faults:
            if fault.step not in names:
                raise UsageError(f"no step is called {fault.step!r}, which is to fail; there are {', '.join(sorted(names))}")

    def _task(self, task: Task) -> Task:
        faults = tuple(fault for fault in self.faults if fault.step == task.name)
        if not faults:
            return task
        script = _Script(task.name, faults, isinstance(task.function, Batched), self.folder, os.getpid())
        return replace(task, function=within(task.function, _faulty(script, inner(task.function))))


class _Faulty(Bound):
    """A workflow with its arguments, and faults."""

    def __init__(self, bound: Bound, faults: Faults) -> None:
        self.__dict__.update(bound.__dict__)
        self.bound = bound
        self.faults = faults

    def plan(self) -> Plan:
        """Return the plan with its faults."""
        return self.faults.plan(self.bound.plan())


def _faulty(script: _Script, function: Any) -> Any:
    """Return what takes the place of a function, or of a class that is built first."""
    if not is_built(function):
        named = inspect.isroutine(function) or isinstance(function, (functools.partial, type))
        return _met(script, function, function if named else type(function).__call__, 0)
    kind: Any = function.func if isinstance(function, functools.partial) else function
    names = {"__call__": _met(script, kind.__call__, kind.__call__, 1), "__module__": kind.__module__, "__doc__": kind.__doc__}
    made = type(kind.__name__, (kind,), names)
    return functools.partial(made, *function.args, **function.keywords) if isinstance(function, functools.partial) else made


def _met(script: _Script, function: Any, called: Any, skip: int) -> Any:
    """Return a function of the same form that meets its faults first; ``skip`` passes over ``self``."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        if wait := script.meet(args[skip:], kwargs):
            time.sleep(wait)
        return function(*args, **kwargs)

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(script.meet(args[skip:], kwargs))
        return await function(*args, **kwargs)

    async def generator(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(script.meet(args[skip:], kwargs))
        async for made in function(*args, **kwargs):
            yield made

    one: Any = plain
    if inspect.isasyncgenfunction(called):
        one = generator
    elif inspect.iscoroutinefunction(called):
        one = coroutine
    return functools.wraps(function)(one) if inspect.isfunction(function) else one

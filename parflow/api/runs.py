"""Runs: start one, look at one, go on with one."""

from __future__ import annotations

import html
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import parflow.errors
from parflow.api.tasks import like
from parflow.core.bindings import bind
from parflow.core.entries import STATUS_KINDS, RunEnded, decode, encode
from parflow.core.history import RunState, fold
from parflow.core.plan import Plan
from parflow.core.signals import StopRequested
from parflow.errors import FencedError, ResumeError, RunError, RunOwnedError, UsageError
from parflow.model import Address, Failure, Ref
from parflow.runtime.executor import Executor
from parflow.runtime.program import open_plan
from parflow.runtime.values import load, unpickle_all
from parflow.storage.journal import Journal, RunRow, Writer, this_process
from parflow.storage.store import Store, open_store
from parflow.storage.trust import private_folder
from parflow.views.failures import Letter, choose, find_letters, frame

if TYPE_CHECKING:
    from pandas import DataFrame

FAN_IN = 16
INTERVAL = 0.2
"""Seconds between two looks at a run that is waited for."""


def home_folder(home: str | os.PathLike[str] | None = None) -> str:
    """Return where journal and results are: the argument, else ``PARFLOW_HOME``, else ``.parflow`` in the working folder."""
    return os.path.abspath(os.fspath(home or os.environ.get("PARFLOW_HOME") or ".parflow"))


def open_home(home: str) -> Journal:
    """Open a home's journal; a new home is private."""
    private_folder(home, parflow.errors.JournalError)
    ignore = os.path.join(home, ".gitignore")
    if not os.path.exists(ignore):
        with open(ignore, "w") as file:
            file.write("*\n")
    return Journal(os.path.join(home, "journal.sqlite"))


class Records(Sequence[Any]):
    """The records of a dataset that was run: read from the store, chunk by chunk, when they are asked for."""

    def __init__(self, store: Store, refs: tuple[Ref, ...]) -> None:
        self._store = store
        self._refs = refs

    def __iter__(self) -> Iterator[Any]:
        for ref in self._refs:
            yield from unpickle_all(self._store.get_checked(ref))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, Records)) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(ref.digest for ref in self._refs))

    def __repr__(self) -> str:
        return f"<records in {len(self._refs)} pieces>"


@dataclass(frozen=True, slots=True)
class Missing:
    """What a result leaves out: the name of the output, the share of the input that is in it, and the parts that are not."""

    output: str
    share: float
    inputs: tuple[str, ...]


class Run:
    """One execution of a workflow: under way, or as the journal has it.

    Attributes
    ----------
    run_id : str
        Its name, for `open_run`, `resume` and the command line.
    """

    def __init__(self, run_id: str, home: str, executor: Executor | None = None) -> None:
        self.run_id = run_id
        self.home = home
        self.started = time.time()
        self._executor = executor
        self._over = threading.Event()  # not the thread's join: a Ctrl-C in it makes Python take the thread for ended
        if executor is None:
            self._over.set()
        self._loaded: RunState | None = None
        self._store: Store | None = None
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        return f"Run<{self.run_id} {self.status}>"

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """The run's state: live, or folded from the journal."""
        if self._executor is not None:
            return self._executor.state
        return self._load()

    @property
    def store(self) -> Store:
        """Where its results are."""
        if self._executor is not None:
            return self._executor.store
        if self._store is None:  # it's opened when it's needed: how a run stands is told although its store is gone
            self._store = open_store(find_run(self.run_id, self.home).note["store"], create=False)
        return self._store

    def _load(self) -> RunState:
        if self._loaded is None:
            journal = open_home(self.home)
            try:
                row = journal.find(self.run_id, STATUS_KINDS)
                self._loaded = fold(decode(entry.kind, entry.body) for entry in journal.read(row.run_id))
                find_code(row)
            finally:
                journal.close()
        return self._loaded

    @property
    def status(self) -> str:
        """``running``, ``succeeded``, ``failed``, ``stopped``, ``cancelled``; ``lost`` if its process ended without a word."""
        if self._executor is not None:
            unended = self._over.is_set() and self.state.ended is None  # the journal didn't take its end
            return "lost" if unended else self.state.status
        return status_of(find_run(self.run_id, self.home))

    def result(self) -> Any:
        """Wait for the end and return what the workflow returned, with values in the place of what was lazy.

        Raises
        ------
        RunError
            When the run failed, or was stopped or cancelled; everything finished is kept, and the message says how to go on.
        """
        self.wait()
        ended = self.state.ended
        if ended is None and self._error is not None:
            raise self._error
        if ended is None:
            raise RunError(f"run {self.run_id} has not ended: it is {self.status}; `parflow resume {self.run_id}` goes on")
        if ended.status != "succeeded":
            kind = getattr(parflow.errors, ended.error, RunError)
            raise kind(*ended.arguments) from self._error
        plan, shape = load_plan(self.state, self.store)
        return fill(shape, [self._value(address) for address in plan.targets])

    def _value(self, address: Address) -> Any:
        binding = bind(self.state, address)
        return Records(self.store, binding.refs) if binding.form == "records" else load(binding, self.store)

    def failures(
        self, *, step: str | None = None, error: str | type | None = None, source: str | os.PathLike[str] | None = None
    ) -> DataFrame:
        """Return what failed so far as a table, a row each.

        Of each stage, in input order, first unusable inputs and then records; at last, calls.

        Parameters
        ----------
        step : str, optional
            Those of this step or task.
        error : str or exception class, optional
            Those of this class, given by itself, its name or its qualified name, and of classes derived from it.
        source : path-like, optional
            Those of this input: its path, or a pattern with ``*`` and ``**``; without a folder it's held against file names.

        Returns
        -------
        pandas.DataFrame
            With columns ``record`` (what failed), ``source`` (the path of its input), ``step``, ``cause``, ``error`` (the
            exception's class), ``message``, ``attempts`` (how often it was tried), ``preview`` (its beginning), ``output`` (the
            end of what its code printed: 2,000 characters, for the first 100 of a piece), ``traceback``, ``chunk``, ``ordinal``
            (its number there) and ``stage``; the last three are missing for calls.

        Raises
        ------
        UsageError
            When ``error`` is no class and no name.

        Examples
        --------
        >>> import parflow as pf, tempfile
        >>> run = pf.items(["1", "x"]).map(int).run(home=tempfile.mkdtemp(), isolation="inline", max_failures=1)
        >>> run.failures(error="ValueError")[["record", "step", "attempts"]].values.tolist()
        [['items[1]', 'int', 1]]
        >>> len(run.failures(error=KeyError))
        0
        """
        return frame(letters_of(self, step, error, source))

    def dead_letters(
        self, *, step: str | None = None, error: str | type | None = None, source: str | os.PathLike[str] | None = None
    ) -> list[Failure]:
        """Return what `failures` has as a list of `Failure`, which know their place and the exception's base classes as well.

        Parameters are those of `failures`.
        """
        return [letter.failure for letter in letters_of(self, step, error, source)]

    def plan(self) -> Plan:
        """Return the plan that the run began with; what it has grown since is left out."""
        return load_plan(self.state, self.store)[0]

    def picture(self) -> str:
        """Return a picture of the run's plan and how it stands, as SVG; notebooks show it."""
        from parflow.views.picture import picture

        return picture(self.plan(), self.state)

    def _repr_html_(self) -> str:
        from parflow.views.picture import html_of

        return f"<p>{html.escape(repr(self))}</p>{html_of(self.plan(), self.state)}"

    def report(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write a page that shows the run, and return where it is (by default in the run's own folder)."""
        from parflow.views.report import write_report

        path = os.fspath(path) if path is not None else os.path.join(self.home, "runs", self.run_id, "report.html")
        return write_report(self, path)

    def missing(self) -> list[Missing]:
        """Return what results leave out: reductions whose barrier opened at their deadline, before all of the input was there.

        `redrive` makes up for it.
        """
        found = []
        for stage in self.state.stages:
            for output, cut in stage.cuts.items():
                inputs = tuple(map(stage.place_of, cut.late))
                found.append(Missing(stage.facts.outputs[output], cut.share, inputs))
        return found

    # --- steering ----------------------------------------------------------------------------------------------------

    def wait(self, watch: Callable[[int], Any] | None = None) -> Run:
        """Wait for the end. Ctrl-C once: what is in flight yields, and the run can be resumed. Twice: at once.

        Other signals are the program's own: for a script that is to end gently on SIGTERM, have its handler raise
        ``KeyboardInterrupt``. (The command line does so.)

        Parameters
        ----------
        watch : callable, optional
            Called several times a second, and at the end, with how often Ctrl-C was pressed so far.

        Raises
        ------
        KeyboardInterrupt
            When the run has ended, if it was pressed.
        """
        presses = 0
        first: KeyboardInterrupt | None = None
        while not self._over.is_set():
            try:
                if watch is not None:
                    watch(presses)
                self._over.wait(INTERVAL)
            except KeyboardInterrupt as pressed:
                first, presses = first or pressed, presses + 1
                self.stop(now=presses > 1)
        if watch is not None:
            watch(presses)
        if first is not None:
            raise first
        return self

    def stop(self, *, now: bool = False) -> None:
        """Stop the run of this process: at the next record of what is in flight, or (``now``) at once."""
        if self._executor is not None:
            self._executor.stop(StopRequested(now))

    def cancel(self, *, now: bool = False, compensate: bool = False, wait: bool = True) -> Run:
        """Cancel the run, whichever process on this machine it runs in; one that nobody runs ends here and now.

        Nothing more of it begins, and what is in flight comes back at its next record. What is finished is kept:
        `resume` goes on if the result is wanted after all.

        Parameters
        ----------
        now : bool
            Abandon the records in hand instead.
        compensate : bool
            Undo what was done, too: a run that nobody runs is undone by `compensate` instead.
        wait : bool
            Wait for the run's end.

        Returns
        -------
        Run
            The same run.

        Raises
        ------
        UsageError
            When it has ended already.

        Examples
        --------
        >>> import parflow as pf, tempfile, time
        >>> slow = pf.items([0.1] * 100, chunk_records=1).map(time.sleep)
        >>> slow.run(home=tempfile.mkdtemp(), isolation="inline", wait=False).cancel().status
        'cancelled'
        """
        if self._executor is not None and not self._over.is_set():
            self._executor.stop(StopRequested(now, "cancelled", compensate))
            status = self.wait().status if wait else "cancelled"
        else:
            status = self._cancel_elsewhere({"now": now, "compensate": compensate}, wait=wait)
            self._executor, self._loaded = None, None  # the journal knows better now
        if status not in ("cancelled", "compensation_failed"):
            raise UsageError(f"run {self.run_id} has ended already ({status}): there is nothing to cancel")
        return self

    def _cancel_elsewhere(self, request: dict[str, Any], *, wait: bool) -> str:
        """Ask the run's owner to cancel it, or do it in its place; returns how the run has ended."""
        asked = None
        journal = open_home(self.home)
        try:
            while True:
                row = journal.find(self.run_id, STATUS_KINDS)
                status, epoch = status_of(row), row.lease.epoch if row.lease is not None else 0
                if status == "cancelled" and asked is None:
                    return "cancelled before"
                if status not in ("running", "stopped", "lost"):
                    return status
                with suppress(FencedError, RunOwnedError):  # another owner came between: look again
                    if status != "running" and request["compensate"]:
                        raise UsageError(
                            f"nobody runs {self.run_id} any more: pf.compensate({self.run_id!r}) undoes what it did"
                        )
                    if status != "running":
                        _end_as_cancelled(journal, self.run_id)
                    elif epoch != asked:
                        journal.ask(self.run_id, epoch, request, time.time())
                    asked = epoch
                    if status != "running" or not wait:
                        return "cancelled"
                time.sleep(INTERVAL)
        finally:
            journal.close()

    def timings(self) -> dict[str, float]:
        """Return seconds since 1970 of what happened in this process: ``started``, ``first_chunk``."""
        first = self._executor.first_chunk if self._executor is not None else None
        return {"started": self.started} | ({"first_chunk": first} if first is not None else {})

    def _launch(self, journal: Journal, epoch: int) -> None:
        executor = self._executor
        assert executor is not None

        def asked(request: dict[str, Any]) -> None:
            executor.stop(StopRequested(request["now"], "cancelled", request["compensate"]))

        def live() -> None:
            try:
                writer = Writer(journal, self.run_id, epoch, executor.durable, self._journal_broke, on_request=asked)
                try:
                    executor.run(writer)
                finally:
                    writer.close()
                    journal.close()
            except BaseException as error:  # noqa: BLE001 - told to whoever waits for the result
                self._error = error
            finally:
                self._error = self._error or executor.problem
                self._over.set()

        threading.Thread(target=live, name=f"parflow-{self.run_id}", daemon=True).start()

    def _journal_broke(self, error: BaseException) -> None:
        """Without a journal nothing can be promised: the loop is left as it stands."""
        assert self._executor is not None
        self._error = error
        self._executor.give_up(error)


def letters_of(
    run: Run, step: str | None = None, error: str | type | None = None, source: str | os.PathLike[str] | None = None
) -> list[Letter]:
    """Return what `Run.failures` has, with the stage and input of each."""
    found = find_letters(run.state, lambda ref: pickle.loads(run.store.get_checked(ref)))
    return choose(found, step, error, source)


def fill(shape: Any, values: Sequence[Any]) -> Any:
    """Put values in the places of their numbers, in the structure that a workflow returned."""
    if isinstance(shape, bool) or shape is None:
        return shape
    if isinstance(shape, int):
        return values[shape]
    if isinstance(shape, dict):
        return {key: fill(item, values) for key, item in shape.items()}
    return like(shape, [fill(item, values) for item in shape])


def status_of(row: RunRow) -> str:
    """Tell a run's status from its newest status entry and its lease."""
    if row.status == "RunEnded":
        entry = decode(row.status, row.status_body or b"{}")
        return str(getattr(entry, "status", "lost"))
    return "running" if row.lease is not None and row.lease.alive else "lost"


def _end_as_cancelled(journal: Journal, run_id: str) -> None:
    """Take a run over that nobody runs, and write its end; `FencedError` when it came to another end meanwhile."""
    epoch = journal.acquire(run_id, this_process(), time.time())
    try:
        if status_of(journal.find(run_id, STATUS_KINDS)) not in ("running", "stopped"):
            raise FencedError(run_id, epoch, epoch)
        journal.append(run_id, epoch, [encode(RunEnded("cancelled", "RunCancelledError", (run_id,)))], time.time())
    finally:
        journal.release(run_id, epoch)


def find_code(row: RunRow) -> None:
    """Look for the run's code where its process looked, after this process's own places."""
    sys.path.extend(folder for folder in row.note.get("path", ()) if folder not in sys.path)


def load_plan(state: RunState, store: Store) -> tuple[Plan, Any]:
    """Open the plan and the shape of the results as they were when the run started."""
    assert state.started is not None
    return open_plan(store, state.started.plan)


def find(home: str, name: str) -> tuple[RunRow, Journal]:
    """Return a run's row, and the journal that has it, which the caller closes."""
    journal = open_home(home)
    return journal.find(name, STATUS_KINDS), journal


def find_run(name: str = "last", home: str | os.PathLike[str] | None = None) -> RunRow:
    """Return a run's row in the journal."""
    row, journal = find(home_folder(home), name)
    journal.close()
    return row


def list_runs(home: str | os.PathLike[str] | None = None) -> list[RunRow]:
    """Return all runs of a home, newest first."""
    journal = open_home(home_folder(home))
    try:
        return journal.runs(STATUS_KINDS)
    finally:
        journal.close()


def open_run(name: str = "last", home: str | os.PathLike[str] | None = None) -> Run:
    """Look at a run in the journal.

    Parameters
    ----------
    name : str
        Its name, a beginning of it that no other run shares, or "last".
    home : path-like, optional
        Where the journal is.

    Raises
    ------
    RunNotFoundError
        When there is none.

    Examples
    --------
    >>> import parflow as pf, tempfile
    >>> home = tempfile.mkdtemp()
    >>> run = pf.items([1, 2, 3]).reduce(pf.sum()).run(home=home, isolation="inline")
    >>> pf.open_run(home=home).result()
    6
    """
    return Run(find_run(name, home).run_id, home_folder(home))


def begun(journal: Journal, run_id: str) -> RunState:
    """Fold a run's entries.

    Raises
    ------
    ResumeError
        When it was lost before it began.
    """
    state = fold(decode(entry.kind, entry.body) for entry in journal.read(run_id))
    if state.started is None or state.owned is None:
        raise ResumeError(f"run {run_id} was lost before it began, and nothing of it was done. Start it again.")
    return state

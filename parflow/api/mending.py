"""Making up for what a run's results leave out, and taking them to be right all the same."""

from __future__ import annotations

import getpass
import os
import pickle
from collections.abc import Iterator
from typing import Any

from parflow.api.changes import check_inputs
from parflow.api.runs import Run, find, home_folder
from parflow.api.starting import Given, go_on
from parflow.core.entries import Accepted, Compensating, Entry, Redone, Redriven
from parflow.core.history import RunState
from parflow.core.plan import Stage
from parflow.core.state import StageState
from parflow.errors import ResumeError
from parflow.model import Cursor, Failure
from parflow.runtime.program import fetch
from parflow.storage.store import Store, open_store
from parflow.views.failures import Letter, choose, find_letters


def redrive(
    name: str = "last",
    *,
    step: str | None = None,
    error: str | type | None = None,
    source: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    cluster: Any = "local",
    timeout: float | str | None = None,
    memory: float | str | None = None,
    home: str | os.PathLike[str] | None = None,
    wait: bool = True,
    progress: bool | None = None,
) -> Run:
    """Make up for what a run's results leave out: dead letters, and records that came too late for the deadline of a reduction.

    They are run now and merged with the others. What rests on them is made again, sinks are brought up to date; all else is
    used as it is. A record that failed before anything was made of it is run alone; where part of it went on (behind a
    `flat_map`, or in a graph that forks before the step) the piece that it was in is run again as a whole.

    Parameters
    ----------
    name : str
        The run's name, a beginning of it, or "last".
    step, error, source
        Only dead letters of this step, with this error (a class or its name; base classes match), of these inputs (a path or a
        glob). Without them all are meant, and late records.
    workers, cluster, timeout, memory, home, wait, progress
        As for `resume`.

    Returns
    -------
    Run
        The same run.

    Raises
    ------
    ResumeError
        When nothing is missing, or nothing of it can be run again.
    InputsChangedError
        When files that it would have to read have changed; nothing is forgotten then.
    RunOwnedError
        When its process is alive.

    Examples
    --------
    >>> import parflow as pf, tempfile, time
    >>> home = tempfile.mkdtemp()
    >>> slow = pf.items([0, 0, 0.5], chunk_records=1).map(lambda s: time.sleep(s) or 1)
    >>> run = slow.reduce(pf.sum(), deadline=0.25).run(home=home, isolation="inline")
    >>> run.result() < 3, len(run.missing())
    (True, 1)
    >>> pf.redrive(home=home).result()
    3
    """
    where = home_folder(home)
    row, journal = find(where, name)

    def entries(state: RunState) -> list[Entry]:
        every = step is None and error is None and source is None
        late = tuple((number, output) for number, stage in enumerate(state.stages) for output in stage.cuts) if every else ()
        parts = tuple(_parts(open_store(row.note["store"]), state, step, error, source))
        if not late and not parts:
            calls = choose(find_letters(state, lambda _: ()), step, error, source)
            if any(letter.stage < 0 for letter in calls):
                return []  # to go on makes a failed call again
            raise ResumeError(f"run {row.run_id} has nothing to be redriven: {_nothing(state, every=every)}")
        entry = Redriven(late, parts)
        state.apply(entry)
        check_inputs(row.run_id, state)  # those of what is made again among them
        return [entry]

    given = Given(None, timeout, memory, None)
    return go_on(where, row, journal, given, entries, cluster=cluster, workers=workers, wait=wait, progress=progress)


def _nothing(state: RunState, *, every: bool) -> str:
    if any(stage.rejected for stage in state.stages):
        return "what failed are inputs that could not be listed; start the run anew once they are right"
    return "no result of it leaves anything out" if every else "no dead letter is like that; `parflow failures` lists them"


def _parts(store: Store, state: RunState, step: Any, error: Any, source: Any) -> Iterator[Redone]:
    """Yield what has to be run again for the dead letters that were chosen, each part of a chunk once."""
    stages: list[Stage] = []
    if state.started is not None:
        for code in (state.started.plan, *state.codes):
            stages += fetch(store, code).plan.stages
    for number, stage in enumerate(state.stages):
        found: dict[Redone, None] = {}
        for first, failure in _failures(store, stage):
            if choose([_letter(number, stage, failure)], step, error, source):
                found[_part(number, stages[number].trunk, first, failure)] = None
        whole = {part.chunk for part in found if part.first < 0 and part.record is None}
        pieces = {
            (part.chunk, ordinal)
            for part in found
            if part.first >= 0
            for ordinal in range(part.first, part.first + stage.chunks[part.chunk].receipts[part.first].tally.records)
        }
        for part in found:
            inside = part.record is not None and (part.chunk, part.record.ordinal) in pieces
            if not inside and (part.chunk not in whole or (part.first < 0 and part.record is None)):
                yield part


def _failures(store: Store, stage: StageState) -> Iterator[tuple[int, Failure]]:
    """Yield dead letters, each with the first record of the piece that committed it (-1: it ended its child)."""
    for failure in stage.lost:
        yield -1, failure
    for first, receipt in stage.pieces():
        for failure in pickle.loads(store.get_checked(receipt.failures)) if receipt.failures is not None else ():
            if stage.stands(first, failure):
                yield first, failure


def _letter(number: int, stage: StageState, failure: Failure) -> Letter:
    parts = stage.chunks[failure.chunk].chunk.parts
    return Letter(failure, number, parts[failure.part].path if 0 <= failure.part < len(parts) else "")


def _part(number: int, trunk: frozenset[str], first: int, failure: Failure) -> Redone:
    chunk, ordinal = failure.chunk, failure.ordinal
    if failure.cause == "input" or failure.part < 0:  # how many records it stands for is not known
        return Redone(number, chunk)
    if first >= 0 and (failure.step not in trunk or ordinal == first):
        return Redone(number, chunk, first)
    return Redone(number, chunk, -1, Cursor(ordinal, failure.part, failure.offset), failure.step)


def accept(
    name: str = "last",
    *,
    by: str | None = None,
    workers: int | None = None,
    cluster: Any = "local",
    home: str | os.PathLike[str] | None = None,
    wait: bool = True,
    progress: bool | None = None,
) -> Run:
    """Take a run's results to be right although more failed than is tolerated: its barriers open over what failed.

    The journal says who accepted how many dead letters of which stage. More failures than those are not accepted.

    Parameters
    ----------
    name : str
        The run's name, a beginning of it, or "last".
    by : str, optional
        Who accepts; by default the user of this process.
    workers, cluster, home, wait, progress
        As for `resume`.

    Returns
    -------
    Run
        The same run, which goes on.

    Raises
    ------
    ResumeError
        When no barrier is closed over failures.
    RunOwnedError
        When its process is alive.

    Examples
    --------
    >>> import parflow as pf, tempfile
    >>> home = tempfile.mkdtemp()
    >>> run = pf.items(["1", "2", "x"]).map(int).reduce(pf.sum()).run(home=home, isolation="inline")
    >>> run.status
    'failed'
    >>> pf.accept(home=home).result()
    3
    """
    where = home_folder(home)
    row, journal = find(where, name)
    who = by or f"{getpass.getuser()}@{os.uname().nodename}"

    def entries(state: RunState) -> list[Entry]:
        found = [
            Accepted(number, stage.failed, who)
            for number, stage in enumerate(state.stages)
            if not stage.opened and stage.failed > stage.accepted
        ]
        if not found:
            raise ResumeError(f"run {row.run_id} has nothing to be accepted: no barrier of it is closed over failures")
        for entry in found:
            state.apply(entry)
        check_inputs(row.run_id, state)
        return [*found]

    given = Given(None, None, None, None)
    return go_on(where, row, journal, given, entries, cluster=cluster, workers=workers, wait=wait, progress=progress)


def compensate(
    name: str = "last",
    *,
    workers: int | None = None,
    cluster: Any = "local",
    home: str | os.PathLike[str] | None = None,
    wait: bool = True,
    progress: bool | None = None,
) -> Run:
    """Undo all that a run did that is over without a result, the newest first, each once; it can't go on afterwards.

    What is undone is what compensable steps did (`task(compensate=…)`). A process that dies meanwhile is replaced by
    `resume`, which goes on undoing. What can't be undone is among `Run.failures`, and the run has then ended
    ``compensation_failed``; `resume` tries it once more.

    Parameters
    ----------
    name : str
        The run's name, a beginning of it, or "last".
    workers, cluster, home, wait, progress
        As for `resume`.

    Returns
    -------
    Run
        The same run, cancelled in the end.

    Raises
    ------
    ResumeError
        When it succeeded, or was undone before.
    RunOwnedError
        When its process is alive: `Run.cancel` asks that one.

    Examples
    --------
    >>> import parflow as pf, tempfile
    >>> from pathlib import Path
    >>> home, paid = tempfile.mkdtemp(), Path(tempfile.mkdtemp(), "paid")
    >>> pay = pf.task(compensate=lambda _: paid.unlink())(lambda number: paid.touch() or number)
    >>> paid_one = pf.items([1]).map(pay).reduce(pf.count())
    >>> graph = pf.call(lambda count: 1 // (count - 1), paid_one)
    >>> graph.run(home=home, isolation="inline").status, paid.exists()
    ('failed', True)
    >>> pf.compensate(home=home).status, paid.exists()
    ('cancelled', False)
    """
    where = home_folder(home)
    row, journal = find(where, name)

    def entries(state: RunState) -> list[Entry]:
        if state.status == "succeeded":
            raise ResumeError(f"run {row.run_id} has succeeded: what it did stands")
        entry = Compensating("cancelled", "RunCancelledError", (row.run_id,))
        state.apply(entry)
        return [entry]

    given = Given(None, None, None, None)
    return go_on(where, row, journal, given, entries, cluster=cluster, workers=workers, wait=wait, progress=progress)

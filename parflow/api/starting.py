"""Starting runs, and going on with them."""

from __future__ import annotations

import base64
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from parflow.api.changes import check_code, check_inputs
from parflow.api.runs import Run, begun, find, find_code, home_folder, open_home, status_of
from parflow.core.entries import Entry, Owned, RunStarted, encode
from parflow.core.history import RunState, fold
from parflow.core.plan import Plan
from parflow.core.rules import Overrides
from parflow.errors import ResumeError, UsageError
from parflow.model import nbytes, seconds
from parflow.policies import Retry, Tolerance
from parflow.runtime.executor import Executor, Options
from parflow.runtime.program import Program, fetch, keep
from parflow.runtime.session import SESSIONS
from parflow.storage.effects import Effects
from parflow.storage.journal import Journal, RunRow, this_process
from parflow.storage.store import open_store

if TYPE_CHECKING:
    from parflow.runtime.cluster import Hands
    from parflow.runtime.sandbox import Sandbox

FAN_IN = 16


def start(
    plan: Plan,
    *,
    shape: Any,
    flow: str,
    workers: int | None = None,
    cluster: Any = "local",
    max_failures: float = 0,
    timeout: float | str | None = None,
    memory: float | str | None = None,
    isolation: Literal["process", "inline"] = "process",
    retry: Retry | int | Mapping[str, Retry | int] | None = None,
    compensate: bool = False,
    grace: float | str = 30.0,
    slice: float | str = 30.0,  # noqa: A002 - the word of the docs
    home: str | os.PathLike[str] | None = None,
    store: str | None = None,
    wait: bool = True,
    progress: bool | None = None,
    note: dict[str, Any] | None = None,
) -> Run:
    """Start a run. The options are documented at `parflow.Bound.run`."""
    Tolerance(max_failures)
    options = replace(_options(timeout, memory, isolation, slice), grace=seconds(grace), compensate=compensate)
    if retry is not None:
        from parflow.runtime.code import dumps

        options = replace(options, retry=base64.b64encode(dumps(Overrides.of(retry))).decode("ascii"))
    workers = _workers(workers)
    where = home_folder(home)
    for stage in plan.stages:
        stage.source.check()
        for output in stage.outputs:
            if output.kind == "sink":
                output.body.check()
    run_id = f"{_word(flow)}-{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    journal = open_home(where)
    url = f"{store.rstrip('/')}/{run_id}" if store else os.path.join(where, "runs", run_id)
    place = open_store(url)
    if plan.undoes:
        Effects(place)  # which refuses a store that can't keep them
    made = keep(place, plan, shape)
    program = Program(made, Overrides.unpack(options.retry))
    facts = plan.facts()
    started = RunStarted(flow, made.key, facts.stages, FAN_IN, _versions(), facts.tasks, facts.calls, plan.targets)
    owned = Owned(1, f"{os.uname().nodename}:{os.getpid()}", max_failures, asdict(options))
    kept = {"store": place.url, "path": sys.path, **(note or {})}
    began = time.time()
    epoch = journal.begin(run_id, flow, began, kept, this_process(), [encode(started), encode(owned)])
    connect = _connector(cluster, workers, program, options)
    run = Run(run_id, where, Executor(run_id, program, fold([started, owned]), place, connect, options, began))
    return _go(run, journal, epoch, wait=wait, progress=progress)


def resume(
    name: str = "last",
    *,
    plan: Plan | None = None,
    workers: int | None = None,
    cluster: Any = "local",
    max_failures: float | None = None,
    timeout: float | str | None = None,
    memory: float | str | None = None,
    home: str | os.PathLike[str] | None = None,
    force: bool = False,
    wait: bool = True,
    progress: bool | None = None,
) -> Run:
    """Go on with a run that was stopped, failed, or lost with its process.

    Parameters
    ----------
    name : str
        The run's name, a beginning of it, or "last".
    plan : Plan, optional
        The workflow as it is now, to see whether its code changed; by default what the run recorded is run.
    workers, cluster, timeout, memory, wait, progress
        As for `parflow.Bound.run`; nothing of it changes the result.
    max_failures : float, optional
        A new tolerance; by default the run's own.
    home : path-like, optional
        Where the journal is.
    force : bool
        Go on with the recorded code although the workflow changed, and with changed inputs as dead letters.

    Returns
    -------
    Run
        The same run.

    Raises
    ------
    RunOwnedError
        When its process is alive.
    CodeChangedError, InputsChangedError
        When going on would mix two versions; see ``force``.

    Examples
    --------
    >>> import parflow as pf, tempfile
    >>> home = tempfile.mkdtemp()
    >>> run = pf.items(["1", "2", "x"]).map(int).reduce(pf.sum()).run(home=home, isolation="inline")
    >>> run.status
    'failed'
    >>> pf.resume(home=home, max_failures=1).result()
    3
    """

    def entries(state: RunState) -> list[Entry]:
        assert state.started is not None
        if not force:
            if plan is not None:
                check_code(row.run_id, state.started, plan)
            check_inputs(row.run_id, state)
        return []

    where = home_folder(home)
    row, journal = find(where, name)
    if status_of(row) == "succeeded":
        journal.close()
        return Run(row.run_id, where)
    given = Given(max_failures, timeout, memory, None if force else plan)
    return go_on(where, row, journal, given, entries, cluster=cluster, workers=workers, wait=wait, progress=progress)


@dataclass(frozen=True, slots=True)
class Given:
    """What is given anew to a run that goes on."""

    max_failures: float | None
    timeout: float | str | None
    memory: float | str | None
    plan: Plan | None


def _check_not_undone(run_id: str, state: RunState) -> None:
    if state.compensating is not None and state.ended is not None and state.ended.status != "compensation_failed":
        raise ResumeError(f"run {run_id} can't go on: what it did was undone. Start it anew")


def go_on(
    where: str,
    row: RunRow,
    journal: Journal,
    given: Given,
    entries: Callable[[RunState], list[Entry]],
    *,
    cluster: Any,
    workers: int | None,
    wait: bool,
    progress: bool | None,
) -> Run:
    """Take a run over, once ``entries`` has looked at its state: what it returns stands in it, and is written first."""
    run_id = row.run_id
    try:
        epoch = journal.acquire(run_id, this_process(), time.time())
        state = begun(journal, run_id)
        assert state.owned is not None
        assert state.started is not None
        place = open_store(row.note["store"], create=False)
        find_code(row)
        _check_not_undone(run_id, state)
        new = entries(state)
        options = Options(**state.owned.options)
        program = Program(fetch(place, state.started.plan, given.plan), Overrides.unpack(options.retry))
        for code in state.codes:
            program.add(fetch(place, code))
        options = replace(
            options,
            timeout=seconds(given.timeout) if given.timeout is not None else options.timeout,
            memory=nbytes(given.memory) if given.memory is not None else options.memory,
        )
        limit = state.owned.max_failures if given.max_failures is None else given.max_failures
        Tolerance(limit)
        owned = Owned(epoch, f"{os.uname().nodename}:{os.getpid()}", limit, asdict(options))
        journal.append(run_id, epoch, [encode(entry) for entry in (*new, owned)], time.time())
        state.apply(owned)
    except BaseException:
        journal.close()
        raise
    connect = _connector(cluster, _workers(workers), program, options)
    run = Run(run_id, where, Executor(run_id, program, state, place, connect, options, row.created))
    return _go(run, journal, epoch, wait=wait, progress=progress)


def _go(run: Run, journal: Journal, epoch: int, *, wait: bool, progress: bool | None) -> Run:
    run._launch(journal, epoch)  # noqa: SLF001 - the other half of starting
    if wait:
        if progress or (progress is None and sys.stderr.isatty()):
            from parflow.views.progress import show_progress

            show_progress(run)
        else:
            run.wait()
    return run


def _word(flow: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in flow).strip("-")[:40] or "run"


def _workers(workers: int | None) -> int:
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise UsageError(f"workers is {workers}; at least one is needed")
    return workers


def _options(timeout: float | str | None, memory: float | str | None, isolation: Any, duration: float | str) -> Options:
    if isolation not in ("process", "inline"):
        raise UsageError(f"isolation is {isolation!r}; it is 'process' (children, the default) or 'inline' (none)")
    return Options(
        seconds(timeout) if timeout is not None else None,
        nbytes(memory) if memory is not None else None,
        seconds(duration),
        isolation,
    )


def _connector(cluster: Any, workers: int, program: Program, options: Options) -> Callable[[], Hands]:
    if cluster is None or cluster == "local":

        def warm(sandbox: Sandbox) -> None:
            if options.isolation == "process":
                memory = program.stages[0].memory(options.memory) if program.stages else options.memory
                sandbox.warm(workers, program.preload, memory)

        return lambda: SESSIONS.hands(workers, warm)

    def connect() -> Hands:
        from parflow.runtime.cluster import connect as reach

        return reach(cluster)

    return connect


def _versions() -> dict[str, str]:
    from parflow import __version__

    return {"parflow": __version__, "python": sys.version.split()[0]}

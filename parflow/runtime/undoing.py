"""Undo after the fact: what a record whose child died, or a whole run, has done outside."""

from __future__ import annotations

import time
from dataclasses import replace

from parflow.core.plan import Stage
from parflow.errors import RecordError
from parflow.model import Cursor, Failure, Receipt, Tally, UndoJob
from parflow.nodes import Task
from parflow.runtime.marker import CALL, STEP, STOP, put
from parflow.runtime.once import newest_first, record_folder, undo
from parflow.runtime.pipeline import Context, describe, keep
from parflow.storage.effects import Effect, Effects


def run_undo(code: Stage | Task, job: UndoJob, context: Context) -> Receipt:
    """Undo what stands of some effects, the newest first, each once; done half-way and made again, it goes on.

    Parameters
    ----------
    code : Stage or Task
        Whose code undoes them.
    job : UndoJob
        Which ones.
    context : Context
        Store, names and marker; whoever watches the marker enforces the steps' timeouts.

    Returns
    -------
    Receipt
        ``done``, or ``stopped`` because the marker asked for it. ``tally.records`` counts the effects that were looked at,
        those undone before among them; ``tally.failed`` those that stand or are in doubt, with a `Failure` each that says why.
    """
    started, clock = time.time(), time.perf_counter()
    effects, marker = Effects(context.store), context.marker
    names = dict.fromkeys((*job.effects, *(e.id for record in job.records for e in effects.of(record_folder(record)))))
    failures: list[Failure] = []
    found = newest_first(effects.look(name) for name in names)
    looked = 0
    for effect in found:
        if marker[STOP] and looked:
            break
        looked += 1
        put(marker, (looked, 0, 0, 0))
        marker[STEP] = effect.number
        marker[CALL] += 1
        why = _undone(code, job, effects, effect)
        if why is not None:
            failures.append(replace(describe(why, record=effect.record, step=effect.step, cause="exception"), traceback=""))
    marker[STEP] = 0
    return Receipt(
        "done" if looked == len(found) else "stopped",
        cursor=None if looked == len(found) else Cursor(looked),
        failures=keep("failures", failures, context.named("failures")) if failures else None,
        failure=failures[0] if failures else None,
        tally=Tally(looked, len(failures), seconds=time.perf_counter() - clock),
        started=started,
    )


def _undone(code: Stage | Task, job: UndoJob, effects: Effects, effect: Effect) -> RecordError | None:
    mine = effect.unit == job.unit and effect.number > 0
    task = None if not mine else code if isinstance(code, Task) else code.steps[effect.number - 1].task
    return undo(effects, effect.id, None if task is None else task.compensate)

"""What changed since a run began: its workflow's code, and its inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable

from parflow.core.entries import RunStarted
from parflow.core.history import RunState
from parflow.core.plan import Plan
from parflow.errors import CodeChangedError, InputsChangedError
from parflow.model import Chunk


def check_code(run_id: str, started: RunStarted, plan: Plan) -> None:
    """Compare a plan with the one that a run was started with.

    Raises
    ------
    CodeChangedError
        Naming what changed.
    """
    facts = plan.facts()
    changed = []
    if len(facts.stages) != len(started.stages):
        changed.append(f"it had {len(started.stages)} stages and has {len(facts.stages)}")
    if facts.calls != started.calls:
        changed.append(f"its {len(started.calls)} calls are {len(facts.calls)} now, or wait for other results")
    for new, old in zip(facts.stages, started.stages, strict=False):
        names = ["read", *old.steps, *old.outputs]
        if (new.steps, new.outputs, new.kinds) != (old.steps, old.outputs, old.kinds):
            changed.append(f"the steps were {', '.join(names)} and are {', '.join(['read', *new.steps, *new.outputs])}")
        else:
            pairs = zip(names, old.fingerprints, new.fingerprints, strict=True)
            changed += [f"step {name!r} changed" for name, before, now in pairs if before != now]
    pairs_of_tasks = zip(facts.tasks, started.tasks, strict=False)
    changed += [f"task {old.name!r} changed, or what it is given" for new, old in pairs_of_tasks if new != old]
    if changed:
        raise CodeChangedError(run_id, "; ".join(changed))


def check_inputs(run_id: str, state: RunState) -> None:
    """Compare the files of what is still to be run with what they were when listed.

    Raises
    ------
    InputsChangedError
        Naming the first that changed.
    """
    from parflow.storage.sources.opening import is_remote, local_stamp

    changed: list[str] = []
    for stage in state.stages:
        waiting: Iterable[Chunk] = (stage.chunks[number].chunk for number in sorted({n for n, _ in stage.pending}))
        for path, (size, stamp) in {p.path: (p.size, p.stamp) for chunk in waiting for p in chunk.parts}.items():
            if is_remote(path) or not os.path.isabs(path):
                continue
            try:
                now = os.stat(path)
            except OSError:
                changed.append(path)
            else:
                if (now.st_size, local_stamp(now)) != (size, stamp):
                    changed.append(path)
    if changed:
        raise InputsChangedError(run_id, len(changed), changed[0])

"""User code as bytes: what a step holds is pickled by value where it must, and named where it can't be."""

from __future__ import annotations

import copyreg
import io
import types
from typing import Any

import cloudpickle

from parflow.core.plan import Plan, Stage
from parflow.errors import CodeError
from parflow.nodes import Task


def _code(code: types.CodeType) -> Any:
    """Keep the file's name, which cloudpickle leaves out: a traceback is there to be read."""
    make, arguments = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return make, tuple(code.co_filename if part == "<dynamic-code>" else part for part in arguments)


_OWN = {**cloudpickle.Pickler.dispatch_table.maps[0], types.CodeType: _code}


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    @property
    def dispatch_table(self) -> dict[type, Any]:
        """Return cloudpickle's table as one dict: its ChainMap is asked in Python for each object."""
        return {**copyreg.dispatch_table, **_OWN}


def dumps(value: Any) -> bytes:
    """Pickle a value with the functions and classes of scripts, notebooks and flow files in it."""
    out = io.BytesIO()
    _Pickler(out, protocol=5).dump(value)
    return out.getvalue()


def pack(stage: Stage) -> bytes:
    """Pickle a stage.

    Raises
    ------
    CodeError
        Naming the step, and what it uses, that can't travel.
    """
    try:
        return dumps(stage)
    except Exception as error:
        raise _unpicklable(stage, error) from error


def pack_task(task: Task) -> bytes:
    """Pickle a task.

    Raises
    ------
    CodeError
        Naming it, and what it uses, that can't travel.
    """
    try:
        return dumps(task)
    except Exception as error:
        raise _refused(task, error) from error


def refused_arguments(plan: Plan, error: BaseException) -> CodeError:
    """Return the error that names the call whose arguments can't travel."""
    for call in plan.calls:
        if _fails(call.arguments):
            return CodeError(call.name, f"what it is given can't travel to another process: {error}. Make it inside the task.")
    return CodeError(plan.name, f"its plan can't travel to another process: {error}")


def _fails(thing: Any) -> bool:
    try:
        dumps(thing)
    except Exception:  # noqa: BLE001 - any refusal is one
        return True
    return False


def _unpicklable(stage: Stage, error: BaseException) -> CodeError:
    for step in stage.steps:
        if _fails(step.task.function):
            return _refused(step.task, error)
        if _fails(step.arguments):
            return CodeError(step.task.name, f"what it is given can't travel to another process: {error}")
    for output in stage.outputs:
        if _fails(output.body):
            return CodeError(output.name, f"it can't travel to another process: {error}")
    return CodeError(stage.name, str(error))


def _refused(task: Task, error: BaseException) -> CodeError:
    culprits = [f"{name!r} ({type(thing).__name__})" for name, thing in _held(task.function).items() if _fails(thing)]
    what = f"it uses {', '.join(culprits)}, which can't travel to another process" if culprits else str(error)
    return CodeError(task.name, f"{what}. Make it inside the function, where it is used.")


def _held(function: Any) -> dict[str, Any]:
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    held = {name: cell.cell_contents for name, cell in cells}
    return held | {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}

"""Finding a workflow by the name of its file or module."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from parflow.api.tasks import Bound, Workflow
from parflow.core.plan import Plan
from parflow.errors import CodeChangedError, UsageError


def load_flow(target: str) -> Workflow:
    """Find a workflow by ``file.py``, ``file.py:name`` or ``module:name``.

    Raises
    ------
    UsageError
        When there's no such file or name, or when a file has several workflows and none was named.
    """
    import cloudpickle

    place, _, name = target.rpartition(":") if ":" in target else (target, "", "")
    if place.endswith(".py"):
        if not os.path.isfile(place):
            raise UsageError(f"there is no file {place!r}")
        module_name = os.path.splitext(os.path.basename(place))[0]
        folder = os.path.dirname(os.path.abspath(place))
        if folder not in sys.path:
            sys.path.insert(0, folder)
        spec = importlib.util.spec_from_file_location(module_name, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise UsageError(f"can't import {place!r}: {error}; write file.py, file.py:name or module:name") from error
    cloudpickle.register_pickle_by_value(module)  # workers need not have the flow's own file
    flows = {key: value for key, value in vars(module).items() if isinstance(value, Workflow)}
    if name:
        if name not in flows:
            raise UsageError(f"{place} has no workflow {name!r}; it has {', '.join(flows) or 'none'}")
        return flows[name]
    if len(flows) != 1:
        raise UsageError(f"{place} has {len(flows)} workflows ({', '.join(flows) or 'none'}); name one: {place}:NAME")
    return next(iter(flows.values()))


def note_of(target: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what a run has to remember to find its workflow again."""
    return {"flow": {"target": target, "folder": os.getcwd(), "arguments": arguments}}


def plan_again(run_id: str, note: dict[str, Any]) -> Plan | None:
    """Plan a recorded run's workflow as its file has it now; None when it can't be found any more.

    Raises
    ------
    CodeChangedError
        When it's there and can't be planned.
    """
    flow = note.get("flow")
    if not flow or not os.path.isdir(flow["folder"]):
        return None
    here = os.getcwd()
    os.chdir(flow["folder"])  # its file and its paths were named from there
    try:
        return _plan(load_flow(flow["target"])(**flow["arguments"]))
    except UsageError:
        return None
    except Exception as error:
        raise CodeChangedError(run_id, f"its workflow can't be planned any more: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(here)


def _plan(bound: Bound) -> Plan:
    return bound.plan()

"""Durable parallel data processing on Dask."""

from parflow.api.datasets import Dataset, Value, items, read_files, read_jsonl, read_lines
from parflow.api.runs import Records, Run, open_run, resume
from parflow.api.tasks import Bound, Workflow, task, workflow
from parflow.core.plan import Plan
from parflow.core.reducers import Reducer, concat, count, counter, max, mean, min, reducer, sum, top
from parflow.errors import ParflowError
from parflow.model import Failure, Task
from parflow.storage.sources.documents import Document

__version__ = "0.1.0"

__all__ = [
    # build
    "task",
    "workflow",
    "read_files",
    "read_jsonl",
    "read_lines",
    "items",
    # reduce
    "concat",
    "count",
    "counter",
    "max",
    "mean",
    "min",
    "reducer",
    "sum",
    "top",
    # look and go on
    "open_run",
    "resume",
    # types
    "Bound",
    "Dataset",
    "Document",
    "Failure",
    "ParflowError",
    "Plan",
    "Records",
    "Reducer",
    "Run",
    "Task",
    "Value",
    "Workflow",
]

"""Durable parallel data processing on Dask."""

from parflow.api.branches import call, expand, quorum, race, settle, switch, when
from parflow.api.datasets import Dataset
from parflow.api.lazy import Value
from parflow.api.mending import accept, compensate, redrive
from parflow.api.runs import Missing, Records, Run, open_run
from parflow.api.sources import from_dask, items, read_csv, read_files, read_jsonl, read_lines, read_parquet
from parflow.api.starting import resume
from parflow.api.tasks import Bound, Workflow, task, workflow
from parflow.core.plan import Plan
from parflow.core.reducers import (
    Histogram,
    Reducer,
    approx_distinct,
    concat,
    count,
    counter,
    distinct,
    frequent_items,
    histogram,
    max,
    mean,
    min,
    quantiles,
    reducer,
    sample,
    std,
    sum,
    top,
    var,
)
from parflow.errors import Cancelled, InDoubt, ParflowError
from parflow.model import Failure, Outcome
from parflow.nodes import Task
from parflow.policies import Breaker, Retry
from parflow.runtime.here import Here, context
from parflow.runtime.once import once
from parflow.storage.sources.documents import Document

__version__ = "0.1.0"

__all__ = [
    # build
    "task",
    "workflow",
    "read_csv",
    "read_files",
    "read_jsonl",
    "read_lines",
    "read_parquet",
    "items",
    "from_dask",
    # decide and fan out
    "call",
    "expand",
    "quorum",
    "race",
    "settle",
    "switch",
    "when",
    # reduce
    "approx_distinct",
    "concat",
    "count",
    "counter",
    "distinct",
    "frequent_items",
    "histogram",
    "max",
    "mean",
    "min",
    "quantiles",
    "reducer",
    "sample",
    "std",
    "sum",
    "top",
    "var",
    # within a task
    "context",
    "once",
    # look and go on
    "accept",
    "compensate",
    "open_run",
    "redrive",
    "resume",
    # types
    "Bound",
    "Breaker",
    "Cancelled",
    "Dataset",
    "Document",
    "Failure",
    "Here",
    "Histogram",
    "InDoubt",
    "Missing",
    "Outcome",
    "ParflowError",
    "Plan",
    "Records",
    "Reducer",
    "Retry",
    "Run",
    "Task",
    "Value",
    "Workflow",
]

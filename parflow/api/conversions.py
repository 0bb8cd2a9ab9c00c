"""From Dask's collections to records, and from records to frames of pandas and Dask."""

from __future__ import annotations

import functools
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parflow.api.tasks import current_workflow
from parflow.errors import CodeError, GraphError, OutputError

if TYPE_CHECKING:
    from pandas import DataFrame

    from parflow.api.datasets import Dataset

KINDS = "a dask.bag, a dask.dataframe, or a list of dask.delayed objects"


# --- from Dask ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partitions:
    """The partitions of a Dask collection, pickled one by one: each is a call of `compute_partition`."""

    delayed: Sequence[Any]

    def __iter__(self) -> Iterator[bytes]:
        """Cut the graph down to each partition in turn."""
        from dask.optimization import cull

        from parflow.runtime.code import dumps

        shared: Any = None
        graph: dict[Any, Any] = {}
        for index, one in enumerate(self.delayed):
            if one.dask is not shared:  # the partitions of one collection share its graph
                shared = one.dask
                graph = dict(shared)
            part, _ = cull(graph, [one.key])
            _refuse_futures(part.values())
            try:
                yield dumps(functools.partial(compute_partition, part, one.key))
            except Exception as error:
                raise CodeError("from_dask", f"partition {index} can't be pickled: {error}") from error


def partitions_of(collection: Any) -> tuple[Partitions, tuple[str, ...]]:
    """Return a collection's partitions, and the modules that computing them needs."""
    from dask.delayed import Delayed

    kind = type(collection).__module__.split(".")
    if isinstance(collection, (list, tuple)) and all(isinstance(one, Delayed) for one in collection):
        return Partitions(collection), ("dask.local",)
    if kind[:2] == ["dask", "bag"] and type(collection).__name__ == "Bag":
        _refuse_futures(collection.dask.values())  # its own optimisation would drop them
        return Partitions(collection.to_delayed()), ("dask.local",)
    if kind[:2] == ["dask", "dataframe"] and type(collection).__name__ == "DataFrame":
        import dask

        with dask.config.set({"dataframe.shuffle.method": "tasks"}):  # the other one needs a cluster
            return Partitions(collection.to_delayed()), ("dask.local", "dask.dataframe")
    hint = " Wrap it in a list." if isinstance(collection, Delayed) else ""
    hint = " Make it a dataframe: .to_frame()." if type(collection).__name__ == "Series" else hint
    raise GraphError(f"from_dask() takes {KINDS}, not a {type(collection).__module__}.{type(collection).__qualname__}.{hint}")


def _refuse_futures(nodes: Iterable[Any]) -> None:
    distributed = sys.modules.get("distributed")
    for node in nodes:
        if distributed is not None and isinstance(getattr(node, "value", node), distributed.Future):
            raise GraphError("from_dask() was given data that a cluster holds; give the collection as it was before persist()")


def compute_partition(graph: Mapping[Any, Any], key: Any) -> Iterable[Any]:
    """Compute one partition in this thread and return its records.

    Raises
    ------
    TypeError
        When what it gives is neither a DataFrame nor several records.
    """
    from dask.local import get_sync

    value = get_sync(graph, key)
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.DataFrame):
        if not value.columns.is_unique:
            raise TypeError(f"two columns have the same name: {', '.join(map(repr, value.columns))}")
        rows: list[dict[Any, Any]] = value.to_dict("records")
        return rows
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"a partition is a list of records or a pandas DataFrame, not a {type(value).__qualname__}")
    return value


# --- to pandas and Dask --------------------------------------------------------------------------------------------------


def to_pandas(dataset: Dataset, options: dict[str, Any]) -> DataFrame:
    """Run a dataset and make one DataFrame of its records."""
    _refuse_in_workflow("to_pandas")
    import pandas as pd

    records = list(dataset.run(**options).result())
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            what = f"record {number} is a {type(record).__qualname__}"
            raise GraphError(
                f"to_pandas() makes rows of dicts, but {what}. Make it one: .map(lambda record: {{'name': record}})"
            )
    return pd.DataFrame.from_records(records)


def to_dask_dataframe(
    dataset: Dataset,
    path: str | os.PathLike[str] | None,
    schema: Any,
    compression: str | None,
    overwrite: bool,
    options: dict[str, Any],
) -> Any:
    """Run a dataset into Parquet files and make a Dask DataFrame of them."""
    _refuse_in_workflow("to_dask_dataframe")
    from parflow.api.runs import home_folder

    if path is None:
        base = options.get("store") or home_folder(options.get("home"))
        path = f"{base.rstrip('/')}/frames/{time.strftime('%y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    value = dataset.write_parquet(path, schema=schema, compression=compression, overwrite=overwrite)
    manifest = value.run(**options).result()
    folder = os.fspath(path) if "://" in os.fspath(path) else os.path.abspath(path)
    return _frame([f"{folder}/{entry['path']}" for entry in manifest["files"]], schema)


def _refuse_in_workflow(name: str) -> None:
    if current_workflow() is not None:
        raise GraphError(
            f"{name}() runs at once, so it can't be a part of a workflow. Return the dataset, and call it outside."
        )


def _frame(files: list[str], schema: Any) -> Any:
    """Read files as they are when they have one schema, else each brought to what is common to all."""
    import dask.dataframe as dd
    import pandas as pd
    import pyarrow as pa

    schemas = [_schema(file) for file in files] or [schema or pa.schema([])]
    if files and all(other.equals(schemas[0]) for other in schemas):
        return dd.read_parquet(files, dtype_backend="pyarrow")
    try:
        common = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise OutputError(
            f"the files' columns don't go together: {error}. They are written; give schema= to fix types"
        ) from error
    meta = common.empty_table().to_pandas(types_mapper=pd.ArrowDtype)
    if not files:
        return dd.from_pandas(meta, npartitions=1)
    return dd.from_map(_read_as, files, schema=common, meta=meta, enforce_metadata=False)


def _schema(file: str) -> Any:
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(file, "rb") as stream:
        return pq.read_schema(stream)


def _read_as(file: str, schema: Any) -> DataFrame:
    import fsspec
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(file, "rb") as stream:
        table = pq.read_table(stream)
    names = {*table.schema.names}
    columns = [table[item.name].cast(item.type) if item.name in names else pa.nulls(len(table), item.type) for item in schema]
    frame: DataFrame = pa.table(columns, schema=schema).to_pandas(types_mapper=pd.ArrowDtype)
    return frame

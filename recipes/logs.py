"""Look at web-server logs many rows at a time, with pandas and Arrow.

Run it with `parflow run recipes/logs.py --source 'logs/*.csv' --max-failures 0.001 --workers 2`.
"""

from __future__ import annotations

import operator
from datetime import datetime
from typing import TYPE_CHECKING, Any

import parflow as pf

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

TOP = 5


def typed(row: dict[str, str]) -> dict[str, Any]:
    """Give a CSV row's text its types, row by row: a bad one is a dead letter, and costs its neighbours nothing."""
    return {
        "time": datetime.fromisoformat(row["time"]),
        "path": row["path"],
        "status": int(row["status"]),
        "bytes": int(row["bytes"]),
        "seconds": float(row["seconds"]),
    }


def prepare(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the hour, and cut off what was searched for: that's nobody's business."""
    frame = frame.astype({"status": "int64", "bytes": "int64", "seconds": "float64"})  # raises where Parquet has a null
    return frame.assign(path=frame["path"].str.partition("?")[0], hour=frame["time"].dt.strftime("%Y-%m-%d %H h"))


def server_errors(table: pa.Table) -> pa.Table:
    """Take the requests that the server failed at."""
    import pyarrow.compute as pc

    return table.filter(pc.greater_equal(table["status"], 500))


in_order = operator.itemgetter("hour", "status")


@pf.workflow
def logs(source: str, out: str = "out/errors") -> Any:
    """Write the requests of CSV or Parquet logs that failed to ``out``; return counts by hour, the top paths and latencies."""
    rows = pf.read_parquet(source) if source.endswith(".parquet") else pf.read_csv(source, quoted_newlines=False).map(typed)
    requests = rows.map_batches(prepare, 4096, as_="pandas")
    requests.map_batches(server_errors, 4096, as_="arrow").write_parquet(out)
    hours = requests.reduce_by(["hour", "status"], pf.count(), columns=("hour", "status", "requests"), buckets=1)
    paths = requests.reduce_by("path", pf.sum("bytes"), columns=("path", "bytes"), buckets=1)  # few keys: one bucket will do
    return {
        "requests": requests.reduce(pf.count()),
        "median and 95th percentile, s": requests.reduce(pf.quantiles([0.5, 0.95], "seconds")),
        "top paths": paths.reduce(pf.top(TOP, "bytes")),
        "by hour and status": pf.call(sorted, hours, key=in_order),
    }

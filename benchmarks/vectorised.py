"""Group 50 million measurements by station: parflow's Arrow batches beside dask.dataframe, on Parquet.

The rows are like those of the billion-row challenge (https://github.com/gunnarmorling/1brc): a station and a temperature. Each
variant runs in a fresh process, on two workers; the answers are compared. Run it with
`python benchmarks/vectorised.py --rounds 3`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import common

DATA = Path(__file__).resolve().parent / "data"
SEED = 20261125
STATIONS = 413
GROUP = 1_000_000
"""Rows of a row group, and of a batch."""

Stats = dict[str, tuple[float, float, float, int]]
"""Least, largest, sum and number of each station's temperatures."""


def rows_file(rows: int) -> Path:
    """Return the measurements; make them first if they aren't there."""
    path = DATA / f"measurements-{rows}-{SEED}.parquet"
    if not path.exists():
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        DATA.mkdir(exist_ok=True)
        random = np.random.default_rng(SEED)
        names = [f"station {number:03d}" for number in range(STATIONS)]
        schema = pa.schema([("station", pa.string()), ("temperature", pa.float64())])
        aside = path.with_suffix(".part")
        with pq.ParquetWriter(aside, schema) as out:
            for first in range(0, rows, GROUP):
                count = min(GROUP, rows - first)
                station = pa.DictionaryArray.from_arrays(random.integers(0, STATIONS, count), names).cast(pa.string())
                columns = {"station": station, "temperature": np.round(random.normal(12, 10, count), 1)}
                out.write_table(pa.table(columns, schema=schema))
        aside.rename(path)
    return path


# --- parflow -----------------------------------------------------------------------------------------------------------------


def partial(table: Any) -> Any:
    """Group one batch."""
    parts = [("temperature", name) for name in ("min", "max", "sum", "count")]
    return table.group_by("station").aggregate(parts)


def take(state: Stats, row: dict[str, Any]) -> Stats:
    least, largest, total, count = (row[f"temperature_{name}"] for name in ("min", "max", "sum", "count"))
    return merge(state, {row["station"]: (least, largest, total, count)})


def merge(a: Stats, b: Stats) -> Stats:
    for station, (least, largest, total, count) in b.items():
        old = a.get(station, (least, largest, 0.0, 0))
        a[station] = min(least, old[0]), max(largest, old[1]), total + old[2], count + old[3]
    return a


def with_parflow(path: str) -> Stats:
    import parflow as pf

    batches = pf.read_parquet(path).map_batches(partial, GROUP, "arrow")
    stats: Stats = batches.reduce(pf.reducer(dict, take, merge, name="stats")).run(workers=2).result()
    return stats


# --- dask.dataframe ----------------------------------------------------------------------------------------------------------


def with_dask(path: str, processes: bool) -> Stats:
    import dask.dataframe as dd
    from distributed import Client

    shape = {"n_workers": 2, "threads_per_worker": 1} if processes else {"n_workers": 1, "threads_per_worker": 2}
    with Client(processes=processes, dashboard_address=None, silence_logs=40, **shape):
        frame = dd.read_parquet(path, split_row_groups=4)
        made = frame.groupby("station").temperature.agg(["min", "max", "sum", "count"]).compute()
    return {str(name): (row["min"], row["max"], row["sum"], int(row["count"])) for name, row in made.iterrows()}


VARIANTS = {
    "dask-processes": lambda path: with_dask(path, processes=True),
    "dask-threads": lambda path: with_dask(path, processes=False),
    "parflow": with_parflow,
}


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--rows", type=int, default=50_000_000, help="measurements (default 50,000,000)")
    options.add_argument("--variant", choices=VARIANTS, help="run one and print its answer")
    given = options.parse_args()
    path = str(rows_file(given.rows))
    if given.variant:
        with common.scratch():
            begun = time.perf_counter()
            stats = VARIANTS[given.variant](path)
            spent = time.perf_counter() - begun
        total = {"rows": sum(one[3] for one in stats.values()), "sum": round(sum(one[2] for one in stats.values()), 3)}
        least, largest = min(one[0] for one in stats.values()), max(one[1] for one in stats.values())
        common.answer({**total, "stations": len(stats), "least": least, "largest": largest, "seconds": spent})
        return
    common.print_machine()
    command = [sys.executable, __file__, "--rows", str(given.rows), "--variant"]
    answers: list[dict[str, Any]] = []

    def check(name: str, sample: common.Sample) -> None:
        answer = {key: value for key, value in sample.answer.items() if key != "seconds"}
        answers.append(answer)
        assert answer == answers[0], f"{name}: {answer} is not {answers[0]}"

    samples = common.measure_in_turns({name: [*command, name] for name in VARIANTS}, given.rounds, check)
    rows = common.summary(samples)
    common.print_summary(rows, "dask-processes")
    common.write_json(given.json, rows)


if __name__ == "__main__":
    main()

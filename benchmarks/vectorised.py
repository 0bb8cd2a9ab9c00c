"""Group 50 million measurements by station, from Parquet and from CSV: parflow's Arrow batches beside dask.dataframe.

The rows are like those of the billion-row challenge (https://github.com/gunnarmorling/1brc): a station and a temperature;
120 MB of Parquet, 825 MB of CSV. Each variant runs in a fresh process, on two workers; the answers are compared.

    python benchmarks/vectorised.py --rounds 3                  # all variants on both formats
    python benchmarks/vectorised.py --rows 2000000 --rounds 1   # a quick look
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
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


# --- the measurements ----------------------------------------------------------------------------------------------------


def rows_file(rows: int, form: str) -> Path:
    """Return the measurements as ``parquet`` or ``csv``; make them first if they aren't there."""
    path = DATA / f"measurements-{rows}-{SEED}.{form}"
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        print(f"making {rows:,} rows in {path.relative_to(DATA.parent.parent)} (once)", file=sys.stderr, flush=True)
        aside = path.with_suffix(".part")
        (write_parquet if form == "parquet" else write_csv)(aside, tables(rows))
        aside.rename(path)
    return path


def tables(rows: int) -> Iterator[Any]:
    """Yield the measurements, a row group at a time: the same for the same number of rows."""
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(SEED)
    names = pa.array([f"station {number:03d}" for number in range(STATIONS)])
    for first in range(0, rows, GROUP):
        count = min(GROUP, rows - first)
        station = pa.DictionaryArray.from_arrays(random.integers(0, STATIONS, count), names).cast(pa.string())
        yield pa.table({"station": station, "temperature": pa.array(np.round(random.normal(12, 10, count), 1))})


def write_parquet(path: Path, made: Iterator[Any]) -> None:
    import pyarrow.parquet as pq

    first = next(made)
    with pq.ParquetWriter(path, first.schema) as out:
        out.write_table(first)
        for table in made:
            out.write_table(table)


def write_csv(path: Path, made: Iterator[Any]) -> None:
    from pyarrow import csv

    how = csv.WriteOptions(include_header=False, delimiter=";", quoting_style="none")
    with path.open("wb") as out:
        out.write(b"station;temperature\n")
        for table in made:
            csv.write_csv(table, out, how)


# --- parflow -------------------------------------------------------------------------------------------------------------


def partial(table: Any) -> Any:
    """Group one batch. From CSV, a temperature comes as text."""
    import pyarrow as pa

    numbers = table.set_column(1, "temperature", table["temperature"].cast(pa.float64()))
    parts = [("temperature", name) for name in ("min", "max", "sum", "count")]
    return numbers.group_by("station").aggregate(parts)


def take(state: Stats, row: dict[str, Any]) -> Stats:
    """Add a batch's numbers for one station."""
    least, largest, total, count = (row[f"temperature_{name}"] for name in ("min", "max", "sum", "count"))
    return merge(state, {row["station"]: (least, largest, total, count)})


def merge(a: Stats, b: Stats) -> Stats:
    """Add what is known of other rows."""
    for station, (least, largest, total, count) in b.items():
        old = a.get(station, (least, largest, 0.0, 0))
        a[station] = min(least, old[0]), max(largest, old[1]), total + old[2], count + old[3]
    return a


def with_parflow(path: str) -> Stats:
    """A table of partial results for each batch, merged."""
    import parflow as pf

    rows = pf.read_parquet(path) if path.endswith("parquet") else pf.read_csv(path, delimiter=";", quoted_newlines=False)
    batches = rows.map_batches(partial, GROUP, "arrow")
    stats: Stats = batches.reduce(pf.reducer(dict, take, merge, name="stats")).run(workers=2).result()
    return stats


# --- dask.dataframe ------------------------------------------------------------------------------------------------------


def with_dask(path: str, processes: bool, engine: str = "c") -> Stats:
    """The group-by on a local cluster; ``engine`` is what pandas reads CSV with."""
    import dask.dataframe as dd
    from distributed import Client

    shape = {"n_workers": 2, "threads_per_worker": 1} if processes else {"n_workers": 1, "threads_per_worker": 2}
    with Client(processes=processes, dashboard_address=None, silence_logs=40, **shape):
        if path.endswith("parquet"):
            frame = dd.read_parquet(path, split_row_groups=4)
        else:
            frame = dd.read_csv(path, sep=";", engine=engine)
        made = frame.groupby("station").temperature.agg(["min", "max", "sum", "count"]).compute()
    return {str(name): (row["min"], row["max"], row["sum"], int(row["count"])) for name, row in made.iterrows()}


VARIANTS: dict[str, Callable[[str], Stats]] = {
    "dask-processes": lambda path: with_dask(path, processes=True),
    "dask-threads": lambda path: with_dask(path, processes=False),
    "dask-processes-arrow": lambda path: with_dask(path, processes=True, engine="pyarrow"),
    "dask-threads-arrow": lambda path: with_dask(path, processes=False, engine="pyarrow"),
    "parflow": with_parflow,
}
DEFAULT = {
    "parquet": ("dask-processes", "dask-threads", "parflow"),
    "csv": ("dask-processes", "dask-processes-arrow", "dask-threads-arrow", "parflow"),
}


# --- comparing -----------------------------------------------------------------------------------------------------------


def digest(stats: Stats) -> str:
    """Return what two answers are compared by: temperatures have one digit behind the point, and so have their sums."""
    lines = [f"{name};{one[0]:.1f};{one[1]:.1f};{one[2]:.1f};{one[3]}" for name, one in sorted(stats.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def run_variant(name: str, path: Path) -> None:
    """Run one variant in this process and print its answer."""
    with common.scratch():
        begun = time.perf_counter()
        stats = VARIANTS[name](str(path))
        spent = time.perf_counter() - begun
    rows = sum(one[3] for one in stats.values())
    common.answer({"digest": digest(stats), "rows": rows, "stations": len(stats), "seconds": spent})


def compare(form: str, names: list[str], rows: int, rounds: int) -> tuple[dict[str, dict[str, float]], set[str]]:
    """Measure variants in turns and print the table; returns it, and the answer that all gave."""
    expected: set[str] = set()

    def check(name: str, sample: common.Sample) -> None:
        expected.add(sample.answer["digest"])
        if len(expected) > 1 or sample.answer["rows"] != rows:
            raise SystemExit(f"{name} gave another answer: {sample.answer}, {expected}")

    command = [sys.executable, __file__, "--rows", str(rows), "--format", form, "--variant"]
    table = common.summary(common.measure_in_turns({name: [*command, name] for name in names}, rounds, check))
    print(f"{form}, {rows_file(rows, form).stat().st_size / 1e6:,.0f} MB")
    common.print_summary(table, "dask-processes")
    return table, expected


def main() -> None:
    """Compare the variants."""
    options = common.parser(__doc__)
    options.add_argument("--rows", type=int, default=50_000_000, help="measurements (default 50,000,000)")
    options.add_argument("--format", choices=DEFAULT, nargs="+", default=[*DEFAULT], help="what they are read from")
    options.add_argument("--only", nargs="+", choices=VARIANTS, help="variants to compare")
    options.add_argument("--variant", choices=VARIANTS, help="run this one in this process, without measuring")
    given = options.parse_args()
    paths = {form: rows_file(given.rows, form) for form in given.format}
    if given.variant:
        run_variant(given.variant, paths[given.format[0]])
        return
    common.print_machine()
    found = {form: compare(form, [*(given.only or DEFAULT[form])], given.rows, given.rounds) for form in paths}
    answers = set[str]().union(*(expected for _, expected in found.values()))
    if len(answers) > 1:
        raise SystemExit(f"the formats give different answers: {answers}")
    print(f"equal answers: {answers.pop()}")
    common.write_json(given.json, {form: table for form, (table, _) in found.items()})


if __name__ == "__main__":
    main()

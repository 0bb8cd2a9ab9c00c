"""The recipe logs.py, on made-up web-server logs."""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import parflow as pf

recipe: Any = importlib.import_module("logs")
maker: Any = importlib.import_module("make_logs")
logs: pf.Workflow = recipe.logs

BROKEN = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("logs")
    maker.make_logs(place)
    return place


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of the logs that aren't broken, by the standard library alone."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            found += list(csv.DictReader(file))
    return [row for row in found if row["status"].isdecimal() and row["bytes"].isdecimal() and row["seconds"]]


@pytest.fixture(scope="module")
def parquet(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same rows as typed Parquet, in row groups."""
    place = tmp_path_factory.mktemp("parquet")
    frame = pd.DataFrame(rows).astype({"status": "int64", "bytes": "int64", "seconds": "float64"})
    frame["time"] = pd.to_datetime(frame["time"], utc=True)
    frame.to_parquet(place / "a.parquet", row_group_size=1000)
    return place


def rounded(seconds: float) -> float:
    """Return what the recipe's quantiles keep: three digits."""
    return float(f"{seconds:.2e}")


def expected(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Work everything out by plain loops over text."""
    seconds = sorted(rounded(float(row["seconds"])) for row in rows)
    sizes: Counter[str] = Counter()
    for row in rows:
        sizes[row["path"].split("?")[0]] += int(row["bytes"])
    hours = Counter((f"{row['time'][:10]} {row['time'][11:13]} h", int(row["status"])) for row in rows)
    return {
        "requests": len(rows),
        "median and 95th percentile, s": [seconds[math.ceil(q * len(rows)) - 1] for q in (0.5, 0.95)],
        "top paths": [{"path": path, "bytes": size} for path, size in sizes.most_common(5)],
        "by hour and status": [
            {"hour": hour, "status": status, "requests": count} for (hour, status), count in sorted(hours.items())
        ],
    }


def test_the_logs_are_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    maker.make_logs(tmp_path / "again")
    files = sorted(path.name for path in folder.glob("*.csv"))
    assert len(files) == 3
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


@pytest.mark.parametrize("workers", [1, 2])
def test_csv_logs_give_what_a_plain_loop_gives(folder: Path, tmp_path: Path, rows: list[dict[str, str]], workers: int) -> None:
    flow = logs(str(folder / "*.csv"), str(tmp_path / "out"))
    assert flow.run(home=tmp_path / "home", workers=workers, max_failures=BROKEN).result() == expected(rows)


def test_parquet_logs_give_the_same(parquet: Path, tmp_path: Path, rows: list[dict[str, str]]) -> None:
    run = logs(str(parquet / "*.parquet"), str(tmp_path / "out")).run(home=tmp_path / "home", workers=2)
    assert run.result() == expected(rows)


def test_requests_that_the_server_failed_at_are_written_as_parquet(
    folder: Path, tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    logs(str(folder / "*.csv"), str(tmp_path / "out")).run(home=tmp_path / "home", max_failures=BROKEN).result()
    written = pd.concat(pd.read_parquet(file) for file in sorted((tmp_path / "out").glob("*.parquet")))
    failed = [row for row in rows if row["status"] == "503"]
    assert len(failed) > 100
    assert written["time"].tolist() == [pd.Timestamp(row["time"]) for row in failed]
    assert written["path"].tolist() == [row["path"].split("?")[0] for row in failed]
    assert written["status"].unique().tolist() == [503]
    assert written["seconds"].tolist() == [float(row["seconds"]) for row in failed]


def test_broken_rows_are_dead_letters_that_name_their_place(folder: Path, tmp_path: Path) -> None:
    run = logs(str(folder / "*.csv"), str(tmp_path / "out")).run(home=tmp_path / "home", max_failures=BROKEN)
    run.result()
    seen = []
    for failure in run.dead_letters():
        assert (failure.step, failure.cause, failure.error) == ("typed", "exception", "ValueError")
        path, _, offset = failure.record.partition("#")
        row = Path(path).read_bytes()[int(offset) :].splitlines()[0].decode()
        seen.append(dict(zip(maker.COLUMNS, row.split(","), strict=True)))
    assert [(seen[0]["status"], seen[1]["seconds"], seen[2]["bytes"])] == [("-", "", "12e")]


def test_a_null_in_parquet_costs_its_own_row_alone(parquet: Path, tmp_path: Path, rows: list[dict[str, str]]) -> None:
    frame = pd.read_parquet(parquet / "a.parquet").head(50).astype({"bytes": "Int64"})
    frame.loc[7, "bytes"] = None
    frame.to_parquet(tmp_path / "a.parquet")
    run = logs(str(tmp_path / "a.parquet"), str(tmp_path / "out")).run(home=tmp_path / "home", max_failures=1)
    assert run.result() == expected(rows[:7] + rows[8:50])
    assert [failure.step for failure in run.dead_letters()] == ["prepare"]


def test_the_command_line_prints_the_same(tmp_path: Path, rows: list[dict[str, str]], command: Callable[..., str]) -> None:
    command("recipes/make_logs.py", "logs")
    words = ["run", "recipes/logs.py", "--source", "logs/*.csv", "--max-failures", "0.001", "--workers", "2", "--json"]
    assert json.loads(command("-m", "parflow.cli", *words))["result"] == expected(rows)
    assert list((tmp_path / "out/errors").glob("*.parquet"))

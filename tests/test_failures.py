"""What failed, as a table: its columns, its rows, and choosing among them."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import parflow as pf
from parflow.api.runs import letters_of
from parflow.errors import UsageError
from parflow.views.failures import COLUMNS, as_csv


class OddError(ValueError):
    """A class of this module."""


def check(line: str) -> str:
    """Fail for some lines, each in its own way."""
    if line.startswith("odd"):
        print("looked at", line)
        raise OddError(line)
    if line == "gone":
        raise FileNotFoundError(line)
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pf.Run:
    """Run over two files in folders, of which four lines fail, and one that is no text."""
    folder = tmp_path_factory.mktemp("in")
    for name, text in {"a.txt": b"1\nodd 2\ngone\n", "deep/er/b.txt": b"odd 3\n4\nodd 55\n", "deep/c.txt": b"\xff\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    lines = pf.read_lines(f"{folder}/**/*.txt").map(check)
    return lines.run(max_failures=9, home=folder / "home", workers=1)


def test_a_table_of_failures_has_a_row_each_with_all_that_is_known(run: pf.Run) -> None:
    table = run.failures()
    assert [*table.columns] == [*COLUMNS]
    assert {name: str(kind) for name, kind in table.dtypes.items() if name in ("attempts", "chunk", "ordinal", "stage")} == {
        "attempts": "int64",
        "chunk": "Int64",
        "ordinal": "Int64",
        "stage": "Int64",
    }
    odd = table[table["message"] == "odd 2"].iloc[0]
    assert odd["record"] == f"{odd['source']}#2"
    assert Path(odd["source"]).name == "a.txt"
    assert (odd["step"], odd["cause"], odd["error"], odd["attempts"]) == ("check", "exception", "OddError", 1)
    assert (odd["preview"], odd["output"], odd["ordinal"], odd["stage"]) == ("'odd 2'", "looked at odd 2\n", 1, 0)
    assert "raise OddError(line)" in odd["traceback"]
    assert [*table["record"]] == [letter.record for letter in run.dead_letters()]
    assert len(table) == 5


def test_a_run_without_failures_has_the_same_columns_and_kinds(run: pf.Run, tmp_path: Path) -> None:
    none = pf.items([1]).run(home=tmp_path, isolation="inline").failures()
    assert none.empty
    assert none.dtypes.to_dict() == run.failures().dtypes.to_dict()
    pd.concat([none, run.failures()])


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ({"step": "check"}, 4),
        ({"step": "read"}, 1),
        ({"step": "no such step"}, 0),
        ({"error": "OddError"}, 3),
        ({"error": f"{__name__}.OddError"}, 3),
        ({"error": OddError}, 3),
        ({"error": ValueError}, 3),
        ({"error": "OSError"}, 1),
        ({"error": "builtins.OSError"}, 1),
        ({"error": "NotTextError"}, 1),
        ({"error": pf.ParflowError}, 1),
        ({"error": "Error"}, 0),
        ({"source": "a.txt"}, 2),
        ({"source": "*.txt"}, 5),
        ({"source": "deep/**/*.txt"}, 3),
        ({"source": "deep/er/b.txt"}, 2),
        ({"source": "deep"}, 0),
        ({"step": "check", "error": "OddError", "source": "b.txt"}, 2),
    ],
)
def test_failures_are_chosen_by_step_error_and_source(
    run: pf.Run, choice: dict[str, Any], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(run.home).parent)
    assert len(run.failures(**choice)) == len(run.dead_letters(**choice)) == found
    whole: dict[str, Any] = {
        key: Path(value).absolute() if key == "source" and "/" in value else value for key, value in choice.items()
    }
    assert len(run.failures(**whole)) == found


def test_what_is_no_exception_is_refused(run: pf.Run) -> None:
    with pytest.raises(UsageError, match="error=3 is no exception class"):
        run.failures(error=3)  # type: ignore[arg-type]


def test_inputs_that_can_not_be_used_and_calls_that_fail_are_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.txt").write_text("x")
    (tmp_path / "in" / "broken.txt").symlink_to("nowhere")
    run = pf.read_files(f"{tmp_path}/in/*.txt").run(max_failures=1, home=tmp_path / "home", isolation="inline")
    (row,) = run.failures(error="InputError").to_dict("records")
    assert (row["step"], row["cause"], row["source"]) == ("read", "input", f"{tmp_path}/in/broken.txt")
    assert pd.isna(row["chunk"])

    def judge(value: int) -> int:
        raise ValueError(value)

    (row,) = pf.call(judge, 3).run(home=tmp_path / "home", isolation="inline").failures().to_dict("records")
    assert (row["record"], row["source"], row["step"], row["preview"]) == ("", "", "judge", "3")
    assert pd.isna(row["stage"])


def test_csv_has_a_row_for_each_failure_whatever_is_in_it(tmp_path: Path) -> None:
    evil = ['a,"b"\nc', "=1+1", "\x00\x1b[2J", "\udcff", "ü", "x\r\ny"]
    run = pf.items(evil).map(int).run(max_failures=9, home=tmp_path, isolation="inline")
    header, *rows = csv.reader(io.StringIO(as_csv(letters_of(run)), newline=""))
    assert header == [*COLUMNS]
    assert [row[header.index("record")] for row in rows] == [f"items[{number}]" for number in range(len(evil))]
    assert [row[header.index("preview")] for row in rows] == [repr(text) for text in evil]
    table = run.failures()
    assert [*table["message"]] == [letter.message for letter in run.dead_letters()]


def test_without_a_table_pandas_is_not_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, parflow as pf\n"
        "run = pf.items(['x']).map(int).run(max_failures=1, isolation='inline')\n"
        "assert len(run.dead_letters()) == 1\nprint('pandas' in sys.modules)\n"
        "assert len(run.failures()) == 1\nprint('pandas' in sys.modules)"
    )
    environment = {**os.environ, "PARFLOW_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.dumps(done.stdout.split()) == '["False", "True"]'

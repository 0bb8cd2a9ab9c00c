"""How the command line tells what failed in a run."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from .shell import Shell


@pytest.fixture
def source(shell: Shell, tmp_path: Path) -> Path:
    """Return a file of which four lines failed in a run."""
    path = tmp_path / "in.txt"
    path.write_text("bad 1\ngood\nmissing\nbad 22\nbad \x1b[2J\n")
    shell(*shell.flow("failing", "--source", path, "--max-failures", 4))
    return path


def test_failures_are_told_by_cause_first_and_then_one_by_one(shell: Shell, source: Path) -> None:
    run = shell.json("show")["run_id"]
    assert shell("failures").out.splitlines() == [
        f"4 dead letters of run {run}",
        "",
        "  2 × check: ValueError: no good: bad 1 and a second line",
        f"      for example {source}#0; all: parflow failures {run} --step check --error ValueError",
        "  1 × check: FileNotFoundError: missing",
        f"      {source}#11",
        r"  1 × check: ValueError: no good: bad \x1b[2J and a second line",
        f"      {source}#26",
        "",
        f"{source}#0  check  exception: ValueError: no good: bad 1",
        "    and a second line",
        f"{source}#11  check  exception: FileNotFoundError: missing",
        f"{source}#19  check  exception: ValueError: no good: bad 22",
        "    and a second line",
        rf"{source}#26  check  exception: ValueError: no good: bad \x1b[2J",
        "    and a second line",
        f"what they printed, and their tracebacks: parflow failures {run} --traceback",
    ]


def test_the_command_for_more_of_a_cause_works(shell: Shell, source: Path) -> None:
    (command,) = re.findall(r"all: parflow (.*)", shell("failures").out)
    assert shell(*command.split()).out.startswith("3 dead letters of run ")


def test_a_failure_alone_is_told_once_with_all_that_is_known(shell: Shell, source: Path) -> None:
    told = shell("failures", "--error", "OSError", "--traceback").out
    assert told.count("FileNotFoundError: missing") == 2  # the line, and its traceback's end
    assert "\n  output:\n    checking missing\n" in told
    assert "raise FileNotFoundError(line)" in told


def test_some_are_chosen_and_some_are_none(shell: Shell, source: Path) -> None:
    assert len(shell.json("failures", "--step", "check", "--error", "ValueError", "--source", "*.txt")) == 3
    assert shell.json("failures", "--source", "other/*.txt") == []
    assert "has no dead letters like that" in shell("failures", "--step", "read").out
    assert len(shell.json("failures", "--limit", 2)) == 2
    assert "… and 3 more: --limit 4 shows them" in shell("failures", "--limit", 1).out
    assert "--csv or --json" in shell("failures", "--csv", "--json", code=2).err


def test_csv_has_a_row_a_failure(shell: Shell, source: Path) -> None:
    rows = [*csv.DictReader(shell("failures", "--csv").out.splitlines(keepends=True))]
    assert [(row["record"], row["source"], row["error"], row["attempts"]) for row in rows] == [
        (f"{source}#0", str(source), "ValueError", "1"),
        (f"{source}#11", str(source), "FileNotFoundError", "1"),
        (f"{source}#19", str(source), "ValueError", "1"),
        (f"{source}#26", str(source), "ValueError", "1"),
    ]
    assert rows[3]["message"] == "no good: bad \x1b[2J\nand a second line"
    assert rows[2]["output"] == "checking bad 22\n"
    assert shell("failures", "--csv", "--step", "read").out.count("\n") == 1


@pytest.mark.parametrize("form", ["--csv", "--json"])
def test_what_is_for_programs_does_a_terminal_no_harm(shell: Shell, source: Path, form: str) -> None:
    terminal = shell.terminal("failures", form)
    assert terminal.wait() == 0
    assert "bad" in terminal.text
    assert "\x1b" not in terminal.text


def test_a_failed_call_is_told_once_and_by_its_name(shell: Shell) -> None:
    failed = shell(*shell.flow("judging", "--value", "x"), code=1)
    assert "1 × judge: ValueError: x is no value (call of judge('x'))" in failed.err
    told = shell("failures").out.splitlines()
    assert told[2:-1] == ["call of judge('x')  judge  exception: ValueError: x is no value"]
    (letter,) = shell.json("failures")
    assert (letter["record"], letter["stage"], letter["output"]) == ("", None, "judging x\n")


def test_the_report_has_attempts_and_output(shell: Shell, source: Path) -> None:
    page = Path(re.findall(r"report: (.*)", shell("show").out)[0]).read_text()
    assert "<th scope='col'>attempts</th>" in page
    assert "<td>checking bad 22\n</td>" in page

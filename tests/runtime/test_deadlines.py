"""A reduction whose barrier opens at a deadline, and what is made up for afterwards: the real engine.

What is late waits for a file that the test makes, so that it is late however fast the machine is.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

import parflow as pf
from parflow.core.history import Cut, Redriven, decode
from parflow.errors import ResumeError, UsageError
from parflow.storage.journal import Journal

LATE = 7


def waits(gate: Path) -> Any:
    """Make a step that keeps one record back until a file is there."""

    def step(n: int, gate: str = str(gate)) -> int:
        while n == LATE and not Path(gate).exists():
            time.sleep(0.01)
        return n

    return step


def noted(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


@pf.workflow
def total(gate: Path, log: Path, out: Path, at_least: float = 0.85) -> Any:
    def note(value: int, log: str = str(log)) -> int:
        with open(log, "a") as file:
            file.write(f"{value}\n")
        return value

    numbers = pf.items(range(10), chunk_records=1).map(waits(gate))
    value = numbers.reduce(pf.sum(), deadline=0.3, at_least=at_least)
    pf.items([1, 2]).map(lambda n, value: {"n": n, "of": value}, value).write_jsonl(out)
    return pf.call(note, value)


def entries(home: Path, run: pf.Run, kind: type) -> list[Any]:
    journal = Journal(str(home / "journal.sqlite"))
    try:
        return [entry for row in journal.read(run.run_id) if isinstance(entry := decode(row.kind, row.body), kind)]
    finally:
        journal.close()


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(out.glob("part-*")) for line in file.read_text().splitlines()]


def test_the_barrier_opens_over_what_is_there_and_names_what_is_not(tmp_path: Path) -> None:
    run = total(tmp_path / "gate", tmp_path / "log", tmp_path / "out").run(home=tmp_path / "home", workers=2)
    assert run.result() == sum(range(10)) - LATE
    (missing,) = run.missing()
    assert (missing.output, missing.inputs) == ("sum", ("items[7:8]",))
    assert 0.85 < missing.share < 1
    (cut,) = entries(tmp_path / "home", run, Cut)
    assert [piece.chunk for piece in cut.late] == [LATE]


def test_a_redrive_merges_what_was_late_and_makes_again_what_rests_on_it(tmp_path: Path) -> None:
    home, log, out = tmp_path / "home", tmp_path / "log", tmp_path / "out"
    run = total(tmp_path / "gate", log, out).run(home=home, workers=2)
    assert rows(out) == [{"n": 1, "of": 38}, {"n": 2, "of": 38}]
    (tmp_path / "gate").touch()
    again = pf.redrive(run.run_id, home=home, workers=2)
    assert again.result() == 45
    assert again.missing() == []
    assert noted(log) == ["38", "45"]
    assert rows(out) == [{"n": 1, "of": 45}, {"n": 2, "of": 45}]
    assert json.loads((out / "_manifest.json").read_text())["rows"] == 2
    assert [entry.outputs for entry in entries(home, run, Redriven)] == [((0, 0),)]
    assert pf.open_run(run.run_id, home).result() == 45


def test_nothing_is_redriven_twice_or_where_nothing_is_missing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run = total(tmp_path / "gate", tmp_path / "log", tmp_path / "out").run(home=home, workers=2)
    (tmp_path / "gate").touch()
    pf.redrive(run.run_id, home=home).result()
    with pytest.raises(ResumeError, match="nothing to be redriven"):
        pf.redrive(run.run_id, home=home)


def test_a_stage_that_is_in_time_leaves_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    run = pf.items(range(10), chunk_records=1).map(waits(tmp_path / "gate")).reduce(pf.sum(), deadline="10m")
    made = run.run(home=tmp_path, workers=2)
    assert made.result() == 45
    assert made.missing() == []


def test_another_output_of_the_stage_goes_on_to_its_end(tmp_path: Path) -> None:
    gate, log = tmp_path / "gate", tmp_path / "log"

    @pf.workflow
    def both() -> Any:
        def release(value: int, gate: str = str(gate), log: str = str(log)) -> int:
            Path(log).write_text(str(value))
            Path(gate).touch()  # only after the early value is there does the late record come
            return value

        numbers = pf.items(range(10), chunk_records=1).map(waits(gate))
        early = numbers.reduce(pf.sum(), deadline=0.3, at_least=0.85)
        return pf.call(release, early), numbers.reduce(pf.count()), early

    run = both().run(home=tmp_path / "home", workers=2)
    assert run.result() == (38, 10, 38)
    assert [missing.output for missing in run.missing()] == ["sum"]
    assert pf.redrive(run.run_id, home=tmp_path / "home").result() == (45, 10, 45)


def test_too_little_is_waited_for_even_past_the_deadline(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    bound = total(gate, tmp_path / "log", tmp_path / "out", at_least=1.0)
    run = bound.run(home=tmp_path / "home", workers=2, wait=False)
    while run.state.stages[0].share < 0.85:  # all but the late one are there, and the deadline passes
        time.sleep(0.01)
    time.sleep(0.5)
    assert run.status == "running"
    gate.touch()
    assert run.result() == 45


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": "soon"}, "no amount above zero"),
        ({"deadline": "1m", "at_least": 2}, "from 0 to 1"),
        ({"at_least": 0.5}, "deadline="),
    ],
)
def test_a_deadline_that_makes_no_sense_is_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pf.items([1]).reduce(pf.sum(), **options)


def test_plain_dask_waits_for_all(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    assert pf.items(range(10)).map(waits(tmp_path / "gate")).reduce(pf.sum(), deadline=0.001).compute() == 45

"""A reduction whose barrier opens at a deadline, and what is made up for afterwards: the real engine.

What is late waits for a file that the test makes, so that it is late however fast the machine is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import parflow as pf
from parflow.core.entries import BarrierOpened, Called, Cut, Entry, PieceEnded, Redriven, decode
from parflow.errors import InputsChangedError, OutputError, ResumeError, UsageError
from parflow.storage.journal import Journal

LATE = 7
DUE = 0.3


def waits(gate: Path) -> Any:
    """Make a step that keeps one record back until a file is there."""

    def step(n: int, gate: str = str(gate)) -> int:
        while n == LATE and not Path(gate).exists():
            time.sleep(0.01)
        return n

    return step


def notes(log: Path) -> Any:
    """Make a task that gives what it's given, and says so in a file."""

    def note(value: int, log: str = str(log)) -> int:
        with open(log, "a") as file:
            file.write(f"{value}\n")
        return value

    return note


@pf.workflow
def total(gate: Path, log: Path, out: Path) -> Any:
    base = pf.call(notes(log), 100)
    numbers = pf.items(range(10), chunk_records=1).map(waits(gate)).map(lambda n, base: n + base, base)
    value = numbers.reduce(pf.sum(), deadline=DUE, at_least=0.85)
    pf.items([1, 2]).map(lambda n, value: {"n": n, "of": value}, value).write_jsonl(out)
    return pf.call(notes(log), value)


EARLY = 9 * 100 + sum(range(10)) - LATE
FULL = 10 * 100 + sum(range(10))


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def history(home: Path, run: pf.Run) -> list[Entry]:
    journal = Journal(str(home / "journal.sqlite"))
    try:
        return [decode(row.kind, row.body) for row in journal.read(run.run_id)]
    finally:
        journal.close()


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(out.glob("part-*")) for line in file.read_text().splitlines()]


# --- opening early -----------------------------------------------------------------------------------------------------


def test_the_barrier_opens_over_what_is_there_and_names_what_is_not(home: Path, gate: Path, log: Path, out: Path) -> None:
    run = total(gate, log, out).run(workers=2)
    assert run.result() == EARLY
    (missing,) = run.missing()
    assert (missing.output, missing.inputs) == ("sum", ("items[7:8]",))
    assert 0.85 < missing.share < 1
    assert pf.open_run().missing() == [missing]
    (cut,) = (entry for entry in history(home, run) if isinstance(entry, Cut))
    assert [piece.chunk for piece in cut.late] == [LATE]


def test_on_a_single_slot_what_is_late_is_ended_to_make_room_for_the_merge(gate: Path) -> None:
    run = pf.items([1, 2, LATE, 3], chunk_records=1).map(waits(gate)).reduce(pf.sum(), deadline=DUE).run(workers=1)
    assert "items[2:3]" in run.missing()[0].inputs
    assert run.result() < 1 + 2 + 3 + LATE
    gate.touch()
    assert pf.redrive(workers=1).result() == 1 + 2 + 3 + LATE


def test_with_nothing_there_the_value_is_that_of_no_records(gate: Path) -> None:
    nothing = pf.items([LATE] * 3, chunk_records=1).map(waits(gate)).reduce(pf.count(), deadline=DUE)
    run = nothing.run(workers=2)
    assert run.result() == 0
    assert [(missing.share, len(missing.inputs)) for missing in run.missing()] == [(0.0, 3)]
    gate.touch()
    assert pf.redrive(workers=2).result() == 3


def test_a_stage_that_is_in_time_leaves_nothing_out(home: Path, gate: Path) -> None:
    gate.touch()
    value = pf.items(range(10), chunk_records=1).map(waits(gate)).reduce(pf.sum(), deadline="10m")
    run = value.run(workers=2)
    assert run.result() == 45
    assert run.missing() == []
    assert Counter(map(type, history(home, run)))[BarrierOpened] == 1
    with pytest.raises(ResumeError, match="nothing to be redriven"):
        pf.redrive()


def test_other_outputs_of_the_stage_go_on_to_their_end(gate: Path, out: Path) -> None:
    @pf.workflow
    def several() -> Any:
        def release(value: int, gate: str = str(gate)) -> int:
            Path(gate).touch()  # the late record comes only when the early value is there
            return value

        numbers = pf.items(range(10), chunk_records=1).map(waits(gate))
        early = numbers.reduce(pf.sum(), deadline=DUE, at_least=0.85)
        patient = numbers.reduce(pf.max(), deadline=DUE / 2, at_least=1.0)  # that deadline passed before the other one
        numbers.map(lambda n: {"n": n}).write_jsonl(out)
        return pf.call(release, early), numbers.reduce(pf.count()), patient

    run = several().run(workers=2)
    assert run.result() == (38, 10, 9)
    assert [missing.output for missing in run.missing()] == ["sum"]
    assert [row["n"] for row in rows(out)] == [*range(10)]
    written = (out / "_manifest.json").stat().st_mtime_ns
    assert pf.redrive().result() == (45, 10, 9)
    assert (out / "_manifest.json").stat().st_mtime_ns == written  # it left nothing out, and stays as it is


# --- making up for it --------------------------------------------------------------------------------------------------


def test_a_redrive_merges_what_was_late_and_makes_again_what_rests_on_it(home: Path, gate: Path, log: Path, out: Path) -> None:
    run = total(gate, log, out).run(workers=2)
    assert rows(out) == [{"n": 1, "of": EARLY}, {"n": 2, "of": EARLY}]
    early = json.loads((out / "_manifest.json").read_text())
    gate.touch()
    again = pf.redrive(run.run_id, workers=2)
    assert again.result() == FULL
    assert again.missing() == []
    assert log.read_text().split() == ["100", str(EARLY), str(FULL)]  # what it rests on is not made again
    assert rows(out) == [{"n": 1, "of": FULL}, {"n": 2, "of": FULL}]
    late = json.loads((out / "_manifest.json").read_text())
    assert (late["run_id"], late["rows"]) == (run.run_id, 2)
    assert [file["bytes"] for file in late["files"]] == [
        file["bytes"] + 1 for file in early["files"]
    ]  # the value has a digit more
    assert {path.name for path in out.iterdir()} == {"_manifest.json", *(file["path"] for file in late["files"])}
    assert pf.open_run(run.run_id).result() == FULL
    written = history(home, run)
    assert [entry.outputs for entry in written if isinstance(entry, Redriven)] == [((0, 0),)]
    assert Counter(entry.call for entry in written if isinstance(entry, Called)) == {0: 1, 1: 2}
    assert Counter(
        entry.piece.chunk for entry in written if isinstance(entry, PieceEnded) and not entry.stage
    ) == dict.fromkeys(range(10), 1)


def test_nothing_is_redriven_twice(gate: Path, log: Path, out: Path) -> None:
    total(gate, log, out).run(workers=2)
    gate.touch()
    pf.redrive(workers=2)
    with pytest.raises(ResumeError, match="nothing to be redriven"):
        pf.redrive()
    assert pf.resume().result() == FULL


def test_a_redrive_that_is_stopped_is_resumed(gate: Path, log: Path, out: Path) -> None:
    total(gate, log, out).run(workers=2)
    run = pf.redrive(workers=2, wait=False)
    run.stop(now=True)
    assert run.wait().status == "stopped"
    gate.touch()
    assert pf.resume(workers=2).result() == FULL
    assert log.read_text().split() == ["100", str(EARLY), str(FULL)]


def test_late_input_that_changed_is_not_merged_with_the_rest(tmp_path: Path, gate: Path) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, file in enumerate(files):
        file.write_text(f"{number + LATE - 2}\n")  # the last one has the late number
    lines = pf.read_lines([*map(str, files)], chunk_bytes=2).map(int).map(waits(gate))
    run = lines.reduce(pf.sum(), deadline=DUE, at_least=0.5).run(workers=2)
    assert run.result() == 5 + 6
    assert run.missing()[0].inputs == (str(files[2]),)
    gate.touch()
    files[2].write_text("100\n")
    with pytest.raises(InputsChangedError, match=r"2\.txt"):
        pf.redrive()
    assert pf.open_run().result() == 5 + 6  # nothing was lost by trying
    assert len(pf.open_run().missing()) == 1


def test_a_redrive_checks_the_input_of_what_it_makes_again_before_it_forgets_anything(tmp_path: Path, gate: Path) -> None:
    after = tmp_path / "after.txt"
    after.write_text("a\nb\n")
    value = pf.items(range(10), chunk_records=1).map(waits(gate)).reduce(pf.sum(), deadline=DUE, at_least=0.85)
    pairs = pf.read_lines(str(after)).map(lambda line, value: (line, value), value)
    assert [*pairs.run(workers=2).result()] == [("a", 38), ("b", 38)]
    after.write_text("a\nb\nc\n")
    with pytest.raises(InputsChangedError, match=r"after\.txt"):
        pf.redrive()
    assert [*pf.open_run().result()] == [("a", 38), ("b", 38)]


def test_a_redrive_that_is_stopped_and_resumed_takes_no_published_file_for_a_new_one(gate: Path, out: Path) -> None:
    hold, go = gate.with_name("hold"), gate.with_name("go")

    def last(pair: tuple[int, bool], hold: str = str(hold), go: str = str(go)) -> dict[str, str]:
        while Path(hold).exists() and not Path(go).exists():
            time.sleep(0.01)
        return {"n": f"{pair[0]:05d}"}

    @pf.workflow
    def kept_but_one() -> Any:
        total = pf.items(range(10), chunk_records=1).map(waits(gate)).reduce(pf.sum(), deadline=DUE, at_least=0.85)
        flagged = pf.items([*range(12)]).map(lambda n, total: (n, total == 45 and n == 2), total)
        flagged.distinct(buckets=16).filter(lambda pair: not pair[1]).map(last).write_jsonl(out)
        return total

    kept_but_one().run(workers=2)
    assert {row["n"] for row in rows(out)} == {f"{n:05d}" for n in range(12)}
    gate.touch()
    hold.touch()
    run = pf.redrive(workers=2, wait=False)
    while not run.state.stages[2].chunks:
        time.sleep(0.01)
    run.stop(now=True)
    run.wait()
    go.touch()
    assert pf.resume(workers=2).result() == 45
    assert {row["n"] for row in rows(out)} == {f"{n:05d}" for n in range(12) if n != 2}


def test_a_redrive_leaves_alone_what_another_run_put_into_the_folder_since(gate: Path, log: Path, out: Path) -> None:
    total(gate, log, out).run(workers=2)
    early = pf.open_run()
    pf.items([{"other": True}]).write_jsonl(out, overwrite=True).run()
    gate.touch()
    with pytest.raises(OutputError, match="another result"):
        pf.redrive(early.run_id, workers=2).result()
    assert rows(out) == [{"other": True}]


def test_an_alarm_does_not_outlive_its_run(gate: Path) -> None:
    gate.touch()
    pf.items(range(10)).map(waits(gate)).reduce(pf.sum(), deadline="1h").run(workers=2)
    left = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)


# --- saying it ---------------------------------------------------------------------------------------------------------

FLOW = """
import time
from pathlib import Path
import parflow as pf

@pf.workflow
def slow(gate: str):
    def step(n):
        while n == 7 and not Path(gate).exists():
            time.sleep(0.01)
        return n
    return pf.items(range(10), chunk_records=1).map(step).reduce(pf.sum(), deadline="0.3s", at_least=0.85)
"""


def test_the_command_line_shows_what_is_missing_and_makes_up_for_it(tmp_path: Path, gate: Path) -> None:
    def parflow(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "parflow.cli", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    (tmp_path / "slow.py").write_text(FLOW)
    code, printed, told = parflow("run", "slow.py", "--gate", str(gate), "--workers", "2")
    assert (code, printed) == (0, "38\n")
    line = "sum opened at its deadline with 90% of the input; 1 piece too late: items[7:8]"
    assert line in told
    assert line in parflow("show")[1]
    (missing,) = json.loads(parflow("show", "--json")[1])["missing"]
    assert (missing["output"], missing["inputs"]) == ("sum", ["items[7:8]"])
    gate.touch()
    code, printed, _ = parflow("redrive", "last", "--json")
    answer = json.loads(printed)
    assert (code, answer["status"], answer["result"]) == (0, "succeeded", 45)
    assert "too late" not in parflow("show", answer["run_id"])[1]
    code, printed, told = parflow("redrive")
    assert (code, printed) == (1, "")
    assert "nothing to be redriven" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline": "soon"}, "'soon' is no amount above zero"),
        ({"deadline": 0}, "no amount above zero"),
        ({"deadline": "1m", "at_least": 2}, r"at_least=2 is the share of the input, from 0 to 1"),
        ({"deadline": "1m", "at_least": float("nan")}, "from 0 to 1"),
        ({"at_least": 0.5}, r"at_least=0.5 is the share .* that a deadline= may open over"),
    ],
)
def test_a_deadline_that_makes_no_sense_is_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pf.items([1]).reduce(pf.sum(), **options)


def test_plain_dask_knows_no_deadline_and_waits_for_all(gate: Path) -> None:
    def step(n: int, gate: str = str(gate)) -> int:
        if n == 9:
            time.sleep(2 * DUE)  # longer than it would have
            Path(gate).touch()
        return n

    numbers = pf.items([9, LATE]).map(step).map(waits(gate))
    assert numbers.reduce(pf.sum(), deadline=DUE).compute() == 9 + LATE

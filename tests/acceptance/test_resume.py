"""Going on: when it is refused, and what opens a closed barrier."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .shell import Shell, until


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Write four files of three lines."""
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / f"{number}.txt" for number in range(4)]
    for path in paths:
        path.write_text("1\n2\n3\n")
    return paths


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Return the file that lets records pass."""
    return tmp_path / "gate"


@pytest.fixture
def words(shell: Shell, files: list[Path], gate: Path) -> list[object]:
    """Return the command that runs the files' lines, each of which waits for the gate to open."""
    given = ["--source", files[0].with_name("*.txt"), "--gate", gate, "--log", shell.log, "--out", shell.out]
    return shell.flow("gated", *given)


def lost(shell: Shell, words: list[object]) -> None:
    """Start a run, and kill it with a record in the hand of each child."""
    started = shell.start(*words)
    until(lambda: len(shell.ran()) == 2, "a record in each child")
    started.kill_group()
    shell.all_gone()
    assert shell.json("runs")[0]["status"] == "lost"
    assert "go on with: parflow resume" in shell("show").out


def rewrite(path: Path) -> None:
    path.write_text("4\n5\n6\n7\n")


def touch(path: Path) -> None:
    """Change nothing but the time of the last change."""
    os.utime(path, (1, 1))


def test_a_run_that_is_alive_is_not_resumed(shell: Shell, words: list[object], gate: Path) -> None:
    started = shell.start(*words)
    until(lambda: len(shell.ran()) == 2, "a record in each child")
    assert shell.json("runs")[0]["status"] == "running"
    refused = shell("resume", code=1)
    assert re.search(rf"run gated-\S+ is owned by process {started.process.pid} on \S+ .*which is alive", refused.err)
    assert "Traceback" not in refused.err
    assert refused.out == ""
    assert len(shell.ran()) == 2

    gate.touch()
    assert started.wait().code == 0
    assert shell.json("resume")["result"] == 12
    assert len(shell.ran()) == 12


def test_a_lost_run_goes_on_with_inputs_that_are_as_they_were(shell: Shell, words: list[object], gate: Path) -> None:
    lost(shell, words)
    gate.touch()
    assert shell.json("resume")["result"] == 12


@pytest.mark.parametrize("change", [rewrite, touch, Path.unlink])
def test_inputs_that_changed_are_refused_and_with_force_set_aside(
    shell: Shell, words: list[object], files: list[Path], gate: Path, change: Callable[[Path], None]
) -> None:
    lost(shell, words)
    gate.touch()
    change(files[2])
    refused = shell("resume", code=1)
    assert re.search(r"run gated-\S+: 1 unfinished inputs changed .*first '.*/in/2.txt'", refused.err)
    assert "--force" in refused.err
    assert len(shell.ran()) == 2

    assert re.search(r"1 of \d+ records failed, max_failures is 0", shell("resume", "--force", code=1).err)
    (letter,) = shell.json("failures")
    assert letter["cause"] == "input"
    assert letter["record"].startswith(str(files[2]))
    ran = shell.ran()
    assert shell.json("resume", "--max-failures", 1)["result"] == 9
    assert shell.ran() == ran
    assert "".join(part.read_text() for part in sorted(shell.out.glob("part-*"))) == '"1"\n"2"\n"3"\n' * 3


def test_an_input_that_changed_after_it_was_done_does_not_matter(shell: Shell, files: list[Path]) -> None:
    files[3].write_text("1\nx\n")
    shell(*shell.flow("numbers", "--source", files[0].with_name("*.txt"), "--log", shell.log), code=1)
    ran = shell.ran()
    rewrite(files[0])
    files[1].unlink()
    assert shell.json("resume", "--max-failures", 1)["result"] == 19
    assert shell.ran() == ran


def test_a_barrier_opens_when_enough_dead_letters_are_accepted_and_nothing_runs_again(shell: Shell, files: list[Path]) -> None:
    files[1].write_text("1\nx\ny\n")
    shell(*shell.flow("numbers", "--source", files[0].with_name("*.txt"), "--log", shell.log), code=1)
    ran = shell.ran()
    assert len(ran) == 12
    still = shell.json("resume", "--max-failures", 1, code=1)
    assert "2 of 12 records failed, max_failures is 1" in still["error"]
    assert shell.json("resume", "--max-failures", 2)["result"] == 19
    assert shell.ran() == ran
    assert shell.json("runs")[0]["status"] == "succeeded"


FLOW = """
import parflow as pf

def double(line):
    if line == "x":
        raise ValueError(line)
    return 2 * int(line)

@pf.workflow
def doubled(source: str):
    return pf.read_lines(source).map(double).reduce(pf.sum())
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2 * int", "3 * int", r"step 'double' changed"),
        (".map(double)", ".map(double).map(double)", r"the steps were read, double, sum and are read, double, double, sum"),
        ("source: str", "source: str, more: str", r"its workflow can't be planned any more: TypeError: .*'more'"),
        ("import parflow", "import no_such_module, parflow", r"can't be planned any more: ModuleNotFoundError: "),
        ("def double", "def double(", r"can't be planned any more: SyntaxError: "),
    ],
)
def test_code_that_changed_is_refused_and_with_force_the_recorded_code_goes_on(
    shell: Shell, tmp_path: Path, old: str, new: str, message: str
) -> None:
    flow, source = tmp_path / "flow.py", tmp_path / "in.txt"
    flow.write_text(FLOW)
    source.write_text("1\nx\n2\n")
    shell("run", flow, "--source", source, code=1)
    flow.write_text(FLOW.replace(old, new))
    refused = shell("resume", "--max-failures", 1, code=1)
    assert re.search(rf"run doubled-\S+ was started with other code: .*{message}", refused.err)
    assert "--force" in refused.err
    assert "Traceback" not in refused.err
    assert shell.json("resume", "--max-failures", 1, "--force")["result"] == 6
    assert shell.json("resume")["result"] == 6


def test_a_run_goes_on_when_its_file_is_gone(shell: Shell, tmp_path: Path) -> None:
    flow, source = tmp_path / "flow.py", tmp_path / "in.txt"
    flow.write_text(FLOW)
    source.write_text("1\nx\n2\n")
    shell("run", flow, "--source", source, code=1)
    flow.unlink()
    assert shell.json("resume", "--max-failures", 1)["result"] == 6

"""The sandbox's processes end from outside, as when memory is short: no record is lost, and none is blamed for one death."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import psutil
import pytest

from .shell import Shell, Started, until

LINES = [str(number) for number in range(12)]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Return the file that lets records pass."""
    return tmp_path / "gate"


@pytest.fixture
def started(shell: Shell, tmp_path: Path, gate: Path) -> Started:
    """Start a run of three files of four lines, and wait until each of two children has a record in hand."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        lines = LINES[4 * number : 4 * number + 4]
        (tmp_path / "in" / f"{number}.txt").write_text("".join(f"{line}\n" for line in lines))
    given = ["--source", tmp_path / "in" / "*.txt", "--gate", gate, "--log", shell.log, "--out", shell.out]
    begun = shell.start(*shell.flow("gated", *given), "--json")
    until(lambda: len(shell.ran()) == 2, "a record in each child")
    return begun


def kill(process: psutil.Process) -> None:
    process.kill()
    until(lambda: _gone(process), "a process's death")


def _gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def succeeded(shell: Shell, started: Started, again: Counter[str]) -> None:
    """See that all records were run, these once more, and that none was set aside."""
    done = started.wait()
    assert done.code == 0, done.err
    assert done.err == ""
    assert done.json["result"] == len(LINES)
    assert Counter(shell.ran()) - Counter(LINES) == again
    assert set(shell.ran()) == set(LINES)
    assert shell.json("failures") == []
    parts = sorted(shell.out.glob("part-*"))
    assert "".join(part.read_text() for part in parts) == "".join(f'"{line}"\n' for line in LINES)


def test_killed_children_cost_their_records_a_second_attempt_and_nothing_else(
    shell: Shell, started: Started, gate: Path
) -> None:
    in_hand = Counter(shell.ran())
    for child in shell.children():
        kill(child)
    until(lambda: len(shell.ran()) == 4, "both records in hand again")
    gate.touch()
    succeeded(shell, started, in_hand)


def test_a_killed_fork_server_takes_its_children_along_and_the_run_goes_on(shell: Shell, started: Started, gate: Path) -> None:
    in_hand = Counter(shell.ran())
    server, children = shell.fork_server(), shell.children()
    kill(server)
    until(lambda: not any(child.is_running() for child in children), "the children's death")
    until(lambda: len(shell.ran()) == 4, "both records in hand again")
    assert shell.fork_server() != server
    gate.touch()
    succeeded(shell, started, in_hand)


def test_a_record_whose_process_was_killed_twice_is_set_aside_alone(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("a\nb\nbad\nc\nd\n")
    words = shell.flow("killers", "--source", source, "--log", shell.log)
    assert shell.json(*words, "--times", 1)["result"] == 5
    assert shell.json("failures") == []
    assert shell.ran().count("bad") == 2

    shell.log.unlink()
    assert "1 of 5 records failed" in shell.json(*words, "--times", 9, code=1)["error"]
    (letter,) = shell.json("failures")
    assert (letter["record"], letter["cause"]) == (f"{source}#4", "crash")
    assert shell.ran().count("bad") == 2
    assert shell.json("resume", "--max-failures", 1)["result"] == 4

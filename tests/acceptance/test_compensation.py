"""Runs that are undone, from a shell: whatever is killed meanwhile, all that was done is undone once."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from .shell import Shell, until

COUNT = 40


@pytest.fixture
def words(shell: Shell, tmp_path: Path) -> list[object]:
    return shell.flow("paying", "--count", COUNT, "--log", shell.log, "--gate", tmp_path / "gate")


def paid(shell: Shell) -> Counter[str]:
    """Count what was done less what was undone, by record."""
    left: Counter[str] = Counter()
    for line in shell.ran():
        what, number = line.split("-")
        left[number] += 1 if what == "pay" else -1
    return left


def test_a_run_that_fails_is_undone_when_it_was_asked_for(shell: Shell, words: list[object]) -> None:
    told = shell(*words, "--compensate", code=1).err
    assert f"what it did is undone: {COUNT} effects" in told
    assert "go on with" not in told
    assert not +paid(shell)
    assert len([line for line in shell.ran() if line.startswith("pay")]) == COUNT
    assert "was undone" in shell("resume", code=1).err


def test_a_run_that_is_killed_while_it_is_undone_goes_on_undoing(shell: Shell, words: list[object], tmp_path: Path) -> None:
    (tmp_path / "gate").touch()  # undoing takes its time

    def undone(count: int) -> bool:
        return sum(line.startswith("back") for line in shell.ran()) >= count

    for count in (5, 12, 20):
        owner = shell.start(*words, "--compensate") if count == 5 else shell.start("resume")
        until(partial(undone, count), f"{count} effects to be undone")
        owner.kill_group()
    shell("resume", code=1)
    assert not +paid(shell)
    assert Counter(line for line in shell.ran() if line.startswith("back")).most_common(1)[0][1] <= 2  # in doubt: once more
    assert shell.json("show")["status"] in ("failed", "compensation_failed")


def test_a_failed_run_is_undone_afterwards(shell: Shell, words: list[object]) -> None:
    shell(*words, code=1)
    assert len(+paid(shell)) == COUNT
    answer = shell("cancel", "--compensate")
    assert f"cancelled; what it did is undone: {COUNT} effects" in answer.out
    assert not +paid(shell)
    shell("cancel", "--compensate", code=2)

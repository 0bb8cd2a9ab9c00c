"""A run that grows as it goes, killed with SIGKILL and resumed from the command line: it ends right, and repeats nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from parflow.api.runs import open_run

from .shell import Shell, until

FLOW = '''
"""Improve an estimate turn by turn: each turn is decided by the last one, and is a graph that a task returned."""

import os

import parflow as pf


class Estimate:
    """A result of this file's own class."""

    def __init__(self, turn, value):
        self.turn = turn
        self.value = value


def note(log, what):
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, f"{what:<31}\\n".encode())
    os.close(handle)


@pf.task
def measure(estimate, log):
    note(log, f"measure{estimate.turn}")
    return estimate.value * 3 % 1009


def shift(n, by, log):
    note(log, f"shift{by}.{n}")
    return n + by


@pf.task
def improve(estimate, measured, seen, log):
    note(log, f"improve{estimate.turn}")
    return pf.call(turn, Estimate(estimate.turn + 1, measured + seen), log)


@pf.task
def turn(estimate, log):
    """Go on with the next turn, until there were thirty."""
    note(log, f"turn{estimate.turn}")
    if estimate.turn == 30:
        return estimate
    measured = pf.call(measure, estimate, log)
    seen = pf.items([1, 2, 3], chunk_records=1).map(shift, measured, log).reduce(pf.sum())
    return improve(estimate, measured, seen, log)


def value_of(estimate):
    assert type(estimate).__name__ == "Estimate", estimate
    return {"turn": estimate.turn, "value": estimate.value}


@pf.workflow
def grow(log: str):
    return pf.call(value_of, pf.call(turn, Estimate(0, 1), log))


@pf.workflow
def fan(log: str, count: int = 40):
    """Many calls side by side, of which every one is wanted."""
    return pf.call(sum, [measure(Estimate(n, n), log) for n in range(count)])
'''


def grown() -> dict[str, int]:
    """Return what the workflow gives, in a plain loop."""
    value = 1
    for _ in range(30):
        measured = value * 3 % 1009
        value = measured + sum(n + measured for n in (1, 2, 3))
    return {"turn": 30, "value": value}


@pytest.fixture
def flow(shell: Shell) -> Path:
    path = shell.folder / "growing.py"
    path.write_text(FLOW)
    return path


def made(shell: Shell) -> Counter[str]:
    """Return how many calls of each task have what they gave in the journal."""
    state = open_run(home=shell.home).state
    return Counter(state.tasks[call.facts.task].name for call in state.calls if call.results or call.grown)


def test_a_growing_run_that_is_killed_again_and_again_ends_right_and_repeats_no_finished_call(shell: Shell, flow: Path) -> None:
    words: list[object] = ["run", f"{flow}:grow", "--log", shell.log, "--workers", 2]
    settled: dict[str, int] = {}  # how often each finished call was made when it was seen to be finished
    kills = (1, 40, 90, 91, 150)
    for lines in kills:
        started = shell.start(*words)
        until(lambda lines=lines: len(shell.ran()) >= lines, "the moment to kill")  # type: ignore[misc]
        started.kill_group()
        shell.all_gone()
        ran = Counter(shell.ran())
        for name, count in made(shell).items():  # a turn comes after the other, so that these are the first ones
            for turn in range(count):
                settled.setdefault(f"{name}{turn}", ran[f"{name}{turn}"])
        words = ["resume", "last", "--workers", 2]
    assert len(settled) > 50

    done = shell.json(*words)
    assert (done["status"], done["result"]) == ("succeeded", grown())
    ran = Counter(shell.ran())
    assert len(ran) == 31 + 30 * (1 + 3 + 1)
    assert settled.items() <= ran.items()
    # In hand when the process was killed was a call, or the three records of a stage.
    assert sum(count - 1 for count in ran.values()) <= 3 * len(kills)


def test_calls_side_by_side_are_killed_and_only_those_without_a_result_are_made_again(shell: Shell, flow: Path) -> None:
    started = shell.start("run", f"{flow}:fan", "--log", shell.log, "--count", 2000, "--workers", 2)
    until(lambda: len(shell.ran()) >= 500, "the moment to kill")
    started.kill_group()
    shell.all_gone()
    calls = open_run(home=shell.home).state.calls
    kept = {f"measure{number}" for number in range(2000) if calls[number].results}
    assert 0 < len(kept) < 2000
    assert kept <= {*shell.ran()}

    assert shell.json("resume", "last", "--workers", 2)["result"] == sum(n * 3 % 1009 for n in range(2000))
    ran = Counter(shell.ran())
    assert len(ran) == 2000
    assert not kept & {name for name, count in ran.items() if count > 1}


def test_a_workflow_of_calls_whose_code_changed_is_not_gone_on_with_unless_forced(shell: Shell, flow: Path) -> None:
    started = shell.start("run", f"{flow}:fan", "--log", shell.log, "--count", 2000, "--workers", 2)
    until(lambda: len(shell.ran()) >= 100, "the moment to kill")
    started.kill_group()
    shell.all_gone()
    flow.write_text(FLOW.replace("value * 3 % 1009", "value * 5 % 1009"))
    refused = shell("resume", "last", code=1)
    assert "task 'measure' changed" in refused.err + refused.out
    assert shell.json("resume", "last", "--force", "--workers", 2)["result"] == sum(n * 3 % 1009 for n in range(2000))

"""Ctrl-C: once, what is in hand is finished and kept; twice, the end is at once. Either way the run goes on later."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from parflow.api.runs import list_runs

from .shell import ALL, Done, Shell, Started, Terminal, has_run, resumed, until


@pytest.fixture(params=["a pipe", "a terminal"])
def begin(request: pytest.FixtureRequest, shell: Shell) -> Callable[..., Started | Terminal]:
    """Start a command in a terminal of its own, or without one."""
    return shell.terminal if request.param == "a terminal" else shell.start


def ended(started: Started | Terminal) -> Done:
    """Wait for the end of a command; a terminal shows both streams as one."""
    return Done(started.wait(), "", started.shown) if isinstance(started, Terminal) else started.wait()


def told(started: Started | Terminal) -> str:
    """Return what a command has said so far."""
    return started.shown if isinstance(started, Terminal) else started.err.read_text()


def test_ctrl_c_once_finishes_what_is_in_hand_and_begins_nothing_more(
    shell: Shell, words: list[object], begin: Callable[..., Started | Terminal], tmp_path: Path
) -> None:
    started = begin(*words)
    until(has_run(shell, 2), "a record in each child")
    started.press_ctrl_c()
    until(shell.asked_to_stop, "the children to be asked to stop")
    assert "stopping at the next record; Ctrl-C once more to stop at once" in told(started)
    (tmp_path / "gate").touch()
    done = ended(started)

    assert done.code == 130
    assert len(shell.ran()) == 2
    (run,) = shell.json("runs")
    assert run["status"] == "stopped"
    assert f"parflow resume {run['run_id']}" in done.err
    assert "Traceback" not in done.err
    assert shell.json("show")["stages"][0]["records"] == 2
    assert not shell.out.exists() or not list(shell.out.glob("[!.]*"))
    shell.all_gone()

    resumed(shell)
    assert sorted(shell.ran()) == sorted(ALL)


def test_ctrl_c_twice_ends_at_once_whatever_is_in_hand(
    shell: Shell, words: list[object], begin: Callable[..., Started | Terminal], tmp_path: Path
) -> None:
    started = begin(*words)
    until(has_run(shell, 2), "a record in each child")
    started.press_ctrl_c()
    until(lambda: "stopping at the next record" in told(started), "an answer to Ctrl-C")
    until(shell.asked_to_stop, "the children to be asked to stop")
    assert started.process.poll() is None
    started.press_ctrl_c()
    done = ended(started)  # the gate is still closed: nothing in hand could end by itself

    assert done.code == 130
    assert len(shell.ran()) == 2
    (run,) = shell.json("runs")
    assert run["status"] == "stopped"
    assert f"parflow resume {run['run_id']}" in done.err
    assert re.findall(r"Traceback|ERROR|Exception", done.err) == []
    assert shell.json("failures") == []
    shell.all_gone()

    (tmp_path / "gate").touch()
    resumed(shell)
    assert sum((Counter(shell.ran()) - Counter(ALL)).values()) == 2


def test_ctrl_c_is_heard_in_a_resumed_run_as_well(shell: Shell, words: list[object], tmp_path: Path) -> None:
    for command in (words, ["resume", "--workers", 2]):
        before = len(shell.ran())
        started = shell.start(*command)
        until(has_run(shell, before + 2), "a record in each child")
        started.press_ctrl_c()
        until(shell.asked_to_stop, "the children to be asked to stop")
        started.press_ctrl_c()
        assert started.wait().code == 130
        shell.all_gone()
    (tmp_path / "gate").touch()
    resumed(shell)


def test_ctrl_c_with_json_still_prints_one_object(shell: Shell, words: list[object], tmp_path: Path) -> None:
    started = shell.start(*words, "--json")
    until(lambda: shell.ran(), "a record")
    started.press_ctrl_c()
    until(shell.asked_to_stop, "the children to be asked to stop")
    (tmp_path / "gate").touch()
    done = started.wait()
    assert (done.code, done.json["status"], done.json["result"]) == (130, "stopped", None)
    assert f"parflow resume {done.json['run_id']}" in done.json["error"]


def test_ctrl_c_as_soon_as_the_run_exists_ends_it_quietly(shell: Shell, words: list[object]) -> None:
    started = shell.start(*words)
    until(lambda: (shell.home / "journal.sqlite").exists() and list_runs(shell.home), "the run in the journal")
    started.press_ctrl_c()
    until(lambda: not started.alive or shell.children(), "its end, or children")
    if started.alive:
        started.press_ctrl_c()
    done = started.wait()
    assert done.code == 130
    assert re.findall(r"Traceback|ERROR|Exception", done.err) == []
    assert done.err
    shell.all_gone()


def test_ctrl_c_before_there_is_a_run_ends_quietly(shell: Shell, tmp_path: Path) -> None:
    flow = tmp_path / "slow.py"
    flow.write_text("import pathlib, time\npathlib.Path('here').touch()\ntime.sleep(60)\n")
    started = shell.start("run", flow)
    until((tmp_path / "here").exists, "the flow's file to be read")
    started.press_ctrl_c()
    assert started.wait() == Done(130, "", "parflow: interrupted\n")
    assert shell.json("runs") == []

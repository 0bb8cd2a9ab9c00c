"""Cancelling a run from another shell, and SIGTERM, which is how a cluster takes a machine away."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import parflow as pf
from parflow.errors import RunCancelledError, UsageError

from .shell import ALL, Shell, Started, has_run, resumed, until

# --- cancelling --------------------------------------------------------------------------------------------------------


def test_a_run_is_cancelled_from_another_shell_and_what_is_done_is_kept(
    shell: Shell, words: list[object], tmp_path: Path
) -> None:
    owner = shell.start(*words)
    until(has_run(shell, 2), "a record in each child")
    cancelling = shell.start("cancel", "last")
    until(shell.asked_to_stop, "the children to be asked to stop")
    assert cancelling.alive  # it waits for the end
    (tmp_path / "gate").touch()
    cancelled, ended = cancelling.wait(), owner.wait()

    (run,) = shell.json("runs")
    assert run["status"] == "cancelled"
    assert cancelled.code == 0
    name = run["run_id"]
    assert cancelled.out == f"run {name}: cancelled; 0 of 6 chunks done; it goes on with: parflow resume {name}\n"
    assert ended.code == 1
    assert f"run {name} was cancelled. Everything finished is kept; `parflow resume {name}`" in ended.err
    assert "Traceback" not in ended.err + cancelled.err
    assert len(shell.ran()) == 2
    assert shell.json("show")["status"] == "cancelled"
    assert f"run {name}: cancelled\n" in shell("show").out
    assert f"go on with: parflow resume {name}" in shell("show").out
    assert "cancelled" in shell("runs").out
    shell.all_gone()

    resumed(shell)
    assert sorted(shell.ran()) == sorted(ALL)


def test_cancelling_now_abandons_what_is_in_hand(shell: Shell, words: list[object], tmp_path: Path) -> None:
    owner = shell.start(*words)
    until(has_run(shell, 2), "a record in each child")
    first = shell.json("cancel", "--no-wait")
    assert first["status"] == "running"
    until(shell.asked_to_stop, "the children to be asked to stop")
    answer = shell.json("cancel", "--now")  # the gate is still closed: nothing in hand could end by itself
    assert answer == {"run_id": first["run_id"], "status": "cancelled", "chunks": 6, "done": 0}
    assert owner.wait().code == 1
    assert shell.json("failures") == []
    shell.all_gone()

    (tmp_path / "gate").touch()
    resumed(shell)
    assert sum((Counter(shell.ran()) - Counter(ALL)).values()) == 2


def test_a_run_without_an_owner_is_cancelled_in_its_place(shell: Shell, words: list[object], tmp_path: Path) -> None:
    owner = shell.start(*words)
    until(has_run(shell, 2), "a record in each child")
    owner.kill_group()
    assert shell.json("show")["status"] == "lost"
    assert shell.json("cancel")["status"] == "cancelled"
    with pytest.raises(RunCancelledError):
        pf.open_run(home=shell.home).result()
    (tmp_path / "gate").touch()
    resumed(shell)


def test_a_stopped_run_may_be_cancelled(shell: Shell, words: list[object], tmp_path: Path) -> None:
    owner = shell.start(*words)
    until(has_run(shell, 2), "a record in each child")
    for _ in range(2):
        owner.press_ctrl_c()
        until(lambda: not owner.alive or shell.asked_to_stop(), "an answer to Ctrl-C")
    owner.wait()
    assert shell.json("show")["status"] == "stopped"
    assert shell.json("cancel")["status"] == "cancelled"
    (tmp_path / "gate").touch()
    resumed(shell)


@pytest.mark.parametrize(("source", "status"), [("1\n", "succeeded"), ("x\n", "failed")])
def test_a_run_that_has_ended_can_not_be_cancelled(shell: Shell, tmp_path: Path, source: str, status: str) -> None:
    (tmp_path / "lines.txt").write_text(source)
    words = shell.flow("numbers", "--source", tmp_path / "lines.txt", "--log", shell.log)
    run = shell.json(*words, code=int(status == "failed"))
    done = shell("cancel", code=2)
    assert done.err == f"parflow: run {run['run_id']} has ended already ({status}): there is nothing to cancel\n"
    assert shell.json("show")["status"] == status
    assert "no run 'nobody'" in shell("cancel", "nobody", code=1).err


def test_a_cancelled_run_can_not_be_cancelled_again(shell: Shell, words: list[object]) -> None:
    owner = shell.start(*words)
    until(has_run(shell, 2), "a record in each child")
    shell("cancel", "--now")
    owner.wait()
    assert "has ended already (cancelled before)" in shell("cancel", code=2).err


def test_a_run_of_this_process_is_cancelled_by_itself_and_by_whoever_opens_it(tmp_path: Path) -> None:
    def wait(number: int) -> int:
        (tmp_path / f"began-{number}").touch()
        while not (tmp_path / "gate").exists():
            os.sched_yield()
        return number

    numbers = pf.items([1, 2, 3], chunk_records=1).map(wait).reduce(pf.sum())
    run = numbers.run(home=tmp_path / "home", workers=1, wait=False)
    until((tmp_path / "began-1").exists, "the first record")
    assert pf.open_run(home=tmp_path / "home").cancel(now=True).status == "cancelled"
    with pytest.raises(RunCancelledError, match=f"parflow resume {run.run_id}"):
        run.result()
    with pytest.raises(UsageError, match="nothing to cancel"):
        run.cancel()

    again = pf.resume(home=tmp_path / "home", workers=1, wait=False)
    assert again.cancel(now=True).status == "cancelled"
    (tmp_path / "gate").touch()
    assert pf.resume(home=tmp_path / "home").result() == 6


# --- SIGTERM -----------------------------------------------------------------------------------------------------------


def terminate(started: Started) -> None:
    os.kill(started.process.pid, signal.SIGTERM)


def everybody(shell: Shell) -> Callable[[Started], None]:
    """Return what signals a command and all that it started, as whoever ends a control group does."""

    def send(started: Started) -> None:
        for process in sorted(shell.processes(), key=lambda process: process.pid != started.process.pid):
            process.terminate()

    return send


@pytest.mark.parametrize("whom", ["the command alone", "all of its processes"])
def test_sigterm_keeps_what_is_done_and_a_resume_repeats_nothing_of_it(
    shell: Shell, words: list[object], tmp_path: Path, whom: str
) -> None:
    signalled = terminate if whom == "the command alone" else everybody(shell)
    for command, count in ((words, 2), (["resume", "--workers", 2], 4)):
        owner = shell.start(*command)
        until(has_run(shell, count), "a record in each child")
        signalled(owner)
        until(shell.asked_to_stop, "the children to be asked to stop")
        (tmp_path / "gate").touch()
        done = owner.wait()
        assert done.code == 143
        (run,) = shell.json("runs")
        assert run["status"] == "stopped"
        assert f"parflow resume {run['run_id']}" in done.err
        assert "Traceback" not in done.err
        assert shell.json("show")["stages"][0]["records"] == count
        assert shell.json("failures") == []
        shell.all_gone()
        (tmp_path / "gate").unlink()
    (tmp_path / "gate").touch()
    resumed(shell)
    assert sorted(shell.ran()) == sorted(ALL)


def test_a_second_sigterm_ends_at_once(shell: Shell, words: list[object], tmp_path: Path) -> None:
    owner = shell.start(*words)
    until(has_run(shell, 2), "a record in each child")
    terminate(owner)
    until(shell.asked_to_stop, "the children to be asked to stop")
    assert owner.alive
    terminate(owner)
    done = owner.wait()  # the gate is still closed
    assert done.code == 143
    assert re.findall(r"Traceback|ERROR|Exception", done.err) == []
    shell.all_gone()
    (tmp_path / "gate").touch()
    resumed(shell)


def test_sigterm_before_there_is_a_run_ends_quietly(shell: Shell, tmp_path: Path) -> None:
    flow = tmp_path / "slow.py"
    flow.write_text("import pathlib, time\npathlib.Path('here').touch()\ntime.sleep(60)\n")
    started = shell.start("run", flow)
    until((tmp_path / "here").exists, "the flow's file to be read")
    terminate(started)
    done = started.wait()
    assert (done.code, done.err) == (143, "parflow: interrupted\n")
    assert shell.json("runs") == []

"""Chaos: what belongs to a run is killed at random moments, nothing else is, and the run ends with exactly the right result."""

from __future__ import annotations

import itertools
from pathlib import Path

import cloudpickle
import psutil
import pytest
from distributed import LocalCluster

import parflow as pf
from parflow.errors import ParflowError, TooManyFailuresError, UsageError
from parflow.testing import Chaos, Survived

from . import flows
from .shell import FLOWS, Shell, until

cloudpickle.register_pickle_by_value(flows)  # workers don't have the tests

COUNT = 800


RIGHT = sum(range(COUNT)), COUNT


def begun(run: pf.Run) -> bool:
    """Tell whether the first chunk of a run is done."""
    return any(not chunk.pending for stage in run.state.stages for chunk in stage.chunks)


# --- the plan of it --------------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_moments_and_another_one_draws_others() -> None:
    def first(seed: int) -> list[object]:
        return list(itertools.islice(Chaos(seed=seed, children=2.0, workers=0.5, coordinator=0.2).moments(), 100))

    assert first(7) == first(7)
    assert first(7) != first(8)


def test_moments_come_as_often_as_the_rates_say() -> None:
    moments = list(itertools.islice(Chaos(seed=7, children=2.0, workers=0.5, coordinator=0.2).moments(), 20_000))
    seconds = sum(moment.seconds for moment in moments)
    rates = [sum(moment.what == what for moment in moments) / seconds for what in ("child", "worker", "coordinator")]
    assert rates == pytest.approx([2.0, 0.5, 0.2], rel=0.05)


def test_chaos_wants_something_to_kill() -> None:
    with pytest.raises(UsageError, match="give children=, workers= or coordinator="):
        Chaos(seed=7)


# --- a run of this process -------------------------------------------------------------------------------------------------


def test_a_run_whose_children_and_fork_server_are_killed_ends_with_the_right_result() -> None:
    run = flows.total(COUNT).run(workers=2, wait=False)
    until(lambda: begun(run), "the first chunk")
    with Chaos(seed=7, children=3.0, workers=1.0).on(run) as storm:
        assert run.result() == RIGHT
    assert storm.kills
    assert run.dead_letters() == []


def test_a_run_on_a_cluster_whose_workers_are_killed_ends_with_the_right_result(tmp_path: Path) -> None:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster:
        nannies = {worker.process.pid for worker in cluster.workers.values()}
        run = flows.total(2 * COUNT).run(cluster=cluster, wait=False)
        until(lambda: begun(run), "the first chunk")
        with Chaos(seed=6, children=1.0, workers=0.3, most=4).on(run) as storm:
            assert run.result() == (sum(range(2 * COUNT)), 2 * COUNT)
    assert {kill.what for kill in storm.kills} <= {"child", "worker"}
    assert {kill.pid for kill in storm.kills if kill.what == "worker"} & nannies
    assert run.dead_letters() == []


def test_another_run_beside_it_is_left_alone() -> None:
    calm = flows.total(COUNT).run(workers=1, wait=False)
    run = flows.total(COUNT).run(workers=2, wait=False)
    until(lambda: begun(calm) and begun(run), "the first chunks")
    assert calm._executor is not None
    assert calm._executor.hands is not None
    sandbox = calm._executor.hands.sandbox
    assert sandbox is not None
    assert sandbox.server.process is not None
    others = {sandbox.server.process.pid, *(child.pid for child in [*sandbox.idle, *sandbox.busy.values()])}
    with Chaos(seed=7, children=20.0, workers=5.0, most=12).on(run) as storm:
        until(lambda: len(storm.kills) == 12 or run.status != "running", "twelve kills")
    assert storm.kills
    assert others.isdisjoint(kill.pid for kill in storm.kills)
    assert all(psutil.pid_exists(pid) for pid in others)
    run.stop(now=True)
    assert calm.result() == RIGHT


def test_the_coordinator_of_this_process_is_never_killed() -> None:
    run = flows.total(10).run(workers=1)
    with pytest.raises(UsageError, match=r"write chaos\.survive"):
        Chaos(seed=7, coordinator=1.0).on(run)
    with pytest.raises(UsageError, match="start it here, with wait=False"):
        Chaos(seed=7, children=1.0).on(pf.open_run(run.run_id))


# --- a program of its own --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_program_that_is_killed_whole_and_in_parts_goes_on_to_the_right_result(tmp_path: Path, shell: Shell) -> None:
    chaos = Chaos(seed=3, children=1.0, workers=0.3, coordinator=1.0, most=8)
    survived = chaos.survive(f"{FLOWS}:total", workers=2, home=shell.home, count=2 * COUNT)
    assert survived.result == (sum(range(2 * COUNT)), 2 * COUNT)
    killed = [kill.what for kill in survived.kills]
    assert "coordinator" in killed
    assert survived.starts == 1 + killed.count("coordinator")
    assert survived.run.status == "succeeded"
    assert survived.run.dead_letters() == []
    shell.all_gone()


def test_a_run_that_fails_by_itself_is_not_begun_again(tmp_path: Path, shell: Shell) -> None:
    lines = tmp_path / "lines"
    lines.write_text("1\nno number\n")

    def survive(**arguments: object) -> Survived:
        return Chaos(seed=1, children=0.001).survive(f"{FLOWS}:numbers", workers=1, home=shell.home, **arguments)

    with pytest.raises(TooManyFailuresError):
        survive(source=lines, log=tmp_path / "log")
    assert survive(source=lines, log=tmp_path / "log", max_failures=1).result == 1
    with pytest.raises(ParflowError, match="exit code 2, without a run:\nparflow: numbers wants --log"):
        survive(source=lines)

"""The recipe agents.py, on two workers, with the service that stands beside it: real HTTP on this machine."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import parflow as pf

agents: pf.Workflow = importlib.import_module("agents").agents
stub: Any = importlib.import_module("stub_service")

ROOT = Path(__file__).parents[2]
ANSWER = {"answer": "Mount Everest is 8,849 m high. The Mariana Trench is 10,984 m deep.", "by": "write"}
KINDS = {"expert": 1, "compute": 1, "search": 1, "guess": 3, "write": 1}
"""What the five workers ask for, and how often."""


@pytest.fixture
def service() -> Iterator[Any]:
    with stub.Service() as running:
        yield running


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a run from the command line in a group of processes of its own; it's killed at the end, if not before."""
    begun = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "parflow.cli", "run", str(ROOT / "recipes/agents.py"), *words, "--workers", "2"]
        begun.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True))
        return begun[-1]

    yield start
    for process in begun:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def calls(run: pf.Run, what: str) -> set[str]:
    """Name the calls of tasks of which something holds."""
    state = run.state
    return {state.tasks[call.facts.task].name for call in state.calls if call.facts.task >= 0 and getattr(call, what)}


# --- drafts that are enough ----------------------------------------------------------------------------------------------


def test_three_drafts_are_enough_and_the_slowest_worker_hangs_up(service: Any) -> None:
    service.slow["expert"] = 300
    service.failing["compute"] = 1
    run = agents(service.url).run(workers=2)
    assert run.result() == ANSWER
    assert service.wait_until(lambda: service.left["expert"] == 1)
    assert service.left.total() == 1
    assert service.asked == {"plan": 1, "research": 2, **KINDS, "judge": 1}  # nobody was asked twice
    assert calls(run, "cancelled") == {"expert"}


def test_a_worker_that_fails_is_named_and_ends_nothing(service: Any) -> None:
    service.slow["expert"] = 300  # so that three of the other four are wanted
    service.failing["search"] = 1
    run = agents(service.url).run(workers=2)
    assert run.result() == ANSWER
    assert run.status == "succeeded"
    (failure,) = run.dead_letters()
    assert (failure.step, failure.error) == ("search", "HTTPStatusError")
    assert "503 Service Unavailable" in failure.message


@pytest.mark.parametrize("broken", [*itertools.combinations(KINDS, 2)], ids=" ".join)
def test_any_two_workers_may_fail(service: Any, broken: tuple[str, str]) -> None:
    service.failing.update({kind: KINDS[kind] for kind in broken})
    result = agents(service.url).run(workers=2).result()
    if "write" in broken:  # the others' drafts have half of the answer
        assert result["because"].endswith("is 50% sure")
    else:
        assert result == ANSWER
    assert service.asked["judge"] == 1


def test_research_goes_on_for_as_many_parts_as_the_plan_has_and_all_of_them_at_the_same_time() -> None:
    class Meeting(stub.Service):  # type: ignore[misc]
        """Answers a part only when all of them are there."""

        barrier = threading.Barrier(12)

        def reply(self, what: str, given: dict[str, Any]) -> Any:
            if what == "research":
                self.barrier.wait(30)
            return super().reply(what, given)

    with Meeting(failing={"compute": 1, "search": 1}) as service:  # without the draft that needs notes there are too few
        agents(service.url, ", ".join(f"part {number}" for number in range(12))).run(workers=2).result()
        assert service.asked["research"] == 12


def test_a_plan_without_parts_has_nothing_to_look_into(service: Any) -> None:
    assert agents(service.url, "?").run(workers=2).result()["because"].endswith("0% sure")
    assert service.asked["research"] == 0


# --- when it can't be answered -------------------------------------------------------------------------------------------


def test_a_judge_who_is_not_sure_calls_a_person_and_gives_no_answer(service: Any) -> None:
    service.failing.update({"compute": 1, "search": 1})  # or three others are as quick as the one that needs notes
    run = agents(service.url, enough=1.5).run(workers=2)
    assert run.result() == {"a person should answer": "How high is Mount Everest and how deep is the Mariana Trench?"} | {
        "because": "write is 100% sure"
    }
    assert "answer" not in calls(run, "ended")
    assert "escalate" in calls(run, "ended")


def test_too_few_drafts_call_a_person_without_asking_the_judge(service: Any) -> None:
    service.slow["expert"] = 300
    service.failing.update({"compute": 1, "search": 1, "write": 1})
    run = agents(service.url).run(workers=2)
    assert "503 Service Unavailable" in run.result()["because"]
    assert run.status == "succeeded"
    assert service.asked["judge"] == 0
    assert service.wait_until(lambda: service.left["expert"] == service.asked["expert"])


@pytest.mark.parametrize(("broken", "unasked"), [("judge", ""), ("research", "write"), ("plan", "research")])
def test_whatever_else_is_out_of_order_fails_no_run(service: Any, broken: str, unasked: str) -> None:
    service.failing[broken] = 99
    run = agents(service.url).run(workers=2)
    assert "a person should answer" in run.result()
    assert run.status == "succeeded"
    assert service.asked[unasked] == 0


def test_a_service_that_is_not_there_calls_a_person() -> None:
    with stub.Service() as gone:
        pass
    assert "ConnectError" not in (because := agents(gone.url).run(workers=2).result()["because"])
    assert "connection attempts failed" in because


# --- killed and resumed --------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_at_the_judge_asks_nobody_else_again(
    service: Any, begin: Callable[..., Any], command: Callable[..., str]
) -> None:
    service.slow.update({"judge": 300, "expert": 300})
    service.failing["compute"] = 1
    process = begin("--url", service.url)
    assert service.wait_until(lambda: service.asked["judge"] == 1)
    kill(process)
    assert service.wait_until(lambda: service.left == {"judge": 1, "expert": 1})
    before = service.asked.copy()

    service.slow.clear()
    assert json.loads(command("-m", "parflow.cli", "resume", "last", "--json"))["result"] == ANSWER
    assert service.asked - before == {"judge": 1}
    assert before["research"] == 2


def test_a_run_that_is_killed_in_its_research_asks_only_for_what_was_in_flight(
    home: Path, begin: Callable[..., Any], command: Callable[..., str]
) -> None:
    parts: Counter[str] = Counter()

    class Stuck(stub.Service):  # type: ignore[misc]
        """Knows no answer to the last part, as long as it's stuck."""

        free = threading.Event()

        def reply(self, what: str, given: dict[str, Any]) -> Any:
            if what == "research":
                parts[given["question"]] += 1
                if given["question"] == "part 44":
                    self.free.wait(60)
            return super().reply(what, given)

    with Stuck(failing={"compute": 9, "search": 9}) as service:
        process = begin("--url", service.url, "--question", ", ".join(f"part {number}" for number in range(45)))
        assert service.wait_until(lambda: service.asked["research"] == 45)
        end = time.monotonic() + 30
        while pf.open_run(home=home).state.stages[0].records < 40:  # twenty at a time: two chunks of three
            assert time.monotonic() < end
        kill(process)
        service.free.set()
        result = json.loads(command("-m", "parflow.cli", "resume", "last", "--json"))["result"]
        assert result["because"].endswith("0% sure")
        assert service.asked["plan"] == 1
        assert parts == {f"part {number}": 1 + (number >= 40) for number in range(45)}

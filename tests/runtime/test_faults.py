"""Fault scripts: each fault happens where it is to, at the attempt that it is to, and flows answer as they do to real ones."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import parflow as pf
from parflow.errors import CallFailedError, UsageError
from parflow.testing import Fault, Faults, Happened


@pf.task(timeout="500ms", memory="200MiB")
def double(number: int) -> int:
    return 2 * number


@pf.workflow
def doubles(count: int = 6) -> Any:
    return pf.items(range(count), chunk_records=3).map(double)


class Doubler:
    """Built once a child."""

    def __init__(self, factor: int = 2) -> None:
        self.factor = factor

    def __call__(self, number: int) -> int:
        return self.factor * number


async def double_later(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def doubles_later(number: int) -> AsyncIterator[int]:
    yield 2 * number


@pytest.mark.parametrize(
    ("fault", "cause", "error"),
    [
        (Fault("double", record=4), "exception", "InjectedError"),
        (Fault("double", record=4, error=ConnectionError("down")), "exception", "ConnectionError"),
        (Fault("double", "crash", record=4), "crash", "RecordCrashedError"),
        (Fault("double", "kill", record=4), "crash", "RecordCrashedError"),
        (Fault("double", "exit", record=4), "crash", "RecordCrashedError"),
        (Fault("double", "hang", record=4), "timeout", "RecordTimeoutError"),
        (Fault("double", "memory", record=4, size="1GiB"), "memory", "RecordMemoryError"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_a_fault_costs_its_record_and_no_other(fault: Fault, cause: str, error: str) -> None:
    faults = Faults([fault])
    run = faults.on(doubles()).run(workers=1, max_failures=1)
    assert list(run.result()) == [0, 2, 4, 6, 10]
    (failure,) = run.dead_letters()
    assert (failure.step, failure.cause, failure.error) == ("double", cause, error)
    assert set(faults.happened()) >= {Happened("double", fault.kind, "4", 1)}


def test_memory_that_may_be_taken_and_slowness_cost_nothing_but_time() -> None:
    faults = Faults([Fault("double", "memory", size="1MiB"), Fault("double", "slow", seconds="1ms")])
    assert list(faults.on(doubles()).run(workers=1).result()) == [0, 2, 4, 6, 8, 10]
    assert sorted(happened.kind for happened in faults.happened()) == ["memory"] * 6 + ["slow"] * 6


@pytest.mark.parametrize("kind", ["crash", "kill", "exit"])
def test_attempts_are_counted_across_the_deaths_of_children(kind: Any) -> None:
    faults = Faults([Fault("double", kind, record=4, attempt=1)])
    run = faults.on(doubles()).run(workers=1)
    assert list(run.result()) == [0, 2, 4, 6, 8, 10]
    assert faults.happened() == [Happened("double", kind, "4", 1)]


def test_each_record_has_attempts_of_its_own() -> None:
    faults = Faults([Fault("double", "kill", record=lambda number: number % 2 == 0, attempt=1)])
    assert list(faults.on(doubles()).run(workers=2).result()) == [0, 2, 4, 6, 8, 10]
    assert sorted(faults.happened(), key=lambda happened: happened.record) == [
        Happened("double", "kill", record, 1) for record in ("0", "2", "4")
    ]


def test_a_call_fails_and_is_made_again_when_its_run_is_resumed(tmp_path: Path) -> None:
    @pf.task
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @pf.workflow
    def flow() -> Any:
        return total(doubles.function(3))

    faults = Faults([Fault("total", record=[0, 2, 4], attempt=(1, 2))], folder=tmp_path / "faults")
    run = faults.on(flow()).run(workers=1)
    with pytest.raises(CallFailedError, match="attempt 1"):
        run.result()
    with pytest.raises(CallFailedError, match="attempt 2"):
        pf.resume(run.run_id, workers=1).result()
    assert pf.resume(run.run_id, workers=1).result() == 6
    assert [happened.attempt for happened in faults.happened()] == [1, 2]


@pytest.mark.parametrize(
    "dataset",
    [
        lambda items: items.map(pf.task(name="double")(Doubler)),
        lambda items: items.map(pf.task(name="double")(partial(Doubler, factor=2))),
        lambda items: items.map(pf.task(name="double")(Doubler())),
        lambda items: items.map(pf.task(name="double", concurrency=3)(double_later)),
        lambda items: items.flat_map(pf.task(name="double", concurrency=3)(doubles_later)),
        lambda items: items.flat_map(pf.task(name="double")(lambda number: [2 * number])),
        lambda items: items.map_batches(pf.task(name="double")(lambda batch: [2 * number for number in batch]), 4),
    ],
    ids=["class", "class with arguments", "object", "async", "async generator", "flat_map", "batches"],
)
@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_every_form_of_step_fails_for_its_record_alone(dataset: Any, kind: Any) -> None:
    faults = Faults([Fault("double", kind, record=3)])
    run = faults.on(dataset(pf.items(range(6), chunk_records=6))).run(workers=1, max_failures=1)
    assert list(run.result()) == [0, 2, 4, 8, 10]
    assert [failure.ordinal for failure in run.dead_letters()] == [3]


@pytest.mark.parametrize("form", ["pandas", "arrow"])
def test_rows_of_tables_are_told_apart(form: Any) -> None:
    faults = Faults([Fault("same", record={"n": 3})])
    rows = pf.items([{"n": n} for n in range(6)], chunk_records=6)
    run = faults.on(rows.map_batches(lambda table: table, 4, as_=form, name="same")).run(workers=1, max_failures=1)
    assert [row["n"] for row in run.result()] == [0, 1, 2, 4, 5]


def test_a_task_by_itself_fails_as_it_would_in_a_flow() -> None:
    faulty = Faults([Fault("double", record=4, attempt=1)]).on(double)
    assert faulty(3) == 6
    with pytest.raises(pf.ParflowError, match="step 'double' lets attempt 1 fail"):
        faulty(4)
    assert faulty(4) == double(4) == 8
    assert (faulty.timeout, faulty.memory) == (double.timeout, double.memory)


def test_a_flow_without_its_script_has_no_faults() -> None:
    faults = Faults([Fault("double")])
    bound = doubles()
    faulty = faults.on(bound).run(isolation="inline", max_failures=6)
    assert list(faulty.result()) == []
    assert list(bound.run(isolation="inline").result()) == [0, 2, 4, 6, 8, 10]


def test_a_fault_for_a_step_that_is_not_there_is_told_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="no step is called 'triple', which is to fail; there are double"):
        Faults([Fault("triple")]).on(doubles()).run()
    with pytest.raises(UsageError, match="kind='explode' is unknown"):
        Fault("double", "explode")  # type: ignore[arg-type]


def test_a_deadly_fault_never_ends_the_process_that_made_the_script() -> None:
    run = Faults([Fault("double", "kill", record=4)]).on(doubles()).run(isolation="inline", max_failures=1)
    assert list(run.result()) == [0, 2, 4, 6, 10]
    assert "it wants a child" in run.dead_letters()[0].message


def test_what_a_script_kept_goes_with_its_process() -> None:
    code = "from parflow.testing import *; faults = Faults([Fault('abs', 'slow')]); faults.on(abs)(1); print(faults.folder)"
    folder = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(folder).name.startswith("parflow-faults-")
    assert not Path(folder).exists()

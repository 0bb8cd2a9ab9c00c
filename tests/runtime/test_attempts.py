"""Attempts on real runs: what is tried again, how often, when, and what is held back meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import parflow as pf
from parflow.core.entries import Accepted, Turned, decode
from parflow.core.history import RunState
from parflow.errors import CallFailedError, ResourcesMissingError, ResumeError, TooManyFailuresError, UsageError
from parflow.model import Counts
from parflow.runtime import executor
from parflow.storage.journal import Journal


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def note(file: Path, what: object) -> int:
    """Add a line to a file in one write; returns how many lines say that now."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, f"{what}\n".encode())
    os.close(handle)
    return noted(file).count(str(what))


def noted(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1] if file.exists() else []


def failing(log: Path, times: int, how: Callable[[], Any], bad: int = 3) -> Callable[[int], int]:
    """Make a function that fails so often for one record."""

    def work(number: int) -> int:
        if number == bad and note(log, number) <= times:
            how()
        return number

    return work


def refuses() -> None:
    raise ConnectionError("refused")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    time.sleep(60)


def retried(run: pf.Run) -> int:
    return sum((counts.retries for counts in run.state.stages[0].steps.values()), 0)


QUICK = pf.Retry(attempts=3, wait=0.01)


# --- what is tried again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [refuses, dies, hangs])
def test_a_record_that_fails_twice_and_then_succeeds_is_no_dead_letter(log: Path, how: Callable[[], None]) -> None:
    task = pf.task(retry=QUICK, timeout="0.5s")(failing(log, 2, how))
    run = pf.items(range(6)).map(task).reduce(pf.concat()).run(workers=2)
    assert run.result() == [0, 1, 2, 3, 4, 5]
    assert run.dead_letters() == []
    assert noted(log) == ["3"] * 3


@pytest.mark.parametrize(("how", "error"), [(refuses, "ConnectionError"), (dies, "RecordCrashedError")])
def test_a_record_that_fails_every_time_is_a_dead_letter_with_all_its_attempts(
    log: Path, how: Callable[[], None], error: str
) -> None:
    task = pf.task(retry=QUICK)(failing(log, 99, how))
    run = pf.items(range(6)).map(task).reduce(pf.concat()).run(workers=1, max_failures=1)
    assert run.result() == [0, 1, 2, 4, 5]
    (failure,) = run.dead_letters()
    assert (failure.error, failure.attempts, len(failure.earlier)) == (error, 3, 2)
    assert all(line.startswith(error) for line in failure.earlier)
    assert noted(log) == ["3"] * 3
    assert retried(run) == 2


def test_attempts_that_end_a_child_and_attempts_that_raise_are_of_one_budget(log: Path) -> None:
    def work(number: int) -> int:
        if number == 3:
            (dies if note(log, number) == 1 else refuses)()
        return number

    run = pf.items(range(6)).map(pf.task(retry=QUICK)(work)).reduce(pf.count()).run(workers=1, max_failures=1)
    (failure,) = run.dead_letters()
    assert (failure.error, failure.attempts) == ("ConnectionError", 3)
    assert noted(log) == ["3"] * 3


def test_only_what_is_named_is_tried_again(log: Path) -> None:
    task = pf.task(retry=pf.Retry(5, wait=0, on=(TimeoutError, "requests.exceptions.Timeout")))(failing(log, 9, refuses))
    pf.items(range(6)).map(task).reduce(pf.count()).run(workers=1, max_failures=1).result()
    assert noted(log) == ["3"]


def test_a_function_decides_what_is_tried_again(log: Path) -> None:
    retry = pf.Retry(5, wait=0, on=lambda error: "refused" in str(error))
    pf.items(range(6)).map(pf.task(retry=retry)(failing(log, 2, refuses))).reduce(pf.count()).run(workers=1).result()
    assert noted(log) == ["3"] * 3


def test_a_run_says_what_is_tried_again_where_tasks_say_nothing_or_by_name(log: Path, tmp_path: Path) -> None:
    silent = failing(log, 2, refuses)
    assert pf.items(range(6)).map(silent).reduce(pf.count()).run(workers=1, retry=QUICK).result() == 6
    log.unlink()
    impatient = pf.task(retry=1, name="work")(failing(log, 2, refuses))
    graph = pf.items(range(6)).map(impatient).reduce(pf.count())
    assert graph.run(workers=1, retry=QUICK, max_failures=1).result() == 5
    log.unlink()
    assert graph.run(workers=1, retry={"work": QUICK}).result() == 6
    with pytest.raises(UsageError, match="is no Retry"):
        graph.run(retry="often")


def test_plain_dask_tries_again_as_well(log: Path) -> None:
    assert pf.items(range(6)).map(pf.task(retry=QUICK)(failing(log, 2, refuses))).reduce(pf.sum()).compute() == 15
    assert noted(log) == ["3"] * 3


def test_coroutines_are_tried_again_without_holding_up_others(log: Path) -> None:
    async def work(number: int) -> int:
        if number == 3 and note(log, number) < 3:
            raise ConnectionError("refused")
        await asyncio.sleep(0)
        return number

    task = pf.task(retry=QUICK, concurrency=4)(work)
    assert pf.items(range(9)).map(task).reduce(pf.concat()).run(workers=1).result() == [*range(9)]
    assert noted(log) == ["3"] * 3


def test_a_coroutine_that_takes_too_long_is_tried_again(log: Path) -> None:
    async def work(number: int) -> int:
        if number == 3 and note(log, number) < 3:
            await asyncio.sleep(60)
        return number

    task = pf.task(retry=QUICK, concurrency=4, timeout="0.2s")(work)
    assert pf.items(range(9)).map(task).reduce(pf.concat()).run(workers=1).result() == [*range(9)]
    never = pf.task(retry=pf.Retry(2, wait=0), timeout="0.1s")(lambda n: asyncio.sleep(60))
    assert never


def test_a_whole_batch_is_tried_again_before_it_is_divided(log: Path) -> None:
    @pf.task(retry=QUICK)
    def double(batch: list[int]) -> list[int]:
        if note(log, len(batch)) < 3:
            raise ConnectionError("refused")
        return [2 * number for number in batch]

    assert pf.items(range(4)).map_batches(double, size=4).reduce(pf.concat()).run(workers=1).result() == [0, 2, 4, 6]
    assert noted(log) == ["4", "4", "4"]


@pytest.mark.parametrize("how", [refuses, dies])
def test_calls_are_tried_again(log: Path, how: Callable[[], None]) -> None:
    work = failing(log, 2, how)
    assert pf.call(pf.task(retry=QUICK)(work), 3).run(workers=1).result() == 3
    with pytest.raises(CallFailedError, match=r"refused|died"):
        pf.call(pf.task(retry=pf.Retry(2, wait=0))(failing(log.with_name("more"), 9, how)), 3).run(workers=1).result()
    assert len(noted(log.with_name("more"))) == 2


def test_the_service_says_how_long_to_wait(log: Path) -> None:
    class BusyError(Exception):
        retry_after = 0.3

    def work(number: int) -> int:
        note(log, time.monotonic())
        if len(noted(log)) < 2:
            raise BusyError
        return number

    task = pf.task(retry=pf.Retry(3, wait=0))(work)
    assert pf.items([1]).map(task).reduce(pf.count()).run(isolation="inline").result() == 1
    first, second = map(float, noted(log))
    assert second - first >= 0.3


def test_a_waiting_record_is_held_to_no_timeout(log: Path) -> None:
    task = pf.task(retry=pf.Retry(2, wait=1.2, jitter=0), timeout="0.5s")(failing(log, 1, refuses))
    assert pf.items([3]).map(task).reduce(pf.count()).run(workers=1).result() == 1
    assert noted(log) == ["3", "3"]


# --- limits and rates ------------------------------------------------------------------------------------------------


def test_no_more_chunks_of_a_step_run_at_once_than_its_limit(tmp_path: Path) -> None:
    def work(number: int) -> int:
        mine = tmp_path / f"{os.getpid()}-{number}"
        mine.touch()
        together = len(list(tmp_path.glob("*-*")))
        time.sleep(0.01)
        mine.unlink()
        return together

    crowd = pf.items(range(24), chunk_records=1).map(pf.task(limit=1)(work)).reduce(pf.max())
    assert crowd.run(workers=4).result() == 1


def test_a_rate_holds_for_the_whole_run() -> None:
    @pf.task(rate="50/s")
    def work(number: int) -> float:
        return time.monotonic()

    def gaps(times: list[float]) -> list[float]:
        times = sorted(times)
        return [times[number + 10] - times[number] for number in range(len(times) - 10)]

    times = pf.items(range(40), chunk_records=2).map(work).reduce(pf.concat()).run(workers=2).result()
    assert min(gaps(times)) >= 0.15  # ten calls take a fifth of a second, whichever children make them; two may be early


# --- breakers --------------------------------------------------------------------------------------------------------


def turns(run: pf.Run, home: Path) -> list[str]:
    journal = Journal(str(home / "journal.sqlite"))
    try:
        entries = [decode(row.kind, row.body) for row in journal.read(run.run_id)]
    finally:
        journal.close()
    return [entry.to for entry in entries if isinstance(entry, Turned)]


def test_a_service_that_is_down_costs_no_more_records_than_it_takes_to_see_it(tmp_path: Path, log: Path) -> None:
    up = tmp_path / "up"

    def work(number: int) -> int:
        if not up.exists():
            if note(log, "down") >= 7:  # two probes later
                up.touch()
            raise ConnectionError("down")
        return number

    home = tmp_path / "home"
    task = pf.task(breaker=pf.Breaker(failures=1.0, window=5, reset=0.1))(work)
    run = pf.items(range(50)).map(task).reduce(pf.count()).run(workers=1, max_failures=5, home=home)
    assert run.result() == 45
    assert len(run.dead_letters()) == 5
    assert turns(run, home)[0] == "open"
    assert turns(run, home)[-1] == "closed"
    assert turns(run, home).count("open") == 3


def test_calls_have_breakers_too(tmp_path: Path, log: Path) -> None:
    up = tmp_path / "up"

    def work(number: int) -> int:
        if not up.exists():
            if note(log, "down") >= 4:
                up.touch()
            raise ConnectionError("down")
        return number

    task = pf.task(breaker=pf.Breaker(failures=1.0, window=3, reset=0.05))(work)
    outcomes = pf.settle(*[pf.call(task, number) for number in range(12)])
    made = pf.call(lambda outcomes: sum(outcome.ok for outcome in outcomes), outcomes).run(workers=1).result()
    assert made == 9


def test_slow_calls_open_a_breaker_and_are_no_failures(tmp_path: Path) -> None:
    home = tmp_path / "home"

    def work(number: int) -> int:
        time.sleep(0.05 if number < 3 else 0)
        return number

    task = pf.task(breaker=pf.Breaker(failures=1.0, window=3, reset=0.05, slow=0.02))(work)
    run = pf.items(range(9)).map(task).reduce(pf.count()).run(workers=1, home=home)
    assert run.result() == 9
    assert turns(run, home)[:1] == ["open"]
    assert turns(run, home)[-1] == "closed"


# --- tolerance, accepting, and running again ------------------------------------------------------------------------


def odd(number: int) -> int:
    if number % 2:
        raise ValueError("odd")
    return number


def test_a_step_may_have_a_tolerance_of_its_own() -> None:
    graph = pf.items(range(10)).map(pf.task(max_failures=0.5)(odd)).reduce(pf.count())
    assert graph.run(workers=1).result() == 5
    with pytest.raises(TooManyFailuresError):
        pf.items(range(10)).map(pf.task(max_failures=4)(odd)).reduce(pf.count()).run(workers=1, max_failures=9).result()


def test_a_barrier_opens_over_what_somebody_accepted_and_the_journal_says_who(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run = pf.items(range(10)).map(odd).reduce(pf.count()).run(workers=1, home=home)
    with pytest.raises(TooManyFailuresError):
        run.result()
    assert pf.accept(home=home, by="Ada", workers=1).result() == 5
    journal = Journal(str(home / "journal.sqlite"))
    entries = [decode(row.kind, row.body) for row in journal.read(run.run_id)]
    journal.close()
    assert [entry for entry in entries if isinstance(entry, Accepted)] == [Accepted(0, 5, "Ada")]
    with pytest.raises(ResumeError, match="nothing to be accepted"):
        pf.accept(home=home)


def mended(log: Path, gate: Path) -> Callable[[int], int]:
    def work(number: int) -> int:
        note(log, number)
        if number % 4 == 1 and not gate.exists():
            raise (ValueError if number % 8 == 1 else ConnectionError)("no")
        return number

    return work


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def test_only_dead_letters_run_again_and_what_rests_on_them_is_brought_up_to_date(
    tmp_path: Path, log: Path, gate: Path
) -> None:
    out = tmp_path / "out"
    home = tmp_path / "home"
    numbers = pf.items(range(16), chunk_records=8).map(mended(log, gate))
    total = numbers.reduce(pf.sum())

    @pf.workflow
    def flow() -> Any:
        numbers.map(lambda n: {"n": n}).write_jsonl(out)
        return pf.call(lambda total: 2 * total, total)

    run = flow().run(workers=1, max_failures=4, home=home)
    assert run.result() == 2 * (sum(range(16)) - 1 - 5 - 9 - 13)
    gate.touch()
    log.unlink()
    again = pf.redrive(home=home, error=ConnectionError, workers=1)
    assert sorted(noted(log)) == ["13", "5"]
    assert again.result() == 2 * (sum(range(16)) - 1 - 9)
    assert sorted(letter.ordinal for letter in again.dead_letters()) == [1, 1]
    assert pf.redrive(home=home, workers=1).result() == 2 * sum(range(16))
    assert pf.open_run(home=home).dead_letters() == []
    rows = "".join(file.read_text() for file in sorted(out.glob("*.jsonl")))
    assert sorted(rows.split()) == sorted(f'{{"n":{n}}}' for n in range(16))
    state = pf.open_run(home=home).state
    assert (state.tally.records, state.tally.failed) == (16, 0)
    with pytest.raises(ResumeError, match="nothing to be redriven"):
        pf.redrive(home=home)


def test_a_record_of_which_part_went_on_is_run_again_with_its_piece(tmp_path: Path, gate: Path) -> None:
    home = tmp_path / "home"

    def check(letter: str) -> str:
        if letter == "x" and not gate.exists():
            raise ValueError("x")
        return letter

    words = pf.items(["ab", "axb", "xx", "b"]).flat_map(list).map(check).reduce(pf.counter())
    run = words.run(workers=1, max_failures=9, home=home)
    assert run.result() == {"a": 2, "b": 3}
    gate.touch()
    assert pf.redrive(home=home, workers=1).result() == {"a": 2, "b": 3, "x": 3}


def test_a_record_that_ended_its_child_is_run_again_alone(tmp_path: Path, log: Path, gate: Path) -> None:
    home = tmp_path / "home"

    def work(number: int) -> int:
        note(log, number)
        if number == 3 and not gate.exists():
            dies()
        return number

    run = pf.items(range(6)).map(work).reduce(pf.sum()).run(workers=1, home=home)
    with pytest.raises(TooManyFailuresError):
        run.result()
    gate.touch()
    log.unlink()
    assert pf.redrive(home=home, workers=1).result() == 15
    assert noted(log) == ["3"]


def test_failed_again_is_redriven_again(tmp_path: Path, gate: Path, log: Path) -> None:
    home = tmp_path / "home"
    graph = pf.items(range(8)).map(mended(log, gate)).reduce(pf.sum())
    assert graph.run(workers=1, max_failures=2, home=home).result() == sum(range(8)) - 1 - 5
    again = pf.redrive(home=home, workers=1)
    assert again.result() == sum(range(8)) - 1 - 5
    assert len(again.dead_letters()) == 2
    assert (again.state.tally.records, again.state.tally.failed) == (8, 2)
    gate.touch()
    assert pf.redrive(home=home, workers=1).result() == sum(range(8))


def test_a_record_that_ran_again_alone_and_failed_may_run_again(tmp_path: Path, log: Path, gate: Path) -> None:
    home = tmp_path / "home"
    graph = pf.items(range(8), chunk_records=8).map(mended(log, gate)).reduce(pf.sum())
    assert graph.run(workers=1, max_failures=2, home=home).result() == sum(range(8)) - 1 - 5
    for _ in range(3):
        log.unlink()
        again = pf.redrive(home=home, workers=1)
        assert again.result() == sum(range(8)) - 1 - 5
        assert [letter.ordinal for letter in again.dead_letters()] == [1, 5]
        assert (again.state.tally.records, again.state.tally.failed) == (8, 2)
        assert sorted(noted(log)) == ["1", "5"]
    gate.touch()
    last = pf.redrive(home=home, workers=1)
    assert last.result() == sum(range(8))
    assert last.dead_letters() == []
    assert (last.state.tally.records, last.state.tally.failed) == (8, 0)


def test_counts_are_added_and_taken_away() -> None:
    assert Counts(1, 2, 3, 4) + Counts(1) - Counts(2, 1) == Counts(0, 1, 3, 4)
    assert RunState().tally.records == 0


# --- resources --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_gpu() -> Iterator[Any]:
    from distributed import Client, LocalCluster

    shape = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with LocalCluster(resources={"GPU": 1}, **shape) as cluster, Client(cluster) as client:
        yield client


def test_a_step_takes_the_resources_that_it_asks_for(tmp_path: Path, one_gpu: Any) -> None:
    def work(number: int) -> int:
        mine = tmp_path / f"{os.getpid()}-{number}"
        mine.touch()
        together = len(list(tmp_path.glob("*-*")))
        time.sleep(0.005)
        mine.unlink()
        return together

    crowd = pf.items(range(12), chunk_records=1).map(pf.task(resources={"GPU": 1})(work)).reduce(pf.max())
    assert crowd.run(cluster=one_gpu).result() == 1


def test_resources_that_no_worker_has_end_the_run_with_words(one_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "NO_WORKERS_SECONDS", 0.1)
    greedy = pf.items([1]).map(pf.task(resources={"GPU": 2, "TPU": 1})(abs)).reduce(pf.sum())
    with pytest.raises(ResourcesMissingError, match="no worker has GPU=2 TPU=1"):
        greedy.run(cluster=one_gpu).result()
    with pytest.raises(ResourcesMissingError, match="no worker has GPU=2 TPU=1"):
        greedy.run(workers=1).result()

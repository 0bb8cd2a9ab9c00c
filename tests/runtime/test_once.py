"""Effects in real runs: done once whatever dies, undone once when a later step fails, each under its own key."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import parflow as pf
from parflow.errors import CallFailedError, GraphError, StoreError, UsageError
from parflow.model import Chunk, Cursor, Failure, Receipt, UndoJob, call_key, record_key
from parflow.runtime.code import pack, pack_task
from parflow.runtime.program import keep_code
from parflow.runtime.sandbox import Sandbox
from parflow.runtime.worker import Batch
from parflow.storage.effects import Effect, standing
from parflow.storage.store import Store, open_store

# --- how to say it briefly -----------------------------------------------------------------------------------------------


def note(file: Path, *words: object) -> None:
    """Write a line that no other process's line gets into."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, (" ".join(map(str, words)) + "\n").encode())
    os.close(handle)


def giving(result: Any, file: Path, *words: object) -> Callable[[], Any]:
    """Make a function that notes something and returns a result."""

    def act() -> Any:
        note(file, *words)
        return result

    return act


def noted(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1] if file.exists() else []


def finished(lazy: Any, **options: Any) -> pf.Run:
    """Run with real children."""
    run: pf.Run = lazy.run(**{"workers": 2, "max_failures": 10**6} | options)
    return run


def store_of(home: Path, run: pf.Run) -> Store:
    return open_store(str(home / "runs" / run.run_id))


def stands(home: Path, run: pf.Run) -> list[tuple[str, str]]:
    return [(effect.state, effect.record) for effect in standing(store_of(home, run))]


def numbers(count: int, chunk: int | None = None) -> pf.Dataset:
    return pf.items(range(count), chunk_records=chunk or count)


def die_at(number: int, flag: Path | None = None) -> Callable[[int], int]:
    """Make a step that kills its process at a number; with a flag, the first time only."""

    def die(n: int) -> int:
        if n == number and (flag is None or not flag.exists()):
            if flag is not None:
                flag.touch()
            os.kill(os.getpid(), 9)
        return n

    return die


def refuse(*bad: int) -> Callable[[int], int]:
    """Make a step that raises for some numbers."""

    def ship(n: int) -> int:
        if n in bad:
            raise ValueError(f"no {n}")
        return n

    return ship


def charged(log: Path, **options: Any) -> Any:
    """Make a task that charges, and can be undone."""

    @pf.task(compensate=lambda n: note(log, "refund", n), **options)
    def charge(n: int) -> int:
        note(log, "charge", n)
        return n

    return charge


# --- where a record is ---------------------------------------------------------------------------------------------------


def look(n: int) -> tuple[Any, ...]:
    here = pf.context()
    return n, here.run_id, here.step, here.record, here.attempt, here.idempotency_key, here.random.random(), here.now


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_a_record_knows_its_run_its_step_and_itself(isolation: str) -> None:
    before = datetime.now(UTC)
    run = finished(numbers(40, 7).map(look), isolation=isolation)
    rows = [*run.result()]
    assert [(row[0], row[1], row[2], row[3], row[4]) for row in rows] == [
        (n, run.run_id, "look", f"items[{n}]", 1) for n in range(40)
    ]
    assert len({row[5] for row in rows}) == len({row[6] for row in rows}) == 40
    (now,) = {row[7] for row in rows}
    assert before - timedelta(seconds=1) < now <= datetime.now(UTC)


def test_keys_chance_and_clock_are_the_same_in_an_attempt_after_a_crash_and_after_a_resume(tmp_path: Path) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"

    def keep(n: int) -> int:
        here = pf.context()
        note(log, n, here.idempotency_key, here.random.random(), here.now.timestamp())
        return n

    run = finished(numbers(6).map(keep).map(die_at(4, flag)).map(refuse(5)), max_failures=0)
    assert run.status == "failed"
    run = pf.resume(run.run_id, max_failures=1)
    assert run.status == "succeeded"
    seen = Counter(line.split()[0] for line in noted(log))
    assert max(seen.values()) > 1
    assert len({*noted(log)}) == 6


def test_an_attempt_is_counted_for_a_record_that_is_tried_alone() -> None:
    def attempt(n: int) -> tuple[int, int]:
        return n, pf.context().attempt

    def die(row: tuple[int, int]) -> tuple[int, int]:
        if row == (2, 1):
            os.kill(os.getpid(), 9)
        return row

    assert [*finished(numbers(4).map(attempt).map(die)).result()] == [(0, 1), (1, 1), (2, 2), (3, 1)]


def test_an_attempt_within_the_child_is_counted_too_and_has_the_same_key() -> None:
    def twice(n: int) -> list[Any]:
        from parflow.runtime.here import TRIES  # a context variable can't travel

        seen = []
        for tries in range(2):
            token = TRIES.set(tries)
            seen.append(pf.context())
            TRIES.reset(token)
        return [[here.attempt for here in seen], len({here.idempotency_key for here in seen})]

    assert [*finished(numbers(2).map(twice)).result()] == [[[1, 2], 1]] * 2


def test_each_of_the_records_that_a_flat_map_makes_has_a_key_of_its_own(tmp_path: Path) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"

    def key(n: int) -> int:
        note(log, pf.context().idempotency_key, n)
        return n

    def same(n: int) -> list[int]:
        return [n] * 3

    nested = numbers(5).flat_map(same).filter(bool).flat_map(same).map_batches(list, 4).map(key, name="key")
    assert len([*finished(nested.map(die_at(4, flag))).result()]) == 36
    counted = Counter(noted(log))
    assert len(counted) == len({line.split()[0] for line in counted}) == 36
    assert max(counted.values()) > 1  # those that were made twice, since the child died


def test_coroutines_know_their_own_record_whoever_goes_on_meanwhile() -> None:
    @pf.task(concurrency=7)
    async def wander(n: int) -> list[Any]:
        seen = []
        for pause in range(3):
            here = pf.context()
            seen.append((here.record, here.idempotency_key, here.step))
            await asyncio.sleep(0.001 * ((n * 7 + pause * 3) % 5))
        seen.append(await asyncio.to_thread(lambda: (pf.context().record, pf.context().idempotency_key, pf.context().step)))
        return [n, *{*seen}]

    rows = [*finished(numbers(30, 15).flat_map(lambda n: [n, n]).map(wander)).result()]
    assert [(row[0], row[1][0], len(row)) for row in rows] == [(n, f"items[{n}]", 2) for n in range(30) for _ in range(2)]
    assert len({row[1][1] for row in rows}) == 60


def test_an_async_generator_knows_its_record() -> None:
    async def pair(n: int) -> AsyncIterator[tuple[int, str]]:
        yield n, pf.context().record
        await asyncio.sleep(0)
        yield n, pf.context().record

    rows = [*finished(numbers(3).flat_map(pair)).result()]
    assert rows == [(n, f"items[{n}]") for n in range(3) for _ in range(2)]


def test_a_batch_has_no_key_and_says_so_and_what_comes_of_it_has_one_as_long_as_it_is_one_record() -> None:
    def key(batch: Any) -> Any:
        return [pf.context().idempotency_key for _ in batch]

    (failure, *_) = finished(numbers(3).map_batches(key, 2)).dead_letters()
    assert "step 'key' has no idempotency key here: it works on many records at once" in failure.message
    one = finished(numbers(4).map_batches(list, 4).map(lambda n: pf.context().idempotency_key))
    assert len({*one.result()}) == 4
    other = finished(
        numbers(4).map_batches(lambda batch: batch[:2], 4).map(lambda n: pf.context().idempotency_key, name="late")
    )
    assert {(failure.step, failure.error) for failure in other.dead_letters()} == {("late", "UsageError")}


def test_calls_know_where_they_are() -> None:
    def where(n: int) -> tuple[Any, ...]:
        here = pf.context()
        return here.run_id, here.step, here.record, here.idempotency_key

    async def later(n: int) -> tuple[Any, ...]:
        await asyncio.sleep(0)
        return where(n)

    run = finished(pf.call(list, [pf.call(where, 1), pf.call(where, 2), pf.call(later, 3)]))
    rows = run.result()
    assert [row[:3] for row in rows] == [(run.run_id, "where", ""), (run.run_id, "where", ""), (run.run_id, "later", "")]
    assert len({row[3] for row in rows}) == 3


def test_outside_of_a_run_and_in_plain_dask_a_task_has_plain_values() -> None:
    for row in (look(0), *numbers(2).map(look).compute()):
        assert row[1:5] == ("", "", "", 1)
    assert look(0)[5:7] != look(0)[5:7]
    assert numbers(2).map(lambda n: pf.once(lambda: n)).compute() == [0, 1]
    assert pf.once("key", lambda: 1) == 1


def test_a_thread_of_a_task_that_does_not_know_its_record_is_told_so() -> None:
    def astray(n: int) -> str:
        said: list[str] = []

        def ask() -> None:
            try:
                pf.once("a", said.append, "called")
            except UsageError as error:
                said.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return said[0]

    (said,) = finished(numbers(1).map(astray)).result()
    assert said.startswith("this thread doesn't know for which record it works")


def test_what_a_record_logs_names_it_in_its_dead_letter() -> None:
    def die(n: int) -> None:
        pf.context().log.warning("about to %s", "die")
        os.kill(os.getpid(), 9)

    (failure,) = finished(numbers(1).map(die)).dead_letters()
    assert "WARNING die items[0]: about to die\n" in failure.traceback + failure.output


# --- once ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_what_is_done_once_is_done_once_over_failures_and_resumes(tmp_path: Path, isolation: str) -> None:
    log = tmp_path / "log"

    def pay(n: int) -> str:
        return str(pf.once(giving(f"paid {n}", log, n)))

    def wait(said: str) -> str:
        if said == "paid 3" and not (tmp_path / "open").exists():
            raise ConnectionError("closed")
        return said

    run = finished(numbers(5).map(pay).map(wait), max_failures=0, isolation=isolation)
    assert run.status == "failed"
    run = finished(numbers(5).map(pay).map(wait), max_failures=1, isolation=isolation)
    assert Counter(noted(log)) == {str(n): 2 for n in range(5)}  # two runs: an effect is a run's


def test_a_child_that_dies_behind_an_effect_does_not_make_it_happen_again(tmp_path: Path) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"

    def pay(n: int) -> int:
        return int(pf.once(giving(n, log, n)))

    assert [*finished(numbers(20).map(pay).map(die_at(17, flag))).result()] == [*range(20)]
    assert sorted(map(int, noted(log))) == [*range(20)]


def test_a_child_that_dies_within_an_effect_leaves_it_in_doubt(tmp_path: Path, home: Path) -> None:
    log = tmp_path / "log"

    def pay(n: int, in_doubt: Any) -> int:
        def act() -> int:
            note(log, n, pf.context().idempotency_key)
            if n == 3 and len(noted(log)) < 8:
                os.kill(os.getpid(), 9)
            return n

        return int(pf.once(act, in_doubt=in_doubt))

    run = finished(numbers(5).map(pay, "stop"))
    (failure,) = run.dead_letters()
    assert (failure.record, failure.error, failure.step) == ("items[3]", "EffectInDoubtError", "pay")
    assert "'pay' may have been done or not: it had begun when its process (" in failure.message
    assert [line.split()[0] for line in noted(log)].count("3") == 1
    (left,) = standing(store_of(home, run))
    assert (left.state, left.record, left.name) == ("claimed", "items[3]", "pay")
    assert left.key in failure.message
    log.unlink()
    assert [*finished(numbers(5).map(pay, "retry")).result()] in ([0, 1, 2, 3, 4], [0, 1, 2, 4])
    assert len({*noted(log)}) == 5  # whoever was asked twice, was asked under one key


def test_whoever_names_the_same_key_gets_the_same_result(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def open_account(n: int) -> str:
        return str(pf.once("account", giving(f"opened by {n}", log, n)))

    rows = {*finished(numbers(40, 5).map(open_account), workers=3).result()}
    assert [f"opened by {n}" for n in noted(log)] == [*rows]


def test_async_effects_are_awaited_and_several_in_flight_wait_for_the_one_that_has_their_key(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def act(n: int) -> int:
        await asyncio.sleep(0.01)
        note(log, n, pf.context().record)
        return n

    @pf.task(concurrency=10)
    async def pay(n: int) -> tuple[int, int]:
        return await pf.once(act, n), await pf.once("shared", act, -1)

    assert [*finished(numbers(20).map(pay)).result()] == [(n, -1) for n in range(20)]
    assert sorted(int(line.split()[0]) for line in noted(log)) == [-1, *range(20)]
    assert all(line == f"{n} items[{n}]" for line in noted(log) if (n := int(line.split()[0])) >= 0)


def test_an_async_effect_whose_time_is_over_is_in_doubt(tmp_path: Path, home: Path) -> None:
    async def act(n: int) -> None:
        await asyncio.sleep(3600 if n == 1 else 0)

    @pf.task(concurrency=2, timeout=0.3)
    async def pay(n: int) -> None:
        await pf.once(act, n)

    run = finished(numbers(3).map(pay))
    assert [(failure.record, failure.cause) for failure in run.dead_letters()] == [("items[1]", "timeout")]
    assert [(effect.state, effect.reason[:33]) for effect in standing(store_of(home, run))] == [
        ("doubt", "it was ended by CancelledError: ")
    ]


def test_a_key_is_asked_for_where_several_effects_of_a_record_would_share_one(tmp_path: Path) -> None:
    def pay(n: int) -> None:
        pf.once(lambda: 1)
        pf.once(lambda: 2)

    (failure,) = finished(numbers(1).map(pay)).dead_letters()
    assert "step 'pay' has several effects for one record: give each a key" in failure.message

    def again(n: int) -> Any:
        for wrong in (True, True, False):
            try:
                return pf.once(lambda wrong=wrong: 1 / 0 if wrong else "done")
            except ZeroDivisionError:
                pass
        return None

    assert [*finished(numbers(1).map(again)).result()] == ["done"]


PERHAPS: Any = "perhaps"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: pf.once("key"), r"once\('key', …\): write once\(function, …\) or once\('a key', function, …\)"),
        (lambda: pf.once(3, print), r"once\(3, …\)"),
        (lambda: pf.once(print, in_doubt=PERHAPS), "in_doubt='perhaps' is unknown; write 'stop' or 'retry'"),
        (lambda: pf.task(in_doubt=PERHAPS)(print), "in_doubt='perhaps' is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


# --- steps that can be undone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_what_a_record_has_done_is_undone_backwards_when_a_later_step_fails(tmp_path: Path, home: Path, isolation: str) -> None:
    log = tmp_path / "log"
    flow = numbers(6, 2)
    for name in "abc":
        task = pf.task(compensate=functools.partial(note, log, "undo", name), name=name)
        flow = flow.map(task(lambda n, name=name: giving(n, log, "do", name, n)()))
    run = finished(flow.map(refuse(1, 4)), isolation=isolation)
    assert [*run.result()] == [0, 2, 3, 5]
    for n in range(6):
        wanted = [f"do {name} {n}" for name in "abc"] + [f"undo {name} {n}" for name in "cba" if n in (1, 4)]
        assert [line for line in noted(log) if line.endswith(f" {n}")] == wanted
    assert [failure.message for failure in run.dead_letters()] == ["no 1", "no 4"]
    assert Counter(stands(home, run)) == {("done", f"items[{n}]"): 3 for n in (0, 2, 3, 5)}


def test_what_was_done_is_undone_when_a_batch_a_coroutine_a_sink_or_a_reducer_fails_later(tmp_path: Path) -> None:
    @pf.task(concurrency=4)
    async def slow(n: int) -> int:
        await asyncio.sleep(0.001)
        return refuse(2)(n)

    class Strict(pf.Reducer):
        def initial(self) -> int:
            return 0

        def step(self, state: int, record: int) -> int:
            return state + refuse(2)(record)

        def merge(self, left: int, right: int) -> int:
            return left + right

    ends: dict[str, Callable[[pf.Dataset], Any]] = {
        "batch": lambda done: done.map_batches(lambda batch: [refuse(2)(n) for n in batch], 3),
        "coroutine": lambda done: done.map(slow),
        "flat_map": lambda done: done.flat_map(lambda n: [n, n]).map(refuse(2)),
        "reducer": lambda done: done.reduce(Strict()),
        "sink": lambda done: done.map(lambda n: {"n": n} if n != 2 else {"n": object()}).write_jsonl(tmp_path / "out"),
        "collect": lambda done: done.map(lambda n: n if n != 2 else threading.Lock()),
    }
    for name, end in ends.items():
        log = tmp_path / name
        finished(end(numbers(5).map(charged(log))))
        assert sorted(noted(log)) == sorted([f"charge {n}" for n in range(5)] + ["refund 2"]), name


def test_only_what_comes_before_the_failing_step_is_undone(tmp_path: Path) -> None:
    shared, left, right = (tmp_path / name for name in ("shared", "left", "right"))
    done = numbers(3).map(charged(shared))

    @pf.workflow
    def flow() -> Any:
        return done.map(charged(left)).map(refuse(1)).reduce(pf.count()), done.map(charged(right)).reduce(pf.count())

    assert finished(flow()).result() == (2, 3)
    assert noted(shared).count("refund 1") == noted(left).count("refund 1") == 1
    assert noted(right) == [f"charge {n}" for n in range(3)]


def test_a_failing_record_of_a_batch_that_cannot_be_named_leaves_what_was_done_standing_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = finished(numbers(4).map(charged(log)).map_batches(lambda batch: [sum(batch)], 4).map(refuse(6)))
    assert noted(log) == [f"charge {n}" for n in range(4)]
    (failure,) = run.dead_letters()
    assert "no 6 | what was done for it in earlier steps stands" in failure.message


def test_a_step_that_can_be_undone_is_made_once_over_crashes(tmp_path: Path, home: Path) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"
    run = finished(numbers(10).map(charged(log)).map(die_at(7, flag)))
    assert [*run.result()] == [*range(10)]
    assert noted(log) == [f"charge {n}" for n in range(10)]
    assert stands(home, run) == [("done", f"items[{n}]") for n in reversed(range(10))]


def test_what_an_earlier_attempt_did_is_undone_by_the_one_in_which_the_record_fails(tmp_path: Path) -> None:
    """The child dies at record 3 when 1 was charged and failed, and 2 was charged: nothing of the piece stands."""
    log, flag = tmp_path / "log", tmp_path / "flag"
    flow = numbers(5).map(charged(log)).map(die_at(3, flag)).map(refuse(2, 3))
    finished(flow)
    lines = Counter(noted(log))
    assert lines["charge 3"] == lines["refund 3"] == 1  # charged by the one that died, refunded by the other
    assert lines["charge 2"] == lines["refund 2"] >= 1
    assert [lines[f"refund {n}"] for n in (0, 1, 4)] == [0, 0, 0]


def test_async_steps_are_made_once_and_undone_once(tmp_path: Path) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"

    async def refund(n: int) -> None:
        await asyncio.sleep(0.001)
        note(log, "refund", n, pf.context().record)

    @pf.task(concurrency=8, compensate=refund, in_doubt="retry")  # those in flight when the child dies are in doubt
    async def charge(n: int) -> int:
        await asyncio.sleep(0.001 * (n % 3))
        note(log, "charge", n, pf.context().record)
        return n

    finished(numbers(20).map(charge).map(die_at(15, flag)).map(refuse(4, 15)))
    lines = Counter(noted(log))
    assert {line for line in lines if line.startswith("refund")} == {f"refund {n} items[{n}]" for n in (4, 15)}
    for n in range(20):
        assert lines[f"charge {n} items[{n}]"] >= max(1, lines[f"refund {n} items[{n}]"])


def test_flat_maps_and_filters_can_be_undone(tmp_path: Path) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"

    @pf.task(compensate=lambda made: note(log, "undo", made))
    def spread(n: int) -> Any:
        note(log, "spread", n)
        return (n for _ in range(2))

    @pf.task(compensate=lambda made: note(log, "undo", made))
    def odd(n: int) -> bool:
        note(log, "odd", n)
        return n % 2 == 1

    run = finished(numbers(6).filter(odd).flat_map(spread).map(die_at(5, flag)).map(refuse(3)))
    assert [*run.result()] == [1, 1, 5, 5]
    assert noted(log).count("spread 5") == noted(log).count("odd 5") == 1
    assert noted(log).count("undo [3, 3]") == noted(log).count("spread 3")
    assert noted(log).count("undo True") == noted(log).count("odd 3")


def test_an_undo_that_fails_is_told_in_the_dead_letter(tmp_path: Path, home: Path) -> None:
    tried = tmp_path / "tried"

    def refund(n: int) -> None:
        note(tried, n, pf.context().idempotency_key)
        raise ConnectionError("no refunds today")

    run = finished(numbers(3).map(pf.task(compensate=refund, name="charge")(lambda n: n)).map(refuse(1)))
    (failure,) = run.dead_letters()
    assert failure.message.startswith("no 1 | 'charge' was done and stands, since it could not be undone: it was tried 3 times")
    assert "ConnectionError: no refunds today" in failure.message
    assert len(noted(tried)) == 3
    assert len({*noted(tried)}) == 1
    assert stands(home, run) == [("done", "items[2]"), ("undo failed", "items[1]"), ("done", "items[0]")]


def test_a_step_whose_child_dies_within_is_in_doubt_or_made_again(tmp_path: Path) -> None:
    for way in ("stop", "retry"):
        flag, log = tmp_path / f"{way}-flag", tmp_path / f"{way}-log"

        def pay(n: int, flag: Path = flag, log: Path = log) -> int:
            note(log, n, pf.context().idempotency_key)
            return die_at(2, flag)(n)

        run = finished(numbers(4).map(pf.task(compensate=bool, in_doubt=way)(pay)))
        lines = Counter(noted(log))
        if way == "stop":
            assert [(failure.record, failure.error) for failure in run.dead_letters()] == [("items[2]", "EffectInDoubtError")]
            assert [*run.result()] == [0, 1, 3]
            assert {*lines.values()} == {1}
        else:
            assert [*run.result()] == [0, 1, 2, 3]
            assert sorted(lines.values()) == [1, 1, 1, 2]


def test_what_raises_is_tried_again_as_its_task_says_and_under_one_key(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def flaky(n: int) -> int:
        note(log, n, pf.context().attempt, pf.context().idempotency_key)
        if pf.context().attempt < 3:
            raise ConnectionError("busy")
        return n

    for name, step in {
        "once": pf.task(retry=pf.Retry(3, wait=0))(lambda n: pf.once(flaky, n)),
        "compensable": pf.task(retry=pf.Retry(3, wait=0), compensate=bool)(flaky),
    }.items():
        log.unlink(missing_ok=True)
        assert [*finished(numbers(4).map(step)).result()] == [0, 1, 2, 3], name
        lines = [line.split() for line in noted(log)]
        assert Counter((n, attempt) for n, attempt, _ in lines) == {(str(n), str(a)): 1 for n in range(4) for a in (1, 2, 3)}
        assert len({key for _, _, key in lines}) == 4


@pytest.mark.parametrize("way", ["stop", "retry"])
def test_what_is_in_doubt_is_tried_again_only_where_that_does_no_harm(tmp_path: Path, way: Any) -> None:
    log = tmp_path / "log"

    @pf.task(retry=pf.Retry(3, wait=0), compensate=bool, in_doubt=way)
    def charge(n: int) -> int:
        note(log, n)
        if len(noted(log)) < 3:
            raise pf.InDoubt("no answer")
        return n

    run = finished(numbers(1).map(charge))
    if way == "retry":
        assert ([*run.result()], noted(log)) == ([0], ["0", "0", "0"])
    else:
        (failure,) = run.dead_letters()
        assert (failure.error, failure.attempts, noted(log)) == ("EffectInDoubtError", 1, ["0"])


def test_a_call_that_takes_too_long_is_in_doubt_and_what_was_done_before_is_undone(tmp_path: Path, home: Path) -> None:
    log = tmp_path / "log"

    @pf.task(timeout=0.3, compensate=bool)
    def reserve(n: int) -> int:
        if n == 1:
            threading.Event().wait(60)
        return n

    run = finished(numbers(3).map(charged(log)).map(reserve))
    (failure,) = run.dead_letters()
    assert (failure.record, failure.cause) == ("items[1]", "timeout")
    assert "'reserve' may have been done or not: it was ended by Late" in failure.message
    assert [line for line in noted(log) if line.startswith("refund")] == ["refund 1"]
    assert ("doubt", "items[1]") in stands(home, run)


def test_calls_that_can_be_undone_are_made_once(tmp_path: Path, home: Path) -> None:
    log, flag = tmp_path / "log", tmp_path / "flag"

    @pf.task(compensate=lambda made: note(log, "cancel", made))
    def book(what: str) -> str:
        note(log, "book", what)
        return f"{what} booked"

    @pf.task
    def pay(trip: list[str]) -> str:
        if not flag.exists():
            flag.touch()
            raise ConnectionError("the bank is closed")
        return f"paid {trip}"

    @pf.workflow
    def trip() -> Any:
        return pay([book("flight"), book("hotel")])

    run = finished(trip())
    with pytest.raises(CallFailedError, match="the bank is closed"):
        run.result()
    assert stands(home, run) == [("done", "")] * 2
    assert pf.resume(run.run_id).result() == "paid ['flight booked', 'hotel booked']"
    assert sorted(noted(log)) == ["book flight", "book hotel"]


def test_the_same_task_called_plainly_is_the_plain_function(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert charged(log)(3) == 3
    assert numbers(2).map(charged(log)).compute() == [0, 1]
    assert noted(log) == ["charge 3", "charge 0", "charge 1"]


def test_a_run_that_was_killed_goes_on_in_another_process_without_doing_anything_twice(tmp_path: Path, home: Path) -> None:
    flow = tmp_path / "flow.py"
    flow.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            import parflow as pf

            LOG = {str(tmp_path / "log")!r}

            def note(*words):
                handle = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(handle, (" ".join(map(str, words)) + "\\n").encode())
                os.close(handle)

            @pf.task(compensate=lambda n: note("refund", n))
            def charge(n):
                note("charge", n, pf.context().idempotency_key, pf.context().now)
                return n

            def ship(n):
                pf.once(note, "ship", n)
                if n == 11 and not os.path.exists(LOG + ".killed"):
                    open(LOG + ".killed", "w").close()
                    os.kill(int(os.environ["VICTIM"]), 9)  # the coordinator, and with it every child
                    while True:
                        os.getppid()
                if n == 13:
                    raise ValueError(n)
                return n

            if __name__ == "__main__":
                os.environ["VICTIM"] = str(os.getpid())
                if sys.argv[1] == "run":
                    run = pf.items(range(20), chunk_records=20).map(charge).map(ship).run(workers=1, max_failures=1)
                else:
                    run = pf.resume(workers=1)
                    print(sorted(run.result()) == [n for n in range(20) if n != 13])
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.run([sys.executable, flow, "run"], env=environment, capture_output=True, text=True)
    assert first.returncode == -9, first.stderr
    second = subprocess.run([sys.executable, flow, "resume"], env=environment, capture_output=True, text=True)
    assert second.stdout == "True\n", second.stderr
    done = Counter(" ".join(line.split()[:2]) for line in noted(tmp_path / "log"))
    assert done == {f"{what} {n}": 1 for what in ("charge", "ship") for n in range(20)} | {"refund 13": 1}
    assert len({line.split(maxsplit=3)[3] for line in noted(tmp_path / "log") if line.startswith("charge")}) == 1


# --- refused when the graph is built -----------------------------------------------------------------------------------------


def test_undoing_for_a_part_of_a_record_is_refused_with_what_to_write_instead(tmp_path: Path) -> None:
    charge = charged(tmp_path / "log")
    split = numbers(3).flat_map(lambda n: [n])
    with pytest.raises(
        GraphError, match=r"step 'charge' has compensate=, and comes after flat_map 'lambda' in one stage.*pf\.expand"
    ):
        split.map(str).map(charge).run()
    with pytest.raises(GraphError, match=r"comes after map_batches 'list' in one stage"):
        numbers(3).map_batches(list).map(charge).reduce(pf.count()).compute()
    with pytest.raises(GraphError, match=r"task 'charge' has compensate=.*give it to map, not to map_batches"):
        numbers(3).map_batches(charge)
    assert [*finished(pf.expand(charge, split.reduce(pf.concat()))).result()] == [0, 1, 2]


def test_a_store_that_cannot_keep_effects_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="effects that happen once need a store in a folder"):
        numbers(3).map(charged(tmp_path / "log")).run(store="memory://x")
    assert noted(tmp_path / "log") == []


# --- undoing after the fact ------------------------------------------------------------------------------------------------


def undone(home: Path, run: pf.Run, code: Any, *jobs: UndoJob) -> list[Receipt]:
    """Have a child undo."""
    store = store_of(home, run)
    packed = pack_task(code) if isinstance(code, pf.Task) else pack(code)
    labels = ("load", code.name) if isinstance(code, pf.Task) else tuple(code.label(n) for n in range(1 + len(code.steps)))
    batch = Batch(run.run_id, f"9.{len(jobs)}", jobs[0].unit, jobs, store.url, keep_code(store, packed), labels, (None,) * 9)
    box = Sandbox()
    receipts = box.run(batch, "here")
    box.close()
    return [receipt for receipt in receipts if receipt is not None]


def failures_of(receipt: Receipt) -> list[Failure]:
    if receipt.failures is None:
        return []
    assert receipt.failures.inline is not None
    found: list[Failure] = pickle.loads(receipt.failures.inline)
    return found


def names(effects: Iterable[Effect]) -> tuple[str, ...]:
    return tuple(effect.id for effect in effects)


def test_a_whole_run_is_undone_the_newest_first_each_once(tmp_path: Path, home: Path) -> None:
    log = tmp_path / "log"
    flow = numbers(4).map(charged(log)).map(charged(log), name="fee")
    run = finished(flow.map(refuse(1)))
    log.unlink()
    (stage,) = flow.plan().stages
    job = UndoJob(0, effects=names(standing(store_of(home, run))))
    (receipt, again) = undone(home, run, stage, job, job)
    assert (receipt.status, receipt.tally.records, receipt.tally.failed) == ("done", 6, 0)
    assert (again.status, again.tally.failed) == ("done", 0)
    assert noted(log) == [f"refund {n}" for n in (3, 3, 2, 2, 0, 0)]
    assert stands(home, run) == []


def test_a_record_whose_child_died_for_good_is_undone_by_its_place(tmp_path: Path, home: Path) -> None:
    log = tmp_path / "log"
    flow = numbers(5).map(charged(log)).map(die_at(2))
    run = finished(flow)
    assert [(failure.record, failure.cause) for failure in run.dead_letters()] == [("items[2]", "crash")]
    assert [line for line in noted(log) if line.startswith("refund")] == ["refund 2"]
    (stage,) = flow.plan().stages
    (chunk,) = stage.source.chunks(store_of(home, run))
    assert isinstance(chunk, Chunk)
    (receipt,) = undone(home, run, stage, UndoJob(0, records=(record_key(0, chunk, Cursor(2, 0, 2)),)))
    assert (receipt.status, receipt.tally.failed) == ("done", 0)
    assert [line for line in noted(log) if line.startswith("refund")] == ["refund 2"]


def test_what_cannot_be_undone_is_named_and_the_rest_is_undone(tmp_path: Path, home: Path) -> None:
    log = tmp_path / "log"

    def refund(n: int) -> None:
        note(log, "refund", n, pf.context().record, pf.context().run_id, pf.context().step)
        if n == 2:
            raise ConnectionError("closed")
        if n == 1:
            die_at(1)(n)

    flow = numbers(4).map(pf.task(compensate=refund, name="charge")(int))
    run = finished(flow)
    (stage,) = flow.plan().stages
    job = UndoJob(0, effects=names(standing(store_of(home, run))))
    (receipt,) = undone(home, run, stage, job)
    assert receipt.status == "died"
    (receipt,) = undone(home, run, stage, job)
    assert (receipt.status, receipt.tally.records, receipt.tally.failed) == ("done", 4, 2)
    assert sorted((failure.record, failure.error, failure.step) for failure in failures_of(receipt)) == [
        ("items[1]", "EffectInDoubtError", "charge"),
        ("items[2]", "UndoFailedError", "charge"),
    ]
    lines = Counter(noted(log))
    assert lines == {f"refund {n} items[{n}] {run.run_id} charge": 6 if n == 2 else 1 for n in range(4)}


def test_calls_are_undone_by_their_task(tmp_path: Path, home: Path) -> None:
    log = tmp_path / "log"
    charge = charged(log)
    run = finished(pf.call(sum, [charge(pf.call(int, "1")), charge(pf.call(int, "2"))]))
    effects = [*standing(store_of(home, run))]
    (unit,) = {effect.unit for effect in effects}
    (receipt,) = undone(home, run, charge, UndoJob(unit, effects=names(effects)))
    assert (receipt.status, receipt.tally.records, receipt.tally.failed) == ("done", 2, 0)
    assert sorted(noted(log)) == ["charge 1", "charge 2", "refund 1", "refund 2"]
    assert {effect.id.split("/step")[0].replace("/", "") for effect in effects} <= {call_key(number) for number in range(9)}

"""Decisions over branches, and fan-out at run time: what is not wanted does not run, and what was decided stands."""

from __future__ import annotations

import asyncio
import operator
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parflow as pf
from parflow.core.entries import Decided, decode
from parflow.errors import CallFailedError, GraphError, TooManyFailuresError, UsageError
from parflow.storage.journal import Journal

# --- how to say it briefly -------------------------------------------------------------------------------------------


def note(file: Path, what: object) -> Any:
    """Add a line to a file in one write, so that lines of several processes don't mix; returns what it noted."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, f"{what}\n".encode())
    os.close(handle)
    return what


def noted(file: Path) -> list[str]:
    """Return the lines of a file, in any order, and empty it."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    file.unlink(missing_ok=True)
    return sorted(lines)


def finished(lazy: Any, **options: Any) -> Any:
    """Return the result of a run, by default on two children."""
    return lazy.run(**{"workers": 2} | options).result()


def both(lazy: Any, **options: Any) -> Any:
    """Return the result, which is the same of a run and of plain Dask."""
    result = finished(lazy, **options)
    assert lazy.compute() == result
    return result


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        os.sched_yield()


def fails(what: str = "on purpose") -> None:
    raise ValueError(what)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


# --- when and switch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False])
def test_only_the_branch_that_is_chosen_runs(wanted: bool, log: Path) -> None:
    def record(n: int, branch: str) -> int:
        note(log, branch)
        return n

    def branch(name: str) -> Any:
        rows = pf.items([1, 2]).map(record, name)
        return pf.call(note, log, rows.reduce(pf.sum()))

    chosen = pf.when(pf.call(bool, int(wanted)), branch("yes"), branch("no"))
    assert finished(chosen) == 3
    assert noted(log) == ["3", *["yes" if wanted else "no"] * 2]
    assert chosen.compute() == 3
    assert noted(log) == ["3", *["yes" if wanted else "no"] * 2]


@pytest.mark.parametrize("condition", [0, "", None, [], 1, "no", [0]], ids=repr)
def test_a_condition_decides_by_its_truth(condition: Any) -> None:
    value = pf.call(lambda: condition)
    assert both(pf.when(value, "then", "otherwise"), isolation="inline") == ("then" if condition else "otherwise")
    assert both(pf.when(value, "then"), isolation="inline") == ("then" if condition else None)


def test_switch_takes_the_branch_of_a_value_or_the_default(log: Path) -> None:
    def choose(kind: Any) -> Any:
        branches = {"pdf": pf.call(note, log, "pages"), 3: pf.items([1, 2]), (1, 2): "pair"}
        return pf.switch(pf.call(lambda: kind), branches, pf.call(note, log, "other"))

    assert both(choose("pdf")) == "pages"
    assert noted(log) == ["pages"] * 2
    assert both(choose(3)) == [1, 2]
    assert both(choose((1, 2))) == "pair"
    assert noted(log) == []
    assert both(choose("mail")) == "other"
    assert both(pf.switch(pf.call(int, "9"), {1: "one"}), isolation="inline") is None


def test_what_a_branch_shares_with_the_rest_is_made_once(log: Path) -> None:
    def read(n: int) -> int:
        return int(note(log, n))

    rows = pf.items(range(4), chunk_records=2).map(read)
    total = rows.reduce(pf.sum())
    inside = rows.map(operator.mul, total).reduce(pf.max())

    @pf.workflow
    def flow() -> Any:
        return total, pf.when(total > 5, inside, pf.call(fails)), rows

    assert finished(flow()) == (6, 18, [0, 1, 2, 3])
    assert noted(log) == ["0", "1", "2", "3"]
    assert flow().compute() == (6, 18, [0, 1, 2, 3])


def test_a_branch_of_a_branch_runs_only_when_both_are_chosen(log: Path) -> None:
    @pf.workflow
    def flow(outer: int, inner: int) -> Any:
        deep = pf.when(pf.call(bool, inner), pf.call(note, log, "deep"), pf.call(note, log, "shallow"))
        return pf.when(pf.call(bool, outer), deep, pf.call(note, log, "out"))

    for outer, inner, wanted in ((1, 1, "deep"), (1, 0, "shallow"), (0, 1, "out"), (0, 0, "out")):
        assert finished(flow(outer, inner), isolation="inline") == wanted
        assert flow(outer, inner).compute() == wanted
        assert noted(log) == [wanted] * 2


def test_a_value_may_be_condition_and_branch_at_once(log: Path) -> None:
    value = pf.call(note, log, 7)
    assert finished(pf.when(value > 5, value, pf.call(fails))) == 7
    assert noted(log) == ["7"]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_sink_that_is_only_a_branch_is_written_only_when_it_is_chosen(wanted: bool, tmp_path: Path) -> None:
    out, always = tmp_path / "out", tmp_path / "always"

    @pf.workflow
    def flow() -> Any:
        rows = pf.items([{"n": 1}, {"n": 2}])
        rows.write_jsonl(always)
        return pf.when(rows.reduce(pf.count()) > (1 if wanted else 2), rows.write_jsonl(out), "none")

    result = finished(flow())
    assert (always / "_manifest.json").exists()
    assert (out / "_manifest.json").exists() == wanted
    assert result["rows"] == 2 if wanted else result == "none"


class Doubt:
    """Notes each time that somebody asks whether it holds."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __bool__(self) -> bool:
        note(self.log, "asked")
        return not (self.log.parent / "turned").exists()


def test_a_decision_stands_in_the_journal_and_a_resumed_run_does_not_decide_again(log: Path, tmp_path: Path) -> None:
    def door() -> str:
        if not (tmp_path / "key").exists():
            raise FileNotFoundError("the key")
        return "in"

    run = pf.when(pf.call(Doubt, log), pf.call(door), "elsewhere").run(workers=2)
    with pytest.raises(CallFailedError, match="the key"):
        run.result()
    assert [call.choice for call in run.state.calls if call.facts.kind == "choose"] == [0]
    (tmp_path / "turned").touch()  # asked again, it would decide otherwise
    (tmp_path / "key").touch()
    assert pf.resume(run.run_id, workers=2).result() == "in"
    assert noted(log) == ["asked"]


def test_a_condition_that_cannot_be_asked_fails_the_decision() -> None:
    class Vague:
        def __bool__(self) -> bool:
            raise ValueError("who knows")

    with pytest.raises(CallFailedError, match="call 'when' failed: ValueError: who knows"):
        finished(pf.when(pf.call(Vague), 1, 2))


# --- settle -------------------------------------------------------------------------------------------------------------


def test_settle_tells_how_each_branch_ended_whatever_it_is(log: Path) -> None:
    def ratio(n: int) -> float:
        note(log, n)
        return 1 / n

    bad = pf.items([1, 0, 2], chunk_records=1).map(ratio).reduce(pf.sum())
    good = pf.items([3, 4]).map(ratio)
    outcomes = finished(pf.settle(bad, good, pf.call(fails), pf.call(int, "5")))
    assert [outcome.ok for outcome in outcomes] == [False, True, False, True]
    assert [outcome.value for outcome in outcomes] == [None, [1 / 3, 1 / 4], None, 5]
    assert outcomes[0].failure.error == "TooManyFailuresError"
    assert "1 of " in outcomes[0].failure.message
    assert (outcomes[2].failure.error, outcomes[2].failure.message) == ("ValueError", "on purpose")
    assert (
        {"0", "3", "4"} <= {*noted(log)} <= {"0", "1", "2", "3", "4"}
    )  # nobody waits for the rest of a branch that has failed


def test_what_fails_in_a_branch_fails_all_that_waits_for_it_there_and_nothing_else() -> None:
    broken = pf.call(fails)
    later = pf.call(int, pf.call(abs, broken))
    outcomes = finished(pf.settle(later, pf.call(int, "1"), pf.items([1]).map(operator.add, broken)))
    assert [outcome.value for outcome in outcomes] == [None, 1, None]
    assert {outcome.failure.step for outcome in outcomes if not outcome.ok} == {"fails"}


def test_a_failure_that_the_result_needs_too_ends_the_run_all_the_same() -> None:
    broken = pf.call(fails)
    with pytest.raises(CallFailedError, match="on purpose"):
        finished(pf.call(list, [pf.settle(broken), broken]))


def test_settled_branches_are_judged_the_same_way_by_plain_dask() -> None:
    def judge(outcomes: list[pf.Outcome]) -> list[Any]:
        return [outcome.value if outcome.failure is None else outcome.failure.error for outcome in outcomes]

    settled = pf.settle(pf.call(int, "1"), pf.call(int, "one"), pf.items([1, 2]).reduce(pf.sum()))
    assert both(pf.call(judge, settled)) == [1, "ValueError", 3]


# --- race and quorum ----------------------------------------------------------------------------------------------------


def test_a_race_takes_the_first_and_tells_the_others_to_stop(log: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")

    def slow() -> str:
        note(log, "slow began")
        try:
            (tmp_path / "never").read_text()  # waits until somebody opens the other end
        except pf.Cancelled:
            note(log, "slow cancelled")
            raise
        return "slow"

    def fast() -> str:
        until(log.exists, "the other one's start")
        return "fast"

    assert finished(pf.race(pf.call(slow), pf.call(fast)), timeout="30s") == "fast"
    until(lambda: "cancelled" in log.read_text(), "the slow one's end")
    assert noted(log) == ["slow began", "slow cancelled"]


def coroutine(log: Path) -> Callable[[], Any]:
    async def slow() -> str:
        note(log, "began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            note(log, "cancelled")
            raise
        finally:
            await asyncio.sleep(0.01)  # cleaning up may take turns of its own
            note(log, "cleaned up")
        return "slow"

    return slow


def working_coroutine(log: Path) -> Callable[[], Any]:
    async def slow() -> str:
        note(log, "began")
        try:
            time.sleep(60)  # noqa: ASYNC251 - it blocks the loop
        except pf.Cancelled:
            note(log, "cancelled")
            raise
        finally:
            note(log, "cleaned up")
        return "slow"

    return slow


@pytest.mark.parametrize("make", [coroutine, working_coroutine])
@pytest.mark.parametrize("as_step", [False, True], ids=["call", "step"])
def test_a_coroutine_that_loses_a_race_is_told(make: Callable[[Path], Callable[[], Any]], *, as_step: bool, log: Path) -> None:
    slow = make(log)
    if as_step:

        @pf.task(concurrency=2)
        async def step(_: int) -> Any:
            return await slow()

        branch: Any = pf.items([1, 2, 3]).map(step).reduce(pf.count())
    else:
        branch = pf.call(slow)
    many = 2 if as_step and make is coroutine else 1

    def fast() -> str:
        until(lambda: log.exists() and log.read_text().count("began") == many, "the other one's start")
        return "fast"

    assert finished(pf.race(branch, pf.call(fast)), timeout="30s") == "fast"
    until(lambda: log.exists() and log.read_text().count("cleaned") == many, "the slow one's end")
    assert sorted(noted(log)) == ["began"] * many + ["cancelled"] * many + ["cleaned up"] * many


def test_a_coroutine_that_cancels_itself_has_failed() -> None:
    async def gives_up() -> None:
        raise asyncio.CancelledError

    with pytest.raises(CallFailedError, match="cancelled itself"):
        finished(pf.call(gives_up))


def test_a_race_goes_on_while_others_fail_and_is_lost_when_all_have() -> None:
    assert both(pf.race(pf.call(fails), pf.call(int, "2"), pf.call(fails))) == 2
    with pytest.raises(CallFailedError, match="first"):
        finished(pf.race(pf.call(fails, "first"), pf.call(fails, "second")), workers=1)
    with pytest.raises(ValueError, match="second"):
        pf.race(pf.call(fails, "first"), pf.call(fails, "second")).compute()


def test_a_resumed_run_does_not_race_again(log: Path, tmp_path: Path) -> None:
    def door(winner: str) -> str:
        if not (tmp_path / "key").exists():
            raise FileNotFoundError("the key")
        return f"{winner} in"

    def slow() -> str:
        raise ValueError(note(log, "slow"))

    race = pf.race(pf.call(slow), pf.call(note, log, "fast"))
    run = pf.call(door, race).run(workers=1)
    with pytest.raises(CallFailedError, match="the key"):
        run.result()
    before = noted(log)
    assert before.count("fast") == 1
    (tmp_path / "key").touch()
    assert pf.resume(run.run_id, workers=1).result() == "fast in"
    assert noted(log) == []


def test_a_quorum_takes_so_many_in_their_order_and_cancels_the_rest(log: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never")

    def slow() -> str:
        note(log, "began")
        return (tmp_path / "never").read_text()

    branches = [pf.call(slow), pf.call(fails), pf.items([1, 2]).reduce(pf.sum()), pf.call(int, "4")]
    run = pf.quorum(2, *branches).run(workers=2, timeout="30s")
    assert run.result() == [3, 4]
    (decided,) = (call.decided for call in run.state.calls if call.decided is not None)
    assert decided.picked == (2, 3)
    assert [failure.message for failure in decided.failures.values()] in ([], ["on purpose"])


def test_a_quorum_that_cannot_be_reached_any_more_fails_without_waiting_for_the_rest(tmp_path: Path) -> None:
    with pytest.raises(CallFailedError, match="on purpose"):
        finished(pf.quorum(2, pf.call(int, "1"), pf.call(fails), pf.call(fails)))

    os.mkfifo(tmp_path / "never")
    waits = pf.call((tmp_path / "never").read_text)
    (outcome,) = finished(pf.settle(pf.quorum(2, waits, pf.call(fails), pf.call(fails))))  # or else this would never end
    assert outcome.failure.message == "on purpose"


def test_every_decision_is_one_entry_of_the_journal(home: Path) -> None:
    outcomes = pf.settle(pf.race(pf.call(fails), pf.call(int, "1")), pf.quorum(1, pf.call(int, "2")), pf.call(fails))
    run = outcomes.run(workers=2)
    assert [outcome.value for outcome in run.result()] == [1, [2], None]
    journal = Journal(str(home / "journal.sqlite"))
    entries = [decode(entry.kind, entry.body) for entry in journal.read(run.run_id)]
    journal.close()
    decided = [entry for entry in entries if isinstance(entry, Decided)]
    assert len(decided) == 3
    picked = {run.state.calls[entry.call].facts.kind: entry.picked for entry in decided}
    assert picked == {"race": (1,), "quorum": (0,), "settle": (0, 1)}
    assert {arm: failure.message for arm, failure in decided[-1].failures.items()} == {"2": "on purpose"}


@settings(max_examples=12)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 6))
def test_of_any_branches_settle_and_quorum_say_what_a_loop_says(good: list[bool], count: int) -> None:
    count = min(count, len(good))
    branches = [pf.call(int, n) if ok else pf.call(fails, str(n)) for n, ok in enumerate(good)]
    wanted = [n if ok else None for n, ok in enumerate(good)]
    winners = {n for n, ok in enumerate(good) if ok}

    outcomes = finished(pf.settle(*branches), isolation="inline")
    assert [outcome.value for outcome in outcomes] == wanted
    assert [outcome.value for outcome in pf.settle(*branches).compute()] == wanted
    quorum = pf.quorum(count, *branches)
    if len(winners) >= count:
        for made in (finished(quorum, isolation="inline"), quorum.compute()):
            assert len(made) == count
            assert made == sorted(made)
            assert set(made) <= winners
    else:
        with pytest.raises(CallFailedError):
            finished(quorum, isolation="inline")
        with pytest.raises(ValueError, match=r"^[0-5]$"):
            quorum.compute()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pf.settle(), "no branch"),
        (lambda: pf.race(1), "1, which is not lazy"),
        (lambda: pf.quorum(0, pf.call(int)), "from 1 to"),
        (lambda: pf.quorum(2, pf.call(int)), "from 1 to"),
        (lambda: pf.switch(pf.call(int), {}), "a branch for each value"),
        (lambda: pf.expand(str, [1, 2]), r"pf.items\(…\).map\(function\)"),
    ],
)
def test_a_decision_that_makes_no_sense_is_refused_when_it_is_written(make: Callable[[], Any], words: str) -> None:
    with pytest.raises((GraphError, UsageError), match=words):
        make()


# --- inputs that branches share -------------------------------------------------------------------------------------------


def test_an_iterator_that_two_branches_would_each_go_through_is_refused() -> None:
    numbers = pf.items(iter([1, 2, 3]))
    with pytest.raises(GraphError, match=r"iterator.*items\(list\(...\)\)"):
        pf.settle(numbers.reduce(pf.sum()), numbers.reduce(pf.count())).plan()
    mean = numbers.reduce(pf.mean())
    assert finished(numbers.map(operator.sub, mean), isolation="inline") == [-1, 0, 1]  # gone through once, and kept


def test_branches_may_each_go_through_one_list() -> None:
    numbers = pf.items([1, 2, 3])
    outcomes = finished(pf.settle(numbers.reduce(pf.sum()), numbers.reduce(pf.count())))
    assert [outcome.value for outcome in outcomes] == [6, 3]


# --- expand ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 10_000])
def test_expand_calls_a_function_with_each_item_of_a_list_that_was_made(count: int) -> None:
    doubled = pf.expand(operator.mul, pf.call(range, count), pf.call(int, "2"))
    assert both(doubled) == [2 * n for n in range(count)]
    assert both(doubled.reduce(pf.count())) == count


@pytest.mark.parametrize("made", [(1, 2), {"a": 1, "b": 2}, [[1], [2]], [{"n": 1}, {"n": 2}]], ids=repr)
def test_expand_goes_through_whatever_has_items(made: Any) -> None:
    assert both(pf.expand(lambda item: item, pf.call(lambda: made)), isolation="inline") == [*made]


def test_expand_goes_on_from_expand(log: Path) -> None:
    pages = pf.expand(lambda book: [f"{book}{page}" for page in range(book)], pf.call(range, 4))
    assert both(pages) == [[], ["10"], ["20", "21"], ["30", "31", "32"]]
    assert both(pf.expand(str.lower, pages)) == ["10", "20", "21", "30", "31", "32"]
    words = pf.call(list, pages)
    assert both(pf.expand(len, words).reduce(pf.max())) == 3


def test_items_that_fail_are_dead_letters_with_their_place() -> None:
    run = pf.expand(int, pf.call(list, ["1", "x", "3"])).run(workers=2, max_failures=1)
    assert run.result() == [1, 3]
    assert [failure.record for failure in run.dead_letters()] == ["item[1]"]


@pytest.mark.parametrize("made", [5, None, "text", b"bytes"], ids=repr)
def test_expand_of_what_has_no_items_fails_and_says_what_it_was_given(made: Any) -> None:
    expanded = pf.expand(str, pf.call(lambda: made))
    with pytest.raises(UsageError, match=rf"expand\(\) was given {made!r}, which is no list"):
        finished(expanded)
    with pytest.raises(UsageError, match=rf"expand\(\) was given {made!r}, which is no list"):
        expanded.compute()


def test_an_expanded_list_is_taken_once_and_not_again_when_a_run_is_resumed(log: Path) -> None:
    def pages() -> list[int]:
        note(log, "made")
        return [1, 2, 3]

    def read(page: int) -> int:
        note(log, page)
        return 6 // (page - 2)

    run = pf.expand(read, pf.call(pages)).run(workers=1)
    with pytest.raises(TooManyFailuresError):
        run.result()
    assert pf.resume(run.run_id, workers=1, max_failures=1).result() == [-6, 6]
    assert Counter(noted(log)) == {"made": 1, "1": 1, "2": 1, "3": 1}

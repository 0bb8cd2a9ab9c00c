"""Calls of tasks on values: `.run()`, plain Dask and a plain loop give the same, and each call is made once."""

from __future__ import annotations

import operator
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parflow as pf
from parflow.errors import CallFailedError, CodeError, GraphError, StepError
from parflow.model import INLINE_BYTES

# --- how to say it briefly -------------------------------------------------------------------------------------------


def note(file: Path, what: object) -> None:
    """Add a line to a file in one write, so that lines of several processes don't mix."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, f"{what}\n".encode())
    os.close(handle)


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


@pf.task
def add(a: int, b: int = 1) -> int:
    return a + b


@pf.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@pf.task(outputs=2)
def divide(a: int, b: int) -> tuple[int, int]:
    return divmod(a, b)


# --- what a call may be given, and what it gives --------------------------------------------------------------------


def test_a_task_is_the_plain_function_outside_of_a_workflow_and_a_node_where_something_is_lazy() -> None:
    assert add(1, 2) == 3
    assert divide(7, 2) == (3, 1)
    value = add(pf.call(int, "1"), b=2)
    assert isinstance(value, pf.Value)
    assert both(value) == 3


def test_values_are_found_however_deep_they_are_in_lists_tuples_and_dicts() -> None:
    class Point(NamedTuple):
        x: Any
        y: Any

    one, two = pf.call(int, "1"), pf.items([1, 1]).reduce(pf.sum())
    given = {"a": [one, (two, {"b": one})], "c": Point(two, "plain"), "d": []}
    shown = both(pf.call(repr, given), isolation="inline")
    assert shown == "{'a': [1, (2, {'b': 1})], 'c': Point(x=2, y='plain'), 'd': []}"


def test_a_dataset_is_given_as_the_list_of_its_records() -> None:
    numbers = pf.items(range(10), chunk_records=3)
    assert both(total(numbers.map(operator.neg))) == -45
    assert both(total(numbers.filter(lambda n: n > 99))) == 0
    assert both(pf.call(sorted, numbers.distinct(lambda n: n % 3))) == [0, 1, 2]


def test_several_outputs_are_values_of_their_own() -> None:
    quotient, rest = divide(pf.call(int, "20"), 6)
    assert both(quotient * 100 + rest) == 302


@pytest.mark.parametrize("made", [[1, 2, 3], [1], 5, None], ids=repr)
def test_another_number_of_outputs_fails_the_call_and_says_so(made: Any) -> None:
    @pf.task(outputs=2)
    def pair(made: Any) -> Any:
        return made

    first, _ = pf.call(pair, made)
    with pytest.raises(CallFailedError, match="'pair' has outputs=2, so it returns a tuple of 2 results"):
        finished(first, isolation="inline")
    with pytest.raises(TypeError, match="'pair' has outputs=2, so it returns a tuple of 2 results"):
        first.compute()


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda v: (v + 1) * 2 - v / 7 // 1 % 5, 15),
        (lambda v: 100 - (1 + v) * (2 * v) / 7 + 2**v % 7 - 20 // v, 84),
        (
            lambda v: [v > 6, v >= 8, v < 8, v <= 6, v == 7, v != 7, ~(v > 6) & 1 | 2],
            [True, False, True, False, True, False, 2],
        ),
        (lambda v: abs(-v) + +v, 14),
        (lambda v: pf.call(divmod, v, 2)[1], 1),
        (lambda v: pf.call(dict, [("k", [v, v + 1])])["k"][1], 8),
        (lambda v: sum([v, v, v]), 21),
    ],
)
def test_reckoning_with_a_value_is_a_call(make: Callable[[pf.Value], Any], wanted: Any) -> None:
    made = make(pf.call(int, "7"))
    assert both(pf.call(list, made) if isinstance(made, list) else made, isolation="inline") == wanted


def test_a_call_made_in_a_workflow_runs_whether_or_not_its_result_is_returned(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"

    @pf.workflow
    def flow() -> Any:
        numbers = pf.items([1, 2])
        numbers.write_jsonl(out)
        pf.call(note, log, pf.call(int, "5"))
        pf.call(note, log, "again")
        pf.call(note, log, "again")
        return numbers.reduce(pf.sum())

    assert finished(flow()) == 3
    assert noted(log) == ["5", "again", "again"]
    assert (out / "_manifest.json").exists()


def test_plain_dask_makes_equal_calls_as_often_as_a_run_does(tmp_path: Path) -> None:
    log = tmp_path / "log"
    both(pf.call(list, [pf.call(note, log, "tick") for _ in range(3)]))
    assert noted(log) == ["tick"] * 6


def test_what_a_workflow_returns_keeps_its_structure() -> None:
    class Pair(NamedTuple):
        left: Any
        right: Any

    @pf.workflow
    def inner(n: int) -> Any:
        return {"sum": pf.items(range(n)).reduce(pf.sum()), "rows": pf.items(range(n))}

    @pf.workflow
    def outer() -> Any:
        parts = inner(3)
        return Pair({"deep": [parts, (parts["sum"] + 1,)]}, None)

    for result in (finished(outer()), outer().compute()):
        assert type(result) is Pair
        assert result == ({"deep": [{"sum": 3, "rows": [0, 1, 2]}, (4,)]}, None)


def test_dask_computes_values_datasets_and_what_holds_them_together() -> None:
    value, dataset = pf.call(int, "3"), pf.items([1, 2]).map(operator.mul, pf.call(int, "3"))
    assert dask.compute(value, dataset, {"a": [value + 1, dataset]}) == (3, [3, 6], {"a": [4, [3, 6]]})


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda v: v in [1, 2], "no truth"),
        (lambda v: [*v], "no items"),
        (lambda v: sorted([v, v + 1]), "no truth"),
        (lambda v: f"{v:.2f}", "no format"),
        (lambda v: range(10)[v], "no number"),
        (lambda v: pf.call(len, {v: 1}), "dict with something lazy in it"),
        (lambda v: pf.call(len, {v}), "set with something lazy in it"),
        (lambda v: pf.call(lambda: v), "uses 'v', which is lazy"),
        (lambda v: add(v, c=1), "unexpected keyword"),
        (lambda v: add(v, 1, 2), "too many"),
    ],
)
def test_a_value_used_as_if_it_were_there_is_refused_with_what_to_write(use: Callable[[pf.Value], Any], words: str) -> None:
    with pytest.raises(GraphError, match=words):
        use(pf.call(int, "7"))


# --- steps that are given values -------------------------------------------------------------------------------------


def test_every_step_takes_lazy_arguments_by_place_and_by_name() -> None:
    numbers = pf.items(range(6), chunk_records=2)
    two, three = pf.call(int, "2"), pf.items([1, 2]).reduce(pf.sum())

    def keep(n: int, least: int, *, most: int) -> bool:
        return least <= n <= most

    def batch(batch: list[int], more: list[int], by: int = 0) -> list[int]:
        return [n * by + len(more) for n in batch]

    assert both(numbers.map(operator.add, two)) == [2, 3, 4, 5, 6, 7]
    assert both(numbers.filter(keep, two, most=three)) == [2, 3]
    assert both(numbers.flat_map(lambda n, times: [n] * (n == times), three)) == [3]
    assert both(numbers.map_batches(batch, 4, "records", numbers, by=two)) == [6, 8, 10, 12, 14, 16]


def test_records_that_two_passes_share_are_made_once_and_a_bad_one_is_one_dead_letter(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def parse(text: str) -> float:
        note(log, text)
        return float(text)

    numbers = pf.items(["1", "2", "bad", "6"], chunk_records=1).map(parse)
    shares = numbers.map(operator.sub, numbers.reduce(pf.mean()))
    run = shares.run(workers=2, max_failures=1)
    assert run.result() == [-2.0, -1.0, 3.0]
    assert [failure.record for failure in run.dead_letters()] == ["items[2]"]
    assert noted(log) == ["1", "2", "6", "bad"]


def test_a_value_that_many_records_are_given_may_be_large() -> None:
    words = pf.call(dict.fromkeys, range(50_000), "x" * 20)
    assert both(pf.items([0, 49_999, 50_000]).map(lambda n, words: n in words, words)) == [True, True, False]


# --- large, small, odd -------------------------------------------------------------------------------------------------


def test_a_result_stands_in_the_journal_while_it_is_small_and_in_the_store_when_it_is_large() -> None:
    size = INLINE_BYTES
    run = pf.call(list, [pf.call(bytes, size - 100), pf.call(bytes, size)]).run(workers=2)
    assert run.result() == [bytes(size - 100), bytes(size)]
    (small,), (large,), _ = (call.results for call in run.state.calls)
    assert (small.key, large.inline) == (None, None)
    assert small.inline is not None
    assert large.key is not None
    assert len(run.store.get(large.key)) == large.size > size


def test_a_constant_of_ten_million_bytes_reaches_calls_and_steps() -> None:
    data = os.urandom(10_000_000)
    assert both(pf.call(len, data)) == len(data)
    assert both(pf.items([1]).map(lambda n, data: n + len(data), data)) == [len(data) + 1]


def test_a_result_that_cannot_be_pickled_fails_its_call_in_words() -> None:
    with pytest.raises(CallFailedError, match=r"failed: TypeError: cannot pickle '_thread\.lock' object"):
        finished(pf.call(threading.Lock))


def test_an_argument_that_cannot_be_pickled_is_named_before_the_run_begins() -> None:
    with pytest.raises(CodeError, match="'id': what it is given can't travel"):
        finished(pf.call(id, threading.Lock()))


def test_a_list_that_contains_itself_is_a_result_like_any_other() -> None:
    def knot() -> list[Any]:
        made: list[Any] = []
        made.append(made)
        return made

    for made in (pf.call(knot).compute(), finished(pf.call(knot), isolation="inline")):
        assert made[0] is made


class Local:
    """A class of this file, which children import; one of a function travels with what is made of it."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None  # type: ignore[assignment]


def test_objects_of_ones_own_classes_are_results() -> None:
    class Inner(Local):
        pass

    assert finished(pf.call(lambda made: made.n + 1, pf.call(Local, 3))) == 4
    assert finished(pf.call(Local, 3)) == Local(3)
    made = finished(pf.call(lambda n: Inner(n), 3))
    assert (type(made).__qualname__, made.n) == (Inner.__qualname__, 3)


class Model:
    """Built once in a child, then called."""

    def __init__(self, log: Path, factor: int) -> None:
        note(log, "built")
        self.factor = factor

    def __call__(self, n: int) -> int:
        return self.factor * n


def test_a_class_task_is_built_once_for_all_its_calls(tmp_path: Path) -> None:
    log = tmp_path / "log"
    model = pf.task(partial(Model, log, 10))
    assert finished(total([model(pf.call(int, n)) for n in range(6)]), workers=1) == 150
    assert noted(log) == ["built"]
    assert total([model(pf.call(int, n)) for n in range(6)]).compute() == 150


def test_a_class_that_cannot_be_built_breaks_the_task_and_no_call() -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no model here")

        def __call__(self) -> None: ...

    with pytest.raises(StepError, match=r"'Broken'.*no model here"):
        finished(pf.call(Broken))


def test_an_async_task_is_called_and_waited_for() -> None:
    @pf.task
    async def twice(n: int) -> int:
        import asyncio

        await asyncio.sleep(0)
        return 2 * n

    assert both(pf.call(twice, pf.call(twice, 3))) == 12


def test_what_a_call_changes_in_its_arguments_nobody_else_sees() -> None:
    def pop(items: list[int]) -> int:
        return items.pop()

    items = pf.call(list, [1, 2, 3])
    assert finished(pf.call(list, [pf.call(pop, items), pf.call(pop, items), pf.call(len, items)]), workers=1) == [3, 3, 3]


# --- many, and side by side ---------------------------------------------------------------------------------------------


@pf.workflow
def mixed(count: int) -> Any:
    """Make that many calls of all kinds, each on what others gave."""
    values = [pf.call(int, n) for n in range(10)]
    for n in range(10, count - 1):
        if n % 3 == 0:
            values.append(add(values[n // 2], b=values[n // 3]))
        elif n % 3 == 1:
            values.append(values[n * 2 // 3] % 1009)
        else:
            values.append(total(values[n // 2 - 5 : n // 2]))
    return total(values)


def mixed_in_a_loop(count: int) -> int:
    values = [*range(10)]
    for n in range(10, count - 1):
        made = [values[n // 2] + values[n // 3], values[n * 2 // 3] % 1009, sum(values[n // 2 - 5 : n // 2])]
        values.append(made[n % 3])
    return sum(values)


def test_a_thousand_mixed_calls_give_what_a_loop_gives() -> None:
    assert both(mixed(1000)) == mixed_in_a_loop(1000)


def test_five_thousand_calls_of_a_list_comprehension_run_as_one_list() -> None:
    @pf.workflow
    def flow() -> Any:
        return total([add(n) for n in range(5000)])

    assert finished(flow()) == sum(range(1, 5001))


def test_a_long_chain_and_one_that_doubles_need_no_deep_stack_and_no_time() -> None:
    def repeated(times: int, step: Callable[[Any], Any]) -> Any:
        value = pf.call(int, "1")
        for _ in range(times):
            value = step(value)
        return value

    assert repeated(3000, lambda value: value + 1).compute() == 3001
    assert both(repeated(64, lambda value: value + value)) == 2**64

    numbers = pf.items([1, 2])
    for _ in range(200):
        numbers = numbers.map(operator.sub, numbers.reduce(pf.max()))
    assert numbers.compute() == [-1, 0]


def test_calls_that_do_not_wait_for_each_other_run_side_by_side(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "there")
    os.mkfifo(tmp_path / "back")

    def ask(there: Path, back: Path) -> str:  # opening a pipe waits for the other end to be opened
        there.write_text("hello")
        return back.read_text()

    def answer(there: Path, back: Path) -> str:
        heard = there.read_text()
        back.write_text(heard.upper())
        return heard

    pipes = (tmp_path / "there", tmp_path / "back")
    calls = pf.call(list, [pf.call(ask, *pipes), pf.call(answer, *pipes)])
    assert finished(calls, timeout="20s") == ["HELLO", "hello"]


# --- calls that fail ------------------------------------------------------------------------------------------------------


def boom(n: int) -> None:
    raise ValueError(f"no {n}")


def crash(n: int) -> None:
    os._exit(3)


def hang(n: int) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("act", "error", "words", "tries"),
    [
        (boom, "ValueError", "no 7", 1),
        (crash, "RecordCrashedError", "exit code 3", 2),
        (hang, "RecordTimeoutError", "0.4 s", 1),
    ],
    ids=["raises", "crashes", "hangs"],
)
def test_a_call_that_fails_in_any_way_takes_no_other_with_it(
    act: Callable[[int], None], error: str, words: str, tries: int, tmp_path: Path
) -> None:
    log = tmp_path / "log"

    @pf.task(timeout=0.4)
    def risky(n: int) -> int:
        note(log, n)
        if n == 7:
            act(n)
        return n

    outcomes = finished(pf.settle(*(pf.call(risky, n) for n in range(20))))
    assert [outcome.value for outcome in outcomes if outcome.ok] == [n for n in range(20) if n != 7]
    failure = outcomes[7].failure
    assert (failure.step, failure.error) == ("risky", error)
    assert words in failure.message
    assert Counter(noted(log)) == {str(n): tries if n == 7 else 1 for n in range(20)}


def test_a_call_that_takes_its_process_down_ends_the_run_in_words() -> None:
    run = pf.call(crash, 12).run(workers=2)
    with pytest.raises(CallFailedError, match=r"call 'crash' failed: RecordCrashedError: .*exit code 3"):
        run.result()
    assert [failure.step for failure in run.dead_letters()] == ["crash"]


def test_a_failed_call_is_named_and_resuming_makes_it_and_what_waits_for_it_and_nothing_else(tmp_path: Path) -> None:
    log, key = tmp_path / "log", tmp_path / "key"

    def step(name: str, *before: Any) -> str:
        note(log, name)
        if name == "door" and not key.exists():
            raise FileNotFoundError("the key")
        return name

    first = pf.call(step, "first")
    door = pf.call(step, "door", first)
    run = pf.call(step, "last", door, pf.call(step, "beside")).run(workers=1)
    with pytest.raises(CallFailedError, match="call 'step' failed: FileNotFoundError: the key"):
        run.result()
    before = Counter(noted(log))
    assert before["first"] == before["door"] == 1
    key.touch()
    assert pf.resume(run.run_id, workers=1).result() == "last"
    assert before + Counter(noted(log)) == {"first": 1, "door": 2, "beside": 1, "last": 1}


def test_a_traceback_shows_the_line_of_the_users_own_code() -> None:
    run = pf.call(boom, 3).run(workers=1)
    (failure,) = run.dead_letters()
    assert 'raise ValueError(f"no {n}")' in failure.traceback
    assert failure.preview == "3"


# --- tasks that return a graph -----------------------------------------------------------------------------------------------


@pf.workflow
def summed(n: int, log: Path | None = None) -> Any:
    if log is not None:
        pf.call(note, log, f"beside {n}")
    return pf.items(range(n), chunk_records=2).reduce(pf.sum())


@pf.workflow
def described(n: int) -> Any:
    return {"sum": summed(n), "rows": [pf.items(range(n)), n + pf.call(int, "1")]}


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda n: pf.call(operator.neg, n), -4),
        (lambda n: pf.items(range(n)), [0, 1, 2, 3]),
        (lambda n: pf.items(iter(range(n))).map(str), ["0", "1", "2", "3"]),
        (lambda n: [pf.call(int, n), n, {"more": pf.items([n])}], [4, 4, {"more": [4]}]),
        (lambda n: summed(n), 6),
        (lambda n: [summed(n), summed(n + 1)], [6, 10]),
        (lambda n: described(n), {"sum": 6, "rows": [[0, 1, 2, 3], 5]}),
        (lambda n: pf.when(pf.call(bool, n), summed(n), "none"), 6),
        (lambda n: pf.expand(operator.neg, pf.call(range, n)).reduce(pf.min()), -3),
    ],
    ids=["value", "dataset", "iterator", "structure", "workflow", "workflows", "nested", "when", "expand"],
)
def test_a_task_may_return_any_lazy_graph_which_runs_in_its_place(make: Callable[[int], Any], wanted: Any) -> None:
    after = pf.call(list, [pf.call(make, 4)])
    assert finished(after) == [wanted]
    assert after.compute() == [wanted]


def test_a_task_with_several_outputs_may_return_a_graph_for_each_and_nothing_beside_them_is_lost(tmp_path: Path) -> None:
    log = tmp_path / "log"

    @pf.task(outputs=2)
    def pair(n: int) -> Any:
        return summed(n, log), summed(n + 1, log)

    left, right = pf.call(pair, 3)
    assert both(left * 100 + right) == 306
    assert noted(log) == ["beside 3", "beside 3", "beside 4", "beside 4"]


@pf.task
def climb(place: int, best: int, heights: list[int]) -> Any:
    """Go on from place to place as long as it goes up."""
    score = pf.call(heights.__getitem__, place)
    return step_up(place, score, best, heights)


@pf.task
def step_up(place: int, score: int, best: int, heights: list[int]) -> Any:
    return best if score <= best else climb(pf.call(add, place), score, heights)


def test_a_loop_repeats_until_the_score_stops_rising() -> None:
    heights = [1, 3, 4, 9, 12, 11, 100]
    assert both(pf.call(climb, 0, 0, heights)) == 12


@pf.task
def turn(left: int, value: int) -> Any:
    """Sum up in each turn what a stage makes of the last one's value."""
    if left == 0:
        return value
    fresh = pf.items([1, 2, 3], chunk_records=1).map(operator.mul, pf.call(int, value))
    return turn(left - 1, fresh.reduce(pf.sum()))


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_a_stage_in_a_loop_gets_in_each_turn_that_turns_value(isolation: str) -> None:
    assert both(pf.call(turn, 5, 1), isolation=isolation) == 6**5


def test_a_loop_of_many_turns_needs_no_deep_stack() -> None:
    @pf.task
    def count(n: int) -> Any:
        return n if n >= 1000 else count(pf.call(add, n))

    assert pf.call(count, 0).compute() == 1000
    assert finished(pf.call(count, 950), isolation="inline") == 1000


def test_what_is_lazy_where_nobody_looks_for_it_is_refused() -> None:
    hidden = pf.call(lambda: OrderedDict(a=pf.call(int, "1")))
    with pytest.raises(GraphError, match="OrderedDict with something lazy in it"):
        hidden.compute()
    with pytest.raises(CallFailedError, match="Value<int> is lazy"):
        finished(hidden)


def test_what_is_made_within_a_graph_can_fail_and_is_named() -> None:
    with pytest.raises(CallFailedError, match="call 'boom' failed: ValueError: no 5"):
        finished(pf.call(lambda: pf.call(boom, 5)))


# --- any graph --------------------------------------------------------------------------------------------------------------

Made = list[tuple[Any, int]]
"""Of each result so far, what stands for it in a graph, and what it is."""


def _sum(values: Made, a: int, b: int) -> Made:
    return [(add(values[a][0], b=values[b][0]), values[a][1] + values[b][1])]


def _divide(values: Made, a: int, b: int) -> Made:
    (left, x), (right, y) = values[a], values[b]
    quotient, rest = divide(left, abs(right) + 1)
    return [(quotient, x // (abs(y) + 1)), (rest, x % (abs(y) + 1))]


def _records(values: Made, a: int, b: int) -> Made:
    (left, x), (right, y) = values[a], values[b]
    records = pf.items(range(5), chunk_records=2).map(operator.add, left)
    spread = records.map(lambda n, top, *, by: top - n + by, records.reduce(pf.max()), by=right)
    return [(total(spread), sum(4 - n + y for n in range(5))), (records.reduce(pf.sum()), 10 + 5 * x)]


def _when(values: Made, a: int, b: int) -> Made:
    (left, x), (right, y) = values[a], values[b]
    return [(pf.when(left > right, left - 1, pf.when(left == right, 0, right)), x - 1 if x > y else 0 if x == y else y)]


def _switch(values: Made, a: int, b: int) -> Made:
    (left, x), (right, y) = values[a], values[b]
    return [(pf.switch(left % 3, {0: right, 1: 7}, left), (y, 7, x)[x % 3])]


def _expand(values: Made, a: int, b: int) -> Made:
    (left, x), (right, y) = values[a], values[b]
    return [(pf.expand(operator.mul, pf.call(range, left % 7), right).reduce(pf.sum()), sum(n * y for n in range(x % 7)))]


def _settle(values: Made, a: int, b: int) -> Made:
    (left, x), (right, y) = values[a], values[b]

    def judge(outcomes: list[pf.Outcome]) -> int:
        return sum(outcome.value if outcome.ok else 1 for outcome in outcomes)

    fails = pf.call(operator.truediv, left, 0)
    return [(pf.call(judge, pf.settle(left, fails, right)), x + y + 1), (total(pf.quorum(2, fails, left, right)), x + y)]


def _grow(values: Made, a: int, b: int) -> Made:
    (left, x), (right, y) = values[a], values[b]
    return [(pf.call(lambda x, y: add(pf.call(int, x), y), left, right), x + y)]


KINDS = [_sum, _divide, _records, _when, _switch, _expand, _settle, _grow]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=8),
    st.lists(st.integers(-9, 9), min_size=1, max_size=3),
)
def test_any_graph_gives_what_plain_python_gives(
    steps: list[tuple[Callable[[Made, int, int], Made], int, int]], starts: list[int]
) -> None:
    def graph() -> Iterator[tuple[Any, int]]:
        values: Made = [(pf.call(int, n), n) for n in starts]
        for kind, a, b in steps:
            values += kind(values, a % len(values), b % len(values))
        yield from values

    wanted = [value for _, value in graph()]
    flow = pf.workflow(lambda: [lazy for lazy, _ in graph()])
    assert flow().compute() == wanted
    assert finished(flow(), isolation="inline") == wanted


def test_numpy_and_pandas_leave_an_operator_to_the_value() -> None:
    import numpy as np
    import pandas as pd

    two = pf.call(int, "2")
    assert (np.array([1, 2]) * two).compute().tolist() == [2, 4]
    assert (pd.Series([1, 2]) + two).compute().tolist() == [3, 4]

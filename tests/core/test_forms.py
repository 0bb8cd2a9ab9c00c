"""What a step's function may be, and what a plan makes of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest

from parflow.core.fingerprint import fingerprint
from parflow.core.forms import Batched, Concurrent, inner, is_async, is_built, within
from parflow.core.plan import Plan
from parflow.core.planner import make_plan
from parflow.core.reducers import count
from parflow.nodes import ReduceNode, SourceNode, StepNode, Task
from parflow.storage.sources.items import ItemsSource


class Plain:
    def __call__(self, record: int) -> int:
        return record


class Waits:
    def __init__(self, more: int = 0) -> None:
        self.more = more

    async def __call__(self, record: int) -> int:
        return record + self.more


class Inherits(Waits):
    """Is called as its parent is."""


class Uncallable:
    """Has nothing to call."""


async def waits(record: int) -> int:
    return record


async def streams(record: int) -> Any:
    yield record


@pytest.mark.parametrize(
    ("function", "built", "awaited"),
    [
        (len, False, False),
        (lambda record: record, False, False),
        (int, False, False),
        (type, False, False),
        (Uncallable, False, False),
        (Plain, True, False),
        (Plain(), False, False),
        (functools.partial(Plain), True, False),
        (functools.partial(max, 3), False, False),
        (waits, False, True),
        (streams, False, True),
        (functools.partial(waits), False, True),
        (Waits, True, True),
        (Waits(), False, True),
        (Waits().__call__, False, True),
        (functools.partial(Waits, 3), True, True),
        (Inherits, True, True),
        (Concurrent(waits, 5), False, True),
        (Concurrent(Waits, 5), True, True),
        (Batched(Plain, 5, "records"), True, False),
        (Batched(len, 5, "arrow"), False, False),
    ],
    ids=lambda it: re.sub(" at 0x[0-9a-f]+", "", repr(it)),
)
def test_a_function_is_called_awaited_or_built_first(function: Callable[..., Any], built: bool, awaited: bool) -> None:
    assert (is_built(function), is_async(function)) == (built, awaited)


@pytest.mark.parametrize("form", [Concurrent(abs, 5), Batched(abs, 5, "records")])
def test_a_form_is_called_as_its_function_is_and_another_may_take_its_place(form: Any) -> None:
    assert form(-1) == 1
    assert inner(form) is abs
    assert within(form, len) == type(form)(len, *list(vars(form).values())[1:])
    assert within(abs, len) is len


def plan(*functions: Callable[..., Any], source: Any = None) -> Plan:
    node: Any = SourceNode(source or ItemsSource(range(1000)))
    for function in functions:
        node = StepNode("map", Task(function, "step", timeout=2.0), node)
    return make_plan("flow", [ReduceNode(count(), node, "count")])


def test_a_plan_says_how_each_step_is_called() -> None:
    text = plan(abs, Plain, Concurrent(Waits, 1000), Batched(Plain, 2048, "arrow")).explain().splitlines()
    assert [line.strip() for line in text if " step " in line][:4] == [
        "map step [timeout 2 s]",
        "map step [built once a child, timeout 2 s]",
        "map step [built once a child, 1,000 in flight, timeout 2 s]",
        "map_batches step [built once a child, arrow, 2,048 at a time, timeout 2 s]",
    ]


def test_children_are_forked_from_a_server_that_has_what_the_steps_need() -> None:
    def more(*functions: Callable[..., Any]) -> set[str]:
        return {*plan(*functions).stages[0].preload} - {*plan(abs).stages[0].preload}

    assert more(Plain, Batched(list, 9, "records")) == set()
    assert more(waits, Batched(list, 9, "arrow")) == {"asyncio", "pyarrow"}
    assert more(Batched(list, 9, "pandas")) == {"pandas"}


def test_what_changes_no_result_is_no_part_of_a_fingerprint() -> None:
    def prints(*functions: Callable[..., Any]) -> Any:
        return plan(*functions).facts()

    assert prints(Concurrent(waits, 5)) == prints(Concurrent(waits, 50))
    assert prints(Batched(list, 5, "arrow")) == prints(Batched(list, 50, "arrow"))
    assert prints(Batched(list, 5, "arrow")) != prints(Batched(list, 5, "pandas"))
    assert prints(Batched(list, 5, "arrow")) != prints(Batched(sorted, 5, "arrow"))
    assert prints(Plain) != prints(Waits)
    assert prints(functools.partial(Waits, 1)) != prints(functools.partial(Waits, 2))


def classes() -> list[type]:
    """Classes of one name that differ in one place each."""

    class Base:
        def helper(self) -> int:
            return 1

    class OtherBase:
        def helper(self) -> int:
            return 2

    def made(base: type, **own: Any) -> type:
        return type("Model", (base,), {"__module__": __name__, "__qualname__": "Model", "limit": 1, **own})

    return [
        made(Base),
        made(OtherBase),
        made(Base, limit=2),
        made(Base, __init__=lambda self: None),
        made(Base, __call__=lambda self, record: record),
        made(Base, __call__=lambda self, record: -record),
        made(Base, load=staticmethod(lambda: 1)),
        made(Base, load=staticmethod(lambda: 2)),
        made(Base, load=classmethod(lambda cls: 1)),
        made(Base, size=property(lambda self: 1)),
        made(Base, size=property(lambda self: 2)),
        made(Base, size=functools.cached_property(lambda self: 3)),
    ]


def test_a_change_anywhere_in_a_class_changes_its_fingerprint() -> None:
    prints = [fingerprint(kind) for kind in classes()]
    assert len({*prints}) == len(prints)
    assert prints == [fingerprint(kind) for kind in classes()]


def test_a_source_whose_chunks_are_given_is_left_alone() -> None:
    cut = ItemsSource(range(1000), chunk_records=3)
    assert plan(Concurrent(waits, 500), source=cut).stages[0].source._sizes().__next__() == 3
    assert plan(Concurrent(waits, 500)).stages[0].source.together == 1000
    assert plan(Concurrent(waits, 5), Batched(list, 1024, "records")).stages[0].source.together == 32

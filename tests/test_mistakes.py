"""Mistakes in a graph are told before work starts, and each message has what to write instead."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import gc
import io
import operator
import pickle
import shutil
import tempfile
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import dask.bag
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import parflow as pf
from parflow.api.checks import (
    DEEPEST,
    check_arguments,
    check_arity,
    check_captured,
    check_generators,
    check_items,
    check_sinks,
    guard_recursion,
)
from parflow.api.lazy import Lazy
from parflow.core.forms import Batched, Concurrent
from parflow.errors import GraphError, LazyValueError, UsageError
from parflow.storage.sinks import JSONLinesSink, ParquetSink
from parflow.storage.sources.items import ItemsSource
from parflow.storage.sources.lines import JSONLinesSource
from parflow.storage.sources.listing import list_files

MEAN = pf.items([1, 2]).reduce(pf.mean())
MEANS = {"en": MEAN}
NUMBER = 3.0


def captured(function: Any, name: str = "f", method: str | None = "map") -> str | None:
    """Return what is said of what a function brings with it."""
    try:
        check_captured(function, Lazy, name, method)
    except GraphError as error:
        return str(error)
    return None


def arity(function: Any, positional: int = 1, *keywords: str, name: str = "f", method: str | None = "map") -> str | None:
    """Return what is said of how a function would be called."""
    try:
        check_arity(function, positional, keywords, name, method)
    except GraphError as error:
        return str(error)
    return None


# --- lazy values in a step's code ----------------------------------------------------------------------------------------


class Scorer:
    def __init__(self, mean: Any) -> None:
        self.mean = mean

    def score(self, record: Any) -> Any:
        return record - self.mean

    def __call__(self, record: Any) -> Any:
        return record - self.mean


class Centred:
    def __call__(self, record: Any) -> Any:
        return record - MEAN


class Kept:
    mean = MEAN

    def __call__(self, record: Any) -> Any:
        return record - self.mean


def minus(record: Any, mean: Any) -> Any:
    return record - mean


def with_default(record: Any, mean: Any = MEAN) -> Any:
    return record - mean


def with_keyword(record: Any, *, mean: Any = MEAN) -> Any:
    return record - mean


def with_global(record: Any) -> Any:
    return record - MEAN


def with_global_in_a_nested_function(records: list[Any]) -> Any:
    def one(record: Any) -> Any:
        return record - MEAN

    return [one(record) for record in records]


def with_global_dict(record: Any) -> Any:
    return record - MEANS["en"]


def passed_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def closure(mean: Any) -> Callable[[Any], Any]:
    return lambda record: record - mean


LAZY = {
    "closure": (closure(MEAN), "mean"),
    "closure of a list": (closure([1, MEAN]), "mean"),
    "closure of a tuple": (closure((MEAN, 1)), "mean"),
    "closure of a dict": (closure({"mean": MEAN}), "mean"),
    "closure of a set": (closure({MEAN}), "mean"),
    "default": (with_default, "mean"),
    "keyword default": (with_keyword, "mean"),
    "global": (with_global, "MEAN"),
    "global of a nested function": (with_global_in_a_nested_function, "MEAN"),
    "global dict": (with_global_dict, "MEANS"),
    "partial by name": (functools.partial(minus, mean=MEAN), "mean"),
    "partial by place": (functools.partial(minus, MEAN), "record"),
    "partial of a list": (functools.partial(minus, mean=[MEAN]), "mean"),
    "partial of what has it in its closure": (functools.partial(closure(MEAN)), "mean"),
    "method's object": (Scorer(MEAN).score, "self.mean"),
    "method's object's list": (Scorer([MEAN]).score, "self.mean"),
    "object": (Scorer(MEAN), "self.mean"),
    "object's class": (Kept(), "Kept.mean"),
    "object's code": (Centred(), "MEAN"),
    "class": (Centred, "MEAN"),
    "class attribute": (Kept, "Kept.mean"),
    "class with arguments": (functools.partial(Scorer, MEAN), "argument 1"),
    "decorated function": (passed_on(with_global), "MEAN"),
    "decorated closure": (passed_on(passed_on(closure(MEAN))), "mean"),
    "batches": (Batched(with_global, 10, "records"), "MEAN"),
    "many at a time": (Concurrent(with_global, 10), "MEAN"),
    "a lazy thing's own method": (MEAN.compute, "self"),
}


@pytest.mark.parametrize(("function", "variable"), LAZY.values(), ids=LAZY)
def test_a_lazy_value_in_a_function_is_named_and_the_message_says_how_to_pass_it(function: Any, variable: str) -> None:
    said = captured(function, "score")
    assert said is not None
    parameter = variable.rpartition(".")[2].replace(" ", "_")
    assert f"step 'score' uses {variable!r}" in said
    assert "Value<mean>" in said
    assert f"`docs.map(score, {parameter})`" in said
    assert f"`def score(record, {parameter})`" in said


def local_name() -> Callable[[Any], Any]:
    def own(record: Any) -> Any:
        MEAN = 2  # noqa: N806 - the same name as the global
        return record - MEAN

    return own


def attribute_of_that_name(record: Any) -> Any:
    return record.MEAN


def import_of_that_name(record: Any) -> Any:
    from types import SimpleNamespace as MEAN  # noqa: N814

    return MEAN(record=record)


CLEAN: dict[str, Any] = {
    "plain function": minus,
    "number in a closure": closure(2.5),
    "number in a global": lambda record: record - NUMBER,
    "local variable of that name": local_name(),
    "attribute of that name": attribute_of_that_name,
    "import of that name": import_of_that_name,
    "partial": functools.partial(minus, mean=2),
    "method": Scorer(2).score,
    "object": Scorer(2),
    "class": Scorer,
    "builtin": len,
    "method of a type": str.upper,
    "object in C": operator.itemgetter("text"),
    "object without attributes": object(),
    "async function": asyncio.sleep,
    "task that is plain": pf.task(minus),
}


@pytest.mark.parametrize("function", CLEAN.values(), ids=CLEAN)
def test_a_function_without_lazy_values_passes(function: Any) -> None:
    assert captured(function) is None


def test_a_variable_that_is_not_bound_yet_is_seen_when_it_is() -> None:
    def build() -> Iterator[Callable[[Any], Any]]:
        mean: Any

        def function(record: Any) -> Any:
            return record - mean

        yield function
        mean = MEAN
        yield function

    stages = build()
    assert captured(next(stages)) is None
    assert "'mean'" in (captured(next(stages)) or "")


def test_a_global_that_becomes_lazy_after_a_first_look_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    function = CLEAN["number in a global"]
    assert captured(function) is None
    monkeypatch.setitem(globals(), "NUMBER", MEAN)
    assert "'NUMBER'" in (captured(function) or "")


def test_a_proxy_that_answers_for_nothing_is_left_alone() -> None:
    class Proxy:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("unbound")

        @__class__.setter
        def __class__(self, kind: Any) -> None: ...

    assert captured(closure(Proxy())) is None


def test_a_function_that_holds_itself_is_looked_at_once_and_for_all() -> None:
    def again(record: Any) -> Any:
        return again(record)

    assert captured(again) is None


@pytest.mark.parametrize("method", ["map", "filter", "flat_map"])
def test_the_message_names_the_method_that_was_called(method: str) -> None:
    assert f"`docs.{method}(keep, mean)`" in (captured(closure(MEAN), "keep", method) or "")


def test_a_lambda_is_shown_as_a_function_that_can_be_written() -> None:
    assert "`docs.map(f, mean)`" in (captured(closure(MEAN), "lambda") or "")


def test_a_function_of_batches_takes_it_after_the_batch() -> None:
    assert "`def f(batch, mean)`" in (captured(closure(MEAN), "f", "map_batches") or "")


def test_a_call_is_told_to_take_it_as_an_argument() -> None:
    said = captured(closure(MEAN), "train", None) or ""
    assert "the call of 'train' uses 'mean'" in said
    assert "`train(..., mean)`" in said


def test_a_reducer_is_told_to_put_it_into_the_records() -> None:
    said = captured(pf.mean(closure(MEAN)), "mean", "reduce") or ""
    assert "`docs.map(f, mean).reduce(...)`" in said
    assert captured(pf.reducer(lambda: 0, minus, minus), "mine", "reduce") is None


# --- lazy values where they aren't found -----------------------------------------------------------------------------------

PLAIN_ARGUMENTS = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=3), st.sampled_from([MEAN, frozenset({1}), SimpleNamespace(n=1)])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(), inner, max_size=3)
    ),
)


@given(PLAIN_ARGUMENTS)
def test_lazy_values_in_lists_tuples_and_dicts_pass(arguments: Any) -> None:
    check_arguments([arguments, arguments], Lazy, "f")


@dataclasses.dataclass
class Settings:
    mean: Any


@pytest.mark.parametrize("hiding", [{MEAN}, frozenset({MEAN}), {MEAN: 1}, Settings(MEAN), SimpleNamespace(mean=MEAN)])
@given(st.sampled_from([lambda it: it, lambda it: [it], lambda it: (1, it), lambda it: {"deep": [it]}]))
def test_a_lazy_value_that_would_stay_lazy_is_refused(hiding: Any, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(GraphError, match=r"'f' is given a \w+ with something lazy in it \(Value<mean>\).*in a list\."):
        check_arguments(wrap(hiding), Lazy, "f")


def test_a_list_that_contains_itself_is_refused() -> None:
    endless: list[Any] = [1]
    endless.append({"again": endless})
    with pytest.raises(GraphError, match=r"'f' is given a list that contains itself; give a copy: `list\(\.\.\.\)`"):
        check_arguments([endless], Lazy, "f")


# --- functions that can't be called so -----------------------------------------------------------------------------------


def two(record: Any, language: str) -> None: ...
def nothing() -> None: ...
def by_name(record: Any, *, language: str) -> None: ...
def any_number(*args: Any, **kwargs: Any) -> None: ...
def only_by_place(record: Any, /) -> None: ...
async def fetch(record: Any, session: Any) -> None: ...


class Built:
    def __init__(self, language: str) -> None: ...
    def __call__(self, record: Any) -> None: ...
    def method(self, record: Any) -> None: ...


class Called:
    def __call__(self) -> None: ...


@dataclasses.dataclass
class Point:
    x: int
    y: int


def injecting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate as a wrapper that adds an argument does."""

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args, "en")

    return wrapper


WRONG: dict[str, tuple[Any, str, str]] = {
    # what is given one record: what is wrong, what to write
    "one too many": (two, "missing a required argument: 'language'", "`docs.map(f, language=...)`"),
    "none at all": (nothing, "too many positional arguments", "`def f(record)`"),
    "keyword only": (by_name, "'language'", "`docs.map(f, language=...)`"),
    "async": (fetch, "'session'", "`docs.map(f, session=...)`"),
    "partial": (functools.partial(by_name), "'language'", "`language=None`"),
    "full partial": (functools.partial(two, 1, "en"), "too many positional arguments", "`def f(record)`"),
    "partial in the record's place": (functools.partial(two, record=1), "'record'", "`record=`"),
    "method of a class": (Built.method, "'record'", "`Built().method`"),
    "method without a parameter": (Called().__call__, "too many positional arguments", "`def f(record)`"),
    "object": (Called(), "too many positional arguments", "`def f(record)`"),
    "class that needs arguments": (Built, "'language'", "`functools.partial(Built, ...)`"),
    "class with too many": (functools.partial(Built, "en", *[1]), "too many", "`functools.partial(Built, ...)`"),
    "class whose instances take none": (Called, "too many positional arguments", "`def f(record)`"),
    "class of data": (Point, "'y'", "`docs.map(f, y=...)`"),
    "builtin": (divmod, "'y'", "`docs.map(f, y=...)`"),
    "batches": (Batched(two, 10, "records"), "'language'", "`docs.map(f, language=...)`"),
    "many at a time": (Concurrent(fetch, 10), "'session'", "`docs.map(f, session=...)`"),
}


@pytest.mark.parametrize(("function", "problem", "write"), WRONG.values(), ids=WRONG)
def test_a_function_that_cannot_take_a_record_is_told_what_to_write(function: Any, problem: str, write: str) -> None:
    said = arity(function) or ""
    assert said.startswith("step 'f' calls f(record), but its function takes (")
    assert problem in said
    assert write in said


RIGHT: dict[str, tuple[Any, ...]] = {
    "function": (minus, 2),
    "default": (with_default, 1),
    "keyword": (two, 1, "language"),
    "keyword only": (by_name, 1, "language"),
    "any number": (any_number, 7, "a", "b"),
    "only by place": (only_by_place, 1),
    "async": (fetch, 1, "session"),
    "partial": (functools.partial(two, language="en"), 1),
    "partial that is overruled": (functools.partial(two, language="en"), 1, "language"),
    "method": (Scorer(1).score, 1),
    "object": (Scorer(1), 1),
    "class that is built": (functools.partial(Built, "en"), 1),
    "class of data": (Point, 2),
    "type without a signature": (int, 1),
    "builtin without a signature": (max, 3),
    "builtin": (len, 1),
    "method of a type": (str.upper, 1),
    "object in C": (operator.itemgetter("text"), 1),
    "decorated function that gets more": (injecting(two), 1),
    "cached function": (functools.cache(minus), 2),
}


@pytest.mark.parametrize("call", RIGHT.values(), ids=RIGHT)
def test_a_function_that_can_be_called_so_passes_each_time(call: tuple[Any, ...]) -> None:
    assert [arity(*call) for _ in range(3)] == [None] * 3


def test_too_many_extra_arguments_are_told_with_a_parameter_for_each() -> None:
    assert "`def clean(record, a, b)`" in (arity(two, 3, name="clean") or "")
    assert "`def clean(record, language, style)`" in (arity(two, 1, "language", "style", name="clean") or "")


def test_an_argument_given_twice_is_told_to_be_left_out() -> None:
    assert "Leave out `language=`" in (arity(two, 2, "language") or "")


def test_a_call_that_lacks_an_argument_is_told_so() -> None:
    said = arity(two, 1, name="train", method=None) or ""
    assert said.startswith("the call of 'train' calls train(a), ")
    assert "`train(..., language=...)`" in said


def test_functions_that_fit_are_not_kept_alive() -> None:
    def local(record: Any, *, language: str) -> None: ...

    assert arity(local, 1, "language") is None
    gone = weakref.ref(local)
    del local
    gc.collect()
    assert gone() is None


@given(
    st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 4), st.sets(st.sampled_from("abcdkx"))
)
def test_what_passes_is_what_python_takes(
    needed: int, optional: int, more: bool, named: bool, positional: int, keywords: set[str]
) -> None:
    names = [*"abc"[:needed], *(f"{name}=0" for name in "def"[:optional])]
    names += ["*more"] if more else ["*"]
    names += ["k"] if named else ["k=0"]
    scope: dict[str, Any] = {}
    exec(f"def function({', '.join(names)}): pass", scope)
    try:
        scope["function"](*[0] * positional, **dict.fromkeys(keywords, 0))
        fits = True
    except TypeError:
        fits = False
    assert (arity(scope["function"], positional, *sorted(keywords)) is None) == fits
    assert (
        arity(functools.partial(scope["function"], *[0] * min(positional, 1)), max(positional - 1, 0), *keywords) is None
    ) == fits


# --- items ---------------------------------------------------------------------------------------------------------------


def numbers() -> Iterator[int]:
    yield from range(3)


def ended() -> Iterator[int]:
    made = numbers()
    assert list(made) == [0, 1, 2]
    return made


async def stream() -> AsyncIterator[int]:
    yield 1


NO_ITEMS: dict[str, tuple[Callable[[], Any], str]] = {
    "text": (lambda: "data/*.jsonl", "items([text])"),
    "bytes": (lambda: b"abc", "items([data])"),
    "set": (lambda: {"b", "a"}, "items(sorted(...))"),
    "frozenset": (lambda: frozenset("ab"), "items(sorted(...))"),
    "dict": (lambda: {"a": 1}, "items(mapping.items())"),
    "path": (lambda: Path("data.txt"), "read_files(path) or read_lines(path)"),
    "DataFrame": (lambda: pd.DataFrame({"n": [1]}), "items(frame.to_dict('records'))"),
    "Table": (lambda: pa.table({"n": [1]}), "items(table.to_pylist())"),
    "bag": (lambda: dask.bag.from_sequence([1]), "from_dask(bag)"),
    "Delayed": (lambda: dask.delayed(numbers)(), "from_dask([delayed])"),
    "ended generator": (ended, "items(list(...))"),
    "async generator": (stream, "items([item async for item in ...])"),
    "function": (lambda: numbers, "items(numbers())"),
    "number": (lambda: 3, "items([...])"),
    "None": (lambda: None, "items([...])"),
}


@pytest.mark.parametrize(("make", "write"), NO_ITEMS.values(), ids=NO_ITEMS)
def test_what_has_no_items_or_not_those_it_seems_to_have_is_told_what_to_write(make: Callable[[], Any], write: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_items(make())
    assert str(caught.value).startswith("items() was given ")
    assert f"write {write}" in str(caught.value)


ITEMS: dict[str, Callable[[], Any]] = {
    "list": lambda: ["a"],
    "tuple": lambda: ("a",),
    "range": lambda: range(3),
    "pairs": lambda: {"a": 1}.items(),
    "keys": lambda: {"a": 1}.keys(),
    "generator": numbers,
    "file": lambda: io.StringIO("a\nb\n"),
    "Series": lambda: pd.Series([1]),
    "sequence by place alone": lambda: type("Letters", (), {"__getitem__": lambda self, place: "abc"[place]})(),
}


@pytest.mark.parametrize("make", ITEMS.values(), ids=ITEMS)
def test_what_has_items_passes_and_keeps_them(make: Callable[[], Any]) -> None:
    iterable, again = make(), make()
    check_items(iterable)
    assert list(iterable) == list(again)


def test_a_generator_that_was_begun_passes() -> None:
    begun = numbers()
    next(begun)
    check_items(begun)


@pytest.mark.parametrize("make", [numbers, lambda: iter([1, 2]), lambda: map(str, [1]), lambda: io.StringIO("a")])
def test_an_iterator_passed_twice_is_told_to_be_a_list_or_one_dataset(make: Callable[[], Any]) -> None:
    iterator = make()
    with pytest.raises(GraphError, match=r"passed twice to items\(\).*items\(list\(\.\.\.\)\).*one dataset in both branches"):
        check_generators([ItemsSource(iterator), JSONLinesSource("a.jsonl"), ItemsSource(iterator)])


def test_what_can_be_gone_through_twice_may_be_passed_twice() -> None:
    listed = [1, 2]
    check_generators([ItemsSource(listed), ItemsSource(listed), ItemsSource(numbers()), ItemsSource(numbers())])


def test_one_dataset_in_two_branches_of_a_pass_is_listed_once() -> None:
    numbers = pf.items(iter([1, 2, 3]))

    @pf.workflow
    def both() -> Any:
        return numbers.reduce(pf.sum()), numbers.map(str).reduce(pf.count())

    assert len(both().plan().stages) == 1


# --- paths that inputs and outputs share -----------------------------------------------------------------------------------


def shared(sinks: dict[str, Any], *paths: str) -> str | None:
    """Return what is said of some sinks beside some inputs."""
    try:
        check_sinks(sinks.items(), [JSONLinesSource(path) for path in paths])
    except GraphError as error:
        return str(error)
    return None


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    return tmp_path


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("out", "out"),
        ("out", "./out/"),
        ("out", "{here}/out"),
        ("out", "file://{here}/out"),
        ("out", "other/../out"),
        ("real/out", "link/out"),
        ("s3://bucket/out", "s3://bucket/out/"),
        ("out", "out/more"),
        ("out/more", "out"),
        ("s3://bucket/out", "s3://bucket/out/more"),
    ],
)
def test_two_sinks_in_one_folder_or_one_in_another_are_told_to_take_their_own(one: str, other: str, here: Path) -> None:
    first, second = JSONLinesSink(one.format(here=here)), ParquetSink(other.format(here=here))
    said = shared({"write_jsonl a": first, "write_parquet b": second}) or ""
    assert said.startswith("two sinks, write_jsonl a and write_parquet b, write to ")
    assert f"give each a folder of its own, such as {min(first.path, second.path, key=len) + '-2'!r}" in said


@pytest.mark.parametrize(
    ("one", "other"), [("out", "out-2"), ("out/a", "out/b"), ("out", "s3://bucket/out"), ("s3://a/out", "s3://b/out")]
)
def test_sinks_beside_each_other_pass(one: str, other: str, here: Path) -> None:
    assert shared({"a": JSONLinesSink(one), "b": JSONLinesSink(other)}) is None


@pytest.mark.parametrize(
    ("path", "folder", "free"),
    [
        ("out/*.jsonl", "out", "out-2"),
        ("out/*", "out", "out-2"),
        ("out/part-0000?.jsonl", "out", "out-2"),
        ("out/part-00123.jsonl", "out", "out-2"),
        ("out/_manifest.json", "out", "out-2"),
        ("out/**", "out", "out-2"),
        ("data/**", "data/out", "data-out"),
        ("data/**/*.jsonl", "data/deep/out", "data-out"),
        ("data/*/*.jsonl", "data/out", "data-out"),
        ("file://{here}/out/*.jsonl", "out", "out-2"),
        ("link/*.jsonl", "real", "real-2"),
        ("real/**", "link/out", "link/../real-out"),
        ("s3://bucket/out/*.jsonl", "s3://bucket/out", "s3://bucket/out-2"),
        ("s3://bucket/data/**", "s3://bucket/data/out", "s3://bucket/data-out"),
        ("simplecache::s3://bucket/out/*.jsonl", "s3://bucket/out", "s3://bucket/out-2"),
    ],
)
def test_an_input_that_would_read_what_a_sink_writes_is_told_so(path: str, folder: str, free: str, here: Path) -> None:
    sink = JSONLinesSink(folder)
    said = shared({"write_jsonl out": sink}, "in/*.jsonl", path.format(here=here)) or ""
    expected = free if "://" in free else str((here / free).resolve())
    assert "'write_jsonl out' would write what read_jsonl reads" in said
    assert f"{sink.path!r}. Write to a folder that no input is in, such as {expected!r}" in said
    assert "use the dataset that is written" in said
    assert shared({"write_jsonl out": JSONLinesSink(expected)}, path.format(here=here)) is None


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("data/*.jsonl", "data/out"),
        ("data/*.txt", "data"),
        ("data/more/*.jsonl", "data"),
        ("data/[ab]*.jsonl", "data"),
        ("data.jsonl", "data"),
        ("data/**/in-*.jsonl", "data/out"),
        ("s3://bucket/data/*.jsonl", "s3://bucket/data/out"),
        ("s3://bucket/out/*.jsonl", "out"),
        ("zip://*.jsonl::s3://bucket/out/all.zip", "s3://bucket/out"),
    ],
)
def test_an_input_beside_a_sink_passes(path: str, folder: str, here: Path) -> None:
    assert shared({"a": JSONLinesSink(folder)}, path) is None


SEGMENTS = st.sampled_from(["a", "b", "*", "**", "?", "[ab]", ".c"])
FILES = st.sampled_from(["*", "**", "*.jsonl", "*.json", "part-*", "part-00000.jsonl", "?art-0000[0-3]*", ".*", "_*", "x*"])


@given(st.lists(SEGMENTS, max_size=3), FILES, st.lists(st.sampled_from(["a", "b", ".c"]), max_size=3))
def test_what_is_refused_is_what_listing_would_find(segments: list[str], last: str, folders: list[str]) -> None:
    with tempfile.TemporaryDirectory() as here:
        sink = JSONLinesSink("/".join([here, *folders]))
        path = "/".join([here, *segments, last])
        said = shared({"a": sink}, path)
        Path(sink.path).mkdir(parents=True, exist_ok=True)
        written = [f"{sink.path}/{name}" for name in ("part-00000.jsonl", "_manifest.json")]
        for name in written:
            Path(name).touch()
        found = {one.path for one in list_files([path], splittable=False)}
        assert (said is not None) == bool(found.intersection(written))
        shutil.rmtree(sink.path, ignore_errors=True)


# --- graphs without an end -------------------------------------------------------------------------------------------------


def calls_itself(levels: int) -> int:
    with guard_recursion(calls_itself, "calls_itself"):
        return calls_itself(levels - 1) + 1 if levels else 0


def test_a_workflow_that_calls_itself_without_an_end_is_told_to_let_a_task_decide() -> None:
    with pytest.raises(GraphError, match=r"workflow 'calls_itself' calls itself without an end.*`@pf\.task def ") as caught:
        calls_itself(10**6)
    assert len(traceback.format_exception(caught.value)) < 10  # not a thousand lines of calls


def test_workflows_that_call_each_other_without_an_end_are_told_which() -> None:
    def one() -> None:
        with guard_recursion(one, "one"):
            other()

    def other() -> None:
        with guard_recursion(other, "other"):
            one()

    with pytest.raises(GraphError, match="workflow 'one' calls itself"):
        one()


def test_a_workflow_that_calls_itself_a_few_times_is_built() -> None:
    assert calls_itself(DEEPEST - 1) == DEEPEST - 1


def test_after_a_workflow_without_an_end_others_are_built() -> None:
    for _ in range(2):
        with contextlib.suppress(GraphError):
            calls_itself(10**6)
    assert calls_itself(3) == 3


def test_an_endless_function_within_a_workflow_is_not_the_workflows_fault() -> None:
    def endless(n: int) -> int:
        return endless(n + 1) + 1

    with pytest.raises(RecursionError), guard_recursion(endless, "flow"):
        endless(0)


# --- lazy values used as if they were computed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "write"),
    [
        ("truth", "`pf.when(value, then, otherwise)`"),
        ("items", "`pf.expand(value).map(f)`"),
        ("items", "`@pf.task(outputs=2)`"),
        ("length", "`docs.reduce(pf.count())`"),
        ("membership", "`docs.filter(f)`"),
        ("number", "`docs.map(f, value)`"),
        ("format", "`f(value)`"),
    ],
)
def test_a_lazy_value_used_at_once_says_what_to_write(asked: str, write: str) -> None:
    said = str(LazyValueError("Value<mean>", asked))
    assert said.startswith(f"Value<mean> is lazy: it has no {asked} before it is computed. ")
    assert write in said
    assert said.endswith("To see it now: `.compute()`, or `.run().result()`.")
    assert str(pickle.loads(pickle.dumps(LazyValueError("Value<mean>", asked)))) == said


@pytest.mark.parametrize(
    ("use", "write"),
    [
        (bool, "pf.when"),
        (lambda value: 1 if value else 2, "pf.when"),
        (lambda value: value and 1, "pf.when"),
        (list, "pf.expand"),
        (lambda value: operator.itemgetter(0)([*value]), "outputs="),
        (len, "pf.count()"),
    ],
)
def test_python_on_a_lazy_value_names_what_parflow_has_for_it(use: Callable[[Any], Any], write: str) -> None:
    with pytest.raises(LazyValueError) as caught:
        use(MEAN)
    assert write in str(caught.value)


def test_a_lazy_value_can_be_printed_and_copied() -> None:
    assert f"{MEAN}" == "Value<mean>"
    assert repr(copy.copy(MEAN)) == "Value<mean>"


# --- reducers --------------------------------------------------------------------------------------------------------------


class NoMerge(pf.Reducer):
    def initial(self) -> int:
        return 0

    def step(self, state: int, record: int) -> int:
        return state + record


@pytest.mark.parametrize(
    ("reducer", "write"),
    [
        (NoMerge(), "merge"),
        (pf.count, "reduce(pf.count())"),
        (max, "reduce(pf.reducer(initial, step, merge))"),
        (lambda a, b: a + b, "reduce(pf.reducer(initial, step, merge))"),
        ("count", "pf.count()"),
    ],
)
def test_what_is_no_reducer_is_told_what_to_write(reducer: Any, write: str) -> None:
    with pytest.raises(GraphError) as caught:
        pf.items([1]).reduce(reducer)
    assert write in str(caught.value)


def test_a_reducer_of_functions_without_a_merge_is_told_what_one_is() -> None:
    with pytest.raises(GraphError, match=r"merge=lambda a, b: a \+ b"):
        pf.reducer(int, operator.add)

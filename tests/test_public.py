"""What `parflow` shows: its names, its documentation, its errors, and how little it loads."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pickle
import pkgutil
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest

import parflow
from parflow import errors
from parflow.errors import ParflowError

MODULES = [
    module.name
    for module in pkgutil.walk_packages(parflow.__path__, "parflow.")
    if not module.name.endswith("__main__")  # these run when they are imported
]
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ParflowError)]


# --- names -----------------------------------------------------------------------------------------------------------------


def test_the_list_of_names_is_true() -> None:
    missing = [name for name in parflow.__all__ if not hasattr(parflow, name)]
    assert missing == []
    assert len({*parflow.__all__}) == len(parflow.__all__)


def test_nothing_else_is_public() -> None:
    folders = {name.split(".")[1] for name in MODULES}
    public = {name for name in vars(parflow) if not name.startswith("_")}
    assert public - folders - {*parflow.__all__} == set()


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert parflow.__version__ == version("parflow")


@pytest.mark.parametrize("name", parflow.__all__)
def test_a_public_name_is_documented(name: str) -> None:
    thing = getattr(parflow, name)
    text = thing.__doc__ or ""
    assert re.fullmatch(r"\w.*\.", text.splitlines()[0]), "its first line is no sentence"
    if inspect.isfunction(thing):
        assert ">>> " in text, "it has no example"
        if same := re.search(r"Parameters are those of `(\w+)`", text):
            text += getattr(parflow, same[1]).__doc__
        assert [name for name in inspect.signature(thing).parameters if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("name", parflow.__all__)
def test_what_a_public_class_offers_is_documented(name: str) -> None:
    thing = getattr(parflow, name)
    if inspect.isclass(thing) and thing.__module__.startswith("parflow"):
        bare = [
            attribute
            for attribute, value in vars(thing).items()
            if not attribute.startswith("_")
            and (inspect.isfunction(value) or isinstance(value, property))
            and not value.__doc__
        ]
        assert bare == []


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0


def test_examples_are_found() -> None:
    """Were none found, the test above could not fail."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) > 50


# --- errors ----------------------------------------------------------------------------------------------------------------


def arguments(kind: type[ParflowError]) -> tuple[int, ...]:
    """Make as many arguments as the template names."""
    numbers = [int(name) for _, name, _, _ in string.Formatter().parse(kind.template) if name is not None]
    return tuple(range(7, 8 + max(numbers, default=-1)))


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_formats_and_crosses_processes(kind: type[ParflowError]) -> None:
    error = kind(*arguments(kind))
    said = str(error)
    assert "{" not in said
    assert all(str(argument) in said for argument in error.args)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args, str(again)) == (kind, error.args, said)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_with_other_arguments_than_its_own_still_speaks(kind: type[ParflowError]) -> None:
    assert str(kind()) != ""
    assert not arguments(kind) or "what happened" in str(kind("what happened"))


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"(    [ |]*(?:\|-- |`-- )?)([A-Z]\w+Error)\b.*", line)
        if match:
            depth = len(match[1])
            path = [(width, name) for width, name in path if width < depth]
            drawn[match[2]] = path[-1][1] if path else "Exception"
            path.append((depth, match[2]))
    assert drawn == {kind.__name__: kind.__bases__[0].__name__ for kind in ERRORS}


def test_every_error_says_in_its_first_line_what_happened() -> None:
    assert [kind.__name__ for kind in ERRORS if not (kind.__doc__ or "").splitlines()[0].endswith(".")] == []


# --- weight ----------------------------------------------------------------------------------------------------------------


def test_importing_parflow_loads_nothing_heavy() -> None:
    heavy = ["dask", "distributed", "pandas", "pyarrow", "bokeh", "numpy", "fsspec", "rich", "click", "tornado", "cloudpickle"]
    code = f"import sys, parflow; print(*(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

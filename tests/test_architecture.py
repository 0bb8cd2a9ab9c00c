"""The layers of the house, held against what the code imports."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import parflow

HOUSE = Path(parflow.__file__).parent

LAYERS = {
    # layer: the layers that it imports from, besides its own; nothing ever looks further down
    "errors": "",
    "model": "errors",
    "policies": "errors model",
    "nodes": "model policies",
    "core": "errors model policies nodes",
    "storage": "errors model core",
    "runtime": "errors model policies nodes core storage",
    "views": "errors model core",
    "api": "errors model policies nodes core storage runtime views",
    "testing": "errors model nodes core runtime api",
    "cli": "errors model views api",
}

DASK = "dask distributed"
JOURNAL = "parflow.storage.journal sqlite3"
OUTSIDE = (
    f"{DASK} asyncio datetime fsspec io multiprocessing numpy os pandas pathlib psutil pyarrow random secrets selectors shutil "
    "signal socket sqlite3 subprocess sys tempfile threading time urllib uuid"
)

NEVER = {
    # module or layer: what it must never import, itself or in a function
    "errors": OUTSIDE,
    "model": OUTSIDE,
    "policies": OUTSIDE,
    "nodes": OUTSIDE,
    "core": OUTSIDE,
    "storage": DASK,
    "storage.store": JOURNAL,
    "storage.sources": JOURNAL,
    "storage.sinks": JOURNAL,
    "storage.journal": "parflow.core",
    "runtime.pipeline": f"{DASK} {JOURNAL} parflow.runtime.executor threading subprocess",
    "runtime.marker": OUTSIDE,
    "runtime.prints": f"{DASK} {JOURNAL} threading subprocess",
    "runtime.steps": f"{DASK} {JOURNAL} asyncio threading subprocess",
    "runtime.flights": f"{DASK} {JOURNAL} subprocess",
    "runtime.instances": f"{DASK} {JOURNAL} subprocess",
    "runtime.worker": f"{DASK} {JOURNAL} parflow.runtime.executor",
    "runtime.child": f"{DASK} {JOURNAL} parflow.runtime.executor threading",
    "runtime.sandbox": f"{DASK} {JOURNAL} parflow.runtime.executor",
    "runtime.code": DASK,
    "runtime.graph": f"{JOURNAL} parflow.runtime.executor",
    "runtime.cluster": f"{JOURNAL} parflow.core.coordinator parflow.runtime.executor",
    "runtime.executor": f"{DASK} sqlite3",
    "runtime.simulator": f"{DASK} {JOURNAL} threading socket subprocess",
    "views": f"{DASK} parflow.runtime sqlite3",
    "cli": f"{DASK} {JOURNAL}",
}

NAME_DASK = {
    "runtime.cluster",
    "runtime.collection",
    "runtime.graph",
    "api.conversions",
    "api.datasets",
    "api.lazy",
    "api.tasks",
}
"""The modules that know of Dask. All others would run on something else."""


# --- reading imports -------------------------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "parflow"


MODULES = {name_of(path): path for path in sorted(HOUSE.rglob("*.py"))}


def within(name: str, places: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places.split())


def imports(node: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Yield the full names that a tree imports, other than for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import of {child.module}"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports(child, inside_functions=inside_functions)


def imported(module: str, *, inside_functions: bool = True) -> set[str]:
    tree = ast.parse(MODULES[module].read_text())
    return {name for name in imports(tree, inside_functions=inside_functions) if not name.startswith("__future__")}


def own(names: set[str]) -> set[str]:
    """Return which modules of parflow are meant."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "parflow":
            places = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
            found.add(next((place for place in places if place in MODULES), "parflow"))
    return found


def layer(module: str) -> str:
    return module.partition(".")[0]


# --- the tests -------------------------------------------------------------------------------------------------------------


def test_the_table_names_every_layer() -> None:
    assert {layer(module) for module in MODULES} == {*LAYERS, "parflow"}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_imports_from_the_layers_that_the_table_says_and_no_others(name: str) -> None:
    found = {
        layer(target)
        for module in MODULES
        if layer(module) == name
        for target in own(imported(module))
        if target != "parflow" and layer(target) != name
    }
    assert found == {*LAYERS[name].split()}


def test_layers_stand_in_order() -> None:
    order = list(LAYERS)
    for name, above in LAYERS.items():
        assert {*above.split()} <= {*order[: order.index(name)]}, name


def test_the_face_is_asked_for_nothing_but_the_version() -> None:
    asked = {
        name for module in MODULES for name in imported(module) if name.startswith("parflow.") and own({name}) == {"parflow"}
    }
    assert asked == {"parflow.__version__"}


@pytest.mark.parametrize("place", NEVER)
def test_a_module_never_imports_what_the_table_forbids(place: str) -> None:
    modules = [module for module in MODULES if within(module, place)]
    assert modules
    found = {module: {name for name in imported(module) if within(name, NEVER[place])} for module in modules}
    assert {module: names for module, names in found.items() if names} == {}


def test_only_these_modules_know_of_dask() -> None:
    assert {module for module in MODULES if any(within(name, DASK) for name in imported(module))} == NAME_DASK


def test_no_module_needs_itself_to_be_imported() -> None:
    needs = {module: own(imported(module, inside_functions=False)) - {module} for module in MODULES}
    assert [*graphlib.TopologicalSorter(needs).static_order()]  # raises CycleError, which names the circle


def test_no_module_is_longer_than_600_lines() -> None:
    sizes = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: size for module, size in sizes.items() if size > 600} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                size = lines(node) - (lines(node.body[0]) if ast.get_docstring(node, clean=False) is not None else 0)
                if size > 60:
                    long[f"{module}.{node.name}"] = size
    assert long == {}


def lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1

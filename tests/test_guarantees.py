"""Each guarantee names the test that shows it, and that test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [line for line in (ROOT / "docs/guarantees.md").read_text().splitlines() if line.startswith("| ")][1:]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`([^`]+::[^`]+)`", row)})


def test_there_are_guarantees_and_each_names_a_test() -> None:
    assert len(ROWS) > 20
    assert [row for row in ROWS if "::" not in row.split(" | ")[-1]] == []


@pytest.mark.parametrize("name", NAMED)
def test_the_test_that_shows_a_guarantee_is_there(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}

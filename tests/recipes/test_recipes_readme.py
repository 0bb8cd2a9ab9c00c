"""The commands of the recipes' README run as they stand, and print what it shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "recipes/README.md").read_text()
SECTIONS = {
    title: re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for title, text in re.findall(r"^## (\w+\.py): [^\n]+\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
}


def pattern(line: str) -> str:
    """Turn a shown line into a pattern: an ellipsis stands for anything."""
    return ".*".join(map(re.escape, line.split("…")))


def test_every_recipe_has_a_section() -> None:
    helpers = {"fetch_texts.py", "local_postgres.py", "make_logs.py", "make_orders.py", "stub_service.py"}
    assert set(SECTIONS) == {path.name for path in (ROOT / "recipes").glob("*.py")} - helpers


@pytest.mark.parametrize("title", [title for title, blocks in SECTIONS.items() if blocks])
def test_the_commands_print_what_is_shown(title: str, command: Callable[..., str], request: pytest.FixtureRequest) -> None:
    if title == "orders_saga.py":
        request.getfixturevalue("postgres")  # says what is missing, if it is
    (kind, commands), *shown = SECTIONS[title]
    assert kind == "sh"
    printed = []
    for line in commands.splitlines():
        program, *words = shlex.split(line)
        assert program in ("parflow", "python")
        out = command("-m", "parflow.cli", *words) if program == "parflow" else command(*words)
        printed += [out] if out else []
    assert len(printed) == len(shown) > 0
    for (_, block), out in zip(shown, printed, strict=True):
        lines = out.splitlines()
        assert len(block.splitlines()) <= len(lines)
        for wanted, line in zip(block.splitlines(), lines, strict=False):
            assert re.fullmatch(pattern(wanted), line), line

"""What the acceptance tests share: real texts, and a shell."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from .shell import FILES, LINES, Shell

TEXTS = 160


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real texts of very different lengths, which every machine has: the sources of Python's own library, in three folders."""
    folder = tmp_path_factory.mktemp("texts")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:TEXTS]
    assert len(sources) == TEXTS
    for number, source in enumerate(sources):
        place = folder / "abc"[number % 3]
        place.mkdir(exist_ok=True)
        shutil.copyfile(source, place / f"{source.stem}.txt")
    return folder


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """Run parflow's commands in a folder of this test's own; whatever they leave is ended."""
    place = Shell(tmp_path)
    yield place
    place.close()


@pytest.fixture
def words(shell: Shell, tmp_path: Path) -> list[object]:
    """Return the command that runs six files of ten lines, each of which waits for a gate to open."""
    for file in range(FILES):
        path = tmp_path / "in" / f"{file}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{file}-{line}\n" for line in range(LINES)))
    given = ["--source", tmp_path / "in" / "*.txt", "--gate", tmp_path / "gate", "--log", shell.log, "--out", shell.out]
    return shell.flow("gated", *given)

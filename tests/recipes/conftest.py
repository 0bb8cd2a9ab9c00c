"""What the recipes' tests share: the recipes can be imported, and commands run beside them as their README shows."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

Command = Callable[..., str]


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of the small real inputs."""
    return Path(__file__).parent / "data"


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run Python with words behind it in a folder that has the checkout's recipes and tests; returns what it printed."""
    for name in ("recipes", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Run a real PostgreSQL server; where its package is missing its tests are skipped, but not in CI."""
    local: Any = importlib.import_module("local_postgres")
    try:
        importlib.import_module("psycopg")
        local.programs()
    except ModuleNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; the tests of recipes that use PostgreSQL want pip install '.[test]'")
    with local.server() as url:
        yield url


NUMBERS = itertools.count(1)


@pytest.fixture
def database(postgres: str) -> str:
    """Make an empty database, and return its URL."""
    import psycopg

    name = f"shop_{next(NUMBERS)}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return postgres.replace("/postgres?", f"/{name}?")

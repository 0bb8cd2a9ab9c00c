"""What the recipes' tests share: the recipes can be imported, and commands run beside them as their README shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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

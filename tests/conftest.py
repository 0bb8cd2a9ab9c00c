"""What all tests share: a home of their own, and a clean end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# In CI the same examples every time: a change is judged by itself. Elsewhere chance goes on looking.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("chance", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "chance")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep each test's journal and results in its own folder."""
    place = tmp_path / "home"
    monkeypatch.setenv("PARFLOW_HOME", str(place))
    return place


@pytest.fixture(scope="session", autouse=True)
def session() -> Iterator[None]:
    """End the shared local cluster when the tests have ended."""
    yield
    from parflow.runtime.session import SESSIONS

    SESSIONS.close()

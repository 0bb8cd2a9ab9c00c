"""What was done outside is done once, whoever dies when."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parflow.errors import EffectInDoubtError, InDoubt, StoreError, UndoFailedError, UsageError
from parflow.runtime.once import What, undo
from parflow.storage.effects import Effect, Effects, standing
from parflow.storage.store import LocalStore, open_store

VICTIM = Path(__file__).with_name("victim.py")
NAME = "ab/cd/step-1"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


@pytest.fixture
def effects(store: LocalStore) -> Effects:
    return Effects(store)


def wanted(effects: Effects, name: str = NAME, **known: Any) -> What:
    return What(effects, "key", Effect(name, name="charge", number=1, **known))


def raising(error: BaseException) -> Any:
    def call(*_: Any) -> Any:
        raise error

    return call


# --- one process -------------------------------------------------------------------------------------------------------------


def test_what_was_done_is_not_done_again_and_gives_what_it_gave(effects: Effects) -> None:
    assert wanted(effects).run(lambda: {"paid": 7}) == {"paid": 7}
    assert wanted(effects).run(raising(AssertionError("it was called again"))) == {"paid": 7}


def test_what_raised_was_not_done_and_is_done_by_the_next_attempt(effects: Effects) -> None:
    with pytest.raises(ConnectionError, match="refused"):
        wanted(effects).run(raising(ConnectionError("refused")))
    assert (effects.look(NAME).state, effects.look(NAME).reason) == ("released", "ConnectionError: refused")
    assert wanted(effects).run(lambda: "paid") == "paid"


@pytest.mark.parametrize("error", [InDoubt("no answer"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_a_function_that_does_not_know_or_was_ended_leaves_the_effect_in_doubt(effects: Effects, error: BaseException) -> None:
    with pytest.raises(EffectInDoubtError if isinstance(error, InDoubt) else type(error)):
        wanted(effects).run(raising(error))
    with pytest.raises(
        EffectInDoubtError, match=r"'charge' may have been done or not: .*(no answer|Interrupt|SystemExit).* key"
    ):
        wanted(effects).run(lambda: "never")
    assert wanted(effects, in_doubt="retry").run(lambda: "paid") == "paid"


def test_a_result_that_cannot_be_kept_leaves_the_effect_in_doubt(effects: Effects) -> None:
    with pytest.raises(EffectInDoubtError, match="it was done, but what it returned can't be pickled"):
        wanted(effects).run(threading.Lock)


def test_an_effect_within_its_own_function_is_refused_rather_than_waited_for(effects: Effects) -> None:
    with pytest.raises(UsageError, match="would wait for itself"):
        wanted(effects).run(lambda: wanted(effects).run(lambda: 1))


def test_another_owner_that_is_alive_is_waited_for(effects: Effects) -> None:
    begun, go = threading.Event(), threading.Event()
    got: list[str] = []

    def slow() -> str:
        begun.set()
        assert go.wait(60)
        return "first"

    one = threading.Thread(target=lambda: got.append(wanted(effects).run(slow)))
    one.start()
    assert begun.wait(60)
    assert effects.try_hold(NAME) is None
    assert effects.busy(NAME)
    two = threading.Thread(target=lambda: got.append(wanted(effects).run(lambda: "second")))
    two.start()
    go.set()
    one.join()
    two.join()
    assert got == ["first", "first"]


def test_what_is_undone_is_undone_once_and_may_be_done_anew_under_another_key(effects: Effects) -> None:
    undone: list[str] = []
    keys = []
    for number in range(3):
        assert wanted(effects).run(lambda number=number: f"receipt {number}") == f"receipt {number}"  # type: ignore[misc]
        keys.append(effects.look(NAME).key)
        assert undo(effects, NAME, undone.append) is None
        assert undo(effects, NAME, undone.append) is None
    assert undone == ["receipt 0", "receipt 1", "receipt 2"]
    assert keys[0] == "key"
    assert len({*keys}) == 3


def test_an_undo_that_raises_is_tried_three_times_and_then_what_was_done_stands(effects: Effects, store: LocalStore) -> None:
    wanted(effects).run(lambda: "paid")
    tried: list[str] = []

    def refuse(result: str) -> None:
        tried.append(result)
        raise ConnectionError("no refunds")

    why = undo(effects, NAME, refuse)
    assert isinstance(why, UndoFailedError)
    assert "'charge' was done and stands" in str(why)
    assert "tried 3 times, at last: ConnectionError: no refunds" in str(why)
    assert tried == ["paid"] * 3
    assert [effect.state for effect in standing(store)] == ["undo failed"]
    assert wanted(effects).run(lambda: "again") == "paid"  # it's done, after all
    assert undo(effects, NAME, tried.append) is None
    assert effects.look(NAME).state == "undone"


def test_an_undo_that_does_not_know_is_not_tried_again(effects: Effects) -> None:
    wanted(effects).run(lambda: "paid")
    assert isinstance(undo(effects, NAME, raising(InDoubt("hm"))), EffectInDoubtError)
    assert isinstance(undo(effects, NAME, raising(AssertionError())), EffectInDoubtError)
    with pytest.raises(EffectInDoubtError, match="hm"):
        wanted(effects).run(lambda: "again")


def test_there_is_nothing_to_undo_of_what_was_not_done(effects: Effects) -> None:
    assert undo(effects, NAME, raising(AssertionError())) is None
    with pytest.raises(ValueError, match="x"):
        wanted(effects).run(raising(ValueError("x")))
    assert undo(effects, NAME, raising(AssertionError())) is None


def test_standing_names_what_can_be_undone_and_what_is_in_doubt_the_newest_first(effects: Effects, store: LocalStore) -> None:
    for name in ("a", "b", "c", "undone"):
        wanted(effects, f"{name}/{name}/step-1").run(lambda: 1)
    undo(effects, "undone/undone/step-1", bool)
    What(effects, "key", Effect("d/d/once")).run(lambda: 1)  # nobody's to undo
    for error in (InDoubt(), ValueError()):
        with pytest.raises((EffectInDoubtError, ValueError)):
            wanted(effects, f"{type(error).__name__}/e/step-1").run(raising(error))
    with effects.hold("alive/a/step-1") as held:
        held.write("claimed")
        assert [(effect.id[:1], effect.state) for effect in standing(store)] == [
            ("I", "doubt"),
            ("c", "done"),
            ("b", "done"),
            ("a", "done"),
        ]
    assert next(iter(standing(store))).id == "alive/a/step-1"  # its owner is gone


def test_a_store_that_is_no_folder_is_refused() -> None:
    with pytest.raises(StoreError, match=r"need a store in a folder that every worker shares, and 'memory://x' is none"):
        Effects(open_store("memory://x"))


# --- files -----------------------------------------------------------------------------------------------------------------


def lines_of(effects: Effects) -> tuple[Path, bytes]:
    path = Path(effects.folder, NAME)
    return path, path.read_bytes()


def test_a_torn_last_line_was_never_written_wherever_it_is_torn(effects: Effects) -> None:
    wanted(effects).run(lambda: "paid")
    path, whole = lines_of(effects)
    claimed = whole.index(b"\n") + 1
    for end in range(len(whole)):
        for tail in (b"", b"\0" * 7, b"\0\n", b"garbage\n"):
            path.write_bytes(whole[:end] + tail)
            assert effects.look(NAME).state == ("free" if end < claimed else "claimed")
    path.write_bytes(whole[:-9] + b"\0\0\n")
    assert wanted(effects, in_doubt="retry").run(lambda: "again") == "again"
    assert wanted(effects).run(lambda: "never") == "again"


def test_a_file_that_is_damaged_before_its_end_is_refused(effects: Effects) -> None:
    wanted(effects).run(lambda: "paid")
    path, whole = lines_of(effects)
    path.write_bytes(whole.replace(b"claimed", b"released", 1))
    with pytest.raises(StoreError, match="damaged at byte 0"):
        wanted(effects).run(lambda: "again")


def test_what_is_kept_is_for_its_owner_alone(effects: Effects) -> None:
    wanted(effects).run(lambda: "paid")
    path, _ = lines_of(effects)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


# --- processes that are killed ------------------------------------------------------------------------------------------------


class Victims:
    """Processes that act on one effect, one after the other."""

    def __init__(self) -> None:
        self.server = subprocess.Popen([sys.executable, VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def act(self, folder: Path, do: str = "once", point: int = 0, in_doubt: str = "stop") -> str | int:
        """Have a process act; returns what it said, or -9."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({"do": do, "folder": str(folder), "in_doubt": in_doubt, "point": point}) + "\n")
        self.server.stdin.flush()
        said: str | int = json.loads(self.server.stdout.readline())
        assert said != 1, "it failed, and said why above"
        return said

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    made = Victims()
    yield made
    made.close()


def outside(folder: Path) -> list[str]:
    """Return what was done outside."""
    file = folder / "outside"
    return file.read_text().splitlines() if file.exists() else []


def state(folder: Path) -> Effect:
    return Effects(open_store(str(folder / "store"))).look(NAME)


def points(victims: Victims, place: Path, do: str, in_doubt: str) -> Iterator[Path]:
    """Yield a folder for each point at which a process can be killed, once it was."""
    for point in range(1, 1000):
        folder = place / f"{do}-{in_doubt}-{point}"
        folder.mkdir()
        if do == "undo":
            assert victims.act(folder) == "do"
        if victims.act(folder, do, point, in_doubt) != -9:
            assert point > 20
            return
        yield folder
    raise AssertionError("it never came to its end")


def test_killed_at_any_point_it_is_not_done_or_in_doubt_or_done_but_never_done_twice(victims: Victims, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for folder in points(victims, tmp_path, "once", "stop"):
        before = outside(folder)
        said = str(victims.act(folder))
        seen[said[:8]] += 1
        if said == "do":  # it was not claimed yet, or it was done
            assert outside(folder) == ["do key"]
        else:
            assert "in doubt: 'charge' may have been done or not: it had begun when its process (" in said
            assert "key key at the service" in said
            assert outside(folder) == before
            assert state(folder).state == "claimed"
        if before and state(folder).state != "done":
            assert said.startswith("in doubt")
    assert seen["do"] > 5
    assert seen["in doubt"] > 5


def test_killed_at_any_point_it_is_done_in_the_end_where_twice_does_no_harm(victims: Victims, tmp_path: Path) -> None:
    for folder in points(victims, tmp_path, "once", "retry"):
        before = outside(folder)
        done = state(folder).state == "done"
        assert victims.act(folder, in_doubt="retry") == "do"
        assert outside(folder) == (before if done else [*before, "do key"])  # the same key both times


def test_killed_at_any_point_of_its_undoing_it_is_undone_or_in_doubt_but_never_undone_twice(
    victims: Victims, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()
    for folder in points(victims, tmp_path, "undo", "stop"):
        before = outside(folder)
        said = str(victims.act(folder, "undo"))
        seen[said[:8]] += 1
        undone = [line for line in outside(folder) if line.startswith("undo of do")]
        if said == "undone":
            assert len(undone) == 1
        else:
            assert "its undoing had begun when its process" in said
            assert outside(folder) == before
            assert str(victims.act(folder)).startswith("in doubt")
    assert seen["undone"] > 5
    assert seen["'charge'"] > 5


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["once", "undo"]), st.integers(0, 60)), max_size=6))
def test_whoever_dies_when_each_generation_is_done_once_at_most_and_undone_once_at_most(
    victims: Victims, acts: list[tuple[str, int]]
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for do, point in acts:
            victims.act(folder, do, point)
        done = outside(folder)
        assert len({*done}) == len(done)
        generations = [line for line in done if line.startswith("do ")]
        assert [line.split()[0] for line in done] == [("do", "undo")[number % 2] for number in range(len(done))]
        now = state(folder)
        assert now.generation in (max(0, len(generations) - 1), len(generations))
        if now.state == "done":
            assert pickle.loads(now.result) == "do"
            assert done[-1].startswith("do ")
        if now.state == "undone":
            assert done[-1].startswith("undo ")


def test_the_lock_of_an_owner_is_let_go_by_nothing_but_its_end(tmp_path: Path) -> None:
    """A claim whose owner lives is nobody else's, however long it takes; the kernel lets go when it's killed."""
    code = (
        "import sys; from parflow.storage.effects import Effects; from parflow.storage.store import open_store\n"
        f"held = Effects(open_store({str(tmp_path / 'store')!r})).hold({NAME!r}); held.write('claimed', name='charge')\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdin is not None
    assert owner.stdout.readline() == "held\n"
    effects = Effects(open_store(str(tmp_path / "store")))
    assert effects.try_hold(NAME) is None
    assert [*standing(open_store(str(tmp_path / "store")))] == []
    os.kill(owner.pid, 9)
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()
    with pytest.raises(EffectInDoubtError, match="when its process"):
        wanted(effects).run(lambda: "never")

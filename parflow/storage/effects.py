"""What was done outside, once: a small file for each effect, whose lock its owner holds from the claim until it is done.

An effect is something that a restart can't take back: a payment, a mail. Its file is only added to, a line for each state,
and every line is on disk before the next act. The last line that is whole says how the effect stands; one that was torn by a
power cut was never written. An owner that dies lets go of the lock, whatever ends it: so a claim whose lock is free belonged
to somebody who could not say any more whether it happened. It is *in doubt*.

::

    free ─▶ claimed ─▶ done ─▶ undoing ─▶ undone ─▶ claimed (the next generation) …
              │  ▲               │   ▲
              ▼  │               ▼   │
           released           undo failed            claimed, undoing and doubt, when the lock is free: in doubt
"""

from __future__ import annotations

import fcntl
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from parflow.errors import StoreError
from parflow.model import dump_json, from_json, load_json, to_json
from parflow.storage.store import LocalStore, Store
from parflow.storage.trust import make_folder, sync_folder

State = Literal["free", "claimed", "released", "doubt", "done", "undoing", "undone", "undo failed"]
FOLDER = "effects"
AGAIN = 0.02
"""Seconds between two looks at an effect that somebody else has in hand."""


@dataclass(frozen=True, slots=True)
class Effect:
    """How an effect stands.

    id
        Names it in its store.
    at
        When it was claimed or done (seconds since 1970).
    generation
        How often it was undone before, and is done anew.
    name, record, step
        What it is, and of which record and step, for a person.
    key
        The idempotency key under which the service knows it.
    unit, number
        Whose code undoes it: the stage's, or (``~``) the task's of a call; and the number of the step there. 0: nobody's.
    reason
        Why it stands so: the error that released it, or leaves it in doubt.
    result
        What it returned, pickled, while it is done.
    in_doubt
        What is to become of it when its owner dies.
    """

    id: str
    state: State = "free"
    at: float = 0.0
    generation: int = 0
    name: str = ""
    key: str = ""
    record: str = ""
    step: str = ""
    unit: int = 0
    number: int = 0
    owner: str = ""
    reason: str = ""
    result: bytes = b""
    in_doubt: str = "stop"

    @property
    def doubtful(self) -> bool:
        """Whether it is in doubt, unless its owner is alive."""
        return self.state in ("claimed", "undoing", "doubt")

    @property
    def stands(self) -> bool:
        """Whether it is done, and was not undone."""
        return self.state in ("done", "undo failed")


class Effects:
    """The effects of a run, in its store's folder.

    Parameters
    ----------
    store : Store
        The run's store; in a folder that every worker shares, since locks need one.

    Raises
    ------
    StoreError
        When the store is no folder.

    Examples
    --------
    >>> import tempfile
    >>> from parflow.storage.store import open_store
    >>> effects = Effects(open_store(tempfile.mkdtemp()))
    >>> with effects.hold("mail/anna") as held:
    ...     held.write("claimed", name="mail")
    ...     held.write("done", result=b"sent")
    >>> effects.look("mail/anna").state, effects.look("mail/bob").state
    ('done', 'free')
    """

    def __init__(self, store: Store) -> None:
        if not isinstance(store, LocalStore):
            raise StoreError(
                f"effects that happen once need a store in a folder that every worker shares, and {store.url!r} is none: only "
                "there a claim is let go when its owner dies. Give store='/shared/dir', or leave store= out."
            )
        self.folder = f"{store.url}/{FOLDER}"

    def hold(self, name: str) -> Held:
        """Take an effect's lock; while somebody else has it, wait."""
        held = self._locked(name, fcntl.LOCK_EX)
        assert held is not None
        return held

    def try_hold(self, name: str, patience: float = 0.0) -> Held | None:
        """Take an effect's lock; None when somebody else has it, for so many seconds."""
        until = time.monotonic() + patience
        while (held := self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None and time.monotonic() < until:
            time.sleep(AGAIN)
        return held

    def _locked(self, name: str, how: int) -> Held | None:
        held = self._open(name)
        try:
            fcntl.flock(held.file, how)
            held.read()
        except BlockingIOError:
            held.close()
            return None
        except BaseException:
            held.close()
            raise
        return held

    def look(self, name: str) -> Effect:
        """Return how an effect stands, whoever has its lock."""
        try:
            with open(self._path(name), "rb") as file:
                return _parsed(name, file.read())[0]
        except FileNotFoundError:
            return Effect(name)

    def of(self, record: str) -> Iterator[Effect]:
        """Yield the effects of a record, in no order."""
        try:
            names = sorted(os.listdir(self._path(record)))
        except FileNotFoundError:
            return
        for name in names:
            yield self.look(f"{record}/{name}")

    def all(self) -> Iterator[Effect]:
        """Yield all effects, in no order."""
        for folder, _, names in os.walk(self.folder):
            for name in names:
                yield self.look(os.path.relpath(f"{folder}/{name}", self.folder))

    def busy(self, name: str) -> bool:
        """Tell whether an effect's owner is alive."""
        with open(self._path(name), "rb") as file:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _open(self, name: str) -> Held:
        path = self._path(name)
        folder = os.path.dirname(path)
        try:
            make_folder(folder)
            return Held(name, folder, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as cause:
            raise StoreError(f"can't open the effect {path!r}: {cause.strerror}. Check its folder's permissions.") from cause


class Held:
    """An effect whose lock is held: nobody else acts on it. Leaving a ``with`` lets go."""

    def __init__(self, name: str, folder: str, file: int) -> None:
        self.effect = Effect(name)
        self.folder = folder
        self.file = file
        self.end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go."""
        if self.file >= 0:
            file, self.file = self.file, -1
            os.close(file)

    def read(self) -> None:
        """Read how the effect stands."""
        data = b""
        while block := os.pread(self.file, 1 << 20, len(data)):
            data += block
        self.effect, self.end = _parsed(self.effect.id, data)

    def write(self, state: State, **changes: Any) -> None:
        """Say how the effect stands now; returns once that would outlast a power cut.

        Raises
        ------
        StoreError
            When it can't be written: then the effect stands as before.
        """
        at = self.effect.at if state in ("undoing", "undone", "undo failed") else time.time()
        changed = replace(self.effect, state=state, at=at, owner=f"{os.uname().nodename}:{os.getpid()}", **changes)
        line = _line(changed)
        try:
            os.ftruncate(self.file, self.end)  # what was torn before
            written = 0
            while written < len(line):
                written += os.pwrite(self.file, line[written:], self.end + written)
            os.fsync(self.file)
            if self.end == 0:
                sync_folder(self.folder)
        except OSError as cause:
            what = f"can't write that the effect {changed.name or changed.id!r} is {state}: {cause.strerror}"
            raise StoreError(f"{what}. Check the free space of {self.folder}.") from cause
        self.effect, self.end = changed, self.end + len(line)


def _line(effect: Effect) -> bytes:
    body = dump_json(to_json(effect))
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _parsed(name: str, data: bytes) -> tuple[Effect, int]:
    """Return what the last whole line says, and where it ends; a torn one behind it was never written."""
    effect, end, torn = Effect(name), 0, False
    at = 0
    while (stop := data.find(b"\n", at)) >= 0:
        line = data[at:stop]
        body = line[9:]
        if line[:9] != b"%08x " % zlib.crc32(body):
            torn = True
        elif torn:
            raise StoreError(
                f"the file of effect {name!r} is damaged at byte {end}: look by hand what was done, and remove the file."
            )
        else:
            effect, end = from_json(Effect, load_json(body)), stop + 1
        at = stop + 1
    return effect, end


def standing(store: Store) -> Iterator[Effect]:
    """Yield what is done outside and could be undone, and what is in doubt, the newest first.

    Parameters
    ----------
    store : Store
        The run's store.

    Yields
    ------
    Effect
        In the state ``done`` or ``undo failed``, if its ``unit`` can undo it (its ``number`` is not 0); or ``doubtful``. What
        somebody works on right now is left out.

    Raises
    ------
    StoreError
        When the store is no folder.

    Examples
    --------
    >>> import tempfile
    >>> from parflow.storage.store import open_store
    >>> store = open_store(tempfile.mkdtemp())
    >>> [*standing(store)]
    []
    """
    effects = Effects(store)
    found = [effect for effect in effects.all() if (effect.stands and effect.number) or effect.doubtful]
    for effect in sorted(found, key=lambda effect: effect.at, reverse=True):
        if not effect.doubtful or not effects.busy(effect.id):
            yield effect

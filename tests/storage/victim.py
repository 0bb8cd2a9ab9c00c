"""A process that forks others, has them do or undo an effect, and kills each at a given point of it.

It has one thread, so a fork costs a millisecond. A message is a line of JSON: what to ``do`` ("once" or "undo"), in which
``folder``, ``in_doubt`` which way, and the ``point`` at which to die (0: not at all). The answer is how it ended: -9, or what
it said.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from parflow.errors import EffectInDoubtError
from parflow.runtime.here import INSIDE
from parflow.runtime.once import What, undo
from parflow.storage.effects import Effect, Effects
from parflow.storage.store import open_store

NAME = "ab/cd/step-1"
left = 0


def point() -> None:
    """Come to a point at which a process may die."""
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def around(real: Callable[..., Any]) -> Callable[..., Any]:
    """Make points before and after a system call."""

    def call(*args: Any) -> Any:
        point()
        made = real(*args)
        point()
        return made

    return call


def half_and_whole(real: Callable[..., int]) -> Callable[..., int]:
    """Make a point also where half of the bytes are written."""

    def call(file: int, data: bytes, offset: int) -> int:
        point()
        real(file, data[: len(data) // 2], offset)
        point()
        made = real(file, data, offset)
        point()
        return made

    return call


def outside(folder: str, what: str) -> str:
    """Do what can't be taken back: add a line to a file."""
    point()
    inside = INSIDE.get()
    assert inside is not None
    with open(f"{folder}/outside", "a") as file:
        file.write(f"{what} {inside.key}\n")
    point()
    return what


def act(do: str, folder: str, in_doubt: str) -> str:
    effects = Effects(open_store(f"{folder}/store"))
    if do == "undo":
        return str(undo(effects, NAME, lambda result: outside(folder, f"undo of {result}")) or "undone")
    try:
        return str(
            What(effects, "key", Effect(NAME, name="charge", number=1, in_doubt=in_doubt)).run(lambda: outside(folder, "do"))
        )
    except EffectInDoubtError as error:
        return f"in doubt: {error}"


def one(message: dict[str, Any]) -> None:
    """Be the process that acts, and perhaps dies of it."""
    global left
    left = message.pop("point")
    for module, name in ((os, "fsync"), (os, "ftruncate"), (os, "open"), (os, "close"), (fcntl, "flock")):
        setattr(module, name, around(getattr(module, name)))
    os.pwrite = half_and_whole(os.pwrite)
    said = act(**message)
    left = 0
    print(json.dumps(said), flush=True)


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                one(json.loads(line))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            print(json.dumps(code), flush=True)


if __name__ == "__main__":
    main()

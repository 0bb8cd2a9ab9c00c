"""What records print: each one's end, for its dead letter. While nothing is printed it costs nothing.

A child's standard output and error are one file, which only grows. Whatever Python writes there passes through here and is held
against the record in hand; two words of the marker say whose output the file ends with, and where it begins, so that the
supervisor finds what a record printed that ended its child.
"""

from __future__ import annotations

import io
import os
import sys
from collections import OrderedDict
from typing import Any

from parflow.runtime.marker import ORDINAL, SINCE, SPOKE, Marker

LIMIT = 2000
"""What a dead letter has of its record's output, at the most (characters)."""
RECORDS = 256
"""Of how many records the output is remembered, those that printed last."""
TRACE = 4000
"""What is kept of a traceback (characters)."""

_BYTES = 4 * LIMIT
_FATAL = "Fatal Python error: "
"""How faulthandler begins what it writes as a process dies."""


class Prints:
    """What the records of this process printed.

    Examples
    --------
    >>> Prints().of(0)
    ''
    """

    def __init__(self) -> None:
        self.marker: Marker | None = None
        self.ends: OrderedDict[int, bytes] = OrderedDict()

    def listen(self) -> None:
        """Replace ``sys.stdout`` and ``sys.stderr``, before anything that keeps one, such as a logging handler, is made."""
        form: Any = {"encoding": "utf-8", "errors": "backslashreplace", "write_through": True}
        sys.stdout, sys.stderr = (io.TextIOWrapper(_Stream(self, fd), **form) for fd in (1, 2))

    def begin(self) -> None:
        """Begin a job: what was printed before is none of its records'."""
        self.ends.clear()
        if self.marker is not None:
            self.marker[SPOKE], self.marker[SINCE] = 0, os.fstat(1).st_size

    def note(self, data: Any) -> None:
        """Hold what is about to be written against the record in hand."""
        marker = self.marker
        if marker is None:
            return
        ordinal = marker[ORDINAL]
        self.ends[ordinal] = (self.ends.pop(ordinal, b"") + bytes(memoryview(data).cast("B")[-_BYTES:]))[-_BYTES:]
        if len(self.ends) > RECORDS:
            self.ends.popitem(last=False)
        if marker[SPOKE] != ordinal + 1:
            marker[SPOKE], marker[SINCE] = ordinal + 1, os.fstat(1).st_size

    def of(self, ordinal: int) -> str:
        """Return the end of what a record printed."""
        return self.ends.get(ordinal, b"").decode("utf-8", "replace")[-LIMIT:]


class _Stream(io.FileIO):
    """A file descriptor whose writers are noted."""

    def __init__(self, prints: Prints, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.prints = prints

    def write(self, data: Any, /) -> int:
        self.prints.note(data)
        return super().write(data)


PRINTS = Prints()


def left_behind(log: int, marker: Any, *, alone: bool) -> tuple[str, str]:
    """Return what the record in hand printed, and the interpreter's last words, as a child that died left them in its file.

    What a record that ran ``alone`` printed is all that is there since its job began, C libraries' messages too.
    """
    end = os.fstat(log).st_size
    since = marker[SINCE] if marker[SINCE] <= end else 0  # the supervisor threw away what a flood began with
    own = alone or marker[SPOKE] == marker[ORDINAL] + 1
    start = max(since, end - (1 << 16))
    printed, fatal, trace = os.pread(log, end - start, start).decode("utf-8", "replace").rpartition(_FATAL)
    if not fatal:
        printed, trace = trace, ""
    return printed[-LIMIT:] if own else "", (fatal + trace)[:TRACE]

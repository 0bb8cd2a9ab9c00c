"""Dead letters: found in a run's state, chosen, and shown as a table, as lines for a terminal, or as CSV."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import parflow.errors
from parflow.core.history import RunState
from parflow.core.state import StageState
from parflow.errors import UsageError
from parflow.model import Failure, Ref
from parflow.views.numbers import causes
from parflow.views.words import counted, letter_name, one_line, printable

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    "record", "source", "step", "cause", "error", "message", "attempts", "preview", "output", "traceback", "chunk", "ordinal",
    "stage",
)  # fmt: skip
"""What a table of dead letters has."""
NUMBERS = {"attempts": "int64", "chunk": "Int64", "ordinal": "Int64", "stage": "Int64"}
CAUSES = 20
"""How many causes a terminal is shown at the most."""


class Letter(NamedTuple):
    """A dead letter, the number of its stage (-1: it's a call), and the path of the input that it came from."""

    failure: Failure
    stage: int = -1
    source: str = ""

    def row(self) -> dict[str, Any]:
        """Return all there is to know of it; what doesn't apply is None."""
        known = asdict(self.failure) | {"source": self.source, "stage": self.stage}
        for name in ("chunk", "ordinal", "part", "offset", "stage"):
            known[name] = known[name] if known[name] >= 0 else None
        return known


# --- finding and choosing -------------------------------------------------------------------------------------------------


def find_letters(state: RunState, read: Callable[[Ref], Iterable[Failure]]) -> Iterator[Letter]:
    """Yield what failed so far: of each stage, in input order, unusable inputs and then records; calls; what stands undone.

    ``read`` opens the list of dead letters that a piece left.
    """
    for number, stage in enumerate(state.stages):
        for rejected in stage.rejected:
            bases = _bases(rejected.error)
            failure = Failure(rejected.path, "read", "input", rejected.error, rejected.message, bases)
            yield Letter(failure, number, rejected.path)
        failures = list(stage.lost)
        for first, receipt in stage.pieces():
            if receipt.failures is not None:
                failures += (failure for failure in read(receipt.failures) if stage.stands(first, failure))
        for failure in sorted(failures, key=lambda failure: (failure.chunk, failure.ordinal)):
            yield Letter(failure, number, _source(stage, failure))
    for call in state.calls:
        if call.failure is not None:
            yield Letter(call.failure)
    for failure in state.stuck:
        yield Letter(failure)


def _bases(error: str) -> tuple[str, ...]:
    kind = getattr(parflow.errors, error, None)
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__[:-1]) if isinstance(kind, type) else ()


def _source(stage: StageState, failure: Failure) -> str:
    parts = stage.chunks[failure.chunk].chunk.parts if 0 <= failure.chunk < len(stage.chunks) else ()
    return parts[failure.part].path if 0 <= failure.part < len(parts) else ""


def choose(
    letters: Iterable[Letter],
    step: str | None = None,
    error: str | type | None = None,
    source: str | os.PathLike[str] | None = None,
) -> list[Letter]:
    """Return the dead letters of a step, of an exception or classes derived from it, and of inputs.

    Parameters
    ----------
    letters : iterable of Letter
        All of them.
    step : str, optional
        The name of a step or task.
    error : str or exception class, optional
        A class, its name or qualified name. Base classes match as well: ``"OSError"`` finds a ``FileNotFoundError``.
    source : path-like, optional
        An input's path, or a pattern with ``*`` and ``**``; without a folder it's held against file names.

    Raises
    ------
    UsageError
        When ``error`` is no class and no name.

    Examples
    --------
    >>> bases = ("builtins.KeyError", "builtins.LookupError")
    >>> letters = [Letter(Failure("a.txt#3", "parse", "exception", "KeyError", "x", bases))]
    >>> len(choose(letters, error="LookupError")), len(choose(letters, step="read"))
    (1, 0)
    """
    if isinstance(error, type):
        error = f"{error.__module__}.{error.__qualname__}"
    if error is not None and not isinstance(error, str):
        raise UsageError(f"error={error!r} is no exception class and no name of one")
    return [
        letter
        for letter in letters
        if (step is None or letter.failure.step == step)
        and (error is None or _is_a(letter.failure, error))
        and (source is None or _is_from(letter.source, os.fspath(source)))
    ]


def _is_a(failure: Failure, error: str) -> bool:
    return any(base == error or base.endswith(f".{error}") for base in failure.bases or (failure.error,))


def _is_from(path: str, pattern: str) -> bool:
    if path in (pattern, os.path.abspath(pattern)):
        return True
    if "/" not in pattern:
        return fnmatchcase(os.path.basename(path), pattern)
    return any(fnmatchcase(path, way.replace("**/", "*")) for way in (pattern, os.path.abspath(pattern)))


# --- showing --------------------------------------------------------------------------------------------------------------


def frame(letters: Iterable[Letter]) -> DataFrame:
    """Return dead letters as a table of pandas; an empty one has its columns, too."""
    import pandas as pd

    rows = [letter.row() for letter in letters]
    text: Any = pd.StringDtype("python")  # holds what isn't Unicode, which Arrow's doesn't
    return pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=NUMBERS.get(name, text)) for name in COLUMNS})


def as_csv(letters: Iterable[Letter]) -> str:
    r"""Write dead letters as CSV, a row each under a row of names.

    Cells are what they are, formulas too: a quote before them would change what programs read. A spreadsheet is to import the
    columns as text.

    >>> as_csv([]).startswith("record,source,step,")
    True
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(letter.row() for letter in letters)
    return file.getvalue()


def told(run_id: str, letters: Sequence[Letter], *, limit: int, details: bool) -> Iterator[str]:
    """Tell of dead letters, line by line: what they have in common, if anything, and then up to ``limit`` of them."""
    groups = causes(letter.failure for letter in letters)
    yield f"{counted(len(letters), 'dead letter')} of run {run_id}"
    if len(groups) < len(letters):
        yield ""
        for first, count in groups[:CAUSES]:
            yield printable(f"  {count:,} × {first.step}: {first.error}: {one_line(first.message)}")
            more = f"; all: {_asked(run_id, first)}" if count > 1 else ""
            yield f"      {'for example ' if count > 1 else ''}{letter_name(first)}{more}"
        if len(groups) > CAUSES:
            yield f"  … and {counted(len(groups) - CAUSES, 'more cause')}"
    yield ""
    for letter in letters[:limit]:
        yield from _lines(letter.failure, details=details)
    if len(letters) > limit:
        yield f"… and {len(letters) - limit:,} more: --limit {len(letters)} shows them, --csv and --json print them all"
    if not details:
        yield f"what they printed, and their tracebacks: parflow failures {run_id} --traceback"


def _asked(run_id: str, failure: Failure) -> str:
    """Return the command that lists the dead letters that are like one."""
    return f"parflow failures {run_id} --step {_quoted(failure.step)} --error {_quoted(failure.error)}"


def _quoted(word: str) -> str:
    return shlex.quote(printable(word))


def _lines(failure: Failure, *, details: bool) -> Iterator[str]:
    first, *more = re.split(r"\r?\n", failure.message)
    tries = f"  ({failure.attempts} attempts)" if failure.attempts > 1 else ""
    yield printable(f"{letter_name(failure)}  {failure.step}  {failure.cause}: {failure.error}: {first}{tries}")
    yield from _block("", "\n".join(more))
    if details:
        yield from _block("preview", failure.preview if failure.record else "")
        yield from _block("earlier attempts", "\n".join(failure.earlier))
        yield from _block("output", failure.output)
        yield from _block("traceback", failure.traceback)


def _block(title: str, text: str) -> Iterator[str]:
    if text:
        yield from [f"  {title}:"] if title else []
        yield from (f"    {printable(line.expandtabs())}".rstrip() for line in re.split(r"\r?\n", text.rstrip()))

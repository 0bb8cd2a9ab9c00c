"""Steps, compiled into nested closures that push each record on: the path of a record is a few calls and no allocation.

A step that keeps records for a while (a batch, calls in flight) keeps their places with them, and takes each in hand again
when it goes on: what fails later, or ends the child, is still held against the right record.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from parflow.core.forms import Batch, Batched
from parflow.core.plan import Step
from parflow.errors import RecordTimeoutError
from parflow.runtime.attempts import Attempts
from parflow.runtime.marker import ARMED, CALL, GUESS, HELD, KEPT, STEP, Late, Marker, Place, put, take
from parflow.runtime.places import Places

Push = Callable[[Any], None]
PushMany = Callable[[list[Any]], None]
PushTable = Callable[[Any, Sequence[Place]], None]
Fail = Callable[..., None]
"""Called with the step's number, the error and the record; and with the cause, unless it's an exception."""


class Door(NamedTuple):
    """Where records go in: one, many of the one in hand, or the rows of an Arrow table with the place of each.

    ``whole`` tells that tables stay what they are.
    """

    push: Push
    many: PushMany
    table: PushTable
    whole: bool = False


class Keeps(Protocol):
    """A step that keeps records for a while."""

    def flush(self) -> None:
        """Push on everything that is kept, in order."""

    def abort(self) -> None:
        """Give up what is kept."""


def door(marker: Marker, push: Push, many: PushMany | None = None, table: PushTable | None = None) -> Door:
    """Make a door that takes records one by one, unless it's told how to take more."""

    def push_each(records: list[Any]) -> None:
        for record in records:
            push(record)

    def push_rows(rows: Any, places: Sequence[Place]) -> None:
        here = take(marker)
        for place, record in zip(places, rows.to_pylist(), strict=True):
            put(marker, place)
            push(record)
        put(marker, here)

    return Door(push, many or push_each, table or push_rows, table is not None)


def fan_out(marker: Marker, doors: list[Door]) -> Door:
    """Make one door of several."""
    if len(doors) == 1:
        return doors[0]

    def push_all(record: Any) -> None:
        for one in doors:
            one.push(record)

    def table_all(rows: Any, places: Sequence[Place]) -> None:
        for one in doors:
            one.table(rows, places)

    return door(marker, push_all, table=table_all)._replace(whole=all(one.whole for one in doors))


# --- one record after the other ----------------------------------------------------------------------------------------


def _timed(function: Callable[[Any], Any], marker: Marker, timeout: float) -> Callable[[Any], Any]:
    """Count the calls of a function that has a timeout, so that its supervisor can tell one from the next, and interrupt it.

    Between the two words ``ARMED`` an interruption is this call's; a function that doesn't notice it, since it's in C, say, is
    killed with its child.
    """

    def call(record: Any) -> Any:
        marker[CALL] += 1
        try:
            marker[ARMED] = 1
            try:
                return function(record)
            finally:
                marker[ARMED] = 0
        except Late as error:
            raise RecordTimeoutError(timeout).with_traceback(error.__traceback__) from None

    return call


def plain(
    step: Step,
    number: int,
    marker: Marker,
    fail: Fail,
    onward: Door,
    timeout: float | None,
    attempts: Attempts | None = None,
) -> Door:
    """Compile a step that calls a function with one record after the other."""
    function = step.task.function if timeout is None else _timed(step.task.function, marker, timeout)
    if attempts is not None:
        function = attempts.around(function)
    push, push_many = onward.push, onward.many

    def push_map(record: Any) -> None:
        marker[STEP] = number
        try:
            made = function(record)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
            fail(number, error, record)
        else:
            push(made)

    def push_filter(record: Any) -> None:
        marker[STEP] = number
        try:
            keep = bool(function(record))
        except (Exception, SystemExit) as error:  # noqa: BLE001
            fail(number, error, record)
        else:
            if keep:
                push(record)

    def push_flat_map(record: Any) -> None:
        marker[STEP] = number
        try:
            made = list(function(record))
        except (Exception, SystemExit) as error:  # noqa: BLE001
            fail(number, error, record)
        else:
            push_many(made)

    return door(marker, {"map": push_map, "filter": push_filter, "flat_map": push_flat_map}[step.kind])


# --- batches -------------------------------------------------------------------------------------------------------------


class Batches:
    """A step that calls its function with many records at once.

    A batch that raises is tried again in halves, down to the guilty records. For a batch that ends the child the marker names
    the record in its middle: the coordinator runs that one alone and what lies before and behind it apart, so that the guilty
    one of 1,024 stands alone after some ten deaths, whichever it is.
    """

    def __init__(
        self, step: Step, number: int, marker: Marker, fail: Fail, onward: Door, attempts: Attempts | None = None
    ) -> None:
        form = step.task.function
        assert isinstance(form, Batched)
        self.function, self.size, self.form = form.function, form.size, form.form
        self.whole = self.function if attempts is None else attempts.around(self.function)
        self.number = number
        self.marker = marker
        self.fail = fail
        self.onward = onward
        self.records: list[Any] = []
        self.tables: list[Any] = []  # never while there are records: what came first goes first
        self.places = Places()
        self.door = door(marker, self.push, table=self.table if self.form == "arrow" else None)

    def push(self, record: Any) -> None:
        """Keep a record until its batch is full."""
        if self.tables:
            self.flush()
        self.records.append(record)
        self.places.append(take(self.marker))
        if len(self.places) >= self.size:
            self.flush()
        else:
            self.marker[HELD] |= KEPT

    def table(self, rows: Any, places: Sequence[Place]) -> None:
        """Keep the rows of a table, which stay what they are, until the batch is full."""
        if self.records or (self.tables and self.tables[0].schema != rows.schema):
            self.flush()
        self.tables.append(rows)
        self.places.extend(places)
        if len(self.places) >= self.size:
            self.flush(len(self.places) % self.size)
        if self.places:
            self.marker[HELD] |= KEPT

    def flush(self, keep: int = 0) -> None:
        """Run what is kept, but for the last so many rows of tables."""
        places, data = self.places, self.records or _joined(self.tables)
        whole = len(places) - keep
        self.records, self.tables, self.places = [], [_cut(data, whole, len(places))] if keep else [], places[whole:]
        for first in range(0, whole, self.size):
            stop = min(first + self.size, whole)
            self.run(_cut(data, first, stop), places[first:stop], self.whole)

    def abort(self) -> None:
        """Forget what is kept."""
        self.records, self.tables, self.places = [], [], Places()

    def run(self, data: Any, places: Places, function: Callable[[Any], Any]) -> None:
        """Call the function and push on what it made, or find the records that it fails for.

        Only a whole batch is tried again as the task says: else each of its halves would be, and each of theirs.
        """
        marker = self.marker
        here, middle = take(marker), places[len(places) // 2]
        put(marker, middle)
        marker[HELD] = guess = GUESS if len(places) > 1 else middle[-1]
        marker[STEP] = self.number
        marker[CALL] += 1
        try:
            made = _taken(function(_given(data, self.form)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything
            if len(places) == 1 or isinstance(error, MemoryError):
                self.fail(self.number, error, _first(data))
            else:
                half = len(places) // 2
                self.run(_cut(data, 0, half), places[:half], self.function)
                self.run(_cut(data, half, len(places)), places[half:], self.function)
        else:
            one_for_one = len(made) == len(places)
            if not isinstance(made, list):
                self.onward.table(made, places if one_for_one else Places.same((*middle[:-1], guess), len(made)))
            elif one_for_one:
                for place, record in zip(places, made, strict=True):
                    put(marker, place)
                    self.onward.push(record)
            else:
                self.onward.many(made)
        put(marker, here)


def _joined(tables: list[Any]) -> Any:
    if len(tables) < 2:
        return tables[0] if tables else []
    import pyarrow as pa

    return pa.concat_tables(tables)


def _cut(data: Any, first: int, stop: int) -> Any:
    return data[first:stop] if isinstance(data, list) else data.slice(first, stop - first)


def _first(data: Any) -> Any:
    return data[0] if isinstance(data, list) else data.slice(0, 1).to_pylist()[0]


def _given(data: Any, form: Batch) -> Any:
    """Turn a batch (a list, or a table that came as one) into what the function wants."""
    if form == "records":
        return [*data]  # the function may do with its list as it likes
    if not isinstance(data, list):
        return data
    for record in data:
        if not isinstance(record, Mapping):
            raise TypeError(f"a row of a table is made of a mapping, not of a {type(record).__qualname__}")
    if form == "pandas":
        import pandas as pd

        return pd.DataFrame(data)
    import pyarrow as pa

    rows: Any = pa.array(data)  # from_pylist has only the first record's columns
    return pa.Table.from_struct_array(rows)


def _taken(made: Any) -> Any:
    """Turn what a function returned into a list, or leave it as a table."""
    if isinstance(made, (str, bytes, Mapping)):
        raise TypeError(f"a batch gives many records: a list, a DataFrame or an Arrow table, not a {type(made).__qualname__}")
    arrow, pandas = sys.modules.get("pyarrow"), sys.modules.get("pandas")
    if arrow is not None and isinstance(made, arrow.Table):
        return made
    if arrow is not None and isinstance(made, arrow.RecordBatch):
        return arrow.Table.from_batches([made])
    if pandas is not None and isinstance(made, pandas.DataFrame):
        return made.to_dict("records")
    return list(made)

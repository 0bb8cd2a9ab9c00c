"""Records as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

from parflow.storage.sinks.base import Fail, Sink, Writer
from parflow.storage.sinks.places import Place


@dataclass(frozen=True)
class JSONLinesSink(Sink):
    """Records as JSON, one a line, in UTF-8.

    A record may be anything that JSON has, and dates, UUIDs, enums, dataclasses and numpy values, which become text, objects
    and arrays. Integers may have any size, and keys that are numbers become text. What JSON can't say raises, and never
    becomes something else quietly: NaN and infinities, bytes, sets, text that is not valid Unicode (lone surrogates), two
    keys that become the same text.

    Examples
    --------
    >>> import tempfile
    >>> sink = JSONLinesSink(tempfile.mkdtemp() + "/out")
    >>> writer = sink.open("run-1", "piece-0", print)
    >>> writer.write({"id": 1}, 0)
    >>> path, rows, size = writer.close()
    >>> rows, size
    (1, 9)
    """

    extension = "jsonl"

    def _writer(self, place: Place, path: str, fail: Fail) -> Writer:  # noqa: ARG002 - write says it at once
        return _JSONLinesWriter(place, path)


class _JSONLinesWriter(Writer):
    def write(self, record: Any, tag: Any) -> None:  # noqa: ARG002
        line = _json_line(record)
        self.out().write(line)
        self.rows += 1


_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


def _json_line(record: Any) -> bytes:
    try:
        line = orjson.dumps(record, option=_OPTIONS | orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        return json.dumps(_plain(record), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    if b"null" in line:
        _plain(record)  # orjson writes NaN as null: look whether one of them is
    return line


def _plain(value: Any) -> Any:
    """Return a value as the types that the json module has, or raise for what JSON can't say."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"JSON has no {value!r}: write None, or a text of your choice, or leave the record out")
        return value
    if isinstance(value, (str, int)):
        return value
    if isinstance(value, dict):
        plain = {_key(key): _plain(item) for key, item in value.items()}
        if len(plain) < len(value):
            raise ValueError("two keys of a mapping become the same text in JSON")
        return plain
    if isinstance(value, list) or type(value) is tuple:
        return list(map(_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (item.name for item in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names if not name.startswith("_")}
    if getattr(getattr(value, "dtype", None), "kind", "") == "f":
        return _plain(value.tolist())
    return orjson.loads(orjson.dumps(value, option=_OPTIONS))  # dates and other single values; raises TypeError for others


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, (int, float)) or key is None:
        return json.dumps(_plain(key))
    raise TypeError(f"a key in JSON is text, not {type(key).__qualname__}")

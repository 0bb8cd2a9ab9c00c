"""Sinks: what is published is complete, exactly once, and holds every record that wasn't reported."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import math
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from hypothesis import given, settings
from hypothesis import strategies as st

from parflow.errors import OutputError, UsageError
from parflow.model import SinkFile
from parflow.storage.sinks import MANIFEST, JSONLinesSink, ParquetSink, Sink, Writer
from parflow.storage.sinks.base import part_names
from parflow.storage.sinks.places import _Remote, open_place

RUN = "run-1"
Failures = list[tuple[Any, Any, BaseException]]


def filled(writer: Writer, records: list[Any], first: int = 0) -> Failures:
    """Write records, tagged with their numbers, the way a worker does; return those that ``write`` refused."""
    refused: Failures = []
    for tag, record in enumerate(records, first):
        try:
            writer.write(record, tag)
        except Exception as error:
            refused.append((tag, record, error))
    return refused


def write_piece(sink: Sink, name: str, records: list[Any], run_id: str = RUN) -> tuple[SinkFile | None, Failures]:
    failures: Failures = []
    writer = sink.open(run_id, name, lambda tag, record, error: failures.append((tag, record, error)))
    failures[:0] = filled(writer, records)
    done = writer.close()
    return (SinkFile(0, *done) if done else None), failures


def stage(sink: Sink, *pieces: list[Any], run_id: str = RUN) -> list[SinkFile]:
    files = []
    for number, records in enumerate(pieces):
        file, failures = write_piece(sink, f"piece-{number}", records, run_id)
        assert failures == []
        if file is not None:
            files.append(file)
    return files


def lines(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def published(folder: Path) -> list[Any]:
    return [record for path in sorted(folder.glob("part-*.jsonl")) for record in lines(path)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "deep" / "out")
    else:
        url = f"memory://{uuid.uuid4().hex}/out"
        yield url
        fs, path = fsspec.core.url_to_fs(url)
        if fs.exists(path):
            fs.rm(path, recursive=True)


def names(url: str) -> list[str]:
    """Return all files under a place, hidden ones too."""
    fs, path = fsspec.core.url_to_fs(url)
    return sorted(str(name).rpartition(f"{path}/")[2] for name in fs.find(path)) if fs.exists(path) else []


def content(url: str) -> bytes:
    fs, path = fsspec.core.url_to_fs(url)
    return bytes(fs.cat_file(path))


# --- publishing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JSONLinesSink, ParquetSink])
def test_files_are_published_in_the_given_order_with_a_manifest(kind: type[Sink], place: str) -> None:
    sink = kind(place)
    sink.check()
    first, second = stage(sink, [{"a": 1}, {"a": 2}], [{"a": 3}])
    assert all(name.startswith(".parflow-run-1/") for name in names(place))
    manifest = sink.publish(RUN, [second, first])
    suffix = sink.extension
    assert names(place) == sorted([MANIFEST, f"part-00000.{suffix}", f"part-00001.{suffix}"])
    assert manifest == json.loads(content(f"{place}/{MANIFEST}"))
    assert manifest["run_id"] == RUN
    assert manifest["rows"] == 3
    assert [file["rows"] for file in manifest["files"]] == [1, 2]
    assert [file["bytes"] for file in manifest["files"]] == [second.size, first.size]
    assert [len(content(f"{place}/{file['path']}")) for file in manifest["files"]] == [second.size, first.size]


def test_before_publishing_readers_see_nothing(out: Path) -> None:
    stage(ParquetSink(str(out)), [{"a": 1}])
    assert ds.dataset(out).count_rows() == 0
    assert list(out.glob("part-*")) == []


@pytest.mark.parametrize("moved", range(5))
def test_publishing_goes_on_after_a_crash_at_any_file(moved: int, place: str) -> None:
    sink = JSONLinesSink(place)
    files = stage(sink, *[[{"piece": number}] for number in range(4)])
    fs, _ = fsspec.core.url_to_fs(place)
    for number, file in enumerate(files[:moved]):
        fs.mv(fs._strip_protocol(file.path), fs._strip_protocol(f"{place}/part-{number:05d}.jsonl"))
    manifest = sink.publish(RUN, files)
    assert [json.loads(content(f"{place}/{file['path']}"))["piece"] for file in manifest["files"]] == [0, 1, 2, 3]
    assert sink.publish(RUN, files) == manifest
    assert names(place) == [MANIFEST, *(f"part-{number:05d}.jsonl" for number in range(4))]


def test_a_copy_that_was_not_yet_removed_from_the_staging_is_published_once(out: Path) -> None:
    sink = JSONLinesSink(str(out))
    files = stage(sink, [{"a": 1}], [{"a": 2}])
    (out / "part-00000.jsonl").write_bytes(Path(files[0].path).read_bytes())
    sink.publish(RUN, files)
    assert published(out) == [{"a": 1}, {"a": 2}]


def test_a_file_that_is_neither_staged_nor_published_is_named(place: str) -> None:
    sink = JSONLinesSink(place)
    files = stage(sink, [{"a": 1}], [{"a": 2}])
    fs, path = fsspec.core.url_to_fs(files[1].path)
    fs.rm_file(path)
    with pytest.raises(OutputError, match=r"piece-1\.jsonl.*is gone"):
        sink.publish(RUN, files)
    assert not [name for name in names(place) if name.startswith("part-")]


def test_a_staged_file_of_another_size_is_refused(out: Path) -> None:
    sink = JSONLinesSink(str(out))
    files = stage(sink, [{"a": 1}])
    Path(files[0].path).write_bytes(b"{}\n")
    with pytest.raises(OutputError, match="should have 8 bytes but has 3"):
        sink.publish(RUN, files)


def test_attempts_that_lost_leave_nothing(place: str) -> None:
    sink = JSONLinesSink(place)
    files = stage(sink, [{"a": 1}])
    write_piece(sink, "piece-0-again", [{"a": 1}])
    sink.publish(RUN, files)
    assert names(place) == [MANIFEST, "part-00000.jsonl"]


def test_a_run_without_records_publishes_an_empty_manifest(place: str) -> None:
    sink = JSONLinesSink(place)
    assert stage(sink, [], []) == []
    assert sink.publish(RUN, []) == {"run_id": RUN, "rows": 0, "files": []}
    assert names(place) == [MANIFEST]


def test_discarding_a_run_removes_only_its_own_staging(place: str) -> None:
    sink = JSONLinesSink(place)
    stage(sink, [{"a": 1}])
    other = stage(sink, [{"a": 2}], run_id="run-2")
    sink.discard(RUN)
    sink.discard("run-3")
    assert names(place) == [".parflow-run-2/piece-0.jsonl"]
    assert sink.publish("run-2", other)["rows"] == 1


@pytest.mark.parametrize("count", [0, 1, 100_000, 100_001])
def test_any_number_of_files_is_in_order_by_name(count: int) -> None:
    listed = part_names(count, "jsonl")
    assert listed == sorted(set(listed))
    assert len(listed) == count


def test_a_run_id_that_climbs_out_of_the_folder_is_refused(out: Path) -> None:
    with pytest.raises(UsageError, match="part of a folder's name"):
        JSONLinesSink(str(out)).discard("x/../../..")


def test_an_object_store_moves_many_files_at_once() -> None:
    place = open_place(f"memory://{uuid.uuid4().hex}")
    assert isinstance(place, _Remote)
    memory = place.fs
    place.fs = AsyncFileSystemWrapper(memory)
    root = f"memory://{uuid.uuid4().hex}"
    for number in range(1203):
        memory.pipe_file(f"{root}/a/{number}", b"%d" % number)
    place.move([(f"{root}/a/{number}", f"{root}/b{number:04d}") for number in range(1203)])
    assert names(root) == [f"b{number:04d}" for number in range(1203)]
    assert content(f"{root}/b1202") == b"1202"
    memory.rm(root, recursive=True)


# --- writers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JSONLinesSink, ParquetSink])
def test_a_piece_without_rows_leaves_no_file(kind: type[Sink], place: str) -> None:
    file, failures = write_piece(kind(place), "piece", [])
    assert (file, failures, names(place)) == (None, [], [])


@pytest.mark.parametrize("kind", [JSONLinesSink, ParquetSink])
@pytest.mark.parametrize("rows", [0, 3, 2500])
def test_an_aborted_piece_leaves_no_file(kind: type[Sink], rows: int, place: str) -> None:
    writer = kind(place).open(RUN, "piece", print)
    assert filled(writer, [{"a": number} for number in range(rows)]) == []
    writer.abort()
    assert names(place) == []


@pytest.mark.parametrize("sink", [JSONLinesSink("x"), ParquetSink("x", schema=pa.schema({"a": pa.int64()}), overwrite=True)])
def test_sinks_pickle_with_an_absolute_path(sink: Sink) -> None:
    assert pickle.loads(pickle.dumps(sink)) == sink
    assert sink.path == os.path.abspath("x")


def test_a_writer_killed_with_the_file_open_harms_nobody(out: Path) -> None:
    code = (
        "import os, sys\nfrom parflow.storage.sinks import JSONLinesSink\n"
        "writer = JSONLinesSink(sys.argv[1]).open('run-1', 'lost', print)\n"
        "for n in range(200_000): writer.write({'n': n}, n)\n"
        "os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code, str(out)], cwd=root, check=False).returncode == -9
    assert names(str(out)) == [".parflow-run-1/lost.jsonl"]
    sink = JSONLinesSink(str(out))
    sink.check()
    sink.publish(RUN, stage(sink, [{"n": 1}]))
    assert names(str(out)) == [MANIFEST, "part-00000.jsonl"]


# --- checks before a run -----------------------------------------------------------------------------------------------


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        JSONLinesSink(str(tmp_path / "out"), overwrite=True).check()
    assert (tmp_path / "out").read_text() == "mine"


def test_a_url_that_is_a_file_is_refused() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe_file(url, b"mine")
    with pytest.raises(OutputError, match="is a file"):
        JSONLinesSink(url).check()


def test_a_folder_with_files_is_refused_with_their_number_and_the_first(place: str) -> None:
    sink = JSONLinesSink(place)
    sink.publish(RUN, stage(sink, [{"a": 1}]))
    with pytest.raises(OutputError, match=r"2 files already, first '_manifest.json'.*overwrite=True"):
        sink.check()
    JSONLinesSink(place, overwrite=True).check()


def test_an_empty_folder_and_leftovers_of_other_runs_are_fine(place: str) -> None:
    sink = JSONLinesSink(place)
    sink.check()
    stage(sink, [{"a": 1}], run_id="crashed")
    sink.check()


def test_checking_leaves_nothing_behind(place: str, tmp_path: Path) -> None:
    JSONLinesSink(place).check()
    assert names(place) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parent", ["/proc/no/such/place", "/dev/null/out"])
def test_a_place_that_cannot_be_written_is_refused(parent: str) -> None:
    with pytest.raises(OutputError, match="can't write to"):
        JSONLinesSink(f"{parent}/out").check()


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(OutputError, match="nosuch"):
        JSONLinesSink("nosuch://bucket/out").check()


@pytest.mark.parametrize("path", ["", None, 3, b"x"])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises((UsageError, TypeError)):
        JSONLinesSink(path)


@pytest.mark.parametrize("given", [Path("/data/out"), "file:///data/out", "/data/x/../out/"])
def test_a_local_path_may_be_written_in_several_ways(given: Any) -> None:
    assert JSONLinesSink(given).path == "/data/out"


# --- overwriting -------------------------------------------------------------------------------------------------------


def test_an_earlier_result_is_replaced_at_publish_and_not_before(place: str) -> None:
    old = ParquetSink(place)
    old.publish("old", stage(old, [{"a": 1}], [{"a": 2}], [{"a": 3}], run_id="old"))
    new = JSONLinesSink(place, overwrite=True)
    new.check()
    files = stage(new, [{"a": 4}])
    assert len([name for name in names(place) if name.startswith("part-")]) == 3
    new.publish(RUN, files)
    assert names(place) == [MANIFEST, "part-00000.jsonl"]
    assert json.loads(content(f"{place}/{MANIFEST}"))["run_id"] == RUN


def test_a_half_replaced_result_has_no_manifest_that_claims_otherwise(out: Path) -> None:
    old = JSONLinesSink(str(out))
    old.publish("old", stage(old, [{"a": 1}], [{"a": 2}], run_id="old"))
    new = JSONLinesSink(str(out), overwrite=True)
    files = stage(new, [{"a": 3}], [{"a": 4}])
    obstacle = out / "part-00001.jsonl"
    obstacle.unlink()
    (obstacle / "full").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"part-00001\.jsonl.*Is a directory"):
        new.publish(RUN, files)
    assert lines(out / "part-00000.jsonl") == [{"a": 3}]
    assert not (out / MANIFEST).exists()
    (obstacle / "full").rmdir()
    obstacle.rmdir()
    new.publish(RUN, files)
    assert published(out) == [{"a": 3}, {"a": 4}]


def test_files_that_are_no_parts_survive_overwriting(out: Path) -> None:
    out.mkdir()
    keep = ["notes.txt", "part-of-me.parquet", "part-1.jsonl", "part-00000.jsonl.bak"]
    for name in keep:
        (out / name).write_text("mine")
    sink = JSONLinesSink(str(out), overwrite=True)
    sink.publish(RUN, stage(sink, [{"a": 1}]))
    assert sorted(names(str(out))) == sorted([*keep, MANIFEST, "part-00000.jsonl"])


@pytest.mark.parametrize(
    "hostile", [b"", b"\xff\x00", b"[]", b"null", b'{"run_id": 3, "files": [{"path": "../../etc/passwd"}]}']
)
def test_a_manifest_with_anything_in_it_is_replaced_and_never_followed(hostile: bytes, tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    out.mkdir(parents=True)
    victim = tmp_path / "etc" / "passwd"
    victim.parent.mkdir()
    victim.write_text("mine")
    (out / MANIFEST).write_bytes(hostile)
    with pytest.raises(OutputError):
        JSONLinesSink(str(out)).publish(RUN, [])
    sink = JSONLinesSink(str(out), overwrite=True)
    sink.publish(RUN, stage(sink, [{"a": 1}]))
    assert victim.read_text() == "mine"
    assert json.loads((out / MANIFEST).read_bytes())["run_id"] == RUN


def test_a_result_that_appeared_during_the_run_is_not_touched(out: Path) -> None:
    late, early = JSONLinesSink(str(out)), JSONLinesSink(str(out))
    files = stage(late, [{"a": 2}])
    early.publish("other", stage(early, [{"a": 1}], run_id="other"))
    with pytest.raises(OutputError, match=r"another result.*run run-1"):
        late.publish(RUN, files)
    assert published(out) == [{"a": 1}]
    assert Path(files[0].path).exists()


def test_parts_that_appeared_without_a_manifest_are_not_touched(out: Path) -> None:
    sink = JSONLinesSink(str(out))
    files = stage(sink, [{"a": 2}])
    (out / "part-00000.jsonl").write_text("somebody else's")
    with pytest.raises(OutputError, match=r"part-00000\.jsonl"):
        sink.publish(RUN, files)
    assert (out / "part-00000.jsonl").read_text() == "somebody else's"


# --- JSON lines --------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


@settings(max_examples=50)
@given(st.lists(JSON, min_size=1, max_size=8))
def test_json_comes_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, records: list[Any]) -> None:
    file, failures = write_piece(JSONLinesSink(str(tmp_path_factory.mktemp("out"))), "piece", records)
    assert failures == []
    assert file is not None
    assert lines(file.path) == records
    assert file.rows == len(records)
    assert Path(file.path).read_bytes().count(b"\n") == len(records)


class Colour(enum.Enum):
    RED = "red"
    NOT = math.nan


@dataclasses.dataclass
class Point:
    x: Any
    _hidden: int = 3


MOMENT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (2**200, 2**200),
        ({"a": [None, 2**64, -(2**70)]}, {"a": [None, 2**64, -(2**70)]}),
        ({1: "a", None: "b", 2.5: "c", False: "d"}, {"1": "a", "null": "b", "2.5": "c", "false": "d"}),
        ({2: 2**64, "when": MOMENT}, {"2": 2**64, "when": "2026-01-02T03:04:05+00:00"}),
        (Colour.RED, "red"),
        (Point(None), {"x": None}),
        (Point(2**64), {"x": 2**64}),
        ((1, (None,)), [1, [None]]),
        (
            {"f": np.float64(0.5), "i": np.int8(3), "a": np.array([[1.5, 2.5]]), "n": None},
            {"f": 0.5, "i": 3, "a": [[1.5, 2.5]], "n": None},
        ),
        ({"a": np.array([1, 2]), "big": 2**64}, {"a": [1, 2], "big": 2**64}),
        ("null", "null"),
        ("line\nbreak\u2028", "line\nbreak\u2028"),
        (uuid.UUID(int=0), "00000000-0000-0000-0000-000000000000"),
    ],
)
def test_json_has_a_form_for_common_values(record: Any, wanted: Any, out: Path) -> None:
    file, failures = write_piece(JSONLinesSink(str(out)), "piece", [record])
    assert failures == []
    assert file is not None
    assert lines(file.path) == [wanted]


@pytest.mark.parametrize(
    "bad",
    [
        math.nan,
        {"a": [1, math.inf]},
        {"a": None, "b": {"c": (-math.inf,)}},
        Point(math.nan),
        Colour.NOT,
        {"a": np.float64("nan")},
        {"a": np.array([1.0, math.nan])},
        {math.nan: 1},
        {2**64: math.nan},
        {1: "a", "1": "b"},
        {("a", "b"): 1},
        b"bytes",
        {1, 2},
        Decimal("1.5"),
        "\ud800",
        {"\udfff": 1},
        {"a": object()},
        object,
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_what_json_cannot_say_is_refused_and_the_others_stay(bad: Any, out: Path) -> None:
    file, failures = write_piece(JSONLinesSink(str(out)), "piece", [{"n": 1}, bad, {"n": 2}])
    assert [tag for tag, _, _ in failures] == [1]
    assert isinstance(failures[0][2], (ValueError, TypeError))
    assert file is not None
    assert file.rows == 2
    assert lines(file.path) == [{"n": 1}, {"n": 2}]


def test_a_value_that_contains_itself_is_refused(out: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    file, failures = write_piece(JSONLinesSink(str(out)), "piece", [loop, 1])
    assert [tag for tag, _, _ in failures] == [0]
    assert file is not None
    assert lines(file.path) == [1]


# --- Parquet -----------------------------------------------------------------------------------------------------------


def rows_of(file: SinkFile | None) -> list[dict[str, Any]]:
    assert file is not None
    rows: list[dict[str, Any]] = pq.read_table(file.path).to_pylist()
    assert file.rows == len(rows)
    assert file.size == os.path.getsize(file.path)
    return rows


def test_a_published_folder_is_read_as_it_is(out: Path) -> None:
    sink = ParquetSink(str(out))
    sink.publish(RUN, stage(sink, [{"id": 1, "text": "é\0"}, {"id": 2, "text": None}], [{"id": 3, "text": ""}]))
    (out / ".parflow-other").mkdir()
    (out / ".parflow-other" / "half.parquet").write_bytes(b"PAR1 and then nothing")
    frame = pd.read_parquet(out)
    assert frame["id"].tolist() == [1, 2, 3]
    assert ds.dataset(out).to_table().to_pylist() == [
        {"id": 1, "text": "é\0"},
        {"id": 2, "text": None},
        {"id": 3, "text": ""},
    ]


def test_columns_keep_the_order_in_which_records_name_them(out: Path) -> None:
    file, _ = write_piece(ParquetSink(str(out)), "piece", [{"z": 1}, {"z": 2, "a": 3}, {"m": 4, "a": 5}])
    assert file is not None
    assert pq.read_schema(file.path).names == ["z", "a", "m"]
    assert rows_of(file)[0] == {"z": 1, "a": None, "m": None}


NEST = st.one_of(st.none(), st.fixed_dictionaries({}, optional={"x": st.integers(0, 9), "y": st.text(max_size=3)}))
ROW = st.fixed_dictionaries(
    {"id": st.integers(-(2**63), 2**63 - 1)},
    optional={
        "text": st.one_of(st.none(), st.text()),
        "score": st.one_of(st.none(), st.floats(allow_nan=False), st.integers(-(2**53), 2**53)),
        "tags": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=3)),
        "data": st.one_of(st.none(), st.binary(max_size=4)),
        "yes": st.booleans(),
        "nest": NEST,
    },
)


def widened(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out nulls, which is all that reading back may add."""
    return {
        key: widened(value) if isinstance(value, dict) else value
        for key, value in row.items()
        if value is not None and not (isinstance(value, dict) and not widened(value))
    }


@settings(max_examples=50)
@given(rows=st.lists(ROW, min_size=1, max_size=20), batch=st.integers(1, 7))
def test_rows_come_back_for_any_batch_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], batch: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parflow.storage.sinks.parquet._BATCH_ROWS", batch)
        file, failures = write_piece(ParquetSink(str(tmp_path_factory.mktemp("out"))), "piece", rows)
    assert failures == []
    assert [widened(row) for row in rows_of(file)] == [widened(row) for row in rows]


CELL = st.one_of(
    st.integers(-9, 9), st.floats(-9, 9), st.text(max_size=2), st.none(), st.booleans(), st.just(2**70), st.just(object())
)


@settings(max_examples=50)
@given(values=st.lists(CELL, min_size=1, max_size=25), batch=st.integers(1, 30))
def test_every_record_is_either_in_the_file_or_reported(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], batch: int
) -> None:
    records = [{"n": number, "v": value} for number, value in enumerate(values)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parflow.storage.sinks.parquet._BATCH_ROWS", batch)
        file, failures = write_piece(ParquetSink(str(tmp_path_factory.mktemp("out"))), "piece", records)
    kept = rows_of(file) if file else []
    assert sorted([row["n"] for row in kept] + [tag for tag, _, _ in failures]) == list(range(len(records)))
    assert [row["n"] for row in kept] == sorted(row["n"] for row in kept)
    assert all(row["v"] == values[row["n"]] for row in kept)
    assert all(record["n"] == tag for tag, record, _ in failures)


def test_nulls_first_and_then_values_are_one_column(out: Path) -> None:
    rows = [{"a": None}] * 1500 + [{"a": 1}] * 1500 + [{"a": 2.5}]
    file, failures = write_piece(ParquetSink(str(out)), "piece", rows)
    assert failures == []
    assert file is not None
    assert pq.read_schema(file.path).field("a").type == pa.float64()
    assert [row["a"] for row in rows_of(file)] == [None] * 1500 + [1.0] * 1500 + [2.5]


def test_lists_of_nulls_stay_beside_columns_that_change_their_type(out: Path) -> None:
    rows: list[Any] = [{"t": [None, None], "s": {"t": [None, None, None], "v": 1}}, {"t": None, "s": {"t": [None], "v": 2}}]
    later = [{"t": None, "s": {"t": None, "v": 0.5}}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parflow.storage.sinks.parquet._BATCH_ROWS", 2)
        file, failures = write_piece(ParquetSink(str(out)), "piece", rows + later)
    assert failures == []
    assert rows_of(file) == rows + later


def test_a_bad_record_among_thousands_is_found_and_its_column_named(out: Path) -> None:
    rows: list[Any] = [{"id": number, "score": 0.5} for number in range(4000)]
    rows[0], rows[777], rows[1234], rows[3999] = {"id": 0, "score": "n/a"}, {"id": 777, "score": object()}, "no mapping", {}
    file, failures = write_piece(ParquetSink(str(out)), "piece", rows)
    said = {tag: f"{type(error).__name__}: {error}" for tag, _, error in failures}
    assert sorted(said) == [0, 777, 1234, 3999]
    assert "column 'score' is double in this file, but string here" in said[0]
    assert "column 'score'" in said[777]
    assert "not of a str" in said[1234]
    assert [row["id"] for row in rows_of(file)] == [n for n in range(4000) if n not in said]
    assert all(rows[tag] == record for tag, record, _ in failures)


def test_a_conflict_between_batches_keeps_the_earlier_type(out: Path) -> None:
    rows: list[Any] = [{"a": number} for number in range(1000)] + [{"a": "text"}] * 3 + [{"a": 5}]
    file, failures = write_piece(ParquetSink(str(out)), "piece", rows)
    assert [tag for tag, _, _ in failures] == [1000, 1001, 1002]
    assert "column 'a' is int64 in this file, but string here" in str(failures[0][2])
    assert len(rows_of(file)) == 1001


def test_an_integer_that_no_float_holds_is_reported_when_floats_come_later(out: Path) -> None:
    rows = [{"a": 1}, {"a": 2**60 + 1}, *({"a": 2} for _ in range(998)), {"a": 0.5}]
    file, failures = write_piece(ParquetSink(str(out)), "piece", rows)
    assert [(tag, record) for tag, record, _ in failures] == [(1, {"a": 2**60 + 1})]
    assert "column 'a'" in str(failures[0][2])
    assert [row["a"] for row in rows_of(file)] == [1.0, *[2.0] * 998, 0.5]


def test_when_every_record_is_bad_there_is_no_file(out: Path) -> None:
    file, failures = write_piece(ParquetSink(str(out)), "piece", [{"a": 1j}, {"a": object()}, 3, {"a": 2**70}])
    assert file is None
    assert sorted(tag for tag, _, _ in failures) == [0, 1, 2, 3]
    assert names(str(out)) == []


@pytest.mark.parametrize(
    "bad", [{1: 2}, {b"a": 1}, {"a": "\ud800"}, {"a": [1, "x"]}, {"a": dt.timedelta(days=400_000_000)}, [("a", 1)]]
)
def test_records_that_arrow_cannot_hold_are_reported(bad: Any, out: Path) -> None:
    file, failures = write_piece(ParquetSink(str(out)), "piece", [{"b": 1}, bad, {"b": 2}])
    assert [tag for tag, _, _ in failures] == [1]
    assert [row["b"] for row in rows_of(file)] == [1, 2]


def test_a_type_that_parquet_lacks_is_reported_by_record(out: Path) -> None:
    interval = pa.scalar((1, 2, 3), pa.month_day_nano_interval()).as_py()
    file, failures = write_piece(ParquetSink(str(out)), "piece", [{"a": 1, "b": interval}, {"a": 2}])
    assert [tag for tag, _, _ in failures] == [0]
    assert [row["a"] for row in rows_of(file)] == [2]


def test_empty_mappings_are_null_where_nobody_says_their_fields(out: Path) -> None:
    rows = [{"a": {}, "b": {"c": {}, "d": 1}, "e": [{}], "f": {}}, {"a": None, "b": None, "e": [], "f": {"g": 1}}]
    file, failures = write_piece(ParquetSink(str(out)), "piece", rows)
    assert failures == []
    assert rows_of(file) == [
        {"a": None, "b": {"c": None, "d": 1}, "e": [None], "f": {"g": None}},
        {"a": None, "b": None, "e": [], "f": {"g": 1}},
    ]


def test_a_record_changed_after_it_was_written_is_kept_as_it_was(out: Path) -> None:
    writer = ParquetSink(str(out)).open(RUN, "piece", print)
    record = {"n": 0}
    for number in range(3):
        record["n"] = number
        writer.write(record, number)
    done = writer.close()
    assert done is not None
    assert pq.read_table(done[0])["n"].to_pylist() == [0, 1, 2]


def test_large_records_are_converted_before_they_fill_the_memory(out: Path) -> None:
    writer = ParquetSink(str(out)).open(RUN, "piece", print)
    filled(writer, [{"text": "x" * 3_000_000} for _ in range(4)])
    waiting: list[Any] = writer.records  # type: ignore[attr-defined]
    assert len(waiting) < 3
    done = writer.close()
    assert done is not None
    assert done[1] == 4


# --- Parquet with a schema ---------------------------------------------------------------------------------------------

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int32(), nullable=False),
        pa.field("meta", pa.struct([("x", pa.float32()), ("more", pa.list_(pa.struct([("y", pa.string())])))])),
        pa.field("day", pa.date32()),
    ],
    metadata={"origin": "test"},
)


def test_a_schema_gives_all_files_the_same_columns(out: Path) -> None:
    sink = ParquetSink(str(out), schema=SCHEMA)
    sink.publish(RUN, stage(sink, [{"id": 1}], [{"day": dt.date(2026, 1, 2), "id": 2, "meta": {"more": [{}]}}]))
    for name in ("part-00000.parquet", "part-00001.parquet"):
        found = pq.read_schema(out / name)
        assert [(item.name, item.type, item.nullable) for item in found] == [(i.name, i.type, i.nullable) for i in SCHEMA]
        assert (found.metadata or {}).get(b"origin") == b"test"
    assert ds.dataset(out).to_table().to_pylist()[1] == {
        "id": 2,
        "meta": {"x": None, "more": [{"y": None}]},
        "day": dt.date(2026, 1, 2),
    }


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"id": "x"}, "column 'id'"),
        ({"id": 2**40}, "column 'id'"),
        ({"id": None}, "may not be null"),
        ({}, "may not be null"),
        ({"id": 1, "surplus": 1}, "field 'surplus' is not in the schema"),
        ({"id": 1, "meta": {"z": 1}}, "field 'meta.z' is not in the schema"),
        ({"id": 1, "meta": {"more": [{"y": "a"}, {"q": 1}]}}, "field 'meta.more.q' is not in the schema"),
        ({"id": 1, "day": "yesterday"}, "column 'day'"),
    ],
)
def test_a_record_that_does_not_fit_the_schema_is_reported(bad: dict[str, Any], said: str, out: Path) -> None:
    good = [{"id": number} for number in range(20)]
    file, failures = write_piece(ParquetSink(str(out), schema=SCHEMA), "piece", [*good[:10], bad, *good[10:]])
    assert [tag for tag, _, _ in failures] == [10]
    assert said in str(failures[0][2])
    assert [row["id"] for row in rows_of(file)] == list(range(20))


def test_what_is_no_schema_is_refused() -> None:
    with pytest.raises(UsageError, match=r"pyarrow\.schema"):
        ParquetSink("x", schema={"id": "int64"})
    with pytest.raises(UsageError, match="Parquet can't hold"):
        ParquetSink("x", schema=pa.schema({"a": pa.month_day_nano_interval()}))


@pytest.mark.parametrize("compression", ["zstd", "snappy", "lz4", "gzip", "brotli", "none"])
def test_every_compression_can_be_read(compression: str, out: Path) -> None:
    file, _ = write_piece(ParquetSink(str(out), compression=compression), "piece", [{"a": 1}])
    assert rows_of(file) == [{"a": 1}]


def test_an_unknown_compression_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="zstd, snappy"):
        ParquetSink("x", compression="zip")


def test_hostile_text_stays_text(out: Path) -> None:
    hostile = ["\0", "\r\n", '"},{"', "../../x", "\u202e", "PAR1", "=cmd()", "𝕏" * 1000, "\n"]
    sink = JSONLinesSink(str(out))
    file, failures = write_piece(sink, "piece", [{text: text} for text in hostile])
    assert failures == []
    assert file is not None
    assert [orjson.loads(line) for line in Path(file.path).read_bytes().split(b"\n")[:-1]] == [{text: text} for text in hostile]
    parquet, failures = write_piece(ParquetSink(str(out)), "piece", [{"t": text, text: 1} for text in hostile])
    assert failures == []
    assert [row["t"] for row in rows_of(parquet)] == hostile

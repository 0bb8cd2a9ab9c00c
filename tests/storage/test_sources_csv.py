"""CSV files: where rows begin and end, what they hold, and what is wrong with them."""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import lzma
import pickle
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from parflow.core.fingerprint import fingerprint
from parflow.errors import NotCSVError, NotTextError, RecordTooLargeError, UnreadableInputError, UsageError
from parflow.model import Chunk, Part
from parflow.nodes import Source
from parflow.storage.sources import BadRecord, CSVSource

BOM = b"\xef\xbb\xbf"
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}

# Few distinct bytes, so that quotes, delimiters and newlines meet in every order, at every kind of cut.
contents = st.lists(st.sampled_from([b"a", b"bc", b",", b'"', b'""', b"\n", b"\r\n", b" ", BOM]), max_size=40).map(b"".join)
wild = st.lists(st.sampled_from([b"a", b",", b'"', b"\n", b"\r\n", b"\r", b"\0", BOM, b"\xff"]), max_size=40).map(b"".join)
heads = st.sampled_from([b"", b"x,y\n", b'"x",y\r\n', b'\n\r\n"x\n",y\n', BOM + b"x,y\n"])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file.csv"


def parts_of(source: CSVSource) -> list[Part]:
    return [part for chunk in source.chunks(None) if isinstance(chunk, Chunk) for part in chunk.parts]


def raw_rows(source: CSVSource) -> list[tuple[int, Any]]:
    return [(offset, raw) for part in parts_of(source) for offset, raw in source.read(part, part.start, None)]


def records(source: CSVSource) -> list[dict[str, str]]:
    return [source.decode(raw) for _, raw in raw_rows(source)]


def outcomes(source: CSVSource) -> list[tuple[int, Any]]:
    """What becomes of each row: its record, or the error that makes it a dead letter."""
    found: list[tuple[int, Any]] = []
    for offset, raw in raw_rows(source):
        try:
            found.append((offset, source.decode(raw)))
        except (NotCSVError, NotTextError, RecordTooLargeError) as error:
            found.append((offset, type(error).__name__))
    return found


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def content(row: bytes) -> int:
    return len(row) - (2 if row.endswith(b"\r\n") else row.endswith(b"\n"))


def unmarked(data: bytes) -> bytes:
    """Leave out the mark at the beginning, which the standard library takes for a part of the first field."""
    return re.sub(rb"^(\xef\xbb\xbf)+", b"", data)


def rows_as_csv_finds_them(data: bytes) -> list[tuple[int, bytes]]:
    """Ask the standard library's reader how many lines it takes for each row."""
    taken: list[bytes] = []

    def lines() -> Iterator[str]:
        for line in data.splitlines(keepends=True):  # there is no carriage return on its own in this data
            taken.append(line)
            yield line.decode("latin-1")

    found, offset = [], 0
    for fields in csv.reader(lines()):
        row = b"".join(taken)
        taken.clear()
        shown = row.removeprefix(BOM) if offset == 0 else row
        if fields and shown.strip(b"\r\n"):
            found.append((offset, shown))
        offset += len(row)
    return found


def lines_with_offsets(data: bytes) -> list[tuple[int, bytes]]:
    found, offset = [], 0
    for line in data.splitlines(keepends=True):
        shown = line.removeprefix(BOM) if offset == 0 else line
        if shown.strip(b"\r\n"):
            found.append((offset, shown))
        offset += len(line)
    return found


# --- where rows begin and end --------------------------------------------------------------------------------------------


@given(data=contents)
def test_rows_are_those_of_the_standard_library_each_at_its_offset(scratch: Path, data: bytes) -> None:
    data = unmarked(data)
    scratch.write_bytes(data)
    found = raw_rows(CSVSource(scratch, header=False, columns=["only"], chunk_bytes=1))
    assert found == rows_as_csv_finds_them(data)


@given(data=contents, chunk_bytes=st.integers(1, 50))
def test_without_quoted_newlines_all_parts_together_give_every_line_once(scratch: Path, data: bytes, chunk_bytes: int) -> None:
    scratch.write_bytes(data)
    source = CSVSource(scratch, header=False, columns=["only"], quoted_newlines=False, chunk_bytes=chunk_bytes)
    assert raw_rows(source) == lines_with_offsets(data)


@given(head=heads, data=contents, chunk_bytes=st.integers(1, 50), quoted=st.booleans())
def test_a_header_is_no_row_wherever_a_file_is_cut(
    scratch: Path, head: bytes, data: bytes, chunk_bytes: int, quoted: bool
) -> None:
    head = head if quoted else head.replace(b'"x\n"', b"x")
    whole = head + data if head else b"h\n" + data
    scratch.write_bytes(whole)
    source = CSVSource(scratch, quoted_newlines=quoted, chunk_bytes=chunk_bytes)
    expected = (rows_as_csv_finds_them if quoted else lines_with_offsets)(whole)[1:]
    assert raw_rows(source) == expected
    names = {raw.columns for _, raw in raw_rows(source)}
    assert names <= {("h",), ("x", "y"), ("x\n", "y")}


@given(head=heads, data=wild, chunk_bytes=st.integers(1, 50), quoted=st.booleans(), limit=st.integers(3, 30))
def test_reading_goes_on_from_any_row_with_the_same_rest(
    scratch: Path, head: bytes, data: bytes, chunk_bytes: int, quoted: bool, limit: int
) -> None:
    scratch.write_bytes((head or b"h\n") + data)
    head_fits = quoted or b'"x\n"' not in head
    source = CSVSource(
        scratch,
        header=head_fits,
        columns=None if head_fits else ["x"],
        quoted_newlines=quoted,
        chunk_bytes=chunk_bytes,
        max_record=limit + 8,
    )

    def rest(part: Part, offset: int) -> list[tuple[int, Any]]:
        found = source.read(part, offset, None)
        return [(at, raw if isinstance(raw, bytes) else str(raw)) for at, raw in found]

    for part in parts_of(source):
        whole = rest(part, part.start)
        for i, (offset, _) in enumerate(whole):
            assert rest(part, offset) == whole[i:]


@example(data=b'aaaaa,"\n"\nb\n', limit=1, chunk_bytes=20, quoted=True)  # read in pieces, the first of which ends at the comma
@given(data=contents, limit=st.integers(1, 6), chunk_bytes=st.integers(1, 20), quoted=st.booleans())
def test_rows_longer_than_the_limit_are_bad_records_and_the_others_stay(
    scratch: Path, data: bytes, limit: int, chunk_bytes: int, quoted: bool
) -> None:
    data = unmarked(data)
    scratch.write_bytes(data)
    source = CSVSource(
        scratch, header=False, columns=["only"], quoted_newlines=quoted, chunk_bytes=chunk_bytes, max_record=limit
    )
    rows = (rows_as_csv_finds_them if quoted else lines_with_offsets)(data)
    expected = [(offset, None if content(row) > limit else row) for offset, row in rows]
    assert [(offset, None if isinstance(raw, BadRecord) else raw) for offset, raw in raw_rows(source)] == expected


@given(data=contents, suffix=st.sampled_from(sorted(COMPRESS)), quoted=st.booleans())
def test_compressed_rows_resume_at_decompressed_offsets(scratch: Path, data: bytes, suffix: str, quoted: bool) -> None:
    whole = b"h\n" + data
    path = write(scratch.with_suffix(f".csv{suffix}"), COMPRESS[suffix](whole))
    source = CSVSource(path, quoted_newlines=quoted, chunk_bytes=1)
    [part] = parts_of(source)
    found = list(source.read(part, 0, None))
    assert found == (rows_as_csv_finds_them if quoted else lines_with_offsets)(whole)[1:]
    for i, (offset, _) in enumerate(found):
        assert list(source.read(part, offset, None)) == found[i:]


tables = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(st.text("aé,;\"\n\r\t '\x00\u2028", max_size=6), min_size=width, max_size=width), min_size=1, max_size=8
    )
)


@given(table=tables, delimiter=st.sampled_from(",;\t|"), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_what_csv_writes_is_read_back(scratch: Path, table: list[list[str]], delimiter: str, quoting: Any) -> None:
    names = [f"c{i}" for i in range(len(table[0]))]
    with scratch.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, delimiter=delimiter, quoting=quoting)
        out.writerows([names, *table])
    expected = [dict(zip(names, row, strict=True)) for row in table]
    assert records(CSVSource(scratch, delimiter=delimiter, chunk_bytes=3)) == expected


def test_a_large_file_is_cut_only_where_that_is_sound(tmp_path: Path) -> None:
    chance = random.Random(1)
    rows = [{"id": str(n), "text": "x" * chance.randrange(60)} for n in range(3000)]
    data = "id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in rows)
    path = write(tmp_path / "a.csv", data.encode())
    whole, cut = CSVSource(path, chunk_bytes=9_999), CSVSource(path, quoted_newlines=False, chunk_bytes=9_999)
    assert [len(parts_of(source)) for source in (whole, cut)] == [1, len(data) // 9_999 + 1]
    assert records(whole) == records(cut) == rows
    packed = CSVSource(write(tmp_path / "a.csv.gz", gzip.compress(data.encode())), quoted_newlines=False, chunk_bytes=99)
    assert len(parts_of(packed)) == 1
    assert records(packed) == rows


# --- what rows hold ----------------------------------------------------------------------------------------------------------


def test_values_stay_text_and_fields_are_named_by_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'id,score,\n1, 0.50,NULL\n"2","a ""b"", c",\n')
    assert records(CSVSource(path)) == [
        {"id": "1", "score": " 0.50", "": "NULL"},
        {"id": "2", "score": 'a "b", c', "": ""},
    ]


def test_columns_are_chosen_by_name_in_the_order_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"a,b,c\n1,2,3\n")
    [row] = records(CSVSource(path, columns=["c", "a"]))
    assert list(row.items()) == [("c", "3"), ("a", "1")]


def test_files_of_one_source_have_headers_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", b"x,y\n1,2\n")
    write(tmp_path / "b.csv", b"y,x,z\n3,4,5\n")
    source = CSVSource(f"{tmp_path}/*.csv")
    assert len(list(source.chunks(None))) == 1
    assert records(source) == [{"x": "1", "y": "2"}, {"y": "3", "x": "4", "z": "5"}]
    assert records(CSVSource(f"{tmp_path}/*.csv", columns=["x"])) == [{"x": "1"}, {"x": "4"}]


def test_without_a_header_the_first_row_is_a_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", BOM + b"1;2\r\n3;4")
    source = CSVSource(path, delimiter=";", header=False, columns=("x", "y"))
    assert records(source) == [{"x": "1", "y": "2"}, {"x": "3", "y": "4"}]
    assert source.encodings == {"utf-8-sig": 1}


@pytest.mark.parametrize("data", [b"", BOM, b"\n\r\n", b"a,b\n", b"a,b", BOM + b"\na,b\n\n\r\n"])
def test_a_file_without_rows_gives_none(tmp_path: Path, data: bytes) -> None:
    assert records(CSVSource(write(tmp_path / "a.csv", data))) == []


def test_a_byte_order_mark_is_counted_once_however_often_the_header_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", BOM + b"caf\xe9,b\n" + b"1,2\n" * 50)
    source = CSVSource(path, fallback="latin-1", quoted_newlines=False, chunk_bytes=20)
    assert len(parts_of(source)) > 5
    assert records(source) == [{"café": "1", "b": "2"}] * 50
    assert source.encodings == {"utf-8-sig": 1, "iso8859-1": 1}


def test_tabs_alone_are_a_row_of_empty_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"a\tb\tc\n\t\t\n")
    assert records(CSVSource(path, delimiter="\t")) == [{"a": "", "b": "", "c": ""}]


def test_a_field_longer_than_the_standard_librarys_limit_is_read(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = "long, " * 100_000
    path = write(tmp_path / "a.csv", f'a,b\n1,"{text}"\n2,x\n'.encode())
    try:
        assert records(CSVSource(path)) == [{"a": "1", "b": text}, {"a": "2", "b": "x"}]
    finally:
        csv.field_size_limit(before)


def test_rows_of_other_encodings_are_read(tmp_path: Path) -> None:
    for encoding in ("cp1252", "shift_jis", "gb18030"):
        text = 'name,"ü,ß"\né,"x\ny"\n' if encoding == "cp1252" else '表,"能,ソ"\n十,"x\ny"\n'  # second bytes like \\ and |
        path = write(tmp_path / f"{encoding}.csv", text.encode(encoding))
        header, row = csv.reader(text.splitlines(keepends=True))
        assert records(CSVSource(path, encoding=encoding)) == [dict(zip(header, row, strict=True))]


# --- what is wrong -----------------------------------------------------------------------------------------------------------


def test_too_few_and_too_many_fields_say_how_many(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"id,name\n1\n2,x,y\n3,z\n")
    source = CSVSource(path)
    assert outcomes(source) == [(8, "NotCSVError"), (10, "NotCSVError"), (16, {"id": "3", "name": "z"})]
    [few, many, _] = (raw for _, raw in raw_rows(source))
    with pytest.raises(NotCSVError, match="the row has 1 field, but there are 2 columns: 'id', 'name'"):
        source.decode(few)
    with pytest.raises(NotCSVError, match="the row has 3 fields, but there are 2 columns"):
        source.decode(many)
    [part] = parts_of(source)
    assert source.record_id(part, 10) == f"{path}#10"


def test_a_message_about_many_columns_stays_short() -> None:
    source = CSVSource("unused", header=False, columns=[f"c{i}" for i in range(500)])
    [*_] = source.columns or ()
    with pytest.raises(NotCSVError, match=r"500 columns: 'c0', .*'c9' and 490 more$"):
        source.decode(_row(b"1,2\n", source.columns or ()))


def _row(data: bytes, columns: tuple[str, ...]) -> Any:
    from parflow.storage.sources.delimited import Row

    row = Row(data)
    row.columns = columns
    return row


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'1,"two', "a quote is not closed"),
        (b'1,"two"x\n', "',' expected after '\"'"),
        (b"1,tw\ro\n", "a carriage return that ends no line"),
    ],
)
def test_a_row_that_is_no_csv_says_why(tmp_path: Path, row: bytes, reason: str) -> None:
    source = CSVSource(write(tmp_path / "a.csv", b"id,name\n" + row))
    [(_, raw)] = raw_rows(source)
    with pytest.raises(NotCSVError, match=reason):
        source.decode(raw)


def test_a_quote_that_is_never_closed_takes_the_rest_of_its_file_in_one_dead_letter(tmp_path: Path) -> None:
    rows = b"".join(b"%d,x\n" % n for n in range(1000))
    write(tmp_path / "a.csv", b"id,name\n1,x\n" + b'2,"x\n' + rows)
    write(tmp_path / "b.csv", b"id,name\n3,y\n")
    expected = [(8, {"id": "1", "name": "x"}), (12, "NotCSVError"), (8, {"id": "3", "name": "y"})]
    assert outcomes(CSVSource(f"{tmp_path}/*.csv")) == expected
    expected[1] = (12, "RecordTooLargeError")
    assert outcomes(CSVSource(f"{tmp_path}/*.csv", max_record=100)) == expected


def test_a_newline_in_quotes_is_noticed_where_it_was_said_that_there_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'id,name\n1,"two\nlines"\n2,x\n')
    source = CSVSource(path, quoted_newlines=False)
    with pytest.raises(NotCSVError, match="not closed on its line, and quoted_newlines=False"):
        records(source)
    assert [outcome for _, outcome in outcomes(source)][:1] == ["NotCSVError"]
    assert records(CSVSource(path)) == [{"id": "1", "name": "two\nlines"}, {"id": "2", "name": "x"}]


def test_bytes_that_are_no_text_make_one_row_a_dead_letter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'a\nok\n"\xff\n"\nok\n')
    assert outcomes(CSVSource(path)) == [(2, {"a": "ok"}), (5, "NotTextError"), (10, {"a": "ok"})]
    assert records(CSVSource(path, fallback="latin-1"))[1] == {"a": "ÿ\n"}


@pytest.mark.parametrize(
    ("head", "columns", "error", "reason"),
    [
        (b"a,b,a\n", None, NotCSVError, "the header has the column 'a' 2 times"),
        (b"a,b\n", ["b", "c"], NotCSVError, "the header has no column 'c'; it has 'a', 'b'"),
        (b'a,"b\n', None, NotCSVError, "a quote is not closed"),
        (b"a,\xff\n", None, NotTextError, "byte 0xff"),
        (b"a" * 200 + b"\n", None, RecordTooLargeError, "more than 100 bytes"),
    ],
)
def test_a_header_that_cannot_be_used_says_why(
    tmp_path: Path, head: bytes, columns: Any, error: type[Exception], reason: str
) -> None:
    source = CSVSource(write(tmp_path / "a.csv", head + b"1,2\n"), columns=columns, max_record=100)
    with pytest.raises(error, match=reason):
        raw_rows(source)


def test_a_cut_stream_gives_its_rows_and_then_an_error(tmp_path: Path) -> None:
    whole = gzip.compress(b"a\n" + b"".join(b"%d\n" % n for n in range(100_000)))
    source = CSVSource(write(tmp_path / "a.csv.gz", whole[:-1000]))
    [part] = parts_of(source)
    reading = source.read(part, 0, None)
    assert [source.decode(raw)["a"] for _, raw in itertools.islice(reading, 90_000)] == [str(n) for n in range(90_000)]
    with pytest.raises(UnreadableInputError):
        list(reading)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"delimiter": ""}, "one ASCII character"),
        ({"delimiter": "||"}, "one ASCII character"),
        ({"delimiter": '"'}, "one ASCII character"),
        ({"delimiter": "\n"}, "one ASCII character"),
        ({"delimiter": "§"}, "one ASCII character"),
        ({"header": False}, "need names"),
        ({"columns": []}, "each once"),
        ({"columns": ["a", "a"]}, "each once"),
        ({"columns": ["a", 1]}, "each once"),
        ({"encoding": "utf-16"}, "read_files"),
        ({"encoding": "iso2022_jp"}, "part of another character"),
        ({"encoding": "shift_jis", "delimiter": "|"}, r"'\|' can't be told"),
        ({"fallback": "utf-16"}, "read_files"),
        ({"max_record": 0}, "max_record"),
        ({"chunk_bytes": 0}, "chunk_bytes"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        CSVSource("unused", **arguments)


def test_a_source_travels_and_its_options_are_a_part_of_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"a,b\n1,2\n")
    source: Source = CSVSource(path, columns="b")
    assert records(pickle.loads(pickle.dumps(source))) == [{"b": "2"}]
    different: list[dict[str, Any]] = [
        {},
        {"delimiter": ";"},
        {"columns": ["a"]},
        {"quoted_newlines": False},
        {"header": False, "columns": ["a"]},
    ]
    assert len({fingerprint(CSVSource(path, **options)) for options in different}) == len(different)

"""Sources on real files: what is listed, what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from parflow.errors import (
    CodeError,
    InputChangedError,
    NoInputError,
    NotAFileError,
    NotJSONError,
    NotTextError,
    RecordTooLargeError,
    StoreError,
    UnreadableInputError,
    UsageError,
)
from parflow.model import Chunk, Part, Rejected
from parflow.nodes import Source
from parflow.storage.sources import BadRecord, Document, FilesSource, ItemsSource, JSONLinesSource, LinesSource
from parflow.storage.sources.base import FileSource
from parflow.storage.store import LocalStore

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def chunks_of(source: Any, store: Any = None) -> list[Chunk]:
    return [chunk for chunk in source.chunks(store) if isinstance(chunk, Chunk)]


def parts_of(source: Any, store: Any = None) -> list[Part]:
    return [part for chunk in chunks_of(source, store) for part in chunk.parts]


def rejected_by(source: FileSource) -> list[Rejected]:
    return [item for item in source.chunks(None) if isinstance(item, Rejected)]


def raw_records(source: Any) -> list[tuple[str, int, Any]]:
    return [(part.path, offset, raw) for part in parts_of(source) for offset, raw in source.read(part, part.start, None)]


def records(source: Any) -> list[Any]:
    return [source.decode(raw) for _, _, raw in raw_records(source)]


def write(path: Path, data: bytes = b"x\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def listed(folder: Path, *patterns: str) -> list[str]:
    source = FilesSource([f"{folder}/{pattern}" for pattern in patterns])
    return [os.path.relpath(part.path, folder) for part in parts_of(source)]


# --- lines: every record once, whatever the cuts -----------------------------------------------------------------------

# Few distinct bytes, so that newlines, carriage returns and byte order marks meet at every kind of cut.
contents = st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b" "]), max_size=40).map(b"".join)


def lines_with_offsets(data: bytes) -> list[tuple[int, bytes]]:
    """What reading must give, said in the plainest way."""
    found, offset = [], 0
    for line in re.findall(rb"[^\n]*\n|[^\n]+$", data):
        shown = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if shown:
            found.append((offset, shown))
        offset += len(line)
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file.txt"


@given(data=contents, chunk_bytes=st.integers(1, 50))
def test_all_parts_together_give_every_line_once_at_its_offset(scratch: Path, data: bytes, chunk_bytes: int) -> None:
    scratch.write_bytes(data)
    source = LinesSource(scratch, chunk_bytes=chunk_bytes)
    assert [(offset, raw) for _, offset, raw in raw_records(source)] == lines_with_offsets(data)


@given(data=contents, chunk_bytes=st.integers(1, 50))
def test_reading_goes_on_from_any_record_with_the_same_rest(scratch: Path, data: bytes, chunk_bytes: int) -> None:
    scratch.write_bytes(data)
    source = LinesSource(scratch, chunk_bytes=chunk_bytes)
    for part in parts_of(source):
        whole = list(source.read(part, part.start, None))
        for i, (offset, _) in enumerate(whole):
            assert list(source.read(part, offset, None)) == whole[i:]


@given(data=contents, chunk_bytes=st.integers(1, 20), limit=st.integers(1, 6))
def test_lines_longer_than_the_limit_are_bad_records_and_the_others_stay(
    scratch: Path, data: bytes, chunk_bytes: int, limit: int
) -> None:
    scratch.write_bytes(data)
    source = LinesSource(scratch, chunk_bytes=chunk_bytes, max_record=limit)
    expected = [
        (offset, None if len(line.removesuffix(b"\n").removesuffix(b"\r" if line.endswith(b"\r\n") else b"")) > limit else line)
        for offset, line in lines_with_offsets(data)
    ]
    found = [(offset, None if isinstance(raw, BadRecord) else raw) for _, offset, raw in raw_records(source)]
    assert found == expected


@given(data=contents, suffix=st.sampled_from(sorted(COMPRESS)))
def test_compressed_lines_resume_at_decompressed_offsets(scratch: Path, data: bytes, suffix: str) -> None:
    path = scratch.with_suffix(suffix)
    path.write_bytes(COMPRESS[suffix](data))
    source = LinesSource(path, chunk_bytes=1)
    [part] = parts_of(source)
    whole = list(source.read(part, 0, None))
    assert whole == lines_with_offsets(data)
    for i, (offset, _) in enumerate(whole):
        assert list(source.read(part, offset, None)) == whole[i:]


@given(
    st.lists(st.sampled_from(["a", "\r", "é", "", "\u2028", "\x0b"]), max_size=8).map("".join), st.sampled_from(["\n", "\r\n"])
)
def test_a_line_loses_its_terminator_and_nothing_else(text: str, end: str) -> None:
    source = LinesSource("unused")
    assert source.decode((text + end).encode()) == (text.removesuffix("\r") if end == "\n" else text)


def test_a_lone_carriage_return_is_data_even_at_the_end_of_the_file(tmp_path: Path) -> None:
    assert records(LinesSource(write(tmp_path / "f", b"a\rb\r\n\r\n\nlast\r"))) == ["a\rb", "", "", "last\r"]


def test_a_file_without_a_last_newline_keeps_its_last_line(tmp_path: Path) -> None:
    assert records(LinesSource(write(tmp_path / "f", b"a\nb"))) == ["a", "b"]


def test_an_empty_file_has_no_lines_but_is_a_document(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"")
    assert records(LinesSource(path)) == []
    assert records(FilesSource(path)) == [Document(str(path), "", "utf-8")]


def test_a_record_is_named_by_file_and_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"one\ntwo\n")
    source = LinesSource(path)
    [part] = parts_of(source)
    assert [source.record_id(part, offset) for offset, _ in source.read(part, 0, None)] == [f"{path}#0", f"{path}#4"]
    assert FilesSource(path).record_id(part, 0) == str(path)


# --- a line that is too long -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.txt"
    with path.open("wb") as file:
        file.write(b"before\n")
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b"\nafter\n")
    return path


def test_a_line_of_100_mb_over_many_chunks_is_one_bad_record(long_line: Path) -> None:
    source = LinesSource(long_line, chunk_bytes=8 << 20, max_record=1 << 20)
    assert len(parts_of(source)) > 10
    found = [(offset, raw if isinstance(raw, bytes) else type(raw)) for _, offset, raw in raw_records(source)]
    assert found == [(0, b"before\n"), (7, BadRecord), (100_000_008, b"after\n")]


def test_a_line_of_100_mb_is_passed_over_in_bounded_memory(long_line: Path) -> None:
    script = f"""
import resource
from parflow.storage.sources import LinesSource
source = LinesSource({str(long_line)!r}, chunk_bytes=1 << 30, max_record=1 << 20)
[chunk] = source.chunks(None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(list(source.read(chunk.parts[0], 0, None))) == 3
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    grown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(grown.stdout) < 40


def test_a_range_inside_a_long_line_reads_no_further_than_the_range(long_line: Path) -> None:
    source = LinesSource(long_line, chunk_bytes=8 << 20)
    inside = parts_of(source)[1]
    before = resource.getrusage(resource.RUSAGE_SELF)
    io_before = _bytes_read()
    assert list(source.read(inside, inside.start, None)) == []
    assert _bytes_read() - io_before < 10 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss < 40 << 10


def _bytes_read() -> int:
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_decoding_a_bad_record_raises_its_error() -> None:
    bad = BadRecord(RecordTooLargeError(10))
    for source in (LinesSource("unused"), JSONLinesSource("unused"), JSONLinesSource("unused", encoding="cp1252")):
        with pytest.raises(RecordTooLargeError, match="10 bytes"):
            source.decode(bad)


def test_a_document_larger_than_the_limit_is_a_bad_record(tmp_path: Path) -> None:
    write(tmp_path / "a", b"12345")
    write(tmp_path / "b", b"123456")
    source = FilesSource(f"{tmp_path}/*", max_record=5, mode="bytes")
    fits, too_large = (raw for _, _, raw in raw_records(source))
    assert source.decode(fits).data == b"12345"
    with pytest.raises(RecordTooLargeError):
        source.decode(too_large)


def test_a_decompressed_document_counts_as_large_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "bomb.gz", gzip.compress(b"0" * 10_000_000))
    source = FilesSource(path, max_record=1_000_000)
    [(_, _, raw)] = raw_records(source)
    with pytest.raises(RecordTooLargeError):
        source.decode(raw)


# --- JSON lines --------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(json_values, st.booleans())
def test_every_json_value_comes_back_exactly(value: Any, ascii_only: bool) -> None:
    line = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert repr(JSONLinesSource("unused").decode(line)) == repr(value)


@given(st.text(st.sampled_from('0123456789-.eE, "[]{}:a'), max_size=60))
def test_a_line_is_json_here_exactly_when_it_is_for_python(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(NotJSONError):
            JSONLinesSource("unused").decode(text.encode())
    else:
        assert repr(JSONLinesSource("unused").decode(text.encode())) == repr(expected)


@given(st.integers(0, 40), st.integers(18, 25), st.text(st.sampled_from("ab 12"), max_size=30))
def test_a_large_integer_is_exact_wherever_it_stands_in_the_line(shift: int, digits: int, rest: str) -> None:
    number = int("9" * digits)
    line = " " * shift + json.dumps({"id": number, "text": rest, "negative": -number})
    assert JSONLinesSource("unused").decode(line.encode()) == {"id": number, "text": rest, "negative": -number}


def test_json_takes_what_pythons_json_takes() -> None:
    decode = JSONLinesSource("unused").decode
    assert math.isnan(decode(b"NaN\n"))
    assert decode(rb'["\ud800", 1e999, -Infinity]') == ["\ud800", math.inf, -math.inf]
    assert decode(b'{"a": 1, "a": 2}\r\n') == {"a": 2}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": }\n', "Expecting value at column 7"),
        (b"{} {}\n", "Extra data at column 4"),
        (b'"a\tb"\n', "Invalid control character at at column 3"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "4300"),
    ],
)
def test_a_line_that_is_not_json_says_where(line: bytes, reason: str) -> None:
    with pytest.raises(NotJSONError, match=reason):
        JSONLinesSource("unused").decode(line)


def test_blank_lines_are_no_json_records_and_offsets_stay_exact(tmp_path: Path) -> None:
    source = JSONLinesSource(write(tmp_path / "f", b'1\n\n  \t\r\n{"a": "b"}\r\n\n[]'))
    assert [(offset, source.decode(raw)) for _, offset, raw in raw_records(source)] == [(0, 1), (8, {"a": "b"}), (21, [])]


# --- encodings ---------------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_text_name_the_byte_and_its_position(tmp_path: Path) -> None:
    for source in (LinesSource("unused"), JSONLinesSource("unused")):
        with pytest.raises(NotTextError, match="not utf-8: byte 0xe9 at position 4: invalid continuation byte"):
            source.decode(b'"caf\xe9"\n')
    path = write(tmp_path / "f", b"caf\xe9")
    with pytest.raises(NotTextError, match="byte 0xe9 at position 3: unexpected end of data"):
        records(FilesSource(path))


def test_a_fallback_is_used_only_where_needed_and_counted() -> None:
    lines = LinesSource("unused", fallback="cp1252")
    assert [lines.decode(raw) for raw in ("é\n".encode(), b"\xe9\r\n", b"a\n")] == ["é", "é", "a"]
    assert lines.encodings == {"cp1252": 1}
    values = JSONLinesSource("unused", fallback="latin-1")
    assert [values.decode(raw) for raw in (b'"\xe9"', '"é"'.encode(), b'"\xe9"')] == ["é"] * 3
    assert values.encodings == {"iso8859-1": 2}
    taken = values.encodings
    values.reset()
    assert (values.encodings, taken) == ({}, {"iso8859-1": 2})


def test_bytes_that_are_text_in_neither_encoding_name_both() -> None:
    with pytest.raises(NotTextError, match="not utf-8 or cp1252: byte 0x81 at position 0"):
        LinesSource("unused", fallback="cp1252").decode(b"\x81")


def test_json_is_decoded_by_the_declared_encoding_even_where_utf_8_would_do() -> None:
    assert JSONLinesSource("unused", encoding="latin-1").decode('"é"'.encode()) == "Ã©"


def test_a_byte_order_mark_is_dropped_at_the_beginning_and_kept_elsewhere(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    path = write(tmp_path / "f", bom + b"a\n" + bom + b"b\n")
    source = LinesSource(path)
    assert records(source) == ["a", "\ufeffb"]
    assert source.encodings == {"utf-8-sig": 1}
    values = JSONLinesSource(write(tmp_path / "j", bom + b'{"a": 1}\n'))
    assert records(values) == [{"a": 1}]
    documents = FilesSource(path, encoding="utf-8-sig")
    assert records(documents) == [Document(str(path), "a\n\ufeffb\n", "utf-8-sig")]
    assert documents.encodings == {"utf-8-sig": 1}


def test_a_document_may_be_utf_16_and_lines_may_not(tmp_path: Path) -> None:
    path = write(tmp_path / "f", "añb\r\n".encode("utf-16"))
    assert records(FilesSource(path, encoding="utf-16")) == [Document(str(path), "añb\r\n", "utf-16")]
    with pytest.raises(UsageError, match="read_files"):
        LinesSource(path, encoding="utf-16")
    with pytest.raises(UsageError, match="read_files"):
        JSONLinesSource(path, fallback="utf-16")


def test_a_document_says_how_it_was_decoded(tmp_path: Path) -> None:
    write(tmp_path / "a", b"caf\xe9")
    write(tmp_path / "b", "café".encode())
    source = FilesSource(f"{tmp_path}/*", fallback="cp1252")
    assert [(document.text, document.encoding) for document in records(source)] == [("café", "cp1252"), ("café", "utf-8")]
    assert source.encodings == {"cp1252": 1}


@pytest.mark.parametrize("encoding", ["no-such", "rot13", "hex"])
def test_an_unknown_encoding_is_refused_at_once(encoding: str) -> None:
    with pytest.raises(UsageError, match="encoding"):
        LinesSource("unused", encoding=encoding)


# --- documents ---------------------------------------------------------------------------------------------------------


def test_a_document_is_text_or_bytes_and_says_so_when_asked_for_the_other(tmp_path: Path) -> None:
    path = write(tmp_path / "f.html", b"<p>\r\n\xc3\xa9\n")
    [text], [data] = records(FilesSource(path)), records(FilesSource(path, mode="bytes"))
    assert (text.text, text.encoding) == ("<p>\r\né\n", "utf-8")
    assert (data.data, data.encoding) == (b"<p>\r\n\xc3\xa9\n", None)
    with pytest.raises(UsageError, match="mode='bytes'"):
        _ = text.data
    with pytest.raises(UsageError, match="mode='text'"):
        _ = data.text


def test_a_part_of_documents_is_one_record_and_nothing_is_behind_it(tmp_path: Path) -> None:
    source = FilesSource(write(tmp_path / "f", b"x"))
    [part] = parts_of(source)
    assert len(list(source.read(part, 0, None))) == 1
    assert list(source.read(part, 1, None)) == []


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_a_compressed_document_is_read_as_what_it_holds(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"f{suffix}", COMPRESS[suffix](b"a" * 3_000_000))
    [document] = records(FilesSource(path, mode="bytes"))
    assert document.data == b"a" * 3_000_000


# --- compressed streams that are wrong ---------------------------------------------------------------------------------


def many_lines() -> bytes:
    return b"".join(f"{i * 7919 % 100003} line\n".encode() for i in range(20_000))


def test_a_frame_that_zstd_readers_are_to_skip_is_skipped(tmp_path: Path) -> None:
    compress, skipped = COMPRESS[".zst"], b"\x50\x2a\x4d\x18\x05\0\0\0hello"
    path = write(tmp_path / "f.zst", skipped + compress(b"a\n") + skipped + compress(b"b\n") + skipped)
    assert records(LinesSource(path)) == ["a", "b"]


def read_until_error(source: LinesSource, part: Part) -> list[Any]:
    found: list[Any] = []
    reading = source.read(part, 0, None)
    with pytest.raises(UnreadableInputError, match=re.escape(part.path)):
        list(map(found.append, reading))
    return [raw for _, raw in found]


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_streams_one_behind_the_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    path = write(tmp_path / f"f{suffix.upper()}", compress(b"a\nb") + compress(b"") + compress(b"c\nd\n"))
    assert records(LinesSource(path)) == ["a", "bc", "d"]


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_a_cut_stream_gives_its_lines_and_then_an_error(tmp_path: Path, suffix: str) -> None:
    data = many_lines() * (20 if suffix == ".bz2" else 1)
    whole = COMPRESS[suffix](data)
    path = write(tmp_path / f"f{suffix}", whole[: len(whole) * 3 // 4])
    source = LinesSource(path)
    [part] = parts_of(source)
    found = read_until_error(source, part)
    assert found
    assert data.startswith(b"".join(found))
    with pytest.raises(UnreadableInputError):
        records(FilesSource(path))


def test_lines_before_the_cut_are_given(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst", ".xz"):
        whole = COMPRESS[suffix](many_lines()) + COMPRESS[suffix](b"x" * 100)
        source = LinesSource(write(tmp_path / f"f{suffix}", whole[:-5]))
        [part] = parts_of(source)
        found = read_until_error(source, part)
        assert b"".join(found) == many_lines()


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_what_is_no_stream_at_all_is_unreadable(tmp_path: Path, suffix: str) -> None:
    source = LinesSource(write(tmp_path / f"f{suffix}", b"plain text, wrongly named\n" * 50))
    with pytest.raises(UnreadableInputError):
        records(source)


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_damage_in_the_middle_is_unreadable(tmp_path: Path, suffix: str) -> None:
    whole = bytearray(COMPRESS[suffix](many_lines()))
    middle = len(whole) // 2
    whole[middle : middle + 200] = b"\xff" * 200
    with pytest.raises(UnreadableInputError):
        records(LinesSource(write(tmp_path / f"f{suffix}", bytes(whole))))


def test_going_on_behind_the_end_of_a_stream_is_unreadable(tmp_path: Path) -> None:
    source = LinesSource(write(tmp_path / "f.gz", gzip.compress(b"a\n")))
    [part] = parts_of(source)
    with pytest.raises(UnreadableInputError, match="ends 5 bytes before"):
        list(source.read(part, 7, None))


# --- which files a pattern names ---------------------------------------------------------------------------------------


def test_files_come_folder_by_folder_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/a/q.txt", "a.txt", "c/x.txt", "A.txt", "ä.txt"):
        write(tmp_path / name)
    expected = ["A.txt", "a/a/q.txt", "a/z.txt", "a.txt", "b.txt", "c/x.txt", "ä.txt"]
    assert listed(tmp_path, "**/*.txt") == expected
    assert listed(tmp_path, "**") == expected


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt"]),
        ("*/*.txt", ["d/b.txt"]),
        ("**/b.txt", ["d/b.txt"]),
        ("d/**/c.*", ["d/e/c.md", "d/e/c.txt"]),
        ("**/e/**", ["d/e/c.md", "d/e/c.txt"]),
        ("**/d/**/*.txt", ["d/b.txt", "d/e/c.txt"]),
        ("**/**/*.md", ["d/e/c.md"]),
        ("[a-c].txt", ["a.txt"]),
        ("[!b].txt", ["a.txt"]),
        ("?/e/*", ["d/e/c.md", "d/e/c.txt"]),
        ("*/e/c.txt", ["d/e/c.txt"]),
        ("a**", ["a.txt"]),
        ("d/../a.*", ["a.txt"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, names: list[str]) -> None:
    for name in ("a.txt", "d/b.txt", "d/e/c.txt", "d/e/c.md"):
        write(tmp_path / name)
    assert listed(tmp_path, pattern) == names


def test_hidden_files_are_listed_only_when_the_pattern_names_them(tmp_path: Path) -> None:
    for name in (".hidden.txt", "a.txt", ".cache/b.txt"):
        write(tmp_path / name)
    assert listed(tmp_path, "**/*.txt") == ["a.txt"]
    assert listed(tmp_path, ".*.txt") == [".hidden.txt"]
    assert listed(tmp_path, ".cache/*.txt") == [".cache/b.txt"]
    assert listed(tmp_path, ".c*/*.txt") == [".cache/b.txt"]


def test_a_name_that_exists_is_taken_literally_whatever_is_in_it(tmp_path: Path) -> None:
    for name in ("report[1].txt", "report1.txt", "q?.txt", "qq.txt", "st*r.txt", "star.txt", "[x]/a.txt", "x/a.txt"):
        write(tmp_path / name)
    for name in ("report[1].txt", "q?.txt", "st*r.txt"):
        assert listed(tmp_path, name) == [name]
    assert listed(tmp_path, "[x]/*.txt") == ["[x]/a.txt"]
    assert listed(tmp_path, "[x]/a.txt") == ["[x]/a.txt"]
    assert listed(tmp_path, "report[12].txt") == ["report1.txt"]


def test_odd_names_are_read_and_travel(tmp_path: Path) -> None:
    odd = [" a b .txt", "日本語.txt", "new\nline.txt", os.fsdecode(b"caf\xe9.txt")]
    for name in odd:
        write(tmp_path / name, b"text\n")
    source = pickle.loads(pickle.dumps(LinesSource(f"{tmp_path}/*.txt")))
    assert sorted(os.path.basename(part.path) for part in parts_of(source)) == sorted(odd)
    assert records(source) == ["text"] * 4
    for name in odd:
        source = LinesSource(tmp_path / name)
        source.check()
        assert records(source) == ["text"]


def test_overlapping_patterns_read_a_file_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "d/c.txt"):
        write(tmp_path / name)
    assert listed(tmp_path, "b.txt", "*.txt", "**/*.txt", "d/../d/c.txt") == ["b.txt", "a.txt", "d/c.txt"]


def test_relative_paths_and_the_home_folder_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = (str(tmp_path / "a.txt"),)
    for path in ("a.txt", "./x/../a.txt", "~/a.txt", f"file://{tmp_path}/a.txt", Path("a.txt")):
        assert LinesSource(path).paths == expected


def test_links_to_files_and_folders_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "data/a.txt")
    write(tmp_path / "elsewhere/b.txt")
    (tmp_path / "data/link.txt").symlink_to(tmp_path / "elsewhere/b.txt")
    (tmp_path / "data/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/self").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    assert listed(tmp_path, "data/**/*.txt") == ["data/a.txt", "data/link.txt", "data/more/b.txt"]


def test_folders_that_a_pattern_matches_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    (tmp_path / "folder.txt").mkdir()
    source = FilesSource(f"{tmp_path}/*.txt")
    assert [part.path for part in parts_of(source)] == [str(tmp_path / "a.txt")]
    assert rejected_by(source) == []


def test_what_a_pattern_matches_that_is_no_file_is_rejected_unopened(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("nowhere")
    (tmp_path / "d.txt").symlink_to("d.txt")
    os.mknod(tmp_path / "e.txt", stat.S_IFSOCK | 0o600)
    source = LinesSource(f"{tmp_path}/*.txt")
    source.check()
    found = {os.path.basename(item.path): (item.error, item.message) for item in rejected_by(source)}
    assert {name: error for name, (error, _) in found.items()} == {
        "b.txt": "NotAFileError",
        "c.txt": "UnreadableInputError",
        "d.txt": "UnreadableInputError",
        "e.txt": "NotAFileError",
    }
    assert "a named pipe" in found["b.txt"][1]
    assert "a socket" in found["e.txt"][1]
    assert records(source) == ["x"]


def test_folders_are_listed_only_when_their_turn_comes(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / name / "f.txt", b"x" * 100)
    chunks = LinesSource(f"{tmp_path}/**/*.txt", chunk_bytes=10_000).chunks(None)
    first = next(chunks)
    assert isinstance(first, Chunk)
    write(tmp_path / "c" / "later.txt")
    rest = [part.path for chunk in chunks if isinstance(chunk, Chunk) for part in chunk.parts]
    assert [os.path.relpath(path, tmp_path) for path in rest] == ["b/f.txt", "c/f.txt", "c/later.txt"]


def test_small_files_share_a_chunk_and_large_ones_are_cut(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 10), ("c", 1_000_000), ("d.gz", 1_000_000)):
        write(tmp_path / name, b"x" * size)
    shape = [
        [(os.path.basename(part.path), part.start, part.stop) for part in chunk.parts]
        for chunk in chunks_of(LinesSource(f"{tmp_path}/*", chunk_bytes=400_000))
    ]
    assert shape == [
        [("a", 0, None), ("b", 0, None)],
        [("c", 0, 333_333)],
        [("c", 333_333, 666_666)],
        [("c", 666_666, None)],
        [("d.gz", 0, None)],
    ]


# --- what is wrong before the run --------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_says_where_it_looked(tmp_path: Path) -> None:
    write(tmp_path / "a.md")
    (tmp_path / "folder.txt").mkdir()
    for pattern in (f"{tmp_path}/*.txt", f"{tmp_path}/**/*.txt"):
        with pytest.raises(NoInputError, match=re.escape(f"looked in {tmp_path}")):
            LinesSource([f"{tmp_path}/*.md", pattern]).check()
    with pytest.raises(NoInputError):
        LinesSource(f"{tmp_path}/nowhere/*.txt").check()


def test_a_path_that_does_not_exist_is_unreadable(tmp_path: Path) -> None:
    source = LinesSource(tmp_path / "missing.txt")
    with pytest.raises(UnreadableInputError, match="No such file"):
        source.check()
    [rejected] = rejected_by(source)
    assert (rejected.path, rejected.error) == (str(tmp_path / "missing.txt"), "UnreadableInputError")


def test_a_path_that_is_a_folder_or_a_pipe_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAFileError, match=rf"a directory, .*{re.escape(str(tmp_path))}/\*"):
        LinesSource(tmp_path).check()
    with pytest.raises(NotAFileError, match="a named pipe"):
        LinesSource(tmp_path / "pipe").check()
    with pytest.raises(NotAFileError, match="a device"):
        LinesSource("/dev/null").check()


def test_all_is_well_with_files_that_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    LinesSource([tmp_path / "a.txt", f"{tmp_path}/*.txt"]).check()


@pytest.mark.parametrize("arguments", [{"chunk_bytes": 0}, {"max_record": 0}])
def test_senseless_sizes_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        LinesSource("unused", **arguments)  # type: ignore[arg-type]


def test_no_paths_and_unknown_modes_are_refused() -> None:
    with pytest.raises(UsageError, match="no paths"):
        FilesSource([])
    with pytest.raises(UsageError, match="mode"):
        FilesSource("unused", mode="both")  # type: ignore[arg-type]


# --- files of somebody else --------------------------------------------------------------------------------------------


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users get to, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def as_another_user(script: str) -> list[str]:
    """Run a script as a user whom files can be kept from, which root is not; modules are loaded before the switch."""
    switch = """
import os, orjson, zstandard
from parflow.storage.sources import *
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""
    done = subprocess.run([sys.executable, "-c", switch + script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_file_one_may_not_read_is_unreadable(open_path: Path) -> None:
    write(open_path / "a.txt", b"mine\n").chmod(0)
    write(open_path / "b.txt", b"yours\n").chmod(0o444)
    said = as_another_user(f"""
for path in ({str(open_path / "a.txt")!r}, {str(open_path / "*.txt")!r}):
    source = LinesSource(path)
    try:
        source.check()
        print("fine")
    except Exception as error:
        print(type(error).__name__, error)
    for chunk in source.chunks(None):
        for part in chunk.parts:
            try:
                print(part.path[-5:], list(source.read(part, 0, None)))
            except Exception as error:
                print(part.path[-5:], type(error).__name__)
""")
    assert said[0].startswith("UnreadableInputError")
    assert "Permission denied" in said[0]
    assert said[1:] == [
        "a.txt UnreadableInputError",
        "fine",
        "a.txt UnreadableInputError",
        "b.txt [(0, b'yours\\n')]",
    ]


def test_a_folder_one_may_not_list_is_rejected_and_the_others_are_listed(open_path: Path) -> None:
    for name in ("a/x.txt", "b/y.txt"):
        write(open_path / name)
    (open_path / "a").chmod(0o311)
    said = as_another_user(f"""
source = LinesSource({str(open_path / "**/*.txt")!r})
source.check()
for item in source.chunks(None):
    print(getattr(item, "error", None) or item.parts[0].path[-5:])
try:
    LinesSource({str(open_path / "a/*.txt")!r}).check()
except Exception as error:
    print(type(error).__name__)
""")
    assert said == ["UnreadableInputError", "y.txt", "UnreadableInputError"]


# --- files that change -------------------------------------------------------------------------------------------------


def test_a_file_that_grew_since_it_was_listed_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"a\n")
    for source in (LinesSource(path), FilesSource(path)):
        path.write_bytes(b"a\n")
        [part] = parts_of(source)
        path.write_bytes(b"a\nb\n")
        with pytest.raises(InputChangedError, match="it had 2 bytes, it has 4"):
            next(iter(source.read(part, 0, None)))


def test_a_file_that_was_rewritten_at_the_same_size_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"a\n")
    source = LinesSource(path)
    [part] = parts_of(source)
    path.write_bytes(b"b\n")
    os.utime(path, ns=(0, int(part.stamp) + 1))
    with pytest.raises(InputChangedError, match="written to"):
        next(source.read(part, 0, None))


def test_a_file_that_changes_while_it_is_read_raises_after_its_last_record(tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"a\nb\n")
    source = LinesSource(path)
    [part] = parts_of(source)
    reading = source.read(part, 0, None)
    assert next(reading) == (0, b"a\n")
    os.utime(path, ns=(0, 0))
    assert next(reading) == (2, b"b\n")
    with pytest.raises(InputChangedError):
        next(reading)


def test_a_file_that_went_away_is_unreadable(tmp_path: Path) -> None:
    path = write(tmp_path / "f")
    source = LinesSource(path)
    [part] = parts_of(source)
    path.unlink()
    with pytest.raises(UnreadableInputError, match="No such file"):
        next(source.read(part, 0, None))


def test_a_pipe_that_took_a_files_place_does_not_hang_the_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "f")
    source = LinesSource(path)
    [part] = parts_of(source)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputChangedError):
        next(source.read(part, 0, None))


def test_a_reader_that_stops_early_closes_its_file(tmp_path: Path) -> None:
    source = LinesSource(write(tmp_path / "f", b"a\nb\n"))
    [part] = parts_of(source)
    before = len(os.listdir("/proc/self/fd"))
    reading = source.read(part, 0, None)
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before


# --- other places ------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    import fsspec

    files = fsspec.filesystem("memory")
    for name, data in (
        ("b.txt", b"b1\nb2\n"),
        ("a.txt", b"a1\n"),
        ("d/c.txt", b"c1\n"),
        (".h.txt", b"h\n"),
        ("z.gz", gzip.compress(b"z\n")),
    ):
        files.pipe_file(f"/bucket/{name}", data)
    yield files
    files.rm("/bucket", recursive=True)


def test_urls_are_listed_and_read_through_fsspec(memory: Any) -> None:
    source = LinesSource("memory://bucket/**/*.txt", chunk_bytes=3)
    source.check()
    found = [(path, offset, source.decode(raw)) for path, offset, raw in raw_records(source)]
    assert found == [
        ("memory:///bucket/a.txt", 0, "a1"),
        ("memory:///bucket/b.txt", 0, "b1"),
        ("memory:///bucket/b.txt", 3, "b2"),
        ("memory:///bucket/d/c.txt", 0, "c1"),
    ]
    assert records(LinesSource("memory://bucket/*.gz")) == ["z"]
    assert records(FilesSource("memory://bucket/a.txt")) == [Document("memory://bucket/a.txt", "a1\n", "utf-8")]


def test_urls_that_name_no_file_say_so_before_the_run(memory: Any) -> None:
    with pytest.raises(NoInputError, match="looked in memory://bucket/"):
        LinesSource("memory://bucket/*.pdf").check()
    with pytest.raises(UnreadableInputError):
        LinesSource("memory://bucket/missing").check()
    with pytest.raises(NotAFileError, match="a directory"):
        LinesSource("memory://bucket/d").check()
    with pytest.raises(UsageError, match="no-such-protocol"):
        LinesSource("no-such-protocol://a").check()
    assert [item.error for item in rejected_by(LinesSource(["memory://bucket/missing", "memory://bucket/d"]))] == [
        "UnreadableInputError",
        "NotAFileError",
    ]


def test_a_remote_file_that_changed_is_not_read(memory: Any) -> None:
    source = LinesSource("memory://bucket/a.txt")
    [part] = parts_of(source)
    memory.pipe_file("/bucket/a.txt", b"a2\n")
    with pytest.raises(InputChangedError):
        next(source.read(part, 0, None))
    memory.rm("/bucket/a.txt")
    with pytest.raises(UnreadableInputError):
        next(source.read(part, 0, None))


def test_a_place_that_lists_names_without_sizes_is_asked_for_them(memory: Any) -> None:
    import fsspec

    class NamesOnly(type(memory)):  # type: ignore[misc]
        """As web servers do."""

        protocol = "namesonly"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.removeprefix("namesonly://")))

        def find(self, path: str, **options: Any) -> Any:
            found = super().find(path, **{**options, "detail": True})
            return {name: {"name": name, "type": "file", "size": None} for name in found}

    fsspec.register_implementation("namesonly", NamesOnly, clobber=True)
    source = LinesSource("namesonly://bucket/?.txt", chunk_bytes=3)
    assert [part.size for part in parts_of(source)] == [3, 6, 6]
    assert records(source) == ["a1", "b1", "b2"]


def test_files_in_an_archive_are_read_through_a_chained_url(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a.txt", "one\ntwo\n")
        archive.writestr("b.txt", "three\n")
    source = LinesSource(f"zip://*.txt::{tmp_path}/all.zip")
    source.check()
    assert records(source) == ["one", "two", "three"]


# --- items -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


def items_of(source: ItemsSource, store: LocalStore) -> list[tuple[int, Any]]:
    return [item for part in parts_of(source, store) for item in source.read(part, part.start, store)]


@given(items=st.lists(st.integers() | st.text(), max_size=60), chunk_records=st.none() | st.integers(1, 70))
def test_items_come_back_in_order_with_their_positions(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], chunk_records: int | None
) -> None:
    store = LocalStore(str(tmp_path_factory.getbasetemp() / "items"))
    source = ItemsSource(iter(items), chunk_records=chunk_records)
    assert items_of(source, store) == list(enumerate(items))


def test_items_go_on_from_any_position(store: LocalStore) -> None:
    source = ItemsSource("abcdefg", chunk_records=3)
    first, second, third = parts_of(source, store)
    assert list(source.read(second, 4, store)) == [(4, "e"), (5, "f")]
    assert list(source.read(third, 6, store)) == [(6, "g")]
    assert list(source.read(first, 0, store)) == [(0, "a"), (1, "b"), (2, "c")]
    assert source.record_id(second, 4) == "items[4]"
    assert source.decodes is False
    assert source.decode("e") == "e"


def test_items_of_known_number_make_at_most_256_chunks(store: LocalStore) -> None:
    assert [part.stop for part in parts_of(ItemsSource(range(3)), store)] == [1, 2, 3]
    assert len(parts_of(ItemsSource(range(256)), store)) == 256
    sizes = [(part.stop or 0) - part.start for part in parts_of(ItemsSource(range(1000)), store)]
    assert set(sizes[:-1]) == {4}
    assert len(sizes) == 250


def test_items_of_unknown_number_begin_small_and_are_taken_lazily(store: LocalStore) -> None:
    taken = 0

    def generator() -> Iterator[int]:
        nonlocal taken
        while taken < 5000:
            taken += 1
            yield taken

    chunks = ItemsSource(generator()).chunks(store)
    sizes = []
    for _ in range(12):
        part = next(chunks).parts[0]
        sizes.append((part.stop or 0) - part.start)
        assert taken == sum(sizes)
    assert sizes == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def test_an_item_that_does_not_pickle_is_named_by_its_position(store: LocalStore) -> None:
    with pytest.raises(CodeError, match=r"item 2 can't be pickled: TypeError.*lock"):
        list(ItemsSource([0, 1, threading.Lock(), 3], chunk_records=4).chunks(store))


def test_functions_and_classes_of_the_main_script_travel(store: LocalStore) -> None:
    script = f"""
from parflow.storage.store import LocalStore
from parflow.storage.sources import ItemsSource
class Thing:
    def __init__(self, value): self.value = value
store = LocalStore({store.url!r})
[chunk] = ItemsSource([Thing(5), lambda x: x + 1], chunk_records=2).chunks(store)
import pickle, sys
sys.stdout.buffer.write(pickle.dumps(chunk))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    chunk = pickle.loads(done.stdout)
    (_, thing), (_, function) = ItemsSource(None).read(chunk.parts[0], 0, store)
    assert (thing.value, function(1)) == (5, 2)


def test_a_source_of_items_travels_without_them(store: LocalStore) -> None:
    source = ItemsSource((i for i in range(10)), chunk_records=5)
    travelled = pickle.loads(pickle.dumps(source))
    assert [item for part in parts_of(source, store) for item in travelled.read(part, part.start, store)] == [
        (i, i) for i in range(10)
    ]
    with pytest.raises(UsageError):
        travelled.check()


def test_stored_items_that_were_damaged_are_refused(store: LocalStore) -> None:
    source = ItemsSource(["x" * 5000], chunk_records=3)
    [part] = parts_of(source, store)
    store.put(part.path, b"something else")
    with pytest.raises(StoreError, match="not what was stored"):
        next(source.read(part, 0, store))


def test_the_same_items_are_the_same_chunks(store: LocalStore) -> None:
    first, second = (chunks_of(ItemsSource(list("abcdef"), chunk_records=2), store) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("iterable", "chunk_records"), [(None, None), (5, None), ([1], 0)])
def test_what_cannot_be_gone_through_is_refused(iterable: Any, chunk_records: int | None) -> None:
    with pytest.raises(UsageError):
        ItemsSource(iterable, chunk_records=chunk_records).check()


def test_no_items_are_no_chunks(store: LocalStore) -> None:
    source = ItemsSource([])
    source.check()
    assert chunks_of(source, store) == []


# --- all sources -------------------------------------------------------------------------------------------------------


SOURCES: list[Source] = [
    LinesSource("a", fallback="cp1252"),
    JSONLinesSource("a", max_record=5),
    FilesSource(["a", "b"], mode="bytes"),
    ItemsSource([1], chunk_records=3),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.name))
def test_a_source_pickles_and_is_equal_to_its_copy(source: Any) -> None:
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    assert repr(copy) == repr(source)


def test_sources_that_differ_are_not_equal() -> None:
    assert LinesSource("a") != LinesSource("b")
    assert LinesSource("a") != JSONLinesSource("a")
    assert FilesSource("a") != FilesSource("a", mode="bytes")
    counted = LinesSource("a")
    counted.count("utf-8-sig")
    assert counted == LinesSource("a")

"""The recipe extract_text.py, on PDFs, pages and mails, some of which are broken."""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import parflow as pf
from parflow.errors import TooManyFailuresError

extract_text: pf.Workflow = importlib.import_module("extract_text").extract_text

GOOD = {
    "about.html": "html", "ipc.html": "html",
    "banned.eml": "mail", "charset.eml": "mail", "clock.eml": "mail", "dingusfish.eml": "mail", "page.eml": "mail",
    "crazyones.pdf": "pdf", "multilang.pdf": "pdf", "toy.pdf": "pdf",
}  # fmt: skip
BAD = {
    "empty.pdf": ("ValueError", "the file is empty"),
    "encrypted.pdf": ("FileNotDecryptedError", "not been decrypted"),
    "junk.html": ("ValueError", "binary data"),
    "truncated.pdf": ("PdfStreamError", "ended unexpectedly"),
}


def written(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was written, by the file's name."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    records = [json.loads(line) for line in lines]
    assert len({record["path"] for record in records}) == len(records)
    return {Path(record["path"]).name: record for record in records}


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> pf.Run:
    folder = tmp_path_factory.mktemp("extract")
    flow: pf.Bound = extract_text(str(data / "documents/*"), str(folder / "out"))
    return flow.run(home=folder / "home", workers=2, max_failures=len(BAD))


@pytest.fixture(scope="module")
def texts(run: pf.Run) -> dict[str, dict[str, Any]]:
    run.result()
    return written(Path(run.home).parent / "out")


def test_the_files_of_each_kind_are_counted(run: pf.Run) -> None:
    assert run.result() == Counter(GOOD.values())


def test_every_file_is_written_or_a_dead_letter(run: pf.Run, texts: dict[str, dict[str, Any]], data: Path) -> None:
    failed = {Path(failure.record.partition("#")[0]).name for failure in run.dead_letters()}
    assert {name: text["kind"] for name, text in texts.items()} == GOOD
    assert failed == set(BAD)
    assert set(GOOD) | set(BAD) == {path.name for path in (data / "documents").iterdir()}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_broken_file_says_what_is_wrong_with_it(run: pf.Run, name: str) -> None:
    (failure,) = (failure for failure in run.dead_letters() if name in failure.record)
    error, message = BAD[name]
    assert (failure.step, failure.cause, failure.error.rpartition(".")[2]) == ("extract", "exception", error)
    assert message in failure.message


def test_the_characters_of_a_text_are_counted(texts: dict[str, dict[str, Any]]) -> None:
    assert all(text["characters"] == len(text["text"]) > 0 for text in texts.values())


def test_pdfs_give_their_text_in_any_script(texts: dict[str, dict[str, Any]]) -> None:
    assert texts["crazyones.pdf"]["text"].startswith("The Crazy Ones\nOctober 14, 1998\n")
    assert all(hello in texts["multilang.pdf"]["text"] for hello in ("Hello World", "Привет, мир", "你好世界", "مرحبا بالعالم"))
    assert texts["toy.pdf"]["text"].splitlines()[:2] == ["AWAY again1", "AWAY again2"]


class Shown(HTMLParser):
    """Gathers the words of a page that are not code, by the standard library alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 0
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in ("script", "style", "template")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "template")

    def handle_data(self, data: str) -> None:
        self.words += [] if self.hidden else data.split()


@pytest.mark.parametrize("name", ["about.html", "ipc.html"])
def test_pages_give_their_words_and_no_code(texts: dict[str, dict[str, Any]], data: Path, name: str) -> None:
    shown = Shown()
    shown.feed((data / "documents" / name).read_text("utf-8"))
    assert texts[name]["text"].split() == shown.words
    assert len(shown.words) > 100


def test_mails_give_subject_and_body(texts: dict[str, dict[str, Any]]) -> None:
    assert texts["dingusfish.eml"]["text"] == "Here is your dingus fish\n\nHi there,\n\nThis is the dingus fish."
    assert texts["page.eml"]["text"] == "Hälfte\n\nHälfte des\nLebens\nMit gelben Birnen"


def test_a_mail_in_an_unknown_charset_is_read_as_what_it_most_likely_is(texts: dict[str, dict[str, Any]]) -> None:
    assert texts["charset.eml"]["text"] == "Gruss\n\nSchöne Grüße, und danke für die Äpfel – 5 € das Kilo."


def test_attachments_are_noted(texts: dict[str, dict[str, Any]]) -> None:
    assert {name: text["attachments"] for name, text in texts.items() if text["attachments"]} == {
        "clock.eml": ["clock.bmp"],
        "dingusfish.eml": ["dingusfish.gif"],
        "banned.eml": ["message/delivery-status", "text/rfc822-headers"],
    }


def test_a_pdf_is_one_whatever_it_is_called_and_other_files_say_what_they_are_not(data: Path, tmp_path: Path) -> None:
    shutil.copy(data / "documents/toy.pdf", tmp_path / "invoice.bin")
    (tmp_path / "notes.xyz").write_text("some notes")
    (tmp_path / "only.eml").write_text("\nno header")
    run = extract_text(str(tmp_path / "*.*"), str(tmp_path / "out")).run(home=tmp_path / "home", max_failures=2)
    assert run.result() == {"pdf": 1}
    assert [failure.message for failure in run.dead_letters()] == [
        "neither PDF nor any of .pdf, .html, .htm, .eml",
        "no mail: it has no header",
    ]


def test_without_a_tolerance_the_run_stops_and_a_resume_with_one_goes_on(data: Path, tmp_path: Path) -> None:
    run = extract_text(str(data / "documents/*"), str(tmp_path / "out")).run(home=tmp_path / "home")
    with pytest.raises(TooManyFailuresError, match="max_failures is 0"):
        run.result()
    assert not list((tmp_path / "out").glob("*.jsonl"))
    assert pf.resume(run.run_id, home=tmp_path / "home", max_failures=len(BAD)).result() == Counter(GOOD.values())
    assert set(written(tmp_path / "out")) == set(GOOD)

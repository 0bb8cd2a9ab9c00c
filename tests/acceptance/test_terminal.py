"""In a terminal: progress is seen, and no stranger's text is obeyed; nor is it in the report."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from .shell import Shell, until

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b5n\r\x08\x00<script>alert(1)</script>"
"""Sets the title, clears the screen, asks for the cursor's place, overwrites the line, and runs in a browser."""


def obeyed(text: str) -> list[str]:
    """Return the control sequences in what a terminal got, but for colour, line ends, and what moves a progress bar."""
    text = re.sub(r"\x1b\[(\d+(;\d+)*)?[mAK]|\x1b\[\?25[lh]|\r|\n", "", text)
    return re.findall(r"[\x00-\x1f\x7f-\x9f].{0,5}", text)


class Page(HTMLParser):
    """Gathers the tags of a page and the text in them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(shell: Shell) -> Page:
    """Read the newest run's report."""
    return Page(Path(re.findall(r"report: (.*)", shell("show").out)[0]))


def test_progress_is_seen_in_a_terminal(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("".join(f"{number}\n" for number in range(10)))
    gate = tmp_path / "gate"
    terminal = shell.terminal(*shell.flow("gated", "--source", source, "--gate", gate, "--log", shell.log, "--out", shell.out))
    until(lambda: shell.ran(), "the first record")
    until(lambda: re.search(r"read_lines → wait .*━.* 0%.*0 records, 0/s", terminal.shown), "a bar")
    gate.touch()
    assert terminal.wait() == 0
    assert re.search(r"━ 100%.* 10 records, [\d,]+/s, [\d.]+ k?B/s", terminal.shown)
    assert re.search(r"run gated-.*: succeeded", terminal.shown)


def test_progress_is_left_out_of_a_terminal_when_asked(shell: Shell) -> None:
    terminal = shell.terminal(*shell.flow("settings", "--count", 1, "--no-progress"))
    assert terminal.wait() == 0
    assert "(0, 0.5, False, None)" in terminal.text
    assert "\x1b" not in terminal.text


def test_control_characters_in_a_result_are_shown_and_not_obeyed(shell: Shell) -> None:
    terminal = shell.terminal(*shell.flow("settings", "--count", 1, "--name", EVIL.replace("\x00", "")))
    assert terminal.wait() == 0
    assert obeyed(terminal.text) == []
    assert r"\x1b[2J\x1b[31m" in terminal.text


def test_control_characters_in_words_are_shown_and_not_obeyed(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text(f"{EVIL}\nplain\n", newline="")
    terminal = shell.terminal(*shell.flow("tally", "--source", source))
    assert terminal.wait() == 0
    assert obeyed(terminal.text) == []
    assert "plain: 1" in terminal.text
    done = shell(*shell.flow("tally", "--source", source))
    assert obeyed(done.out + done.err) == []
    assert shell.json(*shell.flow("tally", "--source", source))["result"] == {EVIL: 1, "plain": 1}


@pytest.mark.parametrize("command", ["show", "failures", "failures --traceback", "resume"])
def test_control_characters_in_messages_are_shown_and_not_obeyed(shell: Shell, tmp_path: Path, command: str) -> None:
    source = tmp_path / f"in{EVIL[:15].replace('/', '')}.txt"
    source.write_text(f"1\n{EVIL}\n", newline="")
    words = shell.flow("numbers", "--source", source, "--log", shell.log)
    terminal = shell.terminal(*words)
    assert terminal.wait() == 1
    assert obeyed(terminal.text) == []
    assert r"\x1b[2J" in terminal.text
    looking = shell.terminal(*command.split())
    assert looking.wait() == (1 if command == "resume" else 0)
    assert obeyed(looking.text) == []
    assert r"\x1b[2J" in looking.text
    assert EVIL in shell.json("failures")[0]["message"]


def test_a_strangers_markup_stays_text_in_the_report(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "<img src=x onerror=alert(2)>.txt"
    source.write_text(f"1\n{EVIL}\n", newline="")
    shell(*shell.flow("numbers", "--source", source, "--log", shell.log), code=1)
    page = report_of(shell)
    assert not page.tags & {"script", "img", "iframe", "a"}
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x onerror=alert(2)>" in page.text
    assert obeyed(page.text) == []


def test_results_that_json_hardly_has_are_printed_all_the_same(shell: Shell) -> None:
    answer = shell.json(*shell.flow("odd"))["result"]
    assert answer == {"('a', 1)": 1, "big": 2**80, "broken \udcff": [1, 2], "None": None}
    assert json.dumps(answer)
    text = shell(*shell.flow("odd")).out
    assert f"big: {2**80}" in text
    assert r"broken \udcff" in text


def test_file_names_and_lines_that_are_no_unicode_are_told_all_the_same(shell: Shell, tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.txt"))
    source.write_bytes(b"good\n\xff\xff\n")
    failed = shell(*shell.flow("tally", "--source", source), code=1)
    assert r"\udcff\udcfe.txt#5" in failed.err
    assert "not utf-8: byte 0xff at position 0" in failed.err
    assert r"\udcff\udcfe.txt#5" in shell("failures").out
    assert shell.json("failures")[0]["record"] == f"{source}#5"
    assert r"\udcff\udcfe.txt#5" in report_of(shell).text
    assert shell.json("resume", "--max-failures", 1)["result"] == {"good": 1}


def test_dead_letters_that_differ_in_numbers_alone_are_one_cause(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("1\nx1\nx22\nother\n")
    shell(*shell.flow("numbers", "--source", source, "--log", shell.log), code=1)
    assert "2 × number: ValueError: x1 is no number (for example" in shell("show").out
    assert "1 × number: ValueError: other is no number (" in shell("show").out
    told = shell("failures").out.splitlines()
    run = shell.json("show")["run_id"]
    assert told[2:6] == [
        "  2 × number: ValueError: x1 is no number",
        f"      for example {source}#2; all: parflow failures {run} --step number --error ValueError",
        "  1 × number: ValueError: other is no number",
        f"      {source}#9",
    ]

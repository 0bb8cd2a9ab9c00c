"""The README's blocks run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SHELL = [line.partition("#")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_there_are_blocks_to_run() -> None:
    assert len(PYTHON) == 3
    assert len(PYTHON[0].strip().splitlines()) <= 26
    assert len(SHELL) == 8


def test_the_python_block_counts_its_words_and_sets_the_broken_file_aside(tmp_path: Path) -> None:
    (tmp_path / "readme.py").write_text(PYTHON[0])
    out = run([sys.executable, "readme.py"], tmp_path).stdout.splitlines()
    assert out[0].startswith("{'be': 2, 'to': 2, 'is': 1")
    assert "not utf-8" in out[1]


def test_the_block_on_failures_undoes_what_failed_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "failures.py").write_text(PYTHON[2])
    assert run([sys.executable, "failures.py"], tmp_path).stdout == "2 nobody lives there\n"


def test_the_python_block_runs_again_in_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "readme.py").write_text(PYTHON[0])
    for _ in range(2):
        run([sys.executable, "readme.py"], tmp_path)


def test_the_block_of_calls_and_decisions_stays_quiet_and_writes_what_it_centred(tmp_path: Path) -> None:
    (tmp_path / "watch.py").write_text(PYTHON[1])
    assert run([sys.executable, "watch.py"], tmp_path).stdout == "25% are negative: all quiet\n"
    rows = [line for file in sorted((tmp_path / "out/centred").glob("part-*")) for line in file.read_text().splitlines()]
    assert rows[0] == '{"score":0.0,"negative":false}'
    assert len(rows) == 4


def test_the_program_on_the_page_of_effects_says_what_it_says_there(tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/effects.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "sell.py").write_text(program)
    assert run([sys.executable, "sell.py"], tmp_path).stdout == "2 shipped, 2 charged\nnobody lives there\n"


def test_the_shell_commands_of_parflow_run_in_their_order(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("the cat and the hat\n")
    for line in SHELL:
        if line.startswith("parflow "):
            out = run([sys.executable, "-m", "parflow.cli", *shlex.split(line)[1:]], tmp_path).stdout
            if line.startswith("parflow run "):
                assert "the: 2" in out


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_the_make_targets_exist(line: str) -> None:
    done = subprocess.run(["make", "-n", line.split()[1]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""What each command prints, with and without --json, and its exit code."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from .shell import FLOWS, Shell

WORDCOUNT = str(Path(__file__).parents[2] / "recipes" / "wordcount.py")
COMMANDS = ("run", "resume", "redrive", "cancel", "runs", "show", "failures", "plan")


@pytest.fixture
def words(texts: Path) -> Counter[str]:
    """Count the words of the texts the plain way."""
    word = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
    return Counter(match[0].casefold() for path in texts.rglob("*.txt") for match in word.finditer(path.read_text("utf-8")))


def text_of(folder: Path, text: str) -> Path:
    """Write a file of lines."""
    path = folder / "lines.txt"
    path.write_text(text)
    return path


def test_the_words_of_many_texts_are_counted_and_the_run_can_be_looked_at(
    shell: Shell, texts: Path, words: Counter[str]
) -> None:
    done = shell("run", WORDCOUNT, "--source", f"{texts}/**/*.txt", "--workers", 2)

    (word, count), *_ = words.most_common(1)
    assert done.out.splitlines()[0] == f"{word}: {count}"
    assert done.out.splitlines()[-1] == f"… and {len(words) - 20:,} more"
    assert "160 records" in done.err

    (run,) = shell.json("runs")
    assert run["status"] == "succeeded"
    assert run["flow"] == "wordcount"
    assert run["run_id"] in shell("runs").out
    assert shell.json("show")["stages"][0]["records"] == 160
    assert re.search(r"succeeded\n.*160 records", shell("show", run["run_id"][:12]).out)
    assert shell.json("failures") == []
    assert "no dead letters" in shell("failures", "last").out
    assert "<html" in Path(re.findall(r"report: (.*)", shell("show").out)[0]).read_text()


def test_json_is_one_object_and_nothing_else_on_stdout(shell: Shell, texts: Path, words: Counter[str]) -> None:
    answer = shell.json("run", WORDCOUNT, "--source", f"{texts}/**/*.txt", "--workers", 2)
    assert answer == {"run_id": answer["run_id"], "status": "succeeded", "result": words}
    assert list(answer["result"].values()) == sorted(words.values(), reverse=True)


def test_resuming_a_run_that_succeeded_prints_its_result_again(shell: Shell, texts: Path) -> None:
    first = shell.json("run", WORDCOUNT, "--source", f"{texts}/a/*.txt", "--workers", 2)
    assert shell.json("resume") == first
    assert shell.json("resume", first["run_id"]) == first
    assert shell("resume").out.startswith(next(iter(first["result"])))


def test_a_plan_is_shown_and_nothing_runs(shell: Shell, texts: Path) -> None:
    plan = shell("plan", WORDCOUNT, "--source", f"{texts}/**/*.txt").out
    assert re.search(r"stage 0.*\n.*flat_map words .*\n.*barrier: reduce counter", plan)
    as_json = shell.json("plan", WORDCOUNT, "--source", f"{texts}/**/*.txt")
    assert [stage["steps"] for stage in as_json["stages"]] == [["words"]]
    assert shell.json("runs") == []
    assert "no runs yet" in shell("runs").out


def test_parameters_become_what_the_workflow_says(shell: Shell) -> None:
    given = ["--count", "1", "--share=0.25", "--loud", "yes", "--name", "x y"]
    assert shell.json(*shell.flow("settings", *given))["result"] == [[0, 0.25, True, "x y"]]
    assert shell.json(*shell.flow("settings", "--count=2"))["result"] == [[0, 0.5, False, None], [1, 0.5, False, None]]


def test_without_a_terminal_only_results_are_on_stdout_and_no_progress_anywhere(shell: Shell) -> None:
    done = shell(*shell.flow("settings", "--count", 1))
    assert done.out == "(0, 0.5, False, None)\n"
    assert "\x1b" not in done.err
    assert "━" not in done.err
    assert "0:00:0" not in done.err


def test_too_many_dead_letters_fail_the_run_and_the_message_tells_how_to_go_on(shell: Shell, tmp_path: Path) -> None:
    source = text_of(tmp_path, "1\nx\n2\ny\n3\n")
    failed = shell(*shell.flow("numbers", "--source", source, "--log", shell.log), code=1)
    assert failed.out == ""
    assert re.search(r"2 of 5 records failed, max_failures is 0; first: ValueError: x is no number", failed.err)
    (command,) = re.findall(r"`parflow (resume \S+ --max-failures 2)`", failed.err)
    assert f"go on with: parflow {command}" in shell("show").out

    letters = shell.json("failures")
    assert [(letter["record"].rpartition("/")[2], letter["step"], letter["message"]) for letter in letters] == [
        ("lines.txt#2", "number", "x is no number"),
        ("lines.txt#6", "number", "y is no number"),
    ]
    text = shell("failures", "--traceback").out
    assert "2 dead letters" in text
    assert "raise ValueError(f" in text
    assert "parflow/" not in text
    shown = shell("show").out
    assert "failed" in shown
    assert "1 × number: ValueError: x is no number" in shown
    assert shell.json("show")["stages"][0]["failed"] == 2

    assert shell(*command.split()).out == "6\n"
    assert shell.json("runs")[0]["status"] == "succeeded"
    assert len(shell.ran()) == 5


def test_a_failed_run_is_one_object_of_json_too(shell: Shell, tmp_path: Path) -> None:
    answer = shell.json(*shell.flow("numbers", "--source", text_of(tmp_path, "x\n"), "--log", shell.log), code=1)
    assert answer["status"] == "failed"
    assert answer["result"] is None
    assert "1 of 1 records failed" in answer["error"]


def test_some_dead_letters_are_accepted_beforehand(shell: Shell, tmp_path: Path) -> None:
    source = text_of(tmp_path, "1\nx\n2\n3\n")
    words = shell.flow("numbers", "--source", source, "--log", shell.log)
    assert shell.json(*words, "--max-failures", 1)["result"] == 6
    assert shell.json(*words, "--max-failures", 0.25)["result"] == 6
    assert shell.json(*words, "--max-failures", 0.2, code=1)["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", FLOWS], r"flows.py has \d+ workflows \(documents, .*\); name one: .*flows.py:NAME"),
        (["run", f"{FLOWS}:nothing"], r"has no workflow 'nothing'; it has documents, "),
        (["run", "nowhere.py"], r"there is no file 'nowhere.py'"),
        (["run", "no_such_module:flow"], r"can't import 'no_such_module'"),
        (["run", f"{FLOWS}:settings"], r"settings wants --count"),
        (["run", f"{FLOWS}:settings", "--count"], r"--count wants a value"),
        (["run", f"{FLOWS}:settings", "--count", "many"], r"--count wants int, not 'many'"),
        (["run", f"{FLOWS}:settings", "--count=1", "--loud", "perhaps"], r"--loud wants bool, not 'perhaps'"),
        (["run", f"{FLOWS}:settings", "--count=1", "--color", "x"], r"no parameter '--color'; it has --count, --share, "),
        (["run", f"{FLOWS}:settings", "--count=1", "word"], r"no parameter 'word'"),
        (["run", f"{FLOWS}:settings", "--count=1", "--workers", "0"], r"workers is 0; at least one is needed"),
        (["run", f"{FLOWS}:settings", "--count=1", "--workers", "two"], r"'two' is not a valid integer"),
        (["run", f"{FLOWS}:settings", "--count=1", "--max-failures", "1.5"], r"max_failures is 1.5; give a count"),
        (["run", f"{FLOWS}:settings", "--count=1", "--timeout", "soon"], r"'soon' is no amount"),
        (["plan", f"{FLOWS}:settings"], r"settings wants --count"),
        (["plan", FLOWS], r"name one"),
        (["run"], r"Missing argument 'FLOW'"),
        (["walk"], r"No such command 'walk'"),
    ],
)
def test_a_command_that_makes_no_sense_ends_with_2_and_says_why(shell: Shell, words: list[str], message: str) -> None:
    done = shell(*words, code=2)
    assert re.search(message, done.err)
    assert done.out == ""
    assert "Traceback" not in done.err
    assert not shell.home.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", f"{FLOWS}:crashing", "--source", "nothing/*.txt"], r"no file matches '.*nothing/\*.txt'"),
        (["run", f"{FLOWS}:crashing", "--source", "."], r"is a (folder|directory), not a file"),
        (["run", f"{FLOWS}:crashing", "--source", "gone.txt"], r"can't read '.*gone.txt'"),
        (["resume"], r"no run 'last' in"),
        (["resume", "nobody"], r"no run 'nobody' in"),
        (["show", "nobody"], r"no run 'nobody' in"),
        (["failures", "nobody"], r"no run 'nobody' in"),
    ],
)
def test_what_can_not_be_done_ends_with_1_and_says_why(shell: Shell, words: list[str], message: str) -> None:
    done = shell(*words, code=1)
    assert re.search(message, done.err)
    assert done.out == ""
    assert "Traceback" not in done.err


def test_an_output_folder_in_use_is_refused_before_anything_runs(shell: Shell, texts: Path) -> None:
    words = shell.flow("documents", "--source", f"{texts}/a/a*.txt", "--log", shell.log, "--out", shell.out)
    shell(*words)
    ran = shell.ran()
    assert re.search(r"has \d+ files already, first '_manifest.json'", shell(*words, code=1).err)
    assert shell.ran() == ran


def test_an_error_in_the_flows_own_file_shows_its_lines_and_none_of_parflows(shell: Shell, tmp_path: Path) -> None:
    flow = tmp_path / "broken.py"
    for source, message in {
        "import parflow as pf\n1 / 0\n": r'broken.py", line 2.*\n.*1 / 0(.*\n)+ZeroDivisionError: division by zero',
        "def broken(:\n": r"SyntaxError: invalid syntax",
        "import no_such_module_at_all\n": r"ModuleNotFoundError: No module named 'no_such_module_at_all'",
        "import parflow as pf\n@pf.workflow\ndef flow():\n    return pf.items([1]).map({}['x'])\n": r"KeyError: 'x'",
        "import parflow as pf\n@pf.workflow\ndef flow():\n    return 1\n": r"workflow 'flow' returned 1; return lazy values",
    }.items():
        flow.write_text(source)
        done = shell("run", flow, code=1)
        assert re.search(message, done.err)
        assert "parflow/cli.py" not in done.err
        assert "parflow/api" not in done.err


def test_a_process_that_crashes_is_told_in_words(shell: Shell, tmp_path: Path) -> None:
    source = text_of(tmp_path, "good\nbad\nbetter\n")
    failed = shell(*shell.flow("crashing", "--source", source), code=1)
    assert re.search(r"1 of 3 records failed.*signal 11 \(SIGSEGV\)", failed.err)
    assert [letter["cause"] for letter in shell.json("failures")] == ["crash"]
    assert shell.json("resume", "--max-failures", 1)["result"] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_of_each_command(shell: Shell, command: str) -> None:
    assert re.search(rf"^  parflow {command}\b", shell(command, "-h").out, re.MULTILINE)


def test_help_lists_all_commands_with_examples(shell: Shell) -> None:
    text = shell("-h").out
    assert shell("--help").out == text
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w", text, re.MULTILINE)
    assert "parflow run recipes/wordcount.py --source 'texts/**/*.txt' --workers 2" in text
    assert re.fullmatch(r".*, version \d+\.\d+\.\d+\n", shell("--version").out)

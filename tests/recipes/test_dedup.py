"""The recipe dedup.py, on reviews and copies of them."""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parflow.errors import StepError

recipe: Any = importlib.import_module("dedup")

CLEAR, FAR = 0.88, 0.6
"""No two of the reviews are as similar as this or less than that: what is a near-duplicate at 0.8 is no matter of chance."""


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(zip(words, words[1:], words[2:], strict=False))


@pytest.fixture(scope="module")
def source(data: Path) -> str:
    return str(data / "reviews*.jsonl")


@pytest.fixture(scope="module")
def reviews(data: Path) -> list[dict[str, Any]]:
    names = ("reviews.jsonl", "reviews_copied.jsonl")
    return [json.loads(line) for name in names for line in (data / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def alike(reviews: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Return the exact similarity of each two reviews that share a shingle at all."""
    of = {review["id"]: shingles(review["text"]) for review in reviews}
    having = defaultdict(list)
    for name, parts in of.items():
        for part in parts:
            having[part].append(name)
    pairs = {pair for names in having.values() for pair in itertools.combinations(names, 2)}
    return {(a, b): len(of[a] & of[b]) / len(of[a] | of[b]) for a, b in pairs}


@pytest.fixture(scope="module")
def truth(alike: dict[tuple[str, str], float]) -> dict[str, str]:
    """Return each review that is a near-duplicate, and the first of its kind; pairs are in input order."""
    originals = [pair for pair, similarity in alike.items() if similarity >= CLEAR and pair[0].startswith("shop")]
    return {copy: original for original, copy in originals}


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_the_reviews_are_a_clear_case(alike: dict[tuple[str, str], float], truth: dict[str, str]) -> None:
    assert not [pair for pair, similarity in alike.items() if FAR < similarity < CLEAR]
    assert sorted(truth) == sorted(name for name in truth if name.startswith(("edited-", "again-", "shouted-")))
    assert len(truth) == 30


@pytest.mark.parametrize("workers", [1, 2])
def test_all_near_duplicates_are_found_and_nothing_else(
    source: str, tmp_path: Path, truth: dict[str, str], workers: int
) -> None:
    found = recipe.duplicates(source).run(home=tmp_path / "home", workers=workers).result()
    right = sum(truth.get(repeat["id"]) == repeat["first"] for repeat in found)
    precision, recall = right / len(found), right / len(truth)
    assert (precision, recall) == (1.0, 1.0)


def test_only_those_that_share_a_band_are_compared_and_that_changes_nothing(
    source: str, tmp_path: Path, reviews: list[dict[str, Any]]
) -> None:
    run = recipe.duplicates(source).run(home=tmp_path / "home", workers=2)
    signed = [recipe.sign.function(review, "id") for review in reviews]
    assert run.result() == recipe.group(signed, 0.8)
    met = Counter(band for signature in signed for band in set(recipe.bands(signature)))
    suspects = [signature for signature in signed if any(met[band] > 1 for band in recipe.bands(signature))]
    assert 60 <= len(suspects) < 200
    assert recipe.group(suspects, 0.8) == run.result()


def test_similarities_are_estimated_well(source: str, tmp_path: Path, alike: dict[tuple[str, str], float]) -> None:
    found = recipe.duplicates(source).run(home=tmp_path / "home").result()
    errors = [abs(repeat["similarity"] - alike[repeat["first"], repeat["id"]]) for repeat in found]
    assert max(errors) < 0.1
    assert sum(errors) / len(errors) < 0.04


def test_the_result_does_not_depend_on_how_the_input_is_cut(data: Path, source: str, tmp_path: Path) -> None:
    whole = recipe.duplicates(source).run(home=tmp_path / "home").result()
    lines = [line for name in ("reviews.jsonl", "reviews_copied.jsonl") for line in (data / name).read_text().splitlines()]
    for number, start in enumerate(range(0, len(lines), 100)):
        (tmp_path / f"{number:02}.jsonl").write_text("\n".join(lines[start : start + 100]))
    assert recipe.duplicates(str(tmp_path / "*.jsonl")).run(home=tmp_path / "home", workers=2).result() == whole


def test_the_first_of_each_group_is_written_and_so_is_the_list_of_the_rest(
    source: str, tmp_path: Path, reviews: list[dict[str, Any]], truth: dict[str, str]
) -> None:
    run = recipe.dedup(source, str(tmp_path / "out")).run(home=tmp_path / "home", workers=2)
    assert run.result() == {"near-duplicates": len(truth), "documents kept": len(reviews) - len(truth)}
    assert read(tmp_path / "out/unique") == [review for review in reviews if review["id"] not in truth]
    assert {repeat["id"]: repeat["first"] for repeat in read(tmp_path / "out/duplicates")} == truth
    assert read(tmp_path / "out/duplicates") == recipe.duplicates(source).run(home=tmp_path / "home").result()


def test_of_a_chain_of_copies_the_first_one_is_kept(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(200)]
    texts = [" ".join(words[shift : shift + 100]) for shift in (0, 5, 10, 15, 20)]  # each is 0.9 like the next one
    source = write(tmp_path / "a.jsonl", [{"id": str(number), "text": text} for number, text in enumerate(texts)])
    found = recipe.duplicates(source).run(home=tmp_path / "home").result()
    assert [(repeat["id"], repeat["first"]) for repeat in found] == [(name, "0") for name in "1234"]
    assert found[-1]["similarity"] < 0.8


def write(file: Path, documents: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(file)


def test_documents_without_words_repeat_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"id": "scan", "text": ""}, {"id": "too", "text": " … "}, {"id": "a", "text": "hi"}])
    assert recipe.duplicates(source).run(home=tmp_path / "home").result() == []


def test_documents_of_a_word_or_two_are_compared_whole(tmp_path: Path) -> None:
    texts = ["Thank you", "thank you!", "Thank me", "you"]
    source = write(tmp_path / "a.jsonl", [{"path": text, "text": text} for text in texts])
    found = recipe.duplicates(source, key="path").run(home=tmp_path / "home").result()
    assert found == [{"id": "thank you!", "first": "Thank you", "similarity": 1.0}]


def test_documents_without_text_are_dead_letters_and_are_kept(tmp_path: Path) -> None:
    documents: list[dict[str, Any]] = [{"id": 1, "text": "some words here"}, {"id": 2}, {"id": 3, "text": "Some words: here"}]
    source = write(tmp_path / "a.jsonl", documents)
    run = recipe.dedup(source, str(tmp_path / "out")).run(home=tmp_path / "home", max_failures=1)
    assert run.result() == {"near-duplicates": 1, "documents kept": 2}
    assert [(failure.step, failure.error) for failure in run.dead_letters()] == [("sign", "KeyError")]
    assert read(tmp_path / "out/unique") == documents[:2]


@pytest.mark.parametrize(
    "documents",
    [[(1, "one text"), (1, "another one")], [(1, "one text"), (2, "One text"), (2, "another one")], [(1, ""), (1, "")]],
    ids=["unlike", "a copy's", "empty"],
)
def test_ids_that_occur_twice_stop_the_run_before_anything_is_dropped(documents: list[tuple[int, str]], tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"id": name, "text": text} for name, text in documents])
    run = recipe.dedup(source, str(tmp_path / "out")).run(home=tmp_path / "home")
    with pytest.raises(StepError, match="ids occur more than once"):
        run.result()
    assert not list((tmp_path / "out").glob("*/*.jsonl"))


def test_a_long_text_is_signed_as_a_short_one_is() -> None:
    words = [f"w{number}" for number in range(10_000)]  # more shingles than are hashed at once
    sign = recipe.sign
    (_, whole), (_, most) = (sign({"id": 1, "text": " ".join(words[:end])}, "id") for end in (10_000, 9_000))
    assert abs(recipe.similarity(whole, most) - 0.9) < 0.1


def test_the_command_line_prints_the_near_duplicates(truth: dict[str, str], command: Callable[..., str]) -> None:
    words = ["run", "recipes/dedup.py:duplicates", "--source", "tests/recipes/data/reviews*.jsonl", "--json"]
    printed = json.loads(command("-m", "parflow.cli", *words))
    assert {repeat["id"]: repeat["first"] for repeat in printed["result"]} == truth

"""The recipe sentiment.py, on a thousand reviews."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import parflow as pf
from parflow.errors import TooManyFailuresError

sentiment: pf.Workflow = importlib.import_module("sentiment").sentiment
vader: Any = importlib.import_module("vaderSentiment.vaderSentiment")  # it has no types


@pytest.fixture(scope="module")
def reviews(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "reviews.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scores(reviews: list[dict[str, Any]]) -> list[float]:
    """Score the reviews one after the other, without parflow."""
    model = vader.SentimentIntensityAnalyzer()
    return [model.polarity_scores(review["text"])["compound"] for review in reviews]


def expected(scores: list[float]) -> dict[str, Any]:
    mean = float(sum(map(Fraction, scores)) / len(scores))
    share = sum(score <= -0.05 for score in scores) / len(scores)
    return {"documents": len(scores), "mean": mean, "negative": share, "report": f"all quiet: {share:.1%} are negative"}


@pytest.mark.parametrize("workers", [1, 2])
def test_mean_and_share_are_those_of_a_plain_loop(data: Path, tmp_path: Path, scores: list[float], workers: int) -> None:
    run = sentiment(str(data / "reviews.jsonl"), str(tmp_path / "out")).run(home=tmp_path / "home", workers=workers)
    assert len(scores) == 1000
    assert run.result() == expected(scores)
    assert run.dead_letters() == []


def ran(run: pf.Run) -> tuple[set[str], list[int]]:
    """Name the calls that a run made, and tell how many records each of its stages went through."""
    state = run.state
    return {state.tasks[call.facts.task].name for call in state.calls if call.ended}, [stage.records for stage in state.stages]


def test_when_all_is_quiet_nothing_is_alerted_and_nobody_looks_for_the_worst(data: Path, tmp_path: Path) -> None:
    run = sentiment(str(data / "reviews.jsonl"), str(tmp_path / "out"), 0.254).run(home=tmp_path / "home", workers=2)
    assert run.result()["report"] == "all quiet: 25.4% are negative"
    assert ran(run) == ({"gt", "when", "archive"}, [1000, 0])


def test_more_negative_ones_than_the_alarm_raise_it_and_nothing_is_archived(
    data: Path, tmp_path: Path, reviews: list[dict[str, Any]], scores: list[float]
) -> None:
    run = sentiment(str(data / "reviews.jsonl"), str(tmp_path / "out"), 0.253).run(home=tmp_path / "home", workers=2)
    worst = sorted(range(1000), key=lambda place: scores[place])[:3]
    assert run.result()["report"] == {
        "alarm": "25.4% are negative",
        "worst": [f"{scores[place]:+.2f} {reviews[place]['id']}: {reviews[place]['text'][:60]}" for place in worst],
    }
    assert ran(run) == ({"gt", "when", "alert"}, [1000, 1000])


def test_every_score_is_written_as_parquet_in_input_order(
    data: Path, tmp_path: Path, reviews: list[dict[str, Any]], scores: list[float]
) -> None:
    sentiment(str(data / "reviews.jsonl"), str(tmp_path / "out")).run(home=tmp_path / "home").result()
    written = pd.concat(pd.read_parquet(file) for file in sorted((tmp_path / "out").glob("*.parquet")))
    assert written["id"].tolist() == [review["id"] for review in reviews]
    assert written["score"].tolist() == scores
    assert written["negative"].tolist() == [score <= -0.05 for score in scores]


def test_people_agree_with_the_scores(data: Path, tmp_path: Path, reviews: list[dict[str, Any]]) -> None:
    sentiment(str(data / "reviews.jsonl"), str(tmp_path / "out")).run(home=tmp_path / "home").result()
    written = pd.concat(pd.read_parquet(file) for file in sorted((tmp_path / "out").glob("*.parquet")))
    ratings = pd.DataFrame(reviews).merge(written, on="id").groupby("negative")["rating"].mean()
    assert ratings[True] < -0.5 < 0 < ratings[False]


BAD = ['{"id": "cut", "text": "goo', '{"id": "none", "text": null}', '{"id": "other", "words": "good"}']


@pytest.fixture
def broken(data: Path, tmp_path: Path) -> str:
    """Put lines that are no reviews among the first ten that are."""
    lines = (data / "reviews.jsonl").read_text().splitlines()[:10]
    (tmp_path / "broken.jsonl").write_text("\n".join([*lines[:5], *BAD, *lines[5:]]))
    return str(tmp_path / "broken.jsonl")


def test_lines_that_are_no_reviews_are_set_aside(broken: str, tmp_path: Path, scores: list[float]) -> None:
    run = sentiment(broken, str(tmp_path / "out")).run(home=tmp_path / "home", max_failures=3)
    assert run.result() == expected(scores[:10])
    cut, none, other = run.dead_letters()
    assert (cut.step, cut.cause, cut.error) == ("read", "input", "NotJSONError")
    assert (none.step, none.error, none.message) == ("Scorer", "TypeError", "text is None")
    assert (other.step, other.error, other.message) == ("Scorer", "KeyError", "'text'")
    assert cut.record.startswith(broken)


def test_ids_become_text_whatever_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "good"}\n{"id": 5, "text": "bad"}\n')
    assert sentiment(str(tmp_path / "a.jsonl"), str(tmp_path / "out")).run(home=tmp_path / "home").result()["negative"] == 0.5
    assert pd.read_parquet(tmp_path / "out")["id"].tolist() == ["a", "5"]


def test_nobody_gets_a_share_that_leaves_reviews_out_unasked(broken: str, tmp_path: Path) -> None:
    run = sentiment(broken, str(tmp_path / "out")).run(home=tmp_path / "home", max_failures=2)
    with pytest.raises(TooManyFailuresError, match="3 of 13 records failed"):
        run.result()
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_the_command_line_prints_the_same(data: Path, tmp_path: Path, scores: list[float], command: Callable[..., str]) -> None:
    words = [
        "run",
        "recipes/sentiment.py:sentiment",
        "--source",
        "tests/recipes/data/reviews.jsonl",
        "--workers",
        "2",
        "--json",
    ]
    printed = json.loads(command("-m", "parflow.cli", *words))
    assert printed["status"] == "succeeded"
    assert printed["result"] == expected(scores)
    files = list((tmp_path / "out/sentiment").glob("*.parquet"))
    assert len(files) >= 8  # one a chunk: there is work for every worker

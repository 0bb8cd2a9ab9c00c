"""Score the sentiment of many documents, keep every score, and raise the alarm when too many are negative.

Run it with `parflow run recipes/sentiment.py --source 'reviews/*.jsonl' --workers 2`; it needs `pip install vaderSentiment`.
"""

from __future__ import annotations

from typing import Any

import parflow as pf

NEGATIVE = -0.05
"""VADER's own bound: a compound score at or below it is negative."""

WORST, BEGINNING = 3, 60
"""How many documents an alarm shows, and how many characters of each."""


@pf.task(timeout="30s")
class Scorer:
    """A sentiment model. It's built once in each child, since its lexicon takes longer to load than a document to score."""

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.model = SentimentIntensityAnalyzer()

    def __call__(self, doc: dict[str, Any]) -> dict[str, Any]:
        """Return a document's score, from -1 to 1; one without text is a dead letter, not a neutral one."""
        if not isinstance(doc["text"], str):
            raise TypeError(f"text is {doc['text']!r}")
        score = self.model.polarity_scores(doc["text"])["compound"]
        return {"id": str(doc["id"]), "score": score, "negative": score <= NEGATIVE, "begins": doc["text"][:BEGINNING]}


def badness(row: dict[str, Any]) -> float:
    """Rank the worst document first."""
    return -float(row["score"])


@pf.task
def alert(share: float, worst: list[dict[str, Any]]) -> dict[str, Any]:
    """Report what somebody should look at; the place to send a mail or open a ticket."""
    shown = [f"{row['score']:+.2f} {row['id']}: {row['begins']}" for row in worst]
    return {"alarm": f"{share:.1%} are negative", "worst": shown}


@pf.task
def archive(share: float) -> str:
    """Say that there is nothing to do."""
    return f"all quiet: {share:.1%} are negative"


@pf.workflow
def sentiment(source: str, out: str = "out/sentiment", alarm: float = 0.3) -> Any:
    """Score the documents of JSON Lines (``id`` and ``text``), write the scores to ``out``, and return what they come to.

    When more than the share ``alarm`` is negative, the report shows the worst. Scoring is slow beside reading, so chunks are
    small: there is work for every worker, and little to repeat.
    """
    scored = pf.read_jsonl(source, chunk_bytes="32KiB").map(Scorer)
    scored.write_parquet(out)
    share = scored.reduce(pf.mean("negative"), name="negative")
    worst = scored.reduce(pf.top(WORST, badness))  # belongs to the alarm alone: it's not looked for when all is quiet
    return {
        "documents": scored.reduce(pf.count()),
        "mean": scored.reduce(pf.mean("score")),
        "negative": share,
        "report": pf.when(share > alarm, alert(share, worst), archive(share)),
    }

"""Score the sentiment of many documents, keep every score, and say how many are negative.

Run it with `parflow run recipes/sentiment.py --source 'reviews/*.jsonl' --workers 2`; it needs `pip install vaderSentiment`.
"""

from __future__ import annotations

from typing import Any

import parflow as pf

NEGATIVE = -0.05
"""VADER's own bound: a compound score at or below it is negative."""


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
        return {"id": str(doc["id"]), "score": score, "negative": score <= NEGATIVE}


@pf.workflow
def sentiment(source: str, out: str = "out/sentiment") -> Any:
    """Score the documents of JSON Lines (``id`` and ``text``), write the scores to ``out`` and return what they come to.

    Scoring is slow beside reading, so chunks are small: there is work for every worker, and little to repeat.
    """
    scored = pf.read_jsonl(source, chunk_bytes="32KiB").map(Scorer)
    scored.write_parquet(out)
    share = scored.reduce(pf.mean("negative"), name="negative")
    # The place for a decision on `share`, once both outcomes have a step: pf.when(share > alarm, alert(share), archive(share))
    return {"documents": scored.reduce(pf.count()), "mean": scored.reduce(pf.mean("score")), "negative": share}

"""The documents that the benchmarks read: 20,000 in 40 JSONL files of skewed sizes, 200 MB, the same for the same seed.

The words and their frequencies are those of the Python standard library's source text on this machine.
"""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SEED = 20261125
DOCUMENTS = 20_000
FILES = 40
BYTES = 10_000
"""Mean size of a document."""

LANGUAGES = ("en",) * 16 + ("de", "fr", "es", "ja")
WORDS = 2_500
"""Size of the vocabulary."""

ACCENTS = ("café", "naïve", "Übergröße", "señor", "ﬁnal", "Straße", "façade", "übrig", "déjà", "Ångström", "東京", "ｗｉｄｅ")
"""What other languages than English bring: work for the normal form."""


def files(documents: int = DOCUMENTS) -> list[str]:
    """Return the paths of the corpus, in name order; make it first if it isn't there."""
    folder = DATA / f"documents-{documents}-{SEED}"
    if not folder.exists():
        print(f"making {documents:,} documents in {folder.relative_to(HERE.parent)} (once)", flush=True)
        aside = folder.with_name(folder.name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(aside, documents)
        aside.rename(folder)
    return sorted(str(path) for path in folder.glob("*.jsonl"))


def pattern(documents: int = DOCUMENTS) -> str:
    """Return the corpus as a pattern; make it first if it isn't there."""
    return str(Path(files(documents)[0]).with_name("*.jsonl"))


def _write(folder: Path, documents: int) -> None:
    random = np.random.default_rng(SEED)
    texts = _texts(random)
    shares = (1.0 + np.arange(FILES)) ** -0.8
    random.shuffle(shares)
    bounds = np.rint(np.concatenate([[0.0], np.cumsum(shares / shares.sum())]) * documents).astype(int)
    for number in range(FILES):
        with open(folder / f"part-{number:02}.jsonl", "wb") as file:
            docs = (_document(i, next(texts), random) for i in range(bounds[number], bounds[number + 1]))
            file.writelines(orjson.dumps(doc, option=orjson.OPT_APPEND_NEWLINE) for doc in docs)


def _document(index: int, text: str, random: np.random.Generator) -> dict[str, Any]:
    lang = LANGUAGES[int(random.integers(len(LANGUAGES)))]
    if lang != "en":
        sentences = enumerate(text.split(". "), index)
        text = ". ".join(f"{sentence} {ACCENTS[number % len(ACCENTS)]}" for number, sentence in sentences)
    day = date(2015, 1, 1) + timedelta(days=int(random.integers(4000)))
    return {
        "id": f"doc-{index:06}",
        "url": f"https://example.org/{day.year}/{index:06}",
        "title": text[:60].rpartition(" ")[0],
        "text": text,
        "lang": lang,
        "date": day.isoformat(),
        "source": {"crawl": f"{day.year}-{day.month:02}", "status": 200, "bytes": len(text)},
        "tags": [f"t{int(tag)}" for tag in random.integers(0, 50, 3)],
    }


def _texts(random: np.random.Generator) -> Iterator[str]:
    """Yield texts of log-normal length without end: sentences in paragraphs."""
    words, weights = _vocabulary()
    ladder = np.cumsum(weights / weights.sum())
    ladder[-1] = 1.0
    sigma, word_bytes = 0.8, float(np.dot(weights / weights.sum(), [len(word.encode()) for word in words])) + 1.2
    mean = np.log(BYTES / word_bytes) - sigma**2 / 2
    while True:
        length = max(20, int(random.lognormal(mean, sigma)))
        chosen = words[np.searchsorted(ladder, random.random(length))].tolist()
        ends = np.cumsum(random.integers(4, 24, length // 4 + 2))
        start, sentences = 0, []
        for end in ends[: int(np.searchsorted(ends, length)) + 1].tolist():
            sentence = " ".join(chosen[start:end])
            sentences.append(sentence[:1].upper() + sentence[1:] + (".\n\n" if end % 7 == 0 else ". "))
            start = end
        yield "".join(sentences)


def _vocabulary() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the words of the standard library's sources and how often each occurs there."""
    counts: Counter[str] = Counter()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"site-packages", "encodings", "test", "tests"} & set(path.parts):
            counts.update(re.findall(r"\b[A-Za-z]{7,}\b", path.read_text("utf-8", "replace")))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:WORDS]
    return np.array([word for word, _ in ranked], dtype=object), np.array([count for _, count in ranked], dtype=float)

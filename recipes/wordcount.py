"""Count the words of many texts, and let no bad file stop the rest.

Run it with `parflow run recipes/wordcount.py --source 'texts/**/*.txt' --workers 2`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import parflow as pf

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@pf.task(timeout="30s")
def words(doc: pf.Document) -> Iterator[str]:
    """Yield the words of a text, in any script: letters, with apostrophes inside, whatever their case.

    >>> from types import SimpleNamespace
    >>> list(words(SimpleNamespace(text="O Romeo, Romeo! Wherefore art thou… d'Été?")))
    ['o', 'romeo', 'romeo', 'wherefore', 'art', 'thou', "d'été"]
    """
    return (match[0].casefold() for match in WORD.finditer(doc.text))


@pf.workflow
def wordcount(source: str) -> Any:
    """Return how often each word occurs in the files that match ``source``, most frequent first."""
    return pf.read_files(source).flat_map(words).reduce(pf.counter())

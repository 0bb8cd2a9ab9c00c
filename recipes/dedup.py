"""Drop near-duplicate documents: of each group the first is kept.

Run it with `parflow run recipes/dedup.py:dedup --source 'texts/*.jsonl' --out out --workers 2`, or only look with
`parflow run recipes/dedup.py:duplicates --source 'texts/*.jsonl' --workers 2`.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import re
from typing import Any

import numpy as np

import parflow as pf

WORDS = 3
"""Words in a shingle: two texts are as similar as the share of shingles that they have in common (Jaccard)."""

BANDS, ROWS = 32, 4
"""Two texts are compared if all rows of a band are equal: sure (over 0.999) from a similarity of 0.7 on, rare below 0.2."""

MIX = np.random.default_rng(1).integers(1, 2**64, (2, BANDS * ROWS), dtype=np.uint64)
FACTORS, OFFSETS = MIX[0] | np.uint64(1), MIX[1]

Signature = tuple[str, bytes]
"""A document's id, and of each of 128 hashes the least value that its shingles have, as 4 bytes."""

Repeat = dict[str, Any]
"""A document's ``id``, the ``first`` one of its group, and how similar they are (``similarity``)."""


@pf.task(timeout="1min")
def sign(doc: dict[str, Any], key: str) -> Signature:
    """Return a document's MinHash signature: as many equal places as the similarity says, on average."""
    words = re.findall(r"\w+", doc["text"].lower())
    if not words:
        return str(doc[key]), b""  # such as scanned pages: they repeat nothing
    shingles = {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest() for text in sorted(shingles))
    hashes = np.frombuffer(digests, "<u8")
    least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max)
    for part in np.array_split(hashes, len(hashes) // 4096 + 1):  # a book's shingles times 128 need not be in memory at once
        least = np.minimum(least, (part[:, None] * FACTORS + OFFSETS).min(axis=0))
    return str(doc[key]), (least >> np.uint64(32)).astype("<u4").tobytes()


def bands(signed: Signature) -> list[bytes]:
    """Return a signature's bands, each behind its number; and the id, so that namesakes meet as well, and are found out."""
    name, signature = signed
    width = ROWS * 4
    split = [bytes([at // width]) + signature[at : at + width] for at in range(0, len(signature), width)]
    return [*split, bytes([BANDS]) + name.encode("utf-8", "surrogatepass")]


def is_shared(band: dict[str, Any]) -> bool:
    """Tell whether more than one document has a band."""
    return bool(band["count"] > 1)


def shares(signed: Signature, shared: set[bytes]) -> bool:
    """Tell whether a document has a band that another one has too."""
    return not shared.isdisjoint(bands(signed))


def similarity(one: bytes, other: bytes) -> float:
    """Estimate how similar two documents are from their signatures; it's off by 0.04 on average."""
    return float(np.mean(np.frombuffer(one, "<u4") == np.frombuffer(other, "<u4")))


def group(signed: list[Signature], threshold: float) -> list[Repeat]:
    """Return each document that repeats an earlier one, beside the first of its group, in input order."""
    if len({name for name, _ in signed}) < len(signed):
        raise ValueError("ids occur more than once: dropping a copy would drop its namesake too")
    first = list(range(len(signed)))  # of each document, an earlier one of its group, or itself

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = i = first[first[i]]
        return i

    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = {}  # of each bucket one document a group: ten thousand copies cost no more than two
        for i, (_, signature) in enumerate(signed):
            if not signature:
                continue
            bucket = buckets.setdefault(signature[band * ROWS * 4 : (band + 1) * ROWS * 4], [])
            for j in bucket:
                if root(i) == root(j) or similarity(signature, signed[j][1]) >= threshold:
                    low, high = sorted((root(i), root(j)))
                    first[high] = low
                    break
            else:
                bucket.append(i)
    return [
        {"id": signed[i][0], "first": signed[root(i)][0], "similarity": similarity(signed[i][1], signed[root(i)][1])}
        for i in range(len(signed))
        if root(i) != i
    ]


def groups(threshold: float) -> pf.Reducer:
    """Gather signatures in input order (0.5 kB a document, not the documents), and group them at the end."""

    def add(gathered: list[Signature], signature: Signature) -> list[Signature]:
        gathered.append(signature)
        return gathered

    return pf.reducer(list, add, operator.add, functools.partial(group, threshold=threshold), name="duplicates")


@pf.task
def by_id(repeats: list[Repeat]) -> dict[str, Repeat]:
    """Look repeats up by their documents' ids."""
    return {repeat["id"]: repeat for repeat in repeats}


def is_first(doc: dict[str, Any], repeats: dict[str, Repeat], key: str) -> bool:
    """Tell whether a document repeats none."""
    return str(doc[key]) not in repeats


def repeat_of(doc: dict[str, Any], repeats: dict[str, Repeat], key: str) -> list[Repeat]:
    """Return what a document repeats, if it does."""
    return [] if is_first(doc, repeats, key) else [repeats[str(doc[key])]]


@pf.workflow
def duplicates(source: str, key: str = "id", threshold: float = 0.8) -> Any:
    """Return the near-duplicates among the documents of JSON Lines (``key`` and ``text``), each with what it repeats.

    A document that shares no band with another is compared with none. So bands are counted, bucket by bucket in parallel,
    and only the signatures that share one meet in one place.
    """
    signed = pf.read_jsonl(source, chunk_bytes="1MiB").map(sign, key)
    counted = signed.flat_map(bands).reduce_by(None, pf.count(), columns=("band", "count"))
    shared = pf.call(set, counted.filter(is_shared).map(operator.itemgetter("band"), name="band"))
    return signed.filter(shares, shared).reduce(groups(threshold))


@pf.workflow
def dedup(source: str, out: str = "out", key: str = "id", threshold: float = 0.8) -> Any:
    """Write the documents that repeat none to ``out/unique``, and the list of those that do to ``out/duplicates``."""
    repeats = by_id(duplicates(source, key, threshold))
    documents = pf.read_jsonl(source)
    unique = documents.filter(is_first, repeats, key).write_jsonl(f"{out}/unique")
    repeated = documents.flat_map(repeat_of, repeats, key).write_jsonl(f"{out}/duplicates")
    return {"near-duplicates": repeated["rows"], "documents kept": unique["rows"]}

"""Which sentences carry a document: continuous LexRank, without models or downloads.

Algorithm: G. Erkan and D. R. Radev, "LexRank: Graph-based Lexical Centrality as Salience in Text
Summarization", JAIR 22 (2004): sentences are nodes, their idf-modified cosine is the weight of an
edge, and a sentence is central when central sentences resemble it (the power method of PageRank,
damping 0.85). Words are reduced with Snowball's English stemmer; other languages are ranked too,
with coarser word matching. Near repetitions are dropped as in MMR (Carbonell and Goldstein, 1998).
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from app.adapters.capabilities.text_lines import word_set

CANDIDATES_MAX = 600
_DAMPING = 0.85
_ROUNDS_MAX = 60
_TOLERANCE = 1e-6
_EDGE_MIN = 0.05
_REPETITION = 0.6

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W\d_]+)?")

STOPWORDS = word_set(
    """a about above after again against all also am an and any are as at be because been before
    being below between both but by can cannot could did do does doing down during each else every
    few for from further had has have having he her here hers him his how i if in into is it its
    itself just may me might more most must my never no nor not now of off on once one only or other
    our out over own per same shall she should since so some such than that the their them then
    there these they this those through to too under until up upon us very was we were what when
    where whether which while who whom whose why will with within without would yet you your
    """
)


def words_of(text: str) -> list[str]:
    """The words and numbers of a text in lower case; punctuation and markup drop out."""
    return _WORD.findall(text.lower())


# A stemmer keeps the word at hand in itself, and builtins run in threads: one for each thread.
_here = threading.local()


def _stemmer() -> Callable[[str], str]:
    if not hasattr(_here, "stem"):
        # Loaded at first use: one of some thirty languages is needed, and only here.
        from snowballstemmer import stemmer  # type: ignore[import-untyped]  # noqa: PLC0415

        _here.stem = lru_cache(maxsize=5_000)(stemmer("english").stemWord)
    stem: Callable[[str], str] = _here.stem
    return stem


def terms_of(text: str) -> list[str]:
    """The stems of the words that mean something: no stop words, no single letters."""
    stem = _stemmer()
    return [stem(word) for word in words_of(text) if word not in STOPWORDS and len(word) > 1]


@dataclass(frozen=True, slots=True)
class Ranked:
    """The place of a sentence in the given list and its score, 0 to 1."""

    index: int
    score: float


def rank(texts: Sequence[str], priors: Sequence[float], count_max: int) -> list[Ranked]:
    """The best texts first, at most `count_max`, without near repetitions.

    `priors` weighs each text from outside (place, form); 0 leaves it out. Deterministic: ties keep
    the order of the document.
    """
    bags = [
        Counter(terms_of(text)) if prior > 0 else Counter()
        for text, prior in zip(texts, priors, strict=True)
    ]
    idf = _idf(bags)
    vectors = _candidates(bags, idf)
    if not vectors:
        return []
    centrality = _centrality(_edges(vectors))
    scored = {index: centrality[index] * priors[index] for index in vectors}
    best = max(scored.values())
    order = sorted(scored, key=lambda index: (-round(scored[index] / best, 6), index))
    chosen: list[Ranked] = []
    for index in order:
        if len(chosen) == count_max:
            break
        if all(_cosine(vectors[index], vectors[kept.index]) < _REPETITION for kept in chosen):
            chosen.append(Ranked(index, round(scored[index] / best, 4)))
    return chosen


def _idf(bags: Sequence[Counter[str]]) -> dict[str, float]:
    used = [bag for bag in bags if bag]
    holders: Counter[str] = Counter()
    for bag in used:
        holders.update(bag.keys())
    return {term: math.log(1 + len(used) / count) for term, count in holders.items()}


def _candidates(bags: Sequence[Counter[str]], idf: dict[str, float]) -> dict[int, dict[str, float]]:
    """Unit vectors by index. Of very many those nearest to the centroid stay."""
    vectors: dict[int, dict[str, float]] = {}
    centroid: defaultdict[str, float] = defaultdict(float)
    for index, bag in enumerate(bags):
        if not bag:
            continue
        weights = {term: count * idf[term] for term, count in bag.items()}
        norm = math.sqrt(sum(weight * weight for weight in weights.values()))
        vectors[index] = {term: weight / norm for term, weight in weights.items()}
        for term, weight in vectors[index].items():
            centroid[term] += weight
    if len(vectors) <= CANDIDATES_MAX:
        return vectors

    def nearness(index: int) -> tuple[float, int]:
        vector = vectors[index]
        return (-round(sum(weight * centroid[term] for term, weight in vector.items()), 9), index)

    kept = sorted(sorted(vectors, key=nearness)[:CANDIDATES_MAX])
    return {index: vectors[index] for index in kept}


def _cosine(one: dict[str, float], other: dict[str, float]) -> float:
    if len(other) < len(one):
        one, other = other, one
    return sum(weight * other[term] for term, weight in one.items() if term in other)


def _edges(vectors: dict[int, dict[str, float]]) -> dict[int, dict[int, float]]:
    """The weighted neighbours of each sentence, found over the terms that two of them share."""
    holders: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    edges: dict[int, dict[int, float]] = {index: {} for index in vectors}
    for index, vector in vectors.items():
        shared: defaultdict[int, float] = defaultdict(float)
        for term, weight in vector.items():
            for other, other_weight in holders[term]:
                shared[other] += weight * other_weight
            holders[term].append((index, weight))
        for other, weight in shared.items():
            if weight >= _EDGE_MIN:
                edges[index][other] = edges[other][index] = weight
    return edges


def _centrality(edges: dict[int, dict[int, float]]) -> dict[int, float]:
    """PageRank by the power method; a sentence without neighbours spreads its rank evenly."""
    count = len(edges)
    totals = {index: sum(near.values()) for index, near in edges.items()}
    ranks = dict.fromkeys(edges, 1 / count)
    for _ in range(_ROUNDS_MAX):
        loose = sum(ranks[index] for index, total in totals.items() if not total)
        base = (1 - _DAMPING + _DAMPING * loose) / count
        flow = {index: ranks[index] / total if total else 0 for index, total in totals.items()}
        following = {
            index: base + _DAMPING * sum(weight * flow[other] for other, weight in near.items())
            for index, near in edges.items()
        }
        change = sum(abs(following[index] - ranks[index]) for index in edges)
        ranks = following
        if change < _TOLERANCE:
            break
    return ranks

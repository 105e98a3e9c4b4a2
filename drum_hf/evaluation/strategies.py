"""Every way to choose demonstrations behind one interface, so that a table compares nothing but the choice."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import regex

from ..data import TripletTable
from ..selection import Selector, get_selector
from ..types import Query
from ..utils.optional import require
from ..utils.text import normalize_text

if TYPE_CHECKING:
    from ..retriever.retriever import DemoRetriever
    from ..scores.feedback import Feedback

__all__ = [
    "BM25",
    "MMICES",
    "Fixed",
    "Random",
    "Retrieved",
    "SameAnswerOracle",
    "ScoreOracle",
    "Strategy",
    "ZeroShot",
]


class Strategy(Protocol):
    """Chooses demonstrations for queries.

    Attributes:
        name: as tables and the command line know it.
    """

    name: str

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        """At most `k` ids for each query, most useful first; never the query itself nor its group."""
        ...


def _eligible(support: TripletTable, query: Query) -> list[str]:
    """Ids that may demonstrate `query`, in row order."""
    return [
        i
        for i, group in zip(support.ids, support.groups, strict=True)
        if i != query.id and (group is None or group != query.group)
    ]


class ZeroShot:
    """No demonstration."""

    name = "zero-shot"

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        return [[] for _ in queries]


class Random:
    """RS: demonstrations drawn at random for each query."""

    name = "random"

    def __init__(self, support: TripletTable, seed: int = 0) -> None:
        self.support, self.seed = support, seed

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        rng = np.random.default_rng([self.seed, 1])
        chosen = []
        for query in queries:
            eligible = _eligible(self.support, query)
            # a permutation's first k: the four-shot draw begins with the one-shot draw
            chosen.append([eligible[i] for i in rng.permutation(len(eligible))[:k]])
        return chosen


class Fixed:
    """The same demonstrations, drawn once, for every query."""

    name = "fixed"

    def __init__(self, support: TripletTable, seed: int = 0) -> None:
        self.support = support
        self.order = np.random.default_rng([seed, 2]).permutation(len(support))

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        ids = [self.support.ids[i] for i in self.order]
        return [
            [i for i in ids if i in eligible][:k] for eligible in (set(_eligible(self.support, q)) for q in queries)
        ]


class Retrieved:
    """What a `DemoRetriever` finds: SI, ST, SIT, SIT + draft, and everything that was trained.

    Args:
        name: as tables know it.
        retriever: it has a support set of its own.
        selector: chooses among what was found; a name (see `get_selector`) or a selector. None: the best-ranked.

    Raises:
        ValueError: an unknown selector.
    """

    def __init__(self, name: str, retriever: DemoRetriever, *, selector: str | Selector | None = None) -> None:
        self.name, self.retriever = name, retriever
        self.selector = None if selector is None else get_selector(selector)

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        return self.retriever.retrieve_ids(queries, min(k, len(self.retriever)), selector=self.selector)[0]


class MMICES:
    """The most similar images, re-ranked by the similarity of their prompts to the query's.

    Equal prompts stay in the order of their images. Source: MMICES (arXiv 2311.18021), with its pool of 200.

    Args:
        images: a retriever that compares images ("si").
        texts: one that compares prompts ("st"), over the same support set.
        pool: images kept for the second step.

    Raises:
        ValueError: the support sets differ, or the pool is empty.
    """

    name = "mmices"

    def __init__(self, images: DemoRetriever, texts: DemoRetriever, *, pool: int = 200) -> None:
        if images.support.ids != texts.support.ids:
            raise ValueError("expected both retrievers over one support set, got two that differ")
        if pool < 1:
            raise ValueError(f"expected a pool of at least 1, got {pool}")
        self.images, self.texts, self.pool = images, texts, pool
        # one vector for equal prompts: batches may differ in the last bit, and that is no reason to prefer one
        first: dict[str, str] = {}
        support = texts.support
        self._speaker = {i: first.setdefault(p, i) for i, p in zip(support.ids, support.prompts, strict=True)}

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        pools, _ = self.images.retrieve_ids(queries, min(max(k, self.pool), len(self.images)))
        chosen = []
        for vector, pool in zip(self.texts.encode_queries(queries), pools, strict=True):
            prompts = list(dict.fromkeys(self._speaker[i] for i in pool))
            scores = dict(zip(prompts, (self.texts.index.vectors(prompts) @ vector).tolist(), strict=True))
            chosen.append(sorted(pool, key=lambda i: -scores[self._speaker[i]])[:k])  # used at once
        return chosen


#: A word of any script; a character of one that writes no spaces.
_WORD = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*|[\w\p{M}\u200c\u200d--[_]]+",
    regex.VERSION1,
)


def words(text: str) -> list[str]:
    """The words that BM25 compares: without case, in composed form (NFKC), combining marks kept with their letters.

    In scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word. Our choice.

    >>> words("Which Café?"), words("ก็ดี")
    (['which', 'café'], ['ก็', 'ดี'])
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class BM25:
    """Okapi BM25 over texts: a query's prompt and draft against a demonstration's prompt and response.

    Needs the extra `bm25`.
    """

    name = "bm25"

    def __init__(self, support: TripletTable) -> None:
        self.support = support
        bm25s = require("bm25s", "the BM25 strategy")
        texts = [f"{p} {r}" for p, r in zip(support.prompts, support.responses, strict=True)]
        self.index = bm25s.BM25()
        self.index.index([words(text) for text in texts], show_progress=False)

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        texts = [f"{q.prompt} {q.draft or ''}" for q in queries]
        chosen = []
        for query, tokens in zip(queries, map(words, texts), strict=True):
            scores = self.index.get_scores(tokens) if tokens else np.zeros(len(self.support))
            eligible = set(_eligible(self.support, query))
            ranked = (self.support.ids[i] for i in np.argsort(-scores, kind="stable"))
            chosen.append([i for i in ranked if i in eligible][:k])
        return chosen


class SameAnswerOracle:
    """Demonstrations whose response is the gold response; fewer than k where the support set has fewer.

    It looks at the answer: the ceiling, not a method.
    """

    name = "oracle"

    def __init__(self, support: TripletTable, queries: TripletTable, seed: int = 0) -> None:
        self.support, self.queries, self.seed = support, queries, seed
        self.by_response: dict[str, list[str]] = {}
        for i, response in zip(support.ids, support.responses, strict=True):
            self.by_response.setdefault(normalize_text(response), []).append(i)

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        rng = np.random.default_rng([self.seed, 3])
        chosen = []
        for query in queries:
            gold = self.queries.responses[self.queries.row(query.id or "")]
            eligible = set(_eligible(self.support, query))
            same = [i for i in self.by_response.get(normalize_text(gold), ()) if i in eligible]
            chosen.append([same[i] for i in rng.permutation(len(same))[:k]])
        return chosen


class ScoreOracle:
    """The LVLM's own top-k: every demonstration scored one-shot on the gold response.

    It looks at the answer, and costs queries x support set LVLM calls.
    """

    def __init__(self, feedback: Feedback, *, name: str = "oracle") -> None:
        self.feedback, self.name = feedback, name
        self._ranked: dict[str, list[str]] = {}

    def select(self, queries: Sequence[Query], k: int) -> list[list[str]]:
        support = self.feedback.support
        new = [q for q in queries if q.id not in self._ranked]
        eligible = [_eligible(support, q) for q in new]
        pairs = [(q.id or "", (d,)) for q, ids in zip(new, eligible, strict=True) for d in ids]
        scores = iter(self.feedback.score(pairs))
        for query, ids in zip(new, eligible, strict=True):
            values = np.array([next(scores) for _ in ids])
            self._ranked[query.id or ""] = [ids[i] for i in np.argsort(-values, kind="stable")]
        return [self._ranked[q.id or ""][:k] for q in queries]

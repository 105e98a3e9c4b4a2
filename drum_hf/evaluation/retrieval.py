"""`RetrievalEvaluator`: how well a strategy ranks demonstrations, judged by the LVLM's own scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import EmptySupportError
from ..scores.feedback import Feedback
from ..selection import Order, arrange
from ..types import Query
from .rankings import lvlm_ndcg_at_k, lvlm_recall_at_k, utility
from .statistics import bootstrap_interval
from .strategies import Strategy, _eligible

__all__ = ["RetrievalEvaluator", "RetrievalResult"]

#: Keeps the draw of candidates apart from other draws of the same seed.
_STREAM = 4


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
    """One strategy's ranking at one k. Arrays have a float64 value for each query (mean over seeds, if several).

    Attributes:
        strategy: its name.
        k: how many ranks count, and how many demonstrations are shown.
        ndcg: NDCG@k, in [0, 1]; see `lvlm_ndcg_at_k`.
        recall: recall@k of the LVLM's k best, in [0, 1]; see `lvlm_recall_at_k`.
        utility: log-likelihood of the gold response with the k demonstrations shown together, minus zero-shot; nats.
    """

    strategy: str
    k: int
    ndcg: np.ndarray
    recall: np.ndarray
    utility: np.ndarray

    @property
    def values(self) -> dict[str, np.ndarray]:
        """The three arrays by name."""
        return {"ndcg": self.ndcg, "recall": self.recall, "utility": self.utility}

    def to_dict(self, *, seed: int = 0) -> dict[str, Any]:
        """JSON-ready: of each measure its mean as `metric`, and a 95% bootstrap interval over queries as `ci`."""
        row: dict[str, Any] = {"strategy": self.strategy, "k": self.k}
        for name, values in self.values.items():
            row[name] = {"metric": float(values.mean()), "ci": list(bootstrap_interval(values, seed=seed))}
        return row


class RetrievalEvaluator:
    """Compares strategies' rankings with the LVLM's, for every query of a feedback.

    It scores every demonstration that may be shown to a query alone, so it costs queries × (support set + 1) scores
    once, whatever the number of strategies and k, and one more a query for what each strategy shows at each k. They
    are kept in the feedback's store. `plan` says how many are new.

    Args:
        feedback: the LVLM, the support set, and the queries with their gold responses.
        candidates: rank only so many demonstrations a query, drawn at random, the same for all strategies, where the
            support set is too large to be scored. Values are then larger than among all, and strategies that are
            close may change places (Krichene & Rendle, KDD 2020): compare them on the same sample only. A strategy
            is then asked for its whole ranking.
        order: how demonstrations are shown together.
        drafts: the LVLM's zero-shot answers by query id, for strategies that use them.
        seed: of the sample.

    Raises:
        ValueError: fewer than one candidate.
    """

    def __init__(
        self,
        feedback: Feedback,
        *,
        candidates: int | None = None,
        order: Order = "best_last",
        drafts: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        if candidates is not None and candidates < 1:
            raise ValueError(f"expected candidates of at least 1, or None for all, got {candidates}")
        self.feedback, self.candidates, self.order, self.seed = feedback, candidates, order, seed
        drafts = drafts or {}
        self.asked: list[Query] = [feedback.queries.query(i, draft=drafts.get(i)) for i in feedback.queries.ids]

    @functools.cached_property
    def ranked_ids(self) -> list[list[str]]:
        """For each query the ids that are ranked, in the support set's order.

        Raises:
            EmptySupportError: the whole support set is of a query's group.
        """
        rng = np.random.default_rng([self.seed, _STREAM])
        found = []
        for query in self.asked:
            ids = _eligible(self.feedback.support, query)
            if not ids:
                raise EmptySupportError(
                    f"no demonstration may be shown to query {query.id!r}: the whole support set is of its group; "
                    "leave the query out, or give a larger support set"
                )
            if self.candidates is not None:
                ids = [ids[i] for i in sorted(rng.permutation(len(ids))[: self.candidates])]
            found.append(ids)
        return found

    @property
    def pairs(self) -> list[tuple[str, tuple[str, ...]]]:
        """(query id, demonstration ids) of all scores that every strategy is judged by."""
        ids = self.feedback.queries.ids
        alone = [(query, (own,)) for query, ranked in zip(ids, self.ranked_ids, strict=True) for own in ranked]
        return [*((query, ()) for query in ids), *alone]

    def plan(self) -> tuple[int, int]:
        """How many of `pairs` are (new, already paid for)."""
        return self.feedback.plan(self.pairs)

    @property
    def scores(self) -> list[dict[str, float]]:
        """For each query the LVLM's score of its gold response after each ranked demonstration alone."""
        return self._judged[1]

    @functools.cached_property
    def _judged(self) -> tuple[np.ndarray, list[dict[str, float]]]:
        values = self.feedback.score(self.pairs)
        count = len(self.asked)
        alone = iter(values[count:].tolist())
        return values[:count], [{i: next(alone) for i in ids} for ids in self.ranked_ids]

    def evaluate(self, strategy: Strategy | Sequence[Strategy], k: int) -> RetrievalResult:
        """NDCG@k, recall@k and utility of one strategy, or of one strategy under several seeds.

        What a strategy leaves out counts as not found; where it shows nothing, utility is 0.

        Raises:
            ValueError: k < 1.
            EmptySupportError: the whole support set is of a query's group.
        """
        if k < 1:
            raise ValueError(f"expected k >= 1, got {k}")
        seeds = list(strategy) if isinstance(strategy, Sequence) else [strategy]
        ndcg, recall, gain = np.mean([self._evaluate(seeded, k) for seeded in seeds], axis=0)
        return RetrievalResult(seeds[0].name, k, ndcg, recall, gain)

    def _evaluate(self, strategy: Strategy, k: int) -> np.ndarray:
        zero_shot, scores = self._judged
        chosen = strategy.select(self.asked, k)
        ranked = chosen
        if self.candidates is not None:
            every = strategy.select(self.asked, len(self.feedback.support))
            ranked = [[i for i in ids if i in own] for ids, own in zip(every, scores, strict=True)]
        shown = [tuple(arrange(ids, self.order, seed=row)) for row, ids in enumerate(chosen)]
        together = self.feedback.score(list(zip(self.feedback.queries.ids, shown, strict=True)))
        judged = list(zip(ranked, scores, strict=True))
        return np.array(
            [
                [lvlm_ndcg_at_k(ids, own, k) for ids, own in judged],
                [lvlm_recall_at_k(ids, own, k) for ids, own in judged],
                utility(together, zero_shot),
            ]
        )

"""How well a retriever ranks demonstrations for queries held out of training, by the LVLM's own scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..scores.feedback import Feedback
from ..scores.sharding import ALONE, Processes
from ..types import Query
from .mining import CandidateTable, mine_candidates

if TYPE_CHECKING:
    from ..retriever.retriever import DemoRetriever

__all__ = ["HeldOut"]


class HeldOut:
    """Queries with gold answers, and a fixed pool of demonstrations for each that the LVLM has scored once.

    Args:
        feedback: the LVLM, the support set, and the held-out queries.
        candidates: demonstrations in a query's pool; half of them random.
        seed: of the random half.

    Attributes:
        table: the pools, empty until `prepare`.
    """

    def __init__(self, feedback: Feedback, *, candidates: int, seed: int = 0) -> None:
        self.feedback, self.candidates, self.seed = feedback, candidates, seed
        self.table = CandidateTable(feedback.queries.ids)
        self._drafts: dict[str, str] = {}

    def _query(self, query_id: str) -> Query:
        return self.feedback.queries.query(query_id, draft=self._drafts.get(query_id))

    def prepare(self, retriever: DemoRetriever, processes: Processes = ALONE) -> None:
        """Choose the pools by the retriever as it is, and have the LVLM score them; once is enough.

        Args:
            processes: share the LVLM's work; all of them make this call.
        """
        ids = self.feedback.queries.ids
        if retriever.uses_drafts and not self._drafts:
            self._drafts = dict(zip(ids, self.feedback.drafts(ids, processes=processes), strict=True))
        if self.table.rounds:
            return
        found = processes.from_main(
            lambda: mine_candidates(
                retriever,
                self.table,
                self._query,
                count=self.candidates,
                random_share=0.5,
                rng=np.random.default_rng([self.seed, 78]),
            )
        )
        pairs = [(query_id, (candidate,)) for query_id, own in found.items() for candidate, _ in own]
        self.table.extend(found, self.feedback.score(pairs, processes=processes))

    def measure(self, retriever: DemoRetriever) -> dict[str, float]:
        """Means over the queries that have at least two candidates; NaN where none has.

        - `ndcg`: of the retriever's ranking of a pool, the gain of a demonstration being exp(its score − the best
          score); 1 is the LVLM's own ranking;
        - `gold_probability`: the gold response's probability after the demonstration that is ranked first.
        """
        ids = [query_id for query_id in self.table.query_ids if len(self.table.scored(query_id)) > 1]
        if not ids:
            return {"ndcg": float("nan"), "gold_probability": float("nan")}
        gains, first = [], []
        vectors = retriever.encode_queries([self._query(query_id) for query_id in ids])
        for query_id, vector in zip(ids, vectors, strict=True):
            pool = self.table.candidates(query_id)
            scores = np.array(list(pool.values()))
            ranked = scores[np.argsort(-(retriever.index.vectors(list(pool)) @ vector), kind="stable")]
            discount = 1.0 / np.log2(np.arange(2, len(scores) + 2))
            gain, most = (np.exp(s - scores.max()) @ discount for s in (ranked, np.sort(scores)[::-1]))
            gains.append(float(gain / most))
            first.append(float(np.exp(ranked[0])))
        return {"ndcg": float(np.mean(gains)), "gold_probability": float(np.mean(first))}

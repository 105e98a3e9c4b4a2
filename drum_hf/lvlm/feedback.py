"""What the LVLM is asked about demonstrations: scores of pairs, and drafts of queries, by id and through the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..data import TripletTable
from ..types import LVLM, Demonstration, ICLRequest, Query
from .cached import CachedLVLM
from .store import ScoreStore, request_key

__all__ = ["Feedback"]


class Feedback:
    """An LVLM's feedback on which demonstrations help which queries.

    Args:
        lvlm: any LVLM; wrapped in a `CachedLVLM` unless it is one.
        support: the table that demonstrations come from.
        queries: the table that queries and their gold responses come from; often the support set itself.
        store: where scores and drafts are kept; in memory if left out.
        choices: the closed label set that scores are normalised over (classification, multiple choice).
        max_new_tokens: length of a draft.

    A query's gold answers are its `references`, each weighted by how often it stands there (VQA's ten annotators), or
    else its `response`.
    """

    def __init__(
        self,
        lvlm: LVLM,
        support: TripletTable,
        queries: TripletTable,
        *,
        store: ScoreStore | None = None,
        choices: Sequence[str] = (),
        max_new_tokens: int = 32,
    ) -> None:
        self.lvlm = lvlm if isinstance(lvlm, CachedLVLM) else CachedLVLM(lvlm, store or ScoreStore())
        self.support, self.queries = support, queries
        self.choices = tuple(choices)
        self.max_new_tokens = max_new_tokens

    def _gold(self, row: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        references = self.queries.references[row]
        if self.choices or not references:
            return (self.queries.responses[row],), ()
        counted = Counter(references)
        return tuple(counted), (tuple(float(n) for n in counted.values()) if len(counted) > 1 else ())

    def _key(self, query_id: str, demonstration_ids: Sequence[str]) -> bytes:
        """Store key of a scored pair, from content hashes alone: no image is decoded."""
        row = self.queries.row(query_id)
        shown = tuple(
            Demonstration(d, None, "", "", key=self.support.keys[self.support.row(d)]) for d in demonstration_ids
        )
        responses, weights = self._gold(row)
        asked = Query(None, key=self.queries.query_keys[row])
        return request_key(ICLRequest(asked, shown, responses, weights, self.choices), self.lvlm.fingerprint)

    def request(self, query_id: str, demonstration_ids: Sequence[str] = ()) -> ICLRequest:
        """The request that scores `query_id`'s gold response after these demonstrations, pictures and all."""
        responses, weights = self._gold(self.queries.row(query_id))
        shown = tuple(self.support[d] for d in demonstration_ids)
        return ICLRequest(self.queries.query(query_id), shown, responses, weights, self.choices)

    def score(self, pairs: Sequence[tuple[str, Sequence[str]]], *, progress: bool | None = None) -> np.ndarray:
        """Score of each (query id, demonstration ids in the order shown); float64, higher is better.

        Only what the store does not hold is computed; every finished batch is in the store.

        Raises:
            MissingIdError: an id is in neither table.
            NonFiniteScoreError: the LVLM returned NaN or infinity.
        """
        keys = [self._key(q, ds) for q, ds in pairs]
        return self.lvlm.score_lazily(
            keys,
            lambda rows: [self.request(*pairs[r]) for r in rows],
            shared=[tuple(demonstrations) for _, demonstrations in pairs],
            progress=progress,
        )

    def zero_shot(self, query_ids: Sequence[str]) -> np.ndarray:
        """Scores without any demonstration; a demonstration's utility is its score minus this."""
        return self.score([(q, ()) for q in query_ids])

    def plan(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> tuple[int, int]:
        """How many of these pairs are (new, already paid for)."""
        return self.lvlm.plan([self._key(q, ds) for q, ds in pairs])

    def drafts(self, query_ids: Sequence[str], *, progress: bool | None = None) -> list[str]:
        """The LVLM's own zero-shot answers: generated once, kept in the store, never the gold response."""
        requests = [ICLRequest(self.queries.query(q)) for q in query_ids]
        return self.lvlm.generate(requests, max_new_tokens=self.max_new_tokens, progress=progress)

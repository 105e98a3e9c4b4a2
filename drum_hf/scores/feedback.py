"""The LVLM's feedback by id: (query, demonstrations) -> how likely the LVLM finds the query's gold response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..data import TripletTable
from ..types import LVLM, ICLRequest
from .cached import CachedLVLM
from .processes import ALONE, Processes
from .store import RequestParts, ScoreStore

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

    Methods that take `processes` share their work among the processes of a launch, as `CachedLVLM`'s do.
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
        shown = tuple(self.support.keys[self.support.row(d)] for d in demonstration_ids)
        responses, weights = self._gold(row)
        parts = RequestParts(self.queries.query_keys[row], shown, responses, weights, self.choices)
        return parts.key(self.lvlm.fingerprint)

    def _draft_key(self, query_id: str) -> bytes:
        asked = RequestParts(self.queries.query_keys[self.queries.row(query_id)], max_new_tokens=self.max_new_tokens)
        return asked.key(self.lvlm.fingerprint)

    def request(self, query_id: str, demonstration_ids: Sequence[str] = ()) -> ICLRequest:
        """The request that scores `query_id`'s gold response after these demonstrations, pictures and all."""
        responses, weights = self._gold(self.queries.row(query_id))
        shown = tuple(self.support[d] for d in demonstration_ids)
        return ICLRequest(self.queries.query(query_id), shown, responses, weights, self.choices)

    def score(
        self,
        pairs: Sequence[tuple[str, Sequence[str]]],
        *,
        processes: Processes = ALONE,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Score of each (query id, demonstration ids in the order shown); float64, higher is better.

        Only what the store does not hold is computed; every finished batch is in the store.

        Args:
            processes: share the work among these.
            progress: show a bar, in the main process only; None: where more than a few batches are new.

        Raises:
            MissingIdError: an id is in neither table.
            NonFiniteScoreError: the LVLM returned NaN or infinity.
        """
        return self.lvlm.score_lazily(
            [self._key(q, ds) for q, ds in pairs],
            lambda positions: [self.request(*pairs[i]) for i in positions],
            shared=[tuple(demonstrations) for _, demonstrations in pairs],
            processes=processes,
            progress=progress,
        )

    def zero_shot(self, query_ids: Sequence[str], *, processes: Processes = ALONE) -> np.ndarray:
        """Scores without any demonstration; a demonstration's utility is its score minus this."""
        return self.score([(q, ()) for q in query_ids], processes=processes)

    def drafts(
        self, query_ids: Sequence[str], *, processes: Processes = ALONE, progress: bool | None = None
    ) -> list[str]:
        """The LVLM's own zero-shot answers: generated once, kept in the store, never the gold response.

        Args:
            processes, progress: as in `score`.
        """

        return self.lvlm.generate_lazily(
            [self._draft_key(q) for q in query_ids],
            lambda positions: [ICLRequest(self.queries.query(query_ids[i])) for i in positions],
            max_new_tokens=self.max_new_tokens,
            processes=processes,
            progress=progress,
        )

    def unscored(self, pairs: Sequence[tuple[str, Sequence[str]]], *, processes: Processes = ALONE) -> list[int]:
        """Positions of the pairs that `score` would send to the LVLM, each different one once."""
        return self.lvlm.unknown([self._key(q, ds) for q, ds in pairs], processes=processes)

    def undrafted(self, query_ids: Sequence[str], *, processes: Processes = ALONE) -> list[int]:
        """Positions of the queries that `drafts` would send to the LVLM, each different one once."""
        return self.lvlm.unknown([self._draft_key(q) for q in query_ids], kind="generate", processes=processes)

    def plan(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> tuple[int, int]:
        """How many of these pairs are (new, already paid for)."""
        return self.lvlm.plan([self._key(q, ds) for q, ds in pairs])

"""What a retriever's score promises, learned from the pairs that its LVLM has scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..selection import IsotonicUtility, LogisticUtility, fit_utility
from .mining import CandidateTable

if TYPE_CHECKING:
    from ..retriever.retriever import DemoRetriever
    from ..scores.feedback import Feedback

__all__ = ["calibrate"]


def calibrate(
    retriever: DemoRetriever,
    feedback: Feedback,
    pairs: CandidateTable | Iterable[tuple[str, str]],
    *,
    drafts: Mapping[str, str] | None = None,
    method: Literal["isotonic", "logistic"] = "isotonic",
) -> IsotonicUtility | LogisticUtility:
    """Fit expected utility to the retriever's score, for [`AdaptiveShots`][drum_hf.selection.AdaptiveShots].

    The calibration holds for this retriever, as it is trained now, and this LVLM.

    Args:
        retriever: its support set holds the demonstrations of the pairs.
        feedback: the LVLM's; asked for zero-shot scores, and for scores of pairs that its store does not hold.
        pairs: a candidate table, whose scores are taken as they are; or (query id, demonstration id) pairs. Those that
            the retriever was trained on promise too much, since it has learned to score them well.
        drafts: query id -> draft; left out, the LVLM's own, where the retriever compares responses.
        method: as in [`fit_utility`][drum_hf.selection.fit_utility].

    Raises:
        MissingIdError: an id is in neither table.
        ValueError: there are no pairs.
    """
    scored: Iterable[tuple[str, str, float]]
    if isinstance(pairs, CandidateTable):
        scored = [(query, candidate, score) for query, candidate, score, *_ in pairs.rows()]
    else:
        asked = list(pairs)
        values = feedback.score([(query, (candidate,)) for query, candidate in asked]).tolist()
        scored = [(*pair, value) for pair, value in zip(asked, values, strict=True)]
    by_query: dict[str, list[tuple[str, float]]] = {}
    for query, candidate, score in scored:
        by_query.setdefault(query, []).append((candidate, score))
    if not by_query:
        raise ValueError("expected pairs that the LVLM has scored, got none; score some with Feedback.score")
    ids = list(by_query)
    if drafts is None:
        drafts = dict(zip(ids, feedback.drafts(ids), strict=True)) if retriever.uses_drafts else {}
    vectors = retriever.encode_queries([feedback.queries.query(i, draft=drafts.get(i)) for i in ids])
    similarities, utilities = [], []
    for query, vector, bare in zip(ids, vectors, feedback.zero_shot(ids), strict=True):
        candidates, scores = zip(*by_query[query], strict=True)
        similarities.append(np.clip(retriever.index.vectors(candidates) @ vector, -1.0, 1.0))
        utilities.append(np.array(scores) - bare)
    return fit_utility(np.concatenate(similarities), np.concatenate(utilities), method=method)

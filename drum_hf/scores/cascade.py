"""An opt-in economy: a cheaper LVLM scores every pair, the full one only those that it thinks best."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import numpy as np

from .feedback import Feedback
from .processes import ALONE, Processes

__all__ = ["Cascade", "CascadeReport"]

logger = logging.getLogger(__name__)

#: Share of the pruned pairs that the full LVLM scores all the same, to fit the estimates and to tell what they cost.
_CHECKED = 0.1
#: The fewest pairs scored by both that a line is fitted to.
_FEWEST = 8


@dataclasses.dataclass(frozen=True)
class CascadeReport:
    """What a call of a `Cascade` spent, and what its checks say that it cost.

    Attributes:
        pairs: asked for.
        full: scored by the full LVLM, checks included.
        correlation: Spearman's, between both LVLMs' scores of the pairs that were checked at random.
        missed: share of the pairs checked at random that the full LVLM puts above the best one kept for their query.
    """

    pairs: int
    full: int
    correlation: float
    missed: float

    def describe(self) -> str:
        """One line for a log."""
        return (
            f"{self.full} of {self.pairs} pairs went to the full LVLM; on pairs checked at random the rank "
            f"correlation with the cheaper one is {self.correlation:.2f}, and {self.missed:.1%} beat the best kept"
        )


class Cascade:
    """Scores pairs as `Feedback.score` does, most of them by estimate.

    The cheaper LVLM scores all pairs. For each query the best `keep` of them, and a tenth of the others drawn at
    random, go to the full LVLM. What is left gets a linear estimate from its cheaper score, fitted to the pairs that
    both have scored, and no more than the lowest score known of those that were kept for its query: it was pruned as
    worse than they are. Our own addition; DRUM scores every candidate by the full LVLM. Estimates are never stored.

    Args:
        full: feedback of the LVLM that counts.
        cheap: feedback of the cheaper one, on the same tables.
        keep: share of each query's pairs, above 0 and up to 1.
        seed: of the random checks.

    Attributes:
        report: of the last call.

    Raises:
        ValueError: `keep` is out of range.
    """

    def __init__(self, full: Feedback, cheap: Feedback, *, keep: float, seed: int = 0) -> None:
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"expected keep above 0 and up to 1, got {keep}")
        self.full, self.cheap, self.keep, self.seed = full, cheap, keep, seed
        self.report: CascadeReport | None = None

    def score(
        self,
        pairs: Sequence[tuple[str, Sequence[str]]],
        *,
        processes: Processes = ALONE,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Scores of the full LVLM, or estimates of them; arguments and errors as of `Feedback.score`.

        Returns:
            float64, shape (len(pairs),); the same whatever the number of processes.
        """
        if not len(pairs):
            return np.zeros(0)
        guess = self.cheap.score(pairs, processes=processes, progress=progress)
        of_query: dict[str, list[int]] = {}
        for i, (query, _) in enumerate(pairs):
            of_query.setdefault(query, []).append(i)
        kept = np.zeros(len(pairs), dtype=bool)
        for own in of_query.values():
            best = sorted(own, key=lambda i: (-guess[i], i))[: math.ceil(self.keep * len(own))]
            kept[best] = True
        pruned = np.flatnonzero(~kept)
        rng = np.random.default_rng([self.seed, len(pairs)])
        checked = np.sort(rng.permutation(pruned)[: math.ceil(_CHECKED * len(pruned))])
        chosen = np.flatnonzero(kept)
        if len(chosen) + len(checked) < _FEWEST:
            chosen, checked = np.arange(len(pairs)), checked[:0]
        bought = np.concatenate([chosen, checked])
        scores = np.full(len(pairs), np.nan)
        paid = [pairs[i] for i in bought.tolist()]
        scores[bought] = self.full.score(paid, processes=processes, progress=progress)
        lowest = {query: min(scores[i] for i in own if kept[i]) for query, own in of_query.items()}
        highest = {query: max(scores[i] for i in own if kept[i]) for query, own in of_query.items()}
        missed = [scores[i] > highest[pairs[i][0]] for i in checked.tolist()]
        self.report = CascadeReport(
            len(pairs),
            len(bought),
            _rank_correlation(guess[checked], scores[checked]),
            float(np.mean(missed)) if missed else 0.0,
        )
        left = np.flatnonzero(np.isnan(scores))
        if len(left):
            slope, level = _fit(guess[bought], scores[bought])
            estimates = slope * guess[left] + level
            scores[left] = np.minimum(estimates, [lowest[pairs[i][0]] for i in left.tolist()])
        if processes.is_main:
            logger.info("cascade: %s", self.report.describe())
        return scores


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least squares; level at the mean where the cheaper scores are all the same, and never falling."""
    spread = x - x.mean()
    slope = max(0.0, float(spread @ y / (spread @ spread))) if (spread @ spread) > 0 else 0.0
    return slope, float(y.mean() - slope * x.mean())


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, ties at their mean rank; NaN below three pairs or without spread."""
    from scipy.stats import rankdata

    if len(x) < 3:
        return float("nan")
    a, b = rankdata(x), rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else float("nan")

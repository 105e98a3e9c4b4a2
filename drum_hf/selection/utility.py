"""Adaptive number of shots: no demonstration that is expected to do harm."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import numpy as np

from ..errors import NonFiniteScoreError
from .candidates import Candidates, Selector, TopN

__all__ = ["AdaptiveShots", "IsotonicUtility", "LogisticUtility", "UtilityCalibration", "fit_utility"]

_Numbers: TypeAlias = "Sequence[float] | np.ndarray"


class UtilityCalibration(Protocol):
    """What a demonstration of a retriever's score is expected to do for the LVLM; never falls as the score rises."""

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Expected utility, in log-likelihood (nats) over zero-shot: float64 of the shape of `scores`."""
        ...


@dataclasses.dataclass(frozen=True)
class IsotonicUtility:
    """The rising step function nearest to the pairs it was fitted on, joined by straight lines.

    Beyond the scores it was fitted on it stays what it is at their ends. `dataclasses.asdict` is JSON-ready.

    Attributes:
        scores: rising.
        utilities: the expected utility at each; not falling.
    """

    scores: tuple[float, ...]
    utilities: tuple[float, ...]

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        return np.interp(np.asarray(scores, np.float64), self.scores, self.utilities)


@dataclasses.dataclass(frozen=True)
class LogisticUtility:
    """The probability that a demonstration helps, logistic in its score, between two mean utilities.

    `dataclasses.asdict` is JSON-ready.

    Attributes:
        slope, intercept: of the log-odds; `slope` is not negative.
        harm: mean utility of those that do not help.
        help: mean utility of those that do; at least `harm`.
    """

    slope: float
    intercept: float
    harm: float
    help: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        odds = self.slope * np.asarray(scores, np.float64) + self.intercept
        return self.harm + (self.help - self.harm) * 0.5 * (1.0 + np.tanh(0.5 * odds))  # tanh never overflows


def fit_utility(
    scores: _Numbers, utilities: _Numbers, *, method: Literal["isotonic", "logistic"] = "isotonic"
) -> IsotonicUtility | LogisticUtility:
    """Learn what a retriever's score promises from pairs that the LVLM has scored.

    Pairs that the retriever was trained on promise too much; take others where there are any.

    Args:
        scores: (n,), the retriever's score of each pair.
        utilities: (n,), the LVLM's score of the pair minus its zero-shot score.
        method: "isotonic" assumes nothing but that a higher score is no worse, and wants hundreds of pairs;
            "logistic" has four numbers to learn.

    Raises:
        ValueError: no pairs, as many of one as of the other were expected, or an unknown method.
        NonFiniteScoreError: NaN or infinity.

    >>> expected = fit_utility([0.25, 0.5, 0.625, 0.75], [-2.0, 1.0, 0.0, 3.0])  # 1 and 0 fall: both become 0.5
    >>> expected([0.0, 0.5, 0.6875, 0.75]).tolist()
    [-2.0, 0.5, 1.75, 3.0]
    """
    x, y = np.asarray(scores, np.float64), np.asarray(utilities, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"expected one utility for each of one or more scores, got shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NonFiniteScoreError("expected finite scores and utilities, got NaN or infinity; leave such pairs out")
    if method == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(out_of_bounds="clip").fit(x, y)
        return IsotonicUtility(tuple(fitted.X_thresholds_.tolist()), tuple(fitted.y_thresholds_.tolist()))
    if method != "logistic":
        raise ValueError(f'expected method "isotonic" or "logistic", got {method!r}')
    return _logistic(x, y)


def _logistic(x: np.ndarray, y: np.ndarray) -> LogisticUtility:
    helps = y > 0
    if helps.all() or not helps.any():
        return LogisticUtility(0.0, 0.0, float(y.mean()), float(y.mean()))
    harm, help = float(y[~helps].mean()), float(y[helps].mean())
    middle, spread = float(x.mean()), float(x.std())
    if spread > 0:
        from sklearn.linear_model import LogisticRegression

        # Scores lie close together: scikit-learn's penalty expects them to be of unit spread.
        fitted = LogisticRegression().fit(((x - middle) / spread)[:, None], helps)
        slope = float(fitted.coef_[0, 0]) / spread
        if slope > 0:
            return LogisticUtility(slope, float(fitted.intercept_[0]) - slope * middle, harm, help)
    share = float(helps.mean())  # the score tells nothing, or the opposite of what it should
    return LogisticUtility(0.0, float(np.log(share / (1 - share))), harm, help)


class AdaptiveShots:
    """No demonstration whose expected utility is below a threshold: fewer shots, or none, where candidates are poor.

    Those that remain are chosen from by `base`. With plain top-n that is: stop where the expected utility turns
    negative, since a better-ranked candidate is never expected to be worse.

    Args:
        calibration: from a retriever's scores to expected utilities: `fit_utility`, or
            `drum_hf.training.calibrate`. It is that retriever's, with that LVLM.
        threshold: the least expected utility, in nats; 0 is where a demonstration is worth nothing.
        base: what is chosen from those that remain; plain top-n unless told.
    """

    name = "adaptive"

    def __init__(
        self, calibration: UtilityCalibration, *, threshold: float = 0.0, base: Selector | None = None
    ) -> None:
        self.calibration, self.threshold = calibration, threshold
        self.base: Selector = base or TopN()
        self.pool = self.base.pool

    def __repr__(self) -> str:
        return f"AdaptiveShots({self.calibration!r:.80}, threshold={self.threshold}, base={self.base!r})"

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        worth = np.flatnonzero(self.calibration(candidates.scores) >= self.threshold)
        return [int(worth[row]) for row in self.base(candidates.take(worth), k)]

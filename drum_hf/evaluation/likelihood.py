"""Closed label sets by likelihood: how probable an LVLM finds each option."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..scores.cached import CachedLVLM
from ..scores.store import request_key
from ..types import ICLRequest

__all__ = ["Scoring", "likeliest", "option_probabilities"]

#: How a closed label set is answered: by what is generated, or by the likeliest label.
Scoring = Literal["generation", "likelihood"]


def option_probabilities(
    lvlm: CachedLVLM, requests: Sequence[ICLRequest], *, progress: bool | None = None
) -> list[np.ndarray]:
    """Probability of each choice of each request, normalised over its choices (summed over a choice's tokens).

    Args:
        requests: each with choices, its responses aside; read again where an answer is new, so that a sequence may
            make them as they are read.

    Returns:
        for each request float64 of shape (choices,), summing to 1.

    Raises:
        ScoringUnsupportedError: the LVLM gives no log-probabilities.
    """
    keys: list[bytes] = []
    wanted: list[tuple[int, str]] = []
    counts: list[int] = []
    for row, request in enumerate(requests):
        counts.append(len(request.choices))
        # The probabilities sum to 1: the last one's is what the others leave.
        for option in request.choices[:-1]:
            keys.append(request_key(_asking(request, option), lvlm.fingerprint))
            wanted.append((row, option))

    def build(positions: Sequence[int]) -> list[ICLRequest]:
        return [_asking(requests[row], option) for row, option in (wanted[p] for p in positions)]

    scores = iter(lvlm.score_lazily(keys, build, shared=[row for row, _ in wanted], progress=progress))
    probabilities = []
    for count in counts:
        known = [math.exp(next(scores)) for _ in range(count - 1)]
        probabilities.append(np.array([*known, max(0.0, 1.0 - sum(known))]))
    return probabilities


def likeliest(probabilities: np.ndarray) -> list[int]:
    """Positions of the largest probability; several where they tie."""
    return np.flatnonzero(probabilities >= probabilities.max() - 1e-9).tolist()


def _asking(request: ICLRequest, option: str) -> ICLRequest:
    return dataclasses.replace(request, responses=(option,), weights=())

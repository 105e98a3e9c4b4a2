"""How good a ranking of demonstrations is, against the ranking that the LVLM's own scores make."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..errors import DuplicateIdError, MissingIdError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["lvlm_ndcg_at_k", "lvlm_recall_at_k", "ndcg_at_k", "recall_at_k", "utility"]

_Id = TypeVar("_Id", bound=Hashable)


def ndcg_at_k(relevance: npt.ArrayLike, ideal: npt.ArrayLike, k: int) -> float:
    """Normalised discounted cumulative gain of the first k, with linear gains (as scikit-learn's `ndcg_score`).

    Args:
        relevance: shape (n,), at least 0: of what was retrieved, in the order retrieved.
        ideal: shape (m,), at least 0: of everything that could have been retrieved, in any order.
        k: how many ranks count.

    Returns:
        float in [0, 1], higher is better; 0 where nothing is relevant.

    Raises:
        ValueError: k < 1; an array that isn't one-dimensional, finite and at least 0 (shift log-likelihoods, or pass
            exp of them); more relevance retrieved than `ideal` holds.

    >>> ndcg_at_k([1.0, 0.0, 0.0], [0.0, 0.0, 1.0], 3), round(ndcg_at_k([0.0, 1.0], [1.0, 0.0], 2), 4)
    (1.0, 0.6309)
    """
    _check_k(k)
    ranked, best = _relevance(relevance, "relevance"), _relevance(ideal, "ideal")
    best = np.sort(best)[::-1]
    most = _dcg(best[:k])
    value = _dcg(ranked[:k])
    if value > most * (1 + 1e-9):
        raise ValueError(
            f"the ranking's DCG@{k} ({value:g}) exceeds the ideal one ({most:g}); `ideal` must hold the relevance of "
            "everything that could be retrieved, and nothing may be retrieved twice"
        )
    return min(1.0, value / most) if most > 0 else 0.0


def _dcg(relevance: np.ndarray) -> float:
    return float(relevance @ (1.0 / np.log2(np.arange(2, len(relevance) + 2))))


def _relevance(values: npt.ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(
            f"expected {name} one-dimensional, finite and at least 0, got shape {array.shape}, values {array!r}; "
            "shift log-likelihoods to start at 0, or pass exp of them"
        )
    return array


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"expected k >= 1, got {k}")


def recall_at_k(ranked_ids: Sequence[Hashable], relevant_ids: Collection[Hashable], k: int) -> float:
    """Share of the relevant ids found among the first k of the ranking, in [0, 1]; higher is better.

    Raises:
        ValueError: k < 1, or no id is relevant.
        DuplicateIdError: the ranking holds an id twice.

    >>> recall_at_k(["a", "b", "c"], {"a", "c", "d", "e"}, 3)
    0.5
    """
    _check_k(k)
    relevant = set(relevant_ids)
    if not relevant:
        raise ValueError("recall needs at least one relevant id, got none; leave such a query out of the mean")
    _check_distinct(ranked_ids)
    return len(relevant.intersection(ranked_ids[:k])) / len(relevant)


# Against the LVLM's scores


def lvlm_ndcg_at_k(ranked_ids: Sequence[_Id], scores: Mapping[_Id, float], k: int) -> float:
    """NDCG@k of a ranking, a demonstration's gain being exp(its score − the best score).

    That is the probability of the gold response relative to the best that one demonstration gives it (our choice): the
    LVLM's own order has 1, and a demonstration that makes the response e times less likely than the best counts 1/e.

    Args:
        ranked_ids: the candidates as a retriever ranks them, best first; it may leave any out.
        scores: the LVLM's score (a log-likelihood, in nats) of each candidate.
        k: how many ranks count.

    Returns:
        float in [0, 1], higher is better.

    Raises:
        ValueError: k < 1, no candidate, or a score that is not finite.
        MissingIdError: the ranking holds an id without a score.
        DuplicateIdError: the ranking holds an id twice.

    >>> round(lvlm_ndcg_at_k(["b", "a"], {"a": -0.1, "b": -2.1, "c": -5.0}, k=2), 3)
    0.706
    """
    values = _checked(ranked_ids, scores, k)
    best = values.max()
    return ndcg_at_k(np.exp([scores[i] - best for i in ranked_ids[:k]]), np.exp(values - best), k)


def lvlm_recall_at_k(ranked_ids: Sequence[_Id], scores: Mapping[_Id, float], k: int) -> float:
    """Share of the LVLM's k best candidates among the first k of a ranking; all candidates, where there are fewer.

    Whatever scores as high as the LVLM's k-th counts as one of its best, so that a tie is nobody's loss (our choice).

    Args, errors: as in `lvlm_ndcg_at_k`.

    Returns:
        float in [0, 1], higher is better.

    >>> lvlm_recall_at_k(["b", "a"], {"a": -0.1, "b": -2.1, "c": -1.0}, k=2)
    0.5
    """
    values = _checked(ranked_ids, scores, k)
    best = min(k, len(values))
    least = np.sort(values)[-best]
    return float(sum(scores[i] >= least for i in ranked_ids[:k]) / best)


def utility(scores: npt.ArrayLike, zero_shot: npt.ArrayLike) -> np.ndarray:
    """Log-likelihood of the gold response with demonstrations, minus that without any.

    Args:
        scores: shape (n,): the LVLM's score of each query with its demonstrations.
        zero_shot: shape (n,): its score of each query without.

    Returns:
        float64, shape (n,), in nats; above 0 where the demonstrations help. Its mean is what is reported.

    Raises:
        ValueError: arrays that are not one-dimensional, of one length, and finite.

    >>> utility([-0.5, -2.0], [-1.5, -1.0]).tolist()
    [1.0, -1.0]
    """
    shown, bare = np.asarray(scores, dtype=np.float64), np.asarray(zero_shot, dtype=np.float64)
    if shown.ndim != 1 or shown.shape != bare.shape or not (np.isfinite(shown).all() and np.isfinite(bare).all()):
        raise ValueError(
            "expected finite scores with and without demonstrations, one of each a query, got shapes "
            f"{shown.shape} and {bare.shape}"
        )
    return shown - bare


def _checked(ranked_ids: Sequence[_Id], scores: Mapping[_Id, float], k: int) -> np.ndarray:
    """The candidates' scores."""
    _check_k(k)
    _check_distinct(ranked_ids)
    for i in ranked_ids:
        if i not in scores:
            raise MissingIdError(f"the ranking holds the id {i!r}, which has no score; score every candidate")
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores))
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected finite scores of at least one candidate, got {dict(scores)}")
    return values


def _check_distinct(ranked_ids: Sequence[Hashable]) -> None:
    if len(set(ranked_ids)) < len(ranked_ids):
        twice = next(i for n, i in enumerate(ranked_ids) if i in ranked_ids[:n])
        raise DuplicateIdError(f"the ranking holds the id {twice!r} twice; expected each id once")

"""ROC-AUC of a binary task, and what each item adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RowError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["roc_auc", "roc_auc_items"]


def roc_auc(scores: npt.ArrayLike, positive: npt.ArrayLike) -> float:
    """Area under the ROC curve: how often a positive item scores higher than a negative one, a tie counting half.

    Computed by scikit-learn.

    Args:
        scores: shape (n,), finite, higher for the positive class: a label's log-likelihood, or the difference of two.
        positive: shape (n,), True or 1 for an item of the positive class, False or 0 for the other.

    Returns:
        float in [0, 1]; 0.5 is chance, higher is better.

    Raises:
        ValueError: arrays of other shapes or values, or only one of the classes is there.

    >>> roc_auc([-0.1, -2.3, -0.7, -0.7], [1, 0, 1, 0])
    0.875
    """
    from sklearn.metrics import roc_auc_score

    values, classes = _checked(scores, positive)
    return float(roc_auc_score(classes, values))


def roc_auc_items(scores: npt.ArrayLike, positive: npt.ArrayLike) -> np.ndarray:
    """Values of the items whose mean is the ROC-AUC, and whose spread is that of the ROC-AUC.

    An item's placement is the share of the other class that it is on the right side of (DeLong, DeLong &
    Clarke-Pearson, Biometrics 1988). Its value is the AUC plus its placement's distance from the AUC, times all items
    over those of its class: so weighted, the variance of the values' mean is DeLong's of the AUC, and a bootstrap
    interval or a paired difference of the values is one of the AUC, for many items. A single value may lie outside
    [0, 1].

    Args, errors: as in `roc_auc`.

    Returns:
        float64, shape (n,).

    >>> roc_auc_items([-0.1, -2.3, -0.7, -0.7], [1, 0, 1, 0]).tolist()
    [1.125, 1.125, 0.625, 0.625]
    """
    from scipy.stats import rankdata

    values, classes = _checked(scores, positive)
    own = np.empty(len(values))
    for one in (classes, ~classes):
        own[one] = rankdata(values[one])
    below = rankdata(values) - own  # items of the other class with lower scores, ties counting half
    positives, negatives = int(classes.sum()), int((~classes).sum())
    placement = np.where(classes, below / negatives, 1 - below / positives)
    area = roc_auc(values, classes)
    return area + len(values) / np.where(classes, positives, negatives) * (placement - area)


def roc_auc_of_labels(predictions: Sequence[Mapping[str, float]], references: Sequence[Sequence[str]]) -> np.ndarray:
    """`roc_auc_items` from the probabilities of two labels and each item's gold label.

    Either label may count as the positive one: as probabilities sum to 1, both give the same values.

    Raises:
        ValueError: other than two labels, or not the same for every item; otherwise as in `roc_auc`.
        RowError: a gold label is neither of the two.
    """
    labels = list(predictions[0]) if len(predictions) else []
    odd = next((i for i, item in enumerate(predictions) if set(item) != set(labels)), None)
    if len(labels) != 2 or odd is not None:
        got = (
            "no item"
            if not labels
            else f"{labels} for item 0" + (f", {list(predictions[odd])} for {odd}" if odd else "")
        )
        raise ValueError(f"roc_auc expects the probabilities of the same two labels for every item, got {got}")
    for i, (gold,) in enumerate(references):
        if gold not in labels:
            raise RowError(f"item {i}: expected one of the labels {labels} as its reference, got {gold!r}")
    # By the first label's: the second's is what it leaves of 1, which for a sure answer is 1 and nothing finer.
    return roc_auc_items([-item[labels[0]] for item in predictions], [gold == labels[1] for (gold,) in references])


def _checked(scores: npt.ArrayLike, positive: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, classes = np.asarray(scores, dtype=np.float64), np.asarray(positive)
    if values.ndim != 1 or classes.shape != values.shape or not np.isfinite(values).all():
        raise ValueError(
            f"expected finite scores and as many classes, one-dimensional, got shapes {values.shape} and "
            f"{classes.shape}" + ("" if np.isfinite(values).all() else " with scores that are not finite")
        )
    if not np.isin(classes, (0, 1)).all():
        raise ValueError(f"expected classes 1 (positive) and 0, got {np.unique(classes)!r}")
    classes = classes.astype(bool)
    if classes.all() or not classes.any():
        raise ValueError(f"ROC-AUC compares two classes, and all {len(values)} items are of one; take items of both")
    return values, classes

"""Every metric as a function, and a registry of those that the evaluator knows by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .answers import check_references, exact_match, letter_match, normalize_vqa_answer, top1, vqa_accuracy
from .cider import check_items, cider_d
from .rankings import lvlm_ndcg_at_k, lvlm_recall_at_k, ndcg_at_k, recall_at_k, utility
from .roc import roc_auc, roc_auc_items, roc_auc_of_labels

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "METRICS",
    "Metric",
    "cider_d",
    "exact_match",
    "get_metric",
    "letter_match",
    "lvlm_ndcg_at_k",
    "lvlm_recall_at_k",
    "means_by",
    "ndcg_at_k",
    "normalize_vqa_answer",
    "recall_at_k",
    "roc_auc",
    "roc_auc_items",
    "top1",
    "utility",
    "vqa_accuracy",
]


@dataclasses.dataclass(frozen=True)
class Metric:
    """An answer metric as the evaluator, the tables and the figures use it.

    Call it for the values of the items; `check` finds what a call would refuse, before answers are paid for.

    Attributes:
        name: its key in `METRICS` and in results.
        per_item: (predictions, references, **options) -> float64 array of shape (len(predictions),).
        label: for table heads and axes, in the unit of `reported`.
        higher_is_better: True for all that ship.
        scale: `reported` is the mean times this.
        min_references, max_references: how many references an item may have; None for no limit.
        labels: predictions are the probabilities of so many labels, by label, in place of answers; None for answers.
    """

    name: str
    per_item: Callable[..., np.ndarray] = dataclasses.field(repr=False)
    label: str
    higher_is_better: bool = True
    scale: float = 100.0
    min_references: int = 1
    max_references: int | None = None
    labels: int | None = None

    def __call__(
        self, predictions: Sequence[Any], references: Sequence[Sequence[str]], **options: bool | float
    ) -> np.ndarray:
        """Values of the items, float64 array of shape (len(predictions),).

        Raises:
            RowError: an item has too few or too many references, or a string in place of the list.
            ValueError: as many predictions as lists of references were expected.
        """
        self.check(references)
        return self.per_item(predictions, references, **options)

    def check(self, references: Sequence[Sequence[str]]) -> None:
        """Raise RowError, naming the item, where this metric can't use an item's references."""
        for i, item in enumerate(references):
            check_references(item, self.name, least=self.min_references, most=self.max_references, where=f"item {i}: ")

    def reported(self, values: npt.ArrayLike) -> float:
        """The number that papers print: the mean of the items' values times `scale`."""
        return float(np.asarray(values, dtype=np.float64).mean()) * self.scale


def _each(
    function: Callable[..., float], predictions: Sequence[str], references: Sequence[Sequence[str]], **options: Any
) -> np.ndarray:
    check_items(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return np.array([function(text, gold, **options) for text, gold in pairs], dtype=np.float64)


def _top1_of_list(prediction: str, references: Sequence[str], **options: bool) -> float:
    (label,) = references
    return top1(prediction, label, **options)


def _letter_of_list(prediction: str, references: Sequence[str]) -> float:
    (letter,) = references
    return letter_match(prediction, letter)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("vqa_accuracy", functools.partial(_each, vqa_accuracy), "VQA accuracy", min_references=2),
        Metric(
            "vqa_accuracy_official",
            functools.partial(_each, vqa_accuracy, official=True),
            "VQA accuracy (official script)",
            min_references=2,
        ),
        Metric("letter", functools.partial(_each, _letter_of_list), "multiple-choice accuracy", max_references=1),
        Metric("exact_match", functools.partial(_each, exact_match), "exact match"),
        Metric("top1", functools.partial(_each, _top1_of_list), "top-1 accuracy", max_references=1),
        Metric("cider_d", cider_d, "CIDEr-D"),
        Metric("roc_auc", roc_auc_of_labels, "ROC-AUC", max_references=1, labels=2),
    )
}


def get_metric(name: str) -> Metric:
    """Metric of that name.

    Raises:
        ValueError: there is none; the message lists those there are.

    >>> get_metric("top1").reported([1.0, 0.0])
    50.0
    """
    try:
        return METRICS[name]
    except KeyError:
        raise ValueError(f"unknown metric {name!r}; expected one of {', '.join(sorted(METRICS))}") from None


def means_by(values: npt.ArrayLike, kinds: Sequence[Hashable]) -> dict[Any, float]:
    """Mean value of each kind of item, such as VQA's answer and question types; kinds in order of appearance.

    Args:
        values: shape (n,).
        kinds: one for each value.

    Raises:
        ValueError: not as many kinds as values.

    >>> means_by([1.0, 0.25, 0.75], ["yes/no", "number", "number"])
    {'yes/no': 1.0, 'number': 0.5}
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(kinds),):
        raise ValueError(f"expected a kind for every value, got {len(kinds)} kinds for values of shape {array.shape}")
    rows: dict[Hashable, list[int]] = {}
    for row, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(row)
    return {kind: float(array[own].mean()) for kind, own in rows.items()}

"""The metrics as `evaluate.Metric` subclasses, which need no Hub: make one and call `compute`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from .metrics import METRICS, lvlm_ndcg_at_k, lvlm_recall_at_k, means_by, roc_auc, utility

__all__ = [
    "CIDErD",
    "ExactMatch",
    "NDCG",
    "ROCAUC",
    "RecallAtK",
    "Top1Accuracy",
    "Utility",
    "VQAAccuracy",
]

_TEXT, _NUMBER = datasets.Value("string"), datasets.Value("float64")

_ANSWERS = """
Args:
    predictions: list of str, one answer an item.
    references: list of lists of str, the gold answers of each item.

Returns:
    dict: the mean under the metric's name, and the items' values as a list under "per_item".
"""
_RANKINGS = """
Args:
    predictions: list of lists of str, the ids of each query's candidates as they are ranked, best first.
    references: list of lists of {"id": str, "score": float}, the LVLM's score of every candidate of each query.
    k: how many ranks count.

Returns:
    dict: the mean under the metric's name, and the queries' values as a list under "per_item".
"""


class _Metric(evaluate.Metric):
    """Collects in memory, so that neither a file nor a folder is written, unless several processes share the work.

    The items' values are under "per_item", and their mean under the metric's name.
    """

    key: ClassVar[str]
    citation_of: ClassVar[str] = ""
    inputs: ClassVar[str]
    columns: ClassVar[dict[str, Any]]

    def __init__(
        self,
        config_name: str | None = None,
        keep_in_memory: bool | None = None,
        cache_dir: str | None = None,
        num_process: int = 1,
        **kwargs: Any,
    ) -> None:
        in_memory = num_process == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(config_name, in_memory, cache_dir, num_process, **kwargs)

    def _build_data_dir(self) -> str:
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.citation_of,
            inputs_description=self.inputs,
            features=datasets.Features(self.columns),
        )

    def _result(self, values: np.ndarray | Sequence[float]) -> dict[str, Any]:
        array = np.asarray(values, dtype=np.float64)
        return {self.key: float(array.mean()), "per_item": array.tolist()}


class _OfAnswers(_Metric):
    inputs = _ANSWERS
    columns: ClassVar = {"predictions": _TEXT, "references": datasets.List(_TEXT)}

    def _compute(self, predictions: list[str], references: list[list[str]], **options: Any) -> dict[str, Any]:
        return self._result(METRICS[self.key](predictions, references, **options))


class VQAAccuracy(_OfAnswers):
    """VQA accuracy over annotators. Options: official=False; answer_types and question_types, a type
    for each item, which add the means under "per_answer_type" and "per_question_type"."""

    key = "vqa_accuracy"
    citation_of = "Antol et al., VQA: Visual Question Answering, ICCV 2015"

    def _compute(  # type: ignore[override]
        self,
        predictions: list[str],
        references: list[list[str]],
        *,
        answer_types: Sequence[str] | None = None,
        question_types: Sequence[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        result = super()._compute(predictions, references, **options)
        for name, kinds in (("per_answer_type", answer_types), ("per_question_type", question_types)):
            if kinds is not None:
                result[name] = means_by(result["per_item"], kinds)
        return result


class ExactMatch(_OfAnswers):
    """Equality with any of the references. Option: normalize=True."""

    key = "exact_match"


class Top1Accuracy(_OfAnswers):
    """Top-1 accuracy; each item's reference is its label. Option: normalize=True."""

    key = "top1"


class CIDErD(_OfAnswers):
    """CIDEr-D, 0 to 10 an item; papers report 100 times the mean. Options: n=4, sigma=6.0."""

    key = "cider_d"
    citation_of = "Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, CVPR 2015"


class ROCAUC(_Metric):
    """Area under the ROC curve of a binary task, by the log-likelihood of its labels; a tie counts half."""

    key = "roc_auc"
    inputs = """
Args:
    prediction_scores: list of float, higher for the positive class, such as the log-likelihood of its label minus that
        of the other.
    references: list of int, 1 for the positive class and 0 for the other.

Returns:
    dict: "roc_auc", in [0, 1].
"""
    columns: ClassVar = {"prediction_scores": _NUMBER, "references": datasets.Value("int32")}

    def _compute(self, prediction_scores: list[float], references: list[int]) -> dict[str, Any]:
        return {"roc_auc": roc_auc(prediction_scores, references)}


class _OfRankings(_Metric):
    inputs = _RANKINGS
    columns: ClassVar = {
        "predictions": datasets.List(_TEXT),
        "references": datasets.List({"id": _TEXT, "score": _NUMBER}),
    }

    def _compute(self, predictions: list[list[str]], references: list[list[dict]], *, k: int = 10) -> dict[str, Any]:
        function = lvlm_ndcg_at_k if self.key == "ndcg" else lvlm_recall_at_k
        scores = [{row["id"]: row["score"] for row in rows} for rows in references]
        return self._result([function(ids, own, k) for ids, own in zip(predictions, scores, strict=True)])


class NDCG(_OfRankings):
    """NDCG@k against the LVLM's scores, gains being exp(score − best score). Option: k=10."""

    key = "ndcg"
    citation_of = "Järvelin & Kekäläinen, Cumulated gain-based evaluation of IR techniques, TOIS 2002"


class RecallAtK(_OfRankings):
    """Share of the LVLM's k best candidates among the first k. Option: k=10."""

    key = "recall"


class Utility(_Metric):
    """Mean gain in the log-likelihood of the gold response over zero-shot, in nats."""

    key = "utility"
    inputs = """
Args:
    predictions: list of float, the LVLM's score of each query with its demonstrations.
    references: list of float, its score of each query without.

Returns:
    dict: the mean gain under "utility", and the queries' gains as a list under "per_item".
"""
    columns: ClassVar = {"predictions": _NUMBER, "references": _NUMBER}

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, Any]:
        return self._result(utility(predictions, references))

"""`ICLEvaluator`: what an LVLM answers with the demonstrations that a strategy chose, and how good that is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import numpy as np

from ..data import check_leaks, load_table
from ..errors import RowError
from ..scores.cached import CachedLVLM
from ..scores.store import ScoreStore
from ..selection import Order, arrange
from ..types import LVLM, ICLRequest, Query
from .likelihood import Scoring, likeliest, option_probabilities
from .metrics import Metric, get_metric, means_by
from .statistics import bootstrap_interval
from .strategies import Strategy

logger = logging.getLogger(__name__)

__all__ = ["ICLEvaluator", "StrategyResult"]


@dataclasses.dataclass(frozen=True)
class StrategyResult:
    """One strategy at one number of shots.

    Attributes:
        values: (queries,) float64, the metric of each query (mean over seeds, where there were several).
        answers: the LVLM's answers (of the first seed).
        ids: demonstrations in the order shown (of the first seed).
        seed_means: the metric of each seed.
        probabilities: by likelihood, those of each query's labels (of the first seed); else None.
    """

    strategy: str
    shots: int
    metric: str
    values: np.ndarray
    answers: list[str]
    ids: list[list[str]]
    seed_means: tuple[float, ...]
    probabilities: list[dict[str, float]] | None = None

    @property
    def mean(self) -> float:
        """The metric, as a fraction; CIDEr-D on its usual scale, where 1.0 is what papers print as 100."""
        return float(self.values.mean())

    def by(self, kinds: Sequence[Hashable]) -> dict[Any, float]:
        """The metric of each kind of query, such as VQA's answer types, `kinds` holding one for each query in order.

        Raises:
            ValueError: not as many kinds as queries.
        """
        return means_by(self.values, kinds)

    def to_dict(self, *, seed: int = 0) -> dict[str, Any]:
        """JSON-ready: metric, 95% bootstrap interval over queries, and each seed's metric where there were several."""
        low, high = bootstrap_interval(self.values, seed=seed)
        row: dict[str, Any] = {"metric": self.mean, "ci": [float(low), float(high)]}
        if len(self.seed_means) > 1:
            row["seeds"] = [float(m) for m in self.seed_means]
        return row


class ICLEvaluator:
    """Evaluates strategies on a table of queries.

    Args:
        lvlm: any LVLM. Answers are kept in `store`, so nothing is generated twice.
        support: where demonstrations come from: a table, or what [`load_table`][drum_hf.data.load_table] takes.
        queries: what is asked, with gold answers; likewise.
        metric: a name that `get_metric` knows, or a `Metric`.
        order: how demonstrations are shown.
        drafts: the LVLM's zero-shot answers by query id, for strategies that use them.
        max_new_tokens: of an answer.
        on_leak: "raise", "warn" or "ignore" where support and queries share a picture or an id.
        scoring: "generation": the answer is what the LVLM writes. "likelihood": it is the label with the highest
            log-likelihood, summed over its tokens and normalised over all labels; of several, the first. None:
            "likelihood" for a metric of labels' probabilities (ROC-AUC), else "generation".
        choices: the closed label set, by likelihood; None: the support set's labels.

    Raises:
        LeakError: support and queries overlap.
        ValueError: an unknown scoring, ROC-AUC of generated answers, or too few or too many labels by likelihood.
        RowError: a query has too few or too many gold answers for the metric, or none among the labels.
    """

    def __init__(
        self,
        lvlm: LVLM,
        support: Any,
        queries: Any,
        *,
        metric: str | Metric = "exact_match",
        order: Order = "best_last",
        drafts: dict[str, str] | None = None,
        store: ScoreStore | None = None,
        max_new_tokens: int = 32,
        on_leak: Literal["raise", "warn", "ignore"] = "raise",
        scoring: Scoring | None = None,
        choices: Sequence[str] | None = None,
    ) -> None:
        self.lvlm = lvlm if isinstance(lvlm, CachedLVLM) else CachedLVLM(lvlm, store or ScoreStore())
        support, queries = load_table(support), load_table(queries)
        self.support, self.queries = support, queries
        self.metric = get_metric(metric) if isinstance(metric, str) else metric
        self.order, self.max_new_tokens = order, max_new_tokens
        self.references = [list(r) or [g] for r, g in zip(queries.references, queries.responses, strict=True)]
        self.metric.check(self.references)
        self.scoring: Scoring = scoring or ("generation" if self.metric.labels is None else "likelihood")
        self.choices = tuple(support.label_set if choices is None else choices)
        self._check_scoring()
        check_leaks(support, queries, on_leak=on_leak)
        self.drafts = drafts or {}
        self.asked: list[Query] = [queries.query(i, draft=self.drafts.get(i)) for i in queries.ids]

    def _check_scoring(self) -> None:
        if self.scoring not in ("generation", "likelihood"):
            raise ValueError(f'expected scoring "generation" or "likelihood", got {self.scoring!r}')
        if self.scoring == "generation":
            if self.metric.labels is not None:
                raise ValueError(
                    f"{self.metric.name} needs the labels' probabilities, which generated answers do not have; pass "
                    'scoring="likelihood"'
                )
            return
        if len(self.choices) < 2 or self.metric.labels not in (None, len(self.choices)):
            wanted = "two labels or more" if self.metric.labels is None else f"{self.metric.labels} labels"
            raise ValueError(
                f"expected {wanted} to compare by likelihood, got {self.choices!r}; pass choices=, or a support "
                "set with a column 'label'"
            )
        labels = set(self.choices)
        odd = [i for i, gold in enumerate(self.references) if labels.isdisjoint(gold)]
        if self.metric.labels is not None and odd:
            raise RowError(
                f"query {self.queries.ids[odd[0]]!r}: expected a gold answer among the {len(labels)} labels, got "
                f"{self.references[odd[0]]!r}; add it to choices="
            )
        if odd:
            logger.warning(
                "the gold answers of %d queries, such as %r of query %r, are not among the %d labels: they count as "
                "wrong; add them to choices= if they can be answered",
                len(odd),
                self.references[odd[0]][0],
                self.queries.ids[odd[0]],
                len(labels),
            )

    def _requests(self, ids: Sequence[Sequence[str]], choices: tuple[str, ...] = ()) -> list[ICLRequest]:
        return [
            ICLRequest(dataclasses.replace(query, draft=None), tuple(self.support[i] for i in shown), choices=choices)
            for query, shown in zip(self.asked, ids, strict=True)
        ]

    def answer(self, ids: Sequence[Sequence[str]], *, progress: bool | None = None) -> list[str]:
        """The LVLM's answers to all queries, `ids` being each one's demonstrations in the order shown."""
        return self.lvlm.generate(self._requests(ids), max_new_tokens=self.max_new_tokens, progress=progress)

    def label_probabilities(
        self, ids: Sequence[Sequence[str]], *, progress: bool | None = None
    ) -> list[dict[str, float]]:
        """The probability of every label for each query, normalised over `choices`; `ids` as in `answer`.

        Raises:
            ScoringUnsupportedError: the LVLM gives no log-probabilities.
        """
        found = option_probabilities(self.lvlm, self._requests(ids, self.choices), progress=progress)
        return [dict(zip(self.choices, values.tolist(), strict=True)) for values in found]

    def evaluate(
        self, strategy: Strategy | Sequence[Strategy], shots: int, *, progress: bool | None = None
    ) -> StrategyResult:
        """Run one strategy, or one strategy under several seeds, at one number of shots."""
        seeds = list(strategy) if isinstance(strategy, Sequence) else [strategy]
        answers, ids, values, probabilities = [], [], [], []
        for seeded in seeds:
            # by row: one permutation of ranks for all queries would be an order, not a shuffle
            shown = [
                arrange(chosen, self.order, seed=row) for row, chosen in enumerate(seeded.select(self.asked, shots))
            ]
            ids.append(shown)
            if self.scoring == "likelihood":
                found = self.label_probabilities(shown, progress=progress)
                probabilities.append(found)
                answers.append([self.choices[likeliest(np.array(list(item.values())))[0]] for item in found])
            else:
                answers.append(self.answer(shown, progress=progress))
            predictions = probabilities[-1] if self.metric.labels is not None else answers[-1]
            values.append(np.asarray(self.metric(predictions, self.references), dtype=np.float64))
        return StrategyResult(
            strategy=seeds[0].name,
            shots=shots,
            metric=self.metric.name,
            values=np.mean(values, axis=0),
            answers=answers[0],
            ids=ids[0],
            seed_means=tuple(float(v.mean()) for v in values),
            probabilities=probabilities[0] if probabilities else None,
        )

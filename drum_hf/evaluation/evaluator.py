"""`ICLEvaluator`: what an LVLM answers with the demonstrations that a strategy chose, and how good that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..data import TripletTable, check_leaks
from ..lvlm.cached import CachedLVLM
from ..lvlm.store import ScoreStore
from ..selection import Order, arrange
from ..types import LVLM, ICLRequest, Query
from .metrics import Metric, get_metric
from .statistics import bootstrap_interval
from .strategies import Strategy

__all__ = ["ICLEvaluator", "StrategyResult"]


@dataclasses.dataclass(frozen=True)
class StrategyResult:
    """One strategy at one number of shots.

    Attributes:
        values: (queries,) float64, the metric of each query (mean over seeds, where there were several).
        answers: the LVLM's answers (of the first seed).
        ids: demonstrations in the order shown (of the first seed).
        seed_means: the metric of each seed.
    """

    strategy: str
    shots: int
    metric: str
    values: np.ndarray
    answers: list[str]
    ids: list[list[str]]
    seed_means: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The metric, as a fraction; CIDEr-D on its usual scale, where 1.0 is what papers print as 100."""
        return float(self.values.mean())

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
        support: where demonstrations come from.
        queries: what is asked, with gold answers.
        metric: a name that `get_metric` knows, or a `Metric`.
        order: how demonstrations are shown.
        drafts: the LVLM's zero-shot answers by query id, for strategies that use them.
        max_new_tokens: of an answer.
        on_leak: "raise", "warn" or "ignore" where support and queries share a picture or an id.

    Raises:
        LeakError: support and queries overlap.
    """

    def __init__(
        self,
        lvlm: LVLM,
        support: TripletTable,
        queries: TripletTable,
        *,
        metric: str | Metric = "exact_match",
        order: Order = "best_last",
        drafts: dict[str, str] | None = None,
        store: ScoreStore | None = None,
        max_new_tokens: int = 32,
        on_leak: Literal["raise", "warn", "ignore"] = "raise",
    ) -> None:
        self.lvlm = lvlm if isinstance(lvlm, CachedLVLM) else CachedLVLM(lvlm, store or ScoreStore())
        self.support, self.queries = support, queries
        self.metric = get_metric(metric) if isinstance(metric, str) else metric
        self.order, self.max_new_tokens = order, max_new_tokens
        self.references = [list(r) or [g] for r, g in zip(queries.references, queries.responses, strict=True)]
        self.metric.check(self.references)
        check_leaks(support, queries, on_leak=on_leak)
        self.drafts = drafts or {}
        self.asked: list[Query] = [queries.query(i, draft=self.drafts.get(i)) for i in queries.ids]

    def answer(self, ids: Sequence[Sequence[str]], *, progress: bool | None = None) -> list[str]:
        """The LVLM's answers to all queries, `ids` being each one's demonstrations in the order shown."""
        requests = [
            ICLRequest(dataclasses.replace(query, draft=None), tuple(self.support[i] for i in shown))
            for query, shown in zip(self.asked, ids, strict=True)
        ]
        return self.lvlm.generate(requests, max_new_tokens=self.max_new_tokens, progress=progress)

    def evaluate(
        self, strategy: Strategy | Sequence[Strategy], shots: int, *, progress: bool | None = None
    ) -> StrategyResult:
        """Run one strategy, or one strategy under several seeds, at one number of shots."""
        seeds = list(strategy) if isinstance(strategy, Sequence) else [strategy]
        answers, ids, values = [], [], []
        for seeded in seeds:
            # by row: one permutation of ranks for all queries would be an order, not a shuffle
            shown = [
                arrange(chosen, self.order, seed=row) for row, chosen in enumerate(seeded.select(self.asked, shots))
            ]
            answers.append(self.answer(shown, progress=progress))
            ids.append(shown)
            values.append(np.asarray(self.metric(answers[-1], self.references), dtype=np.float64))
        return StrategyResult(
            strategy=seeds[0].name,
            shots=shots,
            metric=self.metric.name,
            values=np.mean(values, axis=0),
            answers=answers[0],
            ids=ids[0],
            seed_means=tuple(float(v.mean()) for v in values),
        )

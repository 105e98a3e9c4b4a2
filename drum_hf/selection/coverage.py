"""Coverage: demonstrations that together show what the query needs."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from .candidates import POOL, Candidates, refuse_pool

__all__ = ["Coverage"]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Greedy coverage, of the query's parts or of the answers in question.

    There are m things to cover. `covers[i, j] >= 0` says how well candidate i covers thing j, and a set covers
    `sum over j of max over its members of covers[i, j]`. The next one adds most; of equals, and once nothing adds
    anything, the better ranked comes first. A greedy set covers at least 1 - 1/e of what the best set of its size
    does (Nemhauser, Wolsey & Fisher 1978), and exactly as much where each candidate covers one thing.

    - `of="parts"`: image, prompt and draft of the query, each covered by the best part of any demonstration, as the
      retriever compares and weighs them. The idea is that of Gupta, Gardner & Singh (Findings of EMNLP 2023), who
      cover a query's words.
    - `of="answers"`: the distinct responses among the candidates (case and outer spaces aside), each worth its share
      of a softmax over the candidates' scores. So the LVLM sees the likeliest answers, one demonstration each, before
      it sees one twice (ours).

    Args:
        of: what is to be covered.
        temperature: of that softmax; 0.05 (our choice) is where the loss's temperature starts.
        pool: candidates considered.

    Raises:
        ValueError: another `of`, a temperature that is not above 0, or a negative `pool`.
    """

    of: Literal["parts", "answers"] = "parts"
    temperature: float = 0.05
    pool: int = POOL

    def __post_init__(self) -> None:
        if self.of not in ("parts", "answers"):
            raise ValueError(f'expected coverage of "parts" or "answers", got {self.of!r}')
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")
        refuse_pool(self.pool)

    @property
    def name(self) -> str:
        """Name in a table."""
        return "coverage" if self.of == "parts" else self.of

    def covers(self, candidates: Candidates) -> np.ndarray:
        """(n, m) float64, not negative: how well each candidate covers each thing."""
        if self.of == "parts":
            return np.maximum(candidates.part_scores(), 0.0)
        answers = [response.strip().casefold() for response in candidates.responses]
        columns = {answer: column for column, answer in enumerate(dict.fromkeys(answers))}
        scores = np.asarray(candidates.scores, np.float64)
        votes = np.exp((scores - scores.max(initial=-np.inf)) / self.temperature)
        which = np.array([columns[answer] for answer in answers], dtype=np.int64)
        worth = np.bincount(which, weights=votes, minlength=len(columns)) / votes.sum() if len(which) else votes
        covers = np.zeros((len(which), len(columns)))
        covers[np.arange(len(which)), which] = worth[which]
        return covers

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        covers = self.covers(candidates)
        covered = np.zeros(covers.shape[1])
        free = np.ones(len(candidates), dtype=bool)
        chosen: list[int] = []
        while len(chosen) < min(k, len(candidates)):
            gain = np.maximum(covers - covered, 0.0).sum(axis=1)
            row = int(np.argmax(np.where(free, gain, -np.inf)))
            chosen.append(row)
            free[row] = False
            covered = np.maximum(covered, covers[row])
        return chosen

"""Diversity: demonstrations that are near the query and far from one another."""

from __future__ import annotations

import dataclasses

import numpy as np

from .candidates import POOL, Candidates, refuse_pool

__all__ = ["DPP", "MMR"]

#: A candidate whose squared distance from the span of those chosen is less is one of their combinations: the float32
#: embeddings tell no more.
_IN_SPAN = 1e-6


@dataclasses.dataclass(frozen=True)
class MMR:
    """Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998).

    The next one has the largest `relevance * score - (1 - relevance) * max(its cosines to those chosen)`. Of equals
    the better ranked comes first.

    Args:
        relevance: 1 is plain top-n, 0 is diversity alone. 0.8 is our choice, on a development world of the playground.
        pool: candidates considered.

    Raises:
        ValueError: `relevance` is not in [0, 1], or `pool` is negative.
    """

    relevance: float = 0.8
    pool: int = POOL
    name: str = dataclasses.field(default="mmr", init=False)

    def __post_init__(self) -> None:
        _check(self.relevance, self.pool)

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        vectors = np.asarray(candidates.vectors, np.float64)
        worth = self.relevance * np.asarray(candidates.scores, np.float64)
        nearest = np.full(len(candidates), -np.inf)
        free = np.ones(len(candidates), dtype=bool)
        chosen: list[int] = []
        while len(chosen) < min(k, len(candidates)):
            likeness = nearest if chosen else 0.0
            row = int(np.argmax(np.where(free, worth - (1 - self.relevance) * likeness, -np.inf)))
            chosen.append(row)
            free[row] = False
            nearest = np.maximum(nearest, vectors @ vectors[row])
        return chosen


@dataclasses.dataclass(frozen=True)
class DPP:
    """Greedy maximum of a determinantal point process (Chen, Zhang & Zhou, NeurIPS 2018).

    The next one adds most to `relevance * sum(scores) + (1 - relevance) * log det(G)`, G the cosines among those
    chosen: the logarithm of the probability under the kernel `q_i G_ij q_j`, with
    `q = exp(relevance / (2 (1 - relevance)) * score)` (the paper's section 4). What a candidate adds comes from a
    Cholesky factor that grows by a column at a time, so that k of n cost O(k n (k + dimension)).

    Once what is left lies in the span of those chosen (duplicates; more of them than the embeddings have dimensions)
    every determinant is zero, and the rest comes by rank.

    Args:
        relevance: 1 is plain top-n, 0 is diversity alone. 0.95 is our choice, as for `MMR`; a logarithm
            ranges wider than cosines.
        pool: candidates considered.

    Raises:
        ValueError: `relevance` is not in [0, 1], or `pool` is negative.
    """

    relevance: float = 0.95
    pool: int = POOL
    name: str = dataclasses.field(default="dpp", init=False)

    def __post_init__(self) -> None:
        _check(self.relevance, self.pool)

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        if self.relevance == 1:  # 0 * log(0) below: no determinant has a say
            return list(range(min(k, len(candidates))))
        count = len(candidates)
        wanted = min(k, count)
        vectors = np.asarray(candidates.vectors, np.float64)
        worth = self.relevance * np.asarray(candidates.scores, np.float64)
        columns = np.zeros((count, wanted))  # of the Cholesky factor, for chosen and free rows alike
        distance = np.einsum("nd,nd->n", vectors, vectors)  # squared, of each row from the span of those chosen
        free = np.ones(count, dtype=bool)
        chosen: list[int] = []
        while len(chosen) < wanted:
            outside = free & (distance > _IN_SPAN)
            if not outside.any():
                return chosen + np.flatnonzero(free)[: wanted - len(chosen)].tolist()
            gain = np.full(count, -np.inf)
            gain[outside] = worth[outside] + (1 - self.relevance) * np.log(distance[outside])
            row, at = int(np.argmax(gain)), len(chosen)
            column = vectors @ vectors[row] - columns[:, :at] @ columns[row, :at]
            columns[:, at] = column / np.sqrt(distance[row])
            distance = distance - columns[:, at] ** 2
            chosen.append(row)
            free[row] = False
        return chosen


def _check(relevance: float, pool: int) -> None:
    if not 0 <= relevance <= 1:
        raise ValueError(f"expected a relevance in [0, 1], 1 for plain top-n, got {relevance}")
    refuse_pool(pool)

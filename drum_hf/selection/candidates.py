"""What a selector is given, what it must return, and the plain choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from ..data import TripletTable
from ..errors import DimensionMismatchError
from ..types import Demonstration, Query

__all__ = ["POOL", "Candidates", "Selector", "TopN", "choose", "refuse_pool"]

#: Candidates that a selector chooses from unless told; our choice.
POOL = 50


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """One query's candidates, best-ranked first: never the query itself nor a row of its group.

    Attributes:
        query: what is asked, with the draft that the retriever saw.
        ids: of n demonstrations.
        scores: (n,) float, the retriever's scores in [-1, 1], falling; higher is more useful.
        vectors: (n, dimension) float, the candidates' embeddings, rows of unit length.
        query_vector: (dimension,) float, the query's embedding, of unit length.
        support: the table that the ids are of.
        parts: names of the equal stretches that an embedding is concatenated from, in order.

    Raises:
        DimensionMismatchError: the arrays don't fit one another.
    """

    query: Query
    ids: Sequence[str]
    scores: np.ndarray
    vectors: np.ndarray
    query_vector: np.ndarray
    support: TripletTable
    parts: tuple[str, ...] = ("image", "prompt", "response")

    def __post_init__(self) -> None:
        count, width = len(self.ids), len(self.query_vector)
        if self.scores.shape != (count,) or self.vectors.shape != (count, width) or width % len(self.parts):
            raise DimensionMismatchError(
                f"expected scores of shape ({count},) and vectors of shape ({count}, {width}) in {len(self.parts)} "
                f"equal parts for {count} candidates, got {self.scores.shape} and {self.vectors.shape}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Sequence[int] | np.ndarray) -> Candidates:
        """These rows alone, in this order."""
        places = np.asarray(rows, dtype=np.int64)
        ids = [self.ids[row] for row in places.tolist()]
        return dataclasses.replace(self, ids=ids, scores=self.scores[places], vectors=self.vectors[places])

    @property
    def responses(self) -> list[str]:
        """The candidates' responses."""
        return [self.support.responses[self.support.row(id)] for id in self.ids]

    def demonstration(self, row: int) -> Demonstration:
        """A candidate with its image, which is read now."""
        return self.support[self.ids[row]]

    def part_scores(self) -> np.ndarray:
        """(n, number of parts) float64: what each part contributes to a candidate's score; a row sums to the score."""
        products = np.asarray(self.vectors, np.float64) * np.asarray(self.query_vector, np.float64)
        return products.reshape(len(self), len(self.parts), len(self.query_vector) // len(self.parts)).sum(axis=2)


@runtime_checkable
class Selector(Protocol):
    """Chooses demonstrations from a query's candidates.

    Attributes:
        name: as tables and the command line know it.
        pool: how many candidates it wants to choose from; it gets at least as many as are wanted of it.
    """

    @property
    def name(self) -> str: ...

    @property
    def pool(self) -> int: ...

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        """At most `k` different rows of the candidates, most useful first."""
        ...


@dataclasses.dataclass(frozen=True)
class TopN:
    """The best-ranked, whatever they have in common: what happens where no selector is named."""

    pool: int = 0
    name: str = dataclasses.field(default="top", init=False)

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        return list(range(min(k, len(candidates))))


def choose(selector: Selector, candidates: Candidates, k: int) -> list[int]:
    """What a selector chooses, checked.

    Raises:
        ValueError: it chose a row twice, one that is not there, or more than `k`.
    """
    rows = [int(row) for row in selector(candidates, k)]
    if len(rows) > k or len(set(rows)) < len(rows) or not all(0 <= row < len(candidates) for row in rows):
        raise ValueError(
            f"expected selector {selector.name!r} to choose at most {k} different rows of {len(candidates)} "
            f"candidates, it chose {rows}"
        )
    return rows


def refuse_pool(pool: int) -> None:
    if pool < 0:
        raise ValueError(f"expected a pool of 0 candidates or more, got {pool}")

"""Vectors to measure an index on: any that fulfil `Vectors`, and synthetic ones of known structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

__all__ = ["SyntheticVectors", "Vectors"]

_BLOCK = 1 << 13


class Vectors(Protocol):
    """Rows to be indexed, and queries.

    Attributes:
        name: as the report has it.
    """

    name: str

    @property
    def dimension(self) -> int: ...

    def prepare(self, *, workers: int = 1) -> None:
        """Make what the others read."""

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` rows, float32 (n, dimension), some at a time."""
        ...

    def asked(self) -> np.ndarray:
        """The queries, float32 (queries, dimension)."""
        ...

    def describe(self) -> dict[str, Any]:
        """What they are, for the report."""
        ...


@dataclasses.dataclass(frozen=True)
class SyntheticVectors:
    """Vectors made like those of three CLIP-B/32 parts: a row's parts are three views of one latent vector.

    The latent is Gaussian, of `intrinsic` dimensions; each part is a random linear map of it, of unit length, with
    Gaussian noise of `noise` times its length in all directions; the three stand side by side. Rows are independent,
    so there are no clusters for a graph or for lists to profit from.

    Args:
        count: rows of the table.
        queries: further rows, that are asked.
        intrinsic: dimensions of the latent.
        parts, width: three of 512, as CLIP-B/32 gives them.
        noise: length of the noise, as a share of the part's.
        seed: of maps and rows.
    """

    count: int
    queries: int
    intrinsic: int = 32
    parts: int = 3
    width: int = 512
    noise: float = 0.1
    seed: int = 0

    name = "synthetic"

    @property
    def dimension(self) -> int:
        return self.parts * self.width

    def prepare(self, *, workers: int = 1) -> None:
        """Nothing to prepare: rows are drawn when they are needed."""

    def blocks(self, count: int) -> Iterator[np.ndarray]:
        """The first `count` rows, float32 (n, dimension), some at a time; always the same ones."""
        for number, start in enumerate(range(0, count, _BLOCK)):
            yield self._rows(number)[: count - start]

    def asked(self) -> np.ndarray:
        """The queries, float32 (queries, dimension)."""
        blocks = range(1 << 30, (1 << 30) + -(-self.queries // _BLOCK))
        return np.concatenate([self._rows(number) for number in blocks])[: self.queries]

    def _rows(self, number: int) -> np.ndarray:
        maps = np.random.default_rng([self.seed, 0]).standard_normal((self.parts, self.intrinsic, self.width))
        rng = np.random.default_rng([self.seed, 1, number])
        latent = rng.standard_normal((_BLOCK, self.intrinsic), np.float32)
        parts = []
        for one in maps.astype(np.float32):
            part = latent @ one
            part /= np.linalg.norm(part, axis=1, keepdims=True)
            part += rng.standard_normal(part.shape, np.float32) * np.float32(self.noise / self.width**0.5)
            parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
        return np.concatenate(parts, axis=1) / np.float32(self.parts**0.5)

    def describe(self) -> dict[str, str | int | float]:
        """What they are, for the report."""
        return {
            "vectors": f"synthetic: {self.parts} parts of {self.width}, each a random map of one Gaussian latent",
            "dimension": self.dimension,
            "intrinsic_dimension": self.intrinsic,
            "noise": self.noise,
            "queries": self.queries,
        }

"""Retrievers that were not trained, over one support set: towers are loaded once, and each part is embedded once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from ..data import TripletTable
from ..retriever.retriever import PART_WEIGHTS, DemoRetriever

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["UntrainedRetrievers"]


class UntrainedRetrievers:
    """Makes the retrievers of `drum_hf.retriever.PART_WEIGHTS`, each when it is first asked for.

    An embedding is its parts' unit vectors, scaled and put side by side, so that "sit+draft" needs nothing that "si",
    "st" and the responses' vectors do not hold.

    Args:
        encoder: a CLIP or SigLIP checkpoint on the Hub, a folder, or "playground/clip".
        support: the demonstrations.
    """

    def __init__(self, encoder: str, support: TripletTable) -> None:
        self.encoder, self.support = encoder, support
        self._loaded: SentenceTransformer | None = None
        self._made: dict[str, DemoRetriever] = {}
        self._parts: dict[str, np.ndarray] = {}

    def __call__(self, strategy: str) -> DemoRetriever:
        """The retriever of that name.

        Raises:
            ValueError: an unknown name.
            RowError: a demonstration has none of the parts that are compared.
        """
        if strategy not in PART_WEIGHTS:
            raise ValueError(f"expected a strategy of {', '.join(PART_WEIGHTS)}, got {strategy!r}")
        if strategy not in self._made:
            retriever = self._retriever(PART_WEIGHTS[strategy])
            retriever.refresh(self._vectors(retriever))
            self._made[strategy] = retriever
        return self._made[strategy]

    def _retriever(self, weights: tuple[float, ...]) -> DemoRetriever:
        if self._loaded is None:
            self._loaded = DemoRetriever.from_encoder(self.encoder, self.support).encoder
        towers = self._loaded[0].model
        # of its own but for the towers: the weights of the parts are set on it
        encoder = copy.deepcopy(self._loaded, {id(towers): towers})
        return DemoRetriever.from_encoder(encoder, self.support, weights=weights)

    def _vectors(self, retriever: DemoRetriever) -> np.ndarray | None:
        """As `encode_support` gives them; None where a row has no part to compare, for that to say which."""
        weights = retriever.weights
        used = {part: self._part(part) for part, weight in weights.items() if weight}
        empty = np.zeros_like(next(iter(used.values())))
        scaled = [np.sqrt(weight) * used.get(part, empty) for part, weight in weights.items()]
        vectors = np.concatenate(scaled, axis=1, dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / lengths if lengths.all() else None

    def _part(self, part: str) -> np.ndarray:
        """(number of demonstrations, width) float32: unit vectors of a part, zeros where it is absent."""
        if part not in self._parts:
            columns = {
                "image": self.support.image_keys,
                "prompt": self.support.prompts,
                "response": self.support.responses,
            }
            names = list(columns)
            there = np.array([bool(value and value.strip()) for value in columns[part]])
            retriever = self._retriever(tuple(float(name == part) for name in names))
            width = (retriever.encoder.get_embedding_dimension() or 0) // len(names)
            vectors = np.zeros((len(self.support), width), np.float32)
            if there.any():
                start = names.index(part) * width
                ids = [id for id, has in zip(self.support.ids, there, strict=True) if has]
                vectors[there] = retriever.encode_support(ids)[:, start : start + width]
            self._parts[part] = vectors
        return self._parts[part]

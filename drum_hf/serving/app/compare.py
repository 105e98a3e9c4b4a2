"""What the app does, without a page: one query, the demonstrations of several strategies, and the LVLM's answers."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...encoders.joint import PARTS
from ...errors import RowError
from ...retriever.retriever import PART_WEIGHTS
from ...scores.cached import CachedLVLM
from ...scores.store import ScoreStore
from ...types import LVLM, ICLRequest, Query, Retrieval

if TYPE_CHECKING:
    from ...retriever.retriever import DemoRetriever

__all__ = ["Comparer", "SideBySide", "Outcome", "RetrieverView", "retrieve_weighted", "similarity", "strategy_name"]

_NAMES = {
    "si": "SI",
    "st": "ST",
    "sit": "SIT",
    "sit+draft": "SIT + draft",
    "si+draft": "SI + draft",
    "st+draft": "ST + draft",
}


def strategy_name(weights: Mapping[str, float]) -> str:
    """What the literature calls a comparison of these parts; their names where it has none.

    >>> strategy_name({"image": 1, "prompt": 1, "response": 0})
    'SIT'
    >>> strategy_name({"image": 0, "prompt": 0, "response": 1})
    'draft'
    """
    used = [weights[part] > 0 for part in PARTS]
    for key, parts in PART_WEIGHTS.items():
        if used == [weight > 0 for weight in parts]:
            return _NAMES[key]
    parts_used = (part for part, there in zip(PARTS, used, strict=True) if there)
    return " + ".join("draft" if part == "response" else part for part in parts_used)


@dataclasses.dataclass(frozen=True)
class RetrieverView:
    """One of the strategies that are compared.

    Attributes:
        retriever: finds its demonstrations.
        name: as shown; "" names it by the parts that are compared.
        weights: of image, prompt and draft, before anyone moves a slider; None: the retriever's own. A part that
            the retriever's own weights leave out is not in its vectors, and can't be given weight.
    """

    retriever: DemoRetriever
    name: str = ""
    weights: Mapping[str, float] | None = None

    @property
    def start(self) -> dict[str, float]:
        """Weight of each part before anyone moves a slider; they sum to 1."""
        return _shares(self.retriever.weights if self.weights is None else self.weights)


def similarity(
    retriever: DemoRetriever,
    strategy: str = "sit+draft",
    *,
    encoder: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> RetrieverView:
    """A strategy without training over the same support set, to compare a retriever with.

    Args:
        retriever: if it is untrained itself and weighs every part, its vectors are used as they are.
        strategy: "si", "st", "sit" or "sit+draft"; whichever it is, every part may be given weight later.
        encoder: a CLIP or SigLIP; None: the one that the retriever was made from.
        device: of the encoder.

    Raises:
        ValueError: an unknown strategy.
    """
    if strategy not in PART_WEIGHTS:
        raise ValueError(f"expected one of the strategies {', '.join(PART_WEIGHTS)}, got {strategy!r}")
    weights = dict(zip(PARTS, PART_WEIGHTS[strategy], strict=True))
    if retriever.teacher is None and encoder is None and all(retriever.weights.values()):
        return RetrieverView(retriever, weights=weights)
    untrained = type(retriever).from_encoder(
        encoder or retriever.base_model,
        support=retriever.support,
        strategy="sit+draft",
        index_kind=retriever.index_kind,
        index_options=retriever.index_options,
        revision=None if encoder else retriever.base_revision,
        device=device,
    )
    return RetrieverView(untrained, weights=weights)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one strategy came to.

    Attributes:
        name: of the strategy.
        weights: of image, prompt and response; they sum to 1.
        retrieval: its demonstrations, most useful first, and their scores.
        parts: for each demonstration what image, prompt and response add to its score.
        answer: the LVLM's, with these demonstrations in its context, the most useful one last.
    """

    name: str
    weights: dict[str, float]
    retrieval: Retrieval
    parts: tuple[dict[str, float], ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """A query, the LVLM's answer without demonstrations, and what each strategy came to.

    Attributes:
        query: as it was asked; its `draft` is the zero-shot answer.
        outcomes: one for each strategy, in their order.
    """

    query: Query
    outcomes: tuple[Outcome, ...]

    @property
    def zero_shot(self) -> str:
        """The LVLM's answer without demonstrations: the draft."""
        return self.query.draft or ""


def retrieve_weighted(
    retriever: DemoRetriever, query: Query, k: int, weights: Mapping[str, float]
) -> tuple[Retrieval, tuple[dict[str, float], ...]]:
    """Retrieve under other weights of the parts, without embedding the support set anew.

    A vector holds each part's unit vector times the root of its weight, so weighting the query's side by
    `new / root(old)` ranks and scores as an encoder with the new weights would. Exactly so where every demonstration
    has all parts; the vectors of those that lack one keep the retriever's weights among the others.

    Args:
        retriever: its weights must be positive wherever the new ones are.
        query: with a draft where responses have weight; nothing is generated here.
        k: how many demonstrations.
        weights: of image, prompt and response, not negative; scaled to sum to 1.

    Returns:
        The retrieval, its scores in [-1, 1]; and for each demonstration its score by part, adding up to it.

    Raises:
        ValueError: weights that can't be used.
        RowError: the query has no part that has weight.
        TooFewDemonstrationsError: k is more than the support set holds.
    """
    new = _shares(weights)
    old = retriever.weights
    if missing := [part for part in PARTS if new[part] and not old[part]]:
        raise ValueError(
            f"expected weight on {', '.join(p for p in PARTS if old[p])} only, got {', '.join(missing)} too, which "
            "this retriever's vectors leave out; build one with strategy 'sit+draft' to weigh all parts"
        )
    there = {"image": query.image is not None, "prompt": query.prompt.strip(), "response": (query.draft or "").strip()}
    whole = sum(new[part] for part in PARTS if there[part])
    if not whole:
        raise RowError(
            f"expected a query with {' or '.join(p for p in PARTS if new[p])}, which alone have weight, got none of "
            "it; fill it in, or give other parts weight"
        )
    (vector,) = retriever.encode_queries([dataclasses.replace(query, draft=query.draft or "")])
    blocks = vector.astype(np.float64).reshape(len(PARTS), -1)
    for block, part in zip(blocks, PARTS, strict=True):
        length = np.linalg.norm(block)
        if length:
            block *= new[part] / (math.sqrt(old[part] * whole) * length)
    (ids,), _ = retriever.index.search(
        blocks.reshape(1, -1).astype(np.float32), k, exclude_ids=[query.id], exclude_groups=[query.group]
    )
    found = retriever.index.vectors(ids).astype(np.float64).reshape(len(ids), len(PARTS), -1)
    shares = (found * blocks).sum(axis=2)
    scores = tuple(float(np.clip(score, -1.0, 1.0)) for score in shares.sum(axis=1))
    parts = tuple(dict(zip(PARTS, map(float, row), strict=True)) for row in shares)
    return Retrieval(query.id, tuple(retriever.support.demonstrations(ids)), scores), parts


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.get(part, 0.0) for part in PARTS)
    if not all(math.isfinite(w) and w >= 0 for w in weights.values()) or total <= 0 or set(weights) - set(PARTS):
        got = ", ".join(f"{part} {weight}" for part, weight in weights.items())
        raise ValueError(
            f"expected weights of {', '.join(PARTS)} that are 0 or more, one of them above 0, got {got}; raise one"
        )
    return {part: weights.get(part, 0.0) / total for part in PARTS}


class Comparer:
    """Asks an LVLM one query without demonstrations and with those of each strategy.

    Answers are kept while it lives: moving a slider back, or two strategies that agree, cost nothing.

    Args:
        lvlm: it answers, and its zero-shot answer is the draft.
        strategies: at least one.
        max_new_tokens: the longest answer.

    Raises:
        ValueError: no strategy, or weights that its retriever has no vectors for.
    """

    def __init__(self, lvlm: LVLM, strategies: Sequence[RetrieverView], *, max_new_tokens: int = 32) -> None:
        if not strategies:
            raise ValueError("expected at least one strategy to compare, got none")
        self.lvlm = CachedLVLM(lvlm, ScoreStore())
        self.strategies = tuple(strategies)
        self.max_new_tokens = max_new_tokens
        self._asks = any(map(str.strip, strategies[0].retriever.support.prompts))

    def __call__(
        self, query: Query, shots: int, weights: Sequence[Mapping[str, float] | None] | None = None
    ) -> SideBySide:
        """Carry it out for one query.

        Args:
            query: with an image, and a prompt unless the demonstrations have none either.
            shots: demonstrations in the context, at least 1.
            weights: for each strategy those of image, prompt and response; None: as it starts.

        Raises:
            RowError: the query lacks its image or its prompt.
            ValueError: shots below 1, or weights that can't be used.
            DrumError: whatever the retriever or the LVLM says, such as `ContextOverflowError` or `EndpointError`.
        """
        if query.image is None:
            raise RowError("expected an image, got none; upload one, or pick an example")
        if self._asks and not query.prompt.strip():
            raise RowError("expected a question, got none; type one, or pick an example")
        chosen = [None] * len(self.strategies) if weights is None else weights
        by_strategy = [
            strategy.start if given is None else _shares(given)
            for strategy, given in zip(self.strategies, chosen, strict=True)
        ]
        (draft,) = self.lvlm.generate([ICLRequest(query)], max_new_tokens=self.max_new_tokens)
        query = dataclasses.replace(query, draft=draft)
        found = [
            retrieve_weighted(strategy.retriever, query, shots, given)
            for strategy, given in zip(self.strategies, by_strategy, strict=True)
        ]
        requests = [ICLRequest(query, retrieval.demonstrations[::-1]) for retrieval, _ in found]
        answers = self.lvlm.generate(requests, max_new_tokens=self.max_new_tokens)
        outcomes = (
            Outcome(strategy.name or strategy_name(given), given, *seen, answer)
            for strategy, given, seen, answer in zip(self.strategies, by_strategy, found, answers, strict=True)
        )
        return SideBySide(query, tuple(outcomes))

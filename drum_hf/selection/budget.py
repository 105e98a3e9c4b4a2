"""A token budget: as many demonstrations as fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ContextOverflowError
from ..types import ICLRequest
from .candidates import Candidates, Selector, TopN, refuse_pool
from .order import Order, arrange

__all__ = ["TokenBudget"]

Counter = Callable[[Sequence[ICLRequest]], list[int]]


class TokenBudget:
    """As many demonstrations as fit the LVLM's context, or a given number of tokens; at most as many as are wanted.

    The demonstrations are taken in the order in which `base` chooses them; one that no longer fits is left out, and a
    shorter one that comes later may still go in. Whole conversations are counted as they will be shown, images
    included, by the LVLM's own counts: so the budget is kept to the token, and what is left goes to no waste. Where
    all that are wanted fit, the result is the base's.

    Args:
        lvlm: an LVLM that can count: a `TransformersLVLM` (or one inside a `CachedLVLM`). None: `count` does.
        tokens: of the whole conversation and the answer; None: the LVLM's context.
        reserve: tokens kept free for the answer. 32 is what an answer has unless told.
        base: what is chosen from; plain top-n unless told.
        count: requests -> tokens of each conversation up to where the answer begins, for an LVLM that can't count.
        order: in which the demonstrations will be shown; the border between two turns may cost a token more or less.
        pool: further candidates, beside those wanted, that may fill the room of one that was left out.

    Raises:
        ValueError: nothing can count, or nothing says what fits.
    """

    name = "budget"

    def __init__(
        self,
        lvlm: Any = None,
        *,
        tokens: int | None = None,
        reserve: int = 32,
        base: Selector | None = None,
        count: Counter | None = None,
        order: Order = "best_last",
        pool: int = 0,
    ) -> None:
        inner = lvlm
        while inner is not None and not hasattr(inner, "count_tokens") and hasattr(inner, "lvlm"):
            inner = inner.lvlm  # a cache around it
        count = count or getattr(inner, "count_tokens", None)
        if count is None:
            got = "no LVLM" if lvlm is None else f"{type(inner).__name__}, which has no count_tokens"
            raise ValueError(
                f"expected an LVLM that counts its tokens, got {got}; pass a TransformersLVLM, or count= a function "
                "from requests to the tokens of each"
            )
        limit = getattr(inner, "context_length", None) if tokens is None else tokens
        if limit is None:
            raise ValueError("expected an LVLM that states its context, got one that doesn't; pass tokens=")
        if limit < 1 or reserve < 0:
            raise ValueError(f"expected tokens of at least 1 and a reserve of 0 or more, got {limit} and {reserve}")
        refuse_pool(pool)
        self.limit, self.reserve, self.order = limit, reserve, order
        self.base: Selector = base or TopN()
        self.pool = max(pool, self.base.pool)
        self._count = count

    def __repr__(self) -> str:
        return f"TokenBudget(tokens={self.limit}, reserve={self.reserve}, base={self.base!r})"

    def tokens(self, candidates: Candidates, rows: Sequence[int]) -> int:
        """Tokens of the conversation that shows these rows, most useful first, and of the room for its answer."""
        shown = arrange([candidates.demonstration(row) for row in rows], self.order)
        return self._count([ICLRequest(candidates.query, tuple(shown))])[0] + self.reserve

    def __call__(self, candidates: Candidates, k: int) -> list[int]:
        """The rows that fit, in the base's order.

        Raises:
            ContextOverflowError: the query fits no budget even without a demonstration.
        """
        ranked = self.base(candidates, len(candidates))
        if ranked and self.tokens(candidates, ranked[:k]) <= self.limit:
            return ranked[:k]
        if (bare := self.tokens(candidates, [])) > self.limit:
            raise ContextOverflowError(
                f"expected query {candidates.query.id!r} and {self.reserve} tokens of answer to fit {self.limit} "
                f"tokens without a demonstration, they take {bare}; use a smaller image, or a larger budget"
            )
        chosen: list[int] = []
        for row in ranked:
            if len(chosen) == k:
                break
            if self.tokens(candidates, [*chosen, row]) <= self.limit:
                chosen.append(row)
        return chosen

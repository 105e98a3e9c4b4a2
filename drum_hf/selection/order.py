"""The order in which demonstrations are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import numpy as np

__all__ = ["Order", "arrange"]

Order = Literal["best_last", "best_first", "shuffled"]

_Item = TypeVar("_Item")


def arrange(ranked: Sequence[_Item], order: Order = "best_last", *, seed: int = 0) -> list[_Item]:
    """Put demonstrations, given most useful first, into the order in which they are shown.

    "best_last" sets the most useful nearest the query (UDR; also OpenFlamingo's RICES).

    >>> arrange(["best", "good", "fair"])
    ['fair', 'good', 'best']

    Raises:
        ValueError: unknown order.
    """
    if order == "best_last":
        return list(reversed(ranked))
    if order == "best_first":
        return list(ranked)
    if order == "shuffled":
        return [ranked[i] for i in np.random.default_rng(seed).permutation(len(ranked))]
    raise ValueError(f"expected an order of {', '.join(get_args(Order))}; got {order!r}")

"""Which queries a report shows, and one of them in the form that the report reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..types import Demonstration

__all__ = ["at_their_best", "pick_rows", "shown_column"]


def at_their_best(values: np.ndarray) -> np.ndarray:
    """(queries,) bool: the metric is as high as on any of these queries, which of an accuracy is to be right."""
    return np.asarray(values >= max(values.max(initial=0.0), 1e-9) - 1e-9)


def pick_rows(right: Sequence[np.ndarray], count: int) -> list[int]:
    """Queries drawn evenly over who was right, in the order of the table.

    Args:
        right: (queries,) bool of each strategy.
        count: at most so many.

    >>> pick_rows([np.array([True, True, True, False]), np.array([True, True, True, True])], 2)
    [3, 0]
    """
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for row, kind in enumerate(zip(*right, strict=True)):
        kinds.setdefault(tuple(map(bool, kind)), []).append(row)
    rows: list[int] = []
    while len(rows) < count and any(kinds.values()):
        for kind in sorted(kinds):
            if kinds[kind] and len(rows) < count:
                rows.append(kinds[kind].pop(0))
    return rows


def shown_column(
    demonstrations: Sequence[Demonstration],
    answer: str,
    correct: bool,
    *,
    scores: Sequence[float] | None = None,
    utilities: Sequence[float] | None = None,
) -> Mapping[str, Any]:
    """A column of an example: what a strategy showed, and what came of it.

    Args:
        scores: of the retriever, and `utilities` in nats; None where they are not known.
    """
    entries = []
    for i, demo in enumerate(demonstrations):
        entries.append(
            {
                "image": demo.image,
                "prompt": demo.prompt,
                "response": demo.response,
                "score": None if scores is None else float(scores[i]),
                "utility": None if utilities is None else float(utilities[i]),
                "note": None,
            }
        )
    return {"demonstrations": entries, "answer": answer, "correct": correct}

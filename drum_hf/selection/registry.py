"""Selectors by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .budget import TokenBudget
from .candidates import Selector, TopN
from .coverage import Coverage
from .diversity import DPP, MMR
from .utility import AdaptiveShots

__all__ = ["SELECTORS", "get_selector", "register_selector"]

#: Name -> what makes the selector. "budget" needs an LVLM, "adaptive" a calibration.
SELECTORS: dict[str, Callable[..., Selector]] = {
    "top": TopN,
    "mmr": MMR,
    "dpp": DPP,
    "coverage": Coverage,
    "answers": functools.partial(Coverage, of="answers"),
    "budget": TokenBudget,
    "adaptive": AdaptiveShots,
}


def register_selector(name: str, make: Callable[..., Selector]) -> None:
    """Add a selector of your own, which retrievers, pipelines, evaluators and the command line then know by name.

    Args:
        name: not taken yet.
        make: a class or function that makes the [`Selector`][drum_hf.selection.Selector]; the options given to
            `get_selector` are its arguments.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> class Shortest:
        ...     name, pool = "shortest", 20
        ...     def __call__(self, candidates, k):
        ...         return sorted(range(len(candidates)), key=lambda i: len(candidates.responses[i]))[:k]
        >>> register_selector("shortest", Shortest)
        >>> SELECTORS.pop("shortest") is Shortest
        True
    """
    if name in SELECTORS:
        raise ValueError(f"expected the name of a selector that is not taken, got {name!r}")
    SELECTORS[name] = make


def get_selector(selector: str | Selector, **options: Any) -> Selector:
    """A selector by name; one that is made already as it is.

    Args:
        selector: "top" (plain top-n), "mmr", "dpp", "coverage" (of the query's parts), "answers" (coverage of
            answers), "budget" or "adaptive"; or a `Selector`.
        options: arguments of the class, with a name only.

    Raises:
        ValueError: an unknown name, or options that the selector does not have or lacks.
        TypeError: neither a name nor a selector.

    >>> get_selector("mmr", relevance=0.5)
    MMR(relevance=0.5, pool=50, name='mmr')
    """
    if not isinstance(selector, str):
        if not isinstance(selector, Selector) or not callable(selector):
            raise TypeError(f"expected the name of a selector, or a Selector, got {type(selector).__name__}")
        if options:
            raise ValueError(f"expected options ({', '.join(options)}) with a name, got a {type(selector).__name__}")
        return selector
    if selector not in SELECTORS:
        raise ValueError(f"expected a selector of {', '.join(SELECTORS)}, got {selector!r}")
    if selector == "adaptive" and "calibration" not in options:
        raise ValueError(
            "expected calibration= for selector 'adaptive'; fit one with drum_hf.training.calibrate, and "
            "pass AdaptiveShots(calibration)"
        )
    try:
        return SELECTORS[selector](**options)
    except TypeError as error:
        raise ValueError(f"selector {selector!r} can't be made with {', '.join(options)}: {error}") from error

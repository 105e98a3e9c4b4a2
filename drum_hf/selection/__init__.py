"""From ranked candidates to the sequence that the LVLM is shown: which of them, how many, in which order.

A retriever scores candidates one by one, but they are used together. A [`Selector`][drum_hf.selection.Selector] looks
at a query's candidates together. The plain choice, the first of the ranking, is what happens where none is named.
"""

from __future__ import annotations

from .budget import TokenBudget
from .candidates import Candidates, Selector, TopN, choose
from .coverage import Coverage
from .diversity import DPP, MMR
from .order import Order, arrange
from .registry import SELECTORS, get_selector, register_selector
from .utility import AdaptiveShots, IsotonicUtility, LogisticUtility, UtilityCalibration, fit_utility

__all__ = [
    "DPP",
    "MMR",
    "SELECTORS",
    "AdaptiveShots",
    "Candidates",
    "Coverage",
    "IsotonicUtility",
    "LogisticUtility",
    "Order",
    "Selector",
    "TokenBudget",
    "TopN",
    "UtilityCalibration",
    "arrange",
    "choose",
    "fit_utility",
    "get_selector",
    "register_selector",
]

"""How conversations are drawn, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...data.rows import LETTERS
from .types import FORMS, Form


@dataclasses.dataclass(frozen=True)
class EpisodeSettings:
    """How conversations are drawn. Every default is our choice.

    Attributes:
        shots: fewest and most turns before the last; each number in between is as likely.
        forms: which answer forms, each as likely where the table has the texts for it.
        ways: fewest and most different values of the concept in a conversation, or None for as they come. (1, 1):
            every turn shows the same value, so that answers can be copied.
        copied: share of conversations whose last value was shown before, so that a demonstration gives the answer; the
            others end with a new value. None: as it comes.
        distractors: share of the turns before the last that are about another concept. The first stays on the
            concept.
        difficulty: the hardest concepts drawn, from 0 (only the easiest) to 1 (all of them).
        options: fewest and most options of a multiple choice made from a concept's values; a row's own are kept.
        renamed: share of conversations where made-up words stand for the values, so that only demonstrations tell what
            they mean.
        unnamed: share of conversations that don't name the concept in the question; they have no distractors.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    shots: tuple[int, int] = (0, 8)
    forms: tuple[Form, ...] = FORMS
    ways: tuple[int, int] | None = None
    copied: float | None = None
    distractors: float = 0.0
    difficulty: float = 1.0
    options: tuple[int, int] = (2, 4)
    renamed: float = 0.0
    unnamed: float = 0.0

    def __post_init__(self) -> None:
        for name, lowest, highest in (("shots", 0, None), ("ways", 1, None), ("options", 2, len(LETTERS))):
            pair = getattr(self, name)
            if pair is None and name == "ways":
                continue
            object.__setattr__(self, name, _range(name, pair, lowest, highest))
        for name in ("copied", "distractors", "difficulty", "renamed", "unnamed"):
            share = getattr(self, name)
            if not (share is None and name == "copied") and not is_share(share):
                raise ValueError(f"expected {name} between 0 and 1, got {share!r}")
        forms = (self.forms,) if isinstance(self.forms, str) else tuple(self.forms)
        if not forms or not set(forms) <= set(FORMS):
            raise ValueError(f"expected forms among {', '.join(map(repr, FORMS))}, got {self.forms!r}")
        object.__setattr__(self, "forms", forms)
        if self.ways and self.copied is not None and self.copied < 1 and self.ways[1] == 1 and self.shots[1] > 0:
            raise ValueError(
                f"expected copied=1 or None with ways={self.ways}, for one value only is always shown before, got "
                f"copied={self.copied}; allow more ways"
            )


def is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _range(name: str, pair: Any, lowest: int, highest: int | None) -> tuple[int, int]:
    values = (pair, pair) if isinstance(pair, int) else tuple(pair) if isinstance(pair, Sequence) else ()
    whole = len(values) == 2 and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not whole or not lowest <= values[0] <= values[1] or (highest is not None and values[1] > highest):
        most = f", both at most {highest}" if highest is not None else ""
        raise ValueError(f"expected {name} as (fewest, most), both at least {lowest}{most}, got {pair!r}")
    return values[0], values[1]

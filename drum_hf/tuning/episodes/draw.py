"""The draws of which an episode is made: values, words and option lists, from a generator of random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...data.rows import LETTERS
from ...errors import TooFewDemonstrationsError
from .settings import EpisodeSettings
from .types import Conversation

LETTER_PROMPT = "Answer with the letter."  # our choice
REPEATS = 1000  # draws in a row of what came before, after which a stream ends with an error


class Pool(NamedTuple):
    """The rows about one concept that a form can use."""

    by_value: dict[str, list[int]]  # value -> numbers of rows
    rows: list[int]
    images: dict[str, int]  # value -> different pictures
    all_images: int


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """A question with its options, one lettered line each, as episodes and benchmarks ask it.

    >>> print(choice_prompt("Which colour?", ["red", "blue"]))
    Which colour?
    A. red
    B. blue
    Answer with the letter.
    """
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, LETTER_PROMPT])


def fills(pool: Pool, settings: EpisodeSettings) -> bool:
    """Whether the longest conversation of these settings has enough pictures, whatever chance says of `copied`."""
    turns = settings.shots[1] + 1
    counts = sorted(pool.images.values(), reverse=True)
    fewest, most = settings.ways or (1, turns)
    fits = pool.all_images >= turns and len(counts) >= min(fewest, turns) and sum(counts[:most]) >= turns
    if settings.copied is None or turns == 1:
        return fits
    fits_copied = sum(counts[: min(most, turns - 1)]) >= turns
    fits_new = sum(counts[: most - 1]) >= turns - 1 and len(counts) > 1
    return fits and (fits_copied or settings.copied == 0) and (fits_new or settings.copied == 1)


def pick_values(
    rng: np.random.Generator, images: dict[str, int], turns: int, ways: tuple[int, int], copied: bool | None
) -> list[str]:
    """The value that each turn shows; none more often than it has pictures."""
    # A copied answer leaves one turn fewer for different values; a new one needs a second value.
    most = min(ways[1], len(images), turns - 1 if copied else turns)
    fewest = min(max(ways[0], 2 if copied is False else 1), most)
    count = int(rng.integers(fewest, most + 1))
    order = shuffled(rng, list(images))
    needed = turns - 1 if copied is False else turns
    count -= copied is False
    # Where pictures are few, fuller values stand in for the emptiest, and more values are taken if they may be.
    chosen, spare = order[:count], order[count:]
    while sum(images[v] for v in chosen) < needed:
        emptiest, fullest = min(chosen, key=images.__getitem__), max(spare, key=images.__getitem__, default="")
        if len(chosen) < most - (copied is False):
            chosen.append(fullest)
        elif images[fullest] > images[emptiest]:
            chosen[chosen.index(emptiest)] = fullest
            spare.append(emptiest)
        spare.remove(fullest)
    counts = dict.fromkeys(chosen, 1)
    for _ in range(needed - len(chosen)):
        counts[pick(rng, [v for v in chosen if counts[v] < images[v]])] += 1
    if copied:
        last = [pick(rng, [v for v in chosen if counts[v] > 1])]
        counts[last[0]] -= 1
    else:
        last = [pick(rng, spare)] if copied is False else []
    return shuffled(rng, [v for v, n in counts.items() for _ in range(n)]) + last


class MadeUpWords(dict[tuple[str, str], str]):
    """(concept, value) -> a word that means nothing, another one for each."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self._rng = rng

    def __missing__(self, pair: tuple[str, str]) -> str:
        while (word := self._make()) in self.values():
            pass
        self[pair] = word
        return word

    def _make(self) -> str:
        syllables = int(self._rng.integers(2, 4))
        return "".join(pick(self._rng, "bdfgklmnprstvz") + pick(self._rng, "aeiou") for _ in range(syllables))


def pick(rng: np.random.Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def shuffled(rng: np.random.Generator, items: Sequence[str]) -> list[str]:
    return [items[i] for i in rng.permutation(len(items))]


def distinct(talks: Iterator[Conversation], count: int | None) -> Iterator[Conversation]:
    """Conversations without those that came before.

    Raises:
        TooFewDemonstrationsError: there are no more different ones.
    """
    seen: set[str] = set()
    repeated = 0
    while count is None or len(seen) < count:
        talk = next(talks)
        key = talk.key
        if key in seen:
            repeated += 1
            if repeated == REPEATS:
                raise no_more(talk.source, count, len(seen))
            continue
        seen.add(key)
        repeated = 0
        yield talk


def no_more(source: str, count: int | None, given: int) -> TooFewDemonstrationsError:
    return TooFewDemonstrationsError(
        f"expected {'more' if count is None else count} different conversations, but source {source!r} has no more "
        f"after {given}: {REPEATS} draws gave what came before; give it more rows or more shots, or ask for fewer"
    )

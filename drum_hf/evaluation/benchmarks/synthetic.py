"""VL-ICL's synthetic kinds, made from labelled images: an operator or a count to be induced."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ColumnError, TooFewDemonstrationsError
from ...types import Demonstration, ICLRequest, Query, image_key
from .base import Benchmark, BenchmarkItem, numbers_of_shots
from .vl_icl import side_by_side, vl_icl_match

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["count_induction", "made_up_words", "operator_induction"]

_OPERATORS = {"+": operator.add, "-": operator.sub, "x": operator.mul}
_LETTERS = ("bdfgklmnprstvwz", "aeiou") * 2 + ("fkvxz",)
#: Words of this form that do mean something.
_REAL = frozenset(("kodak", "latex", "motif", "relax", "remix", "rolex", "serif", "telex", "topaz"))
_OPERATOR_STREAM, _COUNT_STREAM, _WORD_STREAM = 60_022, 60_023, 60_024


def made_up_words(number: int, *, seed: int = 0) -> list[str]:
    """Distinct words of five letters that mean nothing.

    Raises:
        ValueError: more words than there are (10,000).

    >>> made_up_words(3)
    ['sodoz', 'zisav', 'lagov']
    """
    if not 0 <= number <= 10_000:
        raise ValueError(f"expected 0 to 10,000 words, got {number}")
    rng = np.random.default_rng([_WORD_STREAM, seed])
    words: dict[str, None] = {}
    while len(words) < number:
        word = "".join(letters[rng.integers(len(letters))] for letters in _LETTERS)
        if word not in _REAL:
            words[word] = None
    return list(words)


def _request(
    query: tuple[Sequence[Image], str], shown: Sequence[tuple[Sequence[Image], str, str]], number: str
) -> ICLRequest:
    """A request whose turns show some images each, side by side."""
    demonstrations = tuple(
        Demonstration(f"{number}/{k}", side_by_side(images), text, answer)
        for k, (images, text, answer) in enumerate(shown)
    )
    images, text = query
    return ICLRequest(Query(side_by_side(images), text, id=number), demonstrations)


def operator_induction(
    digits: Iterable[tuple[Image, int | str]],
    *,
    shots: int | Sequence[int] = (1, 2, 4, 8),
    queries: int = 200,
    seed: int = 0,
    question: str = "What is the result?",
    name: str = "operator_induction",
) -> Benchmark:
    """Two digits side by side, and the result of +, - or x: which of them, the demonstrations tell.

    The larger digit stands left, so that no result is negative, and no pair is shown for which two operators give the
    same (a zero on the right, or 2 and 2): a single demonstration settles it (both our choice). No digit image appears
    twice in an episode. The options, for scoring by likelihood, are the results of the three operators.

    Args:
        digits: (image, digit) pairs, such as handwritten digits with their labels 0 to 9.
        shots: demonstrations, or several such numbers.
        queries: episodes; the operators take turns.
        seed: other seeds draw other episodes.
        question: what every turn asks.
        name: in results.

    Raises:
        ColumnError: a label is no digit.
        TooFewDemonstrationsError: there are fewer images than an episode shows, or of one digit only.
        ValueError: negative shots, or no query.
    """
    wanted = numbers_of_shots(shots, queries)
    pictures: list[Image] = []
    numbers: list[int] = []
    for i, (image, label) in enumerate(digits):
        if str(label) not in "0123456789" or len(str(label)) != 1:
            raise ColumnError(f"row {i}: expected a label from 0 to 9, got {label!r}")
        pictures.append(image)
        numbers.append(int(label))
    needed = 2 * (max(wanted) + 1)
    if len(pictures) < needed or len(set(numbers) - {0}) < 2:
        raise TooFewDemonstrationsError(
            f"{max(wanted)} shots need {needed} digit images, and at least two digits besides 0; got {len(pictures)} "
            f"images of the digits {sorted(set(numbers))}"
        )

    items = []
    for number in range(queries):
        rng = np.random.default_rng([_OPERATOR_STREAM, seed, number])
        symbol = list(_OPERATORS)[number % len(_OPERATORS)]
        pairs = _pairs(rng, numbers, max(wanted) + 1)
        results = [{s: str(f(numbers[a], numbers[b])) for s, f in _OPERATORS.items()} for a, b in pairs]
        (first, second), *others = pairs
        options = tuple(results[0][s] for s in rng.permutation(list(_OPERATORS)))
        shown = [
            ((pictures[a], pictures[b]), question, result[symbol])
            for (a, b), result in zip(others, results[1:], strict=True)
        ]
        for count in wanted:
            query = ((pictures[first], pictures[second]), question)
            items.append(
                BenchmarkItem(
                    id=str(number),
                    shots=count,
                    gold=results[0][symbol],
                    options=options,
                    shown=tuple(answer for _, _, answer in shown[:count]),
                    build=functools.partial(_request, query, shown[:count], str(number)),
                )
            )
    items.sort(key=lambda item: wanted.index(item.shots))
    settings = {"shots": list(wanted), "queries": queries, "seed": seed, "question": question}
    return Benchmark(name, items, scorer=vl_icl_match("operator_induction"), max_new_tokens=8, settings=settings)


def _pairs(rng: np.random.Generator, numbers: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Pairs of images, none used twice, the larger digit first, on which no two operators agree."""
    for _ in range(100):
        left = list(rng.permutation(len(numbers)))
        pairs: list[tuple[int, int]] = []
        while len(left) > 1 and len(pairs) < count:
            a = left.pop()
            for place, b in enumerate(left):
                large, small = (a, b) if numbers[a] >= numbers[b] else (b, a)
                if len({f(numbers[large], numbers[small]) for f in _OPERATORS.values()}) == len(_OPERATORS):
                    pairs.append((int(large), int(small)))
                    del left[place]
                    break
        if len(pairs) == count:
            return pairs
    raise TooFewDemonstrationsError(
        f"expected digit images for {count} pairs on which +, - and x differ, got {len(numbers)} images that don't "
        "give them; give more images of digits besides 0"
    )


def count_induction(
    scenes: Iterable[tuple[Image, Sequence[Mapping[str, str]]]],
    *,
    shots: int | Sequence[int] = (1, 2, 4, 8),
    queries: int = 200,
    seed: int = 0,
    prompt: str = "{attribute}: {value}",
    name: str = "count_induction",
) -> Benchmark:
    """Scenes of several objects; a turn names an attribute's value, and the number of such objects is the answer.

    That it is a count, the demonstrations tell (VL-ICL's clevr). Counts are drawn first and a scene with such a count
    then, so that no count is common for being so in the scenes (our choice). The options are the counts that occur.

    Args:
        scenes: (image, objects) pairs, an object being its attributes, such as {"shape": "ring", "colour": "red"}.
        shots: demonstrations, or several such numbers.
        queries: episodes.
        seed: other seeds draw other episodes.
        prompt: what a turn asks, with {attribute} and {value}.
        name: in results.

    Raises:
        ColumnError: no object has an attribute.
        TooFewDemonstrationsError: fewer different images than an episode shows, or one count only.
        ValueError: negative shots, or no query.
    """
    wanted = numbers_of_shots(shots, queries)
    unique = {image_key(image): (image, list(objects)) for image, objects in scenes}
    rows = list(unique.values())
    values = sorted({pair for _, objects in rows for thing in objects for pair in thing.items()})
    if not values:
        raise ColumnError(
            "expected scenes with objects and their attributes, such as [{'shape': 'ring', 'colour': 'red'}], got "
            f"{len(rows)} scenes without any"
        )
    # count -> (scene, attribute, value) that has it
    places: dict[int, list[tuple[int, str, str]]] = {}
    for row, (_, objects) in enumerate(rows):
        for attribute, value in values:
            count = sum(thing.get(attribute) == value for thing in objects)
            places.setdefault(count, []).append((row, attribute, value))
    counts = sorted(places)
    if len(rows) <= max(wanted) or len(counts) < 2:
        raise TooFewDemonstrationsError(
            f"{max(wanted)} shots need {max(wanted) + 1} different images and at least two counts, got {len(rows)} "
            f"images and the counts {counts}"
        )

    items = []
    for number in range(queries):
        rng = np.random.default_rng([_COUNT_STREAM, seed, number])
        used: set[int] = set()
        turns: list[tuple[Sequence[Image], str, str]] = []
        while len(turns) <= max(wanted):
            count, (row, attribute, value) = _place(rng, places, used)
            used.add(row)
            turns.append(((rows[row][0],), prompt.format(attribute=attribute, value=value), str(count)))
        (images, text, gold), *shown = turns
        for most in wanted:
            items.append(
                BenchmarkItem(
                    id=str(number),
                    shots=most,
                    gold=gold,
                    options=tuple(map(str, counts)),
                    shown=tuple(answer for _, _, answer in shown[:most]),
                    build=functools.partial(_request, (images, text), shown[:most], str(number)),
                )
            )
    items.sort(key=lambda item: wanted.index(item.shots))
    settings = {"shots": list(wanted), "queries": queries, "seed": seed, "prompt": prompt}
    return Benchmark(name, items, scorer=vl_icl_match("clevr"), max_new_tokens=8, settings=settings)


def _place(
    rng: np.random.Generator, places: Mapping[int, Sequence[tuple[int, str, str]]], used: set[int]
) -> tuple[int, tuple[int, str, str]]:
    """A count, each as likely, then one of its places in a scene that isn't used yet."""
    for count in rng.permutation(list(places)).tolist():
        for _ in range(16):
            place = places[count][int(rng.integers(len(places[count])))]
            if place[0] not in used:
                return count, place
        free = [place for place in places[count] if place[0] not in used]
        if free:
            return count, free[int(rng.integers(len(free)))]
    raise TooFewDemonstrationsError(f"every scene is used; expected more than {len(used)} different images")

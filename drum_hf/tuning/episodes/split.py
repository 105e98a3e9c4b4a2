"""Train and test apart: by picture, by concept value, by concept; and the guard that says so."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ...data.rows import shorten
from ...errors import ColumnError, LeakError
from .tables import ConceptTable, contents_of

logger = logging.getLogger(__name__)

By = Literal["image", "value"]


def split_concepts(
    table: ConceptTable,
    test: float | Mapping[str, Collection[str]] | Collection[str] = 0.2,
    *,
    by: Literal["image", "value", "concept"] = "value",
    seed: int = 0,
) -> tuple[ConceptTable, ConceptTable]:
    """Two tables that share no picture and, where asked, no concept value, or no concept.

    A picture that shows both trained and held-out values goes to one side by chance and is labelled with that side's
    values only. Other texts of a row (its caption, its wrong options) may still name a held-out value.

    Args:
        table: what is split.
        test: the share of pictures, or of each concept's values, or of concepts that is held out; or the very values
            by concept (`by="value"`), or the concepts (`by="concept"`).
        by: what the sides don't share beside pictures.
        seed: of the draw.

    Returns:
        (train, test).

    Raises:
        ValueError: the share is not between 0 and 1, or `by` is unknown.
        ColumnError: a named concept or value is not in the table, or the split would leave a side nothing.
    """
    if by not in ("image", "value", "concept"):
        raise ValueError(f"expected by 'image', 'value' or 'concept', got {by!r}")
    rng = np.random.default_rng([seed, 0])
    values = {concept: list(counts) for concept, counts in table.concepts.items()}
    images = list(dict.fromkeys(row.image_key for row in table.rows))
    held: set[tuple[str, str]] = set()
    if isinstance(test, (int, float)):
        if not 0 < test < 1:
            raise ValueError(f"expected a share test between 0 and 1, got {test}")
        if by == "value":
            held = {(c, v) for c, own in values.items() for v in _some(own, test, rng, f"values of concept {c!r}")}
        elif by == "concept":
            held = {(c, v) for c in _some(list(values), test, rng, "concepts") for v in values[c]}
    elif by == "image" or isinstance(test, str) or isinstance(test, Mapping) != (by == "value"):
        raise ValueError(
            f"expected test as a share, as {{concept: values}} with by='value', or as a list of concepts with "
            f"by='concept', got {test!r} with by={by!r}"
        )
    else:
        held = _named(test, values)
    if by == "image":
        tested = set(_some(images, float(test), rng, "pictures"))  # type: ignore[arg-type]
        return table.keep(lambda row, *_: row.image_key not in tested), table.keep(
            lambda row, *_: row.image_key in tested
        )
    sides: defaultdict[str, set[bool]] = defaultdict(set)
    for row in table.rows:
        sides[row.image_key].update(pair in held for pair in row.concepts.items())
    share = test if isinstance(test, float) else 0.5
    coin = rng.random(len(images))
    in_test = {
        k: bool(c < share) if len(sides[k]) == 2 else True in sides[k] for k, c in zip(images, coin, strict=True)
    }

    def side(is_test: bool) -> ConceptTable:
        return table.keep(lambda row, c, v: in_test[row.image_key] == is_test == ((c, v) in held))

    return side(False), side(True)


def _some(items: list[str], share: float, rng: np.random.Generator, what: str) -> list[str]:
    if len(items) < 2:
        raise ColumnError(f"expected at least two {what} to split, got {len(items)}; split by another way")
    count = min(max(round(share * len(items)), 1), len(items) - 1)
    return [items[i] for i in sorted(rng.permutation(len(items))[:count])]


def _named(test: Any, values: dict[str, list[str]]) -> set[tuple[str, str]]:
    held = set()
    for concept in test:
        if concept not in values:
            raise ColumnError(f"expected one of the concepts {shorten(list(values))}, got {concept!r}; check test=")
        for value in test[concept] if isinstance(test, Mapping) else values[concept]:
            if value not in values[concept]:
                known = shorten(values[concept])
                raise ColumnError(f"expected a value of {concept!r} ({known}), got {value!r}; check test=")
            held.add((concept, value))
    if not held or len(held) == sum(map(len, values.values())):
        raise ColumnError(f"expected some of the table's values held out, got {len(held)}; check test=")
    return held


def check_disjoint(
    train: Any,
    test: Any,
    *,
    by: Sequence[By] = ("image",),
    on_leak: Literal["raise", "warn", "ignore"] = "raise",
) -> list[tuple[str, str]]:
    """Find what the training data gives away of the test: pictures by content, and concept values where asked.

    Args:
        train, test: ConceptTable, TripletTable, Episodes, Mix, what the readers return, or any conversations.
        by: "image", "value" (a concept's value in both), or both.
        on_leak: "raise" an error, "warn" in the log, or "ignore" and only return.

    Returns:
        ("image", hash) and ("value", "concept = value") pairs, sorted.

    Raises:
        LeakError: there is an overlap, and `on_leak` is "raise".
    """
    if on_leak not in ("raise", "warn", "ignore"):
        raise ValueError(f"expected on_leak 'raise', 'warn' or 'ignore', got {on_leak!r}")
    if isinstance(by, str) or not by or not set(by) <= {"image", "value"}:
        raise ValueError(f"expected by a list of 'image', 'value' or both, got {by!r}")
    one, other = contents_of(train), contents_of(test)
    found = [("image", key) for key in sorted(one.images & other.images)] if "image" in by else []
    if "value" in by:
        found += [("value", f"{concept} = {value}") for concept, value in sorted(one.values & other.values)]
    if found and on_leak != "ignore":
        kinds = " and ".join(f"{n} {k}s" for k in ("image", "value") if (n := sum(f[0] == k for f in found)))
        message = (
            f"train and test share {kinds} (such as {found[0][0]} {found[0][1]!r}): results would be too good to be "
            "true. Make both from split_concepts, take the shared ones out of one side, or pass on_leak='warn'"
        )
        if on_leak == "raise":
            raise LeakError(message)
        logger.warning(message)
    return found

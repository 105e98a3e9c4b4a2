"""Which tokens to run, and which of them once for several sequences. Plain lists and arrays: no model is needed.

Sequences are compared by *tags*: token ids, with an image's tokens replaced by a number of that image, so that two
sequences share a beginning exactly where a causal decoder would compute the same for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

__all__ = ["MIN_SHARED", "Leaf", "Line", "Node", "Plan", "Target", "common_length", "make_plan"]

#: A beginning shorter than this is run again rather than kept: the bookkeeping would cost more. Our choice.
MIN_SHARED = 8


@dataclasses.dataclass(frozen=True)
class Target:
    """An answer to read: `ids`, the first of which is predicted at position `start` of its line."""

    request: int
    answer: int
    start: int
    ids: tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Line:
    """One sequence: a conversation with its images' tokens in place, and an answer without its last token.

    Attributes:
        request: number of the request it belongs to.
        group: equal for requests that begin with the same demonstrations.
        ids: int64, shape (length,).
        tags: int64, shape (length,): see the module.
        images: keys of its images in order.
        image_starts: position of each image's first token.
        targets: what is read from it.
        positions: the decoder's position ids, (length,) or (axes, length); filled in by who runs it.
    """

    request: int
    group: Hashable
    ids: np.ndarray
    tags: np.ndarray
    images: list[str]
    image_starts: list[int]
    targets: list[Target]
    positions: object = None

    @property
    def start(self) -> int:
        """The first position whose prediction is read."""
        return min(target.start for target in self.targets)

    def images_between(self, start: int, stop: int) -> list[str]:
        """Keys of the images that begin within these positions."""
        return [key for key, at in zip(self.images, self.image_starts, strict=True) if start <= at < stop]


@dataclasses.dataclass(eq=False)
class Leaf:
    """What is run last: lines from `start` on. Several lines are one to `stem` and branch there."""

    lines: list[Line]
    start: int
    stem: int

    @property
    def size(self) -> int:
        """Tokens to run."""
        return self.stem - self.start + sum(len(line.ids) - self.stem for line in self.lines)


@dataclasses.dataclass(eq=False)
class Node:
    """A beginning that is run once and kept: positions start..stop of `line`."""

    line: Line
    start: int
    stop: int
    nodes: list[Node] = dataclasses.field(default_factory=list)
    leaves: list[Leaf] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens to run."""
        return self.stop - self.start


@dataclasses.dataclass
class Plan:
    """All of the work: beginnings with what hangs on them, and leaves that share nothing."""

    nodes: list[Node]
    leaves: list[Leaf]

    @property
    def tokens(self) -> int:
        """Tokens that are run, padding left out."""
        inner = [child for node in self.nodes for child in node.nodes]
        nodes = [*self.nodes, *inner]
        return sum(n.size for n in nodes) + sum(
            leaf.size for leaves in (self.leaves, *(n.leaves for n in nodes)) for leaf in leaves
        )


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading entries two arrays have in common.

    >>> common_length(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _shared(lines: Sequence[Line]) -> int:
    return min((common_length(lines[0].tags, line.tags) for line in lines[1:]), default=len(lines[0].tags))


def _grouped(lines: Iterable[Line], key: str) -> list[list[Line]]:
    groups: dict[Hashable, list[Line]] = {}
    for line in lines:
        groups.setdefault(getattr(line, key), []).append(line)
    return list(groups.values())


def make_plan(lines: Sequence[Line], *, share: bool, pack: bool, least: int = MIN_SHARED) -> Plan:
    """Lay out the least work that the model lets us.

    Args:
        lines: any number, in any order; lines of one request differ in their answers only.
        share: beginnings may be run once and kept.
        pack: lines of one request may branch within one sequence.
        least: tokens from which a beginning is worth keeping.

    Returns:
        A plan that reads every target once.
    """
    plan = Plan([], [])
    for group in _grouped(lines, "group"):
        requests = _grouped(group, "request")
        home: Plan | Node = plan
        begin = 0
        if share and len(requests) > 1:
            # What is read must be run by each line itself.
            shared = min(_shared(group), *(line.start for line in group))
            if shared >= least:
                begin = shared
                home = Node(group[0], 0, begin)
                plan.nodes.append(home)
        for own in requests:
            if len(own) == 1:
                home.leaves.append(Leaf(own, begin, len(own[0].ids)))
                continue
            stem = _shared(own)
            if pack:
                home.leaves.append(Leaf(own, begin, min(stem, *(line.start + 1 for line in own))))
                continue
            stem = min(stem, *(line.start for line in own))
            if share and stem - begin >= least:
                node = Node(own[0], begin, stem)
                home.nodes.append(node)
                node.leaves = [Leaf([line], stem, len(line.ids)) for line in own]
            else:
                home.leaves += [Leaf([line], begin, len(line.ids)) for line in own]
    return plan

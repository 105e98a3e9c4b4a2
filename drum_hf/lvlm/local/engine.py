"""Plans which tokens to run, and runs them: a shared beginning once, its keys and values kept for what continues it.

Sequences are compared by *tags*: token ids, with an image's tokens replaced by a number of that image, so that two
sequences share a beginning exactly where a causal decoder would compute the same for both.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .images import ImageInputs, KeptImage

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["MIN_SHARED", "Engine", "Leaf", "Limits", "Line", "Node", "Plan", "Target", "common_length", "halving"]
__all__ += ["make_plan"]

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")

#: Floats in one block of logits that is turned into log-probabilities (256 MiB).
_LOGITS = 1 << 26

#: Tokens a forward pass, below which memory that runs out lowers the limit no further.
_FEWEST_TOKENS = 128


# ---- the plan: plain lists and arrays ----

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


# ---- running it ----

Reader = Callable[[Target, np.ndarray], None]


@dataclasses.dataclass
class Limits:
    """How much goes through the decoder at once.

    Attributes:
        rows: sequences a forward pass.
        tokens: tokens a forward pass, padding and what is kept of beginnings included; halved for good when memory
            runs out. One longer sequence still runs alone.
    """

    rows: int
    tokens: int


@dataclasses.dataclass
class _Held:
    """Beginnings that were run: their cache, and each one's row in it and length, padded on the left.

    Attributes:
        images: where an image's token stands, bool of shape (rows, padded length).
    """

    cache: Any
    row: dict[Node, int]
    length: list[int]
    images: np.ndarray

    @property
    def width(self) -> int:
        return self.images.shape[1]


class Engine:
    """Log-probabilities of a plan's targets.

    Args:
        model: a decoder over text and image features; the families that this is right for are found by trial.
        images: its image features.
        limits: shared with whoever else runs the model.
    """

    def __init__(self, model: Any, images: ImageInputs, limits: Limits) -> None:
        self.model, self.images, self.limits = model, images, limits
        self._head = model.get_output_embeddings()
        inner = getattr(model, "model", model)
        self._rope_index = getattr(inner, "get_rope_index", None)
        self._rope_takes = set(inspect.signature(self._rope_index).parameters) if self._rope_index else set()
        self._takes = set(inspect.signature(model.forward).parameters)
        text = model.config.get_text_config()
        self._eager = getattr(text, "_attn_implementation", None) == "eager"

    def run(self, plan: Plan, pictures: dict[str, Image], read: Reader) -> None:
        """Run everything, longest first, and hand each target's log-probabilities (float64) to `read`."""
        for batch in self._batches(plan.nodes, lambda node: node.size):
            halving(batch, lambda nodes: self._tree(nodes, pictures, read), self.limits)
        self._leaves(plan.leaves, None, {}, pictures, read)

    # ---- beginnings ----

    def _batches(self, items: Sequence[_Item], size: Callable[[_Item], int], width: int = 0) -> Iterator[list[_Item]]:
        """Items together while they fit the limits, longest first, so that memory runs out early or never."""
        batch: list[_Item] = []
        for item in sorted(items, key=size, reverse=True):
            if batch:
                tokens = (len(batch) + 1) * (width + size(batch[0]))
                if len(batch) >= self.limits.rows or tokens > self.limits.tokens:
                    yield batch
                    batch = []
            batch.append(item)
        if batch:
            yield batch

    def _tree(self, nodes: list[Node], pictures: dict[str, Image], read: Reader) -> None:
        """Beginnings of one batch, and everything that hangs on them."""
        held = self._begin(nodes, pictures)
        owner = {leaf: node for node in nodes for leaf in node.leaves}
        self._leaves(list(owner), held, owner, pictures, read)
        inner = {child: node for node in nodes for child in node.nodes}
        # What is continued further must not be padded in its middle: a convolution would see the padding.
        for length in {child.size for child in inner}:
            alike = [child for child in inner if child.size == length]
            for batch in self._batches(alike, lambda child: child.size, held.width):

                def onward(children: list[Node]) -> None:
                    deeper = self._continue(children, held, inner, pictures)
                    own = {leaf: child for child in children for leaf in child.leaves}
                    self._leaves(list(own), deeper, own, pictures, read)

                halving(batch, onward, self.limits)

    def _begin(self, nodes: list[Node], pictures: dict[str, Image]) -> _Held:
        from transformers import DynamicCache

        width = max(node.size for node in nodes)
        nothing = _Held(DynamicCache(config=self.model.config), {}, [0] * len(nodes), np.zeros((len(nodes), 0), bool))
        parts = [[(node.line, 0, node.stop)] for node in nodes]
        self._forward(parts, pictures, [], nothing, pads=[width - node.size for node in nodes])
        return self._grown(nothing, nodes)

    def _continue(
        self, children: list[Node], held: _Held, owner: dict[Node, Node], pictures: dict[str, Image]
    ) -> _Held:
        own = self._picked(held, [held.row[owner[child]] for child in children])
        self._forward([[(child.line, child.start, child.stop)] for child in children], pictures, [], own)
        return self._grown(own, children)

    def _grown(self, held: _Held, nodes: list[Node]) -> _Held:
        """What is held after the nodes were run on top of it, a row each."""
        rows = {node: row for row, node in enumerate(nodes)}
        width = max(node.size for node in nodes)
        images = np.zeros((len(nodes), width), bool)
        for row, node in enumerate(nodes):
            images[row, width - node.size :] = node.line.ids[node.start : node.stop] == self.images.image_id
        lengths = [before + node.size for before, node in zip(held.length, nodes, strict=True)]
        return _Held(held.cache, rows, lengths, np.concatenate([held.images, images], axis=1))

    def _picked(self, held: _Held, rows: list[int]) -> _Held:
        """These rows with a cache of their own; the tensors of the old one stay as they are."""
        import torch

        cache = copy.copy(held.cache)
        cache.layers = []
        index = torch.tensor(rows, device=self.model.device)
        for layer in held.cache.layers:
            own = copy.copy(layer)
            for name, value in vars(layer).items():
                if isinstance(value, dict):  # states of several convolutions
                    setattr(own, name, dict(value))
            own.reorder_cache(index)
            cache.layers.append(own)
        return _Held(cache, {}, [held.length[row] for row in rows], held.images[rows])

    # ---- what is read ----

    def _leaves(
        self,
        leaves: list[Leaf],
        held: _Held | None,
        owner: dict[Leaf, Node],
        pictures: dict[str, Image],
        read: Reader,
    ) -> None:
        for batch in self._batches(leaves, lambda leaf: leaf.size, held.width if held else 0):
            halving(batch, lambda part: self._read(part, held, owner, pictures, read), self.limits)

    def _read(
        self,
        leaves: list[Leaf],
        held: _Held | None,
        owner: dict[Leaf, Node],
        pictures: dict[str, Image],
        read: Reader,
    ) -> None:
        """Run leaves in one forward pass and read their targets."""
        parts = []
        places: dict[tuple[int, int], int] = {}  # (row, position in it) -> row of the logits
        wanted: list[tuple[Target, list[tuple[int, int]]]] = []
        for row, leaf in enumerate(leaves):
            pieces = [(leaf.lines[0], leaf.start, leaf.stem)] if len(leaf.lines) > 1 else []
            at = leaf.stem - leaf.start if pieces else 0
            for line in leaf.lines:
                begin = leaf.stem if len(leaf.lines) > 1 else leaf.start
                pieces.append((line, begin, len(line.ids)))
                for target in line.targets:
                    spots = []
                    for j, token in enumerate(target.ids):
                        position = target.start + j
                        # Before the branch all lines are one; behind it each has its own stretch.
                        place = position - begin + at if position >= begin else position - leaf.start
                        spots.append((places.setdefault((row, place), len(places)), token))
                    wanted.append((target, spots))
                at += len(line.ids) - begin
            parts.append(pieces)
        own = self._picked(held, [held.row[owner[leaf]] for leaf in leaves]) if held else None
        logits = self._forward(parts, pictures, list(places), own)
        flat = [spot for _, spots in wanted for spot in spots]
        picked = _log_probabilities(logits, flat)
        done = 0
        for target, spots in wanted:
            read(target, picked[done : done + len(spots)])
            done += len(spots)

    # ---- one forward pass ----

    def _forward(
        self,
        parts: list[list[tuple[Line, int, int]]],
        pictures: dict[str, Image],
        wanted: list[tuple[int, int]],
        held: _Held | None,
        *,
        pads: list[int] | None = None,
    ) -> torch.Tensor:
        """Logits (len(wanted), vocabulary) at the wanted (row, token) places.

        Args:
            parts: each row's stretches (line, start, stop); the first is what the others branch from, if there are
                others.
            held: what each row continues, or an empty one to fill; its cache grows.
            pads: padding before each row, where something is to be held; otherwise padding goes behind.
        """
        import torch

        device = self.model.device
        sizes = [sum(stop - start for _, start, stop in pieces) for pieces in parts]
        pads = pads or [0] * len(parts)
        width = held.width if held else 0
        length = max(size + pad for size, pad in zip(sizes, pads, strict=True))
        ids = np.full((len(parts), length), self.images.format.tokenizer.pad_token_id or 0, dtype=np.int64)
        first = self._positions(parts[0][0][0], pictures)
        positions = np.zeros((*first.shape[:-1], len(parts), length), dtype=np.int64)
        mask = np.zeros((len(parts), width + length), dtype=bool)
        shown: list[KeptImage] = []
        for row, (pieces, size, pad) in enumerate(zip(parts, sizes, pads, strict=True)):
            at = pad
            for line, start, stop in pieces:
                ids[row, at : at + stop - start] = line.ids[start:stop]
                positions[..., row, at : at + stop - start] = self._positions(line, pictures)[..., start:stop]
                at += stop - start
                keys = line.images_between(start, stop)
                if keys:
                    kept = self.images.keep({key: pictures[key] for key in keys})
                    shown += [kept[key] for key in keys]
            mask[row, width + pad : width + pad + size] = True
            if held is not None:
                mask[row, width - held.length[row] : width] = True
        if held is None:
            mask[:] = True  # nothing real sees the padding behind it: the plain causal mask is enough
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids).to(device),
            "position_ids": torch.from_numpy(positions).to(device),
            "attention_mask": self._mask(mask, parts, width).to(device),
            "use_cache": held is not None,
            **self.images.merged(shown),
        }
        if held is not None:
            inputs["past_key_values"] = held.cache
        if shown and self._rope_index is None:  # else what they say is in the positions
            image = ids == self.images.image_id
            if held is not None:
                image = np.concatenate([held.images, image], axis=1)
            types = torch.from_numpy(image.astype(np.int64)).to(device)
            inputs |= {name: types for name in self.images.per_token if name in self._takes}
        with torch.inference_mode(), self._gathered(wanted):
            return self.model(**inputs).logits[0]

    @contextlib.contextmanager
    def _gathered(self, wanted: list[tuple[int, int]]) -> Iterator[None]:
        """Have the output layer see the wanted places only: (1, len(wanted), hidden)."""
        import torch

        row, place = torch.tensor(wanted, dtype=torch.long, device=self.model.device).reshape(-1, 2).T

        def gather(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][row.to(args[0].device), place.to(args[0].device)][None], *args[1:])

        hook = self._head.register_forward_pre_hook(gather)
        try:
            yield
        finally:
            hook.remove()

    def _mask(self, mask: np.ndarray, parts: list[list[tuple[Line, int, int]]], width: int) -> torch.Tensor:
        """The padding mask; where rows branch, who sees whom: (rows, 1, length, width + length)."""
        import torch

        if all(len(pieces) == 1 for pieces in parts):
            return torch.from_numpy(mask.astype(np.int64))
        length = mask.shape[1] - width
        seen = np.zeros((len(parts), length, width + length), dtype=bool)
        causal = np.tril(np.ones((length, length), dtype=bool))
        for row, pieces in enumerate(parts):
            seen[row, :, :width] = mask[row, :width]
            own = seen[row, :, width:]
            if len(pieces) == 1:
                own |= causal
                continue
            stem = pieces[0][2] - pieces[0][1]
            own[:, :stem] = causal[:, :stem]
            at = stem
            for _, start, stop in pieces[1:]:
                size = stop - start
                own[at : at + size, at : at + size] = causal[:size, :size]
                at += size
            own[range(length), range(length)] = True  # padding must see something, or it turns to NaN
        whole = torch.from_numpy(seen)[:, None]
        if not self._eager:
            return whole
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros(whole.shape, dtype=self.model.dtype).masked_fill(~whole, lowest)

    def _positions(self, line: Line, pictures: dict[str, Image]) -> np.ndarray:
        """A line's position ids, (length,) or (axes, length), as the model itself makes them for the whole line."""
        import torch

        if line.positions is None:
            plain = np.arange(len(line.ids), dtype=np.int64)
            if self._rope_index is None:
                line.positions = plain
            elif not line.images:
                line.positions = np.broadcast_to(plain, (3, len(plain)))
            else:
                kept = self.images.keep({key: pictures[key] for key in line.images})
                beside = self.images.beside([kept[key] for key in line.images])
                ids = torch.from_numpy(line.ids)[None]
                types = torch.from_numpy((line.ids == self.images.image_id).astype(np.int64))[None]
                known = {"mm_token_type_ids": types, **beside}
                found, _ = self._rope_index(ids, **{k: v for k, v in known.items() if k in self._rope_takes})
                line.positions = found[:, 0].cpu().numpy()
        return line.positions  # type: ignore[return-value]


def _log_probabilities(logits: torch.Tensor, spots: list[tuple[int, int]]) -> np.ndarray:
    """Log-probability of each (row of the logits, token), float64; a block of rows at a time."""
    import torch

    step = max(1, _LOGITS // logits.shape[-1])
    normalizers = torch.cat([logits[i : i + step].float().logsumexp(-1) for i in range(0, len(logits), step)])
    row, token = torch.tensor(spots, device=logits.device).T
    return (logits[row, token].float() - normalizers[row]).cpu().numpy().astype(np.float64)


def halving(items: list[_Item], run: Callable[[list[_Item]], None], limits: Limits | None = None) -> None:
    """Call `run` on the items, or, where they don't fit the memory, on halves of them, down to one.

    The limit of tokens is halved with them, so that later work does not run out again and again.
    """
    import torch

    waiting = [items]
    while waiting:
        part = waiting.pop()
        try:
            run(part)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_memory(error) or len(part) == 1:
                raise
        else:
            continue
        # Outside of `except`, whose traceback would keep the failed batch's tensors alive.
        logger.info("out of memory with %d sequences: trying half", len(part))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = len(part) // 2
        if limits is not None:
            limits.tokens = max(_FEWEST_TOKENS, limits.tokens // 2)
        waiting += [part[half:], part[:half]]


def _is_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

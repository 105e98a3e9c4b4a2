"""Mixes of conversations: weighted sources, replay, a curriculum, and what came of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ...data.rows import shorten
from ...errors import EmptySupportError
from .curriculum import Curriculum, Stage
from .draw import REPEATS, no_more
from .episode_list import ConversationList, to_dataset
from .settings import EpisodeSettings
from .tables import Contents, contents_of
from .types import CONVERSATION_KINDS, Conversation, ConversationKind

if TYPE_CHECKING:
    import datasets

_GOLDEN_RATIO = (5**0.5 - 1) / 2


@runtime_checkable
class Drawable(Protocol):
    """What makes conversations by number and settings, as `Episodes` does."""

    def draw(self, index: int, settings: EpisodeSettings | None = None, *, images: bool = True) -> Conversation: ...


@dataclasses.dataclass(frozen=True)
class MixSource:
    """One ingredient of a mix.

    Attributes:
        name: unique in the mix; noted in its conversations.
        conversations: `Episodes`, drawn as the curriculum says; or a sequence, drawn as it is.
        weight: how much of it, beside the other sources.
        kind: "episode" or "replay"; where left out, what its conversations say, or what makes them does by `kind`.

    Raises:
        ValueError: the weight is not a number above 0, or the kind is unknown.
        EmptySupportError: there is no conversation.
    """

    name: str
    conversations: Drawable | Sequence[Conversation] = dataclasses.field(repr=False)
    weight: float = 1.0
    kind: ConversationKind | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"expected a weight above 0 of source {self.name!r}, got {self.weight!r}; leave it out")
        if isinstance(self.conversations, Drawable):
            kind = self.kind or getattr(self.conversations, "kind", "episode")
        elif not isinstance(self.conversations, Sequence):
            got = type(self.conversations).__name__
            raise TypeError(f"expected Episodes or a sequence of conversations as source {self.name!r}, got {got}")
        elif not len(self.conversations):
            raise EmptySupportError(f"expected conversations in source {self.name!r}, got none; leave it out")
        else:
            kind = self.kind or self._peek(0).kind
        if kind not in CONVERSATION_KINDS:
            raise ValueError(f"expected kind one of {', '.join(map(repr, CONVERSATION_KINDS))}, got {kind!r}")
        object.__setattr__(self, "kind", kind)

    def _peek(self, index: int) -> Conversation:
        talks = self.conversations
        assert isinstance(talks, Sequence)
        return talks.peek(index) if isinstance(talks, ConversationList) else talks[index].without_images()

    def draw(
        self, index: int, rng: np.random.Generator, settings: EpisodeSettings | None, images: bool
    ) -> Conversation:
        """Conversation number `index` of the mix, if this source was chosen."""
        if isinstance(self.conversations, Drawable):
            talk = self.conversations.draw(index, settings, images=images)
        else:
            place = int(rng.integers(len(self.conversations)))
            talk = self.conversations[place] if images else self._peek(place)
        return dataclasses.replace(talk, source=self.name, kind=self.kind or talk.kind)


class Mix:
    """Conversations from several sources, in shares that a curriculum may change as training goes on.

    `mix.draw(index, progress)` depends on the sources, the seed, the index and the stage of the curriculum alone: a
    run that is taken up again draws what it would have drawn. Everything a curriculum asks for is checked when the mix
    is made.

    Args:
        sources: what is mixed.
        curriculum: which episodes are drawn when, and how much replay; None for the sources' own settings and weights.
        seed: other seeds draw others.

    Raises:
        ValueError: two sources have one name, or a stage wants replay (or episodes) and no source has any.
        EmptySupportError: there is no source.
        TooFewDemonstrationsError: a source can't fill the episodes of a stage.

    Example:
        >>> from drum_hf.tuning.episodes import Turn
        >>> talks = [Conversation((Turn(None, f"{n} + 1 is", str(n + 1)),), "sum", "", "open") for n in range(9)]
        >>> chat = [Conversation((Turn(None, "Hello!", "Hello."),), "", "", "open", kind="replay")]
        >>> mix = Mix([MixSource("sums", talks, weight=3), MixSource("chat", chat)], seed=5)
        >>> mix.report(8).counts["kind"]
        {'episode': 6, 'replay': 2}
    """

    def __init__(self, sources: Iterable[MixSource], curriculum: Curriculum | None = None, *, seed: int = 0) -> None:
        self.sources = list(sources)
        self.curriculum = curriculum
        self.seed = seed
        self._offset = float(np.random.default_rng([seed, 0, 1]).random())
        if not self.sources:
            raise EmptySupportError("expected at least one source in a mix, got none; give one")
        counts = Counter(source.name for source in self.sources)
        if twice := [repr(name) for name, count in counts.items() if count > 1]:
            raise ValueError(f"expected sources of different names, got {shorten(twice)} twice; rename one")
        for number, stage in enumerate(curriculum.stages if curriculum else ()):
            self._check(number, stage)

    def _check(self, number: int, stage: Stage) -> None:
        for kind, share in (("replay", stage.replay), ("episode", None if stage.replay is None else 1 - stage.replay)):
            if share and not any(source.kind == kind for source in self.sources):
                raise ValueError(
                    f"stage {number}: expected a source of kind {kind!r} for replay={stage.replay}, got only "
                    f"{shorten([repr(s.name) for s in self.sources])}; add one, or change the stage's replay"
                )
        for source in self.sources:
            check = getattr(source.conversations, "check", None)
            if check is not None:
                try:
                    check(stage)
                except ValueError as error:
                    raise type(error)(f"stage {number}, source {source.name!r}: {error}") from error

    def __repr__(self) -> str:
        return f"Mix({self.sources!r}, seed={self.seed})"

    def contents(self) -> Contents:
        """Hashes of the pictures and the (concept, value) pairs that the mix may show."""
        found = [contents_of(source.conversations) for source in self.sources]
        return Contents(set().union(*(c.images for c in found)), set().union(*(c.values for c in found)))

    def shares(self, progress: float = 1.0) -> dict[str, float]:
        """Source -> its share of what is drawn at a progress from 0 to 1; they add up to 1."""
        weights = {source.name: source.weight for source in self.sources}
        replay = self.curriculum.at(progress).replay if self.curriculum else None
        if replay is not None:
            for kind, share in (("replay", replay), ("episode", 1 - replay)):
                own = [source.name for source in self.sources if source.kind == kind]
                total = sum(weights[name] for name in own)
                weights.update({name: share * weights[name] / total for name in own})
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def draw(self, index: int, progress: float = 1.0, *, images: bool = True) -> Conversation:
        """Conversation number `index` at a progress from 0 (begin) to 1 (end of training).

        Args:
            index: at least 0.
            progress: of training; says which stage of the curriculum is on.
            images: False leaves the pictures out, which is much faster.
        """
        return self._draw(index, index, progress, images)

    def _draw(self, place: int, index: int, progress: float, images: bool) -> Conversation:
        """Conversation number `index` of the source that has its turn at `place`."""
        # Multiples of the golden ratio spread evenly over [0, 1), so shares hold in every stretch, not only at length.
        spread = (self._offset + place * _GOLDEN_RATIO) % 1
        ends = np.cumsum(list(self.shares(progress).values()))
        chosen = min(int(np.searchsorted(ends, spread, side="right")), len(ends) - 1)
        # One number more than in `Episodes`: equal seeds must not draw alike.
        rng = np.random.default_rng([self.seed, index, 1])
        return self.sources[chosen].draw(index, rng, self.curriculum.at(progress) if self.curriculum else None, images)

    def stream(self, count: int, *, images: bool = True) -> Iterator[Conversation]:
        """`count` conversations from the first stage to the last, no episode twice; replay may come again.

        The i-th is `draw(i, i / count)`, or where that came before, another of the same source and stage.

        Raises:
            TooFewDemonstrationsError: there are no more different ones.
        """
        seen: set[str] = set()
        for place in range(count):
            for index in itertools.islice(itertools.count(place, count), REPEATS):
                talk = self._draw(place, index, place / count, images)
                key = talk.key
                if talk.kind == "replay" or key not in seen:
                    break
            else:
                raise no_more(talk.source, count, place)
            seen.add(key)
            yield talk

    def to_dataset(self, count: int) -> datasets.Dataset:
        """`stream` as a table of chat messages and images, in memory."""
        return to_dataset(self.stream(count))

    def report(self, count: int = 1000) -> MixReport:
        """The make-up of what `stream(count)` gives, counted without its pictures."""
        return MixReport.of(self.stream(count, images=False))


@dataclasses.dataclass(frozen=True)
class MixReport:
    """What a mix is made of.

    Attributes:
        conversations, turns, images: how many; images are different ones.
        counts: "source", "kind", "form", "shots" and "concept" -> how many conversations of each; "distractors" counts
            turns about another concept than their conversation's.
    """

    conversations: int
    turns: int
    images: int
    distractors: int
    counts: Mapping[str, Mapping[Any, int]]

    @classmethod
    def of(cls, talks: Iterable[Conversation]) -> MixReport:
        """Count any conversations."""
        names = ("source", "kind", "form", "shots", "concept")
        found: dict[str, Counter[Any]] = {name: Counter() for name in names}
        total = turns = distractors = 0
        images: set[str] = set()
        for talk in talks:
            total += 1
            turns += len(talk.turns)
            images.update(turn.image_key for turn in talk.turns if turn.image_key)
            distractors += sum(turn.concept not in ("", talk.concept) for turn in talk.turns)
            for name in names:
                found[name][getattr(talk, name)] += 1
        counts = {name: dict(sorted(counter.items())) for name, counter in found.items()}
        return cls(total, turns, len(images), distractors, counts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers of shots are texts there."""
        own = {name: {str(key): n for key, n in counts.items()} for name, counts in self.counts.items()}
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "counts": own}

    def __str__(self) -> str:
        """A text table: each source, kind, form, number of shots and concept with its count and share."""
        total = max(self.conversations, 1)
        rows = [
            ("" if place else name, str(key) or "(none)", str(count), f"{count / total:.1%}")
            for name, counts in self.counts.items()
            for place, (key, count) in enumerate(counts.items())
        ]
        widths = [max((len(row[place]) for row in rows), default=0) for place in range(4)]
        aligned: list[Callable[[str, int], str]] = [str.ljust, str.ljust, str.rjust, str.rjust]
        lines = [
            "  ".join(align(cell, w) for align, cell, w in zip(aligned, row, widths, strict=True)) for row in rows
        ]
        head = (
            f"{self.conversations} conversations, {self.turns} turns ({self.distractors} distractors), "
            f"{self.images} different images"
        )
        return "\n".join([head, *lines])

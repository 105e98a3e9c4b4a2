"""Which conversation comes when: a fixed list or a mix as data sets, and batches of conversations of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from ..errors import EmptySupportError
from .episodes import Conversation, ConversationList, Mix, read_messages

__all__ = ["Conversations", "LengthSampler", "Listed", "Mixed", "as_conversations"]

Item = tuple[str, Conversation]


class Conversations(Dataset[Item]):
    """(name, conversation) by number; the name is for errors."""

    #: Whether conversations stand in the order they are to be learnt in.
    in_order = False

    def __len__(self) -> int:
        raise NotImplementedError

    def talk(self, number: int, *, images: bool = True) -> Conversation:
        """A conversation, with its pictures or without."""
        raise NotImplementedError

    @property
    def origin(self) -> Any:
        """What they come from, to be compared with other data."""
        raise NotImplementedError

    def __getitem__(self, number: int) -> Item:
        talk = self.talk(number)
        return describe(number, talk), talk


def describe(number: int, talk: Conversation) -> str:
    """What an error calls a conversation."""
    about = f" about {talk.concept!r}" if talk.concept else ""
    source = f" of source {talk.source!r}" if talk.source else ""
    return f"conversation {number}{source}{about} ({talk.shots} shots, first asked {talk.turns[0].prompt[:40]!r})"


class Listed(Conversations):
    """Conversations that exist already."""

    def __init__(self, talks: Sequence[Conversation]) -> None:
        self.talks = talks

    def __len__(self) -> int:
        return len(self.talks)

    def talk(self, number: int, *, images: bool = True) -> Conversation:
        if images:
            return self.talks[number]
        if isinstance(self.talks, ConversationList):
            return self.talks.peek(number)
        return self.talks[number].without_images()

    @property
    def origin(self) -> Sequence[Conversation]:
        return self.talks


class Mixed(Conversations):
    """The first `count` draws of a mix, from the beginning of training to its end.

    Draw `i` is a function of the mix and of `i / count`, the progress of training when it comes up, and of nothing
    else: a run that is taken up again draws what it would have drawn.
    """

    in_order = True

    def __init__(self, mix: Mix, count: int) -> None:
        self.mix, self.count = mix, count

    def __len__(self) -> int:
        return self.count

    def talk(self, number: int, *, images: bool = True) -> Conversation:
        if not 0 <= number < self.count:
            raise IndexError(f"expected a number below {self.count}, got {number}")
        return self.mix.draw(number, number / self.count, images=images)

    @property
    def origin(self) -> Mix:
        return self.mix


def as_conversations(data: Any, count: int | None = None) -> Conversations:
    """What users give, as numbered conversations: a `Mix` of which `count` are drawn, conversations, or rows of chat
    messages.

    Raises:
        EmptySupportError: there is none.
        TypeError: it is something else.
        RowError, ImageError: see `read_messages`.
    """
    import datasets

    if isinstance(data, Conversations):
        return data
    if isinstance(data, Mix):
        if count is None:
            raise ValueError(
                "expected to know how many conversations to draw from a mix, which has no end; set conversations= or "
                "max_steps= in the arguments"
            )
        return Mixed(data, count)
    if not isinstance(data, (Sequence, datasets.Dataset)) or isinstance(data, (str, bytes)):
        raise TypeError(
            f"expected a Mix, a sequence of Conversations or rows with the column 'messages', got "
            f"{type(data).__name__}; put Episodes into a Mix, or take a list of its stream"
        )
    if not len(data):
        raise EmptySupportError("expected at least one conversation to tune on, got none; give more")
    if isinstance(data, ConversationList):
        return Listed(data)
    if all(isinstance(talk, Conversation) for talk in data):
        return Listed(data)
    return Listed(read_messages(data))


class LengthSampler(Sampler[int]):
    """Numbers in an order in which a batch's conversations are of like length.

    Order is by chance, or as it is (a curriculum's); within each stretch of `window` batches conversations are sorted
    by length, and the batches shuffled. It is a function of seed and epoch.

    Args:
        lengths: tokens of each conversation; None leaves them in order.
        count: how many there are.
        batch_size: conversations an optimizer step takes, in all processes.
        shuffle: whether the order is by chance.
        seed: of that chance.
        window: batches sorted together; the platform's number for its own such sampler, 50, smears a curriculum
            more than our 8.

    Example:
        >>> list(LengthSampler([3, 1, 3, 1], 4, batch_size=2, shuffle=False, seed=1))
        [0, 2, 1, 3]
    """

    def __init__(
        self, lengths: Sequence[int] | None, count: int, *, batch_size: int, shuffle: bool, seed: int, window: int = 8
    ) -> None:
        self.lengths, self.count, self.batch_size = lengths, count, batch_size
        self.shuffle, self.seed, self.window = shuffle, seed, window
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the platform when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.count) if self.shuffle else np.arange(self.count)
        if self.lengths is None:
            yield from order.tolist()
            return
        lengths = np.asarray(self.lengths)
        size = self.batch_size
        for start in range(0, self.count, size * self.window):
            stretch = order[start : start + size * self.window]
            stretch = stretch[np.argsort(-lengths[stretch], kind="stable")]
            batches = [stretch[at : at + size] for at in range(0, len(stretch), size)]
            full = len(batches) - (len(batches[-1]) < size)  # an unfilled batch stays last
            for place in [*rng.permutation(full), *range(full, len(batches))]:
                yield from batches[place].tolist()

"""How the playground's base LVLM is made: a text warm-up that teaches copying, then ordinary chat about pictures.

1. *induction*: token sequences that repeat random segments, so that the decoder learns to copy what followed before;
2. *pairs*: "value word" pairs that come back, without pictures;
3. *chat*: conversations of several turns, each about a picture of its own, in plain words.

No conversation of the base shares anything to be inferred: that is left to ICL tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...tuning.episodes import Conversation
from ..language import private_words
from .conversations import Album
from .lvlms import ASSISTANT, END, IDEFICS_IMAGE, USER, ImageSlot, TinyLVLM
from .pretraining import train_steps

#: Tokens that copying is learnt over at first: over all of them it is not found in hundreds of steps, over so few it
#: takes 300. And how their number grows in each step of widening (our choices).
FEW, WIDENING = 40, 1.0035


class Encoder:
    """Conversations to token ids, as the chat template and the tokenizer have them, only quicker."""

    def __init__(self, tokenizer: Any, album: Album, slot: ImageSlot = IDEFICS_IMAGE) -> None:
        self.album = album
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.user, self.assistant, self.end, self.image_token, *self.slot = tokenizer.convert_tokens_to_ids(
            [USER, ASSISTANT, END, slot.token, *slot.tokens]
        )
        self.pad = tokenizer.pad_token_id
        self.words = np.array([self.ids(word)[0] for word in private_words()])
        values = sorted({v for own in album.values_of.values() for v in own})
        self.values = np.array([self.ids(value)[0] for value in values])

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def batch(self, talks: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        """Token ids (B, L), labels (B, L; -100 but for answers and what ends them), picture rows (P,) in order."""
        sequences, targets, pictures = [], [], []
        for talk in talks:
            ids: list[int] = []
            goal: list[int] = []
            for turn in talk.turns:
                head = [self.user, *self.ids(turn.prompt), *self.slot, self.end, self.assistant]
                answer = [*self.ids(turn.answer), self.end]
                ids += head + answer
                goal += [-100] * len(head) + answer
                pictures.append(self.album.row[turn.image_key])
            sequences.append(ids)
            targets.append(goal)
        longest = max(map(len, sequences))
        input_ids, labels = (torch.full((len(talks), longest), fill) for fill in (self.pad, -100))
        for row, (ids, goal) in enumerate(zip(sequences, targets, strict=True)):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(goal)
        return {"input_ids": input_ids, "labels": labels, "pictures": torch.tensor(pictures)}


def _decoder_loss(
    lvlm: TinyLVLM, embeds: torch.Tensor, labels: torch.Tensor, *, early: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over labelled positions, and whether each was right; logits are made only there.

    With `early`, the states in the decoder's middle are to answer as well, with that weight.
    """
    out = lvlm.decoder(inputs_embeds=embeds, use_cache=False, output_hidden_states=bool(early))
    targets = labels[:, 1:]
    where = targets != -100
    logits = lvlm.model.lm_head(out.last_hidden_state[:, :-1][where])
    loss = nn.functional.cross_entropy(logits, targets[where])
    if early:
        midway = lvlm.model.lm_head(lvlm.norm(out.hidden_states[lvlm.depth // 2][:, :-1][where]))
        loss = loss + early * nn.functional.cross_entropy(midway, targets[where])
    return loss, logits.argmax(-1) == targets[where]


def _repeats(rng: np.random.Generator, tokens: np.ndarray, length: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """16 sequences in which segments of a random beginning come back; labels on what that determines."""
    beginning = 12
    ids = rng.choice(tokens, (16, length))
    labels = np.full_like(ids, -100)
    for row, goal in zip(ids, labels, strict=True):
        at = beginning
        while at < length - 1:
            span = int(rng.integers(2, 9))
            start = int(rng.integers(0, beginning - span + 1))
            span = min(span, length - at)
            row[at : at + span] = row[start : start + span]
            goal[at + 1 : at + span] = row[start + 1 : start + span]
            at += span
    return ids, labels


def _pairs(rng: np.random.Generator, encoder: Encoder, pairs: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """16 sequences of bare "value word" pairs that come back; labels on words that were shown."""
    ids = np.empty((16, 2 * pairs), dtype=np.int64)
    labels = np.full_like(ids, -100)
    for row, goal in zip(ids, labels, strict=True):
        count = int(rng.integers(2, 9))
        values = rng.choice(encoder.values, count, replace=False)
        words = rng.choice(encoder.words, count, replace=False)
        drawn = rng.integers(0, count, pairs)
        row[0::2], row[1::2] = values[drawn], words[drawn]
        again = np.array([d in drawn[:i] for i, d in enumerate(drawn)])
        goal[1::2] = np.where(again, words[drawn], -100)
    return ids, labels


def _far_pairs(rng: np.random.Generator, encoder: Encoder, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """6 sequences of 12 such pairs with up to `gap` random tokens before each; labels on words that were shown."""
    bare, told = (rows[:6].reshape(6, -1, 2)[:, :12] for rows in _pairs(rng, encoder))
    length = 12 * (gap + 2)
    ids = rng.choice(encoder.words, (6, length))
    labels = np.full_like(ids, -100)
    for row in range(6):
        at = 0
        for pair, goal in zip(bare[row], told[row], strict=True):
            at += int(rng.integers(0, gap + 1))
            ids[row, at : at + 2], labels[row, at : at + 2] = pair, goal
            at += 2
    return ids, labels


def _text_loss(lvlm: TinyLVLM, ids: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, float]:
    embeds = lvlm.model.get_input_embeddings()(torch.from_numpy(ids))
    loss, right = _decoder_loss(lvlm, embeds, torch.from_numpy(labels))
    return loss, right.float().mean().item()


def _some_tokens(lvlm: TinyLVLM, seed: int, count: int = FEW) -> np.ndarray:
    """So many of the vocabulary, those of a smaller count among them."""
    return np.random.default_rng([seed, 4]).permutation(lvlm.vocabulary)[:count]


def _warm_up(
    name: str,
    lvlm: TinyLVLM,
    step_loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
    steps: int,
    checkpoint: Path,
    stop_when: Callable[[dict[str, float]], bool],
    learning_rate: float = 1e-3,
) -> dict[str, float]:
    """A stage of the text warm-up: at one learning rate, until it is learnt."""
    how: dict[str, Any] = {"learning_rate": learning_rate, "decay": False, "weight_decay": 0.01}
    return train_steps(name, lvlm.model, step_loss, steps, checkpoint=checkpoint, stop_when=stop_when, **how)


def train_induction(lvlm: TinyLVLM, *, seed: int, steps: int, checkpoint: Path) -> dict[str, float]:
    """Sequences over few tokens in which segments come back; loss on what that determines."""
    tokens = _some_tokens(lvlm, seed)

    def step_loss(step: int):
        loss, copied = _text_loss(lvlm, *_repeats(np.random.default_rng([seed, 4, step]), tokens))
        return loss, {"loss": loss.item(), "copied": copied}

    return _warm_up(
        "LVLM induction",
        lvlm,
        step_loss,
        steps,
        checkpoint,
        lambda report: report["copied"] > 0.92,
        learning_rate=2e-3,
    )


def train_widening(lvlm: TinyLVLM, *, seed: int, steps: int, checkpoint: Path) -> dict[str, float]:
    """The same over ever more tokens, to all of the vocabulary.

    Attention alone learns to copy the few tokens that it is shown, and no others.
    """

    def step_loss(step: int):
        rng = np.random.default_rng([seed, 10, step])
        among = _some_tokens(lvlm, seed, round(min(lvlm.vocabulary, FEW * WIDENING**step)))
        loss, copied = _text_loss(lvlm, *_repeats(rng, among))
        return loss, {"loss": loss.item(), "copied": copied, "tokens": len(among) / lvlm.vocabulary}

    return _warm_up(
        "LVLM widening",
        lvlm,
        step_loss,
        steps,
        checkpoint,
        lambda report: report["copied"] > 0.92 and report["tokens"] > 0.99,
    )


def train_pairs(lvlm: TinyLVLM, encoder: Encoder, *, seed: int, steps: int, checkpoint: Path) -> dict[str, float]:
    """Bare "value word" pairs that come back: the copying of stage one, over all values and private words."""

    def step_loss(step: int):
        loss, bound = _text_loss(lvlm, *_pairs(np.random.default_rng([seed, 6, step]), encoder))
        return loss, {"loss": loss.item(), "bound": bound}

    return _warm_up("LVLM pairs", lvlm, step_loss, steps, checkpoint, lambda report: report["bound"] > 0.97)


def train_chat(
    lvlm: TinyLVLM,
    encoder: Encoder,
    draw: Callable[[int, int], Sequence[Conversation]],
    states: torch.Tensor,
    *,
    seed: int,
    steps: int,
    checkpoint: Path,
    learning_rate: float,
    early: float = 0.0,
    rehearse: bool = False,
    name: str = "LVLM chat",
) -> dict[str, float]:
    """Conversations about the album: `draw(seed, step)` gives a step's.

    `states` (N, patches, width) are what the frozen tower makes of the pictures. With `early`, what is seen is to be
    known by the middle of the decoder, too, which leaves the upper half to do something with it. With `rehearse`,
    every step also has texts of the warm-up, whose pairs stand farther and farther apart, lest copying be forgotten.
    """

    def step_loss(step: int):
        talks = draw(seed, step)
        data = encoder.batch(talks)
        seen = lvlm.connect(states[data["pictures"]].float())
        embeds = lvlm.model.get_input_embeddings()(data["input_ids"])
        slots = (data["input_ids"] == encoder.image_token)[..., None].expand_as(embeds)
        loss, right = _decoder_loss(lvlm, embeds.masked_scatter(slots, seen), data["labels"], early=early)
        goal = data["labels"][:, 1:]
        of_talk = torch.arange(len(talks))[:, None].expand_as(goal)[goal != -100]
        kinds = [talk.source or talk.kind for talk in talks]
        told = goal[goal != -100] != encoder.end
        figures = {"loss": loss.item()}
        for kind in set(kinds):
            where = told & torch.tensor([k == kind for k in kinds])[of_talk]
            figures[kind] = right[where].float().mean().item()
        if rehearse:
            gap = round(16 * min(1.0, 2 * step / steps))
            more, figures["bound"] = _text_loss(
                lvlm, *_far_pairs(np.random.default_rng([seed, 9, step]), encoder, gap)
            )
            loss = loss + more
        return loss, figures

    return train_steps(
        name, lvlm.model, step_loss, steps, learning_rate=learning_rate, checkpoint=checkpoint, weight_decay=0.01
    )

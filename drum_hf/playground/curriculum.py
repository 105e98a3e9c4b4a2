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

from ..data.episodes import Conversation
from .conversations import Album
from .language import chat_words, private_words
from .pretraining import PATCH, PIXELS, WIDTH, build_tokenizer, train_steps

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<end_of_utterance>"
IMAGE_TOKENS = 4
#: Pairs of a short convolution and an attention layer in the decoder.
DEPTH = 4

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] != 'assistant' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end_of_utterance>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_lvlm(seed: int):
    """An untrained tiny Idefics3 with an Lfm2 decoder, and its processor."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    specials = (USER, ASSISTANT, "<fake_token_around_image>", "<global-img>", "<image>")
    tokenizer = build_tokenizer(
        {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": END},
        specials,
        chat_words(),
        model_max_length=1024,
        padding_side="left",
    )
    torch.manual_seed(seed)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]  # its __post_init__ takes it
        scale_factor=2,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": PIXELS,
            "patch_size": PATCH,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        },
        text_config={
            "model_type": "lfm2",
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 2 * DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "layer_types": ["conv", "full_attention"] * DEPTH,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
    )
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": PIXELS},
        max_image_size={"longest_edge": PIXELS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)
    model = Idefics3ForConditionalGeneration(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = None
    return model, processor


class Encoder:
    """Conversations to token ids, as the chat template and the tokenizer have them, only quicker."""

    def __init__(self, tokenizer: Any, album: Album) -> None:
        self.album = album
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.user, self.assistant, self.end, fake, tag, self.image_token = tokenizer.convert_tokens_to_ids(
            [USER, ASSISTANT, END, "<fake_token_around_image>", "<global-img>", "<image>"]
        )
        self.slot = [fake, tag, *[self.image_token] * IMAGE_TOKENS, fake]
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
    model: Any, embeds: torch.Tensor, labels: torch.Tensor, *, early: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over labelled positions, and whether each was right; logits are made only there.

    With `early`, the states in the decoder's middle are to answer as well, with that weight.
    """
    decoder = model.model.text_model
    out = decoder(inputs_embeds=embeds, use_cache=False, output_hidden_states=bool(early))
    targets = labels[:, 1:]
    where = targets != -100
    logits = model.lm_head(out.last_hidden_state[:, :-1][where])
    loss = nn.functional.cross_entropy(logits, targets[where])
    if early:
        midway = model.lm_head(decoder.embedding_norm(out.hidden_states[DEPTH][:, :-1][where]))
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


def _text_loss(model: Any, ids: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, float]:
    embeds = model.get_input_embeddings()(torch.from_numpy(ids))
    loss, right = _decoder_loss(model, embeds, torch.from_numpy(labels))
    return loss, right.float().mean().item()


def _few_tokens(model: Any, seed: int) -> np.ndarray:
    """40 of the vocabulary: over all of it copying is not found in hundreds of steps, over these it takes 300."""
    return np.random.default_rng([seed, 4]).permutation(model.config.text_config.vocab_size)[:40]


def train_induction(model: Any, *, seed: int, steps: int, checkpoint: Path) -> dict[str, float]:
    """Sequences over few tokens in which segments come back; loss on what that determines."""
    tokens = _few_tokens(model, seed)

    def step_loss(step: int):
        loss, copied = _text_loss(model, *_repeats(np.random.default_rng([seed, 4, step]), tokens))
        return loss, {"loss": loss.item(), "copied": copied}

    return train_steps(
        "LVLM induction",
        model,
        step_loss,
        steps,
        learning_rate=2e-3,
        decay=False,
        checkpoint=checkpoint,
        weight_decay=0.01,
        stop_when=lambda report: report["copied"] > 0.92,
    )


def train_pairs(model: Any, encoder: Encoder, *, seed: int, steps: int, checkpoint: Path) -> dict[str, float]:
    """Bare "value word" pairs that come back: the copying of stage one, over all values and private words."""

    def step_loss(step: int):
        loss, bound = _text_loss(model, *_pairs(np.random.default_rng([seed, 6, step]), encoder))
        return loss, {"loss": loss.item(), "bound": bound}

    return train_steps(
        "LVLM pairs",
        model,
        step_loss,
        steps,
        learning_rate=1e-3,
        decay=False,
        checkpoint=checkpoint,
        weight_decay=0.01,
        stop_when=lambda report: report["bound"] > 0.97,
    )


def train_chat(
    model: Any,
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
        seen = model.model.connector(states[data["pictures"]].float())
        embeds = model.get_input_embeddings()(data["input_ids"])
        slots = (data["input_ids"] == encoder.image_token)[..., None].expand_as(embeds)
        loss, right = _decoder_loss(model, embeds.masked_scatter(slots, seen), data["labels"], early=early)
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
                model, *_far_pairs(np.random.default_rng([seed, 9, step]), encoder, gap)
            )
            loss = loss + more
        return loss, figures

    return train_steps(
        name, model, step_loss, steps, learning_rate=learning_rate, checkpoint=checkpoint, weight_decay=0.01
    )

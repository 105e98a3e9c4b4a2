"""How the playground's LVLM learns to look, to answer, and to bind private words to values in its context.

Stages, each a list of conversations made on the fly from a seed:

1. *induction*: token sequences that repeat random segments, so that the decoder learns to copy what followed before;
2. *pairs*: "value word" pairs that come back, without pictures;
3. *dialogue*: conversations of up to 6 turns about training pictures. Plain ones name what is seen. Private ones
   answer "value word", where the word stands for the value at a site; captions chain such pairs in a site's own order;
4. *long dialogue*: the same with up to 17 turns.

The loss falls on what the context determines: real words always, a private word only once its site has shown it.
No world of `worlds.py` is used: vocabularies are drawn anew for every conversation.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .language import CAPTION_PROMPTS, CLASSIFY_PROMPTS, QUESTIONS, private_words
from .pretraining import PATCH, PIXELS, WIDTH, Pool, build_tokenizer, train_steps
from .scenes import ATTRIBUTES

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<end_of_utterance>"
IMAGE_TOKENS = 4
MAX_TURNS = 17

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
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "layer_types": ["conv", "full_attention"] * 3,
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


@dataclasses.dataclass
class Turn:
    """One exchange.

    Attributes:
        prompt, answer: token ids.
        picture: row of the pool.
        loss: for each token of the answer, whether the context (or the picture) determines it.
        contradicted: another site has shown another word for the same value.
    """

    prompt: list[int]
    picture: int
    answer: list[int]
    loss: list[bool]
    contradicted: bool = False


class ConversationMaker:
    """Draws conversations about the pool's pictures."""

    def __init__(self, tokenizer, pool: Pool) -> None:
        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False).input_ids

        self.user, self.assistant, self.end = (tokenizer.convert_tokens_to_ids(t) for t in (USER, ASSISTANT, END))
        fake, tag, image = (
            tokenizer.convert_tokens_to_ids(t) for t in ("<fake_token_around_image>", "<global-img>", "<image>")
        )
        self.image_token = image
        self.slot = [fake, tag, *[image] * IMAGE_TOKENS, fake]
        self.pad = tokenizer.pad_token_id
        self.words = np.array([ids(w)[0] for w in private_words()])
        asked = QUESTIONS | {"digit": CLASSIFY_PROMPTS, "caption": CAPTION_PROMPTS}
        self.prompts = {name: [ids(p) for p in wordings] for name, wordings in asked.items()}
        self.value_id = {v: ids(v)[0] for values in pool.values for v in values.values()}
        rows: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for i, (values, frame) in enumerate(zip(pool.values, pool.frames, strict=True)):
            for name, value in values.items():
                if "digit" not in values or name == "digit":
                    rows[name, value, frame].append(i)
        self.pool = pool
        self.rows = {cell: np.array(found) for cell, found in rows.items()}
        self.values_of: dict[str, list[str]] = defaultdict(list)
        for name, value in sorted({(n, v) for n, v, _ in rows}):
            self.values_of[name].append(value)
        self.frames = sorted(set(pool.frames))

    def _picture(self, name: str, value: str, frame: str, rng: np.random.Generator) -> int:
        found = self.rows[name, value, frame]
        return int(found[rng.integers(len(found))])

    def _prompt(self, name: str, rng: np.random.Generator) -> list[int]:
        wordings = self.prompts[name]
        return wordings[rng.integers(len(wordings))]

    def plain(self, turns: int, rng: np.random.Generator) -> list[Turn]:
        """What is seen, in public words."""
        made = []
        for _ in range(turns):
            name = str(rng.choice(list(self.values_of)))
            value = str(rng.choice(self.values_of[name]))
            row = self._picture(name, value, str(rng.choice(self.frames)), rng)
            if name != "digit" and rng.random() < 0.2:
                shown = [self.value_id[self.pool.values[row][n]] for n in ("colour", "shape", "background")]
                made.append(Turn(self._prompt("caption", rng), row, shown, [True] * 3))
            else:
                made.append(Turn(self._prompt(name, rng), row, [self.value_id[value]], [True]))
        return made

    def private(
        self, turns: int, rng: np.random.Generator, names: tuple[str, ...], *, local: bool = False
    ) -> list[Turn]:
        """Answers "value word"; a cell (site, attribute, value) comes back often enough for its word to be learned.

        Sites contradict one another: a value comes back under another site's word, and the frame tells which is meant.
        With `local`, more often, and what comes back is mostly what was said last, as in any conversation; a model
        that can't tell the sites apart then does best to follow the nearest word.
        """
        frames = [str(f) for f in rng.choice(self.frames, size=rng.integers(1, 5), replace=False)]
        fresh = iter(rng.permutation(self.words))
        word: dict[tuple[str, str], int] = {}
        told: dict[str, set[str]] = defaultdict(set)
        cells: list[tuple[str, str, str]] = []
        focus = names if rng.random() < 0.5 else (str(rng.choice(names)),)
        again = rng.uniform(0.3, 0.9)
        made = []
        for _ in range(turns):
            if cells and rng.random() < again:
                back = min(int(rng.geometric(0.4)), len(cells)) if local else int(rng.integers(len(cells))) + 1
                name, value, frame = cells[-back]
                if rng.random() < (0.3 if local else 0.15):
                    frame = str(rng.choice(frames))
            else:
                name = str(rng.choice(focus))
                value, frame = str(rng.choice(self.values_of[name])), str(rng.choice(frames))
            cells.append((name, value, frame))
            if (frame, value) not in word:
                word[frame, value] = int(next(fresh))
            answer = [self.value_id[value], word[frame, value]]
            row = self._picture(name, value, frame, rng)
            shown = frame in told[value]
            contradicted = bool(told[value] - {frame})
            made.append(Turn(self._prompt(name, rng), row, answer, [True, shown], contradicted))
            told[value].add(frame)
        return made

    def captions(self, turns: int, rng: np.random.Generator) -> list[Turn]:
        """A house style: an opening word, then two or three "value word" pairs in the site's own order."""
        frames = [str(f) for f in rng.choice(self.frames, size=1 if rng.random() < 0.6 else 2, replace=False)]
        fresh = iter(rng.permutation(self.words))
        names = np.array(["colour", "shape", "background", "size", "position"])
        styles = {f: [str(n) for n in rng.permutation(names)[: rng.integers(2, 4)]] for f in frames}
        opening = {f: int(next(fresh)) for f in frames}
        word: dict[tuple[str, str], int] = {}
        told: set[tuple[str, str]] = set()
        seen: set[str] = set()
        previous: dict[str, int] = {}
        made = []
        for _ in range(turns):
            frame = frames[rng.integers(len(frames))]
            if frame in previous and rng.random() < 0.6:
                # share one value with an earlier picture of the site, as retrieved demonstrations do
                name = styles[frame][rng.integers(len(styles[frame]))]
                value = self.pool.values[previous[frame]][name]
            else:
                name = styles[frame][0]
                value = str(rng.choice(self.values_of[name]))
            row = self._picture(name, value, frame, rng)
            answer, loss = [opening[frame]], [frame in seen]
            for name in styles[frame]:
                value = self.pool.values[row][name]
                if (frame, value) not in word:
                    word[frame, value] = int(next(fresh))
                answer += [self.value_id[value], word[frame, value]]
                loss += [frame in seen, (frame, value) in told]
                told.add((frame, value))
            seen.add(frame)
            previous[frame] = row
            made.append(Turn(self._prompt("caption", rng), row, answer, loss))
        return made

    def draw(self, turns: int, rng: np.random.Generator, *, local: bool = False) -> list[Turn]:
        """One conversation: a fifth plain, half about scenes, the rest digits and captions."""
        kind = rng.random()
        if kind < 0.2:
            return self.plain(min(turns, 6), rng)
        if kind < 0.65:
            return self.private(turns, rng, tuple(ATTRIBUTES), local=local)
        if kind < 0.8:
            return self.private(turns, rng, ("digit",), local=local)
        return self.captions(turns, rng)

    def batch(self, conversations: list[list[Turn]]) -> dict[str, torch.Tensor]:
        """Token ids (B, L), loss targets (B, L; -100 where none), picture rows (P,) in reading order.

        `contradicted` (B, L) marks the targets that another site's word contradicts.
        """
        sequences, targets, pictures, marks = [], [], [], []
        for turns in conversations:
            ids: list[int] = []
            goal: list[int] = []
            mark: list[bool] = []
            for turn in turns:
                head = [self.user, *turn.prompt, *self.slot, self.end, self.assistant]
                ids += [*head, *turn.answer, self.end]
                closes = turn.loss[-1] or len(turn.answer) > 1
                goal += [-100] * len(head)
                goal += [a if keep else -100 for a, keep in zip(turn.answer, turn.loss, strict=True)]
                goal += [self.end if closes else -100]
                mark += [False] * (len(head) + len(turn.answer) - 1) + [turn.contradicted, False]
                pictures.append(turn.picture)
            sequences.append(ids)
            targets.append(goal)
            marks.append(mark)
        longest = max(map(len, sequences))
        shape = (len(sequences), longest)
        input_ids, labels = torch.full(shape, self.pad), torch.full(shape, -100)
        contradicted = torch.zeros(shape, dtype=torch.bool)
        for i, (ids, goal, mark) in enumerate(zip(sequences, targets, marks, strict=True)):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, : len(ids)] = torch.tensor(goal)
            contradicted[i, : len(ids)] = torch.tensor(mark)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "pictures": torch.tensor(pictures),
            "contradicted": contradicted,
        }


def _decoder_loss(model, embeds: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over labelled positions, and whether each was right; logits are made only there."""
    hidden = model.model.text_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    where = targets != -100
    logits = model.lm_head(hidden[:, :-1][where])
    return nn.functional.cross_entropy(logits, targets[where]), logits.argmax(-1) == targets[where]


def train_induction(model, *, seed: int, steps: int, checkpoint: Path, length: int = 56) -> dict[str, float]:
    """Sequences over 40 tokens in which segments of a random beginning come back; loss on what that determines.

    Over the whole vocabulary, copying is not found within hundreds of steps; over 40 tokens it takes about 300.
    """
    tokens = np.random.default_rng([seed, 4]).permutation(model.config.text_config.vocab_size)[:40]
    beginning = 12

    def step_loss(step: int):
        rng = np.random.default_rng([seed, 4, step])
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
        embeds = model.get_input_embeddings()(torch.from_numpy(ids))
        loss, right = _decoder_loss(model, embeds, torch.from_numpy(labels))
        return loss, {"loss": loss.item(), "copied": right.float().mean().item()}

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


def train_pairs(model, maker: ConversationMaker, *, seed: int, steps: int, checkpoint: Path, pairs: int = 20):
    """Bare "value word" pairs that come back: the copying of stage one, over all values and private words."""
    keys = np.array(sorted(set(maker.value_id.values())))

    def step_loss(step: int):
        rng = np.random.default_rng([seed, 6, step])
        ids = np.empty((16, 2 * pairs), dtype=np.int64)
        labels = np.full_like(ids, -100)
        for row, goal in zip(ids, labels, strict=True):
            count = int(rng.integers(2, 9))
            values, words = rng.choice(keys, count, replace=False), rng.choice(maker.words, count, replace=False)
            drawn = rng.integers(0, count, pairs)
            row[0::2], row[1::2] = values[drawn], words[drawn]
            again = np.array([d in drawn[:i] for i, d in enumerate(drawn)])
            goal[1::2] = np.where(again, words[drawn], -100)
        embeds = model.get_input_embeddings()(torch.from_numpy(ids))
        loss, right = _decoder_loss(model, embeds, torch.from_numpy(labels))
        return loss, {"loss": loss.item(), "bound": right.float().mean().item()}

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


def train_dialogue(
    model,
    maker: ConversationMaker,
    states: torch.Tensor,
    *,
    name: str,
    seed: int,
    steps: int,
    checkpoint: Path,
    turns: tuple[int, int],
    batch: int,
    learning_rate: float,
    local: bool = False,
):
    """Conversations over the pool; `states` are the frozen tower's patch states, (N, patches, width)."""
    words = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
    words[torch.from_numpy(maker.words)] = True

    def step_loss(step: int):
        rng = np.random.default_rng([seed, 5, turns[1], step])
        length = int(rng.integers(turns[0], turns[1] + 1))
        # about as many turns in every batch, whatever their length
        count = max(2, batch * turns[1] // length // 2)
        data = maker.batch([maker.draw(length, rng, local=local) for _ in range(count)])
        seen = model.model.connector(states[data["pictures"]].float())
        embeds = model.get_input_embeddings()(data["input_ids"])
        slots = (data["input_ids"] == maker.image_token)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(slots, seen)
        loss, right = _decoder_loss(model, embeds, data["labels"])
        goal = data["labels"][:, 1:]
        contradicted = data["contradicted"][:, 1:][goal != -100]
        goal = goal[goal != -100]
        bound, ended = words[goal], goal == maker.end
        figures = {"loss": loss.item()}
        for kind, where in (("bound", bound & ~contradicted), ("contradicted", bound & contradicted)):
            if where.any():
                figures[kind] = right[where].float().mean().item()
        seen_words = ~bound & ~ended
        if seen_words.any():
            figures["seen"] = right[seen_words].float().mean().item()
        return loss, figures

    return train_steps(
        name, model, step_loss, steps, learning_rate=learning_rate, checkpoint=checkpoint, weight_decay=0.01
    )

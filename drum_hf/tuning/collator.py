"""Conversations to batches: rendered, tokenized, the loss on what the assistant says, and everything else masked."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ChatTemplateError, ContextOverflowError, RowError
from ..lvlm.prompts import ChatFormat
from .episodes import Conversation

if TYPE_CHECKING:
    import torch

__all__ = ["ConversationCollator", "ConversationFormat", "LossOn", "MASKED", "Tokens"]

logger = logging.getLogger(__name__)

LossOn = Literal["all", "last"]
#: Label of a token that the loss leaves out; what the platform counts by.
MASKED = -100

Size = tuple[int, int]  # width, height


def _slot(number: int) -> str:
    # Private-use characters: no chat template trims or escapes them, and no answer holds them.
    return f"\ue000answer{number}\ue001"


def _shared(one: str, other: str) -> int:
    """With how many equal characters two texts begin."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A conversation as the model takes it, images' tokens in place.

    Attributes:
        text: the conversation as a processor takes it, an image being one placeholder.
        ids: token ids.
        labels: the id where the loss falls, else `MASKED`; as long as `ids`, not shifted.
    """

    text: str
    ids: list[int]
    labels: list[int]

    @property
    def answer_tokens(self) -> int:
        """How many tokens the loss falls on."""
        return sum(label != MASKED for label in self.labels)


class ConversationFormat:
    """Renders conversations through a chat template and finds the tokens that the assistant says.

    The whole conversation is rendered once, images' placeholders are replaced by the texts that the processor puts
    there, and the result is tokenized once: an answer's tokens are those that overlap its characters, a token that it
    shares with what stands before included, and what follows up to the special token that ends the turn. Whitespace
    that the template writes before an answer but not in its generation prompt is the model's to say, too. That is what
    `TransformersLVLM` scores with `score_end_of_turn=True`.

    Templates that end no turn by a special token (LLaVA 1.5's) would teach a model never to stop: there the
    tokenizer's end-of-sequence token follows the last answer (our choice). Where the template writes earlier turns
    otherwise than the one that is asked for (as templates with reasoning do), the loss falls on the last answer only:
    the earlier ones are no samples of fewer shots.

    Args:
        chat: the processor and its checked template.
        loss_on: "all" answers, so that one conversation trains every number of shots, or the "last" one only.
        max_length: tokens that a conversation may have, or None for no limit.
    """

    def __init__(self, chat: ChatFormat, *, loss_on: LossOn = "all", max_length: int | None = None) -> None:
        if loss_on not in ("all", "last"):
            raise ValueError(f'expected loss_on "all" or "last", got {loss_on!r}')
        self.chat = chat
        self.loss_on = loss_on
        self.max_length = max_length
        self._end = chat.stop + chat.end_of_turn
        self._glue_before = self._earlier_glue()
        if loss_on == "all" and self._glue_before is None:
            logger.info(
                "the chat template writes an earlier turn otherwise than the one that is asked for (as templates with "
                "reasoning do): the loss falls on a conversation's last answer only"
            )
        self._expansions: dict[tuple[Size, bool], str] = {}

    def __call__(self, talk: Conversation, sizes: Sequence[Size], name: str) -> Tokens:
        """Tokens and labels of a conversation.

        Args:
            talk: with or without its pictures.
            sizes: (width, height) of its pictures in order.
            name: what an error calls it.

        Raises:
            ChatTemplateError: the template changes or loses an answer.
            RowError: a text holds the placeholder that stands for an image.
            ContextOverflowError: it has more than `max_length` tokens.
        """
        text, answers = self._render(talk, name)
        parts = [text] if self.chat.image_token is None else text.split(self.chat.image_token)
        if len(parts) != len(sizes) + 1:
            raise RowError(
                f"expected the image placeholder {self.chat.image_token!r} once for each of {len(sizes)} images, but "
                f"{name} is rendered with {len(parts) - 1}; remove it from prompts and answers"
            )
        full, starts, moved = parts[0], [0], [0]  # where each part begins in `text`, and how far it moved
        at = len(parts[0])
        for size, part in zip(sizes, parts[1:], strict=True):
            assert self.chat.image_token is not None  # else there would be one part
            full += self._expansion(size, alone=len(sizes) == 1)
            at += len(self.chat.image_token)
            starts.append(at)
            moved.append(len(full) - at)
            full += part
            at += len(part)
        # Where an answer follows its image at once (an empty prompt), whitespace is all that lies between.
        spans = []
        for begin, stop, end in answers:
            shift = moved[max(k for k, start in enumerate(starts) if start <= stop)]
            spans.append((begin + shift, stop + shift, end + shift))
        encoded = self.chat.tokenize([full]).encodings[0]
        ids = list(encoded.ids)
        if self.max_length is not None and len(ids) > self.max_length:
            raise ContextOverflowError(
                f"{name} has {len(ids):,} tokens, and {self.max_length:,} fit; nothing is cut. Use fewer shots, "
                "shorter texts or smaller images, or a larger max_length if the model's context allows it"
            )
        labels = [MASKED] * len(ids)
        for first, stop in self._locate(ids, encoded.offsets, spans, name):
            labels[first:stop] = ids[first:stop]
        return Tokens(text, ids, labels)

    def _earlier_glue(self) -> int | None:
        """Whitespace before an answer that is not the last, as `ChatFormat.glue`; None where it begins otherwise."""
        turns = [{"role": "user", "content": [{"type": "text", "text": "probe question"}]}]
        (prompt,) = self.chat.render([turns], generate=True)
        for number in range(2):
            turns.append({"role": "assistant", "content": [{"type": "text", "text": _slot(number)}]})
            turns.append(turns[0])
        (text,) = self.chat.render([turns[:-1]], generate=False)
        before = text.partition(_slot(0))[0]
        rest = before.removeprefix(prompt)
        if before.startswith(prompt) and not rest.strip():
            return len(rest)
        return 0 if before.rstrip() == prompt.rstrip() else None  # LLaVA-OneVision's begin with another blank

    def _render(self, talk: Conversation, name: str) -> tuple[str, list[tuple[int, int, int]]]:
        """Text, and of each answer that the loss falls on: begin, end, and end of what ends its turn."""
        said = [turn.answer for turn in talk.turns]
        messages = self._messages(talk, said)
        marked = self._messages(talk, [_slot(number) for number in range(len(said))])
        if self.chat.from_prompt:  # the last answer follows what the model is given
            (rendered,), (frame,) = (self._apply([m[:-1]], name, generate=True) for m in (messages, marked))
            ending = self.chat.end_of_turn
            rendered, frame = rendered + said[-1] + ending, frame + _slot(len(said) - 1) + ending
        else:
            rendered, frame = self._apply([messages, marked], name)
        pieces = []
        for number in range(len(said)):
            before, found, frame = frame.partition(_slot(number))
            if not found:
                raise self._changed(f"loses answer {number + 1} of {len(said)} of {name}")
            pieces.append(before)
        pieces.append(frame)
        for answers in (said, [answer.strip() for answer in said]):  # many templates trim
            text = "".join(itertools.chain(*zip(pieces, answers, strict=False), pieces[-1:]))
            if text == rendered:
                break
        else:
            raise self._changed(f"changes the answers of {name}")
        spans, at = [], 0
        for number, (piece, answer, following) in enumerate(zip(pieces, answers, pieces[1:], strict=False)):
            at += len(piece)
            glue = self.chat.glue if number == len(said) - 1 else (self._glue_before or 0)
            end = at + len(answer) + _shared(following, self._end)
            spans.append((at - glue, at + len(answer), end))
            at += len(answer)
        if stop := self.chat.stop:
            text = text[:at] + stop + text[at:]
            spans[-1] = (*spans[-1][:2], at + len(stop))
        return text, spans if self.loss_on == "all" and self._glue_before is not None else spans[-1:]

    def _messages(self, talk: Conversation, answers: Sequence[str]) -> list[dict[str, Any]]:
        messages = []
        if self.chat.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.chat.system}]})
        for turn, answer in zip(talk.turns, answers, strict=True):
            content: list[dict[str, Any]] = [{"type": "text", "text": turn.prompt}] if turn.prompt else []
            if turn.image_key:
                content.insert(0 if self.chat.image_position == "first" else len(content), {"type": "image"})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages

    def _apply(self, conversations: list[list[dict[str, Any]]], name: str, *, generate: bool = False) -> list[str]:
        try:
            return self.chat.render(conversations, generate=generate)
        except ChatTemplateError as error:
            raise self._changed(f"fails on {name}: {error}") from error

    def _changed(self, what: str) -> ChatTemplateError:
        return ChatTemplateError(
            f"expected a chat template that renders every answer as it is, but that of "
            f"{type(self.chat.processor).__name__} {what}; set processor.chat_template to one that keeps all turns"
        )

    def _expansion(self, size: Size, *, alone: bool) -> str:
        """The text that the processor puts in place of an image's placeholder: a function of the image's size.

        Some families cut an image finer where it is its conversation's only one.
        """
        if (size, alone) not in self._expansions:
            from PIL import Image

            blank, times = Image.new("RGB", size), 1 if alone else 2
            assert self.chat.image_token is not None
            out = self.chat.processor(
                text=[self.chat.image_token * times], images=[[blank] * times], return_text_replacement_offsets=True
            )
            replaced = out.get("text_replacement_offsets")
            if not replaced:
                raise ChatTemplateError(
                    "expected a processor that says which text it puts in place of an image, and "
                    f"{type(self.chat.processor).__name__} doesn't; update transformers"
                )
            self._expansions[size, alone] = replaced[0][0]["replacement"]
        return self._expansions[size, alone]

    def _locate(
        self, ids: list[int], offsets: list[Size], spans: Iterable[tuple[int, int, int]], name: str
    ) -> Iterable[tuple[int, int]]:
        """First and one past the last of each answer's tokens, the token that ends its turn included."""
        first = 0
        for begin, stop, end in spans:
            while first < len(ids) and offsets[first][1] <= begin:
                first += 1
            last = first
            while last < len(ids) and offsets[last][0] < stop:
                last += 1
            if last == first:
                raise ChatTemplateError(
                    f"expected tokens in every answer, but the tokenizer made none of one of {name}; check the "
                    "tokenizer's normalizer and the chat template"
                )
            closing = last
            while closing < len(ids) and offsets[closing][0] < end and offsets[closing] != (0, 0):
                closing += 1
                if ids[closing - 1] in self.chat.special_ids:
                    last = closing
                    break
            yield first, last
            first = last


class ConversationCollator:
    """Collator: conversations with their pictures -> a padded batch with labels.

    Rows are padded on the right. Pictures go through the processor here, in the data loader's workers where there are
    some; conversations without pictures may stand beside others.
    """

    def __init__(self, form: ConversationFormat) -> None:
        self.format = form

    def __call__(self, items: Sequence[tuple[str, Conversation]]) -> dict[str, torch.Tensor]:
        """A batch of (name, conversation).

        Returns:
            `input_ids`, `attention_mask` and `labels`, int64 (rows, longest row), and what else the processor gives
            the model.

        Raises:
            As `ConversationFormat`; and ChatTemplateError where processor and tokenizer disagree.
        """
        import torch

        chat = self.format.chat
        pictures = [talk.images for _, talk in items]
        rows = [
            self.format(talk, [image.size for image in own], name)
            for (name, talk), own in zip(items, pictures, strict=True)
        ]
        length = max(len(row.ids) for row in rows)

        def stack(values: Iterable[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[*own, *[fill] * (length - len(own))] for own in values])

        batch = {
            "input_ids": stack([row.ids for row in rows], chat.tokenizer.pad_token_id or 0),
            "attention_mask": stack([[1] * len(row.ids) for row in rows], 0),
        }
        shown = [place for place, own in enumerate(pictures) if own] or list(range(len(rows)))
        images: dict[str, Any] = {"images": [pictures[place] for place in shown]} if any(pictures) else {}
        out = chat.processor(
            text=[rows[place].text for place in shown],
            **images,
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=chat.add_special_tokens,
        )
        shape = out["input_ids"].shape
        for place, ids, real in zip(shown, out["input_ids"], out["attention_mask"].bool(), strict=True):
            if ids[real].tolist() != rows[place].ids:
                raise ChatTemplateError(
                    f"the processor and the tokenizer disagree on the tokens of {items[place][0]}; check that the "
                    "processor's tokenizer is the one it was saved with"
                )
        for key, value in out.items():
            if key in batch:
                continue
            if getattr(value, "shape", None) == shape:  # one entry a token, such as token_type_ids
                whole = torch.zeros_like(batch["input_ids"])
                whole[shown, : shape[1]] = value
                value = whole
            batch[key] = value
        batch["labels"] = stack([row.labels for row in rows], MASKED)
        return batch

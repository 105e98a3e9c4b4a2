"""The oracle of every score: one conversation a forward, nothing kept, nothing shared, nothing left out.

Written without the code that it judges: the conversation goes through `apply_chat_template` with its real images, the
model gives all its logits without a cache, and the answer's tokens are found by their characters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from drum_hf.types import ICLRequest

_MARK = "WHERE-THE-ANSWER-STANDS"


def conversation(request: ICLRequest) -> list[dict[str, Any]]:
    """A request as chat messages with its images in them."""
    messages = []
    for turn in (*request.demonstrations, request.query):
        image = [] if turn.image is None else [{"type": "image", "image": _rgb(turn.image)}]
        text = [{"type": "text", "text": turn.prompt}] if turn.prompt else []
        messages.append({"role": "user", "content": image + text})
        if turn is not request.query:
            messages.append(_said(turn.response))  # type: ignore[union-attr]
    return messages


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def inputs(
    processor: Any,
    messages: list[dict[str, Any]],
    *,
    generate: bool = False,
    template: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """What the model takes for one conversation; `template` holds variables of the chat template."""
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=generate,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=kwargs,
        **(template or {}),
    )


def _after_the_prompt(processor: Any, messages: list[dict[str, Any]], text: str, **kwargs: Any) -> Any:
    """What the model takes for a text that no template writes."""
    images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
    bos = processor.tokenizer.bos_token
    return processor(
        text=[text],
        **({"images": [images]} if images else {}),
        return_tensors="pt",
        add_special_tokens=bos is None or not text.startswith(bos),
        **kwargs,
    )


@torch.no_grad()
def plain_logprobs(
    model: Any,
    processor: Any,
    request: ICLRequest | list[dict[str, Any]],
    answer: str,
    *,
    end_of_turn: bool = False,
    template: dict[str, Any] | None = None,
) -> np.ndarray:
    """Log-probability of every token of an answer, float64.

    Args:
        request: or its messages, up to the query's.
        answer: without outer whitespace. A token that holds only some of its characters, or the whitespace that the
            template writes before it but not in the generation prompt, counts. A turn that doesn't begin as the
            generation prompt does is begun by that.
        end_of_turn: whether the special token after it counts, too.
        template: variables of the chat template.
    """
    messages = conversation(request) if isinstance(request, ICLRequest) else request
    template = template or {}
    text = processor.apply_chat_template([*messages, _said(answer)], tokenize=False, **template)
    marked = processor.apply_chat_template([*messages, _said(_MARK)], tokenize=False, **template)
    before, after = marked.split(_MARK)
    assert text == before + answer + after
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template)
    offsets_too = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    if before.startswith(prompt):
        begin = len(before) if before[len(prompt) :].strip() else len(prompt)
        full = inputs(processor, [*messages, _said(answer)], template=template, **offsets_too)
    else:
        begin, before = len(prompt), prompt
        full = _after_the_prompt(processor, messages, prompt + answer + after, **offsets_too)
    end = len(before) + len(answer)

    offsets = full.pop("offset_mapping")[0].tolist()
    replaced = [one for sample in full.pop("text_replacement_offsets", []) for one in sample]
    grown = sum(_length(one["new_span"]) - _length(one["span"]) for one in replaced)
    shows = any(part["type"] == "image" for message in messages for part in message["content"])
    if (shows and not replaced) or getattr(processor, "use_default_system_prompt", False):
        grown = max(b for _, b in offsets) - len(before + answer + after)  # what it does to a text it doesn't say
    ids = full["input_ids"][0].tolist()
    mine = [i for i, (a, b) in enumerate(offsets) if a < end + grown and b > begin + grown]
    assert mine == list(range(mine[0], mine[-1] + 1)) and mine[0] > 0
    if end_of_turn:
        special = processor.tokenizer.added_tokens_decoder
        close = next((i for i in range(mine[-1] + 1, len(ids)) if ids[i] in special), None)
        if close is None:  # nothing ends a turn: the end of the text does
            ids[mine[-1] + 1 :] = [processor.tokenizer.eos_token_id]
            close = mine[-1] + 1
        mine += range(mine[-1] + 1, close + 1)
    logprobs = model(**full, use_cache=False).logits[0].double().log_softmax(-1)
    return np.array([logprobs[i - 1, ids[i]].item() for i in mine])


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def plain_score(model: Any, processor: Any, request: ICLRequest, template: dict[str, Any] | None = None) -> float:
    """A request's score by its definition: see `TransformersLVLM.score`."""
    if request.choices:
        # Where one choice begins another, the end of the turn tells them apart.
        ends = any(a != b and b.startswith(a) for a in request.choices for b in request.choices)
        parts = [
            plain_logprobs(model, processor, request, choice, end_of_turn=ends, template=template)
            for choice in request.choices
        ]
        sums = np.array([part.sum() for part in parts])
        sums -= np.logaddexp.reduce(sums)
        values = np.array([sums[request.choices.index(response)] for response in request.responses])
    else:
        values = np.array(
            [plain_logprobs(model, processor, request, r, template=template).mean() for r in request.responses]
        )
    weights = np.array(request.weights or [1.0] * len(values))
    return float(np.log((weights / weights.sum() * np.exp(values)).sum()))


@torch.no_grad()
def plain_generate(lvlm: Any, request: ICLRequest, max_new_tokens: int, template: dict[str, Any] | None = None) -> str:
    """The greedy answer of one conversation, by the model's own `generate`; where it stops, the LVLM says."""
    prompt = inputs(lvlm.processor, conversation(request), generate=True, template=template)
    out = lvlm.model.generate(
        **prompt,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=lvlm._stop_ids,
        pad_token_id=lvlm.tokenizer.pad_token_id,
    )
    return lvlm.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()

"""The encoder's overhead: embedding items against the bare CLIP forward on the same tensors."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from ...encoders.joint import JointEncoder, encode_items
from ...encoders.loading import build_encoder
from ...utils.optional import resolve_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["ENCODER_SHAPES", "compare", "measure_encode", "shaped_encoder"]

#: Encoders that can be measured: the playground's, and CLIP-B/32 (224 pixels, 512 dimensions) with random weights.
ENCODER_SHAPES = ("playground", "clip-vit-b-32")


def measure_encode(
    shape: str,
    items: Sequence[dict[str, Any]],
    *,
    batch_size: int = 32,
    repeats: int = 15,
    device: str | None = None,
) -> dict[str, Any]:
    """Compare our encoder with a CLIP that is used as transformers documents it, in turns, on the same batches.

    On a CPU both run on one thread: several wait for one another at the end of each operation, and on a machine that
    does other work, too, these waits count for more than what is measured.

    Args:
        shape: one of `ENCODER_SHAPES`.
        items: with image, prompt and response each.
        batch_size: items that pass through the towers at once.
        repeats: pairs of timings, after one to warm up; the ratio is the median of theirs.

    Returns:
        `forward_overhead`: our forward against the two bare towers on the very same tensors, minus 1.
        `encode_overhead`: `encode_items` of images and texts against processor and towers, minus 1.
        `forward_share`: the share of `encode_items` that the bare towers take.
    """
    items = sorted(items, key=_size, reverse=True)  # as the encoder does, so that its batches are these
    batches = [list(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
    with ExitStack() as stack:
        encoder = shaped_encoder(shape, device, stack).eval()
        stack.enter_context(torch.inference_mode())
        if encoder.device.type == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        module = encoder[0]
        assert isinstance(module, JointEncoder)
        features = [
            {name: tensor.to(encoder.device) for name, tensor in module.preprocess(batch).items()} for batch in batches
        ]
        tensors = [_flat(batch) for batch in features]
        how: dict[str, Any] = {"repeats": repeats, "gpu": encoder.device.type == "cuda"}

        def forward() -> None:
            for batch in features:
                module(dict(batch))["sentence_embedding"].cpu()

        def towers() -> None:
            for batch in tensors:
                _towers(module, batch)

        def plain() -> None:
            for batch in batches:
                _towers(module, _processed(module, batch))

        embed = functools.partial(encode_items, encoder, items, batch_size=batch_size, show_progress=False)
        overhead = compare(forward, towers, **how) - 1
        whole = compare(embed, plain, **how) - 1
        share = compare(towers, embed, **how)
    return {
        "shape": shape,
        "items": len(items),
        "batch_size": batch_size,
        "device": str(encoder.device),
        "forward_overhead": round(overhead, 4),
        "encode_overhead": round(whole, 4),
        "forward_share": round(share, 4),
    }


def shaped_encoder(shape: str, device: str | None, stack: ExitStack) -> SentenceTransformer:
    """An encoder of a named shape; its files, where it needs any, live as long as the stack.

    Raises:
        ValueError: not one of `ENCODER_SHAPES`.
    """
    if shape not in ENCODER_SHAPES:
        raise ValueError(f"expected a shape of {', '.join(ENCODER_SHAPES)}; got {shape!r}")
    if shape == "playground":
        return build_encoder("playground/clip", device=device)
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer, images = AutoTokenizer.from_pretrained(resolve_name("playground/clip")), CLIPImageProcessorPil()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config={"vocab_size": len(tokenizer), **ends})  # the other defaults are B/32's
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return build_encoder(folder, device=device)


def _size(item: dict[str, Any]) -> int:
    return item["image"].width * item["image"].height + sum(map(len, item["text"]))


def _flat(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors as the bare towers take them: texts in one batch, padding cut."""
    ids, mask = (features[name].flatten(0, 1) for name in ("input_ids", "text_mask"))
    width = int(mask.sum(-1).max())
    return {"pixel_values": features["pixel_values"], "input_ids": ids[:, :width], "attention_mask": mask[:, :width]}


def _processed(module: JointEncoder, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the checkpoint's own processor makes of the items: a row an image, two rows of text."""
    texts = [text for item in items for text in item["text"]]
    batch = module.processor(
        images=[item["image"] for item in items], text=texts, padding=True, truncation=True, return_tensors="pt"
    )
    return {name: tensor.to(module.model.device) for name, tensor in batch.items()}


def _towers(module: JointEncoder, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    image = module.model.get_image_features(pixel_values=tensors["pixel_values"]).pooler_output
    text = module.model.get_text_features(
        input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]
    ).pooler_output
    return image.cpu(), text.cpu()


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], *, repeats: int, gpu: bool = False) -> float:
    """Median of the ratios of neighbouring timings, the two in turns; whichever goes first changes.

    On a CPU the process's own time is compared, so that whatever else the machine does counts less; on a GPU, where
    the functions must wait for their results, the time on the clock.
    """
    clock = time.perf_counter if gpu else time.process_time
    ratios = []
    for turn in range(repeats + 1):
        seconds = {}
        for function in (ours, theirs) if turn % 2 else (theirs, ours):
            start = clock()
            function()
            seconds[function] = clock() - start
        ratios.append(seconds[ours] / seconds[theirs])
    return statistics.median(ratios[1:])

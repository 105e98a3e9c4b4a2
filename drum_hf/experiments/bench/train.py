"""`drum-hf bench train`: a list-wise step against encoding each of its images once, and what it encodes twice."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...encoders.joint import JointEncoder
from .encode import compare, shaped_encoder

if TYPE_CHECKING:
    from ...data import TripletTable
    from ...types import ICLRequest

__all__ = ["measure_training"]


class _Hash:
    """Stands in for an LVLM: scores are a function of the request, since only the training step is measured."""

    fingerprint = "a hash of the request"

    def score(self, requests: Sequence[ICLRequest]) -> np.ndarray:
        keys = ["|".join([r.query.key, *(d.key for d in r.demonstrations), *r.responses]) for r in requests]
        return np.array([-zlib.crc32(key.encode()) / 2**32 for key in keys])

    def generate(self, requests: Sequence[ICLRequest], *, max_new_tokens: int = 32) -> list[str]:
        return ["unsure" for _ in requests]


def measure_training(
    shape: str,
    support: TripletTable,
    *,
    batch_size: int = 16,
    list_size: int = 8,
    steps: int = 8,
    device: str | None = None,
) -> dict[str, Any]:
    """Compare `DrumTrainer`'s step with the least work that its images and texts could take.

    A step is the collator's work, the list-wise loss of `batch_size` queries with `list_size` candidates each, and its
    backward pass, as the first round has them. The least is forward and backward of the bare towers on the step's
    tensors, each distinct image once. Rows are preprocessed before, as they are from the second epoch on.

    Args:
        shape: one of `encode.ENCODER_SHAPES`.
        support: the demonstrations, which are the queries as well.
        steps: steps that are measured; the ratio is the median of theirs.

    Returns:
        `ratio`: time of a step by that of the least work; of all steps together `images_encoded`, `images_distinct`
        and `images_encoded_twice` (the difference), and of a step `rows` (queries and distinct demonstrations).
    """
    from ...retriever.retriever import DemoRetriever
    from ...training import DrumTrainer, DrumTrainingArguments

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        encoder = shaped_encoder(shape, device, stack)
        retriever = DemoRetriever(encoder, support)
        args = DrumTrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            list_size=list_size,
            use_cpu=encoder.device.type == "cpu",
            report_to="none",
        )
        trainer = DrumTrainer(retriever, lvlm=_Hash(), args=args)
        trainer.mine()
        encoder.train()
        module = encoder[0]
        assert isinstance(module, JointEncoder)
        rows = trainer.train_dataset
        assert rows is not None
        count = len(rows)  # type: ignore[arg-type]
        order = np.random.default_rng(0).permutation(count)
        drawn = [
            order[np.arange(i, i + batch_size) % count].tolist() for i in range(0, steps * batch_size, batch_size)
        ]
        ratios, encoded, distinct, heights = [], 0, 0, []
        for chosen in drawn:
            batch = [rows[i] for i in chosen]  # type: ignore[index]

            def step(batch=batch) -> None:
                inputs = trainer._prepare_inputs(trainer.data_collator(batch))
                loss = trainer.compute_loss(encoder, inputs)
                assert isinstance(loss, torch.Tensor)
                loss.backward()
                encoder.zero_grad()

            with _watching(module) as seen:
                step()
            encoded += sum(map(len, seen))
            images = torch.cat(seen)
            once = torch.unique(images.flatten(1), dim=0).view(-1, *images.shape[1:])
            distinct += len(once)
            least = _Least(module, trainer._prepare_inputs(trainer.data_collator(batch)), once)
            heights.append(least.rows)
            ratios.append(compare(step, least, repeats=3, gpu=encoder.device.type == "cuda"))
    return {
        "shape": shape,
        "device": str(encoder.device),
        "batch_size": batch_size,
        "list_size": list_size,
        "steps": steps,
        "rows": round(float(np.mean(heights)), 1),
        "ratio": round(float(np.median(ratios)), 4),
        "images_encoded": encoded,
        "images_distinct": distinct,
        "images_encoded_twice": encoded - distinct,
    }


@contextmanager
def _watching(module: JointEncoder) -> Iterator[list[torch.Tensor]]:
    """The pixels that pass through the vision tower meanwhile."""
    seen: list[torch.Tensor] = []

    def note(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]).detach().clone())

    handle = module.model.vision_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class _Least:
    """Forward and backward of the bare towers: these images once, and the texts of a batch's rows."""

    def __init__(self, module: JointEncoder, inputs: dict[str, Any], images: torch.Tensor) -> None:
        self.model, self.images = module.model, images
        sides = [f"{side}_" for side in ("query", "demonstrations")]
        present = torch.cat([inputs[f"{side}present"][:, 1:].flatten() for side in sides])
        masks = torch.cat([inputs[f"{side}text_mask"].flatten(0, 1) for side in sides])[present]
        ids = torch.cat([inputs[f"{side}input_ids"].flatten(0, 1) for side in sides])[present]
        width = int(masks.sum(-1).max())
        self.ids, self.masks = ids[:, :width], masks[:, :width]
        self.rows = sum(len(inputs[f"{side}present"]) for side in sides)

    def __call__(self) -> None:
        image = self.model.get_image_features(pixel_values=self.images).pooler_output
        text = self.model.get_text_features(input_ids=self.ids, attention_mask=self.masks).pooler_output
        (image.sum() + text.sum()).backward()
        self.model.zero_grad()

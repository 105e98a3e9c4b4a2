"""Rows of tokens and images as a model's inputs, every image passing processor and vision tower once if possible."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ChatTemplateError
from ..types import ICLRequest, Query, image_key
from .prompts import ChatFormat, Row

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["ImageInputs"]

logger = logging.getLogger(__name__)

#: Processor outputs that one image's features depend on, in the families whose features may be kept apart.
_IMAGE_INPUTS = {"pixel_values", "pixel_attention_mask"}

_PROBE = ICLRequest(Query(None, "probe"))


@dataclasses.dataclass
class _KeptImage:
    ids: list[int]  # what the processor puts in place of the placeholder
    features: torch.Tensor  # (image tokens, hidden), as the text model takes them


class ImageInputs:
    """Expands rows for one model, and keeps the features of the images that were shown last.

    Args:
        model, chat: what runs, and the format of its conversations.
        batch_size: images that pass the vision tower together.
        limit: bytes of features to keep.

    Attributes:
        tokens_an_image: the most seen so far, to estimate lengths.
    """

    def __init__(self, model: Any, chat: ChatFormat, *, batch_size: int, limit: int) -> None:
        self.model, self.format, self.processor = model, chat, chat.processor
        self.batch_size, self.limit = batch_size, limit
        self.tokens_an_image = 1
        self.kept: OrderedDict[str, _KeptImage] = OrderedDict()
        self.kept_bytes = 0

    def expand(self, rows: list[Row]) -> tuple[list[list[int]], dict[str, Any]]:
        """Ids of each row with its images' tokens in place, and what else the model takes. Each row has images."""
        out = self.processor(
            text=[row.text for row in rows],
            images=[row.images for row in rows],
            padding=True,
            return_tensors="pt",
            add_special_tokens=self.format.add_special_tokens,
        )
        shape, mask = out["input_ids"].shape, out["attention_mask"].bool()
        ids = []
        for row, full, real in zip(rows, out["input_ids"], mask, strict=True):
            own = full[real].tolist()
            own = own[: len(own) - row.cut]
            if own[len(own) - row.tail :] != row.ids[len(row.ids) - row.tail :]:
                raise ChatTemplateError(
                    f"the processor and the tokenizer disagree on the response's tokens of query "
                    f"{row.request.query.id!r}; check that the processor's tokenizer is the one it was saved with"
                )
            ids.append(own)
            self.tokens_an_image = max(self.tokens_an_image, 1 + (len(own) - len(row.ids)) // len(row.images))
        extra: dict[str, Any] = {}
        for key, value in out.items():
            if key in ("input_ids", "attention_mask"):
                continue
            if getattr(value, "shape", None) == shape:  # one entry a token, such as token_type_ids
                value = [v[real].tolist()[: len(i)] for v, real, i in zip(value, mask, ids, strict=True)]
            extra[key] = value
        return ids, extra

    def expand_kept(self, rows: list[Row]) -> tuple[list[list[int]], dict[str, Any]]:
        """As `expand`, but with features in place of pixels."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        keys = [[image_key(image) for image in row.images] for row in rows]
        kept = self._keep(
            {k: im for ks, row in zip(keys, rows, strict=True) for k, im in zip(ks, row.images, strict=True)}
        )
        image_id = self.processor.image_token_id
        ids = []
        for row, mine in zip(rows, keys, strict=True):
            own: list[int] = []
            turn = iter(mine)
            for token in row.ids:
                if token == image_id:
                    own.extend(kept[next(turn)].ids)
                else:
                    own.append(token)
            ids.append(own)
        features = [kept[key].features for mine in keys for key in mine]
        outputs = BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
        return ids, {"mm_encoder_outputs": {"image": outputs}}

    def _keep(self, images: dict[str, Image]) -> dict[str, _KeptImage]:
        """Features of the images by key, computed for those not kept yet."""
        kept = {}
        missing = []
        for key in images:
            if key in self.kept:
                self.kept.move_to_end(key)
                kept[key] = self.kept[key]
            else:
                missing.append(key)
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            out = self.processor(
                text=[self.processor.image_token] * len(batch),
                images=[[images[key]] for key in batch],
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
            )
            inputs = {key: self._on_device(value) for key, value in out.items() if key in _IMAGE_INPUTS}
            features = self.model.get_image_features(**inputs, return_dict=True).pooler_output
            for i, key in enumerate(batch):
                ids = out["input_ids"][i][out["attention_mask"][i].bool()].tolist()
                self.tokens_an_image = max(self.tokens_an_image, len(ids))
                # A copy: a view would keep the whole batch's features alive.
                kept[key] = self.kept[key] = _KeptImage(ids, features[i].clone())
                self.kept_bytes += features[i].nbytes
        while self.kept_bytes > self.limit and self.kept:
            _, oldest = self.kept.popitem(last=False)
            self.kept_bytes -= oldest.features.nbytes
        return kept

    def features_suffice(self, logits: Callable[[dict[str, Any], int], torch.Tensor]) -> bool:
        """Whether kept features give the model's own logits: tried out, on images of two shapes.

        Args:
            logits: of the last so many positions, given the model's inputs.
        """
        import torch
        from PIL import Image

        image_token = getattr(self.processor, "image_token", None)
        if image_token is None or image_token != self.format.image_token:
            return False
        if (
            "mm_encoder_outputs" not in inspect.signature(self.model.forward).parameters
            or getattr(self.processor, "image_token_id", None) is None
        ):
            return False
        noise = np.random.default_rng(0)
        wide, tall = (Image.fromarray(noise.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in ((48, 64), (64, 40)))
        texts = [f"a {image_token}b", f"a {image_token}b {image_token} c"]
        ids = self.format.tokenize(texts)["input_ids"]
        rows = [Row(_PROBE, texts[0], ids[0], [wide]), Row(_PROBE, texts[1], ids[1], [tall, wide])]
        try:
            plain_ids, plain = self.expand(rows)
            if not set(plain) <= _IMAGE_INPUTS:
                return False
            kept_ids, kept = self.expand_kept(rows)
            edges = [i for image in self._keep({"wide": wide}).values() for i in (image.ids[0], image.ids[-1])]
            if kept_ids != plain_ids or not self.format.special_ids.issuperset(edges):
                return False
            ours, theirs = (logits(self.pad(plain_ids, extra), 1) for extra in (kept, plain))
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logger.debug("kept image features are not for %s: %s", type(self.model).__name__, error)
            return False
        tolerance = 1e-4 if self.model.dtype in (torch.float32, torch.float64) else 5e-2
        return torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)

    def _on_device(self, value: Any) -> Any:
        if not hasattr(value, "to"):
            return value
        if value.is_floating_point():
            return value.to(self.model.device, dtype=self.model.dtype)
        return value.to(self.model.device)

    def pad(self, ids: list[list[int]], extra: dict[str, Any]) -> dict[str, Any]:
        """Tensors on the model's device, padded on the left."""
        import torch

        length = max(map(len, ids))

        def stack(rows: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[fill] * (length - len(row)) + row for row in rows], device=self.model.device)

        inputs = {
            "input_ids": stack(ids, self.format.tokenizer.pad_token_id or 0),
            "attention_mask": stack([[1] * len(row) for row in ids], 0),
        }
        for key, value in extra.items():
            per_token = isinstance(value, list) and key not in inputs
            inputs[key] = stack(value, 0) if per_token else self._on_device(value)
        return inputs

"""Lfm2-VL, whose own image processor exists for torchvision only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .texts import byte_level_tokenizer, chatml, save, text_config, vision_config


class _ImagesKwargs(ImagesKwargs, total=False):
    return_row_col_info: bool


class TinyLfm2VlImages(BaseImageProcessor):
    """Lfm2-VL's inputs from PIL: patches of 8 x 8 pixels; a wide image is two tiles and a thumbnail."""

    valid_kwargs = _ImagesKwargs
    model_input_names: ClassVar = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]
    use_thumbnail, tile_size, downsample_factor, encoder_patch_size = True, 32, 2, 8
    most_patches = 16

    def __call__(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        patches, masks, shapes = [], [], []
        layout: dict[str, list[Any]] = {"image_rows": [], "image_cols": [], "image_sizes": []}
        for image in (im for sample in images for im in (sample if isinstance(sample, list) else [sample])):
            wide = image.width >= 2 * image.height
            size = (16, 32) if image.height > image.width else (32, 16) if image.width > image.height else (32, 32)
            pieces = [image.resize(size)]
            if wide:
                half = image.width // 2
                boxes = [(0, 0, half, image.height), (half, 0, image.width, image.height)]
                pieces = [image.resize((32, 32), box=box) for box in boxes] + pieces
            for piece in pieces:
                one, shape = self._patches(piece)
                patches.append(np.pad(one, ((0, self.most_patches - len(one)), (0, 0))))
                masks.append([1] * len(one) + [0] * (self.most_patches - len(one)))
                shapes.append(shape)
            layout["image_rows"].append(1)
            layout["image_cols"].append(2 if wide else 1)
            layout["image_sizes"].append([size[1], size[0]])
        data = {"pixel_values": np.stack(patches), "pixel_attention_mask": np.array(masks), **layout}
        return BatchFeature(data | {"spatial_shapes": np.array(shapes)}, tensor_type="pt")

    def fetch_images(self, images: Any) -> Any:
        return images

    def _patches(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1
        rows, columns = pixels.shape[0] // 8, pixels.shape[1] // 8
        tiles = pixels.reshape(rows, 8, columns, 8, 3).transpose(0, 2, 1, 3, 4)
        return tiles.reshape(rows * columns, 8 * 8 * 3), (rows, columns)


def tiny_lfm2_vl(tmp: Path) -> Path:
    """Lfm2-VL over a SigLIP 2 tower and convolutions; 2 or 4 tokens a tile. Its processor is `lfm2_vl_processor`'s."""
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    folder = tmp / "lfm2-vl"
    if folder.exists():
        return folder
    processor = lfm2_vl_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    vision = vision_config(model_type="siglip2_vision_model", num_patches=16, vision_use_head=False)
    del vision["image_size"]
    config = Lfm2VlConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=vision,
        text_config=text_config("lfm2", tokenizer),
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return save(folder, Lfm2VlForConditionalGeneration(config), tokenizer)


def lfm2_vl_processor() -> Any:
    """Lfm2-VL's processor over `TinyLfm2VlImages`."""
    from transformers import Lfm2VlProcessor

    extra = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|im_start|>", "<|im_end|>"]
    extra += [f"<|img_row_1_col_{j}|>" for j in (1, 2)]
    template = chatml("<image>", before="{{ bos_token }}")
    return Lfm2VlProcessor(TinyLfm2VlImages(), byte_level_tokenizer(extra), chat_template=template)

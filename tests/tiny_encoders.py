"""Tiny random CLIP and SigLIP with their processors, saved as any checkpoint on the Hub is; built once a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def tiny_clip(tmp: Path) -> Path:
    """CLIP: 32-pixel images, texts of at most 32 tokens, projections of 128."""
    from drum_hf.playground.building.pretraining import build_clip

    folder = tmp / "clip"
    if not folder.exists():
        for part in build_clip(seed=0):
            part.save_pretrained(folder)
    return folder


def tiny_siglip(tmp: Path) -> Path:
    """SigLIP: 16-pixel images, texts of at most 16 tokens, projections of 24."""
    from transformers import SiglipConfig, SiglipModel, SiglipProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from drum_hf.playground.building.pretraining import build_tokenizer

    folder = tmp / "siglip"
    if folder.exists():
        return folder
    tokenizer = build_tokenizer({"pad_token": "</s>", "unk_token": "<unk>"}, model_max_length=64)
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = SiglipConfig(
        text_config=tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config=tower | {"image_size": 16, "patch_size": 8},
    )
    torch.manual_seed(0)
    SiglipModel(config).save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

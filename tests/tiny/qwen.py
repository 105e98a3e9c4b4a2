"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an image takes as many tokens as it is large, and positions have three axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drum_hf.lvlm.local.processors import image_only

from .texts import byte_level_tokenizer, chatml, save, text_config

_EXTRA = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _parts(processor_class: Any, system: str = "") -> tuple[Any, dict[str, Any]]:
    """A processor, and the token ids that a configuration names."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = byte_level_tokenizer(_EXTRA)
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    template = chatml(_IMAGE, system=system)
    processor = image_only(processor_class)(images, tokenizer, None, chat_template=template)
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return processor, {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()}


def _text(kind: str, tokenizer: Any, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **more.pop("rope", {})}
    return text_config(kind, tokenizer, rope_parameters=rope, **more)


def tiny_qwen2_vl(tmp: Path) -> Path:
    """Qwen2-VL, whose template begins with a system turn of its own."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    folder = tmp / "qwen2-vl"
    if folder.exists():
        return folder
    processor, ids = _parts(Qwen2VLProcessor, system="a word is a word.")
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=_text("qwen2_vl_text", processor.tokenizer),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
        },
        **ids,
    )
    return save(folder, Qwen2VLForConditionalGeneration(config), processor, "Qwen2VLVideoProcessor")


def tiny_qwen2_5_vl(tmp: Path) -> Path:
    """Qwen2.5-VL, the first layer of whose vision tower sees windows of 2 x 2 tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    folder = tmp / "qwen2.5-vl"
    if folder.exists():
        return folder
    processor, ids = _parts(Qwen2_5_VLProcessor, system="a word is a word.")
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=_text("qwen2_5_vl_text", processor.tokenizer),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
        },
        **ids,
    )
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), processor, "Qwen2VLVideoProcessor")


def tiny_qwen3_vl(tmp: Path) -> Path:
    """Qwen3-VL, which adds two of its vision tower's layers to the decoder's first two."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    folder = tmp / "qwen3-vl"
    if folder.exists():
        return folder
    processor, ids = _parts(Qwen3VLProcessor)
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config=_text("qwen3_vl_text", processor.tokenizer, head_dim=8, rope={"mrope_interleaved": True}),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.3,
        },
        **ids,
    )
    return save(folder, Qwen3VLForConditionalGeneration(config), processor, "Qwen3VLVideoProcessor")

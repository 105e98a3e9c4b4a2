"""InternVL."""

from __future__ import annotations

from pathlib import Path

import torch

from drum_hf.lvlm.local.processors import image_only

from .texts import byte_level_tokenizer, chatml, save, text_config, vision_config


def tiny_internvl(tmp: Path) -> Path:
    """InternVL over Qwen2; up to 4 tiles and a thumbnail an image, 4 tokens each."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    folder = tmp / "internvl"
    if folder.exists():
        return folder
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    extra = [*named.values(), "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level_tokenizer(extra, extra_special_tokens=named)
    images = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = image_only(InternVLProcessor)(
        images, tokenizer, None, image_seq_length=4, chat_template=chatml("<IMG_CONTEXT>\n")
    )
    torch.manual_seed(0)
    config = InternVLConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        vision_config=vision_config(
            model_type="internvl_vision", image_size=[32, 32], patch_size=[8, 8], layer_scale_init_value=1.0
        ),
        text_config=text_config("qwen2", tokenizer),
        tie_word_embeddings=False,
    )
    return save(folder, InternVLForConditionalGeneration(config), processor, "InternVLVideoProcessor")

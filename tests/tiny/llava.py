"""LLaVA, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from pathlib import Path

import torch

from drum_hf.lvlm.local.processors import image_only

from .texts import byte_level_tokenizer, save, text_config, vision_config

_IMAGES = "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
_TEXTS = "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
NEXT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}" + _IMAGES + "{{ '<image>\n' }}{% endfor %}" + _TEXTS + "{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' }}" + _TEXTS + "{{ part['text'] }}{% endfor %}{{ '</s> ' }}{% endif %}"
    "{% endfor %}"
)
# The generation prompt lacks a space that the turns have; the real one does, too.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + _IMAGES
    + "{{ '<image>' }}{% endfor %}"
    + _TEXTS
    + "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GRIDS = [[32, 64], [64, 32], [64, 64], [32, 96]]


def tiny_llava(tmp: Path) -> Path:
    """LLaVA over a CLIP tower and Llama; 16 tokens an image."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp / "llava"
    if folder.exists():
        return folder
    tokenizer = byte_level_tokenizer(["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=vision_config(model_type="clip_vision_model"),
        text_config=text_config("llama", tokenizer),
        vision_feature_layer=-1,
    )
    return save(folder, LlavaForConditionalGeneration(config), processor)


def tiny_llava_next(tmp: Path) -> Path:
    """LLaVA-NeXT over a CLIP tower and Mistral; an image is 4 tokens, and its tiles without their padding."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    folder = tmp / "llava-next"
    if folder.exists():
        return folder
    tokenizer = byte_level_tokenizer(["<image>"])
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=_GRIDS
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=NEXT_TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlavaNextConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=vision_config(model_type="clip_vision_model", patch_size=16),
        text_config=text_config("mistral", tokenizer, sliding_window=None),
        image_grid_pinpoints=_GRIDS,
    )
    return save(folder, LlavaNextForConditionalGeneration(config), processor)


def tiny_llava_onevision(tmp: Path) -> Path:
    """LLaVA-OneVision over a SigLIP tower and Qwen2; a conversation's only image is shown in tiles, others are not."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    folder = tmp / "llava-onevision"
    if folder.exists():
        return folder
    tokenizer = byte_level_tokenizer(["<image>", "<video>", "<|im_start|>", "<|im_end|>"])
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=_GRIDS)
    processor = image_only(LlavaOnevisionProcessor)(
        images,
        tokenizer,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_config=vision_config(model_type="siglip_vision_model", patch_size=16, vision_use_head=False),
        text_config=text_config("qwen2", tokenizer),
        image_grid_pinpoints=_GRIDS,
    )
    return save(folder, LlavaOnevisionForConditionalGeneration(config), processor, "LlavaOnevisionVideoProcessor")

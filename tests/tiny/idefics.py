"""Idefics3 and SmolVLM."""

from __future__ import annotations

from pathlib import Path

import torch

from drum_hf.lvlm.local.processors import image_only

from .texts import byte_level_tokenizer, save, text_config, vision_config, word_piece_tokenizer

_TURNS = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _extra(splitting: bool) -> list[str]:
    extra = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    return extra + [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)] * splitting


def tiny_idefics3(tmp: Path, text: str = "llama", splitting: bool = False, merging: bool = False) -> Path:
    """Idefics3 over Llama (byte-level BPE) or Lfm2 (WordPiece); 4 tokens an image, or a tile."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    folder = tmp / f"idefics3-{text}{'-splitting' * splitting}{'-merging' * merging}"
    if folder.exists():
        return folder
    if text == "lfm2":
        tokenizer = word_piece_tokenizer(_extra(splitting))
    else:
        tokenizer = byte_level_tokenizer(_extra(splitting), merging=merging)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64 if splitting else 32},
        max_image_size={"longest_edge": 32},
        do_image_splitting=splitting,
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template="<s>" + _TURNS)
    torch.manual_seed(0)
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        vision_config=vision_config(),
        text_config=text_config(text, tokenizer),
        tie_word_embeddings=False,
    )
    return save(folder, Idefics3ForConditionalGeneration(config), processor)


def tiny_smolvlm(tmp: Path) -> Path:
    """SmolVLM, its images split in tiles of 4 tokens; offsets leave out leading whitespace."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMProcessor
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    folder = tmp / "smolvlm"
    if folder.exists():
        return folder
    extra = [*_extra(True), "<|im_start|>", "<video>"]
    tokenizer = byte_level_tokenizer(extra, trim=True)
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    processor = image_only(SmolVLMProcessor)(
        images, tokenizer, None, image_seq_len=4, chat_template="<|im_start|>" + _TURNS
    )
    torch.manual_seed(0)
    config = SmolVLMConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        vision_config=vision_config(),
        text_config=text_config("llama", tokenizer),
    )
    return save(folder, SmolVLMForConditionalGeneration(config), processor, "SmolVLMVideoProcessor")

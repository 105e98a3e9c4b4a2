"""Gemma 3."""

from __future__ import annotations

from pathlib import Path

import torch

from .texts import byte_level_tokenizer, save, text_config, vision_config

# As the real one: the system text goes into the first user turn, texts are trimmed, roles must take turns.
_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ first if loop.first }}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<start_of_image>' }}{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def tiny_gemma3(tmp: Path, window: int = 512) -> Path:
    """Gemma 3, two of whose three layers see `window` tokens; 4 tokens an image, which see one another."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    folder = tmp / f"gemma3-{window}"
    if folder.exists():
        return folder
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    extra = [*named.values(), "<start_of_turn>", "<end_of_turn>"]
    tokenizer = byte_level_tokenizer(extra, extra_special_tokens=named)
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, chat_template=_TEMPLATE, image_seq_length=4)
    torch.manual_seed(0)
    config = Gemma3Config(
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        mm_tokens_per_image=4,
        vision_config=vision_config(model_type="siglip_vision_model", vision_use_head=False),
        text_config=text_config(
            "gemma3_text",
            tokenizer,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=window,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            tie_word_embeddings=False,  # else it repeats its input
        ),
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # begins as zeros: blind
    return save(folder, model, processor)

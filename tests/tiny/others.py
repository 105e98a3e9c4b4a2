"""Families that are unlike the rest: Mllama, Janus, Gemma 4, Qwen3.5, Idefics2, Aya Vision.

Their templates are ours, in the structure of the published ones: a date, a system turn that is printed as it is, a
default system prompt that the processor adds, a switch for reasoning, a generation prompt that no rendered turn has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drum_hf.lvlm.local.processors import image_only

from .texts import byte_level_tokenizer, save, text_config, vision_config

# As the real one: the date and the system text, printed as it is given, stand in a system turn of the template's own.
_MLLAMA = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% if system %}{{ '<|head|>system<|foot|>\n\nToday: ' + date_string + '\n' }}{{ system }}{{ '<|eot|>' }}"
    "{% else %}{{ '<|head|>system<|foot|>\n\nToday: ' + date_string + '\n<|eot|>' }}{% endif %}"
    "{% for message in turns %}{{ '<|head|>' + message['role'] + '<|foot|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<|image|>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|foot|>\n\n' }}{% endif %}"
)

_JANUS = (
    "{% for message in messages %}{{ '<|User|>: ' if message['role'] == 'user' else '<|Assistant|>: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image_placeholder>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\n\n' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"
)

# As the real one: the model is asked after an empty channel of thoughts, which no rendered turn has.
_GEMMA4 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|turn>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\n' }}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<|image|>' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{% if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)

# As the real one: the last turn begins after an empty block of thoughts, earlier ones don't, and with thinking on the
# model is asked within a block.
_QWEN35 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)

# As GLM's: nothing ends a turn but the beginning of the next; what the assistant says is printed as it is.
GLM_TEMPLATE = (
    "[gMASK]{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' }}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_IDEFICS2 = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tiny_mllama(tmp: Path) -> Path:
    """Mllama: its decoder attends to images across, by masks with a row for each token; up to 4 tiles an image."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    folder = tmp / "mllama"
    if folder.exists():
        return folder
    tokenizer = byte_level_tokenizer(["<|image|>", "<|head|>", "<|foot|>", "<|eot|>", "<|python_tag|>"])
    images = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    processor = MllamaProcessor(images, tokenizer, chat_template=_MLLAMA)
    torch.manual_seed(0)
    text = text_config("mllama_text_model", tokenizer, cross_attention_layers=[1], num_hidden_layers=3)
    config = MllamaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
        vision_config={
            "model_type": "mllama_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 4,
            "initializer_range": 0.3,
        },
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    )
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():  # gates begin closed: blind
        for name, weight in model.named_parameters():
            if "gate" in name and weight.numel() == 1:
                weight.fill_(1.5)
    return save(folder, model, processor)


def tiny_janus(tmp: Path) -> Path:
    """Janus, whose processor writes a system prompt of its own before every conversation."""
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    folder = tmp / "janus"
    if folder.exists():
        return folder
    named = {
        "image_token": "<image_placeholder>",
        "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    }
    extra = [*named.values(), "<|User|>", "<|Assistant|>"]
    tokenizer = byte_level_tokenizer(extra, extra_special_tokens=named)
    images = JanusImageProcessorPil(size={"height": 32, "width": 32}, min_size=8)
    processor = JanusProcessor(
        images, tokenizer, chat_template=_JANUS, use_default_system_prompt=True, num_image_tokens=16
    )
    torch.manual_seed(0)
    config = JanusConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        vision_config={
            "model_type": "janus_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "mlp_ratio": 2,
            "projection_dim": 32,
            "depth": 2,
            "num_image_tokens": 16,
            "initializer_range": 0.3,
        },
        vq_config={
            "model_type": "janus_vqgan",
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
            "num_hidden_layers": 1,
        },
        text_config=text_config("llama", tokenizer),
        tie_word_embeddings=False,
    )
    return save(folder, JanusForConditionalGeneration(config), processor)


def tiny_gemma4(tmp: Path) -> Path:
    """Gemma 4, whose full layers have wider heads than its sliding ones; at most 70 tokens an image."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4Processor
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    folder = tmp / "gemma4"
    if folder.exists():
        return folder
    named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    named |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    extra = [*named.values(), "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|video|>"]
    tokenizer = byte_level_tokenizer(extra, extra_special_tokens=named)
    tokenizer.model_max_length = 2048
    images = Gemma4ImageProcessorPil(patch_size=2, max_soft_tokens=70, pooling_kernel_size=2)
    processor = image_only(Gemma4Processor)(
        Gemma4AudioFeatureExtractor(), images, tokenizer, None, chat_template=_GEMMA4, image_seq_length=70
    )
    torch.manual_seed(0)
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in named.items()}
    text = text_config("gemma4_text", tokenizer, head_dim=8, global_head_dim=16, sliding_window=64)
    config = Gemma4Config(
        boi_token_id=ids["boi_token"],
        eoi_token_id=ids["eoi_token"],
        image_token_id=ids["image_token"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=ids["audio_token"],
        audio_config=None,
        vision_config={
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "patch_size": 2,
            "position_embedding_size": 512,
            "initializer_range": 0.3,
        },
        text_config={
            **text,
            "max_position_embeddings": 2048,
            "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
        tie_word_embeddings=False,
    )
    return save(folder, Gemma4ForConditionalGeneration(config), processor, "Gemma4VideoProcessor")


def tiny_qwen3_5(tmp: Path) -> Path:
    """Qwen3.5: layers of linear attention beside full ones, and a template with a switch for reasoning."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    folder = tmp / "qwen3.5"
    if folder.exists():
        return folder
    extra = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_level_tokenizer([*extra, "<think>", "</think>"])
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    processor = image_only(Qwen3VLProcessor)(images, tokenizer, None, chat_template=_QWEN35)
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    torch.manual_seed(0)
    config = Qwen3_5Config(
        text_config=text_config(
            "qwen3_5_text",
            tokenizer,
            head_dim=8,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 1.0,
            },
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [],
            "initializer_range": 0.3,
        },
        **{f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()},
    )
    return save(folder, Qwen3_5ForConditionalGeneration(config), processor, "Qwen3VLVideoProcessor")


def tiny_idefics2(tmp: Path) -> Path:
    """Idefics2, whose connector makes as many tokens of every image."""
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    folder = tmp / "idefics2"
    if folder.exists():
        return folder
    tokenizer = byte_level_tokenizer(["<image>", "<fake_token_around_image>", "<end_of_utterance>"])
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False)
    processor = Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template="<s>" + _IDEFICS2)
    torch.manual_seed(0)
    config = Idefics2Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=vision_config(model_type="idefics2_vision"),
        perceiver_config={
            "model_type": "idefics2_perceiver",
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        text_config=text_config("mistral", tokenizer, sliding_window=None),
        tie_word_embeddings=False,
    )
    return save(folder, Idefics2ForConditionalGeneration(config), processor)


OTHERS: dict[str, Any] = {
    "mllama": tiny_mllama,
    "janus": tiny_janus,
    "gemma4": tiny_gemma4,
    "qwen3.5": tiny_qwen3_5,
    "idefics2": tiny_idefics2,
}
